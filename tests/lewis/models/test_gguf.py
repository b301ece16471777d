"""GGUF files as models: the same tensors as transformers loads from them, merged as any others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lewis.errors import InputError, LewisError
from lewis.models import gguf
from lewis.models.checkpoint import Checkpoint
from lewis.models.gguf import as_folder
from lewis.models.hub import repository
from lewis.store.verification import verify
from tests.support import pipeline
from tests.support.gguf_files import write_gguf
from tests.support.models import bits, open_merge, parse, write_expert, write_llama

pytestmark = pytest.mark.usefixtures("home")
HIDDEN = 64  # two heads of 16 for keys, four for queries; blocks of GGUF have 32 numbers


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
    assert repository.headers(folder) == {name: (dtype, shape) for name, shape in opened.shapes.items()}
    assert opened.config["architectures"] == ["LlamaForCausalLM"]


def test_a_folder_that_is_damaged_is_made_again(base: Path, tmp_path: Path) -> None:
    """A flipped digit of an offset gave other values for a tensor, and `verify` did not look."""
    file = write_gguf(base, tmp_path / "m.gguf", "F32")
    folder = as_folder("m.gguf", file)
    right = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in sorted(right.keys() - {"model.gguf", "lewis.json"}):
        data = bytearray(right[name])
        data[len(data) // 2] ^= 1
        (folder / name).chmod(0o600)
        (folder / name).write_bytes(data)
        assert [each.entry for each in verify().damaged] == [str(folder)], name
        assert as_folder("m.gguf", file) == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == right
    file.unlink()
    assert not verify().damaged


def test_a_tokenizers_file_that_changed_is_copied_again(base: Path, tmp_path: Path) -> None:
    """Only three files counted: a merge wrote the chat template that stood next to the file at first."""
    file = write_gguf(base, tmp_path / "m.gguf", "F32")
    (tmp_path / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    for template in ("one", "two"):
        (tmp_path / "chat_template.jinja").write_text(template)
        assert (as_folder("m.gguf", file) / "chat_template.jinja").read_text() == template


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "head_dim": 16}
OTHERS: dict[str, dict[str, Any]] = {  # model type -> its sizes: those that no GGUF file tells are the usual ones
    "mistral": SIZES,
    "qwen2": SIZES,  # biases
    "qwen2_moe": SIZES | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60},
    "qwen3_moe": SIZES | EXPERTS,
    "gemma2": SIZES | {"head_dim": 16},  # norms are stored as one more
    "gemma3_text": SIZES | {"head_dim": 16},
    "phi3": SIZES | SPECIAL | {"vocab_size": 32064, "pad_token_id": 32000},  # q, k and v in one tensor
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 1024, "vocab_size": 50257},  # transposed
}


def saved(kind: str, folder: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**OTHERS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def check_values(file: Path, model: Any) -> Checkpoint:
    """Check that a file has the values of the model that it was written from."""
    opened, before = Checkpoint(as_folder("m.gguf", file), "key"), model.state_dict()
    assert {*opened.tensors, *opened.tied} == {name for name, _ in model.named_parameters()} | {*opened.tied}
    for name in opened.tensors:
        torch.testing.assert_close(opened.read(name), before[name], rtol=0, atol=2e-7)  # a norm's one less one
    return opened


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *("gemma2", "gpt2", "qwen2", "qwen3_moe"),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("gemma3_text", "phi3", "qwen2_moe")),
    ],
)
def test_other_architectures_are_read_as_transformers_loads_them(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = saved(kind, tmp_path / "model")
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "model", tmp_path / "gguf/m.gguf", "F32", flat_gates=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="m.gguf", dtype=torch.float32)
    opened, loaded = check_values(tmp_path / "gguf/m.gguf", model), theirs.state_dict()
    for name in opened.tensors:
        assert torch.equal(opened.read(name), loaded[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(  # its name, and gates of shared experts that are matrices
    "kind", ["mistral", pytest.param("qwen2_moe", marks=pytest.mark.long)]
)
def test_what_transformers_does_not_load_is_read(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "model")
    (tmp_path / "gguf").mkdir()
    for name in ("alone", "beside"):
        check_values(write_gguf(tmp_path / "model", tmp_path / f"gguf/{name}.gguf", "F32"), model)
        (tmp_path / "gguf/config.json").write_bytes((tmp_path / "model/config.json").read_bytes())


@pytest.mark.slow
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
        told = "transformers does not read GGUF files of the architecture rwkv6; use the model's safetensors"
        self.refused(tmp_path / "m.gguf", told)
        (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
        self.refused(tmp_path / "m.gguf", told)

    def test_a_config_that_transformers_cannot_make(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoConfig

        monkeypatch.delattr(AutoConfig, "from_pretrained")
        told = "transformers makes no config of a GGUF file of the architecture llama"
        self.refused(write_gguf(base, tmp_path / "m.gguf"), told, "put the model's config.json next to the file")

    def test_a_config_of_other_sizes(self, base: Path, tmp_path: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
        self.refused(
            write_gguf(base, tmp_path / "m.gguf"), "mlp.down_proj.weight' has the shape [64, 8] by its config, and",
            "put the model's own config.json next to the file",
        )  # fmt: skip

    def test_the_package_is_an_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
        (tmp_path / "m.gguf").write_bytes(b"")
        self.refused(tmp_path / "m.gguf", "needs the package gguf: pip install lewis-merge[gguf]")

    def test_a_tensor_without_a_place(self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_gguf(base, tmp_path / "m.gguf")
        names: Any = gguf._names
        monkeypatch.setattr(gguf, "_names", lambda *a: names(*a[:3], {**a[3], "blk.9.odd.weight": []}))
        self.refused(tmp_path / "m.gguf", "no place for the tensor 'blk.9.odd.weight'", "LlamaForCausalLM")

    def test_an_adapter_on_it(self, base: Path, tmp_path: Path) -> None:
        """The adapter's config named a revision that no Hub has."""
        folder = as_folder("m", write_gguf(base, tmp_path / "m.gguf"))
        with pytest.raises(
            InputError, match=r"output.kind: the base .* is a GGUF file, .* use the model's safetensors"
        ):
            open_merge("task_arithmetic", folder, [base], output={"kind": "lora", "rank": 2})

    def test_a_file_that_is_cut_short_while_it_is_open(self, base: Path, tmp_path: Path) -> None:
        """The system killed the process by SIGBUS."""
        opened = Checkpoint(as_folder("m", write_gguf(base, tmp_path / "m.gguf")), "key")
        os.truncate(tmp_path / "m.gguf", 4096)
        with pytest.raises(LewisError, match=r"model.gguf: cannot read 'output_norm.weight': the file was cut short"):
            opened.read("model.norm.weight")

    def test_a_file_that_was_moved(self, base: Path, tmp_path: Path) -> None:
        folder = as_folder("m", write_gguf(base, tmp_path / "m.gguf"))
        (tmp_path / "m.gguf").unlink()
        with pytest.raises(InputError, match=r"the GGUF file cannot be opened .* was it moved\?"):
            Checkpoint(folder, "key")
