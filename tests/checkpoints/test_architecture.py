"""Laws of every architecture: what is loaded, merged, scored and written is what transformers makes of it."""

from contextlib import contextmanager
from functools import cached_property

import numpy as np
import pytest
import torch
import zoo

from dem_opt.checkpoints.architecture import describe, empty_model, load_model
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.checkpoints.fit import check_base, check_fit
from dem_opt.evaluation import nll
from dem_opt.evaluation.lm_head import find_head
from dem_opt.evaluation.nll import document_layout, prepare
from dem_opt.export.writer import prove, write_composite
from dem_opt.merging.merged_model import MergedModel, total_gradient
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel, Windows

UNITS = (-2 * 10**8, 5 * 10**8, 7 * 10**8)
PACKED = {"llama", "llama tied", "gpt2", "mistral", "qwen2", "qwen3", "gemma", "gemma2, soft-capped", "gemma3"} | {
    "cohere",
    "granite",
    "phi",
    "phi3",
    "gpt_neox",
    "llava",
    "mistral3",
    "gemma3, with images",
    "qwen3_vl",
}
"""Architectures that keep packed documents apart; of the others, mixtures of experts do so on some devices only."""


class World:
    """Base, a and b of one architecture on disk."""

    def __init__(self, folder, name, dtype=torch.float32):
        self.name = name
        self.stored = []
        for seed, part in enumerate(("base", "a", "b")):
            path = zoo.save(folder / part, name, seed, dtype)
            self.stored.append(StoredModel(path, content_hash(path)))
        self.architecture = check_base(read_header(self.stored[0].path, "base"))

    @cached_property
    def references(self):
        """The checkpoints as transformers loads them."""
        return [load_model(checkpoint.path, torch.float32) for checkpoint in self.stored]

    def parameters(self, model):
        """A model's parameters by name, those of its language model where it reads images too."""
        return {name: parameter for name, parameter in model.named_parameters() if name in self.architecture.parameters}

    def merged_model(self, dtype=torch.float32):
        model = empty_model(self.stored[0].path, dtype)
        return MergedModel(model, self.stored), model

    @property
    def contents(self):
        return [checkpoint.content for checkpoint in self.stored]

    def composite(self, units=UNITS):
        return Composite.of({checkpoint.content: count for checkpoint, count in zip(self.stored, units, strict=True)})

    def by_content(self):
        return {checkpoint.content: checkpoint for checkpoint in self.stored}


@pytest.fixture(scope="module", params=zoo.MODELS)
def world(request, tmp_path_factory):
    return World(tmp_path_factory.mktemp("zoo"), request.param)


def inputs(model):
    """Two rows of tokens, and what else a model of this kind is called with."""
    ids = torch.randint(3, zoo.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    return (
        {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {"input_ids": ids}
    )


def logits(model):
    with torch.inference_mode():
        return model(**inputs(model), use_cache=False).logits


def test_a_checkpoint_fits_its_own_base(world):
    base, *others = (read_header(checkpoint.path, "base") for checkpoint in world.stored)
    for other in others:
        check_fit(world.architecture, base, other)


def test_a_vertex_is_the_checkpoint_to_the_bit(world):
    merged_model, model = world.merged_model()
    for checkpoint, reference in zip(world.stored, world.references, strict=True):
        merged_model.merge(Composite.single(checkpoint.content))
        theirs = dict(reference.named_parameters())
        assert all(torch.equal(mine, theirs[name]) for name, mine in world.parameters(model).items())
        torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-6)


def test_a_composite_agrees_with_float64(world):
    """As in the merged model's own law: rounding N terms leaves at most (N + 1) 2^-24 sum |w x|, to first order."""
    merged_model, model = world.merged_model()
    merged_model.merge(world.composite())
    references = [dict(reference.named_parameters()) for reference in world.references]
    for name, mine in world.parameters(model).items():
        terms = [units / UNIT * reference[name].double() for units, reference in zip(UNITS, references, strict=True)]
        bound = 4 * 2**-24 * sum(term.abs() for term in terms) * (1 + 2**-20) + 2**-149
        assert (mine.double() - sum(terms)).abs().le(bound).all(), name


def test_an_export_is_proved_and_loads_as_the_composite(world, tmp_path):
    written = write_composite(
        world.stored[0], world.by_content(), world.composite(), tmp_path / "out", lambda written: {}
    )
    prove(written)
    merged_model, model = world.merged_model()
    merged_model.merge(world.composite())
    loaded = load_model(tmp_path / "out", torch.float32)
    theirs, bases = dict(loaded.named_parameters()), dict(world.references[0].named_parameters())
    assert all(torch.equal(mine, theirs[name]) for name, mine in world.parameters(model).items())
    assert all(torch.equal(bases[name], theirs[name]) for name in world.architecture.outside)
    torch.testing.assert_close(logits(model), logits(loaded), rtol=1e-5, atol=1e-6)
    base, out = (read_header(path, "a").tensors for path in (world.stored[0].path, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in out.items()} == {name: tensor.shape for name, tensor in base.items()}


def windows(layout, length=24, seed=0):
    """Random documents of these lengths in each window; a pair's source is its first third."""
    rng = np.random.default_rng(seed)
    ids_WT = rng.integers(3, zoo.VOCABULARY, (len(layout), length))
    positions_WT = np.zeros_like(ids_WT)
    for window, lengths in enumerate(layout):
        places = [place for document in lengths for place in range(document)]
        positions_WT[window, : len(places)] = places
    return ids_WT, positions_WT


def score(model, *arguments, **named):
    """As a worker does it."""
    return nll.score(model, *arguments, **named, head=find_head(model))


def text(layout):
    ids_WT, positions_WT = windows(layout)
    return Windows(ids_WT, positions_WT, positions_WT > 0)


def pairs(layout):
    ids_WT, positions_WT = windows(layout)
    scored_WT = np.zeros(ids_WT.shape, dtype=bool)
    for window, lengths in enumerate(layout):
        start = 0
        for document in lengths:
            scored_WT[window, start + max(document // 3, 1) : start + document] = True
            start += document
    return Windows(ids_WT, positions_WT, scored_WT)


def make_windows(model, layout):
    return prepare((pairs if model.config.is_encoder_decoder else text)(layout), torch.device("cpu"))


def near(expected, relative=2e-5):
    return pytest.approx(expected, rel=relative)


def test_the_nll_is_the_models_own_loss(world):
    """transformers' loss is the mean over the labels; a pair's labels are its target, text's all but the first."""
    model = world.references[0]
    made = make_windows(model, [[12]])
    ids_1T = made.ids_WT[:, :12]
    if model.config.is_encoder_decoder:
        called = {"input_ids": ids_1T[:, :4], "labels": ids_1T[:, 4:]}
    else:
        called = {"input_ids": ids_1T, "labels": ids_1T}
    with torch.inference_mode():
        loss = model(**called, use_cache=False).loss.item()
    assert score(model, made, 96, document_layout(model))[0].nll == near(loss)


LAYOUT = [[24], [3, 9, 12], [2, 2, 15], [7], [12, 12], [5, 6, 2]]


def test_documents_do_not_see_each_other(world):
    """Each window scores what its documents score by themselves, in a window of their own."""
    model = world.references[0]
    made = make_windows(model, LAYOUT)
    together, _ = score(model, made, 96, document_layout(model))
    alone = [
        score(model, make_one(made, document), 96, document_layout(model))[0].nats_W[0] for document in made.documents
    ]
    expected_W = np.bincount([document.window for document in made.documents], weights=alone)
    assert together.nats_W == near(tuple(expected_W))


def make_one(made, document):
    """Windows that hold one document."""
    part = np.s_[document.window : document.window + 1, document.start : document.end]
    ids_1T = made.ids_WT[part].numpy()
    scored_1T = np.zeros(ids_1T.shape, dtype=bool)
    scored_1T[:, document.first - document.start :] = True
    return prepare(Windows(ids_1T, np.arange(ids_1T.shape[1])[None], scored_1T), torch.device("cpu"))


def differentiated(world, dtype):
    """A composite's nats and gradient in a merged model of this dtype, and the model."""
    merged_model, model = world.merged_model(dtype)
    merged_model.merge(world.composite())
    model.config._experts_implementation = "eager" if dtype == torch.float64 else model.config._experts_implementation
    made = make_windows(model, LAYOUT * 2)
    kind = document_layout(world.references[0])
    base, *fine_tunes = world.contents
    with calculating(dtype):
        plain = score(model, made, 60, kind)
        with merged_model.reduce_gradients(base, fine_tunes) as products:
            result = score(model, made, 60, kind, gradient=True)
    gradient = total_gradient(products, fine_tunes)
    return model, made, kind, plain, result, [gradient[content] for content in fine_tunes]


@contextmanager
def calculating(dtype):
    """Run in this dtype the steps that models do in float32 whatever their dtype (norms, softmax)."""
    with pytest.MonkeyPatch.context() as patched:
        if dtype == torch.float64:
            patched.setattr(torch, "float32", torch.float64)
            patched.setattr(torch, "float", torch.float64)
            patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_with_a_gradient_are_those_without_to_the_bit(world, dtype):
    """Of models that read packed windows; others have kernels that are others with gradients."""
    model, _, kind, plain, result, _ = differentiated(world, dtype)
    assert result == plain or kind != "packed"
    assert result[0].nats_W == near(plain[0].nats_W, 1e-5 if dtype == torch.float32 else 1e-2)
    assert (
        not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
        and not model.training
    )


def test_the_gradient_is_that_of_finite_differences(world):
    """In float64, (f(h) - f(-h)) / 2h along Theta_i - Theta, as transformers loads them; h is 1e-5."""
    model, made, kind, _, _, gradient = differentiated(world, torch.float64)
    base, *fine_tunes = (dict(reference.named_parameters()) for reference in world.references)
    for expert, mine in zip(fine_tunes, gradient, strict=True):
        nats = []
        for step in (1e-5, -2e-5):
            for name, parameter in world.parameters(model).items():
                parameter.data += step * (expert[name].double() - base[name].double())
            with calculating(torch.float64):
                nats.append(sum(score(model, made, 60, kind)[0].nats_W))
        for name, parameter in world.parameters(model).items():
            parameter.data += 1e-5 * (expert[name].double() - base[name].double())
        assert mine == pytest.approx((nats[0] - nats[1]) / 2e-5, rel=1e-6)


def test_who_reads_packed_windows(world):
    kind = document_layout(world.references[0])
    if world.name in zoo.MODELS and zoo.MODELS[world.name][0] in ("t5", "bart"):
        assert kind == "paired"
    elif world.name in PACKED:
        assert kind == "packed"
    elif "moe" not in world.name and world.name not in ("mixtral", "olmoe"):
        assert kind == "separate"


def test_attention_is_torchs_own_where_the_architecture_knows_it(world):
    """Which never holds all scores; soft-capped scores, ALiBi and attention sinks need them."""
    model = empty_model(world.stored[0].path, torch.float32)
    assert model.config._attn_implementation == ("sdpa" if model._supports_sdpa else "eager")
    assert model._supports_sdpa == (world.name not in ("gemma2, soft-capped", "bloom", "mamba", "gpt_oss"))


def test_the_description_does_not_depend_on_the_device_of_construction(world):
    made = describe(world.references[0])
    assert (made.parameters, made.aliases, made.buffers) == (
        world.architecture.parameters,
        world.architecture.aliases,
        world.architecture.buffers,
    )
