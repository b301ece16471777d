"""Which tasks guide a merge, by its recipe; nothing is run."""

from typing import Any

import pytest

from lewis_flows import stages
from tests.support.models import parse

SETS = {"words": {"texts": ["w1", "w2"], "samples": 2}}
FITTED = {"merge_method": "regmean_forward", "base_model": "b", "models": [{"model": "a"}, {"model": "c"}]}
DENSITY = {"calibrations": SETS, "density": {"budget": 0.5}}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"lewis": {"calibrations": SETS}}, ["calibrate"]),
        ({"lewis": {"calibrations": SETS}, "merge_method": "regmean"}, ["calibrate", "measure a", "measure c"]),
        ({"lewis": {"calibrations": SETS}, "anchor": {"merge_method": "ties"}}, ["calibrate"]),
        (
            {"lewis": DENSITY, "anchor": {"merge_method": "ties"}},
            ["calibrate", "measure b", "measure a", "measure c", "allocate", "report"],
        ),
    ],
)
def test_a_fit_measures_what_it_and_its_anchor_need(
    changes: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {id(stages.calibrate): "calibrate", id(stages.allocate): "allocate", id(stages.report_densities): "report"}
    done: list[str] = []

    def submit(task: Any, *_: Any, **__: Any) -> Any:
        done.append(task if isinstance(task, str) else names[id(task)])
        return done[-1]

    monkeypatch.setattr(stages, "submit", submit)
    monkeypatch.setattr(stages, "measuring", lambda model: f"measure {model}")
    monkeypatch.setattr(stages, "known", lambda futures: futures)
    monkeypatch.setattr(stages, "finish", lambda *futures: None)
    models = stages.Models("base", ["a", "c"], "inspected")  # type: ignore[arg-type, list-item]
    guide = stages.guide(parse(FITTED | changes), models)
    assert done == expected
    assert (guide.allocated is not None) == ("allocate" in expected)
