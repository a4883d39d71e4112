"""Makers for the tests of rewards: terms, answers to judge, documents of stages with rewards, a real endpoint."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Chat = list[dict[str, str]]


def feedback_term(url: str = "http://judge:8000/v1", secret: str | None = None, **changes: Any) -> dict[str, Any]:
    """A term that asks a language model for a mark."""
    feedback = {"endpoint": endpoint_of(url, secret), "instruction": "Mark {answer} as an answer to {prompt}, 0 to 10."}
    return {"name": "mark", "feedback": feedback | changes}


def endpoint_of(url: str, secret: str | None = None, **changes: Any) -> dict[str, Any]:
    """An endpoint; with `secret` one that requires a key."""
    endpoint: dict[str, Any] = {"url": url, "model": "judge", **changes}
    return endpoint if secret is None else endpoint | {"credentials": {"secretName": secret}}


def evaluate_stage(*terms: dict[str, Any], name: str = "compare", **changes: Any) -> dict[str, Any]:
    """An `evaluate` stage that compares a model with a rival by these terms."""
    task = {
        "name": "help",
        "data": {"name": "prompts", "uri": "prompts"},
        "generation": {"maxNewTokens": 6},
        "rewards": list(terms),
        "rivals": [{"name": "before", "model": {"uri": "rival"}}],
    }
    return {"name": name, "evaluate": {"model": {"uri": "model"}, "precision": "fp32", "rewards": [task | changes]}}


def make_judged(answer: str, prompt: str = "what is a fox", num_tokens: int = 5, ended: bool = True) -> Any:
    """An answer to one question of a user."""
    from stagecoach_trainer.rewards import Completion

    return Completion(({"role": "user", "content": prompt},), answer, num_tokens, ended)


# -- a real endpoint ---------------------------------------------------------------------------------------------------


@dataclass
class Behaviour:
    """How the endpoint handles one request instead of answering it."""

    status: int = 200
    body: str | None = None
    """Sent unchanged; an error in OpenAI's form if None."""
    seconds: float = 0.0
    """Waits first; then the model answers after all where `status` is 200 and there is no body."""
    kind: str = "application/json"


@dataclass
class Endpoint:
    """A running endpoint, and the requests it received."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    behaviours: list[Behaviour] = field(default_factory=list)
    """Taken by the next requests, in order."""
    most_at_once: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.bodies)


@contextmanager
def serve(reply: Callable[[Chat], str]) -> Iterator[Endpoint]:
    """Serve `/v1/chat/completions` on this machine; `reply` returns the model's reply."""
    lock, under_way = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                endpoint.bodies.append(body)
                endpoint.headers.append(dict(self.headers))
                behaviour = endpoint.behaviours.pop(0) if endpoint.behaviours else Behaviour()
                under_way[0] += 1
                endpoint.most_at_once = max(endpoint.most_at_once, under_way[0])
            time.sleep(behaviour.seconds)
            with lock:
                under_way[0] -= 1  # before the reply: the client may ask again as soon as it has it
            self._send(behaviour, body)

        def _send(self, behaviour: Behaviour, body: dict[str, Any]) -> None:
            text = behaviour.body
            if text is None and behaviour.status == 200:
                with lock:  # one model
                    text = json.dumps(_completion(reply(body["messages"])))
            elif text is None:
                text = json.dumps({"error": {"message": f"no: {self.headers.get('Authorization')}"}})
            data = (text if self.path == "/v1/chat/completions" else "{}").encode()
            try:
                self.send_response(behaviour.status)
                self.send_header("Content-Type", behaviour.kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client gave up, as a test wants it to

        def log_message(self, *words: object) -> None:
            del words

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}


class TinyJudge:
    """A small LLaMA with random weights that picks one of a few replies: a judge whose verdicts vary."""

    def __init__(self, seed: int = 0) -> None:
        from tests.trainer.evaluation.makers import lively_model
        from tests.trainer.models.makers import make_tokenizer

        self._tokenizer = make_tokenizer()
        self._model = lively_model(len(self._tokenizer), seed)

    def choose(self, text: str, words: Sequence[str]) -> str:
        """Return one of the replies, chosen by a late digit of the model's logits: small changes of `text` change
        it."""
        import torch

        ids = self._tokenizer(text).input_ids[-200:]
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([ids])).logits[0]
        return words[int(float(logits.abs().mean()) * 1000) % len(words)]

    def yes_or_no(self, messages: Chat) -> str:
        return self.choose(messages[-1]["content"], ("yes", "no"))

    def mark(self, messages: Chat) -> str:
        return self.choose(messages[-1]["content"], [str(digit) for digit in range(10)])
