// Compiled for several GPUs, never run on one: there was none. The recursion of a pair is that of pair.h, whose host
// build is tested; what is new here is that 32 threads are its lanes.
#include "../torch-ext/torch_binding.h"

#include <cuda_runtime.h>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "pair.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Part of libtorch, though declared only where CUDA builds of it are installed.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace gak_cuda {

constexpr int kPairsPerBlock = 4;

// One warp a pair. `border` has `longest` cells for every warp, in shared memory.
__global__ void log_pairs(
    const float* phi, int64_t stride, const int64_t* row_start, const int64_t* row_length, const int64_t* column_start,
    const int64_t* column_length, int64_t rows, int64_t columns, float inverse_square, bool own, bool symmetric,
    int longest, double* result) {
  extern __shared__ Cell shared[];
  Cell* border = shared + threadIdx.y * longest;
  const int lane = threadIdx.x;
  const int64_t pair = int64_t(blockIdx.x) * kPairsPerBlock + threadIdx.y;
  if (pair >= rows * columns) {
    return;
  }
  const int64_t p = pair / columns, q = pair % columns;
  if (symmetric && q < p) {
    return;
  }
  const int64_t a = row_start[p], b = own ? a : column_start[q];
  const int n = int(row_length[p]), m = own ? n : int(column_length[q]);
  const float scale = inverse_square / float(n + column_length[q]);
  for (int first = 0; first < n; first += kLanes) {
    Cell left = nothing();
    Cell corner = lane == 0 ? from_border(border, first, -1, m) : nothing();
    for (int t = 0; t < m + kLanes - 1; ++t) {
      Cell up;
      up.mantissa = __shfl_up_sync(0xffffffffu, left.mantissa, 1);
      up.exponent = __shfl_up_sync(0xffffffffu, left.exponent, 1);
      if (lane == 0) {
        up = from_border(border, first, t, m);
      }
      // Lane 0 has read column t before lane 31 writes column t - 31.
      __syncwarp();
      const int row = first + lane, column = t - lane;
      Cell value = nothing();
      if (row < n && column >= 0 && column < m) {
        value = next(left, up, corner, phi[(a + row) * stride + b + column] * scale);
        if (lane == kLanes - 1) {
          border[column] = value;
        }
        if (row == n - 1 && column == m - 1) {
          const double logarithm = log(double(value.mantissa)) + value.exponent * 0.6931471805599453;
          result[p * columns + q] = logarithm;
          if (symmetric) {
            result[q * columns + p] = logarithm;
          }
        }
      }
      left = value;
      corner = up;
    }
    // What lane 31 wrote is read by lane 0 of the next strip.
    __syncwarp();
  }
}

}  // namespace gak_cuda

Tensor gak_log_pairs(
    const Tensor& distances, const Tensor& row_start, const Tensor& row_length, const Tensor& column_start,
    const Tensor& column_length, double delta, bool own, bool symmetric) {
  STD_TORCH_CHECK(
      distances.is_cuda() && distances.scalar_type() == ScalarType::Float && distances.dim() == 2 &&
          distances.is_contiguous(),
      "`distances` must be a contiguous float32 matrix on a GPU.");
  for (const Tensor* index : {&row_start, &row_length, &column_start, &column_length}) {
    STD_TORCH_CHECK(
        index->is_cuda() && index->get_device_index() == distances.get_device_index() &&
            index->scalar_type() == ScalarType::Long && index->dim() == 1 && index->is_contiguous(),
        "Starts and lengths must be contiguous int64 vectors on the GPU of `distances`.");
  }
  const int64_t rows = row_start.size(0), columns = column_length.size(0);
  const int64_t sizes[] = {rows, columns};
  Tensor result = torch::stable::new_empty(distances, {sizes, 2}, ScalarType::Double);
  // Enough for every sequence, within what a block may use without asking for more.
  const int longest = 1024;
  const size_t bytes = sizeof(gak_cuda::Cell) * longest * gak_cuda::kPairsPerBlock;
  const int64_t blocks = (rows * columns + gak_cuda::kPairsPerBlock - 1) / gak_cuda::kPairsPerBlock;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(distances.get_device_index(), &stream));
  gak_cuda::log_pairs<<<dim3(blocks), dim3(gak_cuda::kLanes, gak_cuda::kPairsPerBlock), bytes,
                        static_cast<cudaStream_t>(stream)>>>(
      static_cast<const float*>(distances.const_data_ptr()), distances.size(1),
      static_cast<const int64_t*>(row_start.const_data_ptr()), static_cast<const int64_t*>(row_length.const_data_ptr()),
      static_cast<const int64_t*>(column_start.const_data_ptr()),
      static_cast<const int64_t*>(column_length.const_data_ptr()), rows, columns, float(1 / (delta * delta)), own,
      symmetric, longest, static_cast<double*>(result.mutable_data_ptr()));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "The alignment kernel could not be launched: ", cudaGetErrorString(error));
  return result;
}
