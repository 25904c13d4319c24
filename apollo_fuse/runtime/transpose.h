/* Tiles that are read along one axis and written along another, turned in registers.
 *
 * af_transpose_BITS sets to[r * to_row + c] = from[c * from_row + r] for r < rows and c < columns, elements of BITS
 * bits whatever they mean; af_transpose_at_BITS takes a table of where the rows of one side begin, or of both, and
 * 0 for none.  Squares of as many elements as a vector has are interleaved in one half and the other, as many times
 * as halving a vector leaves one element.  Where less than a square is left over, the last one goes back over some
 * of what is there; strips that are narrower than any square are moved one by one. */
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

/* So that what is known of a tile where it is moved is known in here. */
#define AF_IN_PLACE static inline __attribute__((always_inline, unused))

/* Where rows begin: `length` apart from the first one on, or as a table says. */
typedef struct {
  int64_t length;
  const int64_t *at;
  int64_t first;
} af_rows;

AF_IN_PLACE int64_t af_begin(af_rows rows, int64_t i) {
  return rows.at ? rows.at[rows.first + i] : (rows.first + i) * rows.length;
}

AF_IN_PLACE af_rows af_behind(af_rows rows, int64_t i) {
  return (af_rows){rows.length, rows.at, rows.first + i};
}

/* A square of which a row is a vector of 16 bytes. */
#define AF_SQUARE(BITS, SIDE, LOW, HIGH)                                                                    \
  typedef uint##BITS##_t af_vector_##BITS##_##SIDE __attribute__((vector_size(SIDE * BITS / 8)));           \
  typedef af_vector_##BITS##_##SIDE af_anywhere_##BITS##_##SIDE __attribute__((aligned(1), may_alias));     \
  AF_IN_PLACE void af_square_##BITS##_##SIDE(uint##BITS##_t *to, af_rows to_rows, const uint##BITS##_t *from,\
                                             af_rows from_rows) {                                           \
    af_vector_##BITS##_##SIDE row[SIDE], next[SIDE];                                                        \
    for (int i = 0; i < SIDE; i++)                                                                          \
      row[i] = *(const af_anywhere_##BITS##_##SIDE *)(from + af_begin(from_rows, i));                       \
    for (int done = 1; done < SIDE; done *= 2) {                                                            \
      for (int i = 0; i < SIDE / 2; i++) {                                                                  \
        next[2 * i] = AF_SHUFFLE(af_vector_##BITS##_##SIDE, row[i], row[i + SIDE / 2], LOW);                \
        next[2 * i + 1] = AF_SHUFFLE(af_vector_##BITS##_##SIDE, row[i], row[i + SIDE / 2], HIGH);           \
      }                                                                                                     \
      for (int i = 0; i < SIDE; i++) row[i] = next[i];                                                      \
    }                                                                                                       \
    for (int i = 0; i < SIDE; i++) *(af_anywhere_##BITS##_##SIDE *)(to + af_begin(to_rows, i)) = row[i];    \
  }

AF_SQUARE(8, 16, AF_LIST(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
          AF_LIST(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
AF_SQUARE(16, 8, AF_LIST(0, 8, 1, 9, 2, 10, 3, 11), AF_LIST(4, 12, 5, 13, 6, 14, 7, 15))
AF_SQUARE(32, 4, AF_LIST(0, 4, 1, 5), AF_LIST(2, 6, 3, 7))
AF_SQUARE(64, 2, AF_LIST(0, 2), AF_LIST(1, 3))

#ifdef __AVX__
/* Vectors of 32 bytes are two halves, between which elements move once, at the end. */
typedef uint32_t af_vector_32_8 __attribute__((vector_size(32)));
typedef af_vector_32_8 af_anywhere_32_8 __attribute__((aligned(1), may_alias));
AF_IN_PLACE void af_square_32_8(uint32_t *to, af_rows to_rows, const uint32_t *from, af_rows from_rows) {
  af_vector_32_8 row[8], pairs[8], fours[8];
  for (int i = 0; i < 8; i++) row[i] = *(const af_anywhere_32_8 *)(from + af_begin(from_rows, i));
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = AF_SHUFFLE(af_vector_32_8, row[i], row[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = AF_SHUFFLE(af_vector_32_8, row[i], row[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; k++) {
      fours[i + 2 * k] = AF_SHUFFLE(af_vector_32_8, pairs[i + k], pairs[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * k + 1] = AF_SHUFFLE(af_vector_32_8, pairs[i + k], pairs[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; i++) {
    row[i] = AF_SHUFFLE(af_vector_32_8, fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    row[i + 4] = AF_SHUFFLE(af_vector_32_8, fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; i++) *(af_anywhere_32_8 *)(to + af_begin(to_rows, i)) = row[i];
}
#endif

#define AF_ONE_BY_ONE(BITS)                                                                                 \
  AF_IN_PLACE void af_turn_##BITS##_1(uint##BITS##_t *to, af_rows to_rows, const uint##BITS##_t *from,      \
                                      af_rows from_rows, int64_t rows, int64_t columns) {                   \
    typedef uint##BITS##_t element __attribute__((may_alias));                                              \
    for (int64_t c = 0; c < columns; c++)                                                                   \
      for (int64_t r = 0; r < rows; r++)                                                                    \
        ((element *)to)[af_begin(to_rows, r) + c] = ((const element *)from)[af_begin(from_rows, c) + r];    \
  }

#define AF_TURN(BITS, SIDE, SMALLER)                                                                        \
  AF_IN_PLACE void af_turn_##BITS##_##SIDE(uint##BITS##_t *to, af_rows to_rows, const uint##BITS##_t *from, \
                                           af_rows from_rows, int64_t rows, int64_t columns) {              \
    if (rows < SIDE || columns < SIDE) {                                                                    \
      af_turn_##BITS##_##SMALLER(to, to_rows, from, from_rows, rows, columns);                              \
      return;                                                                                               \
    }                                                                                                       \
    for (int64_t next = 0; next < columns; next += SIDE) {                                                  \
      const int64_t c = next < columns - SIDE ? next : columns - SIDE;                                      \
      for (int64_t down = 0; down < rows; down += SIDE) {                                                   \
        const int64_t r = down < rows - SIDE ? down : rows - SIDE;                                          \
        af_square_##BITS##_##SIDE(to + c, af_behind(to_rows, r), from + r, af_behind(from_rows, c));        \
      }                                                                                                     \
    }                                                                                                       \
  }

#define AF_TRANSPOSE(BITS, SIDE)                                                                            \
  AF_IN_PLACE void af_transpose_##BITS(void *to, int64_t to_row, const void *from, int64_t from_row,        \
                                       int64_t rows, int64_t columns) {                                     \
    af_turn_##BITS##_##SIDE(to, (af_rows){to_row, 0, 0}, from, (af_rows){from_row, 0, 0}, rows, columns);   \
  }                                                                                                         \
  AF_IN_PLACE void af_transpose_at_##BITS(void *to, int64_t to_row, const int64_t *to_at, const void *from, \
                                          int64_t from_row, const int64_t *from_at, int64_t rows,           \
                                          int64_t columns) {                                                \
    af_turn_##BITS##_##SIDE(to, (af_rows){to_row, to_at, 0}, from, (af_rows){from_row, from_at, 0}, rows,   \
                            columns);                                                                       \
  }

AF_ONE_BY_ONE(8)
AF_TURN(8, 16, 1)
AF_TRANSPOSE(8, 16)

AF_ONE_BY_ONE(16)
AF_TURN(16, 8, 1)
AF_TRANSPOSE(16, 8)

AF_ONE_BY_ONE(32)
AF_TURN(32, 4, 1)
#ifdef __AVX__
AF_TURN(32, 8, 4)
AF_TRANSPOSE(32, 8)
#else
AF_TRANSPOSE(32, 4)
#endif

AF_ONE_BY_ONE(64)
AF_TURN(64, 2, 1)
AF_TRANSPOSE(64, 2)

#endif
