// Sixteen floats at a time on every instruction set (GCC and Clang vector types; the compiler splits them where the
// machine is narrower). All sums run over the same sixteen lanes, so results do not depend on the instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef int8_t b16 __attribute__((vector_size(16)));

template <class V, class T>
inline V load(const T* at) {
  V v;
  std::memcpy(&v, at, sizeof(V));
  return v;
}

template <class V, class T>
inline void store(T* at, const V& v) {
  std::memcpy(at, &v, sizeof(V));
}

inline v16 all(float x) { return x - v16{}; }

inline v16 fma16(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<v16>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  v16 out;
  for (int i = 0; i < 2; ++i) {
    __m256 x, y, z;
    std::memcpy(&x, reinterpret_cast<const char*>(&a) + 32 * i, 32);
    std::memcpy(&y, reinterpret_cast<const char*>(&b) + 32 * i, 32);
    std::memcpy(&z, reinterpret_cast<const char*>(&c) + 32 * i, 32);
    x = _mm256_fmadd_ps(x, y, z);
    std::memcpy(reinterpret_cast<char*>(&out) + 32 * i, &x, 32);
  }
  return out;
#else
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

inline float sum16(v16 v) {
  float lanes[16];
  store(lanes, v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline v16 max16(v16 a, v16 b) { return a > b ? a : b; }

inline float top16(v16 v) {
  float lanes[16];
  store(lanes, v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

inline v16 widen(h16 bf16) { return reinterpret_cast<v16>(__builtin_convertvector(bf16, i16) << 16); }
inline v16 widen(b16 codes) {  // GCC 12 takes the long way for this conversion: 3x the time of attention over int8 values
#if defined(__AVX512F__)
  const __m128i bytes = reinterpret_cast<__m128i>(codes);
  return reinterpret_cast<v16>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
  const __m128i bytes = reinterpret_cast<__m128i>(codes);
  const __m256 half[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  return load<v16>(half);
#else
  v16 out;
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(codes[i]);
  return out;
#endif
}

// e^x with a relative error of 2e-7: 2^n times a polynomial in the rest, |rest| <= ln 2 / 2. NaN stays NaN.
inline v16 exp16(v16 x) {
  const v16 bounded = x < all(-87.f) ? all(-87.f) : (x > all(88.f) ? all(88.f) : x);
  const v16 shifter = all(0x1.8p23f);  // adding it rounds to a whole number
  const v16 shifted = bounded * all(1.44269504f) + shifter;
  const v16 n = shifted - shifter;
  v16 rest = fma16(n, all(-0.693359375f), bounded);  // ln 2 in two parts
  rest = fma16(n, all(2.12194440e-4f), rest);
  v16 p = all(1.f / 5040);
  const float terms[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  for (const float term : terms) p = fma16(p, rest, all(term));
  const i16 exponent = (reinterpret_cast<i16>(shifted) - reinterpret_cast<i16>(shifter)) << 23;
  return reinterpret_cast<v16>(reinterpret_cast<i16>(p) + exponent);
}

}  // namespace
