// Vectors of 16 numbers, in as many registers as the instruction set of the build needs. There are always 16 lanes, so
// sums have the same bits on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define SSLFAST_INLINE inline __attribute__((always_inline))

namespace sslfast {

#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

constexpr int kLanes = 16;

// Split into registers here: compilers split comparisons of vectors wider than a register into single numbers.
template <class T>
struct Lanes {
  static constexpr int kBytes = kLanes * int(sizeof(T)) < kRegister ? kLanes * int(sizeof(T)) : kRegister;
  static constexpr int kParts = kLanes * int(sizeof(T)) / kBytes;
  typedef T Part __attribute__((vector_size(kBytes)));
  Part part[kParts];

  // Copies whole registers: by default the compiler copies smaller pieces, and reading these as a whole is slow.
  Lanes() = default;
  SSLFAST_INLINE Lanes(const Lanes& other) { *this = other; }
  SSLFAST_INLINE Lanes& operator=(const Lanes& other) {
    for (int i = 0; i < kParts; ++i) part[i] = other.part[i];
    return *this;
  }

  SSLFAST_INLINE T operator[](int lane) const { return part[lane * kParts / kLanes][lane % (kLanes / kParts)]; }

#define SSLFAST_OPERATOR(op)                                             \
  friend SSLFAST_INLINE Lanes operator op(Lanes a, Lanes b) {            \
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] op b.part[i]; \
    return a;                                                            \
  }                                                                      \
  friend SSLFAST_INLINE Lanes operator op(Lanes a, T b) {                \
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] op b;         \
    return a;                                                            \
  }                                                                      \
  friend SSLFAST_INLINE Lanes operator op(T a, Lanes b) {                \
    for (int i = 0; i < kParts; ++i) b.part[i] = a op b.part[i];         \
    return b;                                                            \
  }
  SSLFAST_OPERATOR(+)
  SSLFAST_OPERATOR(-)
  SSLFAST_OPERATOR(*)
  SSLFAST_OPERATOR(/)
  SSLFAST_OPERATOR(&)
  SSLFAST_OPERATOR(|)
  SSLFAST_OPERATOR(^)
#undef SSLFAST_OPERATOR

  SSLFAST_INLINE Lanes& operator+=(Lanes b) { return *this = *this + b; }

  // A comparison gives 0 or -1 per lane.
  using Whole = Lanes<std::conditional_t<sizeof(T) == 4, int32_t, std::conditional_t<sizeof(T) == 2, int16_t, int8_t>>>;
#define SSLFAST_COMPARISON(op)                                             \
  friend SSLFAST_INLINE Whole operator op(Lanes a, Lanes b) {              \
    Whole out;                                                             \
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] op b.part[i]; \
    return out;                                                            \
  }                                                                        \
  friend SSLFAST_INLINE Whole operator op(Lanes a, T b) {                  \
    Whole out;                                                             \
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] op b;         \
    return out;                                                            \
  }
  SSLFAST_COMPARISON(==)
  SSLFAST_COMPARISON(!=)
  SSLFAST_COMPARISON(<)
  SSLFAST_COMPARISON(>)
  SSLFAST_COMPARISON(<=)
  SSLFAST_COMPARISON(>=)
#undef SSLFAST_COMPARISON
};

using Vec = Lanes<float>;
using Mask = Lanes<int32_t>;  // 0 or -1 per lane
using Words = Lanes<uint32_t>;
using Shorts = Lanes<uint16_t>;
using Bytes = Lanes<uint8_t>;

template <class T>
SSLFAST_INLINE Lanes<T> load(const T* p) {
  Lanes<T> v;
  for (auto& part : v.part) std::memcpy(&part, p + (&part - v.part) * kLanes / v.kParts, sizeof part);
  return v;
}
template <class T>
SSLFAST_INLINE void store(T* p, Lanes<T> v) {
  for (auto& part : v.part) std::memcpy(p + (&part - v.part) * kLanes / v.kParts, &part, sizeof part);
}

SSLFAST_INLINE Vec splat(float x) { return x - Vec{}; }  // x + 0 would cost an addition, as it changes x = -0

SSLFAST_INLINE Vec select(Mask mask, Vec a, Vec b) {
  for (int i = 0; i < Vec::kParts; ++i) a.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return a;
}

// Reinterprets the bits as another type of 4 bytes.
template <class To, class From>
SSLFAST_INLINE To bits_as(From v) {
  To out;
  for (int i = 0; i < To::kParts; ++i) out.part[i] = (typename To::Part)v.part[i];
  return out;
}

// Converts the values to another type, one register of the wider type at a time.
template <class To, class From>
SSLFAST_INLINE Lanes<To> convert(Lanes<From> v) {
  constexpr int kWidest = sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From), kCount = kRegister / kWidest;
  typedef From Source __attribute__((vector_size(kCount * sizeof(From))));
  typedef To Target __attribute__((vector_size(kCount * sizeof(To))));
  Lanes<To> out;
  for (int i = 0; i < kLanes / kCount; ++i) {
    Source source;
    std::memcpy(&source, reinterpret_cast<const char*>(&v) + i * sizeof source, sizeof source);
    const Target target = __builtin_convertvector(source, Target);
    std::memcpy(reinterpret_cast<char*>(&out) + i * sizeof target, &target, sizeof target);
  }
  return out;
}

// True if any lane is not 0.
template <class T>
SSLFAST_INLINE bool any(Lanes<T> v) {
  typename Lanes<T>::Part all = v.part[0];
  for (int i = 1; i < v.kParts; ++i) all |= v.part[i];
  uint64_t words[sizeof all / 8], any = 0;
  std::memcpy(words, &all, sizeof all);
  for (uint64_t word : words) any |= word;
  return any != 0;
}

template <int kBits, class T>
SSLFAST_INLINE Lanes<T> shift_left(Lanes<T> v) {
  for (auto& part : v.part) part = part << kBits;
  return v;
}
template <int kBits, class T>
SSLFAST_INLINE Lanes<T> shift_right(Lanes<T> v) {
  for (auto& part : v.part) part = part >> kBits;
  return v;
}

// Both halves of the 64-bit products of 16 words and a constant.
SSLFAST_INLINE void multiply(Words x, uint32_t factor, Words& high, Words& low) {
#if defined(__AVX512F__)
  const __m512i a = (__m512i)x.part[0], m = _mm512_set1_epi32(int(factor));
  const __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  high.part[0] = (Words::Part)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low.part[0] = (Words::Part)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i m = _mm256_set1_epi32(int(factor));
  for (int i = 0; i < Words::kParts; ++i) {
    const __m256i a = (__m256i)x.part[i];
    const __m256i even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
    high.part[i] = (Words::Part)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    low.part[i] = (Words::Part)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
#else
  uint32_t from[kLanes], up[kLanes], down[kLanes];
  store(from, x);
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t(from[i]) * factor;
    up[i] = uint32_t(product >> 32);
    down[i] = uint32_t(product);
  }
  high = load(up);
  low = load(down);
#endif
}

// a b + c, rounded once where the hardware can.
SSLFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  a.part[0] = (Vec::Part)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
  return a;
#elif defined(__FMA__)
  for (int i = 0; i < Vec::kParts; ++i)
    a.part[i] = (Vec::Part)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
  return a;
#else
  return a * b + c;
#endif
}

// A step of a transpose, for rows a and b that are kStep apart: in each group of 2 kStep lanes, exchanges the upper
// half of a with the lower half of b.
template <int kStep, int... kLane>
SSLFAST_INLINE void swap_quarters(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = kLanes / Vec::kParts;
  const Vec x = a, y = b;
  for (int i = 0; i < Vec::kParts; ++i) {
    if constexpr (kStep >= kCount) {
      constexpr int kParts = kStep / kCount;
      a.part[i] = i & kParts ? y.part[i - kParts] : x.part[i];
      b.part[i] = i & kParts ? y.part[i] : x.part[i + kParts];
    } else {
#ifdef __clang__
      a.part[i] = __builtin_shufflevector(x.part[i], y.part[i], (kLane & kStep ? kCount + kLane - kStep : kLane)...);
      b.part[i] = __builtin_shufflevector(x.part[i], y.part[i], (kLane & kStep ? kCount + kLane : kLane + kStep)...);
#else
      a.part[i] =
          __builtin_shuffle(x.part[i], y.part[i], Mask::Part{(kLane & kStep ? kCount + kLane - kStep : kLane)...});
      b.part[i] =
          __builtin_shuffle(x.part[i], y.part[i], Mask::Part{(kLane & kStep ? kCount + kLane : kLane + kStep)...});
#endif
    }
  }
}

template <int kStep, int kRows>
SSLFAST_INLINE void swap_blocks(Vec (&rows)[kRows]) {
  for (int i = 0; i < kRows; ++i)
    if (!(i & kStep))
      swap_quarters<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes / Vec::kParts>());
}

// Transposes a block of 16 x 16, or two blocks of 8 x 8 side by side.
template <int kRows>
SSLFAST_INLINE void transpose(Vec (&rows)[kRows]) {
  static_assert(kRows == kLanes || kRows == kLanes / 2);
  if constexpr (kRows == kLanes) swap_blocks<8>(rows);
  swap_blocks<4>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
}

// Loads 8 numbers each from two addresses.
SSLFAST_INLINE Vec load_halves(const void* low, const void* high) {
  Vec v;
#if defined(__AVX512F__)
  v.part[0] = (Vec::Part)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)low)),
                                            _mm256_loadu_si256((const __m256i*)high), 1);
#else
  constexpr int kHalf = Vec::kParts / 2;
  for (int i = 0; i < Vec::kParts; ++i)
    std::memcpy(&v.part[i], static_cast<const char*>(i < kHalf ? low : high) + i % kHalf * sizeof v.part[i],
                sizeof v.part[i]);
#endif
  return v;
}
SSLFAST_INLINE void store_halves(void* low, void* high, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)low, _mm512_castsi512_si256((__m512i)v.part[0]));
  _mm256_storeu_si256((__m256i*)high, _mm512_extracti64x4_epi64((__m512i)v.part[0], 1));
#else
  constexpr int kHalf = Vec::kParts / 2;
  for (int i = 0; i < Vec::kParts; ++i)
    std::memcpy(static_cast<char*>(i < kHalf ? low : high) + i % kHalf * sizeof v.part[i], &v.part[i],
                sizeof v.part[i]);
#endif
}

// The sum of the lanes in double, always in the same order.
inline double sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  double total = 0;
  for (float x : lanes) total += x;
  return total;
}

// e^x to about 1 ulp for x <= 88; 0 below -87. With x = n ln 2 + r, a Taylor polynomial in |r| <= 0.35; its error is
// below 6e-9.
SSLFAST_INLINE Vec exp(Vec x) {
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
  Mask exponent = shift_left<23>(bits_as<Mask>(shifted) - 0x4B400000);  // minus the bits of 1.5 * 2^23: n
  Vec scaled = bits_as<Vec>(bits_as<Mask>(p) + exponent);
  scaled = select(x == x, scaled, x);  // the integer addition above would hide a NaN
  return select(under, Vec{}, scaled);
}

// log x for normal x > 0; NaN for NaN and infinity. With x = 2^n m and m in [0.7, 1.4],
// log m = 2 artanh((m - 1) / (m + 1)).
SSLFAST_INLINE Vec log(Vec x) {
  Mask bits = bits_as<Mask>(x);
  Mask n = shift_right<23>(bits - 0x3F3504F3);  // the bits of sqrt(1/2)
  Vec m = bits_as<Vec>(bits - shift_left<23>(n));
  Vec s = (m - 1.f) / (m + 1.f);
  Vec s2 = s * s;
  Vec p = splat(1.f / 9);
  p = multiply_add(p, s2, splat(1.f / 7));
  p = multiply_add(p, s2, splat(1.f / 5));
  p = multiply_add(p, s2, splat(1.f / 3));
  Vec log_m = multiply_add(2.f * s * s2, p, 2.f * s);
  Vec n_float = convert<float>(n);
  return multiply_add(n_float, splat(0.693145752f), multiply_add(n_float, splat(1.42860677e-6f), log_m)) + (x - x);
}

SSLFAST_INLINE Vec inverse_root(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = 1.f / __builtin_sqrtf(lane);
  return load(lanes);
}

}  // namespace sslfast
