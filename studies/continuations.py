"""Tasks for lm-evaluation-harness from held-out texts: which of four passages goes on where a text stops?

The wrong ones go on other texts of the same kind, so a model has to know more than the kind of text.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

from dem_opt.atomic import write_text

ITEMS = 40
"""Questions of each kind of text."""

CONTEXT, ANSWER = 240, 80
"""Characters of a question and of an answer, about; both end between words."""

CHOICES = 4


def write_tasks(data: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Write a task `continue_NAME` for each kind of text, unless the folder has it.

    Paths of documents are relative, so that the folder can be copied and moved.

    Args:
        data: Folder of `NAME.held_out.jsonl`.
        folder: Folder of the task files.
        names: Kinds of text.
    """
    for name in names:
        task, documents = f"continue_{name}", folder / f"continue_{name}.jsonl"
        if (folder / f"{task}.yaml").is_file():
            continue
        lines = (data / f"{name}.held_out.jsonl").read_text(encoding="utf-8").splitlines()
        items = questions([json.loads(line)["text"] for line in lines], Random(name))
        write_text(documents, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
        settings = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": documents.name}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        write_text(folder / f"{task}.yaml", json.dumps(settings, indent=1) + "\n")


def questions(texts: Sequence[str], random: Random) -> list[dict[str, object]]:
    """ITEMS questions, from all texts in turn; the wrong answers come from other texts."""
    items = []
    for number in range(ITEMS):
        own = number % len(texts)
        context, answer = passage(texts[own], random)
        others = random.sample([text for place, text in enumerate(texts) if place != own], CHOICES - 1)
        choices = [answer, *(passage(text, random)[1] for text in others)]
        random.shuffle(choices)
        items.append({"context": context, "choices": choices, "label": choices.index(answer)})
    return items


def passage(text: str, random: Random) -> tuple[str, str]:
    """A context and what follows it, at a random place of a text: both end where a word does."""
    ends = [match.start() for match in re.finditer(r"\s+", text)]
    last = len(text) - ANSWER
    place = random.choice([end for end in ends if CONTEXT <= end <= last] or [len(text) // 2])
    stop = next((end for end in ends if end >= place + ANSWER), len(text))
    return text[max(place - CONTEXT, 0) : place], text[place:stop]
