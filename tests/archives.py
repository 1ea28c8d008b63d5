"""Archives: images in the OCI layout (image-layout.md), as `ctr image import` takes them, and the suites'."""

import atexit
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile



def unpacked(archive):
    """The folder with an archive's files, which ends with this process; None where there is no archive."""
    if not os.path.exists(archive):
        return None
    folder = tempfile.mkdtemp(prefix="chibishim-suite-")        # a TemporaryDirectory would end with the first worker
    atexit.register(shutil.rmtree, folder)
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder


def image_of(programs, entrypoint, reference, path):
    """Writes an OCI image archive of files {name: bytes} for a native program."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name, data in programs.items():
            item = tarfile.TarInfo(name)
            item.mode, item.size = 0o755, len(data)
            tar.addfile(item, io.BytesIO(data))
    machine = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}.get(os.uname().machine, os.uname().machine)
    digest = "sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()
    archive_of([("application/vnd.oci.image.layer.v1.tar", layer.getvalue())], reference, path, architecture=machine, os="linux",
               config={"Entrypoint": entrypoint}, rootfs={"type": "layers", "diff_ids": [digest]})


def artifact_of(modules, reference, path, type="application/wasm", index=False, **more):
    """Writes an OCI image archive whose layers are these modules themselves."""
    archive_of([(type, module) for module in modules], reference, path, index, **{
        "architecture": "wasm", "os": "wasip1", "config": {"Entrypoint": ["/hello.wasm"]}, "rootfs": {"type": "layers", "diff_ids": []}, **more})


def archive_of(layers, reference, path, index=False, **config):
    """Writes an OCI image archive of layers (media type, bytes); with `index` there is one above the manifest."""
    blobs = {}

    def blob(data, type, **more):
        digest = hashlib.sha256(data).hexdigest()
        blobs["blobs/sha256/" + digest] = data
        return {"mediaType": type, "digest": "sha256:" + digest, "size": len(data), **more}

    oci = "application/vnd.oci.image."
    manifest = blob(json.dumps({
        "schemaVersion": 2, "mediaType": oci + "manifest.v1+json", "config": blob(json.dumps(config).encode(), oci + "config.v1+json"),
        "layers": [blob(data, type) for type, data in layers]}).encode(), oci + "manifest.v1+json",
        platform={"architecture": config["architecture"], "os": config["os"]})
    if index:
        manifest = blob(json.dumps({"schemaVersion": 2, "mediaType": oci + "index.v1+json", "manifests": [manifest]}).encode(), oci + "index.v1+json")
    manifest["annotations"] = {"io.containerd.image.name": reference}
    blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()
    blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    with tarfile.open(path, "w") as tar:
        for name, data in blobs.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))
