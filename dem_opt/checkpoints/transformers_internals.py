"""Everything that this project takes from transformers beyond its public API, with the reason why.

`tests/checkpoints/test_transformers_internals.py` states what each of these must do; after an upgrade of transformers
it says which one has changed.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

# No public call tells which parameter a stored tensor becomes without loading it: from_pretrained decides it inside.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

# A model of a config on the CPU would draw random weights for minutes; the public `init_empty_weights` is for "meta".
from transformers.initialization import no_init_weights

_OLD_BUFFERS = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Buffers that earlier versions of transformers stored in checkpoints, by the end of their name today."""


@dataclass(frozen=True, eq=False)
class LoadingRules:
    """The rules with which transformers turns stored tensors into a model's parameters."""

    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    prefix: str
    state: dict[str, Tensor]
    ignored: re.Pattern[str] | None

    def target(self, stored: str) -> tuple[str, bool]:
        """The name that a stored tensor is loaded under, and whether it is converted (fused, transposed) on the way."""
        name, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, self.state)
        return name, pattern is not None

    def is_ignored(self, name: str) -> bool:
        """Loading passes over this name without a complaint."""
        return self.ignored is not None and self.ignored.search(name) is not None


def loading_rules(model: PreTrainedModel) -> LoadingRules:
    """The rules of a model's class."""
    rules = get_model_conversion_mapping(model)
    return LoadingRules(
        renamings=[rule for rule in rules if isinstance(rule, WeightRenaming)],
        converters=[rule for rule in rules if isinstance(rule, WeightConverter)],
        prefix=model.base_model_prefix,
        state=dict(model.state_dict()),
        ignored=_ignored(model),
    )


def unfused(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors that `save_pretrained` makes of some of a model's parameters; public only as whole files."""
    stored = revert_weight_conversion(model, dict(parameters))
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def without_initialization() -> AbstractContextManager[None]:
    """Construct models with uninitialized parameters: on the CPU, pages that nobody has touched."""
    return no_init_weights()


def layer_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes of a model's layers, which must not be divided over devices."""
    return set(model._no_split_modules or ())  # public only as device_map="auto", which also decides where layers go


def _ignored(model: PreTrainedModel) -> re.Pattern[str] | None:
    """Names that loading passes over: those the class lists, and buffers that older versions stored."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())  # public only as the warnings of from_pretrained
    buffers = [name for name, _ in model.named_buffers()]
    patterns |= {old for end, old in _OLD_BUFFERS.items() if any(name.endswith(end) for name in buffers)}
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None
