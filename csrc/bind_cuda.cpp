// Implements the ops of sslfast/ops with the CUDA kernels. The arguments were checked in Python. The host never waits
// for the device. The library does not link libtorch_cuda, so that it can be loaded without a GPU.
#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bind_ops.h"
#include "cuda/kernels.h"

#ifndef SSLFAST_KEY  // tests set another key to run the kernels' code on the CPU
#define SSLFAST_KEY CUDA
#endif

namespace sslfast {
namespace {

// Makes the tensor's device the current one during its lifetime; converts to that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    if (!t.is_cuda()) return;
    const int device = t.get_device_index();
    before_ = cuda::set_device(device);
    using GetStream = int32_t (*)(int32_t, void**);
    static const auto get_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    if (!get_stream || get_stream(device, &stream_))
      throw std::runtime_error("sslfast: torch does not tell its CUDA stream");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (before_ >= 0) cuda::set_device(before_);
  }

  operator void*() const { return stream_; }

 private:
  int before_ = -1;
  void* stream_ = nullptr;
};

// Scratch memory in one block. `layout` takes its arrays, those to be zeroed first. It is called twice: to measure, and
// to assign pointers.
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
    cuda::fill_zero(real.base_, real.zeros_, stream);
    return block;
  }
  static Tensor allocate(const Tensor& like, void* stream, cuda::Partials& partials, int64_t rows) {
    return allocate(like, stream, [&](Scratch& memory) {
      partials.arrival_counters = memory.take<int>(cuda::Partials::kArrivals);
      memory.end_of_zeros();
      partials.rows = memory.take<double>(rows);
    });
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0, zeros_ = 0;
};

void check_width(int64_t width) {
  STD_TORCH_CHECK(width <= cuda::kMostWidth, "sslfast: ", width, " feature channels; the CUDA kernels take up to ",
                  cuda::kMostWidth);
}

// Only the CPU kernels compute logits from features; the CUDA kernels read stored ones.
void expect_stored(const MaybeTensor& weights) {
  STD_TORCH_CHECK(!weights, "the CUDA kernels take stored logits, no classifier's weights");
}

struct Device {
  template <class Term>
  static Tensor sum_over_voxels(const Term& term, const Logits* logits, const Side& side) {
    const Tensor& like = logits[0].values;
    const OnDevice stream(like);
    const int64_t count = Term::kScalars + Term::kRows * logits[0].classes();
    Tensor sums = empty(like, {count}, ScalarType::Double);
    with_maps(term, logits, side, [&](const cuda::OnVoxels<Term>& in) {
      cuda::Partials partials;
      const Tensor scratch = Scratch::allocate(like, stream, partials, cuda::blocks_for_logits(in.maps[0]) * count);
      cuda::sum_over_voxels(in, partials, data<double>(sums), stream);
    });
    return sums;
  }

  template <class Term>
  static void gradient_of_sums(const Term& term, const Tensor& grad_sums, const Logits* logits, const Side& side,
                               const Logits* to) {
    const OnDevice stream(logits[0].values);
    const Tensor g = torch::stable::contiguous(grad_sums);
    with_maps(term, logits, side, [&](const cuda::OnVoxels<Term>& in) {
      cuda::Students<Term> students;
      for (int n = 0; n < Term::kStudents; ++n) students.maps[n] = OwnedMap(to[n].values);
      cuda::gradient_of_sums(in, data<double>(g), students, stream);
    });
  }

  template <class Term, class Body>
  static void with_maps(const Term& term, const Logits* logits, const Side& side, const Body& body) {
    std::optional<OwnedMap> owned[Term::kMaps];
    cuda::OnVoxels<Term> in{{}, side, term};
    for (int m = 0; m < Term::kMaps; ++m) {
      expect_stored(logits[m].weights);
      in.maps[m] = owned[m].emplace(logits[m].values);
    }
    body(in);
  }

  static std::tuple<Tensor, Tensor> reliability(const Tensor& logits, MaybeTensor weights, const Tensor& percentile,
                                                MaybeTensor given) {
    expect_stored(weights);
    const OnDevice stream(logits);
    const OwnedMap owned(logits);
    const int64_t voxels = owned.map.volumes * owned.map.voxels;
    STD_TORCH_CHECK(voxels < int64_t(1) << 32, "sslfast: ", voxels,
                    " unlabelled voxels; the CUDA kernels take less than 2^32");
    Tensor flags = empty(logits, voxel_shape(logits), ScalarType::Byte),
           threshold = empty(logits, {}, ScalarType::Float);
    cuda::Reliability r{};
    r.logits = owned, r.percentile = data<double>(percentile);
    r.threshold = data<float>(threshold), r.flags = data<uint8_t>(flags);
    Tensor scratch;
    if (given)
      cuda::copy(data<float>(*given), r.threshold, sizeof(float), stream);
    else
      scratch = Scratch::allocate(logits, stream, [&](Scratch& memory) {
        r.arrival_counters = memory.take<int>(2);
        r.high = memory.take<uint32_t>(cuda::padded_bins(cuda::kHighBins));
        r.low = memory.take<uint32_t>(2 * cuda::kLowBins);
        memory.end_of_zeros();
        r.statistics = memory.take<cuda::OrderStatistics>(1);
        r.keys = memory.take<uint16_t>(voxels);
      });
    cuda::reliability(r, stream);
    return {threshold, flags};
  }

  static Tensor voxel_entropy(const Tensor& logits, MaybeTensor weights) {
    expect_stored(weights);
    const OnDevice stream(logits);
    Tensor out = empty(logits, voxel_shape(logits), ScalarType::Float);
    cuda::voxel_entropy(OwnedMap(logits), data<float>(out), stream);
    return out;
  }

  static std::tuple<Tensor, Tensor> class_prototypes(const Tensor& features, const Tensor& flags, int64_t num_classes,
                                                     MaybeTensor other, MaybeTensor second) {
    check_width(features.size(1));
    const OnDevice stream(features);
    const OwnedMap first(features), another(other ? *other : features);
    const Tensor owned = torch::stable::contiguous(flags);
    Tensor sums = empty(features, {num_classes, features.size(1)}, ScalarType::Float);
    Tensor counts = empty(features, {num_classes}, ScalarType::Long);
    cuda::Prototypes p{first, another, second ? data<int64_t>(*second) : nullptr, data<uint8_t>(owned),
                       int(num_classes)};
    p.sums = data<float>(sums), p.counts = data<int64_t>(counts);
    const Tensor scratch = Scratch::allocate(features, stream, p.partials, partials_of(p));
    cuda::class_prototypes(p, stream);
    return {sums, counts};
  }

  static std::tuple<Tensor, Tensor> sample_voxels(const Tensor& flags, std::vector<int64_t> quotas, int64_t seed,
                                                  const Tensor& step, bool negatives, int64_t first) {
    const OnDevice stream(flags);
    const Tensor owned = torch::stable::contiguous(flags);
    const int64_t classes = int64_t(quotas.size()), capacity = *std::max_element(quotas.begin(), quotas.end());
    STD_TORCH_CHECK(capacity < 1 << 28, "sslfast: a quota of ", capacity,
                    " voxels; the CUDA kernels take less than 2^28");
    Tensor indices = empty(flags, {classes, capacity}, ScalarType::Long),
           counts = empty(flags, {classes}, ScalarType::Long);
    cuda::Sampling s{};
    s.flags = data<uint8_t>(owned), s.voxels = owned.numel(), s.classes = int(classes);
    std::copy(quotas.begin(), quotas.end(), s.quotas);
    s.seed = uint64_t(seed), s.counted_from = uint64_t(first), s.step = data<int64_t>(step), s.negatives = negatives;
    s.capacity = capacity, s.room = cuda::room_for(capacity);
    s.indices = data<int64_t>(indices), s.counts = data<int64_t>(counts);
    const Tensor scratch = Scratch::allocate(flags, stream, [&](Scratch& memory) {
      s.histogram = memory.take<unsigned long long>(256);
      s.num_collected = memory.take<int>(classes);
      s.arrival_counters = memory.take<int>(classes);
      memory.end_of_zeros();
      s.list = memory.take<cuda::Candidate>(classes * s.room);
    });
    cuda::sample_voxels(s, stream);
    return {indices, counts};
  }

  static Tensor gather_voxels(const Tensor& features, const Tensor& indices) {
    const OnDevice stream(features);
    const OwnedMap owned(features);
    const Tensor i = torch::stable::contiguous(indices);
    std::vector<int64_t> shape(i.sizes().begin(), i.sizes().end());
    shape.push_back(features.size(1));
    Tensor rows = empty(features, shape, ScalarType::Float);
    cuda::gather_voxels(owned, data<int64_t>(i), i.numel(), data<float>(rows), stream);
    return rows;
  }

  static void gather_voxels_backward(const Tensor& grad_rows, const Tensor& indices, Tensor grad) {
    const OnDevice stream(grad_rows);
    const Tensor i = torch::stable::contiguous(indices), rows = torch::stable::contiguous(grad_rows);
    cuda::gather_voxels_backward(data<float>(rows), data<int64_t>(i), i.numel(), OwnedMap(grad), stream);
  }

  static std::tuple<Tensor, Tensor> voxel_infonce(const Tensor& anchors, const Tensor& anchor_counts,
                                                  const Tensor& prototypes, const Tensor& prototype_counts,
                                                  const Tensor& negatives, const Tensor& negative_counts,
                                                  double temperature) {
    check_width(anchors.size(2));
    const OnDevice stream(anchors);
    const OwnedContrast owned =
        own_contrast(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts);
    const Contrast contrast = owned.view(temperature);
    Tensor sums = empty(anchors, {2}, ScalarType::Double);
    Tensor lse = empty(anchors, {contrast.classes, contrast.anchors}, ScalarType::Float);
    cuda::Partials partials;
    const Tensor scratch = Scratch::allocate(anchors, stream, partials, cuda::partials_of(contrast));
    cuda::voxel_infonce(contrast, partials, data<double>(sums), data<float>(lse), stream);
    return {sums, lse};
  }

  static Tensor voxel_infonce_backward(const Tensor& grad_sums, const Tensor& lse, const Tensor& anchors,
                                       const Tensor& anchor_counts, const Tensor& prototypes,
                                       const Tensor& prototype_counts, const Tensor& negatives,
                                       const Tensor& negative_counts, double temperature) {
    check_width(anchors.size(2));
    const OnDevice stream(anchors);
    const OwnedContrast owned =
        own_contrast(anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts);
    const Tensor g = torch::stable::contiguous(grad_sums);
    Tensor grad = empty(anchors, {anchors.sizes().begin(), anchors.sizes().end()}, ScalarType::Float);
    cuda::voxel_infonce_backward(owned.view(temperature), data<float>(lse), data<double>(g), data<float>(grad), stream);
    return grad;
  }
};

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, SSLFAST_KEY, m) {
  using namespace sslfast;
  SSLFAST_IMPLEMENT_ALL
}
