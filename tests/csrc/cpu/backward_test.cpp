// SPDX-License-Identifier: BSD-3-Clause
// The CPU backward on every instruction set of this machine.
#include "cpu/backward_checks.h"

using namespace flash;

int main(int argc, char** argv) {
  seed_of_run = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("backward_test: seed %llu\n", (unsigned long long)seed_of_run);
  const Backend& backend = cpu::backend();
  for (const std::string& isa : cpu::available_isas()) {
    cpu::set_isa(isa);
    tested_backward = {isa.c_str(), backend.backward_workspace_bytes, backend.backward,
                       isa == "avx512_bf16"};
    most_units = 0;
    std::mt19937_64 generator(seed_of_run);
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      if (dtype == DType::kFloat64 && isa != "portable") continue;  // the same object
      check_dtype(dtype, generator);
    }
    std::printf("  %s: ok, at most %.2f units of %g\n", isa.c_str(), most_units, kUnits);
    std::fflush(stdout);
  }
  cpu::set_isa("");
}
