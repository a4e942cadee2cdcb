// Implements the ops of sslfast/ops with the CPU kernels. The arguments were checked in Python.
#include <algorithm>

// first: voxel_math.h needs its types
#include "cpu/vec.h"

#include "bind_ops.h"
#include "cpu/kernels.h"

namespace sslfast {

namespace {

// The VoxelMap of logits, stored or computed from features, and the memory it refers to.
struct OwnedLogits {
  OwnedMap owned;
  MaybeTensor weights;
  LinearMap linear;
  VoxelMap map;

  explicit OwnedLogits(const Logits& logits) : owned(logits.values), map(owned.map) {
    if (!logits.weights) return;
    weights = torch::stable::contiguous(*logits.weights);
    linear = {owned.map, data<float>(*weights), {}, nullptr};
    map.channels = weights->size(1);
    map.linear = &linear;
  }
  OwnedLogits(const OwnedLogits&) = delete;
};

// The VoxelMap of the gradient of such logits.
struct OwnedGradient {
  OwnedMap owned;
  MaybeTensor weights;
  std::vector<double> sums;
  LinearMap linear;
  VoxelMap map;

  OwnedGradient(const OwnedLogits& logits, const Logits& to) : owned(to.values), weights(to.weights), map(owned.map) {
    if (!logits.map.linear) return;
    sums.resize(chunks_of(map.volumes, map.voxels) * logits.map.channels * (owned.map.channels + 1));
    linear = {logits.linear.features, logits.linear.weights, owned.map, sums.data()};
    map.channels = logits.map.channels;
    map.linear = &linear;
  }
  OwnedGradient(const OwnedGradient&) = delete;

  // Adds up the chunks of each volume, in order.
  void finish() {
    if (!map.linear || !map.volumes) return;
    const int64_t cells = map.channels * (owned.map.channels + 1), chunks = int64_t(sums.size()) / cells / map.volumes;
    float* out = data<float>(*weights);
    for (int64_t volume = 0; volume < map.volumes; ++volume)
      for (int64_t i = 0; i < cells; ++i) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[(volume * chunks + chunk) * cells + i];
        out[volume * cells + i] = float(total);
      }
  }
};

// The logits maps of a term.
template <class Term>
struct OwnedMaps {
  std::optional<OwnedLogits> logits[Term::kMaps];
  VoxelMap maps[Term::kMaps];

  explicit OwnedMaps(const Logits* from) {
    for (int m = 0; m < Term::kMaps; ++m) maps[m] = logits[m].emplace(from[m]).map;
  }
};

int64_t value_of(const Tensor& number) { return *data<int64_t>(number); }

struct Device {
  template <class Term>
  static Tensor sum_over_voxels(const Term& term, const Logits* logits, const Side& side) {
    const int64_t classes = logits[0].classes();
    Tensor sums = empty(logits[0].values, {Term::kScalars + Term::kRows * classes}, ScalarType::Double);
    const OwnedMaps<Term> owned(logits);
    sslfast::sum_over_voxels(term, owned.maps, side, data<double>(sums));
    return sums;
  }

  template <class Term>
  static void gradient_of_sums(const Term& term, const Tensor& grad_sums, const Logits* logits, const Side& side,
                               const Logits* to) {
    const Tensor g = torch::stable::contiguous(grad_sums);
    const OwnedMaps<Term> owned(logits);
    std::optional<OwnedGradient> gradients[Term::kStudents];
    VoxelMap maps[Term::kStudents];
    for (int n = 0; n < Term::kStudents; ++n) maps[n] = gradients[n].emplace(*owned.logits[n], to[n]).map;
    sslfast::gradient_of_sums(term, owned.maps, side, data<double>(g), maps);
    for (auto& gradient : gradients) gradient->finish();
  }

  static std::tuple<Tensor, Tensor> reliability(const Tensor& logits, MaybeTensor weights, const Tensor& percentile,
                                                MaybeTensor given) {
    Tensor flags = empty(logits, voxel_shape(logits), ScalarType::Byte),
           threshold = empty(logits, {}, ScalarType::Float);
    if (given) *data<float>(threshold) = *data<float>(*given);
    sslfast::reliability(OwnedLogits({logits, weights}).map, *data<double>(percentile), given.has_value(),
                         data<float>(threshold), data<uint8_t>(flags));
    return {threshold, flags};
  }

  static Tensor voxel_entropy(const Tensor& logits, MaybeTensor weights) {
    Tensor out = empty(logits, voxel_shape(logits), ScalarType::Float);
    sslfast::voxel_entropy(OwnedLogits({logits, weights}).map, data<float>(out));
    return out;
  }

  static std::tuple<Tensor, Tensor> class_prototypes(const Tensor& first, const Tensor& flags, int64_t num_classes,
                                                     MaybeTensor other, MaybeTensor second) {
    const Tensor& features = other && value_of(*second) ? *other : first;
    Tensor owned = torch::stable::contiguous(flags);
    Tensor sums = empty(features, {num_classes, features.size(1)}, ScalarType::Float);
    Tensor counts = empty(features, {num_classes}, ScalarType::Long);
    sslfast::class_prototypes(OwnedMap(features), data<uint8_t>(owned), int(num_classes), data<float>(sums),
                              data<int64_t>(counts));
    return {sums, counts};
  }

  static std::tuple<Tensor, Tensor> sample_voxels(const Tensor& flags, std::vector<int64_t> quotas, int64_t seed,
                                                  const Tensor& step, bool negatives, int64_t first) {
    Tensor owned = torch::stable::contiguous(flags);
    const int64_t classes = int64_t(quotas.size()), capacity = *std::max_element(quotas.begin(), quotas.end());
    Tensor indices = empty(flags, {classes, capacity}, ScalarType::Long),
           counts = empty(flags, {classes}, ScalarType::Long);
    sslfast::sample_voxels(data<uint8_t>(owned), owned.numel(), quotas.data(), int(classes), uint64_t(seed),
                           uint32_t(value_of(step)), negatives, uint64_t(first), capacity, data<int64_t>(indices),
                           data<int64_t>(counts));
    return {indices, counts};
  }

  static Tensor gather_voxels(const Tensor& features, const Tensor& indices) {
    Tensor i = torch::stable::contiguous(indices);
    std::vector<int64_t> shape(i.sizes().begin(), i.sizes().end());
    shape.push_back(features.size(1));
    Tensor rows = empty(features, shape, ScalarType::Float);
    sslfast::gather_voxels(OwnedMap(features), data<int64_t>(i), i.numel(), data<float>(rows));
    return rows;
  }

  static void gather_voxels_backward(const Tensor& grad_rows, const Tensor& indices, Tensor grad) {
    Tensor i = torch::stable::contiguous(indices), rows = torch::stable::contiguous(grad_rows);
    sslfast::gather_voxels_backward(data<float>(rows), data<int64_t>(i), i.numel(), OwnedMap(grad));
  }

  static std::tuple<Tensor, Tensor> voxel_infonce(const Tensor& anchors, const Tensor& anchor_counts,
                                                  const Tensor& prototypes, const Tensor& prototype_counts,
                                                  const Tensor& negatives, const Tensor& negative_counts,
                                                  double temperature) {
    OwnedContrast owned =
        own_contrast(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts);
    Tensor sums = empty(anchors, {2}, ScalarType::Double);
    Tensor lse = empty(anchors, {anchors.size(0), anchors.size(1)}, ScalarType::Float);
    sslfast::voxel_infonce(owned.view(temperature), data<double>(sums), data<float>(lse));
    return {sums, lse};
  }

  static Tensor voxel_infonce_backward(const Tensor& grad_sums, const Tensor& lse, const Tensor& anchors,
                                       const Tensor& anchor_counts, const Tensor& prototypes,
                                       const Tensor& prototype_counts, const Tensor& negatives,
                                       const Tensor& negative_counts, double temperature) {
    OwnedContrast owned =
        own_contrast(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts);
    Tensor grad = empty(anchors, {anchors.sizes().begin(), anchors.sizes().end()}, ScalarType::Float);
    const Tensor g = torch::stable::contiguous(grad_sums);
    sslfast::voxel_infonce_backward(owned.view(temperature), data<float>(lse), float(*data<double>(g)),
                                    data<float>(grad));
    return grad;
  }
};

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  using namespace sslfast;
  SSLFAST_IMPLEMENT_ALL
}
