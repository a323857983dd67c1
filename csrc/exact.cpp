// The order "exact" on the CPU: exact.h, eight lanes at a time.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>

#include "exact.h"
#include "ops.h"

namespace ordered {
namespace {

#define INLINE inline __attribute__((always_inline))   // compiled twice on x86-64, see run()

constexpr int kWidth = 8;                 // lanes: of one output's terms, or of neighbouring outputs
constexpr int kVectors = 2;               // of four doubles
constexpr int64_t kBytes = 2048;          // of neighbouring outputs that are read side by side
constexpr int64_t kRowsAcross = 128;      // of which so many rows fit into the cache
constexpr int64_t kStreams = 8;           // rows that are read together
constexpr int64_t kGrain = 1 << 15;       // terms below which a second thread does not pay

typedef double Doubles __attribute__((vector_size(32), aligned(8), may_alias));
typedef float Floats __attribute__((vector_size(16), aligned(4), may_alias));
typedef int64_t Bits __attribute__((vector_size(32)));
typedef int32_t Words __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Unsigned __attribute__((vector_size(32)));

INLINE Doubles load(const double* x) { return *reinterpret_cast<const Doubles*>(x); }
INLINE Doubles load(const float* x) {
  return __builtin_convertvector(*reinterpret_cast<const Floats*>(x), Doubles);
}

// What eight lanes of at most kSplit rows add up to.
struct Lanes {
  int exponent[kWidth];   // of the largest term, see sigma_for
  double sum[kWidth], rest[kWidth];   // exact, if the exponent is below kHuge, but for
  bool left[kWidth];                  // what the split left over

  // A sum of zero may be of negative zeros.
  bool whole(int64_t l) const { return exponent[l] < kHuge && !left[l] && (sum[l] != 0 || rest[l] != 0); }
};

// Floats are summed as doubles. That is exact where the least term's last bit is not too far below the largest term;
// returns whether it was.
INLINE bool scan(const float* x, int rows, bool one, Lanes& lanes) {
  Doubles sum[kVectors] = {}, odd[kVectors] = {};   // two of a kind, as an addition waits for the one before
  Words most = {};
  Unsigned least = ~Unsigned{};
  const auto add = [&](const float* x, Doubles* sum) __attribute__((always_inline)) {
    for (int v = 0; v < kVectors; ++v) sum[v] += load(x + 4 * v);
    const Words size = *reinterpret_cast<const Words*>(x) & 0x7FFFFFFF;
    const Unsigned below = Unsigned(size) - 1;   // a zero has no bits: it becomes the largest number
    most = size > most ? size : most;
    least = below < least ? below : least;
  };
  int row = 0;
  for (; row + 1 < rows; row += 2) add(x + row * kWidth, sum), add(x + (row + 1) * kWidth, odd);
  if (row < rows) add(x + row * kWidth, sum);
  for (int v = 0; v < kVectors; ++v) sum[v] += odd[v];
  if (one)
    for (int l = 1; l < kWidth; ++l) {
      most[0] = std::max(most[0], most[l]), least[0] = std::min(least[0], least[l]);
      sum[0][0] += sum[l / 4][l % 4];
    }
  bool exact = true;
  for (int l = 0; l < (one ? 1 : kWidth); ++l) {
    const int high = std::max(most[l] >> 23, 1), low = std::max(int((least[l] + 1) >> 23), 1);
    lanes.exponent[l] = high == 0xFF ? kHuge : high - 127 + 1023;
    lanes.sum[l] = sum[l / 4][l % 4], lanes.rest[l] = 0, lanes.left[l] = false;
    exact &= high == 0xFF || least[l] == ~0u || high - low <= 53 - 24 - kSplitBits;
  }
  return exact;
}

// Doubles are looked at twice: this is for the largest exponent.
INLINE bool scan(const double* x, int rows, bool one, Lanes& lanes) {
  Words most[kVectors] = {};   // in the upper word of a double; what the lower ones hold is not used
  for (int row = 0; row < rows; ++row, x += kWidth)
    for (int v = 0; v < kVectors; ++v) {
      const Words size = *reinterpret_cast<const Words*>(x + 4 * v) & 0x7FFFFFFF;
      most[v] = size > most[v] ? size : most[v];
    }
  for (int l = 0; l < kWidth; ++l) lanes.exponent[l] = std::max(most[l / 4][2 * (l % 4) + 1] >> 20, 1);
  if (one) lanes.exponent[0] = *std::max_element(lanes.exponent, lanes.exponent + kWidth);
  return false;
}

template <class A>
INLINE void split_rows(const A* x, int rows, bool one, Lanes& lanes) {
  Doubles first[kVectors] = {}, second[kVectors], sum[kVectors] = {}, rest[kVectors] = {};
  Bits left[kVectors] = {};
  for (int l = 0; l < kWidth; ++l) first[l / 4][l % 4] = sigma_for(lanes.exponent[one ? 0 : l]);
  for (int v = 0; v < kVectors; ++v) second[v] = first[v] * kSecond;
  for (int row = 0; row < rows; ++row, x += kWidth)
    for (int v = 0; v < kVectors; ++v) {
      const Doubles x0 = load(x + 4 * v), q0 = (x0 + first[v]) - first[v];
      const Doubles x1 = x0 - q0, q1 = (x1 + second[v]) - second[v];
      const Doubles x2 = x1 - q1;
      sum[v] += q0, rest[v] += q1;
      left[v] |= Bits(x2) + Bits(x2);   // anything but zero, of either sign
    }
  for (int l = 0; l < kWidth; ++l) {
    lanes.sum[l] = sum[l / 4][l % 4], lanes.rest[l] = rest[l / 4][l % 4];
    lanes.left[l] = left[l / 4][l % 4] != 0;
  }
  if (one)
    for (int l = 1; l < kWidth; ++l)
      lanes.sum[0] += lanes.sum[l], lanes.rest[0] += lanes.rest[l], lanes.left[0] |= lanes.left[l];
}

// `one`: the lanes are terms of one output, and what they add up to stands in lane 0.
template <class A>
INLINE void add_rows(const A* x, int rows, bool one, Lanes& lanes) {
  if (!scan(x, rows, one, lanes)) split_rows(x, rows, one, lanes);
}

// Lane l, n terms of which every `every`-th is its own, to an exact sum.
template <class A>
void add_lane(const Lanes& lanes, int64_t l, const A* x, int64_t n, int64_t every, Exact& exact) {
  if (lanes.exponent[l] >= kHuge) {
    for (int64_t i = 0; i < n; ++i) exact.add(x[i * every]);
    return;
  }
  if (lanes.sum[l] != 0) exact.add(lanes.sum[l]);
  if (lanes.rest[l] != 0) exact.add(lanes.rest[l]);
  for (int64_t i = 0; i < n && lanes.left[l]; ++i) {
    double left = x[i * every];
    split(left, sigma_for(lanes.exponent[l])), split(left, sigma_for(lanes.exponent[l]) * kSecond);
    if (left != 0) exact.add(left);
  }
  for (int64_t i = 0; i < n && !(exact.seen & Exact::kNotMinusZero); ++i) exact.note(x[i * every]);
}

template <class T>
struct ExactSum {
  using A = typename AccType<T>::type;
  const Reduction& r;
  const T* x;
  T* out;
  const bool across = r.inner_stride == 1 && r.inner > 1;   // lanes are neighbouring outputs
  const int64_t width = across ? std::min<int64_t>(r.inner, kBytes / sizeof(A)) : 1;        // outputs of a tile
  const int64_t block = across ? std::min<int64_t>(r.terms, kRowsAcross) : kSplit;          // terms of a tile's outputs
  const int64_t strip = across ? (block + 1) * kWidth : kSplit;   // laid out; + 1 against lines of one cache set
  const int64_t strips = (width + kWidth - 1) / kWidth;
  const int64_t tiles = (r.inner + width - 1) / width;            // in one row of `inner` outputs

  int64_t output(int64_t task) const { return task / tiles * r.inner + task % tiles * width; }   // a tile's first
  int64_t outputs(int64_t output) const { return across ? std::min(width, r.inner - output % r.inner) : 1; }

  // Terms begin ... end - 1 of the outputs from `output` on: to exact[output], or straight to the result.
  INLINE void add_tile(int64_t output, int64_t begin, int64_t end, A* buffer, Exact* exact) const {
    const int64_t here = outputs(output);
    const T* first = x + output / r.inner * r.outer_stride + output % r.inner * r.inner_stride;
    for (int64_t at = begin; at < end; at += block) {
      const int64_t n = std::min(block, end - at);
      const int rows = int(across ? n : (n + kWidth - 1) / kWidth);
      const A* terms = lay_out(first, at, n, here, buffer);
      for (int64_t w = 0; w < here; w += kWidth) {
        Lanes lanes;
        const A* mine = terms + w / kWidth * strip;
        add_rows(mine, rows, !across, lanes);
        for (int64_t l = 0; l < std::min<int64_t>(kWidth, here - w); ++l) {
          if (!exact && lanes.whole(l)) {   // as nearly always
            out[output + w + l] = add_once<T>(lanes.sum[l], lanes.rest[l]);
            continue;
          }
          Exact alone;
          if (!exact) alone.clear();
          add_lane(lanes, l, mine + l, n, across ? kWidth : 1, exact ? exact[w + l] : alone);
          if (!exact) out[output + w + l] = alone.rounded<T>();
        }
      }
    }
  }

  // n terms of `here` outputs as strips of rows of kWidth, zeros after the last: where they lie or in the buffer.
  INLINE const A* lay_out(const T* first, int64_t at, int64_t n, int64_t here, A* buffer) const {
    if (across) {
      for (int64_t row = 0; row < n; row += kStreams)   // several at a time, which hides the way to memory
        for (int64_t w = 0; w < here; w += kWidth)
          for (int64_t k = row; k < std::min(row + kStreams, n); ++k) {
            A* to = buffer + w / kWidth * strip + k * kWidth;
            const T* from = first + (r.rows ? r.rows[at + k] : at + k) * r.term_stride + w;
            if (std::is_same_v<T, A> && w + kWidth <= here)
              memcpy(to, from, kWidth * sizeof(A));
            else
              for (int l = 0; l < kWidth; ++l) to[l] = w + l < here ? A(from[l]) : A(0);
          }
      return buffer;
    }
    first += at * r.term_stride;   // `rows` are for outputs side by side
    if constexpr (std::is_same_v<T, A>)
      if (r.term_stride == 1 && n % kWidth == 0) return first;
    for (int64_t i = 0; i < n; ++i) buffer[i] = A(first[i * r.term_stride]);
    std::fill(buffer + n, buffer + (n + kWidth - 1) / kWidth * kWidth, A(0));
    return buffer;
  }

  void add_tile_any(int64_t output, int64_t begin, int64_t end, A* buffer, Exact* exact) const {
    add_tile(output, begin, end, buffer, exact);
  }
#if defined(__x86_64__)
  __attribute__((target("avx2"))) void add_tile_avx2(int64_t output, int64_t begin, int64_t end, A* buffer,
                                                     Exact* exact) const {
    add_tile(output, begin, end, buffer, exact);
  }
#endif

  void round(int64_t task, Exact* exact) const {
    for (int64_t w = 0; w < outputs(output(task)); ++w) out[output(task) + w] = exact[w].rounded<T>();
  }

  void run() const {
    auto add = &ExactSum::add_tile_any;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) add = &ExactSum::add_tile_avx2;
#endif
    const int64_t threads = torch::stable::get_num_threads(), all = r.terms * r.outputs(), tasks = r.outer * tiles;
    // Few outputs: their terms are cut into pieces, whose sums are added up at the end.
    const int64_t most = tasks >= 2 * threads || all < 2 * kGrain ? 1 : 4 * threads / tasks;
    const int64_t blocks = (r.terms + block - 1) / block, piece = (blocks + most - 1) / most * block;
    const int64_t pieces = (r.terms + piece - 1) / piece;
    std::unique_ptr<Exact[]> sums(pieces > 1 ? new Exact[tasks * pieces * width] : nullptr);
    torch::stable::parallel_for(0, tasks * pieces, std::max<int64_t>(1, kGrain * tasks * pieces / all),
                                [&](int64_t first, int64_t last) {
      std::unique_ptr<A[]> buffer(new A[strips * strip]);
      std::unique_ptr<Exact[]> mine(pieces == 1 && blocks > 1 ? new Exact[width] : nullptr);
      for (int64_t job = first; job < last; ++job) {
        const int64_t task = job / pieces, begin = job % pieces * piece;
        Exact* exact = pieces > 1 ? sums.get() + job * width : mine.get();
        for (int64_t w = 0; exact && w < width; ++w) exact[w].clear();
        (this->*add)(output(task), begin, std::min(r.terms, begin + piece), buffer.get(), exact);
        if (mine) round(task, exact);
      }
    });
    for (int64_t task = 0; sums && task < tasks; ++task) {
      Exact* exact = sums.get() + task * pieces * width;
      for (int64_t p = 1; p < pieces; ++p)
        for (int64_t w = 0; w < outputs(output(task)); ++w) exact[w].add(exact[p * width + w]);
      round(task, exact);
    }
  }
};

}  // namespace

void exact_cpu(const Reduction& r, ScalarType type, const void* x, void* out) {
  for_type(type, [&]<class T>(T) { ExactSum<T>{r, static_cast<const T*>(x), static_cast<T*>(out)}.run(); });
}

}  // namespace ordered
