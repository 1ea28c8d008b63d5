"""Every requirement of security.md has a test that cites its number in its docstring."""

import ast
import glob
import os
import re

import pytest
from conftest import ROOT, SHARED

REQUIREMENTS = os.path.join(SHARED, "docs", "security.md")


def cited():
    """The numbers in the docstrings of tests: a letter and a number each, "N4" or "W1, W2: …"."""
    numbers = set()
    for path in glob.glob(os.path.join(ROOT, "tests", "test_*.py")):
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                numbers.update(re.findall(r"\b[TLNWIP]\d+\b", ast.get_docstring(node) or ""))
    return numbers


@pytest.mark.skipif(not os.path.exists(REQUIREMENTS), reason="*** no %s: the requirements are NOT held against the tests" % REQUIREMENTS)
def test_every_requirement_is_cited_and_no_other():
    with open(REQUIREMENTS, encoding="utf-8") as file:
        required = set(re.findall(r"(?:^|[ *])([TLNWIP]\d+) ", file.read(), re.M))
    assert len(required) > 50
    assert sorted(required - cited()) == []
    assert sorted(cited() - required) == []
