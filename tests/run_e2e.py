"""Runs the shim under every client that the lab has: ctr and CRI of containerd 1.6, 1.7 and
2.1, Docker 26 and 28.

    python tests/run_e2e.py [OPTION…] [WORD]…

runs the cases whose "VERSION CLIENT IMAGE TITLE" contains one of the words (all without), prints a
line for each with the seconds it took, and says what each left behind. Options:

    --versions=1.6,1.7,2.1      versions of containerd; Docker goes with one (26 with 1.7, 28 with 2.1)
    --clients=ctr,spec,docker,cri
    --images=wasm,native
    --runtime=chibiwasm         or runc, to see whether a case asks too much (native only)
    --shim=FILE                 the shim under test (dist/containerd-shim-chibiwasm-v1)
    --scratch=DIR               where the lab is copied to and set up, once
    --runs=100                  how many containers "fast runs" runs
    --unconfined                Docker without its seccomp profile
    --list                      the titles, nothing run
    --keep                      leave the daemons running

Needs root. What cannot be set up is skipped, and says so. Every daemon that it started is ended.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback

import archives

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAB = os.path.join(ROOT, os.environ.get("SHARED", "../shared"), "lab")
MODULES = os.path.join(ROOT, "tests", "modules")
PREFIX = "chibi-e2e"                    # of containers, cgroups and pods
RUNTIMES = {                            # --runtime: (containerd's, Docker's, CRI's handler)
    "chibiwasm": ("io.containerd.chibiwasm.v1", "io.containerd.chibiwasm.v1", "chibiwasm"),
    "runc": ("io.containerd.runc.v2", "runc", "runc"),
}
IMAGES = {"native": "lab.local/busybox:latest", "wasm": "lab.local/wasmbox:1"}
PROGRAM_SECONDS = 60
TOOLS = ("gcc", "dpkg", "apt-get", "setsid")


class Skip(Exception):
    """The case cannot be run here; the text says why."""


class Failure(Exception):
    """The case failed; the text says how."""


def same(actual, wanted, what="output"):
    """Fails where two values differ."""
    if actual != wanted:
        raise Failure("%s is %.300r, not %.200r" % (what, actual, wanted))


def holds(condition, text, *values):
    """Fails with the text unless the condition is true."""
    if not condition:
        raise Failure(text % tuple("%.500r" % (value,) for value in values))


def until(condition, what, seconds=10.0):
    """The first true value of condition(); fails after the time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failure("%s: not after %g s" % (what, seconds))
        time.sleep(0.02)


def read(path, default=""):
    """A small file's text, or the default."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return default


def processes():
    """Yields (pid, [words of the command line]) of every process."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        words = read("/proc/%s/cmdline" % pid).split("\0")
        if words[0]:
            yield int(pid), words


class Terminal:
    """A program with a terminal of its own; `text` is all that it wrote."""

    def __init__(self, words, rows=33, columns=101, environment=None):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))
                modes = termios.tcgetattr(0)
                modes[1] &= ~termios.ONLCR          # what returns as \r\n went through the container's terminal
                termios.tcsetattr(0, termios.TCSANOW, modes)
                os.execvpe(words[0], words, environment or os.environ)
            finally:
                os._exit(127)
        self.text = b""
        self.status = None

    def read_for(self, seconds):
        """Reads what comes within the time; False at the end of it all."""
        if not select.select([self.fd], [], [], max(0, seconds))[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""
        self.text += data
        return bool(data)

    def expect(self, text, seconds=15):
        """Reads until the text has come."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            if not self.read_for(min(0.2, deadline - time.monotonic())) or time.monotonic() > deadline:
                raise Failure("terminal: no %r in %.400r" % (text, self.text))

    def send(self, data):
        os.write(self.fd, data)

    def resize(self, rows, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))

    def end(self, seconds=15):
        """Reads to the end; returns the exit status."""
        deadline = time.monotonic() + seconds
        while self.read_for(min(0.2, deadline - time.monotonic())) and time.monotonic() < deadline:
            pass
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.kill()
                raise Failure("terminal: the client does not end; it wrote %.400r" % self.text)
            else:
                time.sleep(0.02)
        return self.status

    def kill(self):
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)


class Lab:
    """The lab's copy, set up, with its daemons; everything below its folder and `run`."""

    def __init__(self, options):
        self.options = options
        digest = hashlib.sha256()
        for path in sorted(glob.glob(os.path.join(LAB, "**"), recursive=True)):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    digest.update(os.path.relpath(path, LAB).encode() + b"\0" + file.read())
        name = "%s-%s" % (PREFIX, digest.hexdigest()[:12])
        self.folder = options.get("scratch") or os.path.join(tempfile.gettempdir(), name)
        self.run = os.environ.get("LAB_RUN") or "/run/" + PREFIX        # short: a socket's name has 107 bytes at most
        self.environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LANG": "C.UTF-8", "TERM": "xterm",
                            "LAB": self.folder, "LAB_RUN": self.run,
                            "LAB_VAR": os.environ.get("LAB_VAR") or os.path.join(self.folder, "var"),
                            "LAB_SHIMS": os.path.dirname(options["shim"]), "DOCKERD_ARGS": "--cgroup-parent=/" + PREFIX}
        self.dockers = set()
        self.versions = []
        self.cri = None                                 # the lab's module cri, once it is there

    def script(self, name, *words, seconds=PROGRAM_SECONDS, **more):
        """Runs one of the lab's scripts to its end: CompletedProcess."""
        return run_words([os.path.join(self.folder, name), *words], seconds, env=self.environment, **more)

    def words(self, name, *words):
        """The command line of a script."""
        return [os.path.join(self.folder, name), *words]

    def need(self, name, *words, seconds=1800, **more):
        """A step of the set-up that must succeed."""
        done = self.script(name, *words, seconds=seconds, **more)
        if done.returncode:
            raise Skip("%s: %s" % (" ".join((name, *words)), last_line(done.stderr or done.stdout)))

    def set_up(self, versions):
        """Copies the lab, fetches the versions and makes the images; what is there stays."""
        for tool in TOOLS:
            if not shutil.which(tool):
                raise Skip("%s is not installed" % tool)
        if not os.path.exists(os.path.join(self.folder, "lab.sh")):
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(LAB, self.folder + ".new", dirs_exist_ok=True)
            for top, directories, files in os.walk(self.folder + ".new"):
                for file in directories + files:
                    os.chmod(os.path.join(top, file), 0o755)
            os.rename(self.folder + ".new", self.folder)
        self.lock = open(os.path.join(self.folder, "lock"), "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Skip("another run uses %s" % self.folder) from None
        for version in versions:
            try:
                self.need("fetch.sh", version)
                self.versions.append(version)
            except Skip as reason:
                loud("containerd %s: %s" % (version, reason))
        if not self.versions:
            raise Skip("no version of containerd could be fetched")
        self.make_images()
        for version in list(self.versions):
            try:
                self.need("lab.sh", "up", version)
            except Skip as reason:
                self.versions.remove(version)
                loud("containerd %s: %s" % (version, reason))

    def make_images(self):
        """busybox, the same of Wasm programs, pause, hello."""
        images = os.path.join(self.folder, "images")
        if os.path.exists(os.path.join(images, "wasmbox.tar")):
            return
        environment = dict(self.environment, HELLO_WASM=os.path.join(MODULES, "hello.wasm"))
        box = os.path.join(self.folder, "imgsrc", "wasmbox.wasm")
        for words in (["mkimages.py", "images"], ["mkwasm.py", "images/wasm", box]):
            done = run_words([sys.executable, *words], 300, env=environment, cwd=self.folder)
            if done.returncode:
                raise Skip("%s: %s" % (words[0], last_line(done.stderr)))
        shutil.copy(os.path.join(images, "wasm", "busybox.tar"), os.path.join(images, "wasmbox.tar"))

    def set_up_cri(self):
        """The lab's CRI client with its gRPC."""
        python = os.path.join(self.folder, "venv", "bin", "python")
        if not os.path.exists(python):
            done = run_words([sys.executable, "-m", "venv", os.path.join(self.folder, "venv")], 300)
            if done.returncode:
                raise Skip("venv: %s" % last_line(done.stdout + done.stderr))
        api = os.path.join(self.folder, "cri")
        if not os.path.exists(os.path.join(api, "api_pb2_grpc.py")):
            for words in (["-m", "pip", "-q", "install", "--disable-pip-version-check", "grpcio", "grpcio-tools"],
                          ["-m", "grpc_tools.protoc", "-I" + api, "--python_out=" + api, "--grpc_python_out=" + api, "api.proto"]):
                done = run_words([python, *words], 900)
                if done.returncode:
                    raise Skip("%s: %s" % (words[1], last_line(done.stderr)))
        os.environ["GRPC_VERBOSITY"] = "NONE"
        sys.path += glob.glob(os.path.join(self.folder, "venv", "lib", "python*", "site-packages")) + [api]
        import cri
        self.cri = cri

    def set_up_docker(self, version):
        if version == "1.6":
            raise Skip("Docker 20.10 knows no shim but runc's")
        self.need("docker.sh", "up", version)
        self.dockers.add(version)

    def restart(self, version):
        """containerd ends and starts again."""
        self.need("lab.sh", "down", version)
        self.need("lab.sh", "up", version)

    def tear_down(self):
        for version in self.dockers:
            self.script("docker.sh", "down", version)
        for version in self.versions:
            self.script("lab.sh", "down", version)

    def address(self, version):
        return os.path.join(self.run, version, "containerd.sock")

    def shims(self, version):
        """Process ids of the shims that serve this containerd, and of their Wasm guests."""
        address = self.address(version)
        return [pid for pid, words in processes() if address in words and any("containerd-shim" in word for word in words[:4])]

    def left(self, version):
        """What ended containers left: processes, mounts, bundles, cgroups."""
        state = os.path.join(self.run, version, "state")
        found = ["shim %d" % pid for pid in self.shims(version)]
        found += ["mount " + line.split()[1] for line in read("/proc/self/mounts").splitlines() if line.split()[1].startswith(state + "/")]
        found += ["bundle " + path for path in glob.glob(state + "/io.containerd.runtime.v2.task/*/*")]
        for top in ("/sys/fs/cgroup", "/sys/fs/cgroup/*", "/sys/fs/cgroup/unified"):
            found += ["cgroup " + path for path in glob.glob(top + "/default/%s-%s-*" % (PREFIX, version))]
            found += ["cgroup " + path for path in glob.glob(top + "/%s/*/" % PREFIX)]
        return found


def run_words(words, seconds, input=b"", **more):
    """A program with pipes, to its end; with all its children it is killed after the time."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **more)
    try:
        stdout, stderr = process.communicate(input, timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Failure("no end after %d s: %s" % (seconds, " ".join(words)[-200:])) from None
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def last_line(data):
    """The last line with something in it."""
    lines = [line for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def loud(text):
    print("*** SKIPPED: " + text, flush=True)


# --- what cases use ---


class Box:
    """What a case gets: a version, an image of the kind asked for, ways to run it."""

    serial = 0

    def __init__(self, lab, version, kind):
        self.lab, self.version, self.kind = lab, version, kind
        self.image = IMAGES[kind]
        self.wasm = kind == "wasm"
        self.runtime, self.docker_runtime, self.handler = RUNTIMES[lab.options["runtime"]]
        self.opened = []                # clients to kill at the end

    def name(self):
        """A fresh container's."""
        Box.serial += 1
        return "%s-%s-%d-%d" % (PREFIX, self.version, os.getpid(), Box.serial)

    def scratch(self):
        """A fresh directory that lasts as long as the case."""
        folder = tempfile.mkdtemp(prefix=PREFIX + "-")
        self.opened.append(lambda: shutil.rmtree(folder, ignore_errors=True))
        return folder

    def module(self, name):
        """The path of one of the tests' modules."""
        return os.path.join(MODULES, name + ".wasm")

    def busybox(self):
        """The path of a static native busybox."""
        return os.path.join(self.lab.folder, "tree", "bookworm", "bin", "busybox")

    def import_artifact(self, namespace, *options):
        """The name of an image whose layer is hello.wasm itself."""
        archive, image = os.path.join(self.scratch(), "raw.tar"), "lab.local/artifact:1"
        with open(self.module("hello"), "rb") as file:
            archives.artifact_of([file.read()], image, archive)
        local = ["--local"] if self.version[0] != "1" else []
        words = ("ctr", self.version, "-n", namespace, "image")
        done = self.lab.script("lab.sh", *words, "import", *local, *options, archive)
        same(done.returncode, 0, "ctr image import: %s" % last_line(done.stderr))
        self.opened.append(lambda: self.lab.script("lab.sh", *words, "rm", image))
        return image

    def foreign(self):
        """(path on the host, path inside, words that print "hello") of a program of the other kind."""
        if self.lab.options["runtime"] == "runc":
            raise Skip("runc runs no Wasm")
        if self.wasm:
            return self.busybox(), "/busybox", ["/busybox", "echo", "hello"], b"hello\n"
        return self.module("hello"), "/hello.wasm", ["/hello.wasm"], b"Hello, World!\n"

    def sleeper(self):
        """Shell text of a program that says ready and stays; the native one dies of TERM with 143."""
        return "echo ready; sleep 1000" if self.wasm else "trap 'exit 143' TERM; echo ready; while :; do sleep 0.05; done"

    def open_terminal(self, words):
        terminal = Terminal(words, environment=self.lab.environment)
        self.opened.append(lambda: terminal.kill())
        return terminal

    def popen(self, words, **more):
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                   env=self.lab.environment, **more)

        def end():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        self.opened.append(end)
        return process

    def close(self):
        for end in reversed(self.opened):
            end()

    def clear(self):
        """Ends what the case left on purpose; `settled` says what it left by accident."""

    def settled(self, seconds=6):
        """What is left after the case, given some time."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.lab.left(self.version)
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def shim(self):
        """The one shim's process id. A Wasm guest looks like its shim, but is its child."""
        family = self.lab.shims(self.version)
        shims = [pid for pid in family if parent_of(pid) not in family]
        holds(len(shims) == 1, "%s shims, not one", len(shims))
        return shims[0]


def parent_of(pid):
    return int((read("/proc/%d/stat" % pid).rpartition(") ")[2].split() or ["", 0])[1])


class CtrBox(Box):
    """ctr, in the namespace default."""

    def ctr_words(self, *words):
        return self.lab.words("lab.sh", "ctr", self.version, *words)

    def ctr(self, *words, input=b"", seconds=PROGRAM_SECONDS):
        done = self.lab.script("lab.sh", "ctr", self.version, *words, input=input, seconds=seconds)
        for stream in done.stdout, done.stderr:
            if b"flag provided but not defined" in stream:
                raise Skip("this ctr has no such option")
        return done

    def run_words(self, text, *options, id=None, image=None, program=None):
        """ctr's words that run a shell text, or a program's words, in a container."""
        return ["run", "--runtime", self.runtime, *options, image or self.image, id or self.name(), *(program or ["sh", "-c", text])]

    def run(self, text, *options, **more):
        """Runs a text to its end, and removes the container."""
        given = {name: more.pop(name) for name in ("input", "seconds") if name in more}
        return self.ctr(*self.run_words(text, "--rm", *options, **more), **given)

    def start(self, text=None, *options, **more):
        """Runs a text (a sleeper) detached; the container's name."""
        id = more.pop("id", None) or self.name()
        done = self.ctr(*self.run_words(text or self.sleeper(), "-d", *options, id=id, **more))
        same(done.returncode, 0, "ctr run -d: %s" % last_line(done.stderr))
        return id

    def task(self, id):
        """(pid, status) of `ctr task ls`, (0, None) if it is not there."""
        for line in self.ctr("task", "ls").stdout.decode().splitlines()[1:]:
            words = line.split()
            if words[0] == id:
                return int(words[1]), words[2]
        return 0, None

    def ends(self, id, status=None):
        """Waits until the task is STOPPED; removes it and returns its exit status."""
        until(lambda: self.task(id)[1] == "STOPPED", "STOPPED")
        done = self.ctr("task", "rm", id)
        text = (done.stdout + done.stderr).decode()
        match = re.search(r"exit code (\d+)|non-zero exit code: (\d+)", text)
        code = int(match[1] or match[2]) if match else 0
        self.ctr("container", "rm", id)
        if status is not None:
            same(code, status, "exit status")
        return code

    def execute(self, id, *words, options=(), **more):
        return self.ctr("task", "exec", "--exec-id", self.name(), *options, id, *words, **more)

    def clear(self):
        for id in self.ctr("task", "ls", "-q").stdout.decode().split():
            if id.startswith(PREFIX):
                self.ctr("task", "resume", id)
                self.ctr("task", "delete", "-f", id)
        for id in self.ctr("container", "ls", "-q").stdout.decode().split():
            if id.startswith(PREFIX):
                self.ctr("container", "rm", id)

    def events(self):
        """A list that fills with (topic, line) of ctr events while the case runs."""
        process = self.popen(self.ctr_words("events"))
        found = []

        def follow():
            for line in process.stdout:
                text = line.decode("utf-8", "replace")
                match = re.search(r" (/tasks/[-a-z]+)", text)
                if match:
                    found.append((match[1], text))
        threading.Thread(target=follow, daemon=True).start()
        time.sleep(0.4)
        return found

    def cgroup_file(self, id, controller, name1, name2):
        """The text of a limit's file in the task's cgroup."""
        return cgroup_file(self.task(id)[0], controller, name1, name2)


def cgroup_file(pid, controller, name1, name2):
    """The text of a file in a process's cgroup, of version 1 or else 2."""
    groups = {}
    for line in read("/proc/%d/cgroup" % pid).splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update((one, path) for one in controllers.split(","))
    if controller in groups:
        return read("/sys/fs/cgroup/%s%s/%s" % (controller, groups[controller], name1)).strip()
    return read("/sys/fs/cgroup%s/%s" % (groups.get("", "/"), name2)).strip()


def cpu_ticks(pid):
    return int(read("/proc/%d/stat" % pid).rpartition(") ")[2].split()[11])


def state_of(pid):
    """R, S, Z, …; "" for a process that is not there."""
    return (read("/proc/%d/stat" % pid).rpartition(") ")[2].split() or [""])[0]


CASES = []                              # (client, kinds of images, title, function)


def case(client, title, kinds=("wasm", "native")):
    """Registers a case: function(box) raises Failure or Skip, or all is well."""
    def register(function):
        CASES.append((client, kinds, title, function))
        return function
    return register


NATIVE, WASM = ("native",), ("wasm",)


# --- ctr: the life of a container ---


@case("ctr", "run: output, and streams apart")
def _(box):
    done = box.run("echo out; echo err >&2")
    same((done.stdout, done.stderr, done.returncode), (b"out\n", b"err\n", 0))


@case("ctr", "run: exit status")
def _(box):
    for status in (0, 1, 7, 255):
        same(box.run("exit %d" % status).returncode, status, "exit status")


@case("ctr", "run: arguments, environment, working directory")
def _(box):
    done = box.run("echo $A; pwd", "--env", "A=x y", "--cwd", "/tmp")
    same(done.stdout, b"x y\n/\n" if box.wasm else b"x y\n/tmp\n")      # WASI preview 1 has no working directory


@case("ctr", "run: 20,000 lines arrive whole")
def _(box):
    wanted = "".join("%d\n" % n for n in range(1, 20001)).encode()
    same(box.run("seq 20000", seconds=120).stdout, wanted)


@case("ctr", "run: a missing program is named")
def _(box):
    done = box.run("", program=["/no/such"])
    holds(done.returncode and b"/no/such" in done.stderr, "status %s, %s", done.returncode, done.stderr)


@case("ctr", "run: a program of the other kind in the image")
def _(box):
    host, inside, words, wanted = box.foreign()
    done = box.run("", "--mount", "type=bind,src=%s,dst=%s,options=rbind:ro" % (host, inside), program=words)
    same((done.stdout, done.returncode), (wanted, 0), "outcome (%s)" % last_line(done.stderr))


@case("ctr", "run: an image whose layer is a module", WASM)
def _(box):
    if box.version == "1.6":
        raise Skip("this ctr unpacks no such image")
    image = box.import_artifact("default", "--platform", "wasip1/wasm")
    done = box.run("", "--platform", "wasip1/wasm", image=image, program=["/hello.wasm"])
    same((done.stdout, done.returncode), (b"Hello, World!\n", 0), "outcome (%s)" % last_line(done.stderr))


@case("ctr", "stdin: lines, and its end")
def _(box):
    id = box.name()
    client = box.popen(box.ctr_words(*box.run_words("", "--rm", id=id, program=["cat"])))
    until(lambda: box.task(id)[1] == "RUNNING", "RUNNING")      # ctr 1.6 loses an end that comes before
    output, _ = client.communicate(b"a line\n" * 5000, timeout=30)
    same((output, client.returncode), (b"a line\n" * 5000, 0))


@case("ctr", "terminal: echo, line discipline, exit status")
def _(box):
    terminal = box.open_terminal(box.ctr_words(*box.run_words("echo ready; read x; echo got $x; exit 5", "--rm", "-t")))
    terminal.expect(b"ready\r\n")
    terminal.send(b"words\n")
    terminal.expect(b"got words\r\n")
    same(terminal.end(), 5, "exit status")


@case("ctr", "terminal: its size arrives, and changes", NATIVE)
def _(box):
    text = "sleep 0.5; stty size; echo ready; read x; stty size"
    terminal = box.open_terminal(box.ctr_words(*box.run_words(text, "--rm", "-t")))
    terminal.expect(b"ready")
    holds(b"33 101" in terminal.text, "no 33 101 in %s", terminal.text)
    terminal.resize(44, 55)
    time.sleep(0.5)
    terminal.send(b"\n")
    terminal.expect(b"44 55")
    same(terminal.end(), 0, "exit status")


@case("ctr", "terminal: has a name inside, is /dev/console", NATIVE)
def _(box):
    terminal = box.open_terminal(box.ctr_words(*box.run_words("tty; test -c /dev/console && echo console > /dev/console", "--rm", "-t")))
    same(terminal.end(), 0, "exit status, after %r" % terminal.text)
    holds(re.search(rb"/dev/(pts/\d+|console)\r\nconsole\r\n", terminal.text), "%s", terminal.text)


@case("ctr", "terminal: interrupt key", NATIVE)
def _(box):
    terminal = box.open_terminal(
            box.ctr_words(*box.run_words("trap 'echo INT; exit 9' INT; echo ready; while :; do sleep 0.1; done", "--rm", "-t")))
    terminal.expect(b"ready")
    terminal.send(b"\3")
    terminal.expect(b"INT")
    same(terminal.end(), 9, "exit status")


@case("ctr", "detached: listed, TERM, removed")
def _(box):
    id = box.start()
    pid, status = box.task(id)
    same(status, "RUNNING", "status")
    holds(state_of(pid), "no process %s", pid)
    time.sleep(0.3)
    same(box.ctr("task", "kill", "-s", "TERM", id).returncode, 0, "kill")
    box.ends(id, 143)
    same(state_of(pid), "", "the process's state")


@case("ctr", "kill: KILL, then what is finished is not found")
def _(box):
    id = box.start()
    box.ctr("task", "kill", "-s", "KILL", id)
    until(lambda: box.task(id)[1] == "STOPPED", "STOPPED")
    again = box.ctr("task", "kill", "-s", "KILL", id)
    holds(again.returncode and (b"not found" in again.stderr or b"already finished" in again.stderr), "%s", again.stderr)
    box.ends(id, 137)


@case("ctr", "kill --all reaches every process", NATIVE)
def _(box):
    id = box.start("sleep 1000 & sleep 1000 & echo ready; wait; wait; exit 3")
    until(lambda: len(box.ctr("task", "ps", id).stdout.splitlines()) >= 4, "three processes")
    same(box.ctr("task", "kill", "--all", "-s", "KILL", id).returncode, 0, "kill")
    box.ends(id, 137)


@case("ctr", "a running task is removed by force only")
def _(box):
    id = box.start()
    holds(box.ctr("task", "rm", id).returncode, "it was removed")
    same(box.task(id)[1], "RUNNING", "status")
    same(box.ctr("task", "rm", "-f", id).stderr.count(b"rror"), 0, "errors")
    same(box.task(id), (0, None), "task")


@case("ctr", "created: not started, its process is there, then deleted")
def _(box):
    id = box.name()
    made = box.ctr("container", "create", "--runtime", box.runtime, box.image, id, "echo", "ran")
    same(made.returncode, 0, "create (%s)" % last_line(made.stderr))
    started = box.ctr("task", "start", id)
    same((started.stdout, started.returncode), (b"ran\n", 0), "outcome (%s)" % last_line(started.stderr))


@case("ctr", "attach after detaching")
def _(box):
    id = box.start("sleep 1; exit 4")
    done = box.ctr("task", "attach", id)
    same(done.returncode, 4, "exit status (%s)" % last_line(done.stderr))


# --- ctr: exec ---


@case("ctr", "exec: output, streams, exit status")
def _(box):
    id = box.start()
    done = box.execute(id, "sh", "-c", "echo out; echo err >&2; exit 5")
    same((done.stdout, done.stderr, done.returncode), (b"out\n", b"err\n", 5))
    same(box.task(id)[1], "RUNNING", "status")


@case("ctr", "exec: a program of the other kind")
def _(box):
    host, inside, words, wanted = box.foreign()
    id = box.start(None, "--mount", "type=bind,src=%s,dst=%s,options=rbind:ro" % (host, inside))
    done = box.execute(id, *words)
    same((done.stdout, done.returncode), (wanted, 0), "outcome (%s)" % last_line(done.stderr))


@case("ctr", "exec: a missing program is named")
def _(box):
    id = box.start()
    done = box.execute(id, "/no/such")
    holds(done.returncode and b"/no/such" in done.stderr, "status %s, %s", done.returncode, done.stderr)
    same(box.execute(id, "true").returncode, 0, "the next exec")


@case("ctr", "exec: terminal")
def _(box):
    id = box.start()
    terminal = box.open_terminal(
            box.ctr_words("task", "exec", "-t", "--exec-id", "x", id, "sh", "-c", "echo ready; read x; echo got $x; exit 6"))
    terminal.expect(b"ready\r\n")
    terminal.send(b"words\n")
    terminal.expect(b"got words\r\n")
    same(terminal.end(), 6, "exit status")


@case("ctr", "exec: terminal's size and name", NATIVE)
def _(box):
    id = box.start()
    terminal = box.open_terminal(box.ctr_words("task", "exec", "-t", "--exec-id", "x", id, "sh", "-c", "sleep 0.3; stty size; tty"))
    same(terminal.end(), 0, "exit status, after %r" % terminal.text)
    holds(re.search(rb"33 101\r\n/dev/(pts/\d+|console)", terminal.text), "%s", terminal.text)


@case("ctr", "exec: stdin and its end")
def _(box):
    id = box.start()
    client = box.popen(box.ctr_words("task", "exec", "--exec-id", "x", id, "cat"))
    client.stdin.write(b"a line\n")
    client.stdin.flush()
    same(client.stdout.readline(), b"a line\n")
    output, _ = client.communicate(b"a line\n" * 100, timeout=30)
    same((output, client.returncode), (b"a line\n" * 100, 0))


@case("ctr", "exec: killed by its id")
def _(box):
    id = box.start()
    client = box.popen(box.ctr_words("task", "exec", "--exec-id", "x", id, "sh", "-c", "echo ready; sleep 1000"))
    client.stdout.readline()
    same(box.ctr("task", "kill", "-s", "KILL", "--exec-id", "x", id).returncode, 0, "kill")
    client.communicate(timeout=15)
    same(client.returncode, 137, "exit status")
    same(box.task(id)[1], "RUNNING", "status")


@case("ctr", "exec: ends with its container")
def _(box):
    id = box.start()
    client = box.popen(box.ctr_words("task", "exec", "--exec-id", "x", id, "sh", "-c", "echo ready; sleep 1000"))
    client.stdout.readline()
    box.ctr("task", "kill", "-s", "KILL", id)
    client.communicate(timeout=15)
    holds(client.returncode, "exit status %s", client.returncode)
    box.ends(id, 137)


@case("ctr", "exec: in a stopped container it is refused")
def _(box):
    id = box.start("exit 0")
    until(lambda: box.task(id)[1] == "STOPPED", "STOPPED")
    holds(box.execute(id, "true").returncode, "it ran")
    box.ends(id, 0)


@case("ctr", "exec: 30 leave no descriptor and no zombie")
def _(box):
    id = box.start()
    box.execute(id, "true")
    shim = box.shim()
    before = sorted(os.listdir("/proc/%d/fd" % shim))
    for _ in range(30):
        same(box.execute(id, "true").returncode, 0, "exit status")
    same(len(os.listdir("/proc/%d/fd" % shim)), len(before), "number of descriptors")
    zombies = [pid for pid, _ in processes() if read("/proc/%d/stat" % pid).rpartition(") ")[2].split()[:2] == ["Z", str(shim)]]
    same(zombies, [], "zombies")


@case("ctr", "exec: twenty at once")
def _(box):
    id = box.start()
    failed = at_once(20, lambda number: (box.execute(id, "sh", "-c", "echo %d; exit 7" % number), (b"%d\n" % number, 7)))
    same(failed, [], "failures")


def at_once(count, work):
    """Runs work(number), which returns (CompletedProcess, wanted stdout and status), in threads; what differed."""
    failed = []

    def one(number):
        done, wanted = work(number)
        if (done.stdout, done.returncode) != wanted:
            failed.append((number, done.returncode, done.stdout, last_line(done.stderr)))
    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


@case("ctr", "exec: user and working directory", NATIVE)
def _(box):
    id = box.start()
    done = box.execute(id, "sh", "-c", "id -u; pwd", options=("--user", "33", "--cwd", "/tmp"))
    same(done.stdout, b"33\n/tmp\n")


# --- ctr: control ---


@case("ctr", "pause and resume")
def _(box):
    id = box.start("echo ready; burn 4000000000" if box.wasm else "echo ready; while :; do :; done")
    pid = box.task(id)[0]
    until(lambda: cpu_ticks(pid) > 5, "using the processor")
    same(box.ctr("task", "pause", id).returncode, 0, "pause")
    same(box.task(id)[1], "PAUSED", "status")
    before = cpu_ticks(pid)
    time.sleep(0.3)
    same(cpu_ticks(pid), before, "ticks")
    same(box.ctr("task", "resume", id).returncode, 0, "resume")
    same(box.task(id)[1], "RUNNING", "status")
    until(lambda: cpu_ticks(pid) > before, "using the processor again")


@case("ctr", "pause: KILL works")
def _(box):
    id = box.start()
    box.ctr("task", "pause", id)
    same(box.ctr("task", "kill", "-s", "KILL", id).returncode, 0, "kill")
    box.ends(id, 137)


@case("ctr", "pause: exec is refused")
def _(box):
    id = box.start()
    box.ctr("task", "pause", id)
    client = box.popen(box.ctr_words("task", "exec", "--exec-id", "x", id, "true"))
    try:
        _, stderr = client.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        raise Failure("exec in a paused container hangs") from None
    holds(client.returncode, "exec in a paused container ran")


@case("ctr", "pause: the shim is killed: nothing is left")
def _(box):
    id = box.start()
    pid = box.task(id)[0]
    box.ctr("task", "pause", id)
    os.kill(box.shim(), signal.SIGKILL)
    until(lambda: not state_of(pid), "the process's end")


@case("ctr", "metrics and processes")
def _(box):
    id = box.start()
    time.sleep(0.3)
    text = box.ctr("task", "metrics", id).stdout.decode()
    values = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) == 2)
    holds(int(values.get("memory.usage_in_bytes", values.get("memory.usage", 0))) > 50_000, "%s", text)
    done = box.ctr("task", "ps", id)
    holds(str(box.task(id)[0]) in done.stdout.decode(), "%s", done.stdout)


@case("ctr", "events in their order")
def _(box):
    events = box.events()
    id = box.start()
    box.execute(id, "true")
    box.ctr("task", "kill", "-s", "KILL", id)
    box.ends(id, 137)
    until(lambda: any(topic == "/tasks/delete" for topic, _ in events), "/tasks/delete")
    same([topic for topic, line in events if id in line and topic != "/tasks/delete" or topic == "/tasks/delete"][:7], [
        "/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started",
        "/tasks/exit", "/tasks/exit", "/tasks/delete"], "topics")


@case("ctr", "events of a process that ends at once, 20 times")
def _(box):
    events = box.events()
    for _ in range(20):
        box.run("exit 0")
    until(lambda: sum(topic == "/tasks/delete" for topic, _ in events) == 20, "20 × /tasks/delete")
    same([topic for topic, _ in events], ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"] * 20, "topics")


def hog(box, *options):
    """(words of a program that takes all memory, the options that put it there, with its path for %s)."""
    if not box.wasm:
        return ["tail", "/dev/zero"], []
    return ["/hog.wasm"], [option.replace("%s", box.module("hog")) for option in options]


@case("ctr", "memory: the limit holds, OOM is an event, 137")
def _(box):
    events = box.events()
    words, options = hog(box, "--mount", "type=bind,src=%s,dst=/hog.wasm,options=rbind:ro")
    done = box.run("", "--memory-limit", str(48 << 20), *options, program=words)
    same(done.returncode, 137, "exit status (%s)" % last_line(done.stderr))
    until(lambda: any(topic == "/tasks/delete" for topic, _ in events), "/tasks/delete")
    topics = [topic for topic, _ in events]
    holds("/tasks/oom" in topics, "topics %s", topics)
    holds(topics.index("/tasks/oom") < topics.index("/tasks/exit"), "topics %s", topics)


@case("ctr", "memory: a child's OOM is an event while init lives", NATIVE)
def _(box):
    events = box.events()
    id = box.start("tail /dev/zero; echo $?; sleep 1000", "--memory-limit", str(48 << 20))
    until(lambda: any(topic == "/tasks/oom" for topic, _ in events), "/tasks/oom", 15)
    same(box.task(id)[1], "RUNNING", "status")


@case("ctr", "limits: memory, processor")
def _(box):
    id = box.start(None, "--memory-limit", "67108864", "--cpu-quota", "50000", "--cpu-period", "100000", "--cpu-shares", "512")
    same(box.cgroup_file(id, "memory", "memory.limit_in_bytes", "memory.max"), "67108864", "memory limit")
    holds(box.cgroup_file(id, "cpu", "cpu.cfs_quota_us", "cpu.max") in ("50000", "50000 100000"), "quota")
    holds(box.cgroup_file(id, "cpu", "cpu.shares", "cpu.weight") in ("512", "20", "59"), "shares")


@case("ctr", "log: file://")
def _(box):
    path = os.path.join(box.scratch(), "sub", "log")
    id = box.start("echo out; echo err >&2; exit 3", "--log-uri", "file://" + path)
    box.ends(id, 3)
    same(sorted(read(path).split()), ["err", "out"], "log")


LOGGER = """#!/bin/sh
trap '' TERM
exec 2>> {0}/errors
env | sort > {0}/environment
echo "$@" > {0}/arguments
cat <&3 > {0}/stdout 5>&- &
cat <&4 > {0}/stderr 5>&- &
exec 5>&-
wait; wait
echo done > {0}/done
"""


@case("ctr", "log: binary://")
def _(box):
    folder = box.scratch()
    logger = os.path.join(folder, "logger")
    with open(logger, "w") as file:
        file.write(LOGGER.format(folder))
    os.chmod(logger, 0o755)
    id = box.start("echo out; echo err >&2; exit 3", "--log-uri", "binary://%s?key=value" % logger)
    box.ends(id, 3)
    until(lambda: read(folder + "/done"), "the logger's end")
    same((read(folder + "/stdout"), read(folder + "/stderr")), ("out\n", "err\n"), "log")
    same(read(folder + "/arguments"), "key value\n", "arguments")
    holds("CONTAINER_ID=%s\n" % id in read(folder + "/environment"), "%s", read(folder + "/environment"))


@case("ctr", "log: no stream at all")
def _(box):
    id = box.start("echo out; exit 3", "--null-io")
    box.ends(id, 3)


@case("ctr", "log: a client that goes away breaks no pipe", NATIVE)
def _(box):
    id = box.name()
    client = box.popen(box.ctr_words(*
            box.run_words("i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); sleep 0.05; done; exit 3", id=id)))
    client.stdout.readline()
    client.send_signal(signal.SIGKILL)
    box.ends(id, 3)


# --- ctr: restarts and crashes ---


@case("ctr", "restart of containerd: the task is found")
def _(box):
    id = box.start()
    pid = box.task(id)[0]
    box.lab.restart(box.version)
    until(lambda: box.task(id) == (pid, "RUNNING"), "RUNNING again")
    same(box.execute(id, "sh", "-c", "echo again").stdout, b"again\n")
    box.ctr("task", "kill", "-s", "TERM", id)
    box.ends(id, 143)


@case("ctr", "restart of containerd: a task that ended meanwhile")
def _(box):
    id = box.start("sleep 2; exit 9")
    box.lab.need("lab.sh", "down", box.version)
    time.sleep(2.5)
    box.lab.need("lab.sh", "up", box.version)
    if box.lab.options["runtime"] == "runc":
        raise Skip("runc's tasks vanish then")
    until(lambda: box.task(id)[1] == "STOPPED", "STOPPED")
    box.ends(id, 9)


@case("ctr", "crash: a killed shim leaves nothing")
def _(box):
    id = box.start()
    pid = box.task(id)[0]
    os.kill(box.shim(), signal.SIGKILL)
    until(lambda: not state_of(pid), "the process's end")
    until(lambda: box.task(id)[1] in (None, "STOPPED", "UNKNOWN"), "the task's end")


@case("ctr", "crash: a killed shim leaves no exec and no child", NATIVE)
def _(box):
    id = box.start("sleep 1001 & echo ready; wait")
    client = box.popen(box.ctr_words("task", "exec", "--exec-id", "x", id, "sh", "-c", "echo ready; sleep 1002"))
    client.stdout.readline()
    sleepers = lambda: [pid for pid, words in processes() if words[:2] in (["sleep", "1001"], ["sleep", "1002"])]
    until(lambda: len(sleepers()) == 2, "two sleepers")
    pids = sleepers()
    os.kill(box.shim(), signal.SIGKILL)
    until(lambda: not any(map(state_of, pids)), "their end")


@case("ctr", "fast runs leave nothing")
def _(box):
    for number in range(int(box.lab.options["runs"])):
        done = box.run("echo %d" % number)
        same((done.stdout, done.returncode), (b"%d\n" % number, 0), "run %d (%s)" % (number, last_line(done.stderr)))


@case("ctr", "twenty at once leave nothing")
def _(box):
    same(at_once(20, lambda number: (box.run("echo %d" % number), (b"%d\n" % number, 0))), [], "failures")


@case("ctr", "two containers in one shim: the second outlives the first")
def _(box):
    group = "--annotation=io.containerd.runc.v2.group=" + box.name()
    first, second = box.start(None, group), box.start(None, group)
    box.shim()
    box.ctr("task", "kill", "-s", "KILL", first)
    box.ends(first, 137)
    same(box.execute(second, "sh", "-c", "echo here").stdout, b"here\n")
    box.shim()
    box.ctr("task", "kill", "-s", "KILL", second)
    box.ends(second, 137)


@case("ctr", "a shim of many containers: twenty leave no descriptor")
def _(box):
    group = "--annotation=io.containerd.runc.v2.group=" + box.name()
    keeper = box.start(None, group)
    shim, counts = box.shim(), []
    for number in range(20):
        done = box.run("echo %d" % number, group)
        same((done.stdout, done.returncode), (b"%d\n" % number, 0), "run %d (%s)" % (number, last_line(done.stderr)))
        counts.append(len(os.listdir("/proc/%d/fd" % shim)))
    until(lambda: len(os.listdir("/proc/%d/fd" % shim)) <= counts[0] + 4, "descriptors %s" % counts)
    same(box.execute(keeper, "true").returncode, 0, "exec in the first")


@case("ctr", "crash: containerd is killed; the task goes on")
def _(box):
    id = box.start("echo ready; sleep 3; exit 9")
    pid = box.task(id)[0]
    os.kill(int(read(os.path.join(box.lab.run, box.version, "pid"))), signal.SIGKILL)
    box.lab.restart(box.version)
    until(lambda: box.task(id) == (pid, "RUNNING"), "RUNNING again")
    box.ends(id, 9)


@case("ctr", "orphans in a shared pid namespace end with the container", NATIVE)
def _(box):
    box.run("sleep 1003 > /dev/null 2>&1 & exit 0", "--with-ns=pid:/proc/1/ns/pid")
    until(lambda: not [pid for pid, words in processes() if words[:2] == ["sleep", "1003"]], "their end")


@case("ctr", "output: 8 MiB to a slow reader, with the exit close behind", NATIVE)
def _(box):
    client = box.popen(box.ctr_words(*box.run_words("head -c 8388608 /dev/zero", "--rm")))
    size = 0
    while True:
        data = client.stdout.read(1 << 18)
        if not data:
            break
        size += len(data)
        time.sleep(0.02)
    same(size, 8 << 20, "bytes")


@case("ctr", "input: 4 MiB to a slow reader", NATIVE)
def _(box):
    id = box.name()
    client = box.popen(box.ctr_words(*box.run_words("sleep 1; wc -c", "--rm", id=id)))
    until(lambda: box.task(id)[1] == "RUNNING", "RUNNING")
    output, _ = client.communicate(bytes(4 << 20), timeout=30)
    same(output.strip(), b"%d" % (4 << 20))


# --- ctr: what the configuration asks for ---


@case("ctr", "--seccomp")
def _(box):
    done = box.run("echo ran; cat /proc/self/status" if not box.wasm else "echo ran", "--seccomp")
    same((done.stdout[:4], done.returncode), (b"ran\n", 0), "outcome (%s)" % last_line(done.stderr))
    holds(box.wasm or b"\nSeccomp:\t2\n" in done.stdout, "no filter: %s", done.stdout[-400:])


@case("ctr", "--read-only")
def _(box):
    done = box.run("echo x > /file || echo refused", "--read-only")
    same(done.stdout, b"refused\n")


@case("ctr", "--privileged", NATIVE)
def _(box):
    done = box.run("grep CapEff /proc/self/status; echo 1 > /proc/sys/kernel/domainname-no 2>/dev/null; ls /dev | wc -l", "--privileged")
    same(done.returncode, 0, "exit status (%s)" % last_line(done.stderr))
    mask = int(done.stdout.split()[1], 16)
    holds(mask & (1 << 21), "CapEff %s", hex(mask))


@case("ctr", "--user, --cap-drop, --cap-add, no new privileges", NATIVE)
def _(box):
    done = box.run("id -u; id -g; grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status", "--user", "33:33", "--cap-drop", "CAP_CHOWN",
                   "--cap-add", "CAP_SYS_TIME")
    words = done.stdout.decode().split()
    same(words[:2], ["33", "33"], "ids")
    values = dict(zip(words[2::2], words[3::2]))
    same(int(values["CapBnd:"], 16), 0xA80425FB & ~1 | 1 << 25, "bounding set")
    same(values["NoNewPrivs:"], "1", "NoNewPrivs")


@case("ctr", "--net-host and an own network", NATIVE)
def _(box):
    own = box.run("readlink /proc/self/ns/net; ls /sys/class/net; ip addr show lo | grep -c UP").stdout.split()
    shared = box.run("readlink /proc/self/ns/net", "--net-host").stdout.split()
    here = os.readlink("/proc/self/ns/net").encode()
    same(shared, [here], "namespace")
    holds(own[0] != here and own[1:2] == [b"lo"], "%s", own)


@case("ctr", "--with-ns joins", NATIVE)
def _(box):
    id = box.start()
    pid = box.task(id)[0]
    done = box.run("readlink /proc/self/ns/uts; readlink /proc/self/ns/net; ps | grep -c 'sleep 0.05'", *(
        "--with-ns=%s:/proc/%d/ns/%s" % (kind, pid, name) for kind, name in (("uts", "uts"), ("network", "net"), ("pid", "pid"))))
    same(done.stdout.split()[:2], [os.readlink("/proc/%d/ns/%s" % (pid, name)).encode() for name in ("uts", "net")], "namespaces")


@case("ctr", "--mount read-write and read-only, --rootfs")
def _(box):
    folder = box.scratch()
    done = box.run("echo x > /a/file && echo y > /b/file || echo refused", "--mount", "type=bind,src=%s,dst=/a,options=rbind:rw" % folder,
                   "--mount", "type=bind,src=%s,dst=/b,options=rbind:ro" % folder)
    same((done.stdout, read(folder + "/file")), (b"refused\n", "x\n"))


@case("ctr", "--uidmap: a user namespace", NATIVE)
def _(box):
    done = box.run("id -u; cat /proc/self/uid_map; echo x > /tmp/file && echo written; readlink /proc/self/ns/user",
                   "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536")
    if b"nmarshal" in done.stderr or b"flag" in done.stderr:
        raise Skip(last_line(done.stderr))
    same(done.returncode, 0, "exit status (%s)" % last_line(done.stderr))
    words = done.stdout.decode().split()
    same(words[:4], ["0", "0", "100000", "65536"], "id and map")
    holds(words[-1] != os.readlink("/proc/self/ns/user"), "it is the host's user namespace")


@case("ctr", "--uidmap: exec enters the user namespace", NATIVE)
def _(box):
    id = box.start(None, "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536")
    words = box.execute(id, "sh", "-c", "cat /proc/self/uid_map").stdout.decode().split()
    same(words, ["0", "100000", "65536"], "map")


@case("ctr", "--device", NATIVE)
def _(box):
    done = box.run("ls -l /dev/loop-control; ls -l /dev/null; head -c 2 /dev/zero | wc -c", "--device", "/dev/zero")
    same(done.stdout.split()[-1:], [b"2"], "output")


# --- spec: what config.json can ask for, by ctr run --config ---


CANNOT_MAP = "its file system cannot"   # map ids, on kernels before Linux 6.3 or even 5.12


class SpecBox(CtrBox):
    """Containers from a config.json that the case changes."""

    def config(self):
        """containerd's default config.json with a root file system of the kind."""
        folder = self.scratch()
        root = os.path.join(folder, "root")
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "run", "root"):
            os.makedirs(os.path.join(root, name))
        source = os.path.join(self.lab.folder, "imgsrc", "wasmbox.wasm") if self.wasm else self.busybox()
        for name in ["sh"] if self.wasm else ["busybox"]:
            shutil.copy(source, os.path.join(root, "bin", name))
            os.chmod(os.path.join(root, "bin", name), 0o755)
        if not self.wasm:
            for applet in subprocess.run([source, "--list"], capture_output=True, text=True).stdout.split():
                if applet != "busybox":
                    os.symlink("busybox", os.path.join(root, "bin", applet))
        config = json.loads(self.ctr("oci", "spec").stdout)
        config["root"] = {"path": root}
        config["process"].update(terminal=False, cwd="/", env=["PATH=/bin"])
        config.pop("hostname", None)
        return config

    def spec(self, change, text="echo ran", **more):
        """Runs the text in a container of the changed configuration."""
        config = self.config()
        config["process"]["args"] = ["sh", "-c", text]
        id = self.name()
        config["linux"]["cgroupsPath"] = "/default/" + id
        change(config)
        path = os.path.join(self.scratch(), "config.json")
        with open(path, "w") as file:
            json.dump(config, file)
        return self.ctr("run", "--rm", "--runtime", self.runtime, "--config", path, id, **more)

    def runs(self, change, text, wanted):
        """The outcome is that output and status 0."""
        done = self.spec(change, text)
        if CANNOT_MAP in str(done.stderr):
            raise Skip(last_line(done.stderr))
        same((done.stdout.decode(), done.returncode), (wanted, 0), "outcome (%s)" % last_line(done.stderr))


def setting(path, value):
    """A change of a configuration: the value at a dotted path."""
    def change(config):
        *parents, last = path.split(".")
        for parent in parents:
            config = config.setdefault(parent, {})
        config[last] = value
    return change


def both(*changes):
    def change(config):
        for one in changes:
            one(config)
    return change


# What containerd 1.6 drops from a configuration.
UNKNOWN_TO_1_6 = ("process.scheduler", "process.ioPriority", "process.execCPUAffinity", "linux.timeOffsets")


def spec(title, change, text, wanted, kinds=NATIVE):
    """A case of the configuration that needs no code of its own."""
    @case("spec", title, kinds)
    def _(box):
        if box.version == "1.6" and title in UNKNOWN_TO_1_6:
            raise Skip("containerd 1.6 does not know the field")
        box.runs(change, text, wanted)


def add(path, *items):
    """A change that appends to the list at a dotted path."""
    def change(config):
        *parents, last = path.split(".")
        for parent in parents:
            config = config.setdefault(parent, {})
        config[last] = (config.get(last) or []) + list(items)
    return change


spec("defaults", lambda config: None, "echo ran", "ran\n", ("wasm", "native"))
spec("hostname and domainname", both(setting("hostname", "box"), setting("domainname", "example")),
     "hostname; cat /proc/sys/kernel/domainname", "box\nexample\n")
spec("process.user: ids, groups, umask", setting("process.user", {"uid": 5, "gid": 6, "additionalGids": [7, 8], "umask": 0o77}),
     "id -u; id -g; umask; grep Groups /proc/self/status", "5\n6\n0077\nGroups:\t7 8 \n")
spec("process.rlimits", setting("process.rlimits", [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]),
     "ulimit -Sn; ulimit -Hn", "100\n200\n")
spec("process.oomScoreAdj", setting("process.oomScoreAdj", 500), "cat /proc/self/oom_score_adj", "500\n")
spec("process.scheduler", setting("process.scheduler", {"policy": "SCHED_BATCH", "nice": 5}), "cut -d' ' -f19,41 /proc/self/stat", "5 3\n")
spec("process.ioPriority", setting("process.ioPriority", {"class": "IOPRIO_CLASS_BE", "priority": 6}),
     "ionice -p $$", "best-effort: prio 6\n")
spec("process.cwd is made where absent", setting("process.cwd", "/new/folder"), "pwd", "/new/folder\n")
spec("process.cwd is made where absent, for a user",
     both(setting("process.cwd", "/new/folder"), setting("process.user", {"uid": 5, "gid": 5})),
     "pwd", "/new/folder\n")
spec("process.env: HOME by the user", lambda config: None, "echo $HOME", "/\n")
spec("process.capabilities.ambient", both(setting("process.user", {"uid": 5, "gid": 5}), *(
    setting("process.capabilities." + name, ["CAP_NET_RAW"]) for name in ("bounding", "permitted", "effective", "inheritable", "ambient"))),
     "grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | cut -f2 | sort -u", "0000000000002000\n")
spec("process.noNewPrivileges: false", setting("process.noNewPrivileges", False), "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t0\n")
spec("root.readonly", setting("root.readonly", True), "echo x > /file || echo refused", "refused\n", ("wasm", "native"))
spec("linux.sysctl", setting("linux.sysctl", {"net.ipv4.ip_unprivileged_port_start": "0", "kernel.msgmax": "8000"}),
     "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax", "0\n8000\n")
spec("linux.maskedPaths and readonlyPaths", both(setting("linux.maskedPaths", ["/proc/cmdline", "/proc/cmdline", "/sys/firmware", "/none"]),
                                                 setting("linux.readonlyPaths", ["/proc/sys", "/none"])),
     "wc -c < /proc/cmdline; ls /sys/firmware | wc -l; echo x > /proc/sys/kernel/hostname || echo refused; "
     "grep ' /proc/sys ' /proc/self/mountinfo | cut -d' ' -f6", "0\n0\nrefused\nro,nosuid,nodev,noexec,relatime\n")
spec("linux.devices",
     add("linux.devices", {"path": "/dev/one/two", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 3, "gid": 4}),
     "ls -ln /dev/one/two | tr -s ' ' | cut -d' ' -f1-6", "crw-r----- 1 3 4 1, 5\n")
spec("linux.rootfsPropagation shared", setting("linux.rootfsPropagation", "shared"),
     "awk '$5 == \"/\"' /proc/self/mountinfo | grep -o shared", "shared\n")
spec("linux.personality", setting("linux.personality", {"domain": "LINUX32"}), "uname -m", "i686\n")
spec("linux.timeOffsets", both(add("linux.namespaces", {"type": "time"}), setting("linux.timeOffsets", {"boottime": {"secs": 1000000000}})),
     "cut -d. -f1 /proc/uptime | grep -c '^1[0-9]\\{9\\}$'", "1\n")
spec("linux.namespaces: cgroup",
     lambda config: config["linux"].update(
         namespaces=[n for n in config["linux"]["namespaces"] if n["type"] != "cgroup"] + [{"type": "cgroup"}]),
     "cut -d: -f3 /proc/self/cgroup | sort -u", "/\n")
spec("linux.namespaces: user", both(add("linux.namespaces", {"type": "user"}),
     setting("linux.uidMappings", [{"containerID": 0, "hostID": 0, "size": 1000}]),
                                    setting("linux.gidMappings", [{"containerID": 0, "hostID": 0, "size": 1000}])),
     "tr -s ' ' < /proc/self/uid_map; readlink /proc/self/ns/user | grep -c user", " 0 0 1000\n1\n")
spec("linux.seccomp: an errno of its own",
     setting("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
    {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30}]}),
     "mkdir /tmp/x 2>&1; echo $?", "mkdir: can't create directory '/tmp/x': Read-only file system\n1\n")
spec("linux.seccomp: by an argument", setting("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
    {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 12, "op": "SCMP_CMP_EQ"}]}]}),
     "kill -USR2 $$ 2>/dev/null || echo refused; kill -0 $$ && echo allowed", "refused\nallowed\n")
spec("linux.resources.hugepageLimits of 0", setting("linux.resources.hugepageLimits", [{"pageSize": "2MB", "limit": 0}]),
     "echo ran", "ran\n", ("wasm", "native"))
spec("mounts: tmpfs with size and mode",
     add("mounts", {"destination": "/t", "type": "tmpfs", "source": "t", "options": ["nosuid", "size=64k", "mode=1770"]}),
     "stat -c %a /t; df -k /t | tail -1 | tr -s ' ' | cut -d' ' -f2", "1770\n64\n")
spec("mounts: tmpcopyup", add("mounts", {"destination": "/bin", "type": "tmpfs", "source": "t", "options": ["tmpcopyup"]}),
     "echo x > /bin/y && ls -l /bin/sh /bin/y | tr -s ' ' | cut -d' ' -f1,3,9-", "lrwxrwxrwx 0 /bin/sh -> busybox\n-rw-r--r-- 0 /bin/y\n")
spec("mounts: uidMappings and gidMappings",
     add("mounts", {"destination": "/r", "type": "bind", "source": "/usr", "options": ["rbind", "ro"], **{
         name: [{"containerID": 0, "hostID": 7000, "size": 1000}] for name in ("uidMappings", "gidMappings")}}),
     "stat -c '%u %g' /r", "7000 7000\n")
spec("mounts: rro", add("mounts", {"destination": "/r", "type": "bind", "source": "/sys", "options": ["rbind", "rro"]}),
     "awk '$5 ~ \"^/r(/|$)\" { print $6 }' /proc/self/mountinfo | grep -vc '^ro' || true", "0\n")
spec("mounts: a bind mount's propagation",
     add("mounts", {"destination": "/r", "type": "bind", "source": "/tmp", "options": ["rbind", "rshared"]}),
     "grep ' /r ' /proc/self/mountinfo | grep -c shared", "1\n")
spec("mounts: a file onto a file that is absent",
     add("mounts", {"destination": "/etc/deep/hosts", "type": "bind", "source": "/proc/self/status", "options": ["bind", "ro"]}),
     "test -f /etc/deep/hosts && echo there", "there\n")


@case("spec", "an unknown namespace path fails", ("wasm", "native"))
def _(box):
    done = box.spec(lambda config: [n.update(path="/no/such") for n in config["linux"]["namespaces"] if n["type"] == "network"])
    holds(done.returncode and b"/no/such" in done.stderr, "status %s, %s", done.returncode, done.stderr)


@case("spec", "linux.resources.pids", NATIVE)
def _(box):
    done = box.spec(setting("linux.resources.pids", {"limit": 5}), "sleep 9 & sleep 9 & sleep 9 & sleep 9 & sleep 9 & echo all")
    holds(done.returncode and b"fork" in done.stderr, "status %s, %s", done.returncode, done.stdout + done.stderr)


@case("spec", "a sysctl of the host is refused", NATIVE)
def _(box):
    before = read("/proc/sys/kernel/sched_autogroup_enabled") or read("/proc/sys/kernel/panic")
    done = box.spec(setting("linux.sysctl", {"kernel.panic": read("/proc/sys/kernel/panic").strip() or "0"}))
    holds(done.returncode, "it was set; before %s", before)


HOOK = """#!/bin/sh
echo {1} >> {0}/order
cat > {0}/{1}.json
readlink /proc/self/ns/mnt > {0}/{1}.mnt
pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/' {0}/{1}.json)
readlink /proc/$pid/ns/net > {0}/{1}.net
readlink /proc/$pid/root > {0}/{1}.root
test -z "$FAIL"
"""
HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def write_hooks(box, folder):
    """A script for each hook's point; {point: path}."""
    for name in HOOKS:
        path = os.path.join(folder, name)
        with open(path, "w") as file:
            file.write(HOOK.format(folder, name))
        os.chmod(path, 0o755)
    return {name: [{"path": os.path.join(folder, name), "args": [name], "env": ["PATH=/bin:/usr/bin"]}] for name in HOOKS}


@case("spec", "hooks: order, namespaces, states", NATIVE)
def _(box):
    folder = box.scratch()
    hooks = write_hooks(box, folder)
    done = box.spec(both(setting("hooks", hooks),
                        add("mounts", {"destination": folder, "type": "bind", "source": folder, "options": ["rbind"]})), "sleep 0.3")
    same(done.returncode, 0, "exit status (%s)" % last_line(done.stderr))
    until(lambda: "poststop" in read(folder + "/order"), "poststop")
    same(read(folder + "/order").split(), list(HOOKS), "order")
    here = os.readlink("/proc/self/ns/net")
    for name in ("prestart", "createRuntime"):
        holds(read("%s/%s.net" % (folder, name)).strip() not in (here, ""), name + ": the container has no network namespace yet")
    holds(read(folder + "/createContainer.mnt").strip() != os.readlink("/proc/self/ns/mnt"), "createContainer: in the host's mounts")


@case("spec", "hooks: a prestart hook that fails aborts", NATIVE)
def _(box):
    folder = box.scratch()
    hooks = write_hooks(box, folder)
    hooks["prestart"][0]["env"].append("FAIL=1")
    done = box.spec(setting("hooks", {"prestart": hooks["prestart"], "poststop": hooks["poststop"]}))
    holds(done.returncode and b"hook" in done.stderr, "status %s, %s", done.returncode, done.stderr)


@case("spec", "hooks: one that takes too long is killed", NATIVE)
def _(box):
    done = box.spec(setting("hooks", {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1}]}), seconds=20)
    holds(done.returncode, "it went on")


# --- Docker ---


class DockerBox(Box):
    """docker, with the seccomp profile that it has by default."""

    def words(self, *words):
        return self.lab.words("docker.sh", "cli", self.version, *words)

    def docker(self, *words, input=b"", seconds=PROGRAM_SECONDS):
        return self.lab.script("docker.sh", "cli", self.version, *words, input=input, seconds=seconds)

    def run_words(self, text, *options, program=None):
        more = ["--security-opt", "seccomp=unconfined"] if "unconfined" in self.lab.options else []
        return ["run", "--runtime", self.docker_runtime, "--network=none", *more, *options, self.image, *(program or ["sh", "-c", text])]

    def run(self, text, *options, input=b"", seconds=PROGRAM_SECONDS, **more):
        return self.docker(*self.run_words(text, "--rm", *options, **more), input=input, seconds=seconds)

    def start(self, text=None, *options, **more):
        done = self.docker(*self.run_words(text or self.sleeper(), "-d", "--label", PREFIX, *options, **more))
        same(done.returncode, 0, "docker run -d: %s" % last_line(done.stderr))
        return done.stdout.decode().split()[-1]

    def inspect(self, id, format):
        return self.docker("inspect", "-f", format, id).stdout.decode().strip()

    def pid(self, id):
        return int(self.inspect(id, "{{.State.Pid}}"))

    def clear(self):
        ids = self.docker("ps", "-aq").stdout.decode().split()
        if ids:
            self.docker("rm", "-f", *ids)


@case("docker", "run: output, streams, exit status")
def _(box):
    done = box.run("echo out; echo err >&2; exit 7")
    same((done.stdout, done.stderr.splitlines()[-1:], done.returncode), (b"out\n", [b"err"], 7))


@case("docker", "run: hello", ("native",))
def _(box):
    done = box.docker("run", "--rm", "--network=none",
                      *(["--security-opt", "seccomp=unconfined"] if "unconfined" in box.lab.options else []),
                      "--runtime", box.docker_runtime, "lab.local/hello-native")
    same((done.stdout, done.returncode), (b"Hello, World!\n", 0), "outcome (%s)" % last_line(done.stderr))


@case("docker", "run: 127 for what is missing, 126 for no program")
def _(box):
    same(box.run("", program=["/no/such"]).returncode, 127, "exit status")
    same(box.run("", program=["/etc/passwd"]).returncode, 126, "exit status")
    same(box.run("", program=["/etc"]).returncode, 126, "exit status")


@case("docker", "run -i: stdin and its end")
def _(box):
    same(box.run("", "-i", input=b"a line\n" * 3000, program=["cat"]).stdout, b"a line\n" * 3000)


@case("docker", "run -it: a terminal")
def _(box):
    terminal = box.open_terminal(box.words(*box.run_words("echo ready; read x; echo got $x; exit 5", "--rm", "-it")))
    terminal.expect(b"ready\r\n")
    terminal.send(b"words\n")
    terminal.expect(b"got words\r\n")
    same(terminal.end(), 5, "exit status")


@case("docker", "run -it: size, name, console", NATIVE)
def _(box):
    terminal = box.open_terminal(box.words(*
            box.run_words("sleep 0.5; stty size; tty; test -c /dev/console && echo console", "--rm", "-it")))
    same(terminal.end(), 0, "exit status, after %r" % terminal.text)
    holds(re.search(rb"33 101\r\n/dev/(pts/\d+|console)\r\nconsole", terminal.text), "%s", terminal.text)


@case("docker", "exec: output, exit status, user, directory")
def _(box):
    id = box.start()
    done = box.docker("exec", id, "sh", "-c", "echo out; echo err >&2; exit 5")
    same((done.stdout, done.stderr, done.returncode), (b"out\n", b"err\n", 5))
    done = box.docker("exec", "-u", "33", "-w", "/tmp", "-e", "A=x", id, "sh", "-c", "echo $A; pwd")
    same(done.stdout, b"x\n/\n" if box.wasm else b"x\n/tmp\n")


@case("docker", "exec -i and exec -it")
def _(box):
    id = box.start()
    same(box.docker("exec", "-i", id, "cat", input=b"line\n" * 100).stdout, b"line\n" * 100)
    terminal = box.open_terminal(box.words("exec", "-it", id, "sh", "-c", "echo ready; read x; echo got $x; exit 6"))
    terminal.expect(b"ready\r\n")
    terminal.send(b"words\n")
    terminal.expect(b"got words\r\n")
    same(terminal.end(), 6, "exit status")


@case("docker", "exec: what is missing is 127")
def _(box):
    id = box.start()
    status = box.docker("exec", id, "/no/such").returncode
    holds(status == 127 or box.version == "1.7" and status == 126, "exit status %s", status)      # Docker 26 says 126
    same(box.docker("exec", id, "true").returncode, 0, "exit status")


@case("docker", "stats and top")
def _(box):
    id = box.start()
    time.sleep(0.5)
    done = box.docker("stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}|{{.CPUPerc}}", id)
    memory, pids, _ = done.stdout.decode().split("|")
    holds(re.match(r"[1-9]", memory) and int(pids) >= 1, "%s", done.stdout)
    done = box.docker("top", id)
    holds(done.returncode == 0 and str(box.pid(id)) in done.stdout.decode(), "%s", done.stdout + done.stderr)


@case("docker", "stats: a limit of memory is shown, the container's own")
def _(box):
    id = box.start(None, "--memory=64m")
    done = box.docker("stats", "--no-stream", "--format", "{{.MemUsage}}", id)
    holds(b"/ 64MiB" in done.stdout, "%s", done.stdout)


@case("docker", "logs, and followed to their end")
def _(box):
    id = box.start("echo one; sleep 1; echo two >&2; exit 3")
    done = box.docker("logs", "-f", id)
    same((done.stdout, done.stderr), (b"one\n", b"two\n"))
    same(box.docker("wait", id).stdout, b"3\n", "status")


@case("docker", "attach")
def _(box):
    id = box.start("sleep 1; echo late; exit 3")
    done = box.docker("attach", "--no-stdin", id)
    same((done.stdout, done.returncode), (b"late\n", 3))


@case("docker", "pause, unpause")
def _(box):
    id = box.start("echo ready; burn 4000000000" if box.wasm else "echo ready; while :; do :; done")
    pid = box.pid(id)
    same(box.docker("pause", id).returncode, 0, "pause")
    same(box.inspect(id, "{{.State.Status}}"), "paused", "status")
    before = cpu_ticks(pid)
    time.sleep(0.3)
    same(cpu_ticks(pid), before, "ticks")
    same(box.docker("unpause", id).returncode, 0, "unpause")
    until(lambda: cpu_ticks(pid) > before, "using the processor again")


@case("docker", "pause: rm -f and stop work")
def _(box):
    id = box.start()
    box.docker("pause", id)
    same(box.docker("rm", "-f", id, seconds=30).returncode, 0, "rm -f")
    id = box.start()
    box.docker("pause", id)
    box.docker("stop", "-t", "1", id, seconds=30)
    same(box.inspect(id, "{{.State.Status}}"), "exited", "status")


@case("docker", "update: memory up and down, processors, pids")
def _(box):
    id = box.start(None, "--memory=64m")
    pid = box.pid(id)
    for size in ("128m", "96m"):
        done = box.docker("update", "--memory=" + size, "--memory-swap=" + size, id)
        same(done.returncode, 0, "update to %s: %s" % (size, last_line(done.stderr)))
        same(cgroup_file(pid, "memory", "memory.limit_in_bytes", "memory.max"), str(int(size[:-1]) << 20), "memory limit")
    done = box.docker("update", "--cpus=0.5", "--cpu-shares=300", "--pids-limit=50", id)
    same(done.returncode, 0, "update of processors: %s" % last_line(done.stderr))
    holds(cgroup_file(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").startswith("50000"), "quota")
    same(cgroup_file(pid, "pids", "pids.max", "pids.max"), "50", "pids")


@case("docker", "stop: TERM is enough; kill; start again; restart")
def _(box):
    id = box.start()
    time.sleep(0.3)
    began = time.monotonic()
    same(box.docker("stop", id).returncode, 0, "stop")
    holds(time.monotonic() - began < 5, "stop took %s s", time.monotonic() - began)
    same(box.inspect(id, "{{.State.ExitCode}}"), "143", "status")
    same(box.docker("start", id).returncode, 0, "start")
    same(box.docker("restart", "-t", "2", id).returncode, 0, "restart")
    same(box.inspect(id, "{{.State.Running}}"), "true", "running")
    same(box.docker("kill", id).returncode, 0, "kill")
    until(lambda: box.inspect(id, "{{.State.ExitCode}}") == "137", "137")


@case("docker", "--restart=on-failure")
def _(box):
    id = box.start("exit 3", "--restart=on-failure:2")
    until(lambda: box.inspect(id, "{{.RestartCount}} {{.State.Status}}") == "2 exited", "two restarts", 20)


@case("docker", "--memory: OOMKilled")
def _(box):
    words, options = hog(box, "-v", "%s:/hog.wasm:ro")
    id = box.start(None, "--memory=48m", *options, program=words)
    until(lambda: box.inspect(id, "{{.State.Status}}") == "exited", "exited", 30)
    same(box.inspect(id, "{{.State.OOMKilled}} {{.State.ExitCode}}"), "true 137", "state")


@case("docker", "--memory, --cpus, --pids-limit, --cpuset-cpus, --blkio-weight")
def _(box):
    id = box.start(None, "--memory=64m", "--memory-reservation=32m", "--cpus=0.5", "--pids-limit=40", "--cpuset-cpus=0", "--cpu-shares=300")
    pid = box.pid(id)
    same(cgroup_file(pid, "memory", "memory.limit_in_bytes", "memory.max"), str(64 << 20), "memory")
    same(cgroup_file(pid, "pids", "pids.max", "pids.max"), "40", "pids")
    holds(cgroup_file(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").startswith("50000"), "quota")


@case("docker", "--read-only, --tmpfs, volumes")
def _(box):
    folder = box.scratch()
    done = box.run("echo x > /file || echo refused; echo x > /t/file && echo tmpfs; "
                   "echo x > /a/file && echo volume; echo x > /b/file || echo refused",
                   "--read-only", "--tmpfs", "/t:size=1m", "-v", folder + ":/a", "-v", folder + ":/b:ro", "-v", "/vol")
    same(done.stdout, b"refused\ntmpfs\nvolume\nrefused\n", "output (%s)" % last_line(done.stderr))
    same(read(folder + "/file"), "x\n", "file")


@case("docker", "the default seccomp profile", NATIVE)
def _(box):
    done = box.docker("run", "--rm", "--network=none", "--runtime", box.docker_runtime, box.image, "sh", "-c",
                      "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status; unshare -U true || echo refused; "
                      "mount -t tmpfs x /tmp || echo refused")
    same((done.stdout, done.returncode), (b"NoNewPrivs:\t0\nSeccomp:\t2\nrefused\nrefused\n", 0), "outcome (%s)" % last_line(done.stderr))


@case("docker", "a seccomp profile of one's own", NATIVE)
def _(box):
    path = os.path.join(box.scratch(), "profile.json")
    with open(path, "w") as file:
        json.dump({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}, file)
    done = box.docker("run", "--rm", "--network=none", "--runtime", box.docker_runtime, "--security-opt", "seccomp=" + path, box.image,
                      "sh", "-c", "mkdir /tmp/x || echo refused")
    same((done.stdout, done.returncode), (b"refused\n", 0), "outcome (%s)" % last_line(done.stderr))


@case("docker", "--user, --hostname, --workdir, --env")
def _(box):
    done = box.run("echo $A; pwd" if box.wasm else "echo $A; pwd; id -u; id -g; hostname",
                   "-e", "A=x", "-w", "/tmp", "--user", "33:34", "--hostname", "box")
    same(done.stdout, b"x\n/\n" if box.wasm else b"x\n/tmp\n33\n34\nbox\n", "output (%s)" % last_line(done.stderr))


@case("docker", "--cap-drop, --cap-add, no-new-privileges, --privileged", NATIVE)
def _(box):
    show = "grep -E 'CapEff|NoNewPrivs' /proc/self/status | cut -f2"
    same(box.run(show, "--cap-drop=ALL", "--cap-add=CHOWN", "--security-opt", "no-new-privileges").stdout, b"0000000000000001\n1\n", "sets")
    done = box.run(show + "; mount -t tmpfs x /tmp && echo mounted; "
                          "test -e /dev/loop-control -o -e /dev/kmsg && echo devices", "--privileged")
    holds(b"mounted\ndevices\n" in done.stdout, "%s", done.stdout + done.stderr)


@case("docker", "--ulimit, --sysctl, --shm-size, --device, --oom-score-adj", NATIVE)
def _(box):
    done = box.run("ulimit -n; cat /proc/sys/net/ipv4/ip_forward; "
                   "df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; ls -l /dev/other | cut -c1; "
                   "cat /proc/self/oom_score_adj", "--ulimit", "nofile=123", "--sysctl", "net.ipv4.ip_forward=1", "--shm-size=1m",
                   "--device", "/dev/zero:/dev/other", "--oom-score-adj=300")
    same(done.stdout, b"123\n1\n1024\nc\n300\n", "output (%s)" % last_line(done.stderr))


@case("docker", "--pid, --ipc, --network, --uts of another container and of the host", NATIVE)
def _(box):
    id = box.start()
    pid = box.pid(id)
    show = "; ".join("readlink /proc/self/ns/" + name for name in ("pid", "ipc", "uts"))
    done = box.docker(*[word for word in box.run_words(show, "--rm", "--pid=container:" + id, "--network=container:" + id, "--uts=host")
                        if word != "--network=none"])
    lines = done.stdout.decode().split()
    same((lines[:1], lines[2:]), ([os.readlink("/proc/%d/ns/pid" % pid)], [os.readlink("/proc/self/ns/uts")]),
         "namespaces (%s)" % last_line(done.stderr))
    same(box.run("readlink /proc/self/ns/pid", "--pid=host").stdout.decode().strip(), os.readlink("/proc/self/ns/pid"), "pid namespace")


@case("docker", "--init", NATIVE)
def _(box):
    done = box.run("ps -o pid,comm | head -2 | tail -1; exit 4", "--init")
    if b'"docker-init": executable file not found' in done.stderr:
        raise Skip("the daemon has no docker-init")
    same((done.stdout.split()[:2], done.returncode), ([b"1", b"docker-init"], 4), "outcome (%s)" % last_line(done.stderr))


@case("docker", "--cgroupns host and private", NATIVE)
def _(box):
    same(box.run("cut -d: -f3 /proc/self/cgroup | sort -u", "--cgroupns=private").stdout, b"/\n")
    holds(PREFIX.encode() in box.run("cat /proc/self/cgroup", "--cgroupns=host").stdout, "not the host's")
    same(box.run("ls /sys/fs/cgroup | grep -cE '^(memory|cgroup.procs)$'").stdout, b"1\n")


@case("docker", "health check")
def _(box):
    id = box.start(None, "--health-cmd=true", "--health-interval=1s")
    until(lambda: box.inspect(id, "{{.State.Health.Status}}") == "healthy", "healthy", 20)


@case("docker", "cp into and out of a running container")
def _(box):
    folder = box.scratch()
    with open(folder + "/in", "w") as file:
        file.write("copied\n")
    id = box.start()
    same(box.docker("cp", folder + "/in", id + ":/tmp/in").returncode, 0, "cp")
    same(box.docker("exec", id, "cat", "/tmp/in").stdout, b"copied\n")
    box.docker("cp", id + ":/tmp/in", folder + "/out")
    same(read(folder + "/out"), "copied\n", "file")


@case("docker", "create, start -a; the exit status stays")
def _(box):
    words = box.run_words("echo ran; exit 3")
    id = box.docker("create", *words[1:]).stdout.decode().split()[-1]
    done = box.docker("start", "-a", id)
    same((done.stdout, done.returncode), (b"ran\n", 3), "outcome (%s)" % last_line(done.stderr))
    same(box.inspect(id, "{{.State.ExitCode}}"), "3", "status")


@case("docker", "crash: a killed shim ends the container")
def _(box):
    id = box.start()
    pid = box.pid(id)
    os.kill(box.shim(), signal.SIGKILL)
    until(lambda: not state_of(pid), "the process's end")
    until(lambda: box.inspect(id, "{{.State.Running}}") == "false", "the container's end")


@case("docker", "restart of containerd: the container is found")
def _(box):
    id = box.start()
    pid = box.pid(id)
    box.lab.restart(box.version)
    until(lambda: box.docker("exec", id, "true").returncode == 0, "an exec", 20)
    same(box.pid(id), pid, "pid")
    same(box.docker("stop", "-t", "3", id).returncode, 0, "stop")
    until(lambda: box.inspect(id, "{{.State.Running}}") == "false", "the container's end")


@case("docker", "twenty fast runs")
def _(box):
    for number in range(20):
        done = box.run("echo %d" % number)
        same((done.stdout, done.returncode), (b"%d\n" % number, 0), "run %d (%s)" % (number, last_line(done.stderr)))


# --- CRI ---


class CriBox(Box):
    """CRI, by the lab's client."""

    def __init__(self, lab, version, kind):
        super().__init__(lab, version, kind)
        self.cri = lab.cri.Cri(lab.address(version))

    @contextlib.contextmanager
    def pod(self, **more):
        more.setdefault("cgroup_parent", "/" + PREFIX)
        with self.lab.cri.Pod(self.cri, self.name(), self.handler, **more) as pod:
            self.opened.append(lambda: shutil.rmtree(pod.logs, ignore_errors=True))
            yield pod

    def create(self, pod, text=None, name="c", kind=None, **config):
        image = IMAGES[kind] if kind else self.image
        context = config.setdefault("linux", {}).setdefault("security_context", {})
        context.setdefault("namespace_options", dict(pod.config["linux"]["security_context"]["namespace_options"]))
        return pod.create(name, image, ["sh", "-c"], [text or self.sleeper()], **config)

    def start(self, pod, text=None, **more):
        id = self.create(pod, text, **more)
        self.cri.StartContainer(container_id=id)
        return id

    def execute(self, id, *words, seconds=10):
        done = self.cri.ExecSync(container_id=id, cmd=list(words), timeout=seconds)
        return done.stdout, done.stderr, done.exit_code

    def status(self, id):
        return self.cri.ContainerStatus(container_id=id).status

    def exited(self, id, code=None):
        status = self.lab.cri.wait_state(self.cri, id, 2)
        if code is not None:
            same(status.exit_code, code, "exit status")
        return status

    def log(self, pod, wanted, name="c"):
        until(lambda: pod.log(name) == wanted, "log %r" % wanted, 5) if pod.log(name) != wanted else None

    def pid(self, id):
        info = self.cri.ContainerStatus(container_id=id, verbose=True).info
        return json.loads(info["info"])["pid"]

    def clear(self):
        for pod in self.cri.ListPodSandbox().items:
            if pod.metadata.name.startswith(PREFIX):
                self.cri.StopPodSandbox(pod_sandbox_id=pod.id)
                self.cri.RemovePodSandbox(pod_sandbox_id=pod.id)


@case("cri", "a pod and a container: run, log, exit status")
def _(box):
    with box.pod() as pod:
        id = box.start(pod, "echo out; exit 3")
        box.exited(id, 3)
        box.log(pod, "out\n")
        box.cri.RemoveContainer(container_id=id)


@case("cri", "an image whose layer is a module", WASM)
def _(box):
    if box.version == "1.6":
        raise Skip("this containerd unpacks no such image")
    image = box.import_artifact("k8s.io", "--all-platforms", "--no-unpack")
    with box.pod() as pod:
        id = pod.create("c", image, ["/hello.wasm"])
        box.cri.StartContainer(container_id=id)
        box.exited(id, 0)
        box.log(pod, "Hello, World!\n")


@case("cri", "exec sync: output, streams, exit status, time")
def _(box):
    with box.pod() as pod:
        id = box.start(pod)
        same(box.execute(id, "sh", "-c", "echo out; echo err >&2; exit 7"), (b"out\n", b"err\n", 7))
        began = time.monotonic()
        try:
            box.execute(id, "sleep", "30", seconds=1)
            raise Failure("exec of 30 s with a limit of 1 s succeeded")
        except Exception as error:
            if isinstance(error, Failure):
                raise
        holds(time.monotonic() - began < 10, "it took %s s", time.monotonic() - began)
        same(box.execute(id, "sh", "-c", "echo again")[0], b"again\n")


@case("cri", "stats")
def _(box):
    with box.pod() as pod:
        id = box.start(pod)
        time.sleep(0.3)
        stats = box.cri.ContainerStats(container_id=id).stats
        holds(stats.cpu.usage_core_nano_seconds.value > 0 and stats.memory.working_set_bytes.value > 50_000, "%s", str(stats))


@case("cri", "stop: TERM, then KILL after the time")
def _(box):
    with box.pod() as pod:
        id = box.start(pod)
        time.sleep(0.3)
        began = time.monotonic()
        box.cri.StopContainer(container_id=id, timeout=10)
        box.exited(id, 143)
        holds(time.monotonic() - began < 5, "it took %s s", time.monotonic() - began)
        if not box.wasm:
            id = box.start(pod, "trap '' TERM; while :; do sleep 0.1; done", name="d")
            time.sleep(0.3)
            box.cri.StopContainer(container_id=id, timeout=1)
            box.exited(id, 137)


@case("cri", "a sidecar of the other kind, in one shim")
def _(box):
    with box.pod() as pod:
        box.foreign()                   # or it is skipped
        first = box.start(pod)
        second = box.start(pod, "echo sidecar; sleep 1000", name="sidecar", kind="native" if box.wasm else "wasm")
        box.shim()
        same(box.execute(first, "sh", "-c", "echo 1")[0] + box.execute(second, "sh", "-c", "echo 2")[0], b"1\n2\n")
        box.log(pod, "sidecar\n", "sidecar")
        box.cri.StopContainer(container_id=first, timeout=0)
        box.exited(first, 137)
        same(box.status(second).state, 1, "the sidecar's state")


@case("cri", "a container is replaced in its pod")
def _(box):
    with box.pod() as pod:
        for attempt in range(3):
            id = box.start(pod, "echo %d; exit %d" % (attempt, attempt), name="c%d" % attempt)
            box.exited(id, attempt)
            box.cri.RemoveContainer(container_id=id)
        same(box.cri.PodSandboxStatus(pod_sandbox_id=pod.id).status.state, 0, "the pod's state")


@case("cri", "namespaces of the pod are shared, its own and the host's", NATIVE)
def _(box):
    with box.pod(net="cni") as pod:
        first, second = box.start(pod), box.start(pod, name="d")
        show = "; ".join("readlink /proc/self/ns/" + name for name in ("net", "ipc", "uts", "pid", "mnt"))
        a, b = (box.execute(id, "sh", "-c", show)[0].split() for id in (first, second))
        same(a[:3], b[:3], "net, ipc, uts")
        holds(a[3] != b[3] and a[4] != b[4], "pid or mnt is shared")
        holds(a[0] != os.readlink("/proc/self/ns/net").encode(), "the host's network")


@case("cri", "one pid namespace for a pod", NATIVE)
def _(box):
    with box.pod(linux={"cgroup_parent": "/" + PREFIX, "security_context": {"namespace_options": {"network": 2, "pid": 0}}}) as pod:
        id = box.start(pod)
        text = box.execute(id, "ps")[0].decode()
        holds("/pause" in text, "%s", text)
        box.cri.StopContainer(container_id=id, timeout=2)
        box.exited(id, 143)


def with_user_namespace(box, pod):
    """Gives a pod that is about to be made a user namespace, whose root is the host's 100000, and
    returns what makes a container in it. The lab's messages lack the fields (CRI v1 api.proto):
    UserNamespace userns_options = 5 of NamespaceOption {2 uids, 3 gids} of IDMapping {1 host_id, 3 length}."""
    from google.protobuf import json_format
    import api_pb2
    row = b"\x08\xa0\x8d\x06\x18\x80\x80\x04"
    option = b"\x2a\x14\x12\x08" + row + b"\x1a\x08" + row
    sandbox = json_format.ParseDict(pod.config, api_pb2.PodSandboxConfig())
    sandbox.linux.security_context.namespace_options.MergeFromString(option)
    pod.id = box.cri.r.RunPodSandbox(api_pb2.RunPodSandboxRequest(config=sandbox, runtime_handler=pod.handler), timeout=30).pod_sandbox_id

    def create(text, mounts=()):
        config = json_format.ParseDict({
            "metadata": {"name": "c"}, "image": {"image": box.image}, "command": ["sh", "-c", text], "log_path": "c.log",
            "linux": {"security_context": {"namespace_options": pod.config["linux"]["security_context"]["namespace_options"]}},
            "mounts": [{"container_path": path, "host_path": source} for path, source in mounts]}, api_pb2.ContainerConfig())
        config.linux.security_context.namespace_options.MergeFromString(option)
        for mount in config.mounts:     # repeated IDMapping uidMappings = 6, gidMappings = 7
            mount.MergeFromString(b"\x32\x08" + row + b"\x3a\x08" + row)
        return box.cri.r.CreateContainer(api_pb2.CreateContainerRequest(
            pod_sandbox_id=pod.id, config=config, sandbox_config=sandbox), timeout=30).container_id
    return create


@case("cri", "a pod with a user namespace, its volumes with mapped ids")
def _(box):
    if box.version == "1.6":
        raise Skip("containerd 1.6 knows no pods with user namespaces")
    volume = box.scratch()
    os.chmod(volume, 0o777)
    pod = box.lab.cri.Pod(box.cri, box.name(), box.handler, net="cni", cgroup_parent="/" + PREFIX)
    box.opened.append(lambda: shutil.rmtree(pod.logs, ignore_errors=True))
    try:
        create = with_user_namespace(box, pod)
    except Exception as error:
        if CANNOT_MAP in str(error):
            raise Skip(CANNOT_MAP + " map ids")
        raise
    try:
        mounts = [("/v", volume)] if box.version != "1.7" else []       # which refuses them
        id = create("cat /proc/self/uid_map; ls -ln / | grep -c ' 0 .* 0 .*bin'; echo x > /new; echo x > /v/new; sleep 1000"
                    if not box.wasm else "echo x > /new; echo x > /v/new; " + box.sleeper(), mounts)
        box.cri.StartContainer(container_id=id)
        pid = box.pid(id)
        same(read("/proc/%d/uid_map" % pid).split(), ["0", "100000", "65536"], "uid_map")
        until(lambda: os.path.exists("/proc/%d/root/new" % pid), "a new file in the root")
        same(os.stat("/proc/%d/root/new" % pid).st_uid, 100000, "its owner")
        same([item.split() for item in box.execute(id, "sh", "-c", "echo from an exec")[0].decode().splitlines()], [["from", "an", "exec"]], "exec")
        if mounts:
            until(lambda: os.path.exists(volume + "/new"), "a new file in the volume")
            same(os.stat(volume + "/new").st_uid, os.geteuid(), "its owner on the host")
    finally:
        box.cri.StopPodSandbox(pod_sandbox_id=pod.id)
        box.cri.RemovePodSandbox(pod_sandbox_id=pod.id)


@case("cri", "user, groups, capabilities, read-only root, no new privileges", NATIVE)
def _(box):
    with box.pod() as pod:
        id = box.start(pod, "id -u; id -g; grep -E 'Groups|CapBnd|NoNewPrivs' /proc/self/status | cut -f2; "
                            "(echo x > /file) 2>/dev/null || echo refused", linux={
            "security_context": {"run_as_user": {"value": 33}, "run_as_group": {"value": 34}, "supplemental_groups": [44],
            "readonly_rootfs": True,
                                 "no_new_privs": True, "capabilities": {"drop_capabilities": ["ALL"], "add_capabilities": ["CHOWN"]}}})
        box.exited(id, 0)
        lines = pod.log("c").splitlines()
        same([line.strip() for line in lines[:2] + lines[3:5]] + lines[-1:], ["33", "34", "0000000000000001", "1", "refused"], "log")
        holds("44" in lines[2].split(), "groups %s", lines[2])


@case("cri", "seccomp: RuntimeDefault")
def _(box):
    profile = {"security_context": {"seccomp": {"profile_type": "RuntimeDefault"}}}
    with box.pod() as pod:
        id = box.start(pod, "echo ran" if box.wasm else "grep '^Seccomp:' /proc/self/status; "
                                                        "unshare -U true 2>/dev/null || echo refused", linux=profile)
        box.exited(id)
        box.log(pod, "ran\n" if box.wasm else "Seccomp:\t2\nrefused\n")


@case("cri", "privileged", NATIVE)
def _(box):
    privileged = {"security_context": {"privileged": True, "namespace_options": {"network": 2, "pid": 1}}}
    with box.pod(linux={"cgroup_parent": "/" + PREFIX, "security_context": dict(privileged["security_context"])}) as pod:
        id = box.start(pod, "mount -t tmpfs x /tmp && echo mounted", linux=privileged)
        box.exited(id)
        box.log(pod, "mounted\n")


@case("cri", "resources as the kubelet sends them: huge pages of 0, shares, memory, oom score")
def _(box):
    from google.protobuf import json_format
    import api_pb2
    with box.pod() as pod:
        message = json_format.ParseDict({"pod_sandbox_id": pod.id, "sandbox_config": pod.config, "config": {
            "metadata": {"name": "c"}, "image": {"image": box.image}, "command": ["sh", "-c", box.sleeper()], "log_path": "c.log",
            "linux": {"resources": {"cpu_shares": 102, "cpu_period": 100000, "cpu_quota": 20000,
            "memory_limit_in_bytes": 128 << 20, "oom_score_adj": 900}}}},
            api_pb2.CreateContainerRequest())
        # repeated HugepageLimit hugepage_limits = 8 of LinuxContainerResources: {string page_size = 1; uint64 limit = 2}
        message.config.linux.resources.MergeFromString(b"\x42\x05\x0a\x03" b"2MB" b"\x42\x05\x0a\x03" b"1GB")
        id = box.cri.r.CreateContainer(message, timeout=30).container_id
        box.cri.StartContainer(container_id=id)
        same(cgroup_file(box.pid(id), "memory", "memory.limit_in_bytes", "memory.max"), str(128 << 20), "memory")
        same(read("/proc/%d/oom_score_adj" % box.pid(id)).strip(), "900", "oom score")


@case("cri", "update of resources")
def _(box):
    with box.pod() as pod:
        id = box.start(pod, linux={"resources": {"memory_limit_in_bytes": 64 << 20, "cpu_period": 100000, "cpu_quota": 20000}})
        for size in (128 << 20, 96 << 20):
            box.cri.UpdateContainerResources(container_id=id,
                linux={"memory_limit_in_bytes": size, "cpu_quota": 50000, "cpu_period": 100000})
            same(cgroup_file(box.pid(id), "memory", "memory.limit_in_bytes", "memory.max"), str(size), "memory")
        holds(cgroup_file(box.pid(id), "cpu", "cpu.cfs_quota_us", "cpu.max").startswith("50000"), "quota")
        same(box.execute(id, "sh", "-c", "echo here > /dev/null; echo here")[0], b"here\n", "devices after the update")


@case("cri", "OOMKilled is the reason")
def _(box):
    with box.pod() as pod:
        words, _ = hog(box)
        id = pod.create("c", box.image, words, mounts=[{"container_path": "/hog.wasm", "host_path": box.module("hog"), "readonly": True}],
                        linux={"resources": {"memory_limit_in_bytes": 48 << 20}})
        box.cri.StartContainer(container_id=id)
        same(box.exited(id, 137).reason, "OOMKilled", "reason")


@case("cri", "mounts, environment, working directory")
def _(box):
    folder = box.scratch()
    with box.pod() as pod:
        id = box.start(pod, "echo $A; pwd; echo x > /a/file; %s || echo refused" % (
            "echo x > /b/file" if box.wasm else "(echo x > /b/file) 2>/dev/null"), working_dir="/tmp", envs=[{"key": "A", "value": "MQ=="}],
                       mounts=[{"container_path": "/a", "host_path": folder},
                       {"container_path": "/b", "host_path": folder, "readonly": True}])
        box.exited(id, 0)
        holds(pod.log("c").startswith("1\n") and pod.log("c").endswith("refused\n"), "%s", pod.log("c"))
        same(read(folder + "/file"), "x\n", "file")


@case("cri", "terminal in the log")
def _(box):
    with box.pod() as pod:
        id = box.start(pod, "echo out; echo err >&2", tty=True)
        box.exited(id, 0)
        box.log(pod, "out\r\nerr\r\n" if "\r" in pod.log("c") else "out\nerr\n")


@case("cri", "restart of containerd: pod and containers are found")
def _(box):
    with box.pod() as pod:
        id = box.start(pod, "echo before; sleep 2; echo after; sleep 1000")
        pid = box.pid(id)
        box.lab.restart(box.version)
        box.cri = pod.cri = box.lab.cri.Cri(box.lab.address(box.version))
        until(lambda: ready(box), "CRI", 20)
        same((box.status(id).state, box.pid(id)), (1, pid), "state and pid")
        until(lambda: "after\n" in pod.log("c"), "the log goes on", 10)
        same(box.execute(id, "sh", "-c", "echo here")[0], b"here\n")
        box.cri.StopContainer(container_id=id, timeout=1)
        box.exited(id)


def ready(box):
    try:
        box.cri.ListPodSandbox()
        return True
    except Exception:
        return False


@case("cri", "crash: a killed shim ends all of its pod")
def _(box):
    with box.pod() as pod:
        id = box.start(pod)
        pid = box.pid(id)
        os.kill(box.shim(), signal.SIGKILL)
        until(lambda: not state_of(pid), "the process's end")
        box.exited(id)


@case("cri", "ten pods at once")
def _(box):
    failed = []

    def one():
        try:
            with box.pod() as pod:
                id = box.start(pod, "echo out; exit 3")
                box.exited(id, 3)
        except Exception as error:
            failed.append(repr(error)[:300])
    threads = [threading.Thread(target=one) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(failed, [], "failures")


# --- running them ---

BOXES = {"ctr": CtrBox, "spec": SpecBox, "docker": DockerBox, "cri": CriBox}


def run_case(lab, version, client, kind, function):
    """What is wrong with a case's outcome, "" for nothing."""
    box = BOXES[client](lab, version, kind)
    complaint = ""
    try:
        function(box)
    except Skip:
        raise
    except Failure as failure:
        complaint = str(failure)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        complaint = "%s at %s:%d: %s" % (error.__class__.__name__, os.path.basename(where.filename), where.lineno, describe(error))
    finally:
        for step in (box.close, box.clear):
            try:
                step()
            except Exception as error:
                complaint = complaint or "after it: %s" % describe(error)
        left = box.settled()
        if left:
            complaint = (complaint + "; " if complaint else "") + "left: " + ", ".join(left)[:400]
            force(lab, version)
    return complaint


def describe(error):
    """An error in one line; gRPC's are long."""
    details = getattr(error, "details", None)
    return " ".join((str(details()) if callable(details) else str(error)).split())[:400]


def force(lab, version):
    """What a failed case left must not fail the next ones."""
    for pid in lab.shims(version):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    for line in lab.left(version):
        kind, _, path = line.partition(" ")
        if kind == "cgroup":
            for file in glob.glob(path.rstrip("/") + "/cgroup.procs"):
                for pid in read(file).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            frozen = path.rstrip("/") + "/freezer.state"
            if os.path.exists(frozen):
                with open(frozen, "w") as file:
                    file.write("THAWED")
    time.sleep(0.2)
    for line in lab.left(version):
        kind, _, path = line.partition(" ")
        if kind == "cgroup":
            with contextlib.suppress(OSError):
                os.rmdir(path)
        elif kind == "mount":
            subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL)
        elif kind == "bundle":
            shutil.rmtree(path, ignore_errors=True)


def parse(arguments):
    """(options, words) of the command line."""
    options = {"versions": "1.6,1.7,2.1", "clients": "ctr,spec,docker,cri", "images": "wasm,native", "runtime": "chibiwasm", "runs": "100",
               "shim": os.path.join(ROOT, "dist", "containerd-shim-chibiwasm-v1")}
    words = []
    for argument in arguments:
        name, _, value = argument[2:].partition("=")
        if not argument.startswith("--"):
            words.append(argument)
        elif name in (*options, "scratch", "unconfined", "list", "keep"):
            options[name] = value
        else:
            sys.exit(__doc__)
    options["shim"] = os.path.abspath(options["shim"])
    if options["runtime"] == "runc":
        options["images"] = "native"
    return options, words


def chosen(options, words):
    """[(version, client, kind, title, function)] in the order of running."""
    found = []
    for version in options["versions"].split(","):
        for client in options["clients"].split(","):
            for kind in options["images"].split(","):
                for one, kinds, title, function in CASES:
                    full = "%s %s %s %s" % (version, client, kind, title)
                    if one == client and kind in kinds and (not words or any(word in full for word in words)):
                        found.append((version, client, kind, title, function))
    return found


def main(arguments):
    options, words = parse(arguments)
    cases = chosen(options, words)
    if "list" in options:
        for version, client, kind, title, _ in cases:
            print("%-4s %-6s %-6s %s" % (version, client, kind, title))
        return 0
    reason = ("it needs root" if os.geteuid() else "no %s (set SHARED)" % LAB if not os.path.isdir(LAB) else
              "no %s (make)" % options["shim"] if not os.path.exists(options["shim"]) else None)
    if reason:
        loud("everything: " + reason)
        return 0
    lab = Lab(options)
    passed, failed, skipped, begin = 0, 0, 0, time.monotonic()
    unavailable = {}                    # (version, client): why
    try:
        lab.set_up(sorted({case[0] for case in cases}))
        if any(case[1] == "cri" for case in cases):
            try:
                lab.set_up_cri()
            except (Skip, ImportError) as reason:
                loud("CRI: %s" % reason)
                unavailable.update(((version, "cri"), str(reason)) for version in lab.versions)
        for version, client, kind, title, function in cases:
            key = version, client
            if version not in lab.versions:
                unavailable[key] = "containerd %s is not there" % version
            if client == "docker" and version not in lab.dockers and key not in unavailable:
                try:
                    lab.set_up_docker(version)
                except Skip as reason:
                    unavailable[key] = str(reason)
                    loud("Docker with containerd %s: %s" % (version, reason))
            if key in unavailable:
                skipped += 1
                continue
            start, outcome = time.monotonic(), ""
            try:
                complaint = run_case(lab, version, client, kind, function)
                failed += bool(complaint)
                passed += not complaint
                outcome = complaint and "  FAILED: " + complaint.replace("\n", "\\n")
            except Skip as reason:
                skipped += 1
                outcome = "  SKIPPED: %s" % reason
            print("%-4s %-6s %-6s %-68s %7.3f s%s" % (version, client, kind, title, time.monotonic() - start, outcome), flush=True)
    except Skip as reason:
        loud("everything: %s" % reason)
        return 0
    finally:
        if "keep" not in options:
            lab.tear_down()
    print("%d passed, %d failed, %d skipped, %.0f s" % (passed, failed, skipped, time.monotonic() - begin))
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
