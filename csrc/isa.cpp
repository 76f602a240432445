// Which kernels calls use.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "calls.h"

namespace kvc {

#if defined(__x86_64__)
namespace {

// Bit `bit` of what CPUID leaf 7 says in EAX (0) or EDX (1).
bool leaf7(unsigned subleaf, int of, int bit) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, subleaf, &a, &b, &c, &d) == 0) return false;
    return ((of == 0 ? a : d) >> bit & 1) != 0;
}

// Tiles of bfloat16, which the operating system must switch and grant to this process: Linux does
// so when asked, for all its threads.
[[maybe_unused]] bool has_tiles() {
#if defined(__linux__)
    constexpr unsigned long kRequestPermission = 0x1023, kTileData = 18;
    constexpr unsigned kTileStates = 3u << 17;
    if (!leaf7(0, 1, 22) || !leaf7(0, 1, 24)) return false;
    unsigned low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileStates) == kTileStates &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace
#endif

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
    [[maybe_unused]] const bool bf16 = avx512 && leaf7(1, 0, 5);
#if !defined(KVC_WITHOUT_AVX512BF16)
    if (bf16 && std::strcmp(name, "avx512bf16") == 0) return &kAvx512Bf16;
#endif
#if !defined(KVC_WITHOUT_AMX)
    if (bf16 && std::strcmp(name, "amx") == 0 && has_tiles()) return &kAmx;
#endif
#if !defined(KVC_WITHOUT_AVX512_EMULATED)
    if (avx2 && std::strcmp(name, "avx512_emulated") == 0) return &kAvx512Emulated;
#endif
#if !defined(KVC_WITHOUT_AVX512BF16_EMULATED)
    if (avx2 && std::strcmp(name, "avx512bf16_emulated") == 0) return &kAvx512Bf16Emulated;
#endif
#if !defined(KVC_WITHOUT_AMX_EMULATED)
    if (avx2 && std::strcmp(name, "amx_emulated") == 0) return &kAmxEmulated;
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
        for (const char *name : {"baseline", "avx2", "avx512", "avx512bf16", "amx", "neon"})
            if (const Kernels *better = find(name)) known = better;
    }
    chosen.store(known, std::memory_order_release);
    return known;
}

void use(const Kernels *wanted) {
    chosen = wanted;
}

}  // namespace kvc
