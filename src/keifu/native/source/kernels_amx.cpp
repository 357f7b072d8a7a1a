// x86-64 flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mamx-tile -mamx-bf16 -mamx-int8
#if defined(__x86_64__)
#define KEIFU_NAMESPACE keifu_amx
#include "kernels.h"

const keifu::Kernels *keifu::amx_kernels() {
    static const Kernels table = {keifu_amx::forward, keifu_amx::pack, keifu_amx::unpack, sizeof(keifu_amx::Dense)};
    return &table;
}
#else
#include "model.h"
const keifu::Kernels *keifu::amx_kernels() { return nullptr; }
#endif
