#pragma once

#include <stdint.h>

namespace gak {

// One pair of the recursion: the columns of the second sequence, and 1 / (delta^2 * (n + m)).
struct Lane {
  int64_t column;
  int64_t length;
  double scale;
  bool extended;
};

// Squared distances. `rows` and `columns` say where a slice is; without them slices are in order.
template <typename T>
struct Tile {
  const T* data;
  int64_t stride;
  const int32_t* rows = nullptr;
  const int32_t* columns = nullptr;

  Tile from(int64_t row) const {
    return rows ? Tile{data, stride, rows + row, columns} : Tile{data + row * stride, stride, nullptr, columns};
  }
};

// log(mantissa * 2^exponent). libm's log would ask for a newer glibc than manylinux_2_28 has.
static inline double log_of(double mantissa, int64_t exponent) {
  uint64_t bits;
  __builtin_memcpy(&bits, &mantissa, 8);
  exponent += int64_t(bits >> 52) - 1023;
  bits = (bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
  __builtin_memcpy(&mantissa, &bits, 8);
  if (mantissa > 1.4142135623730951) {
    mantissa *= 0.5;
    ++exponent;
  }
  const double f = (mantissa - 1) / (mantissa + 1), square = f * f;
  double series = 1.0 / 21;
  for (int k = 19; k > 0; k -= 2) {
    series = series * square + 1.0 / k;
  }
  return 2 * f * series + exponent * 0.6931471805599453;
}

template <typename T>
struct Loops {
  // log K of one sequence (n rows of the tile) with `count` others.
  void (*log_kernels)(
      Tile<T> tile, int64_t n, const Lane* lanes, int64_t count, void* workspace, double* result);
  // Adds upstream[l] * d log K_l / d (squared distance), or the expected alignment, to `gradient`.
  void (*gradients)(
      Tile<T> tile, int64_t n, const Lane* lanes, int64_t count, const double* upstream, bool to_distances,
      void* workspace, T* gradient, int64_t gradient_stride);
  double (*sum_of_squares)(const T* x, int64_t d);
  void (*scale)(const T* x, int64_t d, double factor, T* result);
  // From bfloat16 and from float16.
  void (*widen_brain)(const uint16_t* x, int64_t d, T* result);
  void (*widen_half)(const uint16_t* x, int64_t d, T* result);
  double (*squared_distance)(const T* a, const T* b, int64_t d);
  // Turns cosines of unit vectors into squared distances, in place; returns the least.
  T (*distances)(T* cosines, int64_t count);
  int64_t lanes;
  // Workspace of `log_kernels` for a longest second sequence of m: (m + 1) * row_bytes; of `gradients`.
  int64_t row_bytes;
  int64_t (*gradient_bytes)(int64_t n, int64_t m);
};

struct Table {
  Loops<float> single;
  Loops<double> twice;
};

namespace portable {
extern const Table table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
#endif

}  // namespace gak
