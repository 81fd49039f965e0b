// The only file that knows Python. Tensors come in as addresses (Tensor.data_ptr()), so that no
// framework's headers are needed; the caller vouches for their type, size and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "scalabl.h"

namespace py = pybind11;

namespace {

void check(scalabl_status status) {
    if (status != SCALABL_OK) throw py::value_error(scalabl_message(status));
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

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native core of scalabl_ref; addresses in, addresses out.";
    module.attr("digest") = scalabl_digest();
    module.attr("compiler") = scalabl_compiler();
    module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), py::arg("rounds"));
    module.def("box_muller", &box_muller, py::arg("a"), py::arg("b"));
    module.def("normals", &normals, py::arg("seed"), py::arg("draw"), py::arg("layer"),
               py::arg("groups"), py::arg("count"), py::arg("rank"), py::arg("out"));
}
