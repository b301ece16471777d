"""Each row of the table of private names: it is there, it is spelled nowhere else, and it is still needed."""

import ast
import inspect
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lewis import private_names
from lewis.errors import LewisError
from lewis.private_names import PrivateName
from tests.support.local_hub import LocalHub
from tests.support.service import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT / top).with_suffix("").parts): path.read_text()
    for top, package in ((".", "lewis"), ("tasks", "lewis_tasks"), ("flows", "lewis_flows"))
    for path in (ROOT / top / package).rglob("*.py")
    if "shipped" not in path.parts
}
NAMES = {key: row for key, row in vars(private_names).items() if isinstance(row, PrivateName)}
PACKAGES = {row.name.partition(".")[0] for row in private_names.ALL} | {"torch", "datasets", "uvicorn", "ray", "peft"}


def undocumented(name: str) -> Callable[[Path], bool]:
    """The package still has no name of its own that one may use instead."""

    def needed(_: Path) -> bool:
        import transformers

        owner = transformers.PreTrainedModel if name.startswith("_") else transformers
        return not hasattr(owner, name.lstrip("_"))

    return needed


def second_ui(folder: Path) -> bool:
    """It is served although it is switched off."""
    from fastapi.testclient import TestClient
    from prefect.server.api.server import create_ui_app
    from prefect.settings import PREFECT_SERVER_UI_V2_ENABLED, PREFECT_UI_STATIC_DIRECTORY, temporary_settings

    with temporary_settings({PREFECT_SERVER_UI_V2_ENABLED: False, PREFECT_UI_STATIC_DIRECTORY: str(folder)}):
        offered = TestClient(create_ui_app(ephemeral=False)).get("/ui-settings").json()["available_uis"]
    return "v2" in offered


def believes_a_number(folder: Path) -> bool:
    """The lock of a dead server is held while any process has its number."""
    import asyncio

    from prefect.server.concurrency.lease_storage.filesystem import ConcurrencyLeaseStorage

    (folder / "expirations.lock").write_text(str(os.getpid()))

    async def take() -> None:
        async with private_names.PREFECT_LEASE_INDEX.get()(ConcurrencyLeaseStorage(folder)):
            pass

    try:
        asyncio.run(asyncio.wait_for(take(), 1))
    except TimeoutError:
        return True
    return False


def task_inputs(_: Path) -> bool:
    """The runner of processes hands on only the dependencies that it is given, and looks for none itself."""
    from prefect.task_runners import ProcessPoolTaskRunner

    return "collect_task_run_inputs" not in inspect.getsource(ProcessPoolTaskRunner)


def cached_assets(_: Path) -> bool:
    """A task that ends as Cached reports no asset by itself, and the method that `found` calls reports it."""
    from prefect.assets import Asset
    from prefect.context import AssetContext
    from prefect.states import Completed

    context = AssetContext(downstream_assets={Asset(key="lewis://model/x")}, materialized_by="lewis")
    with mock.patch("prefect.events.emit_event") as emitted:
        context.emit_events(Completed(name="Cached"))
        none = not emitted.called
        context.emit_events(Completed())
    return none and emitted.called


def gives_up(_: Path) -> bool:
    """A new client does not ask a server again that is away for a moment."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    begin = time.monotonic()
    away = temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"})
    with away, pytest.raises(httpx.ConnectError), get_client(sync_client=True) as client:
        client.hello()
    parameters = inspect.signature(private_names.PREFECT_RETRY.get()).parameters
    return time.monotonic() - begin < 30 and list(parameters)[:3] == ["self", "request", "send"]


def loses_events(_: Path) -> bool:
    """After ten attempts, which no setting changes."""
    from prefect.events.clients import PrefectEventsClient
    from prefect.settings import Settings

    known = [name for name in Settings.model_fields["client"].annotation.model_fields]  # type: ignore[union-attr]
    attempts = inspect.signature(PrefectEventsClient).parameters["reconnection_attempts"].default
    return attempts == 10 and not any("reconnect" in name for name in known)


def no_sandbox(_: Path) -> bool:
    from jinja2.sandbox import SandboxedEnvironment

    return not isinstance(private_names.LM_EVAL_ENV.get(), SandboxedEnvironment)


def imports_code(folder: Path) -> bool:
    """A task file imports code next to it when it is loaded, and no argument forbids that."""
    from lm_eval.tasks import TaskManager

    (folder / "evil.py").write_text(f"open({str(folder / 'mark')!r}, 'w').close()\ndef docs(rows): return rows\n")
    data = "dataset_path: json\ndataset_kwargs: {data_files: missing.jsonl}\n"
    (folder / "own.yaml").write_text(f"task: own\n{data}process_docs: !function evil.docs\n")
    with pytest.raises(FileNotFoundError):
        TaskManager(include_path=str(folder), include_defaults=False).load(["own"])
    return (folder / "mark").exists()


def keeps_rolling_answers_at_the_end(_: Path) -> bool:
    from lm_eval.models.huggingface import HFLM

    code = inspect.getsource(HFLM.loglikelihood_rolling)
    return code.index("add_partial") > code.index("for window_count in request_window_counts")


def lists_packages(_: Path) -> bool:
    from lm_eval import evaluator

    return "add_env_info(results)" in inspect.getsource(evaluator.simple_evaluate)


def loads_rows_with_a_task(folder: Path) -> bool:
    """A task cannot be loaded without its documents."""
    from lm_eval.api.task import ConfigurableTask

    asked = mock.Mock(side_effect=ConnectionError)
    with mock.patch("datasets.load_dataset", asked), pytest.raises(ConnectionError):
        ConfigurableTask(config={"task": "x", "dataset_path": "org/rows", "test_split": "test"})
    return bool(asked.call_count)


def cuts_embeddings(_: Path) -> bool:
    from lm_eval.models.huggingface import HFLM

    source = inspect.getsource(HFLM)
    return "if vocab_size != len(self.tokenizer):" in source and "resize_token_embeddings(len(self.token" in source


def pipeline_without_a_name(folder: Path) -> bool:
    from mlflow.transformers import flavor_config

    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    arguments: dict[str, Any] = {"local_checkpoint_dir": str(folder), "task": "text-generation"}
    build = next(
        each
        for _, each in inspect.getmembers(flavor_config, inspect.isfunction)
        if "local_checkpoint_dir" in inspect.signature(each).parameters and "check_task" in inspect.getsource(each)
    )
    for name, parameter in inspect.signature(build).parameters.items():
        if parameter.default is parameter.empty:
            arguments.setdefault(name, None)
    with pytest.raises(AttributeError, match="__name__"):
        build(**arguments)
    return True


def logs_spans_first(folder: Path) -> bool:
    """MLflow logs a span before its trace, which then has to be merged into what the span has made."""
    import mlflow

    traces, order = private_names.MLFLOW_TRACES.get(), list[str]()
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'traces.db'}")
    with (
        mock.patch.dict("os.environ", MLFLOW_ENABLE_ASYNC_TRACE_LOGGING="false"),
        mock.patch.object(traces, "log_spans", lambda *_: order.append("span")),
        mock.patch.object(traces, "start_trace", lambda *_: order.append("trace")),
    ):
        mlflow.tracing.reset()
        mlflow.start_span_no_context("x", experiment_id="0").end()
    return order == ["span", "trace"]


def waits_for_its_server(_: Path) -> bool:
    """The command starts the server in another process, and waits for it."""
    from mlflow.server import _run_server

    return "server_proc.wait()" in inspect.getsource(_run_server)


def half_a_database(folder: Path) -> bool:
    """MLflow cannot go on with a database of which another process has made half."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    with closing(sqlite3.connect(folder / "half.db")) as connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER PRIMARY KEY)")
    with pytest.raises((MlflowException, SQLAlchemyError)):
        MlflowClient(f"sqlite:///{folder / 'half.db'}").search_experiments()
    return True


def trusts_loopback(_: Path) -> bool:
    """MLflow takes a page of another port of this machine for its own, and has no option for what wraps its server."""
    from mlflow.server.security_utils import should_block_cors_request

    return not should_block_cors_request("http://localhost:9999", "POST", ["http://127.0.0.1:5000"])


def loses_what_arrived(folder: Path) -> bool:
    """The client loses the piece that a cut download has begun, and after a reset all of it."""
    import httpx2
    import huggingface_hub

    plain = inspect.unwrap(private_names.HUB_GET.get())
    with (
        private_names.HUB_GET.replaced(plain),
        private_names.HUB_PIECE.replaced(10 << 20),
        LocalHub(folder / "hub") as hub,
    ):
        commit = hub.commit("org/x", {"x.safetensors": bytes(3_000_000)})
        load = partial(huggingface_hub.hf_hub_download, "org/x", "x.safetensors", revision=commit, endpoint=hub.url)
        fault = {"path": "x.safetensors", "method": "GET", "truncate": 2_000_000}
        hub.faults += [fault, {**fault, "reset": True}]
        with pytest.raises(httpx2.ReadError):
            load(cache_dir=folder / "cache")
        return [each.range for each in hub.log if each.method == "GET"] == [None, None]


STILL_NEEDED: dict[str, Callable[[Path], bool] | str] = {  # or a test that fails when the row is not needed
    "PREFECT_UI_V2": second_ui,
    "PREFECT_WRITE_EVENTS": (
        "tests/flows/service/test_access.py::test_events_that_are_there_already_hold_no_others_up"
    ),
    "PREFECT_LEASE_INDEX": believes_a_number,
    "PREFECT_TASK_INPUTS": task_inputs,
    "PREFECT_ASSET_CONTEXT": cached_assets,
    "PREFECT_RETRY": gives_up,
    "PREFECT_RETRY_ASYNC": gives_up,
    "PREFECT_EVENTS_CLIENT": loses_events,
    "LM_EVAL_ENV": no_sandbox,
    "LM_EVAL_IMPORT_FUNCTION": imports_code,
    "LM_EVAL_TASK": loads_rows_with_a_task,
    "LM_EVAL_ENVIRONMENT": lists_packages,
    "LM_EVAL_TOKENS": keeps_rolling_answers_at_the_end,
    "RESIZE_EMBEDDINGS": cuts_embeddings,
    "FROM_CONFIG": undocumented("_from_config"),
    "CONVERSIONS": undocumented("get_model_conversion_mapping"),
    "WEIGHT_RENAMING": undocumented("WeightRenaming"),
    "RENAME_KEY": undocumented("rename_source_key"),
    "GGUF_ARCHITECTURES": undocumented("GGUF_SUPPORTED_ARCHITECTURES"),
    "GGUF_PROCESSORS": undocumented("TENSOR_PROCESSORS"),
    "GGUF_PROCESSOR": undocumented("TensorProcessor"),
    "CHAT_TEMPLATES": undocumented("render_jinja_template"),
    "CHAT_CLOCK": "tests/lewis/importance/test_calibration.py::test_chats_are_the_same_on_every_day",
    "GGUF_NAMES": undocumented("get_gguf_hf_weights_map"),
    "PIPELINE_TASK": pipeline_without_a_name,
    "MLFLOW_FIND_APP": trusts_loopback,
    "MLFLOW_SQL_STORE": half_a_database,
    "MLFLOW_TRACES": logs_spans_first,
    "MLFLOW_START_SERVER": waits_for_its_server,
    "HUB_WITHOUT_XET": "tests/lewis/registry/test_publishing.py::test_a_hub_without_xet_gets_the_weights_by_lfs",
    "HUB_GET": loses_what_arrived,
    "HUB_PIECE": loses_what_arrived,
}


def test_every_row_has_a_case() -> None:
    assert STILL_NEEDED.keys() == NAMES.keys() and len(NAMES) == len(private_names.ALL)


@pytest.mark.parametrize("key", NAMES)
def test_a_name_that_is_there_and_needed(key: str, tmp_path: Path) -> None:
    row = NAMES[key]
    row.get()
    assert row.applies(), f"try {row.name} with this version, then widen {row.versions}"
    assert [name for name, source in SOURCES.items() if f"private_names.{key}." in source] == [row.used_in]
    case = STILL_NEEDED[key]
    if isinstance(case, str):
        path, _, test = case.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text()
    else:
        assert case(tmp_path), f"{row.name} is not needed any more: remove its row"
    titles = [line[3:] for line in (ROOT / "deployments/UPSTREAM.md").read_text().splitlines() if line[:3] == "## "]
    assert row.upstream in titles


def test_a_name_that_is_gone_is_told_with_the_versions() -> None:
    for name in ("prefect.nothing", "prefect.no_module.nothing", "no_package.nothing", "prefect.Flow.nothing"):
        package = name.partition(".")[0]
        row = PrivateName(package, name, ">=1,<2", "do this", "lewis.here", "a title")
        with pytest.raises(LewisError, match=rf"{name} is missing.* do this: expected {package}>=1,<2, .*installed"):
            row.get()
        with pytest.raises(LewisError, match="is missing"):
            row.put(None)


def test_what_is_put_in_the_place_of_another_is_put_back() -> None:
    row = PrivateName("prefect", "lewis.private_names.ALL", ">=1", "do this", "lewis.here", "a title")
    before = private_names.ALL
    with pytest.raises(ZeroDivisionError), row.replaced(()):
        assert row.get() == () == private_names.ALL
        raise ZeroDivisionError
    assert private_names.ALL is before and row.applies()
    assert not PrivateName("prefect", "prefect.flow", "<1", "do this", "lewis.here", "a title").applies()


def foreign(tree: ast.AST) -> set[str]:
    """Local names that a file imports from one of the packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).partition(".")[0] for a in node.names if a.name.split(".")[0] in PACKAGES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            found |= {a.asname or a.name for a in node.names}
    return found


def root_of(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def spelled(source: str) -> list[str]:
    """Private names of the packages in a file, and what it puts in the place of theirs."""
    tree = ast.parse(source)
    theirs, found = foreign(tree), list[str]()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PACKAGES:
                found += [f"{module}.{a.name}" for a in node.names if private(f"{module}.{a.name}")]
            case ast.Import():
                found += [a.name for a in node.names if a.name.split(".")[0] in PACKAGES and private(a.name)]
            case ast.Attribute() if private(node.attr) and root_of(node) in theirs:
                found.append(ast.unparse(node))
            case ast.Assign() | ast.AugAssign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found += [
                    ast.unparse(each)
                    for each in targets
                    if isinstance(each, ast.Attribute | ast.Subscript) and root_of(each) in theirs
                ]
            case ast.Call(func=ast.Name(id="vars" | "setattr"), args=[first, *_]) if root_of(first) in theirs:
                found.append(ast.unparse(node))
    return found + [row.name for row in private_names.ALL if row.name in source]


def test_nothing_else_spells_a_private_name_or_replaces_a_foreign_one() -> None:
    bad = (
        "import prefect\nfrom lm_eval.tasks import _factory\nfrom prefect import x\nprefect._y.z()\n"
        "x.y = 1\nx.t['y'] = 1\nvars(x)['y'] = 1\nsetattr(x, 'y', 1)\n"
    )
    assert len(spelled(bad)) == 6
    found = {name: spelled(source) for name, source in SOURCES.items() if name != "lewis.private_names"}
    assert not {name: each for name, each in found.items() if each}
