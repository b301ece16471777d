"""The kinds of findings of an inspection: each with its level, its meaning for a merge, and what to do."""

from dataclasses import asdict, dataclass
from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of findings.

    Attributes:
        level: `error` if the merge would be wrong or worthless, `warning` if it may be.
        meaning: what it means for a merge.
        fix: what to do.
    """

    level: str
    meaning: str
    fix: str


KINDS = {
    "no fit": Kind(
        "error",
        "it has no task vector to this base, and the merge is refused",
        "use a fine-tune of this base, or the model that it was trained from as base_model",
    ),
    "wrong base": Kind(
        "error",
        "its task vector is the difference of two unrelated models: added to the base it destroys both",
        "set base_model to the model that it was trained from, or leave it out",
    ),
    "another base": Kind(
        "warning",
        "an adapter is a difference to the model that it was trained on: on another one it does something else",
        "set base_model to the model that its config names, or write the expert as THAT-MODEL+ADAPTER",
    ),
    "far from base": Kind(
        "warning",
        "it was trained for long, or from another model of the family: what it learned does not add up with others",
        "check its model card for its base; give it a small weight, or merge by regmean_forward",
    ),
    "shared origin": Kind(
        "warning",
        "what both were trained from is counted twice, and what makes them differ is a small part of each task vector",
        "set base_model to the model that both were trained from, such as the instruct version of this base",
    ),
    "expert twice": Kind(
        "error",
        "it counts twice: in the sums, in the election of signs, and in the scores",
        "remove one; to count it more, give it a larger weight",
    ),
    "opposed": Kind(
        "warning",
        "one undoes what the other learned: their sum is close to the base",
        "merge them apart, or give the less important one a small weight",
    ),
    "NaN": Kind(
        "error",
        "the merge stops at this tensor, and the model itself gives NaN",
        "save the model again from a checkpoint before its training diverged",
    ),
    "overflow": Kind(
        "error",
        "numbers above 65504 are infinity in float16: the model gives NaN, and the merge stops",
        "save it in bfloat16 or float32; set dtype: bfloat16 in the recipe",
    ),
    "damaged base": Kind(
        "error",
        "each task vector takes these weights away, and what the experts learned there is lost next to them",
        "download or convert the base again: a bit of a number flipped, or a factor was lost",
    ),
    "zeroed tensor": Kind(
        "error",
        "its task vector takes the base's weights away there, and the merged model loses that layer's work",
        "convert or download the model again; a writer left this tensor out",
    ),
    "swapped layers": Kind(
        "error",
        "each task vector there is the difference of two layers that do different work",
        "convert the model again, or rename its tensors to the base's order of layers",
    ),
    "permuted heads": Kind(
        "error",
        "the model may work by itself, but its heads are not the base's heads: averaging mixes different ones",
        "convert it by the base's converter, or permute its heads back, in q, k, v and o alike",
    ),
    "permuted rows": Kind(
        "error",
        "the model may work by itself, but its neurons are not in the base's order: averaging mixes different ones",
        "convert it by the base's converter, or permute rows and columns back",
    ),
    "rescaled": Kind(
        "error",
        "its task vector is the base itself, many times over: the merged model is nothing but that tensor, or lacks it",
        "convert or download the model again; a factor was lost, such as the scale of a quantised weight",
    ),
    "norms": Kind(
        "warning",
        "one tensor moved far more than the rest: it was replaced or rescaled, not fine-tuned, and dominates the merge",
        "compare it with the base; exclude it from the merge (`exclude`) if it is not wanted",
    ),
    "undertrained": Kind(
        "warning",
        "there is next to nothing to merge: with normalised weights it only dilutes the others",
        "check that these are the trained weights (a LoRA merged, not only saved); else leave it out",
    ),
    "outsized": Kind(
        "warning",
        "where signs are elected or sums are taken, it outvotes the others",
        "give it a smaller weight, or merge by regmean_forward, which does not go by size",
    ),
    "quantised": Kind(
        "warning",
        "its task vector is mostly the rounding of every weight, not what it learned",
        "use the unquantised model, or the adapter on its unquantised base",
    ),
    "dtype": Kind(
        "warning",
        "the rounding of every weight is a part of its task vector",
        "save the expert in the base's dtype or in float32, or prune its task vector (ties, dare_ties with a density)",
    ),
    "rope": Kind(
        "warning",
        "the result gets the base's settings: the expert's attention was trained for other positions",
        "merge with fine-tunes that have the base's settings, or set base_model to one that has these",
    ),
    "config": Kind(
        "warning",
        "the result gets the base's config, by which the expert's weights compute something else",
        "check which of the two configs is right, and correct the other",
    ),
    "tied head": Kind(
        "warning",
        "one has a head of its own, the other uses its embedding: the result does as the base does",
        "use as base_model one that has a head of its own, if one of the models has",
    ),
    "special tokens": Kind(
        "warning",
        "the result gets one tokenizer: prompts with these tokens fall apart into pieces, or meet untrained rows",
        "set tokenizer_source: union, or to the model whose tokens the prompts use",
    ),
    "chat template": Kind(
        "warning",
        "the result gets one template: what an expert learned in another one is reached less",
        "set tokenizer_source to the model whose template you will use, and score it with that template",
    ),
    "calibration": Kind(
        "warning",
        "the fit keeps what an expert gives on these rows: they do not show its skill, so the merge may lose it",
        "give rows of the expert's own training, in the format of the training, to the end token",
    ),
    "eos": Kind(
        "warning",
        "the result stops at the base's end token: it may go on after an answer, or stop in the middle",
        "set tokenizer_source to the expert, or change generation_config.json of the result",
    ),
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong or odd about a model of a merge.

    Attributes:
        kind: a key of `KINDS`.
        model: the reference of the model.
        what: what was found, in words.
    """

    kind: str
    model: str
    what: str

    @property
    def level(self) -> str:
        """The level of the finding's kind: `error` or `warning`."""
        return KINDS[self.kind].level

    def to_text(self) -> str:
        """Describe the finding in three lines: what was found, what it means, what to do."""
        kind = KINDS[self.kind]
        return f"{kind.level}: {self.model}: {self.kind}: {self.what}\n  means: {kind.meaning}\n  do: {kind.fix}"

    def to_json(self) -> dict[str, str]:
        """Return the finding as plain JSON data, with level, meaning and fix."""
        return {**asdict(self), **KINDS[self.kind]._asdict()}
