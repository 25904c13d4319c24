/* Scalar operations whose C operators do not have the meaning ONNX gives them.
 *
 * Maxima and minima pass a NaN on, by two choices in a row: joined by ||, gcc does not vectorise two of
 * them.  Integer division truncates, never traps (x / 0 is 0) and wraps.
 * Vector reductions over them are declared for `#pragma omp simd`. */
#ifndef APOLLO_FUSE_SCALAR_H
#define APOLLO_FUSE_SCALAR_H

#include "vmath.h"

/* The bits of a value in another type of as many. */
#define AF_BITCAST(FROM, TO, X) (((union { FROM from; TO to; }){.from = (FROM)(X)}).to)

#define AF_FLOAT_OPS(T, S, FMOD, FLOOR)                                                                  \
  AF_INLINE T af_max_##S(T a, T b) {                                                                     \
    const T greater = a < b ? b : a;                                                                     \
    return b != b ? b : greater;                                                                         \
  }                                                                                                      \
  AF_INLINE T af_min_##S(T a, T b) {                                                                     \
    const T less = a > b ? b : a;                                                                        \
    return b != b ? b : less;                                                                            \
  }                                                                                                      \
  AF_INLINE T af_sign_##S(T x) { return x > 0 ? (T)1 : x < 0 ? (T)-1 : x; }                              \
  AF_INLINE T af_trunc_mod_##S(T a, T b) { return FMOD(a, b); }                                          \
  AF_INLINE T af_floor_mod_##S(T a, T b) {                                                               \
    T r = FMOD(a, b);                                                                                    \
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;                                                     \
  }

AF_FLOAT_OPS(float, f32, fmodf, floorf)
AF_FLOAT_OPS(double, f64, fmod, floor)

#define AF_INTEGER_OPS(T, S)                                                                             \
  AF_INLINE T af_max_##S(T a, T b) { return a > b ? a : b; }                                             \
  AF_INLINE T af_min_##S(T a, T b) { return a < b ? a : b; }                                             \
  AF_INLINE T af_sign_##S(T x) { return (T)((x > 0) - (x < 0)); }                                        \
  AF_INLINE T af_div_##S(T a, T b) { return b == 0 ? 0 : b == (T)-1 ? (T)(0 - a) * ((T)-1 < 0) + (a == b) * ((T)-1 > 0) : (T)(a / b); } \
  AF_INLINE T af_trunc_mod_##S(T a, T b) { return b == 0 || (b == (T)-1 && (T)-1 < 0) ? 0 : (T)(a % b); }  \
  AF_INLINE T af_floor_mod_##S(T a, T b) {                                                               \
    T r = af_trunc_mod_##S(a, b);                                                                        \
    return r != 0 && (r < 0) != (b < 0) ? (T)(r + b) : r;                                                \
  }

/* A shift by the width or more, or by a negative number, leaves nothing but the sign. */
#define AF_SHIFTS(T, U, S)                                                                               \
  AF_INLINE T af_shift_left_##S(T a, T b) { return (U)b < 8 * sizeof(T) ? (T)((U)a << (U)b) : 0; }       \
  AF_INLINE T af_shift_right_##S(T a, T b) {                                                             \
    return (U)b < 8 * sizeof(T) ? (T)(a >> (U)b) : (T)(0 - (a < 0));                                     \
  }

AF_SHIFTS(int8_t, uint8_t, i8)
AF_SHIFTS(int16_t, uint16_t, i16)
AF_SHIFTS(int32_t, uint32_t, i32)
AF_SHIFTS(int64_t, uint64_t, i64)
AF_SHIFTS(uint8_t, uint8_t, u8)
AF_SHIFTS(uint16_t, uint16_t, u16)
AF_SHIFTS(uint32_t, uint32_t, u32)
AF_SHIFTS(uint64_t, uint64_t, u64)

AF_INTEGER_OPS(int8_t, i8)
AF_INTEGER_OPS(int16_t, i16)
AF_INTEGER_OPS(int32_t, i32)
AF_INTEGER_OPS(int64_t, i64)
AF_INTEGER_OPS(uint8_t, u8)
AF_INTEGER_OPS(uint16_t, u16)
AF_INTEGER_OPS(uint32_t, u32)
AF_INTEGER_OPS(uint64_t, u64)

/* Without regard to NaNs, which a flag tells of, and with a start that gcc and clang agree on. */
#pragma omp declare reduction(af_greatest_f32 : float : omp_out = omp_in > omp_out ? omp_in : omp_out) initializer(omp_priv = -INFINITY)
#pragma omp declare reduction(af_least_f32 : float : omp_out = omp_in < omp_out ? omp_in : omp_out) initializer(omp_priv = INFINITY)
#pragma omp declare reduction(af_greatest_f64 : double : omp_out = omp_in > omp_out ? omp_in : omp_out) initializer(omp_priv = -INFINITY)
#pragma omp declare reduction(af_least_f64 : double : omp_out = omp_in < omp_out ? omp_in : omp_out) initializer(omp_priv = INFINITY)

/* Outside of the target's range as x86-64's scalar instructions have it: negative numbers wrap. */
AF_INLINE uint64_t af_f32_to_u64(float x) {
  return x >= 0x1p63f ? (uint64_t)(int64_t)(x - 0x1p63f) ^ UINT64_C(1) << 63 : (uint64_t)(int64_t)x;
}
AF_INLINE uint64_t af_f64_to_u64(double x) {
  return x >= 0x1p63 ? (uint64_t)(int64_t)(x - 0x1p63) ^ UINT64_C(1) << 63 : (uint64_t)(int64_t)x;
}

/* The halves become the low bits of doubles of fixed exponents, which vector units without a conversion of
 * their own can do; exact to 2^53, beyond that rounding twice can differ by a unit in the last place. */
AF_INLINE float af_i64_to_f32(int64_t x) {
  const uint64_t bits = (uint64_t)x;
  const double high = af_double_of_bits((bits >> 32) ^ UINT64_C(0x4530000080000000));
  const double low = af_double_of_bits((bits & UINT64_C(0xffffffff)) | UINT64_C(0x4330000000000000));
  return (float)((high - 0x1.00000801p84) + low);
}

AF_INLINE int64_t af_floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

/* An index that may count from the end of an axis. */
AF_INLINE int64_t af_wrap(int64_t index, int64_t extent) { return index < 0 ? index + extent : index; }

#endif
