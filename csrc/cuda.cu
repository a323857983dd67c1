// The CUDA implementation: the additions of order.h, cut for a GPU. Bits do not depend on the launch shape.
//
//   lane_sums   a warp row by row (threadIdx.x is a lane) or 32 neighbouring outputs at once (threadIdx.x is an output):
//               up to kPiece rows of a group -> its 32 lane sums. Lane sums are rows of 32 themselves, so the
//               same kernel sums the lane sums of the pieces until one piece is left: the rest of the same tree.
//   combine     the partial sums of the groups, one after the other or shuffled, one thread an output.
//   race        the same partial sums with atomicAdd, one thread a (group, output).
//   group_sums  the sums of the groups of index_add's rows, wherever their terms stand; add_groups and add_exact end it.
//   arrive      fetches the same partial sums, one block a (group, stretch of outputs), and takes a ticket when done.
//   exact_sums  the order "exact": the split and the integer of exact.h, which no order can change.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "exact.h"
#include "ops.h"

namespace ordered {
namespace {

constexpr int kSegmentBlocks = 8;  // most register blocks (of 8 rows) that one thread sums

// Warps in a block of lane_sums: segments of one task, or several short tasks.
template <bool ACROSS>
constexpr int kWarps = ACROSS ? 4 : 8;
// Most rows of a task that one block sums.
template <bool ACROSS>
constexpr int64_t kPiece = int64_t(kWarps<ACROSS>) * kSegmentBlocks * kRows;

constexpr int kShuffled = 64;      // most groups that a thread shuffles in its own memory; above, in the scratch tensor

constexpr int kNarrowest = 8;      // fewest neighbouring outputs that are read side by side: a sector of floats
constexpr int64_t kManyTasks = 1 << 14;   // tasks that keep a GPU busy with one warp each

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "ordered_reduce: ", cudaGetErrorString(error));
}

// A (task, row, lane) array: the terms of one group of one output, or the lane sums of its pieces.
struct Rows {
  int64_t tasks;             // outputs * groups; task = output * groups + group
  int64_t inner, groups;     // to find the output and group of a task
  int64_t outer_stride, inner_stride, term_stride;
  int64_t terms;             // terms of an output (first pass); 0 where every task has `rows` whole rows (later passes)
  int64_t rows;              // most rows in a task
  int lanes;                 // 32, or the next power of two where all tasks are shorter

  // Where a task's terms begin, and how many there are.
  __device__ int64_t locate(int64_t task, int64_t& size) const {
    if (terms == 0) {
      size = rows * kLanes;
      return task * size;
    }
    const int64_t output = task / groups;
    const Group group = Groups(terms, groups)[task % groups];
    size = group.size;
    return output / inner * outer_stride + output % inner * inner_stride + group.begin * term_stride;
  }
};

// The tree over 8 * blocks rows of one lane; x points at the lane's first term, `left` terms before the group's end.
// Missing rows are -0.0.
template <class T, class Acc>
__device__ Acc segment(const T* x, int64_t left, int64_t stride, int blocks) {
  constexpr int most = kSegmentBlocks * kBlock;
  int here = left < 0 ? 0 : left < most ? int(left) : most;
  Acc stack[4];              // kSegmentBlocks = 2^3: a binary counter in registers
  Acc sum = Acc(-0.0f);
#pragma unroll
  for (int b = 0; b < kSegmentBlocks; ++b, here -= kBlock) {
    if (b >= blocks) break;
    Acc v[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row, x += kLanes * stride) v[row] = row * kLanes < here ? Acc(*x) : Acc(-0.0f);
    sum = tree(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (b >> k & 1) {
        sum = tree(stack[k], sum);
      } else {
        stack[k] = sum;
        break;
      }
    }
  }
  return sum;                // blocks is a power of two, so the last push carried through to the whole segment
}

// Sums a piece of up to kPiece rows of every task. ACROSS: threadIdx.x is one of 32 neighbouring outputs and the lanes
// are looped over; otherwise threadIdx.x is the lane. With one piece the lanes are added too, and out is
// partial[group * outputs + output]; with more, out is lanes[task][piece][lane].
template <class T, class Acc, bool ACROSS>
__global__ void lane_sums(Rows r, const T* __restrict__ x, Acc* __restrict__ out, int64_t pieces, int segments,
                          int blocks) {
  __shared__ Acc shared[kWarps<ACROSS>][kLanes][ACROSS ? kLanes : 1];
  const int64_t outputs = r.tasks / r.groups;
  const int64_t columns = (outputs + kLanes - 1) / kLanes;
  const int per_block = kWarps<ACROSS> / segments;                  // tasks, or columns of tasks, that share a block
  const int64_t items = ((ACROSS ? columns * r.groups : r.tasks) + per_block - 1) / per_block;
  const int seg = threadIdx.y % segments;
  for (int64_t job = blockIdx.x; job < items * pieces; job += gridDim.x) {   // neighbours in memory one after the other
    const int64_t piece = ACROSS ? job / items : job % pieces;
    const int64_t item = (ACROSS ? job % items : job / pieces) * per_block + threadIdx.y / segments;
    const int64_t output = item % columns * kLanes + threadIdx.x;   // ACROSS only
    const int64_t task = ACROSS ? output * r.groups + item / columns : item;
    const bool mine = ACROSS ? output < outputs && item / columns < r.groups : task < r.tasks;
    int64_t size = 0;
    const T* terms = x;
    if (mine) terms += r.locate(task, size);
    const int64_t first = (piece * kPiece<ACROSS> + int64_t(seg) * blocks * kRows) * kLanes;
    if (!ACROSS) {
      const int64_t i = first + threadIdx.x;
      shared[threadIdx.y][threadIdx.x][0] = segment<T, Acc>(terms + i * r.term_stride, size - i, r.term_stride, blocks);
    } else if (r.rows == 1) {
#pragma unroll 8
      for (int lane = 0; lane < r.lanes; ++lane)
        shared[threadIdx.y][lane][threadIdx.x] = lane < size ? Acc(terms[lane * r.term_stride]) : Acc(-0.0f);
    } else {
      for (int64_t i = first; i < first + kLanes; ++i)
        shared[threadIdx.y][i - first][threadIdx.x] =
            segment<T, Acc>(terms + i * r.term_stride, size - i, r.term_stride, blocks);
    }
    for (int apart = 1; apart < segments; apart *= 2) {        // rows: neighbouring segments first
      __syncthreads();
      if (seg % (2 * apart) == 0)
        for (int k = 0; k < (ACROSS ? kLanes : 1); ++k) {
          Acc* left = ACROSS ? &shared[threadIdx.y][k][threadIdx.x] : &shared[threadIdx.y][threadIdx.x][0];
          const Acc* right = ACROSS ? &shared[threadIdx.y + apart][k][threadIdx.x]
                                    : &shared[threadIdx.y + apart][threadIdx.x][0];
          *left = tree(*left, *right);
        }
    }
    if (pieces == 1) {                                         // lanes: halving
      for (int half = r.lanes / 2; half > 0; half /= 2) {      // within one warp
        __syncwarp();
        if (seg != 0) continue;
        if (ACROSS) {
          for (int k = 0; k < half; ++k)
            shared[threadIdx.y][k][threadIdx.x] =
                tree(shared[threadIdx.y][k][threadIdx.x], shared[threadIdx.y][k + half][threadIdx.x]);
        } else if (int(threadIdx.x) < half) {
          shared[threadIdx.y][threadIdx.x][0] =
              tree(shared[threadIdx.y][threadIdx.x][0], shared[threadIdx.y][threadIdx.x + half][0]);
        }
      }
      if (mine && seg == 0 && (ACROSS || threadIdx.x == 0))
        out[task % r.groups * outputs + task / r.groups] = shared[threadIdx.y][0][ACROSS ? threadIdx.x : 0];
    } else if (mine && seg == 0) {
      for (int k = 0; k < (ACROSS ? kLanes : 1); ++k) {
        const int lane = ACROSS ? k : threadIdx.x;
        out[(task * pieces + piece) * kLanes + lane] = shared[threadIdx.y][lane][ACROSS ? threadIdx.x : 0];
      }
    }
    __syncthreads();                                           // before the next job writes shared
  }
}

// The partial sums, as (outer, groups, inner) with strides.
struct Partials {
  int64_t outputs, inner, groups;
  int64_t outer_stride, group_stride, inner_stride;
  __device__ int64_t at(int64_t output) const {
    return output / inner * outer_stride + output % inner * inner_stride;
  }
};

// kRows partial sums, loaded together; -0.0 where there are fewer.
template <class Acc, class P>
__device__ void load_rows(const P* p, int64_t n, int64_t stride, Acc* v) {
#pragma unroll
  for (int k = 0; k < kRows; ++k) v[k] = k < n ? Acc(p[k * stride]) : Acc(-0.0f);
}

template <class P, class T, class Acc>
__global__ void combine(Partials r, P* partial, T* out, bool shuffled, bool per_output, Key key,
                        const int64_t* device_step, const int32_t* tickets) {
  if (device_step) key.step = uint32_t(*device_step);
  for (int64_t o = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; o < r.outputs;
       o += int64_t(gridDim.x) * blockDim.x) {
    P* p = partial + r.at(o);
    const uint64_t drawn_for = per_output ? uint64_t(o) : 0;
    Acc sum = Acc(-0.0f);
    if (tickets) {
      const int32_t* by = tickets + o / kStretch * r.groups;
      for (int64_t g = 0; g < r.groups; ++g) sum = sum + Acc(p[by[g] * r.group_stride]);
    } else if (shuffled && r.groups <= kShuffled) {
      Acc v[kShuffled];
      for (int g = 0; g < r.groups; g += kRows) load_rows(p + g * r.group_stride, r.groups - g, r.group_stride, v + g);
      shuffle(v, int(r.groups), 1, key, drawn_for);
      for (int g = 0; g < r.groups; ++g) sum = sum + v[g];
    } else {
      if constexpr (!std::is_const_v<P>)
        if (shuffled) shuffle(p, int(r.groups), r.group_stride, key, drawn_for);
      for (int64_t g = 0; g < r.groups; g += kRows) {
        Acc v[kRows];
        load_rows(p + g * r.group_stride, r.groups - g, r.group_stride, v);
#pragma unroll
        for (int k = 0; k < kRows; ++k) sum = sum + v[k];
      }
    }
    out[o] = T(sum);
  }
}

// Groups vary fastest over the blocks, so that the groups of one output are in flight together.
template <class P, class Acc>
__global__ void race(Partials r, const P* __restrict__ partial, Acc* sums) {
  const int64_t columns = (r.outputs + blockDim.x - 1) / blockDim.x;
  for (int64_t job = blockIdx.x; job < columns * r.groups; job += gridDim.x) {
    const int64_t o = job / r.groups * blockDim.x + threadIdx.x;
    if (o < r.outputs) atomicAdd(sums + o, Acc(partial[r.at(o) + job % r.groups * r.group_stride]));
  }
}

// A block of one warp for every (group, stretch of outputs), groups varying fastest: it fetches its partial sums and
// then draws the stretch's next ticket.
template <class P, class Acc>
__global__ void arrive(Partials r, const P* __restrict__ partial, Acc* fetched, int* next, int32_t* tickets) {
  const int64_t stretches = (r.outputs + kStretch - 1) / kStretch;
  for (int64_t job = blockIdx.x; job < stretches * r.groups; job += gridDim.x) {
    const int64_t s = job / r.groups, g = job % r.groups, o = s * kStretch + threadIdx.x;
    if (o < r.outputs) fetched[g * r.outputs + o] = Acc(partial[r.at(o) + g * r.group_stride]);
    __threadfence();       // the ticket is drawn when the sums have arrived, not before
    __syncthreads();
    if (threadIdx.x == 0) tickets[s * r.groups + atomicAdd(next + s, 1)] = int32_t(g);
  }
}

template <class T, class Acc>
__global__ void fill(Acc* x, int64_t n, Acc value) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    x[i] = value;
}

template <class T, class Acc>
__global__ void convert(const Acc* x, T* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    out[i] = T(x[i]);
}

constexpr int kExactWarps = 4;                   // in a block of exact_sums
constexpr int kBatch = 16;                       // terms that a thread splits together; a warp: 512, of most kSplit
constexpr int64_t kBetweenCarries = 1 << 24;     // terms of one exact sum, well below Exact::kMost
constexpr int64_t kExactPiece = 1 << 16;         // terms of one output that one block sums, at least

__device__ void add_shared(Exact& exact, double x) {
  const uint32_t seen = Exact::put(x, [&](int k, int64_t change) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&exact.digit[k]), static_cast<unsigned long long>(change));
  });
  if (seen & ~exact.seen) atomicOr(&exact.seen, seen);
}

// A block sums one piece of the terms of one output, or (ACROSS) of 32 neighbouring ones, one to each threadIdx.x. With
// one piece it rounds the sum as well; with more, whole[output] gathers them.
template <class T, bool ACROSS>
__global__ void exact_sums(Reduction r, const T* __restrict__ x, T* out, Exact* whole, int64_t piece, int64_t pieces) {
  constexpr int kOutputs = ACROSS ? kLanes : 1, kThreads = kLanes * kExactWarps;
  constexpr int kTogether = ACROSS ? kExactWarps : kThreads;     // threads that share an output
  __shared__ Exact shared[kOutputs];
  const int thread = threadIdx.y * kLanes + threadIdx.x, first = ACROSS ? threadIdx.y : thread;
  Exact& exact = shared[ACROSS ? threadIdx.x : 0];
  const int64_t columns = (r.outputs() + kOutputs - 1) / kOutputs;
  for (int64_t job = blockIdx.x; job < columns * pieces; job += gridDim.x) {
    if (thread < kOutputs) shared[thread].clear();
    __syncthreads();
    const int64_t output = job % columns * kOutputs + (ACROSS ? threadIdx.x : 0);
    const bool mine = output < r.outputs();
    const T* terms = x + output / r.inner * r.outer_stride + output % r.inner * r.inner_stride;
    const int64_t begin = job / columns * piece, end = min(r.terms, begin + piece);
    for (int64_t from = begin; from < end; from += kBetweenCarries) {
      const int64_t to = min(end, from + kBetweenCarries);
      for (int64_t at = from; at < to; at += kBatch * kTogether) {   // the same number of times in every thread
        double v[kBatch];
        int exponent = 1;
        bool minus_zeros = true;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int64_t i = at + k * kTogether + first;
          v[k] = mine && i < to ? double(terms[i * r.term_stride]) : -0.0;   // which changes no sum
          exponent = max(exponent, int(bits_of(v[k]) >> 52 & 0x7FF));
          minus_zeros &= bits_of(v[k]) == uint64_t{1} << 63;
        }
        if (!ACROSS) exponent = __reduce_max_sync(~0u, exponent);    // one sigma for the warp
        if (exponent >= kHuge) {
          for (int k = 0; k < kBatch; ++k) add_shared(exact, v[k]);
          continue;
        }
        const double sigma = sigma_for(exponent);
        double sum = 0, rest = 0;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          sum += split(v[k], sigma);
          rest += split(v[k], sigma * kSecond);
          if (v[k] != 0) add_shared(exact, v[k]);
        }
        if (!ACROSS)
          for (int half = kLanes / 2; half > 0; half /= 2) {         // exact, so in any order
            sum += __shfl_xor_sync(~0u, sum, half);
            rest += __shfl_xor_sync(~0u, rest, half);
          }
        if (!minus_zeros) atomicOr(&exact.seen, Exact::kNotMinusZero);
        if (ACROSS || threadIdx.x == 0) {
          if (sum != 0) add_shared(exact, sum);
          if (rest != 0) add_shared(exact, rest);
        }
      }
      __syncthreads();
      if (thread < kOutputs) shared[thread].carry();
      __syncthreads();
    }
    const int64_t o = job % columns * kOutputs + thread;
    if (thread < kOutputs && o < r.outputs()) {
      if (pieces == 1) {
        out[o] = shared[thread].template rounded<T>();
      } else {
        for (int k = 0; k < Exact::kDigits; ++k)
          atomicAdd(reinterpret_cast<unsigned long long*>(&whole[o].digit[k]),
                    static_cast<unsigned long long>(shared[thread].digit[k]));
        atomicOr(&whole[o].seen, shared[thread].seen);
      }
    }
    __syncthreads();
  }
}

template <class T>
__global__ void round_exact(Exact* whole, T* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    out[i] = whole[i].rounded<T>();
}

// The tree over one lane of one group of index_add, at column d; `position` points at the group's n terms.
template <class T, class Acc>
__device__ Acc lane_sum(const T* source, const int64_t* position, int64_t n, int lane, int64_t width, int64_t d) {
  Acc stack[48];             // a binary counter over blocks of 8 rows
  int depth = 0;
  int64_t count = 0;
  for (int64_t i = lane; i < n || count == 0; i += kBlock) {
    Acc v[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int64_t k = i + row * kLanes;
      v[row] = k < n ? Acc(source[position[k] * width + d]) : Acc(-0.0f);
    }
    Acc sum = tree(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]);
    for (int64_t bits = count++; bits & 1; bits >>= 1) sum = tree(stack[--depth], sum);
    stack[depth++] = sum;
  }
  for (; depth > 1; --depth) stack[depth - 2] = tree(stack[depth - 2], stack[depth - 1]);
  return stack[0];
}

constexpr int kGroupWarps = 8;     // in a block of group_sums
constexpr int64_t kAlone = kBlock; // most terms of a group that one warp sums; longer ones take the whole block

// partial[start[v] + g][d] = the sum of group g of row v of index_add (there are no more groups than terms), or that
// sum raced into sums[v][d]. threadIdx.x is one of 32 columns, threadIdx.y one of 8 consecutive places of `position`,
// each of which stands for the group of its number: the groups of one row are in flight together.
template <class T, class Acc>
__global__ void group_sums(Reduction r, Segments s, const T* __restrict__ source, Acc* partial, Acc* sums) {
  __shared__ Acc shared[kLanes][kLanes];
  const int64_t columns = (r.inner + kLanes - 1) / kLanes, eights = (r.terms + kGroupWarps - 1) / kGroupWarps;
  for (int64_t job = blockIdx.x; job < columns * eights; job += gridDim.x) {
    const int64_t d = job % columns * kLanes + threadIdx.x;
    for (int w = 0; w < kGroupWarps; ++w) {                    // all warps look at all eight, and agree
      const int64_t k = job / columns * kGroupWarps + w;
      if (k >= r.terms) break;
      const int64_t v = s.index[s.position[k]];
      if (v < 0 || v >= r.outer) continue;
      const int64_t n = s.start[v + 1] - s.start[v], g = k - s.start[v], groups = min(n, r.groups);
      if (g >= groups) continue;
      const Group group = Groups(n, groups)[g];
      const int64_t* position = s.position + s.start[v] + group.begin;
      const bool alone = group.size <= kAlone;
      if (alone && w != threadIdx.y) continue;
      Acc sum = Acc(-0.0f);
      if (alone) {
        Acc lanes[kLanes];
        int half = 1;
        while (half < kLanes && half < group.size) half *= 2;
        for (int lane = 0; lane < half; ++lane)
          lanes[lane] = d < r.inner ? lane_sum<T, Acc>(source, position, group.size, lane, r.inner, d) : sum;
        while (half /= 2)
          for (int lane = 0; lane < half; ++lane) lanes[lane] = tree(lanes[lane], lanes[lane + half]);
        sum = lanes[0];
      } else {
        for (int lane = threadIdx.y; lane < kLanes; lane += kGroupWarps)
          shared[lane][threadIdx.x] =
              d < r.inner ? lane_sum<T, Acc>(source, position, group.size, lane, r.inner, d) : sum;
        __syncthreads();
        if (threadIdx.y == w) {
          for (int half = kLanes / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; ++lane)
              shared[lane][threadIdx.x] = tree(shared[lane][threadIdx.x], shared[lane + half][threadIdx.x]);
          sum = shared[0][threadIdx.x];
        }
        __syncthreads();                                       // before shared is written again
        if (threadIdx.y != w) continue;
      }
      if (d >= r.inner) continue;
      if (sums) atomicAdd(sums + v * r.inner + d, sum);
      else partial[k * r.inner + d] = sum;
    }
  }
}

// input + the groups of every output, one after the other or shuffled; or input + what was raced into sums.
template <class T, class Acc>
__global__ void add_groups(Reduction r, Segments s, const T* input, Acc* partial, const Acc* sums, T* out) {
  const Key key{r.seed, r.device_step ? uint32_t(*r.device_step) : r.step, r.op};
  for (int64_t o = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; o < r.outputs();
       o += int64_t(gridDim.x) * blockDim.x) {
    const int64_t v = o / r.inner, n = s.start[v + 1] - s.start[v], groups = min(n, r.groups);
    if (n == 0) {
      out[o] = input[o];
      continue;
    }
    Acc sum;
    if (sums) {
      sum = sums[o];
    } else {
      Acc* p = partial + s.start[v] * r.inner + o % r.inner;
      if (r.order == Order::shuffled) shuffle(p, int(groups), r.inner, key, r.per_output ? uint64_t(o) : 0);
      sum = p[0];
      for (int64_t g = 1; g < groups; ++g) sum = sum + p[g * r.inner];
    }
    out[o] = T(Acc(input[o]) + Acc(T(sum)));
  }
}

// The order "exact": one thread an output.
template <class T, class Acc>
__global__ void add_exact(Reduction r, Segments s, const T* input, const T* source, T* out) {
  for (int64_t o = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; o < r.outputs();
       o += int64_t(gridDim.x) * blockDim.x) {
    const int64_t v = o / r.inner;
    Exact exact;
    exact.clear();
    for (int64_t k = s.start[v]; k < s.start[v + 1]; ++k)
      exact.add(double(source[s.position[k] * r.inner + o % r.inner]));
    out[o] = s.start[v] == s.start[v + 1] ? input[o] : T(Acc(input[o]) + Acc(exact.template rounded<T>()));
  }
}

int grid(int64_t jobs) { return int(std::min<int64_t>(std::max<int64_t>(jobs, 1), 1 << 20)); }

template <class T>
struct Sum {
  using Acc = typename AccType<T>::type;
  const Reduction& r;
  const Tensor& x;
  Tensor& out;
  cudaStream_t stream;

  Tensor scratch(int64_t n) const {
    const ScalarType type = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
    return torch::stable::new_empty(x, {n}, type);
  }

  // Sums all rows of all tasks down to partial[group * outputs + output], in as many passes as it takes.
  template <bool ACROSS, class In>
  Tensor sum_rows(Rows rows, const In* in) const {
    // A segment is a power of two of register blocks, and a task takes as many warps as it has segments.
    const int64_t needed = (std::min(rows.rows, kPiece<ACROSS>) + kRows - 1) / kRows;
    // Rows of very many tasks are added by one warp each as far as possible: the fewer segments to put together.
    int segments = 1, blocks = 1;
    if (!ACROSS && rows.tasks >= kManyTasks)
      while (blocks < kSegmentBlocks && blocks < needed) blocks *= 2;
    while (segments < kWarps<ACROSS> && int64_t(segments) * blocks < needed) segments *= 2;
    while (int64_t(segments) * blocks < needed) blocks *= 2;
    const int64_t pieces = (rows.rows + kPiece<ACROSS> - 1) / kPiece<ACROSS>;
    const int per_block = kWarps<ACROSS> / segments;
    const int64_t items = ((ACROSS ? (r.outputs() + kLanes - 1) / kLanes * r.groups : rows.tasks) + per_block - 1) /
                          per_block;
    Tensor sums = scratch(pieces == 1 ? rows.tasks : rows.tasks * pieces * kLanes);
    Acc* to = static_cast<Acc*>(sums.mutable_data_ptr());
    lane_sums<In, Acc, ACROSS><<<grid(items * pieces), dim3(kLanes, kWarps<ACROSS>), 0, stream>>>(
        rows, in, to, pieces, segments, blocks);
    check(cudaGetLastError());
    if (pieces == 1) return sums;
    rows.terms = 0, rows.rows = pieces, rows.term_stride = 1;   // rows.lanes is 32, or there were no pieces
    return sum_rows<false, Acc>(rows, to);
  }

  Tensor partials() const {
    const int64_t longest = Groups(r.terms, r.groups).longest();
    int lanes = 1;
    while (lanes < kLanes && lanes < longest) lanes *= 2;
    const Rows rows{r.outputs() * r.groups, r.inner, r.groups, r.outer_stride, r.inner_stride, r.term_stride, r.terms,
                    (longest + kLanes - 1) / kLanes, lanes};
    const T* terms = static_cast<const T*>(x.const_data_ptr());
    const bool across = r.inner_stride == 1 && r.term_stride != 1 && r.inner >= kNarrowest;
    return across ? sum_rows<true>(rows, terms) : sum_rows<false>(rows, terms);
  }

  template <class P>
  void add(const Partials& p, P* partial) const {
    constexpr int threads = 256;
    T* result = static_cast<T*>(out.mutable_data_ptr());
    const int blocks = grid((p.outputs + threads - 1) / threads);
    if (r.order == Order::arrival) {
      Tensor fetched = scratch(p.groups * p.outputs);
      Tensor next = torch::stable::new_empty(x, {r.stretches()}, ScalarType::Int);
      torch::stable::zero_(next);
      Acc* sums = static_cast<Acc*>(fetched.mutable_data_ptr());
      arrive<P, Acc><<<grid(r.stretches() * p.groups), kStretch, 0, stream>>>(
          p, partial, sums, static_cast<int*>(next.mutable_data_ptr()), r.tickets);
      check(cudaGetLastError());
      combine<Acc, T, Acc><<<blocks, threads, 0, stream>>>({p.outputs, p.outputs, p.groups, 0, p.outputs, 1}, sums,
                                                           result, false, false, Key{}, nullptr, r.tickets);
      check(cudaGetLastError());
      return;
    }
    if (r.order != Order::atomic) {
      combine<P, T, Acc><<<blocks, threads, 0, stream>>>(p, partial, result, r.order == Order::shuffled, r.per_output,
                                                         Key{r.seed, r.step, r.op}, r.device_step, r.tickets);
      check(cudaGetLastError());
      return;
    }
    Tensor sums = std::is_same_v<T, Acc> ? out : scratch(p.outputs);
    Acc* to = static_cast<Acc*>(sums.mutable_data_ptr());
    fill<T, Acc><<<blocks, threads, 0, stream>>>(to, p.outputs, Acc(-0.0f));
    check(cudaGetLastError());
    race<P, Acc><<<grid((p.outputs + threads - 1) / threads * p.groups), threads, 0, stream>>>(p, partial, to);
    check(cudaGetLastError());
    if constexpr (!std::is_same_v<T, Acc>) {
      convert<T, Acc><<<blocks, threads, 0, stream>>>(to, result, p.outputs);
      check(cudaGetLastError());
    }
  }

  template <bool ACROSS>
  void exact() const {
    T* result = static_cast<T*>(out.mutable_data_ptr());
    const int64_t columns = ACROSS ? (r.outputs() + kLanes - 1) / kLanes : r.outputs();
    // Few outputs: blocks share their terms.
    const int64_t most = std::max<int64_t>(1, (1 << 12) / columns);
    const int64_t piece = std::max(kExactPiece, (r.terms + most - 1) / most), pieces = (r.terms + piece - 1) / piece;
    Tensor sums = torch::stable::new_empty(x, {pieces == 1 ? 0 : r.outputs() * int64_t(sizeof(Exact) / sizeof(int64_t))},
                                           ScalarType::Long);
    if (pieces > 1) sums = torch::stable::zero_(sums);
    Exact* whole = static_cast<Exact*>(sums.mutable_data_ptr());
    exact_sums<T, ACROSS><<<grid(columns * pieces), dim3(kLanes, kExactWarps), 0, stream>>>(
        r, static_cast<const T*>(x.const_data_ptr()), result, whole, piece, pieces);
    check(cudaGetLastError());
    if (pieces == 1) return;
    round_exact<T><<<grid((r.outputs() + 255) / 256), 256, 0, stream>>>(whole, result, r.outputs());
    check(cudaGetLastError());
  }

  void run() const {
    if (r.order == Order::exact) return r.inner_stride == 1 && r.inner >= kNarrowest ? exact<true>() : exact<false>();
    if (r.groups == r.terms && (r.order != Order::shuffled || r.groups <= kShuffled)) {   // groups of one term
      add<const T>({r.outputs(), r.inner, r.groups, r.outer_stride, r.term_stride, r.inner_stride},
                   static_cast<const T*>(x.const_data_ptr()));
      return;
    }
    Tensor sums = partials();
    add<Acc>({r.outputs(), r.outputs(), r.groups, 0, r.outputs(), 1}, static_cast<Acc*>(sums.mutable_data_ptr()));
  }
};

template <class T>
void index_add(const Reduction& r, const Segments& s, const Tensor& input, const Tensor& source, Tensor& out,
               cudaStream_t stream) {
  using Acc = typename AccType<T>::type;
  const T *in = static_cast<const T*>(input.const_data_ptr()), *terms = static_cast<const T*>(source.const_data_ptr());
  T* result = static_cast<T*>(out.mutable_data_ptr());
  constexpr int threads = 128;
  const int blocks = grid((r.outputs() + threads - 1) / threads);
  if (r.order == Order::exact) {
    add_exact<T, Acc><<<blocks, threads, 0, stream>>>(r, s, in, terms, result);
    return check(cudaGetLastError());
  }
  const bool race = r.order == Order::atomic;
  Tensor scratch = torch::stable::new_empty(input, {race ? r.outputs() : r.terms * r.inner},
                                            std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float);
  Acc* partial = static_cast<Acc*>(scratch.mutable_data_ptr());
  Acc* sums = race ? partial : nullptr;
  if (race) {
    fill<T, Acc><<<blocks, threads, 0, stream>>>(sums, r.outputs(), Acc(-0.0f));
    check(cudaGetLastError());
  }
  const int64_t jobs = (r.inner + kLanes - 1) / kLanes * ((r.terms + kGroupWarps - 1) / kGroupWarps);
  group_sums<T, Acc><<<grid(jobs), dim3(kLanes, kGroupWarps), 0, stream>>>(r, s, terms, partial, sums);
  check(cudaGetLastError());
  add_groups<T, Acc><<<blocks, threads, 0, stream>>>(r, s, in, partial, sums, result);
  check(cudaGetLastError());
}

// The stream to launch on. A DeviceGuard must be in force.
cudaStream_t stream_of(const Tensor& x) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
  return static_cast<cudaStream_t>(current);
}

}  // namespace

void sum_cuda(const Reduction& r, const Tensor& x, Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  for_type(x.scalar_type(), [&]<class T>(T) { Sum<T>{r, x, out, stream_of(x)}.run(); });
}

void index_add_cuda(const Reduction& r, const Segments& s, const Tensor& input, const Tensor& source, Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  for_type(input.scalar_type(), [&]<class T>(T) { index_add<T>(r, s, input, source, out, stream_of(input)); });
}

}  // namespace ordered
