"""GGUF files as models: the same tensors as transformers loads from them, merged as any others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lewis import pipeline
from lewis.errors import InputError
from lewis.models import gguf_folder, hub
from lewis.models.checkpoint import Checkpoint
from lewis.models.gguf_folder import as_folder
from tests.support.models import bits, parse, write_expert, write_llama

pytestmark = pytest.mark.usefixtures("home")
HIDDEN = 64  # two heads of 16 for keys, four for queries; blocks of GGUF have 32 numbers


def write_gguf(model: Path, path: Path, kind: str = "Q8_0") -> Path:
    """A Llama as llama.cpp's converter writes it: its names, rows of queries and keys in its order, its metadata."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else key_heads
            rows = values.reshape(count, 2, values.shape[0] // count // 2, -1)
            values = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = gguf.quantize(values, stored)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("base") / "base", hidden=HIDDEN)


@pytest.mark.parametrize("kind, dtype", [("Q8_0", "BF16"), ("Q4_0", "BF16"), ("BF16", "BF16"), ("F16", "F16")])
def test_its_tensors_are_those_that_transformers_loads(kind: str, dtype: str, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(base, tmp_path / "m.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    folder = as_folder("m.gguf", tmp_path / "m.gguf")
    opened = Checkpoint(folder, "key")
    assert opened.shapes == Checkpoint(base, "key").shapes and opened.tied
    for name in opened.tensors:
        assert torch.equal(opened.read(name), theirs[name]), name
        assert opened.tensors[name].dtype == dtype and opened.computes(name)
    assert hub.headers(folder) == {name: (dtype, shape) for name, shape in opened.shapes.items()}
    assert opened.config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_guided_merge_with_one(given: str, base: Path, tmp_path: Path) -> None:
    """Base and expert, from the recipe to the files; the config says nothing of GGUF."""
    expert = write_expert(base, tmp_path / "expert", seed=1)
    (tmp_path / "g").mkdir()
    write_gguf(expert, tmp_path / "g/m.gguf")
    write_gguf(base, tmp_path / "b.gguf", "F16")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    place = {"file": tmp_path / "g/m.gguf", "folder": tmp_path / "g"}[given]
    sets = {"calibrations": {"s": {"texts": ["w1 w2 w3"], "samples": 1}}}
    data = {"merge_method": "ties", "base_model": str(tmp_path / "b.gguf"), "models": [{"model": str(place)}]}
    recipe = parse({**data, "lewis": sets, "dtype": "float32"})
    own, experts = pipeline.fetch(recipe)
    assert own is not None
    _, allocated = pipeline.guide(recipe, own, experts)
    merged = pipeline.merge(recipe, own, experts, allocated)
    found = load_file(merged.folder / "model.safetensors")
    one, other = own.open(), experts[0].open()
    for name, value in found.items():
        inside = (value == one.read(name)) | (value == other.read(name))  # one expert: what is kept is the expert's
        assert inside.all(), name
    assert (merged.folder / "tokenizer.json").is_file()


def test_density_one_is_the_file(base: Path, tmp_path: Path) -> None:
    write_gguf(write_expert(base, tmp_path / "expert", seed=1), tmp_path / "m.gguf")
    models = [{"model": str(tmp_path / "m.gguf"), "parameters": {"weight": 1}}]
    recipe = parse({"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "dtype": "float32"})
    own, experts = pipeline.fetch(recipe)
    merged = load_file(pipeline.merge(recipe, own, experts).folder / "model.safetensors")
    opened = experts[0].open()
    assert all(bits(merged[name]) == bits(opened.read(name)) for name in opened.tensors)


class TestRefused:
    def refused(self, path: Path, *parts: str) -> None:
        with pytest.raises(InputError) as caught:
            as_folder("m", path)
        assert all(part in str(caught.value) for part in parts), str(caught.value)

    def test_no_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF and no more")
        self.refused(tmp_path / "m.gguf", "m: truncated, or no GGUF file", "download it again")

    def test_several(self, base: Path, tmp_path: Path) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(b"")
        self.refused(tmp_path, "m: 2 GGUF files (a.gguf, b.gguf) and no safetensors; give the path of one of them")

    def test_an_architecture_that_transformers_does_not_know(self, base: Path, tmp_path: Path) -> None:
        import gguf

        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv6")
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self.refused(
            tmp_path / "m.gguf", "transformers makes no config of a GGUF file of the architecture rwkv6",
            "put the model's config.json beside the file",
        )  # fmt: skip

    def test_the_package_is_an_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
        (tmp_path / "m.gguf").write_bytes(b"")
        self.refused(tmp_path / "m.gguf", "needs the package gguf: pip install lewis-merge[gguf]")

    def test_a_tensor_without_a_place(self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_gguf(base, tmp_path / "m.gguf")
        names: Any = gguf_folder._names
        monkeypatch.setattr(gguf_folder, "_names", lambda *a: names(*a[:3], {**a[3], "blk.9.odd.weight": []}))
        self.refused(tmp_path / "m.gguf", "no place for the tensor 'blk.9.odd.weight'", "LlamaForCausalLM")

    def test_a_file_that_was_moved(self, base: Path, tmp_path: Path) -> None:
        folder = as_folder("m", write_gguf(base, tmp_path / "m.gguf"))
        (tmp_path / "m.gguf").unlink()
        with pytest.raises(InputError, match=r"the GGUF file cannot be opened .* was it moved\?"):
            Checkpoint(folder, "key")
