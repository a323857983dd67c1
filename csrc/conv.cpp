// The partial weight gradients of a convolution on the CPU: PyTorch's own convolution computes them, a group of samples
// to a thread. With several threads to a group oneDNN would cut the gradient up by their number, and the bits with it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/macros/Macros.h>

#ifdef _OPENMP
#include <omp.h>   // the library that PyTorch has loaded
#endif

#include <cstring>
#include <vector>

#include "ops.h"

namespace ordered {
namespace {

// While it lives, what this thread calls sees one thread.
struct OneThread {
#ifdef _OPENMP
  // PyTorch sets the number of a new thread when it first asks for it: that must not happen later.
  const int64_t asked = torch::stable::get_num_threads();
  const int before = omp_get_max_threads();
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before); }
#endif
};

// Whether OneThread reaches PyTorch, which may have been built with another OpenMP library than this.
bool reaches_pytorch() {
#ifdef _OPENMP
  const OneThread alone;
  return torch::stable::get_num_threads() == 1;
#else
  return false;
#endif
}

// (splits, *weight.shape): the weight gradients of `splits` consecutive groups of samples, as torch.tensor_split cuts
// them. grad is (batch, out, height, width), x (batch, in, height, width); of weight only the shape is used.
Tensor conv2d_weight_partials(const Tensor& grad, const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                              int64_t splits) {
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4 && weight.dim() == 4 && grad.size(0) == x.size(0) && 1 <= splits &&
                      splits <= x.size(0) && grad.scalar_type() == x.scalar_type() &&
                      weight.scalar_type() == x.scalar_type(),
                  "conv2d_weight_partials: shapes, dtypes or splits do not match");
  const Groups samples(x.size(0), splits);
  std::vector<Tensor> grads, inputs;   // views that are made here, where no gradient is recorded
  for (int64_t g = 0; g < splits; ++g) {
    grads.push_back(torch::stable::narrow(const_cast<Tensor&>(grad), 0, samples[g].begin, samples[g].size));
    inputs.push_back(torch::stable::narrow(const_cast<Tensor&>(x), 0, samples[g].begin, samples[g].size));
  }
  Tensor partials = torch::stable::new_empty(
      weight, {splits, weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  const size_t bytes = size_t(weight.numel()) * weight.element_size();
  char* const to = static_cast<char*>(partials.mutable_data_ptr());
  const auto add = [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t no_padding[] = {0, 0};
      const int32_t wanted[] = {0, 1, 0};
      AtenTensorHandle of_input, of_weight, of_bias;
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
          grads[g].get(), inputs[g].get(), weight.get(), nullptr, 0, stride.data(), 2, padding.data(), 2,
          dilation.data(), 2, 0, no_padding, 2, groups, wanted, 3, &of_input, &of_weight, &of_bias));
      const Tensor nothing[] = {Tensor(of_input), Tensor(of_bias)};   // to be freed
      const Tensor partial = torch::stable::contiguous(Tensor(of_weight));
      std::memcpy(to + g * bytes, partial.const_data_ptr(), bytes);
    }
  };
  // In a parallel region oneDNN must not count on more threads than the one it gets: it would leave work out.
  if (!reaches_pytorch()) add(0, splits);
  else torch::stable::parallel_for(0, splits, 1, [&](int64_t first, int64_t last) {
    const OneThread alone;
    add(first, last);
  });
  return partials;
}

}  // namespace
}  // namespace ordered

STABLE_TORCH_LIBRARY_IMPL(ordered_reduce, CPU, m) {
  m.impl("conv2d_weight_partials", TORCH_BOX(&ordered::conv2d_weight_partials));
}
