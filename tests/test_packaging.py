"""What is installed: wheels, editable installs, the tree itself; the libraries' ABI; what happens where parts miss."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import lowmem
from lowmem import _dispatch

ROOT = Path(__file__).resolve().parent.parent
HAS_COMPILER = shutil.which("c++") is not None
# session fixtures below build wheels: one worker builds them once
pytestmark = [pytest.mark.xdist_group("packaging"), pytest.mark.slow]
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on the PATH")


def run(command, cwd=None, check=True, **environment):
    """Run a command with none of the package's flags inherited; returns the finished process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LOWMEM_", "PYTHON", "TRITON_INTERPRET"))}
    done = subprocess.run(command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=900)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def copy_project(target):
    """The project without its history, environments and builds, the link lowmem/triton_kernels as a link."""
    leave = shutil.ignore_patterns(
        ".git",
        ".venv*",
        "build",
        "dist",
        "out",
        "*.egg-info",
        "*.so",
        "__pycache__",
        ".*_cache",
        ".cache",
        ".hypothesis",
    )
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=leave))


def build_wheel(tree, out, **environment):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        out,
        tree,
    ]
    run(pip, **environment)
    (wheel,) = out.glob("lowmem-*.whl")
    return wheel


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("copy") / "lowmem-tree")


@pytest.fixture(scope="session")
def pure_wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("pure"), LOWMEM_SKIP_BUILD="1")


@pytest.fixture(scope="session")
def built_wheel(tmp_path_factory):
    # the CPU's library, from nothing; the CUDA library takes minutes, and the tree's own is looked at below
    tree = copy_project(tmp_path_factory.mktemp("build") / "lowmem-tree")
    return build_wheel(tree, tmp_path_factory.mktemp("built"), FORCE_CUDA="0")


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees this one's packages, but not this one's editable install of the project."""
    venv = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", venv])
    python = venv / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
    packages = Path(torch.__file__).resolve().parent.parent
    Path(site, "packages-of-the-tests.pth").write_text(f"{packages}\n")  # .pth files inside that folder are not read
    return python


def install(python, *what, **environment):
    pip = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--ignore-installed"]
    run([*pip, *what], **environment)


PROBE = """
import importlib.util, json
import torch, lowmem, lowmem.triton_kernels
from lowmem import _dispatch
x, w = torch.randn(5, 8), torch.randn(6, 8)
a, b = torch.randn(2, 8), torch.randn(6, 2)
y = lowmem.ops.lora_linear(x, w, a, b, 2.0)
assert torch.allclose(y, x @ w.T + 2 * x @ a.T @ b.T, atol=1e-4)
assert importlib.util.find_spec("lowmem.triton_kernels.philox") is not None
print(json.dumps({
    "file": lowmem.__file__,
    "kernels": lowmem.triton_kernels.__file__,
    "cpu": _dispatch.CPU.loaded,
    "why": _dispatch.CPU.why_not,
    "bare": importlib.util.find_spec("triton_kernels") is not None,
}))
"""


def probe(python, cwd, **environment):
    return json.loads(run([python, "-c", PROBE], cwd=cwd, **environment).stdout)


# -------------------------------------------------------------------------------------------------------------- wheels


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_pure_wheel(tree, pure_wheel, environment, tmp_path):
    assert pure_wheel.name == f"lowmem-{lowmem.__version__}-py3-none-any.whl"
    inside = names(pure_wheel)
    assert "lowmem/triton_kernels/philox.py" in inside and "lowmem/py.typed" in inside
    assert not [name for name in inside if name.startswith(("triton_kernels/", "tests/", "csrc/", "tools/"))]
    assert not [name for name in inside if name.endswith((".so", ".cpp", ".cu"))]
    sources = {p.relative_to(tree).as_posix() for p in (tree / "lowmem").rglob("*.py")}
    sources |= {f"lowmem/{p.relative_to(tree).as_posix()}" for p in (tree / "triton_kernels").rglob("*.py")}
    assert sources <= set(inside)
    install(environment, pure_wheel)
    found = probe(environment, tmp_path)
    assert found["file"].startswith(str(tmp_path / "venv")) and found["kernels"].startswith(str(tmp_path / "venv"))
    assert not found["cpu"] and "not built" in found["why"] and not found["bare"]


@needs_compiler
def test_built_wheel(built_wheel, environment, tmp_path):
    # one wheel for every Python from 3.10 on, and a tag that says so
    assert re.fullmatch(rf"lowmem-{lowmem.__version__}-cp310-abi3-\w+\.whl", built_wheel.name)
    compiled = {name for name in names(built_wheel) if name.endswith(".so")}
    assert "lowmem/_C.abi3.so" in compiled
    # lowmem/_host (pybind11) is bound to one version: no other Python may see it, so its name holds that version
    host = f"lowmem/_host.{sysconfig.get_config_var('SOABI')}.so"
    assert compiled - {"lowmem/_C.abi3.so"} == ({host} if list((ROOT / "csrc" / "host").glob("*.cpp")) else set())
    assert "lowmem/triton_kernels/philox.py" in names(built_wheel)
    with zipfile.ZipFile(built_wheel) as archive:  # nothing of the folder it was built in
        assert b"lowmem-tree" not in archive.read("lowmem/_C.abi3.so")
    install(environment, built_wheel)
    found = probe(environment, tmp_path, LOWMEM_BACKEND="cpu")
    assert found["file"].startswith(str(tmp_path / "venv")) and found["cpu"]
    # an operator library is also an (empty) module, so that importing it is no error
    run([environment, "-c", "import torch, lowmem._C"], cwd=tmp_path)


def test_a_wheel_asks_for_what_it_needs(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    assert "Requires-Python: >=3.10" in lines and "License-Expression: Apache-2.0" in lines
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    always = {need for need in needs if "extra ==" not in need}
    assert always == {"torch>=2.11", 'triton>=3.6; platform_system == "Linux"', "numpy"}


def test_without_a_compiler_the_wheel_is_pure(tree, tmp_path):
    wheel = build_wheel(tree, tmp_path, CXX="/nonexistent/c++")
    assert wheel.name.endswith("-py3-none-any.whl")
    done = run([sys.executable, "setup.py", "--version"], cwd=tree, CXX="/nonexistent/c++")
    assert "lowmem: no C++ compiler (CXX) was found: pure Python" in done.stderr


def test_forced_cuda_without_a_toolkit_is_an_error(tree, tmp_path):
    other = Path(shutil.copytree(tree, tmp_path / "tree", symlinks=True))
    text = (tree / "setup.py").read_text()
    (other / "setup.py").write_text(text.replace("/usr/local/cuda", "/nonexistent/cuda"))  # the place it looks at last
    (other / "csrc" / "cuda").mkdir(exist_ok=True)
    (other / "csrc" / "cuda" / "some.cu").touch()
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    ask = [sys.executable, "setup.py", "--version"]
    nowhere = {
        "PATH": path,
        "CUDA_HOME": "",
        "CUDA_PATH": "",
        "CXX": sys.executable,
    }  # any program counts as compiler here
    done = run(ask, cwd=other, check=False, FORCE_CUDA="1", **nowhere)
    assert done.returncode != 0 and "FORCE_CUDA=1 was asked for and cannot be served: no CUDA toolkit" in done.stderr
    assert "lowmem/_C_cuda is left out: no CUDA toolkit" in run(ask, cwd=other, **nowhere).stderr
    assert "lowmem/_C_cuda is left out: FORCE_CUDA=0" in run(ask, cwd=other, FORCE_CUDA="0").stderr


def test_source_distribution(tree, tmp_path):
    run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path], cwd=tree, LOWMEM_SKIP_BUILD="1")
    (archive,) = tmp_path.glob("lowmem-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for file in ("setup.py", "csrc/module.cpp", "csrc/common/philox.h", "lowmem/triton_kernels/philox.py", "LICENSE"):
        assert (unpacked / file).is_file(), file
    sources = {p.relative_to(tree) for p in (tree / "csrc").rglob("*.*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}}
    assert not [s for s in sources if not (unpacked / s).is_file()]
    wheel = build_wheel(unpacked, tmp_path, LOWMEM_SKIP_BUILD="1")
    assert "lowmem/triton_kernels/philox.py" in names(wheel)


# ------------------------------------------------------------------------------------- editable, and the tree itself


def test_editable(tree, environment, tmp_path):
    install(environment, "--editable", tree, LOWMEM_SKIP_BUILD="1")
    found = probe(environment, tmp_path)
    assert Path(found["file"]).parent == tree / "lowmem" and not found["bare"]
    assert Path(found["kernels"]).resolve().parent == tree / "triton_kernels"


def test_from_the_root_of_the_repository(environment):
    found = probe(environment, ROOT)
    assert Path(found["file"]).parent == ROOT / "lowmem"
    assert Path(found["kernels"]).resolve().parent == ROOT / "triton_kernels"
    assert found["cpu"] == bool(_dispatch._library_path("_C"))


def test_the_link_is_a_link():
    link = ROOT / "lowmem" / "triton_kernels"
    assert link.is_symlink() and os.readlink(link) == "../triton_kernels"


# ----------------------------------------------------------------------------------------------------------------- ABI


def tool(name):
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_pack = tool("gpu_pack")


def libraries():
    found = sorted((ROOT / "lowmem").glob("_C*so"))
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="no operator library is built here"))]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not on the PATH")
@pytest.mark.parametrize("library", libraries(), ids=lambda p: p and p.name)
def test_only_the_stable_abi_is_used(library):
    assert gpu_pack.private_symbols(library) == []
    needed = run(["readelf", "-d", library]).stdout
    assert "libtorch_python" not in needed and "libcudart" not in needed and "libtorch" in needed
    # what a library shows to others is its module's entry and nothing of the kernels
    shown = run(["nm", "-D", "-C", "--defined-only", library]).stdout
    assert "PyInit_" in shown and not re.search(r"\blm::", shown)


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not on the PATH")
def test_a_private_symbol_would_be_found(tmp_path):
    (tmp_path / "x.cpp").write_text("namespace c10 { void warn(int); }\nint f() { c10::warn(1); return 0; }\n")
    run(["c++", "-shared", "-fPIC", tmp_path / "x.cpp", "-o", tmp_path / "x.so"])
    assert gpu_pack.private_symbols(tmp_path / "x.so") == ["c10::warn(int)"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not on the PATH")
@pytest.mark.skipif(not _dispatch._library_path("_C_cuda"), reason="lowmem/_C_cuda is not built here")
def test_the_pack_for_a_gpu_machine(tmp_path, capsys, monkeypatch):
    out = tmp_path / "pack"
    assert gpu_pack.main(["--out", str(out), "--no-peers"]) == 0
    found = json.loads((out / "manifest.json").read_text())
    assert found["faults"] == [] and "sm_90" in found["gpus"]
    assert sorted(p.name for p in (out / "lowmem").iterdir()) == ["_C.abi3.so", "_C_cuda.abi3.so"]
    monkeypatch.setattr(gpu_pack, "ARCH", "sm_77")
    monkeypatch.setattr(gpu_pack, "LIMIT_MB", 0)
    monkeypatch.setattr(gpu_pack, "GLIBC", (2, 1))
    assert gpu_pack.main(["--out", str(out), "--no-peers"]) == 1
    said = capsys.readouterr().err
    assert "expected machine code for sm_77, got sm_" in said and "expected at most 0 MB" in said and "glibc" in said


def test_what_the_pack_takes_of_a_peer():
    assert gpu_pack.wanted("bitsandbytes/libbitsandbytes_cuda130.so") and gpu_pack.wanted("torchao/utils.py")
    for left in (
        "bitsandbytes/libbitsandbytes_cuda128.so",
        "torchao/_C_cutlass_90a.abi3.so",
        "test/x.py",
        "a/tests/b.py",
    ):
        assert not gpu_pack.wanted(left), left


@pytest.mark.skipif(not _dispatch._library_path("_C"), reason="lowmem/_C is not built here")
def test_loading_a_library_leaves_the_float_mode_alone():
    # a library linked with -ffast-math would flush torch's subnormals to zero
    run(
        [sys.executable, "-c", "import torch, lowmem; assert float(torch.tensor(1e-40) * 0.5) > 0"],
        LOWMEM_BACKEND="cpu",
    )


# ------------------------------------------------------------------------------------------------------ LOWMEM_BACKEND

STATE = """
import lowmem
from lowmem import _dispatch
print(_dispatch.REQUESTED, int(_dispatch.CPU.loaded), int(_dispatch.CUDA.loaded), int(not _dispatch.TRITON_WHY_NOT))
"""


def backend(name, code=STATE, check=True):
    return run([sys.executable, "-c", code], cwd=ROOT, check=check, LOWMEM_BACKEND=name)


@pytest.mark.parametrize("name", ["", "auto", " AUTO "])
def test_default_backend_takes_what_loads(name):
    requested, cpu, _, _ = backend(name).stdout.split()
    assert requested == "auto" and bool(int(cpu)) == (_dispatch._library_path("_C") is not None)


def test_reference_backend_loads_nothing():
    assert backend("reference").stdout.split() == ["reference", "0", "0", "0"]


@pytest.mark.skipif(not _dispatch._library_path("_C"), reason="lowmem/_C is not built here")
def test_cpu_backend():
    assert backend("cpu").stdout.split() == ["cpu", "1", "0", "0"]


def test_triton_backend():
    pytest.importorskip("triton")
    requested, _, cuda, triton = backend("triton").stdout.split()
    assert (requested, cuda, triton) == ("triton", "0", "1")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_backend_on_a_cpu_build_says_why_not():
    done = backend("cuda", check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("ImportError: lowmem: LOWMEM_BACKEND=cuda was asked for and cannot run: ")
        and "CPU build" in last
    )


def test_unknown_backend_names_the_choices():
    done = backend("nonsense", check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: lowmem: LOWMEM_BACKEND: expected one of auto, reference, cpu, triton, cuda, got 'nonsense'"
    )


NO_TRITON = "import sys; sys.modules['triton'] = None\n"  # what `import triton` meets where it is not installed


def test_imports_without_triton():
    assert backend("auto", NO_TRITON + STATE).stdout.split()[3] == "0"
    run([sys.executable, "-c", NO_TRITON + PROBE], cwd=ROOT)
    done = backend("triton", NO_TRITON + STATE, check=False)
    assert done.returncode != 0 and "triton is not installed" in done.stderr


def test_importing_the_package_does_not_import_triton():
    # importing it costs half a second, and needs a C compiler on some machines
    code = "import sys, torch; had = 'triton' in sys.modules; import lowmem; assert had or 'triton' not in sys.modules"
    run([sys.executable, "-c", code], cwd=ROOT)


# -------------------------------------------------------------------------------------------------------- house rules


def ruff():
    path = Path(sys.executable).parent / "ruff"
    return str(path) if path.exists() else shutil.which("ruff")


@pytest.mark.skipif(not ruff(), reason="ruff is not installed")
@pytest.mark.parametrize(
    "line", ["import triton_kernels", "from triton_kernels import lora", "import triton_kernels.lora as t"]
)
def test_the_bare_import_is_banned(tmp_path, line):
    check = [ruff(), "check", "--no-cache", "--config", ROOT / "pyproject.toml", "--select", "TID251"]
    (tmp_path / "probe.py").write_text(f"{line}\n")
    done = run([*check, tmp_path / "probe.py"], check=False)
    assert done.returncode == 1 and "TID251" in done.stdout and "import lowmem.triton_kernels" in done.stdout
    (tmp_path / "probe.py").write_text("from lowmem.triton_kernels import lora\n")
    run([*check, tmp_path / "probe.py"])


def test_no_file_imports_the_bare_name():
    # ruff's exception for triton_kernels/ itself (its relative imports look the same to it) leaves this to be looked at
    for path in sorted((ROOT / "triton_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [m for m in modules if m.split(".")[0] in ("triton_kernels", "lowmem")], path


def test_pinned_tools_agree():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for repository, tool in (("ruff-pre-commit", "ruff"), ("mirrors-clang-format", "clang-format")):
        assert re.search(rf"{repository}\n\s+rev: v(\S+)", hooks)[1] == pins[tool]
    wanted = re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert not [name for name in wanted if name not in pins]


@needs_compiler
def test_a_new_family_starts_from_the_template(tmp_path):
    tree = copy_project(tmp_path / "tree")
    for folder in ("csrc/cpu", "csrc/cuda"):  # only the new family is compiled
        for file in (tree / folder).glob("*"):
            if file.suffix in {".cpp", ".cu"}:
                file.unlink()
    new = [sys.executable, "tools/new_family.py"]
    run([*new, "toy"], cwd=tree)
    again = run([*new, "toy"], cwd=tree, check=False)
    assert again.returncode == 2 and "expected a name that is free" in again.stderr
    assert run([*new, "No-name"], cwd=tree, check=False).returncode == 2
    run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, TORCH_CUDA_ARCH_LIST="8.0", MAX_JOBS="2"
    )
    # the family is not imported by the package yet: its tests import it themselves
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_toy.py"]
    done = run(pytest_run, cwd=tree, LOWMEM_BACKEND="cpu", OMP_NUM_THREADS="2")
    assert " passed" in done.stdout and " failed" not in done.stdout
    if importlib.util.find_spec("triton"):
        done = run([*pytest_run, "-m", "interpret"], cwd=tree, TRITON_INTERPRET="1", OMP_NUM_THREADS="2")
        assert " passed" in done.stdout
    # a broken kernel is caught: one element off
    source = tree / "csrc" / "cpu" / "toy.cpp"
    broken = source.read_text().replace("k < cols; ++k", "k + 1 < cols; ++k")
    assert broken != source.read_text()
    source.write_text(broken)
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, FORCE_CUDA="0", MAX_JOBS="2")
    done = run(
        [*pytest_run, "-k", "test_every_shape"], cwd=tree, check=False, LOWMEM_BACKEND="cpu", OMP_NUM_THREADS="2"
    )
    assert done.returncode == 1 and "exceeds the bound" in done.stdout
