"""Log studies for people to look at: in MLflow, or nowhere.

`Tracker` is the seam, `MlflowTracker` and `NullTracker` are its two implementations. The only package that imports
mlflow, and only when something is written. Imports storage and the packages below it; never evaluation or compute.
"""

from dem_opt.tracking.mlflow_tracker import MlflowTracker
from dem_opt.tracking.null_tracker import NullTracker
from dem_opt.tracking.protocols import (
    DataSource,
    JobNote,
    JobTracker,
    NoPeers,
    PageListener,
    Peers,
    Records,
    SearchInfo,
    SearchTracker,
    StudyDescription,
    Tracker,
)

__all__ = [
    "DataSource",
    "JobNote",
    "JobTracker",
    "MlflowTracker",
    "NoPeers",
    "NullTracker",
    "PageListener",
    "Peers",
    "Records",
    "SearchInfo",
    "SearchTracker",
    "StudyDescription",
    "Tracker",
]
