// Threads that go through a job together, phase by phase. Each has its part of a phase's tasks, one after the other; who
// is done takes what others have left, task by task. A phase is over when its tasks are done, not when all threads have
// come: a thread that has lost its core to another process holds up at most the task in its hands.
#pragma once
#include <cstdint>
#include <functional>

namespace keifu {

constexpr int MAX_THREADS = 256;

struct Job;

// One thread's way through the phases of a job.
class Walk {
  public:
    Walk(Job &job, int thread);

    // Runs task(0), ..., task(n - 1) on all threads; returns when all are done.
    template <class Task> void deal(int n, Task &&task) {
        int count = 0;
        for (int k = 0; k < threads; k++) {
            const int64_t owner = (thread + k) % threads;
            const int end = (int)((owner + 1) * n / threads);
            for (int i; (i = take((int)owner, (int)(owner * n / threads), end)) < end; count++) task(i);
        }
        finish(count, n);
    }

    const int thread;

  private:
    int take(int owner, int first, int end);
    void finish(int count, int n);

    Job &job;
    const int threads;
    int phase = 0;
};

int available_threads();
int pool_threads();
void resize_pool(int n_threads);
void wait_for_pool();  // until no thread is in a job any more

// Every thread runs `work` and meets the same phases in the same order; the caller is thread 0. Before, `prepare` is told
// how many threads there will be; false where it says so. A thread may still walk through `work`, with nothing left to
// do, after this has returned.
bool run_on_pool(int n_phases, const std::function<bool(int threads)> &prepare, std::function<void(Walk &)> work);

}  // namespace keifu
