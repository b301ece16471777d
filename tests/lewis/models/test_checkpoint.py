"""Opening model folders: whole, sharded, tied; and refusing what is damaged, pickled, quantised or leads outside."""

import gc
import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis.errors import InputError, LewisError
from lewis.models.checkpoint import Checkpoint
from lewis.models.compatible import check_compatible
from lewis.models.files.folder import INDEX
from lewis.models.files.safetensors_file import TensorFile
from lewis.models.model import TensorInfo
from tests.conftest import Family
from tests.support.models import edit_json, shard, write_llama, write_tensors

W = {"model.layers.0.a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3)}


def refused(folder: Path, *expected: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint(folder, "key")
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def edit_index(folder: Path, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = file
    (folder / INDEX).write_text(json.dumps(index))


class TestReading:
    def test_knows_every_tensor_without_reading_any(self, tmp_path: Path) -> None:
        tensors = W | {"count": torch.zeros(3, dtype=torch.int64), "model.b": torch.ones(4, dtype=torch.bfloat16)}
        opened = Checkpoint(write_tensors(tmp_path, tensors), "key")
        assert opened.tensors == {
            "model.layers.0.a.weight": TensorInfo("F32", (2, 3)),
            "count": TensorInfo("I64", (3,)),
            "model.b": TensorInfo("BF16", (4,)),
        }
        assert [info.floating for info in opened.tensors.values()] == [
            opened.tensors[n].dtype != "I64" for n in opened.tensors
        ]
        assert opened.tensors["model.layers.0.a.weight"].elements == 6
        for name, tensor in tensors.items():
            assert opened.read(name).dtype == tensor.dtype and torch.equal(opened.read(name), tensor)

    def test_shards_read_as_one(self, family: Family, tmp_path: Path) -> None:
        whole, sharded = Checkpoint(family.base, "a"), Checkpoint(shard(family.base, tmp_path / "s"), "b")
        assert {n: (i.dtype, i.shape) for n, i in whole.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in sharded.tensors.items()
        }
        assert all(torch.equal(whole.read(name), sharded.read(name)) for name in whole.tensors)

    def test_a_file_takes_one_descriptor(self, family: Family, tmp_path: Path) -> None:
        folder = shard(family.base, tmp_path / "s")
        gc.collect()  # closes files of other tests
        before = len(os.listdir("/dev/fd"))
        opened = Checkpoint(folder, "key")
        assert opened.tensors and len(os.listdir("/dev/fd")) - before == 3  # shards


class TestTying:
    def test_a_tied_head_reads_as_the_embedding(self, family: Family) -> None:
        opened = Checkpoint(family.base, "key")
        assert opened.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert torch.equal(opened.read("lm_head.weight"), opened.read("model.embed_tokens.weight"))

    def test_a_tied_head_that_is_stored_too_is_one_tensor(self, family: Family, tmp_path: Path) -> None:
        tensors = load_file(family.base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        opened = Checkpoint(write_tensors(tmp_path, tensors, tie_word_embeddings=True), "key")
        assert "lm_head.weight" not in opened.tensors and "lm_head.weight" in opened.tied

    def test_a_tied_head_that_differs_is_refused(self, family: Family, tmp_path: Path) -> None:
        """Transformers 5 unties it, transformers 4 drops it: so its config has to say which of them wrote it."""
        tensors = load_file(family.base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        folder = write_tensors(tmp_path, tensors, tie_word_embeddings=True)
        refused(folder, "'lm_head.weight' is tied to 'model.embed_tokens.weight', but both are stored and differ")

    def test_an_untied_head_is_a_tensor_of_its_own(self, tmp_path: Path) -> None:
        opened = Checkpoint(write_llama(tmp_path / "m", tied=False), "key")
        assert opened.tied == {} and "lm_head.weight" in opened.tensors

    def test_where_the_config_is_silent_the_class_decides(self, tmp_path: Path) -> None:
        heads = {"model.embed_tokens.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)}
        assert Checkpoint(write_tensors(tmp_path / "llama", heads, model_type="llama"), "key").tied == {}
        assert Checkpoint(write_tensors(tmp_path / "gemma", heads, model_type="gemma"), "key").tied != {}
        assert Checkpoint(write_tensors(tmp_path / "new", heads, model_type="brand-new"), "key").tied == {}

    def test_where_the_config_is_silent_a_head_that_differs_is_not_tied(self, tmp_path: Path) -> None:
        """As in transformers 5: the class of Mistral Small 3.1 ties the head by default, the model has its own."""
        tensors = {"model.embed_tokens.weight": torch.ones(2, 2), "lm_head.weight": torch.zeros(2, 2)}
        for kind, text in (("mistral3", "mistral"), ("internvl", "qwen2")):
            config = {"model_type": kind, "text_config": {"model_type": text}}
            opened = Checkpoint(write_tensors(tmp_path / kind, tensors, **config), "key")
            assert opened.tied == {} and "lm_head.weight" in opened.tensors

    @pytest.mark.parametrize(
        ("config", "lacks"),
        [
            *(({"model_type": kind}, True) for kind in ("llama", "mistral", "qwen2")),
            *(({"model_type": kind}, False) for kind in ("gpt2", "gemma", "t5", "bert", "lfm2", "brand-new")),
            ({}, False),
            ({"model_type": "llama", "tie_word_embeddings": True}, False),
            ({"model_type": "gpt2", "tie_word_embeddings": False}, True),
            ({"model_type": "llama", "auto_map": {"AutoConfig": "own.Own"}}, False),
            ({"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, True),
            ({"model_type": "llava_next", "text_config": {"model_type": "gemma"}}, False),
            ({"model_type": "llava_next", "text_config": {"tie_word_embeddings": True}}, False),
            ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, False),
            ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, False),
        ],
    )
    def test_a_head_that_is_not_stored_is_tied_where_the_class_ties_it(
        self, tmp_path: Path, config: dict[str, Any], lacks: bool
    ) -> None:
        embedding = "model.embed_tokens.weight"
        opened = Checkpoint(write_tensors(tmp_path, {embedding: torch.ones(2, 2)}, **config), "key")
        assert opened.tied == ({} if lacks else {"lm_head.weight": embedding})

    def test_an_embedding_does_not_stand_for_a_head_that_is_lost(self, tmp_path: Path) -> None:
        tensors = {"model.embed_tokens.weight": torch.ones(2, 2), "lm_head.weight": torch.zeros(2, 2)}
        base = write_tensors(tmp_path / "base", tensors, model_type="llama", tie_word_embeddings=False)
        del tensors["lm_head.weight"]
        for kind in ("llama", "gemma"):
            expert = Checkpoint(write_tensors(tmp_path / kind, tensors, model_type=kind), kind)
            if kind == "gemma":
                check_compatible(Checkpoint(base, "base"), [expert])
            else:
                with pytest.raises(InputError, match=r"missing, the first is 'lm_head\.weight'"):
                    check_compatible(Checkpoint(base, "base"), [expert])


class TestDamaged:
    def test_no_folder_of_a_model(self, tmp_path: Path) -> None:
        refused(tmp_path, "no config.json; expected the folder of a Hugging Face model")

    @pytest.mark.parametrize(
        "text, expected", [("{", "not readable as JSON"), ("[]", "expected a JSON object, got list")]
    )
    def test_a_broken_config(self, tmp_path: Path, text: str, expected: str) -> None:
        write_tensors(tmp_path, W)
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, "config.json", expected)

    def test_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        refused(tmp_path, "no weights; expected model.safetensors")

    def test_a_file_without_tensors(self, tmp_path: Path) -> None:
        refused(write_tensors(tmp_path, {}), "hold no tensor")

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        write_tensors(tmp_path, W)
        os.truncate(tmp_path / "model.safetensors", 100)
        refused(tmp_path, "model.safetensors: truncated, or no safetensors file", "download it again")

    def test_a_truncated_shard(self, family: Family, tmp_path: Path) -> None:
        file = shard(family.base, tmp_path / "s") / "model-00002-of-00003.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        refused(tmp_path / "s", file.name, "truncated")

    def test_a_missing_shard(self, family: Family, tmp_path: Path) -> None:
        (shard(family.base, tmp_path / "s") / "model-00002-of-00003.safetensors").unlink()
        refused(tmp_path / "s", "the shard model-00002-of-00003.safetensors is missing")

    def test_a_tensor_that_is_not_where_the_index_says(self, family: Family, tmp_path: Path) -> None:
        edit_index(shard(family.base, tmp_path / "s"), "model-00003-of-00003.safetensors")
        refused(tmp_path / "s", "the index places", "no such tensor")

    def test_a_tensor_in_two_shards_once_with_a_wrappers_prefix(self, family: Family, tmp_path: Path) -> None:
        folder = shard(family.base, tmp_path / "s")
        index = json.loads((folder / INDEX).read_text())
        name, file = next(iter(index["weight_map"].items()))
        other = next(each for each in index["weight_map"].values() if each != file)
        index["weight_map"][f"module.{name}"] = other
        (folder / INDEX).write_text(json.dumps(index))
        save_file(load_file(folder / other) | {f"module.{name}": torch.zeros(3)}, folder / other)
        refused(folder, f"{INDEX}: two of its tensors are {name!r}", "keep one")

    @pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
    def test_an_index_that_leads_outside(self, family: Family, tmp_path: Path, file: str) -> None:
        save_file(W, tmp_path / "other.safetensors")
        edit_index(shard(family.base, tmp_path / "s"), file)
        refused(tmp_path / "s", f"{file!r} is not a plain file name")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}'])
    def test_a_broken_index(self, family: Family, tmp_path: Path, text: str) -> None:
        (shard(family.base, tmp_path / "s") / INDEX).write_text(text)
        refused(tmp_path / "s", "expected JSON with a weight_map")

    def test_an_index_with_a_file_that_is_no_name(self, family: Family, tmp_path: Path) -> None:
        edit_index(shard(family.base, tmp_path / "s"), 5)  # type: ignore[arg-type]
        refused(tmp_path / "s", "the shard 5 is missing")

    def test_too_many_open_files_are_not_blamed_on_the_file(self, tmp_path: Path) -> None:
        file, limits = write_tensors(tmp_path, W) / "model.safetensors", resource.getrlimit(resource.RLIMIT_NOFILE)
        with file.open() as first_free:
            resource.setrlimit(resource.RLIMIT_NOFILE, (first_free.fileno(), limits[1]))
        try:
            with pytest.raises(InputError, match=r"model.safetensors: cannot be opened: Too many open files$"):
                TensorFile(file)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def test_bytes_that_vanish_after_opening(self, tmp_path: Path) -> None:
        opened = Checkpoint(write_tensors(tmp_path, W), "key")
        os.truncate(tmp_path / "model.safetensors", 16)
        with pytest.raises(LewisError, match=r"model.safetensors: cannot read 'model.layers.0.a.weight': .* cut short"):
            opened.read("model.layers.0.a.weight")


class TestUnsupported:
    def test_pickled_weights_only(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        refused(tmp_path, "only pickled weights (pytorch_model.bin)", "can run code when loaded", "save_pretrained")

    def test_a_quantised_config(self, family: Family, tmp_path: Path) -> None:
        edit_json(shard(family.base, tmp_path / "s") / "config.json", quantization_config={"quant_method": "gptq"})
        refused(tmp_path / "s", "the weights are quantised (gptq), but no tensor is stored so")

    @pytest.mark.parametrize(
        "name, tensor, dtype",
        [
            ("a.weight", torch.zeros(2, 2).to(torch.float8_e4m3fn), "F8_E4M3"),
            ("a.weight", torch.zeros(2, 2, dtype=torch.int8), "I8"),
            ("a.qweight", torch.zeros(2, 2, dtype=torch.int32), "I32"),
        ],
    )
    def test_quantised_tensors(self, tmp_path: Path, name: str, tensor: torch.Tensor, dtype: str) -> None:
        refused(write_tensors(tmp_path, {name: tensor}), f"tensor {name!r} is stored as {dtype}", "quantised")


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("x" * 1001, (2,), "the name of a tensor has 1001 characters"),
        ("x", (1,) * 9, "has 9 dimensions"),
        ("x", (0, 2**40), "has 2 dimensions of up to 1099511627776"),
    ],
)
def test_a_header_that_no_model_has_is_refused(tmp_path: Path, name: str, shape: list[int], expected: str) -> None:
    size = 4 * math.prod(shape)
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    refused(tmp_path, expected)
