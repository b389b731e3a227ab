"""What is installed: the three folders as one package, by wheel and by plain checkout, with its entry points."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {
    "fusion_compiler": "fusion_compiler",
    "lowering": "fusion_compiler.lowering",
    "patterns": "fusion_compiler.patterns",
}


def packages_of_the_tree() -> dict[str, Path]:
    """Every folder with sources, by the name it installs as."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found[".".join((name, *inner))] = path.parent
    return found


def files_of_the_tree() -> set[str]:
    """What a wheel must hold: sources and data, as paths inside site-packages."""
    wanted = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in packages_of_the_tree().items()
        for path in folder.iterdir()
        if path.suffix in (".py", ".json") or path.name == "py.typed"
    }
    data = (ROOT / "fusion_compiler" / "cost" / "data").glob("*")
    return wanted | {f"fusion_compiler/cost/data/{path.name}" for path in data if path.is_file()}


def test_list_of_packages_is_complete() -> None:
    tree = packages_of_the_tree()
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(tree)
    missing = [name for name, folder in tree.items() if not (folder / "__init__.py").is_file()]
    assert not missing, f"no __init__.py in {missing}"


def test_entry_points_exist() -> None:
    declared = [
        *PROJECT["project"]["entry-points"]["torch_dynamo_backends"].items(),
        *PROJECT["project"]["scripts"].items(),
    ]
    for name, target in declared:
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute)), name


def test_requirements_leave_the_choice_of_torch_and_triton_open() -> None:
    required = {r.split(";")[0].strip() for r in PROJECT["project"]["dependencies"]}
    assert required == {"torch>=2.11", "triton", "sympy", "networkx", "rich"}
    assert not any("torch" in r for r in PROJECT["build-system"]["requires"]), "building must not fetch torch"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree, built with what is installed here."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_wheel_holds_one_package_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        declared = archive.read(entry_points).decode()
        (metadata,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        required = [x for x in archive.read(metadata).decode().splitlines() if x.startswith("Requires-Dist: triton")]
    assert names == files_of_the_tree()
    assert "[torch_dynamo_backends]\nfusion_compiler = fusion_compiler.backend:fusion_compiler" in declared
    assert "fusion-compiler = fusion_compiler.cli:main" in declared
    assert required and "sys_platform" in required[0] and "==" not in required[0].split(";")[0]


IMPORT_ALL = """
import importlib, sys
import fusion_compiler
for name in sys.argv[1:]:
    importlib.import_module(name)
print(importlib.import_module("fusion_compiler.patterns").__file__)
"""


def import_all(path: Path, cwd: Path) -> Path:
    """Import every package with `path` on PYTHONPATH; where fusion_compiler.patterns came from."""
    names = PROJECT["tool"]["setuptools"]["packages"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(done.stdout.strip())


def test_unpacked_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert import_all(site, tmp_path) == site / "fusion_compiler" / "patterns" / "__init__.py"


def test_plain_checkout_imports(tmp_path: Path) -> None:
    assert import_all(ROOT, tmp_path) == ROOT / "patterns" / "__init__.py"


def test_constraints_pin_the_versions_of_development() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [x for x in lines if x and not x.startswith("#")]
    assert pins == ["torch==2.13.0", "triton==3.7.1", "transformers==5.17.*"]
