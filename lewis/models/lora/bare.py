"""A network for a base that transformers cannot build: a module for each part of its tensors' names."""

from __future__ import annotations

from collections.abc import Mapping

from lewis.lazy_torch import nn, torch
from lewis.models.names import EMBEDDINGS, Shapes
from lewis.rehearsal.question import UnfitError


def bare_network(base: Shapes, tied: Mapping[str, str], weights: Shapes) -> nn.Module:
    """Make modules with a base's tensors as their parameters, on the meta device.

    A matrix is that of a linear module, but for embeddings: those that are known by name, and those that the adapter
    has factors of an embedding for.

    Args:
        base: the shapes of the base's tensors.
        tied: its tied names.
        weights: the shapes of the adapter's tensors.

    Raises:
        UnfitError: if a tensor has a name that no module can have.
    """
    root = nn.Module()
    try:
        with torch.device("meta"):
            for name in [name for name, shape in base.items() if name.endswith(".weight") and len(shape) == 2]:
                path = name.removesuffix(".weight")
                embeds = name.endswith(EMBEDDINGS) or any(f"{path}.lora_embedding_A" in key for key in weights)
                rows, columns = base[name]
                module = nn.Embedding(rows, columns) if embeds else nn.Linear(columns, rows, f"{path}.bias" in base)
                _put(root, path, module)
            for head, of in tied.items():
                if of in base:
                    rows, columns = base[of]
                    module = nn.Linear(columns, rows, bias=False)
                    module.weight = root.get_parameter(of)
                    _put(root, head.removesuffix(".weight"), module)
            held = root.state_dict()
            for name, shape in base.items():
                if name not in held:
                    path, _, leaf = name.rpartition(".")
                    _at(root, path).register_parameter(leaf, nn.Parameter(torch.empty(shape)))
    except (KeyError, AttributeError, RuntimeError) as error:
        raise UnfitError(
            f"transformers cannot build its base, whose tensors have names that no module has: {error}"
        ) from error
    return root


def _at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, which is made if there is none."""
    module = root
    for part in filter(None, path.split(".")):
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, with the modules that are there below it."""
    above, _, leaf = path.rpartition(".")
    for name, child in _at(root, path).named_children():
        module.add_module(name, child)
    setattr(_at(root, above), leaf, module)
