"""Time and memory of `dem-opt check --overlap`: `python benchmarks/overlap.py STUDY --megabytes 100 --evaluated 10`.

Streams a training text of random words, made as it goes, past the n-grams of evaluated documents of the same kind, with
the tokenizer of the study's base.  One in a hundred training documents is an evaluated one with a word changed.
Reported are tokens, the seconds of making, tokenizing and looking up, and the largest memory of the process.
"""

import argparse
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np

from dem_opt.checkpoints.locate import locate
from dem_opt.config import load
from dem_opt.data.overlap import Index, batch_of, batches
from dem_opt.data.tokenize import encode_plain, load_tokenizer

LENGTHS = (50, 400)
"""Fewest and most words of a document."""

WORDS = 20_000

Item = TypeVar("Item")


def make_documents(rng: random.Random, vocabulary: list[str], megabytes: float) -> Iterator[str]:
    """Documents of random words, as many as fill the megabytes."""
    written = 0
    while written < megabytes * 1e6:
        text = " ".join(rng.choices(vocabulary, k=rng.randint(*LENGTHS)))
        written += len(text)
        yield text


def with_copies(rng: random.Random, documents: Iterator[str], evaluated: list[str]) -> Iterator[str]:
    """Every hundredth document replaced by an evaluated one with a word changed."""
    for number, text in enumerate(documents):
        if number % 100:
            yield text
        else:
            words = rng.choice(evaluated).split(" ")
            words[rng.randrange(len(words))] = "changed"
            yield " ".join(words)


class Timer:
    """Seconds that iterators take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items, with the time until each of them."""
        while True:
            start = perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += perf_counter() - start
            yield item


def peak_megabytes() -> float:
    """The largest resident memory of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Measure once and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--megabytes", type=float, default=100, help="of training text (100)")
    parser.add_argument("--evaluated", type=float, default=10, help="of evaluated documents (10)")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(locate(load(arguments.study).base, "base"))
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(WORDS)]
    evaluated = list(make_documents(rng, vocabulary, arguments.evaluated))
    ids = [np.array(tokens) for tokens in encode_plain(evaluated, tokenizer)]
    before, start = peak_megabytes(), perf_counter()
    index = Index(batch_of(ids))
    index.look_up(batches(ids[:1]))
    indexed, built = peak_megabytes(), perf_counter() - start
    making, tokenizing, start = Timer(), Timer(), perf_counter()
    training = making.of(with_copies(rng, make_documents(rng, vocabulary, arguments.megabytes), evaluated))
    matches = index.look_up(batches(tokenizing.of(encode_plain(training, tokenizer))))
    total = perf_counter() - start
    tokenized, looked_up = tokenizing.seconds - making.seconds, total - tokenizing.seconds
    print(f"evaluated: {len(ids):,} documents, {sum(map(len, ids)):,} tokens; index in {built:.1f} s")
    print(f"training: {matches.documents:,} documents, {matches.tokens:,} tokens")
    print(f"seconds: making {making.seconds:.1f}, tokenizing {tokenized:.1f}, looking up {looked_up:.1f}")
    print(f"near-duplicates: {int(matches.near_E.sum()):,} of {len(ids):,} documents")
    print(f"largest memory in MB: {before:.0f} before, {indexed:.0f} with the index, {peak_megabytes():.0f} at the end")


if __name__ == "__main__":
    main()
