"""Is there a schedule of so many slots at such a capacity? Branch and bound, slot after slot.

Plain Python, integers only.

At each slot every *maximal* set of the samples on offer is tried: one that leaves out a sample that would still fit
is never better, since that sample may be moved there from its later slot without breaking a rule. States from which
the rest was seen to fail are remembered.
"""

from __future__ import annotations

from ._problem import Bounds, Problem


class ExactSearch:
    """The search, its node count over all questions asked, and the witness of the last one answered with yes."""

    def __init__(self) -> None:
        self.nodes = 0
        self.slot: list[int] = []

    def begin(self, p: Problem, node_limit: int) -> None:
        """Turn to problem ``p`` with ``node_limit`` nodes for all questions about it."""
        self.p = p
        self.nodes = 0
        self.node_limit = node_limit
        # samples of one batch and one length are interchangeable: a class, longest first
        self.size: list[list[int]] = []
        self.count: list[list[int]] = []
        for lengths in p.lengths:
            sizes: list[int] = []
            counts: list[int] = []
            for length in lengths:
                if sizes and sizes[-1] == length:
                    counts[-1] += 1
                else:
                    sizes.append(length)
                    counts.append(1)
            self.size.append(sizes)
            self.count.append(counts)

    def decide(self, slots: int, capacity: int, b: Bounds) -> bool | None:
        """True and a witness in ``slot``; False: proven impossible; None: the node limit came first."""
        p = self.p
        self.slots, self.capacity, self.after = slots, capacity, b.after
        self.left = [counts.copy() for counts in self.count]
        self.raw = list(p.totals)  # tokens still to be placed, per batch
        self.raw_left = sum(p.totals)
        self.padded_left = p.padded_total
        self.big_left = sum(2 * length > capacity for length in p.length_of)
        self.at = list(p.first_batch[:-1])
        self.ready = [0] * p.jobs
        self.failed: dict[tuple[int, ...], int] = {}
        self.taken: list[tuple[int, int, int, int]] = []  # (slot, batch, class, how many)
        self.stopped = self.nodes >= self.node_limit
        if self.stopped:
            return None
        if not self._from(0):
            return None if self.stopped else False
        self.slot = [0] * p.samples
        # the witness gives out the samples of a class by index
        starts = [[sum(counts[:c]) for c in range(len(counts))] for counts in self.count]
        for t, k, c, n in self.taken:
            for i in p.items[k][starts[k][c] : starts[k][c] + n]:
                self.slot[i] = t
            starts[k][c] += n
        return True

    def _hopeless(self, t: int) -> bool:
        """Whether a bound forbids placing what is left in slots ``t`` and later."""
        p, remaining = self.p, self.slots - t
        if self.padded_left > remaining * self.capacity or self.big_left > remaining:
            return True
        for j in range(p.jobs):
            k = self.at[j]
            if k < p.first_batch[j + 1]:
                least = -(-p.pad(self.raw[k]) // self.capacity)
                if max(self.ready[j], t) + least + self.after[k] > self.slots:
                    return True
        return False

    def _state(self, t: int) -> tuple[int, ...]:
        key: list[int] = []
        for j in range(self.p.jobs):
            k = self.at[j]
            key.append(k)
            if k < self.p.first_batch[j + 1]:
                key.append(max(self.ready[j] - t, 0))
                key.extend(self.left[k])
        return tuple(key)

    def _take(self, k: int, c: int, n: int) -> None:
        """Place ``n`` more samples of class ``c`` of batch ``k`` (fewer, where negative)."""
        size = self.size[k][c]
        self.left[k][c] -= n
        self.padded_left -= self.p.pad(self.raw[k])
        self.raw[k] -= n * size
        self.padded_left += self.p.pad(self.raw[k])
        self.raw_left -= n * size
        self.big_left -= n if 2 * size > self.capacity else 0

    def _from(self, t: int) -> bool:
        """Whether the samples left can be placed in slots ``t`` to the last."""
        p = self.p
        if self.raw_left == 0:
            return True
        open_jobs = [j for j in range(p.jobs) if self.at[j] < p.first_batch[j + 1]]
        t = max(t, min(self.ready[j] for j in open_jobs))
        if self._hopeless(t):
            return False
        state = self._state(t)
        if self.failed.get(state, self.slots) <= t:
            return False
        offered = [j for j in open_jobs if self.ready[j] <= t]
        classes = [
            (-self.size[self.at[j]][c], j, self.at[j], c)
            for j in offered
            for c in range(len(self.left[self.at[j]]))
            if self.left[self.at[j]][c]
        ]
        classes.sort()
        if self._fill(t, open_jobs, offered, classes):
            return True
        if not self.stopped:
            self.failed[state] = t
        return False

    def _fill(self, t: int, open_jobs: list[int], offered: list[int], classes: list[tuple[int, int, int, int]]) -> bool:
        """Try every maximal set for slot ``t``; counts of the classes from the longest, high to low."""
        p, n, m, capacity = self.p, len(classes), self.p.multiple, self.capacity
        # nothing depends on anything later: slots may change places, so the longest sample goes into this one
        free = len(offered) == len(open_jobs) and all(self.at[j] + 1 == p.first_batch[j + 1] for j in open_jobs)
        had = [self.left[k][c] for _, _, k, c in classes]
        tail = [0] * (n + 1)
        for i in range(n - 1, -1, -1):
            tail[i] = tail[i + 1] - classes[i][0] * had[i]
        need = self.raw_left - (self.slots - t - 1) * capacity  # fewer tokens here would leave too many for the rest
        segment = dict.fromkeys(offered, 0)
        count = [0] * n
        shortest = [capacity + 1] * (n + 1)  # of the samples left out so far
        used = raw = i = 0
        down = True
        while True:
            if down and i == n:
                if self._leaf(t, classes, count, had, segment, used):
                    return True
                if self.stopped:
                    return False
                down = False
                i -= 1
            elif down:
                self.nodes += 1
                if self.nodes >= self.node_limit:
                    self.stopped = True
                    return False
                floor = max(need, capacity + 1 - shortest[i] if m == 1 else 0)
                if raw + tail[i] < floor:
                    down = False
                    i -= 1
                    continue
                size, j = -classes[i][0], classes[i][1]
                here = segment[j]
                fit = min(had[i], (capacity - used + p.pad(here) - here) // size)
                if free and i == 0 and fit == 0:
                    return False
                count[i] = fit
                segment[j] += fit * size
                used += p.pad(segment[j]) - p.pad(here)
                raw += fit * size
                shortest[i + 1] = min(shortest[i], size) if fit < had[i] else shortest[i]
                i += 1
            else:
                if i < 0:
                    return False
                size, j = -classes[i][0], classes[i][1]
                here = segment[j]
                back = 1 if count[i] > (1 if free and i == 0 else 0) else count[i]
                down = count[i] > (1 if free and i == 0 else 0)
                count[i] -= back
                segment[j] -= back * size
                used += p.pad(segment[j]) - p.pad(here)
                raw -= back * size
                if down:
                    shortest[i + 1] = min(shortest[i], size)
                    i += 1
                else:
                    i -= 1

    def _leaf(
        self,
        t: int,
        classes: list[tuple[int, int, int, int]],
        count: list[int],
        had: list[int],
        segment: dict[int, int],
        used: int,
    ) -> bool:
        """Go on behind slot ``t`` filled with ``count``, unless the set is not maximal."""
        p = self.p
        for i, (minus_size, j, _, _) in enumerate(classes):
            if count[i] < had[i] and segment[j] - minus_size <= p.pad(segment[j]) + self.capacity - used:
                return False
        mark = len(self.taken)
        before = [(j, self.at[j], self.ready[j]) for j in segment]
        for i, (_, _, k, c) in enumerate(classes):
            if count[i]:
                self._take(k, c, count[i])
                self.taken.append((t, k, c, count[i]))
        for j in segment:
            if self.raw[self.at[j]] == 0:
                self.at[j] += 1
                self.ready[j] = t + p.depth
        if self._from(t + 1):
            return True
        for j, k, ready in before:
            self.at[j], self.ready[j] = k, ready
        del self.taken[mark:]
        for i, (_, _, k, c) in enumerate(classes):
            if count[i]:
                self._take(k, c, -count[i])
        return False
