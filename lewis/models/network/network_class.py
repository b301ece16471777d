"""Find a checkpoint's transformers class, build it on the meta device, and find the modules that text goes through.

No architecture is named here, and no code that comes with a model is run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock, get_ident
from typing import Any

from lewis import private_names
from lewis.errors import InputError
from lewis.lazy_torch import nn, torch
from lewis.models.config import brings_class, needs_code, read_config
from lewis.rehearsal.network import loading_classes

logger = logging.getLogger(__name__)
_BUILDING = Lock()
_STATE = "recurrent_states"  # an attribute of modules


def build(folder: Path, dtype: torch.dtype) -> Any:
    """Build the network of a model folder: parameters on the meta device, without values; buffers on the CPU.

    Raises:
        InputError: if transformers has no class for it or cannot build it, or it needs code that comes with the model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        own = next(iter(loading_classes(config, runs=True)), None)
        if own is None:
            raise ValueError(f"{type(config).__name__} has no class that generates text")
        text = config.get_text_config()
        for block in (config, text):  # the weights are read without their quantisation
            with suppress(AttributeError):
                del block.quantization_config
        if own.config_class is type(text):  # perhaps the class of the language model alone
            config = text
        with _empty_parameters():
            network = private_names.FROM_CONFIG.of(own)(config, dtype=dtype)
        if hasattr(network, "set_experts_implementation"):
            network.set_experts_implementation("eager")
        network.tie_weights()
        _begin_without_states(network)
    except Exception as error:  # any kind, by architecture
        reason = " ".join(str(error).split())[:300]
        if brings_class(read_config(folder)):
            raise needs_code(folder, "this model", "config.json") from error
        raise InputError(f"{folder}: transformers cannot build this model: {reason}") from error
    return network.eval()


def _begin_without_states(network: nn.Module) -> None:
    """Let a text begin without the state of the module's last call (RecurrentGemma), which may be another text's."""

    def begin(module: nn.Module, inputs: torch.Tensor, positions: torch.Tensor) -> Any:
        if bool((positions == 0).any()):
            setattr(module, _STATE, None)
        return type(module).forward(module, inputs, positions)

    for module in network.modules():
        if _STATE in vars(module):
            module.forward = partial(begin, module)  # no hook, in which another text's pass could run


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Put the parameters of modules that this thread makes in the block on the meta device, but not their buffers.

    accelerate's `init_empty_weights` does so for all threads, even for a running forward pass, and permanently if two
    threads use it at the same time. Only one block runs at a time, since transformers changes global state, too.
    """
    with _BUILDING:
        plain, builder = nn.Module.register_parameter, get_ident()

        def register(module: nn.Module, name: str, given: nn.Parameter | None) -> None:
            plain(module, name, given)
            if given is not None and get_ident() == builder:
                module._parameters[name] = empty = nn.Parameter(given.to("meta"), requires_grad=given.requires_grad)
                vars(empty).update(vars(given))

        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = plain  # type: ignore[method-assign]


def known_network(folder: Path) -> Any | None:
    """Return the network of a folder in fp32, cached by its config.json; None if it cannot be built."""
    try:
        return built(folder, (folder / "config.json").read_bytes())
    except InputError as error:
        logger.info("%s: so other names of its tensors are not known", error)
        return None


@lru_cache(maxsize=2)
def built(folder: Path, config: bytes) -> Any:
    """Build the network of a folder in fp32, cached by the folder and the bytes of its config.json."""
    return build(folder, torch.float32)


def text_tower(network: Any) -> Any:
    """The module that text goes through, without the head: the whole model, or the language model of a larger one."""
    if getattr(network.config, "is_encoder_decoder", False):
        return network
    found, used = network.get_decoder(), input_embeddings(network)
    if found is not network and any(module is used for module in found.modules()):
        return getattr(found, "base_model", found)  # of a language model with a head of its own (BLIP-2)
    return network.base_model


def input_embeddings(network: Any) -> Any:
    """The module that gives a token its vector: the decoder's, if the encoder reads no text (PP-FormulaNet)."""
    try:
        return network.get_input_embeddings()
    except NotImplementedError:
        return network.get_decoder().get_input_embeddings()


def lists_of_blocks(root: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost `nn.ModuleList`s in a module, by their paths."""
    lists = {name: each for name, each in root.named_modules() if isinstance(each, nn.ModuleList)}
    return {name: each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
