"""The committed binaries are what their sources say."""

import glob
import os

import pytest

from conftest import ROOT

SOURCES = sorted(glob.glob(os.path.join(ROOT, "tests", "modules", "*.wat")))


@pytest.mark.parametrize("source", SOURCES, ids=os.path.basename)
def test_the_binary_is_built_from_its_source(wat, source):
    with open(source) as text, open(source[:-4] + ".wasm", "rb") as binary:
        assert wat(text.read(), "--debug-names") == binary.read(), "run: make modules"
