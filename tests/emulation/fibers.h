// A block's threads on a host: each has a stack of its own and runs until it says that it waits.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace emulation {

class Fibers {
 public:
  explicit Fibers(int most) : stacks_(static_cast<size_t>(most) * kStack), fibers_(most) {}

  // From now on every fiber is at the beginning of `body`.
  void begin(std::function<void()> body) {
    body_ = std::move(body);
    for (Fiber& each : fibers_) each = Fiber();
  }

  // Runs one up to its next pause, or to its end: then true.
  bool resume(int number) {
    running_ = number;
    Fiber& mine = fibers_[number];
    current_ = this;
    if (_setjmp(scheduler_) != 0) return mine.ended;
    if (mine.started) _longjmp(mine.resume, 1);
    mine.started = true;
    getcontext(&mine.context);
    mine.context.uc_stack.ss_sp = stacks_.data() + static_cast<size_t>(number) * kStack;
    mine.context.uc_stack.ss_size = kStack;
    mine.context.uc_link = nullptr;
    makecontext(&mine.context, &Fibers::enter, 0);
    setcontext(&mine.context);
    return false;  // Not reached.
  }

  // Called by a fiber: back to whoever resumed it.
  void pause() {
    if (_setjmp(fibers_[running_].resume) == 0) _longjmp(scheduler_, 1);
  }

  int running() const { return running_; }

 private:
  static constexpr int kStack = 1 << 16;

  struct Fiber {
    bool started = false, ended = false;
    std::jmp_buf resume;
    ucontext_t context;
  };

  static void enter() {
    Fibers* const mine = current_;
    mine->body_();
    mine->fibers_[mine->running_].ended = true;
    _longjmp(mine->scheduler_, 1);
  }

  static inline thread_local Fibers* current_ = nullptr;

  std::vector<unsigned char> stacks_;
  std::vector<Fiber> fibers_;
  std::function<void()> body_;
  int running_ = 0;
  std::jmp_buf scheduler_;
};

}  // namespace emulation
