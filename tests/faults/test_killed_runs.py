"""Kills at points spread evenly over `lewis run`: the next run ends with the same model, once."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Family, full
from tests.faults.killing import ALL, OF_A_RUN, SERVER, Striker, Undisturbed, in_parts, points
from tests.faults.running import Run, Tally, half_done, left_over, merged, until, write_recipe
from tests.support.orphans import adopted
from tests.support.warm import WarmPython

pytestmark = full


@pytest.fixture(scope="module")
def run(
    family: Family,
    empty_store: Path,
    warm: WarmPython,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Undisturbed, Path]]:
    """A run that nobody disturbs, and its recipe."""
    folder = tmp_path_factory.mktemp("kills")
    recipe = write_recipe(folder, family)
    found = Undisturbed(empty_store)
    shutil.copytree(found.store, folder / "first")
    with adopted():
        undisturbed = Run(folder / "first", "run", recipe, "--json", warm=warm)
        found.watch(undisturbed.parts, undisturbed.step, undisturbed.ended)
        report = undisturbed.report()
        assert report, undisturbed.told()
        found.digest, found.files = report["digest"], merged(folder / "first", report["digest"])
        assert not half_done(folder / "first") and not undisturbed.orphans()
        yield found, recipe


@dataclass(frozen=True)
class Shared:
    """What all points share: the undisturbed run, its recipe, a server for every second point, and the libraries."""

    undisturbed: Undisturbed
    recipe: Path
    api: str
    warm: WarmPython


@pytest.fixture
def shared(run: tuple[Undisturbed, Path], prefect_url: str, warm: WarmPython) -> Shared:
    return Shared(*run, prefect_url, warm)


@pytest.mark.parametrize("name, part", in_parts(OF_A_RUN, "run"))
def test_is_done_again_with_the_same_result(
    name: str, part: int, shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every second part uses a server that is there already, unless servers are killed too."""
    undisturbed, (victim, number), left = shared.undisturbed, OF_A_RUN[name], points(part)
    tally, striker = Tally(f"`lewis run`: {name}"), Striker(undisturbed, victim, number)
    home: Path | None = None
    while home or left:
        if not home:
            home = tmp_path / f"home{len(left)}"
            shutil.copytree(undisturbed.store, home)
            striker.done = 0
        server = {}
        if part % 2 and victim not in (ALL, SERVER):
            server = {"PREFECT_API_URL": shared.api, "PREFECT_HOME": str(home / "prefect")}
        run = Run(home, "run", shared.recipe, "--json", warm=shared.warm, **server)
        where, struck = "the run after it", False
        if left:
            point = left.pop(0)
            struck = bool(striker.strike(point, run.parts, run.process.pid))
            where = f"at {point:.3f} ({run.step()})"
            tally.points += struck
            tally.landed[run.step()] += struck
            if not struck:
                left.insert(0, 0.9 * point)  # it came too late, and is tried again a little earlier
            if not until(run.ended, 300):
                tally.note("orphans", True, f"{where}: it does not end")
                run.process.kill()
        report = run.report()
        remains = run.orphans()  # and with them the server, before its database is read
        tally.note("orphans", bool(remains), f"{where}: {remains}")
        tally.note("tracebacks", "Traceback (most" in run.told(), f"{where}: {run.told()[-3000:]}")
        tally.note("runs that failed again", not report and not struck, f"{where}: {run.told()[-2000:]}")
        if report:
            undisturbed.compare(tally, home, report["digest"], where)
            half = [*left_over(home, run.temporary), *(home / "outbox").glob("*")]
            tally.note("left over", bool(half), f"{where}: {half}")
        if report or not struck:
            shutil.rmtree(home)
            home = None
        tally.point(where, capsys)
    tally.end(capsys)
