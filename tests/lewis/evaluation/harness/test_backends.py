"""The backends of lm-eval: what each is asked, and that a server gives the scores that `hf` gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml

from lewis.errors import InputError, LewisError
from lewis.evaluation.harness import backends, lm_eval, process, server
from lewis.evaluation.harness.lm_eval import EvalSettings, tasks_digest
from lewis.models.chat_template import write_template
from lewis.models.files.folder import copy_tokenizer
from tests.support.completions_server import Answers, serving
from tests.support.models import write_lora

pytestmark = pytest.mark.slow

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "road", "red", "blue", "is", "sky", "and", "who", "?"]
ROWS = [
    {"question": "the sky is", "answer": 2, "text": " red"},
    {"question": "who sat on the mat ?", "answer": 0, "text": " the cat sat"},
    {"question": "the dog ran and the", "answer": 0, "text": " cat ran"},
    {"question": "", "answer": 1, "text": " a red dog and a blue cat"},
]
DATA = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
ASKED = {**DATA, "doc_to_text": "question"}
CHOICE = {**ASKED, "output_type": "multiple_choice", "doc_to_target": "answer", "doc_to_choice": ["cat", "dog", "red"]}
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
TASKS = {
    "pets": CHOICE,
    "answers": {**ASKED, "output_type": "loglikelihood", "doc_to_target": "text", "metric_list": [PERPLEXITY]},
    "rolling": {**ASKED, "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "written": {
        **ASKED,
        "output_type": "generate_until",
        "doc_to_text": "who {{question}}",
        "doc_to_target": "said",
        "generation_kwargs": {"until": ["?"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer puts <s> before each text, as many do, and has a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("model")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = "<s>{% for each in messages %}{{ each.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(vocabulary), max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **shape
    )
    llama = LlamaForCausalLM(config)
    for parameter in llama.parameters():
        parameter.data.mul_(20) if parameter.dim() == 2 else None
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEWIS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LEWIS_EVALUATION_SERVER", raising=False)
    monkeypatch.setattr(lm_eval, "reads_hub", lambda found, root: True)  # so that `hf` and `openai` share a fork server
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({**row, "said": "-"}) + "\n" for row in ROWS))
    for name, config in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **config}))
    return folder


def scores(settings: EvalSettings, model: Path) -> dict[str, Any]:
    """Score -> its value per document."""
    found = lm_eval.evaluate(model, settings)
    return {each.key: each.parts[0].values for each in found.samples} | {"ends": found.ends}


@pytest.mark.long
def test_an_adapter_with_a_chat_template_of_its_own_is_asked_in_it(model: Path, root: Path, tmp_path: Path) -> None:
    """Of `hf` it was the base's, while the other backends and whoever loads the adapter's tokenizer take its own."""
    adapter = write_lora(model, tmp_path / "adapter")
    settings = EvalSettings(("written.yaml",), root, apply_chat_template=True)
    assert tasks_digest(settings) != tasks_digest(replace(settings, apply_chat_template=False))
    prompts = []
    for template in (None, "{% for each in messages %}on {{ each.content }}{% endfor %}"):
        if template:
            copy_tokenizer(model, adapter)
            write_template(adapter, template)
        found = lm_eval.evaluate(model, settings, adapter=adapter, to_serve=True).content["requests"]["written"]
        prompts.append({each["prompt"] for each in found})
    assert "<s>who the sky is " in prompts[0] and "on who the sky is" in prompts[1]


class TestAServer:
    def test_it_gives_the_scores_of_hf_and_the_key_goes_to_no_code(
        self, model: Path, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = tuple(f"{name}.yaml" for name in TASKS)
        ours = scores(EvalSettings(names, root, batch_size=2), model)
        with serving(model) as (url, answers):
            monkeypatch.setenv("LEWIS_EVALUATION_SERVER", url)
            monkeypatch.setenv("OPENAI_API_KEY", "of the server")
            theirs = scores(EvalSettings(names, root, batch_size=2, backend="openai"), model)
            assert set(answers.headers) == {"Bearer of the server"}
            assert all(body["model"] == str(model) for body in answers.asked)
            for code in (False, True):
                with backends.harness_model("openai", {}, model, None, "cpu", code=code) as asked:
                    assert ("OPENAI_API_KEY" in asked.environment) is not code
        assert theirs.keys() == ours.keys() and len(ours) >= 5
        for key in ours.keys() - {"ends"}:
            assert list(theirs[key]) == [pytest.approx(value, rel=1e-4) for value in ours[key]], key
        assert theirs["ends"].perplexity == pytest.approx(ours["ends"].perplexity, rel=1e-4)
        assert (theirs["ends"].tried, theirs["ends"].empty) == (ours["ends"].tried, ours["ends"].empty)
        assert theirs["ends"].ended == ours["ends"].ended

    def test_a_chat(self, model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = EvalSettings(
            ("written.yaml",), root, backend="openai", apply_chat_template=True, model_args={"chat": True}
        )
        with serving(model) as (url, answers):
            monkeypatch.setenv("LEWIS_EVALUATION_SERVER", url)
            found = scores(settings, model)
        assert answers.asked[0]["messages"] == [{"role": "user", "content": "who the sky is"}]
        assert len(found["written/exact_match,none"]) == len(ROWS)
        assert (found["ends"].tried, found["ends"].perplexity) == (0, None)

    @pytest.mark.parametrize("concurrent", [1, 2])
    def test_a_server_without_the_likelihoods_of_the_prompt_gives_no_scores(
        self, concurrent: int, model: Path, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only = {"token_logprobs": [-1.0], "top_logprobs": [{"1": -1.0}]}  # of what it wrote
        monkeypatch.setattr(Answers, "_echoed", lambda *_: {"text": "", "logprobs": only})
        more = {"num_concurrent": concurrent, "max_retries": 1}
        with serving(model) as (url, _):
            monkeypatch.setenv("LEWIS_EVALUATION_SERVER", url)
            with pytest.raises(LewisError, match=r"likelihoods of all \d+ tokens of a prompt .* and gave 1; take"):
                scores(EvalSettings(("pets.yaml",), root, backend="openai", model_args=more), model)

    def test_one_that_answers_without_http_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as mail:
            Thread(target=lambda: mail.accept()[0].sendall(b"220 mail\r\n"), daemon=True).start()
            monkeypatch.setenv("LEWIS_EVALUATION_SERVER", f"http://127.0.0.1:{mail.getsockname()[1]}/v1")
            with (
                pytest.raises(LewisError, match="v1/models does not list models: BadStatusLine: 220 mail"),
                server.serving("/some/model", {}),
            ):
                pass

    def test_another_model_is_not_asked(self, model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with serving(model) as (url, answers):
            monkeypatch.setenv("LEWIS_EVALUATION_SERVER", url)
            with (
                pytest.raises(InputError, match=f"has not the model .*{root.name}, but {model}; it must"),
                server.serving(str(root), {}),
            ):
                pass
        assert not answers.asked


FAKE = """
import http.server, json, os, signal, subprocess, sys, time
if "--fail" in sys.argv:
    print("no such layer"); sys.exit(3)
child = subprocess.Popen(["sleep", "600"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = {"id": sys.argv[1], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "pids": [os.getpid(), child.pid]}
        data = json.dumps({"data": [said], "secret": os.environ.get("MY_SECRET")}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_): pass
time.sleep(0.3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The setting for a program that says it has a model."""
    (tmp_path / "fake.py").write_text(FAKE)
    command = f"{sys.executable} -S {tmp_path / 'fake.py'} {{model}} {{port}}"
    monkeypatch.setenv("LEWIS_EVALUATION_SERVER", command)
    return command


def gone(pids: list[int]) -> bool:
    """Whether all these processes end within a while."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def asked_of(url: str) -> dict[str, Any]:
    import urllib.request

    with urllib.request.urlopen(f"{url}/models") as answer:
        return dict(json.loads(answer.read()))


class TestAServerThatIsStarted:
    def test_it_answers_has_no_secrets_and_ends_with_all_that_it_started(
        self, fake: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_SECRET", "key")
        ticks = []
        with server.serving("/some/model", {"CUDA_VISIBLE_DEVICES": "1,3"}, tick=lambda: ticks.append(1)) as served:
            said = asked_of(served.url)
            assert served.problem() == "" and "127.0.0.1" in served.environment["NO_PROXY"] and ticks
            os.kill(said["data"][0]["pids"][0], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while not served.problem() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert "the evaluation server ended with exit code 137" in served.problem()
        assert said["secret"] is None and said["data"][0]["gpus"] == "1,3"
        assert gone(said["data"][0]["pids"])

    def test_it_ends_with_us_after_kill_9(self, fake: str, tmp_path: Path) -> None:
        code = """
            import sys, time
            from lewis.evaluation.harness import server
            with server.serving("/some/model", {}) as served:
                print(served.url, flush=True)
                time.sleep(600)
        """
        ours = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        try:
            assert ours.stdout is not None
            pids = asked_of(ours.stdout.readline().strip())["data"][0]["pids"]
        finally:
            ours.kill()
            ours.communicate()
        assert gone(pids)

    def test_one_that_does_not_start_is_told_with_its_output(self, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LEWIS_EVALUATION_SERVER", f"{fake} --fail")
        with (
            pytest.raises(LewisError, match=r"does not start\n.*exit code 3\n(.*\n)?no such layer"),
            server.serving("/some/model", {}),
        ):
            pass
        monkeypatch.setenv("LEWIS_EVALUATION_SERVER", fake.replace(" {model} {port}", " other {port} {model}"))
        with (
            pytest.raises(InputError, match="has not the model /some/model, but other"),
            server.serving("/some/model", {}),
        ):
            pass
        with (
            pytest.raises(LewisError, match=r"did not answer within 0\.1 s"),
            server.serving("/some/model", {}, patience_s=0.1),
        ):
            pass

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ("", "not set; evaluate.backend openai asks a server"),
            ("vllm serve --port {port}", "expected a command with {model} in it"),
            ("no-such-program {model} {port}", "no program 'no-such-program'"),
            ("vllm 'serve {model} {port}", "cannot be read as a command"),
        ],
    )
    def test_a_wrong_setting(self, given: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LEWIS_EVALUATION_SERVER", given)
        with pytest.raises(InputError, match=f"^LEWIS_EVALUATION_SERVER: .*{told}"):
            backends.check("openai")


@pytest.mark.parametrize(
    ("settings", "device", "name", "arguments", "rest"),
    [
        ({}, "cpu", "hf", {"dtype": "float32"}, ("cpu", False, {})),
        ({}, "cuda:1", "hf", {"dtype": "auto"}, ("cuda:1", False, {})),
        (
            {"gpus": 2, "model_args": {"dtype": "bfloat16", "max_memory_per_gpu": "20GiB"}},
            "cuda:0,cuda:1",
            "hf",
            {"dtype": "bfloat16", "parallelize": True, "max_memory_per_gpu": "20GiB"},
            ("cuda", False, {"CUDA_VISIBLE_DEVICES": "4,6"}),
        ),
        (
            {"backend": "vllm", "gpus": 2, "model_args": {"gpu_memory_utilization": 0.8}},
            "cuda:1,cuda:2",
            "vllm",
            {"dtype": "auto", "load_format": "safetensors", "tensor_parallel_size": 2, "gpu_memory_utilization": 0.8},
            (None, True, {"CUDA_VISIBLE_DEVICES": "6,2"}),
        ),
        (
            {"backend": "sglang"},
            "cuda:0",
            "sglang",
            {"dtype": "auto", "load_format": "safetensors", "tp_size": 1},
            ("cuda", True, {"CUDA_VISIBLE_DEVICES": "4"}),
        ),
    ],
)
def test_what_lm_eval_is_asked(
    settings: dict[str, Any],
    device: str,
    name: str,
    arguments: dict[str, Any],
    rest: tuple[Any, ...],
    model: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request that reaches the child, where this machine has no such GPU and not the backend's package."""
    requests: list[dict[str, Any]] = []

    def run(request: dict[str, Any], **options: Any) -> dict[str, Any]:
        requests.append({**request, **options})
        raise LewisError("no GPU here")

    monkeypatch.setattr(process, "run", run)
    monkeypatch.setattr(backends, "check", lambda backend: None)
    monkeypatch.setattr(lm_eval, "reads_hub", lambda found, root: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,2")
    with pytest.raises(LewisError, match="no GPU here"):
        lm_eval.evaluate(model, EvalSettings(("pets.yaml",), root, **settings), device=device)
    [asked] = requests
    tokenizer = {"sglang": "tokenizer_path"}.get(name, "tokenizer")
    fixed = {"pretrained": str(model), tokenizer: str(model), "trust_remote_code": False}
    own = {"use_safetensors": True} if name == "hf" else {}
    assert asked["model"] == name and asked["model_args"] == {**fixed, **own, **arguments}
    assert (asked["device"], asked["network"], asked["environment"]) == rest
    assert asked["hub"] is False and asked["token"] is False


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_a_backend_that_is_not_installed_is_told(backend: str) -> None:
    with pytest.raises(InputError, match=f"evaluate.backend: {backend} is not installed on this machine"):
        backends.check(backend)  # type: ignore[arg-type]


def test_the_backend_its_arguments_and_the_server_are_a_part_of_the_scores_digest(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(**options: Any) -> str:
        return tasks_digest(EvalSettings(("pets.yaml",), root, **options))

    assert backends.identity("hf", {}) == {}  # so scores of recipes that name no backend are found
    assert len({digest(), digest(backend="hf"), digest(gpus=4)}) == 1
    found = {
        digest(),
        digest(model_args={"dtype": "bfloat16"}),
        digest(backend="vllm"),
        digest(backend="vllm", model_args={"dtype": "bfloat16"}),
        digest(backend="openai"),
    }
    monkeypatch.setenv("LEWIS_EVALUATION_SERVER", "vllm serve {model} --port {port} --dtype float16")
    assert len({*found, digest(backend="openai")}) == 6 and digest(backend="vllm") in found


def test_the_environment_of_an_evaluation_has_no_key_of_a_backend() -> None:
    given = {"VLLM_ATTENTION_BACKEND": "x", "VLLM_API_KEY": "secret", "SGLANG_API_TOKEN": "secret"}
    from lewis.walls.isolation import without_secrets

    assert {name for name in without_secrets(given) if name in given} == {"VLLM_ATTENTION_BACKEND"}
