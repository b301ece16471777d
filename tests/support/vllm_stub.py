"""A program `vllm` that starts at once, has the protocol of vLLM, and answers with the name of a model's folder."""

import sys
from pathlib import Path

CODE = """#!%s -S
import argparse, json, os, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("serve", "model"):
    parser.add_argument(name)
for name in ("host", "port", "served-model-name", "max-lora-rank", "max-loras"):
    parser.add_argument(f"--{name}")
parser.add_argument("--enable-lora", action="store_true")
parser.add_argument("--lora-modules", nargs="*", type=json.loads, default=[])
given = parser.parse_args()
models = {given.served_model_name or given.model: given.model}
models |= {each["name"]: each["path"] for each in given.lora_modules}
if (Path(given.model) / "too-big").exists():
    raise SystemExit("there is no memory for it")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200, {"data": [{"id": name, "root": root} for name, root in models.items()]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.answer(401, {})
        elif self.path == "/v1/load_lora_adapter":
            models[body["lora_name"]] = body["lora_path"]
            self.answer(200, "Success")
        elif self.path == "/v1/unload_lora_adapter":
            self.answer(200 if models.pop(body["lora_name"], None) else 404, {})
        elif body["model"] not in models:
            self.answer(404, {})
        else:
            root = models[body["model"]]
            time.sleep(float(body["prompt"]) if body["prompt"].startswith("0.") else 0)
            self.answer(200, {"choices": [{"text": Path(root).name}]})

    def answer(self, status, body):
        sent = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True


Server(("127.0.0.1", int(given.port)), Handler).serve_forever()
"""


def write_vllm(folder: Path) -> str:
    """Put the program into a folder; gives the command that serves with it.

    A model with a file `too-big` makes it end. A prompt that is a number below 1 is how many seconds an answer takes.
    """
    program = folder / "vllm"
    program.write_text(CODE % sys.executable)
    program.chmod(0o755)
    return f"{program} serve"
