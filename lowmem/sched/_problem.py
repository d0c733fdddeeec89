"""What is to be packed, and lower bounds on the slots it takes (docs/sched.md derives them); integers only."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class Problem:
    """Jobs, their global batches in order, and the samples of each batch from the longest to the shortest."""

    capacity: int  # a multiple of `multiple`
    depth: int
    multiple: int
    length_of: list[int]  # per sample
    batch_of: list[int]
    items: list[list[int]]  # per batch: samples, longest first, equal ones by index
    lengths: list[list[int]]  # per batch: their lengths
    job_of: list[int]  # per batch
    first_batch: list[int]  # per job, and one past the last
    whole: int  # samples of the problem that this one is a part of

    def __post_init__(self) -> None:
        self.samples = len(self.length_of)
        self.jobs = len(self.first_batch) - 1
        self.totals = [sum(lengths) for lengths in self.lengths]
        self.padded_total = sum(self.pad(total) for total in self.totals)
        self.longest = self.pad(max(self.length_of))
        self.sorted = sorted(self.length_of, reverse=True)

    def pad(self, tokens: int) -> int:
        """``tokens`` rounded up to the padding multiple."""
        return -(-tokens // self.multiple) * self.multiple

    @classmethod
    def build(
        cls, lengths: list[int], job_ends: list[int], batch_sizes: list[int], capacity: int, depth: int, multiple: int
    ) -> Problem:
        """Cut each job into its global batches."""
        batch_of = [0] * len(lengths)
        items: list[list[int]] = []
        job_of: list[int] = []
        first_batch = [0]
        start = 0
        for j, (end, size) in enumerate(zip(job_ends, batch_sizes, strict=True)):
            for low in range(start, end, size):
                high = min(low + size, end)
                batch_of[low:high] = [len(items)] * (high - low)
                items.append(sorted(range(low, high), key=lambda i: (-lengths[i], i)))
                job_of.append(j)
            first_batch.append(len(items))
            start = end
        of_batch = [[lengths[i] for i in batch] for batch in items]
        room = capacity // multiple * multiple
        return cls(room, depth, multiple, lengths, batch_of, items, of_batch, job_of, first_batch, len(lengths))

    def only(self, k: int) -> Problem:
        """Batch ``k`` alone, its samples numbered from 0 in their own order."""
        order = sorted(self.items[k])
        place = {i: n for n, i in enumerate(order)}
        return Problem(
            self.capacity,
            1,
            self.multiple,
            [self.length_of[i] for i in order],
            [0] * len(order),
            [[place[i] for i in self.items[k]]],
            [self.lengths[k]],
            [0],
            [0, 1],
            self.whole,
        )


class Bounds(NamedTuple):
    """Lower bounds at one capacity."""

    slots: int  # of the whole problem, empty slots counted
    least: list[int]  # per batch: slots it takes by itself
    after: list[int]  # per batch: slots that must follow its last one


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def bins(lengths: list[int], capacity: int) -> int:
    """Martello and Toth's bound L2 on the bins that ``lengths`` (longest first) need, no order and no padding."""
    total = sum(lengths)
    halves = 0  # samples above half the capacity
    while halves < len(lengths) and 2 * lengths[halves] > capacity:
        halves += 1
    best = max(halves, _ceil(total, capacity))
    fits = sum(lengths[:halves])  # tokens of the samples above one half that leave room for `small`
    lone = 0  # samples too long to share a bin with one of length `small`
    while lone < halves and lengths[lone] > capacity - (lengths[halves] if halves < len(lengths) else 0):
        fits -= lengths[lone]
        lone += 1
    rest = 0
    i = halves
    while i < len(lengths):
        small = lengths[i]
        while lone > 0 and lengths[lone - 1] <= capacity - small:
            lone -= 1
            fits += lengths[lone]
        while i < len(lengths) and lengths[i] == small:
            rest += small
            i += 1
        spill = rest - ((halves - lone) * capacity - fits)
        best = max(best, halves + max(0, _ceil(spill, capacity)))
    return best


def _one_machine(head: list[int], after: list[int], work: list[int], per_slot: int) -> int:
    """Slots needed when all work is divisible: each slot serves, of what is released, the longest tail first."""
    order = sorted((k for k in range(len(work)) if work[k]), key=lambda k: (head[k], k))
    left = list(work)
    heap: list[tuple[int, int]] = []
    t = i = best = 0
    while i < len(order) or heap:
        if not heap:
            t = max(t, head[order[i]])
        while i < len(order) and head[order[i]] <= t:
            heapq.heappush(heap, (-after[order[i]], order[i]))
            i += 1
        room = per_slot
        while heap and room:
            k = heap[0][1]
            take = min(room, left[k])
            room -= take
            left[k] -= take
            if not left[k]:
                heapq.heappop(heap)
                best = max(best, t + 1 + after[k])
        t += 1
    return best


def bounds(p: Problem, capacity: int) -> Bounds:
    """Lower bounds on the slots of ``p`` at ``capacity``; valid for every schedule that keeps the rules."""
    batches = len(p.lengths)
    least = [max(bins(p.lengths[k], capacity), _ceil(p.pad(p.totals[k]), capacity)) for k in range(batches)]
    head, after = [0] * batches, [0] * batches
    best = bins(p.sorted, capacity)
    for j in range(p.jobs):
        first, end = p.first_batch[j], p.first_batch[j + 1]
        for k in range(first + 1, end):
            head[k] = head[k - 1] + least[k - 1] - 1 + p.depth
        for k in range(end - 2, first - 1, -1):
            after[k] = p.depth + least[k + 1] - 1 + after[k + 1]
        best = max(best, least[first] + after[first])
    if p.jobs > 1:
        best = max(best, _one_machine(head, after, [p.pad(total) for total in p.totals], capacity))
        half, third = [0] * batches, [0] * batches
        small = capacity // 3 + 1
        for k in range(batches):
            for length in p.lengths[k]:
                if length < small:
                    break
                half[k] += 2 if 2 * length > capacity else 1 if 2 * length == capacity else 0
                third[k] += capacity if length > capacity - small else length
        best = max(best, _one_machine(head, after, half, 2), _one_machine(head, after, third, capacity))
    return Bounds(best, least, after)
