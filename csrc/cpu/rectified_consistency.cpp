// What two networks' predictions on the same voxels teach each other. Every map is read once.
// Bytes a voxel for C classes of s bytes: forward 2 C s + 1 of state, backward as much again and the gradients written.
#include "kernels.h"
#include "prediction.h"

namespace sslfast {
namespace {

// body(volume, first, count, tiles [2], members [3][kTile]): 1 where a, where b learns, and where there is a voxel.
template <class Body>
void for_each_pair(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, int64_t chunk, const Body& body) {
  alignas(64) float tiles[2][kMaxClasses * kTile], members[3][kTile];
  for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
    load_tile(a, volume, first, count, tiles[0]);
    load_tile(b, volume, first, count, tiles[1]);
    for (int v = 0; v < kTile; ++v) {
      members[2][v] = v < count ? 1.f : 0.f;
      for (int n = 0; n < 2; ++n)
        members[n][v] = v < count && (state[volume * a.voxels + first + v] & sure(1 - n)) ? 1.f : 0.f;
    }
    body(volume, first, count, tiles, members);
  });
}

template <int kClasses>
RectifiedSums rectified_of_chunk(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(a.channels);
  Vec total[2] = {}, apart = {}, taught[2] = {}, products[3][kMaxClasses] = {};
  for_each_pair(a, b, state, chunk, [&](int64_t, int64_t, int count, auto& tiles, auto& members) {
    for (int v = 0; v < count; v += kLanes) {
      const VecPrediction of[2] = {predict(tiles[0] + v, classes), predict(tiles[1] + v, classes)};
      const Agreement agreement(of, classes);
      for (int n = 0; n < 2; ++n) {
        const Vec member = load(members[n] + v);
        total[n] += select(member > 0.f, agreement.rectified(n), Vec{});
        taught[n] += member;
      }
      const auto inside = load(members[2] + v) > 0.f;
      apart += select(inside, 1.f - agreement.cosine, Vec{});
      for (int c = 1; c < classes; ++c) {
        const Vec p[2] = {of[0].p[c], of[1].p[c]};
        for (int n = 0; n < 2; ++n) products[n][c] += select(inside, p[n] * p[n], Vec{});
        products[2][c] += select(inside, p[0] * p[1], Vec{});
      }
    }
  });
  RectifiedSums out{{sum(total[0]), sum(total[1])}, sum(apart), {int64_t(sum(taught[0])), int64_t(sum(taught[1]))}, {}};
  for (const auto& of_classes : products)
    for (int c = 0; c < classes; ++c) out.products.push_back(sum(of_classes[c]));
  return out;
}

template <int kClasses>
void rectified_gradient_of_chunk(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, const RectifiedGradient& g,
                                 const VoxelMap* const grad[2], int64_t chunk) {
  const int classes = kClasses ? kClasses : int(a.channels);
  for_each_pair(a, b, state, chunk, [&](int64_t volume, int64_t first, int count, auto& tiles, auto& members) {
    for (int v = 0; v < count; v += kLanes) {
      const VecPrediction of[2] = {predict(tiles[0] + v, classes), predict(tiles[1] + v, classes)};
      const Agreement agreement(of, classes);
      const auto inside = load(members[2] + v) > 0.f;
      for (int n = 0; n < 2; ++n) {
        const auto learns = load(members[n] + v) > 0.f;
        const ProductGradient products(of[n], of[1 - n], g.square.data(), g.product.data(), classes);
        for (int c = 0; c < classes; ++c) {
          const Vec taught = select(learns, g.rectified[n] * agreement.rectified_gradient(of, n, c), Vec{});
          const Vec everywhere = g.cosine * agreement.cosine_gradient(of, n, c) + products.by_logit(c);
          store(tiles[n] + c * kTile + v, select(inside, everywhere + taught, Vec{}));
        }
      }
    }
    for (int n = 0; n < 2; ++n) store_tile(*grad[n], volume, first, count, tiles[n]);
  });
}

}  // namespace

RectifiedSums rectified_consistency(const VoxelMap& a, const VoxelMap& b, const uint8_t* state) {
  std::vector<RectifiedSums> partial(chunks_of(a.volumes, a.voxels));
  parallel(int64_t(partial.size()), [&](int64_t chunk) {
    with_classes(a.channels, [&](auto n) { partial[chunk] = rectified_of_chunk<n>(a, b, state, chunk); });
  });
  RectifiedSums out;
  out.products.resize(3 * a.channels);
  for (const RectifiedSums& p : partial) {
    out.cosine += p.cosine;
    for (size_t i = 0; i < p.products.size(); ++i) out.products[i] += p.products[i];
    for (int n = 0; n < 2; ++n) {
      out.rectified[n] += p.rectified[n];
      out.taught[n] += p.taught[n];
    }
  }
  return out;
}

void rectified_consistency_backward(const VoxelMap& a, const VoxelMap& b, const uint8_t* state,
                                    const RectifiedGradient& gradient, const VoxelMap& grad_a, const VoxelMap& grad_b) {
  const VoxelMap* const grad[2] = {&grad_a, &grad_b};
  parallel(chunks_of(a.volumes, a.voxels), [&](int64_t chunk) {
    with_classes(a.channels, [&](auto n) { rectified_gradient_of_chunk<n>(a, b, state, gradient, grad, chunk); });
  });
}

}  // namespace sslfast
