"""Chapters 3 and 4: protobuf against protoc, ttrpc frames."""

import os
import shutil
import subprocess

import pytest

import chibishim
from chibishim import MESSAGES, ProtobufError, RpcError, ServerProtocol, FrameReader, decode, encode, message_fields

SAMPLE = {"id": "c1", "bundle": "/run/b", "terminal": True, "stdin": "/in", "stdout": "/out", "stderr": "",
          "rootfs": [{"type": "bind", "source": "/s", "target": "", "options": ["rbind", "ro"]}, {"type": "overlay"}],
          "options": {"type_url": "x", "value": b"\0\xff"}}


def test_what_is_encoded_is_decoded():
    message = decode("CreateTaskRequest", encode("CreateTaskRequest", SAMPLE))
    assert message["rootfs"][0]["options"] == ["rbind", "ro"] and message["rootfs"][1]["type"] == "overlay"
    assert message["options"] == {"type_url": "x", "value": b"\0\xff"} and message["terminal"] is True
    assert message["checkpoint"] == ""


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**63 - 1, -1, -2**63])
def test_signed_integers(value):
    assert decode("Timestamp", encode("Timestamp", {"seconds": value}))["seconds"] == value


def test_defaults_are_absent_on_the_wire():
    assert encode("StateResponse", {"id": "", "pid": 0, "terminal": False}) == b""


def test_unknown_fields_are_skipped():
    "T5"
    data = b"\xa0\x06\x01" + b"\xa9\x06" + bytes(8) + b"\xb2\x06\x02xx" + b"\xbd\x06" + bytes(4) + encode("StateRequest", {"id": "c"})
    assert decode("StateRequest", data)["id"] == "c"


def test_the_last_one_of_a_field_wins():
    assert decode("StateRequest", encode("StateRequest", {"id": "a"}) + encode("StateRequest", {"id": "b"}))["id"] == "b"


@pytest.mark.parametrize("data", [b"\x22\x03\x07\xac\x02", b"\x20\x07\x20\xac\x02", b"\x20\x07\x22\x02\xac\x02"],
                         ids=["packed", "one by one", "both"])
def test_repeated_numbers_may_be_packed(data):
    assert decode("CPUUsage", data)["per_cpu"] == [7, 300]


@pytest.mark.parametrize("data, what", [(b"\x22\x02\x07\xac", "varint"), (b"\x21" + bytes(8), "wire type")])
def test_malformed_repeated_numbers_are_refused(data, what):
    with pytest.raises(ProtobufError, match=what):
        decode("CPUUsage", data)


@pytest.mark.parametrize("data, what", [
    (b"\x0a", "truncated|varint"), (b"\x0a\x05ab", "truncated"), (b"\x08\x01", "wire type"), (b"\x0b", "wire type"),
    (b"\x00\x00", "field number 0"), (b"\x0a\x01\xff", "UTF-8"), (b"\xff" * 11, "varint"), (b"\x0a" + b"\xff" * 9 + b"\x01", "truncated")])
def test_malformed_input_is_refused(data, what):
    "T5"
    with pytest.raises(ProtobufError, match=what):
        decode("StateRequest", data)


@pytest.mark.parametrize("text, expected", [("a\udcff", "a\\udcff"), ("\ud800b", "\\ud800b"), ("ü", "ü")])
def test_a_string_is_utf_8_on_the_wire_whatever_it_held(text, expected):
    "T5: a name of a file that is no UTF-8, in the message of an error"
    (_, _, _, body), = FrameReader().feed(chibishim.error_frame(1, chibishim.INTERNAL, text))
    with pytest.raises(RpcError) as caught:
        chibishim.response_payload(body)
    assert caught.value.args == (chibishim.INTERNAL, expected)


def test_a_field_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match="StateRequest has no field name"):
        encode("StateRequest", {"name": "x"})


PROTO_TYPES = {"string": "string", "bytes": "bytes", "bool": "bool", "int": "int64", "uint": "uint64", "double": "double"}


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    """All of MESSAGES as a .proto file; the compiler checks names and numbers."""
    if not shutil.which("protoc"):
        pytest.skip("protoc (Debian package protobuf-compiler) is not installed")
    lines = ['syntax = "proto3";']
    for name in MESSAGES:
        lines.append("message %s {" % name)
        for number, field, type in message_fields(name):
            repeated = type.__class__ is list
            type = type[0] if repeated else type
            lines.append("  %s%s %s = %d;" % ("repeated " if repeated else "", PROTO_TYPES.get(type, type), field, number))
        lines.append("}")
    path = tmp_path_factory.mktemp("proto") / "all.proto"
    path.write_text("\n".join(lines))
    return path


def protoc(schema, option, data):
    return subprocess.run(["protoc", "-I", str(schema.parent), option, str(schema)], input=data, capture_output=True, check=True).stdout


def sample(name, depth=0):
    """A message with every field set."""
    values = {"string": "Grüße", "bytes": b"\0\1\xff", "bool": True, "int": -5, "uint": 2**40 + 7, "double": -0.5}
    message = {}
    for number, field, type in message_fields(name):
        repeated = type.__class__ is list
        type = type[0] if repeated else type
        value = values[type] if type in values else sample(type, depth + 1)
        message[field] = [value, value] if repeated else value
    return message


@pytest.mark.parametrize("name", MESSAGES)
def test_protoc_reads_what_we_write_and_we_what_it_writes(schema, name):
    data = encode(name, sample(name))
    text = protoc(schema, "--decode=" + name, data)
    again = protoc(schema, "--encode=" + name, text)
    assert decode(name, again) == decode(name, data) == sample(name)


# -- ttrpc --

def request(stream, method="State", payload=b""):
    return chibishim.request_frame(stream, "containerd.task.v2.Task", method, payload)


def test_a_request_in_pieces_of_one_byte():
    server, calls = ServerProtocol(), []
    for byte in request(1, payload=b"abc") + request(3, "Wait"):
        more, refusals = server.receive(bytes([byte]))
        calls += more
        assert refusals == b""
    assert calls == [(1, "containerd.task.v2.Task", "State", b"abc"), (3, "containerd.task.v2.Task", "Wait", b"")]


def refusal(data):
    """The only refusal of the bytes: (stream, RpcError)."""
    calls, out = ServerProtocol().receive(data)
    assert calls == []
    (stream, type, _, body), = FrameReader().feed(out)
    with pytest.raises(RpcError) as caught:
        chibishim.response_payload(body)
    return stream, caught.value.args[0]


def test_even_stream_ids_are_refused():
    "T3"
    assert refusal(request(2)) == (2, chibishim.INVALID_ARGUMENT)


def test_a_request_that_does_not_decode_is_refused():
    "T2"
    assert refusal(chibishim.frame(1, chibishim.REQUEST, b"\xff")) == (1, chibishim.INVALID_ARGUMENT)


def test_stream_ids_must_increase():
    "T3"
    server = ServerProtocol()
    assert len(server.receive(request(3))[0]) == 1
    calls, refusals = server.receive(request(3) + request(1))
    assert calls == [] and len(FrameReader().feed(refusals)) == 2


def test_an_oversized_message_is_refused_and_the_connection_goes_on():
    "T1"
    server = ServerProtocol()
    size = chibishim.MAX_FRAME_BYTES + 1
    calls, refusals = server.receive(chibishim.FRAME_HEADER.pack(size, 1, chibishim.REQUEST, 0))
    assert calls == []
    with pytest.raises(RpcError) as caught:
        chibishim.response_payload(FrameReader().feed(refusals)[0][3])
    assert caught.value.args[0] == chibishim.RESOURCE_EXHAUSTED
    for start in range(0, size, 1 << 20):
        assert server.receive(bytes(min(1 << 20, size - start))) == ([], b"")
    assert len(server.reader.buffer) == 0
    assert server.receive(request(3))[0][0][0] == 3


@pytest.mark.parametrize("type", [chibishim.RESPONSE, chibishim.DATA, 0, 9])
def test_other_frames_are_passed_over(type):
    "T3"
    assert ServerProtocol().receive(chibishim.frame(1, type, b"x")) == ([], b"")


def test_an_answer_over_the_limit_becomes_an_error():
    "T1: containerd 1.6 dies of it"
    (_, _, _, body), = FrameReader().feed(chibishim.response_frame(1, bytes(chibishim.MAX_FRAME_BYTES)))
    with pytest.raises(RpcError) as caught:
        chibishim.response_payload(body)
    assert caught.value.args[0] == chibishim.RESOURCE_EXHAUSTED


def test_random_bytes_raise_nothing():
    "T2: a server survives its peer"
    import random
    source = random.Random(1)
    for _ in range(300):
        server = ServerProtocol()
        server.receive(os.urandom(3) + bytes([0, 0, 0, 1, 1, 0]) + source.randbytes(source.randrange(400)))
        server.receive(chibishim.frame(1, chibishim.REQUEST, source.randbytes(source.randrange(60))))


def test_frames_without_a_payload_and_broken_off_ones_keep_nothing():
    "T2: what is held is at most one frame"
    server = ServerProtocol()
    calls, refusals = server.receive(chibishim.frame(1, chibishim.REQUEST, b"") + chibishim.frame(3, chibishim.DATA, b"") * 1000)
    assert (calls, refusals) == ([(1, "", "", b"")], b"")
    assert server.receive(chibishim.FRAME_HEADER.pack(chibishim.MAX_FRAME_BYTES, 5, chibishim.REQUEST, 0)) == ([], b"")
    assert server.receive(bytes(1000)) == ([], b"") and len(server.reader.buffer) == 1000 + chibishim.FRAME_HEADER.size


@pytest.mark.parametrize("flags", range(256))
def test_flags_make_no_difference_to_a_call(flags):
    "T3"
    data = bytearray(request(1))
    data[9] = flags
    calls, refusals = ServerProtocol().receive(bytes(data))
    assert len(calls) == 1 and refusals == b""


@pytest.mark.parametrize("depth", [1, 100, 100000])
def test_deep_nesting_is_no_deep_recursion(depth):
    "T5: the messages are no deeper than their table, groups are refused"
    data = b""
    for _ in range(min(depth, 1000)):
        data = chibishim.varint(1 << 3 | 2) + chibishim.varint(len(data)) + data
    assert decode("Empty", data) == {}
    with pytest.raises(ProtobufError, match="wire type 3"):
        decode("Any", b"\x0b" * depth)
