"""The table of settings: each one's default, a good and a wrong value; the page of the documentation has the table."""

import re
from pathlib import Path
from typing import Any

import pytest

from lewis import settings
from lewis.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SERVER = "serve {model} --port {port}"
CASES = {  # the value by default; a text and its value; a wrong text
    "LEWIS_HOME": (Path("~/.cache/lewis").expanduser().resolve(), "/tmp/../x", Path("/x"), "~nobody-of-that-name/x"),
    "LEWIS_STORE": ("", "s3://bucket/prefix/", "s3://bucket/prefix", "bucket/prefix"),
    "LEWIS_STORE_MERGED": (False, "1", True, "yes"),
    "LEWIS_QUOTA": (None, "1.5GB", 1_500_000_000, "5PB"),
    "LEWIS_RECIPES": (None, "~/x", Path("~/x").expanduser(), "~nobody-of-that-name/x"),
    "LEWIS_NIGHTLY": ("0 3 * * *", "off", "", "at three"),
    "LEWIS_POLL_SECONDS": (45, "0", 0, "often"),
    "LEWIS_MERGE_DEVICE": ("cpu", "cuda", "cuda", "gpu"),
    "LEWIS_DEVICE_SLOTS": (None, "3", 3, "0"),
    "LEWIS_TASK_RUNNER": ("thread", "dask", "dask", "spark"),
    "LEWIS_MAX_WORKERS": (None, "2", 2, "1.5"),
    "LEWIS_DASK_ADDRESS": ("", "tcp://host:8786", "tcp://host:8786", "two words"),
    "LEWIS_RAY_ADDRESS": ("", "auto", "auto", "two words"),
    "LEWIS_EVALUATION_SERVER": ("", SERVER, SERVER, "serve --port {port}"),
    "LEWIS_JUDGE": ("", "http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", "127.0.0.1:8000"),
    "LEWIS_JUDGE_KEY": ("", "key", "key", "ключ"),  # no header can have it: the gate, after hours, met a traceback
    "LEWIS_CODE_NEEDS_NAMESPACES": (False, "1", True, "yes"),
    "LEWIS_EVALUATE_QUEUE": ("", " gpu ", "gpu", "a/b"),
    "LEWIS_EVALUATE_POOL": ("lewis", "evaluate", "evaluate", "a b"),
    "LEWIS_MLFLOW_AUTH": (True, "0", False, "off"),
    "LEWIS_MLFLOW_UI": ("", "https://mlflow.example", "https://mlflow.example", "mlflow.example"),
    "LEWIS_LOG_FORMAT": ("text", "json", "json", "yaml"),
    "LEWIS_SERVER_WAIT_SECONDS": (300, "0", 0, "5 min"),
    "LEWIS_WORKER_LIMIT": (4, "1", 1, "none"),
    "LEWIS_NOTIFY": ("", "slack-webhook/ops", "slack-webhook/ops", "ops"),
    "LEWIS_NOTIFY_URL": ("", "https://x.example/hook", "https://x.example/hook", "x.example/hook"),
    "LEWIS_WEBHOOK_HOST": ("127.0.0.1", "::", "::", "a host"),
    "LEWIS_WEBHOOK_PORT": (4300, "0", 0, "65536"),
    "LEWIS_WEBHOOK_URL": ("", "http://127.0.0.1:4300/webhook", "http://127.0.0.1:4300/webhook", "4300"),
    "LEWIS_WEBHOOK_SECRET": ("", " s3cret word ", "s3cret word", "two\nlines"),
    "LEWIS_METRICS_KEY": ("", "k", "k", "a\tb"),
    "LEWIS_SERVE_PROGRAMS": (None, "/x", Path("/x"), "~nobody-of-that-name/x"),
    "LEWIS_SERVE_SECRET": ("", "s", "s", "two\nlines"),
    "LEWIS_SERVE_KEY": ("", "k", "k", "a\tb"),
    "LEWIS_UP_SERVE_PORT": (4400, "80", 80, "0"),
    "LEWIS_UP_SERVE_COMMAND": ([], "/x/vllm serve --a 'b c'", ["/x/vllm", "serve", "--a", "b c"], "vllm bench"),
    "LEWIS_UP_SERVE_SERVERS": (2, "1", 1, "3"),
    "LEWIS_UP_SERVE_KEY": ("", "k-1_", "k-1_", "two words"),
}
BY_NAME = {each.name: each for each in settings.ALL}


def test_every_setting_is_tested() -> None:
    assert CASES.keys() == BY_NAME.keys() and len(settings.ALL) == len(BY_NAME)


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_default_good_and_wrong(name: str, case: tuple[Any, str, Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    default, good, value, wrong = case
    setting = BY_NAME[name]
    monkeypatch.delenv(name, raising=False)
    assert setting.get() == default and type(setting.get()) is type(default)
    for empty in ("", " "):
        monkeypatch.setenv(name, empty)
        assert setting.get() == default
    monkeypatch.setenv(name, good)
    assert setting.get() == value and type(setting.get()) is type(value)
    monkeypatch.setenv(name, wrong)
    with pytest.raises(InputError) as error:
        setting.get()
    assert re.match(
        f"{name}: expected {re.escape(setting.kind.expected)}, got .*; change or unset it$", str(error.value)
    )
    assert (wrong in str(error.value)) != setting.secret
    with pytest.raises(InputError, match=f"^{name}: "):
        settings.check()
    if setting.secret:
        assert setting.shown() == "set"
    else:
        assert setting.shown() == wrong
    monkeypatch.delenv(name)
    assert setting.shown() == ("not set" if setting.secret else setting.default)


_OF_SHORT_MONTHS = ["0 0 29,31 2 *", "0 0 31 4 1", "0 0 31 2,3 *"]


@pytest.mark.parametrize(
    "text", [*_OF_SHORT_MONTHS, "*/15 0-6/2 1,15 jan mon-fri", "0 3 ? * fri#2", "0 3 5-L,2 * *", "0 3 * DEC L5"]
)
def test_a_cron_expression(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_NIGHTLY", text)
    assert settings.NIGHTLY.get() == text


@pytest.mark.parametrize(
    "text",
    [
        *("99 99 * * *", "0 24 * * *", "0 3 0 * *", "0 3 * 13 *", "0 3 * * 8", "a b c d e", "0 3 L-3 * *"),
        *("0 3 ?/2 * *", "0 3 * * mon#1,tue", "0 3 * * *-5", "0 3#2 * * *", "0 3 * * L5,2", "0 3 *,? * *"),
    ],
)
def test_a_cron_expression_of_five_wrong_fields(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_NIGHTLY", text)
    with pytest.raises(InputError, match=r"^LEWIS_NIGHTLY: expected five fields of cron, .* is no .*; change or unset"):
        settings.check()


@pytest.mark.parametrize("text", ["0 0 31 2 *", "0 0 30-31 FEB ?", "0 0 31 4,06 *"])
def test_a_cron_expression_of_a_day_that_never_comes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was deployed without a word, and Prefect's scheduler failed at it again and again."""
    monkeypatch.setenv("LEWIS_NIGHTLY", text)
    with pytest.raises(InputError, match=r"^LEWIS_NIGHTLY: expected five fields of cron, .* never comes; change or"):
        settings.check()


@pytest.mark.parametrize("text", ["/", "/usr/.."])
def test_a_store_that_would_close_the_whole_machine_to_other_users(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second lock of a command that root ran gave `/` the mode 0700."""
    monkeypatch.setenv("LEWIS_HOME", text)
    with pytest.raises(InputError, match=f"^LEWIS_HOME: expected a folder, got '{text}': the store needs a folder of"):
        settings.HOME.get()


@pytest.mark.parametrize("text", ["s3://", "/", "file:///", "file://shared/x", "local://x"])
def test_a_remote_half_that_would_be_a_folder_of_the_working_folder(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`s3://$BUCKET` of a variable that is not set was the folder `s3:`, and `/` was no remote half."""
    monkeypatch.setenv("LEWIS_STORE", text)
    with pytest.raises(InputError, match=f"^LEWIS_STORE: expected a URL .*or an absolute path, got '{text}'; change"):
        settings.check()


@pytest.mark.parametrize("text", ["serve '{model} {port}", "serve {model} {port", "serve {port} model"])
def test_a_server_that_is_neither_a_url_nor_a_command(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_EVALUATION_SERVER", text)
    with pytest.raises(InputError, match="cannot be read as a command: No closing" if "'" in text else "expected a co"):
        settings.EVALUATION_SERVER.get()


def test_passwords_of_urls_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_STORE", "s3://me:hunter2@host/x")
    assert settings.STORE.shown() == "s3://***@host/x"
    monkeypatch.setenv("LEWIS_MLFLOW_UI", "ftp://me:hunter2@host/x")
    with pytest.raises(InputError) as error:
        settings.MLFLOW_UI.get()
    assert "hunter2" not in str(error.value)


def test_a_variable_that_is_no_setting_is_told_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEWIS_RECIPE", "x")
    monkeypatch.setenv("LEWIS_WEBHOOK_SECRET_FILE", "x")  # read by lewis_flows.service.from_files
    (told,) = [text for text in settings.unknown() if "RECIPE" in text or "_FILE" in text]
    assert told == "LEWIS_RECIPE: there is no such setting; did you mean 'LEWIS_RECIPES'?"


def test_nothing_else_reads_one() -> None:
    name = r"\s*f?[\"']LEWIS_[A-Z_]+[\"']"
    reading = re.compile(rf"environ(\.get)?[\[(]{name}|getenv\({name}|=\s*\(?{name}")
    sources = [path for root in ("lewis", "tasks", "flows") for path in (ROOT / root).rglob("*.py")]
    assert len(sources) > 200
    found = [path for path in sources if path != Path(settings.__file__).resolve() and reading.search(path.read_text())]
    assert found == []


def test_the_page_has_the_table() -> None:
    page = (ROOT / "deployments" / "SETTINGS.md").read_text()
    table = [
        f"| `{each.name}` | {f'`{each.default}`' if each.default else ''} | {each.kind.expected} | {each.what} |"
        for each in settings.ALL
    ]
    assert re.findall(r"^\| `LEWIS_.*$", page, re.MULTILINE) == table
    secrets = re.search(r"^Secrets.*?: (.*?)\.$", page, re.MULTILINE | re.DOTALL)
    assert secrets and re.findall(r"`(\w+)`", secrets[1]) == [each.name for each in settings.ALL if each.secret]


@pytest.mark.parametrize(
    "size, text", [(0, "0.0 KB"), (41_300, "41.3 KB"), (2_415_104, "2.4 MB"), (1_530_000_000, "1.53 GB")]
)
def test_sizes_are_written_in_the_unit_that_shows_something(size: int, text: str) -> None:
    """A merge of small models was reported as 0.00 GB."""
    assert settings.size_text(size) == text
