// 16 floats as one value. The compiler maps it to whatever registers the build's instruction set has; since the lanes are
// always 16, sums come out with the same bits on every one of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace sslfast {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));  // 0 or -1 a lane
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

inline __attribute__((always_inline)) Vec splat(float x) { return Vec{} + x; }
inline __attribute__((always_inline)) Vec select(Mask mask, Vec a, Vec b) { return mask ? a : b; }

inline __attribute__((always_inline)) Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline __attribute__((always_inline)) void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// True if a lane is not 0.
template <class V>
inline __attribute__((always_inline)) bool any(V v) {
  uint64_t parts[sizeof(V) / 8], found = 0;
  std::memcpy(parts, &v, sizeof v);
  for (uint64_t part : parts) found |= part;
  return found != 0;
}

// Both halves of the 64-bit products of 16 words and a constant.
inline __attribute__((always_inline)) void multiply(Words x, uint32_t factor, Words& high, Words& low) {
#if defined(__AVX512F__)
  const __m512i a = (__m512i)x, m = _mm512_set1_epi32(int(factor));
  const __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  high = (Words)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = (Words)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i m = _mm256_set1_epi32(int(factor));
  __m256i part[2], up[2], down[2];
  std::memcpy(part, &x, sizeof x);
  for (int i = 0; i < 2; ++i) {
    const __m256i even = _mm256_mul_epu32(part[i], m), odd = _mm256_mul_epu32(_mm256_srli_epi64(part[i], 32), m);
    up[i] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    down[i] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  std::memcpy(&high, up, sizeof high);
  std::memcpy(&low, down, sizeof low);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t(x[i]) * factor;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

// a b + c, rounded once where the hardware can.
inline __attribute__((always_inline)) Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; ++i) x[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&a, x, sizeof a);
  return a;
#else
  return a * b + c;
#endif
}

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
  Vec shifted = multiply_add(bounded, splat(1.44269504f), splat(magic));
  Vec n = shifted - magic;
  Vec r = multiply_add(n, splat(-1.42860677e-6f), multiply_add(n, splat(-0.693145752f), bounded));
  Vec p = splat(1.f / 5040);
  p = multiply_add(p, r, splat(1.f / 720));
  p = multiply_add(p, r, splat(1.f / 120));
  p = multiply_add(p, r, splat(1.f / 24));
  p = multiply_add(p, r, splat(1.f / 6));
  p = multiply_add(p, r, splat(0.5f));
  p = multiply_add(p, r, splat(1.f));
  p = multiply_add(p, r, splat(1.f));
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
  p = multiply_add(p, s2, splat(1.f / 7));
  p = multiply_add(p, s2, splat(1.f / 5));
  p = multiply_add(p, s2, splat(1.f / 3));
  Vec log_m = multiply_add(2.f * s * s2, p, 2.f * s);
  Vec n_float = __builtin_convertvector(n, Vec);
  return multiply_add(n_float, splat(0.693145752f), multiply_add(n_float, splat(1.42860677e-6f), log_m)) + (x - x);
}

}  // namespace sslfast
