"""`dem-opt check`: what is on disk, what a worker holds, what the study takes."""

from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from dem_opt.cli import json_output
from dem_opt.cli.console import Terminal

if TYPE_CHECKING:
    from dem_opt.data.overlap import Overlap
    from dem_opt.planning.plan import Plan
    from dem_opt.workflows.check import Findings

OVERLAPS = 12
"""Overlaps that are printed."""


def check(arguments: Namespace, terminal: Terminal) -> None:
    """Print the findings, refuse a study that cannot run, then check its texts and vertices."""
    from dem_opt.config import load
    from dem_opt.workflows import check as workflow
    from dem_opt.workflows.overlap import measure_overlap, overlap_warnings

    config = load(arguments.study)
    with terminal.progress():
        findings = workflow.check(config, arguments.study, arguments.difference)
        overlap = measure_overlap(config, arguments.study) if arguments.overlap else None
    if arguments.json:
        terminal.json(json_output.of_findings(findings) | ({"overlap": asdict(overlap)} if overlap else {}))
    else:
        _print_findings(findings, terminal)
        if overlap:
            _print_overlap(overlap, terminal)
    workflow.refuse(findings, config, arguments.study)
    with terminal.progress() as progress:
        for warning in overlap_warnings(overlap, config) if overlap else ():
            progress.warning(warning)
        for warning in workflow.check_contents(config, arguments.study):
            progress.warning(warning)


def _print_findings(findings: "Findings", terminal: Terminal) -> None:
    from dem_opt.planning.plan import sized

    headers = ("checkpoint", "tensors", "parameters", "dtypes", "size", "hashed")
    rows = [
        (
            checkpoint.name,
            f"{checkpoint.tensors:,}",
            f"{checkpoint.parameters:,}",
            " ".join(checkpoint.dtypes),
            sized(checkpoint.bytes),
            "yes" if checkpoint.hashed else "not yet",
        )
        for checkpoint in findings.checkpoints
    ]
    terminal.table(f"The checkpoints fit together: {findings.architecture}", headers, rows)
    _print_memory(findings.plan, terminal)
    _print_passes(findings.plan, terminal)
    for line in findings.lines():
        terminal.line(line)


def _print_overlap(overlap: "Overlap", terminal: Terminal) -> None:
    from dem_opt.dashboards.tables import overlap_table

    table = overlap_table(overlap)
    if table.rows:
        title = "Documents that stand in training data or in another split; the largest overlaps first"
        *headers, _ = table.headers  # examples stand in the warnings
        rows = [row[: len(headers)] for row in table.rows[:OVERLAPS]]
        terminal.table(title, headers, rows, words=table.words)
    tokens = ", ".join(f"{name} {count:,}" for name, count in overlap.training.items())
    lines = [
        "" if table.rows else "Overlap: no document shares a 13-gram with training data or with another split.",
        f"{len(table.rows) - OVERLAPS} smaller overlaps are in --json." if len(table.rows) > OVERLAPS else "",
        f"Tokens of training data read: {tokens}." if tokens else "",
    ]
    for line in filter(None, lines):
        terminal.line(line)


def _print_memory(plan: "Plan", terminal: Terminal) -> None:
    from dem_opt.planning.plan import sized

    calls, memory, gpus = plan.calls, plan.memory, plan.gpus_per_worker
    worker = "one worker" if gpus == 1 else f"one worker, on each of its {gpus} GPUs"
    rows = [
        (_stored(plan), sized(memory.stored)),
        (f"merged model in {calls.dtype}", sized(memory.live)),
        (f"activations and logits of {calls.call_tokens:,} tokens", sized(memory.activations)),
        ("merge scratch and windows", sized(memory.scratch + memory.windows)),
        ("the process and its libraries", sized(memory.process)),
        (worker, sized(memory.peak)),
    ]
    terminal.table("Memory at the peak (1 GB = 1e9 bytes)", ("part", "size"), rows, strong=len(rows) - 1)


def _stored(plan: "Plan") -> str:
    """The form in which a worker keeps the checkpoints."""
    if plan.calls.vectors != "exact":
        return f"the base as it is stored, {plan.checkpoints - 1} vectors in {plan.calls.vectors}"
    kept, files = plan.checkpoints - len(plan.memory.streamed), len(plan.memory.streamed)
    return f"{kept} checkpoints as they are stored" + (f", {files} read from files at every merge" if files else "")


def _print_passes(plan: "Plan", terminal: Terminal) -> None:
    work = plan.work
    passes = [
        ("one composite on the search split", 1, work.trial_tokens),
        (f"base, {work.trials} trials, baselines", work.composites, work.composites * work.trial_tokens),
        ("results table on the held-out split", work.reported, work.reported * work.report_tokens),
        ("the whole study", work.composites + work.reported, work.tokens),
    ]
    rows = [(part, f"{composites:,}", f"{tokens:,}") for part, composites, tokens in passes]
    terminal.table(
        "Forward passes of the whole study at most",
        ("part", "composites", "forward tokens"),
        rows,
        strong=len(rows) - 1,
    )
