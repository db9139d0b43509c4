"""What pytest needs before the first test: the environment of torch, a guard that leaves nothing behind, the toy data
set, the order of the files, and no GPU tests without a GPU.
"""

import getpass
import os
import tempfile

# Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a shared CPU several times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the matrices of the tests are too small to share
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")

import guard
import hypothesis
import pytest
from process import REPO
from toy import make_toy

hypothesis.settings.register_profile("patient", deadline=None)  # an example may wait for what else runs
hypothesis.settings.load_profile("patient")

# Long files with few tests. Left to the end, one of them would run alone while the other process has nothing to do.
FIRST = ("test_bench.py", "test_liveness.py", "test_signals.py", "test_runtime.py", "test_model.py", "test_submit.py",
         "test_train.py", "test_prepare.py", "test_records.py", "test_optimizer.py")

CACHES = (".pytest_cache", ".hypothesis", ".ruff_cache", "__pycache__")  # that tools keep in the repository


def pytest_configure(config):
    config.guard = guard.watch()
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which would go by the number of tests
        config.option.loadscopereorder = False


@pytest.fixture(autouse=True, scope="session")
def temporary_files(tmp_path_factory):
    """What asks for a temporary file gets one in pytest's folder, which pytest keeps and removes."""
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def clean_repository():
    """No test leaves a file in the repository, where the next commit would take it along."""
    before = set(REPO.iterdir())
    yield
    left = {path.name for path in set(REPO.iterdir()) - before} - {*CACHES, "logs"}
    assert not left, f"a test wrote to the working directory, not to tmp_path: {sorted(left)}"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Settings (KEY=VALUE) of a run of a few seconds on data of its own; add OUT_DIR=... and what the test changes."""
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def three_seeds(toy, tmp_path_factory):
    """Folders of three finished toy runs of one configuration; a test that changes one takes a copy."""
    from seeds import make_seeds  # with torch, which takes seconds

    return make_seeds(toy, tmp_path_factory.mktemp("seeds"))


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))
    gpu = [item for item in items if "gpu" in item.path.relative_to(REPO).parts[:-1]]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
