// SPDX-License-Identifier: BSD-3-Clause
// dV = P^T dO and dK = scale dS^T Q on CUDA cores: any head dim, any dtype, deterministic.
//
// One CTA computes a panel of kPanel columns of dK and of dV for kRows keys of one (sequence, KV
// head). Rows of its tiles are keys, columns are queries; the mask is the transposed one, so that
// the loop bounds and the element test are the forward's. Over the query heads of the group and
// their blocks of kCols queries, in this order:
//
//   S^T = K Q^T, E = P^T = exp(S^T - lse)  E to shared memory, read by the warp that wrote it
//   dV += E dO
//   dP^T = V dO^T, E = dS^T = E o (dP^T - delta)
//   dK += E Q
//   dQ += E^T K                            DqSums::kAtomic only
//
// The sums of a whole group stay in registers: one rounding. DqSums::kSeparate leaves dQ to
// backward_q.cuh: deterministic, and two more products. DqSums::kAtomic adds each tile's part to
// dQ in global memory; the CTAs of a head start at different query blocks, so that they seldom
// meet.
#pragma once

#include "cuda/common/backward_bias.cuh"
#include "cuda/common/fill_rows.cuh"
#include "cuda/simt/backward_q.cuh"
#include "primitives/ptx/red_add.cuh"

namespace flash::cuda::simt {

enum class DqSums : uint8_t { kSeparate, kAtomic };

template <class Base, DqSums kDqSums_>
struct KeyValueTraits : Base {
  static constexpr DqSums kDqSums = kDqSums_;
  static constexpr bool kAddsDq = kDqSums == DqSums::kAtomic;
  using Real = typename Base::Real;
  static constexpr int kCols = Base::kCols;
  static_assert(!kAddsDq || std::is_same_v<typename Base::Element, float>,
                "parts of dQ are added in the type of sums");

  struct SharedStorage : Base::SharedStorage {
    Real lse[kCols], delta[kCols];  // of the queries of the tile
    FmaTranspose<typename Base::Tile, kAddsDq ? kCols : 8> transposed;
  };
};

/// Adds scale x part to columns [d, d + 4) of row q of dQ, where they lie inside.
struct DqRows {
  float* data;
  int64_t row_stride;
  int rows, width;
  float scale;
  bool aligned;

  __device__ DqRows(const BackwardParams& p, const Sequence& q_seq, int head)
      : data(static_cast<float*>(p.dq.data) + p.dq.offset(q_seq, head)),
        row_stride(p.dq.row_stride),
        rows(q_seq.length),
        width(p.head_dim),
        scale(float(p.softmax_scale)),
        aligned(width % 4 == 0 && rows_are_aligned<4>(data, row_stride)) {}

  __device__ __forceinline__ void add(int q, int d, float a, float b, float c, float e) const {
    if (q >= rows) return;
    float* const at = data + q * row_stride + d;
    const float part[4] = {a * scale, b * scale, c * scale, e * scale};
    if (aligned) {
      if (d < width) red_add_quad(at, part);
    } else {
      for (int i = 0; i < 4; ++i)
        if (d + i < width) atomicAdd(at + i, part[i]);
    }
  }
};

/// dQ += dS K for a tile of kRows keys and kCols queries; dS^T, keys first, is in shared memory.
template <class Traits, class Shared, class Keys>
__device__ __forceinline__ void add_dq(const DqRows& dq, Shared& shared, int& stage, const Keys& k,
                                       int first_k, int first_q) {
  using Tile = typename Traits::Tile;
  constexpr int kCols = Traits::kCols, kPanel = Traits::kPanel;
  if constexpr (kCols == Traits::kRows) {  // a tile of queries x head dim
    typename Tile::template Registers<kPanel> acc = {};
    product_ab<Tile, kPanel>(acc, shared.transposed, shared.stages.b, stage, k, first_k, 0);
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kPanel / 8; j += 4)
        dq.add(first_q + Tile::row(i), Tile::col(j), acc[i][j], acc[i][j + 1], acc[i][j + 2],
               acc[i][j + 3]);
  } else {  // a tile of head dim x queries
    static_assert(kPanel == Traits::kRows, "the head dim is in the place of the rows");
    typename Tile::template Registers<kCols> acc = {};
    product_atb<Tile, kCols>(acc, k, first_k, shared.stages.a, stage, shared.transposed);
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
      dq.add(first_q + Tile::col(j), Tile::row(0), acc[0][j], acc[1][j], acc[2][j], acc[3][j]);
  }
}

template <class Traits, class Params>
__global__ void __launch_bounds__(Traits::Tile::kThreads)
    backward_kv_kernel(const __grid_constant__ Params p, const RowView delta, const CtaGrid grid) {
  using Tile = typename Traits::Tile;
  using Real = typename Traits::Real;
  using Element = typename Traits::Element;
  using Score = PairScore<Element, Traits::kVariant>;
  using Keys = AttendedKeys<Element, Traits::kVariant>;
  using Registers = typename Tile::template Registers<Traits::kCols>;
  constexpr int kCols = Traits::kCols, kPanel = Traits::kPanel;
  constexpr bool kGiven = kGradientIsGiven<Params>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);

  const CtaPlace cta = CtaPlace::of(blockIdx.x, grid);
  const Sequence q_seq = Sequence::of(p.q_layout, cta.batch);
  const Sequence k_seq = Sequence::of(p.k_layout, cta.batch);
  const int first_k = cta.block * Traits::kRows, first_col = cta.panel * kPanel;
  if (first_k >= k_seq.length) return;

  const IntervalMask mask = p.mask_of(q_seq, k_seq).transposed();
  const BlockRanges range = mask.key_blocks<Traits::kRows, kCols>(cta.block);
  typename Tile::template Registers<kPanel> acc_dk = {}, acc_dv = {};
  const int visited = range.visit.end - range.visit.begin;
  const int first_step = Traits::kAddsDq ? cta.block : 0;
  int stage = 0;
#pragma unroll 1
  for (int in_group = 0; in_group < p.gqa_ratio(); ++in_group) {
    const int head = cta.head * p.gqa_ratio() + in_group;
    const Score score(p, cta.batch, head, q_seq, k_seq);
    const Keys keys{p.features.score_mod, cta.batch, head};
    const MatrixRows<Real, Element> q(p.q.data, p.q.offset(q_seq, head), p.q.row_stride,
                                      q_seq.length, p.head_dim);
    const MatrixRows<Real, Element, Keys> k(p.k.data, p.k.offset(k_seq, cta.head), p.k.row_stride,
                                            k_seq.length, p.head_dim, keys);
#pragma unroll 1
    for (int step = 0; step < visited; ++step) {
      const int m = range.visit.begin + (step + first_step) % visited;
      const int first_q = m * kCols;
      const bool needs_mask = m < range.full.begin || m >= range.full.end;
      if (threadIdx.x < kCols) {
        shared.lse[threadIdx.x] = lse_of<Real>(p.lse, q_seq, head, first_q + threadIdx.x);
        shared.delta[threadIdx.x] = delta_of<Real>(delta, q_seq, head, first_q + threadIdx.x);
      }
      __syncthreads();
      Registers acc = {};
      product_abt<Tile, kCols>(acc, shared.stages, stage, k, first_k, q, first_q, p.head_dim);
      shared.scores.write_weights(score, acc, [&](int i, int j) -> TilePlace<Real> {
        const int row = first_k + Tile::row(i), col = first_q + Tile::col(j);
        const bool kept = !needs_mask || mask.keep(row, col);
        return {col, row, kept && row < k_seq.length, shared.lse[Tile::col(j)]};
      });
      if constexpr (!kGiven) {
        const MatrixRows<Real, Element> dout(p.dout.data, p.dout.offset(q_seq, head),
                                             p.dout.row_stride, q_seq.length, p.head_dim_v);
        if (p.dv.data)
          product_ab<Tile, kPanel>(acc_dv, shared.scores.exchange, shared.stages.b, stage, dout,
                                   first_q, first_col,
                                   [&](Real weight) { return score.kept_weight(weight); });
        if (!p.dk.data) continue;
        const MatrixRows<Real, Element, Keys> v(p.v.data, p.v.offset(k_seq, cta.head),
                                                p.v.row_stride, k_seq.length, p.head_dim_v, keys);
        fill_registers(acc, Real(0));
        product_abt<Tile, kCols>(acc, shared.stages, stage, v, first_k, dout, first_q,
                                 p.head_dim_v);
      }
      shared.scores.write_gradients(score, [&](int i, int j, Real weight) {
        const int row = first_k + Tile::row(i), col = first_q + Tile::col(j);
        Real dp = acc[i][j];
        if constexpr (kGiven) dp = given_gradient<Element>(p, {cta.batch, head, col, row});
        return acc[i][j] = score.gradient(weight, dp, shared.delta[Tile::col(j)]);
      });
      product_ab<Tile, kPanel>(acc_dk, shared.scores.exchange, shared.stages.b, stage, q, first_q,
                               first_col);
      if constexpr (Traits::kAddsDq) {
        shared.transposed.write([&](int i, int j) { return acc[i][j]; });
        __syncthreads();
        add_dq<Traits>(DqRows(p, q_seq, head), shared, stage, k, first_k, first_q);
      }
    }
  }

  const Real scale = Real(p.softmax_scale);
  const Real dv_scale = p.features.dropout.enabled() ? Real(p.features.dropout.scale) : Real(1);
  if (p.dk.data)
    store_rows<Tile, kPanel>(static_cast<Element*>(p.dk.data) + p.dk.offset(k_seq, cta.head),
                             p.dk.row_stride, k_seq.length, p.head_dim, first_k, first_col,
                             [&](int i, int j) { return acc_dk[i][j] * scale; });
  if constexpr (!kGiven) {
    if (p.dv.data)
      store_rows<Tile, kPanel>(static_cast<Element*>(p.dv.data) + p.dv.offset(k_seq, cta.head),
                               p.dv.row_stride, k_seq.length, p.head_dim_v, first_k, first_col,
                               [&](int i, int j) { return acc_dv[i][j] * dv_scale; });
  }
}

template <class Traits, class Params>
void launch_backward_kv(const Params& p, const RowView& delta, void* stream) {
  int width = 1;
  if (p.dk.data && p.head_dim > width) width = p.head_dim;
  if constexpr (!kGradientIsGiven<Params>) {
    if (p.dv.data && p.head_dim_v > width) width = p.head_dim_v;
  }
  const int panels = int(ceil_div(width, Traits::kPanel));
  const int blocks = int(ceil_div(p.k_layout.max, Traits::kRows));
  const CtaGrid grid = CtaGrid::of(p, panels, blocks, p.num_heads_k, CtaGrid::Longest::kFirstRows);
  launch(backward_kv_kernel<Traits, Params>, grid.ctas(), Traits::Tile::kThreads,
         sizeof(typename Traits::SharedStorage), stream, p, delta, grid);
}

/// Whether one kernel may compute all three gradients: it has one panel, needs the shared memory of
/// compute capability 8.0 or 9.0, and gives the sums of dQ no fixed order.
template <class Traits>
bool may_add_dq(const BackwardParams& p) {
  if (p.deterministic || !p.dq.data || !p.dk.data || !p.dv.data) return false;
  if (p.head_dim > Traits::kPanel || p.head_dim_v > Traits::kPanel) return false;
  return size_t(max_shared_bytes()) >= sizeof(typename Traits::SharedStorage);
}

template <DType kDType, int kPanel, Variant kVariant>
void launch_backward(const BackwardParams& p, const RowView& delta, void* stream) {
  using Base = BackwardTraits<kDType, kPanel, kVariant>;
  if constexpr (kDType == DType::kFloat32 && kVariant == Variant::kPlain) {
    // Three accumulators of 128 columns leave registers for 64 queries at a time.
    constexpr int kCols = kPanel == 64 ? 128 : 64;
    using Traits = KeyValueTraits<BackwardTraits<kDType, kPanel, kVariant, kCols>, DqSums::kAtomic>;
    if (may_add_dq<Traits>(p)) {
      launch_fill_rows<kDType>(p.dq, RowView{}, p.q_layout, p.num_heads, p.batch, p.head_dim,
                               Fill::kAll, stream);
      return launch_backward_kv<Traits>(p, delta, stream);
    }
  }
  if (p.dk.data || p.dv.data)
    launch_backward_kv<KeyValueTraits<Base, DqSums::kSeparate>>(p, delta, stream);
  if (p.dq.data) launch_backward_q<kDType, kPanel, kVariant>(p, delta, stream);
}

template <DType kDType>
void launch_weights_backward(const WeightsBackwardParams& p, void* stream) {
  constexpr int kPanel = 64;
  if (p.dk.data)
    launch_backward_kv<
        KeyValueTraits<BackwardTraits<kDType, kPanel, Variant::kGeneral>, DqSums::kSeparate>>(
        p, RowView{}, stream);
  if (p.dq.data || p.dlse.data)
    launch_backward_q<kDType, kPanel, Variant::kGeneral>(p, RowView{}, stream);
  if (p.dbias) launch_backward_bias<kDType>(p, RowView{}, stream);
}

}  // namespace flash::cuda::simt
