"""The DAG on the real SmolLM2-135M-Instruct with its real experts, data and tasks; skipped where they are absent."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import REPO, Command

SHARED = REPO.parent / "shared"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's folder with models and data laid out as its first lines say."""
    if not (SHARED / "real" / "make_base.py").is_file():
        pytest.skip("the real models and data are not in ../shared")
    folder = tmp_path_factory.mktemp("real") / "recipes"
    shutil.copytree(REPO / "deployments" / "recipes", folder, ignore=shutil.ignore_patterns("models", "data"))
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
    fewer = ("--set", "evaluate.baselines=[base]", *(
        part for name in ("gsm8k", "mbpp") for part in ("--set", f"lewis.calibrations.{name}.samples=16")
    ))  # fmt: skip
    process = lewis("run", real / "smollm2.yaml", "--json", *fewer)
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, err[-3000:]
    found = json.loads(out)
    base, merged = ({k: v for k, v in row.items() if k != "model"} for row in found["scores"])
    assert [row["model"] for row in found["scores"]] == ["base", "lewis"] and len(base) == 2
    for task, cell in base.items():  # bits per byte of the reference answers: lower is better
        assert float(merged[task].split()[0]) < float(cell.split()[0]) - 0.05, task
    assert found["version"] == "models:/smollm2-lewis/1" and found["promoted"]
    assert all(0.3 < mean < 0.5 for mean in found["mean_density"].values())
