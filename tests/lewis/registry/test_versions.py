"""The registry against a real MLflow: sqlite and files, several processes, kill -9, and a server over HTTP."""

import json
import math
import os
import pickle
import pwd
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from mlflow.data import get_source

from lewis import store
from lewis.errors import InputError, LewisError, TransientError
from lewis.evaluation.gate import Incumbent, Standing, Verdict
from lewis.models.files.folder import copy_tokenizer
from lewis.models.hub import repository
from lewis.models.hub.pin import Pinned
from lewis.registry import creation, history, logged_model, promotion, releases, repair, tracking
from lewis.registry import versions as registry
from lewis.registry.pull import pull
from lewis.registry.registration import Registration
from lewis.registry.tracking import RunInput
from lewis.registry.versions import Version
from lewis.store import manifest
from lewis.store.kinds import check_png
from lewis_flows.cli.main import main
from lewis_flows.service import mlflow_app
from tests.support.damage import damage
from tests.support.lineage import make_home
from tests.support.service import free_port
from tests.support.warm import WarmPython

DIGEST, OTHER = "a" * 64, "b" * 64
AT_ONCE = 4  # processes, two for each core of a small machine
PASSED = Verdict(True, ("addition/acc,none must gain at least 0: 0.9000 vs 0.5000: pass",), "base")
FAILED = Verdict(False, ("addition/acc,none must gain at least 0: 0.1000 vs 0.9000: fail",), "base")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers in 2 shards, with a tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder, max_shard_size="40KB")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return make_home(tmp_path / "home", empty_database, monkeypatch)


def merged(tiny_model: Path, digest: str = DIGEST) -> Path:
    folder = store.home() / "merged" / digest
    with store.publish(folder, {"digest": digest}) as scratch:
        shutil.copytree(tiny_model, scratch, dirs_exist_ok=True)
    return folder


@pytest.fixture
def entry(home: Path, tiny_model: Path) -> Registration:
    return Registration(
        name="tiny",
        folder=merged(tiny_model),
        digest=DIGEST,
        params={"merge_method": "ties", "lewis.density.max": 0.8, "models[0].model": "org/math", "long": "x" * 9000},
        metrics={
            "merged/addition/acc,none": 0.9,
            "base/addition/acc,none": 0.5,
            "merged/addition/nan,none": float("nan"),
        },
        lineage={"org/base@main": "1" * 40, "/data/math 100%": "2" * 40},
        recipe="merge_method: ties\n",
        pictures={"density.png": b"\x89PNG"},
        tables={"scores": [{"task": "addition", "base": 0.5, "merged": 0.9}]},
        card="---\nbase_model: [org/base]\n---\n# Tiny\n![x](density.png) ![y](elsewhere.png)\n\n"
        + "| a | b ↑ |\n| --- | --- |\n| 1 | 2 |\n\n"
        + "* a long line\n" * 1000
        + "\n\n## Recipe\n\n```yaml\nmerge_method: ties\n```\n",
        source="tiny.yaml",
        began=time.time() - 120,
        documents=dict.fromkeys(("merged/addition/acc,none", "base/addition/acc,none"), ("addition", "d" * 32)),
        datasets=(
            RunInput("addition", "d" * 32, "evaluation", "hugging_face", {"path": "org/sums", "revision": "3" * 40}),
            RunInput("sums", "c" * 32, "calibration", "files", {"format": "json", "data_files": "data/sums.jsonl"}),
        ),
    )


def scores(digit: str) -> dict[str, float]:
    return {"merged/addition/acc,none": {"a": 0.9, "b": 0.8, "c": 0.7}[digit], "base/addition/acc,none": 0.5}


def champion_over_versions(name: str) -> list[tuple[int, float]]:
    """The chart that people look at."""
    experiment = client().get_experiment_by_name("lewis").experiment_id
    (run,) = client().search_runs([experiment], f"tags.`lewis.champions` = '{name}'")
    drawn = client().get_metric_history(run.info.run_id, "champion/addition/acc")
    return [(each.step, each.value) for each in drawn]


def client():
    import mlflow

    return mlflow.MlflowClient()


def registered(name: str = "tiny") -> Version | None:
    with tracking.client("looking") as client:
        return registry.find(client, name, DIGEST)


def versions(name: str = "tiny") -> list:
    return list(client().search_model_versions(f"name='{name}'"))


def runs() -> list[str]:
    experiment = client().get_experiment_by_name("lewis")
    found = client().search_runs([experiment.experiment_id])
    return sorted(run.info.status for run in found if "lewis.champions" not in run.data.tags)


def artifacts(home: Path) -> Path:
    return home / "mlflow" / "artifacts"


@pytest.mark.parametrize("fence", ["```", "````"])
def test_a_description_shows_the_recipe_as_far_as_there_is_room(fence: str) -> None:
    """It only linked it."""
    link = "\n\nThe recipe: [recipe.yaml](get-artifact?path=recipe.yaml&run_uuid=r)"
    cut = f"\n{fence}\n\n... (cut, all of it is in recipe.yaml){link}"

    def shown(lines: int, card: str = "# Tiny") -> str:
        recipe = "models: [a]\n" * lines
        text = creation.description(f"{card}\n\n## Recipe\n\n{fence}yaml\n{recipe}{fence}\n", (), "r")
        assert len(text) <= creation.MAX_DESCRIPTION and text.endswith(link)
        return text

    head, line = f"# Tiny\n\n## Recipe\n\n{fence}yaml\n", "models: [a]\n"
    assert shown(2) == f"{head}{line}{line}{fence}{link}"
    room = (creation.MAX_DESCRIPTION - len(f"{head}{fence}{link}")) // len(line)
    assert shown(room) == f"{head}{line * room}{fence}{link}"
    longer = shown(room + 1)
    assert longer.startswith(f"{head}{line}") and longer.endswith(f"]{cut}") and longer.count("`") == 2 * len(fence)
    assert len(longer) > creation.MAX_DESCRIPTION - 2 * len(line)
    full = "x" * (creation.MAX_DESCRIPTION - len(link))
    for card in (full, full[:-1], full[:-60]):  # not even a line has room
        assert shown(9, card) == card + link
    assert creation.description("# Tiny", (), "r") == "# Tiny"


def test_a_registered_model_says_what_it_was_made_of(entry: Registration, home: Path) -> None:
    made = creation.register(entry)
    assert made == Version("tiny", "1", made.run_id, "models:/tiny/1", created=True)
    (version,) = versions()
    assert version.tags["lewis.digest"] == DIGEST
    assert version.tags["lewis.source.org--base_main"] == "1" * 40
    assert version.tags["lewis.source.--data--math 100_"] == "2" * 40
    sources = {tag for tag in version.tags if tag.startswith("lewis.source.")}
    assert version.tags.keys() - sources == {"lewis.digest", "lewis.recipe"} and version.tags["lewis.recipe"] == "tiny"
    assert version.description.startswith("# Tiny")  # without the front matter, which MLflow would show as text
    recipe = f"[recipe.yaml](get-artifact?path=recipe.yaml&run_uuid={made.run_id})"
    assert version.description.endswith(f"long line\n\n... (cut, all of it is in card.md)\n\nThe recipe: {recipe}")
    assert "```" not in version.description
    assert "`lewis history tiny`" in client().get_registered_model("tiny").description
    assert 4980 < len(version.description) <= 5000  # MLflow takes no more
    room = "\u2007\u2007\u200b"
    assert f"| a{room} | b\u00a0↑{room} |\n| --- | --- |\n| 1{room} | 2{room} |" in version.description
    run = client().get_run(made.run_id)
    assert run.info.status == "FINISHED" and 120 <= (run.info.end_time - run.info.start_time) / 1000 < 180
    assert run.data.tags["mlflow.source.name"] == "tiny.yaml"
    picture = f"![x](get-artifact?path=density.png&run_uuid={made.run_id})"  # as MLflow's own pages ask for it
    assert f"\n{picture} ![y](elsewhere.png)" in version.description
    assert run.data.metrics["merged/addition/acc"] == 0.9 and run.data.metrics["base/addition/acc"] == 0.5
    assert run.data.params["lewis.density.max"] == "0.8" and run.data.params["models_0_.model"] == "org/math"
    assert run.data.params["long"].endswith("recipe.yaml)") and len(run.data.params["long"]) == 6000
    given = {data.dataset.name: data for data in run.inputs.dataset_inputs}
    assert {(name, data.dataset.digest, data.tags[0].key, data.tags[0].value) for name, data in given.items()} == {
        ("addition", "d" * 32, "mlflow.data.context", "evaluation"),
        ("sums", "c" * 32, "mlflow.data.context", "calibration"),
    }
    source = get_source(given["addition"].dataset)  # as MLflow's own reader sees it
    assert (source.path, source.revision) == ("org/sums", "3" * 40)
    assert json.loads(given["sums"].dataset.source) == {"format": "json", "data_files": "data/sums.jsonl"}
    measured = client().get_logged_model(version.source.removeprefix("models:/")).metrics
    assert {m.key: (m.value, m.dataset_name, m.dataset_digest) for m in measured if m.value} == {  # NaN is kept as 0
        "merged/addition/acc": (0.9, "addition", "d" * 32),
        "base/addition/acc": (0.5, "addition", "d" * 32),
    }
    files = Path(run.info.artifact_uri.removeprefix("file://"))
    assert json.loads((files / "lineage.json").read_text()) == entry.lineage
    assert (files / "recipe.yaml").read_text() == entry.recipe and (files / "card.md").read_text() == entry.card
    assert (files / "density.png").read_bytes() == b"\x89PNG"
    assert json.loads((files / "scores.json").read_text()) == {
        "columns": ["task", "base", "merged"],
        "data": [["addition", 0.5, 0.9]],
    }
    description = next(artifacts(home).glob("models/*/artifacts/MLmodel")).read_text()
    assert "source_model_name: tiny\n" in description and "/lewis-" not in description  # no scratch folder


def test_the_champion_loads_and_outlives_the_store_without_a_second_copy(entry: Registration, home: Path) -> None:
    import mlflow
    import torch
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(entry.folder)
    version = creation.register(entry)
    for weights in entry.folder.glob("*.safetensors"):
        assert weights.stat().st_nlink == 2
    promotion.promote(version, PASSED)
    shutil.rmtree(home / "merged")
    pipeline = mlflow.transformers.load_model("models:/tiny@champion")
    assert type(pipeline).__name__ == "TextGenerationPipeline"
    for name, tensor in expected.state_dict().items():
        assert torch.equal(pipeline.model.state_dict()[name], tensor)
    chat = mlflow.pyfunc.load_model("models:/tiny@champion")
    answer = chat.predict({"messages": [{"role": "user", "content": "one two"}], "max_tokens": 2})
    assert answer[0]["choices"][0]["message"]["role"] == "assistant"
    current = registry.champion("tiny")
    assert current is not None and current.folder is not None and current.digest == DIGEST
    assert store.read_manifest(current.folder) is not None
    assert current.metrics["addition/acc,none"] == 0.9
    assert creation.register(replace(entry, folder=current.folder)) == replace(version, created=False)


def test_an_adapter_on_a_commit_of_the_hub_refers_to_it(
    entry: Registration, tiny_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "revision": "1" * 40}
    folder = store.home() / "merged" / OTHER
    with store.publish(folder, {"digest": OTHER}) as scratch:
        (scratch / "adapter_config.json").write_text(json.dumps(settings))
        (scratch / "adapter_model.safetensors").write_bytes(b"factors")
        copy_tokenizer(tiny_model, scratch)
    promotion.promote(creation.register(replace(entry, digest=OTHER, folder=folder, base=tiny_model)), PASSED)
    (description,) = artifacts(home).glob("models/*/artifacts/MLmodel")
    flavor = yaml.safe_load(description.read_text())["flavors"]["transformers"]
    wanted = {"source_model_name": "org/base", "source_model_revision": "1" * 40, "peft_adaptor": "model"}
    wanted |= {"tokenizer_name": "org/base", "tokenizer_revision": "1" * 40, "pipeline_model_type": "LlamaForCausalLM"}
    assert flavor.items() >= wanted.items() and "model_binary" not in flavor
    assert "peft==" in (description.parent / "requirements.txt").read_text()
    current = registry.champion("tiny")
    assert current and current.files("champion") is None  # before its base is found
    asked: list[str] = []

    def resolve(ref: str, root: Path) -> Pinned:
        asked.append(ref)
        return Pinned(ref, "org/base", "1" * 40, 0)

    monkeypatch.setattr(repository, "resolve", resolve)
    monkeypatch.setattr(repository, "fetch", lambda pinned: tiny_model)
    files = registry.fetch(current).files("champion")
    assert files and (files.folder, files.adapter, files.key) == (tiny_model, current.folder, OTHER)
    assert asked == [f"org/base@{'1' * 40}"]


def test_a_version_is_pulled_into_a_folder(entry: Registration, home: Path, tmp_path: Path) -> None:
    (entry.folder / "README.md").write_text("# The card")
    promotion.promote(creation.register(entry), PASSED)
    creation.register(replace(entry, digest=OTHER, folder=merged(entry.folder, OTHER)))
    shutil.rmtree(home / "merged")
    for what in ("tiny", "tiny@champion", "tiny/1", "models:/tiny/1"):  # each replaces the one before
        found = pull(what, tmp_path / "out")
        assert (found.uri, found.digest) == ("models:/tiny/1", DIGEST)
    manifest = store.read_manifest(tmp_path / "out")
    assert manifest is not None and manifest["digest"] == DIGEST
    assert (tmp_path / "out" / "README.md").read_text() == "# The card"  # with licences and lineage; it was left out
    there = {path.name: path for path in (tmp_path / "out").iterdir() if path.name not in (store.MANIFEST, *store.CARD)}
    assert set(there) == set(manifest["files"]) and found.size == sum(path.stat().st_size for path in there.values())
    for path in (artifacts(home) / "models").rglob("model/*.safetensors"):
        if path.stat().st_ino == there[path.name].stat().st_ino:
            break
    else:
        pytest.fail("the weights were copied")
    assert there["config.json"].stat().st_nlink == 1


def test_what_cannot_be_pulled_is_named(entry: Registration, tmp_path: Path) -> None:
    promotion.promote(creation.register(entry), PASSED)
    for what, told in (
        ("tynt", "got 'tynt'; expected one of tiny"),
        ("tiny/7", "its versions are 1, its aliases champion"),
        ("tiny@previous", "its versions are 1, its aliases champion"),
        ("tiny/", "expected NAME, NAME@ALIAS or NAME/VERSION"),
        ("tiny@", "expected NAME, NAME@ALIAS or NAME/VERSION"),
        ("a/b/1", "expected NAME, NAME@ALIAS or NAME/VERSION"),
    ):
        with pytest.raises(InputError, match=re.escape(told)):
            pull(what, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    client().delete_model_version("tiny", "1")
    with pytest.raises(InputError, match=r"tiny has no version; a run of its recipe makes one"):
        pull("tiny", tmp_path / "out")  # "expected a registered model, got 'tiny'; did you mean 'tiny'?"


@pytest.mark.parametrize("file", ["config.json", "model-*.safetensors"])
def test_a_damaged_version_is_not_pulled(file: str, entry: Registration, home: Path, tmp_path: Path) -> None:
    promotion.promote(creation.register(entry), PASSED)
    damage(next(artifacts(home).rglob(f"model/{file}")), "flipped")
    with pytest.raises(LewisError, match=r"models:/tiny/1 is damaged: model/.*: expected SHA-256"):
        pull("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("remembers_small_files")
def test_a_file_that_the_disk_changed_without_a_stamp_is_not_pulled(
    entry: Registration, home: Path, tmp_path: Path
) -> None:
    """It got a manifest with the checksum of what it had become."""
    promotion.promote(creation.register(entry), PASSED)
    path = next(artifacts(home).rglob("model/model-*.safetensors"))
    right = store.file_sha256(path)
    damage(path, "flipped")
    time.sleep(0.2)
    manifest.remembered_sha256(path, again=True)
    known = manifest.place_of(str(path.resolve()))
    store.write_entry(known, {**(store.read_entry(known) or {}), "sha256": right})
    with pytest.raises(LewisError, match=r"models:/tiny/1 is damaged: model-.*: expected SHA-256"):
        pull("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_files_cannot_be_linked_they_are_copied(entry: Registration, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    version = creation.register(entry)
    assert registered() == replace(version, created=False)
    assert all(weights.stat().st_nlink == 1 for weights in entry.folder.glob("*.safetensors"))


def test_a_digest_is_registered_once_and_another_one_is_another_version(entry: Registration, tiny_model: Path) -> None:
    assert registered() is None
    first = creation.register(entry)
    assert creation.register(entry) == replace(first, created=False) == registered()
    second = creation.register(replace(entry, digest=OTHER, folder=merged(tiny_model, OTHER)))
    assert (second.version, second.created) == ("2", True)
    assert creation.register(entry).version == "1"
    assert len(versions()) == 2 and runs() == ["FINISHED", "FINISHED"]


def test_a_team_has_an_experiment_of_its_own(entry: Registration) -> None:
    plain = creation.register(entry)
    new = replace(entry, name="ops.tiny", team="ops")
    version = creation.register(new)
    assert creation.register(new) == replace(version, created=False)
    promotion.promote(version, Verdict(True, (), "base"))  # the chart of champions is there too
    client_ = client()
    own = client_.get_experiment_by_name("lewis/ops").experiment_id
    of_team = {run.info.run_id for run in client_.search_runs([own])}
    assert version.run_id in of_team and len(of_team) == 2 and plain.run_id not in of_team
    assert client_.get_registered_model("ops.tiny").tags["lewis.team"] == "ops"
    assert client_.get_model_version("ops.tiny", "1").tags["lewis.team"] == "ops"


def test_versions_that_another_team_registered_have_their_scores(entry: Registration, tiny_model: Path) -> None:
    for digit, team in ("a", ""), ("b", "ops"):
        own = {"digest": digit * 64, "folder": merged(tiny_model, digit * 64), "metrics": scores(digit)}
        version = creation.register(replace(entry, name="ops.tiny", team=team, **own))
        promotion.promote(version, replace(FAILED, metric="addition/acc,none"))
    assert history.scores("ops.tiny") == {1: 0.9, 2: 0.8}


def test_a_score_that_is_not_finite_is_not_drawn(entry: Registration, tiny_model: Path) -> None:
    """The status of a recipe with such a version ended in a traceback, and the page of all recipes stayed as it was."""
    for digit, value in (("a", 0.9), ("b", math.nan), ("c", math.inf)):
        folder, metrics = merged(tiny_model, digit * 64), {"merged/addition/acc,none": value}
        version = creation.register(replace(entry, digest=digit * 64, folder=folder, metrics=metrics))
        promotion.promote(version, replace(FAILED, metric="addition/acc,none"))
    assert history.scores("tiny") == {1: 0.9}


@pytest.mark.parametrize("damage", ["cut", pytest.param("missing", marks=pytest.mark.long), "all"])
def test_a_version_that_lost_its_files_is_registered_anew(entry: Registration, home: Path, damage: str) -> None:
    creation.register(entry)
    (model,) = artifacts(home).glob("models/*")
    weights = next((model / "artifacts" / "model").glob("*.safetensors"))
    if damage == "all":
        shutil.rmtree(model)
    else:
        content = weights.read_bytes()
        weights.unlink()
        if damage == "cut":
            weights.write_bytes(content[:-1])
    assert registered() is None
    again = creation.register(entry)
    assert (again.version, again.created) == ("2", True)
    assert {str(v.version): v.tags.get("lewis.digest") for v in versions()} == {"1": None, "2": DIGEST}
    assert creation.register(entry) == replace(again, created=False)


def test_a_version_whose_logged_model_was_deleted_by_hand_is_registered_anew(entry: Registration) -> None:
    promotion.promote(creation.register(entry), PASSED)
    client().delete_logged_model(versions()[0].source.removeprefix("models:/"))
    assert registered() is None
    current = registry.champion("tiny")
    assert current is not None and current.folder is None
    assert creation.register(entry).version == "2"


def test_a_dataset_that_another_run_adds_meanwhile_is_shared(entry: Registration, home: Path) -> None:
    """Of two recipes that were registered at once one failed: `UNIQUE constraint failed: datasets...`."""
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    others = []

    def add(session: Any, *_: object) -> None:
        """Add the first of the new datasets, as another process would, which looked for it before, too."""
        new = [each for each in session.new if type(each).__name__ == "SqlDataset"]
        for each in new[:1]:
            values = {column.name: getattr(each, column.name) for column in each.__table__.columns}
            values["dataset_uuid"] = str(len(others))
            columns, places = ", ".join(values), ", ".join(f":{name}" for name in values)
            with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database, database:
                database.execute(f"INSERT INTO datasets ({columns}) VALUES ({places})", values)
            others.append(each.name)

    event.listen(Session, "before_flush", add)
    try:
        version = creation.register(entry)
    finally:
        event.remove(Session, "before_flush", add)
    assert sorted(others) == ["addition", "sums"]
    inputs = client().get_run(version.run_id).inputs.dataset_inputs
    assert {(each.dataset.name, each.dataset.digest) for each in inputs} == {("addition", "d" * 32), ("sums", "c" * 32)}


def test_threads_get_one_version(entry: Registration) -> None:
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(creation.register, [entry] * 4))
    assert {v.version for v in made} == {"1"} and sum(v.created for v in made) == 1


CHILD = """
import json, pickle, sys, time
from dataclasses import astuple
from pathlib import Path
from mlflow import MlflowClient
from lewis.registry import creation, logged_model, promotion

def stop(*_, **__):
    print("stopped", flush=True)
    time.sleep(600)

entry, verdict, stop_at = pickle.loads(Path(sys.argv[1]).read_bytes())
if stop_at:
    setattr(logged_model if stop_at == "link" else MlflowClient, stop_at, stop)
version = creation.register(entry)
promotion.promote(version, verdict)
print(json.dumps(astuple(version)))
"""


def register_in(warm: WarmPython, home: Path, entry: Registration, stop_at: str = "") -> subprocess.Popen[str]:
    """Register and promote in a process of its own. At `stop_at` it says so, and stays there until killed."""
    given = home.with_name(f"{home.name}-given.pickle")
    given.write_bytes(pickle.dumps((entry, PASSED, stop_at)))
    return warm.run(CHILD, [str(given)], folder=home.parent, environment=os.environ)


def race(warm: WarmPython, home: Path, entry: Registration, at_once: int) -> Version:
    """Let processes register and promote at once; there must be one version, which is the champion."""
    children = [register_in(warm, home, entry) for _ in range(at_once)]
    said = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0] * at_once, said
    answers = [Version(*json.loads(out)) for out, _ in said]
    assert {version.version for version in answers} == {"1"} and sum(version.created for version in answers) == 1
    registry.configure()
    assert len(versions()) == 1 and runs() == ["FINISHED"]
    assert aliases() == {"champion": "1"} and len(history.history("tiny")) == 1
    return next(version for version in answers if version.created)


@pytest.mark.long
def test_processes_at_once_on_a_fresh_database_get_one_version(
    entry: Registration, home: Path, warm: WarmPython
) -> None:
    (home / "mlflow" / "mlflow.db").unlink()
    race(warm, home, entry, AT_ONCE)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("link", marks=pytest.mark.long),
        pytest.param("log_batch", marks=pytest.mark.long),
        "create_model_version",
        pytest.param("set_terminated", marks=pytest.mark.long),
    ],
)
def test_kill_9_then_again_ends_with_one_version(entry: Registration, home: Path, warm: WarmPython, where: str) -> None:
    child = register_in(warm, home, entry, where)
    assert child.stdout and child.stdout.readline() == "stopped\n"
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    registry.configure()
    assert runs() == ["RUNNING"]
    survived = where == "set_terminated"  # the only step after the version exists
    assert (registered() is not None) == survived == (len(versions()) == 1)

    again = creation.register(entry)
    assert (again.version, again.created) == ("1", not survived)
    assert len(versions()) == 1
    assert runs() == (["FINISHED"] if survived else ["FAILED", "FINISHED"])
    assert len(list(artifacts(home).glob("models/*/artifacts"))) == 1
    experiment = client().get_experiment_by_name("lewis").experiment_id
    assert [model.status.value for model in client().search_logged_models([experiment])] == ["READY"]


@pytest.mark.long
def test_a_process_killed_while_it_makes_the_database_leaves_none(home: Path, warm: WarmPython) -> None:
    (home / "mlflow" / "mlflow.db").unlink()
    dies = (
        "import os, mlflow.store.db.utils as m; m._upgrade_db = lambda engine: os.kill(os.getpid(), 9)\n"
        "from lewis.registry import versions; versions.configure()"
    )
    assert warm.exit_code(dies) == -signal.SIGKILL
    assert registry.champion("tiny") is None
    assert [path.name for path in (home / "mlflow").iterdir() if path.is_file()] == ["mlflow.db"]


def test_a_failure_half_way_leaves_a_failed_run_and_no_version(entry: Registration, home: Path) -> None:
    broken = replace(entry, pictures={"no such folder/density.png": b""})
    with pytest.raises(LewisError, match=r"registering tiny: .*No such file"):
        creation.register(broken)
    assert runs() == ["FAILED"] and versions() == []
    assert creation.register(entry).created
    assert runs() == ["FAILED", "FINISHED"] and len(list(artifacts(home).glob("models/*/artifacts"))) == 1


def test_a_damaged_checkpoint_is_refused(entry: Registration) -> None:
    next(entry.folder.glob("*.safetensors")).unlink()
    with pytest.raises(LewisError, match="expected a whole merged checkpoint"):
        creation.register(entry)


@pytest.mark.parametrize(("name", "digest"), [("tiny", "abc"), ("tiny", "A" * 64), ("..", DIGEST), (" ", DIGEST)])
def test_malformed_names_and_digests_are_refused(entry: Registration, name: str, digest: str) -> None:
    with pytest.raises(InputError, match="expected"):
        creation.register(replace(entry, name=name, digest=digest))


def test_names_that_mlflow_refuses_are_cleaned(entry: Registration) -> None:
    made = creation.register(replace(entry, name="org/smol-1.7b:it's"))
    assert made.uri == "models:/org_smol-1.7b_it_s/1"
    assert registered("org_smol-1.7b_it_s") == replace(made, created=False)


@pytest.mark.parametrize(
    "label",
    [
        "./merged",
        "../math/final",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("../../final", "/merged", "math//final")),
    ],
)
def test_scores_of_a_folder_have_names_of_their_own(label: str, entry: Registration) -> None:
    """MLflow refused `../math/final/gsm8k/acc`, and the scores of the folder `./merged` were taken for the merge's."""
    new = replace(entry, metrics={f"{label}/addition/acc,none": 0.95, "merged/addition/acc,none": 0.9})
    version = creation.register(replace(new, params={f"mean_density/{label}": "0.5"}))
    run = client().get_run(version.run_id).data
    assert run.metrics.pop("merged/addition/acc") == 0.9 and list(run.metrics.values()) == [0.95]
    assert list(run.params.values()) == ["0.5"]


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("gsm8k/exact_match,strict-match", "gsm8k/exact_match/strict-match"),
        ("merged/arc/acc,none", "merged/arc/acc"),
        ("org/math@v1/arc/acc,none", "org/math_v1/arc/acc"),
        ("mean_density/experts/.math", "mean_density/experts/.math"),
    ],
)
def test_ordinary_names_are_stored_as_they_are(name: str, stored: str) -> None:
    assert tracking.key(name) == stored


def test_the_gate_moves_the_aliases(entry: Registration, tiny_model: Path) -> None:
    assert registry.champion("tiny") is None
    first = creation.register(entry)
    assert registry.champion("tiny") is None
    promotion.promote(first, PASSED)
    second, third = (creation.register(replace(entry, digest=d * 64, folder=merged(tiny_model, d * 64))) for d in "bc")
    promotion.promote(second, FAILED)
    assert aliases() == {"champion": "1", "challenger": "2"}
    promotion.promote(third, replace(PASSED, compared_with=first.uri))
    assert aliases() == {"champion": "3", "previous": "1", "challenger": "2"}
    promotion.promote(third, FAILED)  # the champion does not become its own challenger
    assert aliases() == {"champion": "3", "previous": "1", "challenger": "2"}
    tags = {str(v.version): v.tags for v in versions()}
    assert [tags[v]["lewis.verdict"] for v in "123"] == ["passed", "failed", "passed"]
    told = [
        json.loads(Path(client().download_artifacts(v.run_id, "verdict.json")).read_text()) for v in (second, third)
    ]
    assert told[0]["reasons"] == list(FAILED.reasons) and told[1]["compared with"] == "models:/tiny/1"


def test_a_champion_that_moved_after_the_comparison_is_not_replaced(entry: Registration, tiny_model: Path) -> None:
    first, second, third = (
        creation.register(replace(entry, digest=d * 64, folder=merged(tiny_model, d * 64))) for d in "abc"
    )
    promotion.promote(first, PASSED)
    promotion.promote(second, replace(PASSED, compared_with=first.uri))
    with pytest.raises(LewisError, match="compared with models:/tiny/1, but the champion is models:/tiny/2 by now"):
        promotion.promote(third, replace(PASSED, compared_with=first.uri))
    with pytest.raises(LewisError, match="compared with base, but the champion is models:/tiny/2 by now"):
        promotion.promote(third, PASSED)
    assert aliases() == {"champion": "2", "previous": "1"}


def test_the_history_tells_who_replaced_whom_and_why(entry: Registration, tiny_model: Path) -> None:
    first, second, third = (
        creation.register(replace(entry, digest=d * 64, folder=merged(tiny_model, d * 64), metrics=scores(d)))
        for d in "abc"
    )
    promotion.promote(first, replace(PASSED, metric="addition/acc,none", luck=0.01), by="the run x")
    assert promotion.promote(second, FAILED).new
    assert not promotion.promote(second, FAILED).new  # the next night's run
    assert promotion.promote(second, replace(FAILED, reasons=("another rule: fail",))).new
    promotion.promote(third, replace(PASSED, compared_with=first.uri))
    assert promotion.promote_by_hand("tiny", "2", "the customer wants it") == third.uri
    assert aliases() == {"champion": "2", "previous": "3", "challenger": "2"}
    assert promotion.rollback("tiny", "it was rude") == third.uri
    assert aliases() == {"champion": "3", "previous": "2", "challenger": "2"}
    told = history.history("tiny")
    assert [(each.what, each.version[-1], (each.champion or "-")[-1]) for each in told] == [
        ("promoted", "1", "-"),
        ("rejected", "2", "1"),
        ("rejected", "2", "1"),
        ("promoted", "3", "1"),
        ("promoted by hand", "2", "3"),
        ("rolled back", "3", "2"),
    ]
    reasons = [FAILED.reasons[0], "another rule: fail", "the customer wants it"]
    assert [told[place].why for place in (1, 2, 4)] == reasons
    newest, *_, oldest = history.lines(told)
    assert re.fullmatch(r"\S+ \S+  rolled back +v3 +in place of v2 +it was rude \(.*\)", newest)
    assert re.search(r"  promoted +v1 +the first +\(the run x\)$", oldest)  # whose rules all passed
    assert re.search(r" the first +addition/acc.*: pass \(the run x\)$", history.lines(told, verbose=True)[-1])
    assert "v1 stays" in history.lines(told)[3] and ": fail (" in history.lines(told)[3]
    assert all("\n" not in line for line in history.lines(told))
    by_hand = replace(told[0], what="rolled back", why="rude; its own tests: pass")
    assert "rude; its own tests: pass (" in history.lines([by_hand])[0], "a person's reason is no list of rules"
    assert champion_over_versions("tiny") == [(1, 0.9), (2, 0.9), (2, 0.9), (3, 0.7), (3, 0.8), (3, 0.7)]
    check_png(history.picture("tiny"))
    assert promotion.withdrawn("tiny", "b" * 64) == "it was rude" and promotion.withdrawn("tiny", "c" * 64) is None
    with pytest.raises(InputError, match=r"models:/tiny/2, .* was rolled back itself \(it was rude\)"):
        promotion.rollback("tiny", "once too often")
    assert aliases()["champion"] == "3" and history.history("tiny") == told
    promotion.promote_by_hand("tiny", "2", "it is polite now")
    assert promotion.withdrawn("tiny", "b" * 64) is None


def test_a_task_that_is_scored_later_is_added_to_the_version(entry: Registration, tiny_model: Path) -> None:
    """Unless the tasks before were scored on other documents, which would then look like those."""

    def scored(*tasks: str, documents: str = "d" * 32) -> Registration:
        names = [f"merged/{task}/acc,none" for task in tasks]
        of = {name: (task, documents) for name, task in zip(names, tasks, strict=True)}
        data = [RunInput(task, documents, "evaluation", "lm-eval", {}) for task in tasks]
        return replace(
            entry,
            digest="a" * 64,
            folder=merged(tiny_model, "a" * 64),
            metrics=dict.fromkeys(names, 0.5 if documents[0] == "d" else 0.6),
            documents=of,
            datasets=data,
        )

    def found() -> tuple[dict[str, float], set[str]]:
        run = client.get_run(version.run_id)
        return run.data.metrics, {each.dataset.name for each in run.inputs.dataset_inputs}

    with tracking.client("reading") as client:
        version = creation.register(scored("addition"))
        creation.register(scored("addition", "sums", documents="e" * 32))
        assert found() == ({"merged/addition/acc": 0.5}, {"addition"})
        again = creation.register(scored("addition", "sums"))
        assert (again.uri, again.created) == (version.uri, False)
        both = {"merged/addition/acc": 0.5, "merged/sums/acc": 0.5}
        assert found() == (both, {"addition", "sums"})
        creation.register(scored("sums"))  # what is no longer scored stays
        assert found() == (both, {"addition", "sums"})


@pytest.mark.parametrize("in_part", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "requests",
    [("log_artifacts",), pytest.param(("log_", "set_", "update_", "delete_", "get_"), marks=pytest.mark.long)],
)
def test_scores_that_a_failure_kept_from_being_completed_are_completed_by_the_next_run(
    requests: tuple[str, ...], in_part: bool, entry: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores of a further task were there, so the card and the pictures without them stayed."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR

    def scored(name: str, *tasks: str, **changes: Any) -> Registration:
        names = [f"merged/{task}/acc,none" for task in tasks]
        return replace(
            entry,
            name=name,
            metrics=dict.fromkeys(names, 0.5),
            documents={each: (task, "d" * 32) for each, task in zip(names, tasks, strict=True)},
            datasets=[RunInput(task, "d" * 32, "evaluation", "lm-eval", {}) for task in tasks],
            card=f"# Scored on {tasks}",
            tables={"scores": [{"task": task} for task in tasks]},
            **changes,
        )

    def completed(name: str, where: int) -> tuple[bool, list[object]]:
        """Whether the completion came to a request of this number, which failed; and what the next run left."""
        first = scored(name, "addition", tags={tracking.PART: "32 of 128"} if in_part else {})
        version, both, count = creation.register(first), scored(name, "addition", "sums"), 0
        with tracking.client("the luck") as client:
            client.set_model_version_tag(name, version.version, history.LUCK, "0.02")

        def failing(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*given: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == where:
                    raise MlflowException("it fails", INTERNAL_ERROR)
                return call(*given, **named)

            return wrapper

        with monkeypatch.context() as patch:
            for each in [each for each in vars(MlflowClient) if each.startswith(requests)]:
                patch.setattr(MlflowClient, each, failing(getattr(MlflowClient, each)))
            try:
                creation.register(both)
            except LewisError as error:
                assert "it fails" in str(error)
        assert not creation.register(both).created
        with tracking.client("reading") as client:
            found, run = client.get_model_version(name, version.version), client.get_run(version.run_id)
            model = registry.check_model(client, found)
            kept = {key: value for key, value in found.tags.items() if not key.startswith("lewis.digest")}
            files = [tracking.file_of(client, version.run_id, file) for file in ("card.md", "scores.json")]
            inputs = sorted(each.dataset.name for each in run.inputs.dataset_inputs)
            metrics = logged_model.facts(client, model)["metrics"]
            tracking.check_files(client, version.run_id)
        return count >= where, [found.description, kept, *files, inputs, run.data.metrics, metrics]

    failed, expected = completed("undisturbed", 10**9)
    assert not failed and "sums" in str(expected[0]) and history.LUCK in str(expected[1])
    where = 1
    while failed or where == 1:
        failed, found = completed(f"tiny-{where}", where)
        assert found == expected, f"request {where}"
        where += 1
    assert where > len(requests) + 1


def test_the_luck_of_an_early_verdict_is_less_once_all_documents_are_scored(
    entry: Registration, tiny_model: Path
) -> None:
    new = replace(entry, digest="a" * 64, folder=merged(tiny_model, "a" * 64))
    data = [replace(each, part="32 of 128") for each in entry.datasets]
    version = creation.register(replace(new, datasets=data, tags={**entry.tags, tracking.PART: "32 of 128"}))
    promotion.promote(version, replace(PASSED, metric="addition/acc,none", luck=0.02))
    creation.register(new)
    assert tags_of("1")[history.LUCK] == "0.01" and tracking.PART not in tags_of("1")


def test_a_version_whose_run_was_deleted_for_good_is_judged_and_registered_again(
    entry: Registration, tiny_model: Path
) -> None:
    """Each further run of its recipe failed."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = replace(entry, digest="a" * 64, folder=merged(tiny_model, "a" * 64))
    version = creation.register(replace(new, tags={**entry.tags, tracking.PART: "32 of 128"}))
    assert registry.run_pages(version) is not None
    client().delete_run(version.run_id)
    SqlAlchemyStore(tracking.database(), "unused")._hard_delete_run(version.run_id)  # as `mlflow gc`
    assert creation.register(new).version == "1" and registry.run_pages(version) is None
    assert not promotion.promote(version, FAILED).moved
    assert promotion.promote(version, PASSED).moved


@pytest.mark.parametrize(("part", "luck"), [("32 of 128", "0.01"), ("", "0.02")])
def test_the_luck_is_scaled_by_the_documents_of_the_gates_own_task(
    part: str, luck: str, entry: Registration, tiny_model: Path
) -> None:
    """It was scaled by the documents of the largest task."""
    data = [replace(entry.datasets[0], part=part), RunInput("long", "e" * 32, "evaluation", "lm-eval", {}, "32 of 800")]
    new = replace(entry, digest="a" * 64, folder=merged(tiny_model, "a" * 64), datasets=data)
    version = creation.register(replace(new, tags={**entry.tags, tracking.PART: "32 of 800"}))
    promotion.promote(version, replace(PASSED, metric="addition/acc,none", luck=0.02))
    creation.register(replace(new, datasets=[replace(each, digest="f" * 32, part="") for each in data]))
    assert tags_of("1")[history.LUCK] == luck and tracking.PART not in tags_of("1")


def test_the_plot_has_the_versions_of_the_documents_that_the_champion_was_scored_on(
    entry: Registration, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest ones' evaluations ended early; their luck is larger."""
    for digit, documents in (("a", "x"), ("b", "y"), ("c", "y")):
        data = [RunInput("addition", documents * 32, "evaluation", "lm-eval", {"lm_eval_task": "addition"})]
        new = replace(
            entry, digest=digit * 64, folder=merged(tiny_model, digit * 64), metrics=scores(digit), datasets=data
        )
        version = creation.register(new)
        first = replace(PASSED, metric="addition/acc,none", luck=0.01)
        promotion.promote(version, first if digit == "a" else replace(FAILED, luck=0.03))
    check_png(history.picture("tiny"))
    monkeypatch.setattr(history, "by_luck", lambda _, error: error)
    monkeypatch.setattr(history, "champion_steps", lambda drawn, *more: (drawn, *more[1:]))
    drawn, luck, without = history.picture("tiny")
    assert luck == 0.01
    assert [each[3] is None for each in drawn] == [False, True, True] and without == [2, 3]


ENTRY = '{"time": "2027", "what": "promoted", "version": %s, "champion": %s, "why": "x", "by": "y"}'


@pytest.mark.parametrize(
    "text", ["a note", "[]", '{"newer": 1}', ENTRY % ("null", "null"), ENTRY % ('"models:/tiny/1"', "1")]
)
def test_a_tag_that_is_no_entry_of_the_history_is_named(entry: Registration, text: str) -> None:
    """It was a traceback, of `lewis status` for all recipes too."""
    creation.register(entry)
    client().set_registered_model_tag("tiny", f"{history.TAG}x", text)
    for read in (history.history, releases.merged):
        with pytest.raises(
            LewisError, match=r"tiny: its tag mlflow.lewis.history.x in MLflow is no record .*remove it"
        ):
            read("tiny")


def test_a_user_without_a_name_is_noted_by_number(entry: Registration, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as any number: promotions and repairs ended with KeyError."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    version = creation.register(entry)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    promotion.promote(version, PASSED)
    assert history.history("tiny")[-1].by == f"user {os.getuid()}"


def test_a_verdict_of_many_rules_fits_into_a_tag(entry: Registration, home: Path) -> None:
    """PostgreSQL refused the history of a merge with fifty tasks, which could be neither promoted nor rejected."""
    task = "mmlu_task_{}/acc,none must not be worse by 0.02: gain +0.0123, from -0.0123, p 0.0312: {}"
    rules = tuple(task.format(number, "fail" if number == 59 else "pass") for number in range(60))
    version = creation.register(entry)
    for _ in range(2):
        promotion.promote(version, replace(FAILED, reasons=rules))
    (record,) = history.history("tiny")
    assert record.why.startswith(rules[59]) and record.why.endswith("all of it is in verdict.json)")
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database:
        (most,) = database.execute("select max(length(value)) from registered_model_tags").fetchone()
        (table,) = database.execute("select sql from sqlite_master where name = 'registered_model_tags'").fetchone()
    assert 4000 < most <= 5000 and "value VARCHAR(5000)" in table


def test_a_history_without_scores_is_not_plotted(entry: Registration) -> None:
    promotion.promote(creation.register(replace(entry, metrics={})), replace(PASSED, metric="addition/acc,none"))
    with pytest.raises(InputError, match="tiny: no version of it has a score"):
        history.picture("tiny")


def tags_of(version: str) -> dict[str, str]:
    return dict(client().get_model_version("tiny", version).tags)


def weights_of(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_flipped_bit_in_store_and_registry_is_repaired(
    entry: Registration, tiny_model: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = creation.register(replace(entry, digest=OTHER, folder=merged(tiny_model, OTHER)))
    promotion.promote(other, PASSED)
    promotion.promote(creation.register(entry), replace(PASSED, compared_with=other.uri))
    damage(weights_of(entry.folder), "flipped")  # a hard link: MLflow's file is the same
    current = registry.champion("tiny")
    assert registered() is None
    assert current is not None and current.folder is None and current.digest == DIGEST
    assert f"models:/tiny/2 is damaged and not used: model/{weights_of(entry.folder).name}" in caplog.text
    with pytest.raises(LewisError, match=r"expected a whole merged checkpoint: model-.*: expected SHA-256"):
        creation.register(entry)
    merged(tiny_model)  # as the merge makes it again
    again = creation.register(entry)
    assert (again.version, again.created) == ("3", True) and aliases() == {"champion": "3", "previous": "1"}
    assert tags_of("2")["lewis.damaged"] == DIGEST and "lewis.digest" not in tags_of("2")
    assert tags_of("3")["lewis.verdict"] == "passed" and "lewis.damaged" not in tags_of("3")
    newest = history.history("tiny")[-1]
    assert (newest.what, newest.version, newest.champion) == ("repaired", again.uri, "models:/tiny/2")
    assert not promotion.promote(again, replace(PASSED, compared_with="models:/tiny/2")).moved
    assert creation.register(entry) == replace(again, created=False)


@pytest.mark.parametrize(
    "file",
    [
        "model/config.json",
        pytest.param("version.json", marks=pytest.mark.long),
        pytest.param("components/tokenizer/tokenizer.json", marks=pytest.mark.long),
        "MLmodel",
    ],
)
def test_each_file_of_a_version_is_checked(entry: Registration, home: Path, file: str) -> None:
    promotion.promote(creation.register(entry), PASSED)
    (artifact,) = artifacts(home).glob("models/*/artifacts")
    damage(artifact / file, "flipped")
    assert registered() is None
    assert creation.register(entry).version == "2" and aliases() == {"champion": "2"}


@pytest.mark.parametrize("how", ["flipped", pytest.param("gone", marks=pytest.mark.long)])
def test_verify_reads_the_files_of_a_run(entry: Registration, home: Path, how: str) -> None:
    version = creation.register(entry)
    promotion.promote(version, PASSED)
    assert repair.verify().damaged == []
    for file in ("scores.json", "verdict.json", "recipe.yaml", "density.png"):
        path = next(artifacts(home).glob(f"{version.run_id}/artifacts/{file}"))
        whole = path.read_bytes()
        damage(path, "flipped") if how == "flipped" else path.unlink()
        (found,) = repair.verify().damaged
        assert (found.kind, found.entry) == ("run", f"runs:/{version.run_id}") and found.why.startswith(file)
        assert registered() is not None  # the model is whole
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
    assert repair.verify().damaged == []


def test_verify_says_of_which_runs_it_has_no_checksums(
    entry: Registration, tiny_model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that were made before checksums were noted counted as whole, whatever was in their files."""
    first = creation.register(entry)
    with tracking.client("x") as client:
        client.delete_tag(first.run_id, tracking.FILES)
    promotion.promote(first, PASSED)  # whose verdict is noted now
    creation.register(replace(entry, digest=OTHER, folder=merged(tiny_model, OTHER)))
    assert repair.verify().unchecked == 1
    assert main(["verify"]) == 0
    expected = "0 damaged; not checked: scores, verdict and recipe of 1 earlier versions, which have no checksums\n"
    assert capsys.readouterr().out.endswith(expected)


def test_a_run_that_is_deleted_for_good_stops_nothing(entry: Registration, tiny_model: Path, home: Path) -> None:
    first = creation.register(entry)
    promotion.promote(first, PASSED)
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database, database:
        database.execute("delete from runs where run_uuid = ?", (first.run_id,))
    assert creation.register(entry) == replace(first, created=False)
    second = creation.register(replace(entry, digest=OTHER, folder=merged(tiny_model, OTHER)))
    assert promotion.promote(second, replace(PASSED, compared_with=first.uri)).moved
    (found,) = repair.verify().damaged
    assert (found.entry, found.why) == (f"runs:/{first.run_id}", "it was deleted")


def test_verify_reads_the_databases(entry: Registration, home: Path) -> None:
    creation.register(entry)
    path = home / "mlflow" / "mlflow.db"
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + bytes(4096) + whole[12288:])
    (found,) = repair.verify().damaged
    assert (found.kind, found.entry) == ("database", str(path)) and "put back a backup's" in found.why
    path.write_bytes(whole)
    assert repair.verify().damaged == []


def test_a_process_that_died_before_the_aliases_moved_leaves_them_to_the_next(
    entry: Registration, tiny_model: Path
) -> None:
    promotion.promote(creation.register(entry), PASSED)
    damage(weights_of(entry.folder), "flipped")
    merged(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lewis.registry.repair.point_aliases_to", lambda *_: None)
        assert creation.register(entry).version == "2"
    assert aliases() == {"champion": "1"}
    current = registry.champion("tiny")
    assert current is not None and current.digest == DIGEST  # the gate still knows it for the champion
    assert creation.register(entry).version == "2" and aliases() == {"champion": "2"}


def test_a_version_whose_files_are_back_is_no_longer_tagged(entry: Registration, home: Path) -> None:
    from lewis.registry.repair import verify

    creation.register(entry)
    (config,) = artifacts(home).glob("models/*/artifacts/model/config.json")
    before = config.read_bytes()
    damage(config, "cut")
    (found,) = verify().damaged
    assert (found.kind, found.entry) == ("version", "models:/tiny/1") and "model/config.json: expected" in found.why
    assert tags_of("1")["lewis.damaged"] == DIGEST and tags_of("1")["lewis.digest"] == DIGEST
    config.write_bytes(before)
    assert creation.register(entry).version == "1" and "lewis.damaged" not in tags_of("1")
    assert verify().damaged == []


def test_a_store_that_was_moved_damages_no_version(
    entry: Registration, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All versions were damaged: MLflow names their files by the old path of the store."""
    creation.register(entry)
    moved = home.rename(tmp_path / "moved")
    monkeypatch.setenv("LEWIS_HOME", str(moved))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # to which MLflow has set it
    message = f"^{home}: MLflow names .* by this folder, which is not there.*: ln -s {moved} {home}$"
    for act in (lambda: pull("tiny/1", tmp_path / "out"), lambda: promotion.rollback("tiny", "x"), repair.verify):
        with pytest.raises(InputError, match=message):
            act()
    model = SimpleNamespace(artifact_location=(home / "mlflow" / "artifacts" / "models" / "m-1" / "artifacts").as_uri())
    with pytest.raises(InputError, match=message):  # as MLflow's server gives it, which has the database
        logged_model.check(Mock(), model)  # type: ignore[arg-type]
    home.symlink_to(moved)
    assert repair.verify().damaged == [] and "lewis.damaged" not in tags_of("1")


def test_the_mark_stays_and_versions_are_counted_until_one_is_better(entry: Registration, tiny_model: Path) -> None:
    def register(digit: str) -> Version:
        return creation.register(replace(entry, digest=digit * 64, folder=merged(tiny_model, digit * 64)))

    assert promotion.standing("tiny", DIGEST) == Standing()
    first, second, third, fourth = map(register, "abcd")
    promotion.promote(first, PASSED)
    mark = Incumbent(first.uri, DIGEST)
    assert promotion.standing("tiny", "b" * 64) == Standing(mark, 1)
    promotion.promote(second, FAILED)
    promotion.promote(third, replace(PASSED, compared_with=first.uri, mark=first.uri))
    counted = {digit: promotion.standing("tiny", digit * 64) for digit in "bce"}
    assert counted == {"b": Standing(mark, 1), "c": Standing(mark, 2), "e": Standing(mark, 3)}
    damage(weights_of(store.home() / "merged" / ("c" * 64)), "flipped")
    register("c")  # in place of the damaged one
    assert aliases()["champion"] == "5" and promotion.standing("tiny", "e" * 64) == Standing(mark, 3)
    promotion.promote(fourth, replace(PASSED, compared_with="models:/tiny/5"))
    assert promotion.standing("tiny", "e" * 64) == Standing(Incumbent(fourth.uri, "d" * 64), 1)
    promotion.promote_by_hand("tiny", "2", "the customer wants it")
    assert promotion.standing("tiny", "e" * 64) == Standing(Incumbent(second.uri, "b" * 64), 1)
    promotion.promote_by_hand("tiny", "5", "it is politer")  # which a gate has passed, and not found better than 1
    assert promotion.standing("tiny", "e" * 64) == Standing(Incumbent("models:/tiny/5", "c" * 64), 1)


def test_a_rollback_to_the_mark_goes_on_with_its_count(entry: Registration, tiny_model: Path) -> None:
    """The next version might spend the error of a first one again."""

    def register(digit: str) -> Version:
        return creation.register(replace(entry, digest=digit * 64, folder=merged(tiny_model, digit * 64)))

    first, second, third = map(register, "abc")
    promotion.promote(first, PASSED)
    promotion.promote(second, FAILED)
    promotion.promote(third, replace(PASSED, compared_with=first.uri, mark=first.uri))
    promotion.rollback("tiny", "it was rude")
    assert promotion.standing("tiny", "d" * 64) == Standing(Incumbent(first.uri, DIGEST), 3)


def test_what_was_rolled_back_stays_out_when_it_is_registered_anew(entry: Registration, tiny_model: Path) -> None:
    first = creation.register(replace(entry, digest=OTHER, folder=merged(tiny_model, OTHER)))
    promotion.promote(first, PASSED)
    promotion.promote(creation.register(entry), replace(PASSED, compared_with=first.uri))
    promotion.rollback("tiny", "it was rude")
    damage(weights_of(entry.folder), "flipped")
    assert promotion.withdrawn("tiny", DIGEST) == "it was rude"
    with pytest.raises(InputError, match="or its files are gone or damaged"):
        promotion.promote_by_hand("tiny", "2", "it is polite now")
    merged(tiny_model)
    assert creation.register(entry).version == "3" and promotion.withdrawn("tiny", DIGEST) == "it was rude"
    assert aliases() == {"champion": "1", "previous": "3"}


def test_what_cannot_be_promoted_or_rolled_back_by_hand_is_told(entry: Registration) -> None:
    with pytest.raises(InputError, match="no registered model of this name"):
        history.history("tiny")
    promotion.promote(creation.register(entry), PASSED)
    for version, why, message in (
        ("1", "x", "is the champion already"),
        ("7", "x", "no such version"),
        ("7" * 20, "x", "no such version"),
        ("7", " ", "--why"),
    ):
        with pytest.raises(InputError, match=message):
            promotion.promote_by_hand("tiny", version, why)
    with pytest.raises(InputError, match="no previous champion"):
        promotion.rollback("tiny", "x")
    assert aliases() == {"champion": "1"} and len(history.history("tiny")) == 1
    client().delete_model_version("tiny", "1")
    with pytest.raises(InputError, match="there is no champion to roll back; `lewis promote` makes a version"):
        promotion.rollback("tiny", "x")


def aliases() -> dict[str, str]:
    return {alias: str(version) for alias, version in client().get_registered_model("tiny").aliases.items()}


def test_a_deleted_experiment_is_explained(entry: Registration) -> None:
    registry.configure()
    client().delete_experiment(client().get_experiment_by_name("lewis").experiment_id)
    with pytest.raises(InputError, match="mlflow experiments restore"):
        creation.register(entry)


@pytest.fixture
def server(
    home: Path, empty_database: Path, tmp_path: Path, warm: WarmPython, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """MLflow's server, which serves the artifacts too, so the client has no folder to link into."""
    uri = f"http://127.0.0.1:{(port := free_port())}"
    shutil.copy(empty_database, tmp_path / "server.db")
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/server.db",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        mlflow_app.FILES: f"{tmp_path}/remote",
        mlflow_app.ORIGINS: uri,
    }
    code = f"from {mlflow_app.__name__} import main; main()"
    arguments = [mlflow_app.PREPARE, f"--port={port}", "--workers=1", "--uvicorn-opts=--log-level warning"]
    process = warm.run(code, arguments, folder=tmp_path, environment=environment)
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, process.communicate()
                time.sleep(0.25)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
def test_over_http_with_remote_artifacts(
    server: str, entry: Registration, home: Path, tmp_path: Path, warm: WarmPython
) -> None:
    import mlflow

    (entry.folder / "README.md").write_text("a card, which changes with the scores")
    made = race(warm, home, entry, 2)
    assert creation.register(entry) == replace(made, created=False)
    current = registry.champion("tiny")
    assert current is not None and current.folder is None and current.metrics["addition/acc,none"] == 0.9
    assert type(mlflow.transformers.load_model("models:/tiny@champion")).__name__ == "TextGenerationPipeline"
    assert list((home / "mlflow" / "uploads").iterdir()) == []
    assert registry.fetch(current).folder == entry.folder  # the store has it still
    files = {path.name: path.read_bytes() for path in entry.folder.iterdir() if path.name != "README.md"}
    shutil.rmtree(home)  # as after the loss of a machine: registry and its artifacts are all that is left
    fetched = registry.fetch(current)
    assert creation.register(entry) == replace(made, created=False)  # from what was fetched, no second version
    assert fetched.folder == entry.folder and store.read_manifest(entry.folder) is not None
    assert {path.name: path.read_bytes() for path in entry.folder.iterdir()} == files
    shutil.rmtree(entry.folder)
    assert pull("tiny", tmp_path / "pulled").uri == made.uri
    assert {name: (tmp_path / "pulled" / name).read_bytes() for name in files if name != store.MANIFEST} == {
        name: content for name, content in files.items() if name != store.MANIFEST
    }
    shutil.rmtree(entry.folder)
    damage(next((tmp_path / "remote").rglob("model/config.json")), "flipped")  # a server tells its size alone
    assert registered() is not None
    assert registry.fetch(current).folder is None and not entry.folder.exists()
    assert registered() is None  # a damaged download is remembered
    next((tmp_path / "remote").rglob("*.safetensors")).unlink()
    assert registered() is None
    assert registry.fetch(current).folder is None


@pytest.mark.parametrize("shared", ["1", pytest.param("0", marks=pytest.mark.long)])
def test_a_champion_whose_files_are_gone_comes_from_the_remote_half_of_the_store(
    home: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str
) -> None:
    monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
    monkeypatch.setenv("LEWIS_STORE_MERGED", "1")
    folder = merged(tiny_model)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(home)
    monkeypatch.setenv("LEWIS_STORE_MERGED", shared)
    monkeypatch.setattr(registry, "model_of", lambda client, version: None)  # MLflow's own files are damaged
    monkeypatch.setattr("mlflow.MlflowClient.get_model_version", lambda *_: None)
    version = registry.Version("tiny", "1", "run", "models:/tiny/1", False)
    found = registry.fetch(registry.Champion(version, DIGEST, None, {}))
    assert found.folder == (folder if shared == "1" else None)
    if found.folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def _sent_again(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let MLflow's client send requests a second time, as it does if the answer to the first one is an error 500."""
    from mlflow import MlflowClient

    def twice(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any, **named: Any) -> Any:
            call(*given, **named)
            return call(*given, **named)

        return wrapper

    for name in names:
        monkeypatch.setattr(MlflowClient, name, twice(getattr(MlflowClient, name)))


def test_what_mlflow_did_twice_is_there_once(entry: Registration, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    creating = ("create_run", "create_logged_model", "create_registered_model", "create_model_version")
    _sent_again(monkeypatch, "create_experiment", *creating, "delete_logged_model")
    made = creation.register(replace(entry, team="research"))
    promotion.promote(made, PASSED)
    assert [str(each.version) for each in versions()] == [made.version] and runs() == []
    assert registry.champion("tiny").version == replace(made, created=False)
    experiment = client().get_experiment_by_name("lewis/research").experiment_id
    found = client().search_runs([experiment])
    charts = [run.info.status for run in found if "lewis.champions" in run.data.tags]
    others = sorted(run.info.status for run in found if "lewis.champions" not in run.data.tags)
    assert (charts, others) == (["FINISHED"], ["FAILED", "FINISHED"])
    (model,) = client().search_logged_models([experiment])
    assert (model.status, model.source_run_id) == ("READY", made.run_id)
    assert creation.register(replace(entry, team="research")) == replace(made, created=False)


def test_a_version_that_has_an_alias_is_not_taken_for_a_second_one(entry: Registration) -> None:
    """Two of one run, which an earlier release of LEWIS left."""
    promotion.promote(creation.register(entry), PASSED)
    (first,) = versions()
    client().create_model_version("tiny", first.source, first.run_id, tags={"lewis.digest": DIGEST})
    assert creation.register(entry).version == "1" and len(versions()) == 1


def test_a_version_whose_request_was_taken_to_have_failed_is_complete_after_the_next_run(
    entry: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    create = MlflowClient.create_model_version

    def failing(*given: Any, **named: Any) -> None:
        create(*given, **named)
        raise MlflowException("the answer is lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", failing)
        with pytest.raises(TransientError, match="the answer is lost"):
            creation.register(entry)
    assert len(versions()) == 1 and runs() == ["FAILED"]
    assert not creation.register(entry).created
    experiment = client().get_experiment_by_name("lewis").experiment_id
    assert len(versions()) == 1 and runs() == ["FINISHED"]
    assert [model.status for model in client().search_logged_models([experiment])] == ["READY"]


def test_a_damaged_database_is_no_traceback(home: Path) -> None:
    """MLflow passes on what SQLAlchemy raises while the database is opened."""
    (home / "mlflow" / "mlflow.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(LewisError, match=r"mlflow\.db: reading .*: file is not a database; stop `lewis up`, and put"):
        history.history("tiny")


def test_a_server_that_does_not_answer_is_transient(entry: Registration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TransientError, match="registering tiny"):
        creation.register(entry)
