#define SET portable
#define SET_PORTABLE
#include "kernels.h"
