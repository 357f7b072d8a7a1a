// Threads that go through a job together, phase by phase. Each has its part of a phase's tasks, one after the other; who
// is done takes what others have left, task by task. A phase is over when its tasks are done, not when all threads have
// come: a thread that has lost its core to another process holds up at most the task in its hands.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace keifu {

int available_threads();
int pool_threads();

struct alignas(64) Done {
    std::atomic<int> tasks{0};
};

struct alignas(64) Next {
    std::atomic<int64_t> task{0};  // of a thread's part: phase · 2^32 + number
};

class Job {
  public:
    explicit Job(int n_phases) : threads(pool_threads()), done(new Done[n_phases]), next(new Next[threads]) {}
    virtual ~Job() = default;
    virtual void run(int thread) = 0;  // every thread of the pool runs it and meets the same phases in the same order

  private:
    friend class Walk;
    const int threads;
    std::unique_ptr<Done[]> done;  // a phase
    std::unique_ptr<Next[]> next;  // a thread
    std::mutex mutex;
    std::condition_variable over;
    std::atomic<int> sleepers{0};
};

// One thread's way through the phases of a job.
class Walk {
  public:
    Walk(Job &job, int thread) : thread(thread), job(job) {}

    // Runs task(0), ..., task(n - 1) on all threads; returns when all are done.
    template <class Task> void deal(int n, Task &&task) {
        int count = 0;
        for (int k = 0; k < job.threads; k++) {
            const int64_t owner = (thread + k) % job.threads;
            const int end = (int)((owner + 1) * n / job.threads);
            for (int i; (i = take((int)owner, (int)(owner * n / job.threads), end)) < end; count++) task(i);
        }
        finish(count, n);
    }

    const int thread;

  private:
    int take(int owner, int first, int end);
    void finish(int count, int n);

    Job &job;
    int phase = 0;
};

void resize_pool(int n_threads);
void run_on_pool(std::shared_ptr<Job> job);  // the caller is thread 0
void wait_for_pool();                     // until no thread is in a job any more

}  // namespace keifu
