"""The repository's folders, its metadata and the wheel agree with each other."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import imedsam

ROOT = Path(__file__).resolve().parent.parent


def packages_in_setup():
    """The value of PACKAGES in setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["PACKAGES"]:
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py assigns no PACKAGES")


def pyproject(pattern):
    return re.findall(pattern, (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)


def test_every_package_folder_is_installed():
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ROOT.iterdir()
        if top.is_dir() and not top.name.startswith(".") and top.name not in ("build", "dist", "outputs")
        for path in top.rglob("__init__.py")
    }
    assert folders == set(packages_in_setup().values())
    assert all(name == "imedsam" or name.startswith("imedsam.") for name in packages_in_setup())


@pytest.mark.parametrize("folder", [".", "tests"])
def test_no_package_where_none_belongs(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_module_is_named_like_a_library():
    """A script run by its path has its folder first on sys.path: `training/datasets.py` would hide the library."""
    libraries = {*sys.stdlib_module_names, *packages_distributions()} - {"imedsam"}
    names = {path.stem for folder in packages_in_setup().values() for path in (ROOT / folder).glob("*.py")}
    assert {"evaluate", "datasets", "logging"} <= libraries and "metrics" in names
    assert not names & libraries - {"__init__"}


def test_versions_agree():
    (version,) = pyproject(r'^version = "(.+)"')
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert getattr(imedsam, "__version__", version) == version


def test_pinned_tools_agree_with_constraints():
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = pyproject(r'^    "((?:ruff|mypy)==.+)",')
    assert len(pinned) == 2 and set(pinned) <= set(constraints)


def test_constraints_are_portable():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len([line for line in lines if line.startswith("torch==")]) == 1


def test_the_lowest_constraints_are_those_of_the_package():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    del tested["pyparsing"]  # of matplotlib
    allowed = dict(pyproject(r'^    "([\w-]+)>=([\d.]+)(?:,<[\d.]+)?",')[: len(tested)])
    assert allowed.keys() == tested.keys() and "transformers" in tested
    assert all(
        version == allowed[name] or version == allowed[name] + ".0"
        for name, version in tested.items()
        if name != "torch"
    )


@pytest.mark.slow
def test_wheel_holds_nothing_but_imedsam(tmp_path):
    source = tmp_path / "source"  # setuptools leaves its build folder in the source
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in packages_in_setup().values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))

    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("imedsam-*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"imedsam"}
    modules = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in packages_in_setup().items()
        for path in (ROOT / folder).glob("*.py")
    }
    data = {"imedsam/py.typed", "imedsam/training/imedsam_metrics/imedsam_metrics.py"}
    assert modules | data <= set(files)


def test_the_links_between_documents_lead_somewhere():
    for document in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*/*.md")):
        if ".venv" in document.parts or "outputs" in document.parts:
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
