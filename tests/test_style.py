"""What the module promises about itself."""

import ast
import os
import re

from conftest import ROOT

with open(os.path.join(ROOT, "chibishim.py"), encoding="utf-8") as file:
    SOURCE = file.read()
BANNER = re.compile(r"^# === (\d+)\. (.+?) =+$", re.M)
CHAPTERS = [(int(match[1]), match[2], SOURCE.count("\n", 0, match.start()) + 1) for match in BANNER.finditer(SOURCE)]


def test_the_map_is_the_table_of_the_chapters():
    entries = re.findall(r"^ {1,3}(\d+)  (.+?)(?:  +.*| one pass .*)?$", ast.get_docstring(ast.parse(SOURCE)), re.M)
    assert [(int(number), title.lower().replace(",", " and")) for number, title in entries] == [
        (number, title.lower().replace(",", " and")) for number, title, _ in CHAPTERS]
    assert [number for number, _, _ in CHAPTERS] == list(range(1, len(CHAPTERS) + 1))


def test_only_the_standard_library_is_imported():
    import sys
    for node in ast.walk(ast.parse(SOURCE)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] in sys.stdlib_module_names | {"_sha2", "_sha256"}, name     # one from 3.12 on, one before


def chapter_of(line):
    return max((number for number, _, banner in CHAPTERS if banner <= line), default=0)


def test_the_engine_does_not_know_the_system():
    """Up to the interpreter nothing asks the operating system for anything but memory."""
    last = next(number for number, title, _ in CHAPTERS if title == "Interpreter")
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Name) and node.id in ("os", "time", "fcntl", "select", "libc") and chapter_of(node.lineno):
            assert chapter_of(node.lineno) > last, "line %d uses %s" % (node.lineno, node.id)


# Module and Instance of chapters 9 and 10 are the embedder's handles: validate_bodies, execute.
RUNNING = (11, 12)


def global_names(code):
    """(name, line) of every global that a code object and those in it read."""
    import dis
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval, line
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from global_names(constant)


def test_a_chapter_uses_only_chapters_before_it():
    tree = ast.parse(SOURCE)
    defined = {node.name: chapter_of(node.lineno) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    late = {"line %d uses %s of chapter %d" % (line, name, defined[name])
            for name, line in global_names(compile(SOURCE, "chibishim.py", "exec"))
            if defined.get(name, 0) > chapter_of(line) and line > 1 and defined[name] not in RUNNING}
    assert late == set()
