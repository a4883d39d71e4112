"""The chart's hooks, each run in a pod with the operator's image.

python -m stagecoach_operator.chart_hooks certificate --secret NAME --host NAME --instance NAME
python -m stagecoach_operator.chart_hooks uninstall --deployment NAME --selector LABELS --lease NAME
    [--runs-namespace NAME]…
python -m stagecoach_operator.chart_hooks test --url URL [--runs-namespace NAME]…
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import sys
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

from stagecoach_api.names import FINALIZER
from stagecoach_operator.certificate import make_certificate
from stagecoach_operator.kube import (
    LEASES,
    PODS,
    TRAINING_RUNS,
    AlreadyExists,
    ApiServer,
    Body,
    Conflict,
    Kube,
    KubeError,
    ObjectNotFound,
    RequestForbidden,
    Resource,
)
from stagecoach_operator.settings import ENV_POD_NAMESPACE

DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment")
SECRETS = Resource("", "v1", "secrets", "Secret")
KEEP = {"helm.sh/resource-policy": "keep"}
"""Annotation with which Helm leaves an object alone."""
POLL_SECONDS = 1.0
POLLS = 120
"""How often to look for pods of the operator that was scaled down; they have 30 seconds to end."""
MAX_TRIES = 5
"""How often to patch a run that other clients change meanwhile."""
HTTP_TIMEOUT_SECONDS = 20

Sleep = Callable[[float], Awaitable[None]]


class HookError(Exception):
    """The hook failed; the message states what to do."""


async def provide_certificate(kube: Kube, namespace: str, secret: str, host: str, instance: str) -> bool:
    """Make the Secret with the progress server's certificate unless it exists; return whether it was made.

    An existing one is kept, because running pods trust its authority. Raises KubeError.
    """
    now = datetime.now(UTC)
    labels = {"app.kubernetes.io/name": "stagecoach", "app.kubernetes.io/instance": instance}
    data = {name: base64.b64encode(content).decode() for name, content in make_certificate(host, now).items()}
    body = {
        "apiVersion": SECRETS.api_version,
        "kind": SECRETS.kind,
        "metadata": {"name": secret, "namespace": namespace, "labels": labels, "annotations": KEEP},
        "type": "kubernetes.io/tls",
        "data": data,
    }
    try:
        await kube.create(SECRETS, body)
    except AlreadyExists:
        # Of a release whose manifest contained the Secret, Helm would delete it in this upgrade.
        await kube.patch(SECRETS, namespace, secret, {"metadata": {"annotations": KEEP}})
        return False
    return True


async def uninstall(
    kube: Kube,
    deployment: str,
    namespace: str,
    selector: str,
    lease: str,
    runs_namespaces: Sequence[str] | None,
    sleep: Sleep = asyncio.sleep,
) -> int:
    """Stop the operator, delete its Lease, then remove its finalizer from all runs; return from how many.

    In this order, because a running operator would add it again to runs with live attempts. `namespace`: the
    operator's; `runs_namespaces`: the runs', None for all. Raises HookError and KubeError.
    """
    try:
        await kube.patch(DEPLOYMENTS, namespace, deployment, {"spec": {"replicas": 0}}, subresource="scale")
    except ObjectNotFound:
        print(f"deployment {deployment} does not exist")
    await _until_gone(kube, namespace, selector, sleep)
    # It is no part of the release: the operator made it. Kept, it would delay the next installation.
    with contextlib.suppress(ObjectNotFound):
        await kube.delete(LEASES, namespace, lease, foreground=False)
    try:
        runs = await _runs(kube, runs_namespaces)
    except ObjectNotFound:
        return 0  # the CRD was deleted, and the runs with it
    held = [run for run in runs if FINALIZER in run["metadata"].get("finalizers", ())]
    for run in held:
        await _remove_finalizer(kube, run)
    return len(held)


async def _runs(kube: Kube, namespaces: Sequence[str] | None) -> list[Body]:
    """Return the metadata of all runs. A namespace that refuses is left out: its RoleBinding may be gone with it."""
    found: list[Body] = []
    for namespace in [None] if namespaces is None else namespaces:
        try:
            found += (await kube.list(TRAINING_RUNS, namespace, metadata_only=True)).items
        except RequestForbidden as error:
            if namespaces is None or len(namespaces) == 1:
                raise
            print(f"namespace {namespace} is left out: {error}", file=sys.stderr)
    return found


async def _until_gone(kube: Kube, namespace: str, selector: str, sleep: Sleep) -> None:
    for _ in range(POLLS):
        if not (await kube.list(PODS, namespace, labels=selector)).items:
            return
        await sleep(POLL_SECONDS)
    raise HookError(
        f"pods `{selector}` in namespace {namespace} do not end: delete them, then uninstall again, or add --no-hooks"
    )


async def _remove_finalizer(kube: Kube, run: Body) -> None:
    """Remove the finalizer from a run that other clients may change or delete meanwhile."""
    metadata = run["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    with contextlib.suppress(ObjectNotFound):
        for _ in range(MAX_TRIES):
            kept = [finalizer for finalizer in metadata.get("finalizers", ()) if finalizer != FINALIZER]
            seen = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
            try:
                await kube.patch(TRAINING_RUNS, namespace, name, {"metadata": {"finalizers": kept, **seen}})
            except Conflict:
                metadata = (await kube.get(TRAINING_RUNS, namespace, name))["metadata"]
            else:
                return
        raise HookError(f"run {namespace}/{name} keeps changing: remove its finalizer `{FINALIZER}` by hand")


async def check(kube: Kube, url: str, runs_namespaces: Sequence[str] | None) -> None:
    """Check that an operator is ready and that runs can be listed. Raises HookError and KubeError."""
    try:
        await asyncio.to_thread(_fetch, url)
    except OSError as error:
        raise HookError(f"{url}: {error}; inspect the operator's pods and their logs") from error
    runs = await _runs(kube, runs_namespaces)
    print(f"the operator is ready; {len(runs)} run(s) in {', '.join(runs_namespaces or ['all namespaces'])}")


def _fetch(url: str) -> None:
    with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_SECONDS) as answer:  # noqa: S310 - the chart's own service
        answer.read()


async def _run(options: argparse.Namespace) -> None:
    kube = await ApiServer.connect()
    try:
        if options.hook == "test":
            await check(kube, options.url, options.runs_namespaces)
            return
        namespace = os.environ[ENV_POD_NAMESPACE]
        if options.hook == "certificate":
            made = await provide_certificate(kube, namespace, options.secret, options.host, options.instance)
            print(f"Secret {options.secret} {'was made' if made else 'exists and is kept'}")
            return
        number = await uninstall(
            kube, options.deployment, namespace, options.selector, options.lease, options.runs_namespaces
        )
        print(f"removed the finalizer from {number} run(s)")
    finally:
        await kube.close()


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments used in the chart."""
    parser = argparse.ArgumentParser(prog="python -m stagecoach_operator.chart_hooks", description=__doc__)
    hooks = parser.add_subparsers(dest="hook", required=True)
    hook = hooks.add_parser(
        "uninstall", help="stop the operator, delete its Lease, then remove its finalizer from all runs"
    )
    hook.add_argument("--deployment", required=True, help="the operator's Deployment")
    hook.add_argument("--selector", required=True, help="labels of its pods")
    hook.add_argument("--lease", required=True, help="its Lease")
    maker = hooks.add_parser("certificate", help="make the progress server's certificate unless it exists")
    maker.add_argument("--secret", required=True, help="name of the Secret")
    maker.add_argument("--host", required=True, help="DNS name of the operator's Service")
    maker.add_argument("--instance", required=True, help="name of the release")
    probe = hooks.add_parser("test", help="check that the operator is ready and runs can be listed")
    probe.add_argument("--url", required=True, help="the operator's readiness probe")
    for each in (hook, probe):
        help_text = "a namespace of runs; may be repeated (default: all)"
        each.add_argument("--runs-namespace", dest="runs_namespaces", action="append", help=help_text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one hook; return the exit code."""
    options = argument_parser().parse_args(arguments)
    try:
        asyncio.run(_run(options))
    except (HookError, KubeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
