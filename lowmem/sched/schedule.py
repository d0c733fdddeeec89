"""``Schedule``: which samples of which jobs go into which microbatch, and when each job's optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class ScheduleStats:
    """Figures of a schedule; tokens are real ones unless padding is named.

    ``microbatches`` counts all slots, ``empty`` of which hold nothing; ``tokens / (microbatches * capacity)`` is the
    ``utilisation``. No schedule has fewer slots than ``lower_bound``, and ``optimal`` says that the two meet. No
    schedule of as many slots has a fullest microbatch below ``max_tokens_lower_bound``; ``balance_optimal`` says that
    ``max_tokens`` meets it. ``min_tokens`` is over the microbatches that are not empty; both count padding. ``nodes``
    is what the exact search spent.
    """

    microbatches: int
    empty: int
    samples: int
    tokens: int
    padding_tokens: int
    utilisation: float
    lower_bound: int
    optimal: bool
    max_tokens: int
    min_tokens: int
    max_tokens_lower_bound: int
    balance_optimal: bool
    nodes: int


@dataclass(frozen=True, eq=False)
class Microbatch:
    """One microbatch: n samples, sorted by job and then by sample; a job's samples are one contiguous segment.

    - ``job_ids``, ``sample_ids``, ``lengths``, ``starts``: int64 [n]; sample i is rows ``starts[i]`` to
      ``starts[i] + lengths[i]`` of the packed rows.
    - ``cu_seqlens``: int32 [n + 1], the sample boundaries for attention. Padding rows, which stand at the end of a
      segment, belong to the segment's last sample here.
    - ``job_cu_seqlens``: int32 [jobs + 1], the row boundaries of all jobs in order; absent jobs have no rows.
    - ``tokens``: rows, padding included.
    """

    job_ids: Array
    sample_ids: Array
    lengths: Array
    starts: Array
    cu_seqlens: Array
    job_cu_seqlens: Array
    tokens: int

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)


@dataclass(frozen=True, eq=False)
class Schedule(Sequence[Microbatch]):
    """A sequence of microbatches; ``schedule[t]`` is a :class:`Microbatch`. All arrays are read-only.

    What was asked for: ``lengths`` (int64 arrays, one per job), ``capacity``, ``global_batch_size`` (one per job),
    ``pipeline_depth``, ``padding_multiple``.

    What was found, N samples in T microbatches: samples ``offsets[t]`` to ``offsets[t + 1]`` of the flat int64 [N]
    arrays ``job_ids``, ``sample_ids`` (places in their job), ``sample_lengths``, ``sample_starts`` (first row in the
    microbatch) make up microbatch t, of ``tokens[t]`` rows with padding; ``offsets`` is int64 [T + 1] and ``tokens``
    int64 [T]. ``steps[j][b]`` is the microbatch after which job j's optimizer steps for its global batch b.
    """

    lengths: tuple[Array, ...]
    capacity: int
    global_batch_size: tuple[int, ...]
    pipeline_depth: int
    padding_multiple: int
    job_ids: Array
    sample_ids: Array
    sample_lengths: Array
    sample_starts: Array
    offsets: Array
    tokens: Array
    steps: tuple[Array, ...]
    stats: ScheduleStats

    def __len__(self) -> int:
        """Number of microbatches, empty ones included."""
        return len(self.tokens)

    def __getitem__(self, t):  # type: ignore[no-untyped-def]
        """Microbatch ``t``; a slice gives a list."""
        if isinstance(t, slice):
            return [self[i] for i in range(*t.indices(len(self)))]
        if not -len(self) <= t < len(self):
            raise IndexError(f"microbatch {t} of {len(self)}")
        t = t % len(self)
        part = slice(int(self.offsets[t]), int(self.offsets[t + 1]))
        jobs, starts, lengths = self.job_ids[part], self.sample_starts[part], self.sample_lengths[part]
        rows = np.append(starts, self.tokens[t])
        first = np.searchsorted(jobs, np.arange(len(self.lengths) + 1))
        return Microbatch(
            job_ids=jobs,
            sample_ids=self.sample_ids[part],
            lengths=lengths,
            starts=starts,
            cu_seqlens=rows.astype(np.int32),
            job_cu_seqlens=rows[first].astype(np.int32),
            tokens=int(self.tokens[t]),
        )

    def __iter__(self) -> Iterator[Microbatch]:
        """The microbatches in order."""
        return (self[t] for t in range(len(self)))

    def stepping_after(self, t: int) -> list[int]:
        """The jobs whose optimizers step after microbatch ``t``."""
        return [j for j, steps in enumerate(self.steps) if _has(steps, t)]

    def validate(self) -> None:
        """Check every rule from the arrays alone; ``ValueError`` names the first one that is broken.

        Rules: every sample is there once, with its length; a job's samples are one segment in order, padded to
        ``padding_multiple``; no microbatch is above ``capacity``; no microbatch holds two global batches of a job; a
        global batch begins at least ``pipeline_depth`` microbatches after the last of the one before; ``steps`` and
        ``stats`` tell the truth.
        """
        _Check(self).run()


def _has(ascending: Array, value: int) -> bool:
    i = int(np.searchsorted(ascending, value))
    return i < len(ascending) and int(ascending[i]) == value


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array


def build(
    lengths: tuple[Array, ...],
    capacity: int,
    sizes: tuple[int, ...],
    depth: int,
    multiple: int,
    slot: Array,
    slots: int,
    lower_bound: int,
    max_lower_bound: int,
    nodes: int,
) -> Schedule:
    """Lay the samples out from the slot of each (flat, job after job)."""
    flat = np.concatenate(lengths)
    counts = np.array([len(part) for part in lengths], np.int64)
    first = np.cumsum(counts) - counts  # sample of each job
    jobs = np.repeat(np.arange(len(lengths)), counts)
    samples = np.arange(len(flat)) - first[jobs]
    order = np.argsort(slot, kind="stable")  # by slot, then by job, then by sample
    at, job_ids, row_lengths = slot[order], jobs[order], flat[order]
    offsets = np.searchsorted(at, np.arange(slots + 1))
    # rows before each sample within its microbatch: whole segments padded, then the samples of its own segment
    new = np.ones(len(order), bool)
    new[1:] = (at[1:] != at[:-1]) | (job_ids[1:] != job_ids[:-1])
    heads = np.flatnonzero(new)
    segment = np.cumsum(new) - 1
    raw = np.add.reduceat(row_lengths, heads)
    padded = -(-raw // multiple) * multiple
    before_segment = np.cumsum(padded) - padded
    before_sample = np.cumsum(row_lengths) - row_lengths
    slot_base = np.zeros(slots + 1, np.int64)
    np.add.at(slot_base, at[heads] + 1, padded)
    tokens = slot_base[1:].copy()
    slot_base = np.cumsum(slot_base)
    starts = before_segment[segment] - slot_base[at] + before_sample - before_sample[heads][segment]
    batches = -(-counts // np.array(sizes))
    first_batch = np.cumsum(batches) - batches
    batch = np.arange(int(batches.sum())) - np.repeat(first_batch, batches)
    starts_of = np.repeat(first, batches) + batch * np.repeat(np.array(sizes), batches)
    last = _frozen(np.maximum.reduceat(slot, starts_of))
    steps = tuple(last[low : low + n] for low, n in zip(first_batch.tolist(), batches.tolist(), strict=True))
    total, rows = int(flat.sum()), int(tokens.sum())
    stats = ScheduleStats(
        microbatches=slots,
        empty=int((tokens == 0).sum()),
        samples=len(flat),
        tokens=total,
        padding_tokens=rows - total,
        utilisation=total / (slots * capacity),
        lower_bound=lower_bound,
        optimal=lower_bound == slots,
        max_tokens=int(tokens.max()),
        min_tokens=int(tokens[tokens > 0].min()),
        max_tokens_lower_bound=max_lower_bound,
        balance_optimal=max_lower_bound == int(tokens.max()),
        nodes=nodes,
    )
    return Schedule(
        lengths=lengths,
        capacity=capacity,
        global_batch_size=sizes,
        pipeline_depth=depth,
        padding_multiple=multiple,
        job_ids=_frozen(job_ids),
        sample_ids=_frozen(samples[order]),
        sample_lengths=_frozen(row_lengths),
        sample_starts=_frozen(starts),
        offsets=_frozen(offsets),
        tokens=_frozen(tokens),
        steps=steps,
        stats=stats,
    )


class _Check:
    """``Schedule.validate``: knows nothing of how a schedule is made."""

    def __init__(self, schedule: Schedule) -> None:
        self.s = schedule

    def require(self, holds: object, rule: str) -> None:
        if not holds:
            raise ValueError(f"lowmem.Schedule.validate: {rule}")

    def run(self) -> None:
        s, require = self.s, self.require
        samples, slots = sum(len(part) for part in s.lengths), len(s.tokens)
        flats = (s.job_ids, s.sample_ids, s.sample_lengths, s.sample_starts)
        require(
            all(a.dtype == np.int64 and a.shape == (samples,) for a in flats), "the flat arrays are int64 [samples]"
        )
        require(s.offsets.shape == (slots + 1,) and s.offsets[0] == 0 and s.offsets[-1] == samples, "offsets span all")
        require((np.diff(s.offsets) >= 0).all(), "offsets ascend")
        require(slots == 0 or (s.tokens[-1] > 0), "the last microbatch is not empty")
        seen = [np.zeros(len(part), bool) for part in s.lengths]
        first: dict[tuple[int, int], int] = {}
        last: dict[tuple[int, int], int] = {}
        for t in range(slots):
            rows, previous = 0, (-1, -1)
            batch_here: dict[int, int] = {}
            for n in range(int(s.offsets[t]), int(s.offsets[t + 1])):
                j, i, length = int(s.job_ids[n]), int(s.sample_ids[n]), int(s.sample_lengths[n])
                require(0 <= j < len(seen) and 0 <= i < len(seen[j]), f"microbatch {t}: sample {i} of job {j} exists")
                require(not seen[j][i], f"sample {i} of job {j} is there once")
                seen[j][i] = True
                require(length == s.lengths[j][i], f"sample {i} of job {j} has its length")
                require((j, i) > previous, f"microbatch {t} is sorted by job and sample")
                if j != previous[0]:
                    rows = -(-rows // s.padding_multiple) * s.padding_multiple
                require(s.sample_starts[n] == rows, f"microbatch {t}: sample {i} of job {j} starts at row {rows}")
                rows += length
                previous = (j, i)
                b = i // s.global_batch_size[j]
                require(batch_here.setdefault(j, b) == b, f"microbatch {t} holds one global batch of job {j}")
                first.setdefault((j, b), t)
                last[j, b] = t
            rows = -(-rows // s.padding_multiple) * s.padding_multiple
            require(s.tokens[t] == rows, f"microbatch {t} has {rows} rows")
            require(rows <= s.capacity, f"microbatch {t} is within the capacity")
        require(all(part.all() for part in seen), "every sample is there")
        require(len(s.steps) == len(s.lengths), "steps has one entry per job")
        for j, part in enumerate(s.lengths):
            batches = -(-len(part) // s.global_batch_size[j])
            require(s.steps[j].tolist() == [last[j, b] for b in range(batches)], f"steps of job {j} follow its batches")
            for b in range(1, batches):
                gap = first[j, b] - last[j, b - 1]
                require(
                    gap >= s.pipeline_depth, f"global batch {b} of job {j} begins {s.pipeline_depth} or more behind"
                )
        self.stats(slots, samples)

    def stats(self, slots: int, samples: int) -> None:
        s, q, require = self.s, self.s.stats, self.require
        total, rows = int(s.sample_lengths.sum()), int(s.tokens.sum())
        filled = s.tokens[s.tokens > 0]
        require((q.microbatches, q.empty, q.samples) == (slots, slots - len(filled), samples), "stats count right")
        require((q.tokens, q.padding_tokens) == (total, rows - total), "stats count tokens right")
        require(q.utilisation == total / (slots * s.capacity), "utilisation is tokens over slots times capacity")
        require((q.max_tokens, q.min_tokens) == (filled.max(), filled.min()), "stats name the fullest and the emptiest")
        require(q.lower_bound <= slots and q.optimal == (q.lower_bound == slots), "the bound on the slots holds")
        met = q.max_tokens_lower_bound == q.max_tokens
        require(q.max_tokens_lower_bound <= q.max_tokens and q.balance_optimal == met, "the bound on the balance holds")
