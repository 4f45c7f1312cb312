"""A study's inputs: checkpoints, adapters, tokenizer and texts, checked against each other and hashed.

`check_headers` reads headers only; `load_inputs` also tokenizes and hashes, which the study's identity and the workers'
spec are made from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os.path import exists
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dem_opt.checkpoints.adapters import check_adapter, read_adapter
from dem_opt.checkpoints.architecture import Architecture
from dem_opt.checkpoints.configuration import check_configuration, read_configuration
from dem_opt.checkpoints.convert import conversion_of
from dem_opt.checkpoints.files import Header, content_hash, read_header
from dem_opt.checkpoints.fit import check_base, check_fit, left_out
from dem_opt.checkpoints.hf_config import read_config
from dem_opt.checkpoints.locate import locate
from dem_opt.checkpoints.parameter_groups import parameter_groups
from dem_opt.checkpoints.vocabulary import fitted_content, with_base_rows
from dem_opt.config import FineTune, StudyConfig
from dem_opt.config.objective_function import ObjectiveFunction
from dem_opt.data.chat_template import writes_date
from dem_opt.data.tokenize import load_tokenizer, tokenizer_digest, without_pad_beyond
from dem_opt.data.windows import build_corpora, refuse_ids_beyond
from dem_opt.errors import InputError, located
from dem_opt.evaluation.interim_analyses import INTERIM_ANALYSES, windows_by_analysis
from dem_opt.grouping import GroupSettings
from dem_opt.planning.hardware import this_machine
from dem_opt.planning.plan import BATCH_TOKENS, Plan, evaluation_dtype, make_plan, refuse_too_large, stored_dtype
from dem_opt.planning.tokenizers import other_tokenizers
from dem_opt.planning.vertices import VertexCheck, check_vertices, shortage
from dem_opt.progress import current_progress
from dem_opt.storage.identity import StudyIdentity
from dem_opt.types import BITS_PER_BYTE, SPLITS, Corpus, CorpusLayout, StoredModel, WorkerSpec

POSITIONS = ("max_position_embeddings", "n_positions")
"""Names of the number of positions in config.json; GPT-2 and its like have the second."""


@dataclass(frozen=True)
class CheckedHeaders:
    """Headers of a study's checkpoints and adapters that fit together: of the base as "base", of the others by name.

    Attributes:
        other_fields: Warnings of config.json files with fields that differ from the base's and compute nothing.
    """

    config: StudyConfig
    architecture: Architecture
    headers: Mapping[str, Header]
    other_fields: tuple[str, ...] = ()

    @property
    def rounds(self) -> bool:
        """Whether some of the base's tensors have 16 bits, to which composites are rounded."""
        return any(tensor.dtype != "F32" for tensor in self.headers["base"].tensors.values())

    def stored_models(self) -> tuple[StoredModel, dict[str, StoredModel]]:
        """Hash the base, and the fine-tunes by name."""
        base = replace(_stored_checkpoint(self.headers["base"]), rounding=self.config.base.rounding)
        fine_tunes = {
            name: _stored_model(fine_tune, self.headers[name], base)
            for name, fine_tune in self.config.fine_tunes.items()
        }
        return base, fine_tunes

    def check_vertices(self) -> VertexCheck:
        """Check that vertices compute what their fine-tunes compute (`vertices.check_vertices`), and hash them."""
        if reason := shortage(self.architecture, self.headers):
            return VertexCheck((f"no model is compared with its own forward pass: {reason}",))
        return check_vertices(*self.stored_models(), self.headers)

    def groups(self, where: Path | None) -> GroupSettings | None:
        """The groups of parameters that the study file asks for; InputError where it can't have them."""
        section, search = self.config.coefficients, self.config.search
        grouping = parameter_groups(section.groups, self.architecture, where)
        if grouping is None:
            return None
        if search.algorithm == "grid":
            points = self.config.space.lattice_size(search.divisions) ** len(grouping)
            mend = (
                f"a grid of {len(grouping)} groups has {points:.2g} points, and the limit is {search.grid_limit}: "
                "choose another algorithm, or leave coefficients.groups out"
            )
            raise InputError(where, "search.algorithm", "grid", mend)
        shrink = None if section.shrink == "auto" else 0.0 if section.shrink == "none" else section.shrink
        return GroupSettings(grouping=grouping, shrink=shrink, forwards=section.forwards)

    def warnings(self) -> list[str]:
        """Warn of fine-tunes whose tokenizer, chat template or config.json is not the base's, which composites have."""
        base, *fine_tunes = self.headers.items()
        folders = {name: header.folder for name, header in fine_tunes}
        chats = any(
            file is not None and file.format == "messages"
            for data in self.config.corpora.values()
            for file in (data.validation, data.held_out)
        )
        return [*self.other_fields, *other_tokenizers(base[1].folder, folders, chats)]

    def left_out(self) -> list[str]:
        """Say which tensors are passed over, which names were understood otherwise, and which weights converted."""
        names: dict[str, list[str]] = {}
        for name, header in self.headers.items():
            lines = [] if header.adapter else left_out(self.architecture, header)
            for line in (*lines, *([conversion] if (conversion := conversion_of(header.folder)) else [])):
                names.setdefault(line, []).append(name)
        return [f"{', '.join(checkpoints)}: {line}" for line, checkpoints in names.items()]

    def plan(self) -> Plan:
        """Plan the study on this machine."""
        model = read_config(self.headers["base"].folder, "base")
        return make_plan(self.architecture, self.headers, model, self.config, this_machine())


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a study reads.

    Attributes:
        config: The study file.
        stored: Torch's name of the dtype that most of the base's tensors are stored in.
        rounds: See `CheckedHeaders`.
        base: The base.
        fine_tunes: Checkpoints and adapters by distribution.
        corpora: Windows of every corpus, for both splits.
        tokenizer: Digest of the base's tokenizer.
        batch_tokens: Most tokens of a forward call: a part of the scoring, decided once.
        gradients_fit: Whether memory suffices for gradients, as far as is known.
        device: The kind of device that workers get, "cpu" or "cuda".
        streamed: Contents of checkpoints that stay in their files.
        left_out: Tensors of the checkpoints that are passed over, in words.
        unlike_base: Warnings of what fine-tunes have otherwise than the base, or may compute otherwise than vertices.
        configuration: That of the study's identity.
        compared_tokens: Forward tokens of comparing vertices with their fine-tunes.
        groups: Groups of parameters that have coefficients of their own.
    """

    config: StudyConfig
    stored: str
    rounds: bool
    base: StoredModel
    fine_tunes: Mapping[str, StoredModel]
    corpora: tuple[Corpus, ...]
    tokenizer: str
    batch_tokens: int
    gradients_fit: bool = True
    device: str = "cpu"
    streamed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unlike_base: tuple[str, ...] = ()
    configuration: str = ""
    compared_tokens: int = 0
    groups: GroupSettings | None = None

    def on(self, device: str) -> "Inputs":
        """The same inputs for workers on another kind of device."""
        return replace(self, device=device)

    @property
    def dtype(self) -> str:
        """Torch's name of the evaluation's dtype."""
        return evaluation_dtype(self.config.evaluation.dtype, self.stored, self.device)

    def warnings(self) -> list[str]:
        """Warn of distributions without a weight, of checkpoints that are alike or streamed, and of `unlike_base`."""
        contents = {"base": self.base.content} | {name: model.content for name, model in self.fine_tunes.items()}
        streamed = [name for name, content in contents.items() if content in self.streamed]
        warnings = [*unweighted_distributions(self.config), *identical_checkpoints(contents), *self.unlike_base]
        if streamed:
            reason = "read from the files at every merge, because not all checkpoints fit into memory"
            warnings.append(f"{', '.join(streamed)}: {reason}")
        return warnings

    def identity(self) -> StudyIdentity:
        """The study's identity: everything that its scores and its objective depend on, by content."""
        evaluation = self.config.evaluation
        settings = {
            f"evaluation.{name}": getattr(evaluation, name)
            for name in ("window", "windows", "held_out", "vectors", "seed")
        }
        settings |= {"evaluation.batch": self.batch_tokens, "evaluation.dtype": self.dtype, "looks": INTERIM_ANALYSES}
        settings |= {"base.rounding": self.base.rounding} if self.rounds and self.base.rounding != "nearest" else {}
        return StudyIdentity(
            base=self.base.content,
            fine_tunes={name: model.content for name, model in self.fine_tunes.items()},
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
            unit=self.config.objective.unit,
            pareto=self.config.axes,
            function=ObjectiveFunction.load(self.config.objective.function) if self.config.objective.function else None,
            configuration=self.configuration,
            groups=self.groups,
        )

    def layouts(self) -> dict[str, CorpusLayout]:
        """Bytes and documents of the windows, by corpus key."""
        return {corpus.key: layout for corpus in self.corpora if (layout := corpus.windows.layout) is not None}

    def spec(self) -> WorkerSpec:
        """Specify a worker of this study."""
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
        """The same inputs with exact vectors."""
        return replace(self, config=with_exact_vectors(self.config))

    def models(self) -> dict[str, StoredModel]:
        """Base and fine-tunes by content."""
        return {model.content: model for model in (self.base, *self.fine_tunes.values())}

    def other(self, folder: Path, field: str) -> StoredModel:
        """Check another model, to be scored on this study's corpora.

        Raises:
            InputError: It is damaged or too large, or its tokenizer is not the base's.
        """
        header = read_header(folder, field)
        headers = CheckedHeaders(self.config, check_base(header), {"base": header})
        if self.config.compute.ray == "local":
            refuse_too_large(headers.plan(), folder)
        if tokenizer_digest(load_tokenizer(folder)) != self.tokenizer:
            raise InputError(folder, field, None, "its tokenizer is not the base's, so perplexities would not compare")
        return _stored_checkpoint(header)

    def spec_of(self, model: StoredModel) -> WorkerSpec:
        """Specify a worker that scores one other model."""
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
    """The same study with exact vectors."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"vectors": "exact"})})


def memory_shortage(config: StudyConfig, where: Path) -> str | None:
    """Say why a study's workers do not fit into this machine; None where they do, or live elsewhere."""
    if config.compute.ray != "local":
        return None
    plan = check_headers(config, where).plan()
    try:
        refuse_too_large(plan, where)
    except InputError as error:
        return str(error)
    return "not all checkpoints would stay in memory" if plan.memory.streamed else None


def check_headers(config: StudyConfig, where: Path) -> CheckedHeaders:
    """Read and check the headers of the base and of every checkpoint and adapter; no weights are read.

    Raises:
        InputError: A file is missing or damaged, a shape is not the base's, a window is longer than the base's
            positions, the layers can't be divided over `compute.gpus_per_worker`, or parameters not into groups.
    """
    base = read_header(locate(config.base, "base"), "base")
    architecture = check_base(base)
    architecture.split(config.compute.gpus_per_worker, where)
    _check_gpus(config, where)
    check_window(base.folder, config.evaluation.window, where)
    headers, other_fields = {"base": base}, list[str]()
    for name, fine_tune in config.fine_tunes.items():
        place = fine_tune.source.place
        if fine_tune.is_trained and place is not None and not exists(place):
            mend = f"no such folder; `dem-opt train {where}` makes it"
            raise InputError(where, fine_tune.field, str(place), mend)
        check_origin(fine_tune, where)
        folder = locate(fine_tune.source, fine_tune.field)
        if fine_tune.kind == "adapter":
            headers[name] = _check_adapter(architecture, base, name, folder, fine_tune.field, config, where)
        else:
            header = read_header(folder, fine_tune.field)
            check_fit(architecture, base, header)
            headers[name] = with_base_rows(architecture, base, header)
            other_fields += check_configuration(base.folder, folder, fine_tune.field)
    checked = CheckedHeaders(config, architecture, headers, tuple(other_fields))
    checked.groups(where)
    return checked


def check_base_alone(folder: Path) -> list[str]:
    """Check a base as a study does, before it is trained.

    Returns:
        A warning, where its forward pass can't be compared.

    Raises:
        InputError: A study would refuse it.
    """
    base = read_header(folder, "base")
    headers = {"base": base}
    if reason := shortage(check_base(base), headers):
        return [f"the base is not compared with its own forward pass: {reason}"]
    return list(check_vertices(_stored_checkpoint(base), {}, headers).warnings)


def _check_adapter(
    architecture: Architecture, base: Header, name: str, folder: Path, field: str, config: StudyConfig, where: Path
) -> Header:
    """Read and check an adapter's header."""
    if config.evaluation.vectors == "int8":
        mend = f"{name} is an adapter, which is small as it is: write exact, or give checkpoints only"
        raise InputError(where, "evaluation.vectors", "int8", mend)
    adapter = read_adapter(folder, field)
    check_adapter(architecture, base, adapter)
    return adapter.header


def check_origin(fine_tune: FineTune, where: Path) -> None:
    """Raise InputError for a fine-tune that is missing, and has no data to be trained on."""
    place = fine_tune.source.place
    if fine_tune.train_field is None or fine_tune.is_trained or place is None or exists(place):
        return
    mend = f"no such folder; name one that is there, or give {fine_tune.train_field}, so that it can be trained"
    raise InputError(where, fine_tune.field, str(place), mend)


def refuse_several(config: StudyConfig, where: Path, mend: str) -> None:
    """Raise InputError for a study with a distribution of several steps, or with vectors beside its distributions."""
    for name, distribution in config.distributions.items():
        kind, source = distribution.fine_tune
        if isinstance(source.step, list):
            raise InputError(where, f"distributions.{name}.{kind}.step", source.step, mend)
    if config.vectors:
        raise InputError(where, f"vectors.{next(iter(config.vectors))}", None, mend)


def _check_gpus(config: StudyConfig, where: Path) -> None:
    """Raise InputError where workers on this machine ask for several GPUs, and it has none."""
    gpus = config.compute.gpus_per_worker
    if gpus > 1 and config.compute.ray == "local" and this_machine().device == "cpu":
        mend = "this machine has no GPU: leave it out, a worker on CPUs has all the memory anyway"
        raise InputError(where, "compute.gpus_per_worker", gpus, mend)


def check_window(base: Path, window: int, where: Path) -> None:
    """Raise InputError where a window has more tokens than the base has positions; a config may name no limit."""
    model = read_config(base, "base")
    names = POSITIONS[:1] if model.get("is_encoder_decoder") else POSITIONS  # T5's n_positions limits nothing
    positions = next((model[name] for name in names if isinstance(model.get(name), int)), None)
    if positions is not None and window > positions:
        mend = f"the base has {positions} positions, as its config.json says; ask for shorter windows"
        raise InputError(where, "evaluation.window", window, mend)


def unweighted_distributions(config: StudyConfig) -> list[str]:
    """Warn of distributions that are left out of the objective's weights, and so of the mean."""
    if not config.unweighted:
        return []
    left_out, weights = ", ".join(config.unweighted), ", ".join(config.objective.weights or ())
    mend = f"{'it weighs' if len(config.unweighted) == 1 else 'they weigh'} 0 in the objective, which is of {weights}"
    return [f"objective.weights leaves out {left_out}: {mend}; write 0 where that is meant"]


def identical_checkpoints(identities: Mapping[str, str]) -> list[str]:
    """Warn of each checkpoint that is the base or another one.

    Args:
        identities: Content hash or another identity of each checkpoint by name, "base" among them.
    """
    first_names: dict[str, str] = {}
    warnings = []
    for name, identity in identities.items():
        other = first_names.setdefault(identity, name)
        if other == "base" != name:
            warnings.append(f"{name} is identical to the base: its distribution vector is zero")
        elif other != name:
            warnings.append(f"{name} and {other} have the same weights: nothing can tell their coefficients apart")
    return warnings


def load_inputs(config: StudyConfig, where: Path, worker: bool = True) -> Inputs:
    """Check, tokenize and hash everything that a study names; nothing is written.

    Args:
        config: The study file.
        where: Its path, for messages.
        worker: Whether workers on this machine will load all of it, so that it has to fit into memory.

    Raises:
        InputError: An input is missing, damaged or does not fit; names file and field.
    """
    checked = check_headers(config, where)
    groups = checked.groups(where)
    plan, is_local = checked.plan(), config.compute.ray == "local"
    if worker and is_local:
        refuse_too_large(plan, where)
    tokenizer, corpora = load_corpora(checked, where)
    base, fine_tunes = checked.stored_models()
    streamed = {
        model.content for model in (base, *fine_tunes.values()) if is_local and model.path in plan.memory.streamed
    }
    vertices = checked.check_vertices()
    return Inputs(
        config=config,
        stored=stored_dtype(checked.headers["base"]),
        rounds=checked.rounds,
        base=base,
        fine_tunes=fine_tunes,
        corpora=corpora,
        tokenizer=tokenizer_digest(tokenizer),
        batch_tokens=plan.calls.batch_tokens if is_local or config.evaluation.batch != "auto" else BATCH_TOKENS,
        gradients_fit=plan.gradients_fit or not is_local,
        streamed=tuple(streamed),
        left_out=tuple(checked.left_out()),
        unlike_base=(*checked.warnings(), *vertices.warnings),
        compared_tokens=vertices.tokens,
        groups=groups,
    )


def load_corpora(checked: CheckedHeaders, where: Path) -> tuple[PreTrainedTokenizerBase, tuple[Corpus, ...]]:
    """Read and tokenize a study's texts; `where` is the study file, which messages name.

    Returns:
        The base's tokenizer, and the windows of every corpus for both splits.

    Raises:
        InputError: A file is missing, damaged or of another format, has too little text, or a token that the base has
            no row for.
    """
    config, folder = checked.config, checked.headers["base"].folder
    rows = checked.architecture.parameters[checked.architecture.embedding][0]
    tokenizer = without_pad_beyond(load_tokenizer(folder), rows)
    with located(where):
        corpora = tuple(
            corpus
            for name, data in config.corpora.items()
            for corpus in build_corpora(name, data, config.evaluation, tokenizer, checked.architecture.paired)
        )
    for corpus in corpora:
        refuse_ids_beyond(corpus.windows, rows, folder, f"{corpus.distribution}, {corpus.split}")
        if config.objective.unit == BITS_PER_BYTE:
            _refuse_without_bytes(corpus, where)
    if writes_date(tokenizer) and any(data.validation.format == "messages" for data in config.corpora.values()):
        current_progress().note(f"the chat template writes today's date: {config.evaluation.date} (evaluation.date)")
    return tokenizer, corpora


def _refuse_without_bytes(corpus: Corpus, where: Path) -> None:
    """Raise InputError where the windows that a race sees first score no byte of text."""
    first = windows_by_analysis(len(corpus.windows))[0]
    if not sum(corpus.windows.bytes_W[:first]):
        which = f"no byte of text is scored in {corpus.distribution}, {corpus.split.replace('_', '-')} split"
        raise InputError(where, "objective.unit", BITS_PER_BYTE, f"{which}; give longer documents, or nats_per_token")


def _stored_checkpoint(header: Header) -> StoredModel:
    """A checkpoint with its content hash and its configuration."""
    return StoredModel(
        header.folder,
        content_hash(header.folder, header.field),
        field=header.field,
        configuration=read_configuration(header.folder, header.field).text,
    )


def _stored_model(fine_tune: FineTune, header: Header, base: StoredModel) -> StoredModel:
    """A checkpoint or adapter with its content hash."""
    if fine_tune.kind == "adapter":
        content = read_adapter(header.folder, header.field).content(base.content)
        return StoredModel(header.folder, content, base.content, header.field)
    model = _stored_checkpoint(header)
    if header.rows is None:
        return model
    return replace(model, content=fitted_content(base.content, model.content), vocabulary=base.content)
