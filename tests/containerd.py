"""A private containerd: its own root, state, socket and images, in a scratch folder."""

import os
import shutil
import signal
import subprocess
import time

from conftest import ROOT

SHIM = os.path.join(ROOT, "dist", "containerd-shim-chibiwasm-v1")
MODULES = os.path.join(ROOT, "tests", "modules")
RUNTIME = "io.containerd.chibiwasm.v1"

CONFIG = """version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{0}/sock"
[ttrpc]
  address = "{0}/sock.ttrpc"
"""


def missing():
    """Why no containerd can run here, or None."""
    if os.geteuid():
        return "containerd needs root"
    for program in ("containerd", "ctr", "runc"):
        if not shutil.which(program):
            return "%s is not installed" % program
    return None


class Containerd:
    """The daemon and its clients. Paths are short: a socket's name has 107 bytes at most."""

    def __init__(self, directory):
        self.directory = directory
        self.address = os.path.join(directory, "sock")
        self.daemon = None
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, "config.toml"), "w") as file:
            file.write(CONFIG.format(directory))

    def start(self):
        log = open(os.path.join(self.directory, "log"), "ab")
        environment = dict(os.environ, PATH=os.path.dirname(SHIM) + ":" + os.environ["PATH"])
        self.daemon = subprocess.Popen(["containerd", "-c", os.path.join(self.directory, "config.toml")],
                                       stdout=log, stderr=log, env=environment)
        log.close()
        deadline = time.monotonic() + 60
        while subprocess.run(["ctr", "-a", self.address, "version"], capture_output=True).returncode:
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("containerd did not start; see %s/log" % self.directory)
            time.sleep(0.05)

    def stop(self):
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait(60)

    def ctr(self, *words, input=b"", seconds=60, check=False, **options):
        """Runs ctr to its end; returns the CompletedProcess with bytes."""
        return subprocess.run(["ctr", "-a", self.address, *words], input=input, capture_output=True, timeout=seconds,
                              check=check, **options)

    def popen(self, *words, **options):
        """Starts ctr with pipes."""
        return subprocess.Popen(["ctr", "-a", self.address, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, **options)

    def run(self, image, id, *arguments, options=(), runtime=RUNTIME, **more):
        return self.ctr("run", "--rm", "--runtime", runtime, *options, image, id, *arguments, **more)

    def import_image(self, archive):
        self.ctr("image", "import", archive, check=True)

    def task_state(self, id):
        """The status that `ctr task ls` shows, or None."""
        for line in self.ctr("task", "ls").stdout.decode().splitlines()[1:]:
            words = line.split()
            if words[0] == id:
                return words[2]
        return None

    def task_pid(self, id):
        for line in self.ctr("task", "ls").stdout.decode().splitlines()[1:]:
            words = line.split()
            if words[0] == id:
                return int(words[1])
        return None

    def clear(self):
        """Ends every task and removes every container."""
        for id in self.ctr("task", "ls", "-q").stdout.decode().split():
            self.ctr("task", "delete", "-f", id)
        for id in self.ctr("container", "ls", "-q").stdout.decode().split():
            self.ctr("container", "rm", id)

    def shim_words(self):
        """(pid, words of the command line) of our shims that serve this daemon, and of what they forked."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open("/proc/%s/cmdline" % pid, "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if any(b"shim-chibiwasm" in word for word in words) and self.address.encode() in words:
                found.append((int(pid), words))
        return found

    def shims(self):
        """Their process ids."""
        return [pid for pid, _ in self.shim_words()]

    def leftovers(self, seconds=15, keep=None, alive=()):
        """What is still there of ended containers, after so long at most: processes, mounts,
        cgroups, bundles. A container `keep` may be there, with its processes `alive`."""
        deadline = time.monotonic() + seconds
        while True:
            found = ["process %d" % pid for pid in self.shims() if pid not in alive]
            with open("/proc/self/mounts") as mounts:
                found += ["mount " + line.split()[1] for line in mounts
                          if self.directory in line.split()[1] and not line.split()[1].endswith("/shm")
                          and "/%s/" % keep not in line.split()[1]]
            state = os.path.join(self.directory, "state", "io.containerd.runtime.v2.task", "default")
            found += ["bundle " + name for name in (os.listdir(state) if os.path.isdir(state) else [])
                      if name != keep and name[0] != "."]        # a containerd killed while it removes one leaves it by this name
            for top, directories, _ in os.walk("/sys/fs/cgroup"):
                if os.path.basename(top) == "default":
                    found += ["cgroup %s/%s" % (top, name) for name in directories if name.startswith(PREFIX) and name != keep]
                if top.count("/") > 5:
                    directories.clear()
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)


PREFIX = "chibitest-%d-" % os.getpid()  # cgroups are the machine's, whatever the daemon: others may be testing too
