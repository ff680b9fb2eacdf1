// The recursion of one pair by 32 lanes, for the CUDA kernel and, lane after lane, for the host, where it is tested.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define GAK_DEVICE __host__ __device__ __forceinline__
#else
#include <math.h>
#include <string.h>
#define GAK_DEVICE inline
#endif

namespace gak_cuda {

constexpr int kLanes = 32;
constexpr int kNever = -(1 << 29);

// mantissa * 2^exponent, the mantissa in [1, 2), or 0: no bandwidth and no length can underflow.
struct Cell {
  float mantissa;
  int exponent;
};

GAK_DEVICE Cell nothing() {
  return {0.0f, kNever};
}

GAK_DEVICE int larger(int a, int b) {
  return a > b ? a : b;
}

GAK_DEVICE float aligned(Cell cell, int exponent) {
  return cell.mantissa * ldexpf(1.0f, larger(cell.exponent - exponent, -126));
}

// (left + up + corner) * k with k = s / (2 - s), s = exp(-x).
GAK_DEVICE Cell next(Cell left, Cell up, Cell corner, float x) {
  const float power = -x * 1.4426950408889634f;
  const float whole = floorf(power + 0.5f);
  const float fraction = exp2f(power - whole);
  const float s = fraction * ldexpf(1.0f, larger(int(whole), -126));
  const int exponent = larger(larger(left.exponent, up.exponent), corner.exponent);
  const float sum = (aligned(left, exponent) + aligned(up, exponent)) + aligned(corner, exponent);
  const float value = sum * (fraction / (2.0f - s));
  int own;
  const float mantissa = frexpf(value, &own);
  return {2.0f * mantissa, exponent + int(whole) + own - 1};
}

// A strip is 32 rows. Lane l holds row `first + l`; at step t it does column t - l. `border` is the last row of the
// strip above, one cell a column; the last lane leaves its row there for the strip below.
//
// What lane 0 needs from above, read before lane 31 can overwrite it: it is 31 columns ahead.
GAK_DEVICE Cell from_border(const Cell* border, int first, int column, int m) {
  if (first == 0) {
    return column == -1 ? Cell{1.0f, 0} : nothing();
  }
  return column >= 0 && column < m ? border[column] : nothing();
}

#if !defined(__CUDACC__)
// The kernel of gak_cuda.cu with its lanes in a loop: `shuffled` is what __shfl_up_sync gives.
inline double host_log_kernel(
    const float* phi, int64_t stride, int64_t a, int n, int64_t b, int m, float scale, Cell* border) {
  Cell result = nothing();
  for (int first = 0; first < n; first += kLanes) {
    Cell left[kLanes], corner[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      left[lane] = nothing();
      corner[lane] = lane == 0 ? from_border(border, first, -1, m) : nothing();
    }
    for (int t = 0; t < m + kLanes - 1; ++t) {
      Cell shuffled[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        shuffled[lane] = lane == 0 ? from_border(border, first, t, m) : left[lane - 1];
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = first + lane, column = t - lane;
        const Cell up = shuffled[lane];
        Cell value = nothing();
        if (row < n && column >= 0 && column < m) {
          value = next(left[lane], up, corner[lane], phi[(a + row) * stride + b + column] * scale);
          if (lane == kLanes - 1) {
            border[column] = value;
          }
          if (row == n - 1 && column == m - 1) {
            result = value;
          }
        }
        left[lane] = value;
        corner[lane] = up;
      }
    }
  }
  return log(double(result.mantissa)) + result.exponent * 0.6931471805599453;
}
#endif

}  // namespace gak_cuda
