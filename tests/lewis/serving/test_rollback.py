"""A version that is rolled back does not go into service, and does not stay there."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import LewisError
from lewis.recipe.serve import VllmTarget, WebhookTarget
from lewis.registry import promotion
from lewis.serving import service
from lewis.serving.model import Model, OutdatedError
from lewis.serving.records import Served, served
from lewis.store.kinds import SERVED
from tests.conftest import Family
from tests.support.http_sink import HttpSink
from tests.support.lineage import crowned, make_home, with_tokenizer
from tests.support.lora_server import LoraServer


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path / "home", empty_database, monkeypatch)


def test_only_the_champion_goes_into_service(home: Path, family: Family) -> None:
    """A version that was rolled back before its turn went into service, and was recorded as being there."""
    with HttpSink() as sink:
        target, first = WebhookTarget(kind="webhook", url=sink.url), crowned(family.base, "a")
        record, _ = service.serve(target, first)
        second = crowned(family.base, "b")
        promotion.rollback("tiny", "it was rude")
        with pytest.raises(OutdatedError, match=r"tiny/1 stays in service: models:/tiny/2 is not the champion any mor"):
            service.serve(target, second)
        assert len(sink.received) == 1 and served("tiny") == [record], "the target has not failed"
        assert service.serve(target, first) == (record, False)


def test_a_version_that_is_rolled_back_while_it_is_offered_does_not_get_the_clients(
    home: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, prepare = with_tokenizer(family.lora, tmp_path / "adapter"), service.model.prepare

    def late(*given: Any) -> Any:
        ready = prepare(*given)
        promotion.rollback("tiny", "it was rude")
        return ready

    with LoraServer("tiny") as server:
        target = VllmTarget(kind="vllm", url=server.url)
        record, _ = service.serve(target, crowned(adapter, "a", base=family.base))
        second = crowned(adapter, "b", base=family.base)
        monkeypatch.setattr(service.model, "prepare", late)
        with pytest.raises(OutdatedError):
            service.serve(target, second)
        assert server.seen[-1] == str(SERVED.path(record.alias)) and served("tiny") == [record]


def test_a_version_that_was_rolled_back_is_replaced_without_a_canary_and_until_that_has_worked(
    home: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canary compared the champion with it, and a version that answers fast and nothing stayed."""
    target, at_once = WebhookTarget(kind="webhook", url="http://127.0.0.1:1"), list[bool]()

    def put(target: WebhookTarget, model: Model, before: Served) -> str:
        at_once.append(model.at_once)
        if not works:
            raise LewisError("the server does not become ready")
        return model.alias

    monkeypatch.setattr(service, "KINDS", {"webhook": service.Kind(put)})
    works, first = True, crowned(family.base, "a")
    service.serve(target, first)
    second = crowned(family.base, "b")
    service.serve(target, second)
    monkeypatch.setattr(service, "AGAIN", timedelta(seconds=-1))
    works = False
    with pytest.raises(LewisError, match="tiny/2 stays in service"):
        service.serve(target, second, again=True)
    assert not service.is_due([target], second), "it would be refused again"
    promotion.rollback("tiny", "it was rude")
    with pytest.raises(LewisError, match="tiny/2 stays in service"):
        service.serve(target, first)
    assert service.is_due([target], first), "clients still get the version that was rolled back"
    works = True
    service.serve(target, first)
    service.serve(target, crowned(family.base, "c"))
    assert at_once == [False, False, False, True, True, False]
