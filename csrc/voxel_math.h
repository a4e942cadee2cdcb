// The mathematics of one voxel, written once. F is a float on the GPU and 16 floats on the CPU; every function is
// branch-free, so that all lanes compute alike. F has arithmetic, comparisons, select(mask, a, b), exp and log.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VOXEL_FN __host__ __device__ __forceinline__
#else
#include "cpu/vec.h"
#define VOXEL_FN inline __attribute__((always_inline))
#endif

namespace sslfast {

// The byte map (sslfast/ops/state.py)
constexpr uint8_t kClass = 0x1f;
constexpr uint8_t kReliable = 0x20;
constexpr uint8_t kDiscrepant = 0x40;
constexpr uint8_t kLoserDiffers = 0x80;

constexpr int kMaxClasses = 32;

// e[c] = exp(z[c] - max z); returns their sum, so that softmax is e / sum: NaN for NaN or infinite logits. e may not be z.
template <class F>
VOXEL_FN F exp_shifted(const F* z, int classes, F* e, F& highest) {
  highest = z[0];
  for (int c = 1; c < classes; ++c) highest = select(z[c] > highest, z[c], highest);
  F total = z[0] * 0.f;
  for (int c = 0; c < classes; ++c) {
    e[c] = exp(z[c] - highest);
    total = total + e[c] + z[c] * 0.f;
  }
  return total;
}

// argmax z, the lowest class where several share it, as a float.
template <class F>
VOXEL_FN F argmax(const F* z, int classes) {
  F highest = z[0];
  F winner = z[0] - z[0];
  for (int c = 1; c < classes; ++c) {
    auto higher = z[c] > highest;
    winner = select(higher, winner * 0.f + float(c), winner);
    highest = select(higher, z[c], highest);
  }
  return winner;
}

// H = log sum e - sum e s / sum e with s = z - max z, in nats; s stays exact however large the logits are.
// NaN for NaN or infinite logits; rounding never leaves it below 0.
template <class F>
VOXEL_FN F entropy(const F* z, int classes) {
  F highest = z[0];
  for (int c = 1; c < classes; ++c) highest = select(z[c] > highest, z[c], highest);
  F total = z[0] * 0.f;
  F weighted = z[0] * 0.f;
  for (int c = 0; c < classes; ++c) {
    F shifted = z[c] - highest;
    F e = exp(shifted);
    total = total + e;
    weighted = weighted + e * shifted;
  }
  F h = log(total) - weighted / total;
  return select(h <= 0.f, h * 0.f, h);
}

// First word of Philox4x32-10 (Salmon et al., SC 2011) for counter (voxel, step, stream): the voxel's priority in a draw.
VOXEL_FN uint32_t voxel_priority(uint64_t voxel, uint64_t seed, uint32_t step, uint32_t stream) {
  uint32_t x0 = uint32_t(voxel), x1 = uint32_t(voxel >> 32), x2 = step, x3 = stream;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t product0 = uint64_t(x0) * 0xD2511F53u, product1 = uint64_t(x2) * 0xCD9E8D57u;
    x0 = uint32_t(product1 >> 32) ^ x1 ^ key0;
    x1 = uint32_t(product1);
    x2 = uint32_t(product0 >> 32) ^ x3 ^ key1;
    x3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x0;
}

}  // namespace sslfast
