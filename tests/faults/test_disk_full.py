"""A disk that is full, a store that is gone or read-only, all of a sudden: told in a sentence, and healed by a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Family, full
from tests.faults.running import Tally, below, half_done, merged, until, write_recipe
from tests.flows.conftest import REPO
from tests.flows.test_run import by_the_library
from tests.support.orphans import adopted


def can_mount() -> bool:
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "store", "/mnt"]
    return shutil.which("unshare") is not None and not subprocess.run(command, capture_output=True).returncode


pytestmark = pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
FILL = """
import os, shutil, subprocess
store = os.environ["LEWIS_HOME"]
def strike():
    with open(store + "/filler", "ab", 0) as filler:
        try:
            while filler.write(bytes(1 << 20)):
                pass
        except OSError:
            pass
"""
READ_ONLY = """
import os, subprocess
store = os.environ["LEWIS_HOME"]
def strike():
    if os.access(store, os.W_OK):
        subprocess.run(["mount", "--bind", store, store], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
"""
REMOVED = """
import os, shutil
store, struck = os.environ["LEWIS_HOME"], []
def strike():
    if not struck:
        struck.append(1)
        for entry in os.scandir(store):
            shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir() else os.unlink(entry.path)
"""
STEPS = {
    "importance": "import lewis.importance.measure as m; f = m.measure_sets\n"
    "m.measure_sets = lambda *a, **k: (strike(), f(*a, **k))[1]",
    "merge": "import lewis.merging.run as m; f = m.Merge._write; n = []\n"
    "m.Merge._write = lambda s, *a: (n.append(a), len(n) == 5 and strike(), f(s, *a))[2]",
    "evaluation": "import lewis.evaluation.harness.lm_eval as m; f = m.evaluate\n"
    "m.evaluate = lambda *a, **k: (strike(), f(*a, **k))[1]",
    "registration": "import lewis.registry.logged_model as m; f = m.write\n"
    "m.write = lambda *a, **k: (strike(), f(*a, **k))[1]",
}
CASES = {
    **{f"the disk is full in the {step}": (FILL, step) for step in STEPS},
    "the store becomes read-only in the merge": (READ_ONLY, "merge"),
    "the store becomes read-only in the registration": (READ_ONLY, "registration"),
    "the store is removed in the merge": (REMOVED, "merge"),
    "the store is removed in the registration": (REMOVED, "registration"),
}
LEWIS = "\nimport sys\nfrom lewis_flows.cli.main import main\nsys.exit(main(sys.argv[1:]))"
SCRIPT = """
store=$1 out=$2 python=$3 patch=$4 plain=$5; shift 5
mount -t tmpfs -o size=48m store "$store"
cp -a "$out/template/." "$store"
"$python" -c "$patch" "$@" >"$out/0.out" 2>"$out/0.err"; echo $? >"$out/0.code"
rm -f "$store/filler"
{ mkdir "$store/x" && rmdir "$store/x"; } 2>/dev/null || umount "$store"  # what made it read-only
"$python" -c "$plain" "$@" >"$out/1.out" 2>"$out/1.err"; echo $? >"$out/1.code"
cp -a "$store" "$out/home"
"""


def in_a_small_store(tmp_path: Path, patch: str, *arguments: str | Path, **environment: str) -> list[tuple[int, str]]:
    """Run `lewis` in a store of 48 MB, patched and then plain; gives exit code and output of both.

    What is then in the store is copied to `home`.
    """
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "template").mkdir(exist_ok=True)
    given = [store, tmp_path, sys.executable, patch + LEWIS, LEWIS, *arguments]
    subprocess.run(
        ["unshare", "-Urm", "sh", "-c", SCRIPT, "sh", *map(str, given)],
        cwd=REPO,
        env={**os.environ, "LEWIS_HOME": str(store), "TMPDIR": str(tmp_path), **environment},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    texts = ["".join((tmp_path / f"{i}.{end}").read_text() for end in ("out", "err")) for i in range(2)]
    return [(int((tmp_path / f"{i}.code").read_text()), text) for i, text in enumerate(texts)]


@full
@pytest.mark.parametrize("case", CASES)
def test_a_run_fails_in_a_sentence_and_the_next_has_the_same_result(
    case: str,
    family: Family,
    empty_database: Path,
    prefect_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    strike, step = CASES[case]
    tally, recipe = Tally(case, 1), write_recipe(tmp_path, family)
    (tmp_path / "template" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_database, tmp_path / "template" / "mlflow" / "mlflow.db")
    with adopted():
        before = set(below())
        patch = f"{strike}\n{STEPS[step]}"
        first, again = in_a_small_store(tmp_path, patch, "run", recipe, "--json", PREFECT_API_URL=prefect_url)
        left = not until(lambda: not below().keys() - before, 30)
    tally.note("orphans", left, str(below()))
    for code, told in (first, again):
        tally.note("tracebacks", "Traceback (most" in told, f"exit code {code}: {told[-4000:]}")
    tally.note("runs that failed again", again[0] != 0, again[1][-3000:])
    assert first[0] in (1, 2), first
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "alone"))
    digest, weights = by_the_library(recipe, tmp_path / "merged")
    if again[0] == 0:
        report = json.loads((tmp_path / "1.out").read_text())
        found = tmp_path / "home" / "merged" / digest / "model.safetensors"
        wrong = report["digest"] != digest or not merged(tmp_path / "home", digest) or found.read_bytes() != weights
        tally.note("wrong models", wrong, str(report))
        half = half_done(tmp_path / "home")
        tally.note("half versions", bool(half), half)
    tally.end(capsys)


@full
def test_a_merge_on_a_full_disk_is_told_and_done_when_there_is_room(family: Family, tmp_path: Path) -> None:
    recipe = {"merge_method": "ties", "base_model": str(family.base), "models": [{"model": str(family.math)}]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    out = tmp_path / "store" / "out"
    (code, told), (again, _) = in_a_small_store(
        tmp_path, FILL + STEPS["merge"], "merge", tmp_path / "r.yaml", "-o", out
    )
    assert code == 1 and "No space left on device" in told and "Traceback" not in told, told
    assert again == 0 and (tmp_path / "home" / "out" / "model.safetensors").exists()
