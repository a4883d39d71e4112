"""The pinned versions, and the modules that require them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster import __main__ as command
from tests.cluster.build import link_flags, module_file, replacements
from tests.cluster.report import ClusterError
from tests.cluster.versions import Part, read_versions

ETCD = Part("etcd", "go.etcd.io/etcd/server/v3", "v3.6.4", {"etcd": "go.etcd.io/etcd/server/v3"})
KUBERNETES = Part(
    "kubernetes",
    "k8s.io/kubernetes",
    "v1.36.3",
    {"kubelet": "k8s.io/kubernetes/cmd/kubelet"},
    local_version="v0.36.3",
    version_variable="k8s.io/component-base/version.gitVersion",
)


def test_every_part_is_pinned_to_one_released_version() -> None:
    for part in read_versions().parts.values():
        assert re.fullmatch(r"v\d+\.\d+\.\d+", part.version), part.label
        assert all(package.startswith(part.module) for package in part.programs.values()), part.label


def test_the_file_pins_exactly_the_programs_that_a_cluster_needs() -> None:
    parts = read_versions().parts
    wanted = {(part, program) for part, programs in command.NODE_PROGRAMS for program in programs}
    assert wanted == {(part.name, program) for part in parts.values() for program in part.programs}
    assert set(command.CONTROL_PLANE_PROGRAMS) < set(command.NODE_PROGRAMS)


def test_an_unknown_field_of_a_part_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "versions.toml"
    file.write_text(
        '[go]\nat_least = "1"\n[debian]\n[part.a]\nmodule = "m"\nversion = "v1.0.0"\nprograms = {}\nx = 1\n'
    )
    with pytest.raises(TypeError, match="'x'"):
        read_versions(file)


def test_modules_of_the_same_repository_are_replaced_by_their_released_version() -> None:
    upstream = {
        "Go": "1.26.0",
        "Require": [{"Path": "k8s.io/api", "Version": "v0.0.0"}, {"Path": "example.com/x", "Version": "v1.2.3"}],
        "Replace": [
            {"Old": {"Path": "k8s.io/client-go"}, "New": {"Path": "./staging/src/k8s.io/client-go"}},
            {"Old": {"Path": "example.com/x", "Version": "v1.2.3"}, "New": {"Path": "fork.com/x", "Version": "v1.2.4"}},
        ],
    }
    assert replacements(KUBERNETES, upstream) == {
        "k8s.io/api": "k8s.io/api v0.36.3",
        "k8s.io/client-go": "k8s.io/client-go v0.36.3",
        "example.com/x v1.2.3": "fork.com/x v1.2.4",
    }
    text = module_file(KUBERNETES, upstream)
    assert "go 1.26.0" in text
    assert "require k8s.io/kubernetes v1.36.3" in text
    assert "replace k8s.io/api => k8s.io/api v0.36.3" in text


def test_a_replacement_by_a_folder_is_dropped_if_its_modules_are_released_separately() -> None:
    upstream = {"Go": "1.24", "Replace": [{"Old": {"Path": "go.etcd.io/etcd/api/v3"}, "New": {"Path": "../api"}}]}
    assert replacements(ETCD, upstream) == {}
    assert "replace" not in module_file(ETCD, upstream)


def test_a_program_reports_its_version_if_it_has_a_variable_for_it() -> None:
    assert link_flags(ETCD) == "-s -w"
    assert link_flags(KUBERNETES).endswith("-X k8s.io/component-base/version.gitVersion=v1.36.3")


def test_commands_that_need_a_cluster_report_what_to_do_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ClusterError, match="make cluster"):
        command.existing_cluster(tmp_path)
    assert command.main(["--state", str(tmp_path), "env"]) == 1
    assert "run `make cluster` first" in capsys.readouterr().err
    assert command.main(["--state", str(tmp_path), "down"]) == 0
