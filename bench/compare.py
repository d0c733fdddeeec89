"""Did anything get slower? Two folders of results against each other, with the noise of the runs taken into account.

    python bench/compare.py bench/results/<device> out/gpu            # before, after
    python bench/compare.py out/before out/after --limit 0.03

Every CSV below a folder is read (``bench/common.py``'s columns); several files with the same rows are repeated runs.
Rows are matched by op, shape, dtype and backend. What is compared is a row's speed-up over its peer in the same run
(``vs_peer``, else ``vs_torch``, else ``vs_compile``), because a time alone says more about the machine's other work;
rows without one are compared by ``1 / ms_p50`` where both folders name one device.

    change  = median(after) / median(before)
    noise   = half the range of the repeated runs over their median; of a single run (ms_p80 - ms_p20) / (2 ms_p50)
    margin  = 1 + max(limit, 2 sqrt(noise_before^2 + noise_after^2))

A row is slower where ``change < 1 / margin``, faster where ``change > margin``. Exit status: 1 where a row is slower, 2
where nothing could be compared, 0 otherwise.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

RATIOS = ("vs_peer", "vs_torch", "vs_compile")
Key = tuple[str, str, str, str]
Row = dict[str, str]


@dataclass(frozen=True)
class Change:
    """One row of both folders: ``ratio`` after over before (above 1: faster) of ``what``, and the margin of noise."""

    key: Key
    what: str
    ratio: float
    margin: float

    @property
    def verdict(self) -> str:
        if self.ratio < 1 / self.margin:
            return "slower"
        return "faster" if self.ratio > self.margin else ""


def load(folder: Path) -> dict[Key, list[Row]]:
    """Every row of every CSV below ``folder``, by what it measures. Raises ValueError for a file that is none."""
    found: dict[Key, list[Row]] = {}
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.csv"))
    if not files:
        raise ValueError(f"lowmem.compare: folder: expected CSV files below it, got none in {folder}")
    for file in files:
        with open(file, newline="") as lines:
            reader = csv.DictReader(lines)
            if not {"op", "shape", "dtype", "backend", "ms_p50"} <= set(reader.fieldnames or ()):
                if folder.is_file():
                    raise ValueError(f"lowmem.compare: file: expected the columns of bench/common.py, got {file}")
                continue  # another kind of table beside the benchmarks
            for row in reader:
                found.setdefault((row["op"], row["shape"], row["dtype"], row["backend"]), []).append(row)
    return found


def number(row: Row, column: str) -> float | None:
    """The value of a column; None where it was not measured."""
    try:
        value = float(row.get(column) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def values(rows: list[Row], column: str) -> list[float]:
    """The column in every run that measured it."""
    return [v for row in rows if (v := number(row, column)) is not None]


def noise(rows: list[Row], column: str) -> float:
    """The relative half-width of what repeated runs give, or of the rounds inside the only one."""
    runs = values(rows, column)
    if len(runs) > 1:
        return (max(runs) - min(runs)) / 2 / statistics.median(runs)
    low, mid, high = (number(rows[0], f"ms_p{q}") for q in (20, 50, 80))
    return (high - low) / 2 / mid if low and mid and high else 0.0


def compare(before: dict[Key, list[Row]], after: dict[Key, list[Row]], limit: float) -> list[Change]:
    """Every row that both hold, the largest loss first."""
    changes = []
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        column = next((c for c in RATIOS if values(old, c) and values(new, c)), None)
        if column is None:
            if old[0].get("device") != new[0].get("device") or not (values(old, "ms_p50") and values(new, "ms_p50")):
                continue
            ratio = statistics.median(values(old, "ms_p50")) / statistics.median(values(new, "ms_p50"))
        else:
            ratio = statistics.median(values(new, column)) / statistics.median(values(old, column))
        spread = math.hypot(noise(old, column or "ms_p50"), noise(new, column or "ms_p50"))
        changes.append(Change(key, column or "time", ratio, 1 + max(limit, 2 * spread)))
    return sorted(changes, key=lambda c: (c.ratio, c.key))


def report(changes: list[Change], only_before: int, only_after: int, everything: bool) -> str:
    """The table: what is slower or faster (or every row), and a line that counts."""
    lines = [f"{'op':<26} {'shape':<28} {'dtype':<9} {'backend':<22} {'compared':<10} {'change':>7} {'noise':>7}"]
    for c in changes:
        if c.verdict or everything:
            op, shape, dtype, backend = c.key
            text = f"{op:<26.26} {shape:<28.28} {dtype:<9} {backend:<22.22} {c.what:<10} {c.ratio:>6.3f}x"
            lines.append(f"{text} {c.margin - 1:>6.1%}  {c.verdict}".rstrip())
    count = {v: sum(c.verdict == v for c in changes) for v in ("slower", "faster", "")}
    lines.append(
        f"{len(changes)} rows compared: {count['slower']} slower, {count['faster']} faster, {count['']} within the "
        f"noise; {only_before} only before, {only_after} only after"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("before", type=Path, help="folder (or CSV) of the results to hold on to")
    parser.add_argument("after", type=Path, help="folder (or CSV) of the new ones")
    parser.add_argument("--limit", type=float, default=0.05, help="a change below this share is none (default 0.05)")
    parser.add_argument("--all", action="store_true", help="print the rows within the noise too")
    args = parser.parse_args(argv)
    try:
        before, after = load(args.before), load(args.after)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    changes = compare(before, after, args.limit)
    print(report(changes, len(before.keys() - after.keys()), len(after.keys() - before.keys()), args.all))
    if not changes:
        return 2
    return 1 if any(c.verdict == "slower" for c in changes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
