"""The chart as rendered by Helm.

After an intended change: STAGECOACH_GOLDEN=write python -m pytest tests/charts/test_chart.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import stagecoach_operator
from stagecoach_api import names
from stagecoach_operator import chart_hooks, kube
from stagecoach_operator.audit import WATCHED
from stagecoach_operator.chart_hooks import argument_parser
from stagecoach_operator.settings import DEFAULT_FILE, ENV_POD_NAME, ENV_POD_NAMESPACE, Settings
from tests.charts.makers import (
    CHART,
    NAMESPACE,
    WITHOUT_CRD,
    Body,
    merged,
    nested,
    of_kind,
    pod_specs,
    render,
    rendered_text,
    run_helm,
    the,
)

pytestmark = pytest.mark.go

GOLDEN = Path(__file__).parent / "golden" / "default.yaml"
ELSEWHERE = {"pod_name", "pod_namespace", "progress_ca", "trainer_code"}
"""Settings that come from the pod's environment, or from files named in other settings."""

OTHERWISE: dict[str, object] = {
    "scope": "cluster",
    "namespaces": ["a", "b"],
    "replicas": 1,
    "fullnameOverride": "coach",
    "crds.install": True,
    "crds.keep": False,
    "images.registry": "localhost/stagecoach",
    "images.operatorRepository": "localhost/mirror/op",
    "images.trainerRepository": "localhost/mirror/trainer",
    "images.tag": "1.2.3",
    "images.operatorDigest": "sha256:" + "a" * 64,
    "images.trainerDigest": "sha256:" + "b" * 64,
    "images.pullPolicy": "Never",
    "images.pullSecrets": ["registry"],
    "stages.image": "localhost/own@sha256:" + "c" * 64,
    "profiles": {"h100": {"queue": {"name": "research"}, "resources": {"sharedMemory": "64Gi"}}},
    "allowed.serviceAccounts": ["train-*"],
    "allowed.secrets": ["s3"],
    "allowed.priorityClasses": [],
    "allowed.tolerations": ["nvidia.com/gpu"],
    "allowed.nodeSelectors": ["pool=training"],
    "allowed.images": ["localhost/*"],
    "stages.graceSeconds": 60,
    "stages.lostNodeSeconds": 61,
    "stages.leftoverSeconds": 62,
    "stages.userId": 1000,
    "stages.groupId": 1001,
    "stages.serviceAccount": "trainer",
    "stages.workSizeLimit": "500Gi",
    "storage.uri": "s3://models/runs",
    "storage.inputs": "s3://models/inputs",
    "storage.endpoint": "http://10.0.0.1:7070",
    "storage.region": "eu-central-1",
    "storage.credentialsSecret": "s3",
    "storage.allowed": [{"endpoint": "https://s3.example.com", "buckets": ["team-*"]}],
    "progress.certificateSecret": "certificate",
    "progress.tokenSeconds": 600,
    "serviceAccountAnnotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/reader"},
    "leaseSeconds": 5,
    "apiTimeoutSeconds": 7.5,
    "storeThreads": 2,
    "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
    "priorityClassName": "system-cluster-critical",
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "podAnnotations": {"example.com/scrape": "yes"},
    "podLabels": {"example.com/team": "ml"},
    "extraVolumes": [{"name": "authorities", "configMap": {"name": "authorities"}}],
    "extraVolumeMounts": [{"name": "authorities", "mountPath": "/etc/authorities"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpread": [{"topologyKey": "topology.kubernetes.io/zone"}],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control-plane", "operator": "Exists", "effect": "NoSchedule"}],
    "networkPolicy.enabled": False,
    "networkPolicy.metricsFrom": [],
    "serviceMonitor.enabled": True,
    "serviceMonitor.labels": {"release": "prometheus"},
}
"""For each value of the chart, one that differs from its default."""
NEEDS: dict[str, Body] = {
    "crds.keep": {},
    "namespaces": {"scope": "namespaces", "namespaces": ["c"]},
    "serviceMonitor.labels": {"serviceMonitor": {"enabled": True}},
}
"""Values that must be set for another value to have an effect."""


def leaves(schema: Body, above: str = "") -> dict[str, Body]:
    """Return the schemas of the chart's values by dotted path."""
    found = {}
    for name, part in schema["properties"].items():
        path = f"{above}{name}"
        if "default" in part:
            found[path] = part
        elif path != "global":
            found |= leaves(part, f"{path}.")
    return found


SCHEMA = yaml.safe_load((CHART / "values.schema.json").read_text(encoding="utf-8"))


def everything() -> Body:
    """Return values that all differ from their defaults, as far as they can be combined."""
    found: Body = {}
    for path, value in OTHERWISE.items():
        if path not in {"stages.image", "progress.certificateSecret", "namespaces"}:
            found = merged(found, nested(path, value))
    return merged(found, WITHOUT_CRD)


VARIANTS: dict[str, Body] = {
    "defaults": WITHOUT_CRD,
    "cluster scope": {"scope": "cluster", **WITHOUT_CRD},
    "two namespaces": {"scope": "namespaces", "namespaces": ["a", "b"], **WITHOUT_CRD},
    "everything else": everything(),
}


NAMESPACES = {"None": (NAMESPACE,), "cluster": None, "namespaces": ("a", "b")}
"""The namespaces that are watched, by scope."""


def test_the_default_rendering_matches_the_golden_file() -> None:
    text = rendered_text(WITHOUT_CRD)
    if os.environ.get("STAGECOACH_GOLDEN") == "write":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_helm_lint_passes() -> None:
    done = run_helm("lint", str(CHART), "--strict")
    assert done.returncode == 0, done.stdout + done.stderr


# -- values ------------------------------------------------------------------------------------------------------------


def test_values_yaml_is_short() -> None:
    assert len((CHART / "values.yaml").read_text(encoding="utf-8").splitlines()) < 400


@pytest.fixture(scope="module")
def default_text() -> str:
    return rendered_text(WITHOUT_CRD)


def test_every_value_has_an_alternative_here() -> None:
    assert sorted(OTHERWISE) == sorted(leaves(SCHEMA))
    assert {path for path, value in OTHERWISE.items() if leaves(SCHEMA)[path]["default"] == value} == {"crds.install"}


@pytest.mark.parametrize("path", sorted(OTHERWISE))
def test_every_value_changes_what_is_rendered(path: str, default_text: str) -> None:
    is_about_crd = path.startswith("crds.")
    base = NEEDS.get(path, WITHOUT_CRD)
    before = default_text if base is WITHOUT_CRD else rendered_text(base)
    given = nested(path, OTHERWISE[path]) if is_about_crd else merged(base, nested(path, OTHERWISE[path]))
    assert rendered_text(given) != before


def closed(schema: Body) -> bool:
    """Return whether an object in a schema lists its members, or types the others."""
    more = schema.get("additionalProperties")
    return more is False or (isinstance(more, dict) and "type" in more)


def test_the_schema_is_closed_everywhere() -> None:
    def objects(part: object, path: str) -> dict[str, Body]:
        found = {}
        if isinstance(part, dict):
            if part.get("type") == "object" and path != "/properties/global":
                found[path] = part
            for name, inner in part.items():
                found |= objects(inner, f"{path}/{name}")
        return found

    found = objects(SCHEMA, "")
    assert len(found) > 8
    assert [path for path, schema in found.items() if not closed(schema)] == []


REJECTED = {
    "an unknown value": {"replicaCount": 2},
    "an unknown value in a section": {"storage": {"url": "s3://models"}},
    "an unknown value in crds": {"crds": {"enabled": True}},
    "an unknown scope": {"scope": "namespaced"},
    "the scope of a list without it": {"scope": "namespaces", "namespaces": []},
    "a list of namespaces in another scope": {"namespaces": ["a"]},
    "a text instead of a number": {"replicas": "two"},
    "a fraction of a replica": {"replicas": 1.5},
    "a negative number of replicas": {"replicas": -1},
    "an invalid name": {"fullnameOverride": "Stage_Coach"},
    "a name without room for suffixes": {"fullnameOverride": "s" * 41},
    "no registry": {"images": {"registry": ""}},
    "a digest without its algorithm": {"images": {"operatorDigest": "a" * 64}},
    "an unknown pull policy": {"images": {"pullPolicy": "Sometimes"}},
    "pull secrets as objects": {"images": {"pullSecrets": [{"name": "registry"}]}},
    "a custom image by tag": {"stages": {"image": "localhost/own:1"}},
    "no time to save a checkpoint": {"stages": {"graceSeconds": 5}},
    "the root user": {"stages": {"userId": 0}},
    "allowed storage without buckets": {"storage": {"allowed": [{"endpoint": "https://s3.example.com"}]}},
    "storage on a node": {"storage": {"uri": "/var/lib/models"}},
    "storage without a scheme": {"storage": {"uri": "models/runs"}},
    "a token lifetime that is too short": {"progress": {"tokenSeconds": 60}},
    "a Lease without a duration": {"leaseSeconds": 0},
    "no timeout": {"apiTimeoutSeconds": 0},
    "no threads": {"storeThreads": 0},
    "an unknown kind of resources": {"resources": {"request": {"cpu": 1}}},
    "a list as a quantity": {"resources": {"limits": {"cpu": [1]}}},
    "a number as a label": {"nodeSelector": {"gpu": 1}},
    "a toleration with a misspelt member": {"tolerations": [{"keys": "gpu"}]},
    "an unknown taint effect": {"tolerations": [{"key": "gpu", "effect": "NoRun"}]},
    "a text instead of a boolean": {"serviceMonitor": {"enabled": "yes"}},
}


@pytest.mark.parametrize("values", REJECTED.values(), ids=REJECTED)
def test_helm_rejects(values: Body) -> None:
    done = run_helm("template", "stagecoach", str(CHART), values=values)
    assert done.returncode != 0
    assert list(values)[-1] in done.stderr


# -- the operator's settings -------------------------------------------------------------------------------------------


def settings_of(objects: list[Body]) -> Settings:
    document = yaml.safe_load(the(objects, "ConfigMap")["data"][DEFAULT_FILE.name])
    return Settings.model_validate(document)


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_operator_accepts_the_rendered_settings(values: Body) -> None:
    settings = settings_of(render(values))
    assert settings.namespaces == NAMESPACES[str(values.get("scope"))]
    assert settings.trainer_image.split("/")[-1].startswith("trainer")


def test_all_settings_can_be_set() -> None:
    image = {"stages": {"image": OTHERWISE["stages.image"]}}
    given: set[str] = set()
    for values in (*VARIANTS.values(), merged(everything(), image)):
        given |= settings_of(render(values)).model_fields_set
    assert given == set(Settings.model_fields) - ELSEWHERE


def test_values_reach_their_settings() -> None:
    settings = settings_of(render(everything()))
    assert (settings.grace_seconds, settings.lost_node_seconds, settings.leftover_seconds) == (60, 61, 62)
    assert (settings.user_id, settings.group_id) == (1000, 1001)
    assert settings.image_pull_secrets == ("registry",)
    assert settings.profiles["h100"].resources.shared_memory == "64Gi"
    assert settings.allowed.images == ("localhost/*",)
    assert settings.allowed.node_selectors == ("pool=training",)
    assert (settings.own_service_account, settings.own_secrets) == ("coach", ("coach-progress",))
    assert settings.storage.uri == "s3://models/runs"
    assert settings.storage.credentials is not None
    assert settings.storage.credentials.secret_name == "s3"  # noqa: S105 - a name
    assert (settings.lease_name, settings.lease_seconds) == ("coach", 5)
    assert settings.api_timeout_seconds == 7.5


def test_a_custom_trainer_image_is_identified_by_its_digest() -> None:
    assert settings_of(render(WITHOUT_CRD)).trainer_code_file is not None
    custom = settings_of(render(merged(WITHOUT_CRD, {"stages": {"image": OTHERWISE["stages.image"]}})))
    assert custom.trainer_code_file is None
    assert custom.code == "sha256:" + "c" * 64


def test_changed_settings_roll_out_new_pods() -> None:
    def annotations(values: Body) -> Body:
        found: Body = the(render(merged(WITHOUT_CRD, values)), "Deployment")
        return found["spec"]["template"]["metadata"]["annotations"]  # type: ignore[no-any-return]

    assert annotations({}) == annotations({})
    assert annotations({"storeThreads": 3}) != annotations({})


# -- the operator's pods -----------------------------------------------------------------------------------------------


def volume_names(pod: Body) -> set[str]:
    return {volume["name"] for volume in pod["volumes"]}


def test_the_service_targets_the_ports_in_the_settings() -> None:
    objects = render(WITHOUT_CRD)
    settings = settings_of(objects)
    (container,) = the(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    listening = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert listening == {
        "probes": settings.probe_port,
        "progress": settings.progress_port,
        "metrics": settings.metrics_port,
    }
    service = the(objects, "Service")
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(listening)
    assert (
        service["spec"]["selector"].items()
        <= the(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    )
    assert urlsplit(settings.progress_url or "").hostname == f"{service['metadata']['name']}.{NAMESPACE}.svc"


def test_files_named_in_the_settings_are_mounted() -> None:
    objects = render(everything())
    settings = settings_of(objects)
    pod = the(objects, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == volume_names(pod)
    assert str(DEFAULT_FILE) in mounts
    folder = str(Path(settings.progress_cert_file or "").parent)
    assert mounts[folder] == "certificate"
    assert {str(Path(file or "").parent) for file in (settings.progress_key_file, settings.progress_ca_file)} == {
        folder
    }
    environment = {item["name"]: item for item in container["env"]}
    assert {ENV_POD_NAME, ENV_POD_NAMESPACE} < set(environment)
    assert mounts[environment[names.ENV_CREDENTIALS_DIR]["value"]] == "credentials"


def test_no_secret_is_in_environment_or_arguments() -> None:
    for pod in pod_specs(render(everything())).values():
        for container in pod["containers"]:
            assert not any("secretKeyRef" in str(item) for item in container.get("env", ()))
            assert "envFrom" not in container


def unrestricted(pod: Body) -> list[str]:
    """Return violations of the restricted Pod Security Standard, and of our stricter rules."""
    security = pod["securityContext"]
    found = [] if security["runAsNonRoot"] and security["runAsUser"] > 0 else ["runs as root"]
    found += [] if security["seccompProfile"] == {"type": "RuntimeDefault"} else ["has no seccomp profile"]
    found += [f"uses {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [
        f"mounts {v['name']}" for v in pod.get("volumes", ()) if not v.keys() & {"configMap", "secret", "emptyDir"}
    ]
    for container in pod["containers"]:
        own = container["securityContext"]
        expected = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        found += [] if own == expected else [f"{container['name']} has {own}"]
        found += [] if container["resources"].get("limits", {}).get("memory") else ["has no memory limit"]
    return found


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_every_pod_complies_with_the_restricted_standard(values: Body) -> None:
    pods = pod_specs(render(values))
    assert len(pods) == 4
    assert {name: unrestricted(pod) for name, pod in pods.items() if unrestricted(pod)} == {}


def test_two_replicas_are_never_evicted_together() -> None:
    objects = render(WITHOUT_CRD)
    assert the(objects, "Deployment")["spec"]["replicas"] == 2
    budget = the(objects, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == the(objects, "Deployment")["spec"]["selector"]


# -- permissions -------------------------------------------------------------------------------------------------------

MAX_PERMISSIONS = 25
"""Pairs of verb and resource."""


def permissions(roles: list[Body]) -> list[tuple[str, str]]:
    return [
        (verb, resource)
        for role in roles
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_permissions_are_few_and_exclude_secrets(values: Body) -> None:
    objects = render(values)
    roles = [role for role in of_kind(objects, "Role", "ClusterRole") if not is_of_certificate(role)]
    found = permissions(roles)
    assert {resource for _, resource in found} & {"secrets", "*"} == set()
    assert "*" not in {verb for verb, _ in found}
    lasting = [
        body for body in of_kind(objects, "Role", "ClusterRole") if "annotations" not in body["metadata"]
    ]  # those of hooks are temporary
    assert len(set(permissions(lasting))) <= MAX_PERMISSIONS


VERBS = {"replace": {"update"}}
"""Verbs required by methods of `Kube` that are named differently."""


def required() -> set[tuple[str, str]]:
    """Return the pairs of verb and resource that the operator's code requires."""
    found = {(verb, resource.plural) for resource in WATCHED for verb in ("list", "watch")}
    for file in Path(stagecoach_operator.__path__[0]).rglob("*.py"):
        calls = re.findall(r"kube\.(\w+)\(\s*([A-Z_]+),([^\n]*)", file.read_text(encoding="utf-8"))
        for method, name, rest in calls:
            status = "/status" if '"status"' in rest else ""
            plural = (getattr(kube, name, None) or getattr(chart_hooks, name)).plural
            found |= {(verb, plural + status) for verb in VERBS.get(method, {method})}
    return found


OF_HOOKS = {("patch", "deployments"), ("delete", "leases"), ("create", "secrets"), ("patch", "secrets")}
"""Permissions that only hooks need."""


def test_the_operator_has_exactly_the_permissions_its_code_needs() -> None:
    lasting = [role for role in of_kind(render(WITHOUT_CRD), "Role") if "annotations" not in role["metadata"]]
    # Updates of finalizers are not called: admission checks that right for references with blockOwnerDeletion.
    assert set(permissions(lasting)) == required() - OF_HOOKS | {("update", "trainingruns/finalizers")}


AT_HOME = {"leases", "deployments/scale", "pods", "secrets"}
"""Resources that operator and hooks may use in the operator's own namespace, whatever the scope."""


def test_permissions_are_namespaced_unless_the_scope_is_the_cluster() -> None:
    assert of_kind(render(WITHOUT_CRD), "ClusterRole", "ClusterRoleBinding") == []
    wide = render({"scope": "cluster", **WITHOUT_CRD})
    assert len(of_kind(wide, "ClusterRole")) == 1
    assert {resource for _, resource in permissions(of_kind(wide, "Role"))} == AT_HOME


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_operator_cannot_change_or_delete_a_configmap_in_any_scope(values: Body) -> None:
    found = permissions(of_kind(render(values), "Role", "ClusterRole"))
    assert {verb for verb, resource in found if resource == "configmaps"} == {"get", "create"}


def test_in_the_scope_of_namespaces_each_has_a_role_and_the_operators_own_has_none() -> None:
    objects = render(VARIANTS["two namespaces"])
    assert of_kind(objects, "ClusterRole", "ClusterRoleBinding") == []
    for kind in ("Role", "RoleBinding"):
        found = [body["metadata"]["namespace"] for body in of_kind(objects, kind)]
        assert sorted(set(found)) == ["a", "b", NAMESPACE]
    own = [role for role in of_kind(objects, "Role") if role["metadata"]["namespace"] == NAMESPACE]
    assert {resource for _, resource in permissions(own)} == AT_HOME


def test_every_binding_is_for_a_role_of_the_chart_and_the_operator() -> None:
    for values in VARIANTS.values():
        objects = render(values)
        roles = {(role["kind"], role["metadata"]["name"]) for role in of_kind(objects, "Role", "ClusterRole")}
        bound = of_kind(objects, "RoleBinding", "ClusterRoleBinding")
        assert {(item["roleRef"]["kind"], item["roleRef"]["name"]) for item in bound} == roles
        account = the(objects, "ConfigMap")["metadata"]["name"]
        own = {body["metadata"]["name"] for body in of_kind(objects, "ServiceAccount")}
        assert own <= {account, f"{account}-certificate"}
        for item in bound:
            expected = f"{account}-certificate" if is_of_certificate(item) else account
            assert item["subjects"][0]["name"] == expected
        assert {pod["serviceAccountName"] for pod in pod_specs(objects).values()} == own


def test_only_the_lease_in_the_settings_may_be_renewed() -> None:
    for values in VARIANTS.values():
        objects = render(values)
        named = [rule for rule in the(objects, "Role", "-lease")["rules"] if "resourceNames" in rule]
        assert [rule["resourceNames"] for rule in named] == [[settings_of(objects).lease_name]]


# -- the certificate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_rendering_twice_gives_the_same_text_without_any_key(values: Body) -> None:
    """GitOps tools render again and again, and would replace a CA that running pods trust."""
    text = rendered_text(values)
    assert rendered_text(values) == text
    assert not re.search(r"PRIVATE KEY|LS0tLS1CRUdJTi|^kind: Secret$", text, re.MULTILINE)


def test_the_certificate_is_made_by_a_hook_that_may_touch_no_other_secret() -> None:
    objects = render(WITHOUT_CRD)
    options = argument_parser().parse_args(pod_specs(objects)["Job/stagecoach-certificate"]["containers"][0]["args"])
    assert options.secret == settings_of(objects).own_secrets[0]
    assert options.host == urlsplit(settings_of(objects).progress_url or "").hostname
    rules = {tuple(rule["verbs"]): rule.get("resourceNames") for rule in the(objects, "Role", "-certificate")["rules"]}
    assert rules == {("create",): None, ("get", "patch"): [options.secret]}
    hooks = {body["metadata"]["annotations"]["helm.sh/hook"] for body in objects if is_of_certificate(body)}
    assert hooks == {"pre-install,pre-upgrade"}


def is_of_certificate(body: Body) -> bool:
    return bool(body["metadata"]["name"].endswith("-certificate"))


def test_a_custom_certificate_replaces_the_charts() -> None:
    objects = render(merged(WITHOUT_CRD, {"progress": {"certificateSecret": "own"}}))
    assert not any(is_of_certificate(body) for body in objects)
    volumes = the(objects, "Deployment")["spec"]["template"]["spec"]["volumes"]
    assert [volume["secret"]["secretName"] for volume in volumes if volume["name"] == "certificate"] == ["own"]


# -- the CRD, and hooks ------------------------------------------------------------------------------------------------


def test_the_crd_is_the_generated_one_and_is_kept() -> None:
    (found,) = of_kind(render(), "CustomResourceDefinition")
    annotations = found["metadata"].pop("annotations")
    assert annotations.pop("helm.sh/resource-policy") == "keep"
    assert list(annotations) == ["stagecoach.dev/schema"]
    assert found["metadata"].pop("labels")["app.kubernetes.io/managed-by"] == "Helm"
    assert found == yaml.safe_load((CHART / "files" / "trainingruns.yaml").read_text(encoding="utf-8"))


def test_the_crd_is_a_template_so_that_helm_upgrades_it() -> None:
    assert not (CHART / "crds").exists()
    assert of_kind(render(WITHOUT_CRD), "CustomResourceDefinition") == []
    (found,) = of_kind(render({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert "helm.sh/resource-policy" not in found["metadata"]["annotations"]


def test_users_get_rights_on_runs_by_the_roles_of_kubernetes() -> None:
    roles = {role["metadata"]["name"].rsplit("-", 1)[1]: role for role in of_kind(render(), "ClusterRole")}
    verbs = {name: {verb for verb, _ in permissions([role])} for name, role in roles.items()}
    assert verbs["view"] == {"get", "list", "watch"}
    assert verbs["edit"] == {"create", "update", "patch", "delete", "deletecollection"}
    for name, into in (("view", {"view", "edit", "admin"}), ("edit", {"edit", "admin"})):
        labels = roles[name]["metadata"]["labels"]
        given = {label.rsplit("-", 1)[1] for label in labels if label.startswith("rbac.authorization.k8s.io/")}
        assert given == into
    assert not any("status" in resource for _, resource in permissions([roles["edit"]])), "only the operator writes it"


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_arguments_of_hooks_are_valid(values: Body) -> None:
    pods = pod_specs(render(values))
    hooks = {name: pod["containers"][0] for name, pod in pods.items() if not name.startswith("Deployment")}
    assert len(hooks) == 3
    watched = NAMESPACES[str(values.get("scope"))]
    for container in hooks.values():
        assert container["command"][1:] == ["-m", "stagecoach_operator.chart_hooks"]
        expected = () if container["args"][0] == "certificate" else watched or ()
        options = argument_parser().parse_args(container["args"])
        assert tuple(getattr(options, "runs_namespaces", None) or ()) == expected


def test_the_uninstall_hook_selects_the_operators_pods() -> None:
    objects = render(WITHOUT_CRD)
    options = argument_parser().parse_args(pod_specs(objects)["Job/stagecoach-uninstall"]["containers"][0]["args"])
    deployment = the(objects, "Deployment")
    assert options.deployment == deployment["metadata"]["name"]
    selected = dict(pair.split("=") for pair in options.selector.split(","))
    assert selected.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert not selected.items() <= the(objects, "Job", "-uninstall")["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("release", "name"), [("stagecoach", "stagecoach"), ("a", "a-stagecoach"), ("b" * 53, "b" * 40)]
)
def test_names_fit_for_any_release_name(release: str, name: str) -> None:
    objects = render(WITHOUT_CRD, release=release)
    assert the(objects, "Deployment")["metadata"]["name"] == name
    assert max(len(body["metadata"]["name"]) for body in objects) <= 63
