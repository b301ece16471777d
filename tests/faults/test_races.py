"""Eight runs at once on one store: each is computed once, all give the same model, and it is registered once."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import POINTS, Family, full
from tests.faults.running import Run, Tally, half_done, merged, write_recipe
from tests.flows.test_run import by_the_library
from tests.support.orphans import adopted

pytestmark = full

RACERS = min(8, 2 * POINTS)
COUNTS = """
import sys, lewis.merging.run as m, lewis.importance.measure as i
run, measure = m.Merge.run, i.measure_sets
m.Merge.run = lambda *a, **k: (print('MERGED', file=sys.stderr, flush=True), run(*a, **k))[1]
i.measure_sets = lambda *a, **k: (print('MEASURED', file=sys.stderr, flush=True), measure(*a, **k))[1]
"""


@pytest.mark.parametrize("servers", ["one server", "a server each"])
@pytest.mark.parametrize("experts", [("code",), ("code", "lora")], ids=["one recipe", "two recipes"])
def test_eight_runs_at_once_compute_and_register_once(
    experts: tuple[str, ...],
    servers: str,
    family: Family,
    empty_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Two recipes share the base and the expert `math`, which are measured once, too."""
    home = tmp_path / "home"
    shutil.copytree(empty_store, home)
    recipes = [write_recipe(tmp_path, family, expert=each, name=f"tiny-{each}") for each in experts]
    one = {"PREFECT_API_URL": request.getfixturevalue("prefect_url")} if servers == "one server" else {}
    tally = Tally(f"{RACERS} runs at once of {len(recipes)} recipe(s), {servers}", RACERS)
    with adopted():
        runs = [Run(home, "run", recipes[i % len(recipes)], "--json", patch=COUNTS, **one) for i in range(RACERS)]
        reports = [each.report() for each in runs]
        left = [words for each in runs for words in each.orphans()]
    told = [each.told() for each in runs]
    tally.note("orphans", bool(left), str(left))
    for report, text in zip(reports, told, strict=True):
        tally.note("runs that failed again", not report, text[-2000:])
        tally.note("tracebacks", "Traceback (most" in text, text[-3000:])
    for i, (recipe, expert) in enumerate(zip(recipes, experts, strict=True)):
        wrong = half_done(home, f"tiny-{expert}")
        tally.note("half versions", bool(wrong), wrong)
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "alone"))
        digest, weights = by_the_library(recipe, tmp_path / f"merged-{expert}")
        for report in reports[i :: len(recipes)]:
            tally.note("wrong models", bool(report) and report["digest"] != digest, str(report))
        found = home / "merged" / digest / "model.safetensors"
        tally.note("wrong models", not merged(home, digest) or found.read_bytes() != weights, f"bytes of {expert}")
    tally.end(capsys)
    computed = sum(text.count("MERGED\n") for text in told), sum(text.count("MEASURED\n") for text in told)
    assert computed == (2 * len(recipes), 2 + len(recipes))  # each recipe is merged with even densities, too
