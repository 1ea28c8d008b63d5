"""Chapter 13: guests in processes of their own, by the command line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

WRITE = """(module (import "wasi_snapshot_preview1" "fd_write" (func $w (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1) (data (i32.const 8) "Hello, World!\\n")
  (func (export "_start") (i32.store (i32.const 0) (i32.const 8)) (i32.store (i32.const 4) (i32.const 14))
    (drop (call $w (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 100))) %s))"""


def run(module, *arguments, options=(), tmp_path, **keywords):
    path = tmp_path / "guest.wasm"
    path.write_bytes(module)
    return subprocess.run([sys.executable, "-IS", os.path.join(ROOT, "chibishim.py"), "run", *options, str(path), *arguments],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, **keywords)


def test_hello(wat, tmp_path):
    done = run(wat(WRITE % ""), tmp_path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, World!\n", b"")


def test_proc_exit_is_the_exit_status(wat, tmp_path):
    assert run(wat(WRITE % "(call $exit (i32.const 7))"), tmp_path=tmp_path).returncode == 7


def test_a_trap_is_134_with_a_backtrace(wat, tmp_path):
    done = run(wat(WRITE.replace("(export", "$main (export", 1).replace("(func $main", "(func") % "unreachable"), tmp_path=tmp_path)
    assert done.returncode == 134
    assert b"trap: unreachable" in done.stderr and b"0: " in done.stderr


def test_a_missing_module_is_named(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "chibishim.py"), "run", str(tmp_path / "absent.wasm")],
                          stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"absent.wasm: No such file" in done.stderr and b"Traceback" not in done.stderr


def open_path(wat, tmp_path, path, follow=1):
    """The errno of path_open on `path` below a preopened directory."""
    module = wat("""(module
      (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (data (i32.const 8) "%s")
      (func (export "_start") (call $exit (call $open (i32.const 3) (i32.const %d) (i32.const 8) (i32.const %d)
        (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 0)))))""" % (path, follow, len(path)))
    return run(module, options=["--dir", "%s::/" % (tmp_path / "root")], tmp_path=tmp_path).returncode


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (root / "file").write_text("file")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("../secret")
    (root / "loop").symlink_to("loop")
    (root / "inside").symlink_to("sub/../file")
    os.mkfifo(root / "fifo")
    return root


@pytest.mark.parametrize("path, errno", [
    ("file", 0), ("sub/../file", 0), ("inside", 0), ("./sub/.././file", 0),
    ("../secret", 63), ("sub/../../secret", 63), ("/etc/passwd", 63), ("absolute", 63), ("up", 63),
    ("loop", 32), ("absent", 44), ("file/x", 54), ("", 44),
])
def test_paths_stay_below_their_preopen(wat, tmp_path, root, path, errno):
    "W2"
    assert open_path(wat, tmp_path, path) == errno


def test_a_fifo_does_not_hang(wat, tmp_path, root):
    "W4"
    assert open_path(wat, tmp_path, "fifo") == 0


def test_procfs_is_out_of_reach(wat, tmp_path):
    "W5"
    (tmp_path / "root").symlink_to("/")
    assert open_path(wat, tmp_path, "proc/self/mem") == 2
