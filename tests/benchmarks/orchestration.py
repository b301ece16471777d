"""What orchestration costs, every number measured in this very run, on this machine, as it is loaded now.

    python -m tests.benchmarks.orchestration [event|poll|ready|burst|together|rest|overhead|remerge]

event     from a commit on the local Hub, over webhook and event, to a flow run that is Running
poll      the same without a webhook, when the commit just misses a poll
ready     from the start of `lewis up` to its line that all is there, when its state is
burst     ten releases of one recipe within a minute
together  one release that ten recipes wait for, where the worker has two slots
rest      what `lewis up` takes of the machine while it has nothing to do
overhead  the DAG with a server up, against the same steps of the library alone, on the demo family
remerge   importance and download time after one of four experts moved, against those of the full run
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.benchmarks.service_times import burst, event, poll, ready, rest, together
from tests.benchmarks.shared import bar, both, heading, row, write_family, write_recipe, write_release
from tests.support.local_hub import LocalHub
from tests.support.service import REPO

FULL_RUNS = 3  # of each side
CACHED_RUNS = 5  # of each side, in a process; and as many whole processes


def main(arguments: Sequence[str]) -> int:
    """Run the chosen parts, or all; 1 if a bar was missed."""
    parts: dict[str, Callable[[Path], list[bool]]] = {
        "event": event,
        "poll": poll,
        "ready": ready,
        "burst": burst,
        "together": together,
        "rest": rest,
        "overhead": overhead,
        "remerge": remerge,
    }
    unknown = [name for name in arguments if name not in parts]
    if unknown:
        print(f"expected {', '.join(parts)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    met: list[bool] = []
    for name in arguments or parts:
        with tempfile.TemporaryDirectory(prefix="lewis-benchmark-") as folder:
            met += parts[name](Path(folder))
    return 0 if all(met) else 1


def overhead(root: Path) -> list[bool]:
    """The same merge with and without the DAG; each full run in a new process, from an empty store, in alternation."""
    from lewis_flows import environment
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.servers import prefect_server

    family = in_new_process(root / "training", train_demo, root / "demo")
    os.environ["LEWIS_HOME"] = str(root / "server")
    environment.prepare()
    took: dict[str, list[list[float]]] = {"library": [], "dag": []}
    whole: dict[str, list[float]] = {"library": [], "dag": []}
    with prefect_server() as url, connected(url):
        for number in range(FULL_RUNS):
            for side in ("library", "dag") if number % 2 else ("dag", "library"):
                home = root / f"{side}-{number}"
                took[side].append(in_new_process(home, time_runs, side, family / "lewis.yaml"))
        for _ in range(CACHED_RUNS):
            for side, homes in (("library", root / "library-0"), ("dag", root / "dag-0")):
                whole[side].append(time_process(side, family / "lewis.yaml", homes))
    full = {side: [runs[0] for runs in each] for side, each in took.items()}
    cached = {side: [second for runs in each for second in runs[1:]] for side, each in took.items()}
    heading(f"overhead of the DAG on the demo family: median / max, {FULL_RUNS} full and {CACHED_RUNS} cached a store")
    met = []
    for name, found, limit in (
        ("full run, empty store, warm imports", full, 15),
        ("all-cached run, in one process, warm imports", cached, 5),
        ("all-cached run, a whole process (`lewis run`)", whole, 5),
    ):
        row(f"{name}: library", both(found["library"]))
        row(f"{name}: DAG", both(found["dag"]))
        met.append(bar("  overhead", statistics.median(found["dag"]) - statistics.median(found["library"]), limit))
    return met


def remerge(root: Path) -> list[bool]:
    """Four experts of 4.7 million weights; one task at a time, so that none waits while its time is taken."""
    full, again = in_new_process(root / "remerge", time_remerge, root, LEWIS_MAX_WORKERS="1")
    heading("re-merge after one of four experts moved: time of the task runs, in seconds")
    for name, run in (("full run", full), ("re-merge", again)):
        row(f"{name}: download + importance", f"{run['download']:.2f} + {run['measure']:.2f}")
        row(f"{name}: the whole run", f"{run['run']:.1f}")
    share = (again["download"] + again["measure"]) / (full["download"] + full["measure"])
    return [bar("  share of download and importance", 100 * share, 40, "%")]


# What follows runs in processes of its own.


def train_demo(folder: Path) -> Path:
    """Train the demo family."""
    from lewis.demo.family import make_family

    return make_family(folder, lambda what, part: None)


def time_runs(side: str, recipe: Path) -> list[float]:
    """Seconds of a run from an empty store, then of runs that find everything done."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import mlflow.transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from lewis.evaluation.harness import process  # noqa: F401
    from lewis_flows.merge import merge_flow

    run: Callable[[str], Any] = merge_flow if side == "dag" else run_library
    took = []
    for _ in range(1 + CACHED_RUNS):
        began = time.perf_counter()
        run(str(recipe))
        took.append(time.perf_counter() - began)
    return took


def run_library(path: str) -> None:
    """What the DAG does to a guided recipe, step by step, without Prefect."""
    from lewis.evaluation import step
    from lewis.evaluation.gate import decide
    from lewis.evaluation.harness import lm_eval
    from lewis.recipe.recipe import Recipe
    from lewis.registry import creation, promotion, versions
    from lewis.registry.registration import registration_of
    from tests.support import pipeline

    recipe = Recipe.load(path)
    assert recipe.base_model and recipe.register_as and recipe.evaluate
    settings = pipeline.EvalSettings.of(recipe.evaluate, recipe.root)
    lm_eval.check_tasks(settings)
    champion = versions.champion(recipe.register_as.name)
    pinned, sources = pipeline.pin_all(recipe)
    assert pinned is not None
    pipeline.preflight(recipe, pinned, sources)
    base, experts = pipeline.download(pinned), [pipeline.download(source) for source in sources]
    _, allocated = pipeline.guide(recipe, base, experts)
    merged = pipeline.merge(recipe, base, experts, allocated)
    uniform = pipeline.merge(recipe, base, experts, allocated, "uniform")
    names = pipeline.short_names([entry.model for entry in recipe.experts], recipe.root)
    models = {"base": base, **dict(zip(names, experts, strict=True))}
    models |= {"uniform": uniform.files("uniform"), "merged": merged.files("merged")}
    scores = {label: pipeline.score(files, settings) for label, files in models.items()}
    scored = {model.label: model for model in step.scored_models(recipe.score_weights, scores)}
    against = champion.version.uri if champion else "base"
    verdict = decide(recipe.register_as.gate, scored["merged"], scored["base"], against, base=scored["base"])
    version = creation.register(registration_of(recipe, base, experts, [], allocated, merged, scores))
    promotion.promote(version, verdict)


def time_process(side: str, recipe: Path, home: Path) -> float:
    """Seconds from the start to the end of a Python that makes one run."""
    bare = "import sys; from tests.benchmarks.orchestration import run_library; run_library(sys.argv[1])"
    command = ["-m", "lewis_flows.cli.main", "run"] if side == "dag" else ["-c", bare]
    environment = {**os.environ, "LEWIS_HOME": str(home), "TMPDIR": str(home / "tmp")}
    began = time.perf_counter()
    subprocess.run([sys.executable, *command, str(recipe)], check=True, cwd=REPO, env=environment, capture_output=True)
    return time.perf_counter() - began


def time_remerge(root: Path) -> list[dict[str, float]]:
    """A full run and a re-merge, after a small one of other models has warmed up all code."""
    from lewis_flows.service.credentials import connected
    from lewis_flows.service.servers import prefect_server

    experts = ["one", "two", "three", "four"]
    with LocalHub(root / "hub") as hub:
        os.environ.update(hub.environment(root / "client"))
        paths = write_family(root / "models", experts, layers=8, hidden=256)
        for name, path in paths.items():
            hub.commit(f"org/{name}", path)
        tiny = write_family(root / "tiny", ["other"], layers=2, hidden=16)
        recipe, warm = write_recipe(root, "four", experts), write_recipe(root, "warm", ["tiny-other"])
        warm.write_text(warm.read_text().replace("org/base", "org/tiny-base"))
        for name, path in tiny.items():
            hub.commit(f"org/tiny-{name}", path)
        with prefect_server() as url, connected(url):
            time_tasks(warm)
            full = time_tasks(recipe)
            hub.commit("org/one", write_release(paths["base"], root / "release", seed=99))
            return [full, time_tasks(recipe)]


def time_tasks(recipe: Path) -> dict[str, float]:
    """Run a recipe: seconds of the run, and of its task runs by kind, found in the cache or not."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    from lewis_flows.merge import merge_flow

    began = time.perf_counter()
    state = merge_flow(str(recipe), return_state=True)
    took = {"run": time.perf_counter() - began}
    this = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=this)
        while any(run.end_time is None for run in runs):  # the server learns of their ends a little later
            time.sleep(0.5)
            runs = client.read_task_runs(flow_run_filter=this)
    for kind in ("download", "measure"):
        ours = [run for run in runs if run.name.startswith(kind)]
        assert ours
        took[kind] = sum((run.end_time - run.start_time).total_seconds() for run in ours)
    return took


def in_new_process(home: Path, function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """Call a function in a new Python, with a store and a device slot of its own; its output goes to a file there."""
    (home / "tmp").mkdir(parents=True)
    kept = dict(os.environ)
    os.environ.update({"LEWIS_HOME": str(home), "TMPDIR": str(home / "tmp"), **environment})
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=begin, initargs=[home / "output"]) as pool:
            return pool.submit(function, *arguments).result()
    except Exception:
        print((home / "output").read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        os.environ.clear()
        os.environ.update(kept)


def begin(output: Path) -> None:
    """Send what the process prints to a file, and set its environment as the command line does."""
    from lewis_flows import environment

    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    environment.prepare()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
