// What cuda.cu and segments.cu need to launch a kernel; after <cuda_runtime.h>.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>

#include "ops.h"

namespace ordered {

inline void check(cudaError_t error) {
  require(error == cudaSuccess, "ordered_reduce: ", cudaGetErrorString(error));
}

// Blocks for so many jobs, `each` of them to a block. A kernel loops over what is beyond them.
inline int grid(int64_t jobs, int64_t each = 1) {
  return int(std::clamp<int64_t>((jobs + each - 1) / each, 1, 1 << 20));
}

// The stream to launch on. A DeviceGuard must be in force.
inline cudaStream_t stream_of(const Tensor& x) {
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
  return static_cast<cudaStream_t>(current);
}

}  // namespace ordered
