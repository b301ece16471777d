"""Kills at points spread evenly over `lewis run` and `lewis up`: the next run ends with the same model, once.

After each point: no process is left, no traceback was told, and the run is done again. Then digest and bytes are those
of a run that nobody disturbed, and there is one version, which is the champion.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import Family
from tests.faults.running import (
    POINTS,
    Run,
    Tally,
    adopted,
    full,
    half_done,
    logged_weights,
    merged,
    until,
    with_tables,
    write_recipe,
)
from tests.support.local_hub import LocalHub
from tests.support.service import Service

pytestmark = full

GROUP, ALL, SERVER, EVALUATION, WORKER = "group", "everything", "prefect_app", "harness_child", "worker start"
OF_A_RUN = {
    "the group, SIGKILL": (GROUP, signal.SIGKILL, 1),
    "the group, SIGINT": (GROUP, signal.SIGINT, 5),
    "the group, SIGTERM": (GROUP, signal.SIGTERM, 5),
    "every process, SIGKILL": (ALL, signal.SIGKILL, 5),
    "the evaluation's child, SIGKILL": (EVALUATION, signal.SIGKILL, 5),
    "the Prefect server, SIGKILL": (SERVER, signal.SIGKILL, 5),
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
            time.sleep(0.1)

    def compare(self, tally: Tally, home: Path, digest: str, where: str) -> None:
        files = merged(home, digest) if digest else {}
        weights = {self.files["model.safetensors"]}
        tally.note("wrong models", bool(digest) and (digest, files) != (self.digest, self.files), where)
        tally.note("wrong models", bool(digest) and logged_weights(home) != weights, f"{where}: MLflow's weights")
        wrong = half_done(home) if digest else ""
        tally.note("half versions", bool(wrong), f"{where}: {wrong}")


def points(one_of: int) -> list[float]:
    count = max(1, POINTS // one_of)
    return [(i + 0.5) / count for i in range(count)]


def strike(
    undisturbed: Undisturbed, victim: str, number: int, point: float, parts: Callable[[], dict[int, str]], leader: int
) -> bool:
    """Wait for the point of the time in which the victim is there, and kill it; false if it was gone."""
    first, last = undisturbed.spans[victim]
    if victim not in (GROUP, ALL):
        until(lambda: any(victim in words for words in parts().values()), 60 + 3 * last, 0.02)
    time.sleep((last - first) * point)
    try:
        if victim == GROUP:
            os.killpg(leader, number)
            return True
        there = sorted(pid for pid, words in parts().items() if victim == ALL or victim in words)
        struck = there if victim == ALL else there[-1:]  # the evaluation's child is the last that was forked
        for pid in struck:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(struck)
    except ProcessLookupError:
        return False


@pytest.fixture(scope="module", autouse=True)
def _orphans_come_here() -> Iterator[None]:
    with adopted():
        yield


@pytest.fixture(scope="module")
def run(family: Family, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Undisturbed, Path]:
    """A run that nobody disturbs, and its recipe."""
    folder = tmp_path_factory.mktemp("kills")
    recipe = write_recipe(folder, family)
    found = Undisturbed(folder / "store")
    with_tables(found.store, empty_database)
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
    name: str, run: tuple[Undisturbed, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, recipe = run
    victim, number, one_of = OF_A_RUN[name]
    tally = Tally(f"`lewis run`: {name}")
    for i, point in enumerate(points(one_of)):
        home = tmp_path / f"home{i}"
        shutil.copytree(undisturbed.store, home)
        killed = Run(home, "run", recipe, "--json")
        struck = strike(undisturbed, victim, number, point, killed.parts, killed.process.pid)
        tally.points += struck
        where = f"at {point:.3f}"
        if not until(killed.ended, 300):
            tally.note("orphans", True, f"{where}: it does not end")
            killed.process.kill()
        left = killed.orphans()
        tally.note("orphans", bool(left), f"{where}: {left}")

        again = Run(home, "run", recipe, "--json")
        report = again.report()
        tally.note("runs that failed again", not report, f"{where}: {again.told()[-2000:]}")
        undisturbed.compare(tally, home, report.get("digest", ""), where)
        left = again.orphans()
        tally.note("orphans", bool(left), f"{where}, again: {left}")
        for each in (killed, again):
            told = each.told()
            tally.note("tracebacks", "Traceback (most" in told, f"{where}: {told[-3000:]}")
        shutil.rmtree(home)
    tally.end(capsys)


class Up(Service):
    """`lewis up` with the recipe of the kills."""

    def __init__(self, root: Path, hub: LocalHub, family: Family) -> None:
        super().__init__(root, hub)
        write_recipe(self.recipes, family)

    def merge(self) -> str:
        return self.start_run("merge/merge-on-release", recipe="tiny")

    def state(self, run: str) -> str:
        try:
            return str(self.ask(f"/flow_runs/{run}")["state_type"])
        except OSError:  # its server is the victim
            return ""

    def over(self, run: str) -> bool:
        return self.state(run) in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    def digest(self) -> str:
        """Of the newest version; "" if there is none."""
        return next((str(each.tags["lewis.digest"]) for each in self.versions("tiny")), "")


@pytest.fixture(scope="module")
def service(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run of the service that nobody disturbs."""
    root, found = tmp_path_factory.mktemp("up"), Undisturbed()
    with LocalHub(root / "hub") as hub, Up(root, hub, family) as up:
        run = up.merge()
        found.watch(up.parts, lambda: up.over(run))
        assert up.state(run) == "COMPLETED"
        found.digest, found.files = up.digest(), merged(up.home, up.digest())
    assert not half_done(up.home)
    return found


@pytest.mark.parametrize("name", OF_THE_SERVICE)
def test_a_service_that_was_killed_comes_back_and_the_next_run_has_the_same_result(
    name: str, service: Undisturbed, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, number, one_of = OF_THE_SERVICE[name]
    tally = Tally(f"`lewis up`: {name}")
    for i, point in enumerate(points(one_of)):
        root, where = tmp_path / f"root{i}", f"at {point:.3f}"
        root.mkdir()
        with LocalHub(root / "hub") as hub, Up(root, hub, family) as up:
            parts = up.parts()
            run = up.merge()
            tally.points += strike(service, victim, number, point, up.parts, up.process.pid)
            if victim in (GROUP, ALL):
                up.process.wait(120)
                until(lambda parts=parts: not any(map(alive, parts)), 30)
                left = [words for pid, words in parts.items() if alive(pid)]
                tally.note("orphans", bool(left), f"{where}: {left}")
                up.start()
            else:
                until(lambda up=up, run=run: up.over(run), 240, 0.5)
            until(up.answers, 60)
            again = up.merge()
            done = until(lambda up=up, again=again: up.over(again), 400, 0.5)
            failed = not done or up.state(again) != "COMPLETED"
            tally.note("runs that failed again", failed, f"{where}: {up.state(again)} {up.log.read_text()[-3000:]}")
            service.compare(tally, up.home, "" if failed else up.digest(), where)
        told = up.log.read_text()
        at = told.find("Traceback (most")
        tally.note("tracebacks", at >= 0, f"{where}: {told[max(0, at - 500) : at + 2500]}")
        shutil.rmtree(root)
    tally.end(capsys)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
