"""Many workers as Ray actors (in-process for tests); other importable jobs too."""

from dem_opt.compute.in_process import InProcessCompute, InProcessPool
from dem_opt.compute.protocols import Compute, Evaluator, Pool
from dem_opt.compute.ray_compute import SETTINGS, RayCompute
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
]
