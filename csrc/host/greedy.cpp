#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <tuple>
#include <utility>

#include "pack.h"

namespace lowmem::host {

namespace {

constexpr Int kCandidates = 16;  // jobs that one slot looks at, of those in progress and of those not begun
constexpr Int kFillNodes =
    2000000;  // over the number of samples: placements beyond the first descent that fill one slot

using Choice = std::pair<Int, Int>;  // (place in the list of batches, place in the batch)
using Entry = std::pair<Int, Int>;
using Heap = std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>>;

// The samples still to be placed, per batch, and the search that fills one slot from them.
class Pool {
 public:
  explicit Pool(const Problem& p) : tokens(p.totals), p_(p) {
    next_.resize(p.samples + p.batches());
    start_.reserve(p.batches());
    last_.reserve(p.batches());
    Int start = 0;
    for (const Ints& lengths : p.lengths) {
      const Int n = static_cast<Int>(lengths.size());
      std::iota(next_.begin() + start, next_.begin() + start + n + 1, Int{0});
      start_.push_back(start);
      last_.push_back(n - 1);
      start += n + 1;
    }
  }

  // The first unplaced sample of batch k at or after place i.
  Int alive_from(Int k, Int i) {
    Int* link = next_.data() + start_[k];
    while (link[i] != i) {
      link[i] = link[link[i]];
      i = link[i];
    }
    return i;
  }

  void place(Int k, Int i) {
    Int* link = next_.data() + start_[k];
    link[i] = i + 1;
    tokens[k] -= p_.lengths[k][i];
    while (last_[k] >= 0 && link[last_[k]] != last_[k]) --last_[k];
  }

  // The fullest slot found: depth first, longest fitting sample first, batches in the order given. The first sample of
  // the first batch is always in it. The first descent is the greedy slot; `node_cap` more placements look further.
  const std::vector<Choice>& fill(const Ints& batches, Int capacity, Int node_cap) {
    const Int width = static_cast<Int>(batches.size());
    segment_.assign(width, 0);
    chosen_.clear();
    Int best = -1, raw = 0, room = capacity, nodes = 0, c = 0, i = 0;
    bool first_leaf = false;
    while (true) {
      while (c < width) {
        const Int k = batches[c];
        const Ints& lengths = p_.lengths[k];
        const Int limit = room + p_.pad(segment_[c]) - segment_[c];
        if (lengths[last_[k]] <= limit) {
          i = alive_from(k, std::max(i, longest_within(lengths, limit)));
          if (i < static_cast<Int>(lengths.size())) {
            room += add(c, lengths[i]);
            raw += lengths[i];
            chosen_.push_back({c, i});
            nodes += first_leaf;
            ++i;
            continue;
          }
        }
        ++c;
        i = 0;
      }
      if (raw > best) {
        best = raw;
        best_.assign(chosen_.begin(), chosen_.end());
      }
      first_leaf = true;
      if (raw == capacity || nodes >= node_cap || chosen_.size() == 1) break;
      std::tie(c, i) = chosen_.back();
      chosen_.pop_back();
      const Ints& lengths = p_.lengths[batches[c]];
      const Int length = lengths[i];
      room += add(c, -length);
      raw -= length;
      i = longest_within(lengths, length - 1);
    }
    return best_;
  }

  Ints tokens;  // left, per batch

 private:
  static Int longest_within(const Ints& lengths, Int limit) {
    return std::lower_bound(lengths.begin(), lengths.end(), limit, std::greater<Int>()) - lengths.begin();
  }

  // Change of the room when a segment grows by `length`.
  Int add(Int c, Int length) {
    const Int before = p_.pad(segment_[c]);
    segment_[c] += length;
    return before - p_.pad(segment_[c]);
  }

  const Problem& p_;
  Ints next_;  // per sample and one past the last of each batch: a sample at or after it, itself while unplaced
  Ints start_, last_;
  Ints segment_;  // tokens of each batch in the slot
  std::vector<Choice> chosen_, best_;
};

}  // namespace

std::optional<Placed> greedy(const Problem& p, Int capacity, const Bounds& b, Int policy, Int limit) {
  Pool pool(p);
  const Int node_cap = std::min<Int>(512, std::max<Int>(16, kFillNodes / p.whole));
  Placed placed{Ints(p.samples, 0), 0};
  Ints at(p.first_batch.begin(), p.first_batch.end() - 1);  // the batch each job is in
  Ints level(p.jobs);                                       // slots the job needs from here to its end
  Heap ready, fresh, begun;
  for (Int j = 0; j < p.jobs; ++j) {
    level[j] = b.least[at[j]] + b.after[at[j]];
    fresh.push({-level[j], j});
  }
  // can it still wait, rank, tokens left (policy 2), minus level, job, not begun
  std::vector<std::tuple<bool, Int, Int, Int, Int, bool>> order;
  std::vector<char> served(p.jobs, 0);
  Ints jobs, batches;
  Int t = 0, left = p.jobs;
  while (left) {
    while (!ready.empty() && ready.top().first <= t) {
      const Int j = ready.top().second;
      ready.pop();
      fresh.push({-level[j], j});
    }
    if (fresh.empty() && begun.empty()) {
      t = ready.top().first;
      continue;
    }
    order.clear();
    for (bool not_begun : {false, true}) {
      Heap& heap = not_begun ? fresh : begun;
      for (Int n = 0; n < kCandidates && !heap.empty(); ++n) {
        const auto [minus_level, j] = heap.top();
        heap.pop();
        if (t - minus_level > limit) return std::nullopt;
        const Int tokens = pool.tokens[at[j]];
        const Int rank = policy < 3 ? Int{not_begun} : ceil_div(tokens, capacity);
        order.push_back({t - minus_level < b.slots, rank, policy == 2 ? tokens : 0, minus_level, j, not_begun});
      }
    }
    std::sort(order.begin(), order.end());
    jobs.clear();
    for (const auto& entry : order) jobs.push_back(std::get<4>(entry));
    if (policy == 1) {
      Int longest = -1;
      size_t where = 0;
      for (size_t n = 0; n < jobs.size(); ++n) {
        const Int k = at[jobs[n]], length = p.lengths[k][pool.alive_from(k, 0)];
        if (length > longest) {
          longest = length;
          where = n;
        }
      }
      std::rotate(jobs.begin(), jobs.begin() + where, jobs.begin() + where + 1);
    }
    batches.clear();
    for (Int j : jobs) batches.push_back(at[j]);
    for (const auto& [c, i] : pool.fill(batches, capacity, node_cap)) {
      placed.slot[p.items[batches[c]][i]] = t;
      pool.place(batches[c], i);
      served[jobs[c]] = 1;
    }
    for (const auto& [slack, rank, tokens, minus_level, j, not_begun] : order) {
      const Int k = at[j];
      if (!served[j]) {
        (not_begun ? fresh : begun).push({minus_level, j});
        continue;
      }
      served[j] = 0;
      if (pool.tokens[k]) {
        level[j] = ceil_div(p.pad(pool.tokens[k]), capacity) + b.after[k];
        begun.push({-level[j], j});
      } else if (k + 1 < p.first_batch[j + 1]) {
        at[j] = k + 1;
        level[j] = b.least[k + 1] + b.after[k + 1];
        ready.push({t + p.depth, j});
      } else {
        --left;
      }
    }
    ++t;
  }
  if (t > limit) return std::nullopt;
  placed.slots = t;
  return placed;
}

}  // namespace lowmem::host
