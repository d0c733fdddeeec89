"""bench/gpu_run.py with the CPU standing in for a GPU; its time box, and parts that hang, crash or lose the device."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import smoke

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_run.py"


@pytest.fixture
def gpu_run(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts the repository on it
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_whole_run_on_the_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--minutes", "4", "--out", str(tmp_path), "--no-build"]
    command += ["--only", "load,smoke,tests,sanitizer,ceilings", "--tests", "tests/test_philox.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = lines(tmp_path)
    assert not [r for r in rows if r["status"] == "failed"]
    # every operator was loaded, ran, and was compared
    for part in ("load", "smoke"):
        for operator in ("shrink", "expand", "dy", "masked_expand_", "dx", "da"):
            assert [r for r in rows if r["part"] == part and f"lora_{operator} " in r["name"]], (
                part,
                operator,
            )
    assert [r for r in rows if "lora_linear " in r["name"]]
    families = {r["name"].split(":")[0] for r in rows if r["part"] == "smoke"}
    assert families == set(smoke.FAMILIES) and len(families) >= 5
    counts = next(r for r in rows if r["name"] == "counts")
    assert counts["passed"] > 20 and counts["failed"] == 0
    assert {r["name"].split()[0] for r in rows if r["part"] == "ceilings"} == {"copy", "gemm"}
    text = (tmp_path / "summary.txt").read_text()
    assert text in done.stdout and "smoke" in text and "FAILED" not in text
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["log.txt", "results.jsonl", "summary.txt"]
    what = "lora: lora_dx bf16+fp32 M130 K264 N136 r16 p0.1 contiguous bits ran"
    assert what in (tmp_path / "log.txt").read_text()  # what the sanitizer would watch


def test_without_a_gpu_it_says_so_and_stops(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(SCRIPT), "--minutes", "1", "--out", str(tmp_path), "--no-build"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "sees no CUDA device" in done.stdout
    assert {r["part"] for r in lines(tmp_path)} == {"load"}


def fake(gpu_run, monkeypatch, tmp_path, body):
    """Replace the parts' program: ``body`` sees part, skip and sink."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import argparse, importlib.util, os, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('gpu_run', {str(SCRIPT)!r})\n"
        "g = importlib.util.module_from_spec(spec); spec.loader.exec_module(g)\n"
        "args = g.parse(); part, skip, sink = args.part, args.skip, g.Sink(args.out, args.part)\n" + body
    )
    monkeypatch.setattr(gpu_run, "__file__", str(script))
    out = tmp_path / "out"

    def run(minutes, only):
        start = time.time()
        rc = gpu_run.main(["--minutes", str(minutes), "--out", str(out), "--only", only, "--device", "cpu"])
        return rc, lines(out), (out / "summary.txt").read_text(), time.time() - start

    return run


def test_a_part_that_hangs_is_ended_and_what_it_started_with_it(gpu_run, monkeypatch, tmp_path):
    body = """
if part == 'smoke':
    import subprocess
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    sink('before the hang', 'ok', pid=child.pid)
    time.sleep(600)
sink('ran', 'ok')
"""
    run = fake(gpu_run, monkeypatch, tmp_path, body)
    rc, rows, text, seconds = run(0.15, "smoke,ceilings")
    assert rc == 1 and seconds < 20
    assert [r["name"] for r in rows] == ["before the hang", "ran"], (
        "the result before the hang is kept, the next part ran"
    )
    assert "timeout" in text
    for _ in range(50):
        try:
            os.kill(rows[0]["pid"], 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{rows[0]['pid']}/stat").read_text().split()[2] == "Z":
            return  # ended; nobody has collected it yet
        time.sleep(0.1)
    pytest.fail("what the part had started is still running")


def test_a_part_that_crashes_does_not_end_the_run(gpu_run, monkeypatch, tmp_path):
    body = """
if part == 'smoke':
    sink('first', 'ok'); os.kill(os.getpid(), 11)
if part == 'tests':
    sink('one', 'failed', error='RuntimeError: wrong by 3'); sys.exit(1)
sink('ran', 'ok')
"""
    rc, rows, text, _ = fake(gpu_run, monkeypatch, tmp_path, body)(1, "smoke,tests,ceilings")
    assert rc == 1
    assert [r["name"] for r in rows] == ["first", "one", "ran"]
    assert "failed (exit -11)" in text and "FAILED tests: one: RuntimeError: wrong by 3" in text


def test_a_lost_device_costs_one_case_only(gpu_run, monkeypatch, tmp_path):
    body = """
for name in ('a', 'b', 'c', 'd'):
    if name in skip: continue
    if name in ('b', 'c'):
        sink(name, 'failed', error='CUDA error: an illegal memory access'); sys.exit(g.LOST)
    sink(name, 'ok')
"""
    rc, rows, text, _ = fake(gpu_run, monkeypatch, tmp_path, body)(1, "smoke")
    assert rc == 1
    assert [(r["name"], r["status"]) for r in rows] == [("a", "ok"), ("b", "failed"), ("c", "failed"), ("d", "ok")]


def test_every_piece_of_a_benchmark_is_there(gpu_run):
    for script, *options in (*gpu_run.gpu_parts.BENCHES, *gpu_run.gpu_parts.QUICK):
        text = (SCRIPT.parent / script).read_text()
        for option in ("--device", "--csv", "--quick", *(o for o in options if o.startswith("--"))):
            assert f'"{option}"' in text, (script, option)


def test_failed_numerics_are_a_result(gpu_run, monkeypatch, tmp_path):
    # one operator of the smoke part is wrong: its line says failed, the others are unharmed
    import lora_cases
    import torch
    from smoke import Smoke

    real = lora_cases.check_case

    def wrong(name, case, **kwargs):
        implementation = None
        if name == "lora_da":

            def implementation(*args):
                return torch.ops.lowmem.lora_da(*args) * 1.1

        return real(name, case, implementation=implementation, **kwargs)

    cases = [Smoke(name, functools.partial(wrong, name, lora_cases.Case())) for name in lora_cases.OPERATORS]
    monkeypatch.setattr(smoke, "smokes", lambda device: cases)
    args = gpu_run.parse(["--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu_run.gpu_parts.part_smoke(gpu_run.Sink(tmp_path, "smoke"), args)
    assert end.value.code == 1
    failed = [r for r in lines(tmp_path) if r["status"] == "failed"]
    assert len(failed) == 1 and failed[0]["name"] == "lora_da" and "exceeds the bound" in failed[0]["error"]


def test_bad_arguments(gpu_run, tmp_path, capsys):
    for argv, message in ((["--only", "smoke,nothing"], "nothing"), (["--minutes", "0"], "not positive")):
        with pytest.raises(SystemExit):
            gpu_run.parse(argv)
        assert message in capsys.readouterr().err


def test_a_line_cut_short_is_left_out_and_lost_devices_are_told(gpu_run, tmp_path):
    gpu_run.Sink(tmp_path, "smoke")("x", "ok", value=1)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"part": "smoke", "na')
    assert [r["name"] for r in gpu_run.results(tmp_path)] == ["x"]
    assert gpu_run.gpu_parts.lost_device(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not gpu_run.gpu_parts.lost_device(AssertionError("error 3 exceeds the bound 2"))


def test_the_benchmark_joins_its_pieces_and_survives_one_that_fails(gpu_run, monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_lora.py").write_text(
        "import argparse, pathlib, sys\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('--device', '--only', '--dtypes', '--csv'): parser.add_argument(name)\n"
        "args = parser.parse_args()\n"
        "if args.only == 'kernel': sys.exit('no kernels today')\n"
        "path = pathlib.Path(args.csv)\n"
        "path.write_text(f'op,dtype\\n{args.only},{args.dtypes}\\n')\n"
        "path.with_suffix('.png').write_bytes(b'picture')\n"
        "print('speed-up over PEFT   1.31   >=1.30  met')\n"
        "print('1 of 1 met')\n"
    )
    monkeypatch.setattr(gpu_run.gpu_parts, "ROOT", tmp_path)
    ours = [piece for piece in gpu_run.gpu_parts.BENCHES if piece[0] == "bench_lora.py"]
    monkeypatch.setattr(gpu_run.gpu_parts, "BENCHES", ours)
    out = tmp_path / "out"
    out.mkdir()
    args = gpu_run.parse(["--device", "cuda", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        gpu_run.gpu_parts.part_bench(gpu_run.Sink(out, "bench"), args)
    assert end.value.code == 1
    assert (out / "bench.csv").read_text() == "op,dtype\nlayer,bf16\noverhead,bf16\nlayer,fp32\n"
    rows = {r["name"]: r for r in lines(out)}
    assert rows["lora kernel bf16"]["status"] == "failed" and "no kernels today" in rows["lora kernel bf16"]["error"]
    assert rows["lora layer bf16"]["targets"] == ["speed-up over PEFT   1.31   >=1.30  met"]
    assert "speed-up over PEFT" in gpu_run.summary(out, {"bench": ("failed", 1.0)})
    files = {p.name for p in out.iterdir()}
    pictures = {f"bench-lora-{piece}.png" for piece in ("layer-bf16", "overhead-bf16", "layer-fp32")}
    assert files == {"results.jsonl", "summary.txt", "bench.csv", *pictures}
