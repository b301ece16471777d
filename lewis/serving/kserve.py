"""Targets of the kind `kserve` with two services: LLMInferenceServices of one group, of which one has the champion.

The service without traffic is stopped, gets the new version and is started, so that none of its pods answers with the
old model. Then a canary moves the requests to it, by the weights of the group's route.
"""

from collections.abc import Mapping
from typing import Any

from lewis.errors import InputError
from lewis.recipe.serve import KserveTarget
from lewis.serving import canary, kubernetes
from lewis.serving.kubernetes import Resource, is_ready, part
from lewis.serving.model import Model, recorded
from lewis.serving.openai import filled
from lewis.serving.records import Served

SERVICE = Resource("LLMInferenceService", "v1alpha2")
_ROUTE = ("spec", "router", "route")
STOP = "serving.kserve.io/stop"  # annotation: "true" ends the pods


def offer(target: KserveTarget, model: Model, before: Served) -> None:
    """Start the service without traffic with the new model, unless it is ready with that already.

    Raises:
        InputError: if the two are not of one routing group.
        TransientError, LewisError: as `send`, or if it is not ready in time.
    """
    name = idle(target, before)
    now = kubernetes.read(target, SERVICE, name)
    if _has(target, now, model) and is_ready(now):
        return
    kubernetes.patch(target, SERVICE, name, {"metadata": {"annotations": {STOP: "true"}}, "spec": _weight(0)})
    kubernetes.wait(target, SERVICE, name, "stop", lambda found: kubernetes.condition(found).get("status") == "False")
    start = {"metadata": {"annotations": {STOP: None}}, "spec": {"model": _model(target, model)}}
    kubernetes.patch(target, SERVICE, name, start)
    kubernetes.wait(target, SERVICE, name, "become ready", is_ready)


def api(target: KserveTarget, model: Model, before: Served) -> tuple[str, str] | None:
    """Return the URL and model name of the service without traffic, for any weights; None if there is no gateway."""
    if not target.gateway:
        return None
    name = idle(target, before)
    of_service = part(kubernetes.read(target, SERVICE, name), "spec", "model").get("name") or name
    asked_for = target.alias or model.name if model.output == "lora" else str(of_service)
    return f"{target.gateway.rstrip('/')}/{target.namespace}/{name}/v1", asked_for


def put(target: KserveTarget, model: Model, before: Served) -> str:
    """Move the traffic to the service that has the new model, by a canary; return the model's alias.

    Raises:
        WorseError, TransientError, LewisError: as `canary.run`.
    """
    new = idle(target, before)
    [old] = set(target.services) - {new}

    def give(name: str, share: int) -> None:
        kubernetes.patch(target, SERVICE, name, {"spec": _weight(share)})

    def has() -> bool:
        found = kubernetes.read(target, SERVICE, new)
        return is_ready(found) and _has(target, found, model)

    return canary.run(target, model, before, new, old, give, has)


def holds(target: KserveTarget, record: Served) -> bool:
    """Whether each service that gets traffic has the version of a record."""
    found, model = [kubernetes.read(target, SERVICE, name) for name in target.services], recorded(record)
    return all(_has(target, each, model) for each in found if _weight_of(each)) and any(map(_weight_of, found))


def idle(target: KserveTarget, before: Served) -> str:
    """Return the service for a new version: the one without the version in service, or else with less traffic.

    Raises:
        InputError: if the two are not of one routing group.
    """
    found = {name: kubernetes.read(target, SERVICE, name) for name in target.services}
    groups = {str(part(each, *_ROUTE).get("group")) for each in found.values()}
    if len(groups) > 1 or groups == {"None"}:
        raise InputError(
            f"{' and '.join(found)}: expected LLMInferenceServices of one group (spec.router.route.group), got "
            f"{', '.join(sorted(groups))}"
        )
    having = [name for name in found if before.uri and _has(target, found[name], recorded(before))]
    busy = max(having or found, key=lambda name: _weight_of(found[name]))
    return next(name for name in target.services if name != busy)


def _weight_of(service: Mapping[str, Any]) -> int:
    return int(part(service, *_ROUTE).get("weight") or 0)


def _weight(share: int) -> dict[str, Any]:
    return {"router": {"route": {"weight": share}}}


def _model(target: KserveTarget, model: Model) -> dict[str, Any]:
    """Return the new `spec.model`: the URI of a full model, or a list of adapters with this one alone."""
    uri = str(filled(target.uri, model))
    if model.output != "lora":
        return {"uri": uri}
    return {"lora": {"adapters": [{"name": target.alias or model.name, "uri": uri}]}}


def _has(target: KserveTarget, service: Mapping[str, Any], model: Model) -> bool:
    content, uri = part(service, "spec", "model"), str(filled(target.uri, model))
    return uri in (content.get("uri"), *(each.get("uri") for each in part(content, "lora").get("adapters") or ()))
