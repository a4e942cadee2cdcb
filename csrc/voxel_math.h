// The mathematics of one voxel, written once. F is a float on the GPU and 16 floats on the CPU; every function is
// branch-free, so that all lanes compute alike. F has arithmetic, comparisons, select(mask, a, b), exp, log and
// inverse_root; W is a 32-bit word or 16 of them, and multiply gives both halves of their 64-bit product. Before this
// file comes the one that defines them: cpu/vec.h or cuda/voxels.cuh.
#pragma once

#include <type_traits>

#include "arguments.h"

// The statement that follows, for each class from `first` on. A GPU's registers have no address, so there the loop
// unrolls.
#ifdef FOR_CLASSES_UNROLLED
#define FOR_CLASSES(c, first, most, classes) _Pragma("unroll") for (int c = first; c < most; ++c) if (c < classes)
#else
#define FOR_CLASSES(c, first, most, classes) for (int c = first; c < classes; ++c)
#endif

namespace sslfast {

// body(n) with the number of classes as a constant where it is common, so that the loops over them unroll; 0: any
// number.
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

// e[c] = exp(z[c] - max z); returns their sum, so that softmax is e / sum: NaN for NaN or infinite logits. e may not be
// z. kClassCapacity: no fewer than the classes.
template <int kClassCapacity = kMaxClasses, class F>
VOXEL_FN F exp_shifted(const F* z, int classes, F* e, F& highest) {
  highest = z[0];
  FOR_CLASSES(c, 1, kClassCapacity, classes) highest = select(z[c] > highest, z[c], highest);
  if (classes == 2) {  // one of the two is exp(0): the same bits with half the work
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

// argmax z, the lowest class where several share it, as a float.
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

// H = log sum e - sum e (z - max z) / sum e in nats, of what exp_shifted gave; exact however large the logits are. NaN
// for NaN or infinite logits; rounding never leaves it below 0.
template <int kClassCapacity = kMaxClasses, class F>
VOXEL_FN F entropy(const F* z, int classes, const F* e, F highest, F total) {
  F weighted = z[0] * 0.f;
  FOR_CLASSES(c, 0, kClassCapacity, classes) weighted = weighted + e[c] * (z[c] - highest);
  F h = log(total) - weighted / total;
  return select(h <= 0.f, h * 0.f, h);
}

// Softmax p of a voxel's logits, log p = shifted - log_total, the argmax and its probability. NaN for NaN or infinite
// logits.
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

// First word of Philox4x32-10 (Salmon et al., SC 2011) for counter (voxel, step, stream): the voxel's priority in a
// draw.
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
