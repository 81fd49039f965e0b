// Functions for the host and, under nvcc, for the device as well. Static where they are free, so
// that files compiled for different instruction sets never share one copy.
#pragma once

#ifdef __CUDACC__
#define SCALABL_MEMBER inline __host__ __device__
#else
#define SCALABL_MEMBER inline
#endif
#define SCALABL_BOTH static SCALABL_MEMBER
