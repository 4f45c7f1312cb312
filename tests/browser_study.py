"""A program: `dem-opt` with workers in its own process, which take their time where PAUSE says so."""

import os
import sys
import time

from dem_opt import study
from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.evaluation.worker import Worker

if __name__ == "__main__":
    study.RayCompute = lambda settings: InProcessCompute()  # type: ignore[assignment,misc,return-value]
    evaluate = Worker.evaluate

    def slowly(worker, request):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return evaluate(worker, request)

    Worker.evaluate = slowly  # type: ignore[method-assign]
    sys.exit(main())
