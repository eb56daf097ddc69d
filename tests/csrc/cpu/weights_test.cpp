// SPDX-License-Identifier: BSD-3-Clause
// The attention weights of the CPU backend and their gradients against the formula in fp64, on
// every instruction set of this machine.
#include "cpu/backward_case.h"

using namespace flash;

namespace {

struct Gradients {
  std::vector<double> dq, dk, dlse, dbias;
};

/// W and its gradients, from the definition.
struct Formula {
  std::vector<double> weights;
  Gradients gradients;

  Formula(const WeightsBackwardParams& p, const std::vector<double>& dweights) {
    const int sq = p.q_layout.max, sk = p.k_layout.max, heads = p.average ? 1 : p.num_heads;
    const DType acc = reference::accumulation(p.dtype);
    int64_t bias_size = 1;
    for (int size : p.bias_shape) bias_size *= size;
    weights.assign(int64_t(p.batch) * heads * sq * sk, 0.0);
    gradients.dq.assign(int64_t(p.batch) * p.num_heads * sq * p.head_dim, 0.0);
    gradients.dk.assign(int64_t(p.batch) * p.num_heads_k * sk * p.head_dim, 0.0);
    gradients.dlse.assign(int64_t(p.batch) * p.num_heads * sq, 0.0);
    gradients.dbias.assign(bias_size, 0.0);
    for (int b = 0; b < p.batch; ++b) {
      for (int h = 0; h < p.num_heads; ++h) {
        const reference::Head head{p, b, h};
        for (int i = 0; i < sq; ++i) {
          const int64_t row = (int64_t(b) * p.num_heads + h) * sq + i;
          const double lse = reference::load(acc, p.lse.data, p.lse.offset(head.qs, h) + i);
          for (int j = 0; j < sk; ++j) {
            const double factor = head.dropout_factor(i, j) / (p.average ? p.num_heads : 1);
            const double weight = head.weight(i, j, lse) * factor;
            const int64_t at = ((int64_t(b) * heads + (p.average ? 0 : h)) * sq + i) * sk + j;
            weights[at] += weight;
            const double ds = weight * dweights[at];
            if (ds == 0) continue;
            gradients.dlse[row] -= ds;
            if (bias_size) {
              gradients.dbias[reference::bias_index(p.bias_shape, {b, h, i, j})] += ds;
            }
            const double dscore = ds * head.score(i, j).slope * p.softmax_scale;
            const int64_t key = (int64_t(b) * p.num_heads_k + head.hk) * sk + j;
            for (int d = 0; d < p.head_dim; ++d) {
              gradients.dq[row * p.head_dim + d] += dscore * head.k(j, d);
              gradients.dk[key * p.head_dim + d] += dscore * head.q(i, d);
            }
          }
        }
      }
    }
  }
};

/// A random call, outputs full of NaN beforehand.
class WeightsCall {
 public:
  WeightsBackwardParams p{};
  std::vector<double> dweights;

  WeightsCall(const ForwardCase& c, bool average, uint64_t seed)
      : base_(c, /*with_dlse=*/false, seed) {
    static_cast<ForwardParams&>(p) = base_.p;
    p.average = average;
    const int64_t size = int64_t(c.batch) * (average ? 1 : c.heads) * c.sq * c.sk;
    const int64_t rows = int64_t(c.batch) * c.heads * c.sq;
    weights_.resize(size * element_bytes(c.dtype) + 1);
    dweights_.resize(weights_.size());
    dlse_.resize(rows * accumulation_bytes(c.dtype) + 1);
    std::mt19937_64 generator(seed + 2);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size; ++i) {
      reference::store(c.dtype, dweights_.data(), i, normal(generator));
      dweights.push_back(reference::load(c.dtype, dweights_.data(), i));
    }
    p.weights = weights_.data();
    p.dweights = dweights_.data();
    p.dq = base_.p.dq, p.dk = base_.p.dk;
    p.dlse = {dlse_.data(), int64_t(c.heads) * c.sq, c.sq};
    p.dbias = base_.p.dbias;
    std::memcpy(p.bias_shape, base_.p.bias_shape, sizeof p.bias_shape);
  }
  std::vector<double> run(int num_threads) {
    ThreadWorkers workers(num_threads);
    std::memset(weights_.data(), 0xff, weights_.size());
    cpu::backend().weights(p, {nullptr, nullptr, &workers});
    return read(p.dtype, weights_.data(), int64_t(dweights.size()));
  }
  Gradients run_backward(int num_threads) {
    ThreadWorkers workers(num_threads);
    std::memset(dlse_.data(), 0xff, dlse_.size());
    base_.poison();
    const int64_t bytes = cpu::backend().weights_backward_workspace_bytes(p, num_threads);
    std::unique_ptr<char[], void (*)(void*)> workspace(
        static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256)), std::free);
    std::memset(workspace.get(), 0xff, bytes + 256);
    cpu::backend().weights_backward(p, {workspace.get(), nullptr, &workers});
    for (int i = 0; i < 256; ++i) CHECK(workspace[bytes + i] == char(0xff));
    return {base_.rows_of(p.dq, p.q_layout, p.num_heads, p.head_dim),
            base_.rows_of(p.dk, p.k_layout, p.num_heads_k, p.head_dim),
            read(reference::accumulation(p.dtype), dlse_.data(),
                 int64_t(p.batch) * p.num_heads * p.q_layout.max),
            read(base_.bias_dtype(), p.dbias, base_.bias_size())};
  }
  DType bias_dtype() const { return base_.bias_dtype(); }

 private:
  BackwardCall base_;
  std::vector<char> weights_, dweights_, dlse_;

  static std::vector<double> read(DType dtype, const void* data, int64_t count) {
    std::vector<double> result(count, 0.0);
    for (int64_t i = 0; data && i < count; ++i) result[i] = reference::load(dtype, data, i);
    return result;
  }
};

void check_values(const char* name, const ForwardCase& c, const std::vector<double>& got,
                  const std::vector<double>& expected, DType result, uint64_t seed) {
  double largest = 1;
  for (double x : expected) largest = std::fmax(largest, std::fabs(x));
  const double sums = 400 * roundoff(reference::accumulation(c.dtype)) * largest;
  CHECK(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const double bound = roundoff(result) * std::fabs(expected[i]) + sums +
                         (result == DType::kFloat16 ? 0x1p-25 : 0);
    if (!(std::fabs(got[i] - expected[i]) <= bound)) {
      std::fprintf(stderr,
                   "%s %s[%zu] dtype %d b %d h %d/%d sq %d sk %d d %d scale %g softcap %g bias %d "
                   "mask %d broadcast %d alibi %d sink %d dropout %g; seed %llu\n",
                   cpu::current_isa(), name, i, int(c.dtype), c.batch, c.heads, c.heads_k, c.sq,
                   c.sk, c.d, c.scale, c.softcap, c.bias, c.bool_mask, c.broadcast, c.alibi, c.sink,
                   c.dropout_p, (unsigned long long)seed);
    }
    CHECK_NEAR(got[i], expected[i], bound);
  }
}

void check_case(const ForwardCase& c, bool average, uint64_t seed) {
  WeightsCall call(c, average, seed);
  const Formula expected(call.p, call.dweights);
  const DType acc = reference::accumulation(c.dtype);
  const std::vector<double> weights = call.run(1);
  check_values("weights", c, weights, expected.weights, c.dtype, seed);
  const Gradients got = call.run_backward(1);
  check_values("dq", c, got.dq, expected.gradients.dq, c.dtype, seed);
  check_values("dk", c, got.dk, expected.gradients.dk, c.dtype, seed);
  check_values("dlse", c, got.dlse, expected.gradients.dlse, acc, seed);
  if (c.bias) {
    check_values("dbias", c, got.dbias, expected.gradients.dbias, call.bias_dtype(), seed);
  }
  for (int threads : {2, 3}) {
    CHECK(same_bits(weights, call.run(threads)));
    const Gradients other = call.run_backward(threads);
    CHECK(same_bits(got.dq, other.dq) && same_bits(got.dk, other.dk) &&
          same_bits(got.dlse, other.dlse) && same_bits(got.dbias, other.dbias));
  }
}

ForwardCase random_case(std::mt19937_64& generator) {
  Choice choose{generator};
  ForwardCase c;
  c.batch = choose({1, 2});
  c.heads_k = choose({1, 2});
  c.heads = c.heads_k * choose({1, 2, 3});
  c.sq = choose({0, 1, 7, 47, 49, 97, 130});
  c.sk = choose({0, 1, 5, 63, 64, 65, 150});
  c.d = choose({0, 1, 8, 16, 64, 80});
  c.scale = choose({0.125, 0.3, -0.2, 0.0});
  c.mask = {choose({false, true}), choose({kUnbounded, kUnbounded, 0, 10, 70}),
            choose({kUnbounded, 0, 3, 50}), choose({0, 0, 20})};
  c.order = choose({Order::kHeadsFirst, Order::kRowsFirst});
  if (choose.one_in(3)) c.softcap = choose({1.5, 30.0});
  c.bias = choose.one_in(2);
  c.bias_is_float32 = choose.one_in(2);
  c.bool_mask = choose.one_in(3);
  c.broadcast = int(generator() % 16);
  c.alibi = choose.one_in(3);
  c.sink = choose.one_in(3);
  if (choose.one_in(2)) c.dropout_p = choose({0.1, 0.5, 1.0});
  return c;
}

/// NaN in a key reaches the weights of the queries that keep it, and no other.
void check_poison(DType dtype) {
  constexpr int kRows = 90, kBad = 40;
  const ForwardCase c{.dtype = dtype,
                      .heads = 2,
                      .sq = kRows,
                      .sk = kRows,
                      .d = 32,
                      .mask = {false, kUnbounded, 0, 0}};
  WeightsCall clean(c, /*average=*/true, seed_of_run), dirty(c, /*average=*/true, seed_of_run);
  reference::store(dtype, dirty.p.k.data, kBad * dirty.p.k.row_stride, NAN);  // of key head 0
  const std::vector<double> expected = clean.run(1), got = dirty.run(1);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kRows; ++j) {
      const int at = i * kRows + j;
      CHECK(j == kBad && i >= kBad ? std::isnan(got[at]) : got[at] == expected[at]);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  seed_of_run = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("weights_test: seed %llu\n", (unsigned long long)seed_of_run);
  for (const std::string& isa : cpu::available_isas()) {
    cpu::set_isa(isa);
    std::mt19937_64 generator(seed_of_run);
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      if (dtype == DType::kFloat64 && isa != "portable") continue;  // the same object
      for (int i = 0; i < 60; ++i) {
        ForwardCase c = random_case(generator);
        c.dtype = dtype;
        check_case(c, /*average=*/i % 2 == 0, seed_of_run + i);
      }
      check_poison(dtype);
    }
    std::printf("  %s: ok\n", isa.c_str());
    std::fflush(stdout);
  }
  cpu::set_isa("");
}
