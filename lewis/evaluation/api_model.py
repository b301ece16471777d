"""lm-eval's clients of servers, with texts split into tokens as its `hf` splits them.

It runs in the child of `lewis.evaluation.harness.process`.
"""

from typing import Any


def opened(name: str, arguments: dict[str, Any], batch_size: int | str) -> Any:
    """lm-eval's `local-completions` or `local-chat-completions`.

    Args:
        name: which of the two.
        arguments: of its class.
        batch_size: prompts of one request.
    """
    from lm_eval.api.registry import get_model

    if name == "local-completions" and "max_length" not in arguments:
        arguments = {**arguments, "max_length": _max_length(arguments["model"])}
    lm: Any = get_model(name).create_from_arg_obj(arguments, {"batch_size": batch_size})
    if lm.tokenizer is not None:
        lm.add_bos_token = arguments.get("add_bos_token")  # None: what the tokenizer does by itself, as for `hf`
        lm.tok_encode = _encoder(lm)
    return lm


def _max_length(folder: str) -> int:
    """The longest input of the model in tokens, as lm-eval finds it for `hf`."""
    import transformers
    from lm_eval.models.utils import DEFAULT_MAX_LENGTH, resolve_max_length

    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return int(resolve_max_length(config, tokenizer, default=DEFAULT_MAX_LENGTH))


def _encoder(lm: Any) -> Any:
    """`tok_encode` of lm-eval's `hf`, for one text or several."""
    from lm_eval.models.utils import has_bos_prefix

    def encode(
        text: Any, left_truncate_len: int | None = None, add_special_tokens: bool | None = None, **_: Any
    ) -> Any:
        if not isinstance(text, str):
            return [encode(each, left_truncate_len, add_special_tokens) for each in text]
        special = lm.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(text, lm.tokenizer.bos_token):
            special = False
        found = lm.tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special}))
        return found[-left_truncate_len:] if left_truncate_len else found

    return encode
