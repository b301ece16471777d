"""What the authors of LEWIS do (github.com/VidhiRambhia/LEWIS, read at 7630fe5), written out again as an oracle.

Sample by sample and layer by layer; not as they load it (fp16 on a GPU), but in the dtype of the model that is given.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def samples(rows: Path, tokenizer: Any, count: int = 15, length: int = 512) -> list[list[int]]:
    """Their calibration set of GSM8K: shuffled with seed 42, question, space, answer, filled up with the end token."""
    import datasets

    chosen = datasets.load_dataset("json", data_files=str(rows), split="train").shuffle(seed=42).select(range(count))
    tokenizer.pad_token = tokenizer.eos_token
    texts = [f"{row['question']} {row['answer']}" for row in chosen]
    found: list[list[int]] = tokenizer(texts, max_length=length, padding="max_length", truncation=True)["input_ids"]
    return found


@torch.no_grad()
def norms(model: Any, ids: Sequence[Sequence[int]], ratio: float = 0.5) -> dict[str, float]:
    """Norm of each linear layer, whose model is pruned on the way: measure a layer, prune its rows, run it again.

    Args:
        model: Llama-like, with `model.layers`; it is changed.
        ids: samples of one length; padding counts.
        ratio: of each row that is pruned.

    Returns:
        Name of the weight -> || |W| * sqrt(mean over samples of the sum over tokens of x^2) ||.
    """
    inner, found = model.model, {}
    hidden = [inner.embed_tokens(torch.tensor([sample])) for sample in ids]
    rotary = inner.rotary_emb(hidden[0], torch.arange(len(ids[0]))[None])

    def run(layer: nn.Module) -> list[torch.Tensor]:  # without a mask, attention is causal and sees the padding
        return [layer(x, attention_mask=None, position_embeddings=rotary) for x in hidden]

    for i, layer in enumerate(inner.layers):
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        means = {name: _RunningMean(module) for name, module in linears.items()}
        run(layer)
        for name, module in linears.items():
            scores = module.weight.abs() * means[name].stop().sqrt()
            found[f"model.layers.{i}.{name}.weight"] = float(torch.norm(scores))
            smallest = scores.sort(dim=-1, stable=True).indices[:, : int(scores.shape[1] * ratio)]
            module.weight.scatter_(1, smallest, 0.0)
        hidden = run(layer)
    return found


class _RunningMean:
    """Mean over the samples that have gone into a layer of the squared norm of each input channel."""

    def __init__(self, module: nn.Linear) -> None:
        self._mean, self._samples = torch.zeros(module.in_features, dtype=module.weight.dtype), 0
        self._hook = module.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        by_channel = inputs[0].reshape(-1, inputs[0].shape[-1]).t()
        self._mean *= self._samples / (self._samples + 1)
        self._samples += 1
        self._mean += torch.norm(by_channel, p=2, dim=1) ** 2 / self._samples

    def stop(self) -> torch.Tensor:
        self._hook.remove()
        return self._mean


def densities(base: Mapping[str, float], expert: Mapping[str, float], low: float, high: float) -> dict[str, float]:
    """Their densities: shares of each projection's movement, five decimals, one min-max over all."""
    moved = {name: abs(expert[name] - base[name]) for name in base}
    totals: dict[str, float] = {}
    for name, by in moved.items():
        totals[name.split(".", 3)[3]] = totals.get(name.split(".", 3)[3], 0.0) + by
    shares = {name: round(by / totals[name.split(".", 3)[3]], 5) for name, by in moved.items()}
    least, most = min(shares.values()), max(shares.values())
    return {name: low + (share - least) / (most - least) * (high - low) for name, share in shares.items()}
