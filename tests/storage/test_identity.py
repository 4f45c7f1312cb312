"""Laws of a question: it knows content, it comes back from what is written of it, it guards what compares."""

from dataclasses import replace

import pytest

from dem_opt.errors import InputError
from dem_opt.simplex import Family, Space
from dem_opt.storage.identity import StudyIdentity, changes, refuse_other_scoring


def identity(**fields) -> StudyIdentity:
    known = {
        "base": "hash-0",
        "fine_tunes": {"code": "hash-1", "a.validation": "hash-2"},
        "space": Space(("a.validation", "code")),
        "weights": {"code": 1.0, "a.validation": 0.3, "web": 0.0, "web.held_out": 0.5},
        "corpora": {
            "search": {"code": "corpus-1", "a.validation": "corpus-2", "web": "corpus-5", "web.held_out": "corpus-6"},
            "held_out": {"code": "corpus-3", "a.validation": "corpus-4", "web": "corpus-7", "web.held_out": "corpus-8"},
        },
        "protect": {"web": 0.02, "code": 0.0},
        "settings": {
            "evaluation.dtype": "float32",
            "evaluation.batch": "4096",
            "looks": "8",
            "device": "cpu",
            "tokenizer": "t",
        },
    }
    return StudyIdentity(**known | fields)


NAMES = ("a.validation", "code")
SPACES = [
    Space(NAMES),
    Space(NAMES, 0.5),
    Space(NAMES, 2.0, 0.0),
    Space(NAMES, 1.0, 0.25, (("code", 0.0, 0.8), ("a.validation", 0.3, 0.3))),
]
STEPS = ("code@20", "code@best", "codes", "math@4")
FAMILIES = [
    Space(STEPS, families=(Family("code", ("code@20", "code@best"), 0.0, 0.5),)),
    Space(STEPS, families=(Family("code", ("code@20", "code@best"), 0.1, 0.5),)),
    Space(STEPS, 2.0, None, (("code@20", 0.0, 0.1),), (Family("math", ("math@4",), 0.2, 0.2),)),
]


@pytest.mark.parametrize("space", FAMILIES, ids=str)
def test_a_bounded_sum_of_steps_comes_back(space):
    question = identity(space=space, fine_tunes={name: f"hash {name}" for name in STEPS})
    fields = question.identity_fields()
    assert StudyIdentity.recall(fields, question.scoring_fields()).space == space
    others = [replace(question, space=other).identity_fields() for other in FAMILIES if other != space]
    assert all(fields != other for other in others)


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_question_comes_back_from_what_is_written_of_it(space, worst):
    question = identity(space=space, worst=worst)
    assert StudyIdentity.recall(question.identity_fields(), question.scoring_fields()) == question


def test_every_space_and_objective_is_another_question():
    questions = [identity(space=space, worst=worst).identity_fields() for space in SPACES for worst in (False, True)]
    assert all(question != other for i, question in enumerate(questions) for other in questions[:i])
    assert changes(questions[0], questions[1]) == "objective.worst is new"
    assert changes(questions[0], questions[4]) == "simplex.total has changed"


@pytest.mark.parametrize(
    ("field", "same"),
    [
        ("evaluation.dtype", False),
        ("evaluation.batch", False),
        ("looks", False),
        ("device", False),
        ("tokenizer", True),
    ],
)
def test_the_scoring_key_sees_what_changes_nats_and_is_not_in_a_corpus(field, same):
    other = identity(settings=identity().settings | {field: "other"})
    assert (other.scoring == identity().scoring) is same


@pytest.mark.parametrize("field", list(identity().scoring_fields()))
def test_every_change_of_scoring_is_refused_by_its_name(field):
    with pytest.raises(InputError) as refusal:
        refuse_other_scoring("study.yaml", identity().scoring_fields(), identity().scoring_fields() | {field: "other"})
    assert str(refusal.value).startswith(f"study.yaml: {field}")


def test_general_corpora_and_protection_are_asked_and_not_scored():
    fields = {"general.web.validation", "general.web.held_out", "objective.protect.web", "objective.protect.code"}
    assert fields <= identity().identity_fields().keys() and not fields & identity().scoring_fields().keys()


def test_a_question_without_them_is_written_as_it_always_was():
    plain = identity(
        weights={"code": 1.0, "a.validation": 0.3},
        corpora={split: dict(list(by_name.items())[:2]) for split, by_name in identity().corpora.items()},
        protect={},
    )
    assert StudyIdentity.recall(plain.identity_fields(), plain.scoring_fields()) == plain
    assert not [key for key in plain.identity_fields() if key.startswith(("general.", "objective.protect."))]


def test_what_only_one_of_two_knows_is_no_change():
    old, new = identity().scoring_fields(), identity().scoring_fields()
    refuse_other_scoring(None, old, new | {"distributions.new.validation": "corpus-9"})
    refuse_other_scoring(None, old | {"distributions.gone.validation": "corpus-9"}, new)


def test_changes_are_told_by_name():
    old = identity().identity_fields()
    new = {key: value for key, value in old.items() if key != "distributions.code"} | {
        "base": "hash-9",
        "distributions.more": "hash-8",
    }
    assert changes(old, new) == "base has changed, distributions.code has gone, distributions.more is new"


def test_gradients_are_kept_apart_by_base_and_scoring():
    other = identity(settings=identity().settings | {"device": "cuda"})
    assert len({study.differentiation for study in (identity(), identity(base="hash-9"), other)}) == 3


def test_another_configuration_is_another_study_with_scores_of_its_own():
    first, second = identity(), identity(configuration="hash-7")
    assert StudyIdentity.recall(second.identity_fields(), second.scoring_fields()) == second
    assert changes(first.identity_fields(), second.identity_fields()) == "configuration is new"
    assert len({study.scoring for study in (first, second, identity(configuration="hash-8"))}) == 3
    assert first.scoring_fields() == second.scoring_fields(), "it begins a generation, and is not refused"


def test_the_first_configuration_is_written_nowhere():
    assert "configuration" not in identity().identity_fields() | identity().scoring_fields()
