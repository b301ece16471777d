"""The schema of a recipe's blocks, except `slices`, `anchor`, `tokenizer` and `serve`, which have their own modules."""

import string
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from lewis.allocators import ALLOCATORS, DEFAULT, Allocator, target_of
from lewis.errors import nearest
from lewis.recipe import model_args
from lewis.recipe.block import Block, ModelName, Parameters

Dtype = Literal["float32", "float16", "bfloat16"]
Backend = Literal["hf", "vllm", "sglang", "openai"]

NAME = r"^[^/:\x00-\x1f\x7f]*[^/:.\s\x00-\x1f\x7f][^/:\x00-\x1f\x7f]*$"  # of a registered model
NOT_BLANK = r"\S"
REPO = r"^\w+((-\.?|\.-?)\w+)*/\w+((-\.?|\.-?)\w+)*$"  # the Hub has no `..`, no `--`, and none of them at an end
RECOMMENDED = "regmean_forward"  # what `merge_method: recommended` stands for: see tests/benchmarks/methods.md
PRESETS: dict[str, dict[str, dict[str, Any]]] = {  # name -> settings that `lewis.preset` puts in place of defaults
    "lewis_official": {  # what the authors' code does (arXiv 2503.03874)
        "calibration": {"samples": 15, "max_tokens": 512, "seed": 42, "padding": "max_tokens"},
        "importance": {"metric": "norm_difference", "prune_ratio": 0.5, "reduce": "sum"},
        "density": {
            **{"strategy": "lewis", "min": 0.3, "max": 0.8, "budget": None},
            **{"scale": "minmax", "decimals": 5, "uncovered": "expert"},
        },
    }
}
FREE = ("samples", "max_tokens", "seed", "min", "max", "prune_ratio")  # settings of a preset that a recipe may change
GUIDES = ("preset", "importance", "prune_by", "aim", "density")  # keys of the `lewis` block that decide densities


class ModelEntry(Block):
    """One model of the merge."""

    model: ModelName
    parameters: Parameters = Field(default_factory=dict)
    calibration: str | None = None


class TokenWeights(Block):
    """How much the tokens of a calibration set count, relative to those of answers, which count 1.

    Attributes:
        prompt: the weight of a token that does not belong to an answer.
    """

    prompt: float = Field(default=0.1, ge=0, le=1)


LOCAL = ("json", "parquet", "csv")
"""The values of `dataset` for local files: the formats of the files."""


class CalibrationSet(Block):
    """Where calibration texts come from: a dataset (of the Hub, or files of one of `LOCAL`), or `texts` given inline.

    Attributes:
        dataset: a dataset repo of the Hub, or one of `LOCAL`.
        text: template that turns a row into text, such as `{question} {answer}`; its last field is the answer.
        prompt, answer: instead of `text`, two templates, for the prompt and for the answer that follows it.
        continues: the key `continue`: how many answers the expert that names the set writes to each row, a prompt.
        messages: instead of `text`, the column with a chat, which the base's chat template turns into text; the
            assistant's turns are the answers.
        weight: how much prompts count compared with answers. By default, all tokens of `text`, and of `texts` without
            `continue`, count alike, and in the other forms prompts count 0.1.
        samples: number of texts.
        max_tokens: the number of tokens that longer texts are cut to.
        padding: `max_tokens` fills each sample up with end-of-text tokens, which then count like all others (as the
            authors' code does).
    """

    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    data_files: str | tuple[str, ...] | None = None
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    continues: Annotated[int, Field(ge=1, le=1000)] | None = Field(default=None, alias="continue")
    messages: str | None = None
    texts: tuple[str, ...] | None = None
    weight: TokenWeights | None = None
    samples: int = Field(default=128, ge=1)
    max_tokens: int = Field(default=512, ge=1, le=1 << 20)
    seed: int = Field(default=42, ge=0)
    padding: Literal["none", "max_tokens"] = "none"

    def _contradictions(self) -> Iterator[str]:
        pair = (self.prompt or self.answer) is not None
        if (self.dataset is None) == (self.texts is None):
            yield ": expected either `dataset` or inline `texts`"
        elif self.continues and (not (self.prompt or self.texts) or self.answer or self.padding != "none"):
            yield (
                ": `continue` has the expert write the answers: expected `prompt`, or `texts` that are prompts, "
                "without `answer` and `padding`"
            )
        elif pair and not (self.prompt and (self.answer or self.continues)):
            yield ': expected both `prompt` and `answer`, such as "Question: {question}\\nAnswer:" and " {answer}"'
        elif self.dataset is not None and sum((bool(self.text), pair, bool(self.messages))) != 1:
            yield (
                ': expected one of: `text`, a template such as "{question} {answer}" that turns a row into text; '
                "`prompt` with `answer`; or `messages`, the column of a chat"
            )
        elif (self.dataset or "").partition("@")[0] in LOCAL and not self.data_files:
            yield f": dataset {self.dataset!r} needs `data_files`"
        elif self.texts is not None and (
            self.text or pair or self.messages or self.weight or self.data_files or self.config
        ):
            yield ": inline `texts` take no `text`, `prompt`, `messages`, `weight`, `config` or `data_files`"
        if self.texts is not None and not any(each.strip() for each in self.texts):
            yield f"texts: expected texts, got {'empty ones' if self.texts else 'none'}"
        fields, template = list[str](), ""
        for key in (key for key in ("text", "prompt", "answer") if getattr(self, key)):
            template = getattr(self, key)
            try:
                fields += [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
            except ValueError as error:
                yield f"{key}: {template!r} is no template: {error}; write {{{{ for a brace"
                fields.append(template)
        if template and not fields:  # all rows would be the same text
            yield f'{key}: expected names of columns, such as "{{question}} {{answer}}", got {template!r}'

    @property
    def prompt_weight(self) -> float:
        """How much a token of a prompt counts, where one of an answer counts 1."""
        if self.weight is None:
            return 1.0 if self.text or (self.texts and not self.continues) else TokenWeights().prompt
        return self.weight.prompt


class Importance(Block):
    """How the importance of a layer is measured, and how far fine-tuning moved it.

    Attributes:
        metric: the measure of how far a layer moved, for `strategy: lewis`: `norm_difference` (LEWIS's), `delta_norm`
            (the norm of the activation-weighted task vector), or `outlier` (its share of outliers, as in OWL).
        prune_ratio: share of each row's weights that Wanda prunes before the layer's output feeds the next layer; the
            authors' code uses 0.5.
        reduce: how squared activations are reduced: to their `mean` over all tokens, or to their `sum` over a sample's
            tokens, averaged over the samples (as the authors' code does).
    """

    metric: Literal["norm_difference", "delta_norm", "outlier"] = "norm_difference"
    prune_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    reduce: Literal["mean", "sum"] = "mean"


def _known_allocator(name: str) -> str:
    if name not in ALLOCATORS:
        ALLOCATORS.load()
    if name not in ALLOCATORS:
        close = nearest(name, ALLOCATORS)
        known = "" if "expected one of" in close else f"; there are {', '.join(ALLOCATORS)}"
        raise ValueError(f"unknown allocator {name!r}{close}{known}")
    return name


class Density(Block):
    """How densities are allocated.

    Attributes:
        strategy: the name of an allocator (`lewis.allocators`): LEWIS's own, or one that an installed package brings.
        min, max: bounds of every density, 0 < min <= max <= 1.
        budget: the exact mean density of the covered tensors, weighted by their number of parameters. Without one,
            the mean of `lewis` and `depth_gradient` follows from their formula, and is the midpoint of the bounds for
            the others.
        scale: how `lewis` maps its shares to the bounds: `minmax`, by `rank`, or `robust` against outliers.
        decimals: `lewis` first rounds its shares to so many decimals; the authors' code uses 5.
        uncovered: density of tensors without one of their own: `expert` 1, `base` 0, `mean` the mean of covered ones.
    """

    strategy: Annotated[str, AfterValidator(_known_allocator)] = DEFAULT
    min: float = Field(default=0.3, gt=0, le=1)
    max: float = Field(default=0.8, gt=0, le=1)
    budget: float | None = Field(default=None, gt=0, le=1)
    scale: Literal["minmax", "rank", "robust"] = "minmax"
    decimals: int | None = Field(default=None, ge=1, le=100)
    uncovered: Literal["expert", "base", "mean"] = "expert"

    @property
    def allocator(self) -> Allocator:
        """The allocator that `strategy` names."""
        return ALLOCATORS.find(self.strategy)

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest density that a layer can get."""
        return (self.min, self.max) if self.allocator.guides else (target_of(self), target_of(self))

    def _contradictions(self) -> Iterator[str]:
        low, high, budget, allocator = self.min, self.max, self.budget, self.allocator
        if budget is not None and not allocator.guides:  # the default bounds do not apply to it
            low, high = (
                (low if "min" in self.model_fields_set else 0.0),
                (high if "max" in self.model_fields_set else 1.0),
            )
        if low > high:
            yield f"min: expected 0 < min <= max <= 1, got min={low}, max={high}"
        elif budget is not None and not low <= budget <= high:
            yield f"budget: expected min <= budget <= max, got min={low}, budget={budget}, max={high}"
        for key in {"scale", "decimals"} & self.model_fields_set - {*allocator.uses}:
            if getattr(self, key) is not None:
                others = " or ".join(each.name for each in ALLOCATORS.values() if key in each.uses)
                yield f"{key}: {allocator.name} has no use for it; leave it out, or use {others}"


class Aim(Block):
    """Shrink the merged delta where the base's activations are large (`lewis.allocation.step.aim`, arXiv 2502.02421).

    Attributes:
        omega: the factor for the input channel that the base uses most, in [0, 1]; 1 changes nothing.
    """

    omega: float = Field(default=0.4, ge=0, le=1)


class Refine(Block):
    """Training after a fit in forward order (`lewis.merging.fitting.refine`).

    Attributes:
        epochs: passes over the calibration rows; the first that brings nothing on held-back rows is the last.
        rank: of the update of each projection.
        rate: the highest learning rate.
    """

    epochs: int = Field(default=3, ge=1, le=100)
    rank: int = Field(default=32, ge=1, le=1024)
    rate: float = Field(default=4e-5, gt=0, le=1)


class Lewis(Block):
    """The LEWIS block: calibration sets, importance, densities.

    Attributes:
        preset: `lewis_official` sets what the authors' code does (`PRESETS`).
        calibrations: name -> calibration set.
        hold_back: whether a part of the calibration rows is held back to judge a fit; None: only one in forward order.
        refine: training after a fit in forward order.
        prune_by: which elements of a task vector a trimming method keeps: those with the largest |delta|
            (`magnitude`), or the largest |delta| * sqrt(s) (`activation`), s from the expert's own calibration set.
        aim: the AIM step after the merge, for the covered tensors; it measures the base on the sets of all experts.
    """

    preset: Literal["lewis_official"] | None = None
    calibrations: dict[Annotated[str, Field(min_length=1)], CalibrationSet] = Field(default_factory=dict)
    hold_back: bool | None = None
    refine: Refine | None = None
    importance: Importance = Importance()
    prune_by: Literal["magnitude", "activation"] = "magnitude"
    density: Density = Density()
    aim: Aim | None = None

    @property
    def runs_models(self) -> bool:
        """Whether models are run to decide the densities, or for `prune_by` or `aim`."""
        return self.evidence != "nothing" or self.prune_by == "activation" or self.aim is not None

    @property
    def guides(self) -> list[str]:
        """The keys of the block by which the recipe says how densities are decided."""
        given = [key for key in GUIDES if key in self.model_fields_set and getattr(self, key) is not None]
        return [key for key in given if self.preset is None or key not in PRESETS[self.preset]]

    def _contradictions(self) -> Iterator[str]:
        metric, allocator = self.importance.metric, self.density.allocator
        if "metric" in self.importance.model_fields_set and allocator.evidence_by(metric) != metric:
            others = " or ".join(each.name for each in ALLOCATORS.values() if each.evidence == "metric")
            yield f"importance.metric: {allocator.name} has no use for {metric!r}; leave it out, or use {others}"
        preset = PRESETS[self.preset] if self.preset else {}
        blocks: dict[str, Block] = {"importance": self.importance, "density": self.density}
        blocks |= {f"calibrations.{name}": each for name, each in self.calibrations.items()}
        for where, block in blocks.items():
            for key, wanted in preset.get("calibration" if "." in where else where, {}).items():
                if key not in FREE and (given := getattr(block, key)) != wanted:
                    yield f"{where}.{key}: preset {self.preset} has {wanted!r}, got {given!r}; leave one out"

    @property
    def evidence(self) -> str:
        """The kind of evidence that decides the densities: a value of `lewis.allocators.Needs` other than `metric`."""
        return self.density.allocator.evidence_by(self.importance.metric)

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, data: Any) -> Any:
        """Take the preset's value for each setting that the recipe leaves out."""
        preset = PRESETS.get(str(data.get("preset"))) if isinstance(data, dict) else None
        if preset is None:
            return data
        filled = dict(data)
        for name in ("importance", "density"):
            if isinstance(data.get(name) or {}, dict):
                filled[name] = {**preset[name], **(data.get(name) or {})}
        if isinstance(data.get("calibrations"), dict):
            filled["calibrations"] = {
                name: {**preset["calibration"], **each} if isinstance(each, dict) else each
                for name, each in data["calibrations"].items()
            }
        return filled


class Output(Block):
    """What a merge writes: the full model, or a LoRA adapter that holds the merged delta approximately.

    Attributes:
        kind: `full`, or `lora`: a PEFT adapter on the base, which needs `rank` or `tolerance`.
        rank: the largest rank of a module.
        tolerance: the largest relative Frobenius error of a module's delta; its rank is then the smallest that keeps
            within it (and at most `rank`, if that is given too). A tensor that an adapter cannot hold may have moved by
            this share of its own norm; it then stays as the base has it.
    """

    kind: Literal["full", "lora"] = "full"
    rank: int | None = Field(default=None, ge=1)
    tolerance: float | None = Field(default=None, gt=0, lt=1)

    def _contradictions(self) -> Iterator[str]:
        if (self.kind == "lora") == (self.rank is None and self.tolerance is None):
            full = ": full takes no `rank` or `tolerance`; did you mean kind: lora?"
            yield full if self.kind == "full" else ": kind lora needs `rank`, `tolerance` or both"


class Inspect(Block):
    """What a run does about findings on models that do not belong together (`lewis inspect`).

    Attributes:
        on: `error`: a finding of level error stops the run before the merge; `warn`: findings are only shown; `off`:
            the models are not inspected.
    """

    on: Literal["error", "warn", "off"] = "error"

    @model_validator(mode="before")
    @classmethod
    def _unquoted(cls, data: Any) -> Any:
        """Undo what YAML 1.1 does to unquoted words: it reads `on` as the key true, and `off` as the value false."""
        if not isinstance(data, dict):
            return data
        return {"on" if key is True else key: "off" if value is False else value for key, value in data.items()}


Documents = Literal["all", "search", "confirm", "by_release"]


class Evaluate(Block):
    """What lm-eval scores, and how.

    Attributes:
        tasks: names of lm-eval's own tasks or groups, or YAML files next to the recipe.
        limit: documents per task: a number, or below 1 a share; None: all.
        documents: `all`, or one of two disjoint halves of every task's documents (`search`, `confirm`); `limit` counts
            within the half. `by_release`: `limit` documents drawn from all, different ones for each merge.
        stop: when scoring ends: `never` before all documents are scored; `worse`: as soon as it is certain that the
            gate refuses the merge; `known`: as soon as the verdict is certain.
        full_scores: which models are scored on all documents after scoring has ended early: `promoted`, a merge that
            passed the gate and the models it is compared with; or `never`.
        weights: task, or `task/metric,filter` -> its weight in the score `weighted/mean,none`; a task stands for its
            first metric. Empty: there is no such score.
        allow_code_execution: whether task files next to the recipe may run code: their own functions (`!function`),
            and code that a model writes (`unsafe_code: true`).
        baselines: which other models are scored for comparison.
        backend: the engine that computes the answers.
        model_args: further arguments of the backend, as `lewis.recipe.model_args` allows them.
        gpus: how many GPUs one evaluation takes.
    """

    tasks: tuple[Annotated[str, Field(pattern=NOT_BLANK)], ...] = Field(min_length=1)
    limit: int | float | None = Field(default=None, gt=0)
    documents: Documents = "all"
    stop: Literal["never", "worse", "known"] = "never"
    full_scores: Literal["promoted", "never"] = "promoted"
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 16
    timeout_minutes: float = Field(default=60, gt=0)
    allow_code_execution: bool = False
    baselines: tuple[Literal["base", "experts", "uniform"], ...] = ("base", "experts", "uniform")
    backend: Backend = "hf"
    model_args: dict[str, Any] = Field(default_factory=dict)
    gpus: int = Field(default=1, ge=1)

    def _contradictions(self) -> Iterator[str]:
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            yield f"limit: expected a whole number of documents, or a share below 1, got {self.limit:g}"
        if self.documents == "by_release" and self.limit is None:
            yield ": `documents: by_release` draws `limit` documents for each merge: set `limit`"
        yield from (f"model_args.{line}" for line in model_args.problems_of(self.backend, self.model_args))
        if self.runs_model_code and not self.allow_code_execution:
            yield (
                "model_args.trust_remote_code: it runs code that comes with a model; if you trust all models of the "
                "recipe, say `allow_code_execution: true` in the block `evaluate`, or else leave it out"
            )
        if self.model_args.get("chat") is True and not self.apply_chat_template:
            yield (
                "model_args.chat: the server is asked in chats then; say `apply_chat_template: true` in the block "
                "`evaluate` too"
            )

    @property
    def completes(self) -> bool:
        """Whether scoring may end early, and a merge that then passes the gate is scored on all documents."""
        return self.stop == "known" and self.full_scores == "promoted"

    @property
    def runs_model_code(self) -> bool:
        """Whether code that comes with a model is run."""
        return self.model_args.get("trust_remote_code") is True


class Judge(Block):
    """A language model that compares answers: the gate fails if the judge prefers the reference's to the merge's.

    Attributes:
        model: its name on the server that `LEWIS_JUDGE` names.
        documents: the largest number of documents that it is asked about, of those with differing answers.
    """

    model: str = Field(min_length=1)
    documents: int = Field(default=20, ge=1, le=200)


class Gate(Block):
    """When a merge becomes the champion. It is compared with a reference: the champion, or the base if there is none.

    Attributes:
        policy: `not_worse`: a test must show that the merge is within `tolerance` of the reference, in `metric` and in
            each task; no gain is asked for. `better`: `metric` must also gain significantly. By default it is `better`
            if the recipe gives `min_gain`, else `not_worse`.
        metric: the score that decides: `task/metric,filter`, or `weighted/mean,none`.
        min_gain: the smallest gain in `metric`; only for `better`.
        tolerance: the margin: a test must show that each task is at most this much worse than the reference. One
            number, or one for each task or `task/metric,filter`: absolute for scores between 0 and 1, else relative to
            the reference's value. None: it follows from the number of documents (`statistics.power.margin`).
        allow_limit: whether a run with `evaluate.limit` may promote.
        approve: whether a person has to approve a merge that passes, before it becomes the champion (`lewis approve`).
        approve_hours: for how many hours it waits for approval, at most a century; then it has to be judged again.
        judge: the language model that is asked about a merge that passes all other rules; None: no judge.
    """

    metric: str
    policy: Literal["not_worse", "better"] = "not_worse"
    min_gain: float = Field(default=0.0, ge=0)
    tolerance: Annotated[float, Field(ge=0)] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    allow_limit: bool = False
    approve: bool = False
    approve_hours: float = Field(default=168, gt=0, le=876_000)
    judge: Judge | None = None

    @model_validator(mode="before")
    @classmethod
    def _policy(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if "superiority" in data:
            raise ValueError(
                "`superiority` is now `policy`: write `policy: better` if a gain must be significant, else "
                "`policy: not_worse`"
            )
        least = data.get("min_gain")
        if isinstance(least, int | float) and least < 0:
            fix = f"write `policy: not_worse` and `tolerance: {-least}`"
            raise ValueError(f"`min_gain` below 0 asks for no gain: {fix}")
        if least and data.get("policy") == "not_worse":
            raise ValueError("`min_gain` asks for a gain: write `policy: better`, or leave it out")
        return {"policy": "better", **data} if "min_gain" in data else data


class Register(Block):
    """The registered model in MLflow.

    Attributes:
        name: name of the model; with a team, MLflow has it as `<team>.<name>`.
        team: the team that owns the model. The names of the team's models, of its experiment in MLflow and of its
            artifacts in Prefect begin with it.
        group: a name that all recipes which register this model share; empty if only this recipe registers it.
    """

    # MLflow allows 256 characters, team included
    name: str = Field(pattern=NAME, max_length=200)
    team: str = Field(default="", pattern=r"^([a-z0-9]+(-[a-z0-9]+)*)?$", max_length=50)
    group: str = ""
    gate: Gate | None = None

    @property
    def model(self) -> str:
        """The name of the registered model in MLflow."""
        return f"{self.team}.{self.name}" if self.team else self.name


class Publish(Block):
    """The Hub repo that the champion is pushed to.

    Attributes:
        repo: `org/name`; it is created if it does not exist.
        private: whether it is created as private; with True, an existing public repo is refused.
    """

    repo: str = Field(pattern=REPO)
    private: bool = True


class SearchRange(Block):
    """The numbers that a search may try: from `min` to `max`, on a `log` scale, or in steps of `step` from `min`."""

    min: float
    max: float
    log: bool = False
    step: float | None = Field(default=None, gt=0)

    def _contradictions(self) -> Iterator[str]:
        width = self.max - self.min
        if width <= 0:
            yield f": expected min < max, got min={self.min:g}, max={self.max:g}"
        elif self.step and self.step > width:
            yield f": a step of {self.step:g} leads beyond max, to min alone; expected at most {width:g}"
        if self.log and (self.min <= 0 or self.step):
            yield ": a log scale needs min > 0, and takes no step"


class Search(Block):
    """The values of the recipe that `lewis search` searches for.

    Attributes:
        space: YAML path, as in `--set` -> a range, or a list of choices.
        trials: number of trials in all.
        minutes: minutes after which no trial begins; None: no limit.
        metrics: one or two of `task/metric,filter`; by default the gate's metric. With two, a Pareto front is searched,
            and the first metric decides among the trials on it.
        parallel: number of trials that run at the same time.
        prune: whether a trial is stopped after a quarter of the documents if it is then shown to be worse; only with
            one metric.
        seed: the sampler's seed, below 2**32.
    """

    space: dict[
        str,
        Annotated[
            Annotated[SearchRange, Tag("a range")] | Annotated[tuple[bool | int | float | str, ...], Tag("a list")],
            Discriminator(lambda value: "a range" if isinstance(value, dict | SearchRange) else "a list"),
        ],
    ] = Field(min_length=1)
    trials: int = Field(default=30, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    metrics: tuple[str, ...] = Field(default=(), max_length=2)
    parallel: int = Field(default=1, ge=1)
    prune: bool = True
    seed: int = Field(default=0, ge=0, lt=1 << 32)
