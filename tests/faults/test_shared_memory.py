"""/dev/shm without room, without inodes, or read-only: a search ends as it does elsewhere, with the same scores."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family, full
from tests.faults.running import write_recipe
from tests.faults.test_disk_full import LEWIS, can_mount
from tests.flows.conftest import REPO

SEARCH = """
search: {trials: 2, metrics: ["words/acc,none"], space: {parameters.lambda: {min: 0.5, max: 2.0}}}
"""
SCRIPT = """
mount -t tmpfs -o "$1" memory /dev/shm || exit 100; shift
exec "$@"
"""
PLAIN = "size=512m"
OPTIONS = {
    "full": "size=1m",
    "too full for the reserve that a merge asks for": "size=8m",
    "no inode": "nr_inodes=1",
    "too few inodes for a model": "nr_inodes=4",
    "read-only": "ro",
}


@pytest.fixture(scope="module")
def place(family: Family) -> Iterator[Path]:
    """A folder with the models, outside of /dev/shm, over which another file system is mounted."""
    if Path(tempfile.gettempdir()).is_relative_to("/dev/shm"):
        pytest.skip("the temporary files are in /dev/shm")
    with tempfile.TemporaryDirectory(prefix="lewis-tests-") as name:
        for each in ("base", "math", "code", "lora"):
            shutil.copytree(getattr(family, each), Path(name) / each)
        yield Path(name)


def searched(place: Path, options: str, url: str, database: Path) -> tuple[list[Any], str]:
    """Trials, best values and confirmed scores of `lewis search` with such a file system at /dev/shm, and its log."""
    root = Path(tempfile.mkdtemp(dir=place))
    home = root / "home"
    (home / "mlflow").mkdir(parents=True)
    shutil.copy(database, home / "mlflow" / "mlflow.db")
    recipe = write_recipe(root, Family(*(place / each for each in ("base", "math", "code", "lora"))))
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("register")]
    recipe.write_text("\n".join(lines) + SEARCH)
    command = [sys.executable, "-c", LEWIS, "search", str(recipe), "--json"]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", SCRIPT, "sh", options, *command],
        cwd=REPO,
        env={**os.environ, "LEWIS_HOME": str(home), "TMPDIR": str(root), "PREFECT_API_URL": url},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0 and "Traceback (most" not in done.stderr, (options, done.returncode, done.stderr)
    assert not list((home / "trials").glob("*")) and not list((home / "trials").glob(".*")), options
    report = json.loads(done.stdout)
    trials = [{key: value for key, value in each.items() if key != "seconds"} for each in report["trials"]]
    assert [each["state"] for each in trials] == ["done", "done"]
    return [trials, report["best"], report["confirmed"]], done.stderr


@pytest.fixture(scope="module")
def undisturbed(place: Path, prefect_url: str, empty_database: Path) -> list[Any]:
    found, log = searched(place, PLAIN, prefect_url, empty_database)
    assert "written to the disk" not in log
    return found


@full
@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
@pytest.mark.parametrize("how", OPTIONS)
def test_a_search_is_the_same_without_room_in_memory(
    how: str, place: Path, undisturbed: list[Any], prefect_url: str, empty_database: Path
) -> None:
    found, log = searched(place, OPTIONS[how], prefect_url, empty_database)
    assert "written to the disk" in log, log
    assert found == undisturbed
