// `segments` of ops.cpp on CUDA. CUB's radix sort is stable, and takes a pass for every eight bits that an index has.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "launch.h"

namespace ordered {
namespace {

constexpr int kThreads = 256;

// Nothing has checked the index yet: what is out of range gets the last key, which no row looks for.
template <class Number>
__global__ void number(const int64_t* index, int64_t n, int64_t size, Number* key, Number* position) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    key[i] = Number(min(uint64_t(index[i]), uint64_t(size)));
    position[i] = Number(i);
  }
}

template <class Number>
__global__ void write(const Number* key, const Number* sorted, int64_t n, int64_t size, int64_t* start,
                      int64_t* position) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i <= max(n, size);
       i += int64_t(gridDim.x) * blockDim.x) {
    if (i < n) position[i] = int64_t(sorted[i]);
    if (i > size) continue;
    int64_t low = 0, high = n;                         // the first key that is not below i lies in low ... high
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (key[middle] < Number(i)) low = middle + 1;
      else high = middle;
    }
    start[i] = low;
  }
}

template <class Number>
void sort(const Tensor& index, int64_t size, Tensor& result) {
  const cudaStream_t stream = stream_of(index);
  const int64_t n = index.numel();
  int64_t* const start = static_cast<int64_t*>(result.mutable_data_ptr());
  Tensor numbers = torch::stable::new_empty(index, {4 * n * int64_t(sizeof(Number))}, ScalarType::Byte);
  Number* const at = static_cast<Number*>(numbers.mutable_data_ptr());
  cub::DoubleBuffer<Number> key(at, at + n), position(at + 2 * n, at + 3 * n);
  if (n > 0) {
    number<<<grid(n, kThreads), kThreads, 0, stream>>>(static_cast<const int64_t*>(index.const_data_ptr()), n, size,
                                                       key.Current(), position.Current());
    check(cudaGetLastError());
    const int bits = std::bit_width(uint64_t(size));
    size_t bytes = 0;
    const auto sort_pairs = [&](void* scratch) {       // or, without scratch, sets bytes
      check(cub::DeviceRadixSort::SortPairs(scratch, bytes, key, position, Number(n), 0, bits, stream));
    };
    sort_pairs(nullptr);
    Tensor scratch = torch::stable::new_empty(index, {int64_t(bytes)}, ScalarType::Byte);
    sort_pairs(scratch.mutable_data_ptr());
  }
  write<<<grid(std::max(n, size) + 1, kThreads), kThreads, 0, stream>>>(key.Current(), position.Current(), n, size,
                                                                        start, start + size + 1);
  check(cudaGetLastError());
}

Tensor segments(const Tensor& index, int64_t size) {
  require(index.scalar_type() == ScalarType::Long && index.is_contiguous() && size >= 0,
          "index must be contiguous int64");
  const torch::stable::accelerator::DeviceGuard guard(index.get_device_index());
  const int64_t n = index.numel();
  Tensor result = torch::stable::new_empty(index, {size + 1 + n});
  if (std::max(n, size) >> 31) sort<uint64_t>(index, size, result);
  else sort<uint32_t>(index, size, result);
  return result;
}

}  // namespace
}  // namespace ordered

STABLE_TORCH_LIBRARY_IMPL(ordered_reduce, CUDA, m) {
  m.impl("segments", TORCH_BOX(&ordered::segments));
}
