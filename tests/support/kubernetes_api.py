"""The API of Kubernetes with some LLMInferenceServices, and their controller: a real HTTP server that keeps them.

A merge patch is applied as Kubernetes does (RFC 7386), checked by the fields that KServe publishes for v1alpha2.
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


class Cluster(HttpSink):
    """Use as a context manager.

    Attributes:
        services: name -> the LLMInferenceService.
        starts: seconds that a service takes to become ready; None: it never does.
        ran: (name, URI, weight) of each service that became ready, in order.
    """

    def __init__(self, *names: str) -> None:
        super().__init__(self._answered)
        self.starts: float | None = 0.02
        self.ran: list[tuple[str, str, int]] = []
        self.services = {name: _service(name, weight) for name, weight in zip(names, (100, 0), strict=True)}
        for name in names:
            self._reconcile(name)

    def shares(self) -> dict[str, int]:
        """Name -> weight."""
        return {name: each["spec"]["router"]["route"]["weight"] for name, each in self.services.items()}

    def uri(self, name: str) -> str:
        """Of the model that a service is to have."""
        return str(self.services[name]["spec"]["model"]["uri"])

    def _answered(self, request: Request) -> Any:
        parts = urlsplit(request.path)
        name = parts.path.removeprefix(PLACE)
        if not parts.path.startswith(PLACE) or name not in self.services:
            return 404, _status(404, "NotFound", f'llminferenceservices.serving.kserve.io "{name}" not found')
        if request.method == "PATCH":
            assert request.headers["content-type"] == "application/merge-patch+json"
            if problem := _problem(request.json, SCHEMA, ""):
                assert parse_qs(parts.query)["fieldValidation"] == ["Strict"], "unknown keys would be dropped silently"
                return 400, _status(400, "BadRequest", problem)
            old = self.services[name]
            new = _merged(old, request.json)
            route = new["spec"]["router"]["route"]
            if not (route.get("group") and 0 <= route.get("weight", -1) <= 1_000_000 and new["spec"]["model"]["uri"]):
                return 422, _status(422, "Invalid", "spec.router.route: group and weight are required together")
            new["metadata"]["generation"] += new["spec"] != old["spec"]
            self.services[name] = new
            self._reconcile(name)
        return self.services[name]

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
