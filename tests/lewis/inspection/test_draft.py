"""`lewis new`: what it chooses for which expert, and that what it writes is a recipe that fits its models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import InputError
from lewis.evaluation.harness.builtin_tasks import index, package
from lewis.evaluation.harness.check import check_names
from lewis.evaluation.harness.task_files import read_task
from lewis.inspection.draft import GENERAL, TOPICS, Topic, _end, draft, topic_of
from lewis.recipe.recipe import Recipe
from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.support.gguf_files import write_gguf
from tests.support.models import edit_json, write_llama


@pytest.mark.parametrize(
    "told, expected",
    [
        (("expert-math",), "gsm8k"),
        (("lora-python-7b",), "mbpp"),
        (("v3", '["openai/gsm8k"]', "null"), "gsm8k"),
        (("BioMedical",), "sciq"),
        (("Qwen2.5-Coder",), "mbpp"),
        (("encoder-decoder-chat",), "general"),  # it was taken for an expert of code
        (("v3", "null", '["chat"]'), "general"),
    ],
)
def test_a_topic_is_told_by_name_then_by_card(told: tuple[str, ...], expected: str) -> None:
    assert topic_of(*told).name == expected


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval_tasks")
@pytest.mark.parametrize("topic", [topic for topic in (*TOPICS, GENERAL) if topic.task], ids=lambda topic: topic.name)
def test_a_topic_is_of_lm_eval(topic: Topic) -> None:
    """Its rows are what lm-eval itself reads, and its score is one that lm-eval gives."""
    entry = index()[topic.task]
    assert entry.kind == "TASK"
    config = read_task(package() / entry.path).config
    if topic is not GENERAL:
        assert (config["dataset_path"], config.get("dataset_name")) == (topic.dataset, topic.config)
        assert config["training_split"] == "train"
    metric, _, chosen = topic.score.partition(",")
    assert metric in [each["metric"] for each in config["metric_list"]]
    assert chosen in [each["name"] for each in config.get("filter_list") or [{"name": "none"}]]


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval_tasks")
def test_it_writes_a_recipe_that_fits(
    family: Family, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [shutil.copytree(family.math, tmp_path / "math"), shutil.copytree(family.lora, tmp_path / "lora: {x}")]
    (experts[1] / "README.md").write_text("---\ndatasets: [allenai/sciq]\n---\n# {{ card }}\n")
    base = shutil.copytree(family.base, tmp_path / "base")
    edit_json(base / "tokenizer_config.json", eos_token="{end}", chat_template="{{ messages }}")
    file, given = tmp_path / "my merge.yaml", [str(base), *map(str, experts)]
    assert main(["new", *given, "-o", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["calibrations"] == {"./math": "gsm8k", "./lora: {x}": "sciq"} and told["tasks"] == ["gsm8k", "sciq"]
    recipe = Recipe.load(file)
    assert recipe.fits and [each.model for each in recipe.experts] == ["./math", "./lora: {x}"]
    assert recipe.lewis and str(recipe.lewis.calibrations["gsm8k"].answer).endswith("{answer}{{end}}")
    assert recipe.register_as and recipe.register_as.gate and recipe.register_as.gate.metric == "weighted/mean,none"
    assert recipe.evaluate
    check_names(recipe.evaluate, recipe.root, recipe.gate)
    assert "# apply_chat_template" in file.read_text()

    assert main(["new", *given, "-o", str(file)]) == 2
    assert "there is a file already; choose another name, or say --force" in capsys.readouterr().err
    assert main(["new", *given[:2], "-o", str(file), "--force"]) == 0
    assert f"{file}: scored by gsm8k; read it" in capsys.readouterr().out
    recipe = Recipe.load(file)
    assert recipe.register_as and recipe.register_as.gate
    assert recipe.register_as.gate.metric == "gsm8k/exact_match,flexible-extract"
    assert recipe.evaluate
    check_names(recipe.evaluate, recipe.root, recipe.gate)

    before, odd = file.read_bytes(), write_llama(tmp_path / "odd", hidden=32)
    assert main(["new", str(base), str(odd), "-o", str(file), "--force"]) == 2
    assert str(odd.name) in capsys.readouterr().err and file.read_bytes() == before


@pytest.mark.parametrize(("stored", "expected"), [({"content": "<e>"}, "<e>"), ({}, ""), (None, ""), ("<e>", "<e>")])
def test_an_end_token_without_a_text_is_none(stored: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": stored}))
    assert _end(tmp_path) == expected


def test_the_commands_in_it_name_the_file_that_it_is(family: Family, tmp_path: Path) -> None:
    text = draft(str(family.base), [str(family.math)], tmp_path / "r.yml").text
    assert "# lewis run r.yml " in text and "r.yaml" not in text


def test_an_expert_that_is_given_twice_is_refused_as_a_recipe_refuses_it(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="math: given twice"):
        draft(str(family.base), [str(family.math), str(family.code), f"{family.math}/"], tmp_path / "r.yaml")


def test_an_adapter_on_a_model_is_two_folders(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`./base+./lora` was refused as no such folder, and `base+lora` was written as names, lost elsewhere."""
    for name, folder in (("base", family.base), ("lora+1", family.lora)):
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    expected = f"{tmp_path / 'base'}+{tmp_path / 'lora+1'}"
    for given in ("./base+./lora+1", "base+lora+1"):
        assert list(draft("base", [given], tmp_path / "recipes" / "r.yaml").topics) == [expected]
    with pytest.raises(InputError, match="got a '\\+' with nothing before or after it"):
        draft(str(family.base), ["base+"], tmp_path / "r.yaml")


def test_a_path_starts_where_the_command_does(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two folders named `./math`, the recipe named the one next to it, not the one in the working directory."""
    for place in (tmp_path / "math", tmp_path / "recipes" / "math"):
        shutil.copytree(family.math, place)
    monkeypatch.chdir(tmp_path)
    for given in ("./math", "math"):
        made = draft(str(family.base), [given], tmp_path / "recipes" / "r.yaml")
        assert list(made.topics) == [str(tmp_path / "math")]


def test_a_link_is_written_as_the_link(tmp_path: Path, family: Family) -> None:
    """A recipe of `newest` kept what it led to that day; a GGUF file in the cache of the Hub was no such folder."""
    (tmp_path / "newest").symlink_to(family.math)
    assert list(draft(str(family.base), [str(tmp_path / "newest")], tmp_path / "r.yaml").topics) == ["./newest"]
    base = write_llama(tmp_path / "base", hidden=32)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "math.gguf").symlink_to(
        write_gguf(base, tmp_path / "math.gguf").rename(tmp_path / "4a5b")
    )
    assert list(draft(str(base), [str(tmp_path / "snapshots" / "math.gguf")], tmp_path / "r.yaml").topics) == [
        "./snapshots/math.gguf"
    ]


def test_a_date_in_a_model_card_is_no_traceback(family: Family, tmp_path: Path) -> None:
    """YAML reads the tag 2026-01-01 as a date, of which JSON has none."""
    expert = shutil.copytree(family.math, tmp_path / "v3")
    (expert / "README.md").write_text("---\ndatasets: [openai/gsm8k]\ntags: [2026-01-01]\n---\n")
    assert draft(str(family.base), [str(expert)], tmp_path / "r.yaml").topics == {"./v3": "gsm8k"}
