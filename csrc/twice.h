// Functions of the CPU that are compiled twice on x86-64: for any processor and for those with AVX2.
#pragma once

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
