"""What a merge is said to take, against what it takes."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lewis import store
from lewis.memory import anonymous_bytes
from lewis.merging import forecast as module
from lewis.merging.forecast import forecast, without_models
from lewis.merging.run import Merge
from lewis.methods import METHODS
from tests.support.models import open_merge, write_tensors
from tests.support.warm import WarmPython

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def merge_of(tmp_path: Path) -> Callable[..., Merge]:
    """Opens a merge of a base and two experts, all with tensors of these numbers of elements."""

    def opened(method: str, *sizes: int) -> Merge:
        folders = []
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            tensors = {f"t{i}": torch.randn(n, generator=generator).bfloat16() for i, n in enumerate(sizes)}
            folders.append(write_tensors(tmp_path / str(number), tensors))
        return open_merge(method, folders[0], folders[1:])

    return opened


def test_time_grows_with_the_elements(merge_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = merge_of("ties", *[1 << 12] * 40)
    done: list[int] = []

    def write(self: Merge, name: str, *_: Any) -> None:
        done.append(self.base.tensors[name].elements)

    monkeypatch.setattr(Merge, "_write", write)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 2e-6 * sum(done)))  # a clock of elements
    for name, value in {"_WARM_UP": 1 << 12, "_FIRST": 1 << 13, "_ENOUGH": 0.03}.items():
        monkeypatch.setattr(module, name, value)
    assert forecast(merge).seconds == pytest.approx(2e-6 * (merge.elements + (1 << 12)))
    # One to load what is needed, one to warm up, then 2 of 8 ms, which are not enough, and 8.
    assert len(done) == 1 + 1 + 2 + 8 and list(store.home().iterdir()) == []


# A method of somebody's that says nothing of rows: whole tensors.
WHOLE = """
import sys
from dataclasses import replace
from pathlib import Path
from lewis.memory import PeakMemory, anonymous_bytes
from lewis.merging.forecast import forecast
from lewis.methods import METHODS
from tests.support.models import open_merge

METHODS["whole"] = replace(METHODS["pcb"], name="whole", by_rows=None)
*models, out = map(Path, sys.argv[1:])
merge, before = open_merge("whole", models[0], models[1:]), anonymous_bytes()
found = forecast(merge)
with PeakMemory() as memory:
    merge.run(out)
print(found.memory - before, memory.peak - before)
"""


@pytest.mark.slow
@pytest.mark.long
def test_memory_of_whole_tensors_grows_with_the_largest(merge_of: Any, tmp_path: Path, warm: WarmPython) -> None:
    """In a process of its own, since the memory that earlier tests gave back is taken again unseen."""
    merge_of("ties", 3 << 20, *[1 << 19] * 3)
    folders = [str(tmp_path / name) for name in ("0", "1", "2", "out")]
    process = warm.run(WHOLE, folders, folder=Path.cwd(), environment=os.environ)
    said, needed = map(int, process.communicate()[0].split())
    assert needed > 30e6 and needed / 2 < said < needed * 2
    whole = replace(METHODS["pcb"], by_rows=None)
    assert without_models(whole, 1 << 22, 3) - without_models(whole, 1 << 20, 3) > 3 << 22


@pytest.mark.slow
def test_memory_of_a_lora_expert_grows_with_the_largest_tensor_that_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"large": torch.ones(64, 64)} | {f"{i}.weight": torch.ones(16, 16 * (i + 1)) for i in range(4)}
    base, adapter = write_tensors(tmp_path / "base", tensors), tmp_path / "adapter"
    adapter.mkdir()
    factors = {}
    for i in range(4):
        key = f"base_model.model.{i}.lora"
        factors |= {f"{key}_A.weight": torch.ones(2, 16 + 16 * i), f"{key}_B.weight": torch.ones(16, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": "[0-3]"}')
    merge = open_merge("ties", base, [adapter])
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(module, "anonymous_bytes", lambda: 1000)
    monkeypatch.setattr(module, "PeakMemory", lambda: nullcontext(SimpleNamespace(peak=1300)))
    monkeypatch.setattr(module, "_ENOUGH", 0)
    monkeypatch.setattr(module, "_FIRST", 16 * 16 * 4)  # the sample: one of 4 units, where two of 4 and 3 are merged
    assert forecast(merge).memory == 1000 + 300 * 7 / 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", pytest.param("ram", marks=pytest.mark.long)])
def test_memory_of_what_goes_by_chunks_or_rows_does_not(
    method: str, merge_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lewis.merging.engine.in_torch.PIECE", 1 << 18)
    forecast(merge_of(method, 10))  # what is loaded once
    before = anonymous_bytes()
    assert forecast(merge_of(method, 3 << 22)).memory - before < 110e6  # the three are 150 MB in fp32
    assert without_models(METHODS[method], 1 << 30, 3) == without_models(METHODS[method], 1 << 20, 3) < 600e6
