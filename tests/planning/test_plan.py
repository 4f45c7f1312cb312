"""Laws of the plan: its bytes are those of the tensors, its passes those of a worker."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import test_adapters
import torch
import worlds
import yaml
import zoo
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from dem_opt.checkpoints import architecture as models
from dem_opt.checkpoints.architecture import Architecture, describe, empty_model, read_architecture
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.cli.main import main
from dem_opt.compute.ray_placement import share
from dem_opt.config import ComputeSection, StudyConfig, load
from dem_opt.errors import InputError
from dem_opt.evaluation import lm_head
from dem_opt.evaluation.lm_head import chunk_rows, find_head, token_nll
from dem_opt.evaluation.nll import document_layout
from dem_opt.evaluation.worker import Worker
from dem_opt.merging.merged_model import MergedModel
from dem_opt.planning.activations import (
    Widths,
    activation_bytes,
    flops_per_token,
    gradient_bytes,
    read_widths,
)
from dem_opt.planning.hardware import Machine, Speed, probe, this_machine
from dem_opt.planning.inputs import check_headers, load_inputs
from dem_opt.planning.plan import (
    BATCH_TOKENS,
    LEAST_PACE,
    MOST_PACE,
    PACE,
    Plan,
    make_plan,
    refuse_too_large,
    sized,
    workers_asked,
)
from dem_opt.types import SEARCH, Composite, Request, StoredModel
from dem_opt.workflows.check import check

LAPTOP = Machine("cpu", 1, 16 * 10**9, 12 * 10**9)
GPUS = Machine("cuda", 4, 80 * 10**9, 79 * 10**9)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return worlds.study(tmp_path_factory.mktemp("world")).parent


@pytest.fixture
def world(template, tmp_path):
    """A tiny study to spoil."""
    return shutil.copytree(template, tmp_path / "world")


def configured(world: Path, **sections) -> StudyConfig:
    """The study with some sections changed."""
    path = world / "study.yaml"
    study = yaml.safe_load(path.read_text())
    for name, section in sections.items():
        study[name] = study.get(name, {}) | section if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return load(path)


def plan_of(config: StudyConfig, machine: Machine = LAPTOP) -> Plan:
    files = check_headers(config, "study.yaml")
    model = json.loads((config.base.path / "config.json").read_text())
    return make_plan(files.architecture, files.headers, model, config, machine)


def head_bytes(widths: Widths, tokens: int, dtype: torch.dtype, backward: bool) -> int:
    """The head's own count on a CPU."""
    return lm_head.memory_bytes(
        vocabulary=widths.vocabulary,
        hidden=widths.hidden,
        tokens=tokens,
        itemsize=dtype.itemsize,
        device="cpu",
        capped=widths.capped,
        backward=backward,
    )


def save_models(folder: Path, names: list[str], dtype: torch.dtype, tied: bool) -> LlamaConfig:
    """Random models with odd sizes; norms stay in float32 where the others are bfloat16."""
    config = LlamaConfig(
        vocab_size=83,
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter_name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "norm" in parameter_name else dtype)
        model.save_pretrained(folder / name)
    return config


@pytest.mark.parametrize("live", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_stored_and_live_bytes_are_those_of_the_merged_model(tmp_path, count, dtype, tied, live):
    names = [f"tune{number}" for number in range(count)]
    save_models(tmp_path, ["base", *names], dtype, tied)
    distributions = {name: {"checkpoint": name, "validation": "none.jsonl"} for name in names}
    study = {"name": "s", "base": "base", "distributions": distributions, "evaluation": {"dtype": live}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    plan = plan_of(load(tmp_path / "study.yaml"))
    stored = [StoredModel(tmp_path / name, content_hash(tmp_path / name)) for name in ("base", *names)]
    merged_model = MergedModel(empty_model(tmp_path / "base", getattr(torch, live)), stored)
    assert plan.memory.stored + plan.memory.live == merged_model.nbytes and plan.checkpoints == count + 1


def test_a_checkpoint_that_is_there_twice_is_stored_once(world):
    shutil.rmtree(world / "models/math")
    shutil.copytree(world / "models/code", world / "models/math")
    config = load(world / "study.yaml")
    unhashed = plan_of(config)
    for name in ("code", "math"):
        content_hash(world / "models" / name)
    assert (unhashed.checkpoints, plan_of(config).checkpoints) == (4, 3)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2, soft-capped"])
def test_a_loss_holds_as_many_bytes_as_are_planned(name, dtype, backward):
    """Those that torch's allocator counts, at their most, of a vocabulary so large that nothing else matters."""
    vocabulary, tokens = 2**15, 512
    model = zoo.make(name, dtype=dtype, vocab_size=vocabulary).requires_grad_(backward)
    head, targets_1T = find_head(model), torch.zeros(1, tokens, dtype=torch.long)
    assert tokens > 2 * chunk_rows(vocabulary, "cpu")
    hidden = torch.zeros(1, tokens, 16, dtype=dtype, requires_grad=backward)
    model.get_decoder().forward = lambda **_: BaseModelOutputWithPast(hidden)
    with torch.profiler.profile(profile_memory=True) as profile, torch.set_grad_enabled(backward):
        loss = token_nll(model, {"input_ids": targets_1T}, targets_1T, torch.arange(tokens), head).sum()
        if backward:
            loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    planned = head_bytes(read_widths(describe(model), model.config.to_dict()), tokens, dtype, backward)
    assert planned / 1.05 < most < planned * 1.05


KEPT = {
    "llama": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 352},
    "gpt2": {"n_embd": 128, "n_head": 4},
    "qwen3": {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "intermediate_size": 352},
    "gemma2, soft-capped": {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "intermediate_size": 352},
    "gpt_neox": {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 352},
    "bloom": {"hidden_size": 128, "n_head": 4},
    "mamba": {"hidden_size": 128, "state_size": 16},
    "mixtral": {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 352},
}
"""Widths large enough that what does not grow with them is small."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KEPT)
def test_autograd_keeps_about_as_many_bytes_as_are_planned(name, dtype):
    """Each memory once that a forward pass saves for the way back, beside parameters and buffers; its loss has none."""
    model = zoo.make(name, dtype=dtype, vocab_size=1000, **KEPT[name])
    ids_BT, head = torch.zeros(4, 96, dtype=torch.long), find_head(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        inputs = (
            {"position_ids": torch.arange(96).remainder(48).expand(4, -1)} if document_layout(model) == "packed" else {}
        )
        token_nll(model, {"input_ids": ids_BT, **inputs}, ids_BT, torch.arange(ids_BT.numel()), head)
    memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    measured = sum(size for memory, size in memories.items() if memory not in own)
    widths = read_widths(describe(model), model.config.to_dict())
    planned = gradient_bytes(widths, 4, 96, dtype.itemsize) - head_bytes(widths, 4 * 96, dtype, True)
    assert measured / 1.5 < planned < measured * 1.5


@pytest.mark.parametrize(("machine", "workers"), [(LAPTOP, 1), (LAPTOP, 3), (GPUS, 1), (GPUS, 4)])
def test_gradients_fit_if_a_backward_pass_fits_beside_all_else(world, machine, workers):
    """Into the memory that is available: each GPU has one worker, a CPU all of them."""
    plan = plan_of(configured(world, compute={"workers": workers}), machine)
    assert plan.memory.backward > plan.memory.activations and plan.gradients_fit
    needed = (plan.memory.peak - plan.memory.activations + plan.memory.backward) * (
        workers if machine.device == "cpu" else 1
    )
    for size, fits in ((needed, True), (needed - 1, False)):
        assert replace(plan, machine=replace(machine, available=size)).gradients_fit == fits


@pytest.mark.parametrize(("windows", "held_out", "block"), [(4, 4, 1), (64, 9, 8), (8, 60, 8), (3, 9, 2)])
@pytest.mark.parametrize("batch", [1, 64, 10**6])
def test_a_forward_call_is_at_most_one_block(world, windows, held_out, block, batch):
    """The first block is ceil(W / 8) windows, and no other one is larger."""
    config = configured(world, evaluation={"windows": windows, "held_out": held_out, "window": 32, "batch": batch})
    plan = plan_of(config)
    assert plan.calls.call_tokens == min(max(batch // 32, 1), block) * 32
    assert plan.memory.activations == activation_bytes(plan.widths, plan.calls.call_tokens // 32, 32, 4)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_a_forward_pass(tmp_path, tied):
    """Counted by torch, with attention as plain matrix products."""
    config = save_models(tmp_path, ["base"], torch.float32, tied)
    architecture = read_architecture(read_header(tmp_path / "base", "base"))
    widths = read_widths(architecture, config.to_dict())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(2, 16, dtype=torch.long), use_cache=False)
    assert counter.get_total_flops() == 2 * 16 * flops_per_token(architecture, config.to_dict(), widths, 16)


def test_of_experts_only_those_count_that_a_token_is_sent_to():
    shapes = {"embed": (10, 4), "mlp.experts.up": (8, 4, 6), "router": (8, 4), "head": (10, 4)}
    architecture = Architecture(
        "Mixture",
        shapes,
        aliases={},
        buffers={},
        outside=frozenset(),
        embedding="embed",
        head="head",
        vocabulary=("embed", "head"),
        paired=False,
        _model=None,
    )
    model = {"num_experts_per_tok": 2, "num_local_experts": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    widths = read_widths(architecture, model)
    # 2 of 8 experts of 4 x 6, the router and the head; 4 L T Q of attention.
    assert flops_per_token(architecture, model, widths, 5) == 2 * (2 * 24 + 32 + 40) + 4 * 1 * 5 * 4


def test_a_worker_passes_the_tokens_that_are_planned(template):
    config = load(template / "study.yaml")
    sources = load_inputs(config, "study.yaml")
    keys = tuple(corpus.key for corpus in sources.corpora if corpus.split == SEARCH)
    answer = Worker(sources.spec()).evaluate(
        Request(ticket=0, composite=Composite.single(sources.base.content), corpora=keys)
    )
    assert answer.forward_tokens == plan_of(config).work.trial_tokens
    assert sources.batch_tokens == plan_of(config).calls.batch_tokens == BATCH_TOKENS


@pytest.mark.parametrize(
    ("search", "composites"),
    [
        ({"algorithm": "random", "trials": 6}, 1 + 6 + 3 + 1 + 3),
        ({"algorithm": "simplex-gp", "trials": 6}, 1 + 6 + 3),
        ({"algorithm": "simplex-gp", "trials": 2}, 1 + 4 + 3),
        ({"algorithm": "simplex-gp", "trials": 6, "gradients": True}, 1 + 6 + 3 + 3),
        ({"algorithm": "grid", "divisions": 4}, 1 + 15 + 1 + 3),
    ],
)
@pytest.mark.parametrize(
    ("report", "more_search", "more_held_out"),
    [({}, 0, 0), ({"top": 5}, 0, 4), ({"leave_one_out": True}, 3, 3), ({"top": 2, "leave_one_out": True}, 3, 4)],
)
def test_passes_are_base_trials_and_what_the_table_needs(world, search, composites, report, more_search, more_held_out):
    """The last three of each are those of the price of the sum."""
    plan = plan_of(configured(world, search=search, report=report))
    composites, reported = composites + more_search, 6 + more_held_out
    assert (plan.work.composites, plan.work.reported) == (composites, reported)
    assert plan.work.tokens == (composites + reported) * 3 * 4 * 32


def test_thirteen_billion_parameters_six_times(tmp_path, monkeypatch):
    """26 GB a checkpoint in bfloat16, 156 GB stored, 52 GB live in float32; no tensor is opened."""
    names = [f"tune{number}" for number in range(5)]
    for name in ("base", *names):
        worlds.save_sparse(tmp_path / name)
    distributions = {name: {"checkpoint": name, "validation": "texts.jsonl"} for name in names}
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "large", "base": "base", "distributions": distributions}))
    monkeypatch.setattr(
        models, "read_tensors", lambda _, names: iter([pytest.fail(f"{name} was read") for name in names])
    )
    report = check(load(path), path)
    parameters = 2 * 32000 * 5120 + 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120
    assert [checkpoint.parameters for checkpoint in report.checkpoints] == 6 * [parameters] == 6 * [13_015_864_320]
    assert report.unhashed == report.plan.memory.stored == 6 * 2 * parameters and report.export == 2 * parameters
    assert report.plan.memory.live == (4 if report.plan.calls.dtype == "float32" else 2) * parameters
    composites = 1 + 40 + 3 + 8  # base, trials, the price of the sum, the final table
    assert report.plan.work.trial_tokens == 5 * 64 * 1024
    assert report.plan.work.tokens == composites * report.plan.work.trial_tokens
    assert not any(tmp_path.glob("runs"))


@pytest.mark.parametrize("machine", [LAPTOP, GPUS])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_what_does_not_fit_is_refused_with_its_sums(world, machine, workers):
    plan = plan_of(configured(world, compute={"workers": workers}), machine)
    expected = plan.memory.peak * (workers if machine.device == "cpu" else 1)
    assert plan.needed == expected
    exact, short = (replace(plan, machine=replace(machine, available=size)) for size in (expected, expected - 1))
    refuse_too_large(exact, "study.yaml")
    assert exact.fitting == (workers if machine.device == "cpu" else 4)
    with pytest.raises(InputError, match=r"are needed .* are available") as refused:
        refuse_too_large(short, "study.yaml")
    assert refused.value.field == "compute.workers" and sized(plan.memory.peak) in str(refused.value)
    assert short.fitting == (workers - 1 if machine.device == "cpu" else 0)


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("gpus", [0, 1, 4])
@pytest.mark.parametrize("workers", ["auto", 1, 2])
def test_pool_and_plan_count_workers_alike(gpus, workers, each):
    machine = Machine("cuda" if gpus else "cpu", max(gpus, 1), 10**9, 10**9)
    cluster = {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {})
    planned = workers_asked(ComputeSection(workers=workers, gpus_per_worker=each), machine)
    if each > max(gpus, 1):
        with pytest.raises(InputError, match=f"compute.gpus_per_worker = {each}: the cluster has {gpus or 'no'} GPU"):
            share([cluster], None if workers == "auto" else workers, each)
    elif gpus and planned * each > gpus:
        with pytest.raises(InputError, match=f"compute.workers = {workers}: the cluster has {gpus} GPUs"):
            share([cluster], planned, each)
    else:
        count, resources = share([cluster], None if workers == "auto" else workers, each)
        assert count == planned and resources["num_gpus"] == (each if gpus else 0)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A study of models of six layers, in two dtypes, with an adapter."""
    folder = tmp_path_factory.mktemp("deep")
    for seed, name in enumerate(("base", "a", "b")):
        model = zoo.make("llama", seed, torch.bfloat16, num_hidden_layers=6)
        model.model.layers[5].float()
        model.save_pretrained(folder / name)
    adapter = test_adapters.make_adapter(folder / "base", folder / "c", 3, target_modules=test_adapters.LINEAR)
    return folder, adapter


def divided(deep, gpus: int, vectors: str = "exact", machine: Machine = GPUS, **sections) -> Plan:
    folder, adapter = deep
    models = {"a": {"checkpoint": "a"}, "b": {"checkpoint": "b"}, "c": {"adapter": str(adapter)}}
    distributions = {name: model | {"validation": "none.jsonl"} for name, model in models.items()}
    study = {"name": "s", "base": "base", "compute": {"gpus_per_worker": gpus, "ray": "auto"}}
    study |= {"evaluation": {"vectors": vectors, "window": 32, "dtype": "float32"}} | sections
    if vectors == "int8":
        del distributions["c"]
    (folder / "study.yaml").write_text(yaml.safe_dump(study | {"distributions": distributions}))
    return plan_of(load(folder / "study.yaml"), machine)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("vectors", ["exact", "int8"])
@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
def test_of_several_gpus_the_bytes_are_those_of_the_one_that_holds_most(deep, gpus, vectors):
    """Stored and live, as the merged model's segments and edits have them there."""
    plan, (folder, adapter) = divided(deep, gpus, vectors), deep
    stored = [StoredModel(folder / name, content_hash(folder / name)) for name in ("base", "a", "b")]
    if vectors == "exact":
        stored.append(StoredModel(adapter, "c", stored[0].content))
    model = empty_model(folder / "base", torch.float32)
    merged_model = MergedModel(model, stored, ["cpu"] * gpus, vectors)
    gpu_bytes = [0] * gpus
    for segment in merged_model._segments:
        gpu_bytes[segment.device] += segment.nbytes
    for _, edits in merged_model._adapters.values():
        for name, edit in edits.items():
            gpu_bytes[merged_model._split.places[name]] += edit.nbytes
    assert plan.memory.stored + plan.memory.live == max(gpu_bytes) and sum(gpu_bytes) == merged_model.nbytes
    assert plan.gpus_per_worker == gpus and plan.workers == GPUS.devices // gpus == plan.fitting
    whole = divided(deep, 1, vectors)
    assert (plan.memory.backward < whole.memory.backward) == (
        gpus > 1
    ) and plan.memory.activations == whole.memory.activations


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_where_a_study_does_not_fit_more_gpus_for_each_worker_are_offered(deep):
    plan = divided(deep, 1)
    for gpus, devices, offered in ((1, 4, "compute.gpus_per_worker 2"), (2, 4, "compute.gpus_per_worker 4")):
        machine = Machine("cuda", devices, plan.memory.peak, plan.memory.live)
        with pytest.raises(InputError, match=offered) as refused:
            refuse_too_large(divided(deep, gpus, machine=machine), "study.yaml")
        assert ("on each of 2 GPUs" in str(refused.value)) == (gpus == 2)
    with pytest.raises(InputError) as refused:
        refuse_too_large(replace(plan, machine=Machine("cuda", 1, plan.memory.peak, plan.memory.live)), "study.yaml")
    assert "gpus_per_worker" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_more_gpus_than_there_are_or_than_layers_are_refused(deep):
    with pytest.raises(InputError, match=r"compute.gpus_per_worker = 6: this machine has 4 GPUs"):
        refuse_too_large(divided(deep, 6), "study.yaml")
    with pytest.raises(InputError, match=r"compute.gpus_per_worker = 7: LlamaForCausalLM has 6 layers"):
        divided(deep, 7)


@pytest.mark.parametrize("command", ["check", "run", "score"])
def test_without_a_gpu_several_for_each_worker_are_refused(world, capsys, command):
    """The world's model has one layer, so it is given another."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for name in ("base", "code", "math", "prose"):
        config = LlamaConfig.from_pretrained(world / "models" / name, num_hidden_layers=2)
        LlamaForCausalLM(config).save_pretrained(world / "models" / name)
    configured(world, compute={"gpus_per_worker": 2})
    more = ["--coefficients", "code=1"] if command == "score" else []
    assert main([command, str(world / "study.yaml"), *more]) == 2
    assert "compute.gpus_per_worker = 2: this machine has no GPU: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("gigabytes", [64, 4, 3, 2.5, 2, 1])
def test_batches_are_halved_until_they_fit(world, gigabytes):
    """A vocabulary of two million makes logits the greatest part."""
    machine = Machine("cpu", 1, int(gigabytes * 1e9), 10**12)
    config = configured(world, evaluation={"windows": 64, "window": 32})
    files = check_headers(config, "study.yaml")
    shapes = files.architecture.parameters | {files.architecture.embedding: (2 * 10**5, 16)}
    architecture = replace(files.architecture, parameters=shapes)
    plan = make_plan(architecture, files.headers, {"num_attention_heads": 2}, config, machine)
    halves = [BATCH_TOKENS >> step for step in range(8)]
    assert plan.calls.batch_tokens in halves and plan.calls.batch_tokens >= 32
    if plan.calls.batch_tokens > 32:
        assert plan.memory.peak <= machine.total
    if plan.calls.batch_tokens < BATCH_TOKENS:
        double = min(2 * plan.calls.batch_tokens // 32, 8)
        assert plan.memory.peak - plan.memory.activations + activation_bytes(plan.widths, double, 32, 4) > machine.total
    plan = make_plan(architecture, files.headers, {}, configured(world, evaluation={"batch": 640}), machine)
    assert plan.calls.batch_tokens == 640


def test_seconds_are_flops_and_bytes_or_what_was_measured(template):
    plan = plan_of(load(template / "study.yaml"))
    merges = plan.work.composites + plan.work.reported
    spent = plan.work.tokens * plan.work.token_flops / (PACE * 1e9) + merges * plan.work.merge_bytes / 1e6
    assert plan.seconds(Speed("", 1e9, 1e6)) == pytest.approx(spent)
    assert plan.seconds(Speed("", 0.0, 0.0, 0.25)) == 0.25 * plan.work.tokens
    on_gpus = plan_of(load(template / "study.yaml"), GPUS)
    assert on_gpus.seconds(Speed("", 0.0, 0.0, 0.25)) == 0.25 * plan.work.tokens / 4


@pytest.mark.parametrize("token_seconds", [None, 0.25])
def test_an_estimate_has_the_range_of_its_measurements_and_of_the_pace_where_it_follows_from_a_product(
    template, token_seconds
):
    plan, speed = plan_of(load(template / "study.yaml")), Speed("", 1e9, 1e6, token_seconds, low=0.8, high=1.5)
    seconds = plan.seconds(speed)
    least, most = (1.0, 1.0) if token_seconds else (PACE / MOST_PACE, PACE / LEAST_PACE)
    assert plan.seconds_range(plan.work, speed) == pytest.approx((0.8 * least * seconds, 1.5 * most * seconds))


def test_repeated_probes_tell_their_range():
    speed = probe("cpu", "float32", 64, 128)
    assert 0 < speed.low <= 1 <= speed.high and speed.flops > 0 and speed.bandwidth > 0


def test_memory_is_what_the_system_says():
    machine = this_machine()
    assert 0 < machine.available <= machine.total and machine.devices >= 1


def test_shared_keys_and_held_scores_cost_more():
    widths = Widths(
        vocabulary=10,
        hidden=64,
        intermediate=128,
        layers=1,
        heads=4,
        queries=64,
        keys=64,
        materialized=False,
        capped=False,
    )
    fewer = activation_bytes(replace(widths, intermediate=1), 2, 64, 4)
    assert activation_bytes(replace(widths, intermediate=1, materialized=True), 2, 64, 4) > fewer


@pytest.mark.parametrize(("count", "text"), [(26e9, "26.0 GB"), (1e8, "0.1 GB"), (5e6, "5.0 MB"), (30_912, "30.9 kB")])
def test_sizes_for_people(count, text):
    assert sized(count) == text
