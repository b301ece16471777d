"""The demo as a newcomer runs it: installed, trained, merged, scored, registered, and the second time found."""

import json
import re
from pathlib import Path

import pytest

from lewis.demo.family import SKILLS
from tests.flows.conftest import Command
from tests.flows.test_run import finished, states

SHORT = """
from lewis.demo.family import TrainingPlan
TrainingPlan.__init__.__defaults__ = (30, 5, *TrainingPlan.__init__.__defaults__[2:])
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("training", ["short", pytest.param("whole", marks=pytest.mark.long)])
def test_the_merge_keeps_each_experts_skill_and_the_second_demo_is_cached(
    training: str, lewis: Command, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In an empty folder; the whole from the wheel, and the short one from a Python that has the libraries.

    The whole training takes two minutes of a core; after a short one, there is no skill to keep, and no second demo.
    """
    folder, short = tmp_path / "empty", training == "short"
    folder.mkdir()
    if short:
        demo = lewis("demo", "--json", patch=SHORT, folder=folder)
    else:
        wheel = request.getfixturevalue("installed") / "bin" / "lewis"
        demo = lewis("demo", "--json", program=wheel, folder=folder, PYTHONPATH="")
    code, out, err = finished(demo, timeout=800)
    assert code == 0, err
    first = json.loads(out)
    rows = {row["model"]: row for row in first["scores"]}
    assert list(rows) == ["base", *SKILLS, "merged"]
    for skill in () if short else SKILLS:
        score = {name: float(row[f"{skill}/exact_match,none ↑"].split()[0]) for name, row in rows.items()}
        assert score["base"] < 0.5 and score[skill] >= 0.9
        assert score["merged"] >= 0.97 * score[skill]
        assert all(score[other] < 0.8 * score[skill] for other in SKILLS if other != skill)
    assert [row["expert"] for row in first["kept"]] == ([] if short else list(SKILLS))
    assert all(row["task"] == f"{row['expert']}/exact_match,none ↑" for row in first["kept"])
    assert first["version"] == "models:/lewis-demo/1" and first["promoted"]
    if short:
        return
    code, out, err = finished(lewis("demo", folder=folder))
    assert code == 0, err
    done = {name: state for name, state in states(err).items() if name.split()[0] in ("measure", "merge", "evaluate")}
    assert len(done) == 1 + 5 * len(SKILLS) and set(done.values()) == {"Cached"}
    assert "MLflow: models:/lewis-demo/1 (registered before)" in out
    [command] = re.findall(r"^  lewis (pull .*?)   ", out, re.MULTILINE)
    code, _, err = finished(lewis(*command.split(), folder=folder))
    assert code == 0, err
    merged = json.loads((folder / "merged" / "lewis.json").read_text())
    assert merged["digest"] == first["digest"]
