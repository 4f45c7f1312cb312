"""Laws of a base in float32: its values are those of 16 bits, and its composites are not rounded."""

import json
from pathlib import Path

import in_process
import pytest
import torch
import worlds
from safetensors.torch import load_file, save_file

from dem_opt.checkpoints.convert import conversion_of
from dem_opt.checkpoints.locate import locate
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.config import BaseSource, load
from dem_opt.dashboards.words import rounding_lines
from dem_opt.errors import InputError
from dem_opt.tracking import NullTracker
from dem_opt.types import SEARCH

NAMES = ("code", "math")
DTYPES = [torch.bfloat16, torch.float16]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def narrowed(folder: Path, dtype: torch.dtype, shards: int = 1) -> Path:
    """A checkpoint in 16 bits, in several files."""
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    files = {f"part-{part}.safetensors": tensors[part::shards] for part in range(shards)}
    for file, some in files.items():
        save_file({name: tensor.to(dtype) for name, tensor in some}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name, _ in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def one_step_apart(folder: Path, dtype: torch.dtype) -> Path:
    """A study in 16 bits whose fine-tunes differ from the base by one step of the dtype, up or down, in each weight."""
    path = worlds.study(folder, NAMES, search={"algorithm": "random", "trials": 4})
    base = narrowed(folder / "models/base", dtype)
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        narrowed(folder / "models" / name, dtype)
        stored = weights(base)
        for tensor in stored.values():
            tensor.view(torch.int16).add_(torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int16))
        save_file(stored, folder / "models" / name / "part-0.safetensors", metadata={"format": "pt"})
    return path


def wide(path: Path) -> Path:
    """The study over the same base in float32, under another name."""
    out = path.with_name("wide.yaml")
    out.write_text(path.read_text())
    return in_process.edit(
        out, lambda study: study.update(name="wide", base={"path": "models/base", "dtype": "float32"})
    )


def jump(path: Path) -> float:
    """How far the objective is apart on the two sides of one half."""
    study = in_process.open_study(path)
    near, far = ({"code": 0.5 + way, "math": 0.5 - way} for way in (1e-3, -1e-3))
    return abs(study.score(near).objective[SEARCH] - study.score(far).objective[SEARCH])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_widened_base_has_the_same_values(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    worlds.save_model(tmp_path / "base", 0)
    source = BaseSource(path=narrowed(tmp_path / "base", dtype, shards), dtype="float32")
    parts = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "rope": {"theta": 1.0}}}
    config = json.loads((tmp_path / "base/config.json").read_text()) | parts
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    before = weights(tmp_path / "base")
    folder = locate(source, "base")
    assert folder != source.path and locate(source, "base") == folder, "made once"
    assert locate(BaseSource(path=folder, dtype="float32"), "base") == folder, "float32 stays as it is"
    assert locate(BaseSource(path=tmp_path / "base"), "base") == tmp_path / "base"
    assert conversion_of(folder) is None, "what was asked for is no warning"
    assert "metadata" in json.loads((folder / "model.safetensors.index.json").read_text()), "transformers needs it"
    after = weights(folder)
    assert after.keys() == before.keys() == weights(tmp_path / "base").keys()
    for name, tensor in before.items():
        assert tensor.dtype == dtype and after[name].dtype == torch.float32
        assert torch.equal(after[name], tensor.float())
    wide_parts = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "rope": {"theta": 1.0}}}
    assert json.loads((folder / "config.json").read_text()) == config | wide_parts | {"dtype": "float32"}
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_composites_of_a_widened_base_are_not_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    """In 16 bits half a step is none or a whole one."""
    path = one_step_apart(tmp_path, dtype)
    study = in_process.open_study(wide(path))
    study.merge({"code": 0.75, "math": 0.25}, tmp_path / "out")
    assert "base_model:\n- base\n- code\n- math\n" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    base, code, math = (weights(tmp_path / "models" / name) for name in ("base", *NAMES))
    for name, merged in weights(tmp_path / "out").items():
        expected = base[name].float() + 0.75 * (code[name].float() - base[name].float())
        expected += 0.25 * (math[name].float() - base[name].float())
        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_objective_jumps_at_half_a_step_and_not_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = one_step_apart(tmp_path, dtype)
    # In float16, whose steps are small, 2e-7 nats per token beside the 1e-8 that float32's own rounding takes.
    assert jump(wide(path)) < 0.2 * jump(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_that_takes_much_of_the_vectors_is_told(tmp_path: Path, dtype: torch.dtype) -> None:
    path = one_step_apart(tmp_path, dtype)
    narrow, exact = (in_process.open_study(file) for file in (path, wide(path)))
    for study in (narrow, exact):
        study.run()
    base, *others = (weights(tmp_path / "models" / name) for name in ("base", *NAMES))
    lost = length = 0.0
    for name, tensor in base.items():
        mean = torch.stack([other[name].double() for other in others]).mean(dim=0)
        lost += float((mean.to(dtype).double() - mean).square().sum())
        length += float((mean - tensor.double()).square().sum())
    assert narrow.summary().vectors.rounding == pytest.approx((lost / length) ** 0.5, rel=1e-3)
    assert exact.summary().vectors.rounding < 1e-2
    (line,) = rounding_lines(narrow.summary())
    assert "base: {path: ..., rounding: stochastic}, or dtype: float32" in line
    assert not rounding_lines(exact.summary())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_and_run_warn_of_it_before_a_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """By some of the weights, which are all matrices here but the embedding."""
    in_process.replace_dependencies(monkeypatch, tracker=NullTracker(), compute=InProcessCompute())
    path = one_step_apart(tmp_path, dtype)
    for command in ("check", "run"):
        for file, is_warned in ((path, True), (wide(path), False)):
            assert main([command, str(file)]) == 0
            said = " ".join("".join(capsys.readouterr()).split())
            assert (
                "warning: Rounding to the base's dtype moves matrices of the uniform average by about 0." in said
            ) == is_warned


def test_a_dtype_is_the_base_s_alone(tmp_path: Path) -> None:
    path = worlds.study(tmp_path, NAMES)
    code = {"checkpoint": {"path": "models/code", "dtype": "float32"}, "validation": "data/code.jsonl"}
    in_process.edit(path, lambda study: study["distributions"].update(code=code))
    with pytest.raises(InputError, match=r"distributions\.code\.checkpoint\.dtype"):
        load(path)


@pytest.mark.parametrize("base", ["models/base", {"path": "models/base", "dtype": "float32"}], ids=str)
def test_a_base_is_written_as_it_was_read(tmp_path: Path, base: object) -> None:
    path = in_process.edit(worlds.study(tmp_path, NAMES), lambda study: study.update(base=base))
    config = load(path)
    assert type(config).model_validate(config.model_dump(exclude_unset=True)).base == config.base
