"""Run by the Python that has mergekit: for each line of its input, a folder, merges what is there.

That is draws.pt, tensors, into results.pt; or what the recipe.yaml of each of its folders says, into `theirs` there.
"""

import logging
import sys
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_tensors
from mergekit.options import MergeOptions


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


def merge_models(folder: Path) -> None:
    """Merge whole checkpoints; what it stops with goes into error.txt."""
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text()))
        run_merge(config, str(folder / "theirs"), options)
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable()
    for line in sys.stdin:
        folder = Path(line.strip())
        if (folder / "draws.pt").exists():
            torch.save([merged(draw) for draw in torch.load(folder / "draws.pt")], folder / "results.pt")
        for each in folder.glob("*/recipe.yaml"):
            merge_models(each.parent)
        print("done", flush=True)
