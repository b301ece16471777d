"""The config of a model whose layers were stacked: their number, and everything that it says layer by layer.

A config says of which kind a layer is in three ways: by a list with an item for each layer (`layer_types`), by a list
of layers' numbers (`mlp_only_layers`), or by a rule (every sixth, the first three). Lists are written again for the
new order of layers. A rule is kept if it gives the new numbers the same kinds; some rules are written as the list that
transformers derives from them. Else the stack is refused, since layers would be run as layers of another kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.models.config import is_size
from lewis.models.layers.slices import Slice
from lewis.models.rehearsed import completed

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUMBERS = (  # lists of numbers
    *("mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "hybrid_layer_ids"),
    *("attn_layer_indices", "moe_layers"),
)
_NOT_FOLLOWED = ("moe_layers_enum", "full_attn_layers", "kda_layers")  # numbers as text or from 1, in `_NESTED`
_NESTED = "linear_attn_config"
_NO_LAYERS = ("architectures", "token_id", "token_ids", "bad_words_ids", "suppress_tokens")  # ends of other lists' keys
_TEXTS = ("hybrid_override_pattern",)  # a letter for each layer
_DERIVED = (  # transformers derives a list from these
    *("sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"),
    *("global_attn_every_n_layers", "no_rope_layer_interval"),
)


def _in_sparse_range(block: Mapping[str, Any], i: int) -> bool:
    """Whether a layer of Ernie 4.5 lies between the first and the last that may be sparse; -1: up to the end."""
    end = block.get("moe_layer_end_index", -1)
    return block.get("moe_layer_start_index", 1) <= i and (end == -1 or i <= end)


_RULES: dict[str, Callable[[Mapping[str, Any], int], bool]] = {  # key -> whether a layer is of the other kind
    "first_k_dense_replace": lambda block, i: i < block["first_k_dense_replace"],
    "num_dense_layers": lambda block, i: i < block["num_dense_layers"],
    "decoder_sparse_step": lambda block, i: (i + 1) % block["decoder_sparse_step"] == 0,
    "interleave_moe_layer_step": lambda block, i: (i + 1) % block["interleave_moe_layer_step"] == 0,
    "moe_layer_freq": lambda block, i: i % block["moe_layer_freq"] == 0,
    "moe_layer_interval": lambda block, i: (i + 1) % block["moe_layer_interval"] == 0 and _in_sparse_range(block, i),
    "attn_layer_period": lambda block, i: i % block["attn_layer_period"] == block.get("attn_layer_offset", 0),
    "expert_layer_period": lambda block, i: i % block["expert_layer_period"] == block.get("expert_layer_offset", 0),
}
_SHARING = {"num_kv_shared_layers": 1, "num_hidden_groups": 2}  # key -> the least value that makes layers share


@dataclass(frozen=True)
class Origin:
    """Where a layer of the result comes from.

    Attributes:
        ref: of the model, for error messages.
        home: the folder with its config.json.
        config: its parsed config.json.
        layer: number of the layer there.
        layers: how many layers the model has.
    """

    ref: str
    home: Path
    config: Mapping[str, Any]
    layer: int
    layers: int


_Merged = Sequence[Origin]
"""The layers that a layer of the result is merged from; each `config` is the part about layers, by `_with_derived`."""


def origins_of(
    slices: Sequence[Slice],
    homes: Mapping[str, Path],
    configs: Mapping[str, Mapping[str, Any]],
    counts: Mapping[str, int],
) -> list[list[Origin]]:
    """Return, for each layer of the result, the layers that it is merged from: that which gives the names first.

    Args:
        slices: all of a config.
        homes: model -> the folder with its config.json.
        configs: model -> its parsed config.json.
        counts: model -> how many layers it has.
    """
    return [
        [Origin(ref, homes[ref], configs[ref], each.starts[ref] + i, counts[ref]) for ref in each.in_order]
        for each in slices
        for i in range(each.count)
    ]


def restacked(config: Mapping[str, Any], home: Path, origins: Sequence[Sequence[Origin]]) -> dict[str, Any]:
    """Return the config of a result whose layers are stacked.

    Args:
        config: of the model that gives all that is not about layers.
        home: its folder.
        origins: for each layer of the result, what it is merged from; the first decides of which kind it is.

    Raises:
        InputError: if the config does not say how many layers there are, models that are merged into one layer have
            layers of different kinds there, a rule would give the new numbers other kinds, layers share by number, or
            a config gives kinds in a way that is not followed.
    """
    found: dict[str, Any] = json.loads(json.dumps(config))
    block = _block(found)
    if "decoder_layers" in block:
        raise InputError(
            f"{home / 'config.json'}: slices: decoder_layers: the model is a decoder made for an encoder; use models"
        )
    keys = _counts(block, home, inner=block is not found)
    of_model = {each.ref: each for merged in origins for each in merged}
    known = {ref: _with_derived(each) for ref, each in of_model.items()}
    own = [[replace(each, config=known[each.ref]) for each in merged] for merged in origins]
    lists = (key for first, *_ in own for key, value in first.config.items() if _is_list(key, value, first.layers))
    listed = list(dict.fromkeys(lists))
    _follow_layers(block, own, listed)
    for key, rule in _RULES.items():
        if key not in listed and is_size(block.get(key)):
            _keep_rule(key, rule, block, own)
    if shares := next((key for key, least in _SHARING.items() if (block.get(key) or 0) >= least), None):
        raise InputError(
            f"{home / 'config.json'}: slices: {shares}: layers take from others by their number; use models"
        )
    block.update(dict.fromkeys(keys, len(origins)))
    for key in [*listed, *_NUMBERS, *_RULES, *keys] if block is not found else ():
        found |= {key: block[key]} if key in found and key in block else {}  # Qwen2.5-VL states it twice
    return found


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the keys that `restacked` has changed in the part of a config that is about layers."""
    old, new = _block(dict(before)), _block(dict(after))
    return [key for key in new if new[key] != old.get(key)]


def _counts(block: dict[str, Any], home: Path, *, inner: bool) -> list[str]:
    """Return the keys that give the number of layers; an inner block of a config leaves out default values."""
    keys = [key for key in _COUNTS if isinstance(block.get(key), int)]
    if not keys and not inner:
        raise InputError(f"{home / 'config.json'}: slices: none of {', '.join(_COUNTS)} says how many layers there are")
    return keys or [_COUNTS[0]]


def _follow_layers(block: dict[str, Any], own: Sequence[_Merged], listed: Sequence[str]) -> None:
    """Fill in the lists of the result's config that depend on its layers.

    Two kinds: lists with an item for each layer, such as `layer_types`, and lists of layer numbers.

    Args:
        block: of the result's config; changed in place.
        own: the layers of the result.
        listed: keys of the lists with an item for each layer.
    """
    for key in listed:
        values = [[_at(each, key) for each in layer] for layer in own]
        _check_alike(key, own, values)
        firsts = [of_layer[0] for of_layer in values]
        block[key] = "".join(firsts) if key in _TEXTS else firsts
    for key in _NUMBERS:
        if any(layer[0].config.get(key) for layer in own):
            values = [[each.layer in (each.config.get(key) or ()) for each in layer] for layer in own]
            _check_alike(key, own, values)
            block[key] = [i for i, of_layer in enumerate(values) if of_layer[0]]


def _block(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that is about layers: in a model with other towers, that of its language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _with_derived(origin: Origin) -> dict[str, Any]:
    """The part of a config about layers, with the per-layer lists that transformers derives from its other keys."""
    block = _block(dict(origin.config))
    _check_followed(block, origin.home)
    if isinstance(pattern := block.get("block_types"), list):  # of the first layers, and repeated
        block = {**block, "block_types": (pattern * origin.layers)[: origin.layers]}
    alike = "sliding_window" if block.get("use_sliding_window") is False else ""
    rules = [key for key in _DERIVED if block.get(key) and key != alike]
    whole = "text_config" not in origin.config  # a block in a larger config leaves out default values
    if (whole and not rules) or "layer_types" in block:
        return block
    asked = next(iter(rules), "text_config")
    made = completed(origin.home, origin.config)
    if made is None:
        raise InputError(
            f"{origin.home / 'config.json'}: slices: {asked} says of which kind layers are, and transformers cannot "
            "tell, as it does not know the model_type; write layer_types into the config, or use models"
        )
    lists = {key: value for key, value in _block(made).items() if _is_list(key, value, origin.layers)}
    added = {key: value for key, value in lists.items() if key not in block}
    if rules and not added and rules != ["sliding_window"]:  # a sliding window may hold for all layers
        raise InputError(
            f"{origin.home / 'config.json'}: slices: {rules[0]} says of which kind layers are by number, and there is "
            "no list that could follow them; write layer_types into the config, or use models"
        )
    return {**block, **added}


def _check_followed(block: Mapping[str, Any], home: Path) -> None:
    """Raise InputError if a config says of which kind layers are by numbers that are not followed."""
    given = [key for key in _NOT_FOLLOWED if block.get(key) or (block.get(_NESTED) or {}).get(key)]
    given += [key for key in ("moe_layer_start_index",) if isinstance(block.get(key), list)]  # for text and for images
    if given:
        raise InputError(
            f"{home / 'config.json'}: slices: {given[0]} says of which kind layers are by number, in a way that is not "
            "followed; use models"
        )


def _is_list(key: str, value: Any, layers: int) -> bool:
    """Whether a value is a list with an item for each layer."""
    if key in _NUMBERS or key.endswith(_NO_LAYERS):
        return False
    return len(value) == layers if isinstance(value, list) or (isinstance(value, str) and key in _TEXTS) else False


def _at(origin: Origin, key: str) -> Any:
    value: Any = origin.config.get(key)
    if not _is_list(key, value, origin.layers):
        raise InputError(f"{origin.home / 'config.json'}: slices: expected {key} with {origin.layers} items, one for "
                         f"each layer, as another of the models has; got {value!r:.100}")  # fmt: skip
    return value[origin.layer]


def _check_alike(key: str, own: Sequence[_Merged], values: Sequence[Sequence[Any]]) -> None:
    for number, (layer, of_layer) in enumerate(zip(own, values, strict=True)):
        for each, value in zip(layer, of_layer, strict=True):
            if value != of_layer[0]:
                first = layer[0]
                raise InputError(
                    f"slices: layer {number} of the result would be merged from layers of different kinds: {key} is "
                    f"{of_layer[0]!r} for layer {first.layer} of {first.ref}, {value!r} for layer {each.layer} of "
                    f"{each.ref}; change layer_range"
                )


def _keep_rule(
    key: str,
    rule: Callable[[Mapping[str, Any], int], bool],
    block: dict[str, Any],
    own: Sequence[_Merged],
) -> None:
    """Keep a rule if it holds for the new numbers, else raise InputError; its first and last layers are adjusted."""
    values = [[is_size(each.config.get(key)) and rule(each.config, each.layer) for each in layer] for layer in own]
    _check_alike(key, own, values)
    kinds = [of_layer[0] for of_layer in values]
    if key in ("first_k_dense_replace", "num_dense_layers"):
        block[key] = kinds.index(False) if False in kinds else len(kinds)
    if key == "moe_layer_interval":
        sparse = [number for number, kind in enumerate(kinds) if kind] or [len(kinds)]
        block["moe_layer_start_index"], block["moe_layer_end_index"] = sparse[0], sparse[-1]
    for number, (kind, layer) in enumerate(zip(kinds, own, strict=True)):
        if rule(block, number) != kind:
            first = layer[0]
            raise InputError(
                f"slices: {key} of {first.home / 'config.json'} says by their number of which kind layers are: layer "
                f"{first.layer} would become layer {number}, which is of another kind; change layer_range"
            )
