"""The API of Kubernetes with some services of KServe, and their controller: a real HTTP server that keeps them.

A merge patch is applied as Kubernetes does (RFC 7386), checked by the fields that KServe publishes: of v1alpha2 for an
LLMInferenceService, of v1beta1 for an InferenceService.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.http_sink import HttpSink, Request

PLACE = "/apis/serving.kserve.io/v1alpha2/namespaces/models/llminferenceservices/"
MODEL = {"uri": str, "name": str}
SCHEMA: dict[str, Any] = {
    "metadata": {"annotations": None},
    "spec": {
        "model": {**MODEL, "lora": {"adapters": [MODEL], "maxRank": int}},
        "router": {"route": {"group": str, "weight": int}, "scheduler": None},
    },
}
"""Key -> what it has: keys of its own, a list of such, a type, or None for anything."""


class Api(HttpSink):
    """Use as a context manager.

    Attributes:
        place: the path of the services.
        schema: as `SCHEMA`.
        services: name -> the service.
    """

    def __init__(self, place: str, schema: Mapping[str, Any], services: dict[str, dict[str, Any]]) -> None:
        super().__init__(self._answered)
        self.place, self.schema, self.services = place, schema, services

    def _answered(self, request: Request) -> Any:
        parts = urlsplit(request.path)
        name = parts.path.removeprefix(self.place)
        if not parts.path.startswith(self.place) or name not in self.services:
            return 404, _status(404, "NotFound", f'{self.place.split("/")[-2]}.serving.kserve.io "{name}" not found')
        if request.method == "PATCH":
            assert request.headers["content-type"] == "application/merge-patch+json"
            if problem := _problem(request.json, self.schema, ""):
                assert parse_qs(parts.query)["fieldValidation"] == ["Strict"], "unknown keys would be dropped silently"
                return 400, _status(400, "BadRequest", problem)
            old = self.services[name]
            new = _merged(old, request.json)
            if problem := self._invalid(new):
                return 422, _status(422, "Invalid", problem)
            new["metadata"]["generation"] += new["spec"] != old["spec"]
            self.services[name] = new
            self._reconcile(name)
        return self.services[name]

    def _invalid(self, service: Mapping[str, Any]) -> str:
        """What is wrong with a service, by rules beyond its fields; empty if nothing is."""
        raise NotImplementedError

    def _reconcile(self, name: str) -> None:
        """What the controller does when a service has changed."""
        raise NotImplementedError


class Cluster(Api):
    """With LLMInferenceServices; use as a context manager.

    Attributes:
        starts: seconds that a service takes to become ready; None: it never does.
        ran: (name, URI, weight) of each service that became ready, in order.
    """

    def __init__(self, *names: str) -> None:
        services = {name: _service(name, weight) for name, weight in zip(names, (100, 0), strict=True)}
        super().__init__(PLACE, SCHEMA, services)
        self.starts: float | None = 0.02
        self.ran: list[tuple[str, str, int]] = []
        for name in names:
            self._reconcile(name)

    def shares(self) -> dict[str, int]:
        """Name -> weight."""
        return {name: each["spec"]["router"]["route"]["weight"] for name, each in self.services.items()}

    def uri(self, name: str) -> str:
        """Of the model that a service is to have."""
        return str(self.services[name]["spec"]["model"]["uri"])

    def _invalid(self, service: Mapping[str, Any]) -> str:
        route = service["spec"]["router"]["route"]
        known = route.get("group") and 0 <= route.get("weight", -1) <= 1_000_000 and service["spec"]["model"]["uri"]
        return "" if known else "spec.router.route: group and weight are required together"

    def _wanted(self, name: str) -> dict[str, Any] | None:
        """The model that the pods are to have; None if it is stopped."""
        service = self.services[name]
        stopped = service["metadata"]["annotations"].get("serving.kserve.io/stop") == "true"
        return None if stopped else dict(service["spec"]["model"])

    def _reconcile(self, name: str) -> None:
        """What the controller does: the weights at once; a service that stopped, or has another model, starts later."""
        service, wanted = self.services[name], self._wanted(name)
        service["status"]["observedGeneration"] = service["metadata"]["generation"]
        if wanted != service["status"].get("runs"):
            reason = "Starting" if wanted else "Stopped"
            service["status"] |= {"runs": None, "conditions": [_ready(False, reason)]}
            if wanted and self.starts is not None:
                threading.Thread(target=self._start, args=(name, wanted), daemon=True).start()

    def _start(self, name: str, model: dict[str, Any]) -> None:
        time.sleep(self.starts or 0)
        if self._wanted(name) == model:
            self.ran.append((name, model["uri"], self.shares()[name]))
            self.services[name]["status"] |= {"runs": model, "conditions": [_ready(True, "")]}


INFERENCE_PLACE = "/apis/serving.kserve.io/v1beta1/namespaces/models/inferenceservices/"
INFERENCE_SCHEMA: dict[str, Any] = {
    "metadata": {"annotations": None},
    "spec": {"predictor": {"canaryTrafficPercent": int, "model": {"storageUri": str, "modelFormat": None}}},
}


class Knative(Api):
    """With an InferenceService `tiny` on Knative, which has revisions; use as a context manager.

    Attributes:
        starts: seconds that a revision takes to become ready; None: it never does.
        revisions: name -> URI of the model, of each revision in order.
        shares: (revision -> percent) after each change of the traffic.
    """

    def __init__(self, api: str = "http://latest-tiny.models") -> None:
        super().__init__(INFERENCE_PLACE, INFERENCE_SCHEMA, {"tiny": _inference_service()})
        self.starts: float | None = 0.02
        self.revisions: dict[str, str] = {}
        self.shares: list[dict[str, int]] = []
        self._api, self._lock = api, threading.RLock()
        self._create("tiny", 0)

    @property
    def component(self) -> dict[str, Any]:
        """The status of the predictor."""
        return dict(self.services["tiny"]["status"]["components"]["predictor"])

    def _invalid(self, service: Mapping[str, Any]) -> str:
        share = service["spec"]["predictor"].get("canaryTrafficPercent", 100)
        return "" if 0 <= share <= 100 else "spec.predictor.canaryTrafficPercent: from 0 to 100"

    def _reconcile(self, name: str) -> None:
        # The controller has seen the change before Knative makes a revision: until then the status is of the old one.
        service = self.services[name]
        service["status"]["observedGeneration"] = service["metadata"]["generation"]
        newest = next(reversed(self.revisions.values()), None)
        if service["spec"]["predictor"]["model"]["storageUri"] != newest:
            threading.Thread(target=self._create, args=(name, 0.05), daemon=True).start()
        else:
            self._route(name)

    def _create(self, name: str, seconds: float) -> None:
        time.sleep(seconds)
        with self._lock:
            revision = f"{name}-predictor-{len(self.revisions) + 1:05}"
            self.revisions[revision] = self.services[name]["spec"]["predictor"]["model"]["storageUri"]
            self._say(name, latestCreatedRevision=revision)
            self.services[name]["status"]["conditions"] = [_ready(False, "RevisionMissing")]
        if seconds and self.starts is None:
            return
        time.sleep((self.starts or 0) if seconds else 0)
        with self._lock:
            if self.component["latestCreatedRevision"] == revision:
                self._say(name, latestReadyRevision=revision)
                self.services[name]["status"]["conditions"] = [_ready(True, "")]
                self._route(name)

    def _route(self, name: str) -> None:
        """The newest revision gets its percent, the one that had all before has the rest."""
        with self._lock:
            service, part = self.services[name], self.component
            percent = service["spec"]["predictor"].get("canaryTrafficPercent", 100)
            new, old = part["latestReadyRevision"], part.get("latestRolledoutRevision")
            percent = percent if old else 100
            target = {"revisionName": new, "latestRevision": True, "percent": percent}
            if service["metadata"]["annotations"].get("serving.kserve.io/enable-tag-routing") == "true":
                target |= {"tag": "latest", "url": self._api}
            rest = [{"revisionName": old, "latestRevision": False, "percent": 100 - percent, "tag": "prev"}]
            self._say(name, traffic=[target, *(rest if percent < 100 else [])])
            shares = {new: percent}
            if percent < 100:
                shares[old] = shares.get(old, 0) + 100 - percent
            self.shares.append(shares)
            if percent == 100 and old != new:
                self._say(name, latestRolledoutRevision=new, previousRolledoutRevision=old or "")

    def _say(self, name: str, **known: Any) -> None:
        self.services[name]["status"].setdefault("components", {}).setdefault("predictor", {}).update(known)


def _inference_service() -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "tiny", "namespace": "models", "generation": 1, "annotations": {"team": "ours"}},
        "spec": {"predictor": {"model": {"storageUri": "hf://org/base", "modelFormat": {"name": "huggingface"}}}},
        "status": {"deploymentMode": "Knative", "observedGeneration": 1},
    }


def _service(name: str, weight: int) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": name, "namespace": "models", "generation": 1, "annotations": {"team": "ours"}},
        "spec": {
            "model": {"uri": "hf://org/base", "name": "tiny"},
            "router": {"route": {"group": "tiny", "weight": weight}, "scheduler": {}},
        },
        "status": {},
    }


def _ready(ready: bool, reason: str) -> dict[str, str]:
    return {"type": "Ready", "status": str(ready), "reason": reason}


def _status(code: int, reason: str, message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}


def _merged(old: Any, patch: Any) -> Any:
    if not isinstance(patch, Mapping):
        return patch
    kept = {**old} if isinstance(old, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            kept.pop(key, None)
        else:
            kept[key] = _merged(kept.get(key), value)
    return kept


def _problem(content: Any, schema: Any, place: str) -> str:
    """What the schema refuses; empty if it takes the content."""
    if schema is None or content is None:
        return ""
    if isinstance(schema, type):
        return "" if type(content) is schema else f"{place[1:]}: expected {schema.__name__}, got {content!r}"
    if isinstance(schema, list):
        found = [_problem(each, schema[0], f"{place}[{i}]") for i, each in enumerate(content)]
    else:
        unknown = [f'unknown field "{place[1:]}.{key}"' for key in content if key not in schema]
        found = [*unknown, *(_problem(content[key], schema[key], f"{place}.{key}") for key in content if key in schema)]
    return next(filter(None, found), "")
