"""A model that transformers does not load is refused before any work, and what is asked once is known."""

from pathlib import Path
from typing import Any

import pytest

import lewis
from lewis.errors import InputError, LewisError
from lewis.models.source import pin_all
from lewis.rehearsal import child
from lewis.rehearsal.question import Refused
from lewis.store import kinds
from lewis_tasks import models as tasks
from tests.conftest import Family
from tests.support.lineage import hub_of
from tests.support.models import edit_json, parse, rewrite

pytestmark = pytest.mark.slow

CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "16"}, r'hidden_size: transformers .* says ".*expected int, got str.*; accepted with 16'),
    ({"num_hidden_layers": 1}, "num_hidden_layers: the weights have .* lacks; accepted with 2"),
    ({"hidden_act": "os.system"}, "hidden_act: transformers .* says .*os.system.*; accepted without it"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type: transformers .*factor.*; accepted without it"),
    ({"dtype": "float99"}, "dtype: torch .* says .*float99.*; accepted without it"),
    ({"attention_bias": True}, "attention_bias: LlamaForCausalLM has .*bias' .* that the weights lack"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps: its network gives logits that are not finite; accepted without it"),
    ({"model_type": "qwen3", "layer_types": None}, "Qwen3ForCausalLM has .*k_norm.weight' .* that the weights lack"),
]


def odd(family: Family, folder: Path, **change: Any) -> Path:
    """The family's expert with another config."""
    model = rewrite(family.math, folder / "odd", lambda name, tensor: tensor)
    edit_json(model / "config.json", **change)
    return model


def recipe(family: Family, base: Path | str, expert: Path | str, **blocks: Any) -> Any:
    models = [{"model": str(expert)}, {"model": str(family.code)}]
    return parse({"merge_method": "ties", "base_model": str(base), "models": models, **blocks})


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_before_any_work_with_the_key(
    change: dict[str, Any], message: str, family: Family, home: Path, tmp_path: Path
) -> None:
    merge = recipe(family, family.base, odd(family, tmp_path, **change))
    if "model_type" in change:
        edit_json(tmp_path / "odd" / "config.json", architectures=["Qwen3ForCausalLM"])
    for refused in (lewis.plan, lambda given: lewis.merge(given, tmp_path / "merged")):
        with pytest.raises(Refused, match=f"odd: (config.json: )?{message}"):
            refused(merge)
    with pytest.raises(Refused, match=r"odd: "):
        tasks.preflight.fn(merge, *pin_all(merge))
    [error] = lewis.inspect(merge).errors
    assert error.kind == "no fit" and "odd: " in error.what
    assert not (tmp_path / "merged").exists()


def test_all_that_is_wrong_is_in_one_error(family: Family, home: Path, tmp_path: Path) -> None:
    first, second = (odd(family, tmp_path / name, rms_norm_eps=name) for name in "ab")
    with pytest.raises(Refused) as error:
        lewis.plan(recipe(family, first, second))
    assert set(error.value.problems) == {str(first), str(second)}


def test_the_defaults_of_generation_are_loaded_too(family: Family, home: Path, tmp_path: Path) -> None:
    model = odd(family, tmp_path)
    (model / "generation_config.json").write_text('{"max_new_tokens": -1}')
    with pytest.raises(Refused, match=r"odd: generation_config.json: max_new_tokens: transformers .* accepted without"):
        lewis.plan(recipe(family, family.base, model))


@pytest.mark.parametrize("which", ["base", "expert"])
def test_before_any_weights_of_the_hub_are_asked_for(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    with hub_of(family, home, tmp_path, monkeypatch) as hub:
        hub.commit("org/odd", odd(family, tmp_path, hidden_size="16"))
        merge = recipe(family, *(("org/odd", "org/math") if which == "base" else ("org/base", "org/odd")))
        with pytest.raises(InputError, match=r"org/odd is broken on the Hub itself.* config.json: hidden_size: trans"):
            lewis.merge(merge, tmp_path / "merged")
        asked = {each.range for each in hub.log if each.method == "GET" and each.path.endswith(".safetensors")}
    assert asked <= {"bytes=0-100000"}  # a file's header, which says the shapes
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", [{"model_type": "unheard"}, {"auto_map": {"AutoConfig": "own.Own"}}])
@pytest.mark.usefixtures("lm_eval_tasks")
def test_a_class_that_transformers_does_not_have_can_be_merged_and_not_run(
    change: dict[str, Any], family: Family, home: Path, tmp_path: Path
) -> None:
    model = odd(family, tmp_path, rms_norm_eps="x", **change)
    lewis.merge(recipe(family, family.base, model), tmp_path / "merged")
    if "model_type" in change:
        with pytest.raises(LewisError, match=r"odd: config.json: model_type: expected one that .* 'unhear"):
            lewis.plan(recipe(family, family.base, model, evaluate={"tasks": ["arc_easy"], "limit": 2}))


def test_a_constructor_that_takes_for_ever_is_ended(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "SECONDS", 20.0)
    merge = recipe(family, family.base, odd(family, tmp_path, num_hidden_layers=10**8, layer_types=None))
    with pytest.raises(Refused, match=r"odd: transformers (gives no answer within 20 s|needs more than 4 GB)"):
        lewis.plan(merge)


def test_what_was_asked_is_known(family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lewis.plan(recipe(family, family.base, family.math))
    known = kinds.REHEARSALS.entries()
    monkeypatch.setattr(child, "ask_all", None)
    lewis.merge(recipe(family, family.base, family.math), tmp_path / "merged")
    assert known and kinds.REHEARSALS.entries() == known
