"""Check the values of a config.json by the class that transformers has for its `model_type`.

The class's source is parsed, not imported: a merge needs neither transformers nor torch, which take four seconds.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.syntax import syntax_tree

_NAMED = {"int": int, "str": str, "bool": bool, "float": float, "dict": dict, "list": list, "tuple": tuple}
_ROPES = ("rope_parameters", "rope_scaling")
_LAYERS = {"layer_types": "ALLOWED_ATTN_LAYER_TYPES", "mlp_layer_types": "ALLOWED_MLP_LAYER_TYPES"}
_OWN_LAYERS = re.compile(r"def validate_layer_type|layer_types\[")  # classes with kinds of their own, or a shorter list
_ACTIVATION = re.compile(r"\bACT2FN\[(?:self\.)?config\.(\w+)\]")
_DROPOUT = re.compile(r"\bnn\.Dropout\((?:p=)?config\.(\w+)\)")
_INTERVAL = re.compile(r"interval\(min=([\d.]+)(?:, max=([\d.]+))?\)\(")
_OWN_HEADS = "\n        self.head_dim = self.hidden_size // self.num_attention_heads"  # unconditional
_ADDED = re.compile(r"\bnn\.Embedding\(config\.vocab_size \+ (\d+),")
_PADDED = re.compile(
    r"\bnn\.Embedding\(\s*config\.vocab_size,\s*config\.\w+,\s*(?:padding_idx=)?(?:self\.padding_idx|config\.pad_token_id)\b"
)


def check_values(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that each value of a config has the type that transformers' class declares, and names functions that exist.

    A `model_type` that transformers does not know, and keys that its class does not declare, are not checked; nor is a
    config whose class comes with the model (`auto_map`).

    Args:
        folder: of the model.
        config: parsed.

    Raises:
        InputError: naming the key, what was expected and what was given.
    """
    if brings_class(config):
        return
    for where, block in (("", config), *((f"{key}.", each) for key, each in config.items() if isinstance(each, dict))):
        for key, expected in _unlike_class(block):
            raise InputError(
                f"{folder}: config.json: {where}{key}: expected {expected}, got {json.dumps(block[key])[:80]}; "
                "transformers builds no network of it: take the config.json that came with these weights"
            )


def brings_class(config: Mapping[str, Any]) -> bool:
    """Whether the class of a config or of its network comes with the model: its `auto_map` names one."""
    given = config.get("auto_map")
    return isinstance(given, dict) and any(str(key).startswith(("AutoConfig", "AutoModel")) for key in given)


def stated_size(config: Mapping[str, Any], key: str) -> int | None:
    """The whole number that a config gives for a key, or else the default of its class; None if neither is one."""
    value = config.get(key)
    if key not in config and isinstance(kind := config.get("model_type"), str):
        declared = _declared(kind)[1].get(key)
        value = declared.value.value if declared and isinstance(declared.value, ast.Constant) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def takes_null(config: Mapping[str, Any], key: str) -> bool:
    """Whether the class of a config allows null for a key, as wav2vec2's for `vocab_size` if it has no tokens."""
    declared = _declared(str(config.get("model_type")))[1].get(key)
    return declared is not None and _accepts(declared.annotation, None)


def ties_head(config: Mapping[str, Any]) -> bool | None:
    """Whether the class of a config ties the head to the embedding by default, where the config does not say.

    None if the source of the class does not say either: transformers does not know the class, it comes with the
    model, it declares no default, or it computes what it declares.
    """
    source, fields, _ = _declared(str(config.get("model_type")))
    declared = fields.get("tie_word_embeddings")
    if brings_class(config) or "self.tie_word_embeddings = " in source or declared is None:
        return None
    value = declared.value.value if isinstance(declared.value, ast.Constant) else None
    return value if isinstance(value, bool) else None


def ignores_head_dim(config: Mapping[str, Any]) -> bool:
    """Whether the class of a config computes the size of its heads, whatever the config says."""
    source, fields, _ = _declared(str(config.get("model_type")))
    return "head_dim" not in fields or _OWN_HEADS in source


def added_rows(config: Mapping[str, Any]) -> set[int]:
    """The numbers of rows that a `model_type`'s embedding has beyond `vocab_size`: Moshi's has one, Mllama's eight."""
    kind = config.get("model_type")
    return set(map(int, _ADDED.findall(_declared(kind)[2]))) if isinstance(kind, str) else set()


def _unlike_class(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield key and expected value for each value of a config that its class would refuse."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        if kind is not None:
            yield "model_type", "str"
        return
    source, fields, network = _declared(kind)
    if not source:
        return
    activations = set(_ACTIVATION.findall(network))
    for key, declared in fields.items():
        if key not in config:
            continue
        value = config[key]
        if not _accepts(declared.annotation, value):
            yield key, ast.unparse(declared.annotation)
        elif key in activations and isinstance(value, str) and value not in (known := _names("activations", "ACT2CLS")):
            yield key, f"an activation function of transformers, such as {', '.join(sorted(known & {'gelu', 'silu'}))}"
    if not _OWN_LAYERS.search(source):
        yield from _layers(config)
    yield from _outside(config, fields, network)
    if not isinstance(config.get("id2label"), dict | None):
        yield "id2label", "dict | None"
    if "RopeParameters" in source:
        known = _names("modeling_rope_utils", "ROPE_INIT_FUNCTIONS") | {"default"}
        for key in _ROPES:
            if not isinstance(config.get(key), dict | None):
                yield key, "dict | None"
            for name in _rope_types(config.get(key)):
                if name not in known and f'"{name}"' not in source:  # some classes have names of their own
                    yield key, f"a rope_type among {', '.join(sorted(known))}"


def _layers(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield as `_unlike_class` does, for the lists that give each layer its kind."""
    older = _names("configuration_utils", "_LEGACY_LAYER_TYPE_REMAP")
    for key, table in _LAYERS.items():
        kinds, known = config.get(key), _names("configuration_utils", table)
        if not isinstance(kinds, list) or not known:
            return  # transformers looks no further either
        if not (known | older).issuperset(map(str, kinds)):
            yield key, f"kinds of layers among {', '.join(sorted(known))}"
        if len(kinds) != config.get("num_hidden_layers", len(kinds)):
            yield key, f"one for each of the {config['num_hidden_layers']} layers (num_hidden_layers)"


def _outside(config: Mapping[str, Any], fields: Mapping[str, ast.AnnAssign], network: str) -> Iterator[tuple[str, str]]:
    """Yield as `_unlike_class` does, for numbers outside the range of the class or of torch's modules."""
    pad, size = config.get("pad_token_id"), config.get("vocab_size")
    of_parts = any(isinstance(each, dict) and "vocab_size" in each for each in config.values())  # T5Gemma's embeddings
    pads = not of_parts and _PADDED.search(network)
    if isinstance(pad, int) and isinstance(size, int) and pads and not -size <= pad < size:
        yield "pad_token_id", f"a token of the vocabulary of {size:,}"
    ranges = {key: ("0", "1") for key in _DROPOUT.findall(network)}
    for key, declared in fields.items():
        if declared.value and (found := _INTERVAL.match(ast.unparse(declared.value))):
            ranges[key] = (found[1], found[2])
    for key, (least, most) in ranges.items():
        if isinstance(given := config.get(key), int | float) and not float(least) <= given <= float(most or "inf"):
            yield key, f"a number from {least} to {most}" if most else f"a number of at least {least}"


def _rope_types(value: Any) -> Iterator[str]:
    """Yield the types of RoPE that a block of a config names: one for all layers, or one for each kind of layer."""
    if isinstance(value, dict):
        found = value.get("rope_type", value.get("type"))
        if isinstance(found, str):
            yield found
        for each in value.values():
            yield from _rope_types(each)


def _accepts(declared: ast.expr, value: Any) -> bool:
    """Whether a value of JSON has a declared type, as huggingface_hub's strict dataclasses check it.

    A declared class of configs accepts any JSON object; any other type that JSON does not have accepts every value.
    """
    match declared:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _accepts(left, value) or _accepts(right, value)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="float") if isinstance(value, dict):
            return value.keys() == {"__float__"}  # how transformers writes infinity
        case ast.Name(id=name) if name in _NAMED:
            fits = isinstance(value, _NAMED[name])
            return fits and (name == "bool" or not isinstance(value, bool))
        case ast.Name(id=name) if name.endswith(("Config", "RopeParameters")):
            return isinstance(value, dict)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return value in [each.value for each in ast.walk(inner) if isinstance(each, ast.Constant)]
        case ast.Subscript(value=ast.Name(id="list"), slice=inner) if not isinstance(inner, ast.Tuple):
            return isinstance(value, list) and all(_accepts(inner, each) for each in value)
        case ast.Subscript(value=ast.Name(id="list" | "Sequence")):
            return isinstance(value, list)
        case ast.Subscript(value=ast.Name(id="tuple")):
            return False  # JSON has lists, which are no tuples
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, inner])):
            return isinstance(value, dict) and all(
                _accepts(key, one) and _accepts(inner, each) for one, each in value.items()
            )
    return True


@lru_cache(maxsize=64)
def _declared(kind: str) -> tuple[str, dict[str, ast.AnnAssign], str]:
    """Return the source of a `model_type`'s config class, its fields with their types, and the source of its network.

    All are empty if there is no such class.
    """
    tables = _source("models/auto/auto_mappings.py")
    pairs = re.findall(rf'\("{re.escape(kind)}", "(\w+)"\)', tables)
    named = next((each for each in pairs if each.endswith("Config")), "")
    module = next((each for each in pairs if each.islower()), kind.replace("-", "_"))
    if not named or not module.isidentifier():
        return "", {}, ""
    source = _source(f"models/{module}/configuration_{module}.py")
    classes = {each.name: each for each in syntax_tree(source).body if isinstance(each, ast.ClassDef)}
    fields: dict[str, ast.AnnAssign] = {}
    wanted = [named]
    while wanted:
        if (found := classes.get(wanted.pop())) and any("strict" in ast.unparse(each) for each in found.decorator_list):
            stated = (each for each in found.body if isinstance(each, ast.AnnAssign))
            fields = {each.target.id: each for each in stated if isinstance(each.target, ast.Name)} | fields
            wanted += [each.id for each in found.bases if isinstance(each, ast.Name)]
    own = {name: each for name, each in fields.items() if "ClassVar" not in ast.unparse(each.annotation)}
    return source, own, _source(f"models/{module}/modeling_{module}.py")


@lru_cache
def _names(module: str, table: str) -> frozenset[str]:
    """The keys of a dictionary, or the items of a tuple, that a module of transformers writes out."""
    block = re.search(rf"^{table}\b.*?^[}})]", _source(f"{module}.py"), re.DOTALL | re.MULTILINE)
    return frozenset(re.findall(r'^    "(\w+)"', block[0], re.MULTILINE) if block else ())


def _source(path: str) -> str:
    """Return the text of a file of the installed transformers; empty if there is no such file."""
    spec = find_spec("transformers")
    file = Path(spec.origin).parent / path if spec and spec.origin else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""
