"""Traffic moves between two servers by a real HAProxy, step by step, while clients ask all the time."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lewis.errors import LewisError, TransientError
from lewis.serving import canary, haproxy
from lewis.serving.canary import WorseError
from lewis.serving.records import Served
from tests.support.http_sink import Request
from tests.support.routed import Place, clients, model, routed, serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("haproxy"), reason="there is no haproxy; Debian has it in the package haproxy"),
]


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(canary, "sleep", lambda _: time.sleep(0.05))
    with routed() as made:
        yield made


def test_a_new_version_gets_all_traffic_when_every_step_holds(place: Place) -> None:
    first, second, third = map(model, (1, 2, 3))
    record = serve(place, first, Served("tiny", "haproxy", "haproxy"))
    assert haproxy.weights(place.target) == {"blue": 0, "green": 100} and place.has("green") == str(first.folder)
    assert haproxy.holds(place.target, record)
    with clients(place) as seen:
        record = serve(place, second, record)
        assert haproxy.weights(place.target) == {"blue": 100, "green": 0} and place.has("blue") == str(second.folder)
        time.sleep(0.2)
    assert set(seen) <= {str(first.folder), str(second.folder)} and seen[-1] == str(second.folder)
    record = serve(place, third, record)
    assert (place.has("green"), haproxy.weights(place.target)["green"]) == (str(third.folder), 100)
    place.servers["green"].models.pop("tiny")  # started again
    assert not haproxy.holds(place.target, record)


def test_a_share_that_a_killed_canary_left_to_a_version_is_taken_back_when_the_champion_is_rolled_back(
    place: Place,
) -> None:
    record = serve(place, model(1), Served("tiny", "haproxy", "haproxy"))
    haproxy.offer(place.target, model(2), record)
    haproxy.give(place.target, "blue", 25)  # the process is killed here
    assert haproxy.weights(place.target) == {"blue": 25, "green": 100}
    assert not haproxy.holds(place.target, record)
    record = serve(place, model(1), record)
    assert haproxy.holds(place.target, record)
    busy = [name for name, share in haproxy.weights(place.target).items() if share]
    assert {place.has(name) for name in busy} == {str(model(1).folder)}


def test_a_rule_of_which_prometheus_has_no_number_is_reported(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    record = serve(place, model(1), Served("tiny", "haproxy", "haproxy"))
    place.values = {"blue": float("nan"), "green": float("nan")}
    serve(place, model(2), record)
    assert "Prometheus has no number of either version for 'errors'; both count as 0" in caplog.text


def test_a_version_that_is_worse_loses_its_traffic_with_the_numbers(place: Place) -> None:
    record = serve(place, model(1), Served("tiny", "haproxy", "haproxy"))
    place.values = {"blue": 0.2, "green": 0.001}
    with (
        clients(place) as seen,
        pytest.raises(WorseError, match=r"canary at 10 %, 99 requests.*errors 0.2 vs 0.001, FAIL"),
    ):
        serve(place, model(2), record)
    assert haproxy.weights(place.target) == {"blue": 0, "green": 100} and not any("error" in each for each in seen)
    place.values, place.count = {}, 3
    with pytest.raises(LewisError, match=r"the new version had 3 requests in .* and 50 are needed to judge it"):
        serve(place, model(2), record)
    assert haproxy.weights(place.target) == {"blue": 0, "green": 100}


def test_a_new_server_that_dies_or_starts_again_in_a_step_gets_no_more_traffic(place: Place) -> None:
    record, blue = serve(place, model(1), Served("tiny", "haproxy", "haproxy")), place.servers["blue"]
    answered = place._answered

    def forget(request: Request) -> object:
        blue.models.pop("tiny", None)
        return answered(request)

    place.prometheus.answer = forget  # which goes on to say that nothing is wrong
    with pytest.raises(TransientError, match=r"blue was given \d+ % and has lost the new version"):
        serve(place, model(2), record)
    assert haproxy.weights(place.target) == {"blue": 0, "green": 100}

    def die(request: Request) -> object:
        blue.__exit__()
        return answered(request)

    place.prometheus.answer = die
    with pytest.raises(TransientError, match="does not answer"):
        serve(place, model(2), record)
    assert haproxy.weights(place.target) == {"blue": 0, "green": 100}


def test_after_a_kill_in_a_step_the_old_one_is_still_known(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    record = serve(place, model(1), Served("tiny", "haproxy", "haproxy"))
    haproxy.offer(place.target, model(2), record)
    haproxy.give(place.target, "blue", 90)
    haproxy.give(place.target, "green", 10)  # a process that was killed left it so
    assert haproxy.idle(place.target, record) == "blue"
    record = serve(place, model(2), record)
    assert haproxy.weights(place.target) == {"blue": 100, "green": 0} and record.uri == "models:/tiny/2"


def test_a_router_that_is_away_or_knows_no_such_server_is_named(place: Place) -> None:
    other = place.target.model_copy(update={"backend": "nowhere"})
    with pytest.raises(LewisError, match="HAProxy does not know the server nowhere/blue"):
        haproxy.weights(other)
    with pytest.raises(TransientError, match="HAProxy does not answer at /nowhere"):
        haproxy.weights(place.target.model_copy(update={"socket": "/nowhere"}))
