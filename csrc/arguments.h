// Arguments of the kernels on every device. Independent of torch.
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

enum class DType { f32, bf16, f16 };

struct LinearMap;

// A map [volumes, channels, voxels]: contiguous, channels last, or with any other three strides.
struct VoxelMap {
  void* data;
  DType dtype;
  int64_t volumes, channels, voxels;
  int64_t volume_stride, channel_stride, voxel_stride;  // elements
  const LinearMap* linear = nullptr;                    // if set: computed from features instead of stored

  VOXEL_FN int64_t offset(int64_t volume, int64_t voxel) const { return volume * volume_stride + voxel * voxel_stride; }
};

// True if a linear index into [volumes, voxels] is not out of range.
VOXEL_FN bool is_voxel(const VoxelMap& map, int64_t index) { return index >= 0 && index < map.volumes * map.voxels; }

// Logits z = W f + b of a 1 x 1 x 1 classifier, or their gradient. A tile of z is computed from the features; a tile of
// dz is turned into the gradients of features and classifier.
struct LinearMap {
  VoxelMap features;       // [volumes, width, voxels]
  const float* weights;    // [volumes, channels, width + 1], the last column is b
  VoxelMap grad_features;  // only for a gradient
  double* grad_weights;    // only for a gradient: [chunks, channels, width + 1], sums of each chunk; initially 0
};

// Side input of a term: labels or flags [volumes, voxels] of any integer dtype. A term gets the value as a float if it
// is in 0 .. last, kIgnored if it is `ignore` or beyond the last voxel, else kOutOfRange.
struct Side {
  const void* data;  // null: every voxel has the value 0
  int bytes;         // bytes per element
  bool is_signed;
  int64_t last, ignore;
};
constexpr float kIgnored = -1.f, kOutOfRange = -2.f;

// Arguments of InfoNCE, all contiguous: anchors [C, A, K], prototypes [C, K], negatives [C, Q, K].
struct Contrast {
  int64_t classes, anchors, negatives, width;
  const float *anchor, *prototype, *negative;
  const int64_t *anchor_counts, *prototype_counts, *negative_counts;
  float temperature;
};

// Whether a count of rows fits, and the rows that are read if it does not.
VOXEL_FN bool is_count(int64_t count, int64_t rows) { return count >= 0 && count <= rows; }
VOXEL_FN int64_t rows_of(int64_t count, int64_t rows) { return count < 0 ? 0 : count < rows ? count : rows; }

}  // namespace sslfast
