// The CPU implementation, and with order.h the specification that cuda.cu must match bit for bit.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ops.h"
#include "sort.h"
#include "twice.h"

namespace ordered {
namespace {

constexpr int64_t kChunk = 64 * kBlock;             // an aligned, complete subtree: one thread's share of a long group
constexpr int64_t kGrain = 1 << 15;                 // terms below which a second thread does not pay
constexpr int kWidest = 512;                        // adjacent outputs that are summed together, at most
constexpr int kSide = 32;                           // outputs whose permutations are drawn side by side
constexpr int kTransposed = 256;                    // terms of an output up to which outputs are laid side by side
constexpr int kFew = 16;                            // groups up to which an output's are added one after the other
constexpr int64_t kCached = 1 << 24;                // bytes of terms from which on they are read from memory

INLINE int next_power_of_two(int64_t n) { return n <= 1 ? 1 : 2 << (63 - __builtin_clzll(uint64_t(n - 1))); }

// sum[w] = f(at, sum[w]) at w = 0 ... width - 1, where at(row) is row[w], or four of each at once.
template <class T, class Acc, class F>
INLINE void for_columns(int width, Acc* sum, const F& f) {
  int w = 0;
  if constexpr (std::is_same_v<T, Half>)
    for (; kF16C && w + 4 <= width; w += 4) {
      FourFloats* const four = reinterpret_cast<FourFloats*>(sum + w);
      *four = f([w](const T* row) __attribute__((always_inline)) { return load_four(row + w); }, *four);
    }
#pragma GCC ivdep
  for (; w < width; ++w) sum[w] = f([w](const T* row) __attribute__((always_inline)) { return Acc(row[w]); }, sum[w]);
}

// sum[w] = the tree over ROWS rows at w = 0 ... width - 1. The sum may replace a row.
template <int ROWS, class T, class Acc>
INLINE void add_rows(const T* const (&row)[kRows], int width, Acc* sum) {
  const T *a = row[0], *b = row[1], *c = row[2], *d = row[3], *e = row[4], *f = row[5], *g = row[6], *h = row[7];
  for_columns<T>(width, sum, [=](const auto& at, auto) __attribute__((always_inline)) {
    if constexpr (ROWS == 1) return at(a);
    if constexpr (ROWS == 2) return tree(at(a), at(b));
    if constexpr (ROWS == 4) return tree(at(a), at(b), at(c), at(d));
    if constexpr (ROWS == 8) return tree(at(a), at(b), at(c), at(d), at(e), at(f), at(g), at(h));
  });
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

// Which of the 32 lanes hold terms, where n terms are left for them.
template <class T>
struct Masks {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Lane Mask __attribute__((vector_size(32)));
  static constexpr int kWide = 32 / sizeof(T);
  Mask vector[kLanes / kWide];

  INLINE explicit Masks(int64_t n) {
    Mask place = {0, 1, 2, 3};
    if constexpr (kWide == 8) place = Mask{0, 1, 2, 3, 4, 5, 6, 7};
    for (int i = 0; i < kLanes / kWide; ++i) vector[i] = place < Lane(n - i * kWide);
  }
};

// A part of the 32 lanes in vectors: in four, since three times as many fit into the registers. (Where they are an
// array, the compiler keeps them in memory.)
template <class T>
struct Part {
  typedef T Vector __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  static constexpr int kWidth = 4 * 32 / sizeof(T);   // lanes
  Vector a, b, c, d;

  INLINE void load(const T* x) {
    const Vector* v = reinterpret_cast<const Vector*>(x);
    a = v[0], b = v[1], c = v[2], d = v[3];
  }
  INLINE void load(const T* x, const typename Masks<T>::Mask* mask) {
    const Vector* v = reinterpret_cast<const Vector*>(x);
    const Vector nothing = -Vector{};   // -0.0; Vector{} + kNothing<T> would be +0.0
    a = mask[0] ? v[0] : nothing, b = mask[1] ? v[1] : nothing;
    c = mask[2] ? v[2] : nothing, d = mask[3] ? v[3] : nothing;
  }
  INLINE void add(const T* x) {
    const Vector* v = reinterpret_cast<const Vector*>(x);
    a += v[0], b += v[1], c += v[2], d += v[3];
  }
  INLINE void add(const Part& right) { a += right.a, b += right.b, c += right.c, d += right.d; }
  INLINE void store(T* x) const {
    Vector* v = reinterpret_cast<Vector*>(x);
    v[0] = a, v[1] = b, v[2] = c, v[3] = d;
  }

  // The tree over row(first) ... row(first + ROWS - 1), read from front to back, which memory serves fastest.
  template <int ROWS, class Row>
  INLINE void add_rows(const Row& row, int first = 0) {
    if constexpr (ROWS == 1) load(row(first));
    else if constexpr (ROWS == 2) {
      load(row(first)), add(row(first + 1));
      asm volatile("" ::: "memory");   // or the compiler mixes the rows
    } else {
      Part right;
      add_rows<ROWS / 2>(row, first), right.template add_rows<ROWS / 2>(row, first + ROWS / 2);
      add(right);
    }
  }

  // The same of ROWS rows that lie side by side, COUNT of which have terms, the last only where the mask says so.
  template <int ROWS, int COUNT>
  INLINE void add_masked(const T* x, const typename Masks<T>::Mask* mask) {
    if constexpr (ROWS == 1) load(x, mask);
    else if constexpr (COUNT <= ROWS / 2) add_masked<ROWS / 2, COUNT>(x, mask);
    else {
      Part right;
      add_rows<ROWS / 2>([x](int i) __attribute__((always_inline)) { return x + i * kLanes; });
      right.template add_masked<ROWS / 2, COUNT - ROWS / 2>(x + ROWS / 2 * kLanes, mask);
      add(right);
    }
  }
};

template <class T>
const T* row_of_nothing() {
  static const std::vector<T> row(kWidest, kNothing<T>);
  return row.data();
}

// Calls use(row) where row(i) is row i < ROWS of at most ROWS * kLanes contiguous terms of one output. more: see pad().
template <int ROWS, class T, class Use>
INLINE auto with_rows(const T* x, int64_t n, bool more, const Use& use) {
  if (n == ROWS * kLanes) return use([x](int i) __attribute__((always_inline)) { return x + i * kLanes; });
  const T* row[ROWS];
  alignas(64) T last[kLanes];
  const int whole = ROWS > 1 ? int(n / kLanes) : 0;
  pad<kLanes>(x + whole * kLanes, int(n) - whole * kLanes, more, last);
  for (int i = 0; i < ROWS; ++i) row[i] = i < whole ? x + i * kLanes : i == whole ? last : row_of_nothing<T>();
  return use([&row](int i) __attribute__((always_inline)) { return row[i]; });
}

// The 32 lane sums of such terms.
template <int ROWS, class T, class Acc>
INLINE void contiguous_rows(const T* x, int64_t n, Acc* lanes, bool more = false) {
  with_rows<ROWS>(x, n, more, [lanes](const auto& row) __attribute__((always_inline)) {
    if constexpr (ROWS > 1 && std::is_same_v<T, Acc>) {
      for (int l = 0; l < kLanes; l += Part<T>::kWidth) {
        const auto part = [&](int i) __attribute__((always_inline)) { return row(i) + l; };
        Part<T> sum;
        sum.template add_rows<ROWS>(part);
        sum.store(lanes + l);
      }
    } else {
      const T* rows[kRows] = {};
      for (int i = 0; i < ROWS; ++i) rows[i] = row(i);
      add_rows<ROWS>(rows, kLanes, lanes);
    }
  });
}

constexpr int kLevels = std::bit_width(uint64_t(kChunk / kBlock));

// The same of n <= kChunk terms, somewhere in `waiting`. A block's sum is at once added to those that wait for it: bit
// i of the number of blocks so far says whether a sum of 2^i blocks waits. (What is kept is little, and kept in one
// place: stores hold up loads.)
template <class T, class Acc>
INLINE Acc* contiguous_blocks(const T* x, int64_t n, Acc (&waiting)[kLevels + 1][kLanes]) {
  Acc* lanes = waiting[kLevels];
  int blocks = 0, level;
  for (; n >= kBlock; n -= kBlock, x += kBlock, ++blocks) {
    if constexpr (std::is_same_v<T, Half>)   // whose rows compilers read in an order that no processor foresees
      for (int row = 0; row < kRows; ++row) __builtin_prefetch(x + 4 * kBlock + row * kLanes);
    if constexpr (!std::is_same_v<T, Acc>) contiguous_rows<kRows>(x, kBlock, lanes);
    for (int l = 0; l < kLanes; l += Part<Acc>::kWidth) {
      Part<Acc> sum;
      if constexpr (!std::is_same_v<T, Acc>) sum.load(lanes + l);
      else sum.template add_rows<kRows>([=](int i) __attribute__((always_inline)) { return x + i * kLanes + l; });
      for (level = 0; blocks >> level & 1; ++level) sum.add(waiting[level] + l);
      sum.store(waiting[level] + l);
    }
  }
  level = 0;
  if (n > 4 * kLanes) contiguous_rows<8>(x, n, lanes);
  else if (n > 2 * kLanes) contiguous_rows<4>(x, n, lanes);
  else if (n > 1 * kLanes) contiguous_rows<2>(x, n, lanes);
  else if (n > 0) contiguous_rows<1>(x, n, lanes);
  else level = std::countr_zero(unsigned(blocks)), lanes = waiting[level++];
  for (; blocks >> level; ++level)
    if (blocks >> level & 1)
      for (int l = 0; l < kLanes; ++l) lanes[l] = waiting[level][l] + lanes[l];
  return lanes;
}

// The sum of 32 lanes, by halving, in registers: until one vector is left, then in that, or in the kWide vectors of as
// many sums side by side.
template <class Acc>
struct Halving {
  using Vector = typename Part<Acc>::Vector;
  static constexpr int kWide = 32 / sizeof(Acc);

  static INLINE Vector to_vector(const Acc* lanes) {
    Part<Acc> sum;
    sum.load(lanes);
    if constexpr (kWide == 4) sum.add(lanes + kLanes / 2);
    return to_vector(sum);
  }
  static INLINE Vector to_vector(const Part<Acc>& sum) { return (sum.a + sum.c) + (sum.b + sum.d); }

  static INLINE Acc to_one(Vector v) {
    if constexpr (kWide == 8) v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7);
    return tree(tree(v[0], v[2]), tree(v[1], v[3]));
  }

  // The sums of kWide such vectors side by side: first of two neighbours, then of all such pairs.
  static INLINE Vector pair(Vector a, Vector b) {
    if constexpr (kWide == 8)
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    else return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  }
  static INLINE Vector to_ones(const Vector (&pairs)[kWide / 2]) {
    const Vector* v = pairs;
    if constexpr (kWide == 8) {
      Vector w[2];
      for (int i = 0; i < 2; ++i)
        w[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
      const Vector sum = __builtin_shufflevector(w[0], w[1], 0, 2, 8, 10, 4, 6, 12, 14) +
                         __builtin_shufflevector(w[0], w[1], 1, 3, 9, 11, 5, 7, 13, 15);
      return __builtin_shufflevector(sum, sum, 0, 4, 1, 5, 2, 6, 3, 7);
    } else {
      const Vector sum = __builtin_shufflevector(v[0], v[1], 0, 4, 2, 6) +
                         __builtin_shufflevector(v[0], v[1], 1, 5, 3, 7);
      return __builtin_shufflevector(sum, sum, 0, 2, 1, 3);
    }
  }
};

// fetch_add, which macOS's library lacked for long.
template <class Acc>
INLINE void add_racing(std::atomic<Acc>& sum, Acc term) {
  Acc before = sum.load(std::memory_order_relaxed);
  while (!sum.compare_exchange_weak(before, before + term, std::memory_order_relaxed)) {}
}

template <class Acc>
INLINE Acc add_lanes(const Acc* lanes) {
  return Halving<Acc>::to_one(Halving<Acc>::to_vector(lanes));
}

// to[t * kSide + i] = row[i][t] of kWide rows of n terms.
template <class T>
INLINE void transpose(const T* const (&row)[32 / sizeof(T)], int64_t n, T* to) {
  typedef typename Part<T>::Vector Vector;
  constexpr int kWide = 32 / sizeof(T);
  if (n < kWide) {
    for (int64_t t = 0; t < n; ++t)
      for (int i = 0; i < kWide; ++i) to[t * kSide + i] = row[i][t];
    return;
  }
  for (int64_t t = 0; t < n; t += kWide) {
    const int64_t at = std::min(t, n - kWide);   // the last square overlaps the one before
    alignas(32) Vector v[kWide], w[kWide];
    for (int i = 0; i < kWide; ++i) v[i] = *reinterpret_cast<const Vector*>(row[i] + at);
    if constexpr (kWide == 8) {
      for (int i = 0; i < 8; i += 2) {
        w[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        w[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
      }
      for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; ++k) {
          v[i + 2 * k] = __builtin_shufflevector(w[i + k], w[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
          v[i + 2 * k + 1] = __builtin_shufflevector(w[i + k], w[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
      for (int i = 0; i < 4; ++i) {
        w[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        w[i + 4] = __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
      }
    } else {
      transpose_four(v);
      std::copy(v, v + 4, w);
    }
    for (int i = 0; i < kWide; ++i) *reinterpret_cast<Vector*>(to + (at + i) * kSide) = w[i];
  }
}

// The lowest levels, three at most, of the tree over `terms` terms, a power of two: the sum of leaf 0 ... count - 1,
// where leaf k is term offset[k] + l, for each l = 0 ... left - 1 stands for the `left` lanes that are then halved.
struct Leaves {
  int count = 1, left, offset[kRows] = {};
  explicit Leaves(int terms) {
    for (int distance = kLanes; distance < terms; distance *= 2) add(distance);
    for (int distance = std::min(terms, kLanes) / 2; distance > 0; distance /= 2) add(distance);
    left = terms / count;
  }
  void add(int distance) {
    if (count == kRows) return;
    for (int k = 0; k < count; ++k) offset[count + k] = offset[k] + distance;
    count *= 2;
  }
};

// The terms of adjacent outputs.
template <class T>
struct Terms {
  const T* x;
  int64_t stride;
  const int64_t* rows;   // null: one row after the other
  INLINE const T* operator[](int64_t i) const { return x + (rows ? rows[i] : i) * stride; }
  INLINE Terms from(int64_t i) const { return rows ? Terms{x, stride, rows + i} : Terms{x + i * stride, stride, rows}; }
};

// The sums of the leaves of at most kBlock terms of `width` adjacent outputs, as sums[l * width + output].
template <class T, class Acc>
INLINE void strided_block(const Terms<T>& x, int64_t n, int width, const Leaves& leaves, Acc* sums) {
  const T* const nothing = row_of_nothing<T>();
  const T* row[kRows] = {};
  for (int l = 0; l < leaves.left; ++l) {
    for (int k = 0; k < leaves.count; ++k) {
      const int64_t term = leaves.offset[k] + l;
      row[k] = term < n ? x[term] : nothing;
    }
    add_rows(leaves.count, row, width, sums + l * width);
  }
}

// sum[w] += the groups in rows 0 ... ROWS - 1, of GROUP rows each, one group after the other.
template <int GROUP, int ROWS, class T, class Acc>
INLINE void add_groups(const T* const (&row)[kRows], int width, Acc* sum) {
  const T *a = row[0], *b = row[1], *c = row[2], *d = row[3], *e = row[4], *f = row[5], *g = row[6], *h = row[7];
  for_columns<T>(width, sum, [=](const auto& at, auto s) __attribute__((always_inline)) {
    if constexpr (GROUP == 1) {
      s += at(a);
      if constexpr (ROWS > 1) s += at(b);
      if constexpr (ROWS > 2) s += at(c), s += at(d);
      if constexpr (ROWS > 4) s += at(e), s += at(f), s += at(g), s += at(h);
    }
    if constexpr (GROUP == 2) {
      s += tree(at(a), at(b));
      if constexpr (ROWS > 2) s += tree(at(c), at(d));
      if constexpr (ROWS > 4) s += tree(at(e), at(f)), s += tree(at(g), at(h));
    }
    if constexpr (GROUP == 4) {
      s += tree(at(a), at(b), at(c), at(d));
      if constexpr (ROWS > 4) s += tree(at(e), at(f), at(g), at(h));
    }
    if constexpr (GROUP == 8) s += tree(at(a), at(b), at(c), at(d), at(e), at(f), at(g), at(h));
    return s;
  });
}

// sum[w] = the groups of `width` adjacent outputs, of at most GROUP terms, added in the order `by` (null: as they are).
template <int GROUP, class T, class Acc>
INLINE void add_short_groups(const Terms<T>& x, const Groups groups, int64_t count, const int32_t* by, int width,
                             Acc* sum) {
  const Leaves leaves(GROUP);
  std::fill_n(sum, width, kNothing<Acc>);
  const T* row[kRows] = {};
  for (int64_t g = 0; g < count;) {
    int rows = 0;
    for (; rows < kRows && g < count; ++g) {
      const Group group = groups[by ? by[g] : g];
      for (int k = 0; k < GROUP; ++k)
        row[rows++] = leaves.offset[k] < group.size ? x[group.begin + leaves.offset[k]] : row_of_nothing<T>();
    }
    while (rows & (rows - 1)) row[rows++] = row_of_nothing<T>();
    if (rows == kRows) add_groups<GROUP, kRows>(row, width, sum);
    else if (rows == 4) add_groups<GROUP, 4>(row, width, sum);
    else if (rows == 2) add_groups<GROUP, 2>(row, width, sum);
    else add_groups<GROUP, 1>(row, width, sum);
  }
}
template <class T, class Acc>
INLINE void add_short_groups(const Terms<T>& x, const Groups groups, int64_t count, const int32_t* by, int width,
                             Acc* sum) {
  if (groups.longest() == 1) add_short_groups<1>(x, groups, count, by, width, sum);
  else if (groups.longest() == 2) add_short_groups<2>(x, groups, count, by, width, sum);
  else if (groups.longest() <= 4) add_short_groups<4>(x, groups, count, by, width, sum);
  else add_short_groups<8>(x, groups, count, by, width, sum);
}

// The sums of `count` lanes of `width` adjacent outputs, by halving.
template <class Acc>
INLINE void add_lanes(Acc* lanes, int count, int width, Acc* sums) {
  const Acc* row[kRows] = {};
  for (bool last = false; !last;) {
    const Leaves leaves(count);
    last = leaves.left == 1;
    for (int l = 0; l < leaves.left; ++l) {
      for (int k = 0; k < leaves.count; ++k) row[k] = lanes + (leaves.offset[k] + l) * width;
      add_rows(leaves.count, row, width, last ? sums : lanes + l * width);
    }
    count = leaves.left;
  }
}

// The binary tree over equal, aligned pieces of a group that arrive from left to right: a binary counter in which
// bit k of the count says that a sum of 2^k pieces waits on the stack, the largest at the bottom.
template <class Acc>
class Counter {
 public:
  Counter(int64_t piece, int64_t pieces)
      : piece_(piece), stack_(new Acc[piece * (1 + std::bit_width(uint64_t(pieces - 1)))]) {}
  INLINE void reset() { count_ = depth_ = 0; }
  INLINE Acc* next() { return level(depth_); }   // where the next piece is to be written before push()
  INLINE void push() {
    int64_t last = depth_++;
    for (int64_t bits = count_++; bits & 1; bits >>= 1, --last, --depth_) add(level(last - 1), level(last));
  }
  INLINE Acc* finish() {
    for (; depth_ > 1; --depth_) add(level(depth_ - 2), level(depth_ - 1));
    return level(0);
  }

 private:
  INLINE Acc* level(int64_t k) { return stack_.get() + k * piece_; }
  INLINE void add(Acc* __restrict__ left, const Acc* __restrict__ right) {
    for (int64_t i = 0; i < piece_; ++i) left[i] += right[i];
  }
  const int64_t piece_;
  int64_t count_ = 0, depth_ = 0;
  std::unique_ptr<Acc[]> stack_;
};

// other[i][w] = the element with which shuffle() of order.h swaps element last - i of output + w, for the four draws
// of one Philox block.
INLINE void draw_any(Key key, uint64_t output, int block, int last, uint32_t (*other)[kSide]) {
  for (int w = 0; w < kSide; ++w) {
    uint32_t c[4] = {uint32_t(output + w), uint32_t((output + w) >> 32 & 0xFFFFu) | uint32_t(block) << 16,
                     key.step, key.op};
    philox4x32_10(c, uint32_t(key.seed), uint32_t(key.seed >> 32));
    for (int i = 0; i < 4; ++i) other[i][w] = uint32_t(uint64_t{c[i]} * uint32_t(last + 1 - i) >> 32);
  }
}

#if defined(__x86_64__)
// The same, eight outputs at a time: compilers do not find the instruction that multiplies 32 by 32 bits. A word of a
// counter is the lower half of 64 bits; what stands in the upper half is never read.
__attribute__((target("avx2"))) inline void draw_avx2(Key key, uint64_t output, int block, int last,
                                                      uint32_t (*other)[kSide]) {
  for (int w = 0; w < kSide; w += 8) {
    __m256i c[2][4];   // of the even and of the odd outputs
    for (int odd = 0; odd < 2; ++odd) {
      c[odd][0] = _mm256_add_epi64(_mm256_set1_epi64x(output + w + odd), _mm256_setr_epi64x(0, 2, 4, 6));
      c[odd][1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi64(c[odd][0], 32), _mm256_set1_epi64x(0xFFFF)),
                                  _mm256_set1_epi64x(uint64_t(block) << 16));
      c[odd][2] = _mm256_set1_epi64x(key.step), c[odd][3] = _mm256_set1_epi64x(key.op);
    }
    __m256i k0 = _mm256_set1_epi64x(key.seed), k1 = _mm256_set1_epi64x(key.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (__m256i* d : c) {
        const __m256i p0 = _mm256_mul_epu32(d[0], _mm256_set1_epi64x(0xD2511F53u));
        const __m256i p1 = _mm256_mul_epu32(d[2], _mm256_set1_epi64x(0xCD9E8D57u));
        d[0] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(d[1], k0)), d[1] = p1;
        d[2] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(d[3], k1)), d[3] = p0;
      }
      k0 = _mm256_add_epi64(k0, _mm256_set1_epi64x(0x9E3779B9u));
      k1 = _mm256_add_epi64(k1, _mm256_set1_epi64x(0xBB67AE85u));
    }
    for (int i = 0; i < 4; ++i) {
      const __m256i bound = _mm256_set1_epi64x(last + 1 - i);
      const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(c[0][i], bound), 32);
      const __m256i odd = _mm256_mul_epu32(c[1][i], bound);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(other[i] + w), _mm256_blend_epi32(even, odd, 0xAA));
    }
  }
}
#endif

// The swaps of one Philox block: of kSide outputs, elements last, last - 1, ... each change places with element
// other[0][w] <= last, other[1][w] <= last - 1, ...
template <class Acc>
INLINE void swap_side(Acc* v, int last, int64_t stride, const uint32_t (*other)[kSide]) {
  for (const int end = last < 4 ? 0 : last - 4; last > end; --last, ++other)
    for (int w = 0; w < kSide; ++w) std::swap(v[last * stride + w], v[(*other)[w] * stride + w]);
}

// The same where few elements are left: in registers, looking at all of them, without branches or addresses.
template <int last, class Acc>
INLINE void swap_in_registers(Acc* from, int64_t stride, const uint32_t (*other)[kSide]) {
  constexpr int kWide = 32 / sizeof(Acc);   // of one AVX2 register
  typedef Acc Values __attribute__((vector_size(kWide * sizeof(Acc)), aligned(sizeof(Acc))));
  typedef uint32_t Draws __attribute__((vector_size(kWide * 4), aligned(4)));
  typedef std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t> Mask __attribute__((vector_size(kWide * sizeof(Acc))));
  for (int w = 0; w < kSide; w += kWide) {
    Values v[last + 1];
    for (int i = 0; i <= last; ++i) v[i] = *reinterpret_cast<const Values*>(from + i * stride + w);
#pragma GCC unroll 4
    for (int n = 0; n < (last < 4 ? last : 4); ++n) {
      const Mask place = __builtin_convertvector(*reinterpret_cast<const Draws*>(other[n] + w), Mask);
      const Values top = v[last - n];
      Values taken = top;
#pragma GCC unroll 8
      for (int i = 0; i < last - n; ++i) {
        const Mask hit = place == i;
        taken = hit ? v[i] : taken;
        v[i] = hit ? top : v[i];
      }
      v[last - n] = taken;
    }
    for (int i = 0; i <= last; ++i) *reinterpret_cast<Values*>(from + i * stride + w) = v[i];
  }
}

// sums[g - first] of groups first ... last - 1 of one output, of at most TERMS contiguous terms (but of Acc's type more
// than TERMS - kLanes at most), all of just so many if FULL (of 8 they must be), of any up to kChunk if TERMS is 0. Memory
// can be read up to `end`. (groups is a copy, which no store can change.)
template <int TERMS, bool FULL, class T, class Acc>
INLINE void some_groups(const T* x, const Groups groups, int64_t first, int64_t last, const T* end, Acc* sums) {
  using Ones = Halving<Acc>;
  constexpr bool kMasked = !FULL && TERMS > 0 && std::is_same_v<T, Acc>;
  constexpr int kCount = std::max(1, TERMS / kLanes);   // rows
  const Masks<Acc> mask(groups.size - (kCount - 1) * kLanes), longer(groups.size + 1 - (kCount - 1) * kLanes);
  constexpr int kWide = Ones::kWide;
  x += groups[first].begin;
  const auto next = [&](int64_t g) __attribute__((always_inline)) {
    constexpr int kRowsOf = TERMS / kLanes;
    const int64_t n = FULL ? TERMS : groups[g].size;
    const T* terms = x;
    x += n;
    if constexpr (kMasked) {
      const auto sum = [&](const T* terms) __attribute__((always_inline)) {
        constexpr int kLeaves = int(std::bit_ceil(unsigned(kCount)));   // of the tree over rows
        const auto masks = (g < groups.longer ? longer : mask).vector;
        Part<T> some;
        if constexpr (TERMS == 16 && Ones::kWide == 8) {
          const auto v = reinterpret_cast<const typename Ones::Vector*>(terms);
          const auto nothing = -typename Ones::Vector{};
          return (masks[0] ? v[0] : nothing) + (masks[1] ? v[1] : nothing);
        } else if constexpr (Ones::kWide == 4 && TERMS > 16) {
          Part<T> upper;
          some.template add_masked<kLeaves, kCount>(terms, masks);
          upper.template add_masked<kLeaves, kCount>(terms + kLanes / 2, masks + 4);
          some.add(upper);
        } else {
          some.template add_masked<kLeaves, kCount>(terms, masks);
        }
        return Ones::to_vector(some);
      };
      if (terms + kCount * kLanes <= end) return sum(terms);
      alignas(64) T copy[kCount * kLanes] = {};
      std::copy_n(terms, n, copy);
      return sum(copy);
    } else if constexpr (TERMS == 0) {
      alignas(64) Acc waiting[kLevels + 1][kLanes];
      return Ones::to_vector(contiguous_blocks(terms, n, waiting));
    } else if constexpr (TERMS < kLanes) {
      const auto v = reinterpret_cast<const typename Ones::Vector*>(terms);
      if constexpr (TERMS == kWide) return v[0];
      else if constexpr (TERMS == 2 * kWide) return v[0] + v[1];
      else return (v[0] + v[2]) + (v[1] + v[3]);
    } else if constexpr (std::is_same_v<T, float>) {   // all lanes fit into the registers
      Part<T> sum;
      sum.template add_rows<kRowsOf>([terms](int i) __attribute__((always_inline)) { return terms + i * kLanes; });
      return Ones::to_vector(sum);
    } else {
      alignas(64) Acc lanes[kLanes];
      contiguous_rows<kRowsOf>(terms, n, lanes, terms + n + 7 <= end);
      return Ones::to_vector(lanes);
    }
  };
  int64_t g = first;
  for (; (FULL || TERMS == 0 || kMasked) && g + kWide <= last; g += kWide, sums += kWide) {
    typename Ones::Vector pairs[kWide / 2];
    for (int i = 0; i < kWide / 2; ++i) {
      const typename Ones::Vector left = next(g + 2 * i);
      pairs[i] = Ones::pair(left, next(g + 2 * i + 1));
    }
    *reinterpret_cast<typename Ones::Vector*>(sums) = Ones::to_ones(pairs);
  }
#pragma GCC unroll 1
  for (; g < last; ++g) *sums++ = Ones::to_one(next(g));
}

template <class T>
struct Sum {
  using Acc = typename AccType<T>::type;
  static constexpr int kWide = Halving<Acc>::kWide;   // sums of a vector
  const Reduction& r;
  const T *x, *end;      // of the memory of the terms
  T* out;
  Key key;
  Groups groups;
  bool across;           // neighbouring outputs are added side by side, a vector of them at a time
  bool contiguous;       // else: the terms of an output lie side by side
  bool beside;           // and are so few that neighbouring outputs are laid side by side, after all
  bool at_once;          // an output's groups are added as soon as they are there: see contiguous_blocks
  bool short_groups;     // the same of neighbouring outputs, whose groups are short
  Leaves leaves;
  int lanes;             // sums of a piece of a group
  int tile;              // outputs of one task
  int pitch;             // outputs for which there is room: whole vectors of kSide
  int64_t tiles;         // with across: tiles in one row of `inner` outputs
  std::vector<int32_t> order;   // in which the groups of every output are added, unless r.tickets says so

  Sum(const Reduction& r, const T* x, T* out)
      : r(r), x(x), end(x + r.first_term(r.outputs() - 1) + (r.terms - 1) * r.term_stride + 1), out(out),
        key{r.seed, r.step, r.op}, groups(r.terms, r.groups),
        across(r.inner_stride == 1 && r.inner > 1), contiguous(!across && r.term_stride == 1 && !r.rows),
        leaves(next_power_of_two(std::min<int64_t>(kBlock, groups.longest()))),
        lanes(contiguous ? kLanes : leaves.left), order(r.groups) {
    tile = across ? int(std::min<int64_t>(r.inner, kWidest)) : kSide;
    const int64_t enough = 2 * int64_t(torch::stable::get_num_threads());   // tasks, so that every thread has some
    // Narrow tiles are read in small pieces from all over memory: where groups are long, threads share those instead.
    const int64_t shares = groups.longest() > 4 * kBlock ? r.groups * ((groups.longest() + kChunk - 1) / kChunk) : 1;
    while (across && tile > 128 && r.outer * ((r.inner + tile - 1) / tile) * shares < enough) tile /= 2;
    while (!across && tile > 1 && groups.longest() <= kChunk && (r.outputs() + tile - 1) / tile < enough) tile /= 2;
    pitch = (tile + kSide - 1) / kSide * kSide;
    tiles = (r.inner + tile - 1) / tile;
    const int64_t bytes = r.terms * int64_t(sizeof(T));
    // Several rows of 256 bytes or more at a time come from memory at a third of its rate. (Half types gain even so.)
    beside = contiguous && r.terms <= kTransposed && groups.longest() < (std::is_same_v<T, Acc> ? 9 : kLanes) &&
             (sizeof(T) == 2 || bytes < 256 || bytes * r.outputs() <= kCached);
    const bool even = std::is_same_v<T, Acc> && r.terms == r.groups * 8;
    const bool alike = r.order == Order::fixed || (r.order == Order::shuffled && !r.per_output);
    at_once = contiguous && (even || (!beside && groups.longest() > 8)) && groups.longest() <= kChunk &&
              r.groups <= kFew && (r.outputs() >= enough || r.outputs() * r.terms < 2 * kGrain) && alike;
    short_groups = across && groups.longest() <= kRows && alike;
    std::iota(order.begin(), order.end(), 0);
    if (r.order == Order::shuffled && !r.per_output) shuffle(order.data(), int(r.groups), 1, key, 0);
  }

  struct Place {
    int64_t output;
    const T* x;               // terms of the first output
    int width;                // outputs
    int64_t first, last;      // groups first ... last - 1
  };
  // Tiles are of neighbours along `inner` where their terms lie side by side, else of any consecutive outputs.
  Place place(int64_t task) const {
    if (!across) return {task * tile, nullptr, int(std::min<int64_t>(tile, r.outputs() - task * tile)), 0, r.groups};
    const int64_t o = task / tiles, i = task % tiles * tile;
    return {o * r.inner + i, x + o * r.outer_stride + i, int(std::min<int64_t>(tile, r.inner - i)), 0, r.groups};
  }
  const T* terms_of(int64_t output) const { return x + r.first_term(output); }

  // The lanes' sums of n terms, an aligned piece of a group, of one output, or of `width` neighbouring ones.
  INLINE Acc* contiguous_lanes(const T* x, int64_t n, Counter<Acc>& counter) const {
    counter.reset();
    for (int64_t i = 0; i < n; i += kChunk) {
      alignas(64) Acc waiting[kLevels + 1][kLanes];
      std::copy_n(contiguous_blocks(x + i, std::min(kChunk, n - i), waiting), kLanes, counter.next());
      counter.push();
    }
    return counter.finish();
  }
  INLINE Acc* strided_lanes(const Terms<T>& x, int64_t n, int width, Counter<Acc>& counter) const {
    counter.reset();
    for (int64_t i = 0; i < n; i += kBlock) {
      strided_block(x.from(i), std::min<int64_t>(kBlock, n - i), width, leaves, counter.next());
      counter.push();
    }
    return counter.finish();
  }
  INLINE Acc* lanes_of_any(const Terms<T>& x, int64_t n, int width, Counter<Acc>& counter) const {
    return contiguous ? contiguous_lanes(x.x, n, counter) : strided_lanes(x, n, width, counter);
  }

  // partial[g * pitch] for the groups of one output, of at most TERMS contiguous terms, a power of two.
  template <int TERMS>
  INLINE void tiny_groups(const Place& p, const T* x, Acc* partial) const {
    for (int64_t g = p.first; g < p.last; ++g) {
      const Group group = groups[g];
      const auto sum = [](const auto& at) __attribute__((always_inline)) {   // the 32 lanes' halving, but for -0.0
        if constexpr (TERMS == 1) return at(0);
        if constexpr (TERMS == 2) return at(0) + at(1);
        if constexpr (TERMS == 4) return tree(at(0) + at(2), at(1) + at(3));
        if constexpr (TERMS == 8)
          return tree(tree(at(0) + at(4), at(2) + at(6)), tree(at(1) + at(5), at(3) + at(7)));
      };
      const T* first = x + group.begin;
      partial[g * pitch] = group.size == TERMS
          ? sum([&](int i) { return Acc(first[i]); })
          : sum([&](int i) { return i < group.size ? Acc(first[i]) : kNothing<Acc>; });
    }
  }

  // Calls use(TERMS, FULL) as the groups' lengths want it.
  template <class Use>
  INLINE void by_length(const Use& use) const {
    const auto call = [&](auto terms) __attribute__((always_inline)) {
      constexpr bool kFull = std::is_same_v<T, float>;   // of others all lanes do not fit into the registers
      if (r.terms == r.groups * terms()) use(terms, std::bool_constant<kFull>());
      else use(terms, std::false_type());
    };
    if constexpr (std::is_same_v<T, Acc>) {
      if (r.terms == r.groups * 8) return use(std::integral_constant<int, 8>(), std::true_type());
      if (r.terms == r.groups * 16) return use(std::integral_constant<int, 16>(), std::true_type());
      const auto masked = [&](auto terms) __attribute__((always_inline)) { use(terms, std::false_type()); };
      if (groups.longest() <= 16) return masked(std::integral_constant<int, 16>());
      switch ((groups.longest() + kLanes - 1) / kLanes) {
        case 3: return masked(std::integral_constant<int, 3 * kLanes>());
        case 5: return masked(std::integral_constant<int, 5 * kLanes>());
        case 6: return masked(std::integral_constant<int, 6 * kLanes>());
        case 7: return masked(std::integral_constant<int, 7 * kLanes>());
      }
    }
    if (groups.longest() <= 1 * kLanes) call(std::integral_constant<int, 1 * kLanes>());
    else if (groups.longest() <= 2 * kLanes) call(std::integral_constant<int, 2 * kLanes>());
    else if (groups.longest() <= 4 * kLanes) call(std::integral_constant<int, 4 * kLanes>());
    else if (groups.longest() <= 8 * kLanes) call(std::integral_constant<int, 8 * kLanes>());
    else use(std::integral_constant<int, 0>(), std::false_type());
  }

  // The outputs first ... last - 1 of such groups, if at_once.
  INLINE void add_at_once_any(int64_t first, int64_t last) const {
    by_length([&](auto most, auto full) __attribute__((always_inline)) {
      alignas(64) Acc sums[kFew];
      const int64_t count = r.groups, inner = r.inner, stride = r.outer_stride;   // here no store can change them
      const int32_t* const by = order.data();
      const T *const x = this->x, *const end = this->end;
      T* const out = this->out;
      for (int64_t output = first; output < last; ++output) {
        some_groups<most(), full()>(inner == 1 ? x + output * stride : terms_of(output), groups, 0, count, end, sums);
        Acc sum = sums[by[0]];
        for (int64_t g = 1; g < count; ++g) sum += sums[by[g]];
        out[output] = T(sum);
      }
    });
  }

  // partial[g * kSide + output] for such groups of the outputs of one tile from `done` on.
  template <int TERMS, bool FULL>
  INLINE void some_partials(const Place& p, int done, Acc* partial) const {
    constexpr int kMost = 64;   // groups at a time
    alignas(64) Acc sums[kWide][kMost];
    const Acc* row[kWide];
    for (int i = 0; i < kWide; ++i) row[i] = sums[i];
    for (int64_t first = p.first; first < p.last; first += kMost) {
      const int64_t last = std::min(p.last, first + kMost);
      for (int w = done; w < p.width; w += kWide) {
        const int outputs = std::min(kWide, p.width - w);
        for (int i = 0; i < outputs; ++i)
          some_groups<TERMS, FULL>(terms_of(p.output + w + i), groups, first, last, end, sums[i]);
        Acc* const to = partial + first * kSide + w;
        if (outputs == kWide) transpose(row, last - first, to);
        else
          for (int64_t g = 0; g < last - first; ++g)
            for (int i = 0; i < outputs; ++i) to[g * kSide + i] = sums[i][g];
      }
    }
  }

  // partial[g * pitch + output] for the groups of one tile, where the terms of an output lie side by side.
  INLINE void contiguous_partials_any(const Place& p, Acc* partial, Counter<Acc>& counter) const {
    int done = 0;
    if (beside && p.last - p.first == r.groups) {
      done = p.width / kWide * kWide;
      alignas(64) Acc terms[kTransposed * kSide], sums[kLanes / kRows * kSide], wide[kWide][kTransposed];
      for (int w = 0; w < done; w += kWide) {
        const Acc* row[kWide];
        for (int i = 0; i < kWide; ++i) {
          const T* x = terms_of(p.output + w + i);
          if constexpr (std::is_same_v<T, Acc>) row[i] = x;
          else row[i] = wide[i], std::copy_n(x, r.terms, wide[i]);
        }
        transpose(row, r.terms, terms + w);
      }
      for (int64_t g = 0; g < r.groups && done > 0; ++g) {
        const Terms<Acc> first{terms + groups[g].begin * kSide, kSide, nullptr};
        const bool one = leaves.left == 1;
        strided_block(first, groups[g].size, done, leaves, one ? partial + g * pitch : sums);
        if (!one) add_lanes(sums, leaves.left, done, partial + g * pitch);
      }
    }
    if (groups.longest() > 8 && groups.longest() <= kChunk)
      return by_length([&](auto most, auto full) __attribute__((always_inline)) {
        some_partials<most(), full()>(p, done, partial);
      });
    for (int w = done; w < p.width; ++w) {
      const T* terms = terms_of(p.output + w);
      if (groups.longest() == 1) tiny_groups<1>(p, terms, partial + w);
      else if (groups.longest() == 2) tiny_groups<2>(p, terms, partial + w);
      else if (groups.longest() <= 4) tiny_groups<4>(p, terms, partial + w);
      else if (groups.longest() <= 8) tiny_groups<8>(p, terms, partial + w);
      else
        for (int64_t g = p.first; g < p.last; ++g)
          partial[g * pitch + w] =
              add_lanes(contiguous_lanes(terms + groups[g].begin, groups[g].size, counter));
    }
  }

  // The same for any other terms.
  INLINE void strided_partials_any(const Place& p, Acc* partial, Counter<Acc>& counter) const {
    const int width = across ? p.width : 1;
    for (int w = 0; w < p.width; w += width) {
      const T* terms = across ? p.x : terms_of(p.output + w);
      for (int64_t g = p.first; g < p.last; ++g) {
        const Group group = groups[g];
        const Terms<T> first = Terms<T>{terms, r.term_stride, r.rows}.from(group.begin);
        Acc* sums = partial + g * pitch + w;
        if (lanes == 1) strided_block(first, group.size, width, leaves, sums);
        else add_lanes(strided_lanes(first, group.size, width, counter), lanes, width, sums);
      }
    }
  }

  // The result of one tile of such outputs, if short_groups.
  INLINE void add_short_any(const Place& p) const {
    Acc sums[kWidest], *sum = sums;
    if constexpr (std::is_same_v<T, Acc>) sum = out + p.output;
    add_short_groups(Terms<T>{p.x, r.term_stride, r.rows}, groups, r.groups, order.data(), p.width, sum);
    for (int w = 0; w < p.width && !std::is_same_v<T, Acc>; ++w) out[p.output + w] = T(sum[w]);
  }

  // Partial sums of the groups of one tile into the result.
  INLINE void combine_any(const Place& p, Acc* partial) const {
    if (r.order == Order::shuffled && r.per_output)
      for (int w = 0; w < p.width; w += kSide) {
        uint32_t other[4][kSide];
        for (int last = int(r.groups) - 1, block = 0; last > 0; last -= 4, ++block) {
          draw(key, r.first + uint64_t(p.output + w), block, last, other);
          switch (last) {
            case 1: swap_in_registers<1>(partial + w, pitch, other); break;
            case 2: swap_in_registers<2>(partial + w, pitch, other); break;
            case 3: swap_in_registers<3>(partial + w, pitch, other); break;
            case 4: swap_in_registers<4>(partial + w, pitch, other); break;
            case 5: swap_in_registers<5>(partial + w, pitch, other); break;
            case 6: swap_in_registers<6>(partial + w, pitch, other); break;
            case 7: swap_in_registers<7>(partial + w, pitch, other); break;
            default: swap_side(partial + w, last, pitch, other);
          }
        }
      }
    for (int from = 0, to; from < p.width; from = to) {
      const int64_t output = p.output + from;
      const int32_t* by = r.tickets ? r.tickets + output / kStretch * r.groups : order.data();
      to = r.tickets ? std::min(p.width, from + kStretch - int(output % kStretch)) : p.width;
      Acc* __restrict__ sum = partial + by[0] * int64_t(pitch);
      for (int64_t g = 1; g < r.groups; ++g) {
        const Acc* part = partial + by[g] * int64_t(pitch);
        for (int w = from; w < to; ++w) sum[w] += part[w];
      }
      for (int w = from; w < to; ++w) out[p.output + w] = T(sum[w]);
    }
  }

  TWICE_CHOICE
  void draw(Key key, uint64_t output, int block, int last, uint32_t (*other)[kSide]) const {
#if defined(__x86_64__)
    if (avx2) return draw_avx2(key, output, block, last, other);
#endif
    draw_any(key, output, block, last, other);
  }
  TWICE(Acc*, lanes_of, (const Terms<T>& x, int64_t n, int width, Counter<Acc>& counter), (x, n, width, counter))
  TWICE(void, contiguous_partials, (const Place& p, Acc* partial, Counter<Acc>& counter), (p, partial, counter))
  TWICE(void, add_at_once, (int64_t first, int64_t last), (first, last))
  TWICE(void, add_short, (const Place& p), (p))
  TWICE(void, strided_partials, (const Place& p, Acc* partial, Counter<Acc>& counter), (p, partial, counter))
  TWICE(void, combine, (const Place& p, Acc* partial), (p, partial))

  void partials(const Place& p, Acc* partial, Counter<Acc>& counter) const {
    contiguous ? contiguous_partials(p, partial, counter) : strided_partials(p, partial, counter);
  }

  // Calls use(place, partials) for every tile, from several threads.
  template <class Use>
  void for_each_tile(const Use& use) {
    const int64_t threads = torch::stable::get_num_threads(), terms = r.terms * r.outputs();
    const int64_t blocks = (groups.longest() + kBlock - 1) / kBlock;
    int64_t tasks = across ? r.outer * tiles : (r.outputs() + tile - 1) / tile;
    if (tasks >= 2 * threads || terms < 2 * kGrain) {
      torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain * tasks / terms),
                                  [&](int64_t first, int64_t last) {
        Counter<Acc> counter(int64_t(lanes) * (across ? tile : 1), blocks);
        std::vector<Acc> partial(r.groups * pitch);
        for (int64_t task = first; task < last; ++task) {
          const Place p = place(task);
          partials(p, partial.data(), counter);
          use(p, partial.data());
        }
      });
      return;
    }
    // Few outputs, long groups: threads share the groups, or the chunks of each where groups cannot be shared out
    // evenly; the chunks' lane sums are then added up the same tree.
    if (!across) tile = 1, tasks = r.outputs();
    const int64_t share = tasks * r.groups % threads == 0 ? groups.longest() : kChunk;
    const int64_t chunks = (groups.longest() + share - 1) / share, piece = int64_t(lanes) * tile;
    std::unique_ptr<Acc[]> sums(new Acc[tasks * r.groups * chunks * piece]);
    torch::stable::parallel_for(0, tasks * r.groups * chunks, 1, [&](int64_t first, int64_t last) {
      Counter<Acc> counter(piece, blocks);
      for (int64_t job = first; job < last;) {
        const Place p = place(job / chunks / r.groups);
        const Group group = groups[job / chunks % r.groups];
        const Terms<T> all{across ? p.x : terms_of(p.output), r.term_stride, r.rows};
        const int64_t chunk = job % chunks, end = std::min(chunks, chunk + last - job);
        for (int64_t c = chunk; c < end; ++c, ++job) {
          const int64_t begin = c * share, n = std::min(group.size - begin, share);
          if (n <= 0) continue;
          const Acc* sum = lanes_of(all.from(group.begin + begin), n, p.width, counter);
          std::copy(sum, sum + lanes * p.width, sums.get() + job * piece);
        }
      }
    });
    std::vector<Acc> partial(r.groups * pitch);
    for (int64_t task = 0; task < tasks; ++task) {
      const Place p = place(task);
      for (int64_t g = 0; g < r.groups; ++g) {
        Acc* const sum = sums.get() + (task * r.groups + g) * chunks * piece;
        const int64_t all = (groups[g].size + share - 1) / share;
        for (int64_t distance = 1; distance < all; distance *= 2)
          for (int64_t k = 0; k + distance < all; k += 2 * distance)
            for (int64_t i = 0; i < lanes * p.width; ++i) sum[k * piece + i] += sum[(k + distance) * piece + i];
        add_lanes(sum, lanes, p.width, partial.data() + g * pitch);
      }
      use(p, partial.data());
    }
  }

  // Every thread takes the next free (stretch of outputs, group), the group varying fastest, sums that group and then
  // draws the stretch's next ticket. When all are done, every stretch adds its groups in the order of their tickets.
  void arrive() {
    const int64_t threads = torch::stable::get_num_threads(), jobs = r.stretches() * r.groups;
    pitch = kStretch;
    std::unique_ptr<Acc[]> partial(new Acc[jobs * kStretch]);
    std::unique_ptr<std::atomic<int>[]> tickets(new std::atomic<int>[r.stretches()]());
    std::atomic<int64_t> next{0};
    const auto stretch = [&](int64_t s) {
      return Place{s * kStretch, nullptr, int(std::min<int64_t>(kStretch, r.outputs() - s * kStretch)), 0, r.groups};
    };
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Counter<Acc> counter(int64_t(lanes) * (across ? kStretch : 1), (groups.longest() + kBlock - 1) / kBlock);
      for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) {
        const int64_t s = job / r.groups, g = job % r.groups;
        Acc* sums = partial.get() + s * r.groups * kStretch;
        Place all = stretch(s);
        for (int w = 0, width; w < all.width; w += width) {   // pieces along `inner`, where a tile must lie in it
          const int64_t output = all.output + w;
          width = across ? int(std::min<int64_t>(all.width - w, r.inner - output % r.inner)) : all.width;
          partials(Place{output, terms_of(output), width, g, g + 1}, sums + w, counter);
        }
        r.tickets[s * r.groups + tickets[s].fetch_add(1, std::memory_order_acq_rel)] = int32_t(g);
      }
    });
    torch::stable::parallel_for(0, r.stretches(), std::max<int64_t>(1, kGrain / (r.groups * kStretch)),
                                [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) combine(stretch(s), partial.get() + s * r.groups * kStretch);
    });
  }

  void run() {
    if (r.order == Order::arrival) return arrive();
    if (r.order != Order::atomic) {
      if (at_once)
        return torch::stable::parallel_for(0, r.outputs(), std::max<int64_t>(1, kGrain / r.terms),
                                           [this](int64_t first, int64_t last) { add_at_once(first, last); });
      if (short_groups)
        return torch::stable::parallel_for(0, r.outer * tiles, std::max<int64_t>(1, kGrain / (tile * r.terms)),
                                           [this](int64_t first, int64_t last) {
          for (int64_t task = first; task < last; ++task) add_short(place(task));
        });
      for_each_tile([this](const Place& p, Acc* partial) { combine(p, partial); });
      return;
    }
    // The race. Every thread takes the next free (stretch of outputs, group) from one ticket counter, the group
    // varying fastest, and adds it with std::atomic: the order of an output's groups is the order of arrival.
    const int64_t outputs = r.outputs(), stretch = 64, stretches = (outputs + stretch - 1) / stretch;
    std::vector<Acc> partials(r.groups * outputs);
    for_each_tile([&](const Place& p, Acc* partial) {
      for (int64_t g = 0; g < r.groups; ++g)
        std::copy_n(partial + g * pitch, p.width, partials.data() + g * outputs + p.output);
    });
    std::unique_ptr<std::atomic<Acc>[]> sums(new std::atomic<Acc>[outputs]);
    for (int64_t o = 0; o < outputs; ++o) sums[o].store(kNothing<Acc>, std::memory_order_relaxed);
    std::atomic<int64_t> ticket{0};
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
      for (int64_t job; (job = ticket.fetch_add(1, std::memory_order_relaxed)) < stretches * r.groups;) {
        const int64_t g = job % r.groups, first = job / r.groups * stretch;
        for (int64_t o = first; o < std::min(outputs, first + stretch); ++o) {
          add_racing(sums[o], partials[g * outputs + o]);
        }
      }
    });
    for (int64_t o = 0; o < outputs; ++o) out[o] = T(sums[o].load(std::memory_order_relaxed));
  }
};

// Of the rows that have terms, which rows names, where those are few, and input is out then; otherwise rows is null and
// count the number of all rows. position is null where r.inner is 1: source is in that order already.
struct SomeSegments : Segments {
  int64_t count;
  const int64_t* rows = nullptr;

  int64_t row(int64_t k) const { return rows ? rows[k] : k; }
};

// Sums of the source's rows that have the same index.
template <class T>
struct IndexAdd {
  using Acc = typename AccType<T>::type;
  const Reduction& r;
  const SomeSegments& s;
  const T *input, *source;   // input may be out
  T* out;
  const ScalarType type;
  TWICE_CHOICE

  // The reduction of terms first ... first + n - 1 in the order of `position`, in `groups` groups, for row v.
  Reduction segment(int64_t v, int64_t first, int64_t n, int64_t groups) const {
    Reduction part = r;
    part.outer = 1, part.terms = n, part.groups = std::min(groups, n);
    part.outer_stride = 0, part.term_stride = r.inner, part.inner_stride = 1;
    part.rows = s.position ? s.position + first : nullptr;
    part.first = uint64_t(v * r.inner);
    return part;
  }
  const T* terms(int64_t first) const { return s.position ? source : source + first; }
  INLINE const T* row(int64_t k) const { return source + (s.position ? s.position[k] : k) * r.inner; }

  // Rows are read in no order that a processor could foresee. (INLINE, or GCC takes a function that only prefetches for
  // one without effect and leaves its calls out.)
  INLINE void prefetch_row(const T* row) const {
    constexpr int64_t kMost = 512;   // bytes, after which the processor foresees the rest
    for (int64_t b = 0; b < std::min<int64_t>(kMost, r.inner * sizeof(T)); b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row) + b, 0, 2);
  }
  INLINE void prefetch(int64_t first, int64_t n) const {
    constexpr int64_t kAhead = 32;   // terms
    for (int64_t k = first + kAhead; k < std::min(first + n + kAhead, r.terms); ++k) prefetch_row(row(k));
  }

  bool few(int64_t n) const { return n <= 2 * r.groups && (n <= 1 || r.order == Order::fixed); }

  // Row v, input + the sum of n terms in short groups.
  INLINE void add_short(int64_t v, int64_t first, int64_t n) const {
    const T* const in = input + v * r.inner;
    T* const to = out + v * r.inner;
    const int64_t count = std::min(n, r.groups);
    prefetch(first, n);
    Acc sum[kWidest];
    for (int64_t at = 0; at < r.inner; at += kWidest) {
      const int width = int(std::min<int64_t>(kWidest, r.inner - at));
      add_short_groups(Terms<T>{source + at, r.inner, s.position + first}, Groups(n, count), count, nullptr, width, sum);
      for (int i = 0; i < width; ++i) to[at + i] = T(Acc(in[at + i]) + Acc(T(sum[i])));
    }
  }

  // The same of rows of one number, whose terms lie side by side, in groups of two, then of one.
  INLINE void add_few_numbers(int64_t v, int64_t first, int64_t n) const {
    const T* x = source + first;
    Acc sum = kNothing<Acc>;
    for (int64_t twos = n - r.groups; twos > 0; --twos, x += 2) sum += tree(Acc(x[0]), Acc(x[1]));
    while (x < source + first + n) sum += Acc(*x++);
    out[v] = n == 0 ? input[v] : T(Acc(input[v]) + Acc(T(sum)));
  }

  // The same of more terms, but no very long groups.
  bool some(int64_t n) const { return r.order == Order::fixed && r.groups <= kFew && n <= r.groups * kChunk; }
  INLINE void add_some_numbers(int64_t v, int64_t first, int64_t n) const {
    const Groups groups(n, r.groups);
    alignas(64) Acc sums[kFew];
    const T* const end = source + r.terms;
    if (groups.longest() <= kLanes) some_groups<kLanes, false>(source + first, groups, 0, r.groups, end, sums);
    else some_groups<0, false>(source + first, groups, 0, r.groups, end, sums);
    Acc sum = sums[0];
    for (int64_t g = 1; g < r.groups; ++g) sum += sums[g];
    out[v] = T(Acc(input[v]) + Acc(T(sum)));
  }

  // A row without terms: a call takes longer than a short one.
  INLINE void copy(int64_t v) const {
    if (input == out) return;
    typedef char Bytes __attribute__((vector_size(32), aligned(1), may_alias));
    constexpr int64_t kWide = 32 / sizeof(T);
    const T* const in = input + v * r.inner;
    T* const to = out + v * r.inner;
    int64_t i = 0;
    for (; i + kWide <= r.inner; i += kWide)
      *reinterpret_cast<Bytes*>(to + i) = *reinterpret_cast<const Bytes*>(in + i);
    for (; i < r.inner; ++i) to[i] = in[i];
  }

  // Segments from ... to - 1 but for those of very many terms.
  INLINE void add_rows_any(int64_t from, int64_t to) const {
    for (int64_t k = from; k < to; ++k) {
      const int64_t v = s.row(k), first = s.start[k], n = s.start[k + 1] - first;
      if (s.rows) prefetch_row(out + s.row(std::min(k + 8, s.count - 1)) * r.inner);
      if (s.position && n == 0) copy(v);
      else if (few(n)) s.position ? add_short(v, first, n) : add_few_numbers(v, first, n);
      else if (hot(n)) continue;
      else if (s.position && r.order == Order::fixed && n <= kRows * r.groups) add_short(v, first, n);
      else if (!s.position && some(n)) add_some_numbers(v, first, n);
      else add_row(v, first, n);
    }
  }
  TWICE(void, add_rows, (int64_t from, int64_t to), (from, to))

  bool hot(int64_t n) const { return n * r.inner >= 8 * kGrain; }

  void add_row(int64_t v, int64_t first, int64_t n) const {
    const T* const in = input + v * r.inner;
    T* const to = out + v * r.inner;
    const Reduction part = segment(v, first, n, r.groups);
    std::vector<T> sum(r.inner);
    if (r.order == Order::exact) exact_cpu(part, type, terms(first), sum.data());
    else Sum<T>(part, terms(first), sum.data()).run();
    for (int64_t i = 0; i < r.inner; ++i) to[i] = T(Acc(in[i]) + Acc(sum[i]));
  }

  // As in Sum::run, but the tickets are for the groups of all rows.
  void race() const {
    std::vector<int64_t> groups(s.count + 1, 0);   // before segment k
    for (int64_t k = 0; k < s.count; ++k) groups[k + 1] = groups[k] + std::min(r.groups, s.start[k + 1] - s.start[k]);
    std::unique_ptr<std::atomic<Acc>[]> sums(new std::atomic<Acc>[s.count * r.inner]);
    for (int64_t o = 0; o < s.count * r.inner; ++o) sums[o].store(kNothing<Acc>, std::memory_order_relaxed);
    std::atomic<int64_t> ticket{0};
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
      for (int64_t job; (job = ticket.fetch_add(1, std::memory_order_relaxed)) < groups.back();) {
        const int64_t k = std::upper_bound(groups.begin(), groups.end(), job) - groups.begin() - 1;
        const Group group = Groups(s.start[k + 1] - s.start[k], groups[k + 1] - groups[k])[job - groups[k]];
        const int64_t first = s.start[k] + group.begin;
        const auto add = [&](int64_t i, Acc term) {
          add_racing(sums[k * r.inner + i], term);
        };
        if (group.size == 1) {
          for (int64_t i = 0; i < r.inner; ++i) add(i, Acc(row(first)[i]));
          continue;
        }
        const Reduction part = segment(s.row(k), first, group.size, 1);
        Sum<T>(part, terms(first), nullptr).for_each_tile([&](const auto& p, const Acc* partial) {
          for (int w = 0; w < p.width; ++w) add(p.output + w, partial[w]);
        });
      }
    });
    for (int64_t k = 0; k < s.count; ++k)
      for (int64_t i = 0; i < r.inner; ++i) {
        const T in = input[s.row(k) * r.inner + i], sum = T(sums[k * r.inner + i].load(std::memory_order_relaxed));
        out[s.row(k) * r.inner + i] = s.start[k] == s.start[k + 1] ? in : T(Acc(in) + Acc(sum));
      }
  }

  void run() {
    if (r.order == Order::atomic) return race();
    // Rows with very many terms one after the other, each by all threads; the others shared out evenly among them.
    for (int64_t k = 0; k < s.count && hot(r.terms); ++k)
      if (const int64_t n = s.start[k + 1] - s.start[k]; hot(n) && !few(n)) add_row(s.row(k), s.start[k], n);
    const auto before = [this](int64_t work) {   // the first segment before which there is so much
      int64_t low = 0, high = s.count;
      while (low < high) {
        const int64_t k = (low + high) / 2;
        if (s.start[k] + k < work) low = k + 1;
        else high = k;
      }
      return low;
    };
    torch::stable::parallel_for(0, r.terms + s.count, std::max<int64_t>(1, kGrain / r.inner),
                                [&](int64_t first, int64_t last) { add_rows(before(first), before(last)); });
  }
};

// s says where the terms of each row are.
void add_segments(const Reduction& r, const SomeSegments& s, const Tensor& input, const Tensor& source, Tensor& out) {
  require(!s.position || r.inner > 1, "index_add: single numbers must be sorted themselves");
  for_type(input.scalar_type(), [&]<class T>(T) {
    IndexAdd<T>{r, s, static_cast<const T*>(input.const_data_ptr()), static_cast<const T*>(source.const_data_ptr()),
                static_cast<T*>(out.mutable_data_ptr()), input.scalar_type()}.run();
  });
}

// input may be out.
void add_sorted(Reduction r, const Tensor& input, const Tensor& index, const Tensor& source, Tensor& out) {
  const int64_t size = r.outer, n = r.terms = index.numel();
  SomeSegments s{{static_cast<const int64_t*>(index.const_data_ptr()), nullptr, nullptr}, size};
  const bool few = n < size / 4;   // most rows have no terms
  Tensor places = torch::stable::new_empty(index, {few ? 3 * n + 1 : size + 1 + (r.inner > 1 ? n : 0)});
  Tensor terms = source, from = input;
  int64_t* const numbers = static_cast<int64_t*>(places.mutable_data_ptr());
  if (few) {
    s.rows = numbers, s.start = numbers + n, s.position = numbers + 2 * n + 1;
    s.count = sort_few(s.index, n, size, numbers, numbers + n, numbers + 2 * n + 1);
    if (out.const_data_ptr() != input.const_data_ptr()) torch::stable::copy_(out, input);
    from = out;
  } else if (r.inner > 1) {
    sort(s.index, n, size, numbers, [](int64_t i) { return i; }, numbers + size + 1);
    s.start = numbers, s.position = numbers + size + 1;
  }
  if (r.inner == 1) {   // terms side by side are added faster
    terms = torch::stable::new_empty(source, {n});
    for_type(source.scalar_type(), [&]<class T>(T) {
      const T* const x = static_cast<const T*>(source.const_data_ptr());
      T* const to = static_cast<T*>(terms.mutable_data_ptr());
      if (few)
        for (int64_t k = 0; k < n; ++k) to[k] = x[s.position[k]];
      else
        sort(s.index, n, size, numbers, [x](int64_t i) { return x[i]; }, to), s.start = numbers;
    });
    s.position = nullptr;
  }
  add_segments(r, s, from, terms, out);
}

// Sums of numbers with the same index in the order in which they stand, where no row has more than `most`.
template <class T>
struct AsTheyCome {
  using Acc = typename AccType<T>::type;
  const T *input, *source;
  const int64_t* index;
  T* out;
  Acc* sum;         // of each row; may be out
  uint8_t* count;   // of its terms, up to most + 1
  const uint8_t most;
  TWICE_CHOICE

  void clear(int64_t from, int64_t to) const {
    std::fill(sum + from, sum + to, kNothing<Acc>);
    std::fill(count + from, count + to, uint8_t{0});
  }

  // Whether some row has more. (In variables, or the compiler reads every member anew after each store of a byte.)
  bool add(int64_t n) const {
    constexpr int64_t kAhead = 32;
    const int64_t* const at = index;
    const T* const x = source;
    Acc* const sums = sum;
    uint8_t *const counts = count, full = most;
    bool more = false;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t v = at[i];
      __builtin_prefetch(sums + at[std::min(i + kAhead, n - 1)], 1);
      const uint8_t terms = counts[v];
      sums[v] += Acc(x[i]);
      more |= terms >= full;
      counts[v] = uint8_t(terms + (terms <= full));
    }
    return more;
  }

  // Rows of no terms and of more are input's: chosen by a mask, since compilers vectorize no choice whether to add.
  INLINE void finish_any(int64_t from, int64_t to) const {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    const T* const in = input;
    const Acc* const sums = sum;
    const uint8_t *const counts = count, full = most;
    T* const o = out;
#pragma GCC ivdep
    for (int64_t v = from; v < to; ++v) {
      const Bits added = Bits(-Bits(uint8_t(counts[v] - 1) < full));
      const Bits row = std::bit_cast<Bits>(in[v]), all = std::bit_cast<Bits>(T(Acc(in[v]) + Acc(T(sums[v]))));
      o[v] = std::bit_cast<T>(Bits((all & added) | (row & ~added)));
    }
  }
  TWICE(void, finish, (int64_t from, int64_t to), (from, to))
};

// Rows of one number in fixed order, which needs no sorting where no row has more terms than groups. What the others
// have is returned, index and source, and out is input there.
std::pair<Tensor, Tensor> add_as_they_come(const Reduction& r, const Tensor& input, const Tensor& index,
                                           const Tensor& source, Tensor& out) {
  std::pair<Tensor, Tensor> left{index, source};
  for_type(input.scalar_type(), [&]<class T>(T) {
    using Acc = typename AccType<T>::type;
    const std::unique_ptr<uint8_t[]> count(new uint8_t[r.outer]);
    std::unique_ptr<Acc[]> wider;
    Acc* sum;   // in out, where that is as wide: the less memory, the more of it is in caches
    if constexpr (std::is_same_v<T, Acc>) sum = static_cast<T*>(out.mutable_data_ptr());
    else wider.reset(new Acc[r.outer]), sum = wider.get();
    const AsTheyCome<T> rows{static_cast<const T*>(input.const_data_ptr()),
                             static_cast<const T*>(source.const_data_ptr()),
                             static_cast<const int64_t*>(index.const_data_ptr()),
                             static_cast<T*>(out.mutable_data_ptr()), sum, count.get(),
                             uint8_t(std::min<int64_t>(r.groups, UINT8_MAX - 1))};
    const auto for_rows = [&](const auto& use) { torch::stable::parallel_for(0, r.outer, kGrain, use); };
    for_rows([&](int64_t from, int64_t to) { rows.clear(from, to); });
    const bool more = rows.add(r.terms);
    for_rows([&](int64_t from, int64_t to) { rows.finish(from, to); });
    std::vector<int64_t> where;
    for (int64_t i = 0; more && i < r.terms; ++i)
      if (count[rows.index[i]] > rows.most) where.push_back(i);
    const int64_t n = int64_t(where.size());
    left = {torch::stable::new_empty(index, {n}), torch::stable::new_empty(source, {n})};
    for (int64_t k = 0; k < n; ++k) {
      static_cast<int64_t*>(left.first.mutable_data_ptr())[k] = rows.index[where[k]];
      static_cast<T*>(left.second.mutable_data_ptr())[k] = rows.source[where[k]];
    }
  });
  return left;
}

// philox of ops.h.
struct Words {
  const Key key;
  const int64_t n;
  int64_t* const out;

  INLINE void draw_any(int64_t from, int64_t to) const {
    for (int64_t i = from; i < to; ++i) {
      uint32_t c[4] = {uint32_t(i), 0, key.step, key.op};
      philox4x32_10(c, uint32_t(key.seed), uint32_t(key.seed >> 32));
      for (int word = 0; word < 4; ++word) out[word * n + i] = c[word];
    }
  }

  TWICE_CHOICE
  TWICE(void, draw, (int64_t from, int64_t to), (from, to))
};

}  // namespace

void philox_cpu(const Reduction& r, Tensor& out) {
  const Words words{{r.seed, r.step, r.op}, out.size(1), static_cast<int64_t*>(out.mutable_data_ptr())};
  torch::stable::parallel_for(0, words.n, kGrain / 4, [&](int64_t from, int64_t to) { words.draw(from, to); });
}

void sum_cpu(const Reduction& r, const Tensor& x, Tensor& out) {
  if (r.order == Order::exact) return exact_cpu(r, x.scalar_type(), x.const_data_ptr(), out.mutable_data_ptr());
  for_type(x.scalar_type(), [&]<class T>(T) {
    Sum<T>(r, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr())).run();
  });
}

void index_add_cpu(const Reduction& r, const Tensor& input, const Tensor& index, const Tensor& source,
                   const Tensor* segments, Tensor& out) {
  if (segments) {
    const int64_t* const start = static_cast<const int64_t*>(segments->const_data_ptr());
    add_segments(r, {{static_cast<const int64_t*>(index.const_data_ptr()), start, start + r.outer + 1}, r.outer}, input,
                 source, out);
  } else if (r.inner == 1 && r.order == Order::fixed && 2 * r.terms / r.outer <= r.groups) {
    const auto [index_left, source_left] = add_as_they_come(r, input, index, source, out);
    if (index_left.numel() > 0) add_sorted(r, out, index_left, source_left, out);
  } else {
    add_sorted(r, input, index, source, out);
  }
}

}  // namespace ordered
