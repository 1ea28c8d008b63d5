#!/usr/bin/env python3
"""Builds dist/containerd-shim-chibiwasm-v1, an executable zip archive.

The archive holds __main__.py, the source of chibishim.py, and its compiled code for
every CPython at hand, keyed by the magic number of the bytecode: unmarshalling
another version's bytecode crashes the interpreter, so a Python without an entry
runs the source. The same inputs make the same bytes."""

import argparse
import os
import shutil
import stat
import subprocess
import sys
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
NAME = "containerd-shim-chibiwasm-v1"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
DATE = (1980, 1, 1, 0, 0, 0)

# Run by each Python, without the tables of columns, a third of the code: reads the source from stdin, prints magic number and code.
COMPILE = """
import _imp, importlib.util, marshal, sys
source = sys.stdin.buffer.read()
code = compile(source, "chibishim.py", "exec", dont_inherit=True, optimize=2)
sys.stdout.buffer.write(importlib.util.MAGIC_NUMBER.hex().encode() + b"\\n" + marshal.dumps(code))
"""

# Starts chibishim as a module of that name, so that tracebacks and imports find it. The
# kernel frees a process faster than Python does, hence _exit.
MAIN = """\
import gc
import marshal
import posix
import sys
gc.disable()
loader = globals().get("z") or __loader__
sys.argv[0] = loader.archive
module = type(sys)("chibishim")
module.__loader__ = loader
module.__file__ = loader.archive + "/chibishim.py"
sys.modules["chibishim"] = module
try:
    code = marshal.loads(loader.get_data("code/" + __import__("_frozen_importlib_external").MAGIC_NUMBER.hex()))
except OSError:
    code = compile(loader.get_data("chibishim.py"), "chibishim.py", "exec", dont_inherit=True, optimize=2)
exec(code, module.__dict__)
gc.freeze()
gc.enable()
status = module.main(sys.argv)
if sys.stdout:
    sys.stdout.flush()
posix._exit(status)
"""

# Python runs an archive through runpy, whose imports take longer than all of chibishim's.
# The kernel passes what follows the interpreter as one argument: options and, after c,
# a command that does the same as runpy. Before Linux 5.1 a first line has 127 bytes.
COMMAND = "c" "import sys,zipimport as i;z=i.zipimporter(sys.argv.pop(1));exec(z.get_data('__main__.py'))"
SHEBANG_BYTES = 127


def shebang(python):
    """The first line: an isolated Python without site."""
    for command in (COMMAND, ""):
        line = b"#!%s -IS%s\n" % (os.fsencode(python), command.encode())
        if len(line) <= SHEBANG_BYTES:
            return line
    sys.exit("build_zipapp: --python %s: too long for a first line of %d bytes" % (python, SHEBANG_BYTES))


def candidates():
    """The Pythons on this machine that might run the shim."""
    names = ["python3"] + ["python" + version for version in VERSIONS]
    paths = [os.path.join("/usr/bin", name) for name in names] + [shutil.which(name) for name in names] + [sys.executable]
    return [path for path in dict.fromkeys(paths) if path and os.path.exists(path)]


def compile_with(python, source):
    """(magic number in hex, marshalled code) of the source by that Python."""
    done = subprocess.run([python, "-IS", "-X", "no_debug_ranges", "-c", COMPILE], input=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip().splitlines()[-1:])
    magic, code = done.stdout.split(b"\n", 1)
    return magic.decode(), code


def default_python():
    """The interpreter of the shebang: Debian's, whatever comes first in PATH here."""
    return "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else os.path.realpath(sys.executable)


def build(output, python, compilers, required):
    """Writes the archive; returns the versions it holds compiled code for."""
    with open(os.path.join(HERE, "chibishim.py"), "rb") as file:
        source = file.read()
    compiled = {}
    for compiler in compilers:
        try:
            magic, code = compile_with(compiler, source)
        except OSError as error:
            if required:
                sys.exit("build_zipapp: --compile-for %s: %s" % (compiler, error))
            continue
        compiled.setdefault(magic, (compiler, code))
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    temporary = output + ".new"
    with open(temporary, "wb") as file:
        file.write(shebang(python))
        with zipfile.ZipFile(file, "w") as archive:
            add(archive, "__main__.py", MAIN.encode())
            for magic in sorted(compiled):
                add(archive, "code/" + magic, compiled[magic][1])
            add(archive, "chibishim.py", source, zipfile.ZIP_DEFLATED)
    os.chmod(temporary, 0o755)
    os.replace(temporary, output)
    return [compiled[magic][0] for magic in sorted(compiled)]


def add(archive, name, data, method=zipfile.ZIP_STORED):
    """Adds a member whose bytes depend on name and data only."""
    info = zipfile.ZipInfo(name, DATE)
    info.create_system = 3
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.compress_type = method
    archive.writestr(info, data)


def main():
    parser = argparse.ArgumentParser(description="Builds the shim, an executable zip archive.")
    parser.add_argument("--output", default=os.path.join(HERE, "dist", NAME))
    parser.add_argument("--python", default=default_python(), help="interpreter of the shebang (default: %(default)s)")
    parser.add_argument("--compile-for", action="append", metavar="PYTHON", help="ship compiled code for this Python only (repeatable)")
    parser.add_argument("--no-compile", action="store_true", help="ship source only")
    options = parser.parse_args()
    compilers = [] if options.no_compile else options.compile_for or candidates()
    done = build(options.output, options.python, compilers, bool(options.compile_for))
    print("%s: %d bytes, #!%s -IS, compiled for %s" % (
        os.path.relpath(options.output), os.path.getsize(options.output), options.python, ", ".join(done) or "no Python: runs from source"))


if __name__ == "__main__":
    main()
