"""Check a config.json against its class and the tensors: widths, depths, heads, inner sizes, rows, experts."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from lewis.errors import InputError
from lewis.models.config_class import added_rows, brings_class, check_values, ignores_head_dim, stated_size, takes_null
from lewis.models.names import EMBEDDINGS, Shapes, in_layers

_WIDTHS = ("hidden_size", "n_embd", "n_embed", "d_model")  # each is a dimension of some tensor
_PARTS = ("num_attention_heads", "n_head", "num_key_value_heads", "head_dim")  # each divides a dimension of some tensor
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")  # null: the class computes it
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
_COUNTS = (*_WIDTHS, *_PARTS, *_INNER, *_DEPTHS, "vocab_size")
_POSITIONS = ("max_position_embeddings", "n_positions")
_LAYER = re.compile(r"(.*?(?:^|\.)(?:layers|h|blocks|encoder\.layer))\.(\d+)\.")
# Key -> tensors with a dimension of this size: end of name, number of dimensions, its index, its multiple of the size.
_PLACES: dict[str, tuple[tuple[str, int, int, int], ...]] = {
    "hidden_size": ((".input_layernorm.weight", 1, 0, 1),),
    "n_embd": ((".ln_1.weight", 1, 0, 1),),
    "intermediate_size": (
        (".mlp.up_proj.weight", 2, 0, 1),
        (".mlp.down_proj.weight", 2, 1, 1),
        (".mlp.gate_up_proj.weight", 2, 0, 2),
    ),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# The last projection of one expert, or of all in one tensor: (experts, width, inner size), or the last two swapped.
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(?:down_proj|w2)\.weight$")
_STACKED = ".experts.down_proj"
_EXPERT_INNER = ("moe_intermediate_size", "intermediate_size")
_HEADS = "num_attention_heads"


def check_config(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Check the values of a config by the class of its `model_type`, and its sizes by the tensors.

    Where a config describes several towers (`text_config`, `vision_config`), its sizes must fit one of them.

    Raises:
        InputError: naming the key and the tensors that contradict it.
    """
    _check_numbers(folder, config, shapes)
    check_values(folder, config)
    rows = {name: shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS) and shape}
    stated = set(_stated(config, "vocab_size"))
    blocks = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    more = {*_stated(config, "additional_vocab_size"), *(each for block in blocks for each in added_rows(block))}
    beyond = {count + each for count in stated for each in more}
    if rows and stated and not (stated | beyond) & set(rows.values()):
        name, count = next(iter(rows.items()))
        raise InputError(
            f"{folder}: config.json says vocab_size {_listed(stated, ' and ')}, but {name!r} has {count} rows; "
            "the config belongs to another model"
        )
    stacks = _stacks(shapes)
    stated = set(_stated(config, "num_hidden_layers", "n_layer"))
    others = set(_stated(config, "num_layers_per_stack", "num_blocks"))  # keys of HRM and xLSTM
    spare = max(_stated(config, "num_nextn_predict_layers"), default=0)  # stored after the counted layers
    if (
        stacks
        and stated
        and not any(count - more in stated | others for count in stacks.values() for more in {0, spare})
    ):
        prefix, count = max(stacks.items(), key=lambda stack: stack[1])
        raise InputError(
            f"{folder}: config.json says num_hidden_layers {_listed(stated, ' and ')}, but the tensors {prefix}.* are "
            f"of {count} layers; the config belongs to another model"
        )


def _check_numbers(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Check the sizes that a config gives, of the whole model and of its `text_config`, without building the network.

    The width must be a dimension of some tensor, and heads must divide one; the inner size and the vocabulary must not
    be larger than there are tensors for. Of several towers each is checked against all tensors. Whether the class of
    the config takes null for an inner size is left to `check_values`. InputError names key, expected and given.
    """
    sizes = {size for shape in shapes.values() for size in shape}
    spared = {"head_dim"} | (set() if in_layers(shapes) else {*_DEPTHS})  # keys that may be 0
    embeds = any(name.endswith(EMBEDDINGS) for name in shapes)  # whose rows `check_config` compares
    text = config.get("text_config") or {}
    for where, block in (("", config), ("text_config.", text)):
        given = {key: block[key] for key in (*_COUNTS, *_POSITIONS) if key in block}
        for key, value in given.items():
            optional = key in (*_PARTS[2:], *_INNER) or (key == "vocab_size" and takes_null(block, key))
            if value is None and optional:
                continue
            against = set() if key == "vocab_size" and embeds else sizes
            if expected := _unlike_size(key, value, 0 if key in spared else 1) or _unlike_tensors(key, value, against):
                raise InputError(
                    f"{folder}: config.json: {where}{key}: expected {expected}, got {str(value)[:80]}; no network can "
                    "be built of it: take the config.json that came with these weights"
                )
    for key, expected in (*_unlike_names(config, shapes), *_unlike_biases(config, shapes)):
        raise InputError(
            f"{folder}: config.json: {key}: expected {expected}, got {_at(config, key)}; take the config.json that "
            "came with these weights"
        )
    if _holds_nan(config):
        raise InputError(f"{folder}: config.json: holds NaN; take the config.json that came with these weights")


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None if the config does not say."""
    block, _, last = key.rpartition(".")
    return (config[block] if block else config).get(last)


def _unlike_size(key: str, value: Any, least: int) -> str:
    """What was expected of a size in config.json, for an error message; empty if the value is a valid size.

    A list or mapping holds a size for each layer or tower; all are checked.
    """
    each = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    if key in _POSITIONS:  # transformers has defaults that are no whole numbers
        fine = all(isinstance(one, int | float) and not isinstance(one, bool) and 0 < one < math.inf for one in each)
        return "" if fine else "a number above 0"
    fine = all(isinstance(one, int) and not isinstance(one, bool) and one >= least for one in each)
    return "" if fine and each else "a whole number above 0"


def _unlike_tensors(key: str, value: Any, sizes: Collection[int]) -> str:
    """What was expected of a size by the tensors' shapes, for an error message; empty if it fits or is no number."""
    if not isinstance(value, int) or not value or not sizes:
        return ""
    if key in _WIDTHS and value not in sizes:
        return "a dimension of one of the tensors"
    if key in _PARTS and all(size % value for size in sizes):
        return "a number that divides a dimension of one of the tensors"
    most = max(sizes) * (4 if key in _INNER else 1)  # some networks use two thirds of this
    if key in (*_INNER, "vocab_size") and value > most:
        return f"at most {most}, by the largest dimension of the tensors"
    return ""


def _unlike_biases(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Yield key and expected value, where a config gives biases to a part that has none."""
    for key, part in (("attention_bias", "att"), ("mlp_bias", "mlp")):
        if config.get(key) is True and not any(part in name and name.endswith(".bias") for name in shapes):
            yield key, "false, as no tensor is such a bias"


def _holds_nan(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isnan(value)


def _stated(config: Mapping[str, Any], *keys: str) -> Iterator[int]:
    """Yield the whole numbers above 0 that a config, or a block in it, gives for one of the keys."""
    for block in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in keys:
            if is_size(value := block.get(key)):
                yield value


def _stacks(names: Mapping[str, Any]) -> dict[str, int]:
    """Count the layers of each stack: the part of its tensors' names before the number -> layers."""
    found: dict[str, int] = {}
    for name in names:
        if match := _LAYER.match(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _unlike_names(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Yield dotted key and expected value for each size of the language model that no tensor of a known name has.

    One tensor of that size is enough, since layers may differ.

    Args:
        config: parsed.
        shapes: of the model's tensors.
    """
    if brings_class(config):
        return
    inner, text = any(isinstance(value, dict) and "hidden_size" in value for value in config.values()), ""
    if inner:
        text = "text_config"
        config = given if isinstance(given := config.get(text), dict) else {}
        named = {name: shape for name, shape in shapes.items() if "language_model." in name}
        shapes = named or {name: shape for name, shape in shapes.items() if name.startswith("model.layers.")}
    for key, expected in (*_unlike_places(config, shapes), *_unlike_experts(config, shapes)):
        yield f"{text}.{key}".lstrip("."), expected
    if not config.keys() & {"attention_head_dim", "linear_head_dim"}:  # head sizes under other names
        for key, expected in _unlike_attention(config, shapes):
            yield f"{text}.{key}".lstrip("."), expected


def _unlike_places(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    for key, places in _PLACES.items():
        for end, dimensions, axis, times in places if is_size(config.get(key)) else ():
            found = _sizes(shapes, end, dimensions, axis)
            if found and config[key] * times not in found:
                yield key, _of(found, end, times)


def _unlike_attention(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    heads, width = config.get(_HEADS), config.get("hidden_size")
    if not is_size(heads) or not is_size(width):
        return
    count, size = (stated_size(config, key) for key in ("num_key_value_heads", "head_dim"))
    key = "num_key_value_heads" if size is None else "head_dim"
    count, size = heads if count is None else count, width // heads if size is None else size
    given = _sizes(shapes, ".self_attn.k_proj.weight", 2, 0)
    if count * size not in given and count * (width // heads) in given and ignores_head_dim(config):
        size = width // heads
    if given and count * size not in given:
        found = f"{_listed(given)} numbers in all"
        yield key, f"keys of {found}, which the tensors k_proj give and {count} heads of {size} do not"
    latent = _sizes(shapes, ".self_attn.kv_b_proj.weight", 2, 0)
    before, of_value = config.get("qk_nope_head_dim"), config.get("v_head_dim")
    if latent and is_size(before) and is_size(of_value) and heads * (before + of_value) not in latent:
        yield _HEADS, f"heads of {_listed(latent)} numbers in all, which the tensors kv_b_proj give"
    results = _sizes(shapes, ".self_attn.o_proj.weight", 2, 1)
    square = width in results and heads * size in _sizes(shapes, ".self_attn.q_proj.weight", 2, 0)  # Helium's
    alike = not of_value and not any(key.startswith(f"{_HEADS}_") for key in config)  # all layers, and keys and values
    if alike and results and heads * size not in results and not square:
        yield _HEADS, f"heads of {_listed(results)} numbers in all, which the tensors o_proj take"
    fused = _sizes(shapes, ".self_attn.qkv_proj.weight", 2, 0)
    if fused and fused.isdisjoint({(heads + 2 * count) * size, 3 * heads * size}):
        yield _HEADS, f"queries, keys and values of {_listed(fused)} numbers in all, which the tensors qkv_proj give"


def _unlike_experts(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    counts, inner = dict[str, int](), set[int]()
    for name, shape in shapes.items():
        if (match := _EXPERT.match(name)) and len(shape) == 2:
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
            inner.add(shape[1])
        elif name.endswith(_STACKED) and len(shape) == 3:
            counts[name] = shape[0]
            inner |= {*shape[1:]}
    for keys, found, what in (
        (_EXPERTS, {*counts.values()}, "as many as there are tensors of experts"),
        (_EXPERT_INNER, inner, "by the tensors of experts"),
    ):
        given = {key: config[key] for key in keys if is_size(config.get(key))}
        by_kind = any(isinstance(config.get(key), list) for key in keys)  # a list for kinds of experts (Ernie 4.5 VL)
        if not by_kind and found and given and found.isdisjoint(given.values()):
            yield next(iter(given)), f"{_listed(found)}, {what}"


def _sizes(shapes: Shapes, end: str, dimensions: int, axis: int) -> set[int]:
    return {shape[axis] for name, shape in shapes.items() if name.endswith(end) and len(shape) == dimensions}


def _of(found: set[int], end: str, times: int) -> str:
    return f"{_listed({each // times for each in found})}, by the tensors {end[1:]}"


def _listed(numbers: set[int], word: str = " or ") -> str:
    return word.join(map(str, sorted(numbers)))


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value of a config is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
