"""A canary with a real HAProxy and a real Prometheus, by the default queries, while clients ask all the time."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from lewis.recipe.serve import HaproxyTarget
from lewis.serving import haproxy
from lewis.serving.canary import WorseError
from lewis.serving.records import Served
from tests.support.routed import Place, clients, model, routed, serve
from tests.support.service import free_port

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="apt install haproxy prometheus")
EXPORTER = """
frontend metrics
  bind 127.0.0.1:{port}
  http-request use-service prometheus-exporter
"""
SCRAPE = """
global: {{scrape_interval: 1s}}
scrape_configs: [{{job_name: haproxy, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""


@contextmanager
def prometheus(metrics: int, folder: Path) -> Iterator[str]:
    """A real Prometheus that scrapes HAProxy's exporter at a port; gives its URL."""
    port, config = free_port(), folder / "prometheus.yml"
    config.write_text(SCRAPE.format(port=metrics))
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while not ready(url):
        assert process.poll() is None
        time.sleep(0.2)
    try:
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Iterator[tuple[Place, HaproxyTarget]]:
    metrics = free_port()
    with routed(EXPORTER.format(port=metrics)) as made, prometheus(metrics, tmp_path) as url:
        fields = made.target.model_dump(include={"kind", "socket", "backend", "servers"})
        yield made, HaproxyTarget(**fields, prometheus=url, steps=(50,), minutes=0.25, requests=20, patience_minutes=5)


def ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=5).ok
    except requests.RequestException:
        return False


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
