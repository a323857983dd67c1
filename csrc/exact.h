// The order "exact", shared by host and device: the sum of all terms without any rounding, then rounded once (to nearest,
// ties to even). Two exact ways to add that need no order:
//
// Split     Let |x| <= 2^-kSplitBits * sigma, sigma a power of two, for at most 2^kSplitBits terms. q = (x + sigma) -
//           sigma is x rounded to a multiple of 2^-53 sigma, r = x - q is exact with |r| <= 2^-53 sigma (Rump, Ogita,
//           Oishi, "Accurate Floating-Point Summation Part I", SIAM J. Sci. Comput. 31 (2008), Lemma 3.3). Any sum of
//           these q is a multiple of 2^-53 sigma and at most sigma, so doubles hold it exactly, in any order. The same
//           with r and 2^-42 sigma; what is left after that, hardly ever anything, goes to
// Exact     an integer that covers every double: digit k has the weight 2^(32 k - 1074), carries wait in the upper half
//           of its 64 bits. float, Half and BFloat16 are doubles as well.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "order.h"

namespace ordered {

constexpr int kSplitBits = 11;
constexpr int64_t kSplit = int64_t{1} << kSplitBits;   // most terms that share a sigma
constexpr double kSecond = 0x1p-42;                    // the second sigma, in units of the first: 2^(kSplitBits - 53)
constexpr int kHuge = 2000;                            // exponent from which on sigma could overflow; infinity, NaN

ORDERED_HD uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

ORDERED_HD double double_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// For terms whose largest exponent, as the bits of a double have it, is `exponent`; 1 for a subnormal or nothing.
ORDERED_HD double sigma_for(int exponent) { return double_of(uint64_t(exponent + 1 + kSplitBits) << 52); }

// Takes q out of x and returns it.
ORDERED_HD double split(double& x, double sigma) {
  const double q = (x + sigma) - sigma;
  x -= q;
  return q;
}

// Knuth's two-sum: afterwards sum plus what is returned is exactly what sum plus x was. exact.cpp calls it with vectors,
// from functions compiled for more than the rest is, and so must have it inlined.
template <class V>
ORDERED_HD __attribute__((always_inline)) V add_to(V& sum, V x) {
  const V before = sum;
  sum += x;
  const V other = sum - before;
  return (before - (sum - other)) + (x - other);
}

// x rounded once to T. A half type is reached through float: an x that is no float becomes the neighbour whose last bit
// is one, which rounds to a shorter type as x does (Boldo, Melquiond, "Emulation of a FMA and correctly rounded sums:
// proved algorithms using rounding to odd", IEEE Trans. Comput. 57 (2008)).
template <class T>
ORDERED_HD T narrow(double x) {
  float f = float(x);
  if constexpr (!std::is_same_v<T, float>) {
    const double error = x - double(f);   // NaN for an infinity
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    bits -= uint32_t((error < 0) == (x > 0) && error != 0 && error == error);
    bits |= uint32_t(error < 0 || error > 0);
    memcpy(&f, &bits, sizeof f);
  }
  return T(f);
}

template <>
ORDERED_HD double narrow<double>(double x) {
  return x;
}

// How many bits of x, from the highest or lowest on, are 0. (In device code nvcc 13.0 takes the functions of <bit>, but for
// bit_width, for constants.)
ORDERED_HD int leading_zeros(uint64_t x) {
#ifdef __CUDA_ARCH__
  return __clzll(static_cast<long long>(x));
#else
  return std::countl_zero(x);
#endif
}
ORDERED_HD int trailing_zeros(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __clz(static_cast<int>(__brev(x)));
#else
  return std::countr_zero(x);
#endif
}

// Loops over all digits are rare on a GPU, and unrolled they would take the registers of the frequent work.
#ifdef __CUDA_ARCH__
#define ORDERED_ROLLED _Pragma("unroll 1")
#else
#define ORDERED_ROLLED
#endif

struct Exact {
  static constexpr int kDigits = 68;            // 2^-1074 ... 2^1024, and 2^63 terms
  static constexpr uint32_t kMost = 1u << 30;   // additions after which carries must be taken
  enum : uint32_t { kNan = 1, kInfinite = 2, kNegativeInfinite = 4, kNotMinusZero = 8,   // what was added
                    kTouched = 16 };              // << k / 4: to digit k

  int64_t digit[kDigits];
  uint32_t seen, additions;

  ORDERED_HD void clear() {
    ORDERED_ROLLED
    for (int64_t& d : digit) d = 0;
    seen = additions = 0;
  }

  // Where digits are not 0: those that were added to and two more for carries, which hold a sum of 2^63 terms.
  ORDERED_HD int begin() const { return trailing_zeros(seen / kTouched) * 4; }   // past the end where there are none
  ORDERED_HD int end() const {
    const int end = (64 - leading_zeros(seen / kTouched)) * 4 + 2;
    return end < kDigits ? end : kDigits;
  }

  // Calls put(k, change of digit k) for what x adds, and returns what of it is to be noted in `seen`.
  template <class Put>
  ORDERED_HD static uint32_t put(double x, const Put& put) {
    const uint64_t bits = bits_of(x);
    const int exponent = int(bits >> 52 & 0x7FF);
    uint64_t significand = bits & ((uint64_t{1} << 52) - 1);
    const bool negative = bits >> 63;
    if (exponent == 0x7FF) return kNotMinusZero | (significand ? kNan : negative ? kNegativeInfinite : kInfinite);
    if (exponent == 0 && significand == 0) return negative ? 0u : uint32_t{kNotMinusZero};
    if (exponent) significand |= uint64_t{1} << 52;
    const int weight = exponent ? exponent - 1 : 0, k = weight / 32, shift = weight % 32;
    const int64_t part[3] = {int64_t(significand << shift & 0xFFFFFFFF),
                             int64_t(significand >> (32 - shift) & 0xFFFFFFFF),
                             int64_t(significand >> 32 >> (32 - shift))};
    for (int i = 0; i < 3; ++i)
      if (part[i]) put(k + i, negative ? -part[i] : part[i]);
    return kNotMinusZero | kTouched << k / 4 | kTouched << (k + 2) / 4;
  }

  ORDERED_HD void add(double x) {
    seen |= put(x, [this](int k, int64_t change) { digit[k] += change; });
    if (++additions == kMost) carry();
  }

  // Whether x was a negative zero, infinite or NaN.
  ORDERED_HD void note(double x) { seen |= put(x, [](int, int64_t) {}); }

  ORDERED_HD void add(Exact& other) {
    other.carry();
    for (int k = 0; k < kDigits; ++k) digit[k] += other.digit[k];
    seen |= other.seen;
    if (++additions == kMost) carry();
  }

  // Leaves all digits but the one before end(), which has the sign, in 0 ... 2^32 - 1.
  ORDERED_HD void carry() {
    const int last = end() - 1;
    ORDERED_ROLLED
    for (int k = begin(); k < last; ++k) {
      digit[k + 1] += digit[k] >> 32;
      digit[k] &= 0xFFFFFFFF;
    }
    additions = 1;
  }

  // Changes the sign of a sum below zero, after which few of its digits are not 0, and says whether it did. Carries must
  // have been taken.
  ORDERED_HD bool make_positive() {
    const int last = end();
    if (digit[last - 1] >= 0) return false;
    ORDERED_ROLLED
    for (int k = begin(); k < last; ++k) digit[k] = -digit[k];
    carry();
    return true;
  }

  template <class T>
  ORDERED_HD T rounded() {
    const bool both = (seen & kInfinite) && (seen & kNegativeInfinite);
    if ((seen & kNan) || both) return T(float(NAN));
    if (seen & (kInfinite | kNegativeInfinite)) return T(seen & kInfinite ? float(INFINITY) : -float(INFINITY));
    carry();
    const bool negative = make_positive();
    const int low = begin();
    int high = end() - 1;
    while (high >= low && digit[high] == 0) --high;
    if (high < low) return T(seen & kNotMinusZero ? 0.0f : -0.0f);
    // The first 64 bits of the sum, of which the last is one where anything but zeros follows.
    uint64_t top = uint64_t(digit[high]);
    int weight = -1074;
    if (high >= 1) top = top << 32 | uint64_t(digit[high - 1]);
    if (high >= 2) {
      const int shift = leading_zeros(top);
      top <<= shift;
      const uint64_t next = uint64_t(digit[high - 2]);
      top |= next >> (32 - shift);
      bool more = (next << shift & 0xFFFFFFFF) != 0;
      for (int k = high - 3; k >= low && !more; --k) more = digit[k] != 0;
      top |= more;
      weight += 32 * (high - 1) - shift;
    }
    // A sum that is subnormal in T is exact: no term has bits below T's last.
    if (!std::is_same_v<T, double>)
      while (top >> 53) top = top >> 1 | (top & 1), ++weight;   // to odd, so that narrow rounds as if once
    const double sum = ldexp(double(top), weight);
    return narrow<T>(negative ? -sum : sum);
  }
};

}  // namespace ordered
