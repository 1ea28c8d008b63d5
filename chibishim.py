"""chibishim: a containerd shim that runs WebAssembly containers, in one module.

The module reads bottom-up: a chapter uses only chapters before it.

   1  Errors                  one exception class for each phase
   2  Bytes                   a cursor: LEB128, names, vectors (core spec 5.2)
   5  WebAssembly types       value, function, table, memory, global types (2.3)
   6  Instructions            the table: one row per instruction (5.4)
   7  Numerics                integer and float operations (4.3)
   9  Handlers                from a row of the table to a function
   8  Modules                 the binary format of everything but bodies (5.5, 3.4)
  10  Store and instances     memories, tables, globals, linking (4.2, 4.5)
  11  Validation, translation one pass from bytes to basic blocks (3.3, A.3)
  12  Interpreter             the loop that executes blocks (4.4)
  13  WASI                    preview 1: what a guest can do to the world
  19  Command line            run a module without containerd
"""

import _struct as struct
import errno
import fcntl
import mmap
import os
import select
import sys
import time
from math import sqrt

VERSION = "0.1.0"

# === 1. Errors ================================================================
#
# One exception class for each phase in which a module can fail, as in the
# specification's reference interpreter. The texts are the ones of the official
# test suite. One place at each boundary translates them: to a ttrpc status, a
# WASI errno or an exit status.


class WasmError(Exception):
    """Base of everything a WebAssembly module can be guilty of."""


class Malformed(WasmError):
    """The bytes are not a module (core specification, chapter 5)."""


class Invalid(WasmError):
    """The module breaks a rule of validation (core specification, chapter 3)."""


class Unlinkable(WasmError):
    """An import is missing or has another type (section 4.5.3)."""


class Trap(WasmError):
    """Execution stopped abnormally (section 4.1). `backtrace` lists the active
    functions' names, innermost first."""

    backtrace = ()


class Exhaustion(Trap):
    """A limit of this implementation was reached: the call stack, most often."""


class Exit(Exception):
    """The guest called proc_exit; `args[0]` is the exit status. Not a WasmError:
    nothing went wrong."""


# === 2. Bytes =================================================================
#
# A cursor over a module's bytes, with one method for each primitive of the
# binary format (core specification, section 5.2). Whatever is read lies inside
# the cursor's window; what does not is Malformed. It allocates nothing but the
# values it returns, so a count in the input cannot make it allocate.

MAX_U32 = 0xFFFFFFFF
MAX_U64 = 0xFFFFFFFFFFFFFFFF


class Reader:
    """A cursor over `data[position:end]`; `data` is anything indexable to ints."""

    __slots__ = ("data", "position", "end")

    def __init__(self, data, position=0, end=None):
        self.data = data
        self.position = position
        self.end = len(data) if end is None else end

    def byte(self):
        """byte ::= 0x00 | … | 0xFF"""
        position = self.position
        if position >= self.end:
            raise Malformed("unexpected end")
        self.position = position + 1
        return self.data[position]

    def take(self, size):
        """The next `size` bytes."""
        start = self.position
        if size > self.end - start:
            raise Malformed("unexpected end")
        self.position = start + size
        return self.data[start:start + size]

    def unsigned(self, bits=32):
        """uN ::= LEB128 of at most ceil(N/7) bytes"""
        byte = self.byte()
        if byte < 0x80:
            return byte
        result = byte & 0x7F
        for shift in range(7, bits, 7):
            byte = self.byte()
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                if result >> bits:
                    raise Malformed("integer too large")
                return result
        raise Malformed("integer representation too long")

    def signed(self, bits):
        """sN ::= signed LEB128 of at most ceil(N/7) bytes"""
        result = 0
        for shift in range(0, bits, 7):
            byte = self.byte()
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte & 0x40:
                    result -= 0x80 << shift
                if not -1 << bits - 1 <= result < 1 << bits - 1:
                    raise Malformed("integer too large")
                return result
        raise Malformed("integer representation too long")

    def name(self):
        """name ::= vec(byte), valid UTF-8"""
        size = self.unsigned()
        if size > self.end - self.position:
            raise Malformed("length out of bounds")
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError:
            raise Malformed("malformed UTF-8 encoding") from None

    def vector(self, item):
        """vec(B): a count and that many items, each read by `item()`."""
        return [item() for _ in range(self.unsigned())]


# === 5. WebAssembly types =====================================================
#
# Types are small immutable values that compare with ==: a value type is the
# byte of its binary encoding (section 5.3), a function type a pair of tuples.
# UNKNOWN is the bottom type of unreachable code.

I32, I64, F32, F64, V128, FUNCREF, EXTERNREF = 0x7F, 0x7E, 0x7D, 0x7C, 0x7B, 0x70, 0x6F
UNKNOWN = 0

TYPE_NAMES = {I32: "i32", I64: "i64", F32: "f32", F64: "f64", V128: "v128",
              FUNCREF: "funcref", EXTERNREF: "externref", UNKNOWN: "unknown"}
NUMBER_TYPES = (I32, I64, F32, F64)
REFERENCE_TYPES = (FUNCREF, EXTERNREF)
TYPE_LETTERS = {"i": I32, "I": I64, "f": F32, "F": F64, "v": V128}

PAGE_BYTES = 65536
MAX_PAGES = 65536
MAX_LOCALS = 50000              # of one function; the JavaScript embedding's limit
MAX_FRAMES = 20000              # depth of the guest's call stack
MAX_TABLE_ELEMENTS = 10000000   # the JavaScript embedding's limit


class FunctionType:
    """functype ::= 0x60 resulttype resulttype; `params` and `results` are tuples."""

    __slots__ = ("params", "results")

    def __init__(self, params, results):
        self.params = tuple(params)
        self.results = tuple(results)

    def __eq__(self, other):
        return self.params == other.params and self.results == other.results

    def __hash__(self):
        return hash((self.params, self.results))

    def __str__(self):
        return "[%s] -> [%s]" % (type_list(self.params), type_list(self.results))


def type_list(types):
    """'i32 i64' of (I32, I64)."""
    return " ".join(TYPE_NAMES[t] for t in types)


class Limits:
    """limits: `minimum` and `maximum` (None = no maximum), in pages or elements."""

    __slots__ = ("minimum", "maximum")

    def __init__(self, minimum, maximum=None):
        self.minimum = minimum
        self.maximum = maximum

    def admits(self, size, maximum):
        """Whether an extern of `size` and `maximum` may be imported here (4.5.3)."""
        if size < self.minimum:
            return False
        return self.maximum is None or maximum is not None and maximum <= self.maximum


class TableType:
    """tabletype ::= reftype limits"""

    __slots__ = ("element", "limits")

    def __init__(self, element, limits):
        self.element = element
        self.limits = limits


class GlobalType:
    """globaltype ::= valtype mut"""

    __slots__ = ("value", "mutable")

    def __init__(self, value, mutable):
        self.value = value
        self.mutable = mutable


# === 6. Instructions ==========================================================
#
# Every instruction is one row of one table: opcode, name, immediates, type and
# meaning. The decoder, the validator, the interpreter and the disassembler read
# the same rows.
#
# The type is written "operands:results" with i = i32, I = i64, f = f32, F = f64;
# None means that it depends on the immediates or the context, and chapter 8 has
# a method of that name. The meaning is a Python expression over the operands
# {x} and {y}. Integers are held unsigned, floats as Python floats (an f32 is a
# double that fits 32 bits); a comparison may yield True for 1. Two operands
# have a form of their own: "load FORMAT [& MASK]" and "store FORMAT [& MASK]",
# where FORMAT is a letter of the struct module.

# A signed comparison needs no conversion: flipping the sign bit maps the order
# of signed integers onto the order of unsigned ones.

INSTRUCTIONS = (
    # Control (section 5.4.1)
    (0x00, "unreachable",         "",              None, None),
    (0x01, "nop",                 "",              None, None),
    (0x02, "block",               "blocktype",     None, None),
    (0x03, "loop",                "blocktype",     None, None),
    (0x04, "if",                  "blocktype",     None, None),
    (0x05, "else",                "",              None, None),
    (0x0B, "end",                 "",              None, None),
    (0x0C, "br",                  "label",         None, None),
    (0x0D, "br_if",               "label",         None, None),
    (0x0E, "br_table",            "labels",        None, None),
    (0x0F, "return",              "",              None, None),
    (0x10, "call",                "func",          None, None),
    (0x11, "call_indirect",       "type table",    None, None),
    # Reference, parametric, variable and table instructions (5.4.2 to 5.4.6)
    (0x1A, "drop",                "",              None, None),
    (0x1B, "select",              "",              None, None),
    (0x1C, "select_t",            "types",         None, None),
    (0x20, "local.get",           "local",         None, None),
    (0x21, "local.set",           "local",         None, None),
    (0x22, "local.tee",           "local",         None, None),
    (0x23, "global.get",          "global",        None, None),
    (0x24, "global.set",          "global",        None, None),
    (0x25, "table.get",           "table",         None, None),
    (0x26, "table.set",           "table",         None, None),
    # Memory (5.4.7)
    (0x28, "i32.load",            "memarg",        "i:i", "load I"),
    (0x29, "i64.load",            "memarg",        "i:I", "load Q"),
    (0x2A, "f32.load",            "memarg",        "i:f", "load f"),
    (0x2B, "f64.load",            "memarg",        "i:F", "load d"),
    (0x2C, "i32.load8_s",         "memarg",        "i:i", "load b & 0xFFFFFFFF"),
    (0x2D, "i32.load8_u",         "memarg",        "i:i", "load B"),
    (0x2E, "i32.load16_s",        "memarg",        "i:i", "load h & 0xFFFFFFFF"),
    (0x2F, "i32.load16_u",        "memarg",        "i:i", "load H"),
    (0x30, "i64.load8_s",         "memarg",        "i:I", "load b & 0xFFFFFFFFFFFFFFFF"),
    (0x31, "i64.load8_u",         "memarg",        "i:I", "load B"),
    (0x32, "i64.load16_s",        "memarg",        "i:I", "load h & 0xFFFFFFFFFFFFFFFF"),
    (0x33, "i64.load16_u",        "memarg",        "i:I", "load H"),
    (0x34, "i64.load32_s",        "memarg",        "i:I", "load i & 0xFFFFFFFFFFFFFFFF"),
    (0x35, "i64.load32_u",        "memarg",        "i:I", "load I"),
    (0x36, "i32.store",           "memarg",        "ii:", "store I"),
    (0x37, "i64.store",           "memarg",        "iI:", "store Q"),
    (0x38, "f32.store",           "memarg",        "if:", "store f"),
    (0x39, "f64.store",           "memarg",        "iF:", "store d"),
    (0x3A, "i32.store8",          "memarg",        "ii:", "store B & 0xFF"),
    (0x3B, "i32.store16",         "memarg",        "ii:", "store H & 0xFFFF"),
    (0x3C, "i64.store8",          "memarg",        "iI:", "store B & 0xFF"),
    (0x3D, "i64.store16",         "memarg",        "iI:", "store H & 0xFFFF"),
    (0x3E, "i64.store32",         "memarg",        "iI:", "store I & 0xFFFFFFFF"),
    (0x3F, "memory.size",         "memory",        None, None),
    (0x40, "memory.grow",         "memory",        None, None),
    # Numeric (5.4.8)
    (0x41, "i32.const",           "i32",           None, None),
    (0x42, "i64.const",           "i64",           None, None),
    (0x43, "f32.const",           "f32",           None, None),
    (0x44, "f64.const",           "f64",           None, None),
    (0x45, "i32.eqz",             "", "i:i",  "{x} == 0"),
    (0x46, "i32.eq",              "", "ii:i", "{x} == {y}"),
    (0x47, "i32.ne",              "", "ii:i", "{x} != {y}"),
    (0x48, "i32.lt_s",            "", "ii:i", "{x} ^ 0x80000000 < {y} ^ 0x80000000"),
    (0x49, "i32.lt_u",            "", "ii:i", "{x} < {y}"),
    (0x4A, "i32.gt_s",            "", "ii:i", "{x} ^ 0x80000000 > {y} ^ 0x80000000"),
    (0x4B, "i32.gt_u",            "", "ii:i", "{x} > {y}"),
    (0x4C, "i32.le_s",            "", "ii:i", "{x} ^ 0x80000000 <= {y} ^ 0x80000000"),
    (0x4D, "i32.le_u",            "", "ii:i", "{x} <= {y}"),
    (0x4E, "i32.ge_s",            "", "ii:i", "{x} ^ 0x80000000 >= {y} ^ 0x80000000"),
    (0x4F, "i32.ge_u",            "", "ii:i", "{x} >= {y}"),
    (0x50, "i64.eqz",             "", "I:i",  "{x} == 0"),
    (0x51, "i64.eq",              "", "II:i", "{x} == {y}"),
    (0x52, "i64.ne",              "", "II:i", "{x} != {y}"),
    (0x53, "i64.lt_s",            "", "II:i", "{x} ^ 0x8000000000000000 < {y} ^ 0x8000000000000000"),
    (0x54, "i64.lt_u",            "", "II:i", "{x} < {y}"),
    (0x55, "i64.gt_s",            "", "II:i", "{x} ^ 0x8000000000000000 > {y} ^ 0x8000000000000000"),
    (0x56, "i64.gt_u",            "", "II:i", "{x} > {y}"),
    (0x57, "i64.le_s",            "", "II:i", "{x} ^ 0x8000000000000000 <= {y} ^ 0x8000000000000000"),
    (0x58, "i64.le_u",            "", "II:i", "{x} <= {y}"),
    (0x59, "i64.ge_s",            "", "II:i", "{x} ^ 0x8000000000000000 >= {y} ^ 0x8000000000000000"),
    (0x5A, "i64.ge_u",            "", "II:i", "{x} >= {y}"),
    (0x5B, "f32.eq",              "", "ff:i", "{x} == {y}"),
    (0x5C, "f32.ne",              "", "ff:i", "{x} != {y}"),
    (0x5D, "f32.lt",              "", "ff:i", "{x} < {y}"),
    (0x5E, "f32.gt",              "", "ff:i", "{x} > {y}"),
    (0x5F, "f32.le",              "", "ff:i", "{x} <= {y}"),
    (0x60, "f32.ge",              "", "ff:i", "{x} >= {y}"),
    (0x61, "f64.eq",              "", "FF:i", "{x} == {y}"),
    (0x62, "f64.ne",              "", "FF:i", "{x} != {y}"),
    (0x63, "f64.lt",              "", "FF:i", "{x} < {y}"),
    (0x64, "f64.gt",              "", "FF:i", "{x} > {y}"),
    (0x65, "f64.le",              "", "FF:i", "{x} <= {y}"),
    (0x66, "f64.ge",              "", "FF:i", "{x} >= {y}"),
    (0x67, "i32.clz",             "", "i:i",  "32 - {x}.bit_length()"),
    (0x68, "i32.ctz",             "", "i:i",  "({x} & -{x}).bit_length() - 1 if {x} else 32"),
    (0x69, "i32.popcnt",          "", "i:i",  "bin({x}).count('1')"),
    (0x6A, "i32.add",             "", "ii:i", "{x} + {y} & 0xFFFFFFFF"),
    (0x6B, "i32.sub",             "", "ii:i", "{x} - {y} & 0xFFFFFFFF"),
    (0x6C, "i32.mul",             "", "ii:i", "{x} * {y} & 0xFFFFFFFF"),
    (0x6D, "i32.div_s",           "", "ii:i", "div_s({x}, {y}, 32)"),
    (0x6E, "i32.div_u",           "", "ii:i", "div_u({x}, {y})"),
    (0x6F, "i32.rem_s",           "", "ii:i", "rem_s({x}, {y}, 32)"),
    (0x70, "i32.rem_u",           "", "ii:i", "rem_u({x}, {y})"),
    (0x71, "i32.and",             "", "ii:i", "{x} & {y}"),
    (0x72, "i32.or",              "", "ii:i", "{x} | {y}"),
    (0x73, "i32.xor",             "", "ii:i", "{x} ^ {y}"),
    (0x74, "i32.shl",             "", "ii:i", "{x} << ({y} & 31) & 0xFFFFFFFF"),
    (0x75, "i32.shr_s",           "", "ii:i", "({x} ^ 0x80000000) - 0x80000000 >> ({y} & 31) & 0xFFFFFFFF"),
    (0x76, "i32.shr_u",           "", "ii:i", "{x} >> ({y} & 31)"),
    (0x77, "i32.rotl",            "", "ii:i", "({x} << ({y} & 31) | {x} >> 32 - ({y} & 31)) & 0xFFFFFFFF"),
    (0x78, "i32.rotr",            "", "ii:i", "({x} >> ({y} & 31) | {x} << 32 - ({y} & 31)) & 0xFFFFFFFF"),
    (0x79, "i64.clz",             "", "I:I",  "64 - {x}.bit_length()"),
    (0x7A, "i64.ctz",             "", "I:I",  "({x} & -{x}).bit_length() - 1 if {x} else 64"),
    (0x7B, "i64.popcnt",          "", "I:I",  "bin({x}).count('1')"),
    (0x7C, "i64.add",             "", "II:I", "{x} + {y} & 0xFFFFFFFFFFFFFFFF"),
    (0x7D, "i64.sub",             "", "II:I", "{x} - {y} & 0xFFFFFFFFFFFFFFFF"),
    (0x7E, "i64.mul",             "", "II:I", "{x} * {y} & 0xFFFFFFFFFFFFFFFF"),
    (0x7F, "i64.div_s",           "", "II:I", "div_s({x}, {y}, 64)"),
    (0x80, "i64.div_u",           "", "II:I", "div_u({x}, {y})"),
    (0x81, "i64.rem_s",           "", "II:I", "rem_s({x}, {y}, 64)"),
    (0x82, "i64.rem_u",           "", "II:I", "rem_u({x}, {y})"),
    (0x83, "i64.and",             "", "II:I", "{x} & {y}"),
    (0x84, "i64.or",              "", "II:I", "{x} | {y}"),
    (0x85, "i64.xor",             "", "II:I", "{x} ^ {y}"),
    (0x86, "i64.shl",             "", "II:I", "{x} << ({y} & 63) & 0xFFFFFFFFFFFFFFFF"),
    (0x87, "i64.shr_s",           "", "II:I", "({x} ^ 0x8000000000000000) - 0x8000000000000000 >> ({y} & 63) & 0xFFFFFFFFFFFFFFFF"),
    (0x88, "i64.shr_u",           "", "II:I", "{x} >> ({y} & 63)"),
    (0x89, "i64.rotl",            "", "II:I", "({x} << ({y} & 63) | {x} >> 64 - ({y} & 63)) & 0xFFFFFFFFFFFFFFFF"),
    (0x8A, "i64.rotr",            "", "II:I", "({x} >> ({y} & 63) | {x} << 64 - ({y} & 63)) & 0xFFFFFFFFFFFFFFFF"),
    (0x8B, "f32.abs",             "", "f:f",  "abs({x})"),
    (0x8C, "f32.neg",             "", "f:f",  "-{x}"),
    (0x8D, "f32.ceil",            "", "f:f",  "fceil({x})"),
    (0x8E, "f32.floor",           "", "f:f",  "ffloor({x})"),
    (0x8F, "f32.trunc",           "", "f:f",  "ftrunc({x})"),
    (0x90, "f32.nearest",         "", "f:f",  "fnearest({x})"),
    (0x91, "f32.sqrt",            "", "f:f",  "to_f32(fsqrt({x}))"),
    (0x92, "f32.add",             "", "ff:f", "to_f32({x} + {y})"),
    (0x93, "f32.sub",             "", "ff:f", "to_f32({x} - {y})"),
    (0x94, "f32.mul",             "", "ff:f", "to_f32({x} * {y})"),
    (0x95, "f32.div",             "", "ff:f", "to_f32(fdiv({x}, {y}))"),
    (0x96, "f32.min",             "", "ff:f", "fmin({x}, {y})"),
    (0x97, "f32.max",             "", "ff:f", "fmax({x}, {y})"),
    (0x98, "f32.copysign",        "", "ff:f", "copysign({x}, {y})"),
    (0x99, "f64.abs",             "", "F:F",  "abs({x})"),
    (0x9A, "f64.neg",             "", "F:F",  "-{x}"),
    (0x9B, "f64.ceil",            "", "F:F",  "fceil({x})"),
    (0x9C, "f64.floor",           "", "F:F",  "ffloor({x})"),
    (0x9D, "f64.trunc",           "", "F:F",  "ftrunc({x})"),
    (0x9E, "f64.nearest",         "", "F:F",  "fnearest({x})"),
    (0x9F, "f64.sqrt",            "", "F:F",  "fsqrt({x})"),
    (0xA0, "f64.add",             "", "FF:F", "{x} + {y}"),
    (0xA1, "f64.sub",             "", "FF:F", "{x} - {y}"),
    (0xA2, "f64.mul",             "", "FF:F", "{x} * {y}"),
    (0xA3, "f64.div",             "", "FF:F", "fdiv({x}, {y})"),
    (0xA4, "f64.min",             "", "FF:F", "fmin({x}, {y})"),
    (0xA5, "f64.max",             "", "FF:F", "fmax({x}, {y})"),
    (0xA6, "f64.copysign",        "", "FF:F", "copysign({x}, {y})"),
    (0xA7, "i32.wrap_i64",        "", "I:i",  "{x} & 0xFFFFFFFF"),
    (0xA8, "i32.trunc_f32_s",     "", "f:i",  "trunc_s({x}, 32)"),
    (0xA9, "i32.trunc_f32_u",     "", "f:i",  "trunc_u({x}, 32)"),
    (0xAA, "i32.trunc_f64_s",     "", "F:i",  "trunc_s({x}, 32)"),
    (0xAB, "i32.trunc_f64_u",     "", "F:i",  "trunc_u({x}, 32)"),
    (0xAC, "i64.extend_i32_s",    "", "i:I",  "({x} ^ 0x80000000) - 0x80000000 & 0xFFFFFFFFFFFFFFFF"),
    (0xAD, "i64.extend_i32_u",    "", "i:I",  "{x}"),
    (0xAE, "i64.trunc_f32_s",     "", "f:I",  "trunc_s({x}, 64)"),
    (0xAF, "i64.trunc_f32_u",     "", "f:I",  "trunc_u({x}, 64)"),
    (0xB0, "i64.trunc_f64_s",     "", "F:I",  "trunc_s({x}, 64)"),
    (0xB1, "i64.trunc_f64_u",     "", "F:I",  "trunc_u({x}, 64)"),
    (0xB2, "f32.convert_i32_s",   "", "i:f",  "to_f32(float(({x} ^ 0x80000000) - 0x80000000))"),
    (0xB3, "f32.convert_i32_u",   "", "i:f",  "to_f32(float({x}))"),
    (0xB4, "f32.convert_i64_s",   "", "I:f",  "int_to_f32(({x} ^ 0x8000000000000000) - 0x8000000000000000)"),
    (0xB5, "f32.convert_i64_u",   "", "I:f",  "int_to_f32({x})"),
    (0xB6, "f32.demote_f64",      "", "F:f",  "to_f32(quiet({x}))"),
    (0xB7, "f64.convert_i32_s",   "", "i:F",  "float(({x} ^ 0x80000000) - 0x80000000)"),
    (0xB8, "f64.convert_i32_u",   "", "i:F",  "float({x})"),
    (0xB9, "f64.convert_i64_s",   "", "I:F",  "float(({x} ^ 0x8000000000000000) - 0x8000000000000000)"),
    (0xBA, "f64.convert_i64_u",   "", "I:F",  "float({x})"),
    (0xBB, "f64.promote_f32",     "", "f:F",  "quiet({x})"),
    (0xBC, "i32.reinterpret_f32", "", "f:i",  "f32_bits({x})"),
    (0xBD, "i64.reinterpret_f64", "", "F:I",  "f64_bits({x})"),
    (0xBE, "f32.reinterpret_i32", "", "i:f",  "f32_from_bits({x})"),
    (0xBF, "f64.reinterpret_i64", "", "I:F",  "f64_from_bits({x})"),
    (0xC0, "i32.extend8_s",       "", "i:i",  "({x} & 0xFF ^ 0x80) - 0x80 & 0xFFFFFFFF"),
    (0xC1, "i32.extend16_s",      "", "i:i",  "({x} & 0xFFFF ^ 0x8000) - 0x8000 & 0xFFFFFFFF"),
    (0xC2, "i64.extend8_s",       "", "I:I",  "({x} & 0xFF ^ 0x80) - 0x80 & 0xFFFFFFFFFFFFFFFF"),
    (0xC3, "i64.extend16_s",      "", "I:I",  "({x} & 0xFFFF ^ 0x8000) - 0x8000 & 0xFFFFFFFFFFFFFFFF"),
    (0xC4, "i64.extend32_s",      "", "I:I",  "({x} & 0xFFFFFFFF ^ 0x80000000) - 0x80000000 & 0xFFFFFFFFFFFFFFFF"),
    (0xD0, "ref.null",            "reftype",       None, None),
    (0xD1, "ref.is_null",         "",              None, None),
    (0xD2, "ref.func",            "func",          None, None),
    # After the prefix byte 0xFC
    (0xFC00, "i32.trunc_sat_f32_s", "", "f:i", "trunc_sat({x}, -0x80000000, 0x7FFFFFFF) & 0xFFFFFFFF"),
    (0xFC01, "i32.trunc_sat_f32_u", "", "f:i", "trunc_sat({x}, 0, 0xFFFFFFFF)"),
    (0xFC02, "i32.trunc_sat_f64_s", "", "F:i", "trunc_sat({x}, -0x80000000, 0x7FFFFFFF) & 0xFFFFFFFF"),
    (0xFC03, "i32.trunc_sat_f64_u", "", "F:i", "trunc_sat({x}, 0, 0xFFFFFFFF)"),
    (0xFC04, "i64.trunc_sat_f32_s", "", "f:I", "trunc_sat({x}, -0x8000000000000000, 0x7FFFFFFFFFFFFFFF) & 0xFFFFFFFFFFFFFFFF"),
    (0xFC05, "i64.trunc_sat_f32_u", "", "f:I", "trunc_sat({x}, 0, 0xFFFFFFFFFFFFFFFF)"),
    (0xFC06, "i64.trunc_sat_f64_s", "", "F:I", "trunc_sat({x}, -0x8000000000000000, 0x7FFFFFFFFFFFFFFF) & 0xFFFFFFFFFFFFFFFF"),
    (0xFC07, "i64.trunc_sat_f64_u", "", "F:I", "trunc_sat({x}, 0, 0xFFFFFFFFFFFFFFFF)"),
    (0xFC08, "memory.init",       "data memory",   None, None),
    (0xFC09, "data.drop",         "data",          None, None),
    (0xFC0A, "memory.copy",       "memory memory", None, None),
    (0xFC0B, "memory.fill",       "memory",        None, None),
    (0xFC0C, "table.init",        "elem table",    None, None),
    (0xFC0D, "elem.drop",         "elem",          None, None),
    (0xFC0E, "table.copy",        "table table",   None, None),
    (0xFC0F, "table.grow",        "table",         None, None),
    (0xFC10, "table.size",        "table",         None, None),
    (0xFC11, "table.fill",        "table",         None, None),
)

PREFIX_BYTES = (0xFC,)


# === 7. Numerics ==============================================================
#
# The functions that the table's expressions name (section 4.3). Integers come
# and go unsigned. A float operation computes in double precision; for f32 its
# result is rounded once more, which is exact for + - * / and sqrt because a
# double has more than twice the bits of an f32. A NaN keeps its payload: an f32
# NaN is held as the double with the payload in the same leading bits.

INFINITY = float("inf")
NAN = float("nan")
pack_f32, unpack_f32 = struct.Struct("<f").pack, struct.Struct("<f").unpack
pack_f64, unpack_f64 = struct.Struct("<d").pack, struct.Struct("<d").unpack
pack_u32, unpack_u32 = struct.Struct("<I").pack, struct.Struct("<I").unpack
pack_u64, unpack_u64 = struct.Struct("<Q").pack, struct.Struct("<Q").unpack


def signed(value, bits):
    """The two's complement reading of an unsigned `value`."""
    sign = 1 << bits - 1
    return (value ^ sign) - sign


def div_s(x, y, bits):
    """idiv_s: truncating signed division."""
    if y == 0:
        raise Trap("integer divide by zero")
    x, y = signed(x, bits), signed(y, bits)
    quotient = abs(x) // abs(y)
    if (x < 0) != (y < 0):
        quotient = -quotient
    elif quotient >> bits - 1:
        raise Trap("integer overflow")
    return quotient & (1 << bits) - 1


def div_u(x, y):
    """idiv_u"""
    if y == 0:
        raise Trap("integer divide by zero")
    return x // y


def rem_s(x, y, bits):
    """irem_s: the remainder has the dividend's sign."""
    if y == 0:
        raise Trap("integer divide by zero")
    x, y = signed(x, bits), signed(y, bits)
    remainder = abs(x) % abs(y)
    return (-remainder if x < 0 else remainder) & (1 << bits) - 1


def rem_u(x, y):
    """irem_u"""
    if y == 0:
        raise Trap("integer divide by zero")
    return x % y


def to_f32(x):
    """A double rounded to the nearest f32, ties to even."""
    try:
        return unpack_f32(pack_f32(x))[0]
    except OverflowError:
        return copysign(INFINITY, x)


def int_to_f32(n):
    """An integer rounded once to f32; the way over a double would round twice."""
    if -1 << 53 < n < 1 << 53:
        return to_f32(float(n))
    magnitude = abs(n)
    shift = magnitude.bit_length() - 50
    kept = magnitude >> shift
    if kept << shift != magnitude:
        kept |= 1               # a sticky bit far below the f32's last one
    return to_f32(copysign(float(kept << shift), n))


def copysign(x, y):
    """fcopysign; works on the bits, so that a NaN keeps its payload."""
    return f64_from_bits(f64_bits(x) & 0x7FFFFFFFFFFFFFFF | f64_bits(float(y)) & 1 << 63)


def quiet(x):
    """A NaN made quiet; any other value as it is."""
    return x if x == x else f64_from_bits(f64_bits(x) | 0x0008000000000000)


def f64_bits(x):
    """The bit pattern of an f64."""
    return unpack_u64(pack_f64(x))[0]


def f64_from_bits(bits):
    """The f64 with this bit pattern."""
    return unpack_f64(pack_u64(bits))[0]


def f32_bits(x):
    """The bit pattern of an f32. C's conversion would make a signalling NaN quiet."""
    if x == x:
        return unpack_u32(pack_f32(x))[0]
    bits = f64_bits(x)
    return bits >> 32 & 0x80000000 | 0x7F800000 | bits >> 29 & 0x7FFFFF


def f32_from_bits(bits):
    """The f32 with this bit pattern."""
    if bits & 0x7F800000 == 0x7F800000 and bits & 0x7FFFFF:
        return f64_from_bits((bits & 0x80000000) << 32 | 0x7FF0000000000000 | (bits & 0x7FFFFF) << 29)
    return unpack_f32(pack_u32(bits))[0]


def fdiv(x, y):
    """fdiv: Python raises where IEEE 754 has infinities and NaN."""
    if y:
        return x / y
    if x == 0 or x != x:
        return quiet(x) if x != x else NAN
    return copysign(INFINITY, x) * copysign(1.0, y)


def fsqrt(x):
    """fsqrt"""
    return sqrt(x) if x >= 0 else NAN if x == x else quiet(x)


def fmin(x, y):
    """fmin: NaN wins, and -0 is less than +0."""
    if x != x or y != y:
        return quiet(x + y)
    if x == y == 0:
        return x if f64_bits(x) >> 63 else y
    return x if x < y else y


def fmax(x, y):
    """fmax: NaN wins, and +0 is greater than -0."""
    if x != x or y != y:
        return quiet(x + y)
    if x == y == 0:
        return y if f64_bits(x) >> 63 else x
    return x if x > y else y


def rounding(function):
    """A rounding of floats to integers, made of Python's, which yields ints and so
    loses the sign of zero. From 2**52 on every double is an integer."""
    def apply(x):
        if -4503599627370496.0 < x < 4503599627370496.0:
            return copysign(float(function(x)), x)
        return quiet(x)
    return apply


ftrunc = rounding(int)
ffloor = rounding(lambda x: x // 1)
fceil = rounding(lambda x: -(-x // 1))
fnearest = rounding(round)


def trunc_s(x, bits):
    """trunc_s: to a signed integer, or a trap."""
    if x != x:
        raise Trap("invalid conversion to integer")
    if -INFINITY < x < INFINITY:
        n = int(x)
        if -1 << bits - 1 <= n < 1 << bits - 1:
            return n & (1 << bits) - 1
    raise Trap("integer overflow")


def trunc_u(x, bits):
    """trunc_u: to an unsigned integer, or a trap."""
    if x != x:
        raise Trap("invalid conversion to integer")
    if -1.0 < x < INFINITY:
        n = int(x)
        if n >> bits == 0:
            return n
    raise Trap("integer overflow")


def trunc_sat(x, low, high):
    """trunc_sat: to the nearest integer of the range; 0 for NaN. The result may
    be negative."""
    if x != x:
        return 0
    if x <= low:
        return low
    return high if x >= high else int(x)


# === 9. Handlers ==============================================================
#
# A handler executes one instruction: handler(R, d, a, b), where R is the frame, a
# list, and d, a, b say where in R the result and the operands are, or carry an
# immediate. Handlers of regular instructions are made from the table's
# expressions the first time that an instruction occurs in code that runs: a
# program uses some sixty of them, and making all would cost more than running it.


class Op:
    """A row of INSTRUCTIONS made ready for chapter 11: `params` (a list) and
    `results` are value types, `shape` one of the constants below, `handler` None
    until the instruction is first met, `width` the bytes of a memory access."""

    __slots__ = ("opcode", "name", "immediates", "shape", "params", "results", "meaning", "handler", "width")

    def __init__(self, opcode, name, immediates, type, meaning):
        self.opcode, self.name, self.meaning, self.handler = opcode, name, meaning, None
        self.immediates = immediates.split()
        params, results = type.split(":") if type else ("", "")
        self.params = [TYPE_LETTERS[letter] for letter in params]
        self.results = [TYPE_LETTERS[letter] for letter in results]
        self.width = 0
        if not type:
            self.shape = IRREGULAR
        elif immediates == "memarg":
            self.shape = LOAD if results else STORE
            self.width = struct.calcsize("<" + meaning.split()[1])
        else:
            self.shape = len(params)


IRREGULAR, UNARY, BINARY, LOAD, STORE = range(5)
OPS = {}                            # opcode -> the row, or the Op once it was used
for _row in INSTRUCTIONS:
    OPS[_row[0]] = _row


def operation(opcode):
    """The Op of `opcode`; raises Malformed for a hole in the table."""
    op = OPS.get(opcode)
    if op is None:
        raise Malformed("illegal opcode %02x" % opcode)
    if op.__class__ is tuple:
        op = OPS[opcode] = Op(*op)
    return op


def define(source, **names):
    """The function `handler` that `source` defines, over the numerics and `names`."""
    namespace = dict(globals(), **names)
    exec(source, namespace)
    return namespace["handler"]


def numeric_handler(op):
    """The handler of a unary or binary instruction, from the table's expression."""
    meaning, prologue = op.meaning, ""
    for operand, place in (("x", "R[a]"), ("y", "R[b]")):
        name = "{%s}" % operand
        if meaning.count(name) > 1:
            prologue += "    %s = %s\n" % (operand, place)
            place = operand
        meaning = meaning.replace(name, place)
    return define("def handler(R, d, a, b):\n%s    R[d] = %s\n" % (prologue, meaning))


def memory_handler(op, memory):
    """The handler of a load (d result, a address, b offset) or a store (d minus the offset,
    a address, b value) on `memory`. The view is as long as the memory, so that the
    struct module refuses what lies outside; execute() makes that a trap."""
    verb, letter, *mask = op.meaning.split()
    mask = " ".join(mask)
    access = struct.Struct("<" + letter)
    if letter == "f":
        source = ("def handler(R, d, a, b):\n    R[d] = load_f32(memory.view, R[a] + b)\n" if verb == "load"
                  else "def handler(R, d, a, b):\n    store_f32(memory.view, R[a] - d, R[b])\n")
    elif verb == "load":
        source = "def handler(R, d, a, b):\n    R[d] = access(memory.view, R[a] + b)[0] %s\n" % mask
    else:
        source = "def handler(R, d, a, b):\n    access(memory.view, R[a] - d, R[b] %s)\n" % mask
    return define(source, memory=memory, access=access.unpack_from if verb == "load" else access.pack_into)


def load_f32(view, address):
    """f32.load: by way of the bits if it is a NaN."""
    value = struct.unpack_from("<f", view, address)[0]
    return value if value == value else f32_from_bits(struct.unpack_from("<I", view, address)[0])


def store_f32(view, address, value):
    """f32.store: by way of the bits if it is a NaN."""
    struct.pack_into("<I", view, address, f32_bits(value))


def out_of_bounds(what):
    return Trap("out of bounds %s access" % what)


def do_move(R, d, a, b):
    R[d] = R[a]


def do_select(R, d, a, b):
    R[d] = R[a] if R[b[1]] else R[b[0]]


def do_unreachable(R, d, a, b):
    raise Trap("unreachable")


def do_global_get(R, d, a, b):
    R[d] = a.value


def do_global_set(R, d, a, b):
    a.value = R[b]


def do_ref_is_null(R, d, a, b):
    R[d] = R[a] is None


def do_ref_func(R, d, a, b):
    R[d] = a.functions[b]


def do_table_get(R, d, a, b):
    try:
        R[d] = a.elements[R[b]]
    except IndexError:
        raise out_of_bounds("table") from None


def do_table_set(R, d, a, b):
    try:
        a.elements[R[b[0]]] = R[b[1]]
    except IndexError:
        raise out_of_bounds("table") from None


def do_table_size(R, d, a, b):
    R[d] = len(a.elements)


def do_table_grow(R, d, a, b):
    R[d] = a.grow(R[b[1]], R[b[0]]) & MAX_U32


def do_table_fill(R, d, a, b):
    start, value, count = (R[slot] for slot in b)
    if start + count > len(a.elements):
        raise out_of_bounds("table")
    a.elements[start:start + count] = [value] * count


def do_table_copy(R, d, a, b):
    target, source = a
    to, start, count = (R[slot] for slot in b)
    copy_elements(target, to, source.elements, start, count)


def do_table_init(R, d, a, b):
    table, segments, index = a
    to, start, count = (R[slot] for slot in b)
    copy_elements(table, to, segments[index], start, count)


def copy_elements(table, to, source, start, count):
    """table.copy and table.init: bounds first, then all or nothing."""
    if start + count > len(source) or to + count > len(table.elements):
        raise out_of_bounds("table")
    table.elements[to:to + count] = source[start:start + count]


def do_drop_segment(R, d, a, b):
    a[b] = ()


def do_memory_size(R, d, a, b):
    R[d] = a.pages


def do_memory_grow(R, d, a, b):
    R[d] = a.grow(R[b]) & MAX_U32


def do_memory_fill(R, d, a, b):
    start, value, count = (R[slot] for slot in b)
    view = a.view
    if start + count > len(view):
        raise out_of_bounds("memory")
    piece = bytes((value & 0xFF,)) * min(count, 1 << 20)    # a fill of 4 GiB needs no 4 GiB
    for position in range(start, start + count, 1 << 20):
        size = min(1 << 20, start + count - position)
        view[position:position + size] = piece[:size]


def do_memory_copy(R, d, a, b):
    target, source = a
    to, start, count = (R[slot] for slot in b)
    copy_bytes(target.view, to, source.view, start, count)


def do_memory_init(R, d, a, b):
    memory, segments, index = a
    to, start, count = (R[slot] for slot in b)
    copy_bytes(memory.view, to, segments[index] or b"", start, count)


def copy_bytes(view, to, source, start, count):
    """memory.copy and memory.init: bounds first, then all or nothing."""
    if start + count > len(source) or to + count > len(view):
        raise out_of_bounds("memory")
    view[to:to + count] = source[start:start + count]


# === 8. Modules ===============================================================
#
# The decoder of everything but function bodies (section 5.5). In: the bytes of
# a module, or a mapping of its file. Out: a Module, whose sections are lists of
# plain values. Bodies stay bytes until they are called first: the specification
# allows it (appendix A.2), and a program that prints a line executes one function
# in six. What can be checked without bodies is checked here.

EXTERN_KINDS = ("func", "table", "memory", "global")


class Import:
    """import ::= module name, item name, kind of EXTERN_KINDS and its type: an index
    of Module.types for a function, else a TableType, Limits or GlobalType."""

    __slots__ = ("module", "name", "kind", "type")

    def __init__(self, module, name, kind, type):
        self.module, self.name, self.kind, self.type = module, name, kind, type


class Segment:
    """An element or data segment: `mode` is "active", "passive" or "declarative";
    `index` the table or memory and `offset` the expression of an active one;
    `items` a list of expressions, or the bytes."""

    __slots__ = ("mode", "index", "offset", "type", "items")

    def __init__(self, mode, index, offset, type, items):
        self.mode, self.index, self.offset, self.type, self.items = mode, index, offset, type, items


class Body:
    """A function's code: `data[start:end]`, locals first; or a constant expression."""

    __slots__ = ("start", "end")

    def __init__(self, start, end):
        self.start, self.end = start, end


class Module:
    """A decoded module.

    `data` is bytes or any indexable buffer. Raises Malformed or Invalid. Function
    bodies are decoded and validated when they are first called, or all at once
    by `validate()`."""

    def __init__(self, data):
        self.data = data
        self.types = []
        self.imports = []
        self.functions = []         # type index of every function, imports first
        self.tables = []            # TableType of every table, imports first
        self.memories = []          # Limits
        self.globals = []           # GlobalType
        self.global_inits = []      # Body of every global that is not imported
        self.exports = {}           # name -> (kind, index)
        self.start = None
        self.elements = []
        self.data_count = None
        self.bodies = []            # Body of every function that is not imported
        self.datas = []
        self.customs = []           # (name, start, end) of every custom section
        self.declared = set()       # functions that ref.func may name in bodies
        ModuleDecoder(self).decode()
        check_module(self)

    @property
    def imported_functions(self):
        """How many functions are imported: the index of the first own one."""
        return len(self.functions) - len(self.bodies)

    def function_type(self, index):
        """The FunctionType of function `index`."""
        return self.types[self.functions[index]]

    def validate(self):
        """Validates every function body; raises Malformed or Invalid."""
        validate_bodies(self)

    def function_names(self):
        """{function index: name} of the name section's subsection 1, or {} where
        there is none or it is damaged: names are a courtesy, never an error."""
        names = {}
        for name, start, end in self.customs:
            if name != "name":
                continue
            reader = Reader(self.data, start, end)
            try:
                while reader.position < reader.end:
                    kind, size = reader.byte(), reader.unsigned()
                    stop = reader.position + size
                    if kind == 1:
                        for _ in range(reader.unsigned()):
                            index = reader.unsigned()
                            names[index] = reader.name()
                    reader.position = stop
            except Malformed:
                pass
        return names


class ModuleDecoder(Reader):
    """Reads the sections into `module`; one method for each nonterminal of
    section 5.5."""

    __slots__ = ("module",)

    def __init__(self, module):
        super().__init__(module.data)
        self.module = module

    def decode(self):
        """module ::= magic version section*"""
        if self.end < 4 or bytes(self.data[0:4]) != b"\0asm":
            raise Malformed("magic header not detected" if self.end >= 4 else "unexpected end")
        if self.end < 8 or bytes(self.data[4:8]) != b"\1\0\0\0":
            raise Malformed("unknown binary version" if self.end >= 8 else "unexpected end")
        self.position = 8
        whole, previous = self.end, 0
        while self.position < whole:
            section = self.byte()
            size = self.unsigned()
            stop = self.position + size
            if stop > whole:
                raise Malformed("length out of bounds" if section <= 12 else "malformed section id")
            self.end = stop
            if section:
                if section not in SECTION_ORDER:
                    raise Malformed("malformed section id")
                if SECTION_ORDER.index(section) < previous:
                    raise Malformed("unexpected content after last section")
                previous = SECTION_ORDER.index(section) + 1
                SECTION_READERS[section](self)
                if self.position != stop:
                    raise Malformed("section size mismatch")
            else:
                name = self.name()
                self.module.customs.append((name, self.position, stop))
                self.position = stop
            self.end = whole
        module = self.module
        if len(module.functions) - self.count_imports("func") != len(module.bodies):
            raise Malformed("function and code section have inconsistent lengths")
        if module.data_count not in (None, len(module.datas)):
            raise Malformed("data count and data section have inconsistent lengths")

    def count_imports(self, kind):
        return sum(i.kind == kind for i in self.module.imports)

    def value_type(self):
        """valtype ::= numtype | vectype | reftype"""
        type = self.byte()
        if type not in TYPE_NAMES or type == UNKNOWN:
            raise Malformed("malformed value type")
        return type

    def reference_type(self):
        """reftype ::= 0x70 | 0x6F"""
        type = self.byte()
        if type not in REFERENCE_TYPES:
            raise Malformed("malformed reference type")
        return type

    def limits(self, bound):
        """limits ::= 0x00 n | 0x01 n m"""
        flag = self.byte()
        if flag > 1:
            raise Malformed("integer too large" if flag & 0x80 == 0 else "integer representation too long")
        limits = Limits(self.unsigned(), self.unsigned() if flag else None)
        if limits.minimum > bound or limits.maximum is not None and limits.maximum > bound:
            raise Invalid("memory size must be at most 65536 pages (4GiB)")
        if limits.maximum is not None and limits.minimum > limits.maximum:
            raise Invalid("size minimum must not be greater than maximum")
        return limits

    def table_type(self):
        """tabletype ::= reftype limits"""
        return TableType(self.reference_type(), self.limits(MAX_U32))

    def memory_type(self):
        """memtype ::= limits"""
        return self.limits(MAX_PAGES)

    def global_type(self):
        """globaltype ::= valtype mut"""
        value, mutable = self.value_type(), self.byte()
        if mutable > 1:
            raise Malformed("malformed mutability")
        return GlobalType(value, bool(mutable))

    def function_type(self):
        """functype ::= 0x60 resulttype resulttype"""
        if self.byte() != 0x60:
            raise Malformed("integer representation too long")
        return FunctionType(self.vector(self.value_type), self.vector(self.value_type))

    def type_section(self):
        """typesec ::= vec(functype)"""
        self.module.types = self.vector(self.function_type)

    def import_section(self):
        """importsec ::= vec(name name importdesc)"""
        spaces = self.spaces()
        for _ in range(self.unsigned()):
            module, name, kind = self.name(), self.name(), self.byte()
            if kind > 3:
                raise Malformed("malformed import kind")
            type = (self.unsigned, self.table_type, self.memory_type, self.global_type)[kind]()
            self.module.imports.append(Import(module, name, EXTERN_KINDS[kind], type))
            spaces[kind].append(type)

    def spaces(self):
        """The four index spaces, in the order of EXTERN_KINDS."""
        module = self.module
        return module.functions, module.tables, module.memories, module.globals

    def function_section(self):
        """funcsec ::= vec(typeidx)"""
        self.module.functions += self.vector(self.unsigned)

    def table_section(self):
        """tablesec ::= vec(tabletype)"""
        self.module.tables += self.vector(self.table_type)

    def memory_section(self):
        """memsec ::= vec(memtype)"""
        self.module.memories += self.vector(self.memory_type)

    def global_section(self):
        """globalsec ::= vec(globaltype expr)"""
        for _ in range(self.unsigned()):
            self.module.globals.append(self.global_type())
            self.module.global_inits.append(self.expression())

    def export_section(self):
        """exportsec ::= vec(name exportdesc)"""
        for _ in range(self.unsigned()):
            name, kind, index = self.name(), self.byte(), self.unsigned()
            if kind > 3:
                raise Malformed("malformed export kind")
            if name in self.module.exports:
                raise Invalid("duplicate export name")
            self.module.exports[name] = EXTERN_KINDS[kind], index

    def start_section(self):
        """startsec ::= funcidx"""
        self.module.start = self.unsigned()

    def element_section(self):
        """elemsec ::= vec(elem); bits of the flag: 0 not active, 1 explicit index or
        declarative, 2 expressions instead of function indices"""
        for _ in range(self.unsigned()):
            flag = self.unsigned()
            if flag > 7:
                raise Malformed("malformed elements segment kind")
            mode, index, offset, type = "active", 0, None, FUNCREF
            if flag & 1:
                mode = "declarative" if flag & 2 else "passive"
            else:
                index = self.unsigned() if flag & 2 else 0
                offset = self.expression()
            if flag & 3:
                if flag & 4:
                    type = self.reference_type()
                elif self.byte() != 0:
                    raise Malformed("malformed element kind")
            items = self.vector(self.expression if flag & 4 else self.unsigned)
            self.module.elements.append(Segment(mode, index, offset, type, items))

    def data_count_section(self):
        """datacountsec ::= u32"""
        self.module.data_count = self.unsigned()

    def code_section(self):
        """codesec ::= vec(size func)"""
        bodies = self.module.bodies
        for _ in range(self.unsigned()):
            size = self.unsigned()
            start = self.position
            self.position = start + size
            if self.position > self.end:
                raise Malformed("unexpected end")
            bodies.append(Body(start, self.position))

    def data_section(self):
        """datasec ::= vec(data)"""
        for _ in range(self.unsigned()):
            flag = self.unsigned()
            if flag > 2:
                raise Malformed("malformed data segment kind")
            index = self.unsigned() if flag == 2 else 0
            offset = None if flag == 1 else self.expression()
            mode = "passive" if flag == 1 else "active"
            self.module.datas.append(Segment(mode, index, offset, None, self.take(self.unsigned())))

    def expression(self):
        """expr ::= instr* 0x0B, skipped over: constant expressions have no blocks, so
        the first `end` that is not an immediate ends it."""
        start = self.position
        while True:
            opcode = self.byte()
            if opcode == 0x0B:
                return Body(start, self.position)
            if opcode in (0x41, 0x42):
                self.signed(64 if opcode == 0x42 else 32)
            elif opcode in (0x43, 0x44):
                self.take(4 if opcode == 0x43 else 8)
            elif opcode in (0x23, 0xD2):
                index = self.unsigned()
                if opcode == 0xD2:
                    self.module.declared.add(index)
            elif opcode == 0xD0:
                self.reference_type()
            elif opcode not in OPS and opcode not in PREFIX_BYTES:
                raise Malformed("illegal opcode %02x" % opcode)
            else:
                raise Invalid("constant expression required")


SECTION_ORDER = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 10, 11)
SECTION_NAMES = ("custom", "type", "import", "function", "table", "memory", "global",
                 "export", "start", "element", "code", "data", "data count")
SECTION_READERS = {
    1: ModuleDecoder.type_section, 2: ModuleDecoder.import_section,
    3: ModuleDecoder.function_section, 4: ModuleDecoder.table_section,
    5: ModuleDecoder.memory_section, 6: ModuleDecoder.global_section,
    7: ModuleDecoder.export_section, 8: ModuleDecoder.start_section,
    9: ModuleDecoder.element_section, 10: ModuleDecoder.code_section,
    11: ModuleDecoder.data_section, 12: ModuleDecoder.data_count_section,
}


def check_module(module):
    """Validates all but function bodies (section 3.4); raises Invalid."""
    for index in module.functions:
        check_index("type", index, module.types)
    if len(module.memories) > 1:
        raise Invalid("multiple memories")
    imported = sum(i.kind == "global" for i in module.imports)
    for type, body in zip(module.globals[imported:], module.global_inits):
        check_constant(module, body, type.value)
    for kind, index in module.exports.values():
        space = (module.functions, module.tables, module.memories, module.globals)[EXTERN_KINDS.index(kind)]
        check_index({"func": "function"}.get(kind, kind), index, space)
        if kind == "func":
            module.declared.add(index)
    if module.start is not None:
        check_index("function", module.start, module.functions)
        if module.function_type(module.start) != FunctionType((), ()):
            raise Invalid("start function")
    for segment in module.elements:
        check_element(module, segment)
    for segment in module.datas:
        if segment.mode == "active":
            check_index("memory", segment.index, module.memories)
            check_constant(module, segment.offset, I32)


def check_element(module, segment):
    """elem: its table, its offset and each of its items."""
    if segment.mode == "active":
        check_index("table", segment.index, module.tables)
        if module.tables[segment.index].element != segment.type:
            raise Invalid("type mismatch")
        check_constant(module, segment.offset, I32)
    for item in segment.items:
        if isinstance(item, int):
            check_index("function", item, module.functions)
            module.declared.add(item)
        else:
            check_constant(module, item, segment.type)


def check_index(kind, index, space):
    """An index must lie in its space."""
    if index >= len(space):
        raise Invalid("unknown %s %d" % (kind, index))


def check_constant(module, body, type):
    """A constant expression (section 3.3.10) yields exactly one `type`."""
    types = []
    for opcode, immediate in constant_instructions(module, body):
        if opcode == 0x23:
            imported = sum(i.kind == "global" for i in module.imports)
            if immediate >= imported:
                raise Invalid("unknown global %d" % immediate)
            if module.globals[immediate].mutable:
                raise Invalid("constant expression required")
            types.append(module.globals[immediate].value)
        elif opcode == 0xD2:
            check_index("function", immediate, module.functions)
            types.append(FUNCREF)
        else:
            types.append(immediate if opcode == 0xD0 else NUMBER_TYPES[opcode - 0x41])
    if types != [type]:
        raise Invalid("type mismatch")


def constant_instructions(module, body):
    """Yields (opcode, immediate) of a constant expression that was read before."""
    reader = Reader(module.data, body.start, body.end - 1)
    while reader.position < reader.end:
        opcode = reader.byte()
        if opcode == 0x41:
            yield opcode, reader.signed(32) & MAX_U32
        elif opcode == 0x42:
            yield opcode, reader.signed(64) & MAX_U64
        elif opcode == 0x43:
            yield opcode, f32_from_bits(unpack_u32(reader.take(4))[0])
        elif opcode == 0x44:
            yield opcode, unpack_f64(reader.take(8))[0]
        elif opcode == 0xD0:
            yield opcode, reader.byte()
        else:
            yield opcode, reader.unsigned()


# === 10. Store and instances ==================================================
#
# The run-time structure of section 4.2. A linear memory is one anonymous mapping,
# reserved once as large as the memory may become: its address never moves, pages
# that are never touched cost nothing, and growing changes a number.

MAP_NORESERVE = 0x4000              # mmap(2); the mmap module names it from 3.13 on
SMALLEST_RESERVATION = 1 << 24


class Memory:
    """A linear memory. `pages` is its size, `view` a memoryview of just that many
    bytes; whoever keeps a view over a guest call must fetch it anew."""

    __slots__ = ("pages", "maximum", "capacity", "mapping", "view")

    def __init__(self, minimum=0, maximum=None):
        self.pages = minimum
        self.maximum = maximum
        self.mapping = self.reserve(minimum, MAX_PAGES if maximum is None else min(maximum, MAX_PAGES))
        self.capacity = len(self.mapping) // PAGE_BYTES
        self.view = memoryview(self.mapping)[:minimum * PAGE_BYTES]

    @staticmethod
    def reserve(minimum, maximum):
        """The mapping; smaller than `maximum` pages where address space is short (a
        32-bit board, vm.overcommit_memory=2)."""
        size = maximum * PAGE_BYTES or PAGE_BYTES
        while True:
            try:
                return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
            except (OSError, OverflowError, ValueError):
                if size <= max(minimum * PAGE_BYTES, SMALLEST_RESERVATION):
                    raise Exhaustion("cannot reserve %d pages of memory" % minimum) from None
                size = max(size // 2, minimum * PAGE_BYTES, PAGE_BYTES)

    def grow(self, pages):
        """memory.grow: the old size in pages, or -1."""
        old = self.pages
        limit = self.capacity if self.maximum is None else min(self.capacity, self.maximum)
        if old + pages > limit:
            return -1
        self.pages = old + pages
        self.view = memoryview(self.mapping)[:self.pages * PAGE_BYTES]
        return old


class Table:
    """A table of references; null is None."""

    __slots__ = ("element", "elements", "maximum")

    def __init__(self, element, minimum=0, maximum=None, value=None):
        if minimum > MAX_TABLE_ELEMENTS:
            raise Exhaustion("table of %d elements: at most %d" % (minimum, MAX_TABLE_ELEMENTS))
        self.element = element
        self.elements = [value] * minimum
        self.maximum = maximum

    def grow(self, count, value=None):
        """table.grow: the old size, or -1."""
        old = len(self.elements)
        limit = MAX_TABLE_ELEMENTS if self.maximum is None else min(self.maximum, MAX_TABLE_ELEMENTS)
        if old + count > limit:
            return -1
        self.elements.extend([value] * count)
        return old


class Global:
    """A global variable; `value` is in the interpreter's form (integers unsigned)."""

    __slots__ = ("type", "value")

    def __init__(self, type, value):
        self.type = type
        self.value = value


class HostFunction:
    """A function of the embedder: `call(*values)` takes values in the interpreter's
    form and returns a sequence of them."""

    __slots__ = ("type", "call", "name")
    host = True

    def __init__(self, type, call, name=""):
        self.type, self.call, self.name = type, call, name

    def __call__(self, *arguments):
        return from_results(self.type, self.call(*to_arguments(self.type, arguments)))


class Function:
    """A function of a module instance. `entry` is its first block and `template`
    its frame beyond the arguments, both None until it is first called."""

    __slots__ = ("type", "instance", "body", "index", "entry", "template")
    host = False

    def __init__(self, type, instance, body, index):
        self.type, self.instance, self.body, self.index = type, instance, body, index
        self.entry = self.template = None

    @property
    def name(self):
        return self.instance.module.function_names().get(self.index, "func[%d]" % self.index)

    def __call__(self, *arguments):
        return from_results(self.type, execute(self, to_arguments(self.type, arguments)))


def to_arguments(type, values):
    """Python values as a call's arguments; raises TypeError."""
    if len(values) != len(type.params):
        raise TypeError("%d arguments, the function takes %s" % (len(values), type))
    return [to_value(t, value) for t, value in zip(type.params, values)]


def to_value(type, value):
    """A Python value in the interpreter's form, converted as the JavaScript API's
    ToWebAssemblyValue does: integers wrap."""
    if type in (I32, I64):
        if not isinstance(value, int):
            raise TypeError("%r is not an integer" % (value,))
        return int(value) & (MAX_U32 if type == I32 else MAX_U64)
    if type in (F32, F64):
        if not isinstance(value, (int, float)):
            raise TypeError("%r is not a number" % (value,))
        return to_f32(float(value)) if type == F32 and value == value else float(value)
    if type == FUNCREF and not isinstance(value, (Function, HostFunction, NoneType)):
        raise TypeError("%r is not a WebAssembly function" % (value,))
    return value


NoneType = None.__class__


def to_python(type, value):
    """A value of the interpreter as a Python value: integers signed."""
    return signed(int(value), 32 if type == I32 else 64) if type in (I32, I64) else value


def from_results(type, values):
    """None, a value, or a tuple of values."""
    values = tuple(to_python(t, value) for t, value in zip(type.results, values))
    return values[0] if len(values) == 1 else values or None


class Instance:
    """A module instance. `imports` is {module: {name: callable or extern}}; `exports`
    {name: Function, Table, Memory or Global}. Raises Unlinkable, and whatever its
    start function raises."""

    __slots__ = ("module", "functions", "tables", "memories", "globals", "elements", "datas", "exports", "handlers", "__weakref__")

    def __init__(self, module, imports=None):
        self.module = module
        self.handlers = {}          # (opcode, memory index) -> handler of a memory access
        spaces = {"func": [], "table": [], "memory": [], "global": []}
        for item in module.imports:
            spaces[item.kind].append(resolve(module, item, imports or {}))
        self.functions = functions = spaces["func"]
        for body in module.bodies:
            functions.append(Function(module.function_type(len(functions)), self, body, len(functions)))
        self.tables, self.memories, self.globals = spaces["table"], spaces["memory"], spaces["global"]
        self.globals += [Global(type, self.constant(body)) for type, body in
                         zip(module.globals[len(self.globals):], module.global_inits)]
        self.tables += [Table(t.element, t.limits.minimum, t.limits.maximum) for t in module.tables[len(self.tables):]]
        self.memories += [Memory(m.minimum, m.maximum) for m in module.memories[len(self.memories):]]
        self.exports = {name: spaces[kind][index] for name, (kind, index) in module.exports.items()}
        self.elements = [[functions[item] if isinstance(item, int) else self.constant(item) for item in s.items]
                         for s in module.elements]
        self.datas = [s.items for s in module.datas]
        self.initialize()

    def initialize(self):
        """Copies the active segments in order, then calls the start function (4.5.4)."""
        for index, segment in enumerate(self.module.elements):
            if segment.mode == "active":
                source = self.elements[index]
                copy_elements(self.tables[segment.index], self.constant(segment.offset), source, 0, len(source))
            if segment.mode != "passive":
                self.elements[index] = ()
        for index, segment in enumerate(self.module.datas):
            if segment.mode == "active":
                copy_bytes(self.memories[segment.index].view, self.constant(segment.offset), segment.items, 0, len(segment.items))
                self.datas[index] = ()
        if self.module.start is not None:
            execute_any(self.functions[self.module.start], [])

    def constant(self, body):
        """The value of a constant expression."""
        for opcode, immediate in constant_instructions(self.module, body):
            if opcode == 0x23:
                return self.globals[immediate].value
            if opcode == 0xD2:
                return self.functions[immediate]
            return None if opcode == 0xD0 else immediate

    def memory_handler(self, op, index):
        """The handler of a memory access on memory `index`."""
        handler = self.handlers.get((op.opcode, index))
        if handler is None:
            handler = self.handlers[op.opcode, index] = memory_handler(op, self.memories[index])
        return handler


def resolve(module, item, imports):
    """The extern that satisfies an Import, its type matched (section 4.5.3)."""
    where = "%s.%s" % (item.module, item.name)
    try:
        extern = imports[item.module][item.name]
    except KeyError:
        raise Unlinkable("unknown import %s" % where) from None
    if item.kind == "func":
        type = module.types[item.type]
        if not isinstance(extern, (Function, HostFunction)) and callable(extern):
            return python_function(type, extern, where)
        fits = isinstance(extern, (Function, HostFunction)) and extern.type == type
    elif item.kind == "table":
        fits = (isinstance(extern, Table) and extern.element == item.type.element
                and item.type.limits.admits(len(extern.elements), extern.maximum))
    elif item.kind == "memory":
        fits = isinstance(extern, Memory) and item.type.admits(extern.pages, extern.maximum)
    else:
        fits = (isinstance(extern, Global) and extern.type.value == item.type.value
                and extern.type.mutable == item.type.mutable)
    if not fits:
        raise Unlinkable("incompatible import type for %s" % where)
    return extern


def python_function(type, call, name):
    """A HostFunction around a Python callable on Python values; it returns None, a
    value, or a sequence of values, as its type has results."""
    def adapted(*values):
        result = call(*(to_python(t, v) for t, v in zip(type.params, values)))
        if len(type.results) == 1:
            return (to_value(type.results[0], result),)
        results = tuple(result or ())
        if len(results) != len(type.results):
            raise TypeError("%s returned %d values for %s" % (name, len(results), type))
        return [to_value(t, v) for t, v in zip(type.results, results)]
    return HostFunction(type, adapted, name)


# === 11. Validation and translation ===========================================
#
# One pass over a function body, made when the function is first called: it decodes
# each instruction, validates it by the algorithm of appendix A.3 of the specification,
# and translates it.
#
# Validation knows the height of the operand stack at every instruction, so the
# stack itself can disappear. A frame R is a list:
#
#     R = [ parameters | locals | one slot for each stack height | constants ]
#
# with constants addressed from the end (R[-1], R[-2], …). While translating, the
# operand stack holds the slot where each operand is: `local.get 3` and `i32.const 7`
# emit nothing and push a slot that exists already, and `local.set` often only
# redirects the result of the instruction before it. Three of five instructions
# vanish this way.
#
# What is left is a graph of basic blocks. A block is a list
#
#     [ body, kind, x, y, z ]     body: [(handler, d, a, b), …]
#
# whose kind says how it ends:
#
#     BR         go to x                       BR_TABLE   go to x[min(R[y], z)]
#     BR_IF      go to x if R[y] else z        RETURN     with the values R[i], i in y
#     CALL       x = callee, y = argument slots, z = (next block, first result's slot)
#     CALL_INDIRECT   x = (table, type, slot of the index), y and z as for CALL
#
# At the entry and the end of every construct all operands lie in the slots of their
# own heights, so that paths can meet. A branch that has to move values first goes
# by way of a block of its own.

BR, BR_IF, BR_TABLE, RETURN, CALL, CALL_INDIRECT = range(6)


class Control:
    """A control frame of appendix A.3. `target` is the block that a branch to the
    label goes to, `next` the one after `end`, `other` the else branch of an if."""

    __slots__ = ("opcode", "params", "results", "height", "unreachable", "target", "next", "other")

    def __init__(self, opcode, params, results, height):
        self.opcode, self.params, self.results, self.height = opcode, params, results, height
        self.unreachable = False
        self.target = self.next = new_block()
        self.other = None

    @property
    def label_types(self):
        """The types that a branch to the label carries."""
        return self.params if self.opcode == 0x03 else self.results


def new_block():
    return [[], None, None, None, None]


class Translator:
    """Translates one function of an instance: `run()` sets its entry and template.
    Raises Malformed or Invalid."""

    __slots__ = ("function", "instance", "module", "reader", "locals", "types", "slots",
                 "controls", "block", "base", "deepest", "constants")

    def __init__(self, function):
        self.function = function
        self.instance = function.instance
        self.module = self.instance.module
        body = function.body
        data = bytes(self.module.data[body.start:body.end])
        self.reader = Reader(data)
        self.locals = list(function.type.params)
        self.read_locals()
        self.base = len(self.locals)
        self.types = []             # the operand stack's types …
        self.slots = []             # … and where the operands are
        self.deepest = 0
        self.constants = {}         # key -> (slot, value)
        self.block = new_block()

    def read_locals(self):
        """locals ::= vec(n valtype); counted before they are made."""
        decoder = ModuleDecoder.__new__(ModuleDecoder)
        decoder.data, decoder.position, decoder.end = self.reader.data, 0, self.reader.end
        total = len(self.locals)
        for _ in range(decoder.unsigned()):
            count = decoder.unsigned()
            total += count
            if total > MAX_LOCALS:
                raise Malformed("too many locals")
            self.locals += [decoder.value_type()] * count
        self.reader.position = decoder.position

    def run(self):
        """Translates the body and completes the Function."""
        function = self.function
        entry = self.block
        results = list(function.type.results)
        self.controls = [Control(0x02, [], results, 0)]
        self.instructions()
        if self.reader.position != self.reader.end:
            raise Malformed("END opcode expected")
        zeros = [ZERO.get(t) for t in self.locals[len(function.type.params):]]
        constants = [value for _, value in self.constants.values()]
        function.template = zeros + [None] * self.deepest + constants[::-1]
        function.entry = entry

    def instructions(self):
        """expr ::= instr* 0x0B: the loop over the body. The regular shapes are here, all
        else has a method named after the instruction."""
        reader = self.reader
        data, end = reader.data, reader.end
        types, slots, locals, base, controls = self.types, self.slots, self.locals, self.base, self.controls
        while controls:
            position = reader.position
            if position >= end:
                raise Malformed("unexpected end of section or function" if controls else "unexpected end")
            opcode = data[position]
            reader.position = position + 1
            if opcode == 0x20:                                          # local.get
                index = reader.unsigned()
                if index >= base:
                    raise Invalid("unknown local %d" % index)
                types.append(locals[index])
                slots.append(index)
                continue
            if opcode in PREFIX_BYTES:
                opcode = opcode << 8 | reader.unsigned()
            op = OPS.get(opcode)
            if op.__class__ is not Op:
                op = operation(opcode)
            shape = op.shape
            if shape == IRREGULAR:
                getattr(self, op.name.replace(".", "_") + "_")(op)
                continue
            offset = self.memarg(op) if shape >= LOAD else 0
            params = op.params
            count = len(params)
            if types[-count:] == params and len(types) - count >= controls[-1].height:
                del types[-count:]
                b = slots.pop()
                a = slots.pop() if count == 2 else b
            else:
                b = self.pop(params[-1])
                a = self.pop(params[0]) if count == 2 else b
            d = base + len(slots)
            if shape == STORE:
                self.block[0].append((self.instance.memory_handler(op, 0), -offset, a, b))
                continue
            if shape == LOAD:
                self.block[0].append((self.instance.memory_handler(op, 0), d, a, offset))
            else:
                handler = op.handler
                if handler is None:
                    handler = op.handler = numeric_handler(op)
                self.block[0].append((handler, d, a, b))
            types.append(op.results[0])
            slots.append(d)
            if len(slots) > self.deepest:
                self.deepest = len(slots)

    # -- the operand stack --

    def push(self, type):
        """Pushes an operand into the slot of its own height, and returns the slot."""
        slot = self.base + len(self.slots)
        self.types.append(type)
        self.slots.append(slot)
        if len(self.slots) > self.deepest:
            self.deepest = len(self.slots)
        return slot

    def pop(self, expected=UNKNOWN):
        """Pops an operand of the expected type (UNKNOWN = any); returns its slot."""
        control = self.controls[-1]
        if len(self.types) == control.height:
            if control.unreachable:
                return self.base + len(self.slots)
            raise Invalid("type mismatch")
        actual = self.types.pop()
        if actual != expected and UNKNOWN not in (actual, expected):
            raise Invalid("type mismatch")
        return self.slots.pop()

    def pop_typed(self):
        """Pops an operand of any type; returns (type, slot)."""
        control = self.controls[-1]
        if len(self.types) == control.height and control.unreachable:
            return UNKNOWN, self.pop()
        type = self.types[-1] if self.types else UNKNOWN
        return type, self.pop(type)

    def pop_all(self, types):
        """Pops operands of `types`, last first; returns their slots in order."""
        return [self.pop(t) for t in reversed(types)][::-1]

    def push_all(self, types):
        """Pushes operands of `types`."""
        for type in types:
            self.push(type)

    def constant(self, type, key, value):
        """Pushes a constant; equal ones share a slot."""
        known = self.constants.get(key)
        if known is None:
            known = self.constants[key] = -1 - len(self.constants), value
        self.types.append(type)
        self.slots.append(known[0])
        if len(self.slots) > self.deepest:
            self.deepest = len(self.slots)

    def emit(self, handler, d, a, b):
        self.block[0].append((handler, d, a, b))

    def settle(self, start=0):
        """Moves the operands from height `start` on into the slots of their own heights."""
        slots = self.slots
        for height in range(start, len(slots)):
            if slots[height] != self.base + height:
                self.emit(do_move, self.base + height, slots[height], 0)
                slots[height] = self.base + height

    # -- control --

    def finish(self, kind, x=None, y=None, z=None):
        """Ends the current block."""
        self.block[1:] = kind, x, y, z

    def block_type(self):
        """blocktype ::= 0x40 | valtype | s33 type index; returns (params, results)."""
        reader = self.reader
        if reader.position >= reader.end:
            raise Malformed("unexpected end")
        byte = reader.data[reader.position]
        if byte == 0x40:
            reader.position += 1
            return [], []
        if byte in TYPE_NAMES and byte != UNKNOWN:
            reader.position += 1
            return [], [byte]
        index = reader.signed(33)
        if index < 0:
            raise Malformed("malformed block type")
        check_index("type", index, self.module.types)
        type = self.module.types[index]
        return list(type.params), list(type.results)

    def enter(self, opcode, params, results):
        """Opens a construct whose params were popped."""
        control = Control(opcode, params, results, len(self.types))
        self.controls.append(control)
        self.push_all(params)
        return control

    def block_(self, op):
        params, results = self.block_type()
        self.settle()
        self.pop_all(params)
        self.enter(0x02, params, results)

    def loop_(self, op):
        params, results = self.block_type()
        self.settle()
        self.pop_all(params)
        control = self.enter(0x03, params, results)
        control.target = head = new_block()
        self.finish(BR, head)
        self.block = head

    def if_(self, op):
        params, results = self.block_type()
        condition = self.pop(I32)
        self.settle()           # the condition lies above all that is settled, or elsewhere
        self.pop_all(params)
        control = self.enter(0x04, params, results)
        then, control.other = new_block(), new_block()
        self.finish(BR_IF, then, condition, control.other)
        self.block = then

    def close(self):
        """The checks at `else` and `end`; leaves the results settled and popped."""
        control = self.controls[-1]
        self.pop_results(control)
        if len(self.types) != control.height:
            raise Invalid("type mismatch")
        return control

    def pop_results(self, control):
        slots = self.pop_all(control.results)
        for height, slot in enumerate(slots, control.height):
            if slot != self.base + height:
                self.emit(do_move, self.base + height, slot, 0)
        needed = control.height + len(slots)
        if needed > self.deepest:
            self.deepest = needed

    def else_(self, op):
        control = self.close()
        if control.opcode != 0x04:
            raise Malformed("else without if")
        self.finish(BR, control.next)
        self.block = control.other
        control.opcode, control.other, control.unreachable = 0x05, None, False
        self.push_all(control.params)

    def end_(self, op):
        if len(self.controls) == 1:
            return self.end_function()
        control = self.close()
        if control.opcode == 0x04:
            if control.params != control.results:
                raise Invalid("type mismatch")
            control.other[1:] = BR, control.next, None, None
        self.finish(BR, control.next)
        self.block = control.next
        self.controls.pop()
        self.push_all(control.results)

    def end_function(self):
        """The last `end`: falls out with the results where they are; whoever branches to
        the function's label brings them to its slots."""
        control = self.controls[0]
        self.finish(RETURN, None, tuple(self.pop_all(control.results)))
        if self.types:
            raise Invalid("type mismatch")
        self.controls.pop()
        control.next[1:] = RETURN, None, tuple(range(self.base, self.base + len(control.results))), None

    def label(self, depth):
        """The control frame of label `depth`."""
        if depth >= len(self.controls):
            raise Invalid("unknown label")
        return self.controls[-1 - depth]

    def branch(self, control, slots):
        """The block to go to for a branch that carries the operands in `slots`: the
        label's own, or one that first moves them where the label expects them."""
        wanted = range(self.base + control.height, self.base + control.height + len(slots))
        moves = [(do_move, d, a, 0) for d, a in zip(wanted, slots) if d != a]
        needed = control.height + len(slots)
        if needed > self.deepest:
            self.deepest = needed
        if not moves:
            return control.target
        # Sources lie above their destinations, or are locals and constants, and come
        # in order: no move overwrites a source that is still to be read.
        return [moves, BR, control.target, None, None]

    def unreachable(self):
        """The rest of the construct cannot be reached: its operands are unknown, and
        what is emitted goes to a block that nothing leads to."""
        control = self.controls[-1]
        del self.types[control.height:], self.slots[control.height:]
        control.unreachable = True
        self.block = new_block()

    def unreachable_(self, op):
        self.emit(do_unreachable, 0, 0, 0)
        self.finish(BR, self.block)
        self.unreachable()

    def nop_(self, op):
        pass

    def br_(self, op):
        control = self.label(self.reader.unsigned())
        self.finish(BR, self.branch(control, self.pop_all(control.label_types)))
        self.unreachable()

    def br_if_(self, op):
        control = self.label(self.reader.unsigned())
        condition = self.pop(I32)
        slots = self.pop_all(control.label_types)
        following = new_block()
        self.finish(BR_IF, self.branch(control, slots), condition, following)
        self.block = following
        for type, slot in zip(control.label_types, slots):
            self.types.append(type)
            self.slots.append(slot)

    def br_table_(self, op):
        labels = self.reader.vector(self.reader.unsigned)
        default = self.label(self.reader.unsigned())
        index = self.pop(I32)
        arity = len(default.label_types)
        targets = {}
        for depth in dict.fromkeys(labels):
            control = self.label(depth)
            if len(control.label_types) != arity:
                raise Invalid("type mismatch")
            targets[depth] = self.branch(control, self.peek_all(control.label_types))
        last = self.branch(default, self.pop_all(default.label_types))
        self.finish(BR_TABLE, [targets[depth] for depth in labels] + [last], index, len(labels))
        self.unreachable()

    def peek_all(self, types):
        """The slots of operands of `types`, which stay on the stack."""
        kept_types, kept_slots = self.types[:], self.slots[:]
        slots = self.pop_all(types)
        self.types[:], self.slots[:] = kept_types, kept_slots
        return slots

    def return_(self, op):
        self.finish(RETURN, None, tuple(self.pop_all(self.controls[0].results)))
        self.unreachable()

    def call_(self, op):
        index = self.reader.unsigned()
        check_index("function", index, self.module.functions)
        function = self.instance.functions[index]
        self.call(CALL, function, function.type)

    def call_indirect_(self, op):
        type, table = self.reader.unsigned(), self.reader.unsigned()
        check_index("table", table, self.module.tables)
        check_index("type", type, self.module.types)
        if self.module.tables[table].element != FUNCREF:
            raise Invalid("type mismatch")
        type = self.module.types[type]
        index = self.pop(I32)
        self.call(CALL_INDIRECT, (self.instance.tables[table], type, index), type)

    def call(self, kind, x, type):
        """Ends the block with a call; the results go to the slots of their heights."""
        arguments = tuple(self.pop_all(type.params))
        following = new_block()
        self.finish(kind, x, arguments, (following, self.base + len(self.slots)))
        self.block = following
        self.push_all(type.results)

    # -- parametric, variable, reference instructions --

    def drop_(self, op):
        self.pop_typed()

    def select_(self, op):
        condition = self.pop(I32)
        type, second = self.pop_typed()
        other, first = self.pop_typed()
        for t in type, other:
            if t in REFERENCE_TYPES:
                raise Invalid("type mismatch")
        if type != other and UNKNOWN not in (type, other):
            raise Invalid("type mismatch")
        self.emit(do_select, self.push(type or other), first, (second, condition))

    def select_t_(self, op):
        types = self.reader.vector(self.reader.byte)
        if len(types) != 1:
            raise Invalid("invalid result arity")
        if types[0] not in TYPE_NAMES or types[0] == UNKNOWN:
            raise Malformed("malformed value type")
        condition, second, first = self.pop(I32), self.pop(types[0]), self.pop(types[0])
        self.emit(do_select, self.push(types[0]), first, (second, condition))

    def local_set_(self, op):
        index = self.reader.unsigned()
        if index >= self.base:
            raise Invalid("unknown local %d" % index)
        self.assign(index, self.pop(self.locals[index]))

    def local_tee_(self, op):
        index = self.reader.unsigned()
        if index >= self.base:
            raise Invalid("unknown local %d" % index)
        self.assign(index, self.pop(self.locals[index]))
        self.types.append(self.locals[index])
        self.slots.append(index)

    def assign(self, index, slot):
        """local := operand. Operands that are this local's old value are saved first; if
        none is, the instruction that made the operand can write the local itself. (An
        instruction without result has no d > 0, and where there is a local, slot > 0.)"""
        slots, saved = self.slots, False
        if index in slots:
            for height, other in enumerate(slots):
                if other == index:
                    slots[height] = self.base + height
                    self.emit(do_move, self.base + height, index, 0)
                    saved = True
        body = self.block[0]
        if slot >= self.base and not saved and body and body[-1][1] == slot:
            handler, _, a, b = body[-1]
            body[-1] = handler, index, a, b
        elif slot != index:
            self.emit(do_move, index, slot, 0)

    def global_get_(self, op):
        index = self.reader.unsigned()
        check_index("global", index, self.module.globals)
        self.emit(do_global_get, self.push(self.module.globals[index].value), self.instance.globals[index], 0)

    def global_set_(self, op):
        index = self.reader.unsigned()
        check_index("global", index, self.module.globals)
        type = self.module.globals[index]
        if not type.mutable:
            raise Invalid("immutable global")
        self.emit(do_global_set, None, self.instance.globals[index], self.pop(type.value))

    def ref_null_(self, op):
        type = self.reader.byte()
        if type not in REFERENCE_TYPES:
            raise Malformed("malformed reference type")
        self.constant(type, "null", None)

    def ref_is_null_(self, op):
        type, slot = self.pop_typed()
        if type not in REFERENCE_TYPES and type != UNKNOWN:
            raise Invalid("type mismatch")
        self.emit(do_ref_is_null, self.push(I32), slot, 0)

    def ref_func_(self, op):
        index = self.reader.unsigned()
        check_index("function", index, self.module.functions)
        if index not in self.module.declared:
            raise Invalid("undeclared function reference")
        self.emit(do_ref_func, self.push(FUNCREF), self.instance, index)

    # -- constants --

    def i32_const_(self, op):
        value = self.reader.signed(32) & MAX_U32
        self.constant(I32, value, value)

    def i64_const_(self, op):
        value = self.reader.signed(64) & MAX_U64
        self.constant(I64, value, value)

    def f32_const_(self, op):
        bits = bytes(self.reader.take(4))
        self.constant(F32, bits, f32_from_bits(unpack_u32(bits)[0]))

    def f64_const_(self, op):
        bits = bytes(self.reader.take(8))
        self.constant(F64, bits, unpack_f64(bits)[0])

    # -- memories and tables --

    def memarg(self, op):
        """memarg ::= align offset; returns the offset."""
        align, offset = self.reader.unsigned(), self.reader.unsigned()
        if align >= 32:
            raise Malformed("malformed memop flags")
        self.memory(0)
        if 1 << align > op.width:
            raise Invalid("alignment must not be larger than natural")
        return offset

    def memory(self, index=None):
        """Reads and checks a memory index; returns the Memory."""
        if index is None:
            index = self.reader.byte()
            if index:
                raise Malformed("zero byte expected")
        check_index("memory", index, self.module.memories)
        return self.instance.memories[index]

    def table(self):
        """Reads and checks a table index; returns (type of its elements, Table)."""
        index = self.reader.unsigned()
        check_index("table", index, self.module.tables)
        return self.module.tables[index].element, self.instance.tables[index]

    def pop_three(self, types=(I32, I32, I32)):
        return tuple(self.pop_all(types))

    def memory_size_(self, op):
        memory = self.memory()
        self.emit(do_memory_size, self.push(I32), memory, 0)

    def memory_grow_(self, op):
        memory, count = self.memory(), self.pop(I32)
        self.emit(do_memory_grow, self.push(I32), memory, count)

    def memory_fill_(self, op):
        self.emit(do_memory_fill, None, self.memory(), self.pop_three())

    def memory_copy_(self, op):
        memories = self.memory(), self.memory()
        self.emit(do_memory_copy, None, memories, self.pop_three())

    def memory_init_(self, op):
        index, memory = self.data_index(), self.memory()
        self.emit(do_memory_init, None, (memory, self.instance.datas, index), self.pop_three())

    def data_drop_(self, op):
        index = self.data_index()
        self.emit(do_drop_segment, None, self.instance.datas, index)

    def data_index(self):
        index = self.reader.unsigned()
        if self.module.data_count is None:
            raise Malformed("data count section required")
        if index >= self.module.data_count:
            raise Invalid("unknown data segment %d" % index)
        return index

    def table_get_(self, op):
        type, table = self.table()
        index = self.pop(I32)
        self.emit(do_table_get, self.push(type), table, index)

    def table_set_(self, op):
        type, table = self.table()
        value = self.pop(type)
        self.emit(do_table_set, None, table, (self.pop(I32), value))

    def table_size_(self, op):
        table = self.table()[1]
        self.emit(do_table_size, self.push(I32), table, 0)

    def table_grow_(self, op):
        type, table = self.table()
        operands = tuple(self.pop_all((type, I32)))
        self.emit(do_table_grow, self.push(I32), table, operands)

    def table_fill_(self, op):
        type, table = self.table()
        self.emit(do_table_fill, None, table, self.pop_three((I32, type, I32)))

    def table_copy_(self, op):
        (type, target), (other, source) = self.table(), self.table()
        if type != other:
            raise Invalid("type mismatch")
        self.emit(do_table_copy, None, (target, source), self.pop_three())

    def table_init_(self, op):
        index = self.element_index()
        type, table = self.table()
        if self.module.elements[index].type != type:
            raise Invalid("type mismatch")
        self.emit(do_table_init, None, (table, self.instance.elements, index), self.pop_three())

    def elem_drop_(self, op):
        self.emit(do_drop_segment, None, self.instance.elements, self.element_index())

    def element_index(self):
        index = self.reader.unsigned()
        if index >= len(self.module.elements):
            raise Invalid("unknown elem segment %d" % index)
        return index


ZERO = {I32: 0, I64: 0, F32: 0.0, F64: 0.0}


def validate_bodies(module):
    """Validates all functions of a module without instantiating it: they are
    translated for an instance of empty externs, which nobody calls."""
    shell = Instance.__new__(Instance)
    shell.module, shell.handlers = module, {}
    imported = module.imported_functions
    bodies = [None] * imported + module.bodies
    shell.functions = [Function(module.function_type(i), shell, body, i) for i, body in enumerate(bodies)]
    shell.tables = [Table(t.element) for t in module.tables]
    shell.memories = [Memory(0, 0) for _ in module.memories]
    shell.globals = [Global(t, None) for t in module.globals]
    shell.elements = [()] * len(module.elements)
    shell.datas = [()] * len(module.datas)
    for function in shell.functions[imported:]:
        Translator(function).run()


def validate(data):
    """Whether `data` is a valid module, bodies included (the JavaScript API's
    WebAssembly.validate)."""
    try:
        Module(data).validate()
    except (Malformed, Invalid):
        return False
    return True


# === 12. Interpreter ==========================================================
#
# The loop that executes blocks. Calls within WebAssembly keep their frames in a
# list here and not on Python's stack, so a deep recursion of the guest is a trap at
# MAX_FRAMES and nothing else; only a host function that calls back nests.


def execute(function, arguments):
    """Calls a Function with values in the interpreter's form; returns a list of its
    results. Raises Trap."""
    frames = []
    try:
        block = function.entry or translated(function)
        R = arguments + function.template
        while True:
            body, kind, x, y, z = block
            for handler, d, a, b in body:
                handler(R, d, a, b)
            if kind == BR_IF:
                block = x if R[y] else z
            elif kind == BR:
                block = x
            elif kind == RETURN:
                if not frames:
                    return [R[slot] for slot in y]
                caller, (block, d), frame = frames.pop()
                if len(y) == 1:
                    frame[d] = R[y[0]]
                elif y:
                    frame[d:d + len(y)] = [R[slot] for slot in y]
                function, R = caller, frame
            elif kind == BR_TABLE:
                block = x[min(R[y], z)]
            else:
                callee = x if kind == CALL else indirect_callee(x, R)
                values = [R[slot] for slot in y]
                if callee.host:
                    block, d = z
                    results = callee.call(*values)
                    if results:
                        R[d:d + len(results)] = results
                    continue
                if len(frames) >= MAX_FRAMES:
                    raise Exhaustion("call stack exhausted")
                frames.append((function, z, R))
                function = callee
                block = callee.entry or translated(callee)
                R = values + callee.template
    except struct.error:
        trap = out_of_bounds("memory")
    except RecursionError:
        trap = Exhaustion("call stack exhausted")
    except Trap as caught:
        trap = caught
    trap.backtrace += tuple([function] + [frame[0] for frame in reversed(frames)])
    raise trap


def execute_any(function, arguments):
    """Calls a Function or a HostFunction."""
    return function.call(*arguments) if function.host else execute(function, arguments)


def translated(function):
    """The first block of a function that is called for the first time."""
    Translator(function).run()
    return function.entry


def indirect_callee(x, R):
    """The function that call_indirect finds in its table."""
    table, type, slot = x
    index = R[slot]
    if index >= len(table.elements):
        raise Trap("undefined element")
    callee = table.elements[index]
    if callee is None:
        raise Trap("uninitialized element %d" % index)
    if callee.type != type:
        raise Trap("indirect call type mismatch")
    return callee


# === 13. WASI =================================================================
#
# WASI preview 1: 46 functions over the guest's memory. In: the arguments, the
# environment and the preopened directories that the caller grants; the guest sees
# nothing else of the host. Each method has the name and the parameters of the
# witx file; it raises OSError or WasiError, and one wrapper turns that into an
# errno. A path is resolved component by component below its preopen and never
# leaves it.

WASI_ERRNO = {name: code for code, name in enumerate((
    "SUCCESS E2BIG EACCES EADDRINUSE EADDRNOTAVAIL EAFNOSUPPORT EAGAIN EALREADY EBADF EBADMSG EBUSY ECANCELED "
    "ECHILD ECONNABORTED ECONNREFUSED ECONNRESET EDEADLK EDESTADDRREQ EDOM EDQUOT EEXIST EFAULT EFBIG "
    "EHOSTUNREACH EIDRM EILSEQ EINPROGRESS EINTR EINVAL EIO EISCONN EISDIR ELOOP EMFILE EMLINK EMSGSIZE "
    "EMULTIHOP ENAMETOOLONG ENETDOWN ENETRESET ENETUNREACH ENFILE ENOBUFS ENODEV ENOENT ENOEXEC ENOLCK "
    "ENOLINK ENOMEM ENOMSG ENOPROTOOPT ENOSPC ENOSYS ENOTCONN ENOTDIR ENOTEMPTY ENOTRECOVERABLE ENOTSOCK "
    "ENOTSUP ENOTTY ENXIO EOVERFLOW EOWNERDEAD EPERM EPIPE EPROTO EPROTONOSUPPORT EPROTOTYPE ERANGE EROFS "
    "ESPIPE ESRCH ESTALE ETIMEDOUT ETXTBSY EXDEV ENOTCAPABLE").split())}

RIGHTS = {name: 1 << bit for bit, name in enumerate((
    "fd_datasync fd_read fd_seek fd_fdstat_set_flags fd_sync fd_tell fd_write fd_advise fd_allocate "
    "path_create_directory path_create_file path_link_source path_link_target path_open fd_readdir "
    "path_readlink path_rename_source path_rename_target path_filestat_get path_filestat_set_size "
    "path_filestat_set_times fd_filestat_get fd_filestat_set_size fd_filestat_set_times path_symlink "
    "path_remove_directory path_unlink_file poll_fd_readwrite sock_shutdown sock_accept").split())}
ALL_RIGHTS = (1 << 30) - 1


def rights(names):
    """The bits of space-separated names."""
    return sum(RIGHTS[name] for name in names.split())


FILE_RIGHTS = rights("fd_datasync fd_read fd_seek fd_fdstat_set_flags fd_sync fd_tell fd_write fd_advise fd_allocate "
                     "fd_filestat_get fd_filestat_set_size fd_filestat_set_times poll_fd_readwrite")
DIRECTORY_RIGHTS = ALL_RIGHTS & ~rights(
    "fd_datasync fd_read fd_seek fd_tell fd_write fd_advise fd_allocate fd_filestat_set_size poll_fd_readwrite "
    "sock_shutdown sock_accept") | rights("fd_datasync fd_sync")
STREAM_RIGHTS = FILE_RIGHTS & ~rights("fd_seek fd_tell")
WRITING_RIGHTS = rights("fd_write fd_allocate fd_filestat_set_size")

FILETYPES = {0o060000: 1, 0o020000: 2, 0o040000: 3, 0o100000: 4, 0o140000: 6, 0o120000: 7}
REGULAR_FILE, DIRECTORY, SYMBOLIC_LINK = 4, 3, 7
FDFLAGS = ((1, os.O_APPEND), (2, os.O_DSYNC), (4, os.O_NONBLOCK), (8, os.O_RSYNC), (16, os.O_SYNC))
OFLAGS_CREAT, OFLAGS_DIRECTORY, OFLAGS_EXCL, OFLAGS_TRUNC = 1, 2, 4, 8
LOOKUP_SYMLINK_FOLLOW = 1
MAX_DESCRIPTORS = 4096
MAX_IOVECS = 1024
MAX_SYMLINKS = 40
MAX_TRANSFER_BYTES = 1 << 20
HARMLESS_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0))  # null zero full random urandom tty


class WasiError(Exception):
    """A WASI errno by name, where no OSError says it."""


class Descriptor:
    """An open file of the guest. `preopen` is the guest path of a preopened directory,
    `entries` the snapshot that fd_readdir's cookies count in."""

    __slots__ = ("fd", "filetype", "base", "inheriting", "preopen", "entries", "flags")

    def __init__(self, fd, base, inheriting=0, preopen=None, flags=0):
        self.fd = fd
        self.filetype = filetype(os.fstat(fd))
        self.base, self.inheriting, self.preopen, self.flags = base, inheriting, preopen, flags
        self.entries = None


def filetype(status):
    """The WASI file type of a stat result; 0 (unknown) for a pipe."""
    return FILETYPES.get(status.st_mode & 0o170000, 0)


class Wasi:
    """The state of one guest. `preopens` is a list of (host path, guest path)."""

    def __init__(self, arguments=(), environment=(), preopens=()):
        self.arguments = [os.fsencode(a) for a in arguments]
        self.environment = [os.fsencode(e) for e in environment]
        self.memory = None
        self.forbidden = forbidden_devices()
        self.descriptors = {}
        for fd in 0, 1, 2:
            try:
                self.descriptors[fd] = Descriptor(fd, STREAM_RIGHTS if filetype(os.fstat(fd)) != REGULAR_FILE else FILE_RIGHTS)
            except OSError:
                pass                    # closed by whoever started us: EBADF for the guest
        for host, guest in preopens:
            fd = os.open(host, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.insert(Descriptor(fd, DIRECTORY_RIGHTS, DIRECTORY_RIGHTS | FILE_RIGHTS, os.fsencode(guest)))

    def imports(self):
        """The imports' namespace: {name: HostFunction}."""
        return {name: self.host_function(name, letters) for name, letters in WASI_FUNCTIONS.items()}

    def host_function(self, name, letters):
        """The HostFunction of a method; the errno is its result."""
        method = getattr(self, name)
        type = FunctionType([TYPE_LETTERS[letter] for letter in letters], () if name == "proc_exit" else (I32,))

        def call(*arguments):
            try:
                method(*arguments)
                return (0,)
            except OSError as error:
                return (WASI_ERRNO.get(errno_names.get(error.errno), WASI_ERRNO["EIO"]),)
            except WasiError as error:
                return (WASI_ERRNO[error.args[0]],)
            except (struct.error, IndexError):
                return (WASI_ERRNO["EFAULT"],)
        return HostFunction(type, call, name)

    # -- the guest's memory --

    def bytes_at(self, address, size):
        """A view of `size` bytes; EFAULT where they are not all inside."""
        view = self.memory.view[address:address + size]
        if len(view) != size:
            raise WasiError("EFAULT")
        return view

    def store(self, format, address, *values):
        struct.pack_into("<" + format, self.memory.view, address, *values)

    def buffers(self, address, count):
        """The views of an iovec array, cut to what one call transfers."""
        if count > MAX_IOVECS:
            raise WasiError("EINVAL")
        views, room = [], MAX_TRANSFER_BYTES
        for start, size in struct.iter_unpack("<II", self.bytes_at(address, 8 * count)):
            view = self.bytes_at(start, size)
            views.append(view[:room])
            room -= len(views[-1])
        return views

    # -- descriptors --

    def insert(self, descriptor):
        """The lowest free number, now the descriptor's."""
        if len(self.descriptors) >= MAX_DESCRIPTORS:
            os.close(descriptor.fd)
            raise WasiError("EMFILE")
        number = 3
        while number in self.descriptors:
            number += 1
        self.descriptors[number] = descriptor
        return number

    def descriptor(self, number, right=0):
        """The descriptor, if it has the right."""
        descriptor = self.descriptors.get(number)
        if descriptor is None:
            raise WasiError("EBADF")
        if right & ~descriptor.base:
            raise WasiError("ENOTCAPABLE")
        return descriptor

    def directory(self, number, right):
        """The descriptor of a directory, if it has the right."""
        descriptor = self.descriptor(number)
        if descriptor.filetype != DIRECTORY:
            raise WasiError("ENOTDIR")
        return self.descriptor(number, RIGHTS[right])

    # -- arguments, environment, clocks, random, processes --

    def args_sizes_get(self, count, size):
        self.store_sizes(self.arguments, count, size)

    def args_get(self, pointers, buffer):
        self.store_strings(self.arguments, pointers, buffer)

    def environ_sizes_get(self, count, size):
        self.store_sizes(self.environment, count, size)

    def environ_get(self, pointers, buffer):
        self.store_strings(self.environment, pointers, buffer)

    def store_sizes(self, strings, count, size):
        self.store("I", count, len(strings))
        self.store("I", size, sum(map(len, strings)) + len(strings))

    def store_strings(self, strings, pointers, buffer):
        for string in strings:
            self.store("I", pointers, buffer)
            self.bytes_at(buffer, len(string) + 1)[:] = string + b"\0"
            pointers += 4
            buffer += len(string) + 1

    def clock(self, number):
        if number >= len(WASI_CLOCKS):
            raise WasiError("EINVAL")
        return WASI_CLOCKS[number]

    def clock_res_get(self, number, result):
        self.store("Q", result, max(1, round(time.clock_getres(self.clock(number)) * 1e9)))

    def clock_time_get(self, number, precision, result):
        self.store("Q", result, time.clock_gettime_ns(self.clock(number)))

    def random_get(self, buffer, size):
        view = self.bytes_at(buffer, size)
        for start in range(0, size, MAX_TRANSFER_BYTES):
            piece = view[start:start + MAX_TRANSFER_BYTES]
            piece[:] = os.urandom(len(piece))

    def proc_exit(self, code):
        raise Exit(code)

    def proc_raise(self, signal):
        if not 0 <= signal < len(WASI_SIGNALS):
            raise WasiError("EINVAL")
        if signal:
            os.kill(os.getpid(), WASI_SIGNALS[signal])

    def sched_yield(self):
        os.sched_yield()

    # -- files --

    def fd_read(self, number, iovs, count, result):
        descriptor = self.descriptor(number, RIGHTS["fd_read"])
        self.store("I", result, self.read_into(descriptor, self.buffers(iovs, count)))

    def read_into(self, descriptor, views):
        views = [view for view in views if len(view)]
        return os.readv(descriptor.fd, views) if views else 0

    def fd_write(self, number, iovs, count, result):
        descriptor = self.descriptor(number, RIGHTS["fd_write"])
        views = [view for view in self.buffers(iovs, count) if len(view)]
        self.store("I", result, os.writev(descriptor.fd, views) if views else 0)

    def fd_pread(self, number, iovs, count, offset, result):
        descriptor = self.descriptor(number, RIGHTS["fd_read"] | RIGHTS["fd_seek"])
        self.store("I", result, os.preadv(descriptor.fd, self.buffers(iovs, count), file_offset(offset)))

    def fd_pwrite(self, number, iovs, count, offset, result):
        descriptor = self.descriptor(number, RIGHTS["fd_write"] | RIGHTS["fd_seek"])
        self.store("I", result, os.pwritev(descriptor.fd, self.buffers(iovs, count), file_offset(offset)))

    def fd_seek(self, number, offset, whence, result):
        descriptor = self.descriptor(number, RIGHTS["fd_seek"])
        if whence > 2:
            raise WasiError("EINVAL")
        if descriptor.filetype == DIRECTORY:
            raise WasiError("EBADF")
        self.store("Q", result, os.lseek(descriptor.fd, signed(offset, 64), whence))

    def fd_tell(self, number, result):
        self.store("Q", result, os.lseek(self.descriptor(number, RIGHTS["fd_tell"]).fd, 0, os.SEEK_CUR))

    def fd_close(self, number):
        os.close(self.descriptor(number).fd)
        del self.descriptors[number]

    def fd_sync(self, number):
        os.fsync(self.descriptor(number, RIGHTS["fd_sync"]).fd)

    def fd_datasync(self, number):
        os.fdatasync(self.descriptor(number, RIGHTS["fd_datasync"]).fd)

    def fd_advise(self, number, offset, size, advice):
        descriptor = self.descriptor(number, RIGHTS["fd_advise"])
        if advice > 5:
            raise WasiError("EINVAL")
        os.posix_fadvise(descriptor.fd, file_offset(offset), file_offset(size), WASI_ADVICE[advice])

    def fd_allocate(self, number, offset, size):
        os.posix_fallocate(self.descriptor(number, RIGHTS["fd_allocate"]).fd, file_offset(offset), file_offset(size))

    def fd_renumber(self, number, to):
        descriptor, replaced = self.descriptor(number), self.descriptor(to)
        if number != to:
            os.close(replaced.fd)
            self.descriptors[to] = descriptor
            del self.descriptors[number]

    def fd_fdstat_get(self, number, result):
        d = self.descriptor(number)
        self.store("BxH4xQQ", result, d.filetype, d.flags, d.base, d.inheriting)

    def fd_fdstat_set_flags(self, number, flags):
        descriptor = self.descriptor(number, RIGHTS["fd_fdstat_set_flags"])
        if flags > 31:
            raise WasiError("EINVAL")
        settable = os.O_APPEND | os.O_NONBLOCK
        current = fcntl.fcntl(descriptor.fd, fcntl.F_GETFL)
        fcntl.fcntl(descriptor.fd, fcntl.F_SETFL, current & ~settable | open_flags(flags) & settable)
        descriptor.flags = flags

    def fd_fdstat_set_rights(self, number, base, inheriting):
        descriptor = self.descriptor(number)
        if base & ~descriptor.base or inheriting & ~descriptor.inheriting:
            raise WasiError("ENOTCAPABLE")
        descriptor.base, descriptor.inheriting = base, inheriting

    def fd_filestat_get(self, number, result):
        self.store_filestat(result, os.fstat(self.descriptor(number, RIGHTS["fd_filestat_get"]).fd))

    def store_filestat(self, result, s):
        self.store("QQB7xQQQQQ", result, s.st_dev, s.st_ino, filetype(s), s.st_nlink, s.st_size,
                   s.st_atime_ns & MAX_U64, s.st_mtime_ns & MAX_U64, s.st_ctime_ns & MAX_U64)

    def fd_filestat_set_size(self, number, size):
        os.ftruncate(self.descriptor(number, RIGHTS["fd_filestat_set_size"]).fd, file_offset(size))

    def fd_filestat_set_times(self, number, atime, mtime, flags):
        descriptor = self.descriptor(number, RIGHTS["fd_filestat_set_times"])
        os.utime(descriptor.fd, ns=new_times(os.fstat(descriptor.fd), atime, mtime, flags))

    def fd_prestat_get(self, number, result):
        self.store("B3xI", result, 0, len(self.preopened(number).preopen))

    def fd_prestat_dir_name(self, number, buffer, size):
        name = self.preopened(number).preopen
        if size < len(name):
            raise WasiError("ENAMETOOLONG")
        self.bytes_at(buffer, len(name))[:] = name

    def preopened(self, number):
        descriptor = self.descriptor(number)
        if descriptor.preopen is None:
            raise WasiError("EBADF")
        return descriptor

    def fd_readdir(self, number, buffer, size, cookie, result):
        """Fills the buffer with entries from `cookie` on; a cut entry at the end tells
        the guest that there are more. Cookie 0 takes a new snapshot."""
        descriptor = self.directory(number, "fd_readdir")
        view = self.bytes_at(buffer, size)
        if cookie == 0 or descriptor.entries is None:
            descriptor.entries = directory_entries(descriptor.fd)
        used = 0
        for index in range(min(cookie, len(descriptor.entries)), len(descriptor.entries)):
            name, inode, type = descriptor.entries[index]
            entry = struct.pack("<QQIB3x", index + 1, inode, len(name), type) + name
            piece = entry[:size - used]
            view[used:used + len(piece)] = piece
            used += len(piece)
            if used == size:
                break
        self.store("I", result, used)

    # -- paths --

    def path(self, address, size):
        """The bytes of a path."""
        path = bytes(self.bytes_at(address, size))
        if b"\0" in path:
            raise WasiError("EILSEQ")
        try:
            path.decode()
        except UnicodeDecodeError:
            raise WasiError("EILSEQ") from None
        return path

    def resolve(self, descriptor, path, follow=False):
        """(fd of the parent directory, last name) of a path below a directory. The last
        name is no symbolic link if `follow`; whoever opens it adds O_NOFOLLOW, so that
        a link put there meanwhile is not followed either. The caller closes the fd."""
        if not path:
            raise WasiError("ENOENT")
        if path.startswith(b"/"):
            raise WasiError("EPERM")
        stack = [os.dup(descriptor.fd)]
        try:
            pending, links = path.split(b"/")[::-1], 0
            while True:
                name = pending.pop()
                last = not pending
                if name == b"..":
                    if len(stack) == 1:
                        raise WasiError("EPERM")
                    os.close(stack.pop())
                if name in (b"", b".", b".."):
                    if last:
                        return stack.pop(), b"."
                    continue
                # A trailing slash asks for a directory, so it follows a link.
                trailing = not any(n not in (b"", b".") for n in pending)
                if last and not follow:
                    return stack.pop(), name
                try:
                    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stack[-1])
                except FileNotFoundError:
                    if last or trailing:
                        return stack.pop(), name + (b"" if last else b"/")
                    raise
                status = os.fstat(fd)
                if filetype(status) == SYMBOLIC_LINK:
                    links += 1
                    target = os.readlink(b"", dir_fd=fd)
                    os.close(fd)
                    if links > MAX_SYMLINKS:
                        raise WasiError("ELOOP")
                    if target.startswith(b"/"):
                        raise WasiError("EPERM")
                    pending += target.split(b"/")[::-1]
                    continue
                if last:
                    os.close(fd)
                    return stack.pop(), name
                stack.append(fd)
                if status.st_dev in self.forbidden:
                    raise WasiError("EACCES")
                if filetype(status) != DIRECTORY:
                    raise WasiError("ENOTDIR")
        finally:
            for fd in stack:
                os.close(fd)

    def path_open(self, number, lookup, path, size, oflags, base, inheriting, fdflags, result):
        directory = self.directory(number, "path_open")
        name = self.path(path, size)
        if oflags & OFLAGS_CREAT:
            self.descriptor(number, RIGHTS["path_create_file"])
        if oflags & OFLAGS_TRUNC:
            self.descriptor(number, RIGHTS["path_filestat_set_size"])
        if (base | inheriting) & ~directory.inheriting:
            raise WasiError("ENOTCAPABLE")
        parent, last = self.resolve(directory, name, follow=bool(lookup & LOOKUP_SYMLINK_FOLLOW))
        try:
            descriptor = self.open_at(parent, last, oflags, base, inheriting, fdflags)
        finally:
            os.close(parent)
        self.store("I", result, self.insert(descriptor))

    def open_at(self, parent, name, oflags, base, inheriting, fdflags):
        """Opens a file for path_open. O_NONBLOCK: a FIFO or a device must not hang us."""
        writing, reading = base & WRITING_RIGHTS, base & rights("fd_read fd_readdir")
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | open_flags(fdflags)
        flags |= os.O_RDWR if writing and reading else os.O_WRONLY if writing else os.O_RDONLY
        for bit, flag in (OFLAGS_CREAT, os.O_CREAT), (OFLAGS_DIRECTORY, os.O_DIRECTORY), (OFLAGS_EXCL, os.O_EXCL), (OFLAGS_TRUNC, os.O_TRUNC):
            if oflags & bit:
                flags |= flag
        if oflags & OFLAGS_CREAT and oflags & OFLAGS_DIRECTORY:
            raise WasiError("EINVAL")
        try:
            fd = os.open(name, flags, 0o666, dir_fd=parent)
        except IsADirectoryError:
            if oflags & (OFLAGS_CREAT | OFLAGS_TRUNC) or base & RIGHTS["fd_write"] and not base & RIGHTS["fd_readdir"]:
                raise
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            self.check_opened(fd)
            if not fdflags & 4:
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            descriptor = Descriptor(fd, base, inheriting, flags=fdflags)
        except BaseException:
            os.close(fd)
            raise
        if descriptor.filetype == DIRECTORY:
            descriptor.base &= DIRECTORY_RIGHTS
        else:
            descriptor.base &= FILE_RIGHTS
        return descriptor

    def check_opened(self, fd):
        """No file of procfs or sysfs and no device that reaches memory or disks: with /
        preopened, /proc/self/mem would hand the engine to the guest."""
        status = os.fstat(fd)
        kind = status.st_mode & 0o170000
        device = os.major(status.st_rdev), os.minor(status.st_rdev)
        if (status.st_dev in self.forbidden or kind == 0o060000
                or kind == 0o020000 and device not in HARMLESS_DEVICES and device[0] not in range(136, 144)):
            raise WasiError("EACCES")

    def at(self, number, right, path, size, operation, follow=False):
        """operation(parent fd, name) on a resolved path."""
        parent, name = self.resolve(self.directory(number, right), self.path(path, size), follow)
        try:
            if os.fstat(parent).st_dev in self.forbidden:
                raise WasiError("EACCES")
            return operation(parent, name)
        finally:
            os.close(parent)

    def path_create_directory(self, number, path, size):
        self.at(number, "path_create_directory", path, size, lambda parent, name: os.mkdir(name.rstrip(b"/"), dir_fd=parent))

    def path_remove_directory(self, number, path, size):
        self.at(number, "path_remove_directory", path, size, lambda parent, name: os.rmdir(name, dir_fd=parent))

    def path_unlink_file(self, number, path, size):
        if bytes(self.bytes_at(path, size)).endswith(b"/"):
            stat = self.at(number, "path_unlink_file", path, size, lambda parent, name: os.stat(name, dir_fd=parent, follow_symlinks=False))
            raise WasiError("EISDIR" if filetype(stat) == DIRECTORY else "ENOTDIR")
        self.at(number, "path_unlink_file", path, size, lambda parent, name: os.unlink(name, dir_fd=parent))

    def path_filestat_get(self, number, lookup, path, size, result):
        self.store_filestat(result, self.at(
            number, "path_filestat_get", path, size,
            lambda parent, name: os.stat(name, dir_fd=parent, follow_symlinks=False), bool(lookup & LOOKUP_SYMLINK_FOLLOW)))

    def path_filestat_set_times(self, number, lookup, path, size, atime, mtime, flags):
        def operation(parent, name):
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            os.utime(name, ns=new_times(status, atime, mtime, flags), dir_fd=parent, follow_symlinks=False)
        self.at(number, "path_filestat_set_times", path, size, operation, bool(lookup & LOOKUP_SYMLINK_FOLLOW))

    def path_readlink(self, number, path, size, buffer, room, result):
        target = self.at(number, "path_readlink", path, size, lambda parent, name: os.readlink(name, dir_fd=parent))
        view = self.bytes_at(buffer, room)
        view[:len(target)] = target[:room]
        self.store("I", result, min(len(target), room))

    def path_symlink(self, target, target_size, number, path, size):
        target = self.path(target, target_size)
        if target.startswith(b"/"):
            raise WasiError("EPERM")
        self.at(number, "path_symlink", path, size, lambda parent, name: os.symlink(target, name, dir_fd=parent))

    def path_link(self, number, lookup, path, size, to, to_path, to_size):
        if lookup & LOOKUP_SYMLINK_FOLLOW:
            raise WasiError("EINVAL")
        self.at(number, "path_link_source", path, size, lambda source, old: self.at(
            to, "path_link_target", to_path, to_size,
            lambda parent, name: os.link(old, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)))

    def path_rename(self, number, path, size, to, to_path, to_size):
        self.at(number, "path_rename_source", path, size, lambda source, old: self.at(
            to, "path_rename_target", to_path, to_size,
            lambda parent, name: os.rename(old, name, src_dir_fd=source, dst_dir_fd=parent)))

    # -- polling and sockets --

    def poll_oneoff(self, subscriptions, events, count, result):
        """Waits for clocks and descriptors: one poll(2) with the nearest deadline."""
        if count == 0:
            raise WasiError("EINVAL")
        if count > MAX_DESCRIPTORS:
            raise WasiError("EINVAL")
        poll, deadlines, waiting, ready = select.poll(), [], {}, []
        for index in range(count):
            base = subscriptions + 48 * index
            userdata, tag = struct.unpack_from("<QB", self.memory.view, base)
            if tag == 0:
                deadlines.append((self.deadline(base + 16), userdata))
            elif tag in (1, 2):
                number, = struct.unpack_from("<I", self.memory.view, base + 16)
                self.subscribe(poll, waiting, ready, userdata, tag, number)
            else:
                raise WasiError("EINVAL")
        now = time.monotonic_ns()
        timeout = 0 if ready else min((d for d, _ in deadlines), default=None)
        if timeout:
            timeout = max(0, timeout - now) / 1e6
        for fd, mask in poll.poll(timeout) if waiting or not ready else ():
            for userdata, tag in waiting[fd]:
                if mask & ~(select.POLLIN | select.POLLOUT) or mask & (select.POLLIN if tag == 1 else select.POLLOUT):
                    ready.append((userdata, 0, tag, bytes_available(fd) if tag == 1 else 1, int(bool(mask & select.POLLHUP))))
        now = time.monotonic_ns()
        ready += [(userdata, 0, 0, 0, 0) for deadline, userdata in deadlines if deadline <= now]
        for index, (userdata, error, tag, size, flags) in enumerate(ready):
            self.store("QHB5xQH6x", events + 32 * index, userdata, error, tag, size, flags)
        self.store("I", result, len(ready))

    def subscribe(self, poll, waiting, ready, userdata, tag, number):
        """Adds a descriptor to poll_oneoff's sets; a bad one is ready with its errno."""
        try:
            descriptor = self.descriptor(number, RIGHTS["poll_fd_readwrite"])
        except WasiError as error:
            ready.append((userdata, WASI_ERRNO[error.args[0]], tag, 0, 0))
            return
        waiting.setdefault(descriptor.fd, []).append((userdata, tag))
        wanted = (1 if any(t == 1 for _, t in waiting[descriptor.fd]) else 0) * select.POLLIN
        wanted |= (1 if any(t == 2 for _, t in waiting[descriptor.fd]) else 0) * select.POLLOUT
        poll.register(descriptor.fd, wanted)

    def deadline(self, address):
        """subscription_clock's end on the monotonic clock, in ns."""
        number, timeout, precision, flags = struct.unpack_from("<I4xQQH", self.memory.view, address)
        if number > 1:
            raise WasiError("EINVAL" if number > 3 else "ENOTSUP")
        if flags & 1:
            timeout -= time.clock_gettime_ns(self.clock(number))
        return time.monotonic_ns() + max(0, timeout)

    def sock_accept(self, number, flags, result):
        descriptor = self.descriptor(number, RIGHTS["sock_accept"])
        with self.socket(descriptor) as socket:
            fd, _ = socket._accept()
        os.set_blocking(fd, not flags & 4)
        self.store("I", result, self.insert(Descriptor(fd, STREAM_RIGHTS | RIGHTS["sock_shutdown"], flags=flags)))

    def socket(self, descriptor):
        """The descriptor as a socket object of its own (a duplicate)."""
        import _socket
        if descriptor.filetype != 6:
            raise WasiError("ENOTSOCK")
        return _socket.socket(fileno=os.dup(descriptor.fd))

    def sock_recv(self, number, iovs, count, flags, size, oflags):
        descriptor = self.descriptor(number, RIGHTS["fd_read"])
        if flags & ~3:
            raise WasiError("ENOTSUP")
        socket = self.socket(descriptor)
        try:
            views = self.buffers(iovs, count)
            data = socket.recv(sum(map(len, views)), (2 if flags & 1 else 0) | (0x100 if flags & 2 else 0))
        finally:
            socket.close()
        position = 0
        for view in views:
            piece = data[position:position + len(view)]
            view[:len(piece)] = piece
            position += len(piece)
        self.store("I", size, len(data))
        self.store("H", oflags, 0)

    def sock_send(self, number, iovs, count, flags, size):
        descriptor = self.descriptor(number, RIGHTS["fd_write"])
        if flags:
            raise WasiError("EINVAL")
        socket = self.socket(descriptor)
        try:
            self.store("I", size, socket.send(b"".join(self.buffers(iovs, count)), 0x4000))
        finally:
            socket.close()

    def sock_shutdown(self, number, how):
        descriptor = self.descriptor(number)
        if descriptor.filetype != 6:
            raise WasiError("ENOTSOCK")
        self.descriptor(number, RIGHTS["sock_shutdown"])
        if how not in (1, 2, 3):
            raise WasiError("EINVAL")
        socket = self.socket(descriptor)
        try:
            socket.shutdown(how - 1)
        finally:
            socket.close()


WASI_CLOCKS = (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_PROCESS_CPUTIME_ID, time.CLOCK_THREAD_CPUTIME_ID)
WASI_ADVICE = (os.POSIX_FADV_NORMAL, os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_RANDOM,
               os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED, os.POSIX_FADV_NOREUSE)
WASI_SIGNALS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 29, 30, 31)
WASI_FUNCTIONS = {
    "args_get": "ii", "args_sizes_get": "ii", "environ_get": "ii", "environ_sizes_get": "ii",
    "clock_res_get": "ii", "clock_time_get": "iIi",
    "fd_advise": "iIIi", "fd_allocate": "iII", "fd_close": "i", "fd_datasync": "i", "fd_fdstat_get": "ii",
    "fd_fdstat_set_flags": "ii", "fd_fdstat_set_rights": "iII", "fd_filestat_get": "ii",
    "fd_filestat_set_size": "iI", "fd_filestat_set_times": "iIIi", "fd_pread": "iiiIi", "fd_prestat_get": "ii",
    "fd_prestat_dir_name": "iii", "fd_pwrite": "iiiIi", "fd_read": "iiii", "fd_readdir": "iiiIi",
    "fd_renumber": "ii", "fd_seek": "iIii", "fd_sync": "i", "fd_tell": "ii", "fd_write": "iiii",
    "path_create_directory": "iii", "path_filestat_get": "iiiii", "path_filestat_set_times": "iiiiIIi",
    "path_link": "iiiiiii", "path_open": "iiiiiIIii", "path_readlink": "iiiiii", "path_remove_directory": "iii",
    "path_rename": "iiiiii", "path_symlink": "iiiii", "path_unlink_file": "iii",
    "poll_oneoff": "iiii", "proc_exit": "i", "proc_raise": "i", "sched_yield": "", "random_get": "ii",
    "sock_accept": "iii", "sock_recv": "iiiiii", "sock_send": "iiiii", "sock_shutdown": "ii",
}


def file_offset(value):
    """A filesize as off_t; EINVAL where it does not fit."""
    if value >> 63:
        raise WasiError("EINVAL")
    return value


def open_flags(fdflags):
    """open(2)'s flags of WASI's fdflags."""
    flags = 0
    for bit, flag in FDFLAGS:
        if fdflags & bit:
            flags |= flag
    return flags


def new_times(status, atime, mtime, flags):
    """(atime, mtime) in ns by fstflags: bit 0 atime, 1 atime now, 2 mtime, 3 mtime now."""
    if flags > 15 or flags & 3 == 3 or flags & 12 == 12:
        raise WasiError("EINVAL")
    now = time.time_ns()
    return (atime if flags & 1 else now if flags & 2 else status.st_atime_ns,
            mtime if flags & 4 else now if flags & 8 else status.st_mtime_ns)


def directory_entries(fd):
    """[(name, inode, file type)] of a directory, . and .. first."""
    inode = os.fstat(fd).st_ino
    entries = [(b".", inode, DIRECTORY), (b"..", inode, DIRECTORY)]     # above is none of the guest's business
    with os.scandir(fd) as scan:
        for entry in scan:
            type = (DIRECTORY if entry.is_dir(follow_symlinks=False) else SYMBOLIC_LINK if entry.is_symlink()
                    else REGULAR_FILE if entry.is_file(follow_symlinks=False) else 0)
            entries.append((os.fsencode(entry.name), entry.inode(), type))
    return entries


def bytes_available(fd):
    """How many bytes a read would yield: FIONREAD, or what is left of a file."""
    status = os.fstat(fd)
    if filetype(status) == REGULAR_FILE:
        return max(0, status.st_size - os.lseek(fd, 0, os.SEEK_CUR))
    try:
        return unpack_u32(fcntl.ioctl(fd, FIONREAD, bytes(4)))[0]
    except OSError:
        return 1


FIONREAD = 0x541B


def forbidden_devices():
    """The st_dev of every mounted procfs and sysfs (proc_pid_mountinfo(5))."""
    devices = set()
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[fields.index(b"-") + 1] in (b"proc", b"sysfs"):
                    major, minor = fields[2].split(b":")
                    devices.add(os.makedev(int(major), int(minor)))
    except FileNotFoundError:
        pass                            # no procfs is mounted here: nothing to forbid
    return devices


errno_names = errno.errorcode


def run_command(data, arguments, environment, preopens, function="_start", preloads=()):
    """Runs a WASI command module and returns its exit status: proc_exit's, 0 at the
    function's return, 134 (128 + SIGABRT, as an aborted program) for a trap. What
    went wrong is on stderr. `preloads` is a list of (module name, bytes)."""
    wasi = Wasi(arguments, environment, preopens)
    imports = {"wasi_snapshot_preview1": wasi.imports(), "wasi_unstable": wasi.imports()}
    try:
        for name, module in preloads:
            imports[name] = Instance(Module(module), imports).exports
        module = Module(data)
        if function not in module.exports or module.exports[function][0] != "func":
            raise Unlinkable("the module exports no function %r%s" % (
                function, "; name one with --invoke" if function == "_start" else ""))
        memory = module.exports.get("memory", ("", 0))
        instance = Instance.__new__(Instance)
        start, module.start = module.start, None
        instance.__init__(module, imports)
        wasi.memory = instance.memories[memory[1]] if instance.memories else Memory()
        if start is not None:
            execute_any(instance.functions[start], [])
        values = execute_any(instance.exports[function], [])
    except Exit as exit:
        return exit.args[0] & 0xFF
    except Trap as trap:
        report("error: trap: %s" % trap)
        for depth, place in enumerate(trap.backtrace[:32]):
            report("  %2d: %s" % (depth, place.name))
        return 134
    except (Malformed, Invalid, Unlinkable) as error:
        report("error: %s: %s" % (error.__class__.__name__.lower(), error))
        return 134
    if values:
        print(*(to_python(t, v) for t, v in zip(instance.exports[function].type.results, values)))
    return 0


def report(text):
    """One line on stderr, bounded and without control characters."""
    line = "".join(c if c.isprintable() else "?" for c in text[:1000])
    try:
        os.write(2, (line + "\n").encode("utf-8", "replace"))
    except OSError:
        pass                            # nobody listens


# === 19. Command line =========================================================
#
# For people without containerd and for readers. Options end at the module, what
# follows is the guest's, as with `wasmtime run`.

USAGE = """usage: %s run [OPTION…] MODULE [ARGUMENT…]

Runs a WebAssembly module. The exit status is the guest's; 134 for a trap.

  --dir HOST[::GUEST]   let the guest see a directory (as GUEST)
  --env NAME=VALUE      set an environment variable of the guest
  --argv0 NAME          the guest's argument 0 (default: the module's file name)
  --preload NAME=FILE   satisfy imports from NAME by the module in FILE
  --invoke NAME         call this export instead of _start
"""


class UsageError(Exception):
    """The command line is wrong; the text says how to mend it."""


def parse_options(words, known):
    """Splits a command line into ({option: [values]}, rest); options end at the first
    word that is none."""
    options = {name: [] for name in known}
    position = 0
    while position < len(words) and words[position].startswith("--"):
        name, equals, value = words[position][2:].partition("=")
        position += 1
        if not name:
            break
        if name not in known:
            raise UsageError("unknown option --%s; see --help" % name)
        if not equals:
            if position == len(words):
                raise UsageError("--%s takes a value" % name)
            value = words[position]
            position += 1
        options[name].append(value)
    return options, words[position:]


def map_file(path):
    """A file's bytes, mapped: pages that nobody reads cost nothing, debug sections above all."""
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        except (ValueError, OSError):
            return file.read()          # empty, or not mappable


def split_pair(option, text, separator):
    """'a=b' as ('a', 'b')."""
    left, found, right = text.partition(separator)
    if not found or not left:
        raise UsageError("--%s %s: write it as LEFT%sRIGHT" % (option, text, separator))
    return left, right


def command_run(words):
    """chibishim run: a module without a container."""
    options, rest = parse_options(words, ("dir", "env", "argv0", "preload", "invoke"))
    if not rest:
        raise UsageError("run needs a MODULE; see --help")
    path = rest[0]
    argv0 = options["argv0"][-1] if options["argv0"] else os.path.basename(path)
    preopens = [(host, guest or host) for host, _, guest in (d.partition("::") for d in options["dir"])]
    for pair in options["env"]:
        split_pair("env", pair, "=")
    preloads = [(name, map_file(file)) for name, file in (split_pair("preload", p, "=") for p in options["preload"])]
    function = options["invoke"][-1] if options["invoke"] else "_start"
    return run_command(map_file(path), [argv0] + rest[1:], options["env"], preopens, function, preloads)


COMMANDS = {"run": command_run}


def main(argv):
    """The entry point: argv as sys.argv; returns the exit status."""
    program = os.path.basename(argv[0])
    words = argv[1:]
    try:
        if not words or words[0] in ("--help", "-h", "help") or "--help" in words[1:2]:
            sys.stdout.write(USAGE % program)
            return 0 if words else 2
        if words[0] not in COMMANDS:
            raise UsageError("unknown command %s; see --help" % words[0])
        return COMMANDS[words[0]](words[1:])
    except UsageError as error:
        report("%s: %s" % (program, error))
        return 2
    except OSError as error:
        report("%s: %s%s" % (program, error.filename + ": " if isinstance(error.filename, str) else "", error.strerror))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
