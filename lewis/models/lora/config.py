"""The settings of a PEFT LoRA adapter (adapter_config.json) and the keys of its weights: read, or refused."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.models.lora.modules import CONFIG, token_indices
from lewis.models.names import unwrapped

_LONGEST = 1000  # characters of a pattern
_MERGE = "merge it into its base with PEFT's merge_and_unload first"
_REFUSED = {
    "use_qalora": "QA-LoRA, which pools the inputs of a quantised base,",
    "use_bdlora": "BD-LoRA, which stores blocks of its factors,",
    "kasa_config": "KaSA, which cuts singular values off its base,",
    "monteclora_config": "MonteCLoRA, which samples its weights,",
    "layer_replication": "a LoRA that replicates layers",
}
_PER_TOKEN = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which is on from some tokens on only,",
    "arrow_config": "an Arrow router, which chooses among LoRAs for each token,",
}
_UNLIKE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NO_WEIGHTS = "learns inputs to a model, not weights of it, so there is nothing to merge: leave it out"
_PER_INPUT = "chooses among adapters for each input, so no weights stand for it: give the adapters one by one"
_KINDS = {  # peft_type -> what it does, and what to do instead
    "IA3": f"scales activations by learned vectors; {_MERGE}",
    "VERA": f"scales random projections that are shared by all layers, and may not be in its file; {_MERGE}",
    "PVERA": f"samples scales of random projections; {_MERGE}",
    "ADALORA": f"weights singular directions, and masks some; {_MERGE}",
    "LOHA": f"is a Hadamard product of two low-rank products; {_MERGE}",
    "LOKR": f"is a Kronecker product; {_MERGE}",
    "OFT": f"rotates the outputs of modules; {_MERGE}",
    "BOFT": f"rotates the outputs of modules in butterflies; {_MERGE}",
    "HRA": f"reflects the inputs of modules; {_MERGE}",
    "FOURIERFT": f"stores coefficients of a Fourier transform; {_MERGE}",
    "VBLORA": f"takes its factors from a bank of vectors; {_MERGE}",
    "LN_TUNING": f"trains norms; {_MERGE}",
    **dict.fromkeys(("XLORA", "POLY"), _PER_INPUT),
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _NO_WEIGHTS),
    **dict.fromkeys(("ADAPTION_PROMPT", "CPT", "CARTRIDGE"), _NO_WEIGHTS),
}
_CONTRADICTIONS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "target_modules is a pattern, and there are layers_to_transform or a layers_pattern": lambda given: (
        isinstance(given.get("target_modules"), str)
        and (given.get("layers_to_transform") is not None or given.get("layers_pattern") is not None)
    ),
    "there is a layers_pattern, and no layers_to_transform": lambda given: (
        given.get("layers_pattern") and given.get("layers_to_transform") is None
    ),
    "lora_bias is set together with use_dora or an init_lora_weights other than true": lambda given: (
        given.get("lora_bias") and (given.get("use_dora") or not isinstance(given.get("init_lora_weights", True), bool))
    ),
}
# Patterns of the keys in an adapter's file.
_FACTOR = re.compile(
    r"^(?P<module>.+?)\.lora_(?P<part>(?:embedding_)?[AB])(?:\.(?!bias$)\w+)??(?:\.(?P<kind>weight|bias))?$"
)
_MAGNITUDE = re.compile(r"^(?P<module>.+?)\.lora_magnitude_vector(?:\.\w+)??(?:\.weight)?$")
_ROWS = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.\w+)?$")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read and check the settings of the adapter in a folder.

    Raises:
        InputError: if they cannot be read, are not those of a LoRA, or ask for something that is not supported.
    """
    path = folder / CONFIG
    try:
        settings: dict[str, Any] = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    kind = settings.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        known = _KINDS.get(kind) if isinstance(kind, str) else None
        advice = f"this kind {known}" if known else _MERGE
        raise InputError(f"{path}: expected a LoRA adapter (peft_type LORA), got {kind!r}: {advice}")
    on = {key for key, value in settings.items() if value or value == {}}  # an empty object is PEFT's defaults
    refused = [f"{words} is not supported; {_MERGE}" for key, words in _REFUSED.items() if key in on]
    refused += [f"{words} cannot be merged; leave it out" for key, words in _PER_TOKEN.items() if key in on]
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_UNLIKE_BASE):  # PEFT takes OLoRA for olora
        problem = f"a LoRA that changes its base (init_lora_weights {initial}) is not supported; {_MERGE}"
        refused.append(problem + ", or save it with path_initial_model_for_weight_conversion")
    if refused:
        raise InputError(f"{path}: {refused[0]}")
    _check_numbers(path, settings, "lora_alpha", "alpha_pattern", _is_finite, "a finite number")
    _check_numbers(path, settings, "r", "rank_pattern", _is_rank, "a whole number above 0")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        _check_shape(
            path, settings, key, lambda value: isinstance(value, str) or _is_names(value), "names, or a pattern"
        )
        _check_patterns(path, key, [settings[key]] if isinstance(settings.get(key), str) else [])
    for key in ("target_parameters", "modules_to_save"):
        _check_shape(path, settings, key, _is_names, "a list of names")
    _check_patterns(path, "modules_to_save", settings.get("modules_to_save") or [])
    _check_shape(path, settings, "layers_to_transform", _are_layers, "the number of a layer, or a list of them")
    _check_shape(path, settings, "bias", ("none", "all", "lora_only").__contains__, "none, all or lora_only")
    _check_shape(path, settings, "trainable_token_indices", _are_indices, "a list of token ids, or one for each module")
    _check_shape(path, settings, "token_indices", _are_indices, "a list of token ids")
    for contradiction in (words for words, holds in _CONTRADICTIONS.items() if holds(settings)):
        raise InputError(f"{path}: {contradiction}, which PEFT refuses too; the config belongs to another adapter")
    return settings


def _check_numbers(
    path: Path, settings: Mapping[str, Any], key: str, pattern_key: str, is_fine: Callable[[Any], bool], expected: str
) -> None:
    """Check a numeric setting, and the patterns that give some modules another value of it."""
    patterns = settings.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {pattern_key}: expected a JSON object, got {patterns!r}")
    given = {key: settings[key]} if key in settings else {}
    for name, value in {**given, **patterns}.items():
        if not is_fine(value):
            raise InputError(f"{path}: {name}: expected {expected}, got {value!r}")
    _check_patterns(path, pattern_key, patterns)


def _check_patterns(path: Path, key: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            raise InputError(f"{path}: {key}: a pattern of {len(pattern)} characters; expected {_LONGEST} at most")
        try:
            re.compile(f"({pattern})")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{path}: {key}: {pattern!r} is no regular expression: {error}") from error


def _check_shape(
    path: Path, settings: Mapping[str, Any], key: str, is_fine: Callable[[Any], bool], expected: str
) -> None:
    if settings.get(key) is not None and not is_fine(settings[key]):
        raise InputError(f"{path}: {key}: expected {expected}, got {str(settings[key])[:80]}")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_indices(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_are_indices(each) and not isinstance(each, dict) for each in value.values())
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _are_layers(value: Any) -> bool:
    return _are_indices([value]) or _are_indices(value)


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number that is too large for a float
        return False


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_finite(value) and value > 0


@dataclass
class Keys:
    """The keys of an adapter's file, by the module or parameter that they change.

    Attributes:
        parts: module, as its key calls it -> `A`, `B`, `bias` (of lora_B) or `magnitude` -> key.
        whole: tensor -> key of the values that replace it.
        rows: module -> key of the rows that replace those of some tokens.
        twice: pairs of keys that stand for the same tensor.
        unused: keys that PEFT does not read: copies, and rows of tokens that the settings do not name.
        unknown: keys with `lora_` in them that have none of the known forms.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    twice: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, settings: Mapping[str, Any]) -> None:
        """Add a key, under the module or parameter that it changes."""
        name = unwrapped(key)
        if match := _FACTOR.match(name):
            part = match["part"][-1] if match["kind"] != "bias" else "bias"
            self._put(self.parts.setdefault(match["module"], {}), part, key)
        elif match := _MAGNITUDE.match(name):
            self._put(self.parts.setdefault(match["module"], {}), "magnitude", key)
        elif match := _ROWS.match(name):
            if token_indices(settings, match["module"]) is not None:
                self._put(self.rows, match["module"], key)
            else:
                self.unused.append(key)
        elif ".modules_to_save." in name or ".original_module." in name:
            self.unused.append(key)
        elif "lora_" in name:
            self.unknown.append(key)
        else:  # with a LoRA on an embedding, PEFT saves the embedding itself too, as base_layer
            self._put(self.whole, name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", "."), key)

    def _put(self, found: dict[str, str], place: str, key: str) -> None:
        if place in found:
            self.twice.append((found[place], key))
        found[place] = key


def parameters_of(
    module: str, parts: Collection[str], targets: Collection[str], parameters: Mapping[str, Any]
) -> dict[str, str]:
    """The parameters that an adapter with `target_parameters` changes in one module.

    PEFT wraps the module once for each of them, in the order in which the module has them. So the last one has the
    module's own path in the keys, the one before it that path and `.base_layer`, and so on.

    Args:
        module: its path in the network.
        parts: the paths of the modules in the adapter's keys.
        targets: `target_parameters`: names, or their ends after a dot.
        parameters: those of the network, by their full names.

    Returns:
        Path as in the key -> full name of the parameter.
    """
    own = [name for name in parameters if name.rpartition(".")[0] == module]
    chosen = [name for name in own if any(f".{name}".endswith(f".{target}") for target in targets)]
    depths = {f"{module}{'.base_layer' * depth}": name for depth, name in enumerate(reversed(chosen))}
    return {path: name for path, name in depths.items() if path in parts}
