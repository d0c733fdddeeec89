"""How the examples show themselves: progress, the table, the picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

MIB = 1 << 20
COLOURS = {"PEFT": "#d1762b", "lowmem": "#2266a8"}


def console() -> Console:
    """Standard output; 110 columns where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


class Bar:
    """A progress bar on a terminal; elsewhere a line at the end, and on the way where that is long."""

    def __init__(self, out: Console, title: str, total: int) -> None:
        self.out, self.title, self.total, self.done = out, title, max(total, 1), 0
        self.lines = 5 if total > 30 else 1
        self.progress: Progress | None = None
        if out.is_terminal:
            columns = (TextColumn("{task.description:<20}"), BarColumn(18), MofNCompleteColumn(), TimeElapsedColumn())
            self.progress = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=out)
            self.task = self.progress.add_task(title, total=self.total, note="")

    def step(self, note: str = "") -> None:
        """One unit is done; ``note`` says how it stands."""
        before, self.done = self.done, self.done + 1
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done, note=note)
        elif before * self.lines // self.total != self.done * self.lines // self.total:
            self.out.print(f"{self.title:<20} {self.done:>4}/{self.total} {note}".rstrip())


@contextmanager
def bar(out: Console, title: str, total: int) -> Iterator[Bar]:
    """A :class:`Bar` that is drawn while the block runs."""
    made = Bar(out, title, total)
    if made.progress is None:
        yield made
    else:
        with made.progress:
            yield made


# --------------------------------------------------------------------------------------------------------------- table


def mib(value: int) -> str:
    return f"{value / MIB:,.1f} MiB" if value < 100 * MIB else f"{value / MIB:,.0f} MiB"


def _rows(results: dict[str, Any]) -> list[tuple[str, str, str, str] | None]:
    one, two = results["runs"]["PEFT"], results["runs"]["lowmem"]

    def row(label: str, key: str, show: Any, ratio: bool = True) -> tuple[str, str, str, str]:
        a, b = one[key], two[key]
        return label, show(a), show(b), f"{b / a:.2f}x" if ratio and a else ""

    device, dtype = results["device"], results["adapter_dtype"]
    other = "fp32" if dtype != "fp32" else results["dtype"]
    peak = f"peak {'CUDA' if device == 'cuda' else 'resident'} memory of a step"
    loss = "{:.4f}".format
    rows: list[tuple[str, str, str, str] | None] = [
        row("held-out loss before", "held_out_before", loss, ratio=False),
        row("held-out loss after", "held_out_after", loss, ratio=False),
        None,
        row("tokens/s (forward, backward, update)", "tokens_per_s", "{:,.0f}".format),
        None,
        row(f"saved for backward, {dtype} adapters", "saved_bytes", mib),
    ]
    if one.get("saved_bytes_other"):
        rows.append(row(f"saved for backward, {other} adapters", "saved_bytes_other", mib))
    rows += [
        row(peak, "peak_bytes", mib),
        None,
        row("frozen parameters, one copy for both", "frozen", mib),
        row("adapter parameters", "trained", mib),
        row("gradients", "gradients", mib),
        row("optimizer state", "optimizer", mib),
    ]
    return rows


def table(results: dict[str, Any]) -> Table:
    """The comparison, a row for each quantity."""
    built = Table(header_style="bold")
    for name, justify in (("", "left"), ("PEFT", "right"), ("lowmem", "right"), ("ratio", "right")):
        built.add_column(name, justify=justify, no_wrap=True)
    for row in _rows(results):
        if row is None:
            built.add_section()
        else:
            built.add_row(*row)
    return built


def show(out: Console, results: dict[str, Any], warm_up: int, rounds: int) -> None:
    """Print the table and how its numbers were come by."""
    dtype = results["adapter_dtype"]
    default = "" if dtype == "fp32" else "; the default of both is fp32 (--adapter-dtype fp32)"
    out.print(f"\n[bold]{results['title']}[/bold]")
    out.print(table(results))
    for line in (
        f"The runs took turns, step by step. tokens/s: from the median step, the first {warm_up} of each run left out.",
        "Saved for backward: what autograd holds after a forward pass, each storage once, parameters left out.",
        f"Peak memory of a forward and backward pass: {results['peak_method']}; median of {rounds}.",
        f"Adapters are {dtype} in both runs{default}. ratio: lowmem / PEFT.",
    ):
        out.print(f"[dim]{line}[/dim]")


def show_quantized(out: Console, results: dict[str, dict[str, Any]], dtype: str) -> None:
    """Print losses and bytes of the quantized bases beside those of the dense one."""
    built = Table(header_style="bold")
    built.add_column("base", no_wrap=True)
    for name in results:
        built.add_column(dtype if name == "dense" else name, justify="right", no_wrap=True)
    for label, key, text in (
        ("held-out loss before", "held_out_before", "{:.4f}".format),
        ("held-out loss after", "held_out_after", "{:.4f}".format),
        ("linear layers' weights", "weight_bytes", mib),
        ("bits a weight", "bits", "{:.3f}".format),
        ("adapter parameters", "trained", mib),
        ("seconds to quantize", "quantize_seconds", "{:.1f}".format),
    ):
        built.add_row(label, *(text(numbers[key]) for numbers in results.values()))
    out.print("\n[bold]The same steps over quantized bases[/bold] (lowmem)")
    out.print(built)


# ------------------------------------------------------------------------------------------------------------- picture


def _smooth(values: list[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]


def picture(results: dict[str, Any], path: Path) -> None:
    """Loss curves of both runs, and bars of the memory that differs and that does not."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = results["runs"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.15, 1), layout="constrained")
    steps = len(runs["PEFT"]["losses"])
    width = max(1, steps // 12)
    for name, style, line in (("PEFT", "-", 4.0), ("lowmem", "--", 1.8)):
        run, colour = runs[name], COLOURS[name]
        left.plot(
            range(1, steps + 1), _smooth(run["losses"], width), style, color=colour, lw=line, label=f"{name}, training"
        )
        ends = [run["held_out_before"], run["held_out_after"]]
        size = 110 if name == "PEFT" else 40
        left.scatter([0, steps], ends, color=colour, s=size, zorder=3, marker="o", label=f"{name}, held out")
    left.set(
        xlabel="step",
        ylabel="loss (nats a token)",
        title="Loss" + (f" (training: mean of {width} steps)" if width > 1 else ""),
    )
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)

    other = "fp32" if results["adapter_dtype"] != "fp32" else results["dtype"]
    kind = "CUDA" if results["device"] == "cuda" else "resident"
    bars = [("saved_bytes", f"saved for backward,\n{results['adapter_dtype']} adapters")]
    if runs["PEFT"].get("saved_bytes_other"):
        bars.append(("saved_bytes_other", f"saved for backward,\n{other} adapters"))
    bars.append(("peak_bytes", f"peak {kind}\nmemory of a step"))
    for i, name in enumerate(("PEFT", "lowmem")):
        heights = [runs[name][key] / MIB for key, _ in bars]
        drawn = right.bar(
            [k + (i - 0.5) * 0.38 for k in range(len(bars))], heights, 0.36, color=COLOURS[name], label=name
        )
        right.bar_label(drawn, fmt=lambda mib: f"{mib:,.0f}" if mib >= 20 else f"{mib:.1f}", padding=2)
    right.set_xticks(range(len(bars)), [label for _, label in bars])
    right.set(ylabel="MiB", title="Memory of a training step")
    right.margins(y=0.12)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results["title"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
