// Is there a schedule of so many slots at such a capacity? Branch and bound, slot after slot; the twin of
// lowmem/sched/_exact.py, whose node counts it must share.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "problem.h"

namespace lowmem::host {

enum class Answer { kYes, kNo, kStopped };

// At each slot every maximal set of the samples on offer is tried: a set that leaves out a sample that would still fit
// is never better, since that sample may be moved there from its later slot without breaking a rule.
class ExactSearch {
 public:
  Int nodes = 0;
  Ints slot;  // the witness of the last question answered with yes

  void begin(const Problem& problem, Int node_limit);
  Answer decide(Int slots, Int capacity, const Bounds& b);

 private:
  struct Class {  // samples of one batch and one length are interchangeable
    Int size, job, batch, index;
  };
  struct Taken {
    Int slot, batch, index, count;
  };

  bool hopeless(Int t) const;
  std::string state(Int t) const;
  void take(const Class& c, Int n);
  bool from(Int t);
  bool fill(Int t, const Ints& open_jobs, const Ints& offered, const std::vector<Class>& classes);
  bool leaf(Int t, const Ints& offered, const std::vector<Class>& classes, const Ints& count, const Ints& had,
            const Ints& segment, Int used);

  const Problem* p_ = nullptr;
  Int node_limit_ = 0;
  std::vector<Ints> size_, count_, left_;  // per batch, per class
  Int slots_ = 0, capacity_ = 0;
  const Ints* after_ = nullptr;
  Ints raw_, at_, ready_;
  Int raw_left_ = 0, padded_left_ = 0, big_left_ = 0;
  std::unordered_map<std::string, Int> failed_;  // state -> earliest slot from which the rest could not be placed
  std::vector<Taken> taken_;
  bool stopped_ = false;
};

}  // namespace lowmem::host
