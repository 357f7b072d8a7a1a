// What this CPU has, and which instruction set and how many threads are used.
#include <atomic>
#include <cstdarg>
#include <cstdio>

#include "model.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace keifu {
namespace {

thread_local char last_error[512] = "";

#if defined(KEIFU_EMULATED)
// A build for tests: besides the portable set, the library has those with a bit here. They are compiled against an
// emulation of their instructions (tests/native/emulation).
bool has(int which) { return which == KEIFU_PORTABLE || (KEIFU_EMULATED >> which & 1); }
#elif defined(__x86_64__)
struct Registers {
    unsigned a, b, c, d;
};

Registers features(unsigned leaf, unsigned subleaf) {
    Registers r;
    asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(subleaf));
    return r;
}

// AMX's registers must be asked for, once a process.
bool tiles_allowed() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023;
    constexpr long TILE_DATA = 18;
    const unsigned amx = 1u << 22 | 1u << 24 | 1u << 25;  // amx_bf16, amx_tile, amx_int8
    return (features(7, 0).d & amx) == amx && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool has(int which) {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && features(1, 0).c >> 29 & 1;  // F16C
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    switch (which) {
    case KEIFU_AMX: return avx512 && tiles_allowed();
    case KEIFU_AVX512_BF16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case KEIFU_AVX512: return avx512;
    case KEIFU_AVX_VNNI: return avx2 && features(7, 0).a > 0 && features(7, 1).a >> 4 & 1;
    case KEIFU_AVX2: return avx2;
    default: return which == KEIFU_PORTABLE;
    }
}
#else
#if defined(__aarch64__) && defined(__linux__)
bool dot_products() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool int8_matrices() { return getauxval(AT_HWCAP2) >> 13 & 1; }
bool bfloat16() { return getauxval(AT_HWCAP2) >> 14 & 1; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool feature(const char *name) {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname(name, &found, &size, nullptr, 0) == 0 && found;
}
bool dot_products() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool int8_matrices() { return feature("hw.optional.arm.FEAT_I8MM"); }
bool bfloat16() { return feature("hw.optional.arm.FEAT_BF16"); }
#else
bool dot_products() { return false; }
bool int8_matrices() { return false; }
bool bfloat16() { return false; }
#endif

bool has(int which) {
    switch (which) {
    case KEIFU_NEON_BF16: return has(KEIFU_NEON_I8MM) && bfloat16();
    case KEIFU_NEON_I8MM: return dot_products() && int8_matrices();
    case KEIFU_NEON_DOTPROD: return dot_products();
    default: return which == KEIFU_PORTABLE;
    }
}
#endif

int best() {
    static const int found = [] {
        int which = KEIFU_NEON_BF16;
        while (!has(which)) which--;
        return which;
    }();
    return found;
}

std::atomic<int> &in_use() {
    static std::atomic<int> which{best()};
    return which;
}

thread_local int here = -1;  // the instruction set of this thread's own, if any

}  // namespace

KernelsHere::KernelsHere(int which) : before(here) { here = which; }
KernelsHere::~KernelsHere() { here = before; }

const Kernels &kernels() {
    static const Kernels *const tables[] = {&portable_kernels, &avx2_kernels,        &avx_vnni_kernels,
                                            &avx512_kernels,   &avx512_bf16_kernels, &amx_kernels,
                                            &neon_dotprod_kernels, &neon_i8mm_kernels, &neon_bf16_kernels};
    return *tables[here < 0 ? in_use().load() : here];
}

int32_t fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return -1;
}

}  // namespace keifu

using namespace keifu;

const char *keifu_last_error(void) { return last_error; }
int32_t keifu_best_instructions(void) { return best(); }
int32_t keifu_has_instructions(int32_t which) { return has(which); }
int32_t keifu_instructions(void) { return in_use(); }

int32_t keifu_use_instructions(int32_t which) {
    if (which < KEIFU_PORTABLE || which > KEIFU_NEON_BF16)
        return fail("There is no instruction set %d; known are 0 to %d.", which, KEIFU_NEON_BF16);
    if (!has(which)) return fail("This CPU lacks instruction set %d; its best is %d.", which, best());
    in_use() = which;
    return 0;
}

int32_t keifu_available_threads(void) { return available_threads(); }
int32_t keifu_threads(void) { return pool_threads(); }

int32_t keifu_use_threads(int32_t n) {
    if (n < 1 || n > MAX_THREADS) return fail("%d threads were asked for; 1 to %d can be had.", n, MAX_THREADS);
    resize_pool(n);
    return 0;
}
