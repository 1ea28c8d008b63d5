"""Runs real command modules and compares what they print, write and return.

    python tests/run_programs.py [--shim=FILE] [WORD]…

runs those whose "PROGRAM/RUN" contains one of the words (all without), each in a
fresh copy of its folders, by chibishim.py or FILE, and prints the seconds each took.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = os.path.join(ROOT, os.environ.get("SHARED", "../shared"), "programs")
RUN_SECONDS = 1800

# Empty folders are lost in archives; these are needed.
EMPTY_FOLDERS = {"gotest": "root/tmp"}

# The one expectation that is a runtime's peculiarity: wasmtime writes the first of two buffers, and prints _start's result.
STDOUT = {"chibi-fd_write/run": b"Hello, World!\n"}


def runs(words=()):
    """[(title, folder, case, run)] of the runs whose title contains one of the words."""
    found = []
    for name in sorted(os.listdir(PROGRAMS) if os.path.isdir(PROGRAMS) else ()):
        folder = os.path.join(PROGRAMS, name)
        if not os.path.isdir(folder):
            continue
        with open(os.path.join(folder, "case.json")) as file:
            case = json.load(file)
        found += [("%s/%s" % (name, run["id"]), folder, case, run) for run in case["runs"]]
    return [one for one in found if not words or any(word in one[0] for word in words)]


def copy_writable(source, target):
    """Copies a folder; the copy may be written to wherever the original may not. One
    that is not there is an empty one: archives lose those."""
    if not os.path.exists(source):
        return os.mkdir(target)
    shutil.copytree(source, target, symlinks=True)
    for directory, _, files in os.walk(target):
        os.chmod(directory, 0o755)
        for file in files:
            path = os.path.join(directory, file)
            if not os.path.islink(path):
                os.chmod(path, 0o644)


def execute(title, folder, case, run, shim=os.path.join(ROOT, "chibishim.py")):
    """Runs it; returns what is wrong with the outcome, as a text, "" where nothing is."""
    words = [sys.executable, "-IS", shim, "run"]
    if "argv0" in run:
        words.append("--argv0=" + run["argv0"])
    words += ["--env=%s=%s" % pair for pair in run.get("env", {}).items()]
    words += ["--preload=%s=%s" % (name, os.path.join(folder, file)) for name, file in case.get("preload") or ()]
    with tempfile.TemporaryDirectory(prefix="chibishim-program-") as scratch:
        for host, guest in run.get("dirs", ()):
            copy_writable(os.path.join(folder, host), os.path.join(scratch, host))
            words.append("--dir=%s::%s" % (os.path.join(scratch, host), guest))
        if case["name"].partition("-")[0] in EMPTY_FOLDERS:
            os.makedirs(os.path.join(scratch, EMPTY_FOLDERS[case["name"].partition("-")[0]]), exist_ok=True)
        words += [os.path.join(folder, case["wasm"])] + run["args"]
        with open(os.path.join(folder, run["stdin"]) if "stdin" in run else os.devnull, "rb") as stdin:
            try:
                done = subprocess.run(words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      cwd=scratch, timeout=RUN_SECONDS)
            except subprocess.TimeoutExpired:
                return "no end after %d s" % RUN_SECONDS
        return "; ".join(complaints(title, folder, run, done, scratch))


def complaints(title, folder, run, done, scratch):
    """Yields what differs from the run's expectations."""
    expected = 134 if run["exit_code"] == "trap" else run["exit_code"]
    if done.returncode != expected:
        yield "exit status %d, not %d: %s" % (done.returncode, expected, done.stderr[-800:].decode("utf-8", "replace"))
    wanted = digest(STDOUT[title]) if title in STDOUT else run.get("stdout_sha256")
    if wanted and "stdout_regex" not in run and digest(done.stdout) != wanted:
        yield "stdout differs: %.200r" % done.stdout
    for stream in "stdout", "stderr":
        text = getattr(done, stream).decode("utf-8", "replace")
        for pattern in run.get(stream + "_regex", ()):
            if not re.search(pattern, text, re.M):
                yield "%s does not match %s: %.200r" % (stream, pattern, text)
    for path, wanted in run.get("files", {}).items():
        try:
            with open(os.path.join(scratch, path), "rb") as file:
                if digest(file.read()) != wanted:
                    yield "%s differs" % path
        except FileNotFoundError:
            yield "%s is missing" % path


def digest(data):
    return hashlib.sha256(data).hexdigest()


def main(arguments):
    words = [a for a in arguments if not a.startswith("--")]
    options = {"shim": os.path.abspath(a[7:]) for a in arguments if a.startswith("--shim=")}
    if not os.path.isdir(PROGRAMS):
        print("*** SKIPPED: no %s (set SHARED)" % PROGRAMS)
        return 0
    chosen, failed, start = runs(words), 0, time.monotonic()
    for title, folder, case, run in chosen:
        begin = time.monotonic()
        complaint = execute(title, folder, case, run, **options)
        failed += bool(complaint)
        print("%-36s %8.3f s%s" % (title, time.monotonic() - begin, complaint and "  FAILED: " + complaint), flush=True)
    print("%d passed, %d failed, %.0f s" % (len(chosen) - failed, failed, time.monotonic() - start))
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
