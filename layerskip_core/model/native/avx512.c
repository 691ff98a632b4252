#include "kernels.c"
