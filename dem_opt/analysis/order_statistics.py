"""The expected best of k results drawn from all, over every order of trying them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def expected_best(ranked: Sequence[float], draws_S: NDArray[np.int64]) -> Array:
    """Expected value of the best ranked of k that are drawn without replacement, for each k in `draws_S`.

        E_k = v_1 + sum_i (v_{i+1} - v_i) P(no rank up to i among the k),    P = C(n - i, k) / C(n, k)

    Ranks may come from another quantity than the values: a model is chosen by its search loss, and valued by its
    held-out loss.

    Args:
        ranked: v_1 ... v_n, the best ranked first.
        draws_S: Numbers of draws, each from 1 to n.

    Returns:
        E_k, [S].
    """
    values_n = np.asarray(ranked, dtype=np.float64)
    n = len(values_n)
    # Binomials of thousands overflow floats: P comes from logarithms of factorials.
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    left_i = n - np.arange(1, n)
    expected_S = np.empty(len(draws_S))
    for place, k in enumerate(draws_S):
        possible = left_i >= k
        log_choices = log_factorial[left_i[possible]] - log_factorial[left_i[possible] - k]
        log_p = log_choices - log_factorial[n] + log_factorial[n - k]
        expected_S[place] = values_n[0] + np.diff(values_n)[possible] @ np.exp(log_p)
    return expected_S
