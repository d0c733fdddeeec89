// Memory for a kernel's arguments between pages that nobody may touch. A read or write beside an argument ends the
// launch with an error that says whose end was passed, and by how much; what no page boundary can catch, because it
// lies in the same page or between strided elements, holds NaN and is compared afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emu {

enum class Place {
  kStart,  // the first element at the start of a page: aligned, so kernels take their vector paths
  kEnd,    // the last element flush against the guard, whatever alignment that gives
};

class Guarded {
 public:
  // `rows` x `cols` elements at row_stride and col_stride elements (>= 0). Spans beyond 64 MiB (col_stride 1) are
  // reserved address space of which only the rows' own pages can be touched.
  Guarded(std::string name, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, size_t item,
          Place place);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void* data() const { return data_; }
  void copy_in(const void* packed, bool read_only);  // row-major, no gaps
  void copy_out(void* packed);                       // throws Error where a gap has been written

 private:
  char* element(int64_t row, int64_t col) const {
    return static_cast<char*>(data_) + (row * row_stride_ + col * col_stride_) * static_cast<int64_t>(item_);
  }
  void protect(int flags) const;

  std::string name_;
  int64_t rows_, cols_, row_stride_, col_stride_;
  size_t item_;
  char *reserved_ = nullptr, *pages_ = nullptr;
  size_t reserved_bytes_ = 0, page_bytes_ = 0;
  bool sparse_ = false;
  void* data_ = nullptr;

  friend std::string describe_address(const void* address);
};

// "8 bytes past the end of out", or '' for an address near no argument.
std::string describe_address(const void* address);

}  // namespace emu
