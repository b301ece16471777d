"""Parity with mergekit 0.1.5 on whole checkpoints: tied and untied, sharded or not, of mixed dtypes and odd shapes.

Each deterministic method is drawn LEWIS_PARITY_DRAWS times (20): parameters are numbers, lists with filters, or
gradients over the layers. `test_parity` compares tensor by tensor, and tells by intention where we differ.
"""

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lewis.merging.settings import Expert
from lewis.merging.step import prepare
from lewis.methods import METHODS
from lewis.models.checkpoint import Checkpoint
from tests.lewis.whole.test_parity import DEFECTS, DRAWS, MERGEKIT, METHODS_DRAWN, Draw, condition, near_threshold
from tests.support.models import parse, shard, write_tensors

pytestmark = [
    pytest.mark.skipif(not MERGEKIT, reason="LEWIS_MERGEKIT names no python that has mergekit"),
    pytest.mark.timeout(3600),
]
HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 5, 7, 3, 11, 3
SHAPES = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
for _layer in range(LAYERS):
    _at = f"model.layers.{_layer}"
    SHAPES |= {f"{_at}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    SHAPES |= {f"{_at}.self_attn.{part}_proj.weight": (KEYS, HIDDEN) for part in "qkv"}
    SHAPES |= {f"{_at}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("up", "gate")}
    SHAPES |= {f"{_at}.self_attn.o_proj.weight": (HIDDEN, KEYS), f"{_at}.mlp.down_proj.weight": (HIDDEN, INNER)}
CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS},
    **{
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 1,
        "head_dim": KEYS,
    },
}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], rng: random.Random, tied: bool) -> None:
    """In a dtype of its own, whole or in shards; a tied one without its head."""
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    own = {name: tensor.to(dtype) for name, tensor in tensors.items() if not (tied and "lm_head" in name)}
    write_tensors(folder, own, **CONFIG, tie_word_embeddings=tied)
    if rng.random() < 0.4:
        shard(folder, folder.with_name("shards"), parts=rng.randint(2, 4))
        shutil.rmtree(folder)
        folder.with_name("shards").rename(folder)


def spread(rng: random.Random, value: Any) -> Any:
    """A number as it is, as what all tensors but some have, or as one end of a gradient."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    other = round(value * rng.uniform(0.5, 1), 3) or value
    return rng.choice(
        [value, value, [{"filter": "mlp", "value": other}, {"value": value}], [value, other], [other, other, value]]
    )


def draw(method: str, number: int, place: Path) -> Path:
    """The `number`-th draw of a method, always the same: a folder with models and a recipe."""
    rng = random.Random(f"{method} {number}")
    folder, generator = place / f"{method}-{number}", torch.Generator().manual_seed(rng.getrandbits(40))
    (low, high), with_base, parameters = METHODS_DRAWN[method]
    count, scale = rng.randint(low, high), rng.choice([1e-3, 0.1, 1.0])
    shapes, tied = SHAPES | {"lm_head.weight": SHAPES["model.embed_tokens.weight"]}, rng.random() < 0.5
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write_model(folder / "base", base, rng, tied)
    for i in range(count):
        own = {name: t + scale * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        write_model(folder / f"m{i}", own, rng, tied or (i > 0 and rng.random() < 0.2))
    values, known = parameters(rng, count), METHODS[method].parameters
    each = {key: [spread(rng, v) for v in value] for key, value in values.items() if known[key].per_expert}
    data: Draw = {
        "merge_method": method,
        "dtype": "float32",
        "models": [
            {"model": str(folder / f"m{i}"), "parameters": {key: value[i] for key, value in each.items()}}
            for i in range(count)
        ],
        "parameters": {key: value for key, value in values.items() if key not in each},
    }
    if rng.random() < 0.5 if with_base is None else with_base:
        data["base_model"] = str(folder / "base")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[Path]]:
    """method -> folders, each merged by mergekit; of the methods that are tested."""
    place = tmp_path_factory.mktemp("draws")
    chosen = [method for method in METHODS_DRAWN if any(f"[{method}]" in item.nodeid for item in request.session.items)]
    found = {method: [draw(method, number, place) for number in range(DRAWS)] for method in chosen}
    command = [str(MERGEKIT), str(Path(__file__).parents[2] / "support" / "mergekit_oracle.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, input=f"{place}\n", text=True, check=True, capture_output=True, env=environment)
    return found


def tied_at_the_cut(tensors: Draw) -> bool:
    """Whether what is kept hangs on the order of equal scores, which mergekit leaves to an unstable sort."""
    values = tensors["parameters"]
    scores, cuts = [], []
    if values.get("select_topk", 1) < 1:
        moved = torch.stack([expert.float() - tensors["base"].float() for expert in tensors["experts"]])
        scores = [moved.var(dim=0, correction=0).reshape(-1)]
        cuts = [[int(int(torch.count_nonzero(scores[0])) * values["select_topk"])]]
    for i, density in enumerate(values.get("density", ())):
        scores.append((tensors["experts"][i].float() - tensors["base"].float()).abs().reshape(-1))
        size = len(scores[-1])
        kept = int(density * size)
        first = min(int(values.get("gamma", [0] * (i + 1))[i] * size), size - kept)
        cuts.append([first, first + kept])
    for score, places in zip(scores, cuts, strict=True):
        ordered = score.sort(descending=True).values
        for cut in places:
            if 0 < cut < len(ordered) and bool(torch.isclose(ordered[cut - 1], ordered[cut], rtol=1e-6, atol=0)):
                return True
    return False


@pytest.mark.parametrize("method", METHODS_DRAWN)
def test_equals_mergekit(method: str, drawn: dict[str, list[Path]]) -> None:
    compared = skipped = 0
    for folder in drawn[method]:
        recipe = parse(yaml.safe_load((folder / "recipe.yaml").read_text()))
        base = Checkpoint(folder / "base", "base") if recipe.base_model else None
        experts = [Expert(entry.model, Checkpoint(Path(entry.model), entry.model)) for entry in recipe.experts]
        merge = prepare(recipe, base, experts)
        merge.run(folder / "ours")
        ours = load_file(folder / "ours" / "model.safetensors")
        error = folder / "error.txt"
        if error.exists():
            assert method == "multislerp", error.read_text()  # stops where no expert changed a tensor
            continue
        theirs = load_file(folder / "theirs" / "model.safetensors")
        assert ours.keys() == theirs.keys() - merge.base.tied.keys()
        for name, mine in ours.items():
            inputs = [merge.base.read(name), *(expert.model.read(name) for expert in merge.experts)]
            tensors = {"method": method, "base": inputs[0] if base else None, "experts": inputs[1:]}
            tensors["parameters"] = merge.parameters(name)
            if tied_at_the_cut(tensors) or (method in DEFECTS and DEFECTS[method][1](tensors)):
                skipped += 1
                continue
            if method == "arcee_fusion":
                mine = torch.where(near_threshold(tensors), theirs[name], mine)
            atol = 1e-6 * max(float(t.abs().max()) for t in (theirs[name], *inputs)) * condition(tensors)
            told = f"{folder.name} {name} {tensors['parameters']}"
            torch.testing.assert_close(
                mine, theirs[name], rtol=1e-6, atol=atol, msg=lambda m, told=told: f"{m}\n{told}"
            )
            compared += 1
    assert compared > skipped / 2, (compared, skipped)
