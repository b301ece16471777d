"""What `lewis up` prints of what its parts say."""

import json
import re

import pytest

from lewis_flows.cli.up_output import Output

LINES = {
    "lewis": ["recipes in /r: tiny"],
    "webhook": ["2026-11-26 18:44:57,205 127.0.0.1 POST /webhook 202 accepted org/math 1a2b for tiny (9 ms)"],
    "prefect": ["Check out the dashboard at http://127.0.0.1:4200"],
    "mlflow": [
        "INFO:     Uvicorn running on http://127.0.0.1:5000",
        "2026/11/26 18:44:57 INFO mlflow.store.db: Creating",
    ],
    "worker": [
        "18:44:57.205 | INFO    | prefect.worker - Worker 'lewis' submitting flow run '1a'",
        "18:44:57.205 | INFO    | Flow run 'merge tiny' - Beginning flow run 'merge tiny' for flow 'merge'",
        "18:44:57.205 | INFO    | Task run 'download org/math' - Finished in state Completed()",
        "18:44:57.205 | INFO    | lewis.models.hub.repository - org/math: downloading 3 files, 0.27 GB",
        "18:44:57.205 | WARNING | Task run 'evaluate base' - it waits for a device",
        "18:44:57.205 | ERROR   | Flow run 'merge tiny' - Encountered an exception:",
        "Traceback (most recent call last):",
        '  File "flows/lewis_flows/merge.py", line 1, in merge_flow',
        "    raise Busy from error",
        "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) disk I/O error",
        "[SQL: INSERT INTO worker (name) VALUES (:name)]",
        "[parameters: {'name': 'lewis'}]",
        "(Background on this error at: https://sqlalche.me/e/21/e3q8)",
        "The above exception was the direct cause of the following exception:",
        "Traceback (most recent call last):",
        '  File "flows/lewis_flows/merge.py", line 2, in merge_flow',
        "lewis.errors.Busy: somebody else writes",
        "  to it",
        "18:44:57.205 | INFO    | Flow run 'merge tiny 5c1f' - Finished in state Completed('Promoted v3')",
        "18:44:57.205 | INFO    | Flow run 'verify' - Finished in state Completed()",
    ],
}
EVENTS = [LINES["lewis"][0], LINES["webhook"][0], *(LINES["worker"][n] for n in (1, 4, 5, 9, 16, 17, 18))]


@pytest.mark.parametrize("verbose", [False, True])
def test_a_line_is_an_event(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    every = [(part, line) for part, lines in LINES.items() for line in lines]
    output = Output(verbose=verbose, as_json=False)
    for part, line in every:
        output.say(part, line)
    told = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert re.fullmatch(r"\d\d:\d\d:\d\d recipes in /r: tiny", told[0])  # as the lines of the others have a time
    told[0] = told[0][9:]
    assert told == ([line for _, line in every] if verbose else EVENTS)

    output = Output(verbose=verbose, as_json=True)
    for part, line in every:
        output.say(part, line)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["line"] for each in found] == told
    levels = {each["line"]: each["level"] for each in found}
    assert levels[LINES["worker"][4]] == "WARNING" and levels[LINES["lewis"][0]] == "INFO"
    assert all(each.keys() == {"time", "part", "level", "line"} for each in found)


def test_lines_that_are_objects_already_are_judged_by_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    every = [
        f"{level} | {line}" for level, line in (("INFO", "Flow run 'merge t' - Finished in state x"), ("INFO", "y"))
    ]
    objects = [
        json.dumps(dict(zip(("level", "line"), each.split(" | "), strict=True)) | {"time": "t", "flow_run": "1"})
        for each in every
    ]
    for as_json in (False, True):
        output = Output(verbose=False, as_json=as_json)
        for each in [*objects, '{"broken', '{"a": 1}']:
            output.say("worker", each)
        told = capsys.readouterr().out.splitlines()
        assert len(told) == 1
        if as_json:
            line = {"time": "t", "part": "worker", "level": "INFO", "line": every[0][7:], "flow_run": "1"}
            assert json.loads(told[0]) == line
        else:
            assert told[0][9:] == every[0]


def test_a_run_that_failed_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    failed = "05:05:32.818 | ERROR   | Flow run 'merge tiny' - Finished in state Failed('no such file')"
    again = "05:05:32.824 | ERROR   | Flow run 'proud-lynx' - Engine execution exited with unexpected exception"
    rejected = "05:05:32.818 | INFO    | Flow run 'merge tiny' - Finished in state Rejected('v2: 0 vs 1')"
    output = Output(verbose=False, as_json=False)
    for line in (failed, again, again, rejected, again, "lewis_tasks.support.flow_run.RejectedRun: v2: 0 vs 1"):
        output.say("worker", line)
    told = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert told == [failed, again, rejected]  # the second end was of a run that had told nothing


def test_what_a_worker_makes_up_for_by_itself_is_not_told_once_it_is_clear_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lost = [
        "05:13:31.080 | WARNING | prefect.events.clients - Unable to connect to 'ws://127.0.0.1:4200/api/events/in'.",
        "05:13:26.117 | ERROR   | prefect.runner.state_proposer - Failed to update state of flow run '1a'",
        "httpx.ConnectError: All connection attempts failed",
        "05:13:31.081 | ERROR   | GlobalEventLoopThread | prefect._internal.concurrency - "
        "Service 'EventsWorker' failed to process item Event()",
        "05:13:49.2 | ERROR   | prefect.FlowRunCancellingObserver - Cancellation polling task failed. Execution goes",
        "05:13:49.2 | WARNING | prefect.runner.executor_context - Cancellation observer failed. Flow run cancellation ",
    ]
    socket = "05:13:21.9 | WARNING | prefect.FlowRunCancellingObserver - The FlowRunCancellingObserver websocket failed"
    other = "05:13:40.000 | ERROR   | prefect.worker - no space left on device"
    ended = "prefect ended with exit code -9; starting it again"
    output = Output(verbose=False, as_json=False)
    for part, line in [("worker", socket), ("worker", lost[0]), ("lewis", ended), *(("worker", e) for e in lost)]:
        output.say(part, line)
    output.say("worker", other)
    told = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert [told[0], told[1][9:], told[2]] == [lost[0], ended, other]
