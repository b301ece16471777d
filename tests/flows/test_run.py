"""The whole DAG as a user runs it: real processes, a real Prefect server, a real registry."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lewis.recipe.recipe import Recipe
from lewis_flows.cli.main import main
from tests.conftest import SESSION_HOME, Family
from tests.flows.conftest import Command
from tests.support import pipeline
from tests.support.local_hub import LocalHub
from tests.support.service import children

SLOW = (
    "import time, lewis.merging.run as m; f = m.Merge._write; n = []\n"
    "m.Merge._write = lambda s, *a: (n.append(a), len(n) == 5 and (print('HERE', flush=True), time.sleep(60)),"
    " f(s, *a))[2]"
)
NO_SCORES = ("--set", "evaluate=null", "--set", "register.gate=null")


def finished(process: subprocess.Popen[str], timeout: float = 500) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def report(process: subprocess.Popen[str]) -> dict:
    code, out, err = finished(process)
    assert code == 0, err
    return json.loads(out)


def states(log: str) -> dict[str, str]:
    """Task run -> the state it finished in, from the log on the terminal."""
    return dict(re.findall(r"Task run '([^']+)' - Finished in state (\w+)", log))


def leftovers(home: Path) -> list[Path]:
    return [path for path in home.rglob("*.partial") if "locks" not in path.parts]


def by_the_library(recipe: Path, folder: Path) -> tuple[str, bytes]:
    """Digest and weights of the merge, one step after another in this process."""
    plan = Recipe.load(recipe)
    source, sources = pipeline.pin_all(plan)
    assert source is not None
    base, experts = pipeline.download(source), [pipeline.download(each) for each in sources]
    prepared = pipeline.prepare_merge(plan, base, experts, pipeline.guide(plan, base, experts)[1])
    prepared.run(folder)
    return prepared.digest, (folder / "model.safetensors").read_bytes()


def versions(home: Path, name: str = "tiny") -> list:
    from mlflow import MlflowClient

    return list(MlflowClient(f"sqlite:///{home}/mlflow/mlflow.db").search_model_versions(f"name='{name}'"))


def test_a_killed_run_is_resumed_scores_registers_and_promotes_and_the_next_is_cached(
    lewis: Command, recipe: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the merge; tests/faults/test_crashes.py kills the library in many other places."""
    killed = lewis("run", recipe, *NO_SCORES, patch=SLOW)
    assert killed.stdout is not None and killed.stdout.readline() == "HERE\n"
    killed.kill()
    killed.wait()

    first = report(lewis("run", recipe, "--json"))
    assert len(versions(home)) == 1 and not leftovers(home)
    assert first["version"] == "models:/tiny/1" and first["created"] and first["promoted"]
    assert [row["model"] for row in first["scores"]] == ["base", "math", "code", "uniform", "merged"]
    assert first["mean_density"].keys() == {entry["ref"] for entry in _inputs(home, first)}

    left = Path(SESSION_HOME, "lewis-tmp-eval-killed")  # a run that finds all done needs no such folder itself
    left.mkdir()
    code, out, err = finished(lewis("run", recipe, "--json"))
    second = json.loads(out)
    assert not left.exists()
    assert code == 0 and second["digest"] == first["digest"] and not second["created"]
    done = states(err)
    expensive = [name for name in done if name.split()[0] in ("download", "measure", "merge", "evaluate")]
    assert len(expensive) == 3 + 3 + 2 + 5 and {done[name] for name in expensive} == {"Cached"}
    assert len(versions(home)) == 1

    found = (first["digest"], (Path(first["folder"]) / "model.safetensors").read_bytes())
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "undisturbed"))
    assert found == by_the_library(recipe, tmp_path / "merged")


@pytest.mark.long
def test_a_merge_that_was_deleted_is_made_again(lewis: Command, recipe: Path, home: Path) -> None:
    """A cache that believes in deleted output would lie."""
    first = report(lewis("run", recipe, "--json", *NO_SCORES))
    shutil.rmtree(first["folder"])
    code, out, err = finished(lewis("run", recipe, "--json", *NO_SCORES))
    assert code == 0 and states(err)["merge experts"] == "Completed"
    assert json.loads(out)["digest"] == first["digest"]


def _inputs(home: Path, found: dict) -> list[dict]:
    manifest = json.loads((Path(found["folder"]) / "lewis.json").read_text())
    _, *experts = manifest["inputs"]
    return [{"ref": ref} for ref in experts]


@pytest.mark.long
def test_ctrl_c_leaves_nothing_half_written(lewis: Command, recipe: Path, home: Path) -> None:
    patch = SLOW.replace("time.sleep(60)", "time.sleep(3)")
    process = lewis("run", recipe, *NO_SCORES, patch=patch)
    assert process.stdout is not None and process.stdout.readline() == "HERE\n"
    process.send_signal(signal.SIGINT)
    code, _, _ = finished(process, timeout=60)
    assert code != 0
    assert not leftovers(home)
    assert (home / "merged").is_dir()


def test_ctrl_c_in_an_import_ends_the_run_and_the_server_that_it_started(
    lewis: Command, recipe: Path, tmp_path: Path
) -> None:
    """An exception in an import may become another one: libraries catch it, and so do callbacks of the interpreter."""
    (tmp_path / "slow.py").write_text(
        "import time\nprint('HERE', flush=True)\ntry:\n    time.sleep(60)\n"
        "except BaseException:\n    raise RuntimeError('half imported')\n"
    )
    patch = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lewis_flows.cli import run; run._LIBRARIES = ['slow']"
    )
    process = lewis("run", recipe, patch=patch, PREFECT_API_URL="")
    assert process.stdout and process.stdout.readline() == "HERE\n"
    server = children(process.pid)
    assert any("prefect_app" in words for words in server.values())
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process, 30)
    assert (code, err) == (130, "lewis: stopped; finished steps are kept, run the same command to go on\n")
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in server if Path(f"/proc/{pid}").exists()]


@pytest.mark.long
def test_two_runs_at_once_compute_once_and_a_truncated_merge_is_made_again(
    lewis: Command, recipe: Path, home: Path
) -> None:
    patch = (
        "import lewis.merging.run as m; f = m.Merge.run\n"
        "m.Merge.run = lambda *a, **k: (print('COMPUTED', flush=True), f(*a, **k))[1]"
    )
    both = [lewis("run", recipe, *NO_SCORES, patch=patch) for _ in range(2)]
    results = [finished(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], [err[-2000:] for code, _, err in results if code]
    assert sum(out.count("COMPUTED") for _, out, _ in results) == 1
    assert len(versions(home)) == 1

    (weights,) = home.glob("merged/*/model.safetensors")
    content = weights.read_bytes()
    weights.chmod(0o600)
    os.truncate(weights, 1000)
    again = report(lewis("run", recipe, "--json", *NO_SCORES))
    assert Path(again["folder"]) == weights.parent and weights.read_bytes() == content


@pytest.mark.long
def test_models_from_a_hub_that_stumbles_and_back_to_it(
    lewis: Command, recipe: Path, family: Family, tmp_path: Path, home: Path
) -> None:
    with LocalHub(tmp_path / "hub") as hub:
        hub.commit("org/base", family.base)
        hub.commit("org/math", family.math)
        hub.faults.append({"path": r"org/math/.*safetensors", "method": "GET", "times": 1, "corrupt": True})
        text = recipe.read_text().replace(str(family.base), "org/base").replace(str(family.math), "org/math")
        recipe.write_text(text + "publish: {repo: org/merged}\n")
        secret = {"HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1"}
        environment = {**hub.environment(tmp_path / "client"), "LEWIS_HOME": str(home), **secret}
        code, out, err = finished(lewis("run", recipe, "--json", *NO_SCORES, **environment))
        assert code == 0, err
        found = json.loads(out)
        manifest = json.loads((Path(found["folder"]) / "lewis.json").read_text())
        assert len(manifest["inputs"]["org/base"]) == 40  # a pinned commit

        merged = hub.repos["model", "org/merged"]
        head = merged.branches["main"]
        assert merged.private and found["published"] == f"{hub.url}/org/merged/tree/{head}"
        assert {name: blob.path.read_bytes() for name, blob in merged.commits[head].items()} == {
            path.name: path.read_bytes() for path in Path(found["folder"]).iterdir()
        }
        [version] = versions(home)
        assert version.tags["lewis.published"] == f"org/merged@{head}"
        assert "hf_alice" not in out + err
        assert not [path for path in home.rglob("*") if path.is_file() and b"hf_alice" in path.read_bytes()]

        del hub.repos["model", "org/merged"]
        code, _, err = finished(lewis("run", recipe, *NO_SCORES, **environment))
        assert code == 0 and "Finished in state Completed" in err.splitlines()[-1], err  # not Cached: it published
        assert hub.repos["model", "org/merged"].branches["main"]


def test_a_wrong_model_fails_early_and_registers_nothing(
    recipe: Path,
    home: Path,
    family: Family,
    prefect_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    odd = home.parent / "odd"
    shutil.copytree(family.math, odd)
    data = bytearray((odd / "model.safetensors").read_bytes())
    (odd / "model.safetensors").write_bytes(data[:-100])
    assert main(["run", str(recipe), "--set", f"models[0].model={odd}"]) == 2
    err = capsys.readouterr().err
    assert "safetensors" in err and str(odd) in err
    assert not (home / "merged").exists() and not versions(home)


@pytest.mark.long
def test_nan_in_an_input_is_named_and_nothing_is_written(
    lewis: Command, recipe: Path, home: Path, family: Family
) -> None:
    from tests.support.models import rewrite

    broken = rewrite(
        family.math, home.parent / "nan", lambda name, tensor: tensor if "norm" not in name else tensor * float("nan")
    )
    arguments = ("run", recipe, *NO_SCORES, "--set", "lewis=null", "--set", f"models[0].model={broken}")
    code, _, err = finished(lewis(*arguments))
    assert code == 2 and f"error: {broken}: NaN: " in err and "--force" in err
    assert not (home / "merged").exists()
    code, _, err = finished(lewis(*arguments, "--force"))
    assert code == 1 and "NaN" in err and str(broken) in err
    assert not list((home / "merged").glob("*")) and not versions(home)


@pytest.mark.long
def test_a_run_needs_no_stderr(recipe: Path, home: Path, prefect_url: str) -> None:
    """Nor does its Prefect server, which it starts."""
    program = "from lewis_flows.cli.main import program; program()"
    command = ["sh", "-c", 'exec "$@" 2>&-', "-", sys.executable, "-c", program, "run", str(recipe), *NO_SCORES]
    environment = {**os.environ, "LEWIS_HOME": str(home), "PREFECT_API_URL": "", "PREFECT_HOME": str(home / "prefect")}
    assert subprocess.run([*command, "--set", "lewis=null"], env=environment).returncode == 0
    assert len(versions(home)) == 1
