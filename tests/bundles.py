"""A container's bundle and the shim that serves it, called as containerd calls it."""

import contextlib
import glob
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time

import pytest

import chibishim
from chibishim import RpcError, decode, encode
from containerd import MODULES, SHIM

needs_busybox = pytest.mark.skipif(not os.path.exists("/bin/busybox"), reason="busybox (Debian package busybox-static) is not installed")
GROUP = "chibitest-%d" % os.getpid()    # the parent of the containers' cgroups


class Bundle:
    """One container's bundle and the shim that serves it; calls block."""

    def __init__(self, directory, arguments=("z",)):
        self.directory, self.id = directory, "c%d" % (time.time_ns() % 10**12)
        self.path = os.path.join(directory, self.id)
        os.makedirs(os.path.join(self.path, "rootfs"))
        shutil.copy(os.path.join(MODULES, "guest.wasm"), os.path.join(self.path, "rootfs"))
        self.config = chibishim.default_config("guest.wasm", list(arguments), [], [], False)
        self.config["linux"]["cgroupsPath"] = "/%s/%s" % (GROUP, self.id)
        self.output = os.path.join(directory, self.id + ".out")
        self.publisher = ""
        self.prefix = []                # a command that runs the shim's
        self.peer = None

    def command(self, action, data=b""):
        with open(os.path.join(self.path, "config.json"), "w") as file:
            json.dump(self.config, file)
        return subprocess.run([*self.prefix, SHIM, "-namespace", "test", "-address", self.directory + "/none", "-publish-binary", self.publisher,
                               "-id", self.id, "-bundle", self.path, action], input=data, cwd=self.path, capture_output=True, timeout=60)

    def start(self, data=None):
        """`data` is what start reads; by default parameters without options."""
        done = self.command("start", data or encode("BootstrapParams", {
            "instance_id": self.id, "namespace": "test", "socket_dir": self.directory}))
        assert done.returncode == 0 and done.stdout.startswith(b"unix://"), done.stderr
        self.peer = socket.socket(socket.AF_UNIX)
        self.peer.settimeout(60)
        self.peer.connect(done.stdout.decode()[len("unix://"):])
        self.reader, self.stream, self.answers = chibishim.FrameReader(), -1, []
        return self

    def send(self, method, message, service="containerd.task.v2.Task"):
        self.stream += 2
        payload = message if message.__class__ is bytes else encode(chibishim.TASK_METHODS[method][0], message)
        self.peer.sendall(chibishim.request_frame(self.stream, service, method, payload))
        return self.stream

    def receive(self):
        """The next answer: (stream, body)."""
        while not self.answers:
            data = self.peer.recv(65536)
            assert data, "the shim closed the connection"
            self.answers += [(stream, body) for stream, _, _, body in self.reader.feed(data)]
        return self.answers.pop(0)

    def call(self, method, service="containerd.task.v2.Task", **message):
        stream = self.send(method, dict(message, id=self.id), service)
        answered, body = self.receive()
        assert answered == stream
        return decode(chibishim.TASK_METHODS[method][1], chibishim.response_payload(body))

    def create(self, **message):
        return self.call("Create", bundle=self.path, stdout="file://" + self.output, **message)["pid"]

    def processes(self):
        """The daemons of this directory and what they forked."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            words = chibishim.read_text("/proc/%s/cmdline" % pid, "").split("\0")
            if self.directory + "/none" in words:
                found.append(int(pid))
        return found

    def kill(self):
        """SIGKILL for these, of which the death of one may be the others'."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def fails(self, code, method, **message):
        with pytest.raises(RpcError) as caught:
            self.call(method, **message)
        assert caught.value.args[0] == code, caught.value
        return caught.value.args[1]


def mapped_ids(bundle):
    """Gives a bundle that user namespace."""
    linux = bundle.config["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    os.chmod(bundle.directory, 0o711)
    os.chown(os.path.join(bundle.path, "rootfs"), 100000, 100000)
    return bundle


def process_of(bundle, *arguments):
    return {"value": json.dumps(dict(bundle.config["process"], args=["/guest.wasm", *arguments])).encode()}


def logger_of(bundle, text):
    """The URI of a logger that is this script."""
    path = os.path.join(bundle.directory, "logger")
    with open(path, "w") as file:
        file.write("#!/bin/sh\n" + text.replace("DIR", bundle.directory))
    os.chmod(path, 0o755)
    return "binary://%s?name=value" % path


@pytest.fixture
def bundle():
    with tempfile.TemporaryDirectory(prefix="chibi", dir="/run") as directory:
        made = Bundle(directory)
        yield made
        made.command("delete")
        made.kill()                     # an idle shim waits for minutes
        for parent in glob.glob("/sys/fs/cgroup/*/" + GROUP) + glob.glob("/sys/fs/cgroup/" + GROUP):
            os.rmdir(parent)            # fails where a container's cgroup is left
        assert all(directory not in line for line in open("/proc/self/mounts"))


@pytest.fixture
def mapped(bundle):
    """A bundle whose root is the host's user 100000."""
    return mapped_ids(bundle)


@pytest.fixture
def limited(bundle):
    """A running container with limits that leave no room for higher ones."""
    if not os.path.exists("/sys/fs/cgroup/memory"):
        pytest.skip("no cgroup version 1")
    bundle.config["linux"]["resources"] = {"memory": {"limit": 64 << 20, "swap": 64 << 20}, "cpu": {"period": 10000, "quota": 10000},
                                           "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 10, "access": "r"}]}
    bundle.start().create()
    bundle.call("Start")
    return bundle


def status_of(pid, name):
    with open("/proc/%d/status" % pid) as file:
        return next(line.split()[1:] for line in file if line.startswith(name + ":"))


def cgroup_file(bundle, controller, name):
    with open("/sys/fs/cgroup/%s/%s/%s/%s" % (controller, GROUP, bundle.id, name)) as file:
        return file.read().strip()
