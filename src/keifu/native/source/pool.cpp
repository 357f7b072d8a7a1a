#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace keifu {
namespace {

constexpr auto SPIN = std::chrono::microseconds(60);       // longer than nearly every wait inside a step
constexpr auto BETWEEN = std::chrono::microseconds(2000);  // longer than what callers do between two steps

void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class Ready> bool spin_until(Ready ready, std::chrono::microseconds most) {
    const auto end = std::chrono::steady_clock::now() + most;
    do {
        for (int i = 0; i < 32; i++) {
            if (ready()) return true;
            pause_core();
        }
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

class Pool {
  public:
    Pool() { start(available_threads()); }

    int size() const { return static_cast<int>(workers.size()) + 1; }

    void resize(int n) {
        std::lock_guard<std::mutex> one(caller);
        if (n == size()) return;
        stop();
        start(n);
    }

    void run(std::shared_ptr<Job> next) {
        std::lock_guard<std::mutex> one(caller);
        {
            std::lock_guard<std::mutex> lock(mutex);
            job = next;
            generation.fetch_add(1);
        }
        if (!workers.empty()) wake.notify_all();
        next->run(0);
    }

    void wait() {
        std::lock_guard<std::mutex> one(caller);
        {
            std::lock_guard<std::mutex> lock(mutex);
            job.reset();
        }
        while (busy.load()) std::this_thread::yield();
    }

  private:
    void start(int n) {
        stopping = false;
        for (int thread = 1; thread < n; thread++)
            workers.emplace_back([this, thread, seen = generation.load()]() { work(thread, seen); });
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stopping = true;
            job.reset();
            generation.fetch_add(1);
        }
        wake.notify_all();
        for (auto &worker : workers) worker.join();
        workers.clear();
    }

    void work(int thread, int seen) {
        for (;;) {
            spin_until([&] { return generation.load(std::memory_order_acquire) != seen; }, BETWEEN);
            std::shared_ptr<Job> mine;
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return generation.load() != seen; });
                if (stopping) return;
                seen = generation.load();
                mine = job;
                if (!mine) continue;
                busy.fetch_add(1);
            }
            mine->run(thread);
            mine.reset();
            busy.fetch_sub(1);
        }
    }

    std::mutex caller;  // one job at a time
    std::mutex mutex;   // of the job below
    std::condition_variable wake;
    std::shared_ptr<Job> job;
    std::atomic<int> generation{0};
    std::atomic<int> busy{0};  // workers in a job
    bool stopping = false;
    std::vector<std::thread> workers;
};

Pool &pool() {
    static Pool *the_pool = new Pool;  // never destroyed: threads cannot be joined while the process ends
    return *the_pool;
}

double cgroup_cpus() {  // the quota in CPUs; infinite where there is none
    double quota = INFINITY;
    if (FILE *file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
        char limit[32];
        double period;
        if (std::fscanf(file, "%31s %lf", limit, &period) == 2 && std::strcmp(limit, "max") != 0)
            quota = std::atof(limit) / period;
        std::fclose(file);
    } else if (FILE *v1 = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
        double limit;
        if (std::fscanf(v1, "%lf", &limit) == 1 && limit > 0) quota = limit / 100000;  // the period is 100 ms by default
        std::fclose(v1);
    }
    return quota;
}

}  // namespace

// The next task of an owner's part [first, end) in this phase; end where there is none.
int Walk::take(int owner, int first, int end) {
    std::atomic<int64_t> &next = job.next[owner].task;
    const int64_t begin = (int64_t)phase << 32;
    int64_t seen = next.load(std::memory_order_relaxed);
    for (;;) {
        const int64_t task = std::max(seen, begin + first);  // where nobody has begun the part, an earlier phase is seen
        if (task >= begin + end) return end;
        if (next.compare_exchange_weak(seen, task + 1, std::memory_order_relaxed)) return (int)(task - begin);
    }
}

void Walk::finish(int count, int n) {
    std::atomic<int> &done = job.done[phase++].tasks;
    const bool last = count && done.fetch_add(count) + count == n;
    if (last && job.sleepers.load()) {
        std::lock_guard<std::mutex> lock(job.mutex);
        job.over.notify_all();
    }
    const auto over = [&] { return done.load() >= n; };
    if (over() || spin_until(over, SPIN)) return;
    std::unique_lock<std::mutex> lock(job.mutex);
    job.sleepers.fetch_add(1);
    job.over.wait(lock, over);
    job.sleepers.fetch_sub(1);
}

int available_threads() {
    int n = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
#endif
    return std::max(1, static_cast<int>(std::min<double>(n, std::ceil(cgroup_cpus()))));
}

int pool_threads() { return pool().size(); }
void resize_pool(int n_threads) { pool().resize(n_threads); }
void wait_for_pool() { pool().wait(); }
void run_on_pool(std::shared_ptr<Job> job) { pool().run(std::move(job)); }

}  // namespace keifu
