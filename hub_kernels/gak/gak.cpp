// log K of pairs of sequences, from the squared distances of their slices: Theorem 1 of Sugar (arXiv 2411.00304).

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One copy for each instruction set; the loader picks the machine's.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE __attribute__((always_inline)) inline

namespace {

// Pairs that go through the recursion together, one in each lane of the vectors.
constexpr int kLanes = 16;

struct Pair {
  int64_t row, column, n, m;
  double scale;  // 1 / (2 sigma^2)

  // Whether a float64 holds every product on the way and every sum of them.
  bool linear() const {
    return (n + m - 1) * (4.01 * scale + 0.6932) < 690 && (n + m) * 0.8815 < 690;
  }
};

// e^x for -700 < x <= 0 to 1e-15, without a call, so that loops over it are vectorised.
INLINE double exp_of(double x) {
  constexpr double round = 6755399441055744.0;  // 1.5 * 2^52 leaves the rounded integer in the low bits
  const double shifted = x * 1.4426950408889634 + round, whole = shifted - round;
  const double f = (x - whole * 0.6931471805599453) - whole * 2.3190468138462996e-17;
  double series = 1.0 / 479001600;
  constexpr double inverse[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};
  for (const double factor : inverse) {
    series = series * f + factor;
  }
  const int64_t exponent = std::bit_cast<int64_t>(shifted) << 52;
  return std::bit_cast<double>(std::bit_cast<int64_t>(series) + exponent);
}

// `above` holds a row of cells, each for all lanes, and a column of zeros before them; `near` a row of distances.
template <typename T>
INLINE void recursion(
    const T* distances, int64_t width, const Pair* pairs, int count, double* above, T* near, double* result) {
  int64_t n = 0, m = 0;
  double scale[kLanes] = {};
  for (int l = 0; l < count; ++l) {
    scale[l] = -pairs[l].scale;
    n = std::max(n, pairs[l].n);
    m = std::max(m, pairs[l].m);
  }
  std::fill_n(above, (m + 1) * kLanes, 0.0);
  std::fill_n(above, kLanes, 1.0);
  std::fill_n(near, m * kLanes, T(0));
  for (int64_t i = 0; i < n; ++i) {
    for (int l = 0; l < count; ++l) {
      // Cells outside a shorter pair keep some other distance, and nothing of that pair depends on them.
      const T* cells = distances + (pairs[l].row + i) * width + pairs[l].column;
      for (int64_t j = 0; j < pairs[l].m && i < pairs[l].n; ++j) {
        near[j * kLanes + l] = cells[j];
      }
    }
    double left[kLanes] = {}, corner[kLanes];
    std::copy_n(above, kLanes, corner);
    std::fill_n(above, kLanes, 0.0);
    for (int64_t j = 0; j < m; ++j) {
      double* up = above + (j + 1) * kLanes;
      for (int l = 0; l < kLanes; ++l) {
        const double s = exp_of(near[j * kLanes + l] * scale[l]);
        const double sum = (left[l] + up[l]) + corner[l];
        corner[l] = up[l];
        left[l] = up[l] = sum * (s / (2.0 - s));
      }
    }
    for (int l = 0; l < count; ++l) {
      if (i == pairs[l].n - 1) {
        result[l] = std::log(above[pairs[l].m * kLanes + l]);
      }
    }
  }
}

CLONES void run(const float* distances, int64_t width, const Pair* pairs, int count, double* above, float* near, double* result) {
  recursion(distances, width, pairs, count, above, near, result);
}

CLONES void run(const double* distances, int64_t width, const Pair* pairs, int count, double* above, double* near, double* result) {
  recursion(distances, width, pairs, count, above, near, result);
}

// Where a kernel could leave the range of a float64: the same in log space, one cell after the other.
template <typename T>
double in_log_space(const T* distances, int64_t width, const Pair& pair, double* above) {
  constexpr double never = -std::numeric_limits<double>::infinity();
  std::fill_n(above, pair.m + 1, never);
  above[0] = 0;
  for (int64_t i = 0; i < pair.n; ++i) {
    const T* cells = distances + (pair.row + i) * width + pair.column;
    double left = never, corner = above[0];
    above[0] = never;
    for (int64_t j = 0; j < pair.m; ++j) {
      const double x = cells[j] * pair.scale, up = above[j + 1], most = std::max({left, up, corner});
      const double sum = std::exp(left - most) + std::exp(up - most) + std::exp(corner - most);
      corner = up;
      left = above[j + 1] = most + std::log(sum) - x - std::log1p(-std::expm1(-x));
    }
  }
  return above[pair.m];
}

template <typename T>
void log_kernels(const Tensor& distances, const std::vector<Pair>& pairs, double* result) {
  const T* data = static_cast<const T*>(distances.const_data_ptr());
  const int64_t width = distances.size(1), count = pairs.size();
  int64_t longest = 0;
  for (const Pair& pair : pairs) {
    longest = std::max(longest, pair.m);
  }
  torch::stable::parallel_for(0, (count + kLanes - 1) / kLanes, 8, [&](int64_t begin, int64_t end) {
    std::vector<double> above((longest + 1) * kLanes);
    std::vector<T> near(longest * kLanes);
    for (int64_t first = begin * kLanes; first < std::min(end * kLanes, count); first += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, count - first));
      run(data, width, &pairs[first], lanes, above.data(), near.data(), result + first);
      for (int64_t p = first; p < first + lanes; ++p) {
        if (!pairs[p].linear()) {
          result[p] = in_log_space(data, width, pairs[p], above.data());
        }
      }
    }
  });
}

}  // namespace

Tensor log_kernels(
    const Tensor& distances, const Tensor& row, const Tensor& column, const Tensor& n, const Tensor& m,
    const Tensor& total, double delta) {
  const ScalarType type = distances.scalar_type();
  STD_TORCH_CHECK(
      distances.dim() == 2 && distances.is_contiguous() && (type == ScalarType::Float || type == ScalarType::Double),
      "`distances` must be a contiguous matrix of float32 or float64.");
  const int64_t count = row.numel();
  for (const Tensor* tensor : {&row, &column, &n, &m, &total}) {
    STD_TORCH_CHECK(
        tensor->is_cpu() && tensor->scalar_type() == ScalarType::Long && tensor->is_contiguous() &&
            tensor->dim() == 1 && tensor->numel() == count,
        "`row`, `column`, `n`, `m` and `total` must be contiguous int64 vectors of one length.");
  }
  const auto values = [](const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); };
  std::vector<Pair> pairs(count);
  for (int64_t p = 0; p < count; ++p) {
    Pair& pair = pairs[p];
    pair = {values(row)[p], values(column)[p], values(n)[p], values(m)[p], 1 / (delta * delta * values(total)[p])};
    STD_TORCH_CHECK(
        pair.n > 0 && pair.m > 0 && values(total)[p] > 0 && pair.row >= 0 && pair.column >= 0 &&
            pair.row + pair.n <= distances.size(0) && pair.column + pair.m <= distances.size(1),
        "pair ", p, " leaves the matrix of distances.");
  }
  Tensor result = torch::stable::new_empty(distances, {&count, 1}, ScalarType::Double);
  double* data = static_cast<double*>(result.mutable_data_ptr());
  (type == ScalarType::Float ? log_kernels<float> : log_kernels<double>)(distances, pairs, data);
  return result;
}
