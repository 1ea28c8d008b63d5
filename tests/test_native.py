"""Chapter 15: what machine code does is what the interpreter does, and what only it can do wrong."""

import gc
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import weakref

import pytest

import fuzz_native
from conftest import ROOT
from test_engine import leb128, module_of, section

import chibishim
from chibishim import (F64, FUNCREF, I32, I64, V128, Exhaustion, FunctionType, Global, GlobalType, Instance, Memory, Module, Table,
                       Thrown, Trap, choose_tier)

FLAGS = "--enable-tail-call", "--enable-exceptions", "--enable-multi-memory"
# In a function, it makes the compiler leave it to the interpreter.
STAYS = "(if (i32.const 0) (then (drop (i32.load $other (i32.const 0)))))"
SPIN = '(module (func (export "_start") (loop (br 0))))'


@pytest.fixture
def tier(monkeypatch):
    """tier(mode) makes functions be compiled in that mode from their first call on."""
    if fuzz_native.refused():
        pytest.skip("no native tier: %s" % fuzz_native.refused())
    monkeypatch.setattr(Module, "tier", None)

    def choose(mode):
        Module.tier = choose_tier(mode)
        if mode == "auto":
            Module.tier.credit = 0      # as if the program had run for a while
    return choose


def is_compiled(function):
    return function.entry is not None and bool(function.entry[0]) and function.entry[0][0][0] is chibishim.do_enter


@pytest.fixture
def native(wat, tier):
    """native(text, imports) -> an instance whose functions are compiled when they are called."""
    tier("native")
    return lambda text, imports=None: Instance(Module(wat(text, *FLAGS)), imports)


def outcome(function, *arguments):
    """A call's results, or the trap with the (function's index, offset) of each active call."""
    try:
        return function(*arguments)
    except Trap as trap:
        return trap.__class__, str(trap), [(f.index, at) for f, at in trap.backtrace]


def run_script(script, *words, **options):
    """A script in a process of its own, after an import of what the tests share."""
    script = "import sys; sys.path.insert(0, %r)\nimport chibishim\nfrom chibishim import *\n" % ROOT + script
    return subprocess.run([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, **options)


# -- traps --

TRAPS = {
    "unreachable": "unreachable",
    "integer divide by zero": "(i32.div_s (i32.const 1) (local.get 0))",
    "integer divide by zero of a remainder": "(i32.wrap_i64 (i64.rem_u (i64.const 1) (i64.extend_i32_u (local.get 0))))",
    "integer overflow": "(i32.div_s (i32.const 0x80000000) (i32.sub (local.get 0) (i32.const 1)))",
    "integer overflow of a conversion": "(i32.trunc_f64_s (f64.add (f64.convert_i32_s (local.get 0)) (f64.const 2147483648)))",
    "invalid conversion to integer": "(i32.trunc_f32_u (f32.div (f32.convert_i32_s (local.get 0)) (f32.convert_i32_s (local.get 0))))",
    "out of bounds memory access": "(i32.load offset=65533 (local.get 0))",
    "out of bounds memory access of a large offset": "(i32.load offset=0xffffffff (i32.sub (local.get 0) (i32.const 1)))",
    "out of bounds memory access of a store": "(i64.store offset=65529 (local.get 0) (i64.const 1)) (i32.const 0)",
    "out of bounds memory access of memory.fill": "(memory.fill (i32.const 65536) (i32.const 1) (i32.add (local.get 0) (i32.const 1))) (i32.const 0)",
    "out of bounds memory access of memory.init": "(memory.init 0 (local.get 0) (i32.const 1) (i32.const 1)) (i32.const 0)",
    "out of bounds table access": "(table.set 0 (i32.add (local.get 0) (i32.const 4)) (ref.null func)) (i32.const 0)",
    "undefined element": "(call_indirect (type $i) (i32.add (local.get 0) (i32.const 4)))",
    "uninitialized element 2": "(call_indirect (type $i) (i32.add (local.get 0) (i32.const 2)))",
    "indirect call type mismatch": "(call_indirect (type $i) (local.get 0))",
    "of the host": "(call $host) (i32.const 0)",
}


def check_trap(wat, tier, name, mode, is_hot):
    """The same text and backtrace in the interpreter and in a mode that replaces functions, as `is_hot` tells."""
    text = """(module (import "h" "f" (func $host)) (type $i (func (result i32)))
      (memory 1) (table 4 funcref) (elem (i32.const 0) $outer) (data "")
      (func $culprit (param i32) (result i32) (local i64 f64) (local.set 1 (i64.const 5)) %s)
      (func $middle (param i32 f64 i32) (result i32)
        (if (local.get 0) (then (return (call $middle (i32.sub (local.get 0) (i32.const 1)) (local.get 1) (local.get 2)))))
        (i32.add (i32.const 1) (call $culprit (local.get 2))))
      (func $outer (export "f") (param i32) (result i32) (i32.sub (call $middle (i32.const 3) (f64.const 1) (local.get 0)) (i32.const 2))))""" % TRAPS[name]

    def fail():
        raise Trap("of the host")
    outcomes = []
    for one in ("interpreter", mode):
        tier(one)
        instance = Instance(Module(wat(text)), {"h": {"f": fail}})
        outcomes.append(outcome(instance.exports["f"], 0))
    assert all(map(is_hot, instance.functions[1:]))
    assert outcomes[0] == outcomes[1]
    kind, message, backtrace = outcomes[0]
    assert name.startswith(message) and len(backtrace) == 6


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_has_the_interpreter_s_text_and_backtrace(wat, tier, name):
    check_trap(wat, tier, name, "native", is_compiled)


def test_a_store_across_the_end_of_memory_writes_nothing(native):
    "I10, I9"
    instance = native("""(module (memory (export "m") 1)
      (func (export "f") (param i32) (i64.store (local.get 0) (i64.const -1)))
      (func (export "v") (param i32) (v128.store (local.get 0) (v128.const i64x2 -1 -1))))""")
    for name, address in (("f", 65529), ("v", 65521), ("f", -1), ("v", -16)):
        with pytest.raises(Trap, match="out of bounds memory access"):
            instance.exports[name](address)
    assert not any(instance.exports["m"].view)


# -- the stack --


def test_runaway_recursion_is_exhaustion_and_calls_go_on_after_it(native):
    "I4"
    f = native('(module (func $f (export "f") (param i32) (result i32) (if (result i32) (local.get 0) (then (i32.add (call $f (local.get 0)) (i32.const 1))) (else (i32.const 7)))))').exports["f"]
    for _ in range(3):
        with pytest.raises(Exhaustion, match="call stack exhausted") as caught:
            f(1)
        assert len(caught.value.backtrace) > 1000
        assert f(0) == 7


def test_recursion_of_wide_frames_is_exhaustion(native):
    "I4"
    adds = "".join("(local.set %d (i64.add (local.get %d) (i64.const %d)))" % (i, i - 1, i) for i in range(1, 3000))
    uses = "".join("(local.set 0 (i64.xor (local.get 0) (local.get %d)))" % i for i in range(3000))
    instance = native('(module (func $f (export "f") (param i64) (result i64) (local %s) %s (local.set 0 (call $f (local.get 0))) %s (local.get 0)))' % (
        "i64 " * 2999, adds, uses))
    with pytest.raises(Exhaustion, match="call stack exhausted"):
        instance.exports["f"](1)


MUTUAL = """(module (memory 0) (memory $other 0)
  (func $even (export "even") (param i32) (result i32)
    (if (result i32) (i32.eqz (local.get 0)) (then (i32.const 1)) (else (call $odd (i32.sub (local.get 0) (i32.const 1))))))
  (func $odd (export "odd") (param i32) (result i32) """ + STAYS + """
    (if (result i32) (i32.eqz (local.get 0)) (then (i32.const 0)) (else (call $even (i32.sub (local.get 0) (i32.const 1)))))))"""


def test_recursion_across_the_seam(native):
    instance = native(MUTUAL)
    assert [instance.exports["even"](n) for n in (0, 1, 50, 51)] == [1, 0, 1, 0]
    assert [is_compiled(f) for f in instance.functions] == [True, False]
    with pytest.raises(Exhaustion, match="call stack exhausted") as caught:
        instance.exports["even"](-1)
    indices = [f.index for f, _ in caught.value.backtrace]
    assert all(one != other for one, other in zip(indices[1:], indices[2:]))
    assert instance.exports["even"](50) == 1


def test_a_thousand_calls_across_the_seam(wat):
    done = run_script("""
sys.setrecursionlimit(chibishim.RECURSION_LIMIT)
chibishim.Module.tier = choose_tier("native")
print(Instance(Module(bytes.fromhex(sys.argv[1]))).exports["even"](1000))""", wat(MUTUAL, *FLAGS).hex())
    assert done.stdout == b"1\n", done.stderr


def test_a_deep_recursion_of_what_is_hot_and_what_is_not_yet(wat, tier):
    tier("auto")
    even = Instance(Module(wat(MUTUAL.replace(STAYS, ""), *FLAGS))).exports["even"]
    for _ in range(2000):
        even(0)
    assert is_compiled(even)
    assert even(600) == 1


@pytest.mark.parametrize("mode", ["interpreter", "native"])
def test_recursion_through_the_host_is_exhaustion_at_whatever_frame_it_ends(wat, tier, mode):
    "I4"
    tier(mode)
    exports, outcomes = {}, []
    text = """(module (import "h" "g" (func $g (param i32) (result i32)))
      (func (export "f") (param i32) (result i32) (i32.add (call $g (i32.const 1000000)) (i32.const 1))))"""
    exports.update(Instance(Module(wat(text)), {"h": {"g": lambda x: exports["f"](x)}}).exports)

    def deeper(levels):
        if levels:
            return deeper(levels - 1)
        with pytest.raises(Exhaustion, match="call stack exhausted"):
            outcomes.append(exports["f"](0))
    for levels in range(40):
        deeper(levels)
    assert not outcomes


@pytest.mark.parametrize("mode", ["interpreter", "native"])
def test_who_made_a_tail_call_is_in_no_backtrace(wat, tier, mode):
    def fail():
        raise Trap("the host's")
    tier(mode)
    instance = Instance(Module(wat("""(module (import "m" "h" (func $host)) (func $gone return_call $host)
      (func (export "f") call $gone))""", *FLAGS)), {"m": {"h": fail}})
    for _ in range(2):
        with pytest.raises(Trap, match="the host's") as caught:
            instance.exports["f"]()
        assert [function.index for function, _ in caught.value.backtrace] == [2]


def test_tail_calls_need_no_stack(native):
    instance = native("""(module (type $t (func (param i32 i64 f64) (result i64))) (table 1 funcref) (elem (i32.const 0) $g)
      (func $f (export "f") (param i32 i64) (result i64)
        (if (i32.eqz (local.get 0)) (then (return (local.get 1))))
        (return_call $g (i32.sub (local.get 0) (i32.const 1)) (i64.add (local.get 1) (i64.const 2)) (f64.const 3)))
      (func $g (param i32 i64 f64) (result i64)
        (if (i32.and (local.get 0) (i32.const 1))
          (then (return_call_indirect (type $t) (i32.sub (local.get 0) (i32.const 1)) (i64.add (local.get 1) (i64.const 2)) (f64.const 3) (i32.const 0))))
        (return_call $f (local.get 0) (local.get 1))))""")
    assert instance.exports["f"](999999, 5) == 5 + 2 * 999999
    assert all(map(is_compiled, instance.functions))


# -- tier-up --

LOOPS = """(module (memory 1) (func (export "f") (param $n i32) (result i64 f64 f32 i32) (local $a i64) (local $b f64) (local $c f32) (local $v v128) (local $m i32)
  (local.set $b (f64.const 0.5)) (local.set $a (i64.const 0x123456789abcdef))
  (loop $outer
    (local.set $m (i32.const 10))
    (local.get $n)
    (loop $inner (param i32)
      (local.set $n)
      (local.set $a (i64.add (i64.rotl (local.get $a) (i64.const 7)) (i64.extend_i32_u (i32.load (i32.const 8)))))
      (local.set $b (f64.add (f64.mul (local.get $b) (f64.const 0.75)) (f64.convert_i32_u (local.get $m))))
      (local.set $c (f32.demote_f64 (local.get $b)))
      (local.set $v (i32x4.add (local.get $v) (i32x4.splat (local.get $m))))
      (i32.store (i32.const 8) (i32.xor (i32.load (i32.const 8)) (i32x4.extract_lane 2 (local.get $v))))
      (local.get $n)
      (br_if $inner (local.tee $m (i32.sub (local.get $m) (i32.const 1))))
      (local.set $n))
    (br_if $outer (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
  (local.get $a) (local.get $b) (local.get $c) (i32x4.extract_lane 3 (local.get $v))))"""


def test_a_running_loop_goes_on_as_machine_code(wat, tier):
    results = []
    for mode in ("interpreter", "auto"):
        tier(mode)
        instance = Instance(Module(wat(LOOPS)))
        results.append(instance.exports["f"](3000))
    assert is_compiled(instance.functions[0])
    assert results[0] == results[1]


def test_a_function_that_is_called_often_is_compiled(wat, tier):
    tier("auto")
    f = Instance(Module(wat('(module (func (export "f") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 3))))'))).exports["f"]
    assert f(5) == 15 and not is_compiled(f)
    assert [f(n) for n in range(2000)] == [3 * n for n in range(2000)]
    assert is_compiled(f)


def test_a_program_that_prints_a_line_is_not_compiled():
    done = run_script("""
with open(sys.argv[1], "rb") as file:
    status = chibishim.run_command(file.read(), ["hello"], {}, [])
print(status, chibishim.Module.tier.mode, chibishim.Tier.machine, "_ctypes" in sys.modules)""",
                      os.path.join(ROOT, "tests", "modules", "hello.wasm"), env=dict(os.environ, CHIBISHIM_TIER="auto"))
    assert done.stdout == b"Hello, World!\n0 auto None False\n", done.stderr


# -- what is shared with the interpreter and with others --


def test_a_memory_that_grows_is_larger_for_everybody(native):
    instance = native("""(module (memory (export "m") 0 5) (memory $other 0)
      (func (export "load") (param i32) (result i32) (i32.load (local.get 0)))
      (func (export "store") (param i32 i32) (i32.store (local.get 0) (local.get 1)))
      (func (export "size") (result i32) (memory.size))
      (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
      (func (export "interpreted") (param i32) (result i32) """ + STAYS + """ (memory.grow (local.get 0))))""")
    exports, memory = instance.exports, instance.exports["m"]
    assert outcome(exports["load"], 0)[1] == "out of bounds memory access" and exports["size"]() == 0
    for pages, grow in enumerate((exports["grow"], exports["interpreted"], memory.grow, exports["grow"])):
        assert grow(1) == pages
        last = 65536 * (pages + 1) - 4
        exports["store"](last, 7 + pages)
        assert exports["load"](last) == 7 + pages == memory.view[last]
        assert outcome(exports["load"], last + 1)[1] == "out of bounds memory access"
        assert exports["size"]() == pages + 1 == memory.pages
    assert exports["grow"](2) == -1 and exports["size"]() == 4
    assert [is_compiled(f) for f in instance.functions] == [True, True, True, True, False]


def test_a_table_that_changes_is_seen_by_call_indirect(native):
    instance = native("""(module (type $t (func (result i32))) (table (export "t") 2 funcref) (elem (i32.const 0) $one $two) (elem $passive func $two $one)
      (func $one (export "one") (result i32) (i32.const 1)) (func $two (export "two") (result i32) (i32.const 2))
      (func (export "call") (param i32) (result i32) (call_indirect (type $t) (local.get 0)))
      (func (export "set") (param i32 i32) (table.set 0 (local.get 0) (table.get 0 (local.get 1))))
      (func (export "init") (table.init $passive (i32.const 0) (i32.const 0) (i32.const 2)))
      (func (export "copy") (table.copy (i32.const 0) (i32.const 1) (i32.const 1)))
      (func (export "grow") (param i32) (result i32) (table.grow 0 (table.get 0 (i32.const 1)) (local.get 0)))
      (func (export "drop") (table.fill 0 (i32.const 0) (ref.null func) (i32.const 1))))""")
    exports, table = instance.exports, instance.exports["t"]
    both = lambda: (exports["call"](0), exports["call"](1))
    assert both() == both() == (1, 2)
    exports["set"](0, 1)
    assert both() == (2, 2)
    exports["init"]()
    assert both() == (2, 1)
    exports["copy"]()
    assert both() == (1, 1)
    assert exports["grow"](1000) == 2 and exports["call"](1001) == 1
    assert outcome(exports["call"], 1002)[1] == "undefined element"
    exports["drop"]()
    assert outcome(exports["call"], 0)[1] == "uninitialized element 0"
    table.elements[0] = exports["two"]
    table.changed()
    assert both() == (2, 1)
    assert is_compiled(exports["call"])


def test_a_global_is_one_for_native_code_the_embedder_and_other_instances(native):
    maker = native("""(module (global (export "i") (mut i32) (i32.const 1)) (global (export "I") (mut i64) (i64.const 2))
      (global (export "f") (mut f32) (f32.const 3)) (global (export "F") (mut f64) (f64.const 4)) (global $v (export "v") (mut v128) (v128.const i32x4 5 5 5 5))
      (func (export "next") (global.set 0 (i32.add (global.get 0) (i32.const -3))) (global.set 1 (i64.add (global.get 1) (i64.const -4)))
        (global.set 2 (f32.add (global.get 2) (f32.const 0.5))) (global.set 3 (f64.add (global.get 3) (f64.const 0.25)))
        (global.set $v (i32x4.add (global.get $v) (v128.const i32x4 1 1 1 1)))))""")
    exports = maker.exports
    user = native("""(module (import "m" "i" (global $i (mut i32))) (import "m" "F" (global $F (mut f64)))
      (func (export "get") (result i32 f64) (global.get $i) (global.get $F))
      (func (export "set") (param i32 f64) (global.set $i (local.get 0)) (global.set $F (local.get 1))))""", {"m": exports})
    exports["next"]()
    values = lambda: [exports[name].value for name in "iIfF"]
    assert values() == [(1 << 32) - 2, (1 << 64) - 2, 3.5, 4.25] and exports["v"].value == b"\6\0\0\0" * 4
    assert user.exports["get"]() == (-2, 4.25)
    exports["i"].value, exports["F"].value = 10, 0.5
    assert user.exports["get"]() == (10, 0.5)
    user.exports["set"](20, 1.5)
    exports["next"]()
    assert user.exports["get"]() == (17, 1.75) and values()[0] == 17
    assert is_compiled(exports["next"]) and is_compiled(user.exports["get"])


def test_what_the_embedder_made_is_used_in_place(native):
    memory, table, variable = Memory(1, 3), Table(FUNCREF, 2), Global(GlobalType(I32, True), 5)
    text = """(module (import "h" "m" (memory 1)) (import "h" "t" (table 1 funcref)) (import "h" "g" (global $g (mut i32))) (type $t (func (result i32)))
      (func $five (result i32) (i32.load (i32.const 4))) (elem (i32.const 1) $five)
      (func (export "f") (param i32) (result i32)
        (i32.store (i32.const 4) (local.get 0)) (global.set $g (i32.add (global.get $g) (i32.const 1)))
        (i32.add (call_indirect (type $t) (i32.const 1)) (memory.grow (i32.const 1)))))"""
    imports = {"h": {"m": memory, "t": table, "g": variable}}
    first, second = native(text, imports), native(text, imports)
    assert [first.exports["f"](100), second.exports["f"](200)] == [101, 202]
    assert memory.pages == 3 and memory.view[4] == 200 and variable.value == 7


def test_instances_call_each_other(native):
    exports = {}
    back = chibishim.HostFunction(FunctionType((I32,), (I32,)), lambda n: chibishim.execute_any(exports["f"], [n]))
    callee = native("""(module (import "h" "back" (func $back (param i32) (result i32))) (table (export "t") 1 funcref) (elem (i32.const 0) $g)
      (func $g (export "g") (param i32) (result i32)
        (if (result i32) (i32.eqz (local.get 0)) (then (unreachable)) (else (i32.add (i32.const 1) (call $back (i32.sub (local.get 0) (i32.const 1))))))))""",
                    {"h": {"back": back}})
    caller = native("""(module (import "o" "g" (func $g (param i32) (result i32))) (import "o" "t" (table 1 funcref)) (type $t (func (param i32) (result i32)))
      (func (export "f") (param i32) (result i32)
        (if (i32.eq (local.get 0) (i32.const 1)) (then (return (i32.const 100))))
        (if (result i32) (i32.and (local.get 0) (i32.const 1))
          (then (i32.mul (i32.const 2) (call $g (local.get 0)))) (else (i32.mul (i32.const 3) (call_indirect (type $t) (local.get 0) (i32.const 0)))))))""",
                    {"o": callee.exports})
    exports.update(caller.exports)
    assert exports["f"](4) == 3 * (1 + 2 * (1 + 3 * (1 + 100)))
    message, backtrace = outcome(exports["f"], 0)[1:]
    assert message == "unreachable" and len(backtrace) == 2
    assert is_compiled(exports["f"]) and is_compiled(callee.exports["g"])


def test_several_results_of_all_types(native):
    instance = native("""(module (import "h" "swap" (func $swap (param i32 f64) (result f64 i32)))
      (func $many (export "many") (param i32 i64 f32 f64 v128) (result v128 f64 f32 i64 i32 funcref)
        (local.get 4) (local.get 3) (local.get 2) (local.get 1) (local.get 0) (ref.func $many))
      (func (export "f") (param i32) (result i32 f64 i64 i32 f32 f64)
        (local $v v128) (local $f f32) (local $i i32) (local $d f64) (local $I i64)
        (call $many (local.get 0) (i64.const -1) (f32.const 1.5) (f64.const 2.5) (i32x4.splat (local.get 0)))
        (local.set $i (ref.is_null)) (local.set 0) (local.set $I) (local.set $f) (local.set $d) (local.set $v)
        (local.set 0 (local.set $d (call $swap (i32.add (local.get 0) (i32.const 1)) (local.get $d))))
        (local.get 0) (local.get $d) (local.get $I) (i32x4.extract_lane 3 (local.get $v)) (local.get $f) (f64.convert_i32_s (local.get $i))))""".replace(
            "(local.set 0 (local.set $d (call $swap (i32.add (local.get 0) (i32.const 1)) (local.get $d))))",
            "(call $swap (i32.add (local.get 0) (i32.const 1)) (local.get $d)) (local.set 0) (local.set $d)"),
                      {"h": {"swap": lambda i, d: (2 * d, i)}})
    assert instance.exports["f"](7) == (8, 5.0, -1, 7, 1.5, 0.0)
    many = instance.exports["many"]
    assert many(1, -2, 0.5, -0.25, bytes(range(16))) == (bytes(range(16)), -0.25, 0.5, -2, 1, many)


@pytest.mark.parametrize("assembler", chibishim.ASSEMBLERS.values())
def test_vectors_among_arguments_are_compiled_for_every_processor(native, monkeypatch, assembler):
    instance = native("""(module
      (func $many (param i32 v128) (result v128 i32 v128) (local.get 1) (local.get 0) (local.get 1))
      (func (param f32 v128 i64 v128) (result v128 i32 v128) (call $many (i32.wrap_i64 (local.get 2)) (local.get 3)))
      (func (param i32 v128) (result v128 i32 v128) (return_call $many (local.get 0) (local.get 1))))""")
    monkeypatch.setattr(chibishim.Tier.machine, "assembler", assembler)         # it is not called
    for function in instance.functions:
        chibishim.translated(function)
    assert all(map(is_compiled, instance.functions))


def test_i64_lanes_are_compared_without_the_interpreter(native, monkeypatch):
    monkeypatch.setattr(chibishim.Tier.machine, "signals", None)        # code that hears signals has calls back for them
    instance = native("""(module (func (export "f") (param v128 v128) (result v128 v128 v128 v128)
      (i64x2.gt_s (local.get 0) (local.get 1)) (i64x2.lt_s (local.get 0) (local.get 1))
      (i64x2.ge_s (local.get 0) (local.get 1)) (i64x2.le_s (local.get 0) (local.get 1))))""")
    results = instance.exports["f"](struct.pack("<2q", -1, 1 << 40), struct.pack("<2q", 1, 1 << 40))
    assert [struct.unpack("<2q", result) for result in results] == [(0, 0), (-1, 0), (0, -1), (-1, -1)]
    assert is_compiled(instance.exports["f"]) and not instance.context.sites


def test_an_if_without_else_is_one_conditional_jump(native, monkeypatch):
    instance = native("""(module (global $g (mut i32) (i32.const 0)) (func (export "f") (param i32) (result i32)
      (if (local.get 0) (then (global.set $g (local.get 0)))) (global.get $g)))""")
    jumps, machine = [], chibishim.Tier.machine
    monkeypatch.setattr(machine, "signals", None)       # code that hears signals has jumps for them
    monkeypatch.setattr(machine.assembler, "jump", lambda self, label: jumps.append(label))
    assert [instance.exports["f"](n) for n in (0, 5, 0)] == [0, 5, 5]
    assert is_compiled(instance.exports["f"]) and not jumps


VECTOR_ROWS = [row for row in chibishim.INSTRUCTIONS if 0xFD in (row[0] >> 8, row[0] >> 12) and row[3]]
FLOATS = 0.5, -0.5, 2.0**31, -2.0**31 - 1, 2.0**32, 1e30, float("inf"), float("-inf"), float("nan"), -0.0
EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
         *[int.from_bytes(struct.pack(format, *[value] * (len(format) - 1)), "little") for format in ("<ff", "<d") for value in FLOATS]]


def lanes_of(name, value):
    """A vector result with all NaNs alike, where its lanes are floats."""
    format = {"f32x4": "<4f", "f64x2": "<2d"}.get(name[:5])
    return [x if x == x else "NaN" for x in struct.unpack(format, value)] if format and value.__class__ is bytes else value


@pytest.mark.parametrize("row", [row for row in VECTOR_ROWS if not row[2]], ids=lambda row: row[1])
def test_a_vector_instruction_does_what_the_interpreter_does(tier, row):
    "I2, I6"
    opcode, name, _, type, _ = row
    letters = {"i": 0x7F, "I": 0x7E, "f": 0x7D, "F": 0x7C, "v": 0x7B}
    params, results = ([letters[letter] for letter in part] for part in type.split(":"))
    code = b"\xfd" + leb128(opcode & 0xFF if opcode >> 8 == 0xFD else opcode & 0xFFF)
    data = module_of(b"\0" + b"".join(b"\x20%c" % index for index in range(len(params))) + code + b"\x0b",
                     b"\x60%c%s%c%s" % (len(params), bytes(params), len(results), bytes(results)))
    choose = random.Random(name)

    def operand(type):
        if type == 0x7B:
            return struct.pack("<2Q", *[choose.choice(EDGES) if choose.random() < 0.5 else choose.getrandbits(64) for _ in range(2)])
        return choose.choice((0.5, -1e30, float("inf"))) if type in (0x7C, 0x7D) else choose.getrandbits(31)
    f, g = (Instance(Module(data)).functions[0] for _ in range(2))
    for _ in range(40):
        operands = [operand(type) for type in params]
        tier("interpreter")
        expected = lanes_of(name, f(*operands))
        tier("native")
        assert repr(lanes_of(name, g(*operands))) == repr(expected), operands
    assert is_compiled(g) and not is_compiled(f)


@pytest.mark.parametrize("assembler", chibishim.ASSEMBLERS.values())
def test_every_vector_instruction_but_two_is_machine_code(assembler):
    left = {row[1] for row in VECTOR_ROWS} - set(assembler.VECTORS) - set(chibishim.EMITTERS)
    assert left == {"i16x8.relaxed_dot_i8x16_i7x16_s", "i32x4.relaxed_dot_i8x16_i7x16_add_s"}


@pytest.mark.parametrize("name", [row[1] for row in VECTOR_ROWS if row[2] == "memarg" and "load" in row[1]])
def test_a_load_of_a_vector_does_what_the_interpreter_does(wat, tier, name):
    text = """(module (memory 1) (data (i32.const 3) "\\80\\01\\fe\\7f\\00\\ff\\81\\22\\33\\c4\\55\\66\\f7\\88\\19\\aa")
      (func (export "f") (param i32) (result v128) (%s offset=1 (local.get 0))))""" % name
    assert_same_memory_access(wat, tier, text)


@pytest.mark.parametrize("name", [row[1] for row in VECTOR_ROWS if row[2] == "memarg lane"])
@pytest.mark.parametrize("lane", [0, 1])
def test_a_lane_is_loaded_and_stored_as_by_the_interpreter(wat, tier, name, lane):
    access = "(%s offset=1 %d (local.get 0) (local.get 1))" % (name, lane)
    text = """(module (memory 1) (data (i32.const 3) "\\80\\01\\fe\\7f\\00\\ff\\81\\22\\33\\c4\\55\\66\\f7\\88\\19\\aa")
      (func (export "f") (param i32) (result v128) (local v128)
        (local.set 1 (v128.const i64x2 0x123456789abcdef0 0x0fedcba987654321))
        %s))""" % (access if "load" in name else access + " (v128.load (i32.const 0))")
    assert_same_memory_access(wat, tier, text)


def assert_same_memory_access(wat, tier, text):
    """At some places, and at the end of the memory, where it traps."""
    data = wat(text)
    outcomes = {}
    for mode in "interpreter", "native":
        tier(mode)
        f = Instance(Module(data)).exports["f"]
        outcomes[mode] = [outcome(f, at) for at in (0, 2, 5, *range(65518, 65536), 0xFFFFFFFF)]
    assert is_compiled(f) and outcomes["native"] == outcomes["interpreter"]
    assert any("out of bounds" in str(value) for value in outcomes["native"]) and outcomes["native"][0].__class__ is bytes


def test_relaxed_vector_instructions_do_not_keep_a_function_interpreted(tier):
    # (func (param v128 v128 v128) (result v128) (f32x4.relaxed_madd (local.get 0) (local.get 1) (local.get 2)))
    data = module_of(b"\0\x20\0\x20\1\x20\2\xfd\x85\2\x0b", b"\x60\3\x7b\x7b\x7b\1\x7b")
    tier("native")
    f = Instance(Module(data)).functions[0]
    assert f(*[struct.pack("<4f", *values) for values in ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12))]) == struct.pack("<4f", 14, 22, 32, 44)
    assert is_compiled(f)


def test_references_are_the_same_objects_after_native_code(native):
    instance = native("""(module (import "h" "pass" (func $pass (param externref) (result externref))) (table $t 2 externref)
      (func (export "f") (param externref externref i32) (result externref externref i32) (local $x externref)
        (local.set $x (select (result externref) (local.get 0) (local.get 1) (local.get 2)))
        (table.set $t (i32.const 0) (local.get $x))
        (call $pass (local.get 0)) (table.get $t (i32.const 0)) (ref.is_null (table.get $t (i32.const 1))))
      (func $g (export "g") (param funcref) (result funcref funcref) (local.get 0) (ref.func $g)))""", {"h": {"pass": lambda x: x}})
    one, other = object(), [1]
    assert instance.exports["f"](one, other, 0) == (one, other, 1)
    assert instance.exports["f"](None, other, 1) == (None, None, 1)
    g = instance.exports["g"]
    assert g(g) == (g, g) and g(None) == (None, g)


def test_references_are_not_kept_while_a_native_loop_runs(native):
    class Noted:
        def __del__(self):
            dropped.append(self.__class__)
    dropped, seen = [], []
    text = """(module (import "h" "make" (func $make (result externref))) (import "h" "look" (func $look))
      (func (export "f") (param i32) (loop (drop (call $make)) (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1))))) (call $look)))"""
    native(text, {"h": {"make": Noted, "look": lambda: seen.append(len(dropped))}}).exports["f"](5000)
    assert len(dropped) == 5000
    assert seen[0] > 2500


def test_an_instance_whose_functions_are_compiled_can_be_freed(native):
    instance = native("""(module (memory 1) (table 1 funcref) (elem (i32.const 0) $f) (type $t (func)) (global (mut i32) (i32.const 1))
      (func $f) (func (export "f") (param i32) (global.set 0 (local.get 0)) (i32.store (i32.const 0) (local.get 0)) (call_indirect (type $t) (i32.const 0))))""")
    instance.exports["f"](1)
    assert is_compiled(instance.functions[1])
    freed = weakref.ref(instance)
    del instance
    gc.collect()
    assert freed() is None


# -- exceptions --


def test_an_exception_of_the_host_passes_through_native_frames(native):
    class Own(Exception):
        pass

    def fail(n):
        if n == 3:
            raise Own(n)
        return n
    instance = native("""(module (import "h" "f" (func $f (param i32) (result i32)))
      (func $g (param i32) (result i32) (i32.add (call $f (local.get 0)) (i32.const 10)))
      (func (export "g") (param i32) (result i32) (i32.add (call $g (local.get 0)) (i32.const 100))))""", {"h": {"f": fail}})
    with pytest.raises(Own) as caught:
        instance.exports["g"](3)
    assert caught.value.args == (3,)
    assert instance.exports["g"](4) == 114


def exceptions(*functions, tags=((I32,),)):
    """An instance with tags of these parameters, and functions as (params, results, code), exported by their
    numbers; wabt does not know try_table."""
    letters = {I32: b"\x7f", I64: b"\x7e", F64: b"\x7c", V128: b"\x7b"}
    types = [(tag, ()) for tag in tags] + [(params, results) for params, results, _ in functions]
    listed = lambda part: bytes((len(part),)) + b"".join(letters[t] for t in part)
    bodies = [body if body[:1] == b"\1" else b"\0" + body for _, _, body in functions]
    data = (b"\0asm\1\0\0\0" + section(1, *[b"\x60" + listed(params) + listed(results) for params, results in types])
            + section(3, *[bytes((len(tags) + index,)) for index in range(len(functions))])
            + section(13, *[bytes((0, index)) for index in range(len(tags))])
            + section(7, *[b"\1%d\0%c" % (index, index) for index in range(len(functions))])
            + section(10, *[leb128(len(body) + 1) + body + b"\x0b" for body in bodies]))
    return Instance(Module(data))


# Function 0 throws its argument, 1 calls 0, 2 calls 1 and gives what was thrown plus one.
THROW = (I32,), (), b"\x20\0\x08\0"
MIDDLE = (I32,), (), b"\x20\0\x10\0"
CATCH = (I32,), (I32,), b"\2\x7f\x1f\x40\1\0\0\0\x20\0\x10\1\x0b\x41\0\x0b\x41\1\x6a"


@pytest.mark.parametrize("mode", ["interpreter", "native", "auto"])
def test_an_exception_of_the_guest_is_caught_or_leaves_a_backtrace(tier, mode):
    tier(mode)
    instance = exceptions(THROW, MIDDLE, CATCH)
    assert [instance.exports["2"](n) for n in range(2000)] == list(range(1, 2001))
    with pytest.raises(Thrown, match="uncaught exception") as caught:
        instance.exports["1"](5)
    assert caught.value.values == (5,)
    assert [f.index for f, _ in caught.value.backtrace] == [0, 1]
    assert [is_compiled(f) for f in instance.functions] == [mode != "interpreter"] * 3


@pytest.mark.parametrize("interpreted", range(3))
def test_an_exception_crosses_the_seam(tier, interpreted):
    tier("native")
    instance = exceptions(THROW, MIDDLE, CATCH)
    for function in instance.functions:
        Module.tier = choose_tier("interpreter" if function.index == interpreted else "native")
        function.instance.module.tier = Module.tier
        chibishim.translated(function)
    assert [is_compiled(f) for f in instance.functions] == [index != interpreted for index in range(3)]
    assert instance.exports["2"](41) == 42


def test_what_a_handler_needs_survives_the_functions_between(tier):
    tier("native")
    # Values that have registers, as they are used a lot, in a function that catches, in one that the exception
    # goes through (it uses all registers), and in one that calls a function that catches and has no such values.
    count = 12
    locals = b"\1%c\x7f" % count
    made = lambda op: b"".join(b"\x20\0\x41%c%c\x21%c" % (n, op, n) for n in range(1, count + 1)) * 3
    total = b"\x41\0" + b"".join(b"\x20%c\x6a" % n * 3 for n in range(1, count + 1))
    busy = locals + made(0x6C) + b"\x20\0\x10\0" + total + b"\x1a"
    keeps = locals + made(0x6A) + b"\2\x7f\x1f\x40\1\0\0\0\x20\0\x10\1\x0b\x41\0\x0b\x1a" + total
    around = locals + made(0x6B) + b"\x20\0\x10\3\x1a" + total
    instance = exceptions(THROW, ((I32,), (), busy), ((I32,), (I32,), keeps), CATCH, ((I32,), (I32,), around))
    for _ in range(2):                  # the first time they compile each other
        assert instance.exports["2"](1000) == 3 * (12 * 1000 + 78)
        assert instance.exports["4"](1000) == 3 * (12 * 1000 - 78)
    assert all(map(is_compiled, instance.functions))


def test_values_of_every_kind_are_caught(tier):
    tier("native")
    types = I32, F64, V128, I64
    number = struct.pack("<d", 2.5)
    thrower = b"\x41\7\x44" + number + b"\xfd\x0c" + bytes(range(16)) + b"\x42\x6e\x08\0"
    catcher = b"\2\2\x1f\x40\1\0\0\0\x10\0\x0b\0\x0b"
    instance = exceptions(((), (), thrower), ((), types, catcher), tags=(types,))
    assert instance.exports["1"]() == (7, 2.5, bytes(range(16)), -18)


def test_a_reference_to_an_exception_is_thrown_again(tier):
    tier("native")
    again = b"\2\x69\x1f\x40\1\3\0\x20\0\x10\0\x0b\0\x0b\x0a"      # catch_all_ref, throw_ref
    catch = b"\2\x7f\x1f\x40\1\0\0\0\x20\0\x10\1\x0b\x41\0\x0b"
    instance = exceptions(THROW, ((I32,), (), again), ((I32,), (I32,), catch))
    assert instance.exports["2"](9) == 9
    assert all(map(is_compiled, instance.functions))


def test_a_trap_is_no_exception(tier):
    tier("native")
    instance = exceptions(((I32,), (), b"\0"), MIDDLE, ((I32,), (I32,), b"\2\x40\x1f\x40\1\2\0\x20\0\x10\1\x0b\x0b\x41\0"))
    with pytest.raises(Trap, match="unreachable"):
        instance.exports["2"](1)


# -- the process --


def test_no_page_is_ever_writable_and_executable(native):
    "I10"
    f = native('(module (func (export "f") (result i32) (i32.const 3)))').exports["f"]
    assert f() == 3 and is_compiled(f)
    with open("/proc/self/maps") as file:
        code = [line.split()[1] for line in file if "chibishim-code" in line]
    assert sorted(code) == ["r-xs", "rw-s"]         # ctypes has a page of its own for callbacks


ADDRESS_SPACE = """
import resource
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
chibishim.Module.tier = choose_tier("native")
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 21) + int(sys.argv[2], 0),) * 2)
instance = Instance(Module(bytes.fromhex(sys.argv[1])))
print(instance.exports["f"](100), instance.exports["g"](5), chibishim.Tier.refusal)"""
LIMITED = """(module (memory 1 2) (table 600 funcref) (elem (i32.const 0) $a) (type $t (func (result i32))) (func $a (result i32) (i32.const 5))
  (func (export "f") (param i32) (result i32) (local $i i32)
    (loop (local.set $i (i32.add (local.get $i) (call_indirect (type $t) (i32.const 0)))) (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))))
    (local.get $i))
  (func (export "g") (param i32) (result i32) (i32.store (i32.const 0) (local.get 0)) (i32.load (i32.const 0))))"""


@pytest.mark.parametrize("more", [0, 1 << 20, 1 << 25, 1 << 26, 1 << 27, (1 << 27) + (1 << 24), 1 << 28])
def test_where_there_is_no_address_space_the_interpreter_runs(wat, more):
    done = run_script(ADDRESS_SPACE, wat(LIMITED).hex(), hex(more))
    assert done.stdout.startswith(b"500 5 ") and not done.stderr, done
    if more <= 1 << 26:
        assert b"no executable memory" in done.stdout


def test_refused_executable_memory_is_said(wat):
    done = run_script("""
def refuse(*arguments):
    raise PermissionError(1, "mmap: Operation not permitted")
chibishim.libc_map = refuse
chibishim.Module.tier = choose_tier("native")
instance = Instance(Module(bytes.fromhex(sys.argv[1])))
print(instance.exports["f"](100), chibishim.Tier.refusal)""", wat(LIMITED).hex())
    assert done.stdout == b"500 no executable memory: [Errno 1] mmap: Operation not permitted\n", done.stderr


def test_a_limit_on_the_size_of_files_is_survived(wat):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    done = run_script("""
chibishim.Module.tier = choose_tier("native")
instance = Instance(Module(bytes.fromhex(sys.argv[1])))
print(instance.exports["f"](100))""", wat(LIMITED).hex(), preexec_fn=limit)
    assert (done.returncode, done.stdout) == (0, b"500\n"), done.stderr


def spinning(wat, tmp_path, text, *options, mode="native"):
    """The process of `run` on a module that never ends."""
    path = tmp_path / "m.wasm"
    path.write_bytes(wat(text, *FLAGS))
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "chibishim.py"), "run", "--tier", mode, *options, str(path)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("mode", ["auto", "native"])
def test_a_signal_ends_a_native_loop(wat, tier, tmp_path, mode):
    process = spinning(wat, tmp_path, SPIN, mode=mode)
    try:
        with open("/proc/%d/maps" % process.pid) as file:
            deadline = time.monotonic() + 20
            while "chibishim-code" not in file.read() and time.monotonic() < deadline:
                file.seek(0)
                time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


ENDLESS = {
    "a loop": SPIN,
    "calls": """(module (func $fib (param i32) (result i32)
      (if (result i32) (i32.lt_s (local.get 0) (i32.const 2)) (then (local.get 0))
        (else (i32.add (call $fib (i32.sub (local.get 0) (i32.const 1))) (call $fib (i32.sub (local.get 0) (i32.const 2)))))))
      (func (export "_start") (drop (call $fib (i32.const 70)))))""",
    "tail calls": '(module (func $f (export "_start") (return_call $f)))',
}


@pytest.mark.parametrize("mode", ["auto", "native"])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_timeout_ends_native_code(wat, tier, tmp_path, name, mode):
    process = spinning(wat, tmp_path, ENDLESS[name], "--timeout", "0.5", mode=mode)
    try:
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 134 and error.startswith(b"error: trap: timeout after 0.5 s\n")
    finally:
        process.kill()
        process.communicate()


def test_a_timeout_that_a_callback_was_not_ready_for_is_raised_when_native_code_returns(native):
    def call():
        chibishim.Tier.machine.lost = chibishim.Timeout("timeout")      # as hear_signals() has it from ctypes
    f = native('(module (import "h" "f" (func $f)) (func (export "f") (result i32) (call $f) (i32.const 5)))', {"h": {"f": call}}).exports["f"]
    with pytest.raises(chibishim.Timeout):
        f()
    assert is_compiled(f) and chibishim.Tier.machine.lost is None


ADD = '(module (func (export "f") (param i32) (result i32) (i32.add (local.get 0) (i32.const %d))))'


def test_what_parent_and_child_compile_after_a_fork_is_their_own(wat, tier):
    done = run_script("""
chibishim.Module.tier = choose_tier("native")
first, second, third = (Instance(Module(bytes.fromhex(word))).exports["f"] for word in sys.argv[1:])
assert first(0) == 1
(to_parent, parent), (to_child, child) = os.pipe(), os.pipe()
if not os.fork():
    compiled = second(0)
    os.write(parent, b"x")
    os.read(to_child, 1)
    print(compiled, second(0), first(0), flush=True)
    os._exit(0)
os.read(to_parent, 1)
compiled = third(0)
os.write(child, b"x")
os.wait()
print(compiled, third(0), first(0))""", *[wat(ADD % n).hex() for n in (1, 2, 3)])
    assert done.stdout == b"2 2 1\n3 3 1\n", done.stderr


THREADS = """
import threading, time
chibishim.Module.tier = choose_tier("native")
module, wrong = Module(bytes.fromhex(sys.argv[1])), []
def host(x):
    time.sleep(0.0001)
    return x
sys.setswitchinterval(1e-5)
def work(k):
    f = Instance(module, {"h": {"g": host}}).exports["f"]
    for n in range(200):
        result = f(n % 7 + k, k * 1000)
        if result != k * 1000 + n % 7 + k:
            wrong.append((k, n, result))
threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(wrong), wrong[:3])"""


def test_instances_in_different_threads_do_not_meet(wat, tier):
    text = """(module (import "h" "g" (func $g (param i32) (result i32)))
      (func $f (export "f") (param i32 i32) (result i32)
        (if (result i32) (i32.eqz (local.get 0)) (then (call $g (local.get 1)))
          (else (i32.add (i32.const 1) (call $f (i32.sub (local.get 0) (i32.const 1)) (local.get 1)))))))"""
    done = run_script(THREADS, wat(text).hex())
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0 []\n", b"")


def test_an_instance_that_two_threads_enter_is_no_crash(wat, tier):
    text = """(module (import "h" "g" (func $g (param i32) (result i32)))
      (func $f (export "f") (param i32 i32) (result i32)
        (if (result i32) (i32.eqz (local.get 0)) (then (call $g (local.get 1)))
          (else (i32.add (i32.const 1) (call $f (i32.sub (local.get 0) (i32.const 1)) (local.get 1)))))))"""
    script = THREADS.replace("def work(k):\n    f = Instance", "f = Instance").replace('exports["f"]\n    for', 'exports["f"]\ndef work(k):\n    for')
    assert run_script(script, wat(text).hex()).returncode == 0


def test_a_thread_with_a_small_stack_is_no_crash(wat, tier):
    done = run_script("""
import threading
sys.setrecursionlimit(chibishim.RECURSION_LIMIT)
chibishim.Module.tier = choose_tier("native")
even = Instance(Module(bytes.fromhex(sys.argv[1]))).exports["even"]
def work():
    try:
        even(1000000)
    except Exhaustion as error:
        print(error)
threading.stack_size(1 << 20)
thread = threading.Thread(target=work)
thread.start()
thread.join()""", wat(MUTUAL, *FLAGS).hex())
    assert (done.returncode, done.stdout) == (0, b"call stack exhausted\n"), done.stderr


def test_a_context_that_finds_no_memory_leaves_the_function_to_the_interpreter(wat, native, monkeypatch):
    assert native(ADD % 1).exports["f"](1) == 2         # there is a machine

    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")
    monkeypatch.setattr(chibishim.Context, "__init__", refuse)
    f = native(ADD % 2).exports["f"]
    assert f(1) == 3 and not is_compiled(f)


# -- sizes --


def test_a_function_of_many_variables_and_blocks_takes_no_gigabytes(tier):
    "I5"
    count = 12000
    body = b"\1" + leb128(count) + b"\x7f" + b"".join(b"\x20\0\4\x40\x20\0\x21" + leb128(i) + b"\x0b" for i in range(1, count + 1))
    body += b"".join(b"\x20" + leb128(i) + b"\x21\0" for i in range(1, count + 1)) + b"\x0b"
    tier("native")
    data = module_of(body, b"\x60\1\x7f\0")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chibishim.execute(Instance(Module(data)).functions[0], [1])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def lines_of_python(call):
    """How many lines of Python a call executes: work without a clock."""
    count = 0

    def count_line(frame, event, argument):
        nonlocal count
        count += event == "line"
        return count_line
    sys.settrace(count_line)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def lines_to_compile(data):
    """The same of a module's first function, which is compiled and called."""
    function = Instance(Module(data)).functions[0]
    count = lines_of_python(function)
    assert is_compiled(function)
    return count


def loops_and_locals(count):
    """That many loops, while that many locals are alive."""
    uses = b"".join(b"\x20" + leb128(i) + b"\x21\0" for i in range(count))
    return module_of(b"\1" + leb128(count) + b"\x7f" + b"\3\x40\x0b" * count + uses + b"\x0b")


def calls_and_clauses(count):
    """That many calls where an exception of that many values is caught."""
    many = leb128(count) + b"\x7f" * count
    body = (b"\0\2\2\x1f\x40" + leb128(20) + b"\0\0\0" * 20 + b"\x10\1" * count + b"\x0b" + b"\x41\0" * count + b"\x0b"
            + b"\x1a" * count + b"\x0b")
    return (b"\0asm\1\0\0\0" + section(1, b"\x60\0\0", b"\x60" + many + b"\0", b"\x60\0" + many) + section(3, b"\0", b"\0")
            + section(13, b"\0\1") + section(10, leb128(len(body)) + body, b"\2\0\x0b"))


@pytest.mark.parametrize("make", [loops_and_locals, calls_and_clauses])
def test_compiling_is_linear(tier, make):
    "I5"
    tier("native")
    assert lines_to_compile(make(800)) < 3 * lines_to_compile(make(400))


def calls_in_many_places(count):
    """f(n) calls itself at place n modulo that many, with n + 1."""
    return module_of(b"\0" + b"\2\x40" * count + b"\x20\0\x41" + leb128(count) + b"\x70\x0e" + leb128(count - 1) + b"".join(map(leb128, range(count)))
                     + b"\x0b\x20\0\x41\1\x6a\x10\0" * count + b"\x0b", b"\x60\1\x7f\0")


def calls_of_many_functions(count):
    """Each of that many functions calls the next one, and the last the first."""
    bodies = [b"\0\x20\0\x10" + leb128((index + 1) % count) + b"\x0b" for index in range(count)]
    return (b"\0asm\1\0\0\0" + section(1, b"\x60\1\x7f\0") + section(3, *[b"\0"] * count)
            + section(10, *[leb128(len(body)) + body for body in bodies]))


@pytest.mark.parametrize("make", [calls_in_many_places, calls_of_many_functions])
def test_a_backtrace_of_many_different_calls_is_found_at_once(tier, make):
    "I5"
    tier("native")

    def lines_to_trap(count):
        functions = Instance(Module(make(count))).functions
        for function in functions:
            chibishim.translated(function)

        def overflow():
            with pytest.raises(Exhaustion) as caught:
                functions[0](0)
            assert len(caught.value.backtrace) == chibishim.MAX_FRAMES
        return lines_of_python(overflow)
    assert lines_to_trap(1600) < 1.5 * lines_to_trap(200)


def loops_that_continue_the_one_around(count):
    """Each has a branch to the head of the one around it, so that liveness takes a pass for each."""
    body = b"\0\3\x40\x20\0\4\x40\x20\1\x20\0\x6a\x21\1\x0b" + b"\3\x40\x20\0\x0d\1" * count + b"\x0b" * count
    return module_of(body + b"\x0b\x0b", b"\x60\2\x7f\x7f\0")


def operands_on_each_other(count):
    """A stack that high in one block."""
    return module_of(b"\0" + b"\x20\0\x45" * count + b"\x1a" * count + b"\x0b", b"\x60\2\x7f\x7f\0")


@pytest.mark.parametrize("make, small, large", [
    (loops_that_continue_the_one_around, 20, 1000), (operands_on_each_other, 1000, chibishim.MAX_SLOTS)])
def test_what_would_take_long_to_compile_stays_in_the_interpreter(tier, make, small, large):
    "I5"
    tier("native")
    for count, compiled in ((small, True), (large, False)):
        function = Instance(Module(make(count))).functions[0]
        assert chibishim.execute(function, [0, 0]) == [] and is_compiled(function) == compiled


def test_a_function_of_300_locals_of_each_type(wat, tier):
    count, body, sums = 300, [], []
    for type in ("i32", "i64", "f64"):
        body += ["(local.set $%s%d (%s.add (local.get $%s%d) (%s.const %d)))" % (type, i, type, type, (i * 7 + 1) % count, type, i) for i in range(count)]
        sums += ["(local.set $%s0 (%s.add (local.get $%s0) (local.get $%s%d)))" % (type, type, type, type, i) for i in range(1, count)]
    text = '(module (func (export "f") (param $n i32) (result i32 i64 f64) %s (loop %s (br_if 0 (local.tee $n (i32.sub (local.get $n) (i32.const 1))))) %s (local.get $i320) (local.get $i640) (local.get $f640)))' % (
        "".join("(local $%s%d %s)" % (type, i, type) for type in ("i32", "i64", "f64") for i in range(count)), "".join(body), "".join(sums))
    results = []
    for mode in ("interpreter", "native"):
        tier(mode)
        f = Instance(Module(wat(text))).exports["f"]
        results.append(f(5))
    assert is_compiled(f) and results[0] == results[1]


def test_a_br_table_of_ten_thousand_labels(wat, tier):
    count = 10000
    text = '(module (func (export "f") (param i32) (result i32) (block $a (block $b (block $c (br_table %s $c (local.get 0))) (return (i32.const 3))) (return (i32.const 2))) (i32.const 1)))' % (
        " ".join("$a" if n % 3 else "$b" for n in range(count)))
    tier("native")
    f = Instance(Module(wat(text))).exports["f"]
    assert [f(n) for n in (0, 1, 2, 3, count - 1, count, count + 1, -1, 1 << 31)] == [2, 1, 1, 2, 2, 3, 3, 3, 3]
    assert is_compiled(f)


def test_a_memory_of_no_pages(native):
    instance = native("""(module (memory 0) (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
      (func (export "constant") (result i64) (i64.load (i32.const 0))) (func (export "fill") (param i32) (memory.fill (i32.const 0) (i32.const 0) (local.get 0)))
      (func (export "size") (result i32) (memory.size)))""")
    for name, arguments in (("load", (0,)), ("load", (-1,)), ("constant", ()), ("fill", (1,))):
        assert outcome(instance.exports[name], *arguments)[1] == "out of bounds memory access"
    assert instance.exports["size"]() == 0 and instance.exports["fill"](0) is None


def test_changing_a_large_table_costs_no_more_than_a_small_one(native):
    text = """(module (table %d funcref) (elem (i32.const 0) $a) (type $t (func (result i32))) (func $a (result i32) (i32.const 5))
      (func (export "f") (param i32) (result i32) (local $i i32)
        (loop (table.set 0 (i32.const 1) (table.get 0 (i32.const 0))) (local.set $i (i32.add (local.get $i) (call_indirect (type $t) (i32.const 1))))
          (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1))))) (local.get $i)))"""
    seconds = []
    for size in (10, 2000000):
        f = native(text % size).exports["f"]
        assert f(5) == 25
        began = time.process_time()
        assert f(200) == 1000
        seconds.append(time.process_time() - began)
    assert seconds[1] < 5 * seconds[0] + 0.02


def test_generated_modules_do_the_same_in_the_interpreter_and_as_machine_code(tier):
    "I2"
    tried, findings, (compiled, functions) = fuzz_native.fuzz(600, 0, "native", modules=60)
    assert findings == []
    assert tried == 60 and compiled > functions // 2
