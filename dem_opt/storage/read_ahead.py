"""A ledger that has read many scores at once, for those who ask for one composite after another."""

from collections.abc import Collection, Iterable

from dem_opt.storage.ledger import Ledger
from dem_opt.types import Composite, Score


class ReadAhead(Ledger):
    """A ledger whose scores of some composites were read by one query; of others it reads them when asked.

    They are those of one moment: it is for scores that don't change meanwhile, and for a short time.

    Args:
        ledger: The ledger.
        composites: Composites whose scores are read now.
        corpora: Keys of the corpora that they are read of.
        scoring: The scoring that they are read under.
    """

    def __init__(self, ledger: Ledger, composites: Iterable[Composite], corpora: Collection[str], scoring: str) -> None:
        self.engine, self.patience = ledger.engine, ledger.patience  # the tables are there
        distinct = list(dict.fromkeys(composites))
        scores = ledger.look_up_all(distinct, corpora, scoring)
        self._known = {composite.key: known for composite, known in zip(distinct, scores, strict=True)}
        self._corpora, self._scoring = frozenset(corpora), scoring

    def look_up(self, composite: Composite, corpora: Collection[str], scoring: str) -> dict[str, Score]:
        """The scores of a composite by corpus key, as `Ledger.look_up` has them."""
        known = self._known.get(composite.key)
        if known is None or scoring != self._scoring or not self._corpora.issuperset(corpora):
            return super().look_up(composite, corpora, scoring)
        return {key: known[key] for key in corpora if key in known}
