"""build_zipapp.py: the archive that is installed."""

import builtins
import dis
import marshal
import os
import resource
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import build_zipapp


def pythons():
    """The interpreters at hand; what PATH finds may be a script that starts one."""
    found = []
    for path in filter(None, (shutil.which("python3.%d" % minor) for minor in range(10, 16))):
        done = subprocess.run([path, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
        found += done.stdout.split() if done.returncode == 0 else []
    return found or [sys.executable]


PYTHONS = pythons()


def build(path, *options):
    subprocess.run([sys.executable, os.path.join(ROOT, "build_zipapp.py"), "--output", str(path), *options],
                   check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The archive that is built without options."""
    return build(tmp_path_factory.mktemp("shim") / "shim")


def test_reproducible_byte_for_byte(shim, tmp_path):
    "P5"
    assert build(tmp_path / "again").read_bytes() == shim.read_bytes()


def test_the_environment_cannot_inject_code(tmp_path):
    "P1"
    for name in "os.py", "chibishim.py", "sitecustomize.py", "struct.py":
        (tmp_path / name).write_text("import sys; sys.exit('injected')")
    shim = build(tmp_path / "shim", "--python", os.path.realpath(sys.executable))
    done = subprocess.run([str(shim), "--help"], cwd=tmp_path, stdout=subprocess.PIPE, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and b"usage:" in done.stdout


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("options", [(), ("--no-compile",)], ids=["compiled", "source"])
def test_a_container_runs_under_every_python_with_and_without_compiled_code(tmp_path, python, options):
    """Some have modules as files, which a container's process does not see."""
    shim = build(tmp_path / "shim", "--python", python, *(options or ("--compile-for", python)))
    done = subprocess.run([str(shim), "container", os.path.join(ROOT, "tests", "modules", "hello.wasm")], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, World!\n", b"")


def globals_of(code):
    """(names that a code object and those in it read, names that it defines)"""
    used, defined = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            used.add(instruction.argval)
        elif instruction.opname in ("STORE_NAME", "STORE_GLOBAL"):
            defined.add(instruction.argval)
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            inner, own = globals_of(constant)
            used |= inner - own         # a class's names are its own
    return used, defined


def test_each_part_of_the_code_has_all_the_names_that_it_uses():
    with open(os.path.join(ROOT, "chibishim.py"), "rb") as file:
        _, code, sizes = build_zipapp.compile_with(sys.executable, file.read())
    known, start = [], 0
    assert len(sizes) == 1 + len(build_zipapp.STAGES)
    for size, (_, after) in zip(sizes, (((), ()), *build_zipapp.STAGES)):
        used, defined = globals_of(marshal.loads(code[start:start + size]))
        known.append(defined)
        assert used - set(dir(builtins)).union({"__name__", "__file__", "load"}, defined, known[0], *(known[k] for k in after)) == set()
        start += size
    assert start == len(code)


def test_the_engine_and_its_native_tier_are_loaded_when_they_are_needed(shim):
    done = subprocess.run([str(shim), "run", "--tier=native", os.path.join(ROOT, "tests", "modules", "hello.wasm")], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"Hello, World!\n")


@pytest.mark.parametrize("words", [("run", os.path.join(ROOT, "tests", "modules", "hello.wasm")), ("-v",)], ids=["run", "-v"])
def test_the_python_half_of_os_is_not_imported(shim, words):
    """It takes longer than everything else between the start of Python and the guest."""
    done = subprocess.run([sys.executable, "-IS", "-X", "importtime", "-" + build_zipapp.COMMAND[:1], build_zipapp.COMMAND[1:], str(shim), *words],
                          capture_output=True)
    names = {line.rpartition(b"|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and b"posix" in names and not names & {b"os", b"posixpath", b"_collections_abc"}


def test_a_closed_stdout_leaves_the_exit_status_alone(shim):
    done = subprocess.run("exec %s run --invoke absent %s >&-" % (shim, os.path.join(ROOT, "tests", "modules", "hello.wasm")), shell=True,
                          stderr=subprocess.PIPE)
    assert done.returncode == 134 and b"Traceback" not in done.stderr


def test_the_interpreter_can_be_named(tmp_path):
    shim = build(tmp_path / "shim", "--python", "/opt/python/bin/python3", "--no-compile")
    assert shim.read_bytes().startswith(b"#!/opt/python/bin/python3 -IScimport ")


@pytest.mark.parametrize("old", [["/usr/bin/python3"], ["/usr/bin/python3", os.path.realpath(sys.executable)]], ids=["one", "both"])
def test_a_python_that_is_too_old_is_not_named_by_default(monkeypatch, old):
    """As the system's of Red Hat 9, which has later ones beside it."""
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words: run(["false"] if words[0] in old else words))
    if len(old) == 1:
        assert build_zipapp.default_python() == os.path.realpath(sys.executable)
    else:
        with pytest.raises(SystemExit, match="name one with --python"):
            build_zipapp.default_python()


def test_the_first_line_fits_every_kernel(tmp_path):
    """Linux before 5.1 cuts it after 127 bytes (execve(2)); a long name goes without the short cut."""
    for name in ("/opt/python3", "/opt/" + "long" * 10 + "/python3"):
        shim = build(tmp_path / "shim", "--python", name, "--no-compile")
        first = shim.read_bytes().partition(b"\n")[0] + b"\n"
        assert len(first) <= 127 and first.startswith(b"#!" + name.encode() + b" -IS")


def test_an_interpreter_that_is_named_must_be_there(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "build_zipapp.py"), "--output", str(tmp_path / "shim"),
                           "--compile-for", "/absent/python3"], stderr=subprocess.PIPE)
    assert done.returncode != 0 and b"/absent/python3" in done.stderr


def test_an_archive_that_finds_no_room_is_said_and_not_left(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "build_zipapp.py"), "--output", str(tmp_path / "shim"), "--no-compile"],
                          stderr=subprocess.PIPE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))
    assert done.returncode == 1 and done.stderr == b"build_zipapp: --output %s/shim: File too large\n" % bytes(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [["--python", "python3"], ["--python", "/a b/python3"], ["--compile-for", "/bin/true"],
                                     ["--output", "fifo"], ["--output", "/proc/shim"]], ids=" ".join)
def test_what_cannot_be_built_is_said_and_nothing_replaced(tmp_path, options):
    os.mkfifo(tmp_path / "fifo")
    done = subprocess.run([sys.executable, os.path.join(ROOT, "build_zipapp.py"), "--output", "shim", *options], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1) and options[1].encode() in done.stderr
    assert os.listdir(tmp_path) == ["fifo"] and not os.path.isfile(tmp_path / "fifo")
