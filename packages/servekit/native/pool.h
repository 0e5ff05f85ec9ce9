// Threads that run the same function together.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace servekit {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls `done` until it is true: at once, then with pauses, then letting other threads run.
template <class Done>
void wait_until(Done done) {
  constexpr int spins_before_yield = 2000;  // some 20 us
  for (int spins = 0; !done(); ++spins) {
    if (spins < spins_before_yield) pause();
    else std::this_thread::yield();  // more threads than cores: let the late one run
  }
}

// Nobody waits for a thread that has not come: on a busy machine the caller does its work alone. So the function must
// share its work out by a counter, and must not need a certain number of threads.
class Pool {
 public:
  // pinned: each thread but the caller's stays on a core of its own, the caller's left free.
  Pool(int threads, bool pinned);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }
  // Calls `part` with 0 in this thread, and with 1 .. threads - 1 in those that come before it returns.
  void run(const std::function<void(int)>& part);

 private:
  void work(int thread);

  const int threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* part_ = nullptr;
  std::atomic<uint64_t> started_{0};  // runs so far
  std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace servekit
