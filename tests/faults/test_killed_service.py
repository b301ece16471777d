"""Kills at points spread evenly over a run of `lewis up`: the next run ends with the same model, once."""

import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import Family, full
from tests.faults.killing import ALL, GROUP, OF_THE_SERVICE, Striker, Undisturbed, alive, in_parts, points
from tests.faults.running import Tally, below, left_over, merged, until, write_recipe
from tests.flows import test_run
from tests.support.local_hub import LocalHub
from tests.support.orphans import adopted
from tests.support.service import Service

pytestmark = full


class Up(Service):
    """`lewis up` with a recipe for each point, of which no step is done already."""

    def __init__(self, root: Path, hub: LocalHub, family: Family) -> None:
        super().__init__(root, hub)
        self.patience = 900.0  # on a machine that does much else
        self.environment["LEWIS_NIGHTLY"] = "off"  # a night in the middle of the kills would start runs of its own
        self.family, self.rows = family, 0
        self.have("tiny")

    def have(self, *names: str) -> None:
        """Let these be the recipes of the folder."""
        for path in self.recipes.glob("*.yaml"):
            if path.stem not in names:
                path.unlink()
        for name in names:
            if not (self.recipes / f"{name}.yaml").exists():
                write_recipe(self.recipes, self.family, name=name, rows=self.rows)
                self.rows += 1

    def merge(self, recipe: str) -> str:
        return self.until(lambda: self.start_run(f"merge/{recipe}"), 600)

    def step(self, run: str) -> str:
        """The step of a run that was begun last, by the server's database, as the server may be dead."""
        of_run = "SELECT name FROM task_run WHERE flow_run_id IN (?, ?) ORDER BY start_time DESC LIMIT 1"
        with closing(sqlite3.connect(f"file:{self.home}/prefect/prefect.db?mode=ro", uri=True)) as prefect:
            found = prefect.execute(of_run, (run, run.replace("-", ""))).fetchone()
        return str(found[0]).split("-")[0].split()[0] if found else "the start"

    def over(self, run: str) -> bool:
        return self.state(run) in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    def state(self, run: str) -> str:
        try:
            return str(self.ask(f"/flow_runs/{run}")["state_type"])
        except OSError:  # its server is the victim
            return ""


def left_by(up: Up) -> list[str]:
    """What is left over, without what a worker of Prefect that was killed leaves: a few kB, which nobody removes."""
    return [each for each in left_over(up.home, up.temporary) if "prefect" not in Path(each).name]


def recipe_of(name: str, part: int, number: int) -> str:
    return re.sub(r"\W+", "-", f"{name}-{part}-{number}").lower()


def by_the_library(recipe: Path, folder: Path) -> tuple[str, dict[str, str]]:
    """Digest and files of the merge, done in this process in a store of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEWIS_HOME", str(folder))
        digest, _ = test_run.by_the_library(recipe, folder / "merged" / "alone")
        return digest, merged(folder, "alone")


@pytest.fixture(scope="module")
def service(
    family: Family, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Undisturbed, Up]]:
    """A service after a run that nobody disturbed. The tests of a process share it: it has been through their kills."""
    root, found = tmp_path_factory.mktemp("up"), Undisturbed()
    before = set(below())
    shutil.copytree(empty_store, root / "home")
    with adopted(), LocalHub(root / "hub") as hub, Up(root, hub, family) as up:
        run = up.merge("tiny")
        found.watch(up.parts, lambda: up.step(run), lambda: up.over(run))
        assert up.state(run) == "COMPLETED", up.log.read_text()[-6000:]
        yield found, up
    assert until(lambda: not below().keys() - before, 30), below()


@pytest.mark.parametrize("name, part", in_parts(OF_THE_SERVICE, "service"))
def test_comes_back_and_the_next_run_has_the_same_result(
    name: str, part: int, service: tuple[Undisturbed, Up], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (undisturbed, up), (victim, number), left = service, OF_THE_SERVICE[name], points(part)
    tally, striker = Tally(f"`lewis up`: {name}"), Striker(undisturbed, victim, number)
    recipe = ""
    while recipe or left:
        begun = up.log.stat().st_size
        if not recipe:
            recipe = recipe_of(name, part, up.rows)
            up.have(recipe)
            striker.done = 0
        run = up.merge(recipe)
        where, doomed = "the run after it", dict[int, str]()
        if left:
            point = left.pop(0)
            doomed = striker.strike(point, up.parts, up.process.pid)
            landed = up.step(run)
            tally.points += bool(doomed)
            tally.landed[landed] += bool(doomed)
            if not doomed:
                left.insert(0, 0.9 * point)  # it came too late, and is tried again a little earlier
            where = f"at {point:.3f} ({landed})"
            if victim in (GROUP, ALL):
                up.process.wait(300)
            until(lambda doomed=doomed: not any(map(alive, doomed)), 30)
            remain = [words for pid, words in doomed.items() if alive(pid)]
            tally.note("orphans", bool(remain), f"{where}: {remain}")
            if victim in (GROUP, ALL):
                up.start()
            until(up.answers, 300)
        ended = until(lambda run=run: up.over(run), 1200, 1)
        done, told = up.state(run) == "COMPLETED", up.log.read_text()[begun:]
        tally.note("half versions", not ended, f"{where}: the run is {up.state(run)} for ever")
        tally.note("runs that failed again", not done and not doomed, f"{where}: {up.state(run)} {told[-3000:]}")
        if done:
            expected = Undisturbed()
            expected.digest, expected.files = by_the_library(up.recipes / f"{recipe}.yaml", tmp_path / recipe)
            digests = {str(each.tags["lewis.digest"]) for each in up.versions(recipe)}
            expected.compare(tally, up.home, "".join(digests), where, recipe)
            until(lambda: not left_by(up), 30)  # the run's process ends after the run
            tally.note("left over", bool(left_by(up)), f"{where}: {left_by(up)}")
            shutil.rmtree(tmp_path / recipe)
        at = told.find("Traceback (most")
        tally.note("tracebacks", at >= 0, f"{where}: {told[max(0, at - 500) : at + 2500]}")
        if done or not doomed:
            recipe = ""
        tally.point(where, capsys)
    tally.end(capsys)
