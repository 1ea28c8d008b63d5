"""Generates valid modules and runs each in the interpreter and as machine code, or as Python: results,
traps and their backtraces, memories, tables, globals and calls of the host must be equal.

    python tests/fuzz_native.py [--portable] [SECONDS [SEED]]
    python tests/fuzz_native.py [--portable] --one SEED

A module is made from its seed alone, so a seed repeats a finding; --one also writes the
module to the temporary directory. Modules run in child processes: a crash is a finding.

NaNs: the specification leaves the payload of an arithmetic result open, so that each such
result is made canonical before its bits can be seen.
"""

import mmap
import os
import pickle
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback

from fuzz import sized, unsigned

import chibishim
from chibishim import (FUNCREF, I32, I64, F32, F64, V128, FunctionType, Global, GlobalType, HostFunction, Instance, Memory, Module, Table,
                       PortableTier, Thrown, Tier, Trap, Unsupported, execute_any)

MODULES_OF_A_WORKER = 200       # memory for code is never given back
HANG_SECONDS = 60
FUEL = 300                      # calls and rounds of loops in one call from outside
TYPE_BYTES = {"i": 0x7F, "I": 0x7E, "f": 0x7D, "F": 0x7C, "v": 0x7B, "r": 0x70, "x": 0x69}
TYPES = {"i": I32, "I": I64, "f": F32, "F": F64, "v": V128, "r": FUNCREF}
PAGE = 65536
TABLE_SIZE = 12
NAMES = {}                      # result letters -> rows of regular instructions
for _row in chibishim.INSTRUCTIONS:
    if _row[3] and _row[0] >> 8 != 0xFE:
        NAMES.setdefault(_row[3].split(":")[1], []).append(_row)
OPCODES = {row[1]: row[0] for row in chibishim.INSTRUCTIONS}
ARITHMETIC = {"add", "sub", "mul", "div", "min", "max", "sqrt", "ceil", "floor", "trunc", "nearest", "demote_f64", "promote_f32",
              "promote_low_f32x4", "demote_f64x2_zero", "relaxed_madd", "relaxed_nmadd", "relaxed_min", "relaxed_max"}
F32_EDGES = (0, 1 << 31, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x3F000000, 0xBF000000, 0x3F7FFFFF, 0xBF7FFFFF, 0x4EFFFFFF,
             0x4F000000, 0xCF000000, 0xCF000001, 0x4F7FFFFF, 0x4F800000, 0x5F000000, 0xDF000000, 0x5EFFFFFF, 0x5F7FFFFF, 0x5F800000,
             0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FA00000, 0x4B000000, 0x4B000001, 0x40200000, 0xC0600000)
F64_EDGES = (0, 1 << 63, 1, 0x3FF0000000000000, 0xBFF0000000000000, 0x3FE0000000000000, 0xBFEFFFFFFFFFFFFF, 0x41DFFFFFFFC00000,
             0x41E0000000000000, 0x41DFFFFFFFFFFFFF, 0xC1E0000000000000, 0xC1E00000001FFFFF, 0xC1E0000000200000, 0x41EFFFFFFFE00000,
             0x41EFFFFFFFFFFFFF, 0x41F0000000000000, 0x43DFFFFFFFFFFFFF, 0x43E0000000000000, 0xC3E0000000000000, 0xC3E0000000000001,
             0x43EFFFFFFFFFFFFF, 0x43F0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000,
             0xFFF8000000000000, 0x7FF4000000000000, 0x47EFFFFFE0000000, 0x47EFFFFFF0000000, 0x4004000000000000, 0x36A0000000000000)
I32_EDGES = (0, 1, 2, 31, 32, 127, 128, 255, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFF80, 0xFFF, 0x1000)
I64_EDGES = I32_EDGES + (63, 64, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0xFFFFFFFF80000000, 0xFFFFFFFF7FFFFFFF)


def leb(value):
    """A number as signed LEB128."""
    out = bytearray()
    while not -64 <= value < 64:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes((value & 0x7F,))


def section(id, items):
    return bytes((id,)) + sized(unsigned(len(items)) + b"".join(items)) if items else b""


def encoded(opcode):
    return bytes((opcode,)) if opcode < 0x100 else (
        bytes((opcode >> 8,)) + unsigned(opcode & 0xFF) if opcode < 0x10000 else bytes((opcode >> 12,)) + unsigned(opcode & 0xFFF))


def signature_bytes(signature):
    return b"\x60" + b"".join(unsigned(len(part)) + bytes(TYPE_BYTES[t] for t in part) for part in signature)


def integer(choose, letter):
    bits = 32 if letter == "i" else 64
    kind = choose.randrange(4)
    if kind == 0:
        return choose.choice(I32_EDGES if letter == "i" else I64_EDGES)
    return choose.getrandbits(bits) if kind == 1 else choose.getrandbits(8) if kind == 2 else -choose.getrandbits(5) & (1 << bits) - 1


def float_bits(choose, letter):
    bits = 32 if letter == "f" else 64
    if choose.random() < 0.5:
        return choose.choice(F32_EDGES if letter == "f" else F64_EDGES)
    if choose.random() < 0.5:
        value = float(choose.randrange(-1000, 1000)) / choose.choice((1, 2, 8, 3))
        return chibishim.f32_bits(chibishim.to_f32(value)) if letter == "f" else chibishim.f64_bits(value)
    return choose.getrandbits(bits)


def argument(choose, letter):
    """A value in the interpreter's form."""
    if letter in "iI":
        return integer(choose, letter)
    if letter == "v":
        return vector(choose)
    if letter == "r":
        return None
    return chibishim.f32_from_bits(float_bits(choose, letter)) if letter == "f" else chibishim.f64_from_bits(float_bits(choose, letter))


def vector(choose):
    kind = choose.randrange(4)
    if kind == 0:
        return struct.pack("<4I", *[float_bits(choose, "f") for _ in range(4)])
    if kind == 1:
        return struct.pack("<2Q", *[float_bits(choose, "F") for _ in range(2)])
    if kind == 2:
        return bytes(choose.choice((0, 1, 0x7F, 0x80, 0xFF, choose.getrandbits(8))) for _ in range(16))
    return choose.getrandbits(128).to_bytes(16, "little")


class Made:
    """A module made from a seed."""

    def __init__(self, seed):
        self.choose = choose = random.Random(seed)
        self.has_vectors = choose.random() < 0.4
        self.has_floats = self.has_vectors or choose.random() < 0.7
        self.throws = choose.random() < 0.2             # often, and traps seldom: most traps come before any handler is reached
        self.has_exceptions = self.throws or choose.random() < 0.3
        self.has_tail_calls = choose.random() < 0.3
        self.shares = choose.random() < 0.3             # imports its memory, its table and a global
        self.pages, self.limit = choose.choice(((1, 3), (1, 1), (2, 4), (0, 2)) if choose.random() < 0.3 else ((1, 3),))
        self.letters = "iiiI" + ("fF" if self.has_floats else "") + ("vv" if self.has_vectors else "") + ("rr" if choose.random() < 0.3 else "")
        self.signatures = []                            # of the types, (params, results) in letters
        self.imports = [("log", ("i", "i")), ("pair", ("IF", "FI")), ("again", ("", ""))]
        own = [("i", "i")] + [(self.some(choose.choice((0, 1, 2, 3, 6, 12))), self.some(choose.choice((0, 1, 1, 1, 2, 3))))
                              for _ in range(choose.randrange(2, 6))]
        self.functions = [signature for _, signature in self.imports] + own
        self.tags = ["i", self.some(choose.randrange(2)), self.some(choose.randrange(1, 4))] if self.has_exceptions else []
        for signature in self.functions + [(letters, "") for letters in self.tags]:
            self.type(*signature)
        # The first is the fuel. The last is imported where things are shared, and so comes first.
        self.globals = "i" + "".join(choose.choice(self.letters.replace("r", "i")) for _ in range(choose.randrange(1, 6))) + (
            "v" if self.has_vectors and choose.random() < 0.3 else "")
        self.fuel = 1 if self.shares else 0
        if self.shares:
            self.globals = choose.choice("iI") + self.globals
        self.datas = [choose.getrandbits(8 * 40).to_bytes(40, "little") for _ in range(2)]
        self.bodies = [FunctionMaker(self, signature).bytes() for signature in own]
        self.data = self.assemble(own)

    def some(self, count):
        return "".join(self.choose.choice(self.letters) for _ in range(count))

    def type(self, params, results):
        """The index of a function type."""
        if (params, results) not in self.signatures:
            self.signatures.append((params, results))
        return self.signatures.index((params, results))

    def assemble(self, own):
        choose, count = self.choose, len(self.functions)
        name = lambda text: unsigned(len(text)) + text.encode()
        limits = b"\1" + unsigned(self.pages) + unsigned(self.limit)
        table = b"\x70\1" + unsigned(TABLE_SIZE) + unsigned(TABLE_SIZE + 4)
        imports = [name("h") + name(n) + b"\0" + unsigned(self.type(*s)) for n, s in self.imports]
        if self.shares:
            imports += [name("h") + name("memory") + b"\2" + limits, name("h") + name("table") + b"\1" + table,
                        name("h") + name("global") + b"\3" + bytes((TYPE_BYTES[self.globals[0]], 1))]
        globals = [bytes((TYPE_BYTES[letter], 1)) + self.constant(letter) + b"\x0b" for letter in self.globals[self.shares:]]
        elements = [choose.randrange(count) for _ in range(TABLE_SIZE - 2)]
        self.elements = elements
        segments = [b"\0\x41\0\x0b" + unsigned(len(elements)) + b"".join(map(unsigned, elements)),
                    b"\1\0\4" + b"".join(unsigned(choose.randrange(count)) for _ in range(4)),
                    b"\3\0" + unsigned(count) + b"".join(map(unsigned, range(count)))]
        exports = [name(str(index)) + b"\0" + unsigned(index) for index in range(len(self.imports), count)]
        datas = ([b"\0\x41\x10\x0b" + sized(self.datas[0])] if self.pages else [b"\1" + sized(self.datas[0])]) + [b"\1" + sized(self.datas[1])]
        return (b"\0asm\1\0\0\0" + section(1, list(map(signature_bytes, self.signatures))) + section(2, imports)
                + section(3, [unsigned(self.type(*s)) for s in own])
                + (b"" if self.shares else section(4, [table]) + section(5, [limits]))
                + section(13, [b"\0" + unsigned(self.type(letters, "")) for letters in self.tags])
                + section(6, globals) + section(7, exports) + section(9, segments)
                + b"\x0c" + sized(unsigned(2)) + section(10, [sized(body) for body in self.bodies]) + section(11, datas))

    def constant(self, letter):
        choose = self.choose
        if letter == "i":
            return b"\x41" + leb(chibishim.signed(integer(choose, "i"), 32))
        if letter == "I":
            return b"\x42" + leb(chibishim.signed(integer(choose, "I"), 64))
        if letter == "f":
            return b"\x43" + float_bits(choose, "f").to_bytes(4, "little")
        if letter == "F":
            return b"\x44" + float_bits(choose, "F").to_bytes(8, "little")
        return b"\xd0\x70" if letter == "r" else b"\xfd\x0c" + vector(choose)


class FunctionMaker:
    """Makes the body of a function: code that leaves values of given types on the stack."""

    def __init__(self, module, signature):
        self.module, self.choose = module, module.choose
        self.params, self.results = signature
        extra = self.choose.choice((3, 6, 12, 40))
        self.locals = self.params + module.letters.replace("r", "i") + module.some(extra)
        self.code = bytearray()
        self.labels = [self.results]            # the letters that a branch carries, outermost first
        self.left = self.choose.choice((60, 200, 500))      # instructions that may still be made

    def bytes(self):
        self.spend()
        while self.left > 0:
            self.statement(4)
        self.values(self.results, 3)
        # NaNs of results are canonical already: see arithmetic()
        extra = self.locals[len(self.params):]
        return unsigned(len(extra)) + b"".join(b"\1" + bytes((TYPE_BYTES[t],)) for t in extra) + bytes(self.code) + b"\x0b"

    # -- small pieces --

    def emit(self, name, *immediates):
        self.code += encoded(OPCODES[name])
        for immediate in immediates:
            self.code += immediate if immediate.__class__ is bytes else unsigned(immediate)
        self.left -= 1

    def i32(self, value):
        self.emit("i32.const", leb(chibishim.signed(value & 0xFFFFFFFF, 32)))

    def local(self, letter):
        """The index of a local of a type, None if there is none."""
        indices = [index for index, t in enumerate(self.locals) if t == letter]
        return self.choose.choice(indices) if indices else None

    def take(self, letters):
        """Takes operands off the stack, the last first."""
        for letter in reversed(letters):
            index = self.local(letter)
            if index is None or self.choose.random() < 0.2:
                self.emit("drop")
            else:
                self.emit("local.set", index)

    def values(self, letters, depth):
        for letter in letters:
            self.value(letter, depth)

    def block_type(self, params, results):
        if not params and not results:
            return b"\x40"
        if not params and len(results) == 1 and self.choose.random() < 0.8:
            return bytes((TYPE_BYTES[results],))
        return leb(self.module.type(params, results))

    def spend(self):
        """Counts the fuel down; where there is none it traps."""
        fuel = self.module.fuel
        self.emit("global.get", fuel)
        self.i32(1)
        self.emit("i32.sub")
        self.emit("global.set", fuel)
        self.emit("global.get", fuel)
        if self.choose.random() < 0.5 and not self.module.has_tail_calls:
            self.emit("i32.eqz")
        else:                           # also where the host went on after the first trap
            self.i32(1)
            self.emit("i32.lt_s")
        self.emit("if", b"\x40")
        self.emit("unreachable")
        self.emit("end")

    def address(self, depth):
        """An address, mostly inside of the memory."""
        kind = self.choose.random()
        if self.module.throws:
            self.value("i", depth)
            self.i32(0x7FFF)
            self.emit("i32.and")
        elif kind < 0.1:
            self.i32(self.choose.choice((0, 1, PAGE - 16, PAGE - 8, PAGE - 4, PAGE - 3, PAGE - 1, PAGE, 2 * PAGE - 4, 0xFFFFFFFF, 0x7FFFFFFF)))
        elif kind < 0.2:
            self.i32(self.choose.randrange(PAGE))
        else:
            self.value("i", depth)
            if kind < 0.98:
                self.i32(self.choose.choice((0xFF, 0xFF8, 0xFFFF, 0x7FFF)))
                self.emit("i32.and")

    def memarg(self, row):
        align = self.choose.randrange(width_of(row).bit_length())
        if self.module.throws or self.choose.random() < 0.9:
            offset = self.choose.choice((0, 0, 1, 4, 8, 100, 127, 128, 4095))
        else:
            offset = self.choose.choice((4096, PAGE - 8, PAGE, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0))
        return unsigned(align) + unsigned(offset)

    # -- values --

    def value(self, letter, depth):
        choose = self.choose
        if depth <= 0 or self.left < 0 or choose.random() < 0.15:
            return self.leaf(letter)
        kind = choose.random()
        if kind < 0.55 and letter in NAMES:
            self.regular(choose.choice(NAMES[letter]), letter, depth)
        elif kind < 0.62:
            self.values(letter * 2, depth - 1)
            self.condition(depth - 1)
            if letter == "r":
                self.emit("select_t", 1, b"\x70")
            else:
                self.emit("select")
        elif kind < 0.70:
            self.construct("", letter, depth - 1)
        elif kind < 0.76:
            self.call(letter, depth - 1)
        elif kind < 0.82 and self.local(letter) is not None:
            self.value(letter, depth - 1)
            self.emit("local.tee", self.local(letter))
        elif kind < 0.85 and letter == "i":
            self.odd_integer(depth - 1)
        elif kind < 0.865 and letter in "iI":
            self.chain(letter, depth - 1)
        elif kind < 0.88 and letter == "v":
            self.values("vv", depth - 1)
            lanes = [choose.randrange(32) for _ in range(16)] if choose.random() < 0.5 else [
                4 * word + byte for word in [choose.randrange(8) for _ in range(4)] for byte in range(4)]
            self.emit("i8x16.shuffle", bytes(lanes))
        elif kind < 0.92:
            # The operand is a local's old value, which is set before it is used.
            index = self.local(letter)
            if index is None or letter not in "iI":
                return self.leaf(letter)
            self.emit("local.get", index)
            self.value(letter, depth - 1)
            self.emit("local.set", index)
            self.emit("local.get", index)
            self.emit({"i": "i32.", "I": "i64."}[letter] + choose.choice(("sub", "add", "xor")))
        else:
            self.leaf(letter)

    def leaf(self, letter):
        choose = self.choose
        kind = choose.random()
        if kind < 0.6 and self.local(letter) is not None:
            return self.emit("local.get", self.local(letter))
        if kind < 0.75 and letter in self.module.globals:
            return self.emit("global.get", choose.choice([i for i, t in enumerate(self.module.globals) if t == letter]))
        if letter == "r":
            if kind < 0.9:
                return self.emit("ref.func", choose.randrange(len(self.module.functions)))
            self.i32(choose.randrange(TABLE_SIZE))
            return self.emit("table.get", 0)
        self.code += self.module.constant(letter)
        self.left -= 1

    def condition(self, depth):
        """An i32, often made by a comparison and perhaps negated."""
        if self.choose.random() < 0.7:
            rows = [row for row in NAMES["i"] if row[1].partition(".")[2].partition("_")[0] in ("eq", "ne", "lt", "gt", "le", "ge", "eqz")
                    and row[0] < 0x100 and self.may(row)]
            self.regular(self.choose.choice(rows), "i", depth)
            if self.choose.random() < 0.3:
                self.emit("i32.eqz")
        else:
            self.value("i", depth)

    def may(self, row):
        letters = row[3].replace(":", "")
        return all(letter in self.module.letters or letter in "iI" for letter in letters)

    def regular(self, row, letter, depth):
        """An instruction of the table."""
        opcode, name, immediates, type, _ = row
        if not self.may(row):
            return self.leaf(letter)
        params = type.split(":")[0]
        if "memarg" in immediates:
            self.address(depth - 1)
            self.values(params[1:], depth - 1)
        elif name[4:7] in ("div", "rem") and letter in "iI":
            self.values(params, depth - 1)
            if self.choose.random() < 0.9:
                self.code += {"i": b"\x41\1", "I": b"\x42\1"}[letter]
                self.emit({"i": "i32.or", "I": "i64.or"}[letter])
        elif name[4:9] == "trunc" and "sat" not in name and letter in "iI" and (self.module.throws or self.choose.random() < 0.7):
            return self.leaf(letter)            # most trap
        else:
            self.values(params, depth - 1)
        self.emit(name, *self.immediates(row))
        self.canonicalize(name, letter)

    def immediates(self, row):
        out = []
        for word in row[2].split():
            if word == "memarg":
                out.append(self.memarg(row))
            elif word == "lane":
                out.append(bytes((self.choose.randrange(16 // width_of(row)),)))
        return out

    def canonicalize(self, name, letter):
        """Replaces a NaN that an instruction may have made."""
        head, _, tail = name.partition(".")
        if tail not in ARITHMETIC or letter not in "fFv" or letter == "v" and head[0] != "f":
            return
        index = self.local(letter)
        self.emit("local.tee", index)
        if letter == "v":
            self.code += self.module.constant("v")
            self.emit("local.get", index)
            self.emit("local.get", index)
            self.emit(head + ".eq")
            self.emit("v128.bitselect")
            return self.emit("local.tee", index)
        t = {"f": "f32", "F": "f64"}[letter]
        self.emit(t + ".const", b"\0\0\xc0\x7f" if letter == "f" else b"\0\0\0\0\0\0\xf8\x7f")
        self.emit("local.get", index)
        self.emit("local.get", index)
        self.emit(t + ".eq")
        self.emit("select")
        self.emit("local.tee", index)       # which has the old one

    def odd_integer(self, depth):
        kind = self.choose.randrange(5)
        if kind == 0:
            self.emit("memory.size", 0)
        elif kind == 1:
            self.i32(self.choose.choice((0, 0, 1, 2, 100000)))
            self.emit("memory.grow", 0)
        elif kind == 2:
            self.value("r", depth)
            self.emit("ref.is_null")
        elif kind == 3:
            self.emit("table.size", 0)
        else:
            self.value("r", depth)
            self.i32(self.choose.randrange(3))
            self.emit("table.grow", 0)

    def chain(self, letter, depth):
        """Integer instructions in a row, from one width to the other: each sees what the one before it left above its bits."""
        choose, names = self.choose, {"i": "i32.", "I": "i64."}
        now = choose.choice("iI")
        self.value(now, depth)
        for _ in range(choose.randrange(2, 7)):
            if choose.random() < 0.25:
                self.emit("i32.wrap_i64" if now == "I" else choose.choice(("i64.extend_i32_s", "i64.extend_i32_u")))
                now = "i" if now == "I" else "I"
            elif choose.random() < 0.15:
                self.emit(names[now] + choose.choice(("extend8_s", "extend16_s") + ("extend32_s",) * (now == "I")))
            else:
                if choose.random() < 0.5:
                    self.leaf(now)
                else:
                    self.code += self.module.constant(now)
                self.emit(names[now] + choose.choice(("add", "sub", "mul", "and", "or", "xor", "shl", "shr_u", "shr_s", "rotl")))
        if now != letter:
            self.emit("i32.wrap_i64" if now == "I" else choose.choice(("i64.extend_i32_s", "i64.extend_i32_u")))

    # -- statements --

    def statement(self, depth):
        """Code that leaves the stack as it is."""
        choose, module = self.choose, self.module
        kind = choose.randrange(24)
        if module.throws and depth > 0 and choose.random() < 0.2:
            self.exception(depth - 1)
        elif kind < 6:
            letter = choose.choice(module.letters)
            self.value(letter, depth)
            self.take(letter)
        elif kind < 8:
            index = choose.randrange(len(module.globals))
            if index != module.fuel:
                self.value(module.globals[index], depth - 1)
                self.emit("global.set", index)
        elif kind < 12:
            row = choose.choice(NAMES[""])
            if self.may(row):
                self.address(depth - 1)
                self.values(row[3].split(":")[0][1:], depth - 1)
                self.emit(row[1], *self.immediates(row))
        elif kind < 16:
            params, results = (module.some(choose.choice((0, 0, 1, 2))) for _ in "pr")
            if depth > 0:
                self.values(params, depth - 1)
                self.construct(params, results, depth - 1)
                self.take(results)
        elif kind < 19:
            self.leave(depth)
        elif kind < 20:
            signature = choose.choice(module.functions)
            self.call(signature[1], depth - 1)
            self.take(signature[1])
        elif kind < 21:
            self.bulk(depth)
        elif kind < 22:
            self.table_change(depth)
        elif kind < 23 and module.has_exceptions and depth > 0:
            self.exception(depth - 1)
        else:
            # Counts a local down, as loops do.
            index = self.local("i")
            self.emit("local.get", index)
            self.i32(choose.choice((1, 0xFFFFFFFF, 4)))
            self.emit(choose.choice(("i32.add", "i32.sub")))
            self.emit("local.set", index)

    def construct(self, params, results, depth):
        """A block, loop or if, whose operands are on the stack."""
        kind = self.choose.choice(("block", "loop", "loop", "if"))
        if depth < 0 or self.left < 0:
            kind = "block"
        type = self.block_type(params, results)
        if kind == "if":
            self.condition(depth)
        self.emit(kind, type)
        self.labels.append(params if kind == "loop" else results)
        if kind == "loop":
            self.spend()
        self.arm(params, results, depth)
        if kind == "if" and (params != results or self.choose.random() < 0.5):
            self.emit("else")
            self.arm(params, results, depth)
        self.emit("end")
        self.labels.pop()

    def arm(self, params, results, depth):
        self.take(params)
        for _ in range(self.choose.randrange(3)):
            if self.left > 0:
                self.statement(depth - 1)
        self.values(results, depth)

    def leave(self, depth):
        """A branch of one of the kinds, mostly conditional."""
        choose = self.choose
        target = choose.choice([index for index, letters in enumerate(reversed(self.labels)) if "x" not in letters])
        letters = self.labels[-1 - target]
        kind = choose.randrange(10)
        if kind < 5:
            self.values(letters, depth - 1)
            self.condition(depth - 1)
            self.emit("br_if", target)
            self.take(letters)
        elif kind < 8:
            self.emit("block", b"\x40")
            self.labels.append("")
            same = [depth for depth, other in enumerate(reversed(self.labels)) if other == letters]
            targets = [choose.choice(same) for _ in range(choose.choice((0, 1, 2, 5, 40)))]
            self.values(letters, depth - 1)
            self.value("i", depth - 1)
            if choose.random() < 0.8:
                self.i32(choose.choice((1, 3, 7, 63)))
                self.emit("i32.and")
            self.emit("br_table", len(targets), *targets, choose.choice(same))
            self.labels.pop()
            self.emit("end")
        else:
            self.condition(depth - 1)
            self.emit("if", b"\x40")
            self.labels.append("")
            if kind == 8:
                self.values(letters, depth - 1)
                self.emit("br", target + 1)
            else:
                self.end_function(depth)
            self.labels.pop()
            self.emit("end")

    def end_function(self, depth):
        choose, module = self.choose, self.module
        if choose.random() < (0.01 if module.throws else 0.1):
            return self.emit("unreachable")
        same = [index for index, (_, results) in enumerate(module.functions) if results == self.results]
        if module.has_tail_calls and same and choose.random() < 0.7:
            index = choose.choice(same)
            params, results = module.functions[index]
            self.values(params, depth - 1)
            if choose.random() < 0.5:
                return self.emit("return_call", index)
            self.element_of(index)
            return self.emit("return_call_indirect", module.type(params, results), 0)
        self.values(self.results, depth - 1)
        self.emit("return")

    def element_of(self, index):
        """An index in the table: of a function, or of none. The elements are not known yet."""
        kind = self.choose.random()
        if kind < 0.9 or self.module.throws:
            # Puts it there first: the operands lie below.
            place = self.choose.randrange(TABLE_SIZE)
            if kind < 0.7:
                self.i32(place)
                self.emit("ref.func", index)
                self.emit("table.set", 0)
            self.i32(place)
        else:
            self.i32(self.choose.choice((TABLE_SIZE - 1, TABLE_SIZE, 0xFFFFFFFF)))

    def call(self, results, depth):
        """A call of a function with these results, if there is one."""
        choose, module = self.choose, self.module
        same = [index for index, signature in enumerate(module.functions) if signature[1] == results]
        if not same or depth < 0:
            return self.values(results, 0)
        index = choose.choice(same)
        params = module.functions[index][0]
        self.values(params, depth - 1)
        if choose.random() < 0.6:
            return self.emit("call", index)
        self.element_of(index)
        self.emit("call_indirect", module.type(params, results), 0)

    def bulk(self, depth):
        kind = self.choose.randrange(4)
        if kind == 3:
            return self.emit("data.drop", self.choose.randrange(2))
        self.address(depth - 1)
        if kind == 0:
            self.value("i", depth - 1)
        elif kind == 1:
            self.address(depth - 1)
        else:
            self.i32(self.choose.randrange(44))
        self.i32(self.choose.choice((0, 1, 4, 16, 36, 300)))
        if kind == 0:
            self.emit("memory.fill", 0)
        elif kind == 1:
            self.emit("memory.copy", 0, 0)
        else:
            self.emit("memory.init", self.choose.randrange(2), 0)

    def table_change(self, depth):
        kind = self.choose.randrange(4)
        self.i32(self.choose.choice((0, 1, 2, 5, TABLE_SIZE - 1, TABLE_SIZE)))
        if kind == 0:
            self.value("r", depth - 1)
            return self.emit("table.set", 0)
        if kind == 1:
            self.value("r", depth - 1)
            self.i32(self.choose.randrange(3))
            return self.emit("table.fill", 0)
        self.i32(self.choose.randrange(5))
        self.i32(self.choose.randrange(5))
        if kind == 2:
            self.emit("table.copy", 0, 0)
        else:
            self.emit("table.init", 1, 0)

    def throw(self, depth):
        """Throws if a condition holds."""
        self.condition(depth)
        self.emit("if", b"\x40")
        self.labels.append("")
        tag = self.choose.randrange(len(self.module.tags))
        self.values(self.module.tags[tag], depth)
        self.emit("throw", tag)
        self.labels.pop()
        self.emit("end")

    def exception(self, depth):
        """Throws, or catches what is thrown inside: a block for each clause, whose values are there after it."""
        choose, module = self.choose, self.module
        if choose.random() < 0.4:
            return self.throw(depth)
        clauses = [(choose.randrange(4), choose.randrange(len(module.tags))) for _ in range(choose.randrange(1, 4))]
        carried = [(module.tags[tag] if kind < 2 else "") + "x" * (kind & 1) for kind, tag in clauses]
        self.emit("block", b"\x40")
        self.labels.append("")
        for letters in reversed(carried):
            self.emit("block", self.block_type("", letters))
            self.labels.append(letters)
        self.emit("try_table", b"\x40", len(clauses), b"".join(
            bytes((kind,)) + (unsigned(tag) if kind < 2 else b"") + unsigned(index) for index, (kind, tag) in enumerate(clauses)))
        self.labels.append("")
        for _ in range(choose.randrange(1, 3)):
            self.statement(depth)
        if choose.random() < 0.5:
            self.throw(depth)
        self.emit("call", choose.choice([index for index, signature in enumerate(module.functions) if signature == ("", "")]))
        self.emit("end")
        self.labels.pop()
        for index, letters in enumerate(carried):
            self.emit("br", len(clauses) - index)
            self.emit("end")
            self.labels.pop()
            if letters[-1:] == "x":
                self.emit("throw_ref" if choose.random() < 0.2 else "drop")
                letters = letters[:-1]
            self.take(letters)
        self.emit("end")
        self.labels.pop()


def width_of(row):
    """The bytes of a memory access or of a lane."""
    return struct.calcsize("<" + row[4].split()[1])


# -- running --


class Impatient(Tier):
    """Compiles each function after a few rounds, so that running loops go on as machine code."""

    def __init__(self):
        super().__init__("auto")
        self.credit = 0

    def counter(self, function, locals):
        counter = super().counter(function, locals)
        counter[0] = 400
        return counter


class ImpatientPortable(PortableTier):
    """The same with Python."""

    def __init__(self):
        super().__init__("auto")

    def budget(self, function):
        return 60


# Each tier in two ways: all functions from the first call on, and while they run.
TIERS = {"native": (lambda: Tier("native"), Impatient), "portable": (lambda: PortableTier("portable"), ImpatientPortable)}


def plain(type, value):
    """A value, comparable and printable."""
    if type in (F32, F64):
        return "%s:%#x" % ("f32" if type == F32 else "f64", chibishim.raw(type, value))
    if type == FUNCREF:
        return None if value is None else "func %s" % (value.name if value.host else value.index)
    return bytes(value).hex() if type == V128 else int(value)


class Run:
    """One module in one mode: the log of all that can be seen from outside."""

    def __init__(self, made, tier):
        self.log, self.made, self.depth = [], made, 0
        Module.tier = tier
        module = Module(made.data)
        host = {"log": HostFunction(FunctionType((I32,), (I32,)), self.note, "log"),
                "pair": HostFunction(FunctionType((I64, F64), (F64, I64)), lambda x, y: (y, x), "pair"),
                "again": HostFunction(FunctionType((), ()), self.again, "again")}
        self.shared = []
        if made.shares:
            host.update(memory=Memory(made.pages, made.limit), table=Table(FUNCREF, TABLE_SIZE, TABLE_SIZE + 4))
            host["global"] = Global(GlobalType(TYPES[made.globals[0]], True), 7)
        self.instances = [Instance(module, {"h": host})]
        if made.shares:
            first = self.instances[0].exports[str(len(made.imports))]
            self.instances.append(Instance(module, {"h": dict(host, log=first)}))

    def note(self, x):
        self.log.append(("log", x))
        if x % 61 == 60 and not self.made.has_tail_calls:
            raise Trap("the host's own")    # a tail call of the host is in the interpreter's backtrace only
        return (x * 5 & 0xFFFFFFFF,)

    def again(self):
        """Calls the module again."""
        self.log.append("again")
        if self.depth < 3:
            self.depth += 1
            try:
                exports = list(self.instances[0].exports.values())
                function = exports[len(self.log) % len(exports)]
                self.log.append(plain_results(function, execute_any(function, [chibishim.zero(t) for t in function.type.params])))
            except (Trap, Thrown) as trap:
                if not self.made.has_tail_calls:
                    raise
                self.log.append(str(trap))
            finally:
                self.depth -= 1
        return ()

    def call(self, instance, function, arguments):
        for one in self.instances:
            one.globals[self.made.fuel].value = FUEL
        try:
            outcome = plain_results(function, execute_any(function, list(arguments)))
        except (Trap, Thrown) as trap:
            values = [plain(t, x) for t, x in zip(trap.tag.type.params, trap.values)] if isinstance(trap, Thrown) else None
            backtrace = [(f.index, self.instances.index(f.instance), at) for f, at in trap.backtrace]
            outcome = trap.__class__.__name__, str(trap), values, backtrace
        self.log.append((function.index, outcome))
        for one in self.instances:
            self.log.append([plain(g.type.value, g.value) for g in one.globals])
            self.log.append([plain(FUNCREF, element) for element in one.tables[0].elements])
            self.log.append(bytes(one.memories[0].view))

    def compiled(self):
        """(functions compiled, functions translated)"""
        own = [f for one in self.instances for f in one.functions if not f.host and f.entry]
        enter = chibishim.do_enter, chibishim.do_enter_python
        return sum(bool(f.entry[0]) and f.entry[0][0][0] in enter for f in own), len(own)


def plain_results(function, values):
    return [plain(type, value) for type, value in zip(function.type.results, values or ())]


def difference(seed, tier, made=None):
    """What differs for this seed, as a text, or None; and how much was compiled."""
    made = made or Made(seed)
    choose = random.Random(~seed)
    calls = []
    Module.tier = None
    Module(made.data).validate()
    for _ in range(3):
        for index in range(len(made.imports), len(made.functions)):
            calls.append((choose.randrange(2), index, [argument(choose, letter) for letter in made.functions[index][0]]))
    logs, compiled = {}, (0, 0)
    for mode, make in zip(("interpreter", tier, "impatient"), (lambda: None, *TIERS[tier])):
        run = Run(made, make())
        for which, index, arguments in calls:
            instance = run.instances[which % len(run.instances)]
            run.call(instance, instance.functions[index], arguments)
        logs[mode] = run.log
        if mode == tier:
            compiled = run.compiled()
        if logs[mode] != logs["interpreter"]:
            return describe(mode, logs["interpreter"], logs[mode]), compiled
    return None, compiled


def describe(mode, expected, got):
    for place, (one, other) in enumerate(zip(expected, got)):
        if one != other:
            if one.__class__ is bytes and other.__class__ is bytes and len(one) == len(other):
                at = next(i for i, (x, y) in enumerate(zip(one, other)) if x != y)
                one, other = ("memory from %#x: %s" % (at, data[at:at + 16].hex()) for data in (one, other))
            return "entry %d\n  interpreter %.600r\n  %-11s %.600r\n  before: %.300r" % (
                place, one, mode, other, [entry for entry in expected[:place] if entry.__class__ is tuple][-1:])
    return "%d entries, %s %d" % (len(expected), mode, len(got))


def work(first, last, tier, progress, pipe):
    """The child: tries seeds, and writes what it finds to the pipe."""
    Tier.machine, Tier.refusal = None, None
    chibishim.SWEEP = 0             # references are looked for at nearly every callback
    sys.setrecursionlimit(10000)    # calls between the tiers nest in Python; FUEL bounds them
    totals = [0, 0]
    findings = []
    for seed in range(first, last):
        progress[:8] = seed.to_bytes(8, "little")
        try:
            found, compiled = difference(seed, tier)
        except Exception:
            found, compiled = traceback.format_exc()[-2000:], (0, 0)
        totals = [sum(pair) for pair in zip(totals, compiled)]
        if found:
            findings.append((seed, found))
        if not progress[8]:
            break
    os.write(pipe, pickle.dumps((seed + 1 - first, findings[:5], totals)))


def attempt(first, last, tier, until):
    """Tries seeds in a child process until then: (modules tried, [(seed, finding)], [compiled, of])."""
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    progress[8] = 1
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reader)
            work(first, last, tier, progress, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    data, at, since = b"", -1, time.monotonic()
    with open(reader, "rb", buffering=0) as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], 0.1)
            piece = pipe.read(1 << 16) if ready else None
            if piece == b"":
                break
            data += piece or b""
            seed = int.from_bytes(progress[:8], "little")
            if seed != at:
                at, since = seed, time.monotonic()
            if time.monotonic() >= until:
                progress[8] = 0
            if time.monotonic() - since > HANG_SECONDS:
                os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status:
        seed = int.from_bytes(progress[:8], "little")
        text = "still running after %d s" % HANG_SECONDS if status == signal.SIGKILL else "the process died, status %#x" % status
        return seed + 1 - first, [(seed, text)], [0, 0]
    return pickle.loads(data)


def fuzz(seconds, seed, tier="native", modules=1 << 60):
    """Runs for so long or for so many modules; returns (modules tried, findings, [compiled, of])."""
    tried, findings, totals = 0, [], [0, 0]
    until = time.monotonic() + seconds
    while time.monotonic() < until and tried < modules:
        first = seed + tried
        count, found, compiled = attempt(first, first + min(MODULES_OF_A_WORKER, modules - tried), tier, until)
        tried += count
        findings += found
        totals = [sum(pair) for pair in zip(totals, compiled)]
    return tried, findings, totals


def refused():
    """Why there is no native tier here, or None."""
    if not chibishim.choose_tier("native"):
        return "no assembler for this processor"
    try:
        Tier.ready()
    except Unsupported as error:
        return str(error)
    return None


def main(arguments):
    tier = "native"
    if arguments[:1] == ["--portable"]:
        tier = "portable"
        del arguments[0]
    if tier == "native" and refused():
        print("*** SKIPPED: %s" % refused())
        return 0
    if arguments[:1] == ["--one"]:
        seed = int(arguments[1])
        chibishim.SWEEP = 0
        sys.setrecursionlimit(10000)
        with open(os.path.join(tempfile.gettempdir(), "chibishim-fuzz-%d.wasm" % seed), "wb") as file:
            made = Made(seed)
            file.write(made.data)
        print(file.name, flush=True)
        found, compiled = difference(seed, tier, made)
        print(found or "no difference", "; compiled %d of %d functions" % compiled)
        return 1 if found else 0
    seconds = float(arguments[0]) if arguments else 10
    seed = int(arguments[1]) if len(arguments) > 1 else random.randrange(1 << 32)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("seed %d" % seed)
    tried, findings, (compiled, functions) = fuzz(seconds, seed, tier)
    for number, text in findings[:10]:
        print("seed %d:\n%s" % (number, text))
    print("%d modules, %d of %d functions compiled, %d findings" % (tried, compiled, functions, len(findings)))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
