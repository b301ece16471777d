"""Targets of the kind `kserve`: two LLMInferenceServices of one routing group, of which one has the champion.

The one without traffic is stopped, gets the new version, and starts: so that no pod of it answers with what it had.
Then the weights of the group's route move the requests by a canary. Kubernetes checks each patch by the schema that
the cluster has of these resources, and refuses one with a key that this does not know.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lewis import settings
from lewis.errors import InputError, LewisError
from lewis.recipe.serve import KserveTarget
from lewis.serving import canary
from lewis.serving.model import Model
from lewis.serving.openai import filled
from lewis.serving.records import Served
from lewis.serving.requests_to import send
from lewis.store.kinds import SERVED

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where Kubernetes puts a pod's token
STOP = "serving.kserve.io/stop"  # annotation: "true" ends the pods
_PATCH = "application/merge-patch+json"
_PAUSE = 5.0  # seconds between two looks at a resource
sleep: Callable[[float], None] = time.sleep


def offer(target: KserveTarget, model: Model, before: Served) -> None:
    """Start the service without traffic with the model, unless it has it.

    Raises:
        InputError: if the two are not of one routing group.
        TransientError, LewisError: as `send`, or if it is not ready in time.
    """
    name = idle(target, before)
    now = read(target, name)
    if _has(target, now, model) and _ready(now):
        return
    patch(target, name, {"metadata": {"annotations": {STOP: "true"}}, "spec": _weight(0)})
    _wait(target, name, "stop", lambda found: _condition(found).get("status") == "False")
    patch(target, name, {"metadata": {"annotations": {STOP: None}}, "spec": {"model": _model(target, model)}})
    _wait(target, name, "become ready", _ready)


def api(target: KserveTarget, model: Model, before: Served) -> tuple[str, str] | None:
    """URL of the service without traffic, which answers whatever the weights are; None if the target has no gateway."""
    name = idle(target, before)
    url = f"{target.gateway.rstrip('/')}/{target.namespace}/{name}/v1"
    return (url, _asked_for(target, read(target, name), model)) if target.gateway else None


def put(target: KserveTarget, model: Model, before: Served) -> str:
    """Move the traffic to the service that has the model.

    Raises:
        WorseError, TransientError, LewisError: as `canary.run`.
    """
    new = idle(target, before)
    [old] = set(target.services) - {new}

    def give(name: str, share: int) -> None:
        patch(target, name, {"spec": _weight(share)})

    def has() -> bool:
        found = read(target, new)
        return _ready(found) and _has(target, found, model)

    return canary.run(target, model, before, new, old, give, has)


def holds(target: KserveTarget, record: Served) -> bool:
    """Whether the service that has the traffic has the version."""
    found, model = [read(target, name) for name in target.services], _recorded(record)
    return all(_has(target, each, model) for each in found if _weight_of(each)) and any(map(_weight_of, found))


def idle(target: KserveTarget, before: Served) -> str:
    """The service that may be given a new version: not the one with the version before, or else with the traffic.

    Raises:
        InputError: if the two are not of one routing group.
    """
    found = {name: read(target, name) for name in target.services}
    groups = {str(_route(each).get("group")) for each in found.values()}
    if len(groups) > 1 or groups == {"None"}:
        raise InputError(
            f"{' and '.join(found)}: expected LLMInferenceServices of one group (spec.router.route.group), got "
            f"{', '.join(sorted(groups))}"
        )
    having = [name for name in found if before.uri and _has(target, found[name], _recorded(before))]
    busy = max(having or found, key=lambda name: _weight_of(found[name]))
    return next(name for name in target.services if name != busy)


def read(target: KserveTarget, name: str) -> dict[str, Any]:
    """A service as Kubernetes has it.

    Raises:
        TransientError, LewisError: as `send`, or if the answer is not one.
    """
    answer = _send(target, "GET", name)
    if answer.get("kind") != "LLMInferenceService":
        raise LewisError(f"{target.api}: expected an LLMInferenceService, got {str(answer)[:200]}")
    return answer


def patch(target: KserveTarget, name: str, content: Mapping[str, Any]) -> None:
    """Change a service.

    Raises:
        TransientError, LewisError: as `send`; also for a content that the schema of the cluster does not know.
    """
    _send(target, "PATCH", name, content)


def _send(target: KserveTarget, method: str, name: str, body: Any = None) -> dict[str, Any]:
    place = f"/apis/serving.kserve.io/v1alpha2/namespaces/{target.namespace}/llminferenceservices/{name}"
    query = "?fieldValidation=Strict&fieldManager=lewis" if body else ""
    token, ca = ACCOUNT / "token", ACCOUNT / "ca.crt"
    # The account's token goes only where the cluster's CA says that this is the cluster.
    own = target.api.startswith("https://") and token.is_file() and ca.is_file()
    key = token.read_text().strip() if own else settings.SERVE_KEY.get()
    headers = {"Accept": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    answer = send(
        method,
        f"{target.api.rstrip('/')}{place}{query}",
        body=body,
        headers={**headers, **({"Content-Type": _PATCH} if body else {})},
        ca=str(ca) if own else None,
    )
    try:
        return dict(answer.json())
    except ValueError as error:
        raise LewisError(f"{target.api}: its answer is no JSON; is this the API of Kubernetes?") from error


def _wait(target: KserveTarget, name: str, what: str, until: Callable[[Mapping[str, Any]], bool]) -> None:
    """Wait for a state that the controller reports of the newest generation."""
    end = time.monotonic() + 60 * target.start_minutes
    while True:
        found = read(target, name)
        newest = found["metadata"].get("generation", 0)
        seen = found.get("status", {}).get("observedGeneration", _condition(found).get("observedGeneration", newest))
        if seen >= newest and until(found):
            return
        if time.monotonic() > end:
            state = " ".join(str(_condition(found).get(key, "")) for key in ("status", "reason", "message"))
            raise LewisError(
                f"{name} did not {what} within {target.start_minutes:g} minutes; its condition Ready is {state.strip()}"
            )
        sleep(_PAUSE)


def _condition(service: Mapping[str, Any]) -> Mapping[str, Any]:
    """The condition Ready of a service's status."""
    return next((each for each in service.get("status", {}).get("conditions", ()) if each.get("type") == "Ready"), {})


def _ready(service: Mapping[str, Any]) -> bool:
    return _condition(service).get("status") == "True"


def _route(service: Mapping[str, Any]) -> Mapping[str, Any]:
    return service["spec"].get("router", {}).get("route", {})


def _weight_of(service: Mapping[str, Any]) -> int:
    return int(_route(service).get("weight") or 0)


def _weight(share: int) -> dict[str, Any]:
    return {"router": {"route": {"weight": share}}}


def _model(target: KserveTarget, model: Model) -> dict[str, Any]:
    """The new `spec.model`: the URI of a full model, or the list of adapters with this one in place of the others."""
    uri = str(filled(target.uri, model))
    if model.output != "lora":
        return {"uri": uri}
    return {"lora": {"adapters": [{"name": target.alias or model.name, "uri": uri}]}}


def _has(target: KserveTarget, service: Mapping[str, Any], model: Model) -> bool:
    content, uri = service["spec"]["model"], str(filled(target.uri, model))
    return uri in (content.get("uri"), *(each.get("uri") for each in content.get("lora", {}).get("adapters", ())))


def _asked_for(target: KserveTarget, service: Mapping[str, Any], model: Model) -> str:
    """The name that clients ask for."""
    own = target.alias or model.name
    return own if model.output == "lora" else str(service["spec"]["model"].get("name") or service["metadata"]["name"])


def _recorded(record: Served) -> Model:
    """The version that a record names by its URI."""
    version = record.uri.rpartition("/")[2]
    return Model(record.name, version, record.digest, SERVED.path(record.alias or "none"), "")
