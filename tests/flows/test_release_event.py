"""The event of a release: what the server stores, and which repos a recipe follows."""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from lewis.errors import TransientError
from lewis.recipe.recipe import Recipe
from lewis_flows import release_event
from tests.flows.service.test_webhook import ALPHA, NEW, OLD, stored, until


@pytest.fixture
def api(prefect_url: str) -> Iterator[str]:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield prefect_url


def test_an_event_about_a_folder_is_stored(api: str) -> None:
    folder, new = "/tmp/my models/{{ 7*7 }}*\n", "sha256:" + "6" * 64
    found = release_event.announce("nightly", "./x", folder, None, new)
    (event,) = stored(api, new, 1)
    assert event["id"] == found
    assert event["resource"]["prefect.resource.id"] == "lewis.expert./tmp/my%20models/%7B%7B%207%2A7%20%7D%7D%2A%0A"
    assert event["payload"].pop("message").endswith("never merged → 66666666; nightly is to be merged")
    assert event["payload"] == {"recipe": "nightly", "ref": "./x", "repo": folder, "old": None, "new": new}


def test_an_event_that_is_not_taken_is_an_error() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    started = time.monotonic()
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(TransientError, match="ConnectError"),
    ):
        release_event.announce("r", "org/x", "org/x", OLD, NEW)
    assert time.monotonic() - started < 60


def test_a_burst_is_waited_for_and_one_release_is_not(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.setattr(release_event, "BURST", timedelta(hours=1))  # a busy server stores it minutes later
    release_event.announce("burst", "org/x", "org/x", OLD, "5" * 40)
    stored(api, "5" * 40, 1)
    until(lambda: len(release_event._recent("burst")) == 1)
    monkeypatch.setattr(release_event.time, "sleep", slept.append)
    release_event.settle("burst")
    assert slept == []
    now, rest = timedelta(0), release_event.REST + timedelta(seconds=1)
    looks = [[now, rest], [now, rest], [rest, rest]]
    monkeypatch.setattr(release_event, "_recent", lambda recipe: looks.pop(0))
    release_event.settle("burst")
    assert slept == [1, 1] and looks == []
    monkeypatch.setattr(release_event, "LONGEST", timedelta(0))
    release_event.settle("burst")
    assert slept == [1, 1]


def test_a_folder_beside_the_recipe_is_no_repo(tmp_path: Path) -> None:
    (tmp_path / "org" / "math").mkdir(parents=True)
    recipe = Recipe.parse(ALPHA.replace("org/base\n", "./gone\n"), root=tmp_path)
    assert list(release_event.hub_repos(recipe)) == [
        ("org/code", "org/code@main"),
        ("org/base", "org/base+org/lora"),
        ("org/lora", "org/base+org/lora"),
    ]
