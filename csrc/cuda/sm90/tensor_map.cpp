// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace flash::cuda::sm90 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("flash_attn: the driver has no cuTensorMapEncodeTiled (CUDA 12)");
    return reinterpret_cast<EncodeTiled>(address);
  }();
  return function;
}

/// The stride that TMA is told: one that is never used, because the dimension has one entry, may
/// break its rules.
int64_t told_stride(int64_t stride, int size, int columns) {
  return size == 1 ? (columns + 7) / 8 * 8 : stride;
}

}  // namespace

std::string why_no_tensor_map(const char* name, const TensorView& tensor,
                              const TensorShape& shape) {
  const auto is_legal = [](int64_t stride) {
    return stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39);
  };
  if (!tensor.data) return "";
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0)
    return std::string(name) + " starts at an address that is not a multiple of 16 bytes";
  if (!is_legal(told_stride(tensor.batch_stride, shape.batch, shape.columns)) ||
      !is_legal(told_stride(tensor.head_stride, shape.heads, shape.columns)) ||
      !is_legal(told_stride(tensor.row_stride, shape.rows, shape.columns)))
    return std::string(name) + " has a stride that is 0 or not a multiple of 8 elements";
  return "";
}

CUtensorMap make_tensor_map(DType dtype, const TensorView& tensor, const TensorShape& shape,
                            int box_rows) {
  const cuuint64_t sizes[4] = {cuuint64_t(shape.columns), cuuint64_t(shape.rows),
                               cuuint64_t(shape.heads), cuuint64_t(shape.batch)};
  const cuuint64_t byte_strides[3] = {
      2 * cuuint64_t(told_stride(tensor.row_stride, shape.rows, shape.columns)),
      2 * cuuint64_t(told_stride(tensor.head_stride, shape.heads, shape.columns)),
      2 * cuuint64_t(told_stride(tensor.batch_stride, shape.batch, shape.columns))};
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode_tiled()(&map,
                     dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                     4, tensor.data, sizes, byte_strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("flash_attn: cuTensorMapEncodeTiled failed with code " +
                             std::to_string(int(result)));
  return map;
}

}  // namespace flash::cuda::sm90
