"""Laws of compressed vectors: how far off they are, what is made of them, and that their scores mix with no others."""

from dataclasses import replace

import in_process
import pytest
import test_adapters
import test_study
import torch
import worlds
from recorded import RecordedProgress
from test_merged_model import ARCHITECTURES, UNITS, World, assert_same_bits, losses, reduced, values

from dem_opt.checkpoints.architecture import empty_model
from dem_opt.config import StudyConfig, load
from dem_opt.errors import InputError
from dem_opt.merging.int8 import Int8Vector, quantize, row_count, row_length
from dem_opt.merging.kernel import MergeKernel
from dem_opt.merging.merged_model import MergedModel
from dem_opt.planning.inputs import check_headers, load_inputs
from dem_opt.simplex import UNIT
from dem_opt.storage.identity import refuse_other_scoring
from dem_opt.types import Composite

SHAPES = [(7,), (1,), (5, 33), (3, 4, 10), (2048, 2049)]


def compressed(shape, dtype=torch.float32, seed=0):
    """A base, an expert, and the vector between them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    expert = (base + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    starts_R = torch.arange(row_count(shape)) * row_length(shape)
    into = Int8Vector(torch.zeros(base.numel(), dtype=torch.int8), torch.zeros(row_count(shape)), starts_R)
    quantize(expert, base, into)
    return base, expert, into


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_vector_is_off_by_at_most_half_its_rows_scale(shape, dtype):
    base, expert, vector = compressed(shape, dtype)
    exact = (expert.double() - base.double()).reshape(-1, row_length(shape))
    stored = vector[slice(0, len(vector))].double().view_as(exact)
    assert (stored - exact).abs().le(vector.scale_R.double()[:, None] / 2 * (1 + 2**-16)).all()
    assert torch.allclose(vector.scale_R.double() * 127, exact.abs().amax(1), rtol=1e-6)


def test_a_vector_of_zeros_is_exact_and_a_row_knows_no_other():
    base, expert, into = compressed((3, 8))
    expert[1] = base[1]
    quantize(expert, base, into)
    assert into.scale_R[1] == 0 and not into[slice(8, 16)].any()
    expert[2] *= 1000
    before = into[slice(0, 8)].clone()
    quantize(expert, base, into)
    assert torch.equal(into[slice(0, 8)], before)


@pytest.fixture(
    scope="module", params=[(architecture, dtype) for architecture in ARCHITECTURES for dtype in ("float32", "mixed")]
)
def tame(request, tmp_path_factory):
    return World(tmp_path_factory.mktemp("tame"), *request.param, extreme=False)


def arena_of(world, stored=None, live=torch.float32):
    model = empty_model(world.stored[0].path, live)
    return MergedModel(model, stored or world.stored, vectors="int8"), model


def vectors_of(world, merged_model, content):
    """An expert's vector in a merged model, by parameter, in float64."""
    return {
        place.name: segment.vectors_NP[content].within(place.slice)[slice(0, 10**9)].double().view(place.shape)
        for segment in merged_model._segments
        for place in segment.slices
    }


@pytest.mark.parametrize("units", UNITS)
def test_composites_are_the_base_and_what_is_stored_of_the_vectors(tame, units):
    """Rounding N coefficients, N scaled coefficients, N products and N sums to float32 leaves at most
    (N + 3) u of the terms' sizes; rounding to the stored dtype adds half an ulp."""
    merged_model, model = arena_of(tame)
    merged_model.merge(tame.composite(units))
    vectors = [vectors_of(tame, merged_model, checkpoint.content) for checkpoint in tame.stored[1:]]
    for name, tensor in values(model).items():
        terms = [tame.weights[0][name].double()]
        terms += [count / UNIT * vector[name] for count, vector in zip(units[1:], vectors, strict=True)]
        exact, size = sum(terms), sum(term.abs() for term in terms)
        bound = 6 * 2**-24 * size
        if tame.weights[0][name].dtype == torch.bfloat16:
            bound = bound + 2**-8 * (exact.abs() + bound)
        assert (tensor.double() - exact).abs().le(bound).all(), name


def test_the_base_is_exact_and_a_vertex_is_off_by_half_a_scale(tame):
    merged_model, model = arena_of(tame)
    merged_model.merge(Composite.single(tame.stored[0].content))
    assert_same_bits(values(model), {name: tensor.float() for name, tensor in tame.weights[0].items()})
    merged_model.merge(Composite.single(tame.stored[1].content))
    differing = 0
    for name, tensor in values(model).items():
        exact = tame.weights[1][name].double()
        vector = exact - tame.weights[0][name].double()
        half = vector.reshape(-1, row_length(tuple(exact.shape))).abs().amax(1) / 127 / 2
        ulp = 2**-8 if tame.weights[1][name].dtype == torch.bfloat16 else 2**-22
        bound = half.repeat_interleave(row_length(tuple(exact.shape))).view_as(exact) + ulp * (exact.abs() + half.max())
        assert (tensor.double() - exact).abs().le(bound).all(), name
        differing += int((tensor.double() != exact).sum())
    assert differing


@pytest.mark.parametrize("units", UNITS)
def test_neither_the_compiler_nor_the_order_changes_a_bit(tame, units):
    merged_model, model = arena_of(tame)
    merged_model.merge(tame.composite(units))
    before = values(model)
    merged_model._kernels = [MergeKernel(compiled=False, block=37)]
    merged_model.merge(tame.composite(units))
    assert_same_bits(values(model), before)
    other, model = arena_of(tame, [tame.stored[0], tame.stored[2], tame.stored[1]])
    other.merge(tame.composite(units))
    assert_same_bits(values(model), before)


def test_gradients_are_reduced_against_what_is_stored(tame):
    merged_model, model = arena_of(tame, live=torch.float64)
    merged_model.merge(tame.composite(UNITS[1]))
    contents = [checkpoint.content for checkpoint in tame.stored]
    slopes = reduced(merged_model, model, contents)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for loss in losses(model):
        loss.backward()
    vectors = [vectors_of(tame, merged_model, content) for content in contents[1:]]
    expected = [float(sum((x.grad * vector[name]).sum() for name, x in parameters.items())) for vector in vectors]
    assert list(slopes.values()) == pytest.approx(expected, rel=1e-6)


def configured(path, **evaluation) -> StudyConfig:
    test_study.edit(path, lambda study: study["evaluation"].update(evaluation))
    return load(path)


def test_scores_of_compressed_vectors_are_others_and_depend_on_the_base(tmp_path):
    path = worlds.study(tmp_path)
    exact, int8 = (load_inputs(configured(path, vectors=form), path).identity() for form in ("exact", "int8"))
    assert exact.scoring != int8.scoring and int8.exact() == exact
    older = replace(exact, settings={key: x for key, x in exact.settings.items() if key != "evaluation.vectors"})
    assert older.scoring == exact.scoring
    assert replace(exact, base="another").scoring == exact.scoring
    assert replace(int8, base="another").scoring != int8.scoring


def test_another_form_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"evaluation.vectors = 'fp4'"):
        configured(worlds.study(tmp_path), vectors="fp4")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_adapters_are_refused_since_they_are_small_as_they_are(tmp_path):
    adapted = test_adapters.World(tmp_path, *test_adapters.CASES["dora"])
    path = worlds.study(tmp_path / "study", ("code",))
    adapter = {"adapter": str(adapted.adapters[0].path), "validation": "data/code.jsonl"}
    change = {"base": str(adapted.base.path), "distributions": {"code": adapter}}
    test_study.edit(path, lambda study: study.update(change))
    with pytest.raises(InputError, match="code is an adapter"):
        check_headers(configured(path, vectors="int8"), path)


def test_a_study_of_compressed_vectors_tells_what_they_cost_and_exports_the_full_ones(tmp_path):
    path, seen = worlds.study(tmp_path), RecordedProgress()
    configured(path, vectors="int8")
    winner = in_process.open_study(path, seen).run().winner
    (note,) = (line for line in seen.notes if "vectors change the NLL" in line)
    assert note.startswith("int8 vectors change the NLL by ") and "(4)" in note
    champion = in_process.open_study(path, seen).export(tmp_path / "out")
    assert seen.notes[-1] == note and champion.result.objective == winner.objective
    assert champion.exported.objective != winner.objective
    assert champion.exported.objective["search"] == pytest.approx(winner.objective["search"], rel=1e-2)
    configured(path, vectors="exact")
    with pytest.raises(InputError, match=r"evaluation.vectors = 'exact'.*'int8'"):
        in_process.open_study(path).run()


def test_a_study_begun_before_there_were_forms_stays_exact(tmp_path):
    path = worlds.study(tmp_path)
    scored = load_inputs(load(path), path).identity().scoring_fields()
    del scored["evaluation.vectors"]
    refuse_other_scoring(path, scored, scored | {"evaluation.vectors": "exact"})
    with pytest.raises(InputError, match=r"evaluation.vectors = 'int8'.*'exact'"):
        refuse_other_scoring(path, scored, scored | {"evaluation.vectors": "int8"})
