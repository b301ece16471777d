"""Quantised checkpoints are read as the values that they stand for, in every format; what cannot be read is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis.errors import InputError
from lewis.evaluation.harness.model_folder import loadable
from lewis.models.checkpoint import Checkpoint
from lewis.models.dtypes import EIGHT_BIT_FLOATS, torch_dtype
from lewis.models.files.safetensors_file import file_headers
from lewis.models.lora.expert import LoraExpert
from lewis.models.quantised.decode import decode_scaled
from lewis.models.quantised.find import dequantised
from lewis.models.quantised.stored import Stored
from lewis.models.source import ModelFiles
from lewis.store import housekeeping
from tests.conftest import Family
from tests.support.models import bits, edit_json, open_merge, write_lora, write_tensors
from tests.support.quantised import E2M1, FORMATS, gptq, nibbles, packed, write_quantised

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_reads_as_its_values(name: str, family: Family, tmp_path: Path) -> None:
    values = write_quantised(family.math, tmp_path / "q", name)
    opened, plain = Checkpoint(tmp_path / "q", "key"), Checkpoint(family.math, "key")
    assert opened.shapes == plain.shapes
    assert "quantization_config" not in opened.config
    for tensor in plain.tensors:
        assert bits(opened.read(tensor)) == bits(values[tensor].float()), tensor
    assert opened.tensors[UP].dtype == ("F16" if name.startswith(("bnb nf4", "bnb fp4")) else "F32")
    assert opened.computes(UP) and not opened.computes("model.norm.weight")


@pytest.mark.parametrize("name", ["fp8 blocks", "int4 packed", "gptq", "awq", "bnb nf4 double"])
def test_headers_alone_tell_names_and_shapes(name: str, family: Family, tmp_path: Path) -> None:
    write_quantised(family.math, tmp_path / "q", name)
    headers = file_headers(tmp_path / "q/model.safetensors")
    (tmp_path / "q/model.safetensors").unlink()
    found = dequantised("org/model", tmp_path / "q", headers, None)
    assert {key: shape for key, (_, shape) in found.items()} == {
        key: shape for key, (_, shape) in file_headers(family.math / "model.safetensors").items()
    }


@pytest.mark.parametrize("name", EIGHT_BIT_FLOATS)
def test_every_float_of_8_bits_is_as_torch_reads_it(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours = torch.from_numpy(Stored(name, (256,), codes.numpy()).floats())
    assert torch.equal(ours.nan_to_num(5e8), codes.view(torch_dtype(name)).float().nan_to_num(5e8))


@pytest.mark.parametrize("name", ["fp8 blocks", "fp8 tensor"])
def test_fp8_equals_what_transformers_loads(name: str, family: Family, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_quantised(family.math, tmp_path / "q", name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).state_dict()
    opened = Checkpoint(tmp_path / "q", "key")
    for tensor in opened.tensors:
        assert torch.equal(opened.read(tensor), theirs[tensor]), tensor


def test_mxfp4_equals_what_transformers_computes(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 2), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2, 6)}
    opened = Checkpoint(write_tensors(tmp_path, stored, quantization_config={"quant_method": "mxfp4"}), "key")
    assert opened.shapes == {name: (2, 64, 6), f"{name}_bias": (2, 6)}
    assert torch.equal(opened.read(name), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def test_fbgemm_fp8_equals_what_transformers_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is transformers' own; the kernel that rounds, which needs a GPU, is a stand-in."""
    from transformers import Llama4TextConfig
    from transformers.integrations import fbgemm_fp8

    def by_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = rows.abs().amax(dim=1) / 448
        return (rows / scales[:, None]).to(torch.float8_e4m3fn), scales

    monkeypatch.setattr(fbgemm_fp8, "quantize_fp8_per_row", by_rows, raising=False)
    config = Llama4TextConfig(hidden_size=8, intermediate_size=16, num_local_experts=2)
    model = torch.nn.ModuleDict(
        {"q_proj": torch.nn.Linear(16, 8), "experts": fbgemm_fp8.FbgemmFp8Llama4TextExperts(config)}
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"q_proj.weight": (8, 16), "experts.gate_up_proj": (2, 8, 32), "experts.down_proj": (2, 16, 8)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    make = fbgemm_fp8.FbgemmFp8Quantize(None)
    stored = {
        k: v.detach().contiguous() for name in weights for k, v in make.convert({name: [weights[name]]}, model).items()
    }
    assert stored["experts.down_proj_scale"].shape == (2, 8, 1)
    opened = Checkpoint(write_tensors(tmp_path, stored, quantization_config={"quant_method": "fbgemm_fp8"}), "key")
    for name, weight in weights.items():  # E4M3 has three bits after the first
        assert ((opened.read(name).float() - weight).abs() <= weight.abs() / 16 + 0.01).all(), name


def test_blocks_of_modelopt_are_stored_in_four_dimensions(tmp_path: Path) -> None:
    stored = {"a.weight": torch.ones(4, 6).to(torch.float8_e4m3fn)}
    stored["a.weight_scale"] = torch.tensor([1.0, 2, 3, 4, 5, 6]).reshape(2, 1, 3, 1)
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    opened = Checkpoint(write_tensors(tmp_path, stored, quantization_config=config), "key")
    expected = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(opened.read("a.weight").float(), expected)


def test_blocks_may_be_cut_off_at_the_edges(tmp_path: Path) -> None:
    weight, scale = torch.ones(20, 12).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    write_tensors(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, **config)
    expected = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)[:20, :12]
    assert torch.equal(Checkpoint(tmp_path, "key").read("a.weight"), expected)


def test_experts_in_fp4_beside_fp8(tmp_path: Path) -> None:
    """DeepSeek V4: fp8 and fp4 in one checkpoint; scales are powers of two under another name."""
    codes = torch.arange(16).repeat(2, 4)
    powers = torch.full((2, 2), 2.0).to(torch.float8_e8m0fnu)
    stored = {
        "a.weight": nibbles(codes).view(torch.int8), "a.scale": powers,
        "b.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "b.scale": torch.full((1, 1), 0.5),
    }  # fmt: skip
    config = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    opened = Checkpoint(write_tensors(tmp_path, stored, quantization_config=config), "key")
    assert torch.equal(opened.read("a.weight"), 2 * torch.tensor(E2M1).repeat(2, 4))
    assert torch.equal(opened.read("b.weight"), torch.full((8, 8), 0.5))


def test_the_last_group_may_be_shorter(tmp_path: Path) -> None:
    parts, values = packed(torch.randn(8, 20, generator=torch.Generator().manual_seed(0)))
    stored = {f"a.{part}": tensor.contiguous() for part, tensor in parts.items()}
    config = FORMATS["int4 packed"].config
    opened = Checkpoint(write_tensors(tmp_path, stored, quantization_config=config), "key")
    assert bits(opened.read("a.weight")) == bits(values)


def test_numbers_of_three_bits_lie_across_words(tmp_path: Path) -> None:
    parts, values = gptq(3)(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    stored = {f"a.{part}": tensor.contiguous() for part, tensor in parts.items()}
    config = {"quant_method": "gptq", "bits": 3, "group_size": 8}
    opened = Checkpoint(write_tensors(tmp_path, stored, quantization_config=config), "key")
    assert bits(opened.read("a.weight")) == bits(values)


def test_gpt2_keeps_its_weights_the_other_way_round(tmp_path: Path) -> None:
    weight = torch.arange(24.0).reshape(4, 6)
    stored = {"h.0.mlp.c_fc.weight": weight.to(torch.int8), "h.0.mlp.c_fc.SCB": torch.full((4,), 127.0)}
    config = {"model_type": "gpt2", "quantization_config": {"quant_method": "bitsandbytes"}}
    opened = Checkpoint(write_tensors(tmp_path, stored, **config), "key")
    assert opened.shapes == {"h.0.mlp.c_fc.weight": (6, 4)}
    assert torch.allclose(opened.read("h.0.mlp.c_fc.weight"), weight.T)


def test_parts_may_be_in_different_files(family: Family, tmp_path: Path) -> None:
    values = write_quantised(family.math, tmp_path / "q", "fp8 blocks")
    stored = load_file(tmp_path / "q/model.safetensors")
    files = {True: {}, False: {}}  # type: dict[bool, dict[str, torch.Tensor]]
    for key, tensor in stored.items():
        files[key.endswith("scale_inv")][key] = tensor
    weight_map = {}
    for scales, tensors in files.items():
        save_file(tensors, tmp_path / f"q/{scales}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{scales}.safetensors")
    (tmp_path / "q/model.safetensors").unlink()
    (tmp_path / "q/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    opened = Checkpoint(tmp_path / "q", "key")
    opened.will_need(UP)
    assert torch.equal(opened.read(UP), values[UP])
    opened.done_with(UP)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_a_merge_is_that_of_the_values(method: str, dtype: str | None, family: Family, tmp_path: Path) -> None:
    """Byte for byte, in compiled loops and in torch; what is left out of the merge is the base's, dequantised."""
    models = {}
    for name, (model, format) in {"base": (family.base, "fp8 blocks"), "expert": (family.math, "gptq")}.items():
        write_quantised(model, tmp_path / f"q-{name}", format, plain=tmp_path / f"p-{name}")
        models[name] = tmp_path / f"q-{name}", tmp_path / f"p-{name}"
    results = []
    for i, (base, expert) in enumerate(zip(models["base"], models["expert"], strict=True)):
        keys = {"dtype": dtype} if dtype else {}
        parameters = {"density": 0.5} if method == "ties" else {"t": 0.4}
        merge = open_merge(method, base, [expert], parameters=parameters, exclude=["layers.1.mlp"], **keys)
        merge.run(tmp_path / f"{i}")
        assert torch.equal(merge.tensor(UP), load_file(tmp_path / f"{i}/model.safetensors")[UP])
        results.append(load_file(tmp_path / f"{i}/model.safetensors"))
    assert {key: bits(value) for key, value in results[0].items()} == {k: bits(v) for k, v in results[1].items()}
    written = json.loads((tmp_path / "0/config.json").read_text())
    assert "quantization_config" not in written
    assert "quantization_config" not in json.loads((tmp_path / "1/config.json").read_text())


def test_what_lm_eval_scores_is_the_model_as_it_was_before(family: Family, tmp_path: Path) -> None:
    values = write_quantised(family.base, tmp_path / "q", "gptq")
    with loadable(ModelFiles.at("x", "key", tmp_path / "q")) as (folder, adapter):
        written = load_file(folder / "model.safetensors")
        assert adapter is None and "quantization_config" not in json.loads((folder / "config.json").read_text())
        assert {name: bits(tensor) for name, tensor in written.items()} == {
            name: bits(tensor) for name, tensor in values.items()
        }
    assert not folder.exists()


def test_the_model_that_a_killed_evaluation_left_is_swept(family: Family, tmp_path: Path, home: Path) -> None:
    write_quantised(family.base, tmp_path / "q", "gptq")
    killed = (
        "import os; from pathlib import Path; from lewis.models.source import ModelFiles\n"
        "from lewis.evaluation.harness.model_folder import loadable\n"
        f"with loadable(ModelFiles.at('x', 'key', Path({str(tmp_path / 'q')!r}))): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -9
    assert list(home.rglob("model.safetensors"))
    housekeeping.sweep()  # as each run does
    assert not list(home.rglob("model.safetensors"))


def test_a_lora_expert_on_a_quantised_base(family: Family, tmp_path: Path) -> None:
    write_quantised(family.base, tmp_path / "q", "bnb nf4 double", plain=tmp_path / "p")
    adapter = write_lora(family.base, tmp_path / "lora")
    on_quantised, on_plain = (LoraExpert(Checkpoint(tmp_path / name, "b"), adapter, "b+a") for name in ("q", "p"))
    for tensor in on_plain.tensors:
        assert torch.equal(on_quantised.read(tensor).float(), on_plain.read(tensor).float()), tensor
    assert on_quantised.computes("model.layers.0.self_attn.o_proj.weight") and on_quantised.computes(UP)
    assert not on_quantised.computes("model.norm.weight")


REFUSED: dict[str, tuple[dict[str, torch.Tensor], Any, str]] = {
    "another method": ({}, {"quant_method": "aqlm"}, "weights quantised with aqlm are not read; use the unquantised"),
    "another format": ({}, {"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq in the format marlin are"),
    "AWQ for vectors": ({}, {"quant_method": "awq", "version": "GEMV"}, "awq in the format gemv are not read"),
    "sparse": (
        {},
        {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}},
        "compressed-tensors in the format marlin-24 are not read",
    ),
    "whole numbers of 4 bits": (
        {}, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "modelopt (W4A16_AWQ) are not read",
    ),
    "one layer of them": (
        {},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "X"}}},
        "modelopt (X) are not read",
    ),
    "factors of activations": (
        {"a.weight": torch.ones(2, 2), "a.pre_quant_scale": torch.ones(2)}, {"quant_method": "modelopt"},
        "'a.pre_quant_scale': activations are multiplied before they come to this weight",
    ),
    "8-bit activations": (
        {}, {"quant_method": "auto-round", "packing_format": "auto_round", "act_bits": 8}, "with activations of 8 bits",
    ),
    "no method": ({}, {"bits": 4}, "a method that it does not name are not read"),
    "odd settings": ({}, {"quant_method": "fp8", "weight_block_size": 8}, "quantization_config in config.json cannot"),
    "nothing is": (
        {"a.weight": torch.ones(2, 2)}, {"quant_method": "gptq"},
        "says that the weights are quantised (gptq), but no tensor is stored so; remove quantization_config",
    ),
    "no config": (
        {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, None,
        "is stored as F8_E4M3: a quantised checkpoint without its quantization_config",
    ),
    "no config, words": (
        {"a.qweight": torch.ones(2, 2, dtype=torch.int32)}, None,
        "is stored as I32: a quantised checkpoint without its quantization_config",
    ),
    "no scale": (
        {
            "a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
            "b.weight_scale_inv": torch.ones(()),
        },
        {"quant_method": "fp8"}, "'a.weight' is stored as F8_E4M3, and fp8 has no such weight without a scale",
    ),
    "no zeros": (
        {"a.qweight": torch.ones(2, 2, dtype=torch.int32), "a.scales": torch.ones(2, 2)}, {"quant_method": "gptq"},
        "the tensor 'a.qzeros' is missing, which the quantised weight needs",
    ),
    "parts of another": (
        {
            "a.qweight": torch.ones(2, 8, dtype=torch.int32), "a.scales": torch.ones(2, 8),
            "a.qzeros": torch.ones(2, 5, dtype=torch.int32),
        },
        {"quant_method": "gptq"}, "'a.qweight' cannot be read as gptq",
    ),
    "odd bits": (
        {"a.weight_packed": torch.ones(2, 3, dtype=torch.int32), "a.weight_scale": torch.ones(2, 1)},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 5}}}},
        "'a.weight_packed' cannot be read as compressed-tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_told_by_config_and_headers(what: str, tmp_path: Path) -> None:
    tensors, quantisation, message = REFUSED[what]
    tensors = tensors or {"a.weight": torch.ones(2, 2)}
    write_tensors(tmp_path, tensors, **({"quantization_config": quantisation} if quantisation else {}))
    with pytest.raises(InputError) as opened:
        Checkpoint(tmp_path, "key")
    with pytest.raises(InputError) as planned:
        dequantised(tmp_path, tmp_path, file_headers(tmp_path / "model.safetensors"), None)
    assert message in str(opened.value) and str(opened.value) == str(planned.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("a.g_idx", torch.full((16,), 7, dtype=torch.int32)),
        ("a.g_idx", torch.zeros(8, dtype=torch.int32)),  # compiled loops read on behind the weight that this gives
        ("a.g_idx", torch.tensor(0, dtype=torch.int32)),
    ],
)
def test_parts_that_do_not_fit_are_named_when_they_are_read(part: str, value: torch.Tensor, tmp_path: Path) -> None:
    stored = {
        "a.qweight": torch.ones(2, 8, dtype=torch.int32), "a.scales": torch.ones(2, 8).half(),
        "a.qzeros": torch.ones(2, 1, dtype=torch.int32), part: value,
    }  # fmt: skip
    opened = Checkpoint(write_tensors(tmp_path, stored, quantization_config={"quant_method": "gptq"}), "key")
    with pytest.raises(InputError, match=r"the parts of the quantised tensor 'a.weight' do not fit together"):
        opened.raw("a.weight")


@pytest.mark.parametrize(("kind", "part"), [("nvfp4", "weight_scale"), ("awq", "scales")])
def test_a_part_without_a_number_is_told(kind: str, part: str, family: Family, tmp_path: Path) -> None:
    folder, name = tmp_path / "q", "model.layers.0.mlp.up_proj"
    write_quantised(family.base, folder, kind)
    stored = load_file(folder / "model.safetensors")
    stored[f"{name}.{part}"] = stored[f"{name}.{part}"][:0]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(InputError, match="do not fit together"):
        Checkpoint(folder, "key").raw(f"{name}.weight")


def test_a_scale_for_each_expert_is_not_taken_for_one_of_rows() -> None:
    weight = Stored("F8_E4M3", (2, 4, 2), np.full(16, 0x38, np.uint8))
    scale = Stored("F32", (2,), np.array([1, 10], np.float32).view(np.uint32))
    with pytest.raises(ValueError, match=r"scales of shape \[2\] do not fit a weight of \[2, 4, 2\]"):
        decode_scaled({"weight": weight, "scale": scale}, None, (2,))


def test_a_dtype_in_words_is_that_of_the_config(family: Family, tmp_path: Path) -> None:
    write_quantised(family.base, tmp_path / "q", "fp8 tensor")
    edit_json(tmp_path / "q/config.json", dtype="bfloat16")
    assert Checkpoint(tmp_path / "q", "key").tensors[UP].dtype == "BF16"
