"""Laws of LoRAs that studies write: PEFT scores the folder as the composite, a smaller rank is told with its cost."""

import json
from pathlib import Path

import in_process
import pytest
import test_adapters
import torch
import worlds
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import load
from dem_opt.errors import InputError
from dem_opt.evaluation.nll import document_layout, prepare, score
from dem_opt.planning.inputs import load_inputs
from dem_opt.tracking import NullTracker
from dem_opt.types import SPLITS

pytestmark = test_adapters.pytestmark

ADAPTERS = {"code": {"target_modules": ["q_proj", "v_proj"]}, "math": {"target_modules": "all-linear"}}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A study of two adapters of rank 4, run."""
    folder = tmp_path_factory.mktemp("lora")
    path = worlds.study(folder, tuple(ADAPTERS))
    content = yaml.safe_load(path.read_text())
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        test_adapters.make_adapter(folder / "models/base", folder / "adapters" / name, seed, **settings)
        content["distributions"][name] = {"adapter": f"adapters/{name}", "validation": f"data/{name}.jsonl"}
    content["search"] = {"algorithm": "random", "trials": 3}
    path.write_text(yaml.safe_dump(content))
    in_process.open_study(path).run()
    return path


@pytest.fixture
def commands(monkeypatch):
    in_process.replace_dependencies(monkeypatch, compute=InProcessCompute(), tracker=NullTracker())


def scores_through_peft(path: Path, folder: Path) -> dict[str, dict[str, float]]:
    """NLL of PEFT's model of a folder on the study's corpora."""
    inputs = load_inputs(load(path), path)
    base = AutoModelForCausalLM.from_pretrained(inputs.base.path)
    model = PeftModel.from_pretrained(base, folder).merge_and_unload().eval()
    with torch.no_grad():
        return {
            split: {
                corpus.distribution: score(model, prepare(corpus.windows, model.device), 4096, document_layout(model))[
                    0
                ].nll
                for corpus in inputs.corpora
                if corpus.split == split
            }
            for split in SPLITS
        }


def test_peft_scores_the_exported_winner_as_the_study_does(path, tmp_path):
    champion = in_process.open_study(path).export(tmp_path / "out", as_lora=True)
    assert champion.export.rank == 8 and not champion.export.is_truncated and champion.version is None
    for split, by_name in scores_through_peft(path, tmp_path / "out").items():
        for name, nll in by_name.items():
            assert champion.result.scores[split][name].nll == pytest.approx(nll, rel=1e-5)
            assert champion.exported.scores[split][name].nll == pytest.approx(nll, rel=1e-5)
    card = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft" and front["base_model"] == "base" and "exact LoRA of rank 8" in card
    assert not (tmp_path / "out/config.json").exists() and (tmp_path / "out/tokenizer.json").exists()


def test_a_smaller_rank_is_told_with_what_it_costs(path, tmp_path, capsys, commands):
    out = tmp_path / "out"
    assert main(["export", str(path), "--out", str(out), "--as-lora", "--rank", "1"]) == 0
    output = capsys.readouterr().out
    costs = [
        line for line in output.splitlines() if "as the nearest LoRA of rank 1" in line and "nats per token" in line
    ]
    assert len(costs) == len(SPLITS)
    assert "| exported as the nearest LoRA of rank 1 |" in (out / "README.md").read_text()
    assert main(["export", str(path), "--out", str(out), "--as-lora", "--rank", "1", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["rank"] == 1
    measured = scores_through_peft(path, out)
    for split, by_name in measured.items():
        for name, nll in by_name.items():
            assert written["scores"][split][name]["nll"] == pytest.approx(nll, rel=1e-4)


def test_a_composite_is_merged_as_a_lora(path, tmp_path, capsys, commands):
    out = str(tmp_path / "out")
    merge = ["merge", str(path), "--coefficients", "code=.25,math=.75", "--out", out, "--as-lora"]
    assert main(merge) == 0
    assert "an exact LoRA of rank 8" in capsys.readouterr().out
    exact = {
        name: x.nll for name, x in in_process.open_study(path).score({"code": 0.25, "math": 0.75})["search"].items()
    }
    assert scores_through_peft(path, tmp_path / "out")["search"] == pytest.approx(exact, rel=1e-5)
    assert main([*merge, "--overwrite", "--rank", "2"]) == 0
    output = capsys.readouterr()
    assert "Mean NLL on held-out as the nearest LoRA of rank 2" in output.out + output.err


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"rank": 4}, "--rank"),
        ({"as_lora": True, "rank": 0}, "--rank"),
        ({"as_lora": True, "dtype": "float32"}, "--dtype"),
    ],
)
def test_options_that_contradict_each_other_are_refused(path, tmp_path, options, field):
    study = in_process.open_study(path)
    for write in (study.export, lambda *arguments, **more: study.merge({"code": 1.0}, *arguments, **more)):
        with pytest.raises(InputError) as refused:
            write(tmp_path / "out", **options)
        assert refused.value.field == field and not (tmp_path / "out").exists()
