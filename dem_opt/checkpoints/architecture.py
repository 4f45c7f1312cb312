"""The parameters that a model class has, and the stored tensors of a checkpoint that they come from.

config.json --> Architecture (parameters, ties, buffers)       stored tensors --> Layout --> parameters
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

from dem_opt.checkpoints.device_map import Split, split_layers
from dem_opt.checkpoints.files import DTYPES, Header, read_header, read_json, read_tensors
from dem_opt.checkpoints.hf_config import read_config, refuse_endless
from dem_opt.checkpoints.transformers_internals import LoadingRules, loading_rules, without_initialization
from dem_opt.errors import InputError, shorten

CONFIG_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    *(OSError, ImportError, StrictDataclassError),
)
"""Errors that transformers raises for configs that describe no model."""

_SHOWN = 10
"""Mismatches listed in an error; the rest are counted."""

Form = tuple[tuple[int, ...], ...]
"""The shapes of the stored tensors that a parameter is made of."""


@dataclass(frozen=True)
class Architecture:
    """A model without its weights, as its config describes it.

    Attributes:
        name: Name of the model class.
        parameters: Shape by name in the order of `named_parameters()`; tied weights once.
        aliases: The other names of tied weights, with the parameter that each stands for.
        buffers: Shape by name of stored tensors that are no parameters.
        embedding: Name of the input embedding, whose first dimension is the vocabulary.
        paired: The model is an encoder-decoder, whose documents are pairs of source and target.
    """

    name: str
    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    buffers: Mapping[str, tuple[int, ...]]
    embedding: str
    paired: bool
    _model: PreTrainedModel = field(repr=False)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each parameter."""
        return {name: prod(shape) for name, shape in self.parameters.items()}

    def split(self, devices: int, where: Path | None = None) -> Split:
        """Its layers divided over devices; InputError where there are fewer layers than devices."""
        if devices == 1:
            return Split(1, dict.fromkeys(self.parameters, 0), {}, (1,))
        return split_layers(self._model, devices, where)

    def layout(self, header: Header) -> "Layout":
        """Match a checkpoint's tensors with parameters, by the rules with which transformers loads it.

        Old names are renamed, and stored tensors fused or transposed into the parameter that the class has now.
        Checkpoints of one model have the same names, for which the layout is computed once.
        """
        names = tuple(header.tensors)
        if names not in self._layouts:
            self._layouts[names] = self._lay_out(names)
        return self._layouts[names]

    @cached_property
    def _layouts(self) -> dict[tuple[str, ...], "Layout"]:
        return {}

    def _lay_out(self, names: Sequence[str]) -> "Layout":
        layout = Layout({}, set(), {}, {}, [])
        for stored in names:
            name, converted = self._rules.target(stored)
            if name in self.parameters:
                layout.sources.setdefault(name, []).append(stored)
                if converted:
                    layout.fused.add(name)
            elif name in self.aliases:
                layout.aliases[stored] = self.aliases[name]
            elif name in self.buffers:
                layout.buffers[name] = stored
            elif not self._rules.is_ignored(name):
                layout.unknown.append(stored)
        return layout

    @cached_property
    def _rules(self) -> LoadingRules:
        return loading_rules(self._model)


@dataclass(frozen=True)
class Layout:
    """The stored tensors that each parameter of a checkpoint is made of.

    Attributes:
        sources: Stored names by parameter.
        fused: Parameters that are converted on loading, and not one stored tensor as it is.
        aliases: Stored names of tied weights, with the parameter that each repeats.
        buffers: Stored name by buffer.
        unknown: Stored names that the architecture does not use.
    """

    sources: dict[str, list[str]]
    fused: set[str]
    aliases: dict[str, str]
    buffers: dict[str, str]
    unknown: list[str]

    def dtype(self, header: Header, parameter: str) -> torch.dtype:
        """The dtype that a parameter is stored in.

        Raises:
            InputError: It is fused from tensors of several dtypes, or stored in one that can't be merged.
        """
        dtypes = {header.tensors[stored].dtype for stored in self.sources[parameter]}
        if len(dtypes) > 1:
            mend = f"{parameter} is fused from tensors of {', '.join(sorted(dtypes))}: save them in one dtype"
            raise InputError(header.folder, header.field, None, mend)
        (dtype,) = dtypes
        if dtype not in DTYPES:
            mend = f"tensor {self.sources[parameter][0]} is {dtype}: only {', '.join(DTYPES)} can be merged"
            raise InputError(header.folder, header.field, None, mend)
        return DTYPES[dtype]

    def form(self, header: Header, parameter: str) -> Form:
        """The shapes of the stored tensors behind a parameter."""
        return tuple(header.tensors[stored].shape for stored in self.sources[parameter])


def read_architecture(header: Header) -> Architecture:
    """Parameter names, shapes and ties of the model that the folder's config describes.

    Raises:
        InputError: transformers can't make a language model of the config, or would not finish.
    """
    refuse_endless(header.folder, header.field, len(header.tensors))
    return describe(_construct(header.folder, header.field, torch.float32, "meta"))


def describe(model: PreTrainedModel) -> Architecture:
    """A model's architecture."""
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    every_name = model.named_parameters(remove_duplicate=False)
    state = model.state_dict()
    return Architecture(
        name=type(model).__name__,
        parameters={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        aliases={name: names[id(parameter)] for name, parameter in every_name if name not in parameters},
        buffers={name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in state},
        embedding=names[id(model.get_input_embeddings().weight)],
        paired=bool(model.config.is_encoder_decoder),
        _model=model,
    )


def check_base(base: Header) -> Architecture:
    """The base's architecture, after checking that its stored tensors are the parameters.

    Raises:
        InputError: A tensor is missing, unknown or of another shape, or the tokenizer has ids beyond the embedding.
    """
    architecture = read_architecture(base)
    layout = architecture.layout(base)
    if differences := _unexpected(architecture, layout, base):
        mend = f"not the parameters of a {architecture.name}: {_list(differences)}"
        raise InputError(base.folder, base.field, None, mend)
    for parameter in architecture.parameters:
        layout.dtype(base, parameter)
    _check_ties(base, layout)
    _check_tokenizer(base, architecture)
    return architecture


def check_fit(architecture: Architecture, base: Header, other: Header) -> None:
    """Check that a checkpoint has the base's parameters, shapes and vocabulary; its dtypes may differ.

    Tied weights may be stored under all their names or only as the parameter.

    Raises:
        InputError: One for all differences.
    """
    ours, theirs = architecture.layout(base), architecture.layout(other)
    differences = _differences(
        {name: ours.form(base, name) for name in architecture.parameters},
        {name: theirs.form(other, name) for name in theirs.sources},
        architecture.embedding,
    )
    differences += [f"{name} is unknown to it" for name in theirs.unknown]
    differences += [
        f"{name} is stored in another form than the base's"
        for name in sorted(ours.fused | theirs.fused)
        if ours.sources.get(name) != theirs.sources.get(name) and name in theirs.sources
    ]
    vocabulary, own = (read_config(header.folder, header.field).get("vocab_size") for header in (base, other))
    if own != vocabulary:
        differences.append(f"its config.json has a vocabulary (vocab_size) of {own}, the base's of {vocabulary}")
    if differences:
        mend = f"does not fit the base {base.folder}: {_list(differences)}"
        raise InputError(other.folder, other.field, None, mend)
    for parameter in architecture.parameters:
        theirs.dtype(other, parameter)
    _check_ties(other, theirs)
    _check_buffers(base, ours, other, theirs)


def stored_names(architecture: Architecture, base: Header) -> list[str]:
    """Names of the base's stored tensors, in the order of the parameters that they become; tied ones once."""
    sources = architecture.layout(base).sources
    return [stored for parameter in architecture.parameters for stored in sources[parameter]]


def parameter_of(architecture: Architecture, base: Header) -> dict[str, str]:
    """By the base's stored tensors, the parameter that each becomes, or becomes a part of."""
    sources = architecture.layout(base).sources
    return {stored: parameter for parameter, names in sources.items() for stored in names}


def stored_dtypes(architecture: Architecture, header: Header) -> dict[str, torch.dtype]:
    """The dtype that each parameter is stored in."""
    layout = architecture.layout(header)
    return {name: layout.dtype(header, name) for name in architecture.parameters}


def empty_model(folder: Path, dtype: torch.dtype, field: str = "base") -> PreTrainedModel:
    """The model that the folder's config describes, for evaluation, with parameters that have no memory yet.

    Buffers have their values, stored ones and others (rotary frequencies).  Each parameter is one zero, expanded, to
    be replaced through `parameter.data`.

    Raises:
        InputError: The config describes no such model.
    """
    model = _construct(folder, field, dtype, "cpu")
    _load_buffers(model, folder, field)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
    model.train(False)
    return model


def load_model(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model of a checkpoint folder as transformers loads it, from its files alone."""
    silence_transformers()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model: PreTrainedModel = _auto(config).from_pretrained(folder, local_files_only=True, dtype=dtype)
    return model


def silence_transformers() -> None:
    """Switch off transformers' own progress bars."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _auto(config: Any) -> Any:
    """The auto class of a config: causal or sequence-to-sequence language models."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _construct(folder: Path, field: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model of a config with uninitialized parameters (on the CPU, pages that nobody touched)."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with without_initialization(), torch.device(device):
            model: PreTrainedModel = _auto(config).from_config(config, dtype=dtype)
    except CONFIG_ERRORS as error:
        mend = f"no language model can be made of it: {shorten(' '.join(str(error).split()), 200)}"
        raise InputError(folder / "config.json", field, None, mend) from None
    model.tie_weights()
    return model


def _load_buffers(model: PreTrainedModel, folder: Path, field: str) -> None:
    """Fill the buffers that the checkpoint stores."""
    architecture = describe(model)
    if architecture.buffers:
        header = read_header(folder, field)
        buffers, stored = dict(model.named_buffers()), architecture.layout(header).buffers
        for (name, _), (_, tensor) in zip(stored.items(), read_tensors(header, stored.values()), strict=True):
            buffers[name].copy_(tensor)


def _unexpected(architecture: Architecture, layout: Layout, base: Header) -> list[str]:
    """Differences between stored tensors and the architecture's parameters, for an error."""
    stored = {name: layout.form(base, name) for name in layout.sources}
    for name in layout.fused:
        if _adds_up(architecture.parameters[name], stored[name]):
            stored[name] = (architecture.parameters[name],)
    expected = {name: (shape,) for name, shape in architecture.parameters.items()}
    differences = _differences(expected, stored, architecture.embedding)
    return differences + [f"{name} is unknown to it" for name in layout.unknown]


def _adds_up(shape: tuple[int, ...], form: Form) -> bool:
    """The tensors that are fused have as many elements as the parameter."""
    return prod(shape) == sum(prod(part) for part in form)


def _differences(expected: Mapping[str, Form], stored: Mapping[str, Form], embedding: str) -> list[str]:
    """For an error, each parameter that is missing or has other shapes."""
    differences = []
    for name, form in expected.items():
        if name not in stored:
            differences.append(f"{name} is missing")
        elif stored[name] != form:
            hint = " (another vocabulary)" if name == embedding else ""
            differences.append(f"{name} is {_show(stored[name])}, not {_show(form)}{hint}")
    return differences


def _show(form: Form) -> str:
    """Shapes as [2, 3], those that are fused joined by a plus."""
    return " + ".join(str(list(shape)) for shape in form)


def _list(differences: list[str]) -> str:
    """The first differences, and a count of the others."""
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return "; ".join(differences[:_SHOWN]) + more


def _check_tokenizer(base: Header, architecture: Architecture) -> None:
    """Raise InputError where tokenizer.json has an id that the embedding has no row for."""
    file = base.folder / "tokenizer.json"
    if not file.is_file():
        return
    tokenizer = read_json(file, base.field)
    try:
        vocabulary, added = tokenizer["model"].get("vocab", {}), tokenizer.get("added_tokens") or []
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        highest = max([-1, *ids, *(token["id"] for token in added)])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(file, base.field, None, "unreadable tokenizer: copy or save it again") from None
    rows = architecture.parameters[architecture.embedding][0]
    if highest >= rows:
        mend = f"its vocabulary has id {highest}, the embedding {architecture.embedding} only {rows} rows"
        raise InputError(file, base.field, None, mend)


def _check_ties(header: Header, layout: Layout) -> None:
    """Raise InputError where a weight that the config ties is stored twice with different values."""
    for alias, name in layout.aliases.items():
        if name in layout.sources:
            (_, copy), (_, parameter) = read_tensors(header, (alias, layout.sources[name][0]))
            if copy.dtype != parameter.dtype or not torch.equal(copy, parameter):
                mend = f"{alias} and {name} differ, but config.json ties them: set tie_word_embeddings to false"
                raise InputError(header.folder, header.field, None, mend)


def _check_buffers(base: Header, ours: Layout, other: Header, theirs: Layout) -> None:
    """Raise InputError where a stored buffer is not the base's: composites keep the base's."""
    shared = [name for name in ours.buffers if name in theirs.buffers]
    originals = read_tensors(base, [ours.buffers[name] for name in shared])
    others = read_tensors(other, [theirs.buffers[name] for name in shared])
    for name, (_, original), (_, buffer) in zip(shared, originals, others, strict=True):
        if not torch.equal(original, buffer):
            raise InputError(other.folder, other.field, None, f"its buffer {name} is not the base's")
