"""The decorator that turns an annotated function into a merge method with a parameter schema."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import torch

T = TypeVar("T")
_PER_EXPERT = "one value per expert"
PerExpert = Annotated[Sequence[T] | T, _PER_EXPERT]
"""A parameter that each expert has its own value of: a sequence in the experts' order, or one value for all."""

METHODS: dict[str, "Method"] = {}


@dataclass(frozen=True)
class Parameter:
    """One YAML parameter of a merge method.

    Attributes:
        name: as in the recipe (`lambda`, where the function says `lambda_`).
        kind: `float` or `bool`.
        per_expert: whether each expert has its own value.
        default: what holds where the recipe says nothing.
    """

    name: str
    kind: type
    per_expert: bool
    default: Any

    def parse(self, value: Any) -> Any:
        """Check one value of the recipe.

        Returns:
            The value as `kind`; mergekit's numeric strings (`"1e-3"`) become numbers.

        Raises:
            ValueError: saying what was expected.
        """
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"expected true or false, got {value!r}")
            return value
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not -float("inf") < number < float("inf"):
            raise ValueError(f"expected a finite number, got {value!r}")
        if self.name == "density" and not 0 < number <= 1:
            raise ValueError(f"expected 0 < density <= 1 (the fraction kept), got {value!r}")
        return number


@dataclass(frozen=True)
class Method:
    """A registered merge method; calling it calls the function.

    Attributes:
        on: what the function works on: `task_vectors` (needs a base) or `weights`.
        random: whether it takes `streams`, one `numpy.random.Generator` per expert.
    """

    name: str
    function: Callable[..., torch.Tensor]
    paper: str
    on: Literal["task_vectors", "weights"]
    parameters: dict[str, Parameter]
    random: bool

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.function(*args, **kwargs)


def merge_method(
    name: str, *, paper: str, on: Literal["task_vectors", "weights"] = "task_vectors"
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a function as the merge method `name`; its keyword-only arguments become YAML parameters."""

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        arguments = inspect.signature(function).parameters
        hints = get_type_hints(function, include_extras=True)
        parameters = {}
        for argument in arguments.values():
            if argument.kind is argument.KEYWORD_ONLY:
                each = _PER_EXPERT in getattr(hints[argument.name], "__metadata__", ())
                kind = get_args(get_args(hints[argument.name])[0])[-1] if each else hints[argument.name]
                yaml_name = argument.name.removesuffix("_")
                parameters[yaml_name] = Parameter(yaml_name, kind, each, argument.default)
        METHODS[name] = Method(name, function, paper, on, parameters, "streams" in arguments)
        return function

    return register


def per_expert(value: "Sequence[float] | float", task_vectors: torch.Tensor) -> list[float]:
    """Give one value per expert, whether one or all were given.

    Raises:
        ValueError: if a sequence has another length than there are experts.
    """
    experts = task_vectors.shape[0]
    values = [float(value)] * experts if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != experts:
        raise ValueError(f"expected one value for each of the {experts} experts, got {len(values)}")
    return values


def column(values: Sequence[float], task_vectors: torch.Tensor) -> torch.Tensor:
    """Shape one value per expert as (experts, 1, ..., 1), fp32, to broadcast against `task_vectors`."""
    return torch.tensor(values, dtype=torch.float32, device=task_vectors.device).reshape(
        -1, *[1] * (task_vectors.dim() - 1)
    )
