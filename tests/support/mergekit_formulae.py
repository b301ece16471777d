"""What mergekit's example configs ask for, by a plain implementation of the methods' formulae on tiny Llamas."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

LAYERS, HIDDEN, INNER, VOCABULARY = 5, 4, 6, 65
Tensors = dict[str, torch.Tensor]
CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "head_dim": 4},
    **{"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY, "num_attention_heads": 1},
}
SHAPES = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
for _i in range(LAYERS):
    _at = f"model.layers.{_i}"
    SHAPES |= {f"{_at}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    SHAPES |= {f"{_at}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
    SHAPES |= {f"{_at}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("up", "gate")}
    SHAPES |= {f"{_at}.mlp.down_proj.weight": (HIDDEN, INNER)}
SHAPES["lm_head.weight"] = (VOCABULARY, HIDDEN)


def at(setting: Any, name: str, t: float) -> Any:
    """The value of a parameter for a tensor, at the position t of its slice."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        setting = next(rule["value"] for rule in setting if rule.get("filter", "") in name)
    if not isinstance(setting, list):
        return setting
    place = t * (len(setting) - 1)
    low = min(math.floor(place), len(setting) - 2)
    return setting[low] + (place - low) * (setting[low + 1] - setting[low])


def by_linear(models: list[torch.Tensor], base: Any, weights: list[float], values: dict[str, Any]) -> torch.Tensor:
    return sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)


def by_slerp(models: list[torch.Tensor], base: torch.Tensor, weights: Any, values: dict[str, Any]) -> torch.Tensor:
    [other], t = models, values["t"]
    cosine = torch.sum(base * other) / base.norm() / other.norm()
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * base + torch.sin(t * angle) * other) / torch.sin(angle)


def by_ties(
    models: list[torch.Tensor], base: torch.Tensor, weights: list[float], values: dict[str, Any]
) -> torch.Tensor:
    moved = []
    for model, weight, density in zip(models, weights, values["density"], strict=True):
        delta = model - base
        kept = int(density * delta.numel())
        order = delta.abs().flatten().argsort(descending=True)
        mask = torch.zeros(delta.numel()).index_fill(0, order[:kept], 1).reshape(delta.shape)
        moved.append(delta * mask * weight)
    stacked = torch.stack(moved)
    agree = stacked.sign() == stacked.sum(0).sign()
    factor = torch.tensor(weights).reshape(-1, *[1] * base.dim()).expand_as(stacked)
    total = torch.where(agree & (stacked != 0), factor, 0.0).sum(0) if values["normalize"] else torch.ones_like(base)
    return base + torch.where(agree, stacked, 0.0).sum(0) / torch.where(total == 0, 1.0, total)


METHODS: dict[str, Callable[..., torch.Tensor]] = {"linear": by_linear, "slerp": by_slerp, "ties": by_ties}


def expected(data: dict[str, Any], place: Path) -> Tensors:
    """What one document gives, of models that are folders in `place`."""
    known = {name: load_file(place / name / "model.safetensors") for name in "abcd"}
    base_name = data.get("base_model")
    slices = data.get("slices") or [{"sources": [{**entry, "layer_range": [0, LAYERS]} for entry in data["models"]]}]
    found, first = {}, 0
    for number, each in enumerate(slices):
        start, stop = each["sources"][0]["layer_range"]
        rows: list[tuple[str, Callable[[dict[str, Any]], str], float]] = []
        if number == 0:
            rows.append(("model.embed_tokens.weight", lambda s: "model.embed_tokens.weight", 0.0))
        for i in range(stop - start):
            t = i / (stop - start - 1)
            for name in (n for n in SHAPES if n.startswith("model.layers.0.")):
                suffix = name.removeprefix("model.layers.0.")
                own = lambda s, i=i, suffix=suffix: f"model.layers.{s['layer_range'][0] + i}.{suffix}"  # noqa: E731
                rows.append((f"model.layers.{first + i}.{suffix}", own, t))
        if number == len(slices) - 1:
            rows += [(name, lambda s, name=name: name, 0.0) for name in ("model.norm.weight", "lm_head.weight")]
        sources = [s for s in each["sources"] if s["model"] != base_name or data["merge_method"] == "linear"]
        if base_name and not data.get("slices"):
            each["sources"].append({"model": base_name, "layer_range": [0, LAYERS]})
        for name, own, t in rows:
            models = [known[s["model"]][own(s)] for s in sources]
            if data["merge_method"] == "passthrough":
                [found[name]] = models
                continue
            base = next((known[s["model"]][own(s)] for s in each["sources"] if s["model"] == base_name), None)
            common = data.get("parameters", {})
            values = {key: at(value, name, t) for key, value in common.items()}
            weights = [at(s.get("parameters", {}).get("weight", 1.0), name, t) for s in sources]
            values["density"] = [at(s.get("parameters", {}).get("density", 1.0), name, t) for s in sources]
            found[name] = METHODS[data["merge_method"]](models, base, weights, values)
        first += stop - start
    return found
