"""Chapter 13: what functions do that were written as Python is what the interpreter does."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import fuzz_native
from conftest import ROOT
from test_engine import leb128, section
from test_native import ENDLESS, MUTUAL, TRAPS, check_trap, lines_of_python, outcome, run_script, spinning
from test_native import STAYS as NOT_NATIVE

import chibishim
from chibishim import Exhaustion, Instance, Module, PortableTier, Tier, Trap, choose_tier

FLAGS = "--enable-tail-call", "--enable-exceptions", "--enable-multi-memory"
# In a function, it makes it stay in the interpreter.
STAYS = "(if (i32.const 0) (then (throw $tag)))"


@pytest.fixture
def tier(monkeypatch):
    """tier(mode, budget) makes functions be transcribed from their first call on, or once they
    have executed so many bytes."""
    monkeypatch.setattr(Module, "tier", None)

    def choose(mode, budget=None):
        Module.tier = choose_tier(mode)
        if budget is not None:
            Module.tier = PortableTier("auto")
            monkeypatch.setattr(PortableTier, "budget", lambda self, function: budget)
    return choose


@pytest.fixture
def portable(wat, tier):
    """portable(text, imports) -> an instance whose functions are transcribed when they are called."""
    tier("portable")
    return lambda text, imports=None: Instance(Module(wat(text, *FLAGS)), imports)


def is_transcribed(function):
    return function.entry is not None and bool(function.entry[0]) and function.entry[0][0][0] is chibishim.do_enter_python


def both(wat, tier, text, export, *arguments):
    """The outcome of a call, which is the same in the interpreter and as Python."""
    outcomes = []
    for mode in ("interpreter", "portable"):
        tier(mode)
        outcomes.append(outcome(Instance(Module(wat(text, *FLAGS))).exports[export], *arguments))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_has_the_interpreter_s_text_and_backtrace(wat, tier, name):
    check_trap(wat, tier, name, "portable", is_transcribed)


def test_of_two_traps_the_first_is_told(wat, tier):
    """The store comes after the load, and the load after the division, whoever uses them."""
    text = """(module (memory 1) (func (export "f") (param i32 i32 i32)
      (i32.store (i32.div_u (i32.const 8) (local.get 0)) (i32.load (local.get 1))) (i32.store (local.get 2) (i32.const 1))))"""
    assert both(wat, tier, text, "f", 0, -1, -1)[1] == "integer divide by zero"
    places = {both(wat, tier, text, "f", *values)[2][0][1] for values in ((0, -1, -1), (1, -1, -1), (1, 0, -1))}
    assert len(places) == 3


@pytest.mark.parametrize("use", ["br_if 0", "local.set 0", "global.set $g", "return"])
def test_of_two_traps_the_first_is_told_though_the_second_is_dropped(wat, tier, use):
    text = """(module (memory 1) (global $g (mut i32) (i32.const 0)) (func (export "f") (param i32 i32) (result i32)
      (block (i32.div_u (i32.const 8) (local.get 0)) (drop (i32.load (local.get 1))) %s) (local.get 0)))""" % use
    assert both(wat, tier, text, "f", 0, -1)[1] == "integer divide by zero"
    assert both(wat, tier, text, "f", 1, -1)[1] == "out of bounds memory access"


def test_a_load_that_nobody_uses_traps(wat, tier):
    text = """(module (memory 1) (func (export "f") (param i32) (result i32)
      (drop (i32.load (local.get 0))) (i32.add (local.get 0) (i32.mul (local.get 0) (i32.const 3)))))"""
    assert both(wat, tier, text, "f", -1)[1] == "out of bounds memory access"
    assert both(wat, tier, text, "f", 4) == 16


def test_equal_functions_are_told_apart_in_a_backtrace(portable):
    f, g = portable("""(module (func (export "f") (param i32) (result i32) (i32.div_u (i32.const 1) (local.get 0)))
      (func (export "g") (param i32) (result i32) (i32.div_u (i32.const 1) (local.get 0))))""").exports.values()
    assert [outcome(function, 0)[2][0][0] for function in (f, g, f)] == [0, 1, 0]


def test_a_tuple_of_the_embedder_is_one_reference(portable):
    f = portable('(module (func $f (param externref) (result externref) (local.get 0)) (func (export "f") (param externref) (result externref) (call $f (local.get 0))))')
    assert f.exports["f"]((1, 2)) == (1, 2)


def test_an_error_of_the_host_is_none_of_the_guest(portable):
    def fail():
        raise ZeroDivisionError("the host's own")
    instance = portable('(module (import "h" "f" (func $f)) (func (export "f") (call $f)))', {"h": {"f": fail}})
    with pytest.raises(ZeroDivisionError):
        instance.exports["f"]()
    assert is_transcribed(instance.exports["f"])


# -- values --

def test_integers_wrap_around_where_it_can_be_seen(wat, tier):
    """Chains of wrapping instructions on random operands, seen by one that does not wrap."""
    choose = random.Random(5)
    chain = ("add", "sub", "mul", "and", "or", "xor", "shl")
    for bits in (32, 64):
        for observer in ("div_u", "rem_s", "shr_u", "shr_s", "lt_s", "ge_u", "rotl", "ctz"):
            steps = "".join("(i%d.%s " % (bits, choose.choice(chain)) for _ in range(6))
            text = "".join("(local.get %d))" % choose.randrange(2) for _ in range(6))
            operand = "(i%d.const %d)" % (bits, choose.getrandbits(bits) | 1) if observer != "ctz" else ""
            body = "(i%d.%s %s (local.get 0) %s %s)" % (bits, observer, steps, text, operand)
            result = "i32" if observer in ("lt_s", "ge_u") else "i%d" % bits
            module = '(module (func (export "f") (param i%d i%d) (result %s) %s))' % (bits, bits, result, body)
            for _ in range(5):
                both(wat, tier, module, "f", choose.getrandbits(bits), choose.choice((0, 1, -1, 1 << bits - 1, choose.getrandbits(bits))))


def test_a_wide_integer_is_made_narrow_before_it_is_seen(wat, tier):
    text = """(module (func (export "f") (param i64) (result f64)
      (f64.convert_i32_s (i32.add (i32.wrap_i64 (i64.shr_s (local.get 0) (i64.const 52))) (i32.const 1)))))"""
    for value in (-1, 1 << 63, 5 << 60, 3):
        assert both(wat, tier, text, "f", value) == (chibishim.signed(value & (1 << 64) - 1, 64) >> 52) + 1


@pytest.mark.parametrize("constant", [0, 5, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80000005])
def test_a_signed_comparison_with_a_constant(wat, tier, constant):
    text = "(module %s)" % "".join('(func (export "%s") (param i32) (result i32) (i32.%s (local.get 0) (i32.const %d)))' % (verb, verb, constant)
                                   for verb in ("lt_s", "le_s", "gt_s", "ge_s"))
    edges = {edge + near & 0xFFFFFFFF for edge in (0, 0x80000000, constant) for near in (-1, 0, 1)}
    results = []
    for mode in ("interpreter", "portable"):
        tier(mode)
        exports = Instance(Module(wat(text))).exports
        results.append([(name, edge, exports[name](edge)) for name in exports for edge in sorted(edges)])
    assert results[0] == results[1]


def test_an_operand_keeps_its_value_when_what_it_was_made_of_changes(portable):
    f = portable("""(module (global $g (mut i32) (i32.const 1)) (memory 1) (func (export "f") (param i32) (result i32 i32 i32)
      (i32.add (local.get 0) (i32.const 1)) (global.get $g) (i32.load (i32.const 8))
      (local.set 0 (i32.const 100)) (global.set $g (i32.const 100)) (i32.store (i32.const 8) (i32.const 100))))""").exports["f"]
    assert f(4) == (5, 1, 0)


@pytest.mark.parametrize("dropped", ["(i32.mul (local.get $x) (i32.const 5))", "(i32.load (local.get $x))"])
@pytest.mark.parametrize("use", ["br_if 0", "global.set $g", "local.set $y", "call $set", "i32.store"])
def test_an_operand_that_is_dropped_changes_none_below_it(wat, tier, use, dropped):
    """ctz makes a variable of its operand, and what is dropped has the same slot."""
    text = """(module (memory 1) (global $g (mut i32) (i32.const 0))
      (func $set (param i32) (global.set $g (local.get 0)))
      (func (export "f") (param $x i32) (result i32) (local $y i32) (local $z i32)
        (block %s (i32.sub (i32.const 3) (i32.ctz (i32.add (local.get $x) (i32.const 1))))
          (drop %s) %s (local.set $z (i32.const 100)))
        (i32.add (i32.add (global.get $g) (local.get $y)) (i32.add (i32.load (i32.const 4)) (local.get $z)))))""" % (
            "(i32.const 4)" if use == "i32.store" else "", dropped, use)
    assert len({both(wat, tier, text, "f", x) for x in (0, 3, 7, 15)}) > 1


def test_nan_payloads_survive_memory(wat, tier):
    text = """(module (memory 1) (func (export "f") (param i32) (result i32)
      (i32.store (i32.const 4) (local.get 0)) (f32.store (i32.const 9) (f32.load (i32.const 4))) (i32.load (i32.const 9))))"""
    for bits in (0x7FA00001, -1, 0x7F800001, 0x3F800000):
        assert both(wat, tier, text, "f", bits) == chibishim.signed(bits & 0xFFFFFFFF, 32)


def test_a_memory_that_grows_is_larger_for_everybody(portable):
    instance = portable("""(module (memory (export "m") 1 3) (func $grow (drop (memory.grow (i32.const 1))))
      (func (export "f") (result i32) (call $grow) (i32.store (i32.const 65536) (i32.const 7)) (i32.load (i32.const 65536)))
      (func (export "g") (param i32) (result i32) (i32.load (local.get 0))))""")
    assert instance.exports["f"]() == 7
    instance.exports["m"].grow(1)
    assert instance.exports["g"](3 * 65536 - 4) == 0
    with pytest.raises(Trap, match="out of bounds memory access"):
        instance.exports["g"](3 * 65536 - 3)


# -- control --

def nest(depth):
    """A function of `depth` loops and blocks one in the other, each of which may be left for or
    continued from the innermost: label n by n, and returns how it went."""
    opened = "".join("(block $b%d (loop $l%d (local.set $a (i32.add (local.get $a) (i32.const 1)))" % (n, n) for n in range(depth))
    labels = " ".join("$b%d $l%d" % (n, n) for n in range(depth))
    inner = """(if (i32.eqz (local.tee $fuel (i32.sub (local.get $fuel) (i32.const 1)))) (then (return (local.get $a))))
      (local.set $x (i32.and (i32.add (i32.mul (local.get $x) (i32.const 1103515245)) (i32.const 12345)) (i32.const 0x7fffffff)))
      (br_table %s $b0 (i32.rem_u (i32.shr_u (local.get $x) (i32.const 8)) (i32.const %d)))""" % (labels, 2 * depth + 1)
    closed = "".join(") (local.set $a (i32.xor (local.get $a) (i32.const %d))))" % n for n in reversed(range(depth)))
    return """(module (func (export "f") (param $x i32) (param $fuel i32) (result i32) (local $a i32)
      (loop $again %s %s %s (br $again)) (unreachable)))""" % (opened, inner, closed)


@pytest.mark.parametrize("depth", [1, 3, 8, 15, 17, 30, 70])
def test_any_nesting_of_loops(wat, tier, depth):
    """CPython refuses more than 20 nested loops, and 100 levels of indentation."""
    text = nest(depth)
    for x in range(3):
        both(wat, tier, text, "f", x, 1000)
    instance = Instance(Module(wat(text)))
    instance.exports["f"](1, 5)
    assert is_transcribed(instance.functions[0])


@pytest.mark.parametrize("depth", [1, 2, 5, 17, 30])
def test_a_running_loop_goes_on_in_python_wherever_it_is(wat, tier, depth):
    module = Module(wat(nest(depth)))
    tier("interpreter")
    expected = [Instance(module).exports["f"](x, 3000) for x in range(5)]
    tier("portable", 300)
    entered = set()
    for x in range(5):
        instance = Instance(module)
        assert instance.exports["f"](x, 3000) == expected[x]
        entered.add(len(instance.scope.blocks[instance.functions[0]]))
    assert is_transcribed(instance.functions[0]) and max(entered) > 1


def test_a_switch_of_many_cases_that_fall_through(wat, tier):
    count = 150
    text = """(module (func (export "f") (param i32) (result i32) (local $a i32) %s (br_table %s (local.get 0)) %s (local.get $a)))""" % (
        "(block " * count, " ".join(map(str, range(count))),
        "".join(") (local.set $a (i32.add (i32.mul (local.get $a) (i32.const 3)) (i32.const %d)))" % n for n in range(count)))
    for index in (0, 1, 77, 148, 149, 150, -1):
        both(wat, tier, text, "f", index)


def test_a_long_row_of_exits_to_one_label(wat, tier):
    text = """(module (func (export "f") (param i32) (result i32) (local $a i32) (block %s (local.set $a (i32.const -1))) (local.get $a)))""" % "".join(
        "(local.set $a (i32.add (local.get $a) (i32.const 2))) (br_if 0 (i32.eq (local.get 0) (i32.const %d)))" % n for n in range(400))
    assert [both(wat, tier, text, "f", n) for n in (0, 199, 399, 400)] == [2, 400, 800, -1]


# -- calls and the stack --

def test_a_deep_recursion_goes_on_in_the_interpreter(wat, tier):
    "I4"
    text = """(module (func $f (export "f") (param i32 i64) (result i64)
      (if (result i64) (local.get 0) (then (i64.add (i64.const 3) (call $f (i32.sub (local.get 0) (i32.const 1)) (local.get 1)))) (else (local.get 1)))))"""
    tier("portable")
    instance = Instance(Module(wat(text)))
    assert instance.exports["f"](15000, 5) == 45005
    with pytest.raises(Exhaustion, match="call stack exhausted"):
        instance.exports["f"](-1, 5)
    assert instance.exports["f"](10, 5) == 35 and is_transcribed(instance.functions[0])


def test_a_deep_recursion_of_what_is_python_and_what_stays(wat):
    "I4"
    done = run_script("""
chibishim.Module.tier = choose_tier("portable")
instance = Instance(Module(bytes.fromhex(sys.argv[1])))
print([instance.exports["even"](n) for n in (1000, 8001)], [f.entry[0][0][0].__name__ for f in instance.functions])""", wat(MUTUAL.replace(NOT_NATIVE, STAYS).replace("(module", "(module (tag $tag)"), *FLAGS).hex())
    assert done.stdout == b"[1, 0] ['do_enter_python', 'do_count']\n", done.stderr


def test_recursion_through_the_host_is_exhaustion_at_whatever_frame_it_ends(portable):
    "I4"
    exports, outcomes = {}, []
    exports.update(portable("""(module (import "h" "g" (func $g (param i32) (result i32)))
      (func (export "f") (param i32) (result i32) (i32.add (call $g (i32.const 1000000)) (i32.const 1))))""",
                            {"h": {"g": lambda x: exports["f"](x)}}).exports)

    def deeper(levels):
        if levels:
            return deeper(levels - 1)
        with pytest.raises(Exhaustion, match="call stack exhausted"):
            outcomes.append(exports["f"](0))
    for levels in range(40):
        deeper(levels)
    assert not outcomes


def test_what_python_cannot_say_stays_in_the_interpreter(portable):
    instance = portable("""(module (tag $tag) (func $f (param i32) (result i32) %s (i32.mul (local.get 0) (i32.const 3)))
      (func (export "g") (param i32) (result i32) (i32.add (call $f (local.get 0)) (i32.const 1))))""" % STAYS)
    assert instance.exports["g"](5) == 16
    assert [is_transcribed(function) for function in instance.functions] == [False, True]


def stores_below_many_operands(count):
    """That many operands that are read last, and that many stores."""
    body = b"\0" + b"\x20\0\x41\1\x6a" * count + b"\x41\0\x20\0\x36\2\0" * count + b"\x1a" * count + b"\x0b"
    return (b"\0asm\1\0\0\0" + section(1, b"\x60\1\x7f\0") + section(3, b"\0") + section(5, b"\0\1")
            + section(10, leb128(len(body)) + body))


def calls_of_small_functions(count):
    """A function that calls each of that many others once."""
    body = b"\0" + b"".join(b"\x20\0\x10" + leb128(index) for index in range(1, count + 1)) + b"\x0b"
    return (b"\0asm\1\0\0\0" + section(1, b"\x60\1\x7f\0") + section(3, *[b"\0"] * (count + 1))
            + section(10, leb128(len(body)) + body, *[b"\2\0\x0b"] * count))


@pytest.mark.parametrize("make", [stores_below_many_operands, calls_of_small_functions])
def test_transcribing_is_linear(tier, make):
    "I5"
    tier("portable")

    def lines(count):
        functions = Instance(Module(make(count))).functions
        executed = lines_of_python(lambda: functions[0](1))
        assert all(map(is_transcribed, functions))
        return executed
    assert lines(800) < 1.5 * 4 * lines(200)


# -- what is transcribed, and what ends it --

def test_a_function_that_is_called_often_is_transcribed(wat, tier):
    tier("portable", 3000)
    f = Instance(Module(wat('(module (func (export "f") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 3))))'))).exports["f"]
    assert f(5) == 15 and not is_transcribed(f)
    assert [f(n) for n in range(2000)] == [3 * n for n in range(2000)]
    assert is_transcribed(f)


def test_where_no_mapping_may_be_executed_hot_functions_become_python(wat, tier, monkeypatch):
    if not isinstance(choose_tier("auto"), Tier):
        pytest.skip("no native tier for this processor")
    monkeypatch.setattr(Tier, "machine", None)
    monkeypatch.setattr(Tier, "refusal", "no executable memory")
    tier("portable", 3000)
    tier("auto")
    Module.tier.credit = 0
    f = Instance(Module(wat('(module (func (export "f") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 3))))'))).exports["f"]
    assert [f(n) for n in range(4000)] == [3 * n for n in range(4000)]
    assert is_transcribed(f)
    assert chibishim.native_status() == "no: no executable memory; hot functions become Python"


@pytest.mark.parametrize("machine", ["armv7l", "riscv64"])
def test_the_portable_tier_is_chosen_for_other_processors(monkeypatch, machine):
    monkeypatch.setattr(chibishim.os, "uname", lambda: os.uname_result(("Linux", "node", "6.1", "1", machine)))
    assert [getattr(choose_tier(mode), "mode", None) for mode in ("auto", "native", "portable", "interpreter")] == ["auto", None, "portable", None]
    assert isinstance(choose_tier("auto"), PortableTier)
    monkeypatch.setattr(Module, "tier", choose_tier("auto"))
    assert chibishim.native_status() == "no: no assembler for %s; hot functions become Python" % machine


def test_a_program_that_prints_a_line_is_not_transcribed():
    done = run_script("""
chibishim.Module.tier = PortableTier("auto")
def transcribe(*words):
    print("transcribed")
chibishim.transcribe = transcribe
with open(sys.argv[1], "rb") as file:
    print(chibishim.run_command(file.read(), ["hello"], {}, []))""", os.path.join(ROOT, "tests", "modules", "hello.wasm"))
    assert done.stdout == b"Hello, World!\n0\n", done.stderr


@pytest.mark.parametrize("name", ["a loop", "calls"])
def test_a_signal_ends_python_at_once(wat, tmp_path, name):
    process = spinning(wat, tmp_path, ENDLESS[name], mode="portable")
    try:
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ENDLESS)
def test_a_timeout_ends_python_with_a_backtrace(wat, tmp_path, name):
    process = spinning(wat, tmp_path, ENDLESS[name], "--timeout", "1", mode="portable")
    try:
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 134 and error.startswith(b"error: trap: timeout after 1 s\n   0:  ")
    finally:
        process.kill()
        process.communicate()


def test_the_archive_loads_it_when_it_is_needed(tmp_path):
    shim = tmp_path / "shim"
    subprocess.run([sys.executable, os.path.join(ROOT, "build_zipapp.py"), "--output", str(shim)], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run([str(shim), "run", "--tier=portable", os.path.join(ROOT, "tests", "modules", "hello.wasm")], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"Hello, World!\n")


def test_generated_modules_do_the_same_in_the_interpreter_and_as_python():
    "I2"
    tried, findings, (compiled, functions) = fuzz_native.fuzz(600, 0, "portable", modules=60)
    assert findings == []
    assert tried == 60 and compiled > functions // 2
