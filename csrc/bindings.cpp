// The only file that knows Python. Tensors come in as addresses (Tensor.data_ptr()), so that no
// framework's headers are needed; the caller vouches for their type, size and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "scalabl.h"

namespace py = pybind11;

namespace {

// Raises the package's InputError, which is a ValueError.
void check(scalabl_status status) {
    if (status == SCALABL_OK) return;
    const py::object error = py::module_::import("scalabl_ref.errors").attr("InputError");
    PyErr_SetString(error.ptr(), scalabl_message(status));
    throw py::error_already_set();
}

std::array<uint32_t, 4> philox4x32(const std::array<uint32_t, 4> &counter,
                                   const std::array<uint32_t, 2> &key, int rounds) {
    std::array<uint32_t, 4> out;
    check(scalabl_philox4x32(counter.data(), key.data(), rounds, out.data()));
    return out;
}

std::array<double, 2> box_muller(uint32_t a, uint32_t b) {
    std::array<double, 2> out;
    check(scalabl_box_muller(a, b, out.data()));
    return out;
}

// groups: address of `count` int64 ids; out: address of count * rank float32, row-major.
void normals(uint64_t seed, uint32_t draw, uint32_t layer, uintptr_t groups, int64_t count,
             int64_t rank, uintptr_t out) {
    scalabl_status status;
    {
        const py::gil_scoped_release release;
        status = scalabl_normals(seed, draw, layer, reinterpret_cast<const int64_t *>(groups),
                                 count, rank, reinterpret_cast<float *>(out));
    }
    check(status);
}

// The fields of scalabl_update, in its order, with addresses for pointers (0 is null).
struct Update : scalabl_update {
    Update(int32_t dtype_, int32_t adapter_dtype_, int64_t rows_, int64_t d_in_, int64_t d_out_,
           int64_t rank_, uintptr_t x_, int64_t x_stride_, uintptr_t A_, int64_t A_stride_,
           uintptr_t B_, int64_t B_stride_, uintptr_t s_, uintptr_t sigma_, double scaling_,
           bool noisy_, uint64_t seed_, uint32_t draw_, uint32_t layer_, uintptr_t groups_,
           int64_t rows_per_group_, int32_t threads_)
        : scalabl_update{dtype_,
                         adapter_dtype_,
                         rows_,
                         d_in_,
                         d_out_,
                         rank_,
                         reinterpret_cast<const void *>(x_),
                         x_stride_,
                         reinterpret_cast<const void *>(A_),
                         A_stride_,
                         reinterpret_cast<const void *>(B_),
                         B_stride_,
                         reinterpret_cast<const void *>(s_),
                         reinterpret_cast<const void *>(sigma_),
                         scaling_,
                         noisy_,
                         draw_,
                         layer_,
                         seed_,
                         reinterpret_cast<const int64_t *>(groups_),
                         rows_per_group_,
                         threads_} {}
};

void update_forward(const Update &op, uintptr_t y, int64_t y_stride, uintptr_t h) {
    scalabl_status status;
    {
        const py::gil_scoped_release release;
        status = scalabl_update_forward(&op, reinterpret_cast<void *>(y), y_stride,
                                        reinterpret_cast<void *>(h));
    }
    check(status);
}

void update_backward(const Update &op, uintptr_t grad_y, int64_t grad_y_stride, uintptr_t h,
                     uintptr_t grad_x, int64_t grad_x_stride, uintptr_t grad_A, uintptr_t grad_B,
                     uintptr_t grad_s, uintptr_t grad_sigma) {
    scalabl_status status;
    {
        const py::gil_scoped_release release;
        status = scalabl_update_backward(
            &op, reinterpret_cast<const void *>(grad_y), grad_y_stride,
            reinterpret_cast<const void *>(h), reinterpret_cast<void *>(grad_x), grad_x_stride,
            reinterpret_cast<void *>(grad_A), reinterpret_cast<void *>(grad_B),
            reinterpret_cast<void *>(grad_s), reinterpret_cast<void *>(grad_sigma));
    }
    check(status);
}

// Both return the bytes of scratch space that are needed; with scratch 0 they do nothing else.
int64_t cuda_forward(const Update &op, uintptr_t y, int64_t y_stride, uintptr_t h,
                     uintptr_t scratch, int64_t bytes, uintptr_t stream) {
    check(scalabl_cuda_update_forward(&op, reinterpret_cast<void *>(y), y_stride,
                                      reinterpret_cast<void *>(h),
                                      reinterpret_cast<void *>(scratch), &bytes,
                                      reinterpret_cast<void *>(stream)));
    return bytes;
}

int64_t cuda_backward(const Update &op, uintptr_t grad_y, int64_t grad_y_stride, uintptr_t h,
                      uintptr_t grad_x, int64_t grad_x_stride, uintptr_t grad_A, uintptr_t grad_B,
                      uintptr_t grad_s, uintptr_t grad_sigma, uintptr_t scratch, int64_t bytes,
                      uintptr_t stream) {
    check(scalabl_cuda_update_backward(
        &op, reinterpret_cast<const void *>(grad_y), grad_y_stride,
        reinterpret_cast<const void *>(h), reinterpret_cast<void *>(grad_x), grad_x_stride,
        reinterpret_cast<void *>(grad_A), reinterpret_cast<void *>(grad_B),
        reinterpret_cast<void *>(grad_s), reinterpret_cast<void *>(grad_sigma),
        reinterpret_cast<void *>(scratch), &bytes, reinterpret_cast<void *>(stream)));
    return bytes;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native core of scalabl_ref; addresses in, addresses out.";
    module.attr("digest") = scalabl_digest();
    module.attr("cuda") = scalabl_cuda();
    module.attr("compiler") = scalabl_compiler();
    module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), py::arg("rounds"));
    module.def("box_muller", &box_muller, py::arg("a"), py::arg("b"));
    module.def("normals", &normals, py::arg("seed"), py::arg("draw"), py::arg("layer"),
               py::arg("groups"), py::arg("count"), py::arg("rank"), py::arg("out"));

    py::class_<Update>(module, "Update")
        .def(py::init<int32_t, int32_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, int64_t,
                      uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, uintptr_t, double, bool,
                      uint64_t, uint32_t, uint32_t, uintptr_t, int64_t, int32_t>())
        .def("forward", &update_forward, py::arg("y"), py::arg("y_stride"), py::arg("h"))
        .def("backward", &update_backward, py::arg("grad_y"), py::arg("grad_y_stride"),
             py::arg("h"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("grad_A"),
             py::arg("grad_B"), py::arg("grad_s"), py::arg("grad_sigma"))
        .def("cuda_forward", &cuda_forward, py::arg("y"), py::arg("y_stride"), py::arg("h"),
             py::arg("scratch"), py::arg("bytes"), py::arg("stream"))
        .def("cuda_backward", &cuda_backward, py::arg("grad_y"), py::arg("grad_y_stride"),
             py::arg("h"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("grad_A"),
             py::arg("grad_B"), py::arg("grad_s"), py::arg("grad_sigma"), py::arg("scratch"),
             py::arg("bytes"), py::arg("stream"));
    module.def("isa", &scalabl_isa);
    module.def("use_isa", [](const char *name) { check(scalabl_use_isa(name)); }, py::arg("name"));
}
