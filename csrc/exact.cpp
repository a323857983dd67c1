// The order "exact" on the CPU. Nearly every sum is settled by doubles with a bound on their error: where both ends of
// the interval that must hold the sum round to the same number, that number is the result. The others are added up
// without any error (exact.h), eight lanes at a time.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <mutex>
#include <vector>

#include "exact.h"
#include "ops.h"
#include "twice.h"

namespace ordered {
namespace {

using torch::headeronly::BFloat16;

constexpr int kWidth = 8;                 // lanes: of one output's terms, or of neighbouring outputs
constexpr int kVectors = 2;               // of four doubles
constexpr int64_t kBytes = 2048;          // of neighbouring outputs that are read side by side
constexpr int kRowsOfBlock = 128;         // whose sum a double holds with little error
constexpr int64_t kBrief = kWidth * kRowsOfBlock;   // terms of an output that are added up at once
constexpr int kRowsAtOnce = 32;           // of one output whose terms lie side by side
constexpr int kStreams = 8;               // rows that are read together
constexpr int kSide = 32;                 // sums that are rounded side by side
constexpr int kTies = 32;                 // terms up to which their sum is likely to be a tie
constexpr int64_t kGrain = 1 << 15;       // terms below which a second thread does not pay

typedef double Doubles __attribute__((vector_size(32)));
typedef int64_t Bits __attribute__((vector_size(32)));
typedef int32_t Words __attribute__((vector_size(32)));
typedef uint32_t Unsigned __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

// As they lie in memory.
typedef double FourDoubles __attribute__((vector_size(32), aligned(8), may_alias));
typedef int32_t EightWords __attribute__((vector_size(32), aligned(2), may_alias));
typedef int32_t FourWords __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint16_t SixteenHalves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t EightHalves __attribute__((vector_size(16), aligned(2), may_alias));

INLINE Doubles load(const double* x) { return *reinterpret_cast<const FourDoubles*>(x); }
INLINE Doubles to_doubles(FourFloats x) { return Doubles{x[0], x[1], x[2], x[3]}; }   // one instruction of GCC 12's
INLINE Doubles load(const float* x) { return to_doubles(*reinterpret_cast<const FourFloats*>(x)); }

template <int UPPER>
INLINE FourWords half(Words x) {
  return __builtin_shufflevector(x, x, 4 * UPPER, 4 * UPPER + 1, 4 * UPPER + 2, 4 * UPPER + 3);
}
template <int UPPER>
INLINE EightHalves half(SixteenHalves x) {
  constexpr int k = 8 * UPPER;
  return __builtin_shufflevector(x, x, k, k + 1, k + 2, k + 3, k + 4, k + 5, k + 6, k + 7);
}

// The upper bits of |x|, which grow with it: all of a float's, half of a double's (in every second word).
template <class A>
INLINE Words size_of(const A* x) {
  return *reinterpret_cast<const EightWords*>(x) & 0x7FFFFFFF;
}

template <class V>
INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

// Eight terms to two vectors of sums.
INLINE void add_eight(const float* x, Doubles& lower, Doubles& upper) { lower += load(x), upper += load(x + 4); }
INLINE void add_eight(const BFloat16* x, Doubles& lower, Doubles& upper) {
  const EightHalves zero = {}, half = *reinterpret_cast<const EightHalves*>(x);   // upper halves of floats
  lower += to_doubles(FourFloats(__builtin_shufflevector(zero, half, 0, 8, 1, 9, 2, 10, 3, 11)));
  upper += to_doubles(FourFloats(__builtin_shufflevector(zero, half, 4, 12, 5, 13, 6, 14, 7, 15)));
}
INLINE void add_eight(const Half* x, Doubles& lower, Doubles& upper) {
  if (kF16C) {
    lower += to_doubles(load_four(x)), upper += to_doubles(load_four(x + 4));
  } else {
    const FourFloats low = {x[0], x[1], x[2], x[3]}, high = {x[4], x[5], x[6], x[7]};
    lower += to_doubles(low), upper += to_doubles(high);
  }
}

// The sizes of terms, eight side by side (of doubles four): see Running. LEAST: the least too.
template <class T, bool LEAST = false>
struct Sizes {
  static constexpr bool kFloat = std::is_same_v<T, float>;
  Words largest = {};
  Unsigned smallest = ~Unsigned{};   // floats' less one, so that zero is not the smallest
  INLINE void note(const T* x) {
    const Words size = size_of(x);
    largest = larger(largest, size);
    if (LEAST) smallest = smaller(smallest, Unsigned(size - int(kFloat)));
  }
  INLINE Words most() const { return largest; }
  INLINE Words least() const { return LEAST ? Words(smallest >> (kFloat ? 23 : 20)) : Words{}; }
};
template <bool LEAST>
struct Sizes<BFloat16, LEAST> {
  EightHalves largest = {}, smallest = ~EightHalves{};   // that less one, so that zero is not the smallest
  INLINE void note(const BFloat16* x) {
    const EightHalves size = *reinterpret_cast<const EightHalves*>(x) & 0x7FFF;
    largest = larger(largest, size);
    if (LEAST) smallest = smaller(smallest, size - 1);
  }
  INLINE Words most() const { return __builtin_convertvector(largest, Words) << 16; }
  INLINE Words least() const { return LEAST ? __builtin_convertvector(smallest, Words) >> 7 : Words{}; }
};

template <bool LEAST>
struct Sizes<Half, LEAST> {   // of which Rounding needs none
  INLINE void note(const Half*) {}
  INLINE Words most() const { return Words{}; }
  INLINE Words least() const { return Words{}; }
};

// Sums of sixteen neighbours of a half type in floats, which take half of doubles' time, and whether floats hold them.
template <class T>
struct Sixteen {
  static constexpr bool kBrain = std::is_same_v<T, BFloat16>;
  static constexpr int kDigits = kBrain ? 8 : 11;
  static constexpr int16_t kLimit = kBrain ? 0x7D00 : 0x7C00;   // from which on 32 terms overflow, or T's infinity

  Floats sums[2] = {-Floats{}, -Floats{}};   // of the even ones and of the odd ones; of float16s as they lie
  SixteenHalves largest = {}, smallest = ~SixteenHalves{};   // |term|, and that less one, so that zero is not the smallest

  INLINE void add(const T* x) {
    if constexpr (kBrain) {
      const Words pairs = *reinterpret_cast<const EightWords*>(x);
      sums[0] += Floats(pairs << 16), sums[1] += Floats(pairs & int32_t(0xFFFF0000));
    } else {
      for (int i = 0; i < 2; ++i)
        sums[i] += __builtin_shufflevector(load_four(x + 8 * i), load_four(x + 8 * i + 4), 0, 1, 2, 3, 4, 5, 6, 7);
    }
    const SixteenHalves size = *reinterpret_cast<const SixteenHalves*>(x) & 0x7FFF;
    largest = larger(largest, size), smallest = smaller(smallest, size - 1);
  }

  // All digits from the first of the largest possible sum to the last of the least term are a float's.
  INLINE bool exact(int64_t terms) const {
    typedef int16_t Signed __attribute__((vector_size(32)));
    const int room = 24 - kDigits - std::bit_width(uint64_t(terms - 1));
    const Signed range = Signed((largest >> (kDigits - 1)) - (smallest >> (kDigits - 1)));
    const Bits wrong = Bits((range > int16_t(room)) | (Signed(largest) >= kLimit));
    return (wrong[0] | wrong[1] | wrong[2] | wrong[3]) == 0;
  }

  template <int I>
  INLINE FourFloats four() const {   // the neighbours from 4 I on
    if constexpr (kBrain) return __builtin_shufflevector(sums[0], sums[1], 2 * I, 2 * I + 8, 2 * I + 1, 2 * I + 9);
    else return __builtin_shufflevector(sums[I / 2], sums[I / 2], I % 2 * 4, I % 2 * 4 + 1, I % 2 * 4 + 2, I % 2 * 4 + 3);
  }

  INLINE void round(T* out) const {   // to nearest, ties to even
    if constexpr (kBrain) {
      const auto rounded = [](Floats sum) __attribute__((always_inline)) {
        const Words bits = Words(sum);
        return bits + 0x7FFF + (bits >> 16 & 1);
      };
      const Words even = Words(Unsigned(rounded(sums[0])) >> 16), odd = rounded(sums[1]) & int32_t(0xFFFF0000);
      *reinterpret_cast<EightWords*>(out) = even | odd;
    } else {
      store_four(four<0>(), out), store_four(four<1>(), out + 4);
      store_four(four<2>(), out + 8), store_four(four<3>(), out + 12);
    }
  }
};

// ------------------------------------------------------------------------------------ sums with a bound on their error

constexpr int kNone = 0xFFF;   // more than any exponent

// The sum of terms is nearly hi + lo. most: the upper 32 bits of the largest |term|.
struct Running {
  double hi = -0.0, lo = 0;
  int32_t most = 0;

  INLINE void add(const Running& other) {
    lo += add_to(hi, other.hi) + other.lo;
    most = std::max(most, other.most);
  }
};

// Of all lanes of these vectors' sums, which are nearly hi + lo.
INLINE Running sum_of_lanes(const Doubles* hi, const Doubles* lo, int vectors) {
  Doubles sum = hi[0], rest = lo[0];
  for (int i = 1; i < vectors; ++i) rest += add_to(sum, hi[i]) + lo[i];
  Running all;
  for (int l = 0; l < 4; ++l) all.add({sum[l], rest[l]});
  return all;
}

// Sums of kSide outputs, see Running: where they are, and a place for them. least: at most the exponent, in the bits of
// `most`, of any term but zero.
struct Side {
  const double *hi, *lo;
  const int32_t *most, *least;
};
struct Place {
  alignas(32) double hi[kSide], lo[kSide];
  alignas(32) int32_t most[kSide], least[kSide];
  INLINE void set(int i, const Running& sum) {
    hi[i] = sum.hi, lo[i] = sum.lo, most[i] = sum.most, least[i] = 0;
  }
  INLINE operator Side() const { return {hi, lo, most, least}; }
};

// Sums of neighbouring lanes over the rows of a block and over all blocks.
template <class A>
struct Lanes {
  static constexpr bool kFloat = std::is_same_v<A, float>;
  static constexpr int kEach = 32 / sizeof(A), kMost = kBytes / sizeof(A);   // lanes of a vector; of a row
  static constexpr int kFours = kEach / 4;

  Doubles sum[kMost / 4], errors[kFloat ? 1 : kMost / 4];   // of the block; floats' sums have hardly any error
  Doubles hi[kMost / 4], lo[kMost / 4];
  Words most[kMost / kEach];
  int64_t exponent;   // of the largest term that add_at_once has seen, in its place in a double

  INLINE void clear(int vectors) {
    for (int i = 0; i < vectors * kFours; ++i) sum[i] = -Doubles{};
    for (int v = 0; v < vectors; ++v) most[v] = Words{};
    for (int v = 0; v < vectors && !kFloat; ++v) errors[v] = Doubles{};
    exponent = 0;
  }

  // row(k), k < ROWS. ahead: so many numbers after a row stands one that is added next, elsewhere in memory, where the
  // processor would not look ahead; or 0.
  template <int ROWS, class T, class Row>
  INLINE void add(const Row& row, int vectors, int64_t ahead) {
    for (int v = 0; v < vectors; ++v) {
      if (ahead && v * kEach * sizeof(T) % 64 == 0)
        for (int k = 0; k < ROWS; ++k) __builtin_prefetch(row(k) + v * kEach + ahead);
      if constexpr (std::is_same_v<T, BFloat16> && ROWS >= kStreams) {
        if (v % 2 == 0 && v + 2 <= vectors && add_sixteen<ROWS>(row, v)) {
          ++v;
          continue;
        }
      }
      Doubles s[2] = {sum[v * kFours], kFloat ? sum[v * kFours + 1] : errors[v]};
      Sizes<T> sizes;
      for (int k = 0; k < ROWS; ++k) {
        const T* x = row(k) + v * kEach;
        if constexpr (kFloat) add_eight(x, s[0], s[1]);
        else s[1] += add_to(s[0], load(x));
        sizes.note(x);
      }
      sum[v * kFours] = s[0], (kFloat ? sum[v * kFours + 1] : errors[v]) = s[1];
      most[v] = larger(most[v], sizes.most());
    }
  }

  // Two vectors of these rows, if floats hold what they add up to.
  template <int ROWS, class Row>
  INLINE bool add_sixteen(const Row& row, int v) {
    Sixteen<BFloat16> sums;
    for (int k = 0; k < ROWS; ++k) sums.add(row(k) + v * kEach);
    if (!sums.exact(ROWS)) return false;
    Doubles* const to = sum + v * kFours;
    to[0] += to_doubles(sums.four<0>()), to[1] += to_doubles(sums.four<1>());
    to[2] += to_doubles(sums.four<2>()), to[3] += to_doubles(sums.four<3>());
    most[v] = larger(most[v], __builtin_convertvector(half<0>(sums.largest), Words) << 16);
    most[v + 1] = larger(most[v + 1], __builtin_convertvector(half<1>(sums.largest), Words) << 16);
    return true;
  }

  // The same of kRowsAtOnce rows of four vectors, x, which lie side by side, in registers.
  template <class T>
  INLINE bool add_at_once(const T* x) {
    Doubles s[8];
    Sizes<T> sizes;
    std::copy_n(sum, 8, s);
    for (int row = 0; row < kRowsAtOnce; ++row)
      for (int v = 0; v < 4; v += 2, x += 16) {
        add_eight(x, s[2 * v], s[2 * v + 1]), add_eight(x + 8, s[2 * v + 2], s[2 * v + 3]);
        sizes.note(x), sizes.note(x + 8);
      }
    std::copy_n(s, 8, sum);
    most[0] = larger(most[0], sizes.most());
    return true;
  }

  INLINE bool add_at_once(const BFloat16* x) {   // in memory: these are few additions of doubles
    constexpr int kRows = kRowsAtOnce / 2, kWide = 4 * kEach;
    for (int half = 0; half < 2; ++half, x += kRows * kWide)
      add<kRows, BFloat16>([x](int k) __attribute__((always_inline)) { return x + k * kWide; }, 4, 0);
    return true;
  }

  // Of doubles, with half the additions: Dekker's two-sum, which wants sums that are larger than the terms, so they
  // start at sigma. Or false: the terms are too small or too large.
  INLINE bool add_at_once(const double* x) {
    constexpr int kFour = 4;   // vectors of a row
    constexpr int64_t kExponent = int64_t{0x7FF} << 52, kUp = int64_t{7} << 52;   // sigma >= 2 kRowsAtOnce |term|
    for (;;) {
      const Doubles sigma = double_of(exponent + kUp) - Doubles{};
      Doubles s[kFour] = {sigma, sigma, sigma, sigma}, e[kFour] = {};
      Words large = {};
      for (int row = 0; row < kRowsAtOnce; ++row)
        for (int v = 0; v < kFour; ++v) {
          const double* const at = x + (row * kFour + v) * 4;
          const Doubles term = load(at), before = s[v];
          s[v] += term;
          e[v] += term - (s[v] - before);
          large = larger(large, size_of(at));
        }
      const Bits all = Bits(large) & kExponent;
      const int64_t largest = std::max(std::max(all[0], all[1]), std::max(all[2], all[3]));
      if (largest >= kExponent - 2 * kUp) return false;
      if (largest <= exponent) {
        if (exponent == 0) return false;   // what may be negative zeros
        for (int v = 0; v < kFour; ++v) errors[v] += add_to(sum[v], s[v] - sigma) + e[v];
        most[0] = larger(most[0], large);
        return true;
      }
      exponent = largest;   // sigma was too small: once more
    }
  }

  INLINE void end_block(int vectors, bool first) {
    for (int i = 0; i < vectors * kFours; ++i) {
      const Doubles rest = kFloat ? Doubles{} : errors[i];
      if (first) hi[i] = sum[i], lo[i] = rest;
      else lo[i] += add_to(hi[i], sum[i]) + rest;
      sum[i] = -Doubles{};
      if (!kFloat) errors[i] = Doubles{};
    }
  }

  // All lanes' sums to lane 0.
  INLINE void merge(int vectors) {
    Running all = sum_of_lanes(hi, lo, vectors * kFours);
    for (int v = 1; v < vectors; ++v) most[0] = larger(most[0], most[v]);
    for (int l = 0; l < kEach; ++l) all.most = std::max(all.most, (*this)[l].most);
    hi[0][0] = all.hi, lo[0][0] = all.lo, most[0][kFloat ? 0 : 1] = all.most;
  }

  INLINE Running operator[](int l) const {
    const int word = kFloat ? l : 2 * l + 1;
    return {reinterpret_cast<const double*>(hi)[l], reinterpret_cast<const double*>(lo)[l],
            reinterpret_cast<const int32_t*>(most)[word]};
  }
  INLINE Side from(int l) const {
    static_assert(kFloat);
    static constexpr int32_t zeros[kSide] = {};
    return {reinterpret_cast<const double*>(hi) + l, reinterpret_cast<const double*>(lo) + l,
            reinterpret_cast<const int32_t*>(most) + l, zeros};
  }
};

// Rounds sums of n terms, and says whether the exact sums round to the same for certain.
//
// A double rounds by at most u = 2^-53 of the result. A block's k-th row is added to a sum of at most k most, so that
// all of its rows' additions are off by u depth n most; for doubles those errors are added up, with errors of their own
// of u^2 2^13 n most (depth^2 would do, but for add_at_once: 32 sums of up to 192 most, and four of those). Adding a
// lane's blocks, then the lanes and the pieces (see Cut), at most `blocks` additions one after the other, is off by
// u^2 blocks^2 n most (Ogita, Rump, Oishi, "Accurate Sum and Dot Product", SIAM J. Sci. Comput. 26 (2005), Section 4).
// The bound is twice all that, which covers the roundings down here.
//
// Few floats mostly, and more bfloat16s, have sums that a double holds: all digits from the first of the largest possible
// sum, below n 2^(exponent + 1), to the last of the least term. Then no addition rounds. (Such sums are often ties.) Of
// few doubles hi and lo hold them, if that is true of the errors, which add up to less than n^2 2^(exponent + 1) u.
//
// float16s are multiples of 2^-24 and less than 2^16. No block's sum rounds, and the errors of adding those, n / 128 at
// most, each up to n 2^16 u, add up to less than 2^29 and so without rounding, where n is below 2^36.
template <class T>
struct Rounding {
  using A = typename AccType<T>::type;
  static constexpr bool kBrain = std::is_same_v<T, BFloat16>;
  static constexpr int kDigits = kBrain ? 8 : std::is_same_v<T, float> ? 24 : 11;
  static constexpr int kExponent = std::is_same_v<T, double> ? 20 : 23;   // where it begins in 32 bits
  double share;   // of the largest term, that the sum may be off by
  int room;       // between the exponents of the largest and the least term of a sum that is exact
  bool few;       // float16s, so that nothing rounds

  INLINE Rounding(int64_t n, int64_t lanes) {   // that share the terms of an output
    const double depth = kRowsOfBlock / 2 + 1;
    const double pieces = 4.0 * double(torch::stable::get_num_threads());
    const double blocks = double(n) / double(kRowsOfBlock * lanes) + pieces + 128;
    const double of_blocks = std::is_same_v<A, float> ? depth * 0x1p-52 : 0x1p13 * 0x1p-105;
    share = double(n) * (of_blocks + blocks * blocks * 0x1p-105);
    room = 53 - kDigits - std::bit_width(uint64_t(n));
    if (std::is_same_v<T, double>) room = n <= kTies ? 52 - 2 * std::bit_width(uint64_t(n)) : -1 - kNone;   // never
    few = n < int64_t{1} << 36;
  }

  // sum + rest of float16s: sum, or if rest is not 0 that neighbour of the exact sum whose last bit is one (see narrow).
  INLINE static Doubles to_odd(Doubles sum, Doubles rest) {
    const Bits any = (rest < 0) | (rest > 0);
    return Doubles((Bits(sum) + (((rest < 0) == (sum > 0)) & any)) | (any & 1));
  }

  // To a half type's digits, to nearest, ties to even, in the bits of a double: right from kNormal on, and for zero.
  static constexpr double kNormal = kBrain ? 0x1p-126 : 0x1p-14;
  INLINE static Doubles cut(Doubles x) {
    typedef uint64_t Raw __attribute__((vector_size(32)));
    constexpr int kCut = 53 - kDigits;
    const Raw bits = Raw(x);
    return Doubles((bits + (bits >> kCut & 1) + (uint64_t{1} << (kCut - 1)) - 1) >> kCut << kCut);
  }
  INLINE static void store_eight(FourFloats x, FourFloats y, T* out) {   // what has been cut: T holds it, or it overflows
    const Words bits = Words(__builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7)), size = bits & INT32_MAX;
    const Words half = larger(smaller((size >> 13) - (112 << 10), Words{} + 0x7C00), Words{}) | (bits >> 16 & 0x8000);
    *reinterpret_cast<EightHalves*>(out) = __builtin_convertvector(kBrain ? bits >> 16 : half, EightHalves);
  }

  INLINE static Doubles size(Doubles x) { return Doubles(Bits(x) & INT64_MAX); }
  INLINE static bool every(Bits yes) { return (yes[0] & yes[1] & yes[2] & yes[3]) == -1; }

  // Eight sums of few terms, sum + errors, rounded to out; or false, unless they are certain at a glance.
  INLINE bool eight(const Doubles* sum, const Doubles* errors, Words most, Words least, T* out) const {
    constexpr bool kDouble = std::is_same_v<T, double>, kHalf = std::is_same_v<T, Half>;
    constexpr int kOverflow = 0x7FF - 6;   // of a sum of kTies
    Bits sure = ~Bits{};
    if constexpr (!kHalf) sure = Bits((most >> kExponent) - least <= room);
    if constexpr (kDouble) sure &= Bits(most >> kExponent < kOverflow);
    FourFloats floats[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kDouble) {
        const Doubles whole = errors[v] == 0 ? sum[v] : sum[v] + errors[v];   // -0.0 + 0 is not -0.0
        *reinterpret_cast<FourDoubles*>(out + 4 * v) = whole;
      } else {
        const Doubles near = std::is_same_v<T, A> ? sum[v] : cut(sum[v]);
        floats[v] = __builtin_convertvector(near, FourFloats);
        if constexpr (!std::is_same_v<T, A>) sure &= (sum[v] == sum[v]) & ((size(near) >= kNormal) | (near == 0));
      }
    }
    if constexpr (std::is_same_v<T, float>)
      for (int v = 0; v < kVectors; ++v) reinterpret_cast<FourFloats*>(out)[v] = floats[v];   // std::copy_n would align
    else if constexpr (!kDouble)
      store_eight(floats[0], floats[1], out);
    return every(sure);
  }

  // Each of kSide sums rounded to out, and whether that is the exact sum's rounding for certain (~0, never with NaN or an
  // infinite sum of doubles) or not (0).
  INLINE void operator()(const Side& sums, T* out, int32_t* certain) const {
    FourFloats floats[kSide / 4];   // half types'
    Bits all = ~Bits{};
    for (int i = 0; i < kSide; i += 4) {
      const auto words = [i](const int32_t* x) __attribute__((always_inline)) {
        return *reinterpret_cast<const FourWords*>(x + i);
      };
      Doubles sum = load(sums.hi + i), largest;
      const Doubles rest = add_to(sum, load(sums.lo + i));
      const FourWords most = words(sums.most);
      if constexpr (std::is_same_v<T, double>) largest = Doubles((__builtin_convertvector(most, Bits) + 1) << 32);
      else largest = to_doubles(FourFloats(most));
      const Bits holds = __builtin_convertvector((most >> kExponent) - words(sums.least) <= room, Bits);
      const Doubles bound = Doubles(Bits(largest * share) & ~holds);
      if constexpr (std::is_same_v<T, A>) {
        typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
        const Four low = __builtin_convertvector(sum + (rest - bound), Four);
        const Four high = __builtin_convertvector(sum + (rest + bound), Four);
        *reinterpret_cast<Four*>(out + i) = low;
        *reinterpret_cast<FourWords*>(certain + i) = __builtin_convertvector((low == high) & (low != 0), FourWords);
      } else {
        const Doubles low = kBrain ? sum + (rest - bound) : to_odd(sum, rest), near = cut(low);
        const Bits sure = (low == low) & (size(near) >= kNormal) &
                          (kBrain ? near == cut(sum + (rest + bound)) : (rest == rest) & -int64_t(few));
        floats[i / 4] = __builtin_convertvector(near, FourFloats);
        *reinterpret_cast<FourWords*>(certain + i) = __builtin_convertvector(sure, FourWords);
        all &= sure;
      }
    }
    if constexpr (std::is_same_v<T, A>) return;
    for (int i = 0; i < kSide / 4; i += 2) store_eight(floats[i], floats[i + 1], out + 4 * i);
    for (int i = 0; i < kSide && !every(all); ++i)
      if (!certain[i]) round(sums, i, out, certain);
  }
  INLINE void round(const Side& sums, int i, T* out, int32_t* certain) const {   // the same of one sum to any half
    double sum = sums.hi[i];
    const double rest = add_to(sum, sums.lo[i]), bound = double(std::bit_cast<float>(sums.most[i])) * share;
    if constexpr (kBrain) {
      const T low = narrow<T>(sum + (rest - bound)), high = narrow<T>(sum + (rest + bound));
      out[i] = low;
      certain[i] = -(int(A(low) == A(high)) & int(A(low) != 0));
    } else {
      out[i] = narrow<T>(to_odd(Doubles{sum}, Doubles{rest})[0]);
      certain[i] = -(int(few) & int(rest == rest) & int(sum != 0));
    }
  }

  // Zeros add up to a negative one if all of them are, as hi was at the start.
  INLINE bool zero(const Side& sums, int i, T& out) const {
    if ((std::is_same_v<T, Half> ? !few : sums.most[i] != 0) || sums.hi[i] != 0 || sums.lo[i] != 0) return false;
    out = T(float(sums.hi[i]));
    return true;
  }
};

// ---------------------------------------------------------------------------------------------- sums without any error

// What the lanes of at most kSplit rows add up to: sum + rest exactly, if the exponent is below kHuge, but for what the
// split left over.
struct Pieces {
  int exponent[kWidth];   // of the largest term, see sigma_for
  double sum[kWidth], rest[kWidth];
  bool left[kWidth];
};

INLINE void largest(const float* x, int rows, Pieces& pieces) {
  Words most = {};
  for (int row = 0; row < rows; ++row, x += kWidth) most = larger(most, size_of(x));
  for (int l = 0; l < kWidth; ++l) {
    const int exponent = std::max(most[l] >> 23, 1);
    pieces.exponent[l] = exponent == 0xFF ? kHuge : exponent - 127 + 1023;
  }
}

INLINE void largest(const double* x, int rows, Pieces& pieces) {
  Words most[kVectors] = {};   // in the upper word of a double; what the lower ones hold is not used
  for (int row = 0; row < rows; ++row, x += kWidth)
    for (int v = 0; v < kVectors; ++v) most[v] = larger(most[v], size_of(x + 4 * v));
  for (int l = 0; l < kWidth; ++l) pieces.exponent[l] = std::max(most[l / 4][2 * (l % 4) + 1] >> 20, 1);
}

// `one`: the lanes are terms of one output, and what they add up to stands in lane 0.
template <class A>
INLINE void split_rows(const A* x, int rows, bool one, Pieces& pieces) {
  largest(x, rows, pieces);
  if (one) pieces.exponent[0] = *std::max_element(pieces.exponent, pieces.exponent + kWidth);
  Doubles first[kVectors] = {}, second[kVectors], sum[kVectors] = {}, rest[kVectors] = {};
  Bits left[kVectors] = {};
  for (int l = 0; l < kWidth; ++l) first[l / 4][l % 4] = sigma_for(pieces.exponent[one ? 0 : l]);
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
    pieces.sum[l] = sum[l / 4][l % 4], pieces.rest[l] = rest[l / 4][l % 4];
    pieces.left[l] = left[l / 4][l % 4] != 0;
  }
  if (one)
    for (int l = 1; l < kWidth; ++l)
      pieces.sum[0] += pieces.sum[l], pieces.rest[0] += pieces.rest[l], pieces.left[0] |= pieces.left[l];
}

// Lane l, n terms of which every `every`-th is its own, to an exact sum.
template <class A>
void add_lane(const Pieces& pieces, int64_t l, const A* x, int64_t n, int64_t every, Exact& exact) {
  if (pieces.exponent[l] >= kHuge) {
    for (int64_t i = 0; i < n; ++i) exact.add(x[i * every]);
    return;
  }
  if (pieces.sum[l] != 0) exact.add(pieces.sum[l]);
  if (pieces.rest[l] != 0) exact.add(pieces.rest[l]);
  for (int64_t i = 0; i < n && pieces.left[l]; ++i) {
    double left = x[i * every];
    split(left, sigma_for(pieces.exponent[l])), split(left, sigma_for(pieces.exponent[l]) * kSecond);
    if (left != 0) exact.add(left);
  }
  for (int64_t i = 0; i < n && !(exact.seen & Exact::kNotMinusZero); ++i) exact.note(x[i * every]);
}

template <class T>
struct ExactSum {
  using A = typename AccType<T>::type;
  static constexpr bool kBrain = std::is_same_v<T, BFloat16>;
  const Reduction& r;
  const T* x;
  T* out;
  const bool across = r.inner_stride == 1 && r.inner > 1;                             // lanes are neighbouring outputs
  const bool brief = !across && r.terms <= kBrief;                                    // few terms of one output
  const int width = across ? int(std::min<int64_t>(r.inner, kBytes / sizeof(A))) : 1;   // outputs of a tile
  const int vectors = across ? (width + Lanes<A>::kEach - 1) / Lanes<A>::kEach : 4;
  const int lanes = brief ? kWidth : vectors * Lanes<A>::kEach;
  const int64_t tiles = (r.inner + width - 1) / width;   // in one row of `inner` outputs
  const int64_t per_row = across ? 1 : lanes;            // terms of an output in a row of lanes
  const Rounding<T> settled{r.terms, per_row};
  TWICE_CHOICE
  mutable std::mutex mutex = {};
  struct Strip {
    int64_t output;   // the first of up to kWidth neighbours
    uint8_t open;     // bit l: the next but l is not settled
    bool operator[](int l) const { return open >> l & 1; }
  };
  mutable std::vector<Strip> open = {};

  const T* terms_of(int64_t output) const { return x + r.first_term(output); }
  int here(int64_t output, int most) const {
    return across ? int(std::min<int64_t>(most, r.inner - output % r.inner)) : 1;
  }
  const T* term(const T* first, int64_t t) const { return first + (r.rows ? r.rows[t] : t) * r.term_stride; }

  // Terms begin ... end - 1 of the outputs from `output` on, to `to` or straight to the result.
  INLINE void add_tile_any(int64_t output, int64_t begin, int64_t end, Lanes<A>& sums, Running* to) const {
    const int outputs = here(output, width);
    const T* first = terms_of(output);
    const int64_t rows = (end - begin + per_row - 1) / per_row, step = per_row * r.term_stride;
    const bool straight = !r.rows && (across || r.term_stride == 1);   // rows as they lie
    T buffer[kStreams][kBytes / sizeof(A)];
    sums.clear(vectors);
    for (int64_t row = 0; row < rows;) {
      const int64_t left = std::min(kRowsOfBlock - row % kRowsOfBlock, rows - row);
      const int64_t t = begin + row * per_row;
      int some = left >= kStreams ? kStreams : 1;
      const auto add_at_once = [&]() __attribute__((always_inline)) {
        return straight && !across && left >= kRowsAtOnce && t + kRowsAtOnce * lanes <= end &&
               sums.add_at_once(first + t);
      };
      const auto add = [&](const T* const* at) __attribute__((always_inline)) {
        const auto row_at = [at](int k) __attribute__((always_inline)) { return at[k]; };
        const int64_t ahead = across && !r.rows && row + 2 * some <= rows ? some * step : 0;
        if (some == 1) sums.template add<1, T>(row_at, vectors, 0);
        else sums.template add<kStreams, T>(row_at, vectors, ahead);
      };
      if (add_at_once()) {
        some = kRowsAtOnce;
      } else if (straight && (across ? outputs == lanes : t + some * lanes <= end)) {
        const T* at[kStreams];
        for (int k = 0; k < some; ++k) at[k] = first + t * r.term_stride + k * step;
        add(at);
      } else {
        const T* at[kStreams];
        for (int64_t k = 0, from = t; k < some; ++k, from += per_row)
          at[k] = lay_out(term(first, from), across ? outputs : int(std::min(per_row, end - from)), buffer[k]);
        add(at);
      }
      row += some;
      if (row % kRowsOfBlock == 0 || row == rows) sums.end_block(vectors, row <= kRowsOfBlock);
    }
    if (!across) sums.merge(vectors);
    if (to)
      for (int w = 0; w < outputs; ++w) to[w] = sums[w];
    else
      settle(output, sums);
  }

  // The same for all terms of kSide outputs, which are brief: a block of rows at most, with nothing to merge.
  INLINE void add_side_any(int64_t output) const { r.terms > kTies ? add_side<false>(output) : add_side<true>(output); }
  template <bool LEAST>
  INLINE void add_side(int64_t output) const {
    const int64_t terms = r.terms, stride = r.term_stride, last = r.outputs() - 1;   // here no store can change them
    const int64_t next = r.inner == 1 ? std::max<int64_t>(0, r.outer_stride) : 0;    // output, after so many terms
    const int outputs = int(std::min<int64_t>(kSide, last + 1 - output));
    constexpr int kEach = Lanes<A>::kEach;
    Place sums = {};
    for (int w = 0; w < outputs; w += 4) {   // four at a time, whose lanes are then added up side by side
      Doubles hi[4], lo[4];
      alignas(16) FourWords most[4], least[4];
      for (int o = 0; o < 4; ++o) {
        const int64_t one = output + std::min(w + o, outputs - 1);
        const T* const first = terms_of(one);
        const int64_t readable = stride == 1 ? terms + (one < last ? next : 0) : 0;
        Doubles sum[kVectors], errors[kVectors] = {};   // hardly any of floats
        Sizes<T, LEAST> sizes;
        for (Doubles& s : sum) s = -Doubles{};
        for (int64_t t = 0; t < terms; t += kWidth) {
          T buffer[kWidth];
          const int some = int(std::min<int64_t>(kWidth, terms - t));
          const T* const x = eight(first + t * stride, some, stride, t + kWidth <= readable, buffer);
          if constexpr (std::is_same_v<A, float>) add_eight(x, sum[0], sum[1]);
          else
            for (int v = 0; v < kVectors; ++v) errors[v] += add_to(sum[v], load(x + 4 * v));
          for (int l = 0; l < kWidth; l += kEach) sizes.note(x + l);
        }
        hi[o] = sum[0], lo[o] = errors[0] + (add_to(hi[o], sum[1]) + errors[1]);
        most[o] = larger(half<0>(sizes.most()), half<1>(sizes.most()));
        least[o] = smaller(half<0>(sizes.least()), half<1>(sizes.least()));
      }
      transpose_four(hi), transpose_four(lo), transpose_four(most), transpose_four(least);
      for (int l = 1; l < 4; ++l) lo[0] += add_to(hi[0], hi[l]) + lo[l];
      constexpr int kWords = 8 / kEach;   // of Words for a lane, of which the last has the upper bits
      for (int l = kWords - 1; l < 4; l += kWords) {
        most[kWords - 1] = larger(most[kWords - 1], most[l]), least[kWords - 1] = smaller(least[kWords - 1], least[l]);
      }
      *reinterpret_cast<FourDoubles*>(sums.hi + w) = hi[0], *reinterpret_cast<FourDoubles*>(sums.lo + w) = lo[0];
      *reinterpret_cast<FourWords*>(sums.most + w) = most[kWords - 1];
      *reinterpret_cast<FourWords*>(sums.least + w) = least[kWords - 1];
    }
    settle(output, outputs, sums);
  }

  // Sixteen neighbours' sums of all terms, if floats hold them.
  INLINE bool add_sixteen(const T* first, T* to) const {
    Sixteen<T> sums;
    for (int64_t t = 0; t < r.terms; ++t) sums.add(term(first, t));
    if (!sums.exact(r.terms)) return false;
    sums.round(to);
    return true;
  }

  // The same of kSide neighbours, or of those up to the end of `inner`.
  INLINE void add_columns_any(int64_t output) const {
    const T* const first = terms_of(output);
    const int outputs = here(output, kSide);
    constexpr int kEach = Lanes<A>::kEach;
    for (int w = 0; w < outputs; w += kWidth) {
      if constexpr (sizeof(T) == 2) {
        if ((kBrain || kF16C) && w % 16 == 0 && w + 16 <= outputs && add_sixteen(first + w, out + output + w)) {
          w += kWidth;
          continue;
        }
      }
      const int some = std::min(kWidth, outputs - w);
      Doubles sum[kVectors], errors[kVectors] = {};
      Sizes<T, true> sizes[kWidth / kEach];
      for (Doubles& s : sum) s = -Doubles{};
      for (int64_t t = 0; t < r.terms; ++t) {
        T buffer[kWidth];
        const T* const x = eight(term(first, t) + w, some, 1, false, buffer);
        if constexpr (std::is_same_v<A, float>) add_eight(x, sum[0], sum[1]);
        else
          for (int v = 0; v < kVectors; ++v) errors[v] += add_to(sum[v], load(x + 4 * v));
        for (int l = 0; l < kWidth; l += kEach) sizes[l / kEach].note(x + l);
      }
      const auto upper = [](Words a, Words b) __attribute__((always_inline)) {   // of a, or of doubles in both
        return kEach == 8 ? a : __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
      };
      constexpr int kLast = kWidth / kEach - 1;
      const Words most = upper(sizes[0].most(), sizes[kLast].most());
      const Words least = upper(sizes[0].least(), sizes[kLast].least());
      T rounded[kWidth], *const to = out + output + w;
      if (settled.eight(sum, errors, most, least, some == kWidth ? to : rounded)) {
        if (some < kWidth) std::copy_n(rounded, some, to);
        continue;
      }
      Place sums = {};
      std::copy_n(sum, kVectors, reinterpret_cast<Doubles*>(sums.hi));
      std::copy_n(errors, kVectors, reinterpret_cast<Doubles*>(sums.lo));
      *reinterpret_cast<Words*>(sums.most) = most, *reinterpret_cast<Words*>(sums.least) = least;
      settle(output + w, some, sums);
    }
  }

  // Rounds the sums of a tile and notes which outputs that leaves open.
  template <class Sums>
  INLINE void settle(int64_t output, const Sums& sums) const {
    const int outputs = here(output, width);
    for (int begin = 0; begin < outputs; begin += kSide) {
      const int some = std::min(kSide, outputs - begin);
      if constexpr (std::is_same_v<Sums, Lanes<float>>) {
        settle(output + begin, some, sums.from(begin));
      } else {
        Place place = {};
        for (int i = 0; i < some; ++i) place.set(i, sums[begin + i]);
        settle(output + begin, some, place);
      }
    }
  }
  INLINE void settle(int64_t output, int outputs, const Side& sums) const {
    T rounded[kSide];
    alignas(32) int32_t certain[kSide], all = ~0;
    settled(sums, rounded, certain);
    std::copy(rounded, rounded + outputs, out + output);
    for (int i = 0; i < outputs; ++i) all &= certain[i];
    const T* const first = terms_of(output);
    for (int w = 0, step = across ? kWidth : 1; w < outputs && !all; w += step) {
      Strip strip{output + w, 0};
      for (int l = w; l < std::min(outputs, w + step); ++l)
        if (!certain[l] && !settled.zero(sums, l, out[output + l]) &&
            !tie(across ? first + l : terms_of(output + l), out[output + l]))
          strip.open |= 1 << (l - w);
      if (!strip.open) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      open.push_back(strip);
    }
  }

  // What is open of few terms is mostly a tie, the middle of two numbers of type T. A double holds it, of doubles two.
  INLINE bool tie(const T* first, T& result) const {
    if (r.terms > kBrief) return false;
    double sum = -0.0, rest = 0;
    for (int64_t t = 0; t < r.terms; ++t) {
      const double error = add_to(sum, double(A(*term(first, t))));   // of an infinite sum NaN
      if (std::is_same_v<T, double> ? add_to(rest, error) != 0 : error != 0) return false;
    }
    result = narrow<T>(sum + rest);
    return true;
  }

  // n <= kWidth numbers, and -0.0 up to kWidth: where they lie or in the buffer. more: see pad().
  INLINE static const T* eight(const T* from, int n, int64_t stride, bool more, T* buffer) {
    if (n == kWidth && stride == 1) return from;
    if (more) pad<kWidth>(from, n, true, buffer);
    else
      for (int l = 0; l < kWidth; ++l) buffer[l] = l < n ? from[l * stride] : kNothing<T>;
    return buffer;
  }

  // n numbers, and -0.0 up to `lanes`: where they lie or in the buffer.
  INLINE const T* lay_out(const T* from, int n, T* buffer) const {
    const int64_t stride = across ? 1 : r.term_stride;
    if (stride == 1 && n == lanes) return from;
    for (int l = 0; l < n; ++l) buffer[l] = from[l * stride];
    std::fill(buffer + n, buffer + lanes, kNothing<T>);
    return buffer;
  }

  // The same without error: terms begin ... end - 1 of up to kWidth outputs to exact[output].
  INLINE void add_exactly_any(Strip strip, int64_t begin, int64_t end, Exact* exact) const {
    const int outputs = here(strip.output, kWidth);
    const T* first = terms_of(strip.output);
    const int64_t block = across ? kRowsOfBlock : kSplit;
    A buffer[kSplit];
    for (int64_t at = begin; at < end; at += block) {
      const int64_t n = std::min(block, end - at), rows = across ? n : (n + kWidth - 1) / kWidth;
      if (across)
        for (int64_t k = 0; k < n; ++k)
          for (int l = 0; l < kWidth; ++l) buffer[k * kWidth + l] = l < outputs ? A(term(first, at + k)[l]) : A(0);
      else
        for (int64_t k = 0; k < rows * kWidth; ++k) buffer[k] = k < n ? A(*term(first, at + k)) : A(0);
      Pieces pieces;
      split_rows(buffer, int(rows), !across, pieces);
      for (int l = 0; l < outputs; ++l)
        if (strip[l]) add_lane(pieces, l, buffer + l, n, across ? kWidth : 1, exact[l]);
    }
  }

  TWICE(void, add_tile, (int64_t output, int64_t begin, int64_t end, Lanes<A>& sums, Running* to),
        (output, begin, end, sums, to))
  TWICE(void, add_side, (int64_t output), (output))
  TWICE(void, add_columns, (int64_t output), (output))
  TWICE(void, add_exactly, (Strip strip, int64_t begin, int64_t end, Exact* exact), (strip, begin, end, exact))

  // How the terms of every task are cut, so that there is work for all threads.
  struct Cut {
    int64_t pieces, length, grain;
    Cut(int64_t terms, int64_t tasks, int64_t outputs) {
      const int64_t threads = torch::stable::get_num_threads(), all = terms * outputs;
      const int64_t wanted = tasks >= 2 * threads || all < 2 * kGrain ? 1 : 4 * threads / tasks;
      length = ((terms + wanted - 1) / wanted + kSplit - 1) / kSplit * kSplit;
      pieces = (terms + length - 1) / length;
      grain = std::max<int64_t>(1, kGrain * tasks * pieces / all);
    }
  };

  void run() const {
    if (brief) {
      const int64_t sides = (r.outputs() + kSide - 1) / kSide;
      torch::stable::parallel_for(0, sides, std::max<int64_t>(1, kGrain / (kSide * r.terms)),
                                  [&](int64_t first, int64_t last) {
        for (int64_t side = first; side < last; ++side) add_side(side * kSide);
      });
    } else if (across && r.terms <= kTies) {
      const int64_t sides = (r.inner + kSide - 1) / kSide;   // in one row of `inner` outputs
      torch::stable::parallel_for(0, r.outer * sides, std::max<int64_t>(1, kGrain / (kSide * r.terms)),
                                  [&](int64_t first, int64_t last) {
        for (int64_t side = first; side < last; ++side) add_columns(side / sides * r.inner + side % sides * kSide);
      });
    } else {
      add_tiles();
    }
    add_open();
  }

  void add_tiles() const {
    const int64_t tasks = r.outer * tiles;
    const auto output = [this](int64_t task) { return task / tiles * r.inner + task % tiles * width; };
    const Cut cut(r.terms, tasks, r.outputs());
    std::unique_ptr<Running[]> sums(cut.pieces > 1 ? new Running[tasks * cut.pieces * width] : nullptr);
    torch::stable::parallel_for(0, tasks * cut.pieces, cut.grain, [&](int64_t first, int64_t last) {
      const std::unique_ptr<Lanes<A>> lanes(new Lanes<A>);
      if (!across && !sums) {   // an output a task: kSide of them are rounded side by side
        Place side = {};
        int waiting = 0;
        for (int64_t job = first; job < last; ++job) {
          Running sum;
          add_tile(job, 0, r.terms, *lanes, &sum);
          side.set(waiting++, sum);
          if (waiting < kSide && job + 1 < last) continue;
          settle(job + 1 - waiting, waiting, side);
          waiting = 0;
        }
        return;
      }
      for (int64_t job = first; job < last; ++job) {
        const int64_t begin = job % cut.pieces * cut.length;
        add_tile(output(job / cut.pieces), begin, std::min(r.terms, begin + cut.length), *lanes,
                 sums ? sums.get() + job * width : nullptr);
      }
    });
    for (int64_t task = 0; sums && task < tasks; ++task) {
      Running* sum = sums.get() + task * cut.pieces * width;
      for (int64_t piece = 1; piece < cut.pieces; ++piece)
        for (int w = 0; w < here(output(task), width); ++w) sum[w].add(sum[piece * width + w]);
      settle(output(task), sum);
    }
  }

  // What is not settled, without error.
  void add_open() const {
    const int64_t strips = int64_t(open.size());
    if (strips == 0) return;
    const Cut again(r.terms, strips, strips * kWidth);
    std::unique_ptr<Exact[]> exacts(again.pieces > 1 ? new Exact[strips * again.pieces * kWidth] : nullptr);
    const auto round = [this](Strip strip, Exact* exact) {
      for (int l = 0; l < kWidth; ++l)
        if (strip[l]) out[strip.output + l] = exact[l].template rounded<T>();
    };
    torch::stable::parallel_for(0, strips * again.pieces, again.grain, [&](int64_t first, int64_t last) {
      const std::unique_ptr<Exact[]> mine(exacts ? nullptr : new Exact[kWidth]);
      for (int64_t job = first; job < last; ++job) {
        const int64_t begin = job % again.pieces * again.length;
        const Strip strip = open[job / again.pieces];
        Exact* exact = mine ? mine.get() : exacts.get() + job * kWidth;
        for (int l = 0; l < kWidth; ++l)
          if (strip[l]) exact[l].clear();
        add_exactly(strip, begin, std::min(r.terms, begin + again.length), exact);
        if (mine) round(strip, exact);
      }
    });
    for (int64_t strip = 0; exacts && strip < strips; ++strip) {
      Exact* exact = exacts.get() + strip * again.pieces * kWidth;
      for (int64_t piece = 1; piece < again.pieces; ++piece)
        for (int l = 0; l < kWidth; ++l)
          if (open[strip][l]) exact[l].add(exact[piece * kWidth + l]);
      round(open[strip], exact);
    }
  }
};

}  // namespace

void exact_cpu(const Reduction& r, ScalarType type, const void* x, void* out) {
  for_type(type, [&]<class T>(T) { ExactSum<T>{r, static_cast<const T*>(x), static_cast<T*>(out)}.run(); });
}

}  // namespace ordered
