// Threads that go through a job together, phase by phase. The tasks of a phase are dealt by a counter to whoever comes
// for one, and a phase is over when its tasks are done, not when all threads have come: a thread that has lost its core
// to another process holds up at most the task in its hands.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

namespace keifu {

struct alignas(64) Phase {
    std::atomic<int> next{0};
    std::atomic<int> done{0};
};

class Job {
  public:
    explicit Job(int n_phases) : phases(new Phase[n_phases]) {}
    virtual ~Job() = default;
    virtual void run(int thread) = 0;  // every thread of the pool runs it and meets the same phases in the same order

  private:
    friend class Walk;
    std::unique_ptr<Phase[]> phases;
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
        for (int i = take(); i < n; i = take()) {
            task(i);
            count++;
        }
        finish(count, n);
    }

    const int thread;

  private:
    int take();
    void finish(int count, int n);

    Job &job;
    int phase = 0;
};

int available_threads();
int pool_threads();
void resize_pool(int n_threads);
void run_on_pool(std::shared_ptr<Job> job);  // the caller is thread 0
void wait_for_pool();                     // until no thread is in a job any more

}  // namespace keifu
