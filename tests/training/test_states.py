"""Laws of saved states: one that is not as it was written is discarded, and the training ends with the same bits."""

import shutil
from pathlib import Path

import pytest
import torch
import worlds
from malformed import MALFORMED, malform
from transformers import LlamaForCausalLM

from dem_opt.data.packing import pack
from dem_opt.training.recipe import Recipe
from dem_opt.training.trainer import train_model
from dem_opt.types import Windows

RECIPE = Recipe(steps=9, learning_rate=3e-3, batch_size=4, seed=0, save_every=3)
LAST = "checkpoint-6"


class KilledError(Exception):
    """Ends a training."""


def kill_at_last_step(step: int) -> None:
    if step == RECIPE.steps:
        raise KilledError


def trained(windows: Windows, base: Path, place: Path, killed: bool = False) -> dict[str, torch.Tensor]:
    model = LlamaForCausalLM.from_pretrained(base)
    train_model(model, windows, RECIPE, place, kill_at_last_step if killed else None)
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    worlds.save_model(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def windows() -> Windows:
    return pack(worlds.documents(1, 40), worlds.tokenizer(), 32).windows


@pytest.fixture(scope="module")
def whole(base: Path, windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a training that nothing stopped."""
    return trained(windows, base, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def killed(base: Path, windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of a training that was killed while it wrote its last state; the one before is complete."""
    place = tmp_path_factory.mktemp("killed")
    with pytest.raises(KilledError):
        trained(windows, base, place, killed=True)
    assert (place / LAST / "whole").stat().st_size and not (place / "checkpoint-9/whole").exists()
    return place


BROKEN = [
    *(("trainer_state.json", kind) for kind in MALFORMED),
    *(("whole", kind) for kind in MALFORMED),
    *(
        (file, kind)
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json")
        for kind in ("half", "a folder")
    ),
]


@pytest.mark.parametrize(("file", "kind"), BROKEN)
def test_a_broken_state_is_discarded(killed, whole, base, windows, tmp_path, file, kind):
    place = tmp_path / "place"
    shutil.copytree(killed, place)
    malform(place / LAST / file, kind)
    weights = trained(windows, base, place)
    assert all(torch.equal(weights[name], weight) for name, weight in whole.items())


def test_a_state_of_an_earlier_release_is_gone_on_with(killed, whole, base, windows, tmp_path):
    """Its marker is empty.  The step of the state is the first that the journal keeps."""
    place = tmp_path / "place"
    shutil.copytree(killed, place)
    (place / LAST / "whole").write_text("")
    shutil.rmtree(place / "checkpoint-9")
    before = (place / "steps.jsonl").read_text().splitlines()[:6]
    weights = trained(windows, base, place)
    assert all(torch.equal(weights[name], weight) for name, weight in whole.items())
    assert (place / "steps.jsonl").read_text().splitlines()[:6] == before
