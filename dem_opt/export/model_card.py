"""What is written beside an export's weights: its model card and a recipe for another tool."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import yaml

from dem_opt.checkpoints.files import DTYPES, read_header
from dem_opt.config import StudyConfig
from dem_opt.planning.inputs import Inputs
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.storage.engine import masked
from dem_opt.types import Margin, ResultRow, StoredModel

CARD, RECIPE = "README.md", "mergekit.yaml"

UNSTATED = "not stated"
"""The licence of a checkpoint that says nothing of it."""

FRONT_MATTER = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["merge", "distribution-edited-model", "dem_opt"],
}
"""What model hubs read of every card."""

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_HUB_CACHE = re.compile(r"^models--(.+)$")


@dataclass(frozen=True)
class Ingredient:
    """A checkpoint or an adapter: its name in the study ("base" for the base), its coefficient in units of 1e-9."""

    name: str
    model: StoredModel
    units: int

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.model.path


def texts(
    sources: Inputs,
    coefficients: Coefficients,
    folder: Path,
    libraries: Mapping[str, str],
    dtype: str | None = None,
    results: Sequence[ResultRow] = (),
    margins: Sequence[Margin] = (),
) -> dict[str, str]:
    """Card and recipe of a study's composite by file name; `folder` is the study file's."""
    base = Ingredient("base", sources.base, coefficients.base_units)
    ingredients = [base, *(Ingredient(name, sources.fine_tunes[name], units) for name, units in coefficients.items)]
    study = resolved(sources.config, folder)
    card = model_card(sources.config.name, ingredients, libraries, study, results, margins, dtype)
    return {CARD: card, RECIPE: recipe(ingredients, dtype)}


def model_card(
    name: str,
    ingredients: Sequence[Ingredient],
    libraries: Mapping[str, str],
    study: str = "",
    results: Sequence[ResultRow] = (),
    margins: Sequence[Margin] = (),
    dtype: str | None = None,
) -> str:
    """The README of an export: formula, coefficients, scores on both splits, provenance.

    ingredients  the base first
    libraries    versions by name
    study        the resolved study as YAML
    standings    the lines of the table of scores; none where nothing was scored
    margins      of the winner over the others
    dtype        what all weights were rounded to, where that was asked for
    """
    rows = [[one.name, f"{one.units / UNIT:.9f}", licence(one.path), one.model.content] for one in ingredients]
    parts = [
        f"---\n{_front_matter(ingredients)}---",
        f"# {_plain(name)}",
        "A distribution-edited model: the weighted sum of models fine-tuned from one base, each on one data\n"
        "distribution, with coefficients chosen by the perplexity of the sum.",
        "    Theta_D = Theta + sum_i w_i (Theta_i - Theta)",
        *([f"All weights are {dtype}, rounded once from sums in float32."] if dtype else []),
        "## Coefficients",
        _table(["model", "coefficient", "licence", "content (SHA-256)"], rows),
        *[_scores(split, results) for split in (results[0].objective if results else ())],
        *([_margins(margins)] if margins else []),
        "## Made with",
        _table(["library", "version"], [list(item) for item in libraries.items()]),
        f"`{RECIPE}` is a recipe with which mergekit writes the same model, up to rounding in float32.",
        *(["The study, resolved:", _indented(study)] if study else []),
    ]
    return "\n\n".join(parts) + "\n"


def recipe(ingredients: Sequence[Ingredient], dtype: str | None = None) -> str:
    """A study's composite in mergekit's words:  Theta + 1.0 sum_i w_i (Theta_i - Theta) , summed in float32.

    The base's own coefficient 1 - sum_i w_i follows from that form.  mergekit knows one dtype for all that it writes:
    float32 where the base has several.  Paths are absolute, since `a/b` is the name of a model on a hub.
    """
    base, *others = ingredients
    terms = [one for one in others if one.units] or others
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(base.path.resolve()),
        "models": [{"model": _named(base, one), "parameters": {"weight": one.units / UNIT}} for one in terms],
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float32",
        "out_dtype": dtype or _stored(base),
    }
    return f"# mergekit-yaml {RECIPE} FOLDER\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"


def _named(base: Ingredient, one: Ingredient) -> str:
    """A checkpoint, or BASE+ADAPTER, as mergekit names them."""
    path = str(one.path.resolve())
    return path if one.model.base is None else f"{base.path.resolve()}+{path}"


def resolved(config: StudyConfig, folder: Path) -> str:
    """A study with its defaults filled in, as YAML: no passwords, and paths from the study file's folder on."""
    data = config.model_dump(mode="json", exclude_none=True)
    data["storage"], data["tracking"]["uri"] = masked(config.storage), masked(config.tracking.uri)
    return yaml.safe_dump(_from(folder, data), sort_keys=False, allow_unicode=True)


def licence(folder: Path) -> str:
    """What a checkpoint says of its licence: in its card's front matter, or in a LICENSE file beside it."""
    stated = _stated_licence(folder)
    if stated:
        return stated
    return "see its LICENSE" if any(folder.glob("LICEN[CS]E*")) else UNSTATED


def _stated_licence(folder: Path) -> str:
    """`license` of a card's front matter, "" where there is none."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = _FRONT.match(text)
    try:
        front = yaml.load(found[1], Loader=yaml.BaseLoader) if found else None
    except (yaml.YAMLError, RecursionError):
        return ""
    stated = front.get("license", "") if isinstance(front, dict) else ""
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)


def _front_matter(ingredients: Sequence[Ingredient]) -> str:
    """What model hubs read: the models that went in, and their licence where all state the same."""
    base, *others = ingredients
    used = [base, *(one for one in others if one.units)]
    front: dict[str, object] = {**FRONT_MATTER, "base_model": [_hub_name(one.path) for one in used]}
    licences = {_stated_licence(one.path) for one in used}
    if len(licences) == 1 and "" not in licences:
        front["license"] = licences.pop()
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _hub_name(folder: Path) -> str:
    """`org/name` for a folder in a hub's cache (models--org--name/snapshots/...), else the folder's own name."""
    for part in folder.parts:
        if found := _HUB_CACHE.match(part):
            return found[1].replace("--", "/", 1)
    return folder.resolve().name


def _stored(base: Ingredient) -> str:
    """The one dtype of a base's tensors, or float32."""
    dtypes = {tensor.dtype for tensor in read_header(base.path, "base").tensors.values()}
    return str(DTYPES[dtypes.pop()]).removeprefix("torch.") if len(dtypes) == 1 else "float32"


def _from(folder: Path, value: Any) -> Any:
    """The same data with paths inside `folder` written from there on, others from the user's home on."""
    if isinstance(value, dict):
        return {key: _from(folder, one) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    return value.replace(f"{folder}/", "").replace(f"{Path.home()}/", "~/")


def _scores(split: str, results: Sequence[ResultRow]) -> str:
    """The table of one split: NLL for each distribution and their weighted mean, and the mean's perplexity."""
    names = list(results[0].scores[split])
    rows = []
    for one in results:
        mean = one.objective[split]
        nlls = [f"{one.scores[split][name].nll:.4f}" for name in names]
        rows.append([one.label, *nlls, f"{mean:.4f}", f"{exp(mean):.3f}"])
    title = f"## Scores on the {_words(split)} split\n\nNLL in nats per token."
    return f"{title}\n\n{_table(['composite', *names, 'mean', 'perplexity of the mean'], rows)}"


def _margins(margins: Sequence[Margin]) -> str:
    """The table of how much better the winner is."""
    rows = [[one.rival, _words(one.split), f"{one.mean:.4f}", f"{one.low:.4f} to {one.high:.4f}"] for one in margins]
    title = "## Margins\n\nRival minus winner in mean NLL, nats per token; positive: the winner is better."
    return f"{title}\n\n{_table(['rival', 'split', 'margin', '95% paired interval'], rows)}"


def _words(split: str) -> str:
    return _plain(split.replace("_", "-"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    shown = [cells if cells[0] == "---" else [_plain(cell) for cell in cells] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


def _indented(text: str) -> str:
    """A block that Markdown shows as it is, whatever it holds."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>&|#~$!])", r"\\\1", " ".join(text.split()))
