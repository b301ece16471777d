"""The Hub's branch `champion` is a target: what is promoted or rolled back is what `org/name@champion` gives."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from lewis.recipe.schema import Publish
from lewis.registry import promotion, tracking, versions
from lewis.serving import service
from lewis.serving.hub import HubTarget
from lewis.serving.records import served
from tests.conftest import Family
from tests.support.lineage import crowned, make_home
from tests.support.local_hub import LocalHub
from tests.support.writable_hub import writable_hub


@pytest.fixture
def hub(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    make_home(tmp_path / "home", empty_database, monkeypatch)
    with writable_hub(tmp_path / "server", tmp_path / "hub", monkeypatch) as hub:
        yield hub


def test_a_rollback_reaches_who_pins_the_champion(hub: LocalHub, family: Family, tmp_path: Path) -> None:
    target = HubTarget(publish=Publish(repo="org/served"))

    def pinned() -> bytes:
        file = hf_hub_download(
            "org/served", "model.safetensors", revision="champion", endpoint=hub.url, cache_dir=tmp_path / "cache"
        )
        return Path(file).read_bytes()

    def serve() -> bool:
        champion = versions.champion("tiny")
        assert champion is not None
        return service.serve(target, champion)[1]

    for digit, model in (("a", family.base), ("b", family.math)):
        crowned(model, digit)
        assert serve() and not serve()
        assert pinned() == (model / "model.safetensors").read_bytes()
    promotion.rollback("tiny", "it was rude")
    assert serve() and pinned() == (family.base / "model.safetensors").read_bytes()
    (record,) = served("tiny")
    assert record.uri == "models:/tiny/1" and record.alias.startswith("org/served@champion (")


@pytest.mark.long
def test_the_branch_has_the_picture_of_the_version_that_it_has(hub: LocalHub, family: Family, tmp_path: Path) -> None:
    """The picture of the first version that was published stayed."""
    target, held = HubTarget(publish=Publish(repo="org/served")), list[bytes | None]()
    for digit, content in (("a", b"first"), ("b", b"second"), ("c", None)):
        champion = crowned(family.base, digit)
        if content:
            picture = tmp_path / "density.png"
            picture.write_bytes(content)
            with tracking.client("adding a picture") as client:
                client.log_artifact(champion.version.run_id, str(picture))
        service.serve(target, champion)
        repo = hub.repos["model", "org/served"]
        found = repo.commits[repo.branches["champion"]].get("density.png")
        held.append(found.path.read_bytes() if found else None)
    assert held == [b"first", b"second", None]
