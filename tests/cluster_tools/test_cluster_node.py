"""A node's traces on the machine and their removal; images, certificates, configurations."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tarfile
import tomllib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from tests.cluster import kwok, s3
from tests.cluster.addons import ADDONS
from tests.cluster.images import write_program_image
from tests.cluster.layout import PORTS, Kind, Layout, find_layout
from tests.cluster.machine import mounts_below, remove_log_links
from tests.cluster.network import removals
from tests.cluster.node import cni_network, containerd_configuration, corefile_text
from tests.cluster.pki import Authority, make_service_account_key, write_kubeconfig

RULES = """-P POSTROUTING ACCEPT
-N CNI-1a2b
-N DOCKER
-N KUBE-POSTROUTING
-N KUBE-MARK-MASQ
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s 10.213.0.4/32 -m comment --comment "name: \\"stagecoach\\"" -j CNI-1a2b
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A KUBE-POSTROUTING -j KUBE-MARK-MASQ
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(state=tmp_path / "state", cache=tmp_path / "cache", kind=Kind.NODE)
    made.make()
    return made


def test_every_part_listens_on_its_own_port(layout: Layout) -> None:
    assert len({layout.port(name) for name in PORTS}) == len(PORTS)
    assert layout.port("apiserver") == layout.first_port


def test_a_control_plane_without_a_node_listens_on_the_loopback_only(layout: Layout) -> None:
    assert ip_address(find_layout(Kind.CONTROL_PLANE, state=layout.state).address).is_loopback
    assert not ip_address(layout.address).is_loopback


def test_the_state_folder_is_private_to_its_owner(layout: Layout) -> None:
    assert stat.S_IMODE(layout.state.stat().st_mode) == 0o700


def test_only_our_chains_are_removed_after_the_rules_that_jump_to_them() -> None:
    changes = removals(RULES.splitlines())
    assert changes == [
        ["-D", "POSTROUTING", "-m", "comment", "--comment", "kubernetes postrouting rules", "-j", "KUBE-POSTROUTING"],
        [
            "-D",
            "POSTROUTING",
            "-s",
            "10.213.0.4/32",
            "-m",
            "comment",
            "--comment",
            'name: "stagecoach"',
            "-j",
            "CNI-1a2b",
        ],
        ["-F", "CNI-1a2b"],
        ["-F", "KUBE-POSTROUTING"],
        ["-F", "KUBE-MARK-MASQ"],
        ["-X", "CNI-1a2b"],
        ["-X", "KUBE-POSTROUTING"],
        ["-X", "KUBE-MARK-MASQ"],
    ]


def test_mounts_below_a_folder_are_unmounted_in_reverse_order() -> None:
    mounts = "\n".join(
        f"none {point} tmpfs rw 0 0" for point in ["/", "/s/a", "/s/a/b", "/s", "/super", "/s/with\\040space"]
    )
    assert mounts_below(Path("/s"), mounts) == ["/s/with space", "/s/a/b", "/s/a"]


def test_an_image_contains_one_program_with_the_digest_of_its_configuration(tmp_path: Path) -> None:
    program = tmp_path / "manager"
    program.write_bytes(b"\x7fELF program")
    archive = tmp_path / "image.tar"
    write_program_image(archive, "example.com/it:v1", program, entrypoint=["/manager"], path="/manager")
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    manifest = json.loads(files["manifest.json"])[0]
    configuration = json.loads(files[manifest["Config"]])
    layer = files[manifest["Layers"][0]]
    assert manifest["RepoTags"] == ["example.com/it:v1"]
    assert configuration["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    assert int(configuration["config"]["User"].split(":")[0]) > 0
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert [(member.name, member.mode) for member in tar] == [("manager", 0o755)]


def test_containerd_writes_below_our_folder_only(tmp_path: Path) -> None:
    configuration = tomllib.loads(containerd_configuration(tmp_path, tmp_path / "containerd.sock"))
    assert configuration["plugins"]["io.containerd.grpc.v1.cri"]["restrict_oom_score_adj"] is True
    paths = [value for value in texts(configuration) if value.startswith("/")]
    ours = [path for path in paths if path.startswith(str(tmp_path))]
    assert sorted(set(paths) - set(ours)) == ["/stagecoach-cluster/shims", "/usr/lib/cni"]


def texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)


def test_pods_get_addresses_of_the_bridges_network_and_the_smallest_mtu(tmp_path: Path, layout: Layout) -> None:
    plugin = cni_network(tmp_path, 1400)["plugins"][0]
    assert plugin["mtu"] == 1400
    assert plugin["ipam"]["ranges"] == [[{"subnet": "10.213.0.0/24"}]]
    assert f"bind {layout.address}" in corefile_text(layout, tmp_path / "kubeconfig")


def test_links_to_the_logs_of_other_nodes_pods_are_kept(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "containers"
    folder.mkdir()
    (folder / "ours.log").symlink_to(layout.state / "pod-logs" / "x" / "0.log")
    (folder / "other.log").symlink_to(tmp_path / "elsewhere.log")
    monkeypatch.setattr("tests.cluster.machine.LOG_LINKS", folder)
    remove_log_links(layout)
    assert [link.name for link in folder.iterdir()] == ["other.log"]


def test_a_servers_certificate_is_valid_for_its_hosts_only(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    pair = authority.issue("apiserver", "kube-apiserver", hosts=["kubernetes.default.svc", "127.0.0.1"])
    certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
    store = Store([x509.load_pem_x509_certificate(authority.pair.certificate.read_bytes())])
    verifier = PolicyBuilder().store(store)
    for name in (x509.DNSName("kubernetes.default.svc"), x509.IPAddress(ip_address("127.0.0.1"))):
        verifier.build_server_verifier(name).verify(certificate, [])
    with pytest.raises(VerificationError):
        verifier.build_server_verifier(x509.DNSName("example.com")).verify(certificate, [])


def test_a_client_has_a_name_and_groups_and_a_private_key_file(tmp_path: Path) -> None:
    pair = Authority(tmp_path, "ca").issue("kubelet", "system:node:n", groups=["system:nodes"])
    subject = x509.load_pem_x509_certificate(pair.certificate.read_bytes()).subject
    assert subject.rfc4514_string() == "CN=system:node:n,O=system:nodes"
    assert stat.S_IMODE(pair.key.stat().st_mode) == 0o600
    again = Authority(tmp_path, "ca").issue("kubelet", "system:node:n", groups=["system:nodes"])
    assert again == pair


def test_tokens_are_signed_with_rsa_as_on_most_clusters(tmp_path: Path) -> None:
    key = serialization.load_pem_private_key(make_service_account_key(tmp_path).read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)


def test_a_kubeconfig_embeds_its_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    file = write_kubeconfig(
        tmp_path / "kubeconfig", "https://127.0.0.1:1", authority.pair.certificate, authority.issue("me", "me")
    )
    assert str(tmp_path) not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_s3_keys_are_created_once_in_a_private_file(layout: Layout) -> None:
    (layout.state / "s3").mkdir()
    key = s3.read_or_make_key(layout)
    assert s3.read_or_make_key(layout) == key
    assert stat.S_IMODE(layout.s3_credentials.stat().st_mode) == 0o600


def test_controllers_use_images_that_are_on_the_node() -> None:
    for addon in ADDONS:
        images = [text for text in texts(addon.values("v9.9.9")) if text in ("Never", "v9.9.9", addon.image)]
        assert sorted(images) == sorted(["Never", "v9.9.9", addon.image])


def test_a_simulated_node_has_gpus_and_repels_other_pods() -> None:
    node = kwok.gpu_node("a-0", "NVIDIA-A100-SXM4-80GB")
    assert node["status"]["allocatable"]["nvidia.com/gpu"] == "8"
    assert node["metadata"]["labels"]["nvidia.com/gpu.product"] == "NVIDIA-A100-SXM4-80GB"
    assert node["spec"]["taints"][0]["effect"] == "NoSchedule"
