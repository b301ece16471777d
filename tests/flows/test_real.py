"""The DAG on the real SmolLM2-135M-Instruct with its real experts, data and tasks; skipped where they are absent.

It takes minutes, so `make real` runs it, and `make test` leaves it out.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis.importance.calibration import calibrate
from lewis.models.checkpoint import Checkpoint
from lewis.recipe.recipe import Recipe
from tests.flows.conftest import REPO, Command
from tests.support import authors
from tests.support.measuring import measure

SHARED = REPO.parent / "shared"
LAYERS = 3

pytestmark = pytest.mark.skipif(not os.environ.get("LEWIS_REAL"), reason="make real")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's folder with models and data laid out as its first lines say."""
    if not (SHARED / "real" / "make_base.py").is_file():
        pytest.skip("the real models and data are not in ../shared")
    root = tmp_path_factory.mktemp("real")
    for name in ("recipes", "examples"):
        shutil.copytree(REPO / "deployments" / name, root / name, ignore=shutil.ignore_patterns("models", "data"))
    folder = root / "examples"
    (folder / "models").mkdir()
    base = Path(os.environ.get("LEWIS_REAL_BASE") or folder / "models" / "base")
    if not base.exists():
        command = [sys.executable, str(SHARED / "real" / "make_base.py"), str(base)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if made.returncode:
            pytest.skip(f"the real base cannot be made here: {made.stderr.strip().splitlines()[-1]}")
    elif base.parent != folder / "models":
        (folder / "models" / "base").symlink_to(base)
    for adapter in ("lora-math", "lora-code"):
        (folder / "models" / adapter).symlink_to(SHARED / "real" / adapter)
    (folder / "data").symlink_to(SHARED / "data")
    return folder


@pytest.mark.timeout(900)
def test_the_merge_predicts_both_kinds_of_answers_better_than_the_base(real: Path, lewis: Command) -> None:
    fewer = ["evaluate.baselines=[base]", "evaluate.limit=6"]
    fewer += [
        f"lewis.calibrations.{name}.{key}" for name in ("gsm8k", "mbpp") for key in ("samples=2", "max_tokens=128")
    ]
    process = lewis("run", real / "smollm2.yaml", "--json", *(part for each in fewer for part in ("--set", each)))
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, err[-3000:]
    found = json.loads(out)
    base, merged = ({k: v for k, v in row.items() if k != "model"} for row in found["scores"])
    assert [row["model"] for row in found["scores"]] == ["base", "merged"] and len(base) == 3
    for task, cell in base.items():  # bits per byte of both kinds of reference answers, and their mean: lower is better
        assert float(merged[task].split()[0]) < float(cell.split()[0]) - 0.05, task
    assert found["version"] == "models:/smollm2-lewis/1" and found["promoted"]


def test_official_norms_are_those_of_the_authors_procedure(real: Path, tmp_path: Path) -> None:
    """In the first layers of the real model, on real rows; `tests.benchmarks.importance --official` compares all."""
    base, shallow = real / "models" / "base", tmp_path / "shallow"
    shutil.copytree(base, shallow, ignore=shutil.ignore_patterns("*.safetensors"))
    inside = tuple(f"model.layers.{i}." for i in range(LAYERS))
    tensors = load_file(base / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers." not in name or name.startswith(inside)}
    save_file(kept, shallow / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))

    gsm8k = {"dataset": "json", "data_files": "data/gsm8k/train.jsonl", "text": "{question} {answer}", "samples": 3}
    block = {"preset": "lewis_official", "calibrations": {"gsm8k": gsm8k}}
    content = {"merge_method": "ties", "base_model": str(shallow), "models": [{"model": str(base)}], "lewis": block}
    recipe = Recipe.parse(yaml.safe_dump(content), root=real)
    assert recipe.lewis is not None
    set_ = calibrate("gsm8k", recipe.lewis.calibrations["gsm8k"], tokenizer=shallow, root=real)
    rows = real / "data" / "gsm8k" / "train.jsonl"
    samples = authors.samples(rows, AutoTokenizer.from_pretrained(shallow), count=3)
    assert [list(sample) for sample in set_.samples] == samples and {len(sample) for sample in samples} == {512}

    found = measure(Checkpoint(shallow, "key"), set_, recipe.lewis.importance).norms
    expected = authors.norms(AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32).eval(), samples)
    assert found.keys() == expected.keys() and len(found) == 7 * LAYERS
    for name, norm in expected.items():
        assert found[name] == pytest.approx(norm, rel=1e-5), name
