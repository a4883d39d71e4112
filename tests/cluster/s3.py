"""versitygw, a real S3 server that stores objects in a folder, with one bucket and its own keys."""

from __future__ import annotations

import configparser
import secrets

import boto3

from tests.cluster.build import Builder
from tests.cluster.layout import Layout
from tests.cluster.processes import Argument, Processes, responds
from tests.cluster.report import timed

REGION = "us-east-1"
BUCKET = "models"
PROCESS = "versitygw"
READY_SECONDS = 30


def start(layout: Layout, builder: Builder, processes: Processes) -> None:
    """Start the server at an address that pods can reach, and create the bucket."""
    folder = layout.state / "s3"
    for path in (folder / "data", folder / "sidecar"):
        path.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = read_or_make_key(layout)
    command: list[Argument] = [builder.program("versitygw", "versitygw"), "--quiet"]
    command += ["--port", f"{layout.address}:{layout.port('s3')}", "posix"]
    command += ["--sidecar", folder / "sidecar", folder / "data"]  # for disks without extended attributes
    environment = {"ROOT_ACCESS_KEY": access_key, "ROOT_SECRET_KEY": secret_key}
    with timed("versitygw", "ready"):
        processes.start(PROCESS, command, environment)
        processes.wait_for(PROCESS, lambda: responds(layout.s3_endpoint), READY_SECONDS)
        make_bucket(layout, access_key, secret_key)


def read_or_make_key(layout: Layout) -> tuple[str, str]:
    """Return access key and secret key of this cluster's S3 server, creating them at first use."""
    file = layout.s3_credentials
    parser = configparser.ConfigParser()
    if not parser.read(file):
        parser["default"] = {
            "aws_access_key_id": f"stagecoach-{secrets.token_hex(4)}",
            "aws_secret_access_key": secrets.token_urlsafe(30),
        }
        file.touch(mode=0o600)
        with file.open("w") as text:
            parser.write(text)
    return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]


def make_bucket(layout: Layout, access_key: str, secret_key: str) -> None:
    """Create the bucket unless it exists."""
    session = boto3.session.Session(access_key, secret_key, region_name=REGION)
    client = session.client("s3", endpoint_url=layout.s3_endpoint)
    existing = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
    if BUCKET not in existing:
        client.create_bucket(Bucket=BUCKET)
