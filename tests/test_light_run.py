"""A study runs in one process without Ray, MLflow and the Trainer of transformers being imported."""

import os
import subprocess
import sys
from pathlib import Path

import worlds

PROGRAM = """
import sys
from dem_opt import Study
from dem_opt.compute import InProcessCompute
from dem_opt.tracking import NullTracker

study = Study.load(sys.argv[1], tracker=NullTracker(), compute=InProcessCompute())
study.run()
assert len(study.trials()) == 3
study.score({"code": 1.0})
study.plot.simplex()
study.export(sys.argv[2])
loaded = sorted({"ray", "mlflow", "transformers.trainer", "peft"} & sys.modules.keys())
sys.exit(f"imported: {loaded}" if loaded else 0)
"""


def test_a_run_in_this_process_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    path = worlds.study(tmp_path, search={"algorithm": "random", "trials": 3})
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, str(path), str(tmp_path / "best")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
