"""Which sizes in a config.json the tensors of known names contradict: widths, heads, inner sizes, experts."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from lewis.models.config_class import brings_class, ignores_head_dim, stated_size
from lewis.models.names import Shapes

# Key -> the tensors that have this size: the end of their names, how many dimensions, which of these, how many times.
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
# The last projection of an expert, or those of all: (experts, width, inner size), or the last two the other way round.
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(?:down_proj|w2)\.weight$")
_STACKED = ".experts.down_proj"
_INNER = ("moe_intermediate_size", "intermediate_size")
_HEADS = "num_attention_heads"


def unlike_names(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Dotted key -> what was expected, for each size of the language model that the tensors of known names do not have.

    A size that some of these tensors have is right: layers may differ.

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
    if not config.keys() & {"attention_head_dim", "linear_head_dim"}:  # of heads with other names
        for key, expected in _unlike_attention(config, shapes):
            yield f"{text}.{key}".lstrip("."), expected


def _unlike_places(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    for key, places in _PLACES.items():
        for end, dimensions, axis, times in places if _is_size(config.get(key)) else ():
            found = _sizes(shapes, end, dimensions, axis)
            if found and config[key] * times not in found:
                yield key, _of(found, end, times)


def _unlike_attention(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, str]]:
    heads, width = config.get(_HEADS), config.get("hidden_size")
    if not _is_size(heads) or not _is_size(width):
        return
    count, size = (stated_size(config, key) for key in ("num_key_value_heads", "head_dim"))
    key = "num_key_value_heads" if size is None else "head_dim"
    count, size = heads if count is None else count, width // heads if size is None else size
    given = _sizes(shapes, ".self_attn.k_proj.weight", 2, 0)
    if count * size not in given and count * (width // heads) in given and ignores_head_dim(config):
        size = width // heads
    if given and count * size not in given:
        yield key, f"keys of {_listed(given)} numbers, which the tensors k_proj give"
    latent = _sizes(shapes, ".self_attn.kv_b_proj.weight", 2, 0)
    before, of_value = config.get("qk_nope_head_dim"), config.get("v_head_dim")
    if latent and _is_size(before) and _is_size(of_value) and heads * (before + of_value) not in latent:
        yield _HEADS, f"heads of {_listed(latent)} numbers in all, which the tensors kv_b_proj give"
    results = _sizes(shapes, ".self_attn.o_proj.weight", 2, 1)
    square = width in results and heads * size in _sizes(shapes, ".self_attn.q_proj.weight", 2, 0)  # Helium's
    alike = not of_value and not any(key.startswith(f"{_HEADS}_") for key in config)  # in all layers, keys as values
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
        (_INNER, inner, "by the tensors of experts"),
    ):
        given = {key: config[key] for key in keys if _is_size(config.get(key))}
        by_kind = any(isinstance(config.get(key), list) for key in keys)  # of experts (Ernie 4.5 VL)
        if not by_kind and found and given and found.isdisjoint(given.values()):
            yield next(iter(given)), f"{_listed(found)}, {what}"


def _sizes(shapes: Shapes, end: str, dimensions: int, axis: int) -> set[int]:
    return {shape[axis] for name, shape in shapes.items() if name.endswith(end) and len(shape) == dimensions}


def _of(found: set[int], end: str, times: int) -> str:
    return f"{_listed({each // times for each in found})}, by the tensors {end[1:]}"


def _listed(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
