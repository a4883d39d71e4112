"""Metrics of each step, written to `logs/metrics.jsonl` and TensorBoard, and reported as progress."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from stagecoach_api.progress import RESUME, STEPS, TRAIN
from stagecoach_trainer.kernels.causal import causal_model, output_layer
from stagecoach_trainer.runtime.progress import Progress

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Dense bf16 FLOP/s from NVIDIA's data sheets (of the SXM variant, if there are several)."""

SHOWN = ("loss", "reward", "kl", "learningRate", "tokensPerSecond", "gradNorm")

_BEFORE = re.compile(r"^(heldOut\..+)\.before(\.[^.]+)$")
"""Names of figures measured before the first step."""


def tag_of(name: str) -> str:
    """Return a metric's tag in TensorBoard: a figure before training is the first point of the same chart."""
    return _BEFORE.sub(r"\1\2", name)


class StepMetrics:
    """Computes the metrics of each step and writes them. Only rank 0 has files."""

    def __init__(self, logs: Path | None, progress: Progress, num_steps: int, flops: StepFlops) -> None:
        self._progress = progress
        self._num_steps = num_steps
        self._flops = flops
        self._file = None
        self._events: EventFileWriter | None = None
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            self._file = (logs / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
            self._folder = logs / "tensorboard"
        self._mark = time.perf_counter()
        self._waited = 0.0
        self._step = 0
        self._shown: Mapping[str, float] = {}
        """Figures of the newest step."""

    def __enter__(self) -> StepMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._file, self._events):
            if file is not None:
                file.close()

    def pause(self) -> None:
        """Restart the clock, so that work since the last step (measuring, saving) is not attributed to the next."""
        self._mark = time.perf_counter()

    def step(
        self, step: int, figures: Mapping[str, float], tokens: int, length: int, waited: float, padding_share: float
    ) -> None:
        """Record a step that has just ended.

        `tokens`: of the global batch. `length`: of its longest row. `waited`: seconds spent waiting for data since the
        start of training. `padding_share`: share of padding among this rank's positions.
        """
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        waited, self._waited = waited - self._waited, waited
        row = dict(figures) | {
            "tokensPerSecond": tokens / seconds,
            "dataWaitShare": min(1.0, waited / seconds),
            "paddingShare": padding_share,
            "seconds": seconds,
        }
        mfu = self._flops.utilisation(tokens, length, seconds)
        if mfu is not None:
            row["mfu"] = mfu
        self._shown = {name: row[name] for name in SHOWN if name in row}
        self._step = step
        self._progress.report(TRAIN, step, self._num_steps, STEPS, self._shown)
        self.write(step, row)

    def between(self, activity: str, figures: Mapping[str, float] | None = None) -> None:
        """Report an activity before, between or after steps, such as measuring; the step stays visible."""
        self._progress.report(activity, self._step, self._num_steps, STEPS, {**self._shown, **(figures or {})})

    def resume(self, step: int) -> None:
        """Report that training continues after a step that an earlier attempt made."""
        self._step = step
        self._progress.report(RESUME, step, self._num_steps, STEPS)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Record metrics at a step."""
        if self._file is None:
            return
        now = time.time()
        self._file.write(json.dumps({"step": step, "time": now, **row}) + "\n")
        if self._events is None:
            self._events = self._open_events()
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag_of(name), simple_value=value) for name, value in row.items()]
        self._events.add_event(Event(wall_time=now, step=step, summary=Summary(value=values)))

    def _open_events(self) -> EventFileWriter:
        """Return a writer. TensorBoard is imported only after the first step, and the clock restarts afterwards."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        writer = EventFileWriter(str(self._folder))
        self.pause()
        return writer


class StepFlops:
    """Model FLOPs of a step, and their share of the devices' peak (MFU, arXiv 2204.02311, appendix B)."""

    def __init__(self, model: nn.Module, device: torch.device, num_devices: int) -> None:
        config = causal_model(model).config.get_text_config(decoder=True)
        embedding = causal_model(model).get_input_embeddings()
        # A lookup in the embedding computes nothing, unless the head is tied to it.
        looked_up = {id(parameter) for parameter in embedding.parameters()}
        head = {id(parameter) for parameter in output_layer(model).parameters()}
        used = [item for item in model.parameters() if id(item) not in looked_up - head]
        num_used = sum(item.numel() for item in used)
        num_trained = sum(item.numel() for item in used if item.requires_grad)
        self._per_token = 4 * num_used + 2 * num_trained  # forward, gradient of activations; gradient of weights
        text = config.get_text_config()  # of a model that also reads images or audio, the part that reads text
        self._per_token_and_position = 12 * getattr(text, "num_hidden_layers", 0) * text.hidden_size
        self._peak = device_peak(device)
        self._num_devices = num_devices

    def utilisation(self, tokens: int, length: int, seconds: float) -> float | None:
        """Return the MFU; None if the device's peak is unknown, as for all CPUs."""
        if self._peak is None:
            return None
        flops = tokens * (self._per_token + self._per_token_and_position * length)
        return float(flops / seconds / (self._peak * self._num_devices))


def device_peak(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device in bf16; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
