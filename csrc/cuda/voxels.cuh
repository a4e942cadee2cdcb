// Division of voxels among blocks and threads; reading and writing maps of any floating-point dtype and layout.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "block.cuh"

#define FOR_CLASSES_UNROLLED

namespace sslfast {

VOXEL_FN float select(bool mask, float a, float b) { return mask ? a : b; }
VOXEL_FN float exp(float x) { return ::expf(x); }
VOXEL_FN float log(float x) { return ::logf(x); }
VOXEL_FN float inverse_root(float x) { return 1.f / ::sqrtf(x); }
VOXEL_FN void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t(a) * b;
  high = uint32_t(product >> 32);
  low = uint32_t(product);
}

}  // namespace sslfast

#include "../voxel_math.h"

namespace sslfast::cuda {

// The kernels compute with kClassCapacity classes, so that no branch depends on the number of classes. Classes that a
// map does not have get this logit: their probability is 0, and the arithmetic stays finite.
constexpr float kAbsent = -1e20f;

// Voxels that a thread takes at a time, so that kClassCapacity classes of each fit in registers.
template <int kClassCapacity>
constexpr int kVoxelsFor = kClassCapacity <= 4 ? 4 : 1;

// Minimum number of resident blocks per SM, which limits registers per thread.
template <int kClassCapacity>
constexpr int kBlocksAtOnce = kClassCapacity <= 2    ? 4
                              : kClassCapacity <= 16 ? 2
                                                     : 1;

// Calls body(kClassCapacity) with the smallest compiled capacity for the classes.
template <class Body>
void with_class_capacity(int64_t classes, const Body& body) {
  if (classes <= 2) return body(std::integral_constant<int, 2>());
  if (classes <= 4) return body(std::integral_constant<int, 4>());
  if (classes <= 8) return body(std::integral_constant<int, 8>());
  if (classes <= 16) return body(std::integral_constant<int, 16>());
  body(std::integral_constant<int, 32>());
}

// All voxels in tiles of kThreads * kVoxelsPerThread consecutive voxels.
template <int kVoxelsPerThread>
struct Tiles {
  uint32_t a_volume, count;  // 32 bits suffice for 2^40 voxels, and divide faster than 64

  VOXEL_FN explicit Tiles(const VoxelMap& map)
      : a_volume(uint32_t((map.voxels + kThreads * kVoxelsPerThread - 1) / (kThreads * kVoxelsPerThread))),
        count(uint32_t(map.volumes) * a_volume) {}
};

// The number of blocks for a number of tiles.
inline int blocks_for(int64_t tiles, int64_t most = kMostBlocks) {
  return int(tiles < 1 ? 1 : tiles < most ? tiles : most);
}

// Calls body(volume, voxel) for each tile of this block, in every thread; voxel: the first of this thread.
template <int kVoxelsPerThread, class Body>
__device__ void for_each_tile(const VoxelMap& map, const Body& body) {
  const Tiles<kVoxelsPerThread> tiles(map);
  for (uint32_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x)
    body(int64_t(tile / tiles.a_volume), (int64_t(tile % tiles.a_volume) * kThreads + threadIdx.x) * kVoxelsPerThread);
}

// Four consecutive values, read or written with one instruction.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};
template <class T>
__device__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Four<T>) == 0;
}

// Loads the first `count` of kVoxelsPerThread consecutive values; the others do not change.
template <class T, int kVoxelsPerThread>
__device__ void load_run(const T* from, int64_t count, T (&to)[kVoxelsPerThread]) {
  if (kVoxelsPerThread == 4 && count >= 4 && is_aligned(from)) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v) to[v] = four.values[v];
  } else {
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v)
      if (v < count) to[v] = from[v];
  }
}

template <class T, int kVoxelsPerThread>
__device__ void store_run(const T (&from)[kVoxelsPerThread], int64_t count, T* to) {
  if (kVoxelsPerThread == 4 && count >= 4 && is_aligned(to)) {
    *reinterpret_cast<Four<T>*>(to) = {from[0], from[1 % kVoxelsPerThread], from[2 % kVoxelsPerThread],
                                       from[3 % kVoxelsPerThread]};
  } else {
#pragma unroll
    for (int v = 0; v < kVoxelsPerThread; ++v)
      if (v < count) to[v] = from[v];
  }
}

struct F32 {
  using Element = float;
  static __device__ float to_float(float x) { return x; }
  static __device__ float from_float(float x) { return x; }
};
struct BF16 {
  using Element = uint16_t;
  static __device__ float to_float(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
  static __device__ uint16_t from_float(float x) { return __bfloat16_as_ushort(__float2bfloat16(x)); }
};
struct F16 {
  using Element = uint16_t;
  static __device__ float to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static __device__ uint16_t from_float(float x) { return __half_as_ushort(__float2half(x)); }
};

// Goes around all loads of a voxel, not into each: otherwise a warp would wait for each load before the next.
template <class Body>
__device__ void with_dtype(DType dtype, const Body& body) {
  if (dtype == DType::f32)
    body(F32{});
  else if (dtype == DType::bf16)
    body(BF16{});
  else
    body(F16{});
}

__device__ inline float load(const VoxelMap& map, int64_t i) {
  float value = 0;
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    value = T::to_float(static_cast<const typename T::Element*>(map.data)[i]);
  });
  return value;
}

__device__ inline void store(const VoxelMap& map, int64_t i, float value) {
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    static_cast<typename T::Element*>(map.data)[i] = T::from_float(value);
  });
}

// 1 / |f| from |f|^2; 0 for a vector shorter than 1e-12.
__device__ inline float inverse_length(float square) {
  const float length = sqrtf(square);
  return length < 1e-12f ? 0.f : 1.f / length;
}

// True if a voxel and the next three can be read with one instruction; `pointer`: the first channel of the voxel.
template <class T>
__device__ bool has_fours(const VoxelMap& map, int64_t voxel, const T* pointer) {
  return map.voxel_stride == 1 && map.channel_stride % 4 == 0 && voxel + 4 <= map.voxels && is_aligned(pointer);
}

// Calls put(v, c, logit) for a thread's kVoxelsPerThread voxels; 0 beyond the volume. Reads everything, then converts.
template <int kClassCapacity, int kVoxelsPerThread, class Put>
__device__ void load_voxels(const VoxelMap& map, int64_t volume, int64_t voxel, const Put& put) {
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    typename T::Element read[kClassCapacity][kVoxelsPerThread];
    const auto* from = static_cast<const typename T::Element*>(map.data) + map.offset(volume, voxel);
    if (kVoxelsPerThread == 4 && has_fours(map, voxel, from)) {
#pragma unroll
      for (int c = 0; c < kClassCapacity; ++c) {
        Four<typename T::Element> four = {};
        if (c < map.channels) four = *reinterpret_cast<const Four<typename T::Element>*>(from);
        from += map.channel_stride;  // adding from class to class needs fewer registers than multiplying
#pragma unroll
        for (int v = 0; v < kVoxelsPerThread; ++v) read[c][v] = four.values[v];
      }
    } else {
#pragma unroll
      for (int c = 0; c < kClassCapacity; ++c) {
#pragma unroll
        for (int v = 0; v < kVoxelsPerThread; ++v) {
          read[c][v] = 0;
          if (c < map.channels && voxel + v < map.voxels) read[c][v] = from[v * map.voxel_stride];
        }
        from += map.channel_stride;
      }
    }
#pragma unroll
    for (int c = 0; c < kClassCapacity; ++c)
#pragma unroll
      for (int v = 0; v < kVoxelsPerThread; ++v) put(v, c, c < map.channels ? T::to_float(read[c][v]) : kAbsent);
  });
}

// The reverse: stores get(v, c); rounds once.
template <int kClassCapacity, int kVoxelsPerThread, class Get>
__device__ void store_voxels(const VoxelMap& map, int64_t volume, int64_t voxel, const Get& get) {
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    auto* to = static_cast<typename T::Element*>(map.data) + map.offset(volume, voxel);
    const bool by_four = kVoxelsPerThread == 4 && has_fours(map, voxel, to);
#pragma unroll
    for (int c = 0; c < kClassCapacity; ++c) {
      Four<typename T::Element> four;
#pragma unroll
      for (int v = 0; v < kVoxelsPerThread; ++v) four.values[v] = T::from_float(get(v, c));
      if (by_four) {
        if (c < map.channels) *reinterpret_cast<Four<typename T::Element>*>(to) = four;
      } else {
#pragma unroll
        for (int v = 0; v < kVoxelsPerThread; ++v)
          if (c < map.channels && voxel + v < map.voxels) to[v * map.voxel_stride] = four.values[v];
      }
      to += map.channel_stride;
    }
  });
}

}  // namespace sslfast::cuda
