"""Chapter 21: images whose layers are modules, which containerd is asked for by gRPC."""

import hashlib
import json
import os
import random
import socket
import struct
import tempfile
import threading
import time

import pytest

import chibishim
import containerd as peers
from archives import artifact_of
from bundles import process_of
from chibishim import HeaderReader, decode, encode, http2_frame, unhuffman
from containerd import MODULES, PREFIX, RUNTIME
from soak import descriptors

HELLO = open(os.path.join(MODULES, "hello.wasm"), "rb").read()
COMPONENT = b"\0asm\x0d\0\1\0" + bytes(100)
OK_TRAILERS = chibishim.header_block([("grpc-status", "0"), ("grpc-message", "")])


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Containerd:
    """Its gRPC socket, with one container "c" of one image. It minds its peer's window, and sends
    `bad` instead of the n-th answer (from 0) if that is set."""

    def __init__(self, path, layers=(HELLO,), index=False, image="local.test/a:1", **config):
        self.blobs, self.image, self.bad, self.closing = {}, image, {}, False
        self.connections = self.answered = 0
        manifest = {"config": self.add(json.dumps({"architecture": "wasm", **config}).encode()),
                    "layers": [self.add(layer, "application/wasm") for layer in layers]}
        self.target = self.add_document(manifest)
        if index:
            other = self.add_document({"config": {}, "layers": []})
            self.target = self.add_document({"manifests": [dict(other, platform={"architecture": "amd64"}),
                                                           dict(self.target, platform={"architecture": "wasm"})]})
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def add(self, data, type="x"):
        self.blobs[digest_of(data)] = data
        return {"mediaType": type, "digest": digest_of(data), "size": len(data)}

    def add_document(self, document):
        return self.add(document if document.__class__ is bytes else json.dumps(document).encode())

    def serve(self):
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                self.converse(peer)
            except (EOFError, OSError):
                pass                    # the client has gone
            if self.closing:
                peer.close()

    def read(self, peer, size):
        data = b""
        while len(data) < size:
            piece = peer.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def frame(self, peer):
        """The next frame (type, flags, stream, payload); windows and settings are taken note of."""
        head = self.read(peer, 9)
        type, flags, stream = struct.unpack(">BBI", head[3:])
        payload = self.read(peer, int.from_bytes(head[:3], "big"))
        if type == chibishim.SETTINGS and not flags:
            values = {payload[at + 1]: int.from_bytes(payload[at + 2:at + 6], "big") for at in range(0, len(payload), 6)}
            assert values == {1: 0, 2: 0, 4: chibishim.HTTP2_WINDOW}
            self.first = values[4]
        elif type == chibishim.WINDOW_UPDATE:
            self.windows[stream] = self.windows.get(stream, self.first) + int.from_bytes(payload, "big")
        return type, flags, stream, payload

    def converse(self, peer):
        assert self.read(peer, 24) == b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        self.windows = {0: 65535}
        peer.sendall(http2_frame(chibishim.SETTINGS, 0, 0, b""))
        while True:
            type, flags, stream, payload = self.frame(peer)
            if type == chibishim.HEADERS_FRAME:
                fields = HeaderReader(payload).fields()
                assert (fields["containerd-namespace"], fields["te"], fields[":method"]) == ("test", "trailers", "POST")
            elif type == chibishim.DATA_FRAME and stream:
                number, self.answered = self.answered, self.answered + 1
                if number in self.bad:
                    peer.sendall(self.bad[number](stream) if callable(self.bad[number]) else self.bad[number])
                    if self.closing:
                        return
                else:
                    self.answer(peer, stream, fields[":path"].rpartition("/")[2], payload[5:], fields[":path"])

    def answer(self, peer, stream, method, body, path):
        if path.endswith("Containers/Get"):
            known = decode("GetContainerRequest", body)["id"] == "c"
            messages = [encode("GetContainerResponse", {"container": {"id": "c", "image": self.image}})] if known else None
        elif path.endswith("Images/Get"):
            messages = [encode("GetImageResponse", {"image": {"name": self.image, "target": {"digest": self.target["digest"]}}})]
        else:
            data = self.blobs.get(decode("ReadContentRequest", body)["digest"])
            messages = None if data is None else [encode("ReadContentResponse", {"offset": at, "data": data[at:at + (1 << 20)]})
                                                  for at in range(0, len(data), 1 << 20)]
        if messages is None:
            fields = chibishim.header_block([("grpc-status", "5"), ("grpc-message", "it is 100%25 away: not found")])
            peer.sendall(http2_frame(1, 5, stream, b"\x88" + fields))
            return
        peer.sendall(http2_frame(1, 4, stream, b"\x88"))
        for message in messages:
            data = struct.pack(">BI", 0, len(message)) + message
            while data:
                room = min(self.windows[0], self.windows.setdefault(stream, self.first), 16384)
                if room <= 0:
                    self.frame(peer)
                    continue
                peer.sendall(http2_frame(0, 0, stream, data[:room]))
                self.windows[0] -= len(data[:room])
                self.windows[stream] -= len(data[:room])
                data = data[room:]
        peer.sendall(http2_frame(1, 5, stream, OK_TRAILERS))


def finish(task, loop):
    """A task's result, or what it raised."""
    results = []

    def run():
        try:
            results.append((yield from task))
        except Exception as error:
            results.append(error)
    loop.spawn(run())
    loop.run(lambda: results)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def fetch(path, id="c"):
    """What a child that asks for its module is sent: the size, and what follows."""
    loop, pieces = chibishim.Loop(), []
    read, write = os.pipe()
    os.set_blocking(write, False)

    def drain():
        while piece := os.read(read, 1 << 20):
            pieces.append(piece)
    reader = threading.Thread(target=drain)
    reader.start()
    try:
        finish(chibishim.send_module(loop, path, "test", id, write), loop)
    finally:
        os.close(write)
        reader.join()
        os.close(read)
        assert loop.waiting == {} and loop.timers == []
    data = b"".join(pieces)
    return struct.unpack("=q", data[:8])[0], data[8:]


@pytest.fixture
def store(tmp_path):
    """store(layers, …) -> a Containerd at store.path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        made = []

        def make(*words, **options):
            made.append(Containerd(make.path, *words, **options))
            return made[-1]
        make.path = directory + "/grpc"
        yield make
        for server in made:
            server.listener.close()


# -- headers --

@pytest.mark.parametrize("coded, text", [
    ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"), ("a8eb10649cbf", "no-cache"), ("25a849e95bb8e8b4bf", "custom-value"),
    ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
    ("94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
     "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1")])
def test_huffmans_code(coded, text):
    """RFC 7541, appendix C"""
    assert unhuffman(bytes.fromhex(coded)) == text


@pytest.mark.parametrize("block, fields", [
    (b"\x88", {":status": "200"}), (b"\x20\x8d", {":status": "404"}), (b"\x00\x01a\x01b\x10\x01c\x00", {"a": "b", "c": ""}),
    (b"\x40\x01a\x01b", {"a": "b"}), (b"\x08\x03418", {":status": "418"}), (b"\x0f\x10\x01x", {"": "x"}), (b"", {}),
    (b"\x00\x88" + bytes.fromhex("25a849e95ba97d7f") + b"\x89" + bytes.fromhex("25a849e95bb8e8b4bf"), {"custom-key": "custom-value"})])
def test_a_header_block(block, fields):
    assert HeaderReader(block).fields() == fields


@pytest.mark.parametrize("block", [b"\xbe", b"\x7e\x01x", b"\x00\x05ab", b"\x00", b"\x00\x01a", b"\xff\xff\xff\xff\xff\xff", b"\x00\x81\x00\x00",
                                   b"\x00\x84\xff\xff\xff\xff\x00", b"\x00\x82\xff\xf8"])
def test_a_header_block_that_is_none(block):
    """T2: with a dynamic table, cut off, an endless integer, padding that is none"""
    with pytest.raises(IndexError):
        HeaderReader(block).fields()


def test_random_header_blocks_raise_nothing_else():
    "T2"
    source = random.Random(1)
    for _ in range(3000):
        try:
            HeaderReader(source.randbytes(source.randrange(60))).fields()
        except IndexError:
            pass


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 300, 5000])
def test_a_header_of_any_length_is_read_as_it_was_written(size):
    assert HeaderReader(chibishim.header_block([("name", "x" * size)])).fields() == {"name": "x" * size}


# -- what a child is sent --

@pytest.mark.parametrize("index", [False, True], ids=["manifest", "index"])
@pytest.mark.parametrize("size", [len(HELLO), 1 << 20, 5_000_000], ids=str)
def test_the_module_arrives(store, index, size):
    """A layer of more than a window needs several WINDOW_UPDATEs."""
    layer = HELLO + random.Random(1).randbytes(size - len(HELLO))
    store([layer], index)
    assert fetch(store.path) == (size, layer)


@pytest.mark.parametrize("options", [{"architecture": "amd64"}, {"layers": ()}, {"image": ""}])
def test_another_image_has_none(store, options):
    store(**options)
    assert fetch(store.path) == (0, b"")


def test_an_unknown_container_has_none_and_the_log_tells_why(store, capfd):
    store()
    assert fetch(store.path, "other") == (0, b"")
    assert "it is 100% away: not found" in capfd.readouterr().err


def test_where_nobody_listens_there_is_none(store):
    assert fetch(store.path) == (0, b"")


def test_two_modules_are_refused(store):
    store([HELLO, HELLO + b"\0\1\0"])
    with pytest.raises(chibishim.ContainerError, match="2 layers are modules"):
        fetch(store.path)


DIGEST = digest_of(HELLO)
LAYER = {"mediaType": "application/wasm", "digest": DIGEST, "size": len(HELLO)}
CONFIG = {"digest": digest_of(b'{"architecture": "wasm"}')}


@pytest.mark.parametrize("manifest", [
    b"", b"{", b"[]", b"null", b"\xff", b"[" * 10000, {}, {"config": [], "layers": []}, {"config": {"digest": 5}, "layers": []},
    {"config": CONFIG}, {"config": CONFIG, "layers": {}}, {"config": CONFIG, "layers": [dict(LAYER, digest=None)]},
    {"config": CONFIG, "layers": [dict(LAYER, size="5")]}, {"config": CONFIG, "layers": [dict(LAYER, size=0)]},
    {"config": CONFIG, "layers": [dict(LAYER, size=-1)]}, {"config": CONFIG, "layers": [dict(LAYER, size=1 << 62)]},
    {"config": CONFIG, "layers": [dict(LAYER, size=len(HELLO) + 1)]}, {"config": CONFIG, "layers": [dict(LAYER, size=len(HELLO) - 1)]},
    {"manifests": {}}, {"manifests": []}, {"manifests": [5]}, {"manifests": [{"digest": 7}]}, {"manifests": [{}, {}]},
    {"config": {"digest": DIGEST}, "layers": []}], ids=lambda manifest: str(manifest)[:60])
def test_an_images_documents_can_be_anything(store, manifest):
    "T2: the image is untrusted"
    server = store()
    server.target = server.add_document(manifest)
    with pytest.raises((chibishim.ContainerError, chibishim.ConfigError), match="image local.test/a:1|layer sha256"):
        fetch(store.path)


def test_a_layer_that_is_not_there_is_named(store):
    server = store()
    del server.blobs[DIGEST]
    with pytest.raises(chibishim.ContainerError, match="layer sha256:.*not found"):
        fetch(store.path)


def test_a_document_has_a_size_that_is_bounded(store):
    "T2"
    server = store()
    server.target = server.add_document(b" " * (chibishim.MAX_DOCUMENT_BYTES + 1))
    with pytest.raises(chibishim.ContainerError, match="more than"):
        fetch(store.path)


MISBEHAVIOUR = {
    "a frame that is too large": b"\xff\xff\xff\0\0\0\0\0\1", "the older protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a reset": lambda stream: http2_frame(3, 0, stream, b"\0\0\0\7"), "a farewell": http2_frame(7, 0, 0, bytes(8)),
    "a compressed message": lambda stream: http2_frame(0, 0, stream, b"\1\0\0\0\0"),
    "a huge message": lambda stream: http2_frame(0, 0, stream, b"\0\x40\0\0\0"),
    "half a message": lambda stream: http2_frame(0, 1, stream, b"\0\0\0\0\5ab"),
    "a message that is none": lambda stream: http2_frame(0, 0, stream, b"\0\0\0\0\1\xff"),
    "no message": lambda stream: http2_frame(1, 5, stream, OK_TRAILERS), "no status": lambda stream: http2_frame(1, 5, stream, b"\x8e"),
    "all padding": lambda stream: http2_frame(0, 8, stream, b"\5abcd"), "no padding length": lambda stream: http2_frame(0, 8, stream, b""),
    "a message with a bare percent": lambda stream: http2_frame(1, 5, stream, chibishim.header_block([("grpc-status", "5"), ("grpc-message", "100%!")])),
    "a dynamic table": lambda stream: http2_frame(1, 5, stream, b"\xbe"),
    "endless headers": lambda stream: http2_frame(1, 0, stream, bytes(16000)) + http2_frame(9, 0, stream, bytes(16000)) * 5,
    "nothing": b"", "frames of no type": http2_frame(99, 255, 3, b"x") * 100,
}


@pytest.mark.parametrize("answer", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_whatever_is_answered_it_ends(store, monkeypatch, capfd, name, answer):
    "T2, T5: whether containerd is none is no reason to hang, nor to run something else"
    monkeypatch.setattr(chibishim, "GRPC_STALL_S", 0.3)
    store().bad[answer] = MISBEHAVIOUR[name]
    began = time.monotonic()
    if name == "no message" and answer > 1:
        with pytest.raises(chibishim.ConfigError, match="image local.test/a:1"):        # an empty document
            fetch(store.path)
    else:
        assert fetch(store.path) == (0, b"") and "containerd's" in capfd.readouterr().err
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["a reset", "a farewell", "nothing", "half a message"])
def test_a_layer_that_breaks_off_is_an_error(store, monkeypatch, name):
    monkeypatch.setattr(chibishim, "GRPC_STALL_S", 0.3)
    store().bad[4] = MISBEHAVIOUR[name]
    with pytest.raises(chibishim.ContainerError, match="layer sha256"):
        fetch(store.path)


@pytest.mark.parametrize("how", ["SHUT_WR", "SHUT_RD"], ids=["when it is asked for", "when it is waited for"])
def test_a_layer_whose_connection_is_closed_is_an_error(store, monkeypatch, how):
    "the broken pipe is not the child's, which waits"
    find_layer = chibishim.find_layer

    def find_and_close(client, id):
        layer = yield from find_layer(client, id)
        with socket.socket(fileno=os.dup(client.fd)) as ours:
            ours.shutdown(getattr(socket, how))
        return layer
    monkeypatch.setattr(chibishim, "find_layer", find_and_close)
    store()
    with pytest.raises(chibishim.ContainerError, match="layer sha256"):
        fetch(store.path)


def test_a_connection_that_is_closed_is_told(store, capfd):
    server = store()
    server.bad[1], server.closing = b"", True
    assert fetch(store.path) == (0, b"") and "closed" in capfd.readouterr().err


def test_what_a_server_may_do_is_understood(store):
    """Padding, priorities, headers in pieces, pings, settings, unknown frames in between (RFC 9113)."""
    message = encode("GetContainerResponse", {"container": {"id": "c", "image": "local.test/a:1"}})

    def answer(stream):
        body = struct.pack(">BI", 0, len(message)) + message
        return b"".join([
            http2_frame(4, 0, 0, b"\0\3\0\0\0\x64"), http2_frame(1, 0x28, stream, b"\2" + bytes(5) + b"\x88\0\0"), http2_frame(9, 4, stream, b"\0\1a\1b"),
            http2_frame(6, 0, 0, b"12345678"), http2_frame(8, 0, 0, b"\0\0\1\0"), http2_frame(77, 0, 0, b"?"), http2_frame(0, 0, stream, b""),
            *[http2_frame(0, 8, stream, b"\3" + body[at:at + 1] + bytes(3)) for at in range(len(body))],
            http2_frame(7, 0, 0, b"\x7f\xff\xff\xff\0\0\0\0"), http2_frame(1, 1, stream, OK_TRAILERS[:7]), http2_frame(9, 4, stream, OK_TRAILERS[7:])])
    store().bad[0] = answer
    assert fetch(store.path) == (len(HELLO), HELLO)


# -- through the shim --

def artifact(bundle, *words, **options):
    """The bundle's container is made of this image, and its root is empty."""
    server = Containerd(bundle.directory + "/none", *words, **options)
    os.unlink(os.path.join(bundle.path, "rootfs", "guest.wasm"))
    bundle.config["process"]["args"] = ["/hello.wasm"]
    bundle.config["linux"]["cgroupsPath"] = bundle.config["linux"]["cgroupsPath"].replace(bundle.id, "c")
    bundle.id = "c"
    return server


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="*** not root: artifacts are NOT run")


@needs_root
def test_a_layer_runs(bundle):
    server = artifact(bundle)
    bundle.start().fails(chibishim.NOT_FOUND, "State")          # it has accepted the connection
    shim, = bundle.processes()
    before = descriptors(shim)
    bundle.create()
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == 0
    bundle.call("Delete")
    with open(bundle.output) as file:
        assert file.read() == "Hello, World!\n"
    assert server.connections == 1 and descriptors(shim) == before


@needs_root
@pytest.mark.parametrize("layer, text", [(COMPONENT, "a WebAssembly component"), (b"no module at all", "no WebAssembly module")])
def test_a_layer_that_cannot_run_is_said(bundle, layer, text):
    artifact(bundle, [layer])
    bundle.start()
    assert text in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)


@needs_root
def test_an_artifact_that_is_broken_makes_create_fail(bundle):
    "L5: and leaves nothing"
    artifact(bundle, [HELLO, HELLO + b"\0\1\0"])
    bundle.start().fails(chibishim.NOT_FOUND, "State")          # it has accepted the connection
    shim, = bundle.processes()
    before = descriptors(shim)
    assert "2 layers are modules" in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    bundle.fails(chibishim.NOT_FOUND, "State")
    assert descriptors(shim) == before and bundle.processes() == [shim]


@needs_root
def test_a_function_of_a_layer_is_named_after_the_path(bundle, wat):
    artifact(bundle, [wat('(module (func (export "other") (result i32) i32.const 5))')])
    bundle.config["process"]["args"] = ["/hello.wasm#other"]
    bundle.start().create()
    bundle.call("Start")
    bundle.call("Wait")
    with open(bundle.output) as file:
        assert file.read() == "5\n"


@needs_root
def test_a_module_is_the_containers_memory_not_the_shims(bundle):
    """It goes through the shim in pieces."""
    size = 40 << 20
    artifact(bundle, [HELLO + b"\0" + chibishim.varint(size) + b"\3pad" + bytes(size - 4)])
    bundle.start()
    shim, = bundle.processes()
    bundle.create()
    with open("/proc/%d/status" % shim) as file:
        assert next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) < 40 << 10
    bundle.call("Start")
    assert bundle.call("Wait")["exit_status"] == 0


@needs_root
def test_containerd_is_not_asked_where_a_program_is(bundle):
    """Neither by init nor by an exec, not even one whose program is missing."""
    server = Containerd(bundle.directory + "/none")
    bundle.start().create()
    bundle.call("Start")
    spec = json.loads(process_of(bundle)["value"])
    bundle.call("Exec", exec_id="x", spec={"value": json.dumps(dict(spec, args=["/no/such"])).encode()})
    bundle.fails(chibishim.UNKNOWN_ERROR, "Start", exec_id="x")
    assert server.connections == 0


@needs_root
def test_a_missing_program_of_an_ordinary_image_is_what_it_was(bundle):
    server = artifact(bundle, architecture="amd64")
    bundle.config["process"]["args"] = ["nothing"]
    bundle.start()
    assert 'exec: "nothing": executable file not found in $PATH' in bundle.fails(chibishim.UNKNOWN_ERROR, "Create", bundle=bundle.path)
    assert server.connections == 1


@pytest.mark.skipif(peers.missing() is not None, reason="*** %s: artifacts of a real containerd are NOT run" % peers.missing())
@pytest.mark.parametrize("index", [False, True], ids=["manifest", "index"])
def test_an_artifact_in_a_real_containerd_runs(monkeypatch, index):
    """ctr refuses to unpack such an image, so the container is made by gRPC, as other clients do."""
    for name, fields in (("CreateContainerRequest", "1 container FullContainer"), ("CreateContainerResponse", "1 container ContainerRecord"),
                         ("FullContainer", "1 id string, 3 image string, 4 runtime Runtime, 5 spec Any"), ("Runtime", "1 name string")):
        monkeypatch.setitem(chibishim.MESSAGES, name, fields)
    module = HELLO + b"\0\x84\x80\xc0\1\3pad" + bytes(3 << 20)       # a custom section of 3 MiB
    with tempfile.TemporaryDirectory(prefix="chibi", dir="/run") as directory:
        daemon, id = peers.Containerd(directory), PREFIX + "artifact"
        daemon.start()
        try:
            artifact_of([module], "local.test/raw:1", directory + "/raw.tar", index=index)
            daemon.ctr("image", "import", "--no-unpack", "--all-platforms", directory + "/raw.tar", check=True)
            os.mkdir(directory + "/empty")
            config = chibishim.default_config("hello.wasm", [], [], [], False)
            config["root"]["path"], config["linux"]["cgroupsPath"] = directory + "/empty", "/default/" + id
            loop = chibishim.Loop()
            client = chibishim.GrpcClient(loop, daemon.address, "default")
            spec = {"type_url": "types.containerd.io/opencontainers/runtime-spec/1/Spec", "value": json.dumps(config).encode()}
            container = {"id": id, "image": "local.test/raw:1", "runtime": {"name": RUNTIME}, "spec": spec}
            request = ("containers.v1.Containers/Create", "CreateContainerRequest", {"container": container}, "CreateContainerResponse")
            finish(client.ask(*request), loop)
            with pytest.raises(chibishim.RpcError, match="already exists"):
                finish(client.ask(*request), loop)
            client.close()
            done = daemon.ctr("task", "start", id)
            assert (done.stdout, done.returncode) == (b"Hello, World!\n", 0), done.stderr
        finally:
            daemon.clear()
            left = daemon.leftovers()
            daemon.stop()
    assert left == []
