"""The keys of an adapter's file: which module each is of, and what of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lewis.models.lora.config import token_indices
from lewis.models.names import PER_TOKEN, unwrapped

_FACTOR = re.compile(
    r"^(?P<module>.+?)\.lora_(?P<part>(?:embedding_)?[AB])(?:\.(?!bias$)\w+)??(?:\.(?P<kind>weight|bias))?$"
)
_MAGNITUDE = re.compile(r"^(?P<module>.+?)\.lora_magnitude_vector(?:\.\w+)??(?:\.weight)?$")
_ROWS = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.\w+)?$")


@dataclass
class Keys:
    """The keys of an adapter's file by what they are of.

    Attributes:
        parts: module, as its key calls it -> `A`, `B`, `bias` (of lora_B) or `magnitude` -> key.
        whole: tensor -> key of the values that replace it.
        rows: module -> key of the rows that replace those of some tokens.
        twice: two keys that stand for the same, if there are any.
        unknown: keys that stand for nothing.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    twice: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, settings: Mapping[str, Any]) -> None:
        """File a key under what it is of."""
        name = unwrapped(key)
        if match := _FACTOR.match(name):
            part = match["part"][-1] if match["kind"] != "bias" else "bias"
            self._put(self.parts.setdefault(match["module"], {}), part, key)
        elif match := _MAGNITUDE.match(name):
            self._put(self.parts.setdefault(match["module"], {}), "magnitude", key)
        elif (match := _ROWS.match(name)) and token_indices(settings, match["module"]) is not None:
            self._put(self.rows, match["module"], key)
        else:
            # With a LoRA on an embedding, PEFT saves the embedding itself too, as base_layer.
            stored = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
            bias = stored.endswith(".bias") and settings.get("bias", "none") != "none"
            known = settings.get("modules_to_save") or ".base_layer." in name or stored.endswith(PER_TOKEN) or bias
            if "lora_" in name or not known:
                self.unknown.append(key)
            else:
                self._put(self.whole, stored, key)

    def _put(self, found: dict[str, str], place: str, key: str) -> None:
        if place in found:
            self.twice.append((found[place], key))
        found[place] = key


def parameters_of(
    module: str, parts: Collection[str], targets: Collection[str], parameters: Mapping[str, Any]
) -> dict[str, str]:
    """The parameters that an adapter with `target_parameters` changes in one module.

    PEFT wraps the module once for each of them, in the order in which the module has them; so the key of the last one
    has the module's own path, that of the one before it `.base_layer` behind it, and so on.

    Args:
        module: its path in the network.
        parts: the paths of the modules in the adapter's keys.
        targets: `target_parameters`: names, or their ends after a dot.
        parameters: of the network.

    Returns:
        Path as in the key -> full name of the parameter.
    """
    own = [name for name in parameters if name.rpartition(".")[0] == module]
    chosen = [name for name in own if any(f".{name}".endswith(f".{target}") for target in targets)]
    depths = {f"{module}{'.base_layer' * depth}": name for depth, name in enumerate(reversed(chosen))}
    return {path: name for path, name in depths.items() if path in parts}
