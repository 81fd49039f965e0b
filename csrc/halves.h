// The C++ types of the dtypes. bfloat16 and float16 hold bits and are converted to float and back
// without the hardware or a library, so that every path gives the same.
#pragma once

#include <stdint.h>
#include <string.h>

#include "both.h"
#include "scalabl.h"

namespace scalabl {

SCALABL_BOTH float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

SCALABL_BOTH uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

SCALABL_BOTH float widen(float value) { return value; }
SCALABL_BOTH double widen(double value) { return value; }

SCALABL_BOTH float widen(bfloat16 value) {
    return from_bits(static_cast<uint32_t>(value.bits) << 16);
}

SCALABL_BOTH float widen(float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t size = value.bits & 0x7fffu;
    if (size < 0x0400u) {  // zero or subnormal: a whole number of 2^-24
        return from_bits(sign | to_bits(static_cast<float>(size) * 0x1p-24f));
    }
    // Rebias the exponent, or keep infinity and NaN.
    const uint32_t wide = size < 0x7c00u ? (size << 13) + (112u << 23) : (size << 13) | 0x7f800000u;
    return from_bits(sign | wide);
}

// To nearest, ties to even; NaN stays NaN (made quiet).
SCALABL_BOTH void narrow(float value, float &out) { out = value; }
SCALABL_BOTH void narrow(double value, double &out) { out = value; }

SCALABL_BOTH void narrow(float value, bfloat16 &out) {
    const uint32_t bits = to_bits(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

SCALABL_BOTH void narrow(float value, float16 &out) {
    const uint32_t bits = to_bits(value), size = bits & 0x7fffffffu;
    uint32_t half;
    if (size > 0x7f800000u) {
        half = 0x7e00u;
    } else if (size >= 0x477ff000u) {  // 65520 and more
        half = 0x7c00u;
    } else if (size < 0x38800000u) {  // below 2^-14: rounded at 2^-24, the last place of 0.5
        half = to_bits(from_bits(size) + 0.5f) - to_bits(0.5f);
    } else {
        half = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    }
    out.bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}

// The type in which products of T are summed.
template <typename T>
struct Wide {
    typedef float type;
};
template <>
struct Wide<double> {
    typedef double type;
};

// Calls fn(S()), where S is the type of a dtype.
template <typename Fn>
void by_dtype(int32_t dtype, const Fn &fn) {
    switch (dtype) {
        case SCALABL_FLOAT64: return fn(double());
        case SCALABL_BFLOAT16: return fn(bfloat16());
        case SCALABL_FLOAT16: return fn(float16());
        default: return fn(float());
    }
}

// Calls fn(S(), P()), where S is the type of the rows and P that of the adapter.
template <typename Fn>
void by_dtypes(const scalabl_update &op, const Fn &fn) {
    by_dtype(op.dtype, [&](auto row) {
        return op.adapter_dtype == SCALABL_FLOAT32 ? fn(row, float()) : fn(row, row);
    });
}

}  // namespace scalabl
