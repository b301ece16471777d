"""Writing checkpoints: what safetensors and transformers read back is what was written."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis.errors import InputError, LewisError
from lewis.models.checkpoint import Checkpoint
from lewis.models.config import write_config
from lewis.models.dtypes import DTYPES, torch_dtype
from lewis.models.files.folder import INDEX, copy_tokenizer
from lewis.models.files.writer import CheckpointWriter, parse_size
from tests.conftest import Family
from tests.support.models import bits

NAMES = {torch_dtype(key): key for key in DTYPES}


def write(folder: Path, tensors: dict[str, torch.Tensor], limit: int = 10**9) -> None:
    layout = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with CheckpointWriter(folder, layout, limit) as writer:
        for name in random.Random(0).sample(list(tensors), len(tensors)):
            writer.write(name, tensors[name])


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


MIXED = {
    "odd": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.tensor([1.5, -0.0], dtype=torch.float16),
    "brain": torch.full((3, 3), 7.0, dtype=torch.bfloat16),
    "long": torch.tensor([2**60, -1]),
    "single": torch.rand(4, 5),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.rand(3, 7).T,
}


def test_reads_back_equal_whatever_the_dtypes_and_order(tmp_path: Path) -> None:
    write(tmp_path, MIXED)
    found = read(tmp_path)
    assert found.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)


def test_the_header_says_pytorch(tmp_path: Path) -> None:
    write(tmp_path, MIXED)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(4, 200))
def test_shards_keep_to_the_limit(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    write(folder, tensors, limit)
    found = read(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()) and len(found) == len(tensors)
    for path in folder.glob("*.safetensors"):
        members = load_file(path)
        assert len(members) == 1 or sum(4 * t.numel() for t in members.values()) <= limit


def test_the_index_has_plain_file_names(tmp_path: Path) -> None:
    write(tmp_path, {f"t{i}": torch.rand(10) for i in range(5)}, 90)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {
        "t0": "model-00001-of-00003.safetensors",
        "t1": "model-00001-of-00003.safetensors",
        "t2": "model-00002-of-00003.safetensors",
        "t3": "model-00002-of-00003.safetensors",
        "t4": "model-00003-of-00003.safetensors",
    }


def test_transformers_loads_shards(family: Family, tmp_path: Path) -> None:
    original = Checkpoint(family.base, "key")
    write(tmp_path, {name: original.read(name) for name in original.tensors}, 8000)
    write_config(original.config, family.base, tmp_path, "F32")
    copy_tokenizer(family.base, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = AutoModelForCausalLM.from_pretrained(family.base).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path)("w1 w2")["input_ids"] == [4, 5]


def test_a_tensor_unlike_its_layout_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, {"a": ("F32", (2,))}, 100) as writer:
        with pytest.raises(ValueError, match="a: laid out as F32"):
            writer.write("a", torch.zeros(3))
        with pytest.raises(ValueError, match="a: laid out as F32"):
            writer.write("a", torch.zeros(2, dtype=torch.float16))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with CheckpointWriter(tmp_path, {"a": ("F32", (2,))}, 100) as writer:
        monkeypatch.setattr("lewis.models.files.writer.os.pwrite", full)
        with pytest.raises(LewisError, match="cannot write 'a': No space left on device"):
            writer.write("a", torch.zeros(2))


class TestConfig:
    def test_says_the_dtype_of_the_weights(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "x": 1}, "eos_token_id": 5}
        write_config(config, tmp_path, tmp_path / "out", "BF16")
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
            "dtype": "bfloat16",
            "text_config": {"torch_dtype": "bfloat16", "x": 1},
            "eos_token_id": 5,
        }

    @pytest.mark.parametrize("dtype", ["F32", None])
    def test_is_copied_byte_by_byte_where_nothing_changes(self, tmp_path: Path, dtype: str | None) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "config.json").write_text('{ "torch_dtype":"float32" ,"b":1}')
        write_config({"torch_dtype": "float32", "b": 1}, tmp_path, tmp_path / "out", dtype)
        assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_tokenizer_and_generation_config_are_copied_byte_by_byte(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    kept = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "vocab.json"]
    kept += ["merges.txt", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "tekken.json"]
    kept += ["qwen.tiktoken"]
    for i, name in enumerate([*kept, "config.json", "README.md", "model.safetensors", "training_args.bin"]):
        (tmp_path / "in" / name).write_bytes(bytes([i, 255, 13, 10]))
    copy_tokenizer(tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(kept)
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "in" / n).read_bytes() for n in kept)


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("300", 300), ("2KB", 2000), ("7B", 7)]
)
def test_sizes_are_decimal(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 GiB", "-1GB", "0", "big"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="max_shard_size: expected a size such as 5GB"):
        parse_size(text)
