"""Files that appear whole or not at all: written beside their place, then moved over it in one step."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from apollo_fuse.errors import OutputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder, to be written by the body, that then takes the place of `path`.

    It ends in the same suffix, since some writers look at it. If the body raises, `path` stays as it was and
    nothing is left behind. Raises OutputError where the file cannot be moved into place.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path`. Raises OutputError where that cannot be done."""
    try:
        with replacing(path) as temporary, temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Put `text` at `path` as UTF-8. Raises OutputError where that cannot be done."""
    write_bytes(path, text.encode())


def require_writable(path: Path) -> None:
    """Raise OutputError unless a file can be written at `path`, found out by making one in its folder."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the path of a file")
    if not path.parent.exists():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    why = error.strerror or str(error)
    return OutputError(f"cannot write {path}: {why}; choose a place that can be written")
