"""How a projected moment is kept: fp32, bf16, or 8-bit codes. A codec is three methods; others register theirs.

``encode`` and ``decode`` go through a dict of plain tensors, which is what the optimizer's state holds under
``<name>``, ``<name>.scale``, ...: ``torch.save`` with ``weights_only`` and sharding see tensors only.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .._errors import bad

_GROUP = 128  # elements that share a scale


class Codec(Protocol):
    """A number format for moments. ``signed`` says whether the moment has a sign (M has, V has not)."""

    def encode(self, x: Tensor, *, signed: bool, generator: torch.Generator | None) -> dict[str, Tensor]:
        """``x`` (fp32) as tensors by suffix: ``""`` for the codes, others for what decoding them needs. Rounding is
        stochastic, drawn from ``generator``: with rounding to nearest a slow average never moves."""

    def decode(self, stored: dict[str, Tensor], *, signed: bool, shape: torch.Size) -> Tensor:
        """The fp32 tensor of ``shape`` that :meth:`encode` was given, to the format's precision."""

    def bytes(self, numel: int) -> int:
        """Bytes that ``numel`` elements take."""


class Float32:
    """fp32 (fp64 for fp64 weights): the moment itself; updates run in place."""

    def encode(self, x: Tensor, *, signed: bool, generator: torch.Generator | None) -> dict[str, Tensor]:
        """``x`` itself."""
        return {"": x}

    def decode(self, stored: dict[str, Tensor], *, signed: bool, shape: torch.Size) -> Tensor:
        """The stored tensor itself."""
        return stored[""]

    def bytes(self, numel: int) -> int:
        """Four an element."""
        return 4 * numel


class BFloat16:
    """bf16 with stochastic rounding: with beta2 = 0.999 a step moves V by less than half a bf16 step, so rounding to
    nearest would freeze it."""

    def encode(self, x: Tensor, *, signed: bool, generator: torch.Generator | None) -> dict[str, Tensor]:
        """bf16 numbers of ``x``'s shape."""
        from ..ops.lowrank import round_stochastic

        bits = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device)
        return {"": round_stochastic(x.float(), torch.bfloat16, bits)}

    def decode(self, stored: dict[str, Tensor], *, signed: bool, shape: torch.Size) -> Tensor:
        """fp32 numbers."""
        return stored[""].float()

    def bytes(self, numel: int) -> int:
        """Two an element."""
        return 2 * numel


class Int8:
    """8-bit codes, 128 elements to an fp32 scale: M linear in [-127, 127]; V in the fourth root of [0, 255], because
    linear codes send most of V to zero and the step to infinity. Stochastic rounding; a V above zero never becomes 0.
    """

    def encode(self, x: Tensor, *, signed: bool, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Codes (int8 or uint8) of ``x``'s shape and a scale for every 128 elements in memory order."""
        flat = x.float().reshape(-1)
        groups = torch.nn.functional.pad(flat, (0, -flat.numel() % _GROUP)).view(-1, _GROUP)
        scale = groups.abs().amax(1, keepdim=True)
        unit = groups / torch.where(scale > 0, scale, 1.0)
        noise = torch.rand(unit.shape, generator=generator, device=x.device)
        if signed:
            codes = (unit * 127 + noise).floor().clamp(-127, 127).to(torch.int8)
        else:
            root = unit.clamp_min(0).sqrt().sqrt() * 255
            codes = torch.where(unit > 0, (root + noise).floor().clamp(1, 255), 0.0).to(torch.uint8)
        return {"": codes.view(-1)[: flat.numel()].view(x.shape).clone(), ".scale": scale.view(-1)}

    def decode(self, stored: dict[str, Tensor], *, signed: bool, shape: torch.Size) -> Tensor:
        """fp32 numbers of ``shape``."""
        codes, scale = stored[""].reshape(-1).float(), stored[".scale"]
        unit = codes / 127 if signed else (codes / 255) ** 4
        return (unit * scale.repeat_interleave(_GROUP)[: codes.numel()]).view(shape)

    def bytes(self, numel: int) -> int:
        """One an element and four for every 128."""
        return numel + 4 * -(-numel // _GROUP)


class Grouped:
    """A format of :mod:`lowmem.ops.codecs` for both moments, groups of 128: ``"log8"``, and ``"fp8"``, which is E4M3
    with range expansion. Rounds to nearest (``generator`` is not used): with beta2 above about 0.99 V follows changes
    of an element's own variance late (docs/lowbit_optim.md), where ``"int8"``, which rounds stochastically, does not.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, x: Tensor, *, signed: bool, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Codes (uint8) of ``x``'s shape, a scale (fp32) and a span (uint8) for every 128 elements."""
        from ..ops.lowbit_optim import group_encode

        codes, scale, span = group_encode(x.float(), self.name, group_size=_GROUP, signed=signed)
        return {"": codes, ".scale": scale, ".span": span}

    def decode(self, stored: dict[str, Tensor], *, signed: bool, shape: torch.Size) -> Tensor:
        """fp32 numbers of ``shape``."""
        from ..ops.lowbit_optim import group_decode

        codes, scale, span = stored[""], stored[".scale"], stored[".span"]
        return group_decode(codes, scale, span, self.name, group_size=_GROUP, signed=signed).view(shape)

    def bytes(self, numel: int) -> int:
        """One an element and five for every 128."""
        return numel + 5 * -(-numel // _GROUP)


_CODECS: dict[str, Codec] = {"fp32": Float32(), "bf16": BFloat16(), "int8": Int8()}
_CODECS |= {"log8": Grouped("log8"), "fp8": Grouped("e4m3+exp")}


def register_codec(name: str, codec: Codec) -> None:
    """Make ``codec`` usable as ``ProjAdamW(state=name)``. A name can be given once."""
    if name in _CODECS:
        bad("optim.register_codec", "name", "a name that is free", repr(name))
    _CODECS[name] = codec


def find_codec(argument: str, name: Any) -> Codec:
    """The codec called ``name``; ValueError for an unknown one."""
    if not isinstance(name, str) or name not in _CODECS:
        bad("ProjAdamW", argument, f"one of {', '.join(map(repr, _CODECS))}", repr(name))
    return _CODECS[name]


def put(state: dict[str, Any], name: str, stored: dict[str, Tensor]) -> None:
    """Write a codec's tensors into an optimizer's state, in place where the shapes agree."""
    for suffix, value in stored.items():
        held = state.get(name + suffix)
        if held is None or held.shape != value.shape or held.dtype != value.dtype:
            state[name + suffix] = value
        elif held is not value:
            held.copy_(value)


def get(state: dict[str, Any], name: str) -> dict[str, Tensor]:
    """What :func:`put` wrote."""
    return {key[len(name) :]: v for key, v in state.items() if key == name or key.startswith(name + ".")}
