"""Kills at points spread evenly over `lewis run` and `lewis up`: the next run ends with the same model, once.

After each point: no process is left, no traceback was told, and the run is done again. Then digest and bytes are those
of a run that nobody disturbed, and there is one version, which is the champion.
"""

import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import POINTS, Family, full
from tests.faults.running import (
    Run,
    Tally,
    below,
    half_done,
    left_over,
    logged_weights,
    merged,
    until,
    write_recipe,
)
from tests.flows import test_run
from tests.flows.conftest import prefect_url as shared_server  # noqa: F401
from tests.support.local_hub import LocalHub
from tests.support.orphans import adopted
from tests.support.service import Service, children

pytestmark = full

GROUP, ALL, SERVER, EVALUATION, WORKER = "group", "everything", "prefect_app", "harness.child", "worker start"
OF_A_RUN = {
    "every process, SIGKILL": (ALL, signal.SIGKILL, 5),
    "the Prefect server, SIGKILL": (SERVER, signal.SIGKILL, 5),
    "the evaluation's child, SIGKILL": (EVALUATION, signal.SIGKILL, 5),
    "the group, SIGTERM": (GROUP, signal.SIGTERM, 5),
    "the group, SIGINT": (GROUP, signal.SIGINT, 5),
    "the group, SIGKILL": (GROUP, signal.SIGKILL, 1),
}
OF_THE_SERVICE = {**OF_A_RUN, "the worker, SIGKILL": (WORKER, signal.SIGKILL, 5)}
"""Who is killed, by what, and for how many of the POINTS there is one."""


@dataclass
class Undisturbed:
    """What nobody disturbed: the model, and for each victim when it was there, in seconds from the start."""

    store: Path = Path()  # an empty one, with the tables of both databases
    digest: str = ""
    files: dict[str, str] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    def watch(self, parts: Callable[[], dict[int, str]], ended: Callable[[], bool]) -> None:
        begun = time.monotonic()
        self.spans[GROUP] = self.spans[ALL] = (0.0, 0.0)
        while not ended():
            now, there = time.monotonic() - begun, list(parts().values())
            for victim in (GROUP, ALL, SERVER, EVALUATION, WORKER):
                if victim in (GROUP, ALL) or any(victim in words for words in there):
                    self.spans[victim] = (self.spans.get(victim, (now, now))[0], now)
            time.sleep(0.2)

    def compare(self, tally: Tally, home: Path, digest: str, where: str, name: str = "tiny") -> None:
        files = merged(home, digest) if digest else {}
        weights = {self.files["model.safetensors"]}
        # The registry's card and picture, and the manifest that counts them, are not in what the library merges.
        differ = [name for name, sha256 in self.files.items() if files.get(name) != sha256]
        wrong = digest != self.digest or bool(set(differ) - (set() if name == "tiny" else {"lewis.json"}))
        tally.note("wrong models", bool(digest) and wrong, f"{where}: {digest} for {self.digest}, {differ}")
        logged = logged_weights(home)
        wrong = logged != weights if name == "tiny" else not weights <= logged  # the store of a service has more
        tally.note("wrong models", bool(digest) and wrong, f"{where}: MLflow's weights")
        wrong = half_done(home, name) if digest else ""
        tally.note("half versions", bool(wrong), f"{where}: {wrong}")


def count(one_of: int) -> int:
    return max(1, POINTS // one_of)


def points(one_of: int) -> list[float]:
    """Numbers between 0 and 1; as many of them as are used are spread evenly (van der Corput's sequence)."""
    return [int(f"{i:b}"[::-1], 2) / 2 ** i.bit_length() for i in range(1, count(one_of) + 1)]


def strike(
    undisturbed: Undisturbed, victim: str, number: int, point: float, parts: Callable[[], dict[int, str]], leader: int
) -> dict[int, str]:
    """Wait for the point of the time in which the victim is there, and kill it.

    Gives the processes that have to end then, by their ids: the victim and all below it. None if it was gone.
    """
    first, last = undisturbed.spans[victim]
    if victim not in (GROUP, ALL):
        until(lambda: any(victim in words for words in parts().values()), 60 + 3 * last, 0.02)
    time.sleep((last - first) * point)
    there = parts()
    # The evaluation's child is the last that was forked; a guard is older than what it guards.
    struck = max((pid for pid, words in there.items() if victim in words), default=0)
    try:
        if victim == GROUP:
            os.killpg(leader, number)
        elif victim == ALL:
            for pid in (leader, *there):  # the leader first, else it starts again what ended
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        elif struck:
            there = {struck: victim, **children(struck)}
            os.kill(struck, number)
        else:
            return {}
    except ProcessLookupError:
        return {}
    return there


@pytest.fixture(scope="module", autouse=True)
def _orphans_come_here() -> Iterator[None]:
    with adopted():
        yield


@pytest.fixture(scope="module")
def run(family: Family, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Undisturbed, Path]:
    """A run that nobody disturbs, and its recipe."""
    folder = tmp_path_factory.mktemp("kills")
    recipe = write_recipe(folder, family)
    found = Undisturbed(empty_store)
    shutil.copytree(found.store, folder / "first")
    undisturbed = Run(folder / "first", "run", recipe, "--json")
    found.watch(undisturbed.parts, undisturbed.ended)
    report = undisturbed.report()
    assert report, undisturbed.told()
    found.digest, found.files = report["digest"], merged(folder / "first", report["digest"])
    assert not half_done(folder / "first") and not undisturbed.orphans()
    return found, recipe


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_run_that_was_killed_is_done_again_with_the_same_result(
    name: str,
    run: tuple[Undisturbed, Path],
    shared_server: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every second run uses a server that is there already, unless servers are killed too."""
    undisturbed, recipe = run
    victim, number, one_of = OF_A_RUN[name]
    tally = Tally(f"`lewis run`: {name}")
    for i, point in enumerate(points(one_of)):
        home = tmp_path / f"home{i}"
        shutil.copytree(undisturbed.store, home)
        shared = i % 2 and victim not in (ALL, SERVER)
        server = {"PREFECT_API_URL": shared_server, "PREFECT_HOME": str(home / "prefect")} if shared else {}
        killed = Run(home, "run", recipe, "--json", **server)
        struck = bool(strike(undisturbed, victim, number, point, killed.parts, killed.process.pid))
        tally.points += struck
        tally.landed[killed.step()] += struck
        where = f"at {point:.3f} ({killed.step()})"
        if not until(killed.ended, 300):
            tally.note("orphans", True, f"{where}: it does not end")
            killed.process.kill()
        left = killed.orphans()
        tally.note("orphans", bool(left), f"{where}: {left}")

        again = Run(home, "run", recipe, "--json", **server)
        report = again.report()
        tally.note("runs that failed again", not report, f"{where}: {again.told()[-2000:]}")
        left = again.orphans()  # and with them the server, before its database is read
        undisturbed.compare(tally, home, report.get("digest", ""), where)
        tally.note("orphans", bool(left), f"{where}, again: {left}")
        for each in (killed, again):
            told = each.told()
            tally.note("tracebacks", "Traceback (most" in told, f"{where}: {told[-3000:]}")
        left = [*left_over(home, again.temporary), *(home / "outbox").glob("*")]
        tally.note("left over", bool(report and left), f"{where}: {left}")
        shutil.rmtree(home)
        tally.point(where, capsys)
    tally.end(capsys)


class Up(Service):
    """`lewis up` with a recipe for each point, of which no step is done already."""

    def __init__(self, root: Path, hub: LocalHub, family: Family) -> None:
        super().__init__(root, hub)
        self.patience = 900.0  # on a machine that does much else
        names = ["tiny", *(recipe_of(name, i) for name, each in OF_THE_SERVICE.items() for i in range(count(each[2])))]
        for i, name in enumerate(names):
            write_recipe(self.recipes, family, name=name, rows=i)

    def merge(self, recipe: str) -> str:
        return self.start_run(f"merge/{recipe}")

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


def recipe_of(name: str, i: int) -> str:
    return re.sub(r"\W+", "-", f"{name}-{i}").lower()


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
    """A service after a run that nobody disturbed. All points share it, so it has been through all kills before."""
    root, found = tmp_path_factory.mktemp("up"), Undisturbed()
    before = set(below())
    shutil.copytree(empty_store, root / "home")
    with LocalHub(root / "hub") as hub, Up(root, hub, family) as up:
        run = up.merge("tiny")
        found.watch(up.parts, lambda: up.over(run))
        assert up.state(run) == "COMPLETED", up.log.read_text()[-6000:]
        yield found, up
    assert until(lambda: not below().keys() - before, 30), below()


@pytest.mark.parametrize("name", OF_THE_SERVICE)
def test_a_service_that_was_killed_comes_back_and_the_next_run_has_the_same_result(
    name: str, service: tuple[Undisturbed, Up], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, up = service
    victim, number, one_of = OF_THE_SERVICE[name]
    tally = Tally(f"`lewis up`: {name}")
    for i, point in enumerate(points(one_of)):
        recipe, where, begun = recipe_of(name, i), f"at {point:.3f}", up.log.stat().st_size
        run = up.merge(recipe)
        doomed = strike(undisturbed, victim, number, point, up.parts, up.process.pid)
        landed = up.step(run)
        tally.points += bool(doomed)
        tally.landed[landed] += bool(doomed)
        where += f" ({landed})"
        if victim in (GROUP, ALL):
            up.process.wait(300)
        until(lambda doomed=doomed: not any(map(alive, doomed)), 30)
        left = [words for pid, words in doomed.items() if alive(pid)]
        tally.note("orphans", bool(left), f"{where}: {left}")
        if victim in (GROUP, ALL):
            up.start()
        until(up.answers, 300)
        ended = until(lambda run=run: up.over(run), 600, 1)
        tally.note("half versions", not ended, f"{where}: the killed run is {up.state(run)} for ever")
        again = up.merge(recipe)
        done = until(lambda again=again: up.over(again), 1200, 1)
        failed = not done or up.state(again) != "COMPLETED"
        told = up.log.read_text()[begun:]
        tally.note("runs that failed again", failed, f"{where}: {up.state(again)} {told[-3000:]}")
        if not failed:
            expected = Undisturbed()
            expected.digest, expected.files = by_the_library(up.recipes / f"{recipe}.yaml", tmp_path / recipe)
            digests = {str(each.tags["lewis.digest"]) for each in up.versions(recipe)}
            expected.compare(tally, up.home, "".join(digests), where, recipe)
            # A worker of Prefect that was killed leaves folders of its own, a few kB, which nobody removes.
            left = [each for each in left_over(up.home, up.temporary) if "prefect" not in Path(each).name]
            tally.note("left over", bool(left), f"{where}: {left}")
        at = told.find("Traceback (most")
        tally.note("tracebacks", at >= 0, f"{where}: {told[max(0, at - 500) : at + 2500]}")
        shutil.rmtree(tmp_path / recipe, ignore_errors=True)
        tally.point(where, capsys)
    tally.end(capsys)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
