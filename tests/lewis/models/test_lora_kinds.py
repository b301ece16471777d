"""Adapters that are more than a pair of factors for each module: read as PEFT's own merge_and_unload makes them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lewis.errors import InputError
from lewis.evaluation.harness.model_folder import loadable
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora.expert import LoraExpert, holds_adapter, is_adapter
from lewis.models.model import Model
from lewis.models.source import ModelFiles, pin
from tests.conftest import Family
from tests.support.models import edit_json, materialise, write_lora, write_tensors, write_tokenizer

pytestmark = pytest.mark.usefixtures("asked_here")
WEIGHTS = "adapter_model.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora_of_an_embedding": {"use_dora": True, "targets": ("embed_tokens", "down_proj")},
    "every_bias": {"bias": "all"},
    "biases_of_the_modules": {"bias": "lora_only"},
    "bias_of_lora_b": {"lora_bias": True},
    "trained_tokens": {"trainable_token_indices": [3, 1, 60]},
    "trained_tokens_by_module": {"trainable_token_indices": {"embed_tokens": [5]}, "use_dora": True},
    "whole_embedding": {"modules_to_save": ["embed_tokens"]},
    "target_parameters": {"targets": (), "target_parameters": ["mlp.down_proj.weight", "self_attn.q_proj.weight"]},
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def mixtral(folder: Path) -> tuple[Path, Path]:
    """A model with experts as transformers saves it, each a tensor; and with the network's own tensors."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=4, num_local_experts=3)
    )
    model.save_pretrained(folder / "apart")
    write_tokenizer(folder / "apart")
    write_tensors(folder / "joined", {n: t.detach().clone() for n, t in model.state_dict().items()})
    (folder / "joined" / "config.json").write_bytes((folder / "apart" / "config.json").read_bytes())
    return folder / "apart", folder / "joined"


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(materialise(base, adapter, folder) / "model.safetensors")


def check(expert: Model, merged: dict[str, torch.Tensor]) -> int:
    """Compare every tensor; returns how many differ from the base's."""
    changed = 0
    for name in expert.tensors:
        torch.testing.assert_close(expert.read(name).float(), merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(expert.read(name), expert.base.read(name))  # type: ignore[attr-defined]
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_reads_as_peft_merges(biased: Path, tmp_path: Path, kind: str) -> None:
    adapter = write_lora(biased, tmp_path / "adapter", **KINDS[kind])
    expert = LoraExpert(Checkpoint(biased, "base"), adapter, "base+adapter")
    assert check(expert, merged_by_peft(biased, adapter, tmp_path / "merged")) >= 2
    assert all(expert.computes(name) for name in expert.tensors if expert.raw(name)[0] != "F32")


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["apart", "joined"])
def test_experts_of_a_mixture(tmp_path: Path, stored: str) -> None:
    """Of an adapter on stacked experts, each expert has its own factors, however the base stores it."""
    apart, joined = mixtral(tmp_path)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = write_lora(apart, tmp_path / "adapter", targets=["q_proj"], target_parameters=parameters)
    base = {"apart": apart, "joined": joined}[stored]
    expert = LoraExpert(Checkpoint(base, "base"), adapter, "both")
    merged = merged_by_peft(apart, adapter, tmp_path / "merged")
    if stored == "joined":
        merged = native(tmp_path / "merged")
    assert check(expert, merged) == {"apart": 10, "joined": 3}[stored]
    assert ("are read under the base's names" in expert.summary) == (stored == "apart")


def native(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return {name: t.detach() for name, t in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}


def test_an_adapter_with_the_names_of_an_older_version(tmp_path: Path) -> None:
    """Its factors are of single experts; the base has all of them in one tensor."""
    apart, joined = mixtral(tmp_path)
    adapter, tensors = tmp_path / "adapter", {}
    for name, tensor in load_file(apart / "model.safetensors").items():
        if ".experts." in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{key}.lora_A.weight": torch.randn(2, tensor.shape[1])}
            tensors |= {f"{key}.lora_B.weight": torch.randn(tensor.shape[0], 2)}
    write_tensors(adapter, tensors).joinpath("model.safetensors").rename(adapter / WEIGHTS)
    (adapter / "config.json").unlink()
    (adapter / "adapter_config.json").write_text("{}")
    edit_json(adapter / "adapter_config.json", peft_type="LORA", r=2, lora_alpha=3, target_modules=["w1", "w2", "w3"])
    expected = merged_by_peft(apart, adapter, tmp_path / "merged")
    assert check(LoraExpert(Checkpoint(apart, "base"), adapter, "both"), expected) == 9
    assert check(LoraExpert(Checkpoint(joined, "base"), adapter, "both"), native(tmp_path / "merged")) == 2


def test_several_adapters_in_order(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "store"))
    one = write_lora(family.base, tmp_path / "one", modules_to_save=["norm"])
    two = write_lora(family.base, tmp_path / "two", seed=1, targets=["q_proj", "v_proj"], use_dora=True)
    first = materialise(family.base, one, tmp_path / "first")
    source = pin(f"{family.base}+{one}+{two}", tmp_path)
    files = ModelFiles.at(source.ref, source.key, family.base, two, [one])
    opened = files.open()
    assert opened.key == source.key == files.read_as and source.key.count("+") == 2
    merged = merged_by_peft(first, two, tmp_path / "second")
    assert check(opened, merged) == 4
    with loadable(files) as (folder, adapter):  # what lm-eval scores
        assert adapter is None and (folder / "tokenizer.json").is_file()
        for name, tensor in load_file(folder / "model.safetensors").items():
            torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    assert not folder.exists()
    with loadable(ModelFiles.at("x", "key", family.base, one)) as found:
        assert found == (family.base, one)


def test_an_adapter_beside_a_config(family: Family, tmp_path: Path) -> None:
    adapter = write_lora(family.base, tmp_path / "adapter")
    (adapter / "config.json").write_bytes((family.base / "config.json").read_bytes())
    base = pin(str(family.base), tmp_path)
    assert is_adapter(adapter) and pin(str(adapter), tmp_path, base).adapter is not None
    names = [path.name for path in adapter.iterdir()]
    assert not holds_adapter([*names, "model.safetensors"])  # a full model whose adapter was left next to it
    assert not is_adapter(family.base)


class TestRefused:
    @pytest.mark.parametrize(
        ("trained", "stated", "refused"),
        [
            ({"lora_bias": True}, {}, "lora_bias: peft .* says .*the base layer has no bias"),
            (
                {"trainable_token_indices": [3, 4]},
                {"trainable_token_indices": [3, 64]},
                r"it trains the rows \[3, 64\] of 'model.embed_tokens.weight', which has 64; expected",
            ),
            (
                {"trainable_token_indices": [3, 4]},
                {"target_modules": ["q_proj", "embed_tokens"]},
                "trainable_token_indices: peft .* says",
            ),
            (
                {"targets": (), "target_parameters": ["mlp.down_proj.weight"], "modules_to_save": ["0.mlp"]},
                {},
                "modules_to_save: peft .* says",  # PEFT saves such an adapter, and cannot load it
            ),
        ],
        ids=["a bias that the base lacks", "tokens that it lacks", "rows and factors", "saved"],
    )
    def test_what_peft_cannot_load_or_merge(
        self, trained: Any, stated: Any, refused: str, family: Family, tmp_path: Path
    ) -> None:
        adapter = write_lora(family.base, tmp_path / "adapter", **trained)
        edit_json(adapter / "adapter_config.json", **stated)
        with pytest.raises(InputError, match=refused):
            LoraExpert(Checkpoint(family.base, "base"), adapter, "key")


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["embed_tokens"]])
def test_a_base_that_transformers_does_not_know(family: Family, tmp_path: Path, targets: list[str]) -> None:
    """PEFT puts the adapter on modules with the names and shapes of the base's tensors."""
    adapter = write_lora(family.base, tmp_path / "adapter", targets=targets, use_dora=True)
    merged = merged_by_peft(family.base, adapter, tmp_path / "merged")
    base = tmp_path / "base"
    shutil.copytree(family.base, base)
    edit_json(base / "config.json", model_type="of tomorrow")
    assert check(LoraExpert(Checkpoint(base, "base"), adapter, "key"), merged) == {2: 4, 1: 1}[len(targets)]
