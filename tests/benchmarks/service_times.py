"""When `lewis up` is ready and a commit has a run, what bursts lead to, what rest costs: parts of `orchestration`."""

import os
import time
from itertools import accumulate
from pathlib import Path

from lewis import settings
from lewis.registry.lineage import commit_of, sources
from tests.benchmarks.shared import bar, both, heading, row, verdict, write_family, write_recipe, write_release
from tests.support.local_hub import LocalHub
from tests.support.service import Service, seconds

RELEASES = 5
POLLED = 3  # releases that just miss a poll
BURST = 10  # releases of one recipe, one every five seconds; and recipes that have their release at once
SLOTS = 2  # of the worker
STARTS = 3
REST = 10  # minutes for which `lewis up` has nothing to do
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
    return [bar("  the slowest", max(to_start), 10)]


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


def burst(root: Path) -> list[bool]:
    """Release one expert ten times within a minute: one run merges the newest."""
    with LocalHub(root / "hub") as hub:
        paths = write_family(root / "models", ["moving", "still"], layers=2, hidden=16)
        for name, path in paths.items():
            hub.commit(f"org/{name}", path)
        releases = [write_release(paths["base"], root / f"release-{each}", seed=each) for each in range(BURST)]
        service = Service(root, hub)
        write_recipe(service.recipes, "tiny", ["moving", "still"])
        with service:
            began = time.time()
            for number, released in enumerate(releases):
                time.sleep(max(began + 5 * number - time.time(), 0))
                newest = hub.commit("org/moving", released)
            last = time.time()
            time.sleep(5)  # the last release has its event, and so the run that merges it is there or counts it
            runs = service.finished("tiny", 1)
            held = [commit_of(sources(version.tags), "org/moving") or "" for version in service.versions("tiny")]
    merged = [run for run in runs if run["state_name"] == "Promoted"]
    heading(f"{BURST} releases of one recipe in {last - began:.0f} s")
    row("runs, and how they ended", ", ".join(run["state_name"] for run in runs))
    row("the last release -> its version is the champion", f"{seconds(merged[-1], 'end_time') - last:.1f} s")
    return [verdict("one merge, of the newest", len(merged) == 1 and held == [newest])]


def together(root: Path) -> list[bool]:
    """Release an expert that ten recipes have in common, where the worker has two slots."""
    names = [f"tiny{each}" for each in range(BURST)]
    with LocalHub(root / "hub") as hub:
        paths = write_family(root / "models", ["moving", *names], layers=2, hidden=16)
        for name, path in paths.items():
            hub.commit(f"org/{name}", path)
        released = write_release(paths["base"], root / "release", seed=1)
        service = Service(root, hub)
        service.environment["LEWIS_WORKER_LIMIT"] = str(SLOTS)
        for name in names:
            write_recipe(service.recipes, name, ["moving", name])
        with service:
            for name in names:
                service.until(lambda name=name: service.start_run(f"merge/{name}"), 60)  # once it is deployed
            for name in names:
                assert [run["state_name"] for run in service.finished(name, 1, 900)] == ["Promoted"]
            committed = time.time()
            newest = hub.commit("org/moving", released)
            runs = [run for name in names for run in service.finished(name, 2, 900)[1:]]
            held = [[commit_of(sources(each.tags), "org/moving") for each in service.versions(name)] for name in names]
    ends = sorted([(seconds(run), 1) for run in runs] + [(seconds(run, "end_time"), -1) for run in runs])
    going = list(accumulate(change for _, change in ends))
    heading(f"one release for {BURST} recipes, {SLOTS} slots")
    row("the release -> the last of their champions", f"{ends[-1][0] - committed:.0f} s")
    row("runs that go on at once, at most", str(max(going)))
    return [
        verdict("none lost, none twice", all(len(found) == 2 and found[0] == newest for found in held)),
        verdict("each promoted by one run", [run["state_name"] for run in runs] == ["Promoted"] * BURST),
        verdict("as many at once as there are slots", max(going) == SLOTS),
    ]


def rest(root: Path) -> list[bool]:
    """Leave `lewis up` with one recipe alone, and count what its processes take and what its files grow by."""
    with LocalHub(root / "hub") as hub:
        for name, path in write_family(root / "models", ["moving", "still"], layers=2, hidden=16).items():
            hub.commit(f"org/{name}", path)
        service = Service(root, hub, poll=settings.POLL_SECONDS.get())
        write_recipe(service.recipes, "tiny", ["moving", "still"])
        with service:
            service.finished("tiny", 1, 300)  # the first poll starts it
            time.sleep(120)  # until the server has written the last events of it
            spent, size, began = cpu(service), stored(service.home), time.monotonic()
            time.sleep(60 * REST)
            took = time.monotonic() - began
            core, memory = 100 * (cpu(service) - spent) / took, pss(service)
            growth = (stored(service.home) - size) / 1e6 * 86400 / took
    heading(f"`lewis up` with one recipe and a poll every {service.environment['LEWIS_POLL_SECONDS']} s, {REST} min")
    return [
        bar("of a core", core, 4, "%"),
        bar("memory of all processes, shared pages divided", memory, 800, "MB"),
        bar("growth of its folder a day", growth, 5, "MB"),
    ]


def cpu(service: Service) -> float:
    """Seconds of the processor that all processes of the service took, those that have ended included."""
    ticks = 0
    for pid in [service.process.pid, *service.parts()]:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def pss(service: Service) -> float:
    """MB of memory of the service; of what several processes share, each has its part."""
    total = 0
    for pid in [service.process.pid, *service.parts()]:
        line = next(each for each in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if "Pss:" in each)
        total += int(line.split()[1])
    return total * 1024 / 1e6


def stored(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
