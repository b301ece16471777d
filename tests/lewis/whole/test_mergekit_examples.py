"""Every example config of mergekit's repository, and the YAML of its docs: it runs, to the tensors that a plain
implementation of the formulae gives, or is refused in one sentence that says why.

The configs are written again on tiny models: their structure is mergekit's, models and numbers of layers are not. Those
that are refused: `tests/lewis/recipe/refused.txt`. Where LEWIS_MERGEKIT names a Python with mergekit, its
own results are compared with the formulae's, too.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from lewis.merging.run import Merge
from lewis.models.chat_template import template_in
from lewis.recipe.documents import load_documents
from lewis.recipe.recipe import Recipe
from lewis.recipe.tokenizer import FORMATS
from tests.support import pipeline
from tests.support.mergekit_formulae import CONFIG, SHAPES, expected
from tests.support.models import write_tensors, write_tokenizer

MERGEKIT = os.environ.get("LEWIS_MERGEKIT")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `a` to `d`; `e` and `f`, with tokenizers; and `gpt2`, which is named otherwise."""
    folder = tmp_path_factory.mktemp("examples")
    for seed, name in enumerate("abcdef"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        write_tensors(folder / name, tensors, **CONFIG, tie_word_embeddings=False)
    for name, token in (("e", "<|im_start|>"), ("f", "<|eot_id|>")):
        write_tokenizer(folder / name, [*(f"w{i}" for i in range(60)), token])
    GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=4, n_head=2, vocab_size=9)).save_pretrained(folder / "gpt2")
    return folder


def prepared(recipe: Recipe) -> Merge:
    base, experts = pipeline.fetch(recipe)
    return pipeline.prepare_merge(recipe, base, experts)


def merged(text: str, place: Path, out: Path) -> Path:
    """What all documents of a config give: the folder of the last."""
    file = place / f"{out.parent.name}.yaml"
    file.write_text(text)
    documents = load_documents(file, out)
    for each in documents:
        prepared(each.recipe).run(out / each.name)
    if documents:
        return out / documents[-1].name
    prepared(Recipe.load(file)).run(out)
    return out


GRADIENTS = """
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""
SLERP = f"""
slices:
  - sources:
      - {{model: a, layer_range: [0, 5]}}
      - {{model: b, layer_range: [0, 5]}}
merge_method: slerp
base_model: a
parameters: {GRADIENTS}
dtype: float32
"""
RUN = {
    "examples/bio-merge.yml": """
models:
  - {model: b, parameters: {density: 0.5, weight: 0.5}}
  - {model: c, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: a
parameters: {normalize: false, int8_mask: true}
dtype: float32
""",
    "examples/gradient-slerp.yml": SLERP,
    "examples/linear.yml": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
""",
    "examples/orcamini-platy-44layer.yml": """
slices:
  - sources:
      - {model: a, layer_range: [0, 3]}
  - sources:
      - {model: b, layer_range: [2, 5]}
merge_method: passthrough
dtype: float32
""",
    "examples/ties.yml": """
models:
  - {model: b, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: c, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
  - {model: d, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
merge_method: ties
base_model: a
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
}
MEGA = f"""{SLERP}
name: gradient-slerp
---
models:
  - {{model: gradient-slerp, parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}}}
  - {{model: d, parameters: {{density: 0.33, weight: [{{filter: mlp, value: 0.5}}, {{value: 0}}]}}}}
merge_method: ties
base_model: c
parameters: {{normalize: true, int8_mask: true}}
dtype: float32
name: gradient-slerp-ties
"""
MULTI = """
name: first-merge
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 0.5}
---
name: second-merge
merge_method: slerp
base_model: first-merge
models: [{model: c}]
parameters: {t: 0.5}
---
merge_method: dare_ties
base_model: a
models:
  - {model: second-merge, parameters: {density: 0.6, weight: 0.5}}
  - {model: d, parameters: {density: 0.8, weight: 0.5}}
"""


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("example", RUN)
def test_an_example_gives_what_its_formulae_say(example: str, place: Path, tmp_path: Path) -> None:
    found = load_file(merged(RUN[example], place, tmp_path / "out") / "model.safetensors")
    wanted = expected(yaml.safe_load(RUN[example]), place)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}\n{m}")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("example", ["examples/mega.yml", "docs/multimerge.md"])
def test_several_documents_use_each_others_outputs(example: str, place: Path, tmp_path: Path) -> None:
    text, out = {"examples/mega.yml": MEGA, "docs/multimerge.md": MULTI}[example], tmp_path / "out"
    last = merged(text, place, out)
    first, *rest = yaml.safe_load_all(text)
    made = expected(first, place)
    for name, tensor in load_file(out / first["name"] / "model.safetensors").items():
        torch.testing.assert_close(tensor, made[name], rtol=1e-5, atol=1e-6)
    assert (out / rest[0]["name"] / "model.safetensors").is_file()
    assert last.name == ("gradient-slerp-ties" if example == "examples/mega.yml" else "final")
    name = "model.layers.4.mlp.up_proj.weight"  # dare_ties draws what it drops: where all do, the base's stays
    base, found = (load_file(folder / "model.safetensors")[name] for folder in (place / "a", last))
    if example == "docs/multimerge.md":
        assert 0 < int((found == base).sum()) < base.numel()


@pytest.mark.usefixtures("home")
def test_other_architectures_run(place: Path, tmp_path: Path) -> None:
    """examples/arcee_fusion.yml, and gpt2-small.yml of an older branch."""
    text = "models: [{model: a}, {model: b}]\nmerge_method: arcee_fusion\nbase_model: a\n"
    found = load_file(merged(text, place, tmp_path / "fusion") / "model.safetensors")
    one, two = (load_file(place / name / "model.safetensors") for name in "ab")
    assert all(bool(((found[name] == one[name]) | (found[name] == two[name])).all()) for name in found)
    text = "slices: [{sources: [{model: gpt2, layer_range: [0, 3]}]}]\nmerge_method: passthrough\ndtype: float16\n"
    folder = merged(text, place, tmp_path / "gpt2")
    whole = load_file(place / "gpt2" / "model.safetensors")
    kept = {name: tensor.half() for name, tensor in whole.items() if ".h.3." not in name}
    found = load_file(folder / "model.safetensors")
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)
    assert yaml.safe_load((folder / "config.json").read_text())["n_layer"] == 3


TOKENIZERS = {  # of the README, next to a merge
    "union": ("tokenizer: {source: union, pad_to_multiple_of: null}", 65),
    "tokens": (
        "tokenizer:\n  source: union\n  tokens:\n    <|im_start|>: {source: e}\n"
        "    <|special|>: {source: {kind: zero}}\n"
        "    <|renamed|>: {source: {kind: model_token, model: f, token: <|eot_id|>}}\n"
        "    <|eot_id|>: {source: f, force: true}",
        67,
    ),
    "legacy": ("tokenizer_source: base", 65),
}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("what", TOKENIZERS)
def test_the_tokenizers_of_the_readme(what: str, place: Path, tmp_path: Path) -> None:
    block, rows = TOKENIZERS[what]
    text = f"models: [{{model: e}}, {{model: f}}]\nbase_model: e\nmerge_method: linear\n{block}\n"
    found = load_file(merged(text, place, tmp_path / "out") / "model.safetensors")["model.embed_tokens.weight"]
    assert len(found) == rows
    if what == "tokens":
        row = load_file(place / "f" / "model.safetensors")["model.embed_tokens.weight"][63]
        torch.testing.assert_close(found[64], row)  # the forced token, behind the base's 64


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("wanted", ["auto", *FORMATS])
def test_the_chat_templates_of_the_readme(wanted: str, place: Path, tmp_path: Path) -> None:
    text = f"models: [{{model: a}}, {{model: b}}]\nmerge_method: linear\nchat_template: {wanted}\n"
    recipe = Recipe.parse(text, root=place)
    assert prepared(recipe).chat_template == FORMATS.get(wanted)  # no model has one that `auto` could choose
    if wanted != "auto":
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
        drawn = ImmutableSandboxedEnvironment().from_string(FORMATS[wanted])
        shown = drawn.render(messages=chat, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
        assert shown.index("What?") < shown.index("That.") < len(shown.rstrip()) - 4
    assert template_in(place / "a") is None


@pytest.mark.skipif(not MERGEKIT, reason="LEWIS_MERGEKIT names no python that has mergekit")
def test_mergekit_gives_the_same(place: Path, tmp_path: Path) -> None:
    for number, (example, text) in enumerate(RUN.items()):
        data = yaml.safe_load(text.replace("model: a", f"model: {place}/a"))
        data = yaml.safe_load(yaml.safe_dump(_absolute(data, place)))
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "recipe.yaml").write_text(yaml.safe_dump(data))
        (tmp_path / str(number) / "example").write_text(example)
    command = [str(MERGEKIT), str(Path(__file__).parents[2] / "support" / "mergekit_oracle.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, input=f"{tmp_path}\n", text=True, check=True, capture_output=True, env=environment)
    for folder in sorted(tmp_path.iterdir()):
        example = (folder / "example").read_text()
        assert not (folder / "error.txt").exists(), (example, (folder / "error.txt").read_text())
        theirs = load_file(folder / "theirs" / "model.safetensors")
        wanted = expected(yaml.safe_load(RUN[example]), place)
        assert theirs.keys() == wanted.keys()
        for name, tensor in wanted.items():
            if example == "examples/ties.yml" and tensor.numel() < 10:
                continue  # of which the density 0.1 keeps none, and mergekit one: see `test_parity`
            torch.testing.assert_close(
                theirs[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, at=(example, name): f"{at}\n{m}"
            )


def _absolute(value: Any, place: Path, key: str = "") -> Any:
    if isinstance(value, dict):
        return {inner: _absolute(each, place, inner) for inner, each in value.items()}
    if isinstance(value, list):
        return [_absolute(each, place) for each in value]
    return str(place / value) if key in ("model", "base_model") else value
