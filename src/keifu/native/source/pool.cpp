#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace keifu {

template <class T> struct alignas(64) Line {  // a counter with a cache line of its own
    std::atomic<T> count{0};
};

struct Job {
    const int threads;
    const std::function<void(Walk &)> work;
    const std::unique_ptr<Line<int>[]> done;      // tasks of a phase
    const std::unique_ptr<Line<int64_t>[]> next;  // task of a thread's part: phase · 2^32 + number
    std::mutex mutex;
    std::condition_variable over;
    std::atomic<int> sleepers{0};

    void run(int thread) {
        Walk walk(*this, thread);
        work(walk);
    }
};

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

struct Pool {
    std::mutex caller;  // one job at a time
    std::mutex mutex;   // of the job below
    std::condition_variable wake;
    std::shared_ptr<Job> job;
    std::atomic<int> generation{0};
    std::atomic<int> busy{0};  // workers in a job
    std::atomic<int> threads{1};
    std::atomic<bool> stopping{false};
    std::vector<std::thread> workers;

    void begin(std::shared_ptr<Job> next) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            job = std::move(next);
            generation.fetch_add(1);
        }
        wake.notify_all();
    }

    void resize(int n) {
        stopping = true;
        begin(nullptr);
        for (auto &worker : workers) worker.join();
        workers.clear();
        stopping = false;
        for (int thread = 1; thread < n; thread++)
            workers.emplace_back([this, thread, seen = generation.load()]() { work(thread, seen); });
        threads = n;
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
};

Pool &pool() {
    static Pool *the_pool = [] {  // never destroyed: threads cannot be joined while the process ends
        auto *made = new Pool;
        made->resize(available_threads());
        return made;
    }();
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

Walk::Walk(Job &job, int thread) : thread(thread), job(job), threads(job.threads) {}

// The next task of an owner's part [first, end) in this phase; end where there is none.
int Walk::take(int owner, int first, int end) {
    std::atomic<int64_t> &next = job.next[owner].count;
    const int64_t begin = (int64_t)phase << 32;
    int64_t seen = next.load(std::memory_order_relaxed);
    for (;;) {
        const int64_t task = std::max(seen, begin + first);  // where nobody has begun the part, an earlier phase is seen
        if (task >= begin + end) return end;
        if (next.compare_exchange_weak(seen, task + 1, std::memory_order_relaxed)) return (int)(task - begin);
    }
}

void Walk::finish(int count, int n) {
    std::atomic<int> &done = job.done[phase++].count;
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
    return static_cast<int>(std::clamp(std::min<double>(n, std::ceil(cgroup_cpus())), 1.0, double{MAX_THREADS}));
}

int pool_threads() { return pool().threads; }

void resize_pool(int n_threads) {
    std::lock_guard<std::mutex> one(pool().caller);
    if (n_threads != pool().threads) pool().resize(n_threads);
}

void wait_for_pool() {
    Pool &all = pool();
    std::lock_guard<std::mutex> one(all.caller);
    {
        std::lock_guard<std::mutex> lock(all.mutex);
        all.job.reset();
    }
    while (all.busy.load()) std::this_thread::yield();
}

bool run_on_pool(int n_phases, const std::function<bool(int threads)> &prepare, std::function<void(Walk &)> work) {
    Pool &all = pool();
    std::lock_guard<std::mutex> one(all.caller);  // so that the number of threads stays what it is
    const int threads = all.threads;
    if (!prepare(threads)) return false;
    const std::shared_ptr<Job> job(new Job{threads, std::move(work), std::unique_ptr<Line<int>[]>(new Line<int>[n_phases]),
                                           std::unique_ptr<Line<int64_t>[]>(new Line<int64_t>[threads])});
    all.begin(job);
    job->run(0);
    return true;
}

}  // namespace keifu
