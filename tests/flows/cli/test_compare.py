"""`lewis compare`: of results that lm-eval wrote, of models that were scored here, and of registered versions."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lewis import store
from lewis.errors import InputError
from lewis.evaluation.paired import Side, paired
from lewis.evaluation.results_folder import read_results
from lewis.evaluation.statistics.comparison import holm, mcnemar
from lewis.evaluation.statistics.scores import Evaluated
from lewis.models.source import pin
from lewis.registry import tracking
from lewis.registry.pull import version_of
from lewis.store import kinds
from lewis_flows.cli.main import main
from tests.conftest import Family

RIGHT = {"worse": [0, 0, 0, 1, 0, 0, 1, 0, 0, 0], "better": [1, 1, 1, 1, 1, 1, 0, 1, 1, 1]}
ENDS = {"empty": {}, "tried": 0, "ended": 0, "perplexity": None}


def content(values: list[int], shots: int = 0, **more: Any) -> dict[str, Any]:
    """An entry of the store."""
    mean = sum(values) / len(values)
    return {
        "results": {"sums": {"acc,none": mean, "acc_stderr,none": 0.1, "sample_len": len(values)}},
        "higher_is_better": {"sums": {"acc": True}},
        "n-shot": {"sums": shots},
        "documents": {"sums": [f"{n:016x}" for n in range(len(values))]},
        "samples": [{"task": "sums", "metric": "acc,none", "aggregation": "mean", "values": values}],
        "groups": {},
        "ends": ENDS,
        **more,
    }


def results(folder: Path, values: list[int], *, documents: int = 0, samples: bool = True, date: str = "1") -> Path:
    """A folder as lm-eval writes it; `documents` is the number of the first one."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {key: value for key, value in content(values).items() if key in ("results", "higher_is_better", "n-shot")}
    found["configs"] = {"sums": {"metric_list": [{"metric": "acc", "aggregation": "mean"}]}}
    (folder / f"results_{date}.json").write_text(json.dumps(found))
    rows = [
        {"doc_id": n, "doc_hash": f"{documents + n:016x}ff", "filter": "none", "metrics": ["acc"], "acc": value}
        for n, value in enumerate(values)
    ]
    if samples:
        (folder / f"samples_sums_{date}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compared(home: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, output and errors of `lewis compare`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["compare", *map(str, arguments)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_results_of_lm_eval(compared: Command, tmp_path: Path) -> None:
    worse = results(tmp_path / "out/worse", RIGHT["worse"])
    results(tmp_path / "out/better", RIGHT["worse"])
    better = results(tmp_path / "out/better", RIGHT["better"], date="2")  # the newest counts
    code, out, _ = compared(worse, better, "--json")
    found = json.loads(out)
    [row] = found["rows"]
    assert code == 0 and (found["a"], found["b"]) == ("worse", "better")
    assert found["only"] == {"worse": [], "better": []}
    assert row["scores"] == [0.2, 0.9] and row["gain"] == pytest.approx(0.7) and row["low"] < 0.7 < row["high"]
    assert (row["wins"], row["losses"], row["documents"]) == (8, 1, 10)
    assert row["p"] == mcnemar(8, 1) and row["holm"] == holm({"x": row["p"]})["x"]
    code, out, _ = compared(better, worse)
    assert code == 0 and "sums/acc,none ↑" in out and "-0.7" in out and "Holm's p" in out
    code, out, _ = compared(better, better)
    assert code == 0 and "better (A)" in out and "better (B)" in out and "prompts" not in out
    one = results(tmp_path / "one", [1])  # a document has no interval, which JSON cannot say by a number
    code, out, _ = compared(one, one, "--json")
    assert code == 0 and json.loads(out, parse_constant=pytest.fail)["rows"][0]["low"] is None
    assert "-inf" not in compared(one, one)[1]


def test_what_lm_eval_does_not_say_of_each_document_is_named(compared: Command, tmp_path: Path) -> None:
    """A metric has lm-eval's own aggregation if its task names none; and prompts that differ are no secret."""
    nats = [[-3.0, 2], [-1.0, 1], [-2.0, 3]]
    value = math.exp(6 / 6)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, word in ((ours, "Q: "), (theirs, "")):
        folder.mkdir()
        found = {
            "results": {"said": {"word_perplexity,none": value, "bleu,none": 3.0, "sample_len": 3}},
            "higher_is_better": {"said": {"word_perplexity": False}},
            "configs": {"said": {"metric_list": [{"metric": "word_perplexity"}, {"metric": "bleu"}]}},
        }
        (folder / "results_1.json").write_text(json.dumps(found))
        rows = [
            {"doc_id": n, "doc_hash": f"{n:016x}", "prompt_hash": word * (n > 0), "filter": "none"}
            | {"word_perplexity": pair, "bleu": ["a", "b"]}
            for n, pair in enumerate(nats)
        ]
        (folder / "samples_said_1.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = compared(ours, theirs)
    assert code == 0 and "said/word_perplexity,none ↓" in out and "2.718" in out
    assert "not compared, for they have no value per document: said/bleu,none" in out
    assert "said/word_perplexity,none: the prompts of 2 of 3 documents differ" in out
    for folder, version in ((ours, 1.0), (theirs, 2.0)):
        path = folder / "results_1.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {"said": version}}))
    code, _, err = compared(ours, theirs)
    assert (
        code == 2 and "said: ours was scored by version 1.0 of the task, and theirs by version 2.0; score both" in err
    )


def test_results_that_cannot_be_paired(compared: Command, tmp_path: Path) -> None:
    ours = results(tmp_path / "a", RIGHT["worse"])
    others = results(tmp_path / "b", RIGHT["better"], documents=3)
    code, _, err = compared(ours, others)
    assert code == 2 and "sums: not the same documents: a has 10, b 10, and both have 7 of them; score both" in err
    bare = results(tmp_path / "c", RIGHT["better"], samples=False)
    code, _, err = compared(ours, bare)
    assert code == 2 and "no samples_*_1.jsonl next to it; run lm-eval with --log_samples" in err
    code, _, err = compared(ours, tmp_path)
    assert code == 2 and "the results of several models; give one of" in err
    (others / "samples_sums_1.jsonl").write_text("{")
    code, _, err = compared(ours, others)
    assert code == 2 and "not results and samples of lm-eval: ValueError: samples_sums_1.jsonl: Expecting" in err
    code, _, err = compared(ours, bare / "results_1.json")
    assert code == 2 and f"expected the folder that lm-eval wrote, got a file; give {bare}" in err
    (bare / "results_1.json").unlink()
    code, _, err = compared(ours, bare)
    assert code == 2 and f"{bare} has no results_*.json of lm-eval" in err
    code, _, err = compared(ours, "~nobodyhere/x")
    assert code == 2 and "~nobodyhere/x is no folder" in err
    code, _, err = compared(ours, "nothing/3")
    assert code == 2 and "no model is registered; and there is no folder of this name" in err


def test_damaged_results_end_in_no_traceback(tmp_path: Path) -> None:
    def damaged(file: str, **change: Any) -> Path:
        path = results(tmp_path / "a", [1]) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        return path.parent

    rows = "samples_sums_1.jsonl"
    for folder in (lambda: damaged("results_1.json", **{"n-shot": 5}), lambda: damaged(rows, acc=10**400)):
        with pytest.raises(InputError, match=r"results_1\.json: not results and samples of lm-eval: "):
            read_results(folder())
    for key in ("doc_hash", "prompt_hash"):
        side = Side("a", [("", read_results(damaged(rows, **{key: [5]})))])
        assert paired(side, side)[0].prompts == 0


def test_models_that_were_scored_here(compared: Command, family: Family, home: Path, tmp_path: Path) -> None:
    keys = [pin(str(folder), tmp_path).key for folder in family.experts]
    code, _, err = compared(*family.experts)
    assert code == 2 and "has no scores of this model; score it with `lewis run`" in err
    store.write_entry(kinds.SCORES.path("1"), content(RIGHT["worse"], model=keys[0], scored_as="x"))
    store.write_entry(kinds.SCORES.path("2"), content(RIGHT["better"], model=keys[1], scored_as="y", shots=5))
    code, _, err = compared(*family.experts)
    assert code == 2 and "math was scored with 0 examples in the prompt" in err and "same num_fewshot" in err
    # Scores that were made alike are compared, not newer ones that were made in another way.
    store.write_entry(kinds.SCORES.path("3"), content(RIGHT["better"], model=keys[1], scored_as="x"))
    store.write_entry(kinds.SCORES.path("4"), content(RIGHT["worse"], model=keys[1], scored_as="z"))
    code, out, _ = compared(*family.experts, "--json")
    assert code == 0 and json.loads(out)["rows"][0]["scores"] == [0.2, 0.9]
    # Nor a look of an evaluation that ended early, which may have been used later.
    for number, (key, right) in enumerate(zip(keys, RIGHT.values(), strict=True)):
        part = content(right[:4], model=key, scored_as="look", pools={"sums": 10})
        store.write_entry(kinds.SCORES.path(f"look{number}"), part)
    code, out, _ = compared(*family.experts, "--json")
    assert code == 0 and json.loads(out)["rows"][0]["documents"] == 10
    # What lm-eval wrote elsewhere, against a model of the store.
    code, out, _ = compared(results(tmp_path / "out", RIGHT["better"]), family.math, "--json")
    assert code == 0 and json.loads(out)["rows"][0]["scores"] == [0.9, 0.2]


def test_prompts_and_versions_of_models_that_were_scored_here(
    compared: Command, family: Family, tmp_path: Path
) -> None:
    """The entries kept neither, so that models with other prompts were compared without a word."""
    store.write_entry(kinds.SCORES.path("old"), content(RIGHT["better"], model=pin(str(family.code), tmp_path).key))
    key, asked = pin(str(family.math), tmp_path).key, [f"{n:016x}" for n in range(10)]
    for number, (prompts, version) in enumerate(((asked, 1), ([*asked[:7], *"abc"], 1), (asked, 2))):
        more = {"prompts": {"sums": prompts}, "versions": {"sums": version}}
        models = {"model": f"{number}", "scored_as": f"{number}"} if number else {"model": key}
        store.write_entry(kinds.SCORES.path(f"{number}"), content(RIGHT["worse"], **models, **more))
    sides = [Side.of_store("m", {each}) for each in (key, "1", "2")]
    assert [pair.prompts for pair in paired(*sides[:2])] == [3]
    with pytest.raises(InputError, match="sums: m was scored by version 1 of the task, and m by version 2"):
        paired(sides[0], sides[2])
    code, out, _ = compared(*family.experts)  # scores of before this was kept
    assert code == 0 and "prompts" not in out
    whole = Evaluated.of("x", content(RIGHT["worse"], prompts={"sums": [each + "ff" for each in asked]}))
    assert [pair.prompts for pair in paired(sides[0], Side("x", [("", whole)]))] == [0]  # lm-eval's own, of 64 digits


def test_a_comparison_is_no_use_of_scores_so_that_the_last_used_ones_stay_these(
    compared: Command, family: Family, tmp_path: Path
) -> None:
    for how, days in (("new", 2), ("old", 3)):
        for number, folder in enumerate(family.experts):
            right = RIGHT["better" if number and how == "new" else "worse"]
            path = kinds.SCORES.path(f"{how}{number}")
            store.write_entry(path, content(right, model=pin(str(folder), tmp_path).key, scored_as=how))
            os.utime(path, (time.time() - days * 86400,) * 2)
    before = [path.stat().st_mtime for path in kinds.SCORES.entries()]
    for _ in range(2):
        code, out, _ = compared(*family.experts, "--json")
        assert code == 0 and json.loads(out)["rows"][0]["scores"] == [0.2, 0.9]
    assert [path.stat().st_mtime for path in kinds.SCORES.entries()] == before


def test_a_merged_adapter_is_known_by_its_folder(compared: Command, family: Family, tmp_path: Path) -> None:
    with store.publish(tmp_path / "pulled", {"digest": "a" * 64}) as target:
        shutil.copytree(family.lora, target, dirs_exist_ok=True)
    store.write_entry(kinds.SCORES.path("1"), content(RIGHT["worse"], model="a" * 64, scored_as="x"))
    code, out, _ = compared(tmp_path / "pulled", results(tmp_path / "out", RIGHT["better"]), "--json")
    assert code == 0 and json.loads(out)["rows"][0]["scores"] == [0.2, 0.9]


def test_an_adapter_is_known_by_its_folder(compared: Command, family: Family, tmp_path: Path) -> None:
    """It was refused for lack of a base, though the store had the scores of it."""
    other, root = results(tmp_path / "out", RIGHT["better"]), tmp_path
    bases = [pin(str(each), root) for each in (family.base, family.math)]
    keys = [pin(str(family.lora), root, base).key for base in bases]
    stacked = pin(f"{family.base}+{family.lora}+{family.lora}", root).key
    store.write_entry(kinds.SCORES.path("0"), content(RIGHT["better"], model=stacked, scored_as="x"))
    assert "write base+adapter" in compared(family.lora, other)[2]
    store.write_entry(kinds.SCORES.path("1"), content(RIGHT["worse"], model=keys[0], scored_as="x"))
    code, out, _ = compared(family.lora, other, "--json")
    assert code == 0 and json.loads(out)["rows"][0]["scores"] == [0.2, 0.9]
    store.write_entry(kinds.SCORES.path("2"), content(RIGHT["better"], model=keys[1], scored_as="x"))
    code, _, err = compared(family.lora, other)
    assert code == 2 and f"was scored on 2 models; name the one that you mean: BASE+{family.lora}" in err
    code, out, _ = compared(f"{family.base}+{family.lora}", other, "--json")
    assert code == 0 and json.loads(out)["rows"][0]["scores"] == [0.2, 0.9]


def test_versions(compared: Command, home: Path, tmp_path: Path) -> None:
    with tracking.client("x") as client:
        client.create_registered_model("ops.tiny")
        for digest in ("a" * 64, "b" * 64):
            client.create_model_version("ops.tiny", str(tmp_path), tags={"lewis.digest": digest}, await_creation_for=0)
        client.set_registered_model_alias("ops.tiny", "champion", "2")
        client.create_registered_model("ops.new")
        client.create_model_version("ops.new", str(tmp_path), await_creation_for=0)
    store.write_entry(kinds.SCORES.path("1"), content(RIGHT["worse"], model="a" * 64, scored_as="x"))
    store.write_entry(kinds.SCORES.path("2"), content(RIGHT["better"], model="b" * 64, scored_as="x"))
    code, out, _ = compared("ops.tiny/1", "models:/ops.tiny@champion", "--json")
    assert code == 0 and json.loads(out)["rows"][0]["scores"] == [0.2, 0.9]
    there = "ops.tiny has no such version: its versions are 1, 2, its aliases champion"
    model = "expected a registered model, got 'other'; expected one of ops.new, ops.tiny"
    for wrong, told in {"ops.tiny/3": there, "ops.tiny@previous": there, "other/1": model}.items():
        code, _, err = compared("ops.tiny/1", wrong)
        assert code == 2 and f"{wrong}: {told}" in err
    message = r"ops\.new has no champion yet; name a version"
    with tracking.client("x") as client, pytest.raises(InputError, match=message):
        version_of(client, "ops.new")
