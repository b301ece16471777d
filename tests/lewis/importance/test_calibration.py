"""Calibration sets: the same rows and token ids every time, and clear words when there are none."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lewis.errors import InputError, LewisError
from lewis.importance import calibration, chats, dataset_rows
from lewis.importance.calibration import Calibration, calibrate
from lewis.importance.row_texts import Text, _fill
from lewis.importance.step import CalibrationInput
from lewis.recipe.schema import CalibrationSet
from lewis.store.manifest import place_of
from tests.conftest import Family
from tests.support import pipeline
from tests.support.local_hub import LocalHub
from tests.support.models import edit_json, shard, write_tokenizer

pytestmark = pytest.mark.usefixtures("home")
ROWS = [{"question": f"w{i}", "answer": f"w{i + 1} w{i + 2}", "n": i, "nested": {"key": f"w{i}"}} for i in range(20)]


def run(tokenizer: Path, root: Path = Path("/"), **spec: Any) -> Calibration:
    return calibrate("sums", CalibrationSet(**spec), tokenizer=tokenizer, root=root)


def ids(*words: int) -> tuple[int, ...]:
    return tuple(3 + word for word in words)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


class TestSamples:
    def test_are_the_first_of_a_seeded_permutation(self, family: Family) -> None:
        texts = [f"w{i}" for i in range(20)]
        found = run(family.base, texts=texts, samples=5, seed=7)
        assert found.samples == tuple(ids(i) for i in np.random.default_rng(7).permutation(20)[:5])
        assert (
            found
            == run(family.base, texts=texts, samples=5, seed=7)
            != run(family.base, texts=texts, samples=5, seed=8)
        )
        assert found.tokens == 5

    def test_are_cut_to_max_tokens_and_never_padded(self, family: Family) -> None:
        found = run(family.base, texts=["w1 w2 w3 w4", "w5"], max_tokens=3)
        assert set(found.samples) == {ids(1, 2, 3), ids(5)}

    def test_empty_texts_are_left_out_and_told(self, family: Family, caplog: pytest.LogCaptureFixture) -> None:
        assert run(family.base, texts=["", "w5", "  "]).samples == (ids(5),)
        assert "lewis.calibrations.sums: 2 of 3 texts have no tokens and are left out" in caplog.text

    def test_fewer_than_asked_for_are_refused(self, family: Family) -> None:
        with pytest.raises(InputError, match=r"lewis.calibrations.sums.samples: 3 asked for, the set has 1"):
            run(family.base, texts=["w1"], samples=3)
        assert len(run(family.base, texts=["w1"]).samples) == 1  # 128 is the default, not a wish

    def test_are_filled_up_with_end_of_text_tokens(self, family: Family, tmp_path: Path) -> None:
        found = run(family.base, texts=["w1 w2", "w3 w4 w5 w6 w7"], max_tokens=4, padding="max_tokens")
        assert set(found.samples) == {(*ids(1, 2), 1, 1), ids(3, 4, 5, 6)}
        left = shard(family.base, tmp_path / "left", parts=1)
        edit_json(left / "tokenizer_config.json", padding_side="left")
        assert run(left, texts=["w1 w2"], max_tokens=4, padding="max_tokens").samples == ((1, 1, *ids(1, 2)),)

    def test_none_without_an_end_of_text_token(self, family: Family, tmp_path: Path) -> None:
        other = shard(family.base, tmp_path / "no-eos", parts=1)
        edit_json(other / "tokenizer_config.json", eos_token=None)
        with pytest.raises(InputError, match=r"lewis.calibrations.sums.padding: .* has no end-of-text token"):
            run(other, texts=["w1"], padding="max_tokens")

    @pytest.mark.parametrize("kind", ["json", "parquet", "csv"])
    def test_of_local_files_fill_the_template(self, family: Family, data: Path, kind: str) -> None:
        file = "data/train.jsonl"
        if kind != "json":
            import pandas

            file = f"data/train.{kind}"
            rows = pandas.DataFrame(ROWS)
            rows.to_parquet(data / file) if kind == "parquet" else rows.to_csv(data / file)
        found = run(family.base, data, dataset=kind, data_files=file, text="{question} {answer}", samples=4)
        chosen = np.random.default_rng(42).permutation(20)[:4]
        assert found.samples == tuple(ids(i, i + 1, i + 2) for i in chosen)
        assert found == run(family.base, data, dataset=kind, data_files=[file], text="{question} {answer}", samples=4)

    def test_cells_of_a_csv_are_texts_as_they_are_written(self, family: Family, data: Path) -> None:
        """A number with a row that lacked it became 5.0, and 007 became 7; an answer NA was none."""
        (data / "rows.csv").write_text('q,a\nw1,5\nw3,\nw4,007\nw5,NA\n"w6, w7",1.50\n')
        rows = dataset_rows.rows_of("", CalibrationSet(dataset="csv", data_files="rows.csv", text="{a}"), data)
        with rows as found:
            assert list(found["a"]) == ["5", "", "007", "NA", "1.50"] and found["q"][4] == "w6, w7"

    def test_a_null_is_nothing_and_a_date_a_date(self) -> None:
        """In an answer's part a null was the word None, and JSON's dates were written with the time of midnight."""
        row = {"a": {"t": None}, "b": None, "day": datetime(2020, 1, 2), "time": datetime(2020, 1, 2, 3, 4)}
        assert _fill("", "<{a[t]}{b}> {day} {time} {day:%Y} {b!s}", row) == "<> 2020-01-02 2020-01-02 03:04:00 2020 "

    def test_of_a_file_whose_name_is_a_pattern_are_its_own(self, family: Family, data: Path) -> None:
        """The rows of another file, which the name matched as a pattern, came in the place of its own."""
        for name, word in (("data/rows[1].jsonl", "w7"), ("data/rows1.jsonl", "w8")):
            (data / name).write_text(f'{{"a": "{word}"}}\n')
        found = run(family.base, data, dataset="json", data_files="data/rows[1].jsonl", text="{a}")
        assert found.samples == (ids(7),)

    code = (
        "import sys; from pathlib import Path\n"
        "from lewis.importance.calibration import calibrate; from lewis.recipe.schema import CalibrationSet\n"
        "for name in sys.argv[2:]:\n"
        "    spec = CalibrationSet(dataset=name, text='{question}', samples=3)\n"
        "    print(*calibrate('sums', spec, tokenizer=Path(sys.argv[1]), root=Path('/')).samples)"
    )  # for a process of its own: `datasets` reads the environment once, at import

    @pytest.mark.long
    def test_of_a_hub_that_is_busy_and_cuts_come_in_one_run(self, family: Family, data: Path) -> None:
        """What models had been given was not given to them: a wait that is asked for, and what arrived is kept."""
        with LocalHub(data / "server") as hub:
            hub.commit("org/sums", {"train.jsonl": '{"question": "w59"}\n' * 200_000}, repo_type="dataset")
            file = {"path": "train.jsonl", "method": "GET"}
            hub.faults += [{**file, "truncate": 3_000_000, "reset": True}, {**file, "status": 503}]
            busy = {"path": "train.jsonl", "method": "HEAD", "status": 429, "headers": {"Retry-After": "1"}}
            hub.faults += [{**busy, "times": 7}]
            command = [sys.executable, "-c", self.code, str(family.base), "org/sums"]
            environment = os.environ | hub.environment(data / "caches")
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.stdout == " ".join([str(ids(59))] * 3) + "\n", done.stderr
            gets = [each.range for each in hub.log if each.method == "GET" and "train.jsonl" in each.path]
            assert gets[0] is None and all(gets[1:]) and not hub.faults[-1].get("times")
            hub.faults[:] = [{"path": "api/datasets", "status": 503, "times": 99}]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert "lewis.errors.TransientError" in done.stderr

    def test_of_a_hub_dataset_are_those_of_its_commit(self, family: Family, data: Path) -> None:
        with LocalHub(data / "server") as hub:
            old = hub.commit("org/sums", data / "data", repo_type="dataset")
            hub.commit("org/sums", {"train.jsonl": '{"question": "w59"}\n' * 20}, repo_type="dataset")
            environment = os.environ | hub.environment(data / "caches")
            command = [sys.executable, "-c", self.code, str(family.base), f"org/sums@{old}", "org/sums"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        chosen = np.random.default_rng(42).permutation(20)[:3]
        assert done.stdout.splitlines() == [
            " ".join(str(ids(int(i))) for i in chosen),
            " ".join([str(ids(59))] * 3),
        ], done.stderr

    def test_a_template_may_look_into_a_column(self, family: Family, data: Path) -> None:
        found = run(
            family.base, data, dataset="json", data_files="data/train.jsonl", text="{nested[key]} w{n:d}", samples=1
        )
        (i,) = np.random.default_rng(42).permutation(20)[:1]
        assert found.samples == (ids(i, i),)

    def test_of_answers_count_more_than_those_of_prompts(self, family: Family, data: Path) -> None:
        """So does the last token before an answer, which predicts its first."""
        file = {"dataset": "json", "data_files": "data/train.jsonl", "samples": 1}
        pair = {"prompt": "w9 {question} ", "answer": "{answer}"}
        (i,) = np.random.default_rng(42).permutation(20)[:1]
        found = run(family.base, data, **file, **pair)
        assert found == Calibration("sums", (ids(9, i, i + 1, i + 2),), ((0.1, 1, 1, 1),))
        assert found == run(family.base, data, **file, text="w9 {question} {answer}", weight={"prompt": 0.1})
        assert found.factors == [pytest.approx([0.4 / 3.1, 4 / 3.1, 4 / 3.1, 4 / 3.1])]
        alike = run(family.base, data, **file, text="w9 {question} {answer}")
        assert alike == run(family.base, data, **file, **pair, weight={"prompt": 1})
        assert alike.weights is None and alike.digest != found.digest and Calibration.load(found.save()) == found
        filled = run(family.base, data, **file, **pair, padding="max_tokens", max_tokens=5)
        assert filled.weights == ((0.1, 1, 1, 1, 0.1),)
        with pytest.raises(InputError, match=r"no token of an answer is left: the prompts fill max_tokens \(1\)"):
            run(family.base, data, **file, **pair, max_tokens=1)

    def test_of_a_row_with_neither_are_none(self, family: Family, tmp_path: Path) -> None:
        """It ended in a traceback."""
        rows = [{"question": "", "answer": ""}, {"question": "w1", "answer": "w2"}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = {"dataset": "json", "data_files": "rows.jsonl", "prompt": "{question} ", "answer": "{answer}"}
        assert run(family.base, tmp_path, **file) == Calibration("sums", (ids(1, 2),), ((1, 1),))

    @pytest.mark.slow
    def test_of_chats_are_what_the_chat_template_writes(self, family: Family, tmp_path: Path) -> None:
        tokenizer = shard(family.base, tmp_path / "chatty", parts=1)
        template = (
            "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}w2 {% endif %}"
        )
        edit_json(tokenizer / "tokenizer_config.json", chat_template=template)
        turns = [("user", "w5"), ("assistant", "w6 w7"), ("user", "w8"), ("assistant", "w9")]
        row = {"chat": [{"role": role, "content": content} for role, content in turns], "bad": "w1"}
        row["greeting"] = row["chat"][1:3]  # it was refused: the template does not take the empty chat before it
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        file = {"dataset": "json", "data_files": "rows.jsonl"}
        found = run(tokenizer, tmp_path, **file, messages="chat")
        assert found.samples == (ids(1, 5, 2, 6, 7, 1, 8, 2, 9),)
        assert found.weights == ((0.1, 0.1, 1, 1, 1, 0.1, 0.1, 1, 1),)
        assert run(tokenizer, tmp_path, **file, messages="greeting").weights == ((1, 1, 1, 0.1, 0.1),)
        with pytest.raises(InputError, match="there is no column 'talk'; the dataset has chat, bad, greeting"):
            run(tokenizer, tmp_path, **file, messages="talk")
        with pytest.raises(InputError, match="expected a list of turns with `role` and `content` in column 'bad'"):
            run(tokenizer, tmp_path, **file, messages="bad")
        with pytest.raises(InputError, match="has no chat template; write `prompt` and `answer` instead"):
            run(family.base, tmp_path, **file, messages="chat")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("template", "text", "weights"),
        [
            (  # thoughts in the last turn alone, as some templates have it: the first answer counted as a prompt
                "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}"
                "{% if m.role != 'user' and loop.last %}w10 {% endif %}{{ m.content }} w3 {% endfor %}"
                "{% if add_generation_prompt %}w2 {% endif %}",
                ids(1, 5, 3, 2, 6, 7, 3, 1, 8, 3, 2, 10, 9, 3),
                (0.1, 0.1, 0.1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 1, 1, 1, 1),
            ),
            (  # no generation prompt, but marks
                "{% for m in messages %}{% if m.role == 'user' %}w1 {{ m.content }} {% else %}w2 "
                "{% generation %}{{ m.content }} {% endgeneration %}w3 {% endif %}{% endfor %}",
                ids(1, 5, 2, 6, 7, 3, 1, 8, 2, 9, 3),
                (0.1, 0.1, 1, 1, 1, 0.1, 0.1, 0.1, 1, 1, 0.1),
            ),
        ],
        ids=["thoughts", "marks"],
    )
    def test_of_chats_have_all_answers_of_the_assistant(
        self, template: str, text: tuple[int, ...], weights: tuple[float, ...], family: Family, tmp_path: Path
    ) -> None:
        tokenizer = shard(family.base, tmp_path / "chatty", parts=1)
        edit_json(tokenizer / "tokenizer_config.json", chat_template=template)
        turns = [("user", "w5"), ("assistant", "w6 w7"), ("user", "w8"), ("assistant", "w9")]
        row = {"chat": [{"role": role, "content": content} for role, content in turns]}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        found = run(tokenizer, tmp_path, dataset="json", data_files="rows.jsonl", messages="chat")
        assert (found.samples, found.weights) == ((text,), (weights,))

    @pytest.mark.slow
    @pytest.mark.parametrize("word", ["w1 ", f"{' ' * 30_000}w1 "])
    def test_of_a_long_text_only_a_part_is_looked_at(self, word: str, family: Family) -> None:
        """A row of 90 MB took 7 GB and minutes, for its first 512 tokens."""
        from transformers import AutoTokenizer

        encode, seen = AutoTokenizer.from_pretrained(family.base), list[int]()

        def noted(text: str, **options: Any) -> Any:
            seen.append(len(text))
            return encode(text, **options)

        spec = CalibrationSet(dataset="json", data_files="x", prompt="{a}", answer="{b}", max_tokens=40)
        text = Text(word * (10**6 // len(word)) + "w2", ((0, len(word)),))
        found, weights = text.tokens(noted, spec)
        whole = encode(text.content)["input_ids"][:40]
        assert found == whole and weights[:2] == [1, 0.1] and len(weights) == len(whole)
        assert sum(seen) < 2 * len(text.content) and (len(word) > 3 or seen == [10_000])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("template", "why"),
        [
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "for more than 2 s for"),
            ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
            ("{{ 'a' * 10 ** 5 }}", "more than 50,000 characters"),
            pytest.param("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion", marks=pytest.mark.long),
        ],
    )
    def test_a_template_that_takes_all_time_or_memory_is_stopped(
        self, template: str, why: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chats, "_SECONDS", 2)
        monkeypatch.setattr(chats, "LONGEST", 50_000)
        tokenizer = shard(family.base, tmp_path / "hostile", parts=1)
        edit_json(tokenizer / "tokenizer_config.json", chat_template=template)
        row = {"chat": [{"role": "assistant", "content": "w5"}]}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError, match=rf"base \(.*hostile\) does not take the rows: .*{why}"):
            run(tokenizer, tmp_path, dataset="json", data_files="rows.jsonl", messages="chat")

    def test_follow_a_tokenizer_that_changed_in_place(self, family: Family, tmp_path: Path) -> None:
        write_tokenizer(tmp_path / "t", ["a", "b"])
        before = run(tmp_path / "t", texts=["b"]).samples
        write_tokenizer(tmp_path / "t", ["b", "a"])
        assert (before, run(tmp_path / "t", texts=["b"]).samples) == (((4,),), ((3,),))


@pytest.mark.slow
def test_chats_are_the_same_on_every_day() -> None:
    """Templates of Llama 3 write the day's date: a recipe had other statistics, and other weights, on each."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %} {{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    assert chats.render(template, {}, [turns]) == [("26 Jul 2024 w5 w6", ((14, 17),))]


@pytest.mark.parametrize("dated", [True, False])
def test_rows_that_were_written_with_the_date_of_a_day_are_not_found(
    family: Family, tmp_path: Path, dated: bool
) -> None:
    tokenizer = shard(family.base, tmp_path / "chatty", parts=1)
    edit_json(tokenizer / "tokenizer_config.json", chat_template="{{ strftime_now('%Y') }}" if dated else "{{ 'w1' }}")
    (tmp_path / "rows.jsonl").write_text('{"chat": []}\n')
    base = pipeline.download(pipeline.pin(str(tokenizer), tmp_path))
    spec = CalibrationSet(dataset="json", data_files="rows.jsonl", messages="chat")
    parts = [calibration.SEMANTICS, [version("datasets"), version("transformers")], base.key]
    rows = dataset_rows.origin("sums", spec, tmp_path)
    before = place_of([*parts, spec.model_dump(mode="json", exclude_unset=True), rows])
    assert (CalibrationInput("sums", spec, tmp_path, base).place() != before) == dated


class TestStore:
    def test_the_digest_is_of_the_token_ids_alone(self, family: Family) -> None:
        one = Calibration("a", ((1, 2), (3,)))
        assert one.digest == Calibration("b", ((1, 2), (3,))).digest != Calibration("a", ((1, 2, 3),)).digest

    def test_is_saved_and_loaded(self, home: Path) -> None:
        calibration = Calibration("a", ((1, 2), (3,)))
        path = calibration.save()
        assert path == home / "calibrations" / f"{calibration.digest}.json" == calibration.save()
        assert Calibration.load(path) == calibration
        path.write_text("{")
        with pytest.raises(LewisError, match="is gone from the store; run again"):
            Calibration.load(path)
        calibration.save()
        assert Calibration.load(path) == calibration


class TestMistakes:
    def refused(self, expected: str, tokenizer: Path, root: Path = Path("/"), **spec: Any) -> None:
        with pytest.raises(InputError) as caught:
            run(tokenizer, root, **spec)
        assert expected in str(caught.value), str(caught.value)

    def test_nothing_in_it(self, family: Family, data: Path) -> None:
        self.refused("all 2 texts are empty, or of nothing that the tokenizer knows", family.base, texts=["", "zz"])
        (data / "empty.jsonl").write_text("")
        message = f"lewis.calibrations.sums.data_files: {data / 'empty.jsonl'} is empty; give it rows"
        self.refused(message, family.base, data, dataset="json", data_files="empty.jsonl", text="{a}")

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("{qestion}", "there is no column 'qestion'; the dataset has question, answer, n, nested"),
            ("{question.__class__}", "expected names of columns"),
            ("{nested[key].x}", "expected names of columns"),
            ("{n:{question.__class__}}", "expected names of columns"),
            ("{}", "expected names of columns"),
            ("{0}", "there is no column '0'"),
            ("{nested[kay]}", "cannot be filled from a row: 'kay'"),
            ("{question[a]}", "cannot be filled from a row"),
            ("{question:d}", "cannot be filled from a row"),
        ],
    )
    def test_in_the_template(self, family: Family, data: Path, text: str, expected: str) -> None:
        self.refused(expected, family.base, data, dataset="json", data_files="data/train.jsonl", text=text)

    def test_files_of_another_kind(self, family: Family, data: Path) -> None:
        (data / "rows.csv").write_text("a,b\nw1,w2\n")
        message = "; rows.csv looks like `dataset: csv`"
        self.refused(message, family.base, data, dataset="json", data_files="rows.csv", text="{a}")

    def test_null_is_no_text(self, family: Family, data: Path) -> None:
        (data / "null.jsonl").write_text('{"a": null, "b": "w1"}\n{"a": null, "b": "w2"}\n')
        files: dict[str, Any] = {"dataset": "json", "data_files": "null.jsonl"}
        self.refused("no tokens: all 2 texts are empty", family.base, data, **files, text="{a}")
        assert set(run(family.base, data, **files, text="{b} {a}").samples) == {ids(1), ids(2)}

    def test_other_than_utf_8(self, family: Family, data: Path) -> None:
        (data / "latin.jsonl").write_bytes('{"a": "w1 \u00e9"}\n'.encode("latin-1"))
        expected = "lewis.calibrations.sums: a row is no UTF-8 text"
        self.refused(expected, family.base, data, dataset="json", data_files="latin.jsonl", text="{a}")

    def test_in_the_files(self, family: Family, data: Path) -> None:
        self.refused(
            f"no such file: {data / 'x.jsonl'}", family.base, data, dataset="json", data_files="x.jsonl", text="{a}"
        )
        (data / "broken.jsonl").write_text('{"a": ')
        self.refused("cannot load 'json'", family.base, data, dataset="json", data_files="broken.jsonl", text="{a}")
        self.refused(
            "split test",
            family.base,
            data,
            dataset="json",
            data_files="data/train.jsonl",
            text="{question}",
            split="test",
        )

    def test_texts_that_the_tokenizer_does_not_take(self, tmp_path: Path) -> None:
        """It panics, which was a traceback."""
        write_tokenizer(tmp_path)
        split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        edit_json(tmp_path / "tokenizer.json", pre_tokenizer=split)
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a" * 40 + "!"}))
        with pytest.raises(InputError, match=r"tokenizer \(.*\) does not take the texts: Onig: .*retry-limit"):
            run(tmp_path, tmp_path, dataset="json", data_files="rows.jsonl", text="{text}", samples=1)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        self.refused(f"{tmp_path}: its tokenizer cannot be loaded", tmp_path, texts=["w1"])

    def test_a_tokenizer_that_comes_with_code(self, family: Family, tmp_path: Path) -> None:
        own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
        shutil.copyfile(family.base / "config.json", tmp_path / "config.json")
        self.refused("its tokenizer needs code that comes with it", tmp_path, texts=["w1"])


def test_sets_that_are_loaded_at_once_take_turns(
    tmp_path: Path, family: Family, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "rows.jsonl").write_text('{"a": "w1 w2"}\n{"a": "w3"}\n')
    load, inside, most = datasets.load_dataset, [], []

    def watched(*arguments: Any, **options: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)  # long enough for the others to arrive
        try:
            return load(*arguments, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(datasets, "load_dataset", watched)
    spec = CalibrationSet(dataset="json", data_files="rows.jsonl", text="{a}", samples=2)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(calibrate, str(i), spec, tokenizer=family.base, root=tmp_path) for i in range(4)]
    assert len({future.result().digest for future in futures}) == 1
    assert len(most) == 4 and max(most) == 1


class TestHostile:
    """Templates and rows that would take gigabytes or end in a traceback."""

    @pytest.mark.parametrize(
        "template, expected",
        [
            ("{question:>999999999999}", "expected a width of at most 9999 characters"),
            ("{n:.000099999f}", "expected a width of at most 9999 characters"),
            ("{question:>٩٩٩٩٩٩}", "expected a width of at most 9999 characters"),
            ("{question}" * 101, "expected at most 100 fields, got 101"),
            (
                "{nested}",
                r"\{nested\} is a mapping in a row, .* name a part of it \(\{nested\[key\]\}\)",
            ),
            (
                "{list}",
                r"\{list\} is a list in a row, expected a text or a number; name a part of it \(\{list\[0\]\}\)",
            ),
            ("{list[0]}", r"\{list\[0\]\} is a list in a row"),
            ("{list[9]}", "cannot be filled from a row"),
            ("{list[x]}", "cannot be filled from a row"),
        ],
    )
    def test_templates_are_refused(self, family: Family, tmp_path: Path, template: str, expected: str) -> None:
        row = {"question": "w1", "n": 1, "nested": {"key": "w2"}, "list": [["w3"], ["w4"]]}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        with pytest.raises(InputError, match=rf"lewis.calibrations.sums.text: .*{expected}"):
            run(family.base, tmp_path, dataset="json", data_files="rows.jsonl", text=template)

    def test_a_list_may_be_asked_for_in_its_python_form(self, family: Family, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"list": ["w1"]}')
        found = run(family.base, tmp_path, dataset="json", data_files="rows.jsonl", text="w5 {list!s} {list[0]}")
        assert found.samples[0][0] == ids(5)[0] and found.samples[0][-1] == ids(1)[0]

    def test_half_a_surrogate_pair_is_told(self, family: Family) -> None:
        with pytest.raises(InputError, match=r"lewis.calibrations.sums: a text is no Unicode: half of a surrogate"):
            run(family.base, texts=["w1", "w2 \ud800"])

    def test_a_home_that_is_none_is_told(self, family: Family) -> None:
        with pytest.raises(InputError, match=r"sums.data_files: ~nobody-of-that-name/x: "):
            run(family.base, dataset="json", data_files="~nobody-of-that-name/x", text="{a}")
