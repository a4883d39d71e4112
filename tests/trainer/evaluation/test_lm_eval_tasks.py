"""lm-eval's tasks: what is refused, and one local task run by the harness itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stagecoach_api.artifacts import REPORT
from stagecoach_api.kinds.evaluate import EvaluateStage, LmEvalTask
from stagecoach_api.store import Unreachable
from stagecoach_trainer.evaluation import lm_eval_tasks
from stagecoach_trainer.evaluation.lm_eval_tasks import Harness, read_custom_task, refuse_unavailable_tasks
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.runtime.hub import OFFLINE, allow_downloads, is_offline
from stagecoach_trainer.stages.evaluate import run
from tests.trainer.data.makers import write_jsonl
from tests.trainer.evaluation.makers import chat_tokenizer, lively_model, save_chat_base
from tests.trainer.models.makers import make_context

CHOICES = ["fox", "dog", "白日"]
DOCUMENTS: list[dict[str, Any]] = [
    {"question": f"the quick {word} jumps over the", "gold": index % 3} for index, word in enumerate("abcdef")
]
TASK: dict[str, Any] = {
    "task": "animals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "animals.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": CHOICES,
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}],
}


def task_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "animals.yaml").write_text(yaml.safe_dump(TASK | changes), encoding="utf-8")
    write_jsonl(folder / "animals.jsonl", DOCUMENTS)
    return folder


def test_data_files_are_relative_to_the_task_and_cached_separately(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "task")
    task = read_custom_task(folder, tmp_path / "cache", "lmEval[0]")
    assert task["dataset_kwargs"] == {
        "data_files": {"test": str(folder / "animals.jsonl")},
        "cache_dir": str(tmp_path / "cache"),
    }
    assert task == read_custom_task(folder / "animals.yaml", tmp_path / "cache", "lmEval[0]")
    several = task_folder(tmp_path / "list", dataset_kwargs={"data_files": ["animals.jsonl"]})
    found = read_custom_task(several, tmp_path / "cache", "lmEval[0]")
    assert found["dataset_kwargs"]["data_files"] == [str(several / "animals.jsonl")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"process_docs": "x"}, "`process_docs` loads code or other files", id="code for documents"),
        pytest.param({"include": "other.yaml"}, "`include` loads code or other files", id="another file"),
        pytest.param({"task": ["a", "b"]}, "needs `task: <name>` at the top level", id="a group"),
        pytest.param({"dataset_kwargs": {"data_files": "no.jsonl"}}, "no.jsonl, which does not exist", id="no data"),
        pytest.param({"dataset_kwargs": None}, "names None, which does not exist", id="no data file named"),
    ],
)
def test_a_task_that_cannot_be_run_safely_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = task_folder(tmp_path / "task", **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_custom_task(folder, tmp_path, "lmEval[0]")
    assert str(caught.value).startswith("lmEval[0]: animals.yaml" if "does not exist" not in message else "lmEval[0]: ")


@pytest.mark.parametrize("text", ["task: a\ndoc_to_text: !function utils.text\n", "task: [", "- a\n", "\x00"])
def test_a_file_that_is_not_a_plain_yaml_object_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "task.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^lmEval\[0\]: task\.yaml "):
        read_custom_task(tmp_path / "task.yaml", tmp_path, "lmEval[0]")


def test_a_folder_must_hold_one_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exactly one YAML file; it has 0"):
        read_custom_task(tmp_path, tmp_path, "lmEval[0]")


def test_the_message_for_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    class Known:
        all_tasks = ("arc_easy", "arc_challenge", "winogrande", "mmlu")

    harness = Harness(None, None, 1, make_context(tmp_path))
    harness.__dict__["_default_manager"] = Known()
    with pytest.raises(UserError, match=r"lmEval\[2\]\.task: lm-eval has no task `arc_eazy`; the nearest are arc_easy"):
        harness._known_task("arc_eazy", "lmEval[2]")


def test_tasks_that_can_never_run_offline_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's image sets HF_HUB_OFFLINE, and no setting of a run could unset it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    config = {"model": {"uri": "model"}, "lmEval": [{"uri": "tasks"}, {"task": "arc_easy"}]}
    with pytest.raises(UserError, match=r"lmEval\[1\]: `arc_easy`: .* is not on this machine.*`online: true`.*`uri`"):
        run(EvaluateStage.model_validate(config), make_context(tmp_path, "evaluate", {}))
    online = EvaluateStage.model_validate(config | {"lmEval": [{"uri": "tasks"}, {"task": "arc_easy", "online": True}]})
    refuse_unavailable_tasks(online.lm_eval)
    assert online.downloads
    (tmp_path / "hub" / "datasets").mkdir(parents=True)  # the data may be there
    refuse_unavailable_tasks(EvaluateStage.model_validate(config).lm_eval)


def test_allowed_downloads_unset_every_variable_of_the_hubs_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OFFLINE:
        monkeypatch.setenv(name, "1")
    assert is_offline()
    allow_downloads()
    assert not is_offline()


def caused_by(cause: BaseException, error: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "online", "kind", "message"),
    [
        pytest.param(ConnectionError("Couldn't reach arc"), True, Unreachable, "Hub does not answer", id="no network"),
        pytest.param(ConnectionError("Couldn't reach arc"), False, UserError, "set `online: true`", id="offline"),
        pytest.param(caused_by(ConnectionError("x"), ValueError("y")), True, Unreachable, "Hub", id="as a cause"),
        pytest.param(torch.OutOfMemoryError("CUDA"), False, torch.OutOfMemoryError, "CUDA", id="memory"),
        pytest.param(KeyError("doc"), False, UserError, "cannot run the task `arc_easy`: KeyError", id="the task"),
    ],
)
def test_an_error_of_the_harness_is_charged_to_its_cause(
    error: Exception, online: bool, kind: type[Exception], message: str
) -> None:
    meaning = lm_eval_tasks._meaning(error, LmEvalTask(task="arc_easy", online=online), "lmEval[0]")
    assert type(meaning) is kind
    assert message in str(meaning)


def choice_nll(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    """Nats of ` choice` after the question, which is encoded separately, as the harness does."""
    prompt = tokenizer.encode(question)
    answer = tokenizer.encode(f"{question} {choice}")[len(prompt) :]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].log_softmax(-1)
    return -sum(float(logits[len(prompt) + index - 1, token]) for index, token in enumerate(answer))


def test_a_local_task_gives_the_accuracy_one_computes_by_hand_and_may_be_a_gate(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    model = lively_model(len(tokenizer))
    base = save_chat_base(tmp_path / "base")
    model.save_pretrained(base)
    task = task_folder(tmp_path / "task")
    context = make_context(tmp_path, "evaluate", {"model": base, "tasks": task})
    config = EvaluateStage.model_validate(
        {
            "model": {"uri": "model"},
            "lmEval": [{"uri": "tasks"}],
            "precision": "fp32",
            "batchRows": 4,
            "gates": [{"metric": "lmEval.animals.acc", "atLeast": 0.0}],
        }
    )
    outcome = run(config, context)
    chosen = [
        min(range(3), key=lambda index: choice_nll(model, tokenizer, document["question"], CHOICES[index]))
        for document in DOCUMENTS
    ]
    right = sum(pick == document["gold"] for pick, document in zip(chosen, DOCUMENTS, strict=True))
    assert outcome.metrics == {"lmEval.animals.acc": pytest.approx(right / len(DOCUMENTS))}
    report = json.loads((context.output / REPORT).read_text(encoding="utf-8"))
    assert report["lmEval"] == {"animals": {"questions": len(DOCUMENTS)}}
    assert (context.work / "datasets").is_dir()
    refused_templates_reach_nothing(tmp_path, context.cache, Harness(model, tokenizer, 2, context))


def refused_templates_reach_nothing(tmp_path: Path, cache: Path, harness: Harness) -> None:
    """The harness's own template engine would run this; imported here, since importing it takes long."""
    canary = tmp_path / "canary"
    hostile = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    folder = task_folder(tmp_path / "hostile", doc_to_text=hostile)
    task = LmEvalTask(uri="hostile")
    harness.__dict__["_custom_task"] = lambda uri, field: read_custom_task(folder, cache, field)
    with pytest.raises(UserError, match="lm-eval cannot run the task `hostile`: SecurityError"):
        harness.run(task, "lmEval[0]")
    assert not canary.exists()
