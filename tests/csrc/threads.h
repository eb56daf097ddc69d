// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <thread>
#include <vector>

#include "attention/backend.h"

namespace flash {

/// Workers of std::thread, the caller among them.
class ThreadWorkers : public Workers {
 public:
  explicit ThreadWorkers(int count) : count_(count) {}
  int count() const override { return count_; }
  void run(void (*f)(void* context, int worker), void* context) override {
    std::vector<std::thread> threads;
    for (int worker = 1; worker < count_; ++worker) threads.emplace_back(f, context, worker);
    f(context, 0);
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int count_;
};

}  // namespace flash
