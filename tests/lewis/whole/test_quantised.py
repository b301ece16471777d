"""Guided merges of quantised models, from the recipe to the files: the same as of the values that they stand for."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import bits, parse
from tests.support.quantised import write_quantised

pytestmark = pytest.mark.usefixtures("home")


def guided(method: str, base: Path, expert: Path) -> dict[str, bytes]:
    """The tensors of a guided merge, by the steps that a run takes."""
    sets = {"calibrations": {"s": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}}
    data = {"merge_method": method, "base_model": str(base), "models": [{"model": str(expert)}], "lewis": sets}
    recipe = parse({**data, "dtype": "bfloat16"})
    own, experts = pipeline.fetch(recipe)
    assert own is not None
    _, allocated = pipeline.guide(recipe, own, experts)
    merged = pipeline.merge(recipe, own, experts, allocated)
    written = json.loads((merged.folder / "config.json").read_text())
    assert "quantization_config" not in written and written["dtype"] == "bfloat16"
    return {name: bits(value) for name, value in load_file(merged.folder / "model.safetensors").items()}


@pytest.mark.parametrize(
    "method, of_base, of_expert", [("ties", "fp8 blocks", "gptq"), ("ties", "bnb nf4 double", "fp8 channels")]
)
def test_a_guided_merge_is_that_of_the_values(
    method: str, of_base: str, of_expert: str, family: Family, tmp_path: Path
) -> None:
    write_quantised(family.base, tmp_path / "base", of_base, plain=tmp_path / "plain-base")
    write_quantised(family.math, tmp_path / "math", of_expert, plain=tmp_path / "plain-math")
    quantised = guided(method, tmp_path / "base", tmp_path / "math")
    assert quantised == guided(method, tmp_path / "plain-base", tmp_path / "plain-math")
