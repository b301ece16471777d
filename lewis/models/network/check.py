"""Check that a model's tensors fit the network that transformers builds from its config; no weight is read."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.lazy_torch import nn
from lewis.models.config_class import brings_class
from lewis.models.layers.stack_config import changed_keys
from lewis.models.names import Shapes, in_layers
from lewis.models.network.network_class import NoClassError, built, text_tower
from lewis.models.network.placing import Placing, only_moves

_DIGITS = re.compile(r"\d+")


def check_network(folder: Path, config: Mapping[str, Any], shapes: Shapes, *, needed: bool) -> None:
    """Build the network of a config without weights, and compare its parameters with the tensors.

    Nothing is checked if transformers has no class of the `model_type` that generates text, or if the model needs code
    that comes with it or a package that is not installed.

    Args:
        folder: of the model.
        config: parsed.
        shapes: of its tensors.
        needed: whether the network will be run. If not, transformers need not know the `model_type`, and a head may be
            missing where the class that the config names has none.

    Raises:
        InputError: if transformers cannot build the network, if a parameter has another number of elements than its
            tensors or has no tensors, or if only one of network and model has the bias of a weight.
        LewisError: if transformers does not know the `model_type`.
    """
    from transformers import CONFIG_MAPPING, __version__

    if needed and not brings_class(config) and (kind := config.get("model_type")) not in CONFIG_MAPPING:
        raise LewisError(
            f"{folder}: config.json: model_type: expected one that transformers {__version__} knows, got {kind!r}; "
            "upgrade transformers, or merge the model without a lewis block and without evaluating it"
        )
    placing = _placing(folder, config, shapes)
    if placing is None:
        return
    with_head = needed or _has_head(placing, config)
    knows_all = needed or not in_layers(placing.unplaced)  # an unplaced tensor may be what is missing
    for wrong in (*_unlike_parameters(placing, shapes), *(_missing(placing, with_head) if knows_all else ())):
        raise InputError(f"{folder}: config.json: {wrong}; take the config.json that came with these weights")


def check_stack(
    home: Path, config: Mapping[str, Any], shapes: Shapes, stacked: Mapping[str, Any], stacked_shapes: Shapes
) -> None:
    """Check a result whose layers are stacked as `check_network` checks a model, before anything of it is written.

    A tensor of a layer for which the network has no place is an error, too. Where the tensors of the model that gives
    the config differ from its own network, `check_network` reports that.

    Args:
        home: the folder of the model that gives the config.
        config: its config, parsed.
        shapes: of its tensors.
        stacked: the config of the result.
        stacked_shapes: of the tensors of the result.

    Raises:
        InputError: naming the changed keys of the config, and how the network of the result differs from its tensors.
    """
    with store.scratch_folder("config") as folder:
        (folder / "config.json").write_text(json.dumps(stacked))
        try:
            found = _problems(folder, stacked, stacked_shapes)
        except InputError as error:
            found = [str(error).removeprefix(f"{folder}: ")]
    if not found:
        return
    try:
        known = {_DIGITS.sub("", each) for each in _problems(home, config, shapes)}
    except InputError:
        return
    keys = ", ".join(changed_keys(config, stacked)) or "order of layers"
    for wrong in found:
        if _DIGITS.sub("", wrong) not in known:
            raise InputError(
                f"{home / 'config.json'}: slices: with the result's {keys}: {wrong}; change layer_range, or use models"
            )


def _problems(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """Describe each difference between the network of a config and the tensors; raises as `_placing`."""
    placing = _placing(folder, config, shapes)
    if placing is None:
        return []
    return [
        *_unlike_parameters(placing, shapes),
        *_missing(placing, _has_head(placing, config)),
        *(f"{each!r} is in the weights, but not in the network of this config" for each in in_layers(placing.unplaced)),
    ]


def _placing(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> Placing | None:
    """Find the tensors in the network of a config; None if there is no class of it here that generates text.

    Raises:
        InputError: if transformers cannot build the network.
    """
    from transformers import CONFIG_MAPPING

    if brings_class(config) or config.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        return Placing(built(folder, (folder / "config.json").read_bytes()), shapes)
    except InputError as error:
        if isinstance(error.__cause__, ImportError | NoClassError):
            return None
        raise


def _has_head(placing: Placing, config: Mapping[str, Any]) -> bool:
    return type(placing.module).__name__ in (config.get("architectures") or ())


def _unlike_parameters(placing: Placing, shapes: Shapes) -> Iterator[str]:
    """Describe each mismatch of parameters with the tensors that they are, or that a conversion makes them of."""
    theirs = {name: tuple(tensor.shape) for name, tensor in placing.state.items()}
    for name, shape in theirs.items():
        # Only the numbers of elements are compared, since transformers transposes some tensors when it loads them.
        if name in shapes and math.prod(shapes[name]) != math.prod(shape):
            yield f"{name!r} has shape {list(shapes[name])}, but in the network of this config it has {list(shape)}"
        bias = name.removesuffix(".weight") + ".bias"
        if name != bias and name in shapes and (bias in shapes) != (bias in theirs):
            place, other = ("network of this config", "weights")[:: -1 if bias in shapes else 1]
            yield f"{bias!r} is in the {place}, but not in the {other}"
    parts: dict[tuple[str, ...], list[str]] = {}  # tensors -> the parameters that are made of them
    for name, found in placing.sources.items():
        converter = placing.converters.get(name)
        if converter is None and found[0][0] not in theirs:
            parts[found[0][:1]] = [name]
        elif converter is not None and only_moves(converter):
            parts.setdefault(tuple(tensor for tensor, _ in found), []).append(name)
    for tensors, names in parts.items():
        stored, wanted = sum(math.prod(shapes[t]) for t in tensors), sum(math.prod(theirs[n]) for n in names)
        if stored != wanted:
            yield (
                f"{names[0]!r} has shape {list(theirs[names[0]])} in the network of this config, but the tensors that "
                f"make it have {stored:,} numbers in all, the first is {tensors[0]!r}"
            )


def _missing(placing: Placing, with_head: bool) -> Iterator[str]:
    """Describe each parameter that text passes through and that neither has a tensor nor is tied to one that has."""
    network, state = placing.module, placing.state
    made = {id(state[name]) for name in placing.sources}
    head = network.get_output_embeddings()
    of_head = {id(each) for each in head.parameters()} if head is not None else set()
    inside = {id(each) for each in text_tower(network).parameters()}
    for name, value in state.items():
        module = network.get_submodule(name.rpartition(".")[0])
        if not isinstance(value, nn.Parameter) or id(value) in made or hasattr(module, "create_weight"):
            continue
        if id(value) in of_head and with_head:
            yield f"tie_word_embeddings: {name!r} is a weight of its own in the network of this config, but not stored"
        elif id(value) in inside - of_head:
            yield f"{name!r} is in the network of this config, but not in the weights"
