// x86-64 flags: -mavx2 -mfma
#if defined(__x86_64__)
#define KEIFU_NAMESPACE keifu_avx2
#include "kernels.h"

const keifu::Kernels *keifu::avx2_kernels() {
    static const Kernels table = {keifu_avx2::forward, keifu_avx2::pack, keifu_avx2::unpack, sizeof(keifu_avx2::Dense)};
    return &table;
}
#else
#include "model.h"
const keifu::Kernels *keifu::avx2_kernels() { return nullptr; }
#endif
