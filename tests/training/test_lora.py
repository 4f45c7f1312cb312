"""Laws of trained adapters: what is saved is the model that was trained, and can be merged."""

import dataclasses
from pathlib import Path

import pytest
import torch
import worlds
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dem_opt.atomic import write_text
from dem_opt.checkpoints.adapters import WEIGHTS, check_adapter, read_adapter
from dem_opt.checkpoints.architecture import empty_model
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.config import DataFile
from dem_opt.merging.merged_model import MergedModel
from dem_opt.training.fine_tune import FineTuneJob, fine_tune
from dem_opt.training.lora import check_mergeable
from dem_opt.types import Composite, StoredModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture
def job(tmp_path: Path) -> FineTuneJob:
    worlds.save_model(tmp_path / "base", seed=0)
    data = worlds.write_documents(tmp_path / "math.jsonl", worlds.documents(1, 40))
    return FineTuneJob(
        name="math",
        base=tmp_path / "base",
        train=DataFile(path=data),
        out=tmp_path / "out" / "math",
        window=32,
        steps=6,
        learning_rate=1e-2,
        batch_size=4,
        seed=0,
        save_every=3,
    )


def model_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


TRAINED = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast": {"init_lora_weights": "pissa_niter_4"},
    "olora, rslora": {"init_lora_weights": "olora", "use_rslora": True},
    "pissa, patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "tokens": {"trainable_token_indices": [1, 2]},
    "tied module": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_trained_adapter_is_the_model_that_was_trained(job: FineTuneJob, tmp_path: Path, case: str) -> None:
    """The trained model itself, merged while peft still has it, is the oracle; so is peft's reading of the folder."""
    lora = {"r": 2, "lora_alpha": 4, **TRAINED[case]}
    check_mergeable(lora, job.base, None)
    apart = dataclasses.replace(job, lora=lora)
    whole = dataclasses.replace(apart, merged=True, out=tmp_path / "out" / "whole")
    fine_tune(apart), fine_tune(whole)
    base, header = StoredModel(job.base, content_hash(job.base)), read_header(job.base, "base")
    adapter = read_adapter(apart.out, "adapter")
    check_adapter(check_base(header), header, adapter)
    stored = StoredModel(apart.out, adapter.content(base.content), base.content)
    vertex = empty_model(job.base, torch.float32)
    MergedModel(vertex, [base, stored]).merge(Composite.single(stored.content))
    peft_model = PeftModel.from_pretrained(model_of(job.base), apart.out).eval()
    ids = torch.arange(3, 30)[None]
    logits = vertex(ids).logits
    torch.testing.assert_close(logits, model_of(whole.out)(ids).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, peft_model(ids).logits, rtol=1e-4, atol=1e-4)
    assert (logits - model_of(job.base)(ids).logits).abs().max() > 1e-2


def test_a_killed_training_from_factors_of_the_base_gives_the_same_adapter(
    job: FineTuneJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = dataclasses.replace(job, lora={"r": 2, "init_lora_weights": "pissa"})
    whole = dataclasses.replace(job, out=tmp_path / "out" / "whole")
    fine_tune(whole)

    def die(path: Path, text: str) -> None:
        if path.parent.name == "checkpoint-3":
            raise KeyboardInterrupt
        write_text(path, text)

    monkeypatch.setattr("dem_opt.training.trainer.write_text", die)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(job)
    monkeypatch.undo()
    fine_tune(job)
    assert (job.out / WEIGHTS).read_bytes() == (whole.out / WEIGHTS).read_bytes()
