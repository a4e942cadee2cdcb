// The CUDA kernels; the specification is `<op>_ref` in sslfast/ops. Independent of torch. All pointers are to device
// memory.
#pragma once

#include <cstddef>

#include "../arguments.h"

namespace sslfast::cuda {

constexpr int kThreads = 256;      // threads per block
constexpr int kMostBlocks = 1024;  // blocks per pass; fixed, so that no sum depends on the device
constexpr int kMostWidth = 256;    // channels of a feature vector

// Scratch memory in which the blocks of a pass add up their results.
struct Partials {
  static constexpr int kArrivals = 1 + kMostBlocks / 32;

  int* arrival_counters;  // [kArrivals], initially 0
  double* rows;           // [blocks, quantities]
};

// --- a term of terms.h over its maps ---
template <class Term>
struct OnVoxels {
  VoxelMap maps[Term::kMaps];
  Side side;
  Term term;
};
template <class Term>
struct Students {
  VoxelMap maps[Term::kStudents];
};
int blocks_for_logits(const VoxelMap& logits);
// sums, grad_sums: the scalars, then the rows [kRows, C]; to: the students' gradients.
template <class Term>
void sum_over_voxels(const OnVoxels<Term>& in, const Partials& partials, double* sums, void* stream);
template <class Term>
void gradient_of_sums(const OnVoxels<Term>& in, const double* grad_sums, const Students<Term>& to, void* stream);

// --- `reliability` ---
// An entropy is a float in [0, ln 32], so its bits have the same order. The first pass counts the upper 15 bits. The
// second pass counts the lower 16 bits of entropies whose upper bits are those of a wanted rank.
constexpr int kLowBits = 16;
constexpr int kLowBins = 1 << kLowBits;
constexpr int kHighBins = (0x40800000 >> kLowBits) + 1;  // the last bin is for NaN

// The number of bins, padded so that every thread of a block has the same number of groups of four.
VOXEL_FN constexpr int padded_bins(int bins) { return (bins + 4 * kThreads - 1) / (4 * kThreads) * (4 * kThreads); }

// The two order statistics that numpy's linear percentile interpolates.
struct OrderStatistics {
  enum Kind { kFound, kNoVoxel, kHasNan };

  uint32_t bin[2];
  uint64_t rest[2];  // ranks within the bins
  double fraction;
  int kind;
};
struct Reliability {
  VoxelMap logits;
  const double* percentile;     // []
  uint16_t* keys;               // scratch [voxels], or null if the threshold is given
  uint32_t* high;               // scratch [padded_bins(kHighBins)], initially 0
  uint32_t* low;                // scratch [2, kLowBins], initially 0
  int* arrival_counters;        // scratch [2], initially 0
  OrderStatistics* statistics;  // scratch []
  float* threshold;             // []
  uint8_t* flags;               // [volumes, voxels]
};
void reliability(const Reliability& reliability, void* stream);
void voxel_entropy(const VoxelMap& logits, float* entropy, void* stream);

// --- `class_prototypes` ---
struct Prototypes {
  VoxelMap features, other;
  const int64_t* second;  // [] or null; if not 0, `other` is used instead of `features`
  const uint8_t* flags;
  int classes;
  Partials partials;  // for C K sums and C counts
  float* sums;        // [C, K]
  int64_t* counts;    // [C]
};
int64_t partials_of(const Prototypes& prototypes);
void class_prototypes(const Prototypes& prototypes, void* stream);

// --- `sample_voxels` ---
// Of n candidates, the k with the smallest priorities are drawn. Only candidates with a priority below
// (k + 8 sqrt k + 16) / n 2^32 are kept and sorted: a margin of 8 standard deviations.
struct Candidate {
  int64_t voxel;
  uint32_t priority;
};
struct Sampling {
  const uint8_t* flags;
  int64_t voxels;
  int classes;
  int64_t quotas[kMaxClasses];
  uint64_t seed, counted_from;  // index of the first voxel in the draw
  const int64_t* step;          // []
  bool negatives;
  int64_t capacity;                       // the largest quota
  int room;                               // capacity of `list` per class, a power of two
  unsigned long long* histogram;          // scratch [256], of the flags; initially 0
  int *num_collected, *arrival_counters;  // scratch [C], initially 0
  Candidate* list;                        // scratch [C, room]
  int64_t* indices;                       // [C, capacity]
  int64_t* counts;                        // [C]
};
int room_for(int64_t capacity);
void sample_voxels(const Sampling& sampling, void* stream);

// rows [M, K] of features at linear indices [M]; -1 gives zeros.
void gather_voxels(const VoxelMap& features, const int64_t* indices, int64_t count, float* rows, void* stream);
// Adds the rows to grad.
void gather_voxels_backward(const float* rows, const int64_t* indices, int64_t count, const VoxelMap& grad,
                            void* stream);

// --- `voxel_infonce` ---
int64_t partials_of(const Contrast& contrast);
// sums: the sum of the anchors' losses, and the number of anchors; lse [C, A].
void voxel_infonce(const Contrast& contrast, const Partials& partials, double* sums, float* lse, void* stream);
// grad_sums: gradient of the sum of the losses, and one that is not read; grad_anchor [C, A, K].
void voxel_infonce_backward(const Contrast& contrast, const float* lse, const double* grad_sums, float* grad_anchor,
                            void* stream);

// --- the device ---
void fill_zero(void* data, size_t bytes, void* stream);
void copy(const void* from, void* to, size_t bytes, void* stream);
// Makes a device the current one of this thread; returns the previous one.
int set_device(int device);

}  // namespace sslfast::cuda
