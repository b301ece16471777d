"""The secret of the webhook: made once, readable only by its owner, or given by the environment."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lewis.errors import InputError
from lewis_flows.service.webhook_secret import webhook_secret


def test_the_secret_is_made_once_and_for_nobody_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEWIS_WEBHOOK_SECRET", raising=False)
    with ThreadPoolExecutor(4) as pool:
        (made,) = set(pool.map(lambda _: webhook_secret(), range(4)))
    assert len(made) >= 32 and made == (home / "webhook-secret").read_text().strip()
    assert stat.S_IMODE((home / "webhook-secret").stat().st_mode) == 0o600
    monkeypatch.setenv("LEWIS_WEBHOOK_SECRET", " mine ")
    assert webhook_secret() == "mine"
    monkeypatch.setenv("LEWIS_WEBHOOK_SECRET", "")
    (home / "webhook-secret").chmod(0o644)
    with pytest.raises(InputError, match="others may read it"):
        webhook_secret()
    (home / "webhook-secret").chmod(0o600)
    (home / "webhook-secret").write_text("\n")
    with pytest.raises(InputError, match="it is empty"):
        webhook_secret()
