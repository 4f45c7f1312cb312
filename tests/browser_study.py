"""A program: `dem-opt` with workers in its own process, which take their time where PAUSE says so."""

import os
import sys
import time
from functools import partial

from dem_opt.cli.main import main
from dem_opt.compute import InProcessCompute
from dem_opt.evaluation.worker import Worker
from dem_opt.study import Study

if __name__ == "__main__":
    Study.load = partial(Study.load, compute=InProcessCompute())  # type: ignore[method-assign]
    evaluate = Worker.evaluate

    def slowly(worker, request):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return evaluate(worker, request)

    Worker.evaluate = slowly  # type: ignore[method-assign]
    sys.exit(main())
