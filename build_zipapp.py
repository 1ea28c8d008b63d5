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
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
DATE = (1980, 1, 1, 0, 0, 0)

# The module is several code objects, so that nobody waits for what is not needed, nor has it in
# memory. The first has a shim's commands, and what several of the others need; then the
# daemon, a container's set-up, the engine, its native tier, system call filters, gRPC, what
# few containers ask for, commands for people, the portable tier. Each is loaded at the first
# call of one of the names, after those with the numbers.
STAGES = (
    (("serve",), ()),
    (("container_child", "load_child", "prepare_child"), (1,)),
    (("load_engine", "Module", "native_status", "run_command", "command_run"), ()),
    (("Machine", "compile_function"), (3,)),
    (("plan_seccomp",), (1,)),
    (("send_module",), (1,)),
    (("measure_cgroup", "mount_mapped", "mount_long", "start_logger", "make_user_namespace", "plan_scheduling",
      "plan_mapping", "plan_time", "enter_cgroup", "start_scope"), (1,)),
    (("command_container", "command_image", "command_inspect"), (1, 2, 3, 4, 5, 6, 7)),
    (("transcribe",), (3,)),
)

# Run by each Python, without the tables of columns, a third of the code. Reads the source from
# stdin; prints the magic number and the sizes, then the code objects. A statement of the
# module belongs to the one stage whose names lead, by the names in it, to what it defines
# or puts something into; where several do, to the last that comes before them all. One
# that defines nothing belongs where all is that it names. Imports come first: when a container's
# process loads the engine, it no longer sees Python's files. A name in a string counts
# where it is called: the table of instructions has such expressions.
COMPILE = """
import ast, dis, importlib.util, marshal, re, sys
if sys.version_info < (3, 10):
    sys.exit("CPython 3.10 or later is needed, and this is " + sys.version.split()[0])
stages = [(("main",), ())] + list(ast.literal_eval(sys.argv[1]))

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

def closure(roots):
    reached, new = set(), set(roots)
    while new:
        reached |= new
        new = set().union(*(leads[name] for name in new)) - reached - stubs
    return reached

def place(names):
    users = [k for k in range(len(stages)) if names & reached[k]]
    return max(k for k in range(len(stages)) if all(k in (0, user, *stages[user][1]) for user in users))

body = ast.parse(sys.stdin.buffer.read()).body
used = [names(compiled([statement])) for statement in body]
defined = [definitions(statement) for statement in body]
everything = set().union(*defined)
stubs = {name for roots, _ in stages for name in roots}
leads = {name: set() for name in everything}
for uses, names_here in zip(used, defined):
    for name in names_here:
        leads[name] |= uses & everything
reached = [closure(roots) for roots, _ in stages]
places = [0 if isinstance(body[i], (ast.Import, ast.ImportFrom)) else place(names) if names else None for i, names in enumerate(defined)]
home = {name: places[i] for i in range(len(body)) for name in defined[i]}
for i, names in enumerate(defined):
    if not names:
        wanted = {home[name] for name in used[i] & everything}
        places[i] = next(k for k in range(len(stages)) if wanted <= {0, k, *stages[k][1]})
stub = "def {0}(*words, **options):\\n    return load({1}, '{0}')(*words, **options)\\n"
text = "".join(stub.format(name, k) for k in range(1, len(stages)) for name in stages[k][0])
parts = [marshal.dumps(compiled((ast.parse(text).body if k == 0 else []) + [body[i] for i in range(len(body)) if places[i] == k]))
         for k in range(len(stages))]
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
    absent = set(range(len(AFTER)))
    def load(stage, name):
        for one in (*AFTER[stage], stage):
            if one in absent:
                absent.remove(one)
                exec(marshal.loads(archive[found[one]:found[one + 1]]), names)
        return names[name]
    names["load"] = load
    load(0, "main")
else:
    exec(compile(loader.get_data("chibishim.py"), "chibishim.py", "exec", dont_inherit=True, optimize=2), names)
gc.freeze()
gc.enable()
status = module.main(sys.argv)
posix._exit(status)
"""

# Python runs an archive through runpy, whose imports take longer than all of chibishim's.
# The kernel passes what follows the interpreter as one argument: options and, after c,
# a command that does the same as runpy. Before Linux 5.1 a first line has 127 bytes.
COMMAND = "c" "import sys,zipimport as i;z=i.zipimporter(sys.argv.pop(1));exec(z.get_data('__main__.py'))"
SHEBANG_BYTES = 127


def shebang(python):
    """The first line: an isolated Python without site. The kernel looks for no name in PATH, and ends it at a blank."""
    if not os.path.isabs(python) or len(python.split()) != 1:
        sys.exit("build_zipapp: --python %s: a first line takes an absolute path without blanks" % python)
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
    done = subprocess.run([python, "-IS", "-X", "no_debug_ranges", "-c", COMPILE, repr(STAGES)], input=source,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if last.startswith("SyntaxError"):
            sys.exit("build_zipapp: chibishim.py, by %s: %s" % (python, last))
        raise OSError(last)
    head, newline, code = done.stdout.partition(b"\n")
    if not newline:
        raise OSError("no Python: it printed nothing")
    magic, *sizes = head.decode().split()
    return magic, code, list(map(int, sizes))


def default_python():
    """The interpreter of the shebang: the system's, whatever comes first in PATH here, or this one, if that is too old."""
    for python in "/usr/bin/python3", os.path.realpath(sys.executable):
        recent = "import sys; sys.exit(sys.version_info < (3, 10))"
        if os.path.exists(python) and not subprocess.run([python, "-IS", "-c", recent]).returncode:
            return python
    sys.exit("build_zipapp: CPython 3.10 or later is needed, and this is %s; name one with --python" % sys.version.split()[0])


def build(output, python, compilers, required):
    """Writes the archive; returns the versions it holds compiled code for."""
    first = shebang(python)
    if os.path.exists(output) and not os.path.isfile(output):
        sys.exit("build_zipapp: --output %s: there is something that is no file" % output)
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
    try:
        with open(temporary, "wb") as file:
            file.write(first)
            write_archive(file, compiled, source)
        os.chmod(temporary, 0o755)
        os.replace(temporary, output)
    except OSError as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        sys.exit("build_zipapp: --output %s: %s" % (output, error.strerror))
    return [compiled[magic][0] for magic in sorted(compiled)]


def write_archive(file, compiled, source):
    """Writes the members; __main__.py knows where in the file the code objects are."""
    table = {}
    with zipfile.ZipFile(file, "w") as archive:
        for magic in sorted(compiled):
            _, code, sizes = compiled[magic]
            add(archive, "code/" + magic, code)
            start = file.tell() - len(code)
            table[magic] = [start + sum(sizes[:stage]) for stage in range(len(sizes) + 1)]
        after = [()] + [numbers for _, numbers in STAGES]
        add(archive, "__main__.py", ("CODE = %r\nAFTER = %r\n" % (table, after) + MAIN).encode())
        add(archive, "chibishim.py", source, zipfile.ZIP_DEFLATED)


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
    parser.add_argument("--python", help="interpreter of the shebang (default: /usr/bin/python3, or this one, if that is older than 3.10)")
    parser.add_argument("--compile-for", action="append", metavar="PYTHON", help="ship compiled code for this Python only (repeatable)")
    parser.add_argument("--no-compile", action="store_true", help="ship source only")
    options = parser.parse_args()
    python = options.python or default_python()
    compilers = [] if options.no_compile else options.compile_for or candidates()
    try:
        done = build(options.output, python, compilers, bool(options.compile_for))
    except OSError as error:
        sys.exit("build_zipapp: %s" % error)
    print("%s: %d bytes, #!%s -IS, compiled for %s" % (
        os.path.relpath(options.output), os.path.getsize(options.output), python, ", ".join(done) or "no Python: runs from source"))


if __name__ == "__main__":
    main()
