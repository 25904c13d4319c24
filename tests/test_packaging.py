"""The distribution: the wheel holds everything, works outside the checkout, and claims one name."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "apollo_fuse",
    "passes",
    "codegen",
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
SHIPPED = (".py", ".c", ".h", ".j2", ".json")


def run(*command: str | Path, cwd: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=outside, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of the source distribution from a copy, so that the checkout stays clean."""
    copy, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, copy, cwd=dist)
    assert len(list(dist.glob("*.tar.gz"))) == 1
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel in it, and this one's packages for what it depends on."""
    home = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home
    )
    purelib = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    )
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (purelib / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    return purelib


def test_the_wheel_holds_every_source_file_and_the_links_as_plain_files(wheel: Path) -> None:
    expected = {
        str((Path(folder) / name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "apollo_fuse", followlinks=True)
        for name in names
        if name.endswith(SHIPPED) or name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "apollo_fuse/passes/__init__.py" in held and "apollo_fuse/codegen/__init__.py" in held


def test_the_installed_command_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    command = installed.parents[2] / "bin" / "apollo-fuse"
    assert run(command, "--version", cwd=tmp_path) == "apollo-fuse 0.1.0\n"
    python = command.with_name("python")
    imported = run(python, "-c", "import apollo_fuse; print(apollo_fuse.__file__)", cwd=tmp_path)
    assert Path(imported.strip()) == installed / "apollo_fuse" / "__init__.py"


def test_only_apollo_fuse_is_installed_at_the_top_level(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()} - {"dependencies.pth", "__pycache__"}
    assert names == {"apollo_fuse", "apollo_fuse-0.1.0.dist-info"}


def test_importing_the_package_loads_no_part_of_the_compiler() -> None:
    heavy = "onnx, onnxruntime, onnx_ir, islpy, triton, numpy, rich, sympy"
    program = f"import sys, apollo_fuse; print(*({{*'{heavy}'.split(', ')}} & set(sys.modules)))"
    assert run(sys.executable, "-c", program, cwd=ROOT).strip() == ""
