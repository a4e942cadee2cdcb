// Exact entropy percentiles of the unlabelled volumes and the byte map.
//
// An entropy is a float >= 0, so its bits sort as it does. A first pass keeps the upper 16 of its 31 bits, 2 bytes a voxel
// and network, and counts them; the percentile's rank lies in one or two of those bins. A second pass counts the lower 15
// bits of their members, computed again from the logits: both order statistics are then known exactly. A last pass compares
// 2 bytes; only voxels in the threshold's own bin are computed again.
// Bytes a voxel for C classes of s bytes: 2 C s + 5 written, 4 + 3 for the two passes over keys and state.
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
constexpr uint32_t kLow = kLowBins - 1;
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

// Entropy and class of both networks on one tile.
struct Tile {
  alignas(64) float logits[2][kMaxClasses * kTile];
  alignas(64) float entropy[2][kTile];
  uint8_t predicted[2][kTile];
};

Bytes to_bytes(Vec v) { return convert<uint8_t>(convert<int32_t>(v)); }

template <int kClasses>
void describe(const VoxelMap& a, const VoxelMap& b, int64_t volume, int64_t first, int count, Tile& tile) {
  const int classes = kClasses ? kClasses : int(a.channels);
  load_tile(a, volume, first, count, tile.logits[0]);
  load_tile(b, volume, first, count, tile.logits[1]);
  for (int v = 0; v < count; v += kLanes)
    for (int n = 0; n < 2; ++n) {
      Vec z[kMaxClasses], e[kMaxClasses], highest;
      for (int c = 0; c < classes; ++c) z[c] = load(tile.logits[n] + c * kTile + v);
      const Vec total = exp_shifted(z, classes, e, highest);
      store(tile.entropy[n] + v, entropy(z, classes, e, highest, total));
      store(tile.predicted[n] + v, to_bytes(argmax(z, classes)));
    }
}

void describe(const VoxelMap& a, const VoxelMap& b, int64_t volume, int64_t first, int count, Tile& tile) {
  with_classes(a.channels, [&](auto n) { describe<n>(a, b, volume, first, count, tile); });
}

// Entropy of up to 16 voxels of one network. Overwrites the tile's logits.
Vec block_entropy(const VoxelMap& map, int64_t volume, int64_t first, int lanes, Tile& tile) {
  load_tile(map, volume, first, lanes, tile.logits[0]);
  Vec z[kMaxClasses], e[kMaxClasses], highest;
  for (int64_t c = 0; c < map.channels; ++c) z[c] = load(tile.logits[0] + c * kTile);
  const Vec total = exp_shifted(z, int(map.channels), e, highest);
  return entropy(z, int(map.channels), e, highest, total);
}

// The two order statistics between which numpy's linear percentile lies: the k-th smallest has rank k = 0, 1, ...
struct Rank {
  int64_t low = 0, high = 0;
  double fraction = 0;
  uint32_t low_bin = 0, high_bin = 0;
  int64_t low_rest = 0, high_rest = 0;  // ranks within the bins
  bool empty = true, has_nan = false;
};

Rank find_bins(const uint64_t* counts, double percentile) {
  Rank r;
  int64_t total = 0, nan = 0;
  for (int i = 0; i < kBins; ++i) total += counts[i], nan += uint32_t(i) >= kInfinity ? counts[i] : 0;
  r.empty = total == 0;
  r.has_nan = nan > 0;
  if (r.empty) return r;
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

// The percentiles from the counts of the upper bits: one more pass over the keys, which counts the lower bits of their bins.
void find_thresholds(const VoxelMap& a, const VoxelMap& b, const ReliabilityOptions& o, const uint64_t* counts,
                     const std::unique_ptr<uint16_t[]>* keys, float* thresholds) {
  const int groups = o.per_class ? int(a.channels) : 1;
  const int64_t chunks = chunks_of(a.volumes, a.voxels);
  std::vector<Rank> ranks;
  for (int i = 0; i < 2 * groups; ++i) ranks.push_back(find_bins(&counts[i * kBins], o.percentile));

  std::vector<uint64_t> members = count_in_parallel<uint64_t>(chunks, 4 * groups * kLowBins, [&](int64_t chunk, uint32_t* own) {
    Tile tile;
    for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
      auto count_member = [&](int i, float h) {
        const uint32_t bits = bits_of(h);
        if (bits >> kLowBits == ranks[i].low_bin) ++own[2 * i * kLowBins + (bits & kLow)];
        if (bits >> kLowBits == ranks[i].high_bin) ++own[(2 * i + 1) * kLowBins + (bits & kLow)];
      };
      if (o.per_class) {
        describe(a, b, volume, first, count, tile);
        for (int n = 0; n < 2; ++n)
          for (int v = 0; v < count; ++v) count_member(n * groups + tile.predicted[n][v], tile.entropy[n][v]);
        return;
      }
      for (int n = 0; n < 2; ++n)
        for (int v = 0; v < count; v += kLanes) {
          const Shorts k = load(keys[n].get() + volume * a.voxels + first + v);
          if (!any((k == uint16_t(ranks[n].low_bin)) | (k == uint16_t(ranks[n].high_bin)))) continue;
          const int lanes = std::min(kLanes, count - v);
          const Vec h = block_entropy(n ? b : a, volume, first + v, lanes, tile);
          for (int i = 0; i < lanes; ++i) count_member(n, h[i]);
        }
    });
  });

  for (int i = 0; i < 2 * groups; ++i) {
    const Rank& r = ranks[i];
    thresholds[i] = r.empty     ? 0.f
                    : r.has_nan ? std::numeric_limits<float>::quiet_NaN()
                                : interpolate(member(&members[2 * i * kLowBins], r.low_bin, r.low_rest),
                                              member(&members[(2 * i + 1) * kLowBins], r.high_bin, r.high_rest), r.fraction);
  }
}

}  // namespace

void reliability(const VoxelMap& a, const VoxelMap& b, const ReliabilityOptions& o, bool b_wins, bool given, float* thresholds,
                 uint8_t* state) {
  const int groups = o.per_class ? int(a.channels) : 1;
  const int64_t voxels = a.volumes * a.voxels, chunks = chunks_of(a.volumes, a.voxels);
  std::unique_ptr<uint16_t[]> keys[2];  // [voxels] each, not initialised
  for (auto& k : keys) k.reset(new uint16_t[voxels + kLanes]);  // a block of 16 may reach beyond the last voxel
  const uint8_t nothing[kTile] = {};

  // The class of a tile's voxels: `taught` where reliable and `pulled` elsewhere.
  auto write_class = [&](const Tile& tile, const uint8_t* reliable, int count, uint8_t* out) {
    const uint8_t *winner = tile.predicted[b_wins], *loser = tile.predicted[!b_wins];
    for (int v = 0; v < count; ++v) {
      const uint8_t taught = o.union_label ? std::max(winner[v], loser[v]) : winner[v];
      out[v] = reliable[v] || !o.loser_anchor ? taught : loser[v];
    }
  };

  std::vector<uint64_t> counts = count_in_parallel<uint64_t>(chunks, 2 * groups * kBins, [&](int64_t chunk, uint32_t* own) {
    Tile tile;
    for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
      describe(a, b, volume, first, count, tile);
      int64_t at = volume * a.voxels + first;
      for (int n = 0; n < 2; ++n)
        for (int v = 0; v < count; ++v) keys[n][at + v] = uint16_t(bits_of(tile.entropy[n][v]) >> kLowBits);
      if (o.per_class)
        for (int n = 0; n < 2; ++n)
          for (int v = 0; v < count; ++v) ++own[(n * groups + tile.predicted[n][v]) * kBins + keys[n][at + v]];
      else
        for (int v = 0; v < count; ++v) {
          ++own[keys[0][at + v]];
          ++own[kBins + keys[1][at + v]];
        }
      write_class(tile, nothing, count, state + at);
    });
  });

  if (!given) find_thresholds(a, b, o, counts.data(), keys, thresholds);

  parallel(chunks, [&](int64_t chunk) {
    Tile tile;
    for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
      int64_t at = volume * a.voxels + first;
      if (o.per_class || o.loser_anchor) describe(a, b, volume, first, count, tile);
      uint8_t below[2][kTile];
      for (int n = 0; n < 2; ++n) {
        if (o.per_class) {
          for (int v = 0; v < count; ++v) below[n][v] = tile.entropy[n][v] < thresholds[n * groups + tile.predicted[n][v]];
          continue;
        }
        const float t = thresholds[n];
        const uint16_t key = t == t ? uint16_t(bits_of(t) >> kLowBits) : 0;
        const uint16_t* k = keys[n].get() + at;
        for (int v = 0; v < count; ++v) below[n][v] = k[v] < key;
        for (int v = 0; v < count; v += kLanes) {
          if (!any(load(k + v) == key)) continue;
          const int lanes = std::min(kLanes, count - v);
          const Vec h = block_entropy(n ? b : a, volume, first + v, lanes, tile);
          for (int i = 0; i < lanes; ++i) below[n][v + i] = h[i] < t;
        }
      }
      const uint8_t *one = below[o.mode == Mode::winner ? b_wins : 0], *other = below[o.mode == Mode::winner ? b_wins : 1];
      uint8_t reliable[kTile];
      for (int v = 0; v < count; ++v) reliable[v] = o.mode == Mode::both ? one[v] & other[v] : one[v] | other[v];
      if (o.loser_anchor) write_class(tile, reliable, count, state + at);
      for (int v = 0; v < count; ++v)
        state[at + v] |= uint8_t(reliable[v] * kReliable | below[0][v] * sure(0) | below[1][v] * sure(1));
    });
  });
}

void voxel_entropy(const VoxelMap& logits, float* out) {
  parallel(chunks_of(logits.volumes, logits.voxels), [&](int64_t chunk) {
    Tile tile;
    alignas(64) float h[kTile];
    for_each_tile(chunk, logits.voxels, [&](int64_t volume, int64_t first, int count) {
      for (int v = 0; v < count; v += kLanes) {
        store(h + v, block_entropy(logits, volume, first + v, std::min(kLanes, count - v), tile));
      }
      std::copy(h, h + count, out + volume * logits.voxels + first);
    });
  });
}

}  // namespace sslfast
