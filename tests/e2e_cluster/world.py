"""The environment of the end-to-end suite: a cluster, its S3 server, and Stagecoach installed by Helm.

The cluster is that of KUBECONFIG, or the test cluster of `tests/cluster`, which is started if necessary. Any other
cluster needs STAGECOACH_TEST_S3_ENDPOINT and STAGECOACH_TEST_S3_CREDENTIALS (a shared credentials file), and
STAGECOACH_TEST_REGISTRY, the registry of both images.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3

from stagecoach_api import names
from stagecoach_api.artifacts import Manifest, manifest_key
from stagecoach_api.store import Store, open_store
from tests import ROOT
from tests.cluster.__main__ import Cluster, find_cluster
from tests.cluster.layout import Kind, find_layout
from tests.cluster.processes import run as run_program
from tests.cluster.s3 import BUCKET, REGION

CHART = ROOT / "charts" / "stagecoach"
RELEASE = "stagecoach"
SYSTEM = "training"
SECRET = "s3"  # noqa: S105  # a name
EXAMPLES = "demo"
"""Prefix of the chart's default storage, in the bucket that the README names."""
LOCAL_REGISTRY = "localhost/stagecoach"
ENV_ENDPOINT = "STAGECOACH_TEST_S3_ENDPOINT"
ENV_CREDENTIALS = "STAGECOACH_TEST_S3_CREDENTIALS"
ENV_REGISTRY = "STAGECOACH_TEST_REGISTRY"
ENV_IMAGES = "STAGECOACH_TEST_IMAGES"
"""Options of images/build.py, set by the Makefile."""
POLL_SECONDS = 0.1

Body = dict[str, Any]


@dataclass(frozen=True)
class S3:
    """The S3 server, which pods and this process reach at the same address."""

    endpoint: str
    credentials: Path
    bucket: str = BUCKET

    @cached_property
    def keys(self) -> tuple[str, str]:
        parser = configparser.ConfigParser()
        parser.read(self.credentials)
        return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which the AWS SDK, and thus the command line, uses it."""
        return {
            "AWS_SHARED_CREDENTIALS_FILE": str(self.credentials),
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def uri(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}"

    def store(self, prefix: str) -> Store:
        return open_store(self.uri(prefix), self.endpoint, REGION)

    def upload(self, folder: Path, prefix: str) -> None:
        """Copy a folder, as `aws s3 cp --recursive` does."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._bucket.upload_file(str(path), f"{prefix}/{path.relative_to(folder).as_posix()}")

    def empty(self, prefix: str) -> None:
        """Delete everything below a prefix."""
        self._bucket.objects.filter(Prefix=f"{prefix}/").delete()

    @property
    def _bucket(self) -> Any:
        session = boto3.session.Session(*self.keys, region_name=REGION)
        return session.resource("s3", endpoint_url=self.endpoint).Bucket(self.bucket)


@dataclass(frozen=True)
class World:
    """A cluster with Stagecoach installed."""

    kubeconfig: Path
    programs: tuple[Path, ...]
    """Folders of kubectl and Helm, which precede those of PATH."""
    s3: S3
    own: Cluster | None
    """The test cluster; None for any other cluster."""

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(map(str, [*self.programs, Path(sys.executable).parent, os.environ.get("PATH", "")]))
        return {**os.environ, **self.s3.environment, "PATH": path, "KUBECONFIG": str(self.kubeconfig)}

    # -- programs ------------------------------------------------------------------------------------------------------

    def kubectl(self, *arguments: str, given: object = None) -> str:
        """Run kubectl. `given`: JSON for its standard input. Raises ClusterError with its message."""
        text = None if given is None else json.dumps(given)
        return run_program(["kubectl", *arguments], given=text, environment=self.environment)

    def run(self, command: Sequence[str], cwd: Path | None = None) -> str:
        """Run a command that must succeed; return its output."""
        done = self.tries(*command, cwd=cwd)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def tries(self, *command: str, given: object = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command that may fail."""
        text = None if given is None else json.dumps(given)
        return subprocess.run(
            command, input=text, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False
        )

    def stagecoach(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run our own command line."""
        return self.run(["stagecoach", *arguments], cwd)

    def helm(self, *arguments: str) -> str:
        return run_program(["helm", *arguments], environment=self.environment)

    # -- objects -------------------------------------------------------------------------------------------------------

    def apply(self, *objects: Mapping[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--server-side", "--filename", "-", given=listed)

    def get(self, kind: str, name: str, namespace: str = "") -> Body:
        found: Body = json.loads(self.kubectl("get", kind, name, *_in(namespace), "--output=json"))
        return found

    def list(self, kind: str, namespace: str = "", labels: Mapping[str, str] | None = None) -> list[Body]:
        selector = ",".join(f"{key}={value}" for key, value in (labels or {}).items())
        text = self.kubectl("get", kind, *_in(namespace), f"--selector={selector}", "--output=json")
        items: list[Body] = json.loads(text)["items"]
        return items

    @contextmanager
    def namespace(self, name: str) -> Iterator[str]:
        """Create a namespace for runs, restricted as in production, with the keys of S3; delete it afterwards."""
        self.apply(namespace_of(name), secret_of(self.s3, name))
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--timeout=180s")

    @contextmanager
    def without_s3(self) -> Iterator[None]:
        """Stop the test cluster's S3 server and start it again."""
        assert self.own is not None
        self.own.stop_s3()
        try:
            yield
        finally:
            self.own.start_s3()

    # -- runs ----------------------------------------------------------------------------------------------------------

    def submit(self, run: Body) -> Run:
        self.apply(run)
        return Run(self, run["metadata"]["namespace"], run["metadata"]["name"])


@dataclass(frozen=True)
class Run:
    """A TrainingRun on the cluster."""

    world: World
    namespace: str
    name: str

    def body(self) -> Body:
        return self.world.get(names.PLURAL, self.name, self.namespace)

    def status(self) -> Body:
        return self.body().get("status") or {}

    def stage(self, name: str) -> Body:
        """Return a stage's entry in the status, empty if there is none yet."""
        return next((stage for stage in self.status().get("stages", ()) if stage["name"] == name), {})

    def condition(self, kind: str) -> Body:
        found = [item for item in self.status().get("conditions", ()) if item["type"] == kind]
        return found[0] if found else {"status": "Unknown", "reason": "", "message": ""}

    def has(self, kind: str, reason: str = "") -> bool:
        """Return whether a condition is true or, given a reason, whether it has that reason."""
        found = self.condition(kind)
        return bool(found["reason"] == reason if reason else found["status"] == "True")

    def patch(self, spec: Mapping[str, Any]) -> None:
        patch = json.dumps({"spec": dict(spec)})
        self.world.kubectl("patch", names.PLURAL, self.name, f"-n{self.namespace}", "--type=merge", f"--patch={patch}")

    def pods(self, stage: str = "") -> list[Body]:
        labels = {names.LABEL_RUN: self.name} | ({names.LABEL_STAGE: stage} if stage else {})
        return self.world.list("pods", self.namespace, labels)

    def wait(self, what: str, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready()`; on timeout, fail with a description of the run."""
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{self.name}: timeout after {seconds:.0f} s, waiting until {what}\n{self.described()}"
                )
            time.sleep(POLL_SECONDS)

    def complete(self, seconds: float) -> None:
        """Wait until the run is complete."""

        def ended() -> bool:
            if self.has("Failed"):
                raise AssertionError(f"{self.name} failed\n{self.described()}")
            return self.has("Complete")

        self.wait("it is complete", ended, seconds)

    def runs_stage(self, stage: str, seconds: float = 120) -> None:
        """Wait until all pods of a stage are running."""
        self.wait(f"{stage} runs", lambda: self.stage(stage).get("state") == "Running", seconds)

    def reaches(self, stage: str, step: int, seconds: float = 180) -> None:
        """Wait until the run's storage contains a complete checkpoint of `step` or later."""
        self.wait(f"{stage} has saved step {step}", lambda: self.saved_step(stage) >= step, seconds)

    def saved_step(self, stage: str) -> int:
        """Return the step of a stage's newest complete checkpoint, -1 if there is none."""
        digest = self.stage(stage).get("digest")
        if digest is None:
            return -1
        prefix = f"artifacts/{digest}/checkpoints/"
        keys = [entry.key for entry in self.store().list(prefix) if entry.key.endswith("/manifest.json")]
        return max((int(key.removeprefix(prefix).split("/")[0].removeprefix("step-")) for key in keys), default=-1)

    def store(self) -> Store:
        """Return the run's storage: its own, else the chart's default."""
        storage = self.body()["spec"].get("storage", {})
        return open_store(storage.get("uri", self.world.s3.uri(EXAMPLES)), self.world.s3.endpoint, REGION)

    def manifest(self, stage: str) -> Manifest:
        """Return the manifest of a stage's artifact."""
        return Manifest.model_validate_json(self.store().read(manifest_key(self.stage(stage)["digest"])))

    def contents(self) -> dict[str, str]:
        """Return the content digest of every stage."""
        return {stage["name"]: stage["artifact"]["contentDigest"] for stage in self.status()["stages"]}

    def delete(self) -> None:
        """Delete the run, and wait until Kubernetes has deleted everything that it owned."""
        self.world.kubectl("delete", names.PLURAL, self.name, f"-n{self.namespace}", "--timeout=180s")
        deadline = time.monotonic() + 180
        while left := self.owned():
            assert time.monotonic() < deadline, f"{self.name} is deleted, and left {left}"
            time.sleep(POLL_SECONDS)

    def owned(self) -> list[str]:
        """Return the names of the run's objects."""
        kinds = ("jobsets", "jobs", "pods", "services", "configmaps", "networkpolicies")
        found = [item for kind in kinds for item in self.world.list(kind, self.namespace, {names.LABEL_RUN: self.name})]
        return [item["metadata"]["name"] for item in found]

    def described(self) -> str:
        """Return status, pods and the operator's log, for the message of a failed test."""
        status = json.dumps(self.status(), indent=1, ensure_ascii=False)
        pods = self.world.tries("kubectl", "get", "pods", f"-n{self.namespace}", "--output=wide").stdout
        logs = self.world.tries("kubectl", "logs", f"-n{SYSTEM}", f"deployment/{RELEASE}", "--tail=30").stdout
        return f"{status}\n{pods}\n{logs}"


def _in(namespace: str) -> tuple[str, ...]:
    return (f"--namespace={namespace}",) if namespace else ()


# -- makers ------------------------------------------------------------------------------------------------------------


def namespace_of(name: str) -> Body:
    """Return a namespace that admits only restricted pods, as in production."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def secret_of(s3: S3, namespace: str) -> Body:
    access, secret = s3.keys
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": SECRET, "namespace": namespace},
        "stringData": {names.ACCESS_KEY_FILE: access, names.SECRET_KEY_FILE: secret},
    }


def training_run(world: World, namespace: str, name: str, stages: Sequence[Body], **spec: Any) -> Body:
    """Return a run with a separate storage prefix, so that no stage is found in the cache."""
    storage = {
        "uri": world.s3.uri(f"e2e/{namespace}/{name}"),
        "endpoint": world.s3.endpoint,
        "region": REGION,
        "inputs": world.s3.uri("inputs"),
        "credentials": {"secretName": SECRET},
    }
    return {
        "apiVersion": names.API_GROUP_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "seed": 1,
            "storage": storage,
            "defaults": {"resources": {"cpu": "500m"}},
            "stages": list(stages),
            **spec,
        },
    }


def corpus() -> Body:
    sources = [{"name": "prose", "uri": "data/english.jsonl.gz", "format": "text"}]
    return {"name": "corpus", "data": {"sources": sources, "heldOutShare": 0.05}}


def vocabulary() -> Body:
    return {"name": "vocabulary", "tokenizer": {"train": {"data": [{"stage": "corpus"}], "vocabSize": 1024}}}


def training(name: str, steps: int, nodes: int = 2, every: int = 10, **stage: Any) -> Body:
    """Return a training stage of `steps` steps, whose pods communicate through gloo."""
    return {
        "name": name,
        "resources": {"nodes": nodes},
        "pretrain": {
            "architecture": {"hiddenSize": 64, "intermediateSize": 128, "numLayers": 2, "numHeads": 4},
            "tokenizer": {"stage": "vocabulary"},
            "data": [{"name": "en", "stage": "corpus"}],
            "sequenceLength": 128,
            "batch": {"tokens": 1024, "microBatchRows": 4},
            "budget": {"steps": steps},
            "optimizer": {"learningRate": 2.0e-3},
            "checkpoints": {"everySteps": every, "keepLast": 2},
        },
        **stage,
    }


# -- setup -------------------------------------------------------------------------------------------------------------


@contextmanager
def the_world() -> Iterator[World]:
    """Find or start the cluster and install Stagecoach; remove a cluster that was started here."""
    configured = os.environ.get("KUBECONFIG")
    if configured and not _is_test_cluster(Path(configured)):
        s3 = S3(os.environ[ENV_ENDPOINT], Path(os.environ[ENV_CREDENTIALS]))
        with installed(World(Path(configured), (), s3, None)) as world:
            yield world
        return
    found = find_cluster(None)
    own = found or Cluster(find_layout(Kind.NODE))
    own.up()  # also restarts its processes that have ended
    try:
        layout, builder = own.layout, own._builder
        programs = (builder.program("kubernetes", "kubectl").parent, builder.program("helm", "helm").parent)
        world = World(layout.kubeconfig, programs, S3(layout.s3_endpoint, layout.s3_credentials), own)
        with installed(world, stays=found is not None):
            yield world
    finally:
        if found is None:
            own.down()


def _is_test_cluster(kubeconfig: Path) -> bool:
    found = find_cluster(None)
    return found is not None and found.layout.kubeconfig == kubeconfig


@contextmanager
def installed(world: World, stays: bool = True) -> Iterator[World]:
    """Build the images unless a registry has them, upload the examples' data and install the chart as in the README;
    afterwards, uninstall it if the cluster `stays`."""
    registry = os.environ.get(ENV_REGISTRY) or provide_images(world)
    uninstall(world)
    for prefix in (EXAMPLES, "e2e"):  # left by an earlier suite
        world.s3.empty(prefix)
    world.s3.upload(ROOT / "examples" / "data", "inputs/data")
    world.apply(namespace_of(SYSTEM), secret_of(world.s3, SYSTEM))
    values = ROOT / "build" / "e2e-values.json"
    values.parent.mkdir(exist_ok=True)
    values.write_text(json.dumps(values_of(world.s3, registry)))
    (command,) = readme_commands("helm install")
    world.run([str(values) if argument == "values.yaml" else argument for argument in command], cwd=ROOT)
    yield world
    if stays:
        uninstall(world)


def values_of(s3: S3, registry: str) -> Body:
    """Return the chart's values: one operator for all namespaces, and a default storage."""
    return {
        "scope": "cluster",
        "images": {"registry": registry, "pullPolicy": "IfNotPresent"},
        "storage": {
            "uri": s3.uri(EXAMPLES),
            "inputs": s3.uri("inputs"),
            "endpoint": s3.endpoint,
            "region": REGION,
            "credentialsSecret": SECRET,
            # Other buckets than the operator's own, and a server that does not answer.
            "allowed": [
                {"endpoint": s3.endpoint, "buckets": ["*"]},
                {"endpoint": "http://127.0.0.1:9", "buckets": ["*"]},
            ],
        },
        "stages": {"graceSeconds": 60},
        "allowed": {"images": ["registry.example.com/*", "registry.invalid/*"]},
    }


def uninstall(world: World) -> None:
    """Uninstall Stagecoach from the cluster, if it is installed."""
    if RELEASE in world.helm("list", "--short", f"--namespace={SYSTEM}").split():
        world.kubectl("delete", names.PLURAL, "--all", f"--namespace={SYSTEM}", "--timeout=180s")
        world.helm("uninstall", RELEASE, f"--namespace={SYSTEM}", "--wait", "--timeout=5m")
    world.kubectl("delete", "namespace", SYSTEM, "--ignore-not-found", "--timeout=180s")


def readme_commands(beginning: str) -> list[list[str]]:
    """Return the commands in the README's section on clusters that start with `beginning`, as argument lists."""
    part = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## On a cluster\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(beginning)]


def provide_images(world: World) -> str:
    """Build both images of this checkout and load them into the test cluster's node; return their registry."""
    if world.own is None:
        raise AssertionError(f"set {ENV_REGISTRY} to the registry of the images that `make images` builds")
    world.own.provide_builders()
    archives = ROOT / "build" / "images" / "archives"
    options = os.environ.get(ENV_IMAGES, "").split()
    script = str(ROOT / "images" / "build.py")
    subprocess.run([sys.executable, script, "--archives", str(archives), *options], check=True)
    world.own.load(sorted(archives.glob("*.tar")))
    shutil.rmtree(archives)
    return LOCAL_REGISTRY
