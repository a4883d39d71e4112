"""The two sides: a chain of stages in one TrainingRun, and a chain of JobSets driven by their status."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kubernetes.client import CustomObjectsApi

from bench.handover.bench_cluster import DEFINITION, INPUT, BenchCluster
from bench.handover.calls import AuditLog, Calls, handover_calls
from bench.handover.watching import PodWatch, events
from stagecoach_api import names

NUM_STAGES = 12
NUM_HANDOVERS = NUM_STAGES - 1
CHAIN_SECONDS = 180
"""Timeout of one chain."""
GONE_SECONDS = 60.0

RUNS = (names.API_GROUP, names.API_VERSION)
JOBSETS = (names.JOBSET_GROUP, names.JOBSET_VERSION)
Body = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """A chain that has ended."""

    milliseconds: list[float]
    """Duration of every hand-over."""
    calls: Calls | None = None
    """The operator's calls over all hand-overs; None without an audit log, and for the peer."""


def stage_name(index: int) -> str:
    return f"s{index:02}"


def milliseconds(watch: PodWatch, chain: str) -> list[float]:
    stages = [(chain, stage_name(index)) for index in range(NUM_STAGES)]
    return [watch.handover_milliseconds(before, after) for before, after in pairwise(stages)]


class Ours:
    """The operator and a run in which every stage reads the output of the one before."""

    def __init__(self, cluster: BenchCluster) -> None:
        self._cluster = cluster
        self._objects: Any = CustomObjectsApi(cluster.api)
        self._audit = None if cluster.audit_log is None else AuditLog(cluster.audit_log, cluster.user)
        self.watch = PodWatch(cluster)
        self.jobset_spec: Body = {}
        """Spec of one of the operator's JobSets, which the peer copies."""

    def run(self, number: int) -> Round:
        """Create a run and wait until it completes."""
        name, where = f"ours-{number}", f"--namespace={self._cluster.namespace}"
        mark = 0 if self._audit is None else self._audit.mark()
        self._objects.create_namespaced_custom_object(*RUNS, self._cluster.namespace, names.PLURAL, self._body(name))
        first, last = ((name, stage_name(index)) for index in (0, NUM_STAGES - 1))
        self.watch.wait_for_end(last, CHAIN_SECONDS)
        run = f"{DEFINITION}/{name}"
        self._cluster.kubectl("wait", run, where, "--for=condition=Complete", "--timeout=60s")
        calls = None
        if self._audit is not None:
            begin, end = self.watch.end_of(first), self.watch.end_of(last)
            calls = handover_calls(self._audit.since(mark), begin, end, NUM_HANDOVERS)
        self.jobset_spec = self._a_jobset(name)["spec"]
        self._cluster.kubectl("delete", run, where, "--timeout=60s")
        self.watch.wait_until_gone(GONE_SECONDS)
        return Round(milliseconds(self.watch, name), calls)

    def _body(self, name: str) -> Body:
        sources: list[Body] = [{"uri": INPUT}, *({"stage": stage_name(index)} for index in range(NUM_HANDOVERS))]
        stages = [
            {"name": stage_name(index), "data": {"sources": [source]}, "resources": self._resources()}
            for index, source in enumerate(sources)
        ]
        return {
            "apiVersion": names.API_GROUP_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name},
            "spec": {"storage": self._cluster.run_storage(name), "stages": stages},
        }

    def _resources(self) -> Body:
        return {"nodes": 1, "gpusPerNode": 8, "gpuProduct": self._cluster.product}

    def _a_jobset(self, run: str) -> Body:
        found = self._objects.list_namespaced_custom_object(
            *JOBSETS, self._cluster.namespace, names.JOBSET_PLURAL, label_selector=f"{names.LABEL_RUN}={run}"
        )
        first: Body = found["items"][0]
        return first


class Peer:
    """A program that creates the next JobSet when the previous one has the condition Completed."""

    def __init__(self, cluster: BenchCluster, ours: Ours) -> None:
        self._cluster = cluster
        self._ours = ours
        self._objects: Any = CustomObjectsApi(cluster.api)

    def run(self, number: int) -> Round:
        """Run a chain of JobSets. Needs a finished round of ours, whose JobSet spec it copies."""
        chain = f"peer-{number}"
        where = (*JOBSETS, self._cluster.namespace, names.JOBSET_PLURAL)
        chosen = f"{names.LABEL_RUN}={chain}"
        response = self._objects.list_namespaced_custom_object(
            *where, watch=True, label_selector=chosen, timeout_seconds=CHAIN_SECONDS, _preload_content=False
        )
        self._follow(chain, response)
        response.close()
        self._objects.delete_collection_namespaced_custom_object(
            *where, label_selector=chosen, propagation_policy="Background"
        )
        self._ours.watch.wait_until_gone(GONE_SECONDS)
        return Round(milliseconds(self._ours.watch, chain))

    def _follow(self, chain: str, response: Any) -> None:
        """Create one JobSet after another. Raises RuntimeError on timeout."""
        index = 0
        self._create(chain, index)
        for _, event in events(response):
            jobset = event["object"]
            if jobset["metadata"]["labels"][names.LABEL_STAGE] != stage_name(index) or not is_completed(jobset):
                continue
            index += 1
            if index == NUM_STAGES:
                return
            self._create(chain, index)
        raise RuntimeError(f"{chain} was at stage {index} of {NUM_STAGES} after {CHAIN_SECONDS} s")

    def _create(self, chain: str, index: int) -> None:
        labels = {names.LABEL_RUN: chain, names.LABEL_STAGE: stage_name(index)}
        spec = copy.deepcopy(self._ours.jobset_spec)
        for job in spec["replicatedJobs"]:
            # Without the operator's own labels, so that it does not watch these.
            job["template"]["metadata"]["labels"] = labels
            job["template"]["spec"]["template"]["metadata"]["labels"] = labels
        body = {
            "apiVersion": "/".join(JOBSETS),
            "kind": names.JOBSET_KIND,
            "metadata": {"name": f"{chain}-{stage_name(index)}", "labels": labels},
            "spec": spec,
        }
        self._objects.create_namespaced_custom_object(*JOBSETS, self._cluster.namespace, names.JOBSET_PLURAL, body)


def is_completed(jobset: Body) -> bool:
    conditions = (jobset.get("status") or {}).get("conditions") or ()
    return any(item["type"] == "Completed" and item["status"] == "True" for item in conditions)
