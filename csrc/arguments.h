// What the kernels take on every device. Nothing here knows torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VOXEL_FN __host__ __device__ __forceinline__
#elif !defined(VOXEL_FN)
#define VOXEL_FN inline __attribute__((always_inline))
#endif

namespace sslfast {

constexpr int kMaxClasses = 32;

// The flags of a voxel (sslfast/ops/flags.py)
constexpr uint8_t kClass = 0x1f;
constexpr uint8_t kReliable = 0x20;
constexpr uint8_t kMostFlags = kClass | kReliable;

enum class DType { f32, bf16, f16 };

struct LinearMap;

// [volumes, channels, voxels]: contiguous, channels last, or any other three strides.
struct VoxelMap {
  void* data;
  DType dtype;
  int64_t volumes, channels, voxels;
  int64_t volume_stride, channel_stride, voxel_stride;  // elements
  const LinearMap* linear = nullptr;                    // set: not in memory but computed from features

  VOXEL_FN int64_t offset(int64_t volume, int64_t voxel) const { return volume * volume_stride + voxel * voxel_stride; }
};

// Logits z = W f + b of a 1 x 1 x 1 classifier, or their gradient: tiles of z come from features, tiles of dz go to the
// gradients of features and classifier.
struct LinearMap {
  VoxelMap features;       // [volumes, width, voxels]
  const float* weights;    // [volumes, channels, width + 1], the last column b
  VoxelMap grad_features;  // of a gradient
  double* grad_weights;    // of a gradient: [chunks, channels, width + 1], a chunk's sums; 0 before
};

// What a term knows of a voxel besides its logits: a label or flags [volumes, voxels], of any integer dtype. As a
// number it is the value if that lies in 0 .. last, kIgnored if it is `ignore` or there is no voxel, else kOutOfRange.
struct Side {
  const void* data;  // null: every voxel has the value 0
  int bytes;         // of an element
  bool is_signed;
  int64_t last, ignore;
};
constexpr float kIgnored = -1.f, kOutOfRange = -2.f;

// Rows of C classes, all contiguous: anchors [C, A, K], prototypes [C, K], negatives [C, Q, K].
struct Contrast {
  int64_t classes, anchors, negatives, width;
  const float *anchor, *prototype, *negative;
  const int64_t *anchor_counts, *prototype_counts, *negative_counts;
  float temperature;
};

}  // namespace sslfast
