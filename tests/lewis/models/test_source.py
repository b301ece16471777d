"""References to models: how `model+adapter` is split, what experts are called in tables; and models opened once."""

import copy
import gc
import pickle
import re
import resource
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lewis.errors import InputError
from lewis.models.files.safetensors_file import TensorFile
from lewis.models.lora.expert import LoraExpert
from lewis.models.source import ModelFiles, download, pin, pin_at, short_names
from lewis.recipe.block import parts_of
from lewis_flows.cli.main import main
from tests.conftest import Family
from tests.support.local_hub import LocalHub
from tests.support.models import write_expert, write_llama


@pytest.mark.parametrize(
    "ref, parts",
    [
        ("org/base", ("org/base",)),
        ("org/base@v1+org/lora@v2", ("org/base@v1", "org/lora@v2")),
        ("./a+b+org/lora", ("./a+b", "org/lora")),
        ("./a+b", ("./a+b",)),
        ("./a+b+org/one@v1+org/two", ("./a+b", "org/one@v1", "org/two")),
        ("org/base+./a+b", ("org/base", "./a+b")),
    ],
)
def test_adapters_are_split_off_unless_a_folder_has_this_name(tmp_path: Path, ref: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "a+b").mkdir()
    assert parts_of(ref, tmp_path) == parts


@pytest.mark.parametrize("ref", ["+", "base+", "+lora", "base++lora", "{base}+"])
def test_a_plus_without_a_name_next_to_it_is_reported_with_the_reference(family: Family, ref: str) -> None:
    """The error said only that a reference was empty, not which."""
    given = ref.format(base=family.base)
    with pytest.raises(InputError, match=re.escape(f"{given}: expected model+adapter, got a '+' with nothing")):
        pin(given, Path("/"))


def test_a_folder_in_the_home_folder_may_have_a_plus_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a+b").mkdir()
    assert parts_of("~/a+b+org/lora", tmp_path / "recipes") == ("~/a+b", "org/lora")


@pytest.mark.parametrize(
    "refs, names",
    [
        (["org/base@v1", "/models/math/", "org/base+org/lora@v2"], ["org/base@v1", "math", "lora"]),
        (["a/math", "b/math", "b/code"], ["a/math", "b/math", "code"]),
        (["a/champion", "b/code"], ["a/champion", "code"]),
        (["a/mark", "b/code"], ["a/mark", "code"]),
        (["base", "./merged", "b/code"], ["./base", "./merged", "code"]),
    ],
)
def test_short_names(refs: list[str], names: list[str], tmp_path: Path) -> None:
    assert short_names(refs, tmp_path) == names


def test_a_model_is_pinned_to_what_it_was_elsewhere(
    family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repo of the Hub that has moved since, an adapter with and without its base, a folder that has moved."""
    with LocalHub(tmp_path / "hub") as hub:
        for name, value in hub.environment(tmp_path / "client").items():
            monkeypatch.setenv(name, value)
        for name in ("base", "math", "lora"):
            hub.commit(f"org/{name}", getattr(family, name))
        base = pin("org/base", tmp_path)
        for ref in ("org/base", "org/math@main", "org/lora", "org/base+org/lora"):
            before = pin(ref, tmp_path, base)
            for name in ("base", "math", "lora"):  # they all move
                hub.commit(f"org/{name}", getattr(family, name))
            found = pin_at(ref, before.key, tmp_path, base)
            assert (found.key, found.ref, pin(ref, tmp_path, base).key != before.key) == (before.key, ref, True)
            with pytest.raises(InputError, match="org/"):
                pin_at(ref, "0" * 40, tmp_path, base)
    folder = pin(str(family.math), tmp_path)
    assert pin_at(str(family.math), folder.key, tmp_path).key == folder.key
    with pytest.raises(InputError, match="expected sha256:0, as where the run began, but on this machine it is sha256"):
        pin_at(str(family.math), "sha256:0", tmp_path)


class TestOpen:
    @pytest.fixture
    def files(self, family: Family, tmp_path: Path) -> ModelFiles:
        return ModelFiles.at("m", "m", shutil.copytree(family.math, tmp_path / "math"))

    def test_the_same_files_are_opened_once(self, family: Family, files: ModelFiles) -> None:
        opened = files.open()
        again = ModelFiles.model_validate_json(files.model_dump_json())
        assert files.open() is again.open() is copy.deepcopy(files).open() is pickle.loads(pickle.dumps(files)).open()
        with ThreadPoolExecutor(4) as pool:
            assert {id(each) for each in pool.map(lambda _: files.open(), range(20))} == {id(opened)}
        assert files.model_copy(update={"key": "other"}).open() is not opened  # random streams depend on the key
        base = download(pin(str(family.base), files.folder))
        lora = download(pin(str(family.lora), files.folder, pin(str(family.base), files.folder)))
        adapter = lora.open()
        assert isinstance(adapter, LoraExpert) and adapter.base is base.open() and lora.open() is adapter

    def test_as_many_files_may_be_open_as_the_system_allows(self, files: ModelFiles) -> None:
        """Four models of 150 shards did not open."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        try:
            files.open()
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 10240), hard)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    @pytest.mark.slow
    def test_it_stays_open_as_long_as_one_of_its_references_or_users_exists(self, files: ModelFiles) -> None:
        one, other = files.model_copy(), files.model_copy()
        opened = weakref.ref(one.open())
        other.open()
        del one
        gc.collect()
        kept = opened()
        assert kept is not None and other.open() is kept
        del other
        gc.collect()
        assert opened() is kept
        del kept
        gc.collect()
        assert opened() is None

    @pytest.mark.parametrize(
        "damage, what",
        [
            (lambda path: path.write_bytes(path.read_bytes()[:-8]), "truncated"),
            (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), "no safetensors file"),
            (lambda path: path.unlink(), "no weights"),
            (lambda path: (path.parent / "config.json").write_text("["), "config.json"),
        ],
    )
    def test_what_changed_on_disk_is_opened_again(
        self, files: ModelFiles, damage: Callable[[Path], object], what: str
    ) -> None:
        before = files.open()
        damage(files.folder / "model.safetensors")
        with pytest.raises(InputError, match=what):
            files.open()
        del before

    def test_a_model_that_was_replaced_is_read_as_it_is_now(self, family: Family, files: ModelFiles) -> None:
        before, name = files.open(), "model.norm.weight"
        old = before.read(name)
        shutil.copyfile(family.code / "model.safetensors", files.folder / "new")
        (files.folder / "new").replace(files.folder / "model.safetensors")
        assert files.open().read(name).equal(ModelFiles.at("c", "c", family.code).open().read(name))
        assert before.read(name).equal(old)  # its user still reads the file that it opened

    @pytest.mark.slow
    def test_a_guided_merge_opens_each_file_once(
        self, family: Family, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each step opened them: the base 9 times, each expert 4 times."""
        read, whole = list[str](), TensorFile.__init__

        def noted(self: TensorFile, path: Path, *arguments: object) -> None:
            read.append(path.parent.name)
            whole(self, path, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(TensorFile, "__init__", noted)
        base = write_llama(tmp_path / "base")
        experts = [write_expert(base, tmp_path / name, seed=i) for i, name in enumerate(("math", "code"), 1)]
        shutil.copytree(family.lora, tmp_path / "lora")
        models = ", ".join(f"{{model: ./{name}}}" for name in (*(path.name for path in experts), "lora"))
        lewis = '{calibrations: {sums: {texts: ["w1 w2 w3", "w4 w5"], samples: 2}}}'
        recipe = f"{{merge_method: ties, base_model: ./base, models: [{models}], lewis: {lewis}}}"
        (tmp_path / "r.yaml").write_text(recipe)
        assert main(["merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "merged")]) == 0
        assert sorted(read) == ["base", "code", "lora", "math"]
