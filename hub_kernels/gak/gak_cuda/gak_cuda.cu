// Compiled for several GPUs, never run on one: there was none. The recursion of a pair is that of pair.h, whose host
// build is tested; what is new here is that 32 threads are its lanes.
#include "../torch-ext/torch_binding.h"

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "pair.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Part of libtorch, though declared only where CUDA builds of it are installed.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace gak_cuda {

// Two borders of 1024 cells fit into the shared memory of a block.
constexpr int kPairsPerBlock = 2;
constexpr unsigned kAll = 0xffffffffu;

// One warp a pair. `border` has a cell for every column, in shared memory; the lane of the last row returns the kernel.
template <bool keep>
__device__ Cell log_kernel(
    const float* phi, int64_t stride, int n, int m, double scale, Cell* border, Kept* kept) {
  const int lane = threadIdx.x;
  Cell result = nothing();
  for (int first = 0; first < n; first += kLanes) {
    Cell left = nothing();
    Cell corner = lane == 0 ? from_border(border, first, -1, m) : nothing();
    for (int t = 0; t < m + kLanes - 1; ++t) {
      Cell up;
      up.mantissa = __shfl_up_sync(kAll, left.mantissa, 1);
      up.exponent = __shfl_up_sync(kAll, left.exponent, 1);
      if (lane == 0) {
        up = from_border(border, first, t, m);
      }
      // Lane 0 has read column t before lane 31 writes column t - 31.
      __syncwarp();
      const int row = first + lane, column = t - lane;
      Cell value = nothing();
      if (row < n && column >= 0 && column < m) {
        Kept* own = keep ? kept + kept_place(first, t, lane, m) : nullptr;
        value = next(left, up, corner, phi[row * stride + column] * scale, own);
        if (lane == kLanes - 1) {
          border[column] = value;
        }
        if (row == n - 1 && column == m - 1) {
          result = value;
        }
      }
      left = value;
      corner = up;
    }
    // What lane 31 wrote is read by lane 0 of the next strip.
    __syncwarp();
  }
  return result;
}

__device__ void add_gradient(
    const Kept* kept, int64_t stride, int n, int m, double scale, float weight, bool expected_only, float* border,
    float* gradient) {
  const int lane = threadIdx.x;
  for (int first = (n - 1) / kLanes * kLanes; first >= 0; first -= kLanes) {
    Flow flow = {};
    for (int t = m + kLanes - 2; t >= 0; --t) {
      float below = __shfl_down_sync(kAll, flow.up, 1);
      float beside = __shfl_down_sync(kAll, flow.corner, 1);
      if (lane == kLanes - 1) {
        below = from_below(border, first, t - lane, n, m);
        beside = 0.0f;
      }
      // Lane 31 has read column t - 31; lane 0 writes column t, which lane 31 read 31 steps ago.
      __syncwarp();
      const int row = first + lane, column = t - lane;
      const bool inside = row < n && column >= 0 && column < m;
      const Kept own = inside ? kept[kept_place(first, t, lane, m)] : Kept{};
      const float corner = flow.corner;
      const float expected = back(flow, below, beside, row == n - 1 && column == m - 1, own);
      if (inside) {
        gradient[row * stride + column] += expected * weight * (expected_only ? 1.0f : own.slope * float(scale));
        if (lane == 0) {
          border[column] = flow.up + corner;
        }
      }
    }
    // What lane 0 wrote is read by lane 31 of the next strip.
    __syncwarp();
  }
}

// `own`: a sequence with itself, at the bandwidth it has with a column's length.
struct Prefixes {
  const int64_t *row_start, *row_length, *column_start, *column_length;
  int64_t rows, columns;
  double inverse_square;
  bool own;
};

__device__ const float* block_of(
    const Prefixes& prefixes, const float* phi, int64_t stride, int64_t p, int64_t q, int& n, int& m, double& scale) {
  n = int(prefixes.row_length[p]);
  m = prefixes.own ? n : int(prefixes.column_length[q]);
  scale = prefixes.inverse_square / double(n + prefixes.column_length[q]);
  const int64_t a = prefixes.row_start[p];
  return phi + a * stride + (prefixes.own ? a : prefixes.column_start[q]);
}

__global__ void log_pairs(
    Prefixes prefixes, const float* phi, int64_t stride, bool symmetric, int longest, double* result) {
  extern __shared__ Cell shared[];
  const int64_t pair = int64_t(blockIdx.x) * kPairsPerBlock + threadIdx.y;
  if (pair >= prefixes.rows * prefixes.columns) {
    return;
  }
  const int64_t p = pair / prefixes.columns, q = pair % prefixes.columns;
  if (symmetric && q < p) {
    return;
  }
  int n, m;
  double scale;
  const float* block = block_of(prefixes, phi, stride, p, q, n, m, scale);
  const Cell last = log_kernel<false>(block, stride, n, m, scale, shared + threadIdx.y * longest, nullptr);
  if (threadIdx.x == (n - 1) % kLanes) {
    result[pair] = log(last.mantissa) + last.exponent * 0.6931471805599453;
  }
}

// One warp a pair of samples: it alone writes their block of `gradient`, pair of prefixes after pair of prefixes, so that
// the sums are the same on every run. Groups say where the prefixes of a sample begin.
__global__ void log_pairs_backward(
    Prefixes prefixes, const float* upstream, const float* phi, int64_t stride, const int64_t* row_group,
    int64_t row_groups, const int64_t* column_group, int64_t column_groups, bool expected_only, int longest,
    int64_t cells, Kept* workspace, float* gradient) {
  extern __shared__ Cell shared[];
  Cell* border = shared + threadIdx.y * longest;
  const int64_t worker = int64_t(blockIdx.x) * kPairsPerBlock + threadIdx.y;
  Kept* kept = workspace + worker * cells;
  for (int64_t job = worker; job < row_groups * column_groups; job += int64_t(gridDim.x) * kPairsPerBlock) {
    const int64_t g = job / column_groups, h = job % column_groups;
    for (int64_t p = row_group[g]; p < row_group[g + 1]; ++p) {
      for (int64_t q = column_group[h]; q < column_group[h + 1]; ++q) {
        const float weight = upstream[p * prefixes.columns + q];
        if (weight == 0.0f) {
          continue;
        }
        int n, m;
        double scale;
        const float* block = block_of(prefixes, phi, stride, p, q, n, m, scale);
        log_kernel<true>(block, stride, n, m, scale, border, kept);
        add_gradient(
            kept, stride, n, m, scale, weight, expected_only, reinterpret_cast<float*>(border),
            gradient + (block - phi));
      }
    }
  }
}

}  // namespace gak_cuda

namespace {

// Within what a block may use without asking for more. The host side refuses longer sequences.
constexpr int kLongest = 1024;
constexpr size_t kShared = sizeof(gak_cuda::Cell) * kLongest * gak_cuda::kPairsPerBlock;
const dim3 kThreads(gak_cuda::kLanes, gak_cuda::kPairsPerBlock);

void check_index(const Tensor& index, const Tensor& distances) {
  STD_TORCH_CHECK(
      index.is_cuda() && index.get_device_index() == distances.get_device_index() &&
          index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.is_contiguous(),
      "Starts, lengths and groups must be contiguous int64 vectors on the GPU of `distances`.");
}

const int64_t* integers(const Tensor& index) {
  return static_cast<const int64_t*>(index.const_data_ptr());
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

gak_cuda::Prefixes checked(
    const Tensor& distances, const Tensor& row_start, const Tensor& row_length, const Tensor& column_start,
    const Tensor& column_length, double delta, bool own) {
  STD_TORCH_CHECK(
      distances.is_cuda() && distances.scalar_type() == ScalarType::Float && distances.dim() == 2 &&
          distances.is_contiguous(),
      "`distances` must be a contiguous float32 matrix on a GPU.");
  for (const Tensor* index : {&row_start, &row_length, &column_start, &column_length}) {
    check_index(*index, distances);
  }
  return {integers(row_start), integers(row_length), integers(column_start), integers(column_length),
          row_start.size(0), column_length.size(0), 1 / (delta * delta), own};
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "The alignment kernel could not be launched: ", cudaGetErrorString(error));
}

int64_t blocks_for(int64_t warps) {
  return (warps + gak_cuda::kPairsPerBlock - 1) / gak_cuda::kPairsPerBlock;
}

}  // namespace

Tensor gak_log_pairs(
    const Tensor& distances, const Tensor& row_start, const Tensor& row_length, const Tensor& column_start,
    const Tensor& column_length, double delta, bool own, bool symmetric) {
  const gak_cuda::Prefixes prefixes =
      checked(distances, row_start, row_length, column_start, column_length, delta, own);
  const torch::stable::accelerator::DeviceGuard guard(distances.get_device_index());
  const int64_t sizes[] = {prefixes.rows, prefixes.columns};
  Tensor result = torch::stable::new_empty(distances, {sizes, 2}, ScalarType::Double);
  gak_cuda::log_pairs<<<blocks_for(prefixes.rows * prefixes.columns), kThreads, kShared, current_stream(distances)>>>(
      prefixes, floats(distances), distances.size(1), symmetric, kLongest,
      static_cast<double*>(result.mutable_data_ptr()));
  check_launch();
  return result;
}

Tensor gak_log_pairs_backward(
    const Tensor& gradient, const Tensor& distances, const Tensor& row_start, const Tensor& row_length,
    const Tensor& row_group, const Tensor& column_start, const Tensor& column_length, const Tensor& column_group,
    int64_t longest_row, int64_t longest_column, double delta, bool own, bool expected_only) {
  const gak_cuda::Prefixes prefixes =
      checked(distances, row_start, row_length, column_start, column_length, delta, own);
  STD_TORCH_CHECK(
      gradient.is_cuda() && gradient.scalar_type() == ScalarType::Float && gradient.is_contiguous() &&
          gradient.dim() == 2 && gradient.size(0) == prefixes.rows && gradient.size(1) == prefixes.columns,
      "`gradient` must be a contiguous float32 matrix of rows x columns on the GPU of `distances`.");
  check_index(row_group, distances);
  check_index(column_group, distances);
  STD_TORCH_CHECK(
      longest_row >= 1 && longest_row <= kLongest && longest_column >= 1 && longest_column <= kLongest,
      "The CUDA kernel takes sequences of at most ", kLongest, " slices.");
  const torch::stable::accelerator::DeviceGuard guard(distances.get_device_index());
  const int64_t row_groups = row_group.size(0) - 1, column_groups = column_group.size(0) - 1;
  const int64_t cells = gak_cuda::kept_cells(int(longest_row), int(longest_column));
  // As many warps as fit into the memory of the distances, or into 16 MiB, but a block of them at least.
  const int64_t distance_bytes = distances.size(0) * distances.size(1) * int64_t(sizeof(float));
  const int64_t budget = distance_bytes > (1 << 24) ? distance_bytes : 1 << 24;
  int64_t warps = budget / (cells * int64_t(sizeof(gak_cuda::Kept)));
  warps = warps < 1 ? 1 : warps > row_groups * column_groups ? row_groups * column_groups : warps;
  const int64_t blocks = blocks_for(warps);
  const int64_t sizes[] = {blocks * gak_cuda::kPairsPerBlock, cells * 4};
  Tensor workspace = torch::stable::new_empty(distances, {sizes, 2});
  const int64_t shape[] = {distances.size(0), distances.size(1)};
  Tensor result = torch::stable::new_zeros(distances, {shape, 2});
  gak_cuda::log_pairs_backward<<<blocks, kThreads, kShared, current_stream(distances)>>>(
      prefixes, floats(gradient), floats(distances), distances.size(1), integers(row_group), row_groups,
      integers(column_group), column_groups, expected_only, kLongest, cells,
      static_cast<gak_cuda::Kept*>(workspace.mutable_data_ptr()), static_cast<float*>(result.mutable_data_ptr()));
  check_launch();
  return result;
}
