"""Any recipe that the schema allows is planned, or refused in the product's own words, quickly and before any work."""

import json
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lewis.allocators import ALLOCATORS
from lewis.errors import LewisError
from lewis.methods.registry import METHODS
from lewis.recipe.recipe import Recipe
from lewis.steps.plan import make_plan
from lewis.store import kinds
from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.faults.fuzz import DRAWS, fuzzed, outcome

SECONDS, WAIT = 2.0, 30.0  # of the processor, and in all, for one recipe
SHARE = 0.1  # of the recipes that are planned, at least: it is a quarter
MADE = (  # what takes time; a plan makes calibration sets, on which later steps depend
    *(kinds.MERGED, kinds.IMPORTANCE, kinds.GRAMS, kinds.ALLOCATIONS, kinds.SCORES),
    *(kinds.INSPECTIONS, kinds.PICTURES, kinds.ANSWERS, kinds.GGUF),
)
TASK = {
    "task": "words",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": "words.jsonl"},
    "test_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["w1", "w2"],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SCHEMA = Recipe.model_json_schema()
NAMES: dict[str, list[Any]] = {  # what a key is given next to what its type allows
    "merge_method": [*METHODS, "recommended", "tise"],
    "strategy": [*ALLOCATORS, "lewsi"],
    "base_model": ["base", "base", "base", "gone"],
    "model": ["base", "math", "code", "lora", "base+lora", "math", "code", "gone", "org/not-here", ".", "words.yaml"],
    "source": ["base", "union", "math", "gone"],
    "tokenizer_source": ["base", "union", "math", "gone"],
    "calibration": ["sums", "sums", "others"],
    "dataset": ["json", "org/not-here", None],
    "data_files": ["words.jsonl", "gone.jsonl"],
    "tasks": [["words.yaml"], ["words"], ["gone.yaml"], []],
    "baselines": [["base"], ["base", "experts", "uniform"], ["champion"]],
    "metric": ["words/acc,none", "weighted/mean,none", "norm_difference", "x"],
    "metrics": [[], ["words/acc,none"], ["x"]],
    "filter": ["mlp", "self_attn", "embed_tokens", None],
    "name": ["tiny", "..", "x" * 300],
    "repo": ["org/x"],
    "chat_template": ["auto", "{{ messages }}", "{% for"],
    "preset": ["lewis_official", None, None],
    "layer_range": [[0, 1], [1, 2], [0, 2], [2, 1], [0, 99]],
    "calibrations": [{"sums": {"texts": ["w1 w2", "w3"], "samples": 2}}] * 3,
}
USUAL = ("linear", "task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "recommended")
KEYS = {
    "parameters": ["weight", "density", "lambda", "normalize", "t", "gamma", "epsilon", "wieght"],
    "calibrations": ["sums", "others"],
    "space": ["parameters.lambda", "lewis.density.min", "merge_method", "seed", "x.y"],
    "tokens": ["<x>", "w1"],
}


def value(schema: Mapping[str, Any], key: str = "") -> st.SearchStrategy[Any]:
    """Values that a JSON schema allows, some at or next to its bounds; what a key stands for is one of `NAMES`."""
    if "$ref" in schema:
        return value(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], key)
    if key in NAMES and schema.get("type") != "object":
        return st.sampled_from(NAMES[key])
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return st.one_of([value(each, key) for each in schema[choice]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    make: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "null": st.none,
        "boolean": st.booleans,
        "string": lambda: st.sampled_from(["a", "w1 w2", "{question} {answer}", "base", "x/y"]),
        "integer": lambda: number(schema, [0, 1, 2, 7, 4096]),
        "number": lambda: number(schema, [0.0, 0.1, 0.5, 0.9, 1.0, 2.5]),
        "array": lambda: st.lists(value(schema.get("items", {"type": "number"})), min_size=1, max_size=3),
        "object": lambda: mapping(schema, key),
    }
    return make[schema.get("type", "null")]()


def number(schema: Mapping[str, Any], usual: list[Any]) -> st.SearchStrategy[Any]:
    bounds = [schema[name] for name in schema if name in ("minimum", "maximum", "exclusiveMinimum")]
    return st.sampled_from([*usual * 3, *bounds, *(bound + 1 for bound in bounds), *(bound - 1 for bound in bounds)])


def mapping(schema: Mapping[str, Any], key: str) -> st.SearchStrategy[Any]:
    if "properties" not in schema:
        rest = schema.get("additionalProperties")
        rest = rest if isinstance(rest, dict) else {"type": "number"}
        return st.dictionaries(st.sampled_from(KEYS.get(key, ["words", "a"])), value(rest), max_size=3)
    fields = {name: value(each, name) for name, each in schema["properties"].items()}
    needed = {name: fields.pop(name) for name in schema.get("required", ())}
    names = st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True) if fields else st.just([])
    chosen = names.flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))
    whole = st.builds(lambda a, b: {**a, **b}, st.fixed_dictionaries(needed), chosen)
    if key in NAMES:
        return st.one_of(st.sampled_from(NAMES[key]), whole)
    return whole


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe that is right; then up to three of its keys, or further blocks, are of any kind, and one is left out."""
    fields = SCHEMA["properties"]
    experts = draw(st.lists(st.sampled_from(["math", "code", "lora"]), min_size=2, max_size=3, unique=True))
    data: dict[str, Any] = {"merge_method": draw(st.sampled_from(USUAL)), "base_model": "base"}
    data["models"] = [{"model": each, "parameters": {"weight": 0.5}} for each in experts]
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)):
        data[name] = draw(value(fields[name], name))
    if draw(st.integers(0, 9)) == 0:
        data.pop(draw(st.sampled_from(sorted(data))))
    return data


@pytest.fixture(scope="module")
def root(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's folder with the models, a task and data."""
    folder = tmp_path_factory.mktemp("plans")
    for name in ("base", "math", "code", "lora"):
        (folder / name).symlink_to(getattr(family, name), target_is_directory=True)
    (folder / "words.yaml").write_text(json.dumps(TASK))
    (folder / "words.jsonl").write_text('{"question": "w1 w2", "answer": "w3"}\n' * 4)
    return folder


@pytest.mark.usefixtures("lm_eval_tasks")
def test_any_recipe(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(root)
    blocks = {"lewis": {"calibrations": NAMES["calibrations"][0]}, "evaluate": {"tasks": ["arc_easy"]}}
    usual = {"merge_method": "ties", "base_model": "base", "models": [{"model": "math"}], **blocks}
    for way in (plan, command):
        way(root, usual)  # imports
    tried = planned = 0

    @settings(fuzzed, max_examples=DRAWS if DRAWS > 1000 else DRAWS // 3)  # each takes 0.1 s
    @given(data=recipes(), way=st.sampled_from([plan, plan, plan, command]))
    def run(data: dict[str, Any], way: Callable[[Path, dict[str, Any]], str]) -> None:
        nonlocal tried, planned
        began, worked = time.monotonic(), processor()
        found = outcome(lambda: way(root, data))
        waited, taken = time.monotonic() - began, processor() - worked
        assert taken < SECONDS and waited < WAIT, f"{taken:.1f} s of the processor, {waited:.1f} s in all: {data}"
        tried += 1
        planned += not isinstance(found, LewisError) and bool(found)
        made = [path.relative_to(tmp_path) for kind in MADE for path in kind.entries()]
        assert not made and not (tmp_path / "home" / "mlflow").exists(), (made, data)

    run()
    assert planned > SHARE * tried


def processor() -> float:
    """Seconds of the processor that this process and its ended children have taken."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def plan(root: Path, data: Mapping[str, Any]) -> str:
    """The text of a plan."""
    found = make_plan(Recipe.parse(json.dumps(data), root=root))
    json.dumps(found.to_json())
    return found.to_text()


def command(root: Path, data: Mapping[str, Any]) -> str:
    """What `lewis plan` prints; nothing if it refuses the recipe."""
    file = root / "drawn.yaml"
    file.write_text(json.dumps(data))
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(["plan", str(file)])
    assert code in (0, 1, 2) and "Traceback" not in out.getvalue() + err.getvalue()
    assert bool(out.getvalue()) == (code == 0) and (code == 0 or err.getvalue())
    return out.getvalue()
