"""What is told of a model that is not all covered, and what covers one that no class is known of."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lewis.errors import InputError
from lewis.importance import streaming
from lewis.importance.calibration import Calibration
from lewis.importance.coverage import as_text, covered_tensors
from lewis.importance.step import layers_of
from lewis.merging.fitting.losses import row_losses
from lewis.models.checkpoint import Checkpoint
from lewis.models.source import ModelFiles
from tests.support.measuring import measure
from tests.support.models import write_tensors
from tests.support.tiny_architectures import tiny

TEXT = Calibration("text", ((3, 4, 5), (6, 7)))


def test_a_vision_tower_is_told_as_one(tmp_path: Path) -> None:
    tiny("llava").save_pretrained(tmp_path)
    covered, left = covered_tensors(tmp_path, Checkpoint(tmp_path, "key").shapes, measured=True)
    assert {each.tensor.split(".")[0] for each in covered} == {"language_model"}
    assert any(name.startswith("vision_tower") for name in left) and sum(left.values()) > 0.3
    assert "% of the parameters" in as_text(left)


def test_what_is_not_covered_is_told_of_fits_and_of_densities(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fit, which has no densities, was told to follow a policy for them."""
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    layers_of(ModelFiles.at("gpt2", "key", tmp_path / "gpt2"))
    assert "not covered, so a fit leaves them as its anchor has them, and densities follow" in caplog.text
    assert "transformer.wpe.weight" in caplog.text


def test_a_weight_that_is_used_in_another_way_is_not_said_to_get_no_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny("falcon_mamba").save_pretrained(tmp_path)
    measured = measure(Checkpoint(tmp_path, "key"), TEXT)
    assert measured.norms["backbone.layers.0.mixer.dt_proj.weight"] is None
    assert "are not run as modules" in caplog.text and "no token" not in caplog.text


@pytest.mark.parametrize("kind", ["pix2struct", "pp_formulanet"])  # the second's encoder has no words
def test_a_model_that_wants_more_than_text_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path)
    model = Checkpoint(tmp_path, "key")
    with pytest.raises(
        InputError, match=r"does not run on text alone \(\w+: .*\); use a merge_method that does not fit"
    ):
        measure(model, TEXT)
    assert covered_tensors(tmp_path, model.shapes, measured=False)[0]


def test_a_fit_that_is_judged_refuses_it_too(tmp_path: Path) -> None:
    tiny("voxtral_realtime").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"does not run on text alone \(ValueError: .*set lewis.hold_back to false"):
        row_losses(Checkpoint(tmp_path, "key"), [TEXT])


class TestByName:
    def test_needs_no_class_where_no_model_is_run(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tensors = {"layers.0.a.weight": torch.ones(2, 3), "layers.1.a.weight": torch.ones(2, 3)}
        others = {"layers.0.norm.weight": torch.ones(3), "embed.weight": torch.ones(4, 3)}
        write_tensors(tmp_path, tensors | others, model_type="own", auto_map={"AutoConfig": "own.Own"})
        shapes = Checkpoint(tmp_path, "key").shapes
        covered, left = covered_tensors(tmp_path, shapes, measured=False)
        layers = [layer for each in covered for layer in each.layers]
        assert [(layer.tensor, layer.index, layer.projection) for layer in layers] == [
            ("layers.0.a.weight", 0, "a"),
            ("layers.1.a.weight", 1, "a"),
        ]
        assert not left and "no pass is needed: the 2 matrices" in caplog.text
        with pytest.raises(InputError, match="needs code that comes with it"):
            covered_tensors(tmp_path, shapes, measured=True)


def test_a_module_that_python_names_by_all_its_layers_is_named_by_its_class() -> None:
    def fails(**_: object) -> None:
        raise TypeError("Decoder(\n  (a): Linear()\n) got multiple values for argument 'ids'")

    network: Any = SimpleNamespace(
        folder="base", module=SimpleNamespace(), encodes=False, looks_ahead=False, tower=fails
    )
    words = r"base: SimpleNamespace does not run .* \(TypeError: Decoder got multiple values for argument 'ids'\); use"
    with pytest.raises(InputError, match=words):
        streaming.forward(network, torch.zeros(1, 1, dtype=torch.int64), [1])
