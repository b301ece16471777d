"""What the tests of faults share: a store with the tables of MLflow and Prefect, and which tests share a process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.running import LEFT_OUT
from tests.flows.conftest import REPO


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let `make faults` run each file in one process, but for tests that are marked to have one of their own."""
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def empty_store(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store to be copied, not used: making the tables takes longer than a run."""
    home = tmp_path_factory.mktemp("empty") / "store"
    (home / "mlflow").mkdir(parents=True)
    shutil.copy(empty_database, home / "mlflow" / "mlflow.db")
    code = (
        "from lewis_flows import environment; environment.prepare()\n"
        "from lewis_flows.service.servers import prefect_server\n"
        "with prefect_server(): pass"
    )
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    subprocess.run([sys.executable, "-c", code], env={**kept, "LEWIS_HOME": str(home)}, cwd=REPO, check=True)
    return home
