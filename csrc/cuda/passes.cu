// Which size of the passes computes so many classes, and what belongs to no size.
#include "passes.cuh"

namespace sslfast::cuda {

extern template struct Passes<2>;
extern template struct Passes<4>;
extern template struct Passes<16>;
extern template struct Passes<32>;

namespace {

constexpr int kMostRows = 1 << 20;  // doubles

__global__ void __launch_bounds__(kThreads)
    prototypes_backward_kernel(Map features, const uint8_t* state, int classes, const float* grad_sums, Map to) {
  // df = (g - u (u . g)) / |f| with u = f / |f| and g the gradient of the voxel's class
  for_each_tile<1>(features, int(blockIdx.x), int(gridDim.x), [&](int64_t volume, int64_t voxel) {
    if (voxel >= features.voxels) return;
    const uint8_t s = state[volume * features.voxels + voxel];
    const int64_t width = features.channels, from = features.offset(volume, voxel), first = to.offset(volume, voxel);
    const bool member = (s & kReliable) && (s & kClass) < classes;
    const float* g = grad_sums + (s & kClass) * width;
    const float inverse = member ? inverse_length(features, from) : 0.f;
    float along = 0;
    if (inverse != 0.f)
      for (int64_t k = 0; k < width; ++k) along += inverse * load(features, from + k * features.channel_stride) * g[k];
    for (int64_t k = 0; k < width; ++k) {
      const float u = inverse != 0.f ? inverse * load(features, from + k * features.channel_stride) : 0.f;
      store(to, first + k * to.channel_stride, inverse != 0.f ? inverse * (g[k] - u * along) : 0.f);
    }
  });
}

int decision_blocks(const Decision& d) {
  int found = 0;
  with_most(d.a.channels, [&](auto most) {
    const int64_t by_memory = d.quantities() ? kMostRows / d.quantities() : kMostBlocks;
    const int64_t room = by_memory < 64 ? 64 : by_memory < kMostBlocks ? by_memory : kMostBlocks;
    found = blocks_for(Tiles<kVoxels<most>>(d.a).count, int(room));
  });
  return found;
}

}  // namespace

Map device_map(const VoxelMap& map) {
  const int64_t bytes = map.dtype == DType::f32 ? 16 : 8;
  const bool by_four = map.voxel_stride == 1 && map.volume_stride % 4 == 0 && map.channel_stride % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(map.data) % bytes == 0;
  return {map, by_four};
}

int64_t rows_of_supervised(const VoxelMap& map, int64_t classes) { return blocks_of_pass(map) * (kSize + 5 * classes); }

int64_t rows_of_decision(const Decision& d) { return decision_blocks(d) * d.quantities(); }

void describe(const Supervised& s, const Percentile& p, void* stream) {
  with_most((s.rows ? s.a : p.maps[0]).channels, [&](auto most) { Passes<most>::describe(s, p, stream); });
}

void refine(const Percentile& p, void* stream) {
  with_most(p.maps[0].channels, [&](auto most) { Passes<most>::refine(p, stream); });
}

void decide(const Decision& d, void* stream) {
  with_most(d.a.channels, [&](auto most) { Passes<most>::decide(d, decision_blocks(d), stream); });
}

void gradient(const Gradient& g, void* stream) {
  with_most((g.supervised.a.volumes ? g.supervised.a : g.a).channels, [&](auto most) { Passes<most>::gradient(g, stream); });
}

void voxel_entropy(const Map& logits, float* out, void* stream) {
  with_most(logits.channels, [&](auto most) { Passes<most>::voxel_entropy(logits, out, stream); });
}

void class_prototypes_backward(const Map& features, const uint8_t* state, int classes, const float* grad_sums, const Map& grad,
                               void* stream) {
  launch(prototypes_backward_kernel, dim3(blocks_for(Tiles<1>(features).count, 4 * kMostBlocks)), 0, stream, features, state,
         classes, grad_sums, grad);
}

}  // namespace sslfast::cuda
