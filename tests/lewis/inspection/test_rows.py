"""Rows that an expert does not know better than the base are found before a fit."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lewis
from tests.conftest import Family
from tests.support.models import WORDS, edit_json, write_tokenizer

ROWS = {name: [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(at, at + 6)] for name, at in (("own", 1), ("odd", 31))}


@pytest.fixture
def given(home: Path, family: Family, tmp_path: Path) -> Path:
    """A recipe of an expert that was trained on its rows, and one that was trained away from them."""
    models = [
        {"model": trained(family.base, ROWS["own"], 1, tmp_path / "knows"), "calibration": "own"},
        {"model": trained(family.base, ROWS["odd"], -1, tmp_path / "lost"), "calibration": "odd"},
    ]
    sets = {name: {"texts": rows, "samples": 6} for name, rows in ROWS.items()}
    recipe = {"merge_method": "regmean_forward", "base_model": str(family.base), "models": models}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"lewis": {"calibrations": sets}}))
    return tmp_path / "recipe.yaml"


def trained(base: Path, rows: list[str], sign: int, folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(base, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(row)["input_ids"] for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        (sign * model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return str(folder)


def test_inspect_names_the_expert_and_its_set(given: Path) -> None:
    found = [each for each in lewis.inspect(given).findings if each.kind == "calibration"]
    assert [Path(each.model).name for each in found] == ["lost"]
    assert re.search(r"on 4 rows of `odd` its loss is [\d.]+ nats per token, the base's", found[0].what)
    assert found[0].level == "warning"


def test_the_loss_is_that_of_the_answers_where_the_set_says_which_they_are(given: Path) -> None:
    data = yaml.safe_load(given.read_text())
    rows = [dict(zip(("ask", "say"), row.split(" ", 1), strict=True)) for row in ROWS["odd"]]
    (given.parent / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = {"dataset": "json", "data_files": "odd.jsonl", "prompt": "{ask}", "answer": " {say}", "samples": 6}
    data["lewis"]["calibrations"]["odd"] = answers
    given.write_text(yaml.safe_dump(data))
    [found] = [each for each in lewis.inspect(given).findings if each.kind == "calibration"]
    assert "nats per answer token, the base's" in found.what


def test_rows_that_cannot_be_had_stop_no_inspection(given: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = yaml.safe_load(given.read_text())
    gone = {"dataset": "json", "data_files": "gone.jsonl", "text": "{text}"}
    data["lewis"]["calibrations"] = {name: gone for name in data["lewis"]["calibrations"]}
    given.write_text(yaml.safe_dump(data))
    assert "calibration" not in {each.kind for each in lewis.inspect(given).findings}
    assert "the calibration rows are not checked" in caplog.text and "gone.jsonl" in caplog.text


def test_rows_that_predict_nothing_say_nothing(given: Path) -> None:
    """The loss of both was 0.000 then: prompts that the expert is to continue, and rows of one token."""
    data = yaml.safe_load(given.read_text())
    sets = data["lewis"]["calibrations"]
    sets["own"], sets["odd"] = {"texts": ["w1"] * 6}, {**sets["odd"], "continue": 1}
    given.write_text(yaml.safe_dump(data))
    assert "calibration" not in {each.kind for each in lewis.inspect(given).findings}


def test_rows_whose_prompts_fill_max_tokens_are_passed_over(given: Path) -> None:
    """A division by zero, where these were the first."""
    data = yaml.safe_load(given.read_text())
    long, short = {"question": "w1 " * 20, "answer": "w2"}, {"question": "w31", "answer": "w32"}
    rows = [long] * 8
    for place in np.random.default_rng(42).permutation(8)[4:]:  # those that are drawn last
        rows[place] = short
    (given.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"dataset": "json", "data_files": "rows.jsonl", "prompt": "{question} ", "answer": "{answer}"}
    data["lewis"]["calibrations"]["odd"] = {**pairs, "max_tokens": 8}
    given.write_text(yaml.safe_dump(data))
    [found] = [each for each in lewis.inspect(given).findings if each.kind == "calibration"]
    assert "on 4 rows of `odd` its loss is" in found.what and "nats per answer token" in found.what


def test_rows_are_not_read_in_another_vocabulary(given: Path) -> None:
    """They are the base's token ids, which mean other tokens to the expert; some are beyond its last."""
    data = yaml.safe_load(given.read_text())
    lost = Path(data["models"][1]["model"])
    few = shutil.copytree(lost, lost.parent / "few")
    tensors = load_file(lost / "model.safetensors")
    save_file({n: t[:40].clone() if len(t) == 64 else t for n, t in tensors.items()}, few / "model.safetensors")
    edit_json(few / "config.json", vocab_size=40)
    write_tokenizer(few, WORDS[:37])
    data["models"][1] |= {"model": str(few), "calibration": "own"}
    data["lewis"]["calibrations"]["own"]["texts"] = ["w40 w41 w42"] * 6
    given.write_text(yaml.safe_dump(data | {"tokenizer_source": "base"}))
    assert "calibration" not in {each.kind for each in lewis.inspect(given).findings}
