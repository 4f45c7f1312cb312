"""The quickstart's data, tokenizer and base, made from what this machine has.

Four distributions: Python *code* and technical *prose* out of the standard library, generated *math* problems with
worked steps, and generated JSON *records*.  Everything is drawn from one seed.  A module of the standard library, a
problem and a record each stand in one split only.
"""

import ast
import inspect
import json
import random
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dem_opt.corpus import pack
from dem_opt.finetune import save_checkpoint, train_model

DISTRIBUTIONS = ("code", "math", "prose", "records")
SPLITS = ("train", "val", "held_out")
RECORD = "assets.json"
END = "<|end|>"

SKIPPED_MODULES = {"antigravity", "distutils", "encodings", "idlelib", "lib2to3", "pydoc_data", "this", "turtledemo"}
"""Modules that say nothing of their own, or the same thing many times over."""

PARTS = 20
"""One module gives at most this part of a split's code and prose, so that no large package fills it."""

SHORTEST = 80
"""Characters of the shortest function or docstring that counts as a document."""


@dataclass(frozen=True)
class Settings:
    """What the assets are made with; the defaults are the quickstart's, fixed for every seed.

    `characters` counts the text of each distribution in train, search and held-out split; `mixture` shares out the
    base's training text; `module_shares` shares out the modules of the standard library.  The base knows prose and code
    far better than math and records, as bases do, so the distributions differ in what their vectors have to give.
    """

    characters: tuple[int, int, int] = (450_000, 60_000, 90_000)
    module_shares: tuple[float, float, float] = (0.7, 0.15, 0.15)
    mixture: tuple[tuple[str, float], ...] = (("code", 0.35), ("math", 0.05), ("prose", 0.55), ("records", 0.05))
    base_characters: int = 700_000
    vocabulary: int = 1024
    hidden: int = 160
    layers: int = 3
    heads: int = 5
    feed_forward: int = 448
    window: int = 128
    base_steps: int = 240
    base_learning_rate: float = 3e-3
    batch_size: int = 16
    fine_tuning_steps: int = 50
    fine_tuning_learning_rate: float = 1e-3
    windows: int = 16
    held_out_windows: int = 64
    trials: int = 40


Corpora = dict[str, dict[str, list[str]]]
"""Documents by distribution and split."""


def make_assets(
    folder: Path, seed: int = 0, observer: Callable[[str], None] = lambda line: None, settings: Settings = Settings()
) -> Path:
    """Make data, tokenizer, base and study file in `folder`, or find them made; returns the study file's path.

    The observer is told a line when a part begins.  Finished assets of the same seed and settings are left alone;
    others, and half-finished ones, are made again.
    """
    study = folder / "study.yaml"
    record = {"seed": seed, "settings": asdict(settings), "python": sys.version}
    if _is_finished(folder, record):
        observer("data, tokenizer and base are already here")
        return study
    (folder / RECORD).unlink(missing_ok=True)
    observer("writing data from the standard library and from generators")
    corpora = make_corpora(settings, seed)
    write_corpora(folder / "data", corpora)
    observer(f"training the base on a mixture ({settings.base_steps} steps)")
    make_base(folder / "models" / "base", corpora, settings, seed)
    study.write_text(study_text(settings, seed), encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return study


def make_corpora(settings: Settings, seed: int) -> Corpora:
    """Documents of each distribution in each split; no text stands in two splits."""
    modules = split_modules(settings, random.Random(f"{seed} modules"))
    code: dict[str, list[str]] = {}
    prose: dict[str, list[str]] = {}
    for (split, names), characters in zip(modules.items(), settings.characters, strict=True):
        from_library = characters // 2 if split == "train" else characters
        code[split], prose[split] = library_documents(names, characters, from_library)
    rng = random.Random(f"{seed} topics")
    prose["train"] = shuffled(prose["train"] + topic_documents(), rng, settings.characters[0])
    math = generated_documents(math_problem, settings.characters, random.Random(f"{seed} math"))
    records = generated_documents(json_record, settings.characters, random.Random(f"{seed} records"))
    return {
        "code": without_repeats(code),
        "math": math,
        "prose": without_repeats(prose),
        "records": records,
    }


def split_modules(settings: Settings, rng: random.Random) -> dict[str, list[str]]:
    """The standard library's modules (whole packages, never their parts) that have source, shared out over splits."""
    modules = [name for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES) if source_files(name)]
    rng.shuffle(modules)
    train, val, _ = settings.module_shares
    first, second = round(train * len(modules)), round((train + val) * len(modules))
    return dict(zip(SPLITS, (modules[:first], modules[first:second], modules[second:]), strict=True))


def source_files(module: str) -> list[Path]:
    """The Python files of a top-level module or package of the standard library, tests left out."""
    library = Path(sysconfig.get_path("stdlib"))
    if (library / f"{module}.py").is_file():
        return [library / f"{module}.py"]
    files = sorted((library / module).rglob("*.py"))
    return [file for file in files if not {"test", "tests"} & set(file.relative_to(library).parts)]


def library_documents(modules: Iterable[str], characters: int, prose_characters: int) -> tuple[list[str], list[str]]:
    """Code and prose of modules, at most so many characters of each, a PARTS-th of it from one module."""
    code: list[str] = []
    prose: list[str] = []
    for module in modules:
        more_code, more_prose = module_documents(module, characters // PARTS, prose_characters // PARTS)
        code += more_code
        prose += more_prose
        if sum(map(len, code)) >= characters and sum(map(len, prose)) >= prose_characters:
            break
    return within(code, characters), within(prose, prose_characters)


def module_documents(module: str, characters: int, prose_characters: int) -> tuple[list[str], list[str]]:
    """The first functions and docstrings of a module, at most so many characters of each."""
    code: list[str] = []
    prose: list[str] = []
    for file in source_files(module):
        tree = ast.parse(file.read_bytes())
        prose += [text for text in take_docstrings(tree) if len(text) >= SHORTEST]
        code += within(definitions(tree), characters)
        if sum(map(len, code)) >= characters // 2 and sum(map(len, prose)) >= prose_characters // 2:
            break
    return within(code, characters), within(prose, prose_characters)


def take_docstrings(tree: ast.Module) -> list[str]:
    """Remove every docstring from the tree and return them."""
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                docstrings.append(docstring)
                node.body = node.body[1:] or [ast.Pass()]
    return docstrings


def definitions(tree: ast.Module) -> Iterator[str]:
    """The functions and methods of a module, written out anew, hence without comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.unparse(node)
            if len(text) >= SHORTEST:
                yield text


def topic_documents() -> list[str]:
    """Python's help topics, a document a section of about 2,000 characters."""
    documents = []
    for name in sorted(topics):
        section = ""
        for paragraph in inspect.cleandoc(topics[name]).split("\n\n"):
            section = f"{section}\n\n{paragraph}".strip("\n")
            if len(section) >= 2000:
                documents.append(section)
                section = ""
    return documents


def within(documents: Iterable[str], characters: int) -> list[str]:
    """The first documents that together have at most so many characters."""
    chosen: list[str] = []
    for document in documents:
        characters -= len(document)
        if characters < 0:
            break
        chosen.append(document)
    return chosen


def shuffled(documents: list[str], rng: random.Random, characters: int) -> list[str]:
    """Documents in an order drawn from `rng`, up to so many characters."""
    return within(rng.sample(documents, len(documents)), characters)


def without_repeats(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """The splits, each text kept only where it stands first."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for split, documents in splits.items():
        kept[split] = [text for text in dict.fromkeys(documents) if text not in seen]
        seen.update(documents)
    return kept


def generated_documents(
    make: Callable[[random.Random], str], characters: tuple[int, int, int], rng: random.Random
) -> dict[str, list[str]]:
    """Documents of a generator for each split, all of them different."""
    seen: set[str] = set()
    splits: dict[str, list[str]] = {}
    for split, wanted in zip(SPLITS, characters, strict=True):
        splits[split] = []
        while wanted > 0:
            document = make(rng)
            if document not in seen:
                seen.add(document)
                splits[split].append(document)
                wanted -= len(document)
    return splits


PEOPLE = ("Ada", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mara", "Noor")
THINGS = ("apples", "books", "candles", "pencils", "stamps", "tickets", "marbles", "bottles", "stickers", "postcards")
PLACES = ("Bergen", "Cusco", "Dakar", "Hanoi", "Izmir", "Lagos", "Malmo", "Osaka", "Quito", "Riga", "Sofia", "Tunis")


def math_problem(rng: random.Random) -> str:
    """A word problem with worked steps and the answer."""
    make = rng.choice((_boxes_problem, _shop_problem, _share_problem, _journey_problem, _saving_problem))
    problem, steps, answer = make(rng)
    worked = "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, start=1))
    return f"Problem: {problem}\n{worked}\nAnswer: {answer}"


Worked = tuple[str, list[str], str]


def _boxes_problem(rng: random.Random) -> Worked:
    (who, other), what = rng.sample(PEOPLE, 2), rng.choice(THINGS)
    boxes, each = rng.randint(3, 30), rng.randint(4, 40)
    gone = rng.randint(1, boxes * each - 1)
    problem = f"{who} has {boxes} boxes with {each} {what} in each box. {who} gives {gone} {what} to {other}."
    steps = [
        f"{boxes} boxes of {each} {what} are {boxes} * {each} = {boxes * each} {what}.",
        f"After giving {gone} away, {boxes * each} - {gone} = {boxes * each - gone} {what} are left.",
    ]
    return f"{problem} How many {what} are left?", steps, f"{boxes * each - gone}"


def _shop_problem(rng: random.Random) -> Worked:
    who, (first, second) = rng.choice(PEOPLE), rng.sample(THINGS, 2)
    counts, prices = rng.choices(range(2, 25), k=2), rng.choices(range(2, 20), k=2)
    costs = [count * price for count, price in zip(counts, prices, strict=True)]
    problem = (
        f"{who} buys {counts[0]} {first} at {prices[0]} euros each and {counts[1]} {second} at {prices[1]} euros each."
    )
    steps = [
        f"The {first} cost {counts[0]} * {prices[0]} = {costs[0]} euros.",
        f"The {second} cost {counts[1]} * {prices[1]} = {costs[1]} euros.",
        f"Together they cost {costs[0]} + {costs[1]} = {sum(costs)} euros.",
    ]
    return f"{problem} How much does {who} pay?", steps, f"{sum(costs)} euros"


def _share_problem(rng: random.Random) -> Worked:
    what, friends, each, rest = rng.choice(THINGS), rng.randint(3, 12), rng.randint(5, 60), rng.randint(0, 2)
    total, names = friends * each + rest, rng.sample(PEOPLE, 2)
    problem = f"{names[0]} and {names[1]} share {total} {what} equally among {friends} friends."
    steps = [
        f"{friends} * {each} = {friends * each}, so each friend gets {each} {what}.",
        f"There are {total} - {friends * each} = {rest} {what} left over.",
    ]
    question = "How many does each friend get and how many are left over?"
    return f"{problem} {question}", steps, f"{each} each, {rest} left over"


def _journey_problem(rng: random.Random) -> Worked:
    (start, end), speed, hours, rest = rng.sample(PLACES, 2), rng.randint(30, 120), rng.randint(2, 9), rng.randint(5, 99)
    distance = speed * hours
    problem = f"A train leaves {start} at {speed} km an hour. After {hours} hours it is {rest} km from {end}."
    steps = [
        f"In {hours} hours the train goes {speed} * {hours} = {distance} km.",
        f"The whole way is {distance} + {rest} = {distance + rest} km.",
    ]
    return f"{problem} How far is {end} from {start}?", steps, f"{distance + rest} km"


def _saving_problem(rng: random.Random) -> Worked:
    who, weekly, weeks, have = rng.choice(PEOPLE), rng.randint(5, 60), rng.randint(3, 30), rng.randint(10, 200)
    saved = weekly * weeks
    problem = f"{who} has {have} euros and saves {weekly} euros a week for {weeks} weeks."
    steps = [
        f"In {weeks} weeks {who} saves {weekly} * {weeks} = {saved} euros.",
        f"With the first {have} euros that makes {saved} + {have} = {saved + have} euros.",
    ]
    return f"{problem} How much money does {who} have then?", steps, f"{saved + have} euros"


def json_record(rng: random.Random) -> str:
    """A nested JSON object: an order, a sensor's report or a member's account."""
    make = rng.choice((_order_record, _sensor_record, _member_record))
    return json.dumps({"id": rng.randint(10_000, 99_999), **make(rng)}, indent=1)


def _order_record(rng: random.Random) -> dict[str, object]:
    def line() -> dict[str, object]:
        return {"item": rng.choice(THINGS), "quantity": rng.randint(1, 20), "price": rng.randint(100, 9999) / 100}

    address = {"city": rng.choice(PLACES), "postcode": str(rng.randint(1000, 9999))}
    return {
        "type": "order",
        "customer": {"name": rng.choice(PEOPLE), "address": address},
        "lines": [line() for _ in range(rng.randint(1, 3))],
        "paid": rng.random() < 0.8,
        "status": rng.choice(("new", "packed", "shipped", "returned")),
    }


def _sensor_record(rng: random.Random) -> dict[str, object]:
    def reading(hour: int) -> dict[str, object]:
        return {"hour": hour, "celsius": rng.randint(-99, 350) / 10, "humidity": rng.randint(10, 99)}

    first = rng.randint(0, 20)
    return {
        "type": "sensor",
        "station": {"place": rng.choice(PLACES), "height_m": rng.randint(0, 3000)},
        "readings": [reading(first + step) for step in range(rng.randint(2, 4))],
        "battery": rng.randint(1, 100) / 100,
        "errors": rng.choice((None, "timeout", "low voltage")),
    }


def _member_record(rng: random.Random) -> dict[str, object]:
    name = rng.choice(PEOPLE)
    day = f"20{rng.randint(10, 26)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return {
        "type": "member",
        "user": {"name": name, "email": f"{name.lower()}{rng.randint(1, 999)}@example.org", "since": day},
        "roles": sorted(rng.sample(("admin", "author", "editor", "guest", "owner"), rng.randint(1, 3))),
        "limits": {"uploads": 2 ** rng.randint(3, 9), "storage_gb": 2 ** rng.randint(0, 7)},
        "active": rng.random() < 0.7,
    }


def write_corpora(folder: Path, corpora: Corpora) -> None:
    """Write `<distribution>.<split>.jsonl`, one document a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, splits in corpora.items():
        for split, documents in splits.items():
            lines = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
            (folder / f"{name}.{split}.jsonl").write_text(lines, encoding="utf-8")


def make_tokenizer(corpora: Corpora, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the training texts; it can write any text, and ends documents with END."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for splits in corpora.values() for text in splits["train"]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def make_base(out: Path, corpora: Corpora, settings: Settings, seed: int) -> None:
    """Train tokenizer and base on the mixture of the training texts and save both (float32)."""
    tokenizer = make_tokenizer(corpora, settings.vocabulary)
    model = untrained_base(settings, len(tokenizer), tokenizer.eos_token_id, seed)
    windows = pack(mixture_documents(corpora, settings, seed), tokenizer, settings.window)
    train_model(model, windows, settings.base_steps, settings.base_learning_rate, settings.batch_size, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, model, tokenizer, {})


def untrained_base(settings: Settings, vocabulary: int, end: int, seed: int) -> LlamaForCausalLM:
    """A Llama of the settings' size with random float32 weights; `end` is the id of END."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.feed_forward,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=4 * settings.window,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
        )
    )


def mixture_documents(corpora: Corpora, settings: Settings, seed: int) -> list[str]:
    """The base's training documents, of each distribution its share of characters, shuffled."""
    parts = [
        within(corpora[name]["train"], round(share * settings.base_characters)) for name, share in settings.mixture
    ]
    documents = [document for part in parts for document in part]
    random.Random(f"{seed} mixture").shuffle(documents)
    return documents


STUDY = """\
# Four distributions, a base that knows some of them better than others, one fine-tuned checkpoint for each.
# Which coefficients give the best composite?  Relative paths start at this file.
name: quickstart
base: models/base
distributions:
{distributions}
evaluation: {{window: {window}, windows: {windows}, held_out: {held_out}, seed: {seed}}}
search: {{algorithm: simplex-gp, trials: {trials}, seed: {seed}}}
# The same for every distribution; `dem-opt train` makes the checkpoints that are missing.
fine_tuning: {{steps: {steps}, learning_rate: {learning_rate}, batch_size: {batch_size}, seed: {seed}}}
"""

DISTRIBUTION = """\
  {name}:
    checkpoint: models/{name}
    train: data/{name}.train.jsonl
    validation: data/{name}.val.jsonl      # the search split: proposals and the choice of the winner see only this
    held_out: data/{name}.held_out.jsonl   # only reported on"""


def study_text(settings: Settings, seed: int) -> str:
    """The study file."""
    return STUDY.format(
        distributions="\n".join(DISTRIBUTION.format(name=name) for name in DISTRIBUTIONS),
        window=settings.window,
        windows=settings.windows,
        held_out=settings.held_out_windows,
        trials=settings.trials,
        seed=seed,
        steps=settings.fine_tuning_steps,
        learning_rate=f"{settings.fine_tuning_learning_rate:.1e}",
        batch_size=settings.batch_size,
    )


def _is_finished(folder: Path, record: dict[str, object]) -> bool:
    """Whether the folder's assets were finished with the same seed, settings and Python."""
    try:
        return bool(json.loads((folder / RECORD).read_text(encoding="utf-8")) == json.loads(json.dumps(record)))
    except (OSError, ValueError):
        return False
