"""LoRA adapters as experts, against PEFT's own merge_and_unload; and adapters that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis.errors import InputError
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora.expert import LoraExpert, is_adapter
from tests.conftest import Family
from tests.support.models import bits, edit_json, materialise, write_llama, write_lora, write_tensors

WEIGHTS = "adapter_model.safetensors"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"up_proj": 32, "layers.0.self_attn.q_proj": 1}, "use_rslora": True},
    "all_linear": {"targets": "all-linear", "lora_alpha": 3},
    "whole_modules": {"modules_to_save": ["norm"]},
    "embedding": {"targets": ("embed_tokens", "q_proj")},
}


def open_on(base: Path, adapter: Path) -> LoraExpert:
    return LoraExpert(Checkpoint(base, "base"), adapter, "base+adapter")


def copy(adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_as_peft_merges(family: Family, tmp_path: Path, variant: str) -> None:
    adapter = write_lora(family.base, tmp_path / "adapter", **VARIANTS[variant])
    merged = load_file(materialise(family.base, adapter, tmp_path / "merged") / "model.safetensors")
    expert, touched, factored = open_on(family.base, adapter), 0, 0
    for name in expert.tensors:
        torch.testing.assert_close(expert.read(name), merged[name], rtol=1e-6, atol=1e-7)
        base = expert.base.read(name)
        touched += expert.touches(name)
        assert expert.touches(name) == (not torch.equal(merged[name], base))
        if (factor := expert.factor(name)) is not None and "embed" not in name:
            delta = expert.read(name) - base
            torch.testing.assert_close(factor.T @ factor, delta.T @ delta, rtol=1e-3, atol=1e-6)
            factored += 1
    assert touched > 0 and factored == sum("proj" in name for name in filter(expert.touches, expert.tensors))


def test_reads_gpt2s_transposed_weights(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapter = write_lora(tmp_path / "base", tmp_path / "adapter", targets=("c_attn",), fan_in_fan_out=True)
    merged = load_file(materialise(tmp_path / "base", adapter, tmp_path / "merged") / "model.safetensors")
    expert, name = open_on(tmp_path / "base", adapter), "transformer.h.0.attn.c_attn.weight"
    name = name if name in expert.tensors else name.removeprefix("transformer.")
    torch.testing.assert_close(expert.read(name), merged[name], rtol=1e-6, atol=1e-7)
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=False)  # PEFT goes by the class of the module
    torch.testing.assert_close(open_on(tmp_path / "base", adapter).read(name), merged[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "settings, left_out",
    [({"fan_in_fan_out": True}, 0), ({"layers_to_transform": [0]}, 4), ({"exclude_modules": ["up_proj"]}, 4)],
)
def test_what_the_settings_do_not_name_is_left_out_as_peft_does(
    family: Family, tmp_path: Path, settings: dict[str, Any], left_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = copy(family.lora, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **settings)
    merged = load_file(materialise(family.base, adapter, tmp_path / "merged") / "model.safetensors")
    expert = open_on(family.base, adapter)
    for name in expert.tensors:
        torch.testing.assert_close(expert.read(name), merged[name], rtol=1e-6, atol=1e-7)
    assert f"{left_out} of its tensors are of no module" in caplog.text or not left_out


def test_a_whole_module_is_read_exactly(family: Family, tmp_path: Path) -> None:
    adapter = write_lora(family.base, tmp_path / "adapter", modules_to_save=["norm"])
    tensors = load_file(adapter / WEIGHTS)
    key = next(key for key in tensors if key.endswith("model.norm.weight"))
    tensors[key] = torch.full_like(tensors[key], 1e-12)  # base + (whole - base) would round it to 0
    save_file(tensors, adapter / WEIGHTS)
    assert bits(open_on(family.base, adapter).read("model.norm.weight")) == bits(tensors[key])


def test_the_bytes_do_not_depend_on_torchs_threads(tmp_path: Path) -> None:
    base = write_tensors(tmp_path / "base", {"x.weight": torch.randn(7, 33)})
    adapter, before, found = tmp_path / "adapter", torch.get_num_threads(), set()
    adapter.mkdir()
    save_file({"x.lora_A.weight": torch.randn(64, 33), "x.lora_B.weight": torch.randn(7, 64)}, adapter / WEIGHTS)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    try:
        for threads in (1, 2, 3, 8):  # so small a product is split along what is summed
            torch.set_num_threads(threads)
            found.add(bits(open_on(base, adapter).read("x.weight")))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_what_it_leaves_alone_is_the_bases(family: Family) -> None:
    expert = open_on(family.base, family.lora)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert bits(expert.read(name)) == bits(expert.base.read(name))


def test_knows_an_adapter_from_a_model(family: Family) -> None:
    assert is_adapter(family.lora) and not is_adapter(family.base)


class TestRefused:
    @pytest.fixture
    def adapter(self, family: Family, tmp_path: Path) -> Path:
        return copy(family.lora, tmp_path / "adapter")

    @pytest.mark.parametrize(
        "settings, expected",
        [
            ({"use_dora": True}, "use_dora is True, but .* has no lora_magnitude_vector"),
            ({"peft_type": "IA3"}, "got 'IA3': this kind scales activations by learned vectors; merge it"),
            ({"peft_type": "VERA"}, "got 'VERA': this kind scales random projections"),
            ({"peft_type": "ADALORA"}, "got 'ADALORA': this kind weights singular directions"),
            ({"peft_type": "PREFIX_TUNING"}, "learns inputs to a model, .*: leave it out"),
            ({"peft_type": "XLORA"}, "chooses among adapters for each input"),
            ({"peft_type": "NEW"}, "got 'NEW': merge it into its base"),
            ({"alora_invocation_tokens": [1]}, "aLoRA.* cannot be merged; leave it out"),
            ({"kasa_config": {"x": 1}}, "KaSA, .* is not supported; merge it"),
            ({"kasa_config": {}}, "KaSA, .* is not supported; merge it"),
            ({"init_lora_weights": "pissa_niter_4"}, "changes its base"),
            ({"init_lora_weights": "OLoRA"}, "changes its base"),
            ({"layer_replication": [[0, 2]]}, "replicates layers"),
            ({"target_parameters": "x"}, "target_parameters: expected a list of names"),
            ({"trainable_token_indices": {"wte": [-1]}}, "trainable_token_indices: expected a list of token ids"),
        ],
    )
    def test_kinds_that_are_no_plain_lora(
        self, family: Family, adapter: Path, settings: dict[str, Any], expected: str
    ) -> None:
        edit_json(adapter / "adapter_config.json", **settings)
        with pytest.raises(InputError, match=expected):
            open_on(family.base, adapter)

    def rename(self, adapter: Path, old: str, new: str) -> None:
        tensors = load_file(adapter / WEIGHTS)
        save_file({key.replace(old, new): tensor for key, tensor in tensors.items()}, adapter / WEIGHTS)

    def test_keys_that_match_nothing(self, family: Family, adapter: Path) -> None:
        self.rename(adapter, "layers.1.self_attn", "layers.7.self_attn")
        with pytest.raises(
            InputError, match=r"layers\.7\.self_attn\.q_proj\.lora_A\.weight' matches nothing in the base"
        ):
            open_on(family.base, adapter)

    def test_half_a_pair(self, family: Family, adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        save_file({k: t for k, t in tensors.items() if "layers.0.mlp.up_proj.lora_B" not in k}, adapter / WEIGHTS)
        with pytest.raises(InputError, match=r"'model.layers.0.mlp.up_proj.weight' has lora_A only"):
            open_on(family.base, adapter)

    def test_other_shapes(self, family: Family, adapter: Path, tmp_path: Path) -> None:
        other = write_llama(tmp_path / "wide", hidden=32)
        with pytest.raises(InputError, match=r"lora_A \[4, 16\] and lora_B .*do not give the base's shape"):
            open_on(other, adapter)

    def test_a_whole_module_of_another_shape(self, family: Family, tmp_path: Path) -> None:
        adapter = write_lora(family.base, tmp_path / "adapter", modules_to_save=["norm"])
        tensors = load_file(adapter / WEIGHTS)
        save_file({k: torch.ones(3) if "norm" in k else t for k, t in tensors.items()}, adapter / WEIGHTS)
        with pytest.raises(InputError, match=r"norm.weight' has shape \[3\], in the base it is \[16\]"):
            open_on(family.base, adapter)

    def test_a_head_that_the_base_ties(self, family: Family, adapter: Path) -> None:
        self.rename(adapter, "model.layers.0.self_attn.q_proj", "lm_head")
        edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "up_proj", "lm_head"])
        with pytest.raises(InputError, match="changes the head, which the base ties to its embedding"):
            open_on(family.base, adapter)

    def test_a_truncated_file(self, family: Family, adapter: Path) -> None:
        (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:200])
        with pytest.raises(InputError, match="truncated, or no safetensors file"):
            open_on(family.base, adapter)

    def test_no_weights(self, family: Family, adapter: Path) -> None:
        (adapter / WEIGHTS).unlink()
        with pytest.raises(InputError, match=f"no {WEIGHTS}"):
            open_on(family.base, adapter)

    def test_a_broken_config(self, family: Family, adapter: Path) -> None:
        (adapter / "adapter_config.json").write_text("{")
        with pytest.raises(InputError, match="not readable as JSON"):
            open_on(family.base, adapter)

    @pytest.mark.parametrize(
        "settings, expected",
        [
            ({"r": 3}, r"r is 3 for 'model.layers.0.mlp.up_proj.weight', but its lora_A is \[4, 16\]"),
            ({"rank_pattern": {"q_proj": 2}}, r"r is 2 for 'model.layers.\d.self_attn.q_proj.weight'"),
            ({"r": 0}, "r: expected a whole number above 0, got 0"),
            ({"r": [4]}, r"r: expected a whole number above 0, got \[4\]"),
            ({"r": 10**400}, "r: expected a whole number above 0"),
            ({"rank_pattern": []}, None),
            ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no regular expression"),
            ({"lora_alpha": None}, "lora_alpha: expected a finite number, got None"),
            ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number"),
            ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number"),
            ({"alpha_pattern": {"x" * 1001: 4}}, "alpha_pattern: a pattern of 1001 characters"),
            ({"alpha_pattern": {r"(([a-z0-9._]+)+)+\d!": 4}}, None),  # takes Python's own `re` longer than anyone waits
        ],
    )
    def test_settings_that_contradict_the_tensors(
        self, family: Family, adapter: Path, settings: dict[str, Any], expected: str | None
    ) -> None:
        edit_json(adapter / "adapter_config.json", **settings)
        if expected is None:
            open_on(family.base, adapter)
        else:
            with pytest.raises(InputError, match=expected):
                open_on(family.base, adapter)

    @pytest.mark.parametrize(
        "settings, expected",
        [
            ({"target_modules": ["nothing"]}, r"target_modules \['nothing'\] name no module of the base"),
            ({"exclude_modules": "model.*"}, "or only excluded ones"),
            (
                {"target_modules": ["q_proj", "norm"]},
                "name 'model.norm', which is neither a linear module nor an embed",
            ),
            ({"target_modules": ["k_proj"]}, "names none of its tensors"),
            (
                {"target_modules": "q_proj", "layers_to_transform": 0},
                "target_modules is a pattern, and there are layers",
            ),
            ({"target_modules": 3}, "target_modules: expected names, or a pattern, got 3"),
            ({"modules_to_save": ["model.norm"]}, "no 'model.norm.weight', which modules_to_save in"),
            (
                {"modules_to_save": ["mlp", "down_proj"]},
                "names 'model.layers.0.mlp.down_proj' and 'model.layers.0.mlp', which it is in",
            ),
            (
                {"trainable_token_indices": [1]},
                "no 'embedding.trainable_tokens_delta', which trainable_token_indices in",
            ),
            ({"bias": "some"}, "bias: expected none, all or lora_only, got some"),
        ],
    )
    def test_settings_that_peft_refuses_or_that_name_no_tensor(
        self, family: Family, adapter: Path, settings: dict[str, Any], expected: str
    ) -> None:
        edit_json(adapter / "adapter_config.json", **settings)
        with pytest.raises(InputError, match=expected):
            open_on(family.base, adapter)

    def test_an_embedding_that_is_saved_whole_and_tied(self, family: Family, tmp_path: Path) -> None:
        adapter = write_lora(family.base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
        with pytest.raises(InputError, match=r"is tied to 'lm_head.weight' in the base, .* replaces only one of them"):
            open_on(family.base, adapter)

    @pytest.mark.parametrize("targets", [["q_proj", "up_proj", "lm_head"], "lm_head|.*(q|up)_proj"])
    def test_a_tied_head_that_peft_does_not_exclude(self, targets: Any, family: Family, adapter: Path) -> None:
        """With `ensure_weight_tying` PEFT puts factors on it and on the embedding, and they were left out."""
        config = adapter / "adapter_config.json"
        edit_json(config, target_modules=targets, exclude_modules=["lm_head"])
        open_on(family.base, adapter)
        edit_json(config, ensure_weight_tying=True)
        with pytest.raises(InputError, match=r"is tied to 'lm_head.weight' in the base, .* is added twice by PEFT"):
            open_on(family.base, adapter)
        edit_json(config, target_modules=["q_proj", "up_proj"])
        open_on(family.base, adapter)

    def test_no_tensors(self, family: Family, adapter: Path) -> None:
        save_file({}, adapter / WEIGHTS)
        with pytest.raises(InputError, match=f"{WEIGHTS}: holds no tensor"):
            open_on(family.base, adapter)

    @pytest.mark.parametrize("stated", [True, False])
    @pytest.mark.parametrize("a, b", [((0, 16), (16, 0)), ((), ()), ((4,), (16, 4)), ((4, 16, 1), (16, 4))])
    def test_tensors_of_rank_0_or_other_dimensions(
        self, family: Family, adapter: Path, a: tuple[int, ...], b: tuple[int, ...], stated: bool
    ) -> None:
        if not stated:
            (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        name = "model.layers.0.self_attn.q_proj"
        save_file({f"{name}.lora_A.weight": torch.ones(a), f"{name}.lora_B.weight": torch.ones(b)}, adapter / WEIGHTS)
        with pytest.raises(InputError, match=r"of rank 0|do not give the base's shape|r is 4 for"):
            open_on(family.base, adapter)

    def test_a_tensor_that_is_quantised(self, family: Family, adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        save_file({k: t.to(torch.float8_e4m3fn) for k, t in tensors.items()}, adapter / WEIGHTS)
        with pytest.raises(InputError, match="is stored as F8_E4M3; save the adapter in float32"):
            open_on(family.base, adapter)

    def test_two_adapters_in_one_file(self, family: Family, adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        again = {k.replace("lora_A.weight", "lora_A.other.weight"): t.clone() for k, t in tensors.items()}
        save_file(tensors | again, adapter / WEIGHTS)
        with pytest.raises(InputError, match="stand for the same tensor; keep one adapter"):
            open_on(family.base, adapter)
