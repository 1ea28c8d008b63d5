"""The official suite (security.md I1), and the table against facts of the specification."""

import subprocess

import pytest

import run_spec
from chibishim import INSTRUCTIONS, PREFIX_BYTES, TYPE_LETTERS, TYPE_NAMES, Disassembler, Module

# The specification's index of instructions has a line for every opcode, `else` and `end`
# included, and no line for the reserved ones; so has the table. Prefix 0xFE is a proposal.
SINCE_3 = ("throw", "throw_ref", "try_table", "return_call", "return_call_indirect", "call_ref", "return_call_ref",
           "ref.eq", "ref.as_non_null", "br_on_null", "br_on_non_null")


def version_3(row):
    return row[1] in SINCE_3 or row[0] >> 8 == 0xFB or row[0] > 0xFFFF


def test_the_table_has_every_instruction_of_the_index():
    standard = [row for row in INSTRUCTIONS if row[0] >> 8 != 0xFE]
    assert len([row for row in standard if not version_3(row)]) == 437
    assert len(standard) == 499
    assert len([row for row in standard if row[0] >> 8 == 0xFD]) == 236
    assert len(INSTRUCTIONS) == 499 + 67


def test_opcodes_and_names_are_unique():
    assert len({row[0] for row in INSTRUCTIONS}) == len({row[1] for row in INSTRUCTIONS}) == len(INSTRUCTIONS)


def regular_rows():
    """The rows whose type is in the table: all numeric ones, all accesses, nearly all vectors."""
    return [row for row in INSTRUCTIONS if row[3] is not None]


def one_instruction(row):
    """A function in the text format that applies an instruction to its parameters. Its type
    is checked by the assembler, which knows the specification and not our table."""
    params, results = (" ".join(TYPE_NAMES[TYPE_LETTERS[letter]] for letter in part) for part in row[3].split(":"))
    operands = " ".join("(local.get %d)" % index for index in range(len(row[3].partition(":")[0])))
    return "(func (param %s) (result %s) (%s%s %s))" % (params, results, row[1], " 0" if "lane" in row[2] else "", operands)


def test_regular_instructions_have_the_opcodes_and_types_that_wabt_knows(wat):
    rows, options = regular_rows(), ("--enable-threads", "--enable-relaxed-simd")
    text = "(module (memory 1 1 shared) %s)" % "\n".join(map(one_instruction, rows))
    try:
        module = Module(wat(text, *options))
    except subprocess.CalledProcessError:
        module = Module(wat(text.replace("relaxed_dot", "dot"), *options))      # the name in wabt 1.0.32, Debian 12's
    for row, body in zip(rows, module.bodies):
        reader = Disassembler(module, body)
        reader.byte()                   # no locals
        for _ in row[3].partition(":")[0]:
            assert reader.instruction()[1].startswith("local.get ")
        first = reader.byte()
        opcode = first
        if first in PREFIX_BYTES:
            number = reader.unsigned()
            opcode = int("%x%02x" % (first, number), 16)
        assert opcode == row[0], row[1]
    assert len(rows) == len(module.bodies) > 430


# Irregular instructions: encodings from the specification's chapter 5.4, by hand.
IRREGULAR = {
    "unreachable": "00", "nop": "01", "block": "02", "loop": "03", "if": "04", "else": "05", "throw": "08", "throw_ref": "0a", "end": "0b",
    "br": "0c", "br_if": "0d", "br_table": "0e", "return": "0f", "call": "10", "call_indirect": "11", "return_call": "12",
    "return_call_indirect": "13", "call_ref": "14", "return_call_ref": "15", "drop": "1a", "select": "1b", "select_t": "1c",
    "try_table": "1f", "local.get": "20", "local.set": "21", "local.tee": "22", "global.get": "23", "global.set": "24", "table.get": "25",
    "table.set": "26", "memory.size": "3f", "memory.grow": "40", "i32.const": "41", "i64.const": "42", "f32.const": "43",
    "f64.const": "44", "ref.null": "d0", "ref.is_null": "d1", "ref.func": "d2", "ref.eq": "d3", "ref.as_non_null": "d4",
    "br_on_null": "d5", "br_on_non_null": "d6", "struct.new": "fb00", "struct.new_default": "fb01", "struct.get": "fb02",
    "struct.get_s": "fb03", "struct.get_u": "fb04", "struct.set": "fb05", "array.new": "fb06", "array.new_default": "fb07",
    "array.new_fixed": "fb08", "array.new_data": "fb09", "array.new_elem": "fb0a", "array.get": "fb0b", "array.get_s": "fb0c",
    "array.get_u": "fb0d", "array.set": "fb0e", "array.len": "fb0f", "array.fill": "fb10", "array.copy": "fb11",
    "array.init_data": "fb12", "array.init_elem": "fb13", "ref.test": "fb14", "ref.test null": "fb15", "ref.cast": "fb16",
    "ref.cast null": "fb17", "br_on_cast": "fb18", "br_on_cast_fail": "fb19", "any.convert_extern": "fb1a",
    "extern.convert_any": "fb1b", "ref.i31": "fb1c", "i31.get_s": "fb1d", "i31.get_u": "fb1e", "memory.init": "fc08",
    "data.drop": "fc09", "memory.copy": "fc0a", "memory.fill": "fc0b", "table.init": "fc0c", "elem.drop": "fc0d", "table.copy": "fc0e",
    "table.grow": "fc0f", "table.size": "fc10", "table.fill": "fc11", "v128.const": "fd0c", "i8x16.shuffle": "fd0d",
    "atomic.fence": "fe03"}


def test_irregular_instructions_have_the_specification_s_opcodes():
    assert {row[1]: "%02x" % row[0] for row in INSTRUCTIONS if row[3] is None} == IRREGULAR


@pytest.mark.parametrize("group", ["core-3.0", "proposal-threads"])
def test_the_official_suite_passes(group):
    "I1"
    if run_spec.unpacked() is None:
        pytest.skip("no official suite in %s" % run_spec.SPEC)
    totals, failures = run_spec.run([group])
    assert failures == []
    assert sum(outcomes["passed"] for outcomes in totals.values()) > 500
