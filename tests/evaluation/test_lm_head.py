"""Laws of heads: nats without the logits' memory are those of the model's own logits, forward and backward."""

import pytest
import torch
import zoo

from dem_opt.evaluation.lm_head import ROWS, UNSCORED, chunk_rows, find_head, token_nll

CASES = {
    "llama": {},
    "llama tied": {},
    "gemma2, soft-capped": {"cap": 2.0},
    "cohere": {"scale": 0.25},
    "granite": {"divisor": 4.0},
    "phi": {},
    "gpt_neox": {},
    "mamba": {},
    "t5": {},
    "t5, untied": {},
    "bart": {},
}
"""The operation behind the output embedding, by architecture: of Phi a bias, of a tied T5 a factor before it."""


def batch(model, rows=9, length=80):
    """A batch of more rows than are made at once, of which every fourth token is not scored."""
    ids_BT = torch.randint(3, zoo.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    targets_BT = ids_BT.roll(-1, dims=1).masked_fill(torch.arange(length) % 4 == 3, UNSCORED)
    inputs = {"input_ids": ids_BT} | ({"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {})
    return inputs, targets_BT, (targets_BT.flatten() != UNSCORED).nonzero().flatten()


def made(name):
    settings = {"max_position_embeddings": 128} if name in ("phi", "gpt_neox", "bart") else {}
    return zoo.make(name, **settings)


def watch(head, calls):
    """Let the output embedding add how many rows of logits it makes."""
    head.embedding.register_forward_hook(lambda _, __, logits: calls.append(logits.shape[:-1].numel()))


@pytest.mark.parametrize("name", CASES)
def test_the_nats_are_those_of_the_models_own_logits(name):
    model = made(name)
    inputs, targets_BT, scored_R = batch(model)
    with torch.inference_mode():
        logits_BTV = model(**inputs, use_cache=False).logits.double()
        chosen_BT = logits_BTV.log_softmax(-1).gather(2, targets_BT.clamp(min=0)[..., None])[..., 0]
        own_BT = -chosen_BT.masked_fill(targets_BT == UNSCORED, 0.0)
        head = find_head(model)
        assert {part: getattr(head, part) for part in ("scale", "divisor", "cap")} == {
            "scale": 1.0,
            "divisor": 1.0,
            "cap": None,
        } | CASES[name]
        for nats_BT in (token_nll(model, inputs, targets_BT, scored_R, lm_head) for lm_head in (head, None)):
            torch.testing.assert_close(nats_BT.double(), own_BT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_there_are_never_more_rows_of_logits_than_rows_and_only_of_what_is_scored(name):
    model, calls = made(name), []
    inputs, targets_BT, scored_R = batch(model)
    head = find_head(model)
    watch(head, calls)
    with torch.inference_mode():
        token_nll(model, inputs, targets_BT, scored_R, head)
    assert max(calls) <= ROWS < len(scored_R) == sum(calls)
    calls.clear()
    model.requires_grad_()
    loss = token_nll(model, inputs, targets_BT, scored_R, head).sum()
    assert sum(calls) == len(scored_R)
    loss.backward()
    assert max(calls) <= ROWS and sum(calls) == 2 * len(scored_R), "made again on the way back"


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_models_own_logits(name):
    model = made(name).requires_grad_()
    called, gradients = batch(model), []
    for head in (find_head(model), None):
        token_nll(model, *called, head).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
        model.zero_grad()
    for key, gradient in gradients[0].items():
        assert gradient is not None and torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-3 * gradients[1][key].abs().max())


def test_a_model_that_ends_otherwise_keeps_its_own_logits():
    model = made("bart")
    model.final_logits_bias.copy_(torch.linspace(-1, 1, zoo.VOCABULARY))
    assert find_head(model) is None


@pytest.mark.parametrize("vocabulary", [50, 8192, 32000, 256000])
def test_logits_at_once_are_few_on_every_device(vocabulary):
    assert chunk_rows(vocabulary, "cuda") == ROWS
    rows = chunk_rows(vocabulary, "cpu")
    assert rows <= ROWS and (rows == 64 or rows * vocabulary * 4 <= 16 * 2**20)


def test_a_batch_may_score_nothing():
    model = made("llama")
    inputs, targets_BT, _ = batch(model, rows=1)
    nothing_R = torch.zeros(0, dtype=torch.long)
    found_BT = token_nll(model, inputs, torch.full_like(targets_BT, UNSCORED), nothing_R, find_head(model))
    assert not found_BT.any()
