"""Where workers and other jobs run: in this process, or as Ray actors and tasks.

`InProcessCompute` needs nothing; `RayCompute` imports ray when it is entered, never before. Both are a `Compute`.
Imports config and the root modules only: a worker is built by a function that the caller passes.
"""

from dem_opt.compute.in_process import InProcessCompute, InProcessPool
from dem_opt.compute.protocols import Compute, Evaluator, Pool
from dem_opt.compute.ray_compute import SETTINGS, RayCompute, ray_warnings
from dem_opt.compute.ray_pool import ATTEMPTS, RayPool

__all__ = [
    "ATTEMPTS",
    "SETTINGS",
    "Compute",
    "Evaluator",
    "InProcessCompute",
    "InProcessPool",
    "Pool",
    "RayCompute",
    "RayPool",
    "ray_warnings",
]
