"""The study file: defaults, and one line for each mistake."""

import copy
import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dem_opt.config import StudyConfig, load
from dem_opt.config.reference import study_file_reference
from dem_opt.errors import InputError
from dem_opt.simplex import Space

STUDY = {
    "name": "example",
    "base": "models/base",
    "distributions": {
        "code": {"checkpoint": "models/code", "validation": "data/code.jsonl"},
        "math": {"checkpoint": "/models/math", "validation": "data/math.jsonl", "train": "data/math.train.jsonl"},
    },
}


def write(folder: Path, study: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(study if isinstance(study, str) else yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def changed(where: str, value: object) -> dict:
    """The study with one field, named by dots, set to a value."""
    study = copy.deepcopy(STUDY)
    *sections, last = where.split(".")
    section = study
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    return study


def test_relative_paths_start_at_the_file(tmp_path):
    config = load(write(tmp_path, STUDY))
    assert config.base.path == tmp_path / "models/base"
    assert config.distributions["code"].checkpoint.path == tmp_path / "models/code"
    assert config.distributions["math"].checkpoint.path == Path("/models/math")
    assert config.output == tmp_path / "runs/example"
    assert config.storage == f"sqlite:///{tmp_path}/runs/example/study.db"
    assert config.tracking.uri == f"sqlite:///{tmp_path}/runs/example/mlflow.db"
    assert config.tracking.experiment == "example"


def test_databases_follow_the_output(tmp_path):
    config = load(write(tmp_path, changed("output", "elsewhere")))
    assert config.storage == f"sqlite:///{tmp_path}/elsewhere/study.db"


def test_the_order_of_distributions_makes_the_same_space(tmp_path):
    turned = copy.deepcopy(STUDY)
    turned["distributions"] = dict(reversed(STUDY["distributions"].items()))
    assert load(write(tmp_path, turned)).space == load(write(tmp_path, STUDY)).space


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("~/models/code", "home/models/code"),
        ("./~/code", "~/code"),
        ("~code/a", "~code/a"),
        ("~", "~"),
        ("a/~/b", "a/~/b"),
        ("$HOME/a", "$HOME/a"),
    ],
)
def test_a_path_may_begin_at_home(tmp_path, monkeypatch, written, place):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    study = load(write(tmp_path, changed("distributions.code.checkpoint", written)))
    assert study.distributions["code"].checkpoint.path == tmp_path / place
    study = load(write(tmp_path, changed("distributions.code.validation", written)))
    assert study.distributions["code"].validation.path == tmp_path / place


def test_weights_are_equal_unless_given(tmp_path):
    assert load(write(tmp_path, STUDY)).weights == {"code": 1.0, "math": 1.0}
    assert load(write(tmp_path, changed("objective.weights", {"math": 2}))).weights == {"code": 0.0, "math": 2.0}


def test_general_corpora_weigh_nothing_unless_they_are_named(tmp_path):
    study = STUDY | {"general": {"web": "data/web.jsonl"}}
    assert load(write(tmp_path, study)).weights == {"code": 1.0, "math": 1.0, "web": 0.0}
    named = load(write(tmp_path, study | {"objective": {"weights": {"code": 1, "web": 0.5}, "protect": {"web": 0}}}))
    assert named.weights == {"code": 1.0, "math": 0.0, "web": 0.5}
    assert named.objective.protect == {"web": 0.0}
    assert named.space.names == ("code", "math")


@pytest.mark.parametrize(
    ("written", "columns"),
    [
        ("a.jsonl", {"text": "text"}),
        ({"path": "a.jsonl"}, {"text": "text"}),
        ({"path": "a.jsonl", "text": "body"}, {"text": "body"}),
        ({"path": "a.jsonl", "format": "messages"}, {"messages": "messages"}),
        (
            {"path": "a.jsonl", "format": "prompt_completion", "prompt": "question"},
            {"prompt": "question", "completion": "completion"},
        ),
    ],
)
@pytest.mark.parametrize("field", ["train", "validation", "held_out"])
def test_a_data_file_is_a_path_or_a_mapping(tmp_path, field, written, columns):
    data = getattr(load(write(tmp_path, changed(f"distributions.code.{field}", written))).distributions["code"], field)
    assert (data.path, data.columns) == (tmp_path / "a.jsonl", columns)


@pytest.mark.parametrize(
    "written", [{"task": "a"}, {"task": "a", "include": "tasks"}, {"task": "a", "include": "tasks", "split": "dev"}]
)
@pytest.mark.parametrize("field", ["distributions.code.validation", "distributions.code.held_out", "general.web"])
def test_data_may_be_a_task_and_are_written_as_they_were(tmp_path, field, written):
    config = load(write(tmp_path, changed(field, written)))
    web = config.general.get("web")
    data = web.validation if web else getattr(config.distributions["code"], field.rpartition(".")[2])
    place = {"include": str(tmp_path / "tasks")} if "include" in written else {}
    assert (data.format, data.paths, data.model_dump()) == ("prompt_completion", [], written | place)
    assert StudyConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("data", ["web.jsonl", {"path": "web.jsonl", "text": "body"}])
def test_a_general_corpus_is_a_data_file_or_two(tmp_path, data, nested):
    web = load(write(tmp_path, changed("general.web", {"validation": data} if nested else data))).general["web"]
    assert web.validation.path == tmp_path / "web.jsonl" and web.held_out is None
    both = {"validation": data, "held_out": "other.parquet"}
    assert (
        load(write(tmp_path, changed("general.web", both))).general["web"].held_out.path == tmp_path / "other.parquet"
    )


def test_a_learning_rate_may_be_written_in_any_notation(tmp_path):
    text = yaml.safe_dump(STUDY) + "fine_tuning: {learning_rate: 3e-4}\n"
    assert load(write(tmp_path, text)).fine_tuning.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("serch", {}, "serch = {}: unknown key; did you mean 'search'?"),
        ("compute.residents", 2, "compute.residents = 2: this key has been renamed; write compute.workers"),
        ("compute.gpus_per_resident", 4, "compute.gpus_per_resident = 4: this key has been renamed; write compute.g"),
        ("search.trails", 3, "search.trails = 3: unknown key; did you mean 'trials'?"),
        ("distributions.code.chekpoint", "x", "did you mean 'checkpoint'?"),
        ("search.trials", 0, "search.trials = 0: "),
        ("search.trials", 2.5, "search.trials = 2.5: "),
        ("search.trials", "many", "search.trials = 'many': "),
        ("search.algorithm", "gp", "search.algorithm = 'gp': "),
        ("simplex.total", -1, "simplex.total = -1: "),
        ("simplex.total", float("inf"), "simplex.total = inf: "),
        ("simplex.total", [2, 1], "simplex: total: [2, 1] ends before it begins"),
        ("simplex.total", [0, 0], "simplex: total: must be above 0"),
        ("simplex.total", [0.5], "simplex.total"),
        ("simplex.bounds", {"cod": [0, 1]}, "simplex.bounds.cod: no such distribution; did you mean 'code'?"),
        ("simplex.bounds", {"code": [0.5, 0.1]}, "simplex: bounds.code: [0.5, 0.1] ends before it begins"),
        ("simplex.bounds", {"code": [-0.5, 0.1]}, "simplex.bounds.code.0 = -0.5: "),
        ("simplex.bounds", {"code": [0.6, 1], "math": [0.6, 1]}, "simplex: the least coefficients sum to 1.2"),
        ("simplex.bounds", {"code": [0, 0.3], "math": [0, 0.3]}, "simplex: the greatest coefficients sum to 0.6"),
        ("simplex", {"bounds": {"code": [0, 1]}, "fixed": {"code": 0.5}}, "simplex: fixed.code: has bounds too"),
        ("simplex.fixed", {"code": 1.5}, "simplex: the least coefficients sum to 1.5, more than the total of 1"),
        ("search.forwards", 0, "search.forwards = 0: "),
        ("search.gradients", "yes", "search.gradients"),
        ("search.patience", 0, "search.patience = 0: "),
        ("objective", {"worst": 1}, "objective.worst = 1: "),
        ("name", "a b", "name = 'a b': "),
        ("name", "../up", "name = '../up': "),
        ("base", 3, "base = 3: "),
        ("distributions", {}, "distributions = {}: "),
        ("distributions", ["code"], "distributions = ['code']: "),
        ("storage", 5, "storage = 5: "),
        ("tracking", "here", "tracking = 'here': "),
        (
            "objective.weights",
            {"cod": 1},
            "objective.weights.cod: no such distribution or general corpus; did you mean 'code'?",
        ),
        ("objective.protect", {"cod": 1}, "objective.protect.cod: no such distribution or general corpus; did you"),
        ("objective.protect", {"code": -0.1}, "objective.protect.code = -0.1: "),
        ("objective.protect", {"code": float("nan")}, "objective.protect.code = nan: "),
        ("objective.protects", {}, "objective.protects = {}: unknown key; did you mean 'protect'?"),
        ("general", {"code": "data/web.jsonl"}, "general.code: a distribution has this name; choose another"),
        (
            "general",
            {"web": 5},
            "general.web.validation: must be a path, or a mapping with `path:` and `format:`, not 5",
        ),
        (
            "general",
            {"web": {"validatoin": "a"}},
            "general.web.validatoin = 'a': unknown key; did you mean 'validation'?",
        ),
        ("general", {"web": {"path": "a", "fromat": "text"}}, "unknown key; did you mean 'format'?"),
        ("general", {"a b": "a"}, "general.a b"),
        ("distributions.code.validation", 5, "distributions.code.validation: must be a path, or a mapping"),
        ("distributions.code.validation", [], "distributions.code.validation.path: must be a path or a list of paths"),
        ("distributions.code.validation", ["a", 5], "distributions.code.validation.path: must be a path or a list"),
        ("distributions.code.validation", {"path": "a", "tools": "t"}, "tools: not a column of format text"),
        ("evaluation.date", "yesterday", "evaluation.date = 'yesterday'"),
        ("distributions.code.validation", {}, "distributions.code.validation: must have a `path:` or a `task:`"),
        ("distributions.code.validation", {"task": "a", "path": "b"}, "must have a `path:` or a `task:`, and not both"),
        (
            "distributions.code.validation",
            {"task": "a", "format": "text"},
            "validation: format: of a `task:` is prompt_",
        ),
        ("distributions.code.validation", {"task": "a", "prompt": "b"}, "validation: prompt: is not for a `task:`"),
        ("distributions.code.validation", {"path": "a", "split": "b"}, "validation: split: belongs to a `task:`"),
        ("distributions.code.held_out", {"path": "a", "include": "b"}, "held_out: include: belongs to a `task:`"),
        ("distributions.code.held_out", {"task": ["a"]}, "distributions.code.held_out.task = ['a']: must be text"),
        ("distributions.code.train", {"task": "a"}, "distributions.code: train: must be files"),
        (
            "general.web",
            {"task": "a", "splt": "b"},
            "general.web.validation.splt = 'b': unknown key; did you mean 'split'",
        ),
        ("distributions.code.validation", {"path": 5}, "distributions.code.validation.path: must be a path"),
        (
            "distributions.code.train",
            {"pth": "a"},
            "distributions.code.train.pth = 'a': unknown key; did you mean 'path'?",
        ),
        (
            "distributions.code.held_out",
            {"path": "a", "format": "chat"},
            "distributions.code.held_out.format = 'chat': ",
        ),
        (
            "distributions.code.validation",
            {"path": "a", "format": "messages", "prompt": "question"},
            "distributions.code.validation: prompt: not a column of format messages, which has messages",
        ),
        (
            "distributions.code.validation",
            {"path": "a", "format": "prompt_completion", "text": "text"},
            "distributions.code.validation: text: not a column of format prompt_completion, which has prompt and",
        ),
        ("distributions.code.validation", {"path": "a", "text": ""}, "distributions.code.validation.text = '': "),
        ("distributions.validation", {"checkpoint": "a", "validaton": "b"}, "did you mean 'validation'?"),
        ("objective.weights", {"code": 0}, "objective.weights: at least one"),
        ("objective.weights", {"code": -1}, "objective.weights.code = -1: "),
        ("tracking.uri", "sqlite:///runs/example/study.db", "tracking.uri: must be another database"),
        ("evaluation.window", 1, "evaluation.window = 1: "),
        ("evaluation.batch", "big", "evaluation.batch = 'big': "),
    ],
)
def test_what_a_study_may_not_say_is_refused_in_one_line(tmp_path, where, value, said):
    path = write(tmp_path, changed(where, value))
    with pytest.raises(InputError) as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and said in message and "\n" not in message


SPACES = {
    "{}": Space(("code", "math")),
    "{total: 0.5}": Space(("code", "math"), 0.5),
    "{total: [0, 2]}": Space(("code", "math"), 2.0, 0.0),
    "{total: [1, 1]}": Space(("code", "math")),
    "{bounds: {code: [0, 0.8]}, fixed: {math: 0.3}}": Space(
        ("code", "math"), 1.0, None, (("code", 0.0, 0.8), ("math", 0.3, 0.3))
    ),
}


@pytest.mark.parametrize("written", SPACES)
def test_the_space_is_what_the_simplex_says(tmp_path, written):
    assert load(write(tmp_path, STUDY | {"simplex": yaml.safe_load(written)})).space == SPACES[written]


def test_a_lattice_without_a_point_is_refused(tmp_path):
    """Halves of three distributions at most, and one whole step to be shared out."""
    by_name = STUDY["distributions"] | {"prose": STUDY["distributions"]["code"]}
    bounds = {"bounds": {name: [0, 0.5] for name in by_name}}
    study = STUDY | {"distributions": by_name, "simplex": bounds, "search": {"algorithm": "grid", "divisions": 1}}
    with pytest.raises(InputError, match=r"search.divisions: no point of the lattice of 1 is within the bounds"):
        load(write(tmp_path, study))


def test_a_regret_needs_a_distribution_with_a_weight(tmp_path):
    objective = {"worst": True, "weights": {"web": 1}}
    with pytest.raises(InputError, match=r"objective.worst: no distribution has a weight"):
        load(write(tmp_path, STUDY | {"general": {"web": "data/web.jsonl"}, "objective": objective}))


@pytest.mark.parametrize("search", [{"gradients": True}, {"algorithm": "gradient"}])
def test_a_largest_regret_has_no_gradient(tmp_path, search):
    with pytest.raises(InputError, match=r"objective.worst: a largest regret has no gradient"):
        load(write(tmp_path, STUDY | {"objective": {"worst": True}, "search": search}))


@pytest.mark.parametrize(
    ("sections", "patience"),
    [
        ({}, {"simplex-gp": 3, "random": None, "gradient": None}),
        ({"objective": {"weights": {"math": 2}}}, {"simplex-gp": 3}),
        ({"objective": {"worst": True}}, {"simplex-gp": None}),
        ({"objective": {"function": "losses.py:mean"}}, {"simplex-gp": None}),
        ({"objective": {"pareto": ["code", "math"]}}, {"simplex-gp": None}),
        ({"objective": {"worst": True}, "search": {"patience": 5}}, {"simplex-gp": 5, "gradient": 5}),
        ({"search": {"patience": None}}, {"simplex-gp": None}),
    ],
)
def test_a_search_ends_by_itself_where_its_surface_is_a_bowl(tmp_path, sections, patience):
    study = load(write(tmp_path, STUDY | sections))
    assert {algorithm: study.patience(algorithm) for algorithm in patience} == patience


@pytest.mark.parametrize(("lookahead", "expected"), [(None, (0, 0, 0, 1, 1)), ("auto", (0, 0, 0, 1, 1)), (2, (2,) * 5)])
def test_proposals_that_ask_for_scores_are_not_made_ahead(tmp_path, lookahead, expected):
    sections = {} if lookahead is None else {"search": {"lookahead": lookahead}}
    study = load(write(tmp_path, STUDY | sections))
    assert tuple(map(study.lookahead, ("simplex-gp", "tpe", "gradient", "grid", "random"))) == expected


@pytest.mark.parametrize("missing", ["name", "base", "distributions", "distributions.code.validation"])
def test_what_is_missing_is_named(tmp_path, missing):
    study = copy.deepcopy(STUDY)
    *sections, last = missing.split(".")
    section = study
    for name in sections:
        section = section[name]
    del section[last]
    with pytest.raises(InputError, match=f"{missing}: is required"):
        load(write(tmp_path, study))


FAULTS = {
    "tab": ("name: a\nsearch:\n\ttrials: 3\n", "line 3, column 1: not valid YAML: tabs"),
    "two colons": ("name: a: b\n", "line 1, column 8: not valid YAML: a second `:`"),
    "key twice": ("name: a\nname: b\n", "name: stands twice, in line 1 and in line 2"),
    "inner key twice": ("search:\n  trials: 3\n  seed: 1\n  trials: 4\n", "search.trials: stands twice, in line 2 and"),
    "key twice in a list": ("a:\n- {x: 1}\n- {x: 1, y: 2,\n   x: 3}\n", "a.1.x: stands twice, in line 3 and in line 4"),
    "number twice": ("search: {1: 2, 1: 3}\n", "search.1: stands twice"),
    "open quote": ("name: 'abc\nbase: x\n", "line 1, column 7: not valid YAML: the quotation mark or bracket"),
    "open bracket": ("name: [unclosed", "line 1, column 7: not valid YAML"),
    "open brace": ("name: a\nsearch: {trials: 3\nbase: x\n", "line 2, column 9: not valid YAML: a bracket"),
    "comma left out": ("search: {trials: 3 seed: 4}\n", "line 1, column 9: not valid YAML"),
    "alias of nothing": ("name: *x\n", "line 1, column 7: not valid YAML: no `&`"),
    "anchor twice": ("name: &a x\nbase: &a y\n", "line 2, column 7: not valid YAML: two `&`"),
    "asterisk": ("name: *\n", "line 1, column 8: not valid YAML: quote"),
    "tag": ("name: !foo x\n", "line 1, column 7: not valid YAML: this tag"),
    "object": ("!!python/object:os.system x", "line 1, column 1: not valid YAML: this tag"),
    "two documents": ("name: a\n---\nname: b\n", "line 2, column 1: not valid YAML: the file holds several"),
    "no date": ("name: 2001-99-99\n", "line 1, column 7: not valid YAML: this is read as a date"),
    "no number": ("name: !!int abc\n", "line 1, column 7: not valid YAML: this is read as"),
    "too long a number": (f"name: {'9' * 5000}\n", "line 1, column 7: not valid YAML"),
    "no bytes": ("name: !!binary ü\n", "line 1, column 7: not valid YAML"),
    "outdented": (
        "search:\n  trials: 3\n base: b\n",
        "line 3, column 2: not valid YAML: this line stands in another column",
    ),
    "list and mapping": ("distributions:\n- code\nmore: x\n- math\n", "line 4, column 1: not valid YAML"),
    "control character": ("name: a\nbase: \x07\n", "line 2: not valid YAML: this character"),
    "reserved character": ("name: @x\n", "line 1, column 7: not valid YAML: quote"),
    "no escape": ('name: "a\\qb"\n', "line 1, column 10: not valid YAML: this backslash"),
    "no key": ("name: a\nbase\nsearch: {}\n", "line 2, column 1: not valid YAML: this line is no"),
    "key of a mapping": ("{a: 1}: b\n", "line 1, column 1: not valid YAML: a key"),
    "merged number": ("<<: 3\nname: a\n", "line 1, column 5: not valid YAML"),
    "block": ("name: |x\n  b\n", "line 1, column 8: not valid YAML"),
    "nested without end": ("name: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "words": ("just words", "a study file is a mapping"),
    "nothing": ("", "a study file is a mapping"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_yaml_is_refused_with_its_line_in_plain_words(tmp_path, fault):
    text, said = FAULTS[fault]
    path = write(tmp_path, text)
    with pytest.raises(InputError) as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and said in message and "\n" not in message
    assert "unicode string" not in message and "expected" not in message and "while" not in message


WRONG = (
    *(None, 3, -1, 2.5, True, float("nan"), 10**30, "x y", "\udc80", [], {}, [1], [[1]], [{"a": 1}]),
    *({1: 2}, {"a b": 1}, {"code": [0.5]}, {"code": None}, {"code": "x"}, {"code": {"a": 1}}),
)
"""Values of every kind that YAML has; none is right everywhere."""

PLACES = [
    entry.key.replace("general.NAME", "general.web").replace("NAME", "code")
    for entry in study_file_reference()
    if not entry.key.startswith(("DATA.", "MODEL."))
]
PLACES += [
    *("distributions", "distributions.code", "general", "general.web", "simplex", "objective", "evaluation", "search"),
    *("compute", "tracking", "outages", "fine_tuning", "data_mixing", "evaluate", "simplex.bounds.code"),
    *("base.path", "base.hub", "base.step", "base.pickled", "objective.weights.code"),
    *("distributions.code.validation.path", "distributions.code.validation.format", "distributions.code.train.text"),
]

PYDANTIC = ("Input should", "Field required", "Value error", "valid ", "Extra inputs", "instance of", "parse", "tuple")


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_value_is_named_with_its_field_and_no_word_of_a_library(tmp_path, place):
    refused = 0
    for value in WRONG:
        study = copy.deepcopy(STUDY)
        *sections, last = place.split(".")
        section = study
        for name in sections:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
        try:
            StudyConfig.model_validate(study)
        except ValidationError:
            error = _refusal(tmp_path, study)
            message = str(error)
            refused += 1
            assert error.field is None or error.field.split(".")[0] == place.split(".")[0], message
            assert not any(word in message.replace(repr(value), "") for word in PYDANTIC), message
            assert "\n" not in message and len(message) < 700, message
    assert refused, "every field refuses something"


def _refusal(tmp_path: Path, study: dict) -> InputError:
    """The error for a study that YAML may not be able to write."""
    with pytest.raises(InputError) as refusal, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dem_opt.config.read_yaml", lambda path: study)
        load(tmp_path / "study.yaml")
    return refusal.value


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("simplex.total", [0.5], "simplex.total = [0.5]: must be a number greater than 0 or [number"),
        ("simplex.bounds.code", [0.5], "simplex.bounds.code = [0.5]: must be [number of at least 0, number"),
        ("simplex.bounds.code", 3, "simplex.bounds.code = 3: must be [number of at least 0, number"),
        ("search.trials", 0, "search.trials = 0: must be an integer greater than 0"),
        ("search.trials", None, "search.trials: is empty; must be an integer greater than 0"),
        ("search", None, "search: is empty; must be a mapping with keys of its own: algorithm, trials"),
        ("search.algorithm", "cmaez", "did you mean 'cmaes'?"),
        ("evaluation.batch", "atuo", "must be `auto` or an integer greater than 0; did you mean 'auto'?"),
        ("evaluation.dtype", "float", "must be `auto` or `float32`"),
        ("objective.function", "f", "must be an importable function, `package.module:name`"),
        ("general", {"a b": "x"}, "general.a b: must be a name: letters, digits"),
        ("data_mixing.mixtures", [{"code": 1}, {"code": "x"}], "data_mixing.mixtures.1.code = 'x': must be a number"),
        ("data_mixing.tokens", [], "data_mixing.tokens = []: must be a list of `all` or `one`, and not empty"),
        ("evaluate", {"tasks": [1]}, "evaluate.tasks.0 = 1: must be text, and not empty"),
        ("output", 5, "output = 5: must be a path"),
        ("fine_tuning.trainer", {1: 2}, "fine_tuning.trainer.1"),
    ],
)
def test_the_words_for_a_wrong_value_say_what_it_must_be(tmp_path, where, value, said):
    message = str(_refusal(tmp_path, changed(where, value)))
    assert said in message and message.startswith(f"{tmp_path}/study.yaml: {where.split('.')[0]}")


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(InputError, match="no such study file"):
        load(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary.yaml: the study file must be UTF-8"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_told_at_once(tmp_path, kind):
    path = tmp_path / "study.yaml"
    match kind:
        case "folder":
            (path / "study.yaml").mkdir(parents=True)
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is a folder" if kind == "folder" else "is no file"):
        load(path)


def test_a_folder_in_the_place_of_its_study_file_names_it(tmp_path):
    (tmp_path / "study.yaml").write_text("name: a\n")
    with pytest.raises(InputError, match=r"name the study file in it: .*/study\.yaml"):
        load(tmp_path)


MODELS = {
    "adapters/code": ("adapters/code", None, None),
    "{path: adapters/code}": ("adapters/code", None, None),
    "{hub: somebody/code}": (None, "somebody/code", None),
    "{hub: somebody/code, revision: v2}": (None, "somebody/code", "v2"),
}


@pytest.mark.parametrize("written", MODELS)
@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_fine_tune_is_a_checkpoint_or_an_adapter_in_a_folder_or_on_a_hub(tmp_path, kind, written):
    study = copy.deepcopy(STUDY)
    del study["distributions"]["code"]["checkpoint"]
    study["distributions"]["code"][kind] = yaml.safe_load(written)
    path, hub, revision = MODELS[written]
    form, source = load(write(tmp_path, study)).distributions["code"].fine_tune
    assert form == kind
    assert (source.path, source.hub, source.revision) == (path and tmp_path / path, hub, revision)


BAD_MODELS = {
    "{}": "must be a path, or a mapping with `hub:`",
    "{path: a, hub: b/c}": "must be a path, or a mapping with `hub:`",
    "{path: a, revision: v2}": "revision: belongs to a `hub:`",
    "{hub: a/b/c}": "base.hub = 'a/b/c': must be an id of the Hugging Face Hub, `owner/name`",
    "{run: models/code}": "run, step: belong together",
    "{step: best}": "run, step: belong together",
    "{run: models/code, step: last}": "base.step",
    "{path: a, run: models/code, step: 3}": "or with `run:` and `step:`",
    "{hubb: a/b}": "hubb = 'a/b': unknown key; did you mean 'hub'",
    "3": "",
}


@pytest.mark.parametrize("written", BAD_MODELS)
def test_a_model_that_is_nowhere_is_told(tmp_path, written):
    study = copy.deepcopy(STUDY)
    study["base"] = yaml.safe_load(written)
    with pytest.raises(InputError, match="base") as refused:
        load(write(tmp_path, study))
    assert BAD_MODELS[written] in str(refused.value)


@pytest.mark.parametrize("kinds", [[], ["checkpoint", "adapter"]])
def test_a_fine_tune_is_one_thing(tmp_path, kinds):
    study = copy.deepcopy(STUDY)
    del study["distributions"]["code"]["checkpoint"]
    study["distributions"]["code"] |= dict.fromkeys(kinds, "models/code")
    with pytest.raises(InputError, match="a `checkpoint:` or an `adapter:`, and not both"):
        load(write(tmp_path, study))


def test_a_kept_step_needs_a_training_that_keeps_them(tmp_path):
    study = copy.deepcopy(STUDY)
    study["distributions"]["code"] |= {"checkpoint": {"run": "models/code", "step": "best"}, "train": "data/code.jsonl"}
    with pytest.raises(InputError, match=r"distributions.code.checkpoint.step: needs `fine_tuning: \{keep: true\}`"):
        load(write(tmp_path, study))
    loaded = load(write(tmp_path, study | {"fine_tuning": {"keep": True}})).distributions["code"].checkpoint
    assert (loaded.place, loaded.step) == (tmp_path / "models/code", "best")
    assert loaded.model_dump() == {"run": str(tmp_path / "models/code"), "step": "best"}
