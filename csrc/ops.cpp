// Schema, checks and the shape work that CPU and CUDA share. Arguments are checked for their users in
// ordered_reduce/ops.py; what is checked here protects memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "ops.h"
#include "sort.h"

namespace ordered {
namespace {

struct Axis {
  int64_t size, stride;
};

// Joins neighbours that one stride can walk, and leaves out axes of size one.
void merge(std::vector<Axis>& axes) {
  size_t n = 0;
  for (const Axis axis : axes) {
    if (axis.size == 1) continue;
    if (n > 0 && axes[n - 1].stride == axis.size * axis.stride)
      axes[n - 1] = {axes[n - 1].size * axis.size, axis.stride};
    else
      axes[n++] = axis;
  }
  axes.resize(n);
}

constexpr size_t kChannelsLast[] = {0, 2, 3, 1};   // the dimensions as they follow each other in memory

bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4) return false;
  int64_t stride = 1;
  for (size_t k = 4; k-- > 0; stride *= x.size(kChannelsLast[k]))
    if (x.size(kChannelsLast[k]) != 1 && x.stride(kChannelsLast[k]) != stride) return false;
  return true;
}

// A contiguous tensor, or one in channels-last format, with the dtype and device of x; past the dispatcher, which takes
// longer than a small sum.
Tensor empty(const std::vector<int64_t>& sizes, const Tensor& x, bool channels_last = false) {
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t stride = 1;
  for (size_t k = sizes.size(); k-- > 0;) {
    const size_t d = channels_last ? kChannelsLast[k] : k;
    strides[d] = stride, stride *= std::max<int64_t>(1, sizes[d]);
  }
  int32_t dtype, device;
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         device, x.get_device_index(), &out));
  return Tensor(out);
}

// Tensor.permute, which PyTorch 2.11's stable headers do not have.
Tensor permute(const Tensor& x, const std::vector<int64_t>& axes) {
  std::vector<int64_t> sizes, strides;
  for (int64_t d : axes) sizes.push_back(x.size(d)), strides.push_back(x.stride(d));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_as_strided(x.get(), sizes.data(), strides.data(), &out));
  return Tensor(out);
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

using Launch = void (*)(const Reduction&, const Tensor&, Tensor&);

// r says in which order; its shape is filled in here. Bit d of dims: dimension d is summed; -1 is all of them.
Tensor reduce(Launch launch, Reduction r, const Tensor& x, int64_t dims, bool keepdim, int64_t splits,
              const Tensor* tickets = nullptr) {
  const auto reduced = [dims](int64_t d) { return dims >> std::min<int64_t>(d, 63) & 1; };
  require(dims == -1 || dims >> std::min<int64_t>(x.dim(), 63) == 0, "dims out of range: ", dims);
  require(splits >= 1, "splits must be at least 1, got ", splits);

  std::vector<Axis> kept, terms;
  std::vector<int64_t> sizes, order_of_axes;
  for (std::vector<Axis>* axes : {&kept, &terms}) axes->reserve(x.dim());   // a small sum takes as long as allocations
  for (std::vector<int64_t>* numbers : {&sizes, &order_of_axes}) numbers->reserve(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (!reduced(d)) kept.push_back({x.size(d), x.stride(d)}), order_of_axes.push_back(d);
    if (!reduced(d) || keepdim) sizes.push_back(reduced(d) ? 1 : x.size(d));
  }
  for (int64_t d = 0; d < x.dim(); ++d)
    if (reduced(d)) terms.push_back({x.size(d), x.stride(d)}), order_of_axes.push_back(d);

  Tensor out = empty(sizes, x);
  if (out.numel() == 0) return out;
  if (x.numel() == 0) return torch::stable::zero_(out);

  // Two kept axes and one reduced axis, of any strides, are walked where they lie. Anything else is laid out first,
  // kept axes then reduced axes, each in index order: a copy, but the same terms in the same order.
  Tensor input = x;
  merge(kept), merge(terms);
  if (kept.size() > 2 || terms.size() > 1) {
    input = torch::stable::contiguous(permute(x, order_of_axes));
    kept.assign(1, {out.numel(), x.numel() / out.numel()});
    terms.assign(1, {x.numel() / out.numel(), 1});
  }
  const Axis none = {1, 0};
  const Axis term = terms.empty() ? none : terms[0];
  const bool across = kept.size() == 1 && kept[0].stride == 1 && term.stride != 1;   // neighbours are other outputs
  const Axis inner = kept.size() == 2 ? kept[1] : across ? kept[0] : none;
  const Axis outer = kept.size() == 2 || (kept.size() == 1 && !across) ? kept[0] : none;
  r.outer = outer.size, r.outer_stride = outer.stride;
  r.inner = inner.size, r.inner_stride = inner.stride;
  r.terms = term.size, r.term_stride = term.stride;
  r.groups = std::min(splits, r.terms);   // a group without terms has nothing to add
  require(r.order == Order::exact || r.groups < int64_t{1} << 31, "splits: more than 2**31 groups");
  if (tickets) {
    require(tickets->scalar_type() == ScalarType::Int && tickets->is_contiguous() &&
                tickets->numel() == r.stretches() * r.groups && same_device(*tickets, x),
            "tickets must be contiguous int32 of size (stretches, groups) on the device of x");
    r.tickets = static_cast<int32_t*>(tickets->mutable_data_ptr());
    for (int64_t i = 0; r.order == Order::replay && !x.is_cuda() && i < tickets->numel(); ++i)   // CUDA does so itself
      require(0 <= r.tickets[i] && r.tickets[i] < r.groups, "ticket out of range: ", r.tickets[i]);
  }
  launch(r, input, out);
  return out;
}

template <Launch launch>
Tensor sum(const Tensor& x, int64_t dims, bool keepdim, int64_t splits, int64_t order, bool per_output, int64_t seed,
           const std::optional<Tensor>& step, int64_t op) {
  return reduce(launch, ordered(order, per_output, seed, step, op, x), x, dims, keepdim, splits);
}

// In the order of tickets, which are taken now, or are given.
template <Launch launch>
Tensor sum_by_tickets(const Tensor& x, int64_t dims, bool keepdim, int64_t splits, bool take, const Tensor& tickets) {
  Reduction r{};
  r.order = take ? Order::arrival : Order::replay;
  return reduce(launch, r, x, dims, keepdim, splits, &tickets);
}

// start[0 ... size], then position[0 ... n - 1]: where v stands in index, in order, is position[start[v]] ...
// position[start[v + 1] - 1].
Tensor segments(const Tensor& index, int64_t size) {
  require(index.scalar_type() == ScalarType::Long && index.is_contiguous(), "index must be contiguous int64");
  Tensor result = empty({size + 1 + index.numel()}, index);
  const int64_t* const at = static_cast<const int64_t*>(index.const_data_ptr());
  int64_t* const start = static_cast<int64_t*>(result.mutable_data_ptr());
  check_range(at, index.numel(), size);
  sort(at, index.numel(), size, start, [](int64_t i) { return i; }, start + size + 1);
  return result;
}

using AddLaunch = void (*)(const Reduction&, const Tensor&, const Tensor&, const Tensor&, const Tensor*, Tensor&);

template <AddLaunch launch>
Tensor index_add(const Tensor& input, const Tensor& index, const Tensor& source, const std::optional<Tensor>& segments,
                 int64_t splits, int64_t order, bool per_output, int64_t seed, const std::optional<Tensor>& step,
                 int64_t op) {
  Reduction r = ordered(order, per_output, seed, step, op, input);
  require(input.dim() >= 1 && source.dim() == input.dim() && input.scalar_type() == source.scalar_type() &&
          same_device(input, source), "index_add: dimensions, dtypes or devices do not match");
  const int64_t size = input.size(0), n = index.numel();
  std::vector<int64_t> sizes(1, size);
  r.outer = size, r.terms = n, r.inner = 1;
  r.groups = std::clamp<int64_t>(n, 1, std::max<int64_t>(splits, 1));   // of a row with all terms
  for (int64_t d = 1; d < input.dim(); ++d) {
    require(source.size(d) == input.size(d), "index_add: shapes do not match");
    sizes.push_back(input.size(d)), r.inner *= input.size(d);
  }
  require(source.size(0) == n && splits >= 1 &&
          (segments ? segments->numel() == size + 1 + n : !input.is_cuda()), "index_add: sizes do not match");
  for (const Tensor& places : {index, segments.value_or(index)})
    require(places.scalar_type() == ScalarType::Long && places.is_contiguous() && same_device(places, input),
            "index and segments must be contiguous int64 on the device of input");
  const Tensor from = torch::stable::contiguous(input), terms = torch::stable::contiguous(source);
  // Rows of a copy can be added to there: not single numbers, whose sums are made in the result before input is read.
  const bool copied = from.const_data_ptr() != input.const_data_ptr();
  Tensor out = copied && r.inner > 1 && !input.is_cuda() ? from : empty(sizes, input);
  if (!input.is_cuda()) {   // a GPU would have to be waited for: there segments must be what `segments` gave
    check_range(static_cast<const int64_t*>(index.const_data_ptr()), n, size);
    const int64_t* const start = segments ? static_cast<const int64_t*>(segments->const_data_ptr()) : nullptr;
    require(!start || (start[0] >= 0 && start[size] <= n && std::is_sorted(start, start + size + 1)),
            "segments must be those of index");
    if (start) check_range(start + size + 1, n, n);
  }
  if (out.numel() == 0) return out;
  launch(r, from, index, terms, segments ? &*segments : nullptr, out);
  return out;
}

// sum(stack(partials).to(like.dtype), 0) with a group each, in fixed order or shuffled. In channels-last format where
// the partial sums and like are, a weight: autograd would copy its gradient into another one.
template <void (*launch)(const Reduction&, const Apart&, ScalarType, Tensor&)>
Tensor add_partials(const std::vector<Tensor>& partials, const Tensor& like, bool shuffled, bool per_output,
                    int64_t seed, const std::optional<Tensor>& step, int64_t op) {
  require(1 <= partials.size() && partials.size() <= size_t(Apart::kMost), "add_partials: from 1 to ",
          Apart::kMost, " partial sums, got ", partials.size());
  const Tensor& first = partials[0];
  const ScalarType type = first.scalar_type();
  require(first.dim() <= Apart::kAxes && first.numel() < int64_t{1} << 31 &&
              (like.scalar_type() == type || (first.element_size() == 2 && like.scalar_type() == ScalarType::Float)),
          "add_partials: too many dimensions or elements, or a dtype that like's cannot come of");
  Reduction r = ordered(shuffled, per_output, seed, step, op, first);   // fixed is order 0, shuffled 1
  r.outer = first.numel(), r.inner = 1, r.groups = int64_t(partials.size());
  struct Both {
    int64_t size, stride, out_stride;
  };
  std::vector<Both> axes;
  std::vector<int64_t> sizes(first.dim());
  for (int64_t d = first.dim(), stride = 1; d-- > 0; stride *= first.size(d))
    axes.push_back({sizes[d] = first.size(d), first.stride(d), stride});
  std::stable_sort(axes.begin(), axes.end(), [](const Both& a, const Both& b) { return a.stride < b.stride; });
  Apart apart;
  int a = Apart::kAxes;
  for (const Both& axis : axes) {            // those that go on where the last one ends are one
    if (axis.size == 1) continue;
    if (a < Apart::kAxes && axis.stride == apart.size[a] * apart.stride[a] &&
        axis.out_stride == apart.size[a] * apart.out_stride[a]) {
      apart.size[a] *= axis.size;
      continue;
    }
    --a;
    apart.size[a] = axis.size, apart.stride[a] = axis.stride, apart.out_stride[a] = axis.out_stride;
  }
  while (a-- > 0) apart.size[a] = 1, apart.stride[a] = apart.out_stride[a] = 0;
  for (size_t g = 0; g < partials.size(); ++g) {
    const Tensor& partial = partials[g];
    bool alike = partial.dim() == first.dim() && partial.scalar_type() == type && same_device(partial, like);
    for (int64_t d = 0; alike && d < first.dim(); ++d)
      alike = partial.size(d) == first.size(d) && (partial.size(d) == 1 || partial.stride(d) == first.stride(d));
    require(alike, "add_partials: partial sums must be alike in shape, strides and dtype, and on like's device");
    apart.data[g] = partial.const_data_ptr();
  }
  const bool last = is_channels_last(first) && is_channels_last(like) && !like.is_contiguous();
  apart.alike = last || std::all_of(axes.begin(), axes.end(), [](const Both& axis) {
    return axis.size == 1 || axis.stride == axis.out_stride;
  });
  Tensor out = empty(sizes, like, last);
  if (out.numel()) launch(r, apart, type, out);
  return out;
}

// (4, n) for like of n int64 numbers, which are not read: a number of its own could not be symbolic.
template <void (*launch)(const Reduction&, Tensor&)>
Tensor philox(const Tensor& like, int64_t seed, const Tensor& step, int64_t op) {
  require(like.scalar_type() == ScalarType::Long, "philox: like must be int64");
  Tensor out = empty({4, like.numel()}, like);
  if (out.numel()) launch(ordered(int64_t(Order::shuffled), true, seed, step, op, like), out);
  return out;
}

bool cuda_built() {
#ifdef ORDERED_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

Reduction ordered(int64_t order, bool per_output, int64_t seed, const std::optional<Tensor>& step, int64_t op,
                  const Tensor& x) {
  require(0 <= order && order <= 3, "unknown order: ", order);
  Reduction r;
  r.order = Order(order), r.per_output = per_output;
  r.seed = uint64_t(seed), r.op = uint32_t(op);
  r.step = 0, r.device_step = nullptr;
  if (step) {
    require(step->numel() == 1 && step->scalar_type() == ScalarType::Long, "step must be one int64");
    const int64_t* value = static_cast<const int64_t*>(step->const_data_ptr());
    if (step->is_cpu()) {
      r.step = uint32_t(*value);
    } else {
      require(same_device(*step, x), "step must be on the CPU or on the device of x");
      r.device_step = value;
    }
  }
  return r;
}

Tensor sum_on_cpu(const Tensor& x, int64_t dims, bool keepdim, int64_t splits, int64_t order, bool per_output,
                  int64_t seed, const std::optional<Tensor>& step, int64_t op) {
  return sum<sum_cpu>(x, dims, keepdim, splits, order, per_output, seed, step, op);
}

}  // namespace ordered

STABLE_TORCH_LIBRARY(ordered_reduce, m) {
  m.def("sum(Tensor x, int dims, bool keepdim, int splits, int order=0, bool per_output=True, int seed=0,"
        " Tensor? step=None, int op=0) -> Tensor");
  m.def("sum_forward(Tensor x, int dims, bool keepdim, int splits, int order=0, bool per_output=True, int seed=0,"
        " Tensor? step=None, int op=0) -> Tensor");   // the same, without the derivative that ops.py gives sum
  m.def("segments(Tensor index, int size) -> Tensor");
  m.def("index_add(Tensor input, Tensor index, Tensor source, Tensor? segments, int splits, int order=0,"
        " bool per_output=True, int seed=0, Tensor? step=None, int op=0) -> Tensor");
  m.def("index_add_forward(Tensor input, Tensor index, Tensor source, Tensor? segments, int splits, int order=0,"
        " bool per_output=True, int seed=0, Tensor? step=None, int op=0) -> Tensor");   // as sum_forward
  m.def("sum_by_tickets(Tensor x, int dims, bool keepdim, int splits, bool take, Tensor(a!) tickets) -> Tensor");
  m.def("add_partials(Tensor[] partials, Tensor like, bool shuffled=False, bool per_output=True, int seed=0,"
        " Tensor? step=None, int op=0) -> Tensor");   // on CUDA alone
  m.def("conv2d_weight_partials(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation,"
        " int groups, int splits) -> Tensor");   // backward.cpp; on the CPU alone
  m.def("conv2d_backward(Tensor grad, Tensor x, Tensor weight, int[] conv, bool of_x, int splits, int order=0,"
        " bool per_output=True, int seed=0, Tensor? step=None, int op=0) -> (Tensor, Tensor)");   // so is this
  m.def("linear_weight(Tensor grad, Tensor x, int splits, int order=0, bool per_output=True, int seed=0,"
        " Tensor? step=None, int op=0) -> Tensor");   // and this
  m.def("philox(Tensor like, int seed, Tensor step, int op) -> Tensor");
  m.def("cuda_built() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(ordered_reduce, CompositeExplicitAutograd, m) {
  m.impl("cuda_built", TORCH_BOX(&ordered::cuda_built));
}

STABLE_TORCH_LIBRARY_IMPL(ordered_reduce, CPU, m) {
  m.impl("sum", TORCH_BOX(&ordered::sum<ordered::sum_cpu>));
  m.impl("sum_forward", TORCH_BOX(&ordered::sum<ordered::sum_cpu>));
  m.impl("segments", TORCH_BOX(&ordered::segments));
  m.impl("index_add", TORCH_BOX(&ordered::index_add<ordered::index_add_cpu>));
  m.impl("index_add_forward", TORCH_BOX(&ordered::index_add<ordered::index_add_cpu>));
  m.impl("sum_by_tickets", TORCH_BOX(&ordered::sum_by_tickets<ordered::sum_cpu>));
  m.impl("philox", TORCH_BOX(&ordered::philox<ordered::philox_cpu>));
}

#ifdef ORDERED_CUDA
STABLE_TORCH_LIBRARY_IMPL(ordered_reduce, CUDA, m) {
  m.impl("sum", TORCH_BOX(&ordered::sum<ordered::sum_cuda>));
  m.impl("sum_forward", TORCH_BOX(&ordered::sum<ordered::sum_cuda>));
  m.impl("index_add", TORCH_BOX(&ordered::index_add<ordered::index_add_cuda>));
  m.impl("index_add_forward", TORCH_BOX(&ordered::index_add<ordered::index_add_cuda>));
  m.impl("sum_by_tickets", TORCH_BOX(&ordered::sum_by_tickets<ordered::sum_cuda>));
  m.impl("add_partials", TORCH_BOX(&ordered::add_partials<ordered::add_partials_cuda>));
  m.impl("philox", TORCH_BOX(&ordered::philox<ordered::philox_cuda>));
}
#endif
