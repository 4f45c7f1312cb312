"""`dem-opt init`: write a study file from the folders of models and data."""

from argparse import Namespace
from dataclasses import asdict

from dem_opt.cli.console import Terminal


def init(arguments: Namespace, terminal: Terminal) -> None:
    """Write the study file, and say what was not used."""
    from dem_opt.checkpoints.architecture import silence_transformers
    from dem_opt.workflows.new_study import write_study

    silence_transformers()
    with terminal.progress():
        written = write_study(arguments.folders, arguments.out, arguments.base, arguments.name)
    if arguments.json:
        terminal.json(asdict(written) | {"path": str(written.path)})
        return
    terminal.line(f"Written: {written.path}")
    terminal.line(f"base            {written.base}")
    for name, source in written.distributions.items():
        terminal.line(f"distribution    {name}: {source}")
    for path, reason in written.unused.items():
        terminal.line(f"not used        {path}: {reason}")
    terminal.line(f"Next: dem-opt check {written.path}")
