// The CUDA kernels as implementations of the ops that sslfast/ops defines; arguments were checked there. Nothing waits for the
// device: what the host does not know stays there. The library links no libtorch_cuda, so that it loads without a GPU.
#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

#include "bind.h"
#include "cuda/kernels.h"

#ifndef SSLFAST_KEY  // the tests run the kernels' code on the CPU
#define SSLFAST_KEY CUDA
#endif

namespace sslfast::cuda {
namespace {

// The current stream of the tensor's device, which is current too while this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    if (!t.is_cuda()) return;
    const int device = t.get_device_index();
    before_ = set_device(device);
    using GetStream = int32_t (*)(int32_t, void**);
    static const auto get_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    if (!get_stream || get_stream(device, &stream_)) throw std::runtime_error("sslfast: torch does not tell its CUDA stream");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (before_ >= 0) set_device(before_);
  }

  operator void*() const { return stream_; }

 private:
  int before_ = -1;
  void* stream_ = nullptr;
};

// Scratch memory in one block: `layout` takes its arrays, first those that start at zero, once to measure and once for good.
class Scratch {
 public:
  template <class T>
  T* take(int64_t count) {
    T* here = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + 15) / 16 * 16;
    return here;
  }
  void end_of_zeros() { zeros_ = used_; }

  template <class Layout>
  static Tensor allocate(const Tensor& like, void* stream, const Layout& layout) {
    Scratch measured;
    layout(measured);
    Tensor block = empty(like, {int64_t(measured.used_)}, ScalarType::Byte);
    Scratch real;
    real.base_ = data<char>(block);
    layout(real);
    fill_zero(real.base_, real.zeros_, stream);
    return block;
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0, zeros_ = 0;
};

Map view(const HeldMap& map) { return device_map(map); }

// `count` volumes of a map from `first` on.
Map part(const HeldMap& held, int64_t first, int64_t count) {
  VoxelMap map = held;
  map.data = static_cast<char*>(map.data) + first * map.volume_stride * held.held.element_size();
  map.volumes = count;
  return device_map(map);
}

void check_width(int64_t width) {
  if (width > kMostWidth)
    throw std::runtime_error("sslfast: " + std::to_string(width) + " feature channels; the CUDA kernels take up to " +
                             std::to_string(kMostWidth));
}

int64_t voxels_of(const VoxelMap& map) { return map.volumes * map.voxels; }

// The outputs of `dual_supervised`.
struct SupervisedResult {
  Tensor losses, mask, sums;

  SupervisedResult(const Tensor& like, int64_t classes)
      : losses(empty(like, {3, 2}, ScalarType::Float)), mask(empty(like, {}, ScalarType::Long)),
        sums(empty(like, {kHeader + 5 * classes}, ScalarType::Double)) {}
};

// The outputs of `pseudo_supervised` or `rectified_consistency`.
struct PseudoResult {
  using Shape = std::vector<int64_t>;

  Target target;
  Tensor losses, pseudo_voxels, sums;

  PseudoResult(const Tensor& like, int64_t classes, Target target)
      : target(target), losses(empty(like, is_rectified() ? Shape{4} : Shape{2, 2}, ScalarType::Float)),
        pseudo_voxels(empty(like, is_rectified() ? Shape{3} : Shape{}, ScalarType::Long)),
        sums(empty(like, is_rectified() ? Shape{3, classes} : Shape{6 * classes}, ScalarType::Double)) {}

  bool is_rectified() const { return target == Target::rectified; }

  void place(Decision& d, double smooth) const {
    d.pseudo = data<float>(losses), d.pseudo_voxels = data<int64_t>(pseudo_voxels), d.pseudo_sums = data<double>(sums);
    d.target = target, d.smooth = smooth;
  }
};

Supervised supervised_of(const Map& a, const Map& b, const Tensor& labels, double threshold, int64_t ignore_index, double smooth) {
  Supervised s{};
  s.a = a, s.b = b;
  s.labels = labels_of(labels);
  s.threshold = float(threshold), s.ignore = ignore_index, s.smooth = smooth;
  return s;
}

void place_zeros(Scratch& scratch, Supervised& s) {
  s.tickets = scratch.take<int>(kTickets);
  s.last_outside = scratch.take<unsigned long long>(1);
}

void place_rest(Scratch& scratch, Supervised& s) { s.rows = scratch.take<double>(rows_of_supervised(s.a, s.a.channels)); }

Percentile percentile_of(const Map& a, const Map& b, double percentile, bool per_class) {
  if (voxels_of(a) >= int64_t(1) << 32)
    throw std::runtime_error("sslfast: " + std::to_string(voxels_of(a)) + " unlabelled voxels; the CUDA kernels take less than 2^32");
  Percentile p{};
  p.maps[0] = a, p.maps[1] = b;
  p.percentile = percentile;
  p.groups = per_class ? int(a.channels) : 1;
  return p;
}

void place_zeros(Scratch& scratch, Percentile& p) {
  p.tickets = scratch.take<int>(4);
  p.high = scratch.take<uint32_t>(2 * p.groups * kHighBins);
  p.low = scratch.take<uint32_t>(4 * p.groups * kLowBins);
}

void place_rest(Scratch& scratch, Percentile& p) {
  p.ranks = scratch.take<Rank>(2 * p.groups);
  p.keys = scratch.take<uint16_t>(2 * voxels_of(p.maps[0]));
}

Tensor thresholds_like(const Tensor& logits, bool per_class) {
  return empty(logits, per_class ? std::vector<int64_t>{2, logits.size(1)} : std::vector<int64_t>{2}, ScalarType::Float);
}

void place_zeros(Scratch& scratch, Decision& d) {
  d.tickets = scratch.take<int>(kTickets);
  d.bytes = scratch.take<unsigned long long>(256);
}

void place_rest(Scratch& scratch, Decision& d) {
  d.rows = scratch.take<double>(rows_of_decision(d));
}

void place_zeros(Scratch& scratch, Sampling& s) {
  s.found = scratch.take<int>(2 * s.classes);
  s.tickets = scratch.take<int>(2 * s.classes);
}

void place_rest(Scratch& scratch, Sampling& s) {
  for (int r = s.first; r < s.first + s.roles; ++r) {
    s.role[r].room = room_for(s.role[r].capacity);
    s.role[r].list = scratch.take<Candidate>(int64_t(s.classes) * s.role[r].room);
  }
}

// --- the ops ---

using MaybeTensor = std::optional<Tensor>;

// The CPU's kernels compute logits from features; these read stored ones.
void expect_stored(const MaybeTensor& weights_a, const MaybeTensor& weights_b) {
  STD_TORCH_CHECK(!weights_a && !weights_b, "the CUDA kernels take stored logits, no classifier's weights");
}

std::tuple<Tensor, Tensor, Tensor> dual_supervised_cuda(const Tensor& logits_a, const Tensor& logits_b, const Tensor& labels,
                                                        double threshold, int64_t ignore_index, double smooth,
                                                        MaybeTensor weights_a, MaybeTensor weights_b) {
  expect_stored(weights_a, weights_b);
  OnDevice stream(logits_a);
  HeldMap a(logits_a), b(logits_b);
  Tensor y = torch::stable::contiguous(labels);
  SupervisedResult out(logits_a, logits_a.size(1));
  Supervised s = supervised_of(view(a), view(b), y, threshold, ignore_index, smooth);
  s.losses = data<float>(out.losses), s.mask = data<int64_t>(out.mask), s.sums = data<double>(out.sums);
  Tensor scratch = Scratch::allocate(logits_a, stream, [&](Scratch& memory) {
    place_zeros(memory, s);
    memory.end_of_zeros();
    place_rest(memory, s);
  });
  describe(s, {}, stream);
  return {out.losses, out.mask, out.sums};
}

void dual_supervised_backward_cuda(const Tensor& grad_losses, const Tensor& logits_a, const Tensor& logits_b,
                                   const Tensor& labels, const Tensor& sums, double threshold, int64_t ignore_index,
                                   double smooth, Tensor grad_a, Tensor grad_b, MaybeTensor weights_a, MaybeTensor weights_b,
                                   MaybeTensor, MaybeTensor) {
  expect_stored(weights_a, weights_b);
  OnDevice stream(logits_a);
  HeldMap a(logits_a), b(logits_b);
  Tensor y = torch::stable::contiguous(labels), g = torch::stable::contiguous(grad_losses);
  Gradient gradient{};
  gradient.supervised = supervised_of(view(a), view(b), y, threshold, ignore_index, smooth);
  gradient.supervised.sums = data<double>(sums);
  gradient.of_supervised = {data<float>(g), 2, 1.f};
  gradient.to_supervised[0] = view(HeldMap(grad_a)), gradient.to_supervised[1] = view(HeldMap(grad_b));
  cuda::gradient(gradient, stream);
}

std::tuple<Tensor, Tensor> reliability_cuda(const Tensor& logits_a, const Tensor& logits_b, double percentile, int64_t mode,
                                            const Tensor& winner, bool union_label, bool loser_anchor, bool per_class,
                                            MaybeTensor given, MaybeTensor weights_a, MaybeTensor weights_b) {
  expect_stored(weights_a, weights_b);
  OnDevice stream(logits_a);
  HeldMap a(logits_a), b(logits_b);
  Tensor state = empty(logits_a, voxel_shape(logits_a), ScalarType::Byte), thresholds = thresholds_like(logits_a, per_class);
  Percentile p = percentile_of(view(a), view(b), percentile, per_class);
  p.thresholds = data<float>(thresholds);
  Decision d{};
  d.a = p.maps[0], d.b = p.maps[1];
  d.state = data<uint8_t>(state);
  d.options = {percentile, Mode(mode), union_label, loser_anchor, per_class};
  d.thresholds = p.thresholds, d.winner = data<int64_t>(winner);
  Tensor scratch = Scratch::allocate(logits_a, stream, [&](Scratch& memory) {
    place_zeros(memory, p);
    place_zeros(memory, d);
    memory.end_of_zeros();
    place_rest(memory, p);
    place_rest(memory, d);
  });
  d.bytes = nullptr;
  if (given) {
    copy(data<float>(*given), p.thresholds, size_t(thresholds.numel()) * sizeof(float), stream);
  } else {
    describe({}, p, stream);
    refine(p, stream);
  }
  decide(d, stream);
  return {thresholds, state};
}

Tensor voxel_entropy_cuda(const Tensor& logits, MaybeTensor weights) {
  expect_stored(weights, weights);
  OnDevice stream(logits);
  Tensor out = empty(logits, voxel_shape(logits), ScalarType::Float);
  voxel_entropy(view(HeldMap(logits)), data<float>(out), stream);
  return out;
}

// `pseudo_supervised`, or `rectified_consistency`.
std::tuple<Tensor, Tensor, Tensor> pseudo_of(const Tensor& logits_a, const Tensor& logits_b, const Tensor& state, Target target,
                                             double smooth) {
  OnDevice stream(logits_a);
  HeldMap a(logits_a), b(logits_b);
  Tensor s = torch::stable::contiguous(state);
  PseudoResult out(logits_a, logits_a.size(1), target);
  Decision d{};
  d.a = view(a), d.b = view(b);
  d.given = true, d.state = data<uint8_t>(s);
  out.place(d, smooth);
  Tensor scratch = Scratch::allocate(logits_a, stream, [&](Scratch& memory) {
    place_zeros(memory, d);
    memory.end_of_zeros();
    place_rest(memory, d);
  });
  d.bytes = nullptr;
  decide(d, stream);
  return {out.losses, out.pseudo_voxels, out.sums};
}

void pseudo_backward_of(const Tensor& grad_losses, const Tensor& logits_a, const Tensor& logits_b, const Tensor& state,
                        const Tensor& pseudo_voxels, const Tensor& sums, Target target, double smooth, const Tensor& grad_a,
                        const Tensor& grad_b) {
  OnDevice stream(logits_a);
  HeldMap a(logits_a), b(logits_b);
  Tensor s = torch::stable::contiguous(state), g = torch::stable::contiguous(grad_losses);
  Gradient gradient{};
  gradient.a = view(a), gradient.b = view(b);
  gradient.state = data<uint8_t>(s), gradient.pseudo_voxels = data<int64_t>(pseudo_voxels), gradient.target = target;
  gradient.pseudo_sums = data<double>(sums), gradient.smooth = smooth;
  gradient.of_pseudo = {data<float>(g), 2, 1.f, 1.f, nullptr};
  gradient.to_pseudo[0] = view(HeldMap(grad_a)), gradient.to_pseudo[1] = view(HeldMap(grad_b));
  cuda::gradient(gradient, stream);
}

std::tuple<Tensor, Tensor, Tensor> pseudo_supervised_cuda(const Tensor& logits_a, const Tensor& logits_b, const Tensor& state,
                                                          bool other, double smooth, MaybeTensor weights_a, MaybeTensor weights_b) {
  expect_stored(weights_a, weights_b);
  return pseudo_of(logits_a, logits_b, state, other ? Target::other : Target::state, smooth);
}

void pseudo_supervised_backward_cuda(const Tensor& grad_losses, const Tensor& logits_a, const Tensor& logits_b, const Tensor& state,
                                     const Tensor& pseudo_voxels, const Tensor& sums, bool other, double smooth, Tensor grad_a,
                                     Tensor grad_b, MaybeTensor weights_a, MaybeTensor weights_b, MaybeTensor, MaybeTensor) {
  expect_stored(weights_a, weights_b);
  pseudo_backward_of(grad_losses, logits_a, logits_b, state, pseudo_voxels, sums, other ? Target::other : Target::state, smooth,
                     grad_a, grad_b);
}

std::tuple<Tensor, Tensor, Tensor> rectified_consistency_cuda(const Tensor& logits_a, const Tensor& logits_b, const Tensor& state,
                                                              double smooth, MaybeTensor weights_a, MaybeTensor weights_b) {
  expect_stored(weights_a, weights_b);
  return pseudo_of(logits_a, logits_b, state, Target::rectified, smooth);
}

void rectified_consistency_backward_cuda(const Tensor& grad_losses, const Tensor& logits_a, const Tensor& logits_b,
                                         const Tensor& state, const Tensor& voxels, const Tensor& products, double smooth,
                                         Tensor grad_a, Tensor grad_b, MaybeTensor weights_a, MaybeTensor weights_b, MaybeTensor,
                                         MaybeTensor) {
  expect_stored(weights_a, weights_b);
  pseudo_backward_of(grad_losses, logits_a, logits_b, state, voxels, products, Target::rectified, smooth, grad_a, grad_b);
}

std::tuple<Tensor, Tensor> masked_consistency_cuda(const Tensor& student, const Tensor& teacher, double temperature,
                                                   double max_entropy) {
  OnDevice stream(student);
  HeldMap own(student), target(teacher);
  Tensor loss = empty(student, {}, ScalarType::Float), certain_voxels = empty(student, {}, ScalarType::Long);
  MaskedConsistency m{view(own), view(target), float(1 / temperature), float(max_entropy)};
  m.loss = data<float>(loss), m.certain_voxels = data<int64_t>(certain_voxels);
  Tensor scratch = Scratch::allocate(student, stream, [&](Scratch& memory) {
    m.tickets = memory.take<int>(kTickets);
    memory.end_of_zeros();
    m.rows = memory.take<double>(rows_of_masked(own));
  });
  masked_consistency(m, stream);
  return {loss, certain_voxels};
}

void masked_consistency_backward_cuda(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                      const Tensor& certain_voxels, double temperature, double max_entropy, Tensor grad) {
  OnDevice stream(student);
  HeldMap own(student), target(teacher);
  MaskedConsistency m{view(own), view(target), float(1 / temperature), float(max_entropy)};
  m.certain_voxels = data<int64_t>(certain_voxels);
  masked_consistency_backward(m, data<float>(grad_loss), view(HeldMap(grad)), stream);
}

std::tuple<Tensor, Tensor> class_prototypes_cuda(const Tensor& features, const Tensor& state, int64_t num_classes,
                                                 std::optional<Tensor> other, std::optional<Tensor> second) {
  OnDevice stream(features);
  check_width(features.size(1));
  HeldMap first(features), another(other ? *other : features);
  Tensor s = torch::stable::contiguous(state);
  Tensor sums = empty(features, {num_classes, features.size(1)}, ScalarType::Float);
  Tensor counts = empty(features, {num_classes}, ScalarType::Long);
  Decision d{};
  d.a = view(first), d.a.channels = num_classes;  // whose logits nothing asks for
  d.given = true, d.state = data<uint8_t>(s);
  d.features[0] = view(first), d.features[1] = view(another);
  d.width = features.size(1), d.classes = int(num_classes), d.second = second ? data<int64_t>(*second) : nullptr;
  d.prototypes = data<float>(sums), d.prototype_counts = data<int64_t>(counts);
  Tensor scratch = Scratch::allocate(features, stream, [&](Scratch& memory) {
    place_zeros(memory, d);
    memory.end_of_zeros();
    place_rest(memory, d);
  });
  decide(d, stream);
  return {sums, counts};
}

void class_prototypes_backward_cuda(const Tensor& grad_sums, const Tensor& features, const Tensor& state, Tensor grad) {
  OnDevice stream(features);
  HeldMap f(features);
  Tensor s = torch::stable::contiguous(state), g = torch::stable::contiguous(grad_sums);
  class_prototypes_backward(view(f), data<uint8_t>(s), int(g.size(0)), data<float>(g), view(HeldMap(grad)), stream);
}

std::tuple<Tensor, Tensor> sample_voxels_cuda(const Tensor& state, std::vector<int64_t> quotas, int64_t seed, int64_t step,
                                              bool negatives, int64_t first) {
  OnDevice stream(state);
  Tensor held = torch::stable::contiguous(state);
  const int64_t classes = int64_t(quotas.size()), capacity = *std::max_element(quotas.begin(), quotas.end());
  Tensor indices = empty(state, {classes, capacity}, ScalarType::Long), counts = empty(state, {classes}, ScalarType::Long);
  Decision d{};
  d.a.volumes = 1, d.a.channels = 2, d.a.voxels = held.numel();
  d.given = true, d.state = data<uint8_t>(held);
  Sampling s{};
  s.state = d.state, s.voxels = d.a.voxels, s.classes = int(classes);
  s.seed = uint64_t(seed), s.step = uint32_t(step), s.first = negatives, s.roles = 1, s.counted_from = uint64_t(first);
  Role& role = s.role[negatives];
  std::copy(quotas.begin(), quotas.end(), role.quotas);
  role.capacity = capacity, role.indices = data<int64_t>(indices), role.counts = data<int64_t>(counts);
  Tensor scratch = Scratch::allocate(state, stream, [&](Scratch& memory) {
    place_zeros(memory, d);
    place_zeros(memory, s);
    memory.end_of_zeros();
    place_rest(memory, d);
    place_rest(memory, s);
  });
  s.bytes = d.bytes;
  decide(d, stream);
  sample_voxels(s, stream);
  return {indices, counts};
}

Tensor gather_voxels_cuda(const Tensor& features, const Tensor& indices) {
  OnDevice stream(features);
  HeldMap f(features);
  Tensor i = torch::stable::contiguous(indices);
  std::vector<int64_t> shape(i.sizes().begin(), i.sizes().end());
  shape.push_back(features.size(1));
  Tensor rows = empty(features, shape, ScalarType::Float);
  gather_voxels(view(f), data<int64_t>(i), i.numel(), data<float>(rows), stream);
  return rows;
}

void gather_voxels_backward_cuda(const Tensor& grad_rows, const Tensor& indices, Tensor grad) {
  OnDevice stream(grad_rows);
  Tensor i = torch::stable::contiguous(indices), rows = torch::stable::contiguous(grad_rows);
  gather_voxels_backward(data<float>(rows), data<int64_t>(i), i.numel(), view(HeldMap(grad)), stream);
}

std::tuple<Tensor, Tensor> voxel_infonce_cuda(const Tensor& anchors, const Tensor& anchor_counts, const Tensor& prototypes,
                                              const Tensor& prototype_counts, const Tensor& negatives,
                                              const Tensor& negative_counts, double temperature) {
  OnDevice stream(anchors);
  check_width(anchors.size(2));
  HeldContrast held = hold(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts);
  const Contrast contrast = held.view(temperature);
  Tensor loss = empty(anchors, {}, ScalarType::Float);
  Tensor lse = empty(anchors, {contrast.classes, contrast.anchors}, ScalarType::Float);
  int* tickets = nullptr;
  double* rows = nullptr;
  Tensor scratch = Scratch::allocate(anchors, stream, [&](Scratch& memory) {
    tickets = memory.take<int>(kTickets);
    memory.end_of_zeros();
    rows = memory.take<double>(rows_of_contrast(contrast));
  });
  voxel_infonce(contrast, data<float>(loss), data<float>(lse), rows, tickets, {}, stream);
  return {loss, lse};
}

std::tuple<Tensor, Tensor, Tensor> voxel_infonce_backward_cuda(const Tensor& grad, const Tensor& lse, const Tensor& anchors,
                                                               const Tensor& anchor_counts, const Tensor& prototypes,
                                                               const Tensor& prototype_counts, const Tensor& negatives,
                                                               const Tensor& negative_counts, double temperature, bool keys) {
  OnDevice stream(anchors);
  check_width(anchors.size(2));
  HeldContrast held = hold(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts);
  const Contrast contrast = held.view(temperature);
  auto like = [&](const Tensor& t) { return empty(t, {t.sizes().begin(), t.sizes().end()}, ScalarType::Float); };
  Tensor grad_anchors = like(anchors);
  anchors_backward(contrast, data<float>(lse), data<float>(grad), data<float>(grad_anchors), {}, stream);
  if (!keys) return {grad_anchors, empty(anchors, {0}, ScalarType::Float), empty(anchors, {0}, ScalarType::Float)};
  Tensor grad_prototypes = like(prototypes), grad_negatives = like(negatives);
  keys_backward(contrast, data<float>(lse), data<float>(grad), data<float>(grad_prototypes), data<float>(grad_negatives), stream);
  return {grad_anchors, grad_prototypes, grad_negatives};
}

// --- the whole step: five launches, and two of its gradient ---

using WholeStep = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

WholeStep dual_contrastive_cuda(const Tensor& logits_a, const Tensor& logits_b, const Tensor& features_a, const Tensor& features_b,
                                const Tensor& labels, std::optional<Tensor> winner, double threshold, int64_t ignore_index,
                                double smooth, double percentile, int64_t mode, bool union_label, bool loser_anchor,
                                bool per_class, int64_t target, bool loser_learns, int64_t anchors, int64_t negatives, int64_t seed,
                                int64_t step, double temperature, double discrepancy, double pseudo, double pseudo_dice,
                                double contrast) {
  OnDevice stream(logits_a);
  check_width(features_a.size(1));
  HeldMap a(logits_a), b(logits_b), fa(features_a), fb(features_b);
  Tensor y = torch::stable::contiguous(labels);
  const int64_t labelled = labels.size(0), unlabelled = logits_a.size(0) - labelled;
  const int64_t classes = logits_a.size(1), width = features_a.size(1);
  const auto floats = [&](std::vector<int64_t> size) { return empty(logits_a, size, ScalarType::Float); };
  const auto longs = [&](std::vector<int64_t> size) { return empty(logits_a, size, ScalarType::Long); };

  SupervisedResult supervised(logits_a, classes);
  Tensor chosen = longs({});
  Supervised s = supervised_of(part(a, 0, labelled), part(b, 0, labelled), y, threshold, ignore_index, smooth);
  s.losses = data<float>(supervised.losses), s.mask = data<int64_t>(supervised.mask), s.sums = data<double>(supervised.sums);
  s.given = winner ? data<int64_t>(*winner) : nullptr, s.winner = data<int64_t>(chosen);

  Tensor thresholds = thresholds_like(logits_a, per_class);
  Percentile p = percentile_of(part(a, labelled, unlabelled), part(b, labelled, unlabelled), percentile, per_class);
  p.thresholds = data<float>(thresholds);

  std::vector<int64_t> shape = voxel_shape(logits_a);
  shape[0] = unlabelled;
  Tensor state = empty(logits_a, shape, ScalarType::Byte), kept = floats({});
  PseudoResult taught(logits_a, classes, Target(target));
  Tensor prototypes = floats({classes, width}), reliable = longs({classes});
  Decision d{};
  d.a = p.maps[0], d.b = p.maps[1];
  d.state = data<uint8_t>(state);
  d.options = {percentile, Mode(mode), union_label, loser_anchor, per_class};
  d.thresholds = p.thresholds, d.winner = data<int64_t>(chosen);
  taught.place(d, smooth);
  d.kept = data<float>(kept);
  d.features[0] = part(fb, labelled, unlabelled), d.features[1] = part(fa, labelled, unlabelled);  // the loser's
  d.second = d.winner, d.width = width, d.classes = int(classes);
  d.prototypes = data<float>(prototypes), d.prototype_counts = data<int64_t>(reliable);

  Tensor indices[2] = {longs({classes, anchors}), longs({classes, negatives})}, counts[2] = {longs({classes}), longs({classes})};
  Tensor rows[2] = {floats({classes, anchors, width}), floats({classes, negatives, width})};
  Sampling sampling{};
  sampling.state = d.state, sampling.voxels = state.numel(), sampling.classes = int(classes);
  sampling.seed = uint64_t(seed), sampling.step = uint32_t(step), sampling.first = 0, sampling.roles = 2;
  sampling.features[0] = d.features[0], sampling.features[1] = d.features[1], sampling.second = d.winner;
  for (int r = 0; r < 2; ++r) {
    Role& role = sampling.role[r];
    role.capacity = r ? negatives : anchors;
    std::fill(role.quotas, role.quotas + classes, role.capacity);
    role.indices = data<int64_t>(indices[r]), role.counts = data<int64_t>(counts[r]), role.rows = data<float>(rows[r]);
  }

  HeldContrast held{rows[0], counts[0], prototypes, reliable, rows[1], counts[1]};
  const Contrast view = held.view(temperature);
  Tensor losses = floats({2}), contrast_loss = floats({}), lse = floats({classes, anchors});
  Total total{};
  total.losses = data<float>(losses), total.supervised = s.losses, total.pseudo = d.pseudo;
  total.thresholds = p.thresholds, total.thresholds_count = 2 * p.groups, total.winner = d.winner;
  total.discrepancy = float(discrepancy), total.pseudo_weight = float(pseudo);
  total.pseudo_dice_weight = float(pseudo_dice), total.contrast = float(contrast), total.loser_learns = loser_learns;
  total.target = taught.target;

  int* tickets = nullptr;
  double* sums = nullptr;
  Tensor scratch = Scratch::allocate(logits_a, stream, [&](Scratch& memory) {
    place_zeros(memory, s);
    place_zeros(memory, p);
    place_zeros(memory, d);
    place_zeros(memory, sampling);
    tickets = memory.take<int>(kTickets);
    memory.end_of_zeros();
    place_rest(memory, s);
    place_rest(memory, p);
    place_rest(memory, d);
    place_rest(memory, sampling);
    sums = memory.take<double>(rows_of_contrast(view));
  });
  sampling.bytes = d.bytes;

  describe(s, p, stream);
  refine(p, stream);
  decide(d, stream);
  sample_voxels(sampling, stream);
  voxel_infonce(view, data<float>(contrast_loss), data<float>(lse), sums, tickets, total, stream);
  return {losses, supervised.losses, supervised.mask, supervised.sums, chosen, thresholds, state, taught.losses,
          taught.pseudo_voxels, taught.sums, kept, prototypes, reliable, indices[0], counts[0], rows[0], counts[1], rows[1], contrast_loss, lse};
}

void dual_contrastive_backward_cuda(const Tensor& grad_losses, const Tensor& logits_a, const Tensor& logits_b,
                                    const Tensor& labels, const Tensor& sums, const Tensor& winner, const Tensor& state,
                                    const Tensor& pseudo_voxels, const Tensor& pseudo_sums, const Tensor& anchor_indices, const Tensor& lse,
                                    const Tensor& anchor_rows, const Tensor& anchor_counts, const Tensor& prototypes,
                                    const Tensor& reliable, const Tensor& negative_rows, const Tensor& negative_counts,
                                    double threshold, int64_t ignore_index, double smooth, int64_t target, bool loser_learns,
                                    double temperature, double discrepancy, double pseudo, double pseudo_dice, double contrast,
                                    Tensor grad_a, Tensor grad_b, Tensor grad_features_a, Tensor grad_features_b) {
  OnDevice stream(logits_a);
  HeldMap a(logits_a), b(logits_b), to_a(grad_a), to_b(grad_b), to_fa(grad_features_a), to_fb(grad_features_b);
  Tensor y = torch::stable::contiguous(labels), g = torch::stable::contiguous(grad_losses);
  const int64_t labelled = labels.size(0), unlabelled = logits_a.size(0) - labelled;
  Gradient gradient{};
  gradient.supervised = supervised_of(part(a, 0, labelled), part(b, 0, labelled), y, threshold, ignore_index, smooth);
  gradient.supervised.sums = data<double>(sums);
  gradient.of_supervised = {data<float>(g), 0, float(discrepancy)};
  gradient.to_supervised[0] = part(to_a, 0, labelled), gradient.to_supervised[1] = part(to_b, 0, labelled);
  gradient.a = part(a, labelled, unlabelled), gradient.b = part(b, labelled, unlabelled);
  gradient.state = data<uint8_t>(state), gradient.pseudo_voxels = data<int64_t>(pseudo_voxels), gradient.target = Target(target);
  gradient.pseudo_sums = data<double>(pseudo_sums), gradient.smooth = smooth;
  gradient.of_pseudo = {data<float>(g), 0, float(pseudo), float(pseudo_dice), loser_learns ? data<int64_t>(winner) : nullptr};
  gradient.to_pseudo[0] = part(to_a, labelled, unlabelled), gradient.to_pseudo[1] = part(to_b, labelled, unlabelled);
  cuda::gradient(gradient, stream);

  for (const Tensor& grad : {grad_features_a, grad_features_b})  // both are dense
    fill_zero(grad.data_ptr(), size_t(grad.numel() * grad.element_size()), stream);
  HeldContrast held{anchor_rows, anchor_counts, prototypes, reliable, negative_rows, negative_counts};
  Scatter scatter{};
  scatter.to[0] = part(to_fa, labelled, unlabelled), scatter.to[1] = part(to_fb, labelled, unlabelled);
  scatter.indices = data<int64_t>(anchor_indices), scatter.winner = data<int64_t>(winner), scatter.factor = float(contrast);
  anchors_backward(held.view(temperature), data<float>(lse), data<float>(g), nullptr, scatter, stream);
}

}  // namespace
}  // namespace sslfast::cuda

STABLE_TORCH_LIBRARY_IMPL(sslfast, SSLFAST_KEY, m) {
  using namespace sslfast::cuda;
  m.impl("dual_supervised", TORCH_BOX(&dual_supervised_cuda));
  m.impl("dual_supervised_backward", TORCH_BOX(&dual_supervised_backward_cuda));
  m.impl("reliability", TORCH_BOX(&reliability_cuda));
  m.impl("voxel_entropy", TORCH_BOX(&voxel_entropy_cuda));
  m.impl("pseudo_supervised", TORCH_BOX(&pseudo_supervised_cuda));
  m.impl("pseudo_supervised_backward", TORCH_BOX(&pseudo_supervised_backward_cuda));
  m.impl("rectified_consistency", TORCH_BOX(&rectified_consistency_cuda));
  m.impl("rectified_consistency_backward", TORCH_BOX(&rectified_consistency_backward_cuda));
  m.impl("masked_consistency", TORCH_BOX(&masked_consistency_cuda));
  m.impl("masked_consistency_backward", TORCH_BOX(&masked_consistency_backward_cuda));
  m.impl("class_prototypes", TORCH_BOX(&class_prototypes_cuda));
  m.impl("class_prototypes_backward", TORCH_BOX(&class_prototypes_backward_cuda));
  m.impl("sample_voxels", TORCH_BOX(&sample_voxels_cuda));
  m.impl("gather_voxels", TORCH_BOX(&gather_voxels_cuda));
  m.impl("gather_voxels_backward", TORCH_BOX(&gather_voxels_backward_cuda));
  m.impl("voxel_infonce", TORCH_BOX(&voxel_infonce_cuda));
  m.impl("voxel_infonce_backward", TORCH_BOX(&voxel_infonce_backward_cuda));
  m.impl("dual_contrastive", TORCH_BOX(&dual_contrastive_cuda));
  m.impl("dual_contrastive_backward", TORCH_BOX(&dual_contrastive_backward_cuda));
}
