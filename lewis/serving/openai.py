"""Targets of the kind `openai`: any server that takes a model by an HTTP call, which the recipe gives as a template.

With SGLang, for example, `POST /update_weights_from_disk` with `{model_path: "{path}"}` and the answer
`{success: true}`.
"""

from typing import Any

from lewis.errors import LewisError
from lewis.recipe.serve import OpenaiTarget
from lewis.serving.command import facts
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.serving.requests_to import json_of, send, with_key


def put(target: OpenaiTarget, model: Model, before: Served) -> str:
    """Make the HTTP call that has the server take the model; return the name that the model is served under.

    Raises:
        TransientError, LewisError: as `send`, or if the answer is not the expected one.
    """
    body = filled(target.body, model)
    headers = {"Content-Type": target.content_type, **with_key(target.url)}
    answer = send(target.method.upper(), target.url, body=body, headers=headers, timeout_s=target.timeout_seconds)
    try:
        found = json_of(answer) if target.expect else {}
    except ValueError as error:
        raise LewisError("the server's answer is no JSON, so `expect` cannot be checked") from error
    for key, value in target.expect.items():
        given = found.get(key) if isinstance(found, dict) else None
        if given != value:
            raise LewisError(f"the server's answer: expected {key}={value!r}, got {given!r}: {answer.text[:500]}")
    return model.alias


def api(target: OpenaiTarget, model: Model, before: Served) -> tuple[str, str] | None:
    """Return the URL of the API at which the model answers, and its name there; None if the target has no `api`.

    Raises:
        TransientError, LewisError: as `send`, or if the server's list lacks the model.
    """
    if not target.api:
        return None
    url, name = target.api.rstrip("/"), asked_for(target, model)
    listed = send("GET", f"{url}/models", headers=with_key(target.api))
    try:
        names = [str(each.get("id")) for each in json_of(listed)["data"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LewisError("its /models is no list of models; is `api` the URL of an OpenAI API, /v1?") from error
    if name not in names:
        raise LewisError(f"the server lists no model {name!r}, but {', '.join(names) or 'none'}")
    return url, name


def asked_for(target: OpenaiTarget, model: Model) -> str:
    """The name that the server knows the model by."""
    return str(filled(target.model, model))


def filled(template: Any, model: Model) -> Any:
    """Return a template, a text or JSON data with texts, with the facts of the model in place of `{path}` and so on."""
    if isinstance(template, str):
        for name, value in facts(model).items():
            template = template.replace(f"{{{name.removeprefix('MODEL_').lower()}}}", value)
        return template
    if isinstance(template, dict):
        return {key: filled(value, model) for key, value in template.items()}
    return [filled(each, model) for each in template] if isinstance(template, list | tuple) else template
