"""Chapters 18 to 21: what becomes of config.json, of cgroups and of the container's process."""

import os

import pytest

import chibishim

def config_with(**linux):
    """A config.json that differs from the usual one in these fields of linux."""
    config = chibishim.default_config("guest.wasm", [], [], [], False)
    config["linux"].update(linux)
    return config


def plan_of(**linux):
    return chibishim.plan(config_with(**linux), "/bundle", "/bundle/rootfs")


def namespaces_of(*extra):
    return [{"type": name} for name in ("pid", "network", "mount", "ipc", "uts")] + list(extra)


def test_a_new_user_namespace_is_refused_not_dropped():
    with pytest.raises(chibishim.ConfigError, match="user namespace"):
        plan_of(namespaces=namespaces_of({"type": "user"}), uidMappings=[{"containerID": 0, "hostID": 100000, "size": 65536}])


@pytest.mark.parametrize("name, path", [
    ("kernel.msgmax", "kernel/msgmax"), ("net.ipv4.ip_forward", "net/ipv4/ip_forward"), ("kernel/domainname", "kernel/domainname"),
    ("net/ipv4/conf/eth0.1/rp_filter", "net/ipv4/conf/eth0.1/rp_filter"), ("fs.mqueue.msg_max", "fs/mqueue/msg_max"),
    ("net.ipv4.conf.eth0/1.rp_filter", "net/ipv4/conf/eth0.1/rp_filter")])
def test_parameters_of_own_namespaces_are_set(name, path):
    assert [step[1:3] for step in plan_of(sysctl={name: "1"}) if step[0] == "sysctl"] == [(path, "1")]


@pytest.mark.parametrize("name", [
    "kernel.panic", "kernel.core_pattern", "vm.overcommit_memory", "kernel.msgmax2", "net/../kernel/panic", "/net/x", "net", ""])
def test_parameters_of_the_host_are_refused(name):
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


@needs_root
def test_the_device_program_allows_what_the_rules_allow(group, tmp_path):
    nodes = {name: str(tmp_path / name) for name in ("kmsg", "mem")}
    os.mknod(nodes["kmsg"], 0o020600, os.makedev(1, 11))
    os.mknod(nodes["mem"], 0o020600, os.makedev(1, 1))
    chibishim.attach_device_program(group, [DENY_ALL, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}])

    def opens(path, flags):
        try:
            os.close(os.open(path, flags))
            return True
        except PermissionError:
            return False
    pid = os.fork()
    if not pid:
        try:
            chibishim.write_text(group + "/cgroup.procs", "0")
            found = [opens("/dev/null", os.O_RDWR), opens(nodes["kmsg"], os.O_RDONLY), opens(nodes["kmsg"], os.O_WRONLY),
                     opens(nodes["mem"], os.O_RDONLY)]
            os._exit(0 if found == [True, True, False, False] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
