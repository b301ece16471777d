"""YAML that nobody meant, or that was made to do harm: refused in a moment, by the name of the file and the limit."""

import random
from pathlib import Path

import pytest

from lewis.errors import InputError, RecipeError
from lewis.recipe import yaml_text
from lewis.recipe.recipe import Recipe
from lewis.recipe.yaml_text import MAX_BYTES, load

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
CHAIN = "a0: &a0 [" * 1 + "x]\n" + "".join(f"a{i}: &a{i} [[[[[*a{i - 1}]]]]]\n" for i in range(1, 12))
LONG = f"a: &a {'x' * 900_000}\nb: [{', '.join(['*a'] * 20)}]"


pytestmark = pytest.mark.timeout(60)  # what hangs fails


@pytest.fixture(autouse=True)
def _fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """To count to the real limit takes three seconds."""
    monkeypatch.setattr(yaml_text, "MAX_VALUES", 10_000)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[" * 2000, "nested more than 50 deep"),
        ("[" * 900_000, "nested more than 50 deep"),
        ("{a: " * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ("- " * 60 + "x", "nested more than 50 deep"),
        (CHAIN, "nested more than 50 deep"),
        (LAUGHS, "more than 10,000 values, what aliases repeat included"),
        (MERGES, "more than 10,000 values"),
        (LONG, "more than 10,000 values"),
        (f"a: [{'1,' * 200_000}]", "more than 10,000 values"),
        ("a: &a [*a]", r"\*a refers to the block that it is in"),
        ("a: *b", "undefined alias"),
        ("#" * (MAX_BYTES + 1), "expected at most 1,000,000 bytes"),
        (f"a: {'9' * 100_000}", "expected a value of at most 1000 characters, got 100000"),
        (f"a: 1{':00' * 100_000}", "expected a value of at most 1000 characters"),
        ("a: 2024-13-45", "not valid YAML: ValueError: month must be in 1..12"),
        ('a: !!int ""', "not valid YAML: "),
        ("a: !!bool x", "not valid YAML: "),
        ("a: !!timestamp x", "not valid YAML: "),
        ("? [a]\n: b", "not valid YAML: .*unhashable key"),
        ('a: "\\ud800"', "half of a surrogate pair, line 1"),
        ("a: !!python/object/apply:os.system [id]", "not valid YAML: could not determine a constructor"),
        ("{a: 1, b: 2, a: 3}", "the key 'a' is given twice"),
    ],
)
def test_it_is_refused_at_once(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=expected) as caught:
        Recipe.load(path)
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


def test_many_problems_are_told_in_part() -> None:
    keys = "".join(f"k{i}: 1\n" for i in range(2000))
    with pytest.raises(RecipeError, match=r"and [0-9]+ problems more"):
        Recipe.parse(f"merge_method: ties\n{keys}", root=Path("/"))


def test_what_is_fine_stays_so() -> None:
    assert load('{a: "\\ud83d\\ude00", b: [1, 1.5, yes, null, 2024-01-02], c: &c {d: 1}, e: *c}', "x")["a"] == "😀"
    assert load("a: &a {b: 1}\nc: {<<: *a}", "x") == {"a": {"b": 1}, "c": {"b": 1}}


def test_set_changes_one_place_of_an_alias() -> None:
    """Every model whose block is the same by an alias got the value."""
    text = "{merge_method: ties, base_model: a, models: [{model: b, parameters: &p {weight: 1}}, "
    text += "{model: c, parameters: *p}]}"
    found = Recipe.parse(text, root=Path("/"), overrides=["models[0].parameters.weight=2"])
    assert [each.parameters["weight"][0].value for each in found.models] == [2, 1]


@pytest.mark.parametrize("setting", ["seed=" + "[" * 2000, "seed=2024-13-45", "models[²].model=x", "models.²=x"])
def test_set_has_the_same_limits(setting: str) -> None:
    with pytest.raises(InputError, match=r"--set |unknown key"):
        Recipe.parse("{merge_method: ties, base_model: a, models: [{model: b}]}", root=Path("/"), overrides=[setting])


@pytest.mark.parametrize(
    "text",
    [
        "models: [{model: a, parameters: 5}]\nmerge_method: slerp",
        "lewis: {density: {strategy: [owl]}}",
        "lewis: {calibrations: {1: {texts: [a]}, 2: {texts: [b]}}}\nmodels: [{model: a}, {model: b, calibration: [1]}]",
        "lewis: {calibrations: [a, b]}",
        "lewis: {calibrations: {a: {dataset: [json], data_files: [[a]], text: [x]}}}",
        "merge_method: [recommended]",
        "evaluate: {tasks: [a], backend: [hf]}",
    ],
)
def test_lists_in_odd_places_are_told(text: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.parse(text, root=Path("/"))


def test_a_long_wrong_value_is_cut_in_the_message() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(f"seed: {'x' * 50_000}", root=Path("/"))
    assert max(map(len, caught.value.problems)) < 1000


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x.yaml", "a\0b.yaml", "\udcff.yaml", "x" * 300])
def test_a_path_that_is_none_is_told(name: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.load(name)


def test_libyaml_reads_plain_text_as_pyyaml_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = "a|b: |: |-|- |\n|\n  |\n- |[|]|{|}|, |\"|'| # c|--- |\n---\n|...|1|.5|~|no|k: v\n|  - y\n|<<: "
    pieces += "|{a: b:c}|12:30|2024-01-02"
    draw, read = random.Random(0), 0
    for _ in range(3000):
        text = "".join(draw.choices(pieces.split("|"), k=draw.randrange(1, 12)))
        if found := yaml_text._load_plain(text):
            assert repr(found) == repr(yaml_text.load_all(text, "mine", yaml_text._StrictLoader)), repr(text)
            read += 1
    assert read > 500
    for text in ("a: *b", "a:\tb", "a: ü", "[", "{a: 1, a: 2}", "- " * 60 + "x"):  # PyYAML decides
        assert yaml_text._load_plain(text) == []
    monkeypatch.setattr(yaml_text, "load_all", None)  # not asked for plain text
    assert yaml_text.read("models: [{model: x, parameters: {density: 0.5}}]", "mine")["models"][0]["model"] == "x"
