"""Whether models can be merged: the base's set of tensors decides."""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from lewis.errors import InputError
from lewis.models import hub
from lewis.models.checkpoint import HEADS, PER_TOKEN, read_config, weight_files
from lewis.models.lora import Model
from lewis.models.safetensors_file import same_bits
from lewis.models.source import Source
from lewis.models.tokenizer import FIX, clash, tokenizer_folder
from lewis.recipe.recipe import Recipe

logger = logging.getLogger(__name__)
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is in, by its name; None outside of the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def in_layers(names: Iterable[str]) -> list[str]:
    """Those of the tensors that are in a layer."""
    return [name for name in names if layer_of(name) is not None]


def check_compatible(
    base: Model, experts: Sequence[Model], excluded: Collection[str] = (), *, by_token: bool = False
) -> None:
    """Check that every expert has the base's tensors (but those that are excluded), shapes and vocabulary.

    What an expert has besides makes another architecture in a layer; outside of the layers (a classifier, a value head)
    it is left out of the merge with a warning. An expert that ties its head to its embedding lends that to a base that
    does not. The other way round the head must equal the expert's own embedding, since there is no place for another.

    Args:
        by_token: whether embeddings have been matched by token, so that vocabularies may differ.

    Raises:
        InputError: naming all that differ.
    """
    problems = []
    for expert in experts:
        if expert is not base:
            found = list(_differences(base, expert, excluded, "" if by_token else f"; {FIX}"))
            if not by_token and (differ := clash(tokenizer_folder(base), tokenizer_folder(expert))):
                found.append(f"another vocabulary: {differ}; {FIX}")
            problems += [f"{expert.folder}: {problem}" for problem in found]
    if problems:
        raise InputError(
            "\n".join([*problems, f"expected fine-tunes of the base {base.home}, of the same architecture"])
        )


def _differences(base: Model, expert: Model, excluded: Collection[str], fix: str) -> Iterator[str]:
    wanted = [name for name in base.tensors if name not in excluded]
    missing = [name for name in wanted if name not in expert.tensors and name not in expert.tied]
    if missing:
        yield f"{len(missing)} tensors of the base are missing, the first is {missing[0]!r}"
    extra = [name for name in expert.tensors if name not in base.tensors and name not in base.tied]
    inside = in_layers(extra)
    outside = [name for name in extra if layer_of(name) is None]
    if inside:
        yield f"{len(inside)} tensors are not in the base, the first is {inside[0]!r}"
    elif outside:
        logger.warning("%s: left out of the merge, since the base has no %s", expert.folder, ", ".join(outside))
    for name in wanted:
        other, shape = expert.tensors.get(expert.tied.get(name, name)), base.tensors[name].shape
        if other is not None and other.shape != shape:
            told = f"{name!r} has shape {list(other.shape)}, in the base it is {list(shape)}"
            yield told + (fix if name.endswith(PER_TOKEN) else "")
            break
    for head, embedding in base.tied.items():
        if head in expert.tensors and embedding in expert.tensors and not _equal(expert, head, embedding):
            yield (
                f"{head!r} is a weight of its own, in the base it is tied to the embedding; "
                "merge onto a base with a head of its own"
            )


def _equal(model: Model, one: str, other: str) -> bool:
    (kind, bits), (other_kind, other_bits) = model.raw(one), model.raw(other)
    return kind == other_kind and same_bits(bits, other_bits)


def preflight(recipe: Recipe, base: Source | None, experts: Sequence[Source]) -> None:
    """Check names, shapes and filters from the weight files' headers, before gigabytes are downloaded.

    Raises:
        InputError: naming every expert and tensor that does not fit.
        RecipeError: naming every filter that matches nothing.
    """
    for source in ([base] if base else []) + list(experts):
        if source.model.is_local:  # what is wrong with a folder itself is told first
            read_config(Path(source.model.source))
            weight_files(Path(source.model.source))
    first = base or experts[0]
    full = [source for source in experts if source.model.commit != first.model.commit]
    ours, problems = hub.tensor_headers(first.model), []
    wanted, by_token = [name for name in ours if not recipe.excludes(name)], recipe.vocabulary is not None
    for source in full:
        theirs = hub.tensor_headers(source.model)
        missing = [name for name in wanted if name not in theirs and not name.endswith(HEADS)]
        extra = in_layers(name for name in theirs if name not in ours)
        other = []
        for name in wanted:
            free = int(by_token and name.endswith(PER_TOKEN))  # the first dimension may differ
            if name in theirs and theirs[name][1][free:] != ours[name][1][free:]:
                other.append(name)
        if missing:
            problems.append(
                f"{source.ref}: {len(missing)} tensors of the base are missing, the first is {missing[0]!r}"
            )
        if extra:
            problems.append(f"{source.ref}: {len(extra)} tensors are not in the base, the first is {extra[0]!r}")
        if other:
            shapes = f"{list(theirs[other[0]][1])}, in the base it is {list(ours[other[0]][1])}"
            fix = f"; {FIX}" if other[0].endswith(PER_TOKEN) and not by_token else ""
            problems.append(f"{source.ref}: {other[0]!r} has shape {shapes}{fix}")
    if problems:
        raise InputError("\n".join([*problems, f"expected fine-tunes of {first.ref}, of the same architecture"]))
    recipe.check_filters(ours)
