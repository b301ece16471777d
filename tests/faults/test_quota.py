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


def merged(recipe: Path, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LEWIS, "merge", str(recipe), "-o", str(root / "out")]
    given = {**os.environ, "LEWIS_HOME": str(root / "home"), **environment}
    return subprocess.run(command, cwd=REPO, env=given, capture_output=True, text=True, timeout=300)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@full
@pytest.mark.parametrize("of", ["bytes", "files"])
def test_a_quota_that_is_used_up(
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
    plain = merged(recipe, tmp_path / "plain", **preload, QUOTA_BYTES=str(1 << 40), QUOTA_FILES=str(1 << 30))
    assert plain.returncode == 0, plain.stderr
    right = content(tmp_path / "plain" / "out")
    made = list((tmp_path / "plain").rglob("*"))
    whole = len(made) if of == "files" else sum(path.stat().st_size for path in made if path.is_file())
    count = max(4, POINTS // 4)
    failed = []
    for number in range(count):
        root = tmp_path / str(number)
        limit = int(whole * (number + 0.5) / count)
        cut = merged(recipe, root, **preload, **{f"QUOTA_{of.upper()}": str(limit)})
        assert "Traceback" not in cut.stderr, (limit, cut.stderr)
        if cut.returncode:  # a note that is not written, such as a checksum, ends nothing
            failed.append(limit)
            assert cut.returncode in (1, 2) and "quota exceeded" in cut.stderr, (limit, cut.stderr)
            out = root / "out"  # of which the card may lack
            assert not out.exists() or store.read_manifest(out) is not None, (limit, cut.stderr)
            assert not list(root.glob("*.partial")), limit
        monkeypatch.setenv("LEWIS_HOME", str(root / "home"))
        assert verification.verify().damaged == [], limit
        again = merged(recipe, root)
        assert again.returncode == 0 and content(root / "out") == right, (limit, again.stderr)
        assert not list(root.rglob("*.partial")), limit
    assert len(failed) >= count / 2, f"the quota has not struck often enough: at {failed} of {whole} {of}"
