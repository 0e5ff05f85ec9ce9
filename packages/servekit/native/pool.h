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

// Where threads wait for each other: at first with pauses, then letting others run, then asleep, so that on a busy machine
// whoever they wait for finds a core free.
class Meeting {
 public:
  // Returns once `done` is true, which whoever makes it so must `tell`; it reads atomics in the order of all threads.
  template <class Done>
  void wait(Done done) {
    constexpr int spins = 2000, yields = 100;  // some 20 us, and as much again
    for (int i = 0; i < spins + yields; ++i) {
      if (done()) return;
      if (i < spins) pause();
      else std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, done);
    asleep_.fetch_sub(1);
  }

  void tell() {
    if (asleep_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }  // who has looked and not slept yet sleeps first
    wake_.notify_all();
  }

 private:
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

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
  Meeting end_;  // of a run
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace servekit
