"""When a basis is renewed, how many columns it gets, and every other option of a group of :class:`ProjAdamW`.

A group's options are plain numbers and strings once they are in the optimizer, so that ``torch.load`` reads a
checkpoint with ``weights_only=True``; the dataclasses here are how a user writes them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .._errors import bad

OP = "ProjAdamW"
PROJECTORS = ("rsvd", "power", "svd", "random", "randk")
MOMENTS = ("rotate", "keep", "reset")
RESIDUALS = ("none", "fira", "sign", "apollo")
SIDES = ("auto", "left", "right")
REPARAMS = (None, "weight_norm")


@dataclass(frozen=True)
class OnConverged:
    """Renew a basis once the projected gradient has converged in it: ``|R| < tol * |R at the last renewal|``, and
    after ``max_gap`` steps in any case; not before ``min_gap`` steps. AdaRankGrad (arXiv 2410.17881)."""

    tol: float = 0.5
    max_gap: int = 200
    min_gap: int = 10


@dataclass(frozen=True)
class OnSimilar:
    """Renew a basis every ``gap`` steps, and ``growth`` times more rarely each time that its leading vector has been
    stable: the mean absolute cosine over the last ``window`` renewals is at least ``threshold``. Q-GaLore (arXiv
    2407.08296); each matrix has its own gap. The sign of a singular vector means nothing, hence the absolute value."""

    gap: int = 200
    threshold: float = 0.4
    growth: float = 2.0
    window: int = 5


@dataclass(frozen=True)
class FisherWindow:
    """Natural GaLore's preconditioner (arXiv 2410.16029): ``R <- (lam I + H H^T)^{-1} R`` over the window H of the last
    ``s`` projected gradients, the present one among them. It keeps ``s`` times R beside the moments."""

    s: int = 4
    lam: float = 1.0


RULES: dict[str, type] = {"OnConverged": OnConverged, "OnSimilar": OnSimilar}
STRUCTURE = (
    "rank", "energy", "density", "rank_max", "rank_min", "side", "refresh", "projector", "moments", "residual",
    "precond", "reparam", "state", "basis", "granularity",
)  # fmt: skip
"""Options that decide the shapes or the meaning of the state: a checkpoint must agree with them."""


def whole(argument: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        bad(OP, argument, f"a whole number >= {least}", repr(value))


def number(argument: str, value: Any, expected: str, ok: bool) -> None:
    """Raise unless ``value`` is a finite number for which ``ok`` holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not ok:
        bad(OP, argument, expected, repr(value))


def one_of(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        bad(OP, argument, f"one of {', '.join(map(repr, choices))}", repr(value))


def plain(value: Any) -> Any:
    """``OnConverged``, ``OnSimilar`` or ``FisherWindow`` as a dict that can be saved; anything else as it is."""
    if isinstance(value, (OnConverged, OnSimilar, FisherWindow)):
        return {"rule": type(value).__name__, **asdict(value)}
    return value


def _check_refresh(value: Any) -> None:
    if isinstance(value, dict) and value.get("rule") in RULES:
        names = [f.name for f in fields(RULES[value["rule"]])]
        rule = {name: value.get(name) for name in names}
        for name in ("max_gap", "min_gap", "gap", "window"):
            if name in rule:
                whole(f"refresh.{name}", rule[name], 1)
        for name, least in (("tol", 0.0), ("threshold", 0.0), ("growth", 1.0)):
            if name in rule:
                given = rule[name]
                number(
                    f"refresh.{name}", given, f"a number >= {least}", isinstance(given, (int, float)) and given >= least
                )
        return
    if isinstance(value, dict):
        bad(OP, "refresh", "a whole number >= 1, OnConverged(...) or OnSimilar(...)", repr(value))
    whole("refresh", value, 1)


def check_group(group: dict[str, Any]) -> None:
    """Make a group's options plain and raise ValueError for those that cannot be served."""
    number("lr", float(group["lr"]), "a number >= 0", float(group["lr"]) >= 0)
    beta1, beta2 = group["betas"]
    for beta in (beta1, beta2):
        number("betas", beta, "two numbers in [0, 1)", isinstance(beta, (int, float)) and 0 <= beta < 1)
    for name in ("eps", "weight_decay", "scale", "residual_scale"):
        value = group[name]
        number(name, value, "a number >= 0", isinstance(value, (int, float)) and value >= 0)
    group["refresh"], group["precond"] = plain(group["refresh"]), plain(group["precond"])
    chosen = [name for name in ("rank", "energy", "density") if group[name] is not None]
    if len(chosen) > 1:
        bad(OP, "rank", "one of rank, energy and density", " and ".join(f"{n}={group[n]!r}" for n in chosen))
    if group["rank"] is not None:
        whole("rank", group["rank"], 1)
    energy, density = group["energy"], group["density"]
    if energy is not None:
        number("energy", energy, "a fraction in (0, 1)", isinstance(energy, float) and 0 < energy < 1)
    if density is not None:
        number("density", density, "a fraction in [0, 1]", isinstance(density, (int, float)) and 0 <= density <= 1)
    whole("rank_min", group["rank_min"], 1)
    if group["rank_max"] is not None:
        whole("rank_max", group["rank_max"], group["rank_min"])
    whole("min_dim", group["min_dim"], 1)
    if group["iters"] is not None:
        whole("iters", group["iters"], 1)
    one_of("side", group["side"], SIDES)
    one_of("projector", group["projector"], PROJECTORS)
    one_of("moments", group["moments"], MOMENTS)
    one_of("residual", group["residual"], RESIDUALS)
    one_of("reparam", group["reparam"], REPARAMS)
    one_of("granularity", group["granularity"], ("channel", "tensor"))
    one_of("nonfinite", group["nonfinite"], ("skip", "ignore"))
    if group["limiter"] is not None:
        number("limiter", group["limiter"], "a number > 1, or None", group["limiter"] > 1)
    _check_refresh(group["refresh"])
    if energy is not None and group["projector"] in ("random", "randk"):
        bad(OP, "projector", "'rsvd', 'power' or 'svd' with energy=", repr(group["projector"]))
    if density == 0 and group["residual"] == "none":
        bad(OP, "density", "above 0 without a residual (nothing would be updated)", density)
    if group["residual"] == "apollo" and group["projector"] == "randk":
        bad(OP, "projector", "a dense one ('random', 'rsvd', ...) with residual='apollo'", "'randk'")
    if group["basis"] is not None and group["projector"] == "randk":
        bad(OP, "basis", "None with projector='randk', whose basis is a list of numbers", repr(group["basis"]))
    if group["reparam"] is not None and group["residual"] != "none":
        bad(OP, "reparam", "None with a residual, whose update lies outside of the subspace", repr(group["reparam"]))
    window = group["precond"]
    if window is not None:
        if not isinstance(window, dict) or window.get("rule") != "FisherWindow":
            bad(OP, "precond", "None or FisherWindow(s, lam)", repr(window))
        whole("precond.s", window["s"], 1)
        number("precond.lam", window["lam"], "a number > 0", window["lam"] > 0)
        if group["energy"] is not None:
            bad(OP, "precond", "None with energy=, whose rank changes under the window", "FisherWindow")
