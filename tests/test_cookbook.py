"""The cookbook: each of its recipes is planned on small models of the same shapes."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lewis_flows.cli.main import main
from tests.support.gguf_files import write_gguf
from tests.support.models import write_expert, write_llama, write_lora, write_tokenizer
from tests.support.tiny_architectures import tiny

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "deployments" / "examples"
PAGE = (ROOT / "deployments" / "COOKBOOK.md").read_text()
WHOLE = "every-block"
NAMES = re.findall(r"^\| .*?\(examples/([\w-]+)\.yaml\)", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """A plan leaves torch's default dtype as it was."""
    yield
    found = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert found == torch.float32


def test_the_page_has_all_recipes() -> None:
    assert len(NAMES) == 10
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*NAMES, WHOLE, "qwen2.5", "smollm2"}


def test_what_the_page_shows_of_a_recipe_is_in_it() -> None:
    """`output: {kind: lora}`, as it was there, is refused: it needs a rank or a tolerance."""

    def holds(data: Any, wanted: dict[str, Any]) -> bool:
        if isinstance(data, dict) and all(
            holds(data.get(key), value) if isinstance(value, dict) else data.get(key) == value
            for key, value in wanted.items()
        ):
            return True
        inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
        return any(holds(each, wanted) for each in inner)

    assert "{kind: lora, rank: 32}" in PAGE
    for name, row in re.findall(r"^\| .*?\(examples/([\w-]+)\.yaml\)(.*)", PAGE, re.MULTILINE):
        recipe = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
        assert [each for each in re.findall(r"`(\w+: [^`]+)`", row) if not holds(recipe, yaml.safe_load(each))] == []


def test_the_reference_begins_with_a_whole_recipe() -> None:
    reference = (ROOT / "lewis" / "recipe" / "README.md").read_text()
    assert reference.partition("```yaml\n")[2].partition("```")[0] == (EXAMPLES / f"{WHOLE}.yaml").read_text()


def llamas(folder: Path, refs: list[str], hidden: int = 16) -> dict[str, str]:
    base = write_llama(folder / "base", hidden=hidden)
    return {ref: str(write_expert(base, folder / f"m{i}", seed=i) if i else base) for i, ref in enumerate(refs)}


def chats(folder: Path, refs: list[str]) -> dict[str, str]:
    """Models with a head of their own, and a chat template."""
    base = write_llama(folder / "base", tied=False)
    add_template(base)
    return {ref: str(write_expert(base, folder / f"m{i}", seed=i) if i else base) for i, ref in enumerate(refs)}


def adapters(folder: Path, refs: list[str]) -> dict[str, str]:
    base = write_llama(folder / "base")
    add_template(base)
    return {ref: str(write_lora(base, folder / f"m{i}", seed=i) if i else base) for i, ref in enumerate(refs)}


def add_template(base: Path) -> None:
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    config = base / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | template))


def mixtures(folder: Path, refs: list[str]) -> dict[str, str]:
    return {ref: saved(tiny("qwen2_moe"), folder / f"m{i}", i) for i, ref in enumerate(refs)}


def towers(folder: Path, refs: list[str]) -> dict[str, str]:
    """A vision-language model, and its language model as a model of its own, whose head is the embedding or not."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    whole = tiny("qwen2_vl")
    text = whole.config.text_config.to_dict() | {"tie_word_embeddings": whole.config.tie_word_embeddings}
    known = {
        key: text[key] for key in Qwen2Config().to_dict() if key in text and key not in ("architectures", "model_type")
    }
    own = Qwen2ForCausalLM(Qwen2Config(**known))
    return {refs[0]: saved(whole, folder / "whole", 0), refs[1]: saved(own, folder / "text", 1)}


def ggufs(folder: Path, refs: list[str]) -> dict[str, str]:
    models = llamas(folder, refs, hidden=32)  # a block of Q8_0 has 32 values
    return {ref: str(write_gguf(Path(models[ref]), folder / f"{i}.gguf")) for i, ref in enumerate(refs)}


def saved(model: Any, folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


MODELS: dict[str, Callable[[Path, list[str]], dict[str, str]]] = {
    "loras-into-one": adapters,
    WHOLE: chats,
    "mixture-of-experts": mixtures,
    "vision-and-text": towers,
    "gguf": ggufs,
}
ROW = {"question": "w1 w2", "answer": "w3", "text": "w4", "code": "w5 w6"}
ROW |= {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]}


@pytest.mark.slow
@pytest.mark.usefixtures("home", "lm_eval_tasks")
@pytest.mark.parametrize("name", [*NAMES, WHOLE])
def test_it_is_planned(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    refs = list(dict.fromkeys([recipe["base_model"], *(each["model"] for each in recipe["models"])]))
    places = MODELS.get(name, llamas)(tmp_path, refs)
    recipe["base_model"] = places[recipe["base_model"]]
    for each in recipe["models"]:
        each["model"] = places[each["model"]]
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 64)
    for rows in recipe.get("lewis", {}).get("calibrations", {}).values():
        rows |= {"dataset": "json", "data_files": "rows.jsonl", "config": None}
    recipe.pop("publish", None)
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(tmp_path / f"{name}.yaml"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    steps = {each["name"].split()[0] for each in planned["steps"]}
    assert {"download", "merge"} <= steps and planned["memory"] > 0 and len(planned["inputs"]) == len(refs)
    assert ("evaluate" in steps, "register" in steps) == ("evaluate" in recipe, "register" in recipe)
    assert not [each for each in planned["findings"] if each["level"] == "error"]
