"""The steps on the store: made once, found again, and made again when what the store has is damaged."""

import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.errors import InputError, LewisError
from lewis.evaluation.harness import lm_eval
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scores import Evaluated, Score
from lewis.importance import calibration, measure
from lewis.importance import measured as measurements
from lewis.importance.calibration import Calibration
from lewis.importance.step import CalibrationEntry, ImportanceEntry
from lewis.merging import run
from lewis.merging.export import to_mergekit
from lewis.merging.step import MergedModel
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.reports import charts
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import edit_json, parse, shard, write_expert, write_llama
from tests.support.warm import WarmPython

pytestmark = pytest.mark.usefixtures("home")
SETS = {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}, "code": {"texts": ["w8 w9"], "samples": 1}}


def recipe_data(family: Family, *experts: Path | str, **blocks: Any) -> dict[str, Any]:
    """A guided merge of at most two experts, each with its own calibration set if the block has both."""
    data = {"merge_method": "ties", "base_model": str(family.base), "lewis": {"calibrations": SETS}} | blocks
    names = [name if name in data["lewis"]["calibrations"] else "sums" for name in ("sums", "code")]
    models = [{"model": str(path), "calibration": name} for path, name in zip(experts, names, strict=False)]
    return data | {"models": models}


@dataclass
class Opened:
    recipe: Recipe
    base: ModelFiles
    experts: list[ModelFiles]


def open_all(family: Family, *experts: Path | str, **blocks: Any) -> Opened:
    recipe = parse(recipe_data(family, *(experts or family.experts), **blocks))
    base, sources = pipeline.pin_all(recipe)
    assert base is not None
    pipeline.preflight(recipe, base, sources)
    return Opened(recipe, pipeline.download(base), [pipeline.download(source) for source in sources])


def guide(o: Opened) -> tuple[list[ImportanceEntry], AllocationEntry]:
    return pipeline.guide(o.recipe, o.base, o.experts)


class TestPin:
    def test_a_folder_is_its_content(self, family: Family, tmp_path: Path) -> None:
        copy = shard(family.math, tmp_path / "copy", parts=1)
        for path in copy.glob("model*"):
            path.unlink()
        (copy / "model.safetensors").write_bytes((family.math / "model.safetensors").read_bytes())
        one, other, third = (pipeline.pin(str(path), tmp_path) for path in (family.math, "copy", family.code))
        assert one.key == other.key != third.key
        assert one.adapter is None and one.size > 0

    def test_an_adapter_is_put_on_the_base(self, family: Family) -> None:
        base = pipeline.pin(str(family.base), Path("/"))
        found = pipeline.pin(str(family.lora), Path("/"), base)
        written_out = pipeline.pin(f"{family.base}+{family.lora}", Path("/"))
        assert (found.model, found.key) == (base.model, written_out.key) and found.adapter is not None
        assert found.key == f"{base.key}+{found.adapter.commit}"

    def test_an_adapter_needs_a_full_base(self, family: Family) -> None:
        with pytest.raises(InputError, match=r"a LoRA adapter needs its base: set base_model, or write base\+adapter"):
            pipeline.pin(str(family.lora), Path("/"))
        base = pipeline.pin(f"{family.base}+{family.lora}", Path("/"))
        with pytest.raises(InputError, match="a LoRA adapter on a base that is one itself"):
            pipeline.pin(str(family.lora), Path("/"), base)

    def test_a_linear_merge_goes_without_a_base(self, family: Family) -> None:
        recipe = parse({"merge_method": "linear", "models": [{"model": str(path)} for path in family.experts]})
        base, experts = pipeline.pin_all(recipe)
        pipeline.preflight(recipe, base, experts)
        files = [pipeline.download(source) for source in experts]
        merged = pipeline.merge(recipe, None, files)
        ours, one, two = (load_file(path / "model.safetensors") for path in (merged.folder, *family.experts))
        assert all(torch.allclose(ours[name], (one[name] + two[name]) / 2) for name in ours)


class TestPreflight:
    def test_tells_every_expert_that_does_not_fit(self, family: Family, tmp_path: Path) -> None:
        wide, short = write_llama(tmp_path / "wide", hidden=32), write_llama(tmp_path / "short", layers=1)
        with pytest.raises(InputError, match=r"9 tensors are not in the base, the first is 'model.layers.2.*'"):
            open_all(family, write_llama(tmp_path / "tall", layers=3))
        with pytest.raises(InputError) as caught:
            open_all(family, wide, short)
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(f"{wide}: ") and "has shape" in lines[0] and "in the base it is" in lines[0]
        assert lines[1].startswith(f"{short}: 9 tensors of the base are missing, the first is 'model.layers.1.")

    def test_looks_at_the_model_below_an_adapter(self, family: Family, tmp_path: Path) -> None:
        wide = write_llama(tmp_path / "wide", hidden=32)
        with pytest.raises(InputError, match=r"has shape \[\d+.*, in the base it is"):
            open_all(family, f"{wide}+{family.lora}")

    def test_tells_a_filter_that_matches_nothing(self, family: Family) -> None:
        with pytest.raises(InputError, match=r"parameters.weight\[0\].filter: 'mpl' matches no tensor"):
            open_all(family, parameters={"weight": [{"filter": "mpl", "value": 1}]})


class TestGuide:
    def test_measures_each_expert_and_the_base_on_every_set(self, family: Family) -> None:
        o, seen = open_all(family), []
        measured, allocated = pipeline.guide(o.recipe, o.base, o.experts, progress=lambda *step: seen.append(step))
        assert [(entry.ref, entry.calibration) for entry in measured] == [
            (str(family.base), "sums"),
            (str(family.base), "code"),
            (str(family.math), "sums"),
            (str(family.code), "code"),
        ]
        assert (f"{family.math} on sums", 5, 5) in seen
        densities = [allocation.densities for allocation in allocated.experts().values()]
        covered = {layer.tensor for layer in pipeline.layers_of(o.base)}
        for each in densities:
            assert {each[name] for name in each if name not in covered} == {1.0}
            assert (min(each[name] for name in covered), max(each[name] for name in covered)) == (0.3, 0.8)
        assert densities[0] != densities[1]

    def test_is_done_once(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        first = guide(open_all(family))
        monkeypatch.setattr(measure, "measure_sets", lambda *_, **__: pytest.fail("measured again"))
        monkeypatch.setattr("lewis.allocation.step._allocated", lambda _: pytest.fail("allocated again"))
        assert guide(open_all(family)) == first

    @pytest.mark.parametrize("damage", ["", "{", "{}", '{"norms": {}}'])
    def test_is_done_again_where_the_store_is_damaged(self, family: Family, damage: str) -> None:
        measured, allocated = guide(open_all(family))
        for path in (measured[0].path, allocated.path):
            path.write_text(damage)
        for entry in (measured[0], allocated):
            with pytest.raises(ValidationError, match="is gone or damaged"):
                type(entry).model_validate(entry.model_dump())
        again, allocated_again = guide(open_all(family))
        assert again == measured and again[0].norms and allocated_again.experts() == allocated.experts()

    def test_warnings_are_given_with_densities_that_were_found_too(
        self, family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        o = open_all(family, write_llama(tmp_path / "stranger", seed=9))
        for _ in range(2):
            caplog.clear()
            guide(o)
            assert "stranger: its weights differ from the base's by" in caplog.text

    def test_the_uniform_strategy_measures_nothing(self, family: Family) -> None:
        lewis = {"calibrations": SETS, "density": {"strategy": "uniform", "budget": 0.4}}
        measured, allocated = guide(open_all(family, lewis=lewis))
        assert measured == [] and list(allocated.means.values()) == pytest.approx([0.4, 0.4])

    def test_moments_that_are_damaged_are_not_believed(self, family: Family) -> None:
        measured, _ = guide(open_all(family))
        moments = measured[0].path.with_suffix(".safetensors")
        whole = moments.read_bytes()
        for damage in (whole[:-4], whole[:-4] + b"\0\0\0\1", None):
            moments.unlink() if damage is None else moments.write_bytes(damage)
            with pytest.raises(ValidationError, match="is gone or damaged"):
                type(measured[0]).model_validate(measured[0].model_dump())
            again, _ = guide(open_all(family))
            assert again == measured and moments.read_bytes() == whole

    def test_pruning_by_activation_takes_the_expert_own_set(self, family: Family) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        lewis: dict[str, Any] = {"calibrations": SETS, "prune_by": "activation"}
        measured, allocated = guide(o := open_all(family, lewis=lewis))
        own = {entry.ref: entry for entry in measured[2:]}
        prepared = pipeline.prepare_merge(o.recipe, o.base, o.experts, allocated)
        for expert in prepared.experts:
            assert expert.scales is not None
            assert torch.equal(expert.scales[name], own[expert.ref].moments[name].sqrt())
        by_magnitude = guide(p := open_all(family))[1]
        assert by_magnitude.means == allocated.means
        other = pipeline.prepare_merge(p.recipe, p.base, p.experts, by_magnitude)
        assert prepared.digest != other.digest and not torch.equal(prepared.tensor(name), other.tensor(name))
        uniform = pipeline.prepare_merge(o.recipe, o.base, o.experts, allocated, "uniform")
        assert all(expert.scales for expert in uniform.experts)

    def test_pruning_by_activation_measures_the_experts_alone_where_densities_are_uniform(self, family: Family) -> None:
        density = {"strategy": "uniform", "budget": 0.4}
        lewis = {"calibrations": SETS, "prune_by": "activation", "density": density}
        measured, allocated = guide(open_all(family, lewis=lewis))
        assert [(entry.ref, entry.calibration) for entry in measured] == [
            (str(family.math), "sums"),
            (str(family.code), "code"),
        ]
        assert allocated.scales().keys() == allocated.means.keys() == {str(e) for e in family.experts}

    @pytest.mark.parametrize("strategy", ["uniform", "depth_gradient", "lewis"])
    def test_what_no_token_reached_is_not_covered_by_any_strategy(
        self, family: Family, monkeypatch: pytest.MonkeyPatch, strategy: str
    ) -> None:
        silent, real = "model.layers.1.mlp.up_proj.weight", measure.measure_sets

        def measure_sets(*arguments: Any, **named: Any) -> Any:
            found = real(*arguments, **named)
            for each in found:
                each.norms[silent] = None
                each.moments.pop(silent)
            return found

        monkeypatch.setattr(measure, "measure_sets", measure_sets)
        block = {"calibrations": SETS, "prune_by": "activation", "density": {"strategy": strategy, "budget": 0.4}}
        _, allocated = guide(open_all(family, lewis=block))
        for each in allocated.experts().values():
            assert each.densities[silent] == 1.0 and each.mean == pytest.approx(0.4, rel=1e-12)
            assert each.densities["model.layers.1.mlp.gate_proj.weight"] < 1

    def test_aim_holds_the_delta_back_by_the_activations_of_the_base(self, family: Family) -> None:
        name, other = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
        density = {"strategy": "uniform", "budget": 0.4}
        plain, held = (
            open_all(family, lewis={"calibrations": SETS, "density": density, **aim})
            for aim in ({}, {"aim": {"omega": 0.25}})
        )
        measured, allocated = guide(held)
        assert [(entry.ref, entry.calibration) for entry in measured] == [
            (str(family.base), "sums"),
            (str(family.base), "code"),
        ]
        merged, same = (
            pipeline.prepare_merge(o.recipe, o.base, o.experts, a)
            for o, a in ((held, allocated), (plain, guide(plain)[1]))
        )
        scale = torch.stack([entry.moments[name] for entry in measured]).mean(dim=0).sqrt()
        base = same.base.read(name)
        expected = base + (same.tensor(name) - base) * (1 - 0.75 * scale / scale.max())
        torch.testing.assert_close(merged.tensor(name), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(merged.tensor(other), same.tensor(other)) and merged.digest != same.digest
        with pytest.raises(InputError, match=r"lewis.aim: mergekit has nothing like it"):
            to_mergekit(held.recipe.text, held.recipe, held.recipe.lewis, None, [], {})

    def test_an_adapter_is_measured_as_an_expert(self, family: Family) -> None:
        o = open_all(family, family.lora, family.code)
        measured, _ = guide(o)
        expert, base = (
            next(m for m in measured if (m.ref, m.calibration) == (str(r), "sums")) for r in (family.lora, family.base)
        )
        moved = {name for name in base.norms if expert.norms[name] != pytest.approx(base.norms[name], rel=1e-6)}
        assert "model.layers.0.self_attn.q_proj.weight" in moved
        assert "model.layers.0.self_attn.k_proj.weight" not in moved  # its input is the embedding, still the base's


class TestMeasure:
    @pytest.fixture
    def passes(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """The sets of each pass that is made."""
        seen: list[list[str]] = []
        real = measure.measure_sets

        def noted(model: Any, sets: list[Calibration], *arguments: Any, **named: Any) -> Any:
            seen.append([each.name for each in sets])
            time.sleep(0.1)  # long enough for another thread to come
            return real(model, sets, *arguments, **named)

        monkeypatch.setattr(measure, "measure_sets", noted)
        return seen

    @pytest.fixture
    def case(self, family: Family) -> tuple[ModelFiles, CalibrationEntry, CalibrationEntry]:
        o = open_all(family)
        sums, code = (pipeline.prepare_calibration(o.recipe, name, o.base) for name in SETS)
        return o.base, sums, code

    def test_one_pass_takes_the_sets_that_the_store_does_not_have(self, case: Any, passes: list[list[str]]) -> None:
        model, sums, code = case
        same = code.model_copy(update={"name": "same tokens"})
        alone = pipeline.measure(model, [sums])
        entries = pipeline.measure(model, [code, sums, same])
        assert passes == [["sums"], ["same tokens"]] and entries[1:2] == alone
        assert [entry.calibration for entry in entries] == ["code", "sums", "same tokens"]
        assert entries[0].digest == entries[2].digest != entries[1].digest
        for entry in entries[:2]:
            entry.path.unlink()
        again, total = [], sums.tokens + code.tokens
        assert pipeline.measure(model, [sums, code], progress=lambda *step: again.append(step))[0].norms
        assert passes[2:] == [["sums", "code"]] and again[-1] == (total, total)

    def test_what_was_written_before_a_crash_is_not_measured_again(
        self, case: Any, passes: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, sums, code = case
        real, written = measurements.write, []

        def full(path: Path, *arguments: Any) -> None:
            written.append(path)
            if len(written) == 2:
                raise OSError("no space")
            real(path, *arguments)

        monkeypatch.setattr(measurements, "write", full)
        with pytest.raises(OSError, match="no space"):
            pipeline.measure(model, [sums, code])
        assert len(pipeline.measure(model, [sums, code])) == 2
        assert passes == [["sums", "code"], ["code"]]

    def test_two_at_once_measure_each_set_once(self, case: Any, passes: list[list[str]]) -> None:
        model, sums, code = case
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda sets=sets: found.append(pipeline.measure(model, sets)))
            for sets in ([sums, code], [code, sums], [code])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3 and sorted(name for names in passes for name in names) == ["code", "sums"]


class TestMerge:
    def test_is_found_again_and_tells_what_it_was_made_of(
        self, family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        o = open_all(family)
        _, allocated = guide(o)
        merged = pipeline.merge(o.recipe, o.base, o.experts, allocated)
        manifest = store.read_manifest(merged.folder)
        assert manifest is not None
        assert manifest["inputs"] == {files.ref: files.key for files in (o.base, *o.experts)}
        assert (manifest["mean_density"], manifest["recipe"]) == (allocated.means, o.recipe.text)
        monkeypatch.setattr(run.Merge, "run", lambda *_, **__: pytest.fail("merged again"))
        assert pipeline.merge(o.recipe, o.base, o.experts, allocated) == merged

    def test_the_order_of_the_recipe_does_not_matter(self, family: Family) -> None:
        turns = [
            open_all(family, *experts, lewis={"calibrations": {"sums": SETS["sums"]}})
            for experts in self.orders(family)
        ]
        assert turns[0].recipe.experts[0] == turns[1].recipe.experts[1]
        merges = [pipeline.prepare_merge(o.recipe, o.base, o.experts, guide(o)[1]) for o in turns]
        assert merges[0].digest == merges[1].digest

    def orders(self, family: Family) -> list[list[Path]]:
        return [family.experts, family.experts[::-1]]

    def test_uniform_is_another_model(self, family: Family) -> None:
        o = open_all(family)
        _, allocated = guide(o)
        guided, uniform = (
            pipeline.prepare_merge(o.recipe, o.base, o.experts, allocated, w) for w in ("experts", "uniform")
        )
        plain = pipeline.prepare_merge(o.recipe, o.base, o.experts)
        assert len({guided.digest, uniform.digest, plain.digest}) == 3
        name = "model.layers.0.mlp.up_proj.weight"
        by_ref = {
            expert.ref: rho for expert, rho in zip(uniform.experts, uniform.parameters(name)["density"], strict=True)
        }
        assert by_ref == allocated.means

    def test_a_damaged_one_is_not_believed(self, family: Family) -> None:
        o = open_all(family)
        merged = pipeline.merge(o.recipe, o.base, o.experts)
        weights = merged.folder / "model.safetensors"
        whole = weights.read_bytes()
        weights.chmod(0o600)
        os.truncate(weights, 1000)
        with pytest.raises(ValidationError, match="is gone, damaged or cut short"):
            MergedModel(digest=merged.digest, folder=merged.folder)
        assert pipeline.merge(o.recipe, o.base, o.experts) == merged
        assert weights.read_bytes() == whole
        assert merged.files("merged").open().read("model.norm.weight").shape == (16,)

    def test_a_donor_gives_the_tokenizer(self, family: Family, tmp_path: Path) -> None:
        donor = write_expert(family.base, tmp_path / "donor", seed=5)
        edit_json(donor / "tokenizer_config.json", model_max_length=33)
        for choice, expected in ((str(donor), donor), ("base", family.base), (str(family.base), family.base)):
            o = open_all(family, donor, family.code, tokenizer_source=choice)
            merged = pipeline.merge(o.recipe, o.base, o.experts)
            text = (merged.folder / "tokenizer_config.json").read_text()
            assert text == (expected / "tokenizer_config.json").read_text()

    def test_two_at_once_make_one(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        o, runs, made = open_all(family), [], []
        real = run.Merge.run

        def counted(self: run.Merge, *args: Any, **kwargs: Any) -> run.Written:
            runs.append(self.digest)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(run.Merge, "run", counted)
        threads = [
            threading.Thread(target=lambda: made.append(pipeline.merge(o.recipe, o.base, o.experts))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(runs) == 1 and len(made) == 3 and made[0] == made[1] == made[2]

    def test_killed_half_way_and_run_again(self, family: Family, home: Path, tmp_path: Path, warm: WarmPython) -> None:
        (tmp_path / "recipe.yaml").write_text(parse(recipe_data(family, *family.experts)).text)
        code = (
            "import os, sys; from tests.support import pipeline; from lewis.recipe.recipe import Recipe\n"
            "recipe = Recipe.load(sys.argv[1]); base, experts = pipeline.pin_all(recipe)\n"
            "kill = lambda name, done, total: done > total / 2 and os.kill(os.getpid(), 9)\n"
            "pipeline.merge(recipe, pipeline.download(base), [pipeline.download(e) for e in experts], report=kill)"
        )
        assert warm.exit_code(code, tmp_path / "recipe.yaml") == -signal.SIGKILL
        (leftover,) = (home / "merged").iterdir()
        assert leftover.name.endswith(".partial")
        o = open_all(family)
        merged = pipeline.merge(o.recipe, o.base, o.experts)
        assert list((home / "merged").iterdir()) == [merged.folder]
        assert leftover.name.startswith(f".{merged.digest}.")


@pytest.mark.parametrize(
    "method, parameters, strategy, warned",
    [
        ("dare_ties", {}, "depth_gradient", True),
        ("dare_ties", {"rescale": False}, "depth_gradient", False),
        ("dare_ties", {}, "uniform", False),
        ("ties", {}, "depth_gradient", False),
        ("ties", {"rescale": True}, "depth_gradient", True),
    ],
)
def test_uneven_densities_where_tensors_are_rescaled(
    family: Family,
    caplog: pytest.LogCaptureFixture,
    method: str,
    parameters: dict[str, Any],
    strategy: str,
    warned: bool,
) -> None:
    blocks = {"lewis": {"calibrations": SETS, "density": {"strategy": strategy}}}
    guide(open_all(family, merge_method=method, parameters=parameters, **blocks))
    assert ("scaled up most" in caplog.text) == warned


class TestCalibration:
    def test_is_made_once_of_the_same_rows(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, made = tmp_path / "rows.jsonl", []
        rows.write_text('{"text": "w1 w2"}\n')
        sets = {"sums": {"dataset": "json", "data_files": str(rows), "text": "{text}"}}
        o, real = open_all(family, lewis={"calibrations": sets}), calibration.calibrate
        monkeypatch.setattr(calibration, "calibrate", lambda *a, **k: made.append(a) or real(*a, **k))

        def prepare() -> CalibrationEntry:
            return pipeline.prepare_calibration(o.recipe, "sums", o.base)

        entry = prepare()
        assert prepare() == entry and len(made) == 1
        entry.path.write_text("{")
        assert prepare() == entry and len(made) == 2 and calibration.Calibration.load(entry.path).tokens == entry.tokens
        rows.write_text('{"text": "w1 w3"}\n')
        assert prepare().digest != entry.digest and len(made) == 3

    def test_more_samples_than_rows_are_refused_though_the_set_is_known(self, family: Family) -> None:
        for samples, message in ({}, ""), ({"samples": 128}, "128 asked for, the set has 1"):
            o = open_all(family, lewis={"calibrations": {"sums": {"texts": ["w1 w2"], **samples}}})
            with pytest.raises(InputError, match=message) if message else nullcontext():
                pipeline.prepare_calibration(o.recipe, "sums", o.base)


def test_the_covered_layers_are_found_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    o = open_all(family)
    layers = pipeline.layers_of(o.base)
    monkeypatch.setattr("lewis.importance.step.covered_tensors", lambda *_, **__: pytest.fail("found again"))
    assert pipeline.layers_of(o.base) == layers and len(layers) == 14


def test_a_picture_is_drawn_once_and_again_where_damaged(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = [], charts.density_heat_map
    monkeypatch.setattr(charts, "density_heat_map", lambda *a: drawn.append(a) or real(*a))
    _, allocated = guide(open_all(family))
    picture = charts.densities(allocated)
    assert charts.densities(allocated) == picture and len(drawn) == 1
    (path,) = (store.home() / "pictures").iterdir()
    path.write_bytes(picture[:-1])
    assert charts.densities(allocated) == picture == path.read_bytes() and len(drawn) == 2


class TestFiles:
    def test_a_reference_to_files_that_are_gone_cannot_be_loaded(self, family: Family, tmp_path: Path) -> None:
        copy = shard(family.math, tmp_path / "copy")
        files = ModelFiles.at("copy", "key", copy)
        assert ModelFiles.model_validate(files.model_dump()) == files
        (copy / "model-00001-of-00003.safetensors").unlink()
        with pytest.raises(ValidationError, match=r"model-00001-of-00003.safetensors is gone or was cut short"):
            ModelFiles.model_validate(files.model_dump())

    def test_so_with_a_calibration_set(self, family: Family) -> None:
        o = open_all(family)
        entry = pipeline.prepare_calibration(o.recipe, "sums", o.base)
        entry.path.unlink()
        with pytest.raises(ValidationError, match="is gone"):
            type(entry).model_validate(entry.model_dump())

    def test_a_folder_that_changes_while_running(self, family: Family, tmp_path: Path) -> None:
        copy = shard(family.math, tmp_path / "copy")
        pinned = pipeline.pin(str(copy), tmp_path)
        edit_json(copy / "config.json", changed=True)
        with pytest.raises(LewisError, match="changed while running"):
            pipeline.download(pinned)


class TestScore:
    def test_is_done_once_and_again_where_damaged(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran = []

        def evaluate(folder: Path, settings: EvalSettings, **_: Any) -> Evaluated:
            ran.append(folder)
            results = {"sums": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 10}}
            ends = {"empty": {}, "tried": 0, "ended": 0, "perplexity": None}
            kept = {"documents": {}, "samples": [], "groups": {}, "ends": ends}
            return Evaluated.of(str(folder), {"results": results, "higher_is_better": {"sums": {"acc": True}}, **kept})

        monkeypatch.setattr(lm_eval, "evaluate", evaluate)
        monkeypatch.setattr(lm_eval, "tasks_digest", lambda settings: store.digest(settings.tasks))
        recipe = parse(recipe_data(family, *family.experts, evaluate={"tasks": ["sums"], "timeout_minutes": 2}))
        assert recipe.evaluate is not None
        settings = EvalSettings.of(recipe.evaluate, tmp_path)
        files = ModelFiles.at("math", "key", family.math)
        assert settings == EvalSettings(tasks=("sums",), root=tmp_path, timeout_s=120, batch_size=16)
        assert pipeline.find_scores("math", "key", settings) is None
        made = pipeline.score(files, settings)
        assert pipeline.score(files, settings) == made == pipeline.find_scores("math", "key", settings)
        [entry] = made.entries
        assert made.scores == [Score("sums", "acc,none", 0.5, 0.1, True, 10)] and ran == [family.math]
        entry.path.write_text("{")
        with pytest.raises(ValidationError, match="is gone or damaged"):
            type(entry).model_validate(entry.model_dump())
        assert pipeline.score(files, settings).scores and len(ran) == 2
