// Functions of the CPU that are compiled twice on x86-64: for any processor and for those with AVX2.
#pragma once

#include "ops.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

// What such a function calls has to be compiled with it.
#define INLINE inline __attribute__((always_inline))

// TWICE(result, f, (arguments as declared), (arguments as given)) in a class that has INLINE f_any, and TWICE_CHOICE
// before: f is f_any, compiled for the processor there is.
#if defined(__x86_64__)
#define TWICE_CHOICE const bool avx2 = __builtin_cpu_supports("avx2");
#define TWICE(result, name, declared, given)                                                     \
  __attribute__((target("avx2"))) result name##_avx2 declared const { return name##_any given; } \
  result name declared const { return avx2 ? name##_avx2 given : name##_any given; }
#else
#define TWICE_CHOICE
#define TWICE(result, name, declared, given) \
  result name declared const { return name##_any given; }
#endif

namespace ordered {

template <class T>
const T kNothing = T(-0.0f);

// Four float16s to floats by the instruction for it, where kF16C says that there is one (clang 16 does not know its name,
// but no processor has AVX2 without it). Compilers do not find it, and as assembly it can stand in functions for any
// processor.
typedef float FourFloats __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__x86_64__)
inline const bool kF16C = (__builtin_cpu_init(), __builtin_cpu_supports("avx2"));
INLINE FourFloats load_four(const Half* x) {
  FourFloats v;
  asm("vcvtph2ps %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const Half(*)[4]>(x)));
  return v;
}
INLINE void store_four(FourFloats v, Half* x) {   // to nearest, ties to even
  asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<Half(*)[4]>(x)) : "x"(v));
}
#else
constexpr bool kF16C = false;
INLINE FourFloats load_four(const Half* x) { return FourFloats{x[0], x[1], x[2], x[3]}; }
INLINE void store_four(FourFloats v, Half* x) {
  for (int i = 0; i < 4; ++i) x[i] = Half(v[i]);
}
#endif

// Of four vectors of four.
template <class V>
INLINE void transpose_four(V (&v)[4]) {
  const V a = __builtin_shufflevector(v[0], v[1], 0, 4, 2, 6), b = __builtin_shufflevector(v[0], v[1], 1, 5, 3, 7);
  const V c = __builtin_shufflevector(v[2], v[3], 0, 4, 2, 6), d = __builtin_shufflevector(v[2], v[3], 1, 5, 3, 7);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), v[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  v[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7), v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// n < LANES terms, and nothing up to LANES. `more`: after the terms so much of memory can be read that it makes whole
// vectors, of eight terms or less.
template <int LANES, class T>
INLINE void pad(const T* x, int n, bool more, T* row) {
  if (more) {
    using Bits = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
    constexpr int kWide = sizeof(T) == 8 ? 4 : 8;
    typedef Bits Vector __attribute__((vector_size(kWide * sizeof(T)), aligned(sizeof(T)), may_alias));
    Vector place = {0, 1, 2, 3};
    if constexpr (kWide == 8) place = Vector{0, 1, 2, 3, 4, 5, 6, 7};
    const Vector nothing = Vector{} + std::bit_cast<Bits>(kNothing<T>);
    for (int l = 0; l < LANES; l += kWide) {
      Vector v = nothing;
      if (l < n) v = place < Bits(n - l) ? *reinterpret_cast<const Vector*>(x + l) : v;
      *reinterpret_cast<Vector*>(row + l) = v;
    }
    return;
  }
  std::fill(std::copy(x, x + n, row), row + LANES, kNothing<T>);
}

}  // namespace ordered
