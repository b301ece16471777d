"""Which modules of a network an adapter is on, by PEFT's rules: what its settings name, exclude and save whole."""

from collections.abc import Iterable, Mapping
from typing import Any

from lewis.errors import InputError

CONFIG = "adapter_config.json"
_PATIENCE = 1.0  # seconds to compare one pattern with one name
_EMBEDDINGS = {"embed_tokens", "lm_head"}  # PEFT's EMBEDDING_LAYER_NAMES
_LAYER = r".*?\.[^.]*\.(?P<layer>\d+)\."


def is_target(settings: Mapping[str, Any], module: str, *, linear: bool) -> bool:
    """Whether the settings put a pair of factors on a module.

    Args:
        settings: of the adapter.
        module: its path in the network.
        linear: whether it is among the modules that `all-linear` stands for.
    """
    excluded, targets = settings.get("exclude_modules"), settings.get("target_modules")
    if excluded and _names(excluded, module):
        return False
    if any(matches(rf"(^|.*\.){name}($|\..*)", module) for name in settings.get("modules_to_save") or ()):
        return False
    if targets is None:  # an old file: the adapter is on the modules that it has factors for
        return not settings.get("target_parameters")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return linear
    if isinstance(targets, str) or module in targets:  # its whole path is named, so its layer does not matter
        return _names(targets, module)
    return _names(targets, module) and _is_in_layers(settings, module)


def saved_in(settings: Mapping[str, Any], tensor: str) -> list[str]:
    """Return the modules around a tensor that the adapter saves whole, inner ones first, by `modules_to_save`.

    A path must end with one of those names. PEFT needs no dot before it: `norm` also names `input_layernorm`.
    """
    names = tuple(settings.get("modules_to_save") or ())
    module, found = tensor, []
    while module and names:
        module = module.rpartition(".")[0]
        if module.endswith(names):
            found.append(module)
    return found


def is_saved(settings: Mapping[str, Any], tensor: str) -> bool:
    """Whether a tensor belongs to a module that the adapter saves whole."""
    return bool(saved_in(settings, tensor))


def ties_factors(settings: Mapping[str, Any]) -> bool:
    """Whether PEFT puts factors on an embedding and on the head that is tied to it, also where they are excluded."""
    if not settings.get("ensure_weight_tying") or _ends(settings.get("modules_to_save") or ()) & _EMBEDDINGS:
        return False
    targets = settings.get("target_modules") or ()
    return any(_names(targets if isinstance(targets, str) else _ends(targets), name) for name in _EMBEDDINGS)


def _ends(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def token_indices(settings: Mapping[str, Any], module: str) -> list[int] | None:
    """The ids of the tokens whose rows an adapter trains in a module; None if it trains none there."""
    given = settings.get("trainable_token_indices") or settings.get("token_indices")
    if isinstance(given, dict):
        return next((ids for name, ids in given.items() if f".{module}".endswith(f".{name}")), None)
    return given


def by_pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """Return a module's value by PEFT's rule: that of the first pattern that matches its path, or its end after a dot.

    Raises:
        InputError: as `matches`.
    """
    found = (value for pattern, value in (patterns or {}).items() if matches(rf"(.*\.)?({pattern})$", module))
    return float(next(found, default))


def matches(pattern: str, name: str) -> Any:
    """Match a pattern at the start of a name, as `re.match`, but with a time limit; None if it does not match.

    Raises:
        InputError: if the pattern is invalid, or takes too long: some need time exponential in the name's length.
    """
    import regex  # as re, with a time limit

    try:
        return regex.match(pattern, name, timeout=_PATIENCE)
    except (TimeoutError, regex.error) as error:
        raise InputError(f"{CONFIG}: the pattern {pattern!r} cannot be compared with {name!r}: {error}") from error


def _names(given: str | Iterable[str], module: str) -> bool:
    """Whether a setting names a module: by a pattern of its whole path, or by a path or its end after a dot."""
    if isinstance(given, str):
        return bool(matches(rf"(?:{given})\Z", module))
    return any(f".{module}".endswith(f".{name}") for name in given)


def _is_in_layers(settings: Mapping[str, Any], module: str) -> bool:
    """Whether a module is in one of `layers_to_transform`: by the first number in its path, or the pattern's."""
    layers, stacks = settings.get("layers_to_transform"), settings.get("layers_pattern")
    if layers is None or layers == []:
        return True
    stacks = [stacks] if isinstance(stacks, str) else stacks
    patterns = [rf"(?:^|.*?\.){stack}\.(?P<layer>\d+)\." for stack in stacks] if stacks and stacks != [""] else [_LAYER]
    found = next((match for pattern in patterns if (match := matches(pattern, module))), None)
    return found is not None and int(found["layer"]) in ([layers] if isinstance(layers, int) else layers)
