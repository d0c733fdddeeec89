"""lowmem.sched.pack_microbatches: the rules, the optimum, the two implementations, bad input."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.sched import Schedule, pack, pack_microbatches
from lowmem.sched import _reference as reference
from lowmem.sched._exact import ExactSearch
from lowmem.sched._problem import Problem, bounds

compiled_serves = pack._host is not None and pack._dispatch.REQUESTED != "reference"
needs_host = pytest.mark.skipif(not compiled_serves, reason="lowmem/_host is not built, or LOWMEM_BACKEND=reference")


def lognormal(jobs, samples, seed=0):
    rng = np.random.default_rng(seed)
    return [np.clip(rng.lognormal(6.5, 0.8, samples), 16, 4096).astype(np.int64) for _ in range(jobs)]


@st.composite
def problems(draw, most_jobs=5, most_samples=20):
    """Arguments of pack_microbatches: any capacity, padding and gap; equal and full-size samples are common."""
    capacity = draw(st.integers(1, 64))
    multiple = draw(st.sampled_from([1, 1, 2, 3, 8]).filter(lambda m: m <= capacity))
    room = capacity // multiple * multiple
    length = st.one_of(st.integers(1, room), st.integers(1, max(1, room // 4)), st.just(room))
    jobs = draw(st.integers(1, most_jobs))
    lengths = [draw(st.lists(length, min_size=1, max_size=most_samples)) for _ in range(jobs)]
    sizes = [draw(st.integers(1, 8)) for _ in range(jobs)]
    kwargs = {"global_batch_size": sizes, "pipeline_depth": draw(st.integers(1, 5)), "padding_multiple": multiple}
    return lengths, capacity, kwargs


def same(a: Schedule, b: Schedule) -> None:
    for field in dataclasses.fields(Schedule):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and np.array_equal(x, y), field.name
        elif field.name in ("lengths", "steps"):
            assert [part.tolist() for part in x] == [part.tolist() for part in y], field.name
        else:
            assert x == y, field.name


# ---------------------------------------------------------------------------------------------------------- the rules


@given(problems())
def test_every_schedule_keeps_the_rules(problem):
    lengths, capacity, kwargs = problem
    s = pack_microbatches(lengths, capacity, node_limit=2000, **kwargs)
    s.validate()
    assert s.stats.lower_bound * capacity >= s.stats.tokens
    placed = sorted((j, i) for m in s for j, i in zip(m.job_ids.tolist(), m.sample_ids.tolist(), strict=True))
    assert placed == [(j, i) for j, part in enumerate(lengths) for i in range(len(part))]


@given(problems())
def test_microbatches_are_laid_out_for_the_kernels(problem):
    lengths, capacity, kwargs = problem
    s = pack_microbatches(lengths, capacity, node_limit=0, **kwargs)
    multiple = kwargs["padding_multiple"]
    for m in s:
        assert m.cu_seqlens.dtype == m.job_cu_seqlens.dtype == np.int32
        assert m.cu_seqlens[-1] == m.job_cu_seqlens[-1] == m.tokens <= capacity
        assert m.cu_seqlens[:-1].tolist() == m.starts.tolist()
        for j, part in enumerate(lengths):
            rows = int(m.job_cu_seqlens[j + 1] - m.job_cu_seqlens[j])
            mine = [part[i] for i in m.sample_ids[m.job_ids == j]]
            assert rows == -(-sum(mine) // multiple) * multiple
            low = int(m.job_cu_seqlens[j])
            for start, length in zip(m.starts[m.job_ids == j].tolist(), mine, strict=True):
                assert start == low
                low += length


@given(problems())
def test_accumulating_along_the_schedule_gives_each_global_batch_its_own_sum(problem):
    # the gradient of a sample is a number of its own; every optimizer step must see exactly its batch's sum
    lengths, capacity, kwargs = problem
    s = pack_microbatches(lengths, capacity, node_limit=500, **kwargs)
    gradient = {(j, i): 10**6 * j + i + 1 for j, part in enumerate(lengths) for i in range(len(part))}
    held = [0] * len(lengths)
    stepped = [[] for _ in lengths]
    version_at: list[list[int]] = []
    for t, m in enumerate(s):
        version_at.append([len(steps) for steps in stepped])
        for j, i in zip(m.job_ids.tolist(), m.sample_ids.tolist(), strict=True):
            # with `depth` stages the weights in use are those after the steps of microbatches up to t - depth
            seen = version_at[max(0, t - kwargs["pipeline_depth"] + 1)][j]
            assert seen == i // kwargs["global_batch_size"][j]
            held[j] += gradient[j, i]
        for j in s.stepping_after(t):
            stepped[j].append(held[j])
            held[j] = 0
    for j, part in enumerate(lengths):
        size = kwargs["global_batch_size"][j]
        expected = [sum(gradient[j, i] for i in range(b, min(b + size, len(part)))) for b in range(0, len(part), size)]
        assert stepped[j] == expected


def test_sequence_protocol_and_read_only_arrays():
    s = pack_microbatches([[5, 5, 5], [4]], 10, global_batch_size=2)
    assert len(s) == s.stats.microbatches == len(list(s)) == len(s[:])
    assert s[-1].sample_ids.tolist() == s[len(s) - 1].sample_ids.tolist()
    assert sum(len(m) for m in s) == 4
    with pytest.raises(IndexError):
        s[len(s)]
    for array in (
        s.job_ids,
        s.sample_ids,
        s.sample_lengths,
        s.sample_starts,
        s.offsets,
        s.tokens,
        *s.steps,
        *s.lengths,
    ):
        with pytest.raises(ValueError):
            array[0] = 1


def corrupted(s: Schedule):
    """(what is wrong, a schedule with it) for every rule that validate checks."""

    def edit(name, change):
        array = getattr(s, name).copy()
        change(array)
        return dataclasses.replace(s, **{name: array})

    yield "is there once", edit("sample_ids", lambda a: a.__setitem__(slice(0, 2), a[0]))
    yield "exists", edit("sample_ids", lambda a: a.__setitem__(0, 99))
    yield "has its length", edit("sample_lengths", lambda a: a.__setitem__(0, a[0] + 1))
    turned = [
        edit(name, lambda a: a.__setitem__(slice(0, 2), a[1::-1].copy())) for name in ("sample_ids", "sample_lengths")
    ]
    yield "sorted", dataclasses.replace(turned[0], sample_lengths=turned[1].sample_lengths)
    yield "starts at row", edit("sample_starts", lambda a: a.__setitem__(1, a[1] + 1))
    yield "rows", edit("tokens", lambda a: a.__setitem__(0, a[0] + 1))
    yield "offsets", edit("offsets", lambda a: a.__setitem__(-1, a[-1] - 1))
    yield "int64", dataclasses.replace(s, job_ids=s.job_ids.astype(np.int32))
    yield "capacity", dataclasses.replace(s, capacity=int(s.tokens.max()) - 1)
    yield "one global batch", dataclasses.replace(s, global_batch_size=(1,) * len(s.lengths))
    yield "or more behind", dataclasses.replace(s, pipeline_depth=s.pipeline_depth + 50)
    yield "steps of job 0", dataclasses.replace(s, steps=(s.steps[0] + 1, *s.steps[1:]))
    yield "steps has", dataclasses.replace(s, steps=s.steps[:-1])
    for field, rule in {
        "microbatches": "count",
        "empty": "count",
        "tokens": "tokens right",
        "padding_tokens": "tokens right",
        "utilisation": "utilisation",
        "max_tokens": "fullest",
        "lower_bound": "bound on the slots",
        "max_tokens_lower_bound": "bound on the balance",
    }.items():
        stats = dataclasses.replace(s.stats, **{field: getattr(s.stats, field) + 100})
        yield rule, dataclasses.replace(s, stats=stats)
    yield "bound on the slots", dataclasses.replace(s, stats=dataclasses.replace(s.stats, optimal=not s.stats.optimal))


def test_validate_finds_every_kind_of_fault():
    s = pack_microbatches([[3, 2, 4, 3, 2, 4], [5, 1, 5, 1]], 12, global_batch_size=[3, 2], pipeline_depth=2)
    s.validate()
    assert len(s[0]) >= 2 and s[0].job_ids[0] == s[0].job_ids[1] == 0
    faults = list(corrupted(s))
    assert len(faults) == 22
    for rule, bad in faults:
        with pytest.raises(ValueError, match=r"lowmem\.Schedule\.validate: .*" + rule):
            bad.validate()


# -------------------------------------------------------------------------------------------------------- the optimum


def brute_force(lengths, capacity, kwargs):
    """(fewest slots, then the smallest fullest slot) by trying every set in every slot; knows no bound and no order."""
    sizes, depth, multiple = kwargs["global_batch_size"], kwargs["pipeline_depth"], kwargs["padding_multiple"]
    samples = [(j, i // sizes[j], length) for j, part in enumerate(lengths) for i, length in enumerate(part)]

    def rows(chosen):
        per_job = [sum(samples[n][2] for n in chosen if samples[n][0] == j) for j in range(len(lengths))]
        return sum(-(-raw // multiple) * multiple for raw in per_job)

    start = (frozenset(range(len(samples))), (0,) * len(lengths))  # samples left, slots to wait per job
    front, slots = {start: 0}, 0  # state -> the smallest fullest slot that leads to it
    while not any(not left for left, _ in front):
        following = {}
        for (left, wait), fullest in front.items():
            offered = []
            for j in range(len(lengths)):
                mine = [n for n in left if samples[n][0] == j]
                if mine and not wait[j]:
                    now = min(samples[n][1] for n in mine)
                    offered += [n for n in mine if samples[n][1] == now]
            for count in range(len(offered) + 1):
                for chosen in itertools.combinations(offered, count):
                    load = rows(chosen)
                    if load > capacity:
                        continue
                    rest = left - set(chosen)
                    waits = []
                    for j in range(len(lengths)):
                        ended = {samples[n][1] for n in chosen if samples[n][0] == j}
                        ended -= {samples[n][1] for n in rest if samples[n][0] == j}
                        waits.append(depth - 1 if ended else max(0, wait[j] - 1))
                    state = (rest, tuple(waits))
                    following[state] = min(following.get(state, capacity), max(fullest, load))
        front, slots = following, slots + 1
    return slots, min(fullest for (left, _), fullest in front.items() if not left)


def milp_optimum(lengths, capacity, kwargs):
    """The same two numbers from scipy's HiGHS: x[i, t], whole multiples s[j, t], one program for each."""
    optimize = pytest.importorskip("scipy.optimize")
    sizes, depth, multiple = kwargs["global_batch_size"], kwargs["pipeline_depth"], kwargs["padding_multiple"]
    samples = [(j, i // sizes[j], length) for j, part in enumerate(lengths) for i, length in enumerate(part)]
    jobs, n = len(lengths), len(samples)
    horizon = n + sum(-(-len(part) // size) for part, size in zip(lengths, sizes, strict=True)) * (depth - 1)

    def solve(slots, balance):
        x = lambda i, t: i * slots + t  # noqa: E731
        s = lambda j, t: n * slots + j * slots + t  # noqa: E731
        z = (n + jobs) * slots
        a, low, high = [], [], []

        def add(terms, at_least, at_most):
            row = np.zeros(z + 1)
            for index, value in terms:
                row[index] += value
            a.append(row)
            low.append(at_least)
            high.append(at_most)

        for i in range(n):
            add([(x(i, t), 1) for t in range(slots)], 1, 1)
        for t in range(slots):
            for j in range(jobs):
                own = [(x(i, t), samples[i][2]) for i in range(n) if samples[i][0] == j]
                add([*own, (s(j, t), -multiple)], -np.inf, 0)
            segments = [(s(j, t), multiple) for j in range(jobs)]
            add(segments, 0, capacity)
            if balance:
                add([*segments, (z, -1)], -np.inf, 0)
        for i, k in itertools.permutations(range(n), 2):
            if samples[i][0] == samples[k][0] and samples[k][1] == samples[i][1] + 1:
                later = [(x(k, t), t) for t in range(slots)] + [(x(i, t), -t) for t in range(slots)]
                add(later, depth, np.inf)
        if not balance:
            for i in range(n):
                add([(z, 1)] + [(x(i, t), -t) for t in range(slots)], 1, np.inf)
        cost = np.zeros(z + 1)
        cost[z] = 1
        upper = np.full(z + 1, np.inf)
        upper[: n * slots] = 1
        found = optimize.milp(
            cost,
            constraints=optimize.LinearConstraint(np.array(a), low, high),
            integrality=np.ones(z + 1),
            bounds=optimize.Bounds(0, upper),
        )
        assert found.status == 0, found.message
        return round(found.fun)

    slots = solve(horizon, False)
    return slots, solve(slots, True)


def small_problem(rng, most_samples):
    jobs = int(rng.integers(1, 4))
    capacity = int(rng.integers(4, 24))
    multiple = int(rng.choice([1, 1, 2, 3]))
    room = capacity // multiple * multiple
    counts = rng.multinomial(int(rng.integers(jobs, most_samples + 1)) - jobs, [1 / jobs] * jobs) + 1
    lengths = [rng.integers(1, room + 1, count).tolist() for count in counts]
    sizes = rng.integers(1, 6, jobs).tolist()
    kwargs = {"global_batch_size": sizes, "pipeline_depth": int(rng.integers(1, 4)), "padding_multiple": multiple}
    return lengths, capacity, kwargs


def check_optimum(problem, optimum):
    lengths, capacity, kwargs = problem
    s = pack_microbatches(lengths, capacity, **kwargs)
    s.validate()
    assert s.stats.optimal, problem
    assert (s.stats.microbatches, s.stats.max_tokens) == optimum, problem
    assert s.stats.balance_optimal, problem


@pytest.mark.parametrize("seed", range(60))
def test_optimum_against_brute_force(seed):
    problem = small_problem(np.random.default_rng(seed), 7)
    check_optimum(problem, brute_force(*problem))


@pytest.mark.parametrize("seed", range(30))
def test_optimum_against_milp(seed):
    problem = small_problem(np.random.default_rng(1000 + seed), 10)
    check_optimum(problem, milp_optimum(*problem))


def staggered_problem(seed):
    """Two or three jobs of several global batches, with gaps."""
    rng = np.random.default_rng(seed)
    _, capacity, _ = rng.integers(1, 4), int(rng.integers(4, 24)), rng.integers(1, 5)
    depth, jobs = int(rng.integers(2, 5)), int(rng.integers(2, 4))
    lengths = [rng.integers(1, capacity + 1, count).tolist() for count in rng.integers(1, 5, jobs)]
    sizes = rng.integers(1, 4, jobs).tolist()
    return lengths, capacity, {"global_batch_size": sizes, "pipeline_depth": depth, "padding_multiple": 1}


def draws_the_line(problem):
    """The exact search says yes at the optimum and no just beyond it, asked directly."""
    lengths, capacity, kwargs = problem
    slots, fullest = brute_force(lengths, capacity, kwargs)
    flat, ends = sum(lengths, []), np.cumsum([len(part) for part in lengths]).tolist()
    depth, multiple = kwargs["pipeline_depth"], kwargs["padding_multiple"]
    p = Problem.build(flat, ends, kwargs["global_batch_size"], capacity, depth, multiple)
    search = ExactSearch()
    search.begin(p, 10**6)
    assert search.decide(slots, p.capacity, bounds(p, p.capacity))
    assert search.decide(slots, fullest, bounds(p, fullest))
    assert max(search.slot) + 1 == slots
    if fullest - multiple >= p.longest:
        assert search.decide(slots, fullest - multiple, bounds(p, fullest - multiple)) is False
    assert search.decide(slots - 1, p.capacity, bounds(p, p.capacity)) is False
    assert bounds(p, p.capacity).slots <= slots


@pytest.mark.parametrize("seed", range(100))
def test_exact_search_alone_draws_the_line(seed):
    # within pack_microbatches a bound or a greedy order often answers first
    draws_the_line(small_problem(np.random.default_rng(2000 + seed), 7))


# In the first row a memory of failed states that forgets how long jobs must wait is wrong; in the second, a search that
# takes no microbatch which the shortest sample left out misses by one token.
@pytest.mark.parametrize("seed", [28, 43, 107, 131, 153, 415, 460, 480] + [44, 53, 85, 112, 127, 150, 188, 241])
def test_exact_search_where_waits_and_single_tokens_decide(seed):
    draws_the_line(staggered_problem(seed))


def hard(seed, jobs=3, samples=8):
    """Two or three samples a microbatch: neither the bounds nor the greedy orders settle these."""
    rng = np.random.default_rng(seed)
    return [rng.integers(20, 50, samples).tolist() for _ in range(jobs)]


@pytest.mark.parametrize("seed", range(10))
def test_exact_search_on_hard_problems(seed):
    for depth, size in [(1, 8), (1, 3), (2, 4)]:
        s = pack_microbatches(hard(seed), 100, global_batch_size=size, pipeline_depth=depth)
        s.validate()
        assert s.stats.optimal or s.stats.nodes >= 200_000


def test_exact_search_beats_every_greedy_order():
    # first fit and its like need 4 bins for these, 3 are enough: 100 = 44 + 32 + 24 = 42 + 34 + 24 = 40 + 35 + 25
    s = pack_microbatches([[44, 42, 40, 35, 34], [32, 25, 24, 24]], 100, global_batch_size=9)
    assert s.stats.microbatches == 3 and s.tokens.tolist() == [100, 100, 100]
    found = 0
    for seed in range(200):
        lengths, capacity, kwargs = small_problem(np.random.default_rng(seed), 14)
        without = pack_microbatches(lengths, capacity, node_limit=0, **kwargs).stats
        exact = pack_microbatches(lengths, capacity, **kwargs).stats
        assert (exact.microbatches, exact.max_tokens) <= (without.microbatches, without.max_tokens)
        assert without.lower_bound <= exact.lower_bound <= exact.microbatches and exact.optimal
        found += (exact.microbatches, exact.max_tokens) < (without.microbatches, without.max_tokens)
    assert found >= 3  # else the comparison above says nothing


# -------------------------------------------------------------------------------------------------- shape of a schedule


@pytest.mark.parametrize("jobs,depth", [(2, 2), (4, 4), (6, 4), (8, 8)])
def test_jobs_fill_each_others_gaps(jobs, depth):
    # a job's batch fills one microbatch: alone it waits depth - 1 slots after each, together the others fill them
    lengths = [[10] * 12 for _ in range(jobs)]
    together = pack_microbatches(lengths, 20, global_batch_size=2, pipeline_depth=depth)
    together.validate()
    assert together.stats.empty == 0 and together.stats.optimal and together.stats.utilisation == 1
    alone = pack_microbatches(lengths[:1], 20, global_batch_size=2, pipeline_depth=depth)
    assert alone.stats.empty == 5 * (depth - 1) and alone.stats.optimal


def test_a_batchs_tail_shares_a_microbatch_with_other_jobs():
    # 1.25 microbatches a batch: packed one by one each would take two
    lengths = [[5] * 20 for _ in range(4)]
    s = pack_microbatches(lengths, 20, global_batch_size=5)
    assert s.stats.microbatches == 20 and s.stats.optimal and (s.tokens == 20).all()


def test_microbatches_are_equal_when_nothing_forces_them_apart():
    s = pack_microbatches([[1] * 41, [1] * 41], 20, global_batch_size=41)
    assert s.stats.microbatches == 5 and sorted(s.tokens.tolist()) == [16, 16, 16, 17, 17]
    one = pack_microbatches([[1] * 24 * 3], 20, global_batch_size=24)
    assert one.tokens.tolist() == [12] * 6


def test_squares_fall_below_what_the_fullest_alone_asks():
    # the 19 fixes the fullest microbatch; the rest is still spread evenly
    s = pack_microbatches([[19], [1] * 15, [1] * 15], 20, global_batch_size=15)
    assert s.stats.microbatches == 3 and sorted(s.tokens.tolist()) == [15, 15, 19]


def test_large_problems_come_close_to_the_bound():
    for jobs, size, depth in [(4, 32, 1), (4, 32, 4), (1, 256, 1), (8, 16, 4)]:
        s = pack_microbatches(lognormal(jobs, 16384 // jobs), 16384, global_batch_size=size, pipeline_depth=depth)
        s.validate()
        assert s.stats.microbatches <= 1.01 * s.stats.lower_bound, s.stats


@needs_host
def test_hundred_thousand_samples_in_a_second():
    lengths = lognormal(4, 25_000)
    took = []
    for _ in range(3):  # the best of three: other processes share this machine
        start = time.perf_counter()
        s = pack_microbatches(lengths, 16384, global_batch_size=32, pipeline_depth=4)
        took.append(time.perf_counter() - start)
    s.validate()
    assert min(took) < 1.0
    assert s.stats.utilisation > 0.99


# -------------------------------------------------------------------------------------------------- two implementations


@needs_host
@given(problems(), st.sampled_from([0, 30, 1500]))
def test_plain_python_gives_the_same_bits(problem, node_limit):
    lengths, capacity, kwargs = problem
    host = pack._host
    try:
        compiled = pack_microbatches(lengths, capacity, node_limit=node_limit, **kwargs)
        pack._host = None
        plain = pack_microbatches(lengths, capacity, node_limit=node_limit, **kwargs)
    finally:
        pack._host = host
    same(compiled, plain)


@needs_host
@pytest.mark.parametrize(
    "jobs,samples,size,depth,multiple", [(4, 1500, 16, 4, 1), (1, 3000, 32, 1, 1), (40, 150, 8, 2, 64)]
)
def test_plain_python_gives_the_same_bits_at_size(monkeypatch, jobs, samples, size, depth, multiple):
    lengths = lognormal(jobs, samples, seed=3)
    kwargs = {"global_batch_size": size, "pipeline_depth": depth, "padding_multiple": multiple, "node_limit": 20_000}
    compiled = pack_microbatches(lengths, 8192, **kwargs)
    monkeypatch.setattr(pack, "_host", None)
    same(compiled, pack_microbatches(lengths, 8192, **kwargs))


@needs_host
def test_the_compiled_packer_is_the_one_that_runs(monkeypatch):
    monkeypatch.setattr(reference, "pack", None)
    pack_microbatches([[1, 2]], 3, global_batch_size=1)
    monkeypatch.setattr(pack._dispatch, "REQUESTED", "reference")
    with pytest.raises(TypeError):
        pack_microbatches([[1, 2]], 3, global_batch_size=1)


@needs_host
def test_the_compiled_packer_refuses_what_would_read_past_its_arrays():
    good = [np.array([3, 4]), np.array([2]), np.array([1]), 10, 1, 1, 0]
    pack._host.pack(*good)
    bad = {0: [np.array([3, 40]), np.array([0, 4])], 1: [np.array([3]), np.array([1]), np.array([], np.int64)]}
    bad |= {2: [np.array([0]), np.array([3]), np.array([1, 1])], 3: [0, 2**31], 4: [0, 1025], 5: [0, 11]}
    for place, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match="break the rules"):
                pack._host.pack(*good[:place], value, *good[place + 1 :])


def test_same_arguments_same_schedule():
    lengths = lognormal(3, 400)
    same(*(pack_microbatches(lengths, 8192, global_batch_size=16, pipeline_depth=2) for _ in range(2)))


# ------------------------------------------------------------------------------------------------------------- inputs


def test_lists_arrays_and_tensors_are_the_same():
    lists = [[3, 4, 5], [2, 2]]
    expected = pack_microbatches(lists, 8, global_batch_size=2)
    for make in (tuple, np.array, lambda a: np.array(a, np.uint8), torch.tensor, lambda a: [np.int32(v) for v in a]):
        same(expected, pack_microbatches([make(part) for part in lists], 8, global_batch_size=(2, 2)))
    same(expected, pack_microbatches(lists, np.int32(8), global_batch_size=np.array(2)))
    square = np.array([[3, 4], [5, 2]])
    same(pack_microbatches(square.tolist(), 8, global_batch_size=2), pack_microbatches(square, 8, global_batch_size=2))


def test_the_callers_array_may_change_afterwards():
    lengths = np.array([3, 4])
    s = pack_microbatches([lengths], 8, global_batch_size=2)
    lengths[0] = 7
    s.validate()


def test_smallest_and_largest():
    one = pack_microbatches([[1]], 1, global_batch_size=1)
    one.validate()
    assert one.steps[0].tolist() == [0] and one.stats.utilisation == 1 and one[0].cu_seqlens.tolist() == [0, 1]
    most = 2**31 - 1
    big = pack_microbatches(
        [[most, most, 1], [most - 1, most // 2]], most, global_batch_size=2**40, pipeline_depth=1024
    )
    big.validate()
    assert big.stats.microbatches == 4 and big.stats.optimal
    padded = pack_microbatches([[1, 1], [1]], 7, global_batch_size=1, padding_multiple=3)  # 6 rows of 7 can be used
    padded.validate()
    assert padded.tokens.tolist() == [6, 3] and padded.stats.padding_tokens == 6


E = "lowmem.pack_microbatches: "
SIZE = {"global_batch_size": 1}
BAD = [
    ("zero jobs", [], 8, SIZE, ValueError, "lengths_by_job: expected at least one job, got none"),
    (
        "empty job",
        [[1], []],
        8,
        SIZE,
        ValueError,
        r"lengths_by_job\[1\]: expected at least one sample, got an empty job",
    ),
    ("no sequence", 5, 8, SIZE, TypeError, "lengths_by_job: expected a sequence of jobs, .*got int"),
    (
        "one flat job",
        [5, 6],
        8,
        SIZE,
        TypeError,
        r"lengths_by_job\[0\]: expected a sequence of sample lengths, got int",
    ),
    ("a dict", {"a": [1]}, 8, SIZE, TypeError, "lengths_by_job: expected a sequence of jobs, .*got dict"),
    ("text", ["12"], 8, SIZE, TypeError, r"lengths_by_job\[0\]: expected a sequence of sample lengths, got str"),
    ("zero length", [[3, 0]], 8, SIZE, ValueError, r"lengths_by_job\[0\]\[1\]: expected a length of at least 1, got 0"),
    ("negative", [[3], [2, -4]], 8, SIZE, ValueError, r"lengths_by_job\[1\]\[1\]: expected .* at least 1, got -4"),
    ("a float", [[3.0, 2]], 8, SIZE, TypeError, r"lengths_by_job\[0\]: expected integer lengths, got 3\.0"),
    ("NaN", [[3, float("nan")]], 8, SIZE, TypeError, r"lengths_by_job\[0\]: expected integer lengths, got nan"),
    ("infinity", [[float("inf")]], 8, SIZE, TypeError, r"lengths_by_job\[0\]: expected integer lengths, got inf"),
    (
        "float array",
        [np.array([1.5])],
        8,
        SIZE,
        TypeError,
        r"lengths_by_job\[0\]: expected integer lengths, got .*1\.5",
    ),
    ("bools", [[True, True]], 8, SIZE, TypeError, r"lengths_by_job\[0\]: expected integer lengths, got True"),
    ("one bool", [[3, True]], 8, SIZE, TypeError, r"lengths_by_job\[0\]: expected integer lengths, got True"),
    (
        "bool array",
        [np.array([True])],
        8,
        SIZE,
        TypeError,
        r"lengths_by_job\[0\]: expected integer lengths, got np.True_",
    ),
    (
        "bf16",
        [torch.ones(2).bfloat16()],
        8,
        SIZE,
        TypeError,
        r"lengths_by_job\[0\]: expected integer lengths .*, got Tensor",
    ),
    ("gradient", [torch.ones(2, requires_grad=True)], 8, SIZE, TypeError, r"expected integer lengths .*, got Tensor"),
    ("no dimension", [np.array(3)], 8, SIZE, TypeError, r"\[0\]: expected a sequence of sample lengths, got ndarray"),
    ("mixed giants", [[2**63, -1]], 8, SIZE, ValueError, r"lengths_by_job\[0\]\[1\]: .* at least 1, got -1"),
    ("None", [[None]], 8, SIZE, TypeError, r"lengths_by_job\[0\]: expected integer lengths, got None"),
    ("nested", [[[1, 2]]], 8, SIZE, TypeError, r"lengths_by_job\[0\]: expected a flat sequence .*, got a nested one"),
    (
        "ragged",
        [[[1], [1, 2]]],
        8,
        SIZE,
        TypeError,
        r"lengths_by_job\[0\]: expected a flat sequence .*, got a nested one",
    ),
    (
        "too long",
        [[3, 9]],
        8,
        SIZE,
        ValueError,
        r"lengths_by_job\[0\]\[1\]: expected .* the capacity, 8, got 9 \(raise",
    ),
    (
        "beyond int64",
        [[2**70]],
        8,
        SIZE,
        ValueError,
        r"lengths_by_job\[0\]\[0\]: expected .* the capacity, 8, got 1180",
    ),
    ("beyond a signed int64", [[2**63]], 8, SIZE, ValueError, r"the capacity, 8, got 9223372036854775808"),
    ("zero capacity", [[1]], 0, SIZE, ValueError, "capacity: expected an integer from 1 to 2147483647, got 0"),
    ("negative capacity", [[1]], -5, SIZE, ValueError, "capacity: expected an integer from 1 to 2147483647, got -5"),
    (
        "huge capacity",
        [[1]],
        2**31,
        SIZE,
        ValueError,
        "capacity: expected an integer from 1 to 2147483647, got 2147483648",
    ),
    ("float capacity", [[1]], 8.0, SIZE, TypeError, r"capacity: expected an integer .*, got 8\.0"),
    ("NaN capacity", [[1]], float("nan"), SIZE, TypeError, "capacity: expected an integer .*, got nan"),
    ("bool capacity", [[1]], True, SIZE, TypeError, "capacity: expected an integer .*, got True"),
    (
        "zero batch",
        [[1]],
        8,
        {"global_batch_size": 0},
        ValueError,
        "global_batch_size: expected an integer of .*1, got 0",
    ),
    ("NaN batch", [[1]], 8, {"global_batch_size": float("nan")}, TypeError, "global_batch_size: expected .*, got nan"),
    ("zero in a list", [[1], [1]], 8, {"global_batch_size": [1, 0]}, ValueError, r"global_batch_size\[1\]: .*, got 0"),
    (
        "too few sizes",
        [[1], [1]],
        8,
        {"global_batch_size": [1]},
        ValueError,
        r"expected one size, or 2 .*, got 1 sizes",
    ),
    ("depth 0", [[1]], 8, {**SIZE, "pipeline_depth": 0}, ValueError, "pipeline_depth: expected .* 1 to 1024, got 0"),
    ("deep", [[1]], 8, {**SIZE, "pipeline_depth": 1025}, ValueError, "pipeline_depth: expected .* 1 to 1024, got 1025"),
    ("padding 0", [[1]], 8, {**SIZE, "padding_multiple": 0}, ValueError, "padding_multiple: expected .* 1 to 8, got 0"),
    (
        "wide padding",
        [[1]],
        8,
        {**SIZE, "padding_multiple": 9},
        ValueError,
        "padding_multiple: expected .* to 8, got 9",
    ),
    ("no room", [[7]], 8, {**SIZE, "padding_multiple": 3}, ValueError, r"capacity, 6 \(a multiple of .*=3\), got 7"),
    (
        "nodes",
        [[1]],
        8,
        {**SIZE, "node_limit": -1},
        ValueError,
        "node_limit: expected an integer of at least 0, got -1",
    ),
]


@pytest.mark.parametrize("lengths,capacity,kwargs,kind,message", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(lengths, capacity, kwargs, kind, message):
    with pytest.raises(kind, match="^" + E.replace(".", r"\.") + ".*" + message):
        pack_microbatches(lengths, capacity, **kwargs)


def test_the_batch_size_must_be_said():
    with pytest.raises(TypeError, match="global_batch_size"):
        pack_microbatches([[1]], 8)
