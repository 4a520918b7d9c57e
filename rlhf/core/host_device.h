#pragma once

/// Marks inline functions that host code and GPU kernels share.
#if defined(__CUDACC__)
#define RLHF_HOST_DEVICE __host__ __device__
#else
#define RLHF_HOST_DEVICE
#endif
