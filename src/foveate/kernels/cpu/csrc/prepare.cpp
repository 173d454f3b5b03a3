// What a process must ask of its operating system before the kernels may run.
#include "abi.h"
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// 0: the kernels may run; else the machine has the instructions, but not the permission to use them.
FOVEATE_API int64_t foveate_prepare(void) {
#if defined(__AMX_BF16__) && defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 0 : 1;
#else
    return 0;
#endif
}
