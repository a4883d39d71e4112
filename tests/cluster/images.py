"""Images of single static programs, written as archives that containerd imports, without registry or build tool."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

NON_ROOT_USER = "65532:65532"


def write_program_image(archive: Path, name: str, program: Path, *, entrypoint: Sequence[str], path: str) -> None:
    """Write an image that contains one program, at `path`, in the format of `docker save`.

    `name` is the image's full name with its tag. The program must be static, since the image contains nothing else.
    """
    layer = _tar({path.lstrip("/"): program.read_bytes()}, mode=0o755)
    configuration = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "User": NON_ROOT_USER, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        "history": [{"created_by": f"one program: {program.name}"}],
    }
    described = json.dumps(configuration).encode()
    config_name = f"{_digest(described).removeprefix('sha256:')}.json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]
    files = {config_name: described, "layer.tar": layer, "manifest.json": json.dumps(manifest).encode()}
    archive.write_bytes(_tar(files, mode=0o644))


def _tar(files: dict[str, bytes], mode: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
