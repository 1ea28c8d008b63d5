"""What the tests share: the module under test, text-format modules, test data."""

import os
import shutil
import subprocess
import sys
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, os.environ.get("SHARED", "../shared"))
sys.path.insert(0, ROOT)
pytest_plugins = ["bundles"]            # its fixtures are everybody's


@pytest.fixture(scope="session")
def wat():
    """wat(text, *options) -> the bytes of the module, by wabt's wat2wasm."""
    if not shutil.which("wat2wasm"):
        pytest.skip("wat2wasm (Debian package wabt) is not installed")

    def compile(text, *options):
        return subprocess.run(["wat2wasm", *options, "-", "-o", "/dev/stdout"], input=text.encode(),
                              stdout=subprocess.PIPE, check=True).stdout
    return compile


def until(condition, seconds=30):
    """Waits for a condition, or fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not true after %d s" % seconds
        time.sleep(0.02)


def needs_mapped_ids(path):
    """Skips a test where the kernel, or the file system of the path, cannot map ids."""
    import chibishim
    space, tree = chibishim.make_user_namespace([(0, 1, 1)], [(0, 1, 1)]), chibishim.open_tree(path, 0)
    try:
        chibishim.map_ids(tree, path, chibishim.fd_path(space), chibishim.MOUNT_ATTR_IDMAP, False)
        os.close(tree)
    except OSError as error:
        pytest.skip("*** mounts that map ids are NOT tested: " + error.strerror)
    finally:
        os.close(space)
