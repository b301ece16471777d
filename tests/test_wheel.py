"""The wheel as a user has it: installed in an environment of its own, far from any checkout.

`tests/flows/test_demo.py` runs the demo from it, in an empty folder; `tests/flows/service/test_up.py` the service.
"""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support import wheel

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user is."""
    return wheel.user_folder(tmp_path / "user")


def run(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, which is on Python's path."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    mine |= {"PYTHONPATH": ".", "LEWIS_HOME": str(folder.parent / "home"), **environment}
    return subprocess.run(command, cwd=folder, env=mine, capture_output=True, text=True, timeout=300)


def test_it_holds_the_packages_with_their_data_and_no_tests(installed: Path, tmp_path: Path) -> None:
    built = next(installed.parent.glob("wheels-from-*.tar.gz/*.whl"))
    expected = {
        path.relative_to(REPO / root).as_posix()
        for root, name in ((".", "lewis"), ("tasks", "lewis_tasks"), ("flows", "lewis_flows"))
        for path in (*(REPO / root / name).rglob("*.py"), *(REPO / root / name).rglob("py.typed"))
    }
    shipped = REPO / "deployments"
    data = [
        shipped / "prefect.yaml",
        *shipped.glob("examples/*.yaml"),
        *shipped.glob("recipes/*.y*ml*"),
        *shipped.glob("recipes/tasks/*.*"),
    ]
    expected |= {f"lewis_flows/shipped/{path.relative_to(shipped).as_posix()}" for path in data}
    names = zipfile.ZipFile(built).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    straight = wheel.wheel(tmp_path, installed.parent / "checkout")  # not by way of an sdist
    assert sorted(zipfile.ZipFile(straight).namelist()) == sorted(names)


def test_what_runs_is_the_wheel(installed: Path, folder: Path) -> None:
    modules = "lewis, lewis_tasks, lewis_flows"
    code = f"import {modules}\nprint(*(m.__file__ for m in ({modules})), sep='\\n')"
    done = run([installed / "bin" / "python", "-c", code], folder)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(installed) for line in done.stdout.split())


def test_the_commands_start(installed: Path, folder: Path) -> None:
    done = run([installed / "bin" / "lewis", "--help"], folder)
    assert done.returncode == 0 and "merge" in done.stdout, done.stderr
    done = run([installed / "bin" / "python", "-m", "lewis_flows.service.webhook"], folder)
    assert done.returncode == 2 and "PREFECT_API_URL is not set" in done.stderr, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["flows", "tasks"]
