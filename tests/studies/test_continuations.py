"""Tasks of continuations: the right answer goes on, the wrong ones go on elsewhere, and the harness reads them."""

import json
from pathlib import Path

import pytest
from continuations import ANSWER, CHOICES, CONTEXT, ITEMS, write_tasks

from dem_opt.data.harness import task_manager

TEXTS = [" ".join(f"{kind}{number}" for number in range(300)) for kind in ("alpha", "beta", "gamma", "delta", "eps")]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("one", "two"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
        (data / f"{name}.held_out.jsonl").write_text(lines)
    write_tasks(data, tmp_path / "tasks", ("one", "two"))
    return tmp_path / "tasks"


def test_one_answer_goes_on_and_the_others_are_of_other_texts(tasks: Path) -> None:
    lines = (tasks / "continue_one.jsonl").read_text().splitlines()
    assert len(lines) == ITEMS
    places = set()
    for line in lines:
        item = json.loads(line)
        context, right = item["context"], item["choices"][item["label"]]
        assert sum(context + right in text for text in TEXTS) == 1
        assert len(item["choices"]) == len(set(item["choices"])) == CHOICES
        kind = context.split()[1].rstrip("0123456789")
        wrong = [choice for choice in item["choices"] if choice != right]
        assert not any(kind in choice for choice in wrong)
        assert len(context) == CONTEXT
        assert all(len(choice) >= ANSWER for choice in item["choices"])
        places.add(item["label"])
    assert places == set(range(CHOICES))


def test_the_harness_finds_them_and_they_stay(tasks: Path) -> None:
    assert task_manager(tasks, ("continue_one", "continue_two"), "evaluate")
    before = (tasks / "continue_one.jsonl").read_bytes()
    assert before != (tasks / "continue_two.jsonl").read_bytes()
    write_tasks(tasks.parent / "data", tasks, ("one", "two"))
    assert (tasks / "continue_one.jsonl").read_bytes() == before
    (tasks.parent / "data/one.held_out.jsonl").unlink()
    write_tasks(tasks.parent / "data", tasks, ("one", "two"))


def test_a_short_text_is_cut_in_its_middle(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{number} words of {number}"}) + "\n" for number in range(CHOICES))
    (tmp_path / "short.held_out.jsonl").write_text(lines)
    write_tasks(tmp_path, tmp_path, ("short",))
    items = [json.loads(line) for line in (tmp_path / "continue_short.jsonl").read_text().splitlines()]
    assert all(item["context"] and item["choices"][item["label"]] for item in items)
