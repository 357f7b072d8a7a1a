// What this CPU has, and which instruction set and how many threads are used.
#include <atomic>
#include <cstdarg>
#include <cstdio>

#include "model.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace keifu {
namespace {

thread_local char last_error[512] = "";

// AMX's registers must be asked for, once a process.
bool tiles_allowed() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023;
    constexpr long TILE_DATA = 18;
    unsigned a;
    unsigned b;
    unsigned c;
    unsigned d;
    asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const unsigned amx = 1u << 22 | 1u << 24 | 1u << 25;  // amx_bf16, amx_tile, amx_int8
    return (d & amx) == amx && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

int find_best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return KEIFU_PORTABLE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni"))
        return KEIFU_AVX2;
    if (tiles_allowed()) return KEIFU_AMX;
    return __builtin_cpu_supports("avx512bf16") ? KEIFU_AVX512_BF16 : KEIFU_AVX512;
#else
    return KEIFU_PORTABLE;
#endif
}

const Kernels *table(int which) {
    switch (which) {
    case KEIFU_AMX: return amx_kernels();
    case KEIFU_AVX512_BF16: return avx512_bf16_kernels();
    case KEIFU_AVX512: return avx512_kernels();
    case KEIFU_AVX2: return avx2_kernels();
    default: return portable_kernels();
    }
}

int best() {
    static const int found = find_best();
    return found;
}

std::atomic<int> &in_use() {
    static std::atomic<int> which{best()};
    return which;
}

}  // namespace

const Kernels &kernels() { return *table(in_use()); }

int32_t fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return -1;
}

}  // namespace keifu

using namespace keifu;

int32_t keifu_abi_version(void) { return KEIFU_ABI_VERSION; }
const char *keifu_last_error(void) { return last_error; }
int32_t keifu_best_instructions(void) { return best(); }
int32_t keifu_instructions(void) { return in_use(); }

int32_t keifu_use_instructions(int32_t which) {
    if (which < KEIFU_PORTABLE || which > KEIFU_AMX) return fail("There is no instruction set %d; known are 0 to 4.", which);
    if (which > best()) return fail("This CPU has instruction set %d at most; %d was asked for.", best(), which);
    in_use() = which;
    return 0;
}

int32_t keifu_available_threads(void) { return available_threads(); }
int32_t keifu_threads(void) { return pool_threads(); }

int32_t keifu_use_threads(int32_t n) {
    if (n < 1 || n > 256) return fail("%d threads were asked for; 1 to 256 can be had.", n);
    resize_pool(n);
    return 0;
}
