"""Find the places of a checkpoint's tensors in a network, by transformers' own tables of renaming and conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from lewis import private_names
from lewis.lazy_torch import torch
from lewis.models.names import HEADS, Shapes

Read = Callable[[str], "torch.Tensor"]
_MOVES = frozenset(  # operations of conversions that move values, and never round, pad or drop some
    (
        *("Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose"),
        *("PermuteForRope", "Conv3dToLinear", "LinearToConv3d", "Inkling2LoopMergeMessageQueries"),
        *("ErnieFuseAndSplitTextVisionExperts", "ErnieSplitAndDecoupleTextVisionExperts"),
    )
)


class Placing:
    """The parameters (and saved buffers) of a network, and the checkpoint tensors that each is made of.

    Attributes:
        sources: parameter -> the tensors that it is made of, each with the pattern of the conversion that it matched;
            None: it is the parameter, value by value.
        converters: parameter -> the conversion that makes it.
        firsts: parameter -> the first of the parameters that its tensors are converted to.
        unplaced: tensors that the network has no place for.
    """

    def __init__(self, module: Any, tensors: Shapes) -> None:
        """Find the parameter of each tensor."""
        self.module = module
        self.state: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
        self.sources: dict[str, list[tuple[str, str | None]]] = {}
        self.converters: dict[str, Any] = {}
        self.firsts: dict[str, str] = {}
        self.unplaced: list[str] = []
        renamings, converters = _conversions(module)
        of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        for tensor in sorted(tensors, key=natural):
            name, pattern = (tensor, None) if tensor in self.state else self._renamed(tensor, renamings, converters)
            if name not in self.state:
                self.unplaced.append(tensor)
                continue
            targets = [name] if pattern is None else self._targets(name, of_pattern[pattern])
            for target in targets:
                self.sources.setdefault(target, []).append((tensor, pattern))
                if pattern is not None:
                    self.converters[target], self.firsts[target] = of_pattern[pattern], name

    def value(self, parameter: str, read: Read) -> torch.Tensor:
        """Make a parameter from the checkpoint's tensors."""
        found = self.sources[parameter]
        converter = self.converters.get(parameter)
        if converter is None:
            return read(found[0][0])
        made, first = copy.deepcopy(converter), self.firsts[parameter]
        for tensor, pattern in found:
            made.add_tensor(first, tensor, pattern, lambda tensor=tensor: read(tensor))
        values = made.convert(first, model=self.module, config=self.module.config)[parameter]
        return values[0] if isinstance(values, list) else values

    def _targets(self, name: str, converter: Any) -> list[str]:
        """All parameters that a tensor is converted to; `name` is the first."""
        first, *others = converter.target_patterns
        return [name, *(each for other in others if (each := name.replace(first, other)) in self.state)]

    def _renamed(self, tensor: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        rename, prefix = private_names.RENAME_KEY.get(), self.module.base_model_prefix
        found: tuple[str, str | None] = rename(tensor, renamings, converters, prefix, self.state)
        return found if found[0] in self.state else rename(tensor, [], [], prefix, self.state)


def untie(module: Any, tensors: Shapes) -> None:
    """Give the head of a network a weight of its own if the class ties it by default, and the model does not.

    Args:
        module: the network, on the meta device; it is changed.
        tensors: name -> shape in the checkpoint, without tied names.
    """
    if not any(name.endswith(HEADS) for name in tensors):
        return
    head, used = module.get_output_embeddings(), Placing(module, tensors).sources
    weight: Any = getattr(head, "weight", None)
    names = [name for name, value in module.state_dict(keep_vars=True).items() if value is weight and name in used]
    if len(names) > 1 and any(name.endswith(HEADS) for name in names):
        head.weight = torch.nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares numbers in a name by their value: experts are stacked in this order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def operations_of(converter: Any) -> Sequence[tuple[str, int | None]]:
    """Return the name and dimension of each operation of a conversion."""
    return [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]


def only_moves(converter: Any) -> bool:
    """Whether a conversion moves values, and never rounds, pads or drops some."""
    return all(name in _MOVES for name, _ in operations_of(converter))


def _conversions(network: Any) -> tuple[list[Any], list[Any]]:
    from transformers import WeightConverter

    found, renaming = private_names.CONVERSIONS.get()(network), private_names.WEIGHT_RENAMING.get()
    return [e for e in found if isinstance(e, renaming)], [e for e in found if isinstance(e, WeightConverter)]
