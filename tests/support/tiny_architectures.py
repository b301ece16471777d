"""Any text-generation architecture of the installed transformers, shrunk until it is a tiny random model.

A default config is shrunk by the names of its numbers: widths to 32, heads to 4, layers to one of each kind. What that
rule gets wrong for an architecture is in `CHANGES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
WIDTH, HEADS, KEY_VALUE_HEADS, HEAD = 32, 4, 2, 8
SAMPLES = ((3, 4, 5, 6, 7, 8, 9), (10, 11), (11, 12, 13), (3, 3, 3), (20, 21, 22, 23, 24))

# The first rule whose pattern is the whole name of a key says what it becomes; none: large numbers become WIDTH.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"(vocab_size|.*_vocab_size|vocab_size_.*)", VOCABULARY),
    (r"(type|task_type)_vocab_size", 2),
    (r"(hidden_size|d_model|n_embd|embed_dim|dim|.*_hidden_size|hidden_size_.*|embedding_size|projection_dim)", WIDTH),
    (r".*(hidden_dim|_embed_dim|output_dim|embd_dim)", WIDTH),
    (r".*(key_value|kv)_heads|kv_n_heads|num_query_groups|linear_num_key_heads", KEY_VALUE_HEADS),
    (r"(mamba_)?(n_groups|ngroups)|mamba_n_groups", 2),
    (r"(mamba_num_heads|mamba_n_heads)", 8),
    (r"n_mamba_heads", 2),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"qk_head_dim", 2 * HEAD),
    (r"(mamba_head_dim|mamba_d_head|mamba_headdim)", HEAD),
    (r".*(_heads|n_head)|attention_heads|num_heads|linear_num_value_heads", HEADS),
    (r".*(head_dim|head_size|d_kv|dim_head|d_head|kv_channels|rotary_dim)", HEAD),
    (r".*(intermediate_size|ffn_dim|d_ff|dff|ffn_hidden_size|mlp_dim|dim_ff|n_inner).*", 48),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|moe_top_k|num_experts_per_.*)", 2),
    (r"(n_group|topk_group|num_expert_group)", 1),
    (r"(q|kv|o)_lora_rank", 16),
    (r".*(state_size|d_state)", 4),
    (r"(mamba_)?chunk_size", 8),
    (r"num_layers_per_stack", 2),
    (r"(num_hidden_layers|n_layers?|num_layers|.*_layers|layers|depth|.*_depth)", 2),
    (r"max_(position_embeddings|seq_len)|n_positions|n_ctx|seq_length|.*_position_embeddings", 64),
    (r"sliding_window|attention_window|local_attention|.*window_size", 4),
    (r"image_size|image_resolution", 32),
    (r"patch_size", 8),
    (r"pretraining_tp|num_channels|in_channels|spatial_merge_size|temporal_patch_size", None),
)
_RULES_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _RULES)
_TOKENS = re.compile(r".*(token_id|token_index|token_ids|_start_id|_end_id|_newline_id|_patch_id|_offset|_index)")
_FIRST_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_MISSING = {"head_dim": HEAD, "n_routed_experts": 4, "n_shared_experts": 1, "num_key_value_heads": HEADS}
_OF_HEADS, _OF_PAIRS = ("num_attention_heads", "n_heads"), ("num_key_value_heads", "num_kv_heads")
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")

# What the rules get wrong, by model type: dotted paths, `*.key` in every block that has the key.
_CONV = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
_ROPES = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
_ROPES |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_GLM = {"text_config.rope_parameters": _MROPE | {"partial_rotary_factor": 0.5}, "text_config.head_dim": 16}
_QWEN = {"text_config.rope_parameters": _MROPE}
_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
_ZAMBA |= {"attention_hidden_size": 64, "attention_head_dim": 16}
_DEEPSEEK = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "cohere_compass": {"text_config.rope_parameters": _ROPES},
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": _DEEPSEEK,
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "dots1": _DEEPSEEK,
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]}},
    "gemma3n_text": {"intermediate_size": 48},
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": 2},
    "hunyuan_vl": {"text_config.rope_parameters": _MROPE | {"mrope_section": [1, 1, 1, 1]}},
    "jamba": _JAMBA,
    "lfm2_moe": _CONV | {"num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2},
    "nemotron_h_omni": {"*.layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2},
    "paddleocr_vl": _QWEN,
    "qwen2_5_omni_thinker": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"num_blocks": 2},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA | {"n_mamba_heads": 8, "hybrid_layer_ids": [1, 3]},
    "step3p7": {"text_config.sliding_window": 4},
}


def shrunk(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A config as plain data with small numbers; per-layer lists keep one layer of each kind, in order."""
    found = dict(config)
    layers = next((config[key] for key in _LAYERS if isinstance(config.get(key), int)), 0)
    lists = {k: v for k, v in config.items() if isinstance(v, list) and layers > 1 and len(v) == layers}
    kept = _one_of_each(list(zip(*lists.values(), strict=True))) if lists else []
    for key, value in config.items():
        if not isinstance(key, str) or key == "per_layer_config":
            continue
        if isinstance(value, Mapping) and key not in ("rope_parameters", "rope_scaling", "id2label", "label2id"):
            found[key] = shrunk(value, f"{path}{key}.")
        elif key in lists:
            found[key] = [value[i] for i in kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            found[key] = _small(key, value)
        elif key == "eos_token_id" and value is not None:
            found[key] = 2
        elif value is None and key in _MISSING:
            found[key] = _MISSING[key]
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            found[key] = _rope(value)
    heads, pairs = (next((config[k] for k in keys if config.get(k)), 0) for keys in (_OF_HEADS, _OF_PAIRS))
    if heads and heads == pairs:
        found |= {key: HEADS for key in _OF_PAIRS if config.get(key)}
    if "qk_rope_head_dim" in config and config.get("head_dim") != config["qk_rope_head_dim"] and config.get("head_dim"):
        found["head_dim"] = 2 * HEAD
    if "num_heads" in config and ("expand" in config or "state_size" in config):
        found["num_heads"] = 8
    if isinstance(config.get("per_layer_config"), Mapping):
        own = {int(i): shrunk(values) for i, values in config["per_layer_config"].items()}
        found["per_layer_config"] = {kept.index(i): own[i] for i in own if i in kept}
    if kept:
        found |= {key: len(kept) for key in _LAYERS if isinstance(config.get(key), int)}
    return found


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings for heads of HEAD: the sections of positions in time, height and width are cut, too."""
    found = {key: _rope(value) if isinstance(value, Mapping) else value for key, value in rope.items()}
    if "mrope_section" in rope:
        found["mrope_section"] = [2, 1, 1]
    return found


def _one_of_each(kinds: list[Any]) -> list[int]:
    """The first layer of each kind, at least two layers."""
    first: dict[str, int] = {}
    for i, kind in enumerate(kinds):
        first.setdefault(repr(kind), i)
    chosen = sorted(first.values())[:6]
    return chosen if len(chosen) > 1 else [0, 1]


def _small(key: str, value: int) -> int:
    if key in _FIRST_TOKENS:
        return _FIRST_TOKENS[key]
    if _TOKENS.fullmatch(key):
        return value if value < VOCABULARY else VOCABULARY - 1 - value % 20
    for pattern, small in _RULES_COMPILED:
        if pattern.fullmatch(key):
            return value if small is None else min(value, small) if value > 0 else value
    return WIDTH if value >= 64 else value


def with_changes(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some keys changed, by dotted paths; `*.key` in every block that has it."""
    for path, value in changes.items():
        blocks = [config]
        *parents, key = path.split(".")
        if parents == ["*"]:
            blocks = [b for b in _blocks(config) if key in b]
        else:
            for parent in parents:
                blocks = [b[parent] for b in blocks]
        for block in blocks:
            block[key] = value
    return config


def _blocks(config: dict[str, Any]) -> list[dict[str, Any]]:
    inner = [value for value in config.values() if isinstance(value, dict)]
    return [config, *(each for block in inner for each in _blocks(block))]


def architectures() -> list[str]:
    """The model types that generate text."""
    from transformers.models.auto import modeling_auto as auto

    causal, pairs = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted({*causal, *pairs, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES})


def class_of(kind: str) -> str:
    """The class that a checkpoint of this model type is saved from."""
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    found = next(table[kind] for table in tables if kind in table)
    return found if isinstance(found, str) else found[0]


def tiny(kind: str) -> nn.Module:
    """A random model of a model type, with fewer than a million parameters where that can be."""
    import transformers
    from transformers import CONFIG_MAPPING

    own = CONFIG_MAPPING[kind]
    config = own.from_dict(with_changes(shrunk(own().to_dict()), CHANGES.get(kind, {})))
    torch.manual_seed(0)
    model = getattr(transformers, class_of(kind))(config)
    with torch.no_grad():  # biases and norms that are not at their first values would show
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()
