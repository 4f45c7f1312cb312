"""Model card and mergekit recipe of an export."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from dem_opt.analysis.total_price import price_line
from dem_opt.checkpoints.architecture import read_architecture
from dem_opt.checkpoints.convert import source_of
from dem_opt.checkpoints.files import DTYPES, read_header
from dem_opt.config import StudyConfig
from dem_opt.evaluation.objective import objective_words
from dem_opt.export.writer import Export
from dem_opt.grouping import GroupedCoefficients, Grouping
from dem_opt.planning.inputs import Inputs
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.storage.engine import masked
from dem_opt.types import (
    BITS_PER_BYTE,
    DOCUMENTS,
    NATS_PER_TOKEN,
    UNITS,
    Margin,
    ResultRow,
    StoredModel,
    TotalPrice,
    perplexity,
)

CARD, RECIPE, COEFFICIENTS = "README.md", "mergekit.yaml", "coefficients.json"

UNSTATED = "not stated"
"""Licence of a checkpoint that states none."""

STOCHASTIC = (
    "Sums were rounded to 16 bits up or down by a hash of the weight's place, with the probability of the sum's\n"
    "place between the two values (`rounding: stochastic`)."
)
NEAREST = ", to the nearest values, which may score otherwise"

FRONT_MATTER = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["merge", "distribution-edited-model", "dem_opt"],
}
"""Metadata of every card, which model hubs read."""

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
    coefficients: Coefficients | GroupedCoefficients,
    folder: Path,
    libraries: Mapping[str, str],
    dtype: str | None = None,
    results: Sequence[ResultRow] = (),
    margins: Sequence[Margin] = (),
    lora: Export | None = None,
    total_price: TotalPrice | None = None,
) -> dict[str, str]:
    """Card and recipe of a study's composite by file name; `folder` is that of the study file."""
    groups = coefficients if isinstance(coefficients, GroupedCoefficients) else None
    mean = coefficients if isinstance(coefficients, Coefficients) else coefficients.mean
    base = Ingredient("base", sources.base, mean.base_units)
    ingredients = [base, *(Ingredient(name, sources.fine_tunes[name], units) for name, units in mean.pairs)]
    study = resolved(sources.config, folder)
    objective = sources.config.objective
    words = objective_words(sources.config.weights, objective.worst, objective.function or "", objective.unit)
    name, unit = sources.config.name, objective.unit
    card = model_card(
        name, ingredients, libraries, study, results, margins, dtype, words, lora, unit, total_price, groups
    )
    if groups is None:
        return {CARD: card, RECIPE: recipe(ingredients, dtype)}
    assert sources.groups is not None
    filters = mergekit_filters(sources.base, sources.groups.grouping, groups)
    return {
        CARD: card,
        RECIPE: recipe(ingredients, dtype, filters),
        COEFFICIENTS: json.dumps(groups.weights, indent=2) + "\n",
    }


def model_card(
    name: str,
    ingredients: Sequence[Ingredient],
    libraries: Mapping[str, str],
    study: str = "",
    results: Sequence[ResultRow] = (),
    margins: Sequence[Margin] = (),
    dtype: str | None = None,
    objective: str = "mean NLL",
    lora: Export | None = None,
    unit: str = NATS_PER_TOKEN,
    total_price: TotalPrice | None = None,
    groups: GroupedCoefficients | None = None,
) -> str:
    """The README of an export: formula, coefficients, scores on both splits, provenance.

    Args:
        name: Title.
        ingredients: The base first.
        libraries: Versions by name.
        study: The resolved study as YAML.
        results: Rows of the table of scores; none where nothing was scored.
        margins: Of the winner over the others.
        dtype: Dtype that all weights were rounded to, where one was chosen.
        objective: The quantity that was minimized (see `objective_words`).
        lora: The export, where it is a LoRA of the base.
        unit: Unit of the objective.
        total_price: What the constraint on the sum of coefficients costs, where it was measured.
        groups: Coefficients by group; the ingredients have their mean then.
    """
    rows = [
        [ingredient.name, f"{ingredient.units / UNIT:.9f}", licence(ingredient.path), ingredient.model.content]
        for ingredient in ingredients
    ]
    is_stochastic = lora is None and _is_stochastic(ingredients[0].model, dtype)
    parts = [
        f"---\n{_front_matter(ingredients, lora is not None)}---",
        f"# {_plain(name)}",
        "A distribution-edited model: the weighted sum of models fine-tuned from one base, each on one data\n"
        "distribution, with coefficients chosen by the perplexity of the sum.",
        "    Theta_D = Theta + sum_i w_i (Theta_i - Theta)",
        *([f"All weights are {dtype}, rounded once from sums in float32."] if dtype else []),
        *([STOCHASTIC] if is_stochastic else []),
        *([_lora(lora)] if lora else []),
        "## Coefficients",
        _table(["model", "mean coefficient" if groups else "coefficient", "licence", "content (SHA-256)"], rows),
        *([_groups(groups)] if groups else []),
        *_total(ingredients[0].units),
        *([_plain(price_line(total_price, UNITS[unit]))] if total_price else []),
        *[_scores(split, results, objective, unit) for split in (results[0].objective if results else ())],
        *([_margins(margins, objective, unit)] if margins else []),
        "## Made with",
        _table(["library", "version"], [list(item) for item in libraries.items()]),
        f"`{RECIPE}` is a recipe with which mergekit writes the same model, up to rounding in float32"
        f"{NEAREST if is_stochastic else ''}.",
        *(["The study, resolved:", _indented(study)] if study else []),
    ]
    return "\n\n".join(parts) + "\n"


def _is_stochastic(base: StoredModel, dtype: str | None) -> bool:
    """Sums were rounded to 16 bits, and stochastically."""
    if base.rounding == "nearest" or dtype is not None:
        return base.rounding == "stochastic" and dtype != "float32"
    return {tensor.dtype for tensor in read_header(base.path, "base").tensors.values()} != {"F32"}


def _groups(groups: GroupedCoefficients) -> str:
    """The table of coefficients by group of parameters."""
    names = [name for name, _ in groups.rows[0][1].pairs]
    rows = [[group, *(f"{weight:.9f}" for weight in row.values())] for group, row in groups.rows]
    title = f"Each group of parameters has coefficients of its own; `{COEFFICIENTS}` has them as numbers."
    return f"{title}\n\n{_table(['group', *names], rows)}"


@dataclass(frozen=True)
class Filter:
    """A part of tensors' names with the coefficients of their group, in units of 1e-9 by distribution."""

    part: str
    units: Mapping[str, int]


def mergekit_filters(base: StoredModel, grouping: Grouping, groups: GroupedCoefficients) -> list[Filter]:
    """Filters of a recipe, of which mergekit takes the first that is a part of a tensor's name.

    A group that is all that begins with one prefix, such as a layer, needs one; others have one for each tensor.
    """
    header = read_header(base.path, "base")
    architecture = read_architecture(header)
    layout = architecture.layout(header)
    plain = {name: layout.plain_sources(name) for name in architecture.parameters}
    everything = [name for names in plain.values() for name in names]
    filters = []
    for group, members in grouping.groups:
        names = [name for member in members for name in plain[member]]
        prefix = _common_beginning(names)
        is_alone = prefix and sorted(name for name in everything if prefix in name) == sorted(names)
        filters += [Filter(part, groups[group].units) for part in ([prefix] if is_alone else names)]
    return sorted(filters, key=lambda each: -len(each.part))


def _common_beginning(names: Sequence[str]) -> str:
    """The parts that several dotted names begin with, as in "model.layers.3."; empty where there are none."""
    parts = [name.split(".")[:-1] for name in names]
    common = 0
    while len(names) > 1 and common < min(map(len, parts)) and len({tuple(part[: common + 1]) for part in parts}) == 1:
        common += 1
    return "".join(f"{part}." for part in parts[0][:common])


def recipe(ingredients: Sequence[Ingredient], dtype: str | None = None, filters: Sequence[Filter] = ()) -> str:
    """A study's composite in mergekit's words:  Theta + 1.0 sum_i w_i (Theta_i - Theta) , summed in float32.

    The base's own coefficient 1 - sum_i w_i follows from that form.  mergekit knows one dtype for all that it writes:
    float32 where the base has several.  Paths are absolute, since `a/b` is the name of a model on a hub.  With filters
    each tensor has the coefficients of its group.
    """
    base, *others = ingredients
    terms = [ingredient for ingredient in others if ingredient.units] or others
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(base.path.resolve()),
        "models": [
            {"model": _mergekit_name(base, term), "parameters": {"weight": _weight(term, filters)}} for term in terms
        ],
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float32",
        "out_dtype": dtype or _base_dtype(base),
    }
    return f"# mergekit-yaml {RECIPE} FOLDER\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"


def _weight(term: Ingredient, filters: Sequence[Filter]) -> float | list[dict[str, object]]:
    """A fine-tune's coefficient, or those of its groups by filter."""
    if not filters:
        return term.units / UNIT
    return [{"filter": each.part, "value": each.units[term.name] / UNIT} for each in filters]


def _mergekit_name(base: Ingredient, ingredient: Ingredient) -> str:
    """A checkpoint, or BASE+ADAPTER, as mergekit names them."""
    path = str(ingredient.path.resolve())
    return path if ingredient.model.base is None else f"{base.path.resolve()}+{path}"


def resolved(config: StudyConfig, folder: Path) -> str:
    """A study with its defaults filled in, as YAML: no passwords, and paths from the study file's folder on."""
    data = config.model_dump(mode="json", exclude_none=True)
    data["storage"], data["tracking"]["uri"] = masked(config.storage), masked(config.tracking.uri)
    return yaml.safe_dump(_from(folder, data), sort_keys=False, allow_unicode=True)


def licence(folder: Path) -> str:
    """The licence of a checkpoint: from its card's front matter, or a hint at its LICENSE file."""
    stated = _stated_licence(folder)
    if stated:
        return stated
    return "see its LICENSE" if any(folder.glob("LICEN[CS]E*")) else UNSTATED


def _stated_licence(folder: Path) -> str:
    """`license` of a card's front matter, "" where there is none."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = _FRONT.match(text)
    try:
        front = yaml.load(match[1], Loader=yaml.BaseLoader) if match else None
    except (yaml.YAMLError, RecursionError):
        return ""
    stated = front.get("license", "") if isinstance(front, dict) else ""
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)


def _lora(lora: Export) -> str:
    """The contents of a LoRA, and how to load it."""
    kind = "the nearest LoRA of rank" if lora.is_truncated else "an exact LoRA of rank"
    return (
        f"Written as {kind} {lora.rank}: Theta_D - Theta = B A, with alpha equal to the rank. Load it on the base:\n\n"
        "    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)"
    )


def _total(base_units: int) -> list[str]:
    """The meaning of a sum of coefficients other than 1."""
    if not base_units:
        return []
    total = (UNIT - base_units) / UNIT
    meaning = (
        "the vectors are added beyond an average of the fine-tunes"
        if base_units < 0
        else "the composite lies between the base and an average of the fine-tunes"
    )
    return [f"The coefficients of the fine-tunes sum to {total:.9g} and the base has the rest: {meaning}."]


def _front_matter(ingredients: Sequence[Ingredient], is_lora: bool) -> str:
    """Metadata for model hubs: the models that went in, and their licence where all state the same."""
    base, *others = ingredients
    used = [base, *(ingredient for ingredient in others if ingredient.units)]
    front: dict[str, object] = {**FRONT_MATTER, "base_model": [_hub_name(ingredient.path) for ingredient in used]}
    if is_lora:
        front |= {"library_name": "peft", "base_model": _hub_name(base.path), "tags": [*FRONT_MATTER["tags"], "lora"]}
    licences = {_stated_licence(ingredient.path) for ingredient in used}
    if len(licences) == 1 and "" not in licences:
        front["license"] = licences.pop()
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def hub_id(folder: Path) -> str | None:
    """`org/name` of a folder in a hub's cache (models--org--name/snapshots/...); None for other folders."""
    matches = (_HUB_CACHE.match(part) for part in folder.parts)
    return next((match[1].replace("--", "/", 1) for match in matches if match), None)


def _hub_name(folder: Path) -> str:
    """The hub's id of a folder in its cache, else the name of the folder or of what it was converted from."""
    source = source_of(folder)
    return hub_id(source) or source.resolve().name


def _base_dtype(base: Ingredient) -> str:
    """The one dtype of a base's tensors, or float32."""
    dtypes = {tensor.dtype for tensor in read_header(base.path, "base").tensors.values()}
    return str(DTYPES[dtypes.pop()]).removeprefix("torch.") if len(dtypes) == 1 else "float32"


def _from(folder: Path, value: Any) -> Any:
    """The same data with paths inside `folder` relative to it, and paths in the user's home from `~`."""
    if isinstance(value, dict):
        return {key: _from(folder, item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    return value.replace(f"{folder}/", "").replace(f"{os.path.expanduser('~')}/", "~/")


def _scores(split: str, results: Sequence[ResultRow], objective: str, unit: str) -> str:
    """The tables of one split: the objective and, for each distribution, NLL in nats per token and bits per byte.

    The best of a comparison that was interrupted is not scored on the held-out split, and is left out of its table.
    """
    scored = [result for result in results if split in result.objective]
    tables = [_losses(split, scored, NATS_PER_TOKEN, objective if unit == NATS_PER_TOKEN else "")]
    if all(score.bytes for result in scored for score in result.scores[split].values()):
        tables.append(_losses(split, scored, BITS_PER_BYTE, objective if unit == BITS_PER_BYTE else ""))
    return "\n\n".join([f"## Scores on the {_words(split)} split", *tables])


def _losses(split: str, results: Sequence[ResultRow], unit: str, objective: str) -> str:
    """The table of losses in one unit; of a mean NLL with its perplexity, and without an objective of another unit."""
    names, has_perplexity = list(results[0].scores[split]), "mean NLL" in objective
    rows = []
    for result in results:
        value = result.objective[split]
        losses = [f"{result.scores[split][name].loss(unit):.4f}" for name in names]
        mean = [f"{value:.4f}"] if objective else []
        rows.append([result.label, *losses, *mean, *([f"{perplexity(value):.3f}"] if has_perplexity else [])])
    title = "NLL in nats per token." if unit == NATS_PER_TOKEN else "Bits per byte of the scored text."
    heads = ["composite", *names, *([objective] if objective else [])]
    return f"{title}\n\n{_table([*heads, *(['perplexity of the mean'] if has_perplexity else [])], rows)}"


def _margins(margins: Sequence[Margin], objective: str, unit: str) -> str:
    """The table of the winner's margins."""
    rows = [[margin.rival, _words(margin.split), f"{margin.mean:.4f}", _interval(margin)] for margin in margins]
    title = f"## Margins\n\nRival minus winner in {_plain(objective)}, {UNITS[unit]}; positive: the winner is better."
    return f"{title}\n\n{_table(['rival', 'split', 'margin', '95% paired interval'], rows)}"


def _interval(margin: Margin) -> str:
    """The interval, and what it takes to be sampled where that is not documents."""
    if not isfinite(margin.high - margin.low):
        return "unknown, one document"
    unit = "" if margin.sampled == DOCUMENTS else f", over {margin.sampled}"
    return f"{margin.low:.4f} to {margin.high:.4f}{unit}"


def _words(split: str) -> str:
    return _plain(split.replace("_", "-"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    shown = [cells if cells[0] == "---" else [_plain(cell) for cell in cells] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


def _indented(text: str) -> str:
    """A code block, which Markdown shows verbatim."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _plain(text: str) -> str:
    """Escape text so that Markdown and HTML show it verbatim, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>&|#~$!])", r"\\\1", " ".join(text.split()))
