"""Registered versions with a lineage and without a merge, in a registry that is quick to make."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from lewis import store
from lewis.evaluation.gate import Verdict
from lewis.models.hub import repository
from lewis.registry import creation, promotion, tracking, versions
from lewis.registry.registration import Registration
from lewis.registry.versions import Champion, Version
from tests.conftest import Family
from tests.support.local_hub import LocalHub
from tests.support.models import write_tokenizer


def make_home(folder: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and MLflow on a database copied into it."""
    (folder / "mlflow").mkdir(parents=True)
    shutil.copy(database, folder / "mlflow" / "mlflow.db")
    monkeypatch.setenv("LEWIS_HOME", str(folder))
    return folder


@contextmanager
def hub_of(
    family: Family, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *others: str
) -> Iterator[LocalHub]:
    """A Hub for a store, with the family as `org/base`, `org/math`, `org/code`, and others of it by their names."""
    with LocalHub(folder / "hub") as hub:
        for name, value in (hub.environment(folder) | {"LEWIS_HOME": str(home)}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name in ("base", "math", "code", *others):
            hub.commit(f"org/{name}", getattr(family, name))
        yield hub


def registered(
    folder: Path,
    digit: str,
    lineage: Mapping[str, str],
    name: str,
    verdict: str | None = "failed",
    base: Path | None = None,
) -> Version:
    """A version of the model in `folder` that claims a lineage and a verdict; its digest is the digit, 64 times.

    An adapter needs the folder of its `base`.
    """
    digest = digit * 64
    checkpoint = store.home() / "merged" / digest
    with store.publish(checkpoint, {"digest": digest}) as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
    version = creation.register(Registration(name, checkpoint, digest, {}, {}, lineage, "", {}, {}, "", base=base))
    if verdict:
        with tracking.client("setting a verdict") as client:
            client.set_model_version_tag(version.name, version.version, "lewis.verdict", verdict)
    return version


def crowned(folder: Path, digit: str, name: str = "tiny", base: Path | None = None) -> Champion:
    """As `registered`, and the champion."""
    lineage = {"x": digit, **({"base": repository.resolve(str(base), folder).commit} if base else {})}
    version, current = registered(folder, digit, lineage, name, None, base), versions.champion(name)
    beside = current.version.uri if current else "base"
    assert promotion.promote(version, Verdict(True, ("a rule: pass",), beside, "acc 1 vs 0", "acc")).moved
    found = versions.champion(name)
    assert found is not None
    return found


def with_tokenizer(adapter: Path, folder: Path) -> Path:
    """A copy of an adapter with a tokenizer, as merged adapters have it."""
    shutil.copytree(adapter, folder)
    write_tokenizer(folder)
    return folder
