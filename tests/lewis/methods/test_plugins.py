"""Merge methods of other packages: found by their entry points, told by their package's name when they fail."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lewis import methods
from lewis.errors import InputError, LewisError
from lewis.merging.engine import in_torch
from lewis.methods import METHODS, find
from lewis.recipe.recipe import Recipe
from tests.support.models import bits, open_merge, write_tensors
from tests.support.plugins import Install, installing

HALF = '''
import torch
from lewis.methods import PerExpert, merge_method

@merge_method("half", paper="https://example.org", experts=(1, 1))
def half(task_vectors: torch.Tensor, *, share: PerExpert[float] = 0.5) -> torch.Tensor:
    """Go half way."""
    return task_vectors[0] * torch.tensor(share)
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    with installing(METHODS, tmp_path, monkeypatch, module="lewis_half", entry="half = lewis_half") as found:
        yield found


def recipe(method: str = "half", parameters: str = "{share: 0.25}") -> Recipe:
    text = f"{{merge_method: {method}, base_model: b, models: [{{model: a}}], parameters: {parameters}}}"
    return Recipe.parse(text, root=Path("/"))


def test_a_recipe_names_a_method_of_another_package(install: Install) -> None:
    install(HALF)
    assert "half" not in METHODS
    assert recipe().merge_method == "half"
    assert METHODS["half"].origin == "lewis-half 1.2"
    with pytest.raises(InputError, match=r"parameters.shre: half has no such parameter; did you mean 'share'\?"):
        recipe(parameters="{shre: 1}")


def test_the_one_of_the_readme(install: Install, tmp_path: Path) -> None:
    readme = (Path(methods.__file__).parent / "README.md").read_text()
    source = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "@merge_method" in block)
    install(source, entry="loudest = lewis_half")
    values = [[0.0, 0, 0], [1, -2, 3], [2, 1, -4]]
    folders = [write_tensors(tmp_path / str(i), {"w": torch.tensor(value)}) for i, value in enumerate(values)]
    merge = open_merge("loudest", folders[0], folders[1:], own=[{"weight": 1.0}, {"weight": 0.5}])
    assert merge.tensor("w").tolist() == [1, -2, 3]


def test_it_merges_and_its_version_is_part_of_the_digest(install: Install, tmp_path: Path) -> None:
    install(HALF)
    folders = [write_tensors(tmp_path / str(i), {"w": torch.tensor([i, -4.0 * i])}) for i in range(2)]
    merge = open_merge("half", folders[0], [folders[1]], parameters={"share": 0.5})
    assert bits(merge.tensor("w")) == bits(torch.tensor([0.5, -2.0]))
    METHODS["half"] = METHODS["half"].__class__(**{**vars(METHODS["half"]), "origin": "lewis-half 1.3"})
    assert open_merge("half", folders[0], [folders[1]], parameters={"share": 0.5}).digest != merge.digest


IN_PLACE = """
from lewis.methods import merge_method

@merge_method("mean", paper="https://example.org", on="weights")
def mean(models, *, normalize: bool = True):
    models /= len(models)
    return models.sum(0)

@merge_method("towards", paper="https://example.org")
def towards(task_vectors, base):
    base *= 0
    return task_vectors[0]
"""


def test_one_may_write_into_what_it_is_given(install: Install, tmp_path: Path) -> None:
    """Elements that all models share came out divided, and a base that was written into was the result's."""
    install(IN_PLACE, entry="mean = lewis_half\ntowards = lewis_half")
    folders = [write_tensors(tmp_path / str(i), {"w": torch.tensor([8.0, i, 4.0])}) for i in range(2)]
    assert open_merge("mean", None, folders).tensor("w").tolist() == [8, 0.5, 4]
    assert open_merge("towards", folders[0], folders[1:]).tensor("w").tolist() == [8, 1, 4]


def test_one_weight_for_all_experts(install: Install, tmp_path: Path) -> None:
    """It was a TypeError: the merge asks which experts take part."""
    source = HALF.replace("share: PerExpert[float]", "weight: float").replace("torch.tensor(share)", "weight")
    install(source)
    folders = [write_tensors(tmp_path / str(i), {"w": torch.tensor([i, -4.0 * i])}) for i in range(2)]
    merge = open_merge("half", folders[0], [folders[1]], parameters={"weight": 0.5})
    assert merge.tensor("w").tolist() == [0.5, -2.0]


LINEAR = """
from lewis.methods import merge_method
from lewis.methods.arithmetic.sums import combine_linearly, gram

def coefficients(dots, *, lambda_, normalize, share_):
    return [lambda_ * share_ / (2 if normalize else 1)] * len(dots)

@merge_method("half", paper="https://example.org", coefficients=coefficients)
def half(task_vectors, *, lambda_: float = 1.0, normalize: bool = False, share_: float = 1.0):
    found = coefficients(gram(task_vectors), lambda_=lambda_, normalize=normalize, share_=share_)
    return combine_linearly(task_vectors, found)
"""


def test_its_coefficients_are_all_that_the_compiled_loops_apply(install: Install, tmp_path: Path) -> None:
    """They got `lambda`, which is no name of an argument; and a `lambda` and `normalize` in them were applied twice."""
    install(LINEAR)
    folders = [write_tensors(tmp_path / str(i), {"w": torch.tensor([8.0, 16.0]) * i}) for i in range(3)]
    parameters = {"lambda": 0.5, "normalize": True, "share": 0.5}
    merge = open_merge("half", folders[0], folders[1:], parameters=parameters)
    merge.run(tmp_path / "out")
    assert merge.compiles("w") and load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [3, 6]
    assert merge.tensor("w").tolist() == [3, 6]


@pytest.mark.parametrize("found", ["[1.0]", "[1.0] * 3", "1.0"])
def test_coefficients_of_another_number_are_refused(install: Install, tmp_path: Path, found: str) -> None:
    """The compiled loops read memory that was not theirs, and the process ended with a segmentation fault."""
    install(
        "from lewis.methods import merge_method\n\n"
        f'@merge_method("half", paper="https://example.org", coefficients=lambda dots: {found})\n'
        "def half(task_vectors):\n    return task_vectors[0]\n"
    )
    folders = [write_tensors(tmp_path / str(i), {"w": torch.tensor([8.0, 16.0]) * i}) for i in range(3)]
    why = r"w: merge method half of lewis-half 1.2 failed: TypeError: its `coefficients` gave .*, expected a list of 2"
    with pytest.raises(LewisError, match=why):
        open_merge("half", folders[0], folders[1:]).run(tmp_path / "out")


LOOPS = """
from lewis.methods import PerExpert, merge_method
from lewis.methods.loops import Combine, Loops

@merge_method("half", paper="https://example.org", compiled=Loops(Combine.ELECT))
def half(task_vectors):
    return task_vectors.sum(0)
"""


def test_its_loops_can_do_without_weight_and_normalize(install: Install, tmp_path: Path) -> None:
    """It was a KeyError, though `Loops` reads them if the method has them."""
    average = LOOPS.replace("half", "mean").replace("ELECT)", "AVERAGE), on='weights'")
    install(LOOPS + average, entry="half = lewis_half\nmean = lewis_half")
    folders = [write_tensors(tmp_path / str(i), {"w": torch.tensor([8.0, 16.0]) * i}) for i in range(3)]
    for name, base, experts in (("half", folders[0], folders[1:]), ("mean", None, folders[1:])):
        merge = open_merge(name, base, experts)
        assert merge.digest
        merge.run(tmp_path / name)
        assert load_file(tmp_path / name / "model.safetensors")["w"].tolist() == [24, 48]


def test_a_second_method_of_its_module_has_its_version_too(install: Install) -> None:
    install(HALF + HALF.replace("half", "quarter"))
    assert recipe("quarter").merge_method == "quarter"
    assert METHODS["quarter"].origin == METHODS["half"].origin == "lewis-half 1.2" and not METHODS["ties"].origin


def test_one_without_a_version_is_refused(install: Install, tmp_path: Path) -> None:
    install(HALF)
    (tmp_path / "lewis_half-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lewis-half\n")
    with pytest.raises(InputError, match=r"lewis-half None: .* is of a package without a version, which digests need"):
        recipe()


def test_a_process_that_parses_no_recipe_finds_it_too(install: Install) -> None:
    install(HALF)
    assert find("half").origin == "lewis-half 1.2"
    with pytest.raises(InputError, match="there is no merge method 'hal'; install the package that brings it"):
        find("hal")


@pytest.mark.parametrize(
    "source, arguments, expected",
    [
        (
            "import nothing_of_that_name",
            {},
            r"lewis-half 1.2: its entry point half = 'lewis_half' of the group lewis.methods cannot be loaded: "
            r"ModuleNotFoundError: No module named 'nothing_of_that_name'; repair or uninstall the package",
        ),
        ("1 / 0", {}, "lewis-half 1.2: .* cannot be loaded: ZeroDivisionError"),
        ("", {}, "lewis-half 1.2: .* registers no merge method of that name; name the entry point as the merge method"),
        (HALF, {"entry": "halve = lewis_half"}, "registers no merge method of that name"),
        (HALF.replace('"half"', '"ties"'), {}, "lewis-half 1.2: .*the merge method 'ties' exists already"),
        ("", {"entry": "ties = lewis_half"}, "takes a name that there is already, in lewis.methods.ties; rename"),
        (HALF.replace("float]", "str]").replace("0.5", "'a'"), {}, "share: a parameter is a float, int or bool"),
        (HALF.replace("share: PerExpert[float] =", "share="), {}, "TypeError: share: a parameter is a float, int or"),
        *(
            (HALF.replace("(1, 1)", given), {}, f"half: expected `experts` as .*, got {re.escape(given)}")
            for given in ("1", "(3, 2)", "(0, None)")
        ),
        (HALF.replace("= 0.5", "= None"), {}, "share: its default: expected a finite number, got None"),
        (
            HALF.replace(" *, share", " share"),
            {},
            r"half: expected the stacked .* `\*` .*; got task_vectors, share bef",
        ),
        (HALF.replace("experts=", "on='weight', experts="), {}, "half: expected `on` .*, got 'weight' and None"),
        (
            HALF.replace("experts=", "fits='static', experts="),
            {},
            "half: `fits` reads .* lacks weight, ridge, alpha, p",
        ),
        (
            HALF.replace("experts=(1", "on='weights', fits='static', experts=(1"),
            {},
            "its `fits` is for on='task_vectors",
        ),
        (LOOPS.replace("ELECT)", "SUM), on='weights'"), {}, "half: its `compiled` is for on='task_vectors', got 'weig"),
        (LOOPS.replace("ELECT", "AVERAGE"), {}, "half: its `compiled` is for on='weights', got 'task_vectors'"),
        (LOOPS.replace("ELECT", "CLAIM"), {}, "half: Combine.CLAIM compares with a threshold; name its parameter"),
        (LOOPS.replace("vectors)", "vectors, *, weight: float = 1.0)"), {}, "half: weight: expected PerExpert"),
        (
            LOOPS.replace("vectors)", "vectors, *, lambda_: PerExpert[float] = 1.0)"),
            {},
            "lambda: expected one value for",
        ),
        (
            LINEAR.replace("(task_vectors, *", "(task_vectors, base, *"),
            {},
            "`coefficients` of the base and the .* are for",
        ),
    ],
)
def test_one_that_fails_is_told_by_its_package(
    install: Install, source: str, arguments: dict[str, str], expected: str
) -> None:
    install(source, **arguments)
    for _ in range(2):  # not only the first time
        with pytest.raises(InputError, match=expected):
            recipe("ties", "{}")


def test_two_packages_cannot_bring_the_same_name(install: Install) -> None:
    install(HALF)
    install(HALF, module="other_half", entry="half = other_half")
    with pytest.raises(InputError, match=r"other-half 1.2: .*the merge method 'half' exists already, in lewis_half"):
        recipe()


@pytest.mark.parametrize(
    "where, error",
    [
        *(("function", each) for each in ("ValueError('a')", "KeyError('a')", "RuntimeError", "MemoryError")),
        *((each, "SystemExit(0)") for each in ("function", "check", "coefficients", "by_rows", "finish")),
    ],
)
def test_whatever_it_raises_is_told_by_its_name(install: Install, tmp_path: Path, where: str, error: str) -> None:
    body = f"    raise {error}\n" if where == "function" else "    return task_vectors[0]\n"
    argument = {
        "check": ", check=fail",
        "coefficients": ", coefficients=fail",
        "by_rows": ", by_rows=fail",
        "finish": ", by_rows=lambda pieces, **values: fail",
    }.get(where, "")
    install(
        "import torch\nfrom lewis.methods import merge_method\n\n"
        f"def fail(*args, **kwargs):\n    raise {error}\n\n"
        f'@merge_method("half", paper="https://example.org", experts=(1, 1){argument})\n'
        f"def half(task_vectors, *, share: float = 0.5):\n{body}"
    )
    many = 2 * in_torch.PIECE  # elements, so that it is merged by rows
    folders = [write_tensors(tmp_path / str(i), {"w": torch.full((2, many // 2), float(i))}) for i in range(2)]
    told = rf"merge method half of lewis-half 1\.2 failed: {error.partition('(')[0]}.*; repair or uninstall the package"
    with pytest.raises(LewisError, match=told) as caught:
        open_merge("half", folders[0], [folders[1]], parameters={"share": 0.5}).run(tmp_path / "out")
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("5", "gave int, expected a tensor"),
        ("task_vectors", r"gave the shape \[1, 2\], expected \[2\]"),
        ("task_vectors[0] * 1j", "gave a tensor of torch.complex64"),
        ("task_vectors[0].to_sparse()", "gave a tensor of torch.float32, torch.sparse_coo"),
        ("task_vectors[0].to('meta')", "gave a tensor of torch.float32, torch.strided, on meta; expected a dense one"),
    ],
)
def test_what_is_no_tensor_of_the_right_kind_is_told(
    install: Install, tmp_path: Path, value: str, expected: str
) -> None:
    install(HALF.replace("task_vectors[0] * torch.tensor(share)", value))
    folders = [write_tensors(tmp_path / str(i), {"w": torch.tensor([i, -4.0 * i])}) for i in range(2)]
    with pytest.raises(LewisError, match=f"w: half {expected}"):
        open_merge("half", folders[0], [folders[1]], parameters={"share": 0.5}).tensor("w")


def test_one_that_exits_when_it_is_imported_is_told(install: Install) -> None:
    install("raise SystemExit(0)")
    with pytest.raises(InputError, match=r"lewis-half 1.2: .* cannot be loaded: SystemExit"):
        recipe()
