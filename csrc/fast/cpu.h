// cpu.cpp's functions. api.cpp checks the arguments first. They may throw std::bad_alloc.
#pragma once

#include "subspace_lora.h"

namespace scalabl {
namespace cpu {

void forward(const scalabl_update &op, void *y, int64_t y_stride, void *h);
void backward(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride, const void *h,
              const Gradients &out);

const char *isa();
bool use_isa(const char *name);  // false: unknown, or not on this machine

}  // namespace cpu
}  // namespace scalabl
