"""Bad input to the real command line and the real trainer: the output shows what is wrong, where, and what to do,
without a traceback; the exit code is 1 or 2; and after a correction the same command resumes."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.e2e.makers import Bench, Ended, conversations, data_stage, english, wait_until
from tests.s3 import S3Server, make_bucket, make_server

TEXTS = [{"text": text} for text in english(40)]
ROWS = 300


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path, core=0)
    bench.write_jsonl("good.jsonl", TEXTS)
    return bench


def vocabulary(data: str = "good") -> dict[str, Any]:
    return {"name": "vocabulary", "tokenizer": {"train": {"data": [{"stage": data}], "vocabSize": ROWS}}}


def assert_rejected(bench: Bench, ended: Ended, expected: Mapping[str, Iterable[str]]) -> None:
    """Assert that these stages failed without a retry, each with a message that is printed and contains its texts."""
    assert ended.code == 1
    for stage, texts in expected.items():
        message = bench.message(stage)
        assert f"{stage} failed (user × 1)" in ended.output
        assert [text for text in texts if text not in message] == [], message
        assert message.splitlines()[0] in ended.output


# -- data --------------------------------------------------------------------------------------------------------------


def test_a_missing_file_exits_with_2_before_anything_starts(bench: Bench) -> None:
    bench.write([data_stage("good", "data/good.jsonl"), data_stage("gone", "data/gone.jsonl")])
    ended = bench.run()
    assert ended.code == 2
    for text in ("stages.gone.data.sources[0].uri", "gone.jsonl", "relative inputs are looked for in"):
        assert text in ended.output
    assert not (bench.folder / ".stagecoach" / "runs" / "default" / "tiny" / "good").exists()


def test_bad_data_is_reported_by_file_and_line_and_read_again_after_a_correction(bench: Bench) -> None:
    lines = (bench.folder / "data" / "good.jsonl").read_bytes().splitlines(keepends=True)
    bad = {
        "encoding": b"".join([*lines[:6], b'{"text": "caf\xe9"}\n', *lines[6:]]),
        "json": b"".join([*lines[:4], b'{"text": "never closed\n', *lines[4:]]),
        "nothing": b"",
    }
    for name, data in bad.items():
        bench.write_file(f"{name}.jsonl", data)
    stages = [*(data_stage(name, f"data/{name}.jsonl") for name in ("good", *bad)), vocabulary("json")]
    bench.write(stages, onFailure="continue")
    expected = {
        "encoding": ("encoding.jsonl:7", "UTF-8", "maxMalformedShare"),
        "json": ("json.jsonl:5", "malformed JSON", "maxMalformedShare"),
        "nothing": ("nothing.jsonl", "no records"),
    }
    ended = bench.run()
    assert_rejected(bench, ended, expected)
    assert "vocabulary: skipped: stage `json` failed" in ended.output

    for name in bad:
        bench.write_jsonl(f"{name}.jsonl", TEXTS)
    ended = bench.run()
    assert ended.code == 0, ended.output
    assert bench.attempts("good") == 1


def test_a_flipped_byte_in_an_input_is_reported_and_the_stage_can_be_re_created(bench: Bench) -> None:
    bench.write([data_stage("good", "data/good.jsonl"), vocabulary()])
    assert bench.run("--until", "good").code == 0
    key = f"{bench.manifest('good').folder}/train/part-00000.jsonl.zst"
    path = bench.workspace.default_storage / key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    ended = bench.run()
    assert ended.code == 1
    assert key in bench.message("vocabulary")
    assert "stagecoach run --from" in bench.message("vocabulary")
    assert bench.message("vocabulary") in ended.output.replace("\n  ", "\n")
    assert bench.run("--from", "good").code == 0


def test_a_full_disk_is_reported_with_its_path_and_leaves_no_partial_files(bench: Bench) -> None:
    draw = random.Random(1)
    bench.write_jsonl("large.jsonl", [{"text": draw.randbytes(200).hex()} for _ in range(500)])
    stages = [data_stage("large", "data/large.jsonl")]
    bench.write(stages, defaults={"retries": {"infrastructure": 0}})
    ended = Bench(bench.folder, core=0, file_bytes=50_000).run()
    assert ended.code == 1
    attempt = bench.workspace.run("default", "tiny").attempt("large", 1).path
    assert "disk full" in bench.message("large")
    assert str(attempt) in bench.message("large")
    assert "free space there" in ended.output
    assert not (attempt / "spool").exists()
    assert bench.run().code == 0


# -- models ------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, tokenizer: Path, rows: int = ROWS, **config: Any) -> Path:
    """Write a LLaMA of one layer with the vocabulary of the folder `tokenizer`, in Hugging Face layout."""
    shutil.copytree(tokenizer, folder)
    width = 16
    shapes = {
        "model.embed_tokens.weight": (rows, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (rows, width),
        "model.layers.0.input_layernorm.weight": (width,),
        "model.layers.0.post_attention_layernorm.weight": (width,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"},
        **{f"model.layers.0.mlp.{name}_proj.weight": (width, width) for name in ("gate", "up", "down")},
    }
    draw = np.random.default_rng(1)
    tensors = {name: draw.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def test_unusable_models_and_samples_are_rejected_each_with_its_reason(bench: Bench) -> None:
    bench.write([data_stage("good", "data/good.jsonl"), vocabulary()])
    assert bench.run().code == 0
    tokenizer, models = bench.folder / "tokenizer", bench.folder / "models"
    assert bench.call("artifacts", "get", "tiny/vocabulary", str(tokenizer)).code == 0
    write_model(models / "pickled", tokenizer)
    (models / "pickled" / "model.safetensors").rename(models / "pickled" / "pytorch_model.bin")
    write_model(models / "code", tokenizer, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    write_model(models / "sound", tokenizer)
    talks = [*conversations(3), {"instruction": "Describe it.", "output": "fox " * 200}]
    bench.write_file("talks.json", json.dumps(talks).encode())
    tuning = {
        "model": {"uri": "models/sound"},
        "data": [{"uri": "data/talks.json", "format": "alpaca"}],
        "template": {"name": "humanBot"},
        "tooLong": "fail",
        "sequenceLength": 128,
        "batch": {"samples": 2},
        "optimizer": {"learningRate": 0.001},
    }
    outside = [{"name": name, "export": {"model": {"uri": f"models/{name}"}}} for name in ("pickled", "code")]
    bench.write([*outside, {"name": "long", "sft": tuning}], onFailure="continue")
    expected = {
        "pickled": ("models/pickled", "pytorch_model.bin", "safetensors"),
        "code": ("models/code/config.json", "auto_map", "never run"),
        "long": ("talks.json", "128", "tooLong"),
    }
    assert_rejected(bench, bench.run(), expected)


# -- storage -----------------------------------------------------------------------------------------------------------


def test_wrong_s3_credentials_are_reported_by_source_without_their_value(bench: Bench, s3_server: S3Server) -> None:
    make_bucket(s3_server.endpoint, "e2e-credentials")
    bench.write([data_stage("good", "data/good.jsonl")], storage=s3_storage("e2e-credentials", s3_server))
    wrong = {"AWS_SECRET_ACCESS_KEY": "no-such-secret"}
    if type(s3_server).__name__ == "MotoServer":  # it accepts any credentials, so have none
        wrong = {"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""}
    ended = Bench(bench.folder, wrong).run()
    assert ended.code == 1
    for text in ("credentials", "s3://e2e-credentials", "AWS_ACCESS_KEY_ID", "AWS_SHARED_CREDENTIALS_FILE"):
        assert text in ended.unwrapped
    assert "no-such-secret" not in ended.output
    assert bench.run().code == 0


def test_a_short_outage_of_the_s3_server_is_tolerated(
    bench: Bench, s3_credentials: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = make_server(tmp_path_factory.mktemp("s3-outage"))
    server.start()
    try:
        make_bucket(server.endpoint, "away")
        bench.write([data_stage("good", "data/good.jsonl"), vocabulary()], storage=s3_storage("away", server))
        driver = bench.start("run", "run.yaml")
        wait_until(lambda: bench.attempts("vocabulary"), "the vocabulary's first attempt")
        server.stop()
        time.sleep(4)
        server.start()
        output, _ = driver.communicate(timeout=300)
        assert driver.returncode == 0, output
        assert bench.call("artifacts", "verify", "tiny/vocabulary").code == 0
    finally:
        server.stop()


def s3_storage(bucket: str, server: S3Server) -> dict[str, str]:
    return {"uri": f"s3://{bucket}/models", "endpoint": server.endpoint}
