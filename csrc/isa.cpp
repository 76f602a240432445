// Which kernels calls use.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "calls.h"

namespace kvc {

// The kernels that a name stands for, or null: another name, or this CPU lacks the instructions.
const Kernels *find(const char *name) {
    if (std::strcmp(name, "baseline") == 0) return &kBaseline;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni");
#if !defined(KVC_WITHOUT_AVX2)
    if (avx2 && std::strcmp(name, "avx2") == 0) return &kAvx2;
#endif
#if !defined(KVC_WITHOUT_AVX512)
    if (avx512 && std::strcmp(name, "avx512") == 0) return &kAvx512;
#endif
#elif defined(__aarch64__) && !defined(KVC_WITHOUT_NEON)
    if (std::strcmp(name, "neon") == 0) return &kNeon;
#endif
    return nullptr;
}

namespace {

std::atomic<const Kernels *> chosen{nullptr};

}  // namespace

// The environment decides at the first call, else the CPU. Null: the environment names nonsense.
const Kernels *kernels() {
    const Kernels *known = chosen.load(std::memory_order_acquire);
    if (known != nullptr) return known;
    const char *wanted = std::getenv("KVCRUSH_ISA");
    if (wanted != nullptr && *wanted != '\0') {
        known = find(wanted);
    } else {
        for (const char *name : {"baseline", "avx2", "avx512", "neon"})
            if (const Kernels *better = find(name)) known = better;
    }
    chosen.store(known, std::memory_order_release);
    return known;
}

void use(const Kernels *wanted) {
    chosen = wanted;
}

}  // namespace kvc
