"""What pytest needs before the first test: the environment of torch, the toy data set, no GPU tests without a GPU."""

import os

# Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a shared CPU several times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the matrices of the tests are too small to share

import pytest

from process import REPO
from toy import make_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Settings (KEY=VALUE) of a run of a few seconds on data of its own; add OUT_DIR=... and what the test changes."""
    return make_toy(tmp_path_factory.mktemp("toy"))


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if "gpu" in item.path.relative_to(REPO).parts[:-1]]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
