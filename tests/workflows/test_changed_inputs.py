"""Laws of inputs that differ: from the base's, and from what they were when the study was run."""

import json
from pathlib import Path

import pytest
import worlds
from in_process import open_study
from recorded import RecordedProgress

from dem_opt.errors import InputError
from dem_opt.study import Study


def shorten(study: Path) -> None:
    """Leave out half of the texts of one distribution."""
    file = study.parent / "data/math.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::2]))


def reencode(study: Path) -> None:
    """Take a merge away from the base's tokenizer."""
    file = study.parent / "models/base/tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["merges"] = state["model"]["merges"][:-1]
    file.write_text(json.dumps(state))


def move(study: Path) -> None:
    """Put the weights of one fine-tune in the place of another's."""
    folder = study.parent / "models"
    (folder / "math/model.safetensors").write_bytes((folder / "code/model.safetensors").read_bytes())


COMMANDS = {
    "run": Study.run,
    "export": lambda study: study.export(study._context.path.parent / "out"),
    "score": lambda study: study.score({"code": 1.0}),
    "score --model": lambda study: study.score_model(study._context.path.parent / "models/code"),
}
CHANGES = [
    *((command, shorten, "distributions.math.") for command in COMMANDS),
    *((command, reencode, "tokenizer") for command in ("run", "export", "score")),
    ("export", move, "distributions.math"),
]


@pytest.mark.parametrize(("command", "change", "field"), CHANGES)
def test_a_change_since_the_run_is_named(tmp_path, command, change, field):
    path = worlds.study(tmp_path)
    open_study(path).run()
    change(path)
    with pytest.raises(InputError) as refusal:
        COMMANDS[command](open_study(path))
    assert field in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def other_ids(folder: Path) -> None:
    """Exchange two tokens."""
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(state))


def longer(folder: Path) -> None:
    """Declare more positions."""
    state = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(state | {"max_position_embeddings": 4096}))


UNLIKE = [(other_ids, "2 ids, of 'b' for 'a'"), (longer, "max_position_embeddings = 4096 (base: 64)")]
EVERYWHERE = {
    "run": Study.run,
    "score": COMMANDS["score"],
    "merge": lambda study: study.merge({"code": 1.0}, study._context.path.parent / "out"),
    "export": lambda study: (study.run(), COMMANDS["export"](study)),
}


@pytest.mark.parametrize("command", EVERYWHERE)
@pytest.mark.parametrize(("change", "words"), UNLIKE)
def test_what_a_fine_tune_has_otherwise_is_told_by_every_command(tmp_path, command, change, words):
    path = worlds.study(tmp_path)
    change(tmp_path / "models/math")
    progress = RecordedProgress()
    EVERYWHERE[command](open_study(path, progress))
    assert any("math" in warning and words in warning for warning in progress.warnings)


def test_another_spelling_of_a_tokenizer_is_the_same(tmp_path):
    path = worlds.study(tmp_path)
    file = tmp_path / "models/math/tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    file.write_text(json.dumps(state))
    progress = RecordedProgress()
    open_study(path, progress).run()
    assert progress.warnings == []


def test_another_chat_template_is_told_where_conversations_are_scored(tmp_path):
    path = worlds.study(tmp_path)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}<assistant>{% endif %}"
    (tmp_path / "models/base/chat_template.jinja").write_text(template + prompt)
    (tmp_path / "models/code/chat_template.jinja").write_text(template + prompt)
    (tmp_path / "models/math/chat_template.jinja").write_text(template + "." + prompt)
    progress = RecordedProgress()
    open_study(path, progress).score({"code": 1.0})
    assert progress.warnings == []
    texts = [json.loads(line)["text"] for line in (tmp_path / "data/prose.jsonl").read_text().splitlines()]
    turns = [[{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}] for text in texts]
    (tmp_path / "data/chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    general = {"chats": {"validation": {"path": "data/chats.jsonl", "format": "messages"}}}
    open_study(worlds.study(tmp_path, general=general, name="chats"), progress).score({"code": 1.0})
    (warning,) = progress.warnings
    assert "math" in warning and "chat template" in warning
