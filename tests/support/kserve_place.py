"""A cluster with services of KServe, a Prometheus that answers as a test says, and the target that has both."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import parse_qs

import pytest

from lewis.recipe.serve import KserveTarget
from lewis.serving import canary, kubernetes
from lewis.serving.model import Model
from tests.support.http_sink import HttpSink, Request
from tests.support.kubernetes_api import Api
from tests.support.routed import model

C = TypeVar("C", bound=Api)


class Place(NamedTuple, Generic[C]):
    """What a test gets.

    Attributes:
        cluster: the API of Kubernetes.
        errors: server -> its share of errors, where that is not 0.001.
        asked: the queries that Prometheus got.
        target: of the kind `kserve`.
    """

    cluster: C
    errors: dict[str, float]
    asked: list[str]
    target: KserveTarget


@contextmanager
def kserve_place(cluster: C, services: str | tuple[str, ...], patch: pytest.MonkeyPatch) -> Iterator[Place[C]]:
    """Start both; nothing waits longer than 20 ms between two looks. `services` as a recipe has them."""
    for module in (canary, kubernetes):
        patch.setattr(module, "sleep", lambda _: time.sleep(0.02))
    errors, asked = dict[str, float](), list[str]()

    def answer(request: Request) -> Any:
        [query] = parse_qs(request.body)["query"]
        asked.append(query)
        of_errors, number = "abort|error" in query, query.startswith("sum(increase") and " / " not in query
        share = next((share for server, share in errors.items() if f'="{server}"' in query), 0.001)
        value = share if of_errors else 99 if number else 0.2
        return {"status": "success", "data": {"result": [{"value": [0, str(value)]}]}}

    with cluster, HttpSink(answer) as prometheus:
        fields = {"prometheus": prometheus.url, "minutes": 0.002, "patience_minutes": 0.01, "start_minutes": 0.05}
        where = {"api": cluster.url, "namespace": "models", "services": services}
        target = KserveTarget(kind="kserve", uri="pvc://store/served/{served_as}", **where, **fields)
        yield Place(cluster, errors, asked, target)


def full(number: int) -> Model:
    """A version that is a full model."""
    made = model(number)
    return Model("tiny", made.version, made.digest, made.folder, "full")
