// 16 floats as one value. The compiler maps it to whatever registers the build's instruction set has; since the lanes are
// always 16, sums come out with the same bits on every one of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace sslfast {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));  // 0 or -1 a lane

inline __attribute__((always_inline)) Vec splat(float x) { return Vec{} + x; }
inline __attribute__((always_inline)) Vec select(Mask mask, Vec a, Vec b) { return mask ? a : b; }

inline __attribute__((always_inline)) Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline __attribute__((always_inline)) void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The lanes added up in double, always in the same order.
inline double sum(Vec v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// e^x to 1 ulp or so for x <= 88; 0 below -87. x = n ln 2 + r, then a Taylor polynomial in |r| <= 0.35, error below 6e-9.
inline __attribute__((always_inline)) Vec exp(Vec x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Mask under = x < -87.f;
  Vec bounded = select(under, splat(-87.f), x);
  Vec shifted = bounded * 1.44269504f + magic;
  Vec n = shifted - magic;
  Vec r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
  Vec p = splat(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  Mask exponent = ((Mask)shifted - (int32_t)0x4B400000) << 23;  // the bits of 1.5 * 2^23 taken off leave n
  Vec scaled = (Vec)((Mask)p + exponent);
  scaled = select(x == x, scaled, x);  // the integer addition above would hide a NaN
  return select(under, Vec{}, scaled);
}

// log x for normal x > 0; NaN for NaN and infinity. x = 2^n m with m in [0.7, 1.4], then log m = 2 artanh((m - 1) / (m + 1)).
inline __attribute__((always_inline)) Vec log(Vec x) {
  Mask bits = (Mask)x;
  Mask n = (bits - 0x3F3504F3) >> 23;  // the bits of sqrt(1/2)
  Vec m = (Vec)(bits - (n << 23));
  Vec s = (m - 1.f) / (m + 1.f);
  Vec s2 = s * s;
  Vec p = splat(1.f / 9);
  p = p * s2 + 1.f / 7;
  p = p * s2 + 1.f / 5;
  p = p * s2 + 1.f / 3;
  Vec log_m = 2.f * s + 2.f * s * s2 * p;
  Vec n_float = __builtin_convertvector(n, Vec);
  return n_float * 0.693145752f + (log_m + n_float * 1.42860677e-6f) + (x - x);
}

}  // namespace sslfast
