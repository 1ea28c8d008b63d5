"""A short run of soak.py; `make soak` is the long one."""

import tempfile
import time

import pytest

import containerd as peers
import soak

CYCLES = 100


@pytest.mark.skipif(peers.missing() is not None, reason="*** %s: NOTHING is soaked" % peers.missing())
def test_a_hundred_lives_and_deaths_leave_nothing():
    "L5"
    seed = time.time_ns() % 10**6
    with tempfile.TemporaryDirectory(prefix="chibi", dir="/run") as directory:
        run = soak.Soak(directory, seed)
        try:
            run.soak(CYCLES)
        except soak.Leak as leak:
            pytest.fail("tests/soak.py %d %d: %s" % (CYCLES, seed, leak))
        finally:
            run.end()
