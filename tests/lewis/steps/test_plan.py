"""What a run would do, against what a run then does; nothing heavy is downloaded for it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lewis import library, store
from lewis.devices import default_device
from lewis.errors import InputError
from lewis.evaluation.harness import builtin_tasks
from lewis.importance.calibration import Calibration
from lewis.importance.step import CalibrationInput, ImportanceEntry, find_calibration
from lewis.recipe.recipe import Recipe
from lewis.steps.plan import Plan, make_plan
from tests.conftest import Family
from tests.support import pipeline
from tests.support.local_hub import LocalHub
from tests.support.models import WORDS, parse, write_llama, write_tokenizer

SETS = {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}


def recipe_of(base: Path | str, *experts: Path | str, **blocks: Any) -> Recipe:
    models = [{"model": str(expert)} for expert in experts]
    return parse({"merge_method": "ties", "base_model": str(base), "models": models} | blocks)


def states(plan: Plan) -> dict[str, str]:
    """Without checks and calibration sets, which `test_graph` looks at."""
    left_out = ("inspect", "diagnose", "calibrate ")
    return {step.name: step.state for step in plan.steps if not step.name.startswith(left_out)}


def carry_out(recipe: Recipe, *, merge: bool) -> None:
    base, experts = pipeline.pin_all(recipe)
    assert base is not None
    files, expert_files = pipeline.download(base), [pipeline.download(source) for source in experts]
    _, allocated = pipeline.guide(recipe, files, expert_files, device=default_device())
    if merge:
        pipeline.merge(recipe, files, expert_files, allocated)


class TestLocal:
    @pytest.mark.slow
    def test_before_during_and_after_a_run(self, family: Family, home: Path) -> None:
        recipe = recipe_of(family.base, *family.experts, lewis={"calibrations": SETS}, register={"name": "x"})
        downloads = {f"download {path.name}": "cached" for path in (family.base, *family.experts)}
        work = [f"measure {path.name}" for path in (family.base, *family.experts)] + ["allocate"]
        ends = {"merge experts": "to do", "register x": "to do"}
        before = make_plan(recipe)
        assert states(before) == downloads | dict.fromkeys(work, "to do") | ends
        assert not (home / "importance").exists() and not (home / "merged").exists()
        carry_out(recipe, merge=False)
        assert states(make_plan(recipe)) == downloads | dict.fromkeys(work, "cached") | ends
        carry_out(recipe, merge=True)
        after = make_plan(recipe)
        assert states(after) == downloads | dict.fromkeys(work, "cached") | ends | {"merge experts": "cached"}
        assert (before.disk > 0, after.disk) == (True, 0)
        assert before.seconds and after.seconds == 0
        changed = recipe_of(family.base, *family.experts, lewis={"calibrations": SETS, "density": {"max": 0.7}})
        assert states(make_plan(changed))["allocate"] == states(make_plan(changed))["merge experts"] == "to do"

    @pytest.mark.slow
    def test_a_guided_anchor_is_measured_and_allocated_like_a_merge_by_its_method(
        self, family: Family, home: Path
    ) -> None:
        anchored = {"merge_method": "regmean_forward", "anchor": {"merge_method": "ties"}}
        guided = {"calibrations": SETS, "density": {"strategy": "owl", "budget": 0.5}}
        recipe = recipe_of(family.base, *family.experts, **anchored, lewis=guided)
        work = [f"measure {path.name}" for path in family.experts] + ["allocate", "merge experts"]
        before = make_plan(recipe)
        assert before.method == "regmean_forward, anchor ties" and before.seconds
        assert {states(before)[name] for name in work} == {"to do"}
        carry_out(recipe, merge=True)
        assert {states(make_plan(recipe))[name] for name in work} == {"cached"}
        plain = make_plan(recipe_of(family.base, *family.experts, **anchored, lewis={"calibrations": SETS}))
        assert "allocate" not in states(plain) and states(plain)["merge experts"] == "to do"

    def test_where_the_hub_is_away_what_is_known_of_the_local_models_is_shown(
        self, family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was one line, about a dataset that the recipe of `lewis new` names."""
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        for method in ("regmean_forward", "regmean", "ties"):
            sets = {"far": {"dataset": "org/rows", "text": "{text}"}}
            recipe = recipe_of(family.base, *family.experts, merge_method=method, lewis={"calibrations": sets})
            plan = make_plan(recipe)
            assert len(plan.inputs) == 3 and plan.tensors and plan.layers
            assert "not known yet: lewis.calibrations.far: dataset org/rows: 127.0.0.1:1 is unreach" in plan.warning
            found = [step for step in plan.steps if step.name.split()[0] in ("calibrate", "measure", "merge")]
            assert len(found) >= 2 and {step.state for step in found} == {"to do"}
            assert (plan.seconds is None) == (method != "ties")  # any densities take as long

    def test_finding_the_ridge_takes_a_fit_for_each_that_is_tried(self, family: Family) -> None:
        lewis = {"calibrations": SETS}
        recipes = [
            recipe_of(family.base, *family.experts, merge_method="regmean_forward", lewis=lewis, parameters=each)
            for each in ({"ridge": 0.1}, {"ridge": "auto"})
        ]
        number, auto = (pipeline.prepare_merge(recipe, *pipeline.fetch(recipe)) for recipe in recipes)
        assert (number.fit_count, auto.fit_count) == (1, 5)

    @pytest.mark.slow
    def test_statistics_that_a_fit_needs(self, family: Family, home: Path) -> None:
        blocks: dict[str, Any] = {"merge_method": "regmean", "lewis": {"calibrations": SETS}}
        recipe = recipe_of(family.base, *family.experts, **blocks)
        work = [f"measure {path.name}" for path in family.experts]
        before = make_plan(recipe)
        assert states(before) == {
            f"download {p.name}": "cached" for p in (family.base, *family.experts)
        } | dict.fromkeys([*work, "merge experts"], "to do")
        merge = pipeline.prepare_merge(recipe, *(files := pipeline.fetch(recipe)))
        assert before.measuring > 0 and before.seconds
        assert "s, for statistics of the experts' inputs" in before.to_text()
        pipeline.guide(recipe, *files)
        after = make_plan(recipe)
        assert {states(after)[name] for name in work} == {"cached"} and after.disk == merge.size
        written = sum(path.stat().st_size for path in (home / "grams").glob("*/*.safetensors"))
        assert written / 3 < before.disk - after.disk < 3 * written and after.measuring == 0
        auto = make_plan(recipe_of(family.base, *family.experts, **(blocks | {"parameters": {"ridge": "auto"}})))
        assert auto.measuring > 0 and after.disk < auto.disk < before.disk  # passes over three of four rows
        sets = {name: {"texts": [f"w{i} w3" for i in range(8)]} for name in SETS}
        lewis = {"calibrations": sets, "hold_back": True}
        judged = make_plan(recipe_of(family.base, *family.experts, **blocks | {"lewis": lewis}))
        assert judged.measuring > 0 and not [name for name in states(judged) if name.startswith("measure")]
        carry_out(recipe, merge=True)
        for entry in (home / "grams").iterdir():
            store.discard(entry)
        assert states(make_plan(recipe))["merge experts"] == "cached"
        assert {states(make_plan(recipe))[name] for name in work} == {"to do"}

    @pytest.mark.slow
    def test_a_second_machine_fetches_what_the_first_made(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LEWIS_STORE", f"file://{tmp_path}/remote")
        monkeypatch.setenv("LEWIS_STORE_MERGED", "1")
        recipe = recipe_of(family.base, family.math, lewis={"calibrations": SETS})
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "one"))
        assert make_plan(recipe).to_push == make_plan(recipe).disk
        carry_out(recipe, merge=True)

        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "two"))
        before = make_plan(recipe)
        work = [f"measure {path.name}" for path in (family.base, family.math)]
        assert {states(before)[name] for name in [*work, "allocate"]} == {"cached"}  # what is small, it fetches
        assert states(before)["merge experts"] == "to fetch" and before.remote == f"file://{tmp_path}/remote"
        merged = (tmp_path / "one" / "merged").rglob("*")
        assert before.to_fetch == sum(path.stat().st_size for path in merged if path.is_file())
        assert "KB to fetch" in before.to_text() and not (tmp_path / "two" / "merged").exists()
        monkeypatch.setattr("lewis.importance.measure.measure_sets", None)
        monkeypatch.setattr("lewis.allocation.densities.allocate", None)
        monkeypatch.setattr("lewis.merging.run.Merge.run", None)
        carry_out(recipe, merge=True)
        one, two = (next((tmp_path / name / "merged").iterdir()) for name in ("one", "two"))
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        assert {states(make_plan(recipe))[name] for name in [*work, "allocate", "merge experts"]} == {"cached"}

        found = next((tmp_path / "two" / "importance").glob("*.json"))
        record = ImportanceEntry(ref="r", calibration="sums", digest=found.stem, path=found).model_dump_json()
        shutil.rmtree(tmp_path / "two" / "importance")
        again = ImportanceEntry.model_validate_json(record)  # a record of Prefect's cache whose entry is gone
        assert again.norms and again.moments

    def test_sizes(self, family: Family, home: Path) -> None:
        recipe = recipe_of(family.base, family.math, lewis={"calibrations": SETS}, dtype="bfloat16")
        plan = make_plan(recipe)
        assert [row["ref"] for row in plan.inputs] == [str(family.base), str(family.math)]
        assert plan.inputs[0]["commit"].startswith("sha256:")
        assert (plan.tensors, len(plan.layers)) == (20, 14)
        assert plan.disk == 2 * plan.parameters
        assert plan.disk_free > 0 and plan.memory > 100e6
        text = plan.to_text()
        assert "covered self_attn.q_proj: 2 layers (0 to 1)" in text
        assert "to do   measure base\n" in text
        assert f"time    about {plan.seconds:.1f} s, for the merges" in text
        data = plan.to_json()
        assert (data["covered_layers"], data["steps"][0]) == (
            14,
            {"name": "download base", "state": "cached"},
        )

    def test_a_merge_that_does_not_fit_on_the_disk_is_counted_once(
        self, family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"QUOTA": "1KB", "STORE": f"file://{tmp_path}/remote", "STORE_MERGED": "1"}.items():
            monkeypatch.setenv(f"LEWIS_{name}", value)
        plan = make_plan(recipe_of(family.base, family.math, dtype="bfloat16"))
        assert plan.seconds is None and plan.disk == plan.to_push == 2 * plan.parameters

    def test_what_configs_tell_of_models_that_do_not_belong_together(self, family: Family, tmp_path: Path) -> None:
        odd = shutil.copytree(family.code, tmp_path / "odd")
        (odd / "chat_template.jinja").write_text("{{ messages }}")
        plan = make_plan(recipe_of(family.base, family.math, odd))
        assert [(each["kind"], each["model"]) for each in plan.to_json()["findings"]] == [("chat template", str(odd))]
        assert f"warning: {odd}: chat template: it has a chat template, the base none\n  means: " in plan.to_text()
        assert make_plan(recipe_of(family.base, *family.experts)).findings == []

    def test_a_plain_merge(self, family: Family, home: Path) -> None:
        recipe = recipe_of(family.base, family.lora)
        plan = make_plan(recipe)
        assert states(plan) == {f"download {p.name}": "cached" for p in (family.base, family.lora)} | {
            "merge experts": "to do"
        }
        assert "covered none: a plain merge" in plan.to_text()
        base, experts = pipeline.pin_all(recipe)
        assert base is not None
        pipeline.merge(recipe, pipeline.download(base), [pipeline.download(source) for source in experts])
        assert states(make_plan(recipe))["merge experts"] == "cached"

    def test_a_fit_without_rows_is_no_plain_merge(self, family: Family, home: Path) -> None:
        models = [{"model": str(each)} for each in family.experts]
        plan = make_plan(parse({"merge_method": "regmean", "base_model": str(family.base), "models": models}))
        assert len(plan.layers) == 14 and "covered self_attn.q_proj: 2 layers" in plan.to_text()

    @pytest.mark.slow
    @pytest.mark.parametrize("parameters", [{}, {"ridge": "auto"}], ids=str)
    def test_prompts_that_are_not_continued_yet_are_named(
        self, family: Family, home: Path, parameters: dict[str, str]
    ) -> None:
        """Time and memory were those of the prompts, a small part of what the fit goes by, without a word."""
        prompts = {"texts": [f"w1 w{i}" for i in range(4)], "samples": 4, "continue": 4, "max_tokens": 20}
        models = [{"model": str(family.math)}]
        recipe = {"merge_method": "regmean_forward", "base_model": str(family.base), "models": models}
        recipe = parse({**recipe, "parameters": parameters, "lewis": {"calibrations": {"chat": prompts}}})
        told = "until continue math is done, time and memory count the prompts alone"
        assert f"warning: {told}" in make_plan(recipe).to_text()
        library.prepare(recipe)
        assert told not in make_plan(recipe).to_text()

    def test_scores_and_baselines(
        self, family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "sums.yaml").write_text(
            "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\ntest_split: test\n"
            "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
            "metric_list: [{metric: exact_match}]\n"
        )
        (tmp_path / "sums.jsonl").write_text('{"q": "w1", "a": "w2"}\n')
        data = {"merge_method": "ties", "base_model": str(family.base), "models": [{"model": str(family.math)}]}
        data |= {"lewis": {"calibrations": SETS}, "evaluate": {"tasks": ["sums"], "baselines": ["base", "uniform"]}}
        data["register"] = {"name": "m", "gate": {"metric": "sums/exact_match,none"}}
        plan = make_plan(parse(data, root=tmp_path))
        assert "\ngate    not_worse\n        sums: 1 documents, margin 0.1: an equal version passes" in plan.to_text()
        found = states(plan)
        ours = {"merge experts", "merge uniform", "evaluate merged sums", "evaluate uniform sums", "evaluate base sums"}
        assert ours == {name for name in found if name.startswith(("merge", "evaluate"))}  # no expert is scored
        assert found["evaluate merged sums"] == "to do"
        monkeypatch.setattr(builtin_tasks, "index", dict)  # to read lm-eval's takes seconds
        data["evaluate"]["tasks"] = ["smus"]
        with pytest.raises(InputError, match="smus"):
            make_plan(parse(data, root=tmp_path))


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
        with LocalHub(tmp_path / "server") as hub:
            for name, value in hub.environment(tmp_path / "home").items():
                monkeypatch.setenv(name, value)
            yield hub

    def downloads(self, hub: LocalHub) -> list[str]:
        """Requests that took a whole weight file: the headers are read with a range."""
        return [r.path for r in hub.log if r.method == "GET" and r.path.endswith(".safetensors") and r.status == 200]

    def test_downloads_no_weights(self, family: Family, hub: LocalHub) -> None:
        commit = hub.commit("org/base", family.base)
        hub.commit("org/math", family.math)
        recipe = recipe_of("org/base", "org/math", lewis={"calibrations": SETS})
        plan = make_plan(recipe)
        assert plan.inputs[0]["commit"] == commit
        assert set(states(plan).values()) == {"to do"} and len(plan.layers) == 14
        assert plan.seconds is None and "time    unknown until all models and rows are here" in plan.to_text()
        assert self.downloads(hub) == []
        carry_out(recipe, merge=True)
        assert len(self.downloads(hub)) == 2
        assert set(states(make_plan(recipe)).values()) == {"cached"}
        source = pipeline.pin("org/math", Path("/"))
        weights = pipeline.download(source).folder / "model.safetensors"
        blob = weights.resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
        assert states(make_plan(recipe))["download math"] == "to do"  # a damaged file does not count
        hub.commit("org/math", family.code)  # a release
        after = states(make_plan(recipe))
        assert (after["download base"], after["download math"], after["merge experts"]) == (
            "cached",
            "to do",
            "to do",
        )

    def test_rows_are_written_by_the_tokenizer_of_an_adapter_in_the_base(
        self, family: Family, hub: LocalHub, tmp_path: Path
    ) -> None:
        """The merge has that tokenizer; rows were written by that of the model below it."""
        own = shutil.copytree(family.lora, tmp_path / "own")
        write_tokenizer(own, WORDS[::-1])
        for name, folder in (("base", family.base), ("own", own), ("math", family.math)):
            hub.commit(f"org/{name}", folder)
        recipe = recipe_of("org/base+org/own", "org/math", lewis={"calibrations": SETS})
        make_plan(recipe)
        assert self.downloads(hub) == []
        base, _ = pipeline.pin_all(recipe)
        assert base is not None and recipe.lewis is not None
        files = pipeline.download(base)
        found = find_calibration(CalibrationInput("sums", recipe.lewis.calibrations["sums"], recipe.root, files))
        assert found is not None  # the plan's is that of the run
        expected = [tuple(62 - int(word[1:]) for word in text.split()) for text in SETS["sums"]["texts"]]
        assert sorted(Calibration.load(found.path).samples) == sorted(expected)

    def test_refuses_other_shapes_before_downloading_them(self, family: Family, hub: LocalHub, tmp_path: Path) -> None:
        hub.commit("org/base", family.base)
        hub.commit("org/wide", write_llama(tmp_path / "wide", hidden=32))
        with pytest.raises(InputError, match=r"org/wide: '.*' has shape .*, in the base it is"):
            make_plan(recipe_of("org/base", "org/wide", lewis={"calibrations": SETS}))
        assert self.downloads(hub) == []

    def test_a_filter_that_matches_nothing(self, family: Family, hub: LocalHub) -> None:
        hub.commit("org/base", family.base)
        hub.commit("org/math", family.math)
        with pytest.raises(InputError, match=r"parameters.weight\[0\].filter: 'mpl' matches no tensor"):
            make_plan(recipe_of("org/base", "org/math", parameters={"weight": [{"filter": "mpl", "value": 1}]}))
        assert self.downloads(hub) == []

    def test_a_repo_that_does_not_exist(self, family: Family, hub: LocalHub) -> None:
        hub.commit("org/base", family.base)
        with pytest.raises(InputError, match="org/mth"):
            make_plan(recipe_of("org/base", "org/mth"))


def test_the_store_is_left_as_it_was(family: Family, home: Path) -> None:
    make_plan(recipe_of(family.base, family.math))
    assert not (store.home() / "merged").exists()
