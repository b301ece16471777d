"""What `lewis.rehearsal.network` says of a config is what happens: the model loads whole, and its logits are finite.

Configs of tiny models of all architectures are changed by seed. The oracle is the whole road, with the real weights:
`from_pretrained` of the folder finds every weight, and a text gives finite logits.
"""

import copy
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from lewis.models.files.safetensors_file import file_headers
from lewis.rehearsal.blame import blamed
from lewis.rehearsal.network import Network
from lewis.rehearsal.question import DoubtError
from tests.faults.fuzz import DRAWS, limited
from tests.support.tiny_architectures import architectures, tiny

KINDS = ["llama", "gpt2", "t5", "lfm2", "mixtral", "gemma3", "qwen3_vl_moe", "t5gemma", "zamba2", "mamba2"]
LIMITS = re.compile(
    "MemoryError|TimeoutError|(can't|cannot) allocate memory|not enough memory|bad_alloc", re.IGNORECASE
)
"""In the words of what has taken too much, or too long: the child's limits end that, not ours here."""
TOKENS = torch.tensor([[3, 4, 5, 6]])
AUTO = (
    (transformers.AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (transformers.AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
)


@lru_cache(maxsize=32)
def saved(kind: str, place: Path) -> Path | None:
    """The folder of a tiny model that transformers loads and runs on text alone; None if there is none."""
    folder = place / kind
    try:
        tiny(kind).save_pretrained(folder)
        return folder if loads(folder, kind) == "" else None
    except Exception:
        return None


def loads(folder: Path, kind: str) -> str:
    """Why a model does not load whole, or gives no finite logits; empty if it does."""
    auto = next(auto for auto, names in AUTO if names.get(kind) is not None)
    try:
        network, found = auto.from_pretrained(folder, output_loading_info=True)
        for key in ("missing_keys", "mismatched_keys"):
            if found[key]:
                return f"{key}: {sorted(found[key])[0]}"
        if extra := [name for name in found["unexpected_keys"] if any(part.isdigit() for part in name.split("."))]:
            return f"unexpected: {extra[0]}"
        inputs = {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if network.config.is_encoder_decoder else {})
        with torch.no_grad():
            logits = network.eval()(**inputs).logits
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if bool(torch.isfinite(logits).all()) else "its logits are not finite"


def said(folder: Path, config: dict[str, Any]) -> str | None:
    """What the rehearsal says: empty if it accepts.

    None: transformers has no class for the config, or a text fails in the network and no key is to blame, so that our
    way of asking may have failed; then it accepts, too.
    """
    question = Network.of("model", folder, config, file_headers(folder / "model.safetensors"))
    try:
        return None if question.ask()["class"] is None else ""
    except DoubtError as error:
        return blamed(question, error.failure)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def changed(config: dict[str, Any], others: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    """A config with one change by chance, and a description of it."""
    config = copy.deepcopy(config)
    block = draw.choice([config, *(each for each in config.values() if isinstance(each, dict) and each)])
    key, other = draw.choice(sorted(block)), draw.choice(sorted(block))
    value = block[key]
    match draw.randrange(9):
        case 0:
            block[key] = draw.choice([str(value), [value], {"a": value}, None, not value, 1.5, math.nan, math.inf])
        case 1:
            block[key] = draw.choice([0, -1, 1, 2, 3, 7, 64, 4096, 0.0, -1.0, 1e-9, 1e9])
        case 2 if isinstance(value, int | float):
            block[key] = draw.choice([-value, value * 2, value // 2, value + 1, value - 1, float(value)])
        case 3:
            del block[key]
        case 4:
            block[key] = copy.deepcopy(block[other])
        case 5:
            block[key], block[other] = block[other], block[key]
        case 6:
            foreign = draw.choice(sorted(others))
            block[foreign] = copy.deepcopy(others[foreign])
            key = foreign
        case 7:
            ropes = [{"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}, {"type": "x"}, 3]
            key, block[key] = "rope_parameters", draw.choice([*ropes, {"rope_type": "default", "rope_theta": -1.0}])
        case _:
            block[key] = draw.choice(["x", "", "silu", "float16", "float99", "eager", [], [0], ["full_attention"], {}])
    return config, f"{key}: {value!r} -> {block.get(key, 'left out')!r} ({other})"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("networks")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", architectures() if DRAWS > 1000 else KINDS)
def test_accepted_is_what_loads(kind: str, place: Path) -> None:
    if (folder := saved(kind, place)) is None:
        pytest.skip("transformers has no tiny one that runs on text")
    kinds = architectures() if DRAWS > 1000 else KINDS
    config = json.loads((folder / "config.json").read_text())
    assert not said(folder, config)
    foreign, differences = tiny("llama" if kind != "llama" else "gpt2").config.to_dict(), []
    for seed in range(math.ceil(DRAWS / len(kinds))):
        draw = random.Random(f"{kind} {seed}")
        odd, what = changed(config, foreign, draw)
        (folder / "config.json").write_text(json.dumps(odd))
        with limited():
            ours = said(folder, odd)
        with limited():
            theirs = loads(folder, kind) if ours is not None else ""
        if bool(ours) != bool(theirs) and not LIMITS.search(f"{ours} {theirs}"):
            differences.append(f"{kind} {seed}: {what}: ours: {ours or 'accepted'}; theirs: {theirs or 'loads'}")
    assert not differences, "\n".join(differences)
