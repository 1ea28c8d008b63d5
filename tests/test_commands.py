"""Chapters 24 and 25: what people's commands say, the status they end with, and that they leave nothing."""

import errno
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import pytest

from conftest import ROOT, until

SHIM = [os.path.join(ROOT, "dist", "containerd-shim-chibiwasm-v1")]
MODULES = os.path.join(ROOT, "tests", "modules")
HELLO = os.path.join(MODULES, "hello.wasm")
GUEST = os.path.join(MODULES, "guest.wasm")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="not root: a container needs it here")


def run(*words, **options):
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
    return subprocess.run(SHIM + [word if isinstance(word, bytes) else str(word) for word in words], **options)


def complaint(done, status):
    """The one line on stderr of a command that ended with the status and printed nothing."""
    assert (done.returncode, done.stdout or b"", done.stderr.count(b"\n")) == (status, b"", 1), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def directories():
    """Names that are on no process's command line in the end; a shim offers its events for three seconds."""
    names = []
    yield names
    deadline = time.monotonic() + 60
    while (left := [pid for name in names for pid in running(name)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.fixture
def scratch(monkeypatch, directories):
    """The directory for temporary files, which is empty afterwards; its name is short, for a socket is made in it."""
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as directory:
        directories.append(directory)
        monkeypatch.setenv("TMPDIR", directory)
        yield directory
        assert os.listdir(directory) == []


def running(word):
    """The processes with the word on their command lines."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as file:
                if word.encode() in file.read():
                    found.append(int(path.split("/")[2]))
        except OSError:
            pass
    return found


# -- standard streams --

PRINTING = [["--help"], ["-v"], ["inspect", HELLO], ["inspect", "--disassemble", HELLO]]


@pytest.mark.parametrize("words", [["help"], ["-h"], ["run", "-h"], ["image", "--help"]], ids=" ".join)
def test_help_is_had_by_every_usual_word(words):
    assert run(*words).stdout == run("--help").stdout


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_a_closed_or_full_stdout_is_said(words):
    for options in {"preexec_fn": lambda: os.close(1)}, {"stdout": open("/dev/full", "wb")}:
        assert b": standard output: " in complaint(run(*words, **options), 1)


def closed_pipe():
    """The write end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_a_closed_pipe_ends_it_as_a_program_of_c(words):
    done = run(*words, stdout=closed_pipe())
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


@needs_root
def test_a_container_whose_output_nobody_reads_ends(scratch):
    with subprocess.Popen(SHIM + ["container", GUEST, "flood"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as command:
        command.stdout.read(1)
        command.stdout.close()
        assert command.wait(60) == 128 + signal.SIGPIPE


@needs_root
@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_a_slow_reader_gets_all_of_a_container_s_output(scratch, blocking):
    """What did not fit at once was lost, where the shell had left standard output non-blocking."""
    read, write = os.pipe()
    os.set_blocking(write, blocking)
    with subprocess.Popen(SHIM + ["container", GUEST, "flood"], stdin=subprocess.DEVNULL, stdout=write) as command:
        os.close(write)
        time.sleep(2)
        with open(read, "rb") as output:
            assert output.read() == bytes(range(256)) * 256 * 160
        assert command.wait(60) == 0


@needs_root
@pytest.mark.parametrize("stream, name", [("stdout", b"standard output"), ("stderr", b"standard error")])
def test_a_container_whose_output_is_lost_fails(scratch, stream, name):
    words = [*SHIM, "container", GUEST, "both"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, timeout=60, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full})
    assert done.returncode == 1
    if stream == "stdout":
        assert done.stderr.endswith(b": %s: No space left on device\n" % name)


@needs_root
def test_a_container_without_standard_streams(scratch):
    assert run("container", HELLO, preexec_fn=lambda: os.close(0)).stdout == b"Hello, World!\n"
    assert run("container", GUEST, "exit", preexec_fn=lambda: os.closerange(0, 3)).returncode == 7


# -- a container leaves nothing --

@needs_root
def test_a_container_leaves_no_cgroup(scratch):
    groups = lambda: set(glob.glob("/sys/fs/cgroup/chibishim*") + glob.glob("/sys/fs/cgroup/*/chibishim*"))
    before = groups()
    with subprocess.Popen(SHIM + ["container", GUEST, "z"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as command:
        assert command.stdout.read(6) == b"ready\n" and groups() > before
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 143
    assert groups() <= before


@needs_root
def test_a_container_that_cannot_be_created_leaves_no_shim(scratch, tmp_path):
    """For a mount's place is taken by the module."""
    (tmp_path / "proc").write_bytes(open(HELLO, "rb").read())
    assert b"proc" in complaint(run("container", tmp_path / "proc"), 1)


@pytest.fixture
def here(scratch, monkeypatch):
    """The module, whose containers are made by this process."""
    import chibishim
    monkeypatch.setattr(sys, "argv", [os.path.join(ROOT, "chibishim.py")])
    monkeypatch.setattr(tempfile, "tempdir", scratch)
    monkeypatch.setattr(chibishim, "catch_signals", lambda: os.pipe()[0])     # pytest has its own
    return chibishim


@needs_root
def test_a_shim_that_has_ended_is_missed_by_name(here, monkeypatch):
    started = here.Driver.shim

    def start_and_kill(driver, action, data=b""):
        printed = started(driver, action, data)
        for pid in running(driver.scratch) if action == "start" else ():
            os.kill(pid, signal.SIGKILL)
        until(lambda: action == "delete" or not running(driver.scratch))
        return printed
    monkeypatch.setattr(here.Driver, "shim", start_and_kill)
    with pytest.raises(here.ContainerError, match=r"^the shim at /\S+: "):
        here.command_container([HELLO])


@needs_root
def test_a_program_that_cannot_be_executed_leaves_no_shim(here, monkeypatch):
    """Start is refused, of a container that has been created."""
    monkeypatch.setattr(here, "read_module", lambda path: b"neither a module nor a program")
    with pytest.raises(here.ContainerError, match="exec format error"):
        here.command_container([HELLO])


@needs_root
def test_a_guest_may_end_before_its_input_is_copied(here, monkeypatch):
    spawn = here.Loop.spawn

    def late(generator):
        time.sleep(0.5)
        yield from generator
    monkeypatch.setattr(here.Loop, "spawn", lambda loop, task: spawn(loop, late(task) if task.__name__ == "copy_in" else task))
    assert here.command_container([GUEST, "exit"]) == 7


def interrupted(scratch, delay, send):
    """(exit status, stderr) of a container with a sleeper that `send` is called for, so long after its command
    began to leave things."""
    command = subprocess.Popen(SHIM + ["container", GUEST, "z"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    while not os.listdir(scratch):
        assert command.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    send(command.pid)
    _, error = command.communicate(timeout=60)
    return command.returncode, error


@needs_root
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGALRM])
def test_a_signal_ends_the_guest_whenever_it_comes(scratch, number):
    for delay in 0, 0.01, 0.02, 0.04, 0.08, 0.16:
        assert interrupted(scratch, delay, lambda pid: os.kill(pid, number)) == (128 + number, b""), delay


@needs_root
def test_a_terminal_s_ctrl_c_is_the_guest_s(scratch):
    """It reaches every process of the foreground group; the shim's commands must not be among them."""
    for delay in 0, 0.01, 0.02, 0.04, 0.08, 0.16:
        assert interrupted(scratch, delay, lambda pid: os.killpg(pid, signal.SIGINT)) == (130, b""), delay


@needs_root
def test_a_command_of_the_shim_that_ctrl_c_hits_is_run_again(here, monkeypatch):
    """Until it has a session of its own it belongs to the terminal's foreground group."""
    words, run = [], subprocess.run

    def run_hit(command, **options):
        words.append(command[-1])
        return run(["sh", "-c", "kill -INT $$"] if len(words) % 2 else command, **options)
    monkeypatch.setattr(subprocess, "run", run_hit)
    assert here.command_container([GUEST, "exit"]) == 7
    assert words == ["start", "start", "delete", "delete"]


@needs_root
def test_a_signal_that_was_ignored_stays_so(scratch):
    """nohup(1)."""
    with subprocess.Popen(SHIM + ["container", GUEST, "z"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as command:
        assert command.stdout.read(6) == b"ready\n"
        command.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert command.poll() is None
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 143


@needs_root
def test_a_directory_for_temporary_files_that_is_too_long_for_a_socket_is_said(scratch, tmp_path):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    assert b"TMPDIR" in complaint(run("container", HELLO, env={"TMPDIR": str(long)}), 1)
    assert os.listdir(long) == []


@needs_root
def test_a_relative_directory_for_temporary_files_is_as_good(scratch):
    done = run("container", HELLO, cwd=scratch, env={"TMPDIR": "."})
    assert (done.stdout, done.stderr) == (b"Hello, World!\n", b"")


@needs_root
def test_a_container_that_finds_no_place_says_where(scratch):
    """An error of the system's names the file."""
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro none /sys/fs/cgroup && exec "$@"', "sh"]
    done = subprocess.run([*hidden, *SHIM, "container", HELLO], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=60)
    assert b"/sys/fs/cgroup" in complaint(done, 1)


@needs_root
def test_a_container_of_an_ordinary_user_who_is_root_of_a_user_namespace(scratch):
    """As in a rootless container: the cgroups are there, and are others'. Where he can read: ROOT may be in root's home."""
    os.chmod(scratch, 0o777)
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-r",
                 shutil.copy(*SHIM, place), "container", shutil.copy(HELLO, place)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, World!\n", b"")


@pytest.mark.parametrize("step", ["unshare", "write_text", "mount"])
def test_a_user_without_user_namespaces_hears_what_to_do(monkeypatch, step):
    """Some systems refuse one, some to do anything in it."""
    import chibishim

    def refuse(*words):
        raise OSError(errno.EPERM, "refused")
    for name in "write_text", "mount":
        monkeypatch.setattr(chibishim, name, refuse if name == step else lambda *words: None)
    monkeypatch.setattr(chibishim.libc, "unshare", refuse if step == "unshare" else lambda flags: 0, raising=False)
    with pytest.raises(chibishim.ContainerError, match=r"user namespace.*not permitted.*run as root.*apparmor_restrict"):
        chibishim.enter_user_namespace()


# -- arguments --

@pytest.mark.parametrize("words, message", [
    (["--env", "NAME"], b"--env NAME: write it as NAME=VALUE"), (["--env", "=x"], b"--env =x: write it as NAME=VALUE"),
    (["--dir", "/etc::/x::rw"], b"HOST::GUEST::ro"), (["--bogus"], b"--bogus"), (["--dir"], b"--dir takes a value")])
def test_options_that_make_no_sense_are_refused(words, message):
    for command in "run", "container":
        assert message in complaint(run(command, *words, *([HELLO] if words != ["--dir"] else [])), 2)


@pytest.mark.parametrize("value", ["/etc::x", "."])
def test_a_container_s_directory_has_an_absolute_place(value):
    assert b"HOST::/GUEST" in complaint(run("container", "--dir", value, HELLO), 2)


def test_a_container_s_directory_has_to_be_there():
    assert b"/absent: No such file" in complaint(run("container", "--dir", "/absent::/x", HELLO), 1)


@pytest.mark.parametrize("limits", [["--timeout=1e17"], ["--fuel=999999999999999999999"]])
def test_bounds_that_no_timer_has_are_refused(limits):
    assert b"below" in complaint(run("run", *limits, HELLO), 2)


@needs_root
@pytest.mark.parametrize("suffix, allowed", [("", True), ("::ro", False)])
def test_a_container_s_directory_can_be_read_only(wat, scratch, tmp_path, suffix, allowed):
    """The guest makes a directory in its first preopen but the root, or ends with the error number."""
    (tmp_path / "m.wasm").write_bytes(wat(MKDIR))
    (tmp_path / "d").mkdir()
    done = run("container", "--dir", "%s::/d%s" % (tmp_path / "d", suffix), tmp_path / "m.wasm")
    assert (done.returncode == 0, os.listdir(tmp_path / "d") == ["n"]) == (allowed, allowed), done


MKDIR = """(module (import "wasi_snapshot_preview1" "path_create_directory" (func $make (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory (export "memory") 1) (data (i32.const 0) "d/n")
  (func (export "_start") (call $exit (call $make (i32.const 3) (i32.const 0) (i32.const 3)))))"""

NOT_UTF8 = b"n\xff.wasm"


def test_what_is_no_utf8_goes_into_no_configuration(tmp_path):
    """JSON is Unicode; as a process of its own the guest gets the bytes."""
    path = os.path.join(os.fsencode(tmp_path), NOT_UTF8)
    with open(HELLO, "rb") as source, open(path, "wb") as file:
        file.write(source.read())
    assert run("run", path, b"\xff").stdout == b"Hello, World!\n"
    for words in ["container", path], ["container", HELLO, b"\xff"], ["image", path, "-o", tmp_path / "o"]:
        assert b"UTF-8" in complaint(run(*words), 2)


def test_too_little_memory_is_said():
    """Which limit is enough for the start of Python and no more depends on the Python and on its C library."""
    said = []
    for kibibytes in range(12000, 28000, 2000):
        done = subprocess.run(["sh", "-c", 'ulimit -v %d; exec "$@"' % kibibytes, "sh", *SHIM, "container", HELLO], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60)
        if b"not enough memory" in done.stderr:
            said.append((done.returncode, done.stdout, b"Traceback" in done.stderr))    # a shim that found none is missed by the command
    assert set(said) == {(1, b"", False)}


@pytest.mark.parametrize("words", [["run", HELLO], ["container", HELLO], ["inspect", HELLO], ["-v"]], ids=lambda words: words[0])
def test_a_tier_that_there_is_not_is_said(words):
    """A misspelt one is no other one: it would compile everything at once."""
    for value in "Native", " auto", "x":
        assert b"CHIBISHIM_TIER" in complaint(run(*words, env=dict(os.environ, CHIBISHIM_TIER=value)), 2)
    assert run("run", HELLO, env=dict(os.environ, CHIBISHIM_TIER="")).returncode == 0
    assert b"--tier" in complaint(run("run", "--tier=", HELLO), 2)


# -- modules and images --

@pytest.mark.parametrize("path, status, message", [
    ("/dev/zero", 1, b"/dev/zero: is a device"), ("/", 1, b"/: is a directory"), ("/absent", 1, b"/absent: No such file"),
    (sys.executable, 1, b"native program"), (os.path.join(MODULES, "hello.wat"), 1, b"wat2wasm")])
def test_what_is_no_module_gets_neither_image_nor_container(scratch, path, status, message):
    assert message in complaint(run("container", path), status)
    assert message in complaint(run("image", path, "-o", scratch + "/o"), status)


def test_a_module_that_is_cut_gets_no_image(tmp_path):
    with open(HELLO, "rb") as file:
        (tmp_path / "cut.wasm").write_bytes(file.read(60))
    assert b"cut.wasm: malformed" in complaint(run("image", tmp_path / "cut.wasm", "-o", tmp_path / "o"), 2)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("platform", ["x", "/", "wasi/", "/wasm"])
def test_a_platform_has_two_parts(tmp_path, platform):
    assert b"OS/ARCH" in complaint(run("image", HELLO, "-o", tmp_path / "o", "--platform", platform), 2)


def test_an_image_that_finds_no_room_is_said():
    assert b"/dev/full: No space left" in complaint(run("image", HELLO, "-o", "/dev/full"), 1)


@needs_root
def test_half_an_image_is_not_left(tmp_path):
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=4k none "$0" && "$@"; status=$?; ls "$0"; exit $status', tmp_path]
    done = subprocess.run([*small, *SHIM, "image", HELLO, "-o", tmp_path / "o"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert b"/o: No space left" in complaint(done, 1)


@pytest.mark.parametrize("reference, tag", [
    ("hello", None), ("a/b", None), ("a/b:1.0_x", "1.0_x"), ("localhost:5000/a", None), ("[::1]:5000/a/b:1", "1"),
    ("Example.org/a--b__c.d:T", "T"), ("a@sha256:" + "0" * 64, None)])
def test_an_image_s_name_is_kept(tmp_path, reference, tag):
    """And its tag, as OCI's annotations have it; a registry's port is none."""
    assert run("image", HELLO, "-o", tmp_path / "o", "-t", reference).returncode == 0
    with tarfile.open(tmp_path / "o") as image:
        annotations = json.load(image.extractfile("index.json"))["manifests"][0]["annotations"]
    assert annotations == {"io.containerd.image.name": reference, **({"org.opencontainers.image.ref.name": tag} if tag else {})}


@pytest.mark.parametrize("reference", ["", "a b", "A", "a/B:1", "a:", "/a", "a//b", "a:b:c", "\u00e9", "-a", "a-"])
def test_an_image_s_name_that_nobody_takes_is_refused(tmp_path, reference):
    """containerd would import one, or without a word nothing, that Kubernetes and Docker cannot name."""
    assert b"-t NAME:TAG" in complaint(run("image", HELLO, "-o", tmp_path / "o", "-t", reference), 2)


@pytest.mark.parametrize("module, name", [("Hello.WASM", "hello"), ("a.b.wasm", "a.b"), ("prog", "prog"), (".wasm", None), ("a b.wasm", None)])
def test_an_image_is_named_after_its_module(tmp_path, module, name):
    with open(HELLO, "rb") as file:
        (tmp_path / module).write_bytes(file.read())
    done = run("image", tmp_path / module, "-o", tmp_path / "o")
    if name is None:
        assert b"-t NAME:TAG" in complaint(done, 2)
    else:
        with tarfile.open(tmp_path / "o") as image:
            assert b'"io.containerd.image.name": "docker.io/library/%s:latest"' % name.encode() in image.extractfile("index.json").read()


@pytest.mark.parametrize("name", ["n" * 200 + ".wasm", "\u00e9.wasm"])
def test_an_image_of_a_module_with_any_name(tmp_path, name):
    with open(HELLO, "rb") as file:
        (tmp_path / name).write_bytes(file.read())
    assert run("image", tmp_path / name, "-o", tmp_path / "o", "-t", "hello").returncode == 0
    with tarfile.open(tmp_path / "o") as image:
        layers = [image.extractfile(member) for member in image.getmembers() if member.name.startswith("blobs/")]
        assert [name] in [tarfile.open(fileobj=layer).getnames() for layer in layers if layer.read(1) != b"{" and not layer.seek(0)]
