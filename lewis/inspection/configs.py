"""Findings from configs, tokenizers and headers of the models that are to be merged; no weights are read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.inspection.kinds import Finding
from lewis.models.chat_template import template_in
from lewis.models.files.folder import weight_files
from lewis.models.files.safetensors_file import Headers, file_headers
from lewis.models.hub import repository
from lewis.models.hub.pin import pin_folder
from lewis.models.names import HEADS
from lewis.models.quantised.find import dequantised
from lewis.models.rehearsed import completed
from lewis.models.source import ModelFiles, Source, commits_of
from lewis.models.tokenizer import TOKENIZER, read_vocabulary, same
from lewis.recipe.block import parts_of

_SHOWN = 4  # tokens that a finding names
_CONTEXT = (
    *("max_position_embeddings", "sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
    *("rope_scaling", "rope_theta"),  # in configs that transformers does not know
)
_FORWARD = (  # keys that decide what the same weights compute
    *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("layer_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "num_experts_per_tok"),
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+$")
_LEVELS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}  # bits of the significand


@dataclass(frozen=True)
class Described:
    """What is known of a model without its weights.

    Attributes:
        ref: the model's reference in the recipe.
        key: identity of its content.
        home: the folder with its config.json.
        tokenizer: the folder with its tokenizer.
        headers: headers of its stored tensors; for an adapter, of those of its base.
        trained_on: for an adapter, the base that its config names; empty if it names none.
    """

    ref: str
    key: str
    home: Path
    tokenizer: Path
    headers: Headers
    trained_on: str = ""

    @classmethod
    def pinned(cls, source: Source) -> Described:
        """Fetch configs and tokenizer of a pinned model, and read the headers of its weights."""
        home = repository.fetch(source.model, weights=False)
        own = repository.fetch(source.adapter, weights=False) if source.adapter else home
        return cls._at(source.ref, source.key, home, own, repository.tensor_headers(source.model))

    @classmethod
    def on_disk(cls, files: ModelFiles) -> Described:
        """Read configs, tokenizer and headers of a model that is on this disk; damaged files count as absent."""
        headers, names = Headers(), list[str]()
        with suppress(InputError):  # of the weights alone: there may be an optimizer's state next to them
            names += weight_files(files.folder)
        for name in names:
            with suppress(InputError):
                headers |= file_headers(files.folder / name)
        with suppress(InputError):
            headers = dequantised(files.ref, files.folder, headers, None)
        return cls._at(files.ref, files.key, files.folder, files.adapter or files.folder, headers)

    @classmethod
    def _at(cls, ref: str, key: str, home: Path, own: Path, headers: Headers) -> Described:
        trained_on = str(_json(own / "adapter_config.json").get("base_model_name_or_path") or "")
        return cls(ref, key, home, own if (own / TOKENIZER).is_file() else home, headers, trained_on)

    @property
    def dtype(self) -> str:
        """The dtype in which most of the model's elements are stored; empty if it has no tensors."""
        count = Counter[str]()
        for dtype, shape in self.headers.values():
            count[dtype] += math.prod(shape)
        return max(count, key=lambda dtype: count[dtype], default="")


def config_findings(base: Described, experts: Sequence[Described], *, among: bool = False) -> list[Finding]:
    """List all findings from configs, tokenizers and headers.

    Args:
        base: the model that the experts are compared with.
        experts: the other models.
        among: whether `base` is one of the experts, since the recipe has no base.
    """
    found = []
    ours, names = _Facts(base), {base.key: base.ref} if among else {}
    for expert in experts:
        if expert.key in names:
            found.append(Finding("expert twice", expert.ref, f"the same files as {names[expert.key]}"))
            continue
        names[expert.key] = expert.ref
        if expert.key == base.key:
            found.append(Finding("undertrained", expert.ref, f"the same files as the base {base.ref}"))
            continue
        facts = _Facts(expert)
        pairs = [
            *_origin(base, expert),
            *_weights(ours, facts),
            *_settings(ours, facts),
            *_tokens(base, expert),
            *_ends(ours, facts),
        ]
        found += [Finding(kind, expert.ref, what) for kind, what in pairs]
    return found


class _Facts:
    """What the configs and the tokenizer of one model say about it."""

    def __init__(self, model: Described) -> None:
        stored = whole = _json(model.home / "config.json")
        with suppress(InputError):  # preflight reports a config that transformers refuses
            whole = completed(model.home, stored) or stored
        inner = whole.get("text_config")
        self.config = {**whole, **inner} if isinstance(inner, dict) else whole
        self.quantised = stored.get("quantization_config")
        self.tokenizer = _json(model.tokenizer / "tokenizer_config.json")
        found = template_in(model.tokenizer)
        self.template = found.strip() if found else None
        generation = _json(model.home / "generation_config.json")
        self.ends = _ids(generation.get("eos_token_id")) or _ids(self.config.get("eos_token_id"))
        marks = {**_json(model.tokenizer / "special_tokens_map.json"), **self.tokenizer}
        self.end = _content(marks.get("eos_token"))
        self.dtype = model.dtype
        blocks = [each for each in (stored.get("text_config"), stored) if isinstance(each, dict)]
        said = next((each["tie_word_embeddings"] for each in blocks if "tie_word_embeddings" in each), None)
        self.tied = not any(name.endswith(HEADS) for name in model.headers) if said is None else bool(said)


def _origin(base: Described, expert: Described) -> Iterator[tuple[str, str]]:
    """Yield a finding if an adapter's config names another base than the one it is put on, both on the Hub or local."""
    commit = commits_of(expert.key)[0]
    model = base.ref if commit == commits_of(base.key)[0] else parts_of(expert.ref)[0]
    named, given = (_HUB_NAME.match(ref.partition("@")[0]) for ref in (expert.trained_on, model))
    is_local = commit.startswith("sha256:")
    if named and given and not is_local and named[0].lower() != given[0].lower():
        yield "another base", f"its adapter_config.json says that it was trained on {named[0]}, not on {given[0]}"
    folder = Path(expert.trained_on)
    with suppress(InputError, OSError):  # a folder that cannot be read gives no finding
        if is_local and folder.is_absolute() and folder.is_dir() and pin_folder(model, folder).commit != commit:
            yield "another base", f"its adapter_config.json says that it was trained on {folder}, whose files differ"


def _weights(ours: _Facts, theirs: _Facts) -> Iterator[tuple[str, str]]:
    if theirs.quantised and not ours.quantised:
        method = theirs.quantised.get("quant_method") if isinstance(theirs.quantised, dict) else None
        yield "quantised", f"its config.json has a quantization_config ({method or 'no method named'}), the base's none"
    if ours.tied != theirs.tied:
        own, other = ("tied to its embedding" if tied else "of its own" for tied in (theirs.tied, ours.tied))
        yield "tied head", f"its head is {own}, the base's is {other}"
    if theirs.dtype in _LEVELS and ours.dtype in _LEVELS and _LEVELS[theirs.dtype] < _LEVELS[ours.dtype]:
        yield "dtype", f"it is stored in {theirs.dtype}, the base in {ours.dtype}, which is finer"
    elif (ours.dtype, theirs.dtype) == ("BF16", "F16"):
        yield "dtype", "it is stored in F16, the base in BF16: numbers above 65504 or below 6e-8 do not fit"


def _settings(ours: _Facts, theirs: _Facts) -> Iterator[tuple[str, str]]:
    own, other = _positions(theirs.config), _positions(ours.config)
    if differ := [key for key in {**other, **own} if not _equal(own.get(key), other.get(key))]:
        yield "rope", "; ".join(f"{key} is {own.get(key)}, in the base {other.get(key)}" for key in differ)
    both = [key for key in _FORWARD if ours.config.get(key) is not None and theirs.config.get(key) is not None]
    if differ := [key for key in both if not _equal(ours.config[key], theirs.config[key])]:
        found = (f"{key} is {theirs.config[key]!r}, in the base {ours.config[key]!r}" for key in differ)
        yield "config", "; ".join(found)


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's settings of positions; transformers has one form for rotary ones of all versions."""
    given = config.get("rope_parameters")
    found = dict(given) if isinstance(given, Mapping) else {}
    return {**found, **{key: config[key] for key in _CONTEXT if config.get(key) is not None}}


def _tokens(base: Described, expert: Described) -> Iterator[tuple[str, str]]:
    if base.tokenizer == expert.tokenizer or same(base.tokenizer, expert.tokenizer):
        return
    with suppress(InputError):  # the step that needs the tokenizer reports it
        ours, theirs = read_vocabulary(base.tokenizer), read_vocabulary(expert.tokenizer)
        if ours is None or theirs is None:
            return
        known = _added(expert.tokenizer)
        special = [token for token, is_special in _added(base.tokenizer).items() if is_special]
        if lost := [token for token in special if token not in theirs]:
            yield "special tokens", f"its tokenizer lacks {_listed(lost)}, which the base's has"
        if plain := [token for token in special if token in theirs and known and token not in known]:
            yield "special tokens", f"its tokenizer has {_listed(plain)} as ordinary text, the base's as special tokens"
        if new := [token for token, is_special in known.items() if is_special and token not in ours]:
            yield "special tokens", f"its tokenizer has {_listed(new)}, which the base's lacks"
        if other := [token for token in special if token in theirs and theirs[token] != ours[token]]:
            yield "special tokens", f"its tokenizer has other ids for {_listed(other)}"


def _ends(ours: _Facts, theirs: _Facts) -> Iterator[tuple[str, str]]:
    if theirs.template is not None and theirs.template != ours.template:
        yield (
            "chat template",
            "it has a chat template" + (", the base has another" if ours.template else ", the base none"),
        )
    found = []
    if ours.ends and theirs.ends and ours.ends != theirs.ends:
        found.append(f"it stops at the token ids {sorted(theirs.ends)}, the base at {sorted(ours.ends)}")
    if ours.end and theirs.end and ours.end != theirs.end:
        found.append(f"its tokenizer's end token is {theirs.end!r}, the base's {ours.end!r}")
    if found:
        yield "eos", "; ".join(found)


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, InputError):
        content = read_json(path)
        return content if isinstance(content, dict) else {}
    return {}


def _added(folder: Path) -> dict[str, bool]:
    """Return the tokens that a tokenizer never splits -> whether they are special."""
    added = _json(folder / TOKENIZER).get("added_tokens") or []
    return {token["content"]: bool(token.get("special")) for token in added if isinstance(token, dict)}


def _ids(value: Any) -> set[int]:
    return {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return bool(one == other)


def _listed(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN]))
    return shown + (f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else "")
