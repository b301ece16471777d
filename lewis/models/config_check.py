"""Whether a model's config.json and its tensors speak of the same model: the size of the vocabulary, and the layers."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.models.names import EMBEDDINGS

_LAYER = re.compile(r"(.*?(?:^|\.)(?:layers|h|blocks|encoder\.layer))\.(\d+)\.")


def check_config(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check `vocab_size` and `num_hidden_layers` of a config against the tensors; where one is silent, nothing is.

    A config that speaks of several towers (`text_config`, `vision_config`) must be right about one of them.

    Args:
        folder: of the model, for error messages.
        config: the parsed config.json.
        shapes: tensor -> shape.

    Raises:
        InputError: naming the key and the tensors that contradict it.
    """
    rows = {name: shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS) and shape}
    stated = set(_stated(config, "vocab_size"))
    more = {1} | ({8} if "mllama" in str(config.get("model_type")) else set())
    beyond = {
        count + each for count in stated for each in more
    }  # Moshi: a token that begins a text; Mllama: its images
    if rows and stated and not (stated | beyond) & set(rows.values()):
        name, count = next(iter(rows.items()))
        raise InputError(
            f"{folder}: config.json says vocab_size {_listed(stated)}, but {name!r} has {count} rows; "
            "the config belongs to another model"
        )
    stacks = _stacks(shapes)
    stated = set(_stated(config, "num_hidden_layers", "n_layer"))
    others = set(_stated(config, "num_layers_per_stack"))  # HRM: the layers count once for each of its stacks
    spare = max(_stated(config, "num_nextn_predict_layers"), default=0)  # stored after the layers that count
    if (
        stacks
        and stated
        and not any(count - more in stated | others for count in stacks.values() for more in {0, spare})
    ):
        prefix, count = max(stacks.items(), key=lambda stack: stack[1])
        raise InputError(
            f"{folder}: config.json says num_hidden_layers {_listed(stated)}, but the tensors {prefix}.* are of "
            f"{count} layers; the config belongs to another model"
        )


def _stated(config: Mapping[str, Any], *keys: str) -> Iterator[int]:
    """The whole numbers that a config, or a block in it, gives for a key."""
    for block in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in keys:
            value = block.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                yield value


def _stacks(names: Mapping[str, Any]) -> dict[str, int]:
    """What comes before the number in the names of a stack of layers -> how many layers it has."""
    found: dict[str, int] = {}
    for name in names:
        if match := _LAYER.match(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _listed(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))
