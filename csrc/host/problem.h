// The microbatch packer's problem and lower bounds on it. Integers only: lowmem/sched/_problem.py is its twin, and the
// two must agree to the last tie.
#pragma once

#include <cstdint>
#include <vector>

namespace lowmem::host {

using Int = int64_t;
using Ints = std::vector<Int>;

inline Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }

// Jobs, their global batches in order, and the samples of each batch from the longest to the shortest.
struct Problem {
  Int capacity = 0;  // a multiple of `multiple`
  Int depth = 1;
  Int multiple = 1;
  Ints length_of;             // per sample
  Ints batch_of;              // per sample
  std::vector<Ints> items;    // per batch: samples, longest first, equal ones by index
  std::vector<Ints> lengths;  // per batch: their lengths
  Ints job_of;                // per batch
  Ints first_batch;           // per job, and one past the last
  Int whole = 0;              // samples of the problem that this one is a part of
  Int samples = 0, jobs = 0;  // the rest is derived by finish()
  Ints totals;                // per batch: tokens
  Int padded_total = 0;       // of every batch padded by itself
  Int longest = 0;            // padded
  Ints sorted;                // all lengths, longest first

  Int batches() const { return static_cast<Int>(lengths.size()); }
  Int pad(Int tokens) const { return multiple == 1 ? tokens : ceil_div(tokens, multiple) * multiple; }
  void finish();
  Problem only(Int batch) const;  // one batch alone, its samples numbered from 0 in their own order
  static Problem build(const Int* lengths, Int samples, const Ints& job_ends, const Ints& batch_sizes, Int capacity,
                       Int depth, Int multiple);
};

struct Bounds {
  Int slots = 0;  // of the whole problem, empty slots counted
  Ints least;     // per batch: slots it takes by itself
  Ints after;     // per batch: slots that must follow its last one
};

// Martello and Toth's bound L2 on the bins that `lengths` (longest first) need; no order, no padding.
Int bins(const Ints& lengths, Int capacity);

// Lower bounds at `capacity`, valid for every schedule that keeps the rules.
Bounds bounds(const Problem& p, Int capacity);

}  // namespace lowmem::host
