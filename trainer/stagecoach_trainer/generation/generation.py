"""Answers to prompts, rendered by the chat template and generated in batches by transformers, greedily or by sampling.

B prompts of a batch, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagecoach_api.conversation import Role
from stagecoach_api.generation import Generation, Samples
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.models.load import positions_of
from stagecoach_trainer.models.resize import ids_without_token
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.hindsight import lead_in
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.messages import text_of
from stagecoach_trainer.text.templates import Message, Renderer, message_of, stop_token_ids

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class GeneratedAnswer:
    """The model's answer to one prompt."""

    text: str
    """Decoded, without special tokens."""

    num_tokens: int
    """Generated tokens, not counting the end token."""

    ended: bool
    """Whether the model generated an end token; otherwise the answer was truncated at `maxNewTokens`."""


class Prompter:
    """Encodes messages as the ids that a served model would receive."""

    def __init__(self, tokenizer: Any, settings: Generation | None = None) -> None:
        self._tokenizer = tokenizer
        beginning = None if settings is None else settings.answer_begins_with
        self._lead_in = "" if beginning is None else lead_in(beginning)
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(tokenizer)
        self.has_template = tokenizer.chat_template is not None
        """Without a chat template the last message is continued as plain text."""

    def encode(self, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> Ids:
        """Return the prompt's ids [T]: the conversation, the generation prompt and the forced beginning of the answer.
        Special tokens in the template are encoded as such."""
        if self.has_template:
            text = self._renderer.prompt(messages, tools)
            return self._encoder.prompts([text + self._lead_in])[0]
        ids = self._encoder.documents([text_of(messages[-1]) + self._lead_in])[0]
        start = [] if self._encoder.bos is None else [self._encoder.bos]
        return np.concatenate([np.asarray(start, dtype=np.int32), ids])

    def encode_question(self, prompt: str) -> Ids:
        """Return the prompt's ids [T] for a single user turn."""
        return self.encode([message_of(Role.USER, prompt)])


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    settings: Generation,
    batch_rows: int,
    seed: int,
    report: Report = lambda done, total: None,
) -> list[GeneratedAnswer]:
    """Return one answer per prompt, in order.

    Prompts of similar length share a batch, padded on the left and masked. Sampling is seeded by `seed`, so equal calls
    give equal answers; torch's global random state is not changed.
    Raises UserError for a prompt that fills all of the model's positions.
    """
    limits = [token_limit(model, ids, settings.max_new_tokens) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (limits[index], len(prompts[index]), index))
    answers: dict[int, GeneratedAnswer] = {}
    missing = ids_without_token(model, tokenizer)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for batch in _batches(order, limits, batch_rows):
            generated = _generate_batch(
                model, tokenizer, [prompts[index] for index in batch], settings, limits[batch[0]], missing
            )
            answers.update(zip(batch, generated, strict=True))
            report(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def answer_samples(
    samples: Samples,
    model: Any,
    tokenizer: Any,
    batch_rows: int,
    seed: int,
    report: Report = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Return prompts and answers in the form of the reports."""
    prompter = Prompter(tokenizer, samples.generation)
    prompts = [prompter.encode_question(prompt) for prompt in samples.prompts]
    answers = generate(model, tokenizer, prompts, samples.generation, batch_rows, seed, report)
    return [
        {"prompt": prompt, "answer": answer.text, "tokens": answer.num_tokens, "ended": answer.ended}
        for prompt, answer in zip(samples.prompts, answers, strict=True)
    ]


def token_limit(model: Any, prompt: Ids, wanted: int) -> int:
    """Return the maximum tokens of an answer: `wanted`, or fewer if the model's positions do not suffice."""
    positions = positions_of(model.config)
    if positions is None:
        return wanted
    if len(prompt) >= positions:
        raise UserError(
            f"a prompt of {len(prompt)} tokens leaves no positions for an answer: the model has {positions}; "
            "shorten the prompt"
        )
    return min(wanted, positions - len(prompt))


def _batches(order: Sequence[int], limits: Sequence[int], batch_rows: int) -> list[list[int]]:
    """Split `order` into batches in which all prompts have the same token limit."""
    batches: list[list[int]] = []
    for index in order:
        if batches and len(batches[-1]) < batch_rows and limits[batches[-1][0]] == limits[index]:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    settings: Generation,
    max_new_tokens: int,
    missing: Sequence[int],
) -> list[GeneratedAnswer]:
    ends = end_ids(model, tokenizer)
    padding = ends[0] if ends else 0
    tokens, mask = pad_left(prompts, padding)
    output = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=generation_config(settings, max_new_tokens, ends, padding, missing),
    )
    generated = output[:, tokens.shape[1] :].tolist()
    return [_answer(tokenizer, ids, set(ends)) for ids in generated]


def _answer(tokenizer: Any, ids: list[int], ends: set[int]) -> GeneratedAnswer:
    length = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return GeneratedAnswer(text, length, length < len(ids))


def pad_left(prompts: Sequence[Ids], padding: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, int64 [B, T]. All prompts end at the last position, where their answers begin."""
    length = max(len(ids) for ids in prompts)
    tokens = np.full((len(prompts), length), padding, dtype=np.int64)
    mask = np.zeros((len(prompts), length), dtype=np.int64)
    for row, ids in enumerate(prompts):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: those of the tokenizer and its chat template, and of the model's generation
    config."""
    named = getattr(model.generation_config, "eos_token_id", None)
    own = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(token for token in [*stop_token_ids(tokenizer), *own] if token is not None))


def generation_settings(settings: Generation) -> dict[str, Any]:
    """Return the fields of `generation_config.json` for `settings`, including those whose default would add
    sampling."""
    if settings.temperature == 0:
        return {"do_sample": False, "max_new_tokens": settings.max_new_tokens}
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,  # off; transformers' default is 50
        "max_new_tokens": settings.max_new_tokens,
    }


def generation_config(
    settings: Generation, max_new_tokens: int, ends: list[int], padding: int, missing: Sequence[int]
) -> Any:
    """Return transformers' generation config. Of the model's own config only the end tokens are used.

    `missing`: ids that are never generated, because the vocabulary has no token for them.
    """
    import transformers

    make: Any = transformers.GenerationConfig
    chosen = generation_settings(settings) | {"max_new_tokens": max_new_tokens}
    return make(
        **chosen,
        eos_token_id=ends or None,
        suppress_tokens=list(missing) or None,
        pad_token_id=padding,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        num_return_sequences=1,
    )
