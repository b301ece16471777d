"""Whether models can be merged: the base's set of tensors decides."""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from lewis.errors import InputError
from lewis.models.checkpoint import PER_TOKEN
from lewis.models.lora import Model
from lewis.models.safetensors_file import same_bits
from lewis.models.tokenizer import FIX, clash, tokenizer_folder

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
