// Family `lora` on CUDA devices: argument checks and launches of lora.cuh's kernels. They register as lowmem_c::<op>;
// the launchers under lowmem::<op> (triton_kernels/lora.py) choose between them and Triton.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "../common/checks.h"
#include "../common/philox.h"
#include "lora.cuh"
#include "op.h"

namespace {

using lm::any_view;
using lm::bad;
using lm::check_device;
using lm::check_served;
using lm::current_stream;
using lm::view;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------------- masked expand

constexpr const char* kExpand = "lora_masked_expand_";

struct Drop {
  const uint32_t* mask = nullptr;
  int64_t mask_stride = 0;
  const int64_t* seed = nullptr;
  uint32_t threshold = 0, child = 0;
};

Drop check_drop(const Tensor& out, const std::optional<Tensor>& mask, double p, const std::optional<Tensor>& seed,
                int64_t child) {
  if (!(p >= 0.0 && p <= 1.0)) bad(kExpand, "p", "a probability in [0, 1]", p);
  if (child < 0 || child > INT64_C(0xFFFFFFFF)) bad(kExpand, "child", "an integer in [0, 2**32)", child);
  Drop drop;
  drop.threshold = lm::keep_threshold(p);
  drop.child = static_cast<uint32_t>(child);
  if (p == 0.0) return drop;
  if (mask.has_value()) {
    const int64_t words = (out.size(1) + 31) / 32;
    lm::check_dtype(kExpand, "mask", *mask, ScalarType::Int);
    lm::check_matrix(kExpand, "mask", *mask, out.size(0), words);
    check_device(kExpand, "mask", *mask, "out", out);
    if (words > 1 && mask->stride(1) != 1) bad(kExpand, "mask", "adjacent words in a row", "another stride");
    drop.mask = static_cast<const uint32_t*>(mask->const_data_ptr());
    drop.mask_stride = mask->stride(0);
  } else if (seed.has_value()) {
    lm::check_dtype(kExpand, "seed", *seed, ScalarType::Long);
    if (seed->numel() != 1) bad(kExpand, "seed", "one element", seed->numel());
    check_device(kExpand, "seed", *seed, "out", out);
    drop.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  } else {
    bad(kExpand, "seed", "an int64 tensor of one element, since p > 0 and there is no mask", "None");
  }
  return drop;
}

template <typename T>
cudaError_t expand_as(const Tensor& out, const Tensor& ds, const Tensor& a, const Drop& drop, bool accumulate,
                      cudaStream_t stream) {
  lm::ExpandArgs<T> args{lm::make_view(static_cast<T*>(out.mutable_data_ptr()), out.stride(0), out.stride(1)),
                         view<T>(ds),
                         any_view(a),
                         drop.mask,
                         drop.mask_stride,
                         drop.seed,
                         out.size(0),
                         static_cast<int>(out.size(1)),
                         static_cast<int>(ds.size(1)),
                         drop.threshold,
                         drop.child,
                         static_cast<float>(lm::inv_keep(drop.threshold)),
                         accumulate};
  return lm::masked_expand(args, stream);
}

void masked_expand_(Tensor out, Tensor ds, Tensor a, std::optional<Tensor> mask, double p, std::optional<Tensor> seed,
                    int64_t child, bool accumulate) {
  check_served(kExpand, "out", out);
  lm::check_matrix(kExpand, "out", out, -1, -1);
  const int64_t rows = out.size(0), cols = out.size(1);
  if (cols > INT64_C(0x7FFFFF00)) bad(kExpand, "out", "fewer than 2**31 - 256 columns", cols);
  if ((rows > 1 && out.stride(0) == 0) || (cols > 1 && out.stride(1) == 0)) {
    bad(kExpand, "out", "elements with places of their own", "an expanded tensor");
  }
  lm::check_dtype(kExpand, "ds", ds, out.scalar_type());
  lm::check_matrix(kExpand, "ds", ds, rows, -1);
  check_served(kExpand, "a", a);
  lm::check_matrix(kExpand, "a", a, ds.size(1), cols);
  check_device(kExpand, "ds", ds, "out", out);
  check_device(kExpand, "a", a, "out", out);
  const Drop drop = check_drop(out, mask, p, seed, child);

  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const cudaStream_t stream = current_stream(out);
  cudaError_t error = cudaSuccess;
  switch (out.scalar_type()) {
    case ScalarType::Float: error = expand_as<float>(out, ds, a, drop, accumulate, stream); break;
    case ScalarType::Half: error = expand_as<__half>(out, ds, a, drop, accumulate, stream); break;
    default: error = expand_as<__nv_bfloat16>(out, ds, a, drop, accumulate, stream); break;
  }
  STD_CUDA_CHECK(error);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// ---------------------------------------------------------------------------------------------------------- dy pass

constexpr const char* kDy = "lora_dy";

template <typename T>
cudaError_t dy_as(const Tensor& dy, const Tensor& b, const Tensor& s, double scale, Tensor& ds, Tensor& db,
                  cudaStream_t stream) {
  const int64_t rows = dy.size(0), cols = dy.size(1), r = b.size(1);
  const lm::DyPlan plan = lm::dy_plan<T>(rows, cols, r);
  // released when this returns, and reused only by work that the stream runs later
  Tensor workspace = torch::stable::new_empty(dy, {plan.ds_floats + plan.db_floats}, ScalarType::Float);
  return lm::dy<T>(plan, view<T>(dy), view<T>(s), any_view(b), rows, cols, r, static_cast<float>(scale),
                   static_cast<T*>(ds.mutable_data_ptr()), static_cast<float*>(db.mutable_data_ptr()),
                   static_cast<float*>(workspace.mutable_data_ptr()), stream);
}

std::tuple<Tensor, Tensor> dy_pass(Tensor dy, Tensor b, Tensor s, double scale) {
  check_served(kDy, "dy", dy);
  lm::check_matrix(kDy, "dy", dy, -1, -1);
  check_served(kDy, "b", b);
  lm::check_matrix(kDy, "b", b, dy.size(1), -1);
  lm::check_dtype(kDy, "s", s, dy.scalar_type());
  lm::check_matrix(kDy, "s", s, dy.size(0), b.size(1));
  check_device(kDy, "b", b, "dy", dy);
  check_device(kDy, "s", s, "dy", dy);

  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  const cudaStream_t stream = current_stream(dy);
  Tensor ds = torch::stable::new_empty(dy, {dy.size(0), b.size(1)});
  Tensor db = torch::stable::new_empty(b, {b.size(0), b.size(1)}, ScalarType::Float);
  cudaError_t error = cudaSuccess;
  switch (dy.scalar_type()) {
    case ScalarType::Float: error = dy_as<float>(dy, b, s, scale, ds, db, stream); break;
    case ScalarType::Half: error = dy_as<__half>(dy, b, s, scale, ds, db, stream); break;
    default: error = dy_as<__nv_bfloat16>(dy, b, s, scale, ds, db, stream); break;
  }
  STD_CUDA_CHECK(error);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {ds, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowmem_c, CUDA, m) {
  m.impl("lora_masked_expand_", TORCH_BOX(&masked_expand_));
  m.impl("lora_dy", TORCH_BOX(&dy_pass));
}
