"""The coefficient space: what coefficients are (`space`), and the geometry of their shares (`polytope`)."""

from dem_opt.simplex.polytope import FamilyLimits, Polytope, project
from dem_opt.simplex.space import TOLERANCE, UNIT, Coefficients, Family, Space, compositions, plane

__all__ = [
    "TOLERANCE",
    "UNIT",
    "Coefficients",
    "Family",
    "FamilyLimits",
    "Polytope",
    "Space",
    "compositions",
    "plane",
    "project",
]
