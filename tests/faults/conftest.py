"""A store with the tables of MLflow and Prefect, made once: making them takes longer than a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.running import LEFT_OUT
from tests.flows.conftest import REPO


@pytest.fixture(scope="session")
def empty_store(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied, not to be used."""
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
