"""Fixtures of the suite: devices, seeds, poisoned memory, hypothesis. The header says which backend serves what."""

import os
import subprocess
import sys

# cuBLAS repeats its bits only with a workspace that is fixed before the first handle is made
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import interpreted
import pytest
import torch
from hypothesis import HealthCheck, settings

import lowmem
from lowmem import _dispatch
from lowmem.testing import poison_empties

settings.register_profile(
    "lowmem",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=int(os.environ.get("LOWMEM_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("lowmem")

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_report_header():
    lines = [f"lowmem {lowmem.__version__}, torch {torch.__version__}, LOWMEM_BACKEND={_dispatch.REQUESTED}"]
    for library in (_dispatch.CPU, _dispatch.CUDA):
        lines.append(f"lowmem/{library.name}: {'loaded' if library.loaded else library.why_not}")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for name, device, backend, why in _dispatch.table():
        if device in devices:
            lines.append(f"  {name:20s} {device:5s} {backend}{f' ({why})' if why else ''}")
    return lines


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_configure(config):
    # poisoned memory comes with torch's deterministic mode, whose warnings say nothing about a kernel
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation.*:UserWarning")


@pytest.fixture(params=DEVICES)
def device(request):
    """The device under test: the CPU always, a CUDA device (marker gpu) where there is one. The tests are the same."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    # one thread: these tensors are small, and spinning workers slow them down; two_threads is for those that need more
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    yield


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN while the test runs (``pytestmark = pytest.mark.usefixtures("poisoned")``)."""
    with poison_empties():
        yield


@pytest.fixture
def two_threads(_seeded):
    """Two threads, whatever the machine has: kernels split their work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs_under():
    """``runs_under(backend, code)``: run Python ``code`` in a fresh process with ``LOWMEM_BACKEND=backend``."""

    def run(backend, code, **environment):
        env = {**os.environ, "LOWMEM_BACKEND": backend, **environment}
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture
def where(request):
    """The device of a test of Triton kernels (interpreted.py)."""
    return request.param


@pytest.fixture
def kernels(where):
    """Skips with the reason where the kernels cannot run."""
    if where == "cpu" and not interpreted.INTERPRETING:
        pytest.skip("runs in its own process, with TRITON_INTERPRET=1")
    if where == "cuda" and interpreted.INTERPRETING:
        pytest.skip("TRITON_INTERPRET=1 is set: nothing would be compiled")
    why = interpreted.unusable()
    if why:
        pytest.skip(why)
