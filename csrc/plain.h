// plain.cpp's functions. api.cpp checks the arguments first. They may throw std::bad_alloc.
#pragma once

#include "subspace_lora.h"

namespace scalabl {
namespace plain {

void forward(const scalabl_update &op, void *y, int64_t y_stride, void *h);
void backward(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride,
              const Gradients &out);

}  // namespace plain
}  // namespace scalabl
