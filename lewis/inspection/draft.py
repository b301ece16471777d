"""Draft a recipe with comments for a base and experts: the work of `lewis new`.

Calibration rows and tasks are public ones of a field that the expert's name or model card mentions (`TOPICS`).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.inspection import step
from lewis.inspection.kinds import Finding
from lewis.models.chat_template import template_in
from lewis.models.compatible import preflight
from lewis.models.config import read_config
from lewis.models.hub import repository
from lewis.models.hub.pin import find_folder
from lewis.models.source import Source, pin, short_name
from lewis.recipe.block import parts_of
from lewis.recipe.recipe import Recipe
from lewis.reports.card import front_matter

SAMPLES = 64  # rows of each calibration set: enough for long rows; a quarter of them is held back


@dataclass(frozen=True)
class Topic:
    """A field that experts are trained in, with a public dataset and a task for it.

    Attributes:
        name: name of the calibration set.
        words: regular expression that matches names, datasets or tags of such experts.
        dataset, config: a dataset of the Hub with a split `train`, and its configuration; None: its only one.
        prompt, answer: templates that turn a row into text, without the end token; prompt empty: rows are only answers.
        task: name of a task of lm-eval; empty if there is none that runs without a permission.
        score: the task's score, `metric,filter`.
        note: a note for the user, which becomes a comment; empty if there is none.
        files: the files of `dataset: json` or `parquet`; empty for a dataset of the Hub.
        messages: the column of a chat, in place of prompt and answer; empty if there is none.
        samples: how many rows to take.
    """

    name: str
    words: str
    dataset: str
    config: str | None
    prompt: str
    answer: str
    task: str = ""
    score: str = ""
    note: str = ""
    files: str = ""
    messages: str = ""
    samples: int = SAMPLES


GENERAL = Topic(
    "general",
    r"$.",
    "EleutherAI/wikitext_document_level",
    "wikitext-2-raw-v1",
    "",
    "{page}",
    "sciq",
    "acc,none",
    "nothing says what this expert is good at: put in rows of its training data",
)
"""The topic of an expert whose name and model card match no other topic."""

TOPICS = (
    Topic(
        "gsm8k",
        r"math|gsm|arithmetic|algebra|numina|orca.?math",
        "openai/gsm8k",
        "main",
        "Question: {question}\nAnswer:",
        " {answer}",
        "gsm8k",
        "exact_match,flexible-extract",
    ),
    Topic(
        "mbpp",
        r"(?<!en)(?<!de)code(?!c)|python|mbpp|humaneval|program",
        "google-research-datasets/mbpp",
        "full",
        "{text}\n{test_list[0]}\n",
        "{code}",
        note="lm-eval would run programs on the bare machine: score by deployments/recipes/tasks/mbpp_generate.yaml",
    ),
    Topic(
        "sciq",
        r"scien|sciq|physic|chemi|biolog|medic|medqa|knowledge",
        "allenai/sciq",
        None,
        "{support}\nQuestion: {question}\nAnswer:",
        " {correct_answer}",
        "sciq",
        "acc,none",
    ),
)


def topic_of(*texts: str) -> Topic:
    """Return the topic that the first of some texts about a model names; `GENERAL` if none names one.

    Args:
        texts: the most reliable first, such as the model's name, then its datasets and tags.
    """
    for text in texts:
        found = [topic for topic in TOPICS if re.search(topic.words, text.lower())]
        if found:
            return found[0]
    return GENERAL


@dataclass(frozen=True)
class Draft:
    """A drafted recipe, which is not written to its file yet.

    Attributes:
        text: the recipe, YAML with comments.
        topics: expert -> name of the topic by which its calibration set and task were chosen.
        tasks: names of the lm-eval tasks.
        findings: what in configs and headers speaks against merging the models.
    """

    text: str
    topics: dict[str, str]
    tasks: tuple[str, ...]
    findings: tuple[Finding, ...]


def draft(
    base: str, experts: Sequence[str], file: Path, choose: Callable[[str, Topic], Topic] = lambda _, found: found
) -> Draft:
    """Look at the models' configs, headers and cards, and compose a recipe for them.

    Args:
        base: reference of the base.
        experts: references of the experts.
        file: path that the recipe will have; folders below its folder are written as relative paths.
        choose: called with each expert and the topic that its name or card suggests; returns the topic to take.

    Raises:
        InputError: if a model does not exist, does not fit the base, or is given twice.
        TransientError: if the Hub cannot be asked right now.
    """
    root = file.parent
    refs = [_placed(each, root) for each in (base, *experts)]
    if twice := next((ref for ref in refs[1:] if refs.count(ref) > 1 and ref != refs[0]), None):
        raise InputError(f"{twice}: given twice; name each expert once, and count one more by its weight in the recipe")
    first = pin(refs[0], root)
    others = [pin(ref, root, first) for ref in refs[1:]]
    topics = dict[str, Topic]()
    for source in others:
        topic = choose(source.ref, topic_of(*_descriptions(source, root)))
        while any(each.name == topic.name and each != topic for each in topics.values()):
            topic = replace(topic, name=f"{topic.name}_2")
        topics[source.ref] = topic
    tasks = tuple(dict.fromkeys(topic.task for topic in topics.values() if topic.task)) or (GENERAL.task,)
    text = _compose(first, topics, tasks, file)
    recipe = Recipe.parse(text, root=root, name=file.stem)
    preflight(recipe, first, others)
    found = tuple(step.before_download(first, others))
    warned = "".join(f"# {line}\n" for each in found for line in each.to_text().splitlines())
    return Draft(warned + text, {ref: topic.name for ref, topic in topics.items()}, tasks, found)


def _placed(ref: str, root: Path) -> str:
    """Return a model's reference as a recipe in `root` writes it: folders below `root` by their relative paths.

    A path starts in the working directory, as all of a command line do. If it is a link, the recipe has the link, which
    may lead elsewhere later, or, in the cache of the Hub, to a name without `.gguf`.
    """
    parts = parts_of(ref, root)
    if len(parts) > 1:
        return "+".join(part and _placed(part, root) for part in parts)
    if find_folder(ref, Path.cwd()) is None:
        return ref
    given = Path(ref).expanduser().absolute()
    place = given.parent.resolve() / given.name
    return f"./{place.relative_to(root)}" if place.is_relative_to(root) else str(place)


def _descriptions(source: Source, root: Path) -> list[str]:
    """Return the texts that may name an expert's topic: its name, then datasets and tags of its card, if it has one."""
    pinned = source.adapter or source.model
    try:
        stated = front_matter(repository.fetch(pinned, weights=False))
    except (OSError, InputError):
        stated = {}
    return [short_name(source.ref, root), *(json.dumps(stated.get(key), default=str) for key in ("datasets", "tags"))]


def _end(folder: Path) -> str:
    """Return the end token of a tokenizer; empty if it has none, or its file cannot be read."""
    try:
        token = read_json(folder / "tokenizer_config.json").get("eos_token")
    except (OSError, InputError, AttributeError):
        return ""
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def _compose(base: Source, topics: dict[str, Topic], tasks: tuple[str, ...], file: Path) -> str:
    folder = repository.fetch(base.model, weights=False)
    config, name = read_config(folder), shlex.quote(file.name)
    dtype = config.get("dtype") or config.get("torch_dtype")
    dtype = dtype if dtype in ("float32", "float16", "bfloat16") else "bfloat16"
    sets = {topic.name: topic for topic in topics.values()}
    end = _end(folder).replace("{", "{{").replace("}", "}}")
    lines = [
        f"# lewis plan {name}      what a run would do: downloads, disk, memory, time",
        f"# lewis inspect {name}   whether the models belong together",
        f"# lewis run {name}       the whole run",
        "merge_method: recommended       # fits each projection to what the experts do on their rows; or ties ...",
        f"base_model: {_quoted(base.ref)}",
        "models:",
    ]
    for ref, topic in topics.items():
        lines += [
            f"  - model: {_quoted(ref)}",
            "    parameters: {weight: 1.0}   # how much this expert counts",
            f"    calibration: {_quoted(topic.name)}",
        ]
    lines += [
        f"dtype: {dtype}                  # of the result; the arithmetic is float32",
        "",
        "lewis:",
        "  calibrations:",
        "    # Better than these public rows: rows of each expert's own training, in its own format.",
    ]
    for topic in sets.values():
        source: dict[str, str | int] = {"dataset": topic.dataset, **({"config": topic.config} if topic.config else {})}
        source |= {"data_files": topic.files} if topic.files else {}
        answer = {("answer" if topic.prompt else "text"): topic.answer + end}
        answer = {"messages": topic.messages} if topic.messages else answer
        source |= {**({"prompt": topic.prompt} if topic.prompt else {}), **answer, "samples": topic.samples}
        lines += [f"    # {topic.note}"] if topic.note else []
        lines += [f"    {_quoted(topic.name)}: {json.dumps(source, ensure_ascii=False)}"]
    scores = {each.task: each.score for each in (*topics.values(), GENERAL)}
    metric = "weighted/mean,none" if len(tasks) > 1 else f"{tasks[0]}/{scores[tasks[0]]}"
    lines += ["", "evaluate:", f"  tasks: [{', '.join(tasks)}]   # of lm-eval, or YAML files next to this one"]
    if len(tasks) > 1:
        weights = ", ".join(f"{_quoted(f'{task}/{scores[task]}')}: 1" for task in tasks)
        lines += [f"  weights: {{{weights}}}   # makes the score weighted/mean,none"]
    lines += ["  # limit: 200                  # documents of each task; then the gate must say allow_limit: true"]
    if template_in(folder):
        lines += ["  # apply_chat_template: true   # the base has one; if the experts were trained as a chat"]
    lines += [
        "  baselines: [base, experts]",
        "",
        "register:",
        f"  name: {_quoted(file.stem)}                # of the model in MLflow",
        "  # promoted unless something got worse; policy: better asks for a significant gain over the champion",
        f"  gate: {{policy: not_worse, metric: {_quoted(metric)}}}",
        "",
        "# publish: {repo: your-org/your-merge}   # push each new champion to the Hub",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text in YAML, in quotes if it needs them."""
    plain = re.fullmatch(r"[\w./@+-]+", text) and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)
