"""A process dies, or finds the disk full, at each of the places where a run changes something outside of itself.

The run is the library's: from the models' pins to the alias `champion`, with stubbed scores. It runs in a child of this
process, where each of its renames, links, flushes, new folders and requests to the registry is a place. Whatever place
it is, the next run ends with the same files, one version, and nothing half-written.

`make test` takes a few places up to the scores, always the same; `make faults` takes LEWIS_FAULTS_POINTS of all.

Runs at once are such children too: three in `make test`, eight, with the registry, in `make faults`.
"""

import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from lewis.errors import LewisError
from lewis.evaluation.gate import Verdict
from lewis.evaluation.harness import builtin_tasks, lm_eval
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scores import Evaluated
from lewis.recipe.recipe import Recipe
from lewis.registry import creation, outbox, promotion
from lewis.registry.registration import registration_of
from lewis.reports import card
from lewis.store.verification import verify
from tests.conftest import POINTS, Family, full
from tests.faults.running import ANSWERS, WAITS, half_done, left_over, merged
from tests.support import pipeline
from tests.support.models import parse

OF_THE_SYSTEM = ("replace", "rename", "link", "fsync", "mkdir")
NEVER = 10**9  # no run comes to so many places
DIED, REFUSED = -signal.SIGKILL, 3
ERROR_500, AFTERWARDS = "MLflow answers 500", "MLflow answers 500 when it has done it"
DATA: dict[str, Any] = {
    "merge_method": "ties",
    "lewis": {"calibrations": {"words": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
    "evaluate": {"tasks": ["words"], "baselines": []},
    "register": {"name": "tiny"},
}


def go(recipe: Recipe, *, to_the_end: bool = bool(POINTS), verdict: Verdict = WAITS) -> str:
    """The steps of a run, without Prefect, to the scores or to the end, and those of who approves; gives the digest."""
    source, sources = pipeline.pin_all(recipe)
    assert source is not None and recipe.evaluate is not None
    base, experts = pipeline.download(source), [pipeline.download(each) for each in sources]
    _, allocated = pipeline.guide(recipe, base, experts)
    found = pipeline.merge(recipe, base, experts, allocated)
    scores = pipeline.score(found.files("merged"), EvalSettings.of(recipe.evaluate, recipe.root))
    if not to_the_end:
        return found.digest
    sets = [pipeline.prepare_calibration(recipe, "words", base)]
    new = registration_of(recipe, base, experts, sets, allocated, found, {"merged": scores})
    card.write(found.folder, new.card, new.pictures.get(card.HEAT_MAP))
    version = creation.register(replace(new, beside=ANSWERS))
    promotion.promote(version, verdict, "a test")
    if verdict.waits and promotion.is_waiting(version.name, version.version):
        promotion.approve(version.name, version.version, "a test", "a test")
    promotion.settle()
    return found.digest


def at_each_place(reached: Callable[[int], None], *, system: bool = True, after: bool = False) -> None:
    """From now on, call `reached` with the number of each place that this process comes to.

    Args:
        reached: as above.
        system: whether calls of the operating system are places too, next to those of the registry.
        after: whether it is called after what is done at the place, not before.
    """
    from mlflow import MlflowClient
    from mlflow.tracing.client import TracingClient

    places = 0
    of_the_registry = [name for name, each in vars(MlflowClient).items() if callable(each) and name[0] != "_"]

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any, **named: Any) -> Any:
            nonlocal places
            places += 1
            place = places
            if not after:
                reached(place)
            result = call(*given, **named)
            if after:
                reached(place)
            return result

        return wrapper

    for module, names in (
        (os, OF_THE_SYSTEM if system else ()),
        (MlflowClient, of_the_registry),
        (TracingClient, ("start_trace", "log_spans")),
    ):
        for name in names:
            setattr(module, name, watched(getattr(module, name)))


def in_child(recipe: Recipe, home: Path, how: str, where: int, answer: Connection) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR

    os.environ["LEWIS_HOME"] = str(home)
    last, refuses = 0, how in (ERROR_500, AFTERWARDS)

    def reached(place: int) -> None:
        nonlocal last
        last = max(last, place)
        if how == "killed" and place == where:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "the disk is full" and place >= where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if refuses and place == where:
            raise MlflowException(how, INTERNAL_ERROR)

    at_each_place(reached, system=not refuses, after=how == AFTERWARDS)
    try:
        answer.send((go(recipe), last))
    except (LewisError, OSError) as error:
        assert (how if refuses else os.strerror(errno.ENOSPC)) in str(error), error
        os._exit(REFUSED)


def racing(recipe: Recipe, home: Path, computed: Path, begin: Any, answer: Connection) -> None:
    """A run that notes what it computes, and begins with others."""
    import lewis.importance.measure
    import lewis.merging.run

    def noting(call: Callable[..., Any], word: str) -> Callable[..., Any]:
        def wrapper(*given: Any, **named: Any) -> Any:
            with computed.open("a") as file:
                file.write(f"{word}\n")
            return call(*given, **named)

        return wrapper

    os.environ["LEWIS_HOME"] = str(home)
    for owner, name in ((lewis.merging.run.Merge, "run"), (lewis.importance.measure, "measure_sets")):
        setattr(owner, name, noting(getattr(owner, name), name))
    begin.wait(60)
    answer.send(go(recipe, verdict=replace(WAITS, approve_hours=None)))


def race(recipes: list[Recipe], home: Path) -> tuple[list[str], list[str]]:
    """Run recipes at once; gives the digests, "" for a run that failed, and what was computed."""
    context = multiprocessing.get_context("fork")
    begin, children = context.Barrier(len(recipes)), []
    for recipe in recipes:
        ours, theirs = context.Pipe(duplex=False)
        given = (recipe, home, home.with_suffix(".computed"), begin, theirs)
        children.append((context.Process(target=racing, args=given), ours))
        children[-1][0].start()
        theirs.close()
    for child, _ in children:
        child.join(300)
    digests = [ours.recv() if child.exitcode == 0 else "" for child, ours in children]
    return digests, sorted(home.with_suffix(".computed").read_text().split())


def run(recipe: Recipe, home: Path, how: str = "", where: int = 0) -> tuple[int, str, int]:
    """Exit code of a run in a child of its own, the digest, and how many places it came to."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(recipe, home, how, where, theirs))
    child.start()
    theirs.close()
    child.join(120)
    digest, places = ours.recv() if child.exitcode == 0 else ("", 0)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode, digest, places


@pytest.fixture(scope="module")
def recipe(family: Family) -> Recipe:
    models = [{"model": str(path)} for path in family.experts]
    return parse({**DATA, "base_model": str(family.base), "models": models})


@pytest.fixture(autouse=True)
def _stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch)


def stub(patch: pytest.MonkeyPatch) -> None:
    """Let nothing be scored."""

    def evaluate(folder: Path, *_: Any, **__: Any) -> Evaluated:
        ends = {"empty": {}, "tried": 0, "ended": 0, "perplexity": None}
        kept = {"documents": {}, "samples": [], "groups": {}, "ends": ends}
        results = {"words": {"acc,none": 0.5, "sample_len": 10}}
        return Evaluated.of(str(folder), {"results": results, "higher_is_better": {"words": {"acc": True}}, **kept})

    patch.setattr(lm_eval, "evaluate", evaluate)
    patch.setattr(lm_eval, "tasks_digest", lambda settings: "words")


@pytest.fixture(scope="module")
def template(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    (folder / "mlflow").mkdir()
    shutil.copy(empty_database, folder / "mlflow" / "mlflow.db")
    return folder


@pytest.fixture(scope="module")
def warm(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What this process has loaded its children need not load."""
    import matplotlib.figure  # noqa: F401
    import mlflow.transformers  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEWIS_HOME", str(tmp_path_factory.mktemp("warm")))
        stub(patch)
        go(recipe, to_the_end=False)
        if POINTS:  # the model card asks for it
            builtin_tasks.index()


def undisturbed(recipe: Recipe, template: Path, folder: Path, how: str) -> tuple[str, dict[str, str], int]:
    shutil.copytree(template, folder)
    code, digest, places = run(recipe, folder, how, NEVER)
    assert code == 0
    return digest, merged(folder, digest), places


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "how", ["killed", "the disk is full", *(pytest.param(how, marks=full) for how in (ERROR_500, AFTERWARDS))]
)
def test_a_run_that_ends_at_any_place_is_done_again_with_the_same_result(
    how: str, recipe: Recipe, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, files, places = undisturbed(recipe, template, tmp_path / "undisturbed", how)
    assert places > 20
    count = min(POINTS or 2, places)
    wrong = []
    for i in range(count):
        where = 1 + int((i + 0.5) * places / count)
        home = tmp_path / f"home{where}"
        shutil.copytree(template, home)
        code, found, _ = run(recipe, home, how, where)
        if code not in (DIED, REFUSED) and (code, found) != (0, digest):
            wrong.append(f"{where}: exit code {code}")
        code, found, _ = run(recipe, home)
        monkeypatch.setenv("LEWIS_HOME", str(home))
        problems = [*left_over(home), *verify().damaged] if code == 0 else [f"exit code {code}"]
        if code == 0 and POINTS:
            news = [(move.version, move.happened) for move in outbox.moves()]
            problems += [
                half_done(home, expected=("challenger", "champion")),
                *([] if news == [("1", True)] else [f"the news are {news}"]),
            ]
        if any(problems) or (found, merged(home, found)) != (digest, files):
            wrong.append(f"{where} of {places}, run again: {problems}, {found}")
        shutil.rmtree(home)
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "experts", [pytest.param(("code",), id="one recipe", marks=full), pytest.param(("code", "lora"), id="two recipes")]
)
def test_runs_at_once_compute_and_register_once(
    experts: tuple[str, ...], family: Family, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recipes share the base and the expert `math`."""
    recipes = []
    for name in experts:
        models = [{"model": str(path)} for path in (family.math, getattr(family, name))]
        data = {**DATA, "base_model": str(family.base), "models": models, "register": {"name": f"tiny-{name}"}}
        recipes.append(parse(data))
    one_by_one, at_once = tmp_path / "one-by-one", tmp_path / "at-once"
    for home in (one_by_one, at_once):
        shutil.copytree(template, home)
    expected = [race([recipe], one_by_one)[0][0] for recipe in recipes]
    computed = sorted((tmp_path / "one-by-one.computed").read_text().split())
    assert all(expected) and computed.count("run") == len(recipes)

    count = 8 if POINTS else 3
    found, computed_at_once = race([recipes[i % len(recipes)] for i in range(count)], at_once)
    assert found == [expected[i % len(recipes)] for i in range(count)] and computed_at_once == computed
    monkeypatch.setenv("LEWIS_HOME", str(at_once))
    assert not left_over(at_once) and not verify().damaged
    for recipe, digest in zip(recipes, expected, strict=True):
        assert recipe.register_as is not None
        files = [merged(home, digest) for home in (one_by_one, at_once)]
        assert files[0] == files[1]
        assert not POINTS or not half_done(at_once, recipe.register_as.name)
