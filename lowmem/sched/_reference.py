"""The packer in plain Python: what csrc/host/ does, with the same integers, ties and node counts.

``pack`` takes the lengths of all samples and returns the microbatch (the *slot*) of each. It runs where
``lowmem/_host`` is not built, and is what the tests hold the C++ against. docs/sched.md explains the algorithm.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from typing import NamedTuple

from ._exact import ExactSearch
from ._problem import Bounds, Problem, bounds

EXACT_SAMPLES = 128  # joint problems above this size are never given to the exact search
THOROUGH_SAMPLES = 4096  # up to here every policy is tried at every capacity, and the balance is bisected to the token
POLICIES = 4  # orders of the jobs within a slot: see _greedy
CANDIDATES = 16  # jobs that one slot looks at, of those in progress and of those not begun
FILL_NODES = 2_000_000  # over the number of samples: placements beyond the first descent that fill one slot
SMOOTH_PASSES, SMOOTH_WINDOW, SMOOTH_PARTNERS, SMOOTH_PAIRS, SMOOTH_BUDGET = 12, 16, 3, 4096, 4_000_000


class Packing(NamedTuple):
    """The slot of each sample, the number of slots, what was proven about them, and the nodes the proof took."""

    slot: list[int]
    slots: int
    lower_bound: int
    max_lower_bound: int
    nodes: int


class _Solved(NamedTuple):
    slot: list[int]
    slots: int
    lower_bound: int
    max_lower_bound: int


class _Fill:
    """The samples still to be placed, per batch, and the search that fills one slot from them."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.negated = [[-length for length in lengths] for lengths in problem.lengths]
        self.next = [list(range(len(lengths) + 1)) for lengths in problem.lengths]
        self.last = [len(lengths) - 1 for lengths in problem.lengths]
        self.tokens = [sum(lengths) for lengths in problem.lengths]

    def alive_from(self, k: int, i: int) -> int:
        """The first unplaced sample of batch ``k`` at or after place ``i``."""
        link = self.next[k]
        while link[i] != i:
            link[i] = link[link[i]]
            i = link[i]
        return i

    def place(self, k: int, i: int) -> None:
        """Take sample ``i`` of batch ``k`` out."""
        link = self.next[k]
        link[i] = i + 1
        self.tokens[k] -= self.p.lengths[k][i]
        while self.last[k] >= 0 and link[self.last[k]] != self.last[k]:
            self.last[k] -= 1

    def fill(self, batches: list[int], capacity: int, node_cap: int) -> list[tuple[int, int]]:
        """The fullest slot found: depth first, longest fitting sample first, batches in the order given.

        The first sample of the first batch is always in it. The first descent is the greedy slot; ``node_cap`` more
        placements look for a fuller one.
        """
        p = self.p
        segment = [0] * len(batches)
        chosen: list[tuple[int, int]] = []
        best: list[tuple[int, int]] = []
        best_raw, raw, room, nodes, first_leaf = -1, 0, capacity, 0, False
        c, i = 0, 0
        while True:
            while c < len(batches):
                k = batches[c]
                lengths = p.lengths[k]
                limit = room + p.pad(segment[c]) - segment[c]
                if lengths[self.last[k]] <= limit:
                    i = self.alive_from(k, max(i, bisect_left(self.negated[k], -limit)))
                    if i < len(lengths):
                        room += p.pad(segment[c])
                        segment[c] += lengths[i]
                        room -= p.pad(segment[c])
                        raw += lengths[i]
                        chosen.append((c, i))
                        nodes += first_leaf
                        i += 1
                        continue
                c, i = c + 1, 0
            if raw > best_raw:
                best_raw, best = raw, chosen.copy()
            first_leaf = True
            if raw == capacity or nodes >= node_cap or len(chosen) == 1:
                break
            c, i = chosen.pop()
            length = p.lengths[batches[c]][i]
            room += p.pad(segment[c])
            segment[c] -= length
            room -= p.pad(segment[c])
            raw -= length
            i = bisect_left(self.negated[batches[c]], -length + 1)  # the next shorter one
        return [(batches[c], i) for c, i in best]


def _greedy(p: Problem, capacity: int, b: Bounds, policy: int, limit: int) -> tuple[list[int], int] | None:
    """Slot after slot, the fullest one from the jobs in ``policy``'s order; None where it takes more than ``limit``.

    Jobs that can no longer wait come first. Then, by policy: (0) batches in progress, (1) the same, but the job of the
    longest sample leads, (2) batches in progress, those with the fewest tokens left first, (3) batches that need the
    fewest slots. Then the job with the longest way to its end.
    """
    pool = _Fill(p)
    node_cap = min(512, max(16, FILL_NODES // p.whole))
    slot = [0] * p.samples
    at = list(p.first_batch[:-1])  # the batch each job is in
    ready: list[tuple[int, int]] = []  # (slot from which the job may go on, job)
    level = [b.least[k] + b.after[k] for k in at]  # slots the job needs from here to its end
    fresh = [(-level[j], j) for j in range(p.jobs)]
    begun: list[tuple[int, int]] = []
    heapq.heapify(fresh)
    t, left = 0, p.jobs
    while left:
        while ready and ready[0][0] <= t:
            j = heapq.heappop(ready)[1]
            heapq.heappush(fresh, (-level[j], j))
        if not fresh and not begun:
            t = ready[0][0]
            continue
        order = []
        for started, heap in ((0, begun), (1, fresh)):
            for _ in range(min(CANDIDATES, len(heap))):
                minus_level, j = heapq.heappop(heap)
                if t - minus_level > limit:
                    return None
                tokens = pool.tokens[at[j]]
                rank = started if policy < 3 else -(-tokens // capacity)
                order.append((t - minus_level < b.slots, rank, tokens if policy == 2 else 0, minus_level, j, started))
        order.sort()
        jobs = [entry[4] for entry in order]
        if policy == 1:
            longest, where = -1, 0
            for n, j in enumerate(jobs):
                length = p.lengths[at[j]][pool.alive_from(at[j], 0)]
                if length > longest:
                    longest, where = length, n
            jobs.insert(0, jobs.pop(where))
        served = set()
        for k, i in pool.fill([at[j] for j in jobs], capacity, node_cap):
            slot[p.items[k][i]] = t
            pool.place(k, i)
            served.add(p.job_of[k])
        for _, _, _, minus_level, j, started in order:
            k = at[j]
            if j not in served:
                heapq.heappush(fresh if started else begun, (minus_level, j))
            elif pool.tokens[k]:
                level[j] = -(-p.pad(pool.tokens[k]) // capacity) + b.after[k]
                heapq.heappush(begun, (-level[j], j))
            elif k + 1 < p.first_batch[j + 1]:
                at[j] = k + 1
                level[j] = b.least[k + 1] + b.after[k + 1]
                heapq.heappush(ready, (t + p.depth, j))
            else:
                left -= 1
        t += 1
    return (slot, t) if t <= limit else None


def _max_load(p: Problem, slot: list[int], slots: int) -> int:
    """The most tokens of any slot, segments padded."""
    segments: dict[tuple[int, int], int] = {}
    for i, t in enumerate(slot):
        key = (t, p.job_of[p.batch_of[i]])
        segments[key] = segments.get(key, 0) + p.length_of[i]
    loads = [0] * slots
    for (t, _), raw in segments.items():
        loads[t] += p.pad(raw)
    return max(loads)


def _solve(p: Problem, node_limit: int, search: ExactSearch) -> _Solved:
    """Fewest slots first, then the smallest fullest slot."""
    b = bounds(p, p.capacity)
    least = b.slots
    best: tuple[list[int], int] | None = None
    policy = 0
    policies = POLICIES if p.jobs > 1 else 1  # one job leaves no choice
    for candidate in range(policies):
        found = _greedy(p, p.capacity, b, candidate, best[1] - 1 if best else 2**62)
        if found:
            best, policy = found, candidate
        if best and best[1] == least:
            break
    assert best is not None
    small = p.samples <= EXACT_SAMPLES
    search.begin(p, node_limit)
    if small:
        for slots in range(least, best[1]):
            answer = search.decide(slots, p.capacity, b)
            if answer is None:
                break
            if answer:
                best = (search.slot, slots)
                break
            least = slots + 1
    slot, slots = best
    # the balance: no capacity up to `refuted` can hold these slots, none up to `low` is worth another try
    m = p.multiple
    high = _max_load(p, slot, slots)
    refuted = max(p.longest, p.pad(-(-p.padded_total // slots))) - m
    low = refuted
    thorough = p.whole <= THOROUGH_SAMPLES
    step = m if thorough else max(m, high // 512)
    while high - low > step:
        middle = low + (high - low) // m // 2 * m
        b = bounds(p, middle)
        if b.slots > slots:
            refuted = low = middle
            continue
        found = None
        for candidate in range(policies) if thorough else (policy,):
            found = _greedy(p, middle, b, candidate, slots)
            if found:
                break
        if found is None and small:
            answer = search.decide(slots, middle, b)
            if answer:
                found = (search.slot, slots)
            elif answer is not None:
                refuted = low = middle
                continue
        if found is None:
            low = middle
            continue
        slot = found[0]
        high = _max_load(p, slot, slots)
    return _Solved(slot, slots, least, min(refuted + m, high))


def _smooth(p: Problem, slot: list[int], slots: int) -> None:
    """Move and swap samples between near slots, within what the gaps allow, while the sum of squares falls."""
    members: list[list[int]] = [[] for _ in range(slots)]
    for i, t in enumerate(slot):
        members[t].append(i)

    def shift(t: int, out: int, into: int) -> int:
        """Change of slot ``t``'s tokens when sample ``out`` leaves and ``into`` comes (-1: none)."""
        if p.multiple == 1:
            return (p.length_of[into] if into >= 0 else 0) - (p.length_of[out] if out >= 0 else 0)
        job_out = p.job_of[p.batch_of[out]] if out >= 0 else -1
        job_in = p.job_of[p.batch_of[into]] if into >= 0 else -1
        raw_out = raw_in = 0
        for i in members[t]:
            j = p.job_of[p.batch_of[i]]
            raw_out += p.length_of[i] if j == job_out else 0
            raw_in += p.length_of[i] if j == job_in else 0
        if job_out == job_in:
            return p.pad(raw_out - p.length_of[out] + p.length_of[into]) - p.pad(raw_out)
        change = p.pad(raw_out - p.length_of[out]) - p.pad(raw_out) if out >= 0 else 0
        return change + (p.pad(raw_in + p.length_of[into]) - p.pad(raw_in) if into >= 0 else 0)

    load = [0] * slots
    for t in range(slots):
        segments: dict[int, int] = {}
        for i in members[t]:
            j = p.job_of[p.batch_of[i]]
            segments[j] = segments.get(j, 0) + p.length_of[i]
        load[t] = sum(p.pad(raw) for raw in segments.values())
    batches = len(p.lengths)
    budget = SMOOTH_BUDGET
    for turn in range(SMOOTH_PASSES):
        # where a batch may lie: between its ends, and on into the room before the next (even turns) or after the last
        low, high = [slots] * batches, [-1] * batches
        for i, t in enumerate(slot):
            k = p.batch_of[i]
            low[k], high[k] = min(low[k], t), max(high[k], t)
        for j in range(p.jobs):
            first, end = p.first_batch[j], p.first_batch[j + 1]
            if turn % 2 == 0:
                for k in range(first, end):
                    high[k] = low[k + 1] - p.depth if k + 1 < end else slots - 1
            else:
                for k in range(end - 1, first - 1, -1):
                    low[k] = high[k - 1] + p.depth if k > first else 0
        changed = False
        for t in range(slots):
            if budget <= 0:
                return
            near = range(max(0, t - SMOOTH_WINDOW), min(slots, t + SMOOTH_WINDOW + 1))
            partners = sorted((load[u], u) for u in near if load[u] < load[t])[:SMOOTH_PARTNERS]
            for _, u in partners:
                a, c = load[t], load[u]
                best = a * a + c * c
                best_out = best_in = -1
                swaps = len(members[t]) * len(members[u]) <= SMOOTH_PAIRS
                for out in members[t]:
                    if not low[p.batch_of[out]] <= u <= high[p.batch_of[out]]:
                        continue
                    for into in (-1, *members[u]) if swaps else (-1,):
                        budget -= 1
                        if into >= 0 and not low[p.batch_of[into]] <= t <= high[p.batch_of[into]]:
                            continue
                        less = p.length_of[out] - (p.length_of[into] if into >= 0 else 0)
                        if less <= 0 or (p.multiple == 1 and less >= a - c):
                            continue
                        new_a, new_c = a + shift(t, out, into), c + shift(u, into, out)
                        if max(new_a, new_c) <= a and new_a * new_a + new_c * new_c < best:
                            best = new_a * new_a + new_c * new_c
                            best_out, best_in = out, into
                if best_out < 0:
                    continue
                load[t] += shift(t, best_out, best_in)
                load[u] += shift(u, best_in, best_out)
                members[t].remove(best_out)
                members[u].append(best_out)
                slot[best_out] = u
                if best_in >= 0:
                    members[u].remove(best_in)
                    members[t].append(best_in)
                    slot[best_in] = t
                changed = True
                break
        if not changed and turn % 2:
            return


def pack(
    lengths: list[int],
    job_ends: list[int],
    batch_sizes: list[int],
    capacity: int,
    depth: int,
    multiple: int,
    node_limit: int,
) -> Packing:
    """Slots of all samples. ``job_ends[j]`` is one past job ``j``'s last sample. The arguments are taken as checked."""
    p = Problem.build(lengths, job_ends, batch_sizes, capacity, depth, multiple)
    search = ExactSearch()
    if p.jobs > 1:
        solved = _solve(p, node_limit, search)
        slot = list(solved.slot)
        _smooth(p, slot, solved.slots)
        return Packing(slot, solved.slots, solved.lower_bound, solved.max_lower_bound, search.nodes)
    # one job: its batches can share no slot, so each is a problem of its own
    slot = [0] * p.samples
    batches = len(p.lengths)
    share = min(node_limit, max(500, node_limit // batches))
    t = least = floor = nodes = work = 0
    for k in range(batches):
        solved = _solve(p.only(k), share, search)
        nodes += search.nodes
        gap = depth - 1 if k else 0
        t += gap
        for i, u in zip(sorted(p.items[k]), solved.slot, strict=True):
            slot[i] = t + u
        t += solved.slots
        work += solved.slots
        least += gap + solved.lower_bound
        floor = max(floor, solved.max_lower_bound)
    if least < t:  # a batch may then need fewer slots and leave them to another: only the plain bound holds for all
        floor = max(p.longest, p.pad(-(-p.padded_total // work)))
    _smooth(p, slot, t)
    return Packing(slot, t, least, floor, nodes)
