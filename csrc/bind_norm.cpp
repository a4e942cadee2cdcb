// Implements the ops of sslfast/ops/norm_act.py with the CPU kernels. On a GPU, Triton has them.
#include "bind.h"
#include "cpu/kernels.h"

namespace sslfast {
namespace {

// An optional map.
struct OwnedOption {
  std::optional<OwnedMap> owned;

  explicit OwnedOption(const MaybeTensor& t) {
    if (t) owned.emplace(*t);
  }
  operator const VoxelMap*() const { return owned ? &owned->map : nullptr; }
};

Norm norm_of(const Tensor& statistics, const Tensor& weight, const Tensor& bias, double eps, bool relu) {
  return {data<double>(statistics), statistics.size(0), data<float>(weight), data<float>(bias), float(eps), relu};
}

struct NormOps {
  static Tensor norm_statistics(const Tensor& x, bool per_volume) {
    Tensor statistics = empty(x, {per_volume ? x.size(0) : 1, 2, x.size(1)}, ScalarType::Double);
    sslfast::norm_statistics(OwnedMap(x), per_volume, data<double>(statistics));
    return statistics;
  }

  static void norm_apply(const Tensor& x, const Tensor& statistics, const Tensor& weight, const Tensor& bias,
                         double eps, bool relu, MaybeTensor residual, MaybeTensor skip, Tensor y) {
    sslfast::norm_apply(OwnedMap(x), norm_of(statistics, weight, bias, eps, relu), OwnedOption(residual),
                        OwnedOption(skip), OwnedMap(y));
  }

  static Tensor norm_backward_sums(const Tensor& grad, const Tensor& x, const Tensor& statistics, const Tensor& weight,
                                   const Tensor& bias, double eps, bool relu, MaybeTensor residual) {
    Tensor sums = empty(x, {statistics.size(0), 2, x.size(1)}, ScalarType::Double);
    sslfast::norm_backward_sums(OwnedMap(grad), OwnedMap(x), norm_of(statistics, weight, bias, eps, relu),
                                OwnedOption(residual), data<double>(sums));
    return sums;
  }

  static void norm_backward(const Tensor& grad, const Tensor& x, const Tensor& statistics, const Tensor& weight,
                            const Tensor& bias, double eps, bool relu, MaybeTensor residual, const Tensor& means,
                            Tensor grad_x, MaybeTensor grad_residual) {
    sslfast::norm_backward(OwnedMap(grad), OwnedMap(x), norm_of(statistics, weight, bias, eps, relu),
                           OwnedOption(residual), data<double>(means), OwnedMap(grad_x), OwnedOption(grad_residual));
  }
};

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("norm_statistics", TORCH_BOX(&sslfast::NormOps::norm_statistics));
  m.impl("norm_apply", TORCH_BOX(&sslfast::NormOps::norm_apply));
  m.impl("norm_backward_sums", TORCH_BOX(&sslfast::NormOps::norm_backward_sums));
  m.impl("norm_backward", TORCH_BOX(&sslfast::NormOps::norm_backward));
}
