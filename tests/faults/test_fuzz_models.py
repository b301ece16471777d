"""Any bytes are a model, or are refused in the product's own words: headers, shard indexes, configs, adapters."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lewis.errors import LewisError
from lewis.models.checkpoint import Checkpoint
from lewis.models.files.folder import INDEX
from lewis.models.files.safetensors_file import file_headers
from lewis.models.lora.expert import LoraExpert
from tests.faults.fuzz import ANY, ODD, changed, fuzzed, outcome
from tests.support.models import write_tensors

NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
TENSORS = {name: torch.arange(8, dtype=torch.float32).reshape(4, 2) for name in NAMES}
CONFIG = {
    **{"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 4, "num_hidden_layers": 2},
    **{"text_config": {"vocab_size": 4}, "torch_dtype": "float32", "num_nextn_predict_layers": 0},
}
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    NAMES[0]: {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
    NAMES[1]: {"dtype": "BF16", "shape": [4, 2], "data_offsets": [32, 48]},
    "lm_head.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [48, 80]},
}
LORA = {
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": {"dtype": "F32", "shape": [1, 2]},
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": {"dtype": "F32", "shape": [4, 1]},
    "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": {"dtype": "BF16", "shape": [1, 2]},
    "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight": {"dtype": "BF16", "shape": [4, 1]},
}
SETTINGS = {
    **{"peft_type": "LORA", "r": 1, "lora_alpha": 8, "bias": "none", "use_rslora": False, "fan_in_fan_out": False},
    **{
        "target_modules": ["up_proj"],
        "modules_to_save": None,
        "rank_pattern": {"x": 2},
        "alpha_pattern": {"up_proj": 3},
    },
    **{"init_lora_weights": True, "lora_bias": False, "use_dora": False, "layer_replication": None},
}
DTYPES = st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I8", "U8", "BOOL", "C64", "F4", "f32", "X"])
SIZES = st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**40, 2**63, 2**64, 10**30, 1.0, "2", None])
HOSTILE = st.one_of(
    ANY, DTYPES, st.lists(SIZES, max_size=12), st.lists(st.sampled_from([0, 16, 32, 48, 80]), max_size=3)
)
NAMED = st.sampled_from(["", "x" * 2000, "a.layers.99999999999999999999.b", "h." + "9" * 800 + ".x", "é", "../x", "\n"])
DEEP = st.sampled_from(["[" * 100_000, '{"a":' * 5000, "[" * 200 + "]" * 200, '"\\ud800"', "1" * 5000, "NaN", "", "{}"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tensors(tmp_path_factory.mktemp("model"), TENSORS, **CONFIG)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    yield Checkpoint(write_tensors(tmp_path_factory.mktemp("base"), TENSORS, **CONFIG), "base")


def file_of(header: Any, data: bytes = bytes(80), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode(errors="surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def read_all(model: Checkpoint | LoraExpert) -> None:
    for name in model.tensors:
        model.read(name)
        model.raw(name)


def renamed(header: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in header.items()}


HEADERS = st.one_of(
    changed(HEADER, HOSTILE).map(file_of),
    st.builds(renamed, st.just(HEADER), st.sampled_from(list(HEADER)), NAMED).map(file_of),
    st.builds(file_of, changed(HEADER, HOSTILE), st.binary(max_size=90), st.none() | st.integers(0, 2**64 - 1)),
    DEEP.map(lambda text: file_of(text.encode())),
    st.binary(max_size=64),
    st.binary(max_size=64).map(file_of),
)


@fuzzed
@given(content=HEADERS)
def test_safetensors_headers(folder: Path, content: bytes) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    path.write_bytes(content)
    (folder / "config.json").write_text("{}")
    outcome(lambda: file_headers(path))
    outcome(lambda: read_all(Checkpoint(folder, "key")))


PLACES = st.sampled_from(
    ["a.safetensors", "b.safetensors", "gone.safetensors", "../a.safetensors", "", ".", "/dev/zero"]
)


@fuzzed
@given(
    text=st.one_of(
        changed(
            {"metadata": {"total_size": 96}, "weight_map": {NAMES[0]: "a.safetensors", NAMES[1]: "b.safetensors"}},
            ANY | PLACES | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), PLACES | ODD, max_size=4),
        ).map(json.dumps),
        DEEP,
        st.text(max_size=40),
    )
)
def test_shard_indexes(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    for file, names in {"a": NAMES[:1], "b": NAMES[1:2]}.items():
        if not (folder / f"{file}.safetensors").exists():
            save_file({name: TENSORS[name] for name in names}, folder / f"{file}.safetensors")
    (folder / INDEX).write_bytes(text.encode(errors="surrogatepass"))
    try:
        outcome(lambda: read_all(Checkpoint(folder, "key")))
    finally:
        (folder / INDEX).unlink()
        (folder / "model.safetensors").touch()


@fuzzed
@given(text=changed(CONFIG).map(json.dumps) | DEEP | st.text(max_size=40))
def test_configs(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "config"
    if not folder.exists():
        write_tensors(folder, TENSORS)
    (folder / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    outcome(lambda: read_all(Checkpoint(folder, "key")))


PATTERNS = st.dictionaries(
    st.sampled_from(["up_proj", "(", "(a+)+$", "(.*)*x", "(([a-z.]+)*)*!", "a{9999}", "[", r"\d", "x" * 2000]),
    ODD,
    max_size=2,
)


def with_data(header: Any) -> bytes:
    """A file whose tensors lie one after another, as large as their shapes and dtypes say, where they say so."""
    placed, start = {}, 0
    for name, entry in header.items() if isinstance(header, dict) else ():
        size = 0
        if isinstance(entry, dict) and isinstance(shape := entry.get("shape"), list):
            size = {"F32": 4, "BF16": 2, "F64": 8, "I64": 8}.get(str(entry.get("dtype")), 1)
            for each in shape:
                size = size * each if isinstance(each, int) and 0 <= each < 99 and size < 9999 else size
        placed[name] = {**entry, "data_offsets": [start, start + size]} if isinstance(entry, dict) else entry
        start += size
    return file_of(placed, bytes(start))


@fuzzed
@given(
    settings=changed(SETTINGS, ANY | PATTERNS).map(json.dumps) | DEEP,
    content=st.just(with_data(LORA)) | changed(LORA, HOSTILE).map(with_data) | HEADERS,
)
def test_adapters(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory, settings: str, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "adapter"
    folder.mkdir(exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    weights.unlink(missing_ok=True)
    weights.write_bytes(content)
    (folder / "adapter_config.json").write_bytes(settings.encode(errors="surrogatepass"))
    found = outcome(lambda: LoraExpert(base, folder, "key"))
    if not isinstance(found, LewisError):
        outcome(lambda: read_all(found))
