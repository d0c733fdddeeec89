#include "pack.h"

#include <algorithm>
#include <map>
#include <utility>

namespace lowmem::host {

namespace {

constexpr Int kExactSamples = 128;      // joint problems above this size are never given to the exact search
constexpr Int kThoroughSamples = 4096;  // up to here every policy is tried and the balance is bisected to the token

struct Solved {
  Placed placed;
  Int lower_bound, max_lower_bound;
};

// The most tokens of any slot, segments padded.
Int max_load(const Problem& p, const Placed& placed) {
  std::vector<std::pair<Int, Int>> rows;  // (slot, job) as one number, length
  rows.reserve(p.samples);
  for (Int i = 0; i < p.samples; ++i) {
    rows.push_back({placed.slot[i] * p.jobs + p.job_of[p.batch_of[i]], p.length_of[i]});
  }
  std::sort(rows.begin(), rows.end());
  Ints load(placed.slots, 0);
  for (size_t i = 0; i < rows.size();) {
    const Int segment = rows[i].first;
    Int raw = 0;
    for (; i < rows.size() && rows[i].first == segment; ++i) raw += rows[i].second;
    load[segment / p.jobs] += p.pad(raw);
  }
  return *std::max_element(load.begin(), load.end());
}

// Fewest slots first, then the smallest fullest slot.
Solved solve(const Problem& p, Int node_limit, ExactSearch& search) {
  const Bounds whole = bounds(p, p.capacity);
  Int least = whole.slots, policy = 0;
  const Int policies = p.jobs > 1 ? kPolicies : 1;  // one job leaves no choice
  std::optional<Placed> best;
  for (Int candidate = 0; candidate < policies; ++candidate) {
    auto found = greedy(p, p.capacity, whole, candidate, best ? best->slots - 1 : Int{1} << 62);
    if (found) {
      best = std::move(found);
      policy = candidate;
    }
    if (best->slots == least) break;
  }
  const bool small = p.samples <= kExactSamples;
  search.begin(p, node_limit);
  if (small) {
    for (Int slots = least; slots < best->slots; ++slots) {
      const Answer answer = search.decide(slots, p.capacity, whole);
      if (answer == Answer::kStopped) break;
      if (answer == Answer::kYes) {
        best = Placed{search.slot, slots};
        break;
      }
      least = slots + 1;
    }
  }
  // the balance: no capacity up to `refuted` can hold these slots, none up to `low` is worth another try
  const Int slots = best->slots, m = p.multiple;
  Int high = max_load(p, *best);
  Int refuted = std::max(p.longest, p.pad(ceil_div(p.padded_total, slots))) - m, low = refuted;
  const bool thorough = p.whole <= kThoroughSamples;
  const Int step = thorough ? m : std::max(m, high / 512);
  while (high - low > step) {
    const Int middle = low + (high - low) / m / 2 * m;
    const Bounds b = bounds(p, middle);
    if (b.slots > slots) {
      refuted = low = middle;
      continue;
    }
    std::optional<Placed> found;
    for (Int candidate = thorough ? 0 : policy; candidate < (thorough ? policies : policy + 1) && !found; ++candidate) {
      found = greedy(p, middle, b, candidate, slots);
    }
    if (!found && small) {
      const Answer answer = search.decide(slots, middle, b);
      if (answer == Answer::kYes) found = Placed{search.slot, slots};
      if (answer == Answer::kNo) {
        refuted = low = middle;
        continue;
      }
    }
    if (!found) {
      low = middle;
      continue;
    }
    best = Placed{std::move(found->slot), slots};
    high = max_load(p, *best);
  }
  return {std::move(*best), least, std::min(refuted + m, high)};
}

}  // namespace

Packing pack(const Int* lengths, Int samples, const Ints& job_ends, const Ints& batch_sizes, Int capacity, Int depth,
             Int multiple, Int node_limit) {
  const Problem p = Problem::build(lengths, samples, job_ends, batch_sizes, capacity, depth, multiple);
  ExactSearch search;
  Packing packing;
  if (p.jobs > 1) {
    Solved solved = solve(p, node_limit, search);
    packing = {std::move(solved.placed.slot), solved.placed.slots, solved.lower_bound, solved.max_lower_bound,
               search.nodes};
    smooth(p, packing.slot, packing.slots);
    return packing;
  }
  // one job: its batches can share no slot, so each is a problem of its own
  packing.slot.assign(samples, 0);
  const Int share = std::min(node_limit, std::max<Int>(500, node_limit / p.batches()));
  Int work = 0;
  for (Int k = 0; k < p.batches(); ++k) {
    const Problem batch = p.only(k);
    const Solved solved = solve(batch, share, search);
    packing.nodes += search.nodes;
    const Int gap = k ? depth - 1 : 0;
    packing.slots += gap;
    Ints order = p.items[k];
    std::sort(order.begin(), order.end());
    for (size_t i = 0; i < order.size(); ++i) packing.slot[order[i]] = packing.slots + solved.placed.slot[i];
    packing.slots += solved.placed.slots;
    work += solved.placed.slots;
    packing.lower_bound += gap + solved.lower_bound;
    packing.max_lower_bound = std::max(packing.max_lower_bound, solved.max_lower_bound);
  }
  // a batch may then need fewer slots and leave them to another: only the plain bound holds for all
  if (packing.lower_bound < packing.slots) {
    packing.max_lower_bound = std::max(p.longest, p.pad(ceil_div(p.padded_total, work)));
  }
  smooth(p, packing.slot, packing.slots);
  return packing;
}

}  // namespace lowmem::host
