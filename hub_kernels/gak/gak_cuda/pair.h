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

// mantissa * 2^exponent, the mantissa in [1, 2), or 0: no bandwidth and no length can underflow. Double, because what a
// cell loses adds up over as many cells as two long sequences have; the work is small beside the inner products.
struct Cell {
  double mantissa;
  int exponent;
};

// What a cell keeps for the way back: the shares of its kernel that came from the left, from above and from the corner,
// and the derivative of log k by x.
struct Kept {
  float left, up, corner, slope;
};

// What the last cell of a lane sends on, on the way back. `held` came from the lane below for the next cell.
struct Flow {
  float left, up, corner, held;
};

GAK_DEVICE Cell nothing() {
  return {0.0, kNever};
}

GAK_DEVICE int larger(int a, int b) {
  return a > b ? a : b;
}

GAK_DEVICE double aligned(Cell cell, int exponent) {
  return ldexp(cell.mantissa, larger(cell.exponent - exponent, -1000));
}

// (left + up + corner) * k with k = s / (2 - s), s = exp(-x).
GAK_DEVICE Cell next(Cell left, Cell up, Cell corner, double x, Kept* kept = nullptr) {
  const double power = -x * 1.4426950408889634;
  const double whole = floor(power + 0.5);
  const double fraction = exp2(power - whole);
  const double s = ldexp(fraction, larger(int(whole), -1000));
  const int exponent = larger(larger(left.exponent, up.exponent), corner.exponent);
  const double from_left = aligned(left, exponent), from_up = aligned(up, exponent);
  const double from_corner = aligned(corner, exponent);
  const double sum = (from_left + from_up) + from_corner;
  if (kept) {
    *kept = {float(from_left / sum), float(from_up / sum), float(from_corner / sum), float(-2 / (2 - s))};
  }
  const double value = sum * (fraction / (2 - s));
  int own;
  const double mantissa = frexp(value, &own);
  return {2 * mantissa, exponent + int(whole) + own - 1};
}

// A strip is 32 rows. Lane l holds row `first + l`; at step t it does column t - l. `border` is the last row of the
// strip above, one cell a column; the last lane leaves its row there for the strip below.
//
// What lane 0 needs from above, read before lane 31 can overwrite it: it is 31 columns ahead.
GAK_DEVICE Cell from_border(const Cell* border, int first, int column, int m) {
  if (first == 0) {
    return column == -1 ? Cell{1.0, 0} : nothing();
  }
  return column >= 0 && column < m ? border[column] : nothing();
}

// Strips and steps are taken in the opposite order on the way back, so that a lane finds what it kept at the same place.
GAK_DEVICE int64_t kept_cells(int n, int m) {
  return int64_t((n + kLanes - 1) / kLanes) * (m + kLanes - 1) * kLanes;
}

GAK_DEVICE int64_t kept_place(int first, int t, int lane, int m) {
  return (int64_t(first / kLanes) * (m + kLanes - 1) + t) * kLanes + lane;
}

// What the first row of the strip below sent to the last row of this one.
GAK_DEVICE float from_below(const float* border, int first, int column, int n, int m) {
  return first + kLanes < n && column >= 0 && column < m ? border[column] : 0.0f;
}

// The share of the kernel that passes through a cell. `below` and `beside` are what the lane below sent up and to the
// corner; a cell outside the grid has kept zeros.
GAK_DEVICE float back(Flow& flow, float below, float beside, bool end, Kept kept) {
  const float expected = ((flow.left + below) + flow.held) + (end ? 1.0f : 0.0f);
  flow = {expected * kept.left, expected * kept.up, expected * kept.corner, beside};
  return expected;
}

#if !defined(__CUDACC__)
// The kernel of gak_cuda.cu with its lanes in a loop: `shuffled` is what __shfl_up_sync gives.
inline double host_log_kernel(
    const float* phi, int64_t stride, int n, int m, double scale, Cell* border, Kept* kept) {
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
          Kept* own = kept ? kept + kept_place(first, t, lane, m) : nullptr;
          value = next(left[lane], up, corner[lane], phi[row * stride + column] * scale, own);
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
  return log(result.mantissa) + result.exponent * 0.6931471805599453;
}

// After host_log_kernel has filled `kept`: adds to `gradient`, or to the expected alignment where `expected_only`.
inline void host_gradient(
    const Kept* kept, int64_t stride, int n, int m, double scale, float weight, bool expected_only, float* border,
    float* gradient) {
  for (int first = (n - 1) / kLanes * kLanes; first >= 0; first -= kLanes) {
    Flow flow[kLanes] = {};
    for (int t = m + kLanes - 2; t >= 0; --t) {
      float below[kLanes], beside[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        below[lane] = lane == kLanes - 1 ? from_below(border, first, t - lane, n, m) : flow[lane + 1].up;
        beside[lane] = lane == kLanes - 1 ? 0.0f : flow[lane + 1].corner;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = first + lane, column = t - lane;
        const bool inside = row < n && column >= 0 && column < m;
        const Kept own = inside ? kept[kept_place(first, t, lane, m)] : Kept{};
        const float corner = flow[lane].corner;
        const float expected = back(flow[lane], below[lane], beside[lane], row == n - 1 && column == m - 1, own);
        if (inside) {
          gradient[row * stride + column] += expected * weight * (expected_only ? 1.0f : own.slope * float(scale));
          if (lane == 0) {
            border[column] = flow[lane].up + corner;
          }
        }
      }
    }
  }
}
#endif

}  // namespace gak_cuda
