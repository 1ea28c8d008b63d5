"""Filters of system calls, AppArmor and SELinux: the assembler against an interpreter of classic BPF, the numbers against
the machine's headers, the installed filter against the kernel."""

import ctypes
import errno
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest

import chibishim
from bundles import status_of
from chibishim import ConfigError, OCI_FIELDS, Setup, X32_BIT, check_fields, perform, plan_process, plan_seccomp, syscall_numbers
from conftest import ROOT

MACHINE = os.uname().machine
AUDIT = {"X86_64": 0xC000003E, "X32": 0xC000003E, "X86": 0x40000003, "AARCH64": 0xC00000B7, "ARM": 0x40000028, "RISCV64": 0xC00000F3}
ALLOW, KILL_PROCESS, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="*** not root: filters without no_new_privs are not tested")


def run(program, number, architecture, arguments=()):
    """What a filter returns for a call: an interpreter of the instructions that a filter may have."""
    arguments = list(arguments) + [0] * (6 - len(arguments))
    data = struct.pack("=iIQ6Q", number - (number >> 31 << 32), AUDIT[architecture], 0, *arguments)
    code = list(struct.iter_unpack("=HBBI", program))
    place = accumulator = 0
    for _ in range(len(code)):
        opcode, yes, no, k = code[place]
        place += 1
        if opcode == 0x20:
            assert k % 4 == 0
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif opcode == 0x54:
            accumulator &= k
        elif opcode == 0x05:
            place += k
        elif opcode in (0x15, 0x25, 0x35):
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k}[opcode]
            place += yes if holds else no
        elif opcode == 0x06:
            return k
        else:
            raise AssertionError("instruction %#x" % opcode)
    raise AssertionError("the program has no end")


def program_of(profile, machine="x86_64"):
    return plan_seccomp(profile, machine)[3]


def profile_of(*rules, default="SCMP_ACT_ERRNO", **more):
    """A profile of rules (names, action or errno, args…)."""
    syscalls = []
    for names, action, *args in rules:
        rule = {"names": names.split(), "action": "SCMP_ACT_ERRNO" if action.__class__ is int else "SCMP_ACT_" + action}
        if action.__class__ is int:
            rule["errnoRet"] = action
        if args:
            rule["args"] = [dict(zip(("index", "op", "value", "valueTwo"), (index, "SCMP_CMP_" + op, *values))) for index, op, *values in args]
        syscalls.append(rule)
    return {"defaultAction": default, "syscalls": syscalls, **more}


# --- the table ---

HEADERS = {"X86_64": ("x86_64-linux-gnu", "unistd_64.h"), "X86": ("x86_64-linux-gnu", "unistd_32.h"), "X32": ("x86_64-linux-gnu", "unistd_x32.h"),
           "ARM": ("arm-linux-gnueabihf", "unistd-eabi.h"), "AARCH64": ("aarch64-linux-gnu", "unistd_64.h"),
           "RISCV64": ("riscv64-linux-gnu", "unistd_64.h")}


@pytest.mark.parametrize("architecture", HEADERS)
def test_the_numbers_are_those_of_the_headers(architecture):
    paths = [os.path.join(*path) for path in (("/usr/include", HEADERS[architecture][0], "asm", HEADERS[architecture][1]),
                                              ("/usr", HEADERS[architecture][0], "include/asm", HEADERS[architecture][1]))]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        pytest.skip("%s is not here (Debian packages linux-libc-dev, linux-libc-dev-*-cross)" % paths[0])
    with open(path) as file:
        header = {name: int(number) for name, number in re.findall(r"#define __NR_([a-z_0-9]+)\s+\(?(?:__X32_SYSCALL_BIT \+ |__NR_SYSCALL_BASE ?\+ ?)?(\d+)", file.read())}
    ours = syscall_numbers(architecture)
    assert len(header) > 300
    assert {name: (number, ours.get(name)) for name, number in header.items() if ours.get(name) != number} == {}
    newest = max(number for number in header.values() if number < 512)
    late = {name for name, number in ours.items() if name not in header and number <= newest}
    obsolete = {"uselib", "create_module", "get_kernel_syms", "query_module", "nfsservctl", "vserver", "_sysctl",
                "epoll_ctl_old", "epoll_wait_old", "get_thread_area", "set_thread_area", "uprobe", "uretprobe", "memfd_secret"}
    assert late <= obsolete


@pytest.mark.parametrize("architecture", chibishim.ARCHITECTURES)
def test_no_number_has_two_names(architecture):
    numbers = syscall_numbers(architecture)
    assert all(re.fullmatch("[a-z_][a-z0-9_]*", name) for name in numbers)
    if architecture == "X32":           # x86-64's, some of which it does not have
        numbers = {name: number for name, number in numbers.items() if number < 400}
    assert len(set(numbers.values())) == len(numbers)


# --- the assembler ---

def test_the_default_and_what_is_named():
    program = program_of(profile_of(("read write exit_group", "ALLOW"), ("mseal", 7)))
    for name, number in syscall_numbers("X86_64").items():
        wanted = ALLOW if name in ("read", "write", "exit_group") else 0x50007 if name == "mseal" else ENOSYS if number > 462 else EPERM
        assert run(program, number, "X86_64") == wanted, name
    assert run(program, 0, "X86") == KILL_PROCESS       # an architecture that the profile does not name
    assert run(program, 0x40000000, "X86_64") == KILL_PROCESS
    assert run(program, 0xFFFFFFFF, "X86_64") == KILL_PROCESS


def test_a_call_newer_than_the_profile_does_not_exist():
    for default, beyond in (("SCMP_ACT_ERRNO", ENOSYS), ("SCMP_ACT_KILL", ENOSYS), ("SCMP_ACT_ALLOW", ALLOW), ("SCMP_ACT_LOG", 0x7FFC0000)):
        program = program_of(profile_of(("read faccessat2", "ALLOW"), default=default))
        assert run(program, 440, "X86_64") == run(program, 0x3FFFFFFF, "X86_64") == beyond
    assert run(program_of(profile_of()), 500, "X86_64") == EPERM        # nothing is named: nothing is known


def test_the_architectures():
    names = ["SCMP_ARCH_" + name for name in ("X86_64", "X86", "X32", "S390X")]
    program = program_of(profile_of(("openat ioctl", "ALLOW"), architectures=names))
    for architecture, bit in (("X86_64", 0), ("X86", 0), ("X32", 0x40000000)):
        numbers = syscall_numbers(architecture)
        assert run(program, bit + numbers["openat"], architecture) == run(program, bit + numbers["ioctl"], architecture) == ALLOW
        assert run(program, bit + numbers["mount"], architecture) == EPERM
    assert run(program, 0x40000000 + 16, "X32") == EPERM                # ioctl, but of x86-64
    assert run(program, 56, "ARM") == KILL_PROCESS
    program = program_of(profile_of(("openat", "ALLOW"), architectures=["SCMP_ARCH_ARM"]), "aarch64")
    assert run(program, 56, "AARCH64") == run(program, 322, "ARM") == ALLOW
    assert run(program, 322, "AARCH64") == ENOSYS
    assert run(program_of(profile_of(("openat", "ALLOW")), "riscv64"), 56, "RISCV64") == ALLOW


INTERESTING = [0, 1, 5, 40, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 32) + 5, 5 << 32, 0xFFFFFFFF00000000, (1 << 64) - 1]
OPERATORS = {"NE": lambda a, v, w: a != v, "LT": lambda a, v, w: a < v, "LE": lambda a, v, w: a <= v, "EQ": lambda a, v, w: a == v,
             "GE": lambda a, v, w: a >= v, "GT": lambda a, v, w: a > v, "MASKED_EQ": lambda a, v, w: a & v == w}


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_is_unsigned_and_64_bits_wide(operator):
    for value in INTERESTING:
        for second in INTERESTING if operator == "MASKED_EQ" else [0]:
            program = program_of(profile_of(("read", "ALLOW", (5, operator, value, second))))
            for argument in INTERESTING:
                wanted = ALLOW if OPERATORS[operator](argument, value, second) else EPERM
                assert run(program, 0, "X86_64", [7] * 5 + [argument]) == wanted, (argument, value, second)


def test_an_argument_of_32_bits_is_compared_as_one():
    program = program_of(profile_of(("read", 5, (0, "EQ", (1 << 64) - 1)), ("write", 6, (0, "LT", 1 << 32)), ("close", 7, (0, "MASKED_EQ", 1 << 40 | 2, 2)),
                                    default="SCMP_ACT_ALLOW", architectures=["SCMP_ARCH_X86"]))
    assert [run(program, call, "X86", [argument]) for call, argument in ((3, 0xFFFFFFFF), (3, 1), (4, 0xFFFFFFFF), (6, 3), (6, 4))] == [
        0x50005, ALLOW, 0x50006, 0x50007, ALLOW]
    assert run(program, 0, "X86_64", [0xFFFFFFFF]) == ALLOW


def test_conditions_are_anded_rules_are_ored_and_one_argument_twice_is_two_rules():
    both = program_of(profile_of(("read", "ALLOW", (0, "EQ", 1), (1, "EQ", 2))))
    either = program_of(profile_of(("read", "ALLOW", (0, "EQ", 1)), ("read", "ALLOW", (1, "EQ", 2))))
    twice = program_of(profile_of(("read", "ALLOW", (0, "EQ", 1), (0, "EQ", 2))))
    answers = [[run(program, 0, "X86_64", arguments) == ALLOW for arguments in ([1, 2], [1, 0], [0, 2], [2, 0])] for program in (both, either, twice)]
    assert answers == [[True, False, False, False], [True, True, True, False], [True, True, False, True]]


def test_of_several_rules_the_strictest_wins_in_any_order():
    rules = [("socket", "ALLOW"), ("socket", 97, (0, "EQ", 38)), ("socket", "KILL_PROCESS", (0, "EQ", 38), (1, "EQ", 5))]
    for _ in range(6):
        random.shuffle(rules)
        program = program_of(profile_of(*rules))
        assert [run(program, 41, "X86_64", arguments) for arguments in ([2, 5], [38], [38, 5])] == [ALLOW, 0x50000 | 97, KILL_PROCESS]
    assert run(program_of(profile_of(("read", "ALLOW"), ("read", 5))), 0, "X86_64") == 0x50005


def test_socketcall_is_no_way_round():
    """What 32-bit x86 can ask of socketcall(2) and ipc(2) instead."""
    x86 = {"architectures": ["SCMP_ARCH_X86"]}
    program = program_of(profile_of(("socket shmget", "ERRNO"), default="SCMP_ACT_ALLOW", **x86))
    assert [run(program, 102, "X86", [call]) for call in (1, 2)] == [EPERM, ALLOW]
    assert [run(program, 117, "X86", [call]) for call in (23, 0x10017, 24)] == [EPERM, EPERM, ALLOW]
    program = program_of(profile_of(("socket send", "ALLOW"), **x86))
    assert [run(program, 102, "X86", [call]) for call in (1, 2, 9)] == [ALLOW, EPERM, ALLOW]
    program = program_of(profile_of(("socket", 97, (0, "EQ", 38)), default="SCMP_ACT_ALLOW", **x86))
    assert run(program, 102, "X86", [1]) == 0x50000 | 97                # it cannot see the family: none
    program = program_of(profile_of(("socket", "ALLOW", (0, "NE", 38)), **x86))
    assert run(program, 102, "X86", [1]) == EPERM
    assert run(program, 359, "X86", [2]) == ALLOW


def expected(profile, name, arguments):
    """A profile's answers by its own words, for a call that it names: of errnos there may be several."""
    answers = []
    for rule in profile["syscalls"]:
        if name in rule["names"]:
            tests = [OPERATORS[c["op"][9:]](arguments[c["index"]], c["value"], c.get("valueTwo", 0)) for c in rule.get("args") or ()]
            indices = [c["index"] for c in rule.get("args") or ()]
            if (any if len(set(indices)) < len(indices) else all)(tests):
                answers.append(chibishim.seccomp_action(rule["action"], rule.get("errnoRet"), ""))
    default = chibishim.seccomp_action(profile["defaultAction"], profile.get("defaultErrnoRet"), "", "default")
    strictest = min(map(chibishim.strictness, answers), default=None)
    return [action for action in answers if chibishim.strictness(action) == strictest] or [default]


def test_random_profiles_mean_what_they_say():
    """Among them programs with jumps of more than 255 instructions."""
    generator = random.Random(1)
    names = sorted(set(syscall_numbers("X86_64")))
    for round in range(40):
        rules = []
        for _ in range(generator.choice([1, 5, 60, 250])):
            args = [(generator.randrange(6), generator.choice(list(OPERATORS)), generator.choice(INTERESTING), generator.choice(INTERESTING))
                    for _ in range(generator.choice([0, 0, 1, 1, 2, 3]))]
            rules.append((" ".join(generator.sample(names, generator.choice([1, 1, 2, 30]) if not args else 1)),
                          generator.choice(["ALLOW", "KILL", "LOG", "TRAP", 1, 38]), *args))
        profile = profile_of(*rules, default=generator.choice(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"]))
        program = program_of(profile)
        for name in {name for rule in profile["syscalls"] for name in rule["names"]}:
            for _ in range(8):
                arguments = [generator.choice(INTERESTING) for _ in range(6)]
                assert run(program, syscall_numbers("X86_64")[name], "X86_64", arguments) in expected(profile, name, arguments), (round, name)


def test_a_big_profile_takes_time_and_instructions_in_proportion():
    names, seconds, sizes = list(syscall_numbers("X86_64")), [], []
    for step in 20, 2:
        profile = profile_of((" ".join(names[::step] + ["no_such_call"]), "ALLOW"), ("clone", "ALLOW", (0, "MASKED_EQ", 2114060288, 0)),
                             architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
        times = []
        for _ in range(5):
            began = time.process_time()
            program = program_of(profile)
            times.append(time.process_time() - began)
        seconds.append(min(times))
        sizes.append(len(program))
    assert seconds[1] < 30 * seconds[0] and sizes[1] < 10 * sizes[0]


# --- what is refused ---

@pytest.mark.parametrize("change, field", [
    ({"defaultAction": "SCMP_ACT_PERHAPS"}, "linux.seccomp.defaultAction"),
    ({"defaultAction": None}, "linux.seccomp.defaultAction"),
    ({"defaultAction": "SCMP_ACT_NOTIFY"}, "listener"),
    ({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}, "linux.seccomp.defaultAction"),
    ({"defaultErrnoRet": -1}, "linux.seccomp.defaultErrnoRet"),
    ({"defaultErrnoRet": "EPERM"}, "linux.seccomp.defaultErrnoRet"),
    ({"architectures": ["SCMP_ARCH_Z80"]}, "linux.seccomp.architectures"),
    ({"architectures": "SCMP_ARCH_X86"}, "linux.seccomp.architectures"),
    ({"flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}, "linux.seccomp.flags"),
    ({"listenerPath": "/run/agent.sock"}, "linux.seccomp.listenerPath"),
    ({"denyEverything": True}, "linux.seccomp.denyEverything"),
    ({"syscalls": [{"names": [], "action": "SCMP_ACT_ALLOW"}]}, "linux.seccomp.syscalls[0].names"),
    ({"syscalls": [{"names": ["read"]}]}, "linux.seccomp.syscalls[0].action"),
    ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "errnoRet": 1}]}, "linux.seccomp.syscalls[0].action"),
    ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 70000}]}, "linux.seccomp.syscalls[0].errnoRet"),
    ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "unless": 1}]}, "linux.seccomp.syscalls[0].unless"),
    ({"syscalls": [{"names": [7], "action": "SCMP_ACT_ERRNO"}]}, "linux.seccomp.syscalls[0].names[0]"),
    ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "op": "SCMP_CMP_EQ"}]}]}, "linux.seccomp.syscalls[0].args[0].index"),
    ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "op": "SCMP_CMP_ISH"}]}]}, "linux.seccomp.syscalls[0].args[0].op"),
    ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0}]}]}, "linux.seccomp.syscalls[0].args[0].op"),
    ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "op": "SCMP_CMP_EQ", "value": -1}]}]}, "linux.seccomp.syscalls[0].args[0].value"),
    ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "op": "SCMP_CMP_EQ", "size": 4}]}]}, "linux.seccomp.syscalls[0].args[0].size"),
])
def test_an_error_names_the_field(change, field):
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [], **change}
    with pytest.raises(ConfigError, match=re.escape(field)):
        check_fields({"linux": {"seccomp": profile}}, OCI_FIELDS, "", "config.json")
        plan_seccomp(profile, "x86_64")


def test_an_empty_profile_is_an_error_and_none_is_none():
    with pytest.raises(ConfigError, match="linux.seccomp.defaultAction"):
        plan_process({"args": ["x"]}, {"seccomp": {}})
    assert "seccomp" not in [step[0] for step in plan_process({"args": ["x"]}, {})]


def test_an_unknown_machine_and_a_program_too_long():
    with pytest.raises(ConfigError, match="linux.seccomp.*pdp11"):
        plan_seccomp(profile_of(), "pdp11")
    rules = [("read", "ALLOW", *((index, "EQ", value << 32 | index) for index in range(6))) for value in range(400)]
    with pytest.raises(ConfigError, match="instructions"):
        plan_seccomp(profile_of(*rules), "x86_64")


# --- the kernel ---

def in_child(function):
    """The wait status of a child that runs the function; its result, 0…255, is the exit status."""
    pid = os.fork()
    if not pid:
        status = 250
        try:
            status = function()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def errno_of(name, *arguments):
    """The errno of a system call, 0 for success."""
    return errno_of_number(syscall_numbers(chibishim.MACHINES[MACHINE][0])[name], *arguments)


def errno_of_number(number, *arguments):
    ctypes.set_errno(0)
    LIBC.syscall(number, *arguments)
    return ctypes.get_errno()


LIBC = ctypes.CDLL(None, use_errno=True)
MOST = " ".join(name for name in syscall_numbers(chibishim.MACHINES.get(MACHINE, ["X86_64"])[0]) if name not in ("getppid", "sync", "mount"))


def install(profile, no_new_privs=True):
    """Does in this process what a container's child does."""
    steps = plan_process({"args": ["/bin/true"], "noNewPrivileges": no_new_privs}, {"seccomp": profile})
    steps = [step for step in steps if step[0] in ("no_new_privs", "seccomp", "bounding", "capabilities")]
    assert [step[0] for step in steps] == (["bounding", "capabilities", "no_new_privs", "seccomp"] if no_new_privs else
                                           ["seccomp", "bounding", "capabilities"])
    perform(steps, Setup(None, None, None, -1, -1))


needs_filters = pytest.mark.skipif(MACHINE not in chibishim.MACHINES or not os.path.exists("/proc/sys/kernel/seccomp"),
                                   reason="*** no filters of system calls here: NOT tested against the kernel")


@needs_filters
@needs_root
@pytest.mark.parametrize("no_new_privs", [True, False])
def test_the_kernel_holds_it(no_new_privs):
    def child():
        install(profile_of((MOST, "ALLOW"), ("sync", 99), ("lseek", 77, (2, "EQ", 5)), ("kcmp", "KILL_PROCESS")), no_new_privs)
        assert errno_of("getppid") == errno.EPERM and errno_of("sync") == 99
        assert errno_of("lseek", 0, 0, 5) == 77 and errno_of("lseek", -1, 0, 0) == errno.EBADF
        with open("/proc/self/status") as file:
            assert "Seccomp:\t2\n" in file.read()
        errno_of("kcmp", 0, 0, 0, 0, 0)
        return 9
    assert in_child(child) == signal.SIGSYS


def call_of_32_bits(number):
    """int 0x80 from this process: the kernel takes it for a call of 32-bit x86."""
    code = b"\x53\x31\xdb\xb8" + struct.pack("=I", number) + b"\xcd\x80\x5b\xc3"      # push rbx; ebx = 0; eax = number; int; pop; ret
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()


@needs_filters
@pytest.mark.skipif(MACHINE != "x86_64", reason="the other calls of x86-64")
def test_the_kernel_tells_the_architectures_apart():
    def child(profile, function):
        perform([("no_new_privs",), plan_seccomp(profile, MACHINE)], None)
        return function()
    if in_child(lambda: call_of_32_bits(20) == os.getpid()) != 1 << 8:
        pytest.skip("this kernel runs no 32-bit programs")
    docker, alone = default_profile("docker"), profile_of((MOST, "ALLOW"))
    assert in_child(lambda: child(docker, lambda: call_of_32_bits(20) == os.getpid())) == 1 << 8        # getpid
    assert in_child(lambda: child(docker, lambda: -call_of_32_bits(21))) == errno.EPERM << 8            # mount
    assert in_child(lambda: child(docker, lambda: errno_of_number(X32_BIT | 165))) == errno.EPERM << 8  # x32's mount
    assert in_child(lambda: child(alone, lambda: call_of_32_bits(20))) == signal.SIGSYS
    assert in_child(lambda: child(alone, lambda: errno_of_number(X32_BIT | 39))) == signal.SIGSYS


@needs_filters
def test_flags_and_log():
    flags = ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
    profile = profile_of((MOST, "ALLOW"), ("getppid", "LOG"), flags=flags)

    def child():
        perform([("no_new_privs",), plan_seccomp(profile, MACHINE)], Setup(None, None, None, -1, -1))
        return errno_of("getppid")
    assert in_child(child) == 0


@needs_filters
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up root")
def test_a_filter_that_the_kernel_refuses_is_an_error():
    def child():
        os.setresuid(1, 1, 1)           # neither CAP_SYS_ADMIN nor no_new_privs
        try:
            perform([plan_seccomp(profile_of((MOST, "ALLOW")), MACHINE)], Setup(None, None, None, -1, -1))
        except chibishim.ContainerError as error:
            return 33 if "linux.seccomp" in str(error) and "ermission denied" in str(error) else 34
    assert in_child(child) >> 8 == 33


# --- the profiles that arrive ---

# As Docker 28.5 and ctr 2.1 (--seccomp) write them into config.json, x86-64.
def default_path(name):
    return os.path.join(ROOT, "tests", "profiles", name + ".json")


def default_profile(name):
    with open(default_path(name)) as file:
        return json.load(file)


@pytest.mark.parametrize("name", ["docker", "containerd"])
def test_a_default_profile_means_what_it_says(name):
    profile = default_profile(name)
    program = program_of(profile)
    generator = random.Random(2)
    for architecture, bit in (("X86_64", 0), ("X86", 0), ("X32", X32_BIT)):
        numbers = syscall_numbers(architecture)
        for call in {call for rule in profile["syscalls"] for call in rule["names"] if call in numbers}:
            for flags in (0, 1, 8, 38, 40, 131072, 2114060288, 0x10000000, 0xFFFFFFFF, generator.getrandbits(32)):
                assert run(program, bit + numbers[call], architecture, [flags]) in expected(profile, call, [flags] + [0] * 5), (architecture, call, flags)
        for call in ("mount", "umount2", "reboot", "init_module", "kexec_load", "keyctl", "setns", "unshare", "swapon"):
            assert run(program, bit + numbers[call], architecture) in (EPERM, ENOSYS), (architecture, call)


LOOP = """(module (memory (export "memory") 1)
  (func (export "_start") (local i32 i32)
    (loop (local.set 1 (i32.add (local.get 1) (i32.mul (local.get 0) (i32.const 3))))
      (br_if 0 (i32.lt_u (local.tee 0 (i32.add (local.get 0) (i32.const 1))) (i32.const 300000))))
    (if (i32.ne (local.get 1) (i32.const 1855563824)) (then unreachable))))"""


@needs_filters
@needs_root
@pytest.mark.skipif(MACHINE != "x86_64", reason="the profiles are x86-64's")
@pytest.mark.parametrize("tier", ["interpreter", "native"])
@pytest.mark.parametrize("name", ["docker", "containerd"])
def test_the_engine_works_under_a_default_profile(wat, tmp_path, name, tier):
    """With everything it has: no fallback, and nothing is imported afterwards."""
    module = tmp_path / "loop.wasm"
    module.write_bytes(wat(LOOP))
    done = subprocess.run([sys.executable, "-IS", "-c", UNDER_A_FILTER, ROOT, default_path(name), str(module), tier], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


UNDER_A_FILTER = """if True:
    import json, sys
    root, profile, module, tier = sys.argv[1:]
    sys.path.insert(0, root)
    import chibishim
    from chibishim import libc, os
    libc.prctl(chibishim.PR_SET_NAME, b"chibishim", 0, 0, 0)        # as before a fork
    with open(module, "rb") as file, open(profile) as other:
        module, profile = file.read(), json.load(other)
    step = chibishim.plan_seccomp(profile, os.uname().machine)
    chibishim.perform([step], chibishim.Setup(None, None, None, -1, -1))
    try:
        libc.umount2(b"/nowhere", 0)
        raise AssertionError("it does not hold")
    except PermissionError:
        pass
    descriptor = os.open("/", chibishim.O_PATH)
    libc.syscall(chibishim.SYS_OPENAT2, descriptor, b"proc", chibishim.HOW, len(chibishim.HOW))
    before = set(sys.modules)
    status = chibishim.run_command(module, ["loop"], [], [("/", "/")], tier=tier)
    assert set(sys.modules) - before <= set(sys.builtin_module_names), set(sys.modules) - before
    assert (chibishim.Tier.machine is not None) == (tier == "native"), chibishim.Tier.refusal
    sys.exit(status)
"""


# --- through the shim ---

@needs_filters
@needs_root
@pytest.mark.parametrize("no_new_privs", [True, False])
def test_a_guest_runs_under_dockers_profile(bundle, no_new_privs):
    bundle.config["linux"]["seccomp"] = default_profile("docker")
    bundle.config["process"]["noNewPrivileges"] = no_new_privs
    pid = bundle.start().create()
    with open("/proc/%d/status" % pid) as file:
        assert "\nSeccomp:\t2\n" in file.read()
    bundle.call("Start")
    bundle.call("Kill", signal=15)
    assert bundle.call("Wait")["exit_status"] == 143


@needs_filters
@needs_root
def test_an_exec_gets_the_containers_filter(bundle):
    bundle.config["linux"]["seccomp"] = default_profile("docker")
    bundle.start().create()
    bundle.call("Start")
    spec = json.dumps(dict(bundle.config["process"], args=["/guest.wasm", "z"])).encode()
    bundle.call("Exec", exec_id="e1", spec={"type_url": "", "value": spec})
    pid = bundle.call("Start", exec_id="e1")["pid"]
    with open("/proc/%d/status" % pid) as file:
        assert "\nSeccomp:\t2\n" in file.read()
    bundle.call("Kill", signal=9)
    bundle.call("Wait")


@needs_filters
@needs_root
@pytest.mark.parametrize("no_new_privs", [True, False])
def test_the_root_of_a_user_namespace_may_install_it(mapped, no_new_privs):
    mapped.config["linux"]["seccomp"] = default_profile("docker")
    mapped.config["process"]["noNewPrivileges"] = no_new_privs
    pid = mapped.start().create()
    mapped.call("Start")
    mapped.call("Exec", exec_id="x", spec={"value": json.dumps(mapped.config["process"]).encode()})
    for process in pid, mapped.call("Start", exec_id="x")["pid"]:
        assert status_of(process, "Seccomp") == ["2"] and status_of(process, "Uid")[0] == "100000"


@needs_root
def test_create_fails_where_the_filter_cannot_be_made(bundle):
    bundle.config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_MAYBE"}]}
    bundle.start()
    assert "linux.seccomp.syscalls[0].action" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


@needs_filters
@needs_root
def test_create_fails_where_the_filter_forbids_our_own_calls(bundle):
    """The error arrives, and names the step; the guest does not run."""
    bundle.config["linux"]["seccomp"] = profile_of(("chdir", "ERRNO"), default="SCMP_ACT_ALLOW")
    bundle.config["process"]["noNewPrivileges"] = False
    bundle.start()
    assert "cwd" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


# --- AppArmor and SELinux ---

def enabled(path, word):
    """Whether the kernel has one of the two, by what it says of itself."""
    return word in chibishim.read_text(path, "none").split()


APPARMOR = enabled("/sys/module/apparmor/parameters/enabled", "Y")
SELINUX = enabled("/proc/filesystems", "selinuxfs")
PROFILE = "chibitest flags=(attach_disconnected) { file, network, capability, signal, ptrace, mount, deny /etc/** w, }"


def test_the_way_to_the_labels_is_opened_first_and_they_are_given_last():
    config = chibishim.default_config("guest.wasm", [], [], [], False)
    config["process"].update(apparmorProfile="docker-default", selinuxLabel="system_u:system_r:container_t:s0")
    config["linux"]["seccomp"] = profile_of(("read", "ALLOW"))
    steps = chibishim.plan(config, "/b", "/b/rootfs")
    assert steps[:2] == [(name, "docker-default", "system_u:system_r:container_t:s0") for name in ("check_labels", "open_labels")]
    assert [step[0] for step in steps][-4:] == ["no_new_privs", "payload", "labels", "seccomp"]
    for nothing in ({}, {"apparmorProfile": ""}, {"apparmorProfile": "unconfined", "selinuxLabel": ""}):
        assert chibishim.plan_labels(nothing) == []


@pytest.mark.parametrize("kind, texts", [("native", [b"exec p", b"u:r:t"]), ("wasm", [b"changeprofile p", b"u:r:t"])])
def test_each_payload_gets_its_own_label(kind, texts, tmp_path):
    """With files in the place of the kernel's."""
    setup = chibishim.Setup(None, None, None, -1, -1)
    proc = os.open(tmp_path, os.O_PATH)
    for directory, texts_of_files in (("apparmor", ("exec p", "changeprofile p")), ("selinux", ("u:r:t", "u:r:t"))):
        (tmp_path / directory).mkdir()
        for name in ("exec", "current"):
            (tmp_path / directory / name).touch()
        chibishim.open_label(setup, directory, proc, directory, *texts_of_files)
    os.close(proc)
    setup.payload = (kind, None, None)
    chibishim.do_labels(setup)
    written, other = ("exec", "current") if kind == "native" else ("current", "exec")
    assert [(tmp_path / directory / written).read_bytes() for directory in ("apparmor", "selinux")] == texts
    assert [(tmp_path / directory / other).read_bytes() for directory in ("apparmor", "selinux")] == [b"", b""]
    for _, fd, _ in setup.labels:
        with pytest.raises(OSError):
            os.fstat(fd)


@needs_root
@pytest.mark.parametrize("source, target, type, error", [
    ("tmpfs", "/proc", "tmpfs", "no proc file system"), ("/proc/sys", "/proc", None, "no proc file system"),
    ("/proc/self/sched", "/proc/self/attr/exec", None, os.strerror(errno.EXDEV)), (None, None, None, None)])
def test_a_label_goes_to_the_kernel_or_nowhere(source, target, type, error):
    "CVE-2019-16884, CVE-2019-19921: what an exec finds at /proc may be anything"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            chibishim.libc.unshare(chibishim.CLONE_NEWNS)
            chibishim.mount(None, "/", None, chibishim.MS_PRIVATE | chibishim.MS_REC)
            if source:
                chibishim.mount(source, target, type, 0 if type else chibishim.MS_BIND)
            chibishim.perform([("open_labels", "", "u:r:t")], chibishim.Setup(None, None, None, -1, -1))
        except chibishim.ContainerError as caught:
            os.write(write, str(caught).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    assert error in text if error else text == ""


@needs_root
@pytest.mark.skipif(APPARMOR, reason="this kernel has AppArmor")
def test_create_fails_without_apparmor_in_the_kernel(bundle):
    bundle.config["process"]["apparmorProfile"] = "docker-default"
    bundle.start()
    text = bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    assert "process.apparmorProfile docker-default" in text and "AppArmor" in text


@needs_root
@pytest.mark.skipif(SELINUX, reason="this kernel has SELinux")
def test_create_fails_without_selinux_in_the_kernel(bundle):
    bundle.config["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0"
    bundle.start()
    text = bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    assert "process.selinuxLabel system_u:system_r:container_t:s0" in text and "SELinux" in text


@needs_root
def test_unconfined_needs_nothing_of_the_kernel(bundle):
    bundle.config["process"]["apparmorProfile"] = "unconfined"
    bundle.start().create()


@pytest.fixture
def profile():
    """An AppArmor profile, loaded."""
    parser = shutil.which("apparmor_parser")
    if not parser:
        pytest.skip("apparmor_parser (Debian package apparmor) is not installed")
    subprocess.run([parser, "-K", "-r"], input=b"profile " + PROFILE.encode(), check=True)
    yield "chibitest"
    subprocess.run([parser, "-K", "-R"], input=b"profile " + PROFILE.encode(), check=True)


@needs_root
@pytest.mark.skipif(not APPARMOR, reason="no AppArmor in this kernel: NOT tested")
def test_apparmor_confines_guests_programs_and_execs(bundle, profile):
    def label(pid):
        with open("/proc/%d/attr/current" % pid) as file:
            return file.read().strip()
    bundle.config["process"]["apparmorProfile"] = profile
    pid = bundle.start().create()
    bundle.call("Start")
    assert label(pid) == profile + " (enforce)"
    shutil.copy("/bin/busybox", os.path.join(bundle.path, "rootfs"))
    for id, args in (("native", ["/busybox", "sleep", "100"]), ("wasm", ["/guest.wasm", "z"])):
        spec = json.dumps(dict(bundle.config["process"], args=args)).encode()
        bundle.call("Exec", exec_id=id, spec={"type_url": "", "value": spec})
        assert label(bundle.call("Start", exec_id=id)["pid"]) == profile + " (enforce)"
    bundle.call("Kill", signal=9)
    bundle.call("Wait")


@needs_root
@pytest.mark.skipif(not APPARMOR, reason="no AppArmor in this kernel: NOT tested")
def test_create_fails_for_a_profile_that_is_not_loaded(bundle):
    bundle.config["process"]["apparmorProfile"] = "no-such-profile"
    bundle.start()
    assert "process.apparmorProfile no-such-profile: no such profile is loaded" in bundle.fails(
        chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
