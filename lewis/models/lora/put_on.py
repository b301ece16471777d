"""Put an adapter on its base's network with PEFT, without weights, load its keys, and merge it.

It runs in the child process of rehearsals. No rule of PEFT for names, patterns, layers or ties is known here: a
parameter is found again by its identity in the network, with the adapter on it, and when PEFT has merged it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lewis.errors import InputError
from lewis.models.lora.bare import bare_network
from lewis.models.lora.layers import Loaded
from lewis.models.lora.places import MERGE, Places
from lewis.models.names import Shapes
from lewis.models.network.network_class import build
from lewis.models.network.placing import untie
from lewis.rehearsal.question import UnfitError


def put_on(folder: Path, base: Shapes, tied: Mapping[str, str], weights: Shapes) -> dict[str, Any]:
    """Put an adapter on a network, load its keys, and merge it.

    Args:
        folder: with both configs.
        base: the shapes of the base's tensors.
        tied: its tied names.
        weights: the shapes of the adapter's tensors.

    Returns:
        The answer, as `AdapterQuestion` describes it.

    Raises:
        UnfitError, Exception: as `AdapterQuestion.ask`.
    """
    from peft import PeftConfig, get_peft_model

    config, problem = PeftConfig.from_pretrained(str(folder)), ""
    config.inference_mode = True
    if config.is_prompt_learning:
        raise UnfitError(f"its peft_type {config.peft_type.value} learns inputs to a model, not weights: leave it out")
    try:
        network = build(folder, torch.float32)
    except InputError as error:
        problem = str(error).removeprefix(f"{folder}: ")
        network = bare_network(base, tied, weights)
        config.task_type = None  # for which PEFT wants a class of transformers
    else:
        untie(network, base)
        _resize(network, base, weights)
    config.base_model_name_or_path = getattr(network, "name_or_path", None)
    places = Places(network, base, tied, converts=not problem)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _Writes(places.parameters.values()) as writes:
            model = get_peft_model(network, config, low_cpu_mem_usage=True)
        if writes.found:
            raise UnfitError(
                "PEFT changes the base itself when it loads this adapter (init_lora_weights "
                f"{config.init_lora_weights}): save it with path_initial_model_for_weight_conversion, or {MERGE}"
            )
        loaded = Loaded(model, weights)
        changes, merged = loaded.changes(config), model.merge_and_unload()
        changes += places.of_conversion(loaded.joined, weights, loaded.scales)
        rows = places.rows(changes, merged)
    if not rows["changes"]:
        raise UnfitError(f"its config names none of its tensors, the first of which is {next(iter(weights), '')!r}")
    said = [str(each.message) for each in caught if "/peft/" in each.filename]
    unused = {"unexpected": loaded.unexpected, "untouched": loaded.untouched}
    return {**rows, **unused, "warnings": said, "network": problem}


class _Writes(TorchFunctionMode):
    """Notices whether the data of some tensors are replaced in a block."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.found, self._ids = False, {id(each) for each in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__ and id(args[0]) in self._ids:  # type: ignore[attr-defined]
            self.found = True
        return func(*args, **(kwargs or {}))


def _resize(network: Any, base: Shapes, weights: Shapes) -> None:
    """Give a network the vocabulary of its weights and, as PEFT's users have to, that of the adapter's embedding."""
    paths = {id(module): path for path, module in network.named_modules()}
    for of in (base, weights):
        plain = {key.replace(".base_layer.", ".").replace(".token_adapter.", "."): shape for key, shape in of.items()}
        for module in (network.get_input_embeddings(), network.get_output_embeddings()):
            path, columns = paths.get(id(module)), tuple(getattr(getattr(module, "weight", None), "shape", ()))[1:]
            for name, shape in plain.items():
                its = path and f".{name}".endswith(f".{path}.weight") and shape[1:] == columns
                if its and shape[0] != len(network.get_input_embeddings().weight):
                    network.resize_token_embeddings(shape[0], mean_resizing=False)
