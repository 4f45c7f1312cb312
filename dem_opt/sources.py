"""A study's files, checked against each other and hashed: what its question and its residents are made from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dem_opt.checkpoints import Architecture, Header, check_base, check_fit, content_hash, read_header
from dem_opt.config import StudyConfig
from dem_opt.corpus import build_corpora, load_tokenizer, tokenizer_digest
from dem_opt.errors import InputError
from dem_opt.machine import this_machine
from dem_opt.plan import BATCH_TOKENS, Plan, evaluation_dtype, make_plan, refuse_too_large, stored_dtype
from dem_opt.question import SPLITS, Question
from dem_opt.records import Corpus, ResidentSpec, StoredModel


@dataclass(frozen=True)
class Files:
    """The headers of a study's checkpoints, which fit together: the base's as "base", the others by distribution."""

    config: StudyConfig
    architecture: Architecture
    headers: Mapping[str, Header]

    def plan(self) -> Plan:
        """What a study of them needs on this machine."""
        model = json.loads((self.headers["base"].folder / "config.json").read_text(encoding="utf-8"))
        return make_plan(self.architecture, self.headers, model, self.config, this_machine())


@dataclass(frozen=True)
class Sources:
    """Everything that a study reads.

    stored        what most of the base's tensors are, as torch names the dtype
    experts       by distribution
    batch_tokens  tokens in one forward call at most: a part of the scoring, decided once
    device        the kind of device that residents get, "cpu" or "cuda"
    """

    config: StudyConfig
    stored: str
    base: StoredModel
    experts: Mapping[str, StoredModel]
    corpora: tuple[Corpus, ...]
    tokenizer: str
    batch_tokens: int
    device: str = "cpu"

    def on(self, device: str) -> "Sources":
        """The same for residents on another kind of device."""
        return replace(self, device=device)

    @property
    def dtype(self) -> str:
        """The evaluation's."""
        return evaluation_dtype(self.config.evaluation.dtype, self.stored, self.device)

    def warnings(self) -> list[str]:
        """What is no mistake but may surprise: checkpoints of the same content."""
        return tell_twins({"base": self.base.content} | {name: one.content for name, one in self.experts.items()})

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
        )

    def spec(self) -> ResidentSpec:
        """What a resident of this study holds."""
        return ResidentSpec(self.base, tuple(self.experts.values()), self.corpora, self.dtype, self.batch_tokens)

    def folders(self) -> dict[str, Path]:
        """Checkpoint folders by content hash."""
        return {model.content: model.path for model in (self.base, *self.experts.values())}

    def other(self, folder: Path, field: str) -> StoredModel:
        """Another model, to be scored on this study's corpora.

        Raises InputError for a model that is damaged, or whose tokenizer is not the base's.
        """
        header = read_header(folder, field)
        files = Files(self.config, check_base(header), {"base": header})
        if self.config.compute.ray == "local":
            refuse_too_large(files.plan(), folder)
        if tokenizer_digest(load_tokenizer(folder)) != self.tokenizer:
            raise InputError(folder, field, None, "its tokenizer is not the base's, so perplexities would not compare")
        return StoredModel(folder, content_hash(folder, field))

    def spec_of(self, model: StoredModel) -> ResidentSpec:
        """What a resident holds that scores one other model."""
        return ResidentSpec(model, (), self.corpora, self.dtype, self.batch_tokens)


def check_files(config: StudyConfig, where: object) -> Files:
    """Headers of the base and every checkpoint, which must fit together; reads no weights.

    Raises InputError for what is missing, damaged, or of another shape than the base.
    """
    base = read_header(config.base, "base")
    architecture = check_base(base)
    headers = {"base": base}
    for name, distribution in config.distributions.items():
        field = f"distributions.{name}.checkpoint"
        if not distribution.checkpoint.exists() and distribution.train is not None:
            mend = f"no such folder; `dem-opt train {where}` makes it"
            raise InputError(where, field, str(distribution.checkpoint), mend)
        headers[name] = read_header(distribution.checkpoint, field)
        check_fit(architecture, base, headers[name])
    return Files(config, architecture, headers)


def tell_twins(identities: Mapping[str, str]) -> list[str]:
    """A line for each checkpoint that is the base or another one, given what identifies each ("base" among them)."""
    first: dict[str, str] = {}
    told = []
    for name, identity in identities.items():
        other = first.setdefault(identity, name)
        if other == "base" != name:
            told.append(f"{name} is identical to the base: its distribution vector is zero")
        elif other != name:
            told.append(f"{name} and {other} have the same weights: nothing can tell their coefficients apart")
    return told


def gather(config: StudyConfig, where: object, resident: bool = True) -> Sources:
    """Check, tokenize and hash all that a study names.

    resident  whether residents on this machine will hold all of it: then it has to fit

    Raises InputError, naming file and field, before anything is loaded or written.
    """
    files = check_files(config, where)
    plan, here = files.plan(), config.compute.ray == "local"
    if resident and here:
        refuse_too_large(plan, where)
    tokenizer = load_tokenizer(config.base)
    corpora = tuple(
        corpus
        for name, distribution in config.distributions.items()
        for corpus in build_corpora(name, distribution, config.evaluation, tokenizer)
    )
    return Sources(
        config=config,
        stored=stored_dtype(files.headers["base"]),
        base=StoredModel(config.base, content_hash(config.base, "base")),
        experts={
            name: StoredModel(one.checkpoint, content_hash(one.checkpoint, f"distributions.{name}.checkpoint"))
            for name, one in config.distributions.items()
        },
        corpora=corpora,
        tokenizer=tokenizer_digest(tokenizer),
        batch_tokens=plan.batch_tokens if here or config.evaluation.batch != "auto" else BATCH_TOKENS,
    )
