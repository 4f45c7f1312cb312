"""Laws of placebos: norms and shapes are the fine-tune's, directions or layers are not, and nothing else changes."""

from pathlib import Path

import pytest
import test_adapters
import torch
import worlds
import zoo
from safetensors.torch import load_file
from torch import Tensor

from dem_opt.checkpoints.adapters import WEIGHTS, check_adapter, load_edits, read_adapter
from dem_opt.checkpoints.architecture import load_model, read_architecture
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.checkpoints.fit import check_base, check_fit
from dem_opt.checkpoints.loading import read_parameters
from dem_opt.errors import InputError
from dem_opt.export.placebo import MARKER, TOLERANCE, Placebo, moved_at_random, norm_of, permuted_names, remove_placebos
from dem_opt.types import StoredModel

pytestmark = test_adapters.pytestmark

MODELS = {
    "llama tied": {"num_hidden_layers": 3},
    "gpt2": {"n_layer": 3},
    "mixtral": {"num_hidden_layers": 3},
    "t5": {"num_layers": 4},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def stored(folder: Path, base: str | None = None) -> StoredModel:
    return StoredModel(folder, content_hash(folder), base)


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredModel, StoredModel]:
    """A base and a fine-tune whose final norm has not moved."""
    folder = tmp_path_factory.mktemp("models")
    base = zoo.make(request.param, 0, **MODELS[request.param])
    tuned = zoo.make(request.param, 1, **MODELS[request.param])
    still = [name for name, _ in base.named_parameters() if "norm" in name or "ln_f" in name][-1:]
    tuned.load_state_dict({name: base.state_dict()[name] for name in still}, strict=False)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(folder / name)
    return stored(folder / "base"), stored(folder / "tuned")


def placebo(kind: str, models: tuple[StoredModel, StoredModel], seed: int = 0) -> Placebo:
    return Placebo(kind=kind, base=models[0], fine_tune=models[1], seed=seed)  # type: ignore[arg-type]


def parameters_of(folder: Path) -> dict[str, Tensor]:
    header = read_header(folder, "model")
    architecture = read_architecture(header)
    return {name: x.float() for name, x in read_parameters(architecture, header, architecture.parameters)}


def vectors(folder: Path, base: StoredModel) -> dict[str, Tensor]:
    start = parameters_of(base.path)
    return {name: x - start[name] for name, x in parameters_of(folder).items()}


def test_random_vectors_have_the_norms_of_the_real_ones_tensor_by_tensor(
    models: tuple[StoredModel, StoredModel], tmp_path: Path
) -> None:
    placebo("random", models).write(tmp_path / "made")
    real, made = vectors(models[1].path, models[0]), vectors(tmp_path / "made", models[0])
    assert real.keys() == made.keys()
    assert any(not real[name].any() for name in real)
    for name in real:
        assert norm_of(made[name]) == pytest.approx(norm_of(real[name]), rel=3 * TOLERANCE, abs=1e-12)
        if real[name].numel() > 200:
            assert abs(torch.nn.functional.cosine_similarity(made[name].flatten(), real[name].flatten(), 0)) < 0.3


def test_permuted_vectors_are_the_real_ones_of_another_layer(
    models: tuple[StoredModel, StoredModel], tmp_path: Path
) -> None:
    placebo("permuted", models).write(tmp_path / "made")
    real, made = vectors(models[1].path, models[0]), vectors(tmp_path / "made", models[0])
    sources = permuted_names({name: tuple(x.shape) for name, x in real.items()}, 0, models[1])
    moved = {name for name in real if name in sources}
    assert moved and moved == {name for name, source in sources.items() if source != name}
    for name in real:
        torch.testing.assert_close(made[name], real[sources.get(name, name)], atol=1e-6, rtol=1e-5)
    assert sorted(norm_of(x) for x in made.values()) == pytest.approx(sorted(norm_of(x) for x in real.values()), 1e-4)


@pytest.mark.parametrize("kind", ["random", "permuted"])
def test_a_placebo_is_a_checkpoint_like_its_fine_tune(
    kind: str, models: tuple[StoredModel, StoredModel], tmp_path: Path
) -> None:
    placebo(kind, models).write(tmp_path / "made")
    base, made = (read_header(folder, "made") for folder in (models[0].path, tmp_path / "made"))
    check_fit(check_base(base), base, made)
    assert {name: (x.dtype, x.shape) for name, x in made.tensors.items()} == {
        name: (x.dtype, x.shape) for name, x in base.tensors.items()
    }
    loaded = dict(load_model(tmp_path / "made", torch.float32).named_parameters())
    assert all(torch.equal(loaded[name].detach(), x) for name, x in parameters_of(tmp_path / "made").items())
    assert placebo(kind, models).nbytes == base.nbytes


@pytest.mark.parametrize("kind", ["random", "permuted"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    kind: str, models: tuple[StoredModel, StoredModel], tmp_path: Path
) -> None:
    contents = []
    for number, seed in enumerate((0, 0, *range(1, 6))):
        placebo(kind, models, seed).write(tmp_path / str(number))
        contents.append(content_hash(tmp_path / str(number)))
    assert contents[0] == contents[1] != models[1].content
    assert set(contents[2:]) - {contents[0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1e-3, 0.05, 1.0, 20.0])
def test_a_norm_survives_rounding(dtype: str, length: float) -> None:
    """At 1e-3 a component has a hundred-thousandth: far less than half a gap of bfloat16 around 1."""
    tensor = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    moved = moved_at_random(tensor, length, torch.Generator().manual_seed(1))
    assert moved.dtype == tensor.dtype
    assert norm_of(moved.float() - tensor.float()) == pytest.approx(
        length, rel=0.05 if length < 0.01 else 2 * TOLERANCE
    )


@pytest.mark.parametrize("layers", range(2, 9))
def test_no_layer_of_a_group_keeps_its_vector(layers: int) -> None:
    forms = {f"model.layers.{layer}.mlp.weight": (4, 4) for layer in range(layers)}
    forms |= {"model.layers.9.mlp.weight": (8, 4), "model.embed_tokens.weight": (9, 4)}
    for seed in range(20):
        sources = permuted_names(forms, seed, StoredModel(Path("x"), ""))  # type: ignore[arg-type]
        alike = {f"model.layers.{layer}.mlp.weight" for layer in range(layers)}
        assert set(sources) == set(sources.values()) == alike
        assert all(name != source for name, source in sources.items())


def test_experts_and_stacks_of_one_shape_keep_their_places() -> None:
    """The first number is the layer's; encoder and decoder never exchange vectors."""
    forms = {
        f"{stack}.{n}.experts.{e}.w": (2,)
        for stack in ("encoder.block", "decoder.block")
        for n in (0, 1)
        for e in (0, 1)
    }
    sources = permuted_names(forms, 0, StoredModel(Path("x"), ""))  # type: ignore[arg-type]
    assert sources["encoder.block.0.experts.1.w"] == "encoder.block.1.experts.1.w"
    assert len(sources) == 8


def test_a_model_without_two_layers_alike_has_no_permuted_placebo(tmp_path: Path) -> None:
    base = worlds.save_model(tmp_path / "base", 0)
    worlds.save_model(tmp_path / "tuned", 1, base)
    pair = stored(tmp_path / "base"), stored(tmp_path / "tuned")
    with pytest.raises(InputError) as refusal:
        placebo("permuted", pair).write(tmp_path / "made")
    assert refusal.value.where == tmp_path / "tuned" and not (tmp_path / "made").exists()
    placebo("random", pair).check()


def test_a_folder_of_others_is_left_alone(models: tuple[StoredModel, StoredModel], tmp_path: Path) -> None:
    out = tmp_path / "all" / "made"
    placebo("random", models).write(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError):
        placebo("random", models, seed=1).write(out)
    with pytest.raises(InputError):
        remove_placebos(out.parent)
    (out / "notes.txt").unlink()
    before = content_hash(out)
    placebo("random", models, seed=1).write(out)
    assert content_hash(out) != before
    remove_placebos(out.parent)
    assert not out.exists()


class AdapterWorld:
    def __init__(self, folder: Path, **settings: object) -> None:
        zoo.save(folder / "base", "llama", num_hidden_layers=3)
        self.base = stored(folder / "base")
        test_adapters.make_adapter(folder / "base", folder / "adapter", 1, **settings)
        adapter = read_adapter(folder / "adapter", "adapter")
        self.adapter = StoredModel(folder / "adapter", adapter.content(self.base.content), self.base.content)
        self.header = read_header(folder / "base", "base")
        self.architecture = check_base(self.header)

    def changes(self, folder: Path) -> dict[str, Tensor]:
        """Products of the factors by parameter."""
        adapter = read_adapter(folder, "adapter")
        check_adapter(self.architecture, self.header, adapter)
        edits = load_edits(self.architecture, adapter)
        return {name: edit.apply(torch.zeros(self.architecture.parameters[name])) for name, edit in edits.items()}


@pytest.mark.parametrize(
    "settings", [{"target_modules": "all-linear"}, {"target_modules": ["q_proj"], "use_rslora": True}]
)
def test_an_adapter_s_placebo_has_factors_whose_products_have_the_norms(
    settings: dict[str, object], tmp_path: Path
) -> None:
    world = AdapterWorld(tmp_path, **settings)
    pair = world.base, world.adapter
    real = world.changes(world.adapter.path)
    shapes = {name: x.shape for name, x in load_file(world.adapter.path / WEIGHTS).items()}
    for kind in ("random", "permuted"):
        out = tmp_path / kind
        placebo(kind, pair).write(out)
        assert {name: x.shape for name, x in load_file(out / WEIGHTS).items()} == shapes
        made = world.changes(out)
        assert placebo(kind, pair).nbytes == sum(4 * shape.numel() for shape in shapes.values())
        if kind == "random":
            assert all(norm_of(made[name]) == pytest.approx(norm_of(x), rel=1e-4) for name, x in real.items())
            assert not any(torch.allclose(made[name], x) for name, x in real.items())
        else:
            assert {round(norm_of(x), 4) for x in made.values()} == {round(norm_of(x), 4) for x in real.values()}
            assert not any(torch.allclose(made[name], x) for name, x in real.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "none"},
    ],
)
@pytest.mark.parametrize("kind", ["random", "permuted"])
def test_adapters_that_are_more_than_factors_are_refused(
    kind: str, settings: dict[str, object], tmp_path: Path
) -> None:
    world = AdapterWorld(tmp_path, **settings)
    with pytest.raises(InputError) as refusal:
        placebo(kind, (world.base, world.adapter)).write(tmp_path / "made")
    assert refusal.value.where == world.adapter.path
    assert not (tmp_path / "made").exists() and not (tmp_path / "made" / MARKER).exists()
