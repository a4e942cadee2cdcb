// How the threads of a block find their voxels, and read and write maps of any floating dtype and layout.
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

// Voxels that a thread takes at a time where kMost classes have room in registers.
template <int kMost>
constexpr int kVoxels = kMost <= 4 ? 4 : 1;

// Blocks that an SM is to hold at once: a lower bound on them is an upper one on registers, which else the compiler sets too low.
template <int kMost>
constexpr int kBlocksAtOnce = kMost <= 16 ? 2 : 1;

// body(kMost) with the least room for the classes that is compiled.
template <class Body>
void with_most(int64_t classes, const Body& body) {
  if (classes <= 2) return body(std::integral_constant<int, 2>());
  if (classes <= 4) return body(std::integral_constant<int, 4>());
  if (classes <= 16) return body(std::integral_constant<int, 16>());
  body(std::integral_constant<int, 32>());
}

// All voxels in tiles of kThreads * kVoxels neighbours.
template <int kV>
struct Tiles {
  int64_t voxels, a_volume, count;

  VOXEL_FN explicit Tiles(const VoxelMap& map)
      : voxels(map.voxels), a_volume((map.voxels + kThreads * kV - 1) / (kThreads * kV)), count(map.volumes * a_volume) {}
};

// Blocks for so many tiles.
inline int blocks_for(int64_t tiles, int most = kMostBlocks) {
  return int(tiles < 1 ? 1 : tiles < most ? tiles : most);
}

// body(kMost, blocks) for a pass over a map.
template <class Body>
void with_blocks(const VoxelMap& map, const Body& body, int most_blocks = kMostBlocks) {
  with_most(map.channels, [&](auto most) { body(most, blocks_for(Tiles<kVoxels<most>>(map).count, most_blocks)); });
}

inline int64_t blocks_of_pass(const VoxelMap& map) {
  int64_t found = 0;
  with_blocks(map, [&](auto, int blocks) { found = blocks; });
  return found;
}

// body(volume, voxel) for each tile of one block of `blocks`; voxel: the first of this thread's. Every thread makes all calls.
template <int kV, class Body>
__device__ void for_each_tile(const VoxelMap& map, int block, int blocks, const Body& body) {
  const Tiles<kV> tiles(map);
  for (int64_t tile = block; tile < tiles.count; tile += blocks)
    body(tile / tiles.a_volume, (tile % tiles.a_volume * kThreads + threadIdx.x) * kV);
}

// Element i of a map, and four neighbours from i on.
__device__ inline float load(const VoxelMap& map, int64_t i) {
  switch (map.dtype) {
    case DType::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(map.data)[i]);
    case DType::f16: return __half2float(static_cast<const __half*>(map.data)[i]);
    default: return static_cast<const float*>(map.data)[i];
  }
}

__device__ inline void load_four(const VoxelMap& map, int64_t i, float* to) {
  if (map.dtype == DType::f32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(map.data) + i);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    return;
  }
  const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(map.data) + i);
  const uint16_t bits[4] = {uint16_t(four.x), uint16_t(four.x >> 16), uint16_t(four.y), uint16_t(four.y >> 16)};
#pragma unroll
  for (int v = 0; v < 4; ++v)
    to[v] = map.dtype == DType::bf16 ? __uint_as_float(uint32_t(bits[v]) << 16) : __half2float(__ushort_as_half(bits[v]));
}

__device__ inline void store(const VoxelMap& map, int64_t i, float value) {
  switch (map.dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(map.data)[i] = __float2bfloat16(value); break;
    case DType::f16: static_cast<__half*>(map.data)[i] = __float2half(value); break;
    default: static_cast<float*>(map.data)[i] = value;
  }
}

__device__ inline uint32_t half_bits(DType dtype, float value) {
  return dtype == DType::bf16 ? __bfloat16_as_ushort(__float2bfloat16(value)) : __half_as_ushort(__float2half(value));
}

__device__ inline void store_four(const VoxelMap& map, int64_t i, const float* from) {
  if (map.dtype == DType::f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(map.data) + i) = make_float4(from[0], from[1], from[2], from[3]);
    return;
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(map.data) + i) =
      make_uint2(half_bits(map.dtype, from[0]) | half_bits(map.dtype, from[1]) << 16,
                 half_bits(map.dtype, from[2]) | half_bits(map.dtype, from[3]) << 16);
}

// z[v][c] of a thread's kV voxels; 0 beyond the volume.
template <int kMost, int kV>
__device__ void load_voxels(const Map& map, int64_t volume, int64_t voxel, int classes, float (&z)[kV][kMost]) {
  const int64_t first = map.offset(volume, voxel);
  if (kV == 4 && map.by_four && voxel + 4 <= map.voxels) {
    FOR_CLASSES(c, 0, kMost, classes) {
      float four[4];
      load_four(map, first + c * map.channel_stride, four);
#pragma unroll
      for (int v = 0; v < kV; ++v) z[v][c] = four[v];
    }
    return;
  }
#pragma unroll
  for (int v = 0; v < kV; ++v) {
    int64_t from = first + v * map.voxel_stride;  // a sum from class to class takes fewer registers than products ahead of the loop
    FOR_CLASSES(c, 0, kMost, classes) {
      z[v][c] = voxel + v < map.voxels ? load(map, from) : 0.f;
      from += map.channel_stride;
    }
  }
}

// The reverse; rounds once.
template <int kMost, int kV>
__device__ void store_voxels(const Map& map, int64_t volume, int64_t voxel, int classes, const float (&z)[kV][kMost]) {
  const int64_t first = map.offset(volume, voxel);
  if (kV == 4 && map.by_four && voxel + 4 <= map.voxels) {
    FOR_CLASSES(c, 0, kMost, classes) {
      float four[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) four[v] = z[v % kV][c];
      store_four(map, first + c * map.channel_stride, four);
    }
    return;
  }
#pragma unroll
  for (int v = 0; v < kV; ++v)
    if (voxel + v < map.voxels)
      FOR_CLASSES(c, 0, kMost, classes) store(map, first + v * map.voxel_stride + c * map.channel_stride, z[v][c]);
}

// Softmax of a voxel and its confident foreground class: the argmax where that is no background and at least as probable as
// the threshold, else 0.
template <int kMost>
struct Described {
  float p[kMost];
  float log_total, highest, confident;
};

template <int kMost>
__device__ Described<kMost> describe_voxel(const float (&z)[kMost], int classes, float threshold) {
  Described<kMost> out;
  const float total = exp_shifted<kMost>(z, classes, out.p, out.highest);
  const float inverse = 1.f / total;
  FOR_CLASSES(c, 0, kMost, classes) out.p[c] = out.p[c] * inverse;
  out.log_total = log(total);
  out.confident = inverse >= threshold ? argmax<kMost>(z, classes) : 0.f;
  return out;
}

// Of `count` voxels; 0 of none.
template <class T>
__device__ T mean(T sum, int64_t count) {
  return sum / T(count > 1 ? count : 1);
}

// 1 - Dice of a class, from the voxels that have it, sum p_c over them, and sum p_c^2 over all.
__device__ inline double dice_loss(double size, double overlap, double square, double smooth) {
  return 1 - (2 * overlap + smooth) / (square + size + smooth);
}

// Its gradient times `share`: d p_c = linear [y = c] + quadratic p_c; the background has none.
__device__ inline void dice_gradient(int c, double size, double overlap, double square, double smooth, double share, float& linear,
                                     float& quadratic) {
  const double total = square + size + smooth;
  linear = c ? float(-2 / total * share) : 0.f;
  quadratic = c ? float(2 * (2 * overlap + smooth) / (total * total) * share) : 0.f;
}

}  // namespace sslfast::cuda
