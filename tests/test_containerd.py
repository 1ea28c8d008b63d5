"""The whole path: an unmodified containerd runs images through the built zipapp."""

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import threading
import time

import pytest

import containerd as peers
from archives import image_of
from conftest import until
from containerd import MODULES, PREFIX, RUNTIME, SHIM, Containerd

pytestmark = pytest.mark.skipif(peers.missing() is not None, reason="*** %s: NOTHING of containerd is tested" % peers.missing())

WASM = "local.test/guest:latest"
HELLO = "local.test/hello:latest"
NATIVE = "local.test/busybox:latest"


@contextlib.contextmanager
def running(**images):
    """A containerd that has these modules of ours: {name: reference}."""
    with tempfile.TemporaryDirectory(prefix="chibi", dir="/run") as directory:
        daemon = Containerd(directory)
        daemon.start()
        try:
            for name, reference in images.items():
                archive = os.path.join(directory, name + ".tar")
                subprocess.run([SHIM, "image", os.path.join(MODULES, name + ".wasm"), "-o", archive, "-t", reference], check=True)
                daemon.import_image(archive)
            yield daemon
        finally:
            daemon.clear()
            daemon.stop()
            subprocess.run("umount -l %s/*/*/*/* %s/*/*/* 2>/dev/null" % (directory, directory), shell=True)


@pytest.fixture(scope="module")
def daemon():
    with running(guest=WASM, hello=HELLO) as daemon:
        yield daemon


@pytest.fixture
def id(daemon, request):
    """A fresh container's name; afterwards nothing of any container is left."""
    yield PREFIX + "%d" % (time.time_ns() // 1000 % 10**9)
    daemon.clear()
    assert daemon.leftovers() == []


def start(daemon, id, *arguments, options=()):
    daemon.ctr("run", "-d", "--runtime", RUNTIME, *options, WASM, id, "/guest.wasm", *arguments, check=True)
    until(lambda: daemon.task_state(id) == "RUNNING")


def test_the_greeting(daemon, id):
    done = daemon.run(HELLO, id)
    assert (done.stdout, done.stderr, done.returncode) == (b"Hello, World!\n", b"", 0)


def test_the_status_of_proc_exit_arrives(daemon, id):
    assert daemon.run(WASM, id, "/guest.wasm", "exit").returncode == 7


def test_a_trap_is_134_with_a_backtrace_on_stderr(daemon, id):
    done = daemon.run(WASM, id, "/guest.wasm", "trap")
    assert done.returncode == 134
    assert b"unreachable" in done.stderr and done.stdout == b""


def test_stdout_and_stderr_are_apart(daemon, id):
    done = daemon.run(WASM, id, "/guest.wasm", "both")
    assert (done.stdout, done.stderr, done.returncode) == (b"ready\n", b"ready\n", 0)


def test_ten_mebibytes_of_output_arrive_whole(daemon, id):
    done = daemon.run(WASM, id, "/guest.wasm", "flood")
    assert done.stdout == bytes(range(256)) * 256 * 160


def test_stdin_reaches_the_guest_and_its_end_ends_it(daemon, id):
    ctr = daemon.popen("run", "--rm", "--runtime", RUNTIME, WASM, id, "/guest.wasm", "cat")
    until(lambda: daemon.task_state(id) == "RUNNING")     # ctr 1.6 loses an end that comes before Start
    ctr.stdin.write(b"one line\n" * 1000)
    output, _ = ctr.communicate(timeout=60)
    assert (output, ctr.returncode) == (b"one line\n" * 1000, 0)


@pytest.mark.parametrize("arguments", [("z",), ("spin",)], ids=["asleep", "in a hot loop"])
def test_term_ends_a_guest(daemon, id, arguments):
    ctr = daemon.popen("run", "--rm", "--runtime", RUNTIME, WASM, id, "/guest.wasm", *arguments)
    assert ctr.stdout.readline() == b"ready\n"
    daemon.ctr("task", "kill", "-s", "TERM", id, check=True)
    assert ctr.wait(60) == 128 + signal.SIGTERM


def test_a_detached_task_is_listed_killed_and_removed(daemon, id):
    start(daemon, id, "z")
    pid = daemon.task_pid(id)
    assert os.path.exists("/proc/%d" % pid)
    daemon.ctr("task", "kill", "-s", "KILL", id, check=True)
    until(lambda: daemon.task_state(id) == "STOPPED")
    removed = daemon.ctr("task", "rm", id)
    assert b"137" in removed.stderr
    assert not os.path.exists("/proc/%d" % pid)


def test_a_running_task_is_not_removed_without_force(daemon, id):
    start(daemon, id, "z")
    refused = daemon.ctr("task", "rm", id)
    assert refused.returncode and daemon.task_state(id) == "RUNNING"
    daemon.ctr("task", "delete", "-f", id)
    assert daemon.task_state(id) is None


@contextlib.contextmanager
def watching(daemon):
    """The lines of a client that hears every event from here on; they end after a minute."""
    watcher = daemon.popen("events")
    end = threading.Timer(60, watcher.kill)
    end.start()
    try:
        while not select.select([watcher.stdout], [], [], 0.1)[0]:
            daemon.ctr("namespaces", "label", "default", "heard=%d" % time.time_ns(), check=True)      # an event
        yield watcher.stdout
    finally:
        end.cancel()
        watcher.kill()
        watcher.communicate()


def topics_until(last, events):
    """The topics about tasks, up to that one."""
    topics = []
    while last not in topics:
        line = events.readline().decode()
        assert line, "%s, and no %s" % (topics, last)
        topics += [word for word in line.split() if word.startswith("/tasks/")]
    return topics


def test_events_come_in_order(daemon, id):
    "L1"
    with watching(daemon) as events:
        daemon.run(HELLO, id, check=True)
        topics = topics_until("/tasks/delete", events)
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


@pytest.mark.parametrize("program", ["/no/such", "/notes.txt"])
def test_an_exec_that_fails_to_start_never_exits(daemon, native, id, program):
    daemon.ctr("run", "-d", "--runtime", RUNTIME, NATIVE, id, "/bin/busybox", "sleep", "1000", check=True)
    with watching(daemon) as events:
        assert daemon.ctr("task", "exec", "--exec-id", "x1", id, program).returncode
        daemon.ctr("task", "delete", "-f", id)
        topics = topics_until("/tasks/delete", events)
    assert topics == ["/tasks/exec-added", "/tasks/exit", "/tasks/delete"]         # the exit is init's


def test_a_childs_death_for_want_of_memory_is_an_event_while_init_lives(daemon, native, id):
    "L8"
    with watching(daemon) as events:
        daemon.ctr("run", "-d", "--runtime", RUNTIME, "--memory-limit", "33554432", NATIVE, id, "/bin/busybox", "sh", "-c",
                   "busybox tail /dev/zero; busybox sleep 1000", check=True)
        assert "/tasks/exit" not in topics_until("/tasks/oom", events)
        assert daemon.task_state(id) == "RUNNING"


def test_metrics_tell_of_memory_and_processes(daemon, id):
    start(daemon, id, "z")
    text = daemon.ctr("task", "metrics", id, check=True).stdout.decode()
    values = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) == 2)
    assert int(values.get("memory.usage_in_bytes", values.get("memory.usage", 0))) > 100_000
    assert int(values["pids.current"]) == 1


def test_a_paused_guest_does_not_run(daemon, id):
    start(daemon, id, "spin")
    pid = daemon.task_pid(id)
    daemon.ctr("task", "pause", id, check=True)
    assert daemon.task_state(id) == "PAUSED"
    before = cpu_ticks(pid)
    time.sleep(0.3)
    assert cpu_ticks(pid) == before
    daemon.ctr("task", "resume", id, check=True)
    until(lambda: cpu_ticks(pid) > before)


def cpu_ticks(pid):
    with open("/proc/%d/stat" % pid) as file:
        return int(file.read().rsplit(") ", 1)[1].split()[11])


def test_a_missing_program_is_an_error_that_names_it(daemon, native, id):
    done = daemon.run(NATIVE, id, "/no/such")
    assert done.returncode and b"/no/such" in done.stderr


def test_a_file_that_is_no_program_is_an_error_that_names_it(daemon, native, id):
    done = daemon.run(NATIVE, id, "/notes.txt")
    assert done.returncode and b"/notes.txt" in done.stderr


def test_a_killed_shim_leaves_nothing(daemon, id):
    "L4"
    start(daemon, id, "z")
    pid = daemon.task_pid(id)
    for shim in set(daemon.shims()) - {pid}:
        os.kill(shim, signal.SIGKILL)
    until(lambda: daemon.task_state(id) in (None, "STOPPED", "UNKNOWN"))
    until(lambda: not os.path.exists("/proc/%d" % pid))
    daemon.clear()


def test_a_restarted_containerd_finds_the_task(daemon, id):
    "L9"
    start(daemon, id, "z")
    pid = daemon.task_pid(id)
    daemon.stop()
    assert os.path.exists("/proc/%d" % pid)
    daemon.start()
    until(lambda: daemon.task_state(id) == "RUNNING")
    assert daemon.task_pid(id) == pid
    daemon.ctr("task", "kill", id, check=True)
    until(lambda: daemon.task_state(id) == "STOPPED")


def test_a_task_that_ended_while_containerd_was_away_is_stopped(daemon, id):
    "L9"
    start(daemon, id, "z")
    pid = daemon.task_pid(id)
    daemon.stop()
    os.kill(pid, signal.SIGKILL)
    daemon.start()
    until(lambda: daemon.task_state(id) == "STOPPED")


def test_a_hundred_runs_leave_nothing(daemon, id):
    "L5"
    for number in range(100):
        done = daemon.run(HELLO, "%s-%d" % (id, number))
        assert (done.stdout, done.returncode) == (b"Hello, World!\n", 0), done.stderr


def test_twenty_at_once_leave_nothing(daemon, id):
    "L5"
    results = []

    def run(number):
        results.append(daemon.run(HELLO, "%s-%d" % (id, number)))
    threads = [threading.Thread(target=run, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(done.stdout, done.returncode) for done in results] == [(b"Hello, World!\n", 0)] * 20


@pytest.fixture
def grouping(monkeypatch):
    """A containerd whose containers share one shim."""
    monkeypatch.setenv("CHIBISHIM_GROUP", "all")
    with running(guest=WASM) as daemon:
        yield daemon


def test_containers_that_come_and_go_in_one_shim(grouping):
    """None meets a shim that is about to end."""
    bad = []

    def come_and_go(worker):
        for i in range(12):
            done = grouping.run(WASM, "%s%d-%d" % (PREFIX, worker, i), "/guest.wasm", "both")
            if (done.returncode, done.stdout) != (0, b"ready\n"):
                bad.append(done.stderr)
    threads = [threading.Thread(target=come_and_go, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bad == []
    assert grouping.leftovers() == []


def test_a_shared_shim_outlives_the_first_container_and_ends_with_the_last(grouping):
    ids = [PREFIX + name for name in ("a", "b", "c")]
    for id in ids:
        start(grouping, id, "z")
    guests = {id: grouping.task_pid(id) for id in ids}
    (shim,) = set(grouping.shims()) - set(guests.values())
    grouping.ctr("task", "delete", "-f", ids[0], check=True)
    grouping.stop()
    grouping.start()
    assert [grouping.task_state(id) for id in ids[1:]] == ["RUNNING", "RUNNING"]
    assert set(grouping.shims()) == {shim, guests[ids[1]], guests[ids[2]]}
    os.kill(shim, signal.SIGKILL)
    until(lambda: not grouping.shims())
    grouping.clear()
    assert grouping.leftovers() == []


def test_limits_of_ctr_reach_the_cgroup(daemon, id):
    "N10"
    start(daemon, id, "z", options=("--memory-limit", "67108864"))
    with open("/proc/%d/cgroup" % daemon.task_pid(id)) as file:
        groups = dict(line.strip().split(":")[1:] for line in file)
    if "memory" in groups:
        path = "/sys/fs/cgroup/memory%s/memory.limit_in_bytes" % groups["memory"]
    else:
        path = "/sys/fs/cgroup%s/memory.max" % groups[""]
    with open(path) as file:
        assert int(file.read()) == 67108864


@pytest.fixture(scope="module")
def native(daemon):
    if not os.path.exists("/bin/busybox"):
        pytest.skip("busybox (Debian package busybox-static) is not installed")
    with open("/bin/busybox", "rb") as file:
        program = file.read()
    archive = os.path.join(daemon.directory, "busybox.tar")
    image_of({"bin/sh": program, "bin/busybox": program, "notes.txt": b"no program"}, [], NATIVE, archive)
    daemon.import_image(archive)
    return lambda id, text, **more: daemon.run(NATIVE, id, "/bin/busybox", "sh", "-c", text, **more)


def test_a_native_program_runs_by_its_content(native, id):
    done = native(id, "echo native; exit 3")
    assert (done.stdout, done.returncode) == (b"native\n", 3), done.stderr


def test_containerds_default_profile_holds_and_everything_works(daemon, native, id):
    "N6"
    done = native(id, "busybox grep Seccomp: /proc/self/status; busybox unshare -U busybox true; busybox true", options=["--seccomp"])
    assert (done.stdout, done.returncode) == (b"Seccomp:\t2\n", 0)
    assert b"not permitted" in done.stderr
    done = daemon.run(HELLO, id, options=["--seccomp"])
    assert (done.stdout, done.stderr, done.returncode) == (b"Hello, World!\n", b"", 0)


def test_a_native_program_sees_its_own_namespaces(native, id):
    "N1, N5, N6"
    done = native(id, "busybox ps | busybox wc -l; busybox hostname; busybox cat /proc/self/status")
    text = done.stdout.decode()
    assert "NoNewPrivs:\t1" in text and "CapEff:\t00000000a80425fb" in text, done.stderr


def test_exec_runs_another_program_in_the_container(daemon, native, id):
    daemon.ctr("run", "-d", "--runtime", RUNTIME, NATIVE, id, "/bin/busybox", "sleep", "1000", check=True)
    until(lambda: daemon.task_state(id) == "RUNNING")
    done = daemon.ctr("task", "exec", "--exec-id", "x1", id, "/bin/busybox", "sh", "-c", "echo inside; exit 5")
    assert (done.stdout, done.returncode) == (b"inside\n", 5), done.stderr


def test_exec_runs_a_module_in_the_container(daemon, id):
    start(daemon, id, "z")
    done = daemon.ctr("task", "exec", "--exec-id", "x1", id, "/guest.wasm", "both")
    assert (done.stdout, done.stderr, done.returncode) == (b"ready\n", b"ready\n", 0)


def in_terminal(daemon, *words, rows=24, columns=80):
    """Runs ctr in a terminal of that size; (what it printed, exit status)."""
    import fcntl
    import pty
    import struct
    import termios
    pid, master = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))
        os.execvp("ctr", ["ctr", "-a", daemon.address, *words])
    text = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        text += data
    os.close(master)
    return text, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_terminal_is_one(daemon, native, id):
    text, status = in_terminal(daemon, "run", "--rm", "-t", "--runtime", RUNTIME, NATIVE, id,
                               "/bin/busybox", "sh", "-c", "test -t 0 && test -t 1 && echo a terminal; exit 4")
    assert b"a terminal\r" in text and status == 4


def test_a_terminal_has_a_name_inside_and_is_the_console(daemon, native, id):
    text, status = in_terminal(daemon, "run", "--rm", "-t", "--runtime", RUNTIME, NATIVE, id, "/bin/busybox", "sh", "-c",
                               "busybox tty; busybox stat -c %t:%T /dev/console $(busybox tty); echo to the console > /dev/console")
    words = text.split()
    assert status == 0 and words[0] == b"/dev/pts/0" and words[1] == words[2] and b"to the console" in text, text


def test_an_exec_has_a_terminal_of_the_containers(daemon, native, id):
    daemon.ctr("run", "-d", "--runtime", RUNTIME, NATIVE, id, "/bin/busybox", "sleep", "1000", check=True)
    text, status = in_terminal(daemon, "task", "exec", "-t", "--exec-id", "x1", id, "/bin/busybox", "sh", "-c",
                               "busybox tty; for i in $(busybox seq 600); do busybox stty size 2>&- && break; busybox sleep 0.1; done",
                               rows=33, columns=101)     # ctr tells of the size when the exec has been started
    assert (text.split(), status) == ([b"/dev/pts/0", b"33", b"101"], 0)
