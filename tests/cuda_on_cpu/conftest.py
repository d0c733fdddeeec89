"""Fixtures of the emulator's tests: the module, built once, or the reason why it cannot be."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))  # cubin.py and lora_cases.py, whatever pytest's import mode


def pytest_configure(config):
    config.addinivalue_line("markers", "emulate: runs CUDA C++ kernels on the CPU through tests/cuda_on_cpu")


@pytest.fixture(scope="session")
def rig():
    """tests/cuda_on_cpu/rig.py's Rig; skipped with the reason where the CUDA headers or a compiler are missing."""
    import rig as emulation

    why = emulation.missing()
    if why:
        pytest.skip(why)
    return emulation.emulator()
