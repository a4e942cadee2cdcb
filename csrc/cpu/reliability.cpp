// Exact entropy percentiles of the unlabelled volumes and the byte map.
//
// An entropy is a float >= 0, so its bits sort as it does. A first pass keeps the upper half of the bits, 2 bytes a voxel
// and network, and counts them; the percentile's rank lies in one or two of those 32768 bins. A second pass counts the lower
// half of the bits of their members, computed again from the logits: both order statistics are then known exactly. A last
// pass compares 2 bytes; only voxels in the threshold's own bin are computed again.
// Bytes a voxel for C classes of s bytes: 2 C s + 5 written, 4 + 3 for the two passes over keys and state.
#include <cmath>
#include <limits>
#include <memory>

#include "../voxel_math.h"
#include "kernels.h"

namespace sslfast {
namespace {

constexpr int kBins = 1 << 15;        // upper half of the bits of a float that is not negative
constexpr int kLowBins = 1 << 16;     // lower half
constexpr uint32_t kInfinity = 0x7F80;  // keys above are NaN

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
  alignas(64) float entropy[2][kTile], predicted[2][kTile], confident[2][kTile];
};

template <int kClasses>
void describe(const VoxelMap& a, const VoxelMap& b, float threshold, int64_t volume, int64_t first, int count, Tile& tile) {
  const int classes = kClasses ? kClasses : int(a.channels);
  load_tile(a, volume, first, count, tile.logits[0]);
  load_tile(b, volume, first, count, tile.logits[1]);
  for (int n = 0; n < 2; ++n)
    for (int v = 0; v < count; v += kLanes) {
      Vec z[kMaxClasses];
      for (int c = 0; c < classes; ++c) z[c] = load(tile.logits[n] + c * kTile + v);
      Vec predicted = argmax(z, classes);
      Vec e[kMaxClasses], highest;
      Vec total = exp_shifted(z, classes, e, highest);
      store(tile.entropy[n] + v, entropy(z, classes));
      store(tile.predicted[n] + v, predicted);
      store(tile.confident[n] + v, select(1.f / total >= threshold, predicted, Vec{}));
    }
}

void describe(const VoxelMap& a, const VoxelMap& b, float threshold, int64_t volume, int64_t first, int count, Tile& tile) {
  a.channels == 2 ? describe<2>(a, b, threshold, volume, first, count, tile)
                  : describe<0>(a, b, threshold, volume, first, count, tile);
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
    if ((before += int64_t(counts[i])) > rank) return from_bits(bin << 16 | i);
  return std::numeric_limits<float>::quiet_NaN();
}

float interpolate(double low, double high, double fraction) {
  if (fraction <= 0) return float(low);
  return float(fraction < 0.5 ? low + (high - low) * fraction : high - (high - low) * (1 - fraction));
}

}  // namespace

void reliability(const VoxelMap& a, const VoxelMap& b, const ReliabilityOptions& o, float* thresholds, uint8_t* state) {
  const int groups = o.per_class ? int(a.channels) : 1;
  const int64_t voxels = a.volumes * a.voxels, chunks = chunks_of(a.volumes, a.voxels);
  std::unique_ptr<uint16_t[]> keys[2];  // [voxels] each, not initialised
  for (auto& k : keys) k.reset(new uint16_t[voxels]);
  auto group = [&](const Tile& tile, int n, int v) { return o.per_class ? int(tile.predicted[n][v]) : 0; };

  // The byte but for the reliable bit; the class is `taught` where reliable and `pulled` elsewhere.
  auto byte_of = [&](const Tile& tile, int v, bool reliable) {
    int winner = int(tile.predicted[o.b_wins][v]), loser = int(tile.predicted[!o.b_wins][v]);
    int taught = o.union_label ? std::max(winner, loser) : winner;
    int pulled = o.loser_anchor ? loser : taught;
    return uint8_t((reliable ? taught | kReliable : pulled) |
                   (tile.confident[0][v] != tile.confident[1][v] ? kDiscrepant : 0) | (winner != loser ? kLoserDiffers : 0));
  };

  std::vector<uint64_t> counts = count_in_parallel<uint64_t>(chunks, 2 * groups * kBins, [&](int64_t chunk, uint32_t* own) {
    Tile tile;
    for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
      describe(a, b, o.threshold, volume, first, count, tile);
      int64_t at = volume * a.voxels + first;
      for (int n = 0; n < 2; ++n)
        for (int v = 0; v < count; ++v) keys[n][at + v] = uint16_t(bits_of(tile.entropy[n][v]) >> 16);
      for (int n = 0; n < 2; ++n)
        for (int v = 0; v < count; ++v) ++own[(n * groups + group(tile, n, v)) * kBins + keys[n][at + v]];
      for (int v = 0; v < count; ++v) state[at + v] = byte_of(tile, v, false);
    });
  });

  std::vector<Rank> ranks;
  for (int i = 0; i < 2 * groups; ++i) ranks.push_back(find_bins(&counts[i * kBins], o.percentile));

  std::vector<uint64_t> members = count_in_parallel<uint64_t>(chunks, 4 * groups * kLowBins, [&](int64_t chunk, uint32_t* own) {
    Tile tile;
    for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
      int64_t at = volume * a.voxels + first;
      bool described = false;
      for (int n = 0; n < 2; ++n) {
        bool any = o.per_class;
        if (!any) {
          const uint16_t *k = &keys[n][at], low = uint16_t(ranks[n].low_bin), high = uint16_t(ranks[n].high_bin);
          int hits = 0;
          for (int v = 0; v < count; ++v) hits += (k[v] == low) | (k[v] == high);
          any = hits > 0;
        }
        if (!any) continue;
        if (!described) describe(a, b, o.threshold, volume, first, count, tile);
        described = true;
        for (int v = 0; v < count; ++v) {
          int i = n * groups + group(tile, n, v);
          uint32_t bits = bits_of(tile.entropy[n][v]);
          if (bits >> 16 == ranks[i].low_bin) ++own[2 * i * kLowBins + (bits & 0xFFFF)];
          if (bits >> 16 == ranks[i].high_bin) ++own[(2 * i + 1) * kLowBins + (bits & 0xFFFF)];
        }
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

  parallel(chunks, [&](int64_t chunk) {
    Tile tile;
    for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
      int64_t at = volume * a.voxels + first;
      bool described = o.per_class || o.loser_anchor;
      if (described) describe(a, b, o.threshold, volume, first, count, tile);
      uint8_t below[2][kTile];
      for (int n = 0; n < 2; ++n) {
        if (o.mode == Mode::winner && n != int(o.b_wins)) continue;
        const uint16_t* k = &keys[n][at];
        int ties = 0;
        if (!o.per_class) {
          const float t = thresholds[n];
          const uint16_t key = t == t ? uint16_t(bits_of(t) >> 16) : 0;
          for (int v = 0; v < count; ++v) below[n][v] = k[v] < key;
          for (int v = 0; v < count; ++v) ties += k[v] == key;
        }
        if (ties || o.per_class) {
          if (!described) describe(a, b, o.threshold, volume, first, count, tile);
          described = true;
          for (int v = 0; v < count; ++v) below[n][v] = tile.entropy[n][v] < thresholds[n * groups + group(tile, n, v)];
        }
      }
      const uint8_t *first_below = below[o.mode == Mode::winner ? int(o.b_wins) : 0],
                    *second_below = below[o.mode == Mode::winner ? int(o.b_wins) : 1];
      for (int v = 0; v < count; ++v) {
        uint8_t reliable = o.mode == Mode::both ? first_below[v] & second_below[v] : first_below[v] | second_below[v];
        if (o.loser_anchor)
          state[at + v] = byte_of(tile, v, reliable);
        else
          state[at + v] |= reliable ? kReliable : 0;
      }
    });
  });
}

void voxel_entropy(const VoxelMap& logits, float* out) {
  parallel(chunks_of(logits.volumes, logits.voxels), [&](int64_t chunk) {
    alignas(64) float tile[kMaxClasses * kTile], h[kTile];
    for_each_tile(chunk, logits.voxels, [&](int64_t volume, int64_t first, int count) {
      load_tile(logits, volume, first, count, tile);
      for (int v = 0; v < count; v += kLanes) {
        Vec z[kMaxClasses];
        for (int64_t c = 0; c < logits.channels; ++c) z[c] = load(tile + c * kTile + v);
        store(h + v, entropy(z, int(logits.channels)));
      }
      std::copy(h, h + count, out + volume * logits.voxels + first);
    });
  });
}

}  // namespace sslfast
