"""Cards and recipes: what they tell is what was done, and whatever users write shows as it is."""

import re
from dataclasses import replace

import pytest
import worlds
import yaml

from dem_opt.analysis.total_price import price_line
from dem_opt.config import load
from dem_opt.export.model_card import Ingredient, licence, model_card, recipe, resolved
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.types import Margin, ResultRow, Score, StoredModel, TotalPrice

UNITS = {"base": 10**8, "code": 3 * 10**8, "math": 6 * 10**8}


def ingredients(folder, units=UNITS, licences=()):
    """Folders without weights, with cards that state licences."""
    made = []
    for name, count in units.items():
        (folder / name).mkdir(parents=True)
        made.append(Ingredient(name, StoredModel(folder / name, f"{name}-content"), count))
    for ingredient, stated in zip(made, licences, strict=False):
        (ingredient.path / "README.md").write_text(f"---\nlicense: {stated}\ntags: [x]\n---\n# A model\n")
    return made


def result(label, nll):
    scores = {"code": Score((nll, nll), (1, 1)), "math": Score((2 * nll,), (1,))}
    both = {"search": scores, "held_out": scores}
    coefficients = Coefficients((("code", 3 * 10**8), ("math", 6 * 10**8)))
    return ResultRow(
        label=label,
        role="best",
        algorithm="random",
        coefficients=coefficients,
        scores=both,
        objective=dict.fromkeys(both, 1.5 * nll),
        evaluations=1,
        forward_tokens=2,
        seconds=3.0,
    )


def front(card):
    return yaml.safe_load(card.split("---\n", 2)[1])


def rows(card):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]


def test_a_card_tells_coefficients_scores_margins_and_provenance(tmp_path):
    margins = [Margin(rival="base", split="held_out", mean=0.5, low=0.25, high=0.75)]
    study = "name: tiny\nbase: <b>models</b>\n"
    results = [result("winner", 2.0)]
    card = model_card("study", ingredients(tmp_path), {"torch": "2.13.0"}, study, results, margins, "bfloat16")
    assert front(card)["library_name"] == "transformers" and "license" not in front(card)
    for name, weight in (("base", "0.100000000"), ("code", "0.300000000"), ("math", "0.600000000")):
        assert [name, weight, "not stated", f"{name}-content"] in rows(card)
    assert rows(card).count(["winner", "2.0000", "4.0000", "3.0000", "20.086"]) == 2
    assert ["torch", "2.13.0"] in rows(card)
    assert ["base", "held-out", "0.5000", "0.2500 to 0.7500"] in rows(card)
    assert "search split" in card and "held-out split" in card and "All weights are bfloat16" in card
    assert "    name: tiny\n    base: <b>models</b>\n" in card


@pytest.mark.parametrize("mend", [None, (0.0, 3.0)])
def test_a_card_tells_the_price_of_the_sum(tmp_path, mend):
    rival = Margin(rival="sum", split="search", mean=-0.06, low=-0.07, high=-0.05)
    price = TotalPrice(
        total=1.0, slope=-0.1, low=-0.12, high=-0.08, basis="step", optimum=1.5, rivals=(rival,), mend=mend
    )
    card = model_card("study", ingredients(tmp_path), {}, total_price=price)
    assert re.sub(r"\\(.)", r"\1", card).count(price_line(price, "nats per token")) == 1


@pytest.mark.parametrize(("total", "base"), [(1.8, -0.8), (0.9, 0.1), (1.0, 0.0)])
def test_a_sum_other_than_1_is_said_and_its_recipe_keeps_it(tmp_path, total, base):
    units = {"base": round(base * UNIT), "code": UNIT // 2, "math": round((total - 0.5) * UNIT)}
    made = ingredients(tmp_path, units)
    worlds.save_model(made[0].path, seed=0)
    card = model_card("study", made, {})
    assert (f"sum to {total:g} " in card) == (total != 1)
    assert ["base", f"{base:.9f}", "not stated", "base-content"] in rows(card)
    weights = [model["parameters"]["weight"] for model in yaml.safe_load(recipe(made))["models"]]
    assert sum(weights) == pytest.approx(total)


def test_a_loss_beyond_the_range_of_exponentials_has_an_infinite_perplexity(tmp_path):
    """As the sum of long vectors may have."""
    card = model_card("study", ingredients(tmp_path), {}, "", [result("winner", 1e4)])
    assert rows(card).count(["winner", "10000.0000", "20000.0000", "15000.0000", "inf"]) == 2


def test_a_card_leaves_out_a_composite_where_a_split_was_not_scored(tmp_path):
    """The best of a comparison that was interrupted has no held-out scores."""
    partial = replace(
        result("grid", 1.0), scores={"search": result("grid", 1.0).scores["search"]}, objective={"search": 1.5}
    )
    card = model_card("study", ingredients(tmp_path), {}, "", [result("winner", 2.0), partial])
    assert sum(row[0] == "winner" for row in rows(card)) == 2
    assert sum(row[0] == "grid" for row in rows(card)) == 1


def test_a_card_without_scores_says_none(tmp_path):
    card = model_card("study", ingredients(tmp_path, {"base": 0, "code": UNIT}), {})
    assert "split" not in card and "0.000000000" in card and "Margins" not in card and "float32." in card


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("mit", "mit", "mit"), "mit"),
        (("mit", "mit", "apache-2.0"), None),
        (("mit", "mit"), None),
        (("&a [*a, {{: ", "mit", "mit"), None),
        (("[" * 5000, "mit", "mit"), None),
    ],
)
def test_a_licence_is_told_where_all_that_went_in_state_the_same(tmp_path, licences, expected):
    made = ingredients(tmp_path, licences=licences)
    card = model_card("study", made, {})
    assert front(card).get("license") == expected
    assert front(card)["base_model"] == ["base", "code", "math"]


def test_what_did_not_go_in_is_no_base_model_and_its_licence_does_not_count(tmp_path):
    made = ingredients(tmp_path, UNITS | {"math": 0}, ("mit", "mit", "other"))
    metadata = front(model_card("study", made, {}))
    assert metadata["license"] == "mit" and metadata["base_model"] == ["base", "code"]


def test_a_folder_in_a_hubs_cache_has_the_hubs_name(tmp_path):
    folder = tmp_path / "models--some--model-7b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    card = model_card("study", [Ingredient("base", StoredModel(folder, "x"), UNIT)], {})
    assert front(card)["base_model"] == ["some/model-7b"]


def test_a_licence_file_is_pointed_at(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("as you like")
    assert licence(tmp_path) == "see its LICENSE"
    (tmp_path / "README.md").write_text("---\nlicense: [mit, gpl-3.0]\n---\n")
    assert licence(tmp_path) == "mit, gpl-3.0"


def test_what_users_write_shows_as_it_is_in_a_card(tmp_path):
    label = "a|b <script>alert(1)</script> [x](http://y) `z`\n# not a title"
    made = [
        Ingredient(label, StoredModel(ingredient.path, label), ingredient.units) for ingredient in ingredients(tmp_path)
    ]
    (made[0].path / "README.md").write_text("---\nlicense: '<script>'\n---\n")
    card = model_card(
        label, made, {}, results=[result(label, 1.0)], margins=[Margin(rival=label, split=label, mean=1, low=0, high=2)]
    )
    assert "<script" not in card.replace("\\<script", "")
    assert "\n# not a title" not in card
    shown = [line for line in card.splitlines() if line.startswith("| ") and "script" in line]
    assert len(shown) == 6
    assert all(line.count("|") - line.count("\\|") in (5, 6) for line in shown)


def test_a_recipe_is_the_formula_in_absolute_paths(tmp_path):
    worlds.save_model(tmp_path / "base", seed=0)
    others = ingredients(tmp_path / "more", {"code": 3 * 10**8, "math": 0})
    made = [Ingredient("base", StoredModel(tmp_path / "more/../base", "x"), 7 * 10**8), *others]
    assert yaml.safe_load(recipe(made)) == {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "more/code"), "parameters": {"weight": 0.3}}],
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float32",
        "out_dtype": "float32",
    }
    assert yaml.safe_load(recipe(made, "bfloat16"))["out_dtype"] == "bfloat16"


def test_a_resolved_study_has_defaults_and_no_passwords(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    uri = "postgresql+psycopg://me:secret@host/db"
    outside = tmp_path / "home/models/base"
    study = tmp_path / "home/study/study.yaml"
    study.parent.mkdir(parents=True)
    distribution = {"checkpoint": "models/code", "validation": "data/code.jsonl"}
    study.write_text(
        yaml.safe_dump({"name": "s", "base": str(outside), "distributions": {"code": distribution}, "storage": uri})
    )
    text = resolved(load(study), study.parent)
    content = yaml.safe_load(text)
    assert "secret" not in text and str(tmp_path) not in text
    assert content["storage"] == "postgresql+psycopg://me:***@host/db"
    assert content["base"] == "~/models/base" and content["distributions"]["code"] == distribution
    assert content["tracking"]["uri"] == "sqlite:///runs/s/mlflow.db" and content["search"]["trials"] == 40
