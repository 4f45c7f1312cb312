"""The parameters that a model class has, and the stored tensors of a checkpoint that they come from.

config.json --> Architecture (parameters, ties, buffers)       stored tensors --> Layout --> parameters
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, cast
from warnings import catch_warnings, simplefilter

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from dem_opt.checkpoints.device_map import Split, language_model, split_layers
from dem_opt.checkpoints.files import Header, read_header, read_tensors
from dem_opt.checkpoints.hf_config import refuse_endless
from dem_opt.checkpoints.layout import Layout, lay_out
from dem_opt.checkpoints.transformers_internals import LoadingRules, loading_rules, unfused, without_initialization
from dem_opt.errors import InputError, shorten

CONFIG_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    *(OSError, ImportError, StrictDataclassError),
)
"""Errors that transformers raises for configs that describe no model."""

_ENUMERATION = re.compile(r",? or contain one of|\.? Should contain one of|\.? Model type should be one of")
"""Words of transformers' errors before a list of all of its classes."""


@dataclass(frozen=True)
class Architecture:
    """A model without its weights, as its config describes it.

    Attributes:
        name: Name of the model class.
        parameters: Shape by name in the order of `named_parameters()`; tied weights once.  Of a vision-language model,
            those of its language model.
        aliases: The other names of tied weights, with the parameter that each stands for.
        buffers: Shape by name of stored tensors that are no parameters.
        outside: Names of parameters that are no part of the language model, such as a vision tower's.
        embedding: Name of the input embedding, whose first dimension is the vocabulary.
        head: Name of the output embedding, where it is a parameter of its own.
        vocabulary: Names of the parameters with a row for each token: input and output embedding, and its bias.
        paired: The model is an encoder-decoder, whose documents are pairs of source and target.
    """

    name: str
    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    buffers: Mapping[str, tuple[int, ...]]
    outside: frozenset[str]
    embedding: str
    head: str | None
    vocabulary: tuple[str, ...]
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

    def layout(self, header: Header) -> Layout:
        """Match a checkpoint's tensors with parameters.

        Checkpoints of one model have the same names, for which the layout is computed once.
        """
        names = tuple(header.tensors)
        if names not in self._layouts:
            self._layouts[names] = lay_out(self, names)
        return self._layouts[names]

    def current_name(self, name: str) -> str:
        """The name that a stored tensor of this name is loaded under."""
        return self.rules.target(name)[0]

    def as_stored(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, by name, that parameters are saved as: fused ones are taken apart."""
        return unfused(self._model, parameters)

    def stored_as(self, parameter: str) -> set[str]:
        """The names that a parameter is saved under."""
        return {*self.as_stored({parameter: torch.empty(self.parameters[parameter], device="meta")})}

    def module_of(self, parameter: str) -> nn.Module | None:
        """The module that a parameter belongs to, without weights; None for names that the model does not have."""
        try:
            return self._model.get_submodule(parameter.rpartition(".")[0])
        except AttributeError:
            return None

    def names_of(self, parameter: str) -> list[str]:
        """All names of a parameter, its own first; several for a tied weight."""
        return [parameter, *(alias for alias, target in self.aliases.items() if target == parameter)]

    def stores_inputs_first(self, parameter: str) -> bool:
        """The parameter's module, GPT-2's linear maps or some stacks of experts, stores [inputs, outputs]."""
        module = self.module_of(parameter)
        return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))

    @cached_property
    def _layouts(self) -> dict[tuple[str, ...], Layout]:
        return {}

    @cached_property
    def rules(self) -> LoadingRules:
        """The rules with which transformers loads stored tensors into the class."""
        return loading_rules(self._model)


def read_architecture(header: Header) -> Architecture:
    """Parameter names, shapes and ties of the model that the folder's config describes.

    Raises:
        InputError: transformers can't make a language model of the config, or would not finish.
    """
    return describe(read_meta_model(header))


def read_meta_model(header: Header) -> PreTrainedModel:
    """The model that the folder's config describes, without memory for its parameters.

    Raises:
        InputError: transformers can't make a language model of the config, or would not finish.
    """
    refuse_endless(header.folder, header.field, len(header.tensors))
    return _construct(header.folder, header.field, torch.float32, "meta")


def describe(model: PreTrainedModel) -> Architecture:
    """A model's architecture."""
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    every_name = model.named_parameters(remove_duplicate=False)
    state = model.state_dict()
    embedding, output = model.get_input_embeddings().weight, _output_embedding(model)
    head, tokens = getattr(output, "weight", None), [embedding, *(output.parameters() if output is not None else ())]
    outside = frozenset(parameters.keys() - {names[id(parameter)] for parameter in _language_parameters(model)})
    return Architecture(
        name=type(model).__name__,
        parameters={name: tuple(parameter.shape) for name, parameter in parameters.items() if name not in outside},
        aliases={
            name: names[id(parameter)]
            for name, parameter in every_name
            if name not in parameters and names[id(parameter)] not in outside
        },
        buffers={name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in state},
        outside=outside,
        embedding=names[id(embedding)],
        head=names[id(head)] if head is not None and head is not embedding else None,
        vocabulary=tuple(dict.fromkeys(names[id(parameter)] for parameter in tokens)),
        paired=bool(model.config.is_encoder_decoder),
        _model=model,
    )


def _language_parameters(model: PreTrainedModel) -> Iterator[torch.nn.Parameter]:
    """Parameters of the language model: of a model that reads images too, of its decoder and output embedding."""
    head = _output_embedding(model)
    return chain(language_model(model).parameters(), () if head is None else head.parameters())


def _output_embedding(model: PreTrainedModel) -> torch.nn.Module | None:
    return cast(torch.nn.Module | None, model.get_output_embeddings())  # type: ignore[no-untyped-call]


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


def load_model(folder: Path, dtype: torch.dtype | str, **settings: Any) -> PreTrainedModel:
    """The model of a checkpoint folder as transformers loads it, from its files alone, without a wrapper's names."""
    silence_transformers()
    header = read_header(folder, "checkpoint")
    empty = _construct(folder, "checkpoint", torch.float32, "meta")
    renaming = describe(empty).layout(header).renaming
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    settings |= {"config": config, "dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    with silent():  # what is passed over has been told by name
        if not renaming.changes(header.tensors):
            return cast(PreTrainedModel, _auto(config).from_pretrained(folder, **settings))
        tensors = {renaming(name): tensor for name, tensor in read_tensors(header, header.tensors)}
        return type(empty).from_pretrained(None, state_dict=tensors, **settings)


def silence_transformers() -> None:
    """Switch off transformers' own progress bars."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def silent() -> Iterator[None]:
    """Neither warnings nor reports of the libraries: what matters is in the result."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with catch_warnings():
            simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _auto(config: Any) -> Any:
    """The auto class of a config: language models, or those that read images or sound too.

    Raises:
        ValueError: transformers has no such class for this config.
    """
    if config.is_encoder_decoder:
        classes: dict[Any, Any] = {AutoModelForSeq2SeqLM: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING}
    else:
        classes = {
            AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
            AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
        }
    for auto, known in classes.items():
        if type(config) in known:
            return auto
    raise ValueError(f"transformers has no language model of the type {config.model_type}")


def _construct(folder: Path, field: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model of a config with uninitialized parameters (on the CPU, pages that nobody touched)."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with without_initialization(), torch.device(device):
            model: PreTrainedModel = _auto(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        reason = shorten(_ENUMERATION.split(" ".join(str(error).split()))[0], 200)
        mend = f"no language model can be made of it: {reason}"
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
