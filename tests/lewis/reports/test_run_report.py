"""The run's report: golden texts, and names that try to be more than names."""

import re

import pytest

from lewis.evaluation.gate import Verdict
from lewis.evaluation.statistics.scored import Scored
from lewis.evaluation.statistics.scores import Ends, Score
from lewis.registry.lineage import by_reference
from lewis.reports.run_report import (
    Change,
    RunFacts,
    changes,
    duration,
    outcome,
    run_name,
    score_columns,
    score_rows,
    short,
    to_markdown,
)

OLD, NEW = "1" * 40, "2" * 40


def score(value: float, higher: bool = True) -> Score:
    return Score("gsm8k", "exact_match,none", value, 0.01, higher, 200)


def test_the_whole_report() -> None:
    facts = RunFacts(
        recipe="nightly",
        outcome="models:/m/3 is the new champion.",
        why="by hand",
        seconds=185.2,
        digest="5c1f0a2b" + "0" * 56,
        champion="models:/m/2",
        changes=[Change("org/base", OLD, OLD), Change("org/math", OLD, NEW)],
        work={"measure": (1, 2), "evaluate": (0, 0)},
        scores={"base": [score(0.25)], "merged": [score(0.5)]},
        verdict=Verdict(True, ("gain 0.25: pass",), "models:/m/2"),
        means={"org/math": 0.5},
        links={"MLflow run": "http://127.0.0.1:5000/#/runs/1"},
    )
    assert to_markdown(facts) == (
        """# Run of `nightly`

**models:/m/3 is the new champion.**

Started by hand. Took 3 min 5 s. Merge digest `5c1f0a2b`.

[MLflow run](http://127.0.0.1:5000/#/runs/1)

## What changed since the champion `models:/m/2`

| input | champion | now |  |
| --- | --- | --- | --- |
| `org/base` | `11111111` | `11111111` | unchanged |
| `org/math` | `11111111` | `22222222` | **moved** |

## What was computed

| step | computed | from the cache |
| --- | --- | --- |
| measure | 1 | 2 |

## Scores

| metric | `base` | `merged` | vs base |
| --- | --- | --- | --- |
| `gsm8k/exact_match,none` ↑ | 0.25 | 0.5 | +0.25 ✓ |

## The gate: passed

Compared with `models:/m/2`.

* gain 0.25: pass

## Mean density

| expert | mean density |
| --- | --- |
| `org/math` | 0.500 |
"""
    )


def test_a_run_with_nothing_to_compare_says_only_what_it_knows() -> None:
    text = to_markdown(RunFacts("plain", "Merged; the recipe registers nothing.", "by hand", 3, "a" * 64))
    assert text == (
        "# Run of `plain`\n\n**Merged; the recipe registers nothing.**\n\n"
        "Started by hand. Took 3 s. Merge digest `aaaaaaaa`.\n"
    )


def test_the_report_tells_what_error_an_adapter_leaves() -> None:
    told = "LoRA adapter of 14 modules, rank 4; it leaves a relative error of 0.2"
    text = to_markdown(RunFacts("x", "Merged.", "by hand", 3, "a" * 64, adapter=told))
    assert f"digest `aaaaaaaa`.\n\n{told}\n" in text


@pytest.mark.parametrize(
    ("before", "now", "status"),
    [(None, NEW, "new"), (OLD, NEW, "moved"), (NEW, NEW, "unchanged"), (OLD, None, "removed")],
)
def test_what_became_of_an_input(before: str | None, now: str | None, status: str) -> None:
    assert Change("org/math", before, now).status == status


def test_changes_are_found_by_the_tags_of_the_registry() -> None:
    held = {"lewis.source.org--math_main": OLD, "lewis.source.org--gone": OLD}
    now = {"org/math@main": NEW, "/data/code": NEW}
    assert changes(by_reference(held, now), now) == [
        Change("org/math@main", OLD, NEW),
        Change("/data/code", None, NEW),
        Change("org/gone", OLD, None),
    ]


def test_the_comparison_and_the_pictures_are_in_the_report() -> None:
    rows = [{"metric": "gsm8k/acc,none ↑", "model": "base", "gain of lewis": "+0.1", "p": "0.03"}]
    facts = RunFacts("r", "Merged.", "by hand", 3, "a" * 64, comparison=rows, pictures={"Scores": b"\x89PNG"})
    text = to_markdown(facts)
    assert "## Compared, document by document\n\n| metric | model | gain of lewis | p |" in text
    assert "| `gsm8k/acc,none ↑` | `base` | +0.1 | 0.03 |" in text
    assert text.endswith("## Scores\n\n![Scores](data:image/png;base64,iVBORw==)\n")


def test_what_is_kept_of_the_experts_gains_is_in_the_report() -> None:
    rows = [{"expert": "math", "task": "gsm8k/acc,none ↑", "base": "0.2", "kept": "97 %", "kept by uniform": "-"}]
    text = to_markdown(RunFacts("r", "Merged.", "by hand", 3, "a" * 64, kept=rows))
    assert text.endswith(
        "## What is kept of each expert's gain\n\n"
        "| expert | task | base | kept | kept by uniform |\n| --- | --- | --- | --- | --- |\n"
        "| `math` | `gsm8k/acc,none ↑` | 0.2 | 97 % | - |\n"
    )


def test_a_gap_is_marked_by_which_way_is_better() -> None:
    scores = {"base": [score(2.0, False)], "champion": [score(1.0, False)], "merged": [score(1.5, False)]}
    assert score_rows(scores) == [
        {
            "metric": "`gsm8k/exact_match,none` ↓",
            "`base`": "2",
            "`champion`": "1",
            "`merged`": "1.5",
            "vs base": "-0.5 ✓",
            "vs champion": "+0.5 ✗",
        }
    ]
    [row] = score_rows({"champion": [], "merged": [score(0.5)]})
    assert row["`champion`"] == row["vs champion"] == "-"


def test_names_stay_names() -> None:
    evil = "a|b`<img src=x onerror=alert(1)>` [x](javascript:1)\n# title"
    facts = RunFacts(
        recipe=evil,
        outcome=evil,
        why=evil,
        seconds=1,
        digest="a" * 64,
        changes=[Change(evil, None, NEW)],
        verdict=Verdict(False, (evil,), evil),
        means={evil: 0.5},
        scores={evil: [score(0.5)]},
        links={evil: "http://h/) <script>"},
    )
    text = to_markdown(facts)
    spans = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", text)  # what is left is read as Markdown
    assert not re.search(r"(?<!\\)<", spans) and not re.search(r"(?<!\\)\[x", spans)
    assert "# title" not in [line[:7] for line in text.splitlines()]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 5) for line in text.splitlines() if line.startswith("|"))


def test_small_words() -> None:
    assert short("sha256:" + "a" * 64) == "aaaaaaaa" and short(f"{OLD}+{NEW}") == "11111111+22222222"
    assert [duration(s) for s in (59.4, 59.6, 3599, 7440)] == ["59 s", "1 min 0 s", "59 min 59 s", "2 h 4 min"]


def test_a_champion_that_was_not_scored_again_has_the_scores_of_its_version() -> None:
    def model(label: str, *scores: Score) -> Scored:
        return Scored(label, label, scores, (), Ends({}, 0, 0, None))

    ours = model("lewis", score(0.5))
    held = {"gsm8k/exact_match,none": 0.4, "other/acc,none": 0.1}
    old = Score("gsm8k", "exact_match,none", 0.4, None, True, 200)
    assert score_columns([model("base"), ours], held) == {"champion": [old], "lewis": ours.scores}
    again = model("champion", score(0.3))
    assert list(score_columns([again, ours], held).items()) == [("champion", again.scores), ("lewis", ours.scores)]
    assert score_columns([], held) == {} and list(score_columns([ours])) == ["lewis"]


def test_the_outcome_says_which_version_is_in_use() -> None:
    passed, refused = Verdict(True, (), "x"), Verdict(False, (), "x")
    assert outcome("m/2", passed, "m/1", created=True) == "m/2 is the new champion."
    assert outcome("m/1", passed, "m/1", created=False) == "m/1 is the champion already; nothing to promote."
    assert outcome("m/2", refused, "m/1", created=True) == "m/2 was not promoted; m/1 stays."
    assert outcome("m/2", refused, None, created=False) == (
        "m/2, registered by an earlier run, was not promoted; none is yet."
    )
    assert outcome(None, None, "m/1", created=False) == "Merged; the recipe registers nothing."


def test_a_run_is_named_by_what_moved() -> None:
    names = {"org/math": "math", "org/base+org/code": "code"}
    math, on_base = Change("org/math", OLD, NEW), Change("org/base+org/code", f"{NEW}+{OLD}", f"{NEW}+{'3' * 40}")
    assert run_name("alpha", None, names, True) == "alpha: first merge"
    assert run_name("alpha", [Change("org/math", OLD, OLD)], names, False) == "alpha: nothing moved"
    assert run_name("alpha", [Change("org/math", None, NEW)], names, True) == "alpha: recipe edited"
    told = "alpha: math 111111 -> 222222, code 111111 -> 333333"
    assert run_name("alpha", [math, on_base], names, False) == told
    assert run_name("alpha", [math, on_base, Change("./new", f"sha256:{'4' * 64}", NEW)], {}, True) == (
        "alpha: recipe edited, org/math 111111 -> 222222, org/base+org/code 111111 -> 333333, 1 more"
    )
