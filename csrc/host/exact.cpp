#include "exact.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace lowmem::host {

void ExactSearch::begin(const Problem& problem, Int node_limit) {
  p_ = &problem;
  nodes = 0;
  node_limit_ = node_limit;
  size_.assign(problem.batches(), {});
  count_.assign(problem.batches(), {});
  for (Int k = 0; k < problem.batches(); ++k) {
    for (Int length : problem.lengths[k]) {
      if (!size_[k].empty() && size_[k].back() == length) {
        ++count_[k].back();
      } else {
        size_[k].push_back(length);
        count_[k].push_back(1);
      }
    }
  }
}

Answer ExactSearch::decide(Int slots, Int capacity, const Bounds& b) {
  const Problem& p = *p_;
  slots_ = slots;
  capacity_ = capacity;
  after_ = &b.after;
  left_ = count_;
  raw_ = p.totals;
  raw_left_ = std::accumulate(raw_.begin(), raw_.end(), Int{0});
  padded_left_ = p.padded_total;
  big_left_ = std::count_if(p.length_of.begin(), p.length_of.end(), [&](Int l) { return 2 * l > capacity; });
  at_.assign(p.first_batch.begin(), p.first_batch.end() - 1);
  ready_.assign(p.jobs, 0);
  failed_.clear();
  taken_.clear();
  stopped_ = nodes >= node_limit_;
  if (stopped_) return Answer::kStopped;
  if (!from(0)) return stopped_ ? Answer::kStopped : Answer::kNo;
  slot.assign(p.samples, 0);
  std::vector<Ints> starts = count_;  // the witness gives out the samples of a class by index
  for (Ints& s : starts) std::exclusive_scan(s.begin(), s.end(), s.begin(), Int{0});
  for (const Taken& taken : taken_) {
    Int& start = starts[taken.batch][taken.index];
    for (Int n = 0; n < taken.count; ++n) slot[p.items[taken.batch][start++]] = taken.slot;
  }
  return Answer::kYes;
}

bool ExactSearch::hopeless(Int t) const {
  const Problem& p = *p_;
  const Int remaining = slots_ - t;
  if (padded_left_ > remaining * capacity_ || big_left_ > remaining) return true;
  for (Int j = 0; j < p.jobs; ++j) {
    const Int k = at_[j];
    if (k == p.first_batch[j + 1]) continue;
    if (std::max(ready_[j], t) + ceil_div(p.pad(raw_[k]), capacity_) + (*after_)[k] > slots_) return true;
  }
  return false;
}

std::string ExactSearch::state(Int t) const {
  std::string key;
  auto append = [&key](Int value) {
    const int32_t v = static_cast<int32_t>(value);
    key.append(reinterpret_cast<const char*>(&v), sizeof(v));
  };
  for (Int j = 0; j < p_->jobs; ++j) {
    const Int k = at_[j];
    append(k);
    if (k == p_->first_batch[j + 1]) continue;
    append(std::max(ready_[j] - t, Int{0}));
    for (Int n : left_[k]) append(n);
  }
  return key;
}

void ExactSearch::take(const Class& c, Int n) {
  left_[c.batch][c.index] -= n;
  padded_left_ -= p_->pad(raw_[c.batch]);
  raw_[c.batch] -= n * c.size;
  padded_left_ += p_->pad(raw_[c.batch]);
  raw_left_ -= n * c.size;
  if (2 * c.size > capacity_) big_left_ -= n;
}

bool ExactSearch::from(Int t) {
  const Problem& p = *p_;
  if (raw_left_ == 0) return true;
  Ints open_jobs, offered;
  Int soonest = INT64_MAX;
  for (Int j = 0; j < p.jobs; ++j) {
    if (at_[j] == p.first_batch[j + 1]) continue;
    open_jobs.push_back(j);
    soonest = std::min(soonest, ready_[j]);
  }
  t = std::max(t, soonest);
  if (hopeless(t)) return false;
  const std::string key = state(t);
  const auto found = failed_.find(key);
  if (found != failed_.end() && found->second <= t) return false;
  std::vector<Class> classes;
  for (Int j : open_jobs) {
    if (ready_[j] > t) continue;
    offered.push_back(j);
    const Int k = at_[j];
    for (size_t c = 0; c < left_[k].size(); ++c) {
      if (left_[k][c]) classes.push_back({size_[k][c], j, k, static_cast<Int>(c)});
    }
  }
  std::sort(classes.begin(), classes.end(), [](const Class& a, const Class& b) {
    return std::make_tuple(-a.size, a.job, a.index) < std::make_tuple(-b.size, b.job, b.index);
  });
  if (fill(t, open_jobs, offered, classes)) return true;
  if (!stopped_) failed_[key] = t;
  return false;
}

bool ExactSearch::fill(Int t, const Ints& open_jobs, const Ints& offered, const std::vector<Class>& classes) {
  const Problem& p = *p_;
  const Int n = static_cast<Int>(classes.size());
  // nothing depends on anything later: slots may change places, so the longest sample goes into this one
  bool free = offered.size() == open_jobs.size();
  for (Int j : open_jobs) free = free && at_[j] + 1 == p.first_batch[j + 1];
  Ints had(n), tail(n + 1, 0), count(n, 0), segment(p.jobs, 0);
  for (Int i = n - 1; i >= 0; --i) {
    had[i] = left_[classes[i].batch][classes[i].index];
    tail[i] = tail[i + 1] + classes[i].size * had[i];
  }
  const Int need = raw_left_ - (slots_ - t - 1) * capacity_;  // fewer tokens here would leave too many for the rest
  Ints shortest(n + 1, capacity_ + 1);                        // of the samples left out so far
  Int used = 0, raw = 0, i = 0;
  bool down = true;
  while (true) {
    if (down && i == n) {
      if (leaf(t, offered, classes, count, had, segment, used)) return true;
      if (stopped_) return false;
      down = false;
      --i;
    } else if (down) {
      if (++nodes >= node_limit_) {
        stopped_ = true;
        return false;
      }
      const Int floor = std::max(need, p.multiple == 1 ? capacity_ + 1 - shortest[i] : 0);
      if (raw + tail[i] < floor) {
        down = false;
        --i;
        continue;
      }
      const Int size = classes[i].size;
      Int& here = segment[classes[i].job];
      const Int padded = p.pad(here);
      const Int fit = std::min(had[i], (capacity_ - used + padded - here) / size);
      if (free && i == 0 && fit == 0) return false;
      count[i] = fit;
      here += fit * size;
      used += p.pad(here) - padded;
      raw += fit * size;
      shortest[i + 1] = fit < had[i] ? std::min(shortest[i], size) : shortest[i];
      ++i;
    } else {
      if (i < 0) return false;
      const Int size = classes[i].size;
      Int& here = segment[classes[i].job];
      const Int padded = p.pad(here);
      down = count[i] > (free && i == 0 ? 1 : 0);
      const Int back = down ? 1 : count[i];
      count[i] -= back;
      here -= back * size;
      used += p.pad(here) - padded;
      raw -= back * size;
      if (down) {
        shortest[i + 1] = std::min(shortest[i], size);
        ++i;
      } else {
        --i;
      }
    }
  }
}

bool ExactSearch::leaf(Int t, const Ints& offered, const std::vector<Class>& classes, const Ints& count,
                       const Ints& had, const Ints& segment, Int used) {
  const Problem& p = *p_;
  for (size_t i = 0; i < classes.size(); ++i) {
    const Int here = segment[classes[i].job];
    if (count[i] < had[i] && here + classes[i].size <= p.pad(here) + capacity_ - used) return false;  // not maximal
  }
  const size_t mark = taken_.size();
  Ints at_before, ready_before;
  for (Int j : offered) {
    at_before.push_back(at_[j]);
    ready_before.push_back(ready_[j]);
  }
  for (size_t i = 0; i < classes.size(); ++i) {
    if (!count[i]) continue;
    take(classes[i], count[i]);
    taken_.push_back({t, classes[i].batch, classes[i].index, count[i]});
  }
  for (Int j : offered) {
    if (raw_[at_[j]]) continue;
    ++at_[j];
    ready_[j] = t + p.depth;
  }
  if (from(t + 1)) return true;
  for (size_t i = 0; i < offered.size(); ++i) {
    at_[offered[i]] = at_before[i];
    ready_[offered[i]] = ready_before[i];
  }
  taken_.resize(mark);
  for (size_t i = 0; i < classes.size(); ++i) {
    if (count[i]) take(classes[i], -count[i]);
  }
  return false;
}

}  // namespace lowmem::host
