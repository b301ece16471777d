"""Which modules of a network an adapter is on, by PEFT's rules; and checks that its base and its file have those."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.models.model import Model
from lewis.models.names import HEADS, Shapes, layer_of

CONFIG = "adapter_config.json"
_OTHER = "the config belongs to another adapter"
_PATIENCE = 1.0  # seconds to compare one pattern with one name
_EMBEDDINGS = {"embed_tokens", "lm_head"}  # PEFT's EMBEDDING_LAYER_NAMES
_LAYER = r".*?\.[^.]*\.(?P<layer>\d+)\."


def is_on(settings: Mapping[str, Any], module: str, *, linear: bool) -> bool:
    """Whether the settings put a pair of factors on a module.

    Args:
        settings: of the adapter.
        module: its path in the network.
        linear: whether it is a linear module, not an embedding; `all-linear` stands for all of these but the head.
    """
    excluded, targets = settings.get("exclude_modules"), settings.get("target_modules")
    if excluded and _names(excluded, module):
        return False
    if any(matches(rf"(^|.*\.){name}($|\..*)", module) for name in settings.get("modules_to_save") or ()):
        return False
    if targets is None:  # an old file: the adapter is on the modules that it has factors for
        return not settings.get("target_parameters")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return linear and not f"{module}.weight".endswith(HEADS)
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


def inputs_first(shapes: Shapes) -> bool:
    """Whether some modules store their weight as (in, out), as GPT-2's Conv1D: their bias is as long as a row."""
    biases = ((shapes.get(f"{name.removesuffix('.bias')}.weight"), shape) for name, shape in shapes.items())
    return any(matrix and len(matrix) == 2 and bias == matrix[1:] != matrix[:1] for matrix, bias in biases)


def named_modules(base: Model, settings: Mapping[str, Any], folder: Path, *, found: bool) -> set[str]:
    """The base's modules that an adapter is on: linear modules, embeddings and those of `target_parameters`.

    Args:
        base: what the adapter is on.
        settings: of the adapter.
        folder: of the adapter.
        found: whether the adapter's file has factors that the settings name, perhaps under other names than the base's.

    Raises:
        InputError: if the settings name no module, or one that PEFT puts no factors on.
    """
    shapes = {**base.shapes, **dict.fromkeys(base.tied, (1, 1))}
    held = _held(settings, shapes)
    of_parameters = {name.rpartition(".")[0] for name in held}
    if settings.get("target_modules") is None or settings["peft_type"] != "LORA":
        return of_parameters
    modules = {module for name in shapes for module in accumulate(name.split(".")[:-1], "{}.{}".format)}
    matrices = {module for module in modules if len(shapes.get(f"{module}.weight", ())) >= 2}
    named = {
        module
        for module in modules
        if is_on(settings, module, linear=module in matrices and layer_of(f"{module}.") is not None)
    }
    if both := sorted(named & of_parameters):
        raise InputError(
            f"{folder / CONFIG}: target_modules and target_parameters both name {both[0]!r}, which PEFT refuses too; "
            f"{_OTHER}"
        )
    for problem in _problems(settings, base, named, named - matrices, bool(held), found):
        raise InputError(f"{folder / CONFIG}: {problem}")
    return named | of_parameters


def _held(settings: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The parameters that `target_parameters` names: by their path, or its end after a dot."""
    ends = tuple(f".{each}" for each in settings.get("target_parameters") or ())
    return [name for name in names if f".{name}".endswith(ends)]


def _problems(
    settings: Mapping[str, Any], base: Model, named: set[str], wrong: set[str], holds: bool, found: bool
) -> Iterator[str]:
    targets = settings["target_modules"]
    names = repr(targets if isinstance(targets, str) else sorted(targets)[:5])
    if not (named or holds or found):
        yield f"target_modules {names} name no module of the base {base.folder}, or only excluded ones; {_OTHER}"
    if wrong:
        yield (
            f"target_modules {names} name {min(wrong)!r}, which is neither a linear module nor an embedding, and so "
            f"has no LoRA; {_OTHER}"
        )
    unbiased = sorted(module for module in named if f"{module}.bias" not in base.tensors)
    if settings.get("lora_bias") and unbiased:
        yield (
            f"{unbiased[0]!r} is to get a bias (lora_bias), and the base has no such bias, so no weights stand for it; "
            "leave the adapter out"
        )
    transposed = inputs_first(base.shapes) if named else settings.get("fan_in_fan_out")
    if holds and (transposed or any(map(settings.get, ("use_dora", "lora_bias", "lora_dropout")))):
        yield (
            "target_parameters together with use_dora, lora_bias, lora_dropout or fan_in_fan_out, which PEFT refuses "
            f"too; {_OTHER}"
        )


def check_whole(
    base: Model,
    settings: Mapping[str, Any],
    file: Path,
    whole: Collection[str],
    rows: Collection[str],
    parameters: Collection[str],
) -> None:
    """Check that the file has every module that the settings save whole.

    Args:
        base: what the adapter is on.
        settings: of the adapter.
        file: of its weights.
        whole: the tensors that it has whole.
        rows: the modules that it has trained rows of.
        parameters: those of `target_parameters` that it has factors for.

    Raises:
        InputError: naming what is missing, a module that is saved within another one, one that has both factors and
            trained rows, or a parameter with factors within a module that is saved: PEFT cannot load those.
    """
    for inner, outer, *_ in (found for each in base.tensors if len(found := saved_in(settings, each)) > 1):
        raise InputError(
            f"{file.with_name(CONFIG)}: modules_to_save names {inner!r} and {outer!r}, which it is in; PEFT cannot "
            "load such an adapter; train it with the outer one alone"
        )
    held = _held(settings, (*base.tensors, *parameters))
    for parameter in held:
        for module in saved_in(settings, parameter):
            raise InputError(
                f"{file.with_name(CONFIG)}: target_parameters names {parameter!r}, and modules_to_save {module!r}, "
                "which it is in; PEFT cannot load such an adapter; train it with one of the two"
            )
    for module in rows:
        by_module = settings.get("target_modules") and is_on(settings, module, linear=False)
        if by_module or f"{module}.weight" in held:
            raise InputError(
                f"{file.with_name(CONFIG)}: {'target_modules' if by_module else 'target_parameters'} and "
                f"trainable_token_indices both name {module!r}, which PEFT refuses too; {_OTHER}"
            )
    missing = [
        (tensor, "modules_to_save")
        for tensor in (*base.tensors, *base.tied)
        if is_saved(settings, tensor) and tensor not in whole
    ]
    given = settings.get("trainable_token_indices") or {}
    given = given if isinstance(given, dict) else {"": given}
    for name, ids in given.items():
        tied = base.tied and rows and list(given.values()).count(ids) > 1  # then PEFT saves the rows of the embedding
        if not tied and not any(f".{module}".endswith(f".{name}" if name else "") for module in rows):
            missing.append((f"{name or 'embedding'}.trainable_tokens_delta", "trainable_token_indices"))
    for what, key in missing:
        raise InputError(f"{file}: no {what!r}, which {key} in {CONFIG} names; {_OTHER}, or the file is not complete")


def check_tied(base: Model, settings: Mapping[str, Any], file: Path, whole: Collection[str]) -> None:
    """Check that a head stays tied to its embedding; the arguments are those of `check_whole`.

    Raises:
        InputError: naming both, if the adapter changes one of them, or PEFT would change it twice.
    """
    ties = settings.get("ensure_weight_tying")
    for head, embedding in base.tied.items():
        replaced = is_saved(settings, embedding)
        saves_head = ties and not replaced and is_saved(settings, head)
        if saves_head and is_on(settings, embedding.removesuffix(".weight"), linear=False):
            raise InputError(
                f"{file.with_name(CONFIG)}: modules_to_save names {head!r}, which the base ties to its embedding, and "
                f"target_modules {embedding!r}; merge the adapter into its base with PEFT's merge_and_unload first"
            )
        both = ties and embedding.endswith("embed_tokens.weight")  # as in PEFT
        if (replaced and not both and head not in whole) or ties_factors(settings):
            effect = "replaces only one of them" if replaced else "is added twice by PEFT"
            raise InputError(
                f"{file}: {embedding!r} is tied to {head!r} in the base, and what the adapter has for it {effect}; "
                "merge the adapter into its base with PEFT's merge_and_unload first"
            )
