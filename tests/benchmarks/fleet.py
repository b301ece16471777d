"""What a fleet costs: the store's remote half, databases that have grown, releases an hour; measured in this very run.

    python -m tests.benchmarks.fleet [remote|large|databases|idle]

remote     seconds and bytes that `LEWIS_STORE=file://...` adds to a run on the demo family, and what fetching takes
large      the same of a plain merge of 0.45 B parameters in bf16, the merged model shared too
databases  Prefect's and MLflow's databases after 1,000 runs: size, seconds of the dashboard's queries and of the status
idle       runs of no change that one server and four workers end, an hour
"""

import json
import os
import re
import sqlite3
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.orchestration import in_new_process, run_library, train_demo
from tests.benchmarks.shared import heading, row, write_family, write_recipe
from tests.support.local_hub import LocalHub

RUNS = int(os.environ.get("LEWIS_FLEET_RUNS", "1000"))
IDLE = int(os.environ.get("LEWIS_FLEET_IDLE", "16"))  # runs of no change
WORKERS = 4


def main(arguments: Sequence[str]) -> int:
    """Run the chosen parts, or all."""
    parts: dict[str, Callable[[Path], None]] = {
        "remote": remote,
        "large": large,
        "databases": databases,
        "idle": idle,
    }
    if unknown := [name for name in arguments if name not in parts]:
        print(f"expected {', '.join(parts)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    for name in arguments or parts:
        with tempfile.TemporaryDirectory(prefix="lewis-fleet-") as folder:
            parts[name](Path(folder))
        row("load of the machine at the end, by its 1-minute average", f"{os.getloadavg()[0]:.1f}")
    return 0


def remote(root: Path) -> None:
    """The demo's recipe by the library alone, from an empty store, then from one that has only the registry."""
    recipe = in_new_process(root / "training", train_demo, root / "demo") / "lewis.yaml"
    heading("A run on the demo family with LEWIS_STORE=file://...")
    there = {"LEWIS_STORE": f"file://{root / 'remote'}"}
    first = in_new_process(root / "one", timed, run_library, str(recipe), **there)
    second = in_new_process(root / "two", timed, run_library, str(recipe), **there)
    tell(first, second, root / "remote")


def large(root: Path) -> None:
    """Merge random models of 0.45 B parameters; then again on an empty store, which fetches the result."""
    in_new_process(root / "making", make_large, root)
    heading("A plain merge of 0.45 B parameters with LEWIS_STORE=file://... and LEWIS_STORE_MERGED=1")
    there = {"LEWIS_STORE": f"file://{root / 'remote'}", "LEWIS_STORE_MERGED": "1"}
    without = in_new_process(root / "none", timed, merge_large, root)
    row("the merge without a remote half", f"{without[0]:.1f} s")
    tell(*(in_new_process(root / name, timed, merge_large, root, **there) for name in ("one", "two")), root / "remote")


def databases(root: Path) -> None:
    """One run of no change, copied row by row in Prefect's database; as many runs and versions in MLflow's."""
    os.environ["LEWIS_HOME"] = str(root / "home")
    from lewis_flows import environment
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.servers import prefect_server
    from lewis_flows.service.status import status

    environment.prepare()
    heading(f"Databases after {RUNS:,} runs")
    with LocalHub(root / "hub") as hub:
        recipes = make_recipes(root, hub, 1)
        with prefect_server() as url, connected(url):
            from lewis_flows.merge import merge_flow

            merge_flow(str(recipes[0]))
            state = merge_flow(str(recipes[0]), return_state=True)
            time.sleep(5)  # the server learns of task runs and events a little later
        database = root / "home" / "prefect" / "prefect.db"
        before = database.stat().st_size
        rows = multiply(database, str(state.state_details.flow_run_id), RUNS)
        row(f"Prefect's, {rows:,} rows of such runs", f"{(database.stat().st_size - before) / 1e6:.0f} MB")
        took = fill_registry(recipes[0].stem)
        row(f"MLflow's, {RUNS:,} runs that are versions of one model (made in {took:.0f} s)", size_of_registry(root))
        with prefect_server() as url, connected(url):
            for name, seconds in dashboard():
                row(name, f"{seconds:.2f} s")
            os.environ["PREFECT_API_URL"] = url
            status()  # imports
            began = time.perf_counter()
            status()
            row("`lewis status`, all that it asks, without the start of Python", f"{time.perf_counter() - began:.2f} s")


def idle(root: Path) -> None:
    """As many recipes as workers, each merged once; then runs of no change by the deployment, all at once."""
    os.environ["LEWIS_HOME"] = str(root / "home")
    from lewis_flows import environment

    environment.prepare()
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.processes import Process
    from lewis_flows.service.servers import prefect_server

    heading(f"One server, {WORKERS} workers on this machine")
    with LocalHub(root / "hub") as hub, ExitStack() as stack:
        recipes = make_recipes(root, hub, WORKERS)
        url = stack.enter_context(prefect_server())
        stack.enter_context(connected(url))
        os.environ["PREFECT_API_URL"] = url
        import httpx
        from prefect.client.orchestration import get_client
        from prefect.deployments import run_deployment

        from lewis_flows.service.deploy import deploy

        deploy(recipes=[])
        for number in range(WORKERS):
            command = ["-m", "lewis_flows.service.worker", "--name", f"w{number}", "--limit", "1"]
            worker = Process(f"worker{number}", command, {})
            worker.start()
            stack.callback(worker.stop)

        def start(recipe: str) -> Any:
            while True:
                try:
                    return run_deployment(f"merge/{recipe}", timeout=0)
                except httpx.HTTPStatusError:  # the server is busy, be it longer than Prefect's client is patient
                    time.sleep(1)

        def run_all(times: int) -> tuple[float, list[str]]:
            began, states = time.perf_counter(), list[str]()
            for _ in range(times):  # a second waiting run of one recipe would be skipped
                made = [start(each.stem) for each in recipes]
                with get_client(sync_client=True) as client:
                    while not all((run := client.read_flow_run(each.id)).state.is_final() for each in made):
                        time.sleep(0.2)
                    states += [str(client.read_flow_run(each.id).state_name) for each in made]
                    del run
            return time.perf_counter() - began, states

        _, states = run_all(1)
        assert set(states) == {"Promoted"}, states
        seconds, states = run_all(max(IDLE // WORKERS, 1))
        assert set(states) == {"Cached"}, states
        row(
            f"{len(states)} runs of no change took {seconds:.0f} s: an hour", f"{3600 * len(states) / seconds:.0f} runs"
        )


def make_recipes(root: Path, hub: LocalHub, number: int) -> list[Path]:
    """Recipes of one tiny family on the local Hub, in the folder of recipes."""
    os.environ.update(hub.environment(root / "client") | {"LEWIS_HOME": str(root / "home")})
    for name, path in write_family(root / "models", ["one", "two"], layers=2, hidden=16).items():
        hub.commit(f"org/{name}", path)
    (root / "recipes").mkdir()
    os.environ["LEWIS_RECIPES"] = str(root / "recipes")
    return [write_recipe(root / "recipes", f"tiny{each}", ["one", "two"]) for each in range(number)]


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, float, float]:
    """Seconds of a call, and of what it pushed and fetched."""
    from lewis.store import remote

    spent = {"_push": 0.0, "fetch": 0.0}
    for name in spent:
        inner = getattr(remote, name)

        def watched(*given: Any, name: str = name, inner: Callable[..., Any] = inner) -> Any:
            began = time.perf_counter()
            try:
                return inner(*given)
            finally:
                spent[name] += time.perf_counter() - began

        setattr(remote, name, watched)
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began, spent["_push"], spent["fetch"]


def tell(first: tuple[float, float, float], second: tuple[float, float, float], there: Path) -> None:
    files = [path for path in there.rglob("*") if path.is_file() and "leases" not in path.parts]
    size = sum(path.stat().st_size for path in files)
    row(f"first run {first[0]:.1f} s, of which pushing {len(files)} objects, {size / 1e6:.1f} MB", f"{first[1]:.2f} s")
    row("and asking for what is not there yet", f"{first[2]:.2f} s")
    row(f"on an empty store {second[0]:.1f} s, of which fetching", f"{second[2]:.2f} s")


def make_large(root: Path) -> None:
    """A random Llama of 0.45 B parameters in bf16, and two fine-tunes."""
    import torch

    from tests.support.models import write_expert, write_llama

    base = write_llama(root / "base", layers=48, hidden=1024, dtype=torch.bfloat16)
    for seed, name in enumerate(("math", "code"), 1):
        write_expert(base, root / name, seed=seed)


def merge_large(root: Path) -> None:
    """A TIES merge of them into the store."""
    from lewis.recipe.recipe import Recipe
    from tests.support import pipeline

    text = "merge_method: ties\nbase_model: ./base\nmodels: [{model: ./math}, {model: ./code}]\n"
    text += "parameters: {density: 0.5, weight: 1.0}\n"
    recipe = Recipe.parse(text, root=root)
    base, experts = pipeline.fetch(recipe)
    pipeline.merge(recipe, base, experts)


def multiply(database: Path, run: str, times: int) -> int:
    """Copy all rows of a flow run, its events too, with new ids; gives how many rows there are of these runs."""
    with open_database(database) as known:
        rows = rows_of_run(known, run)
        ids = {value for _, each in rows for value in each.values() if isinstance(value, str) and _is_id(value)}
        own = {str(each["id"]) for _, each in rows if each.get("id")}
        commands = [_insert(table, list(each)) for table, each in rows]
        text = json.dumps([list(each.values()) for _, each in rows])
        found = re.compile("|".join(ids & own))
        for _ in range(times):
            copied = json.loads(found.sub(new_ids(), text))
            for command, values in zip(commands, copied, strict=True):
                known.execute(command, values)
        known.commit()
        known.execute("pragma wal_checkpoint(truncate)")
    return len(rows) * times


def new_ids() -> Callable[[re.Match[str]], str]:
    """A function that gives each id a new one, the same each time."""
    known: dict[str, str] = {}
    return lambda old: known.setdefault(old[0], str(uuid.uuid4()))


def _insert(table: str, names: list[str]) -> str:
    return f"insert into {table} ({', '.join(names)}) values ({', '.join('?' * len(names))})"


def rows_of_run(known: sqlite3.Connection, run: str) -> list[tuple[str, dict[str, Any]]]:
    """Table and row of all that belongs to a run."""
    known.row_factory = sqlite3.Row
    found = [("flow_run", dict(each)) for each in known.execute("select * from flow_run where id = ?", [run])]
    tasks = [str(each["id"]) for each in known.execute("select id from task_run where flow_run_id = ?", [run])]
    for table in ("flow_run_state", "task_run", "artifact", "log"):
        found += [(table, dict(each)) for each in known.execute(f"select * from {table} where flow_run_id = ?", [run])]
    for task in tasks:
        found += [
            ("task_run_state", dict(each))
            for each in known.execute("select * from task_run_state where task_run_id = ?", [task])
        ]
    about = f"%{run}%"
    events = {
        str(e["event_id"]) for e in known.execute("select * from event_resources where resource_id like ?", [about])
    }
    for event in events:
        found += [("events", dict(each)) for each in known.execute("select * from events where id = ?", [event])]
        found += [
            ("event_resources", dict(each))
            for each in known.execute("select * from event_resources where event_id = ?", [event])
        ]
    if found:
        found[0][1]["idempotency_key"] = None
    return found


@contextmanager
def open_database(path: Path) -> Iterator[sqlite3.Connection]:
    known = sqlite3.connect(path)
    try:
        known.execute("pragma foreign_keys = off")
        yield known
    finally:
        known.close()


def _is_id(text: str) -> bool:
    return len(text) == 36 and text.count("-") == 4


def fill_registry(name: str) -> float:
    """As many runs as `RUNS`, each with the parameters and scores of a small recipe and a version; gives seconds."""
    from mlflow.entities import Metric, Param

    from lewis.registry import tracking

    began = time.perf_counter()
    with tracking.client("filling the registry") as client:
        experiment = tracking.experiment(client)
        for number in range(RUNS):
            tags = {"lewis.name": name, "lewis.digest": f"{number:064x}", "lewis.source.org--one": f"{number:040x}"}
            run = client.create_run(experiment, run_name=f"{name}-{number:08x}", tags=tags).info.run_id
            metrics = [Metric(f"merged/task{each}/acc", 0.5, number, 0) for each in range(12)]
            client.log_batch(run, metrics, [Param(f"lewis.key{each}", "value") for each in range(24)])
            client.set_terminated(run)
            client.create_model_version(name, f"file:///none/{number}", run, tags=tags)
    return time.perf_counter() - began


def size_of_registry(root: Path) -> str:
    return f"{(root / 'home' / 'mlflow' / 'mlflow.db').stat().st_size / 1e6:.0f} MB"


def dashboard() -> Iterator[tuple[str, float]]:
    """Seconds of what Prefect's pages ask for: the list of runs, their number, the bars of the last day, artifacts."""
    from datetime import UTC, datetime, timedelta

    from prefect.client.orchestration import get_client

    now = datetime.now(UTC)
    history = {
        "history_start": (now - timedelta(days=1)).isoformat(),
        "history_end": now.isoformat(),
        "history_interval_seconds": 1800,
    }
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "Prefect: the 200 newest runs": ("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 200}),
        "Prefect: how many runs": ("/flow_runs/count", {}),
        "Prefect: how many task runs": ("/task_runs/count", {}),
        "Prefect: runs of the last day by half hour": ("/flow_runs/history", history),
        "Prefect: task runs of the last day by half hour": ("/task_runs/history", history),
        "Prefect: the newest artifact of each key": ("/artifacts/latest/filter", {}),
    }
    with get_client(sync_client=True, httpx_settings={"timeout": 120}) as client:
        for name, (path, body) in asked.items():
            client.request("POST", path, json=body).raise_for_status()  # once for the server's own caches
            began = time.perf_counter()
            client.request("POST", path, json=body).raise_for_status()
            yield name, time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
