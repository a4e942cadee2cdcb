// The mathematics of one voxel, written once for every device. F is a float on the GPU and 16 floats on the CPU; no
// branch depends on its value. F has arithmetic, comparisons, select(mask, a, b), exp, log and inverse_root. W is a
// 32-bit word or 16 of them; multiply gives both halves of a 64-bit product. cpu/vec.h or cuda/voxels.cuh defines these
// and must be included first.
#pragma once

#include <type_traits>

#include "arguments.h"

// Loop over the classes from `first` on. On a GPU it must unroll: registers cannot be indexed.
#ifdef FOR_CLASSES_UNROLLED
#define FOR_CLASSES(c, first, most, classes) _Pragma("unroll") for (int c = first; c < most; ++c) if (c < classes)
#else
#define FOR_CLASSES(c, first, most, classes) for (int c = first; c < classes; ++c)
#endif

namespace sslfast {

// Calls body(n), where n is the number of classes as a constant if it is 2, 3 or 4, so that loops over them unroll;
// n is 0 for any other number.
template <class Body>
void with_classes(int64_t classes, const Body& body) {
  switch (classes) {
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    default:
      return body(std::integral_constant<int, 0>());
  }
}

// e[c] = exp(z[c] - max z). Returns the sum of e, NaN for NaN or infinite logits; softmax is e / sum. e must not be z.
// kClassCapacity must be at least the number of classes.
template <int kClassCapacity = kMaxClasses, class F>
VOXEL_FN F exp_shifted(const F* z, int classes, F* e, F& highest) {
  highest = z[0];
  FOR_CLASSES(c, 1, kClassCapacity, classes) highest = select(z[c] > highest, z[c], highest);
  if (classes == 2) {  // one of the two is exp(0): the same bits at half the cost
    F lower = exp(select(z[1] > z[0], z[0] - z[1], z[1] - z[0]));
    F one = z[0] * 0.f + 1.f;
    e[0] = select(z[1] > z[0], lower, one);
    e[1] = select(z[1] > z[0], one, lower);
    return lower + one + (z[0] + z[1]) * 0.f;
  }
  F total = z[0] * 0.f;
  FOR_CLASSES(c, 0, kClassCapacity, classes) {
    e[c] = exp(z[c] - highest);
    total = total + e[c] + z[c] * 0.f;
  }
  return total;
}

// argmax z as a float; the lowest class in a tie.
template <int kClassCapacity = kMaxClasses, class F>
VOXEL_FN F argmax(const F* z, int classes) {
  F highest = z[0];
  F winner = z[0] - z[0];
  FOR_CLASSES(c, 1, kClassCapacity, classes) {
    auto higher = z[c] > highest;
    winner = select(higher, winner * 0.f + float(c), winner);
    highest = select(higher, z[c], highest);
  }
  return winner;
}

// Entropy H = log sum e - sum e (z - max z) / sum e in nats, from the results of exp_shifted; large logits cost no
// precision. NaN for NaN or infinite logits; rounding cannot make it negative.
template <int kClassCapacity = kMaxClasses, class F>
VOXEL_FN F entropy(const F* z, int classes, const F* e, F highest, F total) {
  F weighted = z[0] * 0.f;
  FOR_CLASSES(c, 0, kClassCapacity, classes) weighted = weighted + e[c] * (z[c] - highest);
  F h = log(total) - weighted / total;
  return select(h <= 0.f, h * 0.f, h);
}

// Softmax p of a voxel's logits, log p = shifted - log_total, the argmax and its probability. p and the probability are
// NaN for NaN or infinite logits.
template <int kClassCapacity, class F>
struct Prediction {
  F p[kClassCapacity], shifted[kClassCapacity], log_total, confidence, label;

  VOXEL_FN Prediction(const F (&z)[kClassCapacity], int classes) {
    F highest;
    const F total = exp_shifted<kClassCapacity>(z, classes, p, highest);
    confidence = 1.f / total;
    log_total = log(total);
    FOR_CLASSES(c, 0, kClassCapacity, classes) {
      shifted[c] = z[c] - highest;
      p[c] = p[c] * confidence;
    }
    label = argmax<kClassCapacity>(shifted, classes);
  }

  VOXEL_FN F log_p(int c) const { return shifted[c] - log_total; }

  VOXEL_FN F entropy(int classes) const {
    F along = {};
    FOR_CLASSES(c, 0, kClassCapacity, classes) along = along + p[c] * shifted[c];
    return log_total - along;
  }
};

// Priority of a voxel in a draw: first word of Philox4x32-10 (Salmon et al., SC 2011), counter (voxel, step, stream).
template <class W>
VOXEL_FN W voxel_priority(W voxel_low, W voxel_high, uint64_t seed, uint32_t step, uint32_t stream) {
  W x0 = voxel_low, x1 = voxel_high, x2 = voxel_low * 0 + step, x3 = voxel_low * 0 + stream;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    multiply(x0, 0xD2511F53u, high0, low0);
    multiply(x2, 0xCD9E8D57u, high1, low1);
    x0 = high1 ^ x1 ^ key0;
    x1 = low1;
    x2 = high0 ^ x3 ^ key1;
    x3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x0;
}

}  // namespace sslfast
