// The CUDA implementation: the additions of order.h, cut for a GPU. Bits do not depend on the launch shape.
//
//   lane_sums   a warp row by row (threadIdx.x is a lane) or 32 neighbouring outputs at once (threadIdx.x is an output):
//               up to kPiece rows of a group -> its 32 lane sums. Lane sums are rows of 32 themselves, so the
//               same kernel sums the lane sums of the pieces until one piece is left: the rest of the same tree.
//   combine     the partial sums of the groups, one after the other or shuffled, one thread an output.
//   add_apart   the same for partial sums that came in tensors of their own.
//   words       random numbers for noise.py.
//   race        the same partial sums with atomicAdd, one thread a (group, output).
//   arrive      fetches the same partial sums, one block a (group, stretch of outputs), and takes a ticket when done.
//   short_sums  groups of at most 32 contiguous terms, one thread each.
//   exact_sums  the order "exact": the split and the integer of exact.h, which no order can change. exact_few: the same
//               where an output has few terms, which doubles mostly settle, one or more threads each.
//   index_add   add_rows and add_exact: the rows of few terms, one thread a pack of neighbouring columns; plan lists
//               the others, whose groups group_sums (one thread a group and column) and long_sums (one block) add up
//               first. In atomic order race_few does that for rows of few terms.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>

#include "exact.h"
#include "launch.h"

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
  constexpr int kOutputs = ACROSS ? kLanes : 1;
  const int64_t outputs = r.tasks / r.groups;
  const int64_t columns = (outputs + kOutputs - 1) / kOutputs;
  const int per_block = kWarps<ACROSS> / segments;                  // tasks, or columns of tasks, that share a block
  const int64_t items = (columns * r.groups + per_block - 1) / per_block;
  const int seg = threadIdx.y % segments;
  // Neighbours in memory come one after the other, so that what is read for one is still there for the next: outputs, or
  // the pieces of a task and its groups.
  const bool beside = ACROSS || (r.terms && r.inner > 1 && r.inner_stride == 1 && r.term_stride != 1);
  for (int64_t job = blockIdx.x; job < items * pieces; job += gridDim.x) {
    const int64_t piece = beside ? job / items : job % pieces;
    const int64_t item = (beside ? job % items : job / pieces) * per_block + threadIdx.y / segments;
    int64_t output = 0, task = item;
    if (beside) {
      output = item % columns * kOutputs + (ACROSS ? threadIdx.x : 0);
      task = output * r.groups + item / columns;
    }
    const bool mine = ACROSS ? output < outputs && item / columns < r.groups : item < r.tasks;
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

// v[0] becomes the sum of N lanes by halving.
template <int N, class Acc>
__device__ void halve(Acc* v) {
  if constexpr (N > 1) {
#pragma unroll
    for (int l = 0; l < N / 2; ++l) v[l] = tree(v[l], v[l + N / 2]);
    halve<N / 2>(v);
  }
}

// partial[group * outputs + output] of tasks of at most LANES terms, one thread each.
template <int LANES, class T, class Acc>
__global__ void short_sums(Rows r, const T* __restrict__ x, Acc* __restrict__ out) {
  const int64_t outputs = r.tasks / r.groups;
  for (int64_t task = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; task < r.tasks;
       task += int64_t(gridDim.x) * blockDim.x) {
    int64_t size;
    const T* terms = x + r.locate(task, size);
    Acc v[LANES];
#pragma unroll
    for (int l = 0; l < LANES; ++l) v[l] = l < size ? Acc(terms[l * r.term_stride]) : Acc(-0.0f);
    halve<LANES>(v);
    out[task % r.groups * outputs + task / r.groups] = v[0];
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

// shuffle() of the last n = kRows - first numbers of v. All stay in registers, since no place in v is computed.
template <class Acc>
__device__ void shuffle_few(Acc* v, int first, Key key, uint64_t output) {
  uint32_t c[kRows];
#pragma unroll
  for (int draw = 0; draw < kRows; draw += 4) {
    if (draw >= kRows - 1 - first) continue;
    c[draw] = uint32_t(output), c[draw + 1] = uint32_t(output >> 32 & 0xFFFFu) | uint32_t(draw / 4) << 16;
    c[draw + 2] = key.step, c[draw + 3] = key.op;
    philox4x32_10(c + draw, uint32_t(key.seed), uint32_t(key.seed >> 32));
  }
#pragma unroll
  for (int last = kRows - 1; last > 0; --last) {
    if (last <= first) continue;
    const int other = first + int(uint64_t{c[kRows - 1 - last]} * uint64_t(last - first + 1) >> 32);
    const Acc kept = v[last];
#pragma unroll
    for (int k = 0; k < last; ++k) {
      if (k != other) continue;
      v[last] = v[k];
      v[k] = kept;
    }
  }
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
      for (int64_t g = 0; g < r.groups; ++g)   // nothing else has checked the tickets
        sum = sum + Acc(p[min(uint32_t(by[g]), uint32_t(r.groups - 1)) * r.group_stride]);
    } else if (shuffled && r.groups <= kRows) {
      const int first = kRows - int(r.groups);
      Acc v[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) v[k] = k < first ? Acc(-0.0f) : Acc(p[(k - first) * r.group_stride]);
      shuffle_few(v, first, key, drawn_for);
#pragma unroll
      for (int k = 0; k < kRows; ++k) sum = sum + v[k];
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

// Neighbouring numbers that one thread reads, adds and writes together.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <int N, class T>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, class T>
__device__ void store(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof pack == sizeof(uint4)) {   // plainly written, the compiler stores number after number
    uint4 words;
    memcpy(&words, &pack, sizeof pack);
    __stcg(reinterpret_cast<uint4*>(to), words);
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}

// N neighbouring numbers of the last axis to a thread.
template <int N, class P, class Acc, class T>
__global__ void add_apart(Apart p, int groups, uint32_t count, T* out, bool shuffled, bool per_output, Key key,
                          const int64_t* device_step) {
  if (device_step) key.step = uint32_t(*device_step);
  const int first = kRows - groups;              // where group 0 stands in v, if all have a place there
  const int64_t apart = p.out_stride[Apart::kAxes - 1];
  for (int64_t job = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; job < count / N;
       job += int64_t(gridDim.x) * blockDim.x) {
    uint32_t left = uint32_t(job) * N;
    int64_t in = 0, o = 0;
#pragma unroll
    for (int a = Apart::kAxes - 1; a >= 0; --a) {
      const uint32_t before = a ? left / uint32_t(p.size[a]) : 0, here = left - before * uint32_t(p.size[a]);
      in += here * p.stride[a], o += here * p.out_stride[a], left = before;
    }
    const auto load = [&](int g) { return *reinterpret_cast<const Pack<P, N>*>(static_cast<const P*>(p.data[g]) + in); };
    const auto drawn_for = [&](int e) { return per_output ? uint64_t(o + e * apart) : 0; };
    Acc sum[N];
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] = Acc(-0.0f);
    if (groups <= kRows) {
      Acc v[N][kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        Pack<P, N> given;
        if (k >= first) given = load(k - first);
#pragma unroll
        for (int e = 0; e < N; ++e) v[e][k] = k < first ? Acc(-0.0f) : Acc(given.at[e]);
      }
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (shuffled) shuffle_few(v[e], first, key, drawn_for(e));
#pragma unroll
        for (int k = 0; k < kRows; ++k) sum[e] = sum[e] + v[e][k];
      }
    } else if (shuffled) {
      for (int e = 0; e < N; ++e) {
        Acc v[kShuffled];
        for (int g = 0; g < groups; ++g) v[g] = Acc(static_cast<const P*>(p.data[g])[in + e]);
        shuffle(v, groups, 1, key, drawn_for(e));
        for (int g = 0; g < groups; ++g) sum[e] = sum[e] + v[g];
      }
    } else {
#pragma unroll 8
      for (int g = 0; g < groups; ++g) {
        const Pack<P, N> given = load(g);
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] = sum[e] + Acc(given.at[e]);
      }
    }
    Pack<T, N> result;
#pragma unroll
    for (int e = 0; e < N; ++e) result.at[e] = T(sum[e]);
    if (p.alike) {
      store(out + in, result);
      continue;
    }
#pragma unroll
    for (int e = 0; e < N; ++e) out[o + e * apart] = result.at[e];
  }
}

// philox of ops.h.
__global__ void words(int64_t n, Key key, const int64_t* device_step, int64_t* out) {
  if (device_step) key.step = uint32_t(*device_step);
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint32_t c[4] = {uint32_t(i), 0, key.step, key.op};
    philox4x32_10(c, uint32_t(key.seed), uint32_t(key.seed >> 32));
    for (int word = 0; word < 4; ++word) out[word * n + i] = c[word];
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

constexpr int kAhead = 4;                        // reads of a thread before it adds what they gave
constexpr int kBatch = 16;                       // terms that a thread splits together
constexpr int kSlack = 2;                        // powers of two by which later terms may exceed the largest yet
constexpr int kExactWarps = 4;                   // in a block of exact_sums
constexpr int64_t kExactPiece = 1 << 13;         // terms that one block sums, at least
constexpr int64_t kFew = 128;                    // most terms of an output that one thread adds up exactly,
constexpr int kFewThreads = 8;                   // or, where the terms lie side by side, so many of them,
constexpr int64_t kFewAlone = 8;                 // but for the fewest,
constexpr int64_t kFewOfWarp = 1024;             // and most that a warp does

constexpr int kWords = sizeof(Exact) / sizeof(int64_t);
static_assert(kWords * sizeof(int64_t) == sizeof(Exact));

// As two words: the hardware has no 64-bit addition to shared memory.
__device__ void add_shared(int64_t& digit, int64_t change) {
  uint32_t* const word = reinterpret_cast<uint32_t*>(&digit);
  const uint32_t low = uint32_t(change), sum = atomicAdd(word, low) + low;
  if (const uint32_t high = uint32_t(change >> 32) + (sum < low)) atomicAdd(word + 1, high);
}

__device__ void add_shared(Exact& exact, double x) {
  const uint32_t seen = Exact::put(x, [&](int k, int64_t change) { add_shared(exact.digit[k], change); });
  if (seen) atomicOr(&exact.seen, seen);
}

// All threads of a warp add a and b to one exact sum: all of them split by one sigma and then a smaller one, until
// nothing is left (nor of subnormals: the least sigmas round nothing).
__device__ void add_together(Exact& exact, double a, double b) {
  const auto size = [](double x) { return x == 0 ? 0 : max(1, int(bits_of(x) >> 52 & 0x7FF)); };
  double sigma = INFINITY;
  while (const int exponent = __reduce_max_sync(~0u, max(size(a), size(b)))) {
    sigma = min(sigma_for(exponent), sigma * kSecond);
    double sum = split(a, sigma) + split(b, sigma);
    for (int half = kLanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);   // exact, so in any order
    if (threadIdx.x == 0 && sum != 0) add_shared(exact, sum);
  }
}

// A block adds terms begin ... end - 1 of one output to shared[0], or (ACROSS) of 32 neighbouring ones, one to each
// threadIdx.x, to shared[0 ... 31], which it clears first. term(i) is a double; mine: whether this thread has an output.
template <bool ACROSS, class Term>
__device__ void add_exactly(Exact* shared, bool mine, int64_t begin, int64_t end, const Term& term) {
  constexpr int kOutputs = ACROSS ? kLanes : 1;
  const int thread = threadIdx.y * kLanes + threadIdx.x, first = ACROSS ? threadIdx.y : thread;
  const int together = ACROSS ? blockDim.y : blockDim.y * kLanes;    // threads that share an output
  Exact& exact = shared[ACROSS ? threadIdx.x : 0];
  for (int i = thread; i < kOutputs * kWords; i += blockDim.y * kLanes) reinterpret_cast<int64_t*>(shared)[i] = 0;
  __syncthreads();
  double sum = 0, rest = 0, sigma = 0;
  int covered = -1;                                                  // the largest exponent that sigma is for
  bool some = false;                                                 // anything but negative zeros
  for (int64_t from = begin; from < end; from += kSplit * together) {   // the same number of times in every thread
    const int64_t to = mine ? min(end, from + kSplit * together) : from;
    for (int64_t at = from + first; at < to; at += int64_t(kBatch) * together) {
      double v[kBatch];
      uint32_t most = 0;                                             // the upper half of the largest |term|
      if (at + int64_t(kBatch - 1) * together < to) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) v[k] = term(at + int64_t(k) * together);
      } else {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int64_t i = at + int64_t(k) * together;
          v[k] = i < to ? term(i) : -0.0;                            // which changes no sum
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) most = max(most, uint32_t(bits_of(v[k]) >> 32) & 0x7FFFFFFF);
      if (!some)
#pragma unroll
        for (int k = 0; k < kBatch; ++k) some |= bits_of(v[k]) != uint64_t{1} << 63;
      const int exponent = int(most >> 20);
      if (exponent > covered) {
        if (sum != 0) add_shared(exact, sum);
        if (rest != 0) add_shared(exact, rest);
        sum = rest = 0, covered = exponent + kSlack, sigma = sigma_for(covered);
      }
      uint64_t left = exponent < kHuge ? 0 : ~uint64_t{0};           // shifted: anything but zeros, of either sign
      if (!left) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) sum += split(v[k], sigma), left |= bits_of(v[k]);
        if (left << 1) {                                             // rare but for doubles
          left = 0;
#pragma unroll
          for (int k = 0; k < kBatch; ++k) rest += split(v[k], sigma * kSecond), left |= bits_of(v[k]);
        }
      }
      if (left << 1) {                                               // rare: once more, without v in memory
#pragma unroll 1
        for (int64_t i = at; i < min(to, at + int64_t(kBatch) * together); i += together) {
          double x = term(i);
          if (exponent < kHuge) split(x, sigma), split(x, sigma * kSecond);
          if (x != 0) add_shared(exact, x);
        }
        covered = -1;                                                // the next terms may be as small as the least
      }
    }
    if (ACROSS) {
      if (sum != 0) add_shared(exact, sum);
      if (rest != 0) add_shared(exact, rest);
    } else {
      add_together(exact, sum, rest);
    }
    if (ACROSS ? some : __reduce_max_sync(~0u, int(some)) && threadIdx.x == 0)
      atomicOr(&exact.seen, Exact::kNotMinusZero);
    sum = rest = 0;
    __syncthreads();
    if (to < end && thread < kOutputs) shared[thread].carry();
    __syncthreads();
  }
}

__device__ int64_t offset(const Reduction& r, int64_t output) {      // of its first term
  const int64_t outer = r.inner == 1 ? output : output / r.inner;    // dividing takes long
  return outer * r.outer_stride + (output - outer * r.inner) * r.inner_stride;
}

// Adds a block's sums shared[0 ... outputs - 1] to whole[0], .... The last of `blocks` blocks to come here gets back in
// shared what that makes; the others get false.
template <int OUTPUTS, int WARPS>
__device__ bool gather(Exact* shared, Exact* whole, int outputs, int64_t blocks) {
  __shared__ bool complete;
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  if (thread < outputs) {
    Exact &mine = shared[thread], &all = whole[thread];
    mine.carry();
    for (int k = mine.begin(); k < mine.end(); ++k)
      if (const int64_t digit = mine.digit[k])
        atomicAdd(reinterpret_cast<unsigned long long*>(&all.digit[k]), static_cast<unsigned long long>(digit));
    atomicOr(&all.seen, mine.seen);
    __threadfence();
  }
  __syncthreads();
  if (thread == 0) {
    complete = atomicAdd(&whole->additions, 1u) + 1 == blocks;   // counts the blocks that came here
    __threadfence();
  }
  __syncthreads();
  if (!complete) return false;
  const volatile int64_t* const from = reinterpret_cast<int64_t*>(whole);   // volatile: as L2 has it now
#pragma unroll
  for (int first = 0; first < OUTPUTS * kWords; first += WARPS * kLanes)
    if (const int i = first + thread; i < outputs * kWords) reinterpret_cast<int64_t*>(shared)[i] = from[i];
  __syncthreads();
  return true;
}

// A block sums one piece of the terms of one output, or (ACROSS) of 32 neighbouring ones. With more than one piece,
// whole[output] gathers them, and the block that is the last to come there rounds the sum.
template <class T, bool ACROSS>
__global__ void exact_sums(Reduction r, const T* __restrict__ x, T* out, Exact* whole, int64_t piece, int64_t pieces) {
  constexpr int kOutputs = ACROSS ? kLanes : 1;
  __shared__ Exact shared[kOutputs];
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  const int64_t columns = (r.outputs() + kOutputs - 1) / kOutputs;
  for (int64_t job = blockIdx.x; job < columns * pieces; job += gridDim.x) {
    const int64_t o = job % columns * kOutputs, output = o + (ACROSS ? threadIdx.x : 0), begin = job / columns * piece;
    const int outputs = int(min(int64_t{kOutputs}, r.outputs() - o));
    const T* terms = x + offset(r, output);
    add_exactly<ACROSS>(shared, output < r.outputs(), begin, min(r.terms, begin + piece),
                        [&](int64_t i) { return double(terms[i * r.term_stride]); });
    const bool complete = pieces == 1 || gather<kOutputs, kExactWarps>(shared, whole + o, outputs, pieces);
    if (complete && thread < outputs) out[o + thread] = shared[thread].template rounded<T>();
    __syncthreads();
  }
}

// The exact sum of n <= kFewOfWarp terms, rounded, in TOGETHER neighbouring threads, each of which returns it. With
// more than one, all threads of a warp must come here.
template <class T, int TOGETHER = 1, class Term>
__device__ T sum_of_few(int64_t n, const Term& term) {
  double hi = -0.0, lo = 0;
  uint32_t largest = 0;                                // upper half of |term|
  bool off = false;                                    // whether an addition was rounded
  for (int i = TOGETHER > 1 ? threadIdx.x % TOGETHER : 0; i < int(n); i += kAhead * TOGETHER) {
    double v[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) v[k] = i + k * TOGETHER < int(n) ? term(i + k * TOGETHER) : -0.0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const double error = add_to(hi, v[k]);
      lo += error, off |= error != 0, largest = max(largest, uint32_t(bits_of(v[k]) >> 32) & 0x7FFFFFFF);
    }
  }
  for (int apart = 1; apart < TOGETHER; apart *= 2) {  // the same in both threads
    const double error = add_to(hi, __shfl_xor_sync(~0u, hi, apart));
    lo += __shfl_xor_sync(~0u, lo, apart);
    lo += error, off |= __shfl_xor_sync(~0u, int(off), apart) | (error != 0);
    largest = max(largest, __shfl_xor_sync(~0u, largest, apart));
  }
  if (!off) return narrow<T>(hi);                      // zeros alone have the sign that IEEE 754 gives them
  // hi + lo is off by (n u)^2 n most at most, u = 2^-53 (Ogita, Rump, Oishi, "Accurate Sum and Dot Product", SIAM J. Sci.
  // Comput. 26 (2005)); twice that covers the roundings here. Shorter types are rounded from a double, which must lie on
  // the right side of their ties: it is off by u n most.
  const double most = double_of(uint64_t(largest + 1) << 32);
  const double bound = most * n * (double(n) * n * 0x1p-105 + (std::is_same_v<T, double> ? 0 : 0x1p-51));
  const double rest = add_to(hi, lo);
  const T low = narrow<T>(hi + (rest - bound)), high = narrow<T>(hi + (rest + bound));
  if (double(low) == double(high) && double(low) != 0) return low;   // never with NaN
  Exact exact;
  exact.clear();
  for (int64_t i = 0; i < n; ++i) exact.add(term(i));
  return exact.template rounded<T>();
}

// TOGETHER threads an output.
template <class T, int TOGETHER>
__global__ void exact_few(Reduction r, const T* __restrict__ x, T* out) {
  const int64_t each = blockDim.x / TOGETHER;
  for (int64_t first = blockIdx.x * each; first < r.outputs(); first += gridDim.x * each) {   // the same in all threads
    const int64_t o = first + threadIdx.x / TOGETHER;
    const T* terms = x + offset(r, o);
    const T sum = sum_of_few<T, TOGETHER>(o < r.outputs() ? r.terms : 0,
                                          [&](int64_t i) { return double(terms[i * r.term_stride]); });
    if (o < r.outputs() && threadIdx.x % TOGETHER == 0) out[o] = sum;
  }
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

constexpr int kThreads = 256;      // in a block of the kernels of index_add, but for
constexpr int kLongThreads = 1024; // long_sums
constexpr int kLongWarps = 16;     // and add_exact_long,
constexpr int64_t kSharing = 1 << 9;   // whose blocks share terms where they would be fewer
constexpr int64_t kAlone = kBlock; // most terms of a group that one thread adds up
constexpr int kKept = 8;           // most groups of a pack that a thread keeps to shuffle them
constexpr int kPackBytes = 16;     // what a thread reads at once

// Sums of packs.
template <int N, class Acc>
struct Sums {
  Acc at[N];
  __device__ Sums() {
#pragma unroll
    for (int c = 0; c < N; ++c) at[c] = Acc(-0.0f);
  }
  __device__ void add(const Acc* x) {
#pragma unroll
    for (int c = 0; c < N; ++c) at[c] = at[c] + x[c];
  }
  template <class T>
  __device__ void add_to(Pack<T, N>& row) const {
#pragma unroll
    for (int c = 0; c < N; ++c) row.at[c] = T(Acc(row.at[c]) + Acc(T(at[c])));
  }
};

// Calls f(row, place), which the threads share out: x along a row, y over the rows. A row that fits into a block needs
// no division, which would take longer than what there is to do.
template <class F>
__device__ void for_places(int64_t rows, int64_t places, const F& f) {
  const bool fits = places <= blockDim.x;
  const int64_t blocks = fits ? 1 : (places + blockDim.x - 1) / blockDim.x;
  for (int64_t job = blockIdx.x;; job += gridDim.x) {
    const int64_t some = fits ? job : job / blocks, v = some * blockDim.y + threadIdx.y;
    const int64_t place = (job - some * blocks) * blockDim.x + threadIdx.x;
    if (some * blockDim.y >= rows) break;
    if (v < rows && place < places) f(v, place);
  }
}

// Calls take(g, sum) for one group after the other of n terms at a pack of columns; no group has more than MOST terms.
// Groups of AHEAD terms together, or every other term of one group, are in flight together.
template <int MOST, int AHEAD, int N, class Acc, class T, class Take>
__device__ void groups_of(const T* source, const int64_t* position, int64_t n, int64_t groups, int64_t width,
                          const Take& take) {
  constexpr int kTogether = MOST < AHEAD ? AHEAD / MOST : 1, kParts = MOST > kAhead ? MOST / kAhead : 1;
  constexpr int kEach = MOST / kParts;
  int64_t longer = MOST == 1 ? 0 : n;                          // size and longer as in Groups, without its division
  int size = MOST == 1;
  if constexpr (MOST > 1)
    for (; longer >= groups; longer -= groups) ++size;
#pragma unroll 1
  for (int64_t g = 0; g < groups; g += kTogether) {
    const int here = int(min(groups - g, int64_t(kTogether)));              // groups,
    const int more = int(max(int64_t(0), min(longer - g, int64_t(here))));  // of which so many are longer
    const auto has = [=](int j, int k) { return j < here && k < size + (j < more); };   // whether group j has a term k
    Acc sums[kTogether][N][kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int64_t from[kTogether][kEach];
      Pack<T, N> v[kTogether][kEach];
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int k = part + i * kParts;
          from[j][i] = has(j, k) ? position[j * size + min(j, more) + k] : 0;
        }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int c = 0; c < N; ++c) v[j][i].at[c] = T(-0.0f);
          if (has(j, part + i * kParts)) v[j][i] = load<N>(source + from[j][i] * width);
        }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
#pragma unroll
        for (int c = 0; c < N; ++c) {
          Acc lanes[kEach];
#pragma unroll
          for (int i = 0; i < kEach; ++i) lanes[i] = Acc(v[j][i].at[c]);
          halve<kEach>(lanes);
          sums[j][c][part] = lanes[0];
        }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      Acc sum[N];
#pragma unroll
      for (int c = 0; c < N; ++c) halve<kParts>(sums[j][c]), sum[c] = sums[j][c][0];
      if (j < here) take(g + j, sum);
    }
    position += kTogether * size + more;
  }
}

// The same for groups of at most kRows terms.
template <int AHEAD, int N, class Acc, class T, class Take>
__device__ void few_groups(const T* source, const int64_t* position, int64_t n, int64_t groups, int64_t width,
                           const Take& take) {
  if (n <= groups) groups_of<1, AHEAD, N, Acc>(source, position, n, n, width, take);
  else if (n <= 2 * groups) groups_of<2, AHEAD, N, Acc>(source, position, n, groups, width, take);
  else if (n <= 4 * groups) groups_of<4, AHEAD, N, Acc>(source, position, n, groups, width, take);
  else groups_of<kRows, AHEAD, N, Acc>(source, position, n, groups, width, take);
}

// Rows of index_add whose groups are added up before the row is, by the length of their longest group.
struct Lists {
  int64_t *count, *rows[2];        // 0: up to kAlone terms, 1: longer; in exact order: rows of more than kFew terms
};

// Which list a row of n terms goes to; -1: none; kRaced: none, but race_few adds up its groups. Two sums add up to the
// same in any order, so they need not race.
constexpr int kRaced = 2;
__device__ int list_of(const Reduction& r, int64_t n) {
  if (r.order == Order::exact) return n > kFew ? 1 : -1;
  if (n > kRows * r.groups) return n > kAlone * r.groups ? 1 : 0;
  return r.order == Order::atomic && min(n, r.groups) > 2 ? kRaced : -1;
}

// partial[at(v, start[v]) + g][d] is for the sum of group g of row v, if that is in a list. Such rows have more than
// 2^shift terms, so that first >> shift tells them apart.
struct Places {
  int shift;                       // -1: v itself takes less memory
  int64_t each;                    // places of a row
  __device__ int64_t at(int64_t v, int64_t first) const { return (shift < 0 ? v : first >> shift) * each; }
};

// In no order: every row has places of its own for its partial sums.
__global__ void plan(Reduction r, Segments s, Lists lists) {
  for (int64_t v = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; v < r.outer; v += int64_t(gridDim.x) * blockDim.x) {
    const int list = list_of(r, s.start[v + 1] - s.start[v]);
    if (list != 0 && list != 1) continue;
    const auto place = atomicAdd(reinterpret_cast<unsigned long long*>(lists.count + list), 1ull);
    lists.rows[list][place] = v;
  }
}

// The partial sums of list 0, one thread each. In atomic order they are raced into sums[v][d] instead.
template <class T, class Acc>
__global__ void group_sums(Reduction r, Segments s, Lists lists, Places places, const T* __restrict__ source,
                           Acc* partial, Acc* sums) {
  for_places(*lists.count * r.groups, r.inner, [&](int64_t k, int64_t d) {
    const int64_t v = lists.rows[0][k / r.groups], g = k % r.groups, first = s.start[v];
    const Group group = Groups(s.start[v + 1] - first, r.groups)[g];   // with so many terms there are r.groups
    const int64_t* position = s.position + first + group.begin;
    const auto term = [&](int64_t i) { return i < group.size ? Acc(source[position[i] * r.inner + d]) : Acc(-0.0f); };
    Acc lanes[kLanes];
    int half = 1;
    while (half < kLanes && half < group.size) half *= 2;
    for (int l = 0; l < half; ++l)
      lanes[l] = group.size <= kLanes ? term(l)
                                      : tree(term(l), term(l + kLanes), term(l + 2 * kLanes), term(l + 3 * kLanes),
                                             term(l + 4 * kLanes), term(l + 5 * kLanes), term(l + 6 * kLanes),
                                             term(l + 7 * kLanes));
    while (half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] = tree(lanes[l], lanes[l + half]);
    if (sums) atomicAdd(sums + v * r.inner + d, lanes[0]);
    else partial[(places.at(v, first) + g) * r.inner + d] = lanes[0];
  });
}

// The same for the long groups, one block each and blockDim.x columns, which with the lanes and some segments of the
// rows (aligned, complete subtrees) make up its threads.
template <class T, class Acc>
__global__ void __launch_bounds__(kLongThreads)
    long_sums(Reduction r, Segments s, Lists lists, Places places, const T* __restrict__ source, Acc* partial,
              Acc* sums) {
  __shared__ Acc shared[kLongThreads];
  const int width = blockDim.x, lane = threadIdx.y % kLanes, segments = blockDim.y / kLanes, seg = threadIdx.y / kLanes;
  const int64_t columns = (r.inner + width - 1) / width;
  Acc* const mine = shared + threadIdx.y * width + threadIdx.x;
  for (int64_t job = blockIdx.x; job < columns * lists.count[1] * r.groups; job += gridDim.x) {
    const int64_t d = job % columns * width + threadIdx.x, g = job / columns % r.groups;
    const int64_t v = lists.rows[1][job / columns / r.groups], first = s.start[v];
    const Group group = Groups(s.start[v + 1] - first, r.groups)[g];   // with so many terms there are r.groups
    int64_t terms = kBlock;                                    // of a segment
    while (terms * segments < group.size) terms *= 2;
    const int64_t begin = seg * terms, n = d < r.inner ? min(terms, group.size - begin) : 0;
    *mine = lane_sum<T, Acc>(source, s.position + first + group.begin + begin, n, lane, r.inner, d);
    for (int apart = 1; apart < segments; apart *= 2) {
      __syncthreads();
      if (seg % (2 * apart) == 0) *mine = tree(*mine, mine[apart * kLanes * width]);
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (seg == 0 && lane < half) *mine = tree(*mine, mine[half * width]);
    }
    if (threadIdx.y == 0 && d < r.inner) {
      if (sums) atomicAdd(sums + v * r.inner + d, *mine);
      else partial[(places.at(v, first) + g) * r.inner + d] = *mine;
    }
    __syncthreads();                                           // before shared is written again
  }
}

// Before a race, in the rows that have one.
template <class Acc, int N>
__global__ void clear_raced(Reduction r, Segments s, Acc* sums) {
  for_places(r.outer, r.inner / N, [&](int64_t v, int64_t place) {
    if (list_of(r, s.start[v + 1] - s.start[v]) < 0) return;
    Pack<Acc, N> none;
#pragma unroll
    for (int c = 0; c < N; ++c) none.at[c] = Acc(-0.0f);
    store(sums + v * r.inner + place * N, none);
  });
}

template <int N, class Acc>
__device__ void atomic_add(Acc* to, const Acc* x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<Acc, float> && N % 4 == 0) {    // four atomic additions, in one instruction
#pragma unroll
    for (int c = 0; c < N; c += 4)
      atomicAdd(reinterpret_cast<float4*>(to + c), make_float4(x[c], x[c + 1], x[c + 2], x[c + 3]));
  } else
#endif
    for (int c = 0; c < N; ++c) atomicAdd(to + c, x[c]);
}

// The groups of the raced rows that are in no list: the k-th place of `position` stands for the group of its number, so
// that the groups of one row are in flight together.
template <class T, class Acc, int N>
__global__ void __launch_bounds__(kThreads)
    race_few(Reduction r, Segments s, const T* __restrict__ source, Acc* sums) {
  for_places(r.terms, r.inner / N, [&](int64_t k, int64_t place) {
    const int64_t v = s.index[s.position[k]], d = place * N;
    if (v < 0 || v >= r.outer) return;
    const int64_t first = s.start[v], n = s.start[v + 1] - first, count = min(n, r.groups), g = k - first;
    if (list_of(r, n) != kRaced || g < 0 || g >= count) return;
    const Group group = n == count ? Group{g, 1} : Groups(n, count)[g];
    few_groups<1, N, Acc>(source + d, s.position + first + group.begin, group.size, 1, r.inner,
                          [&](int64_t, const Acc* sum) { atomic_add<N>(sums + v * r.inner + d, sum); });
  });
}

// input + the groups of every output, one after the other or shuffled; or input + what was raced into sums, which may
// be out.
template <class T, class Acc, int N, bool SHUFFLED>
__global__ void __launch_bounds__(kThreads, (SHUFFLED ? 4 : 5) - (N > 4))   // blocks that hardly spill
    add_rows(Reduction r, Segments s, Places places, const T* __restrict__ input, const T* __restrict__ source,
             Acc* partial, const Acc* sums, T* out) {
  const Key key{r.seed, r.device_step ? uint32_t(*r.device_step) : r.step, r.op};
  for_places(r.outer, r.inner / N, [&](int64_t v, int64_t place) {
    const int64_t d = place * N, o = v * r.inner + d, first = s.start[v], n = s.start[v + 1] - first;
    const int64_t count = min(n, r.groups);
    Pack<T, N> row = load<N>(input + o);
    if (n == 0) return store(out + o, row);
    const bool shuffled = SHUFFLED && count > 2;   // two sums are the same in any order
    Acc kept[kKept * N];
    Acc* const group = SHUFFLED && count <= kKept ? kept : partial + first * r.inner + d;
    const int64_t apart = SHUFFLED && count <= kKept ? N : r.inner;
    Sums<N, Acc> sum;
    const auto take = [&](int64_t g, const Acc* x) {
      if (shuffled) {
#pragma unroll
        for (int c = 0; c < N; ++c) group[g * apart + c] = x[c];
      } else {
        sum.add(x);
      }
    };
    if (list_of(r, n) < 0) {
      few_groups<kAhead, N, Acc>(source + d, s.position + first, n, r.groups, r.inner, take);
    } else if (sums) {
      take(0, load<N>(sums + o).at);
    } else {
      const Acc* const p = partial + places.at(v, first) * r.inner + d;
      for (int64_t g = 0; g < count; ++g) take(g, load<N>(p + g * r.inner).at);
    }
    if (shuffled) {
#pragma unroll 1
      for (int c = 0; c < N; ++c) shuffle(group + c, int(count), apart, key, r.per_output ? uint64_t(o + c) : 0);
      for (int64_t g = 0; g < count; ++g) sum.add(group + g * apart);
    }
    sum.add_to(row);
    store(out + o, row);
  });
}

// The order "exact": one thread a pack of columns of a row whose sum IEEE 754 rounds once. Of longer rows the same
// threads take the columns one by one.
template <class T, class Acc, int N>
__global__ void __launch_bounds__(kThreads)
    add_exact(Reduction r, Segments s, const T* __restrict__ input, const T* __restrict__ source, T* out) {
  for_places(r.outer, r.inner / N, [&](int64_t v, int64_t place) {
    const int64_t first = s.start[v], n = s.start[v + 1] - first;
    if (list_of(r, n) >= 0) return;
    if (n <= 2) {   // Acc has twice the bits of a half type and two more, so that rounding to both is rounding once
      const int64_t d = place * N, o = v * r.inner + d;
      Pack<T, N> row = load<N>(input + o);
      if (n == 0) return store(out + o, row);
      Sums<N, Acc> sum;
      groups_of<1, 2, N, Acc>(source + d, s.position + first, n, n, r.inner,
                              [&](int64_t, const Acc* x) { sum.add(x); });
      sum.add_to(row);
      return store(out + o, row);
    }
    const int64_t here = place - threadIdx.x, threads = min(int64_t(blockDim.x), r.inner / N - here);
#pragma unroll 1
    for (int c = 0; c < N; ++c) {
      const int64_t d = here * N + threadIdx.x + c * threads, o = v * r.inner + d;
      const T sum = sum_of_few<T>(n, [&](int64_t i) { return double(source[s.position[first + i] * r.inner + d]); });
      out[o] = T(Acc(input[o]) + Acc(sum));
    }
  });
}

// The order "exact" of the rows in the list: a block for one column, or (ACROSS) for 32. Where that makes few blocks,
// several share the terms of a row, and `whole`, zeros before, gathers their sums.
template <class T, class Acc, bool ACROSS>
__global__ void __launch_bounds__(kLongWarps * kLanes, 2)
    add_exact_long(Reduction r, Segments s, Lists lists, const T* input, const T* source, T* out, Exact* whole) {
  constexpr int kOutputs = ACROSS ? kLanes : 1;
  constexpr int64_t kLeast = kExactPiece / kOutputs * (kLongWarps / kExactWarps);   // as much for a warp as there
  __shared__ Exact shared[kOutputs];
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  const int64_t columns = (r.inner + kOutputs - 1) / kOutputs;
  const int64_t all = columns * lists.count[1], share = max(int64_t{1}, kSharing / max(int64_t{1}, all));
  for (int64_t job = blockIdx.x; job < all * share; job += gridDim.x) {
    const int64_t k = job % all, v = lists.rows[1][k / columns], first = k % columns * kOutputs;
    const int64_t n = s.start[v + 1] - s.start[v], d = first + (ACROSS ? threadIdx.x : 0);
    const int64_t piece = max(kLeast, (n + share - 1) / share);
    const int64_t pieces = (n + piece - 1) / piece, begin = job / all * piece;
    if (begin >= n) continue;
    const int64_t* position = s.position + s.start[v];
    add_exactly<ACROSS>(shared, d < r.inner, begin, min(n, begin + piece),
                        [&](int64_t i) { return double(source[position[i] * r.inner + d]); });
    const int outputs = int(min(int64_t{kOutputs}, r.inner - first));
    const bool complete = pieces == 1 || gather<kOutputs, kLongWarps>(shared, whole + k * kOutputs, outputs, pieces);
    const int64_t o = v * r.inner + first + thread;
    if (complete && thread < outputs) out[o] = T(Acc(input[o]) + Acc(shared[thread].template rounded<T>()));
    __syncthreads();
  }
}

template <class T>
constexpr ScalarType accumulated = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
struct Sum {
  using Acc = typename AccType<T>::type;
  const Reduction& r;
  const Tensor& x;
  Tensor& out;
  cudaStream_t stream;

  Tensor scratch(int64_t n) const { return torch::stable::new_empty(x, {n}, accumulated<T>); }

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
    const int64_t columns = ACROSS ? (r.outputs() + kLanes - 1) / kLanes : r.outputs();
    const int64_t items = (columns * r.groups + per_block - 1) / per_block;
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
    if (across) return sum_rows<true>(rows, terms);
    switch (rows.rows > 1 ? 0 : lanes) {
      case 1: return short_rows<1>(rows, terms);
      case 2: return short_rows<2>(rows, terms);
      case 4: return short_rows<4>(rows, terms);
      case 8: return short_rows<8>(rows, terms);
      case 16: return short_rows<16>(rows, terms);
      case 32: return short_rows<32>(rows, terms);
      default: return sum_rows<false>(rows, terms);
    }
  }

  template <int LANES>
  Tensor short_rows(const Rows& rows, const T* terms) const {
    constexpr int threads = 256;
    Tensor sums = scratch(rows.tasks);
    short_sums<LANES, T, Acc><<<grid(rows.tasks, threads), threads, 0, stream>>>(
        rows, terms, static_cast<Acc*>(sums.mutable_data_ptr()));
    check(cudaGetLastError());
    return sums;
  }

  template <class P>
  void add(const Partials& p, P* partial) const {
    constexpr int threads = 256;
    T* result = static_cast<T*>(out.mutable_data_ptr());
    const int blocks = grid(p.outputs, threads);
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
    Tensor sums = std::is_same_v<T, Acc> ? out : torch::stable::new_empty(out, out.sizes(), accumulated<T>);
    torch::stable::fill_(sums, -0.0);
    race<P, Acc><<<grid((p.outputs + threads - 1) / threads * p.groups), threads, 0, stream>>>(
        p, partial, static_cast<Acc*>(sums.mutable_data_ptr()));
    check(cudaGetLastError());
    if (!std::is_same_v<T, Acc>) torch::stable::copy_(out, sums);
  }

  template <int TOGETHER>
  void few() const {
    constexpr int threads = 128, each = threads / TOGETHER;
    exact_few<T, TOGETHER><<<grid(r.outputs(), each), threads, 0, stream>>>(
        r, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()));
    check(cudaGetLastError());
  }

  template <bool ACROSS>
  void exact() const {
    if (r.terms <= (ACROSS ? kFew : kFewAlone)) return few<1>();
    if (!ACROSS && r.terms <= kFew) return few<kFewThreads>();
    if (!ACROSS && r.terms <= kFewOfWarp) return few<kLanes>();
    const int64_t columns = ACROSS ? (r.outputs() + kLanes - 1) / kLanes : r.outputs();
    // Few outputs: blocks share their terms.
    const int64_t most = std::max<int64_t>(1, (1 << 12) / columns);
    const int64_t piece = std::max(ACROSS ? kExactPiece / kLanes : kExactPiece, (r.terms + most - 1) / most);
    const int64_t pieces = (r.terms + piece - 1) / piece;
    Tensor sums = torch::stable::new_empty(x, {pieces == 1 ? 0 : r.outputs() * kWords}, ScalarType::Long);
    if (pieces > 1) sums = torch::stable::zero_(sums);
    exact_sums<T, ACROSS><<<grid(columns * pieces), dim3(kLanes, kExactWarps), 0, stream>>>(
        r, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
        static_cast<Exact*>(sums.mutable_data_ptr()), piece, pieces);
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

// Threads for rows of so many places, for for_places.
dim3 block_for(int64_t places) {
  const int64_t blocks = (places + kThreads - 1) / kThreads, width = (places + blocks - 1) / blocks;
  return dim3(unsigned(width), unsigned(kThreads / width));
}

int grid_for(int64_t rows, int64_t places) {
  const dim3 block = block_for(places);
  return grid((places + block.x - 1) / block.x * ((rows + block.y - 1) / block.y));
}

// N: columns in a pack.
template <class T, int N>
void index_add(Reduction r, const Segments& s, const Tensor& input, const Tensor& source, Tensor& out,
               cudaStream_t stream) {
  using Acc = typename AccType<T>::type;
  const T *in = static_cast<const T*>(input.const_data_ptr()), *terms = static_cast<const T*>(source.const_data_ptr());
  T* result = static_cast<T*>(out.mutable_data_ptr());
  const bool exact = r.order == Order::exact, race = r.order == Order::atomic;
  r.groups = std::clamp<int64_t>(r.terms, 1, r.groups);

  // Most rows in both lists and in that of the long ones.
  const int64_t most = std::min(r.outer, r.terms / ((exact ? kFew : kRows * r.groups) + 1));
  const int64_t most_long = std::min(r.outer, r.terms / ((exact ? kFew : kAlone * r.groups) + 1));
  Tensor memory = torch::stable::new_empty(input, {2 + 2 * most}, ScalarType::Long);
  int64_t* const begin = static_cast<int64_t*>(memory.mutable_data_ptr());
  const Lists lists{begin, {begin + 2, begin + 2 + most}};
  if (most > 0) {
    Tensor counts = torch::stable::narrow(memory, 0, 0, 2);
    torch::stable::zero_(counts);
    plan<<<grid(r.outer, kThreads), kThreads, 0, stream>>>(r, s, lists);
    check(cudaGetLastError());
  }
  // Blocks where only a list knows how much there is to do.
  const auto busy = [](int64_t jobs) { return grid(std::min<int64_t>(1 << 12, jobs)); };
  const int64_t places = r.inner / N;
  const int blocks = grid_for(r.outer, places);
  if (exact) {
    add_exact<T, Acc, N><<<blocks, block_for(places), 0, stream>>>(r, s, in, terms, result);
    check(cudaGetLastError());
    if (most == 0) return;
    const dim3 block(kLanes, kLongWarps);
    const bool across = r.inner >= kNarrowest;
    const int64_t jobs = (across ? (r.inner + kLanes - 1) / kLanes : r.inner) * most;
    const int some = busy(std::max(jobs, kSharing));
    const int64_t shared = std::min(jobs, kSharing / 2);   // where there are more, each has a block to itself
    Tensor sums = torch::stable::new_zeros(input, {shared * (across ? kLanes : 1) * kWords}, ScalarType::Long);
    Exact* const whole = static_cast<Exact*>(sums.mutable_data_ptr());
    if (across)
      add_exact_long<T, Acc, true><<<some, block, 0, stream>>>(r, s, lists, in, terms, result, whole);
    else
      add_exact_long<T, Acc, false><<<some, block, 0, stream>>>(r, s, lists, in, terms, result, whole);
    return check(cudaGetLastError());
  }
  const bool all = r.order == Order::shuffled && r.groups > kKept;   // rows in no list, too, are shuffled in memory
  const int shift = std::bit_width(uint64_t(kRows * r.groups)) - 1;
  const int64_t rows = most > 0 ? std::min(r.outer, r.terms >> shift) : 0;
  const Places at{all ? 0 : rows == r.outer ? -1 : shift, all ? 1 : r.groups};
  const int64_t room = race ? (std::is_same_v<T, Acc> ? 0 : r.outputs()) : (all ? r.terms : rows * r.groups) * r.inner;
  Tensor scratch = torch::stable::new_empty(input, {room}, accumulated<T>);
  Acc* partial = static_cast<Acc*>(scratch.mutable_data_ptr());
  Acc* sums = race ? partial : nullptr;
  if constexpr (std::is_same_v<T, Acc>)
    if (race) sums = result;
  if (race) {
    clear_raced<Acc, N><<<blocks, block_for(places), 0, stream>>>(r, s, sums);
    check(cudaGetLastError());
    race_few<T, Acc, N><<<grid_for(r.terms, places), block_for(places), 0, stream>>>(r, s, terms, sums);
    check(cudaGetLastError());
  }
  if (most > 0) {
    const int some = busy(grid_for(most * r.groups, r.inner));
    group_sums<T, Acc><<<some, block_for(r.inner), 0, stream>>>(r, s, lists, at, terms, partial, sums);
    check(cudaGetLastError());
  }
  if (most_long > 0) {
    int width = 1;
    while (width < kLanes && width < r.inner) width *= 2;
    const int64_t jobs = (r.inner + width - 1) / width * most_long * r.groups;
    const int few = grid(std::min<int64_t>(1 << 9, jobs));   // each has a multiprocessor to itself
    long_sums<T, Acc><<<few, dim3(width, kLongThreads / width), 0, stream>>>(r, s, lists, at, terms, partial, sums);
    check(cudaGetLastError());
  }
  if (r.order == Order::shuffled)
    add_rows<T, Acc, N, true><<<blocks, block_for(places), 0, stream>>>(r, s, at, in, terms, partial, sums, result);
  else
    add_rows<T, Acc, N, false><<<blocks, block_for(places), 0, stream>>>(r, s, at, in, terms, partial, sums, result);
  check(cudaGetLastError());
}

}  // namespace

void sum_cuda(const Reduction& r, const Tensor& x, Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  for_type(x.scalar_type(), [&]<class T>(T) { Sum<T>{r, x, out, stream_of(x)}.run(); });
}

void add_partials_cuda(const Reduction& r, const Apart& p, ScalarType type, Tensor& out) {
  static_assert(Apart::kMost <= kShuffled);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  cudaStream_t stream = stream_of(out);
  constexpr int threads = 256, last = Apart::kAxes - 1;
  const Key key{r.seed, r.step, r.op};
  const auto launch = [&]<class P, class T>(P, T) {
    using Acc = typename AccType<T>::type;
    constexpr int N = sizeof(P) == 8 ? 2 : 4;
    bool aligned = p.stride[last] == 1 && p.size[last] % N == 0;
    for (int a = 0; a < last; ++a) aligned &= p.stride[a] % N == 0;
    for (int64_t g = 0; g < r.groups; ++g) aligned &= reinterpret_cast<uintptr_t>(p.data[g]) % (N * sizeof(P)) == 0;
    const uint32_t count = uint32_t(r.outer);
    T* result = static_cast<T*>(out.mutable_data_ptr());
    const bool shuffled = r.order == Order::shuffled;
    if (aligned)
      add_apart<N, P, Acc, T><<<grid(count / N, threads), threads, 0, stream>>>(
          p, int(r.groups), count, result, shuffled, r.per_output, key, r.device_step);
    else
      add_apart<1, P, Acc, T><<<grid(count, threads), threads, 0, stream>>>(
          p, int(r.groups), count, result, shuffled, r.per_output, key, r.device_step);
    check(cudaGetLastError());
  };
  for_type(type, [&]<class P>(P some) {
    if (out.scalar_type() == type) return launch(some, some);
    if constexpr (sizeof(P) == 2) launch(some, float());
  });
}

void philox_cuda(const Reduction& r, Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  cudaStream_t stream = stream_of(out);
  constexpr int threads = 256;
  words<<<grid(out.size(1), threads), threads, 0, stream>>>(
      out.size(1), Key{r.seed, r.step, r.op}, r.device_step, static_cast<int64_t*>(out.mutable_data_ptr()));
  check(cudaGetLastError());
}

void index_add_cuda(const Reduction& r, const Tensor& input, const Tensor& index, const Tensor& source,
                    const Tensor* segments, Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const int64_t* const start = static_cast<const int64_t*>(segments->const_data_ptr());
  const Segments s{static_cast<const int64_t*>(index.const_data_ptr()), start, start + r.outer + 1};
  bool packs = true;   // contiguous views may begin anywhere
  for (const Tensor* x : {&input, &source, static_cast<const Tensor*>(&out)})
    packs &= reinterpret_cast<uintptr_t>(x->const_data_ptr()) % kPackBytes == 0;
  for_type(input.scalar_type(), [&]<class T>(T) {
    constexpr int pack = kPackBytes / sizeof(T);
    if (packs && r.inner % pack == 0) index_add<T, pack>(r, s, input, source, out, stream_of(input));
    else index_add<T, 1>(r, s, input, source, out, stream_of(input));
  });
}

}  // namespace ordered
