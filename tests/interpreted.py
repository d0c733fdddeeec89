"""Where tests of Triton kernels run: in the interpreter (a process of its own, TRITON_INTERPRET=1), or on a GPU.

A test module marks its tests with ``everywhere`` and uses the fixture ``kernels`` (conftest.py).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
# the device under test by its mark: `-m interpret` runs on CPU tensors, `-m gpu` compiled
WHERE = [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(INTERPRETING, reason="the interpreter's bf16 tl.dot is wrong")
    ),
]


def unusable() -> str:
    """Why the kernels cannot run; '' where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import numpy
    import triton

    def version(module):
        return tuple(int(part) for part in module.__version__.split(".")[:2])

    if INTERPRETING and version(triton) < (3, 7) and version(numpy) >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__} (needs < 2.4)"
        )
    return ""


def everywhere(test):
    """Run the test in each place; its fixture ``where`` is the device."""
    return pytest.mark.parametrize("where", WHERE, indirect=True)(test)
