"""Models that have the base's weights under other names: read as transformers loads the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis.errors import InputError
from lewis.importance.calibration import Calibration
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora.expert import LoraExpert
from lewis.models.model import Model
from lewis.models.names import unwrapped
from lewis.models.network.renamed import Renamed, match, with_tied
from lewis.models.source import ModelFiles
from lewis.steps.plan import make_plan
from tests.conftest import Family
from tests.support import pipeline
from tests.support.measuring import measure
from tests.support.models import bits, parse, write_lora, write_tokenizer
from tests.support.tiny_architectures import tiny

Names = Callable[[str], str]


def write_as(model: Any, folder: Path, form: str | Names) -> Path:
    """A model as transformers saves it (`saved`), with the network's own tensors (`native`), or renamed from these."""
    model.save_pretrained(folder)
    if form == "saved":
        return folder
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    rename = form if callable(form) else lambda name: name
    own = {rename(n): t.detach().clone() for n, t in model.state_dict().items() if n not in tied}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loaded(kind: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers loads, and nothing may be missing."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return {name: t.detach() for name, t in model.state_dict().items()}


def under_names_of(base: Model, model: Model, key: str) -> Model:
    """As `ModelFiles.open` reads a model under the base's names."""
    found = match(base.home, with_tied(base), with_tied(model))
    return Renamed(model, found, key) if found else model


def without(prefix: str) -> Names:
    return lambda name: name.removeprefix(prefix)


CASES: dict[str, tuple[str, str | Names, str | Names]] = {
    "experts_joined": ("mixtral", "saved", "native"),
    "experts_apart": ("mixtral", "native", "saved"),
    "experts_of_qwen": ("qwen3_moe", "saved", "native"),
    "prefix_lacks": ("gpt2", "native", without("transformer.")),
    "prefix_added": ("gpt2", without("transformer."), "native"),
    "joined_rows": ("hrm_text", "saved", "native"),
    "rows_apart": ("hrm_text", "native", "saved"),
    "permuted_apart": ("kimi_k25", "native", "saved"),
    "permuted_joined": ("kimi_k25", "saved", "native"),
    "vision_and_language": ("llava", "native", lambda name: old_llava(name)),
}


def old_llava(name: str) -> str:
    """As transformers 4 saved it: `language_model.model.layers` for `model.language_model.layers`."""
    name = name.replace("model.language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
    return name.replace("model.vision_tower.", "vision_tower.").replace("model.multi_", "multi_")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_reads_what_transformers_loads(tmp_path: Path, case: str) -> None:
    kind, ours, theirs = CASES[case]
    model = tiny(kind)
    base = Checkpoint(write_as(model, tmp_path / "base", ours), "base")
    folder = write_as(moved(model), tmp_path / "expert", theirs)
    expert = under_names_of(base, Checkpoint(folder, "expert"), "expert as base")
    assert isinstance(expert, Renamed) and expert.key == "expert as base"
    assert expert.tensors.keys() == base.tensors.keys() and expert.shapes == base.shapes
    assert expert.tied == base.tied
    written = tmp_path / "written"
    written.mkdir()
    save_file({n: expert.read(n) for n in expert.tensors}, written / "model.safetensors", metadata={"format": "pt"})
    (written / "config.json").write_bytes((folder / "config.json").read_bytes())
    found, expected = loaded(type(model), written), loaded(type(model), folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bits(found[name]) == bits(tensor), name


def test_what_is_cut_out_is_a_view_of_the_file(tmp_path: Path) -> None:
    model = tiny("mixtral")
    base = Checkpoint(write_as(model, tmp_path / "base", "saved"), "base")
    expert = under_names_of(base, Checkpoint(write_as(model, tmp_path / "e", "native"), "e"), "key")
    assert isinstance(expert, Renamed)
    name = next(name for name in expert.tensors if ".experts.1." in name)
    assert not expert.computes(name) and not expert.raw(name)[1].flags.owndata
    assert "are cut out of larger ones" in expert.summary
    back = under_names_of(Checkpoint(tmp_path / "e", "e"), base, "key")
    assert isinstance(back, Renamed) and [n for n in back.tensors if back.computes(n)] == [
        n for n in back.tensors if n.endswith(("gate_up_proj", "down_proj"))
    ]


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.model.x.weight",
        "model._orig_mod.x.weight",
        "module.model.x.weight",
        "base_model.model.model.x.weight",
    ],
)
def test_prefixes_of_wrappers_are_no_part_of_a_name(tmp_path: Path, name: str) -> None:
    assert unwrapped(name) == "model.x.weight"
    save_file({name: torch.ones(2), "lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert Checkpoint(tmp_path, "key").tensors.keys() == {"lm_head.weight", "model.x.weight"}


def test_a_peft_model_that_was_not_merged_is_told(tmp_path: Path) -> None:
    save_file({"base_model.model.model.x.base_layer.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="call merge_and_unload before save_pretrained"):
        Checkpoint(tmp_path, "key")


def test_other_sizes_are_refused_and_not_cut(tmp_path: Path) -> None:
    model = tiny("mixtral")
    base = Checkpoint(write_as(model, tmp_path / "base", "saved"), "base")
    folder = write_as(model, tmp_path / "wide", "native")
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: torch.cat([t, t], dim=1) if n.endswith("gate_up_proj") else t for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    expert = under_names_of(base, Checkpoint(folder, "wide"), "key")
    assert not any(name.endswith(("w1.weight", "w3.weight")) for name in expert.tensors)


def test_a_conversion_that_drops_rows_is_not_undone(tmp_path: Path) -> None:
    """Inkling's head is stored with more rows than the network has."""
    model = tiny("inkling2")
    base = Checkpoint(write_as(model, tmp_path / "base", "saved"), "base")
    expert = under_names_of(base, Checkpoint(write_as(model, tmp_path / "e", "native"), "e"), "key")
    lost = base.tensors.keys() - expert.tensors.keys()
    assert isinstance(expert, Renamed) and lost == {"model.llm.unembed.weight"}
    assert expert.computes(next(name for name in base.tensors if name.endswith("experts.w13_weight")))


def test_an_adapter_on_another_model(tmp_path: Path) -> None:
    """`model+adapter` as an expert of a base that stores its experts apart."""
    model = tiny("mixtral")
    base = Checkpoint(write_as(model, tmp_path / "base", "saved"), "base")
    folder = write_as(moved(model), tmp_path / "model", "native")
    write_tokenizer(folder)
    adapter = write_lora(folder, tmp_path / "adapter", targets=["q_proj"], target_parameters=["experts.down_proj"])
    opened = LoraExpert(Checkpoint(folder, "model"), adapter, "both")
    expert = under_names_of(base, opened, "key")
    name = next(name for name in expert.tensors if name.endswith("experts.2.w2.weight"))
    whole = opened.read(name.split(".block_sparse_moe")[0] + ".mlp.experts.down_proj")
    assert bits(expert.read(name)) == bits(whole[2])
    assert expert.computes(name)


class TestRecipe:
    @pytest.fixture
    def folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
        monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "store"))
        model = tiny("mixtral")
        base = write_as(model, tmp_path / "base", "saved")
        expert = write_as(moved(model), tmp_path / "expert", "native")
        write_tokenizer(base)
        write_tokenizer(expert)
        return base, expert

    def test_a_merge_of_one_expert_gives_its_weights(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        base, expert = folders
        data = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(expert)}]}
        recipe = parse(data, tmp_path)
        plan = make_plan(recipe)
        assert len(plan.renamed) == 1 and "cut out of larger ones" in plan.to_text()
        merged = pipeline.merge(recipe, *pipeline.fetch(recipe))
        kind = type(tiny("mixtral"))
        found, expected = loaded(kind, merged.folder), loaded(kind, expert)
        assert all(bits(found[name]) == bits(expected[name]) for name in expected)

    def test_what_is_measured_has_the_bases_names(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        base, expert = folders
        data = {"merge_method": "linear", "models": [{"model": str(base)}, {"model": str(expert)}]}
        files = [pipeline.download(source) for source in pipeline.pin_all(parse(data, tmp_path))[1]]
        assert files[0].like is None and files[1].like == base and files[1].read_as != files[1].key
        set_ = Calibration("x", ((5, 6, 7), (8, 9)))
        own, as_base = measure(Checkpoint(expert, "e"), set_), measure(files[1].open(), set_)
        assert as_base.norms.keys() == measure(Checkpoint(base, "b"), set_).norms.keys() != own.norms.keys()
        [q] = [name for name in own.norms if name.endswith("0.self_attn.q_proj.weight")]
        assert as_base.norms[q] == own.norms[q]
        reread = ModelFiles.model_validate(files[1].model_dump())
        assert reread.open().shapes == Checkpoint(base, "b").shapes

    def test_what_is_missing_is_told_by_the_bases_names(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        base, expert = folders
        tensors = {n: t for n, t in load_file(expert / "model.safetensors").items() if "1.mlp.experts.down" not in n}
        save_file(tensors, expert / "model.safetensors")
        recipe = parse({"merge_method": "ties", "base_model": str(base), "models": [{"model": str(expert)}]}, tmp_path)
        with pytest.raises(InputError, match=r"4 tensors of the base are missing, .*layers.1.*experts.0.w2"):
            pipeline.preflight(recipe, *pipeline.pin_all(recipe))


def test_a_family_with_one_kind_of_names_is_read_as_it_is(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lewis.models.network.renamed.known_network", None)  # nothing is built
    base, expert = Checkpoint(family.base, "base"), Checkpoint(family.math, "math")
    assert under_names_of(base, expert, "key") is expert
