"""The merge kernel's three backends on this machine's processor."""

import pytest

from dem_opt.merging.compiled import compiled_kernel
from dem_opt.merging.kernel import MergeKernel

KERNELS = {
    "compiled": lambda: MergeKernel(),
    "plain": lambda: MergeKernel(compiled=False),
    "in threads": lambda: MergeKernel(block=100, compiled=False),
}


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "compiled" and compiled_kernel().merge is None:
        pytest.skip(compiled_kernel().description)
    made = KERNELS[request.param]()
    assert made.compiled == (request.param == "compiled")
    return made
