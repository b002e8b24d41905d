"""Manifests and tables in a bucket, stores on a shared folder, against a local S3 server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkout import Checkout

pytestmark = pytest.mark.study

CURVE = "results/zoo-small/topk/intermediate/curve.json"
LIST = """
import sys
import boto3
client = boto3.client("s3", endpoint_url=sys.argv[1])
if len(sys.argv) > 2:
    client.create_bucket(Bucket="atlas")
else:
    print(*(one["Key"] for one in client.list_objects_v2(Bucket="atlas")["Contents"]))
"""


def test_a_curve(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", packages]
    subprocess.run([*install, "--no-deps", "snakemake-storage-plugin-s3"], check=True)
    subprocess.run([*install, "boto3", "moto[server]"], check=True)
    checkout = Checkout.make(tmp_path / "atlas")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    credentials = {f"AWS_{name}": "test" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    environment = checkout.environment(
        PYTHONPATH=f"{checkout.path / 'src'}{os.pathsep}{packages}",
        AWS_DEFAULT_REGION="us-east-1",
        **credentials,
    )
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", port], env=environment)
    try:
        command = [sys.executable, "-c", LIST, url]
        deadline = time.monotonic() + 60
        while subprocess.run([*command, "make"], env=environment, capture_output=True).returncode:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.5)
        storage = ["--default-storage-provider", "s3", "--default-storage-prefix", "s3://atlas"]
        storage += ["--storage-s3-endpoint-url", url, "--local-storage-prefix", "stores"]
        storage += ["--keep-storage-local-copies", "--shared-fs-usage", "persistence", "sources"]
        storage += ["software-deployment", "source-cache", "storage-local-copies"]
        done = checkout.run(CURVE, *storage, **{**environment})
        assert done.returncode == 0, done.stdout
        stored = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    finally:
        server.kill()
        server.wait()
    assert CURVE in stored.split()
    # What is no output stays in the folder of the local copies, where every stage finds it.
    assert "samples.parquet" not in stored
    local = checkout.path / "stores/s3/atlas/results/zoo-small/topk/intermediate"
    assert len(list(local.glob("*/samples.parquet"))) == 2
    assert not checkout.results.exists()
