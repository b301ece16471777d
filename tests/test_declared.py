"""Every package that the code imports is declared in pyproject.toml, and every declared one is imported."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
OURS = {"lewis", "lewis_tasks", "lewis_flows", "tests"}
OPTIONAL = {
    **{f"flows/lewis_flows/runners/{name}.py": name.partition("_")[0] for name in ("dask", "dask_worker", "ray")},
    "lewis/models/gguf.py": "gguf",
}
# Imported in the tests only by the Python of another environment, or from a folder that the test or the user makes.
ELSEWHERE = {"mergekit", "fusion_bench", "featcal", "programs", "bitsandbytes", "compressed_tensors"} | {
    *("auto_round", "auto_round_extension", "awq", "gptqmodel", "modelopt"),
    *("babel", "faker", "num2words", "pycountry"),
}
DISTRIBUTIONS = packages_distributions()  # takes a second
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Names of the distributions that the project declares, with those of some extras."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it, without ours and Python's own."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names - OURS - ELSEWHERE - sys.stdlib_module_names


def distributions(name: str) -> set[str]:
    """The distributions that a package may come from; one that is not installed is taken to be named as its package."""
    return {normal(found) for found in DISTRIBUTIONS.get(name, [name])}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py"))


def undeclared(paths: list[Path], *extras: str) -> list[str]:
    found = []
    for path in paths:
        where = path.relative_to(REPO).as_posix()
        known = declared(*extras, *([OPTIONAL[where]] if where in OPTIONAL else []))
        found += [f"{where}: {name}" for name in sorted(imported(path)) if not distributions(name) & known]
    return found


def test_what_the_package_imports_is_declared() -> None:
    assert undeclared(files("lewis", "tasks", "flows", "deployments")) == []


def test_what_the_tests_import_is_declared() -> None:
    assert undeclared(files("tests"), "dev", "dask", "ray", "s3") == []


@pytest.mark.parametrize("extra", ["", "dask", "ray"])
def test_what_is_declared_is_imported(extra: str) -> None:
    paths = files("lewis", "tasks", "flows", "deployments")
    if extra:
        paths = [path for path in paths if OPTIONAL.get(path.relative_to(REPO).as_posix()) == extra]
    used = set().union(*(distributions(name) for path in paths for name in imported(path)))
    assert (declared(extra) - declared() if extra else declared()) - used == set()
