// Sorting the index of index_add on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "require.h"

namespace ordered {

// Throws where one of the n numbers of index is not in [0, size). A sign tells, which needs no branch for each.
inline void check_range(const int64_t* index, int64_t n, int64_t size) {
  uint64_t signs = 0;
  for (int64_t i = 0; i < n; ++i) signs |= uint64_t(index[i]) | (uint64_t(size) - 1 - uint64_t(index[i]));
  for (int64_t i = 0; int64_t(signs) < 0 && i < n; ++i)
    require(0 <= index[i] && index[i] < size, "index out of range: ", index[i]);
}

// Sorts 0 ... n - 1, i by index[i] in [0, size), by counting: those with value v get the places start[v] ...
// start[v + 1] - 1, in order. to[place] is item(i).
template <class Count, class Item, class To>
void sort_by(const int64_t* index, int64_t n, int64_t size, int64_t* start, const Item& item, To* to) {
  std::vector<Count> next(size);
  for (int64_t i = 0; i < n; ++i) ++next[index[i]];
  for (int64_t v = 0, before = 0; v < size; ++v) start[v] = before, before += std::exchange(next[v], Count(before));
  for (int64_t i = 0; i < n; ++i) to[next[index[i]]++] = To(item(i));
  start[size] = n;
}

// The same by several threads. The index is read in pieces, each of which has counts of its own; a thread reads TOGETHER
// of them side by side, since the next count of a frequent value has to wait for the last.
template <int TOGETHER, class Item, class To>
void sort_pieces(const int64_t* index, int64_t n, int64_t size, int64_t pieces, int64_t* start, const Item& item,
                 To* to) {
  constexpr int64_t kLine = 64 / sizeof(uint32_t);
  const int64_t length = n / pieces / 64 * 64 - 16;   // a power of two would have all pieces share the sets of a cache
  const int64_t pitch = (size + kLine - 1) / kLine * kLine;
  std::vector<uint32_t> next(pieces * pitch);
  const auto for_all = [=, counts = next.data()](const auto& use) {
    torch::stable::parallel_for(0, pieces / TOGETHER, 1, [=](int64_t first, int64_t last) {
      for (int64_t piece = first * TOGETHER; piece < last * TOGETHER; piece += TOGETHER)
        for (int64_t i = piece * length; i < (piece + 1) * length; ++i)
          for (int64_t p = 0; p < TOGETHER; ++p) use(i + p * length, counts + (piece + p) * pitch);
    });
    for (int64_t i = pieces * length; i < n; ++i) use(i, counts + (pieces - 1) * pitch);
  };
  for_all([=](int64_t i, uint32_t* count) { ++count[index[i]]; });
  start[0] = 0;
  for (int64_t v = 0; v < size; ++v) {
    start[v + 1] = start[v];
    for (int64_t piece = 0; piece < pieces; ++piece)
      start[v + 1] += std::exchange(next[piece * pitch + v], uint32_t(start[v + 1]));
  }
  for_all([=](int64_t i, uint32_t* count) { to[count[index[i]]++] = To(item(i)); });
}

template <class Item, class To>
void sort(const int64_t* index, int64_t n, int64_t size, int64_t* start, const Item& item, To* to) {
  constexpr int64_t kMany = 1 << 15, kPieces = 32, kRun = 64;   // a run: terms of a frequent value in a piece
  const int64_t threads = std::min<int64_t>(kPieces, torch::stable::get_num_threads());
  if (n >= int64_t{1} << 32) sort_by<int64_t>(index, n, size, start, item, to);
  else if (n >= std::max(kMany, kRun * kPieces * size)) sort_pieces<4>(index, n, size, kPieces, start, item, to);
  else if (threads > 1 && n >= std::max(4 * kMany, 2 * threads * size))   // they write to the same lines
    sort_pieces<1>(index, n, size, threads, start, item, to);
  else sort_by<uint32_t>(index, n, size, start, item, to);   // more counts fit into the cache
}

// The same for n far below size, by digits, the lowest first. rows[0], rows[1], ..., as many as are returned, are the
// values there are; rows[k] stands at position[start[k]] ... position[start[k + 1] - 1] of index, in order. rows, start
// and position have room for n, n + 1 and n numbers.
inline int64_t sort_few(const int64_t* index, int64_t n, int64_t size, int64_t* rows, int64_t* start,
                        int64_t* position) {
  constexpr int kDigit = 11;   // bits
  std::vector<int64_t> key(n), before(n), places((1 << kDigit) + 1);
  for (int64_t i = 0; i < n; ++i) position[i] = i;
  for (int shift = 0; shift == 0 || (size - 1) >> shift > 0; shift += kDigit) {
    before.assign(position, position + n);
    for (int64_t i = 0; i < n; ++i) key[i] = index[before[i]] >> shift & ((1 << kDigit) - 1);
    sort(key.data(), n, 1 << kDigit, places.data(), [from = before.data()](int64_t i) { return from[i]; }, position);
  }
  int64_t count = 0;
  for (int64_t k = 0; k < n; ++k)
    if (const int64_t v = index[position[k]]; k == 0 || v != rows[count - 1]) rows[count] = v, start[count++] = k;
  start[count] = n;
  return count;
}

}  // namespace ordered
