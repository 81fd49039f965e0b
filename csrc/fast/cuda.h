// cuda.cu's functions, for memory on a GPU. api.cpp checks the arguments first. `bytes` receives
// the size of the scratch space needed; with `scratch` null nothing else happens. They return false
// if CUDA reported an error.
#pragma once

#include "subspace_lora.h"

namespace scalabl {
namespace cuda {

bool forward(const scalabl_update &op, void *y, int64_t y_stride, void *h, void *scratch,
             int64_t &bytes, void *stream);
bool backward(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride, const void *h,
              const Gradients &out, void *scratch, int64_t &bytes, void *stream);

}  // namespace cuda
}  // namespace scalabl
