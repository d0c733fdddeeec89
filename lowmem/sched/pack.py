"""``pack_microbatches``: samples of several jobs into few, equal microbatches (docs/sched.md)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _dispatch
from .._errors import bad
from . import _reference
from .schedule import Schedule, build

try:
    from lowmem import _host  # type: ignore[attr-defined]
except ImportError:  # not built: plain Python gives the same schedules, slower
    _host = None

OP = "pack_microbatches"
MOST_TOKENS = 2**31 - 1  # row offsets are int32
MOST_DEPTH = 1024


def _integer(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int of [low, high]; bools and floats are refused, whatever their value."""
    expected = f"an integer from {low} to {high}" if high < 2**62 else f"an integer of at least {low}"
    if isinstance(value, (bool, np.bool_)):
        bad(OP, name, expected, repr(value), kind=TypeError)
    try:
        number = operator.index(value)
    except TypeError:
        bad(OP, name, expected, repr(value), kind=TypeError)
    if not low <= number <= high:
        bad(OP, name, expected, number)
    return number


def _size(value: Any) -> int | None:
    """How many entries a sequence or array has; None for what is neither."""
    if isinstance(value, (str, bytes, dict, set)):
        return None
    try:
        return len(value)
    except TypeError:
        return None


def _integers(where: str, lengths: Any) -> np.ndarray:
    """One job's lengths as a flat array of integers, of Python's where they go beyond 64 bits."""
    try:
        values = np.asarray(lengths)
    except ValueError:
        bad(OP, where, "a flat sequence of sample lengths", "a nested one", kind=TypeError)
    except (TypeError, RuntimeError) as error:  # a tensor on a device, of a type that numpy lacks, or with a gradient
        bad(OP, where, "integer lengths that numpy can read", f"{type(lengths).__name__}: {error}", kind=TypeError)
    if values.ndim != 1:
        bad(OP, where, "a flat sequence of sample lengths", "a nested one", kind=TypeError)
    entries = [] if values.dtype.kind in "iu" and hasattr(lengths, "dtype") else list(lengths)
    wrong = [v for v in entries if isinstance(v, (bool, np.bool_)) or not hasattr(v, "__index__")]
    if wrong or values.dtype.kind == "b":
        bad(OP, where, "integer lengths", repr(wrong[0] if wrong else entries[0]), kind=TypeError)
    # numpy turns Python integers that share no 64-bit type into floats
    return values if values.dtype.kind in "iu" else np.array([operator.index(v) for v in entries], dtype=object)


def _lengths(lengths_by_job: Any, capacity: int, multiple: int) -> tuple[np.ndarray, ...]:
    name = "lengths_by_job"
    if _size(lengths_by_job) is None:
        expected = "a sequence of jobs, each a sequence of sample lengths"
        bad(OP, name, expected, type(lengths_by_job).__name__, kind=TypeError)
    if len(lengths_by_job) == 0:
        bad(OP, name, "at least one job", "none")
    room = capacity // multiple * multiple
    jobs = []
    for j, lengths in enumerate(lengths_by_job):
        where = f"{name}[{j}]"
        size = _size(lengths)
        if size is None:
            bad(OP, where, "a sequence of sample lengths", type(lengths).__name__, kind=TypeError)
        if size == 0:
            bad(OP, where, "at least one sample", "an empty job")
        values = _integers(where, lengths)
        low, high = int(values.argmin()), int(values.argmax())
        if values[low] < 1:
            bad(OP, f"{where}[{low}]", "a length of at least 1", int(values[low]))
        if values[high] > room:
            padded = f" (a multiple of padding_multiple={multiple})" if room != capacity else ""
            expected = f"a length of at most the capacity, {room}{padded}"
            bad(OP, f"{where}[{high}]", expected, int(values[high]), hint="raise capacity, or cut or drop the sample")
        array = np.array(values, dtype=np.int64)
        array.setflags(write=False)
        jobs.append(array)
    return tuple(jobs)


def _sizes(global_batch_size: Any, jobs: int) -> tuple[int, ...]:
    name = "global_batch_size"
    count = _size(global_batch_size)
    if count is None:
        return (_integer(name, global_batch_size, 1, 2**63 - 1),) * jobs
    if count != jobs:
        bad(OP, name, f"one size, or {jobs} (one per job)", f"{count} sizes")
    return tuple(_integer(f"{name}[{j}]", size, 1, 2**63 - 1) for j, size in enumerate(global_batch_size))


def pack_microbatches(
    lengths_by_job: Sequence[Sequence[int]],
    capacity: int,
    *,
    global_batch_size: int | Sequence[int],
    pipeline_depth: int = 1,
    padding_multiple: int = 1,
    node_limit: int = 200_000,
) -> Schedule:
    """Pack the samples of jobs that train adapters on one base model into microbatches.

    Job j's samples, of ``lengths_by_job[j][i]`` tokens, are cut in order into global batches of
    ``global_batch_size[j]`` samples (the last may be smaller); its optimizer steps once per global batch. Rules of a
    schedule:

    1. every sample is in exactly one microbatch;
    2. a microbatch holds at most ``capacity`` tokens, each job's tokens in it rounded up to ``padding_multiple``;
    3. no microbatch holds samples of two global batches of one job;
    4. a job's global batch begins at least ``pipeline_depth`` microbatches after the last one of its batch before.
       With pipeline parallelism that is the number of stages, and 1 without; microbatches are left empty where nothing
       else can fill the gap.

    Samples may be reordered within their global batch, whose gradients are summed. Among schedules that keep the rules,
    the number of microbatches is made small, then the fullest one, then the sum of squares of their tokens. The first
    two are proven best where ``stats`` says so. The result depends on the arguments alone: not on the machine, the
    time, or whether ``lowmem/_host`` is built.

    Args:
        lengths_by_job: tokens of each sample of each job, integers from 1 to ``capacity``; lists or integer arrays.
        capacity: most tokens of a microbatch, at most 2**31 - 1.
        global_batch_size: samples per optimizer step, one number or one per job.
        pipeline_depth: from 1 to 1024.
        padding_multiple: from 1 to ``capacity``; 1 pads nothing.
        node_limit: what the exact search may spend on joint problems of up to 128 samples; 0 switches it off.

    Raises:
        TypeError: a length or a size is not an integer.
        ValueError: no jobs, a job without samples, a length below 1 or above the capacity, a number out of its range.
    """
    capacity = _integer("capacity", capacity, 1, MOST_TOKENS)
    multiple = _integer("padding_multiple", padding_multiple, 1, capacity)
    lengths = _lengths(lengths_by_job, capacity, multiple)
    sizes = _sizes(global_batch_size, len(lengths))
    depth = _integer("pipeline_depth", pipeline_depth, 1, MOST_DEPTH)
    node_limit = min(_integer("node_limit", node_limit, 0, 2**63 - 1), 2**40)
    flat = np.concatenate(lengths)
    ends = np.cumsum([len(part) for part in lengths])
    steps = np.minimum(sizes, [len(part) for part in lengths]).astype(np.int64)
    if _host is not None and _dispatch.REQUESTED != "reference":
        found = _host.pack(flat, ends.astype(np.int64), steps, capacity, depth, multiple, node_limit)
    else:
        found = _reference.pack(flat.tolist(), ends.tolist(), steps.tolist(), capacity, depth, multiple, node_limit)
    slot = np.asarray(found[0], dtype=np.int64)
    return build(lengths, capacity, sizes, depth, multiple, slot, *(int(value) for value in found[1:]))
