"""Whether a model's tensors are those of its config's network: experts, heads and norms, under all their names."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lewis.errors import InputError, LewisError
from lewis.models.config import read_config
from lewis.models.names import Shapes
from lewis.models.network.check import check_network
from tests.support.models import edit_json
from tests.support.tiny_architectures import tiny


def written(kind: str, folder: Path) -> tuple[Shapes, Shapes]:
    """A tiny model's shapes under the names that its file has, and under those of its network."""
    model = tiny(kind)
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return stored, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mixtral", {"num_local_experts": 8}, "'model.layers.0.mlp.(gate.weight|experts.gate_up_proj)' has shape"),
        ("mixtral", {"num_local_experts": 2}, "'model.layers.0.mlp.(gate.weight|experts.gate_up_proj)' has shape"),
        ("mixtral", {"intermediate_size": 56}, "'model.layers.0.mlp.experts.gate_up_proj' has shape"),
        (
            "llama",
            {"model_type": "qwen3"},
            "q_norm.weight' is in the network of this config",
        ),
    ],
)
def test_what_the_network_has_otherwise(kind: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    forms = written(kind, tmp_path)
    for shapes in forms:
        check_network(tmp_path, read_config(tmp_path), shapes, needed=True)
    edit_json(tmp_path / "config.json", **change)
    for shapes in forms:
        for needed in (True, False):
            with pytest.raises(InputError, match=re.escape(f"{tmp_path}: config.json: ") + f".*{message}"):
                check_network(tmp_path, read_config(tmp_path), shapes, needed=needed)


def test_a_head_that_is_not_stored(tmp_path: Path) -> None:
    """It may be missing where nothing runs it and the class that the config names has none."""
    stored, _ = written("llama", tmp_path)
    shapes = {name: shape for name, shape in stored.items() if name != "lm_head.weight"}
    path = tmp_path / "config.json"
    edit_json(path, tie_word_embeddings=True)
    check_network(tmp_path, read_config(tmp_path), shapes, needed=True)
    edit_json(path, tie_word_embeddings=False)
    for classes, needed in ((["LlamaForCausalLM"], False), (["LlamaModel"], True), (None, True)):
        edit_json(path, architectures=classes)
        with pytest.raises(InputError, match=r"config.json: tie_word_embeddings: 'lm_head.weight' is a weight of its"):
            check_network(tmp_path, read_config(tmp_path), shapes, needed=needed)
    edit_json(path, architectures=["LlamaForSequenceClassification"])
    check_network(tmp_path, read_config(tmp_path), {**shapes, "score.weight": (2, 32)}, needed=False)


def test_a_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    stored, _ = written("llama", tmp_path)
    edit_json(tmp_path / "config.json", model_type="unheard")
    check_network(tmp_path, read_config(tmp_path), stored, needed=False)
    with pytest.raises(LewisError, match=r"model_type: expected one that transformers .* knows, got 'unheard'"):
        check_network(tmp_path, read_config(tmp_path), stored, needed=True)
