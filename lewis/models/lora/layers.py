"""Read from the layers of PEFT what an adapter changes, and from which keys of its file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from typing import Any

from lewis.lazy_torch import torch
from lewis.models.lora.places import MERGE, Change
from lewis.models.names import Shapes
from lewis.rehearsal.question import UnfitError

_NAME = "default"  # PEFT's name for an adapter that has none
_DORA = ("DoraLinearVariant", "DoraEmbeddingVariant")


class Loaded:
    """An adapter whose keys PEFT has loaded into its model.

    Attributes:
        joined: keys of its file that PEFT puts together to factors of other shapes.
        scales: identity of a parameter with such factors -> their scale.
        unexpected: keys of its file that PEFT leaves out.
        untouched: modules that the config names and the file has nothing for; PEFT leaves them as they are.
    """

    def __init__(self, model: Any, weights: Shapes) -> None:
        """Load keys, without values.

        Args:
            model: of PEFT.
            weights: the shapes of the adapter's tensors.
        """
        from peft import set_peft_model_state_dict

        given = {key: torch.zeros(()).expand(s) if prod(s) else torch.empty(s) for key, s in weights.items()}
        keys = {value.data_ptr(): key for key, value in given.items()}  # which PEFT's renaming keeps
        state: dict[str, torch.Tensor] = {}

        def load(values: dict[str, torch.Tensor], strict: bool = True) -> Any:
            state.update(values)
            on_meta = {name: value.to("meta") for name, value in values.items()}
            return type(model).load_state_dict(model, on_meta, strict=strict)

        model.load_state_dict = load
        set_peft_model_state_dict(model, given)
        self._model = model
        self._state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self._found = found = {name: keys.get(value.data_ptr()) for name, value in state.items()}
        self._keys = {id(of): found[name] for name, of in self._state.items() if name in found}
        self.joined = [key for key in weights if key not in found.values()]
        self.scales: dict[int, float] = {}
        self.unexpected = [key for name, key in found.items() if key and name not in self._state]
        self.untouched: list[str] = []
        self._used = set[int]()

    def changes(self, config: Any) -> list[Change]:
        """All changes that the adapter makes, but for those by joined factors.

        Args:
            config: of PEFT.

        Raises:
            UnfitError: naming a layer without arithmetic, or what the file lacks.
        """
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        others = list[Change]()
        for path, layer in self._model.named_modules():
            path = path.removeprefix("base_model.model.")
            if isinstance(layer, TrainableTokensLayer):
                others += self._rows(path, layer)
            elif isinstance(layer, LoraLayer):
                others += self._low_rank(path, layer, config)
            elif isinstance(layer, BaseTunerLayer):
                raise _no_arithmetic(path, layer, config)
        whole = [
            Change("whole", of, {"key": key})
            for name, of in self._state.items()
            if id(of) not in self._used and (key := self._found.get(name))
        ]
        self.unexpected += [] if self.scales else self.joined
        return [*whole, *others]

    def _take(self, of: torch.Tensor) -> str | None:
        self._used.add(id(of))
        return self._keys.get(id(of))

    def _rows(self, path: str, layer: Any) -> Iterator[Change]:
        if layer.tied_adapter is None:
            key = self._take(layer.trainable_tokens_delta[_NAME])
            if key is None:
                raise UnfitError(f"PEFT finds no trained rows of {path} in its file")
            data = {"key": key, "ids": list(layer.token_indices[_NAME])}
            name, weight = f"{path.removesuffix('.token_adapter')}.weight", layer.get_base_layer().weight
            fit = [type(each) is int and 0 <= each < len(weight) for each in data["ids"]]
            if not all(fit):  # PEFT sees that when there are values
                raise UnfitError(
                    f"it trains the rows {data['ids']} of {name!r}, which has {len(weight)}; expected the ids of tokens"
                )
            yield Change("rows", weight, data, name)

    def _low_rank(self, path: str, layer: Any, config: Any) -> Iterator[Change]:
        from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

        variant, kind = type(layer.lora_variant.get(_NAME)).__name__, type(layer)
        if _NAME not in layer.scaling:
            return
        if kind not in (Linear, Embedding, ParamWrapper) or variant not in ("NoneType", *_DORA):
            raise _no_arithmetic(path, layer if variant == "NoneType" else layer.lora_variant[_NAME], config)
        if kind is Embedding:
            factors = {"lora_A": layer.lora_embedding_A[_NAME], "lora_B": layer.lora_embedding_B[_NAME]}
        else:
            factors = {"lora_A": layer.lora_A[_NAME].weight, "lora_B": layer.lora_B[_NAME].weight}
            factors |= {} if layer.lora_B[_NAME].bias is None else {"bias of lora_B": layer.lora_B[_NAME].bias}
        factors |= {"magnitude vector": layer.lora_magnitude_vector[_NAME].weight} if variant in _DORA else {}
        lacking = [part for part, of in factors.items() if id(of) not in self._keys]
        keys = {part: self._take(of) for part, of in factors.items()}
        if len(lacking) == len(factors) and config.init_lora_weights is True:
            self.untouched.append(path)
            return
        if lacking:
            raise UnfitError(f"its file has no {' and no '.join(lacking)} for {path}; the config is of another adapter")
        scale = layer.scaling[_NAME]
        if not math.isfinite(scale):
            raise UnfitError(f"the scale of {path} is {scale}, so its merged weights would not be finite")
        leaf, stack = getattr(layer, "parameter_name", "weight"), 0
        param = getattr(layer.get_base_layer(), leaf)
        if keys["lora_A"] is None or keys["lora_B"] is None:  # PEFT has put them together from several keys
            self.scales[id(param)] = scale
            return
        transposed = kind is Embedding or bool(layer.fan_in_fan_out)
        if kind is ParamWrapper:
            stack = layer.num_experts if layer.num_experts > 1 else 0
            transposed = bool(stack and getattr(layer.get_base_layer(), "is_transposed", False))
        names = {"a": keys["lora_A"], "b": keys["lora_B"], "magnitude": keys.get("magnitude vector")}
        data = {**names, "scale": scale, "transposed": transposed, "stack": stack}
        yield Change("low_rank", param, data, f"{path.partition('.base_layer')[0]}.{leaf}")
        if bias := keys.get("bias of lora_B"):
            yield Change("bias", layer.get_base_layer().bias, {"key": bias, "scale": scale})


def _no_arithmetic(path: str, layer: Any, config: Any) -> UnfitError:
    kind = f"{type(layer).__name__} ({config.peft_type.value})"
    return UnfitError(f"it puts {kind} on {path}, which PEFT takes and LEWIS has no arithmetic for; {MERGE}")
