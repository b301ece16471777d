"""Presets of the `lewis` block: several settings under one name."""

from collections.abc import Iterator, Mapping
from typing import Any

# What the LEWIS authors' code does (arXiv 2503.03874). Their configs set the settings in FREE, so a recipe may too.
OFFICIAL: dict[str, dict[str, Any]] = {
    "calibration": {"samples": 15, "max_tokens": 512, "seed": 42, "padding": "max_tokens"},
    "importance": {"metric": "norm_difference", "prune_ratio": 0.5, "reduce": "sum"},
    "density": {
        **{"strategy": "lewis", "min": 0.3, "max": 0.8, "budget": None},
        **{"scale": "minmax", "decimals": 5, "uncovered": "expert"},
    },
}
RECOMMENDED = "regmean_forward"  # what `merge_method: recommended` stands for: see tests/benchmarks/results.md
PRESETS = {"lewis_official": OFFICIAL}
GUIDES = ("preset", "importance", "prune_by", "aim", "density")  # keys of the `lewis` block that decide densities
FREE = ("samples", "max_tokens", "seed", "min", "max", "prune_ratio")


def with_preset(block: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's `lewis` block, with its preset's value for each setting that the recipe leaves out."""
    preset = PRESETS.get(str(block.get("preset")))
    if preset is None:
        return dict(block)
    filled = dict(block)
    for name in ("importance", "density"):
        if isinstance(block.get(name) or {}, dict):
            filled[name] = {**preset[name], **(block.get(name) or {})}
    if isinstance(block.get("calibrations"), dict):
        filled["calibrations"] = {
            name: {**preset["calibration"], **each} if isinstance(each, dict) else each
            for name, each in block["calibrations"].items()
        }
    return filled


def contradictions(block: Mapping[str, Any]) -> Iterator[str]:
    """Problems: the settings of a recipe that contradict its preset."""
    preset = PRESETS.get(str(block.get("preset")))
    if preset is None:
        return
    found = block.get("calibrations")
    sets: dict[str, Any] = found if isinstance(found, dict) else {}
    places: dict[str, tuple[str, Any]] = {name: (name, block.get(name)) for name in ("importance", "density")}
    places |= {f"calibrations.{name}": ("calibration", each) for name, each in sets.items()}
    for where, (kind, given) in places.items():
        for key, value in given.items() if isinstance(given, dict) else ():
            wanted = preset[kind].get(key, value)
            if value != wanted and key not in FREE:
                yield f"lewis.{where}.{key}: preset {block['preset']} has {wanted!r}, got {value!r}; leave one out"
