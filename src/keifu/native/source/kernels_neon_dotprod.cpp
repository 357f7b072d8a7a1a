// arm64 flags: -march=armv8.2-a+dotprod
#define SET neon_dotprod
#define SET_ARM
#include "kernels.h"
