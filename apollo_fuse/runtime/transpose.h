/* Tiles that are read along one axis and written along another, turned in registers.
 *
 * af_transpose_BITS sets to[r * to_row + c] = from[c * from_row + r] for r < rows and c < columns, elements of BITS
 * bits whatever they mean.  Squares of as many elements as a vector has are interleaved in one half and the other,
 * as many times as halving a vector leaves one element; what is left at the edges is moved one by one. */
#ifndef APOLLO_FUSE_TRANSPOSE_H
#define APOLLO_FUSE_TRANSPOSE_H

#include <stdint.h>

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define AF_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef AF_SHUFFLE
#define AF_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

#define AF_LIST(...) __VA_ARGS__

/* A square whose side is the number of elements in a vector of 16 bytes. */
#define AF_SQUARE(BITS, SIDE, LOW, HIGH)                                                                 \
  typedef uint##BITS##_t af_vector_##BITS __attribute__((vector_size(16)));                              \
  typedef af_vector_##BITS af_anywhere_##BITS __attribute__((aligned(1), may_alias));                    \
  static inline void af_square_##BITS(uint##BITS##_t *to, int64_t to_row, const uint##BITS##_t *from,    \
                                      int64_t from_row) {                                                \
    af_vector_##BITS row[SIDE], next[SIDE];                                                              \
    for (int i = 0; i < SIDE; i++) row[i] = *(const af_anywhere_##BITS *)(from + i * from_row);          \
    for (int done = 1; done < SIDE; done *= 2) {                                                         \
      for (int i = 0; i < SIDE / 2; i++) {                                                               \
        next[2 * i] = AF_SHUFFLE(af_vector_##BITS, row[i], row[i + SIDE / 2], LOW);                      \
        next[2 * i + 1] = AF_SHUFFLE(af_vector_##BITS, row[i], row[i + SIDE / 2], HIGH);                 \
      }                                                                                                  \
      for (int i = 0; i < SIDE; i++) row[i] = next[i];                                                   \
    }                                                                                                    \
    for (int i = 0; i < SIDE; i++) *(af_anywhere_##BITS *)(to + i * to_row) = row[i];                    \
  }

AF_SQUARE(8, 16, AF_LIST(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
          AF_LIST(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
AF_SQUARE(16, 8, AF_LIST(0, 8, 1, 9, 2, 10, 3, 11), AF_LIST(4, 12, 5, 13, 6, 14, 7, 15))
AF_SQUARE(64, 2, AF_LIST(0, 2), AF_LIST(1, 3))

#ifdef __AVX__
/* Vectors of 32 bytes are two halves, between which elements move once, at the end. */
typedef uint32_t af_vector_32 __attribute__((vector_size(32)));
typedef af_vector_32 af_anywhere_32 __attribute__((aligned(1), may_alias));
static inline void af_square_32(uint32_t *to, int64_t to_row, const uint32_t *from, int64_t from_row) {
  af_vector_32 row[8], pairs[8], fours[8];
  for (int i = 0; i < 8; i++) row[i] = *(const af_anywhere_32 *)(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = AF_SHUFFLE(af_vector_32, row[i], row[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = AF_SHUFFLE(af_vector_32, row[i], row[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; k++) {
      fours[i + 2 * k] = AF_SHUFFLE(af_vector_32, pairs[i + k], pairs[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * k + 1] = AF_SHUFFLE(af_vector_32, pairs[i + k], pairs[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; i++) {
    row[i] = AF_SHUFFLE(af_vector_32, fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    row[i + 4] = AF_SHUFFLE(af_vector_32, fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; i++) *(af_anywhere_32 *)(to + i * to_row) = row[i];
}
#define AF_SIDE_32 8
#else
AF_SQUARE(32, 4, AF_LIST(0, 4, 1, 5), AF_LIST(2, 6, 3, 7))
#define AF_SIDE_32 4
#endif

#define AF_TRANSPOSE(BITS, SIDE)                                                                         \
  static inline void af_transpose_##BITS(void *to_, int64_t to_row, const void *from_, int64_t from_row, \
                                         int64_t rows, int64_t columns) {                                \
    typedef uint##BITS##_t element __attribute__((may_alias));                                           \
    element *to = to_;                                                                                   \
    const element *from = from_;                                                                         \
    int64_t c = 0;                                                                                       \
    for (; c + SIDE <= columns; c += SIDE) {                                                             \
      int64_t r = 0;                                                                                     \
      for (; r + SIDE <= rows; r += SIDE)                                                                \
        af_square_##BITS(to + r * to_row + c, to_row, from + c * from_row + r, from_row);                \
      for (; r < rows; r++)                                                                              \
        for (int64_t k = c; k < c + SIDE; k++) to[r * to_row + k] = from[k * from_row + r];              \
    }                                                                                                    \
    for (; c < columns; c++)                                                                             \
      for (int64_t r = 0; r < rows; r++) to[r * to_row + c] = from[c * from_row + r];                    \
  }

AF_TRANSPOSE(8, 16)
AF_TRANSPOSE(16, 8)
AF_TRANSPOSE(32, AF_SIDE_32)
AF_TRANSPOSE(64, 2)

#endif
