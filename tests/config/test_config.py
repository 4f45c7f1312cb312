"""The study file: defaults, and one line for each mistake."""

import copy
from pathlib import Path

import pytest
import yaml

from dem_opt.config import load
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
        ("distributions.code.validation", ["a"], "distributions.code.validation: must be a path, or a mapping"),
        ("distributions.code.validation", {}, "distributions.code.validation.path: is required"),
        ("distributions.code.validation", {"path": 5}, "distributions.code.validation.path = 5: "),
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [unclosed", "not valid YAML"),
        ("just words", "a study file is a mapping"),
        ("", "a study file is a mapping"),
        ("name: a\nname: b\n", "the key 'name' stands twice"),
        ("{a: 1}: b\n", "not valid YAML"),
        ("!!python/object:os.system x", "not valid YAML"),
    ],
)
def test_what_is_no_study_file_is_refused(tmp_path, text, said):
    with pytest.raises(InputError) as refusal:
        load(write(tmp_path, text))
    assert said in str(refusal.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(InputError, match="no such study file"):
        load(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary.yaml: the study file must be UTF-8"):
        load(tmp_path / "binary.yaml")


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
    found, source = load(write(tmp_path, study)).distributions["code"].fine_tune
    assert found == kind
    assert (source.path, source.hub, source.revision) == (path and tmp_path / path, hub, revision)


BAD_MODELS = {
    "{}": "must be a path, or a mapping with `hub:`",
    "{path: a, hub: b/c}": "must be a path, or a mapping with `hub:`",
    "{path: a, revision: v2}": "revision: belongs to a `hub:`",
    "{hub: a/b/c}": "should match pattern",
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


@pytest.mark.parametrize("given", [[], ["checkpoint", "adapter"]])
def test_a_fine_tune_is_one_thing(tmp_path, given):
    study = copy.deepcopy(STUDY)
    del study["distributions"]["code"]["checkpoint"]
    study["distributions"]["code"] |= dict.fromkeys(given, "models/code")
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
