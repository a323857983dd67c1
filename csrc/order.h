// THE definition of every order of additions, shared by host and device: which terms form a group, the fixed tree
// that sums a group, and the keyed permutation in which the groups' partial sums are added. cpu.cpp and cuda.cu may
// cut the work as they like; the additions they perform are the ones written here, so their bits agree.
//
// Group     R terms are cut into G = min(splits, R) consecutive groups as torch.tensor_split cuts them: the first R % G
//           have one term more.
// Tree      Term i of a group stands in row i / 32 and lane i % 32. Every lane is summed over its rows by a balanced
//           binary tree (rows 2j and 2j+1 first), then the 32 lanes by halving: lane l takes lane l + 16, then l + 8,
//           4, 2, 1. Where a row or lane is missing stands -0.0, the identity of IEEE addition (x + -0.0 is x for
//           every x, both zeros included), so the tree is a function of the group's length alone and no term is added
//           more than ceil(log2(length)) times: the error is that of pairwise summation.
// Groups    fixed: ((p0 + p1) + p2) + ...; shuffled: the same after a Fisher-Yates shuffle with Philox4x32-10; arrival
//           and its replay: the same in the order of the tickets that the groups of a stretch of outputs took.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ORDERED_HD __host__ __device__ __forceinline__
#else
#define ORDERED_HD inline
#endif

namespace ordered {

constexpr int kLanes = 32;                 // terms in a row
constexpr int kRows = 8;                   // rows in a block, the piece of the tree that is summed in registers
constexpr int kBlock = kLanes * kRows;     // terms in a block
constexpr int kStretch = 32;               // consecutive outputs that share their tickets; STRETCH of tape.py

struct Group {
  int64_t begin, size;
};

struct Groups {
  int64_t size, longer;
  ORDERED_HD Groups(int64_t terms, int64_t groups) : size(terms / groups), longer(terms % groups) {}
  ORDERED_HD Group operator[](int64_t g) const {
    return {g * size + (g < longer ? g : longer), size + (g < longer ? 1 : 0)};
  }
  ORDERED_HD int64_t longest() const { return size + (longer ? 1 : 0); }
};

// The eight rows of a block, in one lane. Fewer rows (a power of two) are the left part of the same tree.
template <class T>
ORDERED_HD T tree(T a, T b) {
  return a + b;
}
template <class T>
ORDERED_HD T tree(T a, T b, T c, T d) {
  return (a + b) + (c + d);
}
template <class T>
ORDERED_HD T tree(T a, T b, T c, T d, T e, T f, T g, T h) {
  return ((a + b) + (c + d)) + ((e + f) + (g + h));
}

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), Table 2.
ORDERED_HD void philox4x32_10(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t x0 = uint32_t(p1 >> 32) ^ c[1] ^ k0, x2 = uint32_t(p0 >> 32) ^ c[3] ^ k1;
    c[0] = x0, c[1] = uint32_t(p1), c[2] = x2, c[3] = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// What a permutation is a function of. With scope "tensor" all outputs use the permutation of output 0.
struct Key {
  uint64_t seed;
  uint32_t step, op;
};

// Shuffles v[0], v[stride], ..., v[(n-1)*stride]. The counter holds (output: 48 bits, draw / 4: 16 bits, step, op), a
// 32-bit draw u becomes floor(u * bound / 2^32) (bias below bound / 2^32), and elements are settled from the last down.
template <class T>
ORDERED_HD void shuffle(T* v, int n, int64_t stride, Key key, uint64_t output) {
  uint32_t c[4];
  for (int last = n - 1, draw = 0; last > 0; --last, ++draw) {
    if (draw % 4 == 0) {
      c[0] = uint32_t(output), c[1] = uint32_t(output >> 32 & 0xFFFFu) | uint32_t(draw / 4) << 16;
      c[2] = key.step, c[3] = key.op;
      philox4x32_10(c, uint32_t(key.seed), uint32_t(key.seed >> 32));
    }
    const int other = int(uint64_t{c[draw % 4]} * uint64_t(last + 1) >> 32);
    const T kept = v[last * stride];
    v[last * stride] = v[other * stride];
    v[other * stride] = kept;
  }
}

}  // namespace ordered
