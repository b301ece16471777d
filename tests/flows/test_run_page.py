"""Which page of the store is the one that was asked for."""

from pathlib import Path

import pytest

from lewis import store
from lewis.registry import versions
from lewis.store import kinds
from lewis_flows import run_page
from tests.conftest import Family
from tests.support.lineage import crowned, make_home


def test_a_version_s_page_that_is_brought_here_is_not_taken_for_the_last_run_of_its_recipe(
    tmp_path: Path, empty_database: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_home(tmp_path / "home", empty_database, monkeypatch)
    versions.attach(crowned(family.base, "a").version, {versions.PAGE: "of version 1"})
    last = kinds.REPORTS.path(f"tiny_{'0' * run_page.ID}")
    store.write_text(last, "of the last run")
    for _ in range(2):  # the second time it is here already
        assert run_page.find("tiny/1").read_text() == "of version 1"
        assert run_page.find("tiny") == last
