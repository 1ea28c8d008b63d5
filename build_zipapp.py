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

# The module is several code objects, so that nobody waits for what is not needed: what a shim
# needs until a guest runs, the engine, its native tier, and system call filters. Each
# later one is loaded at the first call of one of these names.
STAGES = (
    ("warm_up", "Module", "native_status", "run_command", "command_run", "command_container", "command_image", "command_inspect"),
    ("Machine", "compile_function"),
    ("plan_seccomp",),
)

# Run by each Python, without the tables of columns, a third of the code. Reads the source from
# stdin; prints the magic number and the sizes, then the code objects. A statement of the
# module belongs to the first stage whose roots reach, by the names in it, what it defines or
# puts something into; one that does neither, to the first stage that has all it names. A name
# in a string counts where it is called: the table of instructions has such expressions.
COMPILE = """
import ast, dis, importlib.util, marshal, re, sys
stages = [("main",)] + [tuple(words.split(",")) for words in sys.argv[1:]]

def names(code):
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*map(names_in, code.co_consts))

def names_in(constant):
    if isinstance(constant, str):
        return set(re.findall("([a-z_0-9]+)[(]", constant))
    if isinstance(constant, tuple):
        return set().union(*map(names_in, constant))
    return names(constant) if hasattr(constant, "co_code") else set()

def compiled(statements):
    return compile(ast.Module(statements, []), "chibishim.py", "exec", dont_inherit=True, optimize=2)

def definitions(statement):
    if isinstance(statement, (ast.Assign, ast.For)):
        targets = [n for n in ast.walk(statement) if isinstance(getattr(n, "ctx", None), ast.Store)]
        return {n.id for n in (getattr(n, "value", n) for n in targets) if isinstance(n, ast.Name)}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(a.asname or a.name).partition(".")[0] for a in statement.names}
    return {statement.name} if hasattr(statement, "name") else set()

body = ast.parse(sys.stdin.buffer.read()).body
used = [names(compiled([statement])) for statement in body]
defined = [definitions(statement) for statement in body]
everything, reached, left, parts = set().union(*defined), set(), list(range(len(body))), []
for number, roots in enumerate(stages):
    stubs = {name for later in stages[number + 1:] for name in later}
    new = set(roots)
    while new:
        reached |= new
        new = set().union(*(used[i] for i in left if defined[i] & reached)) & everything - reached - stubs
    last = number == len(stages) - 1
    mine = [i for i in left if last or (defined[i] & reached if defined[i] else not used[i] & everything - reached)]
    left = [i for i in left if i not in mine]
    stub = "def {0}(*words, **options):\\n    return load({1}, '{0}')(*words, **options)\\n"
    text = "".join(stub.format(name, later) for later in range(1, len(stages)) for name in stages[later] if not number)
    parts.append(marshal.dumps(compiled(ast.parse(text).body + [body[i] for i in mine])))
sizes = " ".join(str(len(part)) for part in parts)
sys.stdout.buffer.write((importlib.util.MAGIC_NUMBER.hex() + " " + sizes + "\\n").encode() + b"".join(parts))
"""

# Starts chibishim as a module of that name, so that tracebacks and imports find it. The
# kernel frees a process faster than Python does, hence _exit. The archive is mapped: a
# container's process loads the later code objects when it no longer sees the file.
MAIN = """\
import gc
import marshal
import mmap
import posix
import sys
gc.disable()
loader = globals().get("z") or __loader__
sys.argv[0] = loader.archive
module = type(sys)("chibishim")
module.__loader__ = loader
module.__file__ = loader.archive + "/chibishim.py"
sys.modules["chibishim"] = module
names = module.__dict__
found = CODE.get(__import__("_frozen_importlib_external").MAGIC_NUMBER.hex())
if found:
    fd = posix.open(loader.archive, posix.O_RDONLY | posix.O_CLOEXEC)
    archive = memoryview(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ))
    posix.close(fd)
    def load(stage, name):
        exec(marshal.loads(archive[found[stage]:found[stage + 1]]), names)
        return names[name]
    names["load"] = load
    load(0, "main")
else:
    exec(compile(loader.get_data("chibishim.py"), "chibishim.py", "exec", dont_inherit=True, optimize=2), names)
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
    """(magic number in hex, marshalled code objects, their sizes) of the source by that Python."""
    done = subprocess.run([python, "-IS", "-X", "no_debug_ranges", "-c", COMPILE, *map(",".join, STAGES)], input=source,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if last.startswith("SyntaxError"):
            sys.exit("build_zipapp: chibishim.py, by %s: %s" % (python, last))
        raise OSError(last)
    head, code = done.stdout.split(b"\n", 1)
    magic, *sizes = head.decode().split()
    return magic, code, list(map(int, sizes))


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
            magic, code, sizes = compile_with(compiler, source)
        except OSError as error:
            if required:
                sys.exit("build_zipapp: --compile-for %s: %s" % (compiler, error))
            continue
        compiled.setdefault(magic, (compiler, code, sizes))
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    temporary = output + ".new"
    with open(temporary, "wb") as file:
        file.write(shebang(python))
        with zipfile.ZipFile(file, "w") as archive:
            table = {}
            for magic in sorted(compiled):
                _, code, sizes = compiled[magic]
                add(archive, "code/" + magic, code)
                start = file.tell() - len(code)
                table[magic] = [start + sum(sizes[:stage]) for stage in range(len(sizes) + 1)]
            add(archive, "__main__.py", ("CODE = %r\n" % table + MAIN).encode())
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
