"""The wheel as a user has it: installed in an environment of its own, far from any checkout.

`tests/flows/test_demo.py` runs the demo from it, in an empty folder.
"""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Family
from tests.support import wheel
from tests.support.local_hub import LocalHub
from tests.support.models import write_expert
from tests.support.service import Service

REPO = Path(__file__).resolve().parents[1]
RECIPE = """
merge_method: ties
base_model: org/base
models:
  - {model: org/math, parameters: {weight: 1.0}}
  - {model: org/code, parameters: {weight: 1.0}}
register: {name: tiny}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user is."""
    return make_folder(tmp_path / "user")


def make_folder(path: Path) -> Path:
    """A folder that has packages `flows` and `tasks`, as those of Prefect's users do."""
    path.mkdir()
    for name in ("flows", "tasks"):
        (path / name).mkdir()
        (path / name / "__init__.py").write_text("raise RuntimeError('the code of the user')")
    return path


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


@pytest.fixture(scope="module")
def service(installed: Path, tmp_path_factory: pytest.TempPathFactory, family: Family) -> Iterator[Service]:
    """`lewis up` of the wheel with its own deployments, in a folder that has packages `flows` and `tasks`."""
    root = tmp_path_factory.mktemp("service")
    with LocalHub(root / "hub") as hub:
        for name, model in (("base", family.base), ("math", family.math), ("code", family.code)):
            hub.commit(f"org/{name}", model)
        service = Service(root, hub)
        service.command, service.folder = (
            [str(installed / "bin" / "lewis"), "up"],
            make_folder(root / "user"),
        )
        service.environment["PYTHONPATH"] = "."
        del service.environment["LEWIS_RECIPES"]
        service.recipes = service.home / "recipes"
        with service:
            yield service


def test_the_service_merges_what_is_put_into_the_folder_that_it_made(service: Service, installed: Path) -> None:
    assert sorted(path.name for path in service.recipes.iterdir()) == ["example.yaml.txt", "tasks"]
    service.until(lambda: f"recipes in {service.recipes}: none" in service.log.read_text(), 60)
    (service.recipes / "tiny.yaml").write_text(RECIPE)
    service.until(lambda: service.deployment("tiny"), 60)
    service.start_run("merge/tiny")
    [merge] = service.finished("tiny", 1, 300)
    assert merge["state_name"] == "Promoted", service.log.read_text()
    assert len(service.versions("tiny")) == 1


def test_its_receiver_takes_a_release(service: Service, family: Family) -> None:
    expert = write_expert(family.base, service.home.parent / "release", seed=9)
    service.hub.commit("org/math", expert)
    shutil.rmtree(expert)
    service.until(lambda: "/webhook 202 accepted org/math" in service.log.read_text(), 30)
