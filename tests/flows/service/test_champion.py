"""`lewis up --serve`: the champion answers on one port, through a real HAProxy, and moves without a lost request."""

import shutil
import time
from pathlib import Path

import pytest

from lewis.serving import service, slots
from lewis.serving.local import LocalTarget
from lewis.serving.records import served
from lewis.store.secrets import UP_SERVE_KEY
from tests.support.here import Here, clients
from tests.support.lineage import crowned
from tests.support.models import write_llama

pytestmark = pytest.mark.skipif(not shutil.which("haproxy", path="/usr/sbin:/usr/bin"), reason="apt install haproxy")


def test_a_champion_is_served_by_transformers_and_the_next_one_without_a_lost_request(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots.want(slots.Wanted("tiny"))
    with Here(tmp_path / "log") as here:
        key = UP_SERVE_KEY.read()
        assert (here.get("/health"), here.get("/v1/models"), here.get("/v1/models", key)) == (503, 401, 503)
        assert slots.state() == (True, "waits for a champion of tiny")
        record, _ = service.serve(LocalTarget(), crowned(write_llama(tmp_path / "one", seed=1, tied=False), "1"))
        first = here.ask()
        assert record.uri == "models:/tiny/1" and f"100 % at {here.url}/v1" in served("tiny")[0].line()
        assert (here.get("/health"), here.get("/v1/models", "another"), here.get("/load_model", key)) == (200, 401, 404)
        second = crowned(write_llama(tmp_path / "two", seed=2, tied=False), "2")
        with clients(here) as seen:
            began = time.monotonic()
            service.serve(LocalTarget(), second)
            took = time.monotonic() - began
            assert here.ask() != first
            while seen[-1] == first:
                time.sleep(0.02)
        errors = [each for each in seen if each.startswith("error")]
        print(f"champion to first token: {took:.1f} s; {len(seen)} requests, {len(errors)} lost")
        assert errors == [] and set(seen) == {first, here.ask()}
