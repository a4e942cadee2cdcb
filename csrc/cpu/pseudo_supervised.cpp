// Cross-entropy of both networks against the pseudo-labels of the reliable voxels. Tiles without one are not read.
// Bytes a voxel for C classes of s bytes: forward 1 + 2 C s where reliable, backward 1 + 2 C s + 2 C s written.
#include "kernels.h"
#include "../voxel_math.h"

namespace sslfast {
namespace {

// 1 where reliable, and the pseudo-label, of a tile; gives how many are reliable.
int read_state(const uint8_t* state, int count, float* reliable, float* label) {
  int total = 0;
  for (int v = 0; v < count; ++v) {
    total += (state[v] & kReliable) != 0;
    reliable[v] = (state[v] & kReliable) ? 1.f : 0.f;
    label[v] = float(state[v] & kClass);
  }
  for (int v = count; v < kTile; ++v) reliable[v] = label[v] = 0.f;
  return total;
}

template <int kClasses, class Body>
void for_each_reliable_tile(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other, int64_t chunk,
                            const Body& body) {
  const int classes = kClasses ? kClasses : int(a.channels);
  alignas(64) float tiles[2][kMaxClasses * kTile], reliable[kTile], targets[2][kTile];
  for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
    int members = read_state(state + volume * a.voxels + first, count, reliable, targets[0]);
    if (members) {
      load_tile(a, volume, first, count, tiles[0]);
      load_tile(b, volume, first, count, tiles[1]);
      for (int v = 0; v < count; v += kLanes) {
        if (!other) {
          store(targets[1] + v, load(targets[0] + v));
          continue;
        }
        for (int n = 0; n < 2; ++n) {
          Vec z[kMaxClasses];
          for (int c = 0; c < classes; ++c) z[c] = load(tiles[1 - n] + c * kTile + v);
          store(targets[n] + v, argmax(z, classes));
        }
      }
    }
    body(volume, first, count, members, tiles, reliable, targets);
  });
}

template <int kClasses>
PseudoSums sums_of_chunk(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(a.channels);
  Vec ce[2] = {};
  int64_t total = 0;
  for_each_reliable_tile<kClasses>(a, b, state, other, chunk, [&](int64_t, int64_t, int count, int members, auto& tiles,
                                                                  const float* reliable, auto& targets) {
    if (!members) return;
    total += members;
    for (int v = 0; v < count; v += kLanes)
      for (int n = 0; n < 2; ++n) {
        Vec z[kMaxClasses], e[kMaxClasses], highest, own = {}, target = load(targets[n] + v);
        for (int c = 0; c < classes; ++c) {
          z[c] = load(tiles[n] + c * kTile + v);
          own = select(target == float(c), z[c], own);
        }
        Vec sum_e = exp_shifted(z, classes, e, highest);
        ce[n] += select(load(reliable + v) > 0.f, log(sum_e) + highest - own, Vec{});
      }
  });
  return {{sum(ce[0]), sum(ce[1])}, total};
}

template <int kClasses>
void gradient_of_chunk(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other, const float scale[2],
                       const VoxelMap& grad_a, const VoxelMap& grad_b, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(a.channels);
  for_each_reliable_tile<kClasses>(a, b, state, other, chunk, [&](int64_t volume, int64_t first, int count, int members,
                                                                  auto& tiles, const float* reliable, auto& targets) {
    for (int n = 0; n < 2; ++n)
      for (int v = 0; v < count; v += kLanes) {
        Vec z[kMaxClasses], e[kMaxClasses], highest, target = load(targets[n] + v);
        if (!members || scale[n] == 0.f) {
          for (int c = 0; c < classes; ++c) store(tiles[n] + c * kTile + v, Vec{});
          continue;
        }
        for (int c = 0; c < classes; ++c) z[c] = load(tiles[n] + c * kTile + v);
        Vec inverse = 1.f / exp_shifted(z, classes, e, highest);
        for (int c = 0; c < classes; ++c) {
          Vec grad = scale[n] * (e[c] * inverse - select(target == float(c), splat(1.f), Vec{}));
          store(tiles[n] + c * kTile + v, select(load(reliable + v) > 0.f, grad, Vec{}));
        }
      }
    store_tile(grad_a, volume, first, count, tiles[0]);
    store_tile(grad_b, volume, first, count, tiles[1]);
  });
}

}  // namespace

PseudoSums pseudo_supervised(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other) {
  std::vector<PseudoSums> partial(chunks_of(a.volumes, a.voxels));
  parallel(int64_t(partial.size()), [&](int64_t chunk) {
    with_classes(a.channels, [&](auto n) { partial[chunk] = sums_of_chunk<n>(a, b, state, other, chunk); });
  });
  PseudoSums out{{0, 0}, 0};
  for (const PseudoSums& p : partial) {
    out.ce[0] += p.ce[0];
    out.ce[1] += p.ce[1];
    out.reliable += p.reliable;
  }
  return out;
}

void pseudo_supervised_backward(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other, const float scale[2],
                                const VoxelMap& grad_a, const VoxelMap& grad_b) {
  parallel(chunks_of(a.volumes, a.voxels), [&](int64_t chunk) {
    with_classes(a.channels, [&](auto n) { gradient_of_chunk<n>(a, b, state, other, scale, grad_a, grad_b, chunk); });
  });
}

}  // namespace sslfast
