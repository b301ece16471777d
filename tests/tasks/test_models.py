"""The task that diagnoses the models of a run: its artifact and its result."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect.cache_policies import NO_CACHE

from lewis.errors import InputError
from lewis.progress import silent
from lewis.steps.graph import graph
from lewis_tasks import models as tasks
from lewis_tasks.steps import task_of
from lewis_tasks.support.assets import artifact_prefix
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import edit_json, parse, rewrite


def test_findings_become_an_artifact_and_an_error_stops_the_run(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(tasks, "create_markdown_artifact", lambda text, **named: made.append({"text": text, **named}))
    odd = rewrite(family.math, tmp_path / "odd<img>", lambda name, t: t * (0 if "layers.0.mlp.up" in name else 1))
    models = [{"model": str(odd)}, {"model": str(family.code)}]
    data = {"merge_method": "ties", "base_model": str(family.base), "models": models}
    recipe = parse({**data, "inspect": {"on": "warn"}})
    base, experts = pipeline.fetch(recipe)
    node = graph(recipe)["diagnose"]
    given = node.given(pipeline.known(recipe, base, experts))
    [found] = node.step.make(given, silent, "cpu")
    diagnose = task_of(node)
    ends = [diagnose.fn(given, "diagnose", artifact_prefix(recipe)) for _ in range(2)]
    assert [end.name for end in ends] == [
        "Cached"
    ] * 2 and diagnose.cache_policy is NO_CACHE  # so it shows it each time
    assert (found["kind"], found["model"], found["level"]) == ("zeroed tensor", str(odd), "error")
    artifact, again = made
    assert artifact == again
    assert artifact["key"] == "recipe-inspection" and "do not merge these models" in artifact["description"]
    for part in (
        "* **error: zeroed tensor**",
        "Meaning: its task vector",
        "| model | size |",
        "data:image/png;base64,",
        "| `odd<img>` | ",
        "| `odd<img> and code` | ",
    ):
        assert part in artifact["text"]
    assert "1 error: zeroed tensor" in caplog.text
    strict = graph(parse(data))
    assert "diagnose" in strict["merge experts"].after and "diagnose" not in graph(recipe)["merge experts"].after
    given = strict["diagnose"].given(pipeline.known(recipe, base, experts))
    with pytest.raises(InputError, match=rf"^error: {odd}: zeroed tensor: all elements are 0 in model.layers.0.mlp.up"):
        diagnose.fn(given, "diagnose", artifact_prefix(recipe))
    assert made[-1] == artifact and "diagnose" not in graph(parse({**data, "inspect": {"on": "off"}}))


def test_what_configs_show_is_told_before_the_download(
    family: Family, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = shutil.copytree(family.code, tmp_path / "odd")
    edit_json(odd / "generation_config.json", eos_token_id=5)
    recipe = parse({"merge_method": "ties", "base_model": str(family.base), "models": [{"model": str(odd)}]})
    tasks.preflight.fn(recipe, *pipeline.pin_all(recipe))
    assert f"{odd}: eos: it stops at the token ids [5], the base at [1]" in caplog.text
    twice = shutil.copytree(odd, tmp_path / "twice")
    data = {"merge_method": "ties", "base_model": str(family.base), "models": [{"model": str(e)} for e in (odd, twice)]}
    with pytest.raises(InputError, match=f"^error: {twice}: expert twice: the same files as {odd}"):
        tasks.preflight.fn(parse(data), *pipeline.pin_all(parse(data)))
