// The ops for the dispatcher, written once for all devices; their schemas are in sslfast/ops. A device provides
//   Tensor sum_over_voxels(term, maps [kMaps], side)            float64 sums
//   void gradient_of_sums(term, grad_sums, maps, side, to)      to: the students' gradients
// and a static function for each op of SSLFAST_OPS, with its name.
#pragma once

#include "bind.h"
#include "terms.h"

// Ops that are terms of terms.h, each with a backward pass; and all other ops but those of bind_norm.cpp.
#define SSLFAST_SUMS_OPS(op) op(dual_supervised) op(pseudo_supervised) op(rectified_consistency) op(masked_consistency)
#define SSLFAST_OPS(op)                                                                      \
  op(reliability) op(voxel_entropy) op(class_prototypes) op(sample_voxels) op(gather_voxels) \
      op(gather_voxels_backward) op(voxel_infonce) op(voxel_infonce_backward)

namespace sslfast {

// Logits [N, C, *spatial], or features and the classifier's weights [N, C, K + 1]; or the tensors for their gradients.
struct Logits {
  const Tensor& values;
  const MaybeTensor& weights;

  int64_t classes() const { return weights ? weights->size(1) : values.size(1); }
};

template <class Device>
struct SumsOps {
  static Tensor dual_supervised(const Tensor& a, MaybeTensor a_weights, const Tensor& b, MaybeTensor b_weights,
                                const Tensor& labels, double threshold, int64_t ignore) {
    const Logits maps[] = {{a, a_weights}, {b, b_weights}};
    const Tensor y = torch::stable::contiguous(labels);
    return Device::sum_over_voxels(DualSupervised{float(threshold)}, maps, labels_side(y, maps[0].classes(), ignore));
  }
  static void dual_supervised_backward(const Tensor& grad_sums, const Tensor& a, MaybeTensor a_weights, const Tensor& b,
                                       MaybeTensor b_weights, const Tensor& labels, double threshold, int64_t ignore,
                                       Tensor grad_a, MaybeTensor grad_a_weights, Tensor grad_b,
                                       MaybeTensor grad_b_weights) {
    const Logits maps[] = {{a, a_weights}, {b, b_weights}}, to[] = {{grad_a, grad_a_weights}, {grad_b, grad_b_weights}};
    const Tensor y = torch::stable::contiguous(labels);
    Device::gradient_of_sums(DualSupervised{float(threshold)}, grad_sums, maps,
                             labels_side(y, maps[0].classes(), ignore), to);
  }

  static Tensor pseudo_supervised(const Tensor& logits, MaybeTensor weights, const Tensor& flags) {
    const Logits maps[] = {{logits, weights}};
    const Tensor owned = torch::stable::contiguous(flags);
    return Device::sum_over_voxels(PseudoSupervised{}, maps, flags_side(owned, maps[0].classes()));
  }
  static void pseudo_supervised_backward(const Tensor& grad_sums, const Tensor& logits, MaybeTensor weights,
                                         const Tensor& flags, Tensor grad, MaybeTensor grad_weights) {
    const Logits maps[] = {{logits, weights}}, to[] = {{grad, grad_weights}};
    const Tensor owned = torch::stable::contiguous(flags);
    Device::gradient_of_sums(PseudoSupervised{}, grad_sums, maps, flags_side(owned, maps[0].classes()), to);
  }

  static Tensor rectified_consistency(const Tensor& student, MaybeTensor student_weights, const Tensor& teacher,
                                      MaybeTensor teacher_weights, const Tensor& flags) {
    const Logits maps[] = {{student, student_weights}, {teacher, teacher_weights}};
    const Tensor owned = torch::stable::contiguous(flags);
    return Device::sum_over_voxels(RectifiedConsistency{}, maps, flags_side(owned, maps[0].classes()));
  }
  static void rectified_consistency_backward(const Tensor& grad_sums, const Tensor& student,
                                             MaybeTensor student_weights, const Tensor& teacher,
                                             MaybeTensor teacher_weights, const Tensor& flags, Tensor grad,
                                             MaybeTensor grad_weights) {
    const Logits maps[] = {{student, student_weights}, {teacher, teacher_weights}}, to[] = {{grad, grad_weights}};
    const Tensor owned = torch::stable::contiguous(flags);
    Device::gradient_of_sums(RectifiedConsistency{}, grad_sums, maps, flags_side(owned, maps[0].classes()), to);
  }

  static Tensor masked_consistency(const Tensor& student, MaybeTensor student_weights, const Tensor& teacher,
                                   MaybeTensor teacher_weights, double temperature, double max_entropy) {
    const Logits maps[] = {{student, student_weights}, {teacher, teacher_weights}};
    return Device::sum_over_voxels(MaskedConsistency{float(1 / temperature), float(max_entropy)}, maps, Side{});
  }
  static void masked_consistency_backward(const Tensor& grad_sums, const Tensor& student, MaybeTensor student_weights,
                                          const Tensor& teacher, MaybeTensor teacher_weights, double temperature,
                                          double max_entropy, Tensor grad, MaybeTensor grad_weights) {
    const Logits maps[] = {{student, student_weights}, {teacher, teacher_weights}}, to[] = {{grad, grad_weights}};
    Device::gradient_of_sums(MaskedConsistency{float(1 / temperature), float(max_entropy)}, grad_sums, maps, Side{},
                             to);
  }
};

}  // namespace sslfast

// Registers every op on a device, within STABLE_TORCH_LIBRARY_IMPL(sslfast, <key>, m).
#define SSLFAST_IMPLEMENT_SUMS(name)                \
  m.impl(#name, TORCH_BOX(&SumsOps<Device>::name)); \
  m.impl(#name "_backward", TORCH_BOX(&SumsOps<Device>::name##_backward));
#define SSLFAST_IMPLEMENT(name) m.impl(#name, TORCH_BOX(&Device::name));
#define SSLFAST_IMPLEMENT_ALL SSLFAST_SUMS_OPS(SSLFAST_IMPLEMENT_SUMS) SSLFAST_OPS(SSLFAST_IMPLEMENT)
