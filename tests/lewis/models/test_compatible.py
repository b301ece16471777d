"""One rule of compatibility: headers before the download and opened models after it are told the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lewis.errors import InputError
from lewis.models.checkpoint import Checkpoint
from lewis.models.compatible import check_compatible
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import parse, rewrite

NORM = "model.layers.1.input_layernorm.weight"


def without(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if name == NORM else tensor


def reshaped(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor[:8] if name == NORM else tensor


@pytest.mark.parametrize(
    "change, problem", [(without, "1 tensors of the base are missing"), (reshaped, "has shape [8]")]
)
def test_headers_and_models_are_told_the_same(
    family: Family, tmp_path: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], problem: str
) -> None:
    odd = rewrite(family.math, tmp_path / "odd", change)
    recipe = parse({"merge_method": "linear", "models": [{"model": str(family.base)}, {"model": str(odd)}]})
    with pytest.raises(InputError) as before:
        pipeline.preflight(recipe, *pipeline.pin_all(recipe))
    with pytest.raises(InputError) as after:
        check_compatible(Checkpoint(family.base, "base"), [Checkpoint(odd, "odd")])
    assert problem in str(before.value)
    assert str(before.value).splitlines()[0] == str(after.value).splitlines()[0]
