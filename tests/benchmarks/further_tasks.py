"""Five more tasks for families of experts, from data that PyPI packages carry, and LoRA experts of them.

    pip install num2words babel faker pycountry
    python -m tests.benchmarks.further_tasks rows DIR
    python -m tests.benchmarks.further_tasks train TASK --rows DIR --base DIR --output DIR

`rows` writes `TASK-train.jsonl` and `TASK-test.jsonl`, 3,000 and 400 different rows of `prompt` and `answer`, next to
those of `remedies rows`: numbers in English words, dates in five languages, numbers in German words, ISO codes of
languages, countries and subdivisions, and sentences of people as JSON. `train` trains an expert like those of the
shared folder: LoRA of rank 16, alpha 32, all linear layers, 140 steps of 4 rows, lr 4e-4, fp32.
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.quality import lines

Pair = tuple[str, str]
TRAIN, TEST, BATCH, TOKENS, STEPS, RATE = 3000, 400, 4, 192, 140, 4e-4
LANGUAGES = {"German": "de", "French": "fr", "Dutch": "nl", "Spanish": "es", "Italian": "it"}


def words(draw: random.Random) -> Callable[[], Pair]:
    from num2words import num2words

    def row() -> Pair:
        number = int(10 ** draw.uniform(0, 6))
        return f"Number: {number}\nWords:", f" {num2words(number)}"

    return row


def dates(draw: random.Random) -> Callable[[], Pair]:
    from datetime import date, timedelta

    from babel.dates import format_date

    def row() -> Pair:
        day, language = date(1900, 1, 1) + timedelta(draw.randrange(55_000)), draw.choice(list(LANGUAGES))
        written = format_date(day, format="full", locale=LANGUAGES[language])
        return f"Date: {day.isoformat()}\nIn {language}:", f" {written}"

    return row


def german(draw: random.Random) -> Callable[[], Pair]:
    from num2words import num2words

    def row() -> Pair:
        number, kind = int(10 ** draw.uniform(0, 6)), draw.choice(["cardinal", "ordinal"])
        return f"Zahl: {number}, {kind}\nIn Worten:", f" {num2words(number, lang='de', to=kind)}"

    return row


def codes(draw: random.Random) -> Callable[[], Pair]:
    import pycountry

    known = [(f"Country: {each.name}\nISO code:", f" {each.alpha_2}, {each.alpha_3}") for each in pycountry.countries]
    known += [(f"Language: {each.name}\nISO code:", f" {each.alpha_3}") for each in pycountry.languages]
    known += [
        (f"Subdivision: {each.name}, {each.country.name}\nISO code:", f" {each.code}")
        for each in pycountry.subdivisions
    ]
    return lambda: draw.choice(known)


def extract(draw: random.Random) -> Callable[[], Pair]:
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(draw.randrange(2**32))

    def row() -> Pair:
        person = {"name": fake.name(), "job": fake.job(), "company": fake.company(), "city": fake.city()}
        text = "{name} works as {job} at {company} in {city}." if draw.random() < 0.5 else (
            "At {company} in {city}, {name} is employed as {job}."
        )  # fmt: skip
        return f"Text: {text.format(**person)}\nJSON:", f" {json.dumps(person)}"

    return row


TASKS = {
    **{"words": (words, 5), "dates": (dates, 7), "german": (german, 9)},
    **{"codes": (codes, 11), "extract": (extract, 13)},
}
"""Task -> what draws its rows, and the seed of them and of its expert."""


def write_rows(folder: Path) -> None:
    """Write the rows of all tasks; those of a test are in no training."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, (of_task, seed) in TASKS.items():
        draw, found = of_task(random.Random(seed)), dict[str, str]()
        while len(found) < TRAIN + TEST:
            prompt, answer = draw()
            found.setdefault(prompt, answer)
        rows = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in found.items()]
        for part, of_part in (("train", rows[:TRAIN]), ("test", rows[TRAIN:])):
            (folder / f"{task}-{part}.jsonl").write_text("\n".join(of_part))


def train(task: str, rows: Path, base: Path, output: Path) -> None:
    """Train a LoRA expert on the answers of a task's rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(TASKS[task][1])
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=linear, task_type="CAUSAL_LM"))
    data = lines(rows / f"{task}-train.jsonl")
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], weight_decay=0.0, betas=(0.9, 0.95)
    )
    for step in range(STEPS):
        ids, labels = [], []
        for row in (data[(step * BATCH + i) % len(data)] for i in range(BATCH)):
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
            ids.append(torch.tensor([*prompt, *answer][:TOKENS]))
            labels.append(torch.tensor([*[-100] * len(prompt), *answer][:TOKENS]))
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.eos_token_id)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        loss = model(input_ids=batch, labels=wanted, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"{task}: step {step + 1} of {STEPS}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows, one = commands.add_parser("rows"), commands.add_parser("train")
    rows.add_argument("folder", type=Path)
    one.add_argument("task", choices=TASKS)
    for name in ("rows", "base", "output"):
        one.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "rows":
        write_rows(options.folder)
    else:
        train(options.task, options.rows, options.base, options.output)


if __name__ == "__main__":
    main()
