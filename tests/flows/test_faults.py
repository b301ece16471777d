"""Bad input to `lewis merge`: one clear message each, exit code 2 (1 when met half way), and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.support.models import edit_json, rewrite, shard, write_llama, write_lora, write_tokenizer

INDEX = "model.safetensors.index.json"
Edit = Callable[[Family, Path], dict[str, Any] | None]


def same(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def index(folder: Path, file: str) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = file
    (folder / INDEX).write_text(json.dumps(content))


def expert(change: Callable[[Path], Any], *, parts: int = 0) -> Edit:
    """A fault in a copy of an expert, single or sharded."""

    def edit(family: Family, folder: Path) -> None:
        shard(family.math, folder, parts) if parts else rewrite(family.math, folder, same)
        change(folder)

    return edit


def stored(dtype: torch.dtype, name: str = "model.layers.0.mlp.up_proj.weight") -> Callable[[Path], Any]:
    """One weight in a dtype that is not merged."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damaged(value: float, part: str = "up_proj") -> Edit:
    def edit(family: Family, folder: Path) -> None:
        rewrite(family.math, folder, lambda name, t: t.index_fill(0, torch.tensor(1), value) if part in name else t)

    return edit


def adapter(**settings: Any) -> Edit:
    def edit(family: Family, folder: Path) -> None:
        write_lora(family.base, folder)
        edit_json(folder / "adapter_config.json", **settings)

    return edit


def adapter_file(settings: str) -> Edit:
    def edit(family: Family, folder: Path) -> None:
        write_lora(family.base, folder)
        (folder / "adapter_config.json").write_text(settings)

    return edit


def keys(**changed: Any) -> Edit:
    """A recipe that says something else; its expert is fine."""
    return lambda family, folder: rewrite(family.math, folder, same) and changed


def guided(calibration: dict[str, Any], **block: Any) -> Edit:
    return keys(lewis={"calibrations": {"s": calibration}, **block})


FAULTS: dict[str, tuple[Edit, int, str]] = {
    "unknown key": (keys(modls=1), 2, "modls: unknown key; did you mean 'models'?"),
    "unknown parameter": (keys(parameters={"densty": 1}), 2, "parameters.densty: ties has no such parameter; did you"),
    "wrong type": (keys(parameters={"density": "half"}), 2, "parameters.density: expected a finite number, got 'half'"),
    "not YAML": (keys(text="models: ["), 2, "r: not valid YAML"),
    "unknown method": (keys(merge_method="tyes"), 2, "merge_method: unknown method 'tyes'; did you mean 'ties'?"),
    "no such folder": (keys(base_model="./nowhere"), 2, "./nowhere: no such folder"),
    "filter": (keys(parameters={"weight": [{"filter": "atn", "value": 1}]}), 2, "filter: 'atn' matches no tensor"),
    "exclude": (keys(exclude=["atn"]), 2, "exclude[0]: 'atn' matches no tensor"),
    "no folder's weights": (expert(lambda f: (f / "model.safetensors").unlink()), 2, "no *.safetensors in it"),
    "no config": (expert(lambda f: (f / "config.json").unlink()), 2, "no config.json"),
    "config no JSON": (expert(lambda f: (f / "config.json").write_text("{")), 2, "config.json: not readable as JSON"),
    "truncated": (expert(lambda f: cut(f / "model.safetensors")), 2, "not a readable safetensors file"),
    "empty file": (expert(lambda f: (f / "model.safetensors").write_bytes(b"")), 2, "not a readable safetensors file"),
    "truncated shard": (expert(lambda f: cut(f / "model-00002-of-00003.safetensors"), parts=3), 2, "00002-of-00003"),
    "missing shard": (
        expert(lambda f: (f / "model-00002-of-00003.safetensors").unlink(), parts=3), 2,
        "the shard model-00002-of-00003.safetensors is missing",
    ),
    "index leads out": (expert(lambda f: index(f, "../x.safetensors"), parts=2), 2, "'../x.safetensors' is not a"),
    "index leads out absolutely": (expert(lambda f: index(f, "/etc/passwd"), parts=2), 2, "'/etc/passwd' is not a"),
    "index of another file": (
        expert(lambda f: index(f, "model-00001-of-00002.safetensors"), parts=2), 2, "places 'model.norm.weight' here",
    ),
    "index no JSON": (expert(lambda f: (f / INDEX).write_text("[]"), parts=2), 2, "expected JSON with a weight_map"),
    "pickled": (expert(pickled), 2, "only pickled weights (pytorch_model.bin), which can run code"),
    "quantised": (
        expert(lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"})), 2,
        "config.json says that the weights are quantised (gptq), but no tensor is stored so",
    ),
    "fp8": (expert(stored(torch.float8_e4m3fn)), 2, "is stored as F8_E4M3: a quantised checkpoint without its"),
    "int8": (expert(stored(torch.int8)), 2, "is stored as I8: a quantised checkpoint without its"),
    "NaN": (damaged(float("nan")), 2, "NaN: 32 elements are NaN in model.layers.0.mlp.up_proj.weight, model.layers.1"),
    "Inf": (damaged(float("inf")), 2, "overflow: 32 elements are infinity in model.layers.0.mlp.up_proj.weight"),
    "other shapes": (
        lambda family, folder: write_llama(folder, hidden=32) and None, 2,
        "has shape [64, 32], in the base it is [64, 16]",
    ),
    "other vocabulary": (
        expert(lambda f: write_tokenizer(f, [f"w{i}" for i in range(59, -1, -1)])), 2,
        "another vocabulary: the token 'w0' is 62, in the base it is 3; to match embeddings by token, set",
    ),
    "DoRA": (adapter(use_dora=True), 2, "use_dora: its file has no magnitude vector for"),
    "no LoRA": (adapter(peft_type="IA3"), 2, "it puts Linear (IA3) on model.layers.0.self_attn.q_proj"),
    "adapter without settings": (adapter_file("[]"), 2, "adapter_config.json: expected a JSON object, got list"),
    "adapter with odd settings": (adapter(lora_alpha="x"), 2, "adapter_config.json: lora_alpha: peft"),
    "adapter with odd patterns": (adapter(alpha_pattern={"(": 1}), 2, "adapter_config.json: alpha_pattern: peft"),
    "quantised in one word": (expert(lambda f: edit_json(f / "config.json", quantization_config="gptq")), 2, "(gptq)"),
    "odd text_config": (expert(lambda f: edit_json(f / "config.json", text_config=3)), 2, "text_config: expected"),
    "tokenizer no JSON": (expert(lambda f: (f / "tokenizer.json").write_text("[]")), 2, "no tokenizer: AttributeError"),
    "no calibration text": (guided({"texts": []}), 2, "s: "),
    "no calibration file": (guided({"dataset": "json", "data_files": "gone.jsonl", "text": "{a}"}), 2, "gone.jsonl"),
    "no calibration field": (
        guided({"dataset": "json", "data_files": "rows.jsonl", "text": "{question}"}), 2, "question",
    ),
    "bounds": (guided({"texts": ["w1"]}, density={"min": 0.9}), 2, "lewis.density.min: expected 0 < min <= max <= 1"),
    "too large for fp16": (
        lambda family, folder: damaged(1e5, "norm")(family, folder) or {"dtype": "float16"},
        2, "layernorm.weight has 1e+05, and the recipe stores the result in float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_is_told_and_nothing_is_written(
    fault: str, family: Family, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, code, expected = FAULTS[fault]
    (tmp_path / "rows.jsonl").write_text('{"answer": "w1"}\n')
    changed = edit(family, tmp_path / "expert") or {}
    data = {"merge_method": "ties", "base_model": str(family.base), "models": [{"model": "./expert"}]} | changed
    (tmp_path / "r.yaml").write_text(data.pop("text", None) or json.dumps(data))
    before = sorted(tmp_path.iterdir())
    assert main(["merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")]) == code
    told = capsys.readouterr().err
    assert expected in told, told
    assert len(told.strip().splitlines()) <= 5 and "Traceback" not in told
    assert set(tmp_path.iterdir()) <= {*before, home}


def test_no_space(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(
        json.dumps({"merge_method": "ties", "base_model": str(family.base), "models": [{"model": str(family.math)}]})
    )
    monkeypatch.setattr("lewis.store.files._free", lambda _: (1000, False))
    assert main(["merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")]) == 2
    assert "no space: the output needs 10.0 MB" in capsys.readouterr().err and not (tmp_path / "out").exists()
