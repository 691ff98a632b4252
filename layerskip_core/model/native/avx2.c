#include "kernels.c"
#include "pack.c"
