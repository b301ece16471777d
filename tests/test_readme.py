"""What the READMEs promise: links that lead somewhere, commands that there are, a recipe and a program that run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lewis_flows.cli.main import COMMANDS, main
from tests.conftest import Family

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("README.md", ".github/*.md", "lewis/**/*.md", "deployments/*.md", "tests/benchmarks/*.md")
    for page in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page.parent / file).resolve() if file else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_is_one(page: Path) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"^ {4}lewis (\w+)", text, re.MULTILINE) + re.findall(r"`lewis (\w+)", text)
    assert set(named) - {"COMMAND"} <= {command.name for command in COMMANDS}


def test_the_runbook_names_recipes_as_they_are_in_their_folder() -> None:
    """`lewis run tiny.yaml` is a file of the working directory, where an operator has none."""
    assert not re.findall(r"lewis [^`\n]*\.ya?ml\b", (ROOT / "deployments" / "RUNBOOK.md").read_text())


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_and_module_is_there(page: Path) -> None:
    text = (ROOT / page).read_text()
    folders = "tests|lewis|flows|deployments|tasks/lewis_tasks"
    files = re.findall(rf"(?<![\w./])(?:{folders})/[\w/.-]+\.(?:py|yaml|md)\b", text)
    modules = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (tests[\w.]+)", text)]
    assert [name for name in [*files, *modules] if not (ROOT / name).exists()] == []


def test_every_test_that_the_threats_name_is_there() -> None:
    text = (ROOT / "deployments" / "THREATS.md").read_text()
    named, lost = re.findall(r"`((?:tests/|test_|Test)[^`]*)`", text), []
    for each in named:
        file, *parts = each.split("::")
        code = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
        if not code or any(f"def {part}(" not in code and f"class {part}:" not in code for part in parts):
            lost.append(each)
    assert named and not lost


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_prose_is_wider_than_110(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [
        line for line in text.splitlines() if not line.startswith("    ") and not line.strip().startswith(("|", "!"))
    ]
    assert [
        line for line in lines if len(line) > 110 + max(map(len, line.split()), default=0)
    ] == []  # no link is parted


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1500 and max(map(len, README.splitlines())) <= 110


def test_its_recipe_is_the_example() -> None:
    [recipe] = blocks("yaml")
    example = ROOT / "deployments" / "examples" / "qwen2.5.yaml"
    assert yaml.safe_load(recipe) == yaml.safe_load(example.read_text())


@pytest.mark.usefixtures("home")
def test_its_recipe_is_planned_on_models_of_these_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders whose configs and headers are those of Qwen2.5-0.5B, and whose weights are holes in a file."""
    for name in ("base", "instruct", "coder"):
        write_qwen2_5(tmp_path / name)
    [text] = blocks("yaml")
    recipe = yaml.safe_load(text)
    refs = [recipe["base_model"], *(each["model"] for each in recipe["models"])]
    for ref, name in zip(refs, ("base", "instruct", "coder"), strict=True):
        text = re.sub(rf"{re.escape(ref)}(?= |\n)", str(tmp_path / name), text, count=1)
    (tmp_path / "recipe.yaml").write_text(text)
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"question": "w1 w2", "answer": "w3", "text": "w4", "code": "w5 w6"}) + "\n") * 64)
    sets = [
        f"lewis.calibrations.{name}.{key}"
        for name in ("maths", "code")
        for key in (f"data_files={rows}", "dataset=json")
    ]
    sets += ["lewis.calibrations.maths.config=null", "evaluate=null", "register=null"]
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--json", *(f"--set={each}" for each in sets)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 494_032_768 and len(found["inputs"]) == 3 and not found["findings"]
    assert found["covered_layers"] == 24 * 7 and found["memory"] < 4e9


def write_qwen2_5(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    wide, kv = 896, 128
    shapes = {"model.embed_tokens.weight": [151936, wide], "model.norm.weight": [wide]}
    for i in range(24):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}.weight": [wide] for name in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q_proj", wide), ("k_proj", kv), ("v_proj", kv)):
            shapes |= {f"{layer}self_attn.{name}.weight": [rows, wide], f"{layer}self_attn.{name}.bias": [rows]}
        shapes |= {f"{layer}mlp.{name}.weight": [4864, wide] for name in ("gate_proj", "up_proj")}
        shapes |= {f"{layer}self_attn.o_proj.weight": [wide, wide], f"{layer}mlp.down_proj.weight": [wide, 4864]}
    header, end = dict[str, Any](__metadata__={"of": folder.name}), 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("method", ["regmean_forward", pytest.param("ties", marks=pytest.mark.long)])
def test_its_program_merges(method: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "merge_method": method,
        "base_model": str(family.base),
        "models": [{"model": str(expert)} for expert in family.experts],
        "lewis": {"calibrations": {"sums": {"texts": ["w1 w2 w3", "w4 w5"], "samples": 2}}},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    [program] = [block for block in blocks("python") if "import lewis" in block]
    exec(compile(program, "README.md", "exec"), {})
    assert (tmp_path / "merged" / "model.safetensors").is_file()
