"""What every test needs: a store of its own, no telemetry, and a family of tiny models made once."""

import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.prefect_key import KEY

if TYPE_CHECKING:
    from tests.support.warm import WarmPython

# Tests write a gigabyte in small files and wait for each to be on the disk: where there is room, in memory.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

sys.dont_write_bytecode = False  # as in the Makefile: tests are compiled once, whatever the environment says

# Before any import reads the environment: nothing may touch the user's store or phone home.
ROOT = os.environ.get("PYTEST_DEBUG_TEMPROOT")
os.environ["LEWIS_HOME"] = SESSION_HOME = tempfile.mkdtemp(prefix="lewis-tests-", dir=ROOT)
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.update(
    DO_NOT_TRACK="1",
    OMP_NUM_THREADS="1",  # the models are tiny: more threads would only wait for each other
    OMP_WAIT_POLICY="passive",  # and those of tests of threads leave their core to others while they wait
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_SERVER_API_AUTH_STRING=KEY,
    PREFECT_API_AUTH_STRING=KEY,
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("busy", deadline=None)  # a busy machine must not fail them
settings.load_profile("busy")

POINTS = int(os.environ.get("LEWIS_FAULTS_POINTS", "0"))
"""At how many points `make faults` kills a run; 0 in `make test`."""
full = pytest.mark.skipif(not POINTS, reason="make faults")
"""Faults that only `make faults` tries."""
SERVERS = {"hub", "empty_database", "installed", "prefect_url", "warm", "subprocess", "LocalHub"}
"""Fixtures and names in a test that say that it starts a server or a process, or makes a database."""
KILLS = ("test_killed_service.py", "test_killed_runs.py")
SHORT = ("test_fuzz_webhooks.py", "test_quota.py")  # a process takes its next file before its last test
WAITS = ("test_patience.py", "test_device_slot.py")  # they sleep, and others compute meanwhile
LONGEST = (
    *(*KILLS, "test_fuzz_networks.py", "test_fuzz_adapters.py", "test_up.py", *SHORT, "test_demo.py", "test_run.py"),
    *("test_search.py", "test_champion.py", "test_report.py", "test_versions.py", "test_lm_eval.py", *WAITS),
)


@dataclass(frozen=True)
class Family:
    """A tiny Llama and fine-tunes of it: two in full, one as a LoRA adapter. Read only."""

    base: Path
    math: Path
    code: Path
    lora: Path

    @property
    def experts(self) -> list[Path]:
        return [self.math, self.code]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m unit`, leave out the folders that have no unit test: their tests import Prefect and MLflow."""
    aside = collection_path.parent == Path(__file__).parent and collection_path.name != "lewis"
    return True if aside and config.option.markexpr == "unit" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import what the tests import, all at once, without looking for garbage in between or later."""
    from lewis.quick_imports import quick_imports

    with quick_imports():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none is left alone at the end.

    Property tests go through the same lines hundreds of times, which other tests go through too: `make coverage` does
    not count them there.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("LEWIS_LONG"):
            item.add_marker(pytest.mark.skip("make test-long"))
        if _is_unit(item):
            item.add_marker(pytest.mark.unit)
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.no_cover)


def _is_unit(item: pytest.Item) -> bool:
    """Whether a test is of one wing, quick, and needs no server and no other process: those of `pytest -m unit`.

    A test or a module that is not, though it is in the folder of a wing and uses none of `SERVERS`, is marked `slow`.
    """
    parts = item.path.relative_to(Path(__file__).parent).parts
    if parts[0] != "lewis" or "whole" in parts or item.get_closest_marker("slow"):
        return False
    names = item.function.__code__.co_names if isinstance(item, pytest.Function) else ()
    return SERVERS.isdisjoint({*names, *getattr(item, "fixturenames", ())})


@pytest.fixture
def remembers_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums of small files are remembered as those of large ones are."""
    monkeypatch.setattr("lewis.store.manifest._SMALL", 0)


@pytest.fixture(autouse=True)
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow with nothing set."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "x")  # so that the teardown undoes what MLflow exports
        monkeypatch.delenv(name)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh store."""
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def asked_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries are asked in this process, not in a child, and their answers are kept in a fresh store."""
    from tests.support.rehearsing import ask_all

    monkeypatch.setattr("lewis.rehearsal.child.ask_all", ask_all)
    for name in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{name}.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all test processes share."""
    mine = tmp_path_factory.getbasetemp()
    return mine if worker_id == "master" else mine.parent


@pytest.fixture(scope="session")
def empty_database(common: Path) -> Path:
    """MLflow's tables without a row of ours."""
    from tests.support.databases import empty_mlflow

    return empty_mlflow(common)


@pytest.fixture
def lm_eval_tasks(common: Path) -> Path:
    """The index of lm-eval's own tasks, as a store keeps it; this process has read it."""
    from tests.support.databases import lm_eval_index

    return lm_eval_index(common)


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory, common: Path) -> Iterator[str]:
    """One Prefect server for all tests of this process.

    A module that imports a fixture gets one of its own: a server more, which runs until the last test has ended.
    """
    from lewis_flows import environment
    from lewis_flows.service import servers
    from tests.support.databases import put_prefect
    from tests.support.service import claimed_port

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("prefect-home")
        put_prefect(common, home)
        patch.setenv("LEWIS_HOME", str(home))
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):  # a command of an earlier test leaves its own
            patch.delenv(name, raising=False)
        for name in ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"):
            patch.setenv(name, KEY)
        patch.setattr(servers, "free_port", claimed_port)  # two test processes that had one server would mix their runs
        environment.prepare()
        with servers.prefect_server() as url:
            from prefect.logging.handlers import APILogWorker

            yield url
            APILogWorker.drain_all(timeout=10)  # else a flow of this process is waited for at exit: for a minute


@pytest.fixture(scope="session")
def warm() -> Iterator["WarmPython"]:
    """A Python that has the libraries of `lewis run`."""
    from tests.support.warm import WarmPython

    with WarmPython() as python:
        yield python


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The family in fp32, its embedding tied to its head."""
    from tests.support.models import write_expert, write_llama, write_lora

    folder = tmp_path_factory.mktemp("family")
    base = write_llama(folder / "base")
    math, code = (write_expert(base, folder / name, seed=i) for i, name in enumerate(("math", "code"), 1))
    return Family(base, math, code, write_lora(base, folder / "lora"))


@pytest.fixture(scope="session")
def installed(common: Path) -> Path:
    """The environment that the wheel is installed in, made once for all test processes."""
    from tests.support import wheel

    return wheel.install(common / "wheel")


def pytest_unconfigure() -> None:
    shutil.rmtree(SESSION_HOME, ignore_errors=True)  # also of the process that only shares out the tests
