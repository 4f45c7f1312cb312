"""Laws of the packages that import-linter cannot state: what loads without heavy libraries, what the wheel holds."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dem_opt"
MOST_ROOT_MODULES = 12
HEAVY = ("torch", "transformers", "datasets", "ray", "mlflow", "optuna", "sqlalchemy")

ROOT_MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "study"))
LIGHT = [*(f"dem_opt.{name}" for name in ROOT_MODULES), "dem_opt.config", "dem_opt.types", "dem_opt.cli.main"]
"""Modules that load at once, so that a study file is checked and help is shown without waiting."""


def loaded(program: str, libraries: tuple[str, ...]) -> list[str]:
    """Which of the libraries a fresh interpreter has loaded after a program."""
    code = f"import sys\n{program}\nprint(*[name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("module", LIGHT)
def test_configuration_and_help_load_without_heavy_libraries(module):
    assert loaded(f"import {module}", HEAVY) == []


def test_the_sampler_loads_without_torch():
    assert (
        loaded("from dem_opt.search.samplers import SimplexSampler", ("torch", "transformers", "ray", "mlflow")) == []
    )


def test_the_device_benchmark_needs_few_packages():
    """A bare machine with a GPU lacks these; transformers imports scipy where there is one, this package does not."""
    program = f"""
import runpy
from transformers import LlamaForCausalLM
for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
    del sys.modules[name]
runpy.run_path({str(ROOT / "benchmarks/gpu.py")!r})
"""
    assert loaded(program, ("sqlalchemy", "datasets", "ray", "optuna", "mlflow", "scipy")) == []


def test_the_wheel_has_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in PACKAGE.rglob("*.py")} | {PACKAGE / "dashboards"}
    assert sorted(listed) == sorted(str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders)


def test_the_top_level_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_ROOT_MODULES


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_has_a_docstring_and_absolute_imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
