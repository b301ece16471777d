"""Housekeeping on real entries, with a real MLflow: what is needed or in use stays, the rest goes whole."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lewis import store
from lewis.allocation.step import AllocationEntry
from lewis.errors import InputError, LewisError, TransientError
from lewis.evaluation.gate import Verdict
from lewis.importance import measured
from lewis.importance.measured import Measured
from lewis.importance.step import CalibrationEntry, ImportanceEntry
from lewis.merging.step import MergedModel
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.registry import creation, promotion, tracking, versions
from lewis.registry.registration import registration_of
from lewis.registry.retention import by_versions
from lewis.store import housekeeping
from lewis.store.housekeeping import Removable, remove
from lewis_tasks.support.caching import RecordSerializer
from tests.conftest import Family
from tests.support import pipeline
from tests.support.lineage import make_home
from tests.support.models import parse

HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def mlflow_home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path / "home", empty_database, monkeypatch)


def survey(*args: Any, **options: Any) -> list[Removable]:
    """As `lewis gc` asks for it: what the registered versions need is kept."""
    return housekeeping.survey(*args, needed=by_versions(), **options)


def age(home: Path, days: float) -> None:
    """Let the store's entries be as many days older."""
    for path in home.rglob("*"):
        if path.is_file() and "mlflow" not in path.parts:
            then = path.stat().st_mtime - days * DAY
            os.utime(path, (then, then))


def json_entry(kind: str, name: str, content: dict[str, Any], *, age: float = 30 * DAY) -> Path:
    path = store.home() / kind / f"{name}.json"
    store.write_entry(path, content)
    return old(path, age)


def merged(name: str, *, age: float = 30 * DAY) -> Path:
    """A published folder of 100 bytes next to its manifest."""
    folder = store.home() / "merged" / (name * 64)
    with store.publish(folder, {"digest": name * 64}) as scratch:
        (scratch / "model.safetensors").write_bytes(b"x" * 100)
    old(folder / store.MANIFEST, age)
    return folder


def old(path: Path, age: float) -> Path:
    os.utime(path, (time.time() - age,) * 2)
    return path


def names(items: list[Removable]) -> set[str]:
    return {f"{item.kind}/{item.path.name}" for item in items}


class Made:
    """A guided merge by the real steps, with the scores of all models in it."""

    def __init__(self, family: Family, name: str, most: float = 0.8, text: str = "w1 w2 w3") -> None:
        self.recipe: Recipe = parse(
            {
                "merge_method": "ties",
                "base_model": str(family.base),
                "models": [{"model": str(family.math)}, {"model": str(family.code)}],
                "lewis": {"calibrations": {"sums": {"texts": [text], "samples": 1}}, "density": {"max": most}},
                "register": {"name": name},
            }
        )
        base, sources = pipeline.pin_all(self.recipe)
        assert base is not None
        self.base: ModelFiles = pipeline.download(base)
        self.experts = [pipeline.download(source) for source in sources]
        self.calibration = pipeline.prepare_calibration(self.recipe, "sums", self.base)
        found: tuple[list[ImportanceEntry], AllocationEntry] = pipeline.guide(self.recipe, self.base, self.experts)
        self.measured, self.allocated = found
        self.merged = self.merge()
        self.uniform = self.merge("uniform")
        self.scores = {
            name: json_entry("scores", f"{name}-{self.merged.digest[:8]}", {"model": key, "scores": [1]}, age=0)
            for name, key in {
                "base": self.base.key,
                "math": self.experts[0].key,
                "merged": self.merged.digest,
                "uniform": self.uniform.digest,
            }.items()
        }

    def merge(self, which: str = "experts") -> MergedModel:
        return pipeline.merge(self.recipe, self.base, self.experts, self.allocated, which)

    def register(self) -> versions.Version:
        entry = registration_of(
            self.recipe, self.base, self.experts, [self.calibration], self.allocated, self.merged, {}
        )
        return creation.register(entry)


def test_registered_merges_and_what_they_were_made_from_stay(family: Family, mlflow_home: Path) -> None:
    import mlflow

    champion, refused = Made(family, "tiny"), Made(family, "tiny", most=0.7)
    other = Made(family, "tiny", text="w7 w8")  # of a calibration set that no version has
    promotion.promote(champion.register(), Verdict(True, (), "base"))
    promotion.promote(refused.register(), Verdict(False, (), "models:/tiny/1"))
    age(mlflow_home, 15)
    inode = champion.merged.folder.stat().st_ino

    found = survey()
    expected = {f"importance/{entry.digest}.json" for entry in other.measured}
    expected |= {f"calibrations/{other.calibration.digest}.json", f"allocations/{other.allocated.digest}.json"}
    expected |= {f"merged/{made.uniform.digest}" for made in (champion, refused, other)}
    expected |= {f"scores/{made.scores['uniform'].name}" for made in (champion, refused, other)}
    expected |= {f"merged/{other.merged.digest}", f"scores/{other.scores['merged'].name}"}
    assert {name for name in names(found) if not name.startswith(("digests/", "pictures/"))} == expected
    (uniform,) = (item for item in found if item.path == champion.uniform.folder)
    assert uniform.bytes == sum(path.stat().st_size for path in uniform.path.iterdir()) > 10_000
    assert uniform.why == "not used for 15 days, not registered"
    assert all(item.path.exists() for item in found)

    assert remove(found) == sum(item.bytes for item in found)
    assert not any(item.path.exists() for item in found)
    assert not list(mlflow_home.rglob(".*.partial"))
    pipe = mlflow.transformers.load_model("models:/tiny@champion")
    assert type(pipe).__name__ == "TextGenerationPipeline"
    with tracking.client("looking") as client:
        known = [versions.find(client, "tiny", made.merged.digest) for made in (champion, refused)]
    assert [each and each.version for each in known] == ["1", "2"]
    assert champion.merge().folder.stat().st_ino == inode  # found, not made again
    assert pipeline.find_merged(refused.merged.digest) is not None
    assert survey() == []
    shutil.rmtree(champion.merged.folder)  # as in the store of a machine that did not merge it
    assert by_versions()["allocations"].includes(champion.allocated.path)


def test_weights_that_mlflow_holds_too_are_not_counted_as_freed(family: Family, mlflow_home: Path) -> None:
    import mlflow

    made = Made(family, "tiny")
    promotion.promote(made.register(), Verdict(True, (), "base"))
    mlflow.MlflowClient().delete_registered_model_alias("tiny", "champion")
    mlflow.MlflowClient().delete_model_version("tiny", "1")
    age(mlflow_home, 15)
    (item,) = (item for item in survey() if item.path == made.merged.folder)
    sizes = {path.name: path.stat().st_size for path in item.path.iterdir()}
    assert item.bytes == sum(size for name, size in sizes.items() if not name.endswith(".safetensors"))
    assert remove([item]) == item.bytes
    assert (
        next((mlflow_home / "mlflow" / "artifacts").rglob("*.safetensors")).stat().st_size == sizes["model.safetensors"]
    )


@pytest.mark.slow
def test_without_mlflow_nothing_is_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = merged("a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TransientError, match="listing the registered versions"):
        survey(0)
    assert pipeline.find_merged(folder.name) is not None


def test_versions_in_an_mlflow_that_is_not_named_are_not_taken_for_none(mlflow_home: Path) -> None:
    """Where only the service's unit has MLFLOW_TRACKING_URI, `gc --yes` removed the champion's merge."""
    with tracking.client("making the folder of artifacts"):
        pass
    folder = merged("a")
    (mlflow_home / "mlflow" / "mlflow.db").rename(mlflow_home / "elsewhere.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # to which MLflow has set it
        for left in ("nothing", "an empty file"):
            if left != "nothing":
                (mlflow_home / "mlflow" / "mlflow.db").touch()
            with pytest.raises(InputError, match=r"URI is not set, and .*mlflow\.db is missing or empty; set"):
                survey()
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_home}/elsewhere.db")
        assert names(survey()) == {f"merged/{folder.name}"}


def test_a_look_makes_no_database_and_marks_nothing(home: Path) -> None:
    folder, entry = merged("a"), json_entry("importance", "i", {"norms": {"x": 1.0}})
    first = survey()
    assert names(first) == {f"merged/{'a' * 64}", "importance/i.json"} and survey() == first
    assert not (home / "mlflow").exists() and folder.is_dir() and entry.is_file()


class TestUse:
    def test_a_hit_keeps_an_entry(self, home: Path) -> None:
        folders = [merged("a"), merged("b")]
        used, unused = (json_entry("scores", name, {"model": "m", "scores": [1]}) for name in ("used", "unused"))
        assert pipeline.find_merged("a" * 64) and store.entry(used, "scores")
        for path in (folders[0] / store.MANIFEST, used):
            old(path, DAY - 60 if path.stat().st_mtime > time.time() - 60 else 99 * DAY)  # the hit was yesterday
        assert names(survey()) == {f"merged/{'b' * 64}", f"scores/{unused.name}"}
        assert names(survey(0.5)) == {f"merged/{each * 64}" for each in "ab"} | {
            "scores/used.json",
            "scores/unused.json",
        }

    def test_a_merged_model_that_is_merged_again_is_in_use(self, family: Family, home: Path) -> None:
        folder = home / "merged" / ("a" * 64)
        with store.publish(folder, {"digest": "a" * 64}) as scratch:
            shutil.copytree(family.math, scratch, dirs_exist_ok=True)
        files = ModelFiles.at("local", "key", folder)
        age(home, 30)
        assert names(survey()) == {f"merged/{'a' * 64}"}
        ModelFiles.model_validate(files.model_dump())
        assert survey() == []

    def test_a_calibration_set_is_in_use_when_it_is_referred_to(self, home: Path) -> None:
        path = json_entry("calibrations", "c", {"name": "c", "samples": [[1]]})
        assert names(survey()) == {"calibrations/c.json"}
        CalibrationEntry(name="c", digest="c", tokens=1, path=path)
        assert survey() == []

    @pytest.mark.parametrize(("hours", "kept"), [(0, True), (1.9, True), (2.1, False)])
    def test_what_was_used_in_the_last_hour_stays_whatever_the_days(self, home: Path, hours: float, kept: bool) -> None:
        json_entry("importance", "i", {"norms": {"x": 1.0}}, age=hours * HOUR)  # a mark lags by up to an hour
        assert (survey(0) == []) == kept

    @pytest.mark.parametrize(("started", "kept"), [(None, False), (5, False), (6.1, True)])
    def test_what_a_run_that_goes_on_uses_stays(self, home: Path, started: float | None, kept: bool) -> None:
        merged("a", age=7 * HOUR)
        since = None if started is None else time.time() - started * HOUR
        assert (survey(0, active_since=since) == []) == kept

    @pytest.mark.parametrize("days", [-1, float("nan")])
    def test_days_are_checked(self, home: Path, days: float) -> None:
        with pytest.raises(InputError, match="days: expected a number from 0 up, got"):
            survey(days)


class TestRemove:
    @pytest.fixture
    def holder(self, home: Path) -> Iterator[subprocess.Popen[str]]:
        """Another process that holds the lock of the merge `aaa...`, as a run does that makes or finds it."""
        code = "from lewis import store\nwith store.lock('merged-' + 'a' * 64): print('held', flush=True); input()\n"
        process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()
        process.communicate()

    def test_a_run_that_holds_the_lock_wins(self, home: Path, holder: subprocess.Popen[str]) -> None:
        folder, entry = merged("a"), json_entry("importance", "i", {"norms": {"x": 1.0}})
        found = survey()
        assert remove(found) == sum(item.bytes for item in found if item.kind == "importance")
        assert pipeline.find_merged(folder.name) is not None and not entry.exists()
        holder.communicate("\n")
        old(folder / store.MANIFEST, 30 * DAY)
        assert remove(survey()) > 100
        assert list((home / "merged").iterdir()) == []

    def test_what_was_used_since_the_look_stays(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, entry = merged("a"), json_entry("calibrations", "c", {"name": "c", "samples": []})
        found = survey()
        store.read_entry(entry)
        assert pipeline.find_merged(folder.name) is not None
        monkeypatch.setattr(os, "rename", None)  # not even for a moment is it out of sight
        assert len(found) == 2 and remove(found) == 0
        assert pipeline.find_merged(folder.name) is not None and entry.is_file()

    def test_a_reader_that_comes_at_the_last_moment_wins(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, rename = merged("a"), os.rename

        def read_then_rename(source: Path, target: Path) -> None:
            assert source != folder or store.read_manifest(folder)
            rename(source, target)

        found = survey()
        monkeypatch.setattr(os, "rename", read_then_rename)
        assert remove(found) == 0
        assert pipeline.find_merged(folder.name) is not None and [folder] == list((home / "merged").iterdir())

    def test_what_is_gone_already_is_no_failure(self, home: Path) -> None:
        merged("a"), merged("b")
        found = survey()
        assert remove(found) == sum(item.bytes for item in found) and remove(found) == 0

    def test_one_failure_does_not_stop_the_rest(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folders, rename = [merged("a"), merged("b")], os.rename

        def refuse(source: Path, target: Path) -> None:
            if source == folders[0]:
                raise PermissionError(13, "Permission denied")
            rename(source, target)

        monkeypatch.setattr(os, "rename", refuse)
        with pytest.raises(LewisError, match=r"1 of 2 entries could not be removed.*/merged/a+: Permission denied"):
            remove(survey())
        assert [folder.exists() for folder in folders] == [True, False]


class TestRecords:
    def record(self, key: str, value: Any, *, age: float = 30 * DAY) -> Path:
        """A task's result as Prefect keeps it."""
        from prefect.filesystems import LocalFileSystem
        from prefect.results import ResultStore

        storage = LocalFileSystem(basepath=str(store.home() / "results"))
        ResultStore(result_storage=storage, serializer=RecordSerializer()).write(key=key, obj=value)
        return old(store.home() / "results" / key, age)

    def importance(self, name: str) -> ImportanceEntry:
        path = store.home() / "importance" / f"{name}.json"
        measured.write(path, Measured({"x": 1.0}, {"x": torch.ones(2)}), {})
        entry = ImportanceEntry(ref="r", calibration="c", digest=name, path=path)
        old(path, 30 * DAY)
        return entry

    def test_one_goes_with_what_it_refers_to(self, home: Path) -> None:
        goes, stays, gone = (self.importance(name) for name in ("goes", "stays", "gone"))
        for entry in (goes, stays, gone):
            self.record(f"measure-{entry.digest}", entry, age=3 * DAY)
        store.mark_used(stays.path)
        gone.path.unlink()
        gone.path.with_suffix(".safetensors").unlink()
        found = survey()
        assert names(found) == {"importance/goes.json", "results/measure-goes", "results/measure-gone"}
        assert remove(found) == sum(item.bytes for item in found) > 0
        assert [path.name for path in (home / "results").iterdir()] == ["measure-stays"]
        assert {path.stem for path in (home / "importance").iterdir()} == {"stays"}

    def test_one_of_several_entries_goes_with_any_of_them(self, home: Path) -> None:
        stays, gone = (self.importance(name) for name in ("stays", "gone"))
        self.record("measure-both", [stays, gone], age=3 * DAY)
        store.mark_used(stays.path)
        store.mark_used(gone.path)
        assert names(survey()) == set()
        gone.path.unlink()
        assert names(survey()) == {"results/measure-both"}

    def test_one_goes_with_a_reference_in_its_reference(self, home: Path) -> None:
        """Densities name the measurements that task vectors are pruned by, and with `aim` those of the base."""
        expert, base = (self.importance(name) for name in ("expert", "base"))
        path = home / "allocations" / "a.json"
        store.write_entry(path, {"experts": {"r": {}}})
        made = AllocationEntry(digest="a", path=path, means={"r": 0.5}, measured={"r": expert}, base=(base,))
        self.record("allocate-a", made, age=3 * DAY)
        for entry in (expert, base):
            store.mark_used(entry.path)
        assert names(survey()) == set()
        base.path.unlink()
        assert names(survey()) == {"results/allocate-a"}

    def test_one_that_was_just_written_stays(self, home: Path) -> None:
        self.record("measure-x", gone := self.importance("x"), age=0)
        gone.path.unlink()
        assert survey(0) == []

    def test_one_stays_with_what_a_run_has_begun_to_use(self, home: Path) -> None:
        record = self.record("measure-x", self.importance("x"))
        found = survey()
        store.entry(home / "importance" / "x.json", "norms")
        assert names(found) == {"importance/x.json", "results/measure-x"} and remove(found) == 0 and record.is_file()

    def test_one_of_files_outside_goes_by_age_and_never_under_a_run(self, home: Path, family: Family) -> None:
        self.record("download-old", ModelFiles.at("r", "k", family.base))
        self.record("download-new", ModelFiles.at("r", "k", family.base), age=DAY)
        assert names(survey()) == {"results/download-old"}
        assert survey(active_since=time.time()) == []


class TestLeftovers:
    def test_of_dead_processes_go_when_nobody_writes_them(self, home: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from lewis import store\n"
            "with store.publish(store.home() / 'merged' / 'x', {}) as scratch:\n"
            "    (scratch / 'half').write_text('x' * 1000); os.kill(os.getpid(), 9)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == -9
        ours = store.beside(home / "scores" / "s.json")
        ours.parent.mkdir()
        ours.write_text("being written")
        assert survey(0) == []  # on a shared file system it could be another machine's
        (half,) = (home / "merged").iterdir()
        for path in (half, half / "half", ours):
            old(path, 3 * HOUR)
        (found,) = survey()
        assert (found.kind, found.bytes, found.path) == ("partial", 1000, half)
        assert remove([found]) == 1000 and list((home / "merged").iterdir()) == [] and ours.exists()

    @pytest.mark.parametrize("name", ["home", "mlflow"])
    def test_each_run_removes_those_of_processes_of_this_machine(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The page of a run has a name of its own, so no later run writes it again."""
        home = tmp_path / name
        monkeypatch.setenv("LEWIS_HOME", str(home))
        code = (
            "import os; from lewis.store import files, kinds\n"
            "with files.written_beside(kinds.REPORTS.path('tiny_1')) as page:\n"
            "    page.write_text('half'); os.kill(os.getpid(), 9)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == -9
        (half,) = (home / "reports").iterdir()
        ours, theirs = store.beside(home / "reports" / "tiny_2.html"), home / "prefect" / half.name
        theirs.parent.mkdir()
        for path in (ours, theirs):
            path.write_text("being written")
        above = home / half.name
        above.write_text("half")
        housekeeping.sweep()
        assert not half.exists() and not above.exists() and ours.exists() and theirs.exists()


def test_logs_of_living_processes_stay(home: Path) -> None:
    (home / "logs").mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours, died = store.writer(), f"{store.writer().rpartition('-')[0]}-{dead.pid}"
    for writer in (ours, died):
        old_log = home / "logs" / f"worker-{writer}.log"
        old_log.write_text("line\n")
        old(old_log, 30 * DAY)
    assert names(survey()) == {f"logs/worker-{died}.log"}


def test_what_was_read_of_a_gguf_file_goes_when_it_is_unused(home: Path) -> None:
    folders = [home / "gguf" / name for name in ("used", "unused")]
    for folder in folders:
        with store.publish(folder, {}) as scratch:
            (scratch / "table.json").write_text("{}")
            (scratch / "model.gguf").symlink_to(home / "elsewhere.gguf")
        old(folder / store.MANIFEST, 30 * DAY)
    assert store.read_manifest(folders[0])
    found = survey()
    assert names(found) == {"gguf/unused"} and remove(found) > 0
    assert [folder.exists() for folder in folders] == [True, False]


def test_what_is_not_ours_stays(home: Path) -> None:
    for name in (
        "prefect/prefect.db",
        "demo/demo.yaml",
        "locks/x.lock",
        "runs/id",
        "merged/thesis/a.txt",
        "merged/a.txt",
        "note.json",
    ):
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        old(path, 99 * DAY)
    assert survey(0) == []
