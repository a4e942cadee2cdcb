#include "voxels.h"

#include "dtypes.h"

namespace sslfast {
namespace {

template <class T>
void load_row(const typename T::Element* __restrict__ from, int count, float* __restrict__ to) {
  for (int v = 0; v < count; v += 64 / int(sizeof *from)) __builtin_prefetch(from + kTile + v, 0, 2);  // next tile
  int v = 0;
  for (; v + kLanes <= count; v += kLanes) store(to + v, T::load_lanes(from + v));
  for (; v < count; ++v) to[v] = T::to_float(from[v]);
}

template <class T>
void store_row(const float* __restrict__ from, int count, typename T::Element* __restrict__ to) {
  int v = 0;
  for (; v + kLanes <= count; v += kLanes) T::store_lanes(to + v, load(from + v));
  for (; v < count; ++v) to[v] = T::from_float(from[v]);
}

// Loads 16 channels of 16 voxels, stored channels last; rows[c] gets channel c.
template <class T>
SSLFAST_INLINE void load_block(const typename T::Element* from, int64_t voxel_stride, Vec (&rows)[kLanes]) {
  if constexpr (std::is_same_v<T, BF16>) {  // transposes pairs of channels as 32-bit words
    Vec pairs[kLanes / 2];
    for (int v = 0; v < kLanes / 2; ++v)
      pairs[v] = load_halves(from + v * voxel_stride, from + (v + kLanes / 2) * voxel_stride);
    transpose(pairs);
    for (int i = 0; i < kLanes / 2; ++i) {
      rows[2 * i] = bits_as<Vec>(shift_left<16>(bits_as<Words>(pairs[i])));
      rows[2 * i + 1] = bits_as<Vec>(bits_as<Words>(pairs[i]) & 0xFFFF0000u);
    }
  } else {
    for (int v = 0; v < kLanes; ++v) rows[v] = T::load_lanes(from + v * voxel_stride);
    transpose(rows);
  }
}

// The reverse of load_block; overwrites the rows.
template <class T>
SSLFAST_INLINE void store_block(Vec (&rows)[kLanes], int64_t voxel_stride, typename T::Element* to) {
  if constexpr (std::is_same_v<T, BF16>) {
    Vec pairs[kLanes / 2];
    for (int i = 0; i < kLanes / 2; ++i)
      pairs[i] =
          bits_as<Vec>(shift_right<16>(BF16::rounded(rows[2 * i])) | (BF16::rounded(rows[2 * i + 1]) & 0xFFFF0000u));
    transpose(pairs);
    for (int v = 0; v < kLanes / 2; ++v)
      store_halves(to + v * voxel_stride, to + (v + kLanes / 2) * voxel_stride, pairs[v]);
  } else {
    transpose(rows);
    for (int v = 0; v < kLanes; ++v) T::store_lanes(to + v * voxel_stride, rows[v]);
  }
}

// Channels last: 16 voxels at a time, which are in a few cache lines.
template <class T>
void load_interleaved(const typename T::Element* __restrict__ from, int64_t channels, int64_t channel_stride,
                      int64_t voxel_stride, int count, float* __restrict__ tile) {
  if (channels == 2 && channel_stride == 1 && voxel_stride == 2) {
    for (int v = 0; v < count; ++v) {
      tile[v] = T::to_float(from[2 * v]);
      tile[kTile + v] = T::to_float(from[2 * v + 1]);
    }
    return;
  }
  for (int block = 0; block < count; block += kLanes) {
    const int end = std::min(block + kLanes, count);
    int64_t c = 0;
    if (channel_stride == 1 && end == block + kLanes)
      for (; c + kLanes <= channels; c += kLanes) {
        Vec rows[kLanes];
        const auto* first = from + block * voxel_stride + c;
        for (int v = 0; v < kLanes; ++v) __builtin_prefetch(first + (kTile + v) * voxel_stride, 0, 2);
        load_block<T>(first, voxel_stride, rows);
        for (int i = 0; i < kLanes; ++i) store(tile + (c + i) * kTile + block, rows[i]);
      }
    for (; c < channels; ++c)
      for (int v = block; v < end; ++v) tile[c * kTile + v] = T::to_float(from[v * voxel_stride + c * channel_stride]);
  }
}

template <class T>
void store_interleaved(const float* __restrict__ tile, int64_t channels, int64_t channel_stride, int64_t voxel_stride,
                       int count, typename T::Element* __restrict__ to) {
  if (channels == 2 && channel_stride == 1 && voxel_stride == 2) {
    for (int v = 0; v < count; ++v) {
      to[2 * v] = T::from_float(tile[v]);
      to[2 * v + 1] = T::from_float(tile[kTile + v]);
    }
    return;
  }
  for (int block = 0; block < count; block += kLanes) {
    const int end = std::min(block + kLanes, count);
    int64_t c = 0;
    if (channel_stride == 1 && end == block + kLanes)
      for (; c + kLanes <= channels; c += kLanes) {
        Vec rows[kLanes];
        for (int i = 0; i < kLanes; ++i) rows[i] = load(tile + (c + i) * kTile + block);
        store_block<T>(rows, voxel_stride, to + block * voxel_stride + c);
      }
    for (; c < channels; ++c)
      for (int v = block; v < end; ++v) to[v * voxel_stride + c * channel_stride] = T::from_float(tile[c * kTile + v]);
  }
}

}  // namespace

void load_tile(const VoxelMap& map, int64_t volume, int64_t first, int count, float* tile) {
  if (map.linear) return load_linear_tile(map, volume, first, count, tile);
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    auto from = static_cast<const typename T::Element*>(map.data) + map.offset(volume, first);
    if (map.voxel_stride == 1)
      for (int64_t c = 0; c < map.channels; ++c) load_row<T>(from + c * map.channel_stride, count, tile + c * kTile);
    else
      load_interleaved<T>(from, map.channels, map.channel_stride, map.voxel_stride, count, tile);
  });
  const int step = kUnroll * kLanes, padded = (count + step - 1) / step * step;
  if (padded > count)
    for (int64_t c = 0; c < map.channels; ++c) std::fill(tile + c * kTile + count, tile + c * kTile + padded, 0.f);
}

void store_tile(const VoxelMap& map, int64_t volume, int64_t first, int count, const float* tile) {
  if (map.linear) return store_linear_tile(map, volume, first, count, tile);
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    auto to = static_cast<typename T::Element*>(map.data) + map.offset(volume, first);
    if (map.voxel_stride == 1)
      for (int64_t c = 0; c < map.channels; ++c) store_row<T>(tile + c * kTile, count, to + c * map.channel_stride);
    else
      store_interleaved<T>(tile, map.channels, map.channel_stride, map.voxel_stride, count, to);
  });
}

void load_voxel(const VoxelMap& map, int64_t volume, int64_t voxel, float* row) {
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    auto from = static_cast<const typename T::Element*>(map.data) + map.offset(volume, voxel);
    for (int64_t c = 0; c < map.channels; ++c) row[c] = T::to_float(from[c * map.channel_stride]);
  });
}

void store_voxel(const VoxelMap& map, int64_t volume, int64_t voxel, const float* row) {
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    auto to = static_cast<typename T::Element*>(map.data) + map.offset(volume, voxel);
    for (int64_t c = 0; c < map.channels; ++c) to[c * map.channel_stride] = T::from_float(row[c]);
  });
}

}  // namespace sslfast
