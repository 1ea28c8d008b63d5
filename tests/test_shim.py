"""Chapters 22 and 23 without containerd: the shim's commands and its service, called as containerd calls them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

import chibishim
from bundles import GROUP, Bundle, cgroup_file, logger_of, mapped_ids, needs_busybox, status_of
from chibishim import RpcError, decode, encode
from conftest import needs_mapped_ids, until
from containerd import SHIM

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="*** not root: NOTHING of the shim's service is tested")


def test_info_tells_what_the_runtime_can_do():
    done = subprocess.run([SHIM, "-info"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    info = decode("RuntimeInfo", done.stdout)
    assert (info["name"], done.stderr) == ("io.containerd.chibiwasm.v1", b"")
    features = json.loads(info["features"]["value"])
    assert {"ro", "rro", "rbind", "rshared", "idmap", "tmpcopyup"} <= set(features["mountOptions"]) and "user" in features["linux"]["namespaces"]


def test_start_prints_the_address_and_writes_it(bundle):
    bundle.start()
    with open(os.path.join(bundle.path, "address")) as file:
        assert file.read() == "unix://" + bundle.peer.getpeername()


def test_a_second_start_finds_the_same_shim(bundle):
    first = bundle.start().peer.getpeername()
    assert bundle.start().peer.getpeername() == first


# how a client's options reach start: an Any, as containerd sends it up to 2.2, of the message for
# this runtime or for runc's; and in the parameters of 2.3
SHIM_CGROUP_OPTIONS = {
    "containerd.linux.runc.CreateOptions": "LinuxOptions",
    "containerd.runc.v1.Options": "RuncOptions",
    "types.containerd.io/containerd.runc.v1.Options": "RuncOptions",
}


def bare_options(bundle, any):
    return encode("Any", any)


def bootstrap_options(bundle, any):
    return encode("BootstrapParams", {"instance_id": bundle.id, "namespace": "test", "socket_dir": bundle.directory,
                                      "extensions": [{"value": any}]})


@pytest.fixture
def shim_group():
    """A cgroup in the pids hierarchy, or the unified one: its name and its directory."""
    mounts = chibishim.cgroup_mounts(chibishim.mount_table())
    if not mounts:
        pytest.skip("no cgroups are mounted here")
    name = "/%s-shim" % GROUP
    directory = mounts.get("pids", mounts.get("")) + name
    os.mkdir(directory)
    yield name, directory
    until(lambda: not processes_in(directory))
    os.rmdir(directory)


def processes_in(directory):
    with open(directory + "/cgroup.procs") as file:
        return [int(line) for line in file]


@pytest.mark.parametrize("wrap", [bare_options, bootstrap_options])
@pytest.mark.parametrize("type_url", SHIM_CGROUP_OPTIONS)
def test_the_shim_is_in_the_cgroup_of_its_options(bundle, shim_group, type_url, wrap):
    name, directory = shim_group
    any = {"type_url": type_url, "value": encode(SHIM_CGROUP_OPTIONS[type_url], {"shim_cgroup": name})}
    bundle.start(wrap(bundle, any))
    bundle.create()
    assert processes_in(directory) == [bundle.call("Connect")["shim_pid"]]      # and not the container's process
    bundle.call("Delete")
    bundle.send("Shutdown", {"id": bundle.id})


@pytest.mark.parametrize("name, reason", [("/chibitest-none", "shim_cgroup /chibitest-none: no such cgroup"),
                                          ("/..", "no group below the root")])
def test_a_shim_cgroup_that_cannot_be_makes_start_fail(bundle, name, reason):
    any = {"type_url": "containerd.runc.v1.Options", "value": encode("RuncOptions", {"shim_cgroup": name})}
    done = bundle.command("start", bootstrap_options(bundle, any))
    assert (done.returncode, done.stdout) == (1, b"") and reason in done.stderr.decode()
    assert not [file for file in os.listdir(bundle.directory) if file != bundle.id], "a socket is left"


def test_runtime_options_that_are_no_message_make_start_fail(bundle):
    any = {"type_url": "containerd.runc.v1.Options", "value": b"\x1a\x7f"}
    done = bundle.command("start", encode("Any", any))
    assert (done.returncode, done.stdout) == (1, b"") and b"options of the runtime" in done.stderr


NO_PIVOT = {"type_url": "containerd.linux.runc.CreateOptions", "value": encode("LinuxOptions", {"no_pivot_root": True})}


def unpivoted(bundle, **linux):
    """A created container of busybox whose root was moved, not pivoted: its pid, and a run inside it."""
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    os.mkdir(os.path.join(bundle.path, "rootfs", "tmp"), 0o777)
    bundle.config["linux"].update(linux)
    pid = bundle.start().create(options=NO_PIVOT)
    return pid, lambda *words: subprocess.run(["nsenter", "-t", str(pid), "-m", "-p", "/busybox", *words], capture_output=True, text=True, timeout=60)


@needs_busybox
def test_an_exec_enters_a_container_that_gave_its_controllers_to_groups_below(bundle):
    """As systemd and Docker do; nobody may enter its own group then."""
    if "pids" not in chibishim.read_text("/sys/fs/cgroup/cgroup.controllers", "").split():
        pytest.skip("*** no pids controller in cgroup version 2: such containers are NOT tested")
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    script = "cd /sys/fs/cgroup; /busybox mkdir init; echo 0 > init/cgroup.procs; echo +pids > cgroup.subtree_control; echo ready; exec /busybox sleep 100"
    bundle.config["process"]["args"] = ["/busybox", "sh", "-c", script]
    bundle.config["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]})
    bundle.config["linux"]["namespaces"].append({"type": "cgroup"})
    bundle.start().create()
    bundle.call("Start")
    until(lambda: chibishim.read_text(bundle.output, "") == "ready")
    process = dict(bundle.config["process"], args=["/busybox", "cat", "/proc/self/cgroup"])
    bundle.call("Exec", exec_id="x", spec={"value": json.dumps(process).encode()}, stdout="file://" + bundle.output)
    bundle.call("Start", exec_id="x")
    assert bundle.call("Wait", exec_id="x")["exit_status"] == 0
    assert "0::/init" in chibishim.read_text(bundle.output).splitlines()


@needs_busybox
def test_the_orphans_of_an_exec_are_reaped_though_init_is_wasm(bundle):
    "L5: as zombies they counted for pids.max until the container's end"
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    pid = bundle.start().create()
    bundle.call("Start")
    process = dict(bundle.config["process"], args=["/busybox", "sh", "-c", "(/busybox sleep 0.5 &)"])
    bundle.call("Exec", exec_id="x", spec={"value": json.dumps(process).encode()})
    bundle.call("Start", exec_id="x")
    assert bundle.call("Wait", exec_id="x")["exit_status"] == 0
    until(lambda: chibishim.read_text("/proc/%d/task/%d/children" % (pid, pid)) == "")


@needs_busybox
def test_without_pivot_root_the_container_sees_its_own_root_only(bundle):
    pid, run = unpivoted(bundle)
    assert set(run("ls", "/").stdout.split()) == set(os.listdir(os.path.join(bundle.path, "rootfs")))
    with open("/proc/%d/mountinfo" % pid) as file:
        mounted = [line.split()[4] for line in file]
    assert mounted.count("/proc") == 1 and not [path for path in mounted if path.startswith(("/run", "/var"))]
    bundle.call("Start")
    assert bundle.call("State")["status"] == chibishim.RUNNING


# the classic way out: a new root below the working directory, then up past where the old root was
ESCAPE = """
import ctypes, os, sys
namespace = os.open("/proc/%s/ns/mnt" % sys.argv[1], os.O_RDONLY)
assert ctypes.CDLL(None).setns(namespace, 0) == 0
os.mkdir("/tmp/in")
os.chroot("/tmp/in")
for _ in range(10):
    os.chdir("..")
os.chroot(".")
print(*os.listdir("/"))
"""


@needs_busybox
def test_without_pivot_root_a_second_chroot_does_not_lead_out(bundle):
    pid, _ = unpivoted(bundle)
    done = subprocess.run([sys.executable, "-c", ESCAPE, str(pid)], capture_output=True, text=True, timeout=60)
    assert set(done.stdout.split()) == set(os.listdir(os.path.join(bundle.path, "rootfs"))), done.stderr


@needs_busybox
def test_without_pivot_root_the_hosts_mounts_stay_as_they_are(bundle):
    elsewhere = bundle.directory + "/elsewhere"
    os.mkdir(elsewhere)
    bundle.prefix = ["unshare", "-m", "sh", "-c", "mount --make-rshared /; mount -t tmpfs tmpfs $0; mkdir $0/proc; mount -t proc proc $0/proc"
                     " && exec \"$@\"", elsewhere]
    pid, _ = unpivoted(bundle, rootfsPropagation="rshared")
    with open("/proc/%d/mounts" % bundle.call("Connect")["shim_pid"]) as file:
        mounted = [line.split()[1] for line in file]
    assert {"/proc", "/sys", elsewhere, elsewhere + "/proc"} <= set(mounted) and mounted.count("/") == 1
    assert os.path.exists("/proc/%d" % pid)


@needs_busybox
def test_without_pivot_root_no_whole_proc_is_left_to_mount_another(bundle):
    "a user namespace may mount a new proc where it sees one that nothing masks: mount_namespaces(7)"
    bundle.config["linux"]["maskedPaths"] = ["/proc/kcore"]
    _, run = unpivoted(bundle)
    done = run("unshare", "-U", "-r", "-m", "-p", "-f", "/busybox", "mount", "-t", "proc", "proc", "/tmp")
    assert done.returncode and "permission denied" in done.stderr, done


@needs_busybox
def test_without_pivot_root_a_user_namespace_covers_what_it_may_not_unmount(mapped):
    pid, run = unpivoted(mapped)
    assert set(run("ls", "/").stdout.split()) == set(os.listdir(os.path.join(mapped.path, "rootfs")))
    done = subprocess.run(["nsenter", "-t", str(pid), "-U", "-m", "-p", "/busybox", "umount", "/"], capture_output=True)
    assert done.returncode and "guest.wasm" in run("ls", "/").stdout


def test_foreign_options_are_no_error(bundle):
    bundle.start(encode("Any", {"type_url": "runtimeoptions.v1.Options", "value": b"\x1a\xff"}))


def test_delete_can_be_called_again_and_answers(bundle):
    "L4"
    for _ in range(2):
        done = bundle.command("delete")
        assert done.returncode == 0
        assert decode("DeleteResponse", done.stdout)["exit_status"] == 137


def test_delete_unmounts_the_root_of_a_bundle_behind_a_link(bundle):
    "L5: the kernel's table of mounts knows no links, /var/run for example"
    image, link = (os.path.join(bundle.directory, name) for name in ("image", "link"))
    os.rename(os.path.join(bundle.path, "rootfs"), image)
    os.mkdir(os.path.join(bundle.path, "rootfs"))
    os.symlink(bundle.directory, link)
    bundle.path = os.path.join(link, bundle.id)
    bundle.start().create(rootfs=[{"type": "bind", "source": image, "options": ["rbind"]}])
    bundle.call("Delete")
    with open("/proc/self/mounts") as file:
        assert bundle.directory not in file.read()


@pytest.mark.parametrize("service", ["containerd.task.v2.Task", "containerd.task.v3.Task"])
def test_the_life_of_a_task(bundle, service):
    bundle.start()
    pid = bundle.create()
    assert bundle.call("State", service)["status"] == chibishim.CREATED and os.path.exists("/proc/%d" % pid)
    bundle.call("Start", service)
    assert bundle.call("State", service)["status"] == chibishim.RUNNING
    assert [process["pid"] for process in bundle.call("Pids", service)["processes"]] == [pid]
    assert bundle.call("Connect", service)["task_pid"] == pid
    bundle.call("Kill", service, signal=9)
    assert bundle.call("Wait", service)["exit_status"] == 137
    assert bundle.call("State", service)["status"] == chibishim.STOPPED
    assert bundle.call("Delete", service)["exit_status"] == 137
    bundle.fails(chibishim.NOT_FOUND, "State")


def test_what_a_state_does_not_allow_is_refused(bundle):
    "L3"
    bundle.start().create()
    bundle.fails(chibishim.FAILED_PRECONDITION, "Pause")
    bundle.call("Start")
    bundle.fails(chibishim.FAILED_PRECONDITION, "Start")
    bundle.fails(chibishim.FAILED_PRECONDITION, "Delete")
    bundle.call("Kill", signal=9)
    bundle.call("Wait")
    bundle.fails(chibishim.NOT_FOUND, "Kill", signal=9)


def test_a_container_whose_start_failed_can_be_deleted_at_once(bundle):
    """As `ctr run --rm` does; also where its end takes time, for a client that does not read."""
    with open(os.path.join(bundle.path, "rootfs", "guest.wasm"), "w") as file:
        file.write("neither a module nor a program")
    os.mkfifo(bundle.output)
    with open(bundle.output, "r+b", buffering=0) as unread:
        unread.write(b"x")
        bundle.start().call("Create", bundle=bundle.path, stdout=bundle.output)
        assert "exec /guest.wasm" in bundle.fails(chibishim.UNKNOWN_ERROR, "Start")
        assert bundle.call("Delete")["exit_status"] != 0


def test_what_a_paused_container_does_not_allow_is_refused(bundle):
    "L3"
    bundle.start().create()
    bundle.call("Start")
    spec = {"value": json.dumps(dict(bundle.config["process"], args=["/guest.wasm", "exit"])).encode()}
    bundle.call("Exec", exec_id="before", spec=spec)
    bundle.call("Pause")
    assert bundle.call("State")["status"] == chibishim.PAUSED
    for method, message in (("Pause", {}), ("Start", {}), ("Delete", {}), ("Exec", {"exec_id": "x", "spec": spec}),
                            ("Start", {"exec_id": "before"})):
        bundle.fails(chibishim.FAILED_PRECONDITION, method, **message)
    bundle.call("Resume")
    bundle.fails(chibishim.FAILED_PRECONDITION, "Resume")
    bundle.call("Start", exec_id="before")
    assert bundle.call("Wait", exec_id="before")["exit_status"] == 7


def test_kill_ends_a_paused_container(bundle):
    bundle.start().create()
    bundle.call("Start")
    bundle.call("Pause")
    bundle.call("Kill", signal=9)
    assert bundle.call("Wait")["exit_status"] == 137
    assert bundle.call("Delete")["exit_status"] == 137


def test_delete_ends_a_paused_container_whose_shim_was_killed(bundle):
    "L4"
    pid = bundle.start().create()
    bundle.call("Start")
    bundle.call("Pause")
    os.kill(bundle.call("Connect")["shim_pid"], 9)
    assert bundle.command("delete").returncode == 0
    assert is_gone(pid)


def is_gone(pid):
    """Whether a process is dead; who should reap it may take his time."""
    return chibishim.read_text("/proc/%d/stat" % pid, "").rpartition(") ")[2][:1] in ("", "Z")


def test_every_waiter_is_answered_and_nobody_waits_meanwhile(bundle):
    bundle.start().create()
    bundle.call("Start")
    waiting = {bundle.send("Wait", {"id": bundle.id}) for _ in range(3)}
    kill = bundle.send("Kill", {"id": bundle.id, "signal": 15})
    answers = [bundle.receive() for _ in range(4)]
    assert {stream for stream, _ in answers} == waiting | {kill}
    for stream, body in answers:
        if stream in waiting:
            assert decode("WaitResponse", chibishim.response_payload(body))["exit_status"] == 143


def test_a_created_container_that_is_deleted_never_runs(bundle):
    pid = bundle.start().create()
    bundle.call("Delete")
    assert not os.path.exists("/proc/%d" % pid)
    assert os.path.getsize(bundle.output) == 0


@pytest.mark.parametrize("method", chibishim.TASK_METHODS)
def test_every_method_answers_for_an_unknown_container(bundle, method):
    bundle.start()
    stream = bundle.send(method, {"id": "nobody"})
    answered, body = bundle.receive()
    assert answered == stream
    if method not in ("Shutdown", "Create", "Expect"):
        with pytest.raises(RpcError) as caught:
            chibishim.response_payload(body)
        assert caught.value.args[0] in (chibishim.NOT_FOUND, chibishim.UNIMPLEMENTED)


def test_an_unknown_method_is_unimplemented(bundle):
    "T4"
    bundle.start().send("Frobnicate", b"")
    with pytest.raises(RpcError) as caught:
        chibishim.response_payload(bundle.receive()[1])
    assert caught.value.args[0] == chibishim.UNIMPLEMENTED


def test_a_restriction_that_is_not_applied_makes_create_fail(bundle):
    "N13"
    bundle.config["linux"]["intelRdt"] = {"closID": "x"}
    bundle.start()
    text = bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    assert "intelRdt" in text
    bundle.fails(chibishim.NOT_FOUND, "State")


def test_a_limit_that_is_too_low_for_the_process_itself_is_named(bundle):
    "N13: it died before it was ready, and nobody knew why"
    if not os.path.exists("/sys/fs/cgroup/memory"):
        pytest.skip("no cgroup version 1")
    swap = {"swap": 64 << 10} if os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes") else {}
    bundle.config["linux"]["resources"] = {"memory": {"limit": 64 << 10, **swap}}
    bundle.start()
    assert "linux.resources.memory.limit is too low" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    bundle.fails(chibishim.NOT_FOUND, "State")


def test_a_create_that_fails_when_all_is_ready_leaves_no_container(bundle):
    "L5: a lower oom_score_adj takes CAP_SYS_RESOURCE, and is the last step"
    bundle.prefix = [sys.executable, "-c", "import ctypes, os, sys; assert not ctypes.CDLL(None).prctl(%d, %d, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
                     % (chibishim.PR_CAPBSET_DROP, chibishim.CAPABILITIES.index("SYS_RESOURCE"))]
    bundle.config["process"]["oomScoreAdj"] = -1000
    bundle.start()
    assert "oom_score_adj" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    del bundle.config["process"]["oomScoreAdj"]
    bundle.command("delete")            # writes the configuration anew
    assert bundle.create()
    bundle.call("Delete")
    bundle.call("Shutdown")
    until(lambda: not bundle.processes())


def test_a_parameter_of_a_network_that_is_the_hosts_makes_create_fail(bundle):
    spaces = bundle.config["linux"]["namespaces"]
    spaces[:] = [dict(space, path="/proc/self/ns/net") if space["type"] == "network" else space for space in spaces]
    bundle.config["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}
    bundle.start()
    assert "net/ipv4/ip_forward" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


def hook_that(text, **more):
    return dict(more, path="/bin/busybox", args=["busybox", "sh", "-c", text])


def noted(bundle):
    """The lines that the hooks of hooks_of wrote, each a point, a status, a pid and a network namespace."""
    with open(os.path.join(bundle.directory, "notes")) as file:
        return [line.split() for line in file]


def update(bundle, resources):
    bundle.call("Update", resources={"value": json.dumps(resources).encode()})


@pytest.mark.parametrize("limit", [32 << 20, 128 << 20], ids=["lower", "higher"])
def test_memory_with_swap_is_updated_up_and_down(limited, limit):
    if not os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"):
        pytest.skip("the kernel does not count swap")
    update(limited, {"memory": {"limit": limit, "swap": limit}})
    for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
        assert cgroup_file(limited, "memory", name) == str(limit)


def test_a_period_too_short_for_the_old_quota_is_updated_with_it(limited):
    update(limited, {"cpu": {"period": 1000000, "quota": 2000000}})
    update(limited, {"cpu": {"period": 1000, "quota": 1000}})
    assert (cgroup_file(limited, "cpu", "cpu.cfs_period_us"), cgroup_file(limited, "cpu", "cpu.cfs_quota_us")) == ("1000", "1000")


def test_the_process_is_in_the_containers_group_of_every_hierarchy(limited):
    pid = limited.call("State")["pid"]
    with open("/proc/%d/cgroup" % pid) as file:
        groups = dict(line.rstrip().split(":", 2)[1:] for line in file)
    with open("/proc/self/mountinfo") as file:
        mounted = [line.split() for line in file]
    used = [name for name in groups if any(words[-3] == "cgroup2" if not name else words[-3] == "cgroup" and name in words[-1].split(",")
                                           for words in mounted)]
    assert used and all(groups[name] == "/%s/%s" % (GROUP, limited.id) for name in used)


def test_memory_without_a_limit_has_swap_without_one(limited):
    update(limited, {"memory": {"limit": -1}})
    assert int(cgroup_file(limited, "memory", "memory.limit_in_bytes")) > 1 << 60


def test_the_shares_of_processors_that_are_idle_and_that_burst_are_updated(limited):
    if not os.path.exists("/sys/fs/cgroup/cpu/cpu.cfs_burst_us"):
        pytest.skip("the kernel has no bursts: Linux 5.14")
    update(limited, {"cpu": {"period": 50000, "quota": 20000, "burst": 20000, "idle": 0, "shares": 512}})
    update(limited, {"cpu": {"quota": 10000, "burst": 5000, "idle": 1}})
    assert [cgroup_file(limited, "cpu", "cpu." + name) for name in ("cfs_burst_us", "idle")] == ["5000", "1"]
    update(limited, {"cpu": {"burst": 0, "idle": 0, "shares": 300}, "pids": {"limit": -1}})
    assert [cgroup_file(limited, "cpu", "cpu." + name) for name in ("cfs_burst_us", "idle", "shares")] == ["0", "0", "300"]
    assert cgroup_file(limited, "pids", "pids.max") == "max"


def test_the_rates_of_a_disk_are_updated(limited):
    disks = [line.split() for line in open("/proc/partitions").read().splitlines()[2:]]
    if not disks or not os.path.exists("/sys/fs/cgroup/blkio/blkio.throttle.read_bps_device"):
        pytest.skip("no disk, or no rates of disks")
    device = {"major": int(disks[0][0]), "minor": int(disks[0][1])}
    names = {"throttleReadBpsDevice": "read_bps", "throttleWriteBpsDevice": "write_bps", "throttleReadIOPSDevice": "read_iops",
             "throttleWriteIOPSDevice": "write_iops"}
    for rate in (5_000_000, 0):
        update(limited, {"blockIO": {field: [dict(device, rate=rate)] for field in names}})
        for name in names.values():
            text = cgroup_file(limited, "blkio", "blkio.throttle.%s_device" % name)
            assert text == ("%(major)d:%(minor)d 5000000" % device if rate else "")


def test_a_limit_that_the_system_does_not_have_is_refused_and_named(limited):
    text = limited.fails(chibishim.INVALID_ARGUMENT, "Update", resources={"value": b'{"blockIO": {"leafWeight": 10}}'})
    assert "linux.resources.blockIO.leafWeight" in text and "blkio.leaf_weight" in text


@pytest.mark.parametrize("resources", [b"", b"{", b"[]", b"null", b"7", b'{"memory": []}', b'{"blockIO": {"weightDevice": [null]}}'])
def test_an_update_that_is_none_is_an_invalid_argument(limited, resources):
    limited.fails(chibishim.INVALID_ARGUMENT, "Update", resources={"value": resources})


def test_an_update_leaves_the_devices_alone(limited):
    before = cgroup_file(limited, "devices", "devices.list")
    update(limited, {"devices": [{"allow": True, "access": "rwm"}], "pids": {"limit": 99}})
    assert cgroup_file(limited, "devices", "devices.list") == before and "c 10:* r" in before
    assert cgroup_file(limited, "pids", "pids.max") == "99"


def test_an_invalid_limit_is_refused_and_named(limited):
    assert "cpu.cfs_period_us" in limited.fails(chibishim.INVALID_ARGUMENT, "Update", resources={
        "value": json.dumps({"cpu": {"period": 1}}).encode()})


def test_the_root_of_a_user_namespace_is_not_the_hosts(mapped):
    "N1, N7, N8"
    mapped.config["process"].update(oomScoreAdj=70, rlimits=[{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}])
    pid = mapped.start().create()
    mapped.call("Start")
    assert status_of(pid, "Uid") == status_of(pid, "Gid") == ["100000"] * 4
    with open("/proc/%d/uid_map" % pid) as file:
        assert file.read().split() == ["0", "100000", "65536"]
    for name in ("user", "pid", "net", "mnt", "ipc", "uts"):
        assert os.readlink("/proc/%d/ns/%s" % (pid, name)) != os.readlink("/proc/self/ns/%s" % name)
    with open("/proc/%d/limits" % pid) as file:
        assert next(line.split()[3:5] for line in file if line.startswith("Max open files")) == ["77", "99"]
    with open("/proc/%d/oom_score_adj" % pid) as file:
        assert file.read() == "70\n"
    with open("/proc/%d/cgroup" % pid) as file:
        assert mapped.id in file.read()


def test_an_exec_enters_the_user_namespace_with_its_own_limits(mapped):
    pid = mapped.start().create()
    mapped.call("Start")
    spec = dict(mapped.config["process"], user={"uid": 5, "gid": 6, "additionalGids": [7]}, oomScoreAdj=9,
                rlimits=[{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}])
    mapped.call("Exec", exec_id="x", spec={"value": json.dumps(spec).encode()}, stdout="file://" + mapped.output)
    other = mapped.call("Start", exec_id="x")["pid"]
    assert (status_of(other, "Uid")[0], status_of(other, "Gid")[0], status_of(other, "Groups")) == ("100005", "100006", ["100007"])
    for name in ("user", "pid", "net", "mnt", "ipc", "uts"):
        assert os.readlink("/proc/%d/ns/%s" % (pid, name)) == os.readlink("/proc/%d/ns/%s" % (other, name))
    assert os.stat(mapped.output).st_uid == 100005
    with open("/proc/%d/oom_score_adj" % other) as file:
        assert file.read() == "9\n"


def test_a_user_namespace_is_joined_by_its_path(mapped):
    "N1"
    pid = mapped.start().create()
    mapped.call("Start")
    second = Bundle(mapped.directory)
    spaces = second.config["linux"]["namespaces"]
    spaces[:] = [dict(space, path="/proc/%d/ns/net" % pid) if space["type"] == "network" else space for space in spaces]
    spaces.append({"type": "user", "path": "/proc/%d/ns/user" % pid})
    os.chown(os.path.join(second.path, "rootfs"), 100000, 100000)
    try:
        other = second.start().create()
        assert status_of(other, "Uid")[0] == "100000"
        for name in ("user", "net"):
            assert os.readlink("/proc/%d/ns/%s" % (pid, name)) == os.readlink("/proc/%d/ns/%s" % (other, name))
        assert os.readlink("/proc/%d/ns/pid" % pid) != os.readlink("/proc/%d/ns/pid" % other)
        second.call("Delete")
    finally:
        second.command("delete")


@needs_busybox
def test_a_user_namespace_sees_bind_mounts_of_what_its_root_cannot_reach(mapped):
    shutil.copy("/bin/busybox", os.path.join(mapped.path, "rootfs"))
    secret = os.path.join(mapped.directory, "secret")
    os.makedirs(secret + "/shared", 0o777)
    os.chmod(secret, 0o700)
    mapped.config["mounts"].append({"destination": "/data", "type": "bind", "source": secret + "/shared", "options": ["rbind", "ro"]})
    pid = mapped.start().create()
    before = open("/proc/self/mounts").read()
    with open("/proc/%d/mountinfo" % pid) as file:
        line = next(line.split() for line in file if line.split()[4] == "/data")
    assert "ro" in line[5].split(",") and not line[6].startswith("shared")
    subprocess.run(["nsenter", "-t", str(pid), "-U", "-m", "/busybox", "mount", "-t", "tmpfs", "tmpfs", "/data"], check=True)
    assert open("/proc/self/mounts").read() == before           # nothing leaks


def test_a_missing_bind_mount_source_is_named_in_a_user_namespace_too(mapped):
    mapped.config["mounts"].append({"destination": "/data", "type": "bind", "source": "/no/such", "options": ["bind"]})
    mapped.start()
    assert "/no/such: No such file" in mapped.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=mapped.path)


@pytest.mark.parametrize("source, target", [("/etc", "/guest.wasm"), ("/etc/passwd", "/dev")])
def test_a_mount_of_a_directory_at_a_file_is_named_as_is_the_opposite(bundle, source, target):
    """The kernel says EINVAL of both."""
    bundle.config["mounts"].append({"destination": target, "type": "bind", "source": source, "options": ["bind"]})
    bundle.start()
    assert "mount %s at %s: " % (source, target) in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@pytest.fixture
def hooked(bundle):
    """A bundle with a hook at each point, that notes what it was told and where it ran."""
    os.makedirs(os.path.join(bundle.path, "rootfs", "bin"))
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs", "bin"))
    bundle.config["mounts"].append({"destination": bundle.directory, "type": "bind", "source": bundle.directory, "options": ["rbind"]})
    bundle.config["hooks"] = {point: [hook_that(
        "echo %s $(busybox sed 's/.*\"status\": \"\\([a-z]*\\)\".*\"pid\": \\([0-9]*\\).*/\\1 \\2/') $(busybox readlink /proc/self/ns/net) >> %s/notes"
        % (point, bundle.directory))] for point in HOOKS}
    return bundle


@needs_busybox
def test_hooks_run_in_order_where_and_when_they_should(hooked):
    "N11"
    host = os.readlink("/proc/self/ns/net")
    pid = hooked.start().create()
    inside = os.readlink("/proc/%d/ns/net" % pid)
    hooked.call("Start")
    hooked.call("Kill", signal=9)
    hooked.call("Wait")
    hooked.call("Delete")
    assert hooked.command("delete").returncode == 0
    statuses = ("creating", "creating", "creating", "created", "running", "stopped")
    places = (host, host, inside, inside, host, host)
    assert noted(hooked) == [[point, status, str(pid), place] for point, status, place in zip(HOOKS, statuses, places)]


@needs_busybox
def test_the_network_is_the_containers_when_the_first_hook_looks(hooked):
    hooked.config["hooks"]["prestart"] = [hook_that(
        "pid=$(busybox sed 's/.*\"pid\": \\([0-9]*\\).*/\\1/'); busybox readlink /proc/$pid/ns/net > %s/net; busybox ls /proc/$pid/root%s/rootfs/proc/1 >&2"
        % (hooked.directory, hooked.path))]
    pid = hooked.start().create()
    with open(hooked.directory + "/net") as file:
        assert file.read().strip() == os.readlink("/proc/%d/ns/net" % pid)


@needs_busybox
@pytest.mark.parametrize("point", HOOKS[:3])
@pytest.mark.parametrize("text, more, reason", [
    ("echo no reason >&2; exit 3", {}, "exit status 3: no reason"), ("exec busybox sleep 100", {"timeout": 1}, "timed out")])
def test_a_hook_that_fails_makes_create_fail(hooked, point, text, more, reason):
    "N11"
    hooked.config["hooks"][point].append(hook_that(text, **more))
    hooked.start()
    assert "%s hook /bin/busybox: %s" % (point, reason) in hooked.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=hooked.path)
    assert [words[0] for words in noted(hooked)] == list(HOOKS[:HOOKS.index(point) + 1]) + ["poststop"]
    hooked.fails(chibishim.NOT_FOUND, "State")


@needs_busybox
@pytest.mark.parametrize("point", ["prestart", "createContainer"])
def test_a_hook_may_have_more_time_than_the_kernel_can_wait_for(hooked, point):
    "N11"
    hooked.config["hooks"] = {point: [hook_that("exit 0", timeout=10**7)]}
    hooked.start().create()
    hooked.call("Delete")


@needs_busybox
def test_a_start_container_hook_that_fails_makes_start_fail(hooked):
    "N11"
    hooked.config["hooks"]["startContainer"] = [hook_that("echo no reason >&2; exit 3")]
    hooked.start().create()
    assert "exit status 3: no reason" in hooked.fails(chibishim.UNKNOWN_ERROR, "Start")
    assert hooked.call("Wait")["exit_status"] == 255


@needs_busybox
def test_delete_during_create_ends_it(hooked):
    hooked.config["hooks"]["createRuntime"] = [hook_that("echo createRuntime >> %s/notes; exec busybox sleep 100" % hooked.directory)]
    hooked.start()
    create = hooked.send("Create", {"id": hooked.id, "bundle": hooked.path})
    until(lambda: "createRuntime" in chibishim.read_text(hooked.directory + "/notes", ""))
    delete = hooked.send("Delete", {"id": hooked.id})
    answers = dict(hooked.receive() for _ in range(2))
    for stream, code in ((create, chibishim.UNKNOWN_ERROR), (delete, chibishim.NOT_FOUND)):
        with pytest.raises(RpcError) as caught:
            chibishim.response_payload(answers[stream])
        assert caught.value.args[0] == code
    del hooked.config["hooks"]["createRuntime"]
    hooked.command("delete")            # writes the configuration anew
    assert hooked.create()


@needs_busybox
def test_delete_runs_the_poststop_hooks_of_a_dead_shim_once(hooked):
    "N11, L4"
    hooked.start().create()
    os.kill(hooked.call("Connect")["shim_pid"], 9)
    for _ in range(2):
        assert hooked.command("delete").returncode == 0
    assert [words[0] for words in noted(hooked)] == list(HOOKS[:3]) + ["poststop"]


@pytest.mark.parametrize("spec", [b"", b"{", b"[]", b"null", b"{}", b'{"args": "x"}', b'{"args": []}'])
def test_an_exec_that_cannot_be_is_an_invalid_argument(bundle, spec):
    bundle.start().create()
    bundle.call("Start")
    bundle.fails(chibishim.INVALID_ARGUMENT, "Exec", exec_id="x", spec={"value": spec})
    bundle.fails(chibishim.NOT_FOUND, "State", exec_id="x")


@needs_busybox
@pytest.mark.parametrize("own", [True, False], ids=["devpts", "no devpts"])
def test_an_execs_terminal_has_its_size_from_the_start(bundle, own):
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    if own:
        bundle.config["mounts"].append({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]})
    bundle.start().create()
    bundle.call("Start")
    process = dict(bundle.config["process"], args=["/busybox", "stty", "size"], terminal=True, consoleSize={"width": 123, "height": 45})
    bundle.call("Exec", exec_id="x", spec={"value": json.dumps(process).encode()}, terminal=True, stdout="file://" + bundle.output)
    bundle.call("Start", exec_id="x")
    bundle.call("Wait", exec_id="x")
    with open(bundle.output) as file:
        assert file.read().split()[-2:] == ["45", "123"]       # after what init wrote


@needs_busybox
def test_a_terminal_multiplexer_that_is_none_is_refused(bundle):
    bundle.config["mounts"].append({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]})
    bundle.config["mounts"].append({"destination": "/dev/pts/ptmx", "type": "bind", "source": "/dev/zero", "options": ["bind"]})
    bundle.config["process"]["terminal"] = True
    bundle.start()
    assert "/dev/ptmx" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path, terminal=True, stdout="file://" + bundle.output)


@needs_busybox
def test_what_is_made_read_only_keeps_its_other_flags(bundle):
    "N3, N9"
    bundle.config["root"]["readonly"] = True
    pid = bundle.start().create()
    with open("/proc/%d/mountinfo" % pid) as file:
        options = {line.split()[4]: line.split()[5].split(",") for line in file}
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options["/proc/sys"]) and "ro" in options["/"]


def test_huge_pages_are_limited_where_the_kernel_has_them(bundle):
    bundle.config["linux"]["resources"] = {"hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "3MB", "limit": 0}]}
    bundle.start().create()
    bundle.call("Delete")
    bundle.config["linux"]["resources"] = {"hugepageLimits": [{"pageSize": "3MB", "limit": 1 << 30}]}
    bundle.command("delete")            # writes the configuration anew
    assert "hugepageLimits" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


def test_a_logger_gets_both_streams_and_is_waited_for(bundle):
    uri = logger_of(bundle, """exec 5>&-
echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*" > DIR/arguments
cat <&3 > DIR/stdout & cat <&4 > DIR/stderr; wait; sleep 0.2; echo > DIR/done""")
    bundle.config["process"]["args"] = ["/guest.wasm", "both"]
    bundle.start().call("Create", bundle=bundle.path, stdout=uri, stderr=uri)
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == 0
    bundle.call("Delete")
    texts = {name: open(os.path.join(bundle.directory, name)).read() for name in ("arguments", "stdout", "stderr", "done")}
    assert texts == {"arguments": "%s test name value\n" % bundle.id, "stdout": "ready\n", "stderr": "ready\n", "done": "\n"}


def test_a_logger_that_is_missing_makes_create_fail(bundle):
    bundle.start()
    assert "/no/such" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path, stdout="binary:///no/such")


@needs_busybox
def test_each_process_has_a_session_keyring_of_its_own(bundle):
    "root's, as other users may have but 200 keys"
    if not os.path.exists("/proc/keys"):
        pytest.skip("the kernel has no keys")
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    bundle.config["linux"]["maskedPaths"] = []
    bundle.config["process"].update(args=["/busybox", "grep", "keyring.*_ses", "/proc/keys"], user={"uid": 5, "gid": 6})
    bundle.start().create()
    bundle.call("Start")
    bundle.call("Wait")
    with open(bundle.output) as file:
        rings = [line.split() for line in file]
    assert [ring[5:7] for ring in rings] == [["0", "0"]], rings


def test_recursive_options_reach_every_mount_below(bundle):
    bundle.config["mounts"].append({"destination": "/data", "type": "bind", "source": "/sys", "options": ["rbind", "rro", "rnoatime"]})
    pid = bundle.start().create()
    with open("/proc/%d/mountinfo" % pid) as file:
        options = [line.split()[5].split(",") for line in file if (line.split()[4] + "/").startswith("/data/")]
    assert len(options) > 1 and all({"ro", "noatime"} <= set(words) for words in options)


@needs_busybox
@pytest.mark.parametrize("own", [False, True], ids=["host's ids", "user namespace"])
def test_a_tmpfs_gets_a_copy_of_what_it_covers(bundle, own):
    rootfs = os.path.join(bundle.path, "rootfs")
    shutil.copy("/bin/busybox", rootfs)
    os.makedirs(os.path.join(rootfs, "etc", "deep"))
    os.chmod(os.path.join(rootfs, "etc"), 0o751)
    with open(os.path.join(rootfs, "etc", "deep", "file"), "w") as file:
        file.write("text")
    os.symlink("deep/file", os.path.join(rootfs, "etc", "link"))
    if own:
        mapped_ids(bundle)
        for folder, _, files in os.walk(rootfs):
            for name in [folder] + [os.path.join(folder, file) for file in files]:
                os.chown(name, 100000, 100000, follow_symlinks=False)
    bundle.config["mounts"].append({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "ro", "nodev"]})
    bundle.config["process"]["args"] = ["/busybox", "sh", "-c", "/busybox cat /etc/link; /busybox stat -c ' %a %u' /etc; "
                                        "echo x > /etc/new || /busybox grep ' /etc ' /proc/mounts"]
    bundle.start().create()
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == 0
    with open(bundle.output) as file:
        text = file.read()
    assert "text 751 0\n" in text and "tmpfs /etc tmpfs ro,nodev," in text
    assert os.listdir(os.path.join(rootfs, "etc", "deep")) == ["file"]


def test_a_copy_that_does_not_fit_makes_create_fail(bundle):
    folder = os.path.join(bundle.path, "rootfs", "etc")
    os.makedirs(folder)
    with open(os.path.join(folder, "file"), "wb") as file:
        file.write(bytes(100_000))
    bundle.config["mounts"].append({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=64k"]})
    bundle.start()
    assert "tmpcopyup at /etc: No space left" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


@needs_busybox
@pytest.mark.parametrize("own", [False, True], ids=["its own maps", "the user namespace's"])
def test_a_bind_mount_shows_the_owners_of_its_maps(bundle, own):
    rows = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    folder = os.path.join(bundle.directory, "data")
    os.makedirs(folder)
    os.chown(folder, 5, 6)
    os.chmod(folder, 0o777)
    needs_mapped_ids(folder)
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    if own:
        mapped_ids(bundle)
    bundle.config["mounts"].append({"destination": "/data", "type": "bind", "source": folder, "options": ["rbind", "idmap"] if own else ["rbind"],
                                    **({} if own else {"uidMappings": rows, "gidMappings": rows})})
    bundle.config["process"]["args"] = ["/busybox", "sh", "-c", "/busybox stat -c '%u %g' /data; /busybox touch /data/new; /busybox ls -l /proc/self/fd"]
    bundle.start().create()
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == 0
    with open(bundle.output) as file:
        text = file.read()
    assert text.startswith("5 6\n" if own else "100005 100006\n") and "user:[" not in text
    assert os.path.exists(folder + "/new") == own               # the host's root has no id there


def test_a_file_system_that_cannot_map_ids_is_named(bundle):
    rows = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    bundle.config["mounts"].append({"destination": "/data", "type": "bind", "source": "/proc/sys", "options": ["rbind"],
                                    "uidMappings": rows, "gidMappings": rows})
    bundle.start()
    text = bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    assert "/proc/sys with mapped ids" in text and "change the files' owners" in text


@needs_busybox
def test_labels_of_selinux_are_applied(bundle):
    """Takes SELinux and a policy that knows the labels in CHIBISHIM_LABELS: of a process, then of its files."""
    labels = os.environ.get("CHIBISHIM_LABELS", "").split()
    if len(labels) != 2 or not os.path.exists("/sys/fs/selinux/enforce"):
        pytest.skip("*** no SELinux, or no labels in CHIBISHIM_LABELS: labels are NOT applied in any test")
    rootfs = os.path.join(bundle.path, "rootfs")
    shutil.copy("/bin/busybox", rootfs)
    bundle.config["mounts"] += [{"destination": "/t", "type": "tmpfs", "source": "tmpfs"}, {"destination": "/q", "type": "mqueue", "source": "mqueue"}]
    bundle.config["linux"].update(mountLabel=labels[1], maskedPaths=["/proc/scsi"])
    bundle.config["process"].update(selinuxLabel=labels[0], args=["/busybox", "cat", "/proc/self/attr/current"],
                                    noNewPrivileges=False)          # it takes more of a policy
    pid = bundle.start().create()
    with open("/proc/%d/attr/exec" % pid) as file:
        assert file.read().strip("\0\n") == labels[0]
    for path in ("/t", "/q", "/proc/scsi")[:2 + os.path.isdir("/proc/scsi")]:
        assert os.getxattr("/proc/%d/root%s" % (pid, path), "security.selinux").strip(b"\0").decode() == labels[1]
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == 0
    with open(bundle.output) as file:
        assert file.read().strip("\0\n") == labels[0]


def test_a_wasm_guest_has_its_label_of_selinux(bundle):
    labels = os.environ.get("CHIBISHIM_LABELS", "").split()
    if len(labels) != 2 or not os.path.exists("/sys/fs/selinux/enforce"):
        pytest.skip("*** no SELinux, or no labels in CHIBISHIM_LABELS: labels are NOT applied in any test")
    bundle.config["process"]["selinuxLabel"] = labels[0]
    pid = bundle.start().create()
    with open("/proc/%d/attr/current" % pid) as file:
        assert file.read().strip("\0\n") == labels[0]


@pytest.fixture
def scoped(bundle):
    """A container in a slice of systemd, with limits; its scope is gone in the end."""
    if not os.path.isdir("/run/systemd/system") or not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        pytest.skip("*** no systemd with cgroup version 2: scopes are NOT tested")
    bundle.slice = "chibitest-%s.slice" % bundle.id
    bundle.group = "/sys/fs/cgroup/chibitest.slice/%s/shim-%s.scope" % (bundle.slice, bundle.id)
    bundle.config["linux"].update(cgroupsPath="%s:shim:%s" % (bundle.slice, bundle.id),
                                  resources={"memory": {"limit": 64 << 20}, "pids": {"limit": 50}, "devices": [{"allow": False, "access": "rwm"}]})
    yield bundle
    bundle.command("delete")
    until(lambda: not os.path.exists(bundle.group))
    assert b"not be found" in systemctl("status", os.path.basename(bundle.group)).stderr
    systemctl("stop", "chibitest.slice")


def systemctl(*words):
    return subprocess.run(["systemctl", *words], capture_output=True)


def scoped_limits(bundle):
    return [chibishim.read_text("%s/container/%s" % (bundle.group, name), "gone") for name in ("memory.max", "pids.max")]


@pytest.mark.parametrize("own", [False, True], ids=["host's ids", "user namespace"])
def test_a_container_of_systemds_keeps_its_limits_whatever_happens_to_the_slice(scoped, own):
    if own:
        mapped_ids(scoped)
    pid = scoped.start().create()
    scoped.call("Start")
    assert [process["pid"] for process in scoped.call("Pids")["processes"]] == [pid]
    with open("/proc/%d/cgroup" % pid) as file:
        assert file.read() == "0::%s/container\n" % scoped.group[len("/sys/fs/cgroup"):]
    for words in (["set-property", "--runtime", scoped.slice, "CPUWeight=50"], ["daemon-reload"], ["daemon-reexec"]):
        assert systemctl(*words).returncode == 0
        time.sleep(0.5)
        assert scoped_limits(scoped) == [str(64 << 20), "50"]
    assert chibishim.read_text(scoped.group + "/pids.max") == "max"
    update(scoped, {"memory": {"limit": 96 << 20}})
    assert scoped_limits(scoped)[0] == str(96 << 20)
    scoped.call("Kill", signal=9)
    assert scoped.call("Wait")["exit_status"] == 137
    time.sleep(0.5)
    assert "oom_kill 0" in chibishim.read_text(scoped.group + "/container/memory.events")      # can be read yet
    scoped.call("Delete")


def test_a_container_of_systemds_is_made_again_at_once(scoped):
    scoped.start()
    for _ in range(5):
        scoped.create()
        scoped.call("Start")
        scoped.call("Kill", signal=9)
        scoped.call("Wait")
        scoped.call("Delete")


def test_a_container_of_systemds_whose_limits_are_refused_leaves_no_scope(scoped):
    scoped.config["linux"]["resources"]["blockIO"] = {"leafWeight": 10}
    scoped.start()
    assert "leafWeight" in scoped.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=scoped.path)


def test_a_slice_that_systemd_refuses_is_named(scoped):
    scoped.config["linux"]["cgroupsPath"] = "bad name.slice:shim:" + scoped.id
    scoped.start()
    assert "StartTransientUnit" in scoped.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=scoped.path)


def test_a_killed_shim_leaves_no_scope(scoped):
    scoped.start().create()
    scoped.call("Start")
    os.kill(scoped.call("Connect")["shim_pid"], 9)


@pytest.mark.parametrize("later, status", [(0, -9), (1, None)], ids=["init", "another"])
def test_delete_kills_init_and_nobody_who_has_its_pid_now(bundle, later, status):
    "L4"
    process = subprocess.Popen(["sleep", "100"])
    try:
        with open(os.path.join(bundle.path, "init.pid"), "w") as file:
            file.write("init %d %d\n" % (process.pid, chibishim.process_start_time(process.pid) - later))
        assert bundle.command("delete").returncode == 0
        assert process.poll() == status
    finally:
        process.kill()
        process.wait()


def test_the_guest_dies_with_its_shim(bundle):
    "L4"
    pid = bundle.start().create()
    bundle.call("Start")
    os.kill(bundle.call("Connect")["shim_pid"], 9)
    until(lambda: is_gone(pid))
    assert bundle.command("delete").returncode == 0


def test_a_shim_without_containers_ends_at_shutdown(bundle):
    bundle.start().send("Shutdown", {"id": bundle.id})
    until(lambda: not bundle.processes())
    assert not os.path.exists(bundle.peer.getpeername())


# -- what a death at a bad moment left (L4, L5): each was found by soak.py --

@pytest.mark.parametrize("used", [False, True], ids=["before Create", "between Delete and Shutdown"])
def test_a_shim_ends_when_containerd_removes_its_bundle_and_wants_nothing_more(bundle, used):
    "L5: a containerd that gives up during `start`, or dies after Delete, sends no Shutdown"
    bundle.start()
    if used:
        bundle.create()
        bundle.call("Delete")
    time.sleep(0.2)
    assert bundle.processes()
    shutil.rmtree(bundle.path)
    until(lambda: not bundle.processes())
    assert not os.path.exists(bundle.peer.getpeername())
    os.makedirs(bundle.path)            # for the fixture


def test_a_shim_with_a_container_does_not_need_its_first_bundle(bundle):
    "L12: a pod goes on without its first container"
    bundle.start()
    second = Bundle(bundle.directory)
    second.command("delete")            # writes the configuration
    second.peer, second.reader, second.stream, second.answers = bundle.peer, bundle.reader, bundle.stream, bundle.answers
    second.create()
    shutil.rmtree(bundle.path)
    time.sleep(chibishim.BUNDLE_CHECK_S + 1)
    assert second.call("State")["status"] == chibishim.CREATED
    second.call("Delete")
    os.makedirs(bundle.path)            # for the fixture


def test_connect_is_refused_for_what_is_not_there(bundle):
    "L9: containerd 1.6 asks only this after a restart, and keeps what answers"
    bundle.start().fails(chibishim.NOT_FOUND, "Connect")
    pid = bundle.create()
    assert bundle.call("Connect")["task_pid"] == pid
    bundle.call("Delete")
    bundle.fails(chibishim.NOT_FOUND, "Connect")


def test_connect_without_an_id_tells_the_shims_pid(bundle):
    "as runc's shim, whose clients do not always know a container"
    stream = bundle.start().send("Connect", {"id": ""})
    answered, body = bundle.receive()
    answer = decode("ConnectResponse", chibishim.response_payload(body))
    assert answered == stream and answer["task_pid"] == 0
    with open("/proc/%d/comm" % answer["shim_pid"]) as file:
        assert file.read() == "chibishim\n"


def test_the_cgroup_is_recorded_before_it_is_made(tmp_path, monkeypatch):
    "L4"
    container = chibishim.Container("c", str(tmp_path))
    container.config = {"linux": {"cgroupsPath": "/%s/c" % GROUP}}

    def create(cgroup):
        with open(tmp_path / "init.pid") as file:
            assert file.read().splitlines() == ["cgroup %s %s" % pair for pair in cgroup.directories.items()]
        raise InterruptedError
    monkeypatch.setattr(chibishim.Cgroup, "create", create)
    with pytest.raises(InterruptedError):
        list(chibishim.TaskService(None, None, "test").make_cgroup(container, False))


def test_delete_removes_the_cgroup_of_a_shim_that_died_before_its_first_process(bundle):
    "L4"
    hierarchy = next(line.split()[1] for line in open("/proc/self/mounts") if line.split()[2] in ("cgroup", "cgroup2"))
    directory = os.path.join(hierarchy, GROUP, bundle.id)
    os.makedirs(directory)
    chibishim.record(bundle.path, ["cgroup any " + directory])
    assert bundle.command("delete").returncode == 0
    assert not os.path.exists(directory)


def test_delete_removes_a_dead_socket_whose_address_was_not_written(bundle, monkeypatch):
    "L4"
    monkeypatch.setattr(chibishim, "SOCKET_DIRECTORY", bundle.directory)
    flags = {"address": bundle.directory + "/none", "namespace": "test", "id": bundle.id}
    path = chibishim.socket_path(bundle.directory, flags["address"], "test", bundle.id)
    socket.socket(socket.AF_UNIX).bind(path)
    chibishim.remove_dead_socket(bundle.path, flags)
    assert not os.path.exists(path)


def test_another_delete_may_remove_the_dead_socket_first(bundle, monkeypatch):
    "L4: the containers of a pod are cleaned up at the same time"
    path = os.path.join(bundle.directory, "s")
    socket.socket(socket.AF_UNIX).bind(path)
    chibishim.write_text(os.path.join(bundle.path, "address"), "unix://" + path)
    unlink = os.unlink

    def unlink_twice(path):
        unlink(path)
        unlink(path)
    monkeypatch.setattr(chibishim.os, "unlink", unlink_twice)
    chibishim.remove_dead_socket(bundle.path, {})
    assert not os.path.exists(path)


@pytest.mark.parametrize("alive", [True, False])
def test_delete_leaves_the_socket_of_a_shim_that_answers_and_only_that(bundle, alive):
    "L4, L12: a child that a dead shim had just forked holds its socket for a moment"
    bundle.start()
    path = bundle.peer.getpeername()
    if not alive:
        bundle.kill()
        until(lambda: not bundle.processes())
        os.unlink(path)
        holder = socket.socket(socket.AF_UNIX)
        holder.bind(path)
        holder.listen()
        threading.Timer(0.2, holder.close).start()
    assert bundle.command("delete").returncode == 0
    assert os.path.exists(path) == alive


@needs_busybox
@pytest.mark.parametrize("terminal", [False, True], ids=["stdin", "terminal"])
def test_a_flood_through_the_shim_stalls_nobody(bundle, terminal):
    "T7"
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    bundle.config["process"].update(args=["/busybox", "yes"] if terminal else ["/busybox", "dd", "of=/dev/null", "bs=1M"], terminal=terminal)
    source = os.path.join(bundle.path, "stdin")
    os.mkfifo(source)
    bundle.output = "/dev/null"
    bundle.start().create(terminal=terminal, stdin="" if terminal else source)
    bundle.call("Start")
    flood = None if terminal else subprocess.Popen(["/bin/busybox", "dd", "if=/dev/zero", "of=" + source, "bs=1M"], stderr=subprocess.DEVNULL)
    try:
        times = []
        for _ in range(40):
            began = time.monotonic()
            assert bundle.call("State")["status"] == chibishim.RUNNING
            times.append(time.monotonic() - began)
            time.sleep(0.01)
    finally:
        bundle.call("Kill", signal=9)
        bundle.call("Wait")
        bundle.call("Delete")
        if flood:
            flood.kill()
            flood.wait()
    assert sorted(times)[30] < 0.25
