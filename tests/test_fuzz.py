"""Laws of damage: whatever stands in a study file or a checkpoint, `check` succeeds or says so in one line."""

import json
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
import yaml
from safetensors.torch import load_file, save_file

from dem_opt.cli.main import main

HANG = 60
"""Seconds after which one part of these laws counts as hanging."""

BATCHES = range(20)

ODD: list[Any] = [
    *(None, True, 0, -1, 2**63, -(2**64), 10**400, 1e308, -0.0, float("inf"), float("nan")),
    *("", " ", "~", "/", "..", "../..", "\0", "\x1b[31m", "a\nb", "é" * 100, "\u202e", "x" * 5000, "{}", "%s", "1e400"),
    *(
        "sqlite:///",
        "sqlite:////",
        "postgresql+psycopg://u:p@h/d",
        "mysql://x",
        "study.yaml",
        "models/code/config.json",
    ),
    *([], {}, [[]], [None], {"a": 1}, {"": None}, {1: 2}, [1] * 1000, date(2026, 1, 1), b"\xff", "auto", "float8"),
]
KEYS = ["", "namé", "NAME", "x\ny", "\x1b", "__proto__", "0", "a" * 300, "-", ".", "code", "base"]
SNIPPETS = [
    *(
        "!!int ",
        "!!float x",
        "!!timestamp x",
        "!!binary '='",
        "!!bool ",
        "!!set ",
        "!!omap ",
        "!!python/object:os.system ",
    ),
    *(
        "&a ",
        "*a",
        "&a [*a]",
        "<<: ",
        "? ",
        "- ",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "2026-99-99",
        "0b2",
        "1:99",
        "0x" + "f" * 9999,
    ),
    *(
        "\t",
        "\0",
        "\ufeff",
        "\u2028",
        "\x85",
        "[" * 3000,
        "{a: " * 500,
        "1" * 5000,
        "'",
        '"\\ud800"',
        "|\n",
        ">9",
        "#",
        ": ",
    ),
    "x: &a [1,1,1,1,1,1,1,1]\ny: &b [*a,*a,*a,*a,*a,*a]\nz: &c [*b,*b,*b,*b,*b,*b,*b]\nname: [*c,*c,*c,*c,*c]\n",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study that is all right."""
    path = worlds.study(tmp_path_factory.mktemp("world"), names=("code", "math"))
    return path.parent


@contextmanager
def watched() -> Iterator[None]:
    """Turns a hang into a failure."""

    def hangs(*_: Any) -> None:
        raise TimeoutError(f"hangs: nothing came of it in {HANG} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def listing(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def check(world: Path, capsys: pytest.CaptureFixture[str], what: object) -> str:
    """Errors that `check` prints, after the assertions of the law."""
    before = listing(world)
    with watched():
        status = main(["check", str(world / "study.yaml")])
    output = capsys.readouterr()
    assert status in (0, 2), what
    lines = [line for line in output.err.split("\n") if line.startswith("dem-opt: ")]
    assert len(lines) == (1 if status else 0), (what, output.err)
    assert "Traceback" not in output.err and len(output.err) < 3000, what
    assert all(character.isprintable() for character in "".join(lines)), what
    assert listing(world) == before, what
    return output.err


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values stand in nested mappings and lists, the outermost left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in inner for place in [(*path, key), *places(child, (*path, key))]]


def change(rng: random.Random, data: Any, odd: list[Any]) -> None:
    """Drop, rename or replace something, in place."""
    *above, last = rng.choice(places(data))
    for key in above:
        data = data[key]
    act = rng.choice(["drop", "rename", "replace", "replace", "nest"])
    if act == "drop":
        del data[last]
    elif act == "rename" and isinstance(data, dict):
        key = rng.choice([*KEYS, f"{last}s", f"{last}"[:-1]])
        data[key] = data.pop(last)
    elif act == "nest":
        data[last] = {"a": [data[last]]} if rng.random() < 0.5 else [data[last]] * 2
    else:
        data[last] = rng.choice(odd)


def mangle(rng: random.Random, text: bytes, snippets: list[str]) -> bytes:
    """Insert, cut, repeat or flip something."""
    start, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    act = rng.choice(["insert", "insert", "at a line", "cut", "repeat", "flip", "truncate"])
    snippet = rng.choice(snippets).encode()
    if act == "insert":
        return text[:start] + snippet + text[start:]
    if act == "at a line":
        lines = text.splitlines(keepends=True)
        place = rng.randrange(len(lines) + 1)
        return b"".join([*lines[:place], snippet + b"\n", *lines[place:]])
    if act == "cut":
        return text[:start] + text[end:]
    if act == "repeat":
        return text[:end] + text[start:]
    if act == "flip":
        return text[:start] + bytes([rng.randrange(256)]) + text[start + 1 :]
    return text[:start]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_damaged_study_file_is_told_in_one_line(world, capsys, batch):
    file = world / "study.yaml"
    whole = file.read_bytes()
    rng = random.Random(batch)
    try:
        for number in range(25):
            if rng.random() < 0.5:
                data = yaml.safe_load(whole)
                for _ in range(rng.choice([1, 1, 2, 4])):
                    if places(data):
                        change(rng, data, ODD)
                text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode()
            else:
                text = mangle(rng, whole, SNIPPETS)
            file.write_bytes(text)
            check(world, capsys, (batch, number, text[:2000]))
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"name",
        b"? [a]\n: b",
        b"name: &a [*a]",
        b"[" * 20_000,
        b"a: &a {x: 1}\n"
        + b"".join(
            b"k%d: &k%d {<<: [%s]}\n" % (n, n, b", ".join([b"*k%d" % (n - 1)] * 9) if n else b"*a") for n in range(12)
        ),
        b"a0: &a0 [x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12))
        + b"name: *a11",
    ],
    ids=["empty", "no UTF-8", "a list", "a word", "a list as key", "itself", "deep", "merged aliases", "aliases"],
)
def test_a_study_file_of_nothing_sensible_is_refused(world, capsys, text):
    file = world / "study.yaml"
    whole = file.read_bytes()
    try:
        file.write_bytes(text)
        assert "dem-opt: " in check(world, capsys, text[:100])
    finally:
        file.write_bytes(whole)


WEIGHTS = "models/math/model.safetensors"
NUMBERS = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, "4", [], [4], {}]
NAMES = ["", "\0", "a\nb", "\x1b[2J", "é", "x" * 5000, "__metadata__", "lm_head.weight", "../x"]


def spoil_header(rng: random.Random, header: dict[str, Any]) -> None:
    """One entry's dtype, shape, offsets or name, in place."""
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, other = header[name], header[rng.choice(list(header))]
    act = rng.choice(["dtype", "shape", "number", "offsets", "swap", "rename", "drop", "entry", "metadata", "odd"])
    if act == "dtype":
        entry["dtype"] = rng.choice(["I8", "F8_E4M3", "U8", "F64", "BF16", "Q4", "", None, 3, ["F32"]])
    elif act == "shape":
        entry["shape"] = rng.choice(
            [[], [-4, -4], [2**40, 2**40], [[16]], [16.0], "16", None, [True], [10**4000], [1] * 9999]
        )
    elif act == "number":
        entry[rng.choice(["shape", "data_offsets"])][0] = rng.choice(NUMBERS)
    elif act == "offsets":
        entry["data_offsets"] = rng.choice([[0, 4], [4, 0], [-4, 0], [0], [0, 4, 8], None, "04", [0, 10**30]])
    elif act == "swap":
        entry["data_offsets"] = other.get("data_offsets")
    elif act == "rename":
        header[rng.choice(NAMES)] = header.pop(name)
    elif act == "drop":
        del header[name]
    elif act == "entry":
        header[name] = rng.choice([None, [], {}, 1, "x", {"dtype": "F32"}])
    elif act == "metadata":
        header["__metadata__"] = rng.choice([None, [], {"a": 1}, {"a": {"b": []}}, "x"])
    else:
        change(rng, header, ODD[:-14])


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """A weight file with another header, or another length of it."""
    length = struct.unpack("<Q", whole[:8])[0]
    text, data = whole[8 : 8 + length], whole[8 + length :]
    if rng.random() < 0.7:
        header = json.loads(text)
        spoil_header(rng, header)
        text = json.dumps(header).encode()
    else:
        text = mangle(
            rng, text, ["[" * 5000, "NaN", "\0", '{"a":', "\ud7ff", '"dtype":"F32",', "1e999", "\\ud800", " "]
        )
    header_bytes = len(text) if rng.random() < 0.8 else rng.choice([0, 1, 2**40, 2**64 - 1, len(text) + 1, len(whole)])
    return struct.pack("<Q", header_bytes) + text + data[: rng.choice([len(data)] * 8 + [0, len(data) - 1])]


def spoiled(world: Path, name: str, spoil: Callable[[bytes], bytes], capsys: Any, what: object) -> None:
    """The law for a study with one file spoilt."""
    file = world / name
    whole = file.read_bytes()
    try:
        file.write_bytes(spoil(whole))
        check(world, capsys, what)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_damaged_weight_file_is_told_in_one_line(world, capsys, batch):
    rng = random.Random(batch)
    for number in range(10):
        name = rng.choice([WEIGHTS, "models/base/model.safetensors"])
        spoiled(world, name, lambda whole: damaged(rng, whole), capsys, (batch, number, name))


@pytest.fixture(scope="module")
def sharded(world, tmp_path_factory):
    """The same, one checkpoint being in two files."""
    folder = tmp_path_factory.mktemp("sharded") / "world"
    shutil.copytree(world, folder)
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, folder / "models/math" / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("batch", BATCHES)
def test_damaged_json_is_told_in_one_line(sharded, capsys, batch):
    rng = random.Random(batch)
    files = [
        f"{WEIGHTS}.index.json",
        "models/base/config.json",
        "models/math/config.json",
        "models/base/tokenizer.json",
    ]

    def spoil(whole: bytes) -> bytes:
        if rng.random() < 0.3:
            return mangle(rng, whole, ["[" * 5000, "NaN", "\0", '{"a":', "1" * 5000, '"\\ud800"', "null"])
        data = json.loads(whole)
        for _ in range(rng.choice([1, 1, 3])):
            if places(data):
                change(rng, data, [*ODD[:-14], [], {}, [None], 10**9, "model.bin", "one.safetensors\0"])
        return json.dumps(data).encode()

    for number in range(10):
        name = rng.choice(files)
        spoiled(sharded, name, spoil, capsys, (batch, number, name))


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def as_integers(folder: Path, dtype: torch.dtype = torch.int8) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_float8(folder: Path) -> None:
    as_integers(folder, torch.float8_e4m3fn)


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def leave(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../base/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["base", "math"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (quantize, "quantized weights can't be summed"),
        (as_integers, "I8: only F32, BF16, F16 can be merged"),
        (as_float8, "weight_scale_inv"),
        (pickle, "save it as safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (leave, "outside its own folder"),
    ],
)
def test_what_can_not_be_merged_safely_is_refused_with_the_reason(world, tmp_path, capsys, name, spoil, words):
    shutil.copytree(world, tmp_path / "world")
    spoil(tmp_path / "world/models" / name)
    assert words in check(tmp_path / "world", capsys, words)
