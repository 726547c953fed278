/* Which instructions this CPU has, and which of them are used. */
#define _POSIX_C_SOURCE 200112L /* posix_memalign */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

static const Backend *chosen;

EXPORT int stompp_version(void) { return STOMPP_VERSION; }

/* The best that the CPU has, and no better than `limit` ("portable", "avx2", "avx512" or "neon"; "" for no limit). */
static const Backend *best(const char *limit) {
#ifdef STOMPP_X86
    __builtin_cpu_init();
    int limited = strcmp(limit, "") != 0;
    int wide = !limited || strcmp(limit, "avx512") == 0, narrow = wide || strcmp(limit, "avx2") == 0;
    if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("f16c"))
        return &stompp_avx512;
    if (narrow && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
        return &stompp_avx2;
#elif defined(STOMPP_ARM64)
    if (strcmp(limit, "") == 0 || strcmp(limit, "neon") == 0)
        return &stompp_neon;
#else
    (void)limit;
#endif
    return &stompp_portable;
}

/* Chooses what is used from now on, and returns its name. */
EXPORT const char *stompp_choose(const char *limit) {
    chosen = best(limit);
    return chosen->name;
}

const Backend *stompp_backend(void) { return chosen ? chosen : &stompp_portable; }

void *stompp_allocate(int64_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc((size_t)bytes + 512, 64);
#else
    void *memory = NULL;
    return posix_memalign(&memory, 64, (size_t)bytes + 512) ? NULL : memory;
#endif
}

void stompp_release(void *memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}
