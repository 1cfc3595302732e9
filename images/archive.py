#!/usr/bin/env python3
"""Builds a container image without a container engine: a docker-archive with one layer.

    archive.py OUT --tag NAME [--tag NAME…] [options] SOURCE=TARGET… | TREE/

SOURCE=TARGET puts a file at an absolute path of the image (root's, with the file's permission bits). TREE/ is a whole root
file system, taken with its owners and modes. `docker load`, `ctr images import` and `kind load image-archive` read the
result. The same content gives the same image.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the archive to write")
    parser.add_argument("content", nargs="+", metavar="SOURCE=TARGET | TREE/")
    parser.add_argument("--tag", action="append", required=True, help="a name of the image, with its tag")
    parser.add_argument("--entrypoint", type=json.loads, help="JSON list")
    parser.add_argument("--user", default="", help="UID[:GID] that the program runs as")
    parser.add_argument("--workdir", default="")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE")
    parser.add_argument("--label", action="append", default=[], help="NAME=VALUE")
    parser.add_argument("--stop-signal", help="e.g. SIGRTMIN+3")
    parser.add_argument("--architecture", default={"aarch64": "arm64"}.get(os.uname().machine, "amd64"))
    return parser.parse_args()


def anonymous(entry):
    """Takes out of a tar entry what differs from machine to machine and from run to run."""
    entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def write_layer(layer, content):
    folders = set()

    def make_folders(path, mode=0o755):
        if path in folders or path == "":
            return
        make_folders(os.path.dirname(path))
        folders.add(path)
        entry = tarfile.TarInfo(path)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        layer.addfile(entry)

    if not any("=" not in item for item in content):
        make_folders("tmp", 0o1777)
    for item in content:
        source, separator, target = item.partition("=")
        if not separator:
            layer.add(source, ".", filter=anonymous)
            continue
        target = target.lstrip("/")
        make_folders(os.path.dirname(target))
        with open(source, "rb") as file:
            entry = anonymous(layer.gettarinfo(fileobj=file, arcname=target))
            # A second link to a file that is in the layer already would be written as a reference to it.
            entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", os.fstat(file.fileno()).st_size
            entry.uid = entry.gid = 0
            layer.addfile(entry, file)


def digest_of(file):
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def configuration(options, layer_digest):
    config = {"Env": [PATH, *options.env], "Entrypoint": options.entrypoint, "User": options.user}
    if options.workdir:
        config["WorkingDir"] = options.workdir
    if options.label:
        config["Labels"] = dict(label.partition("=")[::2] for label in options.label)
    if options.stop_signal:
        config["StopSignal"] = options.stop_signal
    return {
        "architecture": options.architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "archive.py"}],
    }


def main():
    options = arguments()
    folder = os.path.dirname(os.path.abspath(options.out))
    with tempfile.NamedTemporaryFile(dir=folder) as layer_file, tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
        with tarfile.open(fileobj=layer_file, mode="w", format=tarfile.GNU_FORMAT) as layer:
            write_layer(layer, options.content)
        layer_file.flush()
        layer_digest = digest_of(layer_file)
        config = json.dumps(configuration(options, layer_digest), sort_keys=True).encode()
        config_name = hashlib.sha256(config).hexdigest() + ".json"
        layer_name = f"{layer_digest}/layer.tar"
        manifest = json.dumps([{"Config": config_name, "RepoTags": options.tag, "Layers": [layer_name]}]).encode()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name, data in ((config_name, config), ("manifest.json", manifest)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
            entry = tarfile.TarInfo(layer_name)
            entry.size = os.path.getsize(layer_file.name)
            archive.addfile(entry, layer_file)
    os.chmod(out.name, 0o644)
    shutil.move(out.name, options.out)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"archive.py: {error}")
