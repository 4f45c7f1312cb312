"""Write a study file from folders: find models, adapters and data, match them by name, check that they fit together."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dem_opt.checkpoints.files import read_json
from dem_opt.checkpoints.hf_config import read_config
from dem_opt.config import DataFile, EvaluationSection, StudyConfig
from dem_opt.data.documents import first_document
from dem_opt.data.files import is_data_file
from dem_opt.data.tokenize import load_tokenizer
from dem_opt.data.windows import build_corpora
from dem_opt.errors import InputError
from dem_opt.planning.inputs import POSITIONS, check_headers

DEPTH = 4
"""Folders below a named one that are looked into."""

Role = Literal["validation", "held_out", "train"]

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "heldout", "held_out", "held-out", "holdout"), "held_out"),
    **dict.fromkeys(("train", "training"), "train"),
}
"""Parts of a data file's path that say what the file is for."""

FORMS: tuple[Mapping[str, str], ...] = (
    {},
    {"format": "messages"},
    {"format": "prompt_completion"},
    {"format": "prompt_completion", "completion": "response"},
    {"format": "prompt_completion", "prompt": "question", "completion": "answer"},
    {"format": "prompt_completion", "prompt": "instruction", "completion": "output"},
    {"format": "prompt_completion", "prompt": "instruction", "completion": "response"},
    {"format": "prompt_completion", "prompt": "input", "completion": "output"},
    {"text": "content"},
    {"text": "body"},
    {"text": "document"},
)
"""Forms of data that are tried in turn: the format, and columns with other names."""

WINDOW_SIZES = ((1024, 64), (1024, 32), (512, 64), (512, 32), (256, 64), (256, 32), (128, 64), (128, 32), (64, 32))
"""Tokens and number of windows that are tried in turn, until every distribution has text enough for both splits."""

LEAST = ((128, 8), (64, 8), (32, 8), (32, 4), (16, 2))
"""Those for very little text."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")


@dataclass
class Findings:
    """Contents of the folders.

    Attributes:
        models: Folders of models.
        adapters: Folders of adapters.
        data: Data files.
        unused: Why something was not used, by path.
    """

    models: list[Path] = field(default_factory=list)
    adapters: list[Path] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NewStudy:
    """A study file that was written.

    Attributes:
        path: The file.
        base: Folder of the base.
        distributions: Folder of each distribution's fine-tune.
        unused: Why something was not used, by path.
    """

    path: Path
    base: str
    distributions: dict[str, str]
    unused: dict[str, str]


def write_study(folders: Sequence[Path], out: Path, base: Path | None = None, name: str | None = None) -> NewStudy:
    """Write a study file for the models, adapters and data in some folders; `check` accepts it.

    Args:
        folders: Folders to look into.
        out: The file, which must not exist.
        base: Folder of the base; found by its name or by the adapters' configs unless given.
        name: Name of the study; that of the file's folder unless given.

    Raises:
        InputError: The file exists, a folder does not, or no base and fine-tune with data were found.
    """
    if out.exists():
        raise InputError(None, "--out", str(out), "exists, and is not overwritten; name another file")
    if not out.absolute().parent.is_dir():
        raise InputError(None, "--out", str(out), "its folder does not exist")
    findings = find(folders)
    if base is not None:
        findings.models = [base, *(model for model in findings.models if not _same(model, base))]
        findings.unused = {path: why for path, why in findings.unused.items() if not _same(Path(path), base)}
    root = base or _choose_base(findings)
    study = _Draft(out.absolute().parent, root, _safe(name or out.absolute().parent.name or "study"))
    for label, source, kind in _fine_tunes(findings, root):
        study.add(label, source, kind, findings)
    study.settle(findings)
    for path in findings.data:
        findings.unused.setdefault(str(path), "no model or adapter of this name")
    text = study.text(findings.unused)
    with out.open("x", encoding="utf-8") as file:
        file.write(text)
    sources = {label: str(section["source"]) for label, section in study.sections.items()}
    return NewStudy(path=out, base=str(root), distributions=sources, unused=findings.unused)


def find(folders: Iterable[Path]) -> Findings:
    """Look for models, adapters and data in folders, and in those within them."""
    findings = Findings()
    for folder in folders:
        if folder.is_file() and is_data_file(folder):
            findings.data.append(folder)
        elif not folder.is_dir():
            raise InputError(None, "FOLDER", str(folder), "no such folder")
        else:
            _look(folder, findings, DEPTH)
    return findings


def _look(folder: Path, findings: Findings, depth: int) -> None:
    """Sort a folder and what is in it."""
    has_weights = any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)
    if (folder / "adapter_config.json").is_file():
        findings.adapters.append(folder)
    elif ((folder / "config.json").is_file() and has_weights) or len([*folder.glob("*.gguf")]) == 1:
        findings.models.append(folder)
    elif (folder / "config.json").is_file():
        findings.unused[str(folder)] = "has a config.json, but no weights"
    elif has_weights:
        findings.unused[str(folder)] = "has weights, but no config.json or adapter_config.json"
    else:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir() and depth:
                _look(path, findings, depth - 1)
            elif path.is_file() and is_data_file(path):
                findings.data.append(path)


def _choose_base(findings: Findings) -> Path:
    """The model that the adapters name, or that is called base, or that is alone beside adapters."""
    named = {_base_of(adapter) for adapter in findings.adapters} - {None}
    candidates = [model for model in findings.models if any(_is_named(model, reference) for reference in named)]
    if len(candidates) != 1:
        candidates = [model for model in findings.models if "base" in re.split(r"[-_.]", model.name.lower())]
    if len(candidates) != 1 and len(findings.models) == 1 and findings.adapters:
        candidates = findings.models
    if len(candidates) == 1:
        return candidates[0]
    if not findings.models:
        raise InputError(None, "FOLDER", None, "no model folder was found: config.json and weights, in safetensors")
    models = ", ".join(map(str, findings.models))
    raise InputError(None, "--base", None, f"which of the models is the base? Add --base with one of {models}")


def _base_of(adapter: Path) -> str | None:
    """The base that an adapter's config names."""
    name = read_json(adapter / "adapter_config.json", "adapter").get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _is_named(model: Path, reference: str | None) -> bool:
    """True if a reference to a model, a path or a hub id, is of this folder."""
    return reference is not None and (Path(reference).name == model.name or _same(Path(reference), model))


def _same(left: Path, right: Path) -> bool:
    return left.resolve() == right.resolve()


def _fine_tunes(findings: Findings, base: Path) -> Iterator[tuple[str, Path, str]]:
    """The fine-tunes by a name of their own: that of their folder, with its parent's where it is not the only one."""
    models = [(model, "checkpoint") for model in findings.models if not _same(model, base)]
    sources = [*models, *((adapter, "adapter") for adapter in findings.adapters)]
    names = [_safe(path.name) for path, _ in sources]
    for (path, kind), label in zip(sources, names, strict=True):
        yield (label if names.count(label) == 1 else _safe(f"{path.parent.name}-{path.name}")), path, kind


def _safe(name: str) -> str:
    """A name that a study file takes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip("_.-")[:64] or "study"


class _Draft:
    """A study file under construction: distributions are added one by one, each only if it fits the base."""

    def __init__(self, folder: Path, base: Path, name: str) -> None:
        self._folder, self._base, self._name = folder, base, name
        self.sections: dict[str, dict[str, Any]] = {}
        self._evaluation, self._rounds = EvaluationSection(), False

    def add(self, label: str, source: Path, kind: str, findings: Findings) -> None:
        """Add a distribution; where it lacks data or does not fit the base, say so in the findings."""
        files = match_files(label, [_safe(path.name) for path in (*findings.models, *findings.adapters)], findings.data)
        findings.data = [path for path in findings.data if path not in files.values()]
        if "validation" not in files:
            only = " (only training data)" if files else ""
            findings.unused[str(source)] = f"no validation data named {label}, such as {label}.val.jsonl{only}"
            return
        section: dict[str, Any] = {kind: self._relative(source)}
        for role, path in files.items():
            form = _form_of(path)
            if form is None:
                findings.unused[str(path)] = (
                    "has no column that is understood: text, prompt and completion, or messages"
                )
                return
            section[role] = self._relative(path) if not form else {"path": self._relative(path), **form}
        try:
            check_headers(self._config({label: section}), self._folder)
        except InputError as error:
            findings.unused[str(source)] = f"does not fit: {error.mend}"
            return
        self.sections[label] = {"source": source, "fields": section}

    def settle(self, findings: Findings) -> None:
        """Choose windows for which every distribution has text enough."""
        if not self.sections:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in findings.unused.items())
            mend = "no fine-tune with validation data was found"
            raise InputError(None, "FOLDER", None, f"{mend} ({reasons})" if reasons else mend)
        config = self._config({label: section["fields"] for label, section in self.sections.items()})
        headers = check_headers(config, self._folder)
        architecture, self._rounds, base = headers.architecture, headers.rounds, headers.headers["base"].folder
        tokenizer, model = load_tokenizer(base), read_config(base, "base")  # of a GGUF file: what it was converted to
        positions = next((model[key] for key in POSITIONS if isinstance(model.get(key), int)), 10**9)
        shortage: InputError | None = None
        for window, windows in (*WINDOW_SIZES, *LEAST):
            evaluation = EvaluationSection(window=min(window, positions), windows=windows, held_out=windows)
            try:
                for label, distribution in config.distributions.items():
                    build_corpora(label, distribution, evaluation, tokenizer, architecture.paired)
            except InputError as error:
                shortage = error
            else:
                self._evaluation = evaluation
                return
        if shortage is not None:
            raise shortage

    def text(self, unused: Mapping[str, str]) -> str:
        """The study file."""
        fields = {label: section["fields"] for label, section in self.sections.items()}
        evaluation = self._evaluation
        size = {"window": evaluation.window, "windows": evaluation.windows, "held_out": evaluation.held_out}
        lines = [
            "# A study of dem_opt; relative paths start at this file. Every key: docs/study-file.md",
            _yaml({"name": self._name}),
            *self._base_lines(),
            "distributions:",
        ]
        for label, section in fields.items():
            lines += [f"  {_scalar(label)}:", *(f"    {_yaml({key: value})}" for key, value in section.items())]
            if "held_out" not in section:
                lines.append("    # held_out: FILE   unless named, the validation documents are divided in two halves")
        lines += [
            "# Tokens of a window, and windows of each distribution for the search and for the held-out split.",
            _yaml({"evaluation": size}),
            "search: {trials: 40}  # composites to try at most; each is one merge and one pass over the search split",
            "# objective: {weights: {NAME: 2}}   unless given, all distributions count alike",
        ]
        for path, reason in unused.items():
            lines.append(f"# not used: {' '.join(f'{self._relative(Path(path))}: {reason}'.split())}")
        return "\n".join(lines) + "\n"

    def _base_lines(self) -> list[str]:
        """The base; stochastic rounding is best where it has 16 bits."""
        about, path = "  # the model that the fine-tunes were trained from", self._relative(self._base)
        if not self._rounds:
            return [_yaml({"base": path}) + about]
        why = "composites in 16 bits: to the nearest value, parts of the vectors would be lost"
        return [f"base:{about}", f"  {_yaml({'path': path})}", f"  rounding: stochastic  # {why}"]

    def _config(self, sections: Mapping[str, Mapping[str, Any]]) -> StudyConfig:
        content = {"name": self._name, "base": self._relative(self._base), "distributions": dict(sections)}
        content["evaluation"] = {"window": 2}  # the base's positions are looked at when the windows are chosen
        return StudyConfig.model_validate(content, context={"folder": self._folder})

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path.resolve(), self._folder.resolve())


def match_files(label: str, labels: Sequence[str], paths: Sequence[Path]) -> dict[Role, Path]:
    """The data files of a distribution by what they are for; a file without a word for it is validation data."""
    files: dict[Role, Path] = {}
    unmarked: list[Path] = []
    for path in paths:
        words = _words(path)
        longer = [other for other in labels if other != label and label in other and _belongs(path, other)]
        if not _belongs(path, label) or longer:
            continue
        role = next((ROLES[word] for word in reversed(words) if word in ROLES), None)
        if role is None:
            unmarked.append(path)
        else:
            files.setdefault(role, path)
    if "validation" not in files and unmarked:
        files["validation"] = unmarked[0]
    if "validation" not in files and "held_out" in files:
        files["validation"] = files.pop("held_out")
    order: tuple[Role, ...] = ("train", "validation", "held_out")
    return {role: files[role] for role in order if role in files}


def _belongs(path: Path, label: str) -> bool:
    """True if a data file, or the folder that it is in, has a distribution's name."""
    pattern = rf"(?:^|[._-]){re.escape(label.lower())}(?:[._-]|$)"
    return any(re.search(pattern, _safe(part).lower()) for part in (path.name, path.parent.name))


def _words(path: Path) -> list[str]:
    """The words of a data file's name and of its folder, held-out as one."""
    text = f"{path.parent.name}.{path.name}".lower()
    return re.split(r"[.\s]+|[-_](?!out)", text)


def _form_of(path: Path) -> Mapping[str, str] | None:
    """The first form in which a data file can be read; None where none fits."""
    for form in FORMS:
        try:
            if first_document(DataFile.model_validate({"path": path, **form})) is not None:
                return form
        except InputError:
            continue
    return None


def _yaml(value: Mapping[str, Any]) -> str:
    """A key with its value on one line."""
    ((key, content),) = value.items()
    return f"{_scalar(key)}: {_scalar(content)}"


def _scalar(value: Any) -> str:
    """A value in YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()
