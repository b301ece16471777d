"""Export a guided recipe as a plain mergekit config: each LEWIS density becomes a filter on one tensor's name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lewis.allocation.densities import Allocation
from lewis.errors import InputError
from lewis.methods import find
from lewis.models.files.folder import is_of_gguf
from lewis.models.source import Source
from lewis.recipe.block import model_name
from lewis.recipe.config import MergeConfig
from lewis.recipe.dialect import as_recipe
from lewis.recipe.schema import Lewis

_THEIRS = MergeConfig.model_fields.keys() - {"anchor", "exclude", "output", "seed"}


def check_exportable(config: MergeConfig, guide: Lewis | None) -> None:
    """Raise InputError if mergekit does not know the method, or cannot do what the config or the guide asks for."""
    if config.slices:
        raise InputError(
            "slices: export writes `models`, with densities by the names of their tensors; without the blocks that "
            "mergekit lacks, a recipe with slices is a config of mergekit as it is"
        )
    if guide is not None and guide.prune_by == "activation":
        raise InputError(
            "lewis.prune_by: mergekit keeps elements by magnitude, it cannot prune by activation; merge with LEWIS, or "
            "export with --set lewis.prune_by=magnitude, which is another merge"
        )
    if guide is not None and guide.aim is not None:
        raise InputError("lewis.aim: mergekit has nothing like it; this recipe runs in LEWIS only")
    if config.output.kind != "full":
        raise InputError("output.kind: mergekit writes full models; use full (--set output=null)")
    if config.exclude:
        raise InputError("exclude: mergekit has nothing like it; this recipe runs in LEWIS only")
    method = find(config.merge_method)
    if method.origin or not method.in_mergekit:
        raise InputError(
            f"merge_method: mergekit has no method {config.merge_method!r}; this recipe runs in LEWIS only"
        )


def to_mergekit(
    text: str,
    config: MergeConfig,
    guide: Lewis | None,
    base: Source | None,
    experts: Sequence[Source],
    allocations: Mapping[str, Allocation],
) -> str:
    """Return the config that makes mergekit do this merge.

    Models are named by their commits, or by absolute folders. mergekit finds filters as substrings, first match first,
    so longer names come first.

    Args:
        text: the recipe, as YAML.
        config: its merge part.
        guide: its `lewis` block.
        base, experts: the pinned models, the experts in the order of `config.experts`.
        allocations: expert -> densities; empty for a plain merge.

    Returns:
        The config as YAML.

    Raises:
        InputError: as `check_exportable`, or if an expert is an adapter on an adapter, a model is a GGUF file, or a
            folder has a + or @ in its path.
    """
    check_exportable(config, guide)
    data: dict[str, Any] = {key: value for key, value in as_recipe(yaml.safe_load(text)).items() if key in _THEIRS}
    names = {entry.model: _pinned_name(source) for entry, source in zip(config.experts, experts, strict=True)}
    if base is not None and config.base_model is not None:
        names[config.base_model] = data["base_model"] = _pinned_name(base)
    written = []
    for entry, raw in zip(config.models, data["models"], strict=True):
        block = {key: value for key, value in raw.items() if key != "calibration"}
        block["model"] = names[entry.model]
        allocated = allocations.get(entry.model)
        if allocated is not None:
            block["parameters"] = _guided(raw.get("parameters") or {}, data.get("parameters") or {}, allocated)
        written.append(block)
    data["models"] = written
    _pin_tokenizer(data, names)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=200)


def _pin_tokenizer(data: dict[str, Any], names: Mapping[str, str]) -> None:
    """Replace the names of the models that the tokenizer and its tokens' rows come from by their pinned names."""
    tokenizer = data.get("tokenizer") or {}
    places = [(data, "tokenizer_source"), (tokenizer, "source")]
    for token in tokenizer.get("tokens", {}).values():
        source = token.get("source")
        places.append((source, "model") if isinstance(source, dict) and "kind" in source else (token, "source"))
    for block, key in places:
        if (name := model_name(block.get(key))) in names:
            block[key] = names[name]


def _guided(own: Mapping[str, Any], common: Mapping[str, Any], allocated: Allocation) -> dict[str, Any]:
    """Set the densities in an expert's parameters; mergekit fails on density 0, so weight 0 stands for it."""
    longest_first = sorted(allocated.densities.items(), key=lambda item: (-len(item[0]), item[0]))
    kept = [{"filter": tensor, "value": density} for tensor, density in longest_first if density > 0]
    left_out = [{"filter": tensor, "value": 0.0} for tensor, density in longest_first if density == 0]
    if not left_out:
        return {**own, "density": kept}
    # Where no filter of an expert matches a tensor, mergekit takes the common setting, as LEWIS does. So only the
    # expert's own filters are repeated here.
    return {**own, "density": kept, "weight": left_out + _as_filters(own.get("weight", common.get("weight", 1.0)))}


def _as_filters(setting: Any) -> list[Any]:
    if isinstance(setting, list) and all(isinstance(item, dict) for item in setting):
        return setting
    return [setting if isinstance(setting, dict) else {"value": setting}]


def _pinned_name(source: Source) -> str:
    if source.under:
        raise InputError(f"{source.ref}: mergekit puts one adapter on a model; merge the first ones into it before")
    if is_of_gguf(Path(source.model.source)):
        raise InputError(f"{source.ref}: mergekit reads no GGUF file; use the model's safetensors")
    parts = (source.model, *source.adapters)
    if plus := next((part.source for part in parts if "+" in part.source), None):
        raise InputError(f"{plus}: mergekit takes a + in a name for the start of an adapter's; rename the folder")
    if at := next((part.source for part in parts if "@" in part.source), None):
        raise InputError(f"{at}: mergekit takes an @ in a name for the start of a revision; rename the folder")
    return "+".join(part.source if part.is_local else f"{part.source}@{part.commit}" for part in parts)
