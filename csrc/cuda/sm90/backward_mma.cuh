// SPDX-License-Identifier: BSD-3-Clause
// Products and arithmetic of one warpgroup of the backward: 64 keys against a block of queries.
// S and dP are computed transposed (rows = keys), so that P^T and dS^T are A fragments of dV and dK
// without leaving the registers; only dS goes to shared memory, for dQ.
// Accumulator 4 j + 2 r + c of a thread: key 16 warp + lane / 4 + 8 r,
// query 8 j + 2 (lane % 4) + c.
#pragma once

#include "cuda/sm90/backward_traits.cuh"
#include "primitives/numeric.cuh"
#include "primitives/ptx/global_memory.cuh"
#include "primitives/ptx/shared_memory.cuh"
#include "primitives/ptx/stmatrix.cuh"

namespace flash::cuda::sm90 {

/// acc[64 x kRowsB] = A B^T over kDepth columns, such as S^T = K Q^T; one group of products. A
/// is 64 rows of a tile of kRowsA, B a whole tile.
template <class Element, int kDepth, int kRowsA, int kRowsB>
FLASH_DEVICE void issue_rows_by_rows(float (&acc)[kRowsB / 2], uint32_t rows_a,
                                     const uint16_t* rows_b) {
  constexpr uint64_t kLayout = ptx::descriptor_layout(16, 1024);
  const uint64_t a = ptx::descriptor(kLayout, rows_a);
  const uint64_t b = ptx::descriptor(kLayout, shared_address(rows_b));
  ptx::pin(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kDepth / 16; ++i) {
    ptx::Wgmma<Element, kRowsB>::template ss<0, 0>(
        acc, ptx::advance(a, ptx::k_major_step(i, kRowsA)),
        ptx::advance(b, ptx::k_major_step(i, kRowsB)), i > 0);
  }
  ptx::wgmma_commit();
}

/// acc[64 x kColumns] += fragment[64 x kRows] B, such as dV += P^T dO; one group. B is a tile.
template <class Element, int kColumns, int kRows>
FLASH_DEVICE void issue_fragment_by_rows(float (&acc)[kColumns / 2],
                                         uint32_t (&fragment)[kRows / 4], const uint16_t* rows) {
  const uint64_t b =
      ptx::descriptor(ptx::descriptor_layout(kRows * 128, 1024), shared_address(rows));
  ptx::pin(acc);
  ptx::pin(fragment);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    ptx::Wgmma<Element, kColumns>::template rs<1>(acc, &fragment[4 * i],
                                                  ptx::advance(b, ptx::mn_major_step(i)), 1);
  }
  ptx::wgmma_commit();
}

/// acc = this warpgroup's 64 x kDqN share of dQ = dS K over all keys of the CTA; one group.
template <class Traits>
FLASH_DEVICE void issue_dq(float (&acc)[Traits::kDqN / 2], const uint16_t* ds, const uint16_t* k,
                           int warpgroup) {
  const uint32_t first_row = Traits::kDqSplitsRows ? warpgroup * 64 * 128 : 0;
  const int column = Traits::kDqSplitsColumns ? warpgroup * Traits::kDqN : 0;
  const uint32_t first_column = column / 64 * Traits::kBlockN * 128 + column % 64 * 2;
  const uint64_t a =
      ptx::descriptor(ptx::descriptor_layout(16, 1024), shared_address(ds) + first_row);
  const uint64_t b = ptx::descriptor(ptx::descriptor_layout(Traits::kBlockN * 128, 1024),
                                     shared_address(k) + first_column);
  ptx::pin(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Traits::kBlockN / 16; ++i) {
    ptx::Wgmma<typename Traits::Element, Traits::kDqN>::template ss<0, 1>(
        acc, ptx::advance(a, ptx::k_major_step(i, Traits::kBlockM)),
        ptx::advance(b, ptx::mn_major_step(i)), i > 0);
  }
  ptx::wgmma_commit();
}

/// Columns that the two rows of this thread keep, for a whole tile: rows `row` and `row` + 8 of the
/// mask, which S^T takes transposed.
struct KeptColumns {
  Range of_row[2];

  KeptColumns() = default;
  FLASH_DEVICE KeptColumns(const IntervalMask& mask, int row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = row + 8 * r < mask.seqlen_q;
      of_row[r] = {exists ? mask.key_begin(row + 8 * r) : 0,
                   exists ? mask.key_end(row + 8 * r) : 0};
    }
  }
};

/// S = -inf where the mask drops the pair.
template <int kColumns>
FLASH_DEVICE void mask_scores(const KeptColumns& kept, float (&accS)[kColumns / 2], int block) {
  const int first_column = block * kColumns + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int begin = kept.of_row[r].begin - first_column, end = kept.of_row[r].end - first_column;
#pragma unroll
    for (int j = 0; j < kColumns / 4; ++j) {
      const int column = j / 2 * 8 + j % 2;
      if (column < begin || column >= end) accS[j / 2 * 4 + r * 2 + j % 2] = -INFINITY;
    }
  }
}

/// P^T = exp2(c S^T - lse log2 e) in place. The exponent is cut at 0: the rounding of scores beyond
/// 2^24 could otherwise make a weight of at most 1 infinite.
template <int kBlockM>
FLASH_DEVICE void probabilities(float (&accS)[kBlockM / 2], float scale_log2,
                                const float* lse_log2) {
  const uint32_t row_values = shared_address(lse_log2) + (threadIdx.x & 3) * 8;
#pragma unroll
  for (int j = 0; j < kBlockM / 8; ++j) {
    const float2 lse = ptx::load_shared_v2(row_values + j * 32);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float exponent = fmaf(accS[4 * j + e], scale_log2, e & 1 ? -lse.y : -lse.x);
      accS[4 * j + e] = exp2_approx(min_or_nan(exponent, 0.f));
    }
  }
}

template <class Element, int kCount>
FLASH_DEVICE void to_fragment(uint32_t (&fragment)[kCount], const float (&values)[2 * kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) fragment[i] = pack<Element>(values[2 * i], values[2 * i + 1]);
}

/// dS^T = P^T (dP^T - delta) in place of dP^T.
template <int kBlockM>
FLASH_DEVICE void scores_gradient(const float (&accP)[kBlockM / 2], float (&accdP)[kBlockM / 2],
                                  const float* delta) {
  const uint32_t row_values = shared_address(delta) + (threadIdx.x & 3) * 8;
#pragma unroll
  for (int j = 0; j < kBlockM / 8; ++j) {
    const float2 d = ptx::load_shared_v2(row_values + j * 32);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      accdP[4 * j + e] = accP[4 * j + e] * (accdP[4 * j + e] - (e & 1 ? d.y : d.x));
  }
}
/// The same from P in 16 bits: error of dS 3.0e-3 of its norm instead of 2.3e-3 (bf16).
template <class Element, int kBlockM>
FLASH_DEVICE void scores_gradient_16(const uint32_t (&rP)[kBlockM / 4], float (&accdP)[kBlockM / 2],
                                     const float* delta) {
  const uint32_t row_values = shared_address(delta) + (threadIdx.x & 3) * 8;
#pragma unroll
  for (int j = 0; j < kBlockM / 8; ++j) {
    const float2 d = ptx::load_shared_v2(row_values + j * 32);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 weight = unpack<Element>(rP[2 * j + r]);
      accdP[4 * j + 2 * r] = weight.x * (accdP[4 * j + 2 * r] - d.x);
      accdP[4 * j + 2 * r + 1] = weight.y * (accdP[4 * j + 2 * r + 1] - d.y);
    }
  }
}

/// Where a lane puts 16 bytes of this warp's part of dS of the queries 16 j ... 16 j + 15: rows =
/// queries, the swizzled chunk of this warpgroup's 64 keys.
FLASH_DEVICE uint32_t ds_place(uint32_t chunk, int warp, int j) {
  const int lane = threadIdx.x & 31;
  const int query = j * 16 + (lane & 7) + (lane >> 4) * 8;
  const int unit = (warp * 2 + (lane >> 3 & 1)) ^ (query & 7);
  return chunk + query * 128 + unit * 16;
}
/// dS^T fragments to shared dS.
template <int kBlockM>
FLASH_DEVICE void put_ds(uint32_t chunk, const uint32_t (&rdS)[kBlockM / 4], int warp) {
#pragma unroll
  for (int j = 0; j < kBlockM / 16; ++j)
    ptx::stmatrix_x4_transposed(ds_place(chunk, warp, j), &rdS[4 * j]);
}

/// Lane i of a quad gives v[0 ... 3] and gets v[i] of lanes 0 ... 3.
FLASH_DEVICE void transpose_quad(uint32_t (&v)[4]) {
  const bool is_odd = threadIdx.x & 1, is_high = threadIdx.x & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, is_odd ? v[j] : v[j + 1], 1);
    (is_odd ? v[j] : v[j + 1]) = got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, is_high ? v[j] : v[j + 2], 2);
    (is_high ? v[j] : v[j + 2]) = got;
  }
}

/// scale * acc to rows of a gradient of one sequence and head, 16 bytes per lane and row. `row` as
/// in mask_scores; what lies beyond the sequence and `columns` is not written. kInOne: by one
/// instruction, for which kernels that are short of registers spill (keys_kernel at head dim 256
/// 770 bytes instead of 280); else the compiler may split it.
template <class Element, int kColumns, bool kInOne = false>
FLASH_DEVICE void store_rows(const TensorView& gradient, const Sequence& sequence, int head,
                             const float (&acc)[kColumns / 2], float scale, int row, int columns) {
  if (!gradient.data) return;
  const int column = (threadIdx.x & 3) * 8;
  auto* to = static_cast<uint16_t*>(gradient.data) + gradient.offset(sequence, head) +
             row * gradient.row_stride + column;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns / 32; ++c) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = (c * 4 + j) * 4 + r * 2;
        v[j] = pack<Element>(acc[i] * scale, acc[i + 1] * scale);
      }
      transpose_quad(v);
      if (row + r * 8 >= sequence.length || column + c * 32 >= columns) continue;
      uint16_t* const place = to + r * 8 * gradient.row_stride + c * 32;
      if constexpr (kInOne) {
        ptx::store_global_v4(place, v);
      } else {
        *reinterpret_cast<uint4*>(place) = uint4{v[0], v[1], v[2], v[3]};
      }
    }
  }
}

}  // namespace flash::cuda::sm90
