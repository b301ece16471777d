"""A canary with a real HAProxy and a real Prometheus, by the default queries, while clients ask all the time."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lewis.recipe.serve import HaproxyTarget
from lewis.serving import haproxy
from lewis.serving.canary import WorseError
from lewis.serving.records import Served
from tests.serve.conftest import EXPORTER, prometheus
from tests.support.routed import Place, clients, model, routed, serve
from tests.support.service import free_port

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="apt install haproxy prometheus")


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Iterator[tuple[Place, HaproxyTarget]]:
    metrics = free_port()
    with routed(EXPORTER.format(port=metrics)) as made, prometheus(metrics, tmp_path) as url:
        fields = made.target.model_dump(include={"kind", "socket", "backend", "servers"})
        yield made, HaproxyTarget(**fields, prometheus=url, steps=(50,), minutes=0.25, requests=20, patience_minutes=5)


def test_a_good_version_gets_the_traffic_and_a_slow_one_does_not(place: tuple[Place, HaproxyTarget]) -> None:
    made, made.target = place[0], place[1]
    record = serve(made, model(1), Served("tiny", "haproxy", "haproxy"))
    with clients(made) as seen:
        record = serve(made, model(2), record)
        assert haproxy.weights(made.target) == {"blue": 100, "green": 0}
        made.servers["green"].delay = 0.5
        with pytest.raises(WorseError, match=r"canary at 50 %, \d+ requests .* seconds per request 0.\d+ vs .*, FAIL"):
            serve(made, model(3), record)
        assert haproxy.weights(made.target) == {"blue": 100, "green": 0}
    errors = [each for each in seen if each.startswith("error")]
    print(f"asked {len(seen)} times, {len(errors)} failed")
    assert errors == [] and len(seen) > 100
