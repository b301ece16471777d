"""A small server with the protocol of OpenAI for one real model: completions with log-probabilities, and chats."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Answers:
    """What the server answers, from a model in fp32.

    Attributes:
        asked: the bodies of all requests.
        headers: the header Authorization of each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []

    def to(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        self.asked.append(body)
        if path == "/v1/chat/completions":
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            told = self._written(self._ids(text), body)
            return {"choices": [{"index": 0, "message": {"role": "assistant", "content": told}}]}
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        make = self._echoed if body.get("echo") else lambda ids, n: {"text": self._written(ids, body)}
        return {"choices": [{"index": n, **make(self._ids(ids), n)} for n, ids in enumerate(prompts)]}

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt

    @torch.no_grad()
    def _echoed(self, ids: list[int], _: int) -> dict[str, Any]:
        """Log-probabilities of the prompt's tokens, and of one token more."""
        logs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ids = [*ids, int(logs[-1].argmax())]
        own = [None, *(logs[i - 1, ids[i]].item() for i in range(1, len(ids)))]
        starts = [len(self.tokenizer.decode(ids[:i])) + bool(i) for i in range(len(ids))]  # words, and spaces between
        best = [None, *({str(int(row.argmax())): row.max().item()} for row in logs)]
        return {"text": "", "logprobs": {"token_logprobs": own, "top_logprobs": best, "text_offset": starts}}

    @torch.no_grad()
    def _written(self, ids: list[int], body: dict[str, Any]) -> str:
        """Greedy text up to a stop sequence."""
        start, text = len(ids), ""
        stops = [stop for stop in body.get("stop") or [] if stop]
        for _ in range(body["max_tokens"]):
            ids = [*ids, int(self.model(torch.tensor([ids])).logits[0, -1].argmax())]
            text = self.tokenizer.decode(ids[start:])
            for stop in stops:
                if stop in text:
                    return text.partition(stop)[0]
        return text


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Answers]]:
    """A server on loopback, as (URL, what it answers)."""
    answers = Answers(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"data": [{"id": str(folder)}]})

        def do_POST(self) -> None:
            answers.headers.append(self.headers["Authorization"])
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(answers.to(self.path, body))

        def _answer(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", answers
        finally:
            server.shutdown()
