"""Laws of composites whose groups of parameters have coefficients of their own."""

from itertools import pairwise

import pytest
import torch
from test_merged_model import UNITS, World, assert_same_bits, losses, values

from dem_opt.checkpoints.architecture import read_architecture
from dem_opt.checkpoints.files import read_header
from dem_opt.checkpoints.parameter_groups import parameter_groups
from dem_opt.grouping import Grouping
from dem_opt.merging.merged_model import MergedModel, total_gradient
from dem_opt.merging.tensors import merged_tensors
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.types import Composite

GROUPS = ("layers", "blocks", "tensors", {"depth": 2}, {"first": "*0*.weight"})


@pytest.fixture(scope="module", params=[("llama tied", "float32"), ("gpt2", "mixed"), ("llama untied", "bfloat16")])
def world(request, tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), *request.param)


def architecture(world):
    return read_architecture(read_header(world.stored[0].path, "base"))


def groupings(world):
    return [parameter_groups(groups, architecture(world)) for groups in GROUPS]


def grouped(world, grouping, rows):
    """A composite from units of a and b by group."""
    base, a, b = world.stored
    coefficients = {
        name: Coefficients((("a", units[1]), ("b", units[2]))) for name, units in zip(grouping.names, rows, strict=True)
    }
    return Composite.grouped(base.content, {"a": a.content, "b": b.content}, grouping, coefficients)


def different_rows(grouping):
    return [UNITS[place % len(UNITS)] for place in range(len(grouping))]


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", ["exact", "int8"])
def test_each_group_has_the_bits_of_the_composite_of_its_coefficients(world, live, vectors):
    merged_model, model = world.merged_model(dtype=live) if vectors == "exact" else quantized(world, live)
    for grouping in groupings(world):
        rows = different_rows(grouping)
        expected = {}
        for units in dict.fromkeys(rows):
            merged_model.merge(world.composite(units))
            whole = values(model)
            expected |= {
                parameter: whole[parameter]
                for (_, members), row in zip(grouping.groups, rows, strict=True)
                for parameter in members
                if row == units
            }
        merged_model.merge(grouped(world, grouping, rows))
        actual = values(model)
        assert_same_bits(actual, {name: expected[name] for name in actual})


def quantized(world, live):
    from dem_opt.checkpoints.architecture import empty_model

    model = empty_model(world.stored[0].path, live)
    return MergedModel(model, world.stored, vectors="int8"), model


@pytest.mark.parametrize("streamed", [False, True])
def test_live_streamed_and_exported_bits_are_the_same(world, streamed):
    from dem_opt.checkpoints.architecture import empty_model

    model = empty_model(world.stored[0].path, torch.float32)
    contents = [stored.content for stored in world.stored] if streamed else ()
    merged_model = MergedModel(model, world.stored, streamed=contents)
    by_content = {stored.content: stored for stored in world.stored}
    for grouping in groupings(world):
        composite = grouped(world, grouping, different_rows(grouping))
        merged_model.merge(composite)
        names = list(architecture(world).parameters)
        written = merged_tensors(architecture(world), world.stored[0], by_content, composite, names)
        assert_same_bits(values(model), {name: tensor.float() for name, tensor in written})


def test_groups_at_vertices_are_the_stored_parameters(world):
    merged_model, model = world.merged_model()
    vertices = [(UNIT, 0, 0), (0, UNIT, 0), (0, 0, UNIT)]
    for grouping in groupings(world):
        rows = [vertices[place % 3] for place in range(len(grouping))]
        merged_model.merge(grouped(world, grouping, rows))
        stored = {
            parameter: world.weights[place % 3][parameter].float()
            for place, (_, members) in enumerate(grouping.groups)
            for parameter in members
        }
        actual = values(model)
        assert_same_bits(actual, {name: stored[name] for name in actual})


def test_equal_groups_are_the_composite_of_the_whole_model(world):
    for grouping in groupings(world):
        for units in UNITS:
            composite = grouped(world, grouping, [units] * len(grouping))
            assert composite == world.composite(units) and composite.key == world.composite(units).key


def test_names_and_division_of_groups_change_no_composite(world):
    layers, blocks = groupings(world)[:2]
    rows = dict(zip(layers.names, different_rows(layers), strict=True))
    group_of = {parameter: name for name, members in layers.groups for parameter in members}
    finer = [rows[group_of[members[0]]] for _, members in blocks.groups]
    coarse = grouped(world, layers, list(rows.values()))
    assert grouped(world, blocks, finer) == coarse
    renamed = Grouping(tuple((f"other {name}", members) for name, members in reversed(layers.groups)))
    assert grouped(world, renamed, list(reversed(rows.values()))).key == coarse.key
    assert coarse.key != world.composite(coarse_units(coarse, world)).key


def coarse_units(composite, world):
    units = dict(composite.terms)
    return [units.get(stored.content, 0) for stored in world.stored]


def test_runs_cover_a_segment_once(world):
    merged_model, _ = world.merged_model()
    for grouping in groupings(world):
        composite = grouped(world, grouping, different_rows(grouping))
        for segment in merged_model._segments:
            runs = [run.slice for run in segment.runs(composite)]
            assert runs[0].start == 0 and runs[-1].stop == segment.size
            assert all(left.stop == right.start for left, right in pairwise(runs))


def test_gradients_of_groups_add_up_to_the_global_gradient(tmp_path):
    """And each is the slope of the loss along the group's own coefficients, by central differences."""
    world = World(tmp_path, "llama tied", "float32", extreme=False)
    merged_model, model = world.merged_model(dtype=torch.float64)
    base, a, b = (stored.content for stored in world.stored)
    grouping = parameter_groups("layers", architecture(world))
    rows = [(2 * 10**8, 3 * 10**8, 5 * 10**8)] * len(grouping)
    merged_model.merge(grouped(world, grouping, rows))
    with merged_model.reduce_gradients(base, [a, b]) as products:
        for loss in losses(model):
            loss.backward()
    whole = total_gradient(products, [a, b])
    by_group = {
        name: total_gradient({parameter: products[parameter] for parameter in members}, [a, b])
        for name, members in grouping.groups
    }
    for content in (a, b):
        assert sum(gradient[content] for gradient in by_group.values()) == pytest.approx(whole[content], rel=1e-12)
    for place, name in enumerate(grouping.names):
        step = 10**6
        ends = []
        for sign in (-1, 1):
            moved = list(rows)
            moved[place] = (rows[place][0] - sign * step, rows[place][1] + sign * step, rows[place][2])
            merged_model.merge(grouped(world, grouping, moved))
            with torch.no_grad():
                ends.append(sum(loss.item() for loss in losses(model)))
        slope = (ends[1] - ends[0]) / (2 * step / UNIT)
        assert slope == pytest.approx(by_group[name][a], rel=2e-3, abs=1e-3)
