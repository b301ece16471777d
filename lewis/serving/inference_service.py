"""Targets of the kind `kserve` with one service: an InferenceService of KServe on Knative, which has revisions.

A patch with another URI makes a new revision. `canaryTrafficPercent` is the share of the requests that it gets; the
revision that had all of them last (`latestRolledoutRevision`) has the rest. KServe removes nothing by itself: at 0 the
new revision stays, and answers at a URL of its own.
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

SERVICE = Resource("InferenceService", "v1beta1")
TAGS = "serving.kserve.io/enable-tag-routing"  # annotation: "true" gives the newest revision a URL, with the tag latest


def offer(target: KserveTarget, model: Model, before: Served) -> None:
    """Make a revision with the model, without traffic, unless the newest revision has it and is ready.

    Raises:
        InputError: if the service is not one on Knative that has a revision already, or the model is an adapter.
        TransientError, LewisError: as `kubernetes.wait`.
    """
    [name] = target.services
    now = kubernetes.read(target, SERVICE, name)
    if _has(target, now, model) and _is_new_ready(now):
        return
    old = _revisions(now).get("latestRolledoutRevision")
    mode = part(now, "status").get("deploymentMode", "Knative")  # older versions of KServe do not say it
    if mode not in ("Knative", "Serverless") or not old:
        raise InputError(
            f"{name}: expected an InferenceService in the deployment mode Knative, which is ready with a first model, "
            f"got the mode {mode} and {f'the revision {old}' if old else 'no revision that was rolled out'}; only "
            "there KServe shifts traffic between revisions. With two names, `services` are LLMInferenceServices"
        )
    if model.output == "lora":
        raise InputError(
            f"{name}: an InferenceService is given full models, and {model.uri} is an adapter; set `output: full`, or "
            "serve it by two LLMInferenceServices"
        )
    # The patch of a process that died has made its revision already, and the same patch makes no other.
    last = None if _has(target, now, model) else _revisions(now).get("latestCreatedRevision")
    predictor = {"canaryTrafficPercent": 0, "model": {"storageUri": str(filled(target.uri, model))}}
    content = {"metadata": {"annotations": {TAGS: "true"}}, "spec": {"predictor": predictor}}
    kubernetes.patch(target, SERVICE, name, content)

    def is_made(found: Mapping[str, Any]) -> bool:
        return _revisions(found).get("latestCreatedRevision") != last and _is_new_ready(found)

    kubernetes.wait(target, SERVICE, name, "become ready with a new revision", is_made)


def api(target: KserveTarget, model: Model, before: Served) -> tuple[str, str] | None:
    """Return the URL and model name of the newest revision, whatever its share; None if KServe names no URL of it."""
    [name] = target.services
    traffic = _revisions(kubernetes.read(target, SERVICE, name)).get("traffic") or ()
    url = next((each["url"] for each in traffic if each.get("tag") == "latest" and each.get("url")), None)
    return (f"{url.rstrip('/')}{target.path}", target.alias or name) if url else None


def put(target: KserveTarget, model: Model, before: Served) -> str:
    """Move the traffic to the newest revision, by a canary; return the model's alias.

    Raises:
        WorseError, TransientError, LewisError: as `canary.run` and `kubernetes.wait`.
    """
    [name] = target.services
    found = kubernetes.read(target, SERVICE, name)
    if _share(found) < 100:  # else a process gave it all traffic, and died before that was recorded
        new, old = (_revisions(found)[f"latest{which}Revision"] for which in ("Ready", "Rolledout"))

        def give(revision: str, share: int) -> None:
            if revision == new:  # the old one has the rest
                content = {"spec": {"predictor": {"canaryTrafficPercent": share}}}
                kubernetes.patch(target, SERVICE, name, content)

        def has() -> bool:
            found = kubernetes.read(target, SERVICE, name)
            return (
                _has(target, found, model) and is_ready(found) and _revisions(found).get("latestReadyRevision") == new
            )

        canary.run(target, model, before, new, old, give, has)
    # Until this is rolled out, a canary of a further revision would leave the rest to the revision before this one.
    kubernetes.wait(target, SERVICE, name, "roll out its newest revision", _is_rolled_out)
    return model.alias


def holds(target: KserveTarget, record: Served) -> bool:
    """Whether the revision that has all the traffic has the version."""
    found = kubernetes.read(target, SERVICE, target.services[0])
    if _has(target, found, recorded(record)):
        return _share(found) == 100 and _is_rolled_out(found)
    return _share(found) == 0  # the newest revision was refused, so the one before has all the traffic


def _revisions(service: Mapping[str, Any]) -> Mapping[str, Any]:
    return part(service, "status", "components", "predictor")


def _is_new_ready(service: Mapping[str, Any]) -> bool:
    found = _revisions(service)
    return is_ready(service) and bool(found) and found.get("latestCreatedRevision") == found.get("latestReadyRevision")


def _is_rolled_out(service: Mapping[str, Any]) -> bool:
    found = _revisions(service)
    return bool(found) and found.get("latestRolledoutRevision") == found.get("latestReadyRevision")


def _share(service: Mapping[str, Any]) -> int:
    """The percent of the requests that the newest revision gets."""
    share = part(service, "spec", "predictor").get("canaryTrafficPercent")
    return 100 if share is None else int(share)


def _has(target: KserveTarget, service: Mapping[str, Any], model: Model) -> bool:
    content = part(service, "spec", "predictor", "model")
    return bool(content.get("storageUri") == str(filled(target.uri, model)))
