"""mergekit's parameter settings: a number, a gradient over the layers, or a list of filters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lewis.errors import RecipeError, nearest
from lewis.methods import Method, Parameter
from lewis.methods.registry import AUTO

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Rule:
    """A value, a scalar or a gradient (a tuple), for the tensors whose name contains `filter`; None: for all."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None

    @property
    def values(self) -> tuple[Scalar, ...]:
        """The values of the gradient, or the only value."""
        return self.value if isinstance(self.value, tuple) else (self.value,)

    @property
    def for_all(self) -> bool:
        """Whether the value is for all tensors."""
        return self.filter in (None, "*")


def parse_setting(raw: Any) -> tuple[Rule, ...]:
    """Turn the YAML of a parameter setting into rules; the first rule that matches a tensor applies.

    Raises:
        ValueError: if the setting is malformed; the message says what was expected.
    """
    if isinstance(raw, tuple) and all(isinstance(rule, Rule) for rule in raw):
        return raw
    if isinstance(raw, dict):
        raw = [raw]
    if isinstance(raw, bool | int | float | str):
        return (Rule(raw),)
    if isinstance(raw, list) and raw:
        if all(isinstance(item, bool | int | float | str) for item in raw):
            return (Rule(tuple(raw)),)
        if all(isinstance(item, dict) for item in raw):
            return tuple(_parse_rule(item) for item in raw)
    raise ValueError(f"expected a number, a list of numbers (a gradient) or a list of {{filter, value}}, got {raw!r}")


def _parse_rule(item: dict[str, Any]) -> Rule:
    if "value" not in item or not set(item) <= {"value", "filter"}:
        raise ValueError(f"expected {{filter, value}}, got the keys {sorted(map(str, item))}")
    pattern = item.get("filter")
    if pattern is not None and (not isinstance(pattern, str) or not pattern):
        raise ValueError(f"expected a filter that is a part of a tensor's name, got {pattern!r}")
    inner = parse_setting(item["value"])
    if len(inner) != 1 or inner[0].filter is not None:
        raise ValueError("expected a number or a gradient as the value of a filter")
    return Rule(inner[0].value, pattern)


def value_at(rules: tuple[Rule, ...], tensor: str, position: float, parse: Callable[[Any], Any]) -> Any | None:
    """The value of a setting for one tensor, or None where no rule matches.

    Args:
        rules: the result of `parse_setting`.
        tensor: name of the tensor; a filter matches as a substring, `*` matches all (mergekit's rule).
        position: depth in [0, 1], for gradients: floats are interpolated; for other types the value at or before the
            position is taken.
        parse: checks a scalar and converts it to its type; raises ValueError.
    """
    for rule in rules:
        if rule.for_all or (rule.filter or "") in tensor:
            values = [parse(value) for value in rule.values]
            scaled = position * (len(values) - 1)
            low = int(scaled)
            if any(isinstance(value, int) for value in values):  # booleans too
                return values[low]
            high, fraction = min(low + 1, len(values) - 1), scaled - low
            return values[low] if fraction == 0 else (1 - fraction) * values[low] + fraction * values[high]
    return None


def first_value(
    sources: Sequence[Mapping[str, tuple[Rule, ...]]], parameter: Parameter, tensor: str, position: float, where: str
) -> Any:
    """The value of a parameter for one tensor from the first source that has one, else the default.

    Args:
        sources: mappings from the name of a parameter to its rules, the first to look at first.
        parameter: as the method declares it.
        tensor, position: as for `value_at`.
        where: the YAML path of the sources, for the error.

    Raises:
        RecipeError: if the parameter is required and none of its filters matches the tensor.
    """
    for source in sources:
        if parameter.name in source:
            found = value_at(source[parameter.name], tensor, position, parameter.parse)
            if found is not None:
                return found
    if parameter.required:
        raise RecipeError(
            f"{where}.{parameter.name}: no filter matches {tensor!r}; end the list with a {{value: ...}} for all"
        )
    return parameter.default


def problems_of(
    where: str, block: Mapping[str, tuple[Rule, ...]], method: Method, *, of_expert: bool = False
) -> Iterator[str]:
    """Yield the problems of a block of parameters, each as a line that begins with a YAML path.

    Args:
        where: the YAML path of the block.
        block: name of a parameter -> its rules.
        method: the method that takes them.
        of_expert: whether they are one expert's.
    """
    for key, rules in block.items():
        parameter = method.parameters.get(key)
        if parameter is None:
            yield f"{where}.{key}: {method.name} has no such parameter{nearest(key, method.parameters)}"
        elif of_expert and not parameter.per_expert:
            yield f"{where}.{key}: {key} is one value for the whole merge; move it to parameters.{key}"
        else:
            yield from problems_of_values(f"{where}.{key}", rules, parameter)


def problems_of_values(where: str, rules: tuple[Rule, ...], parameter: Parameter) -> Iterator[str]:
    """As `problems_of`, for one parameter. `auto` must stand alone: it is one value for the whole merge."""
    values = [value for rule in rules for value in rule.values]
    for value in values:
        try:
            parameter.parse(value)
        except ValueError as error:
            yield f"{where}: {error}"
    if parameter.auto and AUTO in values and rules != (Rule(AUTO),):
        yield f"{where}: auto is found for the whole merge; write {parameter.name}: auto alone, or numbers"
