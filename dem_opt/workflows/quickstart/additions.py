"""Additions to the quickstart's study: a fifth distribution, of service logs, and a downstream task with exact answers."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

TASK = "quickstart_arithmetic"
"""Name of the task for lm-evaluation-harness."""

LINES = (4, 9)
"""Fewest and most lines of a log."""

_SERVICES = ("auth", "billing", "cache", "gateway", "mailer", "search", "storage")
_PATHS = ("/items", "/orders", "/login", "/health", "/reports", "/users")


def service_log(rng: random.Random) -> str:
    """A few consecutive lines of a service's log."""
    service, moment = rng.choice(_SERVICES), rng.randint(0, 86_000)
    lines = []
    for _ in range(rng.randint(*LINES)):
        moment += rng.randint(1, 40)
        hour, minute, second = moment // 3600 % 24, moment // 60 % 60, moment % 60
        lines.append(f"{hour:02d}:{minute:02d}:{second:02d} {service} {_event(rng)}")
    return "\n".join(lines)


def _event(rng: random.Random) -> str:
    status = rng.choice((200, 200, 200, 201, 304, 404, 500))
    level = "ERROR" if status >= 500 else "WARN" if status >= 400 else "INFO"
    path = f"{rng.choice(_PATHS)}/{rng.randint(1, 999)}"
    return f"{level} {rng.choice(('GET', 'POST'))} {path} status={status} ms={rng.randint(1, 900)}"


def write_task(folder: Path, problems: Sequence[str], end: str) -> None:
    """Write a task of exact match: answer a problem that is given with its worked steps.

    The path of its documents is relative, so that the folder can be copied and moved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents = folder / f"{TASK}.jsonl"
    parts = (problem.rpartition("\nAnswer:") for problem in problems)
    lines = [json.dumps({"question": worked, "answer": answer.strip()}) + "\n" for worked, _, answer in parts]
    documents.write_text("".join(lines), encoding="utf-8")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": documents.name}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", end], "max_gen_toks": 16, "do_sample": False},
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
