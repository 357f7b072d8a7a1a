// x86-64 flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma
#if defined(__x86_64__)
#define KEIFU_NAMESPACE keifu_avx512
#include "kernels.h"

const keifu::Kernels *keifu::avx512_kernels() {
    static const Kernels table = {keifu_avx512::forward, keifu_avx512::pack, keifu_avx512::unpack, sizeof(keifu_avx512::Dense)};
    return &table;
}
#else
#include "model.h"
const keifu::Kernels *keifu::avx512_kernels() { return nullptr; }
#endif
