"""A study's files, checked against each other and hashed: what its question and its residents are made from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os.path import exists
from pathlib import Path

from dem_opt.adapters import check_adapter, read_adapter
from dem_opt.checkpoints import DTYPES, Header, content_hash, read_header
from dem_opt.config import Distribution, StudyConfig
from dem_opt.corpus import build_corpora
from dem_opt.declared import read_config
from dem_opt.errors import InputError
from dem_opt.hub import locate
from dem_opt.models import Architecture, check_base, check_fit
from dem_opt.question import SPLITS, Question
from dem_opt.records import Corpus, ResidentSpec, StoredModel
from dem_opt.tokens import load_tokenizer, tokenizer_digest

BATCH_TOKENS = 4096
"""Tokens in one forward call where the study says `batch: auto`."""

_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Files:
    """The headers of a study's checkpoints and adapters, which fit together: the base's as "base", others by name."""

    config: StudyConfig
    architecture: Architecture
    headers: Mapping[str, Header]


@dataclass(frozen=True)
class Sources:
    """Everything that a study reads.

    stored   what most of the base's tensors are, as torch names the dtype
    experts  by distribution
    device   the kind of device that residents get, "cpu" or "cuda"
    """

    config: StudyConfig
    stored: str
    base: StoredModel
    experts: Mapping[str, StoredModel]
    corpora: tuple[Corpus, ...]
    tokenizer: str
    device: str = "cpu"

    def on(self, device: str) -> "Sources":
        """The same for residents on another kind of device."""
        return replace(self, device=device)

    @property
    def dtype(self) -> str:
        """The evaluation's: auto is float32 on CPU (bfloat16 is about three times slower there), else the base's."""
        if self.config.evaluation.dtype != "auto":
            return self.config.evaluation.dtype
        return "float32" if self.device == "cpu" else self.stored

    @property
    def batch_tokens(self) -> int:
        """Tokens in one forward call at most."""
        batch = self.config.evaluation.batch
        return BATCH_TOKENS if batch == "auto" else batch

    def question(self) -> Question:
        """The question by content."""
        evaluation = self.config.evaluation
        settings = {
            f"evaluation.{name}": getattr(evaluation, name) for name in ("window", "windows", "held_out", "seed")
        }
        settings |= {"evaluation.batch": self.batch_tokens, "evaluation.dtype": self.dtype}
        return Question(
            base=self.base.content,
            experts={name: expert.content for name, expert in self.experts.items()},
            total=self.config.simplex.total,
            weights=self.config.weights,
            corpora={
                split: {corpus.distribution: corpus.key for corpus in self.corpora if corpus.split == split}
                for split in SPLITS
            },
            settings={name: str(value) for name, value in settings.items()}
            | {"tokenizer": self.tokenizer, "device": self.device},
            protect=self.config.objective.protect,
        )

    def spec(self) -> ResidentSpec:
        """What a resident of this study holds."""
        return ResidentSpec(self.base, tuple(self.experts.values()), self.corpora, self.dtype, self.batch_tokens)

    def models(self) -> dict[str, StoredModel]:
        """Base and experts by content."""
        return {model.content: model for model in (self.base, *self.experts.values())}

    def other(self, folder: Path, field: str) -> StoredModel:
        """Another model, to be scored on this study's corpora.

        Raises InputError for a model that is damaged, or whose tokenizer is not the base's.
        """
        check_base(read_header(folder, field))
        if tokenizer_digest(load_tokenizer(folder)) != self.tokenizer:
            raise InputError(folder, field, None, "its tokenizer is not the base's, so perplexities would not compare")
        return StoredModel(folder, content_hash(folder, field))

    def spec_of(self, model: StoredModel) -> ResidentSpec:
        """What a resident holds that scores one other model."""
        return ResidentSpec(model, (), self.corpora, self.dtype, self.batch_tokens)


def check_files(config: StudyConfig, where: object) -> Files:
    """Headers of the base and of every checkpoint and adapter, which must fit together; reads no weights.

    Raises InputError for what is missing, damaged, or of another shape than the base.
    """
    base = read_header(locate(config.base, "base"), "base")
    architecture = check_base(base)
    _check_window(base.folder, config.evaluation.window, where)
    headers = {"base": base}
    for name, distribution in config.distributions.items():
        headers[name] = _check_expert(architecture, base, name, distribution, where)
    return Files(config, architecture, headers)


def _check_expert(
    architecture: Architecture, base: Header, name: str, distribution: Distribution, where: object
) -> Header:
    """The header of a distribution's checkpoint or adapter, which must fit the base."""
    kind, source = distribution.expert
    field = f"distributions.{name}.{kind}"
    folder = locate(source, field)
    if kind == "adapter":
        adapter = read_adapter(folder, field)
        check_adapter(architecture, base, adapter)
        return adapter.header
    if not exists(folder) and distribution.train is not None:
        raise InputError(where, field, str(folder), f"no such folder; `dem-opt train {where}` makes it")
    header = read_header(folder, field)
    check_fit(architecture, base, header)
    return header


def _check_window(base: Path, window: int, where: object) -> None:
    """Raise InputError where a window has more tokens than the base has positions.

    GPT-2 and its like call them n_positions, which is no limit to T5 and its like; a config may name no limit.
    """
    described = read_config(base, "base")
    names = _POSITIONS[:1] if described.get("is_encoder_decoder") else _POSITIONS
    positions = next((described[name] for name in names if isinstance(described.get(name), int)), None)
    if positions is not None and window > positions:
        mend = f"the base has {positions} positions, as its config.json says; ask for shorter windows"
        raise InputError(where, "evaluation.window", window, mend)


def gather(config: StudyConfig, where: object) -> Sources:
    """Check, tokenize and hash all that a study names.

    Raises InputError, naming file and field, before anything is loaded or written.
    """
    files = check_files(config, where)
    folder = files.headers["base"].folder
    tokenizer = load_tokenizer(folder)
    corpora = tuple(
        corpus
        for name, data in config.corpora.items()
        for corpus in build_corpora(name, data, config.evaluation, tokenizer, files.architecture.paired)
    )
    base = StoredModel(folder, content_hash(folder, "base"))
    return Sources(
        config=config,
        stored=_dtype(files.headers["base"]),
        base=base,
        experts={name: _expert(one, files.headers[name], base) for name, one in config.distributions.items()},
        corpora=corpora,
        tokenizer=tokenizer_digest(tokenizer),
    )


def _expert(distribution: Distribution, header: Header, base: StoredModel) -> StoredModel:
    """A distribution's checkpoint or adapter with its content."""
    kind, _ = distribution.expert
    if kind == "adapter":
        content = read_adapter(header.folder, header.field).content(base.content)
        return StoredModel(header.folder, content, base.content)
    return StoredModel(header.folder, content_hash(header.folder, header.field))


def _dtype(base: Header) -> str:
    """The dtype of most tensors."""
    counts = Counter(tensor.dtype for tensor in base.tensors.values())
    return str(DTYPES[counts.most_common(1)[0][0]]).removeprefix("torch.")
