"""A study's files, checked against each other and hashed: what its question and its workers are made from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os.path import exists
from pathlib import Path

from dem_opt.checkpoints.adapters import check_adapter, read_adapter
from dem_opt.checkpoints.architecture import Architecture, check_base, check_fit
from dem_opt.checkpoints.files import Header, content_hash, read_header
from dem_opt.checkpoints.hf_config import read_config
from dem_opt.checkpoints.locate import locate
from dem_opt.config import DistributionSection, StudyConfig
from dem_opt.data.tokenize import load_tokenizer, tokenizer_digest
from dem_opt.data.windows import build_corpora
from dem_opt.errors import InputError
from dem_opt.evaluation.interim_analyses import INTERIM_ANALYSES
from dem_opt.planning.hardware import this_machine
from dem_opt.planning.plan import BATCH_TOKENS, Plan, evaluation_dtype, make_plan, refuse_too_large, stored_dtype
from dem_opt.storage.identity import StudyIdentity
from dem_opt.types import SPLITS, Corpus, StoredModel, WorkerSpec

_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class CheckedHeaders:
    """The headers of a study's checkpoints and adapters, which fit together: the base's as "base", others by name."""

    config: StudyConfig
    architecture: Architecture
    headers: Mapping[str, Header]

    def plan(self) -> Plan:
        """What a study of them needs on this machine."""
        model = read_config(self.headers["base"].folder, "base")
        return make_plan(self.architecture, self.headers, model, self.config, this_machine())


@dataclass(frozen=True)
class Inputs:
    """Everything that a study reads.

    stored        what most of the base's tensors are, as torch names the dtype
    experts       by distribution
    batch_tokens  tokens in one forward call at most: a part of the scoring, decided once
    gradients_fit whether memory allows gradients, as far as is known
    device        the kind of device that workers get, "cpu" or "cuda"
    streamed      contents of checkpoints that stay in their files
    """

    config: StudyConfig
    stored: str
    base: StoredModel
    fine_tunes: Mapping[str, StoredModel]
    corpora: tuple[Corpus, ...]
    tokenizer: str
    batch_tokens: int
    gradients_fit: bool = True
    device: str = "cpu"
    streamed: tuple[str, ...] = ()

    def on(self, device: str) -> "Inputs":
        """The same for workers on another kind of device."""
        return replace(self, device=device)

    @property
    def dtype(self) -> str:
        """The evaluation's."""
        return evaluation_dtype(self.config.evaluation.dtype, self.stored, self.device)

    def warnings(self) -> list[str]:
        """What is no mistake but may surprise: checkpoints of the same content, and those that stay in their files."""
        contents = {"base": self.base.content} | {name: one.content for name, one in self.fine_tunes.items()}
        names = [name for name, content in contents.items() if content in self.streamed]
        told = (
            [f"{', '.join(names)}: read from the files at every merge, since not all fits into memory"] if names else []
        )
        return identical_checkpoints(contents) + told

    def identity(self) -> StudyIdentity:
        """The question by content."""
        evaluation = self.config.evaluation
        settings = {
            f"evaluation.{name}": getattr(evaluation, name)
            for name in ("window", "windows", "held_out", "vectors", "seed")
        }
        settings |= {"evaluation.batch": self.batch_tokens, "evaluation.dtype": self.dtype, "looks": INTERIM_ANALYSES}
        return StudyIdentity(
            base=self.base.content,
            fine_tunes={name: expert.content for name, expert in self.fine_tunes.items()},
            space=self.config.space,
            weights=self.config.weights,
            corpora={
                split: {corpus.distribution: corpus.key for corpus in self.corpora if corpus.split == split}
                for split in SPLITS
            },
            settings={name: str(value) for name, value in settings.items()}
            | {"tokenizer": self.tokenizer, "device": self.device},
            protect=self.config.objective.protect,
            worst=self.config.objective.worst,
        )

    def spec(self) -> WorkerSpec:
        """What a worker of this study holds."""
        return WorkerSpec(
            base=self.base,
            fine_tunes=tuple(self.fine_tunes.values()),
            corpora=self.corpora,
            dtype=self.dtype,
            batch_tokens=self.batch_tokens,
            vectors=self.config.evaluation.vectors,
            streamed=self.streamed,
            devices=self.config.compute.gpus_per_worker,
        )

    def exact(self) -> "Inputs":
        """The same with vectors as they are."""
        return replace(self, config=with_exact_vectors(self.config))

    def models(self) -> dict[str, StoredModel]:
        """Base and experts by content."""
        return {model.content: model for model in (self.base, *self.fine_tunes.values())}

    def other(self, folder: Path, field: str) -> StoredModel:
        """Another model, to be scored on this study's corpora.

        Raises InputError for a model that is damaged, or whose tokenizer is not the base's.
        """
        header = read_header(folder, field)
        files = CheckedHeaders(self.config, check_base(header), {"base": header})
        if self.config.compute.ray == "local":
            refuse_too_large(files.plan(), folder)
        if tokenizer_digest(load_tokenizer(folder)) != self.tokenizer:
            raise InputError(folder, field, None, "its tokenizer is not the base's, so perplexities would not compare")
        return StoredModel(folder, content_hash(folder, field))

    def spec_of(self, model: StoredModel) -> WorkerSpec:
        """What a worker holds that scores one other model."""
        devices = self.config.compute.gpus_per_worker
        return WorkerSpec(
            base=model,
            fine_tunes=(),
            corpora=self.corpora,
            dtype=self.dtype,
            batch_tokens=self.batch_tokens,
            devices=devices,
        )


def with_exact_vectors(config: StudyConfig) -> StudyConfig:
    """The same study of vectors as they are."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"vectors": "exact"})})


def memory_shortage(config: StudyConfig, where: object) -> str | None:
    """Why workers of this study don't fit into this machine, where they are to live on it; else None."""
    if config.compute.ray != "local":
        return None
    plan = check_headers(config, where).plan()
    try:
        refuse_too_large(plan, where)
    except InputError as error:
        return str(error)
    return "not all checkpoints would stay in memory" if plan.streamed else None


def check_headers(config: StudyConfig, where: object) -> CheckedHeaders:
    """Headers of the base and of every checkpoint and adapter, which must fit together; reads no weights.

    Raises InputError for what is missing, damaged, of another shape than the base, or can't be divided as asked.
    """
    base = read_header(locate(config.base, "base"), "base")
    architecture = check_base(base)
    architecture.split(config.compute.gpus_per_worker, where)
    _check_gpus(config, where)
    _check_window(base.folder, config.evaluation.window, where)
    headers = {"base": base}
    for name, distribution in config.distributions.items():
        headers[name] = _check_expert(
            architecture, base, name, distribution, where, config.evaluation.vectors == "int8"
        )
    return CheckedHeaders(config, architecture, headers)


def _check_expert(
    architecture: Architecture,
    base: Header,
    name: str,
    distribution: DistributionSection,
    where: object,
    compressed: bool,
) -> Header:
    """The header of a distribution's checkpoint or adapter, which must fit the base."""
    kind, source = distribution.fine_tune
    field = f"distributions.{name}.{kind}"
    untrained = distribution.train is not None and source.place is not None and not exists(source.place)
    if untrained:
        raise InputError(where, field, str(source.place), f"no such folder; `dem-opt train {where}` makes it")
    check_origin(name, distribution, where)
    folder = locate(source, field)
    if kind == "adapter":
        if compressed:
            mend = f"{name} is an adapter, which is small as it is: write exact, or give checkpoints only"
            raise InputError(where, "evaluation.vectors", "int8", mend)
        adapter = read_adapter(folder, field)
        check_adapter(architecture, base, adapter)
        return adapter.header
    header = read_header(folder, field)
    check_fit(architecture, base, header)
    return header


def check_origin(name: str, distribution: DistributionSection, where: object) -> None:
    """Raise InputError for a distribution that has neither a checkpoint nor the data to train it from."""
    kind, source = distribution.fine_tune
    if distribution.train is None and source.place is not None and not exists(source.place):
        mend = f"no such folder; name one that is there, or give distributions.{name}.train, so that it can be trained"
        raise InputError(where, f"distributions.{name}.{kind}", str(source.place), mend)


def _check_gpus(config: StudyConfig, where: object) -> None:
    """Raise InputError where workers that are to live on this machine want several GPUs, and it has none."""
    gpus = config.compute.gpus_per_worker
    if gpus > 1 and config.compute.ray == "local" and this_machine().device == "cpu":
        mend = "this machine has no GPU: leave it out, a worker on CPUs has all the memory anyway"
        raise InputError(where, "compute.gpus_per_worker", gpus, mend)


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


def identical_checkpoints(identities: Mapping[str, str]) -> list[str]:
    """A line for each checkpoint that is the base or another one, given what identifies each ("base" among them)."""
    first: dict[str, str] = {}
    told = []
    for name, header_identity in identities.items():
        other = first.setdefault(header_identity, name)
        if other == "base" != name:
            told.append(f"{name} is identical to the base: its distribution vector is zero")
        elif other != name:
            told.append(f"{name} and {other} have the same weights: nothing can tell their coefficients apart")
    return told


def load_inputs(config: StudyConfig, where: object, worker: bool = True) -> Inputs:
    """Check, tokenize and hash all that a study names.

    worker  whether workers on this machine will hold all of it: then it has to fit

    Raises InputError, naming file and field, before anything is loaded or written.
    """
    files = check_headers(config, where)
    plan, here = files.plan(), config.compute.ray == "local"
    if worker and here:
        refuse_too_large(plan, where)
    folder = files.headers["base"].folder
    tokenizer = load_tokenizer(folder)
    corpora = tuple(
        corpus
        for name, data in config.corpora.items()
        for corpus in build_corpora(name, data, config.evaluation, tokenizer, files.architecture.paired)
    )
    base = StoredModel(folder, content_hash(folder, "base"))
    fine_tunes = {name: _expert(one, files.headers[name], base) for name, one in config.distributions.items()}
    return Inputs(
        config=config,
        stored=stored_dtype(files.headers["base"]),
        base=base,
        fine_tunes=fine_tunes,
        corpora=corpora,
        tokenizer=tokenizer_digest(tokenizer),
        batch_tokens=plan.batch_tokens if here or config.evaluation.batch != "auto" else BATCH_TOKENS,
        gradients_fit=plan.gradients or not here,
        streamed=tuple({one.content for one in (base, *fine_tunes.values()) if here and one.path in plan.streamed}),
    )


def _expert(distribution: DistributionSection, header: Header, base: StoredModel) -> StoredModel:
    """A distribution's checkpoint or adapter with its content."""
    kind, _ = distribution.fine_tune
    if kind == "adapter":
        content = read_adapter(header.folder, header.field).content(base.content)
        return StoredModel(header.folder, content, base.content)
    return StoredModel(header.folder, content_hash(header.folder, header.field))
