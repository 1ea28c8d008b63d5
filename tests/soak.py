"""Cycles of create, start, exec, kill and delete under a private containerd, with deaths at bad
moments: what is left of them afterwards? (security.md L5)

    python tests/soak.py [CYCLES] [SEED]

A pod's shim lives through all of it, so that what it does not give back adds up. Cycles come in
batches, a few side by side; after each batch everything is counted. Needs root and containerd.
"""

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from containerd import MODULES, PREFIX, RUNTIME, SHIM, Containerd, missing

import chibishim

GUEST = "local.test/guest:latest"
POD = PREFIX + "pod"
BATCH, WORKERS = 20, 4
LONG_S = 0.2                            # a life from run to delete takes about so long
GROWTH_KIB = 256                        # of the pod's shim in the second half of the cycles: in the first the heap finds its size


class Leak(Exception):
    """Something is left, or a cycle that nobody disturbed went wrong."""


def expect(done, status, output=b""):
    """A client's end as it should be, where nothing was killed."""
    if (done.returncode, done.stdout) != (status, output):
        raise Leak("%s: status %d, %.200r, %.500r" % (" ".join(done.args[3:]), done.returncode, done.stdout, done.stderr))


class Soak:
    """One run: the daemon, its pod, and what was counted at the beginning."""

    def __init__(self, directory, seed):
        self.random = random.Random(seed)
        self.daemon = Containerd(directory)
        self.daemon.start()
        archive = os.path.join(directory, "guest.tar")
        subprocess.run([SHIM, "image", os.path.join(MODULES, "guest.wasm"), "-o", archive, "-t", GUEST], check=True)
        self.daemon.import_image(archive)
        self.kinds = {"life": self.life, "member": self.member, "run": self.run, "victim": self.victim,
                      "late victim": self.late_victim, "guest": self.guest, "client": self.client}
        self.count = 0
        self.failures = []
        self.unborn = set()             # ids whose shim may have died before containerd knew it, and so called no `delete`
        self.disturbed = False          # containerd is killed in this batch: what a client says tells nothing

    def start_pod(self):
        """The container whose shim is everybody's who joins."""
        self.daemon.ctr("run", "-d", "--null-io", "--runtime", RUNTIME, GUEST, POD, "/guest.wasm", "z", check=True)
        guest = self.daemon.task_pid(POD)
        self.pod = {guest, *(pid for pid in self.daemon.shims() if pid != guest)}
        self.shim = (self.pod - {guest}).pop()

    # --- cycles: each gets an id of its own ---

    def life(self, id, *options, start=True):
        """Create, start, exec, kill, delete, all of which must work."""
        expect(self.create(id, *options), 0)
        expect(self.daemon.ctr("task", "exec", "--exec-id", "x", id, "/guest.wasm", "both"), 0, b"ready\n")
        expect(self.daemon.ctr("task", "kill", "-s", "KILL", id), 0)
        self.remove(id)

    def member(self, id):
        self.life(id, "--annotation", "io.containerd.runc.v2.group=" + POD)

    def run(self, id):
        expect(self.daemon.ctr("run", "--rm", "--runtime", RUNTIME, GUEST, id, "/guest.wasm", "both"), 0, b"ready\n")

    def victim(self, id, *options):
        """SIGKILL of any process that starts, serves or becomes the container, at any moment."""
        client = self.begin(id, *options)
        self.kill_one(id)
        if b"failed to start shim" in client.communicate(timeout=60)[1] or self.disturbed:
            self.unborn.add(id)
        self.remove(id)

    def late_victim(self, id):
        """SIGKILL of any process that ends or cleans up the container, at any moment."""
        expect(self.create(id), 0)
        client = self.daemon.popen("task", "delete", "-f", id)
        self.kill_one(id)
        client.communicate(timeout=60)
        self.remove(id)

    def guest(self, id):
        """SIGKILL of the container's process, in the pod's shim, while an exec begins."""
        expect(self.create(id, "--annotation", "io.containerd.runc.v2.group=" + POD), 0)
        pid = self.daemon.task_pid(id)
        if not pid:
            raise Leak("%s has no process" % id)
        client = self.daemon.popen("task", "exec", "--exec-id", "x", id, "/guest.wasm", "z")
        self.pause()
        os.kill(pid, signal.SIGKILL)
        client.communicate(timeout=60)
        self.remove(id)

    def client(self, id):
        """SIGKILL of the client that creates a member of the pod."""
        client = self.begin(id, "--annotation", "io.containerd.runc.v2.group=" + POD)
        self.pause()
        client.kill()
        client.communicate(timeout=60)
        self.remove(id)

    # --- what the cycles are made of ---

    def create(self, id, *options):
        return self.daemon.ctr("run", "-d", "--null-io", "--runtime", RUNTIME, *options, GUEST, id, "/guest.wasm", "z")

    def begin(self, id, *options):
        return self.daemon.popen("run", "-d", "--null-io", "--runtime", RUNTIME, *options, GUEST, id, "/guest.wasm", "z")

    def pause(self):
        time.sleep(self.random.random() * LONG_S)

    def kill_one(self, id):
        """After a while, one of the processes that have the id on their command line."""
        self.pause()
        found = [pid for pid, words in self.daemon.shim_words() if id.encode() in words]
        if found:
            try:
                os.kill(self.random.choice(found), signal.SIGKILL)
            except ProcessLookupError:
                pass

    def remove(self, id):
        """Until containerd knows it no longer."""
        for _ in range(50):
            self.daemon.ctr("task", "delete", "-f", id)
            if not self.daemon.ctr("container", "rm", id).returncode:
                return
            if b"not found" in self.daemon.ctr("container", "info", id).stderr:
                return
            time.sleep(0.05)
        raise Leak("%s cannot be removed: %s" % (id, self.daemon.ctr("task", "delete", "-f", id).stderr.decode()))

    # --- batches ---

    def batch(self, size, restart):
        """So many cycles, a few side by side; with `restart` containerd is killed under them."""
        jobs = []
        for _ in range(size):
            self.count += 1
            jobs.append(("%s%d" % (PREFIX, self.count), self.random.choice(list(self.kinds))))
        self.disturbed = restart
        ids = [id for id, _ in jobs]
        threads = [threading.Thread(target=self.work, args=(jobs,)) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        if restart:
            time.sleep(self.random.random())
            self.daemon.daemon.kill()
            self.daemon.daemon.wait()
            self.daemon.start()
        for thread in threads:
            thread.join()
        for id in ids if restart else ():
            self.remove(id)
        if self.failures:
            raise Leak("\n".join(self.failures))
        self.check(ids)

    def work(self, jobs):
        """A thread: cycles until there are none left."""
        while jobs:
            try:
                id, kind = jobs.pop()
            except IndexError:
                return
            try:
                self.kinds[kind](id)
            except (Leak, OSError, subprocess.SubprocessError) as error:
                if not self.disturbed:
                    self.failures.append("%s (%s): %s" % (id, kind, error))

    def check(self, ids):
        """Leak, unless nothing of these containers is left and the pod's shim is as it was."""
        found = self.daemon.leftovers(15, keep=POD, alive=self.pod)
        for id in ids:
            path = chibishim.socket_path(chibishim.SOCKET_DIRECTORY, self.daemon.address, "default", id)
            if id in self.unborn and is_dead(path):
                os.unlink(path)         # the next `start` of that id would take it over
            found += ["socket %s of %s" % (path, id)] if os.path.exists(path) else []
        found += ["child %d of the pod's shim: %s" % child for child in children(self.shim) if child[0] not in self.pod]
        found += ["namespace " + mount for mount in namespace_mounts() if mount.startswith(self.daemon.directory)]
        if self.daemon.task_state(POD) != "RUNNING":
            found.append("the pod is " + str(self.daemon.task_state(POD)))
        if found:
            raise Leak("after %d cycles: %s" % (self.count, "\n".join(found)))

    def soak(self, cycles, say=lambda text: None):
        """All of it. Leak tells what is wrong; returns the KiB of the pod's shim in the middle and at the end."""
        self.start_pod()
        counts = []
        while self.count < cycles:
            self.batch(min(BATCH, cycles - self.count), restart=len(counts) % 4 == 3)
            counts.append(settled(self.shim))
            say("%5d cycles: %d descriptors, %d KiB" % (self.count, *counts[-1]))
            if counts[-1][0] > counts[0][0]:
                raise Leak("the pod's shim has %d descriptors, not %d: %s" % (
                    counts[-1][0], counts[0][0], ", ".join(descriptors(self.shim))))
        half, end = counts[len(counts) // 2][1], counts[-1][1]
        if end > half + GROWTH_KIB:
            raise Leak("the pod's shim has grown from %d to %d KiB in the second half" % (half, end))
        return half, end

    def end(self):
        """Ends everything that runs, whatever the state it is in."""
        try:
            self.daemon.clear()
        finally:
            self.daemon.stop()
            for pid in self.daemon.shims():
                os.kill(pid, signal.SIGKILL)
            subprocess.run("umount -l %s/*/*/*/* %s/*/*/* 2>/dev/null" % ((self.daemon.directory,) * 2), shell=True)


def is_dead(path):
    """Whether a socket is there that nobody listens to."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def children(pid):
    """[(pid, state letter)] of a process's children."""
    found = []
    for child in filter(str.isdigit, os.listdir("/proc")):
        words = chibishim.read_text("/proc/%s/stat" % child, "").rpartition(") ")[2].split()
        if words[1:2] == [str(pid)]:
            found.append((int(child), words[0]))
    return found


def descriptors(pid):
    """What the open descriptors of a process refer to."""
    found = []
    for fd in os.listdir("/proc/%d/fd" % pid):
        try:
            found.append(os.readlink("/proc/%d/fd/%s" % (pid, fd)))
        except OSError:
            pass                        # closed meanwhile
    return sorted(found)


def settled(pid):
    """(number of open descriptors, KiB of memory without files), when the calls of before are over.
    Whether a page is still shared with a child does not matter."""
    counts = []
    while len(counts) < 5 or len(set(counts[-5:])) > 1 and len(counts) < 50:
        counts.append(len(descriptors(pid)))
        time.sleep(0.02)
    with open("/proc/%d/smaps_rollup" % pid) as file:
        return counts[-1], next(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))


def namespace_mounts():
    """Where namespaces are kept alive by mounts."""
    with open("/proc/self/mountinfo") as file:
        return {line.split()[4] for line in file if " - nsfs " in line}


def main(cycles=1000, seed=None):
    reason = missing()
    if reason:
        sys.exit("soak: " + reason)
    seed = int(seed) if seed else time.time_ns() % 10**6
    print("seed %d" % seed, flush=True)
    with tempfile.TemporaryDirectory(prefix="chibi", dir="/run") as directory:
        soak = Soak(directory, seed)
        try:
            half, end = soak.soak(int(cycles), lambda text: print(text, flush=True))
        except Leak as leak:
            sys.exit("soak: seed %d: %s" % (seed, leak))
        finally:
            soak.end()
    print("%d cycles: nothing is left; the pod's shim has %d KiB, in the middle of it %d" % (soak.count, end, half))


if __name__ == "__main__":
    main(*sys.argv[1:])
