"""chibishim: a containerd shim that runs WebAssembly containers, in one module.

The module reads bottom-up: a chapter uses only chapters before it, save that a
module is checked and an instance is run by chapters 11 and 12. Sections in brackets are
those of the WebAssembly core specification, release 3.0; below, too, where no other
document is named.

   1  Errors                  one exception class for each phase
   2  Bytes                   a cursor: LEB128, names, vectors (5.2)
   3  Protobuf                message tables, encode, decode
   4  ttrpc                   frames, requests, responses: bytes in, bytes out
   5  WebAssembly types       number, reference and defined types, subtyping (2.3, 3.3)
   6  Instructions            the table: one row per instruction (5.4)
   7  Numerics                integer and float operations (4.3)
   8  Handlers                from a row of the table to a function (4.6)
   9  Modules                 the binary format of everything but bodies (5.5, 3.5)
  10  Store and instances     memories, tables, globals, linking (4.2, 4.7)
  11  Validation, translation one pass from bytes to basic blocks (3.4)
  12  Interpreter             the loop that executes blocks (4.6)
  13  Portable tier           hot functions as source of Python
  14  Processors              the C library, files' names; assemblers for x86-64 and aarch64
  15  Native tier             hot functions as machine code; to be skipped at first
  16  Reading and debugging   disassembly, offsets in backtraces, tracing, fuel
  17  WASI                    preview 1: what a guest can do to the world
  18  Linux                   system calls that os lacks, mounts, the event loop
  19  OCI configuration       config.json to a list of set-up operations
  20  Cgroups                 limits, metrics, killing (versions 1 and 2)
  21  Container process       the operations, the payload, the guest's process
  22  Task service            what containerd asks of a shim
  23  Shim process            start, delete, the daemon, events
  24  Without containerd      container, image, inspect
  25  Command line            run, and everything above by name
"""

import _struct as struct
import _weakref as weakref
import errno
import fcntl
import mmap
import posix as os                      # os without its Python half, which takes a fifth of the start of a process
import select
import sys
import time
from math import ceil, copysign, floor, sqrt

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
    """An import is missing or has another type (section 4.7.2)."""


class Trap(WasmError):
    """Execution stopped abnormally (section 4.2.2). `backtrace` lists the active
    calls as (Function, offset in the module), innermost first."""

    backtrace = ()


class Exhaustion(Trap):
    """A limit of this implementation was reached: the call stack, most often."""


class Timeout(Exhaustion):
    """The time that the embedder granted is over; raised wherever the guest is."""


class Thrown(WasmError):
    """An exception of the guest (section 4.2.16): a tag and its values. It is what an
    exnref refers to, and what the embedder gets where the guest has no handler."""

    def __init__(self, tag, values):
        super().__init__("uncaught exception")
        self.tag, self.values, self.backtrace = tag, tuple(values), ()


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
        position = self.position
        if position >= self.end:
            raise Malformed("unexpected end")
        byte = self.data[position]
        self.position = position + 1
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
        byte = self.byte()
        if byte < 0x80:
            return byte - (byte << 1 & 0x80)
        data, position, result = self.data, self.position, byte & 0x7F
        for shift in range(7, bits, 7):
            if position >= self.end:
                raise Malformed("unexpected end")
            byte = data[position]
            position += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                self.position = position
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

    def count(self, limit, what):
        """The count that a vector of `what` begins with."""
        count = self.unsigned()
        if count > limit:
            raise Invalid("%d %s: at most %d" % (count, what, limit))
        return count

    def vector(self, item, limit=MAX_U32, what=""):
        """vec(B): a count and that many items, each read by `item()`."""
        return [item() for _ in range(self.count(limit, what))]


# === 3. Protobuf ==============================================================
#
# containerd speaks protocol buffers. A message here is a dict from field names to
# values, its shape one row of MESSAGES; `encode` and `decode` know nothing else.
# The proto3 rules that matter: a field with its default value is absent on the wire,
# fields may come in any order, the last one wins, unknown ones are skipped. (Of a message
# that comes twice the last one wins, too: others merge them, but nobody sends it twice.
# protobuf.dev/programming-guides/encoding)
#
# A field is (number, name, type). Types: the scalars below, the name of another
# message, or either in a list for a repeated field, which for numbers is packed;
# map<string, string> is a list of Pair. After `decode` every field of the message is
# there: 0, False, "", b"", [] or, for a message that was absent, None.


class ProtobufError(Exception):
    """The bytes are no message of that type."""


VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5                       # wire types
MAX_VARINT_BYTES = 10
SCALARS = {                             # type -> (wire type, default)
    "uint": (VARINT, 0), "int": (VARINT, 0), "bool": (VARINT, False),
    "string": (LENGTH, ""), "bytes": (LENGTH, b""), "double": (FIXED64, 0.0),
}


def fields(text):
    """Field rows from 'number name type, …'; a type in brackets is repeated."""
    rows = []
    for field in text.split(","):
        number, name, type = field.split()
        rows.append((int(number), name, [type[1:-1]] if type[0] == "[" else type))
    return tuple(rows)


MESSAGES = {
    # google/protobuf, google/rpc
    "Empty": "",
    "Any": "1 type_url string, 2 value bytes",
    "Timestamp": "1 seconds int, 2 nanos int",
    "Status": "1 code int, 2 message string",
    "Pair": "1 key string, 2 value string",
    # ttrpc's envelopes
    "Request": "1 service string, 2 method string, 3 payload bytes, 4 timeout_nano int, 5 metadata [Pair]",
    "Response": "1 status Status, 2 payload bytes",
    # containerd.task.v2 and v3: the same messages
    "Mount": "1 type string, 2 source string, 3 target string, 4 options [string]",
    "StateRequest": "1 id string, 2 exec_id string",
    "StateResponse": "1 id string, 2 bundle string, 3 pid uint, 4 status uint, 5 stdin string, 6 stdout string, "
                     "7 stderr string, 8 terminal bool, 9 exit_status uint, 10 exited_at Timestamp, 11 exec_id string",
    "CreateTaskRequest": "1 id string, 2 bundle string, 3 rootfs [Mount], 4 terminal bool, 5 stdin string, 6 stdout string, "
                         "7 stderr string, 8 checkpoint string, 9 parent_checkpoint string, 10 options Any",
    "CreateTaskResponse": "1 pid uint",
    "StartRequest": "1 id string, 2 exec_id string",
    "StartResponse": "1 pid uint",
    "DeleteRequest": "1 id string, 2 exec_id string",
    "DeleteResponse": "1 pid uint, 2 exit_status uint, 3 exited_at Timestamp",
    "PidsRequest": "1 id string",
    "ProcessInfo": "1 pid uint, 2 info Any",
    "PidsResponse": "1 processes [ProcessInfo]",
    "PauseRequest": "1 id string",
    "ResumeRequest": "1 id string",
    "CheckpointTaskRequest": "1 id string, 2 path string, 3 options Any",
    "KillRequest": "1 id string, 2 exec_id string, 3 signal uint, 4 all bool",
    "ExecProcessRequest": "1 id string, 2 exec_id string, 3 terminal bool, 4 stdin string, 5 stdout string, 6 stderr string, "
                          "7 spec Any",
    "ResizePtyRequest": "1 id string, 2 exec_id string, 3 width uint, 4 height uint",
    "CloseIORequest": "1 id string, 2 exec_id string, 3 stdin bool",
    "UpdateTaskRequest": "1 id string, 2 resources Any, 3 annotations [Pair]",
    "WaitRequest": "1 id string, 2 exec_id string",
    "WaitResponse": "1 exit_status uint, 2 exited_at Timestamp",
    "StatsRequest": "1 id string",
    "StatsResponse": "1 stats Any",
    "ConnectRequest": "1 id string",
    "ConnectResponse": "1 shim_pid uint, 2 task_pid uint, 3 version string",
    "ShutdownRequest": "1 id string, 2 now bool",
    "ProcessDetails": "1 exec_id string",
    # containerd.services.events.ttrpc.v1 and containerd.events
    "ForwardRequest": "1 envelope Envelope",
    "Envelope": "1 timestamp Timestamp, 2 namespace string, 3 topic string, 4 event Any",
    "TaskIO": "1 stdin string, 2 stdout string, 3 stderr string, 4 terminal bool",
    "TaskCreate": "1 container_id string, 2 bundle string, 3 rootfs [Mount], 4 io TaskIO, 5 checkpoint string, 6 pid uint",
    "TaskStart": "1 container_id string, 2 pid uint",
    "TaskExit": "1 container_id string, 2 id string, 3 pid uint, 4 exit_status uint, 5 exited_at Timestamp",
    "TaskDelete": "1 container_id string, 2 pid uint, 3 exit_status uint, 4 exited_at Timestamp, 5 id string",
    "TaskOOM": "1 container_id string",
    "TaskExecAdded": "1 container_id string, 2 exec_id string",
    "TaskExecStarted": "1 container_id string, 2 exec_id string, 3 pid uint",
    "TaskPaused": "1 container_id string",
    "TaskResumed": "1 container_id string",
    # containerd.services: containers, images, content; of which only what is asked for
    "GetContainerRequest": "1 id string",
    "GetContainerResponse": "1 container ContainerRecord",
    "ContainerRecord": "1 id string, 3 image string",
    "GetImageRequest": "1 name string",
    "GetImageResponse": "1 image Image",
    "Image": "1 name string, 3 target Descriptor",
    "Descriptor": "1 media_type string, 2 digest string, 3 size int",
    "ReadContentRequest": "1 digest string",
    "ReadContentResponse": "1 offset int, 2 data bytes",
    # the command line of a shim
    "BootstrapParams": "1 instance_id string, 2 namespace string, 3 log_level int, 4 containerd_version string, "
                       "5 containerd_ttrpc_address string, 6 containerd_grpc_address string, 7 containerd_binary string, "
                       "8 extensions [Extension], 9 socket_dir string",
    "Extension": "1 value Any",
    # containerd.runc.v1.Options, containerd.linux.runc.CreateOptions: of their options, the shim's own
    "RuncOptions": "1 no_pivot_root bool, 3 shim_cgroup string",
    "LinuxOptions": "1 no_pivot_root bool, 9 shim_cgroup string",
    "RuntimeInfo": "1 name string, 2 version RuntimeVersion, 3 options Any, 4 features Any, 5 annotations [Pair]",
    "RuntimeVersion": "1 version string, 2 revision string",
    # io.containerd.cgroups.v1
    "Metrics1": "1 hugetlb [HugetlbStat1], 2 pids PidsStat, 3 cpu CPUStat1, 4 memory MemoryStat1, 5 blkio BlkIOStat, "
                "6 rdma RdmaStat, 8 cgroup_stats Empty, 9 memory_oom_control MemoryOomControl",
    "HugetlbStat1": "1 usage uint, 2 max uint, 3 failcnt uint, 4 pagesize string",
    "CPUStat1": "1 usage CPUUsage, 2 throttling Throttle",
    "CPUUsage": "1 total uint, 2 kernel uint, 3 user uint, 4 per_cpu [uint]",
    "Throttle": "1 periods uint, 2 throttled_periods uint, 3 throttled_time uint",
    "MemoryStat1": "1 cache uint, 2 rss uint, 3 rss_huge uint, 4 mapped_file uint, 5 dirty uint, 6 writeback uint, "
                   "7 pg_pg_in uint, 8 pg_pg_out uint, 9 pg_fault uint, 10 pg_maj_fault uint, 11 inactive_anon uint, "
                   "12 active_anon uint, 13 inactive_file uint, 14 active_file uint, 15 unevictable uint, "
                   "16 hierarchical_memory_limit uint, 17 hierarchical_swap_limit uint, 18 total_cache uint, "
                   "19 total_rss uint, 20 total_rss_huge uint, 21 total_mapped_file uint, 22 total_dirty uint, "
                   "23 total_writeback uint, 24 total_pg_pg_in uint, 25 total_pg_pg_out uint, "
                   "26 total_pg_fault uint, 27 total_pg_maj_fault uint, 28 total_inactive_anon uint, "
                   "29 total_active_anon uint, 30 total_inactive_file uint, 31 total_active_file uint, "
                   "32 total_unevictable uint, 33 usage MemoryEntry, 34 swap MemoryEntry, 35 kernel MemoryEntry, "
                   "36 kernel_tcp MemoryEntry",
    "MemoryEntry": "1 limit uint, 2 usage uint, 3 max uint, 4 failcnt uint",
    "MemoryOomControl": "1 oom_kill_disable uint, 2 under_oom uint, 3 oom_kill uint",
    "BlkIOStat": "1 io_service_bytes_recursive [BlkIOEntry], 2 io_serviced_recursive [BlkIOEntry], "
                 "3 io_queued_recursive [BlkIOEntry], 4 io_service_time_recursive [BlkIOEntry], "
                 "5 io_wait_time_recursive [BlkIOEntry], 6 io_merged_recursive [BlkIOEntry], "
                 "7 io_time_recursive [BlkIOEntry], 8 sectors_recursive [BlkIOEntry]",
    "BlkIOEntry": "1 op string, 2 device string, 3 major uint, 4 minor uint, 5 value uint",
    # io.containerd.cgroups.v2
    "Metrics2": "1 pids PidsStat, 2 cpu CPUStat2, 4 memory MemoryStat2, 5 rdma RdmaStat, 6 io IOStat, "
                "7 hugetlb [HugeTlbStat2], 8 memory_events MemoryEvents",
    "PidsStat": "1 current uint, 2 limit uint",
    "CPUStat2": "1 usage_usec uint, 2 user_usec uint, 3 system_usec uint, 4 nr_periods uint, 5 nr_throttled uint, "
                "6 throttled_usec uint, 7 psi PSIStats, 8 nr_bursts uint, 9 burst_usec uint",
    "MemoryStat2": "1 anon uint, 2 file uint, 3 kernel_stack uint, 4 slab uint, 5 sock uint, 6 shmem uint, "
                   "7 file_mapped uint, 8 file_dirty uint, 9 file_writeback uint, 10 anon_thp uint, "
                   "11 inactive_anon uint, 12 active_anon uint, 13 inactive_file uint, 14 active_file uint, "
                   "15 unevictable uint, 16 slab_reclaimable uint, 17 slab_unreclaimable uint, 18 pgfault uint, "
                   "19 pgmajfault uint, 20 workingset_refault uint, 21 workingset_activate uint, "
                   "22 workingset_nodereclaim uint, 23 pgrefill uint, 24 pgscan uint, 25 pgsteal uint, "
                   "26 pgactivate uint, 27 pgdeactivate uint, 28 pglazyfree uint, 29 pglazyfreed uint, "
                   "30 thp_fault_alloc uint, 31 thp_collapse_alloc uint, 32 usage uint, 33 usage_limit uint, "
                   "34 swap_usage uint, 35 swap_limit uint, 36 max_usage uint, 37 swap_max_usage uint, "
                   "38 psi PSIStats, 39 workingset_refault_anon uint, 40 workingset_refault_file uint, "
                   "41 workingset_activate_anon uint, 42 workingset_activate_file uint",
    "PSIStats": "1 some PSIData, 2 full PSIData",
    "PSIData": "1 avg10 double, 2 avg60 double, 3 avg300 double, 4 total uint",
    "RdmaStat": "1 current [RdmaEntry], 2 limit [RdmaEntry]",
    "RdmaEntry": "1 device string, 2 hca_handles uint, 3 hca_objects uint",
    "IOStat": "1 usage [IOEntry], 2 psi PSIStats",
    "IOEntry": "1 major uint, 2 minor uint, 3 rbytes uint, 4 wbytes uint, 5 rios uint, 6 wios uint",
    "HugeTlbStat2": "1 current uint, 2 max uint, 3 pagesize string, 4 failcnt uint",
    "MemoryEvents": "1 low uint, 2 high uint, 3 max uint, 4 oom uint, 5 oom_kill uint, 6 oom_group_kill uint",
}


def message_fields(name):
    """The field rows of a message; its text is parsed at first use."""
    rows = MESSAGES[name]
    if rows.__class__ is str:
        rows = MESSAGES[name] = fields(rows) if rows else ()
    return rows


def varint(value):
    """Base-128 varint; a negative number takes ten bytes, as two's complement of 64 bits."""
    value &= MAX_U64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(name, message):
    """The bytes of the message `name` with the values of the dict `message`; a key that
    the message does not have is a KeyError."""
    out = []
    given = 0
    for number, field, type in message_fields(name):
        value = message.get(field)
        given += field in message
        repeated = type.__class__ is list
        if type == ["uint"] and value:  # packed: one field with all of them
            value, type, repeated = b"".join(map(varint, value)), "bytes", False
        for item in value or () if repeated else () if value is None else (value,):
            item_type = type[0] if repeated else type
            wire, default = SCALARS.get(item_type, (LENGTH, None))
            if item == default and not repeated:
                continue
            if wire == VARINT:
                out += varint(number << 3), varint(item)
                continue
            if wire == FIXED64:
                out += varint(number << 3 | FIXED64), struct.pack("<d", item)
                continue
            if item_type == "string":
                item = item.encode("utf-8", "backslashreplace")     # a receiver refuses what is not UTF-8
            elif item_type != "bytes":
                item = encode(item_type, item)
            out += varint(number << 3 | LENGTH), varint(len(item)), item
    if given != len(message):
        raise KeyError("%s has no field %s" % (name, ", ".join(set(message) - {f for _, f, _ in message_fields(name)})))
    return b"".join(out)


def decode(name, data):
    """The dict of the message `name` in the bytes `data`; ProtobufError if there is none."""
    rows = message_fields(name)
    message = {field: [] if type.__class__ is list else SCALARS.get(type, (0, None))[1] for _, field, type in rows}
    by_number = {number: (field, type) for number, field, type in rows}
    position = 0
    while position < len(data):
        key, position = read_varint(name, data, position)
        wire = key & 7
        if not key >> 3:
            raise ProtobufError("%s: field number 0" % name)
        if wire == VARINT:
            value, position = read_varint(name, data, position)
        else:
            if wire == LENGTH:
                size, position = read_varint(name, data, position)
            elif wire in (FIXED64, FIXED32):
                size = 8 if wire == FIXED64 else 4
            else:
                raise ProtobufError("%s: wire type %d" % (name, wire))
            value = data[position:position + size]
            position += size
            if position > len(data):
                raise ProtobufError("%s: truncated" % name)
        if key >> 3 in by_number:
            field, type = by_number[key >> 3]
            if type == ["uint"] and wire == LENGTH:
                message[field] += packed_numbers(name, value)
            elif type.__class__ is list:
                message[field].append(field_value(name, field, type[0], wire, value))
            else:
                message[field] = field_value(name, field, type, wire, value)
    return message


def packed_numbers(name, data):
    """The numbers of a packed repeated field."""
    numbers, position = [], 0
    while position < len(data):
        number, position = read_varint(name, data, position)
        numbers.append(number)
    return numbers


def read_varint(name, data, position):
    """(value, next position)"""
    result = shift = 0
    for position in range(position, min(position + MAX_VARINT_BYTES, len(data))):
        byte = data[position]
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            if result > MAX_U64:
                break
            return result, position + 1
        shift += 7
    raise ProtobufError("%s: bad varint" % name)


def field_value(name, field, type, wire, value):
    """The Python value of one field as it was on the wire."""
    if SCALARS.get(type, (LENGTH,))[0] != wire:
        raise ProtobufError("%s.%s: wire type %d" % (name, field, wire))
    if type == "bytes":
        return bytes(value)
    if type == "double":
        return struct.unpack("<d", value)[0]
    if type == "string":
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError:
            raise ProtobufError("%s.%s: not UTF-8" % (name, field)) from None
    if type == "bool":
        return value != 0
    if type == "int":
        return value - (1 << 64) if value >> 63 else value
    return value if type == "uint" else decode(type, value)


# === 4. ttrpc =================================================================
#
# containerd's lean gRPC (github.com/containerd/ttrpc, PROTOCOL.md). A connection
# carries frames, each a header and a payload:
#
#      0  payload length   4 bytes, big-endian, the header not counted
#      4  stream id        4 bytes, big-endian; a client's are odd and increase
#      8  message type     1 request, 2 response, 3 data of a stream
#      9  flags
#     10  payload
#
# One request frame asks, one response frame with the same stream id answers, in any
# order. This chapter is bytes in, bytes out; sockets come later.

FRAME_HEADER = struct.Struct(">IIBB")
MAX_FRAME_BYTES = 4 << 20
REQUEST, RESPONSE, DATA = 1, 2, 3

(OK, CANCELLED, UNKNOWN_ERROR, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED,
 RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNIMPLEMENTED, INTERNAL, UNAVAILABLE) = range(15)


class RpcError(Exception):
    """A call failed: `args` is (code, message) as in google.rpc.Status."""


class FrameReader:
    """Cuts a byte stream into frames; holds at most one frame's bytes."""

    __slots__ = ("buffer", "skip")

    def __init__(self):
        self.buffer = bytearray()
        self.skip = 0                   # bytes of an oversized payload still to be thrown away

    def feed(self, data):
        """The frames that `data` completes, as (stream, type, payload length, payload);
        the payload is None where its length exceeds MAX_FRAME_BYTES."""
        buffer = self.buffer
        buffer += data
        frames = []
        while True:
            if self.skip:
                gone = min(self.skip, len(buffer))
                del buffer[:gone]
                self.skip -= gone
            if self.skip or len(buffer) < FRAME_HEADER.size:
                return frames
            size, stream, type, _ = FRAME_HEADER.unpack_from(buffer)
            if size > MAX_FRAME_BYTES:
                del buffer[:FRAME_HEADER.size]
                self.skip = size
                frames.append((stream, type, size, None))
                continue
            if len(buffer) < FRAME_HEADER.size + size:
                return frames
            frames.append((stream, type, size, bytes(buffer[FRAME_HEADER.size:FRAME_HEADER.size + size])))
            del buffer[:FRAME_HEADER.size + size]


def frame(stream, type, payload):
    """The bytes of one frame."""
    return FRAME_HEADER.pack(len(payload), stream, type, 0) + payload


def request_frame(stream, service, method, payload, timeout_s=0, metadata=()):
    """A client's call; `payload` is the encoded request message."""
    return frame(stream, REQUEST, encode("Request", {
        "service": service, "method": method, "payload": payload, "timeout_nano": int(timeout_s * 1e9),
        "metadata": [{"key": k, "value": v} for k, v in metadata]}))


def response_frame(stream, payload):
    """A server's answer; `payload` is the encoded response message. containerd 1.6 dies
    of a frame over the limit, so such an answer becomes an error."""
    body = encode("Response", {"payload": payload})
    return frame(stream, RESPONSE, body) if len(body) <= MAX_FRAME_BYTES else length_error_frame(stream, len(body))


def length_error_frame(stream, size):
    """The refusal of a message of that many bytes, in the Go library's words."""
    return error_frame(stream, RESOURCE_EXHAUSTED, "message length %d exceed maximum message size of %d" % (size, MAX_FRAME_BYTES))


def error_frame(stream, code, message):
    """A server's refusal."""
    return frame(stream, RESPONSE, encode("Response", {"status": {"code": code, "message": message[:65536]}}))


def response_payload(body):
    """The encoded response message in an answer's payload; RpcError if it is a refusal."""
    try:
        response = decode("Response", body)
    except ProtobufError as error:
        raise RpcError(INTERNAL, "response: %s" % error) from None
    status = response["status"]
    if status and status["code"]:
        raise RpcError(status["code"], status["message"])
    return response["payload"]


class ServerProtocol:
    """The server's side of one connection, without the socket."""

    __slots__ = ("reader", "last_stream")

    def __init__(self):
        self.reader = FrameReader()
        self.last_stream = 0

    def receive(self, data):
        """(calls, refusals) for the bytes that came: calls are (stream, service, method,
        payload), refusals the bytes to send for what is no call."""
        calls = []
        refusals = bytearray()          # bytes would be copied for each frame of a flood
        for stream, type, size, payload in self.reader.feed(data):
            if payload is None:
                refusals += length_error_frame(stream, size)
            elif type != REQUEST:
                pass                    # as Go's server up to ttrpc 1.1; from 1.2 on it refuses data of no stream
            elif not stream & 1:
                refusals += error_frame(stream, INVALID_ARGUMENT, "StreamID must be odd for client initiated streams")
            elif stream <= self.last_stream:
                refusals += error_frame(stream, INVALID_ARGUMENT, "StreamID cannot be re-used and must increment")
            else:
                self.last_stream = stream
                try:
                    request = decode("Request", payload)
                except ProtobufError as error:
                    refusals += error_frame(stream, INVALID_ARGUMENT, "unmarshal request error: %s" % error)
                    continue
                calls.append((stream, request["service"], request["method"], request["payload"]))
        return calls, bytes(refusals)


# === 5. WebAssembly types =====================================================
#
# Types are small immutable values that compare with ==. A number or vector type is
# the byte of its binary encoding (section 5.3). A reference type is a pair (heap
# type, whether null is one of its values); its heap type is the byte of an abstract
# one, or a DefinedType. UNKNOWN is the bottom type of unreachable code.
#
# Defined types are compared by structure, also across modules, and may refer to
# each other within a recursion group. So that comparing is cheap, a group's structure
# is entered in a table once, and two types are equal if their places there are.

I32, I64, F32, F64, V128, I8, I16 = 0x7F, 0x7E, 0x7D, 0x7C, 0x7B, 0x78, 0x77
UNKNOWN = 0
NUMBER_TYPES = (I32, I64, F32, F64)
TYPE_NAMES = {I32: "i32", I64: "i64", F32: "f32", F64: "f64", V128: "v128", I8: "i8", I16: "i16", UNKNOWN: "unknown"}
TYPE_LETTERS = {"i": I32, "I": I64, "f": F32, "F": F64, "v": V128}

ANY, EQ, I31_HEAP, STRUCT, ARRAY, NONE = 0x6E, 0x6D, 0x6C, 0x6B, 0x6A, 0x71
FUNC, NOFUNC, EXTERN, NOEXTERN, EXN, NOEXN = 0x70, 0x73, 0x6F, 0x72, 0x69, 0x74
HEAP_NAMES = {ANY: "any", EQ: "eq", I31_HEAP: "i31", STRUCT: "struct", ARRAY: "array", NONE: "none", FUNC: "func",
              NOFUNC: "nofunc", EXTERN: "extern", NOEXTERN: "noextern", EXN: "exn", NOEXN: "noexn", UNKNOWN: "unknown"}
HEAP_PARENTS = {EQ: ANY, I31_HEAP: EQ, STRUCT: EQ, ARRAY: EQ}
HEAP_TOPS = {NONE: ANY, NOFUNC: FUNC, NOEXTERN: EXTERN, NOEXN: EXN}      # bottom -> top of its hierarchy
FUNCREF, EXTERNREF, EXNREF = (FUNC, True), (EXTERN, True), (EXN, True)

PAGE_BYTES = 65536
MAX_PAGES = 65536               # that this engine allocates
MAX_PAGES_64 = 1 << 48          # that a 64-bit memory may declare
MAX_FRAMES = 20000              # depth of the guest's call stack
MAX_FRAME_SLOTS = 8000000       # a function's frame times the depth it may be called at

# What a module may contain. Where the JavaScript API has a limit, it is the same, but for
# tables, of which that allows a thousand times as many, and the pages that a 64-bit memory
# may declare, of which the core specification allows more. It has none for the segments of
# elements and for custom sections; without one, a few bytes of each would cost a hundred.
MAX_MODULE_BYTES = 1 << 30
MAX_NESTING = 100000            # of blocks, loops and the like in each other
MAX_TYPES = 1000000
MAX_SUPERTYPES = 63             # depth of a chain
MAX_FIELDS = 10000
MAX_PARAMS = MAX_RESULTS = 1000
MAX_FUNCTIONS = MAX_IMPORTS = MAX_EXPORTS = MAX_GLOBALS = MAX_TAGS = 1000000
MAX_TABLES = MAX_MEMORIES = 100
MAX_SEGMENTS = MAX_CUSTOMS = 100000     # segments of data, and as many of elements
MAX_LOCALS = 50000
MAX_BODY_BYTES = 7654321
MAX_TABLE_ELEMENTS = 10000000
MAX_ARRAY_ELEMENTS = 10000000


class DefinedType:
    """deftype: one type of a recursion group. `kind` is FUNC, STRUCT or ARRAY; `params`
    and `results` are a function type's, `fields` the (storage type, mutable) of a
    structure or of an array's elements. `identity` is equal for equal types; it is
    set when the group is complete."""

    __slots__ = ("kind", "params", "results", "fields", "supertype", "final", "depth", "identity")

    def __init__(self, kind=None, params=(), results=(), fields=(), supertype=None, final=True):
        self.kind, self.fields, self.supertype, self.final = kind, tuple(fields), supertype, final
        self.params, self.results = tuple(params), tuple(results)
        self.depth = 0 if supertype is None else supertype.depth + 1

    def __eq__(self, other):
        return self is other or isinstance(other, DefinedType) and self.identity == other.identity

    def __hash__(self):
        return hash(self.identity)

    def __str__(self):
        if self.kind == FUNC:
            return "[%s] -> [%s]" % (type_list(self.params), type_list(self.results))
        return "%s {%s}" % (HEAP_NAMES[self.kind], type_list(type for type, _ in self.fields))

    def matches(self, other):
        """Whether this is `other` or declared as a subtype of it (3.3.10)."""
        type = self
        for _ in range(self.depth - other.depth):
            type = type.supertype
        return type == other


class FunctionType(DefinedType):
    """functype, as an embedder writes it: a final type in a group of its own."""

    __slots__ = ()

    def __init__(self, params, results):
        super().__init__(FUNC, params, results)
        identify([self])


class Identity:
    """What equal recursion groups have in common; it is nothing but itself."""

    __slots__ = ("__weakref__",)


IDENTITIES = {}                 # structure of a group -> weak reference to its Identity


def identify(group):
    """Completes a recursion group, a list of DefinedTypes: sets their identities."""
    places = {id(type): -2 - place for place, type in enumerate(group)}     # not -1: its hash is the one of -2
    structure = tuple([type_structure(type, places) for type in group])
    known = IDENTITIES.get(structure)
    identity = known and known()
    if identity is None:
        identity = Identity()
        IDENTITIES[structure] = weakref.ref(identity, forget_identity(structure))
    for place, type in enumerate(group):
        type.identity = identity, place


def forget_identity(structure):
    """The callback that removes a group which no type is left of."""
    def forget(reference):
        if IDENTITIES.get(structure) is reference:
            del IDENTITIES[structure]
    return forget


def type_structure(type, places):
    """A type as nested tuples, in which a type of the same group is its number in
    `places`, a negative one, and another one its identity."""
    def value(type):
        if type.__class__ is int or type[0].__class__ is int:
            return type
        return heap(type[0]), type[1]

    def heap(type):
        return places.get(id(type)) or type.identity
    return (type.kind, type.final, type.supertype and heap(type.supertype), tuple(map(value, type.params)),
            tuple(map(value, type.results)), tuple([(value(storage), mutable) for storage, mutable in type.fields]))


def type_name(type):
    """'i32', '(ref null func)', '(ref func type)' where it is a DefinedType"""
    if type.__class__ is int:
        return TYPE_NAMES[type]
    heap, nullable = type
    name = HEAP_NAMES[heap] if heap.__class__ is int else HEAP_NAMES[heap.kind] + " type"
    return "(ref %s%s)" % ("null " if nullable else "", name)


def type_list(types):
    """'i32 i64' of (I32, I64)."""
    return " ".join(map(type_name, types))


def heap_matches(heap, other):
    """Whether a heap type is a subtype of another (3.3.3)."""
    if heap is other or heap == other or heap == UNKNOWN:
        return True
    if heap.__class__ is not int:
        return heap.matches(other) if other.__class__ is not int else heap_matches(heap.kind, other)
    if heap in HEAP_TOPS:
        return top_of(other) == HEAP_TOPS[heap]
    while heap in HEAP_PARENTS:
        heap = HEAP_PARENTS[heap]
        if heap == other:
            return True
    return False


def top_of(heap):
    """The top of a heap type's hierarchy: ANY, FUNC, EXTERN or EXN."""
    if heap.__class__ is not int:
        heap = heap.kind
    while heap in HEAP_PARENTS:
        heap = HEAP_PARENTS[heap]
    return HEAP_TOPS.get(heap, heap)


def type_matches(type, other):
    """Whether a value of `type` may be used where `other` is wanted (3.3.5)."""
    if type == other or type == UNKNOWN or other == UNKNOWN:
        return True
    return (type.__class__ is tuple and other.__class__ is tuple and (other[1] or not type[1])
            and heap_matches(type[0], other[0]))


def types_match(types, others):
    """type_matches for a sequence."""
    return len(types) == len(others) and all(map(type_matches, types, others))


def subtype_fits(type):
    """Whether a DefinedType may be a subtype of the supertype that it declares (3.2.11)."""
    parent = type.supertype
    if parent.final or parent.kind != type.kind or type.depth > MAX_SUPERTYPES:
        return False
    if type.kind == FUNC:
        return types_match(parent.params, type.params) and types_match(type.results, parent.results)
    return len(type.fields) >= len(parent.fields) and all(map(field_matches, type.fields, parent.fields))


def field_matches(field, other):
    """A mutable field must have the same type, an immutable one a subtype (3.3.9)."""
    (type, mutable), (parent, parent_mutable) = field, other
    return mutable == parent_mutable and type_matches(type, parent) and (not mutable or type_matches(parent, type))


def defaultable(type):
    """Whether a variable of this type starts without being set."""
    return type.__class__ is int or type[1]


class Limits:
    """limits: `minimum` and `maximum` (None = no maximum), in pages or elements. With
    `address` I64, addresses have 64 bits."""

    __slots__ = ("minimum", "maximum", "address", "shared")

    def __init__(self, minimum, maximum=None, address=I32, shared=False):
        self.minimum, self.maximum, self.address, self.shared = minimum, maximum, address, shared

    def admits(self, size, extern):
        """Whether a Memory or Table of `size` may be imported here (3.3.11)."""
        if size < self.minimum or extern.address != self.address:
            return False
        return self.maximum is None or extern.maximum is not None and extern.maximum <= self.maximum


class TableType:
    """tabletype ::= reftype limits; `init` is the expression of its elements or None."""

    __slots__ = ("element", "limits", "init")

    def __init__(self, element, limits, init=None):
        self.element, self.limits, self.init = element, limits, init


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
# The type is written "operands:results" with i = i32, I = i64, f = f32, F = f64,
# v = v128; None means that it depends on the immediates or the context, and chapter
# 11 has a method of that name. The meaning is a Python expression over the operands
# {x}, {y} and {z}. Integers are held unsigned, floats as Python floats (an f32 is a
# double that fits 32 bits), vectors as 16 bytes; a comparison may yield True for 1.
#
# What works lane by lane has the lanes' format in front, in the letters of the
# struct module: "8h: {x} + {y}" unpacks each vector operand, computes lane by lane,
# and packs. "8b@8>8h" takes the eight lanes from byte 8 on and packs the results in
# another format. Scalar operands stand for themselves.
#
# What accesses memory or one lane starts with a verb and a format: "store B & 0xFF".
# Chapter 8 has a table of the verbs, ACCESSES.
#
# A signed comparison of i32 or i64 needs no conversion: flipping the sign bit maps
# the order of signed integers onto the order of unsigned ones.

INSTRUCTIONS = (
    # Control (section 5.4.2)
    (0x00, "unreachable",         "",              None, None),
    (0x01, "nop",                 "",              None, None),
    (0x02, "block",               "blocktype",     None, None),
    (0x03, "loop",                "blocktype",     None, None),
    (0x04, "if",                  "blocktype",     None, None),
    (0x05, "else",                "",              None, None),
    (0x08, "throw",               "tag",           None, None),
    (0x0A, "throw_ref",           "",              None, None),
    (0x0B, "end",                 "",              None, None),
    (0x0C, "br",                  "label",         None, None),
    (0x0D, "br_if",               "label",         None, None),
    (0x0E, "br_table",            "labels",        None, None),
    (0x0F, "return",              "",              None, None),
    (0x10, "call",                "func",          None, None),
    (0x11, "call_indirect",       "type table",    None, None),
    (0x12, "return_call",         "func",          None, None),
    (0x13, "return_call_indirect", "type table",   None, None),
    (0x14, "call_ref",            "type",          None, None),
    (0x15, "return_call_ref",     "type",          None, None),
    # Parametric, variable and table instructions (5.4.1, 5.4.3, 5.4.4), and one more of control
    (0x1A, "drop",                "",              None, None),
    (0x1B, "select",              "",              None, None),
    (0x1C, "select_t",            "types",         None, None),
    (0x1F, "try_table",           "blocktype catches", None, None),
    (0x20, "local.get",           "local",         None, None),
    (0x21, "local.set",           "local",         None, None),
    (0x22, "local.tee",           "local",         None, None),
    (0x23, "global.get",          "global",        None, None),
    (0x24, "global.set",          "global",        None, None),
    (0x25, "table.get",           "table",         None, None),
    (0x26, "table.set",           "table",         None, None),
    # Memory (5.4.5)
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
    # References (5.4.6; the branches are control)
    (0xD0, "ref.null",            "heaptype",      None, None),
    (0xD1, "ref.is_null",         "",              None, None),
    (0xD2, "ref.func",            "func",          None, None),
    (0xD3, "ref.eq",              "",              None, None),
    (0xD4, "ref.as_non_null",     "",              None, None),
    (0xD5, "br_on_null",          "label",         None, None),
    (0xD6, "br_on_non_null",      "label",         None, None),
    # Aggregates, casts and scalar references: after the prefix byte 0xFB (5.4.2, 5.4.6, 5.4.7)
    (0xFB00, "struct.new",         "type",         None, None),
    (0xFB01, "struct.new_default", "type",         None, None),
    (0xFB02, "struct.get",         "type field",   None, None),
    (0xFB03, "struct.get_s",       "type field",   None, None),
    (0xFB04, "struct.get_u",       "type field",   None, None),
    (0xFB05, "struct.set",         "type field",   None, None),
    (0xFB06, "array.new",          "type",         None, None),
    (0xFB07, "array.new_default",  "type",         None, None),
    (0xFB08, "array.new_fixed",    "type count",   None, None),
    (0xFB09, "array.new_data",     "type data",    None, None),
    (0xFB0A, "array.new_elem",     "type elem",    None, None),
    (0xFB0B, "array.get",          "type",         None, None),
    (0xFB0C, "array.get_s",        "type",         None, None),
    (0xFB0D, "array.get_u",        "type",         None, None),
    (0xFB0E, "array.set",          "type",         None, None),
    (0xFB0F, "array.len",          "",             None, None),
    (0xFB10, "array.fill",         "type",         None, None),
    (0xFB11, "array.copy",         "type type",    None, None),
    (0xFB12, "array.init_data",    "type data",    None, None),
    (0xFB13, "array.init_elem",    "type elem",    None, None),
    (0xFB14, "ref.test",           "heaptype",     None, None),
    (0xFB15, "ref.test null",      "heaptype",     None, None),
    (0xFB16, "ref.cast",           "heaptype",     None, None),
    (0xFB17, "ref.cast null",      "heaptype",     None, None),
    (0xFB18, "br_on_cast",         "castflags label heaptype heaptype", None, None),
    (0xFB19, "br_on_cast_fail",    "castflags label heaptype heaptype", None, None),
    (0xFB1A, "any.convert_extern", "",             None, None),
    (0xFB1B, "extern.convert_any", "",             None, None),
    (0xFB1C, "ref.i31",            "",             None, None),
    (0xFB1D, "i31.get_s",          "",             None, None),
    (0xFB1E, "i31.get_u",          "",             None, None),
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
    # Vectors: after the prefix byte 0xFD (5.4.9)
    (0xFD00, "v128.load",                     "memarg", "i:v",   "load 16s"),
    (0xFD01, "v128.load8x8_s",                "memarg", "i:v",   "widen 8b 8h"),
    (0xFD02, "v128.load8x8_u",                "memarg", "i:v",   "widen 8B 8H"),
    (0xFD03, "v128.load16x4_s",               "memarg", "i:v",   "widen 4h 4i"),
    (0xFD04, "v128.load16x4_u",               "memarg", "i:v",   "widen 4H 4I"),
    (0xFD05, "v128.load32x2_s",               "memarg", "i:v",   "widen 2i 2q"),
    (0xFD06, "v128.load32x2_u",               "memarg", "i:v",   "widen 2I 2Q"),
    (0xFD07, "v128.load8_splat",              "memarg", "i:v",   "load 1s * 16"),
    (0xFD08, "v128.load16_splat",             "memarg", "i:v",   "load 2s * 8"),
    (0xFD09, "v128.load32_splat",             "memarg", "i:v",   "load 4s * 4"),
    (0xFD0A, "v128.load64_splat",             "memarg", "i:v",   "load 8s * 2"),
    (0xFD0B, "v128.store",                    "memarg", "iv:",   "store 16s"),
    (0xFD0C, "v128.const",                    "v128", None,    None),
    (0xFD0D, "i8x16.shuffle",                 "lanes", None,    None),
    (0xFD0E, "i8x16.swizzle",                 "", "vv:v",  "{y}.translate({x} + bytes(240))"),
    (0xFD0F, "i8x16.splat",                   "", "i:v",   "bytes(({x} & 0xFF,)) * 16"),
    (0xFD10, "i16x8.splat",                   "", "i:v",   "pack_u32({x} & 0xFFFF)[:2] * 8"),
    (0xFD11, "i32x4.splat",                   "", "i:v",   "pack_u32({x}) * 4"),
    (0xFD12, "i64x2.splat",                   "", "I:v",   "pack_u64({x}) * 2"),
    (0xFD13, "f32x4.splat",                   "", "f:v",   "pack_u32(f32_bits({x})) * 4"),
    (0xFD14, "f64x2.splat",                   "", "F:v",   "pack_f64({x}) * 2"),
    (0xFD15, "i8x16.extract_lane_s",          "lane", "v:i",   "extract b & 0xFFFFFFFF"),
    (0xFD16, "i8x16.extract_lane_u",          "lane", "v:i",   "extract B"),
    (0xFD17, "i8x16.replace_lane",            "lane", "vi:v",  "replace B & 0xFF"),
    (0xFD18, "i16x8.extract_lane_s",          "lane", "v:i",   "extract h & 0xFFFFFFFF"),
    (0xFD19, "i16x8.extract_lane_u",          "lane", "v:i",   "extract H"),
    (0xFD1A, "i16x8.replace_lane",            "lane", "vi:v",  "replace H & 0xFFFF"),
    (0xFD1B, "i32x4.extract_lane",            "lane", "v:i",   "extract I"),
    (0xFD1C, "i32x4.replace_lane",            "lane", "vi:v",  "replace I"),
    (0xFD1D, "i64x2.extract_lane",            "lane", "v:I",   "extract Q"),
    (0xFD1E, "i64x2.replace_lane",            "lane", "vI:v",  "replace Q"),
    (0xFD1F, "f32x4.extract_lane",            "lane", "v:f",   "extract f"),
    (0xFD20, "f32x4.replace_lane",            "lane", "vf:v",  "replace f"),
    (0xFD21, "f64x2.extract_lane",            "lane", "v:F",   "extract d"),
    (0xFD22, "f64x2.replace_lane",            "lane", "vF:v",  "replace d"),
    (0xFD23, "i8x16.eq",                      "", "vv:v",  "16b: -({x} == {y})"),
    (0xFD24, "i8x16.ne",                      "", "vv:v",  "16b: -({x} != {y})"),
    (0xFD25, "i8x16.lt_s",                    "", "vv:v",  "16b: -({x} < {y})"),
    (0xFD26, "i8x16.lt_u",                    "", "vv:v",  "16B>16b: -({x} < {y})"),
    (0xFD27, "i8x16.gt_s",                    "", "vv:v",  "16b: -({x} > {y})"),
    (0xFD28, "i8x16.gt_u",                    "", "vv:v",  "16B>16b: -({x} > {y})"),
    (0xFD29, "i8x16.le_s",                    "", "vv:v",  "16b: -({x} <= {y})"),
    (0xFD2A, "i8x16.le_u",                    "", "vv:v",  "16B>16b: -({x} <= {y})"),
    (0xFD2B, "i8x16.ge_s",                    "", "vv:v",  "16b: -({x} >= {y})"),
    (0xFD2C, "i8x16.ge_u",                    "", "vv:v",  "16B>16b: -({x} >= {y})"),
    (0xFD2D, "i16x8.eq",                      "", "vv:v",  "8h: -({x} == {y})"),
    (0xFD2E, "i16x8.ne",                      "", "vv:v",  "8h: -({x} != {y})"),
    (0xFD2F, "i16x8.lt_s",                    "", "vv:v",  "8h: -({x} < {y})"),
    (0xFD30, "i16x8.lt_u",                    "", "vv:v",  "8H>8h: -({x} < {y})"),
    (0xFD31, "i16x8.gt_s",                    "", "vv:v",  "8h: -({x} > {y})"),
    (0xFD32, "i16x8.gt_u",                    "", "vv:v",  "8H>8h: -({x} > {y})"),
    (0xFD33, "i16x8.le_s",                    "", "vv:v",  "8h: -({x} <= {y})"),
    (0xFD34, "i16x8.le_u",                    "", "vv:v",  "8H>8h: -({x} <= {y})"),
    (0xFD35, "i16x8.ge_s",                    "", "vv:v",  "8h: -({x} >= {y})"),
    (0xFD36, "i16x8.ge_u",                    "", "vv:v",  "8H>8h: -({x} >= {y})"),
    (0xFD37, "i32x4.eq",                      "", "vv:v",  "4i: -({x} == {y})"),
    (0xFD38, "i32x4.ne",                      "", "vv:v",  "4i: -({x} != {y})"),
    (0xFD39, "i32x4.lt_s",                    "", "vv:v",  "4i: -({x} < {y})"),
    (0xFD3A, "i32x4.lt_u",                    "", "vv:v",  "4I>4i: -({x} < {y})"),
    (0xFD3B, "i32x4.gt_s",                    "", "vv:v",  "4i: -({x} > {y})"),
    (0xFD3C, "i32x4.gt_u",                    "", "vv:v",  "4I>4i: -({x} > {y})"),
    (0xFD3D, "i32x4.le_s",                    "", "vv:v",  "4i: -({x} <= {y})"),
    (0xFD3E, "i32x4.le_u",                    "", "vv:v",  "4I>4i: -({x} <= {y})"),
    (0xFD3F, "i32x4.ge_s",                    "", "vv:v",  "4i: -({x} >= {y})"),
    (0xFD40, "i32x4.ge_u",                    "", "vv:v",  "4I>4i: -({x} >= {y})"),
    (0xFD41, "f32x4.eq",                      "", "vv:v",  "4f>4i: -({x} == {y})"),
    (0xFD42, "f32x4.ne",                      "", "vv:v",  "4f>4i: -({x} != {y})"),
    (0xFD43, "f32x4.lt",                      "", "vv:v",  "4f>4i: -({x} < {y})"),
    (0xFD44, "f32x4.gt",                      "", "vv:v",  "4f>4i: -({x} > {y})"),
    (0xFD45, "f32x4.le",                      "", "vv:v",  "4f>4i: -({x} <= {y})"),
    (0xFD46, "f32x4.ge",                      "", "vv:v",  "4f>4i: -({x} >= {y})"),
    (0xFD47, "f64x2.eq",                      "", "vv:v",  "2d>2q: -({x} == {y})"),
    (0xFD48, "f64x2.ne",                      "", "vv:v",  "2d>2q: -({x} != {y})"),
    (0xFD49, "f64x2.lt",                      "", "vv:v",  "2d>2q: -({x} < {y})"),
    (0xFD4A, "f64x2.gt",                      "", "vv:v",  "2d>2q: -({x} > {y})"),
    (0xFD4B, "f64x2.le",                      "", "vv:v",  "2d>2q: -({x} <= {y})"),
    (0xFD4C, "f64x2.ge",                      "", "vv:v",  "2d>2q: -({x} >= {y})"),
    (0xFD4D, "v128.not",                      "", "v:v",   "2Q: {x} ^ 0xFFFFFFFFFFFFFFFF"),
    (0xFD4E, "v128.and",                      "", "vv:v",  "2Q: {x} & {y}"),
    (0xFD4F, "v128.andnot",                   "", "vv:v",  "2Q: {x} & ~{y}"),
    (0xFD50, "v128.or",                       "", "vv:v",  "2Q: {x} | {y}"),
    (0xFD51, "v128.xor",                      "", "vv:v",  "2Q: {x} ^ {y}"),
    (0xFD52, "v128.bitselect",                "", "vvv:v", "2Q: {x} & {z} | {y} & ~{z}"),
    (0xFD53, "v128.any_true",                 "", "v:i",   "any({x})"),
    (0xFD54, "v128.load8_lane",               "memarg lane", "iv:v",  "load_lane 1s"),
    (0xFD55, "v128.load16_lane",              "memarg lane", "iv:v",  "load_lane 2s"),
    (0xFD56, "v128.load32_lane",              "memarg lane", "iv:v",  "load_lane 4s"),
    (0xFD57, "v128.load64_lane",              "memarg lane", "iv:v",  "load_lane 8s"),
    (0xFD58, "v128.store8_lane",              "memarg lane", "iv:",   "store_lane 1s"),
    (0xFD59, "v128.store16_lane",             "memarg lane", "iv:",   "store_lane 2s"),
    (0xFD5A, "v128.store32_lane",             "memarg lane", "iv:",   "store_lane 4s"),
    (0xFD5B, "v128.store64_lane",             "memarg lane", "iv:",   "store_lane 8s"),
    (0xFD5C, "v128.load32_zero",              "memarg", "i:v",   "load 4s + bytes(12)"),
    (0xFD5D, "v128.load64_zero",              "memarg", "i:v",   "load 8s + bytes(8)"),
    (0xFD5E, "f32x4.demote_f64x2_zero",       "", "v:v",   "2d>2f8x: quiet({x})"),
    (0xFD5F, "f64x2.promote_low_f32x4",       "", "v:v",   "2f>2d: quiet({x})"),
    (0xFD60, "i8x16.abs",                     "", "v:v",   "16b>16B: abs({x})"),
    (0xFD61, "i8x16.neg",                     "", "v:v",   "16B: -{x} & 0xFF"),
    (0xFD62, "i8x16.popcnt",                  "", "v:v",   "16B: bin({x}).count('1')"),
    (0xFD63, "i8x16.all_true",                "", "v:i",   "all({x})"),
    (0xFD64, "i8x16.bitmask",                 "", "v:i",   "bitmask('16b', {x})"),
    (0xFD65, "i8x16.narrow_i16x8_s",          "", "vv:v",  "narrow({x} + {y}, '16h', '16b', -0x80, 0x7F)"),
    (0xFD66, "i8x16.narrow_i16x8_u",          "", "vv:v",  "narrow({x} + {y}, '16h', '16B', 0, 0xFF)"),
    (0xFD67, "f32x4.ceil",                    "", "v:v",   "4f: fceil({x})"),
    (0xFD68, "f32x4.floor",                   "", "v:v",   "4f: ffloor({x})"),
    (0xFD69, "f32x4.trunc",                   "", "v:v",   "4f: ftrunc({x})"),
    (0xFD6A, "f32x4.nearest",                 "", "v:v",   "4f: fnearest({x})"),
    (0xFD6B, "i8x16.shl",                     "", "vi:v",  "16B: {x} << ({y} & 7) & 0xFF"),
    (0xFD6C, "i8x16.shr_s",                   "", "vi:v",  "16b: {x} >> ({y} & 7)"),
    (0xFD6D, "i8x16.shr_u",                   "", "vi:v",  "16B: {x} >> ({y} & 7)"),
    (0xFD6E, "i8x16.add",                     "", "vv:v",  "16B: {x} + {y} & 0xFF"),
    (0xFD6F, "i8x16.add_sat_s",               "", "vv:v",  "16b: max(-0x80, min({x} + {y}, 0x7F))"),
    (0xFD70, "i8x16.add_sat_u",               "", "vv:v",  "16B: min({x} + {y}, 0xFF)"),
    (0xFD71, "i8x16.sub",                     "", "vv:v",  "16B: {x} - {y} & 0xFF"),
    (0xFD72, "i8x16.sub_sat_s",               "", "vv:v",  "16b: max(-0x80, min({x} - {y}, 0x7F))"),
    (0xFD73, "i8x16.sub_sat_u",               "", "vv:v",  "16B: max({x} - {y}, 0)"),
    (0xFD74, "f64x2.ceil",                    "", "v:v",   "2d: fceil({x})"),
    (0xFD75, "f64x2.floor",                   "", "v:v",   "2d: ffloor({x})"),
    (0xFD76, "i8x16.min_s",                   "", "vv:v",  "16b: min({x}, {y})"),
    (0xFD77, "i8x16.min_u",                   "", "vv:v",  "16B: min({x}, {y})"),
    (0xFD78, "i8x16.max_s",                   "", "vv:v",  "16b: max({x}, {y})"),
    (0xFD79, "i8x16.max_u",                   "", "vv:v",  "16B: max({x}, {y})"),
    (0xFD7A, "f64x2.trunc",                   "", "v:v",   "2d: ftrunc({x})"),
    (0xFD7B, "i8x16.avgr_u",                  "", "vv:v",  "16B: {x} + {y} + 1 >> 1"),
    (0xFD7C, "i16x8.extadd_pairwise_i8x16_s", "", "v:v",   "add_pairs({x}, '16b', '8h')"),
    (0xFD7D, "i16x8.extadd_pairwise_i8x16_u", "", "v:v",   "add_pairs({x}, '16B', '8H')"),
    (0xFD7E, "i32x4.extadd_pairwise_i16x8_s", "", "v:v",   "add_pairs({x}, '8h', '4i')"),
    (0xFD7F, "i32x4.extadd_pairwise_i16x8_u", "", "v:v",   "add_pairs({x}, '8H', '4I')"),
    (0xFD80, "i16x8.abs",                     "", "v:v",   "8h>8H: abs({x})"),
    (0xFD81, "i16x8.neg",                     "", "v:v",   "8H: -{x} & 0xFFFF"),
    (0xFD82, "i16x8.q15mulr_sat_s",           "", "vv:v",  "8h: min({x} * {y} + 0x4000 >> 15, 0x7FFF)"),
    (0xFD83, "i16x8.all_true",                "", "v:i",   "all(unpack_lanes('8H', {x}))"),
    (0xFD84, "i16x8.bitmask",                 "", "v:i",   "bitmask('8h', {x})"),
    (0xFD85, "i16x8.narrow_i32x4_s",          "", "vv:v",  "narrow({x} + {y}, '8i', '8h', -0x8000, 0x7FFF)"),
    (0xFD86, "i16x8.narrow_i32x4_u",          "", "vv:v",  "narrow({x} + {y}, '8i', '8H', 0, 0xFFFF)"),
    (0xFD87, "i16x8.extend_low_i8x16_s",      "", "v:v",   "8b>8h: {x}"),
    (0xFD88, "i16x8.extend_high_i8x16_s",     "", "v:v",   "8b@8>8h: {x}"),
    (0xFD89, "i16x8.extend_low_i8x16_u",      "", "v:v",   "8B>8H: {x}"),
    (0xFD8A, "i16x8.extend_high_i8x16_u",     "", "v:v",   "8B@8>8H: {x}"),
    (0xFD8B, "i16x8.shl",                     "", "vi:v",  "8H: {x} << ({y} & 15) & 0xFFFF"),
    (0xFD8C, "i16x8.shr_s",                   "", "vi:v",  "8h: {x} >> ({y} & 15)"),
    (0xFD8D, "i16x8.shr_u",                   "", "vi:v",  "8H: {x} >> ({y} & 15)"),
    (0xFD8E, "i16x8.add",                     "", "vv:v",  "8H: {x} + {y} & 0xFFFF"),
    (0xFD8F, "i16x8.add_sat_s",               "", "vv:v",  "8h: max(-0x8000, min({x} + {y}, 0x7FFF))"),
    (0xFD90, "i16x8.add_sat_u",               "", "vv:v",  "8H: min({x} + {y}, 0xFFFF)"),
    (0xFD91, "i16x8.sub",                     "", "vv:v",  "8H: {x} - {y} & 0xFFFF"),
    (0xFD92, "i16x8.sub_sat_s",               "", "vv:v",  "8h: max(-0x8000, min({x} - {y}, 0x7FFF))"),
    (0xFD93, "i16x8.sub_sat_u",               "", "vv:v",  "8H: max({x} - {y}, 0)"),
    (0xFD94, "f64x2.nearest",                 "", "v:v",   "2d: fnearest({x})"),
    (0xFD95, "i16x8.mul",                     "", "vv:v",  "8H: {x} * {y} & 0xFFFF"),
    (0xFD96, "i16x8.min_s",                   "", "vv:v",  "8h: min({x}, {y})"),
    (0xFD97, "i16x8.min_u",                   "", "vv:v",  "8H: min({x}, {y})"),
    (0xFD98, "i16x8.max_s",                   "", "vv:v",  "8h: max({x}, {y})"),
    (0xFD99, "i16x8.max_u",                   "", "vv:v",  "8H: max({x}, {y})"),
    (0xFD9B, "i16x8.avgr_u",                  "", "vv:v",  "8H: {x} + {y} + 1 >> 1"),
    (0xFD9C, "i16x8.extmul_low_i8x16_s",      "", "vv:v",  "8b>8h: {x} * {y}"),
    (0xFD9D, "i16x8.extmul_high_i8x16_s",     "", "vv:v",  "8b@8>8h: {x} * {y}"),
    (0xFD9E, "i16x8.extmul_low_i8x16_u",      "", "vv:v",  "8B>8H: {x} * {y}"),
    (0xFD9F, "i16x8.extmul_high_i8x16_u",     "", "vv:v",  "8B@8>8H: {x} * {y}"),
    (0xFDA0, "i32x4.abs",                     "", "v:v",   "4i>4I: abs({x})"),
    (0xFDA1, "i32x4.neg",                     "", "v:v",   "4I: -{x} & 0xFFFFFFFF"),
    (0xFDA3, "i32x4.all_true",                "", "v:i",   "all(unpack_lanes('4I', {x}))"),
    (0xFDA4, "i32x4.bitmask",                 "", "v:i",   "bitmask('4i', {x})"),
    (0xFDA7, "i32x4.extend_low_i16x8_s",      "", "v:v",   "4h>4i: {x}"),
    (0xFDA8, "i32x4.extend_high_i16x8_s",     "", "v:v",   "4h@8>4i: {x}"),
    (0xFDA9, "i32x4.extend_low_i16x8_u",      "", "v:v",   "4H>4I: {x}"),
    (0xFDAA, "i32x4.extend_high_i16x8_u",     "", "v:v",   "4H@8>4I: {x}"),
    (0xFDAB, "i32x4.shl",                     "", "vi:v",  "4I: {x} << ({y} & 31) & 0xFFFFFFFF"),
    (0xFDAC, "i32x4.shr_s",                   "", "vi:v",  "4i: {x} >> ({y} & 31)"),
    (0xFDAD, "i32x4.shr_u",                   "", "vi:v",  "4I: {x} >> ({y} & 31)"),
    (0xFDAE, "i32x4.add",                     "", "vv:v",  "4I: {x} + {y} & 0xFFFFFFFF"),
    (0xFDB1, "i32x4.sub",                     "", "vv:v",  "4I: {x} - {y} & 0xFFFFFFFF"),
    (0xFDB5, "i32x4.mul",                     "", "vv:v",  "4I: {x} * {y} & 0xFFFFFFFF"),
    (0xFDB6, "i32x4.min_s",                   "", "vv:v",  "4i: min({x}, {y})"),
    (0xFDB7, "i32x4.min_u",                   "", "vv:v",  "4I: min({x}, {y})"),
    (0xFDB8, "i32x4.max_s",                   "", "vv:v",  "4i: max({x}, {y})"),
    (0xFDB9, "i32x4.max_u",                   "", "vv:v",  "4I: max({x}, {y})"),
    (0xFDBA, "i32x4.dot_i16x8_s",             "", "vv:v",  "dot({x}, {y}, '8h', '4I', 0xFFFFFFFF)"),
    (0xFDBC, "i32x4.extmul_low_i16x8_s",      "", "vv:v",  "4h>4i: {x} * {y}"),
    (0xFDBD, "i32x4.extmul_high_i16x8_s",     "", "vv:v",  "4h@8>4i: {x} * {y}"),
    (0xFDBE, "i32x4.extmul_low_i16x8_u",      "", "vv:v",  "4H>4I: {x} * {y}"),
    (0xFDBF, "i32x4.extmul_high_i16x8_u",     "", "vv:v",  "4H@8>4I: {x} * {y}"),
    (0xFDC0, "i64x2.abs",                     "", "v:v",   "2q>2Q: abs({x})"),
    (0xFDC1, "i64x2.neg",                     "", "v:v",   "2Q: -{x} & 0xFFFFFFFFFFFFFFFF"),
    (0xFDC3, "i64x2.all_true",                "", "v:i",   "all(unpack_lanes('2Q', {x}))"),
    (0xFDC4, "i64x2.bitmask",                 "", "v:i",   "bitmask('2q', {x})"),
    (0xFDC7, "i64x2.extend_low_i32x4_s",      "", "v:v",   "2i>2q: {x}"),
    (0xFDC8, "i64x2.extend_high_i32x4_s",     "", "v:v",   "2i@8>2q: {x}"),
    (0xFDC9, "i64x2.extend_low_i32x4_u",      "", "v:v",   "2I>2Q: {x}"),
    (0xFDCA, "i64x2.extend_high_i32x4_u",     "", "v:v",   "2I@8>2Q: {x}"),
    (0xFDCB, "i64x2.shl",                     "", "vi:v",  "2Q: {x} << ({y} & 63) & 0xFFFFFFFFFFFFFFFF"),
    (0xFDCC, "i64x2.shr_s",                   "", "vi:v",  "2q: {x} >> ({y} & 63)"),
    (0xFDCD, "i64x2.shr_u",                   "", "vi:v",  "2Q: {x} >> ({y} & 63)"),
    (0xFDCE, "i64x2.add",                     "", "vv:v",  "2Q: {x} + {y} & 0xFFFFFFFFFFFFFFFF"),
    (0xFDD1, "i64x2.sub",                     "", "vv:v",  "2Q: {x} - {y} & 0xFFFFFFFFFFFFFFFF"),
    (0xFDD5, "i64x2.mul",                     "", "vv:v",  "2Q: {x} * {y} & 0xFFFFFFFFFFFFFFFF"),
    (0xFDD6, "i64x2.eq",                      "", "vv:v",  "2q: -({x} == {y})"),
    (0xFDD7, "i64x2.ne",                      "", "vv:v",  "2q: -({x} != {y})"),
    (0xFDD8, "i64x2.lt_s",                    "", "vv:v",  "2q: -({x} < {y})"),
    (0xFDD9, "i64x2.gt_s",                    "", "vv:v",  "2q: -({x} > {y})"),
    (0xFDDA, "i64x2.le_s",                    "", "vv:v",  "2q: -({x} <= {y})"),
    (0xFDDB, "i64x2.ge_s",                    "", "vv:v",  "2q: -({x} >= {y})"),
    (0xFDDC, "i64x2.extmul_low_i32x4_s",      "", "vv:v",  "2i>2q: {x} * {y}"),
    (0xFDDD, "i64x2.extmul_high_i32x4_s",     "", "vv:v",  "2i@8>2q: {x} * {y}"),
    (0xFDDE, "i64x2.extmul_low_i32x4_u",      "", "vv:v",  "2I>2Q: {x} * {y}"),
    (0xFDDF, "i64x2.extmul_high_i32x4_u",     "", "vv:v",  "2I@8>2Q: {x} * {y}"),
    (0xFDE0, "f32x4.abs",                     "", "v:v",   "4I: {x} & 0x7FFFFFFF"),
    (0xFDE1, "f32x4.neg",                     "", "v:v",   "4I: {x} ^ 0x80000000"),
    (0xFDE3, "f32x4.sqrt",                    "", "v:v",   "4f: fsqrt({x})"),
    (0xFDE4, "f32x4.add",                     "", "vv:v",  "4f: {x} + {y}"),
    (0xFDE5, "f32x4.sub",                     "", "vv:v",  "4f: {x} - {y}"),
    (0xFDE6, "f32x4.mul",                     "", "vv:v",  "4f: {x} * {y}"),
    (0xFDE7, "f32x4.div",                     "", "vv:v",  "4f: fdiv({x}, {y})"),
    (0xFDE8, "f32x4.min",                     "", "vv:v",  "4f: fmin({x}, {y})"),
    (0xFDE9, "f32x4.max",                     "", "vv:v",  "4f: fmax({x}, {y})"),
    (0xFDEA, "f32x4.pmin",                    "", "vv:v",  "4I: {y} if f32_from_bits({y}) < f32_from_bits({x}) else {x}"),
    (0xFDEB, "f32x4.pmax",                    "", "vv:v",  "4I: {y} if f32_from_bits({x}) < f32_from_bits({y}) else {x}"),
    (0xFDEC, "f64x2.abs",                     "", "v:v",   "2Q: {x} & 0x7FFFFFFFFFFFFFFF"),
    (0xFDED, "f64x2.neg",                     "", "v:v",   "2Q: {x} ^ 0x8000000000000000"),
    (0xFDEF, "f64x2.sqrt",                    "", "v:v",   "2d: fsqrt({x})"),
    (0xFDF0, "f64x2.add",                     "", "vv:v",  "2d: {x} + {y}"),
    (0xFDF1, "f64x2.sub",                     "", "vv:v",  "2d: {x} - {y}"),
    (0xFDF2, "f64x2.mul",                     "", "vv:v",  "2d: {x} * {y}"),
    (0xFDF3, "f64x2.div",                     "", "vv:v",  "2d: fdiv({x}, {y})"),
    (0xFDF4, "f64x2.min",                     "", "vv:v",  "2d: fmin({x}, {y})"),
    (0xFDF5, "f64x2.max",                     "", "vv:v",  "2d: fmax({x}, {y})"),
    (0xFDF6, "f64x2.pmin",                    "", "vv:v",  "2Q: {y} if f64_from_bits({y}) < f64_from_bits({x}) else {x}"),
    (0xFDF7, "f64x2.pmax",                    "", "vv:v",  "2Q: {y} if f64_from_bits({x}) < f64_from_bits({y}) else {x}"),
    (0xFDF8, "i32x4.trunc_sat_f32x4_s",       "", "v:v",   "4f>4i: trunc_sat({x}, -0x80000000, 0x7FFFFFFF)"),
    (0xFDF9, "i32x4.trunc_sat_f32x4_u",       "", "v:v",   "4f>4I: trunc_sat({x}, 0, 0xFFFFFFFF)"),
    (0xFDFA, "f32x4.convert_i32x4_s",         "", "v:v",   "4i>4f: float({x})"),
    (0xFDFB, "f32x4.convert_i32x4_u",         "", "v:v",   "4I>4f: float({x})"),
    (0xFDFC, "i32x4.trunc_sat_f64x2_s_zero",  "", "v:v",   "2d>2i8x: trunc_sat({x}, -0x80000000, 0x7FFFFFFF)"),
    (0xFDFD, "i32x4.trunc_sat_f64x2_u_zero",  "", "v:v",   "2d>2I8x: trunc_sat({x}, 0, 0xFFFFFFFF)"),
    (0xFDFE, "f64x2.convert_low_i32x4_s",     "", "v:v",   "2i>2d: float({x})"),
    (0xFDFF, "f64x2.convert_low_i32x4_u",     "", "v:v",   "2I>2d: float({x})"),
    # Relaxed vectors: deterministic here, each does what its strict sibling does
    (0xFD100, "i8x16.relaxed_swizzle",         "", "vv:v",  "{y}.translate({x} + bytes(240))"),
    (0xFD101, "i32x4.relaxed_trunc_f32x4_s",     "", "v:v",   "4f>4i: trunc_sat({x}, -0x80000000, 0x7FFFFFFF)"),
    (0xFD102, "i32x4.relaxed_trunc_f32x4_u",     "", "v:v",   "4f>4I: trunc_sat({x}, 0, 0xFFFFFFFF)"),
    (0xFD103, "i32x4.relaxed_trunc_f64x2_s_zero", "", "v:v",   "2d>2i8x: trunc_sat({x}, -0x80000000, 0x7FFFFFFF)"),
    (0xFD104, "i32x4.relaxed_trunc_f64x2_u_zero", "", "v:v",   "2d>2I8x: trunc_sat({x}, 0, 0xFFFFFFFF)"),
    (0xFD105, "f32x4.relaxed_madd",              "", "vvv:v", "4f: to_f32({x} * {y}) + {z}"),
    (0xFD106, "f32x4.relaxed_nmadd",             "", "vvv:v", "4f: {z} - to_f32({x} * {y})"),
    (0xFD107, "f64x2.relaxed_madd",              "", "vvv:v", "2d: {x} * {y} + {z}"),
    (0xFD108, "f64x2.relaxed_nmadd",             "", "vvv:v", "2d: {z} - {x} * {y}"),
    (0xFD109, "i8x16.relaxed_laneselect",        "", "vvv:v", "2Q: {x} & {z} | {y} & ~{z}"),
    (0xFD10A, "i16x8.relaxed_laneselect",        "", "vvv:v", "2Q: {x} & {z} | {y} & ~{z}"),
    (0xFD10B, "i32x4.relaxed_laneselect",        "", "vvv:v", "2Q: {x} & {z} | {y} & ~{z}"),
    (0xFD10C, "i64x2.relaxed_laneselect",        "", "vvv:v", "2Q: {x} & {z} | {y} & ~{z}"),
    (0xFD10D, "f32x4.relaxed_min",               "", "vv:v",  "4f: fmin({x}, {y})"),
    (0xFD10E, "f32x4.relaxed_max",               "", "vv:v",  "4f: fmax({x}, {y})"),
    (0xFD10F, "f64x2.relaxed_min",               "", "vv:v",  "2d: fmin({x}, {y})"),
    (0xFD110, "f64x2.relaxed_max",               "", "vv:v",  "2d: fmax({x}, {y})"),
    (0xFD111, "i16x8.relaxed_q15mulr_s",         "", "vv:v",  "8h: min({x} * {y} + 0x4000 >> 15, 0x7FFF)"),
    (0xFD112, "i16x8.relaxed_dot_i8x16_i7x16_s", "", "vv:v",  "dot({x}, {y}, '16b', '8H', 0xFFFF)"),
    (0xFD113, "i32x4.relaxed_dot_i8x16_i7x16_add_s", "", "vvv:v", "dot_add({x}, {y}, {z})"),
    # Atomic: after the prefix byte 0xFE (the threads proposal)
    (0xFE00, "memory.atomic.notify",            "memarg", "ii:i",  "notify I"),
    (0xFE01, "memory.atomic.wait32",            "memarg", "iiI:i", "wait I"),
    (0xFE02, "memory.atomic.wait64",            "memarg", "iII:i", "wait Q"),
    (0xFE03, "atomic.fence",                    "reserved", None,    None),
    (0xFE10, "i32.atomic.load",                 "memarg", "i:i",   "atomic_load I"),
    (0xFE11, "i64.atomic.load",                 "memarg", "i:I",   "atomic_load Q"),
    (0xFE12, "i32.atomic.load8_u",              "memarg", "i:i",   "atomic_load B"),
    (0xFE13, "i32.atomic.load16_u",             "memarg", "i:i",   "atomic_load H"),
    (0xFE14, "i64.atomic.load8_u",              "memarg", "i:I",   "atomic_load B"),
    (0xFE15, "i64.atomic.load16_u",             "memarg", "i:I",   "atomic_load H"),
    (0xFE16, "i64.atomic.load32_u",             "memarg", "i:I",   "atomic_load I"),
    (0xFE17, "i32.atomic.store",                "memarg", "ii:",   "atomic_store I"),
    (0xFE18, "i64.atomic.store",                "memarg", "iI:",   "atomic_store Q"),
    (0xFE19, "i32.atomic.store8",               "memarg", "ii:",   "atomic_store B"),
    (0xFE1A, "i32.atomic.store16",              "memarg", "ii:",   "atomic_store H"),
    (0xFE1B, "i64.atomic.store8",               "memarg", "iI:",   "atomic_store B"),
    (0xFE1C, "i64.atomic.store16",              "memarg", "iI:",   "atomic_store H"),
    (0xFE1D, "i64.atomic.store32",              "memarg", "iI:",   "atomic_store I"),
    (0xFE1E, "i32.atomic.rmw.add",              "memarg", "ii:i",  "rmw I {x} + {y}"),
    (0xFE1F, "i64.atomic.rmw.add",              "memarg", "iI:I",  "rmw Q {x} + {y}"),
    (0xFE20, "i32.atomic.rmw8.add_u",           "memarg", "ii:i",  "rmw B {x} + {y}"),
    (0xFE21, "i32.atomic.rmw16.add_u",          "memarg", "ii:i",  "rmw H {x} + {y}"),
    (0xFE22, "i64.atomic.rmw8.add_u",           "memarg", "iI:I",  "rmw B {x} + {y}"),
    (0xFE23, "i64.atomic.rmw16.add_u",          "memarg", "iI:I",  "rmw H {x} + {y}"),
    (0xFE24, "i64.atomic.rmw32.add_u",          "memarg", "iI:I",  "rmw I {x} + {y}"),
    (0xFE25, "i32.atomic.rmw.sub",              "memarg", "ii:i",  "rmw I {x} - {y}"),
    (0xFE26, "i64.atomic.rmw.sub",              "memarg", "iI:I",  "rmw Q {x} - {y}"),
    (0xFE27, "i32.atomic.rmw8.sub_u",           "memarg", "ii:i",  "rmw B {x} - {y}"),
    (0xFE28, "i32.atomic.rmw16.sub_u",          "memarg", "ii:i",  "rmw H {x} - {y}"),
    (0xFE29, "i64.atomic.rmw8.sub_u",           "memarg", "iI:I",  "rmw B {x} - {y}"),
    (0xFE2A, "i64.atomic.rmw16.sub_u",          "memarg", "iI:I",  "rmw H {x} - {y}"),
    (0xFE2B, "i64.atomic.rmw32.sub_u",          "memarg", "iI:I",  "rmw I {x} - {y}"),
    (0xFE2C, "i32.atomic.rmw.and",              "memarg", "ii:i",  "rmw I {x} & {y}"),
    (0xFE2D, "i64.atomic.rmw.and",              "memarg", "iI:I",  "rmw Q {x} & {y}"),
    (0xFE2E, "i32.atomic.rmw8.and_u",           "memarg", "ii:i",  "rmw B {x} & {y}"),
    (0xFE2F, "i32.atomic.rmw16.and_u",          "memarg", "ii:i",  "rmw H {x} & {y}"),
    (0xFE30, "i64.atomic.rmw8.and_u",           "memarg", "iI:I",  "rmw B {x} & {y}"),
    (0xFE31, "i64.atomic.rmw16.and_u",          "memarg", "iI:I",  "rmw H {x} & {y}"),
    (0xFE32, "i64.atomic.rmw32.and_u",          "memarg", "iI:I",  "rmw I {x} & {y}"),
    (0xFE33, "i32.atomic.rmw.or",               "memarg", "ii:i",  "rmw I {x} | {y}"),
    (0xFE34, "i64.atomic.rmw.or",               "memarg", "iI:I",  "rmw Q {x} | {y}"),
    (0xFE35, "i32.atomic.rmw8.or_u",            "memarg", "ii:i",  "rmw B {x} | {y}"),
    (0xFE36, "i32.atomic.rmw16.or_u",           "memarg", "ii:i",  "rmw H {x} | {y}"),
    (0xFE37, "i64.atomic.rmw8.or_u",            "memarg", "iI:I",  "rmw B {x} | {y}"),
    (0xFE38, "i64.atomic.rmw16.or_u",           "memarg", "iI:I",  "rmw H {x} | {y}"),
    (0xFE39, "i64.atomic.rmw32.or_u",           "memarg", "iI:I",  "rmw I {x} | {y}"),
    (0xFE3A, "i32.atomic.rmw.xor",              "memarg", "ii:i",  "rmw I {x} ^ {y}"),
    (0xFE3B, "i64.atomic.rmw.xor",              "memarg", "iI:I",  "rmw Q {x} ^ {y}"),
    (0xFE3C, "i32.atomic.rmw8.xor_u",           "memarg", "ii:i",  "rmw B {x} ^ {y}"),
    (0xFE3D, "i32.atomic.rmw16.xor_u",          "memarg", "ii:i",  "rmw H {x} ^ {y}"),
    (0xFE3E, "i64.atomic.rmw8.xor_u",           "memarg", "iI:I",  "rmw B {x} ^ {y}"),
    (0xFE3F, "i64.atomic.rmw16.xor_u",          "memarg", "iI:I",  "rmw H {x} ^ {y}"),
    (0xFE40, "i64.atomic.rmw32.xor_u",          "memarg", "iI:I",  "rmw I {x} ^ {y}"),
    (0xFE41, "i32.atomic.rmw.xchg",             "memarg", "ii:i",  "rmw I {y}"),
    (0xFE42, "i64.atomic.rmw.xchg",             "memarg", "iI:I",  "rmw Q {y}"),
    (0xFE43, "i32.atomic.rmw8.xchg_u",          "memarg", "ii:i",  "rmw B {y}"),
    (0xFE44, "i32.atomic.rmw16.xchg_u",         "memarg", "ii:i",  "rmw H {y}"),
    (0xFE45, "i64.atomic.rmw8.xchg_u",          "memarg", "iI:I",  "rmw B {y}"),
    (0xFE46, "i64.atomic.rmw16.xchg_u",         "memarg", "iI:I",  "rmw H {y}"),
    (0xFE47, "i64.atomic.rmw32.xchg_u",         "memarg", "iI:I",  "rmw I {y}"),
    (0xFE48, "i32.atomic.rmw.cmpxchg",          "memarg", "iii:i", "cmpxchg I"),
    (0xFE49, "i64.atomic.rmw.cmpxchg",          "memarg", "iII:I", "cmpxchg Q"),
    (0xFE4A, "i32.atomic.rmw8.cmpxchg_u",       "memarg", "iii:i", "cmpxchg B"),
    (0xFE4B, "i32.atomic.rmw16.cmpxchg_u",      "memarg", "iii:i", "cmpxchg H"),
    (0xFE4C, "i64.atomic.rmw8.cmpxchg_u",       "memarg", "iII:I", "cmpxchg B"),
    (0xFE4D, "i64.atomic.rmw16.cmpxchg_u",      "memarg", "iII:I", "cmpxchg H"),
    (0xFE4E, "i64.atomic.rmw32.cmpxchg_u",      "memarg", "iII:I", "cmpxchg I"),
)

# The opcodes above are the prefix byte's digits and then the number's: 0xFD 0x0B
# is 0xFD0B, and 0xFD 0x113 is 0xFD113.
PREFIX_BYTES = (0xFB, 0xFC, 0xFD, 0xFE)


# === 7. Numerics ==============================================================
#
# The functions that the table's expressions name (section 4.3). Integers come
# and go unsigned. A float operation computes in double precision; for f32 its
# result is rounded once more, which is as good as rounding once for + - * / and
# sqrt because a double has more than twice the bits of an f32. A NaN keeps its payload:
# an f32 NaN is held as the double with the payload in the same leading bits.

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
    if x != x:
        return quiet(x)
    return copysign(INFINITY, x) * copysign(1.0, y) if x else NAN


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
ffloor = rounding(floor)
fceil = rounding(ceil)
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


def lanes(format):
    """(unpack, pack) of a vector's lanes; packing rounds doubles once to f32."""
    access = struct.Struct("<" + format)
    if "f" not in format:
        return access.unpack_from, access.pack

    def pack_floats(*values):
        try:
            return access.pack(*values)
        except OverflowError:
            return access.pack(*map(to_f32, values))
    return access.unpack_from, pack_floats


def unpack_lanes(format, x):
    """A vector's lanes as a tuple."""
    return struct.unpack("<" + format, x)


def bitmask(format, x):
    """bitmask: bit i is the sign of lane i; `format` is signed."""
    return sum((value < 0) << i for i, value in enumerate(unpack_lanes(format, x)))


def narrow(x, source, target, low, high):
    """narrow: the lanes of two vectors, each saturated to the range of half its bits."""
    return struct.pack("<" + target, *[max(low, min(value, high)) for value in unpack_lanes(source, x)])


def add_pairs(x, source, target):
    """extadd_pairwise: sums of neighbours."""
    values = unpack_lanes(source, x)
    return struct.pack("<" + target, *map(int.__add__, values[::2], values[1::2]))


def dot(x, y, source, target, mask):
    """dot: sums of neighbouring products, modulo 2**N."""
    products = list(map(int.__mul__, unpack_lanes(source, x), unpack_lanes(source, y)))
    return struct.pack("<" + target, *[a + b & mask for a, b in zip(products[::2], products[1::2])])


def dot_add(x, y, z):
    """relaxed_dot_i8x16_i7x16_add_s"""
    sums = unpack_lanes("8h", dot(x, y, "16b", "8H", 0xFFFF))
    return struct.pack("<4I", *[a + b + c & MAX_U32 for a, b, c in
                                zip(sums[::2], sums[1::2], unpack_lanes("4I", z))])


# === 8. Handlers ==============================================================
#
# A handler executes one instruction: handler(R, d, a, b), where R is the frame, a
# list, and d, a, b say where in R the result and the operands are, or carry an
# immediate. Handlers of regular instructions are made from the table's
# expressions the first time that an instruction occurs in code that runs: a
# program uses some sixty of them, and making all would cost more than running it.
#
# A reference is a Python object: None for null, a Function or HostFunction, an
# Aggregate, an I31, a Thrown, or whatever an embedder passes as an externref.


class Op:
    """A row of INSTRUCTIONS made ready for chapter 11: `params` (a list) and
    `results` are value types, `shape` one of the constants below, `handler` and
    `method` None until the instruction is first met, `width` the bytes of a memory
    access or a lane."""

    __slots__ = ("opcode", "name", "immediates", "shape", "params", "results", "meaning", "handler", "method", "width")

    def __init__(self, opcode, name, immediates, type, meaning):
        self.opcode, self.name, self.meaning, self.handler, self.method = opcode, name, meaning, None, None
        self.immediates = immediates.split()
        params, results = type.split(":") if type else ("", "")
        self.params = [TYPE_LETTERS[letter] for letter in params]
        self.results = [TYPE_LETTERS[letter] for letter in results]
        self.width = struct.calcsize("<" + meaning.split()[1]) if type and immediates else 0
        self.shape = len(params) if type and not immediates and len(params) < 3 else IRREGULAR
        if immediates == "memarg":
            self.shape = MEMORY_SHAPES.get(meaning.split()[0], IRREGULAR)


IRREGULAR, UNARY, BINARY, LOAD, STORE = range(5)
MEMORY_SHAPES = {"load": LOAD, "widen": LOAD, "store": STORE}
OPS = {row[0]: row for row in INSTRUCTIONS}         # opcode -> the row, or the Op once it was used


def operation(opcode):
    """The Op of `opcode`; raises Malformed for a hole in the table."""
    op = OPS.get(opcode)
    if op is None:
        raise Malformed("illegal opcode %02x" % opcode)
    if op.__class__ is tuple:
        op = OPS[opcode] = Op(*op)
    return op


def define(source, **names):
    """The function `handler` that `source` defines, over the numerics and `names`: a closure,
    for a copy of globals() would write to the reference count of everything, which unshares
    the pages that a container has in common with its shim."""
    scratch = {}
    exec("def make(%s):\n  def handler(R, d, a, b):\n    %s\n  return handler" % (
        ", ".join(names), "\n    ".join(source)), globals(), scratch)
    return scratch["make"](**names)


def remember(op, handler, memory=None):
    """Notes on a handler which row of the table it executes, for the native tier."""
    handler.op, handler.memory = op, memory
    return handler


PLACES = {1: ("R[a]",), 2: ("R[a]", "R[b]"), 3: ("R[a]", "R[b[0]]", "R[b[1]]")}


def numeric_handler(op):
    """The handler of a regular instruction without immediates, from the table's
    expression. Of three operands, the last two are slots in `b`."""
    source, value, names = numeric_source(op, PLACES[len(op.params)])
    return remember(op, define(source + ["R[d] = " + value], **names))


def numeric_source(op, places):
    """A regular instruction on operands in `places` as (lines, what then is its value, what the names are
    that it needs besides the numerics)."""
    expression = op.meaning
    if ": " in expression:
        return lanewise_source(op, *expression.split(": "), places)
    names, source = {}, []
    for name, place in zip("xyz", places):
        names[name] = place
        if expression.count("{%s}" % name) > 1:
            source.append("%s = %s" % (name, place))
            names[name] = name
    return source, expression.format(**names), {}


def lanewise_source(op, format, expression, places):
    """The same of a lane by lane operation, unrolled."""
    source, _, target = format.partition(">")
    source, _, offset = source.partition("@")
    target = target or source
    count, code, operands = int(source[:-1]), [], {}
    for name, place, type in zip("xyz", places, op.params):
        if type == V128:
            operands[name] = [name + str(lane) for lane in range(count)]
            code.append("%s = unpack_%s(%s, %d)" % (", ".join(operands[name]), source, place, int(offset or 0)))
        else:
            operands[name] = [name] * count
            code.append("%s = %s" % (name, place))
    values = [expression.format(**dict(zip(operands, lane))) for lane in zip(*operands.values())]
    names = {"unpack_" + source: lanes(source)[0], "pack_" + target: lanes(target)[1]}
    return code, "pack_%s(%s)" % (target, ", ".join(values)), names


# What the verbs of memory accesses and lane accesses do. {at} is the address and {rest}
# what follows the format in the table. A load has its address in slot a and the offset
# in b; a store has the value in slot b and the offset in d, negative lest it be taken for
# a slot that is written; all others have (offset, slots or lane …) in b.
ACCESSES = {
    "load": ("R[d] = unpack(memory.view, {at})[0] {rest}",),
    "widen": ("R[d] = widen(*unpack(memory.view, {at}))",),
    "store": ("pack(memory.view, {at}, R[b] {rest})",),
    "load_lane": ("_, slot, lane = b", "vector = R[slot]",
                  "R[d] = vector[:lane] + unpack(memory.view, {at})[0] + vector[lane + width:]"),
    "store_lane": ("_, slot, lane = b", "pack(memory.view, {at}, R[slot][lane:lane + width])"),
    "extract": ("R[d] = unpack(R[a], b)[0] {rest}",),
    "replace": ("slot, lane = b", "vector = bytearray(R[a])", "pack(vector, lane, R[slot] {rest})", "R[d] = bytes(vector)"),
    "atomic_load": ("R[d] = unpack(memory.view, aligned({at}, width))[0]",),
    "atomic_store": ("pack(memory.view, aligned({at}, width), R[b[1]] & mask)",),
    "rmw": ("address = aligned({at}, width)", "x, y = unpack(memory.view, address)[0], R[b[1]]",
            "pack(memory.view, address, {rest} & mask)", "R[d] = x"),
    "cmpxchg": ("address = aligned({at}, width)", "x = unpack(memory.view, address)[0]", "if x == R[b[1]]:",
                "    pack(memory.view, address, R[b[2]] & mask)", "R[d] = x"),
    "notify": ("unpack(memory.view, aligned({at}, width))", "R[d] = 0"),
    "wait": ("x = unpack(memory.view, aligned({at}, width))[0]", "R[d] = wait(memory, x == R[b[1]], R[b[2]])"),
}


def access_handler(op, memory=None):
    """The handler of an access to `memory` or to a lane. A memory's view is as long as
    the memory, so that the struct module refuses what lies outside; execute() makes
    that a trap."""
    verb, letter, *rest = op.meaning.split(None, 2)
    rest = "".join(rest)
    access, mask = struct.Struct("<" + letter), (1 << 8 * op.width) - 1
    unpack, pack = (unpack_f32_at, pack_f32_at) if letter == "f" else (access.unpack_from, access.pack_into)
    widen = struct.Struct("<" + rest).pack if verb == "widen" else None
    at = {"load": "R[a] + b", "widen": "R[a] + b", "store": "R[a] - d"}.get(verb, "R[a] + b[0]")
    if memory and memory.address == I64 or sys.maxsize < 1 << 34:
        at = "min(%s, %d)" % (at, sys.maxsize)      # which is out of bounds, and fits the struct module
    rest = "(%s)" % rest.format(x="x", y="y") if verb == "rmw" else rest
    source = [line.format(at=at, rest=rest) for line in ACCESSES[verb]]
    handler = define(source, memory=memory, unpack=unpack, pack=pack, widen=widen, width=op.width, mask=mask)
    return remember(op, handler, memory)


def unpack_f32_at(buffer, address):
    """The f32 at an address, in a tuple: by way of the bits if it is a NaN."""
    value = struct.unpack_from("<f", buffer, address)
    return value if value[0] == value[0] else (f32_from_bits(struct.unpack_from("<I", buffer, address)[0]),)


def pack_f32_at(buffer, address, value):
    """Writes an f32: by way of the bits if it is a NaN."""
    struct.pack_into("<I", buffer, address, f32_bits(value))


def aligned(address, width):
    """The address of an atomic access, which must be a multiple of its width."""
    if address % width:
        raise Trap("unaligned atomic")
    return address


def wait(memory, is_equal, timeout_ns):
    """memory.atomic.wait: 1 not equal, 2 timed out. There is one agent, so nobody could
    wake it: a wait ends at once, and one without a timeout is a deadlock."""
    if not memory.shared:
        raise Trap("expected shared memory")
    if not is_equal:
        return 1
    if timeout_ns >> 63:
        raise Trap("deadlock: the only agent waits forever")
    return 2


def out_of_bounds(what):
    return Trap("out of bounds %s access" % what)


def do_move(R, d, a, b):
    """`b` is the type of what is moved."""
    R[d] = R[a]


def do_count(R, d, a, b):
    """Counts how much a function executes. `a` is [what is left, …, the tier that wants to
    know when nothing is]; `d` is, at a loop's head, (the head, the types of the operands there),
    or None where a frame stays in its tier."""
    a[0] -= b
    if a[0] < 0:
        a[-1].heat(a, d)


def do_select(R, d, a, b):
    R[d] = R[a] if R[b[1]] else R[b[0]]


def do_shuffle(R, d, a, b):
    slot, indices = b
    R[d] = indices.translate(R[a] + R[slot] + bytes(224))


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


def do_ref_eq(R, d, a, b):
    x, y = R[a], R[b]
    R[d] = x is y or x.__class__ is I31 and y.__class__ is I31 and x == y


def do_ref_as_non_null(R, d, a, b):
    if R[a] is None:
        raise Trap("null reference")
    R[d] = R[a]


def do_ref_test(R, d, a, b):
    R[d] = reference_matches(R[a], *b)


def do_ref_cast(R, d, a, b):
    if not reference_matches(R[a], *b):
        raise Trap("cast failure")
    R[d] = R[a]


def reference_matches(reference, heap, nullable):
    """Whether a reference, of the hierarchy of `heap`, has this type (4.5.1)."""
    if reference is None:
        return nullable
    if heap in (EXTERN, EXN, ANY, FUNC):
        return True                     # the top of its hierarchy
    if reference.__class__ is I31:
        return heap_matches(I31_HEAP, heap)
    type = getattr(reference, "type", None)         # an external object that was made an anyref may have any
    return isinstance(type, DefinedType) and heap_matches(type, heap)


def do_ref_i31(R, d, a, b):
    R[d] = I31(R[a] & 0x7FFFFFFF)


def do_i31_get_u(R, d, a, b):
    if R[a] is None:
        raise Trap("null i31 reference")
    R[d] = int(R[a])


def do_i31_get_s(R, d, a, b):
    if R[a] is None:
        raise Trap("null i31 reference")
    R[d] = signed(int(R[a]), 31) & MAX_U32


class I31(int):
    """An unboxed scalar, an i31ref: told from an embedder's int by its class."""

    __slots__ = ()


class Aggregate:
    """A structure or an array: its DefinedType and the list of its fields, packed
    ones unsigned."""

    __slots__ = ("type", "fields")

    def __init__(self, type, fields):
        self.type, self.fields = type, fields


def fields_of(reference, what):
    """The fields of an aggregate; a trap for null."""
    if reference is None:
        raise Trap("null %s reference" % what)
    return reference.fields


def do_struct_new(R, d, a, b):
    R[d] = Aggregate(a, [R[slot] for slot in b])


def do_struct_new_packed(R, d, a, b):
    R[d] = Aggregate(a, [packed(R[slot], storage) for slot, (storage, _) in zip(b, a.fields)])


def do_struct_new_default(R, d, a, b):
    R[d] = Aggregate(a, [zero(storage) for storage, _ in a.fields])


def do_struct_get(R, d, a, b):
    R[d] = fields_of(R[a], "structure")[b]


def do_struct_get_s(R, d, a, b):
    field, bits = b
    R[d] = signed(fields_of(R[a], "structure")[field], bits) & MAX_U32


def do_struct_set(R, d, a, b):
    slot, field, storage = b
    fields_of(R[a], "structure")[field] = packed(R[slot], storage)


def packed(value, storage):
    """A value as a field of this storage type holds it."""
    return value & 0xFF if storage == I8 else value & 0xFFFF if storage == I16 else value


def zero(type):
    """The default value of a value or storage type (4.2.1)."""
    return ZERO.get(type)


ZERO = {I32: 0, I64: 0, F32: 0.0, F64: 0.0, V128: bytes(16), I8: 0, I16: 0}


def do_array_new(R, d, a, b):
    check_array_size(R[b[1]])
    R[d] = Aggregate(a, [packed(R[b[0]], a.fields[0][0])] * R[b[1]])


def do_array_new_default(R, d, a, b):
    check_array_size(R[b])
    R[d] = Aggregate(a, [zero(a.fields[0][0])] * R[b])


def check_array_size(count):
    """Before its elements are made."""
    if count > MAX_ARRAY_ELEMENTS:
        raise Exhaustion("array of %d elements: at most %d" % (count, MAX_ARRAY_ELEMENTS))


def do_array_new_fixed(R, d, a, b):
    storage = a.fields[0][0]
    R[d] = Aggregate(a, [packed(R[slot], storage) for slot in b])


def do_array_new_data(R, d, a, b):
    type, segments, index = a
    R[d] = Aggregate(type, elements_of_data(type, segments[index], R[b[0]], R[b[1]]))


def do_array_new_elem(R, d, a, b):
    type, segments, index = a
    start, count = R[b[0]], R[b[1]]
    if start + count > len(segments[index]):
        raise out_of_bounds("table")
    check_array_size(count)
    R[d] = Aggregate(type, list(segments[index][start:start + count]))


STORAGE_FORMATS = {I8: "B", I16: "H", I32: "I", I64: "Q", F32: "I", F64: "d", V128: "16s"}


def elements_of_data(type, data, start, count):
    """The `count` elements of an array that a data segment holds from `start` on."""
    storage = type.fields[0][0]
    access = struct.Struct("<" + STORAGE_FORMATS[storage])
    if start + count * access.size > len(data):
        raise out_of_bounds("memory")
    check_array_size(count)
    values = [value for value, in access.iter_unpack(data[start:start + count * access.size])]
    return list(map(f32_from_bits, values)) if storage == F32 else values


def elements_at(reference, index, count=1):
    """The list of an array's elements, where that many lie at `index`."""
    elements = fields_of(reference, "array")
    if index + count > len(elements):
        raise out_of_bounds("array")
    return elements


def do_array_get(R, d, a, b):
    R[d] = elements_at(R[a], R[b])[R[b]]


def do_array_get_s(R, d, a, b):
    slot, bits = b
    R[d] = signed(elements_at(R[a], R[slot])[R[slot]], bits) & MAX_U32


def do_array_set(R, d, a, b):
    array, index, value = (R[slot] for slot in b)
    elements_at(array, index)[index] = packed(value, a)


def do_array_len(R, d, a, b):
    R[d] = len(fields_of(R[a], "array"))


def do_array_fill(R, d, a, b):
    array, start, value, count = (R[slot] for slot in b)
    elements_at(array, start, count)[start:start + count] = [packed(value, a)] * count


def do_array_copy(R, d, a, b):
    array, to, source, start, count = (R[slot] for slot in b)
    elements = elements_at(array, to, count)
    elements[to:to + count] = elements_at(source, start, count)[start:start + count]


def do_array_init_data(R, d, a, b):
    type, segments, index = a
    array, to, start, count = (R[slot] for slot in b)
    elements = elements_at(array, to, count)
    elements[to:to + count] = elements_of_data(type, segments[index], start, count)


def do_array_init_elem(R, d, a, b):
    segments, index = a
    array, to, start, count = (R[slot] for slot in b)
    elements = elements_at(array, to, count)
    if start + count > len(segments[index]):
        raise out_of_bounds("table")
    elements[to:to + count] = segments[index][start:start + count]


def do_table_callee(R, d, a, b):
    """The function that call_indirect finds in its table."""
    table, type = a
    index = R[b]
    if index >= len(table.elements):
        raise Trap("undefined element")
    callee = table.elements[index]
    if callee is None:
        raise Trap("uninitialized element %d" % index)
    if callee.type is not type and not callee.type.matches(type):
        raise Trap("indirect call type mismatch")
    R[d] = callee


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
    a.changed()


def do_table_size(R, d, a, b):
    R[d] = len(a.elements)


def do_table_grow(R, d, a, b):
    R[d] = a.grow(R[b[1]], R[b[0]]) & ADDRESS_MASKS[a.address]


ADDRESS_MASKS = {I32: MAX_U32, I64: MAX_U64}


def do_table_fill(R, d, a, b):
    start, value, count = (R[slot] for slot in b)
    if start + count > len(a.elements):
        raise out_of_bounds("table")
    a.elements[start:start + count] = [value] * count
    a.changed()


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
    table.changed()


def do_drop_segment(R, d, a, b):
    a[b] = b""                          # neither bytes nor elements


def do_memory_size(R, d, a, b):
    R[d] = a.pages


def do_memory_grow(R, d, a, b):
    R[d] = a.grow(R[b]) & ADDRESS_MASKS[a.address]


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
    copy_bytes(memory.view, to, segments[index], start, count)


def copy_bytes(view, to, source, start, count):
    """memory.copy and memory.init: bounds first, then all or nothing."""
    if start + count > len(source) or to + count > len(view):
        raise out_of_bounds("memory")
    view[to:to + count] = source[start:start + count]


# === 9. Modules ===============================================================
#
# The decoder of everything but function bodies (section 5.5). In: the bytes of
# a module, or a mapping of its file. Out: a Module, whose sections are lists of
# plain values. Bodies stay bytes until they are first called: the specification
# allows it (appendix, Implementation Limitations), and a program that prints a line
# executes one function in six. What can be checked without bodies is checked here.

EXTERN_KINDS = ("func", "table", "memory", "global", "tag")


class Import:
    """import ::= module name, item name, kind of EXTERN_KINDS and its type: an index
    of Module.types for a function or tag, else a TableType, Limits or GlobalType."""

    __slots__ = ("module", "name", "kind", "type")

    def __init__(self, module, name, kind, type):
        self.module, self.name, self.kind, self.type = module, name, kind, type


class Segment:
    """An element or data segment: `mode` is "active", "passive" or "declarative";
    `index` the table or memory and `offset` the expression of an active one; `type` the
    reference type of elements; `items` a list of function indices or expressions, or the bytes."""

    __slots__ = ("mode", "index", "offset", "type", "items")

    def __init__(self, mode, index, offset, type, items):
        self.mode, self.index, self.offset, self.type, self.items = mode, index, offset, type, items


class Body:
    """A function's code: `data[start:end]`, locals first; or a constant expression of
    several instructions, which has no locals. (One of a single instruction is held as
    (opcode, immediate).)"""

    __slots__ = ("start", "end")

    def __init__(self, start, end):
        self.start, self.end = start, end


class Module:
    """A decoded module.

    `data` is bytes or any indexable buffer. Raises Malformed or Invalid. Function
    bodies are decoded and validated when they are first called, or all at once
    by `validate()`. `tier` decides which functions are compiled: a Tier, a PortableTier,
    or None."""

    tier = None

    def __init__(self, data):
        if len(data) > MAX_MODULE_BYTES:
            raise Invalid("module of more than %d bytes" % MAX_MODULE_BYTES)
        self.data = data
        self.types = []             # DefinedType
        self.imports = []
        self.functions = []         # type index of every function, imports first
        self.tables = []            # TableType of every table, imports first
        self.memories = []          # Limits
        self.globals = []           # GlobalType
        self.global_inits = []      # expression of every global that is not imported
        self.tags = []              # type index of every tag, imports first
        self.exports = {}           # name -> (kind, index)
        self.start = None
        self.elements = []
        self.data_count = None
        self.bodies = []            # Body of every function that is not imported
        self.datas = []
        self.customs = []           # (name, start, end) of every custom section
        self.declared = set()       # functions that ref.func may name in bodies
        self.names = None           # see function_names()
        self.labels = None          # function index -> what people call it, when somebody asks (chapter 16)
        self.type_indices = None    # DefinedType -> its index, likewise
        self.shell = None           # see shell_of()
        self.translator = None      # what translates its functions in place of a Translator: instrument()
        ModuleDecoder(self).decode()
        check_module(self)
        self.shell = None

    @property
    def imported_functions(self):
        """How many functions are imported: the index of the first own one."""
        return len(self.functions) - len(self.bodies)

    def spaces(self):
        """The five index spaces, in the order of EXTERN_KINDS."""
        return self.functions, self.tables, self.memories, self.globals, self.tags

    def function_type(self, index):
        """The DefinedType of function `index`."""
        return self.types[self.functions[index]]

    def validate(self):
        """Validates every function body; raises Malformed or Invalid, or Exhaustion for one that
        is too complex for this engine."""
        validate_bodies(self)

    def function_names(self):
        """{function index: name} of the name section's subsection 1, as far as there is
        one and it can be read: names are a courtesy, never an error."""
        if self.names is not None:
            return self.names
        names = self.names = {}
        for name, start, end in self.customs:
            if name != "name":
                continue
            reader = Reader(self.data, start, end)
            try:
                while reader.position < reader.end:
                    kind, size = reader.byte(), reader.unsigned()
                    reader.end = stop = min(reader.position + size, end)
                    if kind == 1:
                        for _ in range(reader.unsigned()):
                            index = reader.unsigned()
                            names[index] = reader.name()
                    reader.position, reader.end = stop, end
            except Malformed:
                pass
        return names


class TypeReader(Reader):
    """A cursor that reads types; `types` is what type indices refer to."""

    __slots__ = ("types",)

    def value_type(self):
        """valtype ::= numtype | vectype | reftype"""
        type = self.byte()
        if I32 >= type >= V128:
            return type
        self.position -= 1
        return self.reference_type("malformed value type")

    def storage_type(self):
        """storagetype ::= valtype | 0x78 | 0x77"""
        type = self.byte()
        if type in (I8, I16):
            return type
        self.position -= 1
        return self.value_type()

    def reference_type(self, error="malformed reference type"):
        """reftype ::= 0x63 heaptype | 0x64 heaptype | absheaptype"""
        type = self.byte()
        if type in HEAP_NAMES and type != UNKNOWN:
            return type, True
        if type not in (0x63, 0x64):
            raise Malformed(error)
        return self.heap_type(), type == 0x63

    def heap_type(self):
        """heaptype ::= absheaptype | s33 type index"""
        index = self.signed(33)
        if index >= 0:
            return self.type_at(index)
        if index & 0x7F not in HEAP_NAMES or index < -64:
            raise Malformed("malformed heap type")
        return index & 0x7F

    def type_at(self, index):
        """The DefinedType with this index."""
        check_index("type", index, self.types)
        return self.types[index]


class ModuleDecoder(TypeReader):
    """Reads the sections into `module`; one method for each nonterminal of
    section 5.5."""

    __slots__ = ("module",)

    def __init__(self, module):
        super().__init__(module.data)
        self.module = module
        self.types = module.types

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
                raise Malformed("length out of bounds" if section <= 13 else "malformed section id")
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
                if len(self.module.customs) == MAX_CUSTOMS:
                    raise Invalid("custom sections: at most %d" % MAX_CUSTOMS)
                self.module.customs.append((name, self.position, stop))
                self.position = stop
            self.end = whole
        module = self.module
        if len(module.functions) - sum(item.kind == "func" for item in module.imports) != len(module.bodies):
            raise Malformed("function and code section have inconsistent lengths")
        if module.data_count not in (None, len(module.datas)):
            raise Malformed("data count and data section have inconsistent lengths")

    def limits(self, bound, bound_64, error):
        """limits ::= flags n [m]; bits of the flags: 0 maximum, 1 shared, 2 64-bit"""
        flags = self.byte()
        if flags > 7:
            raise Malformed("malformed limits flags")
        bound = bound_64 if flags & 4 else bound
        limits = Limits(self.unsigned(64), self.unsigned(64) if flags & 1 else None,
                        I64 if flags & 4 else I32, bool(flags & 2))
        if limits.minimum > bound or limits.maximum is not None and limits.maximum > bound:
            raise Invalid(error)
        if limits.maximum is not None and limits.minimum > limits.maximum:
            raise Invalid("size minimum must not be greater than maximum")
        return limits

    def table_type(self):
        """tabletype ::= reftype limits"""
        element, limits = self.reference_type(), self.limits(MAX_U32, MAX_U64, "table size")
        if limits.shared:
            raise Malformed("malformed limits flags")
        return TableType(element, limits)

    def memory_type(self):
        """memtype ::= limits"""
        limits = self.limits(MAX_PAGES, MAX_PAGES_64, "memory size must be at most 65536 pages (4GiB)")
        if limits.shared and limits.maximum is None:
            raise Invalid("shared memory must have maximum")
        return limits

    def tag_type(self):
        """tagtype ::= 0x00 typeidx"""
        if self.byte():
            raise Malformed("malformed tag attribute")
        return self.unsigned()

    def global_type(self):
        """globaltype ::= valtype mut"""
        return GlobalType(self.value_type(), self.mutability())

    def mutability(self):
        """mut ::= 0x00 | 0x01"""
        byte = self.byte()
        if byte > 1:
            raise Malformed("malformed mutability")
        return byte == 1

    def type_section(self):
        """typesec ::= vec(rectype)"""
        for _ in range(self.unsigned()):
            self.recursive_type()

    def recursive_type(self):
        """rectype ::= 0x4E vec(subtype) | subtype"""
        first, count = len(self.types), 1
        if self.position < self.end and self.data[self.position] == 0x4E:
            self.position += 1
            count = self.unsigned()
            if count > self.end - self.position:
                raise Malformed("unexpected end")
        if first + count > MAX_TYPES:
            raise Invalid("%d types: at most %d" % (first + count, MAX_TYPES))
        group = [DefinedType() for _ in range(count)]
        self.types += group             # before they are read: they may refer to each other
        for index, type in enumerate(group, first):
            self.sub_type(type, index)
        identify(group)
        for type in group:
            if type.supertype is not None and not subtype_fits(type):
                raise Invalid("sub type")

    def sub_type(self, type, index):
        """subtype ::= (0x50 | 0x4F) vec(typeidx) comptype | comptype"""
        form, supertype, final = self.byte(), None, True
        if form in (0x50, 0x4F):
            final = form == 0x4F
            for parent in self.vector(self.unsigned, 1, "supertypes"):
                if parent >= index:
                    raise Invalid("unknown type %d" % parent)
                supertype = self.types[parent]
            form = self.byte()
        if form == 0x60:
            type.__init__(FUNC, self.vector(self.value_type, MAX_PARAMS, "parameters"),
                          self.vector(self.value_type, MAX_RESULTS, "results"), (), supertype, final)
        elif form == 0x5F:
            type.__init__(STRUCT, (), (), self.vector(self.field_type, MAX_FIELDS, "fields"), supertype, final)
        elif form == 0x5E:
            type.__init__(ARRAY, (), (), (self.field_type(),), supertype, final)
        else:
            raise Malformed("integer representation too long" if form & 0x80 else "malformed definition type")

    def field_type(self):
        """fieldtype ::= storagetype mut"""
        return self.storage_type(), self.mutability()

    def import_section(self):
        """importsec ::= vec(name name importdesc)"""
        spaces = self.module.spaces()
        for _ in range(self.count(MAX_IMPORTS, "imports")):
            module, name, kind = self.name(), self.name(), self.byte()
            if kind > 4:
                raise Malformed("malformed import kind")
            type = (self.unsigned, self.table_type, self.memory_type, self.global_type, self.tag_type)[kind]()
            self.module.imports.append(Import(module, name, EXTERN_KINDS[kind], type))
            spaces[kind].append(type)

    def function_section(self):
        """funcsec ::= vec(typeidx)"""
        self.module.functions += self.vector(self.unsigned, MAX_FUNCTIONS, "functions")

    def table_section(self):
        """tablesec ::= vec(tabletype | 0x40 0x00 tabletype expr)"""
        for _ in range(self.count(MAX_TABLES, "tables")):
            if self.position < self.end and self.data[self.position] == 0x40:
                if self.take(2)[1]:
                    raise Malformed("zero byte expected")
                type = self.table_type()
                type.init = self.expression()
            else:
                type = self.table_type()
                if not type.element[1]:
                    raise Invalid("type mismatch")
            self.module.tables.append(type)

    def memory_section(self):
        """memsec ::= vec(memtype)"""
        self.module.memories += self.vector(self.memory_type, MAX_MEMORIES, "memories")

    def global_section(self):
        """globalsec ::= vec(globaltype expr)"""
        for _ in range(self.count(MAX_GLOBALS, "globals")):
            type = self.global_type()
            self.module.global_inits.append(self.expression())
            self.module.globals.append(type)        # it is not in its own scope

    def tag_section(self):
        """tagsec ::= vec(tagtype)"""
        self.module.tags += self.vector(self.tag_type, MAX_TAGS, "tags")

    def export_section(self):
        """exportsec ::= vec(name exportdesc)"""
        for _ in range(self.count(MAX_EXPORTS, "exports")):
            name, kind, index = self.name(), self.byte(), self.unsigned()
            if kind > 4:
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
        for _ in range(self.count(MAX_SEGMENTS, "element segments")):
            flag = self.unsigned()
            if flag > 7:
                raise Malformed("malformed elements segment kind")
            mode, index, offset, type = "active", 0, None, FUNCREF if flag & 4 else (FUNC, False)
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
            items = self.vector(self.expression if flag & 4 else self.unsigned, MAX_TABLE_ELEMENTS, "elements")
            self.module.elements.append(Segment(mode, index, offset, type, items))

    def data_count_section(self):
        """datacountsec ::= u32"""
        self.module.data_count = self.unsigned()

    def code_section(self):
        """codesec ::= vec(size func)"""
        bodies = self.module.bodies
        for _ in range(self.count(MAX_FUNCTIONS, "functions")):
            size = self.unsigned()
            start = self.position
            self.position = start + size
            if self.position > self.end:
                raise Malformed("unexpected end")
            bodies.append(self.body(start))

    def body(self, start):
        """The Body from `start` to here."""
        size = self.position - start
        if size > MAX_BODY_BYTES:
            raise Invalid("body of %d bytes: at most %d" % (size, MAX_BODY_BYTES))
        return Body(start, self.position)

    def data_section(self):
        """datasec ::= vec(data)"""
        for _ in range(self.count(MAX_SEGMENTS, "data segments")):
            flag = self.unsigned()
            if flag > 2:
                raise Malformed("malformed data segment kind")
            index = self.unsigned() if flag == 2 else 0
            offset = None if flag == 1 else self.expression()
            mode = "passive" if flag == 1 else "active"
            self.module.datas.append(Segment(mode, index, offset, None, self.take(self.unsigned())))

    def expression(self):
        """expr ::= instr* 0x0B, constant: (opcode, immediate) if it is one instruction,
        else a Body, which check_constant() validates."""
        start, first, count = self.position, None, 0
        if self.byte() == 0x41:                 # an address, nearly always
            value = self.i32()
            if self.byte() == 0x0B:
                return 0x41, value
        self.position = start
        while True:
            opcode = self.byte()
            if opcode == 0x0B:
                return first if count == 1 and first[0] in SIMPLE_CONSTANTS else self.body(start)
            if opcode in PREFIX_BYTES:
                opcode = prefixed(opcode, self.unsigned())
            immediates = CONSTANT_INSTRUCTIONS.get(opcode)
            if immediates is None:
                raise Invalid("constant expression required: %s" % operation(opcode).name)
            values = [read(self) for read in immediates]
            if opcode == 0x23:
                self.check_constant_global(values[0])
            elif opcode == 0xD2:
                self.module.declared.add(values[0])
            count += 1
            first = opcode, values[0] if values else None

    def check_constant_global(self, index):
        """What a constant expression refers to must be immutable and defined before."""
        check_index("global", index, self.module.globals)
        if self.module.globals[index].mutable:
            raise Invalid("constant expression required: mutable global")

    def i32(self):
        return self.signed(32) & MAX_U32

    def i64(self):
        return self.signed(64) & MAX_U64

    def f32(self):
        return f32_from_bits(unpack_u32(self.take(4))[0])

    def f64(self):
        return unpack_f64(self.take(8))[0]

    def v128(self):
        return bytes(self.take(16))


def prefixed(prefix, number):
    """The opcode as in INSTRUCTIONS of an instruction with a prefix byte."""
    if number > 0xFFF:
        raise Malformed("illegal opcode %02x %x" % (prefix, number))
    return prefix << 8 | number if number < 0x100 else prefix << 12 | number


# The instructions of section 3.4.13 and how their immediates are read.
CONSTANT_INSTRUCTIONS = {
    0x41: (ModuleDecoder.i32,), 0x42: (ModuleDecoder.i64,), 0x43: (ModuleDecoder.f32,), 0x44: (ModuleDecoder.f64,),
    0xFD0C: (ModuleDecoder.v128,), 0x23: (Reader.unsigned,), 0xD2: (Reader.unsigned,), 0xD0: (TypeReader.heap_type,),
    0x6A: (), 0x6B: (), 0x6C: (), 0x7C: (), 0x7D: (), 0x7E: (), 0xFB00: (Reader.unsigned,), 0xFB01: (Reader.unsigned,),
    0xFB06: (Reader.unsigned,), 0xFB07: (Reader.unsigned,), 0xFB08: (Reader.unsigned, Reader.unsigned),
    0xFB1A: (), 0xFB1B: (), 0xFB1C: (),
}
CONSTANT_TYPES = {0x41: I32, 0x42: I64, 0x43: F32, 0x44: F64, 0xFD0C: V128}
SIMPLE_CONSTANTS = (*CONSTANT_TYPES, 0x23, 0xD0, 0xD2)
SECTION_ORDER = (1, 2, 3, 4, 5, 13, 6, 7, 8, 9, 12, 10, 11)
SECTION_READERS = {
    1: ModuleDecoder.type_section, 2: ModuleDecoder.import_section,
    3: ModuleDecoder.function_section, 4: ModuleDecoder.table_section,
    5: ModuleDecoder.memory_section, 6: ModuleDecoder.global_section,
    7: ModuleDecoder.export_section, 8: ModuleDecoder.start_section,
    9: ModuleDecoder.element_section, 10: ModuleDecoder.code_section,
    11: ModuleDecoder.data_section, 12: ModuleDecoder.data_count_section,
    13: ModuleDecoder.tag_section,
}


def check_module(module):
    """Validates all but function bodies (section 3.5); raises Invalid."""
    for space, what, limit in ((module.functions, "functions", MAX_FUNCTIONS), (module.tables, "tables", MAX_TABLES),
                               (module.memories, "memories", MAX_MEMORIES)):
        if len(space) > limit:
            raise Invalid("%d %s: at most %d" % (len(space), what, limit))
    for index in module.functions + module.tags:
        check_index("type", index, module.types)
        if module.types[index].kind != FUNC:
            raise Invalid("type mismatch: not a function type")
    for index in module.tags:
        if module.types[index].results:
            raise Invalid("non-empty tag result type")
    for type, init in zip(module.globals[len(module.globals) - len(module.global_inits):], module.global_inits):
        check_constant(module, init, type.value)
    for table in module.tables:
        if table.init is not None:
            check_constant(module, table.init, table.element)
    spaces = dict(zip(EXTERN_KINDS, module.spaces()))
    for kind, index in module.exports.values():
        check_index({"func": "function"}.get(kind, kind), index, spaces[kind])
        if kind == "func":
            module.declared.add(index)
    if module.start is not None:
        check_index("function", module.start, module.functions)
        type = module.function_type(module.start)
        if type.params or type.results:
            raise Invalid("start function")
    for segment in module.elements:
        check_element(module, segment)
    for segment in module.datas:
        if segment.mode == "active":
            check_index("memory", segment.index, module.memories)
            check_constant(module, segment.offset, module.memories[segment.index].address)


def check_element(module, segment):
    """elem: its table, its offset and each of its items."""
    if segment.mode == "active":
        check_index("table", segment.index, module.tables)
        table = module.tables[segment.index]
        if not type_matches(segment.type, table.element):
            raise Invalid("type mismatch")
        check_constant(module, segment.offset, table.limits.address)
    for item in segment.items:
        if item.__class__ is int:
            check_index("function", item, module.functions)
            module.declared.add(item)
        else:
            check_constant(module, item, segment.type)


def check_index(kind, index, space):
    """An index must lie in its space."""
    if index >= len(space):
        raise Invalid("unknown %s %d" % (kind, index))


def check_constant(module, expression, type):
    """A constant expression (section 3.4.13) yields exactly one `type`."""
    if expression.__class__ is Body:
        return validate_expression(module, expression, type)
    opcode, immediate = expression
    if opcode == 0x23:
        actual = module.globals[immediate].value
    elif opcode == 0xD2:
        check_index("function", immediate, module.functions)
        actual = module.function_type(immediate), False
    elif opcode == 0xD0:
        actual = immediate, True
    else:
        actual = CONSTANT_TYPES[opcode]
    if not type_matches(actual, type):
        raise Invalid("type mismatch")


# === 10. Store and instances ==================================================
#
# The run-time structure of section 4.2. In: a Module and what it imports. Out: an Instance,
# whose exports can be called, and whose imports have the types that the module declares.
# A linear memory is one anonymous mapping, reserved once as large as the memory may become:
# its address never moves, pages that are never touched cost nothing, and growing changes a number.

MAP_NORESERVE = 0x4000              # mmap(2); the mmap module names it from 3.13 on
SMALLEST_RESERVATION = 1 << 24


class Memory:
    """A linear memory. `pages` is its size, `capacity` the size that it can grow to, `view` a memoryview
    of just the size; whoever keeps a view over a guest call must fetch it anew."""

    __slots__ = ("pages", "maximum", "capacity", "mapping", "view", "address", "shared", "observers")

    def __init__(self, minimum=0, maximum=None, address=I32, shared=False):
        self.observers = []         # called with the memory when it has grown
        self.pages, self.maximum, self.address, self.shared = minimum, maximum, address, shared
        if minimum > MAX_PAGES:
            raise Exhaustion("memory of %d pages: at most %d" % (minimum, MAX_PAGES))
        limit = MAX_PAGES if maximum is None else min(maximum, MAX_PAGES)
        self.mapping = self.reserve(minimum, limit)
        self.capacity = min(limit, len(self.mapping) // PAGE_BYTES)
        self.view = memoryview(self.mapping)[:minimum * PAGE_BYTES]

    @staticmethod
    def reserve(minimum, maximum):
        """The mapping; smaller than `maximum` pages where address space is short (a
        32-bit board, vm.overcommit_memory=2)."""
        size = wanted = maximum * PAGE_BYTES or PAGE_BYTES
        while True:
            try:
                mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
                if size == wanted or size // 2 < max(minimum * PAGE_BYTES, SMALLEST_RESERVATION):
                    return mapping
                mapping.close()
                wanted = size = size // 2       # of what there is: the rest of the process needs some, too
            except (OSError, OverflowError):
                if size <= max(minimum * PAGE_BYTES, SMALLEST_RESERVATION):
                    raise Exhaustion("cannot reserve %d pages of memory" % minimum) from None
                size = max(size // 2, minimum * PAGE_BYTES, PAGE_BYTES)

    def grow(self, pages):
        """memory.grow: the old size in pages, or -1."""
        old = self.pages
        if old + pages > self.capacity:
            return -1
        self.pages = old + pages
        self.view = memoryview(self.mapping)[:self.pages * PAGE_BYTES]
        for observer in self.observers:
            observer(self)
        return old


class Table:
    """A table of references; null is None. Whoever changes `elements` calls changed()."""

    __slots__ = ("element", "elements", "maximum", "address", "mirrors")

    def __init__(self, element, minimum=0, maximum=None, value=None, address=I32):
        self.mirrors = []           # what keeps a copy of the elements
        if minimum > MAX_TABLE_ELEMENTS:
            raise Exhaustion("table of %d elements: at most %d" % (minimum, MAX_TABLE_ELEMENTS))
        self.element, self.maximum, self.address = element, maximum, address
        try:
            self.elements = [value] * minimum
        except MemoryError:
            raise Exhaustion("no memory for a table of %d elements" % minimum) from None

    def grow(self, count, value=None):
        """table.grow: the old size, or -1."""
        old = len(self.elements)
        limit = MAX_TABLE_ELEMENTS if self.maximum is None else min(self.maximum, MAX_TABLE_ELEMENTS)
        if old + count > limit:
            return -1
        try:
            self.elements.extend([value] * count)
        except MemoryError:
            return -1
        self.changed()
        return old

    def changed(self):
        """Tells the mirrors."""
        for mirror in self.mirrors:
            mirror.clear()


class Global:
    """A global variable; `value` is in the interpreter's form (integers unsigned)."""

    __slots__ = ("type", "value")

    def __init__(self, type, value):
        self.type = type
        self.value = value


class Tag:
    """An exception tag; told from others by its identity. `type` is a DefinedType."""

    __slots__ = ("type",)

    def __init__(self, type):
        self.type = type


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
    its frame beyond the arguments, both None until it is first called; it may not be
    called at a depth beyond `limit`. A constant expression has the index None."""

    __slots__ = ("type", "instance", "body", "index", "entry", "template", "limit")
    host = False

    def __init__(self, type, instance, body, index):
        self.type, self.instance, self.body, self.index = type, instance, body, index
        self.entry = self.template = None

    @property
    def name(self):
        return self.instance.module.function_names().get(self.index, "func[%s]" % self.index)

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
    if type == V128:
        if not isinstance(value, bytes) or len(value) != 16:
            raise TypeError("%r is not 16 bytes" % (value,))
    elif (not reference_matches(value, *type)
          or value is not None and not isinstance(value, REFERENCES.get(top_of(type[0]), object))):
        raise TypeError("%r is not a %s" % (value, type_name(type)))
    return value


REFERENCES = {FUNC: (Function, HostFunction), EXN: Thrown}      # top of a hierarchy -> what refers; in others, any object


def to_python(type, value):
    """A value of the interpreter as a Python value: integers signed."""
    return signed(int(value), 32 if type == I32 else 64) if type in (I32, I64) else value


def from_results(type, values):
    """None, a value, or a tuple of values."""
    values = tuple(to_python(t, value) for t, value in zip(type.results, values))
    return values[0] if len(values) == 1 else values or None


class Instance:
    """A module instance. `imports` is {module: {name: callable or extern}}; `exports`
    {name: Function, Table, Memory, Global or Tag}. Raises Unlinkable, and whatever its
    start function raises."""

    __slots__ = ("module", "functions", "tables", "memories", "globals", "tags", "elements", "datas", "exports", "handlers",
                 "context", "scope", "__weakref__")

    def __init__(self, module, imports=None):
        self.module = module
        self.handlers = {}          # opcode + (memory index << 32) -> handler of a memory access
        self.context = self.scope = None        # of its native code and its transcribed functions, if there are any
        spaces = {kind: [] for kind in EXTERN_KINDS}
        for item in module.imports:
            spaces[item.kind].append(resolve(module, item, imports or {}))
        self.functions = functions = spaces["func"]
        for body in module.bodies:
            functions.append(Function(module.function_type(len(functions)), self, body, len(functions)))
        self.tables, self.memories = spaces["table"], spaces["memory"]
        self.globals, self.tags = spaces["global"], spaces["tag"]
        for type, init in zip(module.globals[len(self.globals):], module.global_inits):
            self.globals.append(Global(type, self.constant(init, type.value)))
        self.tags += [Tag(module.types[index]) for index in module.tags[len(self.tags):]]
        if sum(table.limits.minimum for table in module.tables) > MAX_TABLE_ELEMENTS:
            raise Exhaustion("tables of more than %d elements" % MAX_TABLE_ELEMENTS)
        for table in module.tables[len(self.tables):]:
            value, limits = self.constant(table.init, table.element) if table.init else None, table.limits
            self.tables.append(Table(table.element, limits.minimum, limits.maximum, value, limits.address))
        self.memories += [Memory(m.minimum, m.maximum, m.address, m.shared) for m in module.memories[len(self.memories):]]
        self.exports = {name: spaces[kind][index] for name, (kind, index) in module.exports.items()}
        self.elements = [[functions[item] if item.__class__ is int else self.constant(item, s.type) for item in s.items]
                         for s in module.elements]
        self.datas = [s.items for s in module.datas]
        self.initialize()

    def initialize(self):
        """Copies the active segments in order, then calls the start function (4.7.2)."""
        for index, segment in enumerate(self.module.elements):
            if segment.mode == "active":
                source = self.elements[index]
                offset = self.constant(segment.offset, self.tables[segment.index].address)
                copy_elements(self.tables[segment.index], offset, source, 0, len(source))
            if segment.mode != "passive":
                self.elements[index] = ()
        for index, segment in enumerate(self.module.datas):
            if segment.mode == "active":
                memory = self.memories[segment.index]
                copy_bytes(memory.view, self.constant(segment.offset, memory.address), segment.items, 0, len(segment.items))
                self.datas[index] = b""
        if self.module.start is not None:
            execute_any(self.functions[self.module.start], [])

    def constant(self, expression, type):
        """The value of a constant expression."""
        if expression.__class__ is Body:
            return execute(Function(FunctionType((), (type,)), self, expression, None), [])[0]
        opcode, immediate = expression
        if opcode == 0x23:
            return self.globals[immediate].value
        if opcode == 0xD2:
            return self.functions[immediate]
        return None if opcode == 0xD0 else immediate

    def memory_handler(self, op, index):
        """The handler of a memory access on memory `index`."""
        key = op.opcode + (index << 32)
        handler = self.handlers.get(key)
        if handler is None:
            handler = self.handlers[key] = access_handler(op, self.memories[index])
        return handler


def resolve(module, item, imports):
    """The extern that satisfies an Import, its type matched (section 4.7.2)."""
    where = "%s.%s" % (item.module, item.name)
    try:
        extern = imports[item.module][item.name]
    except KeyError:
        raise Unlinkable("unknown import %s" % where) from None
    if item.kind == "func":
        type = module.types[item.type]
        if not isinstance(extern, (Function, HostFunction)) and callable(extern):
            return python_function(type, extern, where)
        fits = isinstance(extern, (Function, HostFunction)) and extern.type.matches(type)
    elif item.kind == "table":
        fits = (isinstance(extern, Table) and extern.element == item.type.element
                and item.type.limits.admits(len(extern.elements), extern))
    elif item.kind == "memory":
        fits = isinstance(extern, Memory) and item.type.admits(extern.pages, extern) and item.type.shared == extern.shared
    elif item.kind == "tag":
        fits = isinstance(extern, Tag) and extern.type == module.types[item.type]
    else:
        fits = isinstance(extern, Global) and field_matches((extern.type.value, extern.type.mutable),
                                                            (item.type.value, item.type.mutable))
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
# each instruction, validates it (section 3.4) by the algorithm of the specification's
# appendix, Validation Algorithm, and translates it.
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
#     [ body, kind, x, y, z ]     body: [(handler, d, a, b, at), …]
#
# where `at` is the instruction's offset in the function's body, for backtraces, and
# whose kind says how it ends:
#
#     BR         go to x                       BR_TABLE   go to x[min(R[y], z)]
#     BR_IF      go to x if R[y] else z        RETURN     with the values R[i], i in y
#     CALL       x = callee, y = argument slots, z = (next block, first result's slot, handlers, at, type)
#     CALL_REF   x = slot of the callee, y and z as for CALL
#     TAIL_CALL  x = slot of the callee, y = argument slots, z = (None, 0, None, at, type)
#     THROW      x = tag, y = slots of its values, z = (None, 0, handlers, at); x = None: rethrow R[y[0]]
#
# The handlers of a place are None or (clauses, handlers further out), a clause is
# (tag or None for all, whether it wants the exnref, block, first value's slot).
#
# At the entry and the end of every construct all operands lie in the slots of their
# own heights, so that paths can meet. A branch that has to move values first goes
# by way of a block of its own.

BR, BR_IF, BR_TABLE, RETURN, CALL, CALL_REF, TAIL_CALL, THROW = range(8)
CALL_COST = 4                   # a call counts as if it executed one in so many bytes of the body
ALIAS_STEPS_PER_BYTE = 64       # see count_aliases()
OPERAND_STEPS_PER_BYTE = 8      # see count_operands()
MAX_LOOP_OPERANDS = 1000        # below a loop at whose head a frame may go over to another tier


class Control:
    """A control frame of the appendix. `opcode` is that of block, loop, if or else. `target`
    is the block that a branch to the label goes to, `label_types` are those of what it carries;
    `next` is the block after `end`, `other` the else branch of an if. `was_set` is how many
    locals had been set before it, `handlers` the handlers around it."""

    __slots__ = ("opcode", "params", "results", "label_types", "height", "unreachable", "target", "next", "other", "was_set",
                 "handlers")

    def __init__(self, opcode, params, results, height, was_set=0, handlers=None):
        self.opcode, self.params, self.results, self.label_types, self.height = opcode, params, results, results, height
        self.unreachable, self.was_set, self.handlers = False, was_set, handlers
        self.target = self.next = new_block()
        self.other = None


def new_block():
    return [[], None, None, None, None]


class Translator:
    """Translates one function of an instance: `run()` sets its entry and template.
    Raises Malformed or Invalid, or Exhaustion for what is too complex."""

    __slots__ = ("function", "instance", "module", "reader", "locals", "zeros", "types", "slots", "controls", "block", "base",
                 "deepest", "constants", "unset", "was_set", "handlers", "aliases", "alias_steps", "operand_steps", "at",
                 "counter")

    def __init__(self, function):
        self.function = function
        self.instance = function.instance
        self.module = self.instance.module
        body = function.body
        self.reader = reader = TypeReader(bytes(self.module.data[body.start:body.end]))
        reader.types = self.module.types
        self.locals = list(function.type.params)
        self.zeros = []             # what the other locals start with
        self.unset = set()          # the locals that have no default value and were not set yet …
        self.was_set = []           # … and those that were
        if function.index is not None:
            self.read_locals()
        self.base = len(self.locals)
        self.types = []             # the operand stack's types …
        self.slots = []             # … and where the operands are
        self.deepest = 0
        self.constants = {}         # key -> (slot, value)
        self.handlers = None
        self.at = 0                 # where the current instruction is
        self.aliases = True         # whether an operand may be a local's or a constant's slot
        self.alias_steps = ALIAS_STEPS_PER_BYTE * reader.end + 10000
        self.operand_steps = OPERAND_STEPS_PER_BYTE * reader.end + 100000
        self.block = new_block()
        self.counter = None         # what the steps of do_count count down, see the native tier

    def read_locals(self):
        """locals ::= vec(n valtype); counted before they are made."""
        reader = self.reader
        total = len(self.locals)
        for _ in range(reader.unsigned()):
            count = reader.unsigned()
            total += count
            if total > MAX_LOCALS:
                raise Malformed("too many locals: %d, at most %d" % (total, MAX_LOCALS))
            type = reader.value_type()
            if not defaultable(type):
                self.unset.update(range(total - count, total))
            self.locals += [type] * count
            self.zeros += [zero(type)] * count

    def run(self):
        """Translates the body and completes the Function."""
        function = self.function
        entry = self.block
        if self.module.tier and not self.module.translator and function.index is not None and self.instance is not self.module.shell:
            self.counter = self.module.tier.counter(function, self.locals)
            self.emit(do_count, None, self.counter, 10 + self.reader.end // CALL_COST)
        results = list(function.type.results)
        self.controls = [Control(0x02, [], results, 0)]
        self.instructions()
        if self.controls:
            raise Malformed("unexpected end of section or function")
        if self.reader.position != self.reader.end:
            raise Malformed("END opcode expected")
        constants = [value for _, value in self.constants.values()]
        function.template = self.zeros + [None] * self.deepest + constants[::-1]
        function.limit = min(MAX_FRAMES, MAX_FRAME_SLOTS // (len(function.type.params) + len(function.template) + 1))
        function.entry = entry
        if self.counter and self.counter[0] < 0:
            self.module.tier.heat(self.counter)

    def instructions(self):
        """expr ::= instr* 0x0B: the loop over the body, or over as much of it as the reader's
        window shows. The regular shapes are here, all else has a method named after the
        instruction."""
        reader = self.reader
        data, end = reader.data, reader.end
        types, slots, locals, base, controls = self.types, self.slots, self.locals, self.base, self.controls
        memories, accesses = self.module.memories, self.instance.handlers
        is_plain_memory = bool(memories) and memories[0].address == I32
        local_get = 0x20 if self.aliases and not self.unset else -1
        while controls:
            at = reader.position
            if at >= end:
                return
            opcode = data[at]
            reader.position = at + 1
            if opcode == local_get:
                index = reader.unsigned()
                if index >= base:
                    raise Invalid("unknown local %d" % index)
                types.append(locals[index])
                slots.append(index)
                continue
            op = OPS.get(opcode)
            if op.__class__ is not Op:      # a prefix byte, or an instruction not met before
                if opcode in PREFIX_BYTES:
                    opcode = prefixed(opcode, reader.unsigned())
                op = operation(opcode)
            shape = op.shape
            if shape == IRREGULAR:
                method = op.method
                if method is None:
                    method = op.method = getattr(Translator, method_name(op))
                self.at = at
                method(self, op)
                if not self.aliases:
                    local_get = -1
                continue
            params = op.params
            count = len(params)
            if shape >= LOAD:
                # Nearly always the alignment and the offset are a byte each.
                position = reader.position
                if (is_plain_memory and position + 1 < end and 1 << data[position] <= op.width
                        and data[position + 1] < 0x80):
                    reader.position, offset = position + 2, data[position + 1]
                    access = accesses.get(opcode) or self.instance.memory_handler(op, 0)
                else:
                    index, offset = self.memarg(op)
                    access = self.instance.memory_handler(op, index)
                    params = [memories[index].address] + params[1:]
            if types[-count:] == params and len(types) - count >= controls[-1].height:
                types[-count:] = op.results
                b = slots.pop()
                a = slots.pop() if count == 2 else b
            else:
                b = self.pop(params[-1])
                a = self.pop(params[0]) if count == 2 else b
                types += op.results
            d = base + len(slots)
            if shape == STORE:
                self.block[0].append((access, -offset, a, b, at))
                continue
            if shape == LOAD:
                self.block[0].append((access, d, a, offset, at))
            else:
                handler = op.handler
                if handler is None:
                    handler = op.handler = numeric_handler(op)
                self.block[0].append((handler, d, a, b, at))
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
        if actual != expected and not type_matches(actual, expected):
            raise Invalid("type mismatch: %s for %s" % (type_name(actual), type_name(expected)))
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
        if not types:
            return []
        self.count_operands(types)
        return [self.pop(t) for t in reversed(types)][::-1]

    def count_operands(self, types):
        """Every byte of a body may name a type of a thousand values: bounds their sum."""
        self.operand_steps -= len(types)
        if self.operand_steps < 0:
            raise Exhaustion("function too complex: more than %d operands for each byte" % OPERAND_STEPS_PER_BYTE)

    def push_all(self, types):
        """Pushes operands of `types`."""
        for type in types:
            self.push(type)

    def constant(self, type, key, value):
        """Pushes a constant; equal ones share a slot."""
        known = self.constants.get(key)
        if known is None:
            known = self.constants[key] = -1 - len(self.constants), value
        if self.aliases:
            self.types.append(type)
            self.slots.append(known[0])
        else:
            self.push_alias(type, known[0])

    def push_alias(self, type, slot):
        """Pushes an operand that lies in a local's or a constant's slot."""
        if self.aliases:
            self.types.append(type)
            self.slots.append(slot)
        else:
            self.emit(do_move, self.push(type), slot, type)

    def emit(self, handler, d, a, b):
        self.block[0].append((handler, d, a, b, self.at))

    def settle(self):
        """Moves the operands of this construct into the slots of their own heights; those of
        the constructs around it have been there since it was entered."""
        slots, base = self.slots, self.base
        height = self.controls[-1].height
        if len(slots) == height:
            return
        if len(slots) > self.deepest:
            self.deepest = len(slots)
        if self.aliases:
            self.count_aliases(len(slots) - height)
            for height in range(height, len(slots)):
                if slots[height] != base + height:
                    self.emit(do_move, base + height, slots[height], self.types[height])
                    slots[height] = base + height

    def count_aliases(self, steps):
        """Looking for aliases costs as much as the stack is high. A body that overdoes it
        gets none from here on, so that translation stays linear."""
        self.alias_steps -= steps
        if self.alias_steps < 0 and self.aliases:
            self.alias_steps = len(self.slots) + 1
            self.settle()
            self.aliases = False

    # -- control --

    def finish(self, kind, x=None, y=None, z=None):
        """Ends the current block."""
        self.block[1:] = kind, x, y, z

    def block_type(self):
        """blocktype ::= 0x40 | valtype | s33 type index; returns (params, results)."""
        reader = self.reader
        byte = reader.byte()
        if byte == 0x40:
            return [], []
        reader.position -= 1
        if 0x40 <= byte < 0x80:
            return [], [reader.value_type()]
        index = reader.signed(33)
        if index < 0:
            raise Malformed("malformed block type")
        type = self.function_type(index)
        return list(type.params), list(type.results)

    def function_type(self, index):
        """The function type with this index."""
        type = self.reader.type_at(index)
        if type.kind != FUNC:
            raise Invalid("type mismatch: not a function type")
        return type

    def enter(self, opcode, params, results):
        """Opens a construct whose params were popped."""
        if len(self.controls) > MAX_NESTING:
            raise Invalid("nesting of more than %d blocks" % MAX_NESTING)
        control = Control(opcode, params, results, len(self.types), len(self.was_set), self.handlers)
        self.controls.append(control)
        self.push_all(params)
        return control

    def leave(self):
        """Closes the innermost construct, after close()."""
        control = self.controls.pop()
        self.handlers = control.handlers
        self.push_all(control.results)

    def forget_locals(self, control):
        """The locals that a construct set count as unset after it, and in its else branch."""
        if self.was_set:
            self.unset.update(self.was_set[control.was_set:])
            del self.was_set[control.was_set:]

    def block_(self, op):
        params, results = self.block_type()
        self.settle()
        self.pop_all(params)
        return self.enter(0x02, params, results)

    def try_table_(self, op):
        params, results = self.block_type()
        clauses = self.reader.vector(self.catch)
        self.settle()
        self.pop_all(params)
        self.enter(0x02, params, results)
        if clauses:
            self.handlers = clauses, self.handlers

    def catch(self):
        """catch ::= 0x00 tag label | 0x01 tag label | 0x02 label | 0x03 label"""
        kind = self.reader.byte()
        if kind > 3:
            raise Malformed("malformed catch clause")
        tag, types = None, []
        if kind < 2:
            type, tag = self.tag()
            types = list(type.params)
        if kind & 1:
            types.append((EXN, False))
        control = self.label(self.reader.unsigned())
        self.count_operands(types)
        if not types_match(types, control.label_types):
            raise Invalid("type mismatch")
        self.deepest = max(self.deepest, control.height + len(types))
        return tag, bool(kind & 1), control.target, self.base + control.height

    def tag(self):
        """Reads and checks a tag index; returns its (type, Tag)."""
        index = self.reader.unsigned()
        check_index("tag", index, self.module.tags)
        return self.module.types[self.module.tags[index]], self.instance.tags[index]

    def throw_(self, op):
        type, tag = self.tag()
        self.finish(THROW, tag, tuple(self.pop_all(type.params)), (None, 0, self.handlers, self.at))
        self.unreachable()

    def throw_ref_(self, op):
        self.finish(THROW, None, (self.pop(EXNREF),), (None, 0, self.handlers, self.at))
        self.unreachable()

    def loop_(self, op):
        control = self.block_(op)
        control.opcode, control.label_types = 0x03, control.params
        control.target = head = new_block()
        self.finish(BR, head)
        self.block = head
        if self.counter:
            place = (head, tuple(self.types)) if len(self.types) <= MAX_LOOP_OPERANDS else None
            self.emit(do_count, place, self.counter, 0)

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
        if control.results:
            self.pop_results(control)
        if len(self.types) != control.height:
            raise Invalid("type mismatch")
        self.forget_locals(control)
        return control

    def pop_results(self, control):
        slots = self.pop_all(control.results)
        for height, (slot, type) in enumerate(zip(slots, control.results), control.height):
            if slot != self.base + height:
                self.emit(do_move, self.base + height, slot, type)
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
            if not types_match(control.params, control.results):
                raise Invalid("type mismatch")
            control.other[1:] = BR, control.next, None, None
        elif control.opcode == 0x03 and self.counter:
            handler, head, counter, _, at = control.target[0][0]
            control.target[0][0] = handler, head, counter, self.at - at, at
        self.finish(BR, control.next)
        self.block = control.next
        self.leave()

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
        if not slots:
            return control.target
        wanted = range(self.base + control.height, self.base + control.height + len(slots))
        moves = [(do_move, d, a, type, self.at) for d, a, type in zip(wanted, slots, control.label_types) if d != a]
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
        self.branch_if(control, condition, slots)
        self.keep(control.label_types, slots)

    def branch_if(self, control, condition, slots, wanted=True):
        """Ends the block with a branch that carries `slots` if the condition is `wanted`."""
        branch, following = self.branch(control, slots), new_block()
        self.finish(BR_IF, branch if wanted else following, condition, following if wanted else branch)
        self.block = following

    def keep(self, types, slots):
        """Pushes operands where they are."""
        self.types += types
        self.slots += slots

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
        self.count_operands(types)
        control = self.controls[-1]
        missing = len(types) - (len(self.types) - control.height)
        if missing > 0 and not control.unreachable:
            raise Invalid("type mismatch")
        missing = max(0, missing)
        start = len(self.types) - len(types) + missing
        if not types_match(self.types[start:], types[missing:]):
            raise Invalid("type mismatch")
        return [self.base + control.height] * missing + self.slots[start:]

    def return_(self, op):
        self.finish(RETURN, None, tuple(self.pop_all(self.controls[0].results)))
        self.unreachable()

    # -- calls: the callee is known, or lies in a slot --

    def callee(self):
        """Reads and checks a function index; returns (function, type). An imported function may
        have a subtype of the type that the module declares, and that one counts."""
        index = self.reader.unsigned()
        check_index("function", index, self.module.functions)
        return self.instance.functions[index], self.module.function_type(index)

    def table_callee(self):
        """Finds the callee of a call_indirect; returns (type, slot)."""
        type = self.function_type(self.reader.unsigned())
        element, table = self.table()
        if not type_matches(element, FUNCREF):
            raise Invalid("type mismatch")
        index = self.pop(table.address)
        self.emit(do_table_callee, self.push(FUNCREF), (table, type), index)
        return type, self.pop()

    def referenced_callee(self):
        """The callee of a call_ref; returns (type, slot)."""
        type = self.function_type(self.reader.unsigned())
        return type, self.pop((type, True))

    def call_(self, op):
        self.call(CALL, *self.callee())

    def call_indirect_(self, op):
        type, slot = self.table_callee()
        self.call(CALL_REF, slot, type)

    def call_ref_(self, op):
        type, slot = self.referenced_callee()
        self.call(CALL_REF, slot, type)

    def return_call_(self, op):
        function, type = self.callee()
        self.constant(FUNCREF, function, function)
        self.tail_call(type, self.pop())

    def return_call_indirect_(self, op):
        self.tail_call(*self.table_callee())

    def return_call_ref_(self, op):
        self.tail_call(*self.referenced_callee())

    def call(self, kind, x, type):
        """Ends the block with a call; the results go to the slots of their heights."""
        arguments = tuple(self.pop_all(type.params))
        self.count_operands(type.results)
        following = new_block()
        self.finish(kind, x, arguments, (following, self.base + len(self.slots), self.handlers, self.at, type))
        self.block = following
        self.push_all(type.results)

    def tail_call(self, type, slot):
        """Ends the block with a call in place of this function's frame."""
        self.count_operands(type.results)
        if not types_match(type.results, self.controls[0].results):
            raise Invalid("type mismatch")
        self.finish(TAIL_CALL, slot, tuple(self.pop_all(type.params)), (None, 0, None, self.at, type))
        self.unreachable()

    # -- parametric and variable instructions --

    def drop_(self, op):
        self.pop_typed()

    def select_(self, op):
        condition = self.pop(I32)
        type, second = self.pop_typed()
        other, first = self.pop_typed()
        if type.__class__ is tuple or other.__class__ is tuple or not type_matches(type, other):
            raise Invalid("type mismatch")
        self.emit(do_select, self.push(type or other), first, (second, condition, type or other))

    def select_t_(self, op):
        types = self.reader.vector(self.reader.value_type)
        if len(types) != 1:
            raise Invalid("invalid result arity")
        condition, second, first = self.pop(I32), self.pop(types[0]), self.pop(types[0])
        self.emit(do_select, self.push(types[0]), first, (second, condition, types[0]))

    def local(self):
        """Reads and checks a local index."""
        index = self.reader.unsigned()
        if index >= self.base:
            raise Invalid("unknown local %d" % index)
        return index

    def local_get_(self, op):
        index = self.local()
        if index in self.unset:
            raise Invalid("uninitialized local %d" % index)
        self.push_alias(self.locals[index], index)

    def local_set_(self, op):
        index = self.local()
        self.assign(index, self.pop(self.locals[index]))

    def local_tee_(self, op):
        index = self.local()
        self.assign(index, self.pop(self.locals[index]))
        self.push_alias(self.locals[index], index)

    def assign(self, index, slot):
        """local := operand. Operands that are this local's old value are saved first; if
        none is, the instruction that made the operand can write the local itself. (The last
        one made it if its d is the operand's slot: an instruction without result has no
        d > 0, and where there is a local, operands have slots > 0.)"""
        slots, saved = self.slots, False
        if index in self.unset:
            self.unset.remove(index)
            self.was_set.append(index)
        if slots and self.aliases:
            self.count_aliases(len(slots))
            if index in slots:
                self.deepest = max(self.deepest, len(slots))
                for height, other in enumerate(slots):
                    if other == index:
                        slots[height] = self.base + height
                        self.emit(do_move, self.base + height, index, self.locals[index])
                        saved = True
        body = self.block[0]
        if slot >= self.base and not saved and body and body[-1][1] == slot:
            handler, _, a, b, at = body[-1]
            body[-1] = handler, index, a, b, at
        elif slot != index:
            self.emit(do_move, index, slot, self.locals[index])

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

    # -- references --

    def pop_reference(self):
        """Pops a reference; returns ((heap type, nullable), slot)."""
        type, slot = self.pop_typed()
        if type.__class__ is int and type != UNKNOWN:
            raise Invalid("type mismatch: %s for a reference" % type_name(type))
        return (type or (UNKNOWN, False)), slot

    def above(self):
        """The slot above all operands, for an instruction that is one of several."""
        slot = self.push(I32)
        self.pop()
        return slot

    def ref_null_(self, op):
        self.constant((self.reader.heap_type(), True), "null", None)

    def ref_is_null_(self, op):
        slot = self.pop_reference()[1]
        self.emit(do_ref_is_null, self.push(I32), slot, 0)

    def ref_func_(self, op):
        index = self.reader.unsigned()
        check_index("function", index, self.module.functions)
        if index not in self.module.declared:
            raise Invalid("undeclared function reference")
        self.emit(do_ref_func, self.push((self.module.function_type(index), False)), self.instance, index)

    def ref_eq_(self, op):
        x, y = self.pop_all(((EQ, True), (EQ, True)))
        self.emit(do_ref_eq, self.push(I32), x, y)

    def ref_as_non_null_(self, op):
        (heap, _), slot = self.pop_reference()
        self.emit(do_ref_as_non_null, self.push((heap, False)), slot, 0)

    def br_on_null_(self, op):
        control, condition = self.label(self.reader.unsigned()), self.above()
        (heap, _), slot = self.pop_reference()
        self.emit(do_ref_is_null, condition, slot, 0)
        slots = self.pop_all(control.label_types)
        self.branch_if(control, condition, slots)
        self.keep(control.label_types, slots)
        self.keep([(heap, False)], [slot])

    def br_on_non_null_(self, op):
        control, condition = self.label(self.reader.unsigned()), self.above()
        (heap, _), slot = self.pop_reference()
        self.emit(do_ref_is_null, condition, slot, 0)
        self.branch_with(control, (heap, False), slot, condition, False)

    def branch_with(self, control, type, slot, condition, wanted):
        """A conditional branch that carries a reference, which is off the stack after it."""
        types = control.label_types
        if not types or not type_matches(type, types[-1]):
            raise Invalid("type mismatch")
        slots = self.pop_all(types[:-1])
        self.branch_if(control, condition, slots + [slot], wanted)
        self.keep(types[:-1], slots)

    def ref_test_(self, op):
        target = self.reader.heap_type(), op.name.endswith("null")
        slot = self.pop((top_of(target[0]), True))
        self.emit(do_ref_test, self.push(I32), slot, target)

    ref_test_null_ = ref_test_

    def ref_cast_(self, op):
        target = self.reader.heap_type(), op.name.endswith("null")
        slot = self.pop((top_of(target[0]), True))
        self.emit(do_ref_cast, self.push(target), slot, target)

    ref_cast_null_ = ref_cast_

    def cast_immediates(self):
        """castflags label heaptype heaptype; returns (label, source type, target type)."""
        flags = self.reader.byte()
        if flags > 3:
            raise Malformed("malformed br_on_cast flags")
        control = self.label(self.reader.unsigned())
        source = self.reader.heap_type(), bool(flags & 1)
        target = self.reader.heap_type(), bool(flags & 2)
        if not type_matches(target, source):
            raise Invalid("type mismatch")
        return control, source, target

    def br_on_cast_(self, op):
        control, source, target = self.cast_immediates()
        condition, slot = self.above(), self.pop(source)
        self.emit(do_ref_test, condition, slot, target)
        self.branch_with(control, target, slot, condition, True)
        self.keep([(source[0], source[1] and not target[1])], [slot])

    def br_on_cast_fail_(self, op):
        control, source, target = self.cast_immediates()
        condition, slot = self.above(), self.pop(source)
        self.emit(do_ref_test, condition, slot, target)
        self.branch_with(control, (source[0], source[1] and not target[1]), slot, condition, False)
        self.keep([target], [slot])

    def convert(self, source, target):
        """Between external and internal references nothing changes but the type."""
        (heap, nullable), slot = self.pop_reference()
        if not heap_matches(heap, source):
            raise Invalid("type mismatch: %s for %s" % (type_name((heap, nullable)), type_name((source, True))))
        self.keep([(target, nullable)], [slot])

    # -- aggregates --

    def aggregate(self, kind):
        """Reads and checks the index of a structure or array type."""
        type = self.reader.type_at(self.reader.unsigned())
        if type.kind != kind:
            raise Invalid("type mismatch: not a %s type" % HEAP_NAMES[kind])
        return type

    def struct_new_(self, op):
        type = self.aggregate(STRUCT)
        slots = self.pop_all([unpacked(storage) for storage, _ in type.fields])
        is_packed = any(storage in (I8, I16) for storage, _ in type.fields)
        self.emit(do_struct_new_packed if is_packed else do_struct_new, self.push((type, False)), type, slots)

    def struct_new_default_(self, op):
        type = self.aggregate(STRUCT)
        self.count_operands(type.fields)
        if not all(defaultable(storage) for storage, _ in type.fields):
            raise Invalid("type mismatch: a field has no default value")
        self.emit(do_struct_new_default, self.push((type, False)), type, 0)

    def field(self):
        """Reads and checks type and field index; returns (type, index, storage, mutable)."""
        type, index = self.aggregate(STRUCT), self.reader.unsigned()
        check_index("field", index, type.fields)
        return (type, index) + type.fields[index]

    def struct_get_(self, op):
        type, index, storage, _ = self.field()
        if (storage in (I8, I16)) != (op.name != "struct.get"):
            raise Invalid("type mismatch: packed or not")
        slot = self.pop((type, True))
        handler, b = do_struct_get, index
        if op.name == "struct.get_s":
            handler, b = do_struct_get_s, (index, PACKED_BITS[storage])
        self.emit(handler, self.push(unpacked(storage)), slot, b)

    struct_get_s_ = struct_get_u_ = struct_get_

    def struct_set_(self, op):
        type, index, storage, mutable = self.field()
        if not mutable:
            raise Invalid("immutable field")
        slot, value = self.pop_all(((type, True), unpacked(storage)))
        self.emit(do_struct_set, None, slot, (value, index, storage))

    def array_new_(self, op):
        type = self.aggregate(ARRAY)
        slots = self.pop_all((unpacked(type.fields[0][0]), I32))
        self.emit(do_array_new, self.push((type, False)), type, slots)

    def array_new_default_(self, op):
        type = self.aggregate(ARRAY)
        if not defaultable(type.fields[0][0]):
            raise Invalid("type mismatch: the element has no default value")
        count = self.pop(I32)
        self.emit(do_array_new_default, self.push((type, False)), type, count)

    def array_new_fixed_(self, op):
        type, count = self.aggregate(ARRAY), self.reader.unsigned()
        if count > MAX_FIELDS:
            raise Invalid("array.new_fixed of %d elements: at most %d" % (count, MAX_FIELDS))
        slots = self.pop_all([unpacked(type.fields[0][0])] * count)
        self.emit(do_array_new_fixed, self.push((type, False)), type, slots)

    def mutable_array(self):
        """Reads and checks the index of a mutable array type."""
        type = self.aggregate(ARRAY)
        if not type.fields[0][1]:
            raise Invalid("immutable array")
        return type

    def data_array(self, type):
        """Reads and checks the index of the data for an array; returns (type, segments, index)."""
        index = self.data_index(self.reader.unsigned())
        if type.fields[0][0].__class__ is tuple:
            raise Invalid("array type is not numeric or vector")
        return type, self.instance.datas, index

    def element_array(self, type):
        """Reads and checks the index of the elements for an array; returns (type, segments, index)."""
        index = self.element_index(self.reader.unsigned())
        if not type_matches(self.module.elements[index].type, type.fields[0][0]):
            raise Invalid("type mismatch")
        return type, self.instance.elements, index

    def array_new_data_(self, op):
        a = self.data_array(self.aggregate(ARRAY))
        slots = self.pop_all((I32, I32))
        self.emit(do_array_new_data, self.push((a[0], False)), a, slots)

    def array_new_elem_(self, op):
        a = self.element_array(self.aggregate(ARRAY))
        slots = self.pop_all((I32, I32))
        self.emit(do_array_new_elem, self.push((a[0], False)), a, slots)

    def array_get_(self, op):
        type = self.aggregate(ARRAY)
        storage = type.fields[0][0]
        if (storage in (I8, I16)) != (op.name != "array.get"):
            raise Invalid("type mismatch: packed or not")
        slot, index = self.pop_all(((type, True), I32))
        handler, b = do_array_get, index
        if op.name == "array.get_s":
            handler, b = do_array_get_s, (index, PACKED_BITS[storage])
        self.emit(handler, self.push(unpacked(storage)), slot, b)

    array_get_s_ = array_get_u_ = array_get_

    def array_set_(self, op):
        type = self.mutable_array()
        storage = type.fields[0][0]
        self.emit(do_array_set, None, storage, self.pop_all(((type, True), I32, unpacked(storage))))

    def array_len_(self, op):
        slot = self.pop((ARRAY, True))
        self.emit(do_array_len, self.push(I32), slot, 0)

    def array_fill_(self, op):
        type = self.mutable_array()
        storage = type.fields[0][0]
        self.emit(do_array_fill, None, storage, self.pop_all(((type, True), I32, unpacked(storage), I32)))

    def array_copy_(self, op):
        type, source = self.mutable_array(), self.aggregate(ARRAY)
        if not type_matches(source.fields[0][0], type.fields[0][0]) or (
                source.fields[0][0].__class__ is int and source.fields[0][0] != type.fields[0][0]):
            raise Invalid("array types do not match")
        self.emit(do_array_copy, None, None, self.pop_all(((type, True), I32, (source, True), I32, I32)))

    def array_init_data_(self, op):
        a = self.data_array(self.mutable_array())
        self.emit(do_array_init_data, None, a, self.pop_all(((a[0], True), I32, I32, I32)))

    def array_init_elem_(self, op):
        type, segments, index = self.element_array(self.mutable_array())
        self.emit(do_array_init_elem, None, (segments, index), self.pop_all(((type, True), I32, I32, I32)))

    def any_convert_extern_(self, op):
        self.convert(EXTERN, ANY)

    def extern_convert_any_(self, op):
        self.convert(ANY, EXTERN)

    def ref_i31_(self, op):
        slot = self.pop(I32)
        self.emit(do_ref_i31, self.push((I31_HEAP, False)), slot, 0)

    def i31_get_s_(self, op):
        slot = self.pop((I31_HEAP, True))
        self.emit(do_i31_get_s, self.push(I32), slot, 0)

    def i31_get_u_(self, op):
        slot = self.pop((I31_HEAP, True))
        self.emit(do_i31_get_u, self.push(I32), slot, 0)

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

    def v128_const_(self, op):
        value = bytes(self.reader.take(16))
        self.constant(V128, value, value)

    # -- vectors: what is not regular --

    def ternary_(self, op):
        """Three operands, the last two of them as slots in b."""
        x, *others = self.pop_all(op.params)
        op.handler = op.handler or numeric_handler(op)
        self.emit(op.handler, self.push(op.results[0]), x, others)

    def lane(self, op):
        """Reads and checks a lane index; returns the lane's offset."""
        index = self.reader.byte()
        if index >= 16 // op.width:
            raise Invalid("invalid lane index")
        return index * op.width

    def lane_access_(self, op):
        """extract_lane and replace_lane"""
        lane = self.lane(op)
        x, *others = self.pop_all(op.params)
        op.handler = op.handler or access_handler(op)
        self.emit(op.handler, self.push(op.results[0]), x, (others[0], lane) if others else lane)

    def i8x16_shuffle_(self, op):
        indices = bytes(self.reader.take(16))
        if max(indices) >= 32:
            raise Invalid("invalid lane index")
        x, y = self.pop_all((V128, V128))
        self.emit(do_shuffle, self.push(V128), x, (y, indices))

    # -- memories and tables --

    def memarg(self, op):
        """memarg ::= align [memidx] offset; returns (memory index, offset)."""
        reader = self.reader
        align, index = reader.unsigned(), 0
        if align >= 0x80:
            raise Malformed("malformed memop flags")
        if align & 0x40:
            align, index = align & 0x3F, reader.unsigned()
        offset = reader.unsigned(64)
        check_index("memory", index, self.module.memories)
        if 1 << align > op.width or 1 << align < op.width and op.opcode >> 8 == 0xFE:
            raise Invalid("alignment must not be larger than natural" if op.opcode >> 8 != 0xFE else
                          "atomic alignment must be natural")
        if offset > MAX_U32 and self.module.memories[index].address == I32:
            raise Invalid("offset out of range")
        return index, offset

    def access_(self, op):
        """A memory access with more than an address and a value."""
        index, offset = self.memarg(op)
        lane = (self.lane(op),) if "lane" in op.immediates else ()
        address, *others = self.pop_all([self.module.memories[index].address] + op.params[1:])
        d = self.push(op.results[0]) if op.results else None
        self.emit(self.instance.memory_handler(op, index), d, address, (offset, *others, *lane))

    def atomic_fence_(self, op):
        if self.reader.byte():
            raise Malformed("zero byte expected")

    def memory(self):
        """Reads and checks a memory index; returns (address type, Memory)."""
        index = self.reader.unsigned()
        check_index("memory", index, self.module.memories)
        return self.module.memories[index].address, self.instance.memories[index]

    def table(self):
        """Reads and checks a table index; returns (type of its elements, Table)."""
        index = self.reader.unsigned()
        check_index("table", index, self.module.tables)
        return self.module.tables[index].element, self.instance.tables[index]

    def memory_size_(self, op):
        address, memory = self.memory()
        self.emit(do_memory_size, self.push(address), memory, 0)

    def memory_grow_(self, op):
        address, memory = self.memory()
        count = self.pop(address)
        self.emit(do_memory_grow, self.push(address), memory, count)

    def memory_fill_(self, op):
        address, memory = self.memory()
        self.emit(do_memory_fill, None, memory, self.pop_all((address, I32, address)))

    def memory_copy_(self, op):
        (address, target), (other, source) = self.memory(), self.memory()
        self.emit(do_memory_copy, None, (target, source), self.pop_all((address, other, smaller(address, other))))

    def memory_init_(self, op):
        segment = self.reader.unsigned()
        address, memory = self.memory()
        index = self.data_index(segment)
        self.emit(do_memory_init, None, (memory, self.instance.datas, index), self.pop_all((address, I32, I32)))

    def data_drop_(self, op):
        index = self.data_index(self.reader.unsigned())
        self.emit(do_drop_segment, None, self.instance.datas, index)

    def data_index(self, index):
        """Checks the index of a data segment."""
        if self.module.data_count is None:
            raise Malformed("data count section required")
        if index >= self.module.data_count:
            raise Invalid("unknown data segment %d" % index)
        return index

    def table_get_(self, op):
        type, table = self.table()
        index = self.pop(table.address)
        self.emit(do_table_get, self.push(type), table, index)

    def table_set_(self, op):
        type, table = self.table()
        self.emit(do_table_set, None, table, self.pop_all((table.address, type)))

    def table_size_(self, op):
        table = self.table()[1]
        self.emit(do_table_size, self.push(table.address), table, 0)

    def table_grow_(self, op):
        type, table = self.table()
        operands = self.pop_all((type, table.address))
        self.emit(do_table_grow, self.push(table.address), table, operands)

    def table_fill_(self, op):
        type, table = self.table()
        self.emit(do_table_fill, None, table, self.pop_all((table.address, type, table.address)))

    def table_copy_(self, op):
        (type, target), (other, source) = self.table(), self.table()
        if not type_matches(other, type):
            raise Invalid("type mismatch")
        count = smaller(target.address, source.address)
        self.emit(do_table_copy, None, (target, source), self.pop_all((target.address, source.address, count)))

    def table_init_(self, op):
        segment = self.reader.unsigned()
        type, table = self.table()
        index = self.element_index(segment)
        if not type_matches(self.module.elements[index].type, type):
            raise Invalid("type mismatch")
        self.emit(do_table_init, None, (table, self.instance.elements, index), self.pop_all((table.address, I32, I32)))

    def elem_drop_(self, op):
        self.emit(do_drop_segment, None, self.instance.elements, self.element_index(self.reader.unsigned()))

    def element_index(self, index):
        """Checks the index of an element segment."""
        if index >= len(self.module.elements):
            raise Invalid("unknown elem segment %d" % index)
        return index


def method_name(op):
    """The name of the Translator's method for an irregular instruction."""
    if not op.params:
        return op.name.replace(".", "_").replace(" ", "_") + "_"
    return "access_" if "memarg" in op.immediates else "lane_access_" if op.immediates else "ternary_"


def smaller(address, other):
    """The type of a length between two memories or tables."""
    return I32 if I32 in (address, other) else I64


def unpacked(storage):
    """The value type of what a field holds."""
    return I32 if storage in (I8, I16) else storage


PACKED_BITS = {I8: 8, I16: 16}


def shell_of(module):
    """An instance of empty externs, which nobody calls: what is validated without being
    instantiated is translated for it."""
    shell = module.shell
    if shell is None:
        shell = module.shell = Instance.__new__(Instance)
        shell.module, shell.handlers = module, {}
        shell.functions = [Function(module.types[type], shell, None, index) for index, type in enumerate(module.functions)]
        shell.tables = [Table(t.element, 0, 0, None, t.limits.address) for t in module.tables]
        shell.memories = [Memory(0, 0, m.address) for m in module.memories]
        shell.globals = [Global(t, None) for t in module.globals]
        shell.tags = [Tag(module.types[index]) for index in module.tags]
        shell.elements = [()] * len(module.elements)
        shell.datas = [()] * len(module.datas)
    return shell


def validate_bodies(module):
    """Validates all functions of a module without instantiating it."""
    shell = shell_of(module)
    for index, body in enumerate(module.bodies, module.imported_functions):
        Translator(Function(module.function_type(index), shell, body, index)).run()
    module.shell = None


def validate_expression(module, body, type):
    """A constant expression of more than one instruction yields one `type`."""
    Translator(Function(FunctionType((), (type,)), shell_of(module), body, None)).run()


def validate(data):
    """Whether `data` is a valid module, bodies included, that keeps within the limits of this
    engine (the JavaScript API's WebAssembly.validate)."""
    try:
        Module(data).validate()
    except (Malformed, Invalid, Exhaustion):
        return False
    return True


# === 12. Interpreter ==========================================================
#
# The loop that executes blocks. Calls within WebAssembly keep their frames in a
# list here and not on Python's stack, so a deep recursion of the guest is a trap at
# MAX_FRAMES and nothing else; only a host function that calls back nests.
#
# A trap's backtrace has a pair (Function, offset in the module) for each active call,
# innermost first. While `handler` is None, the end of the block is being executed.


def execute(function, arguments):
    """Calls a Function with values in the interpreter's form; returns a list of its
    results. Raises Trap, or Thrown for an exception that no handler takes."""
    frames, unwound, handler, block = [], (), None, NOWHERE
    z = block[4]
    try:
        block = function.entry or translated(function)
        R = arguments + function.template
        while True:
            try:
                while True:
                    body, kind, x, y, z = block
                    for handler, d, a, b, at in body:
                        handler(R, d, a, b)
                    if kind == BR_IF:
                        block = x if R[y] else z
                    elif kind == BR:
                        block = x
                    elif kind == RETURN:
                        if not frames:
                            return [R[slot] for slot in y]
                        function, (block, d, _, _, _), frame = frames.pop()
                        if len(y) == 1:
                            frame[d] = R[y[0]]
                        elif y:
                            frame[d:d + len(y)] = [R[slot] for slot in y]
                        R = frame
                    elif kind == BR_TABLE:
                        block = x[min(R[y], z)]
                    elif kind == THROW:
                        handler = None
                        throw(x, [R[slot] for slot in y])
                    else:
                        handler = None
                        callee = x if kind == CALL else R[x]
                        if callee is None:
                            raise Trap("null function reference")
                        values = [R[slot] for slot in y]
                        if callee.host:
                            if kind == TAIL_CALL:           # of this frame, nothing is left
                                z = None, 0, None, None
                            results = callee.call(*values) or ()
                            if kind == TAIL_CALL:
                                R = list(results)
                                block = [], RETURN, None, range(len(R)), None
                            else:
                                block, d, _, _, _ = z
                                R[d:d + len(results)] = results
                            continue
                        block = callee.entry or translated(callee)
                        if len(frames) >= callee.limit:
                            raise Exhaustion("call stack exhausted")
                        if kind != TAIL_CALL:
                            frames.append((function, z, R))
                        function, R = callee, values + callee.template
            except Thrown as thrown:
                unwound = [(function, z[3])]
                landed = landing(z[2], thrown, R)
                while landed is None:
                    if not frames:
                        raise
                    function, z, R = frames.pop()
                    unwound.append((function, z[3]))
                    landed = landing(z[2], thrown, R)
                block, unwound = landed, ()
    except struct.error:
        if handler is None or handler not in function.instance.handlers.values():
            raise                       # not of a memory access: a host function's own
        trap = out_of_bounds("memory")
    except RecursionError:
        trap = Exhaustion("call stack exhausted")
    except MemoryError:
        frames, R = [], None            # what follows needs some
        trap = Exhaustion("out of memory")
    except (Trap, Thrown) as caught:
        trap = caught
    at = interrupted(block, handler, z) if trap.__class__ is Timeout else at if handler else z[3]
    active = unwound or [(function, at)]
    active += [(caller, z[3]) for caller, z, _ in reversed(frames)]
    trap.backtrace += tuple([(function, function.body.start + at) for function, at in active if at is not None])
    raise trap


NOWHERE = [[], None, None, None, (None, 0, None, 0)]      # what a function executes that is not translated yet


def interrupted(block, handler, z):
    """Where a guest is that was stopped from outside: in a host function, or in a block,
    of which the first instruction stands for all."""
    if handler is None and z.__class__ is tuple and z is block[4]:
        return z[3]
    body, _, _, _, z = block
    return body[0][4] if body else z[3] if z.__class__ is tuple else 0


def throw(tag, values):
    """throw, or throw_ref for the tag None."""
    if tag is not None:
        raise Thrown(tag, values)
    if values[0] is None:
        raise Trap("null exception reference")
    raise values[0]


def landing(handlers, thrown, R):
    """The block where the first handler for an exception goes on, with the values in
    its slots; None where there is none."""
    while handlers is not None:
        clauses, handlers = handlers
        for tag, wants_reference, block, d in clauses:
            if tag is None or tag is thrown.tag:
                values = () if tag is None else thrown.values
                thrown.__traceback__, thrown.backtrace = None, ()
                if wants_reference:
                    values += (thrown,)
                R[d:d + len(values)] = values
                return block
    return None


def execute_any(function, arguments):
    """Calls a Function or a HostFunction."""
    return function.call(*arguments) if function.host else execute(function, arguments)


def translated(function):
    """The first block of a function that is called for the first time."""
    (function.instance.module.translator or Translator)(function).run()
    return function.entry


# === 13. Portable tier ========================================================
#
# A compiler from chapter 11's basic blocks to Python source, for functions that are hot where
# there is no native tier: on another processor, or where no mapping may be executed. It makes
# them two to ten times as fast as the interpreter. What it cannot say in Python stays there,
# function by function: exceptions, tail calls, aggregates.
#
# Values. A slot of the frame is a local variable: slot 5 is r5. An operand becomes part of
# the expression that uses it. What may trap, or sees what others change, keeps its order, and a
# line of Python has at most one such instruction, so that the line of a traceback tells which
# one it was. Sums and the like are wrapped around only where somebody could see the difference.
#
# Control is recovered from the graph as in "Beyond Relooper" (Ramsey, ICFP 2022): a block that
# one other leads to is written there; one that several lead to comes after the rest of what its
# dominator dominates; a loop's head starts a `while True`. Where a block is not what comes next anyway,
# another `while True`, around what is before it, lets `break` lead to it. A jump out of
# several of these sets `s`, 0 otherwise, to say where to. CPython nests no more than 20: where
# that is too few, one `while True` looks at a number for what to do next.
#
# Calls are calls in Python. Their last argument, n, is their depth: what is called deeper than Python's
# stack should become runs in the interpreter, which needs none.
#
# Tier-up is the native tier's: do_count counts, and a function that has executed about as much as
# transcribing it costs becomes one step. If after that it is still running and executes as much
# again, the loop where it is becomes a function of its own, which has the whole frame as parameters.

class Unsupported(Exception):
    """What a compiler cannot do, or not here: it stays in the interpreter."""


SEAM_DEPTH = 40                     # what a call to the interpreter counts as; it takes some of C's stack
OLD_DEPTH = 150                     # how deep calls go before Python 3.11, where all take some of C's stack
MAX_LOOPS = 18                      # nested whiles: CPython has 20
MAX_IFS = 30                        # nested ifs: its tokenizer has 100 levels for both
MAX_EXPRESSION = 300                # characters
MAX_PENDING = 100                   # operands that are not written yet: each step looks at all
MAX_LINES = 50000
TRANSCRIBE_COST = 600               # bytes to execute for each byte to transcribe …
TRANSCRIBE_START = 120000           # … and once

# Instructions that are no expressions in the table: which of a and b are slots (b0 is b[0], b* all of
# b), and an expression or, with an =, a statement, where {0}, {1}, … are the operands in these slots
# and {A} and {B} are a and b themselves; None is a call of the handler.
IRREGULARS = {
    do_move: ("a", "{0}"),
    do_select: ("a b0 b1", "{0} if {2} else {1}"),
    do_shuffle: ("a b0", None),
    do_global_get: ("", "{A}.value"),
    do_global_set: ("b", "{A}.value = {0}"),
    do_ref_is_null: ("a", "{0} is None"),
    do_ref_func: ("", "{A}.functions[{B}]"),
    do_memory_size: ("", "{A}.pages"),
    **dict.fromkeys((do_table_size, do_drop_segment), ("", None)),
    **dict.fromkeys((do_table_callee, do_table_get, do_memory_grow), ("b", None)),
    **dict.fromkeys((do_table_set, do_table_grow, do_table_fill, do_table_copy, do_table_init, do_memory_fill, do_memory_copy,
                     do_memory_init), ("b*", None)),
}
# To these, an operand that is right modulo 2**N is as good as an exact one.
TOLERANT = ("add", "sub", "mul", "and", "or", "xor", "shl", "wrap_i64")
TRAPPING = "div_", "rem_", "trunc_f"
MASKS = {I32: MAX_U32, I64: MAX_U64}
# Where there is a shorter way than the table's expression; its error is one of FAILURES.
REWRITTEN = {"i32.eqz": "not {x}", "i64.eqz": "not {x}", "f64.div": "{x} / {y} if {y} else fdiv({x}, {y})",
             "f32.div": "to_f32({x} / {y} if {y} else fdiv({x}, {y}))"}
for _type, _sign in ("i32.", "0x80000000"), ("i64.", "0x8000000000000000"):
    REWRITTEN[_type + "div_u"], REWRITTEN[_type + "rem_u"] = "{x} // {y}", "{x} % {y}"
    for _verb, _same, _other in (("lt_s", "<", ">"), ("le_s", "<=", ">"), ("gt_s", ">", "<"), ("ge_s", ">=", "<")):
        REWRITTEN[_type + _verb] = "{x} %s {y} if ({x} < %s) == ({y} < %s) else {x} %s {y}" % (_same, _sign, _sign, _other)
# The traps that errors of Python in a transcribed function are.
FAILURES = {ZeroDivisionError: "integer divide by zero", IndexError: "out of bounds memory access",
            OverflowError: "out of bounds memory access", struct.error: "out of bounds memory access"}


class Term:
    """An operand as an expression of Python. `reads` are the slots in it; `at` is the offset of the
    instruction in it that may trap or sees what others change, or None. What the value is equal to
    is `text & mask`, unless mask is 0."""

    __slots__ = ("text", "reads", "at", "mask")

    def __init__(self, text, reads=(), at=None, mask=0):
        self.text, self.reads, self.at, self.mask = text, reads, at, mask

    @property
    def inner(self):
        """The text as a part of another expression."""
        return self.text if self.text.isalnum() else "(%s)" % self.text

    @property
    def exact(self):
        """The value's text, as a part of another expression."""
        return "(%s & %d)" % (self.inner, self.mask) if self.mask else self.inner


def wrapping(text, type, reads, at):
    """An expression that may end with the mask of its type as a Term, without."""
    mask = MASKS.get(type, 0)
    suffix = " & 0x%X" % mask
    return Term(text[:-len(suffix)], reads, at, mask) if text.endswith(suffix) else Term(text, reads, at)


class Flow:
    """The graph of blocks that an entry leads to, in reverse postorder, by number: `targets` of
    each, `entering` edges, those of them that go `forward`, loops' `heads`; `kids` are the
    blocks that several lead to, by their dominator; `size` is how many a block dominates."""

    def __init__(self, entry):
        self.blocks = blocks = postorder(entry, targets_of)[::-1]
        number = {id(block): index for index, block in enumerate(blocks)}
        self.targets = [[number[id(target)] for target in targets_of(block)] for block in blocks]
        count = len(blocks)
        self.entering, self.forward, self.heads, self.size = [0] * count, [0] * count, set(), [1] * count
        self.steps = 1000 * count + 100000
        self.dominators = dominators = [None] * count
        dominators[0] = 0
        back = []
        for index, targets in enumerate(self.targets):
            for target in targets:
                self.entering[target] += 1
                if target <= index:
                    self.heads.add(target)
                    back.append((index, target))
                else:
                    self.forward[target] += 1
                    known = dominators[target]
                    dominators[target] = index if known is None else self.common(known, index)
        for index, head in back:
            if self.common(index, head) != head:
                raise Unsupported("irreducible loop")
        self.kids = [[] for _ in blocks]
        for index in range(1, count):
            if self.forward[index] > 1:
                self.kids[dominators[index]].append(index)
        for index in range(count - 1, 0, -1):
            self.size[dominators[index]] += self.size[index]

    def common(self, x, y):
        """The nearest block that dominates both."""
        dominators = self.dominators
        while x != y:
            x, y = (dominators[x], y) if x > y else (x, dominators[y])
            self.steps -= 1
            if self.steps < 0:
                raise Unsupported("%d entangled blocks" % len(self.blocks))
        return x

    def shared(self, head):
        """`head`, and of the blocks that it dominates those that several edges enter."""
        found, inside = [head], {head}
        for index in range(head + 1, len(self.blocks)):
            if self.dominators[index] in inside:
                inside.add(index)
                if self.entering[index] > 1:
                    found.append(index)
        return found


def postorder(entry, targets_of):
    """The blocks that can be reached, each after those that targets_of(block) says it leads to."""
    order, seen, stack = [], {id(entry)}, [(entry, iter(targets_of(entry)))]
    while stack:
        block, rest = stack[-1]
        for target in rest:
            if id(target) not in seen:
                seen.add(id(target))
                stack.append((target, iter(targets_of(target))))
                break
        else:
            order.append(block)
            stack.pop()
    return order


def targets_of(block):
    """The blocks that a block leads to, one for each edge."""
    body, kind, x, y, z = block
    if body and body[-1][0] is do_unreachable or kind == RETURN:
        return []
    if kind == BR:
        return [x]
    if kind == BR_IF:
        return [x, z]
    if kind == BR_TABLE:
        return [target for _, target in label_runs(x)]
    if kind in (CALL, CALL_REF) and not z[2]:
        return [z[0]]
    raise Unsupported("tail calls and handlers of exceptions")


def label_runs(labels):
    """The labels of a br_table as [(the first index, block)], runs of equal ones once."""
    return [(index, block) for index, block in enumerate(labels) if not index or block is not labels[index - 1]]


class While:
    """A `while True` that is being written. `continue` leads to the blocks `again`, of which
    `state`, if it has one, says which; `break` leads to the block `exit`, and `left` says that it
    was written. `through` are the blocks for which `s` is set and the loop left."""

    def __init__(self, again, exit, state=None):
        self.again, self.exit, self.state, self.through, self.left = again, exit, state, [], False


class Transcriber:
    """Writes a function, from an entry or a loop's head on, as Python: `lines`, and
    `offsets` of the instruction that each of them is about."""

    def __init__(self, scope, function, locals, entry, parameters):
        self.scope, self.function, self.parameters, self.is_whole = scope, function, parameters, entry is function.entry
        self.base = len(locals)         # slots from here on are operands
        self.constants = function.template[::-1]        # of slot -1 - index
        self.flow = Flow(entry)
        self.lines, self.offsets, self.depth = [], [], 1
        self.pending = {}               # slot -> Term of an operand that is not written yet
        self.loops, self.ifs, self.flat = [], 0, False
        self.wrapped = set()            # blocks to which a `break` must lead
        self.calls = self.jumps = False
        self.writing, self.at = False, 0
        self.tree(0, None)              # finds what is wrapped
        self.writing = True
        self.tree(0, None)

    def source(self, name):
        """The whole, as (text, offsets by line)."""
        arity = len(self.function.type.params)
        head = ["def %s(%s):" % (name, ", ".join(["r%d" % slot for slot in range(self.parameters)] + ["n"]))]
        if self.is_whole:
            zeros = {}
            for slot, value in enumerate(self.function.template[:self.base - arity], arity):
                zeros.setdefault(self.value(value), []).append("r%d = " % slot)
            head += [" " + "".join(names) + text for text, names in zeros.items()]
        if self.calls and self.is_whole:
            head.append(" if n > %d: return deep(%s)" % (self.scope.limit, ", ".join(
                [self.scope.name(self.function)] + ["r%d" % slot for slot in range(arity)])))
        if self.jumps:
            head.append(" s = 0")
        return "\n".join(head + self.lines + [""]), [None] * len(head) + self.offsets

    def emit(self, text, at=None):
        if self.writing:
            self.lines.append(" " * self.depth + text)
            self.offsets.append(self.at if at is None else at)
            if len(self.lines) > MAX_LINES:
                raise Unsupported("too long")

    # -- control --

    def tree(self, x, follow):
        """Writes a block and what it dominates, where what comes next is the block `follow`
        (None: nothing may); returns whether control can get there."""
        falls = False
        while x is not None:
            is_head, kids = x in self.flow.heads, self.flow.kids[x]
            if self.flat:
                x, falls = self.block(x, follow)
            elif self.writing and len(self.loops) + is_head + sum(kid in self.wrapped for kid in kids) > MAX_LOOPS:
                return self.dispatch(x, [x] + kids, follow)
            elif is_head:
                self.open(While({x}, follow))
                self.rest(self.sequence(x, x), x)
                return self.close()
            else:
                x, falls = self.sequence(x, follow)
        return falls

    def sequence(self, x, follow):
        """Writes a block and then its kids; returns (the last one, which is left to be written,
        or None; whether control gets to `follow`)."""
        kids = self.flow.kids[x]
        if not kids:
            return self.block(x, follow)
        wrapped = [kid for kid in kids if self.writing and kid in self.wrapped]
        for kid in reversed(wrapped):
            self.open(While((), kid))
        falls = self.rest(self.block(x, kids[0]), kids[0])
        for kid, following in zip(kids, kids[1:] + [follow]):
            if kid in wrapped:
                if falls:
                    self.emit("break")
                self.close()
            if kid != kids[-1]:
                falls = self.tree(kid, following)
        return kids[-1], None

    def rest(self, result, follow):
        """Writes what sequence() or block() left."""
        x, falls = result
        return falls if x is None else self.tree(x, follow)

    def dispatch(self, x, cases, follow):
        """Writes blocks as cases of one loop; where the nesting is too deep for any more, all
        that it dominates."""
        flat = self.flat
        if len(self.loops) >= MAX_LOOPS - 1:
            self.flat, cases = True, self.flow.shared(x)
        state = "k%d" % x
        self.emit("%s = %d" % (state, x))
        self.open(While(set(cases[x not in self.flow.heads:]), follow, state))

        def write(index):
            if index and not self.flat:
                return self.tree(cases[index], None)
            return self.rest(self.block(cases[index], None), None)
        self.choose(state, cases, write)
        self.flat = flat
        return self.close()

    def choose(self, name, starts, write, first=0):
        """Writes a binary search for the last of `starts` that is not above a variable; write(its
        index) writes what is to be done."""
        if len(starts) == 1:
            return write(first)
        middle = len(starts) // 2
        self.ifs += 1
        falls = self.suite("if %s < %d:" % (name, starts[middle]), None, self.choose, name, starts[:middle], write, first)
        falls |= self.suite("else:", None, self.choose, name, starts[middle:], write, first + middle)
        self.ifs -= 1
        return falls

    def suite(self, head, at, write, *arguments):
        """Writes a suite by a function; returns what that returns."""
        self.emit(head, at)
        self.depth += 1
        start = len(self.lines)
        result = write(*arguments)
        if len(self.lines) == start:
            self.emit("pass")
        self.depth -= 1
        return result

    def open(self, loop):
        self.loops.append(loop)
        self.emit("while True:")
        self.depth += 1

    def close(self):
        """Ends the innermost loop, and says where those jumps go on that left it for a place
        farther out; returns whether any did for what comes next."""
        loop = self.loops.pop()
        if self.lines and self.lines[-1].endswith("while True:"):
            self.emit("pass")
        self.depth -= 1
        outer = self.loops[-1] if self.loops else loop
        for target in loop.through:
            if target in outer.again or target == outer.exit:
                self.emit("if s == %d:" % (target + 1))
                self.depth += 1
                self.emit("s = 0")
                self.jump(target, None)
                self.depth -= 1
            elif target not in outer.through:
                outer.through.append(target)
        if not {*loop.through} <= {*outer.again, outer.exit}:
            self.emit("if s: break")
        return loop.left

    def jump(self, target, follow):
        """Goes to a block that is written elsewhere; returns whether by doing nothing."""
        if target == follow:
            return True
        loop = self.loops[-1] if self.loops else None
        if loop and target in loop.again:
            if loop.state:
                self.emit("%s = %d" % (loop.state, target))
            self.emit("continue")
        elif loop and target == loop.exit:
            loop.left = True
            self.emit("break")
        elif any(target in outer.again or target == outer.exit for outer in self.loops):
            self.emit("s = %d" % (target + 1))
            self.emit("break")
            self.jumps = True
            if target not in loop.through:
                loop.through.append(target)
        elif self.writing:
            raise Unsupported("no way to a block")      # which would be an error of the first round
        else:
            self.wrapped.add(target)
        return False

    def inlines(self, x, y):
        """Whether block y is written where x goes to it: nobody else does."""
        return y > x and (self.flow.entering if self.flat else self.flow.forward)[y] == 1

    def arm(self, x, y, follow):
        """Writes the way from block x to block y; returns whether control gets to `follow`."""
        return self.tree(y, follow) if self.inlines(x, y) else self.jump(y, follow)

    def onward(self, x, y, follow):
        """The same as the last of what block x does; what is returned is for rest()."""
        return (y, None) if self.inlines(x, y) else (None, self.jump(y, follow))

    # -- blocks --

    def block(self, x, follow):
        """Writes a block; returns (the block to be written next, or None; whether control gets
        to `follow`)."""
        block, targets = self.flow.blocks[x], self.flow.targets[x]
        kind = block[1]
        if self.writing:
            self.pending.clear()
            self.steps(block[0])
            if kind == BR:
                self.flush()
            elif kind == RETURN:
                self.return_(block[3])
            elif kind in (CALL, CALL_REF):
                self.call(block)
        if kind == BR_IF:
            return self.branch(x, block, targets, follow)
        if kind == BR_TABLE:
            return self.switch(x, block, targets, follow)
        return self.onward(x, targets[0], follow) if targets else (None, False)

    def branch(self, x, block, targets, follow):
        """Ends a block by an if: the lesser part is its suite, the other one comes behind."""
        text, at = "", None
        if self.writing:
            condition, = self.operands((block[3],))
            self.flush()
            text, at = condition.exact if condition.mask else condition.text, condition.at
        nested, other = targets
        inner = follow if self.ifs < MAX_IFS else None
        if self.weight(x, other, inner) < self.weight(x, nested, inner):
            nested, other = other, nested
            text = text[4:] if text.startswith("not ") else "not (%s)" % text
        self.ifs += 1
        falls = self.suite("if %s:" % text, at, self.arm, x, nested, inner)
        if not falls:
            result = self.onward(x, other, follow)
        elif other == inner and not self.inlines(x, other):
            result = None, True
        else:
            result = None, self.suite("else:", None, self.arm, x, other, inner) or falls
        self.ifs -= 1
        return result

    def weight(self, x, y, follow):
        """How many blocks are written on the way from x to y: none for a jump; MAX_LINES where not
        even that is needed, for this way had better not be the if's suite."""
        if self.inlines(x, y):
            return 1 + self.flow.size[y]
        return MAX_LINES if y == follow else 0

    def switch(self, x, block, targets, follow):
        """Ends a block by a br_table."""
        if self.writing:
            index, = self.operands((block[3],))
            self.flush()
            self.emit("i = " + index.exact, index.at)
        inner = follow if self.ifs < MAX_IFS else None
        starts = [start for start, _ in label_runs(block[2])]
        return None, self.choose("i", starts, lambda run: self.arm(x, targets[run], inner))

    def call(self, block):
        _, kind, x, slots, (_, d, _, at, type) = block
        terms = self.operands(slots, alone=True)
        callee = self.scope.callee(x) if kind == CALL else "calls[%s]" % self.operand(x).text
        self.calls |= kind == CALL_REF or not x.host
        self.flush()
        call = "%s(%s)" % (callee, ", ".join([term.exact for term in terms] + ["n + 1"]))
        results = ", ".join("r%d" % (d + index) for index in range(len(type.results)))
        self.emit("%s = %s" % (results, call) if results else call, at)

    def return_(self, slots):
        terms = self.operands(slots)
        self.flush_impure()
        self.emit("return " + ", ".join(term.exact for term in terms), place_of(terms))

    # -- operands --

    def operands(self, slots, names=(), alone=False):
        """Takes operands as Terms. Those in the slots `names` become variables, and so does what may
        trap: all of it where the instruction has to be `alone` in its line, else all that something
        follows which may trap as well, be it dropped."""
        last = next((slot for slot in reversed(self.pending) if self.is_impure(slot)), None)
        for slot in slots:
            if self.is_impure(slot) and (alone or slot != last):
                self.settle(slot)
        for slot in names:
            if slot in self.pending:
                self.settle(slot)
        return [self.operand(slot) for slot in slots]

    def operand(self, slot):
        if slot >= 0:
            return self.pending.pop(slot, None) or Term("r%d" % slot, (slot,))
        return Term(self.value(self.constants[-1 - slot]))

    def value(self, value):
        """A literal of Python, or a name."""
        if value is None or value.__class__ in (int, bytes) or value.__class__ is float and -INFINITY < value < INFINITY:
            return repr(value)
        return self.scope.name(value)

    def is_impure(self, slot):
        return slot in self.pending and self.pending[slot].at is not None

    def settle(self, slot):
        """Writes a pending operand to its variable, after what is older and may not change places
        with it."""
        if self.is_impure(slot):
            for other in list(self.pending):
                if other == slot:
                    break
                if self.is_impure(other):
                    self.write(other)
        self.write(slot)

    def write(self, slot):
        self.assign(slot, self.pending.pop(slot))

    def assign(self, slot, term):
        self.emit("r%d = %s" % (slot, term.exact if term.mask else term.text), term.at)

    def define(self, d, term, now=False):
        """The result of an instruction: a local is written, an operand kept, if not to be written `now`.
        First the operands are written that have the variable's old value: none that is pending,
        or taken, reads a variable to which another one will be written."""
        if self.is_impure(d):
            self.settle(d)              # it was dropped, and may trap
        self.pending.pop(d, None)
        for other in list(self.pending):
            if d in self.pending[other].reads:
                self.settle(other)
        if d >= self.base and not now and len(term.text) < MAX_EXPRESSION and len(self.pending) < MAX_PENDING:
            self.pending[d] = term
            return
        if term.at is not None:
            self.flush_impure()
        self.assign(d, term)

    def flush_impure(self):
        """Writes what must not come after what comes now."""
        for slot in list(self.pending):
            if self.is_impure(slot):
                self.write(slot)

    def flush(self):
        """Writes all operands, for the blocks to come."""
        for slot in list(self.pending):
            self.write(slot)

    # -- instructions --

    def steps(self, body):
        for handler, d, a, b, at in body:
            self.at = at
            op = getattr(handler, "op", None)
            if op is not None:
                self.regular(op, handler, d, a, b, at)
            elif handler is do_unreachable:
                self.flush_impure()
                self.emit("raise Trap('unreachable')", at)
            elif handler in IRREGULARS:
                self.irregular(handler, d, a, b, at)
            elif handler is not do_count:
                raise Unsupported(handler.__name__)

    def irregular(self, handler, d, a, b, at):
        spec, text = IRREGULARS[handler]
        places = places_of(spec, a, b)
        slots = [slot for _, slot in places]
        if text is None:
            return self.by_handler(handler, d, a, b, at, places)
        if handler is do_ref_is_null and a in self.pending:
            self.settle(a)              # br_on_null keeps it
        if handler is do_select:
            for slot in slots[:2]:      # one of them is not evaluated
                if self.is_impure(slot):
                    self.settle(slot)
        terms = self.operands(slots, alone=d is None)
        at = at if "{A}" in text else place_of(terms)
        if handler is do_move:
            return self.define(d, terms[0])
        text = text.format(*[term.exact for term in terms], A="{A}" in text and self.scope.name(a), B=b)
        if d is None:
            self.flush_impure()
            return self.emit(text, at)
        self.define(d, Term(text, reads_of(terms), at))

    def by_handler(self, handler, d, a, b, at, places):
        """Lets the interpreter's handler do it, on a frame of its operands."""
        terms = self.operands([slot for _, slot in places], alone=True)
        for number, (place, _) in enumerate(places, 1):
            if place == "a":
                a = number
            elif place == "b":
                b = number
            else:
                b = tuple(b[:place]) + (number,) + tuple(b[place + 1:])
        self.flush_impure()
        text = "act(%s)" % ", ".join([self.scope.name(handler), self.value(a), self.value(b)] + [term.exact for term in terms])
        if d is None:
            return self.emit(text, at)
        self.define(d, Term(text, (), at), True)

    def regular(self, op, handler, d, a, b, at):
        """An instruction from a row of the table."""
        verb = op.meaning.split()[0]
        if verb == "load":
            return self.load(op, handler, d, a, b, at)
        if verb == "store":
            return self.store(op, handler, -d, a, b, at)
        if "memarg" in op.immediates:
            spec = "a" if op.shape == LOAD else "a " + " ".join("b%d" % place for place in range(1, len(b) - ("lane" in op.immediates)))
        elif "lane" in op.immediates:
            spec = "a" if b.__class__ is int else "a b0"
        else:
            slots = (a, *b) if op.shape == IRREGULAR else (a, b)[:op.shape]
            return (self.vector if V128 in op.params + op.results else self.numeric)(op, d, slots, at)
        self.by_handler(handler, d, a, b, at, places_of(spec, a, b))

    def vector(self, op, d, slots, at):
        """An instruction on vectors, which takes several lines."""
        lines, value, names = numeric_source(op, [term.exact for term in self.operands(slots, alone=True)])
        self.scope.names.update(names)
        self.scope.provide(value)
        for line in lines:
            self.emit(line)
        self.define(d, Term(value), True)

    def numeric(self, op, d, slots, at):
        verb, expression = op.name.partition(".")[2], REWRITTEN.get(op.name, op.meaning)
        traps, tolerates = verb.startswith(TRAPPING), verb in TOLERANT
        terms = self.operands(slots, [slot for slot, letter in zip(slots, "xy") if expression.count("{%s}" % letter) > 1], traps)
        text = expression.format(**{letter: term.inner if tolerates else term.exact for letter, term in zip("xy", terms)})
        self.scope.provide(expression)
        at = at if traps else place_of(terms)
        if text.startswith("to_f32("):
            self.flush_impure()         # rounding is done by a cell of that type
            self.emit("F[0] = " + text[7:-1], at)
            return self.define(d, Term("F[0]"), True)
        result = wrapping(text, op.results[0], reads_of(terms), at)
        if tolerates and any(term.mask for term in terms):
            result.mask = MASKS[op.results[0]]
        self.define(d, result)

    def address(self, term, offset, handler):
        """What a load or store starts with: the memory's view and the address."""
        return self.scope.memory(handler.memory), "%s + %d" % (term.exact, offset) if offset else term.exact

    def load(self, op, handler, d, a, offset, at):
        _, letter, *rest = op.meaning.split(None, 2)
        term, = self.operands((a,), alone=True)
        place = self.address(term, offset, handler)
        if letter == "f":               # C's conversion makes a signalling NaN quiet
            self.flush_impure()
            self.emit("t = " + place[1])
            self.define(d, Term("%s(%s, t)[0]" % (self.scope.access("load", "f"), place[0]), at=at), True)
            self.scope.provide("f32_from_bits(")
            return self.emit("if r%d != r%d: r%d = f32_from_bits(%s(%s, t)[0])" % (d, d, d, self.scope.access("load", "I"), place[0]))
        text = "%s[%s]" % place if letter == "B" else "%s(%s, %s)[0]" % (self.scope.access("load", letter), *place)
        self.define(d, wrapping(" ".join([text] + rest), op.results[0], term.reads, at))

    def store(self, op, handler, offset, a, b, at):
        _, letter, *rest = op.meaning.split(None, 2)
        address, value = self.operands((a, b), (b,) if letter == "f" else (), True)
        place, text = self.address(address, offset, handler), " ".join([value.inner] + rest) if rest else value.exact
        self.flush_impure()
        if letter == "B":
            self.emit("%s[%s] = " % place + text, at)
        elif letter == "f":
            self.scope.provide("f32_bits(")
            self.emit("if %s == %s: %s(%s, %s, %s)" % (text, text, self.scope.access("store", "f"), *place, text), at)
            self.emit("else: %s(%s, %s, f32_bits(%s))" % (self.scope.access("store", "I"), *place, text), at)
        else:
            self.emit("%s(%s, %s, %s)" % (self.scope.access("store", letter), *place, text), at)


def reads_of(terms):
    return tuple([slot for term in terms for slot in term.reads])


def place_of(terms):
    """The offset of the instruction in operands that may trap, of which there is at most one."""
    return next((term.at for term in terms if term.at is not None), None)


def places_of(spec, a, b):
    """What of a and b are slots, as [(where, slot)], where is "a", "b", or an index in b."""
    places = []
    for word in spec.split():
        if word == "b*":
            places += enumerate(b)
        else:
            places.append((word, a if word == "a" else b) if len(word) == 1 else (int(word[1:]), b[int(word[1:])]))
    return places


# -- what transcribed functions run in --

def act(handler, a, b, *values):
    """Executes a step of the interpreter on operands in the slots from 1 on."""
    R = [None, *values]
    try:
        handler(R, 0, a, b)
    except struct.error:                # of a memory access
        raise out_of_bounds("memory") from None
    return R[0]


class Callees(dict):
    """{function: what calls it, with the depth as last argument}, made at first use."""

    def __init__(self, scope):
        self.scope = scope

    def __missing__(self, function):
        if function is None:
            raise Trap("null function reference")
        call = self[function] = self.scope.called(function)
        return call


class Scope:
    """The globals of an instance's transcribed functions, `names`: f3 is a function, m0 a memory's
    view, o5 another thing. `depth` is how deep Python's calls were where the interpreter was
    entered; at `limit`, blocks are `chilled`: nothing enters transcribed functions. `blocks` are
    {Function: [(block that enters it as Python, its contents, its contents in the interpreter)]},
    `offsets` {id of a code object: (Function, offsets by line)}."""

    def __init__(self, instance):
        self.depth, self.chilled, self.blocks, self.offsets = 0, False, {}, {}
        self.limit = sys.getrecursionlimit() // 2 if sys.version_info >= (3, 11) else OLD_DEPTH
        self.calls = Callees(self)
        self.names = {"act": act, "deep": self.deep, "calls": self.calls, "Trap": Trap,
                      "F": memoryview(bytearray(4)).cast("f")}
        self.known = {}                 # (kind of name, id) -> name of a thing that `names` keeps alive

    def name(self, thing, prefix="o", value=None):
        """The name of a thing, or of what stands for it."""
        key = prefix, id(thing)
        name = self.known.get(key)
        if name is None:
            name = self.known[key] = "%s%d" % (prefix, len(self.known))
            self.names[name] = thing if value is None else value
        return name

    def callee(self, function):
        """The name of what calls a function."""
        self.name(function)             # keeps it alive
        return self.name(function, "f", self.calls[function])

    def memory(self, memory):
        """The name of a memory's view."""
        if ("m", id(memory)) not in self.known:
            self.name(memory)
            name = self.name(memory, "m", memory.view)
            memory.observers.append(lambda memory: self.names.update({name: memory.view}))
        return self.known["m", id(memory)]

    def access(self, verb, letter):
        """The name of a function that loads or stores."""
        name = "%s_%s" % (verb, letter)
        if name not in self.names:
            access = struct.Struct("<" + letter)
            self.names[name] = access.unpack_from if verb == "load" else access.pack_into
        return name

    def provide(self, expression):
        """Makes the functions known that an expression of the table calls."""
        for piece in expression.split("(")[:-1]:
            name = piece[len(piece.rstrip("abcdefghijklmnopqrstuvwxyz_0123456789")):]
            if name in globals():
                self.names[name] = globals()[name]

    # -- calls of what is not transcribed --

    def called(self, function):
        """What calls a function that is not transcribed."""
        if function.host:
            is_single = len(function.type.results) == 1

            def call(*values):
                results = function.call(*values[:-1])
                return results[0] if is_single else results
        else:
            def call(*values):
                return self.interpret(function, values[:-1], values[-1] + SEAM_DEPTH)
        return call

    def interpret(self, function, values, depth):
        """Calls a function in the interpreter; returns its result or a list of them."""
        saved, self.depth = self.depth, depth
        try:
            results = execute(function, list(values))
        finally:
            self.depth = saved
        return results[0] if len(results) == 1 else results

    def deep(self, function, *values):
        """Calls a function where Python's stack is deep enough."""
        if self.chilled:
            return self.interpret(function, values, self.limit)
        self.chill()
        try:
            return self.interpret(function, values, self.limit)
        finally:
            self.warm()

    def chill(self):
        """Lets nothing enter what was transcribed."""
        self.chilled = True
        for blocks in self.blocks.values():
            make_cold(blocks)

    def warm(self):
        self.chilled = False
        for blocks in self.blocks.values():
            make_hot(blocks)

    # -- errors --

    def explained(self, error):
        """What an exception that left transcribed functions is for the guest, with them in its backtrace."""
        trace, frames, code = error.__traceback__.tb_next, [], None
        while trace is not None and trace.tb_frame.f_code is not execute.__code__:
            code = self.offsets.get(id(trace.tb_frame.f_code))
            if code:
                function, offsets = code
                at = offsets[trace.tb_lineno - 1]
                if at is not None:      # else it went deeper in the interpreter, which tells
                    frames.append((function, function.body.start + at))
            trace = trace.tb_next
        if trace is None and code and error.__class__ in FAILURES:
            error = Trap(FAILURES[error.__class__])
        elif error.__class__ is RecursionError:
            error = Exhaustion("call stack exhausted")
        if hasattr(error, "backtrace"):
            error.backtrace += tuple(reversed(frames))
        return error


def make_cold(blocks):
    """Makes blocks what they are in the interpreter."""
    for block, _, cold in blocks:
        block[:] = cold


def make_hot(blocks):
    """Makes blocks enter what was transcribed."""
    for block, hot, _ in blocks:
        block[:] = hot


def do_enter_python(R, d, a, b):
    """A transcribed function, or the rest of one from a loop's head on; `b` is how much of the
    frame it takes."""
    scope, run, is_single = a
    try:
        results = run(*R[:b], scope.depth)
    except BaseException as error:
        raise scope.explained(error) from None
    R[:] = (results,) if is_single else results or ()


def transcribe(function, locals, place=None):
    """Writes a translated function as Python, and makes the interpreter enter it from now on; or
    only the rest of it from a place on, (loop's head, types of the operands there). Raises
    Unsupported, or SyntaxError where Python finds it too complex."""
    scope = function.instance.scope
    if scope is None:
        scope = function.instance.scope = Scope(function.instance)
    blocks = scope.blocks.setdefault(function, [])
    make_cold(blocks)
    try:
        block, count = (place[0], len(locals) + len(place[1])) if place else (function.entry, len(function.type.params))
        text, offsets = Transcriber(scope, function, locals, block, count).source("function")
        found = {}
        exec(compile(text, "<function %d>" % function.index, "exec", dont_inherit=True), scope.names, found)
        run = found["function"]
        scope.offsets[id(run.__code__)] = function, offsets     # by id: code objects that look alike are equal
        if not place:
            scope.calls[function] = scope.names[scope.callee(function)] = run
        results, (body, *end) = range(len(function.type.results)), block
        hot = [[(do_enter_python, None, (scope, run, len(results) == 1), count, None)], RETURN, None, results,
               (None, 0, None, None)]       # it adds itself to backtraces
        blocks.append((block, hot, [body[1:], *end]))
    finally:
        make_hot(blocks)


class PortableTier:
    """Decides what is transcribed: all if the mode is "portable", else what is hot."""

    def __init__(self, mode):
        self.mode = mode

    def budget(self, function):
        return TRANSCRIBE_START + TRANSCRIBE_COST * (function.body.end - function.body.start)

    def counter(self, function, locals):
        """What the steps of a function count down."""
        return [-1 if self.mode == "portable" else self.budget(function), function, locals, self]

    def heat(self, counter, place=None):
        """A function has executed as much as its counter says: it is transcribed, and if then it
        still goes on as much, the loop where it is."""
        _, function, locals, _ = counter
        counter[0] = self.budget(function)
        if function.instance.scope and function.instance.scope.chilled:
            return
        is_new = function.entry[0][0][0] is do_count
        if not is_new and place is None:
            return
        try:
            transcribe(function, locals, None if is_new else place)
        except (Unsupported, SyntaxError, RecursionError, MemoryError):
            if is_new:
                counter[0] = 1 << 60    # it stays in the interpreter
            else:
                body = place[0][0]
                body[0] = do_count, place, [1 << 60], 0, body[0][4]     # not from this head


# === 14. Processors ===========================================================
#
# The C library by name, names of files, and what the native tier wants of a processor: two
# assemblers, classes with the same methods, each of which appends one operation to `code`.
# Registers are the processor's numbers, of integers and of floats; `wide` is 1 for 64 bits
# and 0 for 32. A 32-bit operation leaves zeros in the upper half of its register, on both
# processors, so an i32 is held zero-extended and serves as an address as it is.
#
# A comparison sets the flags, and a condition says how to read them: a number that ^ 1
# negates. Labels are numbers too; what refers to one is mended by finish().
#
# The parts of an encoding are not explained here: where they are named, it is by the field's name
# in the manual. (Intel 64 and IA-32 Software Developer's Manual, volume 2; Arm Architecture
# Reference Manual for A-profile, chapters C6 and C7)

FILE_ENCODING = sys.getfilesystemencoding()
SEEK_SET, SEEK_CUR, SEEK_END = range(3)
S_IFMT, S_IFDIR, S_IFREG = 0o170000, 0o040000, 0o100000        # inode(7)


def environment(name, default=None):
    """A variable of the environment that this process was started with."""
    value = os.environ.get(name.encode())           # bytes here, as the kernel gave them
    return default if value is None else value.decode(FILE_ENCODING, "surrogateescape")


def machine_here():
    """The processor in uname(2)'s words; of a 32-bit program i686 or armv7l, even if the kernel has 64 bits:
    the numbers of its system calls are those of the former."""
    name = os.uname().machine
    if sys.maxsize >= 1 << 32:
        return name
    return "i686" if name.startswith(("x86", "i")) else "armv7l" if name.startswith(("arm", "aarch")) else name


def file_bytes(text):
    """A name as the bytes that the kernel has for it."""
    return text.encode(FILE_ENCODING, "surrogateescape") if text.__class__ is str else text


def join_path(path, *names):
    """Names below a path; one that begins with a slash stands for itself."""
    for name in names:
        path = name if name.startswith("/") else path + name if path.endswith("/") or not path else path + "/" + name
    return path


def directory_of(path):
    """All of a path before the last name."""
    head = path[:path.rfind("/") + 1]
    return head.rstrip("/") or head


def name_of(path):
    """The last name in a path."""
    return path[path.rfind("/") + 1:]


def normal_path(path):
    """The path without empty names, "." and, as text, "..": filepath.Clean of Go."""
    root, names = "/" if path.startswith("/") else "", []
    for name in path.split("/"):
        if name == ".." and names and names[-1] != "..":
            names.pop()
        elif name not in ("", ".") and (name != ".." or not root):
            names.append(name)
    return root + "/".join(names) or "."


def absolute_path(path):
    """The same path from the root, by the working directory."""
    return normal_path(join_path(os.getcwd(), path))


def real_path(path):
    """The path without symbolic links, of what is there; of what is not, as it is."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return absolute_path(path)
    try:
        return os.readlink("/proc/self/fd/%d" % fd)
    finally:
        os.close(fd)


def file_type(path):
    """S_IFREG and so on of what a path leads to, 0 if that is nothing."""
    try:
        return os.stat(path).st_mode & S_IFMT
    except (OSError, ValueError):
        return 0


def exists(path):
    """Whether a path leads to anything."""
    return file_type(path) != 0


def is_directory(path):
    """Whether a path leads to a directory."""
    return file_type(path) == S_IFDIR


def is_file(path):
    """Whether a path leads to a regular file."""
    return file_type(path) == S_IFREG


def make_directories(path, mode):
    """The directory and, if need be, those above it; one that is there is no error."""
    parent = directory_of(path)
    if parent and parent != path and not exists(parent):
        make_directories(parent, 0o777)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not is_directory(path):
            raise


def directories_in(top):
    """Yields a directory and all below it, each after the one it is in; what is not there has none.
    By a list, not by recursion: a container may be who decides how deep it is."""
    todo = [top]
    while todo:
        path = todo.pop()
        try:
            with os.scandir(path) as entries:
                todo += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        yield path


def c_type(letter):
    """The class of C values that ctypes and struct have this letter for."""
    import _ctypes
    return type("c_" + letter, (_ctypes._SimpleCData,), {"_type_": letter})


def buffer_address(buffer):
    """The address of a writable buffer; it is valid as long as the buffer lives."""
    import _ctypes
    return _ctypes.addressof(c_type("c").from_buffer(buffer))


class Libc:
    """Functions of the C library by name: `libc.mount(…)`. Integers and None are passed
    as C longs, bytes and buffers as pointers; -1 raises OSError named after the call. By
    _ctypes, the module under ctypes: a sixth of its import time."""

    def __getattr__(self, name):
        import _ctypes

        long = c_type("l")
        prototype = type("CFunction", (_ctypes.CFuncPtr,), {
            "_flags_": _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO, "_restype_": long})
        try:
            function = prototype(_ctypes.dlsym(_ctypes.dlopen(None, 0), name))
        except OSError:
            raise OSError(errno.ENOSYS, "the C library has no %s" % name) from None

        def call(*arguments):
            _ctypes.set_errno(0)
            result = function(*[long(a or 0) if a is None or a.__class__ is int else a for a in arguments])
            if result in (-1, MAX_U32):     # a long, and an int, of which the C library leaves the upper half 0
                code = _ctypes.get_errno()
                raise OSError(code, "%s: %s" % (name, os.strerror(code)))
            return result
        setattr(self, name, call)
        return call


libc = Libc()

pack_i32 = struct.Struct("<i").pack
COMMUTATIVE = ("add", "and", "or", "xor")
SMALL_ENDS = 128                        # ends of accesses that are compared in one step


STORE_BITS = {"i32.store": 32, "i64.store": 64, "i32.store8": 8, "i32.store16": 16, "i64.store8": 8, "i64.store16": 16,
              "i64.store32": 32}


class Assembler:
    """What does not depend on the processor."""

    def __init__(self):
        self.code = bytearray()
        self.labels = []                # position, or None
        self.fixups = []                # what finish() mends: (position, label, …)

    def label(self):
        self.labels.append(None)
        return len(self.labels) - 1

    def bind(self, label):
        self.labels[label] = len(self.code)

    def float_select(self, condition, d, a, b):
        """select() of floats or vectors"""
        done = self.label()
        if d == b:
            a, b, condition = b, a, condition ^ 1
        self.float_move(d, a)
        self.jump_if(condition, done)
        self.float_move(d, b)
        self.bind(done)


RELAXED = {                             # instructions that may do what another one does -> that one
    "i8x16.relaxed_swizzle": "i8x16.swizzle", "i16x8.relaxed_q15mulr_s": "i16x8.q15mulr_sat_s",
    **{"i32x4.relaxed_trunc_" + kind: "i32x4.trunc_sat_" + kind for kind in ("f32x4_s", "f32x4_u", "f64x2_s_zero", "f64x2_u_zero")},
    **{lanes + ".relaxed_laneselect": "v128.bitselect" for lanes in ("i8x16", "i16x8", "i32x4", "i64x2")},
    **{lanes + ".relaxed_" + name: lanes + "." + name for lanes in ("f32x4", "f64x2") for name in ("min", "max")}}


def with_relaxed(rows):
    """A table of instructions on vectors, and in it those that may do what another one does."""
    return {**rows, **{name: rows[other] for name, other in RELAXED.items()}}


class X64(Assembler):
    """x86-64 with SSE4.2 and POPCNT, as of the level x86-64-v2."""

    machine = "x86_64"
    FEATURES = {19: "SSE4.1", 20: "SSE4.2", 23: "POPCNT"}       # bits of ecx from CPUID leaf 1
    RETURN_BYTES = 8                    # what a call pushes
    RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
    FRAME, MEMORY, CONTEXT = RSP, 14, 15
    SCRATCH, FLOAT_SCRATCH = (RAX, RCX, RDX), (0, 1, 2)     # the third is the assembler's own
    RESULT, FLOAT_RESULT = RAX, 0
    # Of the System V ABI, which the C library's calls back into Python keep to.
    CALLEE_SAVED, CALLER_SAVED = (RBX, RBP, 12, 13), (RSI, RDI, 8, 9, 10, 11)
    FLOAT_CALLEE_SAVED, FLOAT_CALLER_SAVED = (), tuple(range(3, 16))
    # opcodes: a mandatory prefix << 24, then one to three bytes
    ALU = {"add": 0x01, "or": 0x09, "and": 0x21, "sub": 0x29, "xor": 0x31}
    ALU_DIGIT = {"add": 0, "or": 1, "and": 4, "sub": 5, "xor": 6}
    SHIFT_DIGIT = {"rotl": 0, "rotr": 1, "shl": 4, "shr_u": 5, "shr_s": 7}
    CONDITIONS = {"eq": 4, "ne": 5, "lt_s": 12, "lt_u": 2, "gt_s": 15, "gt_u": 7, "le_s": 14, "le_u": 6, "ge_s": 13, "ge_u": 3}
    OVERFLOW, SIGN, PARITY = 0, 8, 10
    EQUAL, UNEQUAL = 16, 17             # of floats: the zero and the parity flag
    FLOAT_CONDITIONS = {"eq": (EQUAL, False), "ne": (UNEQUAL, False), "lt": (7, True), "gt": (7, False), "le": (3, True),
                        "ge": (3, False)}           # (condition, whether the operands are swapped)
    FLOAT_ALU = {"add": 0x0F58, "mul": 0x0F59, "sub": 0x0F5C, "div": 0x0F5E}
    ROUNDING = {"nearest": 0, "floor": 1, "ceil": 2, "trunc": 3}
    ACCESSES = {                        # opcode, wide
        "i32.load": (0x8B, 0), "i64.load": (0x8B, 1), "i32.load8_s": (0x0FBE, 0), "i32.load8_u": (0x0FB6, 0),
        "i32.load16_s": (0x0FBF, 0), "i32.load16_u": (0x0FB7, 0), "i64.load8_s": (0x0FBE, 1), "i64.load8_u": (0x0FB6, 0),
        "i64.load16_s": (0x0FBF, 1), "i64.load16_u": (0x0FB7, 0), "i64.load32_s": (0x63, 1), "i64.load32_u": (0x8B, 0),
        "f32.load": (0xF3000F10, 0), "f64.load": (0xF2000F10, 0),
        "i32.store": (0x89, 0), "i64.store": (0x89, 1), "i32.store8": (0x88, 0), "i32.store16": (0x66000089, 0),
        "i64.store8": (0x88, 0), "i64.store16": (0x66000089, 0), "i64.store32": (0x89, 0),
        "f32.store": (0xF3000F11, 0), "f64.store": (0xF2000F11, 0),
        "v128.load": (0x0F10, 0), "v128.store": (0x0F11, 0), "v128.load32_zero": (0x66000F6E, 0), "v128.load64_zero": (0xF3000F7E, 0),
        "v128.load8x8_s": (0x660F3820, 0), "v128.load16x4_s": (0x660F3823, 0), "v128.load32x2_s": (0x660F3825, 0),
        "v128.load8x8_u": (0x660F3830, 0), "v128.load16x4_u": (0x660F3833, 0), "v128.load32x2_u": (0x660F3835, 0)}
    # A method and its arguments for each instruction on vectors; what is not here is left to
    # the interpreter's handler. The methods that want constants are POOLED.
    POOLED = ("vector_swizzle", "vector_popcnt", "vector_truncate_double_s", "vector_truncate_double_u", "vector_convert_low_u")
    VECTORS = with_relaxed({
        **{name: ("vector_binary", opcode) for name, opcode in {
            "i8x16.add": 0x66000FFC, "i8x16.add_sat_s": 0x66000FEC, "i8x16.add_sat_u": 0x66000FDC, "i8x16.sub": 0x66000FF8,
            "i8x16.sub_sat_s": 0x66000FE8, "i8x16.sub_sat_u": 0x66000FD8, "i8x16.min_s": 0x660F3838, "i8x16.min_u": 0x66000FDA,
            "i8x16.max_s": 0x660F383C, "i8x16.max_u": 0x66000FDE, "i8x16.avgr_u": 0x66000FE0, "i8x16.eq": 0x66000F74,
            "i8x16.gt_s": 0x66000F64, "i8x16.narrow_i16x8_s": 0x66000F63, "i8x16.narrow_i16x8_u": 0x66000F67,
            "i16x8.add": 0x66000FFD, "i16x8.add_sat_s": 0x66000FED, "i16x8.add_sat_u": 0x66000FDD, "i16x8.sub": 0x66000FF9,
            "i16x8.sub_sat_s": 0x66000FE9, "i16x8.sub_sat_u": 0x66000FD9, "i16x8.mul": 0x66000FD5, "i16x8.min_s": 0x66000FEA,
            "i16x8.min_u": 0x660F383A, "i16x8.max_s": 0x66000FEE, "i16x8.max_u": 0x660F383E, "i16x8.avgr_u": 0x66000FE3,
            "i16x8.eq": 0x66000F75, "i16x8.gt_s": 0x66000F65, "i16x8.narrow_i32x4_s": 0x66000F6B,
            "i16x8.narrow_i32x4_u": 0x660F382B, "i32x4.add": 0x66000FFE, "i32x4.sub": 0x66000FFA, "i32x4.mul": 0x660F3840,
            "i32x4.min_s": 0x660F3839, "i32x4.min_u": 0x660F383B, "i32x4.max_s": 0x660F383D, "i32x4.max_u": 0x660F383F,
            "i32x4.eq": 0x66000F76, "i32x4.gt_s": 0x66000F66, "i32x4.dot_i16x8_s": 0x66000FF5, "i64x2.add": 0x66000FD4,
            "i64x2.sub": 0x66000FFB, "i64x2.eq": 0x660F3829, "i64x2.gt_s": 0x660F3837, "v128.and": 0x66000FDB, "v128.or": 0x66000FEB,
            "v128.xor": 0x66000FEF, "f32x4.add": 0x0F58, "f32x4.sub": 0x0F5C, "f32x4.mul": 0x0F59, "f32x4.div": 0x0F5E,
            "f64x2.add": 0x66000F58, "f64x2.sub": 0x66000F5C, "f64x2.mul": 0x66000F59, "f64x2.div": 0x66000F5E}.items()},
        **{name: ("vector_swapped", opcode) for name, opcode in {       # pmin(a, b) is minps b, a
            "f32x4.pmin": 0x0F5D, "f32x4.pmax": 0x0F5F, "f64x2.pmin": 0x66000F5D, "f64x2.pmax": 0x66000F5F,
            "i8x16.lt_s": 0x66000F64, "i16x8.lt_s": 0x66000F65, "i32x4.lt_s": 0x66000F66, "i64x2.lt_s": 0x660F3837, "v128.andnot": 0x66000FDF}.items()},
        **{name: ("vector_negated", opcode, swapped) for name, (opcode, swapped) in {
            "i8x16.ne": (0x66000F74, False), "i16x8.ne": (0x66000F75, False), "i32x4.ne": (0x66000F76, False),
            "i64x2.ne": (0x660F3829, False), "i8x16.le_s": (0x66000F64, False), "i16x8.le_s": (0x66000F65, False),
            "i32x4.le_s": (0x66000F66, False), "i8x16.ge_s": (0x66000F64, True), "i16x8.ge_s": (0x66000F65, True),
            "i32x4.ge_s": (0x66000F66, True), "i64x2.le_s": (0x660F3837, False), "i64x2.ge_s": (0x660F3837, True)}.items()},
        **{lanes + "x" + count + "." + relation: ("vector_unsigned", extreme, equal, relation in ("gt_u", "lt_u"))
           for lanes, count, least, most, equal in (("i8", "16", 0x66000FDA, 0x66000FDE, 0x66000F74), ("i16", "8", 0x660F383A, 0x660F383E, 0x66000F75),
                                                    ("i32", "4", 0x660F383B, 0x660F383F, 0x66000F76))
           for relation, extreme in (("le_u", least), ("gt_u", least), ("ge_u", most), ("lt_u", most))},
        **{lanes + relation: ("vector_float_compare", opcode, code, swapped)
           for lanes, opcode in (("f32x4.", 0x0FC2), ("f64x2.", 0x66000FC2))
           for relation, code, swapped in (("eq", 0, False), ("ne", 4, False), ("lt", 1, False), ("le", 2, False),
                                           ("gt", 1, True), ("ge", 2, True))},
        **{name: ("vector_unary", opcode) for name, opcode in {
            "i8x16.abs": 0x660F381C, "i16x8.abs": 0x660F381D, "i32x4.abs": 0x660F381E, "f32x4.sqrt": 0x0F51, "f64x2.sqrt": 0x66000F51,
            "i16x8.extend_low_i8x16_s": 0x660F3820, "i32x4.extend_low_i16x8_s": 0x660F3823, "i64x2.extend_low_i32x4_s": 0x660F3825,
            "i16x8.extend_low_i8x16_u": 0x660F3830, "i32x4.extend_low_i16x8_u": 0x660F3833, "i64x2.extend_low_i32x4_u": 0x660F3835,
            "f32x4.convert_i32x4_s": 0x0F5B, "f64x2.convert_low_i32x4_s": 0xF3000FE6, "f64x2.promote_low_f32x4": 0x0F5A,
            "f32x4.demote_f64x2_zero": 0x66000F5A}.items()},
        **{name: ("vector_unary_high", opcode) for name, opcode in {
            "i16x8.extend_high_i8x16_s": 0x660F3820, "i32x4.extend_high_i16x8_s": 0x660F3823, "i64x2.extend_high_i32x4_s": 0x660F3825,
            "i16x8.extend_high_i8x16_u": 0x660F3830, "i32x4.extend_high_i16x8_u": 0x660F3833,
            "i64x2.extend_high_i32x4_u": 0x660F3835}.items()},
        **{name: ("vector_multiply_long", extend, multiply, half == "high") for half in ("low", "high") for name, extend, multiply in (
            ("i16x8.extmul_%s_i8x16_s" % half, 0x660F3820, 0x66000FD5), ("i16x8.extmul_%s_i8x16_u" % half, 0x660F3830, 0x66000FD5),
            ("i32x4.extmul_%s_i16x8_s" % half, 0x660F3823, 0x660F3840), ("i32x4.extmul_%s_i16x8_u" % half, 0x660F3833, 0x660F3840),
            ("i64x2.extmul_%s_i32x4_s" % half, 0x660F3825, 0x660F3828), ("i64x2.extmul_%s_i32x4_u" % half, 0x660F3835, 0x66000FF4))},
        **{lanes + op: ("vector_round", opcode, code) for lanes, opcode in (("f32x4.", 0x660F3A08), ("f64x2.", 0x660F3A09))
           for op, code in (("nearest", 0), ("floor", 1), ("ceil", 2), ("trunc", 3))},
        **{lanes + "neg": ("vector_negate", opcode) for lanes, opcode in (
            ("i8x16.", 0x66000FF8), ("i16x8.", 0x66000FF9), ("i32x4.", 0x66000FFA), ("i64x2.", 0x66000FFB))},
        **{lanes + op: ("vector_shift", opcode, immediate, digit, mask) for lanes, mask, immediate, rows in (
            ("i16x8.", 15, 0x66000F71, (("shl", 0x66000FF1, 6), ("shr_u", 0x66000FD1, 2), ("shr_s", 0x66000FE1, 4))),
            ("i32x4.", 31, 0x66000F72, (("shl", 0x66000FF2, 6), ("shr_u", 0x66000FD2, 2), ("shr_s", 0x66000FE2, 4))),
            ("i64x2.", 63, 0x66000F73, (("shl", 0x66000FF3, 6), ("shr_u", 0x66000FD3, 2)))) for op, opcode, digit in rows},
        **{lanes + "all_true": ("vector_all_true", opcode) for lanes, opcode in (
            ("i8x16.", 0x66000F74), ("i16x8.", 0x66000F75), ("i32x4.", 0x66000F76), ("i64x2.", 0x660F3829))},
        **{lanes + "bitmask": ("vector_bitmask", opcode) for lanes, opcode in (
            ("i8x16.", 0x66000FD7), ("i32x4.", 0x0F50), ("i64x2.", 0x66000F50))},
        **{lanes + "splat": ("vector_splat", bits, is_float) for lanes, bits, is_float in (
            ("i8x16.", 8, False), ("i16x8.", 16, False), ("i32x4.", 32, False), ("i64x2.", 64, False), ("f32x4.", 32, True),
            ("f64x2.", 64, True))},
        **{name: ("vector_extract", bits, way) for name, bits, way in (
            ("i8x16.extract_lane_s", 8, "s"), ("i8x16.extract_lane_u", 8, "u"), ("i16x8.extract_lane_s", 16, "s"),
            ("i16x8.extract_lane_u", 16, "u"), ("i32x4.extract_lane", 32, "u"), ("i64x2.extract_lane", 64, "u"),
            ("f32x4.extract_lane", 32, "f"), ("f64x2.extract_lane", 64, "f"))},
        **{lanes + "replace_lane": ("vector_replace", bits, is_float) for lanes, bits, is_float in (
            ("i8x16.", 8, False), ("i16x8.", 16, False), ("i32x4.", 32, False), ("i64x2.", 64, False), ("f32x4.", 32, True),
            ("f64x2.", 64, True))},
        **{lanes + name: (method, *rest, double) for double, lanes in enumerate(("f32x4.", "f64x2.")) for name, method, *rest in (
            ("abs", "vector_sign", True), ("neg", "vector_sign", False), ("min", "vector_minimum", False), ("max", "vector_minimum", True),
            ("relaxed_madd", "vector_fused", False), ("relaxed_nmadd", "vector_fused", True))},
        **{"i8x16." + op: ("vector_byte_shift", op) for op in ("shl", "shr_u", "shr_s")},
        **{wide + ".extadd_pairwise_" + lanes + "_" + sign: ("vector_add_pairs_" + lanes.partition("x")[0] + sign,)
           for lanes, wide in (("i8x16", "i16x8"), ("i16x8", "i32x4")) for sign in "su"},
        "i32x4.trunc_sat_f32x4_s": ("vector_truncate_s",), "i32x4.trunc_sat_f32x4_u": ("vector_truncate_u",),
        "i32x4.trunc_sat_f64x2_s_zero": ("vector_truncate_double_s",), "i32x4.trunc_sat_f64x2_u_zero": ("vector_truncate_double_u",),
        "f32x4.convert_i32x4_u": ("vector_convert_u",), "f64x2.convert_low_i32x4_u": ("vector_convert_low_u",),
        "i64x2.abs": ("vector_long_abs",), "i64x2.shr_s": ("vector_long_shift",), "i64x2.mul": ("vector_multiply",),
        "i16x8.q15mulr_sat_s": ("vector_multiply_q15",),
        "i16x8.bitmask": ("vector_word_bitmask",), "i8x16.popcnt": ("vector_popcnt",),
        "v128.not": ("vector_not",), "v128.any_true": ("vector_any_true",), "v128.bitselect": ("vector_select",),
        "i8x16.shuffle": ("vector_shuffle",), "i8x16.swizzle": ("vector_swizzle",)})
    FRAME_EXTRA = 0
    flush_stub = None                   # instruction fetches see what was written
    encodings, indirect_encodings = {}, {}

    # -- encoding --

    def register(self, opcode, wide, reg, rm, byte=False):
        """An instruction whose ModR/M names two registers."""
        key = opcode << 9 | wide << 8 | reg << 4 | rm
        known = self.encodings.get(key)
        if known is None:
            known = self.encodings[key] = self.head(opcode, wide, reg, 0, rm, byte) + bytes((0xC0 | (reg & 7) << 3 | rm & 7,))
        self.code += known

    @staticmethod
    def head(opcode, wide, reg, index, base, byte=False):
        """Prefixes and opcode."""
        rex = 0x40 | wide << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3
        prefix, opcode = opcode >> 24, opcode & 0xFFFFFF
        return ((bytes((prefix,)) if prefix else b"") + (bytes((rex,)) if rex != 0x40 or byte else b"")
                + opcode.to_bytes(1 if opcode < 0x100 else 2 if opcode < 0x10000 else 3, "big"))

    def indirect(self, opcode, wide, reg, base, displacement, index=None):
        """An instruction whose ModR/M names a register and [base + index + displacement]."""
        mod = 0 if displacement == 0 and base & 7 != 5 else 1 if -128 <= displacement < 128 else 2
        key = (((opcode << 10 | wide << 9 | mod << 7 | reg << 3) << 4 | base) << 5) + (16 if index is None else index)
        known = self.indirect_encodings.get(key)
        if known is None:
            head = self.head(opcode, wide, reg, index or 0, base, opcode == 0x88)
            if index is not None or base & 7 == 4:
                known = head + bytes((mod << 6 | (reg & 7) << 3 | 4, (4 if index is None else index & 7) << 3 | base & 7))
            else:
                known = head + bytes((mod << 6 | (reg & 7) << 3 | base & 7,))
            self.indirect_encodings[key] = known
        self.code += known
        if mod == 1:
            self.code.append(displacement & 0xFF)
        elif mod == 2:
            self.code += pack_i32(displacement)

    # -- labels and jumps --

    def refer(self, label, base=None):
        """32 bits for the distance of a label from `base`, or from behind them."""
        self.code += bytes(4)
        self.fixups.append((len(self.code) - 4, label, len(self.code) if base is None else base))

    def jump(self, label):
        self.code.append(0xE9)
        self.refer(label)

    def jump_if(self, condition, label):
        if condition == self.EQUAL:
            self.code += b"\x7a\x06"    # jp past the next
            condition = 4
        elif condition == self.UNEQUAL:
            self.jump_if(self.PARITY, label)
            condition = 5
        self.code += bytes((0x0F, 0x80 | condition))
        self.refer(label)

    def call_label(self, label):
        self.code.append(0xE8)
        self.refer(label)

    def jump_table(self, index, labels):
        """Jumps to labels[index]; `index` is a scratch register."""
        self.code += b"\x48\x8d\x15"    # lea rdx, [rip + 32 bits]
        table = self.label()
        self.refer(table)
        self.code += self.head(0x63, 1, index, index, self.RDX) + bytes((index << 3 | 4, 2 << 6 | index << 3 | self.RDX))
        self.alu("add", 1, index, index, self.RDX)
        self.register(0xFF, 0, 4, index)
        self.bind(table)
        base = len(self.code)
        for label in labels:
            self.refer(label, base)

    def call_context(self, offset, index=None):
        """Calls the address that the context holds at offset + 8 * index."""
        self.through_context(2, offset, index)

    def jump_context(self, offset, index=None):
        self.through_context(4, offset, index)

    def through_context(self, digit, offset, index):
        if index is None:
            self.indirect(0xFF, 0, digit, self.CONTEXT, offset)
        else:
            self.code += bytes((0x41, 0xFF, 0x84 | digit << 3, 3 << 6 | index << 3 | 7)) + pack_i32(offset)

    def finish(self):
        """Mends the references to labels."""
        for position, label, base in self.fixups:
            self.code[position:position + 4] = pack_i32(self.labels[label] - base)

    # -- frames --

    def enter(self, bytes, limit, overflow):
        """Makes a frame; `limit` is where the context has the stack's end, `overflow` the
        label for a stack that would cross it."""
        if bytes < 4096:                # which the limit leaves room for
            self.indirect(0x3B, 1, self.RSP, self.CONTEXT, limit)
        else:
            self.indirect(0x8D, 1, self.RAX, self.RSP, -bytes)
            self.indirect(0x3B, 1, self.RAX, self.CONTEXT, limit)
        self.jump_if(2, overflow)
        self.register(0x81, 1, 5, self.RSP)
        self.code += pack_i32(bytes)

    def leave(self, bytes):
        self.register(0x81, 1, 0, self.RSP)
        self.code += pack_i32(bytes)

    def return_(self):
        self.code.append(0xC3)

    # -- moves --

    def move(self, d, a):
        if d != a:
            self.register(0x89, 1, a, d)

    def immediate(self, d, value):
        """d := 64 bits; leaves the flags alone."""
        if value < 1 << 32:
            self.code += (b"\x41" if d > 7 else b"") + (0xB8 | d & 7).to_bytes(1, "little") + value.to_bytes(4, "little")
        elif value >= (1 << 64) - (1 << 31):
            self.register(0xC7, 1, 0, d)
            self.code += (value & MAX_U32).to_bytes(4, "little")
        else:
            self.code += bytes((0x49 if d > 7 else 0x48, 0xB8 | d & 7)) + value.to_bytes(8, "little")

    def load(self, d, base, offset):
        self.indirect(0x8B, 1, d, base, offset)

    def store(self, a, base, offset):
        self.indirect(0x89, 1, a, base, offset)

    def load_indexed(self, d, base, index):
        """d := [base + 8 * index]; `base` is a scratch register."""
        self.code += self.head(0x8B, 1, d, index, base) + bytes(((d & 7) << 3 | 4, 3 << 6 | (index & 7) << 3 | base))

    def store_immediate(self, value, base, offset):
        """Stores 64 bits, by way of a scratch register if need be."""
        if value < 1 << 31 or value >= (1 << 64) - (1 << 31):
            self.indirect(0xC7, 1, 0, base, offset)
            self.code += (value & MAX_U32).to_bytes(4, "little")
        else:
            self.immediate(self.RAX, value)
            self.store(self.RAX, base, offset)

    def float_move(self, d, a):
        if d != a:
            self.register(0x0F28, 0, d, a)

    def float_zero(self, d):
        self.register(0x0F57, 0, d, d)

    def float_constant(self, d, label, bytes):
        """Loads 4, 8 or 16 bytes from the code."""
        self.code += self.head({4: 0xF3000F10, 8: 0xF2000F10, 16: 0x0F10}[bytes], 0, d, 0, 0) + (0x05 | (d & 7) << 3).to_bytes(1, "little")
        self.refer(label)

    def float_load(self, d, base, offset):
        self.indirect(0xF2000F10, 0, d, base, offset)

    def vector_load(self, d, base, offset):
        self.indirect(0x0F10, 0, d, base, offset)

    def vector_store(self, a, base, offset):
        self.indirect(0x0F11, 0, a, base, offset)

    def float_store(self, a, base, offset):
        self.indirect(0xF2000F11, 0, a, base, offset)

    # -- integers --

    def alu(self, op, wide, d, a, b):
        if d == b and d != a:
            if op in COMMUTATIVE:
                a, b = b, a
            else:                       # sub
                self.register(0xF7, wide, 3, d)
                return self.register(0x01, wide, a, d)
        elif d != a and op == "add":
            return self.indirect(0x8D, wide, d, a, 0, b)
        if d != a:
            self.register(0x89, wide, a, d)
        self.register(self.ALU[op], wide, b, d)

    def alu_immediate(self, op, wide, d, a, value):
        """Whether the operation could take the constant, an unsigned one."""
        value = signed(value, 64 if wide else 32)
        if not -1 << 31 <= value < 1 << 31:
            return False
        if op == "sub" and value != -1 << 31:
            op, value = "add", -value
        if d != a:
            if op == "add":
                self.indirect(0x8D, wide, d, a, value)
                return True
            self.register(0x89, wide, a, d)
        short = -128 <= value < 128
        self.register(0x83 if short else 0x81, wide, self.ALU_DIGIT[op], d)
        self.code += bytes((value & 0xFF,)) if short else pack_i32(value)
        return True

    def multiply(self, wide, d, a, b):
        if d == b:
            a, b = b, a
        if d != a:
            self.register(0x89, wide, a, d)
        self.register(0x0FAF, wide, d, b)

    def multiply_immediate(self, wide, d, a, value):
        value = signed(value, 64 if wide else 32)
        if not -1 << 31 <= value < 1 << 31:
            return False
        self.register(0x69, wide, d, a)
        self.code += pack_i32(value)
        return True

    def shift(self, op, wide, d, a, b):
        self.register(0x89, 0, b, self.RCX)
        if d != a:
            self.register(0x89, wide, a, d)
        self.register(0xD3, wide, self.SHIFT_DIGIT[op], d)

    def shift_immediate(self, op, wide, d, a, count):
        if d != a:
            self.register(0x89, wide, a, d)
        if count:
            self.register(0xC1, wide, self.SHIFT_DIGIT[op], d)
            self.code.append(count)

    def divide(self, op, wide, d, a, b, trap, zero, minus_one):
        """`trap(condition, text)`; `zero` and `minus_one` tell whether b may be that."""
        if zero:
            self.register(0x85, wide, b, b)
            trap(4, "integer divide by zero")
        self.register(0x89, wide, a, self.RAX)
        done = self.label()
        if op[-1] == "u":
            self.register(0x31, 0, self.RDX, self.RDX)
            self.register(0xF7, wide, 6, b)
        else:
            if minus_one:               # the quotient of the least integer does not fit
                divide = self.label()
                self.register(0x83, wide, 7, b)
                self.code.append(0xFF)
                self.jump_if(5, divide)
                if op == "div_s":
                    self.register(0xF7, wide, 3, self.RAX)
                    trap(self.OVERFLOW, "integer overflow")
                else:
                    self.register(0x31, 0, self.RDX, self.RDX)
                self.jump(done)
                self.bind(divide)
            self.code += b"\x48\x99" if wide else b"\x99"       # cqo, cdq
            self.register(0xF7, wide, 7, b)
        self.bind(done)
        self.register(0x89, wide, self.RAX if op[:3] == "div" else self.RDX, d)

    def clz(self, wide, d, a):
        bits = 64 if wide else 32
        self.immediate(self.RDX, 2 * bits - 1)      # which the last step makes `bits`
        self.register(0x0FBD, wide, self.RAX, a)
        self.register(0x0F44, wide, self.RAX, self.RDX)
        self.alu_immediate("xor", 0, d, self.RAX, bits - 1)

    def ctz(self, wide, d, a):
        self.immediate(self.RDX, 64 if wide else 32)
        self.register(0x0FBC, wide, self.RAX, a)
        self.register(0x0F44, wide, self.RAX, self.RDX)
        self.move(d, self.RAX)

    def popcnt(self, wide, d, a):
        self.register(0xF3000FB8, wide, d, a)

    def extend(self, bits, wide, d, a):
        """Sign-extends the low `bits`."""
        self.register({8: 0x0FBE, 16: 0x0FBF, 32: 0x63}[bits], wide, d, a, bits == 8)

    def wrap(self, d, a):
        """d := the low 32 bits of a"""
        self.register(0x89, 0, a, d)

    # -- comparisons --

    def compare(self, wide, a, b):
        self.register(0x39, wide, b, a)

    def compare_immediate(self, wide, a, value):
        value = signed(value, 64 if wide else 32)
        if not -1 << 31 <= value < 1 << 31:
            return False
        if value == 0:
            self.register(0x85, wide, a, a)
        else:
            short = -128 <= value < 128
            self.register(0x83 if short else 0x81, wide, 7, a)
            self.code += bytes((value & 0xFF,)) if short else pack_i32(value)
        return True

    def float_compare(self, wide, a, b):
        self.register(0x66000F2E if wide else 0x0F2E, 0, a, b)

    def set_if(self, condition, d):
        if condition >= self.EQUAL:
            self.code += b"\x0f\x9b\xc1\x0f\x94\xc0\x20\xc8" if condition == self.EQUAL else (   # setnp cl, sete al, and
                b"\x0f\x9a\xc1\x0f\x95\xc0\x08\xc8")                                              # setp cl, setne al, or
        else:
            self.code += bytes((0x0F, 0x90 | condition, 0xC0))
        self.register(0x0FB6, 0, d, self.RAX, True)

    def select(self, condition, d, a, b):
        """d := a if the condition holds, else b"""
        if condition >= self.EQUAL:
            if condition == self.UNEQUAL:
                a, b = b, a
            self.move(self.RDX, a)
            self.register(0x0F45, 1, self.RDX, b)
            self.register(0x0F4A, 1, self.RDX, b)
            self.move(d, self.RDX)
        elif d == a:
            self.register(0x0F40 | condition ^ 1, 1, d, b)
        else:
            self.move(d, b)
            self.register(0x0F40 | condition, 1, d, a)

    # -- memory --

    def check_bounds(self, address, offset, width, bytes, limits):
        """Compares address + offset + width with the memory's size; returns the condition of being
        outside. The context has the size at `bytes`, and at `limits` the least address that is
        outside for each small sum of offset and width."""
        end = offset + width
        if end < SMALL_ENDS:
            self.indirect(0x3B, 1, address, self.CONTEXT, limits + 8 * end)
            return 3
        if end < 1 << 31:
            self.indirect(0x8D, 1, self.RAX, address, end)
        else:
            self.immediate(self.RAX, end)
            self.alu("add", 1, self.RAX, self.RAX, address)
        self.indirect(0x3B, 1, self.RAX, self.CONTEXT, bytes)
        return 7

    def access(self, name, register, address, offset):
        """A load or a store of the linear memory at address + offset, which is inside; without
        an address register at the offset."""
        opcode, wide = self.ACCESSES[name]
        if offset >= 1 << 31:           # RDX: the others hold the address and the value
            self.immediate(self.RDX, offset)
            if address is not None:
                self.alu("add", 1, self.RDX, self.RDX, address)
            address, offset = self.RDX, 0
        self.indirect(opcode, wide, register, self.MEMORY, offset, address)

    def store_constant(self, name, value, address, offset):
        """Whether a constant could be stored at address + offset."""
        if offset >= 1 << 31 or name == "i64.store" and not -1 << 31 <= signed(value, 64) < 1 << 31:
            return False
        bits = STORE_BITS[name]
        self.indirect({8: 0xC6, 16: 0x660000C7}.get(bits, 0xC7), bits == 64, 0, self.MEMORY, offset, address)
        self.code += (value & MAX_U32).to_bytes(4, "little")[:min(bits, 32) // 8]
        return True

    def copy_bytes(self, to, source, count, bytes, slow):
        """memory.copy of what lies inside and does not overlap in the wrong direction; all else
        jumps to `slow`."""
        out = self.label()
        self.gather((self.RDI, to), (self.RSI, source), (self.RCX, count))
        self.leave_if_outside(self.RSI, bytes, out)
        self.leave_if_outside(self.RDI, bytes, out)
        self.move(self.RAX, self.RDI)
        self.alu("sub", 1, self.RAX, self.RAX, self.RSI)
        self.compare(1, self.RAX, self.RCX)
        self.jump_if(2, out)
        self.alu("add", 1, self.RSI, self.RSI, self.MEMORY)
        self.alu("add", 1, self.RDI, self.RDI, self.MEMORY)
        self.code += b"\xf3\xa4"        # rep movsb
        self.end_strings(out, slow)

    def fill_bytes(self, to, value, count, bytes, slow):
        """memory.fill of what lies inside; all else jumps to `slow`."""
        out = self.label()
        self.gather((self.RDI, to), (self.RDX, value), (self.RCX, count))
        self.leave_if_outside(self.RDI, bytes, out)
        self.move(self.RAX, self.RDX)
        self.alu("add", 1, self.RDI, self.RDI, self.MEMORY)
        self.code += b"\xf3\xaa"        # rep stosb
        self.end_strings(out, slow)

    def gather(self, *pairs):
        """Moves operands to the registers of string instructions at once, by the stack, which keeps
        RSI and RDI."""
        self.push(self.RSI)
        self.push(self.RDI)
        for _, register in pairs:
            self.push(register)
        for register, _ in reversed(pairs):
            self.code.append(0x58 | register)

    def end_strings(self, out, slow):
        """Restores RSI and RDI and goes on; what jumped to `out` goes to `slow` with them restored."""
        done, restored = self.label(), bytes((0x58 | self.RDI, 0x58 | self.RSI))
        self.jump(done)
        self.bind(out)
        self.code += restored
        self.jump(slow)
        self.bind(done)
        self.code += restored

    def leave_if_outside(self, start, bytes, out):
        self.indirect(0x8D, 1, self.RAX, start, 0, self.RCX)
        self.indirect(0x3B, 1, self.RAX, self.CONTEXT, bytes)
        self.jump_if(7, out)

    # -- floats --

    def float_alu(self, op, wide, d, a, b):
        opcode = (0xF2000000 if wide else 0xF3000000) | self.FLOAT_ALU[op]
        if d == b and d != a:
            if op in ("add", "mul"):
                a, b = b, a
            else:
                self.float_move(2, b)
                b = 2
        self.float_move(d, a)
        self.register(opcode, 0, d, b)

    def sqrt(self, wide, d, a):
        self.register(0xF2000F51 if wide else 0xF3000F51, 0, d, a)

    def round(self, op, wide, d, a):
        self.register(0x660F3A0B if wide else 0x660F3A0A, 0, d, a)
        self.code.append(8 | self.ROUNDING[op])

    def minimum(self, op, wide, d, a, b):
        """min or max: minsd knows neither NaN nor the sign of zero."""
        prefix = 0xF2000000 if wide else 0xF3000000
        unordered, differ, done = self.label(), self.label(), self.label()
        self.float_move(2, a)
        self.float_compare(wide, a, b)
        self.jump_if(self.PARITY, unordered)
        self.jump_if(5, differ)
        self.register(0x0F56 if op == "min" else 0x0F54, 0, 2, b)      # orps, andps: of two zeros
        self.jump(done)
        self.bind(unordered)
        self.register(prefix | 0x0F58, 0, 2, b)
        self.jump(done)
        self.bind(differ)
        self.register(prefix | (0x0F5D if op == "min" else 0x0F5F), 0, 2, b)
        self.bind(done)
        self.float_move(d, 2)

    def sign(self, op, wide, d, a, b=None):
        """abs, neg and copysign, on the bits."""
        bit = 63 if wide else 31
        self.to_bits(wide, self.RAX, a)
        if op == "neg":
            self.register(0x0FBA, wide, 7, self.RAX)            # btc
            self.code.append(bit)
        else:
            self.register(0x0FBA, wide, 6, self.RAX)            # btr
            self.code.append(bit)
        if op == "copysign":
            self.to_bits(wide, self.RCX, b)
            self.shift_immediate("shr_u", wide, self.RCX, self.RCX, bit)
            self.shift_immediate("shl", wide, self.RCX, self.RCX, bit)
            self.alu("or", wide, self.RAX, self.RAX, self.RCX)
        self.from_bits(wide, d, self.RAX)

    def to_bits(self, wide, d, a):
        self.register(0x66000F7E, wide, a, d)

    def from_bits(self, wide, d, a):
        self.register(0x66000F6E, wide, d, a)

    def promote(self, d, a):
        self.register(0xF3000F5A, 0, d, a)

    def demote(self, d, a):
        self.register(0xF2000F5A, 0, d, a)

    def from_integer(self, wide, d, a, source_wide, is_signed):
        """A float of an integer. cvtsi2sd keeps the upper bits of its destination, and so would wait for
        them: the register is zeroed first."""
        prefix = 0xF2000000 if wide else 0xF3000000
        if is_signed or not source_wide:            # a u32 is a positive s64
            self.register(0x0F57, 0, d, d)
            return self.register(prefix | 0x0F2A, source_wide if is_signed else 1, d, a)
        large, done = self.label(), self.label()
        self.move(self.RAX, a)
        self.register(0x0F57, 0, d, d)
        self.register(0x85, 1, self.RAX, self.RAX)
        self.jump_if(self.SIGN, large)
        self.register(prefix | 0x0F2A, 1, d, self.RAX)
        self.jump(done)
        self.bind(large)                # half of it, rounded to odd, twice
        self.wrap(self.RDX, self.RAX)
        self.alu_immediate("and", 0, self.RDX, self.RDX, 1)
        self.shift_immediate("shr_u", 1, self.RAX, self.RAX, 1)
        self.alu("or", 1, self.RAX, self.RAX, self.RDX)
        self.register(prefix | 0x0F2A, 1, d, self.RAX)
        self.register(prefix | 0x0F58, 0, d, d)
        self.bind(done)

    def to_integer(self, wide, d, a, source_wide, is_signed, failed):
        """Truncates what fits; whatever else jumps to `failed`: NaN, out of range, and a few
        that fit."""
        self.register((0xF2000000 if source_wide else 0xF3000000) | 0x0F2C, 1, self.RAX, a)
        if wide:
            self.compare_immediate(1, self.RAX, 1 if is_signed else 0)
            self.jump_if(self.OVERFLOW if is_signed else self.SIGN, failed)
        else:
            if is_signed:
                self.extend(32, 1, self.RDX, self.RAX)
            else:
                self.wrap(self.RDX, self.RAX)
            self.compare(1, self.RDX, self.RAX)
            self.jump_if(5, failed)
        self.register(0x89, wide, self.RAX, d)

    # -- vectors: register 2 is free, and so are RAX and RDX --

    def vector_binary(self, d, a, b, opcode):
        if d == b and d != a:
            self.float_move(2, b)
            b = 2
        self.float_move(d, a)
        self.register(opcode, 0, d, b)

    def vector_swapped(self, d, a, b, opcode):
        self.vector_binary(d, b, a, opcode)

    def vector_unary(self, d, a, opcode):
        self.register(opcode, 0, d, a)

    def vector_unary_high(self, d, a, opcode):
        self.high_half(2, a)
        self.register(opcode, 0, d, 2)

    def high_half(self, d, a):
        self.register(0x66000F70, 0, d, a)          # pshufd
        self.code.append(0xEE)

    def vector_negated(self, d, a, b, opcode, swapped):
        if swapped:
            a, b = b, a
        self.vector_binary(d, a, b, opcode)
        self.vector_not(d, d)

    def vector_not(self, d, a):
        self.ones(2)
        if d != a:
            self.float_move(d, a)
        self.register(0x66000FEF, 0, d, 2)

    def vector_unsigned(self, d, a, b, extreme, equal, negated):
        """a <= b as min(a, b) == a, and so on"""
        self.float_move(2, a)
        self.register(extreme, 0, 2, b)
        self.register(equal, 0, 2, a)
        if negated:
            self.ones(d)
            self.register(0x66000FEF, 0, d, 2)
        else:
            self.float_move(d, 2)

    def vector_float_compare(self, d, a, b, opcode, code, swapped):
        if swapped:
            a, b = b, a
        self.vector_binary(d, a, b, opcode)
        self.code.append(code)

    def vector_round(self, d, a, opcode, code):
        self.register(opcode, 0, d, a)
        self.code.append(8 | code)

    def vector_negate(self, d, a, opcode):
        self.register(0x66000FEF, 0, 2, 2)
        self.register(opcode, 0, 2, a)
        self.float_move(d, 2)

    def vector_multiply_long(self, d, a, b, extend, multiply, is_high):
        if is_high:
            self.high_half(2, a)
            self.register(extend, 0, 2, 2)
            self.high_half(1, b)
            self.register(extend, 0, 1, 1)
        else:
            self.register(extend, 0, 2, a)
            self.register(extend, 0, 1, b)
        self.register(multiply, 0, 2, 1)
        self.float_move(d, 2)

    def vector_shift(self, d, a, count, opcode, immediate, digit, mask):
        self.move(self.RAX, count)
        self.alu_immediate("and", 0, self.RAX, self.RAX, mask)
        self.from_bits(0, 2, self.RAX)
        self.float_move(d, a)
        self.register(opcode, 0, d, 2)

    def vector_shift_immediate(self, d, a, count, opcode, immediate, digit, mask):
        self.float_move(d, a)
        self.register(immediate, 0, digit, d)
        self.code.append(count & mask)

    def vector_all_true(self, d, a, equal):
        self.register(0x66000FEF, 0, 2, 2)
        self.register(equal, 0, 2, a)
        self.register(0x660F3817, 0, 2, 2)          # ptest
        self.set_if(4, d)

    def vector_any_true(self, d, a):
        self.register(0x660F3817, 0, a, a)
        self.set_if(5, d)

    def vector_bitmask(self, d, a, opcode):
        self.register(opcode, 0, d, a)

    def vector_splat(self, d, a, bits, is_float):
        if is_float:
            self.float_move(d, a)
        else:
            self.from_bits(bits == 64, d, a)
        if bits == 8:
            self.register(0x66000FEF, 0, 2, 2)
            self.register(0x660F3800, 0, d, 2)      # pshufb
        elif bits == 64:
            self.register(0x66000F6C, 0, d, d)      # punpcklqdq
        else:
            if bits == 16:
                self.register(0xF2000F70, 0, d, d)  # pshuflw
                self.code.append(0)
            self.register(0x66000F70, 0, d, d)
            self.code.append(0)

    def vector_extract(self, d, a, lane, bits, way):
        if way == "f":
            if lane:
                self.register(0x66000F70, 0, d, a)
                self.code.append(lane if bits == 32 else 0xEE)
            else:
                self.float_move(d, a)
            return
        if bits == 16:
            self.register(0x66000FC5, 0, d, a)      # pextrw
        else:
            self.register(0x660F3A14 if bits == 8 else 0x660F3A16, bits == 64, a, d)
        self.code.append(lane)
        if way == "s":
            self.extend(bits, 0, d, d)

    def vector_replace(self, d, a, b, lane, bits, is_float):
        if is_float:
            if d == b and d != a:
                self.float_move(2, b)
                b = 2
            self.float_move(d, a)
            if bits == 32:
                self.register(0x660F3A21, 0, d, b)  # insertps
                self.code.append(lane << 4)
            else:
                self.register(0x0F16 if lane else 0xF2000F10, 0, d, b)      # movlhps, movsd
            return
        self.float_move(d, a)
        self.register(0x66000FC4 if bits == 16 else 0x660F3A20 if bits == 8 else 0x660F3A22, bits == 64, d, b)
        self.code.append(lane)

    def vector_select(self, d, a, b, mask):
        """The bits of a where the mask has ones, those of b elsewhere: b ^ (a ^ b) & mask"""
        self.float_move(0, a)           # register 2 may be the mask's
        self.register(0x66000FEF, 0, 0, b)
        self.register(0x66000FDB, 0, 0, mask)
        self.register(0x66000FEF, 0, 0, b)
        self.float_move(d, 0)

    # What takes several steps computes in registers 2, 1 and 0, of which the last two may be operands'.
    PACKED = {"and": 0x0F54, "andn": 0x0F55, "or": 0x0F56, "xor": 0x0F57, "add": 0x0F58, "mul": 0x0F59, "sub": 0x0F5C, "min": 0x0F5D,
              "max": 0x0F5F, "cmp": 0x0FC2, "shuf": 0x0FC6}        # … ps and … pd
    SSE = {
        **{name + "ps": opcode for name, opcode in PACKED.items()}, **{name + "pd": 0x66000000 | opcode for name, opcode in PACKED.items()},
        "cvtdq2ps": 0x0F5B, "cvttps2dq": 0xF3000F5B, "cvttpd2dq": 0x66000FE6, "roundpd": 0x660F3A09, "pmovzxdq": 0x660F3835,
        "pmovmskb": 0x66000FD7, "punpcklbw": 0x66000F60, "punpckhbw": 0x66000F68, "packsswb": 0x66000F63, "packuswb": 0x66000F67,
        "pand": 0x66000FDB, "pxor": 0x66000FEF, "pabsb": 0x660F381C, "pabsw": 0x660F381D, "paddb": 0x66000FFC, "paddd": 0x66000FFE,
        "psubd": 0x66000FFA, "psubq": 0x66000FFB, "pmaddubsw": 0x660F3804, "pmaddwd": 0x66000FF5, "pmulhrsw": 0x660F380B,
        "pmaxsd": 0x660F383D, "pcmpeqw": 0x66000F75, "pcmpeqd": 0x66000F76, "pcmpgtq": 0x660F3837, "pshufb": 0x660F3800,
        "psllw": 0x66000FF1, "psrlw": 0x66000FD1, "psraw": 0x66000FE1, "psrlq": 0x66000FD3}
    EQUAL_LANES, LESS_OR_EQUAL, UNORDERED = 0, 2, 3         # cmpps and cmppd
    TRUNCATED = 11                                          # roundpd: towards zero, and quietly

    def sse(self, *steps):
        """Instructions: (mnemonic, register, register[, immediate])"""
        for name, reg, rm, *immediate in steps:
            self.register(self.SSE[name], 0, reg, rm)
            self.code += bytes(immediate)

    def ones(self, d):
        self.sse(("pcmpeqd", d, d))

    def shift_lanes(self, bits, op, d, count):
        self.register({16: 0x66000F71, 32: 0x66000F72, 64: 0x66000F73}[bits], 0, {"shl": 6, "shr_u": 2, "shr_s": 4}[op], d)
        self.code.append(count)

    def vector_sign(self, d, a, is_abs, double):
        bits = 64 if double else 32
        self.ones(2)
        if is_abs:
            self.shift_lanes(bits, "shr_u", 2, 1)
        else:
            self.shift_lanes(bits, "shl", 2, bits - 1)
        self.float_move(d, a)
        self.sse(("andps" if is_abs else "xorps", d, 2))

    def vector_minimum(self, d, a, b, is_max, double):
        """Both min(a, b) and min(b, a), which differ where one is a NaN or both are zeros: of zeros the
        signs are or-ed, or for max and-ed, and a NaN is made the canonical one."""
        kind = "pd" if double else "ps"
        extreme = ("max" if is_max else "min") + kind
        self.float_move(2, b)
        self.sse((extreme, 2, a))
        self.float_move(0, a)
        self.sse((extreme, 0, b))
        if is_max:
            self.sse(("xorps", 0, 2), ("orps", 2, 0), ("sub" + kind, 2, 0), ("cmp" + kind, 0, 2, self.UNORDERED))
        else:
            self.sse(("orps", 2, 0), ("cmp" + kind, 0, 2, self.UNORDERED), ("orps", 2, 0))
        self.shift_lanes(64 if double else 32, "shr_u", 0, 13 if double else 10)
        self.sse(("andnps", 0, 2))
        self.float_move(d, 0)

    def vector_fused(self, d, a, b, c, negated, double):
        """The product rounded, plus c or taken from it."""
        kind = "pd" if double else "ps"
        self.float_move(0, a)
        self.sse(("mul" + kind, 0, b))
        self.float_move(1, c)
        self.sse((("sub" if negated else "add") + kind, 1, 0))
        self.float_move(d, 1)

    def vector_byte_shift(self, d, a, count, op):
        """Words of twice the same byte are shifted, and packed again."""
        shift = {"shl": "psllw", "shr_u": "psrlw", "shr_s": "psraw"}[op]
        self.move(self.RAX, count)
        self.alu_immediate("and", 0, self.RAX, self.RAX, 7)
        if op != "shl":
            self.alu_immediate("add", 0, self.RAX, self.RAX, 8)
        self.from_bits(0, 1, self.RAX)
        self.float_move(2, a)
        self.float_move(0, a)
        self.sse(("punpckhbw", 2, 2), ("punpcklbw", 0, 0), (shift, 2, 1), (shift, 0, 1))
        if op == "shl":
            for register in 0, 2:
                self.shift_lanes(16, "shl", register, 8)
                self.shift_lanes(16, "shr_u", register, 8)
        self.sse(("packsswb" if op == "shr_s" else "packuswb", 0, 2))
        self.float_move(d, 0)

    def vector_add_pairs_i8s(self, d, a):
        self.ones(2)
        self.sse(("pabsb", 2, 2), ("pmaddubsw", 2, a))              # 1 in each byte, times a's
        self.float_move(d, 2)

    def vector_add_pairs_i8u(self, d, a):
        self.ones(2)
        self.float_move(d, a)
        self.sse(("pabsb", 2, 2), ("pmaddubsw", d, 2))              # the first operand's bytes are unsigned

    def vector_add_pairs_i16s(self, d, a):
        self.ones(2)
        self.float_move(d, a)
        self.sse(("pabsw", 2, 2), ("pmaddwd", d, 2))

    def vector_add_pairs_i16u(self, d, a):
        self.float_move(2, a)
        self.shift_lanes(32, "shr_u", 2, 16)
        self.float_move(0, a)
        self.shift_lanes(32, "shl", 0, 16)
        self.shift_lanes(32, "shr_u", 0, 16)
        self.sse(("paddd", 0, 2))
        self.float_move(d, 0)

    def vector_truncate_s(self, d, a):
        """cvttps2dq yields 0x80000000 for what does not fit: right for small values, and turned over for
        great ones, of which the sign has changed."""
        self.float_move(2, a)
        self.float_move(0, a)
        self.sse(("cmpps", 2, 2, self.EQUAL_LANES), ("andps", 0, 2),           # 0 for a NaN
                 ("pxor", 2, 0), ("cvttps2dq", 0, 0), ("pand", 2, 0))
        self.shift_lanes(32, "shr_s", 2, 31)
        self.sse(("pxor", 0, 2))
        self.float_move(d, 0)

    def vector_truncate_u(self, d, a):
        """The sum of what fits 31 bits, or else 2**31, and of what is beyond these."""
        self.float_move(0, a)
        self.sse(("pxor", 2, 2), ("maxps", 0, 2))                   # no NaN, nothing below 0
        self.ones(2)
        self.shift_lanes(32, "shr_u", 2, 1)
        self.sse(("cvtdq2ps", 2, 2))                                # 2.0**31
        self.float_move(1, 0)
        self.sse(("subps", 1, 2), ("cmpps", 2, 1, self.LESS_OR_EQUAL),         # whether it is 2**32 at least
                 ("cvttps2dq", 1, 1), ("pxor", 1, 2), ("pxor", 2, 2), ("pmaxsd", 1, 2), ("cvttps2dq", 0, 0), ("paddd", 0, 1))
        self.float_move(d, 0)

    def vector_truncate_double_s(self, d, a, constant):
        """cvttpd2dq leaves zeros above, and makes 0x80000000 of what is too small."""
        self.float_constant(1, constant(struct.pack("<2d", *[float(0x7FFFFFFF)] * 2)), 16)
        self.float_move(2, a)
        self.float_move(0, a)
        self.sse(("cmppd", 2, 2, self.EQUAL_LANES), ("andpd", 2, 1), ("minpd", 0, 2), ("cvttpd2dq", 0, 0))
        self.float_move(d, 0)

    def vector_truncate_double_u(self, d, a, constant):
        """2.0**52 more has the integer in its lower bits."""
        self.float_move(0, a)
        self.sse(("pxor", 2, 2), ("maxpd", 0, 2))
        self.float_constant(1, constant(struct.pack("<2d", *[float(MAX_U32)] * 2)), 16)
        self.sse(("minpd", 0, 1), ("roundpd", 0, 0, self.TRUNCATED))
        self.float_constant(1, constant(struct.pack("<2d", *[2.0 ** 52] * 2)), 16)
        self.sse(("addpd", 0, 1), ("shufps", 0, 2, 0x88))
        self.float_move(d, 0)

    def vector_convert_u(self, d, a):
        """The lower half-words and the rest, which is halved for a while, are exact as floats."""
        self.float_move(2, a)
        self.shift_lanes(32, "shl", 2, 16)
        self.shift_lanes(32, "shr_u", 2, 16)
        self.float_move(0, a)
        self.sse(("psubd", 0, 2))
        self.shift_lanes(32, "shr_u", 0, 1)
        self.sse(("cvtdq2ps", 2, 2), ("cvtdq2ps", 0, 0), ("addps", 0, 0), ("addps", 0, 2))
        self.float_move(d, 0)

    def vector_convert_low_u(self, d, a, constant):
        """An integer in the lower bits of 2.0**52, less 2.0**52"""
        self.sse(("pmovzxdq", 2, a))
        self.float_constant(1, constant(struct.pack("<2d", *[2.0 ** 52] * 2)), 16)
        self.sse(("orps", 2, 1), ("subpd", 2, 1))
        self.float_move(d, 2)

    def vector_long_abs(self, d, a):
        self.long_signs(2, a)
        self.float_move(0, a)
        self.sse(("pxor", 0, 2), ("psubq", 0, 2))
        self.float_move(d, 0)

    def vector_long_shift(self, d, a, count):
        """Of what is below 0 the complement is shifted."""
        self.move(self.RAX, count)
        self.alu_immediate("and", 0, self.RAX, self.RAX, 63)
        self.from_bits(0, 1, self.RAX)
        self.long_signs(2, a)
        self.float_move(0, a)
        self.sse(("pxor", 0, 2), ("psrlq", 0, 1), ("pxor", 0, 2))
        self.float_move(d, 0)

    def long_signs(self, d, a):
        self.sse(("pxor", d, d), ("pcmpgtq", d, a))

    def vector_multiply(self, d, a, b):
        for lane in range(2):
            self.vector_extract(self.RAX, a, lane, 64, "u")
            self.vector_extract(self.RDX, b, lane, 64, "u")
            self.multiply(1, self.RAX, self.RAX, self.RDX)
            self.vector_replace(2, 2, self.RAX, lane, 64, False)
        self.float_move(d, 2)

    def vector_multiply_q15(self, d, a, b):
        """pmulhrsw is right but for -1 times -1."""
        self.ones(2)
        self.shift_lanes(16, "shl", 2, 15)
        self.float_move(0, a)
        self.sse(("pmulhrsw", 0, b), ("pcmpeqw", 2, 0), ("pxor", 0, 2))
        self.float_move(d, 0)

    def vector_word_bitmask(self, d, a):
        self.float_move(2, a)
        self.sse(("packsswb", 2, 2), ("pmovmskb", d, 2))
        self.alu_immediate("and", 0, d, d, 0xFF)

    def vector_popcnt(self, d, a, constant):
        """Looks up either half of each byte."""
        counts = constant(bytes(map(int.bit_count, range(16))))
        self.float_constant(2, constant(b"\x0f" * 16), 16)
        self.float_move(1, a)
        self.float_move(0, a)
        self.shift_lanes(16, "shr_u", 0, 4)
        self.sse(("pand", 1, 2), ("pand", 0, 2))
        self.float_constant(2, counts, 16)
        self.sse(("pshufb", 2, 1))
        self.float_constant(1, counts, 16)
        self.sse(("pshufb", 1, 0), ("paddb", 1, 2))
        self.float_move(d, 1)

    def vector_swizzle(self, d, a, b, constant):
        """pshufb yields 0 for an index from 128 on, and the saturated sum makes it so from 16 on."""
        self.float_constant(2, constant(b"\x70" * 16), 16)
        self.register(0x66000FDC, 0, 2, b)
        self.float_move(d, a)
        self.register(0x660F3800, 0, d, 2)

    def vector_shuffle(self, d, a, b, indices, constant):
        words = [indices[i] >> 2 for i in (0, 4, 8, 12)]
        is_words = all(indices[4 * i + j] == 4 * words[i] + j for i in range(4) for j in range(4))
        sides = [word >> 2 for word in words]
        code = sum((word & 3) << 2 * i for i, word in enumerate(words))
        if is_words and len(set(sides)) == 1:
            self.register(0x66000F70, 0, d, b if sides[0] else a)
            self.code.append(code)
        elif is_words and sides in ([0, 0, 1, 1], [1, 1, 0, 0]):
            if sides[0]:
                a, b = b, a
            self.vector_binary(d, a, b, 0x0FC6)     # shufps
            self.code.append(code)
        else:
            self.float_constant(2, constant(bytes(i if i < 16 else 0x80 for i in indices)), 16)
            self.float_move(0, a)
            self.register(0x660F3800, 0, 0, 2)      # pshufb
            self.float_constant(2, constant(bytes(i - 16 if i >= 16 else 0x80 for i in indices)), 16)
            self.float_move(1, b)
            self.register(0x660F3800, 0, 1, 2)
            self.register(0x66000FEB, 0, 0, 1)
            self.float_move(d, 0)

    # -- the seam: functions of the C ABI, and what they call --

    def features_stub(self):
        """long features(): what CPUID says in ecx of leaf 1."""
        self.push(self.RBX)
        self.immediate(self.RAX, 1)
        self.code += b"\x0f\xa2\x89\xc8\x5b\xc3"      # cpuid; mov eax, ecx; pop rbx; ret

    def entry_stub(self, host_stack, memory_base, results):
        """int enter(context, code, stack): calls native code on the guest's stack. Offsets in
        the context: where the host's stack pointer is kept, the memory's address, and where an
        integer and a float result go. Returns the offset of the exit, which expects a status
        in eax."""
        for register in (self.RBX, self.RBP, 12, 13, 14, 15):
            self.push(register)
        self.indirect(0xFF, 0, 6, self.RDI, host_stack)         # of an entry further out
        self.store(self.RSP, self.RDI, host_stack)
        self.move(self.CONTEXT, self.RDI)
        self.load(self.MEMORY, self.CONTEXT, memory_base)
        self.move(self.RSP, self.RDX)
        self.register(0xFF, 0, 2, self.RSI)
        self.store(self.RAX, self.CONTEXT, results)
        self.vector_store(0, self.CONTEXT, results + 8)
        self.immediate(self.RAX, 0)
        exit = len(self.code)
        self.load(self.RSP, self.CONTEXT, host_stack)
        self.indirect(0x8F, 0, 0, self.CONTEXT, host_stack)
        for register in (15, 14, 13, 12, self.RBP, self.RBX):
            self.code += (b"\x41" if register > 7 else b"") + bytes((0x58 | register & 7,))
        self.code.append(0xC3)
        return exit

    def push(self, register):
        self.code += (b"\x41" if register > 7 else b"") + bytes((0x50 | register & 7,))

    def trap_stub(self, trap_stack, exit):
        """Native code calls it with a status in eax: notes the stack and leaves."""
        self.store(self.RSP, self.CONTEXT, trap_stack)
        self.code.append(0xE9)
        self.code += pack_i32(exit - len(self.code) - 4)

    def helper_stub(self, host_stack, callback, trap, pending):
        """Native code calls it with a number in eax: calls callback(number, stack, host's stack) on
        the latter, then traps with the status `pending` or returns what the callback left in
        the first argument's place."""
        self.move(self.RDI, self.RAX)
        self.move(self.RSI, self.RSP)
        for register in self.CALLEE_SAVED:          # where a search for references finds them
            self.push(register)
        self.load(self.RSP, self.CONTEXT, host_stack)
        self.move(self.RDX, self.RSP)
        self.push(self.RSI)
        self.register(0x81, 1, 5, self.RSP)         # aligned: the entry pushed seven and a return address
        self.code += pack_i32(8)
        self.indirect(0xFF, 0, 2, self.CONTEXT, callback)
        self.load(self.RSP, self.RSP, 8)
        self.register(0x85, 0, self.RAX, self.RAX)
        failed = self.label()
        self.jump_if(5, failed)
        self.load(self.RAX, self.RSP, 8)
        self.vector_load(0, self.RSP, 8)
        self.code.append(0xC3)
        self.bind(failed)
        self.immediate(self.RAX, pending)
        self.jump_context(trap)


# (log2 of the lanes' bytes, lanes, those of twice the width)
WIDENED = ((0, "i8x16", "i16x8"), (1, "i16x8", "i32x4"), (2, "i32x4", "i64x2"))


class A64(Assembler):
    """aarch64, Armv8.0."""

    machine = "aarch64"
    FEATURES = {}                       # floats and vectors are part of the platform
    RETURN_BYTES, FRAME_EXTRA = 0, 8    # a call pushes nothing; the frame ends with the link register
    FRAME, MEMORY, CONTEXT, LINK = 31, 27, 28, 30       # the link register is saved, so it is free
    SCRATCH, FLOAT_SCRATCH = (16, 17, 15), (0, 1, 2)
    RESULT, FLOAT_RESULT = 0, 0
    # Of the procedure call standard AAPCS64; register 18 is the platform's.
    CALLEE_SAVED, CALLER_SAVED = tuple(range(19, 27)), tuple(range(1, 15))
    FLOAT_CALLEE_SAVED, FLOAT_CALLER_SAVED = tuple(range(8, 16)), tuple(range(16, 32)) + tuple(range(3, 8))
    ZERO = 31                           # where it is not the stack pointer
    ALU = {"add": 0x0B000000, "sub": 0x4B000000, "and": 0x0A000000, "or": 0x2A000000, "xor": 0x4A000000}
    LOGICAL = {"and": 0x12000000, "or": 0x32000000, "xor": 0x52000000}
    SHIFTS = {"shl": 0x1AC02000, "shr_u": 0x1AC02400, "shr_s": 0x1AC02800, "rotr": 0x1AC02C00}
    CONDITIONS = {"eq": 0, "ne": 1, "lt_s": 11, "lt_u": 3, "gt_s": 12, "gt_u": 8, "le_s": 13, "le_u": 9, "ge_s": 10, "ge_u": 2}
    FLOAT_CONDITIONS = {"eq": (0, False), "ne": (1, False), "lt": (4, False), "gt": (12, False), "le": (9, False),
                        "ge": (10, False)}
    FLOAT_ALU = {"add": 0x1E202800, "sub": 0x1E203800, "mul": 0x1E200800, "div": 0x1E201800}
    ROUNDING = {"nearest": 0x1E244000, "ceil": 0x1E24C000, "floor": 0x1E254000, "trunc": 0x1E25C000}
    ACCESSES = {                        # with a register as offset
        "i32.load": 0xB8606800, "i64.load": 0xF8606800, "i32.load8_s": 0x38E06800, "i32.load8_u": 0x38606800,
        "i32.load16_s": 0x78E06800, "i32.load16_u": 0x78606800, "i64.load8_s": 0x38A06800, "i64.load8_u": 0x38606800,
        "i64.load16_s": 0x78A06800, "i64.load16_u": 0x78606800, "i64.load32_s": 0xB8A06800, "i64.load32_u": 0xB8606800,
        "f32.load": 0xBC606800, "f64.load": 0xFC606800, "v128.load": 0x3CE06800, "v128.load32_zero": 0xBC606800,
        "v128.load64_zero": 0xFC606800,
        "i32.store": 0xB8206800, "i64.store": 0xF8206800, "i32.store8": 0x38206800, "i32.store16": 0x78206800,
        "i64.store8": 0x38206800, "i64.store16": 0x78206800, "i64.store32": 0xB8206800,
        "f32.store": 0xBC206800, "f64.store": 0xFC206800, "v128.store": 0x3CA06800}
    POOLED = ("vector_bitmask", "vector_swizzle")
    VECTORS = with_relaxed({
        **{"%s.%s" % (lanes, name): ("vector_binary", opcode | size << 22) for name, opcode, sizes in (
            ("add", 0x4E208400, "0123"), ("sub", 0x6E208400, "0123"), ("mul", 0x4E209C00, "12"), ("add_sat_s", 0x4E200C00, "01"),
            ("add_sat_u", 0x6E200C00, "01"), ("sub_sat_s", 0x4E202C00, "01"), ("sub_sat_u", 0x6E202C00, "01"),
            ("min_s", 0x4E206C00, "012"), ("min_u", 0x6E206C00, "012"), ("max_s", 0x4E206400, "012"), ("max_u", 0x6E206400, "012"),
            ("avgr_u", 0x6E201400, "01"), ("eq", 0x6E208C00, "0123"), ("gt_s", 0x4E203400, "0123"), ("ge_s", 0x4E203C00, "0123"),
            ("gt_u", 0x6E203400, "012"), ("ge_u", 0x6E203C00, "012"))
           for size, lanes in enumerate(("i8x16", "i16x8", "i32x4", "i64x2")) if str(size) in sizes},
        **{"%s.%s" % (lanes, name): ("vector_swapped", opcode | size << 22) for name, opcode, sizes in (
            ("lt_s", 0x4E203400, "0123"), ("le_s", 0x4E203C00, "0123"), ("lt_u", 0x6E203400, "012"), ("le_u", 0x6E203C00, "012"))
           for size, lanes in enumerate(("i8x16", "i16x8", "i32x4", "i64x2")) if str(size) in sizes},
        **{"%s.ne" % lanes: ("vector_negated", 0x6E208C00 | size << 22) for size, lanes in enumerate(("i8x16", "i16x8", "i32x4", "i64x2"))},
        **{"%s.%s" % (lanes, name): ("vector_unary", opcode | size << 22) for name, opcode in (("neg", 0x6E20B800), ("abs", 0x4E20B800))
           for size, lanes in enumerate(("i8x16", "i16x8", "i32x4", "i64x2"))},
        **{"%s.%s" % (lanes, name): ("vector_binary", opcode | double << 22) for name, opcode in (
            ("add", 0x4E20D400), ("sub", 0x4EA0D400), ("mul", 0x6E20DC00), ("div", 0x6E20FC00), ("min", 0x4EA0F400),
            ("max", 0x4E20F400), ("eq", 0x4E20E400), ("gt", 0x6EA0E400), ("ge", 0x6E20E400))
           for double, lanes in enumerate(("f32x4", "f64x2"))},
        **{"%s.%s" % (lanes, name): ("vector_swapped", opcode | double << 22) for name, opcode in (("lt", 0x6EA0E400), ("le", 0x6E20E400))
           for double, lanes in enumerate(("f32x4", "f64x2"))},
        **{"%s.ne" % lanes: ("vector_negated", 0x4E20E400 | double << 22) for double, lanes in enumerate(("f32x4", "f64x2"))},
        **{"%s.%s" % (lanes, name): ("vector_unary", opcode | double << 22) for name, opcode in (
            ("abs", 0x4EA0F800), ("neg", 0x6EA0F800), ("sqrt", 0x6EA1F800), ("nearest", 0x4E218800), ("floor", 0x4E219800),
            ("ceil", 0x4EA18800), ("trunc", 0x4EA19800)) for double, lanes in enumerate(("f32x4", "f64x2"))},
        **{"%s.%s" % (lanes, op): ("vector_shift", op, size) for op in ("shl", "shr_s", "shr_u")
           for size, lanes in enumerate(("i8x16", "i16x8", "i32x4", "i64x2"))},
        **{"%s.splat" % lanes: ("vector_splat", size, is_float) for lanes, size, is_float in (
            ("i8x16", 0, False), ("i16x8", 1, False), ("i32x4", 2, False), ("i64x2", 3, False), ("f32x4", 2, True), ("f64x2", 3, True))},
        **{"%s.extend_%s_%s_%s" % (wide, half, lanes, sign): ("vector_unary", 0x0F00A400 | upper << 30 | unsigned << 29 | 1 << size + 19)
           for size, lanes, wide in WIDENED for upper, half in enumerate(("low", "high")) for unsigned, sign in enumerate("su")},
        **{"%s.extmul_%s_%s_%s" % (wide, half, lanes, sign): ("vector_binary", 0x0E20C000 | upper << 30 | unsigned << 29 | size << 22)
           for size, lanes, wide in WIDENED for upper, half in enumerate(("low", "high")) for unsigned, sign in enumerate("su")},
        **{"%s.extadd_pairwise_%s_%s" % (wide, lanes, sign): ("vector_unary", 0x4E202800 | unsigned << 29 | size << 22)
           for size, lanes, wide in WIDENED[:2] for unsigned, sign in enumerate("su")},
        **{"%s.narrow_%s_%s" % (lanes, wide, sign): ("vector_narrow", opcode | size << 22) for size, lanes, wide in WIDENED[:2]
           for sign, opcode in (("s", 0x0E214800), ("u", 0x2E212800))},
        **{"%s.%s" % (lanes, name): ("vector_pseudo", 0x6EA0E400 | double << 22, is_max) for double, lanes in enumerate(("f32x4", "f64x2"))
           for is_max, name in enumerate(("pmin", "pmax"))},
        **{name + "_" + sign: ("vector_unary", opcode | unsigned << 29) for unsigned, sign in enumerate("su") for name, opcode in (
            ("f32x4.convert_i32x4", 0x4E21D800), ("i32x4.trunc_sat_f32x4", 0x4EA1B800))},
        **{name: ("vector_steps", *opcodes) for name, opcodes in {
            "f64x2.convert_low_i32x4_s": (0x0F20A400, 0x4E61D800), "f64x2.convert_low_i32x4_u": (0x2F20A400, 0x6E61D800),
            "i32x4.trunc_sat_f64x2_s_zero": (0x4EE1B800, 0x0EA14800), "i32x4.trunc_sat_f64x2_u_zero": (0x6EE1B800, 0x2EA14800)}.items()},
        **{"%s.relaxed_%s" % (lanes, name): ("vector_fused", name == "nmadd", double) for double, lanes in enumerate(("f32x4", "f64x2"))
           for name in ("madd", "nmadd")},
        **{"%s.%s" % (lanes, name): ("vector_extract", size, sign) for size, lanes, name, sign in (
            (0, "i8x16", "extract_lane_s", "s"), (0, "i8x16", "extract_lane_u", "u"), (1, "i16x8", "extract_lane_s", "s"),
            (1, "i16x8", "extract_lane_u", "u"), (2, "i32x4", "extract_lane", "u"), (3, "i64x2", "extract_lane", "u"),
            (2, "f32x4", "extract_lane", "f"), (3, "f64x2", "extract_lane", "f"))},
        **{"%s.replace_lane" % lanes: ("vector_replace", size, lanes[0] == "f") for size, lanes in (
            (0, "i8x16"), (1, "i16x8"), (2, "i32x4"), (3, "i64x2"), (2, "f32x4"), (3, "f64x2"))},
        **{"%s.all_true" % lanes: ("vector_all_true", size) for size, lanes in enumerate(("i8x16", "i16x8", "i32x4", "i64x2"))},
        **{"%s.bitmask" % lanes: ("vector_bitmask", size) for size, lanes in enumerate(("i8x16", "i16x8", "i32x4", "i64x2"))},
        "i64x2.mul": ("vector_multiply",), "i32x4.dot_i16x8_s": ("vector_dot",), "i16x8.q15mulr_sat_s": ("vector_binary", 0x6E60B400),
        "v128.any_true": ("vector_any_true",),
        "f64x2.promote_low_f32x4": ("vector_unary", 0x0E617800), "f32x4.demote_f64x2_zero": ("vector_unary", 0x0E616800),
        "v128.and": ("vector_binary", 0x4E201C00), "v128.or": ("vector_binary", 0x4EA01C00), "v128.xor": ("vector_binary", 0x6E201C00),
        "v128.andnot": ("vector_binary", 0x4E601C00), "v128.not": ("vector_unary", 0x6E205800), "i8x16.popcnt": ("vector_unary", 0x4E205800),
        "v128.bitselect": ("vector_select",), "i8x16.swizzle": ("vector_swizzle",), "i8x16.shuffle": ("vector_shuffle",)})

    # -- encoding --

    def word(self, word):
        self.code += pack_u32(word)

    def three(self, opcode, d, a, b):
        """Rd, Rn and Rm"""
        self.word(opcode | b << 16 | a << 5 | d)

    def reach(self, base, offset, size):
        """A base and an offset of at most 12 bits that together make base + offset."""
        if offset % size == 0 and offset < 4096 * size:
            return base, offset
        if offset >= 1 << 24 or offset % size:
            raise Unsupported("a frame of %d bytes" % offset)
        self.word(0x91400000 | offset >> 12 << 10 | base << 5 | self.LINK)
        return self.LINK, offset & 0xFFF

    # -- labels and jumps --

    def refer(self, word, label, shift, bits):
        position = len(self.code)
        self.fixups.append((position, label, shift, bits, position))
        self.word(word)

    def jump(self, label):
        self.refer(0x14000000, label, 0, 26)

    def jump_if(self, condition, label):
        self.refer(0x54000000 | condition, label, 5, 19)

    def call_label(self, label):
        self.refer(0x94000000, label, 0, 26)

    def jump_table(self, index, labels):
        """Jumps to labels[index]; `index` is a scratch register."""
        self.word(0x10000000 | 4 << 5 | self.LINK)                              # adr: the table, 16 bytes on
        self.word(0xB8A07800 | index << 16 | self.LINK << 5 | index)            # ldrsw
        self.alu("add", 1, self.LINK, self.LINK, index)
        self.word(0xD61F0000 | self.LINK << 5)
        base = len(self.code)
        for label in labels:
            self.fixups.append((len(self.code), label, 0, 32, base))
            self.word(0)

    def call_context(self, offset, index=None):
        """Calls the address that the context holds at offset + 8 * index."""
        self.load_pointer(offset, index)
        self.word(0xD63F0000 | 17 << 5)

    def jump_context(self, offset, index=None):
        """As call_context(), with the link register as it is."""
        self.load_pointer(offset, index, 15)
        self.word(0xD61F0000 | 17 << 5)

    def load_pointer(self, offset, index, scratch=LINK):
        """Register 17 := what the context holds at offset + 8 * index."""
        base = self.CONTEXT
        if offset >> 12:
            self.word(0x91400000 | offset >> 12 << 10 | base << 5 | scratch)
            base, offset = scratch, offset & 0xFFF
        if index is not None:
            self.word(0x8B000C00 | index << 16 | base << 5 | 17)                # add x17, base, index, lsl 3
            base = 17
        self.word(0xF9400000 | offset >> 3 << 10 | base << 5 | 17)

    def finish(self):
        """Mends the references to labels; conditional ones reach a megabyte."""
        for position, label, shift, bits, base in self.fixups:
            distance = self.labels[label] - base
            if bits == 32:
                self.code[position:position + 4] = pack_i32(distance)
                continue
            distance >>= 2
            if not -1 << bits - 1 <= distance < 1 << bits - 1:
                raise Unsupported("a function of %d bytes" % len(self.code))
            word = unpack_u32(self.code[position:position + 4])[0] | (distance & (1 << bits) - 1) << shift
            self.code[position:position + 4] = pack_u32(word)

    # -- frames --

    def enter(self, bytes, limit, overflow):
        self.load(17, self.CONTEXT, limit)
        if bytes < 4096:                # which the limit leaves room for
            self.word(0xEB3163FF)                                               # cmp sp, x17
        else:
            self.stack(0xD1000000, bytes, 15)
            self.compare(1, 15, 17)
        self.jump_if(3, overflow)
        self.stack(0xD1000000, bytes, self.FRAME)
        base, offset = (self.FRAME, bytes - 8) if bytes <= 32768 else (15, 0)
        if base == 15:
            self.stack(0x91000000, bytes - 8, 15)
        self.word(0xF9000000 | offset >> 3 << 10 | base << 5 | self.LINK)

    def stack(self, opcode, bytes, d):
        """d := the stack pointer ± bytes"""
        source = self.FRAME
        if bytes >> 12:
            self.word(opcode | 1 << 22 | (bytes >> 12) << 10 | source << 5 | d)
            source = d
        if bytes & 0xFFF or source != d:
            self.word(opcode | (bytes & 0xFFF) << 10 | source << 5 | d)

    def leave(self, bytes):
        self.load(self.LINK, self.FRAME, bytes - 8)
        self.stack(0x91000000, bytes, self.FRAME)

    def return_(self):
        self.word(0xD65F03C0)

    # -- moves --

    def move(self, d, a):
        if d != a:
            self.word(0xAA0003E0 | a << 16 | d)

    def immediate(self, d, value):
        """d := 64 bits; leaves the flags alone."""
        pieces = [(value >> shift & 0xFFFF, shift // 16) for shift in (0, 16, 32, 48)]
        ones = sum(piece == 0xFFFF for piece, _ in pieces)
        inverted = ones > 1 and ones > sum(piece == 0 for piece, _ in pieces)
        rest = [(piece, place) for piece, place in pieces if piece != (0xFFFF if inverted else 0)] or [(0xFFFF if inverted else 0, 0)]
        piece, place = rest[0]
        self.word(0x92800000 | place << 21 | (piece ^ 0xFFFF) << 5 | d if inverted else 0xD2800000 | place << 21 | piece << 5 | d)
        for piece, place in rest[1:]:
            self.word(0xF2800000 | place << 21 | piece << 5 | d)

    def load(self, d, base, offset):
        base, offset = self.reach(base, offset, 8)
        self.word(0xF9400000 | offset >> 3 << 10 | base << 5 | d)

    def store(self, a, base, offset):
        base, offset = self.reach(base, offset, 8)
        self.word(0xF9000000 | offset >> 3 << 10 | base << 5 | a)

    def load_indexed(self, d, base, index):
        """d := [base + 8 * index]"""
        self.three(0xF8607800, d, base, index)

    def store_immediate(self, value, base, offset):
        register = self.ZERO
        if value:
            register = 16
            self.immediate(16, value)
        self.store(register, base, offset)

    def float_move(self, d, a):
        if d != a:
            self.three(0x4EA01C00, d, a, a)

    def float_zero(self, d):
        self.word(0x6F00E400 | d)                                               # movi d.2d, 0

    def float_constant(self, d, label, bytes):
        """Loads 4, 8 or 16 bytes from the code."""
        self.refer({4: 0x1C000000, 8: 0x5C000000, 16: 0x9C000000}[bytes] | d, label, 5, 19)

    def float_load(self, d, base, offset):
        base, offset = self.reach(base, offset, 8)
        self.word(0xFD400000 | offset >> 3 << 10 | base << 5 | d)

    def float_store(self, a, base, offset):
        base, offset = self.reach(base, offset, 8)
        self.word(0xFD000000 | offset >> 3 << 10 | base << 5 | a)

    def vector_load(self, d, base, offset):
        base, offset = self.reach(base, offset, 16)
        self.word(0x3DC00000 | offset >> 4 << 10 | base << 5 | d)

    def vector_store(self, a, base, offset):
        base, offset = self.reach(base, offset, 16)
        self.word(0x3D800000 | offset >> 4 << 10 | base << 5 | a)

    # -- integers --

    def alu(self, op, wide, d, a, b):
        self.three(self.ALU[op] | wide << 31, d, a, b)

    def alu_immediate(self, op, wide, d, a, value):
        """The operation with a constant, an unsigned one; always possible."""
        if op in ("add", "sub"):
            value = signed(value, 64 if wide else 32)
            if value < 0:
                op, value = "sub" if op == "add" else "add", -value
            opcode = (0x11000000 if op == "add" else 0x51000000) | wide << 31 | a << 5 | d
            if value < 1 << 12:
                self.word(opcode | value << 10)
                return True
            if value < 1 << 24 and not value & 0xFFF:
                self.word(opcode | 1 << 22 | value >> 12 << 10)
                return True
        else:
            field = logical_immediate(value, 64 if wide else 32)
            if field is not None:
                self.word(self.LOGICAL[op] | wide << 31 | field << 10 | a << 5 | d)
                return True
        self.immediate(self.LINK, value & MAX_U64)
        self.alu(op, wide, d, a, self.LINK)
        return True

    def multiply(self, wide, d, a, b):
        self.three(0x1B007C00 | wide << 31, d, a, b)

    def multiply_immediate(self, wide, d, a, value):
        self.immediate(self.LINK, value)
        self.multiply(wide, d, a, self.LINK)
        return True

    def shift(self, op, wide, d, a, b):
        if op == "rotl":
            self.alu("sub", 0, self.LINK, self.ZERO, b)
            op, b = "rotr", self.LINK
        self.three(self.SHIFTS[op] | wide << 31, d, a, b)

    def shift_immediate(self, op, wide, d, a, count):
        bits = 64 if wide else 32
        if op in ("rotl", "rotr"):
            count = -count % bits if op == "rotl" else count
            return self.word(0x13800000 | wide << 31 | wide << 22 | a << 16 | count << 10 | a << 5 | d)
        opcode = (0x13000000 if op == "shr_s" else 0x53000000) | wide << 31 | wide << 22 | a << 5 | d
        if op == "shl":
            self.word(opcode | (-count % bits) << 16 | bits - 1 - count << 10)
        else:
            self.word(opcode | count << 16 | bits - 1 << 10)

    def divide(self, op, wide, d, a, b, trap, zero, minus_one):
        """`trap(condition, text)`; `zero` and `minus_one` tell whether b may be that."""
        if zero:
            self.compare_immediate(wide, b, 0)
            trap(0, "integer divide by zero")
        if op == "div_s" and minus_one:
            fine = self.label()
            self.compare_immediate(wide, b, MAX_U64 if wide else MAX_U32)
            self.jump_if(1, fine)
            self.compare_immediate(wide, a, 1 << (63 if wide else 31))
            trap(0, "integer overflow")
            self.bind(fine)
        opcode = (0x1AC00C00 if op[-1] == "s" else 0x1AC00800) | wide << 31
        if op[:3] == "div":
            return self.three(opcode, d, a, b)
        self.three(opcode, self.LINK, a, b)
        self.word(0x1B008000 | wide << 31 | b << 16 | a << 10 | self.LINK << 5 | d)     # msub

    def clz(self, wide, d, a):
        self.word(0x5AC01000 | wide << 31 | a << 5 | d)

    def ctz(self, wide, d, a):
        self.word(0x5AC00000 | wide << 31 | a << 5 | d)                         # rbit
        self.clz(wide, d, d)

    def popcnt(self, wide, d, a):
        self.from_bits(wide, 2, a)
        self.word(0x0E205800 | 2 << 5 | 2)                                      # cnt v2.8b
        self.word(0x0E31B800 | 2 << 5 | 2)                                      # addv b2
        self.to_bits(0, d, 2)

    def extend(self, bits, wide, d, a):
        """Sign-extends the low `bits`."""
        self.word(0x13000000 | wide << 31 | wide << 22 | bits - 1 << 10 | a << 5 | d)

    def wrap(self, d, a):
        """d := the low 32 bits of a"""
        self.word(0x2A0003E0 | a << 16 | d)

    # -- comparisons --

    def compare(self, wide, a, b):
        self.three(0x6B000000 | wide << 31, self.ZERO, a, b)

    def compare_immediate(self, wide, a, value):
        number = signed(value, 64 if wide else 32)
        if 0 <= number < 4096:
            self.word(0x71000000 | wide << 31 | number << 10 | a << 5 | self.ZERO)
        elif -4096 < number < 0:
            self.word(0x31000000 | wide << 31 | -number << 10 | a << 5 | self.ZERO)
        else:
            self.immediate(self.LINK, value)
            self.compare(wide, a, self.LINK)
        return True

    def float_compare(self, wide, a, b):
        self.word(0x1E202000 | wide << 22 | b << 16 | a << 5)

    def set_if(self, condition, d):
        self.word(0x1A9F07E0 | (condition ^ 1) << 12 | d)

    def select(self, condition, d, a, b):
        """d := a if the condition holds, else b"""
        self.word(0x9A800000 | b << 16 | condition << 12 | a << 5 | d)

    # -- memory --

    def check_bounds(self, address, offset, width, bytes, limits):
        """Leaves the address to access in register 15, and returns the condition of its being
        outside. The context has at `limits` the least address outside for each width."""
        if offset:
            self.alu_immediate("add", 1, 15, address, offset)
        else:
            self.move(15, address)
        self.load(self.LINK, self.CONTEXT, limits + 8 * width)
        self.compare(1, 15, self.LINK)
        return 2

    def access(self, name, register, address, offset):
        """A load or a store at what check_bounds() left; without an address register at the offset."""
        if address is None:
            self.immediate(15, offset)
        self.three(self.ACCESSES[name], register, self.MEMORY, 15)

    def store_constant(self, name, value, address, offset):
        if value:
            return False
        self.access(name, self.ZERO, address, offset)
        return True

    # -- floats --

    def float_alu(self, op, wide, d, a, b):
        self.three(self.FLOAT_ALU[op] | wide << 22, d, a, b)

    def sqrt(self, wide, d, a):
        self.word(0x1E21C000 | wide << 22 | a << 5 | d)

    def round(self, op, wide, d, a):
        self.word(self.ROUNDING[op] | wide << 22 | a << 5 | d)

    def minimum(self, op, wide, d, a, b):
        self.three((0x1E205800 if op == "min" else 0x1E204800) | wide << 22, d, a, b)

    def sign(self, op, wide, d, a, b=None):
        if op != "copysign":
            return self.word((0x1E20C000 if op == "abs" else 0x1E214000) | wide << 22 | a << 5 | d)
        self.to_bits(wide, 16, a)
        self.to_bits(wide, 17, b)
        self.word((0xB340F800 if wide else 0x33007800) | 16 << 5 | 17)          # bfm: all but the sign
        self.from_bits(wide, d, 17)

    def to_bits(self, wide, d, a):
        self.word((0x9E660000 if wide else 0x1E260000) | a << 5 | d)

    def from_bits(self, wide, d, a):
        self.word((0x9E670000 if wide else 0x1E270000) | a << 5 | d)

    def promote(self, d, a):
        self.word(0x1E22C000 | a << 5 | d)

    def demote(self, d, a):
        self.word(0x1E624000 | a << 5 | d)

    def from_integer(self, wide, d, a, source_wide, is_signed):
        self.word((0x1E220000 if is_signed else 0x1E230000) | source_wide << 31 | wide << 22 | a << 5 | d)

    def to_integer(self, wide, d, a, source_wide, is_signed, failed):
        """Truncates what fits; whatever else jumps to `failed`: NaN, out of range (which the
        processor saturates), and a few that fit."""
        self.word((0x1E380000 if is_signed else 0x1E390000) | wide << 31 | source_wide << 22 | a << 5 | d)
        self.round("trunc", source_wide, 2, a)
        self.from_integer(source_wide, 1, d, wide, is_signed)
        self.float_compare(source_wide, 2, 1)
        self.jump_if(1, failed)
        self.word(0x31000400 | wide << 31 | d << 5 | self.ZERO)                 # cmn d, 1: the greatest integer
        self.jump_if(6 if is_signed else 0, failed)

    # -- vectors --

    def vector_binary(self, d, a, b, opcode):
        self.three(opcode, d, a, b)

    def vector_swapped(self, d, a, b, opcode):
        self.three(opcode, d, b, a)

    def vector_negated(self, d, a, b, opcode):
        self.three(opcode, d, a, b)
        self.vector_unary(d, d, 0x6E205800)

    def vector_unary(self, d, a, opcode):
        self.word(opcode | a << 5 | d)

    def vector_shift(self, d, a, count, op, size):
        """sshl and ushl shift right by a negative count."""
        self.alu_immediate("and", 0, 17, count, (8 << size) - 1)
        if op != "shl":
            self.alu("sub", 1, 17, self.ZERO, 17)
        self.vector_splat(2, 17, size, False)
        self.three((0x4E204400 if op == "shr_s" else 0x6E204400) | size << 22, d, a, 2)

    def vector_shift_immediate(self, d, a, count, op, size):
        self.immediate(17, count & (8 << size) - 1)
        self.vector_shift(d, a, 17, op, size)

    def vector_splat(self, d, a, size, is_float):
        self.word((0x4E000400 if is_float else 0x4E000C00) | 1 << size + 16 | a << 5 | d)

    def vector_select(self, d, a, b, mask):
        self.float_move(2, mask)
        self.three(0x6E601C00, 2, a, b)                                         # bsl
        self.float_move(d, 2)

    def vector_narrow(self, d, a, b, opcode):
        self.word(opcode | a << 5 | 2)                                          # sqxtn, sqxtun
        self.word(opcode | 1 << 30 | b << 5 | 2)                                # the upper half: sqxtn2, sqxtun2
        self.float_move(d, 2)

    def vector_pseudo(self, d, a, b, greater, is_max):
        """pmin is b if a > b, else a; pmax b if b > a."""
        self.three(greater, 2, *((b, a) if is_max else (a, b)))                 # fcmgt
        self.three(0x6E601C00, 2, b, a)                                         # bsl
        self.float_move(d, 2)

    def vector_steps(self, d, a, first, second):
        self.vector_unary(2, a, first)
        self.vector_unary(d, 2, second)

    def vector_fused(self, d, a, b, c, negated, double):
        """The product rounded, plus c or taken from it."""
        self.three(0x6E20DC00 | double << 22, 0, a, b)                          # fmul
        self.three((0x4EA0D400 if negated else 0x4E20D400) | double << 22, d, c, 0)                 # fsub, fadd

    def vector_dot(self, d, a, b):
        self.three(0x4E60C000, 2, a, b)                                         # smull2
        self.three(0x0E60C000, 0, a, b)                                         # smull
        self.three(0x4EA0BC00, d, 0, 2)                                         # addp

    def vector_multiply(self, d, a, b):
        for lane in range(2):
            self.vector_extract(16, a, lane, 3, "u")
            self.vector_extract(17, b, lane, 3, "u")
            self.multiply(1, 16, 16, 17)
            self.insert(2, 16, lane, 3)
        self.float_move(d, 2)

    def vector_extract(self, d, a, lane, size, way):
        opcode = {"s": 0x0E002C00, "u": 0x0E003C00 | (size == 3) << 30, "f": 0x5E000400}[way]       # smov, umov, dup
        self.word(opcode | (lane << 1 | 1) << size + 16 | a << 5 | d)

    def insert(self, d, a, lane, size):
        self.word(0x4E001C00 | (lane << 1 | 1) << size + 16 | a << 5 | d)       # ins

    def vector_replace(self, d, a, b, lane, size, is_float):
        self.float_move(2, a)
        if is_float:
            self.word(0x6E000400 | (lane << 1 | 1) << size + 16 | b << 5 | 2)   # ins of lane 0
        else:
            self.insert(2, b, lane, size)
        self.float_move(d, 2)

    def vector_any_true(self, d, a):
        self.vector_unary(2, a, 0x6E30A800)                                     # umaxv of bytes
        self.set_if_lane("ne", d)

    def vector_all_true(self, d, a, size):
        self.vector_unary(2, a, 0x4E209800 | size << 22)                        # cmeq 0
        self.vector_unary(2, 2, 0x6E30A800)
        self.set_if_lane("eq", d)

    def set_if_lane(self, condition, d):
        """By whether the lowest lane of register 2 is 0"""
        self.to_bits(0, d, 2)
        self.compare_immediate(0, d, 0)
        self.set_if(self.CONDITIONS[condition], d)

    def vector_bitmask(self, d, a, constant, size):
        """Of the bits of a constant, those of lanes below 0 are added."""
        count = 16 >> size
        bits = b"".join((1 << lane % 8).to_bytes(1 << size, "little") for lane in range(count))
        self.float_constant(1, constant(bits), 16)
        self.vector_unary(2, a, 0x4E20A800 | size << 22)                        # cmlt 0
        self.three(0x4E201C00, 2, 2, 1)                                         # and
        if size == 0:
            self.three(0x6E004000 | 8 << 11, 1, 2, 2)                           # ext: the upper half
            self.three(0x4E003800, 2, 2, 1)                                     # zip1: halfwords of lane i and lane 8 + i
            size = 1
        self.vector_unary(2, 2, 0x5EF1B800 if size == 3 else 0x4E31B800 | size << 22)               # addp, addv
        self.to_bits(0, d, 2)

    def vector_swizzle(self, d, a, b, constant):
        self.three(0x4E000000, d, a, b)                                         # tbl

    def vector_shuffle(self, d, a, b, indices, constant):
        self.float_constant(2, constant(bytes(i if i < 16 else 0x80 for i in indices)), 16)
        self.three(0x4E000000, 0, a, 2)
        self.float_constant(2, constant(bytes(i - 16 if i >= 16 else 0x80 for i in indices)), 16)
        self.three(0x4E000000, 2, b, 2)
        self.three(0x4EA01C00, d, 0, 2)

    # -- the seam: functions of the C ABI, and what they call --

    def entry_stub(self, host_stack, memory_base, results):
        """As X64's; the status is expected in register 16."""
        self.word(0xD1000000 | 176 << 10 | 31 << 5 | 31)                        # sub sp, sp, 176
        pairs = [(29, 30), (19, 20), (21, 22), (23, 24), (25, 26), (27, 28)]
        for index, (first, second) in enumerate(pairs):
            self.word(0xA9000000 | 2 * index << 15 | second << 10 | 31 << 5 | first)
        for index in range(4):
            self.word(0x6D000000 | (12 + 2 * index) << 15 | 9 + 2 * index << 10 | 31 << 5 | 8 + 2 * index)
        self.load(9, 0, host_stack)                                             # of an entry further out
        self.store(9, 31, 160)
        self.word(0x910003E9)                                                   # mov x9, sp
        self.store(9, 0, host_stack)
        self.move(self.CONTEXT, 0)
        self.load(self.MEMORY, self.CONTEXT, memory_base)
        self.word(0x9100005F)                                                   # mov sp, x2
        self.word(0xD63F0000 | 1 << 5)
        self.store(0, self.CONTEXT, results)
        self.vector_store(0, self.CONTEXT, results + 8)
        self.immediate(16, 0)
        exit = len(self.code)
        self.move(0, 16)
        self.load(9, self.CONTEXT, host_stack)
        self.word(0x9100013F)                                                   # mov sp, x9
        self.load(9, 31, 160)
        self.store(9, self.CONTEXT, host_stack)
        for index, (first, second) in enumerate(pairs):
            self.word(0xA9400000 | 2 * index << 15 | second << 10 | 31 << 5 | first)
        for index in range(4):
            self.word(0x6D400000 | (12 + 2 * index) << 15 | 9 + 2 * index << 10 | 31 << 5 | 8 + 2 * index)
        self.word(0x91000000 | 176 << 10 | 31 << 5 | 31)
        self.word(0xD65F03C0)
        return exit

    def trap_stub(self, trap_stack, exit):
        """Notes the return address, below the frame, and leaves."""
        self.word(0xD10043FF)                                                   # sub sp, sp, 16
        self.store(self.LINK, 31, 8)
        self.word(0x910023F1)                                                   # add x17, sp, 8
        self.store(17, self.CONTEXT, trap_stack)
        self.word(0x14000000 | (exit - len(self.code) >> 2) & 0x3FFFFFF)

    def helper_stub(self, host_stack, callback, trap, pending):
        """As X64's."""
        self.word(0xD10043FF)                                                   # sub sp, sp, 16
        self.store(self.LINK, 31, 8)
        self.move(0, 16)
        self.word(0x910023E1)                                                   # add x1, sp, 8
        self.word(0x910003EF)                                                   # mov x15, sp
        for register in self.CALLEE_SAVED:          # where a search for references finds them
            self.word(0xF81F0FE0 | register)                                    # str register, [sp, -16]!
        self.load(17, self.CONTEXT, host_stack)
        self.word(0x9100023F)                                                   # mov sp, x17
        self.move(2, 17)
        self.word(0xF81F0FEF)                                                   # str x15, [sp, -16]!
        self.load(17, self.CONTEXT, callback)
        self.word(0xD63F0000 | 17 << 5)
        self.load(15, 31, 0)
        self.word(0x910001FF)                                                   # mov sp, x15
        self.load(self.LINK, 31, 8)
        self.word(0x910043FF)                                                   # add sp, sp, 16
        failed = self.label()
        self.word(0x7100001F)                                                   # cmp w0, 0
        self.jump_if(1, failed)
        self.load(0, 31, 0)
        self.vector_load(0, 31, 0)
        self.word(0xD65F03C0)
        self.bind(failed)
        self.immediate(16, pending)
        self.load(17, self.CONTEXT, trap)
        self.word(0xD61F0000 | 17 << 5)

    def flush_stub(self):
        """void flush(start, end): makes instruction fetches see what was written. The page of this
        stub itself needs none: the kernel does it when a page becomes executable. The cache
        lines are found by their executable address; a line has at least 16 bytes."""
        for operation in (0xD50B7B22, 0xD50B7522):                              # dc cvau, x2; ic ivau, x2
            self.move(2, 0)
            start = len(self.code)
            self.word(operation)
            self.alu_immediate("add", 1, 2, 2, 16)
            self.compare(1, 2, 1)
            self.word(0x54000003 | ((start - len(self.code)) >> 2 & 0x7FFFF) << 5)     # b.lo
            self.word(0xD5033B9F)                                               # dsb ish
        self.word(0xD5033FDF)                                                   # isb
        self.word(0xD65F03C0)


def logical_immediate(value, bits):
    """The fields N, immr and imms of a bitmask immediate, or None: a value that repeats
    a rotated run of ones."""
    if value in (0, (1 << bits) - 1):
        return None
    for size in (2, 4, 8, 16, 32, 64):
        ones_mask = (1 << size) - 1
        element = value & ones_mask
        if size > bits or any(value >> shift & ones_mask != element for shift in range(0, bits, size)):
            continue
        for rotation in range(size):
            run = (element << rotation | element >> size - rotation) & ones_mask
            if not run & run + 1:
                return (size == 64) << 12 | rotation << 6 | (-size << 1 & 0x3F if size < 64 else 0) | run.bit_length() - 1
    return None


# === 15. Native tier ==========================================================
#
# A compiler from chapter 11's basic blocks to machine code, for functions that are
# hot. Nothing here is needed to run a program: what this chapter cannot compile, or
# where there is no processor or no permission for it, stays in the interpreter.
#
# Tier-up. The translator puts steps of do_count at the start of a function and at the
# head of each loop. When a function has executed about as much as compiling it costs,
# it is compiled whole: its entry block becomes one step that enters native code, and so
# does each loop's head, at which frames that are active go on natively (on-stack
# replacement: the frame's slots are copied, and the rest of the function is a return).
#
# Values. A slot of the frame, as an integer or as a float, is a variable. Variables get
# registers by the weight of their uses, eight times as much for each loop around them;
# two that are never alive in the same block may share one. The others live in their
# homes, 8 bytes each on the guest's stack:
#
#     higher   arguments of the call, then its results if several      (the caller's)
#              return address
#              callee-saved registers, homes of the variables
#     lower    arguments of calls made here                             <- stack pointer
#
# Calls. Arguments go by the stack, a result comes in a register. A caller keeps what
# it has in caller-saved registers in its homes, and the liveness of blocks tells what
# that is. Functions are called by index through the context, a table of pointers in which
# what is not compiled is a stub that calls back into Python, host functions included.
# What is rare (growing a memory, tables, conversions that fail) calls back too, into
# the interpreter's own handler: texts of traps and odd cases exist once.
#
# Traps. Every access to memory is compared with the memory's size first. A trap's
# return address identifies the instruction, so the stack that is left behind has the
# whole backtrace. The guest has a stack of its own, and a function that would cross its
# end traps; code of Python always runs on the stack of the C library.
#
# Exceptions. A guest's exception leaves native code like a trap; then the frames are searched
# for a catch clause, by the return address of each. Where there is one, native code is
# entered again at its landing with the stack as it was there. What is alive at a landing is
# in homes, and a function that catches saves all callee-saved registers: it restores for its
# caller what those that the exception went through would have restored.
#
# Code lies in a memfd that is mapped twice, to be written and to be executed. (The page by
# which C calls Python is ctypes' own; some builds of libffi have it writable as well.)

SIGXFSZ, RLIMIT_STACK = 25, 3
NATIVE_STACK_BYTES = 1 << 24
NATIVE_STACK_MARGIN = 1 << 16       # for signal frames, and for frames that are not checked
NATIVE_CODE_BYTES = 1 << 26
TAIL_CALL_BYTES = 64                # arguments that any function has room for
COMPILE_COST = 16                   # bytes to execute for each byte to compile …
COMPILE_START = 4000                # … and once
VECTOR_COST = 8                     # how much slower the interpreter is with vectors
SEAM_COST = 2000                    # what a call from native code to the interpreter counts, in bytes
FIRST_COMPILE = 60000               # the tier itself takes some milliseconds to set up

# Offsets in a context. Tables follow (base, length each), globals, pointers to functions.
(MEMORY_BYTES, MEMORY_BASE, STACK_LIMIT, HOST_STACK, TRAP_STACK, RESULTS, FLOAT_RESULTS, _, HELPER, TRAP, CALLBACK,
 SIGNALS, MEMORY_LIMITS) = range(0, 104, 8)
CONTEXT_TABLES = MEMORY_LIMITS + 8 * SMALL_ENDS
HELPER_BYTES = 160                  # at most, of the helper stub below the return address
MAX_SLOTS = 1 << 15                 # of a frame: each step makes masks of that many bits
MAX_MASK_BITS = 1 << 28             # of a liveness mask for each block
MAX_PASSES = 64                     # over the blocks, to find liveness; loops in loops take more than others
MAX_CLAUSES = 100                   # around a call
FIRST_HANDLE, SWEEP = 0x7265660000000001, 1000     # numbers of references that no other value resembles
SITES = 1 << 24                     # numbers of helper calls that are no function's index
TRAP_TEXTS = ("", "unreachable", "integer divide by zero", "integer overflow", "out of bounds memory access",
              "call stack exhausted", "")
STACK_EXHAUSTED, PENDING = 5, 6


def is_float(type):
    """Whether a value of this type has a register for floats and vectors."""
    return type in KINDS


KINDS = {F32: 1, F64: 1, V128: 2}   # of registers; integers and references: 0


def variable(slot, type):
    """The number of a slot as a variable: four times the slot, and the kind."""
    return slot << 2 | KINDS.get(type, 0)


def bits_of(mask):
    """The numbers of the bits that are set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def raw(type, value):
    """A number of the interpreter as the 64 bits that native code has."""
    if type == F64:
        return f64_bits(value)
    return f32_bits(value) if type == F32 else int(value)


def packed_value(type, value):
    """A number or vector as 4, 8 or 16 bytes."""
    return value if type == V128 else raw(type, value).to_bytes(4 if type in (I32, F32) else 8, "little")


def cooked(type, bits):
    """The converse of raw()."""
    if type == F64:
        return f64_from_bits(bits)
    return f32_from_bits(bits & MAX_U32) if type == F32 else bits


# What a step reads, as [(slot, type)], and writes, as (slot, type) or None; by its handler.
# Steps of regular instructions say it by their row of the table.
EFFECTS = {
    do_count: lambda d, a, b: ((), None),
    do_unreachable: lambda d, a, b: ((), None),
    do_move: lambda d, a, b: (((a, b),), (d, b)),
    do_select: lambda d, a, b: (((a, b[2]), (b[0], b[2]), (b[1], I32)), (d, b[2])),
    do_shuffle: lambda d, a, b: (((a, V128), (b[0], V128)), (d, V128)),
    do_global_get: lambda d, a, b: ((), (d, a.type.value)),
    do_global_set: lambda d, a, b: (((b, a.type.value),), None),
    do_ref_is_null: lambda d, a, b: (((a, FUNCREF),), (d, I32)),
    do_ref_func: lambda d, a, b: ((), (d, FUNCREF)),
    do_table_callee: lambda d, a, b: (((b, a[0].address),), (d, CALLEE)),
    do_table_get: lambda d, a, b: (((b, a.address),), (d, a.element)),
    do_table_set: lambda d, a, b: (((b[0], a.address), (b[1], a.element)), None),
    do_table_size: lambda d, a, b: ((), (d, a.address)),
    do_table_grow: lambda d, a, b: (((b[0], a.element), (b[1], a.address)), (d, a.address)),
    do_table_fill: lambda d, a, b: (((b[0], a.address), (b[1], a.element), (b[2], a.address)), None),
    do_table_copy: lambda d, a, b: (three(b, a[0].address, a[1].address), None),
    do_table_init: lambda d, a, b: (three(b, a[0].address, I32), None),
    do_drop_segment: lambda d, a, b: ((), None),
    do_memory_size: lambda d, a, b: ((), (d, a.address)),
    do_memory_grow: lambda d, a, b: (((b, a.address),), (d, a.address)),
    do_memory_fill: lambda d, a, b: (((b[0], a.address), (b[1], I32), (b[2], a.address)), None),
    do_memory_copy: lambda d, a, b: (three(b, a[0].address, a[1].address), None),
    do_memory_init: lambda d, a, b: (three(b, a[0].address, I32), None),
}
CALLEE = (FUNC, None)               # the type of what do_table_callee finds


def clauses_of(block):
    """The catch clauses for what the end of a block throws, the nearest first."""
    clauses, handlers = [], block[4][2] if block[1] in (CALL, CALL_REF, THROW) else None
    while handlers is not None:
        nearest, handlers = handlers
        clauses += nearest
        if len(clauses) > MAX_CLAUSES:
            raise Unsupported("%d handlers" % len(clauses))
    return clauses


def past(block):
    """The block that an empty one leads to: the other arm of an if without else. No loop is empty, as its
    head counts."""
    while not block[0] and block[1] == BR:
        block = block[2]
    return block


def three(slots, to, source):
    """The operands of a copy."""
    return (slots[0], to), (slots[1], source), (slots[2], smaller(to, source))


class Compiler:
    """Compiles one function: `compile()` appends to its assembler."""

    def __init__(self, context, function, local_types):
        self.context, self.function = context, function
        self.asm = asm = context.machine.assembler()
        self.type = function.type
        self.memory = next(iter(function.instance.memories), None)
        self.constants = function.template[::-1]    # of slot -1 - index
        self.arity = len(self.type.params)
        self.local_types = local_types
        self.base_slot = len(local_types)           # the first that is not a local's: what is there is read once
        self.sites = bytearray()        # pairs (return address in the code, offset in the body), packed
        self.trap_labels = {}           # text -> label of what traps with it
        self.traps = []                 # (label, text, at): one place for each access, behind the code
        self.cold = []                  # (label, label to come back to, step, reads, write, number of the block) …
        self.loops = []                 # (head, offset in the code, mask of what is alive there, types of its operands)
        self.known_clauses = {}         # id of a catch clause -> what clause() says of it
        self.clauses = {}               # return address in the code -> [what clause() says]
        self.landings = {}              # number of a block -> offset in the code
        self.scratch = asm.SCRATCH
        self.pending = None             # the condition of a comparison that is in the flags
        self.pool = {}                  # bytes -> label of a constant behind the code

    # -- blocks: order, loops, effects, liveness --

    def compile(self):
        """Returns the code's bytes, which may be placed anywhere."""
        self.order_blocks()
        self.find_effects()
        self.find_liveness()
        self.allocate()
        self.emit()
        return self.asm.code

    def order_blocks(self):
        """Reverse postorder; what a branch falls through to comes last of its successors, and
        so first after it."""
        self.blocks = order = postorder(self.function.entry, self.targets)[::-1]
        self.number = {id(block): index for index, block in enumerate(order)}
        self.successors = [[self.number[id(t)] for t in self.successors_of(block)] for block in order]
        ends = {}                       # loop's head -> its last block
        for index, successors in enumerate(self.successors):
            for target in successors:
                if target <= index:
                    ends[target] = index
        depth = [0] * (len(order) + 1)
        for head, last in ends.items():
            depth[head] += 1
            depth[last + 1] -= 1
        total, self.weights = 0, []
        for change in depth[:-1]:
            total += change
            self.weights.append(8 ** min(total, 7))

    @staticmethod
    def successors_of(block):
        """The blocks that a block leads to, the one to follow it last."""
        _, kind, x, y, z = block
        if kind == BR:
            return (past(x),)
        if kind == BR_IF:
            return past(x), past(z)
        if kind in (CALL, CALL_REF):
            return (past(z[0]),)
        if kind == BR_TABLE:
            return tuple({id(b): b for b in map(past, x)}.values())[::-1]
        return ()

    @classmethod
    def targets(cls, block):
        """Those, and before them the ones where exceptions lead to."""
        return (*[past(target) for _, _, target, _ in clauses_of(block)], *cls.successors_of(block))

    def find_effects(self):
        """What the steps of each block are to be compiled by; which variables a block uses and
        defines, as bit masks; and how heavy each variable's uses and definitions are."""
        function, kinds = self.function, KINDS
        slots = len(function.type.params) + len(function.template)
        count = 4 * slots
        if slots > MAX_SLOTS or count * len(self.blocks) > MAX_MASK_BITS:
            raise Unsupported("%d blocks with %d slots" % (len(self.blocks), slots))
        self.weight, self.defined = weight, defined = [0] * count, [0] * count
        self.steps, self.ends, self.uses, self.defines = [], [], [], []
        self.catches = []                               # of each block: see clause()
        self.calls, self.interruptions = [0], [0]       # sums of the weights of calls at blocks' ends, and within blocks
        self.out_bytes = 16                             # for the arguments and results of calls
        for index, block in enumerate(self.blocks):
            unit, use, define, interruptions, steps = self.weights[index], 0, 0, 0, []
            for step in block[0]:
                handler, d, a, b, _ = step
                effects = EFFECTS.get(handler)
                if effects is not None:
                    reads, write = effects(d, a, b)
                    emitter = STEP_EMITTERS.get(handler, Compiler.rare)
                else:
                    emitter, reads, write = self.regular_effects(handler, d, a, b)
                for slot, type in reads:
                    if slot >= 0:
                        key = slot << 2 | kinds.get(type, 0)
                        weight[key] += unit
                        if not define >> key & 1:
                            use |= 1 << key
                if write:
                    key = write[0] << 2 | kinds.get(write[1], 0)
                    weight[key] += unit
                    defined[key] += unit
                    define |= 1 << key
                if emitter is Compiler.rare:
                    interruptions += unit
                steps.append((emitter, step, reads, write))
            reads, writes = self.end_effects(block, steps)
            for slot, type in reads:
                if slot >= 0:
                    key = slot << 2 | kinds.get(type, 0)
                    weight[key] += unit
                    if not define >> key & 1:
                        use |= 1 << key
            written = 0
            for slot, type in writes:
                key = slot << 2 | kinds.get(type, 0)
                weight[key] += unit
                defined[key] += unit
                written |= 1 << key
            self.catches.append([self.clause(clause) for clause in clauses_of(block)])
            self.steps.append(steps)
            self.ends.append(written)
            self.uses.append(use)
            self.defines.append(define)
            self.calls.append(self.calls[-1] + (unit if block[1] in (CALL, CALL_REF) else 0))
            self.interruptions.append(self.interruptions[-1] + interruptions)

    def regular_effects(self, handler, d, a, b):
        """(emitter, reads, write) of a step whose handler comes from a row of the table."""
        op = getattr(handler, "op", None)
        emitter = op and EMITTERS.get(op.name)
        if emitter is None:
            if not op or 0xFD not in (op.opcode >> 8, op.opcode >> 12):         # of one byte or, if relaxed, of two
                raise Unsupported(op.name if op else handler.__name__)
            emitter = Compiler.vector if op.name in self.asm.VECTORS else Compiler.rare
        params, shape = op.params, op.shape
        if shape == IRREGULAR:
            return self.irregular_effects(emitter, op, handler, d, a, b)
        if shape == BINARY:
            return emitter, ((a, params[0]), (b, params[1])), (d, op.results[0])
        if shape == UNARY:
            return emitter, ((a, params[0]),), (d, op.results[0])
        if handler.memory is not self.memory or self.memory.address != I32:
            raise Unsupported("another memory")
        if shape == LOAD:
            return emitter, ((a, I32),), (d, op.results[0])
        return emitter, ((a, I32), (b, params[1])), None

    def irregular_effects(self, emitter, op, handler, d, a, b):
        """The same of what has three operands, or a lane."""
        params, write = op.params, (d, op.results[0]) if op.results else None
        if "memarg" in op.immediates:
            if handler.memory is not self.memory or self.memory.address != I32:
                raise Unsupported("another memory")
            return emitter, ((a, I32), (b[1], params[1])), write
        if "lane" not in op.immediates:
            return emitter, tuple(zip((a, *b), params)), write
        return emitter, tuple(zip((a, b[0]) if len(params) == 2 else (a,), params)), write

    def end_effects(self, block, steps):
        """([(slot, type)] read, [(slot, type)] written) by a block's end."""
        _, kind, x, y, z = block
        if kind in (BR_IF, BR_TABLE):
            return ((y, I32),), ()
        if kind == RETURN:
            return tuple(zip(y, self.type.results)), ()
        if kind in (CALL, CALL_REF):
            type = z[4]
            reads = tuple(zip(y, type.params))
            self.out_bytes = max(self.out_bytes, self.context.layout(type).size, TAIL_CALL_BYTES)
            if kind == CALL_REF:
                reads += self.check_callee(x, steps)
            return reads, tuple([(z[1] + index, result) for index, result in enumerate(type.results)])
        if kind == TAIL_CALL:
            type = z[4]
            self.check_tail_call(type)
            if x < 0 and id(self.constants[-1 - x]) not in self.context.indices:
                raise Unsupported("return_call_ref")
            return tuple(zip(y, type.params)) + (self.check_callee(x, steps) if x >= 0 else ()), ()
        if kind == THROW:
            return tuple(zip(y, x.type.params if x else (EXNREF,))), ()
        return (), ()

    def clause(self, clause):
        """A catch clause as (tag, whether it wants the exnref, the number of its block, [(variable, type)]
        of the values there, the mask of these variables): one for all the calls that it is around."""
        known = self.known_clauses.get(id(clause))
        if known is None:
            tag, wants_reference, block, d = clause
            types = (tag.type.params if tag else ()) + (EXNREF,) * wants_reference
            values = [(variable(slot, type), type) for slot, type in enumerate(types, d)]
            mask = 0
            for key, _ in values:
                mask |= 1 << key
            known = self.known_clauses[id(clause)] = tag, wants_reference, self.number[id(past(block))], values, mask
        return known

    @staticmethod
    def check_callee(slot, steps):
        """The operand of a call whose callee lies in a slot: just found in a table."""
        if not steps or steps[-1][1][0] is not do_table_callee or steps[-1][1][1] != slot:
            raise Unsupported("call_ref")
        return ((slot, CALLEE),)

    def check_tail_call(self, type):
        """A tail call puts its arguments where this function's are, and leaves results to it."""
        own, other = self.context.layout(self.type), self.context.layout(type)
        if other.size > max(own.size, TAIL_CALL_BYTES) or len(type.results) > 1 and own.results != other.results:
            raise Unsupported("tail call with more arguments")
        self.out_bytes = max(self.out_bytes, other.size)

    def find_liveness(self):
        """Which variables are alive where each block starts and ends."""
        count, successors = len(self.blocks), self.successors
        defines = [define | written for define, written in zip(self.defines, self.ends)]
        self.live_in, self.live_out = live_in, live_out = list(self.uses), [0] * count
        self.landing = landing = [0] * count            # what is alive where an exception of the block's end lands
        changed, passes = True, 0
        while changed:
            changed, passes = False, passes + 1
            if passes > MAX_PASSES:
                raise Unsupported("%d entangled blocks" % count)
            for index in range(count - 1, -1, -1):
                out = 0
                for target in successors[index]:
                    out |= live_in[target]
                now = self.uses[index] | out & ~defines[index]
                if self.catches[index]:
                    landing[index] = caught = self.find_landing(index)
                    now |= caught & ~self.defines[index]
                live_out[index] = out
                if now != live_in[index]:
                    live_in[index] = now
                    changed = True
        # What a call writes is there from the next block on.
        self.touched = [i | o & ~written | d | l
                        for i, o, written, d, l in zip(live_in, live_out, self.ends, self.defines, landing)]

    def find_landing(self, index):
        """The variables that are alive where the clauses of a block lead, but for their own values."""
        alive = 0
        for _, _, target, _, values in self.catches[index]:
            alive |= self.live_in[target] & ~values
        return alive

    def find_intervals(self):
        """{variable: [first block, last block where it is alive]}"""
        intervals, seen = {}, 0
        for index, mask in enumerate(self.touched):
            new = mask & ~seen
            seen |= new
            for key in bits_of(new):
                intervals[key] = [index, index]
        for index in range(len(self.touched) - 1, -1, -1):
            new = self.touched[index] & seen
            seen ^= new
            for key in bits_of(new):
                intervals[key][1] = index
        return intervals

    def allocate(self):
        """Registers for variables, the heaviest first; homes for all."""
        asm, weight, defined = self.asm, self.weight, self.defined
        intervals, calls, interruptions = self.find_intervals(), self.calls, self.interruptions
        self.place = {}                 # variable -> register
        landing = 0
        for mask in self.landing:
            landing |= mask
        taken = ({}, {})                # register -> the blocks where it is
        self.placed, self.volatile, self.through = 0, 0, set()
        for key in sorted(intervals, key=weight.__getitem__, reverse=True):
            first, last = intervals[key]
            crossed = calls[last] - calls[first] + interruptions[last + 1] - interruptions[first]
            life, heavy, stores = (2 << last) - (1 << first), weight[key], min(crossed, defined[key])
            registers = taken[key & 3 != 0]
            saved, unsaved = (asm.FLOAT_CALLEE_SAVED, asm.FLOAT_CALLER_SAVED) if key & 3 else (
                asm.CALLEE_SAVED, asm.CALLER_SAVED)
            if key & 3 == 2:
                saved = ()              # of vector registers only half is saved
            choices = unsaved + saved if not crossed else saved + unsaved if heavy > crossed + stores else saved
            for register in choices:
                blocks = registers.get(register, 0)
                if blocks & life or not blocks and heavy <= 2 and register in saved:
                    continue            # taken, or saving it costs as much
                registers[register] = blocks | life
                self.place[key] = register
                self.placed |= 1 << key
                if register in unsaved:
                    self.volatile |= 1 << key
                # A variable that is defined less often than calls interrupt it goes to its home
                # at each definition, and need not be stored at the calls.
                if (register in unsaved or landing >> key & 1) and defined[key] <= crossed:
                    self.through.add(key)
                break
        # Who catches an exception must restore what the functions that it went through had saved.
        catches = any(self.catches)
        self.saved = [r for r in asm.CALLEE_SAVED if catches or r in taken[0]]
        self.float_saved = [r for r in asm.FLOAT_CALLEE_SAVED if catches or r in taken[1]]
        self.assign_homes(intervals)

    def assign_homes(self, variables):
        """The frame's layout."""
        asm, offset = self.asm, self.out_bytes
        offsets = self.context.layout(self.type).params
        params = {variable(slot, type): offsets[slot] for slot, type in enumerate(self.type.params)}
        self.homes = {}
        for key in sorted(variables):
            if key not in params:
                if key & 3 == 2:
                    offset = offset + 15 & -16
                self.homes[key] = offset
                offset += 16 if key & 3 == 2 else 8
        self.saved_offset = offset
        self.frame = (offset + 8 * (len(self.saved) + len(self.float_saved)) + asm.FRAME_EXTRA + 15) & -16
        for key, offset in params.items():
            self.homes[key] = self.frame + asm.RETURN_BYTES + offset
            if not self.defined[key]:
                self.through.add(key)

    # -- operands --

    def use(self, slot, scratch):
        """The register of an integer operand, one of the scratch registers if need be."""
        if slot < 0:
            register = self.scratch[scratch]
            self.asm.immediate(register, self.constant(slot))
            return register
        register = self.place.get(slot << 2)
        if register is None:
            register = self.scratch[scratch]
            self.asm.load(register, self.asm.FRAME, self.homes[slot << 2])
        return register

    def constant(self, slot):
        """An integer constant; a null reference is 0."""
        value = self.constants[-1 - slot]
        return int(value or 0)

    def use_float(self, slot, type, scratch):
        """The register of a float or vector operand."""
        asm, register = self.asm, self.asm.FLOAT_SCRATCH[scratch]
        if slot < 0:
            self.load_constant(register, packed_value(type, self.constants[-1 - slot]))
            return register
        key = variable(slot, type)
        place = self.place.get(key)
        if place is not None:
            return place
        (asm.vector_load if type == V128 else asm.float_load)(register, asm.FRAME, self.homes[key])
        return register

    def load_constant(self, register, data):
        """A register := 4, 8 or 16 bytes."""
        if not any(data):
            self.asm.float_zero(register)
        else:
            self.asm.float_constant(register, self.pooled(data), len(data))

    def pooled(self, data):
        """The label of a constant that will lie behind the code."""
        label = self.pool.get(data)
        if label is None:
            label = self.pool[data] = self.asm.label()
        return label

    def target(self, slot):
        """The register for an integer result, to be followed by put()."""
        return self.place.get(slot << 2, self.scratch[0])

    def put(self, slot, register):
        """An integer result is in the register that target() gave."""
        key = slot << 2
        if key not in self.place or key in self.through:
            self.asm.store(register, self.asm.FRAME, self.homes[key])

    def float_target(self, slot, type):
        return self.place.get(variable(slot, type), self.asm.FLOAT_SCRATCH[0])

    def put_float(self, slot, type, register):
        key = variable(slot, type)
        if key not in self.place or key in self.through:
            self.store_home(key, register)

    # The same for operands and results of any type.

    def use_any(self, slot, type, scratch):
        return self.use_float(slot, type, scratch) if is_float(type) else self.use(slot, scratch)

    def target_any(self, slot, type):
        return self.float_target(slot, type) if is_float(type) else self.target(slot)

    def put_any(self, slot, type, register):
        self.put_float(slot, type, register) if is_float(type) else self.put(slot, register)

    def store_home(self, key, register):
        asm = self.asm
        (asm.store, asm.float_store, asm.vector_store)[key & 3](register, asm.FRAME, self.homes[key])

    def spill(self, mask):
        """Stores variables that are in registers to their homes, unless they are there."""
        for key in bits_of(mask & self.placed):
            if key not in self.through:
                self.store_home(key, self.place[key])

    def reload(self, mask):
        """Loads variables that have registers from their homes."""
        asm = self.asm
        loads = asm.load, asm.float_load, asm.vector_load
        for key in bits_of(mask & self.placed):
            loads[key & 3](self.place[key], asm.FRAME, self.homes[key])

    # -- code --

    def emit(self):
        asm = self.asm
        self.block_labels = [asm.label() for _ in self.blocks]
        self.exhausted = asm.label()
        self.at = 0
        self.prologue()
        self.enter_arguments()
        for index, (block, steps) in enumerate(zip(self.blocks, self.steps)):
            asm.bind(self.block_labels[index])
            self.index, self.pending = index, None
            for self.position, (emitter, step, reads, write) in enumerate(steps):
                self.at = step[4]
                emitter(self, step, reads, write)
            TERMINATORS[block[1]](self, block)
        self.emit_cold()
        self.emit_loop_entries()
        self.emit_landings()
        self.emit_traps()
        for data, label in self.pool.items():
            asm.code += bytes(-len(asm.code) % 16)
            asm.bind(label)
            asm.code += data
        asm.finish()

    def is_read_next(self, slot):
        """Whether the condition in `slot` is read by the next step or the block's end, which
        can take it from the flags, and by nothing else."""
        block, steps = self.blocks[self.index], self.steps[self.index]
        if slot < self.base_slot:
            return False
        if self.position + 1 == len(steps):
            return block[1] == BR_IF and block[3] == slot
        handler, _, a, b, _ = steps[self.position + 1][1]
        if handler is do_select:
            return b[1] == slot and a != slot and b[0] != slot
        op = getattr(handler, "op", None)
        return op is not None and op.name == "i32.eqz" and a == slot

    def prologue(self):
        asm = self.asm
        asm.enter(self.frame, STACK_LIMIT, self.exhausted)
        offset = self.saved_offset
        for register in self.saved:
            asm.store(register, asm.FRAME, offset)
            offset += 8
        for register in self.float_saved:
            asm.float_store(register, asm.FRAME, offset)
            offset += 8

    def epilogue(self):
        asm, offset = self.asm, self.saved_offset
        for register in self.saved:
            asm.load(register, asm.FRAME, offset)
            offset += 8
        for register in self.float_saved:
            asm.float_load(register, asm.FRAME, offset)
            offset += 8
        asm.leave(self.frame)           # the caller of this returns or jumps

    def enter_arguments(self):
        """Loads the parameters that have registers, and zeroes the locals that are read first."""
        asm, alive = self.asm, self.live_in[0]
        params = sum(1 << variable(slot, type) for slot, type in enumerate(self.type.params))
        self.reload(alive & params)
        for key in bits_of(alive & ~params):
            if key & 3:
                register = self.place.get(key, asm.FLOAT_SCRATCH[0])
                asm.float_zero(register)
                if key not in self.place or key in self.through:
                    self.store_home(key, register)
            else:
                register = self.target(key >> 2)
                asm.immediate(register, 0)
                self.put(key >> 2, register)

    def emit_cold(self):
        """Calls of the interpreter's handlers where the fast way did not do."""
        for label, back, step, reads, write, index in self.cold:
            self.asm.bind(label)
            self.at, self.index = step[4], index
            self.rare(step, reads, write)
            self.asm.jump(back)

    def emit_loop_entries(self):
        """The entries at loops' heads: a frame whose homes were filled from outside."""
        for index, block in enumerate(self.blocks):
            step = block[0][0] if block[0] else None
            if step and step[0] is do_count and step[1]:
                alive, (head, types) = self.live_in[index], step[1]
                self.loops.append((head, len(self.asm.code), alive, types))
                self.prologue()
                self.reload(alive)
                self.asm.jump(self.block_labels[index])

    def emit_landings(self):
        """Where exceptions land: the values are in their homes."""
        for number in sorted({target for clauses in self.catches for _, _, target, _, _ in clauses}):
            self.landings[number] = len(self.asm.code)
            self.reload(self.live_in[number])
            self.asm.jump(self.block_labels[number])

    def emit_traps(self):
        asm = self.asm
        for label, text, at in self.traps:
            asm.bind(label)
            target = self.trap_labels.get(text)
            if target is None:
                target = self.trap_labels[text] = asm.label()
            asm.call_label(target)
            self.note_site(at)
        for text, label in self.trap_labels.items():
            asm.bind(label)
            asm.immediate(asm.SCRATCH[0], TRAP_TEXTS.index(text))
            asm.jump_context(TRAP)
        asm.bind(self.exhausted)
        asm.immediate(asm.SCRATCH[0], STACK_EXHAUSTED)
        asm.jump_context(TRAP)

    def note_site(self, at):
        """What precedes is a call, made by the instruction at this offset."""
        self.sites += pack_site(len(self.asm.code), at)

    def note_clauses(self):
        """What precedes is a call; notes where the exceptions that come out of it land."""
        if self.catches[self.index]:
            self.clauses[len(self.asm.code)] = self.catches[self.index]

    def trap(self, condition, text):
        """Traps if the condition holds."""
        label = self.asm.label()
        self.traps.append((label, text, self.at))
        self.asm.jump_if(condition, label)

    # -- steps --

    def rare(self, step, reads, write):
        """Calls the interpreter's handler of this step, between other steps."""
        alive = self.touched[self.index] & self.volatile
        self.call_helper(step, reads, write, alive)
        self.reload(alive | (1 << variable(*write) if write else 0))

    def call_helper(self, step, reads, write, alive):
        """Calls back with a step whose operands are in their homes, as is what else is alive."""
        asm, operands = self.asm, 0
        for slot, type in reads:
            if slot >= 0:
                operands |= 1 << variable(slot, type)
        self.spill(operands | alive)
        places = [(slot, self.homes[variable(slot, type)], type) for slot, type in reads if slot >= 0]
        constants = {slot: self.constants[-1 - slot] for slot, _ in reads if slot < 0}
        result = write and (write[0], self.homes[variable(*write)], write[1])
        asm.immediate(self.scratch[0], self.context.add_site(step, places, constants, result))
        asm.call_context(HELPER)
        self.note_site(self.at)

    def slow_path(self, step, reads, write):
        """A label to jump to where the interpreter's handler must decide, and the one where it
        comes back with the result."""
        label, back = self.asm.label(), self.asm.label()
        self.cold.append((label, back, step, reads, write, self.index))
        return label, back

    def count(self, step, reads, write):
        """Nothing is counted any more. Where signals must be heard, calls and loops look for one."""
        if self.context.machine.signals:
            asm, (slow, back) = self.asm, self.slow_path((do_nothing, None, 0, 0, self.at), (), None)
            asm.load(self.scratch[0], asm.CONTEXT, SIGNALS)
            asm.load(self.scratch[0], self.scratch[0], 0)
            asm.compare_immediate(1, self.scratch[0], 0)
            asm.jump_if(asm.CONDITIONS["ne"], slow)
            asm.bind(back)

    def unreachable(self, step, reads, write):
        asm = self.asm
        label = asm.label()
        self.traps.append((label, "unreachable", self.at))
        asm.jump(label)

    def move(self, step, reads, write):
        _, d, a, type, _ = step
        asm = self.asm
        if is_float(type):
            register = self.use_float(a, type, 0)
            place = self.place.get(variable(d, type))
            if place is not None:
                asm.float_move(place, register)
                register = place
            self.put_float(d, type, register)
        else:
            place = self.place.get(d << 2)
            if a < 0 and place is not None:
                asm.immediate(place, self.constant(a))
                register = place
            else:
                register = self.use(a, 0)
                if place is not None:
                    asm.move(place, register)
                    register = place
            self.put(d, register)

    def select(self, step, reads, write):
        _, d, a, (b, condition_slot, type), _ = step
        asm = self.asm
        if is_float(type):
            first, second = self.use_float(a, type, 0), self.use_float(b, type, 1)
            condition = self.condition(condition_slot)
            register = self.float_target(d, type)
            asm.float_select(condition, register, first, second)
            self.put_float(d, type, register)
        else:
            first, second = self.use(a, 0), self.use(b, 1)
            condition = self.condition(condition_slot)
            register = self.target(d)
            asm.select(condition, register, first, second)
            self.put(d, register)

    def condition(self, slot):
        """The condition of a branch or a select: in the flags already, or an i32 to test."""
        if self.pending is not None:
            condition, self.pending = self.pending, None
            return condition
        asm = self.asm
        register = self.use(slot, 2)
        asm.compare_immediate(0, register, 0)
        return asm.CONDITIONS["ne"]

    def conclude(self, condition, d):
        """A comparison was made: leaves its result in the flags for what follows, or as an i32."""
        if self.is_read_next(d):
            self.pending = condition
        else:
            register = self.target(d)
            self.asm.set_if(condition, register)
            self.put(d, register)

    def eqz(self, step, reads, write, wide):
        _, d, a, _, _ = step
        asm = self.asm
        if self.pending is not None:
            condition, self.pending = self.pending ^ 1, None
        else:
            asm.compare_immediate(wide, self.use(a, 0), 0)
            condition = asm.CONDITIONS["eq"]
        self.conclude(condition, d)

    def compare(self, step, reads, write, wide, relation):
        _, d, a, b, _ = step
        asm = self.asm
        if a < 0 and b >= 0:
            a, b, relation = b, a, SWAPPED[relation]
        first = self.use(a, 0)
        if b >= 0 or not asm.compare_immediate(wide, first, self.constant(b)):
            asm.compare(wide, first, self.use(b, 1))
        self.conclude(asm.CONDITIONS[relation], d)

    def float_compare(self, step, reads, write, type, relation):
        _, d, a, b, _ = step
        condition, swapped = self.asm.FLOAT_CONDITIONS[relation]
        if swapped:
            a, b = b, a
        self.asm.float_compare(type == F64, self.use_float(a, type, 0), self.use_float(b, type, 1))
        self.conclude(condition, d)

    def alu(self, step, reads, write, wide, op):
        _, d, a, b, _ = step
        asm = self.asm
        if a < 0 and op != "sub":
            a, b = b, a
        register = self.target(d)
        first = self.use(a, 0)
        if b >= 0 or not asm.alu_immediate(op, wide, register, first, self.constant(b)):
            asm.alu(op, wide, register, first, self.use(b, 1))
        self.put(d, register)

    def multiply(self, step, reads, write, wide):
        _, d, a, b, _ = step
        asm = self.asm
        if a < 0:
            a, b = b, a
        register = self.target(d)
        first = self.use(a, 0)
        factor = self.constant(b) if b < 0 else 0
        if factor and not factor & factor - 1:
            asm.shift_immediate("shl", wide, register, first, factor.bit_length() - 1)
        elif b >= 0 or not asm.multiply_immediate(wide, register, first, factor):
            asm.multiply(wide, register, first, self.use(b, 1))
        self.put(d, register)

    def divide(self, step, reads, write, wide, op):
        _, d, a, b, _ = step
        divisor = self.constant(b) if b < 0 else None
        register = self.target(d)
        first = self.use(a, 0)
        self.asm.divide(op, wide, register, first, self.use(b, 1), self.trap, divisor in (None, 0),
                        divisor in (None, MAX_U64 if wide else MAX_U32))
        self.put(d, register)

    def shift(self, step, reads, write, wide, op):
        _, d, a, b, _ = step
        asm = self.asm
        register = self.target(d)
        first = self.use(a, 0)
        if b < 0:
            asm.shift_immediate(op, wide, register, first, self.constant(b) & (63 if wide else 31))
        else:
            asm.shift(op, wide, register, first, self.use(b, 1))
        self.put(d, register)

    def unary(self, step, reads, write, wide, op):
        """clz, ctz and popcnt"""
        _, d, a, _, _ = step
        register = self.target(d)
        getattr(self.asm, op)(wide, register, self.use(a, 0))
        self.put(d, register)

    def extend(self, step, reads, write, wide, bits):
        _, d, a, _, _ = step
        register = self.target(d)
        self.asm.extend(bits, wide, register, self.use(a, 0))
        self.put(d, register)

    def wrap(self, step, reads, write):
        """i32.wrap_i64 and i64.extend_i32_u"""
        _, d, a, _, _ = step
        register = self.target(d)
        self.asm.wrap(register, self.use(a, 0))
        self.put(d, register)

    def float_binary(self, step, reads, write, type, method, op):
        """By the assembler's float_alu or minimum."""
        _, d, a, b, _ = step
        first, second = self.use_float(a, type, 0), self.use_float(b, type, 1)
        register = self.float_target(d, type)
        getattr(self.asm, method)(op, type == F64, register, first, second)
        self.put_float(d, type, register)

    def float_unary(self, step, reads, write, source, method, *arguments):
        """By the assembler's sqrt, round, promote or demote."""
        _, d, a, _, _ = step
        register = self.float_target(d, F64)
        getattr(self.asm, method)(*arguments, register, self.use_float(a, source, 0))
        self.put_float(d, F64, register)

    def sign(self, step, reads, write, type, op):
        _, d, a, b, _ = step
        first = self.use_float(a, type, 0)
        second = self.use_float(b, type, 1) if op == "copysign" else None
        register = self.float_target(d, type)
        self.asm.sign(op, type == F64, register, first, second)
        self.put_float(d, type, register)

    def from_integer(self, step, reads, write, type, source, is_signed):
        register = self.float_target(step[1], F64)
        self.asm.from_integer(type == F64, register, self.use(step[2], 0), source == I64, is_signed)
        self.put_float(step[1], F64, register)

    def to_integer(self, step, reads, write, type, source, is_signed):
        register = self.target(step[1])
        failed, back = self.slow_path(step, reads, write)
        self.asm.to_integer(type == I64, register, self.use_float(step[2], source, 0), source == F64, is_signed, failed)
        self.put(step[1], register)
        self.asm.bind(back)

    def to_bits(self, step, reads, write, type):
        register = self.target(step[1])
        self.asm.to_bits(type == F64, register, self.use_float(step[2], type, 0))
        self.put(step[1], register)

    def from_bits(self, step, reads, write, type):
        register = self.float_target(step[1], F64)
        self.asm.from_bits(type == F64, register, self.use(step[2], 0))
        self.put_float(step[1], F64, register)

    def vector(self, step, reads, write):
        """An instruction on vectors, as the assembler's table has it."""
        handler, d, a, b, _ = step
        asm = self.asm
        name = handler.op.name
        method, *extras = asm.VECTORS[name]
        if method == "vector_shift" and b < 0:
            method, operands = "vector_shift_immediate", [self.use_float(a, V128, 0), self.constant(b)]
        else:
            operands = [self.use_any(slot, type, place) for place, (slot, type) in enumerate(reads)]
        if "lane" in handler.op.immediates:
            operands.append((b if len(reads) == 1 else b[1]) // handler.op.width)
        elif method in asm.POOLED:
            operands.append(self.pooled)
        target = self.target_any(d, write[1])
        getattr(asm, method)(target, *operands, *extras)
        self.put_any(d, write[1], target)

    def shuffle(self, step, reads, write):
        _, d, a, (b, indices), _ = step
        if "i8x16.shuffle" not in self.asm.VECTORS:
            return self.rare(step, reads, write)
        first, second = self.use_float(a, V128, 0), self.use_float(b, V128, 1)
        target = self.float_target(d, V128)
        self.asm.vector_shuffle(target, first, second, indices, self.pooled)
        self.put_float(d, V128, target)

    def address(self, slot, offset, width):
        """Checks an access; returns (register or None, offset)."""
        asm = self.asm
        if slot < 0:
            offset += self.constant(slot)
            if offset + width <= self.context.least_bytes and offset < 1 << 31:
                return None, offset
            asm.immediate(self.scratch[1], 0)
            register = self.scratch[1]
        else:
            register = self.use(slot, 1)
        self.trap(asm.check_bounds(register, offset, width, MEMORY_BYTES, MEMORY_LIMITS), "out of bounds memory access")
        return register, offset

    def load(self, step, reads, write, name, width):
        _, d, a, offset, _ = step
        asm, method = self.asm, None
        if name not in asm.ACCESSES:
            name, then = COMPOSED[name]
            method, *extras = asm.VECTORS[then]
        register, offset = self.address(a, offset, width)
        target = self.target_any(d, write[1])
        if method:
            value = asm.FLOAT_SCRATCH[0] if name[0] == "v" else self.scratch[0]
            asm.access(name, value, register, offset)
            getattr(asm, method)(target, value, *extras)
        else:
            asm.access(name, target, register, offset)
        self.put_any(d, write[1], target)

    def load_lane(self, step, reads, write, name, width, lanes):
        _, d, a, (offset, slot, lane), _ = step
        register, offset = self.address(a, offset, width)
        value, vector, target = self.scratch[0], self.use_float(slot, V128, 0), self.float_target(d, V128)
        self.asm.access(name, value, register, offset)
        method, *extras = self.asm.VECTORS[lanes + ".replace_lane"]
        getattr(self.asm, method)(target, vector, value, lane // width, *extras)
        self.put_float(d, V128, target)

    def store_lane(self, step, reads, write, name, width, lanes):
        _, _, a, (offset, slot, lane), _ = step
        register, offset = self.address(a, offset, width)
        value = self.scratch[0]
        method, *extras = self.asm.VECTORS[lanes + (".extract_lane" if width > 2 else ".extract_lane_u")]
        getattr(self.asm, method)(value, self.use_float(slot, V128, 0), lane // width, *extras)
        self.asm.access(name, value, register, offset)

    def store(self, step, reads, write, name, width):
        _, offset, a, b, _ = step
        register, offset = self.address(a, -offset, width)
        if b < 0 and name[0] == "i" and self.asm.store_constant(name, self.constant(b), register, offset):
            return
        self.asm.access(name, self.use_any(b, reads[1][1], 0), register, offset)

    def global_get(self, step, reads, write):
        _, d, variable, _, _ = step
        offset, type = self.context.cell(variable), variable.type.value
        if offset is None:
            return self.rare(step, reads, write)
        target = self.target_any(d, type)
        (self.asm.float_load if is_float(type) else self.asm.load)(target, self.asm.CONTEXT, offset)
        self.put_any(d, type, target)

    def global_set(self, step, reads, write):
        _, _, variable, b, _ = step
        offset, type = self.context.cell(variable), variable.type.value
        if offset is None:
            return self.rare(step, reads, write)
        (self.asm.float_store if is_float(type) else self.asm.store)(self.use_any(b, type, 0), self.asm.CONTEXT, offset)

    def ref_is_null(self, step, reads, write):
        self.asm.compare_immediate(1, self.use(step[2], 0), 0)
        self.conclude(self.asm.CONDITIONS["eq"], step[1])

    def memory_size(self, step, reads, write):
        _, d, memory, _, _ = step
        if memory is not self.memory or memory.address != I32:
            return self.rare(step, reads, write)
        register = self.target(d)
        self.asm.load(register, self.asm.CONTEXT, MEMORY_BYTES)
        self.asm.shift_immediate("shr_u", 1, register, register, 16)
        self.put(d, register)

    def memory_copy(self, step, reads, write):
        _, _, (target, source), b, _ = step
        self.move_bytes(step, reads, target is source is self.memory, b, "copy_bytes")

    def memory_fill(self, step, reads, write):
        _, _, memory, b, _ = step
        self.move_bytes(step, reads, memory is self.memory, b, "fill_bytes")

    def move_bytes(self, step, reads, is_ours, slots, method):
        """What programs do all the time, where the processor has an instruction for it."""
        asm = self.asm
        if not is_ours or self.memory.address != I32 or not hasattr(asm, method):
            return self.rare(step, reads, None)
        slow, back = self.slow_path(step, reads, None)
        getattr(asm, method)(*[self.use(slot, place) for place, slot in enumerate(slots)], MEMORY_BYTES, slow)
        asm.bind(back)

    def table_callee(self, step, reads, write):
        """The index of a function, by the table's mirror of (type, index) pairs; what is not in
        it (null, another type, another instance's function) the handler decides."""
        _, d, (table, type), b, _ = step
        asm, (x, y, z) = self.asm, self.scratch
        offset = self.context.table(table)
        if offset is None or table.address != I32:
            return self.rare(step, reads, write)
        slow, back = self.slow_path(step, reads, write)
        index = self.use(b, 0)
        asm.load(z, asm.CONTEXT, offset + 8)
        asm.compare(1, index, z)
        asm.jump_if(asm.CONDITIONS["ge_u"], slow)
        asm.load(z, asm.CONTEXT, offset)
        asm.load_indexed(y, z, index)
        asm.wrap(x, y)
        asm.shift_immediate("shr_u", 1, y, y, 32)
        asm.compare_immediate(0, y, self.context.machine.type_number(type))
        asm.jump_if(asm.CONDITIONS["ne"], slow)
        place = self.place.get(d << 2)
        if place is not None:
            asm.move(place, x)
            x = place
        self.put(d, x)
        asm.bind(back)

    # -- block ends --

    def go(self, block):
        """Jumps to a block that does not come next."""
        number = self.number[id(past(block))]
        if number != self.index + 1:
            self.asm.jump(self.block_labels[number])

    def br(self, block):
        self.go(block[2])

    def br_if(self, block):
        _, _, x, y, z = block
        condition = self.condition(y)
        taken, other = self.number[id(past(x))], self.number[id(past(z))]
        if taken == self.index + 1:
            self.asm.jump_if(condition ^ 1, self.block_labels[other])
        else:
            self.asm.jump_if(condition, self.block_labels[taken])
            self.go(z)

    def br_table(self, block):
        _, _, x, y, z = block
        asm, labels = self.asm, [self.block_labels[self.number[id(past(target))]] for target in x]
        if z == 0:
            return asm.jump(labels[0])
        index, scratch = self.use(y, 0), self.scratch[0]
        asm.compare_immediate(0, index, z)
        asm.jump_if(asm.CONDITIONS["ge_u"], labels[-1])
        asm.move(scratch, index)
        asm.jump_table(scratch, labels[:-1])

    def return_(self, block):
        asm, slots, types = self.asm, block[3], self.type.results
        if len(slots) == 1:
            if is_float(types[0]):
                asm.float_move(asm.FLOAT_RESULT, self.use_float(slots[0], types[0], 0))
            elif slots[0] < 0:
                asm.immediate(asm.RESULT, self.constant(slots[0]))
            else:
                asm.move(asm.RESULT, self.use(slots[0], 0))
        else:
            above = self.frame + asm.RETURN_BYTES
            for slot, type, offset in zip(slots, types, self.context.layout(self.type).results):
                self.store_value(slot, type, above + offset)
        self.epilogue()
        asm.return_()

    def store_value(self, slot, type, offset):
        """Stores an operand in the frame."""
        asm = self.asm
        if is_float(type):
            store = asm.vector_store if type == V128 else asm.float_store
            store(self.use_float(slot, type, 0), asm.FRAME, offset)
        elif slot < 0:
            asm.store_immediate(self.constant(slot), asm.FRAME, offset)
        else:
            asm.store(self.use(slot, 0), asm.FRAME, offset)

    def call(self, block):
        _, kind, x, y, z = block
        asm, (following, d, _, at, type) = self.asm, z
        across = self.live_out[self.index] & ~self.ends[self.index] & self.volatile
        self.spill(across | self.landing[self.index])
        for slot, t, offset in zip(y, type.params, self.context.layout(type).params):
            self.store_value(slot, t, offset)
        if kind == CALL:
            number = self.context.function_index(x)
            asm.immediate(self.scratch[0], number)
            asm.call_context(self.context.functions_offset + 8 * number)
        else:
            register, scratch = self.use(x, 0), self.scratch[0]
            asm.move(scratch, register)
            asm.call_context(self.context.functions_offset, scratch)
        self.note_site(at)
        self.note_clauses()
        self.take_results(type, d)
        self.reload(across)
        self.go(following)

    def tail_call(self, block):
        """The arguments replace this function's, which may still be read until all are made."""
        _, _, x, y, z = block
        asm, context, layout = self.asm, self.context, self.context.layout(z[4])
        for slot, type, offset in zip(y, z[4].params, layout.params):
            self.store_value(slot, type, offset)
        index, scratch = self.scratch[0], self.scratch[1]
        if x < 0:
            number = context.function_index(self.constants[-1 - x])
            asm.immediate(index, number)
        else:
            asm.move(index, self.use(x, 0))
        above = self.frame + asm.RETURN_BYTES
        for offset in range(0, layout.size if y else 0, 8):
            asm.load(scratch, asm.FRAME, offset)
            asm.store(scratch, asm.FRAME, above + offset)
        self.epilogue()
        asm.jump_context(context.functions_offset, index)

    def throw(self, block):
        _, _, tag, slots, (_, _, _, self.at) = block
        step = do_throw, None, tag, slots, self.at
        self.call_helper(step, self.end_effects(block, ())[0], None, self.landing[self.index])
        self.note_clauses()

    def take_results(self, type, d):
        asm, results, offsets = self.asm, type.results, self.context.layout(type).results
        alive = self.live_out[self.index]
        for slot, (result, offset) in enumerate(zip(results, offsets), d):
            key = variable(slot, result)
            if not alive >> key & 1:
                continue
            target = self.target_any(slot, result)
            if len(results) > 1:
                (asm.load, asm.float_load, asm.vector_load)[key & 3](target, asm.FRAME, offset)
            elif is_float(result):
                asm.float_move(target, asm.FLOAT_RESULT)
            else:
                asm.move(target, asm.RESULT)
            self.put_any(slot, result, target)


SWAPPED = {"eq": "eq", "ne": "ne", "lt_s": "gt_s", "lt_u": "gt_u", "gt_s": "lt_s", "gt_u": "lt_u",
           "le_s": "ge_s", "le_u": "ge_u", "ge_s": "le_s", "ge_u": "le_u"}
pack_site = struct.Struct("<II").pack
TERMINATORS = {BR: Compiler.br, BR_IF: Compiler.br_if, BR_TABLE: Compiler.br_table, RETURN: Compiler.return_,
               CALL: Compiler.call, CALL_REF: Compiler.call, TAIL_CALL: Compiler.tail_call,
               THROW: Compiler.throw}
STEP_EMITTERS = {
    do_count: Compiler.count, do_unreachable: Compiler.unreachable, do_move: Compiler.move, do_select: Compiler.select,
    do_global_get: Compiler.global_get, do_global_set: Compiler.global_set, do_ref_is_null: Compiler.ref_is_null,
    do_memory_size: Compiler.memory_size, do_table_callee: Compiler.table_callee, do_shuffle: Compiler.shuffle,
    do_memory_copy: Compiler.memory_copy, do_memory_fill: Compiler.memory_fill}


def bind_emitter(method, *arguments):
    def emit(compiler, step, reads, write):
        method(compiler, step, reads, write, *arguments)
    return emit


COMPOSED = {                            # a load, where the processor has none that does it all -> a shorter one, what then
    "v128.load8_splat": ("i32.load8_u", "i8x16.splat"), "v128.load16_splat": ("i32.load16_u", "i16x8.splat"),
    "v128.load32_splat": ("i32.load", "i32x4.splat"), "v128.load64_splat": ("i64.load", "i64x2.splat"),
    **{"v128.load%dx%d_%s" % (8 << size, 8 >> size, sign): ("v128.load64_zero", "%s.extend_low_%s_%s" % (wide, lanes, sign))
       for size, lanes, wide in WIDENED for sign in "su"}}


def emitters():
    """{name of an instruction: what compiles it}"""
    rows = {"i32.wrap_i64": bind_emitter(Compiler.wrap), "i64.extend_i32_u": bind_emitter(Compiler.wrap),
            "i64.extend_i32_s": bind_emitter(Compiler.extend, 1, 32), "i64.extend32_s": bind_emitter(Compiler.extend, 1, 32),
            "f32.demote_f64": bind_emitter(Compiler.float_unary, F64, "demote"),
            "f64.promote_f32": bind_emitter(Compiler.float_unary, F32, "promote")}
    for name, wide in (("i32.", 0), ("i64.", 1)):
        rows[name + "eqz"] = bind_emitter(Compiler.eqz, wide)
        rows[name + "mul"] = bind_emitter(Compiler.multiply, wide)
        for op in ("add", "sub", "and", "or", "xor"):
            rows[name + op] = bind_emitter(Compiler.alu, wide, op)
        for relation in SWAPPED:
            rows[name + relation] = bind_emitter(Compiler.compare, wide, relation)
        for op in ("div_s", "div_u", "rem_s", "rem_u"):
            rows[name + op] = bind_emitter(Compiler.divide, wide, op)
        for op in ("shl", "shr_s", "shr_u", "rotl", "rotr"):
            rows[name + op] = bind_emitter(Compiler.shift, wide, op)
        for op in ("clz", "ctz", "popcnt"):
            rows[name + op] = bind_emitter(Compiler.unary, wide, op)
        for bits in (8, 16):
            rows["%sextend%d_s" % (name, bits)] = bind_emitter(Compiler.extend, wide, bits)
    for name, type, integer in (("f32", F32, "i32"), ("f64", F64, "i64")):
        for relation in ("eq", "ne", "lt", "gt", "le", "ge"):
            rows["%s.%s" % (name, relation)] = bind_emitter(Compiler.float_compare, type, relation)
        for op in ("add", "sub", "mul", "div"):
            rows["%s.%s" % (name, op)] = bind_emitter(Compiler.float_binary, type, "float_alu", op)
        for op in ("min", "max"):
            rows["%s.%s" % (name, op)] = bind_emitter(Compiler.float_binary, type, "minimum", op)
        for op in ("abs", "neg", "copysign"):
            rows["%s.%s" % (name, op)] = bind_emitter(Compiler.sign, type, op)
        for op in ("ceil", "floor", "trunc", "nearest"):
            rows["%s.%s" % (name, op)] = bind_emitter(Compiler.float_unary, type, "round", op, type == F64)
        rows[name + ".sqrt"] = bind_emitter(Compiler.float_unary, type, "sqrt", type == F64)
        rows["%s.reinterpret_%s" % (integer, name)] = bind_emitter(Compiler.to_bits, type)
        rows["%s.reinterpret_%s" % (name, integer)] = bind_emitter(Compiler.from_bits, type)
        for other, integer_type in (("i32", I32), ("i64", I64)):
            for sign in ("s", "u"):
                rows["%s.convert_%s_%s" % (name, other, sign)] = bind_emitter(Compiler.from_integer, type, integer_type, sign == "s")
                for verb in ("trunc", "trunc_sat"):
                    rows["%s.%s_%s_%s" % (other, verb, name, sign)] = bind_emitter(
                        Compiler.to_integer, integer_type, type, sign == "s")
    for width, lanes, load, store in ((1, "i8x16", "i32.load8_u", "i32.store8"), (2, "i16x8", "i32.load16_u", "i32.store16"),
                                      (4, "i32x4", "i32.load", "i32.store"), (8, "i64x2", "i64.load", "i64.store")):
        rows["v128.load%d_lane" % (8 * width)] = bind_emitter(Compiler.load_lane, load, width, lanes)
        rows["v128.store%d_lane" % (8 * width)] = bind_emitter(Compiler.store_lane, store, width, lanes)
    for row in INSTRUCTIONS:
        if row[2] == "memarg" and (row[1] in X64.ACCESSES or row[1] in COMPOSED):
            width = struct.calcsize("<" + row[4].split()[1])
            method = Compiler.store if "store" in row[1] else Compiler.load
            rows[row[1]] = bind_emitter(method, row[1], width)
    return rows


EMITTERS = emitters()


class Layout:
    """Where a call's arguments and, if there are several, its results lie on the stack, in
    bytes from the stack pointer; vectors at multiples of 16."""

    __slots__ = ("params", "results", "size")

    def __init__(self, type):
        offset, places = 0, []
        for value in type.params + (type.results if len(type.results) > 1 else ()):
            if value == V128:
                offset = offset + 15 & -16          # aarch64 scales a vector's offset by its size
            places.append(offset)
            offset += 16 if value == V128 else 8
        self.params, self.results, self.size = places[:len(type.params)], places[len(type.params):] or [0], offset + 15 & -16 or 16


def do_throw(R, d, a, b):
    """THROW as a step; a = tag, or None to throw R[b[0]] again; b = slots of its values"""
    throw(a, [R[slot] for slot in b])


def do_nothing(R, d, a, b):
    """Python's handlers of signals run before this returns."""


# -- the machine: memory for code, the guest's stack --


class Machine:
    """What all contexts of a process share. Raises Unsupported where there cannot be one."""

    def __init__(self):
        import _ctypes
        self.ctypes = _ctypes
        self.assembler = assembler_here()
        long = c_type("l")
        # The global interpreter lock is kept: no other thread may change what native code works on.
        self.function_type = type("NativeFunction", (_ctypes.CFuncPtr,), {
            "_flags_": _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_PYTHONAPI, "_restype_": long, "_argtypes_": (long,) * 3})
        self.process = os.getpid()      # in a fork of it, the code's pages are still the parent's
        self.map_code()
        self.stacks = {}                # of threads
        self.types = {}
        self.signals = self.lost = None     # see hear_signals()
        self.emit_stubs()

    def stack(self):
        """The guest's stack for the calling thread. An instance belongs to one thread at a time."""
        import _thread
        thread = _thread.get_ident()
        stack = self.stacks.get(thread)
        if stack is None:
            stack = self.stacks[thread] = GuestStack(self)
        return stack

    def map_code(self):
        """One memfd, mapped to be written and to be executed: no page is ever both."""
        import _signal
        fd = os.memfd_create("chibishim-code", os.MFD_CLOEXEC)
        try:
            old = _signal.signal(SIGXFSZ, _signal.SIG_IGN)      # a limit on the size of files is no reason to die
        except ValueError:
            old = None                  # not in the main thread, where there may be no such limit
        try:
            os.ftruncate(fd, NATIVE_CODE_BYTES)
            self.code_map = mmap.mmap(fd, NATIVE_CODE_BYTES)
            try:
                self.code_address = libc_map(fd, NATIVE_CODE_BYTES, mmap.PROT_READ | mmap.PROT_EXEC)
            except OSError:
                self.code_map.close()
                raise
        except (OSError, ValueError) as error:
            raise Unsupported("no executable memory: %s" % error) from None
        finally:
            if old is not None:
                _signal.signal(SIGXFSZ, old)
            os.close(fd)
        self.code_used, self.flush = 0, None

    def place(self, code):
        """Copies code to where it can be executed; returns its address."""
        start = self.code_used + 63 & -64
        if start + len(code) > NATIVE_CODE_BYTES:
            raise Unsupported("no room for code")
        self.code_map[start:start + len(code)] = bytes(code)
        self.code_used = start + len(code)
        if self.flush:
            self.flush(self.code_address + start, self.code_address + self.code_used, 0)
        return self.code_address + start

    def emit_stubs(self):
        asm = self.assembler()
        if asm.FEATURES:
            asm.features_stub()
            bits = self.function_type(self.place(asm.code))(0, 0, 0)
            missing = [name for bit, name in asm.FEATURES.items() if not bits >> bit & 1]
            if missing:
                raise Unsupported("the processor has no %s" % ", ".join(missing))
            asm = self.assembler()
        if asm.flush_stub:
            asm.flush_stub()
            self.flush = self.function_type(self.place(asm.code))
            asm = self.assembler()
        exit = asm.entry_stub(HOST_STACK, MEMORY_BASE, RESULTS)
        trap = len(asm.code)
        asm.trap_stub(TRAP_STACK, exit)
        helper = len(asm.code)
        asm.helper_stub(HOST_STACK, CALLBACK, TRAP, PENDING)
        asm.finish()
        start = self.place(asm.code)
        self.enter = self.function_type(start)
        self.trap_address, self.helper_address = start + trap, start + helper

    def hear_signals(self):
        """Makes code that is compiled from now on stop for signals. The C handler of Python writes
        the signal's number to the wakeup descriptor: here a file that native code has mapped. What
        a handler raises before a callback is ready for it, ctypes can only report."""
        import _signal
        fd = os.memfd_create("chibishim-signals", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        os.set_blocking(fd, False)
        self.signals = mmap.mmap(fd, mmap.PAGESIZE)
        _signal.set_wakeup_fd(fd, warn_on_full_buffer=False)

        def catch(report):
            self.lost = report.exc_value
        sys.unraisablehook = catch

    def type_number(self, type):
        """The number of a function type: equal for equal types."""
        return self.types.setdefault(type, len(self.types) + 1)


class GuestStack:
    """Where native code has its frames: below `top`, which is at `bottom` while there are none;
    `view` starts at the address `start`. Callbacks may go `host_bytes` down the host's stack
    from `host_top`, where the first of them was."""

    __slots__ = ("view", "start", "bottom", "top", "host_top", "host_bytes")

    def __init__(self, machine):
        mapping = mmap.mmap(-1, NATIVE_STACK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.view, self.start = memoryview(mapping), buffer_address(mapping)
        self.bottom = self.top = self.start + NATIVE_STACK_BYTES - 64
        self.host_top, self.host_bytes = 0, host_stack_bytes(machine.ctypes) // 2


def host_stack_bytes(_ctypes):
    """The size of this thread's stack, or less: getrlimit(2) tells the main thread's, which the
    GNU C library makes the others' too; in others there may be as few as 128 KiB."""
    import _thread
    if _thread.get_native_id() != os.getpid():
        if _thread.stack_size():
            return _thread.stack_size()
        try:
            os.confstr("CS_GNU_LIBC_VERSION")
        except (OSError, ValueError):
            return 1 << 17
    limits = type("rlimit", (_ctypes.Array,), {"_type_": c_type("l"), "_length_": 2})()
    libc.getrlimit(RLIMIT_STACK, limits)
    return min(int.from_bytes(memoryview(limits).tobytes()[:8], "little"), 1 << 23)


def libc_map(fd, size, protection):
    """mmap(2) of a file, shared; of a mapping that is not writable, the mmap module cannot give the address."""
    return libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0) & MAX_U64


def assembler_here():
    """The assembler of this processor; raises Unsupported."""
    machine = machine_here()
    if machine not in ASSEMBLERS:
        raise Unsupported("no assembler for %s" % machine)
    return ASSEMBLERS[machine]


class NativeCode:
    """A compiled function: where it is, and how to read its frames. `homes` are the offsets of its
    variables in them, where somebody may ask for one."""

    __slots__ = ("function", "context", "start", "end", "frame", "sites", "offsets", "layout", "clauses", "landings",
                 "homes", "locals")

    def __init__(self, function, context, start, compiler):
        self.function, self.context, self.start = function, context, start
        self.end, self.frame, self.sites = start + len(compiler.asm.code), compiler.frame, bytes(compiler.sites)
        self.offsets = None             # {place of a call in the code: its offset}, once somebody asked
        self.layout = context.layout(function.type)
        self.clauses, self.landings = compiler.clauses, compiler.landings
        self.homes = compiler.homes if compiler.loops or compiler.clauses else None
        self.locals = compiler.local_types

    def offset_at(self, address):
        """The offset in the function's body of the call that returns to `address`."""
        if self.offsets is None:
            self.offsets = dict(struct.iter_unpack("<II", self.sites))
        return self.offsets.get(address - self.start, 0)


def count_below(values, limit):
    """How many of ascending values are below a limit. Python's module for that may be a file, which nobody
    sees from within a container."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < limit:
            low = middle + 1
        else:
            high = middle
    return low


class Context:
    """What native code of one instance needs: see the offsets above."""

    def __init__(self, machine, instance):
        self.machine, self.instance = machine, instance
        self.functions = instance.functions + [None]        # the last is any function that was just found in a table
        self.indices = {id(function): index for index, function in enumerate(instance.functions)}
        self.tables = {id(table): CONTEXT_TABLES + 16 * index for index, table in enumerate(instance.tables)}
        cells = CONTEXT_TABLES + 16 * len(instance.tables)
        own = instance.globals[len(instance.globals) - len(instance.module.global_inits):]
        self.cells = {id(variable): cells + 8 * index for index, variable in enumerate(own)
                      if variable.type.value in NUMBER_TYPES}       # others stay objects of Python
        self.functions_offset = cells + 8 * len(own)
        size = self.functions_offset + 8 * len(self.functions)
        self.mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.mapping)
        self.address = buffer_address(self.mapping)
        self.sites = []                 # of helper calls
        self.codes, self.starts = [], []            # NativeCode, and where each starts, in ascending order
        self.returns = {}               # return address -> NativeCode
        self.mirrors = {}
        self.layouts = {}               # function type -> Layout
        self.references, self.handles = {}, {}      # number -> reference, id of a reference -> number
        self.next_handle, self.sweep_at = FIRST_HANDLE, SWEEP
        self.pending = self.stack = None
        self.depth = 0                  # of entries into native code
        self.callback = machine.function_type(self.call_back)
        for offset, value in ((HELPER, machine.helper_address), (TRAP, machine.trap_address),
                              (CALLBACK, function_address(self.callback))):
            self.write(offset, value)
        if machine.signals:
            self.write(SIGNALS, buffer_address(machine.signals))
        pointers = struct.pack("<Q", machine.helper_address) * len(self.functions)
        self.view[self.functions_offset:self.functions_offset + len(pointers)] = pointers
        for variable in own:
            if id(variable) in self.cells:
                value, offset = variable.value, self.cells[id(variable)]
                variable.__class__ = CellGlobal
                Global.value.__set__(variable, (self.view, offset))
                variable.value = value
        self.least_bytes = 0
        if instance.memories:
            memory = instance.memories[0]
            self.least_bytes = memory.pages * PAGE_BYTES
            self.write(MEMORY_BASE, buffer_address(memory.mapping))
            memory.observers.append(self.resized)
            self.resized(memory)

    def write(self, offset, value):
        pack_u64_at(self.view, offset, value)

    def resized(self, memory):
        """The memory has another size."""
        size = memory.pages * PAGE_BYTES
        self.write(MEMORY_BYTES, size)
        self.view[MEMORY_LIMITS:CONTEXT_TABLES] = struct.pack("<%dQ" % SMALL_ENDS, *[max(0, size - end + 1) for end in range(SMALL_ENDS)])

    def cell(self, variable):
        """The offset of a global's value in the context, None if it is elsewhere."""
        return self.cells.get(id(variable))

    def layout(self, type):
        """The Layout of a function type."""
        layout = self.layouts.get(type)
        if layout is None:
            layout = self.layouts[type] = Layout(type)
        return layout

    def function_index(self, function):
        return self.indices[id(function)]

    def table(self, table):
        """The offset of a table's mirror in the context; it is made at first use."""
        offset = self.tables.get(id(table))
        if offset is not None and id(table) not in self.mirrors:
            self.mirrors[id(table)] = Mirror(self, table, offset)
        return offset

    def add_site(self, step, places, constants, result):
        """The number of a helper call."""
        self.sites.append((step, places, constants, result))
        return SITES + len(self.sites) - 1

    # -- from Python to native code --

    def run(self, code, address, values):
        """Calls native code; `values` are (offset from the arguments, type, value)."""
        machine = self.machine
        stack = machine.stack()
        if stack is not self.stack:
            if self.depth:
                raise RuntimeError("the instance is running in another thread")
            self.stack = stack
            self.write(STACK_LIMIT, stack.start + NATIVE_STACK_MARGIN)
        saved = stack.top
        base = (saved - max(code.layout.size, TAIL_CALL_BYTES) - 16) & -16
        if base - code.frame < stack.start + NATIVE_STACK_MARGIN:
            raise Exhaustion("call stack exhausted")
        start = base - stack.start
        for offset, type, value in values:
            self.write_value(start + offset, type, value)
        stack.top = base
        self.depth += 1
        try:
            try:
                status = machine.enter(self.address, address, base)
                while status:
                    status = machine.enter(self.address, *self.land(self.failure(status), base))
                if machine.lost:        # by a callback that native code came back from
                    raise self.failure(PENDING)
            except machine.ctypes.ArgumentError:        # what becomes of a RecursionError
                raise Exhaustion("call stack exhausted") from None
            return self.results(code, start)
        finally:
            stack.top = saved
            self.depth -= 1
            if saved == stack.bottom:
                stack.host_top = 0
                self.references.clear()
                self.handles.clear()

    def results(self, code, start):
        """The results of native code that returned."""
        types = code.function.type.results
        if len(types) == 1:
            type = types[0]
            offset = FLOAT_RESULTS if is_float(type) else RESULTS
            return [self.read_value(offset, type, self.view)]
        return [self.read_value(start + offset, type) for type, offset in zip(types, code.layout.results)]

    # Values on the guest's stack. A reference is a number there, 0 for null.

    def write_value(self, position, type, value):
        stack = self.stack.view
        if type == I32 or type == I64:
            pack_u64_at(stack, position, value)
        elif type == V128:
            stack[position:position + 16] = value
        elif type.__class__ is int:
            pack_u64_at(stack, position, raw(type, value))
        else:
            pack_u64_at(stack, position, self.handle(value))

    def read_value(self, position, type, view=None):
        view = view or self.stack.view
        if type == V128:
            return bytes(view[position:position + 16])
        bits = unpack_u64_at(view, position)[0]
        return cooked(type, bits) if type.__class__ is int else self.references[bits] if bits else None

    def handle(self, value):
        """The number of a reference."""
        if value is None:
            return 0
        handle = self.handles.get(id(value))
        if handle is None:
            handle = self.handles[id(value)] = self.next_handle
            self.references[handle] = value
            self.next_handle += 1
        return handle

    def sweep(self):
        """Forgets the references of which no number is on the stack, where at a callback native
        code has all it needs. A number that only looks like one keeps its reference."""
        stack = self.stack
        words = set(stack.view[stack.top - stack.start & -8:].cast("Q"))
        self.references = {handle: value for handle, value in self.references.items() if handle in words}
        self.handles = {id(value): handle for handle, value in self.references.items()}
        self.sweep_at = 2 * len(self.references) + SWEEP

    def failure(self, status):
        """What native code stopped with, an exception."""
        if status == PENDING:
            error, self.pending, self.machine.lost = self.pending or self.machine.lost, None, None
            return error
        return (Exhaustion if status == STACK_EXHAUSTED else Trap)(TRAP_TEXTS[status])

    def land(self, error, base):
        """The (address, stack) where native code goes on that was left with an exception of the
        guest, which one of the frames below an entry catches; raises all others, the frames added
        to their backtraces. The frames are all there still, and the one that catches has saved
        the registers of those around it."""
        if error.__class__ is Thrown:
            for code, address, frame in self.frames(base):
                for tag, wants_reference, number, places, _ in code.clauses.get(address - code.start, ()):
                    if tag is None or tag is error.tag:
                        values = (error.values if tag else ()) + (error,) * wants_reference
                        error.__traceback__, error.backtrace = None, ()
                        for value, (key, type) in zip(values, places):
                            if key in code.homes:
                                self.write_value(frame - self.stack.start + code.homes[key], type, value)
                        return code.start + code.landings[number], frame + self.machine.assembler.RETURN_BYTES
        if hasattr(error, "backtrace"):
            error.backtrace += tuple(self.backtrace(base))
        raise error

    def backtrace(self, base):
        """Yields (Function, offset in the module) for the frames below an entry."""
        known = {}
        for _, (code, address, _) in zip(range(MAX_FRAMES), self.frames(base)):
            if address not in known:
                known[address] = code.function, code.function.body.start + code.offset_at(address)
            yield known[address]

    def code_at(self, address):
        """The NativeCode that a return address lies in, or None."""
        code = self.returns.get(address)
        if code is None:
            index = count_below(self.starts, address) - 1
            if index < 0 or address > self.codes[index].end:
                return None
            code = self.returns[address] = self.codes[index]
        return code

    def frames(self, base):
        """Yields (NativeCode, return address in it, where its frame starts) of the frames below an
        entry, innermost first."""
        extra = self.machine.assembler.FRAME_EXTRA
        sp = unpack_u64_at(self.view, TRAP_STACK)[0]
        while sp < base:
            address = unpack_u64_at(self.stack.view, sp - self.stack.start)[0]
            code = self.code_at(address)
            if code is None:
                break
            yield code, address, sp + 8
            sp += 8 + code.frame - extra

    # -- from native code to Python --

    def call_back(self, number, sp, host):
        """What the helper stub calls; `sp` is where the return address is."""
        stack = self.stack
        saved, stack.top = stack.top, sp - HELPER_BYTES
        try:
            if len(self.references) > self.sweep_at:
                self.sweep()
            if not stack.host_top:
                stack.host_top = host
            elif stack.host_top - host > stack.host_bytes:
                raise Exhaustion("call stack exhausted")
            if self.machine.lost:
                raise self.machine.lost
            if number < SITES:
                self.call_function(self.functions[number], sp + 8 - stack.start)
            else:
                self.perform(self.sites[number - SITES], sp + 8 - stack.start)
            return 0
        except BaseException as error:
            self.pending = error
            return 1
        finally:
            stack.top = saved

    def call_function(self, function, start):
        """Calls a function with the arguments at `start` of the stack, and leaves its results."""
        type = function.type
        layout = self.layout(type)
        if not function.host:
            charge(function)
        results = execute_any(function, [self.read_value(start + offset, t) for offset, t in zip(layout.params, type.params)])
        for offset, t, value in zip(layout.results, type.results, results or ()):
            self.write_value(start + offset, t, value)

    def perform(self, site, start):
        """Executes a step of the interpreter on a frame of native code."""
        (handler, d, a, b, _), places, constants, result = site
        R = dict(constants)
        for slot, home, type in places:
            R[slot] = self.read_value(start + home, type)
        index = R[b] if handler is do_table_callee else None
        try:
            handler(R, d, a, b)
        except struct.error:            # of a memory access
            raise out_of_bounds("memory") from None
        if result:
            slot, home, type = result
            if index is None:
                self.write_value(start + home, type, R[slot])
            else:
                pack_u64_at(self.stack.view, start + home, self.callee(R[slot], a[0], index))

    def callee(self, function, table, index):
        """The index of a function found in a table, noted in the mirror if it is one of ours."""
        number = self.indices.get(id(function))
        if number is None:
            self.functions[-1] = function
            return len(self.functions) - 1
        self.mirrors[id(table)].note(index, self.machine.type_number(function.type), number)
        return number


class Mirror:
    """A table as native code sees it: for each element the index and the number of the type of
    a function, or 0 where nobody looked yet."""

    def __init__(self, context, table, offset):
        self.context, self.table, self.offset = context, table, offset
        self.mapping, self.noted = None, set()
        table.mirrors.append(self)
        self.clear()

    def clear(self):
        """The table has changed."""
        length = len(self.table.elements)
        if self.mapping is None or len(self.mapping) < 8 * length:
            try:
                self.mapping = mmap.mmap(-1, max(8 * length, 4096), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self.context.write(self.offset, buffer_address(self.mapping))
            except OSError:
                length = 0              # all goes the slow way
        else:
            for index in self.noted:
                pack_u64_at(self.mapping, 8 * index, 0)
        self.noted.clear()
        self.length = length
        self.context.write(self.offset + 8, length)

    def note(self, index, type_number, number):
        if index >= self.length:
            return
        self.noted.add(index)
        pack_u64_at(self.mapping, 8 * index, type_number << 32 | number)


class CellGlobal(Global):
    """A global whose value is in a context: (its view, the offset)."""

    __slots__ = ()

    @property
    def value(self):
        view, offset = Global.value.__get__(self)
        return cooked(self.type.value, unpack_u64_at(view, offset)[0])

    @value.setter
    def value(self, value):
        view, offset = Global.value.__get__(self)
        pack_u64_at(view, offset, raw(self.type.value, value))


pack_u64_at, unpack_u64_at = struct.Struct("<Q").pack_into, struct.Struct("<Q").unpack_from


def charge(function):
    """A call from native code to an interpreted function takes longer than most functions: a few
    are reason enough to compile it."""
    first = function.entry and function.entry[0] and function.entry[0][0]
    if first and first[0] is do_count:
        first[2][0] -= SEAM_COST


def function_address(callback):
    """The address of a C function that calls a Python one."""
    return int.from_bytes(memoryview(callback).tobytes(), "little")


# -- tier-up --

ASSEMBLERS = {assembler.machine: assembler for assembler in (X64, A64)}


MODES = ("auto", "native", "portable", "interpreter")
NATIVE_MACHINES = "x86_64", "aarch64"


class Tier:
    """Decides what is compiled: all if the mode is "native", else ("auto") what is hot."""

    machine = None                      # of the process, made at first use
    refusal = None                      # why there is none
    hears_signals = False               # whether native code must stop for handlers of Python

    def __init__(self, mode):
        self.mode = mode
        self.credit = FIRST_COMPILE if mode == "auto" else 0

    def counter(self, function, locals):
        """What the steps of a function count down."""
        budget = COMPILE_START + COMPILE_COST * (function.body.end - function.body.start)
        if V128 in locals:
            budget //= VECTOR_COST
        return [budget if self.mode == "auto" else -1, function, locals, self]

    def heat(self, counter, place=None):
        """A function has executed as much as its counter says."""
        if Tier.machine is None and self.mode == "auto" and self.credit > 0:
            self.credit -= COMPILE_START
            counter[0] = COMPILE_START // (VECTOR_COST if V128 in counter[2] else 1)
            return
        counter[0] = 1 << 60            # compiled or not, never again
        _, function, locals, _ = counter
        try:
            compile_function(self.ready(), function, locals)
        except (Unsupported, OSError, MemoryError):
            if Tier.refusal and self.mode == "auto":
                counter[-1] = PortableTier(self.mode)       # there is no native code at all
                counter[0] = counter[-1].budget(function)

    @staticmethod
    def ready():
        """The process's Machine; raises Unsupported."""
        if Tier.machine is None or Tier.machine.process != os.getpid():
            if Tier.refusal:
                raise Unsupported(Tier.refusal)
            try:
                machine = Machine()
                machine.stack()
                if Tier.hears_signals:
                    machine.hear_signals()
            except (Unsupported, OSError, ImportError, MemoryError) as error:
                Tier.refusal = str(error) or "no memory"
                raise Unsupported(Tier.refusal) from None
            Tier.machine = machine
        return Tier.machine


def compile_function(machine, function, locals):
    """Compiles a translated function and makes the interpreter enter it from now on."""
    instance = function.instance
    context = instance.context
    if context is None:
        context = instance.context = Context(machine, instance)
    elif context.machine is not machine:
        raise Unsupported("the process was forked")
    compiler = Compiler(context, function, locals)
    code = compiler.compile()
    start = machine.place(code)
    native = NativeCode(function, context, start, compiler)
    context.codes.append(native)
    context.starts.append(start)
    context.write(context.functions_offset + 8 * function.index, start)
    results = range(len(function.type.results))
    nowhere = None, 0, None, None       # native code adds itself to backtraces
    function.entry = [[(do_enter, None, native, None, None)], RETURN, None, results, nowhere]
    for head, offset, alive, types in compiler.loops:
        head[:] = [[(do_enter_loop, None, native, (start + offset, alive, types), None)], RETURN, None, results, nowhere]


def do_enter(R, d, a, b):
    """The whole of a compiled function."""
    R[:] = a.context.run(a, a.start, zip(a.layout.params, a.function.type.params, R))


def do_enter_loop(R, d, a, b):
    """The rest of a compiled function, from a loop's head on: what is alive there goes to its homes."""
    address, alive, types = b
    types = [*a.locals, *types]
    below = a.frame + a.context.machine.assembler.RETURN_BYTES
    R[:] = a.context.run(a, address, [(a.homes[key] - below, types[key >> 2], R[key >> 2]) for key in bits_of(alive)])


def choose_tier(mode):
    """What Module.tier is to be for a mode."""
    has_assembler = machine_here() in NATIVE_MACHINES
    if mode == "interpreter" or mode == "native" and not has_assembler:
        return None
    return Tier(mode) if has_assembler and mode != "portable" else PortableTier(mode)


def native_status():
    """Whether hot functions are compiled here, for people."""
    tier = Module.tier
    if tier.__class__ is Tier:
        try:
            Tier.ready()
        except Unsupported as error:
            return "no: %s%s" % (error, "; hot functions become Python" if tier.mode == "auto" else "")
        return "yes, %s" % machine_here()
    return "no: %s%s" % ("CHIBISHIM_TIER says so" if machine_here() in NATIVE_MACHINES else "no assembler for " + machine_here(),
                         "; hot functions become Python" if tier else "")


Module.tier = choose_tier(environment("CHIBISHIM_TIER") or "auto")


# === 16. Reading and debugging ================================================
#
# Bodies as text, and what goes on while they run. The disassembler reads the rows of
# INSTRUCTIONS and writes the text format (chapter 6 of the specification): what it
# prints can be pasted into a module for an assembler. Offsets are the module's bytes,
# as in the backtraces of wasmtime and the listings of objdump, and stand in comments.
#
# Nobody pays for this who does not use it. To trace functions or to count what they
# execute, they are translated by a Stepwise in place of a Translator, which inserts steps
# of its own among the instructions'.


class Disassembler(TypeReader):
    """A cursor over a Body that reads it as text."""

    __slots__ = ("module", "op", "nulls")

    def __init__(self, module, body):
        super().__init__(module.data, body.start, body.end)
        self.module = module

    def instruction(self):
        """Reads an instruction; returns (Op, text). Raises Malformed."""
        opcode = self.byte()
        if opcode in PREFIX_BYTES:
            opcode = prefixed(opcode, self.unsigned())
        self.op = op = operation(opcode)
        self.nulls = "null" in op.name          # bit by bit, whether the next heap type has a null
        words = [IMMEDIATE_TEXTS[kind](self) for kind in op.immediates]
        if op.immediates[-1:] == ["memory"] or op.immediates[-1:] == ["table"] and len(words) == 2:
            words = default_spaces(op.immediates, words)
        return op, " ".join(filter(None, [TEXT_NAMES.get(op.name, op.name)] + words))

    def function(self, index):
        """func ::= locals expr: yields the lines of function `index`."""
        module = self.module
        type = module.function_type(index)
        name = function_name(module, index)
        yield "(func (;%d;)%s (type %d)%s" % (index, " (;%s;)" % comment(name) if name else "", module.functions[index],
                                              signature(module, type))
        depth, total = 1, 0
        for _ in range(self.unsigned()):
            count = self.unsigned()
            total += count
            if total > MAX_LOCALS:
                raise Malformed("too many locals: %d, at most %d" % (total, MAX_LOCALS))
            yield "  (local%s)" % ((" " + self.value_text()) * count)
        while self.position < self.end:
            start = self.position
            op, text = self.instruction()
            depth -= op.name in ("else", "end")
            if depth == 0:
                break
            yield "  (;%#08x;)%s%s" % (start, "  " * depth, text)
            depth += "blocktype" in op.immediates or op.name == "else"
        yield ")"

    # -- types: indices stay indices --

    def heap_text(self):
        index = self.signed(33)
        if index >= 0:
            return str(index)
        if index < -64 or index & 0x7F not in HEAP_NAMES:
            raise Malformed("malformed heap type")
        return HEAP_NAMES[index & 0x7F]

    def value_text(self):
        type = self.byte()
        if type in (0x63, 0x64):
            return "(ref %s%s)" % ("null " if type == 0x63 else "", self.heap_text())
        if type not in TYPE_NAMES and type not in HEAP_NAMES or type == UNKNOWN:
            raise Malformed("malformed value type")
        return TYPE_NAMES.get(type) or reference_text(type)

    # -- immediates, by the names that INSTRUCTIONS has for them --

    def index_text(self):
        return str(self.unsigned())

    def func_text(self):
        return function_text(self.module, self.unsigned())

    def typeuse_text(self):
        index = self.unsigned()
        return "(type %d)" % index if self.op.name.endswith("call_indirect") else str(index)

    def blocktype_text(self):
        byte = self.byte()
        if byte == 0x40:
            return ""
        self.position -= 1
        if 0x40 < byte < 0x80:
            return "(result %s)" % self.value_text()
        index = self.unsigned(33)
        check_index("type", index, self.module.types)
        return "(type %d)%s" % (index, signature(self.module, self.module.types[index]))

    def labels_text(self):
        return " ".join(self.vector(self.index_text) + [self.index_text()])

    def catches_text(self):
        return " ".join(self.vector(self.catch_text))

    def catch_text(self):
        kind = self.byte()
        if kind > 3:
            raise Malformed("malformed catch clause")
        return "(%s%s %d)" % (("catch ", "catch_ref ", "catch_all", "catch_all_ref")[kind],
                              self.unsigned() if kind < 2 else "", self.unsigned())

    def types_text(self):
        return "(result %s)" % " ".join(self.vector(self.value_text))

    def heaptype_text(self):
        heap, nullable = self.heap_text(), self.nulls & 1
        self.nulls >>= 1
        return heap if self.op.name == "ref.null" else "(ref %s%s)" % ("null " if nullable else "", heap)

    def castflags_text(self):
        self.nulls = self.byte()
        if self.nulls > 3:
            raise Malformed("malformed br_on_cast flags")
        return ""

    def memarg_text(self):
        align, words = self.unsigned(), []
        if align & 0x40:
            align, words = align & 0x3F, [self.index_text()]
        offset = self.unsigned(64)
        words += ["offset=%d" % offset] if offset else []
        words += ["align=%d" % (1 << (align & 0x3F))] if 1 << (align & 0x3F) != self.op.width else []
        return " ".join(words)

    def lane_text(self):
        return str(self.byte())

    def lanes_text(self):
        return " ".join(map(str, self.take(16)))

    def reserved_text(self):
        self.byte()
        return ""

    def i32_text(self):
        return str(self.signed(32))

    def i64_text(self):
        return str(self.signed(64))

    def f32_text(self):
        bits = unpack_u32(self.take(4))[0]
        return float_text(f32_from_bits(bits), bits, 32, 23)

    def f64_text(self):
        data = self.take(8)
        return float_text(unpack_f64(data)[0], int.from_bytes(data, "little"), 64, 52)

    def v128_text(self):
        return "i32x4 " + " ".join("%#010x" % lane for lane in struct.unpack("<4I", self.take(16)))


def default_spaces(kinds, words):
    """The indices of memories and tables come first in the text, and are left out where
    all are 0."""
    spaces = [word for kind, word in zip(kinds, words) if kind in ("memory", "table")]
    others = [word for kind, word in zip(kinds, words) if kind not in ("memory", "table")]
    return (spaces if any(word != "0" for word in spaces) else []) + others


def float_text(value, bits, width, fraction):
    """A float of `width` bits, `fraction` of them behind the point (6.3.2)."""
    if value == value:
        short = "%.8g" % value
        return short if width == 32 and to_f32(float(short)) == value else repr(value)
    payload = bits & (1 << fraction) - 1
    return "%snan%s" % ("-" if bits >> width - 1 else "", "" if payload == 1 << fraction - 1 else ":%#x" % payload)


def reference_text(heap):
    """The abbreviation of a nullable abstract reference type."""
    name = HEAP_NAMES[heap]
    return {"none": "null", "nofunc": "nullfunc", "noextern": "nullextern", "noexn": "nullexn"}.get(name, name) + "ref"


def signature(module, type):
    """' (param i32 i32) (result i64)'"""
    def texts(types):
        return "".join(" " + value_text(module, t) for t in types)
    return (" (param%s)" % texts(type.params) if type.params else "") + (
        " (result%s)" % texts(type.results) if type.results else "")


def value_text(module, type):
    """A value type in the text format, defined types by index."""
    if type.__class__ is int:
        return TYPE_NAMES[type]
    heap, nullable = type
    if heap.__class__ is int:
        return reference_text(heap) if nullable else "(ref %s)" % HEAP_NAMES[heap]
    if module.type_indices is None:
        module.type_indices = {type: index for index, type in reversed(list(enumerate(module.types)))}
    return "(ref %s%d)" % ("null " if nullable else "", module.type_indices[heap])


def function_text(module, index):
    """'12 (;main;)': a function's index, and its name where it has one."""
    name = function_name(module, index)
    return "%s (;%s;)" % (index, comment(name)) if name else str(index)


def comment(name):
    """A name that does not end the comment in which it stands, nor begin another at its end."""
    return name.replace(";", ",") + " " * name.endswith("(")


def function_name(module, index):
    """The name of a function by the name section, an import or its first export; None
    without. A constant expression has the index None."""
    names = module.labels
    if names is None:
        names = module.labels = {None: "constant expression"}
        names.update([(index, name) for name, (kind, index) in reversed(module.exports.items()) if kind == "func"])
        functions = [item for item in module.imports if item.kind == "func"]
        names.update(enumerate("%s.%s" % (item.module, item.name) for item in functions))
        names.update(module.function_names())
    return names.get(index)


# How the immediates of INSTRUCTIONS are read as text; and the names in the text format
# that have a suffix in INSTRUCTIONS, where names are unique.
IMMEDIATE_TEXTS = dict.fromkeys(("label", "local", "global", "tag", "field", "data", "elem", "count", "table", "memory"),
                                Disassembler.index_text)
for _name in ("func", "blocktype", "labels", "catches", "types", "heaptype", "memarg", "lane", "lanes", "castflags", "reserved",
              "i32", "i64", "f32", "f64", "v128"):
    IMMEDIATE_TEXTS[_name] = getattr(Disassembler, _name + "_text")
IMMEDIATE_TEXTS["type"] = Disassembler.typeuse_text
TEXT_NAMES = {"select_t": "select", "ref.test null": "ref.test", "ref.cast null": "ref.cast"}


def disassemble(module, wanted=None):
    """Yields the lines of the functions that have the index, the name or the export name
    `wanted`, of all without one. Raises Malformed, KeyError where there is none."""
    exports = {name: index for name, (kind, index) in module.exports.items() if kind == "func"}
    names = module.function_names()
    found = False
    for index, body in enumerate(module.bodies, module.imported_functions):
        if wanted in (None, str(index), names.get(index)) or exports.get(wanted) == index:
            found = True
            yield from Disassembler(module, body).function(index)
    if not found and wanted is not None:
        raise KeyError(wanted)


class Stepwise(Translator):
    """Translates one instruction at a time. With `trace`, a function of a line of text,
    each instruction is announced to it before it is executed; with `tank`, a list [number
    that is left, number at first], each block takes as many out as it has instructions, and
    traps if they are not there."""

    __slots__ = ("trace", "tank", "cost", "charged", "lowest")

    def __init__(self, function, trace, tank):
        super().__init__(function)
        self.trace, self.tank = trace, tank
        self.cost = self.charged = None     # how many instructions the block `charged` has
        self.lowest = 0                     # how low the operand stack was within an instruction
        self.aliases = not trace            # a trace reads an operand from the slot of its height

    def instructions(self):
        reader, function, whole = self.reader, self.function, self.reader.end
        code = Disassembler(self.module, function.body)
        code.position += reader.position
        if self.trace:
            self.announce("func " + function_text(self.module, function.index),
                          [(type, slot) for slot, type in enumerate(function.type.params)])
        while self.controls and code.position < code.end:
            start = code.position
            op, text = code.instruction()
            reader.end = code.position - function.body.start
            self.instruction(op, "%#08x  %s" % (start, text))
        reader.end = whole

    def instruction(self, op, line):
        """Translates the next instruction, which is all that the reader's window shows."""
        self.at = self.reader.position
        if self.tank and self.charged is not self.block:
            self.charged, self.cost = self.block, [0]
            self.emit(do_burn, None, self.tank, self.cost)
        if self.tank:
            self.cost[0] += 1
        if self.trace:
            operands, types, slots = [], list(self.types), list(self.slots)
            self.announce(line, operands)
            self.lowest = len(slots) - (len(op.params) if op.shape != IRREGULAR else 0)
        super().instructions()
        if self.trace:
            operands += zip(types[self.lowest:], slots[self.lowest:])

    def announce(self, line, operands):
        """Emits the step that traces a line with the values of `operands`, (type, slot)."""
        self.emit(do_trace, None, (self.trace, line), operands)

    def pop(self, expected=UNKNOWN):
        slot = super().pop(expected)
        self.lowest = min(self.lowest, len(self.types))
        return slot


def do_trace(R, d, a, b):
    trace, line = a
    trace(line + "".join("  " + value_of(type, R[slot]) for type, slot in b))


def value_of(type, value):
    """A value of the interpreter, for people."""
    if type in (I32, I64, F32, F64):
        return str(to_python(type, value))
    if value.__class__ is bytes:
        return "0x" + value[::-1].hex()
    return "null" if value is None else str(getattr(value, "name", value.__class__.__name__.lower()))


def do_burn(R, d, a, b):
    a[0] -= b[0]
    if a[0] < 0:
        raise Exhaustion("out of fuel after %d instructions" % a[1])


def instrument(trace=None, tank=None):
    """What to set as a module's `translator` to trace it or to bound it; see Stepwise."""
    return lambda function: Stepwise(function, trace, tank)


def backtrace_of(trap):
    """[(name, offset in the module)] of a trap's innermost active calls."""
    return [(function_name(function.instance.module, function.index) or "func[%d]" % function.index, offset)
            for function, offset in trap.backtrace[:MAX_BACKTRACE]]


MAX_BACKTRACE = 32


# === 17. WASI =================================================================
#
# WASI preview 1: 46 functions over the guest's memory. In: the arguments, the
# environment, the preopened directories and listening sockets that the caller grants;
# the guest sees nothing else of the host. Each method has the name and the parameters
# of the witx file (its results are pointers, as in the C ABI); it raises OSError or
# WasiError, and one wrapper turns that into an errno.
#
# A path is split into the directory that holds the entry and the entry's name. The
# kernel resolves the former below the preopen (openat2(2)); the latter is never a
# symbolic link that anybody follows. So nothing outside a preopen can be named, and
# whatever changes meanwhile, a system call works on the descriptor that was checked.


# -- constants of the witx files --

WASI_ERRNO = {name: code for code, name in enumerate((
    "SUCCESS E2BIG EACCES EADDRINUSE EADDRNOTAVAIL EAFNOSUPPORT EAGAIN EALREADY EBADF EBADMSG EBUSY ECANCELED "
    "ECHILD ECONNABORTED ECONNREFUSED ECONNRESET EDEADLK EDESTADDRREQ EDOM EDQUOT EEXIST EFAULT EFBIG "
    "EHOSTUNREACH EIDRM EILSEQ EINPROGRESS EINTR EINVAL EIO EISCONN EISDIR ELOOP EMFILE EMLINK EMSGSIZE "
    "EMULTIHOP ENAMETOOLONG ENETDOWN ENETRESET ENETUNREACH ENFILE ENOBUFS ENODEV ENOENT ENOEXEC ENOLCK "
    "ENOLINK ENOMEM ENOMSG ENOPROTOOPT ENOSPC ENOSYS ENOTCONN ENOTDIR ENOTEMPTY ENOTRECOVERABLE ENOTSOCK "
    "ENOTSUP ENOTTY ENXIO EOVERFLOW EOWNERDEAD EPERM EPIPE EPROTO EPROTONOSUPPORT EPROTOTYPE ERANGE EROFS "
    "ESPIPE ESRCH ESTALE ETIMEDOUT ETXTBSY EXDEV ENOTCAPABLE").split())}
HOST_ERRNO = {getattr(errno, name): code for name, code in WASI_ERRNO.items() if hasattr(errno, name)}

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
DIRECTORY_RIGHTS = ALL_RIGHTS & ~rights("fd_read fd_seek fd_tell fd_write fd_advise fd_allocate fd_filestat_set_size "
                                        "poll_fd_readwrite sock_shutdown sock_accept")
STREAM_RIGHTS = FILE_RIGHTS & ~rights("fd_seek fd_tell")
LISTENER_RIGHTS = rights("sock_accept fd_fdstat_set_flags fd_filestat_get poll_fd_readwrite")
CONNECTION_RIGHTS = rights("fd_read fd_write fd_fdstat_set_flags fd_filestat_get poll_fd_readwrite sock_shutdown")
WRITING_RIGHTS = rights("fd_write fd_allocate fd_filestat_set_size")
READING_RIGHTS = rights("fd_read fd_readdir")
# Of a read-only preopen. Without path_link_source: a file linked into a writable preopen would be writable there.
READ_ONLY_RIGHTS = ALL_RIGHTS & ~rights(
    "fd_write fd_allocate fd_filestat_set_size fd_filestat_set_times path_create_directory path_create_file path_link_source "
    "path_link_target path_rename_source path_rename_target path_filestat_set_size path_filestat_set_times path_symlink "
    "path_remove_directory path_unlink_file")

# S_IFBLK, CHR, DIR, REG, SOCK and LNK of st_mode; S_IFIFO is unknown (0) to the witx file.
FILETYPES = {0o060000: 1, 0o020000: 2, 0o040000: 3, 0o100000: 4, 0o140000: 6, 0o120000: 7}
DIRECTORY, REGULAR_FILE, STREAM_SOCKET, SYMBOLIC_LINK = 3, 4, 6, 7
FDFLAGS_APPEND, FDFLAGS_DSYNC, FDFLAGS_NONBLOCK, FDFLAGS_RSYNC, FDFLAGS_SYNC = 1, 2, 4, 8, 16
FDFLAGS = ((FDFLAGS_APPEND, os.O_APPEND), (FDFLAGS_DSYNC, os.O_DSYNC), (FDFLAGS_NONBLOCK, os.O_NONBLOCK),
           (FDFLAGS_RSYNC, os.O_RSYNC), (FDFLAGS_SYNC, os.O_SYNC))
OFLAGS_CREAT, OFLAGS_DIRECTORY, OFLAGS_EXCL, OFLAGS_TRUNC = 1, 2, 4, 8
OFLAGS = ((OFLAGS_CREAT, os.O_CREAT), (OFLAGS_DIRECTORY, os.O_DIRECTORY), (OFLAGS_EXCL, os.O_EXCL), (OFLAGS_TRUNC, os.O_TRUNC))
LOOKUP_SYMLINK_FOLLOW = 1
WASI_CLOCKS = (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_PROCESS_CPUTIME_ID, time.CLOCK_THREAD_CPUTIME_ID)
CLOCK_REALTIME, CLOCK_MONOTONIC = 0, 1
WASI_ADVICE = (os.POSIX_FADV_NORMAL, os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_RANDOM,
               os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED, os.POSIX_FADV_NOREUSE)
WASI_SIGNALS = (*range(16), *range(17, 32))     # Linux's numbers, without 16 (STKFLT)
IGNORED_BY_DEFAULT = (17, 18, 23, 28)           # CHLD CONT URG WINCH: signal(7)
STOPPING = (19, 20, 21, 22)                     # STOP TSTP TTIN TTOU
EVENT_CLOCK, EVENT_READ, EVENT_WRITE = 0, 1, 2
SUBSCRIPTION_CLOCK_ABSTIME = 1
RECV_PEEK, RECV_WAITALL, RECV_DATA_TRUNCATED = 1, 2, 1
SHUTDOWN_HOW = {1: 0, 2: 1, 3: 2}               # read, write, both: SHUT_RD, SHUT_WR, SHUT_RDWR
MSG_PEEK, MSG_TRUNC, MSG_WAITALL, MSG_NOSIGNAL = 0x02, 0x20, 0x100, 0x4000
FIONREAD = 0x541B

MAX_DESCRIPTORS = 4096
MAX_IOVECS = 1024                   # IOV_MAX
MAX_SYMLINKS = 40                   # as path_resolution(7)
MAX_PATH_BYTES = 4095               # PATH_MAX without its NUL
MAX_TRANSFER_BYTES = 1 << 20
MAX_SLEEP_SECONDS = 3600

# Parameters in the C ABI: i is i32, I is i64. All return an errno but proc_exit.
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


class WasiError(Exception):
    """A WASI errno by name, where no OSError says it."""


# -- what a guest must not reach --
#
# With / preopened, /proc/self/mem would hand the engine to the guest, /dev/mem the
# machine, and opening a watchdog would reboot it. The kernel's own file systems are
# refused as a whole, devices unless they are known to be harmless.

KERNEL_FILESYSTEMS = {
    0x9FA0: b"proc", 0x62656572: b"sysfs", 0x64626720: b"debugfs", 0x74726163: b"tracefs", 0x73636673: b"securityfs",
    0x62656570: b"configfs", 0xCAFE4A11: b"bpf", 0x42494E4D: b"binfmt_misc", 0xDE5E81E4: b"efivarfs", 0x6165676C: b"pstore",
    0x27E0EB: b"cgroup", 0x63677270: b"cgroup2", 0xF97CFF8C: b"selinuxfs", 0x43415D53: b"smackfs", 0x6E736673: b"nsfs",
    0x65735543: b"fusectl", 0x6E667364: b"nfsd"}
HARMLESS_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0))     # null zero full random urandom tty
TERMINAL_MAJORS = range(136, 144)                                       # /dev/pts


def is_kernel_filesystem(fd):
    """Whether a descriptor lies in one, by fstatfs(2), which trusts no path. A Python
    without _ctypes asks mountinfo; without that either it raises OSError."""
    try:
        status = STATFS[0] if STATFS else statfs_buffer()
    except ImportError:
        sys.modules["_ctypes"] = None
        return os.fstat(fd).st_dev in kernel_filesystem_devices()
    try:
        libc.fstatfs64(fd, status)      # fstatfs fails on large file systems where long has 32 bits
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        libc.fstatfs(fd, status)        # musl has but the one
    return status[0] & MAX_U32 in KERNEL_FILESYSTEMS


STATFS = []                             # room for a struct statfs, once it is needed


def statfs_buffer():
    """A struct statfs as an array of longs, the first of which is f_type: statfs(2)."""
    import _ctypes
    STATFS.append(type("statfs", (_ctypes.Array,), {"_type_": c_type("L"), "_length_": 32})())
    return STATFS[0]


def kernel_filesystem_devices():
    """The st_dev of each that is mounted now: proc_pid_mountinfo(5)."""
    devices = set()
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields = line.split(b" ")
            if fields[fields.index(b"-") + 1] in KERNEL_FILESYSTEMS.values():
                major, minor = fields[2].split(b":")
                devices.add(os.makedev(int(major), int(minor)))
    return devices


def check_filesystem(fd):
    """EACCES for the kernel's own file systems."""
    if is_kernel_filesystem(fd):
        raise PermissionError(errno.EACCES, "a file system of the kernel is not for guests")


def check_device(status):
    """EACCES for a device that is not known to be harmless."""
    kind = status.st_mode & 0o170000
    device = os.major(status.st_rdev), os.minor(status.st_rdev)
    if kind == 0o060000 or kind == 0o020000 and device not in HARMLESS_DEVICES and device[0] not in TERMINAL_MAJORS:
        raise WasiError("EACCES")


# -- directories below a directory --

RESOLVE_NO_MAGICLINKS, RESOLVE_BENEATH = 0x02, 0x08
SYS_OPENAT2 = 437                       # on every architecture but alpha and MIPS
HOW = struct.pack("=QQQ", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)


def open_beneath(root, path):
    """An O_PATH descriptor of the directory `path` below the descriptor `root`; EPERM for
    a path that leads out. openat2(2): importing _ctypes for it costs 0.4 ms once (ctypes:
    4), a call is 1.2 (one component) to 4 times (four) as fast as the walk."""
    try:
        return libc.syscall(SYS_OPENAT2, root, path, HOW, len(HOW))
    except ImportError:                 # a Python without _ctypes
        sys.modules["_ctypes"] = None   # not looked for at every path
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise WasiError("EPERM") from None
        # Linux before 5.6, a seccomp filter of that age, somebody who renames directories meanwhile
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EAGAIN):
            raise
    return walk_beneath(root, path)


def walk_beneath(root, path):
    """open_beneath, component by component: a descriptor for each directory on the way,
    so that `..` is where we came from and nothing is looked up twice."""
    stack, pending, links = [os.dup(root)], path.split(b"/")[::-1], 0
    try:
        while pending:
            name = pending.pop()
            if name == b"..":
                if len(stack) == 1:
                    raise WasiError("EPERM")
                os.close(stack.pop())
            if name in (b"", b".", b".."):
                continue
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stack[-1])
            stack.append(fd)
            kind = filetype(os.fstat(fd))
            if kind == SYMBOLIC_LINK:
                target = os.readlink(b"", dir_fd=fd)
                os.close(stack.pop())
                links += 1
                if links > MAX_SYMLINKS:
                    raise WasiError("ELOOP")
                if target.startswith(b"/"):
                    raise WasiError("EPERM")
                pending += target.split(b"/")[::-1]
            elif kind != DIRECTORY:
                raise WasiError("ENOTDIR")
        return stack.pop()
    finally:
        for fd in stack:
            os.close(fd)


def resolve_path(root, path, follow):
    """(descriptor of the parent directory, last name, whether the path ends in a slash).
    Links in the last place are followed if `follow`: the name is none then, or has just
    become one, so whoever uses it refuses links. Nobody hands on the slash, which makes
    the kernel follow links whatever it is told. The caller closes the descriptor."""
    slash = path.endswith(b"/")
    links = 0
    while True:
        if not path:
            raise WasiError("ENOENT")
        if path.startswith(b"/"):
            raise WasiError("EPERM")
        directory, _, name = path.rstrip(b"/").rpartition(b"/")
        if name in (b".", b".."):
            directory, name = path, b"."
        parent = open_beneath(root, directory or b".")
        try:
            check_filesystem(parent)
            target = link_target(parent, name) if follow and name != b"." else None
        except BaseException:
            os.close(parent)
            raise
        if target is None:
            return parent, name, slash
        os.close(parent)
        links += 1
        if links > MAX_SYMLINKS:
            raise WasiError("ELOOP")
        slash = slash or target.endswith(b"/")
        path = directory + b"/" + target if directory and not target.startswith(b"/") else target


def link_target(parent, name):
    """What a symbolic link says; None if there is none of that name."""
    try:
        return os.readlink(name, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
    return None


def status_at(parent, name):
    """The stat of an entry itself; None if there is none."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


# -- descriptors --


class Descriptor:
    """An open file of the guest. `base` and `inheriting` are its rights, `preopen` is the
    guest path of a preopened directory, `flags` the fdflags that fcntl(2) cannot set,
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


def standard_stream(fd):
    """The Descriptor of an inherited stream, with rights as it was opened. A directory is none
    that was granted: nothing below it can be named."""
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    lacking = READING_RIGHTS if access == os.O_WRONLY else WRITING_RIGHTS if access == os.O_RDONLY else 0
    return Descriptor(fd, applicable_rights(fd) & (FILE_RIGHTS | CONNECTION_RIGHTS) & ~lacking)


def applicable_rights(fd):
    """The rights that make sense for what is open. A character device that cannot seek is
    what guests take for a terminal."""
    kind = filetype(os.fstat(fd))
    if kind in (DIRECTORY, STREAM_SOCKET):
        return DIRECTORY_RIGHTS if kind == DIRECTORY else CONNECTION_RIGHTS
    try:
        os.lseek(fd, 0, SEEK_CUR)
    except OSError:
        return STREAM_RIGHTS
    return FILE_RIGHTS


def plug(fd):
    """Makes a standard stream's number a pipe at its end, where every write fails: a file
    that took the number would receive what is meant for the terminal."""
    end, other = os.pipe()
    os.close(other)
    if end != fd:
        os.dup2(end, fd)
        os.close(end)


class Wasi:
    """The state of one guest. `preopens` is a list of (host path, guest path) or (host path,
    guest path, whether read-only), `listeners` of descriptors of listening sockets; they
    become 3 and up, in this order. Raises OSError that names the host path."""

    WHENCE = (SEEK_SET, SEEK_CUR, SEEK_END)
    FILESTAT = "QQB7xQQQQQ"
    SUBSCRIPTION_BYTES, SUBSCRIPTION_CLOCK = 48, 16

    def __init__(self, arguments=(), environment=(), preopens=(), listeners=()):
        self.arguments = [file_bytes(a) for a in arguments]
        self.environment = [file_bytes(e) for e in environment]
        self.memory = Memory(0, 0)
        self.descriptors = {}
        for fd in 0, 1, 2:
            try:
                self.descriptors[fd] = standard_stream(fd)
            except OSError:
                pass                    # closed by whoever started us: EBADF for the guest
        for host, guest, *read_only in preopens:
            mask = READ_ONLY_RIGHTS if any(read_only) else ALL_RIGHTS
            self.insert(Descriptor(open_preopen(host), DIRECTORY_RIGHTS & mask, (DIRECTORY_RIGHTS | FILE_RIGHTS) & mask,
                                   file_bytes(guest)))
        for fd in listeners:
            self.insert(Descriptor(fd, LISTENER_RIGHTS, CONNECTION_RIGHTS))
        if any(d.filetype == STREAM_SOCKET for d in self.descriptors.values()):
            import _socket              # before the guest runs, and only for those that have sockets
            self.socket_type = _socket.socket

    def imports(self):
        """The imports' namespace: {name: HostFunction}."""
        return WasiFunctions(self)

    def host_function(self, name, letters):
        """The HostFunction of a method; the errno is its result."""
        method = getattr(self, name)
        type = FunctionType([TYPE_LETTERS[letter] for letter in letters], () if name == "proc_exit" else (I32,))

        def call(*arguments):
            try:
                method(*arguments)
                return (0,)
            except OSError as error:
                return (HOST_ERRNO.get(error.errno, WASI_ERRNO["EIO"]),)
            except WasiError as error:
                return (WASI_ERRNO[error.args[0]],)
            except struct.error:
                return (WASI_ERRNO["EFAULT"],)
            except OverflowError:       # beyond this machine's time_t or off_t
                return (WASI_ERRNO["EOVERFLOW"],)
            except MemoryError:
                return (WASI_ERRNO["ENOMEM"],)
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

    def path(self, address, size):
        """The bytes of a path."""
        if size > MAX_PATH_BYTES:
            raise WasiError("ENAMETOOLONG")
        path = bytes(self.bytes_at(address, size))
        try:
            path.decode()
        except UnicodeDecodeError:
            raise WasiError("EILSEQ") from None
        if b"\0" in path:
            raise WasiError("EILSEQ")
        return path

    # -- descriptors --

    def check_room(self, result):
        """Before anything is created: a number must be free, and storable at `result`."""
        self.bytes_at(result, 4)
        if len(self.descriptors) >= MAX_DESCRIPTORS:
            raise WasiError("EMFILE")

    def insert(self, descriptor):
        """The lowest free number, now the descriptor's."""
        number = 3
        while number in self.descriptors:
            number += 1
        self.descriptors[number] = descriptor
        return number

    def descriptor(self, number, right=0):
        """The descriptor, if it has all the rights."""
        descriptor = self.descriptors.get(number)
        if descriptor is None:
            raise WasiError("EBADF")
        if right & ~descriptor.base:
            raise WasiError("ENOTCAPABLE")
        return descriptor

    def directory(self, number, right):
        """The descriptor of a directory, if it has all the rights."""
        if self.descriptor(number).filetype != DIRECTORY:
            raise WasiError("ENOTDIR")
        return self.descriptor(number, right)

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
        if signal >= len(WASI_SIGNALS):
            raise WasiError("EINVAL")
        number = WASI_SIGNALS[signal]
        os.kill(os.getpid(), number)
        if os.getpid() == 1 and number not in (0, *IGNORED_BY_DEFAULT, *STOPPING):
            raise Exit(128 + number)    # pid_namespaces(7): init cannot kill itself

    def sched_yield(self):
        os.sched_yield()

    # -- files --

    def fd_read(self, number, iovs, count, result):
        descriptor = self.descriptor(number, RIGHTS["fd_read"])
        self.store("I", result, os.readv(descriptor.fd, self.buffers(iovs, count)))

    def fd_write(self, number, iovs, count, result):
        descriptor = self.descriptor(number, RIGHTS["fd_write"])
        self.store("I", result, os.writev(descriptor.fd, self.buffers(iovs, count)))

    def fd_pread(self, number, iovs, count, offset, result):
        descriptor = self.descriptor(number, RIGHTS["fd_read"] | RIGHTS["fd_seek"])
        self.store("I", result, os.preadv(descriptor.fd, self.buffers(iovs, count), file_offset(offset)))

    def fd_pwrite(self, number, iovs, count, offset, result):
        descriptor = self.descriptor(number, RIGHTS["fd_write"] | RIGHTS["fd_seek"])
        self.store("I", result, os.pwritev(descriptor.fd, self.buffers(iovs, count), file_offset(offset)))

    def fd_seek(self, number, offset, whence, result):
        if whence >= len(self.WHENCE):
            raise WasiError("EINVAL")
        whence = self.WHENCE[whence]
        if whence == SEEK_CUR and not offset:
            return self.fd_tell(number, result)
        if self.descriptor(number).filetype == DIRECTORY:
            raise WasiError("EBADF")
        descriptor = self.descriptor(number, RIGHTS["fd_seek"])
        self.store("Q", result, os.lseek(descriptor.fd, signed(offset, 64), whence))

    def fd_tell(self, number, result):
        descriptor = self.descriptor(number)
        if descriptor.filetype == DIRECTORY:
            raise WasiError("EBADF")
        if not descriptor.base & rights("fd_tell fd_seek"):     # the latter implies the former
            raise WasiError("ENOTCAPABLE")
        self.store("Q", result, os.lseek(descriptor.fd, 0, SEEK_CUR))

    def fd_close(self, number):
        close_descriptor(self.descriptor(number))
        del self.descriptors[number]

    def fd_renumber(self, number, to):
        descriptor, replaced = self.descriptor(number), self.descriptor(to)
        if number != to:
            close_descriptor(replaced)
            self.descriptors[to] = descriptor
            del self.descriptors[number]

    def fd_sync(self, number):
        os.fsync(self.descriptor(number, RIGHTS["fd_sync"]).fd)

    def fd_datasync(self, number):
        os.fdatasync(self.descriptor(number, RIGHTS["fd_datasync"]).fd)

    def fd_advise(self, number, offset, size, advice):
        descriptor = self.descriptor(number, RIGHTS["fd_advise"])
        if advice >= len(WASI_ADVICE):
            raise WasiError("EINVAL")
        os.posix_fadvise(descriptor.fd, file_offset(offset), file_offset(size), WASI_ADVICE[advice])

    def fd_allocate(self, number, offset, size):
        os.posix_fallocate(self.descriptor(number, RIGHTS["fd_allocate"]).fd, file_offset(offset), file_offset(size))

    def fd_fdstat_get(self, number, result):
        d = self.descriptor(number)
        current = fcntl.fcntl(d.fd, fcntl.F_GETFL)
        flags = d.flags | sum(bit for bit, flag in FDFLAGS if bit & (FDFLAGS_APPEND | FDFLAGS_NONBLOCK) and current & flag)
        self.store("BxH4xQQ", result, d.filetype, flags, d.base, d.inheriting)

    def fd_fdstat_set_flags(self, number, flags):
        descriptor = self.descriptor(number, RIGHTS["fd_fdstat_set_flags"])
        if flags > 31:
            raise WasiError("EINVAL")
        if (flags ^ descriptor.flags) & ~(FDFLAGS_APPEND | FDFLAGS_NONBLOCK):
            raise WasiError("ENOTSUP")  # fcntl(2) ignores what it cannot change
        current = fcntl.fcntl(descriptor.fd, fcntl.F_GETFL) & ~(os.O_APPEND | os.O_NONBLOCK)
        fcntl.fcntl(descriptor.fd, fcntl.F_SETFL, current | host_flags(FDFLAGS, flags))

    def fd_fdstat_set_rights(self, number, base, inheriting):
        descriptor = self.descriptor(number)
        if base & ~descriptor.base or inheriting & ~descriptor.inheriting:
            raise WasiError("ENOTCAPABLE")
        descriptor.base, descriptor.inheriting = base, inheriting

    def fd_filestat_get(self, number, result):
        self.store_filestat(result, os.fstat(self.descriptor(number, RIGHTS["fd_filestat_get"]).fd))

    def store_filestat(self, result, s):
        self.store(self.FILESTAT, result, s.st_dev, s.st_ino, filetype(s), s.st_nlink, s.st_size,
                   s.st_atime_ns & MAX_U64, s.st_mtime_ns & MAX_U64, s.st_ctime_ns & MAX_U64)

    def fd_filestat_set_size(self, number, size):
        os.ftruncate(self.descriptor(number, RIGHTS["fd_filestat_set_size"]).fd, file_offset(size))

    def fd_filestat_set_times(self, number, atime, mtime, flags):
        descriptor = self.descriptor(number, RIGHTS["fd_filestat_set_times"])
        os.utime(descriptor.fd, **new_times(os.fstat(descriptor.fd), atime, mtime, flags))

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
        descriptor = self.directory(number, RIGHTS["fd_readdir"])
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

    def path_open(self, number, lookup, path, size, oflags, base, inheriting, fdflags, result):
        """The rights to access contents must be the directory's to give; of the others the
        new descriptor has those that it can: guests ask for all there are."""
        directory = self.directory(number, RIGHTS["path_open"] | (RIGHTS["path_create_file"] if oflags & OFLAGS_CREAT else 0) |
                                   (RIGHTS["path_filestat_set_size"] if oflags & OFLAGS_TRUNC else 0))
        if oflags > 15 or fdflags > 31 or oflags & OFLAGS_CREAT and oflags & OFLAGS_DIRECTORY:
            raise WasiError("EINVAL")
        if base & (WRITING_RIGHTS | READING_RIGHTS) & ~directory.inheriting:
            raise WasiError("ENOTCAPABLE")
        self.check_room(result)
        follow = self.follows(lookup, path, size) and not oflags & OFLAGS_EXCL
        parent, name, slash = resolve_path(directory.fd, self.path(path, size), follow)
        try:
            if slash and oflags & OFLAGS_CREAT:
                raise WasiError("EISDIR")
            fd = open_at(parent, name, oflags | slash * OFLAGS_DIRECTORY, base, fdflags)
        finally:
            os.close(parent)
        descriptor = Descriptor(fd, base & directory.inheriting & applicable_rights(fd), inheriting & directory.inheriting,
                                flags=fdflags & ~(FDFLAGS_APPEND | FDFLAGS_NONBLOCK))
        self.store("I", result, self.insert(descriptor))

    def follows(self, lookup, path, size):
        """Whether a lookup follows a link in the last place: if told to, or if there is a
        slash behind it, as path_resolution(7) has it."""
        if lookup & ~LOOKUP_SYMLINK_FOLLOW:
            raise WasiError("EINVAL")
        return bool(lookup) or bytes(self.bytes_at(path, size)[-1:]) == b"/"

    def at(self, number, right, path, size, operation, follow=False, creates=None):
        """operation(parent descriptor, name) on a resolved path. With a slash at its end the
        entry must be a directory, or become one."""
        parent, name, slash = resolve_path(self.directory(number, RIGHTS[right]).fd, self.path(path, size), follow)
        try:
            status = status_at(parent, name) if slash else None
            if status and filetype(status) != DIRECTORY:
                raise WasiError("ENOTDIR")
            if slash and not status and creates != DIRECTORY:
                raise WasiError("ENOENT")
            return operation(parent, name)
        finally:
            os.close(parent)

    def path_create_directory(self, number, path, size):
        self.at(number, "path_create_directory", path, size, creates=DIRECTORY,
                operation=lambda parent, name: os.mkdir(name, dir_fd=parent))

    def path_remove_directory(self, number, path, size):
        self.at(number, "path_remove_directory", path, size, lambda parent, name: os.rmdir(name, dir_fd=parent))

    def path_unlink_file(self, number, path, size):
        self.at(number, "path_unlink_file", path, size, lambda parent, name: os.unlink(name, dir_fd=parent))

    def path_filestat_get(self, number, lookup, path, size, result):
        self.store_filestat(result, self.at(
            number, "path_filestat_get", path, size, follow=self.follows(lookup, path, size),
            operation=lambda parent, name: os.stat(name, dir_fd=parent, follow_symlinks=False)))

    def path_filestat_set_times(self, number, lookup, path, size, atime, mtime, flags):
        def operation(parent, name):
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            os.utime(name, **new_times(status, atime, mtime, flags), dir_fd=parent, follow_symlinks=False)
        self.at(number, "path_filestat_set_times", path, size, operation, self.follows(lookup, path, size))

    def path_readlink(self, number, path, size, buffer, room, result):
        target = self.at(number, "path_readlink", path, size, follow=self.follows(0, path, size),
                         operation=lambda parent, name: os.readlink(name, dir_fd=parent))[:room]
        self.bytes_at(buffer, len(target))[:] = target
        self.store("I", result, len(target))

    def path_symlink(self, target, target_size, number, path, size):
        target = self.path(target, target_size)
        if target.startswith(b"/"):
            raise WasiError("EPERM")
        self.at(number, "path_symlink", path, size, lambda parent, name: os.symlink(target, name, dir_fd=parent))

    def path_link(self, number, lookup, path, size, to, to_path, to_size):
        self.at(number, "path_link_source", path, size, follow=self.follows(lookup, path, size),
                operation=lambda source, old: self.at(
                    to, "path_link_target", to_path, to_size,
                    lambda parent, name: os.link(old, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)))

    def path_rename(self, number, path, size, to, to_path, to_size):
        def operation(source, old):
            status = status_at(source, old)
            self.at(to, "path_rename_target", to_path, to_size, creates=status and filetype(status),
                    operation=lambda parent, name: os.rename(old, name, src_dir_fd=source, dst_dir_fd=parent))
        self.at(number, "path_rename_source", path, size, operation)

    # -- polling --

    def poll_oneoff(self, subscriptions, events, count, result):
        """Waits for clocks and descriptors in poll(2) until at least one event is there."""
        if not 0 < count <= MAX_DESCRIPTORS:
            raise WasiError("EINVAL")
        self.bytes_at(events, 32 * count)
        clocks, files, ready = [], [], []
        for index in range(count):
            self.subscribe(subscriptions + self.SUBSCRIPTION_BYTES * index, clocks, files, ready)
        wanted = {}
        for _, tag, fd in files:
            wanted[fd] = wanted.get(fd, 0) | (select.POLLIN if tag == EVENT_READ else select.POLLOUT)
        while True:
            seconds = [0] if ready else [(end - time.clock_gettime_ns(clock)) / 1e9 for _, clock, end in clocks]
            happened = wait_for(wanted, min(seconds, default=None))
            ready += [file_event(userdata, tag, fd, happened[fd]) for userdata, tag, fd in files
                      if happened.get(fd, 0) & (~select.POLLOUT if tag == EVENT_READ else ~select.POLLIN)]
            ready += [(userdata, 0, EVENT_CLOCK, 0, 0) for userdata, clock, end in clocks if end <= time.clock_gettime_ns(clock)]
            if ready:
                break
        for index, event in enumerate(ready):
            self.store("QHB5xQH6x", events + 32 * index, *event)
        self.store("I", result, len(ready))

    def subscribe(self, address, clocks, files, ready):
        """Reads one subscription: (userdata, clock, end in ns), (userdata, tag, fd), or for a
        bad descriptor an event with its errno."""
        userdata, tag = struct.unpack_from("<QB", self.memory.view, address)
        if tag == EVENT_CLOCK:
            number, timeout, _, flags = struct.unpack_from("<I4xQQH", self.memory.view, address + self.SUBSCRIPTION_CLOCK)
            if self.clock(number) not in (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC):
                raise WasiError("ENOTSUP")
            if not flags & SUBSCRIPTION_CLOCK_ABSTIME:  # a span of time, whatever happens to the wall clock
                number, timeout = CLOCK_MONOTONIC, timeout + time.monotonic_ns()
            clocks.append((userdata, self.clock(number), timeout))
        elif tag in (EVENT_READ, EVENT_WRITE):
            number, = struct.unpack_from("<I", self.memory.view, address + 16)
            try:
                files.append((userdata, tag, self.descriptor(number, RIGHTS["poll_fd_readwrite"]).fd))
            except WasiError as error:
                ready.append((userdata, WASI_ERRNO[error.args[0]], tag, 0, 0))
        else:
            raise WasiError("EINVAL")

    # -- sockets --

    def socket(self, number, right, operation):
        """operation(socket object) on a descriptor that is a socket."""
        if self.descriptor(number).filetype != STREAM_SOCKET:
            raise WasiError("ENOTSOCK")
        socket = self.socket_type(fileno=self.descriptor(number, RIGHTS[right]).fd)
        try:
            return operation(socket)
        finally:
            socket.detach()

    def sock_accept(self, number, flags, result):
        if flags & ~FDFLAGS_NONBLOCK:
            raise WasiError("EINVAL")
        self.check_room(result)
        fd, _ = self.socket(number, "sock_accept", lambda socket: socket._accept())
        os.set_blocking(fd, not flags)
        self.store("I", result, self.insert(Descriptor(fd, CONNECTION_RIGHTS)))

    def sock_recv(self, number, iovs, count, flags, size, oflags):
        if flags & ~(RECV_PEEK | RECV_WAITALL):
            raise WasiError("EINVAL")
        flags = (MSG_PEEK if flags & RECV_PEEK else 0) | (MSG_WAITALL if flags & RECV_WAITALL else 0)
        received, _, happened, _ = self.socket(
            number, "fd_read", lambda socket: socket.recvmsg_into(self.buffers(iovs, count), 0, flags))
        self.store("I", size, received)
        self.store("H", oflags, RECV_DATA_TRUNCATED if happened & MSG_TRUNC else 0)

    def sock_send(self, number, iovs, count, flags, size):
        if flags:
            raise WasiError("EINVAL")
        self.store("I", size, self.socket(
            number, "fd_write", lambda socket: socket.sendmsg(self.buffers(iovs, count), (), MSG_NOSIGNAL)))

    def sock_shutdown(self, number, how):
        self.socket(number, "sock_shutdown", lambda socket: socket.shutdown(shutdown_how(how)))


class WasiFunctions(dict):
    """{name: HostFunction} of a Wasi; each is made when a module asks for it, and few do for many."""

    def __init__(self, wasi):
        self.wasi = wasi

    def __missing__(self, name):
        self[name] = function = self.wasi.host_function(name, WASI_FUNCTIONS[name])
        return function


class WasiUnstable(Wasi):
    """wasi_unstable, the snapshot before preview 1: the same functions with another order
    of whence, a shorter filestat and a longer subscription."""

    WHENCE = (SEEK_CUR, SEEK_END, SEEK_SET)
    FILESTAT = "QQB3xIQQQQ"
    SUBSCRIPTION_BYTES, SUBSCRIPTION_CLOCK = 56, 24

    def __init__(self, wasi):
        self.__dict__ = wasi.__dict__   # one guest, one state


def open_preopen(host):
    """The descriptor of a directory to preopen; OSError names it."""
    fd = os.open(host, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        check_filesystem(fd)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, error.filename or host) from None
    return fd


def open_at(parent, name, oflags, base, fdflags):
    """Opens a file for path_open, as far as its rights demand. What a guest must not have
    is told before: opening a watchdog starts it. And after: the entry may have changed.
    O_NONBLOCK until then: a FIFO or a device must not hang us."""
    writing, reading = base & WRITING_RIGHTS, base & READING_RIGHTS
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | host_flags(FDFLAGS, fdflags) | host_flags(OFLAGS, oflags)
    flags |= os.O_RDWR if writing and reading else os.O_WRONLY if writing else os.O_RDONLY
    status = status_at(parent, name)
    if status:
        check_device(status)
    try:
        fd = os.open(name, flags, 0o666, dir_fd=parent)
    except IsADirectoryError:           # guests ask for every right to a directory, too
        if oflags & (OFLAGS_CREAT | OFLAGS_TRUNC) or base & RIGHTS["fd_write"] and not base & RIGHTS["fd_readdir"]:
            raise
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        check_device(os.fstat(fd))
        check_filesystem(fd)
        if not fdflags & FDFLAGS_NONBLOCK:
            os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def close_descriptor(descriptor):
    """close(2); the numbers of the standard streams stay taken."""
    if descriptor.fd <= 2:
        plug(descriptor.fd)
    else:
        os.close(descriptor.fd)


def file_offset(value):
    """A filesize as off_t; EINVAL where it does not fit."""
    if value >> 63:
        raise WasiError("EINVAL")
    return value


def host_flags(table, bits):
    """open(2)'s flags of WASI's fdflags or oflags."""
    flags = 0
    for bit, flag in table:
        if bits & bit:
            flags |= flag
    return flags


def new_times(status, atime, mtime, flags):
    """os.utime's times by fstflags: bit 0 atime, 1 atime now, 2 mtime, 3 mtime now. Both now is
    what anybody may set who may write, by no time of ours: utimensat(2)."""
    if flags > 15 or flags & 3 == 3 or flags & 12 == 12:
        raise WasiError("EINVAL")
    if flags == 10:
        return {"times": None}
    now = time.time_ns()
    return {"ns": (atime if flags & 1 else now if flags & 2 else status.st_atime_ns,
                   mtime if flags & 4 else now if flags & 8 else status.st_mtime_ns)}


def directory_entries(fd):
    """[(name, inode, file type)] of a directory, . and .. first."""
    inode = os.fstat(fd).st_ino
    entries = [(b".", inode, DIRECTORY), (b"..", inode, DIRECTORY)]     # above is none of the guest's business
    with os.scandir(fd) as scan:
        for entry in scan:
            entries.append((file_bytes(entry.name), entry.inode(), entry_type(entry)))
    return entries


def entry_type(entry):
    """The WASI file type of an os.DirEntry, without a system call for the usual ones."""
    if entry.is_file(follow_symlinks=False):
        return REGULAR_FILE
    if entry.is_dir(follow_symlinks=False):
        return DIRECTORY
    if entry.is_symlink():
        return SYMBOLIC_LINK
    try:
        return filetype(entry.stat(follow_symlinks=False))
    except FileNotFoundError:
        return 0                        # deleted meanwhile


def wait_for(wanted, seconds):
    """{fd: revents} of poll(2) on {fd: events} after at most `seconds` (None: for ever), and
    at most an hour: whoever waits longer asks again. poll counts in milliseconds: without
    descriptors it is a sleep, which is exact."""
    seconds = MAX_SLEEP_SECONDS if seconds is None else max(0, min(seconds, MAX_SLEEP_SECONDS))
    if not wanted:
        time.sleep(seconds)
        return {}
    poll = select.poll()
    for fd, events in wanted.items():
        poll.register(fd, events)
    return dict(poll.poll(seconds * 1000))


def file_event(userdata, tag, fd, revents):
    """poll_oneoff's event of a descriptor: (userdata, errno, tag, bytes, flags)."""
    return userdata, 0, tag, bytes_available(fd) if tag == EVENT_READ else 1, int(bool(revents & select.POLLHUP))


def bytes_available(fd):
    """How many bytes a read would yield: FIONREAD, or what is left of a file."""
    status = os.fstat(fd)
    if filetype(status) == REGULAR_FILE:
        return max(0, status.st_size - os.lseek(fd, 0, SEEK_CUR))
    try:
        return unpack_u32(fcntl.ioctl(fd, FIONREAD, bytes(4)))[0]
    except OSError:
        return 1                        # a listening socket, a terminal that was hung up


def shutdown_how(how):
    """shutdown(2)'s argument of sdflags."""
    if how not in SHUTDOWN_HOW:
        raise WasiError("EINVAL")
    return SHUTDOWN_HOW[how]


# -- commands --

RECURSION_LIMIT = 20000                 # of Python's frames; where guests nest calls, the stack is measured
EXIT_TRAP = 134                         # 128 + SIGABRT, as an aborted program


def load_engine():
    """Nothing; but in the archive, the first call of this loads all that guests need."""


def run_command(data, arguments, environment, preopens, function="_start", preloads=(), listeners=(),
                trace=False, fuel=None, timeout=None, tier=None):
    """Runs a WASI command module, bytes or a Module, and returns its exit status:
    proc_exit's, 0 at the function's return, EXIT_TRAP for a trap or a bad module. What went
    wrong is on stderr. Another function than _start takes the arguments as its parameters
    and its results are printed. `preloads` is a list of (module name, bytes). `trace`
    writes every instruction to stderr; after `fuel` instructions or `timeout` seconds the
    guest traps. `tier` is one of MODES."""
    import gc
    default_signals()
    sys.setrecursionlimit(RECURSION_LIMIT)
    gc.set_threshold(10000, 10, 10)     # from 700: what is translated stays, and would be gone over again and again
    translator = instrument(report if trace else None, fuel and [fuel, fuel]) if trace or fuel else None
    wasi = Wasi(arguments, environment, preopens, listeners)
    imports = {"wasi_snapshot_preview1": wasi.imports(), "wasi_unstable": WasiUnstable(wasi).imports()}
    try:
        if tier:
            Module.tier = choose_tier(tier)
        try:
            if timeout:
                start_timer(timeout)
            module = data if data.__class__ is Module else Module(data)
            module.translator = translator
            for name, preload in preloads:
                imports[name] = preloaded(name, preload, imports, translator)
            return run_export(wasi, module, imports, function, arguments[1:])
        finally:
            if timeout:
                stop_timer()            # it interrupts the guest, not what comes after
    except Exit as exit:
        return exit_status(exit.args[0])
    except (Trap, Thrown) as trap:
        report("error: trap: %s" % trap)
        for depth, (name, offset) in enumerate(backtrace_of(trap)):
            report("  %2d: %#10x - %s" % (depth, offset, name))
        if len(trap.backtrace) > MAX_BACKTRACE:
            report("  … and %d more" % (len(trap.backtrace) - MAX_BACKTRACE))
    except (Malformed, Invalid, Unlinkable) as error:
        report("error: %s: %s" % (error.__class__.__name__.lower(), error))
    except MemoryError:
        report("error: not enough memory for the module")
    return EXIT_TRAP


def preloaded(name, data, imports, translator):
    """The exports of a module that is to satisfy imports; an error tells which one it was."""
    try:
        module = Module(data)
        module.translator = translator
        return Instance(module, imports).exports
    except (Malformed, Invalid, Unlinkable) as error:
        raise error.__class__("preload %s: %s" % (name, error)) from None


def start_timer(seconds):
    """A trap wherever the guest then is. Python drops exceptions in some places, so there
    is another one each second until it was heard."""
    import _signal

    def expired(number, frame):
        raise Timeout("timeout after %g s" % seconds)
    _signal.signal(_signal.SIGALRM, expired)
    Tier.hears_signals = True
    _signal.setitimer(_signal.ITIMER_REAL, seconds, 1)


def stop_timer():
    import _signal
    _signal.setitimer(_signal.ITIMER_REAL, 0)


def run_export(wasi, module, imports, function, words):
    """Instantiates the module and calls the function; returns 0."""
    kind, index = module.exports.get(function, (None, None))
    if kind != "func":
        raise Unlinkable("the module exports no function %r%s" % (
            function, "; name one with --invoke, in a container by PROGRAM#NAME" if function == "_start" else ""))
    type = module.function_type(index)
    if function == "_start":
        words = ()                      # are WASI's arguments
    if len(words) != len(type.params):
        raise Unlinkable("function %r takes %d arguments" % (function, len(type.params)))
    values = [parse_value(*pair) for pair in zip(type.params, words)]
    start, module.start = module.start, None    # it may call WASI, which needs the memory
    instance = Instance(module, imports)
    kind, index = module.exports.get("memory", ("memory", 0))
    if kind == "memory" and index < len(instance.memories):
        wasi.memory = instance.memories[index]
    if start is not None:
        execute_any(instance.functions[start], [])
    results = execute_any(instance.exports[function], values)
    if results and function != "_start":
        os.write(1, b"%s\n" % " ".join(value_of(*pair) for pair in zip(type.results, results)).encode())
    return 0


def parse_value(type, word):
    """A word of the command line as an argument of a function. An integer may be signed or not."""
    try:
        if type not in (I32, I64):
            return to_value(type, float(word))
        number, bits = int(word, 0), 32 if type == I32 else 64
        if not -1 << bits - 1 <= number < 1 << bits:
            raise ValueError
        return to_value(type, number)
    except (TypeError, ValueError):
        raise Unlinkable("%r is no %s" % (word, type_name(type))) from None


def exit_status(code):
    """proc_exit's u32 as the eight bits that a process has; failure never becomes success."""
    return code & 0xFF or (255 if code else 0)


def default_signals():
    """What Python changes for itself: the guest is interrupted, and dies of a closed pipe or
    a file that RLIMIT_FSIZE forbids, as a program of C does, and as in a container."""
    import _signal
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:    # not ignored, as under nohup(1)
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


STREAMS = ("standard input", "standard output", "standard error")


def write_lines(lines):
    """Lines on stdout, without control characters; an OSError that names it."""
    try:
        with open(1, "wb", closefd=False) as out:
            for line in lines:
                out.write((printable(line) + "\n").encode("utf-8", "replace"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, STREAMS[1]) from None


def report(text):
    """One line on stderr, bounded and without control characters."""
    try:
        os.write(2, (printable(text[:1000]) + "\n").encode("utf-8", "replace"))
    except OSError:
        pass                            # nobody listens


def reason(error):
    """What people read of an error: an OSError's file, if it knows one, and text."""
    if not isinstance(error, OSError):
        return str(error)
    return (error.filename + ": " if isinstance(error.filename, str) else "") + (error.strerror or str(error))


def printable(text):
    """A text without control characters, which a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


# === 18. Linux ================================================================
#
# What the shim asks of the kernel and Python's `os` does not have: mounts, mount
# tables, paths inside a container, processes, and an event loop. The loop is the
# program's only thread: a thread next to a fork is a deadlock waiting for its day.

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x80, 0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC = (
    1, 2, 4, 8, 16, 32, 64, 128)
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_SILENT, MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = (
    1 << 10, 1 << 11, 1 << 12, 1 << 14, 1 << 15, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
MS_NOSYMFOLLOW, MS_MOVE, MS_RELATIME, MS_I_VERSION, MS_STRICTATIME, MS_LAZYTIME = (
    1 << 8, 1 << 13, 1 << 21, 1 << 23, 1 << 24, 1 << 25)
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_CAPBSET_DROP = 1, 4, 8, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_SET_NAME = 36, 38, 47, 15
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
CAPABILITY_VERSION_3 = 0x20080522
MAX_WAIT_S = 0x7FFFFFFF // 1000         # at once: epoll_wait(2) and poll(2) count milliseconds in an int
RESOLVE_NO_XDEV, RESOLVE_IN_ROOT = 0x01, 0x10
PROC_ROOT_INO = 1                       # the root directory's of any proc file system
O_PATH = os.O_PATH

SIGHUP, SIGINT, SIGKILL, SIGPIPE, SIGTERM, SIGCHLD = 1, 2, 9, 13, 15, 17
CAPABILITIES = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE
    SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL
    SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()


def mount(source, target, type=None, flags=0, data=None):
    """mount(2); the error names the target."""
    try:
        libc.mount(file_bytes(source or "none"), file_bytes(target), file_bytes(type) if type else None, flags,
                   file_bytes(data) if data else None)
    except OSError as error:
        raise OSError(error.errno, "mount %s at %s: %s" % (source or type, target, os.strerror(error.errno))) from None


def umount(target, flags=MNT_DETACH):
    """umount2(2)"""
    libc.umount2(file_bytes(target), flags)


def unmount_all(prefix):
    """Detaches every mount at `prefix` and below, the last one first; none is no error."""
    for _ in range(64):                 # over-mounts: one layer at each round
        targets = [m.mountpoint for m in mount_table() if m.mountpoint == prefix or m.mountpoint.startswith(prefix + "/")]
        if not targets:
            return
        for target in reversed(targets):
            try:
                umount(target, MNT_DETACH | UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):
                    raise


class MountEntry:
    """A line of /proc/self/mountinfo: proc_pid_mountinfo(5)."""

    __slots__ = ("mountpoint", "options", "propagation", "type", "super_options")

    def __init__(self, line):
        left, _, right = line.partition(" - ")
        left = left.split(" ")
        self.mountpoint, self.options, self.propagation = unescape(left[4]), left[5].split(","), left[6:]
        right = right.split(" ")
        self.type, self.super_options = right[0], right[2].split(",")


def unescape(text):
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    if "\\" not in text:
        return text
    pieces = text.split("\\")
    return pieces[0] + "".join(chr(int(p[:3], 8)) + p[3:] for p in pieces[1:])


def mount_table():
    """The mounts of this mount namespace, in the order they were made."""
    with open("/proc/self/mountinfo", errors="surrogateescape", newline="\n") as file:     # a name may hold a \r
        return [MountEntry(line.rstrip("\n")) for line in file]


def close_all_but(*keep):
    """Closes the descriptors around those to keep: only those reach the container (N4). It ends at the
    highest: musl, and Linux before 5.9, have no close_range(2), and Python closes one by one."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    first = 0
    for fd in sorted({*keep, highest + 1}):
        if first < fd:                  # an empty range would wrap round to all
            os.closerange(first, fd)
        first = fd + 1


def process_start_time(pid):
    """A process's start in clock ticks since boot (field 22 of proc_pid_stat(5)), which
    with the pid identifies it for ever; None if there is no such process."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:         # bytes: the name is anything, or ends within a character
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def read_text(path, default=None):
    """A small file's text, stripped; the default if it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read().strip()
    except OSError:
        if default is None:
            raise
        return default


def write_text(path, text):
    """Writes a small file in one write(2), as the kernel's files want it; the error names the file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, file_bytes(text))
    except OSError as error:
        raise OSError(error.errno, "write %r to %s: %s" % (text[:80], path, error.strerror)) from None
    finally:
        os.close(fd)


def open_in_root(root, path, flags=O_PATH, resolve=0):
    """Opens `path` as a process sees it whose root directory is the descriptor `root`:
    symlinks and `..` cannot lead out, magic links are refused. openat2(2), or before
    Linux 5.6 component by component, and without what `resolve` adds."""
    name = file_bytes(path.lstrip("/") or ".")
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve)
    for _ in range(64):                 # EAGAIN: something was renamed on the way
        try:
            return libc.syscall(SYS_OPENAT2, root, name, how, len(how))
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EPERM):
                return walk_in_root(root, path, flags)
            if error.errno != errno.EAGAIN:
                raise OSError(error.errno, "open %s in the container: %s" % (path, os.strerror(error.errno))) from None
    raise OSError(errno.EAGAIN, "open %s in the container: somebody keeps renaming directories" % path)


def walk_in_root(root, path, flags=O_PATH):
    """open_in_root without openat2: a descriptor for each directory on the way, so that
    nothing is looked up twice."""
    parents = [os.dup(root)]
    rest = path.split("/")[::-1]
    links = 0
    try:
        while rest:
            name = rest.pop()
            if name in ("", "."):
                continue
            if name == "..":
                if len(parents) > 1:
                    os.close(parents.pop())
                continue
            fd = os.open(name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parents[-1])
            parents.append(fd)
            kind = os.fstat(fd).st_mode & 0o170000
            if kind == 0o120000:
                target = os.readlink("", dir_fd=fd)
                os.close(parents.pop())
                links += 1
                if links > MAX_SYMLINKS:
                    raise OSError(errno.ELOOP, "")
                if target.startswith("/"):
                    while len(parents) > 1:
                        os.close(parents.pop())
                rest += target.split("/")[::-1]
            elif rest and kind != 0o040000:
                raise OSError(errno.ENOTDIR, "")
        if flags & O_PATH:
            return os.dup(parents[-1])
        return os.open("/proc/self/fd/%d" % parents[-1], flags | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, "open %s in the container: %s" % (path, os.strerror(error.errno))) from None
    finally:
        for fd in parents:
            os.close(fd)


class Loop:
    """An event loop over epoll(7) whose tasks are generators. A generator yields what it
    waits for as (what, seconds): `what` is ("r", fd), ("w", fd), an Event or None, and
    seconds may be None; it receives True when that happened and False after the time."""

    def __init__(self, forgiving=False):
        self.forgiving = forgiving      # a task that fails is logged, and the others go on
        self.epoll = select.epoll()
        self.waiting = {}               # fd -> {"r" or "w": resume}
        self.timers = []                # sorted (time, serial, resume)
        self.serial = 0
        self.ready = []                 # (generator, value) to run

    def spawn(self, generator):
        """Runs a generator from the next turn of the loop on."""
        self.ready.append((generator, None))

    def run(self, finished):
        """Turns until the function `finished` returns true."""
        while True:
            while self.ready:
                generator, value = self.ready.pop(0)
                try:
                    self.step(generator, value)
                except Exception:
                    if not self.forgiving:
                        raise
                    log_exception()
            if finished():
                return
            timeout = min(max(0, self.timers[0][0] - time.monotonic()), MAX_WAIT_S) if self.timers else None
            for fd, events in self.epoll.poll(timeout):
                self.wake(fd, events)
            while self.timers and self.timers[0][0] <= time.monotonic():
                self.timers.pop(0)[2](False)

    def step(self, generator, value):
        """Runs a generator up to its next wait."""
        try:
            what, seconds = generator.send(value)
        except StopIteration:
            return
        armed = [True]

        def resume(value):
            if armed[0]:
                armed[0] = False
                self.disarm(what, timer, resume)
                self.ready.append((generator, value))
        timer = None
        if seconds is not None:
            self.serial += 1
            timer = (time.monotonic() + seconds, self.serial, resume)
            self.timers.append(timer)
            self.timers.sort(key=lambda entry: entry[:2])
        if what.__class__ is Event:
            if what.set:
                resume(True)
            else:
                what.waiters.append(resume)
        elif what is not None:
            self.watch(what[1], what[0], resume)

    def watch(self, fd, direction, resume):
        """Has `resume` called once when the descriptor is ready."""
        slots = self.waiting.setdefault(fd, {})
        if direction in slots:
            raise AssertionError("two waits for one descriptor")
        slots[direction] = resume
        self.arm(fd, slots, new=len(slots) == 1)

    def arm(self, fd, slots, new=False):
        """Tells epoll what is waited for."""
        mask = (select.EPOLLIN if "r" in slots else 0) | (select.EPOLLOUT if "w" in slots else 0)
        try:
            if not slots:
                del self.waiting[fd]
                self.epoll.unregister(fd)
            elif new:
                self.epoll.register(fd, mask)
            else:
                self.epoll.modify(fd, mask)
        except PermissionError:         # a regular file: always ready
            for resume in list(slots.values()):
                resume(True)
        except OSError as error:        # closed meanwhile, which removed it; the number may be another file's
            if new or error.errno not in (errno.EBADF, errno.ENOENT):
                raise

    def disarm(self, what, timer, resume):
        """Forgets a wait that is over."""
        if timer in self.timers:
            self.timers.remove(timer)
        if what.__class__ is Event:
            if resume in what.waiters:
                what.waiters.remove(resume)
        elif what is not None and what[0] in self.waiting.get(what[1], ()):
            slots = self.waiting[what[1]]
            del slots[what[0]]
            self.arm(what[1], slots)

    def wake(self, fd, events):
        """Resumes those that wait for the descriptor; an error or hang-up wakes both sides."""
        slots = self.waiting.get(fd, {})
        failed = events & (select.EPOLLERR | select.EPOLLHUP)
        for direction, bit in (("r", select.EPOLLIN), ("w", select.EPOLLOUT)):
            if direction in slots and (events & bit or failed):
                slots[direction](True)

    def close(self, fd):
        """close(2). Whoever waits for the descriptor is resumed: its number may soon be another file's."""
        for resume in list(self.waiting.get(fd, {}).values()):
            resume(True)
        os.close(fd)


class Event:
    """Something that happens once; any number of tasks may wait for it."""

    __slots__ = ("set", "waiters")

    def __init__(self):
        self.set = False
        self.waiters = []

    def happen(self):
        """Wakes all who wait, now and later."""
        self.set = True
        for resume in list(self.waiters):
            resume(True)


def readable(fd, seconds=None):
    """What a task yields to wait until a read would not block."""
    return ("r", fd), seconds


def writable(fd, seconds=None):
    """What a task yields to wait until a write would not block."""
    return ("w", fd), seconds


def seconds_until(deadline):
    """The time that is left before a time.monotonic(); None is never."""
    return None if deadline is None else max(0, deadline - time.monotonic())


def write_all(fd, data, deadline=None):
    """A task that writes all of `data` to a non-blocking descriptor; OSError passes. False if
    the deadline came first."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view):]
        except BlockingIOError:
            if not (yield writable(fd, seconds_until(deadline))):
                return False
    return True


def local_socket():
    """A stream socket for paths: unix(7)."""
    import _socket
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)


def connect_to(path):
    """A non-blocking descriptor of a connection to a local socket: accepted or refused at once, also
    where too many wait."""
    peer = local_socket()
    peer.setblocking(False)
    try:
        peer.connect(path)
    except OSError:
        peer.close()
        raise
    return peer.detach()


def log(text):
    """A line for containerd's log (stderr is the bundle's log fifo), bounded and printable."""
    report("chibishim: " + text)


def log_exception():
    """Where in this module the exception that is being handled was raised, and what it is. By nothing that is
    still to be imported: there may be no descriptor left."""
    _, error, place = sys.exc_info()
    while place:
        log("line %d, in %s" % (place.tb_lineno, place.tb_frame.f_code.co_name))
        place = place.tb_next
    log("%s: %s" % (error.__class__.__name__, error))


# === 19. OCI configuration ====================================================
#
# config.json (OCI runtime specification 1.3) in, a list of set-up operations out.
# Nothing here touches the system: what will be done to it can be read, and tested,
# as data. The file is trusted, yet a field of the wrong type is an error that names
# it, and a restriction that this module cannot apply makes Create fail: to drop it
# silently would be a vulnerability.

# Every field: its type and what becomes of it. string, int, bool, object, map (of
# strings), a type in brackets for a list; a name with [] is a list, one with {} an
# object with names of the user's. applied; refused where it asks for something;
# ignored, because it is cosmetic or asks for nothing on Linux.
OCI_FIELDS = """
ociVersion string applied
hostname string applied
domainname string applied
annotations map applied
root.path string applied
root.readonly bool applied
mounts[].destination string applied
mounts[].type string applied
mounts[].source string applied
mounts[].options [string] applied
mounts[].uidMappings[].containerID int applied
mounts[].uidMappings[].hostID int applied
mounts[].uidMappings[].size int applied
mounts[].gidMappings[].containerID int applied
mounts[].gidMappings[].hostID int applied
mounts[].gidMappings[].size int applied
process.terminal bool applied
process.consoleSize.height int applied
process.consoleSize.width int applied
process.cwd string applied
process.env [string] applied
process.args [string] applied
process.commandLine string ignored
process.user.uid int applied
process.user.gid int applied
process.user.umask int applied
process.user.additionalGids [int] applied
process.user.username string ignored
process.rlimits[].type string applied
process.rlimits[].soft int applied
process.rlimits[].hard int applied
process.noNewPrivileges bool applied
process.oomScoreAdj int applied
process.capabilities.bounding [string] applied
process.capabilities.effective [string] applied
process.capabilities.inheritable [string] applied
process.capabilities.permitted [string] applied
process.capabilities.ambient [string] applied
process.apparmorProfile string applied
process.selinuxLabel string applied
process.ioPriority.class string applied
process.ioPriority.priority int applied
process.scheduler.policy string applied
process.scheduler.nice int applied
process.scheduler.priority int applied
process.scheduler.flags [string] applied
process.scheduler.runtime int applied
process.scheduler.deadline int applied
process.scheduler.period int applied
process.execCPUAffinity.initial string applied
process.execCPUAffinity.final string applied
hooks.prestart[].path string applied
hooks.prestart[].args [string] applied
hooks.prestart[].env [string] applied
hooks.prestart[].timeout int applied
hooks.createRuntime[].path string applied
hooks.createRuntime[].args [string] applied
hooks.createRuntime[].env [string] applied
hooks.createRuntime[].timeout int applied
hooks.createContainer[].path string applied
hooks.createContainer[].args [string] applied
hooks.createContainer[].env [string] applied
hooks.createContainer[].timeout int applied
hooks.startContainer[].path string applied
hooks.startContainer[].args [string] applied
hooks.startContainer[].env [string] applied
hooks.startContainer[].timeout int applied
hooks.poststart[].path string applied
hooks.poststart[].args [string] applied
hooks.poststart[].env [string] applied
hooks.poststart[].timeout int applied
hooks.poststop[].path string applied
hooks.poststop[].args [string] applied
hooks.poststop[].env [string] applied
hooks.poststop[].timeout int applied
linux.uidMappings[].containerID int applied
linux.uidMappings[].hostID int applied
linux.uidMappings[].size int applied
linux.gidMappings[].containerID int applied
linux.gidMappings[].hostID int applied
linux.gidMappings[].size int applied
linux.namespaces[].type string applied
linux.namespaces[].path string applied
linux.timeOffsets.monotonic.secs int applied
linux.timeOffsets.monotonic.nanosecs int applied
linux.timeOffsets.boottime.secs int applied
linux.timeOffsets.boottime.nanosecs int applied
linux.sysctl map applied
linux.cgroupsPath string applied
linux.devices[].path string applied
linux.devices[].type string applied
linux.devices[].major int applied
linux.devices[].minor int applied
linux.devices[].fileMode int applied
linux.devices[].uid int applied
linux.devices[].gid int applied
linux.netDevices object refused
linux.rootfsPropagation string applied
linux.maskedPaths [string] applied
linux.readonlyPaths [string] applied
linux.mountLabel string applied
linux.seccomp.defaultAction string applied
linux.seccomp.defaultErrnoRet int applied
linux.seccomp.architectures [string] applied
linux.seccomp.flags [string] applied
linux.seccomp.listenerPath string refused
linux.seccomp.listenerMetadata string refused
linux.seccomp.syscalls[].names [string] applied
linux.seccomp.syscalls[].action string applied
linux.seccomp.syscalls[].errnoRet int applied
linux.seccomp.syscalls[].args[].index int applied
linux.seccomp.syscalls[].args[].value int applied
linux.seccomp.syscalls[].args[].valueTwo int applied
linux.seccomp.syscalls[].args[].op string applied
linux.intelRdt object refused
linux.memoryPolicy object refused
linux.personality.domain string applied
linux.personality.flags [string] refused
linux.resources.devices[].allow bool applied
linux.resources.devices[].type string applied
linux.resources.devices[].major int applied
linux.resources.devices[].minor int applied
linux.resources.devices[].access string applied
linux.resources.memory.limit int applied
linux.resources.memory.reservation int applied
linux.resources.memory.swap int applied
linux.resources.memory.kernel int ignored
linux.resources.memory.kernelTCP int applied
linux.resources.memory.swappiness int applied
linux.resources.memory.disableOOMKiller bool applied
linux.resources.memory.useHierarchy bool ignored
linux.resources.memory.checkBeforeUpdate bool applied
linux.resources.cpu.shares int applied
linux.resources.cpu.quota int applied
linux.resources.cpu.burst int applied
linux.resources.cpu.period int applied
linux.resources.cpu.realtimeRuntime int applied
linux.resources.cpu.realtimePeriod int applied
linux.resources.cpu.cpus string applied
linux.resources.cpu.mems string applied
linux.resources.cpu.idle int applied
linux.resources.pids.limit int applied
linux.resources.blockIO.weight int applied
linux.resources.blockIO.leafWeight int applied
linux.resources.blockIO.weightDevice[].major int applied
linux.resources.blockIO.weightDevice[].minor int applied
linux.resources.blockIO.weightDevice[].weight int applied
linux.resources.blockIO.weightDevice[].leafWeight int applied
linux.resources.blockIO.throttleReadBpsDevice[].major int applied
linux.resources.blockIO.throttleReadBpsDevice[].minor int applied
linux.resources.blockIO.throttleReadBpsDevice[].rate int applied
linux.resources.blockIO.throttleWriteBpsDevice[].major int applied
linux.resources.blockIO.throttleWriteBpsDevice[].minor int applied
linux.resources.blockIO.throttleWriteBpsDevice[].rate int applied
linux.resources.blockIO.throttleReadIOPSDevice[].major int applied
linux.resources.blockIO.throttleReadIOPSDevice[].minor int applied
linux.resources.blockIO.throttleReadIOPSDevice[].rate int applied
linux.resources.blockIO.throttleWriteIOPSDevice[].major int applied
linux.resources.blockIO.throttleWriteIOPSDevice[].minor int applied
linux.resources.blockIO.throttleWriteIOPSDevice[].rate int applied
linux.resources.hugepageLimits[].pageSize string applied
linux.resources.hugepageLimits[].limit int applied
linux.resources.network.classID int applied
linux.resources.network.priorities[].name string applied
linux.resources.network.priorities[].priority int applied
linux.resources.rdma{}.hcaHandles int applied
linux.resources.rdma{}.hcaObjects int applied
linux.resources.unified map applied
solaris object ignored
windows object ignored
vm object ignored
zos object ignored
freebsd object ignored
"""

HOOK_POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
JSON_TYPES = {"string": str, "int": int, "bool": bool, "object": dict, "map": dict}
NAMESPACES = {                          # type -> (flag, file in /proc/PID/ns)
    "user": (CLONE_NEWUSER, "user"), "pid": (CLONE_NEWPID, "pid"), "network": (CLONE_NEWNET, "net"),
    "mount": (CLONE_NEWNS, "mnt"), "ipc": (CLONE_NEWIPC, "ipc"), "uts": (CLONE_NEWUTS, "uts"),
    "cgroup": (CLONE_NEWCGROUP, "cgroup"), "time": (CLONE_NEWTIME, "time"),
}
MOUNT_FLAGS = {                         # option -> (set or clear, flag): the specification's table, mount(8)
    "ro": (1, MS_RDONLY), "rw": (0, MS_RDONLY), "nosuid": (1, MS_NOSUID), "suid": (0, MS_NOSUID),
    "nodev": (1, MS_NODEV), "dev": (0, MS_NODEV), "noexec": (1, MS_NOEXEC), "exec": (0, MS_NOEXEC),
    "sync": (1, MS_SYNCHRONOUS), "async": (0, MS_SYNCHRONOUS), "dirsync": (1, MS_DIRSYNC),
    "mand": (1, MS_MANDLOCK), "nomand": (0, MS_MANDLOCK), "noatime": (1, MS_NOATIME), "atime": (0, MS_NOATIME),
    "nodiratime": (1, MS_NODIRATIME), "diratime": (0, MS_NODIRATIME), "relatime": (1, MS_RELATIME),
    "norelatime": (0, MS_RELATIME), "strictatime": (1, MS_STRICTATIME), "nostrictatime": (0, MS_STRICTATIME),
    "lazytime": (1, MS_LAZYTIME), "nolazytime": (0, MS_LAZYTIME), "silent": (1, MS_SILENT), "loud": (0, MS_SILENT),
    "iversion": (1, MS_I_VERSION), "noiversion": (0, MS_I_VERSION),
    "nosymfollow": (1, MS_NOSYMFOLLOW), "symfollow": (0, MS_NOSYMFOLLOW),
    "bind": (1, MS_BIND), "rbind": (1, MS_BIND | MS_REC), "remount": (1, MS_REMOUNT), "defaults": (1, 0),
}
PROPAGATION = {
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC, "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
    "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC, "unbindable": MS_UNBINDABLE, "runbindable": MS_UNBINDABLE | MS_REC,
}
NAMESPACED_SYSCTLS = {                  # name below /proc/sys, or its beginning -> namespace: namespaces(7)
    "net/": "network", "fs/mqueue/": "ipc", "kernel/hostname": "uts", "kernel/domainname": "uts",
    **{"kernel/" + name: "ipc" for name in "msgmax msgmnb msgmni sem shmall shmmax shmmni shm_rmid_forced".split()},
}
RECURSIVE_OPTIONS = {                   # option -> (attributes to set, to clear) of a mount and all below: mount_setattr(2)
    "rro": (1, 0), "rrw": (0, 1), "rnosuid": (2, 0), "rsuid": (0, 2), "rnodev": (4, 0), "rdev": (0, 4), "rnoexec": (8, 0),
    "rexec": (0, 8), "rnoatime": (0x10, 0x70), "rstrictatime": (0x20, 0x70),
    **dict.fromkeys(("rrelatime", "ratime", "rnorelatime", "rnostrictatime"), (0, 0x70)),       # the kernel's default is relatime
    "rnodiratime": (0x80, 0), "rdiratime": (0, 0x80), "rnosymfollow": (0x200000, 0), "rsymfollow": (0, 0x200000),
}
EXTENSIONS = ("idmap", "ridmap", "tmpcopyup")         # options of config.json's mounts that no kernel knows by name
DEVICE_NODES = (                        # path, major, minor: character devices that are always there
    ("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7),
    ("/dev/random", 1, 8), ("/dev/urandom", 1, 9), ("/dev/tty", 5, 0),
)
DEVICE_LINKS = (
    ("/proc/self/fd", "/dev/fd"), ("/proc/self/fd/0", "/dev/stdin"), ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"), ("pts/ptmx", "/dev/ptmx"),
)
DEVICE_TYPES = {"c": 0o020000, "u": 0o020000, "b": 0o060000, "p": 0o010000}
RLIMITS = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME".split()
CAPABILITY_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
MAX_ID = (1 << 32) - 2                  # uid_t -1 means "leave as it is"
NGROUPS_MAX = 65536                     # setgroups(2)
MAX_MAJOR, MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1         # of the kernel's dev_t


class ConfigError(Exception):
    """The configuration asks for something impossible; the text names the field."""


def parse_json(text, what):
    """A JSON text's value. The C scanner alone: the json module would import re."""
    try:
        from _json import make_scanner
        value, end = make_scanner(JsonContext)(text.strip(), 0)
        if end != len(text.strip()):
            raise ValueError("more text after the value")
        return value
    except (ValueError, StopIteration, RecursionError, SystemError) as error:
        if error.__class__ is SystemError:      # the scanner lacks the exception's module, so the error's place
            import json
            try:
                json.loads(text)
            except ValueError as found:
                error = found
        raise ConfigError("%s: not JSON: %s" % (what, str(error)[:200] or "no value")) from None


def parse_object(text, what):
    """A JSON text's value, which must be an object."""
    value = parse_json(text, what)
    if value.__class__ is not dict:
        raise ConfigError("%s is %s, not an object" % (what, value.__class__.__name__))
    return value


class JsonContext:
    """What _json.make_scanner wants to know of a decoder."""

    strict = False
    object_hook = object_pairs_hook = array_hook = None         # the last since Python 3.15
    parse_float, parse_int, parse_constant = float, int, float


def check_config(config):
    """Holds a parsed config.json against OCI_FIELDS: ConfigError for a field of the wrong
    type or one that is refused. Unknown fields are none of our business, as the
    specification demands."""
    check_fields(config, OCI_FIELDS, "", "config.json")
    process = config.get("process") or {}
    if not process.get("args"):
        raise ConfigError("config.json: process.args is empty: nothing to run")
    if not (process.get("cwd") or "/").startswith("/"):
        raise ConfigError("config.json: process.cwd %r is not absolute" % process["cwd"])
    if not (config.get("root") or {}).get("path"):
        raise ConfigError("config.json: root.path is missing")
    check_hooks(config.get("hooks") or {})


def check_hooks(hooks):
    """What the types of OCI_FIELDS do not say of hooks; a timeout of 0 is none."""
    for point in HOOK_POINTS:
        for index, hook in enumerate(hooks.get(point) or ()):
            where = "config.json: hooks.%s[%d]" % (point, index)
            if not (hook.get("path") or "").startswith("/"):
                raise ConfigError("%s.path %r is not absolute" % (where, hook.get("path")))
            if not 0 <= (hook.get("timeout") or 0) <= MAX_U32:
                raise ConfigError("%s.timeout: %d is no number of seconds" % (where, hook["timeout"]))


def check_fields(value, table, prefix, what):
    """check_config for the rows of the table at `prefix`."""
    for line in table.strip().splitlines():
        path, type, fate = line.split(" ")
        if path.startswith(prefix):
            check_field(value, path[len(prefix):], type, fate, "%s: %s" % (what, prefix))


def check_field(value, path, type, fate, where):
    """Follows one path of the table through the value, into every element of a list or object."""
    name, _, rest = path.partition(".")
    key = name[:-2] if name[-2:] in ("[]", "{}") else name
    if value.__class__ is not dict:
        raise ConfigError("%s is %s, not an object" % (where.rstrip(".") or where, value.__class__.__name__))
    value = value.get(key)
    where += key
    if value is None:
        return
    if name[-2:] == "{}":
        check_type(value, "object", where)
        for key, item in value.items():
            check_field(item, rest, type, fate, "%s.%s." % (where, key[:80]))
    elif name[-2:] == "[]":
        if value.__class__ is not list:
            raise ConfigError("%s is %s, not a list" % (where, value.__class__.__name__))
        for index, item in enumerate(value):
            check_field(item, rest, type, fate, "%s[%d]." % (where, index))
    elif rest:
        check_field(value, rest, type, fate, where + ".")
    elif fate == "refused" and value not in ("", [], {}, 0, False):
        raise ConfigError("%s is not supported, and dropping it silently would be unsafe: remove it from the configuration" % where)
    elif fate == "applied":
        check_type(value, type, where)


def check_type(value, type, where):
    """ConfigError if the value is not of the table's type; strings are is_text."""
    if type.startswith("["):
        if value.__class__ is not list:
            raise ConfigError("%s is %s, not a list" % (where, value.__class__.__name__))
        for index, item in enumerate(value):
            check_type(item, type[1:-1], "%s[%d]" % (where, index))
        return
    if value.__class__ is not JSON_TYPES[type]:
        raise ConfigError("%s is %s, not %s" % (where, value.__class__.__name__, type))
    strings = [value] if type == "string" else list(value) + list(value.values()) if type == "map" else ()
    for text in strings:
        if not is_text(text):
            raise ConfigError("%s holds something that is no string without NUL" % where)


def is_text(value):
    """Whether the kernel can take this: a string without NUL and without half a surrogate pair, which has no UTF-8."""
    try:
        return value.__class__ is str and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def namespaces(config):
    """{type: path or ""} of the namespaces to join (path) or to create ("")."""
    found = {}
    for item in (config.get("linux") or {}).get("namespaces") or ():
        name = item.get("type") or ""
        if name not in NAMESPACES:
            raise ConfigError("config.json: linux.namespaces: unknown type %r" % name)
        if name in found:
            raise ConfigError("config.json: linux.namespaces: %s appears twice" % name)
        found[name] = item.get("path") or ""
    return found


def id_mappings(config):
    """(uid map, gid map) of linux.uidMappings and gidMappings: rows of (id inside, id outside, how many)."""
    linux = config.get("linux") or {}
    return tuple(id_ranges(linux.get(name), "config.json: linux." + name) for name in ("uidMappings", "gidMappings"))


def id_ranges(items, where):
    """The rows of a uid_map: user_namespaces(7)."""
    rows = tuple(tuple(item.get(key) or 0 for key in ("containerID", "hostID", "size")) for item in items or ())
    for row in rows:
        if min(row) < 0 or not 0 < row[2] or max(row[:2]) + row[2] > MAX_ID + 1:
            raise ConfigError("%s: %d %d %d is no range of ids" % (where, *row))
    return rows


def check_user_namespace(config, spaces):
    """A user namespace is made with mappings, of id 0 among others: its root sets it up."""
    maps = id_mappings(config)
    if any(maps) and "user" not in spaces:
        raise ConfigError("config.json: linux.uidMappings and gidMappings need a user namespace in linux.namespaces")
    for name, rows in zip(("uidMappings", "gidMappings"), maps):
        if spaces.get("user") == "" and mapped_id(rows, 0) is None:
            raise ConfigError("config.json: linux.%s: a user namespace needs a mapping of id 0" % name)


def mapped_id(rows, inside):
    """The id outside of a user namespace; None if there is none."""
    return next((outside + inside - first for first, outside, size in rows if first <= inside < first + size), None)


def mount_options(words, where="mount"):
    """(flags, propagation flags, data) of mount option words."""
    flags = 0
    propagation = []
    data = []
    for word in words or ():
        if word in MOUNT_FLAGS:
            on, flag = MOUNT_FLAGS[word]
            flags = flags | flag if on else flags & ~flag
        elif word in PROPAGATION:
            propagation.append(PROPAGATION[word])
        elif word in EXTENSIONS or word in RECURSIVE_OPTIONS or word == "loop":
            raise ConfigError("%s: option %s is not supported" % (where, word))
        elif not word.startswith("X-") and not word.startswith("x-"):
            data.append(word)
    return flags, propagation, ",".join(data)


def plan(config, bundle, rootfs, user_namespace=False, pivot=True):
    """The operations, each (name, argument, …) for OPERATIONS, that turn a fresh child
    of the shim into the container's process, up to the guest's first instruction.
    `bundle` and `rootfs` are absolute paths; `user_namespace`: we are root in one only;
    `pivot`: pivot_root(2) works with the present root."""
    linux = config.get("linux") or {}
    process = config.get("process") or {}
    spaces = namespaces(config)
    check_user_namespace(config, spaces)
    sysctls = plan_sysctls(linux.get("sysctl") or {}, spaces)
    hook_steps = [("sync",), ("hooks", "createContainer")] if config.get("hooks") else []
    steps = plan_namespaces(spaces) + plan_time(linux, spaces)
    if "mount" in spaces and not spaces["mount"]:
        propagation = linux.get("rootfsPropagation") or "rslave"
        if propagation not in PROPAGATION:
            raise ConfigError("config.json: linux.rootfsPropagation: unknown value %r" % propagation)
        flags = PROPAGATION[propagation]
        if flags & MS_UNBINDABLE:       # only later: the new root is bind-mounted from the old one
            flags ^= MS_UNBINDABLE | MS_PRIVATE
        steps.append(("prepare_root", rootfs, flags))
        steps += plan_mounts(config, bundle, spaces, user_namespace)
        steps += plan_devices(config, user_namespace or "user" in spaces)
        if own_terminal(config, process):
            steps.append(("terminal", (process.get("user") or {}).get("uid") or 0, True))
        steps += hook_steps
        steps += sysctls
        steps += [("readonly", path) for path in linux.get("readonlyPaths") or ()]
        steps += [("mask", path) for path in linux.get("maskedPaths") or ()]
        if config["root"].get("readonly"):
            steps.append(("readonly_root", rootfs))
        steps.append(("pivot_root" if pivot else "move_root",))
        if PROPAGATION[propagation] & (MS_SHARED | MS_UNBINDABLE):
            steps.append(("propagation", PROPAGATION[propagation]))
    elif "mount" in spaces:
        check_joined_mounts(config)
        steps += hook_steps + sysctls + [("chroot", rootfs)]
    else:
        raise ConfigError("config.json: linux.namespaces: a container without a mount namespace would share the host's mounts")
    for name in ("hostname", "domainname"):
        if config.get(name):
            if "uts" not in spaces:
                raise ConfigError("config.json: %s needs an own uts namespace" % name)
            steps.append((name, config[name]))
    return plan_labels(process) + plan_mount_label(linux) + steps + [("cgroup",)] + plan_process(process, linux)


def check_joined_mounts(config):
    """A mount namespace that is joined stays as its owner made it; what asks for more is refused."""
    linux = config["linux"]
    for name, value in (("root.readonly", config["root"].get("readonly")), ("mounts", config.get("mounts")),
                        *(("linux." + key, linux.get(key)) for key in "devices maskedPaths readonlyPaths rootfsPropagation".split())):
        if value:
            raise ConfigError("config.json: %s: the mount namespace that linux.namespaces joins is not changed; remove one of both" % name)


def plan_namespaces(spaces):
    """Joining and creating namespaces; user and pid namespaces are the forking parent's business."""
    steps = []
    flags = 0
    for name, path in spaces.items():
        if name in ("pid", "user"):
            continue
        if path:
            steps.append(("join", path, NAMESPACES[name][0]))
        else:
            flags |= NAMESPACES[name][0]
    if flags:
        steps.append(("unshare", flags))
    if "network" in spaces and not spaces["network"]:
        steps.append(("loopback_up",))
    return steps


def plan_sysctls(values, spaces):
    """Kernel parameters, of the container's own namespaces only: all others are the host's."""
    steps = []
    for name, value in sorted(values.items()):
        path = sysctl_path(name)
        space = next((space for prefix, space in NAMESPACED_SYSCTLS.items()
                      if path == prefix or prefix[-1] == "/" and path.startswith(prefix)), None)
        if space not in spaces or ".." in path.split("/"):
            raise ConfigError("config.json: linux.sysctl %s: not in a namespace of the container's own; set it on the host" % name)
        steps.append(("sysctl", path, value, space))
    return steps


def sysctl_path(name):
    """A parameter's path below /proc/sys. The first separator decides which of . and / is the
    separator and which stands for a dot in a name: sysctl.d(5)."""
    dot, slash = name.find("."), name.find("/")
    return name.translate({ord("."): "/", ord("/"): "."}) if 0 <= dot and (slash < 0 or dot < slash) else name


def plan_mounts(config, bundle, spaces, user_namespace):
    """config.json's mounts in their order."""
    steps = []
    for index, item in enumerate(config.get("mounts") or ()):
        where = "config.json: mounts[%d]" % index
        target = item.get("destination") or ""
        if not target:
            raise ConfigError("%s.destination is missing" % where)
        target = normal_path("/" + target)
        words = item.get("options") or ()
        plain = [word for word in words if word not in RECURSIVE_OPTIONS and word not in EXTENSIONS]
        flags, propagation, data = mount_options(plain, where)
        type = item.get("type") or ""
        source = item.get("source") or ""
        if flags & MS_BIND or type == "bind":
            flags |= MS_BIND
            source = join_path(bundle, source)
            if data:                    # the kernel would ignore it
                raise ConfigError("%s: a bind mount takes no options of a file system: %s" % (where, data))
        mapping = plan_mapping(item, flags, where, spaces, user_namespace)
        attributes = tuple((word, *RECURSIVE_OPTIONS[word]) for word in words if word in RECURSIVE_OPTIONS)
        copy = "tmpcopyup" in words
        if copy and (type != "tmpfs" or flags & MS_BIND):
            raise ConfigError("%s: option tmpcopyup is for tmpfs only" % where)
        if type == "cgroup":
            steps.append(("mount_cgroup", target, flags, attributes))
        else:
            steps.append(("mount", source or type, target, type, flags, tuple(propagation), data, mapping, copy, attributes))
    return steps


def plan_mapping(item, flags, where, spaces, user_namespace):
    """(uid map, gid map, whether all below is meant too) of a mount that shows other owners than its
    file system has, None of any other. Two empty maps stand for the container's user namespace."""
    words = [word for word in item.get("options") or () if word in ("idmap", "ridmap")]
    maps = tuple(id_ranges(item.get(name), "%s.%s" % (where, name)) for name in ("uidMappings", "gidMappings"))
    if not words and not any(maps):
        return None
    if not flags & MS_BIND:
        raise ConfigError("%s: only a bind mount can map ids" % where)
    if any(maps) != all(maps):
        raise ConfigError("%s: uidMappings and gidMappings go together" % where)
    if not any(maps) and "user" not in spaces:
        raise ConfigError("%s: option %s needs uidMappings and gidMappings, or a user namespace of the container" % (
            where, words[0]))
    if user_namespace:
        raise ConfigError("%s: mapped ids take the host's root; change the files' owners, remove the mapping" % where)
    return (*maps, "ridmap" in words)


def own_terminal(config, process):
    """Whether a process of the container gets its terminal from the container's own devpts, where
    it has a name: ttyname(3)."""
    return bool(process.get("terminal")) and any(
        item.get("type") == "devpts" and (item.get("destination") or "").strip("/") == "dev/pts" for item in config.get("mounts") or ())


def plan_devices(config, user_namespace):
    """/dev: the nodes every container has, those of linux.devices, and the links."""
    for item in config.get("mounts") or ():
        if (item.get("destination") or "").rstrip("/") == "/dev" and (
                item.get("type") == "bind" or {"bind", "rbind"} & set(item.get("options") or ())):
            return []                   # somebody else's /dev: hands off
    steps = []
    asked = (config.get("linux") or {}).get("devices") or ()
    for path, major, minor in DEVICE_NODES:
        if path not in [device.get("path") for device in asked]:
            steps.append(("device", path, DEVICE_TYPES["c"] | 0o666, major, minor, 0, 0, user_namespace))
    for index, device in enumerate(asked):
        kind = DEVICE_TYPES.get(device.get("type"))
        if kind is None or not (device.get("path") or "").startswith("/"):
            raise ConfigError("config.json: linux.devices[%d] needs a path and a type of c, b, u or p" % index)
        mode = device.get("fileMode")
        numbers = [device.get(name) or 0 for name in ("major", "minor", "uid", "gid")]
        if not all(0 <= number <= limit for number, limit in zip(numbers, (MAX_MAJOR, MAX_MINOR, MAX_ID, MAX_ID))):
            raise ConfigError("config.json: linux.devices[%d]: a number is out of range" % index)
        steps.append(("device", device["path"], kind | (0o666 if mode is None else mode & 0o7777), *numbers, user_namespace))
    return steps + [("symlink", target, path) for target, path in DEVICE_LINKS]


def plan_rlimits(process):
    """Resource limits: a step for each."""
    found = {}
    for item in process.get("rlimits") or ():
        name = item.get("type") or ""
        if name[:7] != "RLIMIT_" or name[7:] not in RLIMITS or name in found:
            raise ConfigError("config.json: process.rlimits: %s %r" % ("twice" if name in found else "unknown", name))
        found[name] = ("rlimit", name, item.get("soft") or 0, item.get("hard") or 0)
    return list(found.values())


def plan_scheduling(process):
    """How the process shares the processors and the disks: sched_setattr(2), ioprio_set(2)."""
    steps = []
    scheduler, priority = process.get("scheduler"), process.get("ioPriority")
    if scheduler is not None:
        if scheduler.get("policy") not in SCHEDULERS:
            raise ConfigError("config.json: process.scheduler.policy: unknown policy %r" % scheduler.get("policy"))
        flags = 0
        for name in scheduler.get("flags") or ():
            if name not in SCHEDULER_FLAGS:
                raise ConfigError("config.json: process.scheduler.flags: unknown flag %r" % name)
            flags |= SCHEDULER_FLAGS[name]
        numbers = [scheduler.get(name) or 0 for name in ("nice", "priority", "runtime", "deadline", "period")]
        if not (-20 <= numbers[0] <= 19 and 0 <= numbers[1] <= 99 and all(0 <= n <= MAX_U64 for n in numbers[2:])):
            raise ConfigError("config.json: process.scheduler: a number is out of range")
        steps.append(("scheduler", struct.pack("=IIQiIQQQ", 48, SCHEDULERS[scheduler["policy"]], flags, *numbers)))
    if priority is not None:
        if priority.get("class") not in IO_CLASSES or not 0 <= (priority.get("priority") or 0) < 8:
            raise ConfigError("config.json: process.ioPriority: class %r has no priority %r" % (
                priority.get("class"), priority.get("priority")))
        steps.append(("io_priority", IO_CLASSES[priority["class"]] << 13 | (priority.get("priority") or 0)))
    return steps


def is_decimal(text):
    """Whether int() takes it, which has a limit of 4300 digits, and everybody else would."""
    return text.isascii() and text.isdigit() and len(text) < 10


def plan_affinity(process, which):
    """The processors that an exec may use, before ("initial") and after ("final") it is in the cgroup."""
    text = (process.get("execCPUAffinity") or {}).get(which)
    if not text:
        return []
    processors = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not is_decimal(first) or dash and not is_decimal(last) or not int(first) <= int(last or first) <= 65535:
            raise ConfigError("config.json: process.execCPUAffinity.%s: %r is no list of processors" % (which, text))
        processors.update(range(int(first), int(last or first) + 1))
    return [("affinity", tuple(processors))]


def plan_time(linux, spaces):
    """The offsets of a new time namespace's clocks: time_namespaces(7)."""
    offsets = linux.get("timeOffsets") or {}
    if spaces.get("time") != "":
        if offsets:
            raise ConfigError("config.json: linux.timeOffsets need a new time namespace in linux.namespaces")
        return []
    lines = []
    for clock, item in sorted(offsets.items()):
        if clock not in ("boottime", "monotonic"):
            raise ConfigError("config.json: linux.timeOffsets: clock %r has no offset, only boottime and monotonic have" % clock)
        lines.append("%s %d %d\n" % (clock, (item or {}).get("secs") or 0, (item or {}).get("nanosecs") or 0))
    return [("time_offsets", "".join(lines))]


def plan_personality(linux):
    """The kernel's word for the processor: personality(2)."""
    domain = (linux.get("personality") or {}).get("domain")
    if domain not in (None, "LINUX", "LINUX32"):
        raise ConfigError("config.json: linux.personality.domain: unknown domain %r" % domain)
    return [("personality", 8 if domain == "LINUX32" else 0)] if domain else []


SCHEDULERS = {"SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_ISO": 4, "SCHED_IDLE": 5, "SCHED_DEADLINE": 6}
SCHEDULER_FLAGS = {"SCHED_FLAG_RESET_ON_FORK": 1, "SCHED_FLAG_RECLAIM": 2, "SCHED_FLAG_DL_OVERRUN": 4, "SCHED_FLAG_KEEP_POLICY": 8,
                   "SCHED_FLAG_KEEP_PARAMS": 0x10, "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20, "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40}
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}


def process_user(user):
    """(uid, gid, further gids, umask) of process.user."""
    uid, gid, groups = user.get("uid") or 0, user.get("gid") or 0, tuple(user.get("additionalGids") or ())
    umask = 0o022 if user.get("umask") is None else user["umask"]
    for field, numbers, limit in (("uid", (uid,), MAX_ID), ("gid", (gid,), MAX_ID), ("additionalGids", groups, MAX_ID),
                                  ("umask", (umask,), 0o777)):
        if not all(0 <= number <= limit for number in numbers):
            raise ConfigError("config.json: process.user.%s: not in 0…%d" % (field, limit))
    if len(groups) > NGROUPS_MAX:
        raise ConfigError("config.json: process.user.additionalGids: %d groups, and the kernel takes %d" % (len(groups), NGROUPS_MAX))
    return uid, gid, groups, umask


def plan_process(process, linux):
    """What the process gives up or takes on, in the one order that works: limits while we
    are root, the bounding set before the identity, capabilities after it; the personality
    when nobody asks for the processor's name any more. A system call filter comes last, so
    that it need not allow what we do; yet without no_new_privs it takes CAP_SYS_ADMIN, which
    is still there before the capabilities go: seccomp(2)."""
    steps = plan_rlimits(process) + plan_scheduling(process)
    seccomp = linux.get("seccomp")
    filters = [] if seccomp is None else [plan_seccomp(seccomp, machine_here())]
    uid, gid, groups, umask = process_user(process.get("user") or {})
    sets = {name: capability_mask((process.get("capabilities") or {}).get(name) or ()) for name in CAPABILITY_SETS}
    steps.append(("session_keyring",))
    if not process.get("noNewPrivileges"):
        steps += filters
    steps.append(("bounding", sets["bounding"]))
    steps.append(("make_cwd", process.get("cwd") or "/"))
    steps.append(("identity", uid, gid, groups, umask))
    steps.append(("cwd", process.get("cwd") or "/"))
    steps.append(("capabilities",) + tuple(sets[name] for name in CAPABILITY_SETS[1:]))
    if process.get("noNewPrivileges"):
        steps.append(("no_new_privs",))
    steps += plan_personality(linux) + [("payload", process), ("labels",)]
    if process.get("noNewPrivileges"):
        steps += filters
    return steps


def plan_labels(process):
    """What comes before all else: the way to give the process its AppArmor profile and
    SELinux label at last, by the step "labels". An exec takes the second step when inside."""
    apparmor, selinux = process.get("apparmorProfile") or "", process.get("selinuxLabel") or ""
    if apparmor == "unconfined":
        apparmor = ""
    return [("check_labels", apparmor, selinux), ("open_labels", apparmor, selinux)] if apparmor or selinux else []


def plan_mount_label(linux):
    """The SELinux context of the container's own file systems, for the steps that mount them. It has
    commas, so mount(8) and the kernel want it quoted."""
    label = linux.get("mountLabel")
    if label and '"' in label:
        raise ConfigError("config.json: linux.mountLabel %r holds a quotation mark" % label)
    return [("mount_label", label)] if label else []


def capability_mask(names):
    """The bit mask of capability names; a name that is unknown here grants nothing."""
    return sum(1 << CAPABILITIES.index(name[4:]) for name in set(names) if name[4:] in CAPABILITIES and name[:4] == "CAP_")


# -- system call filters --
#
# linux.seccomp becomes a program of classic BPF, which the kernel runs before every
# system call: seccomp(2). It finds the architecture, then the call's number by binary
# search in runs of numbers of one fate, then it compares arguments. Where several rules
# match, the strictest wins, as it does among several filters of a process: an order that
# lost a restriction would be a vulnerability. Names that no table has are calls that this
# architecture does not have.

# The calls of the architectures by number: a number, and from there one name after the
# other. From 424 on all architectures count alike. After libseccomp's src/syscalls.csv
# (Linux 7.1), which is made from the kernel's tables; ARM has no memfd_secret.
SYSCALLS = {
    "common": """
        424 pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig
        fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 process_madvise epoll_pwait2
        mount_setattr quotactl_fd landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
        process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait
        futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat
        getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr listns rseq_slice_yield
""",
    "x86_64": """
        0 read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
        rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore madvise
        shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid sendfile socket connect accept
        sendto recvfrom sendmsg recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt
        clone fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl flock
        fsync fdatasync truncate ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink symlink
        readlink chmod fchmod chown fchown lchown umask gettimeofday getrlimit getrusage sysinfo times ptrace getuid
        syslog getgid setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid setregid getgroups setgroups
        setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid getsid capget capset rt_sigpending
        rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime mknod uselib personality ustat statfs fstatfs
        sysfs getpriority setpriority sched_setparam sched_getparam sched_setscheduler sched_getscheduler
        sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock munlock mlockall munlockall vhangup
        modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2
        swapon swapoff reboot sethostname setdomainname iopl ioperm create_module init_module delete_module
        get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid readahead
        setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
        lremovexattr fremovexattr tkill time futex sched_setaffinity sched_getaffinity set_thread_area io_setup
        io_destroy io_getevents io_submit io_cancel get_thread_area lookup_dcookie epoll_create epoll_ctl_old
        epoll_wait_old remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64 timer_create
        timer_settime timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime clock_getres
        clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind set_mempolicy get_mempolicy mq_open
        mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load waitid add_key request_key keyctl
        ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat mknodat
        fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll
        unshare set_robust_list get_robust_list splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait
        signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2
        epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init
        fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg setns getcpu
        process_vm_readv process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp getrandom
        memfd_create kexec_file_load bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2
        pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq uretprobe uprobe
""",
    "x32": """
        512 rt_sigaction rt_sigreturn ioctl readv writev recvfrom sendmsg recvmsg execve ptrace rt_sigpending
        rt_sigtimedwait rt_sigqueueinfo sigaltstack timer_create mq_notify kexec_load waitid set_robust_list
        get_robust_list vmsplice move_pages preadv pwritev rt_tgsigqueueinfo recvmmsg sendmmsg process_vm_readv
        process_vm_writev setsockopt getsockopt io_setup io_submit execveat preadv2 pwritev2
""",
    "x86": """
        0 restart_syscall exit fork read write open close waitpid creat link unlink execve chdir time mknod chmod lchown
        break oldstat lseek getpid mount umount setuid getuid stime ptrace alarm oldfstat pause utime stty gtty access
        nice ftime sync kill rename mkdir rmdir dup pipe times prof brk setgid getgid signal geteuid getegid acct
        umount2 lock ioctl fcntl mpx setpgid ulimit oldolduname umask chroot ustat dup2 getppid getpgrp setsid sigaction
        sgetmask ssetmask setreuid setregid sigsuspend sigpending sethostname setrlimit getrlimit getrusage gettimeofday
        settimeofday getgroups setgroups select symlink oldlstat readlink uselib swapon reboot readdir mmap munmap
        truncate ftruncate fchmod fchown getpriority setpriority profil statfs fstatfs ioperm socketcall syslog
        setitimer getitimer stat lstat fstat olduname iopl vhangup idle vm86old wait4 swapoff sysinfo ipc fsync
        sigreturn clone setdomainname uname modify_ldt adjtimex mprotect sigprocmask create_module init_module
        delete_module get_kernel_syms quotactl getpgid fchdir bdflush sysfs personality afs_syscall setfsuid setfsgid
        _llseek getdents _newselect flock msync readv writev getsid fdatasync _sysctl mlock munlock mlockall munlockall
        sched_setparam sched_getparam sched_setscheduler sched_getscheduler sched_yield sched_get_priority_max
        sched_get_priority_min sched_rr_get_interval nanosleep mremap setresuid getresuid vm86 query_module poll
        nfsservctl setresgid getresgid prctl rt_sigreturn rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait
        rt_sigqueueinfo rt_sigsuspend pread64 pwrite64 chown getcwd capget capset sigaltstack sendfile getpmsg putpmsg
        vfork ugetrlimit mmap2 truncate64 ftruncate64 stat64 lstat64 fstat64 lchown32 getuid32 getgid32 geteuid32
        getegid32 setreuid32 setregid32 getgroups32 setgroups32 fchown32 setresuid32 getresuid32 setresgid32 getresgid32
        chown32 setuid32 setgid32 setfsuid32 setfsgid32 pivot_root mincore madvise getdents64 fcntl64 224 gettid
        readahead setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
        lremovexattr fremovexattr tkill sendfile64 futex sched_setaffinity sched_getaffinity set_thread_area
        get_thread_area io_setup io_destroy io_getevents io_submit io_cancel fadvise64 252 exit_group lookup_dcookie
        epoll_create epoll_ctl epoll_wait remap_file_pages set_tid_address timer_create timer_settime timer_gettime
        timer_getoverrun timer_delete clock_settime clock_gettime clock_getres clock_nanosleep statfs64 fstatfs64 tgkill
        utimes fadvise64_64 vserver mbind get_mempolicy set_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive
        mq_notify mq_getsetattr kexec_load waitid 286 add_key request_key keyctl ioprio_set ioprio_get inotify_init
        inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat mknodat fchownat futimesat fstatat64 unlinkat
        renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare set_robust_list get_robust_list
        splice sync_file_range tee vmsplice move_pages getcpu epoll_pwait utimensat signalfd timerfd_create eventfd
        fallocate timerfd_settime timerfd_gettime signalfd4 eventfd2 epoll_create1 dup3 pipe2 inotify_init1 preadv
        pwritev rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init fanotify_mark prlimit64 name_to_handle_at
        open_by_handle_at clock_adjtime syncfs sendmmsg setns process_vm_readv process_vm_writev kcmp finit_module
        sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create bpf execveat socket socketpair bind connect
        listen accept4 getsockopt setsockopt getsockname getpeername sendto sendmsg recvfrom recvmsg shutdown
        userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx
        arch_prctl io_pgetevents rseq 393 semget semctl shmget shmctl shmat shmdt msgget msgsnd msgrcv msgctl
        clock_gettime64 clock_settime64 clock_adjtime64 clock_getres_time64 clock_nanosleep_time64 timer_gettime64
        timer_settime64 timerfd_gettime64 timerfd_settime64 utimensat_time64 pselect6_time64 ppoll_time64 416
        io_pgetevents_time64 recvmmsg_time64 mq_timedsend_time64 mq_timedreceive_time64 semtimedop_time64
        rt_sigtimedwait_time64 futex_time64 sched_rr_get_interval_time64
""",
    "arm": """
        0 restart_syscall exit fork read write open close 8 creat link unlink execve chdir 14 mknod chmod lchown 19
        lseek getpid mount 23 setuid getuid 26 ptrace 29 pause 33 access nice 36 sync kill rename mkdir rmdir dup pipe
        times 45 brk setgid getgid 49 geteuid getegid acct umount2 54 ioctl fcntl 57 setpgid 60 umask chroot ustat dup2
        getppid getpgrp setsid sigaction 70 setreuid setregid sigsuspend sigpending sethostname setrlimit 77 getrusage
        gettimeofday settimeofday getgroups setgroups 83 symlink 85 readlink uselib swapon reboot 91 munmap truncate
        ftruncate fchmod fchown getpriority setpriority 99 statfs fstatfs 103 syslog setitimer getitimer stat lstat
        fstat 111 vhangup 114 wait4 swapoff sysinfo 118 fsync sigreturn clone setdomainname uname 124 adjtimex mprotect
        sigprocmask 128 init_module delete_module 131 quotactl getpgid fchdir bdflush sysfs personality 138 setfsuid
        setfsgid _llseek getdents _newselect flock msync readv writev getsid fdatasync _sysctl mlock munlock mlockall
        munlockall sched_setparam sched_getparam sched_setscheduler sched_getscheduler sched_yield
        sched_get_priority_max sched_get_priority_min sched_rr_get_interval nanosleep mremap setresuid getresuid 168
        poll nfsservctl setresgid getresgid prctl rt_sigreturn rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait
        rt_sigqueueinfo rt_sigsuspend pread64 pwrite64 chown getcwd capget capset sigaltstack sendfile 190 vfork
        ugetrlimit mmap2 truncate64 ftruncate64 stat64 lstat64 fstat64 lchown32 getuid32 getgid32 geteuid32 getegid32
        setreuid32 setregid32 getgroups32 setgroups32 fchown32 setresuid32 getresuid32 setresgid32 getresgid32 chown32
        setuid32 setgid32 setfsuid32 setfsgid32 getdents64 pivot_root mincore madvise fcntl64 224 gettid readahead
        setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
        lremovexattr fremovexattr tkill sendfile64 futex sched_setaffinity sched_getaffinity io_setup io_destroy
        io_getevents io_submit io_cancel exit_group lookup_dcookie epoll_create epoll_ctl epoll_wait remap_file_pages
        256 set_tid_address timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime
        clock_gettime clock_getres clock_nanosleep statfs64 fstatfs64 tgkill utimes arm_fadvise64_64 pciconfig_iobase
        pciconfig_read pciconfig_write mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr waitid
        socket bind connect listen accept getsockname getpeername socketpair send sendto recv recvfrom shutdown
        setsockopt getsockopt sendmsg recvmsg semop semget semctl msgsnd msgrcv msgget msgctl shmat shmdt shmget shmctl
        add_key request_key keyctl semtimedop vserver ioprio_set ioprio_get inotify_init inotify_add_watch
        inotify_rm_watch mbind get_mempolicy set_mempolicy openat mkdirat mknodat fchownat futimesat fstatat64 unlinkat
        renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare set_robust_list get_robust_list
        splice arm_sync_file_range tee vmsplice move_pages getcpu epoll_pwait kexec_load utimensat signalfd
        timerfd_create eventfd fallocate timerfd_settime timerfd_gettime signalfd4 eventfd2 epoll_create1 dup3 pipe2
        inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg accept4 fanotify_init fanotify_mark
        prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg setns process_vm_readv
        process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create bpf
        execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx
        rseq io_pgetevents migrate_pages kexec_file_load 403 clock_gettime64 clock_settime64 clock_adjtime64
        clock_getres_time64 clock_nanosleep_time64 timer_gettime64 timer_settime64 timerfd_gettime64 timerfd_settime64
        utimensat_time64 pselect6_time64 ppoll_time64 416 io_pgetevents_time64 recvmmsg_time64 mq_timedsend_time64
        mq_timedreceive_time64 semtimedop_time64 rt_sigtimedwait_time64 futex_time64 sched_rr_get_interval_time64 983041
        breakpoint cacheflush usr26 usr32 set_tls get_tls
""",
    "generic": """
        0 io_setup io_destroy io_submit io_cancel io_getevents setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr
        listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr getcwd lookup_dcookie eventfd2
        epoll_create1 epoll_ctl epoll_pwait dup dup3 fcntl inotify_init1 inotify_add_watch inotify_rm_watch ioctl
        ioprio_set ioprio_get flock mknodat mkdirat unlinkat symlinkat linkat 39 umount2 mount pivot_root nfsservctl
        statfs fstatfs truncate ftruncate fallocate faccessat chdir fchdir chroot fchmod fchmodat fchownat fchown openat
        close vhangup pipe2 quotactl getdents64 lseek read write readv writev pread64 pwrite64 preadv pwritev sendfile
        pselect6 ppoll signalfd4 vmsplice splice tee readlinkat newfstatat fstat sync fsync fdatasync sync_file_range
        timerfd_create timerfd_settime timerfd_gettime utimensat acct capget capset personality exit exit_group waitid
        set_tid_address unshare futex set_robust_list get_robust_list nanosleep getitimer setitimer kexec_load
        init_module delete_module timer_create timer_gettime timer_getoverrun timer_settime timer_delete clock_settime
        clock_gettime clock_getres clock_nanosleep syslog ptrace sched_setparam sched_setscheduler sched_getscheduler
        sched_getparam sched_setaffinity sched_getaffinity sched_yield sched_get_priority_max sched_get_priority_min
        sched_rr_get_interval restart_syscall kill tkill tgkill sigaltstack rt_sigsuspend rt_sigaction rt_sigprocmask
        rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigreturn setpriority getpriority reboot setregid setgid
        setreuid setuid setresuid getresuid setresgid getresgid setfsuid setfsgid times setpgid getpgid getsid setsid
        getgroups setgroups uname sethostname setdomainname getrlimit setrlimit getrusage umask prctl getcpu
        gettimeofday settimeofday adjtimex getpid getppid getuid geteuid getgid getegid gettid sysinfo mq_open mq_unlink
        mq_timedsend mq_timedreceive mq_notify mq_getsetattr msgget msgctl msgrcv msgsnd semget semctl semtimedop semop
        shmget shmctl shmat shmdt socket socketpair bind listen accept connect getsockname getpeername sendto recvfrom
        setsockopt getsockopt shutdown sendmsg recvmsg readahead brk munmap mremap add_key request_key keyctl clone
        execve mmap fadvise64 swapon swapoff mprotect msync mlock munlock mlockall munlockall mincore madvise
        remap_file_pages mbind get_mempolicy set_mempolicy migrate_pages move_pages rt_tgsigqueueinfo perf_event_open
        accept4 recvmmsg 260 wait4 prlimit64 fanotify_init fanotify_mark name_to_handle_at open_by_handle_at
        clock_adjtime syncfs setns sendmmsg process_vm_readv process_vm_writev kcmp finit_module sched_setattr
        sched_getattr renameat2 seccomp getrandom memfd_create bpf execveat userfaultfd membarrier mlock2
        copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq kexec_file_load
""",
    "aarch64": "38 renameat",
    "riscv64": "258 riscv_hwprobe riscv_flush_icache",
}
MULTIPLEXED = {                         # 32-bit x86: calls that are also, or only, the first argument of another
    "socketcall": """1 socket bind connect listen accept getsockname getpeername socketpair send recv sendto recvfrom
        shutdown setsockopt getsockopt sendmsg recvmsg accept4 recvmmsg sendmmsg""",
    "ipc": "1 semop semget semctl semtimedop 11 msgsnd msgrcv msgget msgctl 21 shmat shmdt shmget shmctl",
}
ARCHITECTURES = {                       # name -> (AUDIT_ARCH_* of linux/audit.h, tables, later ones overrule)
    "X86_64": (0xC000003E, "x86_64 common"), "X32": (0xC000003E, "x86_64 x32 common"), "X86": (0x40000003, "x86 common"),
    "AARCH64": (0xC00000B7, "generic aarch64 common"), "ARM": (0x40000028, "arm common"),
    "RISCV64": (0xC00000F3, "generic riscv64 common"),
}
FOREIGN_ARCHITECTURES = """LOONGARCH64 M68K MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PARISC PARISC64 PPC PPC64
    PPC64LE S390 S390X SH SHEB""".split()
MACHINES = {                            # machine_here() -> the architectures of its programs, its own first
    "x86_64": ("X86_64", "X86", "X32"), "i686": ("X86",), "aarch64": ("AARCH64", "ARM"), "armv7l": ("ARM",), "riscv64": ("RISCV64",),
}
NARROW = ("X86", "X32", "ARM")          # arguments have 32 bits
X32_BIT = 0x40000000                    # in the number of a call, beside AUDIT_ARCH_X86_64
NEW_CALLS = 512                         # below it new calls are numbered; above are x32's and ARM's own

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 0, "SECCOMP_FILTER_FLAG_LOG": 2,     # TSYNC: we have but one thread
                 "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4}
KILL_PROCESS, ACT_ERRNO, ACT_TRACE, ACT_LOG, ACT_ALLOW = 0x80000000, 0x50000, 0x7FF00000, 0x7FFC0000, 0x7FFF0000
ACTIONS = {"SCMP_ACT_KILL": 0, "SCMP_ACT_KILL_THREAD": 0, "SCMP_ACT_KILL_PROCESS": KILL_PROCESS, "SCMP_ACT_TRAP": 0x30000,
           "SCMP_ACT_ERRNO": ACT_ERRNO, "SCMP_ACT_TRACE": ACT_TRACE, "SCMP_ACT_LOG": ACT_LOG, "SCMP_ACT_ALLOW": ACT_ALLOW}
OPERATORS = ("SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ")

MAX_FILTER = 4096                       # BPF_MAXINSNS
BPF_LOAD, BPF_AND, BPF_JUMP, BPF_JEQ, BPF_JGT, BPF_JGE, BPF_RETURN = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x06
DATA_NUMBER, DATA_ARCH, DATA_ARGS = 0, 4, 16        # in struct seccomp_data; the low half of an argument first


def plan_seccomp(profile, machine):
    """The step that installs a profile's filter: ("seccomp", seccomp(2)'s number, flags, program)."""
    where = "config.json: linux.seccomp"
    known_fields(profile, "defaultAction defaultErrnoRet architectures flags listenerPath listenerMetadata syscalls", where)
    if machine not in MACHINES:
        raise ConfigError("%s: the system calls of %s are unknown here" % (where, machine))
    default = seccomp_action(profile.get("defaultAction"), profile.get("defaultErrnoRet"), where, "default")
    rules = [rule for index, entry in enumerate(profile.get("syscalls") or ())
             for rule in seccomp_rules(entry, "%s.syscalls[%d]" % (where, index))]
    flags = 0
    for name in profile.get("flags") or ():
        if name not in SECCOMP_FLAGS:
            raise ConfigError("%s.flags: %r is not supported" % (where, name))
        flags |= SECCOMP_FLAGS[name]
    native = MACHINES[machine][0]
    asked = seccomp_architectures(profile.get("architectures") or (), where)
    program = Filter().assemble([(name, filter_runs(name, default, rules)) for name in MACHINES[machine]
                                 if name is native or name in asked])
    if len(program) > MAX_FILTER * 8:
        raise ConfigError("%s: a filter of %d instructions, %d at most" % (where, len(program) // 8, MAX_FILTER))
    return "seccomp", syscall_numbers(native)["seccomp"], flags, program


def known_fields(value, names, where):
    """Elsewhere unknown fields are ignored; here one might be a restriction."""
    for name in value:
        if name not in names.split():
            raise ConfigError("%s.%s is not supported, and dropping it silently would be unsafe: remove it from the profile" % (
                where, name))


def seccomp_action(name, number, where, prefix=""):
    """An action's value for the kernel, with the errno (or the tracer's number) in its low half."""
    field = "%s.%s" % (where, "defaultAction" if prefix else "action")
    if name not in ACTIONS:
        raise ConfigError("%s: %s" % (field, "SCMP_ACT_NOTIFY needs a listener, which is not supported" if name == "SCMP_ACT_NOTIFY"
                                      else "unknown action %r" % name))
    action = ACTIONS[name]
    if action not in (ACT_ERRNO, ACT_TRACE):
        if number is not None:
            raise ConfigError("%s: %s has no errnoRet" % (field, name))
        return action
    if number is not None and not 0 <= number <= 0xFFFF:
        raise ConfigError("%s.%s: %d is not in 0…65535" % (where, "defaultErrnoRet" if prefix else "errnoRet", number))
    return action | (errno.EPERM if number is None else number)


def seccomp_rules(entry, where):
    """An element of linux.seccomp.syscalls as (names, action, conditions) once, or once for
    each condition where an argument has several, which are alternatives then (as runc has it)."""
    known_fields(entry, "names action errnoRet args", where)
    if not entry.get("names"):
        raise ConfigError("%s.names is empty" % where)
    action = seccomp_action(entry.get("action"), entry.get("errnoRet"), where)
    conditions = tuple(seccomp_condition(item, "%s.args[%d]" % (where, index)) for index, item in enumerate(entry.get("args") or ()))
    if len({condition[0] for condition in conditions}) < len(conditions):
        return [(entry["names"], action, (condition,)) for condition in conditions]
    return [(entry["names"], action, conditions)]


def seccomp_condition(item, where):
    """(argument's index, operator, mask, value) of an element of args."""
    known_fields(item, "index value valueTwo op", where)
    index, value, second = (item.get(name) or 0 for name in ("index", "value", "valueTwo"))
    if not 0 <= index < 6:
        raise ConfigError("%s.index: %d is not in 0…5" % (where, index))
    if not (0 <= value <= MAX_U64 and 0 <= second <= MAX_U64):
        raise ConfigError("%s.value: not in 0…2^64-1" % where)
    if item.get("op") not in OPERATORS:
        raise ConfigError("%s.op: unknown operator %r" % (where, item.get("op")))
    operator = item["op"][len("SCMP_CMP_"):]
    return (index, "EQ", value, second) if operator == "MASKED_EQ" else (index, operator, MAX_U64, value)


def seccomp_architectures(names, where):
    """The names without their prefix. Those of other machines are none of our business."""
    asked = [name[len("SCMP_ARCH_"):] if name.startswith("SCMP_ARCH_") else "" for name in names]
    for name, short in zip(names, asked):
        if short not in ARCHITECTURES and short not in FOREIGN_ARCHITECTURES:
            raise ConfigError("%s.architectures: unknown architecture %r" % (where, name))
    return asked


def numbered(text):
    """{name: number} of a text like `0 read write 17 pread64`."""
    numbers, number = {}, 0
    for word in text.split():
        if word.isdigit():
            number = int(word)
        else:
            numbers[word] = number
            number += 1
    return numbers


def syscall_numbers(architecture):
    """{name: number} of an architecture's calls; made when asked for, which is rare."""
    numbers = {}
    for table in ARCHITECTURES[architecture][1].split():
        numbers.update(numbered(SYSCALLS[table]))
    return numbers


def narrow_condition(condition):
    """A condition for an argument of 32 bits, which is never a sign-extended -1, for example."""
    index, operator, mask, value = condition
    return index, operator, mask & MAX_U32, value & MAX_U32 if operator in ("EQ", "NE") else value


def strictness(action):
    """A key that sorts the strictest action first: the kernel's order, KILL_PROCESS being negative."""
    return (action & 0xFFFF0000) ^ KILL_PROCESS


def filter_runs(architecture, default, rules):
    """[(first number, fate), …] up to the next run's first number. A fate is (action of the
    call if no condition holds, ((action, conditions), …) in the order to try)."""
    calls = {}                          # number -> [(action, conditions), …]
    numbers = syscall_numbers(architecture)
    for names, action, conditions in rules:
        if architecture in NARROW:
            conditions = tuple(map(narrow_condition, conditions))
        for name in names:
            if name in numbers:
                calls.setdefault(numbers[name], []).append((action, conditions))
    if architecture == "X86":
        for call in MULTIPLEXED:
            calls.setdefault(numbers[call], []).extend(multiplexed_rules(call, default, rules))
    fates = {number: filter_fate(alternatives, default) for number, alternatives in calls.items()}
    # A call that the profile's author cannot have known does not exist: with EPERM
    # instead a C library would not fall back on the old one. (as runc has it)
    newest = max((number for number in fates if number < NEW_CALLS), default=-1)
    permissive = default & 0xFFFF0000 in (ACT_TRACE, ACT_LOG, ACT_ALLOW)
    beyond = (default if permissive or newest < 0 else ACT_ERRNO | errno.ENOSYS), ()
    steps = [(number, fates.get(number, (default, ()))) for number in range(newest + 1)] + [(newest + 1, beyond)]
    for number in sorted(number for number in fates if number > newest):
        steps += [(number, fates[number]), (number + 1, beyond)]
    return [step for index, step in enumerate(steps) if not index or step[1] != steps[index - 1][1]]


def multiplexed_rules(call, default, rules):
    """The alternatives of socketcall(2) or ipc(2) by the names of what they stand for. The
    arguments lie in memory, where no filter sees them: a rule about them holds for all
    calls if it is stricter than the default, else for none."""
    numbers = numbered(MULTIPLEXED[call])
    return [(action, ((0, "EQ", 0xFFFF, numbers[name]),))        # ipc has a version in the upper half
            for names, action, conditions in rules for name in names
            if name in numbers and (not conditions or strictness(action) < strictness(default))]


def filter_fate(alternatives, default):
    """The fate of a call for which there are rules."""
    plain = [action for action, conditions in alternatives if not conditions]
    otherwise = min(plain, key=strictness) if plain else default
    conditional = {rule: None for rule in alternatives          # without doublets, in order
                   if rule[1] and (not plain or strictness(rule[0]) < strictness(otherwise))}
    return otherwise, tuple(sorted(conditional, key=lambda rule: strictness(rule[0])))


class Filter:
    """A program of classic BPF, written from its end to its beginning, for all jumps go
    forward. A place is the number of instructions from there to the end; what writes
    instructions returns the place where they begin."""

    def __init__(self):
        self.code = []                  # the last one first: struct sock_filter
        self.returns = {}               # action -> place

    def assemble(self, sections):
        """The program, as bytes, of [(architecture, runs), …]."""
        place = self.finish(KILL_PROCESS)           # an architecture of which the profile does not speak
        x32 = place
        for name, runs in reversed(sections):
            section = self.near(self.search(runs), 0)       # right here, for what follows runs into it
            if name == "X32":
                self.emit(BPF_AND, MAX_U32 ^ X32_BIT)
                x32 = self.emit(BPF_LOAD, DATA_NUMBER)
                continue
            if name == "X86_64":
                section = self.jump(BPF_JGE, X32_BIT, x32, section)
            section = self.emit(BPF_LOAD, DATA_NUMBER)
            place = self.jump(BPF_JEQ, ARCHITECTURES[name][0], section, place)
        self.emit(BPF_LOAD, DATA_ARCH)
        return b"".join(reversed(self.code))

    def emit(self, code, value, yes=0, no=0):
        """One instruction."""
        self.code.append(struct.pack("=HBBI", code, yes, no, value))
        return len(self.code)

    def near(self, place, limit):
        """The place, or one that leads there: a conditional jump's distance has eight bits."""
        distance = len(self.code) - place
        return place if distance <= limit else self.emit(BPF_JUMP, distance)

    def jump(self, code, value, yes, no):
        """Compares the accumulator and goes to one of two places."""
        no = self.near(no, 254)         # one less: the other may need a leader
        yes = self.near(yes, 255)
        return self.emit(code, value, len(self.code) - yes, len(self.code) - no)

    def finish(self, action):
        """The end with an action; one that is near serves again."""
        if len(self.code) - self.returns.get(action, -256) > 255:
            self.returns[action] = self.emit(BPF_RETURN, action)
        return self.returns[action]

    def search(self, runs):
        """Finds the run that the number in the accumulator lies in."""
        if len(runs) == 1:
            return self.decide(*runs[0][1])
        middle = len(runs) // 2
        upper = self.search(runs[middle:])
        return self.jump(BPF_JGE, runs[middle][0], upper, self.search(runs[:middle]))

    def decide(self, otherwise, alternatives):
        """Ends with the action of the first alternative of which all conditions hold."""
        place = self.finish(otherwise)
        for action, conditions in reversed(alternatives):
            no, place = place, self.finish(action)
            for condition in conditions:
                place = self.compare(*condition, place, no)
        return place

    def compare(self, index, operator, mask, value, yes, no):
        """Compares an argument, unsigned and 64 bits wide, in its two halves."""
        if operator in ("NE", "LT", "LE"):
            operator, yes, no = {"NE": "EQ", "LT": "GE", "LE": "GT"}[operator], no, yes
        place = self.jump({"EQ": BPF_JEQ, "GE": BPF_JGE, "GT": BPF_JGT}[operator], value & MAX_U32, yes, no)
        place = self.load(DATA_ARGS + 8 * index, mask & MAX_U32)
        if not (mask | value) >> 32:
            return place
        place = self.jump(BPF_JEQ, value >> 32, place, no)
        if operator != "EQ":
            place = self.jump(BPF_JGT, value >> 32, yes, place)
        return self.load(DATA_ARGS + 8 * index + 4, mask >> 32)

    def load(self, offset, mask):
        """A word of struct seccomp_data, or the masked bits of it."""
        if mask != MAX_U32:
            self.emit(BPF_AND, mask)
        return self.emit(BPF_LOAD, offset)


# === 20. Cgroups ==============================================================
#
# linux.cgroupsPath and linux.resources in, a container's control group out: one directory
# in the unified hierarchy (cgroups(7), version 2), or one in each hierarchy of version 1,
# or both on a hybrid system. Limits are written before any process enters, so they hold
# before guest code runs; one that cannot be is an error. While the container lives, its
# group answers who is inside, what it uses, and whether memory has run out.

# field of linux.resources -> (controller, file of version 1, file of version 2), in the order of writing
LIMITS = {
    "memory.limit": ("memory", "memory.limit_in_bytes", "memory.max"),
    "memory.swap": ("memory", "memory.memsw.limit_in_bytes", "memory.swap.max"),
    "memory.reservation": ("memory", "memory.soft_limit_in_bytes", "memory.low"),
    "memory.kernelTCP": ("memory", "memory.kmem.tcp.limit_in_bytes", None),
    "memory.swappiness": ("memory", "memory.swappiness", None),
    "memory.disableOOMKiller": ("memory", "memory.oom_control", None),
    "cpu.shares": ("cpu", "cpu.shares", "cpu.weight"),
    "cpu.period": ("cpu", "cpu.cfs_period_us", "cpu.max"),
    "cpu.quota": ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    "cpu.burst": ("cpu", "cpu.cfs_burst_us", "cpu.max.burst"),
    "cpu.realtimePeriod": ("cpu", "cpu.rt_period_us", None),
    "cpu.realtimeRuntime": ("cpu", "cpu.rt_runtime_us", None),
    "cpu.idle": ("cpu", "cpu.idle", "cpu.idle"),
    "cpu.cpus": ("cpuset", "cpuset.cpus", "cpuset.cpus"),
    "cpu.mems": ("cpuset", "cpuset.mems", "cpuset.mems"),
    "pids.limit": ("pids", "pids.max", "pids.max"),
    "network.classID": ("net_cls", "net_cls.classid", None),
}
ZERO_IS_A_VALUE = ("memory.swappiness", "memory.disableOOMKiller", "cpu.burst", "cpu.idle")    # elsewhere it is absence
THROTTLES = {                           # field of linux.resources.blockIO -> (version 1's file, key in version 2's io.max)
    "throttleReadBpsDevice": ("blkio.throttle.read_bps_device", "rbps"),
    "throttleWriteBpsDevice": ("blkio.throttle.write_bps_device", "wbps"),
    "throttleReadIOPSDevice": ("blkio.throttle.read_iops_device", "riops"),
    "throttleWriteIOPSDevice": ("blkio.throttle.write_iops_device", "wiops"),
}
# what a container may always do with devices, as runc: make any node, open the harmless ones
DEVICE_RULES = ("c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm",
                "c 5:2 rwm", "c 136:* rwm")
KILL_ROUNDS = 200                       # of 5 ms
# of version 1's mounts, beside the controllers
CGROUP_OPTIONS = ("rw", "ro", "seclabel", "noprefix", "xattr", "cpuset_v2_mode", "favordynmods", "clone_children")
IN_MODIFY = 2


class Cgroup:
    """The directories of one container: `directories` maps a controller of version 1, or
    "" for the unified hierarchy, to a path; two controllers may share one."""

    __slots__ = ("directories", "scope")

    def __init__(self, directories, scope=None):
        self.directories = directories
        self.scope = scope              # (slice, unit), if it takes systemd to make them

    def paths(self):
        """Every directory once, the unified one first."""
        return sorted(set(self.directories.values()), key=lambda path: path != self.directories.get(""))

    def file(self, controller, name):
        """The path of a controller's file, by version 1 where it is mounted, else in the unified hierarchy."""
        return join_path(self.directories.get(controller) or self.directories.get("", ""), name)

    def create(self):
        """Makes the directories; a version 1 cpuset starts with its parent's, or nothing could enter."""
        for path in self.paths():
            make_directories(path, 0o755)
        if "cpuset" in self.directories:
            inherit_cpuset(self.directories["cpuset"])
        if "" in self.directories and not set(self.directories) - {""}:
            delegate_controllers(self.directories[""])

    @property
    def unified(self):
        """The directory in the unified hierarchy, or None."""
        return self.directories.get("")

    def enter(self, pid=0, path=None):
        """Moves a process in, the calling one by default, to all directories or one of them. The
        kernel lets the first writer wait for 5 to 20 ms."""
        for path in [path] if path else self.paths():
            write_text(join_path(path, "cgroup.procs"), str(pid))

    def enter_alone(self):
        """Moves the calling process in, which has one thread, save for the unified hierarchy. A
        thread that moves itself need not wait (since Linux 5.5)."""
        for path in self.paths():
            if path != self.unified:
                write_text(join_path(path, "tasks"), "0")

    def entrance(self, pid):
        """The group that another process of the container can enter: this one or, where that has given
        its controllers to groups below, as systemd does, the one that process `pid` is in now:
        cgroups(7), the "no internal processes" rule."""
        if self.unified and read_text(join_path(self.unified, "cgroup.subtree_control"), ""):
            for path in directories_in(self.unified):
                if str(pid) in read_text(join_path(path, "cgroup.procs"), "").split():
                    return Cgroup({**self.directories, "": path})
        return self

    def pids(self):
        """The processes inside, children's groups included, as this pid namespace numbers them."""
        found = set()
        for path in self.paths()[:1]:
            for directory in directories_in(path):
                found.update(int(line) for line in read_text(join_path(directory, "cgroup.procs"), "").split())
        return sorted(found - {0})

    def kill(self):
        """A task that sends SIGKILL to all inside until they are gone, for a second at most."""
        for _ in range(KILL_ROUNDS):
            pids = self.pids()
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(pid, SIGKILL)
                except ProcessLookupError:
                    pass
            try:
                self.freeze(False)      # version 1's freezer holds even the killed
            except OSError:
                pass                    # removed meanwhile
            yield None, 0.005

    def remove(self):
        """Removes the directories, deepest first; gone ones are no error. True if all are gone."""
        for path in self.paths():
            for directory in reversed(list(directories_in(path))):
                try:
                    os.rmdir(directory)
                except FileNotFoundError:
                    pass
                except OSError:
                    return False
        return True

    def freeze(self, frozen):
        """Stops or continues every process inside."""
        if "freezer" in self.directories:
            write_text(self.file("freezer", "freezer.state"), "FROZEN" if frozen else "THAWED")
        elif "" in self.directories:
            write_text(self.file("", "cgroup.freeze"), "1" if frozen else "0")

    def frozen(self):
        """Whether freeze(True) took hold of all."""
        if "freezer" in self.directories:
            return read_text(self.file("freezer", "freezer.state"), "") == "FROZEN"
        return "frozen 1" in read_text(self.file("", "cgroup.events"), "")

    def oom_kills(self):
        """How many processes inside the kernel killed for want of memory."""
        return self.pairs("memory", "memory.oom_control" if "memory" in self.directories else "memory.events").get("oom_kill", 0)

    def watch_oom(self):
        """A descriptor that is readable when memory has run out, -1 where nobody tells: in version 1
        an eventfd, in version 2 an inotify of memory.events."""
        if "memory" in self.directories:
            control = os.open(self.file("memory", "memory.oom_control"), os.O_RDONLY | os.O_CLOEXEC)
            fd = libc.eventfd(0, os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                write_text(self.file("memory", "cgroup.event_control"), "%d %d" % (fd, control))
            except OSError:
                os.close(fd)
                raise
            finally:
                os.close(control)
            return fd
        path = self.file("", "memory.events")
        if not exists(path):
            return -1
        fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        libc.inotify_add_watch(fd, file_bytes(path), IN_MODIFY)
        return fd

    def value(self, controller, name):
        """A file with one number; "max" is the largest, an absent one 0."""
        text = read_text(self.file(controller, name), "0")
        return MAX_U64 if text == "max" else int(text) if text.isdigit() else 0

    def pairs(self, controller, name):
        """{key: int} of a file of 'key value' lines; an absent one has none."""
        return key_values(read_text(self.file(controller, name), ""))


class LimitedCgroup(Cgroup):
    """A cgroup whose limits are set."""

    __slots__ = ()

    def find(self, controller, *names):
        """The path of the first of a controller's files that is there, "" if none is. Beside version
        1 the unified hierarchy's controllers are enabled when first needed."""
        if controller not in self.directories and "" not in self.directories:
            return ""
        paths = [self.file(controller, name) for name in names if name]
        path = next(filter(exists, paths), "")
        if paths and not path and controller not in self.directories:
            delegate_controllers(self.directories[""])
            path = next(filter(exists, paths), "")
        return path

    def limit(self, resources):
        """Applies linux.resources but devices; OSError or ConfigError names what could not be. A
        limit may be invalid until another is set (memory is at most memory and swap, a quota fits
        its period), so what was refused is tried once more at the end."""
        memory = resources.get("memory") or {}
        if memory.get("limit") == -1 and not memory.get("swap"):
            memory = dict(memory, swap=-1)      # or it would be the limit of both
        if memory.get("checkBeforeUpdate") and 0 < (memory.get("limit") or 0) < self.memory_usage():
            raise ConfigError("config.json: linux.resources.memory.limit: more is in use, see checkBeforeUpdate")
        values = flatten(dict(resources, memory=memory))
        refused = []
        for name in filter(values.__contains__, LIMITS):
            try:
                self.limit_one(name, values[name], resources)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                refused.append(name)
        for name in refused:
            self.limit_one(name, values[name], resources)
        self.limit_block_io(resources.get("blockIO") or {})
        self.limit_network(resources.get("network") or {})
        self.limit_rdma(resources.get("rdma") or {})
        for item in resources.get("hugepageLimits") or ():
            self.limit_huge_pages(item.get("pageSize") or "", item.get("limit") or 0)
        for name, value in sorted((resources.get("unified") or {}).items()):
            if "/" in name or "" not in self.directories:
                raise ConfigError("config.json: linux.resources.unified: %s needs cgroup version 2" % name)
            write_text(self.need("unified", "", name), value)

    def need(self, field, controller, *names):
        """find; ConfigError if none is there."""
        path = self.find(controller, *names)
        if not path:
            raise ConfigError("config.json: linux.resources.%s: this system's cgroups have no %s; remove the limit" % (
                field, " and no ".join(names) if any(names) else "such limit"))
        return path

    def limit_one(self, name, value, resources):
        """One number or list of numbers. What asks for nothing is no error where there is no such limit."""
        if value in (0, "") and name not in ZERO_IS_A_VALUE:
            return
        controller, *files = LIMITS[name]
        old = controller in self.directories
        if value in (0, -1) and not self.find(controller, files[not old]):
            return
        path = self.need(name, controller, files[not old])
        write_text(path, version1_value(name, value) if old else self.version2_value(name, value, resources))

    def version2_value(self, name, value, resources):
        """A version 1 number in version 2's terms (kernel.org, cgroup-v2)."""
        if name == "cpu.shares":
            return str(cpu_weight(value))
        if name in ("cpu.quota", "cpu.period"):     # of both, what is not given stays as it is
            quota, period = (resources["cpu"].get(key) or 0 for key in ("quota", "period"))
            present = read_text(self.file("", "cpu.max"), "max").split()[0]
            return ("%s %s" % ("max" if quota < 0 else quota or present, period or "")).rstrip()
        if name == "memory.swap" and value > 0:     # version 1 counts memory and swap together
            limit = resources["memory"].get("limit") or self.value("", "memory.max")
            if limit == MAX_U64:
                raise ConfigError("config.json: linux.resources.memory.swap needs memory.limit, for it is the sum of both")
            if value < limit:
                raise ConfigError("config.json: linux.resources.memory.swap includes memory.limit, and is less")
            return str(value - max(limit, 0))
        return "max" if value.__class__ is int and value < 0 else str(value)

    def memory_usage(self):
        """Bytes in use now."""
        return self.value("memory", "memory.usage_in_bytes" if "memory" in self.directories else "memory.current")

    def limit_block_io(self, limits):
        """Weights, of all block devices or of one, and rates of single ones."""
        for name in ("weight", "leafWeight"):
            self.set_weight(name, limits.get(name), "")
            for item in limits.get("weightDevice") or ():
                self.set_weight(name, item.get(name), device_number(item) + " ")
        for name, (file, key) in THROTTLES.items():
            for item in limits.get(name) or ():
                device, rate = device_number(item), item.get("rate") or 0
                if "blkio" in self.directories:
                    write_text(self.need("blockIO." + name, "blkio", file), "%s %d" % (device, rate))
                else:
                    write_text(self.need("blockIO." + name, "io", "io.max"), "%s %s=%s" % (device, key, rate or "max"))

    def set_weight(self, name, value, device):
        """A weight of 10 to 1000. Version 2 has that of the scheduler BFQ, or its own, of 1 to 10000."""
        if not value:
            return
        field = "blockIO." + name
        if "blkio" in self.directories:
            files = ("blkio.leaf_weight",) if name == "leafWeight" else ("blkio.bfq.weight", "blkio.weight")
            path = self.need(field, "blkio", *(file + "_device" * bool(device) for file in files))
        else:
            path = self.need(field, "io", *(() if name == "leafWeight" else ("io.bfq.weight", "io.weight")))
            value = io_weight(value) if path.endswith("/io.weight") else value
        write_text(path, "%s%d" % (device, value))

    def limit_network(self, limits):
        """The priority of what leaves by an interface; the class is one of LIMITS."""
        for item in limits.get("priorities") or ():
            write_text(self.need("network.priorities", "net_prio", "net_prio.ifpriomap"),
                       "%s %d" % (item.get("name") or "", item.get("priority") or 0))

    def limit_rdma(self, limits):
        """What each device may have open of it."""
        for device, item in sorted(limits.items()):
            names = (("hcaHandles", "hca_handle"), ("hcaObjects", "hca_object"))
            words = ["%s=%d" % (key, item[name]) for name, key in names if item.get(name) is not None]
            if words:
                write_text(self.need("rdma", "rdma", "rdma.max"), " ".join([device] + words))

    def limit_huge_pages(self, size, limit):
        """The limit of one page size, of pages in use and of those set aside (Linux 5.7 on)."""
        suffixes = ("limit_in_bytes", "rsvd.limit_in_bytes") if "hugetlb" in self.directories else ("max", "rsvd.max")
        names = ["hugetlb.%s.%s" % (size, suffix) for suffix in suffixes if "/" not in size]
        if limit:
            self.need("hugepageLimits", "hugetlb", *names[:1])
        for name in names:
            path = self.find("hugetlb", name)
            if path:                    # where there are none, none are used
                write_text(path, str(limit))

    def limit_devices(self, rules):
        """The device allow list: written to version 1's controller; version 2 has a program instead."""
        for index, rule in enumerate(rules):
            check_device_rule(rule, "config.json: linux.resources.devices[%d]" % index)
        if "devices" not in self.directories:
            if "" in self.directories:
                attach_device_program(self.directories[""], rules)
                return
            raise ConfigError("config.json: linux.resources.devices: no cgroup controller devices here")
        for rule in rules:
            for text in version1_rules(rule):
                self.write_device(text, rule.get("allow"))
        for text in DEVICE_RULES:
            self.write_device(text, True)

    def write_device(self, text, allow):
        """One line of the version 1 list."""
        write_text(join_path(self.directories["devices"], "devices.allow" if allow else "devices.deny"), text)


def limit_cgroup(cgroup, resources, devices=None):
    """Applies linux.resources, and the rules for devices if there are any: not in Update, which
    would take them all away for a moment. OSError or ConfigError names what could not be."""
    cgroup = LimitedCgroup(cgroup.directories)
    cgroup.limit(resources)
    if devices is not None:
        cgroup.limit_devices(devices)


class MeasuredCgroup(Cgroup):
    """A cgroup whose metrics are read."""

    __slots__ = ()

    def metrics(self):
        """(version, dict) of a message Metrics of that version: 1 where that one counts memory. Every
        sub-message is there, for there are readers that do not look."""
        return (1, self.metrics1()) if "memory" in self.directories else (2, self.metrics2())

    def metrics1(self):
        """The dict of an io.containerd.cgroups.v1.Metrics message."""
        oom = self.pairs("memory", "memory.oom_control")
        files = (("usage", "usage_in_bytes"), ("max", "max_usage_in_bytes"), ("failcnt", "failcnt"))
        huge = [dict({key: self.value("hugetlb", "hugetlb.%s.%s" % (size, file)) for key, file in files}, pagesize=size)
                for size in self.page_sizes(".usage_in_bytes")]
        return {
            "pids": {"current": self.value("pids", "pids.current"), "limit": self.value("pids", "pids.max")},
            "cpu": self.cpu_metrics1(), "memory": self.memory_metrics1(), "blkio": self.block_io_metrics(),
            "rdma": self.rdma_metrics(), "hugetlb": huge, "cgroup_stats": {},
            "memory_oom_control": numbers("MemoryOomControl", oom),
        }

    def metrics2(self):
        """The dict of an io.containerd.cgroups.v2.Metrics message."""
        huge = [{"pagesize": size, "current": self.value("", "hugetlb.%s.current" % size),
                 "max": self.value("", "hugetlb.%s.max" % size),
                 "failcnt": self.pairs("", "hugetlb.%s.events" % size).get("max", 0)}
                for size in self.page_sizes(".current")]
        return {
            "pids": {"current": self.value("pids", "pids.current"), "limit": self.value("pids", "pids.max")},
            "cpu": dict(numbers("CPUStat2", self.pairs("", "cpu.stat")), psi=self.pressure("cpu")),
            "memory": self.memory_metrics2(), "rdma": self.rdma_metrics(), "hugetlb": huge,
            "io": {"usage": self.io_metrics(), "psi": self.pressure("io")},
            "memory_events": numbers("MemoryEvents", self.pairs("", "memory.events")),
        }

    def cpu_metrics1(self):
        """CPUStat1, in nanoseconds."""
        tick = 1000000000 // os.sysconf("SC_CLK_TCK")
        stat, throttled = self.pairs("cpuacct", "cpuacct.stat"), self.pairs("cpu", "cpu.stat")
        per_cpu = list(map(int, read_text(self.file("cpuacct", "cpuacct.usage_percpu"), "").split()))
        return {"usage": {"total": self.value("cpuacct", "cpuacct.usage"), "kernel": stat.get("system", 0) * tick,
                          "user": stat.get("user", 0) * tick, "per_cpu": per_cpu},
                "throttling": {"periods": throttled.get("nr_periods", 0), "throttled_time": throttled.get("throttled_time", 0),
                               "throttled_periods": throttled.get("nr_throttled", 0)}}

    def memory_metrics1(self):
        """MemoryStat1. The kernel writes pgpgin and the like without underscores."""
        stat = {name.replace("pgpg", "pg_pg_").replace("pgmaj", "pg_maj_").replace("pgfault", "pg_fault"): value
                for name, value in self.pairs("memory", "memory.stat").items()}
        stat["hierarchical_swap_limit"] = stat.get("hierarchical_memsw_limit", 0)
        entries = (("usage", ""), ("swap", "memsw."), ("kernel", "kmem."), ("kernel_tcp", "kmem.tcp."))
        files = (("limit", "limit_in_bytes"), ("usage", "usage_in_bytes"), ("max", "max_usage_in_bytes"),
                 ("failcnt", "failcnt"))
        return dict(numbers("MemoryStat1", stat), **{
            name: {key: self.value("memory", "memory." + part + file) for key, file in files} for name, part in entries})

    def memory_metrics2(self):
        """MemoryStat2"""
        files = (("usage", "current"), ("usage_limit", "max"), ("max_usage", "peak"), ("swap_usage", "swap.current"),
                 ("swap_limit", "swap.max"), ("swap_max_usage", "swap.peak"))
        return dict(numbers("MemoryStat2", self.pairs("", "memory.stat")), psi=self.pressure("memory"), **{
            name: self.value("", "memory." + file) for name, file in files})

    def pressure(self, name):
        """PSIStats: some and full, each of 'avg10=0.00 avg60=0.00 avg300=0.00 total=0'; None where nobody measures."""
        stats = {}
        for line in read_text(self.file("", name + ".pressure"), "").splitlines():
            kind, *words = line.split()
            values = dict(word.split("=") for word in words)
            stats[kind] = {"total": int(values.pop("total")), **{key: float(value) for key, value in values.items()}}
        return stats or None

    def page_sizes(self, suffix):
        """The sizes of huge pages for which there is a file hugetlb.SIZE with that suffix."""
        try:
            names = sorted(os.listdir(self.file("hugetlb", "")))
        except OSError:
            return []                   # removed meanwhile
        words = [name[:-len(suffix)].split(".") for name in names if name.startswith("hugetlb.") and name.endswith(suffix)]
        return [size[1] for size in words if len(size) == 2]        # hugetlb.2MB, and not hugetlb.2MB.rsvd

    def rdma_metrics(self):
        """RdmaStat, of lines 'device hca_handle=2 hca_object=2000'."""
        def entries(name):
            for line in read_text(self.file("rdma", name), "").splitlines():
                device, *words = line.replace("=max", "=%d" % MAX_U32).split()
                values = dict(word.split("=") for word in words)
                yield {"device": device, "hca_handles": int(values.get("hca_handle", 0)),
                       "hca_objects": int(values.get("hca_object", 0))}
        return {"current": list(entries("rdma.current")), "limit": list(entries("rdma.max"))}

    def io_metrics(self):
        """IOEntry messages, one for each block device."""
        entries = []
        for line in read_text(self.file("", "io.stat"), "").splitlines():
            device, _, rest = line.partition(" ")
            values = dict(pair.split("=") for pair in rest.split() if "=" in pair)
            major, _, minor = device.partition(":")
            entries.append({"major": int(major), "minor": int(minor),
                            **{name: int(values.get(name, 0)) for name in ("rbytes", "wbytes", "rios", "wios")}})
        return entries

    def block_io_metrics(self):
        """BlkIOStat: what the scheduler CFQ counts (before Linux 5.0), else what throttling sees."""
        names = {}
        for line in read_text("/proc/partitions", "").splitlines()[2:]:
            major, minor, _, name = line.split()
            names[major, minor] = "/dev/" + name

        def entries(file):
            for line in read_text(self.file("blkio", "blkio." + file), "").splitlines():
                device, *words = line.split()               # 8:0 Read 4096, or 8:0 6792
                if ":" in device:
                    major, minor = device.split(":")
                    yield {"op": words[0] if len(words) > 1 else "", "device": names.get((major, minor), ""),
                           "major": int(major), "minor": int(minor), "value": int(words[-1])}
        stat = {name: list(entries(name.replace("io_time", "time"))) for _, name, _ in message_fields("BlkIOStat")}
        if not any(stat.values()):
            for name in ("io_service_bytes_recursive", "io_serviced_recursive"):
                stat[name] = list(entries("throttle." + name))
        return stat


def measure_cgroup(cgroup):
    """(version, dict) of a message Metrics of that version."""
    return MeasuredCgroup(cgroup.directories).metrics()


def numbers(message, stat):
    """The numbers of a message by the names that its fields have."""
    return {name: stat.get(name, 0) for _, name, type in message_fields(message) if type == "uint"}


def flatten(resources):
    """{"memory.limit": 1, …} of the sub-objects of linux.resources."""
    return {"%s.%s" % (group, name): value for group, values in resources.items() if values.__class__ is dict
            for name, value in values.items() if value is not None}


def key_values(text):
    """{key: int} of a file of 'key value' lines."""
    pairs = (line.split(" ") for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def number(value):
    """A device number in the syntax of version 1's list; absent or -1 is any."""
    return "*" if value is None or value < 0 else str(value)


def check_device_rule(rule, where):
    """ConfigError for a rule that neither version could apply."""
    if (rule.get("type") or "a") not in ("a", "b", "c"):
        raise ConfigError("%s.type: %r is not a, b or c" % (where, rule["type"]))
    if set(rule.get("access") or "") - set("rwm"):
        raise ConfigError("%s.access: %r is not made of r, w and m" % (where, rule["access"]))
    if max(rule.get("major") or 0, rule.get("minor") or 0) > MAX_MINOR:
        raise ConfigError("%s: no device has such a number" % where)


def version1_rules(rule):
    """A device rule as lines of version 1's list, where "a" is every device and every access, whatever follows it."""
    kinds, access = rule.get("type") or "a", rule.get("access") or "rwm"
    place = "%s:%s" % (number(rule.get("major")), number(rule.get("minor")))
    if kinds == "a":
        if place == "*:*" and set(access) == set("rwm"):
            return ["a"]
        kinds = "bc"
    return ["%s %s %s" % (kind, place, access) for kind in kinds]


def device_number(item):
    """MAJOR:MINOR, as the kernel's files have it."""
    return "%d:%d" % (item.get("major") or 0, item.get("minor") or 0)


def version1_value(name, value):
    """A number as version 1's file wants it."""
    return "max" if name == "pids.limit" and value < 0 else str(int(value) if value.__class__ is bool else value)


def cpu_weight(shares):
    """Version 2's weight for version 1's shares: 2, 1024 and 262144 become 1, 100 and 10000, what
    lies between the power of ten of a parabola through them (as runc and crun have it)."""
    from math import ceil, log2
    power = log2(min(max(shares, 2), 262144))
    return ceil(10 ** ((power * power + 125 * power) / 612 - 7 / 34))


def io_weight(weight):
    """io.weight, of 1 to 10000, for version 1's weight, of 10 to 1000 (as runc and crun have it)."""
    return 1 + (weight - 10) * 9999 // 990


def inherit_cpuset(path):
    """Fills empty cpuset.cpus and cpuset.mems from the parent, from the top down."""
    parent = directory_of(path)
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not read_text(join_path(path, name), ""):
            if not read_text(join_path(parent, name), "") and exists(join_path(parent, name)):
                inherit_cpuset(parent)
            write_text(join_path(path, name), read_text(join_path(parent, name)))


def delegate_controllers(path):
    """Enables every controller on the way from the unified root to the group."""
    parts = []
    while exists(join_path(directory_of(path), "cgroup.controllers")):
        path = directory_of(path)
        parts.append(path)
    for parent in reversed(parts):
        words = ["+" + name for name in read_text(join_path(parent, "cgroup.controllers"), "").split()]
        if not enable_controllers(parent, " ".join(words)):         # at once, as each write takes its time
            for word in words:
                enable_controllers(parent, word)


def enable_controllers(directory, words):
    """Enables all of them, or none and returns False: one is in use by processes there, say, and limit()
    reports what is missing."""
    try:
        write_text(join_path(directory, "cgroup.subtree_control"), words)
    except OSError:
        return False
    return True


def cgroup_mounts(table):
    """{controller or "": mount point} of this system."""
    mounts = {}
    for entry in table:
        if entry.type == "cgroup2":
            mounts.setdefault("", entry.mountpoint)
        elif entry.type == "cgroup":
            for option in entry.super_options:
                if option not in CGROUP_OPTIONS and ("=" not in option or option.startswith("name=")):
                    mounts.setdefault(option, entry.mountpoint)
    return mounts


def cgroup_of(cgroups_path, id, mounts, systemd=False):
    """The Cgroup for linux.cgroupsPath: absolute below each mount point, or systemd's
    slice:prefix:name, spelled out as systemd would. Where systemd manages version 2, the
    latter is a scope of it with the container's group inside."""
    path, scope = cgroups_path or "/" + id, None
    if path.count(":") == 2:
        slice, prefix, name = path.split(":")
        slice = slice or "system.slice"
        if not slice.endswith(".slice") or "/" in path:
            raise ConfigError("config.json: linux.cgroupsPath %r: neither a path nor NAME.slice:PREFIX:NAME" % path)
        parts = slice[:-len(".slice")].split("-")
        slices = ["-".join(parts[:n]) + ".slice" for n in range(1, len(parts) + 1)] if slice != "-.slice" else []
        unit = name if name.endswith(".slice") else prefix + "-" + name + ".scope"
        path = "/".join(slices + [unit])
        if systemd and set(mounts) == {""} and unit.endswith(".scope"):
            scope, path = (slice, unit), path + "/container"
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise ConfigError("cgroup %r: no group below the root" % cgroups_path)
    return Cgroup({name: join_path(point, *parts) for name, point in mounts.items()}, scope)


# -- systemd --
#
# Where systemd manages version 2, a group that it does not know loses its controllers, and with
# them its limits, when anybody changes a slice above. So it is asked over D-Bus for a scope with
# Delegate=yes, below which everything is ours. The container's group lies there, for the scope's
# own limits are set anew by every `systemctl daemon-reload`. A scope needs a process from the start,
# and without one systemd removes it, and what the kernel has counted, before anybody can read
# that memory ran out. So a keeper sleeps beside the container's group as long as there is one.
# (systemd.io/CGROUP_DELEGATION, org.freedesktop.systemd1(5), D-Bus specification)

SYSTEMD_RUNS = "/run/systemd/system"    # a directory: sd_booted(3)
SYSTEM_BUS = "/run/dbus/system_bus_socket"
BUS_TIMEOUT_S = 10
BUS_ROUNDS = 400                        # of 5 ms
MAX_BUS_MESSAGE = 1 << 20
BUS_CALL, BUS_RETURN, BUS_ERROR = 1, 2, 3
BUS_NUMBERS = {"y": "B", "b": "I", "u": "I", "t": "Q"}


class BusError(OSError):
    """The bus, or systemd, refuses."""


def start_scope(cgroup):
    """A task that has systemd make the Cgroup's scope, and returns the pid of its keeper."""
    slice, unit = cgroup.scope
    keeper = os.fork()
    if not keeper:
        keep_scope()
    properties = [("Description", ("s", "container of chibishim")), ("Slice", ("s", slice)), ("PIDs", ("au", [keeper])),
                  ("Delegate", ("b", 1)), ("DefaultDependencies", ("b", 0)), ("TasksMax", ("t", MAX_U64)),
                  ("CollectMode", ("s", "inactive-or-failed"))]
    directory = directory_of(cgroup.unified)
    try:
        for _ in range(BUS_ROUNDS):
            try:
                yield from call_systemd("StartTransientUnit", ("s", "s", "a(sv)", "a(sa(sv))"),
                                        (unit, "replace", properties, ()))
                break
            except BusError as error:
                if "UnitExists" not in error.strerror:
                    raise
            yield None, 0.005           # the container's last scope is about to go
        for _ in range(BUS_ROUNDS):
            if str(keeper) in read_text(directory + "/cgroup.procs", "").split():
                break
            yield None, 0.005
        else:
            raise BusError(errno.ETIMEDOUT, "systemd did not make %s" % directory)
        os.mkdir(directory + "/keeper", 0o755)      # a group has processes or controllers for groups below
        write_text(directory + "/keeper/cgroup.procs", str(keeper))
    except BaseException:
        os.kill(keeper, SIGKILL)
        raise
    return keeper


def keep_scope():
    """The keeper's life. It ends with the shim, or when systemd asks."""
    import _signal
    try:
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        _signal.set_wakeup_fd(-1)
        _signal.signal(SIGTERM, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        close_all_but()
        try:
            os.execv("/bin/sleep", ["sleep", "2147483647"])     # has less memory than a copy of a shim
        except OSError:
            time.sleep(2147483647)
    finally:
        os._exit(0)


def call_systemd(member, types, values):
    """A task that calls a method of systemd's manager on the system bus; BusError if it is refused."""
    fd = -1
    try:
        fd = connect_to(SYSTEM_BUS)
        yield from write_all(fd, b"\0AUTH EXTERNAL %s\r\n" % str(os.geteuid()).encode().hex().encode())
        line = b""
        while not line.endswith(b"\n") and len(line) < 1024:
            line += yield from read_bus(fd, 1)
        if not line.startswith(b"OK "):
            raise BusError(errno.EACCES, line.decode("ascii", "replace").strip())
        bus = "org.freedesktop.DBus"
        yield from write_all(fd, b"BEGIN\r\n" + bus_message(1, bus, "/org/freedesktop/DBus", bus, "Hello"))
        yield from read_reply(fd)
        name, path = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
        yield from write_all(fd, bus_message(2, name, path, name + ".Manager", member, types, values))
        yield from read_reply(fd)
    except OSError as error:
        raise BusError(error.errno, "systemd: %s: %s: %s" % (SYSTEM_BUS, member, error.strerror)) from None
    finally:
        if fd >= 0:
            os.close(fd)


def read_bus(fd, size):
    """A task that reads that many bytes."""
    data = b""
    while len(data) < size:
        try:
            piece = os.read(fd, size - len(data))
        except BlockingIOError:
            if not (yield readable(fd, BUS_TIMEOUT_S)):
                raise BusError(errno.ETIMEDOUT, "no answer in %d s" % BUS_TIMEOUT_S) from None
            continue
        if not piece:
            raise BusError(errno.ECONNRESET, "the bus hung up")
        data += piece
    return data


def read_reply(fd):
    """A task that waits for the answer to the one call that is under way; signals are passed over."""
    while True:
        head = yield from read_bus(fd, 16)
        size, _, fields = struct.unpack_from("<III" if head[:1] == b"l" else ">III", head, 4)
        fields += -fields % 8
        if size + fields > MAX_BUS_MESSAGE:
            raise BusError(errno.EMSGSIZE, "a message of %d bytes" % (size + fields))
        rest = yield from read_bus(fd, fields + size)
        if head[1] == BUS_ERROR:        # its name is one of the fields, its text a string of the body
            name = rest[rest.find(b"org."):fields].split(b"\0")[0]
            raise BusError(errno.EIO, "%s: %s" % (name.decode("utf-8", "replace"), rest[fields + 4:-1].decode("utf-8", "replace")))
        if head[1] == BUS_RETURN:
            return


def bus_message(serial, destination, path, interface, member, types=(), values=()):
    """A method call: header, fields, body."""
    body = bytearray()
    for type, value in zip(types, values):
        bus_write(body, type, value)
    fields = [(1, ("o", path)), (2, ("s", interface)), (3, ("s", member)), (6, ("s", destination))]
    if types:
        fields.append((8, ("g", "".join(types))))
    out = bytearray(struct.pack("<cBBBII", b"l", BUS_CALL, 0, 1, len(body), serial))
    bus_write(out, "a(yv)", fields)
    return bytes(out) + bytes(-len(out) % 8) + bytes(body)


def bus_write(out, type, value):
    """Appends a value, aligned as its type demands: a number; a string, path or signature; a variant
    (type, value); an array; a struct of one-letter types."""
    kind = type[0]
    if kind in BUS_NUMBERS:
        code = BUS_NUMBERS[kind]
        out += bytes(-len(out) % struct.calcsize("=" + code)) + struct.pack("<" + code, value)
    elif kind in "sog":
        data = value.encode()
        bus_write(out, "y" if kind == "g" else "u", len(data))
        out += data + b"\0"
    elif kind == "v":
        bus_write(out, "g", value[0])
        bus_write(out, *value)
    elif kind == "(":
        out += bytes(-len(out) % 8)
        for code, item in zip(type[1:-1], value):
            bus_write(out, code, item)
    else:
        bus_write(out, "u", 0)
        place = len(out)
        out += bytes(-len(out) % 8 if type[1] in "(t" else 0)
        start = len(out)
        for item in value:
            bus_write(out, type[1:], item)
        struct.pack_into("<I", out, place - 4, len(out) - start)


# -- devices of version 2 --
#
# It has no device list: an eBPF program answers for each access. Its context is {u32 access_type << 16
# | device type, u32 major, u32 minor}; it returns 1 to allow (bpf(2); kernel.org, cgroup-v2, Device
# controller).

SYS_BPF = {"x86_64": 321, "i686": 357, "aarch64": 280, "armv7l": 386, "riscv64": 280, "s390x": 351, "ppc64le": 361,
           "loongarch64": 280}
BPF_PROG_LOAD, BPF_PROG_ATTACH = 5, 8
BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI = 15, 6, 2
BPF_DEVCG = {"b": 1, "c": 2, "m": 1, "r": 2, "w": 4}                # device types; accesses
BPF_LDX_W, BPF_MOV_K, BPF_MOV, BPF_AND_K, BPF_RSH_K, BPF_JEQ_K, BPF_JNE_K, BPF_EXIT = (
    0x61, 0xB7, 0xBF, 0x57, 0x77, 0x15, 0x55, 0x95)


def device_program(rules):
    """The eBPF program, as bytes, of a list of OCI device rules. Whoever opens a device to read and write
    asks for both at once; for each of the two the last rule about it decides."""
    def instruction(code, destination=0, source=0, offset=0, immediate=0):
        return struct.pack("=BBhi", code, source << 4 | destination, offset, immediate)
    # r2 type, r3 the accesses that no rule has allowed yet, r4 major, r5 minor
    out = [instruction(BPF_LDX_W, 2, 1, 0), instruction(BPF_MOV, 3, 2), instruction(BPF_AND_K, 2, immediate=0xFFFF),
           instruction(BPF_RSH_K, 3, immediate=16), instruction(BPF_LDX_W, 4, 1, 4), instruction(BPF_LDX_W, 5, 1, 8)]
    for rule in reversed(rules):
        allow = bool(rule.get("allow"))
        access = sum(BPF_DEVCG[letter] for letter in set(rule.get("access") or "rwm"))
        if allow:                       # and what is left then, the rule before decides
            verdict = [instruction(BPF_AND_K, 3, immediate=~access), instruction(BPF_JNE_K, 3, offset=2)]
        else:
            verdict = [instruction(BPF_MOV, 1, 3), instruction(BPF_AND_K, 1, immediate=access), instruction(BPF_JEQ_K, 1, offset=2)]
        verdict += [instruction(BPF_MOV_K, 0, immediate=int(allow)), instruction(BPF_EXIT)]
        tests = [(register, rule[name]) for register, name in ((4, "major"), (5, "minor")) if number(rule.get(name)) != "*"]
        if rule.get("type") in ("b", "c"):
            tests.append((2, BPF_DEVCG[rule["type"]]))
        for index, (register, value) in enumerate(tests):
            out.append(instruction(BPF_JNE_K, register, 0, len(tests) - index - 1 + len(verdict), value))
        out += verdict
    return b"".join(out + [instruction(BPF_MOV_K, 0), instruction(BPF_EXIT)])


def device_rule(text):
    """'c 1:3 rwm' as an OCI rule that allows."""
    kind, numbers, access = text.split(" ")
    major, minor = (-1 if part == "*" else int(part) for part in numbers.split(":"))
    return {"allow": True, "type": kind, "major": major, "minor": minor, "access": access}


def attach_device_program(directory, rules):
    """Loads the program of the rules and attaches it to a version 2 group."""
    call = SYS_BPF.get(machine_here())
    if call is None:
        raise ConfigError("config.json: linux.resources.devices: bpf(2) is unknown on %s" % machine_here())
    program = device_program(list(rules) + [device_rule(text) for text in DEVICE_RULES])
    memory = mmap.mmap(-1, len(program) + 64)
    memory[:] = program + b"GPL\0".ljust(64, b"\0")
    address = buffer_address(memory)
    load = struct.pack("=IIQQIIQII", BPF_PROG_TYPE_CGROUP_DEVICE, len(program) // 8, address, address + len(program),
                       0, 0, 0, 0, 0).ljust(120, b"\0")
    group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = libc.syscall(call, BPF_PROG_LOAD, load, len(load))
        attach = struct.pack("=IIII", group, fd, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI).ljust(120, b"\0")
        try:
            libc.syscall(call, BPF_PROG_ATTACH, attach, len(attach))
        finally:
            os.close(fd)
    finally:
        os.close(group)


# === 21. Container process ====================================================
#
# The child of the shim that becomes the container: it carries out the plan of
# chapter 19, looks at its payload, says "ready" and waits for Start on a pipe. The
# shim's death closes the pipe and the kernel kills the child (PR_SET_PDEATHSIG), so
# no half-made container outlives its shim. What the child sends on the status pipe:
# b"R" (all is mounted: the shim's hooks, please), b"L" (no program is here: is it a layer
# of the image?), b"W" or b"N" (a Wasm or native payload, ready), b"E" and the text of an
# error, or the end when the guest runs. The shim's word is the child's pid as it numbers it:
# first when it has the child as its own and in the cgroup, then in answer to R, and when
# Start has come; it answers L with a size and a module.

WASM_MAGIC = b"\0asm"
WASM_COMPONENT = b"\0asm\x0d\0\1\0"
SYS_KEYCTL = {"x86_64": 250, "i686": 288, "aarch64": 219, "armv7l": 311, "riscv64": 219, "s390x": 280, "ppc64le": 271,
              "loongarch64": 219}
KEYCTL_JOIN_SESSION_KEYRING = 1
SCHEDULING_CALLS = {                    # sched_setattr, ioprio_set
    "x86_64": (314, 251), "i686": (351, 289), "aarch64": (274, 30), "armv7l": (380, 314), "riscv64": (274, 30)}
IOPRIO_WHO_PROCESS = 1
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_CLONE3, SYS_MOUNT_SETATTR = 428, 429, 435, 442      # the same everywhere
CLONE_INTO_CGROUP = 1 << 33
AT_EMPTY_PATH, MOUNT_ATTR_RDONLY, MOUNT_ATTR_IDMAP = 0x1000, 1, 0x100000
COPY_AT_ONCE = 1 << 24                  # bytes in one sendfile(2)
AT_FDCWD, AT_RECURSIVE, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = -100, 0x8000, 1, 4, 0x40
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
TIOCSCTTY, TIOCSWINSZ, TIOCGPTPEER, SCM_RIGHTS = 0x540E, 0x5414, 0x5441, 1
# what may be mounted over in a container's /proc, as runc: what lxcfs stands in for, and two parameters
PROC_TARGETS = ("/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime",
                "/proc/loadavg", "/proc/slabinfo", "/proc/net/dev", "/proc/sys/kernel/ns_last_pid", "/proc/sys/crypto/fips_enabled")


class ContainerError(Exception):
    """A step of the set-up failed; the text names the step and the thing."""


class Setup:
    """What the operations share while they run in the child."""

    __slots__ = ("root", "rootfs", "cgroup", "hooks", "null", "limits", "adopted", "trees", "keep", "mappings",
                 "shared", "status", "gate", "report", "pid", "later", "payload", "label", "labels", "console", "cwd", "is_inside")

    def __init__(self, cgroup, hooks, limits, status, gate):
        self.root = -1                  # O_PATH descriptor of the container's root directory
        self.rootfs = "/"
        self.cgroup = cgroup
        self.hooks = hooks              # a function that runs the hooks of a point; None in an exec
        self.null = -1                  # the host's /dev/null, for masking
        self.limits = limits            # the resource module, if the plan needs it
        self.adopted = False            # a child of the shim forked us, and did prepare_child
        self.report = -1                # that child's way to tell the shim
        self.is_inside = not cgroup or not cgroup.unified       # in its unified hierarchy from the start
        self.trees = []                 # mounts that stand by for the bind mounts of the plan, in its order
        self.keep = []                  # further descriptors that the plan needs
        self.mappings = {}              # (uid map, gid map) -> path of a user namespace that has them
        self.shared = 0                 # flags of the namespaces that were joined and are the shim's
        self.status = status            # write end of the pipe to the shim
        self.gate = gate                # read end of the pipe from it
        self.pid = 0                    # ours, as the shim numbers it, once it has spoken
        self.later = 0                  # CLONE_NEWCGROUP, if that namespace is still to be made
        self.payload = None             # what load_payload found
        self.console = -1               # a socket for the terminal's master, if it is to be the container's own
        self.cwd = None                 # the working directory, once we are there
        self.label = ""                 # SELinux context of the file systems that are mounted
        self.labels = []                # (what, descriptor, text) of AppArmor, SELinux: for exec, for Wasm, …


def perform(steps, setup):
    """Carries out a plan in the child."""
    for step in steps:
        try:
            OPERATIONS[step[0]](setup, *step[1:])
        except OSError as error:
            raise ContainerError("%s: %s" % (step[0].replace("_", " "), reason(error))) from None


def open_namespace(path):
    """A namespace's descriptor."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ContainerError("namespace path %s: %s" % (path, error.strerror)) from None


def join_namespace(fd, flag):
    """setns(2); closes the descriptor."""
    try:
        libc.setns(fd, flag)
    except OSError as error:
        name = next(name for name, (known, _) in NAMESPACES.items() if known == flag)
        raise ContainerError("join the %s namespace at its path: %s" % (name, os.strerror(error.errno))) from None
    os.close(fd)


def do_join(setup, path, flag):
    fd = open_namespace(path)
    own = next(file for known, file in NAMESPACES.values() if known == flag)
    if setup and os.fstat(fd).st_ino == os.stat("/proc/self/ns/" + own).st_ino:
        setup.shared |= flag
    join_namespace(fd, flag)


def do_unshare(setup, flags):
    setup.later = flags & CLONE_NEWCGROUP
    libc.unshare(flags & ~CLONE_NEWCGROUP)


def do_cgroup(setup):
    """Waits until the shim has moved us into the cgroup, which may take as long as all that we do
    meanwhile. A cgroup namespace shows what is below the group that its maker is in."""
    if not setup.pid:
        load_engine()
        await_shim(setup)
    if setup.later:
        libc.unshare(setup.later)
        setup.later = 0


def do_loopback_up(setup):
    import _socket
    lo = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    request = bytearray(fcntl.ioctl(lo.fileno(), SIOCGIFFLAGS, b"lo".ljust(40, b"\0")))
    struct.pack_into("=H", request, 16, struct.unpack_from("=H", request, 16)[0] | IFF_UP)
    fcntl.ioctl(lo.fileno(), SIOCSIFFLAGS, bytes(request))
    lo.close()


def do_prepare_root(setup, rootfs, propagation):
    """pivot_root(2) wants the new root to be a mount point, and no mount may leak back."""
    if not os.access(rootfs, os.X_OK):
        raise OSError(errno.EACCES, "rootfs %s: not for user %d: a directory above lacks the x bit" % (rootfs, os.getuid()))
    mount(None, "/", None, propagation)
    for entry in mount_table():         # the mount that holds rootfs must not be shared
        if (rootfs + "/").startswith(entry.mountpoint.rstrip("/") + "/") and any(o.startswith("shared") for o in entry.propagation):
            mount(None, entry.mountpoint, None, MS_PRIVATE)
    mount(rootfs, rootfs, "bind", MS_BIND | MS_REC)
    setup.root = os.open(rootfs, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    setup.rootfs = os.readlink(fd_path(setup.root))
    setup.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


def fd_path(fd):
    """A path to what a descriptor stands for, for calls that take paths only. The host's
    /proc is still there: it is the container's that nobody may trust."""
    return "/proc/self/fd/%d" % fd


def inner_path(setup, fd):
    """The path of a descriptor as seen inside the container."""
    path = os.readlink(fd_path(fd))
    return path[len(setup.rootfs.rstrip("/")):] or "/"


def ensure(setup, path, directory=True, depth=0):
    """An O_PATH descriptor of `path` inside the root, made (with its parents) where absent."""
    try:
        return open_in_root(setup.root, path)
    except OSError as error:
        if error.errno != errno.ENOENT or depth > MAX_SYMLINKS:
            raise
    parent = ensure(setup, directory_of(path.rstrip("/")), True, depth + 1)
    name = name_of(path.rstrip("/"))
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=parent))
        return os.open(name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileExistsError:             # a symlink to what is not there
        target = os.readlink(name, dir_fd=parent)
        return ensure(setup, join_path(directory_of(path.rstrip("/")), target), directory, depth + 1)
    except OSError as error:
        raise OSError(error.errno, "create %s in the container: %s" % (path, error.strerror)) from None
    finally:
        os.close(parent)


def check_target(setup, fd, target, type, flags):
    """CVE-2019-16884 and its kin: nothing may be mounted over parts of /proc, and /proc, /sys
    must be where they claim to be, not behind a symlink of the image."""
    inner = inner_path(setup, fd)
    if type in ("proc", "sysfs") and inner != target:
        raise OSError(errno.EINVAL, "mount %s at %s: a symlink leads to %s" % (type, target, inner))
    if inner.startswith("/proc/") and inner not in PROC_TARGETS or inner == "/proc" and type != "proc" and not flags & MS_BIND:
        raise OSError(errno.EPERM, "mount at %s: inside /proc" % target)


def do_mount(setup, source, target, type, flags, propagation, data, mapping, copy, attributes):
    """A mount of config.json. What follows upon it goes by descriptor where that can be: another
    container that writes to a volume above the target may have renamed that meanwhile, and what the
    name leads to would become read-only instead (CVE-2021-30465 is of this kind)."""
    bind = flags & MS_BIND
    tree = -1
    if bind:
        tree = setup.trees.pop(0) if setup.trees else mapped_tree(setup, source, flags, mapping)
    elif type == "tmpfs":               # the mode of what it covers, if none is asked for
        fd = open_if_there(setup, target)
        if fd is not None:
            data = "mode=%o%s" % (os.fstat(fd).st_mode & 0o7777, data and "," + data)
            os.close(fd)
    directory = not bind or is_directory(tree)
    fd = ensure(setup, target, directory)
    if bind and is_directory(fd) != directory:
        raise OSError(errno.ENOTDIR, "mount %s at %s: one is a directory and the other none" % (source, target))
    check_target(setup, fd, target, type, flags)
    attached = bind and move_mount(tree, fd, flags & MS_REC)
    if not bind:
        mount_filesystem(source, fd, target, type, flags & ~MS_RDONLY if copy else flags, labelled(setup, type, data))
    if copy:
        copy_up(setup, fd, target, flags)
    os.close(fd)
    top = tree if attached else open_in_root(setup.root, target)
    if setup.label and type == "mqueue":
        os.setxattr(fd_path(top), "security.selinux", file_bytes(setup.label))
    extra = flags & ~(MS_BIND | MS_REC | MS_REMOUNT)
    if bind and extra:
        remount(top, MS_BIND | extra)
    if flags & ~mount_flags(top) & MS_NOSYMFOLLOW:
        raise OSError(errno.EINVAL, "mount at %s: option nosymfollow takes Linux 5.10" % target)
    for flag in propagation:
        mount(None, fd_path(top), None, flag)
    set_attributes(top, target, attributes)
    for fd in {top, tree} - {-1}:
        os.close(fd)


def copy_up(setup, below, target, flags):
    """tmpcopyup, after runc: the new tmpfs at `target` gets what the directory below it has. The
    image decides how much that is, so the cgroup is to pay for it."""
    do_cgroup(setup)
    fd = open_in_root(setup.root, target)
    try:
        copy_tree(below, fd)
    except OSError as error:
        raise OSError(error.errno, "tmpcopyup at %s: %s" % (target, error.strerror)) from None
    if flags & MS_RDONLY:
        remount(fd, flags)
    os.close(fd)


def copy_tree(source, target):
    """Copies what one directory has into another, both descriptors, with owners, modes, times and
    extended attributes. By lists, not by recursion: the image decides how deep it is."""
    todo = ["."]
    while todo:
        path = todo.pop()
        here = open_in_root(source, path, os.O_RDONLY | os.O_DIRECTORY)
        there = open_in_root(target, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in os.listdir(here):
                if copy_entry(here, there, name):
                    todo.append(join_path(path, name))
            if path != ".":             # last: each new entry changes its time
                copy_attributes(here, there, ".")
        finally:
            os.close(here)
            os.close(there)


def copy_entry(here, there, name):
    """Copies one entry; of a directory, which makes it true, the name only."""
    status = os.lstat(name, dir_fd=here)
    kind = status.st_mode & 0o170000
    if kind == 0o040000:
        os.mkdir(name, 0o700, dir_fd=there)
        return True
    if kind == 0o120000:
        os.symlink(os.readlink(name, dir_fd=here), name, dir_fd=there)
    elif kind == 0o100000:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
        new = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=there)
        try:
            if os.fstat(fd).st_mode & 0o170000 != kind:     # a volume whose other users are at work
                raise OSError(errno.ESTALE, "%s: somebody replaces it" % name)
            while os.sendfile(new, fd, None, COPY_AT_ONCE):
                pass
        finally:
            os.close(fd)
            os.close(new)
    else:
        os.mknod(name, kind | 0o600, status.st_rdev, dir_fd=there)
    copy_attributes(here, there, name)
    return False


def copy_attributes(here, there, name):
    """An entry's owner, then its mode, which a new owner would cost its set-id bits, and the rest."""
    status = os.lstat(name, dir_fd=here)
    os.chown(name, status.st_uid, status.st_gid, dir_fd=there, follow_symlinks=False)
    if status.st_mode & 0o170000 != 0o120000:
        os.chmod(name, status.st_mode & 0o7777, dir_fd=there)
    old, new = (join_path(fd_path(fd), name) for fd in (here, there))
    for attribute in os.listxattr(old, follow_symlinks=False):
        try:
            os.setxattr(new, attribute, os.getxattr(old, attribute, follow_symlinks=False), follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM):     # a kind that a tmpfs, or a user namespace, lacks
                raise
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=there, follow_symlinks=False)


def mapped_tree(setup, source, flags, mapping):
    """open_tree for a step "mount"."""
    tree = open_tree(source, flags & MS_REC)
    if mapping:
        map_ids(tree, source, setup.mappings[mapping[:2]], MOUNT_ATTR_IDMAP, mapping[2])
    return tree


def map_ids(tree, source, user_namespace, attributes, recursive):
    """Has what open_tree returned show owners as a user namespace maps them, or closes it and
    fails: mount_setattr(2)."""
    space = open_namespace(user_namespace)
    try:
        libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0),
                     struct.pack("=QQQQ", attributes, 0, 0, space), 32)
    except OSError as error:
        os.close(tree)
        reason = {errno.ENOSYS: "it takes Linux 5.12", errno.EINVAL: "its file system cannot, on this kernel",
                  errno.EPERM: "it does already, or is a user namespace's"}.get(error.errno, os.strerror(error.errno))
        raise OSError(error.errno, "mount %s with mapped ids: %s; change the files' owners, and remove the mapping" % (
            source, reason)) from None
    finally:
        os.close(space)


def open_tree(source, recursive):
    """A bind mount that is nowhere yet, as a descriptor; before Linux 5.2 its source."""
    try:
        return libc.syscall(SYS_OPEN_TREE, AT_FDCWD, file_bytes(source), OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0))
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return os.open(source, O_PATH | os.O_CLOEXEC)
        raise OSError(error.errno, "bind mount source %s: %s" % (source, os.strerror(error.errno))) from None


def move_mount(tree, fd, recursive):
    """Attaches what open_tree returned at a place. True if it stands for the mount from now on, and
    not for its source."""
    try:
        libc.syscall(SYS_MOVE_MOUNT, tree, b"", fd, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)
        return True
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    mount(fd_path(tree), fd_path(fd), None, MS_BIND | recursive)
    return False


def prepare_child(setup, steps, stdio, user_namespace, pid_namespace):
    """What a child of the shim does before it forks the container's process. Who is in the container's pid
    namespace already sees that process from its first moment on, and with CAP_SYS_PTRACE the root
    directory and the descriptors that it is born with (CVE-2016-9962): an exec joins all the others
    first. A new container in a pod's pid namespace cannot, for it takes a process inside to mount
    its /proc; but neither is dumpable for a moment, for those who need no such capability."""
    leave_shim(setup, stdio)
    spaces = [open_namespace(path) if path else -1 for path in (pid_namespace, user_namespace)]
    for step in steps if user_namespace else ():
        if step[0] == "rlimit":         # to be set later, when nobody may raise it
            raise_rlimit(setup, *step[1:])
    if setup.hooks is None:
        join_container(setup, steps)
    elif user_namespace:
        prepare_mounts(setup, steps)
    enter_namespaces(*spaces, pid_namespace)


def join_container(setup, steps):
    """The first steps of an exec, to the last namespace that it joins. Their descriptors would be a way
    to the host from inside."""
    count = 1 + max((index for index, step in enumerate(steps) if step[0] == "join"), default=-1)
    perform(steps[:count], setup)
    del steps[:count]
    while setup.keep:
        os.close(setup.keep.pop())


def prepare_mounts(setup, steps):
    """With the host's rights that for which a user namespace's root has none. Nothing that is mounted on
    the way may leak back to the host."""
    libc.unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_SLAVE | MS_REC)
    for index, step in enumerate(steps):
        if step[0] == "join":
            setup.keep.append(open_namespace(step[1]))
            steps[index] = ("join", fd_path(setup.keep[-1]), step[2])
    setup.trees = [mapped_tree(setup, step[1], step[4], step[7]) for step in steps
                   if step[0] == "mount" and step[4] & MS_BIND]


def enter_namespaces(pid, user, pid_namespace):
    """Enters the last two by their descriptors, -1 for none, or makes a pid namespace if that is "". It is
    for the children that follow. A new one is to be the user namespace's; one that is there may
    be the host's, and takes the host's rights."""
    if pid >= 0:
        join_namespace(pid, CLONE_NEWPID)
    if user >= 0:
        join_namespace(user, CLONE_NEWUSER)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)         # fs.suid_dumpable can make of a new identity what it likes
    if pid_namespace == "":
        libc.unshare(CLONE_NEWPID)


def labelled(setup, type, data):
    """Mount options with the SELinux context. The kernel labels proc and sysfs itself, and mqueue has no
    such option."""
    if not setup.label or type in ("proc", "sysfs", "mqueue"):
        return data
    return '%s%scontext="%s"' % (data, data and ",", setup.label)


def mount_filesystem(source, fd, target, type, flags, data):
    """A mount that is no bind mount; the error names the target, not a descriptor."""
    try:
        mount(source, fd_path(fd), type, flags, data)
    except OSError as error:
        raise OSError(error.errno, "mount %s at %s: %s" % (type, target, os.strerror(error.errno))) from None


def set_attributes(fd, target, attributes):
    """Changes a mount and all below it at once: none may stay writable for a moment, or for good."""
    for word, on, off in attributes:
        try:
            libc.syscall(SYS_MOUNT_SETATTR, fd, b"", AT_EMPTY_PATH | AT_RECURSIVE, struct.pack("=QQQQ", on, off, 0, 0), 32)
        except OSError as error:
            raise OSError(error.errno, "mount at %s: option %s: %s" % (target, word, os.strerror(error.errno))) from None


def mount_flags(fd):
    """The present flags of a mount: statvfs(3)."""
    old = os.fstatvfs(fd).f_flag
    return sum(flag for bit, flag in (
        (1, MS_RDONLY), (2, MS_NOSUID), (4, MS_NODEV), (8, MS_NOEXEC), (1024, MS_NOATIME), (2048, MS_NODIRATIME), (4096, MS_RELATIME),
        (8192, MS_NOSYMFOLLOW))
        if old & bit)


def remount(fd, flags):
    """Changes a mount's flags; those that a user namespace locks are kept: mount_namespaces(7)."""
    path = fd_path(fd)
    try:
        mount(None, path, None, MS_REMOUNT | flags)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        mount(None, path, None, MS_REMOUNT | flags | mount_flags(fd))


def do_mount_cgroup(setup, target, flags, attributes):
    """The container's own groups at /sys/fs/cgroup: the unified one, or a directory of
    version 1's controllers."""
    do_cgroup(setup)
    directories = setup.cgroup.directories if setup.cgroup else {}
    fd = ensure(setup, target)
    check_target(setup, fd, target, "cgroup", flags)
    if not directories:
        raise OSError(errno.ENOENT, "mount cgroup at %s: no cgroup here" % target)
    if set(directories) == {""}:
        mount(directories[""], fd_path(fd), None, MS_BIND | MS_REC)
    else:
        data = labelled(setup, "tmpfs", "mode=755")
        mount_filesystem("tmpfs", fd, target, "tmpfs", flags & ~(MS_RDONLY | MS_BIND | MS_REC), data)
        for controller, directory in directories.items():
            path = join_path(target, controller.replace("name=", "") or "unified")
            point = ensure(setup, path)
            mount(directory, fd_path(point), None, MS_BIND | MS_REC)
            os.close(point)
            remount_top(setup, path, MS_BIND | flags & ~MS_REC)
    os.close(fd)
    if flags & MS_RDONLY:
        remount_top(setup, target, MS_BIND | flags & ~MS_REC)
    fd = open_in_root(setup.root, target)
    set_attributes(fd, target, attributes)
    os.close(fd)


def remount_top(setup, target, flags):
    """remount for the uppermost mount at a path of the container."""
    fd = open_in_root(setup.root, target)
    remount(fd, flags)
    os.close(fd)


def do_device(setup, path, mode, major, minor, uid, gid, user_namespace):
    """A device node; in a user namespace, where mknod(2) is refused, the host's bind-mounted."""
    if user_namespace:
        fd = ensure(setup, path, False)
        mount(path, fd_path(fd), None, MS_BIND)
        os.close(fd)
        return
    parent = ensure(setup, directory_of(path))
    name = name_of(path)
    try:
        before = os.umask(0)            # no chmod(2) afterwards: that follows a link which another user of a volume has put there
        try:
            os.mknod(name, mode, os.makedev(major, minor), dir_fd=parent)
        finally:
            os.umask(before)
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
    except FileExistsError:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if status.st_mode & 0o170000 != mode & 0o170000 or status.st_rdev != os.makedev(major, minor):
            raise OSError(errno.EEXIST, "%s: the image has something else there" % path) from None
    except OSError as error:
        raise OSError(error.errno, "%s: %s" % (path, error.strerror)) from None
    finally:
        os.close(parent)


def do_symlink(setup, target, path):
    parent = ensure(setup, directory_of(path))
    try:
        os.symlink(target, name_of(path), dir_fd=parent)
    except FileExistsError:
        pass
    finally:
        os.close(parent)


def do_sync(setup):
    do_cgroup(setup)
    os.write(setup.status, b"R")
    await_shim(setup)


def await_shim(setup):
    """Waits for the shim's word, which is our pid; without one it has gone or given us up."""
    word = os.read(setup.gate, 4)
    if not word:
        os._exit(255)
    setup.pid, = struct.unpack("=i", word)


def do_terminal(setup, uid, console):
    """The process's terminal, from the container's devpts; the master goes to the shim. What the
    image, or somebody inside, has put in its place is found out; nothing is looked up by name twice
    (CVE-2025-52565)."""
    import _socket
    root = setup.root if setup.root >= 0 else os.open("/", O_PATH | os.O_CLOEXEC)
    master = open_in_root(root, "/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(master)
    if status.st_mode & 0o170000 != 0o020000 or status.st_rdev != os.makedev(5, 2):
        raise OSError(errno.ENODEV, "/dev/ptmx in the container is something else")
    libc.unlockpt(master)
    slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    os.fchown(slave, uid, -1)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    os.close(slave)
    fcntl.ioctl(0, TIOCSCTTY, 0)
    if console:
        fd = ensure(setup, "/dev/console", False)
        check_target(setup, fd, "/dev/console", "bind", MS_BIND)
        mount(fd_path(0), fd_path(fd), None, MS_BIND)
        os.close(fd)
    peer = _socket.socket(fileno=setup.console)
    peer.sendmsg([b"T"], [(_socket.SOL_SOCKET, SCM_RIGHTS, struct.pack("=i", master))])
    peer.close()
    os.close(master)


def do_hooks(setup, point):
    if setup.hooks:
        setup.hooks(point, setup.pid)


def do_sysctl(setup, path, value, space):
    if NAMESPACES[space][0] & setup.shared:
        raise OSError(errno.EPERM, "%s: the %s namespace is the host's; set it there" % (path, space))
    write_text("/proc/sys/" + path, value)


def open_if_there(setup, path):
    """open_in_root, None for what is absent."""
    try:
        return open_in_root(setup.root, path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def do_readonly(setup, path):
    fd = open_if_there(setup, path)
    if fd is not None:
        mount(fd_path(fd), fd_path(fd), None, MS_BIND | MS_REC)
        os.close(fd)
        fd = open_in_root(setup.root, path)     # what lies on top now
        remount(fd, MS_BIND | MS_RDONLY | mount_flags(fd))
        os.close(fd)


def do_mask(setup, path):
    """Files disappear under /dev/null (the host's, by descriptor: CVE-2025-31133),
    directories under an empty file system."""
    fd = open_if_there(setup, path)
    if fd is None:
        return
    if is_directory(fd):
        options = "nr_blocks=1,nr_inodes=2"     # Ubuntu's Linux 5.4 refuses one inode
        mount("tmpfs", fd_path(fd), "tmpfs", MS_RDONLY, labelled(setup, "tmpfs", options))
    else:
        mount(fd_path(setup.null), fd_path(fd), None, MS_BIND)
    os.close(fd)


def do_readonly_root(setup, rootfs):
    fd = os.open(rootfs, O_PATH | os.O_CLOEXEC)
    remount(fd, MS_BIND | MS_RDONLY | mount_flags(fd))
    os.close(fd)


def do_pivot_root(setup):
    """The new root on top of the old one, then the old one away: pivot_root(2), NOTES."""
    old = os.open("/", O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fchdir(setup.root)
    try:
        libc.pivot_root(b".", b".")
    except OSError as error:
        advice = "; is / an initramfs? ask for no pivot_root (ctr run --no-pivot)" if error.errno == errno.EINVAL else ""
        raise OSError(error.errno, os.strerror(error.errno) + advice) from None
    os.fchdir(old)
    mount(None, ".", None, MS_SLAVE | MS_REC)       # so that the unmount stays here
    umount(".")
    os.chdir("/")
    os.close(old)


def do_move_root(setup):
    """The new root over the old one, which stays below where nothing leads to: for an old root that
    pivot_root(2) cannot replace, an initramfs. Its proc and sysfs go first, as to have them somewhere
    is a right to mount others: mount_namespaces(7)."""
    outside = [entry for entry in mount_table() if not (entry.mountpoint + "/").startswith(setup.rootfs + "/")]
    for entry in outside:
        if any(option.startswith("shared") for option in entry.propagation):
            make_slave(entry.mountpoint)            # so that the unmounts stay here
    for entry in outside:
        if entry.type in ("proc", "sysfs"):
            take_away(entry.mountpoint)
    os.fchdir(setup.root)
    mount(".", "/", None, MS_MOVE)
    do_chroot(setup, ".")


def make_slave(mountpoint):
    """Keeps what happens to a mount here; it need not be there, under another."""
    try:
        mount(None, mountpoint, None, MS_SLAVE)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise


def take_away(mountpoint):
    """Unmounts, or covers what a user namespace has locked or another mount hides."""
    try:
        umount(mountpoint)
    except FileNotFoundError:
        pass                            # it was below one that has gone
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
        mount("tmpfs", mountpoint, "tmpfs", MS_RDONLY, "size=0")


def do_propagation(setup, flag):
    """Of the new root: all else was private, or a slave, when it was mounted."""
    mount(None, "/", None, flag)


def do_chroot(setup, rootfs):
    os.chroot(rootfs)
    os.chdir("/")


def do_hostname(setup, name):
    libc.sethostname(name.encode(), len(name.encode()))


def do_domainname(setup, name):
    libc.setdomainname(name.encode(), len(name.encode()))


def do_rlimit(setup, name, soft, hard):
    try:
        setup.limits.setrlimit(getattr(setup.limits, name), (to_limit(soft), to_limit(hard)))
    except (ValueError, AttributeError) as error:
        raise OSError(errno.EPERM, "%s %d:%d: %s" % (name, soft, hard, error)) from None


def raise_rlimit(setup, name, soft, hard):
    """Makes room for do_rlimit below a limit that is too low for it."""
    before = setup.limits.getrlimit(getattr(setup.limits, name))
    if before[1] != -1 and (to_limit(hard) == -1 or hard > before[1]):
        do_rlimit(setup, name, before[0] & MAX_U64, hard)


def to_limit(value):
    """RLIM_INFINITY is -1 in Python, 2^64-1 in JSON."""
    return -1 if value >= MAX_U64 >> 1 else value


def scheduling_call(name):
    """The number of a system call that the C library has no function for."""
    calls = SCHEDULING_CALLS.get(machine_here())
    if calls is None:
        raise OSError(errno.ENOSYS, "%s is unknown on %s" % (name, machine_here()))
    return calls[name == "ioprio_set"]


def do_scheduler(setup, attributes):
    libc.syscall(scheduling_call("sched_setattr"), 0, attributes, 0)


def do_io_priority(setup, value):
    libc.syscall(scheduling_call("ioprio_set"), IOPRIO_WHO_PROCESS, 0, value)


def do_affinity(setup, processors):
    os.sched_setaffinity(0, processors)


def do_personality(setup, value):
    libc.personality(value)


def do_time_offsets(setup, text):
    """unshare(2) makes a time namespace for children only; its clocks are set before anybody enters."""
    if text:
        write_text("/proc/self/timens_offsets", text)
    do_join(None, "/proc/self/ns/time_for_children", CLONE_NEWTIME)


def do_session_keyring(setup):
    """A session keyring of the process's own: the one it has is the shim's, and so any container's
    of the pod: session-keyring(7). It stays root's, for other users may have but 200 keys in all
    (kernel.keys.maxkeys); whoever has it as his session's may use it nevertheless."""
    call = SYS_KEYCTL.get(machine_here())
    if call is None:
        return
    try:
        libc.syscall(call, KEYCTL_JOIN_SESSION_KEYRING, None)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):      # a kernel without keys; a container around us that may not
            raise OSError(error.errno, "join a session keyring: %s" % os.strerror(error.errno)) from None


def do_bounding(setup, mask):
    for capability in range(64):
        if not mask >> capability & 1:
            try:
                libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return              # beyond the kernel's last capability
                raise


def do_identity(setup, uid, gid, groups, umask):
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.setgroups(groups)
    except PermissionError:
        if groups:
            raise                       # a rootless user namespace: setgroups is denied, and nothing was asked
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)      # another identity has dropped it
    libc.prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.umask(umask)


def do_make_cwd(setup, path):
    """As root, since the user may be unable to make the directory, or to reach it."""
    try:
        if not exists(path):
            make_directories(path, 0o755)
        os.chdir(path)
        setup.cwd = path
    except PermissionError:
        pass                            # a network file system: the user can, or nobody


def do_cwd(setup, path):
    if setup.cwd != path:
        os.chdir(path)
    if not os.getcwd().startswith("/"):
        raise OSError(errno.EPERM, "cwd %s lies outside the container (CVE-2024-21626)" % path)


def do_capabilities(setup, effective, permitted, inheritable, ambient):
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    halves = [[mask >> shift & MAX_U32 for mask in (effective, permitted, inheritable)] for shift in (0, 32)]
    libc.capset(header, struct.pack("=6I", *halves[0], *halves[1]))
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(64):
        if ambient >> capability & 1:
            libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def do_no_new_privs(setup):
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def do_check_labels(setup, apparmor, selinux):
    """Whether the kernel heeds them, by the host's files."""
    if apparmor and read_text("/sys/module/apparmor/parameters/enabled", "N") != "Y":
        raise ContainerError("process.apparmorProfile %s: this kernel has no AppArmor, or not enabled; unconfined is possible" % apparmor)
    if selinux:
        need_selinux("process.selinuxLabel " + selinux)


def do_open_labels(setup, apparmor, selinux):
    """Opens what takes the labels. For a new container /proc is the host's; for an exec the container's, as only
    the process itself may write there: an image, or who is inside, may have put a file there that
    takes anything (CVE-2019-16884, CVE-2019-19921)."""
    proc = os.open("/proc", O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.fstat(proc).st_ino != PROC_ROOT_INO or not is_kernel_filesystem(proc):
            raise ContainerError("/proc is no proc file system, without which nobody gets a label")
        if apparmor:
            directory = "self/attr/apparmor" if is_directory("/proc/self/attr/apparmor") else "self/attr"
            open_label(setup, "process.apparmorProfile " + apparmor, proc, directory, "exec " + apparmor, "changeprofile " + apparmor)
        if selinux:
            open_label(setup, "process.selinuxLabel " + selinux, proc, "self/attr", selinux, selinux)
    finally:
        os.close(proc)


def need_selinux(what):
    """ContainerError where nobody would heed a label."""
    if "selinuxfs" not in read_text("/proc/filesystems").split():
        raise ContainerError("%s: this kernel has no SELinux, or not enabled; remove the label" % what)


def do_mount_label(setup, label):
    need_selinux("linux.mountLabel " + label)
    setup.label = label


def open_label(setup, what, proc, directory, for_exec, for_now):
    """Prepares the label for either payload: proc_pid_attr(5). Nothing may be mounted there."""
    for name, text in (("exec", for_exec), ("current", for_now)):
        fd = open_in_root(proc, join_path(directory, name), os.O_WRONLY, RESOLVE_NO_XDEV)
        setup.labels.append((what, fd, text))


def do_labels(setup):
    """A native program gets its label by execve(2); a Wasm guest has no such moment, so the
    engine changes its own."""
    for what, fd, text in setup.labels[setup.payload[0] == "wasm"::2]:
        try:
            os.write(fd, file_bytes(text))
        except OSError as error:
            reason = "no such profile is loaded" if error.errno == errno.ENOENT else os.strerror(error.errno)
            raise OSError(error.errno, "%s: %s" % (what, reason)) from None
    for _, fd, _ in setup.labels:
        os.close(fd)


def do_payload(setup, process):
    setup.payload = load_payload(process, None if setup.hooks is None else lambda: receive_module(setup))
    environment = process.get("env") or []
    if setup.payload[0] == "native" and not any(pair.startswith("HOME=") for pair in environment):
        process["env"] = environment + ["HOME=" + home_of((process.get("user") or {}).get("uid") or 0)]


def home_of(uid):
    """A user's home directory: passwd(5), of the container."""
    for line in read_text("/etc/passwd", "").splitlines() if is_file("/etc/passwd") else ():
        fields = line.split(":")
        if fields[2:3] == [str(uid)]:
            return "".join(fields[5:6]) or "/"
    return "/"


def do_seccomp(setup, call, flags, program):
    memory = bytearray(program)         # no mapping: its end would be a call that the filter may forbid
    try:
        libc.syscall(call, SECCOMP_SET_MODE_FILTER, flags, struct.pack("@HP", len(program) // 8, buffer_address(memory)))
    except OSError as error:
        raise OSError(error.errno, "linux.seccomp: the kernel refuses the filter: %s" % os.strerror(error.errno)) from None


OPERATIONS = {function.__name__[3:]: function for function in (
    do_join, do_unshare, do_time_offsets, do_scheduler, do_io_priority, do_affinity, do_personality, do_cgroup,
    do_loopback_up, do_prepare_root, do_mount, do_mount_cgroup, do_device, do_symlink, do_terminal,
    do_sync, do_hooks, do_sysctl, do_readonly, do_mask, do_readonly_root, do_pivot_root, do_move_root, do_propagation,
    do_chroot, do_hostname, do_domainname, do_rlimit, do_session_keyring, do_bounding, do_make_cwd, do_identity, do_cwd, do_capabilities,
    do_no_new_privs, do_mount_label, do_check_labels, do_open_labels, do_payload, do_labels, do_seccomp)}


def open_program(path):
    """A descriptor to read a program by; O_PATH for one that its user may execute, but not read."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        if not os.access(path, os.X_OK):
            raise
        return os.open(path, O_PATH | os.O_CLOEXEC)


def find_program(name, environment, cwd):
    """(path, descriptor) of args[0], found as execvp(3) does; ContainerError in runc's words,
    from which Docker derives exit statuses 126 and 127."""
    if "/" in name:
        candidates = [join_path(cwd, name)]
    else:
        path = next((e[5:] for e in environment if e.startswith("PATH=")), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        candidates = [join_path(cwd, directory, name) for directory in path.split(":")]
    problem = None
    for candidate in candidates:
        try:
            fd = open_program(candidate)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR) or "/" in name:
                problem = problem or error.errno
            continue
        if os.fstat(fd).st_mode & 0o170000 == 0o100000:
            return candidate, fd
        os.close(fd)
        problem = errno.EACCES          # a directory, say
    if problem is None:
        raise ContainerError('exec: "%s": executable file not found in $PATH' % name)
    raise ContainerError('exec: "%s": %s%s' % (name, "stat %s: " % candidates[0] if problem == errno.ENOENT else "",
                                               os.strerror(problem).lower()))


def open_payload(process):
    """(path, descriptor, exported function or "") of args[0]; what follows a # is the function, if
    no file has the whole name."""
    name, environment, cwd = process["args"][0], process.get("env") or [], process.get("cwd") or "/"
    try:
        return (*find_program(name, environment, cwd), "")
    except ContainerError:
        if "#" not in name:
            raise
    path, _, function = name.partition("#")
    return (*find_program(path, environment, cwd), function)


def load_payload(process, ask=None):
    """What args[0] is, by its content: ("wasm", mapped bytes, exported function) or
    ("native", path). Where no such file is, `ask()` may know a module, or None."""
    name = process["args"][0]
    try:
        path, fd, function = open_payload(process)
    except ContainerError:
        data = ask and ask()
        if data is None:
            raise
        check_payload(name, data[:8])
        return "wasm", data, name.partition("#")[2] or "_start"
    try:
        head = os.pread(fd, 8, 0)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        head = b""                      # O_PATH: a module must be read, so it is native
    if head[:4] == WASM_MAGIC:
        check_payload(name, head)
        data = map_descriptor(fd)
        os.close(fd)
        return "wasm", data, function or "_start"
    os.close(fd)
    if head.lstrip()[:1] == b"(":
        raise ContainerError('exec: "%s": WebAssembly text; translate it with wat2wasm' % name)
    return "native", path, None


def check_payload(name, head):
    """ContainerError if the first eight bytes are not those of a module that can run."""
    if head == WASM_COMPONENT:
        raise ContainerError('exec: "%s": a WebAssembly component; only core modules can run' % name)
    if head[:4] != WASM_MAGIC:
        raise ContainerError('exec: "%s": the image\'s layer is no WebAssembly module' % name)


def receive_module(setup):
    """The module that is a layer of the container's image, from the shim; None if there is none."""
    os.write(setup.status, b"L")
    size, = struct.unpack("=q", read_into(bytearray(8), setup.gate))
    return read_into(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), setup.gate) if size else None


def read_into(buffer, fd):
    """Fills the buffer from the shim's pipe; where that ends early the shim has given us up."""
    position = 0
    while position < len(buffer):
        piece = os.read(fd, min(len(buffer) - position, 1 << 16))
        if not piece:
            os._exit(255)
        buffer[position:position + len(piece)] = piece
        position += len(piece)
    return buffer


def map_descriptor(fd):
    """A file's bytes, mapped: pages that nobody reads cost nothing."""
    try:
        return mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    except (ValueError, OSError):
        return os.read(fd, os.fstat(fd).st_size)


def reset_signals():
    """Every signal as a fresh process has it, none blocked."""
    import _signal
    _signal.set_wakeup_fd(-1)
    for number in range(1, 65):
        try:
            _signal.signal(number, _signal.SIG_DFL)
        except OSError:
            pass                        # KILL, STOP, and those that are the C library's
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())


FILE_LIMITS = []                        # RLIMIT_NOFILE as it was before raise_file_limit: (soft, hard)


def raise_file_limit():
    """As many descriptors as the hard limit allows."""
    import resource
    if not FILE_LIMITS:
        FILE_LIMITS.append(resource.getrlimit(resource.RLIMIT_NOFILE))
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILE_LIMITS[0][1], FILE_LIMITS[0][1]))


def restore_file_limit():
    """Gives a child what the shim had: there are programs that loop over all that they may have, or use
    select(2), which ends at 1024. After its further descriptors are closed, as new ones must be below."""
    for limits in FILE_LIMITS:
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def fork_program(path, words, environment, descriptors):
    """Forks a program that has these descriptors, as 0, 1 and so on, and no others; returns its pid."""
    pid = os.fork()
    if not pid:
        try:
            reset_signals()
            for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, len(descriptors)) for fd in descriptors]):
                os.dup2(fd, target)
            close_all_but(*range(len(descriptors)))
            restore_file_limit()
            os.execve(path, words, environment)
        finally:
            os._exit(127)
    return pid


def load_child():
    """Nothing; but in the archive, the first call of this loads all that containers' processes need."""


def leave_shim(setup, stdio):
    """What a child of the shim does first: of what it has of the shim's, only that remains which the
    container's process needs, and nobody may look at it. It dies with the shim."""
    reset_signals()
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    for target, fd in enumerate(stdio):
        os.dup2(fd, target)
    if setup.cgroup:
        setup.cgroup.enter_alone()
        if setup.adopted and not setup.is_inside:       # else the shim moves it, which takes longer
            setup.cgroup.enter(0, setup.cgroup.unified)
    close_all_but(0, 1, 2, setup.status, setup.gate, *{setup.console, setup.report} - {-1}, *setup.trees, *setup.keep)
    restore_file_limit()
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def container_child(process, steps, setup, stdio, terminal):
    """The life of the forked child; never returns. `stdio` are three descriptors."""
    code = 255
    try:
        if setup.adopted:               # prepare_child did the rest; the shim's word is that it is our parent
            await_shim(setup)
            libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        else:
            leave_shim(setup, stdio)
        os.setsid()
        if terminal and setup.console < 0:
            fcntl.ioctl(0, TIOCSCTTY, 0)
        code = container_main(process, steps, setup)
    except (ContainerError, ConfigError, OSError) as error:
        send_error(setup.status, reason(error))
    except Exception as error:          # a defect of this module: named, not hidden
        send_error(setup.status, "internal error: %s: %s" % (error.__class__.__name__, error))
    os._exit(code)


def send_error(status, text):
    """Tells the shim; without a shim nobody wants to know."""
    try:
        os.write(status, b"E" + text.encode("utf-8", "replace")[:4000])
    except OSError:
        pass


def make_user_namespace(uids, gids):
    """A descriptor of a new user namespace with these maps. A child makes it and waits, as
    the maps must be written from outside: user_namespaces(7)."""
    read, write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        try:
            libc.unshare(CLONE_NEWUSER)
            os.write(write, b"U")
            time.sleep(60)
        except OSError as error:
            send_error(write, str(error.strerror))
        finally:
            os._exit(0)
    os.close(write)
    try:
        word = os.read(read, 4096)
        if word != b"U":
            raise ContainerError("user namespace: " + word[1:].decode("utf-8", "replace"))
        for name, rows in (("uid_map", uids), ("gid_map", gids)):
            write_text("/proc/%d/%s" % (child, name), "".join("%d %d %d\n" % row for row in rows))
        return os.open("/proc/%d/ns/user" % child, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(read)
        os.kill(child, SIGKILL)
        os.waitpid(child, 0)


def container_main(process, steps, setup):
    """Set-up, waiting for Start, and the guest's run; returns the exit status."""
    perform(steps, setup)
    for fd in setup.keep:
        os.close(fd)
    kind, program, function = setup.payload
    os.write(setup.status, kind[:1].upper().encode())
    module = None
    if kind == "wasm":
        module = early_module(program)  # while containerd makes up its mind
    await_shim(setup)
    do_hooks(setup, "startContainer")
    environment = process.get("env") or []
    libc.prctl(PR_SET_PDEATHSIG, 0 if kind == "native" else SIGKILL, 0, 0, 0)
    if kind == "native":
        try:
            os.execve(program, process["args"], dict(pair.split("=", 1) for pair in environment if "=" in pair))
        except OSError as error:
            raise ContainerError("exec %s: %s" % (program, error.strerror.lower())) from None
    import _signal
    _signal.signal(SIGCHLD, _signal.SIG_IGN)        # orphans of native execs come to init: the kernel reaps them, wait(2)
    os.close(setup.status)
    os.close(setup.gate)
    return run_command(module or program, process["args"], environment, [("/", "/")], function)


def early_module(data):
    """The decoded module; a malformed one is reported at Start, on the guest's stderr."""
    try:
        return Module(data)
    except WasmError:
        return None


# === 22. Task service =========================================================
#
# containerd.task.v2.Task (v3 is the same) for any number of containers in one shim.
# A handler is a method with the call's name; it takes the decoded request and returns
# the response's dict, or it is a generator that waits on the loop first: between two of
# its yields nobody else changes anything, after one everything may have changed. Its
# refusals are RpcErrors with the codes that runc's shim uses, for clients act on them.

CREATED, RUNNING, STOPPED, PAUSED = 1, 2, 3, 4
# what a client's options may be: containerd.runc.v1.Options for any runtime, or what it sends up to 1.7
OPTIONS_TYPES = {"containerd.runc.v1.Options": "RuncOptions", "containerd.linux.runc.CreateOptions": "LinuxOptions"}
TASK_METHODS = {                        # method -> (request, response)
    "State": ("StateRequest", "StateResponse"), "Create": ("CreateTaskRequest", "CreateTaskResponse"),
    "Start": ("StartRequest", "StartResponse"), "Delete": ("DeleteRequest", "DeleteResponse"),
    "Pids": ("PidsRequest", "PidsResponse"), "Pause": ("PauseRequest", "Empty"), "Resume": ("ResumeRequest", "Empty"),
    "Checkpoint": ("CheckpointTaskRequest", "Empty"), "Kill": ("KillRequest", "Empty"),
    "Exec": ("ExecProcessRequest", "Empty"), "ResizePty": ("ResizePtyRequest", "Empty"),
    "CloseIO": ("CloseIORequest", "Empty"), "Update": ("UpdateTaskRequest", "Empty"),
    "Wait": ("WaitRequest", "WaitResponse"), "Stats": ("StatsRequest", "StatsResponse"),
    "Connect": ("ConnectRequest", "ConnectResponse"), "Shutdown": ("ShutdownRequest", "Empty"),
    "Expect": ("StateRequest", "Empty"),            # not containerd's: from our own `start`
}
# (method, state of the process) that are refused; what is not here is allowed.
REFUSALS = {
    ("Start", RUNNING): (FAILED_PRECONDITION, "cannot start a running process"),
    ("Start", PAUSED): (FAILED_PRECONDITION, "cannot start a paused process"),
    ("Start", STOPPED): (FAILED_PRECONDITION, "cannot start a stopped process"),
    ("Delete", RUNNING): (FAILED_PRECONDITION, "cannot delete a running process"),
    ("Delete", PAUSED): (FAILED_PRECONDITION, "cannot delete a paused process"),
    ("Kill", STOPPED): (NOT_FOUND, "process already finished"),
    ("Pause", CREATED): (FAILED_PRECONDITION, "cannot pause a container that was not started"),
    ("Pause", PAUSED): (FAILED_PRECONDITION, "cannot pause a paused container"),
    ("Pause", STOPPED): (FAILED_PRECONDITION, "cannot pause a stopped container"),
    ("Resume", CREATED): (FAILED_PRECONDITION, "cannot resume a container that is not paused"),
    ("Resume", RUNNING): (FAILED_PRECONDITION, "cannot resume a container that is not paused"),
    ("Resume", STOPPED): (FAILED_PRECONDITION, "cannot resume a stopped container"),
    ("Exec", PAUSED): (FAILED_PRECONDITION, "cannot exec in a paused container"),
    ("Exec", STOPPED): (FAILED_PRECONDITION, "cannot exec in a stopped container"),
    ("Update", STOPPED): (FAILED_PRECONDITION, "cannot update a stopped container"),
    ("Stats", STOPPED): (NOT_FOUND, "the container's processes are gone"),
}
DRAIN_STALL_S, DRAIN_MAX_S = 0.5, 10    # for a client that reads nothing, or slowly
LOGGER_READY_S, LOGGER_END_S = 10, 12
FORK_S = 10                             # for all that comes before a fork into somebody else's namespaces
COPY_BYTES = 65536
PIECES_IN_A_ROW = 16                    # then others have their turn: a flood of output stalls nobody
EXPECT_S = 30                           # between a container's `start` and its Create, at most
MANY_CONTAINERS = 64                    # each has up to eight descriptors; 1024 are the soft limit of systemd's services


def timestamp(seconds):
    """The Timestamp of a time.time()."""
    return {"seconds": int(seconds), "nanos": int(seconds % 1 * 1e9)}


class Process:
    """The init process of a container, or a further one made by Exec."""

    __slots__ = ("id", "pid", "pidfd", "state", "exit_status", "exited_at", "exited", "io", "spec", "status", "gate",
                 "kind", "killed", "started", "announced", "heard")

    def __init__(self, id, io):
        self.id = id                    # exec id; "" for init
        self.io = io                    # Stdio
        self.pid = 0
        self.pidfd = -1
        self.state = CREATED
        self.exit_status = 0
        self.exited_at = None           # Timestamp
        self.exited = Event()           # after the state says STOPPED and the output was read
        self.spec = None                # an exec's OCI process
        self.status = -1                # read end of the child's status pipe
        self.gate = -1                  # write end of the pipe that the child waits on
        self.heard = b""                # of what the child said on the status pipe, the rest
        self.kind = b""                 # b"W" or b"N"
        self.killed = 0                 # the signal that SIGKILL stands for
        self.started = None             # Event: Start, once called, has published its event or failed
        self.announced = False          # containerd has heard of it, and so will of its exit

    def close(self, loop, *names):
        """Closes the descriptors that belong to the process's life, or those named; who waits for one sees it."""
        for name in names or ("pidfd", "status", "gate"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                loop.close(fd)


class Stdio:
    """The names of a process's streams and the descriptors behind them."""

    def __init__(self, request):
        self.names = {name: request[name] for name in ("stdin", "stdout", "stderr", "terminal")}
        self.child = []                 # the child's 0, 1, 2; closed after the fork
        self.kept = {}                  # path -> read end that outlives a client
        self.output = -1                # a terminal's way out
        self.stdin = -1                 # the fifo's read end
        self.stdin_writer = -1          # held so that a client's leaving is no end of file
        self.sink = -1                  # the pipe to the child, or the terminal's master
        self.master = -1
        self.size = None                # the terminal's (width, height), once known
        self.console = self.child_console = -1      # a pair of sockets: the child sends its own terminal's master
        self.copied = Event()           # the terminal's output has been copied
        self.log_ends = []              # the pipes to a logger, before open: for stdout, for stderr
        self.logger = None              # (pid, Event of its end)

    def open(self, own_terminal=False):
        """Opens everything, a terminal too unless the child brings its own; the error names the stream."""
        if own_terminal and self.names["terminal"]:
            import _socket
            self.console, self.child_console = (end.detach() for end in _socket.socketpair(
                _socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC))
        for name in ("stdin", "stdout", "stderr"):
            try:
                if self.names["terminal"]:
                    self.open_terminal(name)
                elif name == "stdin":
                    self.open_stdin(self.names[name])
                else:
                    self.child.append(self.open_output(self.names[name]))
            except OSError as error:
                self.close()
                raise ContainerError("%s %s: %s" % (name, self.names[name], error.strerror)) from None

    def open_stdin(self, name):
        """Through a pipe of our own: only so can CloseIO end it."""
        if not name:
            self.child.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            return
        self.open_source(name)
        read, self.sink = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.sink, False)
        self.child.append(read)

    def open_source(self, name):
        """Both ends of the client's stdin fifo."""
        path = stream_path(name)[1]
        self.stdin = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if os.fstat(self.stdin).st_mode & 0o170000 == 0o010000:
            self.stdin_writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def open_output(self, name):
        """A descriptor that the child can write to. For a fifo the read end is kept too, so
        that the write never blocks at open and a client that goes breaks no pipe."""
        scheme, path = stream_path(name)
        if not path:
            return os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        if scheme == "binary":
            if not self.log_ends:
                raise OSError(errno.EINVAL, "a logger is started for stdout, and takes stderr too")
            return self.log_ends.pop(0)
        if scheme == "file":
            make_directories(directory_of(path), 0o755)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if os.stat(path).st_mode & 0o170000 != 0o010000:
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if path not in self.kept:
            self.kept[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def open_terminal(self, name):
        """A pseudo-terminal for all three; what leaves it goes to stdout's fifo."""
        if name == "stdin":
            if self.console >= 0:
                self.child = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)] * 3
            else:
                master, slave = os.openpty()
                self.child = [slave] * 3
                self.take_master(master)
            if self.names["stdin"]:
                self.open_source(self.names["stdin"])
        elif name == "stdout":
            self.output = self.open_output(self.names["stdout"])
            os.set_blocking(self.output, False)

    def take_master(self, master):
        """Makes a terminal ours."""
        os.set_blocking(master, False)
        self.master = self.sink = master
        if self.size:
            self.resize(*self.size)

    def receive_master(self, loop):
        """Takes the terminal that the child has sent, and begins to copy."""
        import _socket
        if self.console < 0:
            return
        console, self.console = _socket.socket(fileno=self.console), -1
        _, control, _, _ = console.recvmsg(1, 64, _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC)
        console.close()
        self.take_master(struct.unpack("=i", control[0][2])[0])
        self.copied = Event()
        self.copy(loop)

    def forked(self, loop):
        """The child has its copies: ours go, the copying begins."""
        for fd in {*self.child, *self.log_ends, self.child_console} - {-1}:
            os.close(fd)
        self.child, self.log_ends, self.child_console = [], [], -1
        if self.console < 0:
            self.copy(loop)
        else:
            self.copied.happen()        # until there is a terminal

    def copy(self, loop):
        """Begins to copy what is to be copied."""
        if self.stdin >= 0:
            loop.spawn(self.copy_stdin(loop))
        if self.master >= 0:
            loop.spawn(self.copy_terminal())
        else:
            self.copied.happen()

    def copy_stdin(self, loop):
        """Client to process, until the end of file that CloseIO makes possible."""
        yield from self.copy_all("stdin", "sink")
        if self.sink >= 0 and self.sink != self.master:
            loop.close(self.sink)
            self.sink = -1

    def copy_terminal(self):
        """Terminal to client, until the last process has closed its side."""
        yield from self.copy_all("master", "output")
        self.copied.happen()

    def copy_all(self, source, sink):
        """A task that copies from one descriptor of ours, by its name, to another, until the first ends, which
        a terminal tells by EIO (pty(7)), or somebody closes either."""
        pieces = 0
        while True:
            try:
                data = os.read(getattr(self, source), COPY_BYTES)
                if not data:
                    return
                yield from self.write_all(sink, data)
                pieces += 1
                if not pieces % PIECES_IN_A_ROW:
                    yield None, 0
            except BlockingIOError:
                yield readable(getattr(self, source))
            except OSError:
                return

    def write_all(self, name, data):
        """A task that writes all to a descriptor of ours, by its name: its number may have been
        closed, and be another file's, when the wait is over."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(getattr(self, name), view):]
            except BlockingIOError:
                yield writable(getattr(self, name))

    def close_stdin(self):
        """CloseIO: no more writers but the client, so its end of file arrives."""
        if self.stdin_writer >= 0:
            os.close(self.stdin_writer)
            self.stdin_writer = -1

    def drain(self, loop):
        """A task that waits until the client has read all output: what is in the fifo when exit is
        reported is lost. A client that reads nothing is given DRAIN_STALL_S, a slow one DRAIN_MAX_S."""
        yield self.copied, 2
        if self.output >= 0:
            loop.close(self.output)     # for which copy_terminal may still wait
            self.output = -1
        deadline = time.monotonic() + DRAIN_MAX_S
        stall, before = time.monotonic() + DRAIN_STALL_S, None
        self.keep_writers()
        while time.monotonic() < deadline:
            left = sum(bytes_available(fd) for fd in self.kept.values() if has_reader(fd))
            if not left:
                return
            if left != before:
                stall, before = time.monotonic() + DRAIN_STALL_S, left
            if time.monotonic() > stall:
                return
            yield None, 0.002

    def keep_writers(self):
        """Write ends instead of the read ends that were kept: they keep what is in the fifos
        too, and tell whether anybody is there to read it."""
        for path, fd in self.kept.items():
            try:
                self.kept[path] = os.open("/proc/self/fd/%d" % fd, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            os.close(fd)

    def resize(self, width, height):
        """TIOCSWINSZ, as soon as there is a terminal; the kernel tells the processes by SIGWINCH."""
        if not width or not height:
            return
        self.size = width, height
        if self.master >= 0:
            fcntl.ioctl(self.master, TIOCSWINSZ, struct.pack("=HHHH", height, width, 0, 0))

    def close(self, loop=None):
        """Closes what is open; the tasks that copy see it."""
        fds = self.child + self.log_ends + list(self.kept.values()) + [
            self.output, self.stdin, self.stdin_writer, self.sink, self.master, self.console, self.child_console]
        self.child, self.log_ends, self.kept = [], [], {}
        self.output = self.stdin = self.stdin_writer = self.sink = self.master = self.console = self.child_console = -1
        for fd in set(fds) - {-1}:
            if loop:
                loop.close(fd)
            else:
                os.close(fd)


def has_reader(fd):
    """Whether a fifo's write end has a reader; a read end counts as one."""
    return not wait_for({fd: 0}, 0)


def keep_log(bundle):
    """Goes on in this bundle's log if nobody reads the present one any more: its container has gone."""
    try:
        if not has_reader(2):
            fd = os.open(join_path(bundle, "log"), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.dup2(fd, 2)
            os.close(fd)
    except OSError:
        pass                            # there is none


def stream_path(name):
    """(scheme, path) of a stream's name; a bare path is a fifo's."""
    scheme, found, rest = name.partition("://")
    if not found:
        return "fifo", name
    if scheme not in ("fifo", "file", "binary"):
        raise OSError(errno.EINVAL, "scheme %s is not supported; use a fifo, file:// or binary://" % scheme)
    return scheme, rest.partition("?")[0]


def unquote(text):
    """%41 as A (RFC 3986, section 2.1)."""
    first, *rest = text.encode("utf-8", "replace").split(b"%")
    return b"".join([first] + [bytes.fromhex(piece[:2].decode()) + piece[2:] for piece in rest]).decode("utf-8", "replace")


def logger_words(uri):
    """The command line in a binary:// URI: the path, then each name and value of the query."""
    path, _, query = uri.partition("://")[2].partition("?")
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    try:
        return [unquote(path)] + [unquote(word.replace("+", " ")) for name, _, value in pairs for word in (name, value)]
    except ValueError:
        raise ContainerError("log %s: a %% is not followed by two hexadecimal digits" % uri) from None


def start_logger(io, id, namespace, children):
    """A task that starts the program of a binary:// URI as containerd's own shims do: its
    descriptors 3 and 4 are stdout's and stderr's read ends, 5 it closes when it is ready."""
    words = logger_words(io.names["stdout"])
    if not os.access(words[0], os.X_OK):
        raise ContainerError("log %s: no such program" % words[0])
    for _ in range(3):
        io.log_ends += os.pipe2(os.O_CLOEXEC)           # closed with the rest of io, should this fail
    out, our_out, err, our_err, ready, their_ready = io.log_ends
    pid = fork_program(words[0], words, {"CONTAINER_ID": id, "CONTAINER_NAMESPACE": namespace}, [0, 1, 2, out, err, their_ready])
    for fd in (out, err, their_ready):
        os.close(fd)
    ended = Event()
    children[pid] = lambda code: ended.happen()
    io.log_ends, io.logger = [our_out, our_err], (pid, ended)
    in_time = yield readable(ready, LOGGER_READY_S)
    os.close(ready)
    if not in_time:
        raise ContainerError("log %s: not ready after %d s; it should close descriptor 5" % (words[0], LOGGER_READY_S))


def end_logger(io):
    """A task that waits for the logger: its pipes are closed. It may write for a while, not for ever."""
    (pid, ended), io.logger = io.logger, None           # now, as an exec's Delete and init's may both come here
    for signal, seconds in ((SIGTERM, LOGGER_END_S), (SIGKILL, 1)):
        yield ended, seconds
        if not ended.set:               # which may be so since the time was over
            os.kill(pid, signal)


class Container:
    """A container: its bundle, its init process, those of Exec, and what must be undone."""

    __slots__ = ("id", "bundle", "config", "rootfs", "mounted", "cgroup", "init", "execs", "paused", "hook", "made", "deleted",
                 "oom", "oom_kills", "keeper")

    def __init__(self, id, bundle):
        self.id = id
        self.bundle = bundle
        self.config = {}
        self.rootfs = ""
        self.mounted = False            # we mounted something at rootfs
        self.cgroup = None
        self.init = None
        self.execs = {}
        self.paused = False             # its processes are frozen
        self.oom = -1                   # a descriptor of Cgroup.watch_oom
        self.oom_kills = 0              # so many are reported
        self.hook = 0                   # pid of the hook that the shim runs
        self.keeper = 0                 # pid of the process that keeps systemd's scope
        self.made = Event()             # Create has ended
        self.deleted = None             # Event: the Delete that is at work has ended

    def process(self, exec_id):
        """The process with that exec id; NotFound if there is none."""
        if not exec_id:
            return self.init
        if exec_id not in self.execs:
            raise RpcError(NOT_FOUND, "process %s: not found" % exec_id)
        return self.execs[exec_id]

    def state(self, process):
        """A process's state: what runs in a paused container is paused."""
        return PAUSED if self.paused and process.state == RUNNING else process.state


# -- images whose layers are modules --
#
# The layers of a Wasm artifact are no file systems: each is a module, in containerd's
# content store, and the container's root is empty. A child that finds no program there
# asks the shim, and the shim asks containerd by gRPC: HTTP/2 (RFC 9113), as much of it as
# a client needs that opens one stream after the other. The peer may use no dynamic table
# for its headers (RFC 7541), as we set its size to 0, but it may use Huffman's code. What
# it may send before we take it is bounded; our requests are too small to fill its window.

ARTIFACT_LAYERS = ("application/wasm", "application/vnd.wasm.content.layer.v1+wasm", "application/vnd.module.wasm.content.layer.v1+wasm",
                   "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm")
MAX_DOCUMENT_BYTES = 4 << 20            # of an index, a manifest, a configuration
MAX_LAYER_BYTES = 1 << 30               # as many as a module may have
GRPC_STALL_S = 10                       # so long without a word is an error
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP2_HEADER_BYTES, HTTP2_FRAME_BYTES, HTTP2_BLOCK_BYTES = 9, 16384, 65536
HTTP2_WINDOW, HTTP2_FIRST_WINDOW = 1 << 20, 65535       # what a peer may send before we say more; for a connection, at first
DATA_FRAME, HEADERS_FRAME, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 1, 1, 4, 8, 0x20
SETTINGS_HEADER_TABLE_SIZE, SETTINGS_ENABLE_PUSH, SETTINGS_INITIAL_WINDOW_SIZE = 1, 2, 4
STATIC_STATUS = {8: "200", 9: "204", 10: "206", 11: "304", 12: "400", 13: "404", 14: "500"}     # of the static table's entries
STATIC_ENTRIES = 61
HUFFMAN = (                             # length of a code -> its symbols in the order of their codes: RFC 7541, appendix B; ASCII
    (5, "012aceiost"), (6, " %-./3456789=A_bdfghlmnpru"), (7, ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"), (8, "&*,;XZ"), (10, '!"()?'),
    (11, "'+|"), (12, "#>"), (13, "\0$@[]~"), (14, "^}"), (15, "<`{"), (19, "\\"))


def http2_frame(type, flags, stream, payload):
    """The bytes of one frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", type, flags, stream) + payload


def header_block(fields):
    """(name, value) pairs as literals that nobody need remember (RFC 7541, section 6.2.2)."""
    return b"".join([b"\0" + header_string(name) + header_string(value) for name, value in fields])


def header_string(text):
    """A length with a prefix of seven bits (section 5.1), and the bytes as they are."""
    size = len(text.encode())
    return (bytes([size]) if size < 127 else b"\x7f" + varint(size - 127)) + text.encode()


class HeaderReader:
    """Reads a header block (RFC 7541, section 6); what it cannot be raises IndexError."""

    def __init__(self, block):
        self.block = block
        self.position = 0

    def fields(self):
        """{name: value}, without what the static table says of others than :status."""
        found = {}
        while self.position < len(self.block):
            first = self.block[self.position]
            if first & 0x80:
                found[":status"] = STATIC_STATUS.get(self.index(7), found.get(":status"))
            elif first & 0xE0 == 0x20:
                self.integer(5)         # the table's size: 0
            else:
                index = self.index(6 if first & 0x40 else 4)
                name = self.string() if not index else ":status" if index in STATIC_STATUS else ""
                found[name] = self.string()
        return found

    def integer(self, bits):
        """An integer with a prefix of so many bits (section 5.1)."""
        value = self.block[self.position] & (1 << bits) - 1
        self.position += 1
        if value < (1 << bits) - 1:
            return value
        for shift in range(0, 28, 7):
            byte = self.block[self.position]
            self.position += 1
            value += (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise IndexError("an integer over 2^28")

    def index(self, bits):
        """A place in the static table, 0 for none: there is no dynamic one."""
        value = self.integer(bits)
        if value > STATIC_ENTRIES:
            raise IndexError("entry %d of a table that we do not allow" % value)
        return value

    def string(self):
        """A string, by Huffman's code or as it is (section 5.2)."""
        coded = self.block[self.position] & 0x80
        size = self.integer(7)
        data = self.block[self.position:self.position + size]
        self.position += size
        if len(data) < size:
            raise IndexError("a string beyond the end")
        return unhuffman(data) if coded else data.decode("utf-8", "replace")


def unhuffman(data):
    """The text of a string in Huffman's code; up to seven bits at the end are padding."""
    table, code, before = {}, 0, 0
    for length, symbols in HUFFMAN:
        code <<= length - before
        before = length
        for symbol in symbols:
            table[length, code] = symbol
            code += 1
    text, code, length = [], 0, 0
    for byte in data:
        for shift in range(7, -1, -1):
            code, length = code << 1 | byte >> shift & 1, length + 1
            if (length, code) in table:
                text.append(table[length, code])
                code = length = 0
            elif length > before:
                raise IndexError("a code that is no ASCII")
    if length > 7 or code != (1 << length) - 1:
        raise IndexError("the padding is none")
    return "".join(text)


class GrpcClient:
    """Calls of containerd, one after the other, for tasks of a loop. `call` asks, `message` gets one
    answer after the other; RpcError tells what containerd refuses, and what it should not have sent."""

    def __init__(self, loop, path, namespace):
        self.loop = loop
        self.namespace = namespace
        self.fd = connect_to(path)
        settings = struct.pack(">HIHIHI", SETTINGS_HEADER_TABLE_SIZE, 0, SETTINGS_ENABLE_PUSH, 0, SETTINGS_INITIAL_WINDOW_SIZE, HTTP2_WINDOW)
        self.out = HTTP2_PREFACE + http2_frame(SETTINGS, 0, 0, settings)
        self.allow(0, HTTP2_WINDOW - HTTP2_FIRST_WINDOW)
        self.buffer = bytearray()       # of the connection: less than a frame
        self.method = ""
        self.stream = -1
        self.data = bytearray()         # of the stream: less than a message
        self.block = b""                # of headers that go on in the next frame
        self.headers = {}
        self.last = self.ended = False  # with this block, or already, the stream ends

    def allow(self, stream, size):
        """Lets the peer send so much more (RFC 9113, section 6.9)."""
        if size:
            self.out += http2_frame(WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))

    def error(self, text, *values, code=INTERNAL):
        """What there is to raise."""
        return RpcError(code, "containerd's %s: %s" % (self.method or "gRPC", text % values))

    def flush(self):
        """A task that writes what there is to write."""
        data, self.out = self.out, b""
        try:
            in_time = yield from write_all(self.fd, data, time.monotonic() + GRPC_STALL_S)
        except OSError as error:        # send_module takes a broken pipe for the child's
            raise self.error("%s", error.strerror, code=UNAVAILABLE) from None
        if not in_time:
            raise self.error("not all was taken in %d s", GRPC_STALL_S, code=DEADLINE_EXCEEDED)

    def call(self, method, name, request):
        """A task that sends a request, the message `name`, to a method of containerd.services."""
        self.method, self.stream = method, self.stream + 2
        self.headers, self.last, self.ended = {}, False, False
        self.data.clear()
        block = header_block(((":method", "POST"), (":scheme", "http"), (":path", "/containerd.services." + method), (":authority", "localhost"),
                              ("content-type", "application/grpc"), ("te", "trailers"), ("containerd-namespace", self.namespace)))
        body = encode(name, request)
        if len(block) + len(body) > HTTP2_FRAME_BYTES - 5:
            raise self.error("a request of %d bytes", len(body))
        self.out += http2_frame(HEADERS_FRAME, END_HEADERS, self.stream, block)
        self.out += http2_frame(DATA_FRAME, END_STREAM, self.stream, struct.pack(">BI", 0, len(body)) + body)
        yield from self.flush()

    def message(self, name):
        """A task: the next answer, a message `name`; None after the last one of a call that succeeded."""
        while True:
            if len(self.data) >= 5:
                compressed, size = struct.unpack_from(">BI", self.data)
                if compressed or size > MAX_FRAME_BYTES:
                    raise self.error("a message that is compressed" if compressed else "a message of %d bytes" % size)
                if len(self.data) >= 5 + size:
                    body = bytes(self.data[5:5 + size])
                    del self.data[:5 + size]
                    try:
                        return decode(name, body)
                    except ProtobufError as error:
                        raise self.error("%s", error) from None
            if self.ended:
                break
            yield from self.receive()
        status = self.headers.get("grpc-status")
        if status is None or self.data:
            raise self.error("no gRPC: HTTP status %s, %d more bytes", self.headers.get(":status"), len(self.data))
        if status != "0":
            text = self.headers.get("grpc-message", "")
            try:
                text = unquote(text)
            except ValueError:
                pass                    # as it is: the gRPC protocol wants it so
            raise self.error("%s", text or "status " + status, code=int(status) if status.isdigit() else UNKNOWN_ERROR)
        return None

    def ask(self, method, name, request, answer):
        """A task: the one answer of a method that has one."""
        yield from self.call(method, name, request)
        message = yield from self.message(answer)
        if message is None or (yield from self.message(answer)):
            raise self.error("not one answer")
        return message

    def receive(self):
        """A task that waits for bytes and acts on the frames that they complete."""
        if not (yield readable(self.fd, GRPC_STALL_S)):
            raise self.error("no answer for %d s", GRPC_STALL_S, code=DEADLINE_EXCEEDED)
        try:
            data = os.read(self.fd, COPY_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            raise self.error("the connection was closed", code=UNAVAILABLE)
        self.buffer += data
        while len(self.buffer) >= HTTP2_HEADER_BYTES:
            size = int.from_bytes(self.buffer[:3], "big")
            if size > HTTP2_FRAME_BYTES:
                raise self.error("a frame of %d bytes", size)
            end = HTTP2_HEADER_BYTES + size
            if len(self.buffer) < end:
                break
            type, flags, stream = struct.unpack_from(">BBI", self.buffer, 3)
            payload = bytes(self.buffer[HTTP2_HEADER_BYTES:end])
            del self.buffer[:end]
            self.on_frame(type, flags, stream & 0x7FFFFFFF, payload)
        yield from self.flush()

    def on_frame(self, type, flags, stream, payload):
        """Acts on one frame; those of streams that are over only give back their window."""
        if type == SETTINGS and not flags & ACK:
            self.out += http2_frame(SETTINGS, ACK, 0, b"")
        elif type == PING and not flags & ACK:
            self.out += http2_frame(PING, ACK, 0, payload)
        elif type == GOAWAY and int.from_bytes(payload[:4], "big") < self.stream:
            raise self.error("it is going away", code=UNAVAILABLE)
        elif type == DATA_FRAME:
            self.allow(0, len(payload))
            if stream == self.stream and not self.ended:
                self.data += self.unpadded(flags, payload)
                self.ended = bool(flags & END_STREAM)
                self.allow(stream, 0 if self.ended else len(payload))
        elif type == RST_STREAM and stream == self.stream:
            raise self.error("the stream was reset: HTTP/2 error %d", int.from_bytes(payload, "big"), code=UNAVAILABLE)
        elif type in (HEADERS_FRAME, CONTINUATION) and stream == self.stream:
            self.on_headers(type, flags, payload)

    def on_headers(self, type, flags, payload):
        """A part of the headers or trailers; with END_HEADERS they are complete."""
        if type == HEADERS_FRAME:
            self.block, self.last = b"", bool(flags & END_STREAM)
            payload = self.unpadded(flags, payload)[5 if flags & PRIORITY else 0:]
        self.block += payload
        if len(self.block) > HTTP2_BLOCK_BYTES:
            raise self.error("headers of more than %d bytes", HTTP2_BLOCK_BYTES)
        if flags & END_HEADERS:
            try:
                self.headers.update(HeaderReader(self.block).fields())
            except IndexError as error:
                raise self.error("malformed headers: %s", error) from None
            self.ended = self.last

    def unpadded(self, flags, payload):
        """A frame's payload without its padding (RFC 9113, section 6.1)."""
        if not flags & PADDED:
            return payload
        if not payload or payload[0] >= len(payload):
            raise self.error("a frame that is all padding")
        return payload[1:len(payload) - payload[0]]

    def close(self):
        """Ends the connection."""
        self.loop.close(self.fd)


def send_module(loop, address, namespace, id, gate):
    """A task that answers a child which found no program: on the pipe `gate` the size of its image's
    module as 8 bytes, and the module; size 0 if there is none, or nobody to ask. ContainerError
    if the image is an artifact that cannot be run."""
    client = layer = None
    try:
        try:
            client = GrpcClient(loop, address, namespace)
            layer = yield from find_layer(client, id)
        except (OSError, RpcError) as error:
            log("%s: is its image a Wasm artifact? %s" % (id, error.args[-1]))
        if layer:
            yield from send_layer(client, layer, gate)
        else:
            os.write(gate, struct.pack("=q", 0))
    except RpcError as error:
        raise ContainerError("layer %s: %s" % (layer["digest"], error.args[1])) from None
    except BrokenPipeError:
        pass                            # the child has died, and its status pipe tells why
    finally:
        if client:
            client.close()


def find_layer(client, id):
    """A task: the descriptor of the one layer of a container's image that is a module; None if the
    image is of another kind."""
    answer = yield from client.ask("containers.v1.Containers/Get", "GetContainerRequest", {"id": id}, "GetContainerResponse")
    name = (answer["container"] or {}).get("image")
    if not name:
        return None                     # not known to containerd: Docker's graph drivers
    answer = yield from client.ask("images.v1.Images/Get", "GetImageRequest", {"name": name}, "GetImageResponse")
    what = "image " + name
    digest = member(member(answer, "image", dict, what), "target", dict, what)["digest"]
    manifest = yield from read_document(client, digest, what)
    if "manifests" in manifest:
        digest = member(choose_manifest(member(manifest, "manifests", list, what)), "digest", str, what + ": index")
        manifest = yield from read_document(client, digest, what)
    what += ": manifest"
    config = yield from read_document(client, member(member(manifest, "config", dict, what), "digest", str, what), what)
    layers = [layer for layer in member(manifest, "layers", list, what)
              if layer.__class__ is dict and layer.get("mediaType") in ARTIFACT_LAYERS]
    if config.get("architecture") != "wasm" or not layers:
        return None
    if len(layers) > 1:
        raise ContainerError("%s: %d layers are modules; only one can run" % (what, len(layers)))
    return {"digest": member(layers[0], "digest", str, what), "size": member(layers[0], "size", int, what)}


def choose_manifest(manifests):
    """The entry of an index that is for WebAssembly, or the only one; {} if that is not to be said."""
    entries = [entry for entry in manifests if entry.__class__ is dict]
    chosen = [entry for entry in entries if (entry.get("platform").__class__ is dict) and entry["platform"].get("architecture") == "wasm"]
    return chosen[0] if chosen else entries[0] if len(entries) == 1 else {}


def member(document, name, type, what):
    """document[name], which must be of that type: an image can hold anything."""
    value = document.get(name)
    if value.__class__ is not type:
        raise ContainerError("%s: no %s that is %s" % (what, name, type.__name__))
    return value


def read_document(client, digest, what):
    """A task: the object in a JSON document of the content store."""
    pieces, size = [], 0
    yield from client.call("content.v1.Content/Read", "ReadContentRequest", {"digest": digest})
    while True:
        message = yield from client.message("ReadContentResponse")
        if message is None:
            break
        pieces.append(message["data"])
        size += len(message["data"])
        if size > MAX_DOCUMENT_BYTES:
            raise ContainerError("%s: %s has more than %d bytes" % (what, digest, MAX_DOCUMENT_BYTES))
    document = parse_json(b"".join(pieces).decode("utf-8", "replace"), "%s: %s" % (what, digest))
    if document.__class__ is not dict:
        raise ContainerError("%s: %s is not an object" % (what, digest))
    return document


def send_layer(client, layer, gate):
    """A task that copies a layer from the content store to a pipe, as fast as that is read."""
    size, sent = layer["size"], 0
    if not 0 < size <= MAX_LAYER_BYTES:
        raise ContainerError("layer %s: %d bytes are no module" % (layer["digest"], size))
    os.write(gate, struct.pack("=q", size))
    yield from client.call("content.v1.Content/Read", "ReadContentRequest", {"digest": layer["digest"]})
    while True:
        message = yield from client.message("ReadContentResponse")
        data = message["data"] if message else b""
        sent += len(data)
        if sent > size or message is None and sent < size:
            raise ContainerError("layer %s: not the %d bytes that the manifest says" % (layer["digest"], size))
        if message is None:
            return
        if not (yield from write_all(gate, data, time.monotonic() + GRPC_STALL_S)):
            raise ContainerError("layer %s: the container's process takes nothing" % layer["digest"])


class TaskService:
    """The service of a namespace. `publish(topic, message name, message)` queues an event; `address`
    is containerd's gRPC socket."""

    def __init__(self, loop, publish, namespace, address=""):
        self.loop = loop
        self.namespace = namespace
        self.address = address
        self.publish = publish
        self.containers = {}
        self.children = {}              # pid -> function(wait status)
        self.vacant = Event()           # the last container has gone
        self.expected = {}              # id -> until when a Create of it is waited for
        self.runs_wasm = self.is_warm = False           # whether a container was a Wasm one, and the engine is loaded
        self.stop = False

    def container(self, id):
        """The container; NotFound if there is none, or Create still works on it."""
        container = self.containers.get(id)
        if not container or not container.init.announced:
            raise RpcError(NOT_FOUND, "container %s: not found" % id)
        return container

    def find(self, request, method):
        """(container, process) of a request, if the method may touch it in its state."""
        container = self.container(request["id"])
        process = container.process(request.get("exec_id", ""))
        refusal = REFUSALS.get((method, container.state(process)))
        if refusal:
            raise RpcError(refusal[0], "%s: %s" % (request["id"], refusal[1]))
        return container, process

    # --- life ---

    def Create(self, request):
        id = request["id"]
        self.expected.pop(id, None)
        if self.stop:
            raise RpcError(UNAVAILABLE, "the shim is shutting down")
        if id in self.containers:
            raise RpcError(ALREADY_EXISTS, "container %s: already exists" % id)
        if not valid_id(id):
            raise RpcError(INVALID_ARGUMENT, "container id %r: use letters, digits, and _ + - . after the first" % id[:100])
        if request["checkpoint"]:
            raise RpcError(UNIMPLEMENTED, "restoring a checkpoint is not supported")
        if len(self.containers) >= MANY_CONTAINERS:
            raise_file_limit()
        if self.runs_wasm and not self.is_warm:
            self.warm_up()
        container = Container(id, request["bundle"])
        container.init = Process("", Stdio(request))
        self.containers[id] = container
        keep_log(container.bundle)
        try:
            yield from self.set_up(container, request["rootfs"], runtime_options([request["options"]]))
            container.init.announced = True
        except Exception as error:      # a defect of this module too leaves nothing behind
            yield from self.tear_down(container)
            if not isinstance(error, (ContainerError, ConfigError, OSError)):
                raise
            raise RpcError(UNKNOWN_ERROR, "create container %s: %s" % (id, reason(error))) from None
        finally:
            if not container.init.announced:
                self.forget(container)
            container.made.happen()
        names = container.init.io.names
        self.publish("/tasks/create", "TaskCreate", {
            "container_id": id, "bundle": container.bundle, "rootfs": request["rootfs"], "io": names, "pid": container.init.pid})
        self.loop.spawn(self.watch_oom(container))
        return {"pid": container.init.pid}

    def warm_up(self):
        """Loads here what a guest's process needs: the pod's next guests share its pages."""
        import gc
        self.is_warm = True
        load_child()
        load_engine()
        gc.freeze()

    def set_up(self, container, rootfs_mounts, options):
        """Create's work; whatever fails, tear_down undoes."""
        bundle = container.bundle
        container.config = config = read_config(bundle)
        check_config(config)
        container.rootfs = normal_path(join_path(bundle, config["root"]["path"]))
        if rootfs_mounts:
            container.rootfs = join_path(bundle, "rootfs")
            container.mounted = True
            mount_rootfs(rootfs_mounts, container.rootfs)
        if not is_directory(container.rootfs):
            raise ContainerError("rootfs %s: no such directory" % container.rootfs)
        userns = in_user_namespace()
        steps = plan(config, bundle, container.rootfs, userns, not options.get("no_pivot_root"))
        container.cgroup = yield from self.make_cgroup(container, userns)
        init = container.init
        spec = config["process"]
        yield from self.open_streams(container, init, spec)
        self.fork(container, init, spec, steps, namespaces(config))
        record(bundle, ["init %d %s" % (init.pid, process_start_time(init.pid))])
        if config.get("hooks"):
            yield from self.hear(container, init)       # b"R"
            yield from self.run_hooks(container, "prestart", "creating")
            yield from self.run_hooks(container, "createRuntime", "creating")
            self.answer(init)
        yield from self.await_ready(container, init, spec)

    def open_streams(self, container, process, spec):
        """Opens a process's streams, those to a logger when it is there; a terminal has its size from the start."""
        size = spec.get("consoleSize") or {}
        if not process.io.size:
            process.io.resize((size.get("width") or 0) & 0xFFFF, (size.get("height") or 0) & 0xFFFF)
        if process.io.names["stdout"].startswith("binary://"):
            yield from start_logger(process.io, container.id, self.namespace, self.children)
            if process.exited.set:      # by dispose
                raise ContainerError("deleted before it ran")
        process.io.open(own_terminal(container.config, spec))

    def make_cgroup(self, container, userns):
        """A task that returns the container's Cgroup with its limits in force, or None where a user
        namespace has no say in such things and nothing was asked."""
        linux = container.config.get("linux") or {}
        if userns and not linux.get("cgroupsPath") and not linux.get("resources"):
            return None
        systemd = not userns and is_directory(SYSTEMD_RUNS)
        cgroup = cgroup_of(linux.get("cgroupsPath"), container.id, cgroup_mounts(mount_table()), systemd)
        container.cgroup = cgroup
        record(container.bundle, ["cgroup %s %s" % pair for pair in cgroup.directories.items()])
        if cgroup.scope:
            container.keeper = yield from start_scope(cgroup)
            self.children[container.keeper] = lambda code: setattr(container, "keeper", 0)
        cgroup.create()
        container.oom_kills = cgroup.oom_kills()        # of another container's, if it was there
        resources = linux.get("resources") or {}
        limit_cgroup(cgroup, resources, resources.get("devices") or () if "devices" in resources else None)
        return cgroup

    def fork(self, container, process, spec, steps, spaces, keep=()):
        """Forks the child of a process. `spaces` are the container's namespaces as namespaces()
        tells them, `keep` descriptors that the steps need."""
        maps = id_mappings(container.config)
        uid = (spec.get("user") or {}).get("uid") or 0
        give_streams(process.io.child, mapped_id(maps[0], uid) or 0 if "user" in spaces else uid)
        limits = None
        if any(step[0] == "rlimit" for step in steps):
            import resource as limits
        libc.prctl(PR_SET_NAME, b"chibishim", 0, 0, 0)      # also loads _ctypes before the fork
        hooks = None if process.id else lambda point, pid: run_hooks_here(container, point, pid)
        made = []                       # descriptors for the child
        try:
            process.status, child_status = os.pipe2(os.O_CLOEXEC)
            made.append(child_status)
            child_gate, process.gate = os.pipe2(os.O_CLOEXEC)
            made.append(child_gate)
            cgroup = container.cgroup
            if cgroup and process.id:
                cgroup = cgroup.entrance(container.init.pid)
            setup = Setup(cgroup, hooks, limits, child_status, child_gate)
            setup.keep, setup.console = list(keep), process.io.child_console
            if spaces.get("user") == "":
                made.append(make_user_namespace(*maps))
                setup.keep.append(made[-1])
                spaces["user"] = fd_path(made[-1])
            self.make_mappings(setup, steps, spaces, made)
            pid = fork_into(setup, steps, process.io.child, spaces.get("user"), spaces.get("pid"))
            if not pid:
                container_child(spec, steps, setup, process.io.child, process.io.names["terminal"])
        finally:
            for fd in made:
                os.close(fd)
        process.pid = pid
        self.children[pid] = lambda code: self.loop.spawn(self.on_exit(container, process, code))
        try:
            process.pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, SIGKILL)       # a child that is not reaped yet: no other process has its pid
            raise
        os.set_blocking(process.status, False)
        process.io.forked(self.loop)
        try:
            if not setup.is_inside and not setup.adopted:
                cgroup.enter(pid, cgroup.unified)
            self.answer(process)
        except ProcessLookupError:
            pass                        # it has died, and its status pipe tells why

    def make_mappings(self, setup, steps, spaces, made):
        """User namespaces for the mounts that map ids; `made` gets the descriptors."""
        setup.mappings[(), ()] = spaces.get("user")
        for maps in {step[7][:2] for step in steps if step[0] == "mount" and step[7]} - {((), ())}:
            made.append(make_user_namespace(*maps))
            setup.keep.append(made[-1])
            setup.mappings[maps] = fd_path(made[-1])

    def await_ready(self, container, process, spec):
        """Waits until the child has nothing left to do but to run its payload, and does what is not for it to do."""
        letter = yield from self.hear(container, process)
        if letter == b"L":
            os.set_blocking(process.gate, False)
            yield from send_module(self.loop, self.address, self.namespace, container.id, process.gate)
            letter = yield from self.hear(container, process)
        process.kind = letter
        self.runs_wasm = self.runs_wasm or process.kind == b"W"
        process.io.receive_master(self.loop)
        if spec.get("oomScoreAdj") is not None and not is_dead(process):
            write_text("/proc/%d/oom_score_adj" % process.pid, str(spec["oomScoreAdj"]))

    def hear_more(self, process):
        """Adds to what was heard of the child; b"" at the end."""
        while True:
            try:
                piece = os.read(process.status, 4096)
            except BlockingIOError:
                yield readable(process.status)
                continue
            process.heard += piece
            return piece

    def hear(self, container, process):
        """The child's next letter; ContainerError with its text if it failed, or with what is known of its death."""
        while process.heard[:1] in (b"", b"E"):
            if not (yield from self.hear_more(process)):
                text = process.heard[1:].decode("utf-8", "replace") or "the container's process died before it was ready"
                if container.cgroup and container.cgroup.oom_kills() > container.oom_kills:
                    text += "; the kernel killed one for want of memory: linux.resources.memory.limit is too low"
                raise ContainerError(text)
        letter, process.heard = process.heard[:1], process.heard[1:]
        return letter

    def answer(self, process):
        """Lets the child go on. False if it has died, of what its status pipe tells."""
        try:
            os.write(process.gate, struct.pack("=i", process.pid))
            return True
        except BrokenPipeError:
            return False

    def run_hooks(self, container, point, state):
        """Runs the hooks of a point from the shim, in the host's namespaces."""
        for hook in (container.config.get("hooks") or {}).get(point) or ():
            yield from run_hook(hook, container, state, point, self.children)

    def Start(self, request):
        container, process = self.find(request, "Start")
        if process.started and not process.started.set:         # an exec is CREATED until it is ready
            raise RpcError(FAILED_PRECONDITION, "%s: the process is being started" % container.id)
        process.started = Event()
        try:
            if process.id:
                yield from self.try_exec(container, process)
            process.state = RUNNING
            return (yield from self.release(container, process))
        finally:
            process.started.happen()

    def try_exec(self, container, process):
        """Start's first half, for an exec: what goes wrong ends it, and tells whether it was init's end."""
        if container.state(container.init) not in (CREATED, RUNNING):
            raise RpcError(FAILED_PRECONDITION, "%s: the container is not running" % container.id)
        try:
            yield from self.start_exec(container, process)
        except (ContainerError, ConfigError, OSError) as error:
            process.state = STOPPED
            process.exit_status, process.exited_at = 255, timestamp(time.time())
            process.exited.happen()
            process.io.close(self.loop)
            if not process.heard:       # nor a word of the child: does the pid namespace end? init is its last process
                yield container.init.exited, 1
            if is_dead(container.init):         # whatever that made fail
                raise RpcError(FAILED_PRECONDITION, "exec %s: the container's process has ended" % process.id) from None
            raise RpcError(UNKNOWN_ERROR, "exec %s: %s" % (process.id, reason(error))) from None

    def release(self, container, process):
        """Start's second half: the guest runs from here on."""
        if not self.answer(process):
            raise RpcError(FAILED_PRECONDITION, "%s: the process has died" % container.id)
        yield from self.await_guest(container, process)
        if process.id:
            process.announced = True
            self.publish("/tasks/exec-started", "TaskExecStarted", {
                "container_id": container.id, "exec_id": process.id, "pid": process.pid})
        else:
            self.publish("/tasks/start", "TaskStart", {"container_id": container.id, "pid": process.pid})
            try:
                yield from self.run_hooks(container, "poststart", "running")
            except ContainerError as error:
                log("poststart: %s" % error)
        return {"pid": process.pid}

    def await_guest(self, container, process):
        """execve(2), or a module's first instruction, closes the status pipe; an error comes through it."""
        while (yield from self.hear_more(process)):
            pass
        process.close(self.loop, "status", "gate")
        if process.heard:
            process.started.happen()
            yield process.exited, 3         # whoever is told of the error calls Delete at once, for an ended process
            raise RpcError(UNKNOWN_ERROR, "start %s: %s" % (container.id, process.heard[1:].decode("utf-8", "replace")))

    def on_exit(self, container, process, code):
        """A task for the end of a process: its output is read to the end, its state complete,
        before anybody hears of it; and Start's event goes out first."""
        if process.started:
            yield process.started, None
        status = 128 + (code & 0x7F) if code & 0x7F else code >> 8 & 0xFF
        if process.killed and status == 128 + SIGKILL:
            status = 128 + process.killed
        try:
            self.report_oom(container)
            if not process.id and container.cgroup:
                yield from container.cgroup.kill()
        except Exception:               # a defect must not hide the end
            log_exception()
        exited_at = timestamp(time.time())
        yield from process.io.drain(self.loop)
        process.state = STOPPED
        process.exit_status, process.exited_at = status, exited_at
        process.io.close(self.loop)
        process.close(self.loop, "pidfd")
        if self.containers.get(container.id) is container and process.announced:
            self.publish("/tasks/exit", "TaskExit", {
                "container_id": container.id, "id": process.id or container.id, "pid": process.pid,
                "exit_status": status, "exited_at": exited_at})
        process.exited.happen()

    def watch_oom(self, container):
        """A task that reports what the kernel kills in the container for want of memory, init or not."""
        if not container.cgroup:
            return
        container.oom = container.cgroup.watch_oom()
        rounds = 100 if "memory" in container.cgroup.directories else 1
        while container.oom >= 0:
            try:
                os.read(container.oom, 4096)
            except BlockingIOError:
                yield readable(container.oom)
                continue
            for _ in range(rounds):     # version 1 tells before it kills
                if self.report_oom(container) or container.oom < 0:
                    break
                yield None, 0.01

    def report_oom(self, container):
        """Publishes /tasks/oom if there were kills since the last time."""
        kills = container.cgroup.oom_kills() if container.cgroup else 0
        if kills <= container.oom_kills:
            return False
        container.oom_kills = kills
        self.publish("/tasks/oom", "TaskOOM", {"container_id": container.id})
        return True

    def abort(self, container):
        """Ends a Create whose client has lost patience."""
        if container.hook:
            os.kill(container.hook, SIGKILL)
        if container.init.pid:
            send_signal(container.init, SIGKILL)
        yield container.made, None

    def Delete(self, request):
        container = self.containers.get(request["id"])
        if container and not container.init.announced:
            yield from self.abort(container)
        container, process = self.find(request, "Delete")
        if process.id:
            yield from self.dispose(process)
            container.execs.pop(process.id, None)
            if process.io.logger:
                yield from end_logger(process.io)
            return {"pid": process.pid, "exit_status": process.exit_status, "exited_at": process.exited_at}
        while container.deleted:        # by another call, which has the answer if it succeeds
            yield container.deleted, None
            if self.containers.get(container.id) is not container:
                raise RpcError(NOT_FOUND, "container %s: not found" % container.id)
        container.deleted = deleted = Event()
        try:
            yield from self.tear_down(container)
            self.forget(container)
        finally:
            container.deleted = None
            deleted.happen()
        answer = {"pid": process.pid, "exit_status": process.exit_status, "exited_at": process.exited_at}
        self.publish("/tasks/delete", "TaskDelete", {"container_id": container.id, **answer})
        return answer

    def forget(self, container):
        """The container is no more."""
        self.containers.pop(container.id, None)
        if not self.containers:
            self.vacant.happen()

    def dispose(self, process):
        """Ends a process, if it is there, and all that belongs to it; whoever waits for it hears so."""
        if process.pid and not process.exited.set:
            send_signal(process, SIGKILL)
            yield process.exited, 10
        process.io.close(self.loop)
        process.close(self.loop)
        process.exited.happen()         # of an exec that never ran, too

    def tear_down(self, container):
        """Undoes set_up as far as it came: process, cgroup, mounts, descriptors."""
        for process in [container.init] + list(container.execs.values()):
            yield from self.dispose(process)
        if container.oom >= 0:
            self.loop.close(container.oom)
            container.oom = -1
        if container.cgroup:
            yield from container.cgroup.kill()
            for _ in range(100):        # the kernel takes a moment to forget the dead
                if container.cgroup.remove():
                    break
                yield None, 0.01
        if container.keeper:
            os.kill(container.keeper, SIGKILL)
        for process in [container.init] + list(container.execs.values()):
            if process.io.logger:
                yield from end_logger(process.io)
        if container.mounted:
            unmount_all(join_path(real_path(container.bundle), "rootfs"))
        try:
            yield from self.run_hooks(container, "poststop", "stopped")
        except ContainerError as error:
            log("poststop: %s" % error)
        if not container.cgroup or container.cgroup.remove():
            forget_init(container.bundle)

    # --- questions ---

    def State(self, request):
        container = self.container(request["id"])
        process = container.process(request["exec_id"])
        return {"id": container.id, "bundle": container.bundle, "pid": process.pid, "status": container.state(process),
                "exit_status": process.exit_status, "exited_at": process.exited_at, "exec_id": process.id,
                **process.io.names}

    def Wait(self, request):
        process = self.container(request["id"]).process(request["exec_id"])
        yield process.exited, None
        if not process.exited_at:
            raise RpcError(NOT_FOUND, "process %s: deleted before it ran" % process.id)
        return {"exit_status": process.exit_status, "exited_at": process.exited_at}

    def Connect(self, request):
        """NotFound is how a containerd that was away learns that the task went meanwhile: 1.6 asks nothing else.
        No id at all asks for the shim's pid only."""
        pid = self.container(request["id"]).init.pid if request["id"] else 0
        return {"shim_pid": os.getpid(), "task_pid": pid, "version": VERSION}

    def Pids(self, request):
        container = self.container(request["id"])
        pids = container.cgroup.pids() if container.cgroup else []
        leaders = {process.pid: process.id for process in container.execs.values()}
        answer = [{"pid": pid, "info": any_of("containerd.runc.v1.ProcessDetails", "ProcessDetails", {"exec_id": leaders[pid]})
                   if pid in leaders else None} for pid in pids]
        return {"processes": answer or [{"pid": container.init.pid}]}

    def Stats(self, request):
        container, _ = self.find(request, "Stats")
        if not container.cgroup:
            raise RpcError(NOT_FOUND, "%s: the container has no cgroup" % container.id)
        version, metrics = measure_cgroup(container.cgroup)
        return {"stats": any_of("io.containerd.cgroups.v%d.Metrics" % version, "Metrics%d" % version, metrics)}

    # --- control ---

    def Kill(self, request):
        container, process = self.find(request, "Kill")
        signal = request["signal"]
        if not 0 < signal < 65:
            raise RpcError(INVALID_ARGUMENT, "signal %d: no such signal" % signal)
        if process.id and not process.pid:
            raise RpcError(FAILED_PRECONDITION, "process %s was not started" % process.id)
        if request["all"] and container.cgroup and not process.id:
            for pid in container.cgroup.pids():
                if pid != process.pid:
                    try:
                        os.kill(pid, signal)
                    except ProcessLookupError:
                        pass
        if process.kind == b"W" or process.state == CREATED:
            # WASI has no signals: the default action, which the kernel would withhold
            # from the init process of a pid namespace.
            if signal in IGNORED_BY_DEFAULT:
                return {}
            if signal not in STOPPING:
                process.killed = process.killed or signal
                signal = SIGKILL
        if not send_signal(process, signal):
            raise RpcError(NOT_FOUND, "%s: process already finished" % container.id)
        if signal == SIGKILL and container.paused:
            self.freeze(container, False)       # version 1's freezer holds even the killed
        return {}

    def Pause(self, request):
        container, process = self.find(request, "Pause")
        self.freeze(container, True)
        for _ in range(200):
            if container.cgroup.frozen():
                break
            yield None, 0.005
        else:
            self.freeze(container, False)
            raise RpcError(UNKNOWN_ERROR, "%s: a process of the container does not stop, of a network file system perhaps" % container.id)
        self.publish("/tasks/paused", "TaskPaused", {"container_id": container.id})
        return {}

    def Resume(self, request):
        container, _ = self.find(request, "Resume")
        self.freeze(container, False)
        self.publish("/tasks/resumed", "TaskResumed", {"container_id": container.id})
        return {}

    def freeze(self, container, frozen):
        """Pause's and Resume's work."""
        if not container.cgroup:
            raise RpcError(FAILED_PRECONDITION, "%s: the container has no cgroup" % container.id)
        container.cgroup.freeze(frozen)
        container.paused = frozen

    def CloseIO(self, request):
        process = self.container(request["id"]).process(request["exec_id"])
        if request["stdin"]:
            process.io.close_stdin()
        return {}

    def ResizePty(self, request):
        self.container(request["id"]).process(request["exec_id"]).io.resize(request["width"] & 0xFFFF, request["height"] & 0xFFFF)
        return {}

    def Update(self, request):
        container, _ = self.find(request, "Update")
        try:
            resources = parse_object((request["resources"] or {}).get("value", b"").decode("utf-8", "replace"), "resources")
            check_fields({"linux": {"resources": resources}}, OCI_FIELDS, "", "Update")
            if not container.cgroup:
                raise ConfigError("%s: the container has no cgroup" % container.id)
            limit_cgroup(container.cgroup, resources)
        except (ConfigError, OSError) as error:
            raise RpcError(INVALID_ARGUMENT, reason(error)) from None
        return {}

    def Exec(self, request):
        container = self.find({"id": request["id"]}, "Exec")[0]
        id = request["exec_id"]
        if id in container.execs or id == container.id:
            raise RpcError(ALREADY_EXISTS, "exec id %s: already exists" % id)
        if not valid_id(id):
            raise RpcError(INVALID_ARGUMENT, "exec id %r: use letters, digits, and _ + - . after the first" % id[:100])
        process = Process(id, Stdio(request))
        try:
            process.spec = parse_object((request["spec"] or {}).get("value", b"").decode("utf-8", "replace"), "process")
            check_fields({"process": process.spec}, OCI_FIELDS, "", "Exec")
            if not process.spec.get("args"):
                raise ConfigError("Exec: process.args is empty: nothing to run")
        except ConfigError as error:
            raise RpcError(INVALID_ARGUMENT, str(error)) from None
        container.execs[id] = process
        self.publish("/tasks/exec-added", "TaskExecAdded", {"container_id": container.id, "exec_id": id})
        return {}

    def start_exec(self, container, process):
        """Forks a process into the container: its namespaces by way of init's."""
        last = plan_process(process.spec, container.config.get("linux") or {})
        yield from self.open_streams(container, process, process.spec)
        fds = {}
        try:
            for name in namespaces(container.config):
                fds[name] = os.open("/proc/%d/ns/%s" % (container.init.pid, NAMESPACES[name][1]), os.O_RDONLY | os.O_CLOEXEC)
            if is_dead(container.init):         # then its pid may have been another process's
                raise ContainerError("the container's process has ended")
            if container.cgroup and container.cgroup.frozen():      # by others: we would wait for whom they stop
                raise ContainerError("the container is paused")
            spaces = {name: fd_path(fd) for name, fd in fds.items()}
            joins = [("join", path, NAMESPACES[name][0]) for name, path in spaces.items() if name not in ("pid", "user", "mount")]
            if "mount" in spaces:               # the last one: /proc is needed until then
                joins.append(("join", spaces["mount"], CLONE_NEWNS))
            inside = []
            if process.io.console >= 0:
                inside.append(("terminal", (process.spec.get("user") or {}).get("uid") or 0, False))
            labels = plan_labels(process.spec)
            steps = labels[:1] + plan_affinity(process.spec, "initial") + joins + labels[1:] + inside + [("cgroup",)]
            self.fork(container, process, process.spec, steps + plan_affinity(process.spec, "final") + last, spaces, fds.values())
        finally:
            for fd in fds.values():
                os.close(fd)
        yield from self.await_ready(container, process, process.spec)

    def Checkpoint(self, request):
        raise RpcError(UNIMPLEMENTED, "checkpoint is not supported: a Wasm engine's state is not for CRIU")

    def Expect(self, request):
        """A `start` has found this shim for a container; the end of another must not end it before Create
        comes. A shim that stops does not answer: its socket has gone, or will have when the connection ends."""
        if self.stop:
            yield Event(), None
        if not valid_id(request["id"]):
            raise RpcError(INVALID_ARGUMENT, "container id %r" % request["id"][:100])
        self.expect(request["id"])
        return {}

    def expect(self, id):
        """A Create of this container is to come."""
        self.expected[id] = time.monotonic() + EXPECT_S

    def is_wanted(self):
        """Whether there is a container, or one is expected."""
        now = time.monotonic()
        self.expected = {id: until for id, until in self.expected.items() if until > now}
        return bool(self.containers or self.expected)

    def Shutdown(self, request):
        self.expected.pop(request["id"], None)          # containerd has given it up
        self.stop = not self.is_wanted()
        return {}

    def reap(self):
        """Collects every child that died, our own and those of the containers that fell to
        us, their subreaper."""
        while True:
            try:
                pid, code = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            handler = self.children.pop(pid, None)
            if handler:
                handler(code)


def fork_grandchild(setup, prepare):
    """fork(2) by way of a child that calls `prepare` and ends: it may enter namespaces from where nobody
    returns. The grandchild falls to us, its subreaper."""
    read, setup.report = os.pipe2(os.O_CLOEXEC)
    try:
        child = fork_inside(setup)
        if not child:
            be_between(setup, prepare)  # it returns in the grandchild
            return 0
    except OSError:
        os.close(read)
        raise
    finally:
        os.close(setup.report)
    return hear_of_grandchild(child, read)


def be_between(setup, prepare):
    """The life of the child in between; returns in the grandchild only."""
    grandchild = -1
    try:
        prepare()
        grandchild = os.fork()
        if grandchild:
            os.write(setup.report, b"%d" % grandchild)
    except BlockingIOError as error:    # EAGAIN of fork(2)
        send_error(setup.report, "fork: %s; linux.resources.pids.limit must leave room for two" % error.strerror)
    except (ContainerError, OSError) as error:
        send_error(setup.report, reason(error))
    finally:
        if grandchild:
            os._exit(0)


def hear_of_grandchild(child, read):
    """The grandchild's pid, once the child in between has ended."""
    try:
        if not wait_for({read: select.POLLIN}, FORK_S):
            os.kill(child, SIGKILL)     # takes effect, and reap() sees it, when what holds it lets go
            raise ContainerError("the container's process was not forked in %d s: is its cgroup frozen?" % FORK_S)
        word = os.read(read, 4096)
    finally:
        os.close(read)
    os.waitpid(child, 0)
    if not word.isdigit():
        raise ContainerError(word[1:].decode("utf-8", "replace") or "the container's process was not forked")
    return int(word)


def give_streams(fds, uid):
    """Makes a user the owner of his streams, so that he can open /dev/stdout again."""
    for fd in set(fds):
        status = os.fstat(fd)
        if uid and status.st_uid != uid and status.st_rdev != os.makedev(1, 3):
            try:
                os.fchown(fd, uid, -1)
            except OSError:
                pass                    # a read-only or foreign file system: the descriptor still works


def fork_into(setup, steps, stdio, user_namespace, pid_namespace):
    """fork(2) into namespaces that are for children only. The shim makes a pid namespace, forks, and
    returns to its own: pid_namespaces(7). Where it could not return, or somebody is inside already,
    a child in between does that."""
    setup.adopted = bool(user_namespace is not None or pid_namespace or pid_namespace == "" and in_user_namespace())
    if setup.adopted:
        return fork_grandchild(setup, lambda: prepare_child(setup, steps, stdio, user_namespace, pid_namespace))
    if pid_namespace is None:
        return fork_inside(setup)
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    pid = -1
    try:
        libc.unshare(CLONE_NEWPID)
        pid = fork_inside(setup)
        return pid
    finally:
        if pid:
            libc.setns(own, CLONE_NEWPID)
        os.close(own)


def fork_inside(setup):
    """fork(2) into the cgroup's unified hierarchy, where that can be: clone3(2) does not wait as a
    later move does. Of what the C library's own fork would do only the thread's id in musl matters
    to a process of one thread: raise(3) there would signal the shim."""
    if not setup.is_inside:
        try:
            os.confstr("CS_GNU_LIBC_VERSION")
            fd = os.open(setup.cgroup.unified, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (ValueError, OSError):
            return os.fork()
        setup.is_inside = True
        try:
            # flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup
            return libc.syscall(SYS_CLONE3, struct.pack("=11Q", CLONE_INTO_CGROUP, 0, 0, 0, SIGCHLD, 0, 0, 0, 0, 0, fd), 88)
        except OSError:                 # before Linux 5.7
            setup.is_inside = False
        finally:
            os.close(fd)
    return os.fork()


def is_dead(process):
    """Whether a process has ended, reaped or not: what was looked up by its pid before may then be another's."""
    return process.pidfd < 0 or bool(wait_for({process.pidfd: select.POLLIN}, 0))


def valid_id(id):
    """Container and exec ids become file names: the characters that runc allows; containerd allows fewer."""
    return 0 < len(id) <= 1024 and id[0].isalnum() and all(c.isalnum() and c.isascii() or c in "_+-." for c in id)


def any_of(url, name, message):
    """The Any of a message; the bare name, which old clients can read."""
    return {"type_url": url, "value": encode(name, message)}


def runtime_options(values):
    """The options of this runtime among Any values, {} if there are none. Foreign ones are no error."""
    for any in values:
        message = OPTIONS_TYPES.get(any and any["type_url"].rpartition("/")[2])
        if message:
            try:
                return decode(message, any["value"])
            except ProtobufError as error:
                raise ContainerError("options of the runtime: %s" % error) from None
    return {}


def send_signal(process, signal):
    """Through the pidfd, which can never mean another process. False if it is dead."""
    import _signal
    try:
        _signal.pidfd_send_signal(process.pidfd, signal)
        return True
    except OSError:
        return False


def read_config(bundle):
    """The parsed config.json of a bundle."""
    try:
        with open(join_path(bundle, "config.json"), "rb") as file:
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        raise ContainerError("%s/config.json: %s" % (bundle, error.strerror)) from None
    return parse_object(text, "config.json")


def mount_rootfs(mounts, rootfs):
    """The mounts of a Create request, in their order, at the bundle's rootfs."""
    for item in mounts:
        words = [word for word in item["options"] if word[:7] not in ("uidmap=", "gidmap=")]
        maps = dict(word.split("=", 1) for word in item["options"] if word not in words)
        flags, propagation, data = mount_options(words, "rootfs")
        target = path_in_root(rootfs, item["target"]) if item["target"] else rootfs
        bind = item["type"] == "bind" or flags & MS_BIND
        if maps:
            mount_mapped(item, target, flags | (MS_BIND if bind else 0), data, maps)
        elif bind:
            mount(item["source"], target, None, MS_BIND | flags & MS_REC)
        elif len(data) >= mmap.PAGESIZE - 512:
            mount_long(item, target, flags, data)
        else:
            mount(item["source"], target, item["type"], flags, data)
        if bind and flags & ~(MS_BIND | MS_REC):
            mount(None, target, None, MS_REMOUNT | MS_BIND | flags & ~MS_REC)
        for flag in propagation:
            mount(None, target, None, flag)


def path_in_root(directory, path):
    """The host's path of what a process with that root directory has at `path`: what the mounts before
    have brought there is the image's, whose links would lead to the host's files."""
    root = os.open(directory, O_PATH | os.O_CLOEXEC)
    try:
        fd = open_in_root(root, path)
    finally:
        os.close(root)
    try:
        return os.readlink(fd_path(fd))
    finally:
        os.close(fd)


def mount_mapped(item, target, flags, data, maps):
    """A mount of a Create request whose files have the owners that a snapshotter's options uidmap and
    gidmap say, each `inside:outside:size` and more of them after a comma. An overlay itself cannot
    map ids, but its lower layers can (Linux 5.19); the upper one has been given its owner."""
    if len(maps) < 2:
        raise ContainerError("rootfs: options uidmap and gidmap go together")
    try:
        rows = [[tuple(map(int, row.split(":"))) for row in maps[name].split(",")] for name in ("uidmap", "gidmap")]
        if any(len(row) != 3 for row in rows[0] + rows[1]):
            raise ValueError
    except ValueError:
        raise ContainerError("rootfs: uidmap=%(uidmap)s gidmap=%(gidmap)s: not INSIDE:OUTSIDE:SIZE,…" % maps) from None
    space = make_user_namespace(*rows)
    try:
        if flags & MS_BIND:
            tree = open_tree(item["source"], flags & MS_REC)
            map_ids(tree, item["source"], fd_path(space), MOUNT_ATTR_IDMAP, flags & MS_REC)
        elif item["type"] == "overlay":
            tree = overlay_tree(item, target, flags, data, fd_path(space))
        else:
            mount(item["source"], target, item["type"], flags, data)
            tree = open_tree(target, 0)
            map_ids(tree, item["source"], fd_path(space), MOUNT_ATTR_IDMAP, False)
            umount(target)
        attach(tree, target)
    finally:
        os.close(space)


def attach(tree, target):
    """move_mount to a path; the tree's descriptor is closed."""
    fd = os.open(target, O_PATH | os.O_CLOEXEC)
    try:
        move_mount(tree, fd, MS_REC)
    finally:
        os.close(fd)
        os.close(tree)


def overlay_tree(item, target, flags, data, user_namespace):
    """An overlay with mapped lower layers as a mount that is nowhere yet. The kernel looks layers up by
    path, so for a moment they lie in a tmpfs at the target: read-only, and where whatever is left
    after a crash will be unmounted."""
    options = [option.partition("=") for option in data.split(",")]
    layers = [path for name, _, value in options if name == "lowerdir" for path in value.split(":")]
    lower = "lowerdir=" + ":".join(map(str, range(len(layers))))
    data = ",".join([lower] + ["".join(option) for option in options if option[0] not in ("lowerdir", "")])
    mount("tmpfs", target, "tmpfs", 0, "mode=700")
    before = -1
    try:
        before = os.open(".", O_PATH | os.O_CLOEXEC)
        os.chdir(target)
        for index, layer in enumerate(layers):
            os.mkdir(str(index))
            tree = open_tree(layer, 0)
            map_ids(tree, layer, user_namespace, MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY, False)
            attach(tree, str(index))
        os.mkdir("merged")
        mount(item["source"], "merged", "overlay", flags, data)
        return open_tree("merged", 0)
    finally:
        if before >= 0:
            os.fchdir(before)
            os.close(before)
        umount(target)


def mount_long(item, target, flags, data):
    """An overlay with more layers than a page of options can name: relative to their common
    parent, from there."""
    options = [option.partition("=") for option in data.split(",")]
    layers = [path for name, _, value in options if name == "lowerdir" for path in value.split(":")]
    if item["type"] != "overlay" or not layers:
        raise ContainerError("rootfs mount options are longer than a page")
    from posixpath import commonpath, relpath
    parent = commonpath(layers)
    short = ",".join("%s=%s" % (name, ":".join(relpath(path, parent) for path in value.split(":")) if name == "lowerdir" else value)
                     if equals else name for name, equals, value in options)
    before = os.open(".", O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(parent)
        mount(item["source"], target, item["type"], flags, short)
    finally:
        os.fchdir(before)
        os.close(before)


def in_user_namespace():
    """Whether we are root in a user namespace only: user_namespaces(7)."""
    return read_text("/proc/self/uid_map", "0 0 4294967295").split() != ["0", "0", "4294967295"]


def record(bundle, lines):
    """Adds lines to init.pid, which tells `delete` what to undo if the shim dies, and so before
    there is anything to undo: "cgroup", a controller, its directory; "init", a pid, its start time."""
    fd = os.open(join_path(bundle, "init.pid"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(fd, file_bytes("\n".join(lines) + "\n"))         # in one piece: it is there, or not
    os.close(fd)


def forget_init(bundle):
    """All is undone: nothing is left for `delete`."""
    try:
        os.unlink(join_path(bundle, "init.pid"))
    except OSError:
        pass


def hook_state(container, status, pid):
    """The state of the container as hooks get it on stdin (runtime specification, State)."""
    return {"ociVersion": container.config.get("ociVersion") or "1.0.2", "id": container.id, "status": status,
            "pid": pid, "bundle": container.bundle, "annotations": container.config.get("annotations") or {}}


def to_json(value):
    """A value's JSON text. The C encoder alone: a hook may run where nothing may be imported,
    as the files there are the container's."""
    from _json import encode_basestring_ascii, make_encoder
    return "".join(make_encoder(None, None, encode_basestring_ascii, None, ": ", ", ", False, False, False)(value, 0))


def spawn_hook(hook, state):
    """Forks a hook; returns (pid, what it writes to stderr). Its stdin is the state; both are files
    without a name."""
    fds = []                            # its stdin, stdout, stderr
    try:
        fds.append(os.memfd_create("state", 0))
        os.write(fds[0], to_json(state).encode())
        os.lseek(fds[0], 0, SEEK_SET)
        fds.append(os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))
        fds.append(os.memfd_create("stderr", 0))
        pid = fork_program(hook["path"], hook.get("args") or [hook["path"]],
                           dict(pair.split("=", 1) for pair in hook.get("env") or () if "=" in pair), fds)
        return pid, fds.pop()
    except OSError as error:
        raise ContainerError("hook %s: %s" % (hook["path"], error.strerror)) from None
    finally:
        for fd in fds:
            os.close(fd)


def check_hook(hook, point, code, errors):
    """ContainerError for a hook that ended with another wait status than 0, with the end of
    what it wrote to stderr; None says that it had to be ended."""
    text = os.pread(errors, 500, max(0, os.fstat(errors).st_size - 500)).decode("utf-8", "replace").strip()
    os.close(errors)
    if code == 0:
        return
    reason = "timed out" if code is None else "signal %d" % (code & 0x7F) if code & 0x7F else "exit status %d" % (code >> 8)
    raise ContainerError("%s hook %s: %s%s" % (point, hook["path"], reason, text and ": " + text))


def run_hook(hook, container, state, point, children):
    """A task of the shim's loop that runs one hook."""
    pid, errors = spawn_hook(hook, hook_state(container, state, container.init.pid))
    container.hook = pid
    done = Event()
    result = []

    def ended(code):
        container.hook = 0
        result.append(code)
        done.happen()
    children[pid] = ended
    yield done, hook.get("timeout") or None
    if not done.set:                    # which may be so since the time was over
        os.kill(pid, SIGKILL)
        yield done, None
        result[:] = [None]
    check_hook(hook, point, result[0], errors)


def run_hooks_here(container, point, pid):
    """Runs the hooks of a point where there is no loop: in the child, and in `delete`."""
    state = hook_state(container, {"startContainer": "created", "poststop": "stopped"}.get(point, "creating"), pid)
    for hook in (container.config.get("hooks") or {}).get(point) or ():
        child, errors = spawn_hook(hook, state)
        pidfd = os.pidfd_open(child)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        in_time = poll.poll(min(hook["timeout"], MAX_WAIT_S) * 1000 if hook.get("timeout") else None)
        if not in_time:
            os.kill(child, SIGKILL)
        code = os.waitpid(child, 0)[1]
        os.close(pidfd)
        check_hook(hook, point, code if in_time else None, errors)


# === 23. Shim process =========================================================
#
# containerd runs the shim as a command: `start` makes the socket, leaves a daemon
# behind that serves it, and prints the address; `delete` cleans up after a container,
# whatever became of its daemon; `-info` tells what this is. Standard output and error
# of `start` are one pipe that containerd reads to its end: a word too much, or a copy
# left open in the daemon, and Create fails or never returns.

SOCKET_DIRECTORY = "/run/containerd/s"
MAX_SOCKET_PATH = 106
SOCKET_NAME_BYTES = 65                  # a slash and a SHA-256 in hexadecimal
GROUP_ANNOTATIONS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
TASK_SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")
EVENT_TYPES = "containerd.events."
SHIM_FLAGS = ("namespace", "id", "address", "publish-binary", "bundle", "socket", "debug-socket")
SHIM_SWITCHES = ("debug", "info", "v", "version")
FEATURES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
UNUSED_EXIT_S = 300                     # so long without a container: containerd has forgotten us
BUNDLE_CHECK_S = 2                      # between two looks at whether the first bundle is still there
ACCEPT_PAUSE_S = 0.1
PROBE_S, JOIN_S = 1, 10                 # for the answer of a shim that `delete`, or `start`, has found
FLUSH_S = 3                             # for the last events and answers, as long as containerd waits for Shutdown's
EVENT_TIMEOUT_S = 5
MAX_EVENTS = 2048
MAX_REFUSALS = 5                        # of one event, by a containerd that answers
EVENT_PAUSE_S, EVENT_PAUSE_MAX_S = 0.2, 2
MAX_UNSENT_BYTES = 16 << 20
SO_PEERCRED = 17


class UsageError(Exception):
    """The command line is wrong; the text says how to mend it."""


def check_tier(origin, mode):
    """UsageError if there is no such tier; a misspelt one must not become another."""
    if mode not in MODES:
        raise UsageError("%s %s: one of %s" % (origin, mode, ", ".join(MODES)))


def check_environment():
    """UsageError for what nobody can follow."""
    check_tier("CHIBISHIM_TIER", environment("CHIBISHIM_TIER") or "auto")
    group = environment("CHIBISHIM_GROUP")
    if group and not valid_id(group):
        raise UsageError("CHIBISHIM_GROUP %s: a name like a container's: letters and digits, and . _ + - after them" %
                         group[:100])


def parse_flags(words):
    """Go's flag syntax: one dash or two, `-f v` or `-f=v`; flags end at the first word that
    is none. Returns ({flag: value or True}, rest)."""
    flags = {}
    position = 0
    while position < len(words) and words[position].startswith("-") and words[position] not in ("-", "--"):
        name, equals, value = words[position].lstrip("-").partition("=")
        position += 1
        if name in SHIM_SWITCHES:
            flags[name] = value not in ("false", "0", "f", "F", "FALSE", "False")
        elif name not in SHIM_FLAGS:
            raise UsageError("flag provided but not defined: -%s" % name)
        else:
            if not equals:
                if position == len(words):
                    raise UsageError("flag needs an argument: -%s" % name)
                value = words[position]
                position += 1
            flags[name] = value
    return flags, words[position:]


def shim_main(words):
    """The command line of containerd's shims; returns the exit status."""
    flags, rest = parse_flags(words)
    if flags.get("v") or flags.get("version"):
        default_signals()
        check_environment()
        write_lines(["containerd-shim-chibiwasm-v1:", "  Version:  " + VERSION, "  Python:   " + sys.version.split()[0],
                     "  Native:   " + native_status()])
        return 0
    if flags.get("info"):
        info = encode("RuntimeInfo", {"name": "io.containerd.chibiwasm.v1", "version": {"version": VERSION},
                                      "features": {"type_url": FEATURES_TYPE, "value": to_json(features()).encode()}})
        os.write(1, info)
        return 0
    actions = {"start": shim_start, "delete": shim_delete}
    if rest[:1] and rest[0] in actions:
        for name in ("namespace", "id") if rest[0] == "delete" else ("namespace", "id", "address"):
            if not flags.get(name):
                raise UsageError("%s needs -%s" % (rest[0], name))
        if not valid_id(flags["id"]):
            raise UsageError("-id %r is no container id" % flags["id"][:100])
        return actions[rest[0]](flags)
    raise UsageError("%s: a shim is started by containerd; see --help for what people can do with it" % " ".join(rest[:1] or words))


def features():
    """What this runtime can do, in the words of the OCI runtime specification (features.md); CRI
    offers recursively read-only mounts where it finds "rro"."""
    linux = {"namespaces": sorted(NAMESPACES), "capabilities": ["CAP_" + name for name in CAPABILITIES],
             "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": True},
             "seccomp": {"enabled": True}, "apparmor": {"enabled": True}, "selinux": {"enabled": True},
             "intelRdt": {"enabled": False}, "mountExtensions": {"idmap": {"enabled": True}}}
    return {"ociVersionMin": "1.0.0", "ociVersionMax": "1.3.0", "hooks": HOOK_POINTS, "linux": linux,
            "mountOptions": sorted({*MOUNT_FLAGS, *PROPAGATION, *RECURSIVE_OPTIONS, *EXTENSIONS})}


def read_all(fd):
    """Everything up to the end of file."""
    pieces = []
    while True:
        piece = os.read(fd, COPY_BYTES)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def bootstrap(flags, data):
    """start's stdin as (BootstrapParams, [Any of options]): nothing, an Any (up to containerd 2.2),
    or BootstrapParams with any number of them, which also parses as an Any and is known by its
    first two fields."""
    try:
        params = decode("BootstrapParams", data)
        if params["instance_id"] == flags["id"] and params["namespace"] == flags["namespace"]:
            return params, [extension["value"] for extension in params["extensions"]]
    except ProtobufError:
        pass
    try:
        return {}, [decode("Any", data)]
    except ProtobufError:
        return {}, []


def enter_cgroup(path):
    """Moves this process to a cgroup in every hierarchy that has it."""
    named = cgroup_of(path, "", cgroup_mounts(mount_table())).directories
    found = Cgroup({name: directory for name, directory in named.items() if is_directory(directory)})
    if not found.directories:
        raise ContainerError("shim_cgroup %s: no such cgroup; make it first" % path)
    found.enter()


def group_of(id, bundle="."):
    """What containers share a shim by: an annotation in the bundle, or CHIBISHIM_GROUP in containerd's
    environment, or else the container's own id."""
    try:
        annotations = read_config(bundle).get("annotations")
    except (ContainerError, ConfigError):
        return id                       # Create will say what is wrong with it
    found = [annotations.get(name) for name in GROUP_ANNOTATIONS] if annotations.__class__ is dict else []
    return next((name for name in found if name and name.__class__ is str), environment("CHIBISHIM_GROUP") or id)


def socket_path(directory, address, namespace, group):
    """As containerd's own shims name it, so that one group finds one socket."""
    try:
        from _sha2 import sha256        # CPython 3.12 and later
    except ImportError:
        from _sha256 import sha256
    digest = sha256(normal_path("/".join((address, namespace, group))).encode("utf-8", "surrogatepass")).hexdigest()
    path = join_path(directory, digest)
    if len(path) > MAX_SOCKET_PATH:
        raise ContainerError("socket path %s is longer than %d bytes" % (path, MAX_SOCKET_PATH))
    return path


class Lock:
    """A `with` statement's lock on a directory: flock(2). A socket that is bound and does not listen yet
    looks like a dead shim's, and it takes two steps to see and to remove one."""

    def __init__(self, directory):
        self.fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self):
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def __exit__(self, *exception):
        os.close(self.fd)


def listen(path, id):
    """A listening socket at the path; None if a live shim has it, which then waits for the container."""
    make_directories(directory_of(path), 0o700)
    for _ in range(3):
        try:
            with Lock(directory_of(path)):
                peer = connect_alive(path)
                if not peer:
                    return bind_and_listen(path)
            if answers(peer, JOIN_S, "Expect", encode("StateRequest", {"id": id})):
                return None
        except (BlockingIOError, TimeoutError):
            raise ContainerError("socket %s: the shim that has it does not answer" % path) from None
    raise ContainerError("socket %s: somebody else keeps taking it" % path)


def unlink_if_there(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def bind_and_listen(path):
    listener = local_socket()
    before = os.umask(0o177)
    try:
        listener.bind(path)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    listener.listen(128)
    return listener


def connect_alive(path):
    """A connection to the shim that has a socket; None if it is dead, whose socket is removed, or there is none.
    BlockingIOError if as many as its backlog holds wait for it: who waited for a shim that hangs would
    keep the lock from the starts of all others."""
    peer = local_socket()
    peer.setblocking(False)
    try:
        peer.connect(path)
        return peer
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        unlink_if_there(path)
    peer.close()
    return None


def answers(peer, seconds, method, payload):
    """Whether a shim takes a call, whatever it says (an older one knows not every method); False if it has
    just ended, TimeoutError if it does nothing."""
    try:
        peer.settimeout(seconds)
        peer.sendall(request_frame(1, TASK_SERVICES[0], method, payload))
        return bool(peer.recv(1))
    except (ConnectionResetError, BrokenPipeError):
        return False
    finally:
        peer.close()


def shim_start(flags):
    """start: the address on stdout, a daemon behind it."""
    check_environment()
    params, options = bootstrap(flags, read_all(0))
    path = socket_path(params.get("socket_dir") or SOCKET_DIRECTORY, flags["address"], flags["namespace"], group_of(flags["id"]))
    listener = listen(path, flags["id"])
    if listener:
        try:
            cgroup = runtime_options(options).get("shim_cgroup")
            if cgroup:
                enter_cgroup(cgroup)    # before the daemon is there, which inherits it
            bundle = os.getcwd()        # containerd may remove it at any time
        except BaseException:
            os.unlink(path)
            raise
        detach(flags, listener, path, bundle)
    write_text("address", "unix://" + path)
    os.write(1, b"unix://" + path.encode())
    return 0


def detach(flags, listener, path, bundle):
    """Forks the daemon; in the daemon it never returns."""
    pid = os.fork()
    if pid:
        try:
            parent = int(read_text("/proc/%d/oom_score_adj" % os.getppid(), "0"))
            write_text("/proc/%d/oom_score_adj" % pid, str(min(parent + 1, 1000)))
        except OSError:
            pass                        # a word here would be taken for the address
        return
    code = 1
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        try:
            stderr = os.open("log", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            stderr = null
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(stderr, 2)
        close_all_but(0, 1, 2, listener.fileno())
        os.chdir("/")
        serve(flags, listener, path, bundle)
        code = 0
    except Exception:
        log_exception()
    finally:
        os._exit(code)


def serve(flags, listener, path, bundle):
    """The daemon's life."""
    Shim(flags, listener, path, bundle).serve()


class Shim:
    """The daemon: sockets on one side, the task service on the other."""

    def __init__(self, flags, listener, path, bundle):
        self.flags = flags
        self.listener = listener
        self.path = path
        self.bundle = bundle            # of the first container
        self.loop = Loop(forgiving=True)
        self.events_path = environment("TTRPC_ADDRESS") or flags["address"] + ".ttrpc"
        self.events = []                # encoded ForwardRequests, the oldest first
        self.news = Event()
        self.tasks = TaskService(self.loop, self.publish, flags["namespace"], flags["address"])
        self.tasks.expect(flags["id"])

    def serve(self):
        """Runs until containerd shuts us down or nobody wants us any more."""
        import _signal
        import _socket
        import gc
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(PR_SET_NAME, b"chibishim", 0, 0, 0)
        for number in (SIGHUP, SIGINT, SIGTERM, SIGPIPE):
            _signal.signal(number, _signal.SIG_IGN)
        # no pipe: containerd's tests look for forgotten ones
        wake, poke = (end.detach() for end in _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC))
        _signal.signal(SIGCHLD, lambda number, frame: None)
        _signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
        self.listener.setblocking(False)
        self.loop.spawn(self.reap(wake))
        self.loop.spawn(self.accept())
        self.loop.spawn(self.send_events())
        self.loop.spawn(self.give_up())
        gc.collect()
        gc.freeze()                     # children share these pages for good
        self.loop.run(lambda: self.tasks.stop)
        unlink_if_there(self.path)
        self.listener.close()
        deadline = time.monotonic() + FLUSH_S
        self.loop.spawn(pause_until(deadline))
        self.loop.run(lambda: not (self.events and self.is_heard()) and not self.unsent() or time.monotonic() > deadline)

    def is_heard(self):
        """Whether somebody may yet take our events: a socket of containerd's is there."""
        return exists(self.events_path) or exists(self.flags["address"])

    def unsent(self):
        """Whether an answer waits to be written."""
        return any(connection.out for connection in Connection.open)

    def give_up(self):
        """Ends a daemon that containerd will not end: it gave up during `start`, and removed the bundle,
        or died between Delete and Shutdown."""
        seconds = 0
        while not self.tasks.stop:
            if self.tasks.containers:
                self.tasks.vacant = Event()
                yield self.tasks.vacant, None
                seconds = 0
            yield None, BUNDLE_CHECK_S
            seconds += BUNDLE_CHECK_S
            is_gone = not exists(self.bundle)
            if is_gone:
                self.tasks.expected.pop(self.flags["id"], None)
            if (is_gone or seconds >= UNUSED_EXIT_S) and not self.tasks.is_wanted():
                self.tasks.stop = True

    def reap(self, wake):
        """SIGCHLD arrives as a byte in a socket."""
        while True:
            yield readable(wake)
            try:
                os.read(wake, 4096)
            except BlockingIOError:
                pass
            self.tasks.reap()

    def accept(self):
        """Takes connections; only processes of our own user may talk to us."""
        import _socket
        while True:
            yield readable(self.listener.fileno())
            try:
                fd, _ = self.listener._accept()
            except OSError:             # the caller has gone; or no descriptor is left, and he stays in the backlog
                yield None, ACCEPT_PAUSE_S
                continue
            peer = _socket.socket(fileno=fd)
            _, uid, _ = struct.unpack("3i", peer.getsockopt(_socket.SOL_SOCKET, SO_PEERCRED, 12))
            peer.detach()
            if uid != os.geteuid():
                os.close(fd)
                continue
            os.set_blocking(fd, False)
            self.loop.spawn(self.converse(Connection(fd, self.loop)))

    def converse(self, connection):
        """One connection, to its end. Calls run side by side; a slow one stalls no other."""
        protocol = ServerProtocol()
        while True:
            if len(connection.out) > MAX_UNSENT_BYTES:
                yield connection.drained, None
            yield readable(connection.fd)       # even if more is there: what it asked for goes first
            try:
                data = os.read(connection.fd, COPY_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                break
            calls, refusals = protocol.receive(data)
            if refusals:
                connection.send(refusals)
            for stream, service, method, payload in calls:
                self.loop.spawn(self.call(connection, stream, service, method, payload))
        connection.close()

    def call(self, connection, stream, service, method, payload):
        """One call: decode, handle, answer."""
        try:
            if service not in TASK_SERVICES:
                raise RpcError(UNIMPLEMENTED, "service %s" % service)
            if method not in TASK_METHODS:
                raise RpcError(UNIMPLEMENTED, "method %s" % method)
            request, response = TASK_METHODS[method]
            answer = getattr(self.tasks, method)(decode(request, payload))
            if answer.__class__ is not dict:
                answer = yield from answer
            body = response_frame(stream, encode(response, answer))
        except RpcError as error:
            body = error_frame(stream, *error.args)
        except ProtobufError as error:
            body = error_frame(stream, INVALID_ARGUMENT, str(error))
        except Exception as error:      # a defect here must not leave the client waiting
            log_exception()
            body = error_frame(stream, INTERNAL, "%s: %s: %s" % (method, error.__class__.__name__, error))
        connection.send(body)

    def publish(self, topic, name, message):
        """Queues an event. If the queue is full the oldest one goes that is no exit, which somebody waits for."""
        event = any_of(EVENT_TYPES + name, name, message)
        self.events.append((topic, event, encode("ForwardRequest", {"envelope": {
            "timestamp": timestamp(time.time()), "namespace": self.flags["namespace"], "topic": topic, "event": event}})))
        if len(self.events) > MAX_EVENTS:
            lost = next((i for i, e in enumerate(self.events) if e[0] != "/tasks/exit"), 0)
            log("event %s is lost: containerd has taken none of the last %d" % (self.events[lost][0], MAX_EVENTS))
            del self.events[lost]
        self.news.happen()

    def send_events(self):
        """Delivers events one after the other, each until containerd has it: it may be away for
        long. What it refuses again and again must not hold up the others."""
        client = Client(self.events_path)
        failures = refusals = 0
        while True:
            if not self.events:
                self.news = Event()
                yield self.news, None
                continue
            topic, event, request = entry = self.events[0]
            delivered = True
            try:
                delivered = yield from self.deliver(client, topic, event, request, failures)
            except RpcError as error:
                refusals += 1
                delivered = error.args[0] == INVALID_ARGUMENT or refusals == MAX_REFUSALS
                if delivered:
                    log("event %s is lost: containerd refuses it: %s" % (topic, error.args[1]))
            if delivered:
                failures = refusals = 0
                if self.events and self.events[0] is entry:
                    del self.events[0]
            else:
                failures += 1
                yield None, min(failures * EVENT_PAUSE_S, EVENT_PAUSE_MAX_S)

    def deliver(self, client, topic, event, request, failures):
        """One attempt: over ttrpc, once more where the connection had been closed, by containerd's
        publish command. False if nobody has it; RpcError if containerd refuses it."""
        for _ in range(2):
            try:
                yield from client.call("containerd.services.events.ttrpc.v1.Events", "Forward", request, EVENT_TIMEOUT_S)
                return True
            except RpcError as error:
                if error.args[0] not in (UNAVAILABLE, DEADLINE_EXCEEDED):
                    raise
                client.close()
                if error.args[0] == DEADLINE_EXCEEDED:
                    return False
            except OSError:
                client.close()
        if failures and self.flags.get("publish-binary") and is_listened_to(self.flags["address"]):
            return (yield from self.publish_by_command(topic, event))
        return False

    def publish_by_command(self, topic, event):
        """containerd publish: a process for each event, the last resort."""
        fd = os.memfd_create("event", 0)
        os.write(fd, encode("Any", event))
        os.lseek(fd, 0, SEEK_SET)
        words = [self.flags["publish-binary"], "--address", self.flags["address"], "publish", "--topic", topic,
                 "--namespace", self.flags["namespace"]]
        pid = fork_program(words[0], words, os.environ, [fd, 1, 2])
        os.close(fd)
        done = Event()
        codes = []
        self.tasks.children[pid] = lambda code: (codes.append(code), done.happen())
        yield done, EVENT_TIMEOUT_S
        if not done.set:                # which may be so since the time was over
            os.kill(pid, SIGKILL)
            yield done, None
        return codes == [0]


def is_listened_to(path):
    """Whether somebody accepts connections at a socket's path."""
    try:
        os.close(connect_to(path))
        return True
    except OSError:
        return False


def pause_until(deadline):
    """A task that makes the loop turn at the deadline, and in between."""
    while time.monotonic() < deadline:
        yield None, 0.01


class Connection:
    """The sending half of a connection: bytes leave when the peer takes them."""

    open = set()

    def __init__(self, fd, loop):
        self.fd = fd
        self.loop = loop
        self.out = bytearray()
        self.drained = Event()
        Connection.open.add(self)

    def send(self, data):
        """Writes what goes now and leaves the rest to a task."""
        if self.fd < 0:
            return                      # the caller has gone: nobody waits for this
        idle = not self.out
        self.out += data
        if idle:
            self.flush()
            if self.out:
                self.loop.spawn(self.flush_later())

    def flush(self):
        """Writes until the socket is full."""
        try:
            while self.out:
                del self.out[:os.write(self.fd, self.out)]
        except BlockingIOError:
            return
        except OSError:
            self.out.clear()            # the reader's side will see the end
        self.drained.happen()
        self.drained = Event()

    def flush_later(self):
        """Goes on when the peer has read."""
        while self.out and self.fd >= 0:
            yield writable(self.fd)
            if self.fd >= 0:
                self.flush()

    def close(self):
        """Ends the connection; answers that still come are dropped."""
        self.loop.close(self.fd)
        self.fd = -1
        self.out.clear()
        self.drained.happen()
        Connection.open.discard(self)


class Client:
    """A ttrpc client with one call at a time, for tasks of a loop."""

    def __init__(self, path):
        self.path = path
        self.fd = -1
        self.stream = 1
        self.reader = FrameReader()

    def connect(self):
        """Opens the connection if there is none."""
        if self.fd < 0:
            self.fd = connect_to(self.path)
            self.stream, self.reader = 1, FrameReader()

    def call(self, service, method, payload, seconds=None):
        """A task: the response's bytes; RpcError or OSError if there is none."""
        self.connect()
        stream, self.stream = self.stream, self.stream + 2
        deadline = time.monotonic() + seconds if seconds else None
        in_time = yield from write_all(self.fd, request_frame(stream, service, method, payload, seconds or 0), deadline)
        while in_time and (yield readable(self.fd, seconds_until(deadline))):
            data = os.read(self.fd, COPY_BYTES)
            if not data:
                raise RpcError(UNAVAILABLE, "%s: the peer closed the connection" % method)
            for answered, type, size, body in self.reader.feed(data):
                if answered == stream and type == RESPONSE:
                    if body is None:
                        raise RpcError(RESOURCE_EXHAUSTED, "%s: an answer of %d bytes" % (method, size))
                    return response_payload(body)
        raise RpcError(DEADLINE_EXCEEDED, "%s: no answer within %g s" % (method, seconds))

    def close(self):
        """The next call connects anew."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def shim_delete(flags):
    """delete: whatever a container left. Runs after every removal and after crashes, any
    number of times, and concerns this one container only: its pod's daemon may be alive."""
    bundle = flags.get("bundle") or join_path(directory_of(os.getcwd()), flags["id"])
    records = [line.split(" ", 2) for line in read_text(join_path(bundle, "init.pid"), "").splitlines()]
    pid, started = next(((int(words[1]), words[2]) for words in records if words[0] == "init"), (0, ""))
    if records:
        cgroup = Cgroup({words[1]: words[2] for words in records if words[0] == "cgroup"})
        for _ in cgroup.kill():         # first, as it thaws a paused container
            time.sleep(0.005)
        if pid:
            kill_process(pid, started)
        for _ in range(100):
            if cgroup.remove():
                break
            time.sleep(0.01)
        run_poststop(flags["id"], bundle, pid)
    unmount_all(join_path(real_path(bundle), "rootfs"))
    remove_dead_socket(bundle, flags)
    os.write(1, encode("DeleteResponse", {"pid": pid, "exit_status": 128 + SIGKILL, "exited_at": timestamp(time.time())}))
    return 0


def run_poststop(id, bundle, pid):
    """The hooks that the dead shim owes; once, however often `delete` is called."""
    forget_init(bundle)
    container = Container(id, bundle)
    try:
        container.config = read_config(bundle)
        run_hooks_here(container, "poststop", pid)
    except (ContainerError, ConfigError, OSError) as error:
        report("poststop: %s" % error)


def kill_process(pid, started):
    """SIGKILL for the process that started then, and until it is gone or a second is over. Another one
    may have its pid now, but not any more when there is a descriptor of it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import _signal
    try:
        if str(process_start_time(pid)) == started:
            _signal.pidfd_send_signal(pidfd, SIGKILL)
            wait_for({pidfd: select.POLLIN}, 1)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def remove_dead_socket(bundle, flags):
    """The daemon's socket, if the daemon is dead. Its address may not have been written yet, and a
    child that it had just forked may hold the socket for a moment, but will not answer."""
    path = read_text(join_path(bundle, "address"), "")[len("unix://"):]
    if not path and flags.get("address"):
        path = socket_path(SOCKET_DIRECTORY, flags["address"], flags["namespace"], group_of(flags["id"], bundle))
    try:
        for _ in range(2):
            with Lock(directory_of(path)):
                peer = connect_alive(path)
            if not peer or answers(peer, PROBE_S, "Connect", b""):
                return                  # it lives, for other containers
    except OSError:
        pass                            # it does not answer in time


# === 24. Without containerd ===================================================
#
# What a person with a terminal and no containerd needs: to run a module in a real
# container by driving the shim as containerd would, to make an image of it, to look
# inside it. Imports here may be heavy: nobody waits for a daemon.

DEFAULT_MOUNTS = (
    ("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
)
DEFAULT_MASKED = ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                  "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi"]
DEFAULT_READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
FORWARDED_SIGNALS = (SIGHUP, SIGINT, 3, 10, 12, 14, SIGTERM)    # and SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM


def parse_options(words, known, flags=()):
    """Splits a command line into ({option: [values]}, rest); options end at the first
    word that is none. `flags` take no value."""
    options = {name: [] for name in (*known, *flags)}
    position = 0
    while position < len(words) and words[position].startswith("-") and words[position] != "-":
        name, equals, value = words[position].lstrip("-").partition("=")
        position += 1
        if not name:
            break
        if name not in options:
            raise UsageError("unknown option --%s; see --help" % name)
        if name in flags:
            if equals:
                raise UsageError("--%s takes no value" % name)
            value = True
        elif not equals:
            if position == len(words):
                raise UsageError("--%s takes a value" % name)
            value = words[position]
            position += 1
        options[name].append(value)
    return options, words[position:]


def split_pair(option, text, form):
    """'a=b' as ('a', 'b'); `form` says how it is written."""
    left, found, right = text.partition("=")
    if not found or not left:
        raise UsageError("--%s %s: write it as %s" % (option, text, form))
    return left, right


def split_directory(text):
    """--dir's value as (host path, guest path, whether read-only)."""
    host, _, rest = text.partition("::")
    guest, colons, mode = rest.partition("::")
    if not host or colons and mode != "ro":
        raise UsageError("--dir %s: write it as HOST, HOST::GUEST or HOST::GUEST::ro" % text)
    return host, guest or host, bool(mode)


def plug_closed_streams():
    """Takes the numbers of standard streams that are closed: the next file opened would be one."""
    for fd in 0, 1, 2:
        try:
            os.fstat(fd)
        except OSError:
            plug(fd)


def map_file(path):
    """A file's bytes, mapped: pages that nobody reads cost nothing, debug sections above all."""
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        except (ValueError, OSError):
            return file.read(MAX_MODULE_BYTES + 1)  # empty, or not mappable


# What people have in place of a module, by its first bytes, and what helps.
NO_MODULES = (
    (b"", "is empty; build it again"),
    (WASM_COMPONENT, "is a component, and only core modules run here; build it for wasm32-wasip1"),
    (b"\x7fELF", "is a native program (ELF), no WebAssembly; build it for wasm32-wasip1"),
    (b"#!", "is a script, no WebAssembly; run its interpreter's module with it as an argument"),
    (b"!<arch>", "is a static library; link it to a module first"),
    (b"BC\xC0\xDE", "is LLVM bitcode; link it to a module first"),
    (b"\x1f\x8b", "is compressed; gunzip it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed; unzstd it first"),
    (b"PK\3\4", "is a zip archive; unpack it first"),
    (b"(", "is WebAssembly text; assemble it first: wat2wasm FILE.wat -o FILE.wasm"),
    (b";;", "is WebAssembly text; assemble it first: wat2wasm FILE.wat -o FILE.wasm"),
)
NO_FILES = {0o040000: "is a directory; name the module in it", 0o020000: "is a device, no module", 0o060000: "is a device, no module"}


def read_module(path):
    """The bytes of a module's file; an OSError says what it is instead."""
    kind = os.stat(path).st_mode & 0o170000
    if kind in NO_FILES:
        raise OSError(errno.EINVAL, NO_FILES[kind], path)
    data = map_file(path)
    if data[:4] == WASM_MAGIC and data[:8] != WASM_COMPONENT:
        return data
    start = data[:4096].lstrip()
    text = next((text for magic, text in NO_MODULES if start.startswith(magic) and (magic or not data[:1])),
                "is no WebAssembly module: it does not start with \\0asm")
    raise OSError(errno.ENOEXEC, text, path)


def enter_user_namespace():
    """Makes an ordinary user root in a user namespace of his own, where mounts and further
    namespaces are his to make: user_namespaces(7)."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNS)
        write_text("/proc/self/setgroups", "deny")
        write_text("/proc/self/uid_map", "0 %d 1" % uid)
        write_text("/proc/self/gid_map", "0 %d 1" % gid)
        mount(None, "/", None, MS_SLAVE | MS_REC)
    except OSError as error:            # with AppArmor there is one, in which nothing is allowed
        raise ContainerError("no user namespace for an ordinary user (%s); run as root, or see sysctl kernel.unprivileged_userns_clone, "
                             "user.max_user_namespaces and kernel.apparmor_restrict_unprivileged_userns" % os.strerror(error.errno)) from None


def default_config(module, arguments, environment, directories, rootless):
    """config.json of a container with nothing but a module in it: no capability, no network, and no cgroup if
    they are somebody else's."""
    mounts = [{"destination": d, "type": t, "source": s, "options": list(o)} for d, t, s, o in DEFAULT_MOUNTS]
    mounts += [{"destination": guest, "type": "bind", "source": absolute_path(host),
                "options": ["rbind", "nosuid", "nodev"] + ["rro"] * readonly} for host, guest, readonly in directories]
    config = {
        "ociVersion": "1.0.2", "hostname": "chibishim", "root": {"path": "rootfs"}, "mounts": mounts,
        "process": {"args": ["/" + module] + arguments, "env": environment, "cwd": "/", "user": {"uid": 0, "gid": 0},
                    "noNewPrivileges": True, "capabilities": {}},
        "linux": {"namespaces": [{"type": name} for name in ("pid", "network", "mount", "ipc", "uts")],
                  "maskedPaths": DEFAULT_MASKED, "readonlyPaths": DEFAULT_READONLY},
    }
    if not rootless and cgroup_mounts(mount_table()):
        config["linux"]["cgroupsPath"] = "/chibishim-%d" % os.getpid()
    return config


def command_container(words):
    """chibishim container: a module in a container of its own, without containerd."""
    import json
    import shutil
    import tempfile
    plug_closed_streams()
    options, rest = parse_options(words, ("dir", "env"))
    if not rest:
        raise UsageError("container needs a MODULE; see --help")
    name, arguments = name_of(rest[0]), rest[1:]
    directories = [split_directory(text) for text in options["dir"]]
    for host, guest, _ in directories:
        os.stat(host)
        if not guest.startswith("/"):
            raise UsageError("--dir %s: a mount's place is an absolute path; write it as HOST::/GUEST" % host)
    for pair in options["env"]:
        split_pair("env", pair, "NAME=VALUE")
    require_utf8(name, *arguments, *options["env"], *options["dir"])
    module = read_module(rest[0])
    rootless = os.geteuid() != 0
    signals = catch_signals()
    scratch = absolute_path(tempfile.mkdtemp(prefix="chibishim-"))     # TMPDIR may be relative
    try:
        if len(scratch) + SOCKET_NAME_BYTES > MAX_SOCKET_PATH:
            raise ContainerError("%s: too long a name for a socket's; set TMPDIR to a shorter one" % directory_of(scratch))
        rootfs = join_path(scratch, "bundle", "rootfs")
        make_directories(rootfs, 0o755)
        write_file(join_path(rootfs, name), module)
        os.chmod(join_path(rootfs, name), 0o755)
        config = default_config(name, arguments, options["env"], directories, rootless or in_user_namespace())
        write_file(join_path(scratch, "bundle", "config.json"), json.dumps(config).encode())
        if rootless:
            enter_user_namespace()
        return Driver(scratch, signals).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_utf8(*words):
    """What goes into JSON has to be Unicode; UsageError names the word."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError("%s: not in UTF-8, as a container's configuration has to be" % word) from None


def write_file(path, data):
    """A file of any size; the OSError names it, also where the disk is full. Half of it is not left."""
    try:
        with open(path, "wb", buffering=0) as file:
            try:
                while data:
                    data = data[file.write(data):]
            except OSError:
                if is_file(path):
                    os.unlink(path)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def catch_signals():
    """Has the signals that end a process noted in a pipe, and returns its read end: they are meant for
    the guest, and what we made has to be removed. What was ignored stays so, as under nohup(1)."""
    import _signal
    wake, poke = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
    for number in FORWARDED_SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, lambda number, frame: None)
    _signal.signal(SIGPIPE, _signal.SIG_IGN)
    return wake


class Driver:
    """Stands in for containerd for the length of one container."""

    def __init__(self, scratch, signals):
        self.scratch = scratch
        self.signals = signals          # see catch_signals
        self.bundle = join_path(scratch, "bundle")
        self.id = "c%d" % os.getpid()
        self.loop = Loop()
        self.socket = None              # the shim's
        self.result = None              # exit status, or the error
        self.broken = None              # the OSError of an output stream of ours
        self.done = False

    def shim(self, action, data=b""):
        """Runs the shim's command as containerd does; returns what it printed. A terminal's Ctrl-C is for us
        alone, hence the session; what is hit before it has that is run again."""
        import subprocess
        words = [sys.executable, "-IS", absolute_path(sys.argv[0]), "-namespace", "local", "-address",
                 join_path(self.scratch, "none.sock"), "-publish-binary", "", "-id", self.id]
        words += (["-bundle", self.bundle] if action == "delete" else []) + [action]
        while True:
            done = subprocess.run(words, input=data, cwd=self.bundle, stdout=subprocess.PIPE, start_new_session=True)
            if not done.returncode:
                return done.stdout
            if -done.returncode not in FORWARDED_SIGNALS:
                raise ContainerError("the shim's %s failed with status %d" % (action, done.returncode))

    def run(self):
        """start → Create → Start → Wait → Delete → Shutdown → delete; the exit status."""
        fifos = {name: join_path(self.scratch, name) for name in ("stdin", "stdout", "stderr")}
        for path in fifos.values():
            os.mkfifo(path, 0o600)
        params = encode("BootstrapParams", {"instance_id": self.id, "namespace": "local", "socket_dir": self.scratch})
        self.socket = self.shim("start", params).decode()[len("unix://"):]
        try:
            self.loop.spawn(self.converse(Client(self.socket), fifos))
            self.loop.run(lambda: self.done)
        finally:
            self.shim("delete")
        if isinstance(self.result, OSError):
            raise ContainerError("the shim at %s: %s" % (self.socket, reason(self.result)))
        if isinstance(self.result, RpcError):
            raise ContainerError(self.result.args[1])
        if self.broken and self.broken.errno != errno.EPIPE:
            raise self.broken
        return 128 + SIGPIPE if self.broken else self.result

    def call(self, client, method, message):
        """A task: one call of the task service, dicts in and out."""
        request, response = TASK_METHODS[method]
        answer = yield from client.call(TASK_SERVICES[0], method, encode(request, message))
        return decode(response, answer)

    def converse(self, client, fifos):
        """The container's life, and its end however far it came."""
        copies = []
        try:
            yield from self.live(client, fifos, copies)
        except (RpcError, OSError) as error:
            self.result = error
            yield from self.attempt("Kill", signal=SIGKILL)
            yield from self.attempt("Wait")
        yield from self.attempt("Delete")
        yield from self.attempt("Shutdown")
        for copied in copies:           # the shim has closed them, unless it could not
            yield copied, 1 if isinstance(self.result, Exception) else None
        self.done = True

    def live(self, client, fifos, copies):
        """The calls in containerd's order; an Event is added to `copies` for each stream, for when it is copied."""
        for name, fd in (("stdout", 1), ("stderr", 2)):
            source = os.open(fifos[name], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            copies.append(Event())
            self.loop.spawn(self.copy_out(source, fd, copies[-1]))
        yield from self.call(client, "Create", {"id": self.id, "bundle": self.bundle, **fifos})
        sink = os.open(fifos["stdin"], os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it loses its reader with the guest
        self.loop.spawn(self.copy_in(sink))
        yield from self.call(client, "Start", {"id": self.id})
        self.loop.spawn(self.forward_signals())
        answer = yield from self.call(client, "Wait", {"id": self.id})
        self.result = answer["exit_status"]

    def copy_out(self, source, target, copied):
        """The guest's output to ours, until the shim has closed the fifo. If ours cannot be written to, the
        guest is ended, and what it has written is dropped: it would wait for ever."""
        started = broken = False
        while True:
            try:
                data = os.read(source, COPY_BYTES)
            except BlockingIOError:
                started = True
                yield readable(source)
                continue
            if not data and (started or self.result is not None):
                break
            if not data:
                yield None, 0.005       # nobody has opened the other end yet
                continue
            started = True
            try:
                if not broken:
                    yield from write_all(target, data)
            except OSError as error:
                broken = True
                self.broken = OSError(error.errno, error.strerror, STREAMS[target])
                yield from self.attempt("Kill", signal=SIGPIPE)
        copied.happen()

    def copy_in(self, sink):
        """Our input to the guest, then CloseIO."""
        try:
            while True:
                yield readable(0)
                data = os.read(0, COPY_BYTES)
                if not data:
                    break
                yield from write_all(sink, data)
        except OSError:
            pass
        os.close(sink)
        yield from self.attempt("CloseIO", stdin=True)

    def forward_signals(self):
        """What somebody sends us is meant for the guest."""
        while True:
            yield readable(self.signals)
            for number in os.read(self.signals, 64):
                yield from self.attempt("Kill", signal=number)

    def attempt(self, method, **message):
        """A task: a call by a connection of its own, for the other may be waiting. There may be no container,
        or no longer, and the shim may be faster than its answer."""
        client = Client(self.socket)
        try:
            yield from self.call(client, method, {"id": self.id, **message})
        except (RpcError, OSError):
            pass
        client.close()


def command_image(words):
    """chibishim image: an OCI image archive with the module as its only file."""
    known = ("o", "t", "platform")
    options, rest = parse_options(words, known)
    more, after = parse_options(rest[1:], known)        # nothing here is the guest's: options may follow the module
    options = {name: options[name] + more[name] for name in known}
    if not rest or after or not options["o"]:
        raise UsageError("write it as: image MODULE -o FILE [-t REF] [--platform OS/ARCH]")
    path = rest[0]
    name = name_of(path)
    os_name, slash, architecture = (options["platform"] or ["linux/" + go_architecture()])[-1].partition("/")
    if not os_name or not architecture:
        raise UsageError("--platform %s: write it as OS/ARCH, wasi/wasm for example" % (os_name + slash + architecture))
    require_utf8(name, os_name, architecture)
    data = read_module(path)
    try:
        Module(data)
    except WasmError as error:
        raise UsageError("%s: %s: %s" % (path, error.__class__.__name__.lower(), error)) from None
    write_image(options["o"][-1], name, data, image_reference(options["t"], name), os_name, architecture)
    return 0


def image_reference(given, name):
    """The last of -t's values, or else a name like the module's; UsageError if registries' clients refuse it (the
    grammar of the distribution project's package `reference`)."""
    import re
    stem, dot, _ = name.rpartition(".")
    reference = given[-1] if given else "docker.io/library/%s:latest" % (stem if dot else name).lower()
    part = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
    if not re.fullmatch(r"(?:(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::\d+)?/)?%s(?:/%s)*(?::\w[\w.-]*)?(?:@\w+:[0-9a-f]+)?" % (part, part),
                        reference, re.ASCII):
        raise UsageError("%s is no name for an image; write -t NAME:TAG, in small letters" % (reference or "nothing"))
    return reference


def go_architecture():
    """This machine in the names of OCI image indexes."""
    names = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
    return names.get(machine_here(), machine_here())


def write_image(output, name, module, reference, os_name, architecture):
    """An image layout in a tar archive (OCI image specification, image-layout), the same
    bytes for the same input."""
    import hashlib
    import io
    import json
    import tarfile

    def archive(members):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path, data in members:
                info = tarfile.TarInfo(path)
                info.size, info.mode = len(data), 0o755
                tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()
    blobs = []

    def blob(type, data):
        digest = hashlib.sha256(data).hexdigest()
        blobs.append(("blobs/sha256/" + digest, data))
        return {"mediaType": "application/vnd.oci.image." + type, "digest": "sha256:" + digest, "size": len(data)}
    layer = blob("layer.v1.tar", archive([(name, module)]))
    config = blob("config.v1+json", json.dumps({
        "architecture": architecture, "os": os_name, "config": {"Entrypoint": ["/" + name], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}).encode())
    manifest = blob("manifest.v1+json", json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": [layer]}).encode())
    manifest["platform"] = {"os": os_name, "architecture": architecture}
    manifest["annotations"] = {"io.containerd.image.name": reference}
    tag = reference.rpartition("/")[2].partition("@")[0].partition(":")[2]
    if tag:                             # for those who take the name from elsewhere
        manifest["annotations"]["org.opencontainers.image.ref.name"] = tag
    index = json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()
    write_file(output, archive([("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", index)] + blobs))


def command_inspect(words):
    """chibishim inspect: what a module needs and offers, or its functions' text."""
    at = next((at for at, word in enumerate(words) if word.partition("=")[0] == "--disassemble"), None)
    function, rest = None, words
    if at is not None:
        function, rest = words[at].partition("=")[2] or None, words[at + 1:] + words[:at]
        if function is None and len(rest) == 2:
            function, *rest = rest
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UsageError("write it as: inspect [--disassemble [FUNC]] MODULE")
    path = rest[0]
    try:
        module = Module(read_module(path))
        write_lines(describe(module, path) if at is None else disassemble(module, function))
    except WasmError as error:
        raise UsageError("%s: %s: %s" % (path, error.__class__.__name__.lower(), error)) from None
    except KeyError:
        raise UsageError("%s: no function %s of its own; name one by index, name or export" % (path, function)) from None
    except MemoryError:
        raise UsageError("%s: not enough memory for the module" % path) from None
    return 0


def describe(module, path):
    """Yields lines on imports, exports and custom sections."""
    yield "%s: %d bytes, %d functions, %d imported" % (path, len(module.data), len(module.functions), module.imported_functions)
    yield "native   %s" % native_status()
    for item in module.imports:
        yield "import  %-8s %s.%s" % (item.kind, item.module, item.name)
    for name, (kind, index) in module.exports.items():
        yield "export  %-8s %s%s" % (kind, name, " " + str(module.types[module.functions[index]]) if kind == "func" else "")
    for name, start, end in module.customs:
        yield "custom  %-8d %s" % (end - start, name)


# === 25. Command line =========================================================
#
# For people without containerd and for readers. Options end at the module, what
# follows is the guest's, as with `wasmtime run`.

USAGE = """usage: %s COMMAND …

Runs WebAssembly modules, plainly or in containers. The exit status is the guest's,
134 for a trap, 128+n for signal n.

run [OPTION…] MODULE [ARGUMENT…]         run a module as an ordinary process
  --dir HOST[::GUEST[::ro]]  let the guest see a directory (as GUEST, read-only)
  --env NAME=VALUE           set an environment variable of the guest
  --argv0 NAME               the guest's argument 0 (default: the module's file name)
  --tcplisten ADDRESS:PORT   give the guest a listening socket, after the directories
  --preload NAME=FILE        satisfy imports from NAME by the module in FILE
  --invoke NAME              call this export with the arguments, and print its results
  --trace                    write each instruction and its operands to stderr, as it is executed
  --fuel N                   trap after N instructions (of a basic block, all at its start)
  --timeout SECONDS          trap after this time
  --tier auto|native|portable|interpreter   compile what is hot, all, all to Python, or
                             nothing (default: the environment's CHIBISHIM_TIER, or auto)

container [OPTION…] MODULE [ARGUMENT…]   run it in a container, as root or without
  --dir HOST[::GUEST[::ro]]  mount a directory (at GUEST, an absolute path; read-only)
  --env NAME=VALUE           set an environment variable of the guest

image MODULE -o FILE [-t REF] [--platform OS/ARCH]
                             write an OCI image archive for ctr image import

inspect [--disassemble [FUNC]] MODULE
                             print imports, exports and custom sections, or the text of
                             all functions or of one, by its index, name or export

containerd calls it with -namespace … -id … start, or delete; -info and -v tell what it is.
"""


def tcp_listener(text):
    """The descriptor of a socket that listens at 'address:port'."""
    address, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        raise UsageError("--tcplisten %s: write it as ADDRESS:PORT" % text)
    import _socket
    address = address.strip("[]")
    listener = _socket.socket(_socket.AF_INET6 if ":" in address else _socket.AF_INET, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        listener.bind((address, int(port)))
        listener.listen(128)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "--tcplisten " + text) from None
    except (OverflowError, TypeError, ValueError) as error:     # no such port; no name of a host; too many digits
        raise UsageError("--tcplisten %s: %s" % (text[:100], error)) from None
    return listener.detach()


def command_run(words):
    """chibishim run: a module without a container."""
    plug_closed_streams()
    options, rest = parse_options(words, ("dir", "env", "argv0", "tcplisten", "preload", "invoke", "fuel", "timeout", "tier"),
                                  ("trace",))
    if not rest:
        raise UsageError("run needs a MODULE; see --help")
    path = rest[0]
    argv0 = options["argv0"][-1] if options["argv0"] else name_of(path)
    preopens = [split_directory(text) for text in options["dir"]]
    for pair in options["env"]:
        split_pair("env", pair, "NAME=VALUE")
    preloads = [(name, read_module(file)) for name, file in (split_pair("preload", p, "NAME=FILE") for p in options["preload"])]
    function = options["invoke"][-1] if options["invoke"] else "_start"
    listeners = [tcp_listener(text) for text in options["tcplisten"]]
    bounds = [parse_bound(options, *bound) for bound in (("fuel", int, 1e18), ("timeout", float, 1e9))]
    tier = options["tier"][-1] if options["tier"] else None
    if tier is not None:
        check_tier("--tier", tier)
    return run_command(read_module(path), [argv0] + rest[1:], options["env"], preopens, function, preloads, listeners,
                       bool(options["trace"]), *bounds, tier)


def parse_bound(options, name, number, limit):
    """The value of --fuel or --timeout, positive and below the limit; None without."""
    try:
        bound = number(options[name][-1]) if options[name] else None
    except ValueError:
        bound = 0
    if bound is not None and not 0 < bound < limit:
        raise UsageError("--%s %s: write a number above 0 and below %g" % (name, options[name][-1], limit))
    return bound


HELP = ("--help", "-h")
COMMANDS = {"run": command_run, "container": command_container, "image": command_image, "inspect": command_inspect}


def main(argv):
    """The entry point: argv as sys.argv; returns the exit status."""
    program = name_of(argv[0])
    words = argv[1:]
    try:
        if sys.version_info < (3, 10):
            raise UsageError("this takes CPython 3.10 or later, and is run by %s" % sys.version.split()[0])
        if words and words[0].startswith("-") and words[0] not in HELP:
            return shim_main(words)
        default_signals()
        if not words or words[0] in ("help", *HELP) or words[1:2] and words[1] in HELP:
            write_lines((USAGE % program).splitlines())
            return 0 if words else 2
        if words[0] not in COMMANDS:
            raise UsageError("unknown command %s; see --help" % words[0])
        check_environment()
        return COMMANDS[words[0]](words[1:])
    except UsageError as error:
        report("%s: %s" % (program, error))
        return 2
    except (ContainerError, ConfigError, OSError) as error:
        report("%s: %s" % (program, reason(error)))
    except MemoryError:
        report("%s: not enough memory" % program)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
