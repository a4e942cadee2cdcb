// What a block does for `class_prototypes`: the sums of its reliable voxels' unit features by class.
#pragma once

#include "voxels.cuh"

namespace sslfast::cuda {

// 1 / |f|, 0 for a vector shorter than 1e-12.
__device__ inline float inverse_length(float square) {
  const float length = sqrtf(square);
  return length < 1e-12f ? 0.f : 1.f / length;
}

__device__ inline float inverse_length(const Map& features, int64_t first) {
  float square = 0;
  for (int64_t k = 0; k < features.channels; ++k) {
    const float f = load(features, first + k * features.channel_stride);
    square += f * f;
  }
  return inverse_length(square);
}

// Sums of unit features [parts, C, K] in dynamic shared memory. The warps stage 32 channels of their voxels, a lane a voxel;
// then each of the first `parts` warps adds up some of the warps' voxels, a lane a channel, so that no two lanes share a sum.
struct PrototypeSums {
  static constexpr int kStride = kWarp + 1;           // of a staged channel: no two lanes on one bank
  static constexpr int kStaged = kWarps * kWarp * kStride;  // floats
  static constexpr int kMostSums = 12 * 1024;         // floats

  const Map& map;
  int classes, width, parts;
  float *staged, *sums;

  // Floats of dynamic shared memory.
  static VOXEL_FN int parts_of(int classes, int64_t width) {
    const int64_t parts = width ? kMostSums / (classes * width) : 1;
    return int(parts < 1 ? 1 : parts < kWarps ? parts : kWarps);
  }
  static VOXEL_FN size_t shared_bytes(int classes, int64_t width) {
    return width ? sizeof(float) * (kStaged + parts_of(classes, width) * classes * width) : 0;
  }

  __device__ PrototypeSums(const Map& features, int num_classes, int64_t k)
      : map(features), classes(num_classes), width(int(k)), parts(parts_of(num_classes, k)),
        staged(reinterpret_cast<float*>(dynamic_shared)), sums(staged + kStaged) {
    for (int i = int(threadIdx.x); i < parts * classes * width; i += kThreads) sums[i] = 0;
    __syncthreads();
  }

  // One voxel a thread; label: its class, or -1. For whole blocks.
  __device__ void add(int64_t volume, int64_t voxel, int label) {
    __shared__ int labels[kThreads];
    labels[threadIdx.x] = label;
    if (!__syncthreads_or(label >= 0)) return;
    const int64_t first = map.offset(volume, voxel);
    const float inverse = label >= 0 ? inverse_length(map, first) : 0.f;
    for (int begin = 0; begin < width; begin += kWarp) {
      const int channels = width - begin < kWarp ? width - begin : kWarp;
      float* own = staged + warp() * kWarp * kStride + lane();
      if (label >= 0)
        for (int k = 0; k < channels; ++k)
          own[k * kStride] = inverse == 0.f ? 0.f : inverse * load(map, first + (begin + k) * map.channel_stride);
      __syncthreads();
      if (warp() < parts && lane() < channels)
        for (int w = warp(); w < kWarps; w += parts)
          for (int v = 0; v < kWarp; ++v) {
            const int c = labels[w * kWarp + v];
            if (c >= 0) sums[(warp() * classes + c) * width + begin + lane()] += staged[(w * kWarp + lane()) * kStride + v];
          }
      __syncthreads();
    }
  }

  __device__ void write(double* row) const {
    __syncthreads();
    for (int i = int(threadIdx.x); i < classes * width; i += kThreads) {
      double total = 0;
      for (int p = 0; p < parts; ++p) total += sums[p * classes * width + i];
      row[i] = total;
    }
  }
};

}  // namespace sslfast::cuda
