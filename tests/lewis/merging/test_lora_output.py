"""Adapters of merges: read back by LEWIS and by PEFT, what error they leave, and what they cannot hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lewis import store
from lewis.errors import InputError, RecipeError
from lewis.importance.calibration import Calibration
from lewis.merging.adapter import factorise
from lewis.merging.export import check_exportable
from lewis.merging.run import Merge
from lewis.merging.settings import Expert
from lewis.merging.step import MergedModel, check_output, prepare, prepare_merge
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora.expert import WEIGHTS, LoraExpert
from lewis.recipe.recipe import Recipe
from lewis.steps.plan import make_plan
from tests.conftest import Family
from tests.lewis.models.test_module_tree import MOES, write
from tests.support import pipeline
from tests.support.models import open_merge, parse, rewrite, write_expert, write_llama, write_lora, write_tokenizer
from tests.support.tiny_architectures import tiny

LORA = {"kind": "lora", "rank": 4}
NORMS = ["norm"]


def truth(*arguments: Any, folder: Path, **keys: Any) -> dict[str, torch.Tensor]:
    """The merged tensors of the full output, fp32."""
    open_merge(*arguments, dtype="float32", **keys).run(folder)
    return load_file(folder / "model.safetensors")


def adapter_of(*arguments: Any, folder: Path, output: dict[str, Any], threads: int = 2, **keys: Any) -> dict[str, Any]:
    """Write an adapter; gives what the manifest says of it."""
    open_merge(*arguments, output=output, **keys).run(folder, threads=threads)
    found: dict[str, Any] = store.read_manifest(folder)["adapter"]  # type: ignore[index]
    return found


def read_by_lewis(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    opened = LoraExpert(Checkpoint(base, "base"), folder, "adapter")
    return {name: opened.read(name).float() for name in opened.tensors}


def read_by_peft(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return state


def relative(found: dict[str, torch.Tensor], merged: dict[str, torch.Tensor], base: Path) -> tuple[float, float]:
    """The relative error over all tensors, and of the worst tensor, of the merged delta."""
    before = load_file(base / "model.safetensors")
    pairs = [(found[n] - merged[n], merged[n] - before[n].float()) for n in merged]
    lefts, norms = ([float(pair[i].double().norm()) for pair in pairs] for i in (0, 1))
    total = sum(left**2 for left in lefts) ** 0.5 / sum(norm**2 for norm in norms) ** 0.5
    return total, max(left / norm for left, norm in zip(lefts, norms, strict=True) if norm)


@pytest.fixture
def loras(family: Family, tmp_path: Path) -> list[Path]:
    """Two experts of rank 4 on the family's base, on different modules."""
    return [family.lora, write_lora(family.base, tmp_path / "lora2", seed=5, targets=["q_proj", "down_proj"])]


def test_two_lora_experts_are_merged_exactly_at_the_sum_of_their_ranks(
    family: Family, loras: list[Path], tmp_path: Path
) -> None:
    parts = ("task_arithmetic", family.base, loras)
    merged = truth(*parts, folder=tmp_path / "full")
    exact = adapter_of(*parts, folder=tmp_path / "out", output={"kind": "lora", "rank": 8})
    assert exact["error"] < 1e-6
    for read in (read_by_lewis, read_by_peft):
        found = read(family.base, tmp_path / "out")
        assert all(torch.allclose(found[name], merged[name], atol=1e-6) for name in merged)
    small = adapter_of(*parts, folder=tmp_path / "small", output=LORA)
    assert small["error"] > 0.01  # only q_proj has both experts
    assert small["worst"].endswith("q_proj")
    by_tolerance = adapter_of(*parts, folder=tmp_path / "by", output={"kind": "lora", "tolerance": 1e-4})
    ranks = {module.rpartition(".")[2]: rank for module, rank in by_tolerance["ranks"].items()}
    assert ranks == {"q_proj": 8, "up_proj": 4, "down_proj": 4}


@pytest.mark.parametrize("kind", ["t5", "ctrl", "whisper"])
def test_an_embedding_is_read_back_whatever_the_network_ties_to_it(kind: str, tmp_path: Path) -> None:
    """T5 ties two more embeddings to it, CTRL has a name of its own for it, and Whisper one for the head."""
    tiny(kind).save_pretrained(tmp_path / "base")
    expert = rewrite(tmp_path / "base", tmp_path / "expert", lambda _, t: t * 1.1 if t.dim() == 2 else t)
    parts = ("task_arithmetic", tmp_path / "base", [expert])
    merged = truth(*parts, folder=tmp_path / "full")
    adapter_of(*parts, folder=tmp_path / "out", output={"kind": "lora", "tolerance": 1e-6})
    found = read_by_lewis(tmp_path / "base", tmp_path / "out")
    assert all(torch.allclose(tensor, merged[name], atol=1e-5) for name, tensor in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("output", [LORA, {"kind": "lora", "tolerance": 0.3}], ids=["rank", "tolerance"])
@pytest.mark.parametrize("method", ["ties", "linear", "slerp"])
def test_the_stated_error_is_that_of_both_readers(
    family: Family, tmp_path: Path, method: str, output: dict[str, Any]
) -> None:
    own = {"slerp": {"t": 0.5}, "ties": {"density": 0.5}, "linear": {"weight": 0.4}}[method]
    experts = [family.math] if method == "slerp" else family.experts
    parts: dict[str, Any] = {"parameters": own, "exclude": NORMS}
    merged = truth(method, family.base, experts, folder=tmp_path / "full", **parts)
    told = adapter_of(method, family.base, experts, folder=tmp_path / "out", output=output, **parts)
    assert told["worst_error"] <= output.get("tolerance", 1)
    assert told["error"] > 0.01
    for read in (read_by_lewis, read_by_peft):
        found = read(family.base, tmp_path / "out")
        total, worst = relative(found, merged, family.base)
        assert total == pytest.approx(told["error"], abs=1e-5)
        assert worst == pytest.approx(told["worst_error"], abs=1e-5)
        # The embedding, which is tied to the head, is saved whole.
        assert torch.equal(found["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
    head = read_by_peft(family.base, tmp_path / "out")["lm_head.weight"]
    assert torch.equal(head, merged["model.embed_tokens.weight"])


def test_a_head_of_its_own_is_saved_whole(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", tied=False, dtype=torch.bfloat16)
    expert = rewrite(base, tmp_path / "expert", lambda name, t: t if "norm" in name or "embed" in name else t * 1.5)
    merged = truth("task_arithmetic", base, [expert], folder=tmp_path / "full")
    told = adapter_of("task_arithmetic", base, [expert], folder=tmp_path / "out", output={"kind": "lora", "rank": 16})
    assert told["whole"] == ["lm_head"]
    for read in (read_by_lewis, read_by_peft):
        found = read(base, tmp_path / "out")
        assert all(torch.allclose(found[name], merged[name], atol=1e-5) for name in merged)


def test_weights_of_gpt2_are_stored_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")

    def move(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.02 * torch.randn_like(tensor) if "c_" in name and name.endswith("weight") else tensor

    expert = rewrite(tmp_path / "base", tmp_path / "expert", move)
    parts = ("task_arithmetic", tmp_path / "base", [expert])
    merged = truth(*parts, folder=tmp_path / "full")
    told = adapter_of(*parts, folder=tmp_path / "out", output=LORA)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    for read in (read_by_lewis, read_by_peft):
        total, worst = relative(read(tmp_path / "base", tmp_path / "out"), merged, tmp_path / "base")
        assert (total, worst) == pytest.approx((told["error"], told["worst_error"]), abs=1e-5)


def test_a_changed_norm_is_refused_unless_it_is_within_the_tolerance(family: Family, tmp_path: Path) -> None:
    parts = ("task_arithmetic", family.base, [family.math])
    with pytest.raises(InputError, match=r"layernorm.*by 0\.0\d+ of its norm.*exclude it.*output\.kind: full"):
        adapter_of(*parts, folder=tmp_path / "out", output=LORA)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="layernorm"):
        adapter_of(*parts, folder=tmp_path / "out", output={"kind": "lora", "tolerance": 0.001})
    told = adapter_of(*parts, folder=tmp_path / "out", output={"kind": "lora", "tolerance": 0.1, "rank": 16})
    assert len(told["left_out"]) == 5
    assert all(0 < share <= 0.1 for share in told["left_out"].values())
    found = read_by_lewis(family.base, tmp_path / "out")
    merged = truth(*parts, folder=tmp_path / "full")
    assert relative(found, merged, family.base)[0] == pytest.approx(told["error"], abs=1e-5)


def test_any_number_of_threads_gives_the_same_bytes(family: Family, tmp_path: Path) -> None:
    for threads in (1, 3):
        parts = ("ties", family.base, family.experts)
        adapter_of(*parts, folder=tmp_path / str(threads), output=LORA, threads=threads, exclude=NORMS)
    first, second = tmp_path / "1", tmp_path / "3"
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert {"adapter_config.json", WEIGHTS, "tokenizer.json", "lewis.json"} <= set(names)
    assert not any(name.startswith((".", "journal", "model")) for name in names)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_method_that_merges_in_torch_ends(family: Family, tmp_path: Path) -> None:
    merge = open_merge("pcb", family.base, family.experts, output=LORA, exclude=NORMS)
    assert not merge.compiles("model.embed_tokens.weight")
    merge.run(tmp_path / "out", threads=3)


def test_the_config_names_base_modules_and_ranks(family: Family, loras: list[Path], tmp_path: Path) -> None:
    output = {"kind": "lora", "tolerance": 1e-4}
    adapter_of("task_arithmetic", family.base, loras, folder=tmp_path / "out", output=output, exclude=["0.mlp"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    q = {f"model.layers.{i}.self_attn.q_proj": 8 for i in range(2)}
    mlp = {f"model.layers.1.mlp.{name}_proj" for name in ("down", "up")}
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(family.base)
    assert set(config["target_modules"]) == {"q_proj", *mlp}  # of the others one block is excluded
    ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in (*q, *mlp)}
    assert ranks == {**q, **dict.fromkeys(mlp, 4)}
    assert (config["alpha_pattern"], config["lora_alpha"]) == (config["rank_pattern"], config["r"])


def test_only_an_adapter_has_the_output_in_its_digest(family: Family) -> None:
    def digest(**keys: Any) -> str:
        return open_merge("ties", family.base, family.experts, dtype="float32", **keys).digest

    assert digest() == digest(output={"kind": "full"})
    assert len({digest(), *(digest(output={"kind": "lora", "rank": rank}) for rank in (4, 8))}) == 3


def test_a_merge_that_changes_nothing_has_no_adapter(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="changes nothing"):
        same = rewrite(family.base, tmp_path / "same", lambda _, tensor: tensor)
        adapter_of("task_arithmetic", family.base, [same], folder=tmp_path / "out", output=LORA)


def test_a_base_that_is_an_adapter_is_refused(family: Family) -> None:
    merge = open_merge("task_arithmetic", family.base, [family.math], output=LORA)
    base = LoraExpert(Checkpoint(family.base, "base"), family.lora, "both")
    with pytest.raises(InputError, match="an adapter on a model itself"):
        Merge.of(merge.settings, base, merge.experts)


@pytest.mark.parametrize(
    "output, told",
    [
        ({"kind": "lora"}, "output: kind lora needs `rank`, `tolerance` or both"),
        ({"rank": 4}, "output: full takes no `rank` or `tolerance`"),
        ({"kind": "lora", "rank": 0}, "output.rank: input should be greater than or equal to 1, got 0"),
        ({"kind": "lora", "tolerance": 1}, "output.tolerance: input should be less than 1, got 1"),
        (LORA, "output.kind: an adapter sits on a base; set base_model, or use full"),
    ],
)
def test_a_wrong_output_block_is_refused(output: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse({"merge_method": "linear", "models": [{"model": "a/b", "parameters": {"weight": 1}}], "output": output})
    assert told in str(refused.value)


def recipe_of(family: Family, **blocks: Any) -> Recipe:
    models = [{"model": str(family.lora)}]
    data = {"merge_method": "task_arithmetic", "base_model": str(family.base), "models": models, "output": LORA}
    return parse({**data, **blocks})


@pytest.mark.usefixtures("home")
def test_an_adapter_in_the_store_is_scored_on_its_base(family: Family) -> None:
    recipe = recipe_of(family)
    plan = make_plan(recipe)
    assert plan.output == f"LoRA adapter on {family.base}, rank at most 4; its error is known after the merge"
    assert plan.output in plan.to_text() and 0 < plan.disk < make_plan(recipe_of(family, output=None)).disk / 2
    base, experts = pipeline.fetch(recipe)
    made = pipeline.merge(recipe, base, experts)
    assert base and made.adapter and made.adapter.to_json() == store.read_manifest(made.folder)["adapter"]  # type: ignore[index]
    files = made.files("merged")
    assert (files.folder, files.adapter, files.key) == (base.folder, made.folder, made.digest)
    assert MergedModel.model_validate_json(made.model_dump_json()) == made  # as Prefect keeps it
    assert pipeline.merge(recipe, base, experts) == made and make_plan(recipe).disk == 0
    full = recipe_of(family, output=None)
    assert '"output"' in recipe.blocks and '"output"' not in full.blocks  # the cache tells them apart
    assert (pipeline.merge(full, base, experts).base, pipeline.merge(full, base, experts).adapter) == (None, None)
    with pytest.raises(InputError, match="mergekit writes full models"):
        check_exportable(recipe, recipe.lewis)
    with pytest.raises(ValueError, match="is gone"):
        MergedModel(digest=made.digest, folder=made.folder, base=made.folder)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("guided", ["", "merge", "anchor"])
def test_what_an_adapter_cannot_hold_is_refused_before_any_work(family: Family, guided: str) -> None:
    blocks: dict[str, Any] = {"merge_method": "ties", "models": [{"model": str(family.math)}]}
    if guided:
        blocks["lewis"] = {"calibrations": {"s": {"texts": ["w1 w2"], "samples": 1}}, "density": {"min": 0.2}}
    if guided == "anchor":  # its own density would keep nothing of so small a tensor
        blocks |= {"merge_method": "regmean_forward"}
        blocks |= {"anchor": {"merge_method": "ties", "parameters": {"density": 0.001}}}
    recipe = recipe_of(family, **blocks)
    prepared = pipeline.prepare_merge(recipe, *pipeline.fetch(recipe))
    with pytest.raises(InputError, match=r"layernorm.*a LoRA adapter cannot hold it"):
        check_output(pipeline.merge_input(recipe, *pipeline.fetch(recipe)), prepared)
    with pytest.raises(InputError, match=r"layernorm.*a LoRA adapter cannot hold it"):
        make_plan(recipe)
    if guided:  # these densities decide, which are to be measured first
        open_to_both = recipe_of(family, **{**blocks, "lewis": {**blocks["lewis"], "density": {"uncovered": "base"}}})
        given = pipeline.merge_input(open_to_both, *pipeline.fetch(open_to_both))
        check_output(given, prepare_merge(given))


@pytest.mark.usefixtures("home")
def test_an_adapter_is_an_expert_of_another_recipe(family: Family, tmp_path: Path) -> None:
    def prepare(recipe: Recipe) -> Merge:
        return pipeline.prepare_merge(recipe, *pipeline.fetch(recipe))

    prepare(recipe_of(family)).run(tmp_path / "out")
    again = recipe_of(family, models=[{"model": str(tmp_path / "out")}], output=None)
    prepare(again).run(tmp_path / "again")
    prepare(recipe_of(family, output=None)).run(tmp_path / "first")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_merge_that_fits(family: Family, tmp_path: Path) -> None:
    sets = {"s": {"texts": ["w1 w2 w3 w4 w5", "w6 w7 w8 w9"], "samples": 2}}
    blocks: dict[str, Any] = {"merge_method": "regmean_forward", "models": [{"model": str(f)} for f in family.experts]}
    blocks |= {"lewis": {"calibrations": sets}, "exclude": NORMS}
    merged = {}
    for name, output in {"full": None, "out": {"kind": "lora", "rank": 16}}.items():
        recipe = recipe_of(family, output=output, **blocks)
        seen: list[int] = []
        pipeline.prepare_merge(recipe, *pipeline.fetch(recipe)).run(
            tmp_path / name,
            progress=lambda _, done, total, seen=seen: seen.append(done - total),  # type: ignore[misc]
        )
        assert seen == sorted(seen) and seen[-1] == 0
    merged = load_file(tmp_path / "full" / "model.safetensors")
    found = read_by_lewis(family.base, tmp_path / "out")
    assert all(torch.allclose(found[name], merged[name], atol=1e-5) for name in merged)
    assert store.read_manifest(tmp_path / "out")["adapter"]["error"] < 1e-5  # type: ignore[index]


def test_what_only_the_fit_moves_is_not_left_out_without_a_word(tmp_path: Path) -> None:
    """Experts of a mixture, which an adapter does not hold: the anchor, which is the base here, does not move them."""
    name, sizes, *_ = MOES["mixtral"]
    base = tmp_path / "base"
    write(base, name, sizes)
    write_tokenizer(base)
    expert = write_expert(base, tmp_path / "expert", seed=1)
    models = [{"model": str(expert)}]
    recipe = parse({
        "merge_method": "regmean", "base_model": str(base), "models": models, "output": {"kind": "lora", "rank": 16},
        "parameters": {"lambda": 0.0, "ridge": 0.1},
    })  # fmt: skip
    opened = [Expert(str(expert), Checkpoint(expert, str(expert)), calibration=Calibration("none", ()))]
    with pytest.raises(InputError, match=r"experts.*: the merge changes it by .* a LoRA adapter cannot hold it"):
        prepare(recipe, Checkpoint(base, str(base)), opened).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
def test_factors_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    delta = torch.randn(shape)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    made = factorise(delta, 5, None)
    assert torch.allclose(made.b @ made.a, (u[:, :5] * s[:5]) @ v[:5], atol=1e-4)
    assert torch.allclose(made.b.norm(dim=0), s[:5], atol=1e-4)
    assert torch.allclose(made.a @ made.a.T, torch.eye(5), atol=1e-5)
    assert made.left == pytest.approx(float(s[5:].norm()), abs=1e-4)
    for tolerance in (0.9, 0.5, 0.1):
        kept = len(factorise(delta, None, tolerance).a)
        assert float(s[kept:].norm() / s.norm()) <= tolerance < float(s[kept - 1 :].norm() / s.norm())
    assert len(factorise(delta, 2, 0.01).a) == 2
    assert factorise(delta, 99, None).left < 1e-5


def test_factors_of_a_hand_made_delta() -> None:
    made = factorise(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]), 1, None)
    assert torch.equal(made.a, torch.tensor([[0.0, 1.0]]))
    assert torch.equal(made.b, torch.tensor([[0.0], [-4.0], [0.0]]))
    assert (made.left, made.norm) == (3.0, 5.0)
