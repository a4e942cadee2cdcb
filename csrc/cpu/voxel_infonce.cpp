// InfoNCE, class by class. The keys of a class, all prototypes and its negatives, are transposed in a small matrix
// [K, P], so that 16 similarities are computed at once; only the log-sum-exp is kept.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "../voxel_math.h"

namespace sslfast {
namespace {

constexpr int64_t kNone = -1;

// u = v / |v|; returns 1 / |v|. Both are 0 for a vector shorter than 1e-12.
float unit(const float* v, int64_t width, float* u) {
  float square = 0;
  for (int64_t k = 0; k < width; ++k) square += v[k] * v[k];
  float length = std::sqrt(square), inverse = length < 1e-12f ? 0.f : 1.f / length;
  for (int64_t k = 0; k < width; ++k) u[k] = v[k] * inverse;
  return inverse;
}

// dv = (du - u (u . du)) / |v|, in place.
void unit_backward(const float* v, int64_t width, float* grad) {
  std::vector<float> u(width);
  float inverse = unit(v, width, u.data()), along = 0;
  for (int64_t k = 0; k < width; ++k) along += u[k] * grad[k];
  for (int64_t k = 0; k < width; ++k) grad[k] = inverse * (grad[k] - u[k] * along);
}

// The keys of one class: first the prototypes that exist, then the negatives.
struct Keys {
  int64_t width, prototypes = 0, count, padded, positive = kNone;  // positive: index of the class's own prototype
  std::vector<int64_t> prototype_class;
  std::vector<float> matrix;  // [K, padded]

  Keys(const Contrast& c, int64_t t) : width(c.width) {
    for (int64_t p = 0; p < c.classes; ++p)
      if (c.prototype_counts[p] > 0) {
        if (p == t) positive = prototypes;
        prototype_class.push_back(p);
        ++prototypes;
      }
    count = prototypes + rows_of(c.negative_counts[t], c.negatives);
    padded = (count + kLanes - 1) / kLanes * kLanes;
    matrix.assign(width * padded, 0.f);
    std::vector<float> u(width);
    for (int64_t j = 0; j < count; ++j) {
      unit(j < prototypes ? c.prototype + prototype_class[j] * width
                          : c.negative + (t * c.negatives + j - prototypes) * width,
           width, u.data());
      for (int64_t k = 0; k < width; ++k) matrix[k * padded + j] = u[k];
    }
  }

  // g . key / T for every key; -inf beyond the last.
  void similarities(const float* g, float temperature, float* out) const {
    for (int64_t j = 0; j < padded; j += kLanes) {
      Vec total = {};
      for (int64_t k = 0; k < width; ++k) total += g[k] * load(&matrix[k * padded + j]);
      store(out + j, total / temperature);
    }
    std::fill(out + count, out + padded, -std::numeric_limits<float>::infinity());
  }
};

float log_sum_exp(const float* values, int64_t padded) {
  float highest = values[0];
  for (int64_t j = 1; j < padded; ++j) highest = values[j] > highest ? values[j] : highest;
  Vec total = {};
  for (int64_t j = 0; j < padded; j += kLanes) total += exp(load(values + j) - highest);
  return highest + float(std::log(sum(total)));
}

}  // namespace

void voxel_infonce(const Contrast& c, double* sums, float* lse) {
  std::fill(lse, lse + c.classes * c.anchors, 0.f);
  std::vector<double> loss(c.classes);
  parallel(c.classes, [&](int64_t t) {
    const int64_t anchors = rows_of(c.anchor_counts[t], c.anchors);
    if (c.prototype_counts[t] <= 0 || anchors == 0) return;
    Keys keys(c, t);
    std::vector<float> g(c.width), similarity(keys.padded);
    for (int64_t i = 0; i < anchors; ++i) {
      unit(c.anchor + (t * c.anchors + i) * c.width, c.width, g.data());
      keys.similarities(g.data(), c.temperature, similarity.data());
      float positive = similarity[keys.positive], all = log_sum_exp(similarity.data(), keys.padded);
      lse[t * c.anchors + i] = all;
      loss[t] += double(all) - positive;
    }
  });
  sums[0] = sums[1] = 0;
  for (int64_t t = 0; t < c.classes; ++t) {
    const bool fits = is_count(c.anchor_counts[t], c.anchors) && is_count(c.negative_counts[t], c.negatives);
    sums[0] += fits ? loss[t] : NAN;
    sums[1] += c.prototype_counts[t] > 0 ? double(rows_of(c.anchor_counts[t], c.anchors)) : 0.0;
  }
}

void voxel_infonce_backward(const Contrast& c, const float* lse, float grad, float* grad_anchor) {
  const int64_t K = c.width;
  const float scale = grad / c.temperature;
  std::fill(grad_anchor, grad_anchor + c.classes * c.anchors * K, 0.f);
  parallel(c.classes, [&](int64_t t) {
    const int64_t anchors = rows_of(c.anchor_counts[t], c.anchors);
    if (c.prototype_counts[t] <= 0 || anchors == 0) return;
    Keys keys(c, t);
    std::vector<float> g(K), weight(keys.padded);
    for (int64_t i = 0; i < anchors; ++i) {
      const float* anchor = c.anchor + (t * c.anchors + i) * K;
      unit(anchor, K, g.data());
      keys.similarities(g.data(), c.temperature, weight.data());
      const float all = lse[t * c.anchors + i];
      for (int64_t j = 0; j < keys.padded; j += kLanes) store(&weight[j], scale * exp(load(&weight[j]) - all));
      weight[keys.positive] -= scale;
      float* out = grad_anchor + (t * c.anchors + i) * K;
      for (int64_t k = 0; k < K; ++k) {
        Vec total = {};
        for (int64_t j = 0; j < keys.padded; j += kLanes)
          total += load(&weight[j]) * load(&keys.matrix[k * keys.padded + j]);
        out[k] = float(sum(total));
      }
      unit_backward(anchor, K, out);
    }
  });
}

}  // namespace sslfast
