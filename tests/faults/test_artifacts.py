"""A store of MLflow's artifacts that loses half of one object and says nothing: what is damaged is never believed."""

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow import MlflowClient
from mlflow.store.artifact import artifact_repository_registry as repositories
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from lewis import store
from lewis.errors import LewisError
from lewis.registry import creation, repair, tracking
from lewis.registry.pull import pull
from lewis.registry.registration import Registration
from tests.conftest import POINTS, Family
from tests.support.lineage import make_home

DIGEST = "a" * 64


class HalvingRepository(LocalArtifactRepository):
    """The artifacts of `odd:///FOLDER`, a place that is remote for a client of MLflow.

    Attributes:
        loses: the number of the upload that loses its second half; 0: none.
        uploads: the files that were uploaded, by their names.
    """

    loses = 0
    uploads: ClassVar[list[str]] = []

    def __init__(self, artifact_uri: str, *given: Any, **named: Any) -> None:
        super().__init__(artifact_uri.replace("odd:", "file:", 1), *given, **named)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        super().log_artifact(local_file, artifact_path)
        self._note(Path(self.artifact_dir, artifact_path or "", Path(local_file).name))

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        super().log_artifacts(local_dir, artifact_path)
        for path in sorted(path for path in Path(local_dir).rglob("*") if path.is_file()):
            self._note(Path(self.artifact_dir, artifact_path or "", path.relative_to(local_dir)))

    def _note(self, there: Path) -> None:
        self.uploads.append(there.name)
        if len(self.uploads) == self.loses:
            data = there.read_bytes()
            there.unlink()
            there.write_bytes(data[: len(data) // 2])


def registration(family: Family) -> Registration:
    """A merge that is in the store, with all that a run logs."""
    folder = store.home() / "merged" / DIGEST
    with store.publish(folder, {"digest": DIGEST}) as scratch:
        shutil.copytree(family.math, scratch, dirs_exist_ok=True)
    scores = {"merged/sums/acc,none": 0.5}
    tables = {"scores": [{"task": "sums", "merged": 0.5}]}
    given = {"merge_method": "ties"}, scores, {"x": "1" * 40}, "merge_method: ties\n", {"a.png": b"\x89PNG"}, tables
    return Registration("tiny", folder, DIGEST, *given, "# A card\n")


def prepared(home: Path, family: Family, database: Path, monkeypatch: pytest.MonkeyPatch, loses: int) -> Registration:
    """A store whose experiment keeps its files in a `HalvingRepository`."""
    make_home(home, database, monkeypatch)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which MLflow sets to the database of the home before
    monkeypatch.setattr(HalvingRepository, "loses", loses)
    monkeypatch.setattr(HalvingRepository, "uploads", [])
    new = registration(family)
    client = MlflowClient(tracking.database())
    client.create_experiment(tracking.experiment_name(), artifact_location=f"odd://{home}/artifacts")
    return new


def test_half_of_an_artifact_is_lost(
    family: Family, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(repositories._artifact_repository_registry._registry, "odd", HalvingRepository)
    creation.register(prepared(tmp_path / "whole", family, empty_database, monkeypatch, 0))
    assert not repair.verify().damaged
    names = HalvingRepository.uploads
    assert {"MLmodel", "version.json", "model.safetensors", "recipe.yaml", "scores.json", "card.md"} <= set(names)
    count = min(POINTS or 1, len(names))
    for number in sorted({1 + int((i + 0.5) * len(names) / count) for i in range(count)}):
        home, where = tmp_path / str(number), (number, names[number - 1])
        new = prepared(home, family, empty_database, monkeypatch, number)
        with tracking.client("looking") as client:
            try:
                creation.register(new)
            except LewisError as error:
                assert where[1] in str(error) and not client.search_model_versions("name='tiny'"), (where, error)
                of_run = []
            else:
                (damaged,) = repair.verify().damaged
                assert where[1] in damaged.why, (where, damaged)
                of_run = ["run"]
            again = creation.register(new)
            (found,) = client.search_model_versions(f"name='tiny' and tags.`lewis.digest`='{DIGEST}'")
        assert str(found.version) == again.version == "1", where
        # A file of its run is not made again: that it is damaged is said until a backup's is put back.
        assert [each.kind for each in repair.verify().damaged] == of_run, where
        shutil.rmtree(new.folder)
        pulled = pull(f"tiny/{again.version}", home / "pulled").folder
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (pulled / name).read_bytes() == (family.math / name).read_bytes(), (where, name)
