"""The pod of a stage: its configuration, its rights, its placement."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from stagecoach_api import names
from stagecoach_core.manifests.configmap import config_map
from stagecoach_core.manifests.jobset import job_set, job_template
from stagecoach_core.manifests.pod import pod_template
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt
from stagecoach_core.policies.avoidance import AvoidedNode
from tests.core.makers import data_stage
from tests.core.manifests.makers import A100, REPORTING, UID, make_attempt, unknown_fields
from tests.trainer.rewards.makers import evaluate_stage, feedback_term

SETTINGS = ManifestSettings()
SECRET = {"uri": "s3://models/demo", "credentials": {"secretName": "s3-access"}}


def pod_of(attempt: StageAttempt, settings: ManifestSettings = SETTINGS) -> dict[str, Any]:
    spec: dict[str, Any] = pod_template(attempt, settings)["spec"]
    return spec


def container_of(attempt: StageAttempt, settings: ManifestSettings = SETTINGS) -> dict[str, Any]:
    containers: list[dict[str, Any]] = pod_of(attempt, settings)["containers"]
    (container,) = containers
    return container


def environment_of(attempt: StageAttempt, settings: ManifestSettings = SETTINGS) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container_of(attempt, settings)["env"]}


EVERYTHING: dict[str, Any] = {
    "resources": A100,
    "queue": {"name": "research", "priorityClass": "high", "requiredTopology": "cloud.example.com/rack"},
    "pods": {
        "nodeSelector": {"pool": "train"},
        "tolerations": [{"key": "reserved", "value": "research", "effect": "NoSchedule"}],
        "volumes": [
            {"name": "corpus", "mountPath": "/corpus", "claimName": "corpus"},
            {"name": "rules", "mountPath": "/rules", "configMapName": "rules", "subPath": "zh"},
            {"name": "keys", "mountPath": "/keys", "secretName": "keys"},
        ],
        "fabric": [{"name": "NCCL_IB_HCA", "value": "mlx5"}],
        "imagePullSecrets": ["registry"],
        "serviceAccount": "trainer",
        "priorityClass": "research",
    },
}


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(make_attempt(), id="a stage that asks for nothing"),
        pytest.param(make_attempt(storage=SECRET, **EVERYTHING), id="a stage that asks for everything"),
    ],
)
def test_kubernetes_knows_every_field(attempt: StageAttempt) -> None:
    settings = REPORTING.model_copy(update={"work_size_limit": "100Gi"})
    assert list(unknown_fields(job_template(attempt, settings), "V1JobTemplateSpec")) == []
    assert list(unknown_fields(config_map(attempt, settings), "V1ConfigMap")) == []
    assert list(unknown_fields(job_set(attempt, settings)["metadata"], "V1ObjectMeta")) == []


def test_the_oracle_finds_what_kubernetes_does_not_know() -> None:
    template = pod_template(make_attempt(), SETTINGS)
    template["spec"]["containers"][0]["readOnlyRoot"] = True
    template["spec"]["restartPolicy"] = 3
    assert list(unknown_fields(template, "V1PodTemplateSpec")) == [
        ".spec.restartPolicy: 3 is no str",
        ".spec.containers[0].readOnlyRoot",
    ]


# -- gang --------------------------------------------------------------------------------------------------------------


def test_a_stage_is_one_indexed_job_with_a_pod_per_node_and_kubernetes_restarts_nothing() -> None:
    made = job_set(make_attempt(resources={"nodes": 4}), SETTINGS)
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert (replicated["name"], replicated["replicas"]) == ("w", 1)
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    assert (made["spec"]["failurePolicy"], job["backoffLimit"]) == ({"maxRestarts": 0}, 0)
    assert (job["podReplacementPolicy"], job["template"]["spec"]["restartPolicy"]) == ("Failed", "Never")
    assert made["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert "suspend" not in made["spec"]


def test_every_object_is_labelled_and_owned_by_the_run() -> None:
    attempt = make_attempt(number=7, resources={"nodes": 2})
    made = job_set(attempt, SETTINGS)
    job = made["spec"]["replicatedJobs"][0]["template"]
    wanted = {
        "app.kubernetes.io/managed-by": "stagecoach",
        "stagecoach.dev/run": "demo",
        "stagecoach.dev/run-uid": UID,
        "stagecoach.dev/stage": "pretrain",
        "stagecoach.dev/attempt": "7",
    }
    metadata = [made["metadata"], job["metadata"], job["spec"]["template"]["metadata"]]
    metadata.append(config_map(attempt, SETTINGS)["metadata"])
    assert all(item["labels"] == wanted for item in metadata)
    assert all(item["annotations"] == {"stagecoach.dev/stage-digest": attempt.resolved.digest} for item in metadata)
    for item in (metadata[0], metadata[-1]):
        (owner,) = item["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (UID, True)
        assert item["name"].startswith(attempt.name)


def test_a_queue_labels_the_jobset_and_its_topology_the_pods() -> None:
    queue = {"name": "research", "priorityClass": "high", "requiredTopology": "cloud.example.com/rack"}
    made = job_set(make_attempt(queue=queue), SETTINGS)
    job = made["spec"]["replicatedJobs"][0]["template"]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert made["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    assert annotations["kueue.x-k8s.io/podset-required-topology"] == "cloud.example.com/rack"
    assert "kueue" not in str(job["metadata"])


def test_without_a_queue_there_are_no_labels_of_kueue() -> None:
    assert "kueue" not in str(job_set(make_attempt(resources=A100), SETTINGS))


def test_ranks_meet_at_pod_0_and_each_pods_rank_is_its_index() -> None:
    attempt = make_attempt(resources=A100)
    found = environment_of(attempt)
    assert (found["PET_NNODES"], found["PET_NPROC_PER_NODE"], found["PET_MASTER_PORT"]) == ("16", "8", "29500")
    assert found["PET_MASTER_ADDR"] == f"{attempt.name}-w-0-0.{attempt.name}"
    rank = container_of(attempt)["env"][-1]
    assert rank["name"] == "PET_NODE_RANK"
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]


def test_the_launcher_reads_the_variables_the_pod_has() -> None:
    launcher = pytest.importorskip("stagecoach_trainer.launcher.__main__")
    attempt = make_attempt(resources=A100)
    environment = environment_of(attempt) | {names.ENV_NODE_RANK: "3"}
    command = launcher.worker_command(attempt.resolved.num_nodes, attempt.resolved.ranks_per_node, 300, environment)
    assert {"--nnodes=16", "--nproc-per-node=8", "--node-rank=3", "--master-port=29500"} <= set(command)
    assert f"--master-addr={attempt.name}-w-0-0.{attempt.name}" in command


# -- configuration -----------------------------------------------------------------------------------------------------


def test_paths_in_the_environment_are_mounted() -> None:
    attempt = make_attempt(storage=SECRET)
    found, mounted = environment_of(attempt, REPORTING), container_of(attempt, REPORTING)["volumeMounts"]
    paths = [item["mountPath"] for item in mounted]
    writable = [item["mountPath"] for item in mounted if not item.get("readOnly")]
    files = (names.ENV_STAGE_FILE, names.ENV_PROGRESS_TOKEN, names.ENV_PROGRESS_CA, names.ENV_CREDENTIALS_DIR)
    for name in files:
        assert any(found[name].startswith(path) for path in paths), name
    for name in (names.ENV_WORK_DIR, names.ENV_CACHE_DIR, names.ENV_PROGRESS_FILE, "HOME"):
        assert any(found[name].startswith(path) for path in writable), name
    assert found[names.ENV_RESULT_FILE] == container_of(attempt)["terminationMessagePath"]


def test_the_stage_is_in_an_immutable_configmap() -> None:
    attempt = make_attempt(storage={"uri": "s3://models/demo", "region": "eu-central-1"})
    made = config_map(attempt, SETTINGS)
    assert made["immutable"] is True
    assert type(attempt.resolved).model_validate_json(made["data"]["stage.json"]) == attempt.resolved
    assert attempt.resolved.storage_region == "eu-central-1"


def test_another_content_is_another_configmap_and_the_pods_mount_the_one_made_for_them() -> None:
    """RBAC cannot limit a change of ConfigMaps to the operator's own, so it changes none."""
    attempt = make_attempt()
    renewed = SETTINGS.model_copy(update={"progress_url": "https://x.svc", "progress_ca": "another CA"})
    found = [config_map(attempt, settings)["metadata"]["name"] for settings in (SETTINGS, SETTINGS, renewed)]
    assert found[0] == found[1] != found[2]
    for settings, name in ((SETTINGS, found[0]), (renewed, found[2])):
        volume = pod_template(attempt, settings)["spec"]["volumes"][0]
        assert volume == {"name": "stage", "configMap": {"name": name}}


@pytest.mark.parametrize(
    ("resources", "threads"),
    [
        pytest.param({}, "1", id="nothing asked for"),
        pytest.param({"cpu": "8"}, "8", id="one rank"),
        pytest.param({"cpu": "96", "gpusPerNode": 8}, "12", id="a rank per GPU"),
        pytest.param({"cpu": "500m", "ranksPerNode": 2}, "1", id="less than a CPU each"),
    ],
)
def test_threads_are_always_pinned(resources: dict[str, Any], threads: str) -> None:
    assert environment_of(make_attempt(resources=resources))[names.ENV_THREADS] == threads


def test_the_launcher_ends_before_the_pod_is_killed() -> None:
    settings = ManifestSettings(grace_seconds=120)
    assert pod_of(make_attempt(), settings)["terminationGracePeriodSeconds"] == 120
    assert container_of(make_attempt(), settings)["command"][-1] == "--grace-seconds=110"


def test_an_attempt_reports_as_itself_only() -> None:
    one, other = make_attempt(1), make_attempt(2)
    urls = [environment_of(item, REPORTING)[names.ENV_PROGRESS_URL] for item in (one, other)]
    assert urls[0] == (
        "https://stagecoach.stagecoach-system.svc:8443"
        f"/apis/stagecoach.dev/v1alpha1/namespaces/default/attempts/{one.name}/status"
    )
    audiences = [
        volume["projected"]["sources"][0]["serviceAccountToken"]["audience"]
        for item in (one, other)
        for volume in pod_of(item, REPORTING)["volumes"]
        if "projected" in volume
    ]
    assert audiences == [names.progress_audience("default", item.name) for item in (one, other)]
    assert len(set(audiences)) == 2


def test_without_a_progress_server_there_is_no_token() -> None:
    assert "projected" not in str(pod_of(make_attempt()))
    assert "KUBEFLOW" not in str(container_of(make_attempt()))


# -- security ----------------------------------------------------------------------------------------------------------


def violations_of_restricted(pod: dict[str, Any]) -> list[str]:
    """Return the rules of the `restricted` Pod Security Standard, and of two of ours, that a pod violates."""
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "name"}
    broken = [f"volume {volume['name']}" for volume in pod["volumes"] if not set(volume) <= allowed]
    broken += [name for name in ("hostNetwork", "hostPID", "hostIPC", "initContainers") if name in pod]
    whole = pod["securityContext"]
    if whole.get("runAsNonRoot") is not True or whole.get("runAsUser", 0) == 0:
        broken.append("runAsNonRoot")
    if whole.get("seccompProfile") != {"type": "RuntimeDefault"}:
        broken.append("seccompProfile")
    for container in pod["containers"]:
        context = container["securityContext"]
        if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            broken.append("privileges")
        if context.get("readOnlyRootFilesystem") is not True:
            broken.append("readOnlyRootFilesystem")
        if any("hostPort" in port for port in container["ports"]):
            broken.append("hostPort")
    if pod["automountServiceAccountToken"] is not False:
        broken.append("automountServiceAccountToken")
    return broken


@pytest.mark.parametrize("settings", [SETTINGS, REPORTING], ids=["plain", "reporting"])
def test_pods_conform_to_the_restricted_profile(settings: ManifestSettings) -> None:
    assert violations_of_restricted(pod_of(make_attempt(storage=SECRET, **EVERYTHING), settings)) == []


def test_credentials_are_files_and_never_in_the_environment() -> None:
    attempt = make_attempt(storage=SECRET)
    (volume,) = [item for item in pod_of(attempt)["volumes"] if "secret" in item]
    assert volume["secret"]["secretName"] == "s3-access"
    assert [item["path"] for item in volume["secret"]["items"]] == ["accessKeyId", "secretAccessKey"]
    assert "secretKeyRef" not in str(pod_of(attempt))
    assert "s3-access" not in str(container_of(attempt))
    assert "secret" not in str(pod_of(make_attempt())["volumes"])


def test_keys_of_endpoints_are_files_in_the_folder_named_by_the_environment() -> None:
    terms = [
        feedback_term(secret=name) | {"name": f"t{index}"} for index, name in enumerate(("b-key", "a-key", "b-key"))
    ]
    attempt = make_attempt(stage=evaluate_stage(*terms, feedback_term()), storage=SECRET)
    container, environment = container_of(attempt), environment_of(attempt)
    secrets = {item["name"]: item["secret"] for item in pod_of(attempt)["volumes"] if "secret" in item}
    mounts = {item["name"]: item for item in container["volumeMounts"] if item["name"].startswith("endpoint-key-")}
    assert [secrets[name]["secretName"] for name in mounts] == ["a-key", "b-key"]
    for name, mount in mounts.items():
        assert mount["mountPath"] == f"{environment[names.ENV_ENDPOINT_KEYS]}/{secrets[name]['secretName']}"
        assert mount["readOnly"] is True
        assert secrets[name]["items"] == [{"key": "apiKey", "path": "apiKey"}]
        assert secrets[name]["defaultMode"] == 0o440
    assert "a-key" not in str(container["env"])
    assert violations_of_restricted(pod_of(attempt)) == []
    assert list(unknown_fields(job_template(attempt, SETTINGS), "V1JobTemplateSpec")) == []


def test_a_stage_without_endpoints_has_no_keys() -> None:
    for attempt in (make_attempt(), make_attempt(stage=evaluate_stage(feedback_term()))):
        assert names.ENV_ENDPOINT_KEYS not in environment_of(attempt)
        assert "endpoint-key" not in str(pod_of(attempt))


# -- resources and placement -------------------------------------------------------------------------------------------


def test_gpus_are_requested_with_product_and_toleration() -> None:
    pod = pod_of(make_attempt(resources=A100))
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "1000Gi", "nvidia.com/gpu": "8", "rdma/hca": "8"}
    assert resources["requests"] == {"cpu": "96", **resources["limits"]}
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_a_stage_without_gpus_stays_off_gpu_nodes() -> None:
    resources = {"gpuProduct": "NVIDIA-A100-SXM4-80GB", "gpusPerNode": 0}
    pod = pod_of(make_attempt(stage=data_stage("corpus"), resources=resources))
    assert not {"nodeSelector", "tolerations"} & set(pod)
    assert "NCCL_DEBUG" not in str(pod)


def test_shared_memory_has_the_requested_size() -> None:
    def sizes(attempt: StageAttempt) -> list[str]:
        return [item["emptyDir"]["sizeLimit"] for item in pod_of(attempt)["volumes"] if "Memory" in str(item)]

    assert sizes(make_attempt(resources={"sharedMemory": "64Gi"})) == ["64Gi"]
    assert sizes(make_attempt()) == ["64Mi"]


def test_a_run_can_override_nccls_log_level() -> None:
    quiet = {"fabric": [{"name": "NCCL_DEBUG", "value": "VERSION"}, {"name": "NCCL_SOCKET_IFNAME", "value": "eth0"}]}
    found = environment_of(make_attempt(resources=A100, pods=quiet))
    assert (found["NCCL_DEBUG"], found["NCCL_SOCKET_IFNAME"]) == ("VERSION", "eth0")
    assert environment_of(make_attempt(resources=A100))["NCCL_DEBUG"] == "WARN"


def test_a_runs_settings_take_precedence_over_the_operators() -> None:
    settings = ManifestSettings(service_account="default-trainer", image_pull_secrets=("shared",))
    assert pod_of(make_attempt(), settings)["imagePullSecrets"] == [{"name": "shared"}]
    assert pod_of(make_attempt(), settings)["serviceAccountName"] == "default-trainer"
    own = pod_of(make_attempt(**EVERYTHING), settings)
    assert own["imagePullSecrets"] == [{"name": "registry"}]
    assert (own["serviceAccountName"], own["priorityClassName"]) == ("trainer", "research")


def test_a_runs_volumes_cannot_replace_ours() -> None:
    volumes = [{"name": "stage", "mountPath": "/stage", "claimName": "mine", "readOnly": False}]
    attempt = make_attempt(pods={"volumes": volumes})
    found = [item["name"] for item in pod_of(attempt)["volumes"]]
    assert len(found) == len(set(found))
    (mount,) = [item for item in container_of(attempt)["volumeMounts"] if item["mountPath"] == "/stage"]
    assert "readOnly" not in mount


@pytest.mark.parametrize(
    ("resources", "placement", "kind", "field"),
    [
        ({"nodes": 2, "gpusPerNode": 8}, None, "podAntiAffinity", "required"),
        ({"nodes": 2}, None, "podAntiAffinity", "preferred"),
        ({"nodes": 2}, "spread", "podAntiAffinity", "required"),
        ({"nodes": 2, "gpusPerNode": 8}, "preferSpread", "podAntiAffinity", "preferred"),
        ({"nodes": 2, "gpusPerNode": 8}, "pack", "podAffinity", "preferred"),
    ],
)
def test_two_nodes_are_two_nodes(resources: dict[str, Any], placement: str | None, kind: str, field: str) -> None:
    """PyTorchJob users find both pods of `nodes: 2` on one node (kubeflow/training-operator#1710)."""
    pods = {} if placement is None else {"placement": placement}
    attempt = make_attempt(number=3, resources=resources, pods=pods)
    affinity = pod_of(attempt)["affinity"]
    (term,) = affinity.pop(kind)[f"{field}DuringSchedulingIgnoredDuringExecution"]
    assert affinity == {}
    term = term.get("podAffinityTerm", term)
    assert term["topologyKey"] == "kubernetes.io/hostname"
    # Pods of an earlier attempt that still end must not keep those of this one away.
    assert term["labelSelector"]["matchLabels"][names.LABEL_ATTEMPT] == "3"
    labels = pod_template(attempt, SETTINGS)["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"].items() <= labels.items()
    assert list(unknown_fields(job_template(attempt, SETTINGS), "V1JobTemplateSpec")) == []


def test_one_pod_needs_no_affinity() -> None:
    assert "affinity" not in pod_of(make_attempt(resources={"gpusPerNode": 8}))


def test_avoided_nodes_are_named_one_by_one() -> None:
    """Kubernetes accepts a single value for a requirement on `metadata.name`."""
    nodes = (AvoidedNode("n-1", 2, True), AvoidedNode("n-2", 3, True), AvoidedNode("n-3", 1, False))
    attempt = dataclasses.replace(make_attempt(), avoided=nodes)
    found = pod_of(attempt)["affinity"]["nodeAffinity"]
    (term,) = found["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [field["values"] for field in term["matchFields"]] == [["n-1"], ["n-2"]]
    (preferred,) = found["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [field["values"] for field in preferred["preference"]["matchFields"]] == [["n-3"]]
    assert list(unknown_fields(job_template(attempt, SETTINGS), "V1JobTemplateSpec")) == []
