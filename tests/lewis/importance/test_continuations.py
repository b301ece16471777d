"""What an expert writes to prompts: its own words, the same each time, in the form of a calibration set."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from lewis.errors import InputError, RecipeError
from lewis.importance.calibration import Calibration
from lewis.importance.continuations import ContinueInput, continue_prompts, find_continued
from lewis.importance.step import CalibrationEntry
from lewis.merging.calibration_rows import split
from lewis.models.source import ModelFiles
from lewis.models.tokenizer import read_vocabulary
from lewis.store import kinds
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import WORDS, parse, rewrite, write_llama, write_tokenizer

pytestmark = pytest.mark.usefixtures("home")
PROMPTS = ((5, 6, 7), (8,), (9, 10, 11, 12, 13))


def files(model: Path) -> ModelFiles:
    return pipeline.download(pipeline.pin(str(model), Path("/")))


def given(model: Path, prompts: tuple[tuple[int, ...], ...] = PROMPTS, **changes: Any) -> ContinueInput:
    rows = Calibration("sums", prompts, tuple(tuple(0.1 for _ in prompt) for prompt in prompts))
    entry = CalibrationEntry(name="sums", digest=rows.digest, tokens=rows.tokens, path=rows.save())
    return replace(ContinueInput(entry, files(model), 2, 20, 42, 0.1, files(model)), **changes)


def certain(family: Family, folder: Path) -> Path:
    """A model that has no doubts: of all tokens one has all of the probability."""
    plain = write_llama(folder / "plain", tied=False, seed=3)
    return rewrite(plain, folder / "certain", lambda name, x: 1e5 * x if name == "lm_head.weight" else x)


def test_they_are_what_generate_gives_of_a_model_without_doubts(family: Family, tmp_path: Path) -> None:
    model = certain(family, tmp_path)
    entry = continue_prompts(given(model))
    rows = Calibration.load(entry.path)
    network, expected = AutoModelForCausalLM.from_pretrained(model), []
    for prompt in PROMPTS:
        whole = network.generate(torch.tensor([prompt]), max_length=20, do_sample=False, pad_token_id=0)
        expected.append(tuple(whole[0].tolist()))
    assert list(rows.samples) == 2 * expected and entry.tokens == 2 * sum(map(len, expected))
    assert rows.weights is not None
    for row, weights in zip(rows.samples, rows.weights, strict=True):
        prompt = next(each for each in PROMPTS if row[: len(each)] == each)
        assert weights == (*[0.1] * (len(prompt) - 1), *[1.0] * (len(row) - len(prompt) + 1))


def test_a_state_that_takes_padding_for_text_gets_none(tmp_path: Path) -> None:
    """The shorter prompts of a batch were continued as if other text was before them."""
    config = RecurrentGemmaConfig(
        vocab_size=64, hidden_size=16, lru_width=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        head_dim=8, attention_window_size=8, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
        logits_soft_cap=1e6,
    )  # fmt: skip
    torch.manual_seed(0)
    network = RecurrentGemmaForCausalLM(config).eval()
    network.lm_head.weight.data *= 1e5
    network.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    rows, expected = Calibration.load(continue_prompts(given(tmp_path)).path), []
    for prompt in PROMPTS:
        whole = network.generate(torch.tensor([prompt]), max_length=20, do_sample=False, pad_token_id=0)
        expected.append(tuple(whole[0].tolist()))
    assert list(rows.samples) == 2 * expected


def test_they_are_drawn_from_the_model(family: Family) -> None:
    """The first token after one prompt, 1,500 times, next to the probabilities of it."""
    many = continue_prompts(given(family.math, ((5, 6, 7),), count=1000, max_tokens=4))
    drawn = [row[3] for row in Calibration.load(many.path).samples]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(family.math)(torch.tensor([[5, 6, 7]])).logits[0, -1]
    chances = logits.double().softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=64).double()
    chi2 = float(((counts - 1000 * chances) ** 2 / (1000 * chances)).sum())
    assert chi2 < 63 + 5 * (2 * 63) ** 0.5


def test_any_seed_will_do(family: Family) -> None:
    """One of more than 64 bits was a traceback."""
    assert continue_prompts(given(family.math, count=1, seed=10**30)).tokens > len(PROMPTS)


@pytest.mark.slow
def test_they_end_with_the_model_or_at_max_tokens(family: Family) -> None:
    rows = Calibration.load(continue_prompts(given(family.math, count=200)).path).samples
    assert {len(row) for row in rows} > {20} and len(rows) == 600
    assert all(len(row) == 20 or row[-1] == 1 for row in rows)
    assert all(1 not in row[:-1] for row in rows)


def test_they_end_where_the_tokenizer_of_an_adapter_ends_a_text(family: Family, tmp_path: Path) -> None:
    """A chat's `<|im_end|>` that only the adapter names was passed, and what came after it counted as the answer."""
    adapter = tmp_path / "lora"
    shutil.copytree(family.lora, adapter)
    write_tokenizer(adapter)
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "w5"}}))
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 8]}))
    model, plain = (files(Path(f"{family.base}+{each}")) for each in (adapter, family.lora))
    end = read_vocabulary(adapter)
    assert end is not None
    asked = given(family.base, count=100, files=model)
    rows = Calibration.load(continue_prompts(asked).path).samples
    prompts = {prompt: len(prompt) for prompt in PROMPTS}
    written = [row[next(n for p, n in prompts.items() if row[:n] == p) :] for row in rows]
    assert {row[-1] for row in written} >= {1, 8, end["w5"]}
    assert all(not {1, 8, end["w5"]} & set(row[:-1]) for row in written)
    ends = {each.digest("cpu") for each in (asked, replace(asked, files=plain))}
    assert len(ends) == 2


def test_the_same_is_found_and_written_again(family: Family) -> None:
    asked, said = given(family.math), list[tuple[int, int]]()
    assert find_continued(asked, "cpu") is None
    made = continue_prompts(asked, lambda _, done, total: said.append((done, total)))
    assert said == [(0, 6), (6, 6)]
    assert find_continued(asked, "cpu") == made == continue_prompts(asked)
    content = made.path.read_bytes()
    for path in kinds.CALIBRATIONS.entries():
        path.unlink()
    asked = given(family.math)
    assert find_continued(asked, "cpu") is None
    assert continue_prompts(asked) == made and made.path.read_bytes() == content
    for other in ({"seed": 1}, {"count": 3}, {"max_tokens": 10}, {"files": files(family.code)}):
        assert find_continued(replace(asked, **other), "cpu") is None
        assert continue_prompts(replace(asked, **other)).digest != made.digest
    damaged = kinds.CALIBRATIONS.path(asked.digest("cpu"))
    damaged.write_bytes(damaged.read_bytes().replace(b"a", b"b", 1))
    assert find_continued(asked, "cpu") is None


def test_they_do_not_depend_on_another_set_that_is_continued_at_the_same_time(family: Family) -> None:
    """Both drew from one generator, which the later of the two set back."""
    asked = [given(family.math, prompts, count=8) for prompts in (PROMPTS, ((15, 6, 7), (18,)))]
    with ThreadPoolExecutor(2) as pool:
        together = [each.digest for each in pool.map(continue_prompts, asked)]
    for path in kinds.CALIBRATIONS.entries():
        path.unlink()
    asked = [given(family.math, prompts, count=8) for prompts in (PROMPTS, ((15, 6, 7), (18,)))]
    assert [continue_prompts(each).digest for each in asked] == together


def test_they_have_the_name_of_this_recipe(family: Family) -> None:
    """They had the name under which the prompts had been stored first, and no measurement of them was found."""
    asked = given(family.math)
    renamed = CalibrationEntry(**{**asked.prompts.model_dump(), "name": "other"})
    assert continue_prompts(replace(asked, prompts=renamed)).name == "other"
    with pytest.raises(InputError, match=r"lewis.calibrations.other: every prompt fills"):
        continue_prompts(replace(asked, prompts=renamed, max_tokens=1))


def test_a_generation_config_that_is_no_object_names_no_end(tmp_path: Path) -> None:
    """It was a traceback."""
    model = learned_positions(tmp_path / "gpt2")
    (model / "generation_config.json").write_text("[]")
    written = Calibration.load(continue_prompts(given(model, ((5, 6, 7),))).path)
    assert all(len(row) <= 12 and 63 not in row[:-1] for row in written.samples)  # as config.json says


def test_an_adapter_writes_too(family: Family) -> None:
    pinned = pipeline.pin(f"{family.base}+{family.lora}", Path("/"))
    asked = given(family.base, files=pipeline.download(pinned))
    assert continue_prompts(asked).digest != continue_prompts(given(family.base)).digest


def test_prompts_without_room_are_named(family: Family) -> None:
    with pytest.raises(InputError, match=r"lewis.calibrations.sums: every prompt fills max_tokens \(3\)"):
        continue_prompts(given(family.math, ((5, 6, 7),), max_tokens=3))


def parts(prompts: list[str], count: int, weight: float, family: Family, folder: Path) -> tuple[Calibration, ...]:
    """All rows that an expert writes to prompts, those that a merge is fitted to, and those that are held back."""
    (folder / "x.jsonl").write_text("".join(json.dumps({"q": each}) + "\n" for each in prompts))
    block = {**SET, "data_files": str(folder / "x.jsonl"), "samples": len(prompts), "continue": count, "max_tokens": 6}
    recipe = {
        "merge_method": "regmean_forward",
        "base_model": str(family.base),
        "models": [{"model": str(family.math)}],
    }
    recipe = parse(recipe | {"lewis": {"calibrations": {"s": block | {"weight": {"prompt": weight}}}}})
    base, experts = pipeline.fetch(recipe)
    [entry] = (pipeline.merge_input(recipe, base, experts).sets or {}).values()
    [expert] = pipeline.prepare_merge(recipe, base, experts).experts
    assert expert.calibration is not None
    return entry.load(), expert.calibration, expert.held_back or Calibration("s", ())


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.1, 1.0])
@pytest.mark.parametrize(
    ("prompts", "count", "expected"),
    [
        (16, 4, 16),
        (24, 3, 18),  # of the last of these prompts, only one row was held back
        (4, 20, 20),
        (6, 4, 4),  # of the fifth and the sixth prompt, every second row was held back
        (3, 4, 0),
    ],
)
def test_no_prompt_of_a_held_back_row_is_fitted_to(
    prompts: int, count: int, expected: int, weight: float, family: Family, tmp_path: Path
) -> None:
    rows, fitted_to, held = parts([f"w{i}" + " w40" * (i % 3) for i in range(prompts)], count, weight, family, tmp_path)
    assert len(held.samples) == expected and sorted(held.samples + fitted_to.samples) == sorted(rows.samples)
    assert not {row[0] for row in held.samples} & {row[0] for row in fitted_to.samples}
    fitted_to, held = split(rows)
    assert len(held.samples) == max(prompts // 4, 1) * count
    assert not {row[0] for row in held.samples} & {row[0] for row in fitted_to.samples}


def test_what_is_held_back_of_whole_groups_stays_as_it_was(family: Family, tmp_path: Path) -> None:
    """So that merges in the store are found."""
    rows, _, held = parts([f"w{i}" for i in range(20)], 4, 0.1, family, tmp_path)
    assert held.samples == rows.samples[3:64:4]
    assert split(rows)[1].samples == rows.samples[3::4]


def test_equal_prompts_are_one(family: Family, tmp_path: Path) -> None:
    _, fitted_to, held = parts([f"w{i % 5}" for i in range(15)], 2, 0.1, family, tmp_path)
    assert len(held.samples) == 6 and len({row[0] for row in held.samples}) == 1
    assert not {row[0] for row in held.samples} & {row[0] for row in fitted_to.samples}


def learned_positions(folder: Path) -> Path:
    """A GPT-2 that takes 12 tokens: it has no position for another one."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=12, n_embd=16, n_layer=1, n_head=2, eos_token_id=63, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_a_model_writes_no_more_than_it_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It was a traceback: also of a short prompt next to a long one, and of a prompt that is too long."""
    model = learned_positions(tmp_path / "gpt2")
    written = Calibration.load(continue_prompts(given(model, ((5, 6, 7), (8,) * 11, (9,) * 13))).path)
    assert max(map(len, written.samples)) == 12 and len(written.samples) == 4
    assert "lewis.calibrations.sums: 1 of 3 prompts fill the 12 tokens that it takes and are left out" in caplog.text
    with pytest.raises(InputError, match="every prompt fills the 12 tokens that it takes and leaves no room"):
        continue_prompts(given(model, ((9,) * 13,)))


def test_an_expert_with_other_token_ids_writes_nothing(family: Family, tmp_path: Path) -> None:
    """It read the base's ids as its own, and its ids were taken for the base's, without a word."""
    other = rewrite(family.math, tmp_path / "other", lambda _, tensor: tensor)
    write_tokenizer(other, WORDS[::-1])
    with pytest.raises(
        InputError, match="another vocabulary: the token 'w0' is 62, in the base it is 3; the prompts of"
    ):
        continue_prompts(given(other, base=files(family.base)))


SET = {"dataset": "json", "data_files": "x.jsonl", "prompt": "{q}", "continue": 4}


@pytest.mark.parametrize(
    ("block", "experts", "told"),
    [
        (SET | {"answer": "{a}"}, ["s", "t"], "`continue` has the expert write the answers"),
        (SET | {"prompt": None, "text": "{q}"}, ["s", "t"], "`continue` has the expert write the answers"),
        (SET | {"continue": 0}, ["s", "t"], "lewis.calibrations.s.continue: "),
        (SET, ["s", "s"], "expected one expert that names this set, and so writes its answers, got 2: a, b"),
        (SET, ["t", "t"], "expected one expert that names this set, and so writes its answers, got 0;"),
    ],
)
def test_what_cannot_be_continued_is_refused(block: dict[str, Any], experts: list[str], told: str) -> None:
    sets = {"s": {k: v for k, v in block.items() if v is not None}, "t": {"texts": ["w1"]}}
    models = [{"model": name, "calibration": each} for name, each in zip("ab", experts, strict=True)]
    recipe = {"merge_method": "regmean_forward", "base_model": "base", "models": models}
    with pytest.raises(RecipeError) as error:
        parse(recipe | {"lewis": {"calibrations": sets}})
    assert told in str(error.value)
