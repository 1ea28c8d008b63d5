"""Chapter 16 and its options: disassembly, offsets in backtraces, --trace, --fuel, --timeout."""

import os
import re
import struct
import subprocess
import sys
import tempfile

import pytest

import chibishim
import run_spec
from chibishim import Instance, Module, Stepwise, Trap, disassemble, instrument
from conftest import ROOT, SHARED

SHIM = os.path.join(ROOT, "chibishim.py")
MODULES = os.path.join(ROOT, "tests", "modules")

CHASE = """(module $m (memory (export "memory") 1) (data (i32.const 8) "\\10\\00\\00\\00\\00\\00\\00\\00\\ff\\ff\\ff\\7f")
  (func $chase (param $p i32) (result i32) (i32.load (i32.load (i32.load (local.get $p)))))
  (func $count (param i32) (result i32)
    (if (result i32) (i32.eqz (local.get 0))
      (then (call $chase (i32.const 8))) (else (call $count (i32.sub (local.get 0) (i32.const 1))))))
  (func (export "_start") (drop (call $count (i32.const 2))))
  (func (export "spin") (loop (br 0)))
  (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
  (func (export "sum") (param i32) (result i32) (local i32)
    (loop (local.set 1 (i32.add (local.get 1) (local.get 0)))
      (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1))))) (local.get 1)))"""

ODDITIES = """(module (type $f (func (param i32) (result i32 i64))) (import "env" "out" (func $out (param i32)))
  (table $t 2 funcref) (table $u 2 funcref) (memory 1) (elem func $g) (data "x") (global $g (mut i64) (i64.const 0))
  (func $g (type $f) (local i32 i32 f64 v128)
    (block $a (block $b (block $c (br_table $a $b $c $b (local.get 0))) (unreachable)))
    (drop (f32.const -0)) (drop (f32.const nan)) (drop (f32.const -nan:0x200000)) (drop (f64.const -inf))
    (drop (f64.const 1e300)) (drop (f64.const nan:0x1)) (drop (i64.const -9223372036854775808))
    (table.init $u 0 (i32.const 0) (i32.const 0) (i32.const 0)) (table.copy $t $u (i32.const 0) (i32.const 0) (i32.const 0))
    (memory.init 0 (i32.const 0) (i32.const 0) (i32.const 0)) (data.drop 0) (elem.drop 0)
    (memory.copy (i32.const 0) (i32.const 0) (i32.const 0)) (memory.fill (i32.const 0) (i32.const 0) (i32.const 0))
    (table.set $u (i32.const 0) (ref.func $g)) (drop (ref.is_null (ref.null extern)))
    (i64.store offset=3 align=4 (i32.const 0) (global.get $g)) (drop (memory.grow (memory.size)))
    (drop (v128.const i32x4 1 -1 3 4)) (drop (i8x16.shuffle 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 31 (local.get 4) (local.get 4)))
    (drop (v128.load16_lane offset=2 align=1 5 (i32.const 0) (local.get 4))) (drop (f32x4.extract_lane 3 (local.get 4)))
    (drop (select (result i32) (i32.const 1) (i32.const 2) (i32.const 3)))
    (local.set 1 (if (result i32) (local.get 0) (then (i32.const 1)) (else (i32.const 2))))
    (loop $l (param) (call $out (i32.const 7)) (br_if $l (i32.const 0)))
    (call_indirect $u (type $f) (i32.const 1) (local.get 1))))"""


def instructions(lines):
    """The instructions of a listing, without comments, indices of block types and what closes a function."""
    found = []
    for line in lines:
        text = re.sub(r"\(;.*?;\)|;;.*", " ", line)
        text = text.rstrip(") ") + ")" * text.count("(")
        name, *words = text.split() or ["("]
        if not name.startswith("("):
            if name in ("f32.const", "f64.const") and "nan" not in words[0]:
                value = float.fromhex(words[0]) if "0x" in words[0] else float(words[0])
                words = [struct.pack("<f" if name == "f32.const" else "<d", value).hex()]
            text = " ".join([name] + words).replace("( ", "(").replace(" )", ")")
            found.append(re.sub(r" \(type \d+\)", "", text) if name in ("block", "loop", "if") else text)
    return found


def by_wabt(path):
    """The instructions of a module as wabt's wasm2wat writes them."""
    done = subprocess.run(["wasm2wat", "--no-check", path], stdout=subprocess.PIPE, check=True)
    body, lines = False, []
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        body = line.startswith("  (func ") or body and line.startswith("    ")
        if body and not line.startswith("  (func ") and not line.startswith("    (local "):
            lines.append(line)
    return instructions(lines)


def run(*words, **options):
    return subprocess.run([sys.executable, "-IS", SHIM, *map(str, words)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, **options)


@pytest.fixture
def chase(wat, tmp_path):
    path = tmp_path / "chase.wasm"
    path.write_bytes(wat(CHASE, "--debug-names"))
    return path


# -- the disassembler --

@pytest.mark.parametrize("text", [CHASE, ODDITIES], ids=["chase", "oddities"])
def test_it_reads_like_wasm2wat(wat, tmp_path, text):
    path = tmp_path / "m.wasm"
    path.write_bytes(wat(text))
    ours = instructions(disassemble(Module(path.read_bytes())))
    assert len(ours) > 20
    assert ours == by_wabt(str(path))


@pytest.mark.parametrize("name", ["hello-rust/seed-hello.wasm", "bzip2", "cat-zig", "minigzip"])
def test_real_modules_read_like_wasm2wat(wat, tmp_path, name):
    folder = os.path.join(SHARED, "programs", name)
    if not os.path.exists(folder):
        pytest.skip("no programs in %s" % SHARED)
    paths = [folder] if os.path.isfile(folder) else [os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".wasm")]
    for path in paths:
        nameless = str(tmp_path / os.path.basename(path))       # wasm2wat writes names in place of indices
        subprocess.run(["wasm-strip", path, "-o", nameless], check=True)
        with open(nameless, "rb") as file:
            ours = instructions(disassemble(Module(file.read())))
        assert len(ours) > 10
        assert ours == by_wabt(nameless)


def test_what_it_prints_can_be_assembled(wat):
    data = wat(ODDITIES)
    text = "\n".join(disassemble(Module(data)))
    again = wat(ODDITIES[:ODDITIES.index("(func $g (type")] + text.replace("(func ", "(func $g ", 1) + ")")
    bodies = [bytes(m.data[m.bodies[0].start:m.bodies[0].end]) for m in map(Module, (data, again))]
    assert bodies[0] == bodies[1]


def test_it_reads_every_body_of_the_official_suite_to_its_end():
    if run_spec.unpacked() is None:
        pytest.skip("no official suite in %s" % run_spec.SPEC)
    names = set()
    for folder, _, files in os.walk(os.path.join(run_spec.unpacked(), "core-3.0")):
        for file in files:
            if not file.endswith(".wasm"):
                continue
            with open(os.path.join(folder, file), "rb") as handle:
                try:
                    module = Module(handle.read())
                    module.validate()
                except chibishim.WasmError:
                    continue            # meant to be refused
            for index, body in enumerate(module.bodies, module.imported_functions):
                reader = chibishim.Disassembler(module, body)
                lines = list(reader.function(index))
                assert reader.position == body.end and lines[-1] == ")"
                names.update(line.split(";)", 1)[1].split()[0] for line in lines if line.startswith("  (;"))
    assert len(names) > 490             # nearly every instruction occurs


def test_a_function_by_index_name_or_export(chase):
    module = Module(chase.read_bytes())
    by_name = list(disassemble(module, "chase"))
    assert by_name == list(disassemble(module, "0")) and by_name[0].startswith("(func (;0;) (;chase;) (type ")
    assert list(disassemble(module, "spin"))[1:] == [
        "  (;%#08x;)  loop" % (module.bodies[3].start + 1), "  (;%#08x;)    br 0" % (module.bodies[3].start + 3),
        "  (;%#08x;)  end" % (module.bodies[3].start + 5), ")"]
    with pytest.raises(KeyError):
        list(disassemble(module, "absent"))


@pytest.mark.parametrize("words", [["--disassemble", "add", "M"], ["--disassemble=add", "M"], ["M", "--disassemble", "add"],
                                   ["M", "--disassemble=add"]])
def test_inspect_disassembles(chase, words):
    done = run("inspect", *[str(chase) if word == "M" else word for word in words])
    assert done.returncode == 0 and done.stderr == b""
    assert [line.split()[-1] for line in done.stdout.decode().splitlines()[1:]] == ["0", "1", "i32.add", ")"]


def test_inspect_of_a_function_that_is_not_there(chase):
    done = run("inspect", "--disassemble", "absent", chase)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1 and b"no function absent" in done.stderr


def test_a_name_cannot_command_the_terminal_or_end_its_comment(wat, tmp_path):
    path = tmp_path / "m.wasm"
    path.write_bytes(wat('(module (func (export "\\1b[2J;) evil")))'))
    done = run("inspect", "--disassemble", path)
    assert done.returncode == 0 and b"\x1b" not in done.stdout
    assert done.stdout.splitlines()[0].count(b";)") == 2
    assert b"\x1b" not in run("inspect", path).stdout


def test_a_name_cannot_begin_a_comment_within_its_own(wat):
    data = wat('(module (func (export "f(") (call 0)))')
    lines = list(disassemble(Module(data)))
    assert lines[1].endswith("call 0 (;f( ;)")
    assert Module(wat("(module (type (func)) %s)" % "\n".join(lines))).bodies


def test_a_catch_clause_of_no_kind_is_malformed():
    data = b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\x0a\x0a\1\x08\0\x1f\x40\1%c\0\x0b\x0b"
    assert list(disassemble(Module(data % 2)))[1].endswith("try_table (catch_all 0)")
    with pytest.raises(chibishim.Malformed, match="malformed catch clause"):
        list(disassemble(Module(data % 6)))


def test_cast_flags_beyond_two_nulls_are_malformed():
    data = b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\x0a\x0a\1\x08\0\xfb\x18%c\0\x6e\x6e\x0b"
    assert list(disassemble(Module(data % 2)))[1].endswith("br_on_cast 0 (ref any) (ref null any)")
    with pytest.raises(chibishim.Malformed, match="malformed br_on_cast flags"):
        list(disassemble(Module(data % 4)))


def test_a_damaged_body_is_a_line_on_stderr(tmp_path):
    path = tmp_path / "m.wasm"
    path.write_bytes(b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\x0a\5\1\3\0\xff\x0b")
    done = run("inspect", "--disassemble", path)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"illegal opcode ff" in done.stderr


# -- backtraces --

def offsets_of(path, word):
    """The offsets that wabt's wasm-objdump gives for instructions."""
    listing = subprocess.run(["wasm-objdump", "-d", path], stdout=subprocess.PIPE, check=True).stdout.decode()
    return [int(line.split(":")[0], 16) for line in listing.splitlines() if re.search(r"\| +%s\b" % re.escape(word), line)]


def test_a_backtrace_has_names_and_the_offsets_of_objdump(chase):
    done = run("run", chase)
    loads, calls = offsets_of(chase, "i32.load"), offsets_of(chase, "call")
    assert done.returncode == 134
    places = re.findall(r"^ +(\d+): +(0x[0-9a-f]+) - (\w+)$", done.stderr.decode(), re.M)
    assert [(int(depth), int(offset, 16), name) for depth, offset, name in places] == [
        (0, loads[2], "chase"), (1, calls[0], "count"), (2, calls[1], "count"), (3, calls[1], "count"), (4, calls[2], "_start")]


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: a container needs it here")
def test_a_container_s_backtrace_has_them_too(chase):
    done = run("container", chase)
    assert done.returncode == 134
    assert [int(word, 16) for word in re.findall(r"0x[0-9a-f]+(?= - chase)", done.stderr.decode())] == [offsets_of(chase, "i32.load")[2]]


def backtrace(module, name, *arguments, imports=None):
    """[(function index, offset)] of a trap."""
    with pytest.raises(Trap) as caught:
        Instance(module, imports).exports[name](*arguments)
    return [(function.index, offset) for function, offset in caught.value.backtrace]


@pytest.mark.parametrize("body, word", [
    ("(drop (i32.div_u (i32.const 1) (local.get 0)))", "i32.div_u"), ("(i32.store offset=70000 (i32.const 0) (i32.const 0))", "i32.store"),
    ("(nop) (unreachable)", "unreachable"), ("(call_indirect (i32.const 7))", "call_indirect"),
    ("(local.set 0 (i32.trunc_f32_s (f32.const nan)))", "i32.trunc_f32_s"), ("(memory.fill (i32.const 9) (i32.const 0) (i32.const -1))", "memory.fill"),
    ("(block (br_if 0 (local.get 0)) (drop (i32.load8_u (i32.const -1))))", "i32.load8_u"), ("(call $fail)", "call")])
def test_the_offset_is_the_instruction_s(wat, tmp_path, body, word):
    path = tmp_path / "m.wasm"
    path.write_bytes(wat('(module (import "e" "fail" (func $fail)) (memory 1) (table 1 funcref) (func (export "f") (param i32) %s))' % body))

    def fail():
        raise Trap("failed")
    assert backtrace(Module(path.read_bytes()), "f", 0, imports={"e": {"fail": fail}}) == [(1, offsets_of(path, word)[0])]


def test_the_offset_of_a_call_after_others_in_the_same_block(wat, tmp_path):
    path = tmp_path / "m.wasm"
    path.write_bytes(wat('(module (func $a (param i32) (drop (i32.div_u (i32.const 1) (local.get 0)))) (func (export "f")'
                         " (call $a (i32.const 1)) (call $a (i32.const 1)) (call $a (i32.const 0))))"))
    assert backtrace(Module(path.read_bytes()), "f") == [(0, offsets_of(path, "i32.div_u")[0]), (1, offsets_of(path, "call")[2])]


def test_an_exception_that_nobody_catches_tells_where_it_was_thrown():
    # wat: (tag) (func (throw 0)) (func (export "f") (call 0))
    data = (b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\3\2\0\0\x0d\3\1\0\0\7\5\1\1f\0\1\x0a\x0b\2\4\0\x08\0\x0b\4\0\x10\0\x0b")
    with pytest.raises(chibishim.Thrown) as caught:
        Instance(Module(data)).exports["f"]()
    throws, calls = data.index(b"\x08\0\x0b"), data.index(b"\x10\0\x0b")
    assert [(f.index, offset) for f, offset in caught.value.backtrace] == [(0, throws), (1, calls)]


def test_a_deep_backtrace_is_cut_and_says_so(wat, tmp_path):
    path = tmp_path / "m.wasm"
    path.write_bytes(wat('(module (func $deep (export "_start") (call $deep)))', "--debug-names"))
    done = run("run", path)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 134 and lines[0].endswith("call stack exhausted") and len(lines) == 34
    assert re.fullmatch(r"  … and \d+ more", lines[-1]) and int(lines[-1].split()[2]) > 10000


def test_a_host_function_s_struct_error_is_its_own(wat):
    module = Module(wat('(module (import "e" "f" (func $f)) (memory 1) (func (export "g") (drop (i32.load (i32.const 0))) (call $f)))'))

    def fail():
        struct.unpack("<I", b"")
    with pytest.raises(struct.error):
        Instance(module, {"e": {"f": fail}}).exports["g"]()


# -- tracing and bounds --

def test_trace_prints_each_instruction_with_its_operands(chase):
    done = run("run", "--trace", "--invoke=sum", chase, "2")
    words = [re.sub(r"^0x[0-9a-f]+ +", "", line) for line in done.stderr.decode().splitlines()]
    turn = ["local.get 1{}", "local.get 0", "i32.add{}", "local.set 1{}", "local.get 0", "i32.const 1", "i32.sub{}", "local.tee 0{}",
            "br_if 0{}"]
    assert (done.returncode, done.stdout) == (0, b"3\n")
    assert words == ["func 5 (;sum;)  2", "loop"] + [
        line.format(value) for line, value in zip(turn, ["", "", "  0  2", "  2", "", "", "  2  1", "  1", "  1"])] + [
        line.format(value) for line, value in zip(turn, ["", "", "  2  1", "  3", "", "", "  1  1", "  0", "  0"])] + [
        "end", "local.get 1", "end  3"]


def test_traced_offsets_are_the_disassembler_s(chase):
    listing = run("inspect", "--disassemble=add", chase).stdout.decode()
    traced = run("run", "--trace", "--invoke=add", chase, "1", "-2").stderr.decode()
    assert re.findall(r"0x[0-9a-f]+", traced)[:3] == re.findall(r"0x[0-9a-f]+", listing)
    assert "i32.add  1  -2\n" in traced


def test_fuel_is_counted_in_instructions(chase):
    assert run("run", "--fuel=4", "--invoke=add", chase, "1", "2").stdout == b"3\n"        # get get add end
    done = run("run", "--fuel=3", "--invoke=add", chase, "1", "2")
    assert (done.returncode, done.stdout) == (134, b"")
    assert done.stderr.startswith(b"error: trap: out of fuel after 3 instructions\n   0: ")


def test_fuel_is_what_a_trace_has_lines(chase):
    traced = run("run", "--trace", "--invoke=sum", chase, "9").stderr.decode().count("\n0x")
    assert run("run", "--fuel=%d" % traced, "--invoke=sum", chase, "9").stdout == b"45\n"
    assert run("run", "--fuel=%d" % (traced - 1), "--invoke=sum", chase, "9").returncode == 134


def test_fuel_ends_a_loop_without_instructions(chase):
    done = run("run", "--fuel=100000", "--invoke=spin", chase)
    assert done.returncode == 134 and b"out of fuel" in done.stderr and b"- spin" in done.stderr


def test_fuel_bounds_preloaded_modules_and_start_functions(wat, tmp_path):
    (tmp_path / "p.wasm").write_bytes(wat('(module (func (export "f") (loop (br 0))))'))
    (tmp_path / "m.wasm").write_bytes(wat('(module (import "p" "f" (func)) (func (export "_start") (call 0)))'))
    (tmp_path / "s.wasm").write_bytes(wat('(module (func $s (loop (br 0))) (start $s) (func (export "_start")))'))
    for words in (["--preload=p=%s" % (tmp_path / "p.wasm"), tmp_path / "m.wasm"], [tmp_path / "s.wasm"]):
        done = run("run", "--fuel=1000", *words)
        assert done.returncode == 134 and b"out of fuel after 1000" in done.stderr


def test_a_preloaded_module_may_import_either_snapshot_of_wasi(wat, tmp_path):
    (tmp_path / "p.wasm").write_bytes(wat("""(module (import "wasi_unstable" "sched_yield" (func $a (result i32)))
      (import "wasi_snapshot_preview1" "sched_yield" (func $b (result i32)))
      (func (export "f") (result i32) (i32.add (call $a) (call $b))))"""))
    (tmp_path / "m.wasm").write_bytes(wat('(module (import "p" "f" (func (result i32))) (func (export "g") (result i32) (call 0)))'))
    done = run("run", "--invoke=g", "--preload=p=%s" % (tmp_path / "p.wasm"), tmp_path / "m.wasm")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0\n", b"")


@pytest.mark.parametrize("name", ["spin", "sleep"])
def test_a_timeout_ends_computing_and_waiting(wat, tmp_path, name):
    path = tmp_path / "m.wasm"
    path.write_bytes(wat("""(module (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1) (func (export "spin") (loop (br 0)))
      (func (export "sleep") (i64.store (i32.const 24) (i64.const 99000000000))
        (drop (call $poll (i32.const 0) (i32.const 100) (i32.const 1) (i32.const 200)))))"""))
    done = run("run", "--timeout=0.2", "--invoke=" + name, path)
    assert done.returncode == 134
    assert re.match(r"error: trap: timeout after 0\.2 s\n   0: +0x[0-9a-f]+ - %s\n$" % name, done.stderr.decode())


def test_a_timeout_ends_waiting_for_input(wat):
    with open(os.path.join(MODULES, "cat.wat")) as file:
        data = wat(file.read())
    mine, theirs = os.pipe()
    with open(mine, "rb") as stdin, open(theirs, "wb"):
        with tempfile.NamedTemporaryFile(suffix=".wasm") as module:
            module.write(data)
            module.flush()
            done = subprocess.run([sys.executable, "-IS", SHIM, "run", "--timeout=0.2", module.name], stdin=stdin, stderr=subprocess.PIPE,
                                  timeout=60)
    assert done.returncode == 134 and done.stderr.startswith(b"error: trap: timeout after 0.2 s\n")


def test_a_guest_that_ends_in_time_is_left_alone(chase):
    done = run("run", "--timeout=30", "--fuel=1000", "--invoke=add", chase, "1", "2")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"3\n", b"")


@pytest.mark.parametrize("name, status", [("add", 0), ("exit", 7), ("trap", 134)])
def test_a_timeout_is_over_when_the_guest_is(wat, name, status):
    data = wat("""(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (func (export "add")) (func (export "exit") (call $exit (i32.const 7))) (func (export "trap") unreachable))""")
    code = ("import sys, signal; sys.path.insert(0, %r); import chibishim; "
            "print(chibishim.run_command(%r, ['x'], [], [], %r, timeout=99), *signal.getitimer(signal.ITIMER_REAL))" % (ROOT, data, name))
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"%d 0.0 0.0\n" % status)


@pytest.mark.parametrize("option", ["--fuel=0", "--fuel=x", "--fuel=-1", "--timeout=0", "--timeout=nan", "--timeout=inf", "--trace=1"])
def test_bounds_that_make_no_sense_are_refused(chase, option):
    done = run("run", option, chase)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and option.split("=")[0].encode() in done.stderr


def test_nothing_is_stepwise_without_being_asked(wat, monkeypatch):
    def fail(function):
        raise AssertionError("translated stepwise")
    monkeypatch.setattr(Stepwise, "__init__", fail)
    assert Instance(Module(wat(CHASE))).exports["sum"](3) == 6


@pytest.mark.parametrize("trace", [None, lambda line: None], ids=["fuel", "trace"])
def test_instrumented_code_computes_the_same(monkeypatch, trace):
    if run_spec.unpacked() is None:
        pytest.skip("no official suite in %s" % run_spec.SPEC)
    make = instrument(trace, [1 << 40, 1 << 40])
    monkeypatch.setattr(chibishim, "translated", lambda function: (make(function).run(), function.entry)[1])
    for name in ("br_table", "if", "loop", "unwind", "try_table", "br_on_cast", "local_tee", "labels",
                 "select", "left-to-right", "memory_copy", "simd_lane", "array", "struct", "nop"):
        totals, failures = run_spec.run(["core-3.0/" + name])
        assert failures == []
        assert sum(outcomes["passed"] for outcomes in totals.values()) > 0, name


# -- what is no module --

@pytest.mark.parametrize("command", ["run", "inspect"])
@pytest.mark.parametrize("content, message", [
    (b"", b"is empty"), (b"(module)", b"wat2wasm"), (b"\n  ;; text\n(module)", b"wat2wasm"), (b"\0asm\x0d\0\1\0\0\0", b"is a component"),
    (b"\x7fELF\2\1\1\0", b"native program"), (b"#!/bin/sh\n", b"is a script"), (b"\x1f\x8b\x08\0", b"gunzip"),
    (b"\x28\xb5\x2f\xfd\0\0", b"unzstd"), (b"!<arch>\n", b"static library"), (b"PK\3\4", b"zip"), (b"BC\xc0\xde", b"LLVM"),
    (b"hello", b"no WebAssembly module"), (b"\0as", b"no WebAssembly module")])
def test_what_is_no_module_is_said_with_what_helps(tmp_path, command, content, message):
    path = tmp_path / "thing"
    path.write_bytes(content)
    done = run(command, path)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.count(b"\n") == 1 and b"thing: " in done.stderr and message in done.stderr


@pytest.mark.parametrize("path, message", [("/absent.wasm", b"/absent.wasm: No such file"), ("/", b"/: is a directory"),
                                           ("/dev/zero", b"/dev/zero: is a device")])
def test_what_is_no_file_is_said(path, message):
    for command in "run", "inspect":
        done = run(command, path)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and message in done.stderr


def test_a_module_through_a_pipe(chase):
    done = subprocess.run([sys.executable, "-IS", SHIM, "run", "--invoke=add", "/dev/stdin", "1", "2"], stdout=subprocess.PIPE,
                          input=chase.read_bytes())
    assert (done.returncode, done.stdout) == (0, b"3\n")


def test_a_result_that_is_a_reference_is_named(wat, tmp_path):
    (tmp_path / "m.wasm").write_bytes(wat('(module (func $f (export "f") (result funcref externref) (ref.func $f) (ref.null extern)))', "--debug-names"))
    done = run("run", "--invoke=f", tmp_path / "m.wasm")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"f null\n", b"")


@pytest.mark.parametrize("words", [[], ["1"], ["1", "2", "3"]])
def test_an_export_is_called_with_as_many_arguments_as_it_takes(chase, words):
    done = run("run", "--invoke=add", chase, *words)
    assert done.returncode == 134 and b"takes 2 arguments" in done.stderr


@pytest.mark.parametrize("words, result", [
    (["-2147483648", "0xffffffff"], b"2147483647\n"), (["4294967296", "0"], None), (["0", "-2147483649"], None), (["1.5", "0"], None)])
def test_an_integer_on_the_command_line_fits_or_is_refused(chase, words, result):
    done = run("run", "--invoke=add", "--", chase, *words)
    assert (done.returncode, done.stdout) == ((0, result) if result else (134, b""))
    assert bool(result) != (b"is no i32" in done.stderr)


def test_a_reference_cannot_be_given_on_the_command_line(wat, tmp_path):
    (tmp_path / "m.wasm").write_bytes(wat('(module (func (export "f") (param funcref)))'))
    done = run("run", "--invoke=f", tmp_path / "m.wasm", "x")
    assert done.returncode == 134 and b"'x' is no (ref null func)" in done.stderr


def test_blocks_are_not_nested_without_end():
    def leb(n):
        return bytes((n & 0x7F | 0x80, n >> 7 & 0x7F | 0x80, n >> 14 & 0x7F | 0x80, n >> 21))
    body = b"\0" + b"\x02\x40" * 200000 + b"\x0b" * 200001
    code = b"\1" + leb(len(body)) + body
    module = Module(b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\x0a" + leb(len(code)) + code)
    with pytest.raises(chibishim.Invalid, match="nesting"):
        module.validate()


def test_a_module_has_a_size_that_is_bounded(monkeypatch):
    monkeypatch.setattr(chibishim, "MAX_MODULE_BYTES", 7)
    with pytest.raises(chibishim.Invalid, match="more than 7 bytes"):
        Module(b"\0asm\1\0\0\0")
