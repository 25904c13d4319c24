/* Elementary functions of generated kernels, written to be vectorised by the compiler.
 *
 * Each float function is branch-free straight-line C without calls, so that gcc and clang turn
 * a loop around it into vector code at -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math; none needs
 * -ffast-math.  NaN, infinities, signed zeros and denormals come out as IEEE 754 and C11's annex F have
 * them.  The error that stands with a function is the largest met over every eleventh float, in units in
 * the last place of the exact result, with FMA and without; no exhaustive run stands behind it, and
 * tests/test_vmath.py holds it on a sample.  The polynomials are weighted minimax fits
 * made for this file (Lawson's iteration on Chebyshev nodes, coefficients rounded one by one); long ones
 * are summed as even and odd powers, two chains that do not wait for each other. */
#ifndef APOLLO_FUSE_VMATH_H
#define APOLLO_FUSE_VMATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define AF_INLINE static inline __attribute__((always_inline, unused))

/* A fused multiply-add where that is one instruction; kernels are compiled with -ffp-contract=off. */
#if defined(__FMA__) || defined(__aarch64__)
#define AF_IS_FUSED 1
#define AF_FMAF(a, b, c) __builtin_fmaf(a, b, c)
#define AF_FMA(a, b, c) __builtin_fma(a, b, c)
#else
#define AF_IS_FUSED 0
#define AF_FMAF(a, b, c) ((a) * (b) + (c))
#define AF_FMA(a, b, c) ((a) * (b) + (c))
#endif

/* ------------------------------------------------------------------------------------------ the bits */

AF_INLINE uint32_t af_bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

AF_INLINE float af_float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

AF_INLINE uint64_t af_bits_of_double(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

AF_INLINE double af_double_of_bits(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

AF_INLINE float af_rintf(float x) { return __builtin_rintf(x); }
AF_INLINE float af_floorf(float x) { return __builtin_floorf(x); }
AF_INLINE float af_ceilf(float x) { return __builtin_ceilf(x); }

/* ----------------------------------------------------------------------------------- the exponentials */

/* x - n ln 2.  ln 2 is split so that n times its first part is exact. */
AF_INLINE float af_less_ln2(float x, float n) {
  return AF_FMAF(n, 2.12194440e-4f, AF_FMAF(n, -0.693359375f, x));
}

/* x = n ln 2 + r with |r| <= ln 2 / 2, for |x| < 2^20: adding 1.5 * 2^23 rounds to an integer, which then
 * stands in the low bits. */
typedef struct {
  float r;
  int32_t n;
} af_reduced;

AF_INLINE af_reduced af_reduce_exp(float x) {
  const float shift = 0x1.8p23f;
  const float shifted = AF_FMAF(x, 1.44269504f, shift), n = shifted - shift;
  af_reduced out;
  out.r = af_less_ln2(x, n);
  out.n = (int32_t)(af_bits_of_float(shifted) - af_bits_of_float(shift));
  return out;
}

/* e^r - 1 for |r| <= ln 2 / 2, to 2^-26: r + r^2 q(r). */
AF_INLINE float af_expm1_of_reduced(float r) {
  float q = 0.00138706563f;
  q = AF_FMAF(q, r, 0.00836626161f);
  q = AF_FMAF(q, r, 0.0416674353f);
  q = AF_FMAF(q, r, 0.166665465f);
  q = AF_FMAF(q, r, 0.49999997f);
  return AF_FMAF(r * r, q, r);
}

/* 2^n for -126 <= n <= 127. */
AF_INLINE float af_power_of_two(int32_t n) { return af_float_of_bits((uint32_t)(n + 127) << 23); }

/* e^x; 1.03 ulp.  Scaled in two steps, so that denormal results round once and large ones reach inf.  Where the
 * result rounds to 0 the second step is 0 itself: a masked softmax is full of such places, and reaching 0 by
 * underflow would cost a hundred cycles each time.  Each condition stands alone, on another value: of two on
 * one, gcc makes paths, and computes half of the function for either. */
AF_INLINE float af_expf(float x) {
  const af_reduced at = af_reduce_exp(-104.0f > x ? -104.0f : x);
  const int32_t half = at.n >> 1;
  const uint32_t is_positive = 0u - (uint32_t)(at.n > -150);
  const float rest = af_float_of_bits((uint32_t)(at.n - half + 127) << 23 & is_positive);
  const float power = af_power_of_two(half), y = AF_FMAF(power, af_expm1_of_reduced(at.r), power) * rest;
  return x > 89.0f ? INFINITY : y;
}

/* The integer n next to x / ln 2, and 2^n, for -87.3 <= x <= 0: where the bias of exponents is added as well,
 * the low bits are those of the power. */
typedef struct {
  float n, power;
} af_halvings;

AF_INLINE af_halvings af_halve(float x) {
  const float shift = 0x1.8p23f + 127.0f, shifted = AF_FMAF(x, 1.44269504f, shift);
  af_halvings out;
  out.n = shifted - shift;
  out.power = af_float_of_bits(af_bits_of_float(shifted) << 23);
  return out;
}

/* e^x for x <= 0, or NaN; 1.03 ulp.  What would be denormal is 0, so that one step scales it. */
AF_INLINE float af_exp_nonpositivef(float x) {
  const af_halvings at = af_halve(x);
  const float y = AF_FMAF(at.power, af_expm1_of_reduced(af_less_ln2(x, at.n)), at.power);
  return -87.3f > x ? 0.0f : y;
}

/* 1 - e^x for -87.3 <= x <= 0, or NaN.  The more often ln 2 is taken off, the less it matters that it is rounded. */
AF_INLINE float af_one_less_expf(float x) {
  const af_halvings at = af_halve(x);
  const float r = AF_FMAF(at.n, -0.693147182f, x);
  return AF_FMAF(-at.power, af_expm1_of_reduced(r), 1.0f - at.power);
}

/* `size` with the sign of x, for size >= +0 or NaN. */
AF_INLINE float af_with_sign_of(float x, float size) {
  return af_float_of_bits(af_bits_of_float(size) | (af_bits_of_float(x) & 0x80000000u));
}

/* e^x - 1; 1.65 ulp: with t = 2^(n-1), 2 (t (e^r - 1) + (t - 1/2)). */
AF_INLINE float af_expm1f(float x) {
  float bounded = -25.0f > x ? -25.0f : x;
  bounded = 89.0f < bounded ? 89.0f : bounded;
  const af_reduced at = af_reduce_exp(bounded);
  const float half = af_power_of_two(at.n - 1);
  const float y = 2.0f * AF_FMAF(half, af_expm1_of_reduced(at.r), half - 0.5f);
  return __builtin_fabsf(x) < 0x1p-25f ? x : y;
}

/* tanh |x| = t / (2 - t) with t = 1 - e^(-2|x|); 2.50 ulp. */
AF_INLINE float af_tanhf(float x) {
  float size = __builtin_fabsf(x);
  size = 10.0f < size ? 10.0f : size;
  const float t = af_one_less_expf(-2.0f * size);
  return af_with_sign_of(x, t / (2.0f - t));
}

/* 1 / (1 + e^-x); 2.36 ulp.  Computed from e^-|x| so that small results keep their precision, unless denormal. */
AF_INLINE float af_sigmoidf(float x) {
  const float e = af_exp_nonpositivef(-__builtin_fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* erf |x| = 1 - e^(-|x| g(|x|)); 2.04 ulp.  g(x) = -ln(erfc x) / x is smooth on [0, 4], and g - 1 is the
 * polynomial, here of -|x|. */
AF_INLINE float af_erff(float x) {
  float below = -__builtin_fabsf(x);
  below = -4.0f > below ? -4.0f : below;
  const float square = below * below;
  float even = AF_FMAF(-9.38822177e-06f, square, -0.000637370802f);
  even = AF_FMAF(even, square, -0.000169511753f);
  even = AF_FMAF(even, square, 0.102776304f);
  even = AF_FMAF(even, square, 0.128379166f);
  float odd = AF_FMAF(-0.000118863609f, square, -0.00167568738f);
  odd = AF_FMAF(odd, square, 0.0191478208f);
  odd = AF_FMAF(odd, square, -0.636619568f);
  const float g = AF_FMAF(odd, below, even);
  return af_with_sign_of(x, af_one_less_expf(AF_FMAF(g, below, below)));
}

/* ------------------------------------------------------------------------------------ the logarithms */

/* ln(1 + f) for sqrt(1/2) <= 1 + f <= sqrt(2) without its first term: -f^2/2 + f^3 q(f), to 2^-30. */
AF_INLINE float af_log1p_tail(float f) {
  const float square = f * f;
  float even = AF_FMAF(0.0675095543f, square, 0.118835688f);
  even = AF_FMAF(even, square, 0.142203271f);
  even = AF_FMAF(even, square, 0.20002073f);
  even = AF_FMAF(even, square, 0.333333135f);
  float odd = AF_FMAF(-0.116714507f, square, -0.124060318f);
  odd = AF_FMAF(odd, square, -0.166679963f);
  odd = AF_FMAF(odd, square, -0.250000089f);
  return AF_FMAF(square * f, AF_FMAF(odd, f, even), -0.5f * square);
}

/* x = 2^e (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), for normal x > 0. */
typedef struct {
  float f, e;
} af_split;

AF_INLINE af_split af_split_log(float x) {
  const uint32_t root_half = 0x3f3504f3u, above = af_bits_of_float(x) - root_half;
  af_split out;
  out.e = (float)((int32_t)above >> 23);
  out.f = af_float_of_bits((above & 0x007fffffu) + root_half) - 1.0f;
  return out;
}

/* ln x; 0.86 ulp.  Denormals are scaled by 2^23 first. */
AF_INLINE float af_logf(float x) {
  const af_split at = af_split_log(x * (x < 0x1p-126f ? 0x1p23f : 1.0f));
  const float e = at.e - (x < 0x1p-126f ? 23.0f : 0.0f);
  float y = AF_FMAF(e, -2.12194440e-4f, af_log1p_tail(at.f)) + at.f;
  y = AF_FMAF(e, 0.693359375f, y);
  y = x < INFINITY ? y : x; /* inf and NaN */
  y = x == 0.0f ? -INFINITY : y;
  return x < 0.0f ? NAN : y;
}

/* ln(1 + x); 0.95 ulp: ln u + (x - (u - 1)) / u with u = 1 + x rounded. */
AF_INLINE float af_log1pf(float x) {
  const float u = 1.0f + x;
  const af_split at = af_split_log(u);
  const float f = at.e == 0.0f ? x : at.f;
  const float lost = at.e == 0.0f ? 0.0f : (x - (u - 1.0f)) / u;
  float y = AF_FMAF(at.e, -2.12194440e-4f, af_log1p_tail(f) + lost) + f;
  y = AF_FMAF(at.e, 0.693359375f, y);
  y = __builtin_fabsf(x) < 0x1p-25f ? x : y;
  y = x < INFINITY ? y : x; /* inf and NaN */
  y = x == -1.0f ? -INFINITY : y;
  return x < -1.0f ? NAN : y;
}

/* ln(1 + x) for 0 <= x <= 1, or NaN: from sqrt(2) on of half of 1 + x, for the sake of the polynomial. */
AF_INLINE float af_log1p_to_one(float x) {
  const float f = x > 0.414213562f ? AF_FMAF(0.5f, x, -0.5f) : x;
  return af_log1p_tail(f) + f + (f == x ? 0.0f : 0.693147182f);
}

/* ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|); 1.70 ulp, and 0 where it would be denormal. */
AF_INLINE float af_softplusf(float x) {
  return (x > 0.0f ? x : 0.0f) + af_log1p_to_one(af_exp_nonpositivef(-__builtin_fabsf(x)));
}

/* ----------------------------------------------------------------------------------------- the power */

/* x^y = 2^(y log2 |x|) in double, log2 from atanh's series in (m - 1) / (m + 1), then the special cases of
 * C11 F.10.4.4; 0.506 ulp over 20 million random pairs. */
AF_INLINE float af_powf(float x, float y) {
  const float size = __builtin_fabsf(x);
  const af_split at = af_split_log(size * (size < 0x1p-126f ? 0x1p23f : 1.0f));
  const double e = at.e - (size < 0x1p-126f ? 23.0f : 0.0f), f = at.f;
  const double s = f / (f + 2.0), s2 = s * s;
  double series = 0.3402638991179171;
  series = AF_FMA(series, s2, 0.41170201127492723);
  series = AF_FMA(series, s2, 0.57708298832566396);
  series = AF_FMA(series, s2, 0.96179667757733267);
  series = AF_FMA(series, s2, 2.8853900817833971);
  double log2 = AF_FMA(series, s, e);
  log2 = size < INFINITY ? log2 : (double)size;
  log2 = size == 0.0f ? -INFINITY : log2;

  double z = (double)y * log2;
  z = z < -200.0 ? -200.0 : z;
  z = z > 200.0 ? 200.0 : z;
  const double shift = 0x1.8p52 + 1023.0; /* leaves the biased exponent of 2^n in the low bits */
  const double shifted = z + shift, r = z - (shifted - shift);
  double p = 1.5195577680812e-05;
  p = AF_FMA(p, r, 0.00015469236478004783);
  p = AF_FMA(p, r, 0.0013333950083145485);
  p = AF_FMA(p, r, 0.0096180274579840703);
  p = AF_FMA(p, r, 0.055504103194885676);
  p = AF_FMA(p, r, 0.24022651196252831);
  p = AF_FMA(p, r, 0.69314718073883219);
  p = AF_FMA(p, r, 0.99999999996194355);
  float out = (float)(p * af_double_of_bits(af_bits_of_double(shifted) << 52));

  /* Even numbers stay whole when halved; every float from 2^24 on is even. */
  const int whole = __builtin_rintf(y) == y, odd = whole & (__builtin_rintf(0.5f * y) != 0.5f * y);
  out = (x < 0.0f) & !whole & (size < INFINITY) ? NAN : out;
  out = odd ? __builtin_copysignf(out, x) : out;
  out = (size == 1.0f) & (__builtin_fabsf(y) == INFINITY) ? 1.0f : out;
  return (x == 1.0f) | (y == 0.0f) ? 1.0f : out;
}

/* ----------------------------------------------------------------------------------- sine and cosine */

/* |x| = (4 k + quadrant) pi/2 + r with |r| <= pi/4, for every finite x: Payne and Hanek's reduction in fixed
 * point ("Radian reduction for trigonometric functions", SIGNUM 18, 1983).  Of the bits of 2/pi only the 96
 * that decide the quadrant and the fraction are multiplied with the 24 of x. */
typedef struct {
  float r;
  uint32_t quadrant;
} af_angle;

static const uint32_t af_two_over_pi[8] = {0x00000000u, 0xa2f9836eu, 0x4e441529u, 0xfc2757d1u,
                                           0xf534ddc0u, 0xdb629599u, 0x3c439041u, 0xfe5163abu};

AF_INLINE af_angle af_reduce_angle(float x) {
  const float size = __builtin_fabsf(x);
  const uint32_t bits = af_bits_of_float(size), exponent = bits >> 23;
  const uint64_t mantissa = (bits & 0x007fffffu) | 0x00800000u;
  int32_t first = (int32_t)exponent - 120; /* the bit of the table that weighs 2 in the product */
  first = first < 0 ? 0 : first > 134 ? 134 : first;
  const uint32_t word = (uint32_t)first >> 5, left = (uint32_t)first & 31u, right = 31u - left;
  const uint32_t t0 = af_two_over_pi[word], t1 = af_two_over_pi[word + 1], t2 = af_two_over_pi[word + 2],
                 t3 = af_two_over_pi[word + 3];
  const uint32_t w0 = t0 << left | t1 >> 1 >> right, w1 = t1 << left | t2 >> 1 >> right,
                 w2 = t2 << left | t3 >> 1 >> right;
  const uint64_t low = mantissa * w1 + (mantissa * w2 >> 32);
  const uint32_t high = (uint32_t)mantissa * w0 + (uint32_t)(low >> 32); /* 2 bits before the point, 30 behind */
  const uint32_t quadrant = (high + 0x20000000u) >> 30;
  const int32_t whole = (int32_t)(high << 2 | (uint32_t)low >> 30);
  const int32_t rest = (int32_t)((uint32_t)low << 2 >> 1);
  const float r = (float)(((double)whole + (double)rest * 0x1p-31) * (0x1.921fb54442d18p0 * 0x1p-32));
  af_angle out;
  out.r = size < 0.5f ? size : r;
  out.quadrant = size < 0.5f ? 0 : quadrant;
  return out;
}

/* sin((at.quadrant + quadrants) pi/2 + at.r), with the sign bit given. */
AF_INLINE float af_sine_at(af_angle at, uint32_t quadrants, uint32_t sign) {
  const uint32_t quadrant = at.quadrant + quadrants;
  const float r2 = at.r * at.r;
  float s = 2.83304371e-06f, c = 2.4432562e-05f;
  s = AF_FMAF(s, r2, -0.000198530906f);
  s = AF_FMAF(s, r2, 0.0083333794f);
  s = AF_FMAF(s, r2, -0.166666672f);
  s = AF_FMAF(s, at.r * r2, at.r);
  c = AF_FMAF(c, r2, -0.00138873106f);
  c = AF_FMAF(c, r2, 0.0416666456f);
  c = AF_FMAF(c, r2 * r2, AF_FMAF(r2, -0.5f, 1.0f));
  const float y = quadrant & 1u ? c : s;
  return af_float_of_bits(af_bits_of_float(y) ^ (quadrant & 2u) << 30 ^ sign);
}

AF_INLINE uint32_t af_sign_of(float x) { return af_bits_of_float(x) & 0x80000000u; }

/* sin(|x| + quadrants pi/2), with the sign bit given. */
AF_INLINE float af_sine_of(float x, uint32_t quadrants, uint32_t sign) {
  const float y = af_sine_at(af_reduce_angle(x), quadrants, sign);
  return __builtin_fabsf(x) < INFINITY ? y : NAN;
}

/* 1.58 ulp, however large x is.  Vectorised where the processor has gathers (x86-64-v3). */
AF_INLINE float af_sinf(float x) { return af_sine_of(x, 0, af_sign_of(x)); }
/* 1.59 ulp, likewise. */
AF_INLINE float af_cosf(float x) { return af_sine_of(x, 1, 0); }

/* The same at a quarter of the cost, 1.56 ulp, for angles that are not far; those that are may give anything. */
#if AF_IS_FUSED
AF_INLINE int32_t af_is_far(float x) { return !(__builtin_fabsf(x) < 0x1p18f); }

/* Cody and Waite's reduction, with three parts of pi/2.  The first product is subtracted without rounding, and
 * what rounds behind it is relative to r. */
AF_INLINE af_angle af_reduce_near(float x) {
  const float size = __builtin_fabsf(x);
  const float shifted = AF_FMAF(size, 0x1.45f306p-1f, 0x1.8p23f); /* 2/pi; the last bits are the quadrants */
  const float quadrants = shifted - 0x1.8p23f;
  af_angle out;
  out.r = AF_FMAF(quadrants, -0x1.921fb6p0f, size);
  out.r = AF_FMAF(quadrants, 0x1.777a5cp-25f, out.r);
  out.r = AF_FMAF(quadrants, 0x1.ee59dap-50f, out.r);
  out.quadrant = af_bits_of_float(shifted);
  return out;
}

AF_INLINE float af_near_sinf(float x) { return af_sine_at(af_reduce_near(x), 0, af_sign_of(x)); }
AF_INLINE float af_near_cosf(float x) { return af_sine_at(af_reduce_near(x), 1, 0); }
#else
AF_INLINE int32_t af_is_far(float x) { return (void)x, 0; }
AF_INLINE float af_near_sinf(float x) { return af_sinf(x); }
AF_INLINE float af_near_cosf(float x) { return af_cosf(x); }
#endif

/* -------------------------------------------------------------------------------- the narrow formats */

/* Exact.  The exponent is rebiased by a multiplication, which also normalises denormals. */
AF_INLINE float af_half_to_float(uint16_t half) {
  const uint32_t size = half & 0x7fffu;
  const float scaled = af_float_of_bits(size << 13) * 0x1p112f;
  const uint32_t special = size >= 0x7c00u ? 0x7f800000u : 0u;
  return af_float_of_bits(af_bits_of_float(scaled) | special | (uint32_t)(half & 0x8000u) << 16);
}

/* To the nearest, ties to even; NaN stays NaN. */
AF_INLINE uint16_t af_float_to_half(float x) {
  const uint32_t bits = af_bits_of_float(x), size = bits & 0x7fffffffu;
  /* Adding 1/2 leaves a denormal half in the low bits, rounded by the addition. */
  const uint32_t denormal = af_bits_of_float(af_float_of_bits(size) + 0.5f) - af_bits_of_float(0.5f);
  const uint32_t normal = (size - (112u << 23) + 0x0fffu + (size >> 13 & 1u)) >> 13;
  uint32_t out = size < 0x38800000u ? denormal : normal;
  out = size >= 0x477ff000u ? 0x7c00u : out;
  out = size > 0x7f800000u ? 0x7e00u | (size >> 13 & 0x1ffu) : out;
  return (uint16_t)(out | (bits >> 16 & 0x8000u));
}

/* Exact. */
AF_INLINE float af_bfloat16_to_float(uint16_t x) { return af_float_of_bits((uint32_t)x << 16); }

/* To the nearest, ties to even; NaN stays NaN. */
AF_INLINE uint16_t af_float_to_bfloat16(float x) {
  const uint32_t bits = af_bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

/* --------------------------------------------------------------------------------------- in double */

/* The C library's: within 1 or 2 ulp, not vectorised. */
AF_INLINE double af_exp(double x) { return exp(x); }
AF_INLINE double af_exp_nonpositive(double x) { return exp(x); }
AF_INLINE double af_expm1(double x) { return expm1(x); }
AF_INLINE double af_log(double x) { return log(x); }
AF_INLINE double af_log1p(double x) { return log1p(x); }
AF_INLINE double af_tanh(double x) { return tanh(x); }
AF_INLINE double af_erf(double x) { return erf(x); }
AF_INLINE double af_sin(double x) { return sin(x); }
AF_INLINE double af_cos(double x) { return cos(x); }
/* gcc makes a root of the power of one half, which is inf for -inf. */
AF_INLINE double af_pow(double x, double y) { return x == -INFINITY && y == 0.5 ? INFINITY : pow(x, y); }
AF_INLINE double af_rint(double x) { return __builtin_rint(x); }
AF_INLINE double af_floor(double x) { return __builtin_floor(x); }
AF_INLINE double af_ceil(double x) { return __builtin_ceil(x); }
AF_INLINE double af_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
AF_INLINE double af_softplus(double x) { return (x > 0.0 ? x : 0.0) + log1p(exp(-__builtin_fabs(x))); }

#endif
