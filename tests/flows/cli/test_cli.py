"""The command line: what each command prints and writes, and the exit code and message of wrong input."""

import argparse
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pydantic
import pytest
import yaml

from lewis import store
from lewis.errors import InputError
from lewis.models.checkpoint import Checkpoint
from lewis.store import files
from lewis_flows.cli import run
from lewis_flows.cli.arguments import is_name, recipe_file
from lewis_flows.cli.main import main
from lewis_flows.cli.terminal import Terminal, output_is_full
from tests.conftest import Family
from tests.support.models import edit_json, rewrite, write_llama, write_tokenizer


def test_help_needs_no_heavy_import() -> None:
    check = """
import sys, lewis_flows.cli.main
try:
    lewis_flows.cli.main.main(["--help"])
finally:
    sys.exit(1 if {"torch", "prefect", "mlflow"} & set(sys.modules) else 0)
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("run", "plan", "merge", "importance", "allocate", "export", "demo", "up"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["run", "search"])
def test_a_link_in_the_folder_of_recipes_is_a_recipe_with_the_name_of_the_link(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The run was one of the file that the link leads to: another recipe, whose turn and champion it took."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    (tmp_path / "base.yaml").write_text(
        "{merge_method: ties, base_model: org/base, models: [{model: org/math}], evaluate: {tasks: [x]}, "
        "search: {space: {parameters.lambda: [1, 2]}, metrics: ['x/acc,none']}}"
    )
    (tmp_path / "recipes" / "prod.yaml").symlink_to(tmp_path / "base.yaml")
    flow = Mock(side_effect=InputError("no further"))
    monkeypatch.setattr(run, "_run_flow", flow)
    assert main([command, "prod"]) == 2
    assert flow.call_args.args[1] == str(tmp_path / "recipes" / "prod.yaml")


def test_a_folder_of_a_recipes_name_does_not_hide_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `lewis pull my-merge -o my-merge`, `lewis run my-merge` said that this is a folder."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").touch()
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "recipes"))
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    options = argparse.Namespace(recipe="mine")
    assert is_name("mine") and recipe_file(options) == str(tmp_path / "recipes" / "mine.yaml")
    assert not is_name("other") and not is_name("./mine")
    monkeypatch.setenv("LEWIS_RECIPES", str(tmp_path / "none"))
    assert not is_name("mine")


@pytest.mark.parametrize("form", [[], pytest.param(["--json"], marks=pytest.mark.long)])
def test_a_reader_that_has_enough_is_no_failure(form: list[str]) -> None:
    """`lewis history X | head` said: it failed: Broken pipe."""
    record = "history.Record('2026-01-01T00:00:00', 'promoted', 'models:/m/1', None, 'why ' * 2000, 'me')"
    code = f"""
import sys
from lewis.registry import history
from lewis_flows.cli.main import main
history.history = lambda name: [{record}] * 20
sys.exit(main(["history", "m", *sys.argv[1:]]))
"""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code, *form], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&- 2>&-", pytest.param("2>&-", marks=pytest.mark.long)])
def test_streams_that_the_caller_has_closed_are_the_null_device(recipe: Path, home: Path, closed: str) -> None:
    program = "import lewis_flows.cli.main as m; m.program()"
    command = ["sh", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", program]
    for arguments, code in (
        (["merge", str(recipe), "-o", str(home / "out"), "--set", "lewis=null"], 0),
        (["plan", "x"], 2),
    ):
        assert subprocess.run([*command, *arguments]).returncode == code
    assert (home / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("closed", ["2>&-", "<&-", ">&- 2>&-"])
def test_processes_that_it_starts_have_all_streams(tmp_path: Path, closed: str) -> None:
    """A server was started without a stderr: what it opened next took its place, and got its messages."""
    program = """
import json, os, subprocess, sys
from lewis_flows.cli import main, terminal
terminal.open_closed()
child = "import json, sys; print(json.dumps([None in (sys.stdin, sys.stdout, sys.stderr)]))"
done = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE)
open(sys.argv[1], "wb").write(done.stdout)
"""
    command = ["sh", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", program, str(tmp_path / "found")]
    subprocess.run(command, check=True)
    assert (tmp_path / "found").read_text() == "[false]\n"


@pytest.mark.parametrize("arguments", [["--version"], ["settings"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_is_not_taken_for_a_full_store(arguments: list[str], unbuffered: str) -> None:
    """It said to free space where the store is; and `--version` ended with a traceback, or with 0."""
    code = "import lewis_flows.cli.main as m; m.program()"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    told = "lewis: it failed: [Errno 28] No space left on device; there is no room for the output\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_names_from_models_command_no_terminal(home: Path) -> None:
    """The name of a tensor could set the window's title, or hide what followed."""
    evil, shown = "x\x1b]0;mine\x07\x1b[8m", "x\\x1b]0;mine\\x07\\x1b[8m"
    code = f"""
import logging, sys
from lewis.registry import history
from lewis.errors import InputError
from lewis_flows.cli import main, terminal
def found(name):
    terminal.show_log()
    logging.getLogger("lewis.x").warning("said %s", {evil!r})
    terminal.print_table([{{"name": {evil!r}, "[/b]": "[b]"}}])
    print("\\x1b[1mbold\\x1b[0m " + {evil!r}[:9])
    raise InputError({evil!r})
history.history = found
main.program()
"""
    done = subprocess.run([sys.executable, "-c", code, "history", "m"], capture_output=True, text=True)
    assert done.stderr == f"said {shown}\nlewis: {shown}\n"
    assert f"  {shown}   [b]" in done.stdout and "[/b]" in done.stdout
    assert done.stdout.endswith("\x1b[1mbold\x1b[0m x\\x1b]0;mine\n")


def test_a_terminal_that_lacks_characters_is_no_failure() -> None:
    """Where the locale is not UTF-8, the pictures of `lewis inspect` ended it with a traceback."""
    code = r"from lewis_flows.cli import terminal as t; t.show_controls(); print('\u2588 \udcff')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("\\u2588 \\udcff\n", "")


def test_an_output_that_is_not_buffered_stays_so() -> None:
    code = "import os; from lewis_flows.cli import terminal as t; t.show_controls(); print('now', end=' '); os._exit(0)"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment).stdout == b"now "


def test_an_error_of_something_else_writes_nothing_into_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    """It got an empty line, by which the program tried whether it is full."""
    assert not output_is_full(ConnectionRefusedError("no server"))
    assert capfd.readouterr().out == ""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"lewis \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_ctrl_c_is_how_one_stops_the_service(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It exited with 130, as if it had been broken off."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lewis_flows.service.up.up", stopped)
    assert main(["up"]) == 0
    assert "stopped; its state is kept" in capsys.readouterr().out


def test_ctrl_c_within_pydantic_is_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second in which Prefect reads its settings, it was a traceback."""

    class Inner(pydantic.BaseModel):
        @pydantic.model_serializer
        def stopped(self) -> None:
            raise KeyboardInterrupt

    class Outer(pydantic.BaseModel):
        @pydantic.model_serializer
        def inner(self) -> None:
            Inner().model_dump()

    monkeypatch.setattr("lewis_flows.service.up.up", lambda *_: Outer().model_dump())
    assert main(["up"]) == 130
    assert capsys.readouterr().err == "lewis: stopped; finished steps are kept, run the same command to go on\n"


@pytest.mark.parametrize("option", [["--trials", "0"], ["--trials", "2.5"], ["--minutes", "-1"]])
def test_a_search_of_nothing_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`--trials 0` made as many trials as the recipe says."""
    with pytest.raises(SystemExit, match="2"):
        main(["search", "recipe.yaml", *option])
    assert f"number above 0, got '{option[1]}'" in capsys.readouterr().err


def test_a_compiled_merge_needs_neither_torch_nor_scipy(family: Family, home: Path) -> None:
    """Importing torch would double the time and the memory of a small merge; scipy would add a fifth to its start."""
    experts = [{"model": str(folder), "parameters": {"density": 0.5}} for folder in family.experts]
    recipe = {"merge_method": "ties", "base_model": str(family.base), "models": experts, "dtype": "bfloat16"}
    recipe["exclude"] = ["embed_tokens"]
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    check = """
import gc, sys, lewis_flows.cli.main
code = lewis_flows.cli.main.main(["merge", *sys.argv[1:]])
sys.exit(code or not {"torch", "scipy", "coverage"}.isdisjoint(sys.modules) or not gc.isenabled())
"""
    command = [sys.executable, "-c", check, str(home / "recipe.yaml"), "-o", str(home / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_messages_go_to_what_stderr_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar takes its place while it is drawn; what goes past it ends up in its line."""
    handler = Terminal()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    handler.emit(logging.makeLogRecord({"msg": "merged"}))
    assert sys.stderr.getvalue() == "merged\n"


def test_the_settings_are_printed_without_secrets(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"LEWIS_WEBHOOK_SECRET": "hunter2", "LEWIS_STORE": "s3://me:hunter2@host/x"}.items():
        monkeypatch.setenv(name, value)
    assert main(["settings"]) == 0 and "LEWIS_WEBHOOK_SECRET" in (told := capsys.readouterr()).out
    assert "hunter2" not in told.out + told.err
    monkeypatch.setenv("LEWIS_STOER", "x")
    monkeypatch.setenv("LEWIS_QUOTA", "much")
    assert main(["settings", "--json"]) == 2
    told = capsys.readouterr()
    found = json.loads(told.out)
    values = {each["name"]: each["value"] for each in found["settings"]}
    assert values["LEWIS_HOME"] == str(home) and values["LEWIS_WEBHOOK_SECRET"] == "set"
    assert values["LEWIS_STORE"] == "s3://***@host/x" and values["LEWIS_QUOTA"] == "much"
    assert "LEWIS_STOER: there is no such setting; did you mean 'LEWIS_STORE'?" in found["unknown"]
    assert found["problems"] == [
        "LEWIS_QUOTA: expected a size such as 5GB or 500MB, got 'much'; change or unset it"
    ] and all(text in told.err for text in found["unknown"] + found["problems"])
    assert main(["gc"]) == 2 and "LEWIS_QUOTA: expected a size" in capsys.readouterr().err  # before any work


def test_plan_tells_inputs_steps_and_layers(
    recipe: Path, home: Path, family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipe), "--set", f"models[1].model={family.lora}"]) == 0
    digests = re.findall(r"^input .*  (sha256:\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert len({*digests}) == 3  # of the adapter its own, not that of its base
    assert main(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [len(row["commit"]) for row in plan["inputs"]] == [71, 71, 71]
    assert plan["covered_layers"] == 14 and plan["disk"] > 0 and plan["memory"] > 0
    [merge] = [step for step in plan["steps"] if step["name"] == "merge experts"]
    assert merge["state"] == "to do" and merge["cost"]["written"] > 0 and merge["cost"]["seconds"] > 0

    assert main(["merge", str(recipe), "-o", str(home.parent / "out")]) == 0
    assert main(["plan", str(recipe)]) == 0
    text = capsys.readouterr().out
    assert "cached  allocate" in text and "self_attn.q_proj: 2 layers (0 to 1)" in text


@pytest.mark.usefixtures("remembers_small_files")
@pytest.mark.parametrize("adapter", [True, pytest.param(False, marks=pytest.mark.long)])
def test_merge_reads_what_it_wrote_at_most_once(
    adapter: bool, recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum of each file comes from one pass over its bytes; card and facts need none."""
    out, read, hashed, preadv, sha256 = home.parent / "out", list[int](), list[Path](), os.preadv, store.file_sha256

    def counted(*arguments: Any) -> int:
        read.append(preadv(*arguments))
        return read[-1]

    def noted(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    main(["merge", str(recipe), "-o", str(home.parent / "before")])  # what is measured of the inputs is in the store
    monkeypatch.setattr(os, "preadv", counted)
    for place in (store, files):
        monkeypatch.setattr(place, "file_sha256", noted)
    settings = ["--set", "output={kind: lora, rank: 4}", "--set", "exclude=[norm]"] if adapter else []
    assert main(["merge", str(recipe), "-o", str(out), *settings]) == 0
    weights = out / ("adapter_model.safetensors" if adapter else "model.safetensors")
    assert weights.name not in [path.name for path in hashed]
    assert sum(read) == weights.stat().st_size


def test_merge_writes_an_adapter_and_plan_tells_of_it(
    recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, wanted = home.parent / "adapter", ["--set", "output={kind: lora, rank: 4}", "--set", "exclude=[norm]"]
    assert main(["merge", str(recipe), "-o", str(out), *wanted]) == 0
    told = capsys.readouterr().out
    assert re.search(
        r"LoRA adapter of 14 modules, rank 4, 2 saved whole; it leaves a relative error of 0\.\d+, at", told
    )
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "as a LoRA adapter on the base." in card
    assert main(["merge", str(recipe), "-o", str(out), "--json", *wanted]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["adapter"]["ranks"].values()) == {4}
    assert facts["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    card = (out / "README.md").read_text()
    assert "## The adapter\n\nLoRA adapter of 14 modules, rank 4" in card and "It sits on" in card
    assert main(["plan", str(recipe), *wanted]) == 0
    assert "output  LoRA adapter on" in capsys.readouterr().out


def test_merge_writes_a_model_and_replaces_only_its_own(
    recipe: Path, home: Path, family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    out = home.parent / "merged"
    assert main(["merge", str(recipe), "-o", str(out), "--max-shard-size", "20KB"]) == 0
    first, effort = capsys.readouterr().out.split("digest ")[1].splitlines()
    assert re.fullmatch(r"\d+\.\d s(, \d+\.\d\d GB/s read and written)?, \d+\.\d+ [MG]B of memory at the peak", effort)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    card = (out / "README.md").read_text()
    assert "## Licences of the parents" in card and "](density.png)" in card and (out / "density.png").is_file()
    assert Checkpoint(out, "x").tensors.keys() == Checkpoint(family.base, "x").tensors.keys()
    assert main(["merge", str(recipe), "-o", str(out)]) == 0
    assert (
        capsys.readouterr().out.split("digest ")[1].splitlines()[0] == first and (out / "model.safetensors").is_file()
    )
    assert main(["merge", str(recipe), "-o", str(family.base)]) == 2
    assert "not empty" in capsys.readouterr().err and (family.base / "config.json").is_file()


def test_importance_allocate_and_export(
    recipe: Path, home: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["importance", str(recipe), "-o", str(home / "i.json")]) == 0
    assert caplog.text.count("covered: 14 linear layers") == 1
    rows = json.loads((home / "i.json").read_text())["importance"]
    assert len(rows) == 3 and all(len(row["norms"]) == 14 for row in rows)
    assert capsys.readouterr().out.endswith("i.json: 3 measurements; passes run now: 3\n")
    assert main(["importance", str(recipe), "-o", str(home / "i.json")]) == 0
    assert capsys.readouterr().out.endswith("i.json: 3 measurements; passes run now: 0\n")

    assert main(["allocate", str(recipe), "-o", str(home / "a.json"), "--set", "lewis.density.max=0.7"]) == 0
    capsys.readouterr()
    assert (home / "a.png").read_bytes().startswith(b"\x89PNG")
    experts = json.loads((home / "a.json").read_text())["experts"]
    covered = [
        rho for each in experts.values() for name, rho in each["densities"].items() if name in each["differences"]
    ]
    assert len(experts) == 2 and min(covered) == 0.3 and max(covered) == 0.7

    assert main(["export", str(recipe), "-o", str(home / "mergekit.yaml")]) == 0
    exported = yaml.safe_load((home / "mergekit.yaml").read_text())
    assert "lewis" not in exported and "register" not in exported
    assert len(exported["models"][0]["parameters"]["density"]) == 20


def test_what_mergekit_cannot_do_is_told_before_any_work(
    recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(recipe), "--set", "lewis.prune_by=activation"]) == 2
    err = capsys.readouterr().err
    assert "lewis.prune_by: mergekit keeps elements by magnitude" in err and "`-o FILE.yaml`" not in err
    file = home / "mergekit.yaml"
    assert main(["export", str(recipe), "--set", "merge_method=pcb", "-o", str(file)]) == 2
    assert main(["allocate", str(recipe), "-o", str(file), "--set", "merge_method=regmean"]) == 2
    assert "are for methods with densities, such as ties" in capsys.readouterr().err and not file.exists()
    assert main(["allocate", str(recipe), "-o", str(file), "--set", "lewis=null"]) == 2
    assert "the recipe has no `lewis` block; " in capsys.readouterr().err and not file.exists()
    assert not (home / "importance").exists()


def test_a_refused_export_says_that_the_file_of_the_shell_is_empty(recipe: Path, home: Path) -> None:
    with (home.parent / "mergekit.yaml").open("w") as file:
        command = [sys.executable, "-m", "lewis_flows.cli.main", "export", str(recipe), "--set", "merge_method=pcb"]
        ended = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and not (home.parent / "mergekit.yaml").read_text()
    assert ended.stderr.endswith("nothing was written into the file of `>`; `-o FILE.yaml` leaves none\n")


@pytest.mark.parametrize("command", ["importance", "allocate"])
def test_what_is_no_place_for_a_file_is_told_before_any_work(
    command: str, recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (home.parent, recipe / "a.json", home / "a.png"):
        assert main([command, str(recipe), "-o", str(place)]) == 2
        assert f"-o {place}: expected the name of a JSON file in a folder" in capsys.readouterr().err
    assert not (home / "importance").exists()


@pytest.mark.parametrize("command", ["export -o", "importance -o", "allocate -o", "inspect --plot"])
def test_the_recipe_is_not_the_place_of_an_output(
    command: str, recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`lewis export mine.yaml -o mine.yaml` replaced the recipe, and its evaluate and register blocks were lost."""
    monkeypatch.chdir(recipe.parent)
    before, (name, option) = recipe.read_bytes(), command.split()
    assert main([name, str(recipe), option, recipe.name]) == 2
    assert f"{option} {recipe.name}: is the recipe, which would be lost" in capsys.readouterr().err
    assert recipe.read_bytes() == before and not (home / "importance").exists()


def test_the_picture_next_to_the_densities_has_a_place_too(
    recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the passes, with half of the output written, it failed: Is a directory: .../.a.png.f0a1.partial."""
    (home / "a.png").mkdir()
    assert main(["allocate", str(recipe), "-o", str(home / "a.json")]) == 2
    assert f"-o {home / 'a.png'}: expected the name of a file, got a folder" in capsys.readouterr().err
    assert not (home / "a.json").exists() and not (home / "importance").exists()


def _edited(change: Callable[[Path], None]) -> Callable[[Family, Path], Path]:
    def make(family: Family, folder: Path) -> Path:
        shutil.copytree(family.math, folder)
        change(folder)
        return folder

    return make


def _quantise(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lose_a_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _lead_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


EXPERTS: dict[str, tuple[Callable[[Family, Path], Path], str]] = {
    "quantised": (_edited(_quantise), "quantised"),
    "pickled": (_edited(_pickle), "pickled"),
    "missing shard": (_edited(_lose_a_shard), "model-00001-of-00002.safetensors"),
    "../ in the index": (_edited(_lead_outside), "outside"),
    "truncated": (_edited(_truncate), "safetensors"),
    "other shapes": (lambda family, folder: write_llama(folder, hidden=32), "shape"),
    "other vocabulary": (_edited(lambda folder: write_tokenizer(folder, [f"x{i}" for i in range(60)])), "vocabulary"),
    "a tensor less": (
        lambda family, folder: rewrite(family.math, folder, lambda name, t: None if "layers.1.mlp.up" in name else t),
        "model.layers.1.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("what", EXPERTS)
def test_a_wrong_expert_is_named(
    what: str, recipe: Path, home: Path, family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = EXPERTS[what]
    odd, out = make(family, home.parent / "odd"), home.parent / "out"
    assert main(["merge", str(recipe), "-o", str(out), "--set", f"models[0].model={odd}"]) == 2
    error = capsys.readouterr().err
    assert message in error and str(odd) in error
    assert not out.exists() and not list(home.parent.glob(".out*"))
    assert main(["allocate", str(recipe), "-o", str(out), "--set", f"models[0].model={odd}"]) == 2
    assert capsys.readouterr().err == error and not out.exists()


SETTINGS = {
    "unknown key": (["lewis.densty=1"], "did you mean 'density'"),
    "wrong type": (["seed=abc"], "seed: "),
    "unknown method": (["merge_method=tise"], "did you mean 'ties'"),
    "bounds": (["lewis.density.min=0.9"], "expected 0 < min <= max <= 1, got min=0.9, max=0.8"),
    "filter": (["parameters.weight=[{filter: self_attn.o_proj.1, value: 1}]"], "matches no tensor"),
    "no such model": (["models[0].model=./nowhere"], "nowhere"),
    "no such file": (["lewis.calibrations.words.data_files=gone.jsonl"], "gone.jsonl"),
    "no such column": (["lewis.calibrations.words.text='{questoin}'"], "questoin"),
    "empty texts": (["lewis.calibrations.words={texts: ['']}"], "expected texts, got empty ones"),
    "slices": (["slices=[]"], "slices"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_wrong_setting_is_named(what: str, recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, message = SETTINGS[what]
    out = home.parent / "out"
    arguments = [part for override in overrides for part in ("--set", override)]
    assert main(["merge", str(recipe), "-o", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.usefixtures("lm_eval_tasks")
def test_an_unknown_task_is_told_before_any_work(recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--set", "evaluate.tasks=[gsm9k]"]) == 2
    assert "gsm9k" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, expected",
    [
        ("register.gate.metric=words/ac,none", "did you mean 'words/acc,none'"),
        ("register.gate.tolerance={word: 0.1}", "there is no score with a value per document 'word'"),
        ("evaluate.weights={'words/acc': 1}", "did you mean 'words/acc,none'"),
        ("search={space: {seed: [1]}, metrics: [acc]}", "search.metrics: there is no score 'acc'"),
    ],
)
def test_a_wrong_name_of_a_score_is_told_before_any_work(
    wrong: str, expected: str, recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipe), "--set", wrong]) == 2
    assert expected in capsys.readouterr().err and not (home / "calibrations").exists()


def test_no_space_is_told_before_any_work(
    recipe: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert main(["merge", str(recipe), "-o", str(home.parent / "out"), "--set", "lewis=null"]) == 2
    assert "no space" in capsys.readouterr().err and not (home.parent / "out").exists()
