"""The wheel, built from a copy of the checkout and installed in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from filelock import FileLock

REPO = Path(__file__).resolve().parents[2]
PARTS = ("lewis", "tasks", "flows", "deployments", "pyproject.toml", "README.md", "LICENSE")


def install(root: Path) -> Path:
    """Build an sdist, of that a wheel, and install the wheel; a second call with the same `root` finds it done.

    The environment takes the dependencies from the one that the tests run in, but nothing of ours: an editable install
    works through a .pth file, and those count only in an environment's own folder.

    Returns:
        The environment's folder. `bin/lewis` and `bin/python` are in it.
    """
    root.mkdir(parents=True, exist_ok=True)
    environment, done = root / "environment", root / "done"
    with FileLock(root / "lock"):
        if not done.exists():
            _make(environment, wheel(root, sdist(root)))
            done.touch()
    return environment


def user_folder(path: Path) -> Path:
    """A folder that has packages `flows` and `tasks`, as those of Prefect's users do."""
    path.mkdir()
    for name in ("flows", "tasks"):
        (path / name).mkdir()
        (path / name / "__init__.py").write_text("raise RuntimeError('the code of the user')")
    return path


def sdist(root: Path) -> Path:
    """Build an sdist from a copy of the checkout: a build leaves files next to its sources."""
    copy, target = root / "checkout", root / "sdist"
    copy.mkdir()
    for part in PARTS:
        if (REPO / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(REPO / part, copy / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(REPO / part, copy)
    _build("sdist", target, copy)
    return next(target.glob("*.tar.gz"))


def wheel(root: Path, source: Path) -> Path:
    """Build a wheel from an sdist or a checkout, into the folder `root/wheels-from-<name of the source>`."""
    target = root / f"wheels-from-{source.name}"
    if source.is_file():
        shutil.unpack_archive(source, root / "unpacked")
        [source] = (root / "unpacked").iterdir()
    _build("wheel", target, source)
    return next(target.glob("*.whl"))


def _build(kind: str, target: Path, source: Path) -> None:
    """Build as pip does, without its start."""
    _run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_{kind}({str(target)!r})", cwd=source)


def _make(environment: Path, built: Path) -> None:
    venv.create(environment, symlinks=True)
    pip = ["-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--disable-pip-version-check"]
    _run(sys.executable, *pip, "-q", "--no-deps", "--no-index", str(built), cwd=environment.parent)
    folders = dict.fromkeys(("base", "platbase"), str(environment))
    own = Path(sysconfig.get_path("purelib", vars=folders))
    theirs = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (own / "dependencies.pth").write_text("\n".join(theirs) + "\n")
    _put_compiled_loops(own)


def _put_compiled_loops(packages: Path) -> None:
    """Give the installed packages the compiled loops of the checkout: to compile them takes 20 s of CPU.

    numba takes them for those of a source file of the same name, time and size.
    """
    for compiled in (REPO / "lewis").rglob("*.nb[ic]"):
        source = compiled.parents[1] / f"{compiled.name.partition('.')[0]}.py"
        installed = packages / source.relative_to(REPO)
        shutil.copystat(source, installed)
        (installed.parent / "__pycache__").mkdir(exist_ok=True)
        shutil.copy(compiled, installed.parent / "__pycache__")


def _run(*command: str, cwd: Path) -> None:
    ours = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=ours, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
