// SPDX-License-Identifier: BSD-3-Clause
// A CUDA backend against the fp64 formula: forward, backward, attention weights; each run twice and
// compared bit by bit.
//   attention_test [backend [seed [text]]]   all backends without a name, or with ""; cases whose
//                                            name has the text; skipped without a GPU
//   attention_test time [backend]            TFLOP/s
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>

#include "cases.h"
#include "cuda/backend.h"
#include "expected.h"

namespace flash {
namespace {

/// Device memory for the workspace of one worker, full of NaN before each use.
class Workspace {
 public:
  void* poisoned(int64_t bytes, cudaStream_t stream) {
    if (bytes > size_) {
      CUDA_OK(cudaFree(data_));
      CUDA_OK(cudaMalloc(&data_, bytes));
      size_ = bytes;
    }
    if (bytes) CUDA_OK(cudaMemsetAsync(data_, 0xff, bytes, stream));
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

struct Worker {
  MirroredMemory memory{size_t(96) << 20};
  Workspace workspace;
  cudaStream_t stream;
  Worker() { CUDA_OK(cudaStreamCreate(&stream)); }
};

void run_forward(const Backend& backend, const ForwardParams& p, Worker& worker) {
  const int64_t bytes = backend.forward_workspace_bytes(p, 1);
  backend.forward(p, {worker.workspace.poisoned(bytes, worker.stream), worker.stream});
}
void run_backward(const Backend& backend, const BackwardParams& p, Worker& worker) {
  const int64_t bytes = backend.backward_workspace_bytes(p, 1);
  backend.backward(p, {worker.workspace.poisoned(bytes, worker.stream), worker.stream});
}
void run_weights(const Backend& backend, const WeightsBackwardParams& p, Worker& worker) {
  backend.weights(p, {nullptr, worker.stream});
  const int64_t bytes = backend.weights_backward_workspace_bytes(p, 1);
  backend.weights_backward(p, {worker.workspace.poisoned(bytes, worker.stream), worker.stream});
}

Verdict compare(const Case& c, const Problem& problem, bool rounds_once, bool has_backward) {
  const BackwardParams& p = problem.p;
  const WeightsBackwardParams& w = problem.w;
  const double bound = tolerance(c.dtype, rounds_once);
  const double fine = tolerance(problem.accumulation(), true);
  // Gradients contain delta, made from the out that was rounded to the dtype. Summed over pairs
  // whose terms nearly cancel, as those of the features are, its error is large beside the sum.
  const bool is_short = element_bytes(c.dtype) == 2;
  const double gradient_bound = tolerance(c.dtype, rounds_once && !is_short);
  const double sums = is_short ? 10 * gradient_bound : 10 * fine;
  const DType bias_dtype = c.bias_is_float32 ? DType::kFloat32 : c.dtype;
  const auto forward = reference::forward(p);
  const auto rows = [&](const char* what, const TensorView& t, bool of_queries, int width,
                        const std::vector<double>& dense, double bound) {
    if (!t.data) return Verdict();
    return compare_rows(what, c.dtype, t, of_queries ? p.q_layout : p.k_layout, c.batch,
                        of_queries ? c.heads : c.heads_k, width, dense, 0, bound);
  };
  Verdict verdict = rows("out", p.out, true, c.dv, forward.out, bound);
  verdict += compare_row_values("lse", problem.accumulation(), p.lse, p.q_layout, c.batch, c.heads,
                                forward.lse, -INFINITY, fine);
  if (has_backward) {
    const auto backward = reference::backward(p, &forward);
    verdict += rows("dq", p.dq, true, c.d, backward.dq, gradient_bound) +
               rows("dk", p.dk, false, c.d, backward.dk, gradient_bound) +
               rows("dv", p.dv, false, c.dv, backward.dv, gradient_bound);
    if (p.dbias)
      verdict += compare_flat("dbias", bias_dtype, p.dbias, backward.dbias,
                              std::max(sums, tolerance(bias_dtype, true)));
    if (p.dslopes)
      verdict += compare_flat("dslopes", problem.accumulation(), p.dslopes, backward.dslopes, sums);
    if (p.dsink)
      verdict += compare_flat("dsink", problem.accumulation(), p.dsink, backward.dsink, sums);
  }
  if (w.weights) {
    const auto expected = reference_weights(w);
    verdict += compare_flat("weights", c.dtype, w.weights, expected.weights, bound) +
               rows("weights dq", w.dq, true, c.d, expected.dq, gradient_bound) +
               rows("weights dk", w.dk, false, c.d, expected.dk, gradient_bound) +
               compare_row_values("weights dlse", problem.accumulation(), w.dlse, w.q_layout,
                                  c.batch, c.heads, expected.dlse, 0, sums);
    if (w.dbias)
      verdict += compare_flat("weights dbias", bias_dtype, w.dbias, expected.dbias,
                              std::max(bound, tolerance(bias_dtype, true)));
  }
  return verdict;
}

/// Empty: passed. "skipped": the backend cannot.
Verdict check_case(const Backend& backend, const Case& c, uint64_t seed, Worker& worker) {
  const bool is_deterministic = seed % 2;  // else: sums of gradients may come in any order
  worker.memory.reset();
  Problem problem(c, seed, worker.memory);
  problem.p.deterministic = is_deterministic;
  const BackwardParams p = problem.device_params();
  if (!backend.why_unsupported(p, false).empty()) return "skipped";
  const bool has_backward = backend.why_unsupported(p, true).empty();
  std::vector<char> first;
  bool repeats = true;
  for (int repeat = 0; repeat < 2; ++repeat) {
    if (repeat == 0) worker.memory.upload();
    run_forward(backend, p, worker);
    if (has_backward) run_backward(backend, p, worker);
    if (problem.w.weights) run_weights(backend, problem.device_weights(), worker);
    CUDA_OK(cudaStreamSynchronize(worker.stream));
    worker.memory.download();
    if (repeat == 0)
      first = worker.memory.contents();
    else
      repeats = first == worker.memory.contents();
  }
  return compare(c, problem, std::strcmp(backend.name, "simt") == 0, has_backward) +
         (repeats || !is_deterministic ? "" : "a second run gave other bits");
}

const char* dtype_name(DType dtype) {
  const char* const names[] = {"fp16", "bf16", "fp32", "fp64"};
  return names[int(dtype)];
}

int check_backend(const Backend& backend, uint64_t seed, const std::string& text) {
  std::vector<Case> cases =
      make_cases({DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}, 60, seed);
  std::erase_if(cases, [&](const Case& c) { return c.name.find(text) == std::string::npos; });
  std::atomic<size_t> next{0};
  std::atomic<int> failed{0}, passed{0}, skipped{0};
  std::mutex output;
  const auto work = [&] {
    Worker worker;
    for (size_t i = next++; i < cases.size(); i = next++) {
      Verdict verdict;
      try {
        verdict = check_case(backend, cases[i], seed + i / 4 + i % 4, worker);
      } catch (const std::exception& e) {
        verdict = e.what();
      }
      if (verdict.empty()) ++passed;
      if (verdict == "skipped") ++skipped;
      if (verdict.empty() || verdict == "skipped") continue;
      ++failed;
      const std::lock_guard lock(output);
      std::printf("FAILED %s %s, %s (seed %llu): %s\n", backend.name, dtype_name(cases[i].dtype),
                  cases[i].name.c_str(), static_cast<unsigned long long>(seed), verdict.c_str());
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i)
    threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  std::printf("%s: %d passed, %d failed, %d skipped\n", backend.name, passed.load(), failed.load(),
              skipped.load());
  return failed;
}

/// Median milliseconds of f on the stream.
template <class F>
double median_ms(cudaStream_t stream, F f) {
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 8; ++i) {
    CUDA_OK(cudaEventRecord(begin, stream));
    f();
    CUDA_OK(cudaEventRecord(end, stream));
    CUDA_OK(cudaEventSynchronize(end));
    float ms;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

/// 16k tokens, hidden size 2048, as the project's benchmark.
void time_backend(const Backend& backend, DType dtype) {
  constexpr int64_t kTokens = 16384, kHidden = 2048;
  constexpr int kTensors = 8;
  const int64_t bytes = kTokens * kHidden * element_bytes(dtype);
  std::vector<char> values(bytes);
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  constexpr int64_t kPeriod = 1 << 20;
  for (int64_t i = 0; i < kTokens * kHidden; ++i) {
    if (i < kPeriod)
      reference::store(dtype, values.data(), i, normal(random));
    else
      std::memcpy(&values[i * element_bytes(dtype)],
                  &values[(i - kPeriod + i / kPeriod % 7) * element_bytes(dtype)],
                  element_bytes(dtype));
  }
  char* tensors[kTensors];
  for (char*& tensor : tensors) {
    CUDA_OK(cudaMalloc(&tensor, bytes));
    CUDA_OK(cudaMemcpy(tensor, values.data(), bytes, cudaMemcpyHostToDevice));
  }
  Worker worker;
  for (int d : {64, 128})
    for (bool causal : {false, true})
      for (int seqlen : {1024, 2048, 4096, 8192}) {
        BackwardParams p{};
        p.dtype = dtype;
        p.batch = int(kTokens / seqlen), p.num_heads = p.num_heads_k = int(kHidden / d);
        p.head_dim = p.head_dim_v = d;
        p.q_layout.max = p.k_layout.max = seqlen;
        p.softmax_scale = 1 / std::sqrt(double(d));
        if (causal) p.mask.window_right = 0;
        TensorView* views[kTensors] = {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv};
        for (int i = 0; i < kTensors; ++i)
          *views[i] = {tensors[i], seqlen * kHidden, int64_t(seqlen) * d, d};
        void* lse;
        CUDA_OK(cudaMalloc(&lse, int64_t(p.batch) * p.num_heads * seqlen * 8));
        p.lse = {lse, int64_t(p.num_heads) * seqlen, seqlen};
        if (!backend.why_unsupported(p, false).empty()) return;
        void* workspace;
        CUDA_OK(cudaMalloc(&workspace, 256 + backend.forward_workspace_bytes(p, 1) +
                                           backend.backward_workspace_bytes(p, 1)));
        const Launch launch{workspace, worker.stream};
        const double forward = median_ms(worker.stream, [&] { backend.forward(p, launch); });
        const double backward = median_ms(worker.stream, [&] { backend.backward(p, launch); });
        const double flops = 4.0 * kTokens * seqlen * kHidden * (causal ? 0.5 : 1.0);
        std::printf("%s %s d%d %s %d: forward %.1f, backward %.1f TFLOP/s (%.2f, %.2f ms)\n",
                    backend.name, dtype_name(dtype), d, causal ? "causal" : "full", seqlen,
                    flops / forward * 1e-9, 2.5 * flops / backward * 1e-9, forward, backward);
        CUDA_OK(cudaFree(workspace));
        CUDA_OK(cudaFree(lse));
      }
  for (char* tensor : tensors) CUDA_OK(cudaFree(tensor));
}

}  // namespace
}  // namespace flash

int main(int argc, char** argv) {
  using namespace flash;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU\n");
    return 0;
  }
  const bool timing = argc > 1 && std::strcmp(argv[1], "time") == 0;
  const char* const name = argc > (timing ? 2 : 1) ? argv[timing ? 2 : 1] : "";
  const uint64_t seed =
      !timing && argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  int failed = 0, tried = 0;
  for (const Backend* backend : cuda::backends()) {
    if (*name && std::strcmp(backend->name, name) != 0) continue;
    ++tried;
    if (!timing) {
      failed += check_backend(*backend, seed, argc > 3 ? argv[3] : "");
      continue;
    }
    for (DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      if (dtype == DType::kFloat32 || std::strcmp(backend->name, "simt") != 0)
        time_backend(*backend, dtype);
    }
  }
  if (!tried) std::fprintf(stderr, "no CUDA backend is called %s\n", name);
  return failed || !tried;
}
