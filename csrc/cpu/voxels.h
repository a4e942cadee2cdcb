// Voxel maps of any floating-point dtype and layout, read and written as tiles of floats; and their division into
// chunks for threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../arguments.h"
#include "vec.h"

namespace sslfast {

constexpr int kTile = 256;        // voxels per tile; tile[c * kTile + v]
constexpr int64_t kChunk = 8192;  // voxels per task; its sums are float, and chunks are added up in double, in order

constexpr int kUnroll = 4;

// Loads voxels first .. first + count of a volume as floats; from count up to a multiple of 64, the tile is 0.
void load_tile(const VoxelMap& map, int64_t volume, int64_t first, int count, float* tile);
// The reverse of load_tile; rounds once.
void store_tile(const VoxelMap& map, int64_t volume, int64_t first, int count, const float* tile);
// The same for logits computed from features. From count up to a multiple of 16, a loaded tile is finite, and the tile
// of a gradient must be 0.
void load_linear_tile(const VoxelMap& map, int64_t volume, int64_t first, int count, float* tile);
void store_linear_tile(const VoxelMap& map, int64_t volume, int64_t first, int count, const float* tile);

// One voxel's channels as floats.
void load_voxel(const VoxelMap& map, int64_t volume, int64_t voxel, float* row);
void store_voxel(const VoxelMap& map, int64_t volume, int64_t voxel, const float* row);

// Calls body(i) for i in 0 .. count - 1, on the threads of torch.set_num_threads.
void run_parallel(int64_t count, void (*body)(void*, int64_t), void* context);
int64_t num_threads();

template <class Body>
void parallel(int64_t count, const Body& body) {
  run_parallel(
      count, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64_t chunks_of(int64_t volumes, int64_t voxels) { return volumes * ((voxels + kChunk - 1) / kChunk); }

// Calls body(volume, first, count) for each tile of a chunk.
template <class Body>
void for_each_tile(int64_t chunk, int64_t voxels, const Body& body) {
  int64_t a_volume = (voxels + kChunk - 1) / kChunk;
  int64_t volume = chunk / a_volume, begin = chunk % a_volume * kChunk, end = std::min(begin + kChunk, voxels);
  for (int64_t first = begin; first < end; first += kTile)
    body(volume, first, int(std::min<int64_t>(kTile, end - first)));
}

// Histograms with one set of counters per thread; the order of integer additions does not matter.
template <class Count, class Body>
std::vector<Count> count_in_parallel(int64_t chunks, size_t bins, const Body& body) {
  int64_t slots = std::min(std::max<int64_t>(chunks, 1), num_threads());
  std::vector<std::vector<uint32_t>> slot_counts(slots);
  parallel(slots, [&](int64_t slot) {
    slot_counts[slot].assign(bins, 0);
    for (int64_t chunk = slot; chunk < chunks; chunk += slots) body(chunk, slot_counts[slot].data());
  });
  std::vector<Count> total(bins, 0);
  for (const auto& counts : slot_counts)
    for (size_t i = 0; i < bins; ++i) total[i] += counts[i];
  return total;
}

}  // namespace sslfast
