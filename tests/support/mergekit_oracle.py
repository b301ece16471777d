"""Run by the Python that has mergekit: for each line of its input, a folder, merges draws.pt there into results.pt."""

import sys
from pathlib import Path

import torch
from mergekit.merge_methods.api import merge_tensors


def merged(draw: dict) -> torch.Tensor | str:
    """What mergekit makes of a draw, or the error it stops with."""
    torch.manual_seed(draw["seed"])
    try:
        tensors, base = draw["experts"], draw["base"]
        if base is not None:  # in the middle: its place must not matter
            tensors = [*tensors[:1], base, *tensors[1:]]
        return merge_tensors(
            tensors, draw["method"], parameters=draw["parameters"], base_index=None if base is None else 1
        ).clone()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder = Path(line.strip())
        torch.save([merged(draw) for draw in torch.load(folder / "draws.pt")], folder / "results.pt")
        print("done", flush=True)
