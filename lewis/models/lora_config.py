"""The settings of a PEFT LoRA adapter, adapter_config.json: read, checked, and what is not supported refused."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.input_files import read_json

CONFIG = "adapter_config.json"
_LONGEST = 1000  # characters of a pattern
_PATIENCE = 1.0  # seconds to compare one pattern with one name
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
        settings: dict[str, Any] = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
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
    _check_numbers(path, settings, "lora_alpha", "alpha_pattern", _is_finite, "a finite number")
    _check_numbers(path, settings, "r", "rank_pattern", _is_rank, "a whole number above 0")
    return settings


def by_pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """A module's value, by PEFT's rule: the first pattern that matches the name, or its end after a dot, decides.

    Raises:
        InputError: if a pattern takes longer than any that is meant: some need time exponential in the name's length.
    """
    import regex  # as re, but it can be told to stop

    for pattern, value in (patterns or {}).items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATIENCE):
                return float(value)
        except (TimeoutError, regex.error) as error:
            raise InputError(
                f"{CONFIG}: the pattern {pattern!r} cannot be compared with {module!r}: {error}"
            ) from error
    return float(default)


def _check_numbers(
    path: Path, settings: Mapping[str, Any], key: str, pattern_key: str, is_fine: Callable[[Any], bool], expected: str
) -> None:
    """Check a setting, and the patterns of modules that have another value of it."""
    patterns = settings.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {pattern_key}: expected a JSON object, got {patterns!r}")
    given = {key: settings[key]} if key in settings else {}
    for name, value in {**given, **patterns}.items():
        if not is_fine(value):
            raise InputError(f"{path}: {name}: expected {expected}, got {value!r}")
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            raise InputError(
                f"{path}: {pattern_key}: a pattern of {len(pattern)} characters; expected {_LONGEST} at most"
            )
        try:
            re.compile(f"({pattern})")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{path}: {pattern_key}: {pattern!r} is no regular expression: {error}") from error


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number that is too large for a float
        return False


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
