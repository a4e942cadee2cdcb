// Cross-entropy, Dice and discrepancy loss of both networks on the labelled volumes.
//
// Forward: one pass over both logits and the labels; every term is a ratio of sums, so only sums leave the pass.
// Backward: one more pass, which computes the softmax again instead of keeping it, and writes both gradients.
// Bytes a voxel for C classes of s bytes: forward 2 C s + label, backward 4 C s + label.
#include <limits>

#include "kernels.h"
#include "../voxel_math.h"

namespace sslfast {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

// Labels of a tile as floats, -1 where nobody annotated, the label is out of range or the tile has ended.
struct LabelReader {
  Labels labels;
  int64_t ignore;
  int classes;

  int64_t at(int64_t i) const {
    switch (labels.bytes) {
      case 8: return static_cast<const int64_t*>(labels.data)[i];
      case 4: return static_cast<const int32_t*>(labels.data)[i];
      case 2: return static_cast<const int16_t*>(labels.data)[i];
      default: return labels.is_signed ? static_cast<const int8_t*>(labels.data)[i] : static_cast<const uint8_t*>(labels.data)[i];
    }
  }

  template <class T>
  void read(int64_t first, int count, float* y, int64_t& outside, int64_t& first_outside) const {
    const T* from = static_cast<const T*>(labels.data) + first;
    const T last = T(classes - 1), unnamed = T(ignore) == ignore ? T(ignore) : T(classes);  // no unsigned label is -1
    for (int v = 0; v < count; ++v) {
      const T label = from[v];
      y[v] = (label >= 0) & (label <= last) & (label != unnamed) ? float(int32_t(label)) : -1.f;
    }
    std::fill(y + count, y + kTile, -1.f);
    T bad = 0;
    for (int v = 0; v < count; ++v) bad |= T(((from[v] < 0) | (from[v] > last)) & (from[v] != unnamed));
    if (!bad) return;
    for (int v = count - 1; v >= 0; --v)
      if (from[v] != ignore && (from[v] < 0 || from[v] >= classes)) {
        ++outside;
        first_outside = std::min(first_outside, first + v);
      }
  }

  void operator()(int64_t first, int count, float* y, int64_t& outside, int64_t& first_outside) const {
    switch (labels.bytes) {
      case 8: return read<int64_t>(first, count, y, outside, first_outside);
      case 4: return read<int32_t>(first, count, y, outside, first_outside);
      case 2: return read<int16_t>(first, count, y, outside, first_outside);
      default: return labels.is_signed ? read<int8_t>(first, count, y, outside, first_outside)
                                       : read<uint8_t>(first, count, y, outside, first_outside);
    }
  }
};

// Softmax of 16 voxels and their confident foreground class: the argmax where that is no background and at least as
// probable as the threshold, else 0.
struct Voxels {
  Vec z[kMaxClasses], p[kMaxClasses], log_total, highest, confident;
};

inline __attribute__((always_inline)) void describe(const float* tile, int classes, float threshold, Voxels& out) {
  for (int c = 0; c < classes; ++c) out.z[c] = load(tile + c * kTile);
  Vec total = exp_shifted(out.z, classes, out.p, out.highest);
  Vec inverse = 1.f / total;
  for (int c = 0; c < classes; ++c) out.p[c] = out.p[c] * inverse;
  out.log_total = log(total);
  out.confident = select(inverse >= threshold, argmax(out.z, classes), Vec{});
}

struct Partial {
  double ce[2] = {}, discrepancy[2] = {};
  double overlap[2][kMaxClasses] = {}, square[2][kMaxClasses] = {};
  int64_t size[kMaxClasses] = {};
  int64_t mask = 0, outside = 0, first_outside = kNone;
};

template <int kClasses>
Partial sums_of_chunk(const VoxelMap& a, const VoxelMap& b, const LabelReader& read_labels, float threshold, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(a.channels);
  alignas(64) float tiles[2][kMaxClasses * kTile], y[kTile];
  Vec ce[2] = {}, discrepancy[2] = {}, mask_lanes = {};
  Vec overlap[2][kMaxClasses] = {}, square[2][kMaxClasses] = {}, size[kMaxClasses] = {};
  Partial out;
  for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
    load_tile(a, volume, first, count, tiles[0]);
    load_tile(b, volume, first, count, tiles[1]);
    read_labels(volume * a.voxels + first, count, y, out.outside, out.first_outside);
    for (int v = 0; v < count; v += kLanes) {
      Vec label = load(y + v);
      Mask annotated = label >= 0.f;
      Voxels voxels[2];
      Vec wrong[2] = {};
      for (int n = 0; n < 2; ++n) {
        describe(tiles[n] + v, classes, threshold, voxels[n]);
        Vec own = {};
        for (int c = 0; c < classes; ++c) {
          Vec p = voxels[n].p[c];
          Mask here = label == float(c);
          own = select(here, voxels[n].z[c], own);
          overlap[n][c] += select(here, p, Vec{});
          square[n][c] += select(annotated, p * p, Vec{});
          Vec off = p - select(here, splat(1.f), Vec{});
          wrong[n] += off * off;
        }
        ce[n] += select(annotated, voxels[n].log_total + voxels[n].highest - own, Vec{});
      }
      for (int c = 0; c < classes; ++c) size[c] += select(label == float(c), splat(1.f), Vec{});
      Mask mask = annotated & (voxels[0].confident != voxels[1].confident);
      mask_lanes += select(mask, splat(1.f), Vec{});
      for (int n = 0; n < 2; ++n) discrepancy[n] += select(mask, 0.5f * wrong[n], Vec{});
    }
  });
  for (int n = 0; n < 2; ++n) {
    out.ce[n] = sum(ce[n]);
    out.discrepancy[n] = sum(discrepancy[n]);
    for (int c = 0; c < classes; ++c) {
      out.overlap[n][c] = sum(overlap[n][c]);
      out.square[n][c] = sum(square[n][c]);
    }
  }
  for (int c = 0; c < classes; ++c) out.size[c] = int64_t(sum(size[c]));
  out.mask = int64_t(sum(mask_lanes));
  return out;
}

template <int kClasses>
void gradient_of_chunk(const VoxelMap& a, const VoxelMap& b, const LabelReader& read_labels, float threshold,
                       const SupervisedGradient& g, const VoxelMap& grad_a, const VoxelMap& grad_b, int64_t chunk) {
  const int classes = kClasses ? kClasses : int(a.channels);
  alignas(64) float tiles[2][kMaxClasses * kTile], y[kTile];
  int64_t outside = 0, first_outside = kNone;
  for_each_tile(chunk, a.voxels, [&](int64_t volume, int64_t first, int count) {
    load_tile(a, volume, first, count, tiles[0]);
    load_tile(b, volume, first, count, tiles[1]);
    read_labels(volume * a.voxels + first, count, y, outside, first_outside);
    for (int v = 0; v < count; v += kLanes) {
      Vec label = load(y + v);
      Mask annotated = label >= 0.f;
      Voxels voxels[2];
      for (int n = 0; n < 2; ++n) describe(tiles[n] + v, classes, threshold, voxels[n]);
      Mask mask = annotated & (voxels[0].confident != voxels[1].confident);
      for (int n = 0; n < 2; ++n) {
        // dL/dz = p (G - sum p G) + ce (p - onehot) with G = dL/dp of Dice and discrepancy
        const Vec* p = voxels[n].p;
        Vec on_mask = select(mask, splat(g.discrepancy[n]), Vec{});
        Vec grad_p[kMaxClasses], mean = {};
        for (int c = 0; c < classes; ++c) {
          Mask here = label == float(c);
          Vec onehot = select(here, splat(1.f), Vec{});
          grad_p[c] = g.linear[n * classes + c] * onehot + g.square[n * classes + c] * p[c] + on_mask * (p[c] - onehot);
          mean += p[c] * grad_p[c];
        }
        for (int c = 0; c < classes; ++c) {
          Vec onehot = select(label == float(c), splat(1.f), Vec{});
          Vec grad = p[c] * (grad_p[c] - mean) + g.ce[n] * (p[c] - onehot);
          store(tiles[n] + c * kTile + v, select(annotated, grad, Vec{}));
        }
      }
    }
    store_tile(grad_a, volume, first, count, tiles[0]);
    store_tile(grad_b, volume, first, count, tiles[1]);
  });
}

}  // namespace

SupervisedSums dual_supervised(const VoxelMap& a, const VoxelMap& b, Labels labels, float threshold, int64_t ignore) {
  const int classes = int(a.channels);
  LabelReader read_labels{labels, ignore, classes};
  std::vector<Partial> partial(chunks_of(a.volumes, a.voxels));
  parallel(int64_t(partial.size()), [&](int64_t chunk) {
    with_classes(classes, [&](auto n) { partial[chunk] = sums_of_chunk<n>(a, b, read_labels, threshold, chunk); });
  });
  SupervisedSums out{std::vector<int64_t>(classes), 0, 0, std::vector<double>(2), std::vector<double>(2),
                     std::vector<double>(2 * classes), std::vector<double>(2 * classes), 0, 0, 0};
  int64_t first_outside = kNone;
  for (const Partial& p : partial) {
    for (int n = 0; n < 2; ++n) {
      out.ce[n] += p.ce[n];
      out.discrepancy[n] += p.discrepancy[n];
      for (int c = 0; c < classes; ++c) {
        out.overlap[n * classes + c] += p.overlap[n][c];
        out.square[n * classes + c] += p.square[n][c];
      }
    }
    for (int c = 0; c < classes; ++c) out.size[c] += p.size[c], out.annotated += p.size[c];
    out.mask += p.mask;
    out.outside += p.outside;
    first_outside = std::min(first_outside, p.first_outside);
  }
  if (out.outside) {
    out.first_outside = first_outside;
    out.value_outside = read_labels.at(first_outside);
  }
  return out;
}

void dual_supervised_backward(const VoxelMap& a, const VoxelMap& b, Labels labels, float threshold, int64_t ignore,
                              const SupervisedGradient& gradient, const VoxelMap& grad_a, const VoxelMap& grad_b) {
  LabelReader read_labels{labels, ignore, int(a.channels)};
  parallel(chunks_of(a.volumes, a.voxels), [&](int64_t chunk) {
    with_classes(a.channels, [&](auto n) {
      gradient_of_chunk<n>(a, b, read_labels, threshold, gradient, grad_a, grad_b, chunk);
    });
  });
}

}  // namespace sslfast
