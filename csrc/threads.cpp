// Work is shared out over the OpenMP team that this process already has: torch's, whose threads
// vLLM has bound to cores. Linking OpenMP here would start a second runtime beside it.
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "internal.h"

namespace kvc {
namespace {

struct OpenMP {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
};

bool resolve(void *library, OpenMP &found) {
    // Both GNU's and LLVM's (Intel's) runtime export these names.
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.max_threads =
        reinterpret_cast<decltype(found.max_threads)>(dlsym(library, "omp_get_max_threads"));
    found.in_parallel =
        reinterpret_cast<decltype(found.in_parallel)>(dlsym(library, "omp_in_parallel"));
    return found.parallel != nullptr && found.max_threads != nullptr &&
           found.in_parallel != nullptr;
}

int visit(dl_phdr_info *info, size_t, void *data) {
    const char *name = info->dlpi_name;
    if (name == nullptr || (!std::strstr(name, "libgomp") && !std::strstr(name, "libiomp") &&
                            !std::strstr(name, "libomp")))
        return 0;
    void *library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return 0;
    const bool found = resolve(library, *static_cast<OpenMP *>(data));
    dlclose(library);  // only gives back the reference that dlopen took
    return found ? 1 : 0;
}

// A runtime may be loaded after the first call, so only success is remembered.
const OpenMP *openmp() {
    static std::atomic<const OpenMP *> known{nullptr};
    const OpenMP *runtime = known.load(std::memory_order_acquire);
    if (runtime != nullptr) return runtime;
    OpenMP found;
    if (!resolve(RTLD_DEFAULT, found)) {
        found = OpenMP{};
        if (dl_iterate_phdr(visit, &found) == 0) return nullptr;
    }
    static const OpenMP kept = found;
    known.store(&kept, std::memory_order_release);
    return &kept;
}

thread_local Scratch scratch_memory;

struct Job {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t items;
    size_t scratch;
    void (*work)(void *, int64_t, uint8_t *);
    void *context;
};

void run(void *data) {
    Job &job = *static_cast<Job *>(data);
    uint8_t *memory = scratch_memory.get(job.scratch);
    if (memory == nullptr) {
        job.failed = true;
        return;
    }
    for (;;) {
        const int64_t item = job.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= job.items) break;
        job.work(job.context, item, memory);
    }
    scratch_memory.trim();
}

std::atomic<int64_t> held_bytes{0}, peak_bytes{0};

void count_bytes(int64_t more) {
    const int64_t now = held_bytes.fetch_add(more) + more;
    int64_t most = peak_bytes.load();
    while (now > most && !peak_bytes.compare_exchange_weak(most, now)) {
    }
}

}  // namespace

uint8_t *Scratch::get(size_t wanted) {
    if (wanted == 0) wanted = 1;
#if defined(__SANITIZE_ADDRESS__)
    constexpr size_t kUnit = 64;
    release();  // anew each time, and no more: then a use of anything beyond is noticed
#else
    constexpr size_t kUnit = 4096;
#endif
    if (wanted <= size_) return data_;
    release();
    const size_t size = (wanted + kUnit - 1) / kUnit * kUnit;
    if (size < wanted) return nullptr;
    data_ = static_cast<uint8_t *>(std::aligned_alloc(kUnit, size));
    if (data_ == nullptr) return nullptr;
    size_ = size;
    count_bytes(static_cast<int64_t>(size));
    return data_;
}

void Scratch::release() {
    std::free(data_);
    count_bytes(-static_cast<int64_t>(size_));
    data_ = nullptr;
    size_ = 0;
}

int64_t Scratch::peak() {
    return peak_bytes.exchange(held_bytes.load());
}

int max_threads() {
    const OpenMP *runtime = openmp();
    return runtime != nullptr ? runtime->max_threads() : 1;
}

bool parallel(int64_t items, size_t scratch, bool alone, void (*work)(void *, int64_t, uint8_t *),
              void *context) {
    if (items <= 0) return true;
    Job job;
    job.items = items;
    job.scratch = scratch;
    job.work = work;
    job.context = context;
    const OpenMP *runtime = alone || items == 1 ? nullptr : openmp();
    // Always the whole team: a smaller one would end its other threads and start them anew later.
    if (runtime != nullptr && !runtime->in_parallel() && runtime->max_threads() > 1)
        runtime->parallel(run, &job, 0, 0);
    else
        run(&job);
    return !job.failed;
}

}  // namespace kvc
