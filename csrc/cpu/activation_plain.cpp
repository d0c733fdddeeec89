// The activation kernels with what the architecture always has: the level of every machine without AVX2.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "common/fp8.h"
#include "cpu/activation_impl.h"
#include "cpu/target.h"

#if !defined(__clang__)  // vectors are passed by value between functions of this file alone
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/activation_kernels.h"

}  // namespace

const ActivationIsa* activation_plain() { return &kActivations; }

}  // namespace lm
