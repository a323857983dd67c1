// One reduction, as ops.cpp hands it to cpu.cpp or cuda.cu.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <optional>

#include "order.h"
#include "require.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK   // of PyTorch 2.13, which says what went wrong
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace ordered {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Order { fixed, shuffled, atomic, exact, arrival, replay };   // the first four: as in ORDERS of ops.py

// x is seen as (outer, terms, inner) with any strides; out[o * inner + i] = sum over t of
// x[o * outer_stride + t * term_stride + i * inner_stride].
struct Reduction {
  int64_t outer, terms, inner;
  int64_t outer_stride, term_stride, inner_stride;
  int64_t groups;
  Order order;
  bool per_output;         // scope "output"; otherwise "tensor"
  uint64_t seed;
  uint32_t step, op;
  const int64_t* device_step;   // where step stands on the device of x; null: it is known here
  const int64_t* rows = nullptr;   // on the CPU: t stands for rows[t] above
  uint64_t first = 0;              // number of the first output, for its draws
  int32_t* tickets = nullptr;      // arrival writes them, replay reads them: stretch s of the outputs adds first group
                                   // tickets[s * groups], then tickets[s * groups + 1], ...

  ORDERED_HD int64_t outputs() const { return outer * inner; }
  int64_t first_term(int64_t output) const {   // its place in x; a division takes as long as twenty terms
    if (inner == 1) return output * outer_stride;
    return output / inner * outer_stride + output % inner * inner_stride;
  }
  ORDERED_HD int64_t stretches() const { return (outputs() + kStretch - 1) / kStretch; }
};

// out is contiguous and not empty, terms > 0.
void sum_cpu(const Reduction& r, const Tensor& x, Tensor& out);
void sum_cuda(const Reduction& r, const Tensor& x, Tensor& out);

// The same for x and out of r's dtype at the given places.
void exact_cpu(const Reduction& r, ScalarType type, const void* x, void* out);

// out[v] = input[v] + the reduction of source[position[start[v]]] ... source[position[start[v + 1] - 1]]; all of these
// are rows of r.inner numbers one after the other. r.outer is the number of v, r.terms that of source's rows, r.groups
// the splits asked for. index[position[k]] is v.
struct Segments {
  const int64_t *index, *start, *position;
};

// All contiguous. segments: start and position, one after the other, which the CPU finds itself where it is null.
void index_add_cpu(const Reduction& r, const Tensor& input, const Tensor& index, const Tensor& source,
                   const Tensor* segments, Tensor& out);
void index_add_cuda(const Reduction& r, const Tensor& input, const Tensor& index, const Tensor& source,
                    const Tensor* segments, Tensor& out);

// Partial sums of one shape and layout, each in memory of its own. Walking there, the last axis first, one comes by
// size[a] numbers along axis a, stride[a] apart, which are out_stride[a] outputs apart. The first axes may be of size 1.
// alike: the sum lies in memory as they do; otherwise it is contiguous, and they are not.
struct Apart {
  static constexpr int kMost = 64, kAxes = 4;
  const void* data[kMost];
  int64_t size[kAxes], stride[kAxes], out_stride[kAxes];
  bool alike;
};

// out (not empty, of the dtype of the partial sums, or float for those of half types) = the r.groups partial sums, fixed
// or shuffled.
void add_partials_cuda(const Reduction& r, const Apart& partials, ScalarType type, Tensor& out);

// out, of 4 and n int64 numbers, has in column i the four words of Philox with the counter (i, 0, step, op) and r's seed.
void philox_cpu(const Reduction& r, Tensor& out);
void philox_cuda(const Reduction& r, Tensor& out);

// A Reduction without its shape, of these arguments of an operator; step is the CPU's or lies on the device of x.
Reduction ordered(int64_t order, bool per_output, int64_t seed, const std::optional<Tensor>& step, int64_t op,
                  const Tensor& x);

// The operator `sum` of tensors on the CPU.
Tensor sum_on_cpu(const Tensor& x, int64_t dims, bool keepdim, int64_t splits, int64_t order, bool per_output,
                  int64_t seed, const std::optional<Tensor>& step, int64_t op);

#ifdef __CUDACC__
using torch::headeronly::Half;
#else
// PyTorch's with conversions that compilers vectorize: without branches, choosing by masks.
struct Half : torch::headeronly::Half {
  Half() = default;
  Half(float value) {   // rounds to nearest, ties to even
    const int32_t bits = std::bit_cast<int32_t>(value), size = bits & 0x7FFFFFFF;
    const int32_t normal = (int32_t(uint32_t(size) + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10);
    const int32_t small = std::bit_cast<int32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3F000000;   // in units of 2^-24
    const int32_t is_small = -(size < 0x38800000), is_nan = -(size > 0x7F800000);
    const int32_t finite = (small & is_small) | (normal & ~is_small), most = -(size >= 0x477FF000);   // 65520
    x = uint16_t((((finite & ~most) | (0x7C00 & most)) | (0x7E00 & is_nan)) | (bits >> 16 & 0x8000));
  }
  operator float() const {
    const int32_t size = x & 0x7FFF, sign = int32_t(int16_t(x)) & INT32_MIN;
    const int32_t normal = (size << 13) + (112 << 23) + (-(size >= 0x7C00) & 112 << 23);
    const int32_t small = std::bit_cast<int32_t>(float(size) * 0x1p-24f), is_small = -(size < 0x400);
    return std::bit_cast<float>((small & is_small) | (normal & ~is_small) | sign);
  }
};
#endif

// Calls f with a value of the C++ type.
template <class F>
void for_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16());
    default: require(false, "ordered_reduce is not implemented for this dtype");
  }
}

// Half types accumulate in float.
template <class T>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};

}  // namespace ordered
