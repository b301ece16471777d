"""Whether models can be merged: every expert needs the base's tensors, in their shapes, and its vocabulary."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lewis.errors import InputError
from lewis.models.checkpoint import tied_head
from lewis.models.config import read_config
from lewis.models.files.folder import INDEX, weight_files
from lewis.models.files.safetensors_file import Headers
from lewis.models.hub import repository
from lewis.models.hub.pin import Pinned
from lewis.models.layers.slices import Slice, check_ranges, in_place, slices_of
from lewis.models.layers.stack import Layers, layers_of, same_tensor
from lewis.models.layers.stack_config import changed_keys, origins_of, restacked
from lewis.models.lora.question import CONFIG, AdapterQuestion, question_of, read_settings
from lewis.models.model import Model
from lewis.models.names import HEADS, PER_TOKEN, Shapes, in_layers
from lewis.models.network.renamed import differ, match
from lewis.models.rehearsed import check_loads, question
from lewis.models.source import Source
from lewis.models.tokenizer import FIX, TOKENIZER, clash, read_vocabulary, tokenizer_folder
from lewis.recipe.config import MergeConfig
from lewis.rehearsal.answers import answers
from lewis.rehearsal.network import Network

logger = logging.getLogger(__name__)


def check_compatible(
    base: Model, experts: Sequence[Model], excluded: Collection[str] = (), *, by_token: bool = False
) -> None:
    """Check that every expert has the base's tensors (but for the excluded ones), shapes and vocabulary.

    Tensors that only the expert has are an error in a layer, since they make it another architecture. Outside of the
    layers (a classifier, a value head) they are left out of the merge, with a warning. If only the expert ties its head
    to its embedding, its embedding serves as the head. If only the base ties them, the expert's head must equal its
    own embedding, since the result has one tensor for both.

    Args:
        base: the base.
        experts: the base may be among them.
        excluded: tensors of the base that are not merged.
        by_token: whether embeddings have been matched by token, so that vocabularies may differ.

    Raises:
        InputError: naming everything that differs.
    """
    problems = []
    for expert in experts:
        if expert is not base:
            found = [*_check_tensors(base, expert, excluded, by_token), *_check_heads(base, expert)]
            if not by_token and (why := clash(tokenizer_folder(base), tokenizer_folder(expert))):
                found.append(f"another vocabulary: {why}; {FIX}")
            problems += [f"{expert.folder}: {problem}" for problem in found]
    if problems:
        raise InputError(
            "\n".join([*problems, f"expected fine-tunes of the base {base.home}, of the same architecture"])
        )


def preflight(
    config: MergeConfig,
    base: Source | None,
    experts: Sequence[Source],
    *,
    needed: bool = False,
) -> list[str]:
    """Check configs, names, shapes and filters by the headers of the weight files, before gigabytes are downloaded.

    transformers is asked whether it loads each model (`lewis.rehearsal.network`), PEFT whether it loads each adapter.

    Args:
        config: of the merge.
        base: the base; None: the first expert takes its place.
        experts: in the recipe's order.
        needed: whether the run needs the networks.

    Returns:
        A sentence for each model with other names for the base's tensors, on how it is read.

    Raises:
        InputError: naming every expert and tensor that does not fit.
        RecipeError: naming every filter that matches nothing.
    """
    sources = [*([base] if base else []), *experts]
    first = sources[0]
    headers = {model: _check_model(model) for model in dict.fromkeys(source.model for source in sources)}
    spared = {} if needed else {name: each for name, each in headers[first.model].items() if config.excludes(name)}
    asked = {model: _network(model, own, lent=spared, runs=needed) for model, own in headers.items()}
    questions = {model: each for model, each in asked.items() if each}
    shapes: dict[Pinned, Shapes] = {m: {name: shape for name, (_, shape) in own.items()} for m, own in headers.items()}
    ours = shapes[first.model]
    left_out = {name: shape for name, shape in ours.items() if config.excludes(name)}
    of_adapters = {each: q for source in sources for each, q in _of_adapters(source, shapes[source.model]).items()}
    by_ref = {source.ref: shapes[source.model] for source in sources}
    models = {source.ref: source.model for source in sources}
    if config.slices:
        check_loads({**questions, **of_adapters})
        if _preflight_slices(config, first.ref, by_ref, models):
            return []
    problems, renamed, by_token = list[str](), list[str](), config.vocabulary is not None
    for source in experts:
        if source.model.commit == first.model.commit:
            continue  # the base itself, or an adapter on it
        theirs = shapes[source.model]
        if differ(ours, theirs) and (matched := match(repository.fetch(first.model, weights=False), ours, theirs)):
            theirs = matched.shapes
            renamed.append(f"{source.ref}: {matched.summary}")
        # A head that is not stored may be tied to the embedding: only the model's config says so.
        theirs = {**{name: shape for name, shape in ours.items() if name.endswith(HEADS)}, **theirs}
        found = _differences(ours, theirs, left_out, matched=False, by_token=by_token)
        problems += [f"{source.ref}: {problem}" for problem in found]
    if problems:
        raise InputError("\n".join([*problems, f"expected fine-tunes of {first.ref}, of the same architecture"]))
    check_loads({**questions, **of_adapters})
    config.check_filters(ours, _ties(first.model, ours))
    return renamed


def _ties(model: Pinned, shapes: Shapes) -> dict[str, str]:
    """The head that the config of a model ties to its embedding, as `Checkpoint.tied`."""
    home = repository.fetch(model, weights=False)
    return tied_head(home, read_config(home), shapes)


def _check_model(model: Pinned) -> Headers:
    """Check index, config and tokenizer of a full model, and return its tensors' headers."""
    home = repository.fetch(model, weights=False)
    with repository.blaming(model, INDEX):
        weight_files(home, () if model.is_local else repository.file_names(model))
    with repository.blaming(model, "config.json"):
        read_config(home)
    _check_tokenizer(model, home)
    return repository.tensor_headers(model)


def _network(model: Pinned, headers: Headers, *, lent: Headers, runs: bool) -> Network | None:
    """The question to transformers about a model, which a message calls by its folder or its reference on the Hub."""
    home = repository.fetch(model, weights=False)
    item = home if model.is_local else model.ref
    return question(item, home, read_config(home), headers, lent=lent, runs=runs)


def _of_adapters(source: Source, shapes: Shapes) -> dict[Pinned, AdapterQuestion]:
    """The questions to PEFT about the adapters of a source; none for a model whose weights have no known shapes yet."""
    home, found = repository.fetch(source.model, weights=False), dict[Pinned, AdapterQuestion]()
    config = read_config(home)
    for adapter in source.adapters:
        folder = repository.fetch(adapter, weights=False)
        with repository.blaming(adapter, CONFIG, "unusable"):
            read_settings(folder)
        _check_tokenizer(adapter, folder)
        weights = {name: shape for name, (_, shape) in repository.tensor_headers(adapter).items()}
        if weights and "quantization_config" not in config:
            item = folder if adapter.is_local else adapter.ref
            found[adapter] = question_of(home, shapes, tied_head(home, config, shapes), folder, weights, item=item)
    return found


def _check_tokenizer(model: Pinned, folder: Path) -> None:
    """Check that a Hub model's tokenizer.json can be read; a local one is checked when tokens are compared."""
    if not model.is_local:
        with repository.blaming(model, TOKENIZER):
            read_vocabulary(folder)


def _preflight_slices(
    config: MergeConfig, first: str, shapes: Mapping[str, Shapes], models: Mapping[str, Pinned]
) -> bool:
    """Check stacked slices for `preflight`; return False, with only ranges checked, if every layer stays in its place.

    Args:
        config: as in `preflight`.
        first: the reference of the base, or of what takes its place.
        shapes: reference of a model -> shapes of its tensors. Models of the slices that are missing here are not
            checked, and then neither filters nor the result are.
        models: reference of a model -> the full model, of which an adapter's is its base.
    """
    layers = {ref: layers_of(ref, own) for ref, own in shapes.items()}
    counts = {ref: own.count for ref, own in layers.items()}
    slices = slices_of(config)
    check_ranges(slices, counts)
    if in_place(slices, config.base_model, counts):
        return False
    problems, known = list[str](), dict.fromkeys(shapes[first])
    for each in slices:
        read = {}
        for ref in filter(shapes.__contains__, each.starts):
            names = {new: old for new, old in each.names(ref, layers, layers[first]).items() if old in shapes[ref]}
            read[ref] = {new: shapes[ref][old] for new, old in names.items()}
            known |= dict.fromkeys([*names, *names.values()])
        ours = read.pop(each.lead, {})
        heads = {name: shape for name, shape in ours.items() if name.endswith(HEADS)}
        for ref, theirs in read.items() if ours else ():
            by_token = config.vocabulary is not None
            found = _differences(ours, {**heads, **theirs}, (), matched=False, by_token=by_token)
            problems += [f"{ref}: {problem}" for problem in found]
    if problems:
        raise InputError("\n".join([*problems, "expected layers of the same architecture in each slice"]))
    if shapes.keys() >= {entry.model for entry in config.models}:
        config.check_filters(known, _ties(models[first], shapes[first]))
        _check_stack(slices, first, layers, shapes, models)
    return True


def _check_stack(
    slices: Sequence[Slice],
    first: str,
    layers: Mapping[str, Layers],
    shapes: Mapping[str, Shapes],
    models: Mapping[str, Pinned],
) -> None:
    """Check the config that the result will have, by the network that transformers builds of it; raises InputError.

    Outside of the layers, the tensors have the shapes of the model that gives the config: others are refused, or
    matched by token, where the models are opened.
    """
    homes = {ref: repository.fetch(model, weights=False) for ref, model in models.items()}
    configs, result = {ref: read_config(home) for ref, home in homes.items()}, layers[first]
    made = {name: shapes[first][name] for name in (*result.before, *result.after)}
    for each in slices:
        own = shapes[each.lead]
        names = each.names(each.lead, layers, result)
        made |= {new: own[old] for new, old in names.items() if result.number(new) is not None}
    origins = origins_of(slices, homes, configs, {ref: each.count for ref, each in layers.items()})
    stacked = restacked(configs[first], homes[first], origins)
    keys = ", ".join(changed_keys(configs[first], stacked)) or "order of layers"
    item = f"{homes[first] / 'config.json'}: slices: with the result's {keys}"
    if asked := question(item, homes[first], stacked, {name: ("F32", shape) for name, shape in made.items()}):
        answers([asked])


def result_headers(config: MergeConfig, base: Source | None, experts: Sequence[Source]) -> Headers:
    """Return dtype and shape of each tensor of the result: those of the base or, in a slice, of its `lead`."""
    first = base or experts[0]
    if not config.slices:
        return repository.tensor_headers(first.model)
    headers = {source.ref: repository.tensor_headers(source.model) for source in dict.fromkeys((first, *experts))}
    layers = {ref: layers_of(ref, own) for ref, own in headers.items()}
    return {
        new: headers[each.lead][old]
        for each in slices_of(config)
        for new, old in each.names(each.lead, layers, layers[first.ref]).items()
        if old in headers[each.lead]
    }


def _differences(
    base: Shapes, expert: Shapes, excluded: Collection[str], *, matched: bool, by_token: bool
) -> Iterator[str]:
    """Describe how the tensors of an expert differ from the base's, with at most one problem of each kind.

    Args:
        base: the shapes of its tensors.
        expert: the shapes of its tensors, with the names that it ties, if the base stores them.
        excluded: tensors of the base that are not merged.
        matched: whether the embeddings have been matched by token already.
        by_token: whether embeddings are matched by token. Until that is done, their first dimension may differ.
    """
    wanted = {name: shape for name, shape in base.items() if name not in excluded}
    missing = [name for name in wanted if name not in expert]
    if missing:
        yield f"{len(missing)} tensors of the base are missing, the first is {missing[0]!r}"
    extra = in_layers(name for name in expert if name not in base)
    if extra:
        yield f"{len(extra)} tensors are not in the base, the first is {extra[0]!r}"
    for name, shape in wanted.items():
        start = int(by_token and not matched and name.endswith(PER_TOKEN))
        if name in expert and expert[name][start:] != shape[start:] and (matched or not _flat(expert[name], shape)):
            problem = f"{name!r} has shape {list(expert[name])}, in the base it is {list(shape)}"
            yield problem + (f"; {FIX}" if name.endswith(PER_TOKEN) and not by_token else "")
            break


def _flat(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether only the number of elements is known of one of two shapes, as for an NF4 weight before its download."""
    return 1 in (len(one), len(other)) and math.prod(one) == math.prod(other)


def _check_tensors(base: Model, expert: Model, excluded: Collection[str], by_token: bool) -> Iterator[str]:
    ours, shapes = base.shapes, expert.shapes
    lent = {head: shapes[embedding] for head, embedding in expert.tied.items() if head in ours}
    theirs = {name: shape for name, shape in shapes.items() if name not in base.tied} | lent
    yield from _differences(ours, theirs, excluded, matched=True, by_token=by_token)
    extra = [name for name in theirs if name not in ours]
    if extra and not in_layers(extra):
        logger.warning("%s: left out of the merge, since the base has no %s", expert.folder, ", ".join(extra))


def _check_heads(base: Model, expert: Model) -> Iterator[str]:
    for head, embedding in base.tied.items():
        if head in expert.tensors and embedding in expert.tensors and not same_tensor(expert, head, embedding):
            yield (
                f"{head!r} is a weight of its own, in the base it is tied to the embedding; "
                "merge onto a base with a head of its own"
            )
