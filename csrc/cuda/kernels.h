// What the CUDA kernels compute; the specification is `<op>_ref` in sslfast/ops. Nothing here knows torch.
//
// The whole step is five launches forward and two backward: the passes below, each of which can do less, for a single op.
// Pointers are to device memory; a kernel reads no more of the host's than its arguments. `tickets` are 0 before a launch.
#pragma once

#include <cstddef>

#include "../arguments.h"

namespace sslfast::cuda {

constexpr int kThreads = 256;     // of every block
constexpr int kMostBlocks = 1024;  // of a pass; no sum depends on the device
constexpr int kTickets = 1 + kMostBlocks / 32;
constexpr int kMostWidth = 256;   // channels of a feature vector

// A map whose voxels can be read four at a time.
struct Map : VoxelMap {
  bool by_four;
};
Map device_map(const VoxelMap& map);

// --- `dual_supervised` over the labelled volumes ---
struct Supervised {
  Map a, b;
  Labels labels;
  float threshold;
  int64_t ignore;
  double smooth;
  double* rows;  // scratch [blocks, 6 + 5 C]
  int* tickets;  // [kTickets]
  unsigned long long* last_outside;  // [], 0 before
  float* losses;    // [3, 2]
  int64_t* mask;    // []
  double* sums;     // [kHeader + 5 C]
  const int64_t* given;  // [] or null
  int64_t* winner;       // [] or null: the given, else the network with the lower Dice
};

// --- exact percentiles of both networks' entropies over the unlabelled volumes ---
// An entropy is a float in [0, ln 32], so its bits sort as it does: the first pass counts the upper 16, the second the lower 15
// of those that share a wanted rank's upper ones. Bytes a voxel: the logits and 4 written, then 4 read.
constexpr int kLowBits = 15;
constexpr int kLowBins = 1 << kLowBits;
constexpr int kHighBins = (0x40800000 >> kLowBits) + 1;  // the last: NaN

// The two order statistics between which numpy's linear percentile lies.
struct Rank {
  uint32_t bin[2];
  int64_t rest[2];  // ranks within the bins
  double fraction;
  int kind;  // 0; 1: no voxel; 2: a NaN among them
};
struct Percentile {
  Map maps[2];
  double percentile;
  int groups;         // 1; or C, a voxel's group being its class
  uint16_t* keys;     // scratch [2, voxels]
  uint32_t* high;     // [2, groups, kHighBins], 0 before
  uint32_t* low;      // [2, groups, 2, kLowBins], 0 before
  Rank* ranks;        // scratch [2, groups]
  int* tickets;       // [4]
  float* thresholds;  // [2, groups]
};

// Whom unlabelled voxels are taught by: the state's class, the other network's argmax, or `rectified_consistency`.
enum class Target { state, other, rectified };

// --- the byte map, and what follows from it ---
struct Decision {
  Map a, b;
  bool given;      // state is read, not written
  uint8_t* state;  // [volumes, voxels]
  ReliabilityOptions options;
  const float* thresholds;  // [2] or [2, C]
  const int64_t* winner;    // []

  Target target;             // `rectified_consistency` has what stands in brackets
  float* pseudo;             // [2, 2] ([4]) or null: the losses
  double* pseudo_sums;       // [6 C] ([3, C])
  double smooth;             // Dice's epsilon
  int64_t* pseudo_voxels;  // [] ([3])
  float* kept;               // [] or null: their fraction (the mean of both networks')

  Map features[2];  // `class_prototypes` of the second where *second is not 0
  int64_t width;    // 0: no prototypes
  const int64_t* second;
  int classes;              // of the state
  float* prototypes;        // [C, K]
  int64_t* prototype_counts;  // [C]

  unsigned long long* bytes;  // [256], 0 before, or null: how many voxels have each byte

  double* rows;  // scratch [blocks, quantities]
  int* tickets;  // [kTickets]

  // Reliable voxels, CE [2], pseudo_sums; or voxels taught, rectified [2] each, cosine and products.
  VOXEL_FN int64_t of_pseudo() const {
    return !pseudo ? 0 : target == Target::rectified ? 5 + 3 * a.channels : 3 + 6 * a.channels;
  }
  VOXEL_FN int64_t quantities() const { return of_pseudo() + classes * width; }   // then unit features [C, K]
};

// --- `sample_voxels` and the samples' features ---
// Of n candidates the k smallest priorities are wanted: a priority above (k + 8 sqrt k + 16) / n 2^32 is almost never among
// them (8 standard deviations), so only those below are kept, and sorted. Bytes a voxel and class: 1.
struct Candidate {
  int64_t voxel;
  uint32_t priority;
};
struct Role {
  int64_t quotas[kMaxClasses];
  int64_t capacity;  // the largest quota
  int room;          // candidates that `list` holds a class: a power of two
  Candidate* list;   // scratch [C, room]
  int64_t* indices;  // [C, capacity]
  int64_t* counts;   // [C]
  float* rows;       // [C, capacity, K] or null
};
struct Sampling {
  const uint8_t* state;
  int64_t voxels;
  int classes;
  const unsigned long long* bytes;  // [256], of the decision
  uint64_t seed, counted_from;  // the first voxel's number in the draw
  uint32_t step;
  int first, roles;  // 0: anchors, 1: negatives
  Role role[2];
  int* found;    // [2 C], 0 before
  int* tickets;  // [2 C]
  Map features[2];
  const int64_t* second;
};
// Room for a class's candidates of which `capacity` are wanted.
int room_for(int64_t capacity);

// --- InfoNCE, and the sum of all terms ---
struct Total {
  float* losses;  // [2] or null
  const float *supervised, *pseudo, *thresholds;
  int thresholds_count;
  const int64_t* winner;
  float discrepancy, pseudo_weight, pseudo_dice_weight, contrast;
  bool loser_learns;
  Target target;
};

// --- the gradients of the logits ---
struct SupervisedGradient {
  const float* values;  // of the losses: [3, 2], or [2] with stride 0
  int stride;
  float discrepancy;  // factor
};
struct PseudoGradient {
  const float* values;  // of the losses: [2, 2] ([4]), or [2] of their sum with stride 0
  int stride;
  float ce, dice;         // factors
  const int64_t* winner;  // null, or the network that does not learn
};
struct Gradient {
  Supervised supervised;  // no volumes: none
  SupervisedGradient of_supervised;
  Map to_supervised[2];

  Map a, b;  // no volumes: none
  const uint8_t* state;
  const int64_t* pseudo_voxels;
  const double* pseudo_sums;
  double smooth;
  Target target;
  PseudoGradient of_pseudo;
  Map to_pseudo[2];
};

// --- `masked_consistency` ---
struct MaskedConsistency {
  Map student, teacher;
  float sharpness;    // 1 / temperature
  float max_entropy;  // voxels teach where the teacher's entropy lies below it
  double* rows;       // scratch [blocks, 2]
  int* tickets;       // [kTickets]
  float* loss;        // []
  int64_t* certain_voxels;  // []
};

// The launches. Of the first two, maps without volumes are left out; so is what is null in a decision.
void describe(const Supervised& supervised, const Percentile& percentile, void* stream);
void refine(const Percentile& percentile, void* stream);
void decide(const Decision& decision, void* stream);
void sample_voxels(const Sampling& sampling, void* stream);
void voxel_infonce(const Contrast& contrast, float* loss, float* lse, double* rows, int* tickets, const Total& total,
                   void* stream);

void gradient(const Gradient& gradient, void* stream);
// Of the anchors: grad_anchor, or null and added into `to` at `indices`, for the network that is not the winner.
struct Scatter {
  Map to[2];
  const int64_t* indices;  // [C, A]
  const int64_t* winner;
  float factor;
};
void anchors_backward(const Contrast& contrast, const float* lse, const float* grad, float* grad_anchor, const Scatter& scatter,
                      void* stream);

// What only single ops need.
void masked_consistency(const MaskedConsistency& consistency, void* stream);
void masked_consistency_backward(const MaskedConsistency& consistency, const float* grad_loss, const Map& grad, void* stream);
void voxel_entropy(const Map& logits, float* entropy, void* stream);
void class_prototypes_backward(const Map& features, const uint8_t* state, int classes, const float* grad_sums, const Map& grad,
                               void* stream);
void gather_voxels(const Map& features, const int64_t* indices, int64_t count, float* rows, void* stream);
void gather_voxels_backward(const float* rows, const int64_t* indices, int64_t count, const Map& grad, void* stream);
void keys_backward(const Contrast& contrast, const float* lse, const float* grad, float* grad_prototype, float* grad_negative,
                   void* stream);

void fill_zero(void* data, size_t bytes, void* stream);
void copy(const void* from, void* to, size_t bytes, void* stream);
// Makes a device the current one of this thread; returns the one before.
int set_device(int device);

int64_t rows_of_supervised(const VoxelMap& map, int64_t classes);
int64_t rows_of_decision(const Decision& decision);
int64_t rows_of_contrast(const Contrast& contrast);
int64_t rows_of_masked(const VoxelMap& map);

}  // namespace sslfast::cuda
