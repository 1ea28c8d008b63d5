"""Mutates real modules and runs what comes out: only documented exceptions may.

    python tests/fuzz.py [SECONDS [SEED]]

A finding is written to the temporary directory, and its seed said, which repeats it.
"""

import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback

import run_spec

import chibishim
from chibishim import Instance, Invalid, Malformed, Module, Thrown, Trap, Unlinkable, disassemble, execute_any, instrument

DOCUMENTED = (Malformed, Invalid, Unlinkable, Trap, Thrown)
VALIDATION_SECONDS = 5          # a hundred times what the largest seed takes
EXECUTION_SECONDS = 0.05
MAX_SEED_BYTES = 20000
INTERESTING = (0x00, 0x01, 0x0B, 0x40, 0x41, 0x60, 0x63, 0x64, 0x6F, 0x70, 0x7F, 0x80, 0xFB, 0xFC, 0xFD, 0xFE, 0xFF)
LENGTHS = (b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x07", b"\x80\x80\x80\x80\x08", b"\xff\xff\x03", b"\x80\x80\x04",
           b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x7f", b"\x00", b"\x01")


class OutOfTime(BaseException):
    """Not an Exception, so that nothing in the engine takes it for its own."""


def out_of_time(number, frame):
    raise OutOfTime


def limit(seconds):
    """Raises OutOfTime then, and again after that: one may be lost in a destructor."""
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


def ignore_lost(unraisable):
    if unraisable.exc_type is not OutOfTime:
        sys.__unraisablehook__(unraisable)


def seeds():
    """The suite's valid modules, without the many that are much like each other."""
    folder = run_spec.unpacked()
    found = []
    for directory, _, files in sorted(os.walk(folder or os.devnull)):
        for name in sorted(files)[:12]:
            path = os.path.join(directory, name)
            if name.endswith(".wasm") and os.path.getsize(path) <= MAX_SEED_BYTES:
                with open(path, "rb") as file:
                    data = file.read()
                try:
                    Module(data).validate()
                    found.append(data)
                except DOCUMENTED:
                    pass
    return found


def unsigned(value):
    """A number as LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes((value,))


def sections(data):
    """[(id, bytes)] of a module that is at least well-formed so far."""
    reader, found = chibishim.Reader(data, 8), []
    while reader.position < reader.end:
        found.append((reader.byte(), bytes(reader.take(reader.unsigned()))))
    return found


def bodies(section):
    """The function bodies of a code section."""
    reader = chibishim.Reader(section)
    return reader.vector(lambda: bytes(reader.take(reader.unsigned())))


def sized(piece):
    return unsigned(len(piece)) + piece


def mutated(data, others, choose):
    """A module with a few changes, nearly always with its lengths made right again: what
    the decoder refuses at once finds nothing."""
    if choose.random() < 0.2:
        return scrambled(data, others, choose, 8)
    parts = sections(data)
    if not parts:
        return data
    place = choose.randrange(len(parts))
    code = [index for index, (id, _) in enumerate(parts) if id == 10]
    functions = bodies(parts[code[0]][1]) if code and choose.random() < 0.8 else []
    if functions:
        index = choose.randrange(len(functions))
        functions[index] = scrambled(functions[index], others, choose, 1)
        parts[code[0]] = 10, unsigned(len(functions)) + b"".join(map(sized, functions))
    else:
        parts[place] = parts[place][0], scrambled(parts[place][1], others, choose, 0)
    return data[:8] + b"".join(bytes((id,)) + sized(part) for id, part in parts)


def scrambled(data, others, choose, first):
    """A few changes from byte `first` on: bytes, bits, lengths, pieces cut, doubled,
    moved and transplanted."""
    data = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        place = choose.randrange(first, len(data) + 1) if len(data) > first else len(data)
        size = choose.choice((1, 1, 2, 4, 16, 64))
        kind = choose.randrange(8)
        if kind == 0:
            data[place:place + 1] = bytes((choose.choice(INTERESTING),))
        elif kind == 1:
            data[place:place + 1] = bytes((choose.randrange(256),))
        elif kind == 2 and place < len(data):
            data[place] ^= 1 << choose.randrange(8)
        elif kind == 3:
            data[place:place + choose.randrange(3)] = choose.choice(LENGTHS)
        elif kind == 4:
            del data[place:place + size]
        elif kind == 5:
            data[place:place] = data[place:place + size] * choose.choice((1, 1, 2, 50))
        elif kind == 6:
            other = choose.choice(others)
            start = choose.randrange(len(other) + 1)
            data[place:place + choose.choice((0, size))] = other[start:start + size]
        elif kind == 7:
            other = choose.randrange(len(data) + 1)
            data[place:place + size] = data[other:other + size]
    return bytes(data)


def stand_in(module, item):
    """An extern that satisfies an import, where one can be made."""
    if item.kind == "func":
        type = module.types[item.type]
        return chibishim.HostFunction(type, lambda *values: [chibishim.zero(t) for t in type.results])
    if item.kind == "table":
        limits = item.type.limits
        return chibishim.Table(item.type.element, min(limits.minimum, 1000), limits.maximum, None, limits.address)
    if item.kind == "memory":
        return chibishim.Memory(min(item.type.minimum, 16), item.type.maximum, item.type.address, item.type.shared)
    if item.kind == "tag":
        return chibishim.Tag(module.types[item.type])
    return chibishim.Global(item.type, chibishim.zero(item.type.value))


def exercise(data):
    """Decodes, reads, validates, instantiates and calls every exported function with zeros;
    half of the modules are traced and bounded."""
    module = Module(data)
    try:
        for _ in disassemble(module):
            pass
    except (Malformed, Invalid):
        pass
    module.validate()
    if len(data) % 2:
        module.translator = instrument(len, [1 << 40, 1 << 40])
    imports = {}
    for item in module.imports:
        imports.setdefault(item.module, {})[item.name] = stand_in(module, item)
    limit(EXECUTION_SECONDS)
    instance = Instance(module, imports)
    for kind, index in module.exports.values():
        if kind == "func":
            type = instance.functions[index].type
            if all(map(chibishim.defaultable, type.params)):
                try:
                    execute_any(instance.functions[index], [chibishim.zero(t) for t in type.params])
                except (Trap, Thrown):
                    pass


def attempt(data):
    """What must not happen with this module, as a text; None if it did not."""
    start = time.monotonic()
    try:
        try:
            limit(VALIDATION_SECONDS)
            exercise(data)
        finally:
            limit(0)
    except DOCUMENTED:
        pass
    except OutOfTime:
        if time.monotonic() - start >= VALIDATION_SECONDS:
            return "no verdict after %d s" % VALIDATION_SECONDS
    except Exception:
        return traceback.format_exc()
    return None


def fuzz(seconds, seed, modules=1 << 60):
    """Runs for so long or for so many modules; returns (modules tried, [(seed, module, what happened)])."""
    sources, findings, tried = seeds(), [], 0
    previous = signal.signal(signal.SIGALRM, out_of_time), sys.unraisablehook, chibishim.Module.tier
    sys.unraisablehook = ignore_lost
    chibishim.Module.tier = None        # no alarm ends machine code; fuzz_native.py is for that
    try:
        end = time.monotonic() + seconds
        while sources and tried < modules and time.monotonic() < end:
            choose = random.Random(seed + tried)
            data = mutated(choose.choice(sources), sources, choose)
            finding = attempt(data)
            if finding:
                findings.append((seed + tried, data, finding))
            tried += 1
    finally:
        signal.signal(signal.SIGALRM, previous[0])
        sys.unraisablehook, chibishim.Module.tier = previous[1:]
    return tried, findings


def main(arguments):
    seconds = float(arguments[0]) if arguments else 10
    seed = int(arguments[1]) if len(arguments) > 1 else random.randrange(1 << 32)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 31, 1 << 31))
    print("seed %d" % seed)
    tried, findings = fuzz(seconds, seed)
    for number, data, text in findings[:10]:
        with tempfile.NamedTemporaryFile(prefix="chibishim-fuzz-", suffix=".wasm", delete=False) as file:
            file.write(data)
        print("seed %d, %s:\n%s" % (number, file.name, text))
    print("%d modules, %d findings%s" % (tried, len(findings), "" if tried else ": *** SKIPPED, no seeds in " + run_spec.SPEC))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
