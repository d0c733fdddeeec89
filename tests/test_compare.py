"""bench/compare.py: what counts as slower, and what is noise."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


def module(name):
    if name not in sys.modules:  # dataclasses look their module up
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


compare = module("compare")
COLUMNS = module("common").COLUMNS


def row(op="gemm", ms=1.0, spread=0.0, device="a", **more):
    times = {"ms_p20": ms * (1 - spread), "ms_p50": ms, "ms_p80": ms * (1 + spread)}
    return {"op": op, "shape": "M1", "dtype": "float32", "backend": "lowmem", **times, "device": device, **more}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def run(tmp_path, *more):
    return compare.main([str(tmp_path / "a"), str(tmp_path / "b"), *more])


@pytest.mark.parametrize(
    "before, after, status, word",
    [
        ({"vs_peer": 2.0}, {"vs_peer": 1.8}, 1, "slower"),
        ({"vs_peer": 2.0}, {"vs_peer": 1.95}, 0, ""),  # below the limit
        ({"vs_peer": 2.0, "spread": 0.1}, {"vs_peer": 1.7}, 0, ""),  # 0.85: not below 1 / (1 + 2 * 10 % of noise)
        ({"vs_peer": 2.0, "spread": 0.1}, {"vs_peer": 1.6}, 1, "slower"),
        ({"vs_peer": 1.0}, {"vs_peer": 1.2}, 0, "faster"),
        # the machine is twice as slow, the ratio to the peer is not
        ({"ms": 1.0, "vs_peer": 2.0}, {"ms": 2.0, "vs_peer": 2.0}, 0, ""),
        ({"ms": 1.0}, {"ms": 1.2}, 1, "slower"),  # nothing but the time, one device
        ({"vs_torch": 1.0}, {"vs_torch": 0.5}, 1, "slower"),
    ],
)
def test_verdicts(tmp_path, capsys, before, after, status, word):
    write(tmp_path / "a" / "x.csv", row(**before))
    write(tmp_path / "b" / "x.csv", row(**after))
    assert run(tmp_path) == status
    out = capsys.readouterr().out
    assert (f"%  {word}" in out) if word else ("1 within the noise" in out and "%" not in out)


def test_repeated_runs_give_the_noise(tmp_path, capsys):
    for i, ratio in enumerate((1.0, 1.3, 0.9)):
        write(tmp_path / "a" / f"run{i}.csv", row(vs_peer=ratio))
        write(tmp_path / "b" / str(i) / "run.csv", row(vs_peer=ratio * 0.8))
    assert run(tmp_path, "--all") == 0  # 0.8 is within 2 * hypot(0.2, 0.2)
    assert " 0.800x  56.6%" in capsys.readouterr().out
    for i in range(3):
        write(tmp_path / "b" / str(i) / "run.csv", row(vs_peer=0.4))
    assert run(tmp_path) == 1


def test_rows_that_only_one_has_are_counted(tmp_path, capsys):
    write(tmp_path / "a" / "x.csv", row(), row(op="old"))
    write(tmp_path / "b" / "x.csv", row(), row(op="new"), row(op="newer"))
    assert run(tmp_path) == 0
    assert (
        "1 rows compared: 0 slower, 0 faster, 1 within the noise; 1 only before, 2 only after"
        in capsys.readouterr().out
    )


def test_what_cannot_be_compared(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    write(tmp_path / "b" / "x.csv", row(device="b"))
    assert run(tmp_path) == 2
    assert "expected CSV files" in capsys.readouterr().err
    write(tmp_path / "a" / "x.csv", row(device="a"))
    assert run(tmp_path) == 2, "times of two devices were compared"
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert compare.main([str(other), str(tmp_path / "b")]) == 2
    assert "expected the columns" in capsys.readouterr().err


def test_the_committed_results_equal_themselves(capsys):
    results = BENCH / "results"
    folders = [folder for folder in results.iterdir() if any(folder.glob("*.csv"))]
    assert folders
    for folder in folders:
        assert compare.main([str(folder), str(folder)]) == 0
        assert " 0 slower, 0 faster" in capsys.readouterr().out
