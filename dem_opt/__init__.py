"""dem_opt: the best distribution-edited model, found by Bayesian optimization.

`from dem_opt import Study; Study.load("study.yaml").run()` does what `dem-opt run study.yaml` does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dem_opt.study import Study as Study

__version__ = "0.1.0"
__all__ = ["Study"]


def __getattr__(name: str) -> Any:
    """Load `Study` on first use, so that `import dem_opt` needs no torch."""
    if name == "Study":
        from dem_opt.study import Study

        return Study
    raise AttributeError(f"module 'dem_opt' has no attribute {name!r}")
