"""Chapter 17: WASI functions called as a guest calls them, and guests in processes of their own."""

import errno
import gc
import os
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

import pytest
import run_programs
import run_wasi
from conftest import ROOT, SHARED, until

import chibishim
from chibishim import RIGHTS, WASI_ERRNO, rights

MODULES = os.path.join(ROOT, "tests", "modules")
SHIM = os.path.join(ROOT, "chibishim.py")
ERRNO_NAMES = {code: name for name, code in WASI_ERRNO.items()}
CREAT, DIRECTORY, EXCL, TRUNC = 1, 2, 4, 8
APPEND, DSYNC, NONBLOCK, RSYNC, SYNC = 1, 2, 4, 8, 16
READ, WRITE = RIGHTS["fd_read"], RIGHTS["fd_write"]
FOLLOW = 1

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Guest:
    """A guest without a module: a memory, and the WASI functions over it."""

    def __init__(self, *preopens, unstable=False, **keywords):
        self.wasi = chibishim.Wasi(preopens=preopens, **keywords)
        self.wasi.memory = chibishim.Memory(16, 16)
        self.functions = (chibishim.WasiUnstable(self.wasi) if unstable else self.wasi).imports()
        self.next = 1024

    def __getattr__(self, name):
        """guest.fd_close(3) -> "SUCCESS"; a text or bytes argument is passed as address and size."""
        def call(*arguments):
            values = []
            for argument in arguments:
                values += self.put(argument) if isinstance(argument, (str, bytes)) else [argument]
            result = self.functions[name].call(*values)
            return ERRNO_NAMES[result[0]]
        return call

    def put(self, data):
        """[address, size] of bytes, now in memory."""
        data = os.fsencode(data)
        address, self.next = self.next, self.next + len(data) + 16 & ~7
        self.wasi.memory.view[address:address + len(data)] = data
        return [address, len(data)]

    def iovecs(self, *pieces):
        """[address, count] of iovecs for bytes."""
        return [self.put(b"".join(struct.pack("<II", *self.put(piece)) for piece in pieces))[0], len(pieces)]

    def take(self, format, address=0):
        return struct.unpack_from("<" + format, self.wasi.memory.view, address)

    def open(self, path, oflags=0, base=READ, fdflags=0, follow=FOLLOW, directory=3, inheriting=0):
        """(errno, number)"""
        outcome = self.path_open(directory, follow, path, oflags, base, inheriting, fdflags, 0)
        return outcome, self.take("I")[0]

    def opened(self, path, *arguments, **keywords):
        outcome, number = self.open(path, *arguments, **keywords)
        assert outcome == "SUCCESS"
        return number

    def read(self, number, size=100):
        """(errno, bytes)"""
        iovecs = self.iovecs(bytes(size))
        return self.fd_read(number, *iovecs, 0), self.received(iovecs[0])

    def received(self, iovecs):
        """The bytes that a call stored by the first iovec; their number is at 0."""
        address, _ = self.take("II", iovecs)
        return bytes(self.wasi.memory.view[address:address + self.take("I")[0]])

    def write(self, number, data):
        return self.fd_write(number, *self.iovecs(data), 0)

    def entries(self, number, size=4096, after=None):
        """{name: (cookie, file type)} of a directory, read through a buffer of `size` bytes;
        after(name) is called at each whole entry."""
        found, cookie = {}, 0
        buffer = self.put(bytes(size))[0]
        while True:
            assert self.fd_readdir(number, buffer, size, cookie, 0) == "SUCCESS"
            used, position = self.take("I")[0], buffer
            while position + 24 <= buffer + used:
                following, _, length, type = self.take("QQIB", position)
                if position + 24 + length > buffer + used:
                    break
                name = bytes(self.wasi.memory.view[position + 24:position + 24 + length])
                assert name not in found
                found[name] = cookie, type
                cookie, position = following, position + 24 + length
                if after:
                    after(name)
            if used < size:
                return found

    def close(self):
        for number in list(self.wasi.descriptors):
            if number > 2:
                self.fd_close(number)


def descriptors_open():
    """Their number, once those that earlier tests left to the collector are closed."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def guest():
    """guest(preopen…) -> a Guest, closed after the test."""
    made = []

    def make(*preopens, **keywords):
        made.append(Guest(*[(str(p), "/") if not isinstance(p, tuple) else p for p in preopens], **keywords))
        return made[-1]
    yield make
    for one in made:
        one.close()


@pytest.fixture(params=["openat2", "walk", "without _ctypes"])
def resolver(request, monkeypatch):
    """Each way of resolving paths."""
    if request.param == "openat2":
        try:
            os.close(chibishim.libc.syscall(chibishim.SYS_OPENAT2, -100, b".", chibishim.HOW, len(chibishim.HOW)))
        except OSError as error:
            pytest.skip("this kernel has no openat2: %s" % error)
    elif request.param == "walk":
        monkeypatch.setattr(chibishim, "SYS_OPENAT2", 9999)
    else:
        monkeypatch.setitem(sys.modules, "_ctypes", None)
        monkeypatch.setattr(chibishim, "libc", chibishim.Libc())
        monkeypatch.setattr(chibishim, "STATFS", [])
    return request.param


@pytest.fixture
def root(tmp_path):
    """A directory to preopen, with a secret beside it."""
    root = tmp_path / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    (root / "file").write_text("file")
    (root / "sub" / "file").write_text("file")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "absolute_directory").symlink_to(tmp_path / "outside")
    (root / "up").symlink_to("../secret")
    (root / "up_directory").symlink_to("../outside")
    (root / "loop").symlink_to("loop")
    (root / "ping").symlink_to("pong")
    (root / "pong").symlink_to("ping")
    (root / "inside").symlink_to("sub/../file")
    (root / "inside_directory").symlink_to("sub")
    (root / "chain").symlink_to("inside_directory/deep/../../inside")
    (root / "dangling").symlink_to("sub/new")
    (root / "dangling_up").symlink_to("../new")
    os.mkfifo(root / "fifo")
    return root


# -- paths: W1, W2 --


@pytest.mark.parametrize("path, outcome", [
    ("file", "SUCCESS"), ("sub/../file", "SUCCESS"), ("inside", "SUCCESS"), ("./sub/.././file", "SUCCESS"), ("sub//file", "SUCCESS"),
    ("inside_directory/file", "SUCCESS"), ("chain", "SUCCESS"), ("sub", "SUCCESS"), ("sub/", "SUCCESS"), ("sub/.", "SUCCESS"),
    ("sub/..", "SUCCESS"), (".", "SUCCESS"), ("./", "SUCCESS"), ("inside_directory/", "SUCCESS"), ("sub/deep/../..", "SUCCESS"),
    ("..", "EPERM"), ("../", "EPERM"), ("../secret", "EPERM"), ("sub/../../secret", "EPERM"), ("sub/../..", "EPERM"),
    ("inside_directory/../../secret", "EPERM"), ("/etc/passwd", "EPERM"), ("/", "EPERM"), ("//file", "EPERM"),
    ("absolute", "EPERM"), ("absolute/", "EPERM"), ("absolute_directory/file", "EPERM"), ("absolute_directory/", "EPERM"),
    ("up", "EPERM"), ("up/", "EPERM"), ("up_directory/file", "EPERM"), ("up_directory/", "EPERM"), ("up_directory/.", "EPERM"),
    ("loop", "ELOOP"), ("loop/x", "ELOOP"), ("ping", "ELOOP"), ("ping/", "ELOOP"),
    ("absent", "ENOENT"), ("absent/x", "ENOENT"), ("absent/../file", "ENOENT"), ("dangling", "ENOENT"), ("dangling_up", "EPERM"),
    ("file/", "ENOTDIR"), ("file/x", "ENOTDIR"), ("file/..", "ENOTDIR"), ("file/.", "ENOTDIR"), ("inside/", "ENOTDIR"), ("", "ENOENT"),
])
def test_paths_stay_below_their_preopen(guest, root, resolver, path, outcome):
    "W1, W2: `..`, absolute, links out, loops, trailing slashes; by openat2 and by each fallback"
    assert guest(root).open(path)[0] == outcome


@pytest.mark.parametrize("path", ["absolute", "up", "loop", "inside", "absolute/", "up_directory/", "up_directory/file", "../secret"])
def test_links_are_not_followed_when_they_must_not_be(guest, root, resolver, path):
    "W2: a slash at the end makes the kernel follow a link whatever O_NOFOLLOW says"
    assert guest(root).open(path, follow=0)[0] in ("ELOOP", "EPERM")


def test_a_dangling_link_creates_nothing_outside(guest, root, resolver, tmp_path):
    "W2: dangling symlink with O_CREAT"
    assert guest(root).open("dangling_up", CREAT, WRITE)[0] == "EPERM"
    assert not (tmp_path / "new").exists()
    assert guest(root).open("dangling", CREAT, WRITE)[0] == "SUCCESS"
    assert (root / "sub" / "new").exists()


def test_exclusive_creation_follows_nothing(guest, root, resolver):
    "W2"
    assert guest(root).open("dangling", CREAT | EXCL, WRITE)[0] == "EEXIST"


@pytest.mark.parametrize("operation", [
    lambda g, path: g.path_create_directory(3, path), lambda g, path: g.path_remove_directory(3, path),
    lambda g, path: g.path_unlink_file(3, path), lambda g, path: g.path_filestat_get(3, FOLLOW, path, 0),
    lambda g, path: g.path_filestat_set_times(3, FOLLOW, path, 0, 0, 10), lambda g, path: g.path_readlink(3, path, 0, 100, 0),
    lambda g, path: g.path_symlink("x", 3, path), lambda g, path: g.path_link(3, 0, path, 3, "new"),
    lambda g, path: g.path_link(3, 0, "file", 3, path), lambda g, path: g.path_rename(3, path, 3, "new"),
    lambda g, path: g.path_rename(3, "file", 3, path)])
@pytest.mark.parametrize("path", ["../secret", "up_directory/file", "absolute_directory/file", "sub/../../secret", "/secret"])
def test_no_path_function_leaves_the_preopen(guest, root, resolver, tmp_path, operation, path):
    "W2"
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(tmp_path / "outside")), os.stat(tmp_path / "secret")
    assert operation(guest(root), path) == "EPERM"
    assert before == (sorted(os.listdir(tmp_path)), sorted(os.listdir(tmp_path / "outside")), os.stat(tmp_path / "secret"))


@pytest.mark.parametrize("path", ["up", "absolute", "up_directory"])
def test_functions_that_mean_the_link_do_not_touch_its_target(guest, root, resolver, tmp_path, path):
    "W2"
    target = tmp_path / ("outside" if "directory" in path else "secret")
    before = os.stat(target)
    g = guest(root)
    assert g.path_filestat_set_times(3, 0, path, 0, 0, 5) == "SUCCESS"
    assert g.path_filestat_get(3, 0, path, 0) == "SUCCESS" and g.take("B", 16)[0] == chibishim.SYMBOLIC_LINK
    assert g.path_link(3, 0, path, 3, "copy") == "SUCCESS" and (root / "copy").is_symlink()
    assert g.path_rename(3, path, 3, "sub/moved") == "SUCCESS"
    assert g.open("sub/moved")[0] == "EPERM" or g.open("sub/moved/secret")[0] != "SUCCESS"
    assert g.path_unlink_file(3, "sub/moved") == "SUCCESS"
    after = os.stat(target)
    assert (before.st_mtime_ns, before.st_nlink, before.st_ctime_ns) == (after.st_mtime_ns, after.st_nlink, after.st_ctime_ns)


def test_a_link_that_is_moved_up_does_not_lead_out(guest, root, resolver):
    "W2: a relative link is judged where it is, not where it was made"
    g = guest(root)
    assert g.path_symlink("../../secret", 3, "sub/deep/link") == "SUCCESS"
    assert g.path_rename(3, "sub/deep/link", 3, "link") == "SUCCESS"
    assert g.open("link")[0] == "EPERM"


def test_rename_and_link_between_preopens_need_both(guest, root, resolver, tmp_path):
    "W2: the second preopen is a boundary of its own"
    (tmp_path / "other").mkdir()
    g = guest(root, (str(tmp_path / "other"), "/other"))
    assert g.path_link(3, 0, "file", 4, "linked") == "SUCCESS"
    assert g.path_rename(3, "sub", 4, "sub") == "SUCCESS"
    assert g.path_link(3, 0, "file", 4, "../linked") == g.path_rename(3, "file", 4, "../file") == "EPERM"
    assert sorted(os.listdir(tmp_path / "other")) == ["linked", "sub"]


def test_a_directory_descriptor_does_not_lead_out_after_a_rename(guest, root, resolver):
    "W2"
    g = guest(root)
    deep = g.opened("sub/deep", DIRECTORY, RIGHTS["path_open"], inheriting=READ)
    assert g.path_rename(3, "sub/deep", 3, "deep") == "SUCCESS"
    assert g.open("../file", directory=deep)[0] == g.open("..", directory=deep)[0] == "EPERM"


def test_a_directory_that_becomes_a_link_meanwhile(guest, root, resolver):
    "W2: the race between looking and opening"
    (root / "real").mkdir()
    (root / "real" / "file").write_text("file")
    g = guest(root)
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for name in "real", "up_directory":
                (root / "link.new").symlink_to(os.readlink(root / name) if name != "real" else "real")
                os.rename(root / "link.new", root / "swapped")
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        for _ in range(1000):
            g.next = 1024
            outcome, number = g.open("swapped/file")
            seen.add(outcome)
            if outcome == "SUCCESS":
                assert g.read(number)[1] == b"file"
                g.fd_close(number)
        assert seen <= {"SUCCESS", "EPERM", "ENOENT"}
    finally:
        stop.set()
        thread.join()


def test_paths_are_bounded_utf8_without_nul(guest, root, resolver):
    "W6"
    g = guest(root)
    assert g.open(b"a\0b")[0] == g.open(b"\xff")[0] == "EILSEQ"
    assert g.open("x" * 5000)[0] == g.open("x" * 300)[0] == "ENAMETOOLONG"
    assert g.open("./" * 2000 + "file")[0] == "SUCCESS"


def test_openat2_is_what_resolves_where_there_is_one(guest, root, monkeypatch):
    "W1"
    numbers, syscall = [], chibishim.libc.syscall
    monkeypatch.setattr(chibishim.libc, "syscall", lambda number, *rest: numbers.append(number) or syscall(number, *rest))
    assert guest(root).open("sub/file")[0] == "SUCCESS"
    assert numbers == [chibishim.SYS_OPENAT2]


# -- read-only preopens: W3 --


@pytest.mark.parametrize("attempt", [
    lambda g: g.open("file", base=WRITE)[0], lambda g: g.open("file", base=READ | RIGHTS["fd_allocate"])[0],
    lambda g: g.open("file", base=RIGHTS["fd_filestat_set_size"])[0], lambda g: g.open("new", CREAT)[0],
    lambda g: g.open("file", TRUNC)[0], lambda g: g.open("sub", DIRECTORY, RIGHTS["path_open"], inheriting=WRITE)[0] == "SUCCESS"
    and g.open("file", base=WRITE, directory=g.take("I")[0])[0],
    lambda g: g.path_create_directory(3, "new"), lambda g: g.path_unlink_file(3, "file"), lambda g: g.path_remove_directory(3, "sub"),
    lambda g: g.path_symlink("file", 3, "new"), lambda g: g.path_filestat_set_times(3, 0, "file", 0, 0, 5),
    lambda g: g.path_link(3, 0, "file", 4, "new"), lambda g: g.path_link(4, 0, "own", 3, "new"),
    lambda g: g.path_rename(3, "file", 4, "new"), lambda g: g.path_rename(4, "own", 3, "file"),
    lambda g: g.path_rename(3, "file", 3, "new"), lambda g: g.fd_filestat_set_times(g.opened("file"), 0, 0, 5),
    lambda g: g.fd_filestat_set_times(3, 0, 0, 5), lambda g: g.fd_fdstat_set_rights(3, rights("path_open path_unlink_file"), 0),
    lambda g: g.fd_filestat_set_size(g.opened("file"), 0), lambda g: g.write(g.opened("file"), b"x")])
def test_a_read_only_preopen_stays_read_only(guest, root, tmp_path, attempt):
    "W3: also through link and rename into a writable one"
    (tmp_path / "writable").mkdir()
    (tmp_path / "writable" / "own").write_text("own")
    before = sorted(os.listdir(root)), os.stat(root / "file")
    assert attempt(guest((str(root), "/", True), (str(tmp_path / "writable"), "/w"))) == "ENOTCAPABLE"
    after = sorted(os.listdir(root)), os.stat(root / "file")
    assert before[0] == after[0] and before[1][6:] == after[1][6:]


def test_a_read_only_preopen_can_be_read(guest, root):
    "W3"
    g = guest((str(root), "/", True))
    everything = (1 << 64) - 1 & ~chibishim.WRITING_RIGHTS      # as Rust's standard library asks
    assert g.read(g.opened("file", base=everything, inheriting=(1 << 64) - 1)) == ("SUCCESS", b"file")
    assert b"file" in g.entries(g.opened("sub", DIRECTORY, RIGHTS["fd_readdir"]))


# -- what must not be opened: W4, W5 --


def test_a_fifo_does_not_hang(guest, root, resolver):
    "W4"
    g = guest(root)
    number = g.opened("fifo")
    assert g.read(number) == ("SUCCESS", b"") and g.fd_close(number) == "SUCCESS"
    assert g.open("fifo", base=WRITE)[0] == "ENXIO"


@as_root
@pytest.mark.parametrize("kind, device, outcome", [
    (stat.S_IFCHR, (1, 1), "EACCES"), (stat.S_IFCHR, (1, 2), "EACCES"), (stat.S_IFCHR, (1, 4), "EACCES"),
    (stat.S_IFCHR, (10, 130), "EACCES"), (stat.S_IFCHR, (5, 1), "EACCES"), (stat.S_IFCHR, (10, 229), "EACCES"),
    (stat.S_IFBLK, (7, 0), "EACCES"), (stat.S_IFBLK, (1, 3), "EACCES"), (stat.S_IFCHR, (1, 3), "SUCCESS"),
    (stat.S_IFCHR, (1, 9), "SUCCESS")])
def test_only_harmless_devices_can_be_opened(guest, root, monkeypatch, kind, device, outcome):
    "W4, W5: memory, ports, watchdog, console, fuse, disks are not even opened to look"
    try:
        os.mknod(root / "device", kind | 0o666, os.makedev(*device))
        os.close(os.open(root / "device", os.O_PATH))
    except PermissionError as error:
        pytest.skip("no device nodes here: %s" % error)
    opened, real = [], os.open
    monkeypatch.setattr(chibishim.os, "open", lambda path, *rest, **keywords: opened.append(path) or real(path, *rest, **keywords))
    assert guest(root).open("device")[0] == outcome
    assert (b"device" in opened) == (outcome == "SUCCESS")


PROC = ["proc/self/mem", "proc/self/root/etc/passwd", "proc/1/root", "proc/self/cwd", "proc/self/exe", "proc/kcore", "proc/sysrq-trigger",
        "proc", "proc/self/fd/0", "sys", "sys/kernel/uevent_helper", "sys/power/state"]


@pytest.mark.parametrize("path", PROC)
def test_procfs_and_sysfs_are_out_of_reach(guest, resolver, path):
    "W5: with / preopened"
    g = guest("/")
    for follow in 0, FOLLOW:
        assert g.open(path, follow=follow)[0] in ("EACCES", "ELOOP", "EPERM")
        assert "/" not in path or g.path_filestat_get(3, follow, path, 0) in ("EACCES", "ELOOP", "EPERM")
    assert "/" not in path or g.path_readlink(3, path, 0, 100, 0) in ("EACCES", "ELOOP", "EPERM")
    assert "/" not in path or g.path_link(3, FOLLOW, path, 3, "tmp/chibishim-link") in ("EACCES", "ELOOP", "EPERM")


@pytest.mark.parametrize("target", ["/proc/self/mem", "../../../../../../../../proc/self/mem", "../../../../../../../../../proc/self"])
def test_no_link_leads_to_procfs(guest, tmp_path, resolver, target):
    "W5"
    (tmp_path / "link").symlink_to(target)
    path = str(tmp_path)[1:] + "/link"
    assert guest("/").open(path)[0] in ("EACCES", "EPERM")
    assert guest("/").open(path + "/mem")[0] in ("EACCES", "EPERM", "ENOTDIR")


@pytest.mark.parametrize("path", ["/proc", "/proc/self", "/sys"])
def test_procfs_and_sysfs_cannot_be_preopened(resolver, path):
    "W5"
    with pytest.raises(PermissionError) as caught:
        Guest((path, "/"))
    assert caught.value.filename == path


def test_a_c_library_without_fstatfs64_is_asked_for_fstatfs(guest, monkeypatch):
    "W5: musl"
    def fstatfs64(*arguments):
        raise OSError(errno.ENOSYS, "")
    monkeypatch.setitem(vars(chibishim.libc), "fstatfs64", fstatfs64)
    assert guest("/").open("proc/self/mem")[0] == "EACCES" and guest("/").open("etc/passwd")[0] == "SUCCESS"


LATE_MOUNT = """
import sys; sys.path[:0] = [%(root)r, %(tests)r]
import os, subprocess, test_wasi, chibishim
%(disable)s
os.makedirs(%(where)r)
g = test_wasi.Guest(("/", "/"))
assert g.open(%(where)r[1:])[0] == "SUCCESS"
subprocess.run(["mount", "-t", "proc", "proc", %(where)r], check=True)
assert g.open(%(where)r[1:] + "/self/mem")[0] == "EACCES"
assert g.open(%(where)r[1:] + "/self/root/etc/passwd")[0] in ("EACCES", "ELOOP", "EPERM")
print("kept out")
"""


@as_root
@pytest.mark.parametrize("disable", ["", "sys.modules['_ctypes'] = None"])
def test_a_procfs_that_is_mounted_later_is_out_of_reach_too(tmp_path, disable):
    "W5"
    script = LATE_MOUNT % {"root": ROOT, "tests": os.path.join(ROOT, "tests"), "where": str(tmp_path / "late"), "disable": disable}
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if b"unshare" in done.stderr or b"mount:" in done.stderr:
        pytest.skip("no mounts here: %r" % done.stderr)
    assert done.stdout == b"kept out\n", done.stderr.decode()


def test_without_ctypes_and_without_procfs_no_directory_is_given(monkeypatch, root):
    "W5: what cannot be told apart is refused"
    monkeypatch.setitem(sys.modules, "_ctypes", None)
    monkeypatch.setattr(chibishim, "STATFS", [])
    monkeypatch.setattr(chibishim, "open", lambda *arguments: open("/absent/mountinfo"), raising=False)
    with pytest.raises(FileNotFoundError):
        Guest((str(root), "/"))


# -- bounds: W6, W7, W8 --


def test_iovecs_are_bounded(guest, root):
    "W6"
    g = guest(root)
    number = g.opened("file")
    assert g.fd_read(number, 0, 1025, 0) == "EINVAL"
    assert g.fd_read(number, 0, 1024, 0) == "SUCCESS"                   # all of them empty
    struct.pack_into("<II", g.wasi.memory.view, 0, 16, 0xFFFFFFFF)
    assert g.fd_read(number, 0, 1, 8) == g.fd_write(number, 0, 1, 8).replace("ENOTCAPABLE", "EFAULT") == "EFAULT"


def test_a_transfer_is_cut_not_refused(guest, root):
    "W6"
    g = guest(root)
    number = g.opened("big", CREAT, WRITE)
    struct.pack_into("<IIIIII", g.wasi.memory.view, 0, 0, 1 << 20, 0, 1 << 20, 0, 1 << 20)
    assert g.fd_write(number, 0, 3, 64) == "SUCCESS" and g.take("I", 64)[0] == 1 << 20


def test_random_get_fills_what_is_inside(guest):
    "W6"
    g = guest()
    assert g.random_get(0, 0xFFFFFFFF) == g.random_get(0xFFFFFFFF, 2) == "EFAULT"
    assert g.random_get(7, 1 << 19) == "SUCCESS"
    memory = bytes(g.wasi.memory.view[:(1 << 19) + 16])
    assert memory[:7] == bytes(7) and memory[7 + (1 << 19):] == bytes(9)
    assert all(any(memory[7 + start:7 + start + 4096]) for start in range(0, 1 << 19, 4096))


def test_random_get_streams(guest, monkeypatch):
    "W6: 4 GiB never need 4 GiB of host memory"
    sizes, urandom = [], os.urandom
    monkeypatch.setattr(chibishim.os, "urandom", lambda size: sizes.append(size) or urandom(size))
    g = guest()
    g.wasi.memory = chibishim.Memory(64, 64)
    assert g.random_get(0, 1 << 22) == "SUCCESS"
    assert max(sizes) <= 1 << 20 and sum(sizes) == 1 << 22


def test_the_descriptor_table_is_limited(guest, root, monkeypatch):
    "W6"
    monkeypatch.setattr(chibishim, "MAX_DESCRIPTORS", 20)
    g = guest(root)
    before = descriptors_open()
    outcomes = [g.open("file")[0] for _ in range(40)]
    assert outcomes == ["SUCCESS"] * 16 + ["EMFILE"] * 24
    assert g.open("new", CREAT, WRITE)[0] == "EMFILE" and not (root / "new").exists()
    assert len(os.listdir("/proc/self/fd")) == before + 16


def test_a_path_call_leaves_no_descriptor_behind(guest, root, resolver):
    "L5"
    g = guest(root)
    before = descriptors_open()
    for path in "file", "inside", "chain", "up", "absolute", "loop", "../secret", "absent", "file/x", "fifo", "sub/deep/../../..":
        g.path_filestat_get(3, FOLLOW, path, 0)
        g.path_rename(3, path, 3, "../x")
        g.path_open(3, FOLLOW, path, 0, READ, 0, 0, 0xFFFFFFFF)         # nowhere to store the number
    assert len(os.listdir("/proc/self/fd")) == before


def test_readdir_takes_any_cookie(guest, root):
    "W6"
    g, generator = guest(root), random.Random(1)
    number = g.opened("sub", DIRECTORY, RIGHTS["fd_readdir"])
    for _ in range(300):
        cookie = generator.choice([0, 1, 2, 3, 4, 5, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, generator.getrandbits(64)])
        size = generator.randrange(200)
        assert g.fd_readdir(number, 4096, size, cookie, 0) == "SUCCESS" and g.take("I")[0] <= size
    assert g.fd_readdir(number, 0xFFFFFF00, 0x200, 0, 0) == g.fd_readdir(number, 0, 0xFFFFFFFF, 0, 0) == "EFAULT"


FUZZ = """
import sys; sys.path[:0] = [%r, %r]
import os, random, test_wasi, chibishim
random = random.Random(7)
edges = {"i": [0, 1, 2, 3, 4, 5, 8, 64, 1023, 65535, (1 << 20) - 1, 1 << 20, 1 << 31, (1 << 32) - 8, (1 << 32) - 1],
         "I": [0, 1, 2, 255, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]}
null, sys.stderr = os.open("/dev/null", os.O_RDWR), os.fdopen(os.dup(2), "w")
for name, letters in chibishim.WASI_FUNCTIONS.items():
    if name in ("proc_exit", "proc_raise"):
        continue
    for fill in 0, 255, 47:
        for fd in 0, 1, 2:
            os.dup2(null, fd)
        g = test_wasi.Guest((sys.argv[1], "/"))
        g.wasi.memory.view[:] = bytes([fill]) * (1 << 20)
        for _ in range(150):
            result = g.functions[name].call(*[random.choice(edges[letter]) for letter in letters])
            assert len(result) == 1 and result[0] in test_wasi.ERRNO_NAMES, (name, result)
        g.close()
sys.stderr.write("survived")
"""


def test_any_argument_is_answered_by_an_errno(root, tmp_path):
    "W7: pointers, sizes and offsets at every edge, all functions"
    done = subprocess.run([sys.executable, "-c", FUZZ % (ROOT, os.path.join(ROOT, "tests")), str(root)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=300)
    assert done.stderr.endswith(b"survived"), done.stderr.decode()
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("address", [0xFFFFFFFF, 0xFFFFFFF8, (1 << 20) - 3, 1 << 20])
def test_results_that_do_not_fit_are_a_fault(guest, root, address):
    "W7"
    g = guest(root)
    assert g.clock_time_get(0, 0, address) == g.fd_fdstat_get(3, address) == g.fd_prestat_get(3, address) == "EFAULT"
    assert g.path_filestat_get(3, 0, "file", address) == g.args_sizes_get(address, 0) == "EFAULT"
    assert g.path_open(3, 0, address, 8, 0, 0, 0, 0, 0) == g.poll_oneoff(address, 0, 1, 0) == "EFAULT"


def test_the_guest_sees_its_environment_only(wat, tmp_path):
    "W8"
    text = """(module (import "wasi_snapshot_preview1" "environ_sizes_get" (func $sizes (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "environ_get" (func $get (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_write" (func $w (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (func (export "_start") (drop (call $sizes (i32.const 0) (i32.const 4))) (drop (call $get (i32.const 1024) (i32.const 2048)))
        (i32.store (i32.const 0) (i32.const 2048)) (drop (call $w (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 100)))))"""
    done = run(wat(text), options=["--env", "A=1", "--env", "B="], tmp_path=tmp_path, env={"SECRET": "x", "PATH": os.environ["PATH"]})
    assert done.stdout == b"A=1\0B=\0"
    assert run(wat(text), tmp_path=tmp_path, env={"SECRET": "x"}).stdout == b""


# -- the functions --


def test_there_are_46_functions():
    assert len(chibishim.WASI_FUNCTIONS) == 46


def test_arguments_are_laid_out_as_the_sizes_say(guest):
    g = guest(arguments=["a", "élan", ""], environment=["X=1"])
    assert g.args_sizes_get(0, 4) == "SUCCESS" and g.take("II") == (3, 9)
    assert g.args_get(64, 128) == "SUCCESS" and g.take("III", 64) == (128, 130, 136)
    assert g.take("9s", 128)[0] == "a\0élan\0\0".encode()
    assert g.environ_sizes_get(0, 4) == g.environ_get(64, 128) == "SUCCESS" and g.take("4s", 128)[0] == b"X=1\0"


def test_clocks(guest):
    g = guest()
    for number, clock in enumerate(chibishim.WASI_CLOCKS):
        before = time.clock_gettime_ns(clock)
        assert g.clock_time_get(number, 0, 0) == "SUCCESS"
        assert before <= g.take("Q")[0] <= time.clock_gettime_ns(clock)
        assert g.clock_res_get(number, 0) == "SUCCESS" and 1 <= g.take("Q")[0] <= 10**9
    assert g.clock_time_get(4, 0, 0) == g.clock_res_get(4, 0) == "EINVAL"


def test_read_write_seek_and_tell(guest, root):
    g = guest(root)
    number = g.opened("new", CREAT | EXCL, READ | WRITE | rights("fd_seek fd_tell"))
    assert g.fd_write(number, *g.iovecs(b"Hello", b"", b", World"), 0) == "SUCCESS" and g.take("I")[0] == 12
    assert g.fd_seek(number, (1 << 64) - 5, 2, 0) == "SUCCESS" and g.take("Q")[0] == 7
    assert g.read(number) == ("SUCCESS", b"World") and g.read(number) == ("SUCCESS", b"")
    assert g.fd_tell(number, 0) == "SUCCESS" and g.take("Q")[0] == 12
    assert g.fd_seek(number, (1 << 64) - 1, 0, 0) == g.fd_seek(number, 0, 3, 0) == "EINVAL"
    assert g.fd_pwrite(number, *g.iovecs(b"J"), 0, 0) == "SUCCESS"
    assert g.fd_pread(number, *g.iovecs(bytes(3)), 0, 0) == "SUCCESS" and g.take("I")[0] == 3
    assert g.fd_pread(number, *g.iovecs(bytes(3)), 1 << 63, 0) == "EINVAL"
    assert g.fd_tell(number, 0) == "SUCCESS" and g.take("Q")[0] == 12
    assert (root / "new").read_text() == "Jello, World"


def test_the_right_to_seek_includes_the_right_to_tell(guest, root):
    g = guest(root)
    seek, tell = g.opened("file", base=RIGHTS["fd_seek"]), g.opened("file", base=RIGHTS["fd_tell"])
    assert g.fd_tell(seek, 0) == g.fd_seek(seek, 1, 0, 0) == "SUCCESS"
    assert g.fd_tell(tell, 0) == g.fd_seek(tell, 0, 1, 0) == "SUCCESS"
    assert g.fd_seek(tell, 1, 1, 0) == g.fd_seek(tell, 0, 0, 0) == "ENOTCAPABLE"


@pytest.mark.parametrize("right, call", [
    ("fd_read", lambda g, fd: g.fd_read(fd, 0, 0, 0)), ("fd_write", lambda g, fd: g.fd_write(fd, 0, 0, 0)),
    ("fd_datasync", lambda g, fd: g.fd_datasync(fd)), ("fd_sync", lambda g, fd: g.fd_sync(fd)),
    ("fd_advise", lambda g, fd: g.fd_advise(fd, 0, 1, 0)), ("fd_allocate", lambda g, fd: g.fd_allocate(fd, 0, 8)),
    ("fd_filestat_get", lambda g, fd: g.fd_filestat_get(fd, 0)), ("fd_fdstat_set_flags", lambda g, fd: g.fd_fdstat_set_flags(fd, 0)),
    ("fd_filestat_set_size", lambda g, fd: g.fd_filestat_set_size(fd, 9)),
    ("fd_filestat_set_times", lambda g, fd: g.fd_filestat_set_times(fd, 0, 0, 10))])
def test_each_function_needs_its_right(guest, root, right, call):
    g = guest(root)
    number = g.opened("file", base=chibishim.FILE_RIGHTS)
    assert call(g, number) == "SUCCESS"
    assert g.fd_fdstat_set_rights(number, chibishim.FILE_RIGHTS & ~RIGHTS[right], 0) == "SUCCESS"
    assert call(g, number) == "ENOTCAPABLE"
    assert g.fd_fdstat_set_rights(number, chibishim.FILE_RIGHTS, 0) == "ENOTCAPABLE"
    assert call(g, 99) == "EBADF"


@pytest.mark.parametrize("right, call", [
    ("path_open", lambda g: g.open("file")[0]), ("path_create_file", lambda g: g.open("n", CREAT, WRITE)[0]),
    ("path_filestat_set_size", lambda g: g.open("file", TRUNC, WRITE)[0]),
    ("path_create_directory", lambda g: g.path_create_directory(3, "n")), ("path_symlink", lambda g: g.path_symlink("x", 3, "n")),
    ("path_readlink", lambda g: g.path_readlink(3, "up", 0, 9, 0)), ("path_unlink_file", lambda g: g.path_unlink_file(3, "file")),
    ("path_remove_directory", lambda g: g.path_remove_directory(3, "sub/deep")),
    ("path_link_source", lambda g: g.path_link(3, 0, "file", 3, "n")), ("path_link_target", lambda g: g.path_link(3, 0, "file", 3, "n")),
    ("path_rename_source", lambda g: g.path_rename(3, "file", 3, "n")), ("path_rename_target", lambda g: g.path_rename(3, "file", 3, "n")),
    ("path_filestat_get", lambda g: g.path_filestat_get(3, 0, "file", 0)), ("fd_readdir", lambda g: g.fd_readdir(3, 0, 9, 0, 0)),
    ("path_filestat_set_times", lambda g: g.path_filestat_set_times(3, 0, "file", 0, 0, 10))])
def test_each_path_function_needs_its_right(guest, root, right, call):
    g = guest(root)
    assert g.fd_fdstat_get(3, 0) == "SUCCESS"
    base, inheriting = g.take("QQ", 8)
    g.fd_fdstat_set_rights(3, base & ~RIGHTS[right], inheriting)
    assert call(g) == "ENOTCAPABLE"
    assert call(guest(root)) == "SUCCESS"


def test_rights_to_contents_are_the_directory_s_to_give(guest, root):
    g = guest(root)
    assert g.fd_fdstat_set_rights(3, chibishim.DIRECTORY_RIGHTS, READ) == "SUCCESS"
    assert g.open("file", base=READ | WRITE)[0] == "ENOTCAPABLE"
    assert g.fd_fdstat_get(g.opened("file", base=READ | RIGHTS["fd_sync"]), 0) == "SUCCESS" and g.take("Q", 8)[0] == READ


def test_flags_are_set_and_told(guest, root):
    g = guest(root)
    number = g.opened("file", base=chibishim.FILE_RIGHTS, fdflags=APPEND | DSYNC)
    told = lambda: g.fd_fdstat_get(number, 0) == "SUCCESS" and g.take("BxH")
    assert told() == (chibishim.REGULAR_FILE, APPEND | DSYNC)
    assert g.write(number, b"+") == "SUCCESS" and (root / "file").read_text() == "file+"
    assert g.fd_fdstat_set_flags(number, NONBLOCK | DSYNC) == "SUCCESS" and told()[1] == NONBLOCK | DSYNC
    assert g.fd_fdstat_set_flags(number, NONBLOCK) == g.fd_fdstat_set_flags(number, DSYNC | SYNC) == "ENOTSUP"
    assert g.fd_fdstat_set_flags(number, 32) == "EINVAL"


@pytest.mark.parametrize("arguments, outcome", [
    (("file", 16), "EINVAL"), (("file", 0, READ, 32), "EINVAL"), (("new", CREAT | DIRECTORY), "EINVAL"), (("file", 0, READ, 0, 2), "EINVAL"),
    (("file", DIRECTORY), "ENOTDIR"), (("file", CREAT | EXCL, WRITE), "EEXIST"), (("sub", CREAT, WRITE), "EISDIR"),
    (("new/", CREAT, WRITE), "EISDIR"), (("sub", 0, WRITE), "EISDIR"), (("sub", TRUNC, WRITE), "EISDIR")])
def test_path_open_s_flags_are_checked(guest, root, arguments, outcome):
    assert guest(root).open(*arguments)[0] == outcome
    assert not (root / "new").exists()


def test_a_directory_opens_with_every_right_asked_for(guest, root):
    g = guest(root)
    number = g.opened("sub", base=(1 << 64) - 1 & chibishim.ALL_RIGHTS & ~rights("sock_accept sock_shutdown"))
    assert g.fd_fdstat_get(number, 0) == "SUCCESS" and g.take("Q", 8)[0] == chibishim.DIRECTORY_RIGHTS


def test_allocate_truncate_sync_and_advise(guest, root):
    g = guest(root)
    number = g.opened("file", base=chibishim.FILE_RIGHTS)
    assert g.fd_allocate(number, 0, 1000) == "SUCCESS" and (root / "file").stat().st_size == 1000
    assert g.fd_filestat_set_size(number, 4) == "SUCCESS" and (root / "file").read_text() == "file"
    assert g.fd_sync(number) == g.fd_datasync(number) == g.fd_sync(3) == g.fd_datasync(3) == "SUCCESS"
    assert [g.fd_advise(number, 0, 0, advice) for advice in range(7)] == ["SUCCESS"] * 6 + ["EINVAL"]
    assert g.fd_allocate(number, 1 << 63, 1) == g.fd_filestat_set_size(number, 1 << 63) == g.fd_allocate(number, 0, 0) == "EINVAL"
    assert g.fd_allocate(3, 0, 1) == g.fd_filestat_set_size(3, 0) == g.fd_advise(3, 0, 0, 0) == "ENOTCAPABLE"


def test_times(guest, root):
    g = guest(root)
    number = g.opened("file", base=chibishim.FILE_RIGHTS)
    times = lambda: (os.stat(root / "file").st_atime_ns, os.stat(root / "file").st_mtime_ns)
    assert g.fd_filestat_set_times(number, 5_000_000_001, 7_000_000_003, 5) == "SUCCESS" and times() == (5_000_000_001, 7_000_000_003)
    assert g.path_filestat_set_times(3, FOLLOW, "inside", 9, 11_000_000_000, 4) == "SUCCESS" and times() == (5_000_000_001, 11_000_000_000)
    before = time.time_ns() - 10**9
    assert g.fd_filestat_set_times(number, 0, 0, 8) == "SUCCESS" and times()[0] == 5_000_000_001 and times()[1] > before
    for flags in 3, 12, 16:
        assert g.fd_filestat_set_times(number, 0, 0, flags) == g.path_filestat_set_times(3, 0, "file", 0, 0, flags) == "EINVAL"


@as_root
@pytest.mark.parametrize("mode, outcomes", [(0o666, ["SUCCESS", "EPERM", "EPERM"]), (0o444, ["EACCES", "EPERM", "EPERM"])])
def test_who_may_write_may_touch(guest, root, mode, outcomes):
    os.chmod(root / "file", mode)
    for flags, expected in zip((10, 2, 5), outcomes):
        os.utime(root / "file", ns=(1, 1))
        g = guest(root)
        try:
            os.seteuid(65534)           # and with it go the capabilities
            number = g.opened("file", base=READ | RIGHTS["fd_filestat_set_times"])
            found = {g.path_filestat_set_times(3, 0, "file", 1, 1, flags), g.fd_filestat_set_times(number, 1, 1, flags)}
        finally:
            os.seteuid(0)
        assert found == {expected}
        assert (os.stat(root / "file").st_mtime_ns > 1) == (expected == "SUCCESS")


def test_filestat(guest, root):
    g = guest(root)
    os.link(root / "file", root / "second")
    s = os.stat(root / "file")
    expected = (s.st_dev, s.st_ino, chibishim.REGULAR_FILE, 2, 4, s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)
    assert g.path_filestat_get(3, FOLLOW, "inside", 0) == "SUCCESS" and g.take("QQB7xQQQQQ") == expected
    assert g.fd_filestat_get(g.opened("file", base=RIGHTS["fd_filestat_get"]), 0) == "SUCCESS" and g.take("QQB7xQQQQQ") == expected
    assert g.path_filestat_get(3, 0, "inside", 0) == "SUCCESS" and g.take("B", 16)[0] == chibishim.SYMBOLIC_LINK
    assert g.path_filestat_get(3, 0, "file/", 0) == "ENOTDIR" and g.path_filestat_get(3, 2, "file", 0) == "EINVAL"


def test_directories_and_links(guest, root):
    g = guest(root)
    assert g.path_create_directory(3, "d/") == "SUCCESS" and g.path_create_directory(3, "d") == "EEXIST"
    assert g.path_symlink("../file", 3, "d/l") == "SUCCESS" and os.readlink(root / "d" / "l") == "../file"
    assert g.path_readlink(3, "d/l", 64, 4, 0) == "SUCCESS" and g.take("I")[0] == 4 and g.take("5s", 64)[0] == b"../f\0"
    assert g.path_readlink(3, "file", 64, 4, 0) == "EINVAL"
    assert g.path_symlink("/etc", 3, "d/m") == "EPERM" and g.path_symlink("x", 3, "d/m/") == "ENOENT"
    assert g.path_link(3, 0, "file", 3, "d/hard") == "SUCCESS" and g.path_link(3, 0, "file", 3, "d/hard") == "EEXIST"
    assert g.path_link(3, FOLLOW, "inside", 3, "d/followed") == "SUCCESS" and not (root / "d" / "followed").is_symlink()
    assert g.path_link(3, 0, "file", 3, "d/x/") == "ENOENT" and g.path_link(3, 2, "file", 3, "d/x") == "EINVAL"
    assert g.path_remove_directory(3, "d") == "ENOTEMPTY" and g.path_remove_directory(3, "file") == "ENOTDIR"
    assert g.path_unlink_file(3, "sub") == g.path_unlink_file(3, "sub/") == "EISDIR"
    assert g.path_unlink_file(3, "file/") == g.path_remove_directory(3, "inside_directory/") == "ENOTDIR"
    assert g.path_rename(3, "d/", 3, "e/") == "SUCCESS" and (root / "e" / "hard").exists()
    assert g.path_rename(3, "file", 3, "f/") in ("ENOTDIR", "ENOENT") and g.path_rename(3, "file/", 3, "f") == "ENOTDIR"
    assert g.path_rename(3, "sub", 3, "sub/deep/x") == "EINVAL" and g.path_rename(3, "file", 3, "sub") == "EISDIR"
    for name in "l", "hard", "followed":
        assert g.path_unlink_file(3, "e/" + name) == "SUCCESS"
    assert g.path_remove_directory(3, "e/") == "SUCCESS" and g.path_remove_directory(3, "e") == "ENOENT"


def test_readdir_over_thousands_of_entries(guest, tmp_path):
    names = {b"file%d" % i for i in range(5000)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    g = guest(tmp_path)
    found = g.entries(3, 1000)
    assert set(found) == names | {b".", b".."}
    assert {type for name, (_, type) in found.items() if name in names} == {chibishim.REGULAR_FILE}


def test_readdir_s_cookies_hold_while_entries_are_deleted(guest, tmp_path):
    for index in range(500):
        (tmp_path / ("file%d" % index)).touch()
    g = guest(tmp_path)
    found = g.entries(3, 256, after=lambda name: name.startswith(b"f") and g.path_unlink_file(3, name))
    assert len(found) == 502 and os.listdir(tmp_path) == []
    assert set(g.entries(3)) == {b".", b".."}                           # cookie 0 looks anew


def test_readdir_tells_types_and_starts_at_a_cookie(guest, root):
    g = guest(root)
    found = g.entries(3, 64)
    types = {b".": 3, b"..": 3, b"file": 4, b"sub": 3, b"up": 7, b"fifo": 0}
    assert {name: found[name][1] for name in types} == types
    assert g.fd_readdir(3, 4096, 4096, found[b"sub"][0], 0) == "SUCCESS"
    assert g.take("3s", 4096 + 24)[0] == b"sub"


def test_prestat(guest, root):
    g = guest((str(root), "/data"))
    assert g.fd_prestat_get(3, 0) == "SUCCESS" and g.take("II") == (0, 5)
    assert g.fd_prestat_dir_name(3, 64, 5) == "SUCCESS" and g.take("5s", 64)[0] == b"/data"
    assert g.fd_prestat_dir_name(3, 64, 4) == "ENAMETOOLONG"
    assert g.fd_prestat_get(4, 0) == g.fd_prestat_get(0, 0) == g.fd_prestat_get(g.opened("sub"), 0) == "EBADF"


def test_renumber_and_close(guest, root):
    g = guest(root)
    first, second = g.opened("file"), g.opened("sub/file")
    assert g.fd_renumber(first, 99) == g.fd_renumber(99, first) == "EBADF"
    before = descriptors_open()
    assert g.fd_renumber(second, first) == g.fd_renumber(first, first) == "SUCCESS"
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert g.read(second)[0] == "EBADF" and g.read(first) == ("SUCCESS", b"file")
    assert g.fd_close(first) == "SUCCESS" and g.fd_close(first) == "EBADF"
    assert g.opened("file") == first


# -- poll_oneoff --


def subscription_clock(userdata, clock, timeout, flags=0):
    return struct.pack("<QB7xI4xQQH6x", userdata, 0, clock, timeout, 0, flags)


def subscription_fd(userdata, tag, number):
    return struct.pack("<QB7xI28x", userdata, tag, number)


def poll(g, *subscriptions):
    """(errno, [(userdata, errno, tag, nbytes, flags)])"""
    outcome = g.poll_oneoff(g.put(b"".join(subscriptions))[0], 4096, len(subscriptions), 0)
    return outcome, [g.take("QHB5xQH", 4096 + 32 * i) for i in range(g.take("I")[0])] if outcome == "SUCCESS" else None


@pytest.mark.parametrize("clock", [0, 1])
@pytest.mark.parametrize("absolute", [0, 1])
def test_a_clock_is_waited_for_without_spinning(guest, clock, absolute):
    g = guest()
    start, busy = time.clock_gettime_ns(chibishim.WASI_CLOCKS[clock]), time.process_time()
    timeout = 200_000_000 + (start if absolute else 0)
    assert poll(g, subscription_clock(7, clock, timeout, absolute), subscription_clock(8, clock, timeout + 10**12, absolute)) == (
        "SUCCESS", [(7, 0, 0, 0, 0)])
    assert time.clock_gettime_ns(chibishim.WASI_CLOCKS[clock]) - start >= 200_000_000
    assert time.process_time() - busy < 0.1


def test_descriptors_are_waited_for_without_spinning(guest):
    g = guest()
    mine, theirs = os.pipe()
    number = g.wasi.insert(chibishim.Descriptor(mine, chibishim.STREAM_RIGHTS))
    busy = time.process_time()
    assert poll(g, subscription_fd(1, 1, number), subscription_clock(2, 1, 200_000_000))[1] == [(2, 0, 0, 0, 0)]
    assert time.process_time() - busy < 0.1
    threading.Timer(0.1, os.write, (theirs, b"12345")).start()
    assert poll(g, subscription_fd(1, 1, number), subscription_clock(2, 1, 60 * 10**9))[1] == [(1, 0, 1, 5, 0)]
    os.close(theirs)
    assert poll(g, subscription_fd(1, 1, number))[1] == [(1, 0, 1, 5, 1)]           # hung up, yet five bytes are left


def test_poll_of_files_and_bad_descriptors_is_immediate(guest, root):
    g = guest(root)
    number = g.opened("file", base=READ | WRITE | RIGHTS["poll_fd_readwrite"])
    assert poll(g, subscription_fd(1, 1, number), subscription_fd(2, 2, number), subscription_clock(3, 1, 10**12))[1] == [
        (1, 0, 1, 4, 0), (2, 0, 2, 1, 0)]
    assert sorted(poll(g, subscription_fd(1, 1, 99), subscription_fd(2, 1, 3), subscription_clock(3, 1, 10**12))[1]) == [
        (1, WASI_ERRNO["EBADF"], 1, 0, 0), (2, WASI_ERRNO["ENOTCAPABLE"], 1, 0, 0)]


def test_poll_s_arguments_are_checked(guest):
    g = guest()
    assert poll(g)[0] == poll(g, subscription_fd(1, 3, 0))[0] == poll(g, subscription_clock(1, 4, 0))[0] == "EINVAL"
    assert poll(g, subscription_clock(1, 2, 0))[0] == "ENOTSUP"
    assert g.poll_oneoff(0, 0, 5000, 0) == "EINVAL" and g.poll_oneoff(0, 0xFFFFFFF0, 1, 0) == "EFAULT"


def test_the_longest_timeout_is_no_error(guest, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or (_ for _ in ()).throw(InterruptedError(4, "")))
    assert poll(guest(), subscription_clock(1, 1, (1 << 64) - 1))[0] == "EINTR" and 0 < slept[0] <= 3600


# -- sockets --


@pytest.fixture
def connection(guest):
    """(guest, number of a connection it accepted, the peer)"""
    listener = socket.create_server(("127.0.0.1", 0))
    g = guest(listeners=[os.dup(listener.fileno())])
    peer = socket.create_connection(listener.getsockname())
    assert g.sock_accept(3, 0, 0) == "SUCCESS"
    yield g, g.take("I")[0], peer
    peer.close()
    listener.close()


def receive(g, number, size=100, flags=0):
    iovecs = g.iovecs(bytes(size))
    return g.sock_recv(number, *iovecs, flags, 0, 4), g.received(iovecs[0])


def test_accept_receive_send_and_shut_down(connection):
    g, number, peer = connection
    peer.sendall(b"Hello")
    assert receive(g, number, 2, flags=1) == ("SUCCESS", b"He") and receive(g, number) == ("SUCCESS", b"Hello")
    peer.sendall(b"ab")
    threading.Timer(0.1, peer.sendall, (b"cd",)).start()
    assert receive(g, number, 4, flags=2) == ("SUCCESS", b"abcd")
    assert g.sock_send(number, *g.iovecs(b"good", b"bye"), 0, 0) == "SUCCESS" and g.take("I")[0] == 7
    assert g.write(number, b"!") == "SUCCESS"
    assert g.sock_shutdown(number, 2) == "SUCCESS" and g.sock_send(number, *g.iovecs(b"x"), 0, 0) == "EPIPE"
    received = b""
    while piece := peer.recv(100):
        received += piece
    assert received == b"goodbye!"
    peer.close()
    assert receive(g, number) == ("SUCCESS", b"") and g.fd_close(number) == "SUCCESS"


def test_a_listener_that_does_not_block(connection):
    g, number, peer = connection
    assert g.fd_fdstat_set_flags(3, NONBLOCK) == "SUCCESS" and g.sock_accept(3, 0, 0) == "EAGAIN"
    assert poll(g, subscription_fd(1, 1, 3), subscription_clock(2, 1, 0))[1] == [(2, 0, 0, 0, 0)]
    with socket.create_connection(peer.getpeername()):
        assert poll(g, subscription_fd(1, 1, 3))[1][0][:3] == (1, 0, 1)
        assert g.sock_accept(3, NONBLOCK, 0) == "SUCCESS"
        accepted = g.take("I")[0]
        assert receive(g, accepted)[0] == "EAGAIN"
        assert g.fd_fdstat_get(accepted, 0) == "SUCCESS" and g.take("BxH") == (chibishim.STREAM_SOCKET, NONBLOCK)


def test_socket_functions_check_their_arguments(connection, root):
    g, number, _ = connection
    assert g.sock_accept(3, 1, 0) == g.sock_recv(number, 0, 0, 4, 0, 0) == g.sock_send(number, 0, 0, 1, 0) == "EINVAL"
    assert g.sock_shutdown(number, 0) == g.sock_shutdown(number, 4) == "EINVAL"
    assert g.sock_accept(0, 0, 0) == g.sock_recv(1, 0, 0, 0, 0, 0) == g.sock_shutdown(2, 3) == "ENOTSOCK"
    assert g.sock_accept(99, 0, 0) == g.sock_shutdown(99, 3) == "EBADF"
    assert g.sock_accept(number, 0, 0) == g.sock_shutdown(3, 3) == "ENOTCAPABLE"
    before = descriptors_open()
    assert g.sock_accept(3, 0, 0xFFFFFFFF) == "EFAULT" and len(os.listdir("/proc/self/fd")) == before


# -- the snapshot before preview 1 --


def test_wasi_unstable_differs_in_whence_filestat_and_subscriptions(guest, root):
    g = guest(root, unstable=True)
    number = g.opened("file", base=chibishim.FILE_RIGHTS)
    assert [g.fd_seek(number, 1, 2, 0), g.fd_seek(number, 1, 0, 0), g.fd_seek(number, 0, 1, 0)] == ["SUCCESS"] * 3
    assert g.take("Q")[0] == 4
    assert g.fd_filestat_get(number, 0) == "SUCCESS" and g.take("B3xIQ", 16) == (chibishim.REGULAR_FILE, 1, 4)
    clock = struct.pack("<QB7xQI4xQQH6x", 7, 0, 0, 1, 1000, 0, 0)
    assert poll(g, clock, clock) == ("SUCCESS", [(7, 0, 0, 0, 0)] * 2)


# -- guests in processes of their own --

WRITE_HELLO = """(module (import "wasi_snapshot_preview1" "fd_write" (func $w (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1) (data (i32.const 8) "Hello, World!\\n")
  (func (export "_start") (i32.store (i32.const 0) (i32.const 8)) (i32.store (i32.const 4) (i32.const 14))
    (drop (call $w (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 100))) %s))"""


def command(module, *arguments, options=(), tmp_path):
    path = tmp_path / "guest.wasm"
    path.write_bytes(module)
    return [sys.executable, "-IS", SHIM, "run", *options, str(path), *arguments]


def run(module, *arguments, options=(), tmp_path, **keywords):
    return subprocess.run(command(module, *arguments, options=options, tmp_path=tmp_path),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, **keywords)


@pytest.fixture
def ours():
    """ours(name) -> the bytes of a module of tests/modules."""
    def load(name):
        with open(os.path.join(MODULES, name + ".wasm"), "rb") as file:
            return file.read()
    return load


def test_hello(wat, tmp_path):
    done = run(wat(WRITE_HELLO % ""), tmp_path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, World!\n", b"")


@pytest.mark.parametrize("code, status", [(0, 0), (7, 7), (255, 255), (-1, 255), (-2, 254), (256, 255), (257, 1)])
def test_proc_exit_is_the_exit_status_and_failure_never_success(wat, tmp_path, code, status):
    assert run(wat(WRITE_HELLO % "(call $exit (i32.const %d))" % code), tmp_path=tmp_path).returncode == status


def test_a_trap_is_134_with_a_backtrace(wat, tmp_path):
    done = run(wat(WRITE_HELLO.replace("(export", "$main (export", 1).replace("(func $main", "(func") % "unreachable"), tmp_path=tmp_path)
    assert done.returncode == 134
    assert b"trap: unreachable" in done.stderr and b"0: " in done.stderr


@pytest.mark.parametrize("text, message", [
    ('(module (import "x" "y" (func)))', b"unknown import x.y|exports no function"), ("(module)", b"exports no function '_start'"),
    ('(module (func (export "_start") (param i32)))', b"'_start' takes 1 arguments"),
    ('(module (memory (export "_start") 1))', b"exports no function")])
def test_a_module_that_is_no_command_is_134_with_the_reason(wat, tmp_path, text, message):
    done = run(wat(text), tmp_path=tmp_path)
    assert done.returncode == 134 and re.search(message, done.stderr) and b"Traceback" not in done.stderr


def test_a_missing_module_is_named(tmp_path):
    done = subprocess.run([sys.executable, SHIM, "run", str(tmp_path / "absent.wasm")], stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"absent.wasm: No such file" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("options, message", [
    (["--dir", "/absent"], b"/absent: No such file"), (["--dir", "a::b::rw"], b"HOST::GUEST::ro"), (["--dir", "/proc"], b"/proc: "),
    (["--tcplisten", "8080"], b"ADDRESS:PORT"), (["--tcplisten", "localhost:99999"], b"99999"),
    (["--tcplisten", "localhost:" + "9" * 5000], b"--tcplisten"), (["--tcplisten", "localhost:²"], b"ADDRESS:PORT"),
    (["--tcplisten", "\udcff:80"], b"hostname"), (["--env", "X"], b"--env X")])
def test_options_that_cannot_be_honoured_are_errors(wat, tmp_path, options, message):
    done = run(wat(WRITE_HELLO % ""), options=options, tmp_path=tmp_path)
    assert done.returncode in (1, 2) and message in done.stderr and b"Traceback" not in done.stderr and not done.stdout


def test_invoke_passes_arguments_and_prints_results(wat, tmp_path):
    text = """(module (func (export "add") (param i32 f64) (result f64 i32)
      (f64.add (f64.convert_i32_s (local.get 0)) (local.get 1)) (i32.const -1)))"""
    done = run(wat(text), "0x10", "0.5", options=["--invoke=add"], tmp_path=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"16.5 -1\n")
    for arguments in [(), ("1",), ("x", "1")]:
        assert run(wat(text), *arguments, options=["--invoke=add"], tmp_path=tmp_path).returncode == 134


def test_start_s_result_is_not_printed(wat, tmp_path):
    assert run(wat('(module (func (export "_start") (result i32) (i32.const 7)))'), tmp_path=tmp_path).stdout == b""


def test_a_preloaded_module_that_is_none_is_named(wat, tmp_path):
    (tmp_path / "cut.wasm").write_bytes(b"\0asm\1\0\0\0\1")
    done = run(wat(WRITE_HELLO % ""), options=["--preload=x=%s" % (tmp_path / "cut.wasm")], tmp_path=tmp_path)
    assert done.returncode == 134 and done.stderr.startswith(b"error: malformed: preload x: ")


def test_a_start_function_can_call_wasi_and_a_preloaded_one_cannot_crash_it(ours, wat, tmp_path):
    assert run(ours("greedy_start"), tmp_path=tmp_path).stdout == b"early\n"
    (tmp_path / "early.wasm").write_bytes(ours("greedy_start"))
    done = run(wat(WRITE_HELLO % ""), options=["--preload=x=%s" % (tmp_path / "early.wasm")], tmp_path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, World!\n", b"")


@pytest.mark.parametrize("data", [b"", b"one line\n", bytes(range(256)) * 1000], ids=["nothing", "a line", "256 kB"])
def test_stdin_is_read_to_its_end(ours, tmp_path, data):
    done = run(ours("cat"), input=data, tmp_path=tmp_path)
    assert (done.returncode, done.stdout) == (0, data)


def test_big_output_arrives_whole(ours, tmp_path):
    assert run(ours("spout"), tmp_path=tmp_path).stdout == b"y" * (10 << 20)


def test_a_closed_pipe_ends_the_guest_as_any_command(ours, tmp_path):
    process = subprocess.Popen(command(ours("spout"), tmp_path=tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(100) == b"y" * 100
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == -signal.SIGPIPE


def wait_asleep(pid):
    """Until a process that has run sleeps for half a second: proc_pid_stat(5)."""
    before, since = None, time.monotonic()
    deadline = since + 20
    while time.monotonic() < deadline:
        with open("/proc/%d/stat" % pid) as file:
            words = file.read().rpartition(") ")[2].split()
        now = words[0], words[11:13]
        if now != before or words[0] != "S" or words[11] == "0":
            before, since = now, time.monotonic()
        elif time.monotonic() - since > 0.5:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["cat", "sleep"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_blocking_call(ours, tmp_path, name, number):
    "L7: in a blocking read, in poll_oneoff"
    process = subprocess.Popen(command(ours(name), tmp_path=tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if name == "cat":
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
    else:
        wait_asleep(process.pid)
    process.send_signal(number)
    assert process.wait(60) == -number and process.stderr.read() == b""


def test_an_ignored_interrupt_stays_ignored(ours, tmp_path):
    process = subprocess.Popen(command(ours("cat"), tmp_path=tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.stdin.write(b"x")
    process.stdin.flush()
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGINT)
    assert process.communicate(b"y")[0] == b"y" and process.returncode == 0


def test_signals_have_linux_s_numbers():
    names = ("HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM CHLD CONT STOP TSTP TTIN TTOU URG XCPU XFSZ "
             "VTALRM PROF WINCH POLL PWR SYS").split()
    assert chibishim.WASI_SIGNALS == (0, *[getattr(signal, "SIG" + name) for name in names])


@pytest.mark.parametrize("number, status", [(15, -15), (6, -6), (13, -13), (24, -25), (0, 99), (16, 99), (27, 99), (31, 99)])
def test_proc_raise(ours, tmp_path, number, status):
    assert run(ours("raise"), chr(65 + number), tmp_path=tmp_path).returncode == status


@as_root
@pytest.mark.parametrize("number, status", [(15, 143), (9, 137), (27, 99)])
def test_proc_raise_as_the_init_of_a_pid_namespace(ours, tmp_path, number, status):
    done = subprocess.run(["unshare", "--pid", "--fork"] + command(ours("raise"), chr(65 + number), tmp_path=tmp_path), stderr=subprocess.PIPE)
    if b"unshare" in done.stderr:
        pytest.skip("no pid namespaces here: %r" % done.stderr)
    assert done.returncode == status


def test_a_directory_as_a_standard_stream_grants_nothing_below_it(guest, root):
    "W8: the guest sees the preopens alone, whatever `< .` says"
    g = guest()
    g.wasi.descriptors[0] = chibishim.standard_stream(os.open(root, os.O_RDONLY))
    assert g.open("file", directory=0)[0] == g.open("file", base=0, directory=0)[0] == "ENOTCAPABLE"
    assert g.path_unlink_file(0, "file") == g.path_create_directory(0, "new") == g.fd_readdir(0, 64, 64, 0, 0) == "ENOTCAPABLE"
    assert g.path_filestat_get(0, 0, "file", 0) == g.path_readlink(0, "inside", 64, 64, 0) == "ENOTCAPABLE"
    assert g.fd_filestat_get(0, 0) == "SUCCESS" and os.path.exists(root / "file") and not os.path.exists(root / "new")
    assert g.fd_close(0) == "SUCCESS"


def test_a_file_never_takes_the_number_of_a_standard_stream(ours, root, tmp_path):
    done = run(ours("reuse_stderr"), options=["--dir=%s::/" % root], tmp_path=tmp_path)
    assert done.returncode == 134 and (root / "new").read_bytes() == b""


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_standard_streams_that_are_closed_from_the_start(ours, root, tmp_path, closed):
    words = command(ours("reuse_stderr"), options=["--dir=%s::/" % root], tmp_path=tmp_path)
    assert subprocess.run(["sh", "-c", 'exec "$@" %d>&-' % closed, "sh"] + words, stderr=subprocess.DEVNULL).returncode == 134
    assert (root / "new").read_bytes() == b""


def test_closing_stdout_ends_the_reader_s_file(guest):
    mine, theirs = os.pipe()
    script = ("import sys; sys.path[:0] = %r; import os, time, test_wasi; g = test_wasi.Guest(); assert g.fd_close(1) == 'SUCCESS'; "
              "assert g.write(1, b'x') == 'EBADF'; time.sleep(60)" % [ROOT, os.path.join(ROOT, "tests")])
    process = subprocess.Popen([sys.executable, "-c", script], stdout=theirs)
    os.close(theirs)
    try:
        assert os.read(mine, 1) == b"" and process.poll() is None
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def test_a_listening_socket_by_the_command_line(wat, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = """(module (import "wasi_snapshot_preview1" "sock_accept" (func $accept (param i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "sock_send" (func $send (param i32 i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1) (data (i32.const 16) "Hello") (data (i32.const 0) "\\10\\00\\00\\00\\05\\00\\00\\00")
      (func (export "_start") (drop (call $accept (i32.const 3) (i32.const 0) (i32.const 8)))
        (drop (call $send (i32.load (i32.const 8)) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 12)))))"""
    process = subprocess.Popen(command(wat(text), options=["--tcplisten=127.0.0.1:%d" % port], tmp_path=tmp_path))
    try:
        with socket.socket() as peer:
            until(lambda: peer.connect_ex(("127.0.0.1", port)) == 0)
            assert peer.recv(100) == b"Hello"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


# -- the official suite and real programs: some of `make wasi` and `make programs` --

SOME_CASES = ["rust/interesting_paths", "rust/path_link", "rust/fd_readdir", "rust/poll_oneoff_stdio", "rust/path_rename_dir_trailing_slashes",
              "rust/nofollow_errors", "c/pwrite-with-append", "c/stat-dev-ino", "assemblyscript/environ_get-multiple-variables"]
SOME_RUNS = ["chibi-risp/repl", "chibi-rjo/pretty", "figlet/slant", "minigzip/file", "sqlite-wasi-unstable/file", "wazero-zig/ls-repeat",
             "wazero-zig/stat", "hexyl/stdin", "go-testdir-helloworld/run", "lua/pcall", "micropython/exc"]


@pytest.mark.parametrize("program", [run_wasi.SHIM, run_wasi.WITHOUT_OPENAT2], ids=["openat2", "walk"])
@pytest.mark.parametrize("name", SOME_CASES)
def test_the_official_suite(name, program):
    if run_wasi.unpacked() is None:
        pytest.skip("no official suite in %s" % run_wasi.WASI)
    case, = [case for case in run_wasi.cases([name]) if run_wasi.title(case) == name]
    assert run_wasi.run_case(case, program) == ""


@pytest.mark.parametrize("name", SOME_RUNS)
def test_real_programs(name):
    found = [one for one in run_programs.runs([name]) if one[0] == name]
    if not found:
        pytest.skip("no programs in %s" % SHARED)
    assert run_programs.execute(*found[0]) == ""


def test_a_failure_of_the_c_library_is_an_error():
    """Of a function that returns an int too: its -1 has 32 bits."""
    for call in (lambda: chibishim.libc.prctl(9999, 0, 0, 0, 0), lambda: chibishim.libc.umount2(b"/no/such", 0),
                 lambda: chibishim.libc.syscall(-1)):
        with pytest.raises(OSError):
            call()
    with pytest.raises(OSError):
        chibishim.is_kernel_filesystem(9999)
