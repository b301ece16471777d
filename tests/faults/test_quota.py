"""A disk quota that is used up after any number of bytes or files: that is said, no half of an entry stays."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lewis import store
from lewis.store import verification
from tests.conftest import POINTS, Family, full
from tests.faults.running import half_done, left_over, merged, write_recipe
from tests.flows.conftest import REPO

SOURCE = Path(__file__).parents[1] / "support" / "quota.c"
LEWIS = "import sys\nfrom lewis_flows.cli.main import main\nsys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def quota(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("quota") / "quota.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def lewis(root: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LEWIS, *map(str, arguments)]
    given = {**os.environ, "LEWIS_HOME": str(root / "home"), **environment}
    return subprocess.run(command, cwd=REPO, env=given, capture_output=True, text=True, timeout=600)


def merge(recipe: Path, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return lewis(root, "merge", recipe, "-o", root / "out", **environment)


def used(folder: Path, of: str) -> int:
    """How much of a quota it takes to make what is in a folder, at least."""
    made = list(folder.rglob("*"))
    return len(made) if of == "files" else sum(path.stat().st_size for path in made if path.is_file())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@full
@pytest.mark.parametrize("of", ["bytes", "files"])
def test_a_merge_that_uses_it_up(
    quota: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        json.dumps(
            {
                "merge_method": "ties",
                "base_model": str(family.base),
                "models": [{"model": str(family.math)}],
                "lewis": {"calibrations": {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
            }
        )
    )
    preload = {"LD_PRELOAD": str(quota), "QUOTA_ROOT": str(tmp_path)}
    plain = merge(recipe, tmp_path / "plain", **preload, QUOTA_BYTES=str(1 << 40), QUOTA_FILES=str(1 << 30))
    assert plain.returncode == 0, plain.stderr
    right = content(tmp_path / "plain" / "out")
    whole = used(tmp_path / "plain", of)
    count = max(4, POINTS // 4)
    failed = []
    for number in range(count):
        root = tmp_path / str(number)
        limit = int(whole * (number + 0.5) / count)
        cut = merge(recipe, root, **preload, **{f"QUOTA_{of.upper()}": str(limit)})
        assert "Traceback" not in cut.stderr, (limit, cut.stderr)
        if cut.returncode:  # a note that is not written, such as a checksum, ends nothing
            failed.append(limit)
            assert cut.returncode in (1, 2) and "quota exceeded" in cut.stderr, (limit, cut.stderr)
            out = root / "out"  # of which the card may lack
            assert not out.exists() or store.read_manifest(out) is not None, (limit, cut.stderr)
            assert not list(root.glob("*.partial")), limit
        monkeypatch.setenv("LEWIS_HOME", str(root / "home"))
        assert verification.verify().damaged == [], limit
        again = merge(recipe, root)
        assert again.returncode == 0 and content(root / "out") == right, (limit, again.stderr)
        assert not list(root.rglob("*.partial")), limit
    assert len(failed) >= count / 2, f"the quota has not struck often enough: at {failed} of {whole} {of}"


@full
@pytest.mark.parametrize("of", ["bytes", "files"])
def test_a_run_that_uses_it_up(
    quota: Path, family: Family, empty_store: Path, prefect_url: str, tmp_path: Path, of: str
) -> None:
    """All its processes together, but for Prefect's server; MLflow's database is among what they write."""
    recipe, right, whole = write_recipe(tmp_path, family), "", 0
    count, failed, wrong = max(4, POINTS // 8), 0, []
    for number in range(-1, count):
        root = tmp_path / str(number)
        shutil.copytree(empty_store, root / "home")
        (root / "tmp").mkdir()
        before = used(root, of)
        given = {"PREFECT_API_URL": prefect_url, "TMPDIR": str(root / "tmp")}
        limit = int(whole * (number + 0.5) / count) if whole else 1 << 40
        counted = {"QUOTA_ROOT": str(root), "QUOTA_COUNTS": f"{root}.counts", f"QUOTA_{of.upper()}": str(limit)}
        cut = lewis(root, "run", recipe, "--json", LD_PRELOAD=str(quota), **counted, **given)
        if not whole:
            assert cut.returncode == 0, cut.stderr
            whole = used(root, of) - before
        elif cut.returncode:
            failed += 1
            if "quota exceeded" not in cut.stderr or "Traceback" in cut.stderr:
                wrong.append(f"{limit} of {whole}: {cut.returncode} {cut.stderr[-3000:]}")
        again = lewis(root, "run", recipe, "--json", **given)
        digest = json.loads(again.stdout)["digest"] if again.returncode == 0 else ""
        files = merged(root / "home", digest)
        right = right or files["model.safetensors"]
        left = [*left_over(root / "home", root / "tmp"), half_done(root / "home") if digest else again.stderr]
        if any(left) or files.get("model.safetensors") != right:
            wrong.append(f"{limit} of {whole}, run again: {left}")
        shutil.rmtree(root)
    assert not wrong, "\n".join(wrong)
    assert failed >= count / 2, f"the quota has struck at {failed} of {count} limits alone"
