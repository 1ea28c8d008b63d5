"""Runs the official WASI preview 1 suite: command modules that check themselves.

    python tests/run_wasi.py [-v] [--walk] [WORD]…

runs the cases whose "LANGUAGE/NAME" contains one of the words (all without), with
--walk as on a kernel that has no openat2. Each runs in a process of its own by the command line, with a fresh copy of its folder
preopened as /.
"""

import concurrent.futures
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile

import archives

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WASI = os.path.join(ROOT, os.environ.get("SHARED", "../shared"), "wasi")
CASE_SECONDS = 120
SHIM = [os.path.join(ROOT, "chibishim.py")]
WITHOUT_OPENAT2 = ["-c", "import sys; sys.path.insert(0, %r); import chibishim; chibishim.SYS_OPENAT2 = 9999; "
                   "sys.exit(chibishim.main(sys.argv))" % ROOT]


@functools.lru_cache(None)
def unpacked():
    """The folder with the unpacked suite, None where there is none."""
    return archives.unpacked(os.path.join(WASI, "p1.tar.xz"))


def cases(words=()):
    """The cases whose name contains one of the words."""
    with open(os.path.join(unpacked(), "p1-cases.json")) as file:
        return [case for case in json.load(file)
                if not words or any(word in title(case) for word in words)]


def title(case):
    return "%s/%s" % (case["lang"], case["name"])


def run_case(case, program=SHIM):
    """What is wrong with a case's outcome, as a text; "" where nothing is."""
    module = os.path.join(unpacked(), case["wasm"])
    command = [sys.executable, "-IS", *program, "run"]
    command += ["--env=%s=%s" % pair for pair in case["env"].items()]
    with tempfile.TemporaryDirectory(prefix="chibishim-case-") as scratch:
        if case["root"]:
            root = os.path.join(scratch, "root")
            shutil.copytree(os.path.join(os.path.dirname(module), case["root"]), root, symlinks=True)
            command.append("--dir=%s::/" % root)
        try:
            done = subprocess.run(command + [module] + case["args"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=CASE_SECONDS)
        except subprocess.TimeoutExpired:
            return "no end after %d s" % CASE_SECONDS
    return "; ".join(complaints(case, done))


def complaints(case, done):
    """Yields what differs from the case's expectations."""
    if done.returncode != case["exit_code"]:
        yield "exit status %d, not %d: %s" % (done.returncode, case["exit_code"], done.stderr[-600:].decode("utf-8", "replace"))
    for name in "stdout", "stderr":
        if case[name] is not None and getattr(done, name).decode("utf-8", "replace") != case[name]:
            yield "%s is %.200r" % (name, getattr(done, name))


def main(arguments):
    if unpacked() is None:
        print("*** SKIPPED: no p1.tar.xz in %s (set SHARED)" % WASI)
        return 0
    chosen = cases([a for a in arguments if not a.startswith("-")])
    run = functools.partial(run_case, program=WITHOUT_OPENAT2 if "--walk" in arguments else SHIM)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for case, complaint in zip(chosen, pool.map(run, chosen)):
            failed += bool(complaint)
            if complaint or "-v" in arguments:
                print("%-50s %s" % (title(case), complaint or "passed"))
    print("%d passed, %d failed" % (len(chosen) - failed, failed))
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
