"""The model card is parsed back, as the Hub does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lewis.reports import card


def score(metric: str, value: float) -> SimpleNamespace:
    return SimpleNamespace(task="gsm8k", metric=metric, value=value, stderr=0.02, higher_is_better=True)


def test_the_card_names_the_parents_on_the_hub_and_every_input() -> None:
    text = card.model_card(
        "tiny",
        method="ties",
        base="org/base@main",
        experts=["org/math", "local/code", "org/base@main+org/lora"],
        recipe="merge_method: ties\n",
        lineage={
            "org/base@main": "1" * 40,
            "org/math": "2" * 40,
            "local/code": "3" * 64,
            "org/base@main+org/lora": f"{'1' * 40}+{'4' * 40}",
            "gsm8k": "5" * 64,
        },
        mean_density={"org/math": 0.55},
        datasets=["openai/gsm8k", "openai/gsm8k"],
        scores=[{"model": "base", "acc ↑": "0.5"}],
        kept=[{"expert": "math", "task": "gsm8k/acc,none ↑", "kept": "97 %"}],
    )
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "base_model": ["org/base", "org/math", "org/lora"],
        "base_model_relation": "merge",
        "datasets": ["openai/gsm8k"],
        "pipeline_tag": "text-generation",
        "tags": ["merge", "lewis", "ties"],
    }
    for digest in ("1" * 40, "2" * 40, "3" * 64, "4" * 40, "5" * 64):
        assert digest in body
    assert f"| `org/math` | `{'2' * 40}` | 0.550 |" in body
    assert "## What is kept of each expert's gain\n\n| expert | task | kept |" in body
    assert "| math | gsm8k/acc,none ↑ | 97 % |" in body
    assert "| base | 0.5 |" in body and "```yaml\nmerge_method: ties\n```" in body


def test_the_card_of_an_adapter_names_its_base_and_its_error() -> None:
    told = "LoRA adapter of 14 modules, rank 4; it leaves a relative error of 0.2"
    lineage = {"org/base@main": "1" * 40, "org/math": "2" * 40}
    text = card.model_card(
        "tiny", method="ties", base="org/base@main", experts=["org/math"], recipe="", lineage=lineage, mean_density={},
        scores=[], adapter=told,
    )  # fmt: skip
    _, front, body = text.split("---\n", 2)
    assert (yaml.safe_load(front)["library_name"], yaml.safe_load(front)["base_model"]) == ("peft", ["org/base"])
    assert f"## The adapter\n\n{told}. The error" in body and f"It sits on `org/base` at `{'1' * 40}`" in body


def test_the_hub_reads_the_scores_of_the_card() -> None:
    from huggingface_hub import ModelCard

    text = card.model_card(
        "m",
        method="ties",
        base=None,
        experts=["./a"],
        recipe="{}",
        lineage={},
        mean_density={"./a": 0.5},
        scores=[],
        results=[score("exact_match,strict-match", 0.25), score("exact_match,flexible", 0.5)],
    )
    first, second = ModelCard(text).data.eval_results
    assert (first.dataset_name, first.metric_type, first.metric_name) == (
        "gsm8k",
        "exact_match",
        "exact_match,strict-match",
    )
    assert (first.metric_value, second.metric_value) == (0.25, 0.5) and "](density.png)" in text


def test_the_card_is_one_the_hub_accepts() -> None:
    from huggingface_hub import ModelCard

    text = card.model_card(
        "m",
        method="linear",
        base=None,
        experts=["./a"],
        recipe="{}",
        lineage={"./a": "1" * 64},
        mean_density={},
        scores=[],
    )
    assert ModelCard(text).data.tags == ["merge", "lewis", "linear"]
    assert (
        "base_model" not in text
        and "## Scores" not in text
        and "What is kept" not in text
        and "A merge of 1 expert by" in text
    )


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ("lewis", "by `ties`, with [LEWIS](https://arxiv.org/abs/2503.03874) densities."),
        ("uniform", "by `ties`, with uniform densities."),
        ("", "by `ties`.\n"),
    ],
)
def test_the_card_says_how_the_densities_were_found(strategy: str, told: str) -> None:
    named = {"base": "org/b", "experts": ["org/a"], "recipe": "{}", "lineage": {}, "scores": []}
    assert told in card.model_card("m", method="ties", **named, mean_density={}, strategy=strategy)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# A", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n# A", "llama3 (LICENSE)"),
        ("---\nlanguage: en\n---\n# A", None),
        ("---\nlicense: [a, b]\n---\n# A", None),
        ("---\n: {\n---\n# A", None),
        ("# A\n\n---\nlicense: mit\n---\n", None),
        (None, None),
    ],
)
def test_a_licence_is_what_the_parents_card_states(text: str | None, licence: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert card.licence_of(tmp_path) == licence


def test_the_licences_of_the_parents_are_told_and_those_without_named() -> None:
    from huggingface_hub import ModelCard

    def made(**licences: str | None) -> ModelCard:
        named = {"method": "ties", "base": None, "experts": [*licences], "recipe": "{}", "lineage": {}}
        return ModelCard(card.model_card("m", **named, mean_density={}, scores=[], licences=licences))

    mixed = made(a="mit", b="apache-2.0", c=None)
    assert mixed.data.license is None
    assert "| `a` | mit |" in mixed.text and "| `c` | none stated |" in mixed.text
    assert "Ask the authors of `c` before you share it." in mixed.text
    same = made(a="mit", b="mit")
    assert same.data.license == "mit" and "Ask the authors" not in same.text
    assert made(a=None, b=None).data.license is None
    assert "| `` a`b `` | mit |" in made(**{"a`b": "mit"}).text
