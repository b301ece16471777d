"""What the tests of faults share: a store with empty tables, which tests share a process, and what has passed.

`make faults` takes hours. One that was stopped, or in which something failed, goes on at the same commit: what has
passed there is skipped, until all has.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import POINTS
from tests.faults.fuzz import DRAWS
from tests.faults.running import LEFT_OUT
from tests.flows.conftest import REPO

PASSED = pytest.StashKey[set[str]]()


class Passed:
    """Which tests have passed at a commit, in pytest's cache; forgotten when all have."""

    def __init__(self, cache: pytest.Cache, where: str) -> None:
        self.cache, self.key = cache, f"faults/{where}"
        self.names: list[str] = cache.get(self.key, [])
        self.before = len(self.names)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.names.append(report.nodeid)
            self.cache.set(self.key, self.names)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        if self.before:
            terminalreporter.line(f"{self.before} tests were skipped that had passed at this commit before")
        if not exitstatus:
            self.cache.set(self.key, [])


def pytest_configure(config: pytest.Config) -> None:
    asked = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    commit = subprocess.run(asked, cwd=REPO, capture_output=True, text=True).stdout.strip()
    if not POINTS or not commit or commit.endswith("-dirty") or not hasattr(config, "cache"):
        return
    passed = Passed(config.cache, f"{commit}, {POINTS} points, {DRAWS} draws")
    if not hasattr(config, "workerinput"):  # the process that hears of all tests
        config.pluginmanager.register(passed)
    config.stash[PASSED] = {*passed.names}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let `make faults` run each file in one process, but for tests that are marked to have one of their own."""
    passed = config.stash.get(PASSED, set())
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if item.nodeid in passed:
            item.add_marker(pytest.mark.skip(reason="it has passed at this commit"))


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
