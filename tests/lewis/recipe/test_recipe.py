"""Recipes: mergekit's YAML runs unchanged, and every mistake is told at once, where it is, with what was meant."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis.errors import InputError, RecipeError
from lewis.methods import METHODS
from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import Gate

PLAIN = """
merge_method: ties
base_model: org/base@abc
models:
  - model: org/base@abc
  - model: org/math
    parameters: {weight: 0.5, density: [0.2, 0.6]}
  - model: org/code
    parameters:
      weight:
        - {filter: self_attn, value: 2}
        - {filter: mlp, value: [0, 1]}
parameters: {normalize: true, weight: 3, lambda: 1.5}
dtype: bfloat16
"""
GUIDED = (
    PLAIN
    + """
lewis:
  calibrations:
    sums: {texts: [one, two], samples: 2}
"""
)


def parse(text: str, *overrides: str) -> Recipe:
    return Recipe.parse(text, root=Path("/"), overrides=overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    return list(caught.value.problems)


def value(recipe: Recipe, name: str, expert: int, tensor: str, position: float = 0.0) -> Any:
    return recipe.value(METHODS[recipe.merge_method].parameters[name], recipe.experts[expert], tensor, position)


class TestMergekitConfigs:
    def test_the_base_may_be_listed(self) -> None:
        assert [entry.model for entry in parse(PLAIN).experts] == ["org/math", "org/code"]

    def test_precedence_is_the_models_own_then_the_top_level_then_the_default(self) -> None:
        recipe = parse(PLAIN)
        assert value(recipe, "weight", 0, "lm_head.weight") == 0.5
        assert value(recipe, "weight", 1, "model.layers.0.self_attn.q_proj.weight") == 2
        assert value(recipe, "weight", 1, "model.layers.0.mlp.up_proj.weight", 0.25) == 0.25
        assert value(recipe, "weight", 1, "lm_head.weight") == 3  # no filter matches: the top level holds
        assert value(recipe, "density", 0, "x", 0.5) == pytest.approx(0.4)
        assert value(recipe, "density", 1, "x") == 1
        assert value(recipe, "lambda", 0, "x") == 1.5
        assert value(recipe, "rescale", 0, "x") is False

    def test_a_linear_merge_takes_the_base_with_the_top_levels_weight(self) -> None:
        recipe = parse("{merge_method: linear, base_model: b, models: [{model: a}], parameters: {weight: 0.5}}")
        assert [entry.model for entry in recipe.experts] == ["a", "b"]
        assert value(recipe, "weight", 1, "x") == 0.5

    def test_a_linear_merge_needs_no_base(self) -> None:
        recipe = parse("{merge_method: linear, models: [{model: a}, {model: b}], parameters: null}")
        assert [entry.model for entry in recipe.experts] == ["a", "b"]

    def test_models_may_be_written_as_mappings(self) -> None:
        text = """
            {merge_method: linear, models: [{model: {model: {path: org/a, revision: v1}, lora: {path: org/l}}},
            {model: {path: org/b}}], parameters: {weight: 1}}"""
        assert [entry.model for entry in parse(text).models] == ["org/a@v1+org/l", "org/b"]

    def test_a_base_that_is_written_as_a_mapping_is_known_among_the_models(self) -> None:
        text = (
            "{merge_method: linear, base_model: {path: b}, models: [{model: b}, {model: a}], parameters: {weight: 1}}"
        )
        assert [entry.model for entry in parse(text).experts] == ["b", "a"]
        text = (
            "{merge_method: ties, base_model: {path: b}, tokenizer_source: a, models: [{model: b}, {model: {path: a}}]}"
        )
        assert [entry.model for entry in parse(text).experts] == ["a"]

    def test_is_loaded_from_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "nightly.yaml").write_text(GUIDED)
        recipe = Recipe.load(tmp_path / "nightly.yaml")
        assert (recipe.root, recipe.name, recipe.text) == (tmp_path, "nightly", GUIDED)
        assert recipe.guided and not parse(PLAIN).guided
        assert recipe.calibration_of(recipe.experts[0]) == "sums"

    def test_blocks_leave_scoring_and_registering_out(self) -> None:
        scored = GUIDED + "evaluate: {tasks: [gsm8k]}\nregister: {name: x}\n"
        assert parse(scored).blocks == parse(GUIDED).blocks != parse(PLAIN).blocks


class TestMistakes:
    def test_all_are_told_in_one_go(self) -> None:
        """Of the words and numbers, of keys of one block, and of what spans blocks."""
        found = problems(
            """
            merge_method: tis
            base_model: b
            models: [{model: a, parameters: {weight: 1}, calibraton: x, calibration: t}]
            dtypes: bfloat16
            seed: many
            lewis: {calibrations: {s: {texts: [a], sample: 3}}, density: {min: 0.9, max: 0.8}}
            publish: {repo: org/x}
            """
        )
        assert [problem.partition(":")[0] for problem in found] == [
            "merge_method",
            "models[0].calibraton",
            "seed",
            "lewis.calibrations.s.sample",
            "lewis.density.min",
            "dtypes",
            "models[0].calibration",
            "publish",
        ]

    @pytest.mark.parametrize(
        "change, expected",
        [
            (
                {"chat_template": f"{{{{ {'(' * 2000}1{')' * 2000} }}}}"},
                "chat_template: not a valid Jinja template: nest",
            ),
            ({"register": {"name": "x" * 10_000}}, "register.name: string should have at most 200 characters"),
            (
                {"register": {"name": "x", "gate": {"metric": "m", "min_gain": -(10**400)}}},
                "register.gate: `min_gain` below 0 asks for no gain: write `policy: not_worse` and `tolerance: 1000",
            ),
        ],
    )
    def test_one_that_is_too_long_for_the_table_is_reported(self, change: dict[str, Any], expected: str) -> None:
        assert problems(yaml.safe_dump(yaml.safe_load(PLAIN) | change))[0].startswith(expected)

    def test_a_preset_fills_what_the_recipe_leaves_out(self) -> None:
        text = (
            PLAIN + "lewis: {preset: lewis_official, calibrations: {s: {texts: [a], samples: 4}}, density: {max: 0.7}}"
        )
        block = Recipe.parse(text, root=Path("/")).lewis
        assert block is not None
        calibration = block.calibrations["s"]
        assert (calibration.samples, calibration.max_tokens, calibration.seed) == (4, 512, 42)
        assert calibration.padding == "max_tokens"
        assert (block.importance.prune_ratio, block.importance.reduce) == (0.5, "sum")
        assert (block.density.min, block.density.max, block.density.decimals) == (0.3, 0.7, 5)

    @pytest.mark.parametrize("density", ["min: 0.9, budget: 0.95", "max: 0.2, budget: 0.1"])
    def test_the_default_bounds_do_not_apply_to_one_density_for_all(self, density: str) -> None:
        block = f"lewis: {{density: {{strategy: uniform, {density}}}}}"
        assert parse(f"{{base_model: b, merge_method: ties, models: [{{model: a}}], {block}}}").lewis

    @pytest.mark.parametrize(
        "text",
        [
            "slerp, models: [{model: a}, {model: b}], parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}",
            "nuslerp, models: [{model: a}, {model: c}]",
            "della, models: [{model: a}, {model: b, parameters: {density: 0.99}}], parameters: {density: 0.5}",
            "della, models: [{model: a}], parameters: {density: 1.0}",
            "della, models: [{model: a, parameters: {density: [{filter: x, value: 0.9}], epsilon: 0.05}}]",
            "della, models: [{model: a}], parameters: {density: [0.9, 0.5], epsilon: [0.05, 0.2]}",
            "della, models: [{model: a}], lewis: {calibrations: {s: {texts: [x]}}}",
        ],
    )
    def test_what_fits_is_taken(self, text: str) -> None:
        Recipe.parse(f"{{base_model: b, merge_method: {text}}}", root=Path("/"))

    def test_filters_that_leave_a_required_parameter_out(self) -> None:
        text = (
            "{merge_method: slerp, base_model: b, models: [{model: a}], parameters: {t: [{filter: mlp, value: 0.5}]}}"
        )
        recipe = Recipe.parse(text, root=Path("/"))
        t = METHODS["slerp"].parameters["t"]
        assert recipe.value(t, None, "model.layers.0.mlp.up_proj.weight", 0.0) == 0.5
        with pytest.raises(
            RecipeError, match=r"parameters.t: no filter matches 'model.norm.weight'; end the list with"
        ):
            recipe.value(t, None, "model.norm.weight", 0.0)

    def test_whole_numbers_of_a_gradient_are_picked(self) -> None:
        text = "{merge_method: karcher, models: [{model: a}, {model: b}], parameters: {max_iter: [1, 4]}}"
        recipe = Recipe.parse(text, root=Path("/"))
        found = [recipe.value(METHODS["karcher"].parameters["max_iter"], None, "x", depth) for depth in (0.0, 0.6, 1.0)]
        assert found == [1, 1, 4]

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("a: [", "not valid YAML"),
            ("- a", "expected a mapping with `merge_method` and `models`, got list"),
            ("", "got an empty text"),
            ("models:\n\t- model: a", "; YAML is indented with spaces, not tabs"),
            ("seed: 1\n\nseed: 2", "the key 'seed' is given twice, lines 1 and 3"),
            ("{[1]: 2}", "not valid YAML"),
        ],
    )
    def test_text_that_is_no_recipe(self, text: str, expected: str) -> None:
        (problem,) = problems(text)
        assert expected in problem

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="cannot be read: No such file"):
            Recipe.load(tmp_path / "absent.yaml")
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
        with pytest.raises(RecipeError, match="expected UTF-8 text"):
            Recipe.load(tmp_path / "binary.yaml")


class TestFilters:
    TENSORS = (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    )

    def test_those_that_match_pass(self) -> None:
        parse(PLAIN).check_filters(self.TENSORS, {})

    def test_each_that_matches_nothing_is_named(self) -> None:
        text = PLAIN.replace("filter: self_attn", "filter: self_atn.q_proj").replace(
            "weight: 3", "weight: [{filter: up_prj, value: 1}]"
        )
        with pytest.raises(RecipeError) as caught:
            parse(text).check_filters(self.TENSORS, {})
        first, second = caught.value.problems
        assert first.startswith(
            "models[2].parameters.weight[0].filter: 'self_atn.q_proj' matches no tensor; did you mean 'self_attn.q_proj"
        )
        assert second.startswith("parameters.weight[0].filter: 'up_prj' matches no tensor")


class TestOverrides:
    def test_change_any_key(self) -> None:
        recipe = parse(
            GUIDED,
            "lewis.density.max=0.7",
            "models[1].parameters.weight=0.25",
            "models.2.parameters.weight=null",
            "evaluate.tasks=[a, b]",
            "parameters.lambda = 2",
            "models.2.parameters.weight={filter: mlp, value: 1e-1}",
        )
        assert recipe.lewis is not None and recipe.lewis.density.max == 0.7
        assert value(recipe, "weight", 0, "x") == 0.25
        assert value(recipe, "weight", 1, "mlp") == 0.1
        assert recipe.evaluate is not None and recipe.evaluate.tasks == ("a", "b")
        assert value(recipe, "lambda", 0, "x") == 2
        assert parse(recipe.text) == recipe

    def test_are_checked_as_the_rest(self) -> None:
        assert problems(GUIDED, "lewis.density.maxx=0.7") == ["lewis.density.maxx: unknown key; did you mean 'max'?"]

    @pytest.mark.parametrize(
        "override, expected",
        [
            ("lewis.density.max", "expected key.path=value"),
            ("=5", "expected key.path=value"),
            ("a..b=5", "expected key.path=value"),
            ("seed=[", "not valid YAML"),
            ("models[7].model=a", "there is no models.7 in the recipe"),
            ("models.first=a", "there is no models.first in the recipe"),
            ("dtype.x=1", "dtype is 'bfloat16', not a block"),
            ("lewis.0=1", "there is no lewis.0 in the recipe"),
        ],
    )
    def test_bad_ones_are_refused(self, override: str, expected: str) -> None:
        with pytest.raises(InputError) as caught:
            parse(GUIDED, override)
        assert str(caught.value).startswith(f"--set {override}: ") and expected in str(caught.value)


def test_recommended_stands_for_a_method() -> None:
    block = "lewis: {calibrations: {a: {texts: [x], samples: 1}}}\n"
    recipe = Recipe.parse(f"merge_method: recommended\nbase_model: b\nmodels: [{{model: m}}]\n{block}", root=Path("/"))
    assert recipe.merge_method == "regmean_forward" and recipe.fits


@pytest.mark.parametrize("written", ["./math", "math/", "other/../math", "{root}/math", "linked", "math+lora/"])
def test_a_model_by_another_path_does_not_count_twice(tmp_path: Path, written: str) -> None:
    for name in ("math", "other", "lora", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked").symlink_to("math")
    first = "math+lora" if "+" in written else "math"
    data = {"merge_method": "ties", "base_model": "base"}
    models = [{"model": first}, {"model": written.format(root=tmp_path)}]
    with pytest.raises(RecipeError, match=r"^models\[1\]\.model: .* is models\[0\]\.model 'math"):
        Recipe.parse(yaml.safe_dump({**data, "models": models}), root=tmp_path)
    with pytest.raises(RecipeError, match=r"^models\[1\]\.model: 'base/' is base_model 'base', written in another way"):
        Recipe.parse(yaml.safe_dump({**data, "models": [models[0], {"model": "base/"}]}), root=tmp_path)


@pytest.mark.parametrize(
    ("first", "written"),
    [
        ("m.gguf", "./m.gguf"),
        ("m.gguf", "linked.gguf"),
        ("org/x", "Org/X"),
        ("org/x", "org/x@main"),
        ("org/x@v1", "org/X@v1"),
    ],
)
def test_a_file_or_a_repo_by_another_name_does_not_count_twice(tmp_path: Path, first: str, written: str) -> None:
    (tmp_path / "m.gguf").touch()
    (tmp_path / "linked.gguf").symlink_to("m.gguf")
    text = yaml.safe_dump({"merge_method": "linear", "models": [{"model": first}, {"model": written}]})
    with pytest.raises(RecipeError, match=r"models\[1\]\.model: .* is models\[0\]\.model .*, written in another way"):
        Recipe.parse(text, root=tmp_path)


def test_a_model_of_slices_by_another_name_does_not_count_twice(tmp_path: Path) -> None:
    sources = [{"model": name, "layer_range": [0, 2]} for name in ("org/x", "org/y", "org/X")]
    data = {
        "merge_method": "ties",
        "base_model": "org/base",
        "slices": [{"sources": sources[:2]}, {"sources": sources}],
    }
    with pytest.raises(
        RecipeError, match=r"slices\[1\]\.sources\[2\]\.model: 'org/X' is slices\[0\]\.sources\[0\]\.model 'org/x'"
    ):
        Recipe.parse(yaml.safe_dump(data), root=tmp_path)
    for each in ("org/x@v1", "org/x@V1"), ("a/X", "b/x"), ("org/x", "org/x@v1"):
        text = yaml.safe_dump({"merge_method": "linear", "models": [{"model": name} for name in each]})
        assert len(Recipe.parse(text, root=tmp_path).models) == 2


def test_a_gate_asks_for_no_gain_unless_the_recipe_does() -> None:
    def policy(**gate: Any) -> str:
        return Gate(metric="m", **gate).policy

    assert policy() == policy(policy="not_worse") == policy(policy="not_worse", min_gain=0.0) == "not_worse"
    assert policy(min_gain=0.0) == policy(policy="better") == policy(policy="better", min_gain=0.1) == "better"
