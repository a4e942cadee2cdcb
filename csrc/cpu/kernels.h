// The CPU kernels; the specification is `<op>_ref` in sslfast/ops. Independent of torch.
#pragma once

#include <cstdint>

#include "voxels.h"

namespace sslfast {

// A term of terms.h over its maps. sums, grad_sums: the scalars, then the rows [kRows, C]; to: the students' gradients.
template <class Term>
void sum_over_voxels(const Term& term, const VoxelMap* maps, const Side& side, double* sums);
template <class Term>
void gradient_of_sums(const Term& term, const VoxelMap* maps, const Side& side, const double* grad_sums,
                      const VoxelMap* to);

// flags [volumes, voxels]; threshold [], computed here unless `given`.
void reliability(const VoxelMap& logits, double percentile, bool given, float* threshold, uint8_t* flags);
void voxel_entropy(const VoxelMap& logits, float* entropy);

// sums [C, K], counts [C]
void class_prototypes(const VoxelMap& features, const uint8_t* flags, int classes, float* sums, int64_t* counts);

// indices [C, capacity], counts [C]; `first` is added to a voxel's index for its priority.
void sample_voxels(const uint8_t* flags, int64_t voxels, const int64_t* quotas, int classes, uint64_t seed,
                   uint32_t step, bool negatives, uint64_t first, int64_t capacity, int64_t* indices, int64_t* counts);

// rows [M, K] of features at linear indices [M]; -1 gives zeros.
void gather_voxels(const VoxelMap& features, const int64_t* indices, int64_t count, float* rows);
// Adds the rows to grad.
void gather_voxels_backward(const float* rows, const int64_t* indices, int64_t count, const VoxelMap& grad);

// sums: the sum of the anchors' losses, and the number of anchors; lse [C, A].
void voxel_infonce(const Contrast& contrast, double* sums, float* lse);
// grad: gradient of the sum of the losses; grad_anchor [C, A, K].
void voxel_infonce_backward(const Contrast& contrast, const float* lse, float grad, float* grad_anchor);

// How dense activations (contiguous or channels last) are normalised. statistics [groups, 2, C]: means and variances.
struct Norm {
  const double* statistics;
  int64_t groups;  // 1, or one per volume
  const float *weight, *bias;
  float eps;
  bool relu;
};
void norm_statistics(const VoxelMap& x, bool per_volume, double* statistics);
// y = relu(norm(x) + residual) + skip; either may be null. All have the layout of x.
void norm_apply(const VoxelMap& x, const Norm& norm, const VoxelMap* residual, const VoxelMap* skip, const VoxelMap& y);
// sums [groups, 2, C] of the gradient before the ReLU, and of its product with the normalised x.
void norm_backward_sums(const VoxelMap& grad, const VoxelMap& x, const Norm& norm, const VoxelMap* residual,
                        double* sums);
// means [groups, 2, C]: those sums over the count of the statistics. grad_residual may be null.
void norm_backward(const VoxelMap& grad, const VoxelMap& x, const Norm& norm, const VoxelMap* residual,
                   const double* means, const VoxelMap& grad_x, const VoxelMap* grad_residual);

}  // namespace sslfast
