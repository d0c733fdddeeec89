#include "problem.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

namespace lowmem::host {

void Problem::finish() {
  samples = static_cast<Int>(length_of.size());
  jobs = static_cast<Int>(first_batch.size()) - 1;
  totals.clear();
  padded_total = 0;
  for (const Ints& batch : lengths) {
    totals.push_back(std::accumulate(batch.begin(), batch.end(), Int{0}));
    padded_total += pad(totals.back());
  }
  sorted = length_of;
  std::sort(sorted.begin(), sorted.end(), std::greater<Int>());
  longest = pad(sorted.front());
}

Problem Problem::build(const Int* lengths, Int samples, const Ints& job_ends, const Ints& batch_sizes, Int capacity,
                       Int depth, Int multiple) {
  Problem p;
  p.capacity = capacity / multiple * multiple;
  p.depth = depth;
  p.multiple = multiple;
  p.whole = samples;
  p.length_of.assign(lengths, lengths + samples);
  p.batch_of.resize(samples);
  p.first_batch.push_back(0);
  Int start = 0;
  for (size_t j = 0; j < job_ends.size(); ++j) {
    for (Int low = start; low < job_ends[j]; low += batch_sizes[j]) {
      Ints batch(std::min(batch_sizes[j], job_ends[j] - low));
      std::iota(batch.begin(), batch.end(), low);
      for (Int i : batch) p.batch_of[i] = p.batches();
      std::sort(batch.begin(), batch.end(),
                [&](Int a, Int b) { return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a < b; });
      Ints sizes;
      sizes.reserve(batch.size());
      for (Int i : batch) sizes.push_back(lengths[i]);
      p.items.push_back(std::move(batch));
      p.lengths.push_back(std::move(sizes));
      p.job_of.push_back(static_cast<Int>(j));
    }
    p.first_batch.push_back(p.batches());
    start = job_ends[j];
  }
  p.finish();
  return p;
}

Problem Problem::only(Int k) const {
  Problem p;
  p.capacity = capacity;
  p.multiple = multiple;
  p.whole = whole;
  const size_t n = items[k].size();
  Ints order = items[k];
  std::sort(order.begin(), order.end());
  for (Int i : order) p.length_of.push_back(length_of[i]);
  Ints places;
  for (Int i : items[k]) places.push_back(std::lower_bound(order.begin(), order.end(), i) - order.begin());
  p.batch_of.assign(n, 0);
  p.items.push_back(std::move(places));
  p.lengths.push_back(lengths[k]);
  p.job_of = {0};
  p.first_batch = {0, 1};
  p.finish();
  return p;
}

Int bins(const Ints& lengths, Int capacity) {
  const Int n = static_cast<Int>(lengths.size());
  const Int total = std::accumulate(lengths.begin(), lengths.end(), Int{0});
  Int halves = 0;  // samples above half the capacity
  Int fits = 0;    // tokens of those that leave room for a sample of length `small`
  while (halves < n && 2 * lengths[halves] > capacity) fits += lengths[halves++];
  Int best = std::max(halves, ceil_div(total, capacity));
  const Int top = halves < n ? lengths[halves] : 0;
  Int lone = 0;  // those that leave no such room
  while (lone < halves && lengths[lone] > capacity - top) fits -= lengths[lone++];
  Int rest = 0;
  for (Int i = halves; i < n;) {
    const Int small = lengths[i];
    while (lone > 0 && lengths[lone - 1] <= capacity - small) fits += lengths[--lone];
    for (; i < n && lengths[i] == small; ++i) rest += small;
    const Int spill = rest - ((halves - lone) * capacity - fits);
    if (spill > 0) best = std::max(best, halves + ceil_div(spill, capacity));
  }
  return best;
}

namespace {

// Slots needed when every batch's work is divisible: each slot serves, of what is released, the longest tail first.
Int one_machine(const Ints& head, const Ints& after, const Ints& work, Int per_slot) {
  Ints order;
  for (size_t k = 0; k < work.size(); ++k) {
    if (work[k]) order.push_back(static_cast<Int>(k));
  }
  std::stable_sort(order.begin(), order.end(), [&](Int a, Int b) { return head[a] < head[b]; });
  Ints left = work;
  using Entry = std::pair<Int, Int>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> heap;
  Int t = 0, best = 0;
  size_t i = 0;
  while (i < order.size() || !heap.empty()) {
    if (heap.empty()) t = std::max(t, head[order[i]]);
    for (; i < order.size() && head[order[i]] <= t; ++i) heap.push({-after[order[i]], order[i]});
    Int room = per_slot;
    while (!heap.empty() && room) {
      const Int k = heap.top().second;
      const Int take = std::min(room, left[k]);
      room -= take;
      left[k] -= take;
      if (!left[k]) {
        heap.pop();
        best = std::max(best, t + 1 + after[k]);
      }
    }
    ++t;
  }
  return best;
}

}  // namespace

Bounds bounds(const Problem& p, Int capacity) {
  const Int batches = p.batches();
  Bounds b;
  b.least.resize(batches);
  b.after.assign(batches, 0);
  Ints head(batches, 0);
  for (Int k = 0; k < batches; ++k) {
    b.least[k] = std::max(bins(p.lengths[k], capacity), ceil_div(p.pad(p.totals[k]), capacity));
  }
  b.slots = bins(p.sorted, capacity);
  for (Int j = 0; j < p.jobs; ++j) {
    const Int first = p.first_batch[j], end = p.first_batch[j + 1];
    for (Int k = first + 1; k < end; ++k) head[k] = head[k - 1] + b.least[k - 1] - 1 + p.depth;
    for (Int k = end - 2; k >= first; --k) b.after[k] = p.depth + b.least[k + 1] - 1 + b.after[k + 1];
    b.slots = std::max(b.slots, b.least[first] + b.after[first]);
  }
  if (p.jobs > 1) {
    Ints padded(batches), half(batches, 0), third(batches, 0);
    const Int small = capacity / 3 + 1;
    for (Int k = 0; k < batches; ++k) {
      padded[k] = p.pad(p.totals[k]);
      for (Int length : p.lengths[k]) {
        if (length < small) break;
        half[k] += 2 * length > capacity ? 2 : 2 * length == capacity ? 1 : 0;
        third[k] += length > capacity - small ? capacity : length;
      }
    }
    b.slots = std::max(b.slots, one_machine(head, b.after, padded, capacity));
    b.slots = std::max(b.slots, one_machine(head, b.after, half, 2));
    b.slots = std::max(b.slots, one_machine(head, b.after, third, capacity));
  }
  return b;
}

}  // namespace lowmem::host
