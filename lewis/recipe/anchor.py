"""The recipe block `anchor`: another merge, which a fit is pulled towards in place of the sum of task vectors."""

from typing import Any

from pydantic import Field

from lewis.errors import nearest
from lewis.methods import METHODS, Method, Parameter, Range
from lewis.recipe.block import Block, Parameters, Setting
from lewis.recipe.parameter_values import Rule

WEIGHT = Parameter("weight", float, per_expert=False, default=1.0, range=Range(0))


class Anchor(Block):
    """A merge of the same experts by another method: W_a = W_0 + weight * (W_m - W_0) for its result W_m.

    W_0 is the base. Tensors that are not fitted become W_a, and the fit of every projection is pulled towards W_a.

    Attributes:
        merge_method: any method that does not fit itself.
        parameters: the method's parameters, for the whole merge; without `weight`, each expert has the recipe's.
        weight: the factor in the formula: a number, a gradient or filters; with 0, W_a is the base.
    """

    merge_method: str
    parameters: Parameters = Field(default_factory=dict)
    weight: Setting = (Rule(1.0),)


def method_of(data: dict[str, Any]) -> Method | None:
    """Return the anchor's merge method, from a recipe's raw YAML; None without an anchor or with an unknown method."""
    return METHODS.get(str((data.get("anchor") or {}).get("merge_method")))


def problems_of(data: dict[str, Any], method: Method | None) -> list[str]:
    """List the problems of a recipe's `anchor` block, each as a line that begins with its YAML path.

    `lewis.recipe.checks` checks the anchor's parameters and the number of models that it merges.

    Args:
        data: the raw YAML of the recipe.
        method: the recipe's merge method; None if it is unknown.
    """
    block, own = data.get("anchor"), method_of(data)
    if block is None:
        return []
    fitting = [name for name, each in METHODS.items() if each.fits]
    if method is not None and not method.fits:
        return [f"anchor: {method.name} fits nothing that it could pull; remove it, or use one of {', '.join(fitting)}"]
    if block.get("merge_method") is None:
        return []  # the schema reports it
    if own is None:
        others = [name for name in METHODS if name not in fitting]
        name = str(block["merge_method"])
        return [f"anchor.merge_method: unknown method {name!r}{nearest(name, others)}"]
    if own.fits:
        return [f"anchor.merge_method: expected a method that does not fit itself, such as ties, got {own.name!r}"]
    problems = []
    if "lambda" in (data.get("parameters") or {}):
        problems.append(
            "parameters.lambda: it scales the sum that the anchor takes the place of; use anchor.weight, or "
            "anchor.parameters.lambda"
        )
    if own.on == "weights" and block.get("weight", 1) not in (1, None):
        problems.append(f"anchor.weight: {own.name} merges weights, not task vectors that it could scale; remove it")
    return problems
