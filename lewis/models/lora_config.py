"""The settings of a PEFT LoRA adapter, adapter_config.json: read, checked, and what is not supported refused."""

import json
import re
from pathlib import Path
from typing import Any

from lewis.errors import InputError

CONFIG = "adapter_config.json"
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a LoRA with biases (lora_bias)",
    "layer_replication": "a LoRA that replicates layers",
    "target_parameters": "a LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "a LoRA with trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which is not always on,",
}


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in a folder.

    Raises:
        InputError: if they cannot be read, are no LoRA's, or ask for something that is not supported.
    """
    path = folder / CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{path}: expected a LoRA adapter (peft_type LORA), got {kind!r}; merge it into its base first"
        )
    refused = [words for key, words in _REFUSED.items() if settings.get(key)]
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        refused.append(f"a LoRA that changes its base (init_lora_weights {initial})")
    if settings.get("bias", "none") != "none":
        refused.append(f"a LoRA with trained biases (bias {settings['bias']})")
    if refused:
        raise InputError(
            f"{path}: {refused[0]} is not supported; merge it into its base with PEFT's merge_and_unload first"
        )
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: alpha_pattern: expected a JSON object, got {patterns!r}")
    for key, value in {"lora_alpha": settings.get("lora_alpha", 8), **patterns}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: {key}: expected a number, got {value!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{path}: alpha_pattern: {pattern!r} is no regular expression: {error}") from error
    return settings


def by_pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """A module's value, by PEFT's rule: the first pattern that matches the name, or its end after a dot, decides."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)
