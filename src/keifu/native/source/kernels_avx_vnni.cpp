// x86-64 flags: -mavx2 -mfma -mf16c -mavxvnni
#define SET avx_vnni
#include "kernels.h"
