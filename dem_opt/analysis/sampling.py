"""Sampling error of a corpus's losses, with the document as the unit that was sampled.

A loss is a ratio of sums over windows,  r = sum_i x_i / sum_i t_i , with nats x and scored tokens t (or other sizes, as
bytes).  To first order its error is the sum of the residuals  e_i = x_i - r t_i  over sum t  (Cochran 1977, section
2.6), and residuals of windows that share a document are correlated.  If each token's loss has a part that is its
document's, and documents are independent and alike, the correlation of two windows is

    C_ij = a_i . a_j ,     a_id = s_id / |s_i|           s_id scored tokens of document d in window i .

So C is the identity where every document stays in one window, however many a window holds; where documents fill many
windows, C_ij is 1 for two windows of one document, and what follows is the clustered standard error (Liang and Zeger
1986; for language models Miller 2024, arXiv 2411.00640, section 2.2); texts laid end to end lie between.  Clusters
alone would not do for these: windows that share documents chain a whole corpus into one cluster.

    Var r = c  e' C e / (sum t)^2 ,     c = W / tr(M)  *  sum C / sum C^2 ,     M = R' C R ,  R = I - t 1' / sum t

The first factor of c makes up for the residuals being from the estimate instead of the truth: G / (G - 1) for G equal
clusters.  The second makes up for C weighing products of residuals that are correlated by C themselves; it is 1 for
clusters.  The error has  tr(M)^2 / tr(M^2)  degrees of freedom (Satterthwaite, with independent windows as working
model: Bell and McCaffrey 2002), which is G - 1 for G equal clusters.

Shape suffixes beside the project's: D columns of documents, R resamples.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import DOCUMENTS

Array = NDArray[np.float64]

Documents = Sequence[Mapping[int, int]]
"""Of each window, the scored tokens of each of its documents."""

SINGLE = 1e-9
"""Share of the windows' variance that is left below which all windows are of one document, up to rounding."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """The windows of a corpus as a sample of documents.

    Attributes:
        sizes_W: Denominators of the loss: scored tokens, or bytes.
        loads_WD: a_id; documents of a single window share a column of its own.
        has_documents: False where documents are unknown, so that windows count as independent.
    """

    sizes_W: Array
    loads_WD: csr_array
    has_documents: bool

    @classmethod
    def of(cls, sizes_W: Sequence[float], documents: Documents | None) -> "Sampling":
        """The sampling of windows with these documents; of independent windows where documents are not known."""
        sizes = np.asarray(sizes_W, dtype=np.float64)
        if documents is None:
            return cls(sizes, csr_array(np.eye(len(sizes))), has_documents=False)
        assert len(documents) >= len(sizes), "documents of every window"
        return cls(sizes, _loads(documents[: len(sizes)]), has_documents=True)

    def residuals(self, values_W: Sequence[float] | Array) -> Array:
        """Residuals  e_i = x_i - r t_i , in the unit of the values."""
        values = np.asarray(values_W, dtype=np.float64)
        residuals_W: Array = values - values.sum() / self.sizes_W.sum() * self.sizes_W
        return residuals_W

    def variance(self, values_W: Sequence[float] | Array) -> float:
        """Var r; infinite where all windows are of one document, which says nothing about others."""
        if not isfinite(self._correction):
            return inf
        along_D = self.loads_WD.T @ self.residuals(values_W)
        return float(self._correction * (along_D @ along_D) / self.sizes_W.sum() ** 2)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the variance."""
        return self._moments[1]

    def errors(self, residuals_NW: Array, resamples: int, rng: np.random.Generator, tails: bool = False) -> Array:
        """Errors of N ratios, drawn together, [N, R]: a multiplier bootstrap (dependent wild bootstrap, Shao 2010).

            sqrt(c) sum_i z_i e_i / sum t ,     z = A g ,  g standard normal,

        which has the variance above and the correlations of the ratios.  `tails`: with Student's t distribution in the
        place of the normal, so that quantiles make intervals.
        """
        draws_RD = rng.standard_normal((resamples, self.loads_WD.shape[1]))
        if tails:
            draws_RD *= np.sqrt(self.freedom / rng.chisquare(self.freedom, size=(resamples, 1)))
        along_ND = residuals_NW @ self.loads_WD
        errors_NR: Array = sqrt(self._correction) / self.sizes_W.sum() * (along_ND @ draws_RD.T)
        return errors_NR

    @property
    def is_defined(self) -> bool:
        """True if there are at least two documents (or independent windows), so that errors can be estimated."""
        return isfinite(self._correction)

    @property
    def _correction(self) -> float:
        return self._moments[0]

    @cached_property
    def _moments(self) -> tuple[float, float]:
        """The factor c, and the degrees of freedom."""
        covariance_WW = (self.loads_WD @ self.loads_WD.T).toarray()
        weights_W = self.sizes_W / self.sizes_W.sum()
        centred_WW = covariance_WW - weights_W @ covariance_WW
        centred_WW -= (centred_WW @ weights_W)[:, None]
        trace = float(np.trace(centred_WW))
        if trace <= SINGLE * len(weights_W):
            return inf, 1.0
        overlap = float(covariance_WW.sum() / (covariance_WW**2).sum())
        return len(weights_W) / trace * overlap, trace**2 / float((centred_WW**2).sum())


def sampled_unit(samplings: Iterable[Sampling]) -> str:
    """The unit that intervals take to be sampled: "documents", or "windows" where some are unknown."""
    return DOCUMENTS if all(sampling.has_documents for sampling in samplings) else "windows"


def documents_of(ledger: Ledger, identity: StudyIdentity, split: str) -> dict[str, Documents]:
    """Documents of a split's windows by distribution, as far as the ledger knows them."""
    layouts = {name: ledger.layout(key) for name, key in identity.corpora[split].items()}
    return {name: layout.documents_W for name, layout in layouts.items() if layout is not None}


def _loads(documents: Documents) -> csr_array:
    """Rows of length 1; a document that stands in one window alone is independent of all others, as its column is."""
    windows_of = Counter(document for window in documents for document in window)
    columns: dict[Hashable, int] = {}
    squares: defaultdict[tuple[int, int], float] = defaultdict(float)
    for row, window in enumerate(documents):
        for document, tokens in window.items():
            column = ("shared", document) if windows_of[document] > 1 else ("own", row)
            squares[row, columns.setdefault(column, len(columns))] += float(tokens) ** 2
    rows, places = np.array(list(squares)).T
    squares_X = np.array(list(squares.values()))
    norms_W = np.bincount(rows, squares_X, minlength=len(documents))
    return csr_array((np.sqrt(squares_X / norms_W[rows]), (rows, places)), shape=(len(documents), len(columns)))
