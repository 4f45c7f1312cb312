"""Laws of LoRAs that are written: PEFT's model of the folder is the composite; a smaller rank is the nearest."""

import json

import pytest
import test_adapters
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dem_opt.checkpoints.adapter_edits import LowRank
from dem_opt.checkpoints.adapters import CONFIG, WEIGHTS
from dem_opt.checkpoints.architecture import empty_model, load_model
from dem_opt.errors import InputError
from dem_opt.export.lora_writer import prove_lora, write_lora
from dem_opt.export.low_rank import nearest, sum_of, truncated
from dem_opt.export.writer import ExportError
from dem_opt.merging.merged_model import MergedModel
from dem_opt.simplex import UNIT
from dem_opt.types import Composite

pytestmark = test_adapters.pytestmark

WEIGHTS_OF_TERMS = (3 * 10**8, 9 * 10**8)
"""Of the two adapters; the base has the rest, -2e8."""

EXACT = [
    *("lora", "rslora", "patterns", "saved module", "embedding", "biases", "transposed", "own biases of B", "tokens"),
    *("tied tokens", "tied embedding", "tied saved module", "encoder-decoder"),
]
"""Of the cases of adapters, those whose composites a LoRA holds exactly."""

MATRICES = {"dora": "dora", "two ranks": "patterns", "plain": "lora"}
"""Cases for a smaller rank."""


def write(world, out, units=WEIGHTS_OF_TERMS, rank=None, terms=None):
    terms = terms or world.adapters
    stored = {model.content: model for model in (world.base, *terms)}
    contents = {world.base.content: UNIT - sum(units)}
    composite = Composite.of(contents | {x.content: count for x, count in zip(terms, units, strict=True)})

    def approve(export):
        prove_lora(export)
        return {"README.md": "A card."}

    return composite, write_lora(world.base, stored, composite, out, approve, rank)


def vertex(world, composite, terms=None):
    model = empty_model(world.base.path, torch.float32)
    MergedModel(model, [world.base, *(terms or world.adapters)]).merge(composite)
    return model


def adapted(world, folder):
    return PeftModel.from_pretrained(load_model(world.base.path, torch.float32), folder).eval()


@pytest.mark.parametrize("case", EXACT)
def test_pefts_model_of_an_exact_lora_is_the_composite(tmp_path, case):
    world = test_adapters.World(tmp_path, *test_adapters.CASES[case])
    composite, written = write(world, tmp_path / "out")
    theirs = test_adapters.nll(adapted(world, written.path))
    torch.testing.assert_close(theirs, test_adapters.nll(vertex(world, composite)), rtol=1e-4, atol=1e-5)
    assert not written.is_truncated
    assert json.loads((written.path / CONFIG).read_text())["r"] == written.rank
    assert world.adapter(written.path).content == written.content, "it is read as any adapter"
    again = Composite.single(written.content)
    mine = test_adapters.nll(vertex(world, again, [world.adapter(written.path)]))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", MATRICES)
def test_a_smaller_rank_is_the_nearest_and_more_rank_comes_nearer(tmp_path, case):
    world = test_adapters.World(tmp_path, *test_adapters.CASES[MATRICES[case]])
    name = "model.layers.0.self_attn.q_proj.weight"
    errors = []
    for rank in (1, 3, 16):
        composite, written = write(world, tmp_path / f"out-{rank}", rank=rank)
        expected = dict(vertex(world, composite).named_parameters())[name].detach()
        base = dict(load_model(world.base.path, torch.float32).named_parameters())[name].detach()
        made = vertex(world, Composite.single(written.content), [world.adapter(written.path)])
        errors.append(float((dict(made.named_parameters())[name].detach() - expected).norm()))
        values = torch.linalg.svdvals((expected - base).double())
        assert errors[-1] == pytest.approx(float(values[rank:].norm()), abs=1e-4)
    assert errors[0] > errors[1] > 1e-3 > errors[2]


def test_a_whole_fine_tune_is_written_with_a_rank_alone(tmp_path):
    world = test_adapters.World(tmp_path, *test_adapters.CASES["lora"])
    terms = [world.adapters[0], world.other]
    with pytest.raises(InputError, match="whole fine-tune") as refused:
        write(world, tmp_path / "out", terms=terms)
    assert refused.value.field == "--as-lora" and not (tmp_path / "out").exists()
    composite, written = write(world, tmp_path / "out", terms=terms, rank=16)
    theirs = test_adapters.nll(adapted(world, written.path))
    expected = test_adapters.nll(vertex(world, composite, terms))
    torch.testing.assert_close(theirs, expected, rtol=1e-3, atol=1e-3)  # the matrices here have rank 16 at most


@pytest.mark.parametrize(
    ("case", "words"),
    [("dora", "--rank R"), ("experts", "a stack of matrices"), ("own biases", "--rank R")],
)
def test_what_no_lora_holds_is_refused(tmp_path, case, words):
    world = test_adapters.World(tmp_path, *test_adapters.CASES[case])
    with pytest.raises(InputError, match=words):
        write(world, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_is_no_lora(tmp_path):
    world = test_adapters.World(tmp_path, *test_adapters.CASES["lora"])
    with pytest.raises(InputError, match="no LoRA to write"):
        write(world, tmp_path / "out", (0, 0))


def test_a_folder_that_is_not_what_was_merged_is_found_out(tmp_path):
    world = test_adapters.World(tmp_path, *test_adapters.CASES["lora"])
    _, written = write(world, tmp_path / "out")
    tensors = load_file(written.path / WEIGHTS)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] += 0.1
    save_file(tensors, written.path / WEIGHTS)
    with pytest.raises(ExportError, match="not those that were written"):
        prove_lora(written)
    changed = world.adapter(written.path).content
    with pytest.raises(ExportError, match="is not what was merged"):
        prove_lora(written.__class__(**{**vars(written), "content": changed}))


def test_ranks_add_up_and_the_nearest_of_the_full_rank_is_the_product():
    generator = torch.Generator().manual_seed(0)
    edits = [
        LowRank(torch.randn(r, 7, generator=generator), torch.randn(9, r, generator=generator), 0.5, False)
        for r in (2, 3)
    ]
    factors = sum_of([(0.4, edits[0]), (-1.5, edits[1])])
    product = factors.up_OR @ factors.down_RI
    expected = 0.2 * edits[0].up_OR @ edits[0].down_RI - 0.75 * edits[1].up_OR @ edits[1].down_RI
    assert factors.rank == 5
    torch.testing.assert_close(product, expected)
    for rank in (1, 4, 5):
        truncation, projection = truncated(factors, rank), nearest(product, rank)
        torch.testing.assert_close(
            truncation.up_OR @ truncation.down_RI, projection.up_OR @ projection.down_RI, rtol=1e-4, atol=1e-5
        )
        assert truncation.rank == projection.rank == rank
