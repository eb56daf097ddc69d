// SPDX-License-Identifier: BSD-3-Clause
// The CPU forward on every instruction set of this machine.
#include "cpu/forward_checks.h"

using namespace flash;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

void check_isas() {
  const std::vector<std::string> isas = cpu::available_isas();
  CHECK(isas[0] == "portable" && isas.back() == cpu::current_isa());
  try {
    cpu::set_isa("sse9");
    CHECK(false);
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find("portable") != std::string::npos);
  }
}

}  // namespace

int main(int argc, char** argv) {
  seed_of_run = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("forward_test: seed %llu\n", (unsigned long long)seed_of_run);
  check_isas();
  const Backend& backend = cpu::backend();
  for (const std::string& isa : cpu::available_isas()) {
    cpu::set_isa(isa);
    const bool in_pairs = isa == "avx512_bf16" || isa == "amx";
    tested = {isa.c_str(), backend.forward_workspace_bytes, backend.forward, in_pairs};
    std::mt19937_64 generator(seed_of_run);
    for (DType dtype : kDTypes) {
      if (dtype == DType::kFloat64 && isa != "portable") continue;  // the same object
      check_dtype(dtype, generator);
    }
    std::printf("  %s: ok\n", isa.c_str());
  }
  cpu::set_isa("");
}
