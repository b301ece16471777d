"""The bar of a merge, and the line at its end."""

import io
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from lewis.importance.calibration import Calibration
from lewis.memory import PeakMemory, anonymous_bytes
from lewis.merging.run import Merge
from lewis.merging.settings import Expert, resolve
from lewis.models.checkpoint import Checkpoint
from lewis_flows.cli import bars
from tests.conftest import Family
from tests.support.models import open_merge, parse


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_tells_tensors_rate_and_time_left(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = open_merge("ties", family.base, [family.math, family.code])
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    _, effort = bars.run_merge(merge, tmp_path / "out")
    count = len(merge.layout)
    assert f"{count}/{count} tensors" in terminal.getvalue() and "GB/s" in terminal.getvalue()
    assert "0:00:00" in terminal.getvalue()

    files = [folder / "model.safetensors" for folder in (family.base, family.math, family.code, tmp_path / "out")]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert effort.bytes == sum(path.stat().st_size for path in files) - headers
    assert effort.to_json() == {
        "seconds": effort.seconds, "gb_per_second": effort.bytes / 1e9 / effort.seconds, "peak_memory": effort.peak
    }  # fmt: skip


def test_a_fit_counts_as_steps_and_not_as_tensors(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, rows = (family.math, family.code), Calibration("sums", ((3, 4, 5), (6, 7)))
    models = [{"model": str(each)} for each in folders]
    block = {"calibrations": {"sums": {"texts": ["w1"], "samples": 1}}}
    recipe = parse({"merge_method": "regmean", "base_model": str(family.base), "models": models, "lewis": block})
    experts = [Expert(str(each), Checkpoint(each, each.name), calibration=rows) for each in folders]
    merge, terminal = Merge.of(resolve(recipe), Checkpoint(family.base, "base"), experts), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    begun: list[int] = []
    real = bars._begin
    monkeypatch.setattr(bars, "_begin", lambda *given, **named: begun.append(given[2]) or real(*given, **named))
    bars.run_merge(merge, tmp_path / "out")
    count = len(merge.layout)
    shown = {int(number) for number in re.findall(rf"(\d+)/{count} tensors", terminal.getvalue())}
    assert max(shown) == count and begun == [merge.steps]


def test_elsewhere_it_is_one_line_and_one_every_ten_seconds(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = open_merge("linear", None, [family.math, family.code], parameters={"weight": 1})
    bars.run_merge(merge, tmp_path / "out")
    assert capsys.readouterr().err == "merge ...\n"
    monkeypatch.setattr(bars, "PAUSE", 0)
    bars.run_merge(merge, tmp_path / "again")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + len(merge.layout) and lines[-1] == "merge: 100 %"
    with bars.progress() as report:
        report("measure", 1, 3)
    assert capsys.readouterr().err.splitlines() == ["measure ...", "measure: 33 %"]


def test_peak_memory_is_what_was_held_at_once() -> None:
    before = anonymous_bytes()
    with PeakMemory() as memory:
        held = torch.ones(50 * 2**20, dtype=torch.uint8)
        deadline = time.monotonic() + 60
        while memory.peak - before < 45e6 and time.monotonic() < deadline:
            time.sleep(0.02)
        del held
    assert 45e6 < memory.peak - before < 250e6
    assert anonymous_bytes(2**30) == 0
