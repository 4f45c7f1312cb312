from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from dem_opt.errors import EvaluationError
from dem_opt.evaluation import nll
from dem_opt.evaluation.interim_analyses import first_windows, windows_by_analysis
from dem_opt.evaluation.lm_head import ROWS, find_head
from dem_opt.evaluation.nll import DocumentLayout, PreparedWindows, isolates_documents, prepare
from dem_opt.types import Score, Windows

VOCABULARY = 128
TOKENS = 24
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = SIZES | {"num_attention_heads": 2}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

# A wide initialization makes the models opinionated, so that a leak shows.
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**HEADS, **NO_TOKENS, intermediate_size=64, initializer_range=0.3),
    "gpt2": lambda: GPT2Config(**HEADS, **NO_TOKENS, n_positions=64, initializer_range=0.3),
    "opt": lambda: OPTConfig(**HEADS, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3),
    "bloom": lambda: BloomConfig(**HEADS, **NO_TOKENS, initializer_range=0.3),
    "mamba": lambda: MambaConfig(**SIZES, **NO_TOKENS, state_size=8, initializer_range=0.3),
    "lfm2": lambda: Lfm2Config(
        **HEADS,
        **NO_TOKENS,
        num_key_value_heads=2,
        intermediate_size=64,
        layer_types=["conv", "full_attention"],
    ),
}
ISOLATING = {"llama", "gpt2"}
CASES = [(name, "separate") for name in CONFIGS] + [(name, "packed") for name in sorted(ISOLATING)]

# Lengths of the documents in each window; what is missing to TOKENS is padding.
LAYOUT = [[24], [3, 1, 20], [1, 1, 10, 2, 10], [7], [12, 12], [5, 6, 2], [23, 1]] * 4
STOPS = windows_by_analysis(len(LAYOUT))
SIZES_OF_BLOCKS = [stop - start for start, stop in pairwise((0, *STOPS))]


head_of = cache(find_head)


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    assert head_of(model) is not None
    return model


def score(
    model: PreTrainedModel,
    windows: PreparedWindows,
    batch_tokens: int,
    layout: DocumentLayout,
    known: Score | None = None,
    end: int | None = None,
) -> tuple[Score, int]:
    """As a worker does it: with the head that the model had when it was made."""
    return nll.score(model, windows, batch_tokens, layout, known, end, head=head_of(model))


def make_windows(layout: list[list[int]], length: int = TOKENS, pad: int = 0) -> Windows:
    """Random documents of the given lengths, the same for any window length and padding."""
    rng = np.random.default_rng(0)
    ids_WT = np.full((len(layout), length), pad)
    positions_WT = np.zeros((len(layout), length), dtype=np.int64)
    for window, lengths in enumerate(layout):
        start = 0
        for tokens in lengths:
            ids_WT[window, start : start + tokens] = rng.integers(VOCABULARY, size=tokens)
            positions_WT[window, start : start + tokens] = np.arange(tokens)
            start += tokens
    return Windows(ids_WT, positions_WT, positions_WT > 0)


def on_cpu(windows: Windows) -> PreparedWindows:
    return prepare(windows, torch.device("cpu"))


WINDOWS = on_cpu(make_windows(LAYOUT))


def measure(name: str, layout: str, windows: PreparedWindows = WINDOWS, batch_tokens: int = 96) -> Score:
    return score(make_model(name), windows, batch_tokens, layout)[0]


measured = cache(measure)


def one_by_one(model: PreTrainedModel, windows: PreparedWindows) -> NDArray[np.float64]:
    """Nats per window in float64, each document through the model by itself."""
    nats_W = np.zeros(len(windows.tokens_W))
    for document in windows.documents:
        ids_1T = windows.ids_WT[document.window : document.window + 1, document.start : document.end]
        with torch.no_grad():
            logits_TV = model(ids_1T, use_cache=False).logits[0, :-1].double()
        logprobs_T = logits_TV.log_softmax(-1).gather(1, ids_1T[0, 1:, None])
        nats_W[document.window] -= logprobs_T.sum().item()
    return nats_W


def near(expected: object, relative: float = 1e-6) -> object:
    return pytest.approx(expected, rel=relative)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_uniform_logits_give_the_vocabulary_size(name: str, layout: str) -> None:
    model = make_model(name)
    model.get_output_embeddings().weight.data.zero_()
    assert score(model, WINDOWS, 96, layout)[0].perplexity == near(VOCABULARY)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_packed_documents_score_as_separate_ones(name: str, layout: str) -> None:
    expected_W = one_by_one(make_model(name), WINDOWS)
    assert measured(name, layout).nats_W == near(tuple(expected_W), 1e-5)
    assert measured(name, layout).tokens_W == make_windows(LAYOUT).tokens_W


@pytest.mark.parametrize("batch_tokens", [TOKENS, 7 * TOKENS + 1, 10**6])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_batch_size_does_not_matter(name: str, layout: str, batch_tokens: int) -> None:
    other = measure(name, layout, batch_tokens=batch_tokens)
    assert other.nats_W == near(measured(name, layout).nats_W)


@pytest.mark.parametrize("batch_tokens", [TOKENS, 2 * TOKENS + 1, 10**6])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_is_measured_in_parts_is_what_is_measured_at_once_to_the_bit(
    name: str, layout: str, batch_tokens: int
) -> None:
    model = make_model(name)
    whole, tokens = score(model, WINDOWS, batch_tokens, layout)
    known, spent = None, []
    for stop in STOPS:
        known, more = score(model, WINDOWS, batch_tokens, layout, known, stop)
        spent.append(more)
        assert (known.nats_W, known.tokens_W) == (whole.nats_W[:stop], whole.tokens_W[:stop])
    assert known == whole and sum(spent) == tokens and all(spent)


@pytest.mark.parametrize("layout", ["packed", "separate"])
def test_what_is_known_is_not_measured_again(layout: str) -> None:
    model, calls = make_model("llama"), []
    whole, _ = score(model, WINDOWS, 96, layout)
    watch(model, calls)
    assert score(model, WINDOWS, 96, layout, whole) == (whole, 0)
    assert score(model, WINDOWS, 96, layout, whole, STOPS[2]) == (first_windows(whole, STOPS[2]), 0) and not calls
    made_up = Score((0.5,) * STOPS[-2], whole.tokens_W[: STOPS[-2]])
    continued, tokens = score(model, WINDOWS, 96, layout, made_up)
    assert continued.nats_W == made_up.nats_W + whole.nats_W[STOPS[-2] :]
    assert tokens == sum(shape.numel() for shape in calls)


def test_scores_begin_and_end_at_stops() -> None:
    with pytest.raises(AssertionError, match="whole blocks"):
        score(make_model("llama"), WINDOWS, 96, "packed", end=STOPS[0] + 1)
    with pytest.raises(AssertionError, match="whole blocks"):
        score(make_model("llama"), WINDOWS, 96, "packed", Score((1.0,), (3,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_summed_in_parts(dtype: torch.dtype) -> None:
    """Two blocks' rows of logits, more than one part of them, are those of the model's own log-softmax."""
    model, wide = make_model("llama").to(dtype), on_cpu(make_windows([[700], [20, 600, 80]], 700))
    assert wide.ids_WT.shape[1] > ROWS
    with torch.no_grad():
        logits_WTV = model(wide.ids_WT, position_ids=wide.positions_WT, use_cache=False).logits.float()
    nll_WT = -logits_WTV.log_softmax(-1).gather(2, wide.targets_WT.clamp(min=0)[..., None])[..., 0].double()
    expected_W = (nll_WT * (wide.targets_WT >= 0)).sum(dim=1).tolist()
    assert score(model, wide, 1, "packed")[0].nats_W == near(tuple(expected_W), 1e-6 if dtype.itemsize == 4 else 1e-2)


@pytest.mark.parametrize(("length", "pad"), [(TOKENS, 77), (TOKENS + 9, 0), (TOKENS + 9, 77)])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_padding_does_not_matter(name: str, layout: str, length: int, pad: int) -> None:
    padded = on_cpu(make_windows(LAYOUT, length, pad))
    assert measure(name, layout, padded).nats_W == near(measured(name, layout).nats_W)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_nll_is_the_models_own_loss(name: str, layout: str) -> None:
    model, text = make_model(name), on_cpu(make_windows([[TOKENS]]))
    with torch.no_grad():
        loss = model(text.ids_WT, labels=text.ids_WT).loss.item()
    assert score(model, text, 96, layout)[0].nll == near(loss)


@pytest.mark.parametrize("name", sorted(ISOLATING))
def test_scoring_again_gives_the_same_bits(name: str) -> None:
    for layout in ("packed", "separate"):
        assert measure(name, layout) == measure(name, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_that_leak_are_known(name: str, dtype: torch.dtype) -> None:
    assert isolates_documents(make_model(name).to(dtype)) == (name in ISOLATING)


def test_a_leak_would_show() -> None:
    separate = one_by_one(make_model("opt"), WINDOWS)
    assert measure("opt", layout="packed").nats_W != near(tuple(separate), 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_loss_that_is_not_finite_is_no_score(name: str, layout: str, value: float) -> None:
    model = make_model(name)
    model.get_output_embeddings().weight.data[3] = value
    with pytest.raises(EvaluationError, match="the loss of window"):
        score(model, WINDOWS, 96, layout)


def watch(model: PreTrainedModel, calls: list[torch.Size]) -> None:
    """Let every forward call add the shape of its token ids."""
    model.register_forward_pre_hook(lambda _, __, named: calls.append(named["input_ids"].shape), with_kwargs=True)


@pytest.mark.parametrize("batch_tokens", [1, TOKENS, 3 * TOKENS, 5 * TOKENS + 1, 10**6])
def test_the_model_is_called_once_for_each_batch(batch_tokens: int) -> None:
    # Windows per call are floor(batch_tokens / T), at least 1 and at most those of a block.
    calls: list[torch.Size] = []
    model = make_model("llama")
    watch(model, calls)
    _, tokens = score(model, WINDOWS, batch_tokens, layout="packed")
    rows = max(1, batch_tokens // TOKENS)
    assert len(calls) == sum(-(-size // rows) for size in SIZES_OF_BLOCKS)
    assert all(shape[1] == TOKENS and shape[0] <= rows for shape in calls)
    assert tokens == sum(shape.numel() for shape in calls) == len(LAYOUT) * TOKENS


@pytest.mark.parametrize("batch_tokens", [1, TOKENS, 100, 10**6])
def test_separate_documents_fill_batches_too(batch_tokens: int) -> None:
    calls: list[torch.Size] = []
    model = make_model("opt")
    watch(model, calls)
    _, tokens = score(model, WINDOWS, batch_tokens, layout="separate")
    most = min(batch_tokens, max(SIZES_OF_BLOCKS) * TOKENS)
    assert all(shape[0] == 1 or shape.numel() <= most for shape in calls)
    assert sum(shape[0] for shape in calls) == len(WINDOWS.documents)
    assert tokens == sum(shape.numel() for shape in calls)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(AssertionError, match="dropout"):
        score(make_model("gpt2").train(), WINDOWS, 96, layout="packed")


def test_memory_of_windows_is_counted_as_it_is_allocated() -> None:
    """Of 24 tokens a window, those that are not scored have no place in the flat batch: 8 bytes less each."""
    windows = make_windows([[TOKENS], [3, 1, 20], [7]])
    prepared = on_cpu(windows)
    score(make_model("llama"), prepared, 96, "packed")
    tensors = [prepared.ids_WT, prepared.positions_WT, prepared.targets_WT]
    tensors += [batch.scored_R for batches in prepared.batches.values() for batch in batches]
    known = replace(windows, documents_WT=windows.positions_WT, bytes_WT=windows.positions_WT)
    arrays = [known.ids_WT, known.positions_WT, known.scored_WT, known.documents_WT, known.bytes_WT]
    unscored = windows.ids_WT.size - sum(windows.tokens_W)
    counted = PreparedWindows.memory_bytes(3, TOKENS)
    assert counted - 8 * unscored == sum(x.nbytes for x in (*tensors, *arrays)) and unscored
