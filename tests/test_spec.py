"""The official suite (security.md I1), and the table against facts of the specification."""

import pytest

import run_spec
from chibishim import INSTRUCTIONS

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


@pytest.mark.parametrize("group", ["core-3.0", "proposal-threads"])
def test_the_official_suite_passes(group):
    if run_spec.unpacked() is None:
        pytest.skip("no official suite in %s" % run_spec.SPEC)
    totals, failures = run_spec.run([group])
    assert failures == []
    assert sum(outcomes["passed"] for outcomes in totals.values()) > 500
