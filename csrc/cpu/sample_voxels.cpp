// A uniform sample of voxels of each class, and the features of sampled voxels.
//
// Of n candidates, the k with the smallest priorities are drawn. Only candidates with a priority below
// (k + 8 sqrt k + 16) / n 2^32 are kept: a margin of 8 standard deviations. If fewer than k are kept, the pass is
// repeated with a larger bound. One byte per voxel.
#include <array>
#include <cmath>

#include "kernels.h"
#include "../voxel_math.h"

namespace sslfast {
namespace {

struct Candidate {
  uint32_t priority;
  int64_t voxel;
  bool operator<(const Candidate& other) const {
    return priority != other.priority ? priority < other.priority : voxel < other.voxel;
  }
};

// The candidates of each class below its bound; the bits of `wanted` select classes. It first lists the candidates of a
// chunk, then computes 16 priorities at a time, so that the cost grows with the number of candidates.
void collect(const uint8_t* flags, int64_t voxels, int classes, uint64_t seed, uint32_t step, bool negatives,
             uint64_t first, const std::array<uint64_t, kMaxClasses>& bounds, uint32_t wanted,
             std::vector<Candidate>* collected) {
  const int64_t chunks = chunks_of(1, voxels);
  std::vector<std::array<std::vector<Candidate>, kMaxClasses>> of_chunk(chunks);
  parallel(chunks, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk;
    const int count = int(std::min(kChunk, voxels - begin));
    uint16_t members_at[kChunk + kLanes];
    for (int c = 0; c < classes; ++c) {
      if (!(wanted >> c & 1)) continue;
      bool candidate[256];
      for (int s = 0; s < 256; ++s)
        candidate[s] = ((s & kReliable) != 0) == negatives && ((s & kClass) == c) != negatives;
      int members = 0;
#pragma GCC unroll 8  // the loop is so small that its place in memory decides its speed
      for (int v = 0; v < count; ++v) {
        members_at[members] = uint16_t(v);
        members += candidate[flags[begin + v]];
      }
      for (int i = 0; i < members; i += kLanes) {
        const uint64_t counted_from = first + uint64_t(begin);
        const Words low = convert<uint32_t>(load(members_at + i)) + uint32_t(counted_from);
        const Words carry = convert<uint32_t>(low < uint32_t(counted_from));  // 0 or -1 per lane
        const Words priority =
            voxel_priority(low, uint32_t(counted_from >> 32) - carry, seed, step, uint32_t(2 * c + negatives));
        const bool all = bounds[c] >> 32;
        if (!all && !any(priority < uint32_t(bounds[c]))) continue;
        for (int v = 0; v < std::min(kLanes, members - i); ++v)
          if (all || priority[v] < bounds[c]) of_chunk[chunk][c].push_back({priority[v], begin + members_at[i + v]});
      }
    }
  });
  for (int c = 0; c < classes; ++c)
    if (wanted >> c & 1) {
      collected[c].clear();
      for (const auto& chunk : of_chunk) collected[c].insert(collected[c].end(), chunk[c].begin(), chunk[c].end());
    }
}

}  // namespace

void sample_voxels(const uint8_t* flags, int64_t voxels, const int64_t* quotas, int classes, uint64_t seed,
                   uint32_t step, bool negatives, uint64_t first, int64_t capacity, int64_t* indices, int64_t* counts) {
  // four counters per value, in turns: increments of one counter wait for each other
  std::vector<uint64_t> bytes =
      count_in_parallel<uint64_t>(chunks_of(1, voxels), 4 * 256, [&](int64_t chunk, uint32_t* counts) {
        const int64_t end = std::min((chunk + 1) * kChunk, voxels);
        int64_t i = chunk * kChunk;
        for (; i + 4 <= end; i += 4)
          for (int turn = 0; turn < 4; ++turn) ++counts[turn * 256 + flags[i + turn]];
        for (; i < end; ++i) ++counts[flags[i]];
      });
  int64_t members[kMaxClasses] = {}, all = 0;
  for (int i = 0; i < 4 * 256; ++i)
    if (((i & kReliable) != 0) == negatives) members[i & kClass] += int64_t(bytes[i]), all += int64_t(bytes[i]);

  std::array<uint64_t, kMaxClasses> bounds{};
  int64_t candidates[kMaxClasses];
  uint32_t wanted = 0;
  for (int c = 0; c < classes; ++c) {
    candidates[c] = negatives ? all - members[c] : members[c];
    counts[c] = std::min(quotas[c], candidates[c]);
    double expected = double(quotas[c]) + 8 * std::sqrt(double(quotas[c])) + 16;
    bounds[c] = uint64_t(std::min(1.0, expected / double(std::max<int64_t>(candidates[c], 1))) * 4294967296.0);
    if (counts[c]) wanted |= 1u << c;
  }
  std::vector<Candidate> collected[kMaxClasses];
  while (wanted) {
    collect(flags, voxels, classes, seed, step, negatives, first, bounds, wanted, collected);
    for (int c = 0; c < classes; ++c) {
      if (!(wanted >> c & 1)) continue;
      if (int64_t(collected[c].size()) >= counts[c])
        wanted &= ~(1u << c);
      else
        bounds[c] = std::min<uint64_t>(4 * bounds[c], uint64_t(1) << 32);
    }
  }
  std::fill(indices, indices + classes * capacity, -1);
  for (int c = 0; c < classes; ++c) {
    if (!counts[c]) continue;
    auto end = collected[c].begin() + counts[c];
    std::nth_element(collected[c].begin(), end - 1, collected[c].end());
    int64_t* row = indices + c * capacity;
    for (auto it = collected[c].begin(); it != end; ++it) *row++ = it->voxel;
    std::sort(indices + c * capacity, row);
  }
}

void gather_voxels(const VoxelMap& features, const int64_t* indices, int64_t count, float* rows) {
  const int64_t width = features.channels;
  for (int64_t i = 0; i < count; ++i) {
    if (!is_voxel(features, indices[i]))
      std::fill(rows + i * width, rows + (i + 1) * width, indices[i] == -1 ? 0.f : NAN);
    else
      load_voxel(features, indices[i] / features.voxels, indices[i] % features.voxels, rows + i * width);
  }
}

void gather_voxels_backward(const float* rows, const int64_t* indices, int64_t count, const VoxelMap& grad) {
  const int64_t width = grad.channels;
  std::vector<float> total(width);
  std::vector<std::pair<int64_t, int64_t>> voxel_rows;  // (voxel, row): rows of a voxel add up in their order
  for (int64_t i = 0; i < count; ++i)
    if (is_voxel(grad, indices[i])) voxel_rows.emplace_back(indices[i], i);
  std::sort(voxel_rows.begin(), voxel_rows.end());
  for (size_t i = 0; i < voxel_rows.size();) {
    int64_t voxel = voxel_rows[i].first;
    load_voxel(grad, voxel / grad.voxels, voxel % grad.voxels, total.data());
    for (; i < voxel_rows.size() && voxel_rows[i].first == voxel; ++i)
      for (int64_t k = 0; k < width; ++k) total[k] += rows[voxel_rows[i].second * width + k];
    store_voxel(grad, voxel / grad.voxels, voxel % grad.voxels, total.data());
  }
}

}  // namespace sslfast
