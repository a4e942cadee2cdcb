// What the CPU kernels compute; the specification is `<op>_ref` in sslfast/ops. Nothing here knows torch.
#pragma once

#include <cstdint>

#include "voxels.h"

namespace sslfast {

// What the supervised losses of both networks sum up over the annotated voxels.
struct SupervisedSums {
  std::vector<int64_t> size;        // [C] voxels with label c
  int64_t annotated, mask;          // voxels
  std::vector<double> ce, discrepancy;  // [2]
  std::vector<double> overlap, square;  // [2, C] sum p_c [y = c], sum p_c^2
  int64_t outside, first_outside, value_outside;  // labels out of range: how many, the first one's place and value
};
SupervisedSums dual_supervised(const VoxelMap& a, const VoxelMap& b, Labels labels, float threshold, int64_t ignore);

// grad_a, grad_b = gradients of the logits, from those of the sums' terms: d ce, d p_c = linear[c] [y = c] + square[c] p_c, d mask.
struct SupervisedGradient {
  float ce[2], discrepancy[2];
  std::vector<float> linear, square;  // [2, C]
};
void dual_supervised_backward(const VoxelMap& a, const VoxelMap& b, Labels labels, float threshold, int64_t ignore,
                              const SupervisedGradient& gradient, const VoxelMap& grad_a, const VoxelMap& grad_b);

// state [volumes, voxels]; thresholds [2] or with per_class [2, C], found here or given.
void reliability(const VoxelMap& a, const VoxelMap& b, const ReliabilityOptions& options, bool b_wins, bool given, float* thresholds,
                 uint8_t* state);
void voxel_entropy(const VoxelMap& logits, float* entropy);

struct PseudoSums {
  int64_t reliable;
  double ce[2];
  std::vector<double> size, overlap, square;  // [2, C] voxels taught c, sum p_c [t = c], sum p_c^2
};
// other: each network's target is the other one's argmax, not the state's class.
PseudoSums pseudo_supervised(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other);
// From the gradients of the sums' terms: d ce, d p_c = linear[c] [t = c] + square[c] p_c.
struct PseudoGradient {
  float ce[2];
  std::vector<float> linear, square;  // [2, C]
};
void pseudo_supervised_backward(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other,
                                const PseudoGradient& gradient, const VoxelMap& grad_a, const VoxelMap& grad_b);

// Each network learns where the state says that the other is sure.
struct RectifiedSums {
  double rectified[2] = {}, cosine = 0;
  int64_t taught[2] = {};        // voxels
  std::vector<double> products;  // [3, C] sum p_a^2, p_b^2 and p_a p_b over all voxels; 0 for the background
};
RectifiedSums rectified_consistency(const VoxelMap& a, const VoxelMap& b, const uint8_t* state);
// From the gradients of the sums: square twice that of sum p_a^2, which is also that of sum p_b^2.
struct RectifiedGradient {
  float rectified[2], cosine;
  std::vector<float> square, product;  // [C]
};
void rectified_consistency_backward(const VoxelMap& a, const VoxelMap& b, const uint8_t* state,
                                    const RectifiedGradient& gradient, const VoxelMap& grad_a, const VoxelMap& grad_b);

// limit: voxels teach where the teacher's entropy lies below it.
struct MaskedSums {
  double squares;
  int64_t certain;
};
MaskedSums masked_consistency(const VoxelMap& student, const VoxelMap& teacher, float temperature, float limit);
void masked_consistency_backward(const VoxelMap& student, const VoxelMap& teacher, float temperature, float limit, float scale,
                                 const VoxelMap& grad);

// sums [C, K], counts [C]
void class_prototypes(const VoxelMap& features, const uint8_t* state, int classes, float* sums, int64_t* counts);
void class_prototypes_backward(const VoxelMap& features, const uint8_t* state, int classes, const float* grad_sums,
                               const VoxelMap& grad);

// indices [C, capacity], counts [C]; a voxel's priority is that of `first` more.
void sample_voxels(const uint8_t* state, int64_t voxels, const int64_t* quotas, int classes, uint64_t seed, uint32_t step,
                   bool negatives, uint64_t first, int64_t capacity, int64_t* indices, int64_t* counts);

// rows [M, K] of features at linear indices [M]; -1 gives zeros.
void gather_voxels(const VoxelMap& features, const int64_t* indices, int64_t count, float* rows);
// Adds the rows to grad.
void gather_voxels_backward(const float* rows, const int64_t* indices, int64_t count, const VoxelMap& grad);

// lse [C, A]; returns the mean loss.
double voxel_infonce(const Contrast& contrast, float* lse);
// grad_prototype and grad_negative may be null.
void voxel_infonce_backward(const Contrast& contrast, const float* lse, float grad, float* grad_anchor,
                            float* grad_prototype, float* grad_negative);

}  // namespace sslfast
