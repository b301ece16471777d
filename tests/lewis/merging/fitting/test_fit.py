"""Merging by regression on calibration rows: against a plain implementation, and what must not change the result."""

import errno
import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lewis import library, store
from lewis.errors import InputError, LewisError, RecipeError
from lewis.importance.calibration import Calibration
from lewis.importance.measure import network_of
from lewis.merging import forecast as forecasts
from lewis.merging.run import Merge
from lewis.merging.settings import Expert, resolve
from lewis.models.checkpoint import Checkpoint
from lewis.models.network.module_tree import Network
from lewis.recipe.recipe import Recipe
from lewis.steps.graph import warning_of_shared_set
from lewis.steps.plan import Plan
from tests.conftest import Family
from tests.lewis.models.test_module_tree import DENSE, SAMPLES, SIZES, T5, write
from tests.support import pipeline
from tests.support.models import WORDS, parse, rewrite, write_expert, write_llama, write_tensors, write_tokenizer
from tests.support.tiny_architectures import tiny
from tests.support.warm import WarmPython

pytestmark = pytest.mark.usefixtures("home")
RIDGE = 1e-3
SPEC = {"dataset": "json", "prompt": "{question} ", "answer": "{answer}", "samples": 6, "weight": {"prompt": 0.25}}


def texts(seed: int, count: int = 6) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def recipe_of(base: Path, experts: list[Path], method: str = "regmean_forward", **blocks: Any) -> Recipe:
    sets = {f"s{path.name}": {"texts": texts(len(path.name)), "samples": 6} for path in experts}
    models = [{"model": str(path), "calibration": f"s{path.name}"} for path in experts]
    data = {"merge_method": method, "base_model": str(base), "models": models, "parameters": {"ridge": RIDGE}}
    recipe = {**data, "lewis": {"calibrations": sets}, **blocks}
    if method == "regmean_forward" and recipe["lewis"]:
        recipe["lewis"] = {"hold_back": False, **recipe["lewis"]}
    return parse(recipe)


def prepare(recipe: Recipe) -> Merge:
    base, experts = pipeline.pin_all(recipe)
    return pipeline.prepare_merge(recipe, pipeline.download(base), [pipeline.download(each) for each in experts])


def run(recipe: Recipe, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    prepare(recipe).run(folder, **options)
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def plainly(merge: Merge, forward: bool) -> dict[str, torch.Tensor]:
    """The definition, one projection after another, each with passes of its own through whole models."""
    models = [AutoModelForCausalLM.from_pretrained(e.model.folder, dtype=torch.float32) for e in merge.experts]
    merged = AutoModelForCausalLM.from_pretrained(merge.base.folder, dtype=torch.float32)
    base = {n: b.clone() for n, b in merged.state_dict().items()}
    anchor = {n: b + sum(m.state_dict()[n] - b for m in models) for n, b in base.items()}
    merged.load_state_dict(anchor)

    before = {".o": "input_layernorm", ".down": "post_attention_layernorm"}  # whose input is the stream

    def inputs(model: Any, path: str, samples: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = model.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
        for sample in samples:
            model(torch.tensor([sample]))
        hook.remove()
        return torch.cat(seen).double()

    found, names = {}, ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    paths = [f"model.layers.{layer}.{name}_proj" for layer in range(merged.config.num_hidden_layers) for name in names]
    with torch.no_grad():
        for path in ["lm_head", *paths] if forward else paths:  # the head is the embedding, too
            start = anchor[f"{path}.weight"].double()
            left, right, prior, pulled = 0.0, 0.0, 0.0, 0.0
            block, _, name = path.removesuffix("_proj").partition(".self_attn" if "self_attn" in path else ".mlp")
            for expert, model in zip(merge.experts, models, strict=True):
                samples, weights = expert.calibration.samples, expert.calibration.factors
                own = inputs(model, path, samples)
                there = inputs(merged, path, samples) if forward and path != "lm_head" else own
                counts = torch.ones(len(own), 1, dtype=torch.float64)
                if weights and name not in (".k", ".v"):
                    counts = torch.cat([torch.tensor(each) for each in weights]).double()[:, None]
                left = left + there.T @ (counts * there) / len(own)
                wanted = own @ model.state_dict()[f"{path}.weight"].double().T - there @ start.T
                if forward and name in before:
                    norm = f"{block}.{before[name]}"
                    wanted = wanted + inputs(model, norm, samples) - inputs(merged, norm, samples)
                right = right + wanted.T @ (counts * there) / len(own)
                moved = model.state_dict()[f"{path}.weight"].double() - base[f"{path}.weight"].double()
                tau = (counts * there.square()).sum() / len(there) / moved.square().sum()
                prior = prior + tau * moved.T @ moved
                pulled = pulled + tau * (model.state_dict()[f"{path}.weight"].double() - start) @ moved.T @ moved
            ridge = RIDGE * left.diagonal().mean() * torch.eye(len(left), dtype=torch.float64)
            left, right = left + prior, right + pulled
            left = left + ridge
            found[f"{path}.weight"] = (start + right @ torch.linalg.inv(left)).float()
            merged.get_submodule(path).weight.copy_(found[f"{path}.weight"])
    found["model.embed_tokens.weight"] = found.get("lm_head.weight", anchor["lm_head.weight"])
    return {n: found.get(n, anchor[n]) for n in merge.layout}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "weighted"),
    [
        ("regmean", False),
        pytest.param("regmean", True, marks=pytest.mark.long),
        pytest.param("regmean_forward", False, marks=pytest.mark.long),
        ("regmean_forward", True),
    ],
)
def test_equals_a_plain_implementation(method: str, weighted: bool, family: Family, tmp_path: Path) -> None:
    blocks = {}
    if weighted:
        for i, path in enumerate(family.experts):
            rows = [{"question": text, "answer": text[: 3 * i + 9]} for text in texts(i)]
            (tmp_path / f"{path.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets = {
            f"s{path.name}": {"data_files": str(tmp_path / f"{path.name}.jsonl"), **SPEC} for path in family.experts
        }
        blocks = {"lewis": {"calibrations": sets}}
    recipe = recipe_of(family.base, family.experts, method, parameters={"ridge": RIDGE, "bound": 0}, **blocks)
    assert weighted == all(expert.calibration.weights is not None for expert in prepare(recipe).experts)
    expected = plainly(prepare(recipe), forward=method == "regmean_forward")
    found = run(recipe, tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_does_on_an_experts_rows_what_the_expert_does(family: Family, tmp_path: Path) -> None:
    """Closer to each expert's hidden states, on its own rows, than the sum of the task vectors is."""

    def expert_of(name: str, seed: int) -> Path:
        noise = torch.Generator().manual_seed(seed)
        return rewrite(
            family.base,
            tmp_path / name,
            lambda tensor, value: (
                value + 0.1 * torch.randn(value.shape, generator=noise) if "proj" in tensor else value
            ),
        )

    experts = [expert_of("a", 1), expert_of("bb", 2)]
    recipe = recipe_of(family.base, experts)
    run(recipe, tmp_path / "fit")
    summed = {"merge_method": "task_arithmetic", "base_model": str(family.base)}
    prepare(parse({**summed, "models": [{"model": str(each)} for each in experts]})).run(tmp_path / "sum")
    for expert in prepare(recipe).experts:
        ids = [torch.tensor([sample]) for sample in expert.calibration.samples]

        def states(folder: Path, ids: list[torch.Tensor] = ids) -> torch.Tensor:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
            with torch.no_grad():
                return torch.cat([model(each)[0][0] for each in ids])

        wanted = states(expert.model.folder)
        assert (states(tmp_path / "fit") - wanted).norm() < 0.7 * (states(tmp_path / "sum") - wanted).norm()


@pytest.mark.slow
def test_same_bytes_and_digest_for_any_order_threads_and_shards(family: Family, tmp_path: Path) -> None:
    recipe = recipe_of(family.base, [*family.experts, family.lora])
    first = run(recipe, tmp_path / "one", threads=1)
    other = recipe_of(family.base, [family.lora, *reversed(family.experts)])
    again = run(other, tmp_path / "two", threads=3, max_shard_size=6000)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    assert prepare(recipe).digest == prepare(other).digest
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_other_rows_ridge_or_weights_give_another_digest(family: Family) -> None:
    recipe = recipe_of(family.base, family.experts)
    others = [
        recipe_of(family.base, family.experts, parameters={"ridge": 1.0}),
        recipe_of(family.base, family.experts, parameters={"ridge": RIDGE, "weight": 0.5}),
        recipe_of(family.base, family.experts, parameters={"ridge": RIDGE, "alpha": 0.5}),
        recipe_of(family.base, family.experts, parameters={"ridge": RIDGE, "prior": 0.5}),
        recipe_of(family.base, family.experts, "regmean"),
        Recipe.parse(recipe.text, root=Path("/"), overrides=["lewis.calibrations.smath.samples=5"]),
    ]
    digests = {prepare(each).digest for each in (recipe, *others)}
    assert len(digests) == 1 + len(others)
    same = recipe_of(family.base, family.experts, parameters={"ridge": RIDGE, "alpha": 1.0})
    assert prepare(same).digest == prepare(recipe).digest


def test_one_expert_comes_out_as_it_is(family: Family, tmp_path: Path) -> None:
    found, expert = (
        run(recipe_of(family.base, [family.math]), tmp_path / "out"),
        load_file(family.math / "model.safetensors"),
    )
    for name, tensor in found.items():
        assert torch.equal(tensor, expert[name]), name


def test_excluded_tensors_are_the_bases(family: Family, tmp_path: Path) -> None:
    found = run(recipe_of(family.base, family.experts, exclude=["mlp"]), tmp_path / "out")
    base = load_file(family.base / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) == ("mlp" in name) for name, tensor in found.items())


def test_fitted_in_half_precision_is_written_so(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", dtype=torch.bfloat16)
    experts = [write_expert(base, tmp_path / name, seed=i, scale=0.1) for i, name in enumerate(("a", "bb"))]
    found = run(recipe_of(base, experts, dtype="float16"), tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


ODDEST = ("gemma2", "gpt2", "neox", "mixtral", "t5")
SOME_MOES = {"mixtral": ("Mixtral", SIZES | {"num_local_experts": 4}), "t5": ("T5", T5)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k in ODDEST else pytest.mark.long) for k in (*DENSE, *SOME_MOES)],
)
def test_every_architecture_is_fitted(kind: str, tmp_path: Path) -> None:
    """Biases, Conv1D, parallel blocks, norms after the projections, an encoder with a decoder, experts of a mixture."""
    name, sizes = (DENSE | SOME_MOES)[kind][:2]
    base = tmp_path / "base"
    network = write(base, name, sizes)
    models = []
    for seed in (1, 2):
        noise = torch.Generator().manual_seed(seed)
        moved = {
            key: value + (0.1 * torch.randn(value.shape, generator=noise) if ".bias" not in key else 0.05 * seed)
            for key, value in load_file(base / "model.safetensors").items()
        }
        models.append(write_tensors(tmp_path / f"expert{seed}", moved))
        shutil.copy(base / "config.json", models[-1] / "config.json")
    opened = [Checkpoint(folder, folder.name) for folder in (base, *models)]
    merge_settings = resolve(
        recipe_of(
            base,
            models,
            lewis={"calibrations": {"a": {"texts": ["x"], "samples": 1}}},
            models=[{"model": str(folder)} for folder in models],
        ),
    )
    sets = [Calibration("a", SAMPLES), Calibration("b", SAMPLES[::-1])]
    experts = [
        Expert(str(folder), model, calibration=each)
        for folder, model, each in zip(models, opened[1:], sets, strict=True)
    ]
    merge = Merge.of(merge_settings, opened[0], experts)
    merge.run(tmp_path / "out")
    found = Checkpoint(tmp_path / "out", "out")
    summed = {key: merge.tensor(key) for key in found.tensors}
    fitted = [key for key in found.tensors if not torch.equal(found.read(key), summed[key])]
    dense = [
        key for key, module in network.named_modules() if isinstance(module, torch.nn.Linear) and "head" not in key
    ]
    assert len(fitted) >= (len(dense) or 8) and all(bool(found.read(key).isfinite().all()) for key in found.tensors)


def merge_of(kind: str, folder: Path, scale: float, held_back: Calibration | None = None) -> Merge:
    """A merge of two experts of a model type; noise of `scale` is added from the base to one, and to the other."""
    torch.manual_seed(0)
    model, opened = tiny(kind), []
    for name in ("base", "a", "bb"):
        model.save_pretrained(folder / name)
        opened.append(Checkpoint(folder / name, name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
    models = [{"model": str(each.folder)} for each in opened[1:]]
    block = {"calibrations": {"a": {"texts": ["x"], "samples": 1}}}
    rows = Calibration("a", SAMPLES)
    experts = [Expert(str(each.folder), each, calibration=rows, held_back=held_back) for each in opened[1:]]
    return Merge.of(resolve(recipe_of(opened[0].folder, [], models=models, lewis=block)), opened[0], experts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["mamba", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("gemma3n_text", "zamba"))]
)
def test_what_no_module_is_called_for_is_merged_as_it_is(kind: str, tmp_path: Path) -> None:
    """The passes of Mamba and Gemma 3n took what lay in memory for such a weight; Zamba ended in a traceback."""
    merge = merge_of(kind, tmp_path, 0.02)
    found = []
    for name in ("one", "again"):
        merge.run(tmp_path / name)
        found.append(load_file(tmp_path / name / "model.safetensors"))
    one, again = found
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    fitted = {key for key, value in one.items() if not torch.equal(value, merge.tensor(key))}
    uncalled = {key for key in one if "dt_proj.weight" in key or ("altup_" in key and "proj" in key)}
    assert len(fitted) >= 2 and not fitted & uncalled and (uncalled or kind == "zamba")


def test_a_weight_that_is_used_outside_of_its_block_is_named(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fit began again without end."""
    used = list[int]()

    def second_uses_first(model: Any) -> Network:
        network = network_of(model)
        first, second = network.module.model.layers[:2]

        def use(*_: Any) -> None:
            used.append(1)
            assert len(used) < 99
            torch.neg(first.mlp.up_proj.weight)

        second.mlp.register_forward_pre_hook(use)
        return network

    monkeypatch.setattr("lewis.importance.measure.network_of", second_uses_first)
    merge = prepare(recipe_of(family.base, family.experts))
    with pytest.raises(LewisError, match=r"layers\.0\.mlp\.up_proj\.weight: used before it was loaded"):
        merge.run(tmp_path / "out")


def test_a_projection_that_gets_no_tensor_from_text_alone_is_named(tmp_path: Path) -> None:
    """It was an AssertionError without a word."""
    merge = merge_of("voxtral_realtime", tmp_path, 0.02)
    with pytest.raises(InputError, match=r"does not run on text alone \(TypeError: \S*ada_rms_norm.linear1 gets"):
        merge.run(tmp_path / "out")


KILLED = """
import os, sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from tests.support import pipeline
from lewis.merging.fitting import fit, spill
from lewis.recipe.recipe import Recipe
fit.IN_MEMORY, spill.LARGE = 0, 1  # what rests is in files
recipe = Recipe.load(sys.argv[1])
base, experts = pipeline.pin_all(recipe)
merge = pipeline.prepare_merge(recipe, pipeline.download(base), [pipeline.download(expert) for expert in experts])
kill = lambda name, done, total: done >= float(sys.argv[3]) * total and os.kill(os.getpid(), 9)
merge.run(Path(sys.argv[2]), progress=kill)
"""


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_goes_on_after_a_kill_with_the_same_bytes(
    share: float, family: Family, tmp_path: Path, warm: WarmPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block was fitted by the killed process, and is not fitted again."""
    from lewis.methods.arithmetic.regression import Inputs

    recipe = recipe_of(family.base, family.experts)
    (tmp_path / "recipe.yaml").write_text(recipe.text)
    killed = warm.exit_code(KILLED, tmp_path / "recipe.yaml", tmp_path / "out" / "model", share)
    assert killed == -signal.SIGKILL
    assert not list(tmp_path.rglob("*.rest"))
    solve, solved = Inputs.solve, []
    monkeypatch.setattr(Inputs, "solve", lambda *given, **named: solved.append(1) or solve(*given, **named))
    found = run(recipe, tmp_path / "out" / "model")
    assert len(solved) == (7 if share < 0.5 else 0)
    expected = run(recipe, tmp_path / "undisturbed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "out" / "model").glob(".fitted*"))


@pytest.mark.slow
def test_what_is_fitted_again_between_known_parts_has_its_own_inputs(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of the projection that was fitted last were taken, where the ones between were known already."""
    from lewis.merging.fitting import fit, walk

    monkeypatch.setattr(walk, "IN_MEMORY_FITTED", 0)  # a file for each tensor
    merge, folder = prepare(recipe_of(family.base, family.experts)), tmp_path / "fitted"
    damaged = [f"model.layers.0.{each}.weight" for each in ("self_attn.o_proj", "mlp.up_proj")]
    first = fit.fit(merge, folder)
    whole = {name: first.read(name) for name in damaged}
    for name in damaged:
        (folder / f"{name}.safetensors").write_bytes(b"")
    again = fit.fit(merge, folder)
    assert all(torch.equal(again.read(name), whole[name]) for name in damaged)


def test_a_damaged_part_of_a_killed_fit_is_not_believed(family: Family, tmp_path: Path) -> None:
    from lewis.merging.fitting.fitted import Fitted

    kept = Fitted(tmp_path / "fitted")
    kept.add("block", {"a": torch.ones(3)})
    assert "a" in Fitted(tmp_path / "fitted")
    path = tmp_path / "fitted" / "block.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "a" not in Fitted(tmp_path / "fitted")


class TestInFiles:
    """What rests between two projections is in files if it is much."""

    @pytest.fixture(autouse=True)
    def files(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The sizes of the files that are made; all that rests is much and large."""
        made: list[int] = []
        monkeypatch.setattr("lewis.merging.fitting.fit.IN_MEMORY", 0)
        monkeypatch.setattr("lewis.merging.fitting.spill.LARGE", 1)
        monkeypatch.setattr("lewis.merging.fitting.walk.IN_MEMORY_FITTED", 0)
        monkeypatch.setattr(
            "os.posix_fallocate", lambda file, start, size: made.append(os.ftruncate(file, size) or size)
        )
        return made

    @pytest.mark.slow
    def test_the_bytes_are_the_same_and_no_file_has_a_name(
        self, family: Family, tmp_path: Path, files: list[int]
    ) -> None:
        recipe = recipe_of(family.base, [*family.experts, family.lora])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lewis.merging.fitting.fit.IN_MEMORY", 1 << 30)
            expected = run(recipe, tmp_path / "memory")
        assert not files
        named: list[Path] = []
        found = run(recipe, tmp_path / "files", progress=lambda *_: named.extend(tmp_path.rglob("*.rest")), threads=2)
        assert len(files) > 100 and not named
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_no_space_is_told_before_and_meanwhile(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = recipe_of(family.base, family.experts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lewis.merging.fitting.fit.paused_bytes", lambda *_: 10**15)
            with pytest.raises(InputError, match="no space: the fit, with the inputs kept between two projections"):
                run(recipe, tmp_path / "out")

        def full(*_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(LewisError, match="cannot be written: No space left on device"):
            run(recipe, tmp_path / "out")
        assert not list(tmp_path.rglob("*.rest"))


@pytest.mark.slow
def test_passes_keep_only_the_tokens_that_a_wide_layer_is_fitted_on(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lewis.methods.arithmetic.regression.DUAL_ABOVE", 20)  # of 16 and 32 inputs
    monkeypatch.setattr("lewis.methods.arithmetic.regression.DUAL_TOKENS", 30)
    recipe = recipe_of(family.base, family.experts, parameters={"ridge": RIDGE, "prior": 0})
    found = run(recipe, tmp_path / "found")
    monkeypatch.setattr(
        "lewis.merging.fitting.fit.sampled", lambda *_: None
    )  # all rows, of which the regression takes a share
    expected = run(recipe, tmp_path / "expected")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_few_tokens_are_told_with_their_number(family: Family, tmp_path: Path, caplog: Any) -> None:
    sets = {"few": {"texts": ["w1 w2 w3"], "samples": 1}}
    models = [{"model": str(family.math)}]
    run(recipe_of(family.base, [family.math], models=models, lewis={"calibrations": sets}), tmp_path / "out")
    assert "14 of 14 projections saw fewer tokens of its calibration set than they have inputs, such as" in caplog.text
    assert "down_proj.weight, 3 tokens for 32 inputs" in caplog.text


def test_experts_that_share_a_set_by_default_are_told(family: Family, caplog: Any) -> None:
    sets = {"some": {"texts": ["w1 w2 w3"], "samples": 1}}

    def of(*names: str | None, **blocks: Any) -> Recipe:
        models = [
            {"model": str(path), **({"calibration": name} if name else {})}
            for path, name in zip(family.experts, names, strict=False)
        ]
        return recipe_of(family.base, family.experts, models=models, lewis={"calibrations": sets}, **blocks)

    told = warning_of_shared_set(of(None, None))
    assert (
        told.startswith(f"{family.experts[0]} and {family.experts[1]} name no calibration set, ") and "'some'" in told
    )
    assert "models[].calibration" in told
    assert warning_of_shared_set(of("some", None)).startswith(f"{family.experts[1]} names no calibration set, ")
    assert not warning_of_shared_set(of("some", "some")) and not warning_of_shared_set(of(None))
    assert not warning_of_shared_set(of(None, None, method="ties", parameters={}))
    recipe = of(None, None)
    library.prepare(recipe)
    assert told in caplog.text and f"warning: {told}" in Plan("a", "b", warning=warning_of_shared_set(recipe)).to_text()


def test_a_forecast_counts_the_fit(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit's own memory: that of this process, which earlier tests made large, counts too."""
    monkeypatch.setattr(forecasts, "anonymous_bytes", lambda: 0)
    monkeypatch.setattr(forecasts, "PeakMemory", lambda: nullcontext(SimpleNamespace(peak=0)))
    few, many = (prepare(recipe_of(family.base, each)) for each in ([family.math], family.experts))
    init, made = Network.__init__, []
    monkeypatch.setattr(Network, "__init__", lambda *given: made.append(1) or init(*given))
    found = [forecasts.forecast(each) for each in (few, many)]
    assert len(made) == 2  # of a large model it takes seconds
    assert found[0].seconds > 0 and found[0].memory < found[1].memory < 2e9
    network, shape = network_of(many.base), many.base.tensors["model.embed_tokens.weight"].shape
    held = forecasts._of_fit(many, network, 0.0).memory
    many.layout["model.embed_tokens.weight"] = ("F32", (1 << 20, shape[1]))  # which all passes of the result read
    assert forecasts._of_fit(many, network, 0.0).memory - held == 4 * ((1 << 20) - shape[0]) * shape[1]


@pytest.mark.slow
def test_an_expert_with_its_tokens_in_another_order_is_fitted_alike(family: Family, tmp_path: Path) -> None:
    words = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(3))
    order = torch.cat([torch.arange(3), 3 + words, torch.tensor([63])])
    moved = rewrite(family.math, tmp_path / "math", lambda name, t: t[order] if "embed_tokens" in name else t)
    write_tokenizer(moved, [WORDS[i] for i in words])
    found = []
    for folder, source in ((family.math, None), (moved, "base"), (moved, "union")):
        recipe = recipe_of(family.base, [folder, family.code], tokenizer_source=source)
        found.append(run(recipe, tmp_path / str(source)))
    for other in found[1:]:
        assert all(torch.allclose(other[name], tensor, atol=1e-5) for name, tensor in found[0].items())


@pytest.mark.slow
def test_singular_products_without_a_ridge_give_finite_weights(family: Family, tmp_path: Path) -> None:
    sets = {"few": {"texts": ["w1 w2"], "samples": 1}}
    models = [{"model": str(each)} for each in family.experts]
    blocks = {"models": models, "lewis": {"calibrations": sets}, "parameters": {"ridge": 0}}
    for method in ("regmean", "regmean_forward"):
        found = run(recipe_of(family.base, family.experts, method, **blocks), tmp_path / method)
        assert all(bool(tensor.isfinite().all()) for tensor in found.values())


class TestRefused:
    def test_without_calibration_sets(self, family: Family) -> None:
        with pytest.raises(RecipeError, match=r"lewis\.calibrations: missing; regmean_forward fits"):
            recipe_of(family.base, family.experts, lewis=None)
        with pytest.raises(RecipeError) as refused:
            recipe_of(family.base, family.experts, lewis={}, models=[{"model": str(each)} for each in family.experts])
        told = str(refused.value)
        assert (
            told.count("lewis.calibrations") == 1 and "add lewis: {calibrations: {NAME: {dataset: ..., prompt:" in told
        )

    def test_with_densities(self, family: Family) -> None:
        block = {"calibrations": {"a": {"texts": ["w1 w2"], "samples": 1}}, "density": {"budget": 0.5}}
        with pytest.raises(RecipeError, match=r"lewis\.density: regmean_forward keeps whole task vectors"):
            recipe_of(family.base, family.experts, lewis=block)

    def test_another_vocabulary(self, family: Family, tmp_path: Path) -> None:
        other = shutil.copytree(family.math, tmp_path / "other")
        text = (other / "tokenizer.json").read_text().replace('"w7"', '"x7"')
        (other / "tokenizer.json").write_text(text)
        rows = {"lewis": {"calibrations": {"a": {"texts": ["w1 w7"], "samples": 1}}}}
        rows |= {"models": [{"model": str(each)} for each in (family.code, other)]}
        with pytest.raises(InputError, match=r"another vocabulary: .*w7.*set tokenizer_source to base or union"):
            prepare(recipe_of(family.base, [family.code, other], **rows))
        with pytest.raises(InputError, match=r"another vocabulary: .*w7.*use regmean_forward, with tokenizer_source"):
            prepare(recipe_of(family.base, [family.code, other], "regmean", tokenizer_source="base", **rows))
        with pytest.raises(InputError, match=r"other: its calibration rows have the token 'w7', which this expert's"):
            prepare(recipe_of(family.base, [family.code, other], tokenizer_source="base", **rows))

    @pytest.mark.parametrize("held_back", [False, True])
    def test_rows_that_are_longer_than_the_model_takes(self, held_back: bool, family: Family, tmp_path: Path) -> None:
        """Of a model with learned positions it was a traceback; `plan` did not say so."""
        from lewis.merging.forecast import forecast

        sets = {"s": {"texts": ["w1 " * 65] * 4}}
        models = [{"model": str(each), "calibration": "s"} for each in family.experts]
        recipe = recipe_of(family.base, [], models=models, lewis={"calibrations": sets, "hold_back": held_back})
        told = r"a sample of set 's' has 65 tokens, the model takes 64; set lewis.calibrations.s.max_tokens to 64"
        with pytest.raises(InputError, match=told):
            run(recipe, tmp_path / "out")
        with pytest.raises(InputError, match=told):
            forecast(prepare(recipe))

    def test_tokens_that_have_no_embedding(self, family: Family, tmp_path: Path) -> None:
        """A tokenizer of the base that has more tokens than its embedding has rows was a traceback."""
        merge = prepare(recipe_of(family.base, family.experts))
        odd = tuple(replace(each, calibration=Calibration("s", ((3, 64),))) for each in merge.experts)
        with pytest.raises(InputError, match=r"token 64 of set 's' is outside its 64 embeddings: the tokenizer of the"):
            replace(merge, experts=odd).run(tmp_path / "out")

    @pytest.mark.parametrize(
        ("part", "value", "what"),
        [("up_proj", 1e25, "its weights"), ("input_layernorm", 1e25, "activations into it")],
    )
    def test_the_expert_whose_numbers_are_not_finite_is_named(
        self, part: str, value: float, what: str, family: Family, tmp_path: Path
    ) -> None:
        """The message named a tensor only, and spoke of activations where a weight was too large."""
        odd = rewrite(family.math, tmp_path / "odd", lambda name, t: t.fill_(value) if part in name else t)
        with pytest.raises(LewisError, match=rf"model\.\S* {what} in \S*odd are NaN.*; that model is damaged"):
            run(recipe_of(family.base, [family.code, odd]), tmp_path / "out")

    def test_no_space(self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lewis.store.files._free", lambda _: (1000, False))
        with pytest.raises(InputError, match="no space"):
            run(recipe_of(family.base, family.experts), tmp_path / "out")
        assert not (tmp_path / "out").exists() and store.home()
