"""The decorator that turns an annotated function into a merge method with a parameter schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from lewis.lazy_torch import torch
from lewis.methods.arithmetic.rows import ByRows
from lewis.methods.loops import Combine, Loops
from lewis.plugins import Row, Table

T = TypeVar("T")
_PER_EXPERT = "one value per expert"
PerExpert = Annotated[Sequence[T] | T, _PER_EXPERT]
"""The type of a parameter with a value per expert: a sequence in the experts' order, or one value for all."""

_ADJECTIVES = {float: "finite", int: "whole"}
_TAKEN = ("base", "streams", "scales")  # arguments of a function that are no parameters, after the stacked tensors
_OF_FITS = ("ridge", "alpha", "prior", "bound")  # parameters that every fit reads, next to `weight`
_LARGEST = (2 - 2**-23) * 2.0**127  # of fp32, the dtype of all arithmetic


@dataclass(frozen=True)
class Range:
    """Bounds of a parameter, both included: `t: Annotated[float, Range(0, 1)]`."""

    low: float = -float("inf")
    high: float = float("inf")

    def __str__(self) -> str:
        above = "" if self.low == -float("inf") else f" >= {self.low:g}"
        below = "" if self.high == float("inf") else f" <= {self.high:g}"
        return " and".join(bound for bound in (above, below) if bound).strip()


AUTO = "auto"
Fraction = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
NotNegativeOrAuto = Annotated[float, Range(0), AUTO]
"""A number of 0 or more, or in a recipe `auto`, which the engine replaces by a number that it finds."""
Count = Annotated[int, Range(1)]


@dataclass(frozen=True)
class Parameter:
    """One YAML parameter of a merge method.

    Attributes:
        name: as in the recipe (`lambda`, where the function says `lambda_`).
        kind: `float`, `int` or `bool`.
        per_expert: whether each expert has its own value.
        default: the value if the recipe gives none; `inspect.Parameter.empty`: the recipe must give one.
        range: bounds of a number.
        auto: whether the recipe may say `auto` instead of a number, for the whole merge.
    """

    name: str
    kind: type
    per_expert: bool
    default: Any
    range: Range = Range()
    auto: bool = False

    @property
    def required(self) -> bool:
        """Whether the recipe must give it."""
        return self.default is inspect.Parameter.empty

    def parse(self, value: Any) -> Any:
        """Check one value of the recipe.

        Returns:
            The value as `kind`; mergekit's numeric strings (`"1e-3"`) become numbers. `auto` stays, if `auto` is set.

        Raises:
            ValueError: saying what was expected.
        """
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"expected true or false, got {value!r}")
            return value
        if self.auto and value == AUTO:
            return AUTO
        if value == AUTO and self.name in ("lambda", "weight"):
            raise ValueError(
                "expected a number, got 'auto': what calibration rows give for it in closed form was worse than a "
                "number that is searched for; add a search block with a range for it, or merge_method: recommended, "
                "which fits whole projections to calibration rows"
            )
        or_auto = " or auto" if self.auto else ""
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not -_LARGEST <= number <= _LARGEST or (self.kind is int and number != int(number)):
            raise ValueError(f"expected a {_ADJECTIVES[self.kind]} number{or_auto}, got {value!r}")
        if self.name == "density" and not 0 < number <= 1:
            raise ValueError(f"expected 0 < density <= 1 (the fraction kept), got {value!r}")
        if not self.range.low <= number <= self.range.high:
            raise ValueError(f"expected a number {self.range}{or_auto}, got {value!r}")
        return self.kind(number)


Check = Callable[[Mapping[str, Any], int], str | None]
"""Takes one expert's parameters and the number of experts; returns what is wrong with them together, or None."""


@dataclass(frozen=True)
class Method(Row):
    """A registered merge method; calling it calls the function.

    Attributes:
        on: what the function works on: `task_vectors` (needs a base); `weights`: the models' own, where a base is one
            of the models unless the function takes `base`; or `either`: task vectors if the recipe names a base.
        random: whether it takes `streams`, one `streams.Stream` per expert.
        takes_base: whether it takes `base`, the base's own tensor.
        takes_scales: whether it takes `scales`: for each expert None, or sqrt(mean x^2) of the tensor's input channels
            (fp32, broadcasts to the tensor), by which the magnitudes are multiplied before the task vector is trimmed.
        experts: how many models it merges, at least and at most (None: any number), without a base that has a role of
            its own.
        check: checks parameters that must fit together.
        elementwise: whether each element of the result depends only on the same element of the models. Then a large
            tensor is merged by rows.
        coefficients: for a method whose result is a linear combination of its tensors (with `takes_base`, of the base
            and its tensors) with coefficients that depend only on their dot products. It takes these, as `sums.gram`
            returns them, and the function's parameters; it returns one coefficient for each tensor, or None if with
            these parameters the result is something else. Then a large tensor is never whole in memory.
        by_rows: how to merge a tensor by rows although the method has to know all of it first (`rows.ByRows`). Then a
            large tensor is never whole in memory.
        compiled: which compiled loops do the same as the function, faster and in less memory; None: the function does
            it in torch, unless `coefficients` are given.
        fits: how it fits projections to the experts' outputs on their calibration rows: `static`, for the experts' own
            inputs; `forward`, from the first block on, for the inputs that the model merged so far has there. The
            function then gives the tensors that are not fitted, and those that the fit is pulled towards. It takes
            `ridge`, `alpha`, `prior`, `bound`, and `weight` of each expert. None: the function gives all tensors.
        in_mergekit: whether mergekit has it too, so that a recipe can be exported; not used for a plug-in.
    """

    noun = "merge method"
    on: Literal["task_vectors", "weights", "either"]
    parameters: dict[str, Parameter]
    random: bool
    takes_base: bool
    takes_scales: bool
    experts: tuple[int, int | None]
    check: Check | None
    elementwise: bool = False
    coefficients: Callable[..., list[float] | None] | None = None
    by_rows: ByRows | None = None
    compiled: Loops | None = None
    fits: Literal["static", "forward"] | None = None
    in_mergekit: bool = True

    @property
    def needs_base(self) -> bool:
        """Whether the method cannot merge without a base."""
        return self.on == "task_vectors" or self.takes_base

    @property
    def base_is_a_model(self) -> bool:
        """Whether the base is merged like any other model."""
        return self.on == "weights" and not self.takes_base

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the parameters by the names of the function's arguments (`lambda_` for `lambda`)."""
        known = inspect.signature(self.function).parameters
        return {name if name in known else f"{name}_": value for name, value in values.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.function(*args, **kwargs)


METHODS = Table("lewis.methods", Method)
"""Name -> method. The methods of LEWIS are in it once `lewis.methods` is imported."""


def merge_method(
    name: str,
    *,
    paper: str,
    on: Literal["task_vectors", "weights", "either"] = "task_vectors",
    experts: tuple[int, int | None] = (1, None),
    check: Check | None = None,
    elementwise: bool = False,
    coefficients: Callable[..., list[float] | None] | None = None,
    by_rows: ByRows | None = None,
    compiled: Loops | None = None,
    fits: Literal["static", "forward"] | None = None,
    in_mergekit: bool = True,
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a function as the merge method `name`.

    Its keyword-only arguments become YAML parameters; one without a default is required. Before them the function takes
    the stacked tensors, then any of these, by their names: `base` (the base's tensor), `streams` (a random stream per
    expert) and `scales` (what each expert's magnitudes are multiplied with, as `Method.takes_scales` says).

    Args:
        name: as `merge_method` in a recipe.
        paper: where the method comes from, a URL.
        on, experts, check, elementwise, coefficients, by_rows, compiled, fits, in_mergekit: as in `Method`.

    Raises:
        TypeError: if a parameter is of another type than float, int or bool, or stands before the `*`.
        ValueError: if another function has that name, a parameter's default is no value that it may have, or `on` or
            the parameters do not fit `compiled`, `coefficients` or `fits`.
    """

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        arguments = inspect.signature(function).parameters
        names = [argument.name for argument in arguments.values() if argument.kind is argument.KEYWORD_ONLY]
        hints = _hints(function, names)
        parameters = {each.name: each for each in (_parameter(arguments[name], hints[name]) for name in names)}
        if unknown := [each for each in (compiled.parameters if compiled else ()) if each not in parameters]:
            raise ValueError(f"{name}: `compiled` names the parameters {unknown}, which the function does not have")
        before = [argument for argument in arguments if argument not in names]
        if not before or before[0] in _TAKEN or not {*before[1:]} <= {*_TAKEN}:
            raise TypeError(
                f"{name}: expected the stacked tensors, then any of {', '.join(_TAKEN)}, then a `*` and the "
                f"parameters; got {', '.join(before) or 'nothing'} before the `*`"
            )
        made = Method(
            name,
            function,
            paper,
            on,
            parameters,
            random="streams" in arguments,
            takes_base="base" in arguments,
            takes_scales="scales" in arguments,
            experts=experts,
            check=check,
            elementwise=elementwise,
            coefficients=coefficients,
            by_rows=by_rows,
            compiled=compiled,
            fits=fits,
            in_mergekit=in_mergekit,
        )
        if problem := _misfit(made):
            raise ValueError(f"{name}: {problem}")
        METHODS.add(made)
        return function

    return register


def _misfit(method: Method) -> str | None:
    """What does not fit together in a method's declaration: an error in the middle of a merge, or a wrong result."""
    on, loops, fits, parameters = method.on, method.compiled, method.fits, method.parameters
    if on not in ("task_vectors", "weights", "either") or fits not in (None, "static", "forward"):
        return f"expected `on` task_vectors, weights or either, and `fits` static or forward, got {on!r} and {fits!r}"
    try:
        low, high = method.experts
        counts = low >= 1 and (high is None or low <= high)
    except (TypeError, ValueError):
        counts = False
    if not counts:
        return f"expected `experts` as (2, None) for two models or more, (1, 1) for one, got {method.experts!r}"
    wanted = "task_vectors" if loops or fits else on
    wanted = "weights" if loops and loops.combine == Combine.AVERAGE else wanted
    if wanted != on:
        return f"its `{'compiled' if loops else 'fits'}` is for on={wanted!r}, got {on!r}"
    if method.coefficients and method.takes_base and on != "weights":
        return f"`coefficients` of the base and the tensors are for on='weights', got {on!r}"
    if lacking := [each for each in ("weight", *_OF_FITS) if fits and each not in parameters]:
        return f"`fits` reads the parameters weight, {', '.join(_OF_FITS)}; the function lacks {', '.join(lacking)}"
    if loops and loops.combine in (Combine.CLAIM, Combine.SHARE, Combine.NEAR) and not loops.threshold:
        return f"Combine.{loops.combine.name} compares with a threshold; name its parameter in `compiled`"
    each = {loops.weight, loops.outliers, loops.rank_width} if loops else {"weight"}
    one = {"normalize", "rescale", "lambda", *(_OF_FITS if fits else ()), *(loops.parameters if loops else ())} - each
    for parameter in parameters.values() if loops or fits else ():
        if parameter.name in (one if parameter.per_expert else each):
            return f"{parameter.name}: expected {'one value for all experts' if parameter.per_expert else 'PerExpert'}"
    return None


def _hints(function: Callable[..., Any], names: Sequence[str]) -> dict[str, Any]:
    """Evaluate the annotations of these arguments. Those of the tensors are left out, since they would import torch."""
    chosen = {name: function.__annotations__.get(name) for name in names}
    holder = SimpleNamespace(__annotations__=chosen)
    return get_type_hints(holder, globalns=getattr(function, "__globals__", None), include_extras=True)


def _parameter(argument: inspect.Parameter, hint: Any) -> Parameter:
    each = _PER_EXPERT in getattr(hint, "__metadata__", ())
    kind = get_args(get_args(hint)[0])[-1] if each else hint
    bounds = next((found for found in getattr(kind, "__metadata__", ()) if isinstance(found, Range)), Range())
    auto = AUTO in getattr(kind, "__metadata__", ())
    kind = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    if kind not in (bool, int, float):
        raise TypeError(f"{argument.name}: a parameter is a float, int or bool, got {kind}")
    if argument.name == "density" and not each:
        raise TypeError(f"density: every expert has its own; expected PerExpert[float], got {kind.__name__}")
    made = Parameter(argument.name.removesuffix("_"), kind, each, argument.default, bounds, auto)
    if not made.required:
        try:
            made.parse(made.default)
        except ValueError as error:
            raise ValueError(f"{argument.name}: its default: {error}") from None
    return made


if TYPE_CHECKING:
    import numpy as np

    Scales = Sequence[torch.Tensor | None] | None
else:
    Scales = Any
"""One scale per expert; None for an expert (or for all) that is trimmed by magnitude alone."""


def scale_of(scales: Scales, expert: int) -> torch.Tensor | None:
    """The scale of one expert."""
    return None if scales is None else scales[expert]


def per_expert(value: Sequence[float] | float, tensors: torch.Tensor | np.ndarray) -> list[float]:
    """Return a value for each expert, from one value for all or a sequence.

    Args:
        value: the value or values.
        tensors: any array whose first dimension is that of the experts.

    Raises:
        ValueError: if a sequence has another length than there are experts.
    """
    experts = tensors.shape[0]
    values = [float(value)] * experts if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != experts:
        raise ValueError(f"expected one value for each of the {experts} experts, got {len(values)}")
    return values


def column(values: Sequence[float], task_vectors: torch.Tensor) -> torch.Tensor:
    """Shape one value per expert as (experts, 1, ..., 1), fp32, to broadcast against `task_vectors`."""
    return torch.tensor(values, dtype=torch.float32, device=task_vectors.device).reshape(
        -1, *[1] * (task_vectors.dim() - 1)
    )
