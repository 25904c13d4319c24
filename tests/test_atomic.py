"""Atomic writing: a file is there whole or as it was, and nothing else is left in the folder."""

import os
from pathlib import Path

import pytest

from apollo_fuse.atomic import replacing, require_writable, write_bytes
from apollo_fuse.errors import OutputError


def test_a_write_replaces_the_file_with_the_permissions_that_others_get(tmp_path: Path) -> None:
    path, plain = tmp_path / "out.bin", tmp_path / "plain.bin"
    path.write_bytes(b"before")
    plain.write_bytes(b"")
    write_bytes(path, b"after")
    assert path.read_bytes() == b"after"
    assert path.stat().st_mode == plain.stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "plain.bin"]


def test_the_temporary_path_is_in_the_same_folder_with_the_same_suffix(tmp_path: Path) -> None:
    with replacing(tmp_path / "net.fused.onnx") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".onnx")
        assert not temporary.exists()
        temporary.write_bytes(b"x")


def test_a_body_that_raises_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "out", tmp_path / "folder", Path("/proc/out")):
        with pytest.raises(OutputError, match="cannot write"):
            require_writable(path)
        with pytest.raises(OutputError, match="cannot write"):
            write_bytes(path, b"x")
    assert os.listdir(tmp_path) == ["folder"]
