"""`lewis merge` of a file with several recipes, and `lewis plan` of a stack of layers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lewis.merging.run import Merge
from lewis_flows.cli.main import main
from tests.conftest import Family


def write_recipes(folder: Path, family: Family) -> Path:
    file = folder / "recipes.yaml"
    file.write_text(
        f"""
name: mean
merge_method: linear
models: [{{model: {family.base}}}, {{model: {family.math}}}]
---
merge_method: passthrough
slices:
  - sources: [{{model: mean, layer_range: [0, 2]}}]
  - sources: [{{model: {family.code}, layer_range: [1, 2]}}]
"""
    )
    return file


@pytest.mark.usefixtures("home")
def test_each_recipe_is_merged_once(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_recipes(tmp_path, family), tmp_path / "out"
    assert main(["merge", str(file), "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [Path(each["folder"]).name for each in told] == ["mean", "final"]
    found, mean = (load_file(out / name / "model.safetensors") for name in ("final", "mean"))
    assert found["model.layers.1.mlp.up_proj.weight"].equal(mean["model.layers.1.mlp.up_proj.weight"])
    assert json.loads((out / "final" / "config.json").read_text())["num_hidden_layers"] == 3
    assert main(["merge", str(file), "-o", str(out)]) == 0
    assert capsys.readouterr().out.count("there already") == 2


@pytest.mark.usefixtures("home")
def test_what_takes_one_recipe_says_so(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_recipes(tmp_path, family), str(tmp_path / "out")
    assert main(["plan", str(file)]) == 2
    assert "holds 2 recipes" in capsys.readouterr().err
    assert main(["merge", str(file), "-o", out, "--set", "dtype=float32"]) == 2
    assert "--set dtype=float32: the file holds 2 recipes" in capsys.readouterr().err
    assert not Path(out).exists()


@pytest.mark.usefixtures("home")
def test_a_model_that_changes_while_it_is_merged_is_no_part_of_a_result(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder held a mixture, under the digest of the model as it was."""
    model, out, real = tmp_path / "math", tmp_path / "out", Merge.run
    shutil.copytree(family.math, model, copy_function=shutil.copyfile)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"merge_method: linear\nmodels: [{{model: {family.base}}}, {{model: {model}}}]\n")

    def change(self: Merge, *given: Any, **named: Any) -> Any:
        config = model / "config.json"
        config.write_text(config.read_text() + " ")
        return real(self, *given, **named)

    monkeypatch.setattr(Merge, "run", change)
    assert main(["merge", str(file), "-o", str(out)]) == 1
    assert "changed while running" in capsys.readouterr().err and not out.exists()


@pytest.mark.usefixtures("home")
def test_a_stack_is_planned_by_its_own_size(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stack.yaml"
    source = f"{{sources: [{{model: {family.base}, layer_range: [0, 2]}}]}}"
    file.write_text(f"merge_method: passthrough\nslices: [{source}, {source}]\n")
    assert main(["plan", str(file), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    layers = [name for name in load_file(family.base / "model.safetensors") if ".layers." in name]
    outside = len(load_file(family.base / "model.safetensors")) - len(layers)
    assert planned["tensors"] == 2 * len(layers) + outside
    assert main(["merge", str(file), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == pytest.approx(planned["disk"], rel=0.01)
