"""Tiny random checkpoints of real classes, against hooks of the test's own: fp64, one sample at a time, no batching."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lewis.errors import InputError
from lewis.importance import batches
from lewis.importance.calibration import Calibration
from lewis.models.checkpoint import Checkpoint
from lewis.models.network.layouts import Rows, parts_of
from lewis.models.network.module_tree import Network
from lewis.models.network.network_class import build
from tests.conftest import Family
from tests.support.measuring import covered_layers, measure
from tests.support.models import write_tensors
from tests.support.tiny_architectures import tiny

SAMPLES = ((3, 4, 5, 6, 7, 8, 9), (10, 11), (11, 12, 13), (3, 3, 3), (20, 21, 22, 23, 24))
CALIBRATION = Calibration("sums", SAMPLES)
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
FALCON = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
FALCON |= {"new_decoder_architecture": True}
LONGROPE: dict[str, Any] = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [3.0, 5.0]}
LONGROPE |= {"rope_theta": 1e4, "original_max_position_embeddings": 3, "factor": 16.0}
LONGROPE = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 3}  # three samples are longer
MOE = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
T5 = {"vocab_size": 64, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}

# class, config, covered layers of a block
DENSE = {
    "llama": ("Llama", SIZES, 7),
    "llama-untied": ("Llama", SIZES | {"tie_word_embeddings": False}, 7),
    "mistral": ("Mistral", SIZES | {"sliding_window": 4}, 7),
    "qwen2": ("Qwen2", SIZES, 7),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 8}, 7),
    "gemma2": ("Gemma2", SIZES | {"head_dim": 8}, 7),
    "gemma3": ("Gemma3", SIZES | {"head_dim": 8}, 7),
    "gemma3-both-ways": ("Gemma3", SIZES | {"head_dim": 8, "use_bidirectional_attention": True}, 7),
    "phi3": ("Phi3", SIZES, 7),
    "phi3-longrope": ("Phi3", SIZES | LONGROPE, 7),
    "olmo": ("Olmo", SIZES, 7),
    "olmo2": ("Olmo2", SIZES, 7),
    "gpt2": ("GPT2", GPT2, 6),
    "neox": ("GPTNeoX", NEOX, 6),
    "falcon": ("Falcon", FALCON, 6),
}
CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Bert": ("BertConfig", "BertLMHeadModel"),
    "T5": ("T5Config", "T5ForConditionalGeneration"),
}


def write(folder: Path, name: str, sizes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    config, network = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    torch.manual_seed(0)
    model = getattr(transformers, network)(getattr(transformers, config)(**sizes)).to(dtype)
    with torch.no_grad():  # biases and norms that are not at their first values would show
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    model.set_experts_implementation("eager")
    return model.eval()


def inputs_of(model: Any, run: Any = None) -> dict[str, torch.Tensor]:
    """Module -> all its inputs, (tokens, in); of each nn.Linear and Conv1D that is in a block."""
    head = model.get_output_embeddings()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            seen[name] = []
            module.register_forward_hook(
                lambda _, args, __, to=seen[name]: to.append(args[0].reshape(-1, args[0].shape[-1]))
            )  # type: ignore[misc]
    with torch.no_grad():
        for sample in SAMPLES:
            ids = torch.tensor([sample])
            run(ids) if run else model(input_ids=ids)
    return {name: torch.cat(each) for name, each in seen.items() if each}


def norms(model: Any, run: Any = None) -> dict[str, torch.Tensor]:
    """Tensor -> its norm per output row, squared."""
    found = {}
    for name, x in inputs_of(model, run).items():
        module = model.get_submodule(name)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        found[f"{name}.weight"] = (weight.square() * x.square().mean(dim=0)).sum(dim=1).detach()
    return found


@pytest.mark.parametrize("kind", DENSE)
def test_dense_decoders(tmp_path: Path, kind: str) -> None:
    name, sizes, layers = DENSE[kind]
    model = write(tmp_path, name, sizes)
    measured = measure(Checkpoint(tmp_path, "key"), CALIBRATION)
    expected = norms(model.double())
    found = covered_layers(tmp_path, Checkpoint(tmp_path, "key").shapes)
    assert len(found) == 2 * layers and {layer.index for layer in found} == {0, 1}
    assert {layer.tensor for layer in found} == expected.keys() == measured.moments.keys()
    for layer in found:
        rows = expected[layer.tensor]
        if layer.part:
            config, parameter = model.config, layer.tensor
            rows = rows.reshape(1, -1)
            part = parts_of(parameter, rows.numel(), config)[layer.part]
            rows = rows.reshape(part.groups, part.width)[:, part.start : part.start + part.length]
        assert measured.norms[layer.key] == pytest.approx(float(rows.sum().sqrt()), rel=2e-6), layer


def test_a_convolution_is_no_stack_of_experts(tmp_path: Path) -> None:
    write(tmp_path, "Mamba", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4})
    found = {layer.projection for layer in covered_layers(tmp_path)}
    assert found == {f"mixer.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}


class TestFused:
    """Which rows of a fused projection are q, k, v: those that make the model's own q, k, v."""

    def test_phi3_by_the_config(self) -> None:
        config = transformers.Phi3Config(**SIZES)
        assert parts_of("a.qkv_proj.weight", 32, config) == {
            "q": Rows(0, 16, 32),
            "k": Rows(16, 8, 32),
            "v": Rows(24, 8, 32),
        }
        assert parts_of("a.gate_up_proj.weight", 48, config) == {"gate": Rows(0, 24, 48), "up": Rows(24, 24, 48)}
        assert parts_of("a.o_proj.weight", 16, config) == parts_of("a.qkv_proj.weight", 33, config) == {}

    @pytest.mark.parametrize(
        ("config", "parameter", "outputs"),
        [
            (transformers.CodeGenConfig(n_embd=16, n_head=4), "attn.qkv_proj.weight", 48),
            (transformers.MiniMaxConfig(**SIZES), "self_attn.qkv_proj.weight", 48),
            (transformers.GPTBigCodeConfig(n_embd=16, n_head=4, multi_query=False), "attn.c_attn.weight", 48),
            (transformers.Qwen3NextConfig(**SIZES | {"head_dim": 4}), "linear_attn.in_proj_qkvz.weight", 32),
        ],
    )
    def test_what_is_cut_in_other_ways_stays_whole(self, config: Any, parameter: str, outputs: int) -> None:
        assert parts_of(parameter, outputs, config) == {}

    def test_neox_by_heads(self) -> None:
        found = parts_of("x.query_key_value.weight", 48, transformers.GPTNeoXConfig(**NEOX))
        assert found == {"q": Rows(0, 4, 12, 4), "k": Rows(4, 4, 12, 4), "v": Rows(8, 4, 12, 4)}
        assert float(found["k"].sum(torch.arange(48.0))) == sum(12 * h + i for h in range(4) for i in range(4, 8))

    def test_falcon_by_groups(self) -> None:
        config = transformers.FalconConfig(
            hidden_size=16, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
        )
        found = parts_of("x.query_key_value.weight", 32, config)
        assert found == {"q": Rows(0, 8, 16, 2), "k": Rows(8, 4, 16, 2), "v": Rows(12, 4, 16, 2)}


def expert_inputs(model: Any) -> dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Experts module -> expert -> what goes into gate and up, and what into down; written out by hand."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    modules = {n: m for n, m in model.named_modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))}
    for name, module in modules.items():
        seen[name] = []
        module.register_forward_hook(lambda _, args, __, to=seen[name]: to.append((args[0], args[1])))  # type: ignore[misc]
    inputs_of(model)
    found: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, module in modules.items():
        hidden, index = (torch.cat([each[i].reshape(-1, each[i].shape[-1]) for each in seen[name]]) for i in (0, 1))
        for e in range(module.gate_up_proj.shape[0]):
            x = hidden[(index == e).any(dim=1)]
            gate, up = (x @ module.gate_up_proj[e].T).chunk(2, dim=-1)
            if len(x):
                found.setdefault(name, {})[e] = (x, module.act_fn(gate) * up)
    return found


MIXTRAL = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERT, OLD_EXPERT = "model.layers.{}.mlp.experts.{}.{}.weight", "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
THREE = ("gate_proj", "up_proj", "down_proj")
MOES = {
    "mixtral": ("Mixtral", MIXTRAL, OLD_EXPERT, ("w1", "w3", "w2")),
    "qwen3-moe": ("Qwen3Moe", MOE | {"head_dim": 8}, EXPERT, THREE),
    "qwen2-moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 12}, EXPERT, THREE),
}


@pytest.mark.parametrize("kind", MOES)
@pytest.mark.parametrize("per_batch", [1, 10**6])
def test_stacked_experts(tmp_path: Path, kind: str, per_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes, tensor, (gate, up, down) = MOES[kind]
    monkeypatch.setattr(batches, "TOKENS_PER_BATCH", per_batch)
    model = write(tmp_path, name, sizes).double()
    checkpoint = Checkpoint(tmp_path, "key")
    measured, inputs = measure(checkpoint, CALIBRATION), expert_inputs(model)
    fired = 0
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        for e in range(4):
            of_expert = inputs[module].get(e)
            for projection, place in ((gate, 0), (up, 0), (down, 1)):
                key = tensor.format(layer, e, projection)
                if of_expert is None:
                    assert measured.norms[key] is None and key not in measured.moments
                    continue
                fired += 1
                s = of_expert[place].square().mean(dim=0)
                expected = (checkpoint.read(key).double().square() * s).sum().sqrt()
                assert measured.norms[key] == pytest.approx(float(expected), rel=5e-6), key
                torch.testing.assert_close(measured.moments[key].double(), s, rtol=1e-5, atol=1e-12)
    assert fired > 0
    attention = [key for key in measured.norms if "self_attn" in key]
    assert len(attention) == 8


def test_experts_that_no_token_reaches_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, sizes, tensor, (gate, _, down) = MOES["mixtral"]
    write(tmp_path, name, sizes)
    measured = measure(Checkpoint(tmp_path, "key"), Calibration("one", ((5,),)))  # two experts a token
    states = [measured.norms[tensor.format(1, e, gate)] is None for e in range(4)]
    assert states.count(True) == 2 and states == [measured.norms[tensor.format(1, e, down)] is None for e in range(4)]
    assert "no token was seen to reach" in caplog.text


def test_a_token_that_is_all_zeros_counts_where_nothing_is_padded(tmp_path: Path) -> None:
    name, sizes, tensor, (gate, *_) = MOES["mixtral"]
    model = write(tmp_path, name, sizes).to(torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = 0  # as of a padding token; first in its sample, it stays zero
    model.save_pretrained(tmp_path)
    one, two = (measure(Checkpoint(tmp_path, "key"), Calibration("x", ((5,), *zeros))) for zeros in ((), ((3,),)))
    pairs = [(one.norms[key], two.norms[key]) for key in (tensor.format(0, e, gate) for e in range(4))]
    moved = [pair for pair in pairs if pair[0] is None or pair[1] != pytest.approx(pair[0])]
    moved = [pair for pair in moved if pair != (None, None)]
    assert len(moved) == 2  # the experts that the zeros went to: half of the mean, or nothing before
    assert all(after == pytest.approx((before or 0.0) / 2**0.5) for before, after in moved)


def test_experts_stacked_in_the_checkpoint_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name, sizes, *_ = MOES["qwen3-moe"]
    model = write(tmp_path, name, sizes)
    single = measure(Checkpoint(tmp_path, "key"), CALIBRATION)
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if ".experts." not in n}
    stacked = {n: p.detach().clone() for n, p in model.state_dict().items() if ".experts." in n}
    save_file(tensors | stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    measured = measure(Checkpoint(tmp_path, "key"), CALIBRATION)
    key = "model.layers.1.mlp.experts.gate_up_proj"
    for part, own in (("gate", "gate_proj"), ("up", "up_proj")):
        each = [single.norms[f"model.layers.1.mlp.experts.{e}.{own}.weight"] for e in range(4)]
        assert measured.norms[f"{key}[{part}]"] == pytest.approx(sum(n * n for n in each if n) ** 0.5, rel=1e-6)
    assert measured.moments[key].shape == (4, 1, 16)
    assert torch.isfinite(measured.moments[key]).all()


def test_an_encoder_with_a_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    model.save_pretrained(tmp_path)

    def run(ids: torch.Tensor) -> None:
        model(input_ids=ids, decoder_input_ids=torch.cat([torch.zeros(1, 1, dtype=torch.long), ids[:, :-1]], dim=1))

    measured = measure(Checkpoint(tmp_path, "key"), CALIBRATION)
    expected = norms(model.double().eval(), run)
    assert measured.norms.keys() == expected.keys()
    for name, rows in expected.items():
        assert measured.norms[name] == pytest.approx(float(rows.sum().sqrt()), rel=2e-6), name
    kinds = {layer.projection for layer in covered_layers(tmp_path)}
    assert "encoder.block.layer.0.SelfAttention.q" in kinds and "decoder.block.layer.1.EncDecAttention.k" in kinds


def test_a_decoder_whose_embedding_is_the_head(tmp_path: Path) -> None:
    """T5Gemma: the encoder has an embedding of its own, and the decoder begins with its own first token."""
    torch.manual_seed(0)
    side = SIZES | {"head_dim": 8, "bos_token_id": 2}
    model = transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(encoder=dict(side), decoder=dict(side), vocab_size=64)
    )
    model.save_pretrained(tmp_path)

    def run(ids: torch.Tensor) -> None:
        model(input_ids=ids, decoder_input_ids=torch.cat([torch.full((1, 1), 2), ids[:, :-1]], dim=1))

    measured = measure(Checkpoint(tmp_path, "key"), CALIBRATION)
    expected = norms(model.double().eval(), run)
    assert measured.norms.keys() == expected.keys()
    for name, rows in expected.items():
        assert measured.norms[name] == pytest.approx(float(rows.sum().sqrt()), rel=2e-6), name


def test_names_without_the_prefix_of_the_head_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    model.transformer.save_pretrained(tmp_path)  # names begin with h.0, as in the first GPT-2
    measured = measure(Checkpoint(tmp_path, "key"), CALIBRATION)
    expected = norms(model.double())
    assert measured.norms["h.1.mlp.c_fc.weight"] == pytest.approx(
        float(expected["transformer.h.1.mlp.c_fc.weight"].sum().sqrt()), rel=2e-6
    )


class TestRefused:
    def test_code_that_comes_with_the_model(self, tmp_path: Path) -> None:
        auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
        write_tensors(tmp_path, {"a": torch.ones(2)}, model_type="own", auto_map=auto_map)
        with pytest.raises(InputError, match="needs code that comes with it"):
            covered_layers(tmp_path)

    def test_a_weight_that_is_missing(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        write(tmp_path, "Llama", SIZES)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors.pop("model.layers.1.input_layernorm.weight")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"the weight 'model.layers.1.input_layernorm.weight' is missing"):
            measure(Checkpoint(tmp_path, "key"), CALIBRATION)


def test_blocks_are_empty_again_after_the_pass(tmp_path: Path) -> None:
    write(tmp_path, "Llama", SIZES)
    seen: list[int] = []
    real = Network.value

    def value(self: Network, parameter: str, read: Any) -> torch.Tensor:
        inside = [b for b in self.blocks.values() if any(not p.is_meta for p in b.parameters())]
        seen.append(len(inside))
        return real(self, parameter, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "value", value)
        measure(Checkpoint(tmp_path, "key"), CALIBRATION)
    assert max(seen) == 1  # the block that is being read


def test_other_threads_keep_their_weights_while_a_network_is_built(family: Family) -> None:
    """The weights of a pass in another thread were emptied; after two networks at a time, those of all that came."""
    seen = set[str]()
    with ThreadPoolExecutor(3) as pool:
        built = [pool.submit(build, family.base, torch.float32) for _ in range(9)]
        while not all(each.done() for each in built):
            seen.add(nn.Linear(2, 2).weight.device.type)
    assert seen | {nn.Linear(2, 2).weight.device.type} == {"cpu"}
    assert {value.device.type for each in built for value in each.result().parameters()} == {"meta"}


def test_a_head_of_its_own_is_no_embedding_where_the_class_ties_both(tmp_path: Path) -> None:
    """Mistral Small 3.1 has a head of its own, its config says nothing, and its class ties the head by default."""
    model: Any = tiny("mistral3")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    config.pop("tie_word_embeddings")
    config["text_config"].pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    head, embedding = "lm_head.weight", "model.language_model.embed_tokens.weight"
    assert Network(tmp_path, shapes, torch.float32).same(head) == [head]
    del shapes[head]
    assert set(Network(tmp_path, shapes, torch.float32).same(head)) == {head, embedding}
