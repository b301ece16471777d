"""Targets of the kind `vllm`: a running vLLM server loads the adapter next to the one in service, then moves to it.

Each version has a name and a path that no other content ever has, since vLLM keeps weights by path, and what it has
computed for prompts by name and path. `offer` loads a version under its own name, under which it can be checked. `put`
loads it under the name that clients ask for: no request is refused meanwhile; one that is being answered in that moment
goes on with the new weights. The version before stays loaded, older ones are unloaded.

The server needs `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`, and must see the store's folder `served`.
"""

import logging
import re

from lewis.errors import InputError, LewisError, TransientError
from lewis.recipe.serve import VllmTarget
from lewis.serving.model import Model, name_pattern
from lewis.serving.records import Served
from lewis.serving.requests_to import json_of, send, with_key

logger = logging.getLogger(__name__)
_SECONDS = 30  # for a request that loads nothing


def offer(target: VllmTarget, model: Model, before: Served | None = None) -> None:
    """Load an adapter into the server under its own name, unless it is loaded.

    Raises:
        InputError: if it is no adapter, or the server loads none.
        TransientError, LewisError: as `send`, or if the server does not list it afterwards.
    """
    if model.output != "lora":
        raise InputError("vllm loads adapters, and this is a full model: start a server for it with a target `command`")
    if models(target).get(model.alias) != str(model.folder):
        _load(target, model.alias, model)
    if models(target).get(model.alias) != str(model.folder):
        raise LewisError(f"the server does not list {model.alias} of {model.folder} after it has loaded it")


def put(target: VllmTarget, model: Model, before: Served) -> str:
    """Load the model under the name that clients ask for; unload all versions but this one and the one before."""
    asked_for = target.alias or model.name  # by clients
    if models(target).get(asked_for) != str(model.folder):
        _load(target, asked_for, model)
    kept = {model.alias, before.previous_alias if before.alias == model.alias else before.alias}
    for each in models(target):
        if name_pattern(model.name).fullmatch(each) and each not in kept:
            _post(target, "unload_lora_adapter", {"lora_name": each}, accepted=(404,))
            logger.info("%s: %s is unloaded", target.label, each)
    return model.alias


def holds(target: VllmTarget, record: Served) -> bool:
    """Whether the server, which may have started again, still has the version under both names.

    Raises:
        TransientError, LewisError: as `send`.
    """
    found = models(target)
    own = found.get(record.alias)
    return own is not None and own == found.get(target.alias or record.name)


def api(target: VllmTarget, model: Model, before: Served | None = None) -> tuple[str, str]:
    """Return the URL of the API at which the offered model answers, and its name there."""
    return f"{target.url.rstrip('/')}/v1", model.alias


def models(target: VllmTarget) -> dict[str, str]:
    """Return the models that the server has: name -> path.

    Raises:
        TransientError, LewisError: as `send`.
    """
    url = f"{target.url.rstrip('/')}/v1/models"
    answer = send("GET", url, headers=with_key(url), timeout_s=_SECONDS)
    try:
        return {str(each["id"]): str(each.get("root")) for each in json_of(answer)["data"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LewisError("its /v1/models is no list of models; is this a vLLM server?") from error


def _load(target: VllmTarget, name: str, model: Model) -> None:
    body = {"lora_name": name, "lora_path": str(model.folder), "load_inplace": True}
    try:
        _post(target, "load_lora_adapter", body)
    except TransientError:
        raise
    except LewisError as error:
        if re.search(r"answered 40[45]: .*(Not Found|Not Allowed)", str(error)):
            fix = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            raise InputError(f"the server loads no adapters while it runs: {fix}") from error
        raise


def _post(target: VllmTarget, call: str, body: dict[str, object], accepted: tuple[int, ...] = ()) -> None:
    url, timeout_s = f"{target.url.rstrip('/')}/v1/{call}", target.timeout_seconds
    send("POST", url, body=body, headers=with_key(url), timeout_s=timeout_s, accepted=accepted)
