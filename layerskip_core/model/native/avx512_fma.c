#define _GNU_SOURCE /* syscall */
#include "kernels.c"
#include "pack.c"
