"""Second-order statistics against hooks of the test's own: fp64, one sample at a time, on real classes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.importance import grams as measuring
from lewis.importance import step
from lewis.importance.calibration import Calibration
from lewis.importance.gram_files import Grams
from lewis.importance.grams import bytes_of, measure_grams, measured_by, memory_of
from lewis.importance.measure import network_of
from lewis.importance.step import CalibrationEntry, MeasureInput
from lewis.methods.arithmetic import regression
from lewis.methods.arithmetic.tokens import Gram, Rows
from lewis.models.checkpoint import Checkpoint
from lewis.models.network.network_class import input_embeddings
from lewis.models.source import ModelFiles
from lewis.store import housekeeping
from tests.conftest import Family
from tests.lewis.models.test_module_tree import DENSE, MOES, SIZES, T5, expert_inputs, inputs_of, write
from tests.support.measuring import measure
from tests.support.models import rewrite
from tests.support.tiny_architectures import tiny

SAMPLES = (
    (3, 4, 5, 6, 7, 8, 9),
    (10, 11),
    (11, 12, 13),
    (3, 3, 3),
    (20, 21, 22, 23, 24),
    *[(i, i + 1) for i in range(9)],
)
CALIBRATION = Calibration("sums", SAMPLES)


def measured(folder: Path, to: Path, calibration: Calibration = CALIBRATION, **options: Any) -> Grams:
    with store.publish(to, {}) as scratch:
        measure_grams(Checkpoint(folder, "key"), calibration, scratch, **options)
    return Grams(to)


def mean_products(found: Gram | Rows) -> torch.Tensor:
    if isinstance(found, Gram):
        return found.mean
    rows = torch.cat(found.merged)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "neox", "gemma2"])
def test_dense_decoders(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes, covered = DENSE[kind]
    model = write(tmp_path, name, sizes).double()
    monkeypatch.setattr("tests.lewis.models.test_module_tree.SAMPLES", SAMPLES)
    expected, found = inputs_of(model), measured(tmp_path, tmp_path / "grams")
    network = network_of(Checkpoint(tmp_path, "key"))
    assert len(network.covered) * (7 if kind in ("llama", "gemma2") else 1) >= covered
    for each in network.covered:
        x = expected[each.parameter.removesuffix(".weight")]
        assert found.tokens(each.parameter) == len(x) == CALIBRATION.tokens
        torch.testing.assert_close(
            mean_products(found.inputs(each.parameter)).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6
        )


def test_an_input_that_several_share_is_kept_once(tmp_path: Path) -> None:
    write(tmp_path, "Llama", SIZES)
    found = measured(tmp_path, tmp_path / "grams")
    block = "model.layers.1."
    q, k, v, o = (found.source(f"{block}self_attn.{name}_proj.weight") for name in "qkvo")
    gate, up, down = (found.source(f"{block}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
    assert q == k == v and gate == up and len({q, o, gate, down}) == 4
    kept = load_file(tmp_path / "grams" / "model.layers.1.safetensors")
    assert len(kept) == len(load_file(tmp_path / "grams" / "model.layers.1.squares.safetensors")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen2-moe"])
def test_stacked_experts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert by itself; gate and up share their input; one that no token reached has nothing."""
    name, sizes, *_ = MOES[kind]
    model = write(tmp_path, name, sizes).double()
    monkeypatch.setattr("tests.lewis.models.test_module_tree.SAMPLES", SAMPLES)
    inputs, found = expert_inputs(model), measured(tmp_path, tmp_path / "grams")
    assert found.tokens("model.layers.0.mlp.experts.gate_up_proj[0]") > 0
    network, reached = network_of(Checkpoint(tmp_path, "key")), 0
    for each in network.covered:
        if each.expert is None:
            continue
        module, _, leaf = each.parameter.rpartition(".")
        of_expert = inputs[module].get(each.expert)
        projection = f"{each.parameter}[{each.expert}]"
        if of_expert is None:
            assert projection not in found
            continue
        reached += 1
        x = of_expert[leaf == "down_proj"]
        assert found.tokens(projection) == len(x)
        torch.testing.assert_close(
            mean_products(found.inputs(projection)).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6
        )
    assert reached > 8


def test_an_encoder_with_a_decoder(tmp_path: Path) -> None:
    write(tmp_path, "T5", T5)
    found = measured(tmp_path, tmp_path / "grams")
    assert len({found.source(each.parameter) for each in network_of(Checkpoint(tmp_path, "key")).covered}) > 12


def test_norms_and_moments_are_those_of_the_other_pass(family: Family, tmp_path: Path) -> None:
    model = Checkpoint(family.math, "key")
    expected, grams = measure(model, CALIBRATION), measured(family.math, tmp_path / "grams")
    found = measured_by(model, CALIBRATION, grams)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert all(torch.allclose(found.moments[name], s, rtol=1e-4) for name, s in expected.moments.items())


def test_a_weight_that_blocks_share_is_measured_in_all_of_them(tmp_path: Path) -> None:
    tiny("zamba2").save_pretrained(tmp_path)
    model = Checkpoint(tmp_path, "key")
    network = network_of(model)
    shared = [each.tensor for each in network.covered if len(network.same(each.parameter)) > 1]
    grams = measured(tmp_path, tmp_path / "grams")
    ours, theirs = measured_by(model, CALIBRATION, grams), measure(model, CALIBRATION)
    assert len(shared) == 10 and grams.tokens(shared[0]) == 2 * CALIBRATION.tokens
    for name, norm in theirs.norms.items():
        assert norm == (None if ours.norms[name] is None else pytest.approx(ours.norms[name], rel=1e-5)), name


def test_a_block_that_is_run_twice_is_told(tmp_path: Path) -> None:
    tiny("hrm_text").save_pretrained(tmp_path)
    with pytest.raises(LewisError, match=r"it runs model.\w+.layers.0 twice, .*; use another merge_method"):
        measured(tmp_path, tmp_path / "grams")


def test_the_same_bytes_for_any_number_of_threads(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "TOKENS_PER_PASS", 8)
    for threads in (1, 3):
        measured(family.math, tmp_path / str(threads), threads=threads)
    names = [path.name for path in (tmp_path / "1").glob("*.safetensors")]
    assert len(names) == 4
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes() for name in names)


class TestRule:
    def test_fewer_tokens_than_half_the_inputs_are_kept_as_rows(self, family: Family, tmp_path: Path) -> None:
        few = measured(family.math, tmp_path / "few", Calibration("few", ((3, 4, 5),)))
        many = measured(family.math, tmp_path / "many")
        name = "model.layers.0.mlp.down_proj.weight"
        kept = few.inputs(name)
        assert isinstance(kept, Rows) and kept.tokens == few.tokens(name) == 3
        assert isinstance(many.inputs(name), Gram)

    def test_of_a_wide_layer_an_even_share_of_the_rows(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        whole = measured(family.math, tmp_path / "whole", Calibration("one", (SAMPLES[0], SAMPLES[4])))
        monkeypatch.setattr(regression, "DUAL_ABOVE", 20)
        monkeypatch.setattr(regression, "DUAL_TOKENS", 5)
        monkeypatch.setattr(measuring, "TOKENS_PER_PASS", 4)
        found = measured(family.math, tmp_path / "wide", Calibration("one", (SAMPLES[0], SAMPLES[4])))
        kept, rows = found.inputs(name), whole.inputs(name)
        assert isinstance(kept, Rows) and isinstance(rows, Rows)
        assert torch.allclose(kept.merged[0], rows.merged[0][torch.arange(5) * 12 // 5], atol=1e-5)
        assert found.tokens(name) == 12
        assert torch.allclose(found.squares(name), whole.squares(name), rtol=1e-4)  # of all rows

    def test_both_forms_give_the_same_solution(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        products = measured(family.math, tmp_path / "products").inputs(name)
        monkeypatch.setattr(regression, "DUAL_ABOVE", 20)
        rows = measured(family.math, tmp_path / "rows").inputs(name)
        assert isinstance(products, Gram) and isinstance(rows, Rows)
        noise = torch.Generator().manual_seed(0)
        anchor, weight = (torch.randn(5, products.size, generator=noise) for _ in range(2))
        primal, dual = (regression.Inputs([each], 1e-2) for each in (products, rows))
        assert (primal.is_dual, dual.is_dual) == (False, True)
        found = [each.solve(anchor, [weight]) for each in (primal, dual)]
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


FEEDS = {"qwen3_5_text": "in_proj_a", "olmo_hybrid": "b_proj", "recurrent_gemma": "linear_x", "moshi": "k_proj.linear"}


@pytest.mark.parametrize("kind", FEEDS)
def test_tokens_are_not_weighed_in_what_feeds_a_state_or_keys(kind: str, tmp_path: Path, home: Path) -> None:
    tiny(kind).save_pretrained(tmp_path / kind)
    model = Checkpoint(tmp_path / kind, "key")
    weighted = Calibration("s", SAMPLES, tuple(tuple(0.1 + i for i in range(len(each))) for each in SAMPLES))
    alike, found = (measure(model, rows).moments for rows in (CALIBRATION, weighted))
    same = [name for name in alike if torch.equal(alike[name], found[name])]
    feeds = [name for name in alike if name.endswith(f".{FEEDS[kind]}.weight")]
    assert feeds and {*feeds} <= {*same} < {*alike}
    assert step.measured_as("key", model.tensors, weighted) != step.measured_as("key", model.tensors, CALIBRATION)
    assert step.measured_as("key", ["layers.0.self_attn.k_proj.weight"], weighted) == "key"


class TestStore:
    def entries(self, home: Path) -> list[Path]:
        return [path for path in (home / "grams").iterdir() if not path.name.startswith(".")]

    def test_is_made_once_and_found(self, family: Family, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Checkpoint(family.math, "key")
        folder = step.find_or_measure_grams(model, CALIBRATION)
        monkeypatch.setattr(measuring, "measure_grams", None)
        assert step.find_or_measure_grams(model, CALIBRATION) == folder == self.entries(home)[0]
        assert step.grams_place("key", CALIBRATION.digest, "cpu")[1] == folder
        others = {step.grams_place(*of, "cpu")[0] for of in (("key", "x"), ("x", CALIBRATION.digest))}
        assert len(others | {folder.name}) == 3
        assert step.grams_place("key", CALIBRATION.digest, "cuda")[1] != folder

    def test_norms_come_from_the_same_pass_unless_a_layer_was_not_seen(
        self, family: Family, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Any] = []
        measure_sets = step.measuring.measure_sets
        monkeypatch.setattr(
            step.measuring, "measure_sets", lambda *given, **named: made.append(given) or measure_sets(*given, **named)
        )
        files = ModelFiles.at(str(family.math), "key", family.math)
        sets = [
            CalibrationEntry(name=name, digest=each.digest, tokens=each.tokens, path=each.save())
            for name, each in {"sums": CALIBRATION, "few": Calibration("few", ((3, 4),))}.items()
        ]
        [entry] = step.measure(MeasureInput(files, (sets[0],), grams=True))
        assert entry.statistics and len(entry.norms) == 14 and not made
        monkeypatch.setattr("lewis.importance.gram_files.Grams.__contains__", lambda self, name: "down" not in name)
        [entry] = step.measure(MeasureInput(files, (sets[1],), grams=True))
        assert None not in entry.norms.values() and len(made) == 1

    def test_housekeeping_knows_it(self, family: Family, home: Path) -> None:
        folder = step.find_or_measure_grams(Checkpoint(family.math, "key"), CALIBRATION)
        assert housekeeping.survey(needed={}) == []
        os.utime(folder / store.MANIFEST, (0, 0))
        [found] = housekeeping.survey(needed={})
        assert (found.kind, found.path) == ("grams", folder)
        keep = housekeeping.Needed(lambda path: path == folder, "")
        assert housekeeping.survey(needed={"grams": keep}) == []
        assert housekeeping.remove([found]) > 10_000 and not folder.exists()

    def test_a_damaged_file_is_not_believed_and_measured_again(self, family: Family, home: Path) -> None:
        model = Checkpoint(family.math, "key")
        folder = step.find_or_measure_grams(model, CALIBRATION)
        path = folder / "model.layers.1.safetensors"
        content, grams = path.read_bytes(), Grams(folder)
        path.chmod(0o600)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        grams.inputs("model.layers.0.mlp.down_proj.weight")
        with pytest.raises(LewisError, match=r"model\.layers\.1\.safetensors is damaged.*run again"):
            grams.inputs("model.layers.1.mlp.down_proj.weight")
        assert step.find_or_measure_grams(model, CALIBRATION) == folder
        assert path.read_bytes() == content
        path.chmod(0o600)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert step.find_or_measure_grams(model, CALIBRATION) == folder  # it is found damaged before it is read
        assert path.read_bytes() == content

    @pytest.mark.slow
    def test_a_pass_that_was_killed_does_not_sum_up_again_what_is_written(
        self, family: Family, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, written = Checkpoint(family.math, "key"), []
        expected = {
            p.name: p.read_bytes() for p in step.find_or_measure_grams(model, CALIBRATION).glob("*.safetensors")
        }
        for folder in self.entries(home):
            store.discard(folder)
        write_block = measuring.gram_files.write

        class Killed(BaseException):
            pass

        def dies(folder: Path, block: str, *rest: Any) -> dict[str, str]:
            if block.endswith(".1"):
                raise Killed
            return write_block(folder, block, *rest)

        monkeypatch.setattr(measuring.gram_files, "write", dies)
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as after kill -9, nothing is tidied up
        with pytest.raises(Killed):
            step.find_or_measure_grams(model, CALIBRATION)
        monkeypatch.undo()
        monkeypatch.setenv("LEWIS_HOME", str(home))
        monkeypatch.setattr(
            measuring.gram_files, "write", lambda *given: written.append(given[1]) or write_block(*given)
        )
        folder = step.find_or_measure_grams(model, CALIBRATION)
        assert written == ["model.layers.1"]
        assert {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} == expected

    def test_space_is_checked_before_the_pass(
        self, family: Family, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lewis.store.files._free", lambda _: (1000, False))
        with pytest.raises(InputError, match="no space"):
            step.find_or_measure_grams(Checkpoint(family.math, "key"), CALIBRATION)
        assert not self.entries(home)

    def test_the_size_is_known_before(self, family: Family, home: Path) -> None:
        model = Checkpoint(family.math, "key")
        folder = step.find_or_measure_grams(model, CALIBRATION)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        assert size / 2 < bytes_of(network_of(model), CALIBRATION.tokens) < 3 * size

    def test_the_memory_is_known_before(self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It was forecast for one block, but the next one is measured while that is written."""
        rows, live, sizes = Calibration("many", tuple((3 + i,) * 8 for i in range(50))), WeakSet[Any](), list[int]()

        class Watched(measuring.Collected):
            def add(self, parts: Sequence[torch.Tensor]) -> list[Callable[[], None]]:
                jobs = super().add(parts)
                live.add(self)
                sizes.append(sum(4 * each._packed.numel() for each in live if each._packed is not None))
                return jobs

        monkeypatch.setattr(measuring, "Collected", Watched)
        model = Checkpoint(family.math, "key")
        measure_grams(model, rows, tmp_path)
        network = network_of(model)
        of_hidden_states = 8 * rows.tokens * input_embeddings(network.module).embedding_dim
        assert max(sizes) <= memory_of(network, rows.tokens, 0) - of_hidden_states


def test_activations_that_are_not_finite_are_told_with_their_layer(family: Family, tmp_path: Path) -> None:
    def spoil(name: str, value: torch.Tensor) -> torch.Tensor:
        return value * 1e30 if name.endswith("layers.0.mlp.up_proj.weight") else value

    with pytest.raises(LewisError, match=r"activations into 'model\.layers\.0\.mlp\.down_proj\.weight' are NaN, Inf"):
        measured(rewrite(family.math, tmp_path / "spoilt", spoil), tmp_path / "grams")
