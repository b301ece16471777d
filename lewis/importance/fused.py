"""Projections that a model keeps in one tensor: which output rows are q, k and v, or gate and up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lewis.lazy_torch import torch

_QKV = ("qkv_proj", "wqkv", "qkv", "c_attn", "query_key_value")
_SPLIT_OTHERWISE = ("codegen", "minimax")  # their qkv_proj is cut for the devices of its training, or by heads


@dataclass(frozen=True)
class Rows:
    """Output rows of a part: in each of `groups` equal groups, `length` rows from `start` on.

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
        """How many rows."""
        return self.length * self.groups

    def take(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """These rows of a tensor whose output rows are its dimension `axis`."""
        inside = values.unflatten(axis, (self.groups, self.width))
        return inside.narrow(axis + 1, self.start, self.length)

    def sum(self, of_rows: torch.Tensor) -> torch.Tensor:
        """The sum of one number per output row over these rows; `of_rows` has shape (rows,)."""
        return of_rows.reshape(self.groups, self.width)[:, self.start : self.start + self.length].sum()


def parts_of(parameter: str, outputs: int, config: Any) -> dict[str, Rows]:
    """The parts of a fused projection, by its name and the sizes in the config; empty if it is not fused, or odd.

    `qkv_proj`, `Wqkv` (Phi-3, MPT) and `c_attn` (GPT-2) hold all of q, then k, then v; `query_key_value` (GPT-NeoX,
    BLOOM, Falcon) holds for each group of heads its q, k and v; `gate_up_proj` holds gate, then up.

    Args:
        parameter: full name of the weight.
        outputs: its output rows.
        config: of the model.
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
