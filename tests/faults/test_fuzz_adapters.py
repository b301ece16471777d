"""A LoRA adapter reads as PEFT loads and merges it, or both refuse it: random settings, PEFT as the oracle."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lewis.errors import LewisError
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora.expert import LoraExpert
from tests.faults.fuzz import changed, fuzzed, limited, outcome
from tests.support.rehearsing import ask_all

SIZES: dict[str, Any] = {"vocab_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = ["q_proj", "v_proj", "up_proj", "down_proj"]


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    biased = {"attention_bias": not tied, "mlp_bias": not tied, "tie_word_embeddings": tied}
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, **biased, bos_token_id=None, eos_token_id=1))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_key_value_heads": 1, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **sizes, bos_token_id=None, eos_token_id=1))


MODELS: dict[str, Callable[[], Any]] = {
    "untied": lambda: llama(False),
    "tied": lambda: llama(True),
    "gpt2": gpt2,
    "mixtral": mixtral,
}
EMBEDDINGS = {"untied": ["embed_tokens", "lm_head"], "tied": ["embed_tokens"], "gpt2": ["wte"], "mixtral": ["lm_head"]}
NAMES = {"gpt2": ["c_attn", "c_proj", "attn.c_proj", "c_fc"], "mixtral": ["q_proj", "v_proj", "o_proj", "w2"]}


@pytest.fixture(autouse=True, scope="module")
def asked_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lewis.rehearsal.child.ask_all", partial(ask_all, blames=False))
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Checkpoint]]:
    """Name -> the model, in memory and on disk."""
    found, folder = {}, tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for name, make in MODELS.items():
        model = make()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.config.save_pretrained(folder / name)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        held = {key: value for key, value in model.state_dict().items() if key not in tied}
        save_file(held, folder / name / "model.safetensors")
        found[name] = (model, Checkpoint(folder / name, name))
    return found


def settings_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Settings of an adapter: each as PEFT's default in most draws."""
    modules = NAMES.get(kind, LLAMA)
    stack = "transformer.h" if kind == "gpt2" else "model.layers"
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    norms = ["ln_f", "ln_1", "0.ln_2"] if kind == "gpt2" else ["norm", "input_layernorm", "0.post_attention_layernorm"]
    part = "attn" if kind == "gpt2" else "self_attn"
    places = [*modules, f"{stack}.1.mlp.{modules[-1]}", f"0.{part}.{modules[0]}"]
    names = st.sampled_from([*places, *places, *places, "lm_head", embedding, "nothing", norms[0], part, "w1", "w3"])
    patterns = st.sampled_from(
        [
            rf".*\.1\..*{modules[0]}",
            rf".*({modules[0]}|{modules[2]})",
            f".*{part}.*proj",
            "nothing",
            modules[0],
            ".*h.*",
        ]
    )
    saved = st.sampled_from([*norms, modules[1], f"{stack}.0.mlp", embedding, "lm_head", "nothing"])
    keys = st.sampled_from([*places, rf"\d.{part}.*", f"{stack}.0.*", embedding, "nothing"])
    parameters = st.sampled_from(["q_proj.weight", "mlp.down_proj.weight", "c_fc.weight", "x"])
    if kind == "mixtral":
        parameters = st.sampled_from(["experts.down_proj", "mlp.experts.gate_up_proj", "gate.weight", "q_proj.weight"])
    tokens = st.lists(st.integers(0, 23), min_size=1, max_size=3, unique=True)

    def some(values: st.SearchStrategy[Any], default: Any) -> st.SearchStrategy[Any]:
        return st.integers(0, 5).flatmap(lambda n: values if n == 5 else st.just(default))

    def often(values: st.SearchStrategy[Any], default: Any) -> st.SearchStrategy[Any]:
        return values | st.just(default)

    listed = st.lists(names, min_size=1, max_size=3, unique=True)
    return st.fixed_dictionaries(
        {
            "target_modules": some(patterns | st.just("all-linear") | st.just([]), None).flatmap(
                lambda given: st.just(given) if given is not None else listed
            ),
            "r": st.integers(1, 3),
            "lora_alpha": st.sampled_from([1, 4, 3, 0, -2, 2.5]),
            "rank_pattern": some(st.dictionaries(keys, st.integers(1, 3), max_size=2), {}),
            "alpha_pattern": some(st.dictionaries(keys, st.sampled_from([1, 8, 0.5, 0]), max_size=2), {}),
            "use_rslora": some(st.booleans(), False),
            "use_dora": some(st.booleans(), False),
            "lora_bias": some(st.booleans(), False),
            "bias": some(st.sampled_from(["all", "lora_only", "some"]), "none"),
            "exclude_modules": some(listed | patterns, None),
            "layers_to_transform": some(st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2), None),
            "layers_pattern": some(st.sampled_from([stack.split(".")[1], [stack.split(".")[1]], ["blocks"], ""]), None),
            "modules_to_save": some(st.lists(saved, max_size=2, unique=True), None),
            "fan_in_fan_out": some(st.booleans(), kind == "gpt2"),
            "trainable_token_indices": some(
                tokens | st.dictionaries(st.sampled_from([embedding, "lm_head"]), tokens, min_size=1, max_size=2), None
            ),
            "target_parameters": (some if kind != "mixtral" else often)(
                st.lists(parameters, max_size=2, unique=True),
                None,
            ),
            "ensure_weight_tying": some(st.booleans(), False),
            "init_lora_weights": some(st.sampled_from([False, "gaussian", "eva"]), True),
        }
    )


@st.composite
def adapters(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, Any], int, str]:
    """A base, the settings of an adapter when it was trained and in its file, a seed, and what is done to its keys."""
    kind = draw(st.sampled_from(list(MODELS)))
    trained = draw(settings_of(kind))
    others = draw(settings_of(kind)) if draw(st.booleans()) else trained
    if draw(st.integers(0, 11)) == 0:
        tokens = draw(st.lists(st.integers(0, 23), min_size=1, max_size=3, unique=True))
        trained = {"target_modules": [draw(st.sampled_from(EMBEDDINGS[kind]))], "token_indices": tokens}
        others = trained = {"peft_type": "TRAINABLE_TOKENS", **trained}
    changes = draw(st.lists(st.sampled_from(sorted(trained)), max_size=2, unique=True))
    stated = {**trained, **{key: others[key] for key in changes}}
    if draw(st.integers(0, 3)) == 0:
        stated = draw(changed(stated))
    if draw(st.integers(0, 19)) == 0:
        stated["peft_type"] = draw(st.sampled_from(["IA3", "ADALORA", "LOHA", "OFT", "TRAINABLE_TOKENS", "LN_TUNING"]))
    done = draw(st.sampled_from([*["nothing"] * 7, "lost", "lost", "renamed", "foreign", "swapped", "cut"]))
    return kind, trained, stated, draw(st.integers(0, 2**31)), done


TIES = ("no longer tied after merging", "are part of the adapter. This can lead")
"""What PEFT warns of where no checkpoint with a tied head holds the result: it unties or changes the head."""


def train(model: Any, settings: dict[str, Any], seed: int, folder: Path) -> bool:
    """Save an adapter with random weights, as PEFT does; False if PEFT has no such adapter."""
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model, get_peft_model_state_dict

    own = copy.deepcopy({key: value for key, value in settings.items() if key != "peft_type"})
    kind = TrainableTokensConfig if "token_indices" in own else LoraConfig
    try:
        adapted = get_peft_model(copy.deepcopy(model), kind(task_type="CAUSAL_LM", **own))
    except Exception:
        return False
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers="auto")
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return True


def damage(tensors: dict[str, torch.Tensor], done: str, seed: int) -> dict[str, torch.Tensor]:
    """Change the keys of an adapter's file."""
    names = sorted(tensors)
    one, other = names[seed % len(names)], names[seed // 7 % len(names)]
    match done:
        case "lost":
            tensors.pop(one)
        case "renamed":
            tensors[one.replace(".0.", ".7.").replace("base_model.", "")] = tensors.pop(one)
        case "foreign":
            tensors[one.replace("proj", "project")] = tensors[one].clone()
        case "swapped":
            tensors[one], tensors[other] = tensors[other], tensors[one]
        case "cut":
            tensors[one] = tensors[one][..., :-1].contiguous()
    return tensors


def merged_by_peft(model: Any, folder: Path) -> tuple[dict[str, torch.Tensor] | Exception, str]:
    """What PEFT makes of an adapter, or its error; and its warnings."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught, limited():
        warnings.simplefilter("always")
        try:
            merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
        except Exception as error:
            return error, ""
    if not merged.state_dict().keys() >= model.state_dict().keys():
        return KeyError("the merged model has lost a tensor"), ""
    return dict(merged.state_dict()), " ".join(str(each.message) for each in caught)


def may_refuse(
    found: LewisError, expected: dict[str, torch.Tensor], warned: str, before: dict[str, torch.Tensor]
) -> bool:
    """Whether LEWIS may refuse what PEFT merges: for what PEFT warns of, and what no weights stand for."""
    said, values = str(found), [expected[name] for name in before]
    if any(words in said for words in ("ties to its embedding", "replaces only one of them", "for both; merge it")):
        return True
    if "names none of its tensors" in said:
        return all(torch.equal(each, before[name]) for name, each in expected.items() if name in before)
    if "would not be finite" in said:
        return not all(bool(each.isfinite().all()) for each in values)
    return "missing adapter keys" in warned or "has no arithmetic" in said or "PEFT changes the base itself" in said


@fuzzed
@pytest.mark.filterwarnings("ignore")
@given(drawn=adapters())
def test_reads_as_peft_merges(
    bases: dict[str, tuple[Any, Checkpoint]], tmp_path_factory: pytest.TempPathFactory, drawn: Any
) -> None:
    kind, trained, stated, seed, done = drawn
    model, base = bases[kind]
    folder = tmp_path_factory.getbasetemp() / "adapter"
    folder.mkdir(exist_ok=True)
    if not train(model, trained, seed, folder):
        train(model, {"target_modules": NAMES.get(kind, LLAMA), "r": 2}, seed, folder)
    tensors = damage(load_file(folder / "adapter_model.safetensors"), done, seed)
    if not tensors:
        event("no tensor left")
        return
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", **stated}))
    expected, warned = merged_by_peft(model, folder)
    found = outcome(lambda: read(LoraExpert(base, folder, "key"), list(model.state_dict())))
    if isinstance(expected, Exception):
        assert isinstance(found, LewisError), f"PEFT refuses: {expected!r}"
        event("both refuse")
    elif isinstance(found, LewisError):
        assert may_refuse(found, expected, warned, model.state_dict()), f"only LEWIS refuses: {found}"
        event("LEWIS refuses what PEFT warns of")
    else:
        event("both merge")
        for name, values in found.items():
            torch.testing.assert_close(
                values, expected[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )


def read(expert: LoraExpert, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: expert.read(name) for name in names}
