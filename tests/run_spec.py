"""Runs the official WebAssembly suite, as JSON made by `wasm-tools json-from-wast`.

    python tests/run_spec.py [-v] [GROUP | GROUP/FILE | DIRECTORY]…

The archive is unpacked into a folder that ends with the process. Every command of a file
is one assertion; it passes, fails, or is not applicable, which is always counted and said:
the text format (this engine reads binaries), and assertions of old versions that later ones
decide the other way.
"""

import collections
import functools
import json
import multiprocessing
import os
import signal
import struct
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import archives  # noqa: E402
import chibishim  # noqa: E402
from chibishim import (F32, F64, FUNCREF, I32, I64, Exhaustion, FunctionType, Global, GlobalType,  # noqa: E402
                       HostFunction, Instance, Invalid, Malformed, Memory, Module, Table, Trap, Unlinkable, execute_any)

chibishim.Tier.hears_signals = True     # or no alarm would end an endless loop of native code
SPEC = os.path.join(ROOT, os.environ.get("SHARED", "../shared"), "spec")
GROUPS = ("core-3.0", "wasm-2.0", "wasm-1.0", "proposal-threads", "custom")
COMMAND_SECONDS = 60
LANES = {"i8": "16B", "i16": "8H", "i32": "4I", "i64": "2Q", "f32": "4I", "f64": "2Q"}
BITS = {"i8": 8, "i16": 16, "i32": 32, "i64": 64, "f32": 32, "f64": 64}
NULLS = ("refnull", "nullref", "nullfuncref", "nullexternref", "nullexnref")

# The texts of errors are those of 3.0. Which of several errors in a malformed module is
# found first depends on the decoder's order, and bodies are decoded last here: of those
# only the class is compared.
STRICT_GROUPS = ("core-3.0", "proposal-threads")

# Assertions of old versions that later ones decide the other way, by text, beside the
# ones in ERA_CONFLICTS.tsv.
SUPERSEDED_TEXTS = {
    "data segment does not fit": "a trap since bulk memory, 2.0",
    "elements segment does not fit": "a trap since bulk memory, 2.0",
    "multiple memories": "multi-memory, 3.0",
    "multiple tables": "reference types, 2.0",
}


class Host:
    """A reference of the embedder, told by its number."""

    def __init__(self, number):
        self.number = number


@functools.lru_cache(None)
def host(number):
    return Host(number)


class NotApplicable(Exception):
    pass


class Failure(Exception):
    pass


# -- values --


def value_of(value):
    """A value of the JSON in the interpreter's form."""
    type, text = value["type"], value.get("value")
    if type in ("i32", "i64"):
        return int(text) & (1 << BITS[type]) - 1
    if type in ("f32", "f64"):
        return (chibishim.f32_from_bits if type == "f32" else chibishim.f64_from_bits)(int(text))
    if type == "v128":
        lane = value["lane_type"]
        return struct.pack("<" + LANES[lane], *(int(item) & (1 << BITS[lane]) - 1 for item in text))
    return None if text in ("null", None) else host(int(text))


def bits_match(lane, expected, actual):
    """A number's bit pattern against a decimal or a class of NaNs."""
    if expected in ("nan:canonical", "nan:arithmetic"):
        quiet = 0x7FC00000 if lane == "f32" else 0x7FF8000000000000
        mask = (1 << BITS[lane] - 1) - 1 if expected == "nan:canonical" else quiet
        return actual & mask == quiet
    return actual == int(expected) & (1 << BITS[lane]) - 1


def matches(expected, actual):
    """Whether a result is as the JSON expects it."""
    type, text = expected["type"], expected.get("value")
    if type == "either":
        return any(matches(choice, actual) for choice in expected["values"])
    if type in ("i32", "i64"):
        return text is None or int(actual) == int(text) & (1 << BITS[type]) - 1
    if type in ("f32", "f64"):
        bits = chibishim.f32_bits if type == "f32" else chibishim.f64_bits
        return bits_match(type, text, bits(actual))
    if type == "v128":
        lane = expected["lane_type"]
        return all(bits_match(lane, e, a) for e, a in zip(text, struct.unpack("<" + LANES[lane], actual)))
    if text == "null" or type in NULLS:
        return actual is None
    if text is None:
        return actual is not None and reference_kind(type, actual)
    return actual is host(int(text))


def reference_kind(type, actual):
    """Whether a non-null reference is one of the JSON's type."""
    aggregate, i31 = chibishim.Aggregate, chibishim.I31
    kinds = {"funcref": (chibishim.Function, HostFunction), "structref": (aggregate,), "arrayref": (aggregate,),
             "i31ref": (i31,), "eqref": (aggregate, i31)}
    return isinstance(actual, kinds.get(type, object))


def spectest():
    """The host module that the suite imports from."""
    def function(*params):
        return HostFunction(FunctionType(params, ()), lambda *values: ())

    def constant(type, value):
        return Global(GlobalType(type, False), value)
    return {
        "print": function(), "print_i32": function(I32), "print_i64": function(I64), "print_f32": function(F32),
        "print_f64": function(F64), "print_i32_f32": function(I32, F32), "print_f64_f64": function(F64, F64),
        "global_i32": constant(I32, 666), "global_i64": constant(I64, 666),
        "global_f32": constant(F32, chibishim.to_f32(666.6)), "global_f64": constant(F64, 666.6),
        "table": Table(FUNCREF, 10, 20), "table64": Table(FUNCREF, 10, 20, address=I64),
        "memory": Memory(1, 2), "shared_memory": Memory(1, 2, shared=True)}


# -- commands --


class File:
    """The state of one file's run: its instances and definitions by name."""

    def __init__(self, path):
        self.folder = os.path.dirname(path)
        self.group, self.name = os.path.normpath(path).split(os.sep)[-3:-1]
        self.registered = {"spectest": spectest()}
        self.instances, self.definitions = {}, {}
        with open(path) as file:
            self.commands = json.load(file)["commands"]

    def load(self, command):
        """The command's module, decoded and all its bodies validated."""
        if command.get("module_type") == "text" and "binary_filename" not in command:
            raise NotApplicable("text format")
        with open(os.path.join(self.folder, command.get("binary_filename") or command["filename"]), "rb") as file:
            module = Module(file.read())
        module.validate()
        return module

    def enter(self, instance, name):
        self.instances[None] = self.instances[name] = instance

    def perform(self, action):
        """The results of an action."""
        extern = self.instances[action.get("module")].exports[action["field"]]
        if action["type"] == "get":
            return [extern.value]
        return list(execute_any(extern, [value_of(value) for value in action["args"]]))

    def expect(self, error, command, attempt):
        """`attempt` must raise exactly `error` with the command's text in front."""
        try:
            outcome = attempt()
        except error as caught:
            wanted = command.get("text", "")
            if self.group in STRICT_GROUPS and error is not Malformed and not same_text(str(caught), wanted):
                raise Failure("said %r, not %r" % (str(caught), wanted)) from None
            return
        raise Failure("%s (%s) wanted, not %r" % (command["type"], command.get("text"), outcome))

    def module(self, command):
        self.instances[None] = None
        self.enter(Instance(self.load(command), self.registered), command.get("name"))

    def module_definition(self, command):
        self.definitions[None] = self.definitions[command.get("name")] = self.load(command)

    def module_instance(self, command):
        self.enter(Instance(self.definitions[command.get("module")], self.registered), command.get("instance"))

    def register(self, command):
        self.registered[command["as"]] = self.instances[command.get("name")].exports

    def action(self, command):
        self.perform(command["action"])

    def assert_return(self, command):
        results, expected = self.perform(command["action"]), command["expected"]
        if len(results) != len(expected) or not all(map(matches, expected, results)):
            raise Failure("%r, not %r" % (results, expected))

    def assert_trap(self, command):
        self.expect(Trap, command, lambda: self.perform(command["action"]))

    def assert_exhaustion(self, command):
        self.expect(Exhaustion, command, lambda: self.perform(command["action"]))

    def assert_exception(self, command):
        self.expect(chibishim.Thrown, command, lambda: self.perform(command["action"]))

    def assert_invalid(self, command):
        self.expect(Invalid, command, lambda: self.load(command))

    def assert_malformed(self, command):
        # Later versions read encodings that were malformed before (64-bit limits, memory
        # indices), and refuse those modules as invalid.
        refused = Malformed if self.group in STRICT_GROUPS else (Malformed, Invalid)
        self.expect(refused, command, lambda: self.load(command))

    def assert_unlinkable(self, command):
        self.expect(Unlinkable, command, lambda: Instance(self.load(command), self.registered))

    def assert_uninstantiable(self, command):
        self.expect(Trap, command, lambda: Instance(self.load(command), self.registered))

    def assert_malformed_custom(self, command):
        raise NotApplicable("custom section of the text format")

    assert_invalid_custom = assert_malformed_custom


def same_text(actual, wanted):
    """As the reference interpreter compares: the suite's text is a prefix of the error's. What
    follows a colon is the reference interpreter's own wording."""
    return actual.startswith(wanted.partition(":")[0])


def out_of_time(number, frame):
    raise TimeoutError("no result after %d s" % COMMAND_SECONDS)


def superseded(file, command):
    if file.group == "core-3.0":
        return False
    return (command.get("text") in SUPERSEDED_TEXTS
            or (file.group, file.name, str(command["line"])) in era_conflicts())


@functools.lru_cache(None)
def era_conflicts():
    """(group, file, line) of the assertions that later versions decide the other way."""
    with open(os.path.join(SPEC, "ERA_CONFLICTS.tsv")) as rows:
        return {(row[0], row[1], row[3]) for row in (line.split("\t") for line in rows)}


def run_file(path):
    """(path, Counter of outcomes, [what failed]) of one file."""
    outcomes, failures = collections.Counter(), []
    signal.signal(signal.SIGALRM, out_of_time)
    file = File(path)
    for command in file.commands:
        if superseded(file, command):
            outcomes["superseded by a later version"] += 1
            continue
        signal.alarm(COMMAND_SECONDS)
        try:
            getattr(file, command["type"])(command)
            outcomes["passed"] += 1
        except NotApplicable as why:
            outcomes[str(why)] += 1
        except Exception as error:
            outcomes["failed"] += 1
            failures.append("%s/%s:%d %s: %s: %.300s" % (file.group, file.name, command["line"], command["type"],
                                                         error.__class__.__name__, error))
        finally:
            signal.alarm(0)
    return path, outcomes, failures


# -- files --


@functools.lru_cache(None)
def unpacked():
    """The folder with the unpacked suite, None where there is none."""
    return archives.unpacked(os.path.join(SPEC, "spec-json.tar.xz"))


def find_files(folder, names):
    """The JSON files below each of `names` (a directory, a group or GROUP/FILE)."""
    paths = []
    for name in names:
        start = name if os.path.isdir(name) else os.path.join(folder, name)
        for directory, _, files in os.walk(start):
            paths += [os.path.join(directory, file) for file in files if file.endswith(".json")]
    return sorted(paths)


@functools.lru_cache(None)
def features():
    """{(group, file): feature}, by the inventory."""
    with open(os.path.join(SPEC, "INVENTORY.tsv")) as rows:
        return {(row[0], row[1]): row[3] for row in (line.split("\t") for line in rows)}


def run(names=GROUPS):
    """Runs the files; returns ({(group, feature): Counter}, [what failed])."""
    folder = unpacked()
    totals, failures = {}, []
    paths = sorted(find_files(folder, names), key=os.path.getsize, reverse=True)
    with multiprocessing.Pool() as pool:
        for path, outcomes, failed in pool.imap_unordered(run_file, paths):
            key = tuple(os.path.normpath(path).split(os.sep)[-3:-1])
            totals.setdefault((key[0], features().get(key, "other")), collections.Counter()).update(outcomes)
            failures += failed
    return totals, sorted(failures)


def describe(outcomes):
    others = sorted(set(outcomes) - {"passed", "failed"})
    text = "%6d passed, %d failed" % (outcomes["passed"], outcomes["failed"])
    return text + "".join(", %d not applicable (%s)" % (outcomes[other], other) for other in others)


def main(arguments):
    verbose = "-v" in arguments
    if unpacked() is None:
        print("*** SKIPPED: no spec-json.tar.xz in %s (set SHARED)" % SPEC)
        return 0
    totals, failures = run([a for a in arguments if a != "-v"] or GROUPS)
    for failure in failures if verbose else failures[:20]:
        print(failure)
    if len(failures) > 20 and not verbose:
        print("… %d more, see -v" % (len(failures) - 20))
    whole = collections.Counter()
    for group, feature in sorted(totals):
        print("%-42s %s" % (group + " " + feature, describe(totals[group, feature])))
        whole.update(totals[group, feature])
    print("%-42s %s" % ("total", describe(whole)))
    return 1 if whole["failed"] or not whole["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
