"""Every test runs per device, from one seed, with uninitialised memory filled with NaN."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # many small operators: spinning threads would starve each other

import hypothesis
import pytest
import torch

# Every run tries the same few examples; --hypothesis-profile=search looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=50, deadline=None, database=None)
hypothesis.settings.register_profile("search", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison():
    """torch.empty, and the operators' own memory, is full of NaN (integers: the largest, or -1). ``poison(on)`` says
    how many tensors of operators on the CPU were since the last call."""
    from lt2_ext import _C

    def switch(on):
        torch.use_deterministic_algorithms(on, warn_only=True)
        return _C.poison_memory(on)

    switch(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield switch
    switch(False)


@pytest.fixture
def threads():
    """``threads(n)`` sets the number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def checks():
    """Data-dependent argument checks are on during the test."""
    import lt2_ext

    lt2_ext.set_checks(True)
    yield
    lt2_ext.set_checks(False)
