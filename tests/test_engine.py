"""Chapters 5 to 12: modules from the text format, through the embedding interface."""

import builtins
import math
import os
import random
import shutil
import subprocess
import sys

import pytest

import fuzz
import run_spec

import chibishim
from chibishim import I32, I64, Exhaustion, FunctionType, Global, Instance, Invalid, Malformed, Memory, Module, Trap, Unlinkable, validate

FACTORIAL = """(module (func $fac (export "fac") (param i64) (result i64)
  (if (result i64) (i64.eqz (local.get 0)) (then (i64.const 1))
    (else (i64.mul (local.get 0) (call $fac (i64.sub (local.get 0) (i64.const 1))))))))"""


def run(wat, text, name="f", *arguments, imports=None):
    return Instance(Module(wat(text)), imports).exports[name](*arguments)


def test_recursive_calls(wat):
    assert run(wat, FACTORIAL, "fac", 20) == 2432902008176640000


def test_integers_are_returned_signed(wat):
    assert run(wat, '(module (func (export "f") (result i32) (i32.const 0xffffffff)))') == -1


def test_multiple_results_are_a_tuple(wat):
    assert run(wat, '(module (func (export "f") (result i32 i64) (i32.const 1) (i64.const 2)))') == (1, 2)


def test_no_result_is_none(wat):
    assert run(wat, '(module (func (export "f")))') is None


def test_a_local_keeps_its_old_value_on_the_stack_when_it_is_assigned(wat):
    text = """(module (func (export "f") (param i32) (result i32)
      local.get 0  (local.set 0 (i32.add (local.get 0) (i32.const 10)))  local.get 0  i32.sub))"""
    assert run(wat, text, "f", 5) == -10


def test_saving_an_old_value_leaves_the_constants_alone(wat):
    text = """(module (func (export "f") (param i32) (result i32) (local i32)
      local.get 0  (local.set 0 (i32.const 10))  local.set 1  (local.set 1 (i32.const 10))  local.get 1))"""
    assert run(wat, text, "f", 5) == 10


def test_operands_below_a_block_leave_the_constants_alone(wat):
    text = """(module (func (export "f") (param i32) (result i32) (local i32)
      local.get 0  (block (nop))  local.set 1  (local.set 0 (i32.const 10))  local.get 0))"""
    assert run(wat, text, "f", 5) == 10


def test_a_branch_carries_values_past_operands_below(wat):
    text = """(module (func (export "f") (param i32) (result i32)
      (block (result i32) (i32.const 7) (i32.const 9) (br_if 0 (local.get 0)) (drop) (drop) (i32.const 1))))"""
    assert run(wat, text, "f", 1) == 9
    assert run(wat, text, "f", 0) == 1


def test_call_with_the_wrong_number_of_arguments(wat):
    with pytest.raises(TypeError, match="1 arguments"):
        run(wat, '(module (func (export "f")))', "f", 1)


def test_runaway_recursion_is_exhaustion(wat):
    "I4"
    with pytest.raises(Exhaustion, match="call stack exhausted"):
        run(wat, '(module (func $f (export "f") (call $f)))')


def test_recursion_through_the_host_is_exhaustion(wat):
    "I4"
    exports = {}
    text = '(module (import "h" "g" (func $g)) (func (export "f") (call $g)))'
    instance = Instance(Module(wat(text)), {"h": {"g": lambda: exports["f"]()}})
    exports.update(instance.exports)
    with pytest.raises(Exhaustion, match="call stack exhausted"):
        exports["f"]()


@pytest.mark.parametrize("body, message", [
    ("(i32.div_s (i32.const 1) (i32.const 0))", "integer divide by zero"),
    ("(i32.div_s (i32.const 0x80000000) (i32.const -1))", "integer overflow"),
    ("(i32.trunc_f64_s (f64.const nan))", "invalid conversion to integer"),
    ("(i32.load (i32.const 65533))", "out of bounds memory access"),
    ("(i32.load offset=0xffffffff (i32.const -1))", "out of bounds memory access"),
    ("unreachable", "unreachable"),
])
def test_traps_have_the_suite_s_texts(wat, body, message):
    with pytest.raises(Trap, match=message) as caught:
        run(wat, '(module (memory 1) (func $culprit (export "f") (result i32) %s))' % body)
    assert caught.value.backtrace


def test_a_store_out_of_bounds_writes_nothing(wat):
    instance = Instance(Module(wat("""(module (memory (export "m") 1)
      (func (export "f") (i64.store (i32.const 65530) (i64.const -1))))""")))
    with pytest.raises(Trap):
        instance.exports["f"]()
    assert bytes(instance.exports["m"].view[65528:]) == bytes(8)


def test_memory_grow_beyond_the_maximum_is_minus_one(wat):
    "I7"
    assert run(wat, '(module (memory 1 2) (func (export "f") (result i32) (memory.grow (i32.const 2))))') == -1


@pytest.mark.parametrize("minimum, maximum, capacity", [(0, 0, 0), (1, 3, 3), (2, 2, 2)])
def test_a_memory_grows_to_its_capacity_and_no_further(minimum, maximum, capacity):
    "I7"
    memory = chibishim.Memory(minimum, maximum)
    assert memory.capacity == capacity and memory.grow(capacity - minimum) == minimum
    assert memory.grow(1) == -1 and memory.pages == capacity


def test_imports_are_matched(wat):
    text = '(module (import "m" "g" (global i32)))'
    with pytest.raises(Unlinkable, match="unknown import m.g"):
        Instance(Module(wat(text)))
    with pytest.raises(Unlinkable, match="incompatible import type for m.g"):
        Instance(Module(wat(text)), {"m": {"g": Memory(1)}})
    g = Global(chibishim.GlobalType(chibishim.I32, False), 7)
    assert Instance(Module(wat(text)), {"m": {"g": g}})


def test_a_python_callable_is_an_import(wat):
    text = """(module (import "m" "add" (func $add (param i32 i32) (result i32)))
      (func (export "f") (result i32) (call $add (i32.const -2) (i32.const 44))))"""
    assert run(wat, text, imports={"m": {"add": lambda a, b: a + b}}) == 42


def test_signalling_nan_survives_memory(wat):
    "I6"
    text = """(module (memory 1) (func (export "f") (result i32)
      (f32.store (i32.const 0) (f32.reinterpret_i32 (i32.const 0x7fa00000)))
      (i32.reinterpret_f32 (f32.load (i32.const 0)))))"""
    assert run(wat, text) == 0x7FA00000


@pytest.mark.parametrize("bits", [0x7FF0000000000001, 0xFFF8000000000123, 0x8000000000000000])
def test_copysign_changes_the_sign_bit_and_no_other(bits):
    "I6"
    for sign in (1.0, -0.0, chibishim.f64_from_bits(0xFFF0000000000001)):
        result = chibishim.f64_bits(chibishim.copysign(chibishim.f64_from_bits(bits), sign))
        assert result == bits & ~(1 << 63) | chibishim.f64_bits(sign) & 1 << 63


@pytest.mark.parametrize("x, floor, ceil", [(-0.5, -1.0, -0.0), (-0.0, -0.0, -0.0), (0.5, 0.0, 1.0), (2.0**52 + 1, 2.0**52 + 1, 2.0**52 + 1),
                                            (2.0**52 - 0.5, 2.0**52 - 1, 2.0**52), (float("-inf"), float("-inf"), float("-inf"))])
def test_rounding_keeps_the_sign_of_zero(x, floor, ceil):
    "I6"
    assert [repr(f(x)) for f in (chibishim.ffloor, chibishim.fceil)] == [repr(floor), repr(ceil)]


def test_integer_to_f32_rounds_once():
    "I6"
    assert chibishim.int_to_f32(0x7FFFFF4000000001) == float(0x7FFFFF8000000000)


def test_float_minimum_tells_zeros_apart():
    assert math.copysign(1, chibishim.fmin(0.0, -0.0)) == -1
    assert math.copysign(1, chibishim.fmax(-0.0, 0.0)) == 1


def test_an_invalid_body_is_refused_at_its_first_call(wat):
    module = Module(wat('(module (func (export "f") (result i32) (i64.const 1)))', "--no-check"))
    instance = Instance(module)
    with pytest.raises(Invalid, match="type mismatch"):
        instance.exports["f"]()
    assert not validate(wat('(module (func (result i32) (i64.const 1)))', "--no-check"))


@pytest.mark.parametrize("data, message", [
    (b"", "unexpected end"),
    (b"\0asx\1\0\0\0", "magic header not detected"),
    (b"\0asm\2\0\0\0", "unknown binary version"),
    (b"\0asm\1\0\0\0\x01\x05\xff\xff\xff\xff\x0f", "unexpected end"),
    (b"\0asm\1\0\0\0\x63\x00", "malformed section id"),
    (b"\0asm\1\0\0\0\x03\x02\x01\x00", "unknown type|inconsistent"),
])
def test_malformed_modules(data, message):
    with pytest.raises(Malformed, match=message):
        Module(data)


# -- later features, each once; the official suite has the rest (test_spec.py) --


def test_tail_calls_need_no_stack(wat):
    text = """(module (func $f (export "f") (param i32) (result i32)
      (if (i32.eqz (local.get 0)) (then (return (i32.const 7))))
      (return_call $f (i32.sub (local.get 0) (i32.const 1)))))"""
    instance = Instance(Module(wat(text, "--enable-tail-call")))
    assert instance.exports["f"](3 * chibishim.MAX_FRAMES) == 7


def test_a_tail_call_to_the_host_returns_its_results(wat):
    text = """(module (import "h" "g" (func $g (param i32) (result i32)))
      (func (export "f") (param i32) (result i32) (return_call $g (local.get 0))))"""
    instance = Instance(Module(wat(text, "--enable-tail-call")), {"h": {"g": lambda x: x + 1}})
    assert instance.exports["f"](41) == 42


def test_a_second_memory(wat):
    text = """(module (memory 1) (memory $m (export "m") 1)
      (func (export "f") (i32.store $m offset=4 (i32.const 0) (i32.const 258))))"""
    instance = Instance(Module(wat(text, "--enable-multi-memory")))
    instance.exports["f"]()
    assert bytes(instance.exports["m"].view[:8]) == b"\0\0\0\0\2\1\0\0"


@pytest.mark.parametrize("address", [0xFFFFFFFFFFFFFFFF, 1 << 63, 1 << 32, 65533])
def test_a_64_bit_address_beyond_memory_traps(wat, address):
    "I9"
    text = '(module (memory i64 1) (func (export "f") (result i32) (i32.load offset=8 (i64.const %d))))' % address
    with pytest.raises(Trap, match="out of bounds memory access"):
        Instance(Module(wat(text, "--enable-memory64"))).exports["f"]()


@pytest.mark.parametrize("tier", ["interpreter", "native"])
def test_names_and_constants_are_never_code(wat, monkeypatch, tier):
    "I8"
    evil = "');__import__('builtins').INJECTED=1#\\n\\\\\\\"%s{0}"
    text = """(module (import "%s" "%s" (func $i (result i32)))
        (memory (export "m") 1) (global $g (export "%s g") (mut f64) (f64.const nan:0x%s))
        (func (export "%s") (result i64 f32) (drop (call $i)) (global.set $g (f64.const -nan:0x%s)) i64.const 0x8000000000000000 f32.const -0x0p0)
        (@custom "%s" "%s"))""" % (evil, evil, evil, "a" * 13, evil, "b" * 13, evil, evil)
    name = evil.replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")          # as WebAssembly text has it
    monkeypatch.setattr(chibishim.Module, "tier", chibishim.choose_tier(tier))
    instance = Instance(Module(wat(text, "--enable-annotations")), {name: {name: lambda: 1}})
    assert instance.exports[name]() == (-1 << 63, -0.0) and not hasattr(builtins, "INJECTED")


def test_vectors_are_bytes_for_the_embedder(wat):
    text = """(module (func (export "f") (param v128) (result v128)
      (i16x8.add (local.get 0) (i16x8.splat (i32.const 0xffff)))))"""
    assert run(wat, text, "f", bytes(16)) == b"\xff" * 16
    with pytest.raises(TypeError, match="not 16 bytes"):
        run(wat, text, "f", b"")


# -- chapter 5: types --


def test_function_types_of_two_modules_are_equal_by_structure():
    assert FunctionType((I32,), ()) == FunctionType((I32,), ()) != FunctionType((I64,), ())


def test_types_that_nobody_has_any_more_are_forgotten():
    before = len(chibishim.IDENTITIES)
    type = FunctionType((I32,) * 17, (I64,) * 13)
    assert len(chibishim.IDENTITIES) == before + 1
    del type
    assert len(chibishim.IDENTITIES) == before


@pytest.mark.parametrize("type, other, expected", [
    (I32, I32, True), (I32, I64, False),
    ((chibishim.NONE, True), (chibishim.STRUCT, True), True),
    ((chibishim.I31_HEAP, False), (chibishim.ANY, True), True),
    ((chibishim.EQ, True), (chibishim.EQ, False), False),
    ((chibishim.NOFUNC, True), (chibishim.EXTERN, True), False),
    ((FunctionType((), ()), False), (chibishim.FUNC, False), True),
    ((FunctionType((), ()), False), (chibishim.ANY, False), False),
])
def test_subtyping(type, other, expected):
    assert chibishim.type_matches(type, other) == expected


@pytest.mark.parametrize("convert, source, target, valid", [
    (b"\xfb\x1a", b"\x6f", b"\x6e", True),      # any.convert_extern of an externref
    (b"\xfb\x1b", b"\x6e", b"\x6f", True),      # extern.convert_any of an anyref,
    (b"\xfb\x1b", b"\x6c", b"\x6f", True),      # … of an i31ref
    (b"\xfb\x1a", b"\x70", b"\x6e", False),     # any.convert_extern of a funcref,
    (b"\xfb\x1a", b"\x69", b"\x6e", False),     # … of an exnref,
    (b"\xfb\x1a", b"\x6e", b"\x6e", False),     # … of an anyref
    (b"\xfb\x1b", b"\x6f", b"\x6f", False),     # extern.convert_any of an externref
    (b"\xfb\x1b", b"\x70", b"\x6f", False),     # … of a funcref
])
def test_only_references_of_the_other_hierarchy_are_converted(convert, source, target, valid):
    assert validate(module_of(b"\0\x20\0" + convert + b"\x0b", b"\x60\1" + source + b"\1" + target)) == valid


@pytest.mark.parametrize("type, valid", [
    (b"\x60\0\0", True), (b"\x60\1\x7f\0", False), (b"\x60\0\1\x7f", False),
    (b"\x50\0\x60\0\0", True),                   # (sub (func))
    (b"\x4e\2\x60\0\0\x60\0\0", True),          # (rec (func) (func))
])
def test_a_start_function_takes_and_returns_nothing_whatever_its_type_is_declared_as(type, valid):
    data = (b"\0asm\1\0\0\0" + section(1, type) + section(3, b"\0") + b"\x08\1\0" + section(10, b"\3\0\0\x0b"))
    try:
        Module(data)
    except Invalid as error:
        assert not valid and str(error) == "start function"
    else:
        assert valid


@pytest.mark.parametrize("call", [b"\x10", b"\x12"])
def test_a_call_of_an_import_is_checked_against_the_type_that_the_module_declares(call):
    # (sub (func (param structref))), and below it (sub 0 (func (param anyref)))
    types = b"\x50\0\x60\1\x6b\0", b"\x50\1\0\x60\1\x6e\0"
    exporter = Instance(Module(b"\0asm\1\0\0\0" + section(1, *types) + section(3, b"\1") + section(7, b"\1f\0\0")
                               + section(10, b"\2\0\x0b")))
    importer = Instance(Module(b"\0asm\1\0\0\0" + section(1, *types) + section(2, b"\1m\1f\0\0") + section(3, b"\0", b"\1")
                               + section(7, b"\3fit\0\1", b"\4wide\0\2")
                               + section(10, b"\6\0\x20\0" + call + b"\0\x0b", b"\6\0\x20\0" + call + b"\0\x0b")),
                        {"m": exporter.exports})
    assert importer.exports["fit"](None) is None
    with pytest.raises(Invalid, match="type mismatch"):
        importer.exports["wide"](None)


# -- bounds (security.md I3, I4, I5) --


def leb128(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes((value,))


def section(id, *items):
    content = leb128(len(items)) + b"".join(items)
    return bytes((id,)) + leb128(len(content)) + content


def module_of(body, type=b"\x60\0\0", *more_types):
    """A module of one function; `body` starts with its locals."""
    return (b"\0asm\1\0\0\0" + section(1, type, *more_types) + section(3, b"\0")
            + section(10, leb128(len(body)) + body))


def steps(data):
    """How many Python calls and lines validating takes: a measure of work without a clock."""
    count = 0

    def count_line(frame, event, argument):
        nonlocal count
        count += 1
        return count_line
    sys.settrace(count_line)
    try:
        Module(data).validate()
    except chibishim.WasmError:
        pass
    finally:
        sys.settrace(None)
    return count


THOUSAND = b"\x60\0" + leb128(1000) + b"\x7f" * 1000
HOSTILE = {
    "blocks over a high stack": lambda n: module_of(b"\1\2\x7f" + b"\x20\0" * n + b"\2\x40\x0b" * n + b"\x1a" * n + b"\x0b"),
    "nested blocks": lambda n: module_of(b"\0" + b"\2\x40" * n + b"\x0b" * n + b"\x0b"),
    "br_table": lambda n: module_of(b"\0\x41\0\x0e" + leb128(n) + b"\0" * n + b"\0\x0b"),
    "br_table of wide labels": lambda n: module_of(
        b"\0" + b"\2\1" * n + b"\x41\0" * 1000 + b"\x41\0\x0e" + leb128(n - 1) + b"".join(map(leb128, range(n))) + b"\x0b" * n
        + b"\x0b", b"\x60\0\0", THOUSAND),
    "locals to be set": lambda n: module_of(
        b"\1" + leb128(n) + b"\x64\x6e" + b"".join(b"\2\x40\xd0\x6e\xd4\x21" + leb128(i) + b"\x0b" for i in range(n)) + b"\x0b"),
    "types": lambda n: module_of(b"\0\x0b", b"\x60\0\0", *[THOUSAND] * (n // 100)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_validation_is_linear(name):
    "I5"
    small, large = (HOSTILE[name](n) for n in (1000, 4000))
    assert steps(large) / steps(small) < 2 * len(large) / len(small)


def test_types_that_refer_to_others_of_their_group_differ_in_their_hashes():
    "I5: the table of groups would be searched one by one"
    def group(number):
        fields = b"".join(b"\x64" + signed_leb128(2 * number + (number >> bit & 1)) + b"\0" for bit in range(8))
        return b"\x4e\2\x5f\x08" + fields + b"\x5f\0"
    module = Module(b"\0asm\1\0\0\0" + section(1, *map(group, range(256))))
    structures = [structure for structure, identity in chibishim.IDENTITIES.items() if identity() is not None]
    assert len(module.types) == 512 and len(structures) >= 256
    assert len(set(map(hash, structures))) == len(structures)


def test_loops_over_a_high_stack_note_no_more_than_a_few_of_its_types(monkeypatch):
    "I5: what a tier is told of a loop's head"
    monkeypatch.setattr(Module, "tier", chibishim.Tier("auto"))
    count = 2000
    body = b"\0" + b"\x20\0" * count + b"\3\x40\x0b" * count + b"\x1a" * count + b"\x0b"
    function = Instance(Module(module_of(body, b"\x60\1\x7f\0"))).functions[0]
    blocks = chibishim.postorder(chibishim.translated(function), chibishim.targets_of)
    places = [step[1] for block in blocks for step in block[0] if step[0] is chibishim.do_count]
    assert len(places) == count + 1
    assert sum(len(place[1]) for place in places if place) <= chibishim.MAX_LOOP_OPERANDS * 2


def test_a_body_that_overdoes_aliases_gets_none():
    "I5: looking for them is as expensive as the stack is high"
    n = 3000
    body = b"\1\1\x7f" + b"\x20\0" * n + b"\x41\7\x21\1\x20\0\x22\0\x1a" * n + b"\x6a" * (n - 1) + b"\x0b"
    module = Module(module_of(body, b"\x60\1\x7f\1\x7f"))
    function = Instance(module).functions[0]
    translator = chibishim.Translator(function)
    translator.run()
    assert not translator.aliases
    assert function(5) == 5 * n


@pytest.mark.parametrize("data, error, message", [
    (module_of(b"\1\xff\xff\xff\xff\x0f\x7f\x0b"), Malformed, "too many locals"),
    (module_of(b"\0" + b"\x41\0" * 1000 + b"\2\1\x0b" * 5000 + b"\x1a" * 1000 + b"\x0b", b"\x60\0\0",
               b"\x60" + 2 * (leb128(1000) + b"\x7f" * 1000)), Exhaustion, "function too complex"),
    (module_of(b"\0\x0b", b"\x60" + leb128(1001) + b"\x7f" * 1001 + b"\0"), Invalid, "1001 parameters: at most 1000"),
    (module_of(b"\0\x0b", b"\x4e\xff\xff\xff\xff\x0f"), Malformed, "unexpected end"),
    (b"\0asm\1\0\0\0" + section(5, *[b"\0\0"] * 101), Invalid, "101 memories: at most 100"),
])
def test_bounds_are_said(data, error, message):
    "I3"
    with pytest.raises(error, match=message):
        Module(data).validate()
    assert not validate(data)


@pytest.mark.parametrize("id, limit, what", [
    (2, 1000000, "imports"), (3, 1000000, "functions"), (4, 100, "tables"), (5, 100, "memories"), (6, 1000000, "globals"),
    (7, 1000000, "exports"), (9, 100000, "element segments"), (10, 1000000, "functions"), (11, 100000, "data segments"),
    (13, 1000000, "tags")])
def test_a_section_is_refused_by_its_count_before_anything_is_made_of_it(id, limit, what):
    "I3"
    for count, error, message in ((limit + 1, Invalid, "%d %s: at most %d" % (limit + 1, what, limit)), (limit, Malformed, "unexpected end|length")):
        with pytest.raises(error, match=message):
            Module(b"\0asm\1\0\0\0" + bytes((id, len(leb128(count)))) + leb128(count))


def test_custom_sections_have_a_bound():
    "I3"
    sections = b"\0\1\0" * chibishim.MAX_CUSTOMS
    assert len(Module(b"\0asm\1\0\0\0" + sections).customs) == chibishim.MAX_CUSTOMS
    with pytest.raises(Invalid, match="custom sections: at most 100000"):
        Module(b"\0asm\1\0\0\0" + sections + b"\0\1\0")


def test_a_constant_expression_is_no_longer_than_a_body_may_be(monkeypatch):
    "I3"
    data = b"\0asm\1\0\0\0" + section(6, b"\x7f\0\x41\0" + b"\x41\0\x6a" * 10 + b"\x0b")
    monkeypatch.setattr(chibishim, "MAX_BODY_BYTES", 33)
    Module(data)
    monkeypatch.setattr(chibishim, "MAX_BODY_BYTES", 32)
    with pytest.raises(Invalid, match="body of 33 bytes: at most 32"):
        Module(data)


def test_an_exception_reaches_its_handler_or_the_embedder():
    # $throw: i32 -> throws it; $catch: calls $throw, gives what was thrown plus one
    throw = b"\0\x20\0\x08\0\x0b"
    catch = b"\0\2\x7f\x1f\x40\1\0\0\0\x20\0\x10\0\x0b\x41\0\x0b\x41\1\x6a\x0b"
    data = (b"\0asm\1\0\0\0" + section(1, b"\x60\1\x7f\0", b"\x60\1\x7f\1\x7f") + section(3, b"\0", b"\1")
            + section(13, b"\0\0") + section(7, b"\5throw\0\0", b"\5catch\0\1")
            + section(10, leb128(len(throw)) + throw, leb128(len(catch)) + catch))
    exports = Instance(Module(data)).exports
    assert exports["catch"](41) == 42
    with pytest.raises(chibishim.Thrown, match="uncaught exception") as caught:
        exports["throw"](41)
    assert caught.value.values == (41,)
    assert caught.value.backtrace[0][0] is exports["throw"]


@pytest.mark.parametrize("index, place", [(0, 0), (1, 1)])
def test_a_timeout_while_a_function_is_translated_is_a_trap_at_its_call(monkeypatch, index, place):
    # function 0 calls function 1
    functions = Instance(Module(b"\0asm\1\0\0\0" + section(1, b"\x60\0\0") + section(3, b"\0", b"\0")
                                + section(10, b"\4\0\x10\1\x0b", b"\2\0\x0b"))).functions
    run = chibishim.Translator.run

    def expire(translator):
        if translator.function is functions[index]:
            raise chibishim.Timeout("timeout after 1 s")
        run(translator)
    monkeypatch.setattr(chibishim.Translator, "run", expire)
    with pytest.raises(chibishim.Timeout) as caught:
        functions[0]()
    assert caught.value.backtrace == ((functions[0], functions[0].body.start + place),)


def test_a_timeout_while_an_exception_is_on_its_way_is_a_trap(monkeypatch):
    # each function calls the next, the last one throws
    bodies = b"\4\0\x10\1\x0b", b"\4\0\x10\2\x0b", b"\4\0\x08\0\x0b"
    functions = Instance(Module(b"\0asm\1\0\0\0" + section(1, b"\x60\0\0") + section(3, *[b"\0"] * 3) + section(13, b"\0\0")
                                + section(10, *bodies))).functions
    searched = []

    def landing(handlers, thrown, R):
        searched.append(handlers)
        if len(searched) == 2:
            raise chibishim.Timeout("timeout after 1 s")
    monkeypatch.setattr(chibishim, "landing", landing)
    with pytest.raises(chibishim.Timeout) as caught:
        functions[0]()
    assert [function.index for function, _ in caught.value.backtrace] == [2, 1, 0]


def test_a_structure_is_an_opaque_object_for_the_embedder():
    # (type (struct (field (mut i8)))); makes one of 0x1FF, and reads its field back, signed
    make = b"\0\x41\xff\3\xfb\0\0\x0b"
    read = b"\0\x20\0\xfb\3\0\0\x0b"
    data = (b"\0asm\1\0\0\0" + section(1, b"\x5f\1\x78\1", b"\x60\0\1\x64\0", b"\x60\1\x63\0\1\x7f")
            + section(3, b"\1", b"\2") + section(7, b"\4make\0\0", b"\4read\0\1")
            + section(10, leb128(len(make)) + make, leb128(len(read)) + read))
    exports = Instance(Module(data)).exports
    assert exports["read"](exports["make"]()) == -1
    with pytest.raises(Trap, match="null structure reference"):
        exports["read"](None)
    with pytest.raises(TypeError):
        exports["read"](7)


def defined(kind):
    type = chibishim.DefinedType(kind)
    chibishim.identify([type])
    return type


@pytest.mark.parametrize("attribute", [0, chibishim.STRUCT, "x"])
@pytest.mark.parametrize("heap", [chibishim.STRUCT, chibishim.I31_HEAP, chibishim.NONE, chibishim.NOEXTERN, defined(chibishim.STRUCT)], ids=str)
def test_an_external_object_is_no_guest_s_whatever_its_attribute_type_is(attribute, heap):
    class External:
        type = attribute
    assert not chibishim.reference_matches(External(), heap, True)


@pytest.mark.parametrize("type, value, fits", [
    (chibishim.EXNREF, 5, False), (chibishim.EXNREF, chibishim.Thrown(None, ()), True), (chibishim.EXNREF, None, True),
    (chibishim.FUNCREF, 5, False), (chibishim.EXTERNREF, 5, True), ((chibishim.ANY, True), 5, True), ((chibishim.ANY, False), None, False),
    ((defined(chibishim.FUNC), True), chibishim.Tag(defined(chibishim.FUNC)), False),
    ((defined(chibishim.FUNC), True), chibishim.HostFunction(defined(chibishim.FUNC), print), True)])
def test_the_embedder_passes_functions_as_functions_and_exceptions_as_exceptions(type, value, fits):
    if fits:
        assert chibishim.to_value(type, value) is value
    else:
        with pytest.raises(TypeError, match="is not a \\(ref"):
            chibishim.to_value(type, value)


def test_a_table_too_large_is_exhaustion(wat):
    with pytest.raises(Exhaustion, match="table"):
        Instance(Module(wat("(module (table 0xfffffff0 funcref))")))


def test_a_table_that_finds_no_memory_is_exhaustion_or_does_not_grow():
    "I7"
    script = """if 1:
        import resource, sys
        sys.path.insert(0, %r)
        import chibishim
        table = chibishim.Table(chibishim.FUNCREF, 1)
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 25, 1 << 25))
        print(table.grow(9000000), len(table.elements))
        try:
            chibishim.Table(chibishim.FUNCREF, 9000000)
        except chibishim.Exhaustion as error:
            print(error)
        """ % os.path.dirname(chibishim.__file__)
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"-1 1\nno memory for a table of 9000000 elements\n"


def test_a_type_may_be_many_levels_deep():
    "I4"
    type = b"\x60\0\0"
    data = b"\0asm\1\0\0\0" + section(1, type, *[b"\x5f\1\x63" + signed_leb128(i) + b"\0" for i in range(20000)])
    Module(data).validate()


def signed_leb128(value):
    """A number that is not negative, as signed LEB128."""
    out = bytearray(leb128(value))
    if out[-1] & 0x40:
        out[-1:] = bytes((out[-1] | 0x80, 0))
    return bytes(out)


def test_wide_frames_exhaust_the_stack_before_the_memory(wat, monkeypatch):
    "I4: in the interpreter; native code has no frames for locals that nobody uses"
    monkeypatch.setattr(chibishim.Module, "tier", None)
    text = "(module (func $f (export \"f\") (local %s) (call $f)))" % ("i64 " * 5000)
    with pytest.raises(Exhaustion, match="call stack exhausted") as caught:
        run(wat, text)
    assert len(caught.value.backtrace) * 5000 < chibishim.MAX_FRAME_SLOTS + 10000


def test_frames_of_many_constants_exhaust_the_stack_before_the_memory(wat, monkeypatch):
    "I4"
    monkeypatch.setattr(chibishim.Module, "tier", None)
    text = "(module (func $f (export \"f\") %s (call $f)))" % "".join("(drop (i32.const %d))" % n for n in range(5000))
    with pytest.raises(Exhaustion, match="call stack exhausted") as caught:
        run(wat, text)
    assert len(caught.value.backtrace) * 5000 < chibishim.MAX_FRAME_SLOTS + 10000


def test_mutated_modules_raise_only_what_is_documented():
    "I3"
    if run_spec.unpacked() is None:
        pytest.skip("no official suite in %s" % run_spec.SPEC)
    tried, findings = fuzz.fuzz(600, 0, modules=500)
    assert (tried, findings) == (500, [])


# -- beyond the suite: every numeric instruction on random operands, against wabt --

SUFFIX = {"i": "i32", "I": "i64", "f": "f32", "F": "f64"}
NUMERIC = [row for row in chibishim.INSTRUCTIONS if row[3] and not row[2] and "v" not in row[3]]


def expression(choose, letter, depth):
    """A random expression of a type. NaNs are made canonical: their payload is not specified."""
    if depth == 0 or choose.random() < 0.1:
        bits = 32 if letter in "if" else 64
        value = choose.choice((0, 1, 2, 31, 1 << bits - 1, (1 << bits) - 1, choose.getrandbits(bits), choose.getrandbits(7),
                               0x3F800000 << bits - 32, 0x4F000000 << bits - 32, 0x7F800000 << bits - 32, 0x43E00000 << bits - 32))
        constant = "(i%d.const %d)" % (bits, value)
        return constant if letter in "iI" else "(%s.reinterpret_i%d %s)" % (SUFFIX[letter], bits, constant)
    name, type = choose.choice([(row[1], row[3]) for row in NUMERIC if row[3].endswith(":" + letter)])
    text = "(%s %s)" % (name, " ".join(expression(choose, operand, depth - 1) for operand in type.split(":")[0]))
    if letter in "fF":
        t = SUFFIX[letter]
        text = "(select (%s.const nan) (local.tee $%s %s) (%s.ne (local.get $%s) (local.get $%s)))" % (t, t, text, t, t, t)
    return text


def outcome(function):
    """As wasm-interp prints it."""
    try:
        return "%s:%d" % (SUFFIX["i" if function.type.results == (I32,) else "I"],
                          chibishim.execute(function, [])[0])
    except Trap as trap:
        return "error: %s" % trap


@pytest.mark.parametrize("seed", range(4))
def test_numeric_expressions_give_what_wasm_interp_gives(wat, tmp_path, seed):
    if not shutil.which("wasm-interp"):
        pytest.skip("wasm-interp (Debian package wabt) is not installed")
    choose = random.Random(seed)
    functions = []
    for index in range(300):
        letter = choose.choice("iI")
        functions.append('(func (export "%d") (result %s) (local $f32 f32) (local $f64 f64) %s)' % (
            index, SUFFIX[letter], expression(choose, letter, choose.randrange(1, 5))))
    data = wat("(module %s)" % "\n".join(functions))
    path = tmp_path / "m.wasm"
    path.write_bytes(data)
    printed = subprocess.run(["wasm-interp", "--run-all-exports", str(path)], stdout=subprocess.PIPE, check=False).stdout.decode()
    expected = dict(line.split("() => ") for line in printed.splitlines())
    exports = Instance(Module(data)).exports
    assert len(expected) == 300
    assert {name: outcome(function) for name, function in exports.items()} == expected
