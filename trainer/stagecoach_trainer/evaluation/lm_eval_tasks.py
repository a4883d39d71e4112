"""Tasks of the LM evaluation harness. Importing it takes some 20 s, so it is imported only if a task is configured.

A custom task is a YAML file, or a folder with one YAML file and the data it names. It is data, not code: the harness's
`!function` and `include` are rejected, and its Jinja templates run in a sandbox.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from stagecoach_api.kinds.evaluate import LmEvalTask
from stagecoach_api.references import Reference
from stagecoach_api.store import Unreachable
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.runtime.failures import NETWORK_ERRORS
from stagecoach_trainer.runtime.hub import data_cache, is_offline

CODE_KEYS = ("class", "include", "custom_dataset", "process_docs", "process_results")
"""Keys by which a task would load code or other files."""

DATA_FILE_BUILDERS = ("json", "csv", "text", "parquet")
"""Data set kinds whose `data_files` are relative to the YAML file."""


REMEDY = (
    "set `online: true` to download it from the Hugging Face Hub (pods need access to huggingface.co), or give the "
    "task and its data as a folder in `uri`"
)


def refuse_unavailable_tasks(tasks: Sequence[LmEvalTask]) -> None:
    """Raise UserError, before any work, for tasks whose data cannot be on this machine and may not be downloaded."""
    if not is_offline() or data_cache().is_dir():
        return
    names = [f"lmEval[{index}]: `{task.task}`" for index, task in enumerate(tasks) if task.task and not task.online]
    if names:
        missing = "the data set is not on this machine, and HF_HUB_OFFLINE forbids to download it"
        raise UserError(f"{', '.join(names)}: {missing}; {REMEDY}")


def _meaning(error: Exception, task: LmEvalTask, field: str) -> Exception:
    """Return what an error of the harness means. One of the machine's memory or network is not the task's."""
    chain = list(_chain(error))
    if any(isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" for cause in chain):
        return error
    reason = f"{type(error).__name__}: {error}"
    if any(isinstance(cause, ConnectionError) or type(cause).__name__ in NETWORK_ERRORS for cause in chain):
        if task.online:
            return Unreachable(str(task.task), f"the Hugging Face Hub does not answer ({reason})")
        return UserError(f"{field}: the data set of `{task.task or task.uri}` cannot be read ({reason}); {REMEDY}")
    return UserError(f"{field}: lm-eval cannot run the task `{task.task or task.uri}`: {reason}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class TaskResult:
    """The harness's results for one task, or for a group and each task in it."""

    metrics: dict[str, float]
    """`lmEval.<task>.<metric>`, with the harness's names of task and metric."""

    num_questions: dict[str, int]
    """Number of questions by task."""


class Harness:
    """Runs lm-eval on a model in memory."""

    def __init__(self, model: Any, tokenizer: Any, batch_rows: int, context: StageContext) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_rows = batch_rows
        self._context = context

    def run(self, task: LmEvalTask, field: str) -> TaskResult:
        """Run one task. Raises UserError, naming `field`, if the harness fails; Unreachable if the Hub does."""
        from lm_eval import simple_evaluate

        spec: str | dict[str, Any]
        if task.uri is not None:
            manager, spec = self._custom_manager, self._custom_task(task.uri, field)
        else:
            manager, spec = self._default_manager, self._known_task(str(task.task), field)
        try:
            results = simple_evaluate(
                model=self._wrapped,
                tasks=[spec],
                num_fewshot=task.num_fewshot,
                limit=task.max_samples,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
                random_seed=self._context.seed,
                numpy_random_seed=self._context.seed,
                torch_random_seed=self._context.seed,
                fewshot_random_seed=self._context.seed,
            )
        except Exception as error:  # a task can make the harness raise anything
            meaning = _meaning(error, task, field)
            if meaning is error:
                raise
            raise meaning from error
        return _result(results or {}, field)

    @cached_property
    def _wrapped(self) -> Any:
        from jinja2 import BaseLoader, StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment
        from lm_eval import utils
        from lm_eval.models.huggingface import HFLM

        # Templates come from task files, which may be downloaded; the harness's own environment is not sandboxed.
        sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
        sandbox.filters.update(utils.env.filters)
        utils.env = sandbox
        return HFLM(pretrained=self._model, tokenizer=self._tokenizer, backend="causal", batch_size=self._batch_rows)

    @cached_property
    def _custom_manager(self) -> Any:
        """A manager without the harness's own tasks, whose index takes 24 s to build."""
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=False)

    @cached_property
    def _default_manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager()

    def _known_task(self, name: str, field: str) -> str:
        names: list[str] = self._default_manager.all_tasks
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
            raise UserError(f"{field}.task: lm-eval has no task `{name}`; the nearest are {', '.join(near)}")
        return name

    def _custom_task(self, uri: str, field: str) -> dict[str, Any]:
        path = self._context.fetch(Reference(uri=uri))
        # Below the attempt's folder: `datasets` would open files of an earlier attempt without a checksum.
        return read_custom_task(path, self._context.work / "datasets", f"{field} ({uri})")


def read_custom_task(path: Path, datasets_cache: Path, field: str) -> dict[str, Any]:
    """Return the task in a YAML file, or in the only YAML file of a folder, with paths to its data files.

    Raises UserError, naming `field`.
    """
    file = _yaml_file(path, field)
    try:
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{field}: {file.name} cannot be read ({reason}); `!function` is not supported") from error
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise UserError(
            f"{field}: {file.name} is not a task: it needs `task: <name>` at the top level; groups are not supported"
        )
    for key in CODE_KEYS:
        if key in task:
            raise UserError(f"{field}: {file.name}: `{key}` loads code or other files, which is not supported")
    if task.get("dataset_path") in DATA_FILE_BUILDERS:
        settings = dict(task.get("dataset_kwargs") or {})
        settings["data_files"] = _resolved(settings.get("data_files"), file.parent, field)
        settings["cache_dir"] = str(datasets_cache)
        task["dataset_kwargs"] = settings
    return task


def _yaml_file(path: Path, field: str) -> Path:
    if path.is_file():
        return path
    files = sorted(item for item in path.iterdir() if item.suffix in (".yaml", ".yml"))
    if len(files) != 1:
        raise UserError(f"{field}: a task's folder must contain exactly one YAML file; it has {len(files)}")
    return files[0]


def _resolved(data_files: Any, folder: Path, field: str) -> Any:
    """Resolve names of data files relative to the YAML's folder. Raises UserError for a missing file."""
    if isinstance(data_files, Mapping):
        return {split: _resolved(value, folder, field) for split, value in data_files.items()}
    if isinstance(data_files, list):
        return [_resolved(value, folder, field) for value in data_files]
    file = folder / str(data_files)
    if data_files is None or not file.is_file():
        raise UserError(
            f"{field}: `dataset_kwargs.data_files` names {data_files}, which does not exist; set `uri` to a folder "
            "with the YAML file and its data"
        )
    return str(file)


def _result(results: Mapping[str, Any], field: str) -> TaskResult:
    metrics: dict[str, float] = {}
    for task, values in results.get("results", {}).items():
        for name, value in values.items():
            # Keys are "<metric>,<filter>"; others, such as "alias", are not metrics.
            metric, _, filter_ = name.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or not filter_:
                continue
            suffix = "" if filter_ == "none" else f".{filter_}"
            metrics[f"lmEval.{task}.{metric}{suffix}"] = float(value)
    if not metrics:
        raise UserError(f"{field}: lm-eval measured nothing; does the task have a `metric_list`?")
    counts = results.get("n-samples", {})
    return TaskResult(metrics, {task: int(count["effective"]) for task, count in counts.items()})
