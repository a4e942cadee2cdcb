// Logits of a 1 x 1 x 1 classifier, computed from the features where a kernel reads them; and the gradients of features
// and classifier. With K features and C classes, reading a voxel costs C K multiply-adds, writing its gradient 2 C K.
// Loading the K features from memory takes longer.
#include "voxels.h"

namespace sslfast {
namespace {

// A thread's buffer for a tile of features, aligned to 64 bytes.
float* buffer(int64_t width) {
  static thread_local std::vector<float> room;
  room.resize(std::max<size_t>(room.size(), width * kTile + kLanes));
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~uintptr_t(63));
}

int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// to[c] = b[c] + sum_k W[c, k] f[k] for kCount classes.
template <int kCount>
void apply(const float* weights, const float* features, int64_t width, int count, float* to) {
  for (int v = 0; v < count; v += kLanes) {
    Vec z[kCount];
    for (int c = 0; c < kCount; ++c) z[c] = splat(weights[c * (width + 1) + width]);
    for (int64_t k = 0; k < width; ++k) {
      const Vec f = load(features + k * kTile + v);
      for (int c = 0; c < kCount; ++c) z[c] = multiply_add(splat(weights[c * (width + 1) + k]), f, z[c]);
    }
    for (int c = 0; c < kCount; ++c) store(to + c * kTile + v, z[c]);
  }
}

// The sums over the lanes of 16 vectors, one per lane.
Vec sums_of(Vec (&rows)[kLanes]) {
  transpose(rows);
  for (int step = kLanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) rows[i] += rows[i + step];
  return rows[0];
}

// sums[c, k] += sum over voxels of dz_c f_k, for 16 pairs (c, k) at once.
template <int kClasses>
void add_products(const float* dz, const float* features, int64_t width, int count, double* sums) {
  constexpr int kFeatures = kLanes / kClasses;
  alignas(64) float products[kLanes];
  int64_t k = 0;
  for (; k + kFeatures <= width; k += kFeatures) {
    Vec total[kLanes] = {};
    for (int v = 0; v < count; v += kLanes)
      for (int c = 0; c < kClasses; ++c) {
        const Vec d = load(dz + c * kTile + v);
        for (int i = 0; i < kFeatures; ++i)
          total[c * kFeatures + i] = multiply_add(d, load(features + (k + i) * kTile + v), total[c * kFeatures + i]);
      }
    store(products, sums_of(total));
    for (int i = 0; i < kLanes; ++i) sums[i / kFeatures * (width + 1) + k + i % kFeatures] += products[i];
  }
  for (int c = 0; c < kClasses; ++c) {
    for (int64_t rest = k; rest < width; ++rest) {
      Vec total = {};
      for (int v = 0; v < count; v += kLanes)
        total = multiply_add(load(dz + c * kTile + v), load(features + rest * kTile + v), total);
      sums[c * (width + 1) + rest] += sum(total);
    }
    Vec total = {};
    for (int v = 0; v < count; v += kLanes) total += load(dz + c * kTile + v);
    sums[c * (width + 1) + width] += sum(total);
  }
}

// to[k] = sum_c W[c, k] dz[c] for kCount features.
template <int kCount>
void apply_transposed(const float* weights, const float* dz, int64_t classes, int64_t width, int count, float* to) {
  for (int v = 0; v < count; v += kLanes) {
    Vec d[kCount] = {};
    for (int64_t c = 0; c < classes; ++c) {
      const Vec g = load(dz + c * kTile + v);
      for (int k = 0; k < kCount; ++k) d[k] = multiply_add(splat(weights[c * (width + 1) + k]), g, d[k]);
    }
    for (int k = 0; k < kCount; ++k) store(to + k * kTile + v, d[k]);
  }
}

}  // namespace

void load_linear_tile(const VoxelMap& map, int64_t volume, int64_t first, int count, float* tile) {
  const VoxelMap& from = map.linear->features;
  const int64_t width = from.channels, row = width + 1;
  const float* weights = map.linear->weights + volume * map.channels * row;
  float* features = buffer(width);
  load_tile(from, volume, first, count, features);
  const int end = padded(count);
  int64_t c = 0;
  for (; c + 8 <= map.channels; c += 8) apply<8>(weights + c * row, features, width, end, tile + c * kTile);
  for (; c + 4 <= map.channels; c += 4) apply<4>(weights + c * row, features, width, end, tile + c * kTile);
  for (; c + 2 <= map.channels; c += 2) apply<2>(weights + c * row, features, width, end, tile + c * kTile);
  if (c < map.channels) apply<1>(weights + c * row, features, width, end, tile + c * kTile);
}

void store_linear_tile(const VoxelMap& map, int64_t volume, int64_t first, int count, const float* tile) {
  const LinearMap& linear = *map.linear;
  const int64_t width = linear.features.channels, row = width + 1;
  const int end = padded(count);
  float* features = buffer(width);
  Mask nonzero = {};
  for (int64_t c = 0; c < map.channels; ++c)
    for (int v = 0; v < end; v += kLanes) nonzero = nonzero | (load(tile + c * kTile + v) != 0.f);
  if (!any(nonzero)) {
    std::fill(features, features + width * kTile, 0.f);
    return store_tile(linear.grad_features, volume, first, count, features);
  }
  load_tile(linear.features, volume, first, count, features);
  const int64_t chunk = volume * chunks_of(1, map.voxels) + first / kChunk;
  double* sums = linear.grad_weights + chunk * map.channels * row;
  int64_t c = 0;
  for (; c + 2 <= map.channels; c += 2) add_products<2>(tile + c * kTile, features, width, end, sums + c * row);
  if (c < map.channels) add_products<1>(tile + c * kTile, features, width, end, sums + c * row);
  const float* weights = linear.weights + volume * map.channels * row;
  int64_t k = 0;
  for (; k + 8 <= width; k += 8) apply_transposed<8>(weights + k, tile, map.channels, width, end, features + k * kTile);
  for (; k < width; ++k) apply_transposed<1>(weights + k, tile, map.channels, width, end, features + k * kTile);
  store_tile(linear.grad_features, volume, first, count, features);
}

}  // namespace sslfast
