"""How modules lay out their weights, and what transformers' conversions of checkpoint tensors do to them."""

from __future__ import annotations

import re
from typing import Any

from lewis.lazy_torch import nn


def stored_in_out(module: nn.Module) -> bool:
    """Whether stacked experts are stored as (experts, in, out): told by the module, or by their shapes (Llama 4)."""
    stacks = {name: value.shape for name, value in module.named_parameters(recurse=False) if value.dim() == 3}
    up, down = (next((stacks[name] for name in stacks if part in name), None) for part in ("gate_up", "down"))
    by_shape = up is not None and down is not None and up[-1] == 2 * down[-2]
    return by_shape or bool(getattr(module, "is_transposed", False))


def weights(module: nn.Module) -> list[str]:
    """The weights of a module that multiply its inputs."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return ["weight"]
    if isinstance(module, nn.Conv1d):  # of Mamba: three dimensions, but no stack
        return []
    flat = stacked_in(module)
    return [name for name, value in module.named_parameters(recurse=False) if value.dim() == 3 or name in flat]


def stacked_in(module: nn.Module) -> dict[str, int]:
    """Weights of two dimensions that hold several matrices, one after another in their rows -> how many.

    These are the experts of DBRX, and linear modules whose groups of outputs have inputs of their own (DeepSeek V4).
    """
    experts = getattr(module, "moe_num_experts", 0)
    if isinstance(module, nn.Linear):
        groups = getattr(module, "n_groups", 0)
        return {"weight": groups} if groups else {}
    matrices = [name for name, value in module.named_parameters(recurse=False) if value.dim() == 2]
    return dict.fromkeys(matrices, experts) if experts else {}


def only_stacks(converter: Any) -> bool:
    """Whether a conversion only stacks experts, in the order of their tensors (and their gate upon their up)."""
    operations = [type(each).__name__ for each in converter.operations]
    return operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def keeps_inputs(converter: Any, dimensions: int) -> str:
    """Whether a conversion leaves each row as it is: it brings them into another `order`, or tensors are `joined`."""
    operations = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    row = dimensions - 2
    if operations == [("Concatenate", row)]:
        return "joined"
    return "order" if operations in ([("Interleave", row)], [("Interleave", row), ("Chunk", row)]) else ""


def below_block(tensor: str) -> str:
    """What a tensor is called in its block: what follows the first number."""
    return re.sub(r"^.*?(?:^|\.)\d+\.", "", tensor, count=1).removesuffix(".weight")
