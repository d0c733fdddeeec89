#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "emulator.h"

namespace emu {
namespace {

constexpr size_t kPage = 4096, kDense = size_t{64} << 20;
constexpr unsigned char kPoison = 0xFF;

std::vector<const Guarded*>& all() {
  static std::vector<const Guarded*> list;
  return list;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

Guarded::Guarded(std::string name, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, size_t item,
                 Place place)
    : name_(std::move(name)), rows_(rows), cols_(cols), row_stride_(row_stride), col_stride_(col_stride), item_(item) {
  const bool empty = rows == 0 || cols == 0;
  const size_t bytes = empty ? 0 : static_cast<size_t>((rows - 1) * row_stride + (cols - 1) * col_stride + 1) * item;
  page_bytes_ = round_up(bytes, kPage);
  sparse_ = bytes > kDense;
  if (sparse_ && col_stride != 1) throw Error(name_ + ": a span beyond 64 MiB needs adjacent columns");
  // a 32-bit offset that wraps around lands up to 2^32 elements away: nothing may be mapped there
  const size_t guard = sparse_ ? (size_t{1} << 32) * item : size_t{1} << 20;
  reserved_bytes_ = page_bytes_ + 2 * guard;
  void* p = mmap(nullptr, reserved_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error(name_ + ": the address space could not be reserved");
  reserved_ = static_cast<char*>(p);
  pages_ = reserved_ + guard;
  data_ = place == Place::kEnd && !sparse_ ? pages_ + (page_bytes_ - bytes) : pages_;
  protect(PROT_READ | PROT_WRITE);
  if (!sparse_) std::memset(pages_, kPoison, page_bytes_);
  all().push_back(this);
}

Guarded::~Guarded() {
  all().erase(std::find(all().begin(), all().end(), this));
  munmap(reserved_, reserved_bytes_);
}

void Guarded::protect(int flags) const {
  if (page_bytes_ == 0) return;
  if (!sparse_) {
    mprotect(pages_, page_bytes_, flags);
    return;
  }
  for (int64_t row = 0; row < rows_; ++row) {
    char* from = pages_ + static_cast<size_t>(element(row, 0) - pages_) / kPage * kPage;
    char* to = pages_ + round_up(static_cast<size_t>(element(row, cols_ - 1) - pages_) + item_, kPage);
    mprotect(from, static_cast<size_t>(to - from), flags);
  }
}

void Guarded::copy_in(const void* packed, bool read_only) {
  const auto* from = static_cast<const char*>(packed);
  for (int64_t i = 0; i < rows_; ++i) {
    for (int64_t j = 0; j < cols_; ++j, from += item_) std::memcpy(element(i, j), from, item_);
  }
  if (read_only) protect(PROT_READ);
}

void Guarded::copy_out(void* packed) {
  auto* to = static_cast<char*>(packed);
  for (int64_t i = 0; i < rows_; ++i) {
    for (int64_t j = 0; j < cols_; ++j, to += item_) std::memcpy(to, element(i, j), item_);
  }
  if (sparse_) return;
  for (int64_t i = 0; i < rows_; ++i) {
    for (int64_t j = 0; j < cols_; ++j) std::memset(element(i, j), kPoison, item_);
  }
  for (size_t i = 0; i < page_bytes_; ++i) {
    if (static_cast<unsigned char>(pages_[i]) != kPoison) {
      throw Error("a kernel wrote " + describe_address(pages_ + i));
    }
  }
}

std::string describe_address(const void* address) {
  const auto* p = static_cast<const char*>(address);
  for (const Guarded* g : all()) {
    if (p < g->reserved_ || p >= g->reserved_ + g->reserved_bytes_) continue;
    const auto* base = static_cast<const char*>(g->data_);
    if (p < base) return std::to_string(base - p) + " bytes before the start of " + g->name_;
    if (g->rows_ == 0 || g->cols_ == 0) return "beside " + g->name_ + ", which is empty";
    const char* last = g->element(g->rows_ - 1, g->cols_ - 1);
    const char* end = last + g->item_;
    if (p >= end) return std::to_string(p - end) + " bytes past the end of " + g->name_;
    return "at byte " + std::to_string(p - base) + " of " + g->name_ + ", " +
           "where no element may be touched this way";
  }
  return "";
}

}  // namespace emu
