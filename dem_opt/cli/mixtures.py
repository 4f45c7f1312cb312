"""`dem-opt mix`, and `dem-opt train --mixture`: shares of the training data, and the one training on them."""

from argparse import Action, ArgumentParser, Namespace
from pathlib import Path

from dem_opt.cli import json_output
from dem_opt.cli.baselines import print_mixing
from dem_opt.cli.console import Terminal


def add_mix_options(mix: ArgumentParser) -> Action:
    """Add the options of `dem-opt mix`; return the one that takes a folder."""
    mix.add_argument(
        "--tokens",
        metavar="N",
        default="all",
        help="tokens of the training: a number, `all` for those of all fine-tunes together (the default), `one` for "
        "those of one",
    )
    mix.add_argument(
        "--by",
        choices=("curves", "merges"),
        default="curves",
        help="what predicts the loss of a mixture: training curves (the default), or merges, which are searched first",
    )
    mix.add_argument(
        "--epochs", type=float, metavar="K", help="most passes over the data of each distribution (4 unless given)"
    )
    mix.add_argument(
        "--kl",
        type=float,
        metavar="X",
        default=0.0,
        help="weight of the divergence from the natural shares, in the objective's unit for each nat (0)",
    )
    return mix.add_argument(
        "--swarm",
        type=Path,
        metavar="DIR",
        help="folder of Olmix's ratios.csv and metrics.csv: also judge the prediction by mixtures trained elsewhere",
    )


def add_training_options(train: ArgumentParser) -> Action:
    """Add the options of `dem-opt train` for mixtures; return the one that takes a file."""
    mixture = train.add_argument(
        "--mixture",
        metavar="FILE",
        help="instead train one model on a mixture of the data and compare it: `proposed` for what `dem-opt mix` "
        "proposed, or a file of that form",
    )
    train.add_argument(
        "--from",
        dest="start",
        choices=("base", "composite"),
        help="with --mixture: what the training begins with, the base (the default) or the study's winner",
    )
    return mixture


def mix(arguments: Namespace, terminal: Terminal) -> None:
    """Propose shares."""
    from dem_opt.dashboards.html_report import write
    from dem_opt.dashboards.mixture_plots import proposal_lines, render_proposal, shares_table, shares_title
    from dem_opt.study import Study
    from dem_opt.workflows.data_shares import EPOCHS

    with terminal.progress() as progress:
        proposal = Study.load(arguments.study, progress=progress).propose_mixture(
            arguments.tokens,
            by=arguments.by,
            epochs=EPOCHS if arguments.epochs is None else arguments.epochs,
            kl_penalty=arguments.kl,
            swarm=arguments.swarm,
        )
    page = proposal.folder / "mixture.html"
    write(render_proposal(proposal), page, "mixture")
    if terminal.as_json:
        terminal.json(json_output.of_proposal(proposal))
        return
    shares = shares_table(proposal)
    terminal.table(shares_title(proposal), shares.headers, shares.rows)
    for line in proposal_lines(proposal):
        terminal.line(line)
    terminal.line(f"Written: {page.parent}. To train on them: dem-opt train {arguments.study} --mixture proposed")


def train(arguments: Namespace, terminal: Terminal) -> None:
    """Train a model on a mixture and print the comparison with what the study knows."""
    from dem_opt.study import Study

    with terminal.progress() as progress:
        study = Study.load(arguments.study, progress=progress)
        comparison = study.train_mixture(arguments.mixture, start=arguments.start or "base")
    print_mixing(comparison, study.config.output, terminal)
