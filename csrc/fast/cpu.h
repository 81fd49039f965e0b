// The functions of cpu.cpp, of blocks.cpp and of kernels.cpp. api.cpp checks the arguments first. They
// may throw std::bad_alloc.
#pragma once

#include "subspace_lora.h"

namespace scalabl {
namespace cpu {

void forward(const scalabl_update &op, void *y, int64_t y_stride, void *h);
void backward(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride, const void *h,
              const Gradients &out);

void rms_norm(const scalabl_norm &op, void *y, float *scale);
void rms_norm_backward(const scalabl_norm &op, const void *grad_y, const float *scale,
                       void *grad_x);
void rotate(const scalabl_rotation &op, const void *x, void *y);
void swiglu(int32_t dtype, int64_t n, const void *gate, const void *up, void *y, int32_t threads);
void swiglu_backward(int32_t dtype, int64_t n, const void *grad_y, const void *gate,
                     const void *up, void *grad_gate, void *grad_up, int32_t threads);
void few_rows(const scalabl_product &op, void *y);
void dequantize(const scalabl_codes &op, void *weight);

const char *isa();
bool use_isa(const char *name);  // false: unknown, or not on this machine

}  // namespace cpu
}  // namespace scalabl
