"""The same bytes whatever happens to a merge: killed half way, other threads, another order, twice in a row."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lewis import store
from lewis.merging.run import Merge
from lewis.recipe.recipe import Recipe
from tests.conftest import Family
from tests.support import pipeline
from tests.support.models import open_merge, parse

LIMIT = 6000  # bytes of a shard, so that there are several
KILLED = """
import os, sys
from pathlib import Path
from tests.support import pipeline
from lewis.recipe.recipe import Recipe
recipe = Recipe.load(sys.argv[1])
base, experts = pipeline.pin_all(recipe)
merge = pipeline.prepare_merge(recipe, pipeline.download(base), [pipeline.download(expert) for expert in experts])
kill = lambda name, done, total: done > total / 2 and os.kill(os.getpid(), 9)
merge.run(Path(sys.argv[2]), max_shard_size=int(sys.argv[3]), progress=kill)
"""  # as the command line does it; to import this module would take longer


def prepare(text: str) -> Merge:
    recipe = Recipe.parse(text, root=Path("/"))
    base, experts = pipeline.pin_all(recipe)
    assert base is not None
    return pipeline.prepare_merge(recipe, pipeline.download(base), [pipeline.download(expert) for expert in experts])


def recipe_of(family: Family, **blocks: Any) -> str:
    models = [{"model": str(path), "parameters": {"density": 0.4}} for path in family.experts]
    data = {"merge_method": "dare_ties", "base_model": str(family.base), "models": models, "seed": 1, **blocks}
    return parse(data).text


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
class TestKilled:
    @pytest.fixture(scope="class")
    def dead(self, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The folder where a process was killed in the middle of a merge into `out`."""
        folder = tmp_path_factory.mktemp("dead")
        (folder / "recipe.yaml").write_text(recipe_of(family))
        place = folder / "place"
        command = [sys.executable, "-c", KILLED, str(folder / "recipe.yaml"), str(place / "out"), str(LIMIT)]
        ran = subprocess.run(command)
        assert ran.returncode == -signal.SIGKILL and len(list(place.iterdir())) == 1
        return place

    @pytest.fixture(scope="class")
    def undisturbed(self, family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        prepare(recipe_of(family)).run(out, max_shard_size=LIMIT)
        return content(out)

    @pytest.fixture
    def place(self, dead: Path, tmp_path: Path) -> Path:
        return shutil.copytree(dead, tmp_path / "place")

    @pytest.fixture
    def computed(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The tensors that are computed from here on."""
        write, names = Merge._write, []

        def noted(self: Merge, name: str, *arguments: Any) -> None:
            names.append(name)
            write(self, name, *arguments)

        monkeypatch.setattr(Merge, "_write", noted)
        return names

    def partial(self, place: Path) -> Path:
        (found,) = place.glob(".out.*.partial")
        return found

    def test_it_goes_on_with_the_same_bytes(
        self, family: Family, place: Path, computed: list[str], undisturbed: dict[str, bytes]
    ) -> None:
        merge, seen = prepare(recipe_of(family)), list[tuple[str, int, int]]()
        merge.run(place / "out", max_shard_size=LIMIT, progress=lambda *step: seen.append(step))
        assert content(place / "out") == undisturbed and os.listdir(place) == ["out"]
        assert 0 < len(computed) < len(merge.layout) - 3
        assert {name for name, _, _ in seen} == set(merge.layout) and seen[-1][1:] == (merge.elements,) * 2

    @pytest.mark.parametrize(
        "damage", ["bit", "short", "no file", "no journal", "torn journal", "flipped journal", "other notes"]
    )
    def test_what_is_damaged_is_computed_again(
        self, family: Family, place: Path, computed: list[str], undisturbed: dict[str, bytes], damage: str
    ) -> None:
        partial = self.partial(place)
        weights, journal = sorted(partial.glob("*.safetensors"))[0], partial / "journal.jsonl"
        finished = len(journal.read_text().splitlines())
        if damage == "bit":
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        elif damage == "short":
            os.truncate(weights, 1000)
        elif damage == "no file":
            weights.unlink()
        elif damage == "no journal":
            journal.unlink()
        elif damage == "torn journal":
            journal.write_bytes(journal.read_bytes()[:-30])
        elif damage == "flipped journal":
            lines = [bytearray(line) for line in journal.read_bytes().splitlines(keepends=True)]
            for number, line in enumerate(lines):
                line[(7 * number + len(line) // 2) % (len(line) - 1)] ^= 1
            journal.write_bytes(b"".join(lines))
        else:
            journal.write_text('[1]\n{"a": 2}\n[["x"], 3, 4]\n["model.safetensors", "x", "y"]\n["a", 12e45678, "y"]\n')
        (partial / ".lewis.json.1.abc.partial").write_text("half a manifest")
        (partial / "lewis.json").write_text("{}")
        merge = prepare(recipe_of(family))
        merge.run(place / "out", max_shard_size=LIMIT)
        assert content(place / "out") == undisturbed and os.listdir(place) == ["out"]
        assert len(computed) > len(merge.layout) - finished

    def test_another_recipe_does_not_believe_it(self, family: Family, place: Path, computed: list[str]) -> None:
        merge = prepare(recipe_of(family, seed=2))
        merge.run(place / "out", max_shard_size=LIMIT)
        assert sorted(computed) == sorted(merge.layout) and os.listdir(place) == ["out"]

    def test_another_shard_size_does_not_believe_it(self, family: Family, place: Path, computed: list[str]) -> None:
        merge = prepare(recipe_of(family))
        merge.run(place / "out")
        assert sorted(computed) == sorted(merge.layout) and os.listdir(place) == ["out"]

    def test_it_is_kept_for_a_day_beside_other_merges(self, family: Family, place: Path) -> None:
        partial = self.partial(place)
        with store.publish(place / "out.2", {}):
            assert partial.exists()
        with store.lock(str(partial)):  # it is being gone on with
            for path in (partial, *partial.iterdir()):
                os.utime(path, (time.time() - 2 * 86400,) * 2)
            store.sweep(place)
            assert partial.exists()
        store.sweep(place)
        assert not partial.exists()


@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear", "della"])
def test_threads_and_the_order_of_experts_change_no_byte(method: str, family: Family, tmp_path: Path) -> None:
    own = [{"weight": weight} | ({} if method == "linear" else {"density": 0.4}) for weight in (0.7, 1.2)]
    found = set()
    for threads, order in [*itertools.product((1, 2, 3), ((0, 1), (1, 0))), (3, (0, 1))]:
        experts, settings = [family.experts[i] for i in order], [own[i] for i in order]
        merge = open_merge(method, None if method == "linear" else family.base, experts, own=settings, dtype="bfloat16")
        merge.run(tmp_path / "out", threads=threads, max_shard_size=LIMIT)  # again and again to the same place
        weights = {name: data for name, data in content(tmp_path / "out").items() if name.endswith(".safetensors")}
        found.add(tuple(sorted(weights.items())))
    assert len(found) == 1
