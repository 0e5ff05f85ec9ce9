#include "pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace servekit {

namespace {

constexpr int SPINS_BEFORE_SLEEP = 1000;  // some 10 us: what lies between two steps is longer

// Keeps the calling thread on the `index`th of the cores that the process may use; no more than a wish.
void stay_on(int index) {
#if defined(__linux__)
  cpu_set_t may, one;
  CPU_ZERO(&one);
  if (sched_getaffinity(0, sizeof may, &may) != 0 || CPU_COUNT(&may) <= index) return;
  for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &may) && seen++ == index) CPU_SET(cpu, &one);
  pthread_setaffinity_np(pthread_self(), sizeof one, &one);
#else
  (void)index;
#endif
}

}  // namespace

Pool::Pool(int threads, bool pinned) : threads_(threads) {
  for (int thread = 1; thread < threads_; ++thread)
    workers_.emplace_back([this, thread, pinned] {
      if (pinned) stay_on(thread);
      work(thread);
    });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(int)>& part) {
  if (threads_ == 1) return part(0);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    part_ = &part;
    open_.store(true);
    started_.fetch_add(1);
  }
  wake_.notify_all();
  part(0);
  open_.store(false);
  end_.wait([this] { return inside_.load() == 0; });
}

void Pool::work(int thread) {
  for (uint64_t seen = 0;;) {
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP && started_.load() == seen && !stopping_; ++spins) pause();
    if (started_.load() == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || started_.load() != seen; });
      if (stopping_) return;
    }
    seen = started_.load();
    inside_.fetch_add(1);
    if (open_.load()) (*part_)(thread);  // or the run is over, and whoever began another waits for nobody
    if (inside_.fetch_sub(1) == 1) end_.tell();
  }
}

}  // namespace servekit
