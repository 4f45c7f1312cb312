"""Groups of parameters over all architectures of the zoo."""

import pytest
from zoo import MODELS, make

from dem_opt.checkpoints.architecture import describe
from dem_opt.checkpoints.parameter_groups import parameter_groups
from dem_opt.errors import InputError

ARCHITECTURES = {}


def architecture(name):
    if name not in ARCHITECTURES:
        ARCHITECTURES[name] = describe(make(name))
    return ARCHITECTURES[name]


@pytest.mark.parametrize("groups", ["layers", "blocks", "tensors", {"depth": 2}, {"first": "*.0.*"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_grouping_is_a_partition_of_the_parameters(name, groups):
    if groups == {"depth": 2} and len(parameter_groups("layers", architecture(name))) < 4:
        pytest.skip("a single layer")
    grouping = parameter_groups(groups, architecture(name))
    members = [parameter for _, parameters in grouping.groups for parameter in parameters]
    assert sorted(members) == sorted(architecture(name).parameters)
    assert len(grouping) > 1


@pytest.mark.parametrize(
    ("name", "layers", "blocks"),
    [
        ("llama tied", ["embedding", "layers.0", "layers.1"], ["qk", "vo", "mlp", "norms"]),
        ("llama", ["embedding", "layers.0", "layers.1", "head"], ["qk", "vo", "mlp", "norms"]),
        ("qwen2", ["embedding", "layers.0", "layers.1", "head"], ["qk", "vo", "mlp", "norms"]),
        ("qwen3", ["embedding", "layers.0", "layers.1", "head"], ["qk", "vo", "norms", "mlp"]),
        ("gpt2", ["embedding", "h.0", "h.1"], ["norms", "attention", "mlp"]),
        ("phi3", ["embedding", "layers.0", "layers.1", "head"], ["attention", "mlp", "norms"]),
        ("gpt_neox", ["embedding", "layers.0", "layers.1", "head"], ["norms", "attention", "mlp"]),
        ("mixtral", ["embedding", "layers.0", "layers.1", "head"], ["qk", "vo", "mlp", "norms"]),
        ("bart", ["embedding", *(f"{stack}.layers.{n}" for stack in ("encoder", "decoder") for n in (0, 1))], None),
        ("t5", ["embedding", *(f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in (0, 1))], None),
    ],
)
def test_layers_and_blocks_of_known_architectures(name, layers, blocks):
    assert sorted(parameter_groups("layers", architecture(name)).names) == sorted(layers)
    if blocks is not None:
        first = layers[1]
        names = parameter_groups("blocks", architecture(name)).names
        kinds = [block.removeprefix(f"{first}.") for block in names if block.startswith(f"{first}.")]
        assert sorted(kinds) == sorted(blocks)


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_is_a_group(name):
    grouping = parameter_groups("tensors", architecture(name))
    assert [members for _, members in grouping.groups] == [(parameter,) for parameter in architecture(name).parameters]


def test_parts_of_the_depth_have_nearly_as_many_layers():
    grouping = parameter_groups({"depth": 3}, describe(make("llama", num_hidden_layers=7)))
    layers = [len({name.split(".")[2] for name in members if ".layers." in name}) for _, members in grouping.groups]
    assert sum(layers) == 7 and max(layers) - min(layers) <= 1
    assert "lm_head.weight" in grouping.parameters["depth.3"]


def test_what_no_pattern_matches_is_the_rest():
    grouping = parameter_groups({"attention": "*.self_attn.*"}, architecture("llama"))
    assert grouping.names == ("rest", "attention") and len(grouping.parameters["attention"]) == 8


@pytest.mark.parametrize(
    ("groups", "field"),
    [
        ({"attention": "*.attention.*"}, "coefficients.groups.attention"),
        ({"attention": "*.self_attn.*", "queries": ["*.norm.*", "*.q_proj.*"]}, "coefficients.groups.queries"),
        ({"depth": 5}, "coefficients.groups.depth"),
    ],
)
def test_patterns_that_match_nothing_or_twice_are_refused(groups, field):
    with pytest.raises(InputError) as caught:
        parameter_groups(groups, architecture("llama"))
    assert caught.value.field == field
