"""Chapters 19 to 22: what becomes of config.json, of cgroups and of the container's process."""

import errno
import json
import os
import random
import signal
import subprocess
import sys

import pytest

import chibishim
from conftest import needs_mapped_ids


def config_with(**linux):
    """A config.json that differs from the usual one in these fields of linux."""
    config = chibishim.default_config("guest.wasm", [], [], [], False)
    config["linux"].update(linux)
    return config


def plan_of(**linux):
    return chibishim.plan(config_with(**linux), "/bundle", "/bundle/rootfs")


def namespaces_of(*extra):
    return [{"type": name} for name in ("pid", "network", "mount", "ipc", "uts")] + list(extra)


ROOT_MAP = [{"containerID": 0, "hostID": 100000, "size": 65536}]
USER = namespaces_of({"type": "user"})


@pytest.mark.parametrize("linux", [
    {"namespaces": USER}, {"namespaces": USER, "uidMappings": ROOT_MAP}, {"uidMappings": ROOT_MAP, "gidMappings": ROOT_MAP},
    {"namespaces": USER, "uidMappings": ROOT_MAP, "gidMappings": [{"containerID": 1, "hostID": 100000, "size": 1}]},
    {"namespaces": USER, "uidMappings": ROOT_MAP, "gidMappings": [{"containerID": 0, "hostID": 4294967295, "size": 2}]},
    {"namespaces": USER, "uidMappings": ROOT_MAP, "gidMappings": [{"containerID": 0, "hostID": 100000}]}],
    ids=["no maps", "no gids", "no namespace", "no root", "beyond the last id", "no size"])
def test_a_user_namespace_needs_mappings_and_they_need_one(linux):
    with pytest.raises(chibishim.ConfigError, match="user namespace|range of ids"):
        plan_of(**linux)


def test_ids_are_mapped_by_the_ranges():
    rows = [(0, 1000, 1), (1, 100000, 10)]
    assert [chibishim.mapped_id(rows, id) for id in (0, 1, 10, 11)] == [1000, 100000, 100009, None]


@pytest.mark.parametrize("name", ["NOFILE", "RLIMIT_", "RLIMIT_FILES", ""])
def test_an_unknown_resource_limit_is_refused(name):
    "N8"
    with pytest.raises(chibishim.ConfigError, match="rlimits"):
        chibishim.plan_rlimits({"rlimits": [{"type": name, "soft": 1, "hard": 1}]})


@pytest.mark.parametrize("name, path", [
    ("kernel.msgmax", "kernel/msgmax"), ("net.ipv4.ip_forward", "net/ipv4/ip_forward"), ("kernel/domainname", "kernel/domainname"),
    ("net/ipv4/conf/eth0.1/rp_filter", "net/ipv4/conf/eth0.1/rp_filter"), ("fs.mqueue.msg_max", "fs/mqueue/msg_max"),
    ("net.ipv4.conf.eth0/1.rp_filter", "net/ipv4/conf/eth0.1/rp_filter")])
def test_parameters_of_own_namespaces_are_set(name, path):
    "N8"
    assert [step[1:3] for step in plan_of(sysctl={name: "1"}) if step[0] == "sysctl"] == [(path, "1")]


@pytest.mark.parametrize("name", [
    "kernel.panic", "kernel.core_pattern", "vm.overcommit_memory", "kernel.msgmax2", "net/../kernel/panic", "/net/x", "net", ""])
def test_parameters_of_the_host_are_refused(name):
    "N8"
    with pytest.raises(chibishim.ConfigError, match="sysctl"):
        plan_of(sysctl={name: "1"})


@pytest.mark.parametrize("name, space", [
    ("net.ipv4.ip_forward", "network"), ("kernel.shmmax", "ipc"), ("kernel.domainname", "uts")])
def test_parameters_of_a_namespace_that_is_not_made_are_refused(name, space):
    spaces = [item for item in namespaces_of() if item["type"] != space]
    config = config_with(sysctl={name: "1"}, namespaces=spaces)
    config.pop("hostname")
    with pytest.raises(chibishim.ConfigError, match="sysctl"):
        chibishim.plan(config, "/bundle", "/bundle/rootfs")


def test_a_task_that_fails_does_not_end_a_forgiving_loop(capfd):
    loop, done = chibishim.Loop(forgiving=True), []

    def fails():
        yield None, 0.01
        raise KeyError("nobody expects this")

    def waits(fd):
        yield chibishim.readable(fd)

    def ends():
        yield None, 0.05
        done.append(True)
    read, write = os.pipe()
    for task in (fails(), waits(read), waits(read), ends()):        # two waits for one descriptor are a defect too
        loop.spawn(task)
    loop.run(lambda: done)
    os.close(read)
    os.close(write)
    text = capfd.readouterr().err
    assert "nobody expects this" in text and "two waits" in text


@pytest.mark.parametrize("again", [False, True], ids=["closed", "another file's"])
def test_a_descriptor_that_is_closed_while_a_task_waits_for_it_ends_no_loop(again):
    "L12"
    loop, happened = chibishim.Loop(forgiving=True), []
    read, write = os.pipe()

    def waits():
        happened.append((yield chibishim.readable(read, 0.1)))

    def closes():
        yield None, 0.01
        os.close(read)
        if again:
            os.dup2(write, read)
    loop.spawn(waits())
    loop.spawn(closes())
    loop.run(lambda: happened)
    assert happened == [False] and not loop.waiting
    for fd in {write, read} if again else {write}:
        os.close(fd)


def test_a_regular_file_is_always_ready(tmp_path):
    loop, happened = chibishim.Loop(), []
    fd = os.open(tmp_path, os.O_RDONLY)

    def waits():
        happened.append((yield chibishim.readable(fd)))
    loop.spawn(waits())
    loop.run(lambda: happened)
    os.close(fd)
    assert happened == [True] and not loop.waiting


def test_a_task_may_wait_for_longer_than_the_kernel_can():
    "L12: with a hook's timeout of 25 days the loop ended, and with it every container of the pod"
    loop, happened = chibishim.Loop(), []
    read, write = os.pipe()

    def waits():
        happened.append((yield chibishim.readable(read, 1e10)))
    loop.spawn(waits())
    os.write(write, b"x")
    loop.run(lambda: happened)
    os.close(read)
    os.close(write)
    assert happened == [True]


def test_a_copy_gives_way_to_others_after_a_few_pieces():
    "T7: also where it never has to wait"
    io = chibishim.Stdio({"stdin": "", "stdout": "", "stderr": "", "terminal": False})
    io.stdin, io.sink = os.open("/dev/zero", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    old = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it never gave way"))
    signal.alarm(10)
    try:
        assert next(io.copy_all("stdin", "sink")) == (None, 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        os.close(io.stdin)
        os.close(io.sink)


def test_a_closed_stream_is_not_written_to_by_its_old_number(tmp_path):
    loop = chibishim.Loop()
    io = chibishim.Stdio({"stdin": "", "stdout": "", "stderr": "", "terminal": False})
    read, io.sink = os.pipe()
    os.set_blocking(io.sink, False)
    number, ended = io.sink, []

    def writes():
        try:
            yield from io.write_all("sink", bytes(1 << 20))
        except OSError:
            ended.append(True)

    def replaces():
        yield None, 0.01
        io.close(loop)
        fd = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
        os.dup2(fd, number)
        yield None, 0.01
    loop.spawn(writes())
    loop.spawn(replaces())
    loop.run(lambda: ended)
    os.close(number)
    os.close(read)
    assert os.path.getsize(tmp_path / "other") == 0


def test_root_sees_to_the_working_directory_before_it_is_the_user():
    names = [step[0] for step in chibishim.plan_process({"cwd": "/new", "user": {"uid": 5}}, {})]
    assert names.index("make_cwd") < names.index("identity") < names.index("cwd")


@pytest.mark.parametrize("word, steps", [("rshared", 1), ("shared", 1), ("unbindable", 1), ("rslave", 0), ("private", 0)])
def test_the_new_root_is_shared_if_asked(word, steps):
    "N9"
    assert sum(step[0] == "propagation" for step in plan_of(rootfsPropagation=word)) == steps


@pytest.mark.parametrize("word, flags", [("unbindable", chibishim.MS_PRIVATE), ("runbindable", chibishim.MS_PRIVATE | chibishim.MS_REC),
                                         ("rslave", chibishim.MS_SLAVE | chibishim.MS_REC), ("shared", chibishim.MS_SHARED)])
def test_the_old_root_can_be_bind_mounted_until_the_new_one_is_made(word, flags):
    "N9"
    assert [step[2] for step in plan_of(rootfsPropagation=word) if step[0] == "prepare_root"] == [flags]


@pytest.mark.parametrize("destination, target", [("/a/../b", "/b"), ("/a/./b/", "/a/b"), ("a//b", "/a/b"), ("/../a", "/a"), ("/", "/")])
def test_a_mounts_place_is_a_clean_path(destination, target):
    "which is made where the image has none, and that without a directory .."
    config = dict(config_with(), mounts=[{"destination": destination, "type": "tmpfs"}])
    assert [step[2] for step in chibishim.plan(config, "/bundle", "/bundle/rootfs") if step[0] == "mount"] == [target]


@pytest.mark.parametrize("uri, words", [
    ("binary:///bin/log", ["/bin/log"]), ("binary:///bin/log?a=1&b=2", ["/bin/log", "a", "1", "b", "2"]),
    ("binary:///my%20log?a=x%26y+z&b", ["/my log", "a", "x&y z", "b", ""])])
def test_a_loggers_command_line_is_its_uri(uri, words):
    assert chibishim.logger_words(uri) == words


@pytest.mark.parametrize("word", ["idmap", "ridmap", "tmpcopyup", "rro", "loop"])
def test_an_option_that_is_not_applied_to_the_root_is_refused(word):
    with pytest.raises(chibishim.ConfigError, match=word):
        chibishim.mount_options([word])


def test_version_2_tells_by_memory_events_that_memory_ran_out(tmp_path):
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 0\noom_kill 0\n")
    group = chibishim.Cgroup({"": str(tmp_path)})
    fd = group.watch_oom()
    try:
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
        events.write_text("low 0\noom 1\noom_kill 1\n")
        assert os.read(fd, 4096) and group.oom_kills() == 1
    finally:
        os.close(fd)


def test_a_container_does_not_escape_by_the_depth_of_its_groups(tmp_path):
    "L5: Python's stack ended first"
    here, depth = os.open(tmp_path, os.O_RDONLY), 1100
    for _ in range(depth):
        os.mkdir("a", dir_fd=here)
        below = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    with open(os.open("cgroup.procs", os.O_WRONLY | os.O_CREAT, dir_fd=here), "w") as file:
        file.write("12\n")
    group = chibishim.Cgroup({"": str(tmp_path)})
    assert group.pids() == [12]
    os.unlink("cgroup.procs", dir_fd=here)
    os.close(here)
    assert group.remove() and not tmp_path.exists()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="*** not root: NOTHING of cgroups and containers is tested")


@pytest.fixture
def group():
    """A fresh cgroup of the unified hierarchy."""
    places = [path for path in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified") if os.path.exists(path + "/cgroup.controllers")]
    if not places:
        pytest.skip("no cgroup version 2 is mounted")
    path = os.path.join(places[0], "chibitest-%d" % os.getpid())
    os.mkdir(path)
    yield path
    os.rmdir(path)


DENY_ALL = {"allow": False, "access": "rwm"}            # containerd's and Docker's first rule, always


@needs_root
@pytest.mark.parametrize("rules", [
    [], [DENY_ALL], [DENY_ALL, {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rw"}],
    [{"allow": True, "type": "b", "access": "r"}, DENY_ALL], [{"allow": True, "access": "rwm"}],
    [DENY_ALL, {"allow": True, "type": "a", "access": "rwm"}, {"allow": False, "type": "c", "major": 5, "access": "w"}],
], ids=["none", "deny all", "allow one", "deny last", "allow all", "allow all but"])
def test_the_kernel_takes_the_program_of_device_rules(group, rules):
    chibishim.attach_device_program(group, rules)


@pytest.mark.parametrize("rule, lines", [
    (DENY_ALL, ["a"]), ({"type": "a", "major": -1, "minor": -1}, ["a"]), ({"access": "mw"}, ["b *:* mw", "c *:* mw"]),
    ({"type": "a", "major": 7}, ["b 7:* rwm", "c 7:* rwm"]), ({"type": "c", "major": 1, "minor": 0, "access": "r"}, ["c 1:0 r"]), ({"type": "b"}, ["b *:* rwm"])])
def test_version_1_has_a_line_for_everything_and_lines_for_either_type(rule, lines):
    assert chibishim.version1_rules(rule) == lines


@pytest.mark.parametrize("version", ["devices", ""])
@pytest.mark.parametrize("rule, field", [
    ({"type": "z"}, "type"), ({"type": "p"}, "type"), ({"access": "rx"}, "access"), ({"type": "c", "minor": 1 << 31}, "number")])
def test_a_device_rule_that_cannot_be_is_refused(tmp_path, version, rule, field):
    "N12"
    group = chibishim.LimitedCgroup({version: str(tmp_path)})
    with pytest.raises(chibishim.ConfigError, match=r"linux.resources.devices\[1\].*" + field):
        group.limit_devices([DENY_ALL, dict(rule, allow=True)])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("numbers", [{"major": 1 << 33}, {"minor": -1}, {"uid": -7}, {"gid": (1 << 32) - 1}])
def test_a_device_whose_numbers_cannot_be_is_refused(numbers):
    "N12"
    with pytest.raises(chibishim.ConfigError, match=r"linux.devices\[0\]"):
        plan_of(devices=[dict({"path": "/dev/x", "type": "c", "major": 1, "minor": 3}, **numbers)])


@pytest.mark.parametrize("hook, field", [({}, "path"), ({"path": "relative"}, "path"), ({"path": "/a", "timeout": -1}, "timeout"),
                                         ({"path": "/a", "timeout": 1 << 1100}, "timeout")])
@pytest.mark.parametrize("point", chibishim.HOOK_POINTS)
def test_a_hook_that_cannot_be_is_refused(point, hook, field):
    "N11, N12"
    config = dict(config_with(), hooks={point: [{"path": "/a", "timeout": 0}, hook]})
    with pytest.raises(chibishim.ConfigError, match=r"hooks.%s\[1\].%s" % (point, field)):
        chibishim.check_config(config)


def opens(path, flags):
    try:
        os.close(os.open(path, flags))
        return True
    except PermissionError:
        return False


def allowed_to(group, attempts):
    """What a process in the group is allowed to do, of functions that tell."""
    pid = os.fork()
    if not pid:
        try:
            chibishim.write_text(group + "/cgroup.procs", "0")
            os._exit(sum(attempt() << index for index, attempt in enumerate(attempts)))
        finally:
            os._exit(255)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [bool(status >> index & 1) for index in range(len(attempts))]


@needs_root
def test_the_device_program_allows_what_the_rules_allow(group, tmp_path):
    nodes = {name: str(tmp_path / name) for name in ("kmsg", "mem")}
    os.mknod(nodes["kmsg"], 0o020600, os.makedev(1, 11))
    os.mknod(nodes["mem"], 0o020600, os.makedev(1, 1))
    chibishim.attach_device_program(group, [DENY_ALL, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}])
    assert allowed_to(group, [lambda: opens("/dev/null", os.O_RDWR), lambda: opens(nodes["kmsg"], os.O_RDONLY),
                              lambda: opens(nodes["kmsg"], os.O_WRONLY), lambda: opens(nodes["mem"], os.O_RDONLY)]) == [True, True, False, False]


def test_more_groups_than_the_kernel_takes_are_refused():
    chibishim.process_user({"additionalGids": [1] * 65536})
    with pytest.raises(chibishim.ConfigError, match="additionalGids: 65537 groups"):
        chibishim.process_user({"additionalGids": [1] * 65537})


def kmsg_rule(allow, access):
    return {"allow": allow, "type": "c", "major": 1, "minor": 11, "access": access}


@needs_root
@pytest.mark.parametrize("rules, reads, writes, both", [
    ([{"allow": True}, kmsg_rule(False, "w")], True, False, False), ([{"allow": True}, kmsg_rule(False, "rw"), kmsg_rule(True, "r")], True, False, False),
    ([DENY_ALL, kmsg_rule(True, "r"), kmsg_rule(True, "w")], True, True, True), ([kmsg_rule(True, "rw"), kmsg_rule(False, "r")], False, True, False),
    ([kmsg_rule(False, "w"), {"allow": True, "access": "rw"}], True, True, True), ([kmsg_rule(True, "r"), DENY_ALL], False, False, False),
], ids=["all but writing", "all but writing, by three", "reading and writing", "all but reading", "denied too early", "allowed too early"])
def test_to_read_and_write_takes_the_right_to_each(group, tmp_path, rules, reads, writes, both):
    """One rule may allow the one, and another rule the other, or deny it."""
    node = str(tmp_path / "kmsg")
    os.mknod(node, 0o020600, os.makedev(1, 11))
    chibishim.attach_device_program(group, rules)
    assert allowed_to(group, [lambda: opens(node, os.O_RDONLY), lambda: opens(node, os.O_WRONLY), lambda: opens(node, os.O_RDWR)]) == [reads, writes, both]


@pytest.mark.parametrize("kernel, bits, machine", [
    ("x86_64", 64, "x86_64"), ("x86_64", 32, "i686"), ("i586", 32, "i686"), ("aarch64", 64, "aarch64"), ("aarch64", 32, "armv7l"),
    ("armv8l", 32, "armv7l"), ("armv6l", 32, "armv7l"), ("riscv64", 64, "riscv64"), ("mips", 32, "mips")])
def test_the_system_calls_are_those_of_the_program_and_not_of_the_kernel(monkeypatch, kernel, bits, machine):
    "A 32-bit Python on a 64-bit kernel took other calls for keyctl(2) and seccomp(2)"
    monkeypatch.setattr(chibishim.os, "uname", lambda: os.uname_result(("Linux", "node", "6.1", "1", kernel)))
    monkeypatch.setattr(chibishim.sys, "maxsize", (1 << bits - 1) - 1)
    assert chibishim.machine_here() == machine


KEYCTL_CLEAR, KEY_SPEC_SESSION_KEYRING = 7, -3


@needs_root
@pytest.mark.skipif(not os.path.exists("/proc/keys"), reason="the kernel has no keys")
def test_a_session_keyring_is_no_key_of_its_users_and_yet_his_to_use():
    """A user has a quota of keys, and where the shim has a session keyring, as a service of systemd, each of his
    processes took one away."""
    uid = 61234
    pid = os.fork()
    if not pid:
        try:
            keyctl = chibishim.SYS_KEYCTL[chibishim.machine_here()]
            for _ in range(2):
                chibishim.do_session_keyring(None)
            os.setresuid(uid, uid, uid)
            chibishim.libc.syscall(keyctl, KEYCTL_CLEAR, KEY_SPEC_SESSION_KEYRING)
            os._exit(any(line.split()[0] == "%d:" % uid for line in open("/proc/key-users")))
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


@needs_root
@pytest.mark.parametrize("kernel", ["of today", "before 5.2"])
def test_bind_mounts_need_no_new_kernel(tmp_path, monkeypatch, kernel):
    if kernel == "before 5.2":
        monkeypatch.setattr(chibishim, "SYS_OPEN_TREE", 9999)
        monkeypatch.setattr(chibishim, "SYS_MOVE_MOUNT", 9999)
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "file").write_text("here")
    pid = os.fork()
    if not pid:
        try:
            chibishim.libc.unshare(chibishim.CLONE_NEWNS)
            chibishim.mount(None, "/", None, chibishim.MS_PRIVATE | chibishim.MS_REC)
            tree = chibishim.open_tree(str(tmp_path / "from"), chibishim.MS_REC)
            chibishim.move_mount(tree, os.open(tmp_path / "to", os.O_PATH), chibishim.MS_REC)
            os._exit((tmp_path / "to" / "file").read_text() != "here")
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.listdir(tmp_path / "to") == []


@needs_root
@pytest.mark.parametrize("option", ["ro", "rro"])
def test_a_bind_mount_is_read_only_wherever_its_target_is_renamed_to(tmp_path, monkeypatch, option):
    "N2: by another container, which writes to the volume above it, just when it is attached"
    for name in ("source", "root/volume/target", "root/decoy"):
        (tmp_path / name).mkdir(parents=True)
    volume = str(tmp_path / "root" / "volume")
    attach, outside = chibishim.move_mount, os.open("/proc/self/ns/mnt", os.O_RDONLY)

    def attach_and_lose(tree, fd, recursive):
        attached = attach(tree, fd, recursive)
        inside = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        chibishim.libc.setns(outside, chibishim.CLONE_NEWNS)        # where it is no mount point that is renamed
        os.rename(volume + "/target", volume + "/moved")
        os.symlink("/decoy", volume + "/target")
        chibishim.libc.setns(inside, chibishim.CLONE_NEWNS)
        return attached
    monkeypatch.setattr(chibishim, "move_mount", attach_and_lose)
    steps = chibishim.plan_mounts({"mounts": [
        {"destination": "/decoy", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/volume/target", "type": "bind", "source": str(tmp_path / "source"), "options": ["rbind", option]}]}, "/", {}, False)
    setup = chibishim.Setup(None, None, None, -1, -1)
    pid = os.fork()
    if not pid:
        try:
            chibishim.libc.unshare(chibishim.CLONE_NEWNS)
            chibishim.mount(None, "/", None, chibishim.MS_PRIVATE | chibishim.MS_REC)
            setup.rootfs = str(tmp_path / "root")
            setup.root = os.open(setup.rootfs, os.O_PATH)
            chibishim.perform(steps, setup)
            found = {m.mountpoint: m.options[0] for m in chibishim.mount_table()}
            os._exit(found[volume + "/moved"] != "ro" or found[setup.rootfs + "/decoy"] != "rw")
        finally:
            os._exit(2)
    os.close(outside)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("field, value", [
    ("scheduler", {"policy": "SCHED_OFTEN"}), ("scheduler", {"policy": "SCHED_OTHER", "nice": 20}),
    ("scheduler", {"policy": "SCHED_FIFO", "flags": ["SCHED_FLAG_NONE"]}), ("ioPriority", {"class": "IOPRIO_CLASS_BE", "priority": 8}),
    ("ioPriority", {"class": "BE"})])
def test_scheduling_that_does_not_exist_is_refused(field, value):
    with pytest.raises(chibishim.ConfigError, match="process." + field):
        chibishim.plan_scheduling({field: value})


@pytest.mark.parametrize("text, processors", [("0", (0,)), ("0-2,5", (0, 1, 2, 5)), (" 1 , 3 ", (1, 3))])
def test_processors_of_an_exec_are_a_list(text, processors):
    assert chibishim.plan_affinity({"execCPUAffinity": {"final": text}}, "final") == [("affinity", processors)]
    assert chibishim.plan_affinity({"execCPUAffinity": {"final": text}}, "initial") == []


@pytest.mark.parametrize("text", ["x", "1-", "-1", "0,,1", "0-99999", "3-1", "²", "9" * 5000])
def test_a_list_of_processors_that_is_none_is_refused(text):
    with pytest.raises(chibishim.ConfigError, match="execCPUAffinity"):
        chibishim.plan_affinity({"execCPUAffinity": {"initial": text}}, "initial")


def test_clocks_are_set_in_a_new_time_namespace_only():
    offsets = {"boottime": {"secs": 5}, "monotonic": {"secs": -1, "nanosecs": 7}}
    assert ("time_offsets", "boottime 5 0\nmonotonic -1 7\n") in plan_of(timeOffsets=offsets, namespaces=namespaces_of({"type": "time"}))
    with pytest.raises(chibishim.ConfigError, match="timeOffsets"):
        plan_of(timeOffsets=offsets)


@pytest.mark.parametrize("offset", [None, {}, {"secs": None}])
def test_a_clock_without_an_offset_stays_as_it_is(offset):
    "N12"
    assert ("time_offsets", "monotonic 0 0\n") in plan_of(timeOffsets={"monotonic": offset}, namespaces=namespaces_of({"type": "time"}))


@pytest.mark.parametrize("offset", [None, 5, {"secs": 5}])
def test_an_offset_of_a_clock_that_has_none_is_refused(offset):
    "N12"
    with pytest.raises(chibishim.ConfigError, match="linux.timeOffsets: clock 'realtime'"):
        plan_of(timeOffsets={"realtime": offset}, namespaces=namespaces_of({"type": "time"}))


def test_a_processor_of_another_name_is_linux32_or_nothing():
    assert ("personality", 8) in plan_of(personality={"domain": "LINUX32"})
    with pytest.raises(chibishim.ConfigError, match="personality"):
        plan_of(personality={"domain": "BSD"})


JOINED = {"namespaces": [{"type": "ipc"}, {"type": "mount", "path": "/proc/1/ns/mnt"}], "sysctl": {"kernel.sem": "1 2 3 4"}}


def test_a_joined_mount_namespace_is_entered_and_left_as_it_is():
    "N1, N8"
    config = {"process": {"args": ["x"]}, "root": {"path": "rootfs"}, "linux": JOINED}
    steps = [step[:2] for step in chibishim.plan(config, "/bundle", "/bundle/rootfs")]
    assert steps[:4] == [("join", "/proc/1/ns/mnt"), ("unshare", chibishim.CLONE_NEWIPC), ("sysctl", "kernel/sem"), ("chroot", "/bundle/rootfs")]


@pytest.mark.parametrize("field, value", [
    ("root.readonly", True), ("mounts", [{"destination": "/t", "type": "tmpfs"}]), ("linux.devices", [{"path": "/dev/x", "type": "p"}]),
    ("linux.maskedPaths", ["/proc/kcore"]), ("linux.readonlyPaths", ["/proc/sys"]), ("linux.rootfsPropagation", "rslave")])
def test_what_a_joined_mount_namespace_would_not_get_is_refused(field, value):
    "N1, N3, N13: it was dropped silently"
    config = {"process": {"args": ["x"]}, "root": {"path": "rootfs"}, "linux": dict(JOINED)}
    part, _, name = field.rpartition(".")
    (config[part] if part else config)[name] = value
    with pytest.raises(chibishim.ConfigError, match="config.json: %s: " % field):
        chibishim.plan(config, "/bundle", "/bundle/rootfs")


SPECIFIED_OPTIONS = """async atime bind defaults dev diratime dirsync exec iversion lazytime loud mand noatime nodev nodiratime noexec
    noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow private ratime rbind rdev rdiratime relatime remount rexec
    rnoatime rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro rprivate rrelatime rro rrw rshared rslave rstrictatime
    rsuid rsymfollow runbindable rw shared silent slave strictatime suid symfollow sync unbindable"""


@pytest.mark.parametrize("word", SPECIFIED_OPTIONS.split())
def test_no_mount_option_of_the_specification_is_left_to_the_file_system(word):
    "N13: config.md, Linux mount options"
    step, = chibishim.plan_mounts({"mounts": [{"destination": "/t", "type": "tmpfs", "options": [word]}]}, "/", {}, False)
    assert step[6] == ""


@pytest.mark.parametrize("word", ["size=1m", "nosuidd", "data=journal"])
def test_an_option_that_a_bind_mount_would_lose_is_refused(word):
    "N12, N13: mount(2) ignores the data of a bind mount"
    with pytest.raises(chibishim.ConfigError, match=r"mounts\[0\]: a bind mount .*: %s$" % word):
        chibishim.plan_mounts({"mounts": [{"destination": "/t", "source": "/", "options": ["rbind", "ro", "x-note", word]}]}, "/", {}, False)


@needs_root
@pytest.mark.parametrize("kernel", ["of today", "before 5.10"])
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_a_mount_without_symbolic_links(tmp_path, monkeypatch, kind, kernel):
    "N13: an older kernel takes the option and does nothing"
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "file").touch()
    (tmp_path / "t" / "link").symlink_to("file")
    item = {"destination": "/t", "type": kind, "source": str(tmp_path / "t"), "options": ["nosymfollow", "tmpcopyup"][:1 + (kind == "tmpfs")]}
    steps = chibishim.plan_mounts({"mounts": [item]}, "/", {}, False)
    setup = chibishim.Setup(None, None, None, -1, -1)
    setup.pid = os.getpid()             # in its cgroup already
    if tuple(map(int, os.uname().release.split(".")[:2])) < (5, 10):
        kernel = "before 5.10"
    if kernel == "before 5.10":
        monkeypatch.setattr(chibishim, "mount_flags", lambda fd: 0)

    def test():
        setup.rootfs, setup.root = str(tmp_path), os.open(tmp_path, os.O_PATH)
        if kernel == "before 5.10":
            with pytest.raises(chibishim.ContainerError, match="mount: mount at /t: option nosymfollow"):
                chibishim.perform(steps, setup)
            return
        chibishim.perform(steps, setup)
        os.stat(tmp_path / "t" / "file")
        with pytest.raises(OSError, match="symbolic links"):
            os.stat(tmp_path / "t" / "link")
    in_own_mounts(test)


BIND = {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind"]}
SHIFT = [{"containerID": 0, "hostID": 5000, "size": 10}]


def mapping_of(spaces=(), **mount):
    """What plan makes of a mount that maps ids."""
    config = config_with(namespaces=namespaces_of(*({"type": "user", "path": path} for path in spaces)))
    config["mounts"] = [dict(BIND, **mount)]
    return next(step[7] for step in chibishim.plan(config, "/bundle", "/bundle/rootfs") if step[0] == "mount")


def test_a_mount_maps_ids_by_its_own_maps_or_the_containers():
    assert mapping_of() is None
    assert mapping_of(uidMappings=SHIFT, gidMappings=SHIFT) == (((0, 5000, 10),), ((0, 5000, 10),), False)
    assert mapping_of(uidMappings=SHIFT, gidMappings=SHIFT, options=["rbind", "ridmap"])[2] is True
    assert mapping_of(["/proc/1/ns/user"], options=["rbind", "idmap"]) == ((), (), False)


@pytest.mark.parametrize("mount, word", [
    ({"options": ["rbind", "idmap"]}, "user namespace"), ({"uidMappings": SHIFT}, "go together"),
    ({"type": "tmpfs", "options": [], "uidMappings": SHIFT, "gidMappings": SHIFT}, "bind"),
    ({"uidMappings": SHIFT, "gidMappings": [{"containerID": 0, "hostID": 1}]}, "range of ids"),
    ({"options": ["rbind", "tmpcopyup"]}, "tmpfs only"), ({"type": "proc", "options": ["tmpcopyup"]}, "tmpfs only")],
    ids=["no maps", "no gids", "no bind mount", "no size", "bind mount copied", "proc copied"])
def test_a_mount_extension_that_cannot_be_is_refused(mount, word):
    with pytest.raises(chibishim.ConfigError, match=r"mounts\[0\].*" + word):
        mapping_of(**mount)


def test_a_shim_that_is_no_root_of_the_host_maps_no_ids():
    config = config_with()
    config["mounts"] = [dict(BIND, uidMappings=SHIFT, gidMappings=SHIFT)]
    with pytest.raises(chibishim.ConfigError, match="the host's root"):
        chibishim.plan(config, "/bundle", "/bundle/rootfs", True)


@needs_root
def test_a_tree_is_copied_with_all_that_its_files_have(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep" / "er").mkdir(parents=True)
    target.mkdir()
    (source / "deep" / "file").write_text("text")
    (source / "deep" / "link").symlink_to("/no/where")
    os.mkfifo(source / "fifo")
    os.mknod(source / "device", 0o020640, os.makedev(1, 3))
    os.chown(source / "deep" / "file", 5, 6)
    os.chmod(source / "deep" / "file", 0o4750)
    os.setxattr(source / "deep" / "file", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    for name in ("deep/file", "deep/er", "deep"):
        os.utime(source / name, (1, 2))
    fds = [os.open(path, os.O_PATH) for path in (source, target)]
    chibishim.copy_tree(*fds)
    for fd in fds:
        os.close(fd)

    def seen(root):
        return {path.relative_to(root): (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, int(status.st_mtime))
                for path in root.rglob("*") for status in [path.lstat()]}
    assert seen(source) == seen(target) and len(seen(target)) == 6
    copy = target / "deep" / "file"
    assert copy.read_text() == "text" and os.readlink(target / "deep" / "link") == "/no/where"
    assert os.getxattr(copy, "security.capability") == os.getxattr(source / "deep" / "file", "security.capability")


def in_own_mounts(test):
    """Runs a test in a child with a mount namespace of its own; its assertions fail here too."""
    pid = os.fork()
    if not pid:
        try:
            chibishim.libc.unshare(chibishim.CLONE_NEWNS)
            chibishim.mount(None, "/", None, chibishim.MS_PRIVATE | chibishim.MS_REC)
            chibishim.mount(None, "/", None, chibishim.MS_SHARED | chibishim.MS_REC)       # as systemd has it
            test()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@needs_root
def test_a_carriage_return_in_the_name_of_a_mount_point_ends_no_line(tmp_path):
    "L4: Create, Delete and the delete command read all of the host's mounts"
    def test():
        point = str(tmp_path / "a\rb c")
        os.mkdir(point)
        chibishim.mount("tmpfs", point, "tmpfs")
        assert point in [entry.mountpoint for entry in chibishim.mount_table()]
        chibishim.unmount_all(str(tmp_path))
        assert point not in [entry.mountpoint for entry in chibishim.mount_table()]
    in_own_mounts(test)


def test_a_process_has_a_start_time_whatever_it_is_called():
    "L4: a name that the kernel cut to 15 bytes may end within a character"
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b') 1 2\\xc3', 0, 0, 0); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with open("/proc/%d/stat" % process.pid, "rb") as file:
            assert b"() 1 2\xc3)" in file.read()
        assert 0 < chibishim.process_start_time(os.getpid()) <= chibishim.process_start_time(process.pid)
    finally:
        process.communicate()
    assert chibishim.process_start_time(process.pid) is None


@pytest.fixture
def ids_can_be_mapped(tmp_path):
    """Skips where the kernel, or the file system of the tests, cannot map ids."""
    needs_mapped_ids(str(tmp_path))


@needs_root
@pytest.mark.parametrize("kind", ["bind", "read-only bind", "overlay", "tmpfs"])
def test_a_root_file_system_has_the_owners_that_its_options_say(tmp_path, ids_can_be_mapped, kind):
    for name in ("one", "two", "upper", "work", "rootfs"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "a").write_text("a")
    (tmp_path / "two" / "b").write_text("b")
    os.chown(tmp_path / "two" / "b", 7, 7)
    maps = ["uidmap=0:100000:5,5:7000:10", "gidmap=0:200000:65536"]
    overlay = ["lowerdir=%s/two:%s/one" % (tmp_path, tmp_path), "upperdir=%s/upper" % tmp_path, "workdir=%s/work" % tmp_path]
    options = {"bind": ["rbind"], "read-only bind": ["rbind", "ro", "nodev"], "overlay": overlay, "tmpfs": ["size=64k"]}[kind]
    item = {"type": kind.split("-")[-1] if "bind" not in kind else "bind", "source": str(tmp_path / "two"), "target": "", "options": options + maps}
    rootfs = str(tmp_path / "rootfs")

    def test():
        before = os.listdir("/proc/self/fd")
        try:
            chibishim.mount_rootfs([item], rootfs)
        except OSError as error:
            if kind == "tmpfs" and "cannot" in error.strerror:
                return                  # before Linux 6.3
            raise
        assert os.listdir("/proc/self/fd") == before
        assert len([m for m in chibishim.mount_table() if m.mountpoint.startswith(rootfs)]) == 1
        owner = os.stat(rootfs + ("/b" if kind != "tmpfs" else ""))
        assert (owner.st_uid, owner.st_gid) == ((7002, 200007) if kind != "tmpfs" else (100000, 200000))
        if kind == "overlay":
            assert os.stat(rootfs + "/a").st_uid == 100000 and not os.statvfs(rootfs).f_flag & 1
        assert os.statvfs(rootfs).f_flag & 5 == (5 if kind == "read-only bind" else 0)
    in_own_mounts(test)


@needs_root
@pytest.mark.parametrize("options, word", [
    (["rbind", "uidmap=0:1:1"], "go together"), (["rbind", "uidmap=0:1", "gidmap=0:1:1"], "INSIDE:OUTSIDE:SIZE"),
    (["rbind", "uidmap=a:1:1", "gidmap=0:1:1"], "INSIDE:OUTSIDE:SIZE")])
def test_owners_that_make_no_sense_are_refused(tmp_path, options, word):
    with pytest.raises(chibishim.ContainerError, match=word):
        chibishim.mount_rootfs([{"type": "bind", "source": "/", "target": "", "options": options}], str(tmp_path))


@needs_root
def test_an_overlay_that_cannot_be_mapped_leaves_nothing(tmp_path, ids_can_be_mapped):
    (tmp_path / "rootfs").mkdir()

    def test():
        before = os.listdir("/proc/self/fd"), os.getcwd()
        with pytest.raises(OSError, match="/proc with mapped ids"):
            chibishim.mount_rootfs([{"type": "overlay", "source": "overlay", "target": "", "options": [
                "lowerdir=%s:/proc" % tmp_path, "uidmap=0:1:1", "gidmap=0:1:1"]}], str(tmp_path / "rootfs"))
        assert (os.listdir("/proc/self/fd"), os.getcwd()) == before
        assert not [m for m in chibishim.mount_table() if m.mountpoint.startswith(str(tmp_path))]
    in_own_mounts(test)


# Limits: what is written, in directories that stand in for cgroups.

DISK = {"major": 8, "minor": 16}
NAMES = {                               # of files that are there
    1: """memory.limit_in_bytes memory.memsw.limit_in_bytes memory.kmem.tcp.limit_in_bytes memory.swappiness memory.oom_control
        memory.usage_in_bytes cpu.shares cpu.cfs_period_us cpu.cfs_quota_us cpu.cfs_burst_us cpu.rt_period_us cpu.rt_runtime_us cpu.idle
        pids.max blkio.weight blkio.weight_device blkio.leaf_weight blkio.leaf_weight_device blkio.throttle.read_bps_device
        blkio.throttle.write_bps_device blkio.throttle.read_iops_device blkio.throttle.write_iops_device net_cls.classid
        net_prio.ifpriomap rdma.max""",
    2: "memory.max memory.current memory.swap.max cpu.weight cpu.max cpu.max.burst cpu.idle pids.max io.weight io.max rdma.max",
}


def pretended(directory, version, **contents):
    """A Cgroup of files that hold what they are told, or nothing."""
    for name in NAMES[version].split():
        (directory / name).write_text(contents.get(name.replace(".", "_"), ""))
    controllers = "memory cpu pids blkio net_cls net_prio rdma".split() if version == 1 else [""]
    return chibishim.LimitedCgroup(dict.fromkeys(controllers, str(directory)))


@pytest.mark.parametrize("controllers, inside, found", [("", "b", ""), ("memory", "", ""), ("memory", "a", "/a"), ("memory pids", "b", "/b"), ("memory", "b/c", "/b/c")])
def test_an_exec_enters_the_group_of_init_where_the_container_s_own_takes_nobody(tmp_path, controllers, inside, found):
    """cgroups(7), the "no internal processes" rule: systemd and Docker make groups below their own."""
    group = chibishim.Cgroup({"": str(tmp_path), "name=systemd": "/elsewhere"})
    (tmp_path / "cgroup.subtree_control").write_text(controllers + "\n")
    for name in "a", "b", "b/c":
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text("7\n" + "1234\n" * (name == inside))
    assert group.entrance(1234).directories == {"": str(tmp_path) + found, "name=systemd": "/elsewhere"}


def block_io(name, **item):
    return {"blockIO": {name: [dict(DISK, **item)]}}


@pytest.mark.parametrize("resources, version1, version2", [
    ({"memory": {"limit": 4096}}, ("memory.limit_in_bytes", "4096"), ("memory.max", "4096")),
    ({"memory": {"limit": 4096, "swap": 8192}}, ("memory.memsw.limit_in_bytes", "8192"), ("memory.swap.max", "4096")),
    ({"memory": {"limit": 4096, "swap": 4096}}, ("memory.memsw.limit_in_bytes", "4096"), ("memory.swap.max", "0")),
    ({"memory": {"limit": 4096, "swap": -1}}, ("memory.memsw.limit_in_bytes", "-1"), ("memory.swap.max", "max")),
    ({"memory": {"limit": -1}}, ("memory.memsw.limit_in_bytes", "-1"), ("memory.swap.max", "max")),
    ({"memory": {"limit": -1, "swap": 8192}}, ("memory.limit_in_bytes", "-1"), ("memory.swap.max", "8192")),
    ({"memory": {"kernelTCP": 4096}}, ("memory.kmem.tcp.limit_in_bytes", "4096"), None),
    ({"memory": {"swappiness": 0}}, ("memory.swappiness", "0"), ()),
    ({"memory": {"swappiness": 9}}, ("memory.swappiness", "9"), None),
    ({"memory": {"disableOOMKiller": True}}, ("memory.oom_control", "1"), None),
    ({"memory": {"disableOOMKiller": False}}, ("memory.oom_control", "0"), ()),
    ({"cpu": {"shares": 1024}}, ("cpu.shares", "1024"), ("cpu.weight", "100")),
    ({"cpu": {"quota": 5000, "period": 10000}}, ("cpu.cfs_quota_us", "5000"), ("cpu.max", "5000 10000")),
    ({"cpu": {"quota": -1}}, ("cpu.cfs_quota_us", "-1"), ("cpu.max", "max")),
    ({"cpu": {"burst": 700}}, ("cpu.cfs_burst_us", "700"), ("cpu.max.burst", "700")),
    ({"cpu": {"burst": 0}}, ("cpu.cfs_burst_us", "0"), ("cpu.max.burst", "0")),
    ({"cpu": {"realtimePeriod": 9}}, ("cpu.rt_period_us", "9"), None),
    ({"cpu": {"realtimeRuntime": 8}}, ("cpu.rt_runtime_us", "8"), None),
    ({"cpu": {"idle": 1}}, ("cpu.idle", "1"), ("cpu.idle", "1")),
    ({"cpu": {"idle": 0}}, ("cpu.idle", "0"), ("cpu.idle", "0")),
    ({"pids": {"limit": 7}}, ("pids.max", "7"), ("pids.max", "7")),
    ({"pids": {"limit": -1}}, ("pids.max", "max"), ("pids.max", "max")),
    ({"blockIO": {"weight": 500}}, ("blkio.weight", "500"), ("io.weight", "4950")),
    ({"blockIO": {"leafWeight": 500}}, ("blkio.leaf_weight", "500"), None),
    (block_io("weightDevice", weight=10), ("blkio.weight_device", "8:16 10"), ("io.weight", "8:16 1")),
    (block_io("weightDevice", leafWeight=10), ("blkio.leaf_weight_device", "8:16 10"), None),
    (block_io("throttleReadBpsDevice", rate=5), ("blkio.throttle.read_bps_device", "8:16 5"), ("io.max", "8:16 rbps=5")),
    (block_io("throttleWriteBpsDevice", rate=5), ("blkio.throttle.write_bps_device", "8:16 5"), ("io.max", "8:16 wbps=5")),
    (block_io("throttleReadIOPSDevice", rate=5), ("blkio.throttle.read_iops_device", "8:16 5"), ("io.max", "8:16 riops=5")),
    (block_io("throttleWriteIOPSDevice", rate=0), ("blkio.throttle.write_iops_device", "8:16 0"), ("io.max", "8:16 wiops=max")),
    ({"network": {"classID": 1048577}}, ("net_cls.classid", "1048577"), None),
    ({"network": {"priorities": [{"name": "eth0", "priority": 3}]}}, ("net_prio.ifpriomap", "eth0 3"), None),
    ({"rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 0}}}, ("rdma.max", "mlx5_1 hca_handle=3 hca_object=0"),
     ("rdma.max", "mlx5_1 hca_handle=3 hca_object=0")),
], ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_is_written_or_refused_by_name(tmp_path, resources, version1, version2, version):
    """None: there is no such limit; (): nor is one asked for."""
    wanted = (version1, version2)[version - 1]
    group = pretended(tmp_path, version, memory_max="max", cpu_max="max 100000")
    if wanted is None:
        (kind, fields), = resources.items()
        with pytest.raises(chibishim.ConfigError, match=r"linux\.resources\.%s" % kind):
            group.limit(resources)
    else:
        group.limit(resources)
        assert not wanted or (tmp_path / wanted[0]).read_text() == wanted[1]


def test_a_file_of_version_2_that_is_not_there_is_named(tmp_path):
    with pytest.raises(chibishim.ConfigError, match=r"linux\.resources\.unified: .* no memory.hihg;"):
        pretended(tmp_path, 2).limit({"unified": {"memory.hihg": "4096"}})
    assert not (tmp_path / "memory.hihg").exists()


def test_the_scheduler_bfq_has_weights_of_its_own(tmp_path):
    group = pretended(tmp_path, 2)
    (tmp_path / "io.bfq.weight").write_text("")
    group.limit({"blockIO": {"weight": 500}})
    assert ((tmp_path / "io.bfq.weight").read_text(), (tmp_path / "io.weight").read_text()) == ("500", "")


@pytest.mark.parametrize("memory, swap", [("4096", "4096"), ("max", None), ("16384", None)])
def test_swap_alone_is_counted_from_the_present_memory_limit(tmp_path, memory, swap):
    group = pretended(tmp_path, 2, memory_max=memory)
    if swap:
        group.limit({"memory": {"swap": 8192}})
        assert (tmp_path / "memory.swap.max").read_text() == swap
    else:
        with pytest.raises(chibishim.ConfigError, match="memory.swap"):
            group.limit({"memory": {"swap": 8192}})


@pytest.mark.parametrize("present, cpu, text", [
    ("5000 10000", {"quota": 7000}, "7000"), ("5000 10000", {"period": 20000}, "5000 20000"), ("max 100000", {"period": 20000}, "max 20000")])
def test_a_quota_or_a_period_alone_leaves_the_other(tmp_path, present, cpu, text):
    pretended(tmp_path, 2, cpu_max=present).limit({"cpu": cpu})
    assert (tmp_path / "cpu.max").read_text() == text


@pytest.mark.parametrize("version, name", [(1, "memory_usage_in_bytes"), (2, "memory_current")])
def test_a_limit_below_what_is_used_is_refused_if_asked(tmp_path, version, name):
    group = pretended(tmp_path, version, **{name: "5000"})
    group.limit({"memory": {"limit": 4096}})
    group.limit({"memory": {"limit": 5000, "checkBeforeUpdate": True}})
    with pytest.raises(chibishim.ConfigError, match="checkBeforeUpdate"):
        group.limit({"memory": {"limit": 4096, "checkBeforeUpdate": True}})


def test_weights_keep_what_is_least_default_and_most():
    assert [chibishim.cpu_weight(shares) for shares in (0, 2, 1024, 262144, 1 << 40)] == [1, 1, 100, 10000, 10000]
    assert [chibishim.io_weight(weight) for weight in (10, 100, 1000)] == [1, 910, 10000]
    assert not any(1 <= chibishim.io_weight(weight) <= 10000 for weight in (-1, 9, 1001))       # and the kernel refuses the rest


@pytest.mark.parametrize("resources, text", [
    ({"rdma": {"mlx": {"hcaHandles": "3"}}}, "linux.resources.rdma.mlx.hcaHandles is str"), ({"rdma": {"mlx": 3}}, "rdma.mlx is int"),
    ({"rdma": []}, "rdma is list"), ({"blockIO": {"weightDevice": {}}}, "weightDevice is dict"),
    ({"blockIO": {"weightDevice": [{"major": "8"}]}}, r"weightDevice\[0\].major is str"), ({"network": {"classID": "1"}}, "classID is str")])
def test_limits_of_wrong_types_are_named(resources, text):
    with pytest.raises(chibishim.ConfigError, match=text):
        chibishim.check_config(config_with(resources=resources))


@pytest.fixture
def limits(group):
    """A Cgroup of version 2 with controllers, and a function that reads its files."""
    made = chibishim.LimitedCgroup({"": group})
    made.create()
    missing = {"memory", "cpu", "io", "pids", "hugetlb"} - set(chibishim.read_text(group + "/cgroup.controllers").split())
    if missing:
        pytest.skip("*** cgroup version 2 has no %s here: its limits are NOT tested" % ", ".join(sorted(missing)))
    return made, lambda name: chibishim.read_text(os.path.join(group, name))


@needs_root
def test_version_2_takes_every_limit_that_it_has(limits):
    group, read = limits
    group.limit({"memory": {"limit": 1 << 26, "swap": 1 << 27, "reservation": 1 << 25}, "cpu": {
        "shares": 2048, "quota": 20000, "period": 50000, "burst": 10000}, "pids": {"limit": 50}, "blockIO": {"weight": 100},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 1 << 22}], "unified": {"memory.high": "60000000"}})
    assert [read(name) for name in ("memory.max", "memory.swap.max", "memory.low", "cpu.weight", "cpu.max", "cpu.max.burst", "pids.max",
                                    "hugetlb.2MB.max", "hugetlb.2MB.rsvd.max", "memory.high")] == [
        "67108864", "67108864", "33554432", "174", "20000 50000", "10000", "50", "4194304", "4194304", str(60000000 // 4096 * 4096)]
    name, weight = ("io.bfq.weight", "100") if group.find("io", "io.bfq.weight") else ("io.weight", "910")
    assert read(name).split() == ["default", weight]


@needs_root
def test_version_2_is_updated_up_and_down(limits):
    group, read = limits
    group.limit({"cpu": {"quota": 20000, "period": 50000, "burst": 20000, "idle": 0}, "memory": {"limit": 1 << 26, "swap": 1 << 26}})
    group.limit({"cpu": {"quota": 5000, "burst": 1000}, "memory": {"swap": 1 << 27}})
    assert (read("cpu.max"), read("cpu.max.burst"), read("memory.swap.max")) == ("5000 50000", "1000", "67108864")
    group.limit({"cpu": {"quota": -1, "idle": 1, "burst": 0}, "memory": {"limit": -1}})
    assert [read(name) for name in ("cpu.max", "cpu.idle", "memory.max", "memory.swap.max")] == ["max 50000", "1", "max", "max"]
    group.limit({"cpu": {"shares": 1024, "idle": 0}})
    assert (read("cpu.weight"), read("cpu.idle")) == ("100", "0")


@needs_root
def test_version_2_names_the_device_that_it_does_not_know(limits):
    group, _ = limits
    with pytest.raises(OSError, match="254:999 rbps=5.*io.max"):
        group.limit({"blockIO": {"throttleReadBpsDevice": [{"major": 254, "minor": 999, "rate": 5}]}})


@needs_root
def test_the_class_and_the_priorities_of_packets_are_set(tmp_path):
    def test():
        chibishim.mount("cgroup", str(tmp_path), "cgroup", 0, "net_cls,net_prio")
        group = chibishim.LimitedCgroup(dict.fromkeys(("net_cls", "net_prio"), str(tmp_path / "chibitest")))
        group.create()
        try:
            group.limit({"network": {"classID": 0x100001, "priorities": [{"name": "lo", "priority": 4}]}})
            assert (tmp_path / "chibitest" / "net_cls.classid").read_text() == "1048577\n"
            assert "lo 4\n" in (tmp_path / "chibitest" / "net_prio.ifpriomap").read_text()
        finally:
            group.remove()
            chibishim.umount(str(tmp_path), 0)
    if "net_prio" not in chibishim.read_text("/proc/cgroups") or chibishim.cgroup_mounts(chibishim.mount_table()).get("net_cls"):
        pytest.skip("*** the kernel has no network cgroups of version 1, or they are in use: they are NOT tested")
    in_own_mounts(test)


# Metrics, of directories that stand in for cgroups.

V1_FILES = {
    "memory.stat": "cache 1\nrss 2\npgpgin 3\npgpgout 4\npgfault 5\npgmajfault 6\nhierarchical_memory_limit 7\n"
                   "hierarchical_memsw_limit 8\ntotal_rss 9\ntotal_pgpgin 10\ntotal_pgmajfault 11\ntotal_inactive_file 12\nshmem 13\n",
    "memory.usage_in_bytes": "100", "memory.limit_in_bytes": "200", "memory.max_usage_in_bytes": "150", "memory.failcnt": "3",
    "memory.memsw.usage_in_bytes": "101", "memory.kmem.usage_in_bytes": "102", "memory.kmem.tcp.usage_in_bytes": "103",
    "memory.oom_control": "oom_kill_disable 1\nunder_oom 0\noom_kill 4\n", "cpuacct.usage": "5000", "cpuacct.stat": "user 7\nsystem 8\n",
    "cpuacct.usage_percpu": "2000 3000 \n", "cpu.stat": "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n", "pids.current": "4", "pids.max": "max",
    "blkio.throttle.io_service_bytes_recursive": "8:0 Read 4096\n8:0 Total 4096\nTotal 4096\n",
    "blkio.throttle.io_serviced_recursive": "8:0 Read 1\nTotal 1\n", "hugetlb.2MB.usage_in_bytes": "5", "hugetlb.2MB.max_usage_in_bytes": "6",
    "hugetlb.2MB.failcnt": "7", "hugetlb.2MB.rsvd.usage_in_bytes": "8",
    "rdma.current": "mlx hca_handle=2 hca_object=20\n", "rdma.max": "mlx hca_handle=max hca_object=30\n"}
V2_FILES = {
    "cpu.stat": "usage_usec 1\nuser_usec 2\nsystem_usec 3\ncore_sched.force_idle_usec 9\nnr_periods 4\nnr_bursts 5\nburst_usec 6\n",
    "cpu.pressure": "some avg10=0.50 avg60=1.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
    "memory.stat": "anon 1\nfile 2\nslab 3\nworkingset_refault_anon 4\npgscan 5\nthp_collapse_alloc 6\n", "memory.current": "100", "memory.max": "max",
    "memory.peak": "150", "memory.swap.current": "7", "memory.swap.max": "0", "memory.swap.peak": "8",
    "memory.events": "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n", "pids.current": "4", "pids.max": "99",
    "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n8:16 \n", "hugetlb.1GB.current": "5", "hugetlb.1GB.max": "max",
    "hugetlb.1GB.events": "max 2\n", "hugetlb.1GB.rsvd.current": "9", "rdma.current": V1_FILES["rdma.current"], "rdma.max": V1_FILES["rdma.max"]}
RDMA = {"current": [{"device": "mlx", "hca_handles": 2, "hca_objects": 20}], "limit": [{"device": "mlx", "hca_handles": 2**32 - 1, "hca_objects": 30}]}


def measured(directory, files, controllers):
    """What a reader of the message gets."""
    for name, text in files.items():
        (directory / name).write_text(text)
    version, metrics = chibishim.measure_cgroup(chibishim.Cgroup(dict.fromkeys(controllers, str(directory))))
    message = "Metrics%d" % version
    return message, chibishim.decode(message, chibishim.encode(message, metrics))


def only(message, **values):
    """A message with these values and defaults; the fields are those of the table."""
    return dict(chibishim.decode(message, b""), **values)


V1 = ("memory", "cpu", "cpuacct", "pids", "blkio", "hugetlb", "rdma")


def test_metrics_of_version_1_are_complete(tmp_path):
    tick = 10**9 // os.sysconf("SC_CLK_TCK")
    entry = {"op": "Read", "device": "", "major": 8, "minor": 0}
    with open("/proc/partitions") as file:
        entry["device"] = next(("/dev/" + line.split()[3] for line in file if line.split()[:2] == ["8", "0"]), "")
    assert measured(tmp_path, V1_FILES, V1) == ("Metrics1", {
        "pids": {"current": 4, "limit": 2**64 - 1}, "cpu": {
            "usage": {"total": 5000, "user": 7 * tick, "kernel": 8 * tick, "per_cpu": [2000, 3000]},
            "throttling": {"periods": 1, "throttled_periods": 2, "throttled_time": 3}},
        "memory": only("MemoryStat1", cache=1, rss=2, pg_pg_in=3, pg_pg_out=4, pg_fault=5, pg_maj_fault=6, hierarchical_memory_limit=7,
                       hierarchical_swap_limit=8, total_rss=9, total_pg_pg_in=10, total_pg_maj_fault=11, total_inactive_file=12,
                       usage={"usage": 100, "limit": 200, "max": 150, "failcnt": 3}, swap=only("MemoryEntry", usage=101),
                       kernel=only("MemoryEntry", usage=102), kernel_tcp=only("MemoryEntry", usage=103)),
        "blkio": only("BlkIOStat", io_service_bytes_recursive=[dict(entry, value=4096), dict(entry, op="Total", value=4096)],
                      io_serviced_recursive=[dict(entry, value=1)]),
        "rdma": RDMA, "hugetlb": [{"usage": 5, "max": 6, "failcnt": 7, "pagesize": "2MB"}], "cgroup_stats": {},
        "memory_oom_control": {"oom_kill_disable": 1, "under_oom": 0, "oom_kill": 4}})


def test_metrics_of_version_1_are_the_old_schedulers_where_it_is(tmp_path):
    files = {"blkio.io_service_bytes_recursive": "8:0 Write 1\nTotal 1\n", "blkio.sectors_recursive": "8:0 6792\n", "blkio.time_recursive": "8:0 3\n"}
    blkio = measured(tmp_path, {**V1_FILES, **files}, V1)[1]["blkio"]
    assert [[(item["op"], item["value"]) for item in blkio[name]] for name in ("io_service_bytes_recursive", "sectors_recursive", "io_time_recursive")] == [
        [("Write", 1)], [("", 6792)], [("", 3)]]


def test_metrics_of_version_2_are_complete(tmp_path):
    entry = {"major": 8, "minor": 0, "rbytes": 1, "wbytes": 2, "rios": 3, "wios": 4}
    assert measured(tmp_path, V2_FILES, [""]) == ("Metrics2", {
        "pids": {"current": 4, "limit": 99}, "cpu": only("CPUStat2", usage_usec=1, user_usec=2, system_usec=3, nr_periods=4, nr_bursts=5, burst_usec=6, psi={
            "some": {"avg10": 0.5, "avg60": 1.25, "avg300": 0.0, "total": 77}, "full": only("PSIData", total=7)}),
        "memory": only("MemoryStat2", anon=1, file=2, slab=3, workingset_refault_anon=4, pgscan=5, thp_collapse_alloc=6, usage=100,
                       usage_limit=2**64 - 1, max_usage=150, swap_usage=7, swap_limit=0, swap_max_usage=8),
        "rdma": RDMA, "io": {"usage": [entry, only("IOEntry", major=8, minor=16)], "psi": None},
        "hugetlb": [{"current": 5, "max": 2**64 - 1, "pagesize": "1GB", "failcnt": 2}],
        "memory_events": {"low": 1, "high": 2, "max": 3, "oom": 4, "oom_kill": 5, "oom_group_kill": 6}})


@pytest.mark.parametrize("controllers", [V1, [""]], ids=["version 1", "version 2"])
def test_every_part_of_the_metrics_is_there_though_the_cgroup_is_gone(tmp_path, controllers):
    """ctr, dockerd and containerd 1.6 look into them without asking whether they are there."""
    message, metrics = measured(tmp_path, {}, controllers)
    assert all(metrics[field] is not None for _, field, _ in chibishim.message_fields(message))
    if message == "Metrics1":
        assert metrics["cpu"]["usage"] and metrics["cpu"]["throttling"] and metrics["memory"]["usage"] and metrics["memory"]["swap"]


# The fields of config.json in the OCI runtime specification 1.3: schema/config-schema.json and what it refers to.
# [] is a list of objects, {} an object with names of the user's; a platform's own part stands for all in it.
SPECIFICATION = """
: ociVersion hostname domainname annotations windows solaris vm zos freebsd
root: path readonly
mounts[]: destination type source options
mounts[].uidMappings[]: containerID hostID size
mounts[].gidMappings[]: containerID hostID size
process: terminal cwd env args commandLine noNewPrivileges apparmorProfile selinuxLabel oomScoreAdj
process.consoleSize: height width
process.user: uid gid umask additionalGids username
process.rlimits[]: type soft hard
process.capabilities: bounding effective inheritable permitted ambient
process.ioPriority: class priority
process.scheduler: policy nice priority flags runtime deadline period
process.execCPUAffinity: initial final
hooks.prestart[]: path args env timeout
hooks.createRuntime[]: path args env timeout
hooks.createContainer[]: path args env timeout
hooks.startContainer[]: path args env timeout
hooks.poststart[]: path args env timeout
hooks.poststop[]: path args env timeout
linux: sysctl cgroupsPath rootfsPropagation maskedPaths readonlyPaths mountLabel netDevices intelRdt memoryPolicy
linux.uidMappings[]: containerID hostID size
linux.gidMappings[]: containerID hostID size
linux.namespaces[]: type path
linux.timeOffsets.monotonic: secs nanosecs
linux.timeOffsets.boottime: secs nanosecs
linux.devices[]: path type major minor fileMode uid gid
linux.personality: domain flags
linux.seccomp: defaultAction defaultErrnoRet architectures flags listenerPath listenerMetadata
linux.seccomp.syscalls[]: names action errnoRet
linux.seccomp.syscalls[].args[]: index value valueTwo op
linux.resources: unified
linux.resources.devices[]: allow type major minor access
linux.resources.memory: limit reservation swap kernel kernelTCP swappiness disableOOMKiller useHierarchy checkBeforeUpdate
linux.resources.cpu: shares quota burst period realtimeRuntime realtimePeriod cpus mems idle
linux.resources.pids: limit
linux.resources.blockIO: weight leafWeight
linux.resources.blockIO.weightDevice[]: major minor weight leafWeight
linux.resources.blockIO.throttleReadBpsDevice[]: major minor rate
linux.resources.blockIO.throttleWriteBpsDevice[]: major minor rate
linux.resources.blockIO.throttleReadIOPSDevice[]: major minor rate
linux.resources.blockIO.throttleWriteIOPSDevice[]: major minor rate
linux.resources.hugepageLimits[]: pageSize limit
linux.resources.network: classID
linux.resources.network.priorities[]: name priority
linux.resources.rdma{}: hcaHandles hcaObjects
"""
ROWS = [line.split(" ") for line in chibishim.OCI_FIELDS.strip().splitlines()]


def test_the_table_has_every_field_of_the_specification():
    "N13"
    wanted = {(parent + "." + name).lstrip(".") for parent, _, names in (line.partition(":") for line in SPECIFICATION.strip().splitlines())
              for name in names.split()}
    assert sorted(row[0] for row in ROWS) == sorted(wanted)
    assert all(row[2] in ("applied", "refused", "ignored") for row in ROWS)


def put(config, path, value):
    """Sets a field of OCI_FIELDS's notation, in the first element of each list."""
    *parents, last = path.split(".")
    for name in parents:
        key = name.rstrip("[]{}")
        inner = config.get(key)
        if name.endswith("[]"):
            if inner.__class__ is not list or not inner or inner[0].__class__ is not dict:
                config[key] = [{}]
            config = config[key][0]
        else:
            if inner.__class__ is not dict:
                config[key] = {}
            config = config[key]
            if name.endswith("{}"):
                config["any"] = config = {}
    config[last] = value


def config_of(path, value):
    """A config.json with a value at a path of the table."""
    config = config_with()
    put(config, path, value)
    return config


@pytest.mark.parametrize("path, type, fate", ROWS)
def test_a_field_has_the_fate_that_the_table_says(path, type, fate):
    "N12, N13"
    name = path.replace("[]", "[0]").replace("{}", ".any").replace("[", r"\[").replace(".", r"\.")
    asking = {"string": "x", "int": 1, "object": {"x": 1}}.get(type, ["x"])
    if fate == "refused":
        with pytest.raises(chibishim.ConfigError, match=name + " is not supported"):
            chibishim.check_config(config_of(path, asking))
        chibishim.check_config(config_of(path, {"string": "", "int": 0, "object": {}}.get(type, [])))
    elif fate == "applied":
        with pytest.raises(chibishim.ConfigError, match="config.json: %s" % name):
            chibishim.check_config(config_of(path, 1.5))
    else:
        chibishim.check_config(config_of(path, {"bool": True}.get(type, asking)))


LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def test_file_systems_are_mounted_with_the_label_that_is_asked_for():
    setup = chibishim.Setup(None, None, None, -1, -1)
    assert chibishim.labelled(setup, "tmpfs", "size=64k") == "size=64k"
    setup.label = LABEL
    assert chibishim.labelled(setup, "tmpfs", "size=64k") == 'size=64k,context="%s"' % LABEL
    assert chibishim.labelled(setup, "devpts", "") == 'context="%s"' % LABEL
    for type in ("proc", "sysfs", "mqueue"):
        assert chibishim.labelled(setup, type, "") == ""


def test_a_label_comes_before_all_mounts_and_has_no_quotation_mark():
    names = [step[0] for step in plan_of(mountLabel=LABEL)]
    assert names.index("mount_label") < names.index("prepare_root") and "mount_label" not in [step[0] for step in plan_of(mountLabel="")]
    with pytest.raises(chibishim.ConfigError, match="mountLabel"):
        plan_of(mountLabel='x",mode=777,y="')


def test_a_label_that_nobody_would_heed_is_refused():
    if "selinuxfs" in chibishim.read_text("/proc/filesystems"):
        pytest.skip("this kernel has SELinux")
    with pytest.raises(chibishim.ContainerError, match="linux.mountLabel .*SELinux"):
        chibishim.perform([("mount_label", LABEL)], chibishim.Setup(None, None, None, -1, -1))


JSON_VALUES = (None, True, False, 0, -1, 7, 1 << 70, 1.5, "", "x", "a\0b", "\ud800", "CAP_KILL", [], [None], [1], ["x"], [[]], [{}], {}, {"x": 1}, {"x": "y"},
               {"": None})


def test_any_configuration_is_planned_or_refused_with_a_name():
    "N12"
    source = random.Random(1)
    paths = sorted({".".join(path.split(".")[:depth]).rstrip("[]{}") for path, _, _ in ROWS for depth in range(1, 5)})
    planned = 0
    for _ in range(4000):
        config = config_with()
        for _ in range(source.randrange(1, 4)):
            put(config, source.choice(paths), json.loads(json.dumps(source.choice(JSON_VALUES))))
        config = chibishim.parse_json(json.dumps(config), "config.json")
        try:
            chibishim.check_config(config)
            chibishim.plan(config, "/bundle", "/bundle/rootfs")
            planned += 1
        except chibishim.ConfigError as error:
            assert str(error).startswith("config.json: ") and len(str(error)) > 20, error
        except Exception as error:
            raise AssertionError("%s: %r" % (json.dumps(config), error)) from error
    assert 0 < planned < 4000


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
@pytest.mark.parametrize("path", ["hostname", "process.args", "linux.sysctl", "linux.cgroupsPath"])
def test_a_string_that_the_kernel_cannot_take_is_named(path, value):
    "N12"
    config = config_with()
    put(config, path, {"process.args": [value], "linux.sysctl": {value: value}}.get(path, value))
    with pytest.raises(chibishim.ConfigError, match=path):
        chibishim.check_config(config)


def test_a_defect_during_create_leaves_nothing_behind(tmp_path, monkeypatch):
    "L5"
    def set_up(service, container, mounts, options):
        raise KeyError("nobody expects this")
        yield

    def tear_down(service, container):
        undone.append(container.id)
        yield None, 0.001
    undone, raised = [], []
    monkeypatch.setattr(chibishim.TaskService, "set_up", set_up)
    monkeypatch.setattr(chibishim.TaskService, "tear_down", tear_down)
    loop = chibishim.Loop()
    service = chibishim.TaskService(loop, None, "test")

    def create():
        request = chibishim.decode("CreateTaskRequest", chibishim.encode("CreateTaskRequest", {"id": "c", "bundle": str(tmp_path)}))
        try:
            yield from service.Create(request)
        except KeyError as error:
            raised.append(error)
    loop.spawn(create())
    loop.run(lambda: raised)
    assert undone == ["c"] and service.containers == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "nul", '{"a":}', "\x00", "[" * 100000, '{"a":' * 100000])
def test_what_is_no_configuration_is_said(tmp_path, text):
    "N12"
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(chibishim.ConfigError, match="config.json"):
        chibishim.check_config(chibishim.read_config(str(tmp_path)))


# systemd

V2 = {"": "/c"}


@pytest.mark.parametrize("path, booted, mounts, directory, scope", [
    ("a-b.slice:x:1", True, V2, "/c/a.slice/a-b.slice/x-1.scope/container", ("a-b.slice", "x-1.scope")),
    (":x:1", True, V2, "/c/system.slice/x-1.scope/container", ("system.slice", "x-1.scope")),
    ("-.slice:x:1", True, V2, "/c/x-1.scope/container", ("-.slice", "x-1.scope")),
    ("a-b.slice:x:1", False, V2, "/c/a.slice/a-b.slice/x-1.scope", None),
    ("a.slice:x:1", True, {**V2, "memory": "/m"}, "/c/a.slice/x-1.scope", None),
    ("a.slice:x:y.slice", True, V2, "/c/a.slice/y.slice", None), ("/a/1", True, V2, "/c/a/1", None)],
    ids=["scope", "default slice", "root slice", "no systemd", "version 1", "slice", "no systemd path"])
def test_a_group_is_where_systemd_puts_it_and_a_scope_if_systemd_runs(path, booted, mounts, directory, scope):
    group = chibishim.cgroup_of(path, "id", mounts, booted)
    assert (group.directories[""], group.scope) == (directory, scope)


@pytest.mark.parametrize("options, names", [
    ("rw,cpu,cpuacct", ["cpu", "cpuacct"]), ("rw,xattr,release_agent=/run/agent,name=systemd", ["name=systemd"]),
    ("ro,seclabel,cpuset,noprefix,cpuset_v2_mode,favordynmods,clone_children", ["cpuset"])])
def test_a_hierarchy_has_its_controllers_and_no_options_of_its_mount(options, names):
    line = "30 25 0:26 / /sys/fs/cgroup/x ro,nosuid shared:9 - cgroup cgroup " + options
    assert chibishim.cgroup_mounts([chibishim.MountEntry(line)]) == dict.fromkeys(names, "/sys/fs/cgroup/x")


@pytest.mark.parametrize("refused, written", [("", ["+cpu +memory +pids"]), ("+memory", ["+cpu", "+pids"])])
def test_controllers_are_enabled_at_once_or_all_that_can_be(tmp_path, monkeypatch, refused, written):
    (tmp_path / "pod").mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    texts = []

    def write(path, text):
        assert path == str(tmp_path / "cgroup.subtree_control")
        if refused and refused in text:
            raise OSError(errno.EBUSY, "refused")
        texts.append(text)
    monkeypatch.setattr(chibishim, "write_text", write)
    chibishim.delegate_controllers(str(tmp_path / "pod"))
    assert texts == written


@pytest.mark.parametrize("path", ["a.slice:..:../x", "../../x", "/", "a/../b", "a:x:1", "/a.slice:x:1"])
def test_a_group_outside_is_refused(path):
    with pytest.raises(chibishim.ConfigError, match="no group below the root|neither a path"):
        chibishim.cgroup_of(path, "id", V2, True)


def test_a_call_on_the_bus_is_laid_out_as_its_specification_says():
    assert chibishim.bus_message(2, "e.f", "/a", "b.c", "D", ("u",), (7,)) == bytes.fromhex(
        "6c010001 04000000 02000000 47000000"
        "01016f00 02000000 2f6100 0000000000"
        "02017300 03000000 622e6300 00000000"
        "03017300 01000000 4400 000000000000"
        "06017300 03000000 652e6600 00000000"
        "08016700 017500 00" "07000000")


@pytest.mark.parametrize("type, value, data", [
    ("ay", [1, 2], "02000000 0102"), ("at", [5], "08000000 00000000 0500000000000000"), ("a(sv)", [("k", ("b", 1))],
     "10000000 00000000 01000000 6b00 016200 000000 01000000"), ("a(sa(sv))", [], "00000000 00000000"), ("s", "é", "02000000 c3a900")])
def test_a_value_is_aligned_as_its_type_demands(type, value, data):
    out = bytearray()
    chibishim.bus_write(out, type, value)
    assert bytes(out) == bytes.fromhex(data)


def answer_of(kind, body=b"", fields=b""):
    """A message of a bus in the other byte order than our own."""
    import struct
    return b"B" + bytes((kind, 0, 1)) + struct.pack(">III", len(body), 9, len(fields)) + fields + bytes(-len(fields) % 8) + body


def text_of(text):
    return len(text).to_bytes(4, "big") + text + b"\0"


SIGNAL, RETURN, ERROR = answer_of(4, text_of(b"NameAcquired")), answer_of(2), answer_of(3, text_of(b"it is there"), b"\4\1s\0org.x.UnitExists\0")


@pytest.mark.parametrize("answers, text", [
    ([b"OK 1234\r\n", RETURN + SIGNAL, SIGNAL + RETURN], None), ([b"OK 1234\r\n", RETURN, SIGNAL + ERROR], "org.x.UnitExists: it is there"),
    ([b"REJECTED EXTERNAL\r\n"], "REJECTED"), ([b"OK 1234\r\n", None], "hung up"), ([b"OK 1234\r\n", b"l\2\0\1\xff\xff\xff\xff" + bytes(8)], "4294967295 bytes"),
    ([b"OK 1234\r\n", RETURN], "no answer")], ids=["return", "error", "rejected", "hung up", "too long", "silent"])
def test_a_bus_may_answer_whatever_it_likes(tmp_path, monkeypatch, answers, text):
    import socket
    import threading
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "bus"))
    listener.listen(1)
    heard, done = [], threading.Event()

    def serve():
        peer = listener.accept()[0]
        with peer:
            for answer in answers:
                heard.append(peer.recv(65536))
                if answer is None:
                    return
                peer.sendall(answer)
            done.wait(10)
    thread = threading.Thread(target=serve)
    thread.start()
    monkeypatch.setattr(chibishim, "SYSTEM_BUS", str(tmp_path / "bus"))
    if text == "no answer":
        monkeypatch.setattr(chibishim, "BUS_TIMEOUT_S", 0.2)
    loop, ended = chibishim.Loop(), []

    def calls():
        try:
            yield from chibishim.call_systemd("Member", ("s",), ("value",))
            ended.append(None)
        except chibishim.BusError as error:
            ended.append(error.strerror)
    loop.spawn(calls())
    loop.run(lambda: ended)
    done.set()
    thread.join()
    listener.close()
    assert ended == [None] if text is None else text in ended[0] and "Member" in ended[0]
    assert heard[0] == b"\0AUTH EXTERNAL %s\r\n" % str(os.geteuid()).encode().hex().encode()
    if text is None:
        assert heard[1].startswith(b"BEGIN\r\nl\1") and b"Member" in heard[2] and b"value" in heard[2]


def test_no_bus_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(chibishim, "SYSTEM_BUS", str(tmp_path / "none"))
    with pytest.raises(chibishim.BusError, match="none: Member: No such file"):
        next(chibishim.call_systemd("Member", (), ()))
