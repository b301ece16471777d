"""The arguments that `evaluate.model_args` may give to each backend of lm-eval, and their checks."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lewis.errors import nearest


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_scalars(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(each, bool | int | float | str) for key, each in value.items()
    )


Kind = tuple[str, Callable[[Any], bool]]  # what is expected, in words, and whether a value satisfies it


def _one_of(*choices: str) -> Kind:
    return ", ".join(choices[:-1]) + f" or {choices[-1]}", lambda value: value in choices


_SWITCH: Kind = ("true or false", lambda value: isinstance(value, bool))
_COUNT: Kind = ("a whole number above 0", lambda value: _is_whole(value) and value > 0)
_ID: Kind = ("a token's id", lambda value: _is_whole(value) and value >= 0)
_SHARE: Kind = ("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
_AMOUNT: Kind = ("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
_TEXT: Kind = ("a text", lambda value: isinstance(value, str) and value != "")
# A name and no path: a library must not be led to fetch code from the Hub, as transformers does for "org/kernel".
_NAME: Kind = ("a name", lambda value: isinstance(value, str) and re.fullmatch(r"[\w-]+", value) is not None)
_SIZE: Kind = (
    "a size such as 20GiB",
    lambda v: isinstance(v, str) and re.fullmatch(r"\d+(\.\d+)?[KMG]i?B", v) is not None,
)
_SCALARS: Kind = ("a mapping of names to texts, numbers, true or false", _is_scalars)
_DTYPE = _one_of("auto", "float32", "float16", "bfloat16")
_CACHE_DTYPE = _one_of("auto", "fp8", "fp8_e4m3", "fp8_e5m2")

_TOKENS: dict[str, Kind] = {"add_bos_token": _SWITCH, "prefix_token_id": _ID, "max_gen_toks": _COUNT}
_CHAT: dict[str, Kind] = {"think_end_token": _TEXT, "enable_thinking": _SWITCH, "chat_template_args": _SCALARS}
_CODE: dict[str, Kind] = {"trust_remote_code": _SWITCH}

ALLOWED: Mapping[str, Mapping[str, Kind]] = {
    "hf": {
        **{name: _TOKENS[name] for name in ("add_bos_token", "prefix_token_id")},
        **_CHAT,
        **_CODE,
        "attn_implementation": _one_of("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
        "dtype": _DTYPE,
        "softmax_dtype": _one_of("float32", "float16", "bfloat16"),
        "logits_cache": _SWITCH,
        "max_batch_size": _COUNT,
        "max_cpu_memory": _SIZE,
        "max_length": _COUNT,
        "max_memory_per_gpu": _SIZE,
        "truncation": _SWITCH,
    },
    "vllm": {
        **_TOKENS,
        **_CHAT,
        **_CODE,
        "cpu_offload_gb": _AMOUNT,
        "disable_custom_all_reduce": _SWITCH,
        "dtype": _DTYPE,
        "enable_chunked_prefill": _SWITCH,
        "enable_expert_parallel": _SWITCH,
        "enable_prefix_caching": _SWITCH,
        "enforce_eager": _SWITCH,
        "gpu_memory_utilization": _SHARE,
        "kv_cache_dtype": _CACHE_DTYPE,
        "max_model_len": _COUNT,
        "max_num_batched_tokens": _COUNT,
        "max_num_seqs": _COUNT,
        "quantization": _NAME,
        "seed": _ID,
        "truncation_side": _one_of("left", "right", "middle"),
    },
    "sglang": {
        **_TOKENS,
        "think_end_token": _TEXT,
        **_CODE,
        "attention_backend": _NAME,
        "chunked_prefill_size": _COUNT,
        "context_length": _COUNT,
        "disable_cuda_graph": _SWITCH,
        "dtype": _DTYPE,
        "kv_cache_dtype": _CACHE_DTYPE,
        "mem_fraction_static": _SHARE,
        "quantization": _NAME,
    },
    "openai": {
        "add_bos_token": _SWITCH,
        **_CODE,
        "chat": _SWITCH,
        "custom_prefix_token_id": _ID,
        "eos_string": _TEXT,
        "max_gen_toks": _COUNT,
        "max_length": _COUNT,
        "max_retries": _COUNT,
        "num_concurrent": _COUNT,
        "seed": _ID,
        "think_end_token": _TEXT,
        "timeout": _COUNT,
    },
}
"""Backend -> argument -> the kind of value that it must have."""

_ELSEWHERE = {
    **dict.fromkeys(
        ("parallelize", "tensor_parallel_size", "tp_size", "device", "device_map", "tp_plan"),
        "the number of GPUs is evaluate.gpus",
    ),
    **dict.fromkeys(
        ("pretrained", "model", "tokenizer", "peft", "lora_local_path", "revision", "delta"),
        "it follows from the model that is scored",
    ),
    "batch_size": "it is evaluate.batch_size",
    "base_url": "which server is asked is for the worker to say, by the environment variable LEWIS_EVALUATION_SERVER",
    **dict.fromkeys(
        ("auth_token", "header", "api_key"),
        "a recipe holds no secrets; set OPENAI_API_KEY in the environment of the worker",
    ),
}


def problems_of(backend: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a backend's arguments, each as a line that begins with the argument's name."""
    for name, value in given.items():
        if problem := _problem(backend, name, value):
            yield f"{name}: {problem}"


def _problem(backend: str, name: str, value: Any) -> str | None:
    known = ALLOWED[backend]
    if name in known:
        expected, fits = known[name]
        return None if fits(value) else f"expected {expected}, got {value!r}"
    if name in _ELSEWHERE:
        return f"not here: {_ELSEWHERE[name]}"
    others = [other for other, names in ALLOWED.items() if name in names]
    hint = f"; {' and '.join(others)} {'has' if len(others) == 1 else 'have'}" if others else nearest(name, known)
    return f"the backend {backend} has no such argument{hint}"
