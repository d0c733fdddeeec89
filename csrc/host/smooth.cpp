#include <algorithm>
#include <map>
#include <utility>

#include "pack.h"

namespace lowmem::host {

namespace {

constexpr Int kPasses = 12, kWindow = 16, kPartners = 3, kPairs = 4096, kBudget = 4000000;
constexpr Int kNone = -1;

class Smoother {
 public:
  Smoother(const Problem& p, Ints& slot, Int slots) : p_(p), slot_(slot), slots_(slots), members_(slots), load_(slots) {
    for (Int i = 0; i < p.samples; ++i) members_[slot[i]].push_back(i);
    for (Int t = 0; t < slots; ++t) {
      std::map<Int, Int> segments;
      for (Int i : members_[t]) segments[job(i)] += p.length_of[i];
      for (const auto& segment : segments) load_[t] += p.pad(segment.second);
    }
  }

  void run() {
    Int budget = kBudget;
    for (Int turn = 0; turn < kPasses; ++turn) {
      windows(turn);
      bool changed = false;
      for (Int t = 0; t < slots_; ++t) {
        if (budget <= 0) return;
        partners_.clear();
        for (Int u = std::max<Int>(0, t - kWindow); u < std::min(slots_, t + kWindow + 1); ++u) {
          if (load_[u] < load_[t]) partners_.push_back({load_[u], u});
        }
        const size_t few = std::min<size_t>(partners_.size(), kPartners);
        std::partial_sort(partners_.begin(), partners_.begin() + few, partners_.end());
        for (size_t n = 0; n < few; ++n) {
          if (improve(t, partners_[n].second, budget)) {
            changed = true;
            break;
          }
        }
      }
      if (!changed && turn % 2) return;
    }
  }

 private:
  Int job(Int i) const { return i == kNone ? kNone : p_.job_of[p_.batch_of[i]]; }
  Int length(Int i) const { return i == kNone ? 0 : p_.length_of[i]; }
  bool may_lie(Int i, Int t) const { return low_[p_.batch_of[i]] <= t && t <= high_[p_.batch_of[i]]; }

  // Where a batch may lie: between its ends, and on into the room before the next (even turns) or after the last.
  void windows(Int turn) {
    low_.assign(p_.batches(), slots_);
    high_.assign(p_.batches(), -1);
    for (Int i = 0; i < p_.samples; ++i) {
      const Int k = p_.batch_of[i];
      low_[k] = std::min(low_[k], slot_[i]);
      high_[k] = std::max(high_[k], slot_[i]);
    }
    for (Int j = 0; j < p_.jobs; ++j) {
      const Int first = p_.first_batch[j], end = p_.first_batch[j + 1];
      if (turn % 2 == 0) {
        for (Int k = first; k < end; ++k) high_[k] = k + 1 < end ? low_[k + 1] - p_.depth : slots_ - 1;
      } else {
        for (Int k = end - 1; k >= first; --k) low_[k] = k > first ? high_[k - 1] + p_.depth : 0;
      }
    }
  }

  // Change of slot t's tokens when `out` leaves and `into` comes.
  Int shift(Int t, Int out, Int into) const {
    if (p_.multiple == 1) return length(into) - length(out);
    const Int job_out = job(out), job_in = job(into);
    Int raw_out = 0, raw_in = 0;
    for (Int i : members_[t]) {
      if (job(i) == job_out) raw_out += p_.length_of[i];
      if (job(i) == job_in) raw_in += p_.length_of[i];
    }
    if (job_out == job_in) return p_.pad(raw_out - length(out) + length(into)) - p_.pad(raw_out);
    const Int change = out == kNone ? 0 : p_.pad(raw_out - length(out)) - p_.pad(raw_out);
    return change + (into == kNone ? 0 : p_.pad(raw_in + length(into)) - p_.pad(raw_in));
  }

  void move(Int i, Int t, Int u) {
    members_[t].erase(std::find(members_[t].begin(), members_[t].end(), i));
    members_[u].push_back(i);
    slot_[i] = u;
  }

  bool improve(Int t, Int u, Int& budget) {
    const Int a = load_[t], c = load_[u];
    Int best = a * a + c * c, best_out = kNone, best_in = kNone;
    const Int others = static_cast<Int>(members_[u].size());
    const bool swaps = static_cast<Int>(members_[t].size()) * others <= kPairs;
    for (Int out : members_[t]) {
      if (!may_lie(out, u)) continue;
      for (Int n = -1; n < (swaps ? others : 0); ++n) {
        const Int into = n < 0 ? kNone : members_[u][n];
        --budget;
        if (into != kNone && !may_lie(into, t)) continue;
        const Int less = length(out) - length(into);
        if (less <= 0 || (p_.multiple == 1 && less >= a - c)) continue;
        const Int new_a = a + shift(t, out, into), new_c = c + shift(u, into, out);
        if (std::max(new_a, new_c) <= a && new_a * new_a + new_c * new_c < best) {
          best = new_a * new_a + new_c * new_c;
          best_out = out;
          best_in = into;
        }
      }
    }
    if (best_out == kNone) return false;
    load_[t] += shift(t, best_out, best_in);
    load_[u] += shift(u, best_in, best_out);
    move(best_out, t, u);
    if (best_in != kNone) move(best_in, u, t);
    return true;
  }

  const Problem& p_;
  Ints& slot_;
  const Int slots_;
  std::vector<Ints> members_;
  Ints load_, low_, high_;
  std::vector<std::pair<Int, Int>> partners_;
};

}  // namespace

void smooth(const Problem& p, Ints& slot, Int slots) { Smoother(p, slot, slots).run(); }

}  // namespace lowmem::host
