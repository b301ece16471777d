"""The engine: what it promises for every method, and what it refuses."""

import json
import os
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis import store
from lewis.errors import InputError, LewisError, RecipeError
from lewis.merging.engine import in_torch
from lewis.merging.run import Merge
from lewis.merging.settings import Expert
from lewis.methods import METHODS as ALL
from lewis.models.checkpoint import Checkpoint
from lewis.models.files.folder import INDEX, SINGLE
from lewis.models.lora.expert import LoraExpert
from tests.conftest import Family
from tests.support.models import (
    bits,
    edit_json,
    materialise,
    open_merge,
    rewrite,
    shard,
    write_expert,
    write_llama,
    write_lora,
    write_tensors,
    write_tokenizer,
)

TIES = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
METHODS = ("linear", "task_arithmetic", *TIES, "sce", "pcb", "multislerp")  # one expert, whole, is itself
# A method that fits needs calibration rows; `test_fit` merges with it.
OF_ANY_NUMBER = [name for name, method in ALL.items() if method.experts[1] is None and not method.fits]
TRIMMING = [name for name, method in ALL.items() if "density" in method.parameters]
BY_ROWS: dict[str, list[dict[str, Any]]] = {
    **{name: [{}] for name, method in ALL.items() if (method.elementwise or method.by_rows) and not method.fits},
    "sce": [{"select_topk": 0.3}],
    "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "model_stock": [{"filter_wise": True}],
}
NAME = "model.layers.0.a.weight"
FORMATS = {torch.float32: (torch.int32, 32, 0x7F800000), torch.float16: (torch.int16, 16, 0x7C00)}
FORMATS[torch.bfloat16] = (torch.int16, 16, 0x7F80)
many = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tensors(draw: st.DrawFn, count: int, largest: int = 12) -> list[torch.Tensor]:
    """Tensors of one dtype and size with any finite bit pattern: subnormals, -0.0 and the largest numbers too."""
    dtype = draw(st.sampled_from(list(FORMATS)))
    integer, width, exponent = FORMATS[dtype]
    n, low = draw(st.integers(1, largest)), -(2 ** (width - 1))
    patterns = st.one_of(st.integers(low, -low - 1), st.sampled_from([0, low, 1, low + 1, exponent - 1]))

    def finite(pattern: int) -> int:
        return pattern if pattern & exponent != exponent else pattern & ~(exponent & -exponent)

    drawn = st.lists(patterns.map(finite), min_size=n, max_size=n)
    return [torch.tensor(draw(drawn), dtype=integer).view(dtype) for _ in range(count)]


@pytest.fixture
def place(tmp_path: Path) -> Callable[[list[torch.Tensor]], list[Path]]:
    """Writes tensors as models of one tensor each, under the same names every time."""
    return lambda values: [write_tensors(tmp_path / f"m{i}", {NAME: value}) for i, value in enumerate(values)]


def known(method: str, **parameters: Any) -> dict[str, Any]:
    """The parameters that the method has."""
    return {key: value for key, value in parameters.items() if key in ALL[method].parameters}


def small_merge(method: str, folders: list[Path], **arguments: Any) -> Merge:
    """The first folder is the base; where it would be a model like any other, the merge goes without."""
    base, *experts = folders
    return open_merge(method, None if ALL[method].base_is_a_model else base, experts, **arguments)


@pytest.mark.slow
class TestInvariants:
    @many
    @given(values=tensors(2), method=st.sampled_from((*METHODS, "passthrough")), normalize=st.booleans())
    def test_one_expert_whole_comes_out_byte_by_byte(
        self, place: Any, values: list[torch.Tensor], method: str, normalize: bool
    ) -> None:
        assume(bool((values[1].float() - values[0].float()).isfinite().all()))  # a task vector that fp32 can hold
        parameters = known(method, weight=1.0, normalize=normalize, density=1.0)
        merged = small_merge(method, place(values), parameters=parameters).tensor(NAME)
        assert merged.dtype == values[1].dtype and bits(merged) == bits(values[1])

    @many
    @given(values=tensors(3), method=st.sampled_from(TRIMMING))
    def test_density_0_gives_the_base_byte_by_byte(self, place: Any, values: list[torch.Tensor], method: str) -> None:
        merged = small_merge(method, place(values), densities=[{NAME: 0.0}, {NAME: 0.0}]).tensor(NAME)
        assert bits(merged) == bits(values[0])

    @many
    @given(values=tensors(3))
    def test_a_share_of_less_than_one_element_gives_the_base(self, place: Any, values: list[torch.Tensor]) -> None:
        density = 0.99 / values[0].numel()
        assert bits(small_merge("ties", place(values), parameters={"density": density}).tensor(NAME)) == bits(values[0])

    @many
    @given(values=tensors(4), method=st.sampled_from(OF_ANY_NUMBER), density=st.floats(0.05, 1))
    def test_the_order_of_the_experts_changes_nothing(
        self, place: Any, values: list[torch.Tensor], method: str, density: float
    ) -> None:
        base, *experts = place(values)
        own = [known(method, weight=weight, density=density) for weight in (0.7, -0.4, 1.3)]
        results = set()
        for order in ((0, 1, 2), (1, 0, 2), (1, 2, 0)):  # a swap and a turn make all others
            merge = open_merge(
                method,
                base,
                [experts[i] for i in order],
                own=[own[i] for i in order],
                parameters=known(method, normalize=False, weight=0.1, epsilon=0.0),
                out_dtype="float32",
            )
            try:
                result = bits(merge.tensor(NAME))
            except LewisError:  # overflow: then in every order
                result = b""
            results.add((merge.digest, result))
        assert len(results) == 1

    @many
    @given(
        values=tensors(3),
        method=st.sampled_from([name for name, method in ALL.items() if method.experts != (1, 1) and not method.fits]),
        weights=st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2),
        normalize=st.booleans(),
    )
    def test_nothing_but_finite_numbers_comes_out(
        self, place: Any, values: list[torch.Tensor], method: str, weights: list[float], normalize: bool
    ) -> None:
        own = [known(method, weight=weight) for weight in weights]
        merge = small_merge(method, place(values), own=own, parameters=known(method, normalize=normalize))
        try:
            assert bool(torch.isfinite(merge.tensor(NAME)).all())
        except LewisError as error:
            assert NAME in str(error)

    @many
    @given(values=tensors(2), method=st.sampled_from(("slerp", "nearswap", "arcee_fusion", "passthrough")))
    def test_nothing_but_finite_numbers_comes_out_of_two(
        self, place: Any, values: list[torch.Tensor], method: str
    ) -> None:
        try:
            merged = small_merge(method, place(values), parameters=known(method, t=0.5)).tensor(NAME)
            assert bool(torch.isfinite(merged).all())
        except LewisError as error:
            assert NAME in str(error)

    @many
    @given(values=tensors(2))
    def test_slerp_ends_at_the_models_byte_by_byte(self, place: Any, values: list[torch.Tensor]) -> None:
        folders = place(values)
        for t, model in enumerate(values):
            assert bits(small_merge("slerp", folders, parameters={"t": t}).tensor(NAME)) == bits(model)

    @many
    @given(values=tensors(2, 40), density=st.floats(0.01, 1))
    def test_exactly_k_elements_are_the_experts(self, place: Any, values: list[torch.Tensor], density: float) -> None:
        base, expert = values
        merged = small_merge("ties", place(values), parameters={"density": density}).tensor(NAME)
        k, differ = int(density * base.numel()), base.float() != expert.float()
        assert bool(((merged == base) | (merged == expert)).all())
        assert int((merged != base).sum()) == min(k, int(differ.sum()))

    def test_the_sign_of_zero_is_the_bases_where_an_expert_has_no_say(self, place: Any) -> None:
        trimmed = place([torch.tensor([-0.0, 0.0]), torch.tensor([1.0, 2.0])])
        merged = small_merge("ties", trimmed, parameters={"density": 0.5}).tensor(NAME)
        assert bits(merged) == bits(torch.tensor([-0.0, 2.0]))
        left_out = place([torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([-0.0])])
        merged = small_merge("ties", left_out, densities=[{NAME: 1.0}, {NAME: 0.0}]).tensor(NAME)
        assert bits(merged) == bits(torch.tensor([0.0]))

    def test_a_random_method_may_keep_of_a_tensor_of_one_element(self, place: Any) -> None:
        folders = place([torch.zeros(1), torch.ones(1)])
        merged = {
            float(small_merge("dare_linear", folders, parameters={"density": 0.5}, seed=seed).tensor(NAME))
            for seed in range(20)
        }
        assert merged == {0.0, 1.0}

    def test_a_seed_changes_what_a_random_method_drops_and_nothing_else(self, place: Any) -> None:
        folders = place([torch.zeros(100), torch.rand(100)])
        for method in ("ties", "dare_ties"):
            first, again, other = (small_merge(method, folders, parameters={"density": 0.5}, seed=s) for s in (1, 1, 2))
            assert first.digest == again.digest and bits(first.tensor(NAME)) == bits(again.tensor(NAME))
            assert (first.digest == other.digest) == (method == "ties")
            assert (bits(first.tensor(NAME)) == bits(other.tensor(NAME))) == (method == "ties")

    def test_mixed_dtypes_are_merged_in_fp32_and_rounded_once(self, place: Any) -> None:
        base = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
        experts = [torch.tensor([1 + 2**-9, 2.0]), torch.tensor([1 + 2**-10, 3.0], dtype=torch.float16)]
        folders = place([base, *experts])
        assert small_merge("task_arithmetic", folders, out_dtype="float32").tensor(NAME).tolist() == [
            1 + 3 * 2**-10,
            4.0,
        ]
        stored = small_merge("task_arithmetic", folders).tensor(NAME)
        assert stored.dtype == torch.bfloat16 and stored.tolist() == [1.0, 4.0]
        assert small_merge("task_arithmetic", folders, dtype="float16").tensor(NAME).dtype == torch.float16


class TestRoles:
    """Which model is the base, and what becomes of it."""

    def test_slerp_goes_from_the_base_to_the_other(self, place: Any) -> None:
        base, other = place([torch.tensor([0.0, 2]), torch.tensor([1.0, 0])])
        merge = open_merge("slerp", base, [other, base], parameters={"t": 1 / 3})  # the base may be listed
        torch.testing.assert_close(merge.tensor(NAME), torch.tensor([0.5, 3**0.5]))  # sin 30 * other, sin 60 * base

    def test_nuslerp_takes_task_vectors_if_there_is_a_base(self, place: Any) -> None:
        base, *experts = place([torch.tensor([1.0, 1]), torch.tensor([2.0, 1]), torch.tensor([1.0, 3])])
        with_base = open_merge("nuslerp", base, experts)
        torch.testing.assert_close(with_base.tensor(NAME), torch.tensor([1 + 0.5**0.5, 1 + 2 * 0.5**0.5]))
        without = open_merge("nuslerp", None, experts)  # [2, 1] and [1, 3] are 45 degrees apart: 1 / (2 cos 22.5)
        torch.testing.assert_close(without.tensor(NAME), torch.tensor([3.0, 4]) / (2 * 0.92387953))
        assert with_base.digest != without.digest

    def test_a_base_is_one_of_karchers_models(self, place: Any) -> None:
        base, expert = place([torch.tensor([1.0, 0]), torch.tensor([0.0, 1])])
        for merge in (open_merge("karcher", base, [expert]), open_merge("karcher", None, [base, expert])):
            torch.testing.assert_close(merge.tensor(NAME), torch.full((2,), 0.5**0.5))

    def test_arcee_fusion_sees_the_base(self, place: Any) -> None:
        base, expert = place([torch.ones(5), torch.tensor([2.0, 3, 4, 5, 21])])
        assert open_merge("arcee_fusion", base, [expert]).tensor(NAME).tolist() == [1, 1, 1, 1, 21]

    def test_parameters_that_do_not_fit_for_a_tensor_are_told_before_the_merge(self, place: Any) -> None:
        folders = place([torch.zeros(4), torch.ones(4)])
        density = [{"filter": "layers.0.a", "value": 0.95}, {"value": 0.5}]
        with pytest.raises(InputError, match=rf"{NAME}: .*m1: expected 0 < density - epsilon .* got density=0.95"):
            small_merge("della", folders, own=[{"density": density}])

    def test_densities_of_lewis_reach_every_method_that_trims(self, place: Any) -> None:
        folders = place([torch.zeros(64), *(torch.arange(1.0, 65) for _ in range(2))])
        for method in TRIMMING:
            densities: list[dict[str, float] | None] = [{NAME: 0.25}, {NAME: 0.25}]
            merged = small_merge(method, folders, densities=densities).tensor(NAME)
            kept = int((merged != 0).sum())
            assert kept == 16 if not ALL[method].random else 10 <= kept <= 48, method


class TestDigest:
    def of(self, folders: list[Path], **arguments: Any) -> str:
        return small_merge("ties", folders, **arguments).digest

    def test_covers_what_changes_the_bytes_and_nothing_else(self, place: Any) -> None:
        folders = place([torch.zeros(4), torch.ones(4), torch.rand(4)])
        plain = self.of(folders)
        assert plain == self.of(folders, parameters={"weight": "1e0", "density": [1, 1]})
        assert plain == self.of(folders, evaluate={"tasks": ["gsm8k"]}, seed=5)
        others = [
            self.of(folders, parameters={"weight": 0.5}),
            self.of(folders, own=[{"density": 0.5}, {}]),
            self.of(folders, densities=[{NAME: 0.5}, {NAME: 0.4}]),
            self.of(folders, dtype="float16"),
            self.of(folders[:2]),
            self.of([folders[1], folders[0], folders[2]]),
            small_merge("dare_ties", folders).digest,
        ]
        assert len({plain, *others}) == 1 + len(others)

    def test_covers_the_tokenizer(self, place: Any, tmp_path: Path) -> None:
        folders = place([torch.zeros(4), torch.ones(4)])
        before = self.of(folders)
        write_tokenizer(folders[0])
        assert self.of(folders) != before


class TestRun:
    @pytest.fixture(
        params=[(True, 5 * 10**9), (True, 6000), (False, 6000)], ids=["tied", "tied-sharded", "untied-sharded"]
    )
    def setup(self, request: pytest.FixtureRequest, family: Family, tmp_path: Path) -> tuple[Path, list[Path], int]:
        tied, limit = request.param
        if tied:
            return family.base, family.experts, limit
        base = write_llama(tmp_path / "base", tied=False, dtype=torch.bfloat16)
        return base, [write_expert(base, tmp_path / f"expert{i}", seed=i) for i in range(2)], limit

    def test_writes_what_transformers_loads(self, setup: tuple[Path, list[Path], int], tmp_path: Path) -> None:
        base, experts, limit = setup
        merge = open_merge("ties", base, experts, parameters={"density": 0.5}, dtype="float16")
        seen: list[tuple[str, int, int]] = []
        merge.run(
            tmp_path / "out", max_shard_size=limit, manifest={"who": "me"}, progress=lambda *step: seen.append(step)
        )
        manifest = store.read_manifest(tmp_path / "out")
        assert manifest is not None and (manifest["digest"], manifest["who"]) == (merge.digest, "me")
        assert (tmp_path / "out" / INDEX).exists() == (limit < 10**9)
        assert seen[-1][1] == seen[-1][2] == sum(info.elements for info in merge.base.tensors.values())

        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float16
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, merge.tensor(merge.base.tied.get(name, name)))
        tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert tied == bool(merge.base.tied) == model.config.tie_word_embeddings
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1")["input_ids"] == [4]
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()

    def test_shards_in_give_the_same_as_one_file_in(self, family: Family, tmp_path: Path) -> None:
        sharded = [shard(path, tmp_path / path.name) for path in (family.base, *family.experts)]
        whole, parts = (
            open_merge("ties", p[0], p[1:], parameters={"density": 0.3})
            for p in ([family.base, *family.experts], sharded)
        )
        assert all(bits(whole.tensor(name)) == bits(parts.tensor(name)) for name in whole.layout)

    @pytest.mark.parametrize("method, settings", [(name, more) for name in ALL for more in BY_ROWS.get(name, [])])
    def test_a_large_tensor_is_merged_by_rows(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, Any]
    ) -> None:
        experts = [family.lora, family.code][: ALL[method].experts[1]]
        base = None if ALL[method].base_is_a_model else family.base
        parameters = known(method, t=0.01, weight=0.7, density=0.4) | settings
        merge = open_merge(method, base, experts if base else [family.math], parameters=parameters, dtype="bfloat16")
        names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"]
        if base:  # as aim does, for a tensor of (out, in) and one of (in, out)
            merge = replace(merge, factors={names[0]: torch.rand(16), names[1]: torch.rand(16, 1)})
        if merge.method.takes_scales:
            scales = {names[0]: torch.rand(16), names[1]: torch.rand(16, 1)}
            merge = replace(merge, experts=tuple(replace(expert, scales=scales) for expert in merge.experts))
        expected = {name: bits(merge.tensor(name)) for name in merge.layout}
        parts: list[int] = []
        merged = in_torch._Tensor.merged

        def noted(self: Any, *arguments: Any) -> torch.Tensor:
            part = merged(self, *arguments)
            parts.append(part.numel())
            return part

        monkeypatch.setattr(in_torch._Tensor, "merged", noted)
        monkeypatch.setattr(in_torch, "PIECE", 100)
        monkeypatch.setattr("lewis.merging.engine.compiled.merge_tensor", lambda *_: False)
        merge.run(tmp_path / "out")
        assert {
            name: bits(tensor) for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        } == expected
        assert max(parts) <= 100 and sum(parts) == merge.elements

    def test_a_function_that_gives_no_tensor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folders = [write_tensors(tmp_path / str(i), {NAME: torch.ones(2) * i}) for i in range(2)]
        merge = small_merge("ties", folders)
        method = replace(merge.method, function=lambda *_, **__: None)
        merge = replace(merge, settings=replace(merge.settings, method=method))
        with pytest.raises(LewisError, match=f"{NAME}: ties gave NoneType, expected a tensor"):
            merge.tensor(NAME)

    @pytest.mark.parametrize("method", ["arcee_fusion", "sce", "ties"])
    def test_a_tensor_of_no_elements(self, tmp_path: Path, method: str) -> None:
        folders = [write_tensors(tmp_path / str(i), {NAME: torch.zeros(0, 3)}) for i in range(2)]
        assert small_merge(method, folders, dtype="bfloat16").tensor(NAME).shape == (0, 3)  # as on a GPU

    def test_whole_numbers_are_copied_from_the_base(self, tmp_path: Path) -> None:
        folders = [
            write_tensors(tmp_path / str(i), {NAME: torch.ones(2) * i, "ids": torch.tensor([i, 2**40])})
            for i in range(2)
        ]
        small_merge("task_arithmetic", folders, dtype="bfloat16").run(tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found["ids"].dtype == torch.int64 and found["ids"].tolist() == [0, 2**40]
        assert found[NAME].dtype == torch.bfloat16

    def test_a_donor_gives_tokenizer_and_generation_config(self, family: Family, tmp_path: Path) -> None:
        donor = shard(family.math, tmp_path / "donor", parts=1)
        edit_json(donor / "generation_config.json", eos_token_id=7)
        open_merge("ties", family.base, [family.code, donor], tokenizer_source=str(donor)).run(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 7

    def test_processor_configs_come_from_the_base_and_change_the_digest(self, family: Family, tmp_path: Path) -> None:
        base = shard(family.base, tmp_path / "base")
        before = open_merge("linear", base, [family.math], parameters={"weight": 1}).digest
        names = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
        for name in names:
            (base / name).write_text(json.dumps({"of": name}))
        merge = open_merge("linear", base, [family.math], parameters={"weight": 1})
        assert merge.digest != before
        merge.run(tmp_path / "out")
        assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in names)

    def test_named_chat_templates_and_whispers_normalizer_come_along(self, family: Family, tmp_path: Path) -> None:
        base = shard(family.base, tmp_path / "base")
        before = open_merge("ties", base, [family.math]).digest
        names = ["additional_chat_templates/tool_use.jinja", "normalizer.json"]
        (base / "additional_chat_templates").mkdir()
        for name in names:
            (base / name).write_text(f"{{# {name} #}}")
        merge = open_merge("ties", base, [family.math])
        assert merge.digest != before
        merge.run(tmp_path / "out")
        assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in names)
        assert set(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template) == {"tool_use"}

    def test_code_of_the_base_that_is_not_copied_is_named(
        self, family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = shard(family.base, tmp_path / "base")
        edit_json(base / "config.json", auto_map={"AutoConfig": "theirs.C", "AutoModel": "org/repo--far.M"})
        open_merge("linear", base, [family.math], parameters={"weight": 1}).run(tmp_path / "out")
        (warning,) = [record.message for record in caplog.records if "auto_map" in record.message]
        assert "theirs.py" in warning and "far" not in warning

    def test_gradients_run_over_the_layers(self, family: Family) -> None:
        merge = open_merge("task_arithmetic", family.base, [family.math], parameters={"weight": [0, 1]})
        for name in merge.layout:
            expected = Checkpoint(family.math if "layers.1." in name else family.base, "key").read(name)
            assert bits(merge.tensor(name)) == bits(expected), name

    def test_a_gradient_runs_over_the_layers_of_each_tower(self, tmp_path: Path) -> None:
        """The last layer of a language model with a deeper tower next to it had a value from the middle."""
        depths = {"vision.layers.": 5, "model.layers.": 3, "merger.": 1}
        tensors = {f"{stack}{i}.w.weight": torch.ones(2) for stack, count in depths.items() for i in range(count)}
        tensors["norm.weight"] = torch.ones(2)
        base, expert = (write_tensors(tmp_path / name, tensors) for name in ("base", "expert"))
        merge = open_merge("task_arithmetic", base, [expert], parameters={"weight": [0, 1]})
        found = {
            stack: [merge.parameters(f"{stack}{i}.w.weight")["weight"] for i in range(depths[stack])]
            for stack in depths
        }
        assert found["vision.layers."] == [[0], [0.25], [0.5], [0.75], [1]]
        assert found["model.layers."] == [[0], [0.5], [1]]
        assert found["merger."] == [[1]] and merge.parameters("norm.weight")["weight"] == [0]

    def test_guided_densities_hold_for_their_tensors(self, family: Family) -> None:
        name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
        merge = open_merge("ties", family.base, [family.math], parameters={"density": 0.5}, densities=[{name: 0.25}])
        base, values = Checkpoint(family.base, "key"), merge.parameters(name)
        assert (values["density"], merge.parameters(other)["density"]) == ([0.25], [0.5])
        for tensor, share in ((name, 0.25), (other, 0.5)):
            assert int((merge.tensor(tensor) != base.read(tensor)).sum()) == int(share * base.tensors[tensor].elements)

    def test_scales_decide_which_elements_are_kept(self, family: Family) -> None:
        name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
        plain = open_merge("ties", family.base, [family.math], parameters={"density": 0.25})
        scale = torch.zeros(16)
        scale[3:7] = 1.0
        expert = replace(plain.experts[0], scales={name: scale})
        merge = Merge.of(plain.settings, plain.base, [expert])
        changed = (merge.tensor(name) != plain.base.read(name)).nonzero()
        assert len(changed) == 32 * 16 // 4 and set(changed[:, 1].tolist()) == {3, 4, 5, 6}
        assert bits(merge.tensor(other)) == bits(plain.tensor(other))
        louder = Merge.of(plain.settings, plain.base, [replace(expert, scales={name: 2 * scale})])
        assert len({plain.digest, merge.digest, louder.digest}) == 3
        assert Merge.of(plain.settings, plain.base, [replace(expert, scales={})]).digest == plain.digest

    @pytest.mark.parametrize("scale", [torch.ones(15), torch.ones(2, 32, 16)])
    def test_scales_that_do_not_fit_are_refused(self, family: Family, scale: torch.Tensor) -> None:
        merge = open_merge("ties", family.base, [family.math])
        expert = replace(merge.experts[0], scales={"model.layers.0.mlp.up_proj.weight": scale})
        with pytest.raises(InputError, match=r"activations of shape .* do not fit 'model.layers.0.mlp.up_proj.weight'"):
            Merge.of(merge.settings, merge.base, [expert])
        random = open_merge("dare_ties", family.base, [family.math])
        with pytest.raises(InputError, match="dare_ties does not trim by size"):
            Merge.of(random.settings, random.base, [expert])

    @pytest.mark.parametrize(
        "settings", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"up_proj": 32}}]
    )
    @pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
    def test_a_lora_expert_merges_as_its_materialised_self(
        self, family: Family, tmp_path: Path, settings: dict[str, Any], method: str
    ) -> None:
        adapter = write_lora(family.base, tmp_path / "adapter", **settings)
        full = materialise(family.base, adapter, tmp_path / "full")
        parameters = {"weight": 0.6} | ({"density": 0.9} if method == "ties" else {})
        ours, theirs = (
            open_merge(method, family.base, [e, family.code], parameters=parameters) for e in (adapter, full)
        )
        equal = total = 0
        for name in ours.layout:
            close = torch.isclose(ours.tensor(name), theirs.tensor(name), rtol=1e-5, atol=1e-6)
            equal, total = equal + int(close.sum()), total + close.numel()
        assert equal >= total * (1 if method == "task_arithmetic" else 0.999)  # rounding may swap ranks at a threshold

    def test_a_lora_expert_alone_comes_out_as_peft_merges_it(self, family: Family, tmp_path: Path) -> None:
        merged = load_file(materialise(family.base, family.lora, tmp_path / "full") / "model.safetensors")
        merge = open_merge("ties", family.base, [family.lora])
        assert all(torch.allclose(merge.tensor(name), merged[name], rtol=1e-6, atol=1e-7) for name in merge.layout)


def change(family: Family, folder: Path, edit: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    return rewrite(family.math, folder, edit)


class TestRefused:
    """Exit with one clear message, and leave nothing behind."""

    def refused(self, family: Family, expert: Path, *expected: str, **arguments: Any) -> None:
        with pytest.raises(InputError) as caught:
            open_merge("ties", family.base, [family.code, expert], **arguments)
        assert all(part in str(caught.value) for part in expected), str(caught.value)

    def test_other_shapes(self, family: Family, tmp_path: Path) -> None:
        expert = write_llama(tmp_path / "wide", hidden=32)
        self.refused(
            family, expert, str(expert), "has shape [64, 32], in the base it is [64, 16]", "expected fine-tunes"
        )

    def test_missing_and_extra_tensors_are_told_together(self, family: Family, tmp_path: Path) -> None:
        mlp = "layers.1.mlp"  # one layer less would be told by its config
        expert = change(family, tmp_path / "less", lambda name, t: None if mlp in name else t)
        self.refused(family, expert, "3 tensors of the base are missing, the first is 'model.layers.1.")
        deep = write_llama(tmp_path / "deep", layers=3)
        self.refused(family, deep, "9 tensors are not in the base, the first is 'model.layers.2.")

    def test_old_buffers_are_no_reason(self, family: Family, tmp_path: Path) -> None:
        old, layer = shard(family.math, tmp_path / "old", parts=1), "model.layers.0"
        buffers = {
            f"{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2),
            f"{layer}.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
            f"{layer}.attention.masked_bias": torch.tensor(-1e9),
        }
        for path in old.glob("model*"):
            path.unlink()
        save_file(load_file(family.math / "model.safetensors") | buffers, old / "model.safetensors")
        plain = open_merge("ties", family.base, [family.math])
        for base, expert in ((family.base, old), (old, family.base)):
            assert open_merge("ties", base, [expert]).layout == plain.layout

    def test_an_untied_expert_of_a_tied_base(self, family: Family, tmp_path: Path) -> None:
        expert = write_llama(tmp_path / "untied", tied=False)
        self.refused(
            family, expert, f"{expert}: 'lm_head.weight' is a weight of its own, in the base it is tied", "merge onto a"
        )

    def test_a_head_that_was_saved_beside_its_equal_embedding(self, family: Family, tmp_path: Path) -> None:
        tensors = load_file(family.math / "model.safetensors")
        expert = change(family, tmp_path / "saved", lambda _, t: t)
        embedding = tensors["model.embed_tokens.weight"]
        save_file(tensors | {"lm_head.weight": embedding.clone()}, expert / "model.safetensors")
        edit_json(expert / "config.json", tie_word_embeddings=False)
        merge = open_merge("ties", family.base, [expert])
        assert "lm_head.weight" not in merge.layout
        assert bits(merge.tensor("model.embed_tokens.weight")) == bits(embedding)

    def test_a_head_that_is_missing_though_nothing_is_tied(self, family: Family, tmp_path: Path) -> None:
        base = write_llama(tmp_path / "untied", tied=False)
        expert = rewrite(base, tmp_path / "headless", lambda name, t: None if "lm_head" in name else t)
        with pytest.raises(InputError, match=r"1 tensors of the base are missing, the first is 'lm_head.weight'"):
            open_merge("ties", base, [expert])
        headless = open_merge("ties", expert, [base])  # an encoder has none: what its expert has besides is left out
        assert headless.layout.keys() == Checkpoint(expert, "k").tensors.keys()

    def test_what_an_expert_has_besides_is_left_out_with_a_warning(
        self, family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tensors = load_file(family.math / "model.safetensors")
        expert = change(family, tmp_path / "more", lambda _, t: t)
        save_file(tensors | {"v_head.weight": torch.ones(1, 16), "score.bias": torch.ones(3)}, expert / SINGLE)
        merge, plain = (open_merge("ties", family.base, [e, family.code]) for e in (expert, family.math))
        assert f"{expert}: left out of the merge, since the base has no score.bias, v_head.weight" in caplog.text
        assert merge.layout == plain.layout
        assert all(bits(merge.tensor(name)) == bits(plain.tensor(name)) for name in merge.layout)
        bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}
        save_file(tensors | bias, expert / SINGLE)
        self.refused(family, expert, f"{expert}: 1 tensors are not in the base, the first is 'model.layers.0.self_attn")

    def test_a_tied_expert_of_an_untied_base_reads_its_embedding(self, family: Family, tmp_path: Path) -> None:
        base = write_llama(tmp_path / "untied", tied=False)
        merge = open_merge("ties", base, [family.math])
        assert bits(merge.tensor("lm_head.weight")) == bits(
            Checkpoint(family.math, "k").read("model.embed_tokens.weight")
        )

    def test_another_vocabulary_of_the_same_size(self, family: Family, tmp_path: Path) -> None:
        expert = change(family, tmp_path / "other", lambda _, t: t)
        write_tokenizer(expert, [f"w{i}" for i in reversed(range(60))])
        self.refused(family, expert, "another vocabulary: the token 'w0' is 62, in the base it is 3")
        write_tokenizer(expert, [f"v{i}" for i in range(60)])
        self.refused(family, expert, "another vocabulary: token 3 is 'v0', in the base it is 'w0'")

    def test_another_unigram_vocabulary(self, family: Family, tmp_path: Path) -> None:
        folders = [rewrite(family.math, tmp_path / name, lambda _, t: t) for name in ("base", "expert")]
        for folder, tokens in zip(folders, ("ab", "ba"), strict=True):
            model = {"type": "Unigram", "vocab": [[token, -1.0] for token in tokens]}
            (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": None}))
        with pytest.raises(InputError, match="the token 'a' is 1, in the base it is 0"):
            open_merge("ties", folders[0], folders[1:])

    def test_an_adapter_on_another_model(self, family: Family, tmp_path: Path) -> None:
        wide = write_llama(tmp_path / "wide", hidden=32)
        adapter = LoraExpert(Checkpoint(wide, "wide"), write_lora(wide, tmp_path / "adapter"), "wide+adapter")
        merge = open_merge("ties", family.base, [family.math])
        with pytest.raises(InputError, match=r"has shape \[64, 32\], in the base it is \[64, 16\]"):
            Merge.of(merge.settings, merge.base, [Expert(merge.experts[0].ref, adapter)])

    def test_a_filter_that_matches_nothing(self, family: Family) -> None:
        with pytest.raises(RecipeError, match=r"parameters.weight\[0\].filter: 'self_atn' matches no tensor"):
            open_merge("ties", family.base, [family.math], parameters={"weight": [{"filter": "self_atn", "value": 1}]})

    def test_a_pattern_of_exclude_that_matches_nothing(self, family: Family) -> None:
        with pytest.raises(RecipeError, match=r"exclude\[1\]: 'mlp.up_prj' matches no tensor; did you mean 'mlp.up"):
            open_merge("ties", family.base, [family.math], exclude=["mlp", "mlp.up_prj"])
        with pytest.raises(RecipeError, match=r"exclude\[0\]: 'layers.\?.mlp' matches no tensor"):
            open_merge("ties", family.base, [family.math], exclude=["layers.?.mlp"])  # only * stands for other text
        with pytest.raises(RecipeError, match="exclude: what is excluded is copied from the base; set base_model"):
            open_merge("linear", None, family.experts, parameters={"weight": 1}, exclude=["mlp"])
        with pytest.raises(InputError, match="nothing is left to merge"):
            open_merge("ties", family.base, [family.math], exclude=["*"])

    def test_weights_that_cancel(self, family: Family) -> None:
        merge = open_merge("linear", None, family.experts, own=[{"weight": 1}, {"weight": -1}])
        with pytest.raises(InputError, match=r"model\..*: linear: the weights .* sum to 0"):
            merge.tensor("model.norm.weight")

    def test_weights_that_cancel_but_for_rounding_errors(self, family: Family, tmp_path: Path) -> None:
        """0.1 + 0.2 - 0.3 is 5.6e-17: the average was divided by that."""
        models, own = [family.base, family.math, family.code], [{"weight": each} for each in (0.1, 0.2, -0.3)]
        for method in ("linear", "multislerp"):
            with pytest.raises(InputError, match=rf"{method}: the weights .* sum to 0"):
                open_merge(method, None, models, own=own).run(tmp_path / method)

    def fails(self, merge: Merge, out: Path, *expected: str) -> None:
        with pytest.raises(LewisError) as caught:
            merge.run(out)
        assert all(part in str(caught.value) for part in expected), str(caught.value)
        assert [p.name for p in out.parent.iterdir() if "out" in p.name] == []

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("method", METHODS)
    def test_a_value_that_is_not_finite(self, family: Family, tmp_path: Path, method: str, value: float) -> None:
        def damage(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == "model.layers.1.mlp.up_proj.weight":
                tensor[3, 5] = value
            return tensor

        expert = change(family, tmp_path / "damaged", damage)
        merge = open_merge(method, None if method == "linear" else family.base, [family.code, expert])
        self.fails(
            merge, tmp_path / "out", str(expert), "'model.layers.1.mlp.up_proj.weight' has 1 values that are NaN"
        )

    def test_nan_in_the_base_and_in_an_adapter(self, family: Family, tmp_path: Path) -> None:
        base = rewrite(family.base, tmp_path / "base", lambda name, t: t * float("nan") if "norm" in name else t)
        self.fails(open_merge("ties", base, [family.math]), tmp_path / "out", str(base), "norm.weight' has 16 values")
        adapter = write_lora(family.base, tmp_path / "adapter")
        damaged = {key: t * float("nan") for key, t in load_file(adapter / "adapter_model.safetensors").items()}
        save_file(damaged, adapter / "adapter_model.safetensors")
        self.fails(open_merge("ties", family.base, [adapter]), tmp_path / "out", f"{adapter}: tensor ", "NaN")

    def test_a_result_too_large_for_fp16(self, family: Family, tmp_path: Path) -> None:
        expert = change(family, tmp_path / "large", lambda name, t: t * 0 + 1e5 if "norm" in name else t)
        merge = open_merge("ties", family.base, [expert], dtype="float16")
        self.fails(
            merge,
            tmp_path / "out",
            "norm.weight: the merged value 1e+05 does not fit torch.float16; set out_dtype: bfloat16",
        )

    def test_weights_that_overflow(self, family: Family, tmp_path: Path) -> None:
        merge = open_merge("task_arithmetic", family.base, family.experts, parameters={"weight": 1e38, "lambda": 1e38})
        self.fails(merge, tmp_path / "out", "task_arithmetic gave NaN or Inf; lower its weights or lambda")

    def test_what_overflows_is_told_once(
        self, family: Family, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        parameters = {"weight": 3e38, "normalize_weights": False}
        merge = open_merge("multislerp", family.base, family.experts, parameters=parameters)
        self.fails(merge, tmp_path / "out", "multislerp gave NaN or Inf; lower its weights or lambda")
        assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]

    def test_no_disk_space(self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 1000))
        merge = open_merge("ties", family.base, family.experts)
        self.fails(merge, tmp_path / "out", "no space: the output needs 10.0 MB, 1.0 KB are free")

    @pytest.mark.parametrize("failing", ["writer.CheckpointWriter._lay_out", "folder.shutil.copyfile"])
    def test_a_disk_that_fails_beside_the_tensors(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(f"lewis.models.files.{failing}", full)
        merge = open_merge("ties", family.base, family.experts)
        self.fails(merge, tmp_path / "out", f"{tmp_path / 'out'}: cannot be written: No space left on device")

    def test_one_of_the_models(self, family: Family, tmp_path: Path) -> None:
        open_merge("ties", family.base, family.experts).run(tmp_path / "earlier")
        merge = open_merge("ties", family.base, [tmp_path / "earlier"])
        with pytest.raises(InputError, match="one of the models that are merged"):
            merge.run(tmp_path / "earlier")

    def test_a_folder_that_is_not_ours(self, family: Family, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("mine")
        with pytest.raises(InputError, match=r"not empty, and no earlier output of LEWIS"):
            open_merge("ties", family.base, family.experts).run(tmp_path / "mine")
        assert os.listdir(tmp_path / "mine") == ["thesis.txt"]

    @pytest.mark.parametrize("name", ["notes.md", "expert/model.safetensors"])
    def test_an_earlier_output_with_files_of_others(self, family: Family, tmp_path: Path, name: str) -> None:
        """It was removed with all that somebody had put there, an expert of the merge among it."""
        merge, folder = open_merge("ties", family.base, family.experts), tmp_path / "out"
        merge.run(folder)
        (folder / "README.md").write_text("the card")
        merge.run(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        with pytest.raises(InputError, match=f"holds '{name}', which LEWIS did not write"):
            merge.run(folder)
        assert (folder / name).read_text() == "mine"

    def test_a_merge_that_is_interrupted(self, family: Family, tmp_path: Path) -> None:
        def interrupt(name: str, done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            open_merge("ties", family.base, family.experts).run(tmp_path / "out", progress=interrupt)
        assert list(tmp_path.iterdir()) == []
