"""Progress from lm-eval's output; children are tested with the evaluations."""

from lewis.evaluation.harness.process import _Output

BAR = "\rRunning loglikelihood requests: {:3d}%|{:<10}| {}/{} [00:05<00:20,  8.53it/s]"


def seen(*lines: str) -> tuple[list[tuple[str, int, int]], str]:
    found: list[tuple[str, int, int]] = []
    output = _Output(lambda what, done, total: found.append((what, done, total)))
    text = "".join(lines).encode() + b"\n"
    for start in range(0, len(text), 7):  # it comes in pieces
        output.feed(text[start : start + 7])
    return found, output.tail()


def test_bars_become_progress_and_other_lines_are_kept() -> None:
    bars = [BAR.format(percent, "#", percent // 5, 20) for percent in (0, 0, 50, 100)]
    found, tail = seen("loading\n", "\r100%|##########| 10/10 [00:00<00:00, 99it/s]", *bars, "\nthe end")
    assert found == [("loglikelihood requests", done, 20) for done in (0, 10, 20)]
    assert tail == "loading\nthe end"


def test_the_bars_of_rolling_batches_tell_no_progress() -> None:
    batch = [BAR.format(percent, "#", percent * 16 // 100, 16) for percent in (0, 100)]
    found, _ = seen("\r100%|##########| 1500/1500 [00:00<00:00, 20956.15it/s]", *batch, *batch)
    assert found == []
