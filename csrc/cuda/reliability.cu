// The exact entropy percentile of the unlabelled volumes, and the flags. The first pass counts the upper bits of the
// entropies (their keys); the second, the lower bits of the few whose keys are those of a wanted rank. The third
// compares keys, and recomputes only the entropies in the threshold's bin. With a given threshold, only the third pass
// runs, and reads the logits.
// Bytes per voxel for C classes of s bytes: C s read and 3 written, then 2 + 2 for keys and 2 for flags; with a given
// threshold C s + 1.
#include "voxels.cuh"

namespace sslfast::cuda {
namespace {

constexpr uint32_t kNanKey = kHighBins - 1;
constexpr int kCounterWords = (kHighBins + 1) / 2;  // a block's counters of 16 bits, two per word
constexpr unsigned kMostCounted = 65535;
#ifdef __CUDACC__
constexpr int kMostCounters = 512;  // blocks with counters in shared memory; more would mostly clear and flush them
#else
constexpr int kMostCounters = 2;  // so that a test on a CPU fills the counters of a block
#endif

__device__ uint32_t bits_of(float entropy) { return __float_as_uint(entropy) & 0x7fffffffu; }  // a NaN may carry a sign

template <int kClassCapacity>
__device__ float entropy_of(const float (&z)[kClassCapacity]) {
  float e[kClassCapacity], highest;
  const float total = exp_shifted<kClassCapacity>(z, kClassCapacity, e, highest);
  return entropy<kClassCapacity>(z, kClassCapacity, e, highest, total);
}

template <int kClassCapacity>
__device__ uint8_t class_of(const float (&z)[kClassCapacity]) {
  return uint8_t(int(argmax<kClassCapacity>(z, kClassCapacity)));
}

template <int kClassCapacity, int kVoxelsPerThread>
__device__ void load_logits(const VoxelMap& map, int64_t volume, int64_t voxel,
                            float (&z)[kVoxelsPerThread][kClassCapacity]) {
  load_voxels<kClassCapacity, kVoxelsPerThread>(map, volume, voxel, [&](int v, int c, float x) { z[v][c] = x; });
}

struct BinOfRank {
  uint32_t bin;
  uint64_t rest;  // rank within the bin
};

// The bin of a rank: first finds the thread whose bins hold the rank, then the bin among them. All
// threads of a block must call it.
template <int kBins>
__device__ BinOfRank find_bin(const uint32_t* counts, uint64_t wanted) {
  constexpr int kBinsPerThread = padded_bins(kBins) / kThreads;
  static_assert(kBinsPerThread <= kThreads && kBinsPerThread % 4 == 0,
                "a thread for each bin of a thread, loads of four");
  __shared__ BinOfRank shared_bin;
  if (threadIdx.x == 0) shared_bin = {0, 0};
  const auto search = [&](uint64_t count, uint64_t rank, uint32_t bin) {
    unsigned long long total;
    const uint64_t before = sum_before(count, total);
    if (before <= rank && rank < before + count) shared_bin = {bin, rank - before};
    __syncthreads();
    const BinOfRank result = shared_bin;
    __syncthreads();
    return result;
  };
  uint64_t count = 0;
  const uint4* bins = reinterpret_cast<const uint4*>(counts) + threadIdx.x * (kBinsPerThread / 4);
#pragma unroll 8
  for (int i = 0; i < kBinsPerThread / 4; ++i) {
    const uint4 four = __ldcg(bins + i);
    count += uint64_t(four.x) + four.y + four.z + four.w;
  }
  const BinOfRank first_bin = search(count, wanted, threadIdx.x * kBinsPerThread);
  const uint32_t bin = first_bin.bin + threadIdx.x;
  return search(int(threadIdx.x) < kBinsPerThread ? __ldcg(counts + bin) : 0, first_bin.rest, bin);
}

// Finds the bins of both order statistics. All threads of a block must call it.
__device__ void find_bins(const Reliability& r) {
  const int64_t voxels = r.logits.volumes * r.logits.voxels, last = voxels ? voxels - 1 : 0;
  const double position = *r.percentile / 100 * double(last), whole = floor(position);
  const int64_t low = whole < double(last) ? (whole > 0 ? int64_t(whole) : 0) : last,
                high = low + 1 < last ? low + 1 : last;
  const bool has_nan = __ldcg(r.high + kNanKey) > 0 || !(*r.percentile >= 0 && *r.percentile <= 100);
  if (threadIdx.x == 0) {
    r.statistics->fraction = position - double(low);
    r.statistics->kind = !voxels   ? OrderStatistics::kNoVoxel
                         : has_nan ? OrderStatistics::kHasNan
                                   : OrderStatistics::kFound;
  }
  for (int k = 0; k < 2; ++k) {
    const BinOfRank found_bin = find_bin<kHighBins>(r.high, k ? high : low);
    if (threadIdx.x == 0) r.statistics->bin[k] = found_bin.bin, r.statistics->rest[k] = found_bin.rest;
  }
}

// Finds both order statistics and the threshold. All threads of a block must call it.
__device__ void find_threshold(const Reliability& r) {
  const OrderStatistics& statistics = *r.statistics;
  double values[2];
  for (int k = 0; k < 2; ++k) {
    const uint32_t* counts = r.low + (statistics.bin[1] == statistics.bin[0] ? 0 : k) * kLowBins;
    values[k] = __uint_as_float(statistics.bin[k] << kLowBits | find_bin<kLowBins>(counts, statistics.rest[k]).bin);
  }
  if (threadIdx.x != 0) return;
  const double a = values[0], b = values[1], fraction = statistics.fraction;
  const double between = fraction < 0.5 ? a + (b - a) * fraction : b - (b - a) * (1 - fraction);
  *r.threshold = statistics.kind == OrderStatistics::kNoVoxel  ? 0.f
                 : statistics.kind == OrderStatistics::kHasNan ? nanf("")
                                                               : float(fraction <= 0 ? a : between);
}

// Writes keys and classes and counts the keys; the last block finds the bins of the order statistics.
template <int kClassCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kClassCapacity>) count_high_kernel(Reliability r) {
  constexpr int kVoxelsPerThread = kVoxelsFor<kClassCapacity>;
  const VoxelMap& map = r.logits;
  uint32_t* counters = reinterpret_cast<uint32_t*>(dynamic_shared);
  for (int i = int(threadIdx.x); i < kCounterWords; i += kThreads) counters[i] = 0;
  __syncthreads();
  const auto flush = [&] {
    __syncthreads();
    for (int i = int(threadIdx.x); i < kCounterWords; i += kThreads) {
      if (counters[i] & 0xffff) atomicAdd(r.high + 2 * i, counters[i] & 0xffff);
      if (counters[i] >> 16) atomicAdd(r.high + 2 * i + 1, counters[i] >> 16);
      counters[i] = 0;
    }
    __syncthreads();
  };
  unsigned counted = 0;
  for_each_tile<kVoxelsPerThread>(map, [&](int64_t volume, int64_t voxel) {
    float z[kVoxelsPerThread][kClassCapacity];
    load_logits(map, volume, voxel, z);
    uint16_t keys[kVoxelsPerThread];
    uint8_t flags[kVoxelsPerThread];
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v) {
      const uint32_t bits = bits_of(entropy_of<kClassCapacity>(z[v])) >> kLowBits,
                     key = bits < kNanKey ? bits : kNanKey;
      keys[v] = uint16_t(key), flags[v] = class_of<kClassCapacity>(z[v]);
      count_bin(voxel + v < map.voxels, key,
                [&](unsigned number) { atomicAdd(counters + key / 2, number << (key % 2 * 16)); });
    }
    store_run(keys, map.voxels - voxel, r.keys + volume * map.voxels + voxel);
    store_run(flags, map.voxels - voxel, r.flags + volume * map.voxels + voxel);
    counted += kThreads * kVoxelsPerThread;
    if (counted > kMostCounted - kThreads * kVoxelsPerThread) {
      flush();
      counted = 0;
    }
  });
  flush();
  if (is_last(r.arrival_counters, int(gridDim.x))) find_bins(r);
}

// Counts the lower bits of the order statistics' bins; the last block finds the threshold.
template <int kClassCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kClassCapacity>) count_low_kernel(Reliability r) {
  constexpr int kVoxelsPerThread = 4;
  const VoxelMap& map = r.logits;
  const uint32_t low = r.statistics->bin[0], high = r.statistics->bin[1];
  for_each_tile<kVoxelsPerThread>(map, [&](int64_t volume, int64_t voxel) {
    uint16_t keys[kVoxelsPerThread] = {kNanKey, kNanKey, kNanKey, kNanKey};
    load_run(r.keys + volume * map.voxels + voxel, map.voxels - voxel, keys);
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v) {
      const bool member = keys[v] != kNanKey && (keys[v] == low || keys[v] == high);
      if (!__any_sync(kAllLanes, member)) continue;
      float z[1][kClassCapacity] = {};
      if (member) load_logits(map, volume, voxel + v, z);
      const uint32_t bin = bits_of(entropy_of<kClassCapacity>(z[0])) % kLowBins + (keys[v] == low ? 0 : kLowBins);
      count_bin(member, bin, [&](unsigned number) { atomicAdd(r.low + bin, number); });
    }
  });
  if (is_last(r.arrival_counters + 1, int(gridDim.x))) find_threshold(r);
}

template <int kClassCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kClassCapacity>) flags_kernel(Reliability r) {
  constexpr int kVoxelsPerThread = kVoxelsFor<kClassCapacity>;
  const VoxelMap& map = r.logits;
  const float limit = *r.threshold;
  const uint32_t bin = limit == limit ? bits_of(limit) >> kLowBits : 0;
  for_each_tile<kVoxelsPerThread>(map, [&](int64_t volume, int64_t voxel) {
    const int64_t start = volume * map.voxels + voxel, count = map.voxels - voxel;
    uint16_t keys[kVoxelsPerThread] = {};
    uint8_t flags[kVoxelsPerThread] = {};
    bool in_bin = !r.keys;
    if (r.keys) {
      load_run(r.keys + start, count, keys);
      load_run(r.flags + start, count, flags);
#pragma unroll
      for (int v = 0; v < kVoxelsPerThread; ++v) in_bin = in_bin || (v < count && keys[v] == bin);
    }
    float z[kVoxelsPerThread][kClassCapacity];
    if (in_bin) load_logits(map, volume, voxel, z);
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v) {
      bool below = keys[v] < bin;
      if (!r.keys || (in_bin && keys[v] == bin)) below = entropy_of<kClassCapacity>(z[v]) < limit;
      if (!r.keys) flags[v] = class_of<kClassCapacity>(z[v]);
      flags[v] |= below ? kReliable : 0;
    }
    store_run(flags, count, r.flags + start);
  });
}

template <int kClassCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kClassCapacity>) entropy_kernel(VoxelMap map, float* out) {
  constexpr int kVoxelsPerThread = kVoxelsFor<kClassCapacity>;
  for_each_tile<kVoxelsPerThread>(map, [&](int64_t volume, int64_t voxel) {
    float z[kVoxelsPerThread][kClassCapacity], h[kVoxelsPerThread];
    load_logits(map, volume, voxel, z);
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v) h[v] = entropy_of<kClassCapacity>(z[v]);
    store_run(h, map.voxels - voxel, out + volume * map.voxels + voxel);
  });
}

}  // namespace

int blocks_for_logits(const VoxelMap& logits) {
  int blocks = 0;
  with_class_capacity(logits.channels,
                      [&](auto capacity) { blocks = blocks_for(Tiles<kVoxelsFor<capacity>>(logits).count); });
  return blocks;
}

void reliability(const Reliability& r, void* stream) {
  const int blocks = blocks_for_logits(r.logits);
  with_class_capacity(r.logits.channels, [&](auto capacity) {
    if (r.keys) {
      const dim3 counters(blocks < kMostCounters ? blocks : kMostCounters);
      launch(count_high_kernel<capacity>, counters, kCounterWords * sizeof(uint32_t), stream, r);
      launch(count_low_kernel<capacity>, dim3(blocks_for(Tiles<4>(r.logits).count)), 0, stream, r);
    }
    launch(flags_kernel<capacity>, dim3(blocks), 0, stream, r);
  });
}

void voxel_entropy(const VoxelMap& logits, float* out, void* stream) {
  const dim3 blocks(blocks_for_logits(logits));
  with_class_capacity(logits.channels,
                      [&](auto capacity) { launch(entropy_kernel<capacity>, blocks, 0, stream, logits, out); });
}

}  // namespace sslfast::cuda
