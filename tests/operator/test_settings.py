"""The operator's settings: from a file and the pod's environment, with all mistakes reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach_api.spec import SecretReference, Storage
from stagecoach_operator.settings import Settings, SettingsError, load_settings


def load(folder: Path, text: str, **environment: str) -> Settings:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings({"STAGECOACH_SETTINGS_FILE": str(file), **environment})


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Settings()


def test_the_file_has_camel_case_and_the_pod_its_own_name(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "{namespaces: [research], graceSeconds: 60, storage: {uri: 's3://models'}}",
        POD_NAME="stagecoach-0",
        POD_NAMESPACE="system",
    )
    assert (settings.namespaces, settings.grace_seconds, settings.launcher_grace_seconds) == (("research",), 60, 50)
    assert (settings.pod_name, settings.pod_namespace, settings.storage.uri) == (
        "stagecoach-0",
        "system",
        "s3://models",
    )


def test_certificates_and_code_may_be_in_separate_files(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("PEM\n", encoding="utf-8")
    (tmp_path / "code").write_text("abc\n", encoding="utf-8")
    settings = load(tmp_path, f"progressCaFile: {tmp_path}/ca.crt\ntrainerCodeFile: {tmp_path}/code\n")
    assert (settings.progress_ca, settings.code) == ("PEM\n", "abc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[1]", "is a list; it must be a mapping", id="a list"),
        pytest.param("a: [", "not YAML", id="not YAML"),
        pytest.param("{graceSeconds: 5, colour: red}", r"graceSeconds: .*colour: ", id="all wrong fields are named"),
        pytest.param("progressCaFile: /nonexistent/ca.crt", "ca.crt", id="a missing file"),
    ],
)
def test_errors_contain_the_name_of_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=rf"settings\.yaml: .*{message}"):
        load(tmp_path, text)


def test_a_missing_file_is_reported_with_its_variable() -> None:
    with pytest.raises(SettingsError, match=r"/nonexistent: .*STAGECOACH_SETTINGS_FILE"):
        load_settings({"STAGECOACH_SETTINGS_FILE": "/nonexistent"})


def test_the_trainers_code_must_be_known() -> None:
    assert Settings(trainer_image="trainer@sha256:ab").code == "sha256:ab"
    assert Settings(trainer_image="trainer@sha256:ab", trainer_code="cd").code == "cd"
    with pytest.raises(SettingsError, match="trainerCode is empty and trainerImage `trainer:1` has no digest"):
        _ = Settings(trainer_image="trainer:1").code


OURS = Settings(
    storage=Storage(
        uri="s3://default",
        endpoint="http://s3",
        region="r",
        credentials=SecretReference(secret_name="ours"),  # noqa: S106
    )
)


def test_unset_storage_fields_come_from_the_operator() -> None:
    assert OURS.storage_of(Storage()) == OURS.storage
    own_uri = OURS.storage_of(Storage(uri="s3://own"))
    assert (own_uri.uri, own_uri.endpoint, own_uri.credentials) == (
        "s3://own",
        "http://s3",
        OURS.storage.credentials,
    )


def test_a_run_with_its_own_endpoint_gets_no_credentials() -> None:
    own = OURS.storage_of(Storage(uri="s3://own", endpoint="http://elsewhere"))
    assert (own.endpoint, own.region, own.credentials) == ("http://elsewhere", None, None)
