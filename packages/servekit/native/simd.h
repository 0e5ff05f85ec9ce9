// Vectors of one instruction set. This file is compiled once for each; everything in it is local to that object.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2 or NEON, by the compiler
#endif

constexpr int VECTOR = LANES * 4;  // bytes

typedef float vf __attribute__((vector_size(VECTOR)));
typedef int32_t vi __attribute__((vector_size(VECTOR)));
typedef uint32_t vu __attribute__((vector_size(VECTOR)));
typedef uint8_t vb __attribute__((vector_size(VECTOR)));
typedef float vf_any __attribute__((vector_size(VECTOR), aligned(1), may_alias));
typedef int32_t vi_any __attribute__((vector_size(VECTOR), aligned(1), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VECTOR), aligned(1), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline vu load_words(const void* p) { return *reinterpret_cast<const vu_any*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
inline vf all(float x) { return x - vf{}; }
inline vi all_int(int32_t x) { return x - vi{}; }
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vi larger(vi a, vi b) { return a > b ? a : b; }
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
inline vf low_halves(vu x) { return reinterpret_cast<vf>(x << 16); }
inline vf high_halves(vu x) { return reinterpret_cast<vf>(x & 0xffff0000u); }

#if defined(__AVX512F__)
inline float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
inline float highest(vf x) { return _mm512_reduce_max_ps((__m512)x); }
inline int32_t sum(vi x) { return _mm512_reduce_add_epi32((__m512i)x); }
inline int32_t highest(vi x) { return _mm512_reduce_max_epi32((__m512i)x); }
#else
inline int32_t highest(vi x) {
  int32_t best = x[0];
  for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
inline float sum(vf x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}
inline float highest(vf x) {
  float best = x[0];
  for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
inline int32_t sum(vi x) {
  int32_t total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}
#endif

// e ** x to about 2 units in the last place; what is not a number stays so. Far below 0 it is 0.
#if defined(__AVX512F__)
// 2 ** n times a polynomial in what is left of x / ln 2, -0.5 .. 0.5: fitted at Chebyshev's points.
inline vf exponential(vf x) {
  const __m512 least = _mm512_set1_ps(-140.0f), most = _mm512_set1_ps(88.0f);
  const __m512 inside = _mm512_max_ps(least, _mm512_min_ps(most, (__m512)x));  // the second stays where it is a NaN
  const __m512 n = _mm512_roundscale_ps(inside * 1.44269502f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf rest = (vf)inside * 1.92596303e-8f + ((vf)inside * 1.44269502f - (vf)n);
  vf series = all(1.33908668e-3f);
  series = series * rest + 9.66637395e-3f;
  series = series * rest + 5.55035695e-2f;
  series = series * rest + 2.40223482e-1f;
  series = series * rest + 6.93147182e-1f;
  series = series * rest + 1.0f;
  return (vf)_mm512_scalef_ps((__m512)series, n);
}
// a / b to 1 part in 16384, for numbers that are put down with 8 bits.
inline vf near_quotient(vf a, vf b) { return a * (vf)_mm512_rcp14_ps((__m512)b); }
// a / b to about 2 units in the last place, for b of 1 to 1e38.
inline vf quotient(vf a, vf b) {
  const vf guess = (vf)_mm512_rcp14_ps((__m512)b);
  return a * (guess * (2.0f - b * guess));
}
#else
// Moshier's Cephes, expf.
inline vf exponential(vf x) {
  const vf capped = x > 88.0f ? all(88.0f) : x;
  const vf inside = capped < -87.0f ? all(-87.0f) : capped;
  const vi power = __builtin_convertvector(inside * 1.44269504f + (inside < 0.0f ? all(-0.5f) : all(0.5f)), vi);
  const vf n = to_float(power);
  const vf rest = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  vf series = all(1.9875691500e-4f);
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  const vf scale = reinterpret_cast<vf>((power + 127) << 23);
  return x < -87.0f ? vf{} : series * scale;
}
inline vf quotient(vf a, vf b) { return a / b; }
inline vf near_quotient(vf a, vf b) { return a / b; }
#endif

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);  // stays a NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void store_bf16(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  for (int i = 0; i < LANES; ++i) p[i] = to_bf16(x[i]);
#endif
}

inline void store_bf16(uint16_t* p, const float* x, int count) {
  int i = 0;
  for (; i + LANES <= count; i += LANES) store_bf16(p + i, load(x + i));
  for (; i < count; ++i) p[i] = to_bf16(x[i]);
}

typedef int8_t vq __attribute__((vector_size(LANES)));
typedef int8_t vq_any __attribute__((vector_size(LANES), aligned(1), may_alias));

// The nearest whole numbers, as bytes; their sum is added to `total`. |x| is at most 127.
inline void store_bytes(int8_t* p, vf x, vi* total) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2 ** 23: what is added to it is rounded to a whole number
  const vi whole = __builtin_convertvector((x + magic) - magic, vi);
  *total += whole;
  *reinterpret_cast<vq_any*>(p) = __builtin_convertvector(whole, vq);
}

typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef uint16_t vh_any __attribute__((vector_size(LANES * 2), aligned(1), may_alias));

// Bytes as bf16, in their order: exactly. `count` is a multiple of 16.
inline void bytes_to_bf16(const int8_t* from, size_t count, uint16_t* to) {
  for (size_t i = 0; i < count; i += LANES) {
    const vi whole = __builtin_convertvector(*reinterpret_cast<const vq_any*>(from + i), vi);
    *reinterpret_cast<vh_any*>(to + i) = __builtin_convertvector(reinterpret_cast<vu>(to_float(whole)) >> 16, vh);
  }
}

// One step of a product: LANES columns of a weight, and as many of its rows as fit in 32 bits, times a row's values.
struct F32 {
  using Value = float;          // of an activation
  using Weights = vf;           // LANES columns, one row
  static constexpr int DEPTH = 1;
  static Weights load(const uint8_t* p) { return ::load(reinterpret_cast<const float*>(p)); }
  static vf add(vf sum, const Weights& w, const Value* x) { return w * *x + sum; }
  static void put(Value* p, float x) { *p = x; }
  static void put_two(Value* p, vf a, vf b) {
    store(p, a);
    store(p + LANES, b);
  }
  // e ** (x * by - base): of a softmax, before it is put down.
  static vf weight(vf x, float by, float base) { return exponential(x * by - base); }
};

struct EmulatedBF16 {
  using Value = float;
  struct Weights {
    vf even, odd;
  };
  static constexpr int DEPTH = 2;
  static Weights load(const uint8_t* p) {
    const vu words = load_words(p);
    return {low_halves(words), high_halves(words)};
  }
  static vf add(vf sum, const Weights& w, const Value* x) { return w.odd * x[1] + (w.even * x[0] + sum); }
  static void put(Value* p, float x) { *p = x; }
  static void put_two(Value* p, vf a, vf b) {
    store(p, a);
    store(p + LANES, b);
  }
  // e ** (x * by - base): of a softmax, before it is put down.
  static vf weight(vf x, float by, float base) { return exponential(x * by - base); }
};

#if defined(__AVX512BF16__)
struct BF16 {
  using Value = uint16_t;
  using Weights = __m512bh;
  static constexpr int DEPTH = 2;
  static Weights load(const uint8_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vf add(vf sum, const Weights& w, const Value* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return (vf)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_set1_epi32(pair));
  }
  static void put(Value* p, float x) { *p = to_bf16(x); }
  static void put_two(Value* p, vf a, vf b) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
  }
  // To 4e-6 of itself: what is put down has 8 bits.
  static vf weight(vf x, float by, float base) {
    constexpr float per_doubling = 1.44269504f;
    const vf power = x * (by * per_doubling) - base * per_doubling;
    const __m512 inside = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)power);  // a NaN stays
    const __m512 n = _mm512_roundscale_ps(inside, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf rest = (vf)inside - (vf)n;
    vf series = all(9.60039552e-3f);
    series = series * rest + 5.59168938e-2f;
    series = series * rest + 2.40237185e-1f;
    series = series * rest + 6.93121995e-1f;
    series = series * rest + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)series, n);
  }
};
#else
using BF16 = EmulatedBF16;
#endif

inline int32_t four(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return word;
}

// sum + four unsigned bytes of each lane of `w` times the four signed bytes of `x`.
// `small`: no byte of w is above 15.
template <bool small>
inline vi dot4(vi sum, vu w, const int8_t* x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(four(x)));
#elif defined(__AVX512BW__)
  const __m512i a = _mm512_set1_epi32(four(x)), ones = _mm512_set1_epi16(1);
  if (small) return sum + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w, a), ones);
  const __m512i even = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16((__m512i)w, 8);
  const __m512i a_even = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), a_odd = _mm512_srai_epi16(a, 8);
  return sum + (vi)_mm512_madd_epi16(even, a_even) + (vi)_mm512_madd_epi16(odd, a_odd);
#elif defined(__AVX2__)
  const __m256i a = _mm256_set1_epi32(four(x)), ones = _mm256_set1_epi16(1);
  if (small) return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, a), ones);
  const __m256i even = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16((__m256i)w, 8);
  const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
  return sum + (vi)_mm256_madd_epi16(even, a_even) + (vi)_mm256_madd_epi16(odd, a_odd);
#else
  for (int i = 0; i < 4; ++i) sum += reinterpret_cast<vi>((w >> (8 * i)) & 255u) * static_cast<int32_t>(x[i]);
  return sum;
#endif
}

}  // namespace
