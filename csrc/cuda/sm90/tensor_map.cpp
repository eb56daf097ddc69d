// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <limits>
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

/// A thread of autograd whose first call this is has no context: torch sets a device only where it
/// differs from the thread's.
template <class... Arguments>
CUresult encode_in_context(Arguments... arguments) {
  const CUresult result = encode_tiled()(arguments...);
  int device = 0;
  if (result != CUDA_ERROR_INVALID_CONTEXT || cudaGetDevice(&device) != cudaSuccess ||
      cudaSetDevice(device) != cudaSuccess)
    return result;
  return encode_tiled()(arguments...);
}

/// A tensor (batch, heads, rows, columns) as TMA is told of it; packed: of one batch entry.
struct Shape {
  int64_t batch, heads, rows, columns;
  int64_t batch_stride, head_stride, row_stride;

  Shape(const ForwardParams& p, const TensorView& tensor, const SequenceLayout& layout, int heads_,
        int columns_)
      : batch(layout.packed() ? 1 : p.batch),
        heads(heads_),
        rows(layout.packed() ? layout.total : layout.max),
        columns(columns_),
        batch_stride(told(tensor.batch_stride, batch)),
        head_stride(told(tensor.head_stride, heads)),
        row_stride(told(tensor.row_stride, rows)) {}

 private:
  /// A stride that is never used, because the dimension has one entry, may break TMA's rules.
  int64_t told(int64_t stride, int64_t size) const {
    return size <= 1 ? (columns + 7) / 8 * 8 : stride;
  }
};

/// Whether bounds are those of a sequence, not of the tensor. TMA has no tensors without rows: such
/// a one is all outside of its sequences.
bool has_sequence_bounds(const SequenceLayout& layout, const Shape& shape) {
  return layout.ragged() || shape.rows == 0;
}

/// Boxes of `box_sizes` elements, 1 in the dimensions that follow, in the swizzle that spans a row
/// of the box: 32, 64 or 128 bytes.
template <size_t kDims, size_t kBoxDims>
CUtensorMap encode(CUtensorMapDataType type, int element_bytes, const void* data,
                   const std::array<int64_t, kDims>& sizes,
                   const std::array<int64_t, kDims - 1>& strides,
                   const std::array<int, kBoxDims>& box_sizes) {
  cuuint64_t dims[kDims], byte_strides[kDims - 1];
  cuuint32_t box[kDims], steps[kDims];
  std::copy(sizes.begin(), sizes.end(), dims);
  std::transform(strides.begin(), strides.end(), byte_strides,
                 [&](int64_t stride) { return element_bytes * cuuint64_t(stride); });
  std::fill_n(box, kDims, 1);
  std::fill_n(steps, kDims, 1);
  std::copy(box_sizes.begin(), box_sizes.end(), box);
  const auto swizzle = box[0] * element_bytes == 32   ? CU_TENSOR_MAP_SWIZZLE_32B
                       : box[0] * element_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                      : CU_TENSOR_MAP_SWIZZLE_128B;
  CUtensorMap map;
  const CUresult result =
      encode_in_context(&map, type, kDims, const_cast<void*>(data), dims, byte_strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("flash_attn: cuTensorMapEncodeTiled failed with code " +
                             std::to_string(int(result)));
  return map;
}

CUtensorMapDataType tma_type(DType dtype) {
  return dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

}  // namespace

std::string why_no_tma_tensor(const char* name, const ForwardParams& p, const TensorView& tensor,
                              const SequenceLayout& layout, int heads, int columns) {
  const auto is_legal = [](int64_t stride) {
    return stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39);
  };
  if (!tensor.data) return "";
  const Shape shape(p, tensor, layout, heads, columns);
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0)
    return std::string(name) + " starts at an address that is not a multiple of 16 bytes";
  if (!is_legal(shape.batch_stride) || !is_legal(shape.head_stride) || !is_legal(shape.row_stride))
    return std::string(name) + " has a stride that is 0 or not a multiple of 8 elements";
  if (!has_sequence_bounds(layout, shape)) return "";
  if (shape.batch > 1 && shape.batch_stride % shape.row_stride != 0)
    return std::string(name) + " has a batch stride that is not a multiple of its row stride";
  const int64_t last = shape.batch_stride / shape.row_stride * (shape.batch - 1) + shape.rows;
  if (shape.row_stride >= TmaTensor::kWrap || last > std::numeric_limits<int>::max())
    return std::string(name) + " has too many rows";
  return "";
}

TmaTensor make_tma_tensor(const ForwardParams& p, const TensorView& tensor,
                          const SequenceLayout& layout, int heads, int columns, int box_rows,
                          int log2_heads) {
  const Shape s(p, tensor, layout, heads, columns);
  const bool is_ragged = has_sequence_bounds(layout, s);
  constexpr int64_t kAll = std::numeric_limits<int>::max();
  alignas(16) static const char nothing[16] = {};  // an address that is never read
  std::array<int64_t, 5> sizes{s.columns, s.heads, s.rows, s.batch, 1};
  std::array<int64_t, 4> strides{s.head_stride, s.row_stride, s.batch_stride, 8};
  if (is_ragged) {
    sizes = {s.columns, s.heads, TmaTensor::kRaggedRows, kAll, kAll};
    strides = {s.head_stride, s.row_stride, s.row_stride, TmaTensor::kWrap - s.row_stride};
  }
  return {.map = encode<5, 3>(tma_type(p.dtype), 2, tensor.data ? tensor.data : nothing, sizes,
                              strides, {64, 1 << log2_heads, box_rows >> log2_heads}),
          .wrap = is_ragged ? TmaTensor::kRaggedRows : 0,
          .slice_rows = is_ragged && s.batch > 1 ? int(s.batch_stride / s.row_stride) : 0,
          .log2_heads = log2_heads};
}

CUtensorMap make_bias_gradient_map(const BackwardParams& p, int rows, int cols) {
  const int64_t row = p.k_layout.max, matrix = row * p.q_layout.max;
  return encode<4, 2>(tma_type(p.dtype), 2, p.dbias, {row, p.q_layout.max, p.num_heads, p.batch},
                      {row, matrix, matrix * p.num_heads}, {cols, rows});
}

PairKind pairs_in_tiles(const ForwardParams& p) {
  const auto fits = [&](const PairView& view, int bytes) {
    const auto is_legal = [&](int64_t stride) {
      return stride >= 0 && stride * bytes % 16 == 0 && stride * bytes < int64_t{1} << 40;
    };
    return view.data && p.k_layout.max > 0 && view.k_stride == 1 &&
           reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && is_legal(view.q_stride) &&
           is_legal(view.head_stride) && is_legal(view.batch_stride);
  };
  const ScoreMod& mod = p.features.score_mod;
  if (!mod.bias_is_float32 && fits(mod.bias, 2)) return PairKind::kBias;
  return fits(mod.mask, 1) ? PairKind::kMask : PairKind::kNone;
}

PairTiles make_pair_tiles(const ForwardParams& p, int rows, int cols) {
  const PairKind kind = pairs_in_tiles(p);
  if (kind == PairKind::kNone) return {.map = {}, .kind = kind};
  const bool is_bias = kind == PairKind::kBias;
  const PairView& view = is_bias ? p.features.score_mod.bias : p.features.score_mod.mask;
  const int bytes = is_bias ? 2 : 1;
  return {encode<4, 2>(is_bias ? tma_type(p.dtype) : CU_TENSOR_MAP_DATA_TYPE_UINT8, bytes,
                       view.data, {p.k_layout.max, p.q_layout.max, p.num_heads, p.batch},
                       {view.q_stride, view.head_stride, view.batch_stride},
                       {std::min(cols, 128 / bytes), rows}),
          kind};
}

}  // namespace flash::cuda::sm90
