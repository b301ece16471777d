"""LoRA adapters as experts, against PEFT's own merge_and_unload; and adapters that are refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis.errors import InputError
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora.expert import LoraExpert, is_adapter
from tests.conftest import Family
from tests.support.models import bits, edit_json, materialise, write_lora, write_tensors

pytestmark = pytest.mark.usefixtures("asked_here")
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
    factors = {"A": torch.randn(64, 33), "B": torch.randn(7, 64)}
    save_file({f"base_model.model.x.lora_{part}.weight": each for part, each in factors.items()}, adapter / WEIGHTS)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64, "target_modules": ["x"]}')
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


def test_a_known_adapter_is_opened_without_torch_and_peft(family: Family, home: Path) -> None:
    open_on(family.base, family.lora)
    program = (
        "import sys\nfrom pathlib import Path\nfrom lewis.models.checkpoint import Checkpoint\n"
        "from lewis.models.lora.expert import LoraExpert\nbase, adapter = map(Path, sys.argv[1:])\n"
        "opened = LoraExpert(Checkpoint(base, 'base'), adapter, 'key')\n"
        "print(sum(map(opened.touches, opened.tensors)), {'torch', 'peft', 'transformers'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program, str(family.base), str(family.lora)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "4 set()"


def test_knows_an_adapter_from_a_model(family: Family) -> None:
    assert is_adapter(family.lora) and not is_adapter(family.base)


class TestRefused:
    @pytest.fixture
    def adapter(self, family: Family, tmp_path: Path) -> Path:
        return copy(family.lora, tmp_path / "adapter")

    @pytest.mark.parametrize(
        "settings, expected",
        [
            ({"r": 3}, r"adapter_config.json: r: peft \d.* says \".*size mismatch for .*; accepted with 4"),
            ({"lora_alpha": None}, "lora_alpha: peft .* says .*'NoneType'.*; accepted without it"),
            ({"target_modules": ["nothing"]}, "target_modules: peft .* says \"Target modules {'nothing'} not found"),
            ({"target_modules": ["k_proj"]}, "target_modules: its config names none of its tensors"),
            ({"modules_to_save": ["model.norm"]}, "modules_to_save: peft .* says .*model.norm.weight"),
            ({"use_dora": True}, "use_dora: its file has no magnitude vector for model.layers.0.self_attn.q_proj"),
            ({"peft_type": "IA3"}, r"it puts Linear \(IA3\) on .* no arithmetic for; merge it into its base"),
            ({"peft_type": "PREFIX_TUNING"}, "learns inputs to a model, not weights: leave it out"),
            ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: it puts ALoraLinearVariant"),
            ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: PEFT changes the base itself"),
            ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: PEFT makes 30 tensors of the base's 21"),
            ({"trainable_token_indices": [64]}, "trainable_token_indices: peft .* says"),
            ({"lora_alpha": float("inf")}, "lora_alpha: the scale of .* is inf"),
        ],
    )
    def test_the_key_is_named_and_what_peft_says(
        self, family: Family, adapter: Path, settings: dict[str, Any], expected: str
    ) -> None:
        edit_json(adapter / "adapter_config.json", **settings)
        with pytest.raises(InputError, match=expected):
            open_on(family.base, adapter)

    def rename(self, adapter: Path, old: str, new: str) -> None:
        tensors = load_file(adapter / WEIGHTS)
        save_file({key.replace(old, new): tensor for key, tensor in tensors.items()}, adapter / WEIGHTS)

    def test_an_adapter_of_a_deeper_model(
        self, family: Family, adapter: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.rename(adapter, "layers.1.self_attn", "layers.7.self_attn")
        open_on(family.base, adapter)
        assert "2 of its tensors are of no module" in caplog.text and "layers.7.self_attn" in caplog.text
        assert "has nothing for 1 modules" in caplog.text and "layers.1.self_attn.q_proj" in caplog.text

    def test_half_a_pair(self, family: Family, adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        save_file({k: t for k, t in tensors.items() if "layers.0.mlp.up_proj.lora_B" not in k}, adapter / WEIGHTS)
        with pytest.raises(InputError, match=r"its file has no lora_B for model.layers.0.mlp.up_proj"):
            open_on(family.base, adapter)

    def test_a_head_that_the_base_ties(self, family: Family, adapter: Path) -> None:
        adapter = write_lora(family.base, adapter.with_name("head"), targets=("q_proj", "lm_head"))
        with pytest.raises(InputError, match=r"changes the head 'lm_head.weight', which the base ties"):
            open_on(family.base, adapter)

    def test_an_embedding_that_is_saved_whole_and_tied(self, family: Family, tmp_path: Path) -> None:
        adapter = write_lora(family.base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
        with pytest.raises(
            InputError, match=r"and 'lm_head.weight' are tied in the base, .* replaces only one of them"
        ):
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

    def test_no_tensors(self, family: Family, adapter: Path) -> None:
        save_file({}, adapter / WEIGHTS)
        with pytest.raises(InputError, match=f"{WEIGHTS}: holds no tensor"):
            open_on(family.base, adapter)

    def test_a_tensor_that_is_quantised(self, family: Family, adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        save_file({k: t.to(torch.float8_e4m3fn) for k, t in tensors.items()}, adapter / WEIGHTS)
        with pytest.raises(InputError, match="is stored as F8_E4M3; save the adapter in float32"):
            open_on(family.base, adapter)
