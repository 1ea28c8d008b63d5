"""Chapter 21: what security.md asks of a container's process (N), seen from inside and from outside."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import time

import pytest

import chibishim
from bundles import cgroup_file, needs_busybox, status_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="*** not root: NOTHING of a container's confinement is tested")
SPACES = {"pid": "pid", "network": "net", "mount": "mnt", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup", "user": "user"}


@pytest.fixture
def native(bundle):
    """A bundle whose program is a shell of busybox; call it with a script for what that prints."""
    if not os.path.exists("/bin/busybox"):
        pytest.skip("busybox (Debian package busybox-static) is not installed")
    bundle.rootfs = os.path.join(bundle.path, "rootfs")
    os.makedirs(os.path.join(bundle.rootfs, "bin"))
    shutil.copy("/bin/busybox", os.path.join(bundle.rootfs, "bin"))
    bundle.config["process"]["env"] = ["PATH=/bin"]

    def run(script, **process):
        bundle.config["process"].update(process, args=["/bin/busybox", "sh", "-c", "exec 2>&1; " + script])
        bundle.start().create()
        bundle.call("Start")
        bundle.call("Wait")
        bundle.call("Delete")
        with open(bundle.output) as file:
            return file.read().splitlines()
    bundle.run = run
    return bundle


def space_of(pid, file):
    return os.readlink("/proc/%s/ns/%s" % (pid, file))


def test_the_namespaces_are_those_of_the_configuration(bundle):
    "N1"
    asked = {space["type"] for space in bundle.config["linux"]["namespaces"]}
    pid = bundle.start().create()
    own = {name for name, file in SPACES.items() if space_of(pid, file) != space_of("self", file)}
    assert own == asked and 0 < len(asked) < len(SPACES)


@pytest.mark.parametrize("path", ["/no/such", "/proc/self/ns/uts", "/dev/null"], ids=["missing", "of another type", "no namespace"])
def test_a_namespace_that_cannot_be_joined_makes_create_fail(bundle, path):
    "N1"
    bundle.config["linux"]["namespaces"] = [dict(space, path=path) if space["type"] == "network" else space
                                            for space in bundle.config["linux"]["namespaces"]]
    bundle.start()
    text = bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    assert "namespace path /no/such: " in text if path == "/no/such" else "join the network namespace" in text
    bundle.fails(chibishim.NOT_FOUND, "State")


@pytest.mark.parametrize("part, values, thing", [
    ("linux", {"sysctl": {"net.ipv4.chibishim": "1"}}, "/proc/sys/net/ipv4/chibishim"), ("process", {"cwd": "/guest.wasm/x"}, "/guest.wasm/x"),
    ("linux", {"devices": [{"path": "/guest.wasm/node", "type": "c"}]}, "/guest.wasm/node")], ids=["sysctl", "cwd", "device"])
def test_create_names_the_file_that_it_fails_at(bundle, part, values, thing):
    bundle.config[part].update(values)
    bundle.start()
    assert thing + ": " in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


@pytest.mark.parametrize("destination, type", [("/proc", "proc"), ("/sys", "sysfs"), ("/dev", "tmpfs")])
def test_a_symlink_of_the_image_where_proc_belongs_is_refused(bundle, destination, type):
    "N2: CVE-2019-19921, CVE-2025-31133"
    rootfs = os.path.join(bundle.path, "rootfs")
    os.makedirs(rootfs + "/proc")
    if destination == "/proc":
        os.rmdir(rootfs + "/proc")
        os.makedirs(rootfs + "/elsewhere/self/attr")
    os.symlink("/elsewhere" if destination != "/dev" else "/proc", rootfs + destination)
    bundle.config["mounts"] = [{"destination": destination, "type": type, "source": type}]
    bundle.start()
    text = bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    assert "mount" in text and ("symlink" in text or "/proc" in text)


@pytest.mark.parametrize("link, to, mount, terminal", [
    ("sys/fs/cgroup", "/proc/sys", {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}, False),
    ("dev/console", "/proc/version", {"destination": "/dev/pts", "type": "devpts", "source": "devpts"}, True)],
    ids=["cgroup", "terminal"])
def test_a_symlink_of_the_image_leads_no_mount_of_ours_into_proc(bundle, link, to, mount, terminal):
    "N2: CVE-2019-16884, CVE-2025-52565"
    path = os.path.join(bundle.path, "rootfs", link)
    os.makedirs(os.path.dirname(path))
    os.symlink(to, path)
    bundle.config["mounts"] = [{"destination": "/proc", "type": "proc", "source": "proc"}, mount]
    bundle.config["process"]["terminal"] = terminal
    if terminal:
        os.symlink("pts/ptmx", os.path.join(bundle.path, "rootfs", "dev", "ptmx"))
    bundle.output = "/dev/null"
    bundle.start()
    assert "inside /proc" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path, terminal=terminal)


def test_a_device_is_not_looked_up_twice(tmp_path, monkeypatch):
    "N2: in a volume that another container has too, a link in its place led chmod(2) to the host's files"
    victim, volume = tmp_path / "victim", tmp_path / "root" / "volume"
    victim.write_text("")
    victim.chmod(0o600)
    volume.mkdir(parents=True)
    make = os.mknod

    def make_and_lose(name, *words, **options):
        make(name, *words, **options)
        assert os.stat(name, dir_fd=options["dir_fd"]).st_mode & 0o777 == 0o666
        os.unlink(name, dir_fd=options["dir_fd"])
        os.symlink(victim, name, dir_fd=options["dir_fd"])
    monkeypatch.setattr(chibishim.os, "mknod", make_and_lose)
    setup = chibishim.Setup(None, None, None, -1, -1)
    setup.root = os.open(tmp_path / "root", os.O_PATH)
    chibishim.do_device(setup, "/volume/null", 0o020666, 1, 3, 5, 5, False)
    os.close(setup.root)
    assert (victim.stat().st_mode & 0o7777, victim.stat().st_uid) == (0o600, 0)


@pytest.mark.parametrize("target", ["/link", "./link/", "../../../../link"])
def test_a_mount_of_the_root_stays_in_it(bundle, target):
    "N2: where the snapshotter has a target in the image, and the image a link of that name"
    outside, image, layer = (os.path.join(bundle.directory, name) for name in ("outside", "image", "layer"))
    shutil.copytree(os.path.join(bundle.path, "rootfs"), image)
    for path in (outside, layer, image + outside):
        os.makedirs(path)
    open(layer + "/found", "w").close()
    os.symlink(outside, image + "/link")
    pid = bundle.start().create(rootfs=[{"type": "bind", "source": image, "options": ["rbind"]},
                                        {"type": "bind", "source": layer, "target": target, "options": ["bind", "ro"]}])
    assert os.listdir("/proc/%d/root%s" % (pid, outside)) == ["found"] and not os.listdir(outside)
    bundle.call("Delete")
    with open("/proc/self/mounts") as file:
        assert bundle.directory not in file.read()


def test_a_mount_of_the_root_has_a_target_that_is_there(bundle):
    image = os.path.join(bundle.directory, "image")
    shutil.copytree(os.path.join(bundle.path, "rootfs"), image)
    bundle.start()
    assert "none" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path, rootfs=[
        {"type": "bind", "source": image, "options": ["rbind"]}, {"type": "bind", "source": image, "target": "none", "options": ["bind"]}])
    with open("/proc/self/mounts") as file:
        assert bundle.directory not in file.read()


def test_a_mount_goes_where_its_target_leads_inside(bundle):
    "N2: CVE-2021-30465"
    rootfs = os.path.join(bundle.path, "rootfs")
    os.symlink("/../../../../../run", rootfs + "/link")
    before = os.listdir("/run")
    bundle.config["mounts"].append({"destination": "/link/mounted", "type": "tmpfs", "source": "tmpfs"})
    pid = bundle.start().create()
    with open("/proc/%d/mountinfo" % pid) as file:
        assert "/run/mounted" in [line.split()[4] for line in file]
    assert os.path.isdir(rootfs + "/run/mounted") and "mounted" not in before + os.listdir("/run")


@pytest.mark.parametrize("resolve", [chibishim.open_in_root, chibishim.walk_in_root], ids=["openat2", "component by component"])
@pytest.mark.parametrize("path, found", [
    ("file", "file"), ("/a/b/../../file", "file"), ("../../../file", "file"), ("up", "file"), ("absolute", "file"), ("a/up/file", "file"),
    ("up_and_down", "a/b"), ("loop", None), ("file/x", None), ("a/none", None), ("dangling", None), ("", "."), ("a/../..", ".")])
def test_a_path_is_resolved_inside_the_root(tmp_path, resolve, path, found):
    "N2: by openat2 and without"
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "file").write_text("inside")
    (tmp_path / "file").write_text("outside")
    for link, target in (("up", "../../file"), ("absolute", "/file"), ("a/up", "../.."), ("loop", "loop"), ("dangling", "/none"),
                         ("up_and_down", "/../a/../../a/b")):
        (root / link).symlink_to(target)
    directory = os.open(root, chibishim.O_PATH | os.O_DIRECTORY)
    try:
        if found is None:
            with pytest.raises(OSError, match="open %s in the container: " % path):
                resolve(directory, path)
            return
        fd = resolve(directory, path)
        assert os.path.samestat(os.fstat(fd), os.stat(root / found))
        os.close(fd)
    finally:
        os.close(directory)


@pytest.mark.parametrize("mode, code", [(0o711, chibishim.OK), (0o700, chibishim.UNKNOWN_ERROR)], ids=["execute", "neither"])
def test_a_native_program_need_not_be_readable(native, mode, code):
    "execve(2) asks for the x bit alone"
    os.chmod(os.path.join(native.rootfs, "bin", "busybox"), mode)
    if code == chibishim.OK:
        assert native.run("echo ran", user={"uid": 5, "gid": 6}) == ["ran"]
        return
    native.config["process"].update(user={"uid": 5, "gid": 6}, args=["/bin/busybox"])
    native.start()
    assert 'exec: "/bin/busybox": permission denied' in native.fails(code, "Create", bundle=native.path)


def test_masked_and_read_only_paths(native):
    "N3: files, directories, twice the same, absent ones"
    for name in ("secret", "rofile"):
        with open(os.path.join(native.rootfs, name), "w") as file:
            file.write("content of " + name)
    for name in ("hidden", "fixed"):
        os.makedirs(os.path.join(native.rootfs, name, "below"))
    native.config["linux"]["maskedPaths"] = ["/secret", "/hidden", "/secret", "/hidden", "/absent"]
    native.config["linux"]["readonlyPaths"] = ["/rofile", "/fixed", "/rofile", "/fixed", "/absent2"]
    lines = native.run("busybox cat /secret; busybox ls -a /hidden; busybox cat /rofile; echo; echo x > /rofile; busybox touch /fixed/below/x;"
                       "busybox touch /hidden/x; busybox ls -d /absent /absent2")
    assert lines[:3] == [".", "..", "content of rofile"]
    assert [("Read-only" in line, "No such file" in line) for line in lines[3:]] == [(True, False)] * 3 + [(False, True)] * 2, lines


@pytest.mark.parametrize("in_exec", [False, True], ids=["init", "exec"])
def test_only_stdio_is_inherited(native, in_exec):
    "N4: CVE-2024-21626"
    arguments = ["/bin/busybox", "sleep", "1000"]
    native.config["process"]["args"] = arguments
    pid = native.start().create()
    native.call("Start")
    if in_exec:
        native.call("Exec", exec_id="x", spec={"value": json.dumps(dict(native.config["process"], args=arguments)).encode()})
        pid = native.call("Start", exec_id="x")["pid"]
    assert sorted(os.listdir("/proc/%d/fd" % pid)) == ["0", "1", "2"]


def test_every_descriptor_but_those_to_keep_is_closed_and_no_number_above_the_highest(monkeypatch):
    "N4: where the C library or the kernel has no close_range(2), Python closes each number of a range"
    with open("/dev/null") as file:
        high = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, 500)
    closed = set()
    monkeypatch.setattr(chibishim.os, "closerange", lambda low, end: closed.update(range(low, end)))
    before = set(map(int, os.listdir("/proc/self/fd")))
    chibishim.close_all_but(0, 2, high)
    assert before - {0, 2, high} <= closed and not closed & {0, 2, high} and max(closed) < high
    closed.clear()
    chibishim.close_all_but()
    os.close(high)
    assert before <= closed and max(closed) == high


def test_no_working_directory_leads_out_of_the_container(native):
    "N4: through any descriptor that the runtime may have open"
    with open(native.directory + "/marker", "w") as file:
        file.write("the host's")
    native.start()
    reached = 0
    for number in range(24):
        native.config["process"].update(cwd="/proc/self/fd/%d" % number, args=[
            "/bin/busybox", "sh", "-c", "busybox cat %s%s/marker" % ("../" * 20, native.directory)])
        native.command("delete")        # writes the configuration
        try:
            native.create()
        except chibishim.RpcError:
            continue
        native.call("Start")
        assert native.call("Wait")["exit_status"] != 0
        native.call("Delete")
        reached += 1
    with open(native.output) as file:
        assert "the host's" not in file.read()
    assert reached < 24                 # some were no directories


def test_the_working_directory_is_made_and_entered(native):
    "N4"
    assert native.run("busybox pwd", cwd="/new/directory") == ["/new/directory"]


def capability_mask(*names):
    return "%016x" % sum(1 << chibishim.CAPABILITIES.index(name) for name in names)


def test_the_five_sets_of_capabilities_are_exactly_those_of_the_configuration(bundle):
    "N5"
    sets = {"bounding": ("CHOWN", "KILL", "NET_RAW", "SETUID"), "permitted": ("CHOWN", "KILL", "NET_RAW"), "effective": ("CHOWN",),
            "inheritable": ("KILL", "NET_RAW"), "ambient": ("KILL",)}
    bundle.config["process"]["capabilities"] = {name: ["CAP_" + word for word in words] for name, words in sets.items()}
    pid = bundle.start().create()
    for name, field in (("bounding", "CapBnd"), ("permitted", "CapPrm"), ("effective", "CapEff"), ("inheritable", "CapInh"), ("ambient", "CapAmb")):
        assert status_of(pid, field) == [capability_mask(*sets[name])], name


def test_without_capabilities_there_are_none(bundle):
    "N5: also for root"
    pid = bundle.start().create()
    assert [status_of(pid, field) for field in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb")] == [[capability_mask()]] * 5


@pytest.mark.parametrize("asked", [True, False])
def test_no_new_privileges_as_asked(bundle, asked):
    "N6"
    bundle.config["process"]["noNewPrivileges"] = asked
    assert status_of(bundle.start().create(), "NoNewPrivs") == [str(int(asked))]


@pytest.mark.parametrize("in_exec", [False, True], ids=["init", "exec"])
def test_a_filter_is_there_when_the_configuration_has_one(bundle, in_exec):
    "N6"
    bundle.config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["reboot"], "action": "SCMP_ACT_ERRNO"}]}
    pid = bundle.start().create()
    bundle.call("Start")
    if in_exec:
        bundle.call("Exec", exec_id="x", spec={"value": json.dumps(bundle.config["process"]).encode()})
        pid = bundle.call("Start", exec_id="x")["pid"]
    assert status_of(pid, "Seccomp") == ["2"]


def test_the_user_his_groups_and_his_umask(bundle):
    "N7"
    bundle.config["process"]["user"] = {"uid": 1234, "gid": 567, "additionalGids": [8, 9], "umask": 0o27}
    pid = bundle.start().create()
    assert (status_of(pid, "Uid"), status_of(pid, "Gid"), status_of(pid, "Groups"), status_of(pid, "Umask")) == (
        ["1234"] * 4, ["567"] * 4, ["8", "9"], ["0027"])


@pytest.mark.parametrize("user", [{"uid": -1}, {"gid": -1}, {"uid": 0xFFFFFFFF}, {"gid": 1 << 32}, {"additionalGids": [0, -2]},
                                  {"additionalGids": [1 << 40]}, {"umask": 0o7777777}], ids=str)
def test_ids_out_of_range_are_refused_and_named(user):
    "N7: -1 would leave the id as it is, root's"
    config = chibishim.default_config("guest.wasm", [], [], [], False)
    config["process"]["user"] = user
    with pytest.raises(chibishim.ConfigError, match="process.user." + list(user)[0]):
        chibishim.plan(config, "/bundle", "/bundle/rootfs")


def test_limits_parameters_and_names(native):
    "N8"
    native.config.update(hostname="within", domainname="its.domain")
    native.config["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.shmmni": "77"}
    lines = native.run("ulimit -n; ulimit -Hn; ulimit -c; busybox cat /proc/self/oom_score_adj /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni"
                       " /proc/sys/kernel/domainname; busybox hostname", oomScoreAdj=321, rlimits=[
                           {"type": "RLIMIT_NOFILE", "soft": 55, "hard": 66}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}])
    assert lines == ["55", "66", "0", "321", "1", "77", "its.domain", "within"]
    assert os.uname().nodename != "within" and chibishim.read_text("/proc/sys/kernel/shmmni") != "77"


def mounts_of(pid):
    """{mount point: (options, optional fields)}"""
    with open("/proc/%s/mountinfo" % pid) as file:
        return {line.split()[4]: (line.split()[5].split(","), line.partition(" - ")[0].split()[6:]) for line in file}


@pytest.mark.parametrize("word, field", [("", None), ("private", None), ("rslave", "master"), ("shared", "shared")])
def test_the_roots_propagation(bundle, word, field):
    "N9: and nothing that is mounted in the container is seen outside"
    bundle.config["linux"]["rootfsPropagation"] = word
    before = set(mounts_of("self"))
    pid = bundle.start().create()
    options, fields = mounts_of(pid)["/"]
    assert {name.partition(":")[0] for name in fields} <= {field, "master"} and (field != "shared" or any("shared" in name for name in fields))
    subprocess.run(["nsenter", "-t", str(pid), "-m", "--", "/guest.wasm"], capture_output=True)
    assert {point for point in set(mounts_of("self")) - before if point.startswith(bundle.directory)} == set()


def test_a_read_only_root(native):
    "N9"
    native.config["root"]["readonly"] = True
    lines = native.run("busybox touch /x; busybox mount -o remount,rw /; busybox touch /x; echo >> /guest.wasm")
    assert len(lines) == 4 and all(re.search("Read-only|not permitted|denied", line) for line in lines)


def test_limits_hold_and_the_process_is_inside_before_the_guest_runs(limited):
    "N10"
    other = limited.config["linux"]
    limited.call("Kill", signal=9)
    limited.call("Wait")
    limited.call("Delete")
    pid = limited.create()              # and not started
    for controller, name in (("memory", "memory.limit_in_bytes"), ("cpu", "cpu.cfs_quota_us"), ("pids", "cgroup.procs"), ("devices", "cgroup.procs")):
        wanted = {"memory": other["resources"]["memory"]["limit"], "cpu": other["resources"]["cpu"]["quota"]}.get(controller, pid)
        assert cgroup_file(limited, controller, name) == str(wanted)
    with open("/proc/%d/cgroup" % pid) as file:
        assert all(limited.id in line for line in file if line.split(":")[1] in ("memory", "cpu,cpuacct", "pids", "devices", "freezer"))


def test_a_limit_that_cannot_be_set_makes_create_fail(bundle):
    "N10"
    bundle.config["linux"]["resources"] = {"cpu": {"cpus": "4000-5000"}}
    bundle.start()
    assert "cpuset" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


@pytest.mark.parametrize("in_exec", [False, True], ids=["init", "exec"])
def test_the_process_is_not_dumpable(bundle, in_exec):
    "N14: so its files in /proc are root's, whoever it is"
    bundle.config["process"]["user"] = {"uid": 5, "gid": 6}
    pid = bundle.start().create()
    bundle.call("Start")
    if in_exec:
        bundle.call("Exec", exec_id="x", spec={"value": json.dumps(bundle.config["process"]).encode()})
        pid = bundle.call("Start", exec_id="x")["pid"]
    assert status_of(pid, "Uid") == ["5"] * 4
    assert os.stat("/proc/%d/environ" % pid).st_uid == os.stat("/proc/%d/mem" % pid).st_uid == 0


def test_the_process_is_not_dumpable_before_it_joins_anything(monkeypatch):
    "N14: who is in the container already could look at it meanwhile"
    seen = []

    class Library:
        def prctl(self, option, value, *rest):
            seen.append((option, value))
    monkeypatch.setattr(chibishim, "libc", Library())
    for name in ("reset_signals", "close_all_but", "send_error"):
        monkeypatch.setattr(chibishim, name, lambda *words: None)
    monkeypatch.setattr(chibishim.os, "setsid", lambda: None)
    monkeypatch.setattr(chibishim.os, "dup2", lambda *words: None)
    monkeypatch.setattr(chibishim, "container_main", lambda *words: seen.append("set-up"))

    def leave(code):
        raise KeyboardInterrupt
    monkeypatch.setattr(chibishim.os, "_exit", leave)
    with pytest.raises(KeyboardInterrupt):
        chibishim.container_child({}, [], chibishim.Setup(None, None, None, -1, -1), (0, 1, 2), False)
    assert seen[-2:] == [(chibishim.PR_SET_DUMPABLE, 0), "set-up"]


def test_the_process_is_born_in_a_user_namespace_not_dumpable():
    "N14: with the host's maps, too, an exec showed the host's root to who was in the container already"
    get_dumpable, maps = 3, [(0, 0, 65536)]
    space = chibishim.make_user_namespace(maps, maps)
    pid = os.fork()
    if not pid:
        try:
            setup = chibishim.Setup(None, None, None, -1, -1)
            setup.keep.append(space)
            chibishim.prepare_child(setup, [], (0, 1, 2), chibishim.fd_path(space), "")
            os._exit(chibishim.libc.prctl(get_dumpable, 0, 0, 0, 0))
        finally:
            os._exit(9)
    os.close(space)
    assert os.waitpid(pid, 0)[1] == 0


def identities(*paths):
    """'device:inode' of what the paths lead to, without the devices that anybody may open."""
    found = {path: os.stat(path) for path in paths if os.path.exists(path)}
    return {"%d:%d" % (status.st_dev, status.st_ino): path for path, status in found.items() if not status.st_rdev}


def files_of(pid):
    """The identities of a process's directories, descriptors and namespaces."""
    return identities(*("/proc/%d/%s" % (pid, name) for name in ("root", "cwd", "ns/mnt")),
                      *("/proc/%d/fd/%s" % (pid, fd) for fd in os.listdir("/proc/%d/fd" % pid)))


@needs_busybox
def test_nobody_inside_sees_the_host_by_an_exec(native):
    "N14: CVE-2016-9962, by a root that may trace"
    native.config["process"]["capabilities"] = {name: ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"] for name in ("bounding", "permitted", "effective")}
    native.config["process"]["args"] = ["/bin/busybox", "sh", "-c", "exec 2>/dev/null; while :; do busybox stat -L -c %d:%i "
                                        "/proc/[0-9]*/root /proc/[0-9]*/cwd /proc/[0-9]*/ns/mnt /proc/[0-9]*/fd/*; done"]
    pid = native.start().create()
    native.call("Start")
    for index in range(20):
        args = ["/guest.wasm", "z"] if index % 2 else ["/bin/busybox", "sleep", "9"]
        native.call("Exec", exec_id="x", spec={"value": json.dumps(dict(native.config["process"], args=args)).encode()})
        process = native.call("Start", exec_id="x")["pid"]
        time.sleep(0.05)
        inside = files_of(process)
        native.call("Kill", exec_id="x", signal=9)
        native.call("Wait", exec_id="x")
        native.call("Delete", exec_id="x")
    host = {**files_of(int(status_of(pid, "PPid")[0])), **identities("/", "/proc", "/dev", native.directory, native.path)}
    with open(native.output) as file:
        seen = set(file.read().split("\n"))
    assert inside.keys() & seen and host
    assert {host[identity] for identity in host.keys() & seen - files_of(pid).keys()} == set()


@needs_busybox
def test_the_engines_program_cannot_be_reached_from_inside(native):
    "N14: CVE-2019-5736, by a root with the usual capabilities"
    native.config["process"]["capabilities"] = {name: ["CAP_" + word for word in (
        "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP", "SYS_CHROOT", "KILL")]
        for name in ("bounding", "permitted", "effective")}
    native.start().create()
    native.call("Start")
    script = ("exec 2>&1; busybox readlink /proc/1/exe || echo no; (: >> /proc/1/exe) && echo written; busybox readlink /proc/1/fd/3 || echo no;"
              "busybox cat /proc/1/maps || echo no")
    spec = dict(native.config["process"], args=["/bin/busybox", "sh", "-c", script])
    native.call("Exec", exec_id="x", spec={"value": json.dumps(spec).encode()}, stdout="file://" + native.output)
    native.call("Start", exec_id="x")
    native.call("Wait", exec_id="x")
    with open(native.output) as file:
        lines = [line for line in file.read().splitlines() if line != "ready"]
    assert lines.count("no") == 3 and "written" not in lines and sum("ermission denied" in line for line in lines) == 2, lines
