// Cross-entropy and Dice of both networks against the pseudo-labels of the reliable voxels. Tiles without one are not read.
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

struct Partial {
  int64_t reliable = 0;
  double ce[2] = {};
  double size[2][kMaxClasses] = {}, overlap[2][kMaxClasses] = {}, square[2][kMaxClasses] = {};
};

template <int kClasses>
Partial sums_of_chunk(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(a.channels);
  Vec ce[2] = {}, size[2][kMaxClasses] = {}, overlap[2][kMaxClasses] = {}, square[2][kMaxClasses] = {};
  Partial out;
  for_each_reliable_tile<kClasses>(a, b, state, other, chunk, [&](int64_t, int64_t, int count, int members, auto& tiles,
                                                                  const float* reliable, auto& targets) {
    if (!members) return;
    out.reliable += members;
    for (int v = 0; v < count; v += kLanes) {
      Mask counts = load(reliable + v) > 0.f;
      for (int n = 0; n < 2; ++n) {
        Vec z[kMaxClasses], e[kMaxClasses], highest, own = {}, target = select(counts, load(targets[n] + v), splat(-1.f));
        for (int c = 0; c < classes; ++c) z[c] = load(tiles[n] + c * kTile + v);
        Vec sum_e = exp_shifted(z, classes, e, highest);
        Vec inverse = 1.f / sum_e;
        for (int c = 0; c < classes; ++c) {
          Mask here = target == float(c);
          Vec p = e[c] * inverse;
          own = select(here, z[c], own);
          size[n][c] += select(here, splat(1.f), Vec{});
          overlap[n][c] += select(here, p, Vec{});
          square[n][c] += select(counts, p * p, Vec{});
        }
        ce[n] += select(counts, log(sum_e) + highest - own, Vec{});
      }
    }
  });
  for (int n = 0; n < 2; ++n) {
    out.ce[n] = sum(ce[n]);
    for (int c = 0; c < classes; ++c) {
      out.size[n][c] = sum(size[n][c]);
      out.overlap[n][c] = sum(overlap[n][c]);
      out.square[n][c] = sum(square[n][c]);
    }
  }
  return out;
}

template <int kClasses>
void gradient_of_chunk(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other, const PseudoGradient& g,
                       const VoxelMap& grad_a, const VoxelMap& grad_b, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(a.channels);
  bool learns[2] = {g.ce[0] != 0.f, g.ce[1] != 0.f};
  for (int n = 0; n < 2; ++n)
    for (int c = 0; c < classes; ++c) learns[n] |= g.linear[n * classes + c] != 0.f;
  for_each_reliable_tile<kClasses>(a, b, state, other, chunk, [&](int64_t volume, int64_t first, int count, int members,
                                                                  auto& tiles, const float* reliable, auto& targets) {
    for (int n = 0; n < 2; ++n)
      for (int v = 0; v < count; v += kLanes) {
        Vec z[kMaxClasses], p[kMaxClasses], grad_p[kMaxClasses], highest, mean = {}, target = load(targets[n] + v);
        if (!members || !learns[n]) {
          for (int c = 0; c < classes; ++c) store(tiles[n] + c * kTile + v, Vec{});
          continue;
        }
        for (int c = 0; c < classes; ++c) z[c] = load(tiles[n] + c * kTile + v);
        Vec inverse = 1.f / exp_shifted(z, classes, p, highest);
        // dL/dz = p (G - sum p G) + ce (p - onehot) with G = dL/dp of Dice
        for (int c = 0; c < classes; ++c) {
          p[c] = p[c] * inverse;
          Vec taught = select(target == float(c), splat(g.linear[n * classes + c]), Vec{});
          grad_p[c] = taught + g.square[n * classes + c] * p[c];
          mean += p[c] * grad_p[c];
        }
        for (int c = 0; c < classes; ++c) {
          Vec onehot = select(target == float(c), splat(1.f), Vec{});
          Vec grad = p[c] * (grad_p[c] - mean) + g.ce[n] * (p[c] - onehot);
          store(tiles[n] + c * kTile + v, select(load(reliable + v) > 0.f, grad, Vec{}));
        }
      }
    store_tile(grad_a, volume, first, count, tiles[0]);
    store_tile(grad_b, volume, first, count, tiles[1]);
  });
}

}  // namespace

PseudoSums pseudo_supervised(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other) {
  const int classes = int(a.channels);
  std::vector<Partial> partial(chunks_of(a.volumes, a.voxels));
  parallel(int64_t(partial.size()), [&](int64_t chunk) {
    with_classes(classes, [&](auto n) { partial[chunk] = sums_of_chunk<n>(a, b, state, other, chunk); });
  });
  const std::vector<double> zeros(2 * classes);
  PseudoSums out{0, {0, 0}, zeros, zeros, zeros};
  for (const Partial& p : partial) {
    out.reliable += p.reliable;
    for (int n = 0; n < 2; ++n) {
      out.ce[n] += p.ce[n];
      for (int c = 0; c < classes; ++c) {
        out.size[n * classes + c] += p.size[n][c];
        out.overlap[n * classes + c] += p.overlap[n][c];
        out.square[n * classes + c] += p.square[n][c];
      }
    }
  }
  return out;
}

void pseudo_supervised_backward(const VoxelMap& a, const VoxelMap& b, const uint8_t* state, bool other,
                                const PseudoGradient& gradient, const VoxelMap& grad_a, const VoxelMap& grad_b) {
  parallel(chunks_of(a.volumes, a.voxels), [&](int64_t chunk) {
    with_classes(a.channels, [&](auto n) { gradient_of_chunk<n>(a, b, state, other, gradient, grad_a, grad_b, chunk); });
  });
}

}  // namespace sslfast
