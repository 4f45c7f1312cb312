"""Versions of the libraries that a study's scores depend on; none of them is imported."""

from importlib.metadata import version

LIBRARIES = ("torch", "transformers", "optuna", "mlflow", "ray", "dem-opt")
"""Packages whose versions a study records."""


def libraries() -> dict[str, str]:
    """Return the installed versions of `LIBRARIES` by name."""
    return {library: version(library) for library in LIBRARIES}
