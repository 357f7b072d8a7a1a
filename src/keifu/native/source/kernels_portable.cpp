#define KEIFU_NAMESPACE keifu_portable
#include "kernels.h"

const keifu::Kernels *keifu::portable_kernels() {
    static const Kernels table = {keifu_portable::forward, keifu_portable::pack, keifu_portable::unpack, sizeof(keifu_portable::Dense)};
    return &table;
}
