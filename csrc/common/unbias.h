// Adam's bias corrections, with the same bits everywhere: powers by repeated squaring in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace lm {

struct Unbias {
  float first, second;  // 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
};

LM_HD double power_of(double base, uint32_t exponent) {
  double result = 1.0;
  for (; exponent; exponent >>= 1) {
    if (exponent & 1u) result *= base;
    base *= base;
  }
  return result;
}

LM_HD Unbias unbias_of(double beta1, double beta2, uint32_t step) {
  return Unbias{static_cast<float>(1.0 / (1.0 - power_of(beta1, step))),
                static_cast<float>(1.0 / sqrt(1.0 - power_of(beta2, step)))};
}

}  // namespace lm
