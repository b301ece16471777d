"""A local Hub that this process publishes to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.support.local_hub import LocalHub


@contextmanager
def writable_hub(folder: Path, homes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The Hub, with its blobs in `folder`; this process is `hf_alice`, with empty caches below `homes`."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    with LocalHub(folder) as hub:
        for name, value in hub.environment(homes).items():
            monkeypatch.setenv(name, value)
        yield hub
