"""Tasks of lm-evaluation-harness, an optional package: their index, and their documents as prompts and gold answers.

The only module of the package that imports the harness, together with `workflows.lm_eval`, which runs it.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from dem_opt.config import DataFile
from dem_opt.errors import InputError, nearest, shorten
from dem_opt.progress import current_progress

Role = Literal["validation", "held_out"]

_SPLITS: Mapping[Role, Sequence[str]] = {
    "validation": ("validation_split", "training_split", "test_split"),
    "held_out": ("test_split", "validation_split"),
}
"""Keys of a task file that name a split, by what its documents are for; the first that the task has is taken."""

_CHATTER = ("lm_eval", "datasets", "evaluate", "filelock")

_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TemplateError,
    TypeError,
    ValueError,
)
"""Errors of a task's templates and functions, which its authors wrote."""


def import_harness(field: str) -> Any:
    """Import lm-evaluation-harness without its log lines.

    Args:
        field: Field of the study file that needs it.

    Raises:
        InputError: It is not installed.
    """
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lm_eval
            import lm_eval.tasks
    except ImportError:
        mend = "needs lm-evaluation-harness: pip install 'dem-opt[downstream]'"
        raise InputError(None, field, None, mend) from None
    return lm_eval


@cache
def task_manager(include: Path | None, tasks: tuple[str, ...], field: str) -> Any:
    """The index of tasks: that of `include` alone if it has them all, since indexing the harness's takes seconds."""
    manager = import_harness(field).tasks.TaskManager
    if include is None:
        return manager()
    own = manager(include_path=str(include), include_defaults=False)
    return own if {*tasks} <= {*own.all_tasks} else manager(include_path=str(include))


@contextmanager
def in_folder(include: Path | None) -> Iterator[None]:
    """Work in the folder of task files: the harness takes relative `data_files` from the current one."""
    with nullcontext() if include is None else chdir(include):
        yield


def check_tasks(tasks: Sequence[str], include: Path | None, where: Path | str | None, field: str, key: str) -> None:
    """Raise InputError for an unknown task, or for a folder of tasks that does not exist.

    Args:
        tasks: Names of tasks, groups or tags.
        include: Folder of task files beside the harness's own.
        where: The study file, or None.
        field: Section of the study file that names both, for messages.
        key: Its key that names the tasks.
    """
    if include is not None and not include.is_dir():
        raise InputError(include, f"{field}.include", None, "no such folder")
    known = task_manager(include, tuple(tasks), field).all_tasks
    for task in tasks:
        if task not in known:
            hint = nearest(task, known)
            if not hint.startswith("did"):  # there are too many to list them all
                hint = f"`lm-eval ls tasks` lists them; {field}.include adds your own"
            raise InputError(where, f"{field}.{key}", task, f"unknown to lm-evaluation-harness; {hint}")


def gold_answers(data: DataFile, field: str, role: Role) -> list[tuple[str, str]]:
    """Each document of a task as its prompt and its gold answer, those of a group task by task.

    Exactly the texts whose log-likelihood the harness asks for, description, prefixes and delimiters included, without
    worked examples:

        output_type        prompt, gold answer
        loglikelihood      the request
        multiple_choice    the request of the gold choice
        generate_until     the request's prompt, and what a worked example would add to it: the delimiter and the target

    Of several gold answers the first is taken.  Documents without one, such as those of a test split whose labels are
    hidden, are left out, and their number is reported.

    Raises:
        InputError: The harness is missing; the task is unknown, has no gold answers or can't be read; its data set is
            not on this machine.
    """
    assert data.task is not None
    check_tasks([data.task], data.include, None, field, "task")
    parts = [_Part(task, *_documents(task, data, field, role)) for task in _load(data, field)]
    documents = sum(len(part.documents) for part in parts)
    pairs = [pair for part in parts for pair in _answered(part, field)]
    if not pairs:
        mend = "no document has a gold answer; name another split of its data set, or another task"
        raise InputError(None, f"{field}.task", data.task, mend)
    _report(parts, documents - len(pairs), field, role)
    return pairs


@dataclass(frozen=True)
class _Part:
    """Documents of a task: those of one split."""

    task: Any
    split: str
    documents: Sequence[Any]

    @property
    def is_evaluated(self) -> bool:
        """True if the harness evaluates on them."""
        evaluated: str | None = self.task.config.test_split or self.task.config.validation_split
        return self.split == evaluated


def _report(parts: Sequence[_Part], lacking: int, field: str, role: Role) -> None:
    """Say which documents are taken, and where `dem-opt evaluate` scores the same ones."""
    progress = current_progress()
    documents = sum(len(part.documents) for part in parts)
    splits = ", ".join(dict.fromkeys(part.split for part in parts))
    passed = f"; {lacking:,} have no gold answer and were passed over" if lacking else ""
    progress.note(f"{field}: {documents:,} documents of split {splits}, without worked examples{passed}")
    evaluated = [_name(part.task) for part in parts if part.is_evaluated]
    if not evaluated:
        return
    scored = f"{field}: `dem-opt evaluate` scores the same documents of {shorten(', '.join(evaluated), 60)}"
    if role == "validation":
        progress.warning(f"{scored}, so that its metric is no evidence beyond the search")
    else:
        progress.note(scored)


def _answered(part: _Part, field: str) -> list[tuple[str, str]]:
    """Prompts and gold answers of a task's documents."""
    try:
        return [pair for document in part.documents for pair in _gold_answer(part.task, document)]
    except _FAULTS as error:
        mend = f"its documents can't be made prompts and answers ({_first_line(error)}); mend its task file"
        raise InputError(None, f"{field}.task", _name(part.task), mend) from None


def _load(data: DataFile, field: str) -> list[Any]:
    """The tasks of a name, read without network."""
    manager = task_manager(data.include, (str(data.task),), field)
    from datasets.exceptions import DatasetsError

    try:
        with _offline(), in_folder(data.include), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tasks = manager.load([data.task])["tasks"].values()
    except (OSError, DatasetsError, *_FAULTS) as error:
        mend = "mend its task file or documents, or name another task"
        if isinstance(error, OSError):
            mend = "its data set must be on this machine: fetch it once with `lm-eval`, or name local `data_files`"
        reason = f"can't be read ({_first_line(error.__cause__ or error)}); {mend}"
        raise InputError(None, f"{field}.task", data.task, reason) from None
    for task in tasks:
        _check_kind(task, field)
    return list(tasks)


def _check_kind(task: Any, field: str) -> None:
    """Raise InputError for a task whose documents have no prompt and gold answer in words."""
    kind = task.OUTPUT_TYPE
    if not hasattr(task, "build_qa_turn"):
        reason = "is written in Python, not as a task file"
    elif kind not in ("generate_until", "loglikelihood", "multiple_choice"):
        reason = f"has output_type {kind}, and so no gold answers"
    elif task.config.doc_to_image or task.config.doc_to_audio:
        reason = "asks about images or sound"
    else:
        return
    raise InputError(None, f"{field}.task", _name(task), f"{reason}; name another task, or give its texts as a file")


def _documents(task: Any, data: DataFile, field: str, role: Role) -> tuple[str, Sequence[Any]]:
    """The split that the study file names, else the one for the role, and its documents."""
    splits = (data.split, *(task.config[key] for key in _SPLITS[role]))
    split: str | None = next(filter(None, splits), None)
    if split is None or split not in task.dataset:
        mend = f"no such split in the data set of {_name(task)}; it has {', '.join(task.dataset)}"
        raise InputError(None, f"{field}.split", split, mend)
    documents: Sequence[Any] = task.dataset[split]
    process = task.config.process_docs
    return split, documents if process is None else list(process(documents))


def _gold_answer(task: Any, document: Any) -> Iterator[tuple[str, str]]:
    """The prompt and the gold answer of a document; nothing where it has none."""
    prefix = task.doc_to_prefix(document)
    prompt = task.fewshot_context(document, num_fewshot=0, gen_prefix=prefix)
    if task.OUTPUT_TYPE == "generate_until":
        answer = _target(task, document)
        if answer:
            yield prompt, _continuation(task, document, prefix, answer)
        return
    requests = task.construct_requests(doc=document, ctx=prompt, metadata=(task.config.task, 0, 1))
    if task.OUTPUT_TYPE == "loglikelihood":
        yield requests.args
        return
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    choices = task.doc_to_choice(document)
    place = _place(gold, choices)
    if place is not None:
        yield requests[place].args


def _continuation(task: Any, document: Any, prefix: str | None, answer: str) -> str:
    """The text behind the prompt in a worked example of the document, without the delimiter to the next one."""
    asked, answered = (
        "".join(
            message.to_text()
            for message in task.build_qa_turn(
                q=task.doc_to_text(document),
                a=target,
                gen_prefix=prefix,
                tgt_delim=task.config.target_delimiter,
                few_delim="",
            )
        )
        for target in (None, answer)
    )
    if not answered.startswith(asked):
        raise ValueError("a worked example does not begin as the prompt does")
    return answered.removeprefix(asked)


def _target(task: Any, document: Any) -> str | None:
    """The first gold text of a document of generate_until; None where it has none."""
    gold = task.doc_to_target(document)
    if task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(document)
        place = _place(gold, choices)
        return None if place is None else str(choices[place])
    first = next(iter(gold), None) if isinstance(gold, list | tuple) else gold
    return None if first is None else str(first)


def _place(gold: Any, choices: Sequence[str]) -> int | None:
    """Which of the choices is gold; None where the label is missing or no choice."""
    first = next(iter(gold), None) if isinstance(gold, list | tuple) else gold
    if isinstance(first, str):
        return choices.index(first) if first in choices else None
    return first if isinstance(first, int) and 0 <= first < len(choices) else None


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` and the hub's client take what is on this machine, and nothing else.

    Both read an environment variable once, at import, into the module's settings that are changed here.
    """
    import datasets
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before, had_bars = [module.HF_HUB_OFFLINE for module in modules], not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
        if had_bars:
            datasets.enable_progress_bars()


def _name(task: Any) -> str:
    return str(task.config.task)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(" .:")
