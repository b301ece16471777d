"""The head is fitted where experts have moved it, and left alone elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lewis.merging.fitting import head
from lewis.merging.fitting.fitted import Fitted
from lewis.models.checkpoint import Checkpoint
from tests.conftest import Family
from tests.lewis.merging.fitting.test_fit import RIDGE, prepare, recipe_of, run
from tests.support.models import rewrite, write_expert, write_llama

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]
HEAD = "lm_head.weight"


def test_a_head_of_its_own_gives_what_each_experts_head_gives(tmp_path: Path) -> None:
    """The regression by its definition, without a prior; the embedding next to it is the sum of the task vectors."""
    base = write_llama(tmp_path / "base", tied=False)
    experts = [write_expert(base, tmp_path / name, seed=i) for i, name in enumerate(("a", "bb"))]
    recipe = recipe_of(base, experts, parameters={"ridge": RIDGE, "prior": 0})
    found, of_base = run(recipe, tmp_path / "out"), load_file(base / "model.safetensors")
    tensors = [load_file(each / "model.safetensors") for each in experts]
    summed = {name: of_base[name] + sum(each[name] - of_base[name] for each in tensors) for name in of_base}
    left, right = torch.zeros(16, 16).double(), torch.zeros(64, 16).double()
    for expert, own in zip(prepare(recipe).experts, tensors, strict=True):
        assert expert.calibration
        model = AutoModelForCausalLM.from_pretrained(expert.model.folder).model
        with torch.no_grad():
            rows = torch.cat([model(torch.tensor([ids]))[0][0] for ids in expert.calibration.samples]).double()
        left += rows.T @ rows / len(rows)
        right += (own[HEAD] - summed[HEAD]).double() @ rows.T @ rows / len(rows)
    left += RIDGE * left.diagonal().mean() * torch.eye(16)
    assert torch.allclose(found[HEAD], summed[HEAD] + (right @ torch.linalg.inv(left)).float(), atol=1e-4)
    assert torch.allclose(found["model.embed_tokens.weight"], summed["model.embed_tokens.weight"], atol=1e-6)


def test_a_head_that_no_expert_has_moved_stays_the_bases(family: Family, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    base = load_file(family.base / "model.safetensors")
    still = [
        rewrite(each, tmp_path / each.name, lambda tensor, value: base[tensor] if tensor == name else value)
        for each in family.experts
    ]
    assert torch.equal(run(recipe_of(family.base, still), tmp_path / "out")[name], base[name])
    adapters = prepare(recipe_of(family.base, [family.lora]))
    assert prepare(recipe_of(family.base, still)).may_move_head and not adapters.may_move_head


def test_the_result_has_the_same_bytes_for_any_threads_and_parts_change_roundings_only(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = prepare(recipe_of(family.base, family.experts))
    merge.run(tmp_path / "one", threads=1)
    merge.run(tmp_path / "three", threads=3)
    monkeypatch.setattr("lewis.merging.fitting.head.PART", 16 * 7)
    merge.run(tmp_path / "parts", threads=1)
    one, three, parts = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "three", "parts"))
    for name, tensor in one.items():
        assert torch.equal(tensor, three[name]), name
        assert torch.allclose(tensor, parts[name], atol=1e-5), name


def test_no_head_of_a_model_stays_mapped(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight large models these are many gigabytes of the process, until it ends."""
    last, found = dict[Path, str](), list[set[str]]()

    def seen(owner: object, name: str, look: Callable[[Any, str], None] = lambda *_: None) -> None:
        real = getattr(owner, name)

        def call(*given: Any) -> Any:
            look(*given[:2])
            return real(*given)

        monkeypatch.setattr(owner, name, call)

    for name in ("raw", "done_with"):

        def note(model: Any, tensor: str, name: str = name) -> None:
            if tensor == "model.embed_tokens.weight":
                last[model.folder] = name

        seen(Checkpoint, name, note)
    seen(head, "_hidden_states", lambda *_: found.append({*last.values()}))
    seen(Fitted, "add", lambda *given: found.append({*last.values()}) if given[1] == "head" else None)
    run(recipe_of(family.base, family.experts), tmp_path / "out")
    assert found and all(each == {"done_with"} for each in found) and len(last) == 3, (found, last)
