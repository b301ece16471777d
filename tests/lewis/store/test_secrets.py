"""The secrets of the store: each made once, readable only by its owner, or given by the environment."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lewis.errors import InputError
from lewis.store import secrets
from lewis.store.secrets import METRICS_KEY, MLFLOW_PASSWORD, PREFECT_KEY, WEBHOOK_SECRET, Secret


@pytest.mark.parametrize(
    ("secret", "name", "variable"),
    [
        (PREFECT_KEY, "prefect-api-key", "PREFECT_SERVER_API_AUTH_STRING"),
        (MLFLOW_PASSWORD, "mlflow-password", "MLFLOW_AUTH_ADMIN_PASSWORD"),
        (WEBHOOK_SECRET, "webhook-secret", "LEWIS_WEBHOOK_SECRET"),
        (METRICS_KEY, "metrics-key", "LEWIS_METRICS_KEY"),
    ],
    ids=lambda each: each.name if isinstance(each, Secret) else "",
)
def test_it_is_made_once_and_for_nobody_else(
    home: Path, secret: Secret, name: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert secrets.files() == []
    with ThreadPoolExecutor(4) as pool:
        (made,) = set(pool.map(lambda _: secret.read(), range(4)))
    file = home / name
    assert secrets.files() == [file] == [secret.path()]
    assert len(made) >= 32 and made == file.read_text().strip() and made.startswith(secret.prefix)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setenv(variable, " mine ")
    assert secret.read() == "mine"
    monkeypatch.setenv(variable, "")
    file.chmod(0o644)
    with pytest.raises(InputError, match="others may read it"):
        secret.read()
    file.chmod(0o600)
    file.write_text("\n")
    with pytest.raises(InputError, match="it is empty"):
        secret.read()


def test_one_that_is_there_is_read_from_a_store_that_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path))
    made = METRICS_KEY.read()

    def refuse(name: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(secrets, "lock", refuse)
    assert METRICS_KEY.read() == made
