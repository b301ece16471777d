"""What came of a merge in one word and one line, for lists of runs."""

from lewis.evaluation.gate import Verdict

MAX_LINE = 300  # characters


def verdict_line(version: str, verdict: Verdict, *, champion: str | None) -> tuple[str, str]:
    """The word and the line of a merge that was registered.

    Args:
        version: its `uri`.
        verdict: the gate's.
        champion: `uri` of the version that was in use before; None if there was none.

    Returns:
        `Promoted` and `v3: weighted/mean,none 0.981 vs 0.975`; `Rejected` and which rules failed; `AwaitingApproval`
        and what approves it; or `Completed`, if it is the champion already.
    """
    number = f"v{version.rpartition('/')[2]}"
    told = f"{number}: {verdict.numbers}" if verdict.numbers else number
    if not verdict.passed:
        failed = [reason.removesuffix(": fail") for reason in verdict.reasons if reason.endswith(": fail")]
        return "Rejected", _cut(f"{told}; {'; '.join(failed)}")
    if champion == version:
        return "Completed", f"{number} is the champion already"
    if verdict.waits:
        name = version.removeprefix("models:/")
        return "AwaitingApproval", _cut(f"{told}; passed, waits for: lewis approve {name} --why ...")
    before = f"in place of v{champion.rpartition('/')[2]}" if champion else "the first champion"
    return "Promoted", _cut(f"{told}; {before}")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 3]}..."
