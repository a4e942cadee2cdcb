// Sums of the unit features of each class's reliable voxels. Features are read only in tiles with reliable voxels, and
// summed for the classes of the tile, mostly one or two.
// Bytes per voxel for K features of s bytes: 1, and K s in tiles with reliable voxels.
#include "kernels.h"
#include "../voxel_math.h"

namespace sslfast {
namespace {

// 1 / |f| of the reliable voxels of a tile, 0 for the others and where |f| < 1e-12. False if an |f|² is not finite.
bool inverse_lengths(const float* tile, const uint8_t* flags, int count, int64_t width, float* out) {
  alignas(64) float squares[kTile];
  for (int v = 0; v < count; ++v) out[v] = (flags[v] & kReliable) ? 1.f : 0.f;
  std::fill(out + count, out + kTile, 0.f);
  Vec nothing = {};  // NaN if an |f|² is not finite
  for (int v = 0; v < count; v += kLanes) {
    Vec square = {};
    for (int64_t k = 0; k < width; ++k) {
      Vec f = load(tile + k * kTile + v);
      square += f * f;
    }
    store(squares + v, square);
    nothing += square * 0.f;
  }
  for (int v = 0; v < count; ++v) {
    const float length = __builtin_sqrtf(squares[v]), inverse = length < 1e-12f ? 0.f : 1.f / length;
    out[v] = out[v] == 0.f ? 0.f : inverse;
  }
  return sum(nothing) == 0;
}

// Moves voxels that are not finite from the tile to the sums of their class: 0 times NaN would be NaN in the others.
void move_infinite(float* tile, const uint8_t* flags, int count, int64_t width, int classes, const float* weight,
                   float* lanes) {
  for (int v = 0; v < count; ++v) {
    const int c = flags[v] & kClass;
    for (int64_t k = 0; k < width; ++k) {
      float& f = tile[k * kTile + v];
      if (__builtin_isfinite(weight[v] * f)) continue;
      if ((flags[v] & kReliable) && c < classes) lanes[(c * width + k) * kLanes] += weight[v] * f;
      f = 0;
    }
  }
}

// The classes of a tile's reliable voxels as bits; adds the numbers of voxels to `counts`.
uint32_t classes_present(const uint8_t* flags, int count, int classes, int64_t* counts) {
  uint32_t present = 0;
  for (int c = 0; c < classes; ++c) {
    const uint8_t wanted = uint8_t(kReliable | c);
    int members = 0;
    for (int v = 0; v < count; ++v) members += (flags[v] & (kReliable | kClass)) == wanted;
    counts[c] += members;
    present |= uint32_t(members > 0) << c;
  }
  return present;
}

}  // namespace

void class_prototypes(const VoxelMap& features, const uint8_t* flags, int classes, float* sums, int64_t* counts) {
  const int64_t width = features.channels, chunks = chunks_of(features.volumes, features.voxels);
  std::vector<double> partial(chunks * classes * width);
  std::vector<int64_t> partial_counts(chunks * kMaxClasses);
  parallel(chunks, [&](int64_t chunk) {
    std::vector<float> tile(width * kTile), lanes(classes * width * kLanes);
    alignas(64) float weight[kTile], class_weight[kTile];
    for_each_tile(chunk, features.voxels, [&](int64_t volume, int64_t first, int count) {
      const uint8_t* s = flags + volume * features.voxels + first;
      uint32_t present = classes_present(s, count, classes, &partial_counts[chunk * kMaxClasses]);
      if (!present) return;
      load_tile(features, volume, first, count, tile.data());
      if (!inverse_lengths(tile.data(), s, count, width, weight))
        move_infinite(tile.data(), s, count, width, classes, weight, lanes.data());
      for (int c = 0; c < classes; ++c) {
        if (!(present >> c & 1)) continue;
        for (int v = 0; v < count; ++v) class_weight[v] = (s[v] & kClass) == c ? weight[v] : 0.f;
        std::fill(class_weight + count, class_weight + kTile, 0.f);
        for (int64_t k = 0; k < width; ++k) {
          float* to = &lanes[(c * width + k) * kLanes];
          const float* f = &tile[k * kTile];
          Vec part[kUnroll] = {load(to)};  // independent sums: each addition waits for the one before it
          for (int v = 0; v < count; v += kUnroll * kLanes)
            for (int i = 0; i < kUnroll; ++i) part[i] += load(class_weight + v + i * kLanes) * load(f + v + i * kLanes);
          store(to, (part[0] + part[1]) + (part[2] + part[3]));
        }
      }
    });
    for (int64_t i = 0; i < classes * width; ++i) partial[chunk * classes * width + i] = sum(load(&lanes[i * kLanes]));
  });
  std::vector<double> total(classes * width);
  std::fill(counts, counts + classes, 0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < classes * width; ++i) total[i] += partial[chunk * classes * width + i];
    for (int c = 0; c < classes; ++c) counts[c] += partial_counts[chunk * kMaxClasses + c];
  }
  std::copy(total.begin(), total.end(), sums);
}

}  // namespace sslfast
