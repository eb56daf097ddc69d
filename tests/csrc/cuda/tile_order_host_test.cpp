// SPDX-License-Identifier: BSD-3-Clause
// The order in which tiles start, and division by prepared numbers.
#include <random>
#include <vector>

#include "check.h"
#include "cuda/sm90/tile_order.h"

namespace flash::cuda::sm90 {
namespace {

void divides_like_the_hardware(unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> any(0, 0x7fffffff);
  std::vector<int> divisors{1, 2, 3, 5, 7, 127, 128, 129, 65535, 65536, 0x3fffffff, 0x7fffffff};
  std::vector<int> numbers{0, 1, 2, 126, 127, 128, 0x3fffffff, 0x40000000, 0x7ffffffe, 0x7fffffff};
  for (int i = 0; i < 300; ++i) divisors.push_back(1 + any(random) % (1 << (1 + i % 30)));
  for (int i = 0; i < 300; ++i) numbers.push_back(any(random) >> i % 31);
  for (int d : divisors) {
    const Divisor divisor(d);
    CHECK(divisor.value() == d);
    for (int n : numbers) {
      const auto [quotient, remainder] = divisor.divide(n);
      CHECK(quotient == n / d && remainder == n % d);
      CHECK(divisor.quotient(n) == quotient && divisor.remainder(n) == remainder);
    }
  }
}

/// Every block of every head once; sections one after the other; in a section a block of all its
/// heads before the next block of any.
void visits_section_by_section(int heads, int blocks, int section, int last) {
  const TileOrder order(heads, blocks, section, last);
  int tile = 0;
  for (int first = 0; first < heads;) {
    const int width = first == heads - last ? last : section;
    for (int block = 0; block < blocks; ++block)
      for (int head = first; head < first + width; ++head, ++tile) {
        const HeadBlock at = order.at(tile);
        CHECK(at.head == head && at.block == block);
      }
    first += width;
  }
  CHECK(tile == heads * blocks);
}

}  // namespace
}  // namespace flash::cuda::sm90

int main(int count, char** arguments) {
  using namespace flash::cuda::sm90;
  const unsigned seed = count > 1 ? std::atoi(arguments[1]) : std::random_device{}() % 1000000;
  std::printf("seed %u\n", seed);  // an argument repeats it
  divides_like_the_hardware(seed);
  for (int blocks : {0, 1, 2, 7, 33}) {
    visits_section_by_section(1, blocks, 1, 1);
    visits_section_by_section(12, blocks, 1, 1);   // head by head
    visits_section_by_section(12, blocks, 1, 5);   // five heads end together
    visits_section_by_section(12, blocks, 1, 12);  // all do
    visits_section_by_section(12, blocks, 4, 4);
    visits_section_by_section(13, blocks, 4, 1);
    visits_section_by_section(11, blocks, 3, 5);  // the last one wider
  }
  return 0;
}
