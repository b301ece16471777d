"""What one merge needs to know of a recipe, resolved once: the engine itself knows no recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lewis.methods import Method, Parameter
from lewis.recipe.schema import Output
from lewis.recipe.tokenizer import Tokenizer

RIDGES = (1.0, 0.1, 0.01, 0.001)  # what `ridge: auto` tries
ParameterValue = Callable[[Parameter, str | None, str, float], Any]
"""The value of a parameter, by (parameter, reference of the expert or None for all, tensor name, depth in [0, 1])."""


@dataclass(frozen=True)
class MergeSettings:
    """The settings of one merge; `lewis.merging.step.resolve` makes them of a recipe.

    Attributes:
        method: the merge method.
        value: looks a parameter up for one tensor; depth is the position of the tensor's layer, 0 outside the layers.
        base: the base's reference in the recipe; None without a base.
        seed: of the random streams.
        dtype: of the result's floating-point tensors, as safetensors names it (`BF16`); None: each keeps the base's.
        excluded: names of the tensors that are copied from the base.
        vocabulary: whose tokens the result has; None: all models must have the base's.
        output: what is written: the full model, or an adapter.
        base_name: how an adapter names its base: `org/name@commit`, or the absolute path of a folder.
        chat_template: of the result: a format's name, `auto` or a Jinja template; None: the tokenizer's own.
        anchor: of a method that fits, the settings of the merge that the fit is pulled towards and that gives what is
            not fitted; None: the method's own function does.
        anchor_weight: with an anchor, the factor of what it adds to the base, by (tensor name, depth).
    """

    method: Method
    value: ParameterValue
    base: str | None = None
    seed: int = 0
    dtype: str | None = None
    excluded: frozenset[str] = frozenset()
    vocabulary: Tokenizer | None = None
    output: Output = field(default_factory=Output)
    base_name: str = ""
    chat_template: str | None = None
    anchor: MergeSettings | None = None
    anchor_weight: Callable[[str, float], float] = field(default=lambda name, depth: 1.0)
