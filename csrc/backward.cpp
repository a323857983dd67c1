// The partial weight gradients of a convolution or a large linear layer on the CPU: PyTorch's own convolution or matrix
// product computes them, one thread each. Several threads would cut a gradient up by their number, and the bits with it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/macros/Macros.h>

#ifdef _OPENMP
#include <omp.h>   // the library that PyTorch has loaded
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "ops.h"

#ifdef __linux__
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));   // gives the last one; null if PyTorch has no MKL
#endif

namespace ordered {
namespace {

// While it lives, what this thread calls sees one thread.
struct OneThread {
#ifdef _OPENMP
  // PyTorch sets the number of a new thread when it first asks for it: that must not happen later.
  const int64_t asked = torch::stable::get_num_threads();
  const int before = omp_get_max_threads();
  const int of_mkl = set_mkl(1);
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before), set_mkl(of_mkl); }

  // torch.set_num_threads gives MKL a number of its own, which counts where this is no parallel region.
  static int set_mkl(int number) {
#ifdef __linux__
    if (MKL_Set_Num_Threads_Local) return MKL_Set_Num_Threads_Local(number);
#endif
    return 0;
  }
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

// f(first, last) for all of 0 ... n - 1, each of which is done by a thread alone.
template <class F>
void one_thread_each(int64_t n, const F& f) {
  if (!reaches_pytorch()) return f(0, n);
  // In a parallel region oneDNN must not count on more threads than the one it gets: it would leave work out.
  torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
    const OneThread alone;
    f(first, last);
  });
}

// The numbers at data as a matrix of these strides, of the dtype of like.
template <class T>
Tensor view(T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, const Tensor& like) {
  return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(data), {rows, columns},
                                  {row_stride, column_stride}, like.device(), like.scalar_type());
}

// A convolution's numbers; of two, the first is that of the height.
struct Shape {
  int64_t in, out, groups;
  int64_t image[2], kernel[2], pixels[2], stride[2], padding[2], dilation[2];
};

// The number to which channels are filled up with zeros: the library may add up the last few of another number in
// another order, and equal channels would differ.
int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }

// The weight gradients of the groups of samples from first to last, (out, in x kernel) each, as matrix products of the
// gradient, (out, samples x pixels), and of what those pixels see, (samples x pixels, in x kernel).
template <class T>
void products(const Tensor& grad, const Tensor& x, const Shape& s, const Groups& samples, int64_t first, int64_t last,
              T* partials) {
  const int64_t pixels = s.pixels[0] * s.pixels[1], most = samples.longest();
  const int64_t height = s.image[0] + 2 * s.padding[0], width = s.image[1] + 2 * s.padding[1];
  const int64_t terms = s.in * s.kernel[0] * s.kernel[1], out = padded(s.out), columns = padded(terms);
  // What a pixel sees is copied in pieces of up to four numbers that lie one after the other.
  const int64_t run = s.dilation[1] == 1 ? std::min<int64_t>(s.kernel[1], 4) : 1;
  struct Piece {
    int64_t offset, size;
  };
  std::vector<Piece> pieces;
  for (int64_t c = 0; c < s.in; ++c)
    for (int64_t i = 0; i < s.kernel[0]; ++i)
      for (int64_t j = 0; j < s.kernel[1]; j += run)
        pieces.push_back({(c * height + i * s.dilation[0]) * width + j * s.dilation[1],
                          std::min(run, s.kernel[1] - j)});
  const auto strides = [](const Tensor& t) { return std::array{t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; };
  const auto of_x = strides(x), of_grad = strides(grad);
  const T* const x_data = static_cast<const T*>(x.const_data_ptr());
  const T* const grad_data = static_cast<const T*>(grad.const_data_ptr());
  // An image in a frame of zeros; what the pixels of a group see; the group's gradient; their product.
  const int64_t sizes[] = {s.in * height * width + 3, most * pixels * columns + 3, out * most * pixels, out * columns};
  std::vector<Tensor> memory;
  T* data[4];
  for (int i = 0; i < 4; ++i) {
    memory.push_back(torch::stable::new_empty(grad, {sizes[i]}));
    data[i] = static_cast<T*>(memory[i].mutable_data_ptr());
  }
  const auto [frame, seen, grads, product] = data;
  std::fill_n(frame, sizes[0], T(0));
  const auto matrix = [&](T* data, int64_t rows, int64_t columns) { return view(data, rows, columns, columns, 1, grad); };
  for (int64_t g = first; g < last; ++g) {
    const auto [begin, size] = samples[g];
    T* to = seen;
    for (int64_t n = begin; n < begin + size; ++n) {
      for (int64_t c = 0; c < s.in; ++c)
        for (int64_t h = 0; h < s.image[0]; ++h) {
          const T* from = x_data + n * of_x[0] + c * of_x[1] + h * of_x[2];
          T* row = frame + (c * height + h + s.padding[0]) * width + s.padding[1];
          for (int64_t w = 0; w < s.image[1]; ++w) row[w] = from[w * of_x[3]];
        }
      for (int64_t p = 0; p < s.pixels[0]; ++p)
        for (int64_t q = 0; q < s.pixels[1]; ++q) {
          const T* from = frame + p * s.stride[0] * width + q * s.stride[1];
          for (const auto [offset, size] : pieces) std::memcpy(to, from + offset, 4 * sizeof(T)), to += size;
          to = std::fill_n(to, columns - terms, T(0));
        }
    }
    to = grads;
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t n = begin; n < begin + size; ++n)
        for (int64_t p = 0; p < s.pixels[0]; ++p) {
          const T* from = grad_data + n * of_grad[0] + o * of_grad[1] + p * of_grad[2];
          for (int64_t q = 0; q < s.pixels[1]; ++q) *to++ = from[q * of_grad[3]];
        }
    std::fill_n(to, (out - s.out) * size * pixels, T(0));
    T* const result = partials + g * s.out * terms;
    const bool direct = out == s.out && columns == terms;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(matrix(direct ? result : product, out, columns).get(),
                                                        matrix(grads, out, size * pixels).get(),
                                                        matrix(seen, size * pixels, columns).get()));
    for (int64_t o = 0; o < s.out && !direct; ++o) std::copy_n(product + o * columns, terms, result + o * terms);
  }
}

// The gradient of x (which = 0) or weight (1) by PyTorch's convolution.
Tensor convolution_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight, const int64_t* stride,
                            const int64_t* padding, const int64_t* dilation, int64_t groups, int which) {
  const int64_t no_padding[] = {0, 0};
  const int32_t wanted[] = {which == 0, which == 1, 0};
  AtenTensorHandle gradient[3];
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      grad.get(), x.get(), weight.get(), nullptr, 0, stride, 2, padding, 2, dilation, 2, 0, no_padding, 2, groups,
      wanted, 3, &gradient[0], &gradient[1], &gradient[2]));
  const Tensor all[] = {Tensor(gradient[0]), Tensor(gradient[1]), Tensor(gradient[2])};   // the others are freed
  return all[which];
}

// The weight gradients of the groups of samples by PyTorch's convolution, (out, in / groups, kernel) with the channels
// that the tensors have.
void convolutions(std::vector<Tensor>& grads, std::vector<Tensor>& inputs, const Tensor& weight, const Shape& s,
                  int64_t first, int64_t last, Tensor& partials) {
  const int64_t bytes = weight.numel() * weight.element_size();
  for (int64_t g = first; g < last; ++g) {
    const Tensor partial = torch::stable::contiguous(
        convolution_gradient(grads[g], inputs[g], weight, s.stride, s.padding, s.dilation, s.groups, 1));
    std::memcpy(static_cast<char*>(partials.mutable_data_ptr()) + g * bytes, partial.const_data_ptr(), bytes);
  }
}

// (G, *weight.shape), G = min(splits, batch): the weight gradients of G consecutive groups of samples, as
// torch.tensor_split cuts them. grad is (batch, out, height, width), x (batch, in, height, width), batch not 0; of
// weight only the shape is used.
Tensor conv2d_weight_partials(Tensor grad, Tensor x, Tensor weight, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                              int64_t splits) {
  require(grad.dim() == 4 && x.dim() == 4 && weight.dim() == 4 && grad.size(0) == x.size(0) && 1 <= x.size(0) &&
              1 <= splits && 1 <= groups && 1 <= weight.size(0) && weight.size(0) == grad.size(1) &&
              weight.size(1) * groups == x.size(1) && grad.scalar_type() == x.scalar_type() &&
              weight.scalar_type() == x.scalar_type(),
          "conv2d_weight_partials: shapes, dtypes or splits do not match");
  Shape s{x.size(1), grad.size(1), groups};
  for (int i = 0; i < 2; ++i) {
    s.image[i] = x.size(2 + i), s.kernel[i] = weight.size(2 + i), s.pixels[i] = grad.size(2 + i);
    s.stride[i] = stride.at(i), s.padding[i] = padding.at(i), s.dilation[i] = dilation.at(i);
    const int64_t most = std::max({s.image[i], s.kernel[i], s.pixels[i], s.stride[i], s.padding[i], s.dilation[i]});
    require(most < int64_t{1} << 31 && s.stride[i] > 0 && s.padding[i] >= 0 && s.dilation[i] > 0 &&
                (s.pixels[i] - 1) * s.stride[i] + (s.kernel[i] - 1) * s.dilation[i] <
                    s.image[i] + 2 * s.padding[i],
            "conv2d_weight_partials: this is no convolution's shape of grad");
  }
  const auto framed = [&s](int i) { return double(s.image[i] + 2 * s.padding[i]); };
  require(double(s.in) * framed(0) * framed(1) < 1e18, "conv2d_weight_partials: the padding is too large");
  const int64_t G = std::min(splits, x.size(0)), pixels = s.pixels[0] * s.pixels[1];
  const Groups samples(x.size(0), G);
  // On small images a product is faster than the library's convolution, a call of which costs tens of microseconds.
  const bool product = groups == 1 && (pixels <= 16 || s.kernel[0] * s.kernel[1] == 1 ||
                                       (pixels <= 64 && grad.numel() * (weight.numel() / s.out) < 1 << 26));
  if (product) {
    Tensor partials = torch::stable::new_empty(weight, {G, s.out, s.in, s.kernel[0], s.kernel[1]});
    for_type(x.scalar_type(), [&](auto zero) {
      auto* to = static_cast<decltype(zero)*>(partials.mutable_data_ptr());
      one_thread_each(G, [&](int64_t first, int64_t last) { products(grad, x, s, samples, first, last, to); });
    });
    return partials;
  }
  if (groups == 1) {
    // A single channel has no equals; but with one, and a sample alone, oneDNN does not treat all outputs alike.
    const int64_t out = padded(s.out), in = s.in == 1 && x.size(0) >= 2 * G ? 1 : padded(s.in);
    if (out > s.out) grad = torch::stable::pad(grad, {0, 0, 0, 0, 0, out - s.out});
    if (in > s.in) x = torch::stable::pad(x, {0, 0, 0, 0, 0, in - s.in});
    weight = torch::stable::new_empty(weight, {out, in, s.kernel[0], s.kernel[1]});
  } else if (x.element_size() == 2) {   // channels-last, the library reads memory there that nothing has been written to
    grad = torch::stable::contiguous(grad), x = torch::stable::contiguous(x);
    weight = torch::stable::new_empty(weight, {s.out, x.size(1) / groups, s.kernel[0], s.kernel[1]});
  }
  std::vector<Tensor> grads, inputs;   // views that are made here, where no gradient is recorded
  for (int64_t g = 0; g < G; ++g) {
    grads.push_back(torch::stable::narrow(grad, 0, samples[g].begin, samples[g].size));
    inputs.push_back(torch::stable::narrow(x, 0, samples[g].begin, samples[g].size));
  }
  Tensor partials = torch::stable::new_empty(
      weight, {G, weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  one_thread_each(G, [&](int64_t first, int64_t last) {
    convolutions(grads, inputs, weight, s, first, last, partials);
  });
  if (groups > 1) return partials;
  partials = torch::stable::narrow(partials, 1, 0, s.out);
  return torch::stable::contiguous(torch::stable::narrow(partials, 2, 0, s.in));
}

// The gradients of x, by PyTorch's convolution (an empty tensor unless it is wanted), and of weight: the sum of its
// partial gradients. One operator, since each call from Python takes as long as a small sum. conv: the stride, padding
// and dilation of the height and the width, groups.
std::tuple<Tensor, Tensor> conv2d_backward(Tensor grad, Tensor x, Tensor weight, std::vector<int64_t> conv,
                                           bool of_x, int64_t splits, int64_t order, bool per_output, int64_t seed,
                                           std::optional<Tensor> step, int64_t op) {
  require(conv.size() == 7, "conv2d_backward: conv must be seven numbers");
  const Tensor partials = conv2d_weight_partials(grad, x, weight, {conv[0], conv[1]}, {conv[2], conv[3]},
                                                 {conv[4], conv[5]}, conv[6], splits);   // which checks the arguments
  Tensor grad_x = torch::stable::new_empty(x, {0});
  if (of_x) grad_x = convolution_gradient(grad, x, weight, &conv[0], &conv[2], &conv[4], conv[6], 0);
  return {grad_x, sum_on_cpu(partials, 1, false, splits, order, per_output, seed, step, op)};
}

// The sum of the partial weight gradients of a linear layer: grad is (batch, rows, out), x (batch, rows, in), neither
// empty. A few rows of the weight at a time: all partial gradients of a large one together would be read from memory.
Tensor linear_weight(Tensor grad, Tensor x, int64_t splits, int64_t order, bool per_output, int64_t seed,
                     std::optional<Tensor> step, int64_t op) {
  require(grad.dim() == 3 && x.dim() == 3 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
              grad.numel() > 0 && x.numel() > 0 && splits >= 1 && grad.scalar_type() == x.scalar_type(),
          "linear_weight: shapes, dtypes or splits do not match");
  constexpr int64_t kBytes = 1 << 21, kRows = 16;   // of the partial gradients of a block; of its height a divisor
  const int64_t rows = x.size(1), out = grad.size(2), in = x.size(2), high = padded(out), wide = padded(in);
  Reduction r = ordered(order, per_output, seed, step, op, x);
  r.terms = r.groups = std::min(splits, x.size(0));
  const Groups samples(x.size(0), r.groups);
  const int64_t fit = kBytes / r.groups / wide / int64_t(x.element_size()) / kRows * kRows;
  const int64_t height = std::clamp(fit, kRows, high);
  r.inner = in, r.outer_stride = wide, r.inner_stride = 1, r.term_stride = height * wide;
  if (high > out) grad = torch::stable::pad(grad, {0, high - out});
  if (wide > in) x = torch::stable::pad(x, {0, wide - in});
  grad = torch::stable::contiguous(grad), x = torch::stable::contiguous(x);
  Tensor result = torch::stable::new_empty(x, {out, in});
  for_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* const grads = static_cast<const T*>(grad.const_data_ptr());
    const T* const inputs = static_cast<const T*>(x.const_data_ptr());
    T* const to = static_cast<T*>(result.mutable_data_ptr());
    one_thread_each((out + height - 1) / height, [&](int64_t first, int64_t last) {
      Tensor memory = torch::stable::new_empty(x, {r.groups * height * wide});
      T* const partials = static_cast<T*>(memory.mutable_data_ptr());
      for (int64_t block = first; block < last; ++block) {
        // All blocks are of one height, since the library may add up in another order in one of another: the last
        // begins among the rows of the one before.
        const int64_t row = block * height, begin = std::min(row, high - height);
        for (int64_t g = 0; g < r.groups; ++g) {
          const int64_t from = samples[g].begin * rows, terms = samples[g].size * rows;
          STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(
              view(partials + g * height * wide, height, wide, wide, 1, x).get(),
              view(grads + from * high + begin, height, terms, 1, high, x).get(),
              view(inputs + from * wide, terms, wide, wide, 1, x).get()));
        }
        Reduction part = r;
        part.outer = std::min(out - row, height), part.first = uint64_t(row * in);
        Tensor sum = view(to + row * in, part.outer, in, in, 1, x);
        sum_cpu(part, view(partials + (row - begin) * wide, 1, 1, 1, 1, x), sum);
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace ordered

STABLE_TORCH_LIBRARY_IMPL(ordered_reduce, CPU, m) {
  m.impl("conv2d_weight_partials", TORCH_BOX(&ordered::conv2d_weight_partials));
  m.impl("conv2d_backward", TORCH_BOX(&ordered::conv2d_backward));
  m.impl("linear_weight", TORCH_BOX(&ordered::linear_weight));
}
