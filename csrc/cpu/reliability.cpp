// The exact entropy percentile of the unlabelled volumes, and the flags.
//
// An entropy is a float >= 0, so its bits have the same order. The first pass stores the upper 16 of its 31 bits as a
// key, 2 bytes per voxel, and counts the keys. The percentile's rank lies in one or two of these bins. The second pass
// recomputes the entropies of their members from the logits and counts the lower 15 bits, which gives both order
// statistics exactly. The last pass compares keys, and recomputes only the entropies in the threshold's bin.
// Bytes per voxel for C classes of s bytes: C s read and 3 written, then 2 + 3 in the two passes over keys and flags.
#include <cmath>
#include <limits>
#include <memory>

#include "kernels.h"
#include "../voxel_math.h"

namespace sslfast {
namespace {

constexpr int kLowBits = 15;
constexpr int kBins = 1 << 16;
constexpr int kLowBins = 1 << kLowBits;
constexpr uint32_t kInfinity = 0x7F800000 >> kLowBits;  // keys from here on are NaN

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7FFFFFFF;  // a NaN may carry a sign
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Entropy and class of the 16 voxels at `v` of a tile of logits.
template <int kClasses>
SSLFAST_INLINE void entropy_and_class(const float* tile, int num_classes, float* entropies, uint8_t* predicted) {
  constexpr int kClassCapacity = kClasses ? kClasses : kMaxClasses;
  const int classes = kClasses ? kClasses : num_classes;
  Vec z[kClassCapacity], e[kClassCapacity], highest;
  for (int c = 0; c < classes; ++c) z[c] = load(tile + c * kTile);
  const Vec total = exp_shifted<kClassCapacity>(z, classes, e, highest);
  store(entropies, entropy<kClassCapacity>(z, classes, e, highest, total));
  if (predicted) store(predicted, convert<uint8_t>(convert<int32_t>(argmax<kClassCapacity>(z, classes))));
}

// Entropies and classes of up to kTile voxels of the map.
void entropy_and_class(const VoxelMap& logits, int64_t volume, int64_t first, int count, float* entropies,
                       uint8_t* predicted) {
  alignas(64) float tile[kMaxClasses * kTile];
  load_tile(logits, volume, first, count, tile);
  with_classes(logits.channels, [&](auto n) {
    for (int v = 0; v < count; v += kLanes)
      entropy_and_class<n>(tile + v, int(logits.channels), entropies + v, predicted ? predicted + v : nullptr);
  });
}

// The two order statistics that numpy's linear percentile interpolates. Ranks count from 0.
struct OrderStatistics {
  int64_t low = 0, high = 0;
  double fraction = 0;
  uint32_t low_bin = 0, high_bin = 0;
  int64_t low_rest = 0, high_rest = 0;  // ranks within the bins
  bool empty = true, has_nan = false;
};

OrderStatistics find_bins(const uint64_t* counts, double percentile) {
  OrderStatistics r;
  int64_t total = 0, nan = 0;
  for (int i = 0; i < kBins; ++i) total += counts[i], nan += uint32_t(i) >= kInfinity ? counts[i] : 0;
  r.empty = total == 0;
  r.has_nan = nan > 0 || !(percentile >= 0 && percentile <= 100);
  if (r.empty || r.has_nan) return r;
  double rank = percentile / 100 * double(total - 1);
  r.low = std::min(int64_t(std::floor(rank)), total - 1);
  r.fraction = rank - double(r.low);
  r.high = std::min(r.low + 1, total - 1);
  int64_t before = 0;
  bool low_found = false;
  for (int i = 0; i < kBins; ++i) {
    int64_t after = before + int64_t(counts[i]);
    if (!low_found && r.low < after) r.low_bin = i, r.low_rest = r.low - before, low_found = true;
    if (r.high < after) {
      r.high_bin = i;
      r.high_rest = r.high - before;
      break;
    }
    before = after;
  }
  return r;
}

float member(const uint64_t* counts, uint32_t bin, int64_t rank) {
  int64_t before = 0;
  for (uint32_t i = 0; i < kLowBins; ++i)
    if ((before += int64_t(counts[i])) > rank) return from_bits(bin << kLowBits | i);
  return std::numeric_limits<float>::quiet_NaN();
}

float interpolate(double low, double high, double fraction) {
  if (fraction <= 0) return float(low);
  return float(fraction < 0.5 ? low + (high - low) * fraction : high - (high - low) * (1 - fraction));
}

// Calls body(i, entropy) for the voxels i of a tile whose key is `one` or `other`; recomputes entropies 16 at a time.
template <class Body>
void for_members(const VoxelMap& logits, int64_t volume, int64_t first, int count, const uint16_t* keys, uint32_t one,
                 uint32_t other, const Body& body) {
  alignas(64) float h[kLanes];
  for (int v = 0; v < count; v += kLanes) {
    const Shorts key = load(keys + v);
    if (!any((key == uint16_t(one)) | (key == uint16_t(other)))) continue;
    const int lanes = std::min(kLanes, count - v);
    entropy_and_class(logits, volume, first + v, lanes, h, nullptr);
    for (int i = 0; i < lanes; ++i) body(v + i, h[i]);
  }
}

// The percentile, from the bins of the upper bits: one more pass over the keys counts the lower bits of their members.
float find_threshold(const VoxelMap& logits, const OrderStatistics& statistics, const uint16_t* keys) {
  if (statistics.empty) return 0.f;
  if (statistics.has_nan) return std::numeric_limits<float>::quiet_NaN();
  const int64_t chunks = chunks_of(logits.volumes, logits.voxels);
  const std::vector<uint64_t> counts =
      count_in_parallel<uint64_t>(chunks, 2 * kLowBins, [&](int64_t chunk, uint32_t* counts_of_chunk) {
        for_each_tile(chunk, logits.voxels, [&](int64_t volume, int64_t first, int count) {
          const uint16_t* k = keys + volume * logits.voxels + first;
          for_members(logits, volume, first, count, k, statistics.low_bin, statistics.high_bin, [&](int, float h) {
            const uint32_t bits = bits_of(h), low = bits & (kLowBins - 1);
            if (bits >> kLowBits == statistics.low_bin) ++counts_of_chunk[low];
            if (bits >> kLowBits == statistics.high_bin) ++counts_of_chunk[kLowBins + low];
          });
        });
      });
  return interpolate(member(&counts[0], statistics.low_bin, statistics.low_rest),
                     member(&counts[kLowBins], statistics.high_bin, statistics.high_rest), statistics.fraction);
}

}  // namespace

void reliability(const VoxelMap& logits, double percentile, bool given, float* threshold, uint8_t* flags) {
  const int64_t voxels = logits.volumes * logits.voxels, chunks = chunks_of(logits.volumes, logits.voxels);
  // kLanes more: a block of 16 may reach beyond the last voxel
  const std::unique_ptr<uint16_t[]> keys(new uint16_t[voxels + kLanes]);
  const std::vector<uint64_t> counts =
      count_in_parallel<uint64_t>(chunks, kBins, [&](int64_t chunk, uint32_t* counts_of_chunk) {
        alignas(64) float h[kTile];
        alignas(64) uint8_t predicted[kTile];
        for_each_tile(chunk, logits.voxels, [&](int64_t volume, int64_t first, int count) {
          entropy_and_class(logits, volume, first, count, h, predicted);
          const int64_t at = volume * logits.voxels + first;
          for (int v = 0; v < count; ++v) keys[at + v] = uint16_t(bits_of(h[v]) >> kLowBits);
          for (int v = 0; v < count; ++v) ++counts_of_chunk[keys[at + v]];
          std::copy(predicted, predicted + count, flags + at);
        });
      });
  if (!given) *threshold = find_threshold(logits, find_bins(counts.data(), percentile), keys.get());

  const float limit = *threshold;
  const uint16_t key = limit == limit ? uint16_t(bits_of(limit) >> kLowBits) : 0;
  parallel(chunks, [&](int64_t chunk) {
    for_each_tile(chunk, logits.voxels, [&](int64_t volume, int64_t first, int count) {
      const int64_t at = volume * logits.voxels + first;
      const uint16_t* k = keys.get() + at;
      uint8_t below[kTile];
      for (int v = 0; v < count; ++v) below[v] = k[v] < key;
      for_members(logits, volume, first, count, k, key, key, [&](int v, float h) { below[v] = h < limit; });
      for (int v = 0; v < count; ++v) flags[at + v] |= uint8_t(below[v] * kReliable);
    });
  });
}

void voxel_entropy(const VoxelMap& logits, float* out) {
  parallel(chunks_of(logits.volumes, logits.voxels), [&](int64_t chunk) {
    alignas(64) float h[kTile];
    for_each_tile(chunk, logits.voxels, [&](int64_t volume, int64_t first, int count) {
      entropy_and_class(logits, volume, first, count, h, nullptr);
      std::copy(h, h + count, out + volume * logits.voxels + first);
    });
  });
}

}  // namespace sslfast
