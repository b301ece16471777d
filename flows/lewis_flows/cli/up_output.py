"""Select which output of the service's parts `lewis up` prints: a line for each event; with `--verbose` all lines."""

import json
import re
import time
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

_COLOURS = {"lewis": "bold", "prefect": "blue", "mlflow": "cyan", "worker": "green", "webhook": "magenta"}
_OURS = ("lewis", "webhook", "champion")  # parts that print a line only when something happened
_RECORD = re.compile(r"^(?:[\d:., /-]+\|? *)?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b[ :|]*(.*)")
# The nightly runs of the service itself say at ERROR why they fail.
_RUN = re.compile(r"^Flow run '(?!verify|retention)(.*)' - (Beginning flow run|Finished in state) ")
_FAILED = re.compile(r"^Flow run '.*' - Finished in state (Failed|Crashed|Rejected)\b")
_FAILED_AGAIN = re.compile(r"^Flow run '.*' - Engine execution exited with unexpected exception$")
# Errors that a worker logs while Prefect's server is down, and recovers from without help. Its websockets break first,
# before `lewis up` has seen that the server ended.
_SOCKET = re.compile(r"^prefect\.FlowRun\w+Observer - The \w+ websocket failed")
_AWAY = re.compile(
    r"^prefect\.events\.clients - Unable to connect|\bService 'EventsWorker' failed to process item\b"
    r"|^prefect\.runner\.state_proposer - Failed to update state"
    r"|^prefect\.runner\.flow_run_executor - Process exited with status code: 1\b"
    # If that run is cancelled later, the server has its worker end it, five minutes after that.
    r"|^prefect\.FlowRunCancellingObserver - Cancellation polling task failed"
    r"|^prefect\.runner\.executor_context - Cancellation observer failed"
)
_BACK = 120.0  # seconds that the server and its clients have to recover after the server ended
_TRACEBACK = re.compile(r"^\s*(\+ Exception Group )?Traceback \(most recent call last\)")
_LINK = re.compile(
    r"^(During handling of the above exception|The above exception was the direct cause)\b"
    r"|^\[SQL: |^\[parameters: |^\(Background on this error at: "  # what SQLAlchemy appends to its errors
)


class Output:
    """Printer for lines of the parts; it prints only the last line of a traceback, since the part's log has all of it.

    Attributes:
        verbose: whether every line is printed.
        as_json: whether a line is a JSON object with `time` (UTC), `part`, `level` and `line`.
    """

    def __init__(self, *, verbose: bool, as_json: bool) -> None:
        """Print to `sys.stdout` as it is at the time of this call."""
        self.verbose, self.as_json = verbose, as_json
        self._console = Console()
        self._shown: dict[str, bool] = {}
        self._tracing: dict[str, bool] = {}
        self._away = float("-inf")  # when Prefect got the signal to end
        self._failed: dict[str, bool] = {}  # whether the last event of a part was that a run failed

    def say(self, part: str, line: str) -> None:
        """Print a line of a part if it is an event; a line that is a JSON object keeps its keys."""
        told = _object(line)
        if told:
            line = f"{told['level']} | {told['line']}"
        if not (worth := self._is_worth_it(part, line)) and not self.verbose:
            return
        if self.as_json:
            found = _RECORD.match(line)
            level = found[1] if found else "INFO" if worth else "DEBUG"
            told = told or {"time": datetime.now(UTC).isoformat(), "level": level, "line": line}
            told = {"time": told.pop("time"), "part": part, **told}
            print(json.dumps(told, ensure_ascii=False), flush=True)
        else:
            name = Text(f"{part:<8}", _COLOURS.get(part, "magenta"))
            # Lines of other parts begin with a time already.
            line = f"{datetime.now():%H:%M:%S} {line}" if part == "lewis" else line
            self._console.print(name, Text.from_ansi(line), soft_wrap=True)

    def _is_worth_it(self, part: str, line: str) -> bool:
        """Whether a line is an event. Further lines of a record, such as a traceback, count as the record does."""
        self._tracing[part] = bool(_TRACEBACK.match(line) or (self._tracing.get(part) and line[:1].isspace()))
        if self._tracing[part] or _LINK.match(line):
            return False
        if part in _OURS:
            self._away = time.monotonic() if line.startswith("prefect ended ") else self._away
            return True
        if record := _RECORD.match(line):
            level, message = record.groups()
            event = level not in ("DEBUG", "INFO") or _RUN.match(message) is not None
            self._shown[part] = event and not self._is_known(part, message)
        return self._shown.get(part, False)

    def _is_known(self, part: str, message: str) -> bool:
        """Whether an earlier line reported this failure, or the part recovers from it without help."""
        told = self._failed.get(part) and _FAILED_AGAIN.match(message)
        self._failed[part] = _FAILED.match(message) is not None
        away = time.monotonic() - self._away < _BACK
        return bool(told or _SOCKET.match(message) or (away and _AWAY.search(message)))


def _object(line: str) -> dict[str, str]:
    """Parse a line that a part printed as JSON (`lewis_flows.json_logs`); empty for any other line."""
    try:
        found = json.loads(line) if line.startswith("{") else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"time", "level", "line"} <= found.keys() else {}
