"""Chapters 5 to 12: modules from the text format, through the embedding interface."""

import math

import pytest

import chibishim
from chibishim import Exhaustion, Global, Instance, Invalid, Malformed, Memory, Module, Trap, Unlinkable, validate

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
