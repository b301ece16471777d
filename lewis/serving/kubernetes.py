"""Read, patch and wait for KServe's resources by the API of Kubernetes.

Kubernetes checks each patch by the cluster's schema of the resource, and refuses a patch with unknown keys.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lewis import settings
from lewis.errors import LewisError
from lewis.recipe.serve import KserveTarget
from lewis.serving.requests_to import json_of, send

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where Kubernetes puts a pod's token
_PATCH = "application/merge-patch+json"
_PAUSE = 5.0  # seconds between two looks at a resource
sleep: Callable[[float], None] = time.sleep


class Resource(NamedTuple):
    """A type of resources in Kubernetes.

    Attributes:
        kind: such as InferenceService; in paths it is plural, in lower case.
        version: of its schema.
    """

    kind: str
    version: str


def read(target: KserveTarget, resource: Resource, name: str) -> dict[str, Any]:
    """Read a resource from Kubernetes.

    Raises:
        TransientError, LewisError: as `send`, or if the answer is no resource of that kind.
    """
    answer = _send(target, "GET", resource, name)
    if answer.get("kind") != resource.kind:
        raise LewisError(f"{target.api}: expected {resource.kind} {name}, got {str(answer)[:200]}")
    return answer


def patch(target: KserveTarget, resource: Resource, name: str, content: Mapping[str, Any]) -> None:
    """Change a resource by a merge patch (RFC 7386).

    Raises:
        TransientError, LewisError: as `send`; also for a content that the schema of the cluster does not know.
    """
    _send(target, "PATCH", resource, name, content)


def wait(
    target: KserveTarget, resource: Resource, name: str, what: str, until: Callable[[Mapping[str, Any]], bool]
) -> None:
    """Wait until a resource is in a state, as its controller reports it for the newest generation.

    Args:
        what: what the resource is to do, in words, for the error.
        until: whether a resource is in that state.

    Raises:
        TransientError, LewisError: as `read`, or if that takes longer than the target's `start_minutes`.
    """
    end = time.monotonic() + 60 * target.start_minutes
    while True:
        found = read(target, resource, name)
        newest = part(found, "metadata").get("generation", 0)
        seen = part(found, "status").get("observedGeneration", condition(found).get("observedGeneration", newest))
        if seen >= newest and until(found):
            return
        if time.monotonic() > end:
            state = " ".join(str(condition(found).get(key, "")) for key in ("status", "reason", "message"))
            raise LewisError(
                f"{name} did not {what} within {target.start_minutes:g} minutes; its condition Ready is {state.strip()}"
            )
        sleep(_PAUSE)


def part(found: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the mapping below some keys of a resource, one in the other; empty if the resource lacks one of them."""
    for key in keys:
        found = found.get(key) or {}
    return found


def condition(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The condition Ready of a resource; empty if it has none yet."""
    return next((each for each in part(found, "status").get("conditions") or () if each.get("type") == "Ready"), {})


def is_ready(found: Mapping[str, Any]) -> bool:
    """Whether the condition Ready of a resource is true."""
    return condition(found).get("status") == "True"


def _send(target: KserveTarget, method: str, resource: Resource, name: str, body: Any = None) -> dict[str, Any]:
    place = f"/apis/serving.kserve.io/{resource.version}/namespaces/{target.namespace}/{resource.kind.lower()}s/{name}"
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
        return dict(json_of(answer))
    except (ValueError, TypeError) as error:
        raise LewisError(f"{target.api}: its answer is no JSON object; is this the API of Kubernetes?") from error
