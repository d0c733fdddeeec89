"""The only build entry of the wheel.

Three libraries, each built where its sources and its compiler are there:

========================  ==================  ========================================================================
``lowmem/_C``             csrc/cpu/*.cpp      operators of the CPU, on torch's stable ABI; a C++17 compiler
``lowmem/_C_cuda``        csrc/cuda/*.cu      operators of CUDA devices, on torch's stable ABI; nvcc, also beside a
                                              torch without CUDA (the library then loads where torch has it)
``lowmem/_host``          csrc/host/*.cpp     torch-free helpers on the host, pybind11; a C++17 compiler
========================  ==================  ========================================================================

The first two depend on no Python version and on no torch above 2.11, so one wheel (cp310-abi3) serves them all. The
third is bound to the Python that built it, and its file name says so: another Python does not see it and runs the twin
in Python (lowmem/sched). Without a compiler the wheel is pure Python: every operator then runs as plain torch or
Triton. ENV.md lists the environment flags read here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # nothing newer than torch 2.11 may be used
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-ffp-contract=off"]  # what is to be fused is written so: number formats have the same bits everywhere
CXX_FLAGS += ["-Wno-psabi"]  # vectors wider than the baseline's registers stay inside one file
CXX_FLAGS += [f"-ffile-prefix-map={ROOT}=."]  # registrations name their file: not by the builder's folder
DEFAULT_ARCHS = "8.0+PTX;9.0a;10.0a"  # the PTX of 8.0 serves the architectures without a binary of their own


def note(text: str) -> None:
    """One line on stderr: what is left out of the build, and why."""
    print(f"lowmem: {text}", file=sys.stderr)


def sources(pattern: str) -> list[str]:
    """Source files as setuptools wants them: relative to the project, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def has_compiler() -> bool:
    """Whether the C++ compiler that setuptools would call exists."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return shutil.which(shlex.split(command)[0]) is not None


def find_cuda() -> tuple[Path | None, tuple[int, int], str]:
    """``(toolkit, release, why not)``: the CUDA toolkit to build with, or None and the reason."""
    force = os.environ.get("FORCE_CUDA", "")
    if force == "0":
        return None, (0, 0), "FORCE_CUDA=0"
    on_path = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places += [str(Path(on_path).resolve().parent.parent) if on_path else None, "/usr/local/cuda"]
    # an nvcc on the PATH may be a wrapper outside its toolkit: the headers must lie beside it
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    homes = [Path(place) for place in places if place and all((Path(place) / file).exists() for file in needed)]
    home = homes[0] if homes else None
    why_not = "" if home else "no CUDA toolkit in CUDA_HOME, nor around the nvcc of the PATH, nor in /usr/local/cuda"
    release = (0, 0)
    if home:
        text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        match = re.search(r"release (\d+)\.(\d+)", text)
        release = (int(match[1]), int(match[2])) if match else (0, 0)
        if release < (12, 0):
            home, why_not = None, f"nvcc is release {release[0]}.{release[1]}, and 12.0 is the oldest that is served"
    if home is None and force not in ("", "0"):
        raise SystemExit(f"lowmem: FORCE_CUDA={force} was asked for and cannot be served: {why_not}")
    return home, release, why_not


def cpu_extension(cpp_extension):
    """``lowmem/_C``."""
    return cpp_extension.CppExtension(
        "lowmem._C",
        ["csrc/module.cpp", *sources("csrc/cpu/*.cpp")],
        include_dirs=[str(ROOT / "csrc")],
        depends=sources("csrc/c*/*.h"),
        extra_compile_args={"cxx": CXX_FLAGS + STABLE_ABI},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )


def cuda_extension(cpp_extension, home: Path, release: tuple[int, int]):
    """``lowmem/_C_cuda``: torch's C++ flags, our own toolkit, since a torch without CUDA knows none."""
    import torch

    # cpp_extension compares torch's CUDA release with nvcc's, and asks it whether nvcc writes dependency files. Nothing
    # of torch's CUDA libraries is linked here, so the release that counts is nvcc's own.
    torch.version.cuda = f"{release[0]}.{release[1]}"
    cpp_extension.CUDA_HOME = str(home)
    archs = DEFAULT_ARCHS if release >= (12, 8) else DEFAULT_ARCHS.replace(";10.0a", "")  # 10.0a came with nvcc 12.8
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", archs)
    threads = os.environ.get("NVCC_THREADS")
    nvcc = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all"]
    nvcc += [f"-Xcompiler=-ffile-prefix-map={ROOT}=."]
    # cpp_extension switches CUDA's own arithmetic of 16-bit floats off, in favour of torch's, which is not used here
    nvcc += [f"-U__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
    nvcc += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    return cpp_extension.CppExtension(
        "lowmem._C_cuda",
        ["csrc/module.cpp", *sources("csrc/cuda/*.cu")],
        include_dirs=[str(ROOT / "csrc"), str(home / "include")],
        depends=sources("csrc/c*/*.h") + sources("csrc/cuda/*.cuh"),
        library_dirs=[str(home / "lib64"), str(home / "lib")],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={
            "cxx": CXX_FLAGS + STABLE_ABI + ["-DUSE_CUDA"],
            "nvcc": nvcc + STABLE_ABI + ["-DUSE_CUDA"] + ([f"--threads={threads}"] if threads else []),
        },
        # a linker that drops libraries nothing refers to would drop libtorch, and the library would not load
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,-s", "-Wl,--exclude-libs,libcudart_static.a"],
        py_limited_api=True,
    )


def host_extension():
    """``lowmem/_host``: no torch in it."""
    import pybind11
    from setuptools import Extension

    return Extension(
        "lowmem._host",
        sources("csrc/host/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=sources("csrc/c*/*.h") + sources("csrc/host/*.h"),
        extra_compile_args={"cxx": CXX_FLAGS},
        language="c++",
        py_limited_api=False,
    )


def extensions() -> list:
    """What can be built here; every library that cannot be is named, with the reason."""
    if os.environ.get("LOWMEM_SKIP_BUILD", "0") not in ("", "0"):
        note("LOWMEM_SKIP_BUILD is set: pure Python, operators run as plain torch or Triton")
        return []
    if not has_compiler():
        note("no C++ compiler (CXX) was found: pure Python, operators run as plain torch or Triton")
        return []
    from torch.utils import cpp_extension

    found = []
    if sources("csrc/cpu/*.cpp"):
        found.append(cpu_extension(cpp_extension))
    if sources("csrc/cuda/*.cu"):
        home, release, why_not = find_cuda()
        if home:
            found.append(cuda_extension(cpp_extension, home, release))
        else:
            note(f"lowmem/_C_cuda is left out: {why_not}")
    if sources("csrc/host/*.cpp"):
        found.append(host_extension())
    return found


def build_command():
    """torch's build_ext, with objects that outlive pip's temporary folders, one folder per library."""
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        def build_extension(self, ext) -> None:
            # one folder each: ninja keeps one manifest per folder, and both operator libraries compile csrc/module.cpp
            folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}" / ext.name
            folder.mkdir(parents=True, exist_ok=True)
            self.build_temp = str(folder)
            os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
            super().build_extension(ext)

    return Build


found = extensions()
if found:
    setup(
        ext_modules=found,
        cmdclass={"build_ext": build_command()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup()
