"""How soon `lewis up` is ready, and how soon a commit has a run: parts of `tests.benchmarks.orchestration`."""

import time
from pathlib import Path

from lewis import settings
from tests.benchmarks.shared import bar, both, heading, row, write_family, write_recipe, write_release
from tests.support.local_hub import LocalHub
from tests.support.service import Service, seconds

RELEASES = 5
POLLED = 3  # releases that just miss a poll
STARTS = 3
READY = "Ctrl-C stops all of it"  # what `lewis up` says last


def event(root: Path) -> list[bool]:
    """Release an expert again and again, and see when its merge is Running; that is before it waits for rest."""
    with LocalHub(root / "hub") as hub:
        paths = write_family(root / "models", ["moving", "still", "late"], layers=2, hidden=16)
        for name in ("base", "moving", "still"):
            hub.commit(f"org/{name}", paths[name])
        service = Service(root, hub)
        write_recipe(service.recipes, "tiny", ["moving", "still"])
        to_run, to_start = [], []
        with service:
            for number in range(1, RELEASES + 1):
                released = write_release(paths["base"], root / f"release-{number}", seed=number)
                committed = time.time()
                hub.commit("org/moving", released)
                run = service.finished("tiny", number)[-1]
                assert run["state_name"] == "Promoted", run["state"]["message"]
                to_run.append(seconds(run, "created") - committed)
                to_start.append(seconds(run) - committed)
    heading(f"event to start: {RELEASES} releases, one after the other")
    row("commit -> webhook -> event -> run created, median / max", both(to_run))
    row("commit -> ... -> run Running, median / max", both(to_start))
    return [bar("  the slowest", max(to_start), 15)]


def poll(root: Path) -> list[bool]:
    """Release an expert each time that a poll has just ended, of which nothing but the next poll tells."""
    every = settings.POLL_SECONDS.get()
    with LocalHub(root / "hub") as hub:
        paths = write_family(root / "models", ["moving", "still"], layers=2, hidden=16)
        for name, path in paths.items():
            hub.commit(f"org/{name}", path)
        service = Service(root, hub, poll=every)
        write_recipe(service.recipes, "tiny", ["moving", "still"])
        to_start = []
        with service:
            hub.webhooks.clear()
            known = len(service.finished("tiny", 1, 300))  # the first poll starts those of models that are new
            polled = service.home / "last-poll.json"
            for number in range(1, POLLED + 1):
                released = write_release(paths["base"], root / f"release-{number}", seed=number)
                before = polled.read_text()
                service.until(lambda before=before: polled.read_text() != before, 3 * every)
                committed = time.time()
                hub.commit("org/moving", released)
                run = service.finished("tiny", known + number, 300)[-1]
                assert run["state_name"] == "Promoted", run["state"]["message"]
                to_start.append(seconds(run) - committed)
    heading(f"a commit that just misses a poll, of which there is one every {every} s: {POLLED} releases")
    row("commit -> next poll -> event -> run Running, median / max", both(to_start))
    return [bar("  the slowest", max(to_start), 60)]


def ready(root: Path) -> list[bool]:
    """Start `lewis up` again and again on a state that is there, with a recipe that was merged."""
    took = []
    with LocalHub(root / "hub") as hub:
        paths = write_family(root / "models", ["moving", "still"], layers=2, hidden=16)
        for name, path in paths.items():
            hub.commit(f"org/{name}", path)
        service = Service(root, hub)
        write_recipe(service.recipes, "tiny", ["moving", "still"])
        with service:
            service.start_run("merge/tiny")
            service.finished("tiny", 1)
            for number in range(2, STARTS + 2):
                service.stop()
                began = time.monotonic()
                service.start()
                service.until(lambda number=number: service.log.read_text().count(READY) == number, 60)
                took.append(time.monotonic() - began)
    heading(f"`lewis up` on a state that is there: {STARTS} starts")
    row("start -> all parts answer, a worker takes runs, median / max", both(took))
    return [bar("  the slowest", max(took), 30)]
