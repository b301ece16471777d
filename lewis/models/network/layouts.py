"""How modules lay out their weights (stacks of experts, fused projections), and what conversions do to these."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lewis.lazy_torch import nn, torch
from lewis.models.network.placing import operations_of

_QKV = ("qkv_proj", "wqkv", "qkv", "c_attn", "query_key_value")
_SPLIT_OTHERWISE = ("codegen", "minimax")  # their qkv_proj is cut for the devices of its training, or by heads


def stored_in_out(module: nn.Module) -> bool:
    """Whether stacked experts are stored as (experts, in, out): as the module says, or by their shapes (Llama 4)."""
    stacks = {name: value.shape for name, value in module.named_parameters(recurse=False) if value.dim() == 3}
    up, down = (next((stacks[name] for name in stacks if part in name), None) for part in ("gate_up", "down"))
    by_shape = up is not None and down is not None and up[-1] == 2 * down[-2]
    return by_shape or bool(getattr(module, "is_transposed", False))


def weights(module: nn.Module) -> list[str]:
    """Return the names of the weights of a module that multiply its inputs."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return ["weight"]
    if isinstance(module, nn.Conv1d):  # of Mamba: three dimensions, but no stack
        return []
    flat = stacked_in(module)
    return [name for name, value in module.named_parameters(recurse=False) if value.dim() == 3 or name in flat]


def stacked_in(module: nn.Module) -> dict[str, int]:
    """Return the two-dimensional weights that hold several matrices, one after another in their rows, and how many.

    These are the experts of DBRX, and linear modules whose groups of outputs have inputs of their own (DeepSeek V4).
    """
    experts = getattr(module, "moe_num_experts", 0)
    if isinstance(module, nn.Linear):
        groups = getattr(module, "n_groups", 0)
        return {"weight": groups} if groups else {}
    matrices = [name for name, value in module.named_parameters(recurse=False) if value.dim() == 2]
    return dict.fromkeys(matrices, experts) if experts else {}


def only_stacks(converter: Any) -> bool:
    """Whether a conversion only stacks experts, in the order of their tensors (and each gate above its up)."""
    operations = [name for name, _ in operations_of(converter)]
    return operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def keeps_inputs(converter: Any, dimensions: int) -> str:
    """Return `order` if a conversion only reorders rows, `joined` if it only joins tensors by rows, else empty."""
    operations, row = operations_of(converter), dimensions - 2
    if operations == [("Concatenate", row)]:
        return "joined"
    return "order" if operations in ([("Interleave", row)], [("Interleave", row), ("Chunk", row)]) else ""


def below_block(tensor: str) -> str:
    """Return the name of a tensor within its block: what follows the first number, without `.weight`."""
    return re.sub(r"^.*?(?:^|\.)\d+\.", "", tensor, count=1).removesuffix(".weight")


@dataclass(frozen=True)
class Rows:
    """The output rows of a part of a fused tensor: in each of `groups` equal groups, `length` rows from `start` on.

    Attributes:
        groups: 1 where the parts lie one after another, the number of key-value heads where each head has its own.
        width: rows of a group.
    """

    start: int
    length: int
    width: int
    groups: int = 1

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.length * self.groups

    def take(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Return these rows of a tensor whose output rows are its dimension `axis`, split into (groups, length)."""
        inside = values.unflatten(axis, (self.groups, self.width))
        return inside.narrow(axis + 1, self.start, self.length)

    def sum(self, of_rows: torch.Tensor) -> torch.Tensor:
        """Sum the numbers of these rows; `of_rows` has one number for each output row of the tensor, shape (rows,)."""
        return of_rows.reshape(self.groups, self.width)[:, self.start : self.start + self.length].sum()


def parts_of(parameter: str, outputs: int, config: Any) -> dict[str, Rows]:
    """Find the parts of a fused projection by its name and the sizes in the config; empty if none are known.

    `qkv_proj`, `Wqkv` (Phi-3, MPT) and `c_attn` (GPT-2) hold all of q, then k, then v; `query_key_value` (GPT-NeoX,
    BLOOM, Falcon) holds for each group of heads its q, k and v; `gate_up_proj` holds gate, then up.
    """
    text = config.get_text_config()
    name = parameter.lower().removesuffix(".weight").rpartition(".")[2]
    if "gate_up" in name and outputs % 2 == 0 and not getattr(config, "swiglu_alpha", None):
        half = outputs // 2
        return {"gate": Rows(0, half, outputs), "up": Rows(half, half, outputs)}
    by_head = name == "c_attn" and getattr(config, "multi_query", True) is False  # GPTBigCode
    if name not in _QKV or by_head or config.model_type in _SPLIT_OTHERWISE:
        return {}
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    given = [getattr(text, key, None) for key in ("num_key_value_heads", "num_kv_heads")]
    pairs = next((n for n in (*given, 1, heads) if n and outputs == (heads + 2 * n) * size), 0)
    if not pairs:
        return {}
    if name == "query_key_value":
        q, width = heads // pairs * size, outputs // pairs
        return {
            "q": Rows(0, q, width, pairs),
            "k": Rows(q, size, width, pairs),
            "v": Rows(q + size, size, width, pairs),
        }
    q, k = heads * size, pairs * size
    return {"q": Rows(0, q, outputs), "k": Rows(q, k, outputs), "v": Rows(q + k, k, outputs)}
