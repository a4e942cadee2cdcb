// The dtypes of maps: their conversion to and from floats, one number or 16 at a time.
#pragma once

#include "../arguments.h"
#include "vec.h"

namespace sslfast {

struct F32 {
  using Element = float;
  static float to_float(float x) { return x; }
  static float from_float(float x) { return x; }
  static SSLFAST_INLINE Vec load_lanes(const float* from) { return load(from); }
  static SSLFAST_INLINE void store_lanes(float* to, Vec v) { store(to, v); }
};

struct BF16 {
  using Element = uint16_t;
  static float to_float(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static uint16_t from_float(float f) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return f == f ? uint16_t(rounded) : uint16_t(0x7FC0);
  }
  static SSLFAST_INLINE Vec load_lanes(const uint16_t* from) {
    return bits_as<Vec>(shift_left<16>(convert<uint32_t>(load(from))));
  }
  static SSLFAST_INLINE void store_lanes(uint16_t* to, Vec v) {
    store(to, convert<uint16_t>(shift_right<16>(rounded(v))));
  }
  // The bits of the nearest bfloat16, in the upper half of each word.
  static SSLFAST_INLINE Words rounded(Vec v) {
    const Words bits = bits_as<Words>(v);
    const Vec nearest = bits_as<Vec>(bits + 0x7FFFu + (shift_right<16>(bits) & 1u));
    return bits_as<Words>(select(v == v, nearest, splat(__builtin_nanf(""))));
  }
};

struct F16 {
#ifdef __F16C__
  using Element = uint16_t;
  static float to_float(uint16_t x) { return _cvtsh_ss(x); }
  static uint16_t from_float(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
  static SSLFAST_INLINE Vec load_lanes(const uint16_t* from) {
    alignas(64) float row[kLanes];
    for (int i = 0; i < kLanes; i += 8)
      _mm256_store_ps(row + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
    return load(row);
  }
  static SSLFAST_INLINE void store_lanes(uint16_t* to, Vec v) {
    alignas(64) float row[kLanes];
    store(row, v);
    for (int i = 0; i < kLanes; i += 8)
      _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_load_ps(row + i), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  using Element = _Float16;
  static float to_float(_Float16 x) { return float(x); }
  static _Float16 from_float(float x) { return _Float16(x); }
  static SSLFAST_INLINE Vec load_lanes(const _Float16* from) { return convert<float>(load(from)); }
  static SSLFAST_INLINE void store_lanes(_Float16* to, Vec v) { store(to, convert<_Float16>(v)); }
#endif
};

// Calls body(F32{}), body(BF16{}) or body(F16{}).
template <class Body>
void with_dtype(DType dtype, const Body& body) {
  if (dtype == DType::f32)
    body(F32{});
  else if (dtype == DType::bf16)
    body(BF16{});
  else
    body(F16{});
}

}  // namespace sslfast
