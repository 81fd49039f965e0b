// Marks functions for the host and, under nvcc, for the device too. Free functions are static, so
// that files compiled for different instruction sets never share one copy.
#pragma once

#ifdef __CUDACC__
#define SCALABL_MEMBER inline __host__ __device__
#else
#define SCALABL_MEMBER inline
#endif
#define SCALABL_BOTH static SCALABL_MEMBER
