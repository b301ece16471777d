"""Two real vLLM servers on a base with a chat template: behind HAProxy under load, and checked by chats."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import yaml
from transformers import AutoTokenizer

from lewis.errors import LewisError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import score
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.recipe.serve import HaproxyTarget, Rule
from lewis.serving import haproxy
from lewis.serving.records import served
from tests.serve.conftest import EXPORTER, Vllm, flows, load, prometheus, said
from tests.support.lineage import crowned, make_home, with_tokenizer
from tests.support.routed import Place
from tests.support.service import free_port

TEMPLATE = "{% for each in messages %}w1 {{ each.content }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
OTHER = "{% for each in messages %}w9 w8 {{ each.content }} w7 {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
RECIPE = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [{"model": "base+one", "parameters": {"weight": 1.0}}],
    "output": {"kind": "lora", "rank": 8},
    "inspect": {"on": "warn"},
    "evaluate": {"tasks": ["writes.yaml"], "baselines": [], "limit": 16, "apply_chat_template": True},
    "register": {"name": "tiny"},
}


class Pair(NamedTuple):
    """Two servers on `models/base`."""

    models: Path
    servers: dict[str, Vllm]


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    for name in ("base", "one", "two"):
        shutil.copytree(tiny / name, folder / name)
    shutil.copytree(tiny / "base", folder / "other")
    for name, template in (("base", TEMPLATE), ("other", OTHER)):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    with Vllm(folder / "base", folder / "blue.log") as blue, Vllm(folder / "base", folder / "green.log") as green:
        yield Pair(folder, {"blue": blue, "green": green})


@pytest.fixture
def place(pair: Pair, tmp_path: Path) -> Iterator[Place]:
    """HAProxy in front of them, and a Prometheus that scrapes it."""
    metrics = free_port()
    with prometheus(metrics, tmp_path) as url, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        scraping = SimpleNamespace(url=url, answer=None)
        made = Place(pair.servers, scraping, Path(folder), EXPORTER.format(port=metrics), inter="2s")
        made.start()
        yield made
        made.kill()


def test_a_second_release_goes_through_a_canary_and_no_request_is_lost(
    pair: Pair, place: Place, tmp_path: Path, empty_database: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_home(tmp_path / "home", empty_database, monkeypatch)
    fields = place.target.model_dump(include={"kind", "socket", "backend", "servers", "prometheus"})
    known = HaproxyTarget.model_fields["rules"].default
    rules = (known[0], Rule(**{**known[1].model_dump(), "plus": 5}))  # a busy machine is slow now and then
    target = HaproxyTarget(**fields, steps=(50,), minutes=0.25, requests=10, patience_minutes=10, rules=rules)
    serve = target.model_dump(mode="json", exclude_unset=True)
    run = flows(tmp_path, pair.models, yaml.safe_dump({**RECIPE, "serve": serve}), prefect_url, monkeypatch)
    run("one")
    assert run().changed == ["haproxy"]
    of_one = said(place.url, "tiny")
    with load(place.url, clients=2, pause=0.1) as errors:
        run("two")
        began = time.monotonic()
        assert run().changed == ["haproxy"]
        print(f"champion to all traffic, with one step of 15 s: {time.monotonic() - began:.1f} s")
        of_two = said(place.url, "tiny")
        time.sleep(2)
    assert errors == []
    [record] = served()
    assert record.checked.startswith("16 of 16 answers are those of the model that was scored")
    assert of_two == said(pair.servers["blue"].url, record.alias) != of_one
    assert haproxy.weights(target) == {"blue": 100, "green": 0}


def test_an_adapter_that_was_scored_with_another_chat_template_is_refused(
    pair: Pair, tmp_path: Path, empty_database: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_home(tmp_path / "home", empty_database, monkeypatch)
    url = pair.servers["blue"].url
    text = yaml.safe_dump({**RECIPE, "serve": {"kind": "vllm", "url": url}})
    run = flows(tmp_path, pair.models, text, prefect_url, monkeypatch)
    run("one")
    assert run().changed == ["vllm"]
    assert served()[0].checked.startswith("16 of 16 answers are those of the model that was scored")
    recipe, adapter = Recipe.load(tmp_path / "recipe.yaml"), with_tokenizer(pair.models / "two", tmp_path / "adapter")
    assert recipe.evaluate is not None
    settings = EvalSettings.of(recipe.evaluate, recipe.root)
    for digit, scored_on in (("b", "base"), ("c", "other")):  # the same adapter, scored with one template or the other
        score(ModelFiles.at("merged", digit * 64, pair.models / scored_on, pair.models / "two"), settings)
    crowned(adapter, "b", base=pair.models / "base")
    assert run().changed == ["vllm"]
    before = said(url, "tiny")
    crowned(adapter, "c", base=pair.models / "base")
    with pytest.raises(LewisError, match=r"tiny/2 stays in service: only \d+ of 16 answers") as refused:
        run()
    print(str(refused.value)[:300])
    assert said(url, "tiny") == before and served()[0].uri == "models:/tiny/2"
