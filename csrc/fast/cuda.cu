// The plan of device.h on a CUDA stream. test_device.cpp walks the same kernels on the host; here
// they are launched. No synchronisation: the caller's stream orders everything.
#include "cuda.h"

#include <cuda_runtime.h>

#include "device.h"

namespace scalabl {
namespace {

template <typename Kernel>
__global__ void __launch_bounds__(device::THREADS) walk(const Kernel kernel) {
    __shared__ typename Kernel::Shared shared;
    const device::Place place = {static_cast<int>(threadIdx.x), blockIdx.x, blockIdx.y};
    const int64_t steps = kernel.steps();
    for (int64_t step = 0; step < steps; ++step) {
        if (step > 0) __syncthreads();
        kernel.step(step, place, shared);
    }
}

// Grids have at most 2^31 - 1 blocks along x and 65535 along y; a larger one is an error.
struct OnStream {
    cudaStream_t stream;
    cudaError_t *error;

    template <typename Kernel>
    void operator()(const Kernel &kernel, int64_t x, int64_t y) const {
        if (*error != cudaSuccess) return;
        if (x > INT32_MAX || y > 65535) {
            *error = cudaErrorInvalidConfiguration;
            return;
        }
        const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
        walk<<<grid, device::THREADS, 0, stream>>>(kernel);
        *error = cudaGetLastError();
    }
};

}  // namespace

namespace cuda {

bool forward(const scalabl_update &op, void *y, int64_t y_stride, void *h, void *scratch,
             int64_t &bytes, void *stream) {
    cudaError_t error = cudaSuccess;
    const OnStream launcher = {static_cast<cudaStream_t>(stream), &error};
    bytes = device::forward(op, y, y_stride, h, scratch, launcher);
    return error == cudaSuccess;
}

bool backward(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride, const void *h,
              const Gradients &out, void *scratch, int64_t &bytes, void *stream) {
    cudaError_t error = cudaSuccess;
    const OnStream launcher = {static_cast<cudaStream_t>(stream), &error};
    bytes = device::backward(op, grad_y, grad_y_stride, h, out, scratch, launcher);
    return error == cudaSuccess;
}

}  // namespace cuda
}  // namespace scalabl
