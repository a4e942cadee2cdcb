// The CPU kernels as implementations of the ops that sslfast/ops defines; arguments were checked there.
#include <algorithm>
#include <cmath>
#include <limits>

#include "bind.h"
#include "cpu/kernels.h"

namespace sslfast {

void run_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

namespace {

using MaybeTensor = std::optional<Tensor>;

// Logits as the kernels see them: in memory, or to be computed from features by the classifier `weights` [N, C, K + 1].
struct HeldLogits {
  HeldMap held;
  MaybeTensor weights;
  LinearMap linear;
  VoxelMap map;

  HeldLogits(const Tensor& values, const MaybeTensor& classifier) : held(values), map(held.map) {
    if (!classifier) return;
    weights = torch::stable::contiguous(*classifier);
    linear = {held.map, data<float>(*weights), {}, nullptr};
    map.channels = weights->size(1);
    map.linear = &linear;
  }
  HeldLogits(const HeldLogits&) = delete;

  operator const VoxelMap&() const { return map; }
};

// Where the gradient of such logits goes.
struct HeldGradient {
  HeldMap held;
  MaybeTensor weights;
  std::vector<double> sums;
  LinearMap linear;
  VoxelMap map;

  HeldGradient(const HeldLogits& logits, const Tensor& values, const MaybeTensor& classifier)
      : held(values), weights(classifier), map(held.map) {
    if (!logits.map.linear) return;
    sums.resize(chunks_of(map.volumes, map.voxels) * logits.map.channels * (held.map.channels + 1));
    linear = {logits.linear.features, logits.linear.weights, held.map, sums.data()};
    map.channels = logits.map.channels;
    map.linear = &linear;
  }
  HeldGradient(const HeldGradient&) = delete;

  operator const VoxelMap&() const { return map; }

  // Adds up the chunks of each volume, in their order.
  void finish() {
    if (!map.linear || !map.volumes) return;
    const int64_t cells = map.channels * (held.map.channels + 1), chunks = int64_t(sums.size()) / cells / map.volumes;
    float* out = data<float>(*weights);
    for (int64_t volume = 0; volume < map.volumes; ++volume)
      for (int64_t i = 0; i < cells; ++i) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[(volume * chunks + chunk) * cells + i];
        out[volume * cells + i] = float(total);
      }
  }
};

// 1 - Dice, the mean over the foreground classes, of sums [C].
double dice_loss(const double* size, const double* overlap, const double* square, int64_t classes, double smooth) {
  double loss = 0;
  for (int64_t c = 1; c < classes; ++c) loss += 1 - (2 * overlap[c] + smooth) / (square[c] + size[c] + smooth);
  return loss / double(classes - 1);
}

// Its gradient: d p_c = linear[c] [y = c] + square_of[c] p_c.
void dice_gradient(const double* size, const double* overlap, const double* square, int64_t classes, double smooth, double grad,
                   float* linear, float* square_of) {
  const double share = grad / double(classes - 1);
  for (int64_t c = 1; c < classes; ++c) {
    const double total = square[c] + size[c] + smooth;
    linear[c] = float(-2 / total * share);
    square_of[c] = float(2 * (2 * overlap[c] + smooth) / (total * total) * share);
  }
}

std::tuple<Tensor, Tensor, Tensor> dual_supervised_cpu(const Tensor& logits_a, const Tensor& logits_b, const Tensor& labels,
                                                       double threshold, int64_t ignore_index, double smooth,
                                                       MaybeTensor weights_a, MaybeTensor weights_b) {
  HeldLogits a(logits_a, weights_a), b(logits_b, weights_b);
  const int64_t classes = a.map.channels;
  Tensor y = torch::stable::contiguous(labels);
  SupervisedSums s = dual_supervised(a, b, labels_of(y), float(threshold), ignore_index);

  Tensor sums = empty(logits_a, {kHeader + 5 * classes}, ScalarType::Double);
  const double header[kHeader] = {double(s.annotated), double(s.mask), double(s.outside), double(s.first_outside),
                                  double(s.value_outside)};
  double* size = std::copy(header, header + kHeader, data<double>(sums));
  double* overlap = std::copy(s.size.begin(), s.size.end(), size);
  double* square = std::copy(s.overlap.begin(), s.overlap.end(), overlap);
  std::copy(s.square.begin(), s.square.end(), square);

  Tensor losses = empty(logits_a, {3, 2}, ScalarType::Float), mask = empty(logits_a, {}, ScalarType::Long);
  float* loss = data<float>(losses);
  for (int n = 0; n < 2; ++n) {
    const double dice = dice_loss(size, overlap + n * classes, square + n * classes, classes, smooth);
    const double invalid = s.outside ? std::numeric_limits<double>::quiet_NaN() : 0;
    loss[n] = float(s.ce[n] / double(std::max<int64_t>(s.annotated, 1)) + invalid);
    loss[2 + n] = float(dice + invalid);
    loss[4 + n] = float(s.discrepancy[n] / (double(s.mask) + 1e-16) + invalid);
  }
  *data<int64_t>(mask) = s.mask;
  return {losses, mask, sums};
}

void dual_supervised_backward_cpu(const Tensor& grad_losses, const Tensor& logits_a, const Tensor& logits_b,
                                  const Tensor& labels, const Tensor& sums, double threshold, int64_t ignore_index,
                                  double smooth, Tensor grad_a, Tensor grad_b, MaybeTensor weights_a, MaybeTensor weights_b,
                                  MaybeTensor grad_weights_a, MaybeTensor grad_weights_b) {
  HeldLogits a(logits_a, weights_a), b(logits_b, weights_b);
  HeldGradient to_a(a, grad_a, grad_weights_a), to_b(b, grad_b, grad_weights_b);
  const int64_t classes = a.map.channels;
  Tensor y = torch::stable::contiguous(labels), g = torch::stable::contiguous(grad_losses);
  const float* grad = data<float>(g);
  const double *s = data<double>(sums), *size = s + kHeader, *overlap = size + classes, *square = overlap + 2 * classes;
  SupervisedGradient gradient{{}, {}, std::vector<float>(2 * classes), std::vector<float>(2 * classes)};
  for (int n = 0; n < 2; ++n) {
    gradient.ce[n] = float(grad[n] / std::max(s[0], 1.0));
    gradient.discrepancy[n] = float(grad[4 + n] / (s[1] + 1e-16));
    const int64_t own = n * classes;
    dice_gradient(size, overlap + own, square + own, classes, smooth, grad[2 + n], &gradient.linear[own], &gradient.square[own]);
  }
  dual_supervised_backward(a, b, labels_of(y), float(threshold), ignore_index, gradient, to_a, to_b);
  to_a.finish();
  to_b.finish();
}

int64_t value_of(const Tensor& winner) {
  return winner.scalar_type() == ScalarType::Long ? *data<int64_t>(winner) : *data<int32_t>(winner);
}

std::tuple<Tensor, Tensor> reliability_cpu(const Tensor& logits_a, const Tensor& logits_b, double percentile, int64_t mode,
                                           const Tensor& winner, bool union_label, bool loser_anchor, bool per_class,
                                           MaybeTensor given, MaybeTensor weights_a, MaybeTensor weights_b) {
  HeldLogits a(logits_a, weights_a), b(logits_b, weights_b);
  Tensor state = empty(logits_a, voxel_shape(logits_a), ScalarType::Byte);
  Tensor thresholds = empty(logits_a, per_class ? std::vector<int64_t>{2, a.map.channels} : std::vector<int64_t>{2}, ScalarType::Float);
  ReliabilityOptions options{percentile, Mode(mode), union_label, loser_anchor, per_class};
  if (given) std::copy_n(data<float>(*given), thresholds.numel(), data<float>(thresholds));
  reliability(a, b, options, value_of(winner) != 0, given.has_value(), data<float>(thresholds), data<uint8_t>(state));
  return {thresholds, state};
}

Tensor voxel_entropy_cpu(const Tensor& logits, MaybeTensor weights) {
  Tensor out = empty(logits, voxel_shape(logits), ScalarType::Float);
  voxel_entropy(HeldLogits(logits, weights), data<float>(out));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> pseudo_supervised_cpu(const Tensor& logits_a, const Tensor& logits_b, const Tensor& state,
                                                         bool other, double smooth, MaybeTensor weights_a, MaybeTensor weights_b) {
  HeldLogits a(logits_a, weights_a), b(logits_b, weights_b);
  const int64_t classes = a.map.channels;
  Tensor held = torch::stable::contiguous(state);
  PseudoSums s = pseudo_supervised(a, b, data<uint8_t>(held), other);

  Tensor sums = empty(logits_a, {6 * classes}, ScalarType::Double);
  double* size = data<double>(sums);
  double* overlap = std::copy(s.size.begin(), s.size.end(), size);
  double* square = std::copy(s.overlap.begin(), s.overlap.end(), overlap);
  std::copy(s.square.begin(), s.square.end(), square);

  Tensor losses = empty(logits_a, {2, 2}, ScalarType::Float), count = empty(logits_a, {}, ScalarType::Long);
  for (int n = 0; n < 2; ++n) {
    const int64_t own = n * classes;
    data<float>(losses)[n] = float(s.ce[n] / double(std::max<int64_t>(s.reliable, 1)));
    data<float>(losses)[2 + n] = float(dice_loss(size + own, overlap + own, square + own, classes, smooth));
  }
  *data<int64_t>(count) = s.reliable;
  return {losses, count, sums};
}

void pseudo_supervised_backward_cpu(const Tensor& grad_losses, const Tensor& logits_a, const Tensor& logits_b, const Tensor& state,
                                    const Tensor& reliable_voxels, const Tensor& sums, bool other, double smooth, Tensor grad_a,
                                    Tensor grad_b, MaybeTensor weights_a, MaybeTensor weights_b, MaybeTensor grad_weights_a,
                                    MaybeTensor grad_weights_b) {
  HeldLogits a(logits_a, weights_a), b(logits_b, weights_b);
  HeldGradient to_a(a, grad_a, grad_weights_a), to_b(b, grad_b, grad_weights_b);
  const int64_t classes = a.map.channels;
  Tensor held = torch::stable::contiguous(state), g = torch::stable::contiguous(grad_losses);
  const float* grad = data<float>(g);
  const double *size = data<double>(sums), *overlap = size + 2 * classes, *square = overlap + 2 * classes;
  const float count = float(std::max<int64_t>(*data<int64_t>(reliable_voxels), 1));
  PseudoGradient gradient{{}, std::vector<float>(2 * classes), std::vector<float>(2 * classes)};
  for (int n = 0; n < 2; ++n) {
    const int64_t own = n * classes;
    gradient.ce[n] = grad[n] / count;
    dice_gradient(size + own, overlap + own, square + own, classes, smooth, grad[2 + n], &gradient.linear[own],
                  &gradient.square[own]);
  }
  pseudo_supervised_backward(a, b, data<uint8_t>(held), other, gradient, to_a, to_b);
  to_a.finish();
  to_b.finish();
}

std::tuple<Tensor, Tensor, Tensor> rectified_consistency_cpu(const Tensor& logits_a, const Tensor& logits_b, const Tensor& state,
                                                             double smooth, MaybeTensor weights_a, MaybeTensor weights_b) {
  HeldLogits a(logits_a, weights_a), b(logits_b, weights_b);
  const int64_t classes = a.map.channels, everywhere = state.numel();
  Tensor held = torch::stable::contiguous(state);
  RectifiedSums sums = rectified_consistency(a, b, data<uint8_t>(held));
  Tensor losses = empty(logits_a, {4}, ScalarType::Float), voxels = empty(logits_a, {3}, ScalarType::Long);
  Tensor products = empty(logits_a, {3, classes}, ScalarType::Double);
  std::copy(sums.products.begin(), sums.products.end(), data<double>(products));
  const double* square = sums.products.data();
  const int64_t counts[3] = {sums.taught[0], sums.taught[1], everywhere};
  std::copy(counts, counts + 3, data<int64_t>(voxels));
  const double totals[3] = {sums.rectified[0], sums.rectified[1], sums.cosine};
  for (int i = 0; i < 3; ++i) data<float>(losses)[i] = float(totals[i] / double(std::max<int64_t>(counts[i], 1)));
  data<float>(losses)[3] = float(dice_loss(square, square + 2 * classes, square + classes, classes, smooth));
  return {losses, voxels, products};
}

void rectified_consistency_backward_cpu(const Tensor& grad_losses, const Tensor& logits_a, const Tensor& logits_b,
                                        const Tensor& state, const Tensor& voxels, const Tensor& products, double smooth,
                                        Tensor grad_a, Tensor grad_b, MaybeTensor weights_a, MaybeTensor weights_b,
                                        MaybeTensor grad_weights_a, MaybeTensor grad_weights_b) {
  HeldLogits a(logits_a, weights_a), b(logits_b, weights_b);
  HeldGradient to_a(a, grad_a, grad_weights_a), to_b(b, grad_b, grad_weights_b);
  const int64_t classes = a.map.channels;
  Tensor held = torch::stable::contiguous(state), g = torch::stable::contiguous(grad_losses);
  const auto share = [&](int i) { return data<float>(g)[i] / float(std::max<int64_t>(data<int64_t>(voxels)[i], 1)); };
  RectifiedGradient gradient{{share(0), share(1)}, share(2), std::vector<float>(classes), std::vector<float>(classes)};
  const double* square = data<double>(products);
  dice_gradient(square, square + 2 * classes, square + classes, classes, smooth, data<float>(g)[3], gradient.product.data(),
                gradient.square.data());
  rectified_consistency_backward(a, b, data<uint8_t>(held), gradient, to_a, to_b);
  to_a.finish();
  to_b.finish();
}

std::tuple<Tensor, Tensor> masked_consistency_cpu(const Tensor& student, const Tensor& teacher, double temperature, double limit) {
  HeldMap own(student), target(teacher);
  MaskedSums sums = masked_consistency(own, target, float(temperature), float(limit));
  Tensor loss = empty(student, {}, ScalarType::Float), certain = empty(student, {}, ScalarType::Long);
  *data<float>(loss) = float(sums.squares / (double(std::max<int64_t>(sums.certain, 1)) * double(student.size(1))));
  *data<int64_t>(certain) = sums.certain;
  return {loss, certain};
}

void masked_consistency_backward_cpu(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const Tensor& certain,
                                     double temperature, double limit, Tensor grad) {
  const double terms = double(std::max<int64_t>(*data<int64_t>(certain), 1)) * double(student.size(1));
  masked_consistency_backward(HeldMap(student), HeldMap(teacher), float(temperature), float(limit),
                              float(2 * *data<float>(grad_loss) / terms), HeldMap(grad));
}

std::tuple<Tensor, Tensor> class_prototypes_cpu(const Tensor& first, const Tensor& state, int64_t num_classes,
                                                std::optional<Tensor> other, std::optional<Tensor> second) {
  const Tensor& features = other && value_of(*second) ? *other : first;
  Tensor s = torch::stable::contiguous(state);
  Tensor sums = empty(features, {num_classes, features.size(1)}, ScalarType::Float);
  Tensor counts = empty(features, {num_classes}, ScalarType::Long);
  class_prototypes(HeldMap(features), data<uint8_t>(s), int(num_classes), data<float>(sums), data<int64_t>(counts));
  return {sums, counts};
}

void class_prototypes_backward_cpu(const Tensor& grad_sums, const Tensor& features, const Tensor& state, Tensor grad) {
  Tensor s = torch::stable::contiguous(state), g = torch::stable::contiguous(grad_sums);
  class_prototypes_backward(HeldMap(features), data<uint8_t>(s), int(g.size(0)), data<float>(g), HeldMap(grad));
}

std::tuple<Tensor, Tensor> sample_voxels_cpu(const Tensor& state, std::vector<int64_t> quotas, int64_t seed, int64_t step,
                                             bool negatives, int64_t first) {
  Tensor s = torch::stable::contiguous(state);
  const int64_t classes = int64_t(quotas.size()), capacity = *std::max_element(quotas.begin(), quotas.end());
  Tensor indices = empty(state, {classes, capacity}, ScalarType::Long), counts = empty(state, {classes}, ScalarType::Long);
  sample_voxels(data<uint8_t>(s), s.numel(), quotas.data(), int(classes), uint64_t(seed), uint32_t(step), negatives, uint64_t(first),
                capacity, data<int64_t>(indices), data<int64_t>(counts));
  return {indices, counts};
}

Tensor gather_voxels_cpu(const Tensor& features, const Tensor& indices) {
  Tensor i = torch::stable::contiguous(indices);
  std::vector<int64_t> shape(i.sizes().begin(), i.sizes().end());
  shape.push_back(features.size(1));
  Tensor rows = empty(features, shape, ScalarType::Float);
  gather_voxels(HeldMap(features), data<int64_t>(i), i.numel(), data<float>(rows));
  return rows;
}

void gather_voxels_backward_cpu(const Tensor& grad_rows, const Tensor& indices, Tensor grad) {
  Tensor i = torch::stable::contiguous(indices), rows = torch::stable::contiguous(grad_rows);
  gather_voxels_backward(data<float>(rows), data<int64_t>(i), i.numel(), HeldMap(grad));
}

std::tuple<Tensor, Tensor> voxel_infonce_cpu(const Tensor& anchors, const Tensor& anchor_counts, const Tensor& prototypes,
                                             const Tensor& prototype_counts, const Tensor& negatives,
                                             const Tensor& negative_counts, double temperature) {
  HeldContrast held = hold(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts);
  Tensor loss = empty(anchors, {}, ScalarType::Float), lse = empty(anchors, {anchors.size(0), anchors.size(1)}, ScalarType::Float);
  *data<float>(loss) = float(voxel_infonce(held.view(temperature), data<float>(lse)));
  return {loss, lse};
}

std::tuple<Tensor, Tensor, Tensor> voxel_infonce_backward_cpu(const Tensor& grad, const Tensor& lse, const Tensor& anchors,
                                                              const Tensor& anchor_counts, const Tensor& prototypes,
                                                              const Tensor& prototype_counts, const Tensor& negatives,
                                                              const Tensor& negative_counts, double temperature, bool keys) {
  HeldContrast held = hold(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts);
  auto like = [&](const Tensor& t) { return empty(t, {t.sizes().begin(), t.sizes().end()}, ScalarType::Float); };
  Tensor grad_anchors = like(anchors);
  Tensor grad_prototypes = keys ? like(prototypes) : empty(anchors, {0}, ScalarType::Float);
  Tensor grad_negatives = keys ? like(negatives) : empty(anchors, {0}, ScalarType::Float);
  voxel_infonce_backward(held.view(temperature), data<float>(lse), *data<float>(grad), data<float>(grad_anchors),
                         keys ? data<float>(grad_prototypes) : nullptr, keys ? data<float>(grad_negatives) : nullptr);
  return {grad_anchors, grad_prototypes, grad_negatives};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  using namespace sslfast;
  m.impl("dual_supervised", TORCH_BOX(&dual_supervised_cpu));
  m.impl("dual_supervised_backward", TORCH_BOX(&dual_supervised_backward_cpu));
  m.impl("reliability", TORCH_BOX(&reliability_cpu));
  m.impl("voxel_entropy", TORCH_BOX(&voxel_entropy_cpu));
  m.impl("pseudo_supervised", TORCH_BOX(&pseudo_supervised_cpu));
  m.impl("pseudo_supervised_backward", TORCH_BOX(&pseudo_supervised_backward_cpu));
  m.impl("rectified_consistency", TORCH_BOX(&rectified_consistency_cpu));
  m.impl("rectified_consistency_backward", TORCH_BOX(&rectified_consistency_backward_cpu));
  m.impl("masked_consistency", TORCH_BOX(&masked_consistency_cpu));
  m.impl("masked_consistency_backward", TORCH_BOX(&masked_consistency_backward_cpu));
  m.impl("class_prototypes", TORCH_BOX(&class_prototypes_cpu));
  m.impl("class_prototypes_backward", TORCH_BOX(&class_prototypes_backward_cpu));
  m.impl("sample_voxels", TORCH_BOX(&sample_voxels_cpu));
  m.impl("gather_voxels", TORCH_BOX(&gather_voxels_cpu));
  m.impl("gather_voxels_backward", TORCH_BOX(&gather_voxels_backward_cpu));
  m.impl("voxel_infonce", TORCH_BOX(&voxel_infonce_cpu));
  m.impl("voxel_infonce_backward", TORCH_BOX(&voxel_infonce_backward_cpu));
}
