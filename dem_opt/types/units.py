"""Splits and units."""

from math import exp, inf

SEARCH = "search"
"""The split that proposals and the choice of the winner see."""

HELD_OUT = "held_out"
"""The split that is only reported."""

SPLITS = (SEARCH, HELD_OUT)

NATS_PER_TOKEN = "nats_per_token"
"""Unit of losses: nats over scored tokens."""

BITS_PER_BYTE = "bits_per_byte"
"""Unit of losses that compares across tokenizers: bits over UTF-8 bytes of the scored text."""

UNITS = {NATS_PER_TOKEN: "nats per token", BITS_PER_BYTE: "bits per byte"}
"""Units of an objective, in words."""

DOCUMENTS = "documents"
"""The unit that intervals take to be sampled; "windows" in databases that do not name the documents of windows."""


def perplexity(nll: float) -> float:
    """exp(NLL) of nats per token; infinite from 709 on, where exp overflows float64."""
    return exp(nll) if nll < 709 else inf
