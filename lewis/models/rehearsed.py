"""What transformers says to a model: the questions of `lewis.rehearsal.network` about a folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lewis.errors import LewisError
from lewis.models.broken import broken
from lewis.models.config import brings_class
from lewis.models.files.safetensors_file import Headers
from lewis.models.hub.pin import Pinned
from lewis.rehearsal.answers import answers
from lewis.rehearsal.network import CONFIG, Completed, Network
from lewis.rehearsal.question import Question, Refused


def question(
    item: object,
    home: Path,
    config: Mapping[str, Any],
    header: Headers,
    *,
    lent: Headers | None = None,
    runs: bool = False,
) -> Network | None:
    """The question whether transformers builds the network of a config and loads its tensors; no weight is read.

    Args:
        item: what messages call it.
        home: the folder with the model's generation_config.json.
        config: parsed.
        header: of the tensors.
        lent: of tensors that the network gets from another model, if it has them.
        runs: whether the network will be run on text.

    Returns:
        None for a model whose class comes with it, which transformers cannot build without its code.
    """
    if brings_class(config):
        return None
    return Network.of(str(item), home, config, header, lent=lent, runs=runs)


def check_loads(asked: Mapping[Pinned, Question]) -> None:
    """Ask about all models and adapters, and refuse those that transformers or PEFT does not take.

    Raises:
        Refused: naming each of them, the key of its config and what the library says.
        BrokenModelError: instead, if the first of them is a commit of the Hub.
        LewisError: if a network will be run, and transformers has none for its config.
    """
    try:
        found = answers(list(asked.values()))
    except Refused as error:
        pinned = next(each for each, question in asked.items() if question.item in error.problems)
        if pinned.is_local:
            raise
        why = "\n".join(message.removeprefix(f"{pinned.ref}: ") for message in error.problems.values())
        how = "broken" if isinstance(asked[pinned], Network) else "unusable"  # an adapter may be one of another base
        raise broken(pinned.ref, why, pinned.commit, how) from error
    for each, answer in zip(asked.values(), found, strict=True):
        if each.settings.get("runs") and answer["class"] is None:
            raise LewisError(
                f"{each.item}: config.json: {answer['why']}; upgrade transformers, or merge the model without a "
                "lewis block and without evaluating it"
            )


def completed(home: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config with all defaults of its class; None if transformers does not know it, or its class comes with it.

    Raises:
        Refused: if transformers refuses the config.
    """
    if brings_class(config) or "model_type" not in config:
        return None
    [found] = answers([Completed(str(home), {CONFIG: json.dumps(config)})])
    whole: dict[str, Any] | None = found["config"]
    return whole
