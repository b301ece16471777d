"""Models whose vocabularies differ: rows are matched by token, by mergekit's rules, and the tokenizer fits them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis.errors import InputError
from lewis.evaluation.harness import lm_eval
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.memory import PeakMemory, anonymous_bytes
from lewis.merging.run import Merge
from lewis.merging.vocabulary.aligned import Aligned, Lenders
from lewis.merging.vocabulary.tokens import Target, plain_entry
from lewis.models.checkpoint import Checkpoint
from lewis.models.tokenizer import read_vocabulary
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import (
    bits,
    edit_json,
    open_merge,
    parse,
    rewrite,
    write_llama,
    write_tensors,
    write_tokenizer,
)

MERGEKIT = os.environ.get("LEWIS_MERGEKIT")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = [f"w{i}" for i in range(60)]


def with_vocabulary(model: Path, folder: Path, words: list[str], added: list[str], *, rows: int | None = None) -> Path:
    """A copy of a model of the family with other words, then added tokens; the row of its token t is all `value(t)`."""
    rows = rows or 3 + len(words) + len(added)

    def resize(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in (EMBED, HEAD):
            return tensor
        tokens = [*SPECIAL, *words, *added]
        values = [value(tokens[i], folder, name) if i < len(tokens) else -9.0 for i in range(rows)]
        return torch.tensor(values)[:, None].repeat(1, tensor.shape[1])

    rewrite(model, folder, resize)
    write_tokenizer(folder, words)
    content = json.loads((folder / "tokenizer.json").read_text())
    entry = content["added_tokens"][0]
    first = 3 + len(words)
    content["added_tokens"] += [
        {**entry, "id": first + i, "content": t, "special": i == 0} for i, t in enumerate(added)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit_json(folder / "config.json", vocab_size=rows)
    return folder


def value(token: str, folder: Path, name: str = EMBED) -> float:
    """What is in a model's row of a token: another number for each."""
    return (sum(token.encode()) + 7 * sum(folder.name.encode()) + 1000 * (name == HEAD)) / 4096


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, family: Family, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, and experts with tokens of their own: one appends <a>, <b>; one lacks w59, moves words, has <b>, <c>."""
    folder = tmp_path_factory.mktemp("vocabularies")
    model = family.base if request.param else write_llama(folder / "untied", tied=False)
    base = with_vocabulary(model, folder / "base", WORDS, [])
    appends = with_vocabulary(model, folder / "appends", WORDS, ["<a>", "<b>"])
    moves = with_vocabulary(model, folder / "moves", WORDS[-2::-1], ["<c>", "<b>"])
    return [base, appends, moves]


def rows(merge: Merge, folder: Path, name: str = EMBED) -> dict[str, float]:
    """Token -> the number in its row of the output."""
    merge.run(folder)
    merged = load_file(folder / "model.safetensors")[name]
    assert bool((merged == merged[:, :1]).all())
    return {token: float(merged[row, 0]) for token, row in AutoTokenizer.from_pretrained(folder).get_vocab().items()}


def folder_of(models: list[Path], name: str) -> Path:
    return next(path for path in models if path.name == name)


def test_base_takes_the_bases_tokens_from_every_model(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    merge = open_merge("linear", None, models, parameters={"weight": 1}, tokenizer_source="base")
    found = rows(merge, tmp_path / "out")
    assert found.keys() == {*SPECIAL, *WORDS}
    for token in ("<eos>", "w0", "w17", "w58"):  # in all, at other ids
        assert found[token] == pytest.approx(sum(value(token, model) for model in models) / 3, rel=1e-6)
    # one lacks it; without a base its row is the mean of the others
    mean = (value("w59", base) + value("w59", experts[0])) / 2
    assert found["w59"] == pytest.approx(mean, rel=1e-6)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 63


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_union_appends_the_experts_tokens(models: list[Path], tmp_path: Path, order: list[int]) -> None:
    base, appends, moves = models
    experts = [[appends, moves][i] for i in order]
    merge = open_merge("task_arithmetic", base, experts, parameters={"weight": 0.5}, tokenizer_source="union")
    untied = not merge.base.tied
    found = rows(merge, tmp_path / "out", HEAD if untied else EMBED)
    name = HEAD if untied else EMBED

    def of(token: str, model: Path) -> float:
        return value(token, model, name)

    assert found["w5"] == pytest.approx((of("w5", appends) + of("w5", moves)) / 2, rel=1e-5)
    # w59 is the base's where it is missing; <a> and <c> are of one expert everywhere; <b> is a mean in the base
    assert found["w59"] == pytest.approx((of("w59", appends) + of("w59", base)) / 2, rel=1e-5)
    assert (found["<a>"], found["<c>"]) == pytest.approx((of("<a>", appends), of("<c>", moves)), rel=1e-5)
    assert found["<b>"] == pytest.approx((of("<b>", appends) + of("<b>", moves)) / 2, rel=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "w59", "<a>", "<b>", "<c>")] == [0, 62, 63, 64, 65]
    assert tokenizer("w3 <a> w4 <c>")["input_ids"] == [6, 63, 7, 65]
    assert tokenizer.decode([63, 64, 65], skip_special_tokens=True).split() == ["<b>"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(tokenizer) == 66
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied != untied


def test_an_experts_vocabulary_with_its_special_ids(models: list[Path], tmp_path: Path) -> None:
    base, appends, moves = models
    expert = rewrite(moves, tmp_path / "moves", lambda _, tensor: tensor)
    for file in ("config.json", "generation_config.json"):
        edit_json(expert / file, eos_token_id=62)
    merge = open_merge("ties", base, [appends, expert], parameters={"weight": 0.5}, tokenizer_source=str(expert))
    found = rows(merge, tmp_path / "out")
    assert found.keys() == {*SPECIAL, *WORDS[:-1], "<b>", "<c>"}
    assert found["<c>"] == pytest.approx(value("<c>", expert), rel=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (expert / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (64, 62, None)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 62


def test_padding_is_the_bases_own_or_as_asked_for(family: Family, tmp_path: Path) -> None:
    base = with_vocabulary(family.base, tmp_path / "base", WORDS, [], rows=80)
    expert = with_vocabulary(family.base, tmp_path / "expert", WORDS, ["<a>", "<b>"], rows=72)

    def merged(**policy: Any) -> torch.Tensor:
        weight = {"parameters": {"weight": 1.0}}
        return open_merge("task_arithmetic", base, [expert], **weight, **policy).tensor(EMBED)[:, 0]

    of_base, of_union = merged(tokenizer_source="base"), merged(tokenizer_source="union")
    assert len(of_base) == len(of_union) == 80
    assert of_base[63:].tolist() == [-9.0] * 17
    assert of_union[63:65].tolist() == [value("<a>", expert), value("<b>", expert)] and of_union[65:].unique() == -9
    padded = merged(tokenizer={"pad_to_multiple_of": 32})
    assert len(padded) == 96
    torch.testing.assert_close(padded[65:], padded[:65].mean().expand(31))
    assert len(merged(tokenizer={"source": "base", "pad_to_multiple_of": 3})) == 63


def choices(models: list[Path]) -> dict[str, Any]:
    """A token of each kind of source: new, another's row, 0, by number, forced, and what is there already."""
    base, appends, moves = map(str, models)
    return {
        "<new>": {"source": {"kind": "model_token", "model": moves, "token": "<c>"}},
        "<zero>": {"source": {"kind": "zero"}},
        "<c>": {"source": {"kind": "model_token", "model": base, "token_id": 7}, "force": True},
        "<a>": {"source": {"kind": "model_token", "model": base, "token": "w1"}},
        "w2": {"source": appends, "force": True},
        "w3": {"source": base},
    }


def test_tokens_that_are_chosen_one_by_one(models: list[Path], tmp_path: Path) -> None:
    base, appends, moves = models
    policy = {"source": "base", "tokens": choices(models)}
    merge = open_merge("task_arithmetic", base, [appends, moves], parameters={"weight": 0.5}, tokenizer=policy)
    found = rows(merge, tmp_path / "out")
    assert found.keys() == {*SPECIAL, *WORDS, "<new>", "<zero>", "<c>", "<a>"}
    assert (found["<new>"], found["<zero>"]) == pytest.approx((value("<c>", moves), 0), rel=1e-5)
    assert (found["<c>"], found["w2"]) == pytest.approx((value("w4", base), value("w2", appends)), rel=1e-5)
    assert found["<a>"] == pytest.approx((value("<a>", appends) + value("w1", base)) / 2, rel=1e-5)
    assert found["w3"] == pytest.approx((value("w3", appends) + value("w3", moves)) / 2, rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w3 <new> w4")["input_ids"] == [6, tokenizer.convert_tokens_to_ids("<new>"), 7]
    for source, told in (("nobody", "expected one of the models"), (str(base), "has no row of the token '<q>'")):
        with pytest.raises(InputError, match=rf"tokenizer.tokens.<q>.source: .*{told}"):
            open_merge("ties", base, [appends], tokenizer={"tokens": {"<q>": {"source": source}}})


def test_a_tokenizer_larger_than_its_embeddings(family: Family, tmp_path: Path) -> None:
    """<a> was added to the expert's tokenizer alone: it is no token of the expert."""
    base = with_vocabulary(family.base, tmp_path / "base", WORDS, [])
    expert = with_vocabulary(family.base, tmp_path / "expert", WORDS, ["<a>"], rows=63)
    plain = open_merge("ties", base, [expert])
    union = open_merge("ties", base, [expert], tokenizer_source="union")
    assert union.digest == plain.digest and union.layout == plain.layout


def test_the_digest_tells_the_policies_apart_where_they_differ(
    models: list[Path], family: Family, tmp_path: Path
) -> None:
    base, *experts = models
    policies = ["base", "union", *map(str, experts)]
    digests = {open_merge("ties", base, experts, tokenizer_source=policy).digest for policy in policies}
    assert len(digests) == 4
    assert open_merge("ties", base, experts[::-1], tokenizer_source="union").digest in digests
    same = [open_merge("ties", family.base, family.experts, **p) for p in ({}, {"tokenizer_source": "union"})]
    assert same[0].digest == same[1].digest and type(same[1].base) is type(same[0].base)


def test_one_whole_expert_with_its_own_tokenizer_comes_out_byte_by_byte(models: list[Path], tmp_path: Path) -> None:
    base, _, moves = models
    merge = open_merge("ties", base, [moves], tokenizer_source=str(moves))
    for name, tensor in load_file(moves / "model.safetensors").items():
        if name in merge.layout:
            assert bits(merge.tensor(name)) == bits(tensor), name


def test_dtypes_may_differ_between_the_models(models: list[Path], tmp_path: Path) -> None:
    base, appends, _ = models
    half = rewrite(base, tmp_path / "base", lambda _, tensor: tensor.to(torch.bfloat16))
    found = rows(open_merge("ties", half, [appends], tokenizer_source="union", out_dtype="float32"), tmp_path / "out")
    assert found["<a>"] == value("<a>", appends)  # not rounded to the base's dtype
    merge = open_merge("ties", half, [appends], tokenizer_source="union", exclude=["embed_tokens"])
    assert merge.tensor(EMBED).dtype == torch.bfloat16


def test_without_a_policy_other_sizes_and_other_ids_are_refused(models: list[Path], home: Path) -> None:
    base, appends, moves = models
    with pytest.raises(
        InputError, match=r"appends: '.*' has shape \[65, 16\].*tokenizer_source.*\n.*moves: '.*' has shape \[64"
    ):
        open_merge("ties", base, [appends, moves])
    data = {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(appends)}]}
    for policy, fits in (({}, False), ({"tokenizer_source": "union"}, True)):
        recipe = parse(data | policy)
        sources = pipeline.pin_all(recipe)
        if fits:
            pipeline.preflight(recipe, *sources)
        else:
            with pytest.raises(
                InputError, match=r"has shape \[65, 16\], in the base it is \[63, 16\].*tokenizer_source"
            ):
                pipeline.preflight(recipe, *sources)


def test_what_cannot_be_matched_is_refused(models: list[Path], tmp_path: Path) -> None:
    base, appends, _ = models
    expert = rewrite(appends, tmp_path / "slow", lambda _, tensor: tensor)
    (expert / "tokenizer.json").rename(expert / "tokenizer.model")
    with pytest.raises(InputError, match=r"slow: its tokenizer has no tokenizer.json .*save it as a fast one"):
        open_merge("ties", base, [expert], tokenizer_source="union")
    bare = rewrite(base, tmp_path / "bare", lambda _, tensor: tensor)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"bare: no tokenizer.json; the models' embeddings cannot be matched"):
        open_merge("ties", bare, [appends], tokenizer_source="union")
    (expert / "tokenizer.model").rename(expert / "tokenizer.json")
    (expert / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(InputError, match=r"tokenizer.json: no tokenizer: .*download it again"):
        open_merge("ties", base, [expert], tokenizer_source="union")


@pytest.mark.parametrize("policy", ["base", "union"])
def test_an_untied_head_that_equals_the_embedding_is_matched_with_it(
    family: Family, tmp_path: Path, policy: str
) -> None:
    base = with_vocabulary(family.base, tmp_path / "base", WORDS, [])
    expert = with_vocabulary(family.base, tmp_path / "expert", WORDS[::-1], ["<a>"])
    tensors = load_file(expert / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBED].clone()}, expert / "model.safetensors", metadata={"format": "pt"})
    edit_json(expert / "config.json", tie_word_embeddings=False)
    half: dict[str, Any] = {"parameters": {"weight": 0.5}, "tokenizer_source": policy}
    found = rows(open_merge("task_arithmetic", base, [expert], **half), tmp_path / "out")
    assert found["w5"] == pytest.approx((value("w5", base) + value("w5", expert)) / 2)
    save_file({**tensors, HEAD: tensors[EMBED] + 1}, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"'{HEAD}' is a weight of its own, in the base it is tied"):
        open_merge("task_arithmetic", base, [expert], **half)


@pytest.mark.parametrize("head", [False, True])
def test_rows_that_are_not_known_by_name_are_not_taken_for_matched(tmp_path: Path, head: bool) -> None:
    """An embedding as Mamba names it: rows of other tokens were averaged; and the head alone was moved."""

    def renamed(folder: Path, words: list[str]) -> Path:
        write_tensors(
            folder, {"backbone.embeddings.weight": torch.ones(63, 4)} | ({HEAD: torch.ones(63, 4)} if head else {})
        )
        write_tokenizer(folder, words)
        return folder

    base, moved = renamed(tmp_path / "base", WORDS), renamed(tmp_path / "moved", WORDS[::-1])
    with pytest.raises(InputError, match=r"base: its rows cannot be matched by token: expected an embedding named "):
        open_merge("task_arithmetic", base, [moved], tokenizer_source="base")
    alike = renamed(tmp_path / "alike", WORDS)
    edit_json(alike / "tokenizer.json", version="1")  # other bytes, the same vocabulary
    open_merge("task_arithmetic", base, [alike], tokenizer_source="base")


def test_tokens_and_padding_are_not_left_out_for_want_of_a_tokenizer(family: Family, tmp_path: Path) -> None:
    models = [rewrite(family.base, tmp_path / name, lambda _, tensor: tensor) for name in ("base", "expert")]
    for model in models:
        (model / "tokenizer.json").unlink()
    open_merge("ties", models[0], models[1:], tokenizer={"source": "base"})
    for asked in ({"pad_to_multiple_of": 48}, {"tokens": {"w1": {"source": {"kind": "zero"}, "force": True}}}):
        with pytest.raises(InputError, match=r"base: no tokenizer.json; the models' embeddings cannot be matched"):
            open_merge("ties", models[0], models[1:], tokenizer={"source": "base", **asked})


@pytest.mark.parametrize("number", [-1, 10**11])
def test_an_id_that_no_embedding_has(tmp_path: Path, number: int) -> None:
    """It took memory for as many rows."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": number}}}))
    with pytest.raises(InputError, match=f"no tokenizer: .*the token 'a' has the id {number}.*download it again"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("text", ['"x"', '{"added_tokens_decoder": [1]}'])
def test_a_tokenizer_config_of_another_form_is_copied_as_it_is(text: str, tmp_path: Path) -> None:
    """It ended the merge in a traceback, when all tensors were written."""
    written = {"config.json": "{}", "tokenizer.json": '{"added_tokens": null}', "tokenizer_config.json": text}
    for name, content in written.items():
        (tmp_path / name).write_text(content)
    Target({"<a>": 0}, 1, 1, [plain_entry("<a>", 0)]).finish(tmp_path, {})
    assert read_vocabulary(tmp_path) == {"<a>": 0}
    assert (tmp_path / "tokenizer_config.json").read_text() == text


@pytest.mark.parametrize("text", ["{}", '{"model": {"vocab": {}}, "added_tokens": []}'])
def test_a_tokenizer_without_a_token(text: str, tmp_path: Path) -> None:
    """With `union`, the rows of an expert that has it were all taken for lacking, and the base's merged instead."""
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"no tokenizer: .*it holds no token.*download it again"):
        read_vocabulary(tmp_path)


class TestAdapters:
    """LoRA experts that brought tokens of their own: PEFT saves their embeddings whole, the tied head too."""

    @pytest.fixture
    def adapter(self, family: Family, tmp_path: Path) -> Path:
        from peft import LoraConfig, get_peft_model

        model = AutoModelForCausalLM.from_pretrained(family.base)
        model.resize_token_embeddings(66, mean_resizing=False)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        write_tokenizer(tmp_path / "adapter", [*WORDS, "x1", "x2", "x3"])
        return tmp_path / "adapter"

    def test_they_merge_by_token(self, family: Family, adapter: Path, tmp_path: Path) -> None:
        own = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
        with pytest.raises(
            InputError, match=r"adapter: .* has shape \[66, 16\], in the base it is \[64, 16\]; to match"
        ):
            open_merge("ties", family.base, [adapter])
        merge = open_merge("ties", family.base, [adapter, family.math], tokenizer_source=str(adapter))
        merge.run(tmp_path / "out")
        tokenizer, merged = AutoTokenizer.from_pretrained(tmp_path / "out"), merge.tensor(EMBED)
        assert tokenizer("w59 x3")["input_ids"] == [62, 65] and len(merged) == 66
        assert bits(merged[63:]) == bits(own[63:])
        assert (tmp_path / "out" / "generation_config.json").exists()
        assert bits(open_merge("ties", family.base, [adapter], tokenizer_source="base").tensor(EMBED)[:63]) == bits(
            own[:63]
        )

    def test_importance_is_measured_as_ever(self, family: Family, adapter: Path) -> None:
        from lewis.importance.calibration import Calibration
        from lewis.models.lora.expert import LoraExpert
        from tests.support.measuring import measure

        found = measure(LoraExpert(Checkpoint(family.base, "b"), adapter, "b+a"), Calibration("c", ((3, 5, 62),)))
        assert all(norm is not None and norm > 0 for norm in found.norms.values())

    def test_they_are_scored_with_their_own_tokenizer(
        self, family: Family, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        monkeypatch.setattr(lm_eval.process, "run", lambda request, **_: seen.append(request["model_args"]))
        for each in (adapter, family.lora):
            with pytest.raises(TypeError):  # there is nothing that lm-eval said
                lm_eval.evaluate(family.base, EvalSettings((), family.base), adapter=each)
        assert [Path(arguments["tokenizer"]) for arguments in seen] == [adapter, family.base]

    def test_a_head_that_is_not_the_embeddings_is_refused(self, family: Family, adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"base_model.model.lm_head.weight": tensors["base_model.model.lm_head.weight"] + 1}, path)
        with pytest.raises(
            InputError, match=r"lm_head.weight' differ, and the base has 'model.embed_tokens.weight' for both"
        ):
            open_merge("ties", family.base, [adapter], tokenizer_source="base")


def test_a_guided_merge_of_moved_ids_is_refused(models: list[Path], home: Path) -> None:
    base, _, moves = models
    data = {
        "merge_method": "ties", "base_model": str(base), "models": [{"model": str(moves)}], "tokenizer_source": "base",
        "lewis": {"calibrations": {"c": {"texts": ["w1 w2"]}}},
    }  # fmt: skip
    recipe = parse(data)
    files = [pipeline.download(source) for source in (pipeline.pin_all(recipe)[0], *pipeline.pin_all(recipe)[1])]
    with pytest.raises(InputError, match="the token 'w0' is 61, in the base it is 3; calibration rows become the"):
        pipeline.prepare_merge(recipe, files[0], files[1:])


@pytest.mark.skipif(not MERGEKIT, reason="LEWIS_MERGEKIT names no python that has mergekit")
@pytest.mark.parametrize("source", ["base", "union", "appends", "moves", "tokens"])
@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.timeout(300)
def test_equals_mergekit(models: list[Path], tmp_path: Path, source: str, method: str) -> None:
    if (method, source) == ("linear", "base"):
        pytest.skip("without a base, mergekit takes any model's tokenizer")
    weights = (0.7, 0.4)
    policy: dict[str, Any] = {"tokenizer_source": source}
    if source == "tokens":
        if method == "linear":
            pytest.skip("a source must be one of the models; the base is none here")
        policy = {"tokenizer": {"source": "union", "tokens": choices(models), "pad_to_multiple_of": 8}}
    elif source not in ("base", "union"):
        policy = {"tokenizer_source": str(folder_of(models, source))}
    data = {
        "merge_method": method, "dtype": "float32", **policy,
        "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models[1:], weights, strict=True)],
    }  # fmt: skip
    if method == "ties":
        data |= {"base_model": str(models[0])}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    command = [str(Path(str(MERGEKIT)).parent / "mergekit-yaml"), str(tmp_path / "c.yaml"), str(tmp_path / "theirs")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    own = [{"weight": weight} for weight in weights]
    open_merge(method, models[0] if method == "ties" else None, models[1:], own=own, **policy, dtype="float32").run(
        tmp_path / "ours"
    )
    loaded = [load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")]
    ids = [AutoTokenizer.from_pretrained(tmp_path / who).get_vocab() for who in ("ours", "theirs")]
    assert ids[0].keys() == ids[1].keys()
    assert loaded[0].keys() == loaded[1].keys() - ({HEAD} if HEAD not in loaded[0] else set())
    for name, ours in loaded[0].items():
        theirs = loaded[1][name]
        if name in (EMBED, HEAD):
            order = [[vocabulary[token] for token in sorted(vocabulary)] for vocabulary in ids]
            assert ours.shape == theirs.shape
            ours, theirs = ours[order[0]], theirs[order[1]]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_large_embedding_is_not_whole_in_memory(home: Path, tmp_path: Path) -> None:
    rows = torch.arange(1 << 18).reshape(-1, 1).expand(-1, 64).to(torch.float32).contiguous()  # 67 MB
    model = Checkpoint(write_tensors(tmp_path / "m", {EMBED: rows}), "key")
    moved = np.arange(len(rows))[::-1].copy()
    moved[5] = -1
    target = Target({}, len(rows), len(rows), [])
    aligned = Aligned(model, [EMBED], moved, Lenders([model], {5: ((0, 7),)}), target)
    before = anonymous_bytes()
    with PeakMemory() as memory:
        dtype, bits = aligned.raw(EMBED)
    assert memory.peak - before < 40e6
    found = torch.from_numpy(bits.copy()).view(torch.float32).reshape(-1, 64)[:, 0]
    assert dtype == "F32" and found[5] == 7 and torch.equal(found[6:], rows[:-6, 0].flip(0))
    assert aligned.raw(EMBED)[1] is bits and list(home.iterdir()) == []
    aligned.done_with(EMBED)
    assert aligned.raw(EMBED)[1] is not bits
    # Rows that only end earlier are the file's own.
    shorter = Aligned(model, [EMBED], np.arange(100), Lenders([model], {}), Target({}, 100, 100, []))
    assert np.shares_memory(shorter.raw(EMBED)[1], model.raw(EMBED)[1])
