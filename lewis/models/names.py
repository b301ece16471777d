"""What a tensor's name says: embedding or head, old buffer, number of the layer. Also short names for tables."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

Shapes = Mapping[str, tuple[int, ...]]  # tensor -> shape
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "shared.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
PER_TOKEN = (*EMBEDDINGS, *HEADS, "lm_head.bias", "embed_out.bias")  # their first dimension is the vocabulary
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_WRAPPED = ("module.", "base_model.model.")  # DistributedDataParallel, PEFT
NUMBER = re.compile(r"(?:^|\.)(\d+)\.")  # the number of the layer that a tensor is in

_KEYS_AND_VALUES = {"k", "v", "kv", "qkv", "qkvz", "key", "value", "keys", "values", "wqkv", "wk", "wv"}
# Projections whose output holds keys and values among others, or goes into the state of a recurrence.
_FEEDS = {"c_attn", "in_proj", "in_proj_ba", "x_proj", "dt_proj"}
# Those that earlier versions did not know, of Qwen 3.5, Kimi Linear, OLMo Hybrid, Bailing, RecurrentGemma and xLSTM.
_GATES = {"in_proj_a", "in_proj_b", "a_proj", "b_proj", "f_proj", "f_a_proj", "f_b_proj"}
_LATER = _GATES | {"linear_x", "igate_preact", "fgate_preact"}
_INNER = ".linear"  # the projection in a module of Moshi, which has the name
STATES_SEMANTICS = "states 1"  # bump when models that `weighed_before` names would get other numbers


def feeds_other_tokens(path: str) -> bool:
    """Whether later tokens read a projection's output at one token: keys, values, or the state of a recurrence.

    Args:
        path: of the module, such as `model.layers.0.self_attn.k_proj`.
    """
    last = path.removesuffix(_INNER).rpartition(".")[2].lower()
    return last in _FEEDS or last in _LATER or not _KEYS_AND_VALUES.isdisjoint(last.split("_"))


def weighed_before(tensors: Iterable[str]) -> bool:
    """Whether one of these tensors feeds other tokens, and earlier versions weighed tokens in it."""
    paths = [name.removesuffix(".weight") for name in tensors]
    return any(
        path.rpartition(".")[2] in _LATER or (path.endswith(_INNER) and feeds_other_tokens(path)) for path in paths
    )


def unwrapped(name: str) -> str:
    """Return a tensor's name without the parts that wrappers add to it: torch.compile, FSDP, PEFT and others."""
    name = _WRAPPERS.sub("", name)
    for prefix in _WRAPPED:
        name = name.removeprefix(prefix)
    return name


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer made from the config: only old checkpoints (Llama 2, Pythia, GPT-2) store it."""
    mask = name.endswith((".attn.bias", ".attention.bias")) and len(shape) == 4 and shape[:2] == (1, 1)
    return mask or name.endswith("rotary_emb.inv_freq") or (name.endswith(".masked_bias") and math.prod(shape) == 1)


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is in; None outside of the layers."""
    match = NUMBER.search(name)
    return int(match[1]) if match else None


def in_layers(names: Iterable[str]) -> list[str]:
    """The tensors that are in a layer, in the given order."""
    return [name for name in names if layer_of(name) is not None]


def short_or_whole(short: Sequence[str], whole: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Return each name in its short form if that is unique, else in its whole form.

    Args:
        short: the short names; empty where there is none.
        whole: the same names, whole.
        taken: names that are already in use for something else.
    """
    chosen = [name or full for name, full in zip(short, whole, strict=True)]
    used = [*chosen, *taken]
    return [name if used.count(name) == 1 else full for name, full in zip(chosen, whole, strict=True)]
