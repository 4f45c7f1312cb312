"""Oracles that nobody here wrote: mergekit merges as we do, lm-evaluation-harness scores as we do.

Both run as programs of their own.  lm-evaluation-harness comes with the extra `dev`, mergekit with the extra `bench`;
without them these laws are skipped.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import astuple
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import in_process
import numpy as np
import pytest
import torch
import worlds
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dem_opt.checkpoints.architecture import load_model
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.data.byte_counts import scored_bytes
from dem_opt.data.tokenize import Source, Tokens
from dem_opt.errors import InputError
from dem_opt.evaluation.nll import prepare, score
from dem_opt.export.model_card import Ingredient, recipe
from dem_opt.export.writer import write_composite
from dem_opt.planning.inputs import check_headers
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, Score, StoredModel, Windows

INSTALL = "pip install -c constraints.txt -e '.[bench]'"
needs_mergekit = pytest.mark.skipif(find_spec("mergekit") is None, reason=f"needs mergekit: {INSTALL}")
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason=f"needs lm-eval: {INSTALL}")

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(tied):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied))


def mistral(tied):
    return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, tie_word_embeddings=tied))


def mixtral(tied):
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=2, tie_word_embeddings=tied))


def gpt2(tied):
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tied))


def t5(tied):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    sizes |= {"initializer_factor": 0.02}
    return T5ForConditionalGeneration(T5Config(vocab_size=320, **sizes, tie_word_embeddings=tied))


ARCHITECTURES = [llama, mistral, gpt2, mixtral, t5]
CASES = {
    "tied, sum 1": (True, (2 * 10**8, 3 * 10**8, 5 * 10**8)),
    "untied, sum 0.7": (False, (10**8, 2 * 10**8, 4 * 10**8)),
}


def run(module, *arguments):
    """A program of another project, without network."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def mergekit(config, out):
    """Every tensor that mergekit writes for a configuration."""
    run("mergekit.scripts.run_yaml", config, out, "--no-write-model-card", "--no-copy-tokenizer")
    return weights(out)


def weights(folder):
    """Every stored tensor of a checkpoint folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def parameters(folder):
    """Parameters as transformers loads a folder; mergekit may store fused experts that others keep apart."""
    return {name: parameter.detach() for name, parameter in load_model(folder, torch.float32).named_parameters()}


def checkpoints(folder, make, tied):
    """A base and three models near it, as ingredients of nothing yet."""
    base, made = None, []
    for seed, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(seed)
        model = make(tied)
        base = base or model
        with torch.no_grad():
            for moved, original in zip(model.parameters(), base.parameters(), strict=True):
                moved.copy_(original + (0.1 * torch.randn_like(original) if seed else 0))
        model.save_pretrained(folder / name)
        made.append(folder / name)
    return made


def distance(ingredients, name):
    """The sum in float64, and one ulp (float32) of the sum of the terms' magnitudes, element by element.

    The larger of the two forms:  sum_n |w_n Theta_n|  and  |Theta| + sum_i |w_i (Theta_i - Theta)| .
    """
    (share, base), *others = [
        (ingredient.units / UNIT, parameters(ingredient.path)[name].double()) for ingredient in ingredients
    ]
    exact = base + sum(weight * (x - base) for weight, x in others)
    ours = (share * base).abs() + sum((weight * x).abs() for weight, x in others)
    theirs = base.abs() + sum((weight * (x - base)).abs() for weight, x in others)
    return exact, torch.from_numpy(np.spacing(torch.maximum(ours, theirs).float().numpy())).double()


@needs_mergekit
@pytest.mark.parametrize(("tied", "units"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("make", ARCHITECTURES)
def test_a_merge_is_that_of_mergekit(tmp_path, record_property, make, tied, units):
    """Within (N + 2) ulp of each other, ours within (N + 2) / 2 of float64, and on the whole not further than theirs.

    With u = 2^-24, ours rounds N + 1 coefficients and products and N sums: at most (N + 2) u sum |w x|, to first
    order, and u sum |w x| is at most an ulp of that sum, on average three quarters of one.  mergekit sums differences
    from the base, which it rounds too.  That is the better form, by up to half an ulp, for weights that moved little
    (norms), and the worse one for those that moved much.
    """
    folders = checkpoints(tmp_path / "models", make, tied)
    try:
        check_base(read_header(folders[0], "base"))
    except InputError as refused:
        pytest.skip(str(refused))
    contents = [content_hash(folder) for folder in folders]
    stored = [StoredModel(folder, content) for folder, content in zip(folders, contents, strict=True)]
    shares = (UNIT - sum(units), *units)
    names = ("base", "a", "b", "c")
    ingredients = [Ingredient(name, model, share) for name, model, share in zip(names, stored, shares, strict=True)]
    composite = Composite.of(dict(zip(contents, shares, strict=True)))
    places = {model.content: model for model in stored}
    texts = {"mergekit.yaml": recipe(ingredients)}
    write_composite(stored[0], places, composite, tmp_path / "ours", lambda written: texts)
    mergekit(tmp_path / "ours/mergekit.yaml", tmp_path / "theirs")
    theirs, ours = parameters(tmp_path / "theirs"), parameters(tmp_path / "ours")
    apart, our_errors, their_errors = [], [], []
    for name, tensor in ours.items():
        exact, ulp = distance(ingredients, name)
        apart.append(((tensor.double() - theirs[name].double()) / ulp).abs().flatten())
        our_errors.append(((tensor.double() - exact) / ulp).abs().flatten())
        their_errors.append(((theirs[name].double() - exact) / ulp).abs().flatten())
    most, mine, other = (torch.cat(parts) for parts in (apart, our_errors, their_errors))
    record_property("ulps apart", f"{most.max():.2f}")
    record_property("ulps from float64, largest", f"{mine.max():.2f} against {other.max():.2f}")
    record_property("root mean square", f"{mine.square().mean().sqrt():.4f} against {other.square().mean().sqrt():.4f}")
    assert most.max() <= len(units) + 2
    assert mine.max() <= (len(units) + 2) / 2
    assert mine.square().mean() <= other.square().mean()


@needs_mergekit
@pytest.mark.parametrize(("dtype", "total"), [(None, 1.0), (None, 0.7), ("bfloat16", 0.7)])
def test_the_recipe_beside_an_export_gives_the_exported_weights(tmp_path, dtype, total):
    """Up to the same bound, and where both round to bfloat16, one ulp of that more, for sums about a tie."""
    path = worlds.study(tmp_path, simplex={"total": total})
    coefficients = {"code": total / 2, "math": total / 2}
    out = tmp_path / "out"
    in_process.open_study(path).merge(coefficients, out, dtype)
    config = yaml.safe_load((out / "mergekit.yaml").read_text())
    theirs, ours = mergekit(out / "mergekit.yaml", tmp_path / "theirs"), weights(out)
    parts = [
        (config["base_model"], 1 - total),
        *((entry["model"], entry["parameters"]["weight"]) for entry in config["models"]),
    ]
    ingredients = [Ingredient("", StoredModel(Path(folder), ""), round(weight * UNIT)) for folder, weight in parts]
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        _, ulp = distance(ingredients, name)
        bound = 4 * ulp + (2**-7 * tensor.double().abs() if dtype else 0)
        assert (tensor.double() - theirs[name].double()).abs().le(bound).all(), name


@needs_mergekit
@pytest.mark.parametrize("groups", ["layers", "blocks", {"queries": "*.q_proj.*"}], ids=str)
def test_the_recipe_by_group_gives_the_exported_weights(tmp_path, groups):
    """Each tensor within the same bound of the sum with its own group's coefficients."""
    worlds.save_model(tmp_path / "models/base", seed=0, layers=2)
    path = worlds.study(tmp_path, coefficients={"groups": groups})
    study, out = in_process.open_study(path), tmp_path / "out"
    grouping = check_headers(study.config, path).groups(path).grouping
    parts = [(place + 1) / (len(grouping) + 1) for place in range(len(grouping))]
    rows = {name: {"code": part, "prose": 1 - part} for name, part in zip(grouping.names, parts, strict=True)}
    study.merge(rows, out)
    theirs, ours = mergekit(out / "mergekit.yaml", tmp_path / "theirs"), weights(out)
    assert ours.keys() == theirs.keys()
    models = {name: StoredModel(tmp_path / "models" / name, "") for name in ("base", "code", "prose")}
    for group, members in grouping.groups:
        shares = {"base": 0.0} | rows[group]
        ingredients = [Ingredient(name, model, round(shares[name] * UNIT)) for name, model in models.items()]
        for name in members:
            exact, ulp = distance(ingredients, name)
            assert (ours[name].double() - theirs[name].double()).abs().le(4 * ulp).all(), name
            assert (ours[name].double() - exact).abs().le(4 * ulp).all(), name


LENGTH = 24
"""Tokens of context of lm-evaluation-harness here; documents are longer and shorter."""


def rolling(tokens, bytes_L, prefix):
    """The windows of a rolling log-likelihood: every token once, from at most LENGTH tokens before it.

    lm-evaluation-harness puts one token (BOS, or EOS where there is none) before the document, and predicts LENGTH
    tokens at a time from those and the one before.  What is left at the end is predicted from as many tokens as fit.
    Windows begin with a token that is not scored, and are padded to one length.
    """
    rows, ids, counts = [], np.array([prefix, *tokens]), np.array([0, *bytes_L])
    for first in range(1, len(ids), LENGTH):
        end = min(first + LENGTH, len(ids))
        rows.append((slice(max(0, end - LENGTH - 1), end), end - first))
    ids_WT = np.zeros((len(rows), LENGTH + 1), dtype=np.int64)
    positions_WT, bytes_WT, scored_WT = (np.zeros_like(ids_WT, dtype=dtype) for dtype in (np.int64, np.int64, bool))
    for row, (part, scored) in enumerate(rows):
        length = part.stop - part.start
        ids_WT[row, :length] = ids[part]
        positions_WT[row, :length] = range(length)
        scored_WT[row, length - scored : length] = True
        bytes_WT[row, length - scored : length] = counts[part][-scored:]
    return Windows(ids_WT, positions_WT, scored_WT, bytes_WT=bytes_WT)


@needs_lm_eval
def test_losses_of_documents_are_those_of_lm_evaluation_harness(tmp_path, record_property):
    """Nats of each document; bits per byte, and perplexity by words, of all together."""
    path = worlds.study(tmp_path, names=("code", "math"))
    out = tmp_path / "out"
    in_process.open_study(path).merge({"code": 0.4, "math": 0.6}, out)
    texts = ["alpha beta gamma", "n\u00e4chste \u65e5\u672c\u8a9e  alpha", *worlds.documents(7, 4)]
    worlds.write_documents(tmp_path / "task/documents.jsonl", texts)
    task = {
        "task": "tiny_rolling",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task/documents.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    }
    (tmp_path / "task/tiny.yaml").write_text(yaml.safe_dump(task))
    model = f"pretrained={out},dtype=float32,max_length={LENGTH}"
    arguments = ["--model", "hf", "--model_args", model, "--tasks", "tiny_rolling", "--device", "cpu"]
    arguments += ["--include_path", tmp_path / "task", "--output_path", tmp_path / "told", "--log_samples"]
    run("lm_eval", *arguments)
    logs = [file.read_text() for file in (tmp_path / "told").rglob("samples_*.jsonl")]
    samples = [json.loads(line) for text in logs for line in text.splitlines()]
    theirs = {sample["doc"]["text"]: -float(sample["resps"][0][0]) for sample in samples}
    live, tokenizer = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), worlds.tokenizer()
    assert theirs.keys() == set(texts)
    scores = []
    for text in texts:
        ids, source = tokenizer(text)["input_ids"], Source(text=text)
        bytes_L = scored_bytes(Tokens(np.array(ids), np.ones(len(ids), dtype=bool), source), tokenizer)
        windows = rolling(ids, bytes_L, tokenizer.eos_token_id)
        ours, _ = score(live, prepare(windows, torch.device("cpu")), 4096, layout="packed")
        record_property("relative difference", f"{abs(sum(ours.nats_W) / theirs[text] - 1):.1e}")
        assert sum(ours.nats_W) == pytest.approx(theirs[text], rel=1e-4), text
        assert sum(ours.tokens_W) == len(ids)
        scores.append(ours)
    (results,) = (tmp_path / "told").rglob("results_*.json")
    metrics = json.loads(results.read_text())["results"]["tiny_rolling"]
    together = Score(*(tuple(chain.from_iterable(each)) for each in zip(*map(astuple, scores), strict=True)))
    assert together.bits_per_byte == pytest.approx(metrics["bits_per_byte,none"], rel=1e-6)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert math.exp(sum(together.nats_W) / words) == pytest.approx(metrics["word_perplexity,none"], rel=1e-6)
