"""`lewis inspect`: what it prints and draws, and its exit code."""

import json
from pathlib import Path

import pytest

from lewis.store.kinds import check_png
from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.support.models import rewrite


def test_sound_models_are_measured_and_drawn(recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = home.parent / "layers.png"
    assert main(["inspect", str(recipe), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("no findings: these models can be merged\n")
    assert "cosine with base" in out and "opposite signs" in out and "math and code" in out
    check_png(picture.read_bytes())
    assert main(["inspect", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(each["size_by_layer"]) for each in found["models"]] == [{"0", "1"}] * 2 and found["findings"] == []


def test_an_error_is_told_with_what_it_means_and_what_to_do(
    recipe: Path, home: Path, family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = rewrite(family.math, home.parent / "odd", lambda name, t: t * (0 if "layers.0.mlp.up" in name else 1))
    assert main(["inspect", str(recipe), "--set", f"models[0].model={odd}"]) == 2
    told = capsys.readouterr()
    assert (
        f"error: {odd}: zeroed tensor: all elements are 0 in model.layers.0.mlp.up_proj.weight\n  means: " in told.out
    )
    assert "\n  do: convert or download the model again" in told.out
    assert "lewis: 1 error: zeroed tensor; do not merge these models as they are" in told.err


@pytest.mark.parametrize("command", [["inspect", "{}"], ["history", "m"]])
def test_a_picture_that_cannot_be_written_is_told_by_its_option(
    command: list[str], recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was called -o, which these commands do not have."""
    assert main([*(each.format(recipe) for each in command), "--plot", str(home)]) == 2
    assert f"--plot {home}: expected the name of a file, got a folder" in capsys.readouterr().err
