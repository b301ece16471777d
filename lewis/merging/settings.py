"""The inputs of a merge: its settings, which are resolved from a config once, and the opened experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lewis.allocation.densities import Densities, ScalesByTensor
from lewis.importance.calibration import Calibration
from lewis.methods import Method, Parameter, find
from lewis.models.dtypes import MERGED
from lewis.models.hub.pin import find_folder
from lewis.models.layers.slices import Slice, slices_of
from lewis.models.model import Model
from lewis.recipe.config import MergeConfig, excluded
from lewis.recipe.schema import Output
from lewis.recipe.tokenizer import Tokenizer

ParameterValue = Callable[[Parameter, str | None, str, float], Any]
"""The value of a parameter, by (parameter, reference of the expert or None for all, tensor name, depth in [0, 1])."""


@dataclass(frozen=True)
class Expert:
    """An opened expert.

    Attributes:
        ref: its reference in the config, which the settings look its parameters up by.
        model: the opened model.
        densities: if LEWIS guides the merge, its density per tensor.
        calibration: token ids of the rows on which the merge is fitted to this expert; None if the method fits nothing.
        held_back: the rows of its set that are held back to judge the fit; None: no row of this expert judges it.
        scales: if it is pruned by activation, what the magnitudes in its task vector are multiplied with before they
            are ranked; tensors that are left out are ranked by magnitude.
        mean_density: the mean of `densities` over the covered tensors, weighted by their parameters.
    """

    ref: str
    model: Model
    densities: Densities | None = None
    scales: ScalesByTensor | None = None
    calibration: Calibration | None = None
    mean_density: float = 1.0
    held_back: Calibration | None = None


@dataclass(frozen=True)
class MergeSettings:
    """The settings of one merge; `resolve` makes them from a config.

    Attributes:
        method: the merge method.
        value: looks a parameter up for one tensor; depth is the position of the tensor's layer, 0 outside the layers.
        base: the base's reference in the config; None without a base.
        base_folder: where the base of an adapter is, if it is a folder; None if it is a repo of the Hub.
        seed: of the random streams.
        dtype: of the result's floating-point tensors, as safetensors names it (`BF16`); None: each keeps the base's.
        exclude: whether tensors are excluded by name.
        excluded: gives the names of the tensors that are copied from the base, by its stored and its tied tensors.
        vocabulary: whose tokens the result has; None: all models must have the base's.
        output: what is written: the full model, or an adapter.
        chat_template: of the result: a format's name, `auto` or a Jinja template; None: the tokenizer's own.
        slices: the layers that the result's layers are merged from; empty: those of the same number.
        check_filters: raises RecipeError for filters that match no tensor, by the stored and the tied tensors.
        anchor: of a method that fits, the settings of the merge that the fit is pulled towards and that makes the
            tensors that are not fitted; None: the method's own function does.
        anchor_weight: with an anchor, the factor of its merged delta, by (tensor name, depth).
    """

    method: Method
    value: ParameterValue
    base: str | None
    base_folder: Path | None
    seed: int
    dtype: str | None
    exclude: bool
    excluded: Callable[[Iterable[str], Mapping[str, str]], frozenset[str]]
    vocabulary: Tokenizer | None
    output: Output
    chat_template: str | None
    slices: tuple[Slice, ...]
    check_filters: Callable[[Iterable[str], Mapping[str, str]], None]
    anchor: MergeSettings | None = None
    anchor_weight: Callable[[str, float], float] = field(default=lambda name, depth: 1.0)


def resolve(config: MergeConfig) -> MergeSettings:
    """Resolve a config into the settings of its merge."""
    entries, is_adapter = {entry.model: entry for entry in config.experts}, config.output.kind == "lora"

    def by_reference(value: Callable[..., Any]) -> ParameterValue:
        return lambda parameter, ref, tensor, depth: value(
            parameter, None if ref is None else entries[ref], tensor, depth
        )

    settings = MergeSettings(
        method=find(config.merge_method),
        value=by_reference(config.value),
        base=config.base_model,
        base_folder=find_folder(config.base_model, config.root) if config.base_model and is_adapter else None,
        seed=config.seed,
        dtype=stored_dtype(config),
        exclude=bool(config.exclude),
        excluded=lambda names, tied: excluded(config.exclude, names, tied),
        vocabulary=config.vocabulary,
        output=config.output,
        chat_template=config.chat_template,
        slices=slices_of(config),
        check_filters=config.check_filters,
    )
    if config.anchor is None:
        return settings
    anchor = replace(
        settings, method=find(config.anchor.merge_method), value=by_reference(config.anchor_value), output=Output()
    )
    return replace(settings, anchor=anchor, anchor_weight=config.anchor_weight)


def stored_dtype(config: MergeConfig) -> str | None:
    """The dtype that a config gives the result, as safetensors names it; None: each tensor keeps the base's.

    For an adapter it is always fp32: rounding to fewer bits would add noise of full rank to the merged delta.
    """
    if config.output.kind == "lora":
        return "F32"
    return MERGED.get(config.out_dtype or config.dtype or "")
