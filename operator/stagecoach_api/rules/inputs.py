"""Rules over URIs, images and names of sets, and over stages that do not train."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from stagecoach_api.fields import FieldPath
from stagecoach_api.kinds import DataStage, EvaluateStage, TokenizerStage
from stagecoach_api.problems import suggest
from stagecoach_api.references import PREFERENCE_FORMATS, Format, RecordSource
from stagecoach_api.rules.draft import Draft, DraftStage, Fault, configs, walk
from stagecoach_api.training import MeasuredTraining, Training

URI_FIELDS = frozenset({"uri", "inputs", "charactersFrom"})
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_REWARD_METRIC = re.compile(r".\.reward$|.\.(reward|winRate)\..")
_IMAGE_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


# -- URIs and images ---------------------------------------------------------------------------------------------------


def uris_can_be_opened(draft: Draft) -> Iterator[Fault]:
    for path, value in walk(draft.spec, ("spec",)):
        if path[-1] in URI_FIELDS and isinstance(value, str):
            fault = _check_uri(value)
            if fault is not None:
                yield Fault(path, value, *fault)


def _check_uri(uri: str) -> tuple[str, str] | None:
    """Return (rule, remedy) for a URI that no store can open."""
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return None
    rest = uri[scheme.end() :]
    if "@" in rest.split("/")[0]:
        return "must not hold credentials", "give `storage.credentials`, or let the SDK find them"
    match scheme[1]:
        case "s3":
            return None if rest.split("/")[0] else ("must name a bucket", "write `s3://bucket/prefix`")
        case "file":
            absolute = rest.startswith("/")
            return None if absolute else ("must be an absolute path", "write `file:///folder`, with three slashes")
    return "must be `s3://…`, `file:///…` or a path", f"copy it there: `{scheme[1]}://` cannot be read"


def the_endpoint_is_an_http_url(draft: Draft) -> Iterator[Fault]:
    endpoint = draft.storage.get("endpoint")
    if not isinstance(endpoint, str):
        return
    path = ("spec", "storage", "endpoint")
    try:
        url = urlsplit(endpoint)
        valid, secret = url.scheme in ("http", "https") and bool(url.hostname), url.username is not None
    except ValueError:
        valid, secret = False, False
    if secret:
        yield Fault(path, endpoint, "must not hold credentials", "give `storage.credentials`, or let the SDK find them")
    elif not valid:
        yield Fault(path, endpoint, "must be an http or https URL", "write it as `https://s3.example.com`")


def images_are_named_by_digest(draft: Draft) -> Iterator[Fault]:
    """An image's tag may mean other code tomorrow, and the cache would not know."""
    places: list[tuple[FieldPath, object]] = [(("spec", "defaults", "image"), draft.spec.get("defaults"))]
    places += [((*stage.path, "image"), stage.raw) for stage in draft.stages]
    for path, settings in places:
        image = settings.get("image") if isinstance(settings, dict) else None
        if isinstance(image, str) and not _IMAGE_DIGEST.search(image):
            yield Fault(
                path,
                image,
                "must be named by digest, so that the cache knows the code",
                "write `name@sha256:` and 64 hex digits, or leave it out for the operator's own image",
            )


# -- names of sets -----------------------------------------------------------------------------------------------------


def set_names_are_unique(draft: Draft) -> Iterator[Fault]:
    """Reports and metrics call sets by name."""
    for stage in draft.stages:
        for field, sources in _lists_of_sets(stage):
            seen: set[str] = set()
            for index, source in enumerate(sources):
                if source.label in seen:
                    yield Fault(
                        stage.at(*field, index),
                        source.label,
                        "must have a name of its own in this list",
                        "give it another `name`",
                    )
                seen.add(source.label)


def _lists_of_sets(stage: DraftStage) -> Iterator[tuple[tuple[str, ...], Sequence[RecordSource]]]:
    config = stage.config
    if isinstance(config, Training):
        yield ("data",), config.data
    elif isinstance(config, DataStage):
        yield ("sources",), config.sources
    elif isinstance(config, TokenizerStage):
        yield ("measureOn",), config.measure_on
    elif isinstance(config, EvaluateStage):
        yield ("heldOut",), config.held_out
    if isinstance(config, MeasuredTraining):
        yield ("heldOut", "sets"), config.held_out.sets


# -- data --------------------------------------------------------------------------------------------------------------


def lengths_leave_something(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, DataStage):
        for index, step in enumerate(config.steps):
            length = step.length
            if length is None or length.max_characters is None:
                continue
            if length.min_characters > length.max_characters:
                yield Fault(
                    stage.at("steps", index, "length"),
                    length.model_dump(),
                    "`minCharacters` must be at most `maxCharacters`",
                    "swap them, or change one",
                )


def some_source_is_written(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, DataStage):
        if all(source.weight == 0 for source in config.sources):
            yield Fault(stage.at("sources"), [0] * len(config.sources), "all weights are 0", "raise one above 0")


# -- evaluation --------------------------------------------------------------------------------------------------------


def an_evaluation_measures_something(draft: Draft) -> Iterator[Fault]:
    measured = "give one of `heldOut`, `exactMatch`, `rewards`, `samples`, `lmEval`"
    for stage, config in configs(draft, EvaluateStage):
        if not (config.held_out or config.samples or config.exact_match or config.rewards or config.lm_eval):
            yield Fault(stage.at(), [], "measures nothing", measured)


def exact_match_names_are_unique(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, EvaluateStage):
        seen: set[str] = set()
        for index, task in enumerate(config.exact_match):
            if task.name in seen:
                yield Fault(stage.at("exactMatch", index, "name"), task.name, "must be unique", "rename one of the two")
            seen.add(task.name)


def exact_match_reads_conversations(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, EvaluateStage):
        for index, task in enumerate(config.exact_match):
            source: RecordSource | None = next(
                (value for value in vars(task).values() if isinstance(value, RecordSource)), None
            )
            if source is not None and source.format is Format.TEXT:
                yield Fault(
                    stage.at("exactMatch", index),
                    task.name,
                    "plain text has no answers to compare with",
                    "give conversations (alpaca, sharegpt, messages)",
                )
            elif source is not None and source.format in PREFERENCE_FORMATS:
                yield Fault(
                    stage.at("exactMatch", index),
                    task.name,
                    "preferences have several answers, none of them the only right one",
                    "give conversations (alpaca, sharegpt, messages), or compare answers in `rewards`",
                )


def gates_watch_what_is_measured(draft: Draft) -> Iterator[Fault]:
    """Only where it is certain: lm-eval names its metrics itself."""
    for stage, config in configs(draft, EvaluateStage):
        sets = [f"heldOut.{source.name}." for source in config.held_out]
        tasks = [f"{task.name}.exactMatch" for task in config.exact_match]
        rewards = list(_reward_metrics(config))
        for index, gate in enumerate(config.gates):
            path, metric = stage.at("gates", index, "metric"), gate.metric
            if metric.startswith("heldOut.") and not any(metric.startswith(name) for name in sets):
                known = [source.name for source in config.held_out]
                yield Fault(
                    path, metric, "must name a set in `heldOut`", suggest(metric.split(".")[1] or metric, known)
                )
            elif metric.endswith(".exactMatch") and not config.lm_eval and metric not in tasks:
                yield Fault(path, metric, "must name a task in `exactMatch`", suggest(metric, tasks))
            elif _REWARD_METRIC.search(metric) and not config.lm_eval and metric not in [*tasks, *rewards]:
                rule = "must be the reward of a task in `rewards`, or of one of its `rivals`, or the win rate over one"
                yield Fault(path, metric, rule, suggest(metric, rewards))
            elif not (sets or tasks or rewards or config.lm_eval):
                yield Fault(path, metric, "nothing is measured that a gate could watch", "measure it, or take it out")


def _reward_metrics(config: EvaluateStage) -> Iterator[str]:
    for task in config.rewards:
        yield f"{task.name}.reward"
        for rival in task.rivals:
            yield f"{task.name}.reward.{rival.name}"
            yield f"{task.name}.winRate.{rival.name}"


def gates_can_be_passed(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, EvaluateStage):
        win_rates = {metric for metric in _reward_metrics(config) if ".winRate." in metric}
        for index, gate in enumerate(config.gates):
            path = stage.at("gates", index)
            if gate.at_least is not None and gate.at_most is not None and gate.at_least > gate.at_most:
                limits = {"atLeast": gate.at_least, "atMost": gate.at_most}
                yield Fault(path, limits, "`atLeast` must not be above `atMost`", "swap them, or change one")
            is_share = gate.metric.endswith(".exactMatch") or gate.metric in win_rates
            if is_share and gate.at_least is not None and gate.at_least > 1.0:
                yield Fault((*path, "atLeast"), gate.at_least, "a share is never above 1", "write 0.9 for 90 %")


INPUT_RULES = (
    uris_can_be_opened,
    the_endpoint_is_an_http_url,
    images_are_named_by_digest,
    set_names_are_unique,
    lengths_leave_something,
    some_source_is_written,
    an_evaluation_measures_something,
    exact_match_names_are_unique,
    exact_match_reads_conversations,
    gates_watch_what_is_measured,
    gates_can_be_passed,
)
