"""The recipe block `anchor`: another merge, which a fit is pulled towards in place of the sum of task vectors."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from lewis.errors import nearest
from lewis.methods import METHODS, Method, Parameter, Range
from lewis.recipe.block import Block, Parameters, Setting
from lewis.recipe.parameter_values import Rule, problems_of, problems_of_values

WEIGHT = Parameter("weight", float, per_expert=False, default=1.0, range=Range(0))


def _not_fitting(name: str) -> str:
    if name not in METHODS:
        raise ValueError(
            f"unknown method {name!r}{nearest(name, [each.name for each in METHODS.values() if not each.fits])}"
        )
    if METHODS[name].fits:
        raise ValueError(f"expected a method that does not fit itself, such as ties, got {name!r}")
    return name


class Anchor(Block):
    """A merge of the same experts by another method: W_a = W_0 + weight * (W_m - W_0) for its result W_m.

    W_0 is the base. Tensors that are not fitted become W_a, and the fit of every projection is pulled towards W_a.

    Attributes:
        merge_method: any method that does not fit itself.
        parameters: the method's parameters, for the whole merge; without `weight`, each expert has the recipe's.
        weight: the factor in the formula: a number, a gradient or filters; with 0, W_a is the base.
    """

    merge_method: Annotated[str, AfterValidator(_not_fitting)]
    parameters: Parameters = Field(default_factory=dict)
    weight: Setting = (Rule(1.0),)

    @property
    def method(self) -> Method:
        """The method that `merge_method` names."""
        return METHODS[self.merge_method]

    def _contradictions(self) -> Iterator[str]:
        yield from problems_of("parameters", self.parameters, self.method)
        for name, parameter in self.method.parameters.items():
            if parameter.required and name not in self.parameters:
                yield f"parameters.{name}: missing; {self.merge_method} needs it"
        if self.method.on == "weights" and self.weight != (Rule(1.0),):
            name = self.merge_method
            yield f"weight: {name} merges weights, not task vectors that it could scale; remove it"
        yield from problems_of_values("weight", self.weight, WEIGHT)
