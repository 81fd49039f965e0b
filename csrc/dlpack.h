// The structures through which array libraries hand each other memory: the ABI of DLPack, from
// https://dmlc.github.io/dlpack/latest/c_api.html, as far as it is needed to read one. Names, order
// and types of the fields are the specification's.
#pragma once

#include <stdint.h>

namespace dlpack {

constexpr int32_t CPU = 1;                                // device_type
constexpr uint8_t INT = 0, FLOAT = 2, BFLOAT = 4;         // code
constexpr uint64_t READ_ONLY = 1;                         // a bit of flags
constexpr const char *CAPSULE = "dltensor";               // of a ManagedTensor
constexpr const char *VERSIONED = "dltensor_versioned";   // of a ManagedTensorVersioned
constexpr uint32_t MAJOR = 1;                             // the version that is read here

struct Device {
    int32_t device_type, device_id;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void *data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape;
    int64_t *strides;  // in elements; null: row-major without gaps
    uint64_t byte_offset;
};

struct ManagedTensor {
    Tensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(ManagedTensor *);
};

struct Version {
    uint32_t major, minor;
};

struct ManagedTensorVersioned {
    Version version;
    void *manager_ctx;
    void (*deleter)(ManagedTensorVersioned *);
    uint64_t flags;
    Tensor dl_tensor;
};

}  // namespace dlpack
