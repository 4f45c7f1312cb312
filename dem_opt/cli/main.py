"""The program `dem-opt`: run one command and turn what went wrong into a line and an exit status."""

import gc
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, closing

from dem_opt.cli.console import Terminal
from dem_opt.cli.log_file import LogFile
from dem_opt.cli.parser import parser
from dem_opt.compute import SETTINGS
from dem_opt.errors import EvaluationError, InputError, OutageError, TrainingError
from dem_opt.signals import sigterm_as_ctrl_c

__all__ = ["main", "parser"]

RARELY = 20_000
"""Objects after which garbage is looked for; with Python's 700, to import torch and transformers takes a tenth more."""

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after `dem-opt`; those of the process unless given.

    Returns:
        The exit status: 0 done, 1 something failed that is not the user's doing, 2 the user's mistake, 130 interrupted.
    """
    # OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", SETTINGS["GOMP_SPINCOUNT"])
    gc.set_threshold(RARELY)
    words = sys.argv[1:] if arguments is None else list(arguments)
    with ExitStack() as contexts:
        terminal = Terminal()
        try:
            parsed = parser().parse_args(words)
            log = contexts.enter_context(closing(LogFile(parsed.log_file))) if parsed.log_file else None
            terminal = Terminal(quiet=parsed.quiet, as_json=parsed.json, log=log)
            if log:
                log.write("command", shlex.join(["dem-opt", *words]))
        except InputError as error:
            terminal.error(f"dem-opt: {error}")
            return MISTAKE
        status = _run(parsed, terminal, shlex.join(["dem-opt", *words]))
        if log:
            log.write("status", str(status))
        return status


def _run(parsed: Namespace, terminal: Terminal, command: str) -> int:
    """Run a parsed command; `command` is how to give it again."""
    try:
        with sigterm_as_ctrl_c():
            parsed.command(parsed, terminal)
            sys.stdout.flush()
    except InputError as error:
        terminal.error(f"dem-opt: {error}")
        return MISTAKE
    except PermissionError as error:
        terminal.error(f"dem-opt: {InputError(error.filename, None, None, f'not allowed ({error.strerror})')}")
        return MISTAKE
    except (EvaluationError, TrainingError) as error:
        terminal.error(f"dem-opt: {error}")
        return FAILED
    except OutageError as error:
        terminal.error(f"dem-opt: {error}. Every finished evaluation is kept. To continue: {command}")
        return FAILED
    except BrokenPipeError:
        # The reader, `head` say, has gone.  Python would complain when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        terminal.error(f"dem-opt: interrupted; every finished evaluation is kept. To continue: {command}")
        return INTERRUPTED
    return DONE
