"""Chapters 22 and 23: what security.md asks of the socket (T), a task's life (L) and the process (P), through a real shim."""

import errno
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import sys
import threading
import time

import pytest

import chibishim
from bundles import Bundle, logger_of, needs_busybox, process_of
from chibishim import RpcError, decode, encode
from conftest import ROOT, until
from containerd import MODULES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="*** not root: NOTHING of a task's life is tested")


class Containerd:
    """The end of containerd that takes events, at the address that a Bundle's shim was told."""

    def __init__(self, directory, answer=lambda topic: None):
        self.path = directory + "/none.ttrpc"
        self.answer = answer            # topic -> None, or (code, message) to refuse the event
        self.events = []                # (topic, decoded message)
        self.listener = None
        self.answering = threading.Lock()       # an event and its answer are one: without it, the shim would send the event again

    def start(self):
        if os.path.exists(self.path):
            os.unlink(self.path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.peers = []
        threading.Thread(target=self.serve, args=(self.listener,), daemon=True).start()
        return self

    def stop(self):
        """As a daemon that ends: nobody listens, every connection is closed; its socket's file stays."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self.answering:
            for peer in self.peers:
                try:
                    peer.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass                # the shim was first

    def serve(self, listener):
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            self.peers.append(peer)
            threading.Thread(target=self.converse, args=(peer,), daemon=True).start()

    def converse(self, peer):
        protocol = chibishim.ServerProtocol()
        with peer:
            while data := peer.recv(65536):
                for stream, service, method, payload in protocol.receive(data)[0]:
                    assert (service, method) == ("containerd.services.events.ttrpc.v1.Events", "Forward")
                    envelope = decode("ForwardRequest", payload)["envelope"]
                    refusal = self.answer(envelope["topic"])
                    with self.answering:
                        if not refusal:
                            name = envelope["event"]["type_url"].rpartition(".")[2]
                            self.events.append((envelope["topic"], decode(name, envelope["event"]["value"])))
                        try:
                            peer.sendall(chibishim.error_frame(stream, *refusal) if refusal else chibishim.response_frame(stream, b""))
                        except BrokenPipeError:
                            return          # a shim that was killed

    def topics(self, id=None):
        """What was heard, of one container or all: the last word of each topic; of an exec with its id."""
        return [" ".join(filter(None, [topic.rpartition("/")[2], exec_of(event)])) for topic, event in list(self.events)
                if id in (None, event["container_id"])]


def exec_of(event):
    """The exec id in an event; "" if it is init's."""
    id = event.get("exec_id") or event.get("id") or ""
    return "" if id == event["container_id"] else id


def codes_of(bundle, method, message):
    """The status codes of two calls at once."""
    for _ in range(2):
        bundle.send(method, dict(message, id=bundle.id))
    codes = []
    for _, body in (bundle.receive() for _ in range(2)):
        codes.append((decode("Response", body)["status"] or {"code": chibishim.OK})["code"])
    return sorted(codes)


def descriptors(pid):
    return {int(name) for name in os.listdir("/proc/%d/fd" % pid)}


def time_of(pid):
    """The seconds of processor time that a process has used."""
    fields = chibishim.read_text("/proc/%d/stat" % pid).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def heard(bundle, monkeypatch):
    """A bundle's events, as containerd gets them."""
    monkeypatch.delenv("TTRPC_ADDRESS", raising=False)
    containerd = Containerd(bundle.directory).start()
    yield containerd
    containerd.stop()


def joined(bundle):
    """A second container in the same shim, created."""
    second = Bundle(bundle.directory)
    second.command("delete")            # writes its configuration
    second.peer, second.reader, second.answers = socket.socket(socket.AF_UNIX), chibishim.FrameReader(), []
    second.stream = -1
    second.peer.settimeout(60)
    second.peer.connect(bundle.peer.getpeername())
    second.create()
    return second


# -- T: the socket --

def test_the_socket_is_a_file_of_its_owner_alone(bundle, tmp_path):
    "T6"
    path = bundle.start().peer.getpeername()
    assert path.startswith("/") and os.stat(path).st_mode & 0o777 == 0o600
    chibishim.listen(str(tmp_path / "s" / "socket"), "x").close()
    assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o700


def test_another_user_is_not_answered(bundle):
    "T6: even where the file's mode would let him"
    path = bundle.start().peer.getpeername()
    os.chmod(bundle.directory, 0o711)
    os.chmod(path, 0o666)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setuid(65534)
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(10)
            peer.connect(path)
            peer.sendall(chibishim.request_frame(1, "containerd.task.v2.Task", "Connect", b""))
            os.write(write, b"got %r" % peer.recv(100))
        except OSError as error:
            os.write(write, b"got b''" if error.errno in (errno.EPIPE, errno.ECONNRESET) else repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1000) == b"got b''"
    os.close(read)
    os.waitpid(pid, 0)
    bundle.fails(chibishim.NOT_FOUND, "State")


@pytest.fixture
def grouped(bundle, monkeypatch):
    """Containers of the environment's group: [the first, the second]; the first is created and deleted."""
    monkeypatch.setenv("CHIBISHIM_GROUP", "all")
    bundle.start().create()
    bundle.call("Delete")
    return bundle, Bundle(bundle.directory)


def test_containers_share_the_shim_of_the_environments_group(grouped):
    first, second = grouped
    assert second.start().peer.getpeername() == first.peer.getpeername()
    pod = Bundle(first.directory)
    pod.config["annotations"] = {"io.kubernetes.cri.sandbox-id": pod.id}
    assert pod.start().peer.getpeername() != first.peer.getpeername()
    pod.call("Shutdown")


@pytest.mark.parametrize("group", ["a b", "a/b", "..", "\udcff", "x" * 5000])
def test_a_group_whose_name_is_none_is_refused(bundle, monkeypatch, group):
    """".." would be other namespaces' too. `delete` goes on, for what was made before."""
    monkeypatch.setenv("CHIBISHIM_GROUP", group)
    done = bundle.command("start")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1) and b"CHIBISHIM_GROUP" in done.stderr
    assert bundle.command("delete").returncode == 0


@pytest.mark.parametrize("annotations", ["x", ["x"], {chibishim.GROUP_ANNOTATIONS[0]: 7}, {chibishim.GROUP_ANNOTATIONS[0]: ["x"]},
                                         {chibishim.GROUP_ANNOTATIONS[0]: "\ud800"}])
def test_start_survives_annotations_that_are_none(bundle, annotations):
    bundle.config["annotations"] = annotations
    bundle.start().call("Shutdown")


def test_a_shim_waits_for_the_container_whose_start_has_found_it(grouped):
    first, second = grouped
    second.start()
    first.call("Shutdown")
    assert second.create()
    second.call("Delete")


def test_a_shim_waits_for_the_container_that_it_was_started_for(bundle, monkeypatch):
    """Another one may come and go before."""
    monkeypatch.setenv("CHIBISHIM_GROUP", "all")
    second = Bundle(bundle.directory)
    bundle.start()
    second.start().create()
    second.call("Delete")
    second.call("Shutdown")
    assert bundle.create()
    bundle.call("Delete")


def test_a_shim_does_not_wait_for_a_container_that_was_given_up(grouped):
    first, second = grouped
    second.start().call("Shutdown")
    until(lambda: not first.processes())


def test_a_start_that_comes_too_late_makes_a_shim_of_its_own(grouped):
    first, second = grouped
    before = first.processes()
    first.call("Shutdown")
    second.start().create()
    until(lambda: not set(before) & set(second.processes()))        # it tries for a while to get its events delivered
    second.call("Delete")
    second.call("Shutdown")


def test_a_shim_does_not_wait_for_ever(monkeypatch):
    service = chibishim.TaskService(None, None, "test")
    with pytest.raises(StopIteration):
        next(service.Expect({"id": "never"}))
    service.Shutdown({"id": "other"})
    assert not service.stop
    later = time.monotonic() + chibishim.EXPECT_S
    monkeypatch.setattr(chibishim.time, "monotonic", lambda: later)
    service.Shutdown({"id": "other"})
    assert service.stop


def test_a_shim_without_a_container_to_expect_ends_soon(grouped):
    first, second = grouped
    shutil.rmtree(first.path)
    until(lambda: not first.processes())
    assert not os.path.exists(first.peer.getpeername())
    os.mkdir(first.path)


def test_a_daemon_outlives_its_bundle_from_the_first_step_on(tmp_path, monkeypatch):
    "L5: one that ends before it is up leaves its socket"
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(chibishim.os, "setsid", bundle.rmdir)
    monkeypatch.setattr(chibishim, "serve", lambda flags, listener, path, bundle: listener.sendall(bundle.encode()))
    ours, theirs = socket.socketpair()
    chibishim.detach({}, theirs, "", os.getcwd())
    theirs.close()
    assert ours.recv(4096).decode() == str(bundle) and not bundle.exists()
    os.wait()
    ours.close()


@pytest.mark.parametrize("answer", [b"", b"x", None], ids=["ends", "refuses", "hangs"])
def test_start_finds_out_whether_a_shim_is_there(tmp_path, monkeypatch, answer):
    "also one of another version, which does not know the question"
    path = str(tmp_path / "socket")
    listener, given_up = socket.socket(fileno=chibishim.listen(path, "first").detach()), threading.Event()

    def serve():
        peer, _ = listener.accept()
        peer.recv(1000)
        if answer is None:
            given_up.wait(30)
        else:
            peer.sendall(answer)
        os.unlink(path)
        listener.close()
        peer.close()
    thread = threading.Thread(target=serve)
    thread.start()
    if answer is None:
        monkeypatch.setattr(chibishim, "JOIN_S", 0.2)
        with pytest.raises(chibishim.ContainerError, match="does not answer"):
            chibishim.listen(path, "second")
        given_up.set()
    else:
        found = chibishim.listen(path, "second")
        assert bool(found) == (not answer)
        if found:
            found.close()
    thread.join()


def test_a_shim_that_hangs_holds_up_no_other_start(tmp_path):
    "T7, T9: also when as many wait for it as its backlog holds"
    path = str(tmp_path / "socket")
    (tmp_path / "address").write_text("unix://" + path)
    waiting = []
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(path)
        hung.listen(1)
        with pytest.raises(BlockingIOError):
            while True:
                waiting.append(chibishim.connect_to(path))
        end = threading.Timer(10, hung.close)           # who waits for it sees it dead
        end.start()
        with pytest.raises(chibishim.ContainerError, match="does not answer"):
            chibishim.listen(path, "x")
        chibishim.remove_dead_socket(str(tmp_path), {})
        end.cancel()
        assert os.path.exists(path)
    for fd in waiting:
        os.close(fd)


def test_starts_at_once_find_one_shim(bundle, monkeypatch):
    "where a dead one has left its socket"
    monkeypatch.setenv("CHIBISHIM_GROUP", "all")
    path = bundle.start().peer.getpeername()
    bundle.kill()
    until(lambda: not bundle.processes())
    assert os.path.exists(path)
    bundles = [Bundle(bundle.directory) for _ in range(8)]
    threads = [threading.Thread(target=one.start) for one in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bundle.processes()) == 1
    for one in bundles:
        assert one.create()
        one.call("Delete")


def test_the_log_goes_on_when_the_first_container_has_gone(bundle, monkeypatch):
    monkeypatch.setenv("CHIBISHIM_GROUP", "all")
    logs = []
    for one in (bundle, Bundle(bundle.directory)):
        os.mkfifo(one.path + "/log")
        logs.append(os.open(one.path + "/log", os.O_RDONLY | os.O_NONBLOCK))
        one.start().create()
        if one is bundle:
            os.close(logs[0])
    (pid, *_) = [pid for pid in bundle.processes() if os.readlink("/proc/%d/fd/2" % pid).endswith("/log")]
    assert os.readlink("/proc/%d/fd/2" % pid) == one.path + "/log"
    bundle.call("Delete")
    one.call("Delete")


def test_a_peer_that_does_not_read_stalls_nobody(bundle):
    "T7, T2: and what waits for it is bounded"
    bundle.start().create()
    slow = socket.socket(socket.AF_UNIX)
    slow.connect(bundle.peer.getpeername())
    slow.setblocking(False)
    data, sent = chibishim.request_frame(1, "x" * 60000, "y", b""), 0
    stream, deadline = 1, time.monotonic() + 20
    while time.monotonic() < deadline:
        if not data:
            stream += 2
            data = chibishim.request_frame(stream, "x" * 60000, "y", b"")
        try:
            size = slow.send(data)
            data, sent = data[size:], sent + size
        except BlockingIOError:
            if not select.select([], [slow], [], 1)[1]:
                break                   # the shim reads no more: its answers are not taken
    assert bundle.call("State")["status"] == chibishim.CREATED
    assert sent < 2 * chibishim.MAX_UNSENT_BYTES
    slow.close()
    bundle.call("Delete")


def test_the_shim_keeps_no_pipe_of_a_running_process(bundle):
    "L5"
    bundle.start().create()
    bundle.call("Start")
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
    bundle.call("Start", exec_id="x")
    shim = bundle.call("Connect")["shim_pid"]
    held = [os.readlink("/proc/%d/fd/%s" % (shim, fd)) for fd in os.listdir("/proc/%d/fd" % shim)]
    assert len(held) > 5 and not [name for name in held if name.startswith("pipe:")]
    bundle.call("Kill", signal=signal.SIGKILL, all=True)
    bundle.call("Wait")
    bundle.call("Delete")


def connections_heard(bundle, count):
    """So many further connections to the shim, all open at once, on each of which a call was answered."""
    peers = []
    for _ in range(count):
        peers.append(socket.socket(socket.AF_UNIX))
        peers[-1].settimeout(60)
        peers[-1].connect(bundle.peer.getpeername())
        peers[-1].sendall(chibishim.request_frame(1, "containerd.task.v2.Task", "Connect", b""))
        assert peers[-1].recv(1)
    return peers


def stands_still(fifo):
    """Whether something is in a fifo, and nothing more comes."""
    before = chibishim.bytes_available(fifo)
    time.sleep(0.1)
    return 0 < before == chibishim.bytes_available(fifo)


@needs_busybox
def test_a_terminal_that_nobody_reads_leaves_no_wait_behind(bundle):
    "L12, T7: a connection that got the number of its closed way out was never heard"
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    bundle.config["process"].update(args=["/busybox", "yes"], terminal=True)
    fifo = os.path.join(bundle.directory, "fifo")
    os.mkfifo(fifo)
    client = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    bundle.start()
    early = connections_heard(bundle, 4)        # lower numbers, free when the terminal's are closed
    bundle.call("Create", bundle=bundle.path, stdout=fifo, terminal=True)
    bundle.call("Start")
    until(lambda: stands_still(client))
    for peer in early:
        peer.close()
    bundle.call("Kill", signal=9)
    assert bundle.call("Wait")["exit_status"] == 137
    for peer in connections_heard(bundle, 16):
        peer.close()
    os.close(client)
    bundle.call("Delete")


def test_a_thousand_waiters_are_answered(bundle):
    "T8"
    bundle.start().create()
    bundle.call("Start")
    waiting = {bundle.send("Wait", {"id": bundle.id}) for _ in range(1000)}
    kill = bundle.send("Kill", {"id": bundle.id, "signal": 9})
    for _ in range(1001):
        stream, body = bundle.receive()
        if stream != kill:
            waiting.remove(stream)
            assert decode("WaitResponse", chibishim.response_payload(body))["exit_status"] == 137
    assert waiting == set()


def test_a_dead_shims_socket_is_replaced_a_live_ones_is_not(bundle):
    "T9"
    path = bundle.start().peer.getpeername()
    first = bundle.processes()
    assert bundle.start().peer.getpeername() == path and bundle.processes() == first
    bundle.kill()
    until(lambda: not bundle.processes())
    assert bundle.start().peer.getpeername() == path and bundle.processes() != first
    assert bundle.create()


def test_an_unknown_service_is_unimplemented(bundle):
    "T4"
    stream = bundle.start().send("State", {"id": bundle.id}, service="containerd.task.v9.Task")
    answered, body = bundle.receive()
    with pytest.raises(RpcError) as caught:
        chibishim.response_payload(body)
    assert answered == stream and caught.value.args == (12, "service containerd.task.v9.Task")


# -- L: the life of a task --

def test_events_are_in_order_when_all_happens_at_once(bundle, heard):
    "L1: ten containers in one shim, an exec in each"
    bundle.start()
    members = [joined(bundle) for _ in range(10)]
    for member in members:
        member.calls = [member.send(method, dict(message, id=member.id)) for method, message in (
            ("Start", {}), ("Exec", {"exec_id": "x", "spec": process_of(bundle, "exit")}), ("Start", {"exec_id": "x"}))]
    for member in members:
        for _ in member.calls:
            chibishim.response_payload(member.receive()[1])
        member.wait = [member.send("Wait", {"id": member.id, "exec_id": "x"}), member.send("Kill", {"id": member.id, "signal": 9}),
                       member.send("Wait", {"id": member.id})]
    for member in members:
        for _ in member.wait:
            chibishim.response_payload(member.receive()[1])
        member.call("Delete", exec_id="x")
        member.call("Delete")
    until(lambda: heard.topics().count("delete") == len(members))
    for member in members:
        topics = heard.topics(member.id)
        assert [topic for topic in topics if " x" not in topic] == ["create", "start", "exit", "delete"]
        assert [topic for topic in topics if " x" in topic] == ["exec-added x", "exec-started x", "exit x"]


def test_a_process_that_ends_at_once_was_started_first(bundle, heard):
    "L2"
    bundle.config["process"]["args"] = ["/guest.wasm", "exit"]
    bundle.start()
    for _ in range(10):
        bundle.create()
        bundle.call("Start")
        assert bundle.call("Wait")["exit_status"] == 7
        bundle.call("Delete")
    until(lambda: len(heard.events) >= 40)
    assert heard.topics() == ["create", "start", "exit", "delete"] * 10


@pytest.mark.parametrize("state", ["CREATED", "RUNNING", "PAUSED", "STOPPED"])
def test_each_request_that_a_state_does_not_allow_is_refused_with_its_code(bundle, state):
    "L3"
    bundle.start().create()
    for method, message in {"CREATED": [], "RUNNING": [("Start", {})], "PAUSED": [("Start", {}), ("Pause", {})],
                            "STOPPED": [("Start", {}), ("Kill", {"signal": 9}), ("Wait", {})]}[state]:
        bundle.call(method, **message)
    refusals = {method: code for (method, refused), (code, _) in chibishim.REFUSALS.items() if refused == getattr(chibishim, state)}
    assert refusals
    for method, code in refusals.items():
        bundle.fails(code, method, **({"exec_id": "x", "spec": process_of(bundle, "z")} if method == "Exec" else {}))
    bundle.fails(chibishim.ALREADY_EXISTS, "Create", bundle=bundle.path)
    for method in ("State", "Start", "Delete", "Kill", "Wait", "CloseIO", "ResizePty"):
        bundle.fails(chibishim.NOT_FOUND, method, exec_id="nobody", **({"signal": 9} if method == "Kill" else {}))
    assert bundle.call("State")["status"] == getattr(chibishim, state)


def test_an_exec_has_states_of_its_own(bundle):
    "L3"
    bundle.start().create()
    bundle.call("Start")
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
    bundle.fails(chibishim.ALREADY_EXISTS, "Exec", exec_id="x", spec=process_of(bundle, "z"))
    bundle.fails(chibishim.FAILED_PRECONDITION, "Kill", exec_id="x", signal=9)
    bundle.call("Start", exec_id="x")
    for method in ("Start", "Delete"):
        bundle.fails(chibishim.FAILED_PRECONDITION, method, exec_id="x")
    bundle.call("Kill", exec_id="x", signal=9)
    assert bundle.call("Wait", exec_id="x")["exit_status"] == 137
    bundle.fails(chibishim.NOT_FOUND, "Kill", exec_id="x", signal=9)
    bundle.fails(chibishim.FAILED_PRECONDITION, "Start", exec_id="x")
    bundle.call("Delete", exec_id="x")
    bundle.fails(chibishim.NOT_FOUND, "Delete", exec_id="x")


def test_an_exec_that_is_started_twice_at_once_has_one_process(bundle):
    "L3, L5: there was a second one that no call could reach"
    bundle.start().create()
    bundle.call("Start")
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
    assert codes_of(bundle, "Start", {"exec_id": "x"}) == [chibishim.OK, chibishim.FAILED_PRECONDITION]
    assert len(bundle.call("Pids")["processes"]) == 2
    bundle.call("Kill", exec_id="x", signal=signal.SIGKILL)
    assert bundle.call("Wait", exec_id="x")["exit_status"] == 128 + signal.SIGKILL
    bundle.call("Delete", exec_id="x")
    bundle.call("Kill", signal=signal.SIGKILL)
    bundle.call("Wait")
    bundle.call("Delete")


def test_an_exec_can_be_started_when_the_container_is_paused_no_more(bundle):
    "L3: the Start that was refused is no first one"
    bundle.start().create()
    bundle.call("Start")
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
    bundle.call("Pause")
    bundle.fails(chibishim.FAILED_PRECONDITION, "Start", exec_id="x")
    bundle.call("Resume")
    assert bundle.call("Start", exec_id="x")["pid"]
    bundle.call("Kill", signal=signal.SIGKILL)
    bundle.call("Wait")
    bundle.call("Delete")


def test_an_exec_into_a_container_that_somebody_else_froze_fails(bundle):
    "L12: the child that enters its cgroup would stand still, and the shim with it"
    bundle.start().create()
    bundle.call("Start")
    cgroup = chibishim.cgroup_of(bundle.config["linux"]["cgroupsPath"], bundle.id, chibishim.cgroup_mounts(chibishim.mount_table()), False)
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
    try:
        cgroup.freeze(True)
        until(cgroup.frozen)
        assert "paused" in bundle.fails(chibishim.UNKNOWN_ERROR, "Start", exec_id="x")
    finally:
        cgroup.freeze(False)
    bundle.call("Delete", exec_id="x")
    bundle.call("Kill", signal=signal.SIGKILL)
    bundle.call("Wait")
    bundle.call("Delete")


@pytest.mark.parametrize("limit", [2, 3])
def test_an_exec_needs_room_for_two_processes(bundle, limit):
    "N10: that which is between it and the shim counts, too"
    bundle.config["linux"]["resources"] = {"pids": {"limit": limit}}
    bundle.start().create()
    bundle.call("Start")
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
    if limit == 3:
        assert bundle.call("Start", exec_id="x")["pid"]
    else:
        assert "pids.limit must leave room for two" in bundle.fails(chibishim.UNKNOWN_ERROR, "Start", exec_id="x")
    bundle.call("Kill", signal=signal.SIGKILL)
    bundle.call("Wait")
    bundle.call("Delete")


def test_a_child_in_between_that_stands_still_is_given_up(monkeypatch):
    "L12: its cgroup was frozen when it had entered it, and the other containers wait"
    monkeypatch.setattr(chibishim, "FORK_S", 0.1)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(chibishim.ContainerError, match="frozen"):
        chibishim.fork_grandchild(chibishim.Setup(None, None, None, -1, -1), lambda: time.sleep(20))
    assert (os.wait()[1], os.listdir("/proc/self/fd")) == (signal.SIGKILL, before)


def test_what_the_child_in_between_cannot_do_is_told():
    def fail():
        raise chibishim.ContainerError("join: no")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(chibishim.ContainerError, match="^join: no$"):
        chibishim.fork_grandchild(chibishim.Setup(None, None, None, -1, -1), fail)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("between", [True, False], ids=["child", "grandchild"])
def test_what_is_forked_by_way_of_a_child_dies_with_the_shim(monkeypatch, between):
    "The pipe to it is still open: a child that hangs does not read it"
    (status, child_status), (child_gate, gate) = os.pipe(), os.pipe()
    setup = chibishim.Setup(None, None, None, child_status, child_gate)
    setup.adopted = True

    def hang(*words):
        os.write(child_status, b"here")
        time.sleep(30)

    def prepare():
        chibishim.leave_shim(setup, (0, 1, 2))
        if between:
            hang()
    monkeypatch.setattr(chibishim, "container_main", hang)
    shim = os.fork()
    if not shim:
        try:
            chibishim.libc.prctl(chibishim.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            pid = chibishim.fork_grandchild(setup, prepare)
            if not pid:
                chibishim.container_child({}, [], setup, (0, 1, 2), False)
            os.write(gate, pid.to_bytes(4, sys.byteorder))
            time.sleep(30)
        finally:
            os._exit(0)
    os.close(child_status)
    assert os.read(status, 99) == b"here"
    os.kill(shim, signal.SIGKILL)
    os.waitpid(shim, 0)
    assert select.select([status], [], [], 20)[0] and os.read(status, 99) == b""
    for fd in (status, child_gate, gate):
        os.close(fd)


def test_a_container_and_its_exec_join_a_pods_pid_namespace(bundle):
    "N1: whose first process is another container's"
    pid = bundle.start().create()
    bundle.call("Start")
    second = Bundle(bundle.directory)
    next(space for space in second.config["linux"]["namespaces"] if space["type"] == "pid")["path"] = "/proc/%d/ns/pid" % pid
    second.command("delete")            # writes its configuration
    second.peer, second.reader, second.answers, second.stream = bundle.peer, bundle.reader, [], bundle.stream
    pids = [second.create()]
    second.call("Start")
    second.call("Exec", exec_id="x", spec=process_of(second, "z"))
    pids.append(second.call("Start", exec_id="x")["pid"])
    assert {os.readlink("/proc/%d/ns/pid" % pid) for pid in pids} == {os.readlink("/proc/%d/ns/pid" % pid)}
    assert {chibishim.read_text("/proc/%d/stat" % pid).split()[3] for pid in pids} == {str(second.call("Connect")["shim_pid"])}
    for made, words in ((second, {"exec_id": "x"}), (second, {})):
        made.call("Kill", signal=signal.SIGKILL, **words)
        made.call("Wait", **words)
        made.call("Delete", **words)
    bundle.stream = second.stream


def test_a_container_is_deleted_once(bundle, heard):
    "L4: also by two calls at once, while a logger takes its time and hooks run"
    def program(name, text):
        path = os.path.join(bundle.directory, name)
        with open(path, "w") as file:
            file.write("#!/bin/sh\n" + text)
        os.chmod(path, 0o755)
        return path
    logger = "binary://" + program("logger", "exec 5>&-\ncat <&3; cat <&4; sleep 0.3\n")
    notes = os.path.join(bundle.directory, "notes")
    bundle.config["hooks"] = {"poststop": [{"path": program("hook", "sleep 0.3; echo ran >> %s\n" % notes)}]}
    bundle.start().call("Create", bundle=bundle.path, stdout=logger, stderr=logger)
    assert codes_of(bundle, "Delete", {}) == [chibishim.OK, chibishim.NOT_FOUND]
    with open(notes) as file:
        assert file.read() == "ran\n"
    until(lambda: "delete" in heard.topics(bundle.id))
    assert heard.topics(bundle.id).count("delete") == 1


def test_an_exec_that_is_deleted_while_it_waits_for_its_logger_does_not_run(bundle):
    "L5: nobody could kill it"
    logger = logger_of(bundle, "sleep 0.5; exec 5>&-\ncat <&3; cat <&4\n")
    bundle.start().create()
    bundle.call("Start")
    before = bundle.processes()
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"), stdout=logger, stderr=logger)
    start = bundle.send("Start", {"id": bundle.id, "exec_id": "x"})
    delete = bundle.send("Delete", {"id": bundle.id, "exec_id": "x"})
    answers = dict(bundle.receive() for _ in range(2))
    assert decode("DeleteResponse", chibishim.response_payload(answers[delete]))["pid"] == 0
    with pytest.raises(RpcError, match="deleted before it ran"):
        chibishim.response_payload(answers[start])
    assert bundle.processes() == before
    bundle.call("Kill", signal=signal.SIGKILL)
    bundle.call("Wait")
    bundle.call("Delete")


@pytest.mark.parametrize("deleted", ["x", ""], ids=["exec", "container"])
def test_a_wait_for_an_exec_that_never_runs_ends_when_it_is_deleted(bundle, deleted):
    bundle.start().create()
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
    wait = bundle.send("Wait", {"id": bundle.id, "exec_id": "x"})
    delete = bundle.send("Delete", {"id": bundle.id, "exec_id": deleted})
    answers = dict(bundle.receive() for _ in range(2))
    with pytest.raises(RpcError) as caught:
        chibishim.response_payload(answers[wait])
    assert caught.value.args[0] == chibishim.NOT_FOUND
    chibishim.response_payload(answers[delete])


def test_a_hook_that_ends_as_its_time_is_over_has_ended(bundle):
    """Its pid may be another process's."""
    container, children = chibishim.Container("c", bundle.path), {}
    container.init = chibishim.Process("", None)
    task = chibishim.run_hook({"path": "/bin/true", "timeout": 1}, container, "stopped", "poststop", children)
    next(task)
    pid, ended = children.popitem()
    ended(os.waitpid(pid, 0)[1])
    with pytest.raises(StopIteration):
        task.send(False)


def test_a_pause_that_does_not_take_hold_is_an_error():
    "L3: of which no event tells, and all processes go on"
    class Stubborn:
        asked = []

        def freeze(self, frozen):
            self.asked.append(frozen)

        def frozen(self):
            return False
    events = []
    service = chibishim.TaskService(None, lambda *event: events.append(event), "test")
    service.containers["c"] = container = chibishim.Container("c", "/")
    container.init = chibishim.Process("", None)
    container.init.state, container.init.announced, container.cgroup = chibishim.RUNNING, True, Stubborn()
    with pytest.raises(RpcError, match="does not stop"):
        list(service.Pause({"id": "c"}))
    assert (Stubborn.asked, events, service.container("c").state(container.init)) == ([True, False], [], chibishim.RUNNING)


def file_limits(pid):
    with open("/proc/%d/limits" % pid) as file:
        return next(line.split()[3:5] for line in file if line.startswith("Max open files"))


@needs_busybox
def test_a_shim_of_many_may_have_as_many_descriptors_as_there_are_and_it_alone(bundle, monkeypatch):
    """Its containers and hooks have the limit that it had."""
    soft = 8 * chibishim.MANY_CONTAINERS
    bundle.prefix = [sys.executable, "-c", "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (%d, %d)); "
                                           "os.execv(sys.argv[1], sys.argv[1:])" % (soft, 2 * soft)]
    bundle.start().create()
    shim = bundle.call("Connect")["shim_pid"]
    others = [joined(bundle) for _ in range(chibishim.MANY_CONTAINERS - 1)]
    assert file_limits(shim) == [str(soft), str(2 * soft)]
    note = os.path.join(bundle.directory, "note")
    monkeypatch.setattr(chibishim, "default_config", lambda *words, make=chibishim.default_config: {
        **make(*words), "hooks": {"createRuntime": [{"path": "/bin/busybox", "args": ["sh", "-c", "ulimit -Sn > " + note]}]}})
    others.append(joined(bundle))
    pid = others[-1].call("State")["pid"]
    assert (file_limits(shim), file_limits(pid)) == ([str(2 * soft)] * 2, [str(soft), str(2 * soft)])
    with open(note) as file:
        assert file.read() == "%d\n" % soft
    for one in [bundle] + others:
        one.call("Delete")


@pytest.mark.parametrize("more", ["hooks", "logger", ""])
def test_a_shim_without_descriptors_loses_none_and_waits(bundle, more):
    """L5, L12, T7: each Create that found none had lost two, and connections that could not be accepted kept
    it busy; where it was a hook that failed, the shim had died."""
    streams = {}
    if more == "hooks":
        bundle.config["hooks"] = {point: [{"path": "/bin/true"}] for point in ("createRuntime", "poststop")}
    if more == "logger":
        streams["stdout"] = streams["stderr"] = logger_of(bundle, "exec 5>&-\ncat <&3; cat <&4\n")
    bundle.start().fails(chibishim.NOT_FOUND, "State")          # the connection is accepted
    shim, = bundle.processes()
    hard = resource.prlimit(shim, resource.RLIMIT_NOFILE)[1]
    held = descriptors(shim)
    failures = 0
    for further in range(24):
        resource.prlimit(shim, resource.RLIMIT_NOFILE, (max(held) + 1 + further, hard))
        try:
            bundle.call("Create", bundle=bundle.path, **streams)
        except RpcError as error:
            assert re.search(os.strerror(errno.EMFILE) + "|hook /bin/true: exit status 127", error.args[1])
            failures += 1
        else:
            bundle.call("Delete")
        assert descriptors(shim) == held
    assert 5 < failures < 24
    resource.prlimit(shim, resource.RLIMIT_NOFILE, (max(held) + 1, hard))
    peers = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for peer in peers:
        peer.connect(bundle.peer.getpeername())
    before = time_of(shim)
    time.sleep(1)
    assert time_of(shim) - before < 0.2
    for peer in peers:
        peer.close()


def test_an_end_is_reported_whatever_goes_wrong_with_the_cgroup(capfd):
    "L1, L9"
    class Broken:
        def oom_kills(self):
            return 0

        def kill(self):
            raise RecursionError("so deep")

    class Io:
        def drain(self, *words):
            yield None, 0

        def close(self, loop):
            pass
    events = []
    service = chibishim.TaskService(None, lambda *event: events.append(event[0]), "test")
    service.containers["c"] = container = chibishim.Container("c", "/")
    container.init, container.cgroup = chibishim.Process("", Io()), Broken()
    container.init.announced = True
    list(service.on_exit(container, container.init, 3 << 8))
    assert (container.init.state, container.init.exit_status, events) == (chibishim.STOPPED, 3, ["/tasks/exit"])
    assert container.init.exited.set and "so deep" in capfd.readouterr().err


def test_a_signal_does_not_reach_who_has_the_pid_now():
    "L6"
    dead = os.fork()
    if not dead:
        os._exit(0)
    process = chibishim.Process("", None)
    process.pidfd = os.pidfd_open(dead)
    os.waitpid(dead, 0)
    process.pid = os.getpid()           # as if the number had been given again
    assert chibishim.send_signal(process, signal.SIGTERM) is False
    os.close(process.pidfd)


def big_module():
    """A module that takes a while to read: 300,000 functions."""
    def section(number, body):
        return bytes([number]) + chibishim.varint(len(body)) + body
    count = chibishim.varint(300000)
    return b"\0asm\1\0\0\0" + section(1, b"\1\x60\0\0") + section(3, count + bytes(300000)) + section(
        7, b"\1\6_start\0\0") + section(10, count + b"\2\0\x0b" * 300000)


SITUATIONS = {"while it is read": (None, "auto"), "in an interpreted loop": ("spin", "interpreter"), "in a native loop": ("spin", "auto"),
              "in poll_oneoff": ("z", "auto"), "in a blocking read": ("cat", "auto")}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_guest_dies_at_once(bundle, monkeypatch, situation):
    "L7: in less than 50 ms, at best of ten, as the machine may be busy"
    word, tier = SITUATIONS[situation]
    monkeypatch.setenv("CHIBISHIM_TIER", tier)
    if not word:
        with open(os.path.join(bundle.path, "rootfs", "guest.wasm"), "wb") as file:
            file.write(big_module())
    bundle.config["process"]["args"] = ["/guest.wasm", word or "x"]
    fifo = os.path.join(bundle.directory, "stdin")
    os.mkfifo(fifo)
    client = os.open(fifo, os.O_RDWR)
    bundle.start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        times = []
        for _ in range(10):
            pid = bundle.call("Create", bundle=bundle.path, stdin=fifo, stdout="file://" + bundle.output)["pid"]
            pidfd = os.pidfd_open(pid)
            if word:
                bundle.call("Start")
                time.sleep(0.2)
            assert bundle.call("State")["status"] in (chibishim.CREATED, chibishim.RUNNING)
            began = time.monotonic()
            kill = bundle.send("Kill", {"id": bundle.id, "signal": number})
            assert select.select([pidfd], [], [], 20)[0]
            times.append(time.monotonic() - began)
            os.close(pidfd)
            assert bundle.receive()[0] == kill
            assert bundle.call("Wait")["exit_status"] == 128 + number
            bundle.call("Delete")
            if times[-1] < 0.05:
                break
        assert min(times) < 0.05, times
    os.close(client)


def test_memory_that_runs_out_is_an_event_and_137(bundle, heard):
    "L8"
    if not os.path.exists("/sys/fs/cgroup/memory"):
        pytest.skip("no memory controller of cgroup version 1")
    shutil.copy(os.path.join(MODULES, "hog.wasm"), os.path.join(bundle.path, "rootfs"))
    bundle.config["process"]["args"] = ["/hog.wasm"]
    bundle.config["linux"]["resources"] = {"memory": {"limit": 32 << 20, "swap": 32 << 20}}
    bundle.start().create()
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == 137
    bundle.call("Delete")
    until(lambda: "delete" in heard.topics())
    assert heard.topics() == ["create", "start", "oom", "exit", "delete"]


@needs_busybox
@pytest.mark.parametrize("reader", ["that does not read", "that is gone"])
def test_a_log_that_takes_nothing_blocks_nothing(bundle, reader):
    "L10"
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    fifo = os.path.join(bundle.path, "log")
    os.mkfifo(fifo)
    log = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    bundle.config["hooks"] = {"poststart": [{"path": "/bin/busybox", "args": ["busybox", "false"]}]}      # to be logged
    bundle.start()
    if reader == "that is gone":
        os.close(log)
    else:
        with pytest.raises(BlockingIOError):
            while True:
                os.write(log, b"x" * 4096)
    for _ in range(3):
        bundle.create()
        bundle.call("Start")
        bundle.call("Kill", signal=9)
        bundle.call("Wait")
        bundle.call("Delete")


def test_a_full_disk_blocks_nothing(bundle):
    "L10: what the guest writes is lost, and it hears of it"
    bundle.config["process"]["args"] = ["/guest.wasm", "flood"]
    bundle.start().call("Create", bundle=bundle.path, stdout="/dev/full", stderr="/dev/full")
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == 74     # the guest's, for an errno of fd_write
    bundle.call("Delete")


def test_a_bundle_on_a_full_disk_makes_create_fail(bundle):
    "L10: `delete` would not know what to undo"
    os.symlink("/dev/full", os.path.join(bundle.path, "init.pid"))
    bundle.start()
    assert "No space left" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    bundle.fails(chibishim.NOT_FOUND, "State")


@pytest.mark.parametrize("spaces", ["a pid namespace of its own", "the host's"])
def test_init_dies_while_an_exec_runs(bundle, heard, spaces):
    "L11"
    if spaces == "the host's":
        bundle.config["linux"]["namespaces"] = [space for space in bundle.config["linux"]["namespaces"] if space["type"] != "pid"]
        bundle.config["mounts"] = []
        bundle.config["linux"]["maskedPaths"] = bundle.config["linux"]["readonlyPaths"] = []
    pid = bundle.start().create()
    bundle.call("Start")
    bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
    other = bundle.call("Start", exec_id="x")["pid"]
    os.kill(pid, signal.SIGKILL)
    for exec_id in ("x", ""):
        assert bundle.call("Wait", exec_id=exec_id)["exit_status"] == 137
    assert not os.path.exists("/proc/%d" % other)
    bundle.fails(chibishim.FAILED_PRECONDITION, "Exec", exec_id="y", spec=process_of(bundle, "z"))
    bundle.call("Delete", exec_id="x")
    bundle.call("Delete")
    until(lambda: "delete" in heard.topics())
    assert sorted(heard.topics()[4:6]) == ["exit", "exit x"] and len(heard.events) == 7


def test_an_exec_that_meets_the_death_of_init_is_a_failed_precondition(bundle):
    "L11, L3: whatever it was about to do"
    bundle.start()
    for number in range(20):
        pid = bundle.create()
        bundle.call("Start")
        bundle.call("Exec", exec_id="x", spec=process_of(bundle, "z"))
        stream = bundle.send("Start", {"id": bundle.id, "exec_id": "x"})
        time.sleep(number * 0.001)
        os.kill(pid, signal.SIGKILL)
        answered, body = bundle.receive()
        assert answered == stream
        try:
            chibishim.response_payload(body)
        except RpcError as error:
            assert error.args[0] == chibishim.FAILED_PRECONDITION, error
        bundle.call("Wait")
        bundle.call("Delete")


def test_the_crash_of_one_container_does_not_touch_another(bundle, heard):
    "L12"
    pid = bundle.start().create()
    bundle.call("Start")
    second = joined(bundle)
    second.call("Start")
    before = second.call("State")
    os.kill(pid, signal.SIGKILL)
    assert bundle.call("Wait")["exit_status"] == 137
    bundle.call("Delete")
    assert bundle.command("delete").returncode == 0
    assert second.call("State") == before and before["status"] == chibishim.RUNNING
    second.call("Kill", signal=9)
    second.call("Wait")
    second.call("Delete")
    until(lambda: heard.topics(second.id)[-1:] == ["delete"])
    assert heard.topics(second.id) == ["create", "start", "exit", "delete"]


# -- events, while containerd is away or unwell (L9) --

def live(bundle):
    """Create, Start, a kill, Delete: four events."""
    bundle.create()
    bundle.call("Start")
    bundle.call("Kill", signal=9)
    bundle.call("Wait")
    bundle.call("Delete")


LIFE = ["create", "start", "exit", "delete"]


def test_events_wait_for_a_containerd_that_is_away(bundle, heard):
    "L9: and come in their order, once each"
    heard.stop()
    bundle.start()
    for _ in range(3):
        live(bundle)
    heard.start()
    until(lambda: len(heard.events) >= 12)
    assert heard.topics() == LIFE * 3


def test_events_go_on_after_a_restart_of_containerd(bundle, heard):
    "L9"
    bundle.start()
    for number in range(3):
        live(bundle)
        until(lambda: len(heard.events) >= 4 * number + 4)
        heard.stop()
        heard.start()
    assert heard.topics() == LIFE * 3


def test_what_containerd_refuses_again_and_again_does_not_hold_up_the_rest(bundle, heard):
    "L9: as for runc's shim, five times are enough"
    asked = []
    heard.answer = lambda topic: asked.append(topic) or ((chibishim.UNKNOWN_ERROR, "no") if topic == "/tasks/create" else None)
    bundle.start()
    live(bundle)
    until(lambda: len(heard.events) >= 3)
    assert heard.topics() == LIFE[1:] and asked.count("/tasks/create") == chibishim.MAX_REFUSALS


def test_an_event_that_containerd_calls_invalid_is_not_repeated(bundle, heard):
    asked = []
    heard.answer = lambda topic: asked.append(topic) or ((chibishim.INVALID_ARGUMENT, "no") if topic == "/tasks/start" else None)
    bundle.start()
    live(bundle)
    until(lambda: len(heard.events) >= 3)
    assert asked == ["/tasks/" + topic for topic in LIFE]


def test_a_shim_whose_events_nobody_can_take_ends_at_once(bundle):
    "L9: without any socket of containerd's, as for the command `container`"
    bundle.start()
    live(bundle)
    began = time.monotonic()
    bundle.call("Shutdown")
    until(lambda: not bundle.processes())
    assert time.monotonic() - began < chibishim.FLUSH_S


def test_an_event_that_is_not_answered_is_sent_again(bundle, heard, monkeypatch):
    "L9, T7: and the calls go on meanwhile"
    heard.stop()
    frozen = socket.socket(socket.AF_UNIX)
    os.unlink(heard.path)
    frozen.bind(heard.path)
    frozen.listen()
    bundle.start()
    began = time.monotonic()
    live(bundle)
    assert time.monotonic() - began < chibishim.EVENT_TIMEOUT_S
    frozen.close()
    heard.start()
    until(lambda: len(heard.events) >= 4)
    assert heard.topics() == LIFE


@pytest.fixture
def published(bundle, monkeypatch):
    """A publisher in place of containerd's command; what it was called with."""
    monkeypatch.delenv("TTRPC_ADDRESS", raising=False)
    bundle.publisher = os.path.join(bundle.directory, "publisher")
    with open(bundle.publisher, "w") as file:
        file.write("#!/bin/sh\necho $* >> %s/calls\ncat >> %s/events\n" % (bundle.directory, bundle.directory))
    os.chmod(bundle.publisher, 0o755)
    return bundle


def test_no_process_is_started_for_an_event_that_nobody_would_take(published):
    "L9"
    published.start()
    live(published)
    time.sleep(1)
    assert not os.path.exists(published.directory + "/calls")


def test_a_containerd_without_ttrpc_has_its_events_by_its_command(published):
    "L9"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(published.directory + "/none")
        listener.listen()
        published.start()
        live(published)
        until(lambda: len(chibishim.read_text(published.directory + "/calls", "").splitlines()) >= len(LIFE))
    calls = chibishim.read_text(published.directory + "/calls").splitlines()
    assert calls == ["--address %s/none publish --topic /tasks/%s --namespace test" % (published.directory, topic) for topic in LIFE]
    with open(published.directory + "/events", "rb") as file:
        assert b"containerd.events.TaskExit" in file.read()


def test_a_full_queue_keeps_the_exits(monkeypatch, capfd):
    "L9: clients act on them"
    monkeypatch.setattr(chibishim, "MAX_EVENTS", 4)
    shim = chibishim.Shim({"namespace": "test", "address": "/none", "id": "c"}, None, "", "/")
    for number in range(4):
        shim.publish("/tasks/exit", "TaskExit", {"container_id": "c%d" % number})
        shim.publish("/tasks/delete", "TaskDelete", {"container_id": "c%d" % number})
    assert [topic for topic, _, _ in shim.events] == ["/tasks/exit"] * 4
    shim.publish("/tasks/exit", "TaskExit", {"container_id": "last"})
    assert [decode("TaskExit", event["value"])["container_id"] for _, event, _ in shim.events] == ["c1", "c2", "c3", "last"]
    assert capfd.readouterr().err.count("is lost") == 5


def test_a_full_backlog_does_not_block(tmp_path):
    "T7: a containerd that is stopped takes no connections"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(0)
    clients = [chibishim.Client(str(tmp_path / "s")) for _ in range(4)]
    with pytest.raises(BlockingIOError):
        for client in clients:
            client.connect()
    for client in clients:
        client.close()
    listener.close()


# -- P: the process --

POISON = "import os; os.write(2, b'injected'); os._exit(99)\n"


@pytest.mark.parametrize("arguments, status", [(("both",), 0), (("trap",), 134), (("flood",), 0), (("exit",), 7)], ids=lambda value: value[0] if value.__class__ is tuple else "")
def test_no_module_is_imported_from_the_containers_root(bundle, arguments, status):
    "P2: at each place where Python would look lies one of every name"
    rootfs = os.path.join(bundle.path, "rootfs")
    for place in {path for path in sys.path if "python" in path and "zip" not in path} | {"/usr/lib/python3.%d" % minor for minor in range(10, 16)}:
        directory = rootfs + (place if not place.startswith(ROOT) else "/app")
        os.makedirs(directory, exist_ok=True)
        for name in sys.stdlib_module_names:
            with open(os.path.join(directory, name + ".py"), "w") as file:
                file.write(POISON)
    bundle.config["process"]["args"] = ["/guest.wasm", *arguments]
    bundle.start().call("Create", bundle=bundle.path, stdout="file://" + bundle.output, stderr="file://" + bundle.output)
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == status
    with open(bundle.output, "rb") as file:
        assert b"injected" not in file.read()


def test_the_environments_secrets_are_not_logged(bundle):
    "P3: neither when things go well nor when they fail"
    log = os.path.join(bundle.path, "log")
    open(log, "w").close()
    process = bundle.config["process"]
    process["env"] = ["PASSWORD=xyzzy-1", "xyzzy-2"]
    bundle.start()
    messages = []
    for arguments in (["/guest.wasm", "trap"], ["/guest.wasm", "exit"], ["/no/such"], ["/guest.wasm", "z"]):
        process["args"] = arguments
        bundle.command("delete")        # writes the configuration
        try:
            bundle.create()
            bundle.call("Start")
            bundle.call("Exec", exec_id="x", spec={"value": json.dumps(dict(process, args=["/no/such"])).encode()})
            bundle.call("Start", exec_id="x")
        except RpcError as error:
            messages.append(error.args[1])
        try:
            bundle.call("Kill", signal=9)
        except RpcError as error:
            messages.append(error.args[1])
        try:
            bundle.call("Wait")
            bundle.call("Delete")
        except RpcError as error:
            messages.append(error.args[1])
    messages.append(bundle.command("delete").stderr.decode())
    process["env"] = "xyzzy-3"
    bundle.command("delete")
    messages.append(bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path))
    process["env"] = []
    with open(log) as file:
        text = "\n".join([file.read(), *messages])
    assert "/no/such" in text and "xyzzy" not in text


def test_a_log_line_is_bounded_and_printable(capfd):
    "P4"
    chibishim.log("a\x1b[2Jb\nc\x00d\u202e" + "x" * 100000)
    text = capfd.readouterr().err
    assert text.startswith("chibishim: a?[2Jb?c?d?xxx") and text.endswith("x\n") and len(text) <= 1001
