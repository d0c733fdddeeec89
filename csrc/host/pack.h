// The microbatch packer; the twin of lowmem/sched/_reference.py. docs/sched.md explains the algorithm.
#pragma once

#include <optional>

#include "exact.h"
#include "problem.h"

namespace lowmem::host {

struct Packing {
  Ints slot;                // per sample
  Int slots = 0;            // used, empty ones between them counted
  Int lower_bound = 0;      // no schedule has fewer
  Int max_lower_bound = 0;  // no schedule of as many slots has a fullest one below this
  Int nodes = 0;            // spent by the exact search
};

struct Placed {
  Ints slot;
  Int slots;
};

constexpr Int kPolicies = 4;

// Slot after slot, the fullest one from the jobs in the policy's order; nothing where it takes more than `limit`.
std::optional<Placed> greedy(const Problem& p, Int capacity, const Bounds& b, Int policy, Int limit);

// Moves and swaps samples between near slots, within what the gaps allow, while the sum of squares falls.
void smooth(const Problem& p, Ints& slot, Int slots);

Packing pack(const Int* lengths, Int samples, const Ints& job_ends, const Ints& batch_sizes, Int capacity, Int depth,
             Int multiple, Int node_limit);

}  // namespace lowmem::host
