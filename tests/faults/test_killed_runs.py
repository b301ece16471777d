"""Kills at points spread evenly over `lewis run`: the next run ends with the same model, once."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Family, full
from tests.faults.killing import ALL, OF_A_RUN, SERVER, Undisturbed, in_parts, points, strike
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
        found.watch(undisturbed.parts, undisturbed.ended)
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
    """Every second run uses a server that is there already, unless servers are killed too."""
    undisturbed, recipe = shared.undisturbed, shared.recipe
    victim, number = OF_A_RUN[name]
    tally = Tally(f"`lewis run`: {name}")
    for i, point in points(part):
        home = tmp_path / f"home{i}"
        shutil.copytree(undisturbed.store, home)
        server = {}
        if i % 2 and victim not in (ALL, SERVER):
            server = {"PREFECT_API_URL": shared.api, "PREFECT_HOME": str(home / "prefect")}
        killed = Run(home, "run", recipe, "--json", warm=shared.warm, **server)
        struck = bool(strike(undisturbed, victim, number, point, killed.parts, killed.process.pid))
        tally.points += struck
        tally.landed[killed.step()] += struck
        where = f"at {point:.3f} ({killed.step()})"
        if not until(killed.ended, 300):
            tally.note("orphans", True, f"{where}: it does not end")
            killed.process.kill()
        left = killed.orphans()
        tally.note("orphans", bool(left), f"{where}: {left}")

        again = Run(home, "run", recipe, "--json", warm=shared.warm, **server)
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
