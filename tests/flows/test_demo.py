"""The demo as a newcomer runs it: installed, trained, merged, scored, registered, and the second time found."""

import json
import re
from pathlib import Path

import pytest

from lewis.demo.family import SKILLS
from tests.flows.conftest import Command
from tests.flows.test_run import finished, states


@pytest.mark.timeout(900)
def test_the_merge_keeps_each_experts_skill_and_the_second_demo_is_cached(
    lewis: Command, installed: Path, tmp_path: Path
) -> None:
    """From the wheel, in an empty folder; what follows forks from a Python that has the libraries."""
    folder = tmp_path / "empty"
    folder.mkdir()
    wheel = installed / "bin" / "lewis"
    code, out, err = finished(lewis("demo", "--json", program=wheel, folder=folder, PYTHONPATH=""), timeout=800)
    assert code == 0, err
    first = json.loads(out)
    rows = {row["model"]: row for row in first["scores"]}
    assert list(rows) == ["base", *SKILLS, "merged"]
    for skill in SKILLS:
        score = {name: float(row[f"{skill}/exact_match,none ↑"].split()[0]) for name, row in rows.items()}
        assert score["base"] < 0.5 and score[skill] >= 0.9
        assert score["merged"] >= 0.97 * score[skill]
        assert all(score[other] < 0.8 * score[skill] for other in SKILLS if other != skill)
    assert [row["expert"] for row in first["kept"]] == list(SKILLS)
    assert all(row["task"] == f"{row['expert']}/exact_match,none ↑" for row in first["kept"])
    assert first["version"] == "models:/lewis-demo/1" and first["promoted"]

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
