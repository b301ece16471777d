"""The parts of a model of transformers: what text runs through, and its lists of blocks. No architecture is named."""

from __future__ import annotations

from typing import Any

from lewis.lazy_torch import nn


def text_tower(network: Any) -> Any:
    """The module that text goes through, without the head: the whole model, or the language model of a larger one."""
    if getattr(network.config, "is_encoder_decoder", False):
        return network
    found, used = network.get_decoder(), input_embeddings(network)
    if found is not network and any(module is used for module in found.modules()):
        return getattr(found, "base_model", found)  # of a language model with a head of its own (BLIP-2)
    return network.base_model


def input_embeddings(network: Any) -> Any:
    """The module that gives a token its vector; of a decoder on an encoder without words (PP-FormulaNet), its own."""
    try:
        return network.get_input_embeddings()
    except NotImplementedError:
        return network.get_decoder().get_input_embeddings()


def lists_of_blocks(root: nn.Module) -> dict[str, nn.ModuleList]:
    """Path -> each outermost `nn.ModuleList`."""
    lists = {name: each for name, each in root.named_modules() if isinstance(each, nn.ModuleList)}
    return {name: each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
