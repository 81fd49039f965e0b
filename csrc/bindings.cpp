// The only file that knows Python. No framework's headers are needed: scalabl_ref passes addresses
// (Tensor.data_ptr()) and guarantees type, size and contiguity; add_update and update_gradients,
// for NumPy, JAX and others, take arrays through DLPack and check them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "scalabl.h"
#include "third_party/dlpack.h"

namespace py = pybind11;

namespace {

// Raises the package's InputError, which is a ValueError; a plain ValueError if this module was
// loaded by itself, without the package and its PyTorch.
[[noreturn]] void refuse(const std::string &sentence) {
    const py::object modules = py::module_::import("sys").attr("modules");
    const py::object errors = modules.attr("get")("scalabl_ref.support.errors");
    const py::object error = errors.is_none() ? py::reinterpret_borrow<py::object>(PyExc_ValueError)
                                              : errors.attr("InputError");
    PyErr_SetString(error.ptr(), sentence.c_str());
    throw py::error_already_set();
}

void check(scalabl_status status) {
    if (status != SCALABL_OK) refuse(scalabl_message(status));
}

// Makes a call without the interpreter's lock.
template <typename Call>
void unlocked(const Call &call) {
    scalabl_status status;
    {
        const py::gil_scoped_release release;
        status = call();
    }
    check(status);
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

template <typename T = void>
T *pointer(uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

// groups, draws: addresses of `count` int64 numbers each, draws 0 for none; out: address of
// count * rank float32, row-major.
void normals(uint64_t seed, uint32_t draw, uint32_t layer, uintptr_t groups, uintptr_t draws,
             int64_t count, int64_t rank, uintptr_t out) {
    unlocked([&] {
        return scalabl_normals(seed, draw, layer, pointer<int64_t>(groups),
                               pointer<int64_t>(draws), count, rank, pointer<float>(out));
    });
}

// --- The arguments of an update -----------------------------------------------------------------

// Values by name, as Python's fast calling convention passes them: pybind11's own keyword
// arguments would double the cost of a small call.
class Named {
  public:
    Named(PyObject *const *values, PyObject *names, Py_ssize_t expected)
        : values_(values), names_(names), count_(names ? PyTuple_GET_SIZE(names) : 0) {
        if (count_ != expected) throw py::type_error("update: wrong number of arguments");
    }
    // Fast if the names are looked up in the order in which they were given.
    PyObject *operator()(const char *name) {
        for (Py_ssize_t tried = 0; tried < count_; ++tried) {
            const Py_ssize_t at = next_;
            next_ = (next_ + 1) % count_;
            if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names_, at), name) == 0) {
                return values_[at];
            }
        }
        throw py::type_error(std::string("update: missing argument ") + name);
    }

  private:
    PyObject *const *values_;
    PyObject *names_;
    Py_ssize_t count_, next_ = 0;
};

template <typename T>
void take(PyObject *from, T &to) {
    if constexpr (std::is_pointer_v<T>) {
        to = static_cast<T>(PyLong_AsVoidPtr(from));
    } else if constexpr (std::is_floating_point_v<T>) {
        to = PyFloat_AsDouble(from);
    } else if constexpr (sizeof(T) == 8 && std::is_unsigned_v<T>) {
        to = PyLong_AsUnsignedLongLong(from);
    } else {
        const long long value = PyLong_AsLongLong(from);
        to = static_cast<T>(value);
        if (to != value) PyErr_SetString(PyExc_OverflowError, "update: number out of range");
    }
    if (PyErr_Occurred()) throw py::error_already_set();
}

template <typename... T>
void take_all(PyObject *from, T &...to) {
    if (!PyTuple_CheckExact(from) || PyTuple_GET_SIZE(from) != sizeof...(T)) {
        throw py::type_error("update: expected a tuple of " + std::to_string(sizeof...(T)));
    }
    Py_ssize_t i = 0;
    (take(PyTuple_GET_ITEM(from, i++), to), ...);
}

struct Update : scalabl_update {};

Update update_of(Named arguments) {
    Update op = {};
    take_all(arguments("dtypes"), op.dtype, op.adapter_dtype);
    take_all(arguments("sizes"), op.rows, op.d_in, op.d_out, op.rank);
    take_all(arguments("x"), op.x, op.x_stride);
    take_all(arguments("A"), op.A, op.A_stride);
    take_all(arguments("B"), op.B, op.B_stride);
    take(arguments("s"), op.s);
    take(arguments("sigma"), op.sigma);
    take(arguments("scaling"), op.scaling);
    PyObject *const noise = arguments("noise");
    op.noisy = noise != Py_None;
    if (op.noisy) take_all(noise, op.seed, op.draw, op.layer);
    take_all(arguments("groups"), op.groups, op.draws, op.rows_per_group);
    take(arguments("threads"), op.threads);
    return op;
}

PyObject *update(PyObject *, PyObject *const *values, Py_ssize_t positional, PyObject *names) {
    try {
        if (positional != 0) throw py::type_error("update: give all arguments by name");
        return py::cast(update_of(Named(values, names, 11))).release().ptr();
    } catch (py::error_already_set &error) {
        error.restore();
    } catch (const py::builtin_exception &error) {
        error.set_error();
    }
    return nullptr;
}

constexpr const char *UPDATE = R"(
update(*, dtypes, sizes, x, A, B, s, sigma, scaling, noise, groups, threads)

The arguments of one update, scalabl_update in scalabl.h, with addresses for pointers (0 is null).

dtypes: of the rows and of the adapter, as numbers of scalabl_dtype. sizes: rows, d_in, d_out, rank.
x, A, B: address, elements from one row to the next. s, sigma: address. noise: None, or seed, draw,
layer. groups: address of the ids, address of the draws, rows per group.)";

PyMethodDef update_method = {
    "update", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&update)),
    METH_FASTCALL | METH_KEYWORDS, UPDATE + 1};

void update_forward(const Update &op, uintptr_t y, int64_t y_stride, uintptr_t h) {
    unlocked([&] { return scalabl_update_forward(&op, pointer(y), y_stride, pointer(h)); });
}

void update_backward(const Update &op, uintptr_t grad_y, int64_t grad_y_stride, uintptr_t h,
                     uintptr_t grad_x, int64_t grad_x_stride, uintptr_t grad_A, uintptr_t grad_B,
                     uintptr_t grad_s, uintptr_t grad_sigma) {
    unlocked([&] {
        return scalabl_update_backward(&op, pointer(grad_y), grad_y_stride, pointer(h),
                                       pointer(grad_x), grad_x_stride, pointer(grad_A),
                                       pointer(grad_B), pointer(grad_s), pointer(grad_sigma));
    });
}

void plain_forward(const Update &op, uintptr_t y, int64_t y_stride, uintptr_t h) {
    unlocked([&] { return scalabl_plain_forward(&op, pointer(y), y_stride, pointer(h)); });
}

// As update_backward; h is always computed again.
void plain_backward(const Update &op, uintptr_t grad_y, int64_t grad_y_stride, uintptr_t,
                    uintptr_t grad_x, int64_t grad_x_stride, uintptr_t grad_A, uintptr_t grad_B,
                    uintptr_t grad_s, uintptr_t grad_sigma) {
    unlocked([&] {
        return scalabl_plain_backward(&op, pointer(grad_y), grad_y_stride, pointer(grad_x),
                                      grad_x_stride, pointer(grad_A), pointer(grad_B),
                                      pointer(grad_s), pointer(grad_sigma));
    });
}

// --- The model's blocks -------------------------------------------------------------------------

// Tensors are addresses; sizes: rows, n.
void rms_norm(int32_t dtype, std::array<int64_t, 2> sizes, uintptr_t x, uintptr_t weight,
              double eps, uintptr_t y, uintptr_t scale, int32_t threads) {
    const scalabl_norm op = {dtype, sizes[0], sizes[1], pointer(x), pointer(weight),
                             static_cast<float>(eps), threads};
    unlocked([&] { return scalabl_rms_norm(&op, pointer(y), pointer<float>(scale)); });
}

void rms_norm_backward(int32_t dtype, std::array<int64_t, 2> sizes, uintptr_t x, uintptr_t weight,
                       uintptr_t grad_y, uintptr_t scale, uintptr_t grad_x, int32_t threads) {
    const scalabl_norm op = {dtype, sizes[0], sizes[1], pointer(x), pointer(weight), 0, threads};
    unlocked([&] {
        return scalabl_rms_norm_backward(&op, pointer(grad_y), pointer<float>(scale),
                                         pointer(grad_x));
    });
}

// sizes: rows, heads, n, angles.
void rotate(int32_t dtype, std::array<int64_t, 4> sizes, uintptr_t cos, uintptr_t sin,
            uintptr_t places, bool back, uintptr_t x, uintptr_t y, int32_t threads) {
    const scalabl_rotation op = {dtype,        sizes[0],     sizes[1],
                                 sizes[2],     sizes[3],     pointer(cos),
                                 pointer(sin), pointer<int64_t>(places), back, threads};
    unlocked([&] { return scalabl_rotate(&op, pointer(x), pointer(y)); });
}

void swiglu(int32_t dtype, int64_t n, uintptr_t gate, uintptr_t up, uintptr_t y, int32_t threads) {
    unlocked([&] {
        return scalabl_swiglu(dtype, n, pointer(gate), pointer(up), pointer(y), threads);
    });
}

void swiglu_backward(int32_t dtype, int64_t n, uintptr_t grad_y, uintptr_t gate, uintptr_t up,
                     uintptr_t grad_gate, uintptr_t grad_up, int32_t threads) {
    unlocked([&] {
        return scalabl_swiglu_backward(dtype, n, pointer(grad_y), pointer(gate), pointer(up),
                                       pointer(grad_gate), pointer(grad_up), threads);
    });
}

// sizes: rows, d_in, d_out.
void few_rows(int32_t dtype, std::array<int64_t, 3> sizes, uintptr_t x, uintptr_t weight,
              uintptr_t bias, uintptr_t y, int32_t threads) {
    const scalabl_product op = {dtype,      sizes[0],        sizes[1],      sizes[2],
                                pointer(x), pointer(weight), pointer(bias), threads};
    unlocked([&] { return scalabl_few_rows(&op, pointer(y)); });
}

// sizes: rows, n, stride of codes, stride of scale.
void dequantize(int32_t dtype, std::array<int64_t, 4> sizes, uintptr_t codes, uintptr_t scale,
                uintptr_t levels, uintptr_t weight, int32_t threads) {
    const scalabl_codes op = {dtype,          sizes[0], sizes[1],
                              pointer(codes), sizes[2], pointer(scale),
                              sizes[3],       pointer<float>(levels), threads};
    unlocked([&] { return scalabl_dequantize(&op, pointer(weight)); });
}

// --- CUDA ---------------------------------------------------------------------------------------

// Both return the bytes of scratch space that are needed; with scratch 0 they do nothing else.
int64_t cuda_forward(const Update &op, uintptr_t y, int64_t y_stride, uintptr_t h,
                     uintptr_t scratch, int64_t bytes, uintptr_t stream) {
    check(scalabl_cuda_update_forward(&op, pointer(y), y_stride, pointer(h), pointer(scratch),
                                      &bytes, pointer(stream)));
    return bytes;
}

int64_t cuda_backward(const Update &op, uintptr_t grad_y, int64_t grad_y_stride, uintptr_t h,
                      uintptr_t grad_x, int64_t grad_x_stride, uintptr_t grad_A, uintptr_t grad_B,
                      uintptr_t grad_s, uintptr_t grad_sigma, uintptr_t scratch, int64_t bytes,
                      uintptr_t stream) {
    check(scalabl_cuda_update_backward(&op, pointer(grad_y), grad_y_stride, pointer(h),
                                       pointer(grad_x), grad_x_stride, pointer(grad_A),
                                       pointer(grad_B), pointer(grad_s), pointer(grad_sigma),
                                       pointer(scratch), &bytes, pointer(stream)));
    return bytes;
}

// --- Arrays of any library ----------------------------------------------------------------------

enum Access { READ, WRITE };

// An array borrowed through DLPack for one call. The capsule owns the memory and frees it itself,
// because it keeps its name.
class Array {
  public:
    Array(const char *name, const py::object &source, int32_t dimensions, Access access)
        : name_(name), capsule_(export_of(source)) {
        const char *const kind = PyCapsule_GetName(capsule_.ptr());
        if (kind && std::string(kind) == "dltensor_versioned") {
            const auto *managed = static_cast<const DLManagedTensorVersioned *>(
                PyCapsule_GetPointer(capsule_.ptr(), kind));
            if (managed->version.major != DLPACK_MAJOR_VERSION) {
                fail("expected DLPack 1");
            }
            if (access == WRITE && managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) {
                fail("is read-only");
            }
            tensor_ = &managed->dl_tensor;
        } else if (kind && std::string(kind) == "dltensor") {
            // JAX's arrays come in this form, and must not be changed.
            if (access == WRITE) {
                fail("its DLPack (before 1.0) does not say whether it may be changed");
            }
            tensor_ = &static_cast<const DLManagedTensor *>(
                           PyCapsule_GetPointer(capsule_.ptr(), kind))->dl_tensor;
        } else {
            fail("__dlpack__ gave no DLPack capsule");
        }
        if (tensor_->device.device_type != kDLCPU) fail("is not in the memory of the CPU");
        if (tensor_->ndim != dimensions) {
            fail(std::to_string(tensor_->ndim) + " dimensions, expected " +
                 std::to_string(dimensions));
        }
        if (tensor_->dtype.lanes != 1 || tensor_->dtype.bits < 8) fail("elements of unknown type");
        if (size(dimensions - 1) > 1 && stride(dimensions - 1) != 1) {
            fail("the last dimension must have stride 1");
        }
        if (access == WRITE && dimensions == 2 && size(0) > 1 &&
            (row_stride() < 0 ? -row_stride() : row_stride()) < size(1)) {
            fail("its rows overlap");
        }
        if (reinterpret_cast<uintptr_t>(data()) % (tensor_->dtype.bits / 8) != 0) {
            fail("its address is not a multiple of the element's size");
        }
    }

    void *data() const { return static_cast<char *>(tensor_->data) + tensor_->byte_offset; }
    int64_t size(int32_t dimension) const { return tensor_->shape[dimension]; }
    // Elements from one row to the next.
    int64_t row_stride() const { return stride(0); }

    // A floating-point type of the core.
    int32_t dtype() const {
        const int code = tensor_->dtype.code, bits = tensor_->dtype.bits;
        if (code == kDLFloat && bits == 32) return SCALABL_FLOAT32;
        if (code == kDLFloat && bits == 64) return SCALABL_FLOAT64;
        if (code == kDLBfloat && bits == 16) return SCALABL_BFLOAT16;
        if (code == kDLFloat && bits == 16) return SCALABL_FLOAT16;
        fail("dtype must be float32, float64, bfloat16 or float16");
    }
    bool is_int64() const {
        return tensor_->dtype.code == kDLInt && tensor_->dtype.bits == 64;
    }

    void require_dtype(const Array &other) const {
        if (dtype() != other.dtype()) {
            fail(std::string("dtype differs from that of ") + other.name_);
        }
    }
    void require_shape(const std::vector<int64_t> &expected) const {
        const std::vector<int64_t> shape(tensor_->shape, tensor_->shape + tensor_->ndim);
        if (shape != expected) fail("shape " + text(shape) + ", expected " + text(expected));
    }
    void require_contiguous() const {
        if (tensor_->ndim == 2 && size(0) > 1 && size(1) > 0 && row_stride() != size(1)) {
            fail("must be contiguous");
        }
    }
    [[noreturn]] void fail(const std::string &what) const {
        refuse(std::string(name_) + ": " + what);
    }

  private:
    const char *name_;
    py::object capsule_;
    const DLTensor *tensor_ = nullptr;

    py::object export_of(const py::object &source) const {
        if (!py::hasattr(source, "__dlpack__") || !py::hasattr(source, "__dlpack_device__")) {
            fail("expected an array with __dlpack__");
        }
        const py::tuple device = source.attr("__dlpack_device__")();
        if (py::int_(py::object(device[0])).cast<int64_t>() != kDLCPU) {
            fail("is not in the memory of the CPU");
        }
        const py::object give = source.attr("__dlpack__");
        py::object capsule;
        try {
            capsule = give(py::arg("max_version") = py::make_tuple(DLPACK_MAJOR_VERSION, 0));
        } catch (py::error_already_set &error) {
            if (!error.matches(PyExc_TypeError)) throw;
            capsule = give();  // a library from before DLPack had versions
        }
        if (!PyCapsule_CheckExact(capsule.ptr())) fail("__dlpack__ gave no DLPack capsule");
        return capsule;
    }

    int64_t stride(int32_t dimension) const {
        if (tensor_->strides) return tensor_->strides[dimension];
        return dimension == tensor_->ndim - 1 ? 1 : size(tensor_->ndim - 1);  // at most two
    }

    static std::string text(const std::vector<int64_t> &shape) {
        std::string out = "(";
        for (const int64_t size : shape) out += std::to_string(size) + ", ";
        if (shape.size() > 1) out.resize(out.size() - 2);
        else out.resize(out.size() - 1);
        return out + ")";
    }
};

// The checked arguments of both functions; `rows` is y or grad_y.
struct Arguments {
    Array rows, x, A, B, s, sigma;
    std::optional<Array> groups, draws;
    scalabl_update op;

    Arguments(const char *rows_name, const py::object &rows_, Access access, const py::object &x_,
              const py::object &A_, const py::object &B_, const py::object &s_,
              const py::object &sigma_, double scaling, const py::object &noise,
              const py::object &groups_, const py::object &draws_, int64_t rows_per_group,
              int32_t threads)
        : rows(rows_name, rows_, 2, access),
          x("x", x_, 2, READ),
          A("A", A_, 2, READ),
          B("B", B_, 2, READ),
          s("s", s_, 1, READ),
          sigma("sigma", sigma_, 1, READ),
          op{} {
        const int64_t count = x.size(0), d_in = x.size(1), r = A.size(0), d_out = B.size(0);
        if (r < 1 || r > 256) A.fail("rank must be in [1, 256]");
        A.require_shape({r, d_in});
        B.require_shape({d_out, r});
        s.require_shape({r});
        sigma.require_shape({r});
        rows.require_shape({count, d_out});
        rows.require_dtype(x);
        if (A.dtype() != SCALABL_FLOAT32) A.require_dtype(x);
        B.require_dtype(A);
        s.require_dtype(A);
        sigma.require_dtype(A);
        if (rows_per_group < 1) refuse("rows_per_group: must be at least 1");
        const int64_t all = count / rows_per_group + (count % rows_per_group != 0);
        borrow(groups, "groups", groups_, all);
        borrow(draws, "draws", draws_, all);
        op.dtype = x.dtype();
        op.adapter_dtype = A.dtype();
        op.rows = count;
        op.d_in = d_in;
        op.d_out = d_out;
        op.rank = r;
        op.x = x.data();
        op.x_stride = x.row_stride();
        op.A = A.data();
        op.A_stride = A.row_stride();
        op.B = B.data();
        op.B_stride = B.row_stride();
        op.s = s.data();
        op.sigma = sigma.data();
        op.scaling = scaling;
        op.noisy = !noise.is_none();
        if (op.noisy) std::tie(op.seed, op.draw, op.layer) = numbers_of(noise);
        op.groups = groups ? static_cast<const int64_t *>(groups->data()) : nullptr;
        op.draws = draws ? static_cast<const int64_t *>(draws->data()) : nullptr;
        op.rows_per_group = rows_per_group;
        op.threads = threads;
    }

    // One int64 for each group, or None.
    static void borrow(std::optional<Array> &out, const char *name, const py::object &source,
                       int64_t groups) {
        if (source.is_none()) return;
        out.emplace(name, source, 1, READ);
        if (!out->is_int64()) out->fail("dtype must be int64");
        out->require_shape({groups});
    }
    static std::tuple<uint64_t, uint32_t, uint32_t> numbers_of(const py::object &noise) {
        try {
            return noise.cast<std::tuple<uint64_t, uint32_t, uint32_t>>();
        } catch (const py::cast_error &) {
            refuse("noise: expected None or (seed, draw, layer), below 2^64, 2^32 and 2^32 - 1");
        }
    }
};

void add_update(const py::object &y, const py::object &x, const py::object &A, const py::object &B,
                const py::object &s, const py::object &sigma, double scaling,
                const py::object &noise, const py::object &groups, const py::object &draws,
                int64_t rows_per_group, int32_t threads) {
    const Arguments all("y", y, WRITE, x, A, B, s, sigma, scaling, noise, groups, draws,
                        rows_per_group, threads);
    unlocked([&] {
        return scalabl_update_forward(&all.op, all.rows.data(), all.rows.row_stride(), nullptr);
    });
}

void update_gradients(const py::object &grad_y, const py::object &x, const py::object &A,
                      const py::object &B, const py::object &s, const py::object &sigma,
                      double scaling, const py::object &noise, const py::object &groups,
                      const py::object &draws, int64_t rows_per_group, int32_t threads,
                      const py::object &grad_x, const py::object &grad_A, const py::object &grad_B,
                      const py::object &grad_s, const py::object &grad_sigma) {
    const Arguments all("grad_y", grad_y, READ, x, A, B, s, sigma, scaling, noise, groups, draws,
                        rows_per_group, threads);
    const scalabl_update &op = all.op;
    const auto result = [](const char *name, const py::object &source, const Array &like,
                           const std::vector<int64_t> &shape) {
        std::optional<Array> out;
        if (source.is_none()) return out;
        out.emplace(name, source, static_cast<int32_t>(shape.size()), WRITE);
        out->require_shape(shape);
        out->require_dtype(like);
        return out;
    };
    const auto to_x = result("grad_x", grad_x, all.x, {op.rows, op.d_in});
    const auto to_A = result("grad_A", grad_A, all.A, {op.rank, op.d_in});
    const auto to_B = result("grad_B", grad_B, all.A, {op.d_out, op.rank});
    const auto to_s = result("grad_s", grad_s, all.A, {op.rank});
    const auto to_sigma = result("grad_sigma", grad_sigma, all.A, {op.rank});
    if (to_A) to_A->require_contiguous();
    if (to_B) to_B->require_contiguous();
    const auto place = [](const std::optional<Array> &out) { return out ? out->data() : nullptr; };
    unlocked([&] {
        return scalabl_update_backward(&op, all.rows.data(), all.rows.row_stride(), nullptr,
                                       place(to_x), to_x ? to_x->row_stride() : 0, place(to_A),
                                       place(to_B), place(to_s), place(to_sigma));
    });
}

constexpr const char *ADD_UPDATE = R"(
y += scaling * B ((A x) * (s + sigma * eps)), row by row, in place.

Shapes: y (rows, d_out), x (rows, d_in), A (r, d_in), B (d_out, r), s and sigma (r,), with r from 1
to 256. Any arrays with __dlpack__ on the CPU whose last dimension has stride 1, of float32,
float64, bfloat16 or float16: y of x's dtype; A, B, s and sigma of one dtype, float32 or x's. y is
changed, so it must come through DLPack 1.0 (as NumPy's do from 2.1 on) and not be read-only, and
it must not overlap the others.

noise is None (eps = 0) or (seed, draw, layer). Rows i with the same g = i // rows_per_group share
the eps of group groups[g], or of group g where groups is None, and of draw + draws[g], or of draw
where draws is None. groups and draws are int64; groups[g] and draw + draws[g] must be below 2^32.
At most `threads` threads work; the result does not depend on it.

Raises ValueError, naming the argument, before anything is changed.)";

constexpr const char *UPDATE_GRADIENTS = R"(
The gradients of add_update, given grad_y (rows, d_out), that of y; arguments are as there.

They are written into the arrays given, each of which may be None: to grad_x (rows, d_in) of x's
dtype the update's part is added; grad_A (r, d_in), grad_B (d_out, r), grad_s and grad_sigma (r,),
contiguous and of the dtype of A, are overwritten. The noise is drawn again.

Raises ValueError, naming the argument, before anything is changed.)";

void define_blocks(py::module_ &module) {
    module.def("rms_norm", &rms_norm, py::arg("dtype"), py::arg("sizes"), py::arg("x"),
               py::arg("weight"), py::arg("eps"), py::arg("y"), py::arg("scale"),
               py::arg("threads"));
    module.def("rms_norm_backward", &rms_norm_backward, py::arg("dtype"), py::arg("sizes"),
               py::arg("x"), py::arg("weight"), py::arg("grad_y"), py::arg("scale"),
               py::arg("grad_x"), py::arg("threads"));
    module.def("rotate", &rotate, py::arg("dtype"), py::arg("sizes"), py::arg("cos"),
               py::arg("sin"), py::arg("places"), py::arg("back"), py::arg("x"), py::arg("y"),
               py::arg("threads"));
    module.def("swiglu", &swiglu, py::arg("dtype"), py::arg("n"), py::arg("gate"), py::arg("up"),
               py::arg("y"), py::arg("threads"));
    module.def("swiglu_backward", &swiglu_backward, py::arg("dtype"), py::arg("n"),
               py::arg("grad_y"), py::arg("gate"), py::arg("up"), py::arg("grad_gate"),
               py::arg("grad_up"), py::arg("threads"));
    module.def("few_rows", &few_rows, py::arg("dtype"), py::arg("sizes"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("threads"));
    module.def("dequantize", &dequantize, py::arg("dtype"), py::arg("sizes"), py::arg("codes"),
               py::arg("scale"), py::arg("levels"), py::arg("weight"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native core of scalabl_ref. Framework-free: addresses, or DLPack arrays.";
    module.attr("digest") = scalabl_digest();
    module.attr("cuda") = scalabl_cuda();
    module.attr("compiler") = scalabl_compiler();
    module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), py::arg("rounds"));
    module.def("box_muller", &box_muller, py::arg("a"), py::arg("b"));
    module.def("normals", &normals, py::arg("seed"), py::arg("draw"), py::arg("layer"),
               py::arg("groups"), py::arg("draws"), py::arg("count"), py::arg("rank"),
               py::arg("out"));
    define_blocks(module);

    py::class_<Update>(module, "Update")
        .def("forward", &update_forward, py::arg("y"), py::arg("y_stride"), py::arg("h"))
        .def("backward", &update_backward, py::arg("grad_y"), py::arg("grad_y_stride"),
             py::arg("h"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("grad_A"),
             py::arg("grad_B"), py::arg("grad_s"), py::arg("grad_sigma"))
        .def("plain_forward", &plain_forward, py::arg("y"), py::arg("y_stride"), py::arg("h"))
        .def("plain_backward", &plain_backward, py::arg("grad_y"), py::arg("grad_y_stride"),
             py::arg("h"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("grad_A"),
             py::arg("grad_B"), py::arg("grad_s"), py::arg("grad_sigma"))
        .def("cuda_forward", &cuda_forward, py::arg("y"), py::arg("y_stride"), py::arg("h"),
             py::arg("scratch"), py::arg("bytes"), py::arg("stream"))
        .def("cuda_backward", &cuda_backward, py::arg("grad_y"), py::arg("grad_y_stride"),
             py::arg("h"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("grad_A"),
             py::arg("grad_B"), py::arg("grad_s"), py::arg("grad_sigma"), py::arg("scratch"),
             py::arg("bytes"), py::arg("stream"));
    module.attr("update") =
        py::reinterpret_steal<py::object>(PyCFunction_New(&update_method, nullptr));
    module.def("add_update", &add_update, ADD_UPDATE + 1, py::arg("y"), py::arg("x"), py::arg("A"),
               py::arg("B"), py::arg("s"), py::arg("sigma"), py::arg("scaling"),
               py::arg("noise") = py::none(), py::arg("groups") = py::none(),
               py::arg("draws") = py::none(), py::arg("rows_per_group") = 1,
               py::arg("threads") = 1);
    module.def("update_gradients", &update_gradients, UPDATE_GRADIENTS + 1, py::arg("grad_y"),
               py::arg("x"), py::arg("A"), py::arg("B"), py::arg("s"), py::arg("sigma"),
               py::arg("scaling"), py::arg("noise") = py::none(), py::arg("groups") = py::none(),
               py::arg("draws") = py::none(), py::arg("rows_per_group") = 1,
               py::arg("threads") = 1, py::kw_only(),
               py::arg("grad_x") = py::none(), py::arg("grad_A") = py::none(),
               py::arg("grad_B") = py::none(), py::arg("grad_s") = py::none(),
               py::arg("grad_sigma") = py::none());
    module.def("isa", &scalabl_isa);
    module.def("use_isa", [](const char *name) { check(scalabl_use_isa(name)); }, py::arg("name"));
}
