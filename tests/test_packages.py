"""The house: which room may import which, and by which door an outside system comes in."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {
        "errors",
        "simplex",
        "records",
        "observers",
        "gauges",
        "looks",
        "objective",
        "comparison",
        "strict_yaml",
        "config",
        "declared",
        "question",
        "intervals",
        "usage",
        "interrupts",
        "options",
        "addresses",
        "insight",
        "steps",
        "costs",
        "tasks",
    },
    {
        "checkpoints",
        "models",
        "parameters",
        "adapters",
        "pickled",
        "native",
        "quantized",
        "kernel",
        "layers",
        "mapped",
        "arena",
        "documents",
        "tokens",
        "corpus",
        "database",
        "outages",
        "leases",
        "hub",
        "machine",
        "racing",
        "heads",
    },
    {"perplexity", "ledger"},
    {"resident", "samplers", "mixture", "lora", "training", "finetune", "harness"}
    | {"passes", "held", "plan", "sources"},
    {"pool", "search", "tracking", "mlflow_client", "mlflow_runs", "curves", "check", "geometry", "surrogate"},
    {"trials", "runs", "standings", "reweighting", "export", "card", "assets", "tuning"},
    {"driver", "fidelity", "provenance", "generations", "mixing", "downstream"},
    {"study"},
    {"answers", "terminal", "showing", "versus", "cli"},
]
"""Rooms from the ground up.  A room imports from lower floors, and from its own floor where ALLOWED says so."""

ALLOWED = {
    ("simplex", "errors"),
    ("records", "errors"),
    ("looks", "records"),
    ("records", "simplex"),
    ("observers", "records"),
    ("records", "insight"),
    ("insight", "simplex"),
    ("tracking", "mlflow_runs"),
    ("comparison", "records"),
    ("usage", "records"),
    ("objective", "records"),
    ("intervals", "objective"),
    ("steps", "errors"),
    ("tasks", "errors"),
    ("config", "errors"),
    ("config", "simplex"),
    ("config", "strict_yaml"),
    ("strict_yaml", "errors"),
    ("declared", "errors"),
    ("options", "errors"),
    ("question", "errors"),
    ("question", "records"),
    ("question", "simplex"),
    ("intervals", "records"),
    ("models", "checkpoints"),
    ("models", "layers"),
    ("pickled", "checkpoints"),
    ("hub", "pickled"),
    ("adapters", "checkpoints"),
    ("adapters", "models"),
    ("adapters", "parameters"),
    ("parameters", "checkpoints"),
    ("parameters", "models"),
    ("arena", "parameters"),
    ("native", "checkpoints"),
    ("kernel", "native"),
    ("kernel", "quantized"),
    ("arena", "quantized"),
    ("arena", "checkpoints"),
    ("arena", "kernel"),
    ("arena", "mapped"),
    ("arena", "layers"),
    ("arena", "models"),
    ("arena", "adapters"),
    ("tokens", "documents"),
    ("corpus", "documents"),
    ("corpus", "tokens"),
    ("plan", "held"),
    ("finetune", "lora"),
    ("finetune", "mixture"),
    ("finetune", "training"),
    ("curves", "mlflow_client"),
    ("mlflow_runs", "mlflow_client"),
    ("plan", "passes"),
    ("sources", "plan"),
    ("standings", "trials"),
    ("reweighting", "standings"),
    ("outages", "database"),
    ("leases", "database"),
    ("leases", "outages"),
    ("fidelity", "driver"),
    ("provenance", "driver"),
    ("mixing", "driver"),
    ("reweighting", "trials"),
    ("versus", "terminal"),
    ("cli", "versus"),
    ("cli", "answers"),
    ("cli", "showing"),
    ("showing", "answers"),
    ("showing", "terminal"),
    ("cli", "terminal"),
}

TENSORS = {"checkpoints", "models", "adapters", "arena", "perplexity", "resident", "finetune", "assets", "export"}
TENSORS |= {
    "pickled",
    "pool",
    "machine",
    "passes",
    "plan",
    "heads",
    "kernel",
    "quantized",
    "parameters",
    "layers",
    "mapped",
}
TENSORS |= {"geometry", "training", "lora", "harness"}
"""Rooms that work with torch."""

DOORS = {
    "ray": {"pool"},
    "optuna": {"search", "samplers"},
    "mlflow": {"mlflow_client", "mlflow_runs"},
    "sqlalchemy": {"database", "leases", "outages", "ledger"},
    "scipy": {"samplers", "racing"},
    "cmaes": {"samplers"},
    "rich": {"terminal"},
    "yaml": {"strict_yaml", "card"},
    "pydantic": {"config"},
    "dashboards": {"showing", "cli", "versus"},
    "datasets": {"documents"},
    "pyarrow": {"documents"},
    "jinja2": {"tokens"},
    "huggingface_hub": {"hub", "models"},
    "lm_eval": {"harness"},
    "peft": {"lora"},
    "torch": TENSORS,
    "transformers": {"models", "arena", "layers", "tokens", "corpus", "heads"}
    | {"perplexity", "finetune", "assets", "export", "training"},
}
"""Who may import what, at the top of a module or inside its functions."""

LIGHT = [
    "errors",
    "simplex",
    "records",
    "observers",
    "looks",
    "objective",
    "comparison",
    "answers",
    "strict_yaml",
    "config",
    "declared",
    "question",
    "intervals",
    "usage",
    "interrupts",
    "options",
    "addresses",
    "insight",
    "steps",
    "costs",
    "tasks",
    "versus",
    "cli",
]
"""What must load without torch, so that a study file is checked at once."""


def modules() -> dict[str, list[Path]]:
    """Files of each room; a folder is one room."""
    rooms: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "dem_opt").rglob("*.py")):
        relative = path.relative_to(ROOT / "dem_opt")
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            rooms.setdefault(relative.parts[0].removesuffix(".py"), []).append(path)
    return rooms


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


ROOMS = modules()
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(room: str) -> set[str]:
    names = {name.split(".")[1] for path in ROOMS[room] for name in imports(path) if name.startswith("dem_opt.")}
    return names - {room, "__version__"}


def test_the_wheel_has_every_folder_of_modules():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for top in ("dem_opt", "dashboards") for path in (ROOT / top).rglob("*.py")}
    assert sorted(listed) == sorted(str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders)


def test_every_room_has_a_floor():
    assert set(ROOMS) == set(FLOOR)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_run_one_way(room):
    for other in rooms_imported(room):
        assert FLOOR[other] < FLOOR[room] or (room, other) in ALLOWED, f"{room} may not import {other}"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_outside_systems_enter_by_their_door(room):
    for path in ROOMS[room]:
        for outside in {name.partition(".")[0] for name in imports(path)} & DOORS.keys():
            assert room in DOORS[outside], f"{room} may not import {outside}"


def test_dashboards_know_records_and_nothing_above():
    for path in (ROOT / "dashboards").glob("*.py"):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("dem_opt.")}
        allowed = {"errors", "simplex", "records", "observers", "comparison", "usage", "insight", "addresses", "costs"}
        servers = {"mlflow_client"} if path.name == "launcher.py" else set()
        assert rooms <= allowed | servers, path.name
        outside = {name.partition(".")[0] for name in imports(path)}
        assert path.name == "publish.py" or not outside & {"optuna", "optuna_dashboard"}, path.name


@pytest.mark.parametrize("path", sorted((ROOT / "dem_opt").rglob("*.py")), ids=lambda path: path.stem)
def test_every_module_opens_with_a_sentence_and_fits_a_sitting(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "says what it is"
    assert len(text.splitlines()) <= 400, "a room of more than 400 lines becomes a folder"


@pytest.mark.parametrize("room", LIGHT)
def test_the_ground_floor_and_help_load_without_torch(room):
    heavy = "torch transformers datasets ray mlflow optuna sqlalchemy"
    code = f"import sys, dem_opt.{room}; print([name for name in '{heavy}'.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_device_benchmark_needs_few_packages():
    """What a bare machine with a GPU has: transformers imports scipy where there is one, this package does not."""
    heavy = "pydantic sqlalchemy datasets ray optuna mlflow scipy"
    program = f"""
import runpy, sys
from transformers import LlamaForCausalLM
for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
    del sys.modules[name]
runpy.run_path({str(ROOT / "benchmarks/gpu.py")!r})
print([name for name in {heavy!r}.split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
