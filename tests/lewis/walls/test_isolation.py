"""What a process in the namespaces of an evaluation reaches: as root, and as an ordinary user."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lewis.walls import isolation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become an ordinary user"),
    pytest.mark.skipif(not isolation._possible(), reason="this machine makes no namespaces"),
]
LOOK = """
cd {folder}
ls . shown
cat shown/file {secret} {outside}
for each in {folder} {outside}; do umount "$each"; umount -l "$each"; done
unshare --user --map-root-user --mount sh -c 'umount {folder}; umount {outside}'
cat {secret} {outside} /proc/[0-9]*/environ
touch new && ls new
test -S {socket} || echo no socket
"""


@pytest.mark.parametrize("user", [0, 65534])
def test_of_folders_for_temporary_files_only_what_is_needed_is_there(
    tmp_path: Path, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect keeps a worker's environment in `prefect-workspace-attempt-*`; folders of others are hidden too."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, tempfile.TemporaryDirectory(dir="/usr/local") as other:
        folder, outside = Path(name), Path(other) / "s3cret"
        for each in (folder, outside.parent):
            each.chmod(0o777)
        kept, secret = folder / "shown" / "file", folder / "prefect-workspace-attempt-x" / "workspace.json"
        for path in (kept, secret, outside):
            path.parent.mkdir(exist_ok=True)
            path.write_text("s3cret" if path != kept else "needed")
            path.chmod(0o666)
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(os, "geteuid", lambda: user)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{other}/socket")
            walls = isolation.namespaces([outside], network=True, shown=[kept])
            look = LOOK.format(folder=folder, secret=secret, outside=outside, socket=f"{other}/socket")
            as_user = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups") if user else ()
            environment = {"PATH": os.environ["PATH"], "TOKEN": "s3cret"} if not user else {"PATH": os.environ["PATH"]}
            found = subprocess.run(
                [*as_user, *walls, "env", "-u", "TOKEN", "sh", "-c", look],
                capture_output=True, text=True, env=environment, cwd=folder, timeout=60,
            )  # fmt: skip
        assert found.stdout.startswith(".:\nshown\n\nshown:\nfile\nneeded"), found
        assert found.stdout.endswith("new\nno socket\n") and "s3cret" not in found.stdout, found
        assert secret.read_text() == outside.read_text() == "s3cret" and not (folder / "new").exists()


def test_folders_within_each_other_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "a" / "b"
    (inner / "in").mkdir(parents=True)
    (inner / "link").symlink_to(tmp_path / "model", target_is_directory=True)
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(isolation, "_TEMPORARY", (str(tmp_path), str(tmp_path / "away")))
    monkeypatch.setattr(tempfile, "tempdir", str(inner))
    needed = [inner / "in" / "file", inner / "link", Path("/usr"), tmp_path / "gone"]
    (inner / "in" / "file").touch()
    found = isolation.temporary_folders(needed)
    assert found == {str(tmp_path): ("a", "model"), str(inner): ("in", "link")}


CAT = """
import os, sys
from lewis.walls import isolation
isolation._INSTALLED = (sys.argv[1],)
os.execvp("unshare", [*isolation.namespaces(network=False), "cat", *sys.argv[2:]])
"""


def test_secrets_are_hidden_where_the_documented_layouts_have_them() -> None:
    """The Hub's token under XDG_CACHE_HOME, as systemd has it, keys of programs, and files of `from_files`."""
    with tempfile.TemporaryDirectory(dir="/usr/local") as name:
        hub, key, installed = (Path(name, each) for each in ("cache/huggingface/token", "key", "secrets/forms-key"))
        stored, kept, login = hub.with_name("stored_tokens"), Path(name, "kept"), Path(name, "config/gh/hosts.yml")
        for path in (hub, stored, key, installed, kept, login):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("s3cret" if path != kept else "kept")
        without = {each: value for each, value in os.environ.items() if each not in ("HF_HOME", "HF_TOKEN_PATH")}
        environment = {"XDG_CACHE_HOME": f"{name}/cache", "XDG_CONFIG_HOME": f"{name}/config"}
        environment["PREFECT_API_AUTH_STRING_FILE"] = str(key)
        found = subprocess.run(
            [sys.executable, "-c", CAT, str(installed.parent), *map(str, (hub, stored, key, installed, kept, login))],
            capture_output=True, text=True, env=without | environment, timeout=60,
        )  # fmt: skip
        assert found.stdout == "kept", found
        in_folders = [f"{path}: No such file" in found.stderr for path in (installed, login)]
        assert all(in_folders) and found.stderr.count("\n") == 2, found


def test_each_file_that_a_variable_names_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/usr/local") as name:
        for each in ("first", "second", "relative"):
            Path(name, each).write_text("s3cret")
        monkeypatch.chdir(name)
        monkeypatch.setenv("KUBECONFIG", f"{name}/first:{name}/second")
        monkeypatch.setenv("PGPASSFILE", "relative")
        monkeypatch.setenv("NETRC", "")
        walls = isolation.namespaces(network=False)
        found = subprocess.run([*walls, "cat", "first", "second", "relative"], capture_output=True, text=True, cwd=name)
        assert (found.returncode, found.stdout) == (0, ""), found
