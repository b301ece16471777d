"""From a release to what clients are answered: merged, scored, registered, checked and served by a real vLLM."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import LewisError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import score
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.registry import promotion
from lewis.serving import service
from lewis.serving.records import served
from tests.serve.conftest import Vllm, flows, load, said
from tests.support.lineage import crowned, make_home, with_tokenizer

RECIPE = """
merge_method: task_arithmetic
base_model: base
models: [{model: base+one, parameters: {weight: 1.0}}]
output: {kind: lora, rank: 8}
inspect: {on: warn}
evaluate: {tasks: [words.yaml, writes.yaml], baselines: [], limit: 16}
register: {name: tiny}
serve: {kind: vllm, url: "%s", check: {agree: 1}}
"""


@pytest.fixture
def vllm(tiny: Path, tmp_path: Path) -> Iterator[Vllm]:
    with Vllm(tiny / "base", tmp_path / "vllm.log") as server:
        yield server


@pytest.fixture
def run(
    vllm: Vllm, tiny: Path, tmp_path: Path, empty_database: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Merge an expert, or serve the champion, in this process."""
    make_home(tmp_path / "home", empty_database, monkeypatch)
    return flows(tmp_path, tiny, RECIPE % vllm.url, prefect_url, monkeypatch)


def test_a_champion_is_checked_and_served_and_no_request_is_lost(
    run: Callable[..., Any], vllm: Vllm, tmp_path: Path
) -> None:
    run("one")
    assert run().changed == ["vllm"]
    (record,) = served("tiny")
    assert record.checked.startswith("32 of 32 answers are those of the model that was scored")
    of_one = said(vllm.url, "tiny")
    assert of_one == said(vllm.url, record.alias) != said(vllm.url, "base")

    with load(vllm.url, clients=4) as errors:
        run("two")
        began = time.monotonic()
        run()
        vllm.ask("tiny")
        print(f"champion to first token: {time.monotonic() - began:.1f} s")
        of_two = said(vllm.url, "tiny")
        assert served()[0].uri == "models:/tiny/2" and of_two == said(vllm.url, served()[0].alias) != of_one
        promotion.rollback("tiny", "it was rude")
        run()
        assert said(vllm.url, "tiny") == of_one
    assert errors == []

    vllm.kill()
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    [target], champion = recipe.serve, service.champion_of(recipe)
    assert champion is not None
    with pytest.raises(LewisError, match="does not answer"):
        service.serve(target, champion)
    began = time.monotonic()
    vllm.start()
    vllm.ask("base")
    print(f"server restart to first token: {time.monotonic() - began:.1f} s")
    assert run().changed == ["vllm"] and said(vllm.url, "tiny") == of_one, "the server had lost its adapters"


def test_a_server_with_other_weights_than_were_scored_is_refused(
    run: Callable[..., Any], vllm: Vllm, tiny: Path, tmp_path: Path
) -> None:
    run("one")
    run()
    before, recipe = said(vllm.url, "tiny"), Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.evaluate is not None
    score(ModelFiles.at("merged", "c" * 64, tiny / "base", tiny / "one"), EvalSettings.of(recipe.evaluate, recipe.root))
    crowned(with_tokenizer(tiny / "two", tmp_path / "adapter"), "c", base=tiny / "base")
    with pytest.raises(LewisError, match=r"tiny/1 stays in service: only \d+ of 32 answers"):
        run()
    assert said(vllm.url, "tiny") == before and served()[0].uri == "models:/tiny/1"
