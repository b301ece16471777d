"""A config that no network can have is refused before any work, of every architecture; transformers' own are not."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lewis
from lewis.errors import InputError, LewisError
from lewis.models.config_check import check_config
from lewis.models.config_class import _declared, check_values
from lewis.models.source import pin_all
from lewis_tasks import models as tasks
from tests.conftest import Family, full
from tests.faults.fuzz import DRAWS
from tests.support.lineage import hub_of
from tests.support.models import edit_json, parse, rewrite
from tests.support.tiny_architectures import architectures, tiny

FEW = ["llama", "gpt2", "t5", "lfm2", "mixtral", "gemma3", "qwen3_vl_moe", "t5gemma", "zamba2", "mamba2"]
KEYS = [
    "hidden_size",
    "n_embd",
    "d_model",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "vocab_size",
]
OPTIONAL = ["num_key_value_heads", "intermediate_size", "head_dim"]
WRONG = ["16", float("nan"), 1e9, 16.5, -1, True, []]
CASES = [
    *((key, value) for key in (*KEYS, "vocab_size") for value in (*WRONG, 0, None)),
    *((k, v) for k in OPTIONAL for v in WRONG),
]


def tiny_or_skip(kind: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model of an architecture, and its whole config."""
    try:
        model = tiny(kind)
    except Exception as error:
        pytest.skip(f"transformers has no tiny one: {error}")
    return model, json.loads(model.config.to_json_string(use_diff=False))


class TestNetworks:
    @pytest.mark.parametrize("kind", architectures() if DRAWS > 1000 else FEW)
    def test_of_every_architecture(self, kind: str) -> None:
        model, config = tiny_or_skip(kind)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_config(Path("model"), config, shapes)
        for path in ((), ("text_config",)):
            for key, value in CASES:
                changed = copy.deepcopy(config)
                block = changed.get(path[0]) if path else changed
                if isinstance(block, dict) and key in block:
                    block[key] = value
                    with pytest.raises(InputError, match=rf"config.json: {'.'.join((*path, key))}: expected .*, got "):
                        check_config(Path("model"), changed, shapes)


SIZES = re.compile(
    r"(hidden|(moe_|shared_expert_)?intermediate|vocab)_size|n_embd|n_inner|d_model|.*ffn_dim|d_ff|(v_|linear_)?head_dim|"
    r"num_(attention|key_value)_heads|n_heads?|num_(local_)?experts|n_routed_experts|num_hidden_layers|n_layer"
)
REFUSED = {
    "llama": [
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    ],
    "gpt2": ["n_embd", "vocab_size", "n_layer"],
    "gemma3": ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"],
    "mixtral": ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_local_experts"],
}


def built_of(model: Any, config: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Tensor -> shape in the network that transformers builds of a config; None if it builds none."""
    try:
        with torch.device("meta"):
            network = type(model)(type(model.config).from_dict(copy.deepcopy(config)))
    except Exception:
        return None
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.xdist_group("sizes")
class TestSizes:
    @pytest.mark.parametrize("kind", architectures() if DRAWS > 1000 else FEW)
    def test_sizes_as_the_network_has_them(self, kind: str) -> None:
        """With other sizes, of each part by itself, the tensors of its own network fit; those of the first do not."""
        model, config = tiny_or_skip(kind)
        stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        refused = set()
        for path in ((), *((key,) for key in config if isinstance(config[key], dict))):
            for key, value in (config[path[0]] if path else config).items():
                unused = not path and key == "hidden_size" and "text_config" in config  # of no layer, but refused
                if unused or not SIZES.fullmatch(key) or not isinstance(value, int) or value < 1:
                    continue
                changed = copy.deepcopy(config)
                (changed[path[0]] if path else changed)[key] = 2 * value
                if (theirs := built_of(model, changed)) is None:
                    continue
                check_config(Path("model"), changed, theirs)
                if theirs != stored:
                    try:
                        check_config(Path("model"), changed, stored)
                    except InputError:
                        refused.add(key)
        assert refused >= {*REFUSED.get(kind, [])}


# No layer of the tiny ones uses a rope type or an activation that their configs name.
UNUSED = {"blt", "olmo3", "zamba2", "inkling2_text", "minimax_m3_vl_text", "seamless_m4t", "seamless_m4t_v2"}
VALUES = ["x", 1, 10**6, -1, 0, 1.5, True, None, [], [1], ["a"], {}, {"a": 1}, {"rope_type": "x", "rope_theta": 1e4}]


class TestValues:
    @pytest.mark.parametrize("kind", architectures() if DRAWS > 1000 else FEW[:6])
    def test_values_as_the_class_of_the_config_takes_them(self, kind: str) -> None:
        """Refused is what transformers refuses, by the types of its class or when it builds the network; no more."""
        model, config = tiny_or_skip(kind)
        check_values(Path("model"), config)
        refused, missed = 0, []
        for key, value in ((key, value) for key in config.keys() - {"model_type"} for value in VALUES):
            changed = {**copy.deepcopy(config), key: value}
            ours = theirs = ""
            try:
                check_values(Path("model"), changed)
            except InputError as error:
                ours = str(error)
            try:
                built = type(model.config).from_dict(copy.deepcopy(changed))
                if ours:  # of names of functions, the class of the config knows nothing
                    with torch.device("meta"):
                        type(model)(built)
            except Exception as error:
                theirs = str(error)
            unused = kind in UNUSED and ("a rope_type among" in ours or "an activation function" in ours)
            unused |= "dropout" in key and "a number from 0 to 1" in ours  # it is of a head that is not built here
            assert theirs or not ours or unused, f"{key}: {value!r}: transformers takes it; {ours}"
            refused += bool(ours)
            if not ours and f"Field '{key}'" in theirs and f"(value: {value!r})" in theirs:
                missed.append(f"{key}: {value!r}: {theirs}")
        assert len(missed) <= refused / 20 or not _declared(kind)[1], missed


CHANGES: list[dict[str, Any]] = [
    {"hidden_size": "16"},
    {"num_attention_heads": 0},
    {"num_hidden_layers": -1},
    {"vocab_size": 1e9},
    {"hidden_size": 17},
    {"rms_norm_eps": "x"},
    {"hidden_act": "os.system"},
    {"tie_word_embeddings": "no"},
    {"rope_parameters": {"rope_type": "unheard", "rope_theta": 1e4}},
    {"rope_parameters": 4.0},
    {"pad_token_id": "0"},
    {"model_type": 3},
    {"layer_types": ["unheard", "unheard"]},
    {"pad_token_id": 9999},
    {"initializer_range": 1.5},
    {"num_key_value_heads": 1},
    {"head_dim": 0},
    {"attention_bias": True},
    {"intermediate_size": 100},
    {"num_attention_heads": 8},
    {"hidden_act": "os.system", "auto_map": {}},
]


@pytest.mark.parametrize(
    ("which", "change"),
    [
        *(("base", change) for change in CHANGES),
        *(("expert", change) for change in CHANGES[:3]),
        *(pytest.param("expert", change, marks=full) for change in CHANGES[3:]),
    ],
)
def test_before_any_work(family: Family, home: Path, tmp_path: Path, change: dict[str, Any], which: str) -> None:
    odd = rewrite({"base": family.base, "expert": family.math}[which], tmp_path / "odd", lambda name, tensor: tensor)
    edit_json(odd / "config.json", **change)
    base, expert = (odd, family.math) if which == "base" else (family.base, odd)
    models = [{"model": str(expert)}, {"model": str(family.code)}]
    recipe = parse({"merge_method": "ties", "base_model": str(base), "models": models})
    first = next(iter(change))
    key = {"num_key_value_heads": "head_dim"}.get(first, first)  # the config says how large a head is
    for refused in (lambda: lewis.plan(recipe), lambda: lewis.merge(recipe, tmp_path / "merged")):
        with pytest.raises(InputError, match=f"odd: config.json: {key}: expected "):
            refused()
    assert not (tmp_path / "merged").exists()
    if which == "base":
        with pytest.raises(InputError, match=f"odd: config.json: {key}: expected "):
            lewis.inspect(recipe)
    else:
        errors = lewis.inspect(recipe).errors
        assert any(each.kind == "no fit" and f"config.json: {key}" in each.what for each in errors)


@pytest.mark.parametrize("which", ["base", "expert"])
def test_before_any_weights_of_the_hub_are_asked_for(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    odd = rewrite({"base": family.base, "expert": family.math}[which], tmp_path / "odd", lambda name, tensor: tensor)
    edit_json(odd / "config.json", hidden_size="16")
    with hub_of(family, home, tmp_path, monkeypatch) as hub:
        hub.commit("org/odd", odd)
        base, expert = ("org/odd", "org/math") if which == "base" else ("org/base", "org/odd")
        models = [{"model": expert}, {"model": "org/code"}]
        recipe = parse({"merge_method": "ties", "base_model": base, "models": models})
        for refused in (lambda: lewis.plan(recipe), lambda: lewis.merge(recipe, tmp_path / "merged")):
            with pytest.raises(InputError, match=r"org/odd: config.json is broken .* hidden_size: expected "):
                refused()
        assert any(each.path.endswith("/config.json") for each in hub.log)
        asked = {each.range for each in hub.log if each.method == "GET" and each.path.endswith(".safetensors")}
    assert asked <= {"bytes=0-100000"}  # a file's header, which says the shapes
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("kind", "rows"), [("llama", 0), ("moshi", 1), ("mllama_text_model", 8)])
def test_an_embedding_has_as_many_rows_as_its_class_makes(kind: str, rows: int) -> None:
    for count in range(10):
        config, shapes = {"model_type": kind, "vocab_size": 64}, {"model.embed_tokens.weight": (64 + count, 16)}
        if count in (0, rows):
            check_config(Path("model"), config, shapes)
        else:
            with pytest.raises(InputError, match=r"config.json says vocab_size 64, but '.*' has "):
                check_config(Path("model"), config, shapes)


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "mistral"])
def test_what_a_config_does_not_say_is_the_default_of_its_class(kind: str) -> None:
    """Qwen3's heads have 128 numbers, Gemma's 256, and Mistral has 8 pairs of keys and values."""
    model, _ = tiny_or_skip(kind)
    own = type(model.config)(hidden_size=32, num_attention_heads=16, num_hidden_layers=2, intermediate_size=48)
    shapes = built_of(model, own.to_dict())
    assert shapes
    left = {key: value for key, value in own.to_dict().items() if key not in ("head_dim", "num_key_value_heads")}
    check_config(Path("model"), left, shapes)
    told = r"config.json: (head_dim|num_key_value_heads): expected keys of \d+ numbers in all, .* and 4 heads of \d+ do"
    with pytest.raises(InputError, match=told):
        check_config(Path("model"), left | {"num_key_value_heads": 4}, shapes)


def test_three_times_the_width_is_no_width() -> None:
    model, config = tiny_or_skip("gpt2")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"config.json: n_embd: expected 32, by the tensors ln_1.weight, got 96;"):
        check_config(Path("model"), config | {"n_embd": 96, "n_inner": 128}, shapes)


@pytest.mark.usefixtures("lm_eval_tasks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "config.json: '.*.q_proj.bias' is in the network of this config, but not in the "),
        ({"model_type": "unheard"}, "config.json: model_type: expected one that transformers .* knows, got 'unheard'"),
    ],
)
def test_a_network_that_is_not_of_these_tensors(
    family: Family, home: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Its sizes and types alone say nothing; transformers builds it, or not, where a run needs it anyway."""
    odd = rewrite(family.math, tmp_path / "odd", lambda name, tensor: tensor)
    edit_json(odd / "config.json", **change)
    models = [{"model": str(odd)}, {"model": str(family.code)}]
    tasks = {"tasks": ["arc_easy"], "limit": 2}
    recipe = parse({"merge_method": "ties", "base_model": str(family.base), "models": models, "evaluate": tasks})
    for refused in (lewis.plan, lewis.inspect):
        if refused is lewis.plan or "unheard" in change.values():
            with pytest.raises(LewisError, match=f"odd: {message}"):
                refused(recipe)
        else:
            [error] = refused(recipe).errors
            assert error.kind == "no fit" and re.search(f"odd: {message}", error.what)


def test_where_seconds_do_not_matter_the_network_is_built(family: Family, home: Path, tmp_path: Path) -> None:
    """In a run of Prefect, in an inspection, and in the plan of a recipe that registers; a merge by itself is fast."""
    odd = rewrite(family.math, tmp_path / "odd", lambda name, tensor: tensor)
    edit_json(odd / "config.json", model_type="qwen3", layer_types=None)
    models = [{"model": str(odd)}, {"model": str(family.code)}]
    plain: dict[str, Any] = {"merge_method": "ties", "base_model": str(family.base), "models": models}
    wrong = "odd: config.json: '.*q_norm.weight' is in the network of this config, but not in the weights"
    with pytest.raises(InputError, match=wrong):
        tasks.preflight.fn(parse(plain), *pin_all(parse(plain)))
    with pytest.raises(InputError, match=wrong):
        lewis.plan(parse({**plain, "register": {"name": "m"}}))
    [error] = lewis.inspect(parse(plain)).errors
    assert error.kind == "no fit" and re.search(wrong, error.what)
    lewis.plan(parse(plain))
    edit_json(odd / "config.json", model_type="unheard")  # may be merged by those who know it
    tasks.preflight.fn(parse(plain), *pin_all(parse(plain)))


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("which", ["base", "expert"])
def test_a_head_that_is_lost_ends_a_plain_merge(
    family: Family, home: Path, tmp_path: Path, which: str, silent: bool
) -> None:
    """By its sizes, the model is one of a class without a head; so this one network is built.

    Where the config says nothing of the head, Llama's class says that it is a weight of its own.
    """
    odd = rewrite({"base": family.base, "expert": family.math}[which], tmp_path / "odd", lambda name, tensor: tensor)
    edit_json(odd / "config.json", tie_word_embeddings=False)
    if silent:
        said = json.loads((odd / "config.json").read_text())
        del said["tie_word_embeddings"]
        (odd / "config.json").write_text(json.dumps(said))
    base, expert = (odd, family.math) if which == "base" else (family.base, odd)
    models = [{"model": str(expert)}, {"model": str(family.code)}]
    recipe = parse({"merge_method": "ties", "base_model": str(base), "models": models})
    for refused in (lewis.plan, lambda recipe: lewis.merge(recipe, tmp_path / "out")):
        with pytest.raises(InputError, match=r"config.json: tie_word_embeddings: 'lm_head.weight' is a weight of its "):
            refused(recipe)
    assert not (tmp_path / "out").exists()
    edit_json(odd / "config.json", architectures=["LlamaModel"])
    lewis.merge(recipe, tmp_path / "out")


def test_a_config_whose_class_comes_with_the_model_may_have_other_types() -> None:
    check_values(Path("model"), {"model_type": "llama", "rms_norm_eps": "1e-6", "auto_map": {"AutoConfig": "own.Own"}})
