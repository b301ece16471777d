"""GGUF files of tiny models, as llama.cpp's converter writes them: its names, its order of values, its metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

ARCHITECTURES = {"mistral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's, which are stored (in, out)


def write_gguf(model: Path, path: Path, kind: str = "Q8_0", *, flat_gates: bool = False) -> Path:
    """Write a model in safetensors as a GGUF file.

    Args:
        model: its folder.
        path: of the file.
        kind: GGML's name of the type of its matrices; vectors are in F32.
        flat_gates: whether the gates of shared experts are vectors, as early versions wrote them.
    """
    import gguf

    config = json.loads((model / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    number = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    layers, heads = _first(config, "num_hidden_layers", "n_layer"), _first(config, "num_attention_heads", "n_head")
    key_heads = config.get("num_key_value_heads", heads)
    names = gguf.get_tensor_name_map(number, layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(config["model_type"])
    writer.add_context_length(_first(config, "max_position_embeddings", "n_positions"))
    writer.add_block_count(layers)
    writer.add_embedding_length(_first(config, "hidden_size", "n_embd"))
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "gpt2":
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(key_heads)
        writer.add_key_length(config.get("head_dim") or config["hidden_size"] // heads)
        writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(_first(config, "num_experts", "num_local_experts"))
        writer.add_expert_used_count(config["num_experts_per_tok"])
    for name, values in _stacked(load_file(model / "model.safetensors")).items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else key_heads
            rows = values.reshape(count, 2, values.shape[0] // count // 2, -1)
            values = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if name.endswith(_TRANSPOSED) and config["model_type"] == "gpt2":
            values = np.ascontiguousarray(values.T)
        if name.endswith("shared_expert_gate.weight") and flat_gates:
            values = values[0]
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        module, _, ending = name.rpartition(".")
        place = names.get_name(module)
        assert place is not None, name
        writer.add_tensor(f"{place}.{ending}", gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next(config[key] for key in keys if key in config)


def _stacked(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of a model's tensors, those of experts in one tensor for each projection."""
    found, experts = dict[str, np.ndarray](), dict[str, dict[int, np.ndarray]]()
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = values
        else:
            found[name] = values
    return found | {name: np.stack([each[i] for i in range(len(each))]) for name, each in experts.items()}
