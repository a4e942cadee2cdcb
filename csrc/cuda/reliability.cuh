// What a block does for the exact percentiles of `reliability`: two passes that count digits of the entropies' bits.
#pragma once

#include "voxels.cuh"

namespace sslfast::cuda {

constexpr uint32_t kNanKey = kHighBins - 1;
constexpr int kCounterWords = (kHighBins + 1) / 2;  // a block's counters of 16 bits, two a word
constexpr int kMostCounted = 65535;

__device__ inline uint32_t bits_of(float entropy) { return __float_as_uint(entropy) & 0x7fffffffu; }  // a NaN may carry a sign

template <int kMost>
__device__ float entropy_of(const float (&z)[kMost], int classes) {
  float e[kMost], highest;
  const float total = exp_shifted<kMost>(z, classes, e, highest);
  return entropy<kMost>(z, classes, e, highest, total);
}

// Finds the bins of both order statistics among a group's counts. For a whole block.
__device__ inline void find_bins(const uint32_t* counts, double percentile, Rank* rank) {
  constexpr int kShare = (kHighBins + kThreads - 1) / kThreads;
  const int first = int(threadIdx.x) * kShare, end = first + kShare < kHighBins ? first + kShare : kHighBins;
  unsigned long long own = 0, total;
  for (int i = first; i < end; ++i) own += __ldcg(counts + i);
  const unsigned long long before = sum_before(own, total);
  const int64_t last = total ? int64_t(total) - 1 : 0;
  const double position = percentile / 100 * double(last);
  const int64_t low = int64_t(floor(position)) < last ? int64_t(floor(position)) : last;
  const int64_t high = low + 1 < last ? low + 1 : last;
  for (int k = 0; k < 2; ++k) {
    unsigned long long upto = before;
    const unsigned long long wanted = k ? high : low;
    if (wanted < before || wanted >= before + own) continue;
    for (int i = first; i < end; ++i) {
      const uint32_t count = __ldcg(counts + i);
      if (wanted < upto + count) {
        rank->bin[k] = i;
        rank->rest[k] = int64_t(wanted - upto);
        break;
      }
      upto += count;
    }
  }
  if (threadIdx.x == 0) {
    rank->fraction = position - double(low);
    rank->kind = total == 0 ? 1 : __ldcg(counts + kNanKey) > 0 ? 2 : 0;
    if (total == 0) rank->bin[0] = rank->bin[1] = kNanKey;
  }
}

// The order statistics themselves, and the threshold between them. For a whole block.
__device__ inline void find_threshold(const uint32_t* low, const Rank& rank, float* threshold) {
  constexpr int kShare = kLowBins / kThreads;
  __shared__ float values[2];
  const int first = int(threadIdx.x) * kShare;
  for (int k = 0; k < 2 && rank.kind == 0; ++k) {
    const uint32_t* counts = low + (rank.bin[1] == rank.bin[0] ? 0 : k) * kLowBins;
    unsigned long long own = 0, total;
    for (int i = first; i < first + kShare; ++i) own += __ldcg(counts + i);
    unsigned long long upto = sum_before(own, total);
    const unsigned long long wanted = rank.rest[k];
    if (wanted < upto || wanted >= upto + own) continue;
    for (int i = first; i < first + kShare; ++i) {
      upto += __ldcg(counts + i);
      if (wanted < upto) {
        values[k] = __uint_as_float(rank.bin[k] << kLowBits | uint32_t(i));
        break;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const double a = values[0], b = values[1], fraction = rank.fraction;
    const double between = fraction < 0.5 ? a + (b - a) * fraction : b - (b - a) * (1 - fraction);
    *threshold = rank.kind == 1 ? 0.f : rank.kind == 2 ? nanf("") : float(fraction <= 0 ? a : between);
  }
  __syncthreads();
}

// Writes the keys of one network's entropies and counts them; the last block finds the ranks' bins.
template <int kMost>
__device__ void count_high(const Percentile& p, int network, int block, int blocks) {
  constexpr int kV = kVoxels<kMost>;
  const Map& map = p.maps[network];
  const int classes = kMost == 2 ? 2 : int(map.channels);
  uint16_t* keys = p.keys + network * map.volumes * map.voxels;
  uint32_t* counts = p.high + int64_t(network) * p.groups * kHighBins;
  uint32_t* own = reinterpret_cast<uint32_t*>(dynamic_shared);
  const auto flush = [&] {
    __syncthreads();
    for (int i = int(threadIdx.x); i < kCounterWords; i += kThreads) {
      if (own[i] & 0xffff) atomicAdd(counts + 2 * i, own[i] & 0xffff);
      if (own[i] >> 16) atomicAdd(counts + 2 * i + 1, own[i] >> 16);
      own[i] = 0;
    }
    __syncthreads();
  };
  if (p.groups == 1) {
    for (int i = int(threadIdx.x); i < kCounterWords; i += kThreads) own[i] = 0;
    __syncthreads();
  }
  int counted = 0;
  for_each_tile<kV>(map, block, blocks, [&](int64_t volume, int64_t voxel) {
    float z[kV][kMost];
    load_voxels(map, volume, voxel, classes, z);
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const bool inside = voxel + v < map.voxels;
      const uint32_t bits = bits_of(entropy_of<kMost>(z[v], classes)) >> kLowBits;
      const uint32_t key = bits < kNanKey ? bits : kNanKey;
      if (inside) keys[volume * map.voxels + voxel + v] = uint16_t(key);
      if (p.groups == 1) {
        count_bin(inside, key, [&](unsigned number) { atomicAdd(own + key / 2, number << (key % 2 * 16)); });
      } else {
        const uint32_t bin = uint32_t(argmax<kMost>(z[v], classes)) * kHighBins + key;
        count_bin(inside, bin, [&](unsigned number) { atomicAdd(counts + bin, number); });
      }
    }
    counted += kThreads * kV;
    if (p.groups == 1 && counted > kMostCounted - kThreads * kV) {
      flush();
      counted = 0;
    }
  });
  if (p.groups == 1) flush();
  if (!is_last(p.tickets + network, blocks)) return;
  for (int g = 0; g < p.groups; ++g) find_bins(counts + int64_t(g) * kHighBins, p.percentile, p.ranks + network * p.groups + g);
}

// Counts the lower bits of the ranks' bins; the last block finds the thresholds.
template <int kMost>
__device__ void count_low(const Percentile& p, int network, int block, int blocks) {
  constexpr int kV = 4;
  const Map& map = p.maps[network];
  const int classes = kMost == 2 ? 2 : int(map.channels);
  const uint16_t* keys = p.keys + network * map.volumes * map.voxels;
  const Rank* ranks = p.ranks + network * p.groups;
  uint32_t* counts = p.low + int64_t(network) * p.groups * 2 * kLowBins;
  const uint32_t bins[2] = {ranks[0].bin[0], ranks[0].bin[1]};
  for_each_tile<kV>(map, block, blocks, [&](int64_t volume, int64_t voxel) {
    uint32_t key[kV];
#pragma unroll
    for (int v = 0; v < kV; ++v)
      key[v] = voxel + v < map.voxels ? keys[volume * map.voxels + voxel + v] : kNanKey;
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      bool member = key[v] != kNanKey && (p.groups > 1 || key[v] == bins[0] || key[v] == bins[1]);
      if (!__any_sync(kAllLanes, member)) continue;
      float z[1][kMost] = {};
      if (member) load_voxels(map, volume, voxel + v, classes, z);
      const uint32_t low = bits_of(entropy_of<kMost>(z[0], classes)) & (kLowBins - 1);
      const int group = p.groups > 1 ? int(argmax<kMost>(z[0], classes)) : 0;
      const Rank& rank = ranks[group];
      member = member && (key[v] == rank.bin[0] || key[v] == rank.bin[1]);
      const uint32_t bin = (2 * group + (key[v] != rank.bin[0])) * kLowBins + low;
      count_bin(member, bin, [&](unsigned number) { atomicAdd(counts + bin, number); });
    }
  });
  if (!is_last(p.tickets + 2 + network, blocks)) return;
  for (int g = 0; g < p.groups; ++g)
    find_threshold(counts + int64_t(g) * 2 * kLowBins, ranks[g], p.thresholds + network * p.groups + g);
}

}  // namespace sslfast::cuda
