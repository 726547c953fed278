"""What a release is: the tags of its wheels with and without a compiler, what they hold, and what the sources hold.

    python -m pytest -m packaging

Builds as pip does, by the backend that pyproject.toml names and without a network; needs setuptools.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging
pytest.importorskip("setuptools", "77")
ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
NONE = "/bin/false"
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with nothing built in it, and the traces of runs and tests that a real one has."""
    tree = tmp_path_factory.mktemp("checkout") / "tree"
    leave = shutil.ignore_patterns("*.so", "*.pyd", "build", "dist", "*.egg-info", ".git", ".*_cache", "runs", ".venv*")
    shutil.copytree(ROOT, tree, ignore=leave)
    (tree / "examples" / "runs" / "first").mkdir(parents=True)
    (tree / "examples" / "runs" / "first" / "model.safetensors").write_text("weights")
    (tree / "tests" / ".pytest_cache").mkdir()
    (tree / "tests" / ".pytest_cache" / "nodeids").write_text("[]")
    return tree


def built(tree: Path, kind: str, to: Path, compiler: str | None) -> tuple[Path, str]:
    """A distribution, and what its build said."""
    command = [sys.executable, "-c", BUILD, kind, str(to)]
    env = {**os.environ, "CC": compiler or NONE}
    result = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return to / result.stdout.splitlines()[-1], result.stdout + result.stderr


@pytest.fixture(scope="module")
def sources(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return built(tree, "sdist", tmp_path_factory.mktemp("sdist"), COMPILER)


@pytest.fixture
def unpacked(sources: tuple[Path, str], tmp_path: Path) -> Path:
    with tarfile.open(sources[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / sources[0].name.removesuffix(".tar.gz")


def test_the_sources_are_whole(sources: tuple[Path, str], unpacked: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout to compare with")
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert wanted - held == {".gitignore"}
    unknown = {name for name in held - wanted if not name.startswith("stompp_hf.egg-info/")}
    assert {name for name in unknown if not (ROOT / name).exists()} == {"PKG-INFO"}
    assert not any("runs/" in name or "cache" in name for name in unknown)


@needs_compiler
def test_one_wheel_serves_all_later_pythons(unpacked: Path, tmp_path: Path) -> None:
    wheel, said = built(unpacked, "wheel", tmp_path, COMPILER)
    assert ("-cp311-abi3-" in wheel.name) == STABLE and "none-any" not in wheel.name
    assert "COULD NOT BE BUILT" not in said
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    kernels = [name for name in names if name.startswith("stompp_hf/kernels/_native.")]
    assert len(kernels) == 1 and (".abi3." in kernels[0]) == STABLE
    packaged = {name for name in names if ".dist-info/" not in name}
    assert all(name.startswith("stompp_hf/") and "/csrc/" not in name for name in packaged)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "stompp_hf").rglob("*.py") if path.parent.name != "csrc"}
    assert packaged == {*modules, *kernels, "stompp_hf/py.typed"}


def test_without_a_compiler_the_wheel_is_pure_and_the_build_says_so(unpacked: Path, tmp_path: Path) -> None:
    wheel, said = built(unpacked, "wheel", tmp_path, NONE)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "THE COMPILED KERNELS COULD NOT BE BUILT" in said
    with zipfile.ZipFile(wheel) as archive:
        assert not any("_native" in name for name in archive.namelist())
        about = next(archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    assert b"Root-Is-Purelib: true" in about


@needs_compiler
def test_what_was_built_before_does_not_come_back(tree: Path, tmp_path: Path) -> None:
    first, _ = built(tree, "wheel", tmp_path / "first", COMPILER)
    (tree / "stompp_hf" / "kernels" / "csrc" / "kernels.h").touch()
    second, _ = built(tree, "wheel", tmp_path / "second", NONE)
    assert "none-any" not in first.name and "none-any" in second.name
    with zipfile.ZipFile(second) as archive:
        assert not any("_native" in name for name in archive.namelist())


def test_the_build_gives_no_warnings(unpacked: Path, tmp_path: Path) -> None:
    _, said = built(unpacked, "wheel", tmp_path, COMPILER)
    unwanted = [line for line in said.splitlines() if "warning" in line.lower() and "byte-compiling" not in line]
    assert not unwanted and "deprecat" not in said.lower()


def test_the_metadata_say_what_is_needed(unpacked: Path) -> None:
    about = message_from_bytes((unpacked / "PKG-INFO").read_bytes())
    assert about["License-Expression"] == "Apache-2.0" and about["License-File"] == "LICENSE"
    assert about["Requires-Python"] == ">=3.11"
    assert about["Project-URL"] and about["Description-Content-Type"] == "text/markdown"
    assert "Programming Language :: Python :: 3.11" in about.get_all("Classifier", [])
