"""A server that loads and unloads adapters with vLLM's protocol, and runs none of them."""

import time
from typing import Any

from tests.support.http_sink import HttpSink, Request


class LoraServer(HttpSink):
    """Use as a context manager.

    Attributes:
        models: name -> path of what is loaded.
        delay: seconds before each answer.
        enabled: whether it loads adapters while it runs.
        seen: path that clients get under the name that they ask for, after each request that changed it.
    """

    def __init__(self, asked_for: str, enabled: bool = True, port: int = 0) -> None:
        super().__init__(self._answered, port)
        self.models = {"base": "base"}
        self.enabled, self._asked_for, self.delay = enabled, asked_for, 0.0
        self.seen: list[str | None] = []

    def _answered(self, request: Request) -> Any:
        time.sleep(self.delay)
        if request.path == "/v1/models":
            return {"data": [{"id": name, "root": path} for name, path in self.models.items()]}
        name = request.json["lora_name"]
        if not self.enabled:
            return 404, {"detail": "Not Found"}
        if request.path == "/v1/unload_lora_adapter":
            return {} if self.models.pop(name, None) else (404, {"error": "cannot be found"})
        if name in self.models and not request.json.get("load_inplace"):
            return 400, {"error": "has already been loaded"}
        self.models[name] = request.json["lora_path"]
        if (now := self.models.get(self._asked_for)) not in self.seen[-1:]:
            self.seen.append(now)
        return "Success"
