"""Importance against a slow computation: one sample at a time, fp64, hooks of the test's own on the real model."""

import gc
import os
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import greenlet
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lewis.errors import InputError, LewisError
from lewis.importance import batches, memory
from lewis.importance.calibration import Calibration
from lewis.importance.measure import measure_sets, network_of
from lewis.importance.streaming import Streamed
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora.expert import LoraExpert
from lewis.models.network.module_tree import Layer, Network
from lewis.recipe.schema import Importance
from tests.conftest import Family
from tests.support.measuring import covered_layers, measure
from tests.support.models import materialise, rewrite, shard, write_lora, write_tensors
from tests.support.warm import WarmPython

SAMPLES = ((3, 4, 5, 6, 7, 8, 9), (10,), (11, 12, 13), (3, 3, 3), (20, 21, 22, 23, 24))
CALIBRATION = Calibration("sums", SAMPLES)
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def slow(folder: Path) -> dict[str, float]:
    """I(l,c) = || W * sqrt(s) ||_F of every nn.Linear in the layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    for name, module in linears.items():
        module.register_forward_hook(lambda _, args, __, seen=inputs[name]: seen.append(args[0][0]))  # type: ignore[misc]
    with torch.no_grad():
        for sample in SAMPLES:
            model(input_ids=torch.tensor([sample]))
    norms = {}
    for name, module in linears.items():
        s = torch.cat(inputs[name]).square().mean(dim=0)
        norms[f"{name}.weight"] = float((module.weight * s.sqrt()).norm())
    return norms


def slow_moments(folder: Path, module: str) -> torch.Tensor:
    """Mean of x_j^2 over the tokens that go into one module."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda _, args, __: seen.append(args[0][0]))
    with torch.no_grad():
        for sample in SAMPLES:
            model(input_ids=torch.tensor([sample]))
    return torch.cat(seen).square().mean(dim=0)


def norms_of(model: Any, calibration: Calibration = CALIBRATION) -> dict[str, float]:
    return measure(model, calibration).norms


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys() and len(found) == 14
    assert all(found[name] == pytest.approx(expected[name], rel=2e-6) for name in found)


class TestMeasure:
    def test_is_the_slow_computation(self, family: Family) -> None:
        close(norms_of(Checkpoint(family.math, "key")), slow(family.math))

    @pytest.mark.parametrize(
        "kind",
        [(Qwen2Config, Qwen2ForCausalLM, {}), (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8})],
        ids=["qwen2", "gemma2"],
    )
    def test_of_other_architectures(self, tmp_path: Path, kind: Any) -> None:
        torch.manual_seed(0)
        config, network, more = kind
        network(config(**SIZES, **more)).to(torch.bfloat16).save_pretrained(tmp_path)
        close(norms_of(Checkpoint(tmp_path, "key")), slow(tmp_path))

    def test_keeps_the_moments_that_the_norms_are_made_of(self, family: Family) -> None:
        measured = measure(Checkpoint(family.math, "key"), CALIBRATION)
        assert measured.moments.keys() == measured.norms.keys()
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            found = measured.moments[f"model.layers.1.{module}.weight"]
            expected = slow_moments(family.math, f"model.layers.1.{module}")
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("tokens", [1, 8, 20, 10**6])
    def test_batching_and_padding_do_not_matter(
        self, family: Family, monkeypatch: pytest.MonkeyPatch, tokens: int
    ) -> None:
        expected = norms_of(Checkpoint(family.base, "key"))
        monkeypatch.setattr(batches, "TOKENS_PER_BATCH", tokens)
        close(norms_of(Checkpoint(family.base, "key")), expected)

    def test_batches_cost_the_least(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lengths = [300, 290, 280, 120, 110, 40, 40, 40]

        def cost(ends: list[int]) -> int:
            starts = [0, *ends[:-1]]
            return sum((end - start) * lengths[start] + 100 for start, end in zip(starts, ends, strict=True))

        every = [[*cuts, 8] for n in range(8) for cuts in combinations(range(1, 8), n)]
        found = batches.ends(lengths, equal=False)
        assert cost(found) == min(map(cost, every)) and found == [3, 5, 8]
        assert batches.ends(lengths, equal=True) == [1, 2, 3, 4, 5, 8]
        monkeypatch.setattr(batches, "TOKENS_PER_BATCH", 600)
        assert batches.ends(lengths, equal=False) == [1, 3, 5, 8]

    def test_the_number_of_threads_does_not_matter(self, family: Family) -> None:
        before, found = torch.get_num_threads(), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(norms_of(Checkpoint(family.base, "key")))
        torch.set_num_threads(before)
        close(*found)

    def test_the_order_of_samples_does_not_matter(self, family: Family) -> None:
        turned = Calibration("sums", SAMPLES[::-1])
        close(norms_of(Checkpoint(family.base, "a"), turned), norms_of(Checkpoint(family.base, "b")))

    def test_other_samples_do_matter(self, family: Family) -> None:
        other = norms_of(Checkpoint(family.base, "key"), Calibration("x", ((50, 51),)))
        assert other != pytest.approx(norms_of(Checkpoint(family.base, "key")), rel=1e-3)

    def test_of_shards_is_that_of_one_file(self, family: Family, tmp_path: Path) -> None:
        parts = Checkpoint(shard(family.base, tmp_path / "s"), "key")
        assert norms_of(parts) == norms_of(Checkpoint(family.base, "key"))

    @pytest.mark.parametrize(
        "settings",
        [
            {"use_rslora": True, "targets": "all-linear"},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
            {"targets": ("embed_tokens", "q_proj")},
            {"modules_to_save": ["norm"]},
        ],
    )
    def test_of_a_lora_expert_is_that_of_its_materialised_self(
        self, family: Family, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        adapter = write_lora(family.base, tmp_path / "adapter", **settings)
        expert = LoraExpert(Checkpoint(family.base, "base"), adapter, "key")
        found = norms_of(expert)
        close(found, slow(materialise(family.base, adapter, tmp_path / "full")))
        assert found != norms_of(expert.base)

    def test_progress_is_told(self, family: Family) -> None:
        seen: list[tuple[str, int, int]] = []
        measure(Checkpoint(family.base, "key"), CALIBRATION, progress=lambda *step: seen.append(step))
        assert seen[-1] == ("measure", 19, 19)

    def test_computes_no_logits(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import LlamaForCausalLM

        monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: pytest.fail("the head ran"))
        norms_of(Checkpoint(family.base, "key"))


@pytest.mark.slow
class TestSets:
    OTHER = Calibration("other", ((30, 31), (40, 41, 42, 43), (5,)))

    @pytest.mark.parametrize(
        ("tokens", "room"),
        [
            (1, 0),
            (8, 1200),
            (10**6, 10**9),
            *(
                pytest.param(*each, marks=pytest.mark.long)
                for each in [(1, 1200), (1, 10**9), (8, 0), (8, 10**9), (10**6, 0), (10**6, 1200)]
            ),
        ],
    )
    @pytest.mark.parametrize(
        "settings", [Importance(), Importance(prune_ratio=0.5, reduce="sum")], ids=["", "official"]
    )
    def test_together_they_give_the_bits_that_each_gives_alone(
        self, family: Family, monkeypatch: pytest.MonkeyPatch, settings: Importance, room: int, tokens: int
    ) -> None:
        monkeypatch.setattr(batches, "TOKENS_PER_BATCH", tokens)
        monkeypatch.setattr(Streamed, "room", 0)
        model, sets = Checkpoint(family.base, "key"), [CALIBRATION, self.OTHER]
        alone = [measure(model, calibration, settings) for calibration in sets]
        monkeypatch.setattr(Streamed, "room", room)
        together = measure_sets(model, sets, settings)
        assert alone[0].norms != alone[1].norms
        for one, other in zip(alone, together, strict=True):
            assert one.norms == other.norms and one.moments.keys() == other.moments.keys()
            assert all(torch.equal(s, other.moments[name]) for name, s in one.moments.items())

    # Batches of a sample each; embeddings and hidden states take 128 bytes a token: 1280 bytes are ten tokens.
    @pytest.mark.parametrize(("room", "rounds"), [(10**9, 1), (1280, 4), (0, 8)])
    def test_a_block_is_read_once_a_round_for_all(
        self, family: Family, monkeypatch: pytest.MonkeyPatch, room: int, rounds: int
    ) -> None:
        monkeypatch.setattr(batches, "TOKENS_PER_BATCH", 1)
        monkeypatch.setattr(Streamed, "room", room)
        read: list[str] = []
        real = Network.value
        monkeypatch.setattr(Network, "value", lambda self, name, how: (read.append(name), real(self, name, how))[1])
        measure_sets(Checkpoint(family.base, "key"), [CALIBRATION, self.OTHER])
        blocks = [name for name in read if ".layers." in name]
        assert len(set(blocks)) == 18 and {blocks.count(name) for name in blocks} == {rounds}
        first = blocks[:18]
        assert first == sorted(first, key=lambda name: name.split(".")[2]) and blocks == first * rounds

    @pytest.mark.parametrize(
        "settings", [Importance(), Importance(prune_ratio=0.5, reduce="sum")], ids=["", "official"]
    )
    def test_a_model_that_stays_in_memory_gives_the_same(
        self, family: Family, monkeypatch: pytest.MonkeyPatch, settings: Importance
    ) -> None:
        model, sets, real = Checkpoint(family.base, "key"), [CALIBRATION, self.OTHER], Streamed.__init__
        expected = measure_sets(model, sets, settings)

        def as_on_a_gpu(self: Streamed, *arguments: Any, keep: bool = True) -> None:
            real(self, *arguments, keep=keep)
            self._keep = keep

        monkeypatch.setattr(Streamed, "__init__", as_on_a_gpu)
        seen: list[tuple[str, int, int]] = []
        found = measure_sets(model, sets, settings, progress=lambda *step: seen.append(step))
        assert [each.norms for each in found] == [each.norms for each in expected] and seen[-1] == ("measure", 26, 26)

    def test_what_waits_takes_no_more_than_a_block(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Checkpoint(family.base, "key")
        network = network_of(model)
        assert Streamed(network, model, "cpu", torch.float32).room == 64 * 2**20
        monkeypatch.setattr(memory, "_ROOM", 0)
        block = sum(p.numel() for p in network.blocks["model.layers.0"].parameters())
        assert Streamed(network, model, "cpu", torch.float32).room == 4 * block

    def test_no_weight_stays_mapped(self, tmp_path: Path) -> None:
        """A run of several models held the pages of all that it had measured."""
        LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 1 << 14})).save_pretrained(tmp_path)
        model, file = Checkpoint(tmp_path, "key"), tmp_path / "model.safetensors"
        measure_sets(model, [CALIBRATION])
        maps = Path("/proc/self/smaps").read_text()
        [held] = re.findall(rf"{re.escape(str(file))}\n(?:.*\n){{0,3}}?Rss: +(\d+) kB", maps)
        assert 1000 * int(held) < file.stat().st_size / 4  # around what is read, the system maps some pages more
        assert model.tensors  # it is open until here

    def test_a_pass_can_be_stopped_between_two_blocks(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batches, "TOKENS_PER_BATCH", 1)

        def stop(what: str, done: int, total: int) -> None:
            assert (0 < done < 19) and total == 19
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure(Checkpoint(family.base, "key"), CALIBRATION, progress=stop)
        assert not [each for each in gc.get_objects() if type(each) is greenlet and each and each.parent]  # alive
        close(norms_of(Checkpoint(family.base, "key")), slow(family.base))


class TestRefused:
    def test_a_token_outside_the_vocabulary(self, family: Family) -> None:
        with pytest.raises(InputError, match="token 64 of set 'sums' is outside its 64 embeddings"):
            measure(Checkpoint(family.base, "key"), Calibration("sums", ((3, 64),)))

    def test_a_sample_longer_than_the_model_takes(self, family: Family) -> None:
        with pytest.raises(
            InputError, match=r"has 65 tokens, the model takes 64; set lewis.calibrations.sums.max_tokens"
        ):
            measure(Checkpoint(family.base, "key"), Calibration("sums", ((3,) * 65,)))

    def test_a_damaged_model(self, family: Family, tmp_path: Path) -> None:
        broken = rewrite(family.base, tmp_path / "nan", lambda name, t: t * float("nan") if "embed" in name else t)
        with pytest.raises(
            LewisError, match=r"importance of 'model.layers.0.self_attn.q_proj.weight' is not finite: activations"
        ):
            norms_of(Checkpoint(broken, "key"))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (float("inf"), r"'model.layers.1.mlp.gate_proj.weight' has values that are NaN or Inf"),
            (1e30, r"'model.layers.1.mlp.gate_proj.weight' is not finite: its weights are too large"),
        ],
    )
    def test_a_damaged_layer(self, family: Family, tmp_path: Path, value: float, message: str) -> None:
        layer = "layers.1.mlp.gate_proj"
        broken = rewrite(family.base, tmp_path / "m", lambda name, t: torch.full_like(t, value) if layer in name else t)
        with pytest.raises(LewisError, match=message):
            norms_of(Checkpoint(broken, "key"))

    def test_a_model_without_projections(self, tmp_path: Path) -> None:
        bare = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 0}))
        bare.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="no covered layer: LlamaForCausalLM has no projection"):
            covered_layers(tmp_path)
        with pytest.raises(InputError, match="no covered layer"):
            measure(Checkpoint(tmp_path, "key"), CALIBRATION)

    def test_a_model_that_transformers_does_not_know(self, tmp_path: Path) -> None:
        write_tensors(tmp_path, {"a": torch.ones(2)}, model_type="brand-new")
        with pytest.raises(InputError, match="transformers cannot build this model"):
            covered_layers(tmp_path)
        with pytest.raises(InputError, match="transformers cannot build this model"):
            norms_of(Checkpoint(tmp_path, "key"))


class TestCoveredLayers:
    def test_are_the_linear_modules_of_the_layers(self, family: Family) -> None:
        layers = covered_layers(family.base)
        assert layers[0] == Layer("model.layers.0.self_attn.q_proj.weight", 0, "self_attn.q_proj", 256)
        assert {layer.index for layer in layers} == {0, 1}
        assert sorted({layer.projection for layer in layers}) == [
            *("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
            *("self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"),
        ]
        assert {layer.tensor for layer in layers} == slow(family.base).keys()

    def test_are_those_that_the_checkpoint_has(self, family: Family) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        shapes = {name: (32, 16), "model.norm.weight": (16,)}
        assert [layer.tensor for layer in covered_layers(family.base, shapes)] == [name]
        with pytest.raises(InputError, match="LEWIS cannot guide it"):
            covered_layers(family.base, {"other.weight": (2, 2)})


MEMORY = """
import sys
from pathlib import Path
from lewis.importance.calibration import Calibration
from lewis.importance.measure import measure_sets, network_of
from lewis.importance.memory import memory_of
from lewis.memory import PeakMemory, anonymous_bytes
from lewis.models.checkpoint import Checkpoint

model, rows = Checkpoint(Path(sys.argv[1]), "key"), Calibration("rows", ((3, 4, 5, 6),) * 1000)
said, before = memory_of(network_of(model), rows.tokens), anonymous_bytes()
with PeakMemory() as memory:
    measure_sets(model, [rows])
print(said, memory.peak - before)
"""


@pytest.mark.slow
def test_the_memory_that_a_pass_needs_grows_with_what_a_batch_leaves(tmp_path: Path, warm: WarmPython) -> None:
    """`plan` left activations out. In a process of its own, since memory that earlier tests freed would be reused."""
    sizes = {**SIZES, "intermediate_size": 1 << 14}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    process = warm.run(MEMORY, [str(tmp_path)], folder=Path.cwd(), environment=os.environ)
    said, needed = map(int, process.communicate()[0].split())
    assert needed > 600e6 and needed / 1.2 < said < needed * 1.2
