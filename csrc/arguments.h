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

// Logits z = W f + b of a 1 x 1 x 1 classifier, or their gradient: tiles of z come from features, tiles of dz go to the gradients
// of features and classifier.
struct LinearMap {
  VoxelMap features;         // [volumes, width, voxels]
  const float* weights;      // [volumes, channels, width + 1], the last column b
  VoxelMap grad_features;    // of a gradient
  double* grad_weights;      // of a gradient: [chunks, channels, width + 1], a chunk's sums; 0 before
};

// Labels [volumes, voxels] of any integer dtype.
struct Labels {
  const void* data;
  int bytes;  // of an element
  bool is_signed;
};

// What the backward pass of `dual_supervised` needs, as doubles: annotated and mask voxels, labels out of range (how many, the
// first one's place and value), then [C] sizes, [2, C] overlaps and [2, C] squares.
constexpr int kHeader = 5;

enum class Mode { winner, union_, both };

struct ReliabilityOptions {
  double percentile;
  Mode mode;
  bool union_label, loser_anchor, per_class;
};

// Rows of C classes, all contiguous: anchors [C, A, K], prototypes [C, K], negatives [C, Q, K].
struct Contrast {
  int64_t classes, anchors, negatives, width;
  const float *anchor, *prototype, *negative;
  const int64_t *anchor_counts, *prototype_counts, *negative_counts;
  float temperature;
};

}  // namespace sslfast
