"""Databases with all tables and no rows: to make them takes seconds, of MLflow's four and of Prefect's seven.

And the index of lm-eval's own tasks, which takes five.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from lewis import store
from lewis.evaluation.harness.builtin_tasks import index
from lewis.rehearsal.lm_eval_itself import INDEX
from lewis.store import kinds


def empty_mlflow(root: Path) -> Path:
    """MLflow's database; made once for all test processes that share `root`."""
    return _once(root / "mlflow.db", _make_mlflow)


@contextmanager
def champion_stays(home: Path) -> Iterator[None]:
    """In this block, MLflow's database in a store refuses to move the alias `champion`, as a server does that ends."""
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database:
        for change in ("insert", "update"):
            when = f"before {change} on registered_model_aliases when new.alias = 'champion'"
            database.execute(f"create trigger no_{change} {when} begin select raise(abort, 'no'); end")
        yield
        for change in ("insert", "update"):
            database.execute(f"drop trigger no_{change}")


def put_prefect(root: Path, home: Path) -> None:
    """Give a store Prefect's database; the one that is copied is made once for all test processes that share `root`."""
    made = _once(root / "prefect" / "prefect.db", _make_prefect)
    (home / "prefect").mkdir(mode=0o700, parents=True)
    home.chmod(0o700)
    shutil.copy(made, home / "prefect")


def lm_eval_index(root: Path) -> Path:
    """What a store keeps of lm-eval's tasks; read once for all test processes that share `root`, and known to this one.

    To be copied into the folder of the same name of a store whose process is another one.
    """
    with _store(root / "lm-eval"):
        made = _once(kinds.REHEARSALS.path(INDEX.key), _read_tasks)
        index()
    return made


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


def _read_tasks(path: Path) -> None:
    store.write_entry(path, {"question": INDEX.name, "answer": INDEX.ask()}, indent=None)


@contextmanager
def _store(home: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEWIS_HOME", str(home))
        yield


def _make_mlflow(path: Path) -> None:
    import mlflow

    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()


def _make_prefect(path: Path) -> None:
    made = path.with_suffix(".new")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(path.parent),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{made}",
    }
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    made.rename(path)
