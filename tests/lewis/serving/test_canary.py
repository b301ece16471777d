"""The steps of a canary, without servers: who gets which share, and when."""

from dataclasses import replace

import pytest

from lewis.errors import LewisError, TransientError
from lewis.recipe.serve import HaproxyTarget, Rule
from lewis.reports.canary import Canary
from lewis.serving import canary
from lewis.serving.model import Model, OutdatedError
from lewis.serving.records import Served
from tests.support.http_sink import HttpSink
from tests.support.routed import model

TARGET = HaproxyTarget(
    kind="haproxy",
    socket="/s",
    backend="champion",
    servers={"blue": "http://127.0.0.1:1", "green": "http://127.0.0.1:2"},
    prometheus="http://127.0.0.1:3",
    minutes=0.0001,
    rules=(Rule(name="errors", query="errors of {server}", plus=0.01),),
    count="requests of {server}",
)
BEFORE = Served("tiny", "haproxy", "haproxy").took("models:/tiny/1", "1" * 64, model(1).alias, "")


class Router:
    """What sets the shares of the servers: all that were set, in their order."""

    def __init__(self) -> None:
        self.shares = list[tuple[str, int]]()

    def run(self, new: Model) -> None:
        """Run a canary of a model, from the server `green` to `blue`."""
        canary.run(TARGET, new, BEFORE, "blue", "green", lambda *share: self.shares.append(share), lambda: True)


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setattr(canary, "sleep", lambda _: None)
    monkeypatch.setattr(canary, "query", lambda target, text, *_: 0.0 if text.startswith("errors") else 99.0)
    return Router()


@pytest.mark.parametrize("held", [0, 1, 2])
def test_the_old_server_has_its_traffic_back_when_another_version_becomes_the_champion(
    router: Router, held: int
) -> None:
    """A version that a person rolled back in its canary got all traffic."""

    def check() -> None:
        if len(new.steps) == held:
            raise OutdatedError("models:/tiny/2 is not the champion any more")

    new = replace(model(2), check_champion=check)
    with pytest.raises(OutdatedError):
        router.run(new)
    assert router.shares[-2:] == [("green", 100), ("blue", 0)] and ("blue", 100) not in router.shares
    assert [each.share for each in new.steps] == [10, 50][:held] and all(each.passed for each in new.steps)
    why = "it is not the champion any more"
    assert Canary("haproxy", "", tuple(new.steps), why).line().startswith("Given up: "), "no step has failed"


def test_a_step_outlasts_a_restart_of_mlflow(router: Router) -> None:
    asked = list[int]()

    def check() -> None:
        asked.append(len(new.steps))
        if len(asked) == 1:
            raise TransientError("MLflow does not answer")

    new = replace(model(2), check_champion=check)
    router.run(new)
    assert router.shares[-2:] == [("blue", 100), ("green", 0)] and {0, 1, 2} <= set(asked)


def test_all_traffic_moves_without_steps_to_the_champion_before_one_that_was_rolled_back(router: Router) -> None:
    new = replace(model(2), at_once=True)
    router.run(new)
    assert router.shares == [("blue", 100), ("green", 0)] and new.steps == []


def test_a_query_that_gives_several_numbers_is_refused() -> None:
    """The first one counted, such as the share of one kind of errors, and the others were not looked at."""
    found = [{"metric": {"code": code}, "value": [0, value]} for code, value in (("500", "0"), ("503", "0.9"))]
    with HttpSink(lambda _: {"status": "success", "data": {"result": found}}) as prometheus:
        target = TARGET.model_copy(update={"prometheus": prometheus.url})
        with pytest.raises(LewisError, match=r"expected one number for 'errors of blue', got 2; put `sum\(\.\.\.\)`"):
            canary.query(target, "errors of {server}", "blue", 5)
        del found[1]
        assert canary.query(target, "errors of {server}", "blue", 5) == 0
