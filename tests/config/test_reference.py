"""The reference of the study file lists every key, and every example of it can be loaded."""

import pytest

from dem_opt.config.reference import KeyReference, study_file_reference
from dem_opt.config.sections import RENAMED_KEYS

KEYS = {entry.key: entry for entry in study_file_reference()}


def test_each_key_is_listed_once():
    assert len(KEYS) == len(list(study_file_reference()))


@pytest.mark.parametrize("entry", KEYS.values(), ids=KEYS)
def test_each_key_has_a_type_and_a_description_of_whole_sentences(entry: KeyReference):
    assert entry.type and entry.description[:1].isupper() | entry.description.startswith("`")
    assert entry.description.endswith(".") and "\n" not in entry.description


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("name", "text", "required"),
        ("base", "BASE", "required"),
        ("distributions.NAME.validation", "DATA", "required"),
        ("objective.weights", "mapping of names to numbers ≥ 0", "1 for each distribution"),
        ("evaluation.window", "integer ≥ 2", "1024"),
        ("evaluation.batch", "`auto` or integer > 0", "auto"),
        ("search.tolerance", "number > 0", "0.0001"),
        ("search.racing", "true or false", "true"),
        ("search.minutes", "number > 0", ""),
        ("tracking.uri", "text", "sqlite:///OUTPUT/mlflow.db"),
        ("data_mixing.tokens", "list of `all` or `one`", "[all, one]"),
        ("evaluate.top", "integer > 0 and ≤ 5", "5"),
        ("output", "path", "runs/NAME"),
        ("DATA.format", "`text` or `prompt_completion` or `messages`", "text"),
    ],
)
def test_types_and_defaults_are_written_as_in_a_study_file(key, type_, default):
    assert (KEYS[key].type, KEYS[key].default) == (type_, default)


def test_renamed_keys_lead_to_present_ones():
    assert set(RENAMED_KEYS.values()) <= set(KEYS) and not set(RENAMED_KEYS) & set(KEYS)
