// The CPU implementation, and with order.h the specification that cuda.cu must match bit for bit.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "ops.h"

namespace ordered {
namespace {

constexpr int kBlocks = 8;                          // blocks whose lane sums are added in one go
constexpr int64_t kChunk = 64 * kBlock;             // an aligned, complete subtree: one thread's share of a long group
constexpr int64_t kGrain = 1 << 15;                 // terms below which a second thread does not pay
constexpr int kWidest = 512;                        // adjacent outputs that are summed together, at most

template <class T>
const T kNothing = T(-0.0f);

// Functions marked INLINE are compiled twice on x86-64, for any processor and for those with AVX2: see Sum::lanes_of.
#define INLINE inline __attribute__((always_inline))

INLINE int next_power_of_two(int64_t n) { return n <= 1 ? 1 : 2 << (63 - __builtin_clzll(uint64_t(n - 1))); }

// sum[w] = the tree over ROWS rows at w = 0 ... width - 1.
template <int ROWS, class T, class Acc>
INLINE void add_rows(const T* const (&row)[kRows], int width, Acc* __restrict__ sum) {
  const T *a = row[0], *b = row[1], *c = row[2], *d = row[3], *e = row[4], *f = row[5], *g = row[6], *h = row[7];
  for (int w = 0; w < width; ++w) {
    if constexpr (ROWS == 1) sum[w] = Acc(a[w]);
    if constexpr (ROWS == 2) sum[w] = tree(Acc(a[w]), Acc(b[w]));
    if constexpr (ROWS == 4) sum[w] = tree(Acc(a[w]), Acc(b[w]), Acc(c[w]), Acc(d[w]));
    if constexpr (ROWS == 8)
      sum[w] = tree(Acc(a[w]), Acc(b[w]), Acc(c[w]), Acc(d[w]), Acc(e[w]), Acc(f[w]), Acc(g[w]), Acc(h[w]));
  }
}

template <class T, class Acc>
INLINE void add_rows(int rows, const T* const (&row)[kRows], int width, Acc* sum) {
  switch (rows) {
    case 1: return add_rows<1>(row, width, sum);
    case 2: return add_rows<2>(row, width, sum);
    case 4: return add_rows<4>(row, width, sum);
    default: return add_rows<8>(row, width, sum);
  }
}

// The 32 lane sums of at most kBlock contiguous terms of one output.
template <class T, class Acc>
INLINE void contiguous_block(const T* x, int64_t n, Acc* lanes) {
  const T* row[kRows] = {};
  const int rows = next_power_of_two((n + kLanes - 1) / kLanes);
  T padded[kBlock];
  if (n != int64_t(rows) * kLanes) {
    std::fill(std::copy(x, x + n, padded), padded + rows * kLanes, kNothing<T>);
    x = padded;
  }
  for (int i = 0; i < kRows; ++i) row[i] = x + (i < rows ? i : 0) * kLanes;
  add_rows(rows, row, kLanes, lanes);
}

// The lane sums of at most kBlock terms of `width` adjacent outputs, as lanes[lane * width + output].
template <class T, class Acc>
INLINE void strided_block(const T* x, int64_t n, int64_t stride, int width, int lane_count, Acc* lanes) {
  static const std::vector<T> nothing(kWidest, kNothing<T>);
  const int rows = next_power_of_two((n + kLanes - 1) / kLanes);
  for (int l = 0; l < lane_count; ++l) {
    const T* row[kRows] = {};
    for (int i = 0; i < rows; ++i) {
      const int64_t term = int64_t(i) * kLanes + l;
      row[i] = term < n ? x + term * stride : nothing.data();
    }
    add_rows(rows, row, width, lanes + l * width);
  }
}

// The binary tree over equal, aligned pieces of a group that arrive from left to right: a binary counter in which
// bit k of the count says that a sum of 2^k pieces waits on the stack, the largest at the bottom.
template <class Acc>
class Counter {
 public:
  explicit Counter(int64_t piece) : piece_(piece) {}
  INLINE void reset() { count_ = depth_ = 0; }
  INLINE Acc* next() {   // where the next piece is to be written before push()
    if (int64_t(stack_.size()) < (depth_ + 1) * piece_) stack_.resize((depth_ + 8) * piece_);
    return level(depth_);
  }
  INLINE void push() {
    int64_t last = depth_++;
    for (int64_t bits = count_++; bits & 1; bits >>= 1, --last, --depth_) add(level(last - 1), level(last));
  }
  INLINE Acc* finish() {
    for (; depth_ > 1; --depth_) add(level(depth_ - 2), level(depth_ - 1));
    return level(0);
  }

 private:
  INLINE Acc* level(int64_t k) { return stack_.data() + k * piece_; }
  INLINE void add(Acc* __restrict__ left, const Acc* __restrict__ right) {
    for (int64_t i = 0; i < piece_; ++i) left[i] += right[i];
  }
  const int64_t piece_;
  int64_t count_ = 0, depth_ = 0;
  std::vector<Acc> stack_;
};

template <class T>
struct Sum {
  using Acc = typename AccType<T>::type;
  const Reduction& r;
  const T* x;
  T* out;
  Key key;
  Groups groups;
  int lane_count;      // 32, or fewer where no group has 32 terms
  bool across;         // neighbouring outputs are added side by side, a vector of them at a time
  int tile;            // outputs of one task
  int64_t tiles;       // with across: tiles in one row of `inner` outputs

  Sum(const Reduction& r, const Tensor& x, Tensor& out)
      : r(r), x(static_cast<const T*>(x.const_data_ptr())), out(static_cast<T*>(out.mutable_data_ptr())),
        key{r.seed, r.step, r.op}, groups(r.terms, r.groups),
        lane_count(std::min(kLanes, next_power_of_two(groups.longest()))) {
    across = r.inner_stride == 1 && r.inner > 1;
    tile = across ? int(std::min<int64_t>(r.inner, groups.longest() == 1 ? kWidest : 256)) : 16;
    tiles = (r.inner + tile - 1) / tile;
  }

  struct Place {
    int64_t output;
    const T* x;          // terms of the first output
    int width;           // outputs
  };
  // Tiles are of neighbours along `inner` where their terms lie side by side, else of any consecutive outputs.
  Place place(int64_t task) const {
    if (!across) return {task * tile, nullptr, int(std::min<int64_t>(tile, r.outputs() - task * tile))};
    const int64_t o = task / tiles, i = task % tiles * tile;
    return {o * r.inner + i, x + o * r.outer_stride + i, int(std::min<int64_t>(tile, r.inner - i))};
  }
  const T* terms_of(int64_t output) const {
    return x + output / r.inner * r.outer_stride + output % r.inner * r.inner_stride;
  }

  // Lane sums of n terms, an aligned piece of a group, of `width` neighbouring outputs.
  INLINE Acc* lanes_of_any(const T* x, int64_t n, int width, Counter<Acc>& counter) const {
    counter.reset();
    if (r.term_stride == 1 && width == 1 && lane_count == kLanes) {
      for (; n > 0; x += kBlocks * kBlock, n -= kBlocks * kBlock) {
        alignas(64) Acc lanes[kBlocks][kLanes];
        const Acc* row[kBlocks];
        const int blocks = int(std::min<int64_t>(kBlocks, (n + kBlock - 1) / kBlock));
        const int wanted = next_power_of_two(blocks);
        for (int b = 0; b < blocks; ++b)
          contiguous_block(x + b * kBlock, std::min<int64_t>(kBlock, n - b * kBlock), lanes[b]);
        for (int b = blocks; b < wanted; ++b) std::fill(lanes[b], lanes[b] + kLanes, kNothing<Acc>);
        for (int b = 0; b < kBlocks; ++b) row[b] = lanes[b];
        add_rows(wanted, row, kLanes, counter.next());
        counter.push();
      }
    } else {
      for (int64_t i = 0; i < n; i += kBlock) {
        strided_block(x + i * r.term_stride, std::min<int64_t>(kBlock, n - i), r.term_stride, width, lane_count,
                      counter.next());
        counter.push();
      }
    }
    return counter.finish();
  }

  // The lanes' sums, by halving.
  INLINE Acc* add_lanes(Acc* lanes, int width) const {
    for (int half = lane_count / 2; half > 0; half /= 2)
      for (int i = 0; i < half * width; ++i) lanes[i] += lanes[half * width + i];
    return lanes;
  }

  // partial[g * width + output] for all groups of one tile.
  INLINE void partials_any(const Place& p, Acc* partial, Counter<Acc>& counter) const {
    if (across) {
      for (int64_t g = 0; g < r.groups; ++g) {
        const Group group = groups[g];
        const T* terms = p.x + group.begin * r.term_stride;
        Acc* sums = partial + g * p.width;
        if (group.size == 1)
          for (int w = 0; w < p.width; ++w) sums[w] = Acc(terms[w]);
        else
          std::copy_n(add_lanes(lanes_of_any(terms, group.size, p.width, counter), p.width), p.width, sums);
      }
      return;
    }
    for (int w = 0; w < p.width; ++w) {
      const T* terms = terms_of(p.output + w);
      for (int64_t g = 0; g < r.groups; ++g) {
        const Group group = groups[g];
        const T* first = terms + group.begin * r.term_stride;
        if (r.term_stride == 1 && group.size <= kBlock) {   // short groups in registers; more lanes change no bit
          alignas(64) Acc lanes[kLanes];
          contiguous_block(first, group.size, lanes);
          for (int half : {16, 8, 4, 2, 1})
            for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
          partial[g * p.width + w] = lanes[0];
        } else {
          partial[g * p.width + w] = *add_lanes(lanes_of_any(first, group.size, 1, counter), 1);
        }
      }
    }
  }

  // Partial sums of the groups of one tile into the result.
  INLINE void combine_any(const Place& p, Acc* partial) const {
    if (r.order == Order::shuffled)
      for (int w = 0; w < p.width; ++w)
        shuffle(partial + w, int(r.groups), p.width, key, r.per_output ? uint64_t(p.output + w) : 0);
    for (int64_t g = 1; g < r.groups; ++g)
      for (int w = 0; w < p.width; ++w) partial[w] += partial[g * p.width + w];
    for (int w = 0; w < p.width; ++w) out[p.output + w] = T(partial[w]);
  }

#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2");
#define TWICE(result, name, declared, given)                                                     \
  __attribute__((target("avx2"))) result name##_avx2 declared const { return name##_any given; } \
  result name declared const { return avx2 ? name##_avx2 given : name##_any given; }
#else
#define TWICE(result, name, declared, given) \
  result name declared const { return name##_any given; }
#endif
  TWICE(Acc*, lanes_of, (const T* x, int64_t n, int width, Counter<Acc>& counter), (x, n, width, counter))
  TWICE(void, partials, (const Place& p, Acc* partial, Counter<Acc>& counter), (p, partial, counter))
  TWICE(void, combine, (const Place& p, Acc* partial), (p, partial))

  // Calls use(place, partials) for every tile, from several threads.
  template <class Use>
  void for_each_tile(const Use& use) {
    const int64_t threads = torch::stable::get_num_threads(), terms = r.terms * r.outputs();
    int64_t tasks = across ? r.outer * tiles : (r.outputs() + tile - 1) / tile;
    if (tasks >= 2 * threads || terms < 2 * kGrain) {
      torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain * tasks / terms),
                                  [&](int64_t first, int64_t last) {
        Counter<Acc> counter(int64_t(lane_count) * (across ? tile : 1));
        std::vector<Acc> partial(r.groups * tile);
        for (int64_t task = first; task < last; ++task) {
          const Place p = place(task);
          partials(p, partial.data(), counter);
          use(p, partial.data());
        }
      });
      return;
    }
    // Few outputs, long groups: threads share the chunks of a group, whose lane sums are then added up the same tree.
    if (!across) tile = 1, tasks = r.outputs();
    const int64_t chunks = (groups.longest() + kChunk - 1) / kChunk, piece = int64_t(lane_count) * tile;
    std::unique_ptr<Acc[]> lanes(new Acc[tasks * r.groups * chunks * piece]);
    torch::stable::parallel_for(0, tasks * r.groups * chunks, 1, [&](int64_t first, int64_t last) {
      Counter<Acc> counter(piece);
      for (int64_t job = first; job < last; ++job) {
        const Place p = place(job / chunks / r.groups);
        const Group group = groups[job / chunks % r.groups];
        const int64_t begin = job % chunks * kChunk, n = std::min(group.size - begin, kChunk);
        if (n <= 0) continue;
        const T* all = across ? p.x : terms_of(p.output);
        const Acc* sums = lanes_of(all + (group.begin + begin) * r.term_stride, n, p.width, counter);
        std::copy(sums, sums + lane_count * p.width, lanes.get() + job * piece);
      }
    });
    Counter<Acc> counter(piece);
    std::vector<Acc> partial(r.groups * tile);
    for (int64_t task = 0; task < tasks; ++task) {
      const Place p = place(task);
      for (int64_t g = 0; g < r.groups; ++g) {
        counter.reset();
        for (int64_t chunk = 0; chunk * kChunk < groups[g].size; ++chunk) {
          std::copy_n(lanes.get() + ((task * r.groups + g) * chunks + chunk) * piece, lane_count * p.width,
                      counter.next());
          counter.push();
        }
        std::copy_n(add_lanes(counter.finish(), p.width), p.width, partial.data() + g * p.width);
      }
      use(p, partial.data());
    }
  }

  void run() {
    if (r.order != Order::atomic) {
      for_each_tile([this](const Place& p, Acc* partial) { combine(p, partial); });
      return;
    }
    // The race. Every thread takes the next free (stretch of outputs, group) from one ticket counter, the group
    // varying fastest, and adds it with std::atomic: the order of an output's groups is the order of arrival.
    const int64_t outputs = r.outputs(), stretch = 64, stretches = (outputs + stretch - 1) / stretch;
    std::vector<Acc> partials(r.groups * outputs);
    for_each_tile([&](const Place& p, Acc* partial) {
      for (int64_t g = 0; g < r.groups; ++g)
        std::copy(partial + g * p.width, partial + (g + 1) * p.width, partials.data() + g * outputs + p.output);
    });
    std::unique_ptr<std::atomic<Acc>[]> sums(new std::atomic<Acc>[outputs]);
    for (int64_t o = 0; o < outputs; ++o) sums[o].store(kNothing<Acc>, std::memory_order_relaxed);
    std::atomic<int64_t> ticket{0};
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
      for (int64_t job; (job = ticket.fetch_add(1, std::memory_order_relaxed)) < stretches * r.groups;) {
        const int64_t g = job % r.groups, first = job / r.groups * stretch;
        for (int64_t o = first; o < std::min(outputs, first + stretch); ++o) {
          const Acc term = partials[g * outputs + o];
          Acc seen = sums[o].load(std::memory_order_relaxed);
          while (!sums[o].compare_exchange_weak(seen, seen + term, std::memory_order_relaxed)) {
          }
        }
      }
    });
    for (int64_t o = 0; o < outputs; ++o) out[o] = T(sums[o].load(std::memory_order_relaxed));
  }
};

}  // namespace

void sum_cpu(const Reduction& r, const Tensor& x, Tensor& out) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Sum<float>(r, x, out).run();
    case ScalarType::Double: return Sum<double>(r, x, out).run();
    case ScalarType::Half: return Sum<torch::headeronly::Half>(r, x, out).run();
    case ScalarType::BFloat16: return Sum<torch::headeronly::BFloat16>(r, x, out).run();
    default: STD_TORCH_CHECK(false, "sum is not implemented for this dtype");
  }
}

}  // namespace ordered
