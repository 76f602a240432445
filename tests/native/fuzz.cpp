// Random and hostile calls of the C interface (csrc/kvcrush.h):
// scripts/sanitize.sh builds this with the kernels under AddressSanitizer and
// UBSan.
//
//   fuzz [--seed N] [--seconds S | --cases N] [--first N] [--isa NAME] [--write
//   F | --against F]
//
// A case is a cache of random geometry and a few calls of every entry point,
// and follows from (seed, number) alone; a failing one prints how to repeat it.
// There are two kinds:
//   tame   finite data, valid calls: results are compared with plain double
//   arithmetic, and those of
//          an instruction set with those of the first
//   wild   pages of random bytes, NaN, infinities, and calls with wrong numbers
//   in them: each call
//          gives 0, or -1 and a sentence of its own
// In both, a call may touch only the pages that it names: AddressSanitizer is
// told that the others are forbidden; without it, they are compared afterwards.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/kvcrush.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

// Abort, so that the handler says which case it was.
extern "C" const char *__ubsan_default_options() {
    return "print_stacktrace=1:abort_on_error=1";
}

namespace {

// ------------------------------------------------------------------------------------
// failing

uint64_t g_seed = 1;
int64_t g_case = -1;
const char *g_isa = "", *g_call = "";

void print_case() {
    char text[256];
    const int n = std::snprintf(text, sizeof text,
                                "fuzz: in %s; repeat with --seed %llu --first %lld --cases 1 "
                                "--isa %s\n",
                                g_call, static_cast<unsigned long long>(g_seed),
                                static_cast<long long>(g_case), g_isa);
    if (n > 0) (void)!write(2, text, static_cast<size_t>(n));
}

[[noreturn]] void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    std::fprintf(stderr, "fuzz: ");
    std::vfprintf(stderr, format, args);
    std::fprintf(stderr, "\n");
    va_end(args);
    print_case();
    std::_Exit(1);
}

// ------------------------------------------------------------------------------------
// chance

struct Random {
    uint64_t state;

    Random(uint64_t seed, uint64_t number) : state(seed * 0x9e3779b97f4a7c15u + number) {
        for (int i = 0; i < 4; ++i) next();
    }
    uint64_t next() {  // splitmix64
        uint64_t x = state += 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    }
    int64_t in(int64_t low, int64_t high) {  // both included
        return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
    }
    bool chance(int percent) {
        return in(1, 100) <= percent;
    }
    template <class T>
    T of(std::initializer_list<T> choices) {
        return choices.begin()[in(0, static_cast<int64_t>(choices.size()) - 1)];
    }
    // Nearly normal, and the same on every machine.
    float normal() {
        int64_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += in(0, 65535);
        return static_cast<float>(sum - 131070) * (1 / 37837.0f);
    }
};

// ------------------------------------------------------------------------------------
// numbers

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

int dtype_size(int dtype) {
    return dtype == KVC_F32 ? 4 : 2;
}
float load(const uint8_t *base, int64_t index, int dtype) {
    if (dtype == KVC_F32) {
        float x;
        std::memcpy(&x, base + 4 * index, 4);
        return x;
    }
    uint16_t h;
    std::memcpy(&h, base + 2 * index, 2);
    if (dtype == KVC_BF16) return from_bits(uint32_t{h} << 16);
    const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = h >> 10 & 31u, rest = h & 1023u;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | rest << 13);
    const float x = exponent != 0 ? std::ldexp(1.0f + static_cast<float>(rest) / 1024.0f,
                                               static_cast<int>(exponent) - 15)
                                  : std::ldexp(static_cast<float>(rest), -24);
    return sign != 0 ? -x : x;
}
// Towards zero; float16 only in its normal range, else 0.
void save(uint8_t *base, int64_t index, int dtype, float x) {
    const uint32_t bits = to_bits(x);
    if (dtype == KVC_F32) {
        std::memcpy(base + 4 * index, &x, 4);
        return;
    }
    uint16_t h = static_cast<uint16_t>(bits >> 16);
    if (dtype == KVC_F16) {
        const int exponent = static_cast<int>(bits >> 23 & 255u) - 112;
        h = exponent < 1 || exponent > 30
                ? 0
                : static_cast<uint16_t>((bits >> 16 & 0x8000u) |
                                        static_cast<uint32_t>(exponent) << 10 |
                                        (bits >> 13 & 1023u));
    }
    std::memcpy(base + 2 * index, &h, 2);
}

// ------------------------------------------------------------------------------------
// threads

int g_threads = 1;
thread_local bool t_in_team = false;

}  // namespace

// The kernels look for an OpenMP runtime in their process; this one is small, and every sanitizer
// understands it.
extern "C" __attribute__((visibility("default"))) void GOMP_parallel(void (*work)(void *),
                                                                     void *data, unsigned,
                                                                     unsigned) {
    std::vector<std::thread> team;
    const auto run = [&] {
        t_in_team = true;
        work(data);
        t_in_team = false;
    };
    for (int i = 1; i < g_threads; ++i) team.emplace_back(run);
    run();
    for (std::thread &thread : team) thread.join();
}
extern "C" __attribute__((visibility("default"))) int omp_get_max_threads() {
    return g_threads;
}
extern "C" __attribute__((visibility("default"))) int omp_in_parallel() {
    return t_in_team;
}

namespace {

// ------------------------------------------------------------------------------------
// the cache

bool fitted(int codec) {
    return codec >= KVC_TC4 && codec <= KVC_TC8;
}

// Angles of a rotary embedding as kvc_table wants them, the same in every case.
struct Angles {
    static constexpr int32_t kPositions = 300000;
    std::vector<float> coarse, fine;

    explicit Angles(int k_size) {
        const int half = k_size / 2;
        const auto rows = [&](std::vector<float> &to, int64_t n, double step) {
            for (int64_t i = 0; i < n; ++i)
                for (int side = 0; side < 2; ++side)
                    for (int j = 0; j < half; ++j)
                        to.push_back(at(j, half, static_cast<double>(i) * step, side));
        };
        rows(coarse, (kPositions + 255) / 256, 256);
        rows(fine, 256, 1);
    }
    static float at(int j, int half, double position, int side) {
        const double angle = position * std::pow(10000.0, -double{1} * j / half);
        return static_cast<float>(side == 0 ? std::cos(angle) : std::sin(angle));
    }
    static const Angles &of(int k_size) {
        static std::map<int, Angles> known;
        return known.try_emplace(k_size, k_size).first->second;
    }
};

// Tables of the fitted codecs with random bits, whose components are the key's channels.
struct Tables {
    struct Head {
        std::vector<kvc_piece> piece;
        std::vector<float> mean, forward, inverse, cost, step, middle;
        std::vector<int32_t> weight;
    };
    struct Codec {
        std::vector<Head> data;
        std::vector<kvc_head_table> heads;
        kvc_table table{};
    };
    std::vector<Codec> codecs;
    std::vector<const kvc_table *> pointers;

    void make(Random &random, const kvc_layer &layer) {
        codecs.resize(KVC_CODECS);
        for (int i = 0; i < KVC_CODECS; ++i) {
            Codec &codec = codecs[static_cast<size_t>(i)];
            const bool there = fitted(i) && random.chance(85);
            if (there) fill(random, layer, codec);
            pointers.push_back(there ? &codec.table : nullptr);
        }
    }
    static void fill(Random &random, const kvc_layer &layer, Codec &codec) {
        kvc_table &table = codec.table;
        table.positions = Angles::kPositions;
        table.local = random.chance(50);
        if (table.local != 0) {
            const Angles &angles = Angles::of(layer.k_size);
            table.coarse = angles.coarse.data();
            table.fine = angles.fine.data();
        }
        codec.data.resize(static_cast<size_t>(layer.num_kv_heads));
        codec.heads.resize(codec.data.size());
        for (size_t h = 0; h < codec.data.size(); ++h)
            fill_head(random, layer, codec.data[h], codec.heads[h]);
        int32_t capacity = 65520;
        for (const kvc_head_table &head : codec.heads) capacity = std::min(capacity, head.capacity);
        for (kvc_head_table &head : codec.heads) {
            head.capacity = capacity;
            head.exceptions = std::min(head.exceptions, capacity);
        }
        table.heads = codec.heads.data();
    }
    static void fill_head(Random &random, const kvc_layer &layer, Head &data,
                          kvc_head_table &head) {
        const int k_size = layer.k_size;
        head.v_bits = random.of({2, 3, 4});
        head.v_step = head.v_bits == 2 ? 1.0f : head.v_bits == 3 ? 0.59f : 0.34f;
        head.components =
            static_cast<int32_t>(random.chance(60) ? k_size : 4 * random.in(0, k_size / 4));
        head.stride = (head.components + 15) / 16 * 16;
        // No field crosses a byte.
        std::vector<int> bits(static_cast<size_t>(head.components / 4)), placed(bits.size(), 0);
        const int most = random.chance(50) ? 4 : 7;
        for (int &own : bits) own = static_cast<int>(random.in(0, most));
        int cursor = 0;
        for (const int width : {4, 3, 2, 1})
            for (size_t quad = 0; quad < bits.size(); ++quad)
                while (bits[quad] - placed[quad] >= width) {
                    if (cursor % 8 + width > 8) cursor += 8 - cursor % 8;
                    kvc_piece piece{};
                    placed[quad] += width;
                    piece.quad = static_cast<uint8_t>(quad);
                    piece.weight = static_cast<uint8_t>(bits[quad] - placed[quad]);
                    piece.word = static_cast<uint8_t>(cursor / 8);
                    piece.first = static_cast<uint8_t>(cursor % 8);
                    piece.bits = static_cast<uint8_t>(width);
                    data.piece.push_back(piece);
                    cursor += width;
                }
        head.pieces = static_cast<int32_t>(data.piece.size());
        head.words = (cursor + 7) / 8;
        data.piece.reserve(1);  // never null
        data.mean.resize(static_cast<size_t>(k_size));
        for (float &x : data.mean) x = random.normal() * 0.3f;
        data.forward.assign(static_cast<size_t>(k_size * k_size), 0.0f);
        data.inverse.assign(static_cast<size_t>(k_size * head.stride), 0.0f);
        data.inverse.reserve(1);
        data.cost.resize(static_cast<size_t>(k_size));
        const int turn = static_cast<int>(random.in(0, k_size - 1));
        for (int c = 0; c < k_size; ++c) {
            const int own = c < head.components ? bits[static_cast<size_t>(c / 4)] : 0;
            const float step = 6.0f / static_cast<float>(1 << own);
            const int channel = (c + turn) % k_size;
            data.forward[static_cast<size_t>(c * k_size + channel)] = 1 / step;
            if (c < head.components)
                data.inverse[static_cast<size_t>(channel * head.stride + c)] = step;
            data.cost[static_cast<size_t>(c)] = step * step;
        }
        head.piece = data.piece.data();
        head.mean = data.mean.data();
        head.forward = data.forward.data();
        head.inverse = data.inverse.data();
        head.cost = data.cost.data();
        head.fields = (4 * head.pieces + 15) / 16 * 16;
        const int half = k_size / 2;
        data.weight.assign(static_cast<size_t>(half * head.fields), 0);
        data.weight.reserve(1);
        data.step.assign(static_cast<size_t>(head.fields), 0.0f);
        data.step.reserve(1);
        data.middle.assign(static_cast<size_t>(head.fields + 16), 0.0f);
        for (int i = 0; i < head.pieces; ++i)
            for (int j = 0; j < 4; ++j) {
                const kvc_piece &piece = data.piece[static_cast<size_t>(i)];
                const float factor = static_cast<float>(1 << piece.weight);
                data.middle[static_cast<size_t>(4 * i + j)] =
                    0.5f * static_cast<float>((1 << piece.bits) - 1);
                const auto weight = [&](int c) {
                    return factor *
                           data.inverse[static_cast<size_t>(c * head.stride + 4 * piece.quad + j)];
                };
                float largest = 1e-30f;
                for (int c = 0; c < k_size; ++c) largest = std::max(largest, std::abs(weight(c)));
                const float step = largest / 4095;
                data.step[static_cast<size_t>(4 * i + j)] = step;
                for (int c = 0; c < half; ++c) {
                    const auto low = static_cast<uint32_t>(std::lround(weight(c) / step));
                    const auto high = static_cast<uint32_t>(std::lround(weight(c + half) / step));
                    data.weight[static_cast<size_t>(c * head.fields + 4 * i + j)] =
                        static_cast<int32_t>(high << 16 | (low & 65535u));
                }
            }
        head.weight = data.weight.data();
        head.step = data.step.data();
        head.middle = data.middle.data();
        // What layout.h says of such a page.
        const int64_t wasted = head.v_bits == 3 ? 2 * (layer.v_size % 16) : 0;
        const int64_t strip = 64 * head.words + 2 * head.v_bits * layer.v_size + wasted + 18 + 2;
        const int64_t exception = layer.k_size + layer.v_size + 4, room = layer.page_bytes - 32;
        head.exceptions =
            static_cast<int32_t>(random.in(0, std::min<int64_t>(128, room / exception / 2)));
        const int64_t strips = (room - head.exceptions * exception) / strip;
        head.capacity = static_cast<int32_t>(16 * std::min<int64_t>(strips, 4095));
        head.exceptions = std::min(head.exceptions, head.capacity);
    }
};

// Error of an output relative to the largest value held, and of a page's contents: squares of
// errors relative to squares of values.
bool four_bits(int codec) {
    return codec == KVC_INT4 || codec == KVC_GEAR;
}
double attention_tolerance(int codec) {
    return codec <= KVC_EXACT ? 1e-4 : codec == KVC_INT8 ? 2e-3 : four_bits(codec) ? 6e-2 : 0.1;
}
// Of several query tokens where products are those of bfloat16: it rounds weights by 2^-9 of
// themselves, keys that are no bfloat16 already too, and so logits, which here reach 20.
double matrix_tolerance(int codec, int query_dtype) {
    return codec <= KVC_EXACT && query_dtype == KVC_BF16 ? 4e-3 : 4e-2;
}
bool by_matrices(int dtype, int64_t tokens) {
    const std::string isa = g_isa;
    return (isa.find("amx") == 0 || isa.find("avx512bf16") == 0) && dtype == KVC_BF16 && tokens > 1;
}
double content_tolerance(int codec, int dtype) {
    if (codec <= KVC_EXACT) return dtype == KVC_F32 ? 0 : 2e-5;
    // Fitted to nothing, so that hardly anything is left.
    return codec == KVC_INT8 ? 2e-3 : four_bits(codec) ? 6e-2 : codec == KVC_TADA ? 0.15 : 4.0;
}

bool has_positions(int codec) {
    return codec != KVC_RAW;
}

// Positions as pages of a codec give them back: fitted ones keep those of strips' first tokens.
std::vector<int32_t> as_kept(int codec, std::vector<int32_t> positions) {
    for (size_t i = 0; i < positions.size() && fitted(codec); ++i)
        positions[i] = positions[i / 16 * 16] + static_cast<int32_t>(i % 16);
    return positions;
}

// What a page of a tame case holds.
struct Content {
    int codec = KVC_RAW, head = 0, count = 0;
    std::vector<int32_t> positions;
};

struct Cache {
    kvc_layer layer{};
    int64_t bytes = 0, mapped = 0;
    uint8_t *base = nullptr;  // of the mapping
    int64_t capacity[KVC_CODECS];
    Tables tables;
    std::vector<Content> content;

    Cache() = default;
    Cache(const Cache &) = delete;
    Cache &operator=(const Cache &) = delete;
    ~Cache() {
#if defined(__SANITIZE_ADDRESS__)
        std::free(base);
#else
        if (base != nullptr) munmap(base, static_cast<size_t>(mapped));
#endif
    }
    // Exactly as large as it says: a read outside hits a forbidden byte, or a page without access.
    void allocate() {
#if defined(__SANITIZE_ADDRESS__)
        base = static_cast<uint8_t *>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
        if (base == nullptr)
            die("out of memory for a cache of %lld", static_cast<long long>(bytes));
        layer.pool = base;
#else
        const int64_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
        mapped = whole + 2 * page;
        void *memory = mmap(nullptr, static_cast<size_t>(mapped), PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) die("mmap failed");
        base = static_cast<uint8_t *>(memory);
        if (mprotect(base + page, static_cast<size_t>(whole), PROT_READ | PROT_WRITE) != 0)
            die("mprotect failed");
        layer.pool = base + page + (whole - bytes);
#endif
    }
    int64_t pages() const {
        return layer.num_blocks * layer.block_pages;
    }
    int64_t tail_page(int64_t block, int head) const {
        return block * layer.block_pages + layer.first_page + head;
    }
    bool usable(int codec) const {
        return capacity[codec] > 0;
    }
    int codec(Random &random) const {  // one that can be used
        for (;;) {
            const int codec = static_cast<int>(random.in(0, KVC_CODECS - 1));
            if (usable(codec)) return codec;
        }
    }
};

// Forbids all pages but the given ones while it lives.
class Only {
   public:
    Only(const Cache &cache, std::set<int64_t> allowed)
        : cache_(cache), allowed_(std::move(allowed)) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(cache.layer.pool, static_cast<size_t>(cache.bytes));
        for (const int64_t page : allowed_)
            __asan_unpoison_memory_region(at(page), static_cast<size_t>(cache.layer.page_bytes));
#else
        before_.assign(cache.layer.pool, cache.layer.pool + cache.bytes);
#endif
    }
    ~Only() {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(cache_.layer.pool, static_cast<size_t>(cache_.bytes));
#else
        for (int64_t page = 0; page < cache_.pages(); ++page)
            if (allowed_.count(page) == 0 &&
                std::memcmp(at(page), before_.data() + page * cache_.layer.page_bytes,
                            static_cast<size_t>(cache_.layer.page_bytes)) != 0)
                die("page %lld changed, which was not named", static_cast<long long>(page));
#endif
    }

   private:
    uint8_t *at(int64_t page) const {
        return cache_.layer.pool + page * cache_.layer.page_bytes;
    }
    const Cache &cache_;
    const std::set<int64_t> allowed_;
    std::vector<uint8_t> before_;
};

// A directory with arrays of exactly the size that it needs.
struct Directory {
    std::vector<int32_t> begin, end, page;
    std::vector<uint16_t> count;
    std::vector<uint8_t> codec;
    std::vector<int64_t> bias;
    std::vector<float> log_bias;
    int64_t stride = 0;
    bool with_bias = false;

    kvc_directory view() const {
        kvc_directory d{};
        if (begin.empty()) return d;
        d.begin = begin.data();
        d.end = end.data();
        d.stride = stride;
        d.size = static_cast<int64_t>(page.size());
        d.page = page.data();
        d.count = count.data();
        d.codec = codec.data();
        if (with_bias) {
            d.bias = bias.data();
            d.log_bias = log_bias.data();
            d.log_bias_size = static_cast<int64_t>(log_bias.size());
        }
        return d;
    }
    int64_t tokens(int64_t row, int head) const {
        int64_t n = 0;
        if (!begin.empty())
            for (int32_t e = begin[static_cast<size_t>(row * stride + head)];
                 e < end[static_cast<size_t>(row * stride + head)]; ++e)
                n += count[static_cast<size_t>(e)];
        return n;
    }
};

constexpr int64_t kBelow = INT64_MIN, kAbove = INT64_MAX;

// ------------------------------------------------------------------------------------
// a case

class Case {
   public:
    Case(uint64_t seed, int64_t number, std::vector<std::vector<float>> &records)
        : random_(seed, static_cast<uint64_t>(number)), records_(records) {}

    void run() {
        tame_ = random_.chance(50);
        g_threads = static_cast<int>(random_.of({1, 1, 2, 3}));
        make_cache();
        if (cache_.bytes == 0) return;
        fill_tail();
        fill_pages();
        for (int i = static_cast<int>(random_.in(3, 8)); i > 0; --i) {
            switch (random_.in(0, 9)) {
                case 0:
                case 1:
                case 2:
                    attention();
                    break;
                case 8:
                    gather();
                    break;
                case 9:
                    fill();
                    break;
                case 3:
                    read();
                    break;
                case 4:
                    window_scores();
                    break;
                case 5:
                    compact();
                    break;
                case 6:
                    store();
                    break;
                default:
                    encode_and_decode();
            }
        }
        if (random_.chance(40)) top_mask();
        if (random_.chance(40)) represent();
        if (random_.chance(40)) mask_slots();
        if (random_.chance(40)) nearest_kept();
        if (random_.chance(40)) redundancy();
        if (random_.chance(40)) merge();
        if (random_.chance(40)) spread();
        if (random_.chance(40)) capacity();
        if (random_.chance(40)) bad_tables();
        g_call = "nothing";
    }

    static int64_t calls, refused, checked;

   private:
    // --------------------------------------------------------------------------------
    // results

    // Before a call: so that its own sentence can be told from an older one.
    void before(const char *call) {
        g_call = call;
        ++calls;
        if (kvc_use_isa("no such name") != -1) die("kvc_use_isa took a name that does not exist");
    }
    bool after(int status) {
        if (status == 0) return true;
        const std::string text = kvc_error();
        if (status != -1) die("%s gave %d", g_call, status);
        if (text.size() < 10 || text.find("no such name") != std::string::npos)
            die("%s failed without a sentence", g_call);
        ++refused;
        return false;
    }
    void must(int status) {
        if (!after(status)) die("%s refused a valid call: %s", g_call, kvc_error());
    }
    void must_refuse(int status) {
        if (after(status)) die("%s took a call that it must refuse", g_call);
    }

    // Results of the first instruction set are kept; those of others are compared with them.
    void record(const float *x, int64_t n, double tolerance) {
        if (!tame_) return;
        if (recording_) {
            records_.emplace_back(x, x + n);
            return;
        }
        if (next_record_ >= records_.size()) die("%s has no counterpart", g_call);
        const std::vector<float> &other = records_[next_record_++];
        if (static_cast<int64_t>(other.size()) != n)
            die("%s gave %lld numbers, not %lld", g_call, static_cast<long long>(n),
                static_cast<long long>(other.size()));
        double largest = 0, error = 0, squares = 0, all = 0;
        for (int64_t i = 0; i < n; ++i) {
            const double a = x[i], b = other[static_cast<size_t>(i)];
            if (a == b) continue;
            if (!(std::fabs(a - b) < 1e30)) die("%s: %g here, %g elsewhere", g_call, a, b);
            error = std::max(error, std::fabs(a - b));
            squares += (a - b) * (a - b);
        }
        for (const float b : other) {
            if (std::isfinite(b))
                largest = std::max(largest, std::fabs(double{b})), all += double{b} * b;
        }
        if (error > tolerance * largest && squares > tolerance * tolerance * all)
            die("%s differs from another instruction set by %g of %g", g_call, error, largest);
    }

   public:
    bool recording_ = true;

   private:
    // --------------------------------------------------------------------------------
    // inputs

    void floats(std::vector<float> &x, int64_t rows, int64_t size) {
        x.resize(static_cast<size_t>(rows * size));
        const int kind = static_cast<int>(tame_ ? random_.in(0, 3) : random_.in(0, 8));
        std::vector<float> channel(static_cast<size_t>(size), 1.0f), offset(channel.size(), 0.0f);
        if (kind == 1)  // outliers, as real keys have them
            for (size_t c = 0; c < channel.size(); ++c) {
                channel[c] = random_.chance(5) ? 20.0f : 1.0f;
                offset[c] = random_.chance(5) ? 10.0f : 0.0f;
            }
        const float constant = random_.normal();
        for (size_t i = 0; i < x.size(); ++i) {
            const size_t c = i % static_cast<size_t>(size);
            const float normal = random_.normal() * channel[c] + offset[c];
            switch (kind) {
                case 2:
                    x[i] = random_.chance(50) ? 0.0f : normal;
                    break;
                case 3:
                    x[i] = constant;
                    break;
                case 4:
                    x[i] = normal * 1e30f;
                    break;
                case 5:
                    x[i] = normal * 1e-38f;
                    break;
                case 6:
                    x[i] = from_bits(static_cast<uint32_t>(random_.next()));
                    break;
                case 7:
                    x[i] = random_.chance(3) ? random_.of({NAN, INFINITY, -INFINITY}) : normal;
                    break;
                case 8:
                    x[i] = 0;
                    break;
                default:
                    x[i] = normal;
            }
        }
    }
    // The same as numbers of a dtype, `stride` numbers a row, with what lies between in 0xff.
    std::vector<uint8_t> rows_of(int dtype, int64_t rows, int64_t size, int64_t stride) {
        const int64_t numbers = rows == 0 ? 0 : (rows - 1) * stride + size;
        std::vector<uint8_t> x(static_cast<size_t>(numbers * dtype_size(dtype)), 0xff);
        std::vector<float> from;
        floats(from, rows, size);
        const bool bits = !tame_ && random_.chance(20);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < size; ++c)
                save(x.data(), r * stride + c, dtype,
                     bits ? from_bits(static_cast<uint32_t>(random_.next()))
                          : from[static_cast<size_t>(r * size + c)]);
        return x;
    }

    void make_cache() {
        kvc_layer &layer = cache_.layer;
        const auto head_size = [&] {
            return static_cast<int32_t>(random_.chance(50) ? random_.of({64, 128, 96, 80, 256})
                                                           : 8 * random_.in(1, 32));
        };
        layer.k_size = head_size();
        layer.v_size = random_.chance(60) ? layer.k_size : head_size();
        layer.dtype = static_cast<int32_t>(random_.in(KVC_F32, KVC_F16));
        layer.num_kv_heads = static_cast<int32_t>(random_.in(1, 3));
        const int64_t group = random_.chance(95) ? random_.in(1, 8) : random_.in(9, 100);
        layer.num_heads = static_cast<int32_t>(layer.num_kv_heads * group);
        layer.block_size =
            static_cast<int32_t>(16 * (random_.chance(85) ? random_.in(1, 4) : random_.in(5, 16)));
        const int64_t layers = random_.in(1, 3);
        layer.block_pages = static_cast<int32_t>(layers * layer.num_kv_heads + random_.in(0, 2));
        layer.first_page =
            static_cast<int32_t>(random_.in(0, layer.block_pages - layer.num_kv_heads));
        layer.page_bytes =
            int64_t{layer.block_size} * (layer.k_size + layer.v_size) * dtype_size(layer.dtype);
        layer.scale = static_cast<float>(1 / std::sqrt(double{static_cast<double>(layer.k_size)}));
        const int64_t room = int64_t{random_.chance(80) ? 200 : 2000} << 10,
                      block = layer.page_bytes * layer.block_pages;
        layer.num_blocks = std::min<int64_t>(random_.in(2, 12), std::max<int64_t>(2, room / block));
        cache_.bytes = layer.num_blocks * block;
        cache_.allocate();
        switch (random_.in(0, 2)) {
            case 0:
                std::memset(layer.pool, 0xff, static_cast<size_t>(cache_.bytes));
                break;
            case 1:
                std::memset(layer.pool, 0, static_cast<size_t>(cache_.bytes));
                break;
            default:
                for (int64_t i = 0; i < cache_.bytes; i += 8) {
                    const uint64_t x = random_.next();
                    std::memcpy(layer.pool + i, &x, 8);
                }
        }
        cache_.tables.make(random_, layer);
        if (random_.chance(80)) layer.tables = cache_.tables.pointers.data();
        before("kvc_check_layer");
        must(kvc_check_layer(&layer));
        for (int codec = 0; codec < KVC_CODECS; ++codec) {
            if (!fitted(codec)) {
                cache_.capacity[codec] =
                    kvc_capacity(codec, layer.page_bytes, layer.k_size, layer.v_size, layer.dtype);
                continue;
            }
            const kvc_table *table = layer.tables == nullptr ? nullptr : layer.tables[codec];
            cache_.capacity[codec] = table == nullptr ? 0 : table->heads[0].capacity;
        }
        cache_.content.resize(static_cast<size_t>(cache_.pages()));
        // The first blocks are a tail's, all but the last of them whole; the others are compressed.
        tail_blocks_ = random_.in(1, layer.num_blocks - 1);
        last_block_ = random_.in(1, layer.block_size);
        if (!tame_ && random_.chance(5)) layer.scale = random_.of({NAN, INFINITY, 0.0f, -1.0f});
    }

    // Any layer that must be refused.
    kvc_layer bad_layer() {
        kvc_layer bad = cache_.layer;
        switch (random_.in(0, 12)) {
            case 0:
                bad.k_size = random_.of({0, -8, 4, 12, 264, INT32_MAX, INT32_MIN});
                break;
            case 1:
                bad.v_size = random_.of({0, -8, 4, 12, 264, INT32_MAX, INT32_MIN});
                break;
            case 2:
                bad.dtype = random_.of({-1, 3, INT32_MAX, INT32_MIN});
                break;
            case 3:
                bad.block_size = random_.of({0, -16, 8, 65536, INT32_MAX, INT32_MIN});
                break;
            case 4:
                bad.num_kv_heads = random_.of({0, -1, INT32_MAX, INT32_MIN});
                break;
            case 5:
                bad.num_heads = random_.of({0, -1, INT32_MAX, INT32_MIN, 65537});
                break;
            case 6:
                bad.first_page = random_.of({-1, bad.block_pages, INT32_MAX, INT32_MIN});
                break;
            case 7:
                bad.block_pages = random_.of({0, -1, INT32_MIN});
                break;
            case 8:
                bad.page_bytes = random_.of({int64_t{0}, bad.page_bytes - 1, kAbove, kBelow});
                break;
            case 9:
                bad.pool = nullptr;
                break;
            case 10:
                bad.pool += random_.in(1, 63);
                break;
            case 11:
                bad.num_blocks = random_.of({int64_t{-1}, kBelow, kAbove});
                break;
            default:
                bad.num_blocks = kAbove / bad.page_bytes;
                bad.block_pages = INT32_MAX;
        }
        return bad;
    }
    bool hostile(int percent) {
        return !tame_ && random_.chance(percent);
    }

    // A block of the tail in a tame case, any block in a wild one.
    int32_t tail_block() {
        return static_cast<int32_t>(
            random_.in(0, (tame_ ? tail_blocks_ : cache_.layer.num_blocks) - 1));
    }
    int64_t compressed_page() {
        const int64_t first = tame_ ? tail_blocks_ * cache_.layer.block_pages : 0;
        return random_.in(first, cache_.pages() - 1);
    }

    // A table of blocks and the length of the tail in it.
    int32_t make_tail(int64_t most_tokens, std::vector<int32_t> &table) {
        const int64_t size = cache_.layer.block_size;
        int64_t length = random_.chance(10) ? 0 : random_.in(1, most_tokens);
        const int64_t blocks = (length + size - 1) / size;
        table.resize(static_cast<size_t>(blocks));
        for (int32_t &block : table) block = tail_block();
        if (tame_)
            for (int64_t i = 0; i < blocks; ++i) {
                int32_t &block = table[static_cast<size_t>(i)];
                if (block != tail_blocks_ - 1) continue;
                // The partial block can only be the last.
                if (i == blocks - 1)
                    length = std::min(length, i * size + last_block_);
                else if (tail_blocks_ > 1)
                    block = static_cast<int32_t>(random_.in(0, tail_blocks_ - 2));
                else {
                    table.resize(1);
                    return static_cast<int32_t>(std::min(length, last_block_));
                }
            }
        return static_cast<int32_t>(length);
    }

    Directory make_directory(int64_t rows, int most_entries) {
        Directory d;
        const int heads = cache_.layer.num_kv_heads;
        if (rows == 0 || random_.chance(15)) return d;
        d.stride = heads + random_.in(0, 2);
        d.begin.assign(static_cast<size_t>((rows - 1) * d.stride + heads), -7);
        d.end = d.begin;
        d.with_bias = random_.chance(25);
        for (int64_t r = 0; r < rows; ++r)
            for (int h = 0; h < heads; ++h) {
                const size_t at = static_cast<size_t>(r * d.stride + h);
                d.begin[at] = static_cast<int32_t>(d.page.size());
                for (int64_t n = random_.in(0, most_entries); n > 0; --n) add_entry(d, h);
                d.end[at] = static_cast<int32_t>(d.page.size());
                if (d.begin[at] == d.end[at] && random_.chance(20))
                    d.begin[at] = d.end[at] = random_.of({-1, INT32_MAX, INT32_MIN});
            }
        return d;
    }
    void add_entry(Directory &d, int head) {
        int64_t page = compressed_page();
        // A fitted page belongs to its head.
        const auto theirs = [&] {
            const Content &held = cache_.content[static_cast<size_t>(page)];
            return tame_ && fitted(held.codec) && held.head != head;
        };
        for (int i = 0; i < 20 && theirs(); ++i) page = compressed_page();
        const Content &held = cache_.content[static_cast<size_t>(page)];
        const bool nothing = theirs();
        const int codec = nothing ? KVC_INT8 : tame_ ? held.codec : cache_.codec(random_);
        const int64_t most = nothing ? 0 : tame_ ? held.count : cache_.capacity[codec];
        const int64_t count = random_.chance(60)   ? most
                              : random_.chance(20) ? 0
                                                   : random_.in(0, most);
        d.page.push_back(static_cast<int32_t>(page));
        d.codec.push_back(static_cast<uint8_t>(codec));
        d.count.push_back(static_cast<uint16_t>(count));
        if (!d.with_bias) return;
        d.bias.push_back(random_.chance(50) ? -1 : static_cast<int64_t>(d.log_bias.size()));
        if (d.bias.back() < 0) return;
        for (int64_t i = 0; i < count; ++i)
            d.log_bias.push_back(random_.chance(2)             ? -INFINITY
                                 : !tame_ && random_.chance(1) ? NAN
                                                               : random_.normal());
    }
    // Wrong numbers in a directory; it may stay valid.
    void spoil(Directory &d) {
        if (d.begin.empty()) return;
        const size_t at =
            static_cast<size_t>(random_.in(0, static_cast<int64_t>(d.begin.size()) - 1));
        const int32_t size = static_cast<int32_t>(d.page.size());
        if (random_.chance(30)) {
            int32_t &which = random_.chance(50) ? d.begin[at] : d.end[at];
            which = random_.of({-1, size, size + 1, 0, INT32_MAX, INT32_MIN});
            return;
        }
        if (size == 0) return;
        const size_t e = static_cast<size_t>(random_.in(0, size - 1));
        const int32_t pages = static_cast<int32_t>(cache_.pages());
        switch (random_.in(0, 3)) {
            case 0:
                d.page[e] = random_.of({-1, pages, pages + 1, INT32_MAX, INT32_MIN});
                break;
            case 1:
                d.count[e] = static_cast<uint16_t>(
                    random_.chance(50) ? cache_.capacity[d.codec[e]] + 1 : 65535);
                break;
            case 2:
                d.codec[e] = static_cast<uint8_t>(random_.in(0, 255));
                break;
            default:
                if (d.with_bias)
                    d.bias[e] =
                        random_.of({static_cast<int64_t>(d.log_bias.size()) + 1 - d.count[e],
                                    static_cast<int64_t>(d.log_bias.size()) + 1, kAbove, kBelow});
        }
    }
    void allow(std::set<int64_t> &allowed, const Directory &d) const {
        for (const int32_t page : d.page)
            if (page >= 0 && page < cache_.pages()) allowed.insert(page);
    }
    void allow(std::set<int64_t> &allowed, const std::vector<int32_t> &table) const {
        for (const int32_t block : table)
            if (block >= 0 && block < cache_.layer.num_blocks)
                for (int h = 0; h < cache_.layer.num_kv_heads; ++h)
                    allowed.insert(cache_.tail_page(block, h));
    }

    // --------------------------------------------------------------------------------
    // store

    void store_rows(const std::vector<int64_t> &slots) {
        const kvc_layer &layer = cache_.layer;
        const int64_t rows = static_cast<int64_t>(slots.size());
        const int64_t k_row = int64_t{layer.num_kv_heads} * layer.k_size;
        const int64_t v_row = int64_t{layer.num_kv_heads} * layer.v_size;
        const int64_t k_stride = k_row + random_.in(0, 3), v_stride = v_row + random_.in(0, 3);
        const std::vector<uint8_t> key = rows_of(layer.dtype, rows, k_row, k_stride);
        const std::vector<uint8_t> value = rows_of(layer.dtype, rows, v_row, v_stride);
        bool valid = true;
        std::set<int64_t> allowed;
        for (const int64_t slot : slots) {
            if (slot >= layer.num_blocks * layer.block_size) valid = false;
            if (slot >= 0 && slot < layer.num_blocks * layer.block_size)
                for (int h = 0; h < layer.num_kv_heads; ++h)
                    allowed.insert(cache_.tail_page(slot / layer.block_size, h));
        }
        {
            const Only only(cache_, allowed);
            before("kvc_store");
            const int status =
                kvc_store(&layer, rows, key.data(), k_stride, value.data(), v_stride, slots.data());
            valid ? must(status) : must_refuse(status);
        }
        if (!tame_) return;
        // Raw pages give back what was put in.
        std::vector<int64_t> last(static_cast<size_t>(layer.num_blocks * layer.block_size), -1);
        for (int64_t i = 0; i < rows; ++i)
            if (slots[static_cast<size_t>(i)] >= 0)
                last[static_cast<size_t>(slots[static_cast<size_t>(i)])] = i;
        const int h = static_cast<int>(random_.in(0, layer.num_kv_heads - 1));
        std::vector<float> k(static_cast<size_t>(layer.block_size * layer.k_size));
        std::vector<float> v(static_cast<size_t>(layer.block_size * layer.v_size));
        for (int64_t b = 0; b < layer.num_blocks; ++b) {
            if (*std::max_element(last.begin() + b * layer.block_size,
                                  last.begin() + (b + 1) * layer.block_size) < 0)
                continue;
            before("kvc_decode");
            must(kvc_decode(&layer, KVC_RAW, h, cache_.tail_page(b, h), layer.block_size, k.data(),
                            v.data(), nullptr));
            for (int64_t t = 0; t < layer.block_size; ++t) {
                const int64_t i = last[static_cast<size_t>(b * layer.block_size + t)];
                if (i < 0) continue;
                for (int64_t c = 0; c < layer.k_size; ++c)
                    if (k[static_cast<size_t>(t * layer.k_size + c)] !=
                        load(key.data(), i * k_stride + h * layer.k_size + c, layer.dtype))
                        die("a stored key came back changed");
                for (int64_t c = 0; c < layer.v_size; ++c)
                    if (v[static_cast<size_t>(t * layer.v_size + c)] !=
                        load(value.data(), i * v_stride + h * layer.v_size + c, layer.dtype))
                        die("a stored value came back changed");
            }
            ++checked;
        }
    }

    void fill_tail() {
        const int64_t size = cache_.layer.block_size, end = (tail_blocks_ - 1) * size + last_block_;
        for (int64_t first = 0; first < end;) {
            std::vector<int64_t> slots;
            for (int64_t n = random_.in(1, 100); n > 0 && first < end; --n)
                slots.push_back(first++);
            store_rows(slots);
        }
    }

    void store() {
        const kvc_layer &layer = cache_.layer;
        const int64_t size = layer.block_size, end = layer.num_blocks * size;
        if (hostile(20)) {
            before("kvc_store");
            if (random_.chance(50)) {
                const kvc_layer bad = bad_layer();
                must_refuse(kvc_store(&bad, 0, nullptr, 0, nullptr, 0, nullptr));
            } else {
                must(kvc_store(&layer, random_.of({int64_t{0}, int64_t{-1}, kBelow}), nullptr, 0,
                               nullptr, 0, nullptr));
            }
            return;
        }
        std::vector<int64_t> slots;
        // Runs, so that whole strips occur; a tame case never writes twice at once into a slot, nor
        // beyond what is filled.
        const int64_t filled = (tail_blocks_ - 1) * size + last_block_;
        int64_t at = tame_ ? 0 : random_.in(0, end - 1);
        for (int64_t run = random_.in(0, 6); run > 0; --run) {
            at += random_.in(0, 20);
            if (random_.chance(40)) at = at / 16 * 16 + 16;
            for (int64_t n = random_.in(1, 40); n > 0; --n, ++at) {
                if (at >= (tame_ ? filled : end)) {
                    if (tame_) break;
                    at = random_.in(0, end - 1);
                }
                slots.push_back(random_.chance(5) ? random_.of({int64_t{-1}, kBelow}) : at);
            }
        }
        if (hostile(20) && !slots.empty())
            slots[static_cast<size_t>(random_.in(0, static_cast<int64_t>(slots.size()) - 1))] =
                random_.of({end, end + 1, kAbove});
        store_rows(slots);
    }

    // --------------------------------------------------------------------------------
    // pages

    std::vector<int32_t> make_positions(int codec, int64_t n) {
        std::vector<int32_t> positions(static_cast<size_t>(n));
        const int64_t gap = random_.of({1, 1, 3, 1000, 40000}), start = random_.in(0, 100000);
        int64_t at = start;
        for (int32_t &position : positions) {
            position = static_cast<int32_t>(std::min<int64_t>(at, INT32_MAX));
            at += random_.in(1, gap);
        }
        // Further than a page or its tables reach: close together instead.
        if (at - start >= 65536 * 15 || (fitted(codec) && at > Angles::kPositions))
            for (size_t i = 0; i < positions.size(); ++i)
                positions[i] = static_cast<int32_t>(start + static_cast<int64_t>(i) * 3);
        return positions;
    }

    void encode_page(int64_t page, int codec, int64_t count) {
        const kvc_layer &layer = cache_.layer;
        const int32_t head = static_cast<int32_t>(random_.in(0, layer.num_kv_heads - 1));
        std::vector<float> key, value;
        floats(key, count, layer.k_size);
        floats(value, count, layer.v_size);
        const std::vector<int32_t> positions = make_positions(codec, count);
        const bool with = has_positions(codec) || random_.chance(50);
        {
            const Only only(cache_, {page});
            before("kvc_encode");
            must(kvc_encode(&layer, codec, head, page, static_cast<int32_t>(count), key.data(),
                            value.data(), with ? positions.data() : nullptr));
        }
        Content &content = cache_.content[static_cast<size_t>(page)];
        content.codec = codec;
        content.head = head;
        content.count = static_cast<int>(count);
        content.positions = as_kept(codec, positions);
        if (tame_ || random_.chance(50)) decode_page(page, codec, head, count, &key, &value);
    }

    // Reads a page back; with K and V, compares.
    void decode_page(int64_t page, int codec, int32_t head, int64_t count,
                     const std::vector<float> *key, const std::vector<float> *value) {
        const kvc_layer &layer = cache_.layer;
        std::vector<float> k(static_cast<size_t>(count * layer.k_size));
        std::vector<float> v(static_cast<size_t>(count * layer.v_size));
        std::vector<int32_t> positions(static_cast<size_t>(count));
        const bool want_k = random_.chance(80), want_v = random_.chance(80);
        const bool want_positions = has_positions(codec) && random_.chance(80);
        {
            const Only only(cache_, {page});
            before("kvc_decode");
            must(kvc_decode(&layer, codec, head, page, static_cast<int32_t>(count),
                            want_k ? k.data() : nullptr, want_v ? v.data() : nullptr,
                            want_positions ? positions.data() : nullptr));
        }
        if (!tame_ || key == nullptr) return;
        const double tolerance = content_tolerance(codec, layer.dtype);
        if (want_k) compare_content(k, *key, tolerance);
        if (want_v) compare_content(v, *value, tolerance);
        // Codes next to a boundary may differ by one between instruction sets.
        if (want_k) record(k.data(), static_cast<int64_t>(k.size()), std::sqrt(tolerance));
        if (want_v) record(v.data(), static_cast<int64_t>(v.size()), std::sqrt(tolerance));
        if (want_positions && positions != cache_.content[static_cast<size_t>(page)].positions)
            die("positions came back changed");
    }
    void compare_content(const std::vector<float> &x, const std::vector<float> &wanted,
                         double tolerance) {
        double error = 0, all = 0;
        for (size_t i = 0; i < wanted.size(); ++i) {
            const double d = double{x[i]} - double{wanted[i]};
            error += d * d;
            all += double{wanted[i]} * wanted[i];
        }
        // Coarse codes miss even what is next to nothing, and of scales in float16 those that are.
        const double least = (tolerance > 1 ? 9.0 : 1.5e-11) * static_cast<double>(wanted.size());
        if (!(error <= tolerance * all + least)) die("%s lost %g of %g", g_call, error, all);
        ++checked;
    }

    void fill_pages() {
        for (int64_t page = tail_blocks_ * cache_.layer.block_pages; page < cache_.pages();
             ++page) {
            if (!tame_ && random_.chance(50)) continue;  // stays as it is
            const int codec = cache_.codec(random_);
            const int64_t most = cache_.capacity[codec];
            encode_page(page, codec, random_.chance(40) ? most : random_.in(0, most));
        }
    }

    void encode_and_decode() {
        if (!hostile(60)) {
            const int codec = cache_.codec(random_);
            const int64_t most = cache_.capacity[codec];
            const int64_t page = compressed_page();
            encode_page(page, codec, random_.in(0, most));
            return;
        }
        kvc_layer layer = cache_.layer;
        int64_t page = compressed_page();
        int32_t codec = cache_.codec(random_);
        int32_t count = static_cast<int32_t>(random_.in(0, cache_.capacity[codec]));
        std::vector<int32_t> positions = make_positions(codec, count);
        std::vector<float> key, value;
        floats(key, count, layer.k_size);
        floats(value, count, layer.v_size);
        int32_t head = static_cast<int32_t>(random_.in(0, layer.num_kv_heads - 1));
        bool refuse = true, null_positions = false;
        switch (random_.in(0, 8)) {
            case 0:
                page = random_.of({int64_t{-1}, cache_.pages(), kAbove, kBelow, int64_t{INT32_MAX},
                                   int64_t{INT32_MIN}});
                break;
            case 1:
                codec = random_.of({-1, int32_t{KVC_CODECS}, 255, INT32_MAX, INT32_MIN});
                break;
            case 2:
                count = random_.of({-1, static_cast<int32_t>(cache_.capacity[codec]) + 1, INT32_MAX,
                                    INT32_MIN, 65535});
                break;
            case 3:
                layer = bad_layer();
                break;
            case 4:
                head = random_.of({-1, layer.num_kv_heads, INT32_MAX, INT32_MIN});
                break;
            case 5:
                layer.tables = nullptr;
                refuse = fitted(codec);
                break;
            case 6:  // positions are not looked at when decoding, nor for raw pages
                null_positions = true;
                refuse = has_positions(codec) && count != 0;
                break;
            default:
                refuse = false;
                if (count < 2) break;
                refuse = has_positions(codec);
                switch (random_.in(0, 2)) {
                    case 0:
                        positions[1] = positions[0];
                        break;
                    case 1:
                        positions[0] = INT32_MIN;
                        positions[static_cast<size_t>(count) - 1] = INT32_MAX;
                        break;
                    default:
                        positions[static_cast<size_t>(count) - 1] = INT32_MIN;
                }
        }
        const bool inside = page >= 0 && page < cache_.pages();
        const Only only(cache_, inside ? std::set<int64_t>{page} : std::set<int64_t>{});
        before("kvc_encode");
        const int status = kvc_encode(&layer, codec, head, page, count, key.data(), value.data(),
                                      null_positions ? nullptr : positions.data());
        refuse ? must_refuse(status) : must(status);
        // The same call the other way, whose outputs are large enough wherever it is valid.
        before("kvc_decode");
        after(kvc_decode(&layer, codec, head, page, count, key.data(), value.data(),
                         null_positions ? nullptr : positions.data()));
    }

    // --------------------------------------------------------------------------------
    // attention

    // K, V of all slots of a head, as the library reads them.
    struct Held {
        std::vector<float> key, value;
        std::vector<double> bias;
        int64_t compressed = 0, tail = 0;
        double tolerance = 0;
        int codec = KVC_RAW;  // the one that loses most
    };
    Held held(const Directory &d, int64_t row, const std::vector<int32_t> &table, int32_t tail,
              int head) {
        const kvc_layer &layer = cache_.layer;
        Held x;
        kvc_source request{};
        request.directory = d.view();
        if (!d.begin.empty()) {
            request.directory.begin += row * d.stride;
            request.directory.end += row * d.stride;
        }
        request.tail_table = table.data();
        request.tail_length = tail;
        x.compressed = d.tokens(row, head);
        x.tail = tail;
        const int64_t n = x.compressed + tail;
        x.key.resize(static_cast<size_t>(n * layer.k_size));
        x.value.resize(static_cast<size_t>(n * layer.v_size));
        x.tolerance = attention_tolerance(KVC_RAW);
        before("kvc_read");
        must(kvc_read(&layer, &request, head, 0, n, x.key.data(), x.value.data(), nullptr));
        if (!d.begin.empty()) {
            const size_t at = static_cast<size_t>(row * d.stride + head);
            for (int32_t i = d.begin[at]; i < d.end[at]; ++i) {
                const size_t e = static_cast<size_t>(i);
                x.tolerance = std::max(x.tolerance, attention_tolerance(d.codec[e]));
                x.codec = std::max(x.codec, int{d.codec[e]});
                const int64_t bias = d.with_bias ? d.bias[e] : -1;
                for (int64_t t = 0; t < d.count[e]; ++t)
                    x.bias.push_back(bias < 0 ? 0.0
                                              : double{d.log_bias[static_cast<size_t>(bias + t)]});
            }
        }
        x.bias.resize(static_cast<size_t>(n), 0.0);
        return x;
    }
    // Weights of a query over its slots; the last one is the sum, the result the largest logit.
    double weigh(const Held &x, const uint8_t *query, int64_t at, int dtype, int64_t visible,
                 std::vector<double> &weight) {
        const kvc_layer &layer = cache_.layer;
        const int64_t n = x.compressed + std::min<int64_t>(x.tail, std::max<int64_t>(0, visible));
        weight.assign(static_cast<size_t>(n) + 1, 0.0);
        double top = -INFINITY, sum = 0;
        for (int64_t i = 0; i < n; ++i) {
            double dot = 0;
            for (int64_t c = 0; c < layer.k_size; ++c)
                dot += double{load(query, at + c, dtype)} *
                       double{x.key[static_cast<size_t>(i * layer.k_size + c)]};
            weight[static_cast<size_t>(i)] =
                dot * double{layer.scale} + x.bias[static_cast<size_t>(i)];
            top = std::max(top, weight[static_cast<size_t>(i)]);
        }
        for (int64_t i = 0; i < n; ++i) {
            double &w = weight[static_cast<size_t>(i)];
            w = top == -INFINITY ? 0 : std::exp(w - top);
            sum += w;
        }
        weight[static_cast<size_t>(n)] = sum;
        return top;
    }

    void attention() {
        const kvc_layer &layer = cache_.layer;
        const int64_t seqs = random_.in(0, 4);
        std::vector<int32_t> start{static_cast<int32_t>(random_.in(0, 2))}, length;
        std::vector<std::vector<int32_t>> tables(static_cast<size_t>(seqs));
        // Many queries, or many tokens: both would take too long.
        const bool block = random_.chance(20), many = !block && random_.chance(15);
        const int64_t most_tokens = many ? 2600 : block ? 100 : 3 * layer.block_size;
        int64_t columns = 0;
        for (int64_t s = 0; s < seqs; ++s) {
            const int64_t rows = !block                ? random_.of({0, 1, 1, 1, 1, 2})
                                 : layer.num_heads > 9 ? random_.in(0, 6)
                                                       : random_.in(0, 40);
            start.push_back(static_cast<int32_t>(start.back() + rows));
            length.push_back(make_tail(most_tokens, tables[static_cast<size_t>(s)]));
            columns =
                std::max(columns, static_cast<int64_t>(tables[static_cast<size_t>(s)].size()));
        }
        const int64_t stride = columns + random_.in(0, 2);
        std::vector<int32_t> table(
            seqs == 0 ? 0 : static_cast<size_t>((seqs - 1) * stride + columns), -1);
        for (int64_t s = 0; s < seqs; ++s)
            std::copy(tables[static_cast<size_t>(s)].begin(), tables[static_cast<size_t>(s)].end(),
                      table.begin() + s * stride);
        Directory d = make_directory(seqs, block ? 1 : many ? 12 : 3);
        const int64_t rows = start.back();
        int32_t query_dtype = static_cast<int32_t>(random_.in(KVC_F32, KVC_F16));
        int32_t out_dtype = static_cast<int32_t>(random_.in(KVC_F32, KVC_F16));
        const int64_t query_row = int64_t{layer.num_heads} * layer.k_size;
        const int64_t out_row = int64_t{layer.num_heads} * layer.v_size;
        const int64_t query_stride = query_row + random_.in(0, 3);
        const int64_t out_stride = out_row + random_.in(0, 3);
        const std::vector<uint8_t> query = rows_of(query_dtype, rows, query_row, query_stride);
        std::vector<uint8_t> out(
            static_cast<size_t>(
                rows == 0 ? 0 : ((rows - 1) * out_stride + out_row) * dtype_size(out_dtype)),
            0xff);
        std::vector<float> lse(static_cast<size_t>(rows * layer.num_heads), 12345.0f);
        kvc_layer used = layer;
        bool spoiled = false, refuse = false;
        if (hostile(50)) {
            spoiled = true;
            switch (random_.in(0, 7)) {
                case 0:
                    used = bad_layer();
                    refuse = true;
                    break;
                case 1:
                    (random_.chance(50) ? query_dtype : out_dtype) =
                        random_.of({-1, 3, INT32_MAX, INT32_MIN});
                    refuse = true;
                    break;
                case 2:
                    if (length.empty()) break;
                    length[static_cast<size_t>(random_.in(0, seqs - 1))] =
                        random_.of({-1, INT32_MIN, INT32_MAX,
                                    static_cast<int32_t>(stride * layer.block_size + 1)});
                    break;
                case 3:
                    if (table.empty()) break;
                    table[static_cast<size_t>(
                        random_.in(0, static_cast<int64_t>(table.size()) - 1))] =
                        random_.of(
                            {-1, static_cast<int32_t>(layer.num_blocks), INT32_MAX, INT32_MIN});
                    break;
                case 4: {
                    // Never more rows than there are.
                    int32_t &row = start[static_cast<size_t>(
                        random_.in(0, static_cast<int64_t>(start.size()) - 1))];
                    row = random_.of({-1, INT32_MIN, 0, static_cast<int32_t>(rows)});
                    break;
                }
                default:
                    spoil(d);
            }
        }
        const int32_t given_seqs =
            hostile(3) ? random_.of({0, -1, INT32_MIN}) : static_cast<int32_t>(seqs);
        if (given_seqs < 0) refuse = true;
        spoiled |= given_seqs != seqs;
        kvc_batch batch{};
        batch.num_seqs = given_seqs;
        batch.query_start = start.data();
        batch.tail_length = length.data();
        batch.tail_table = table.data();
        batch.tail_stride = stride;
        batch.directory = d.view();
        const bool with_lse = random_.chance(50);
        {
            std::set<int64_t> allowed;
            allow(allowed, d);
            allow(allowed, table);
            const Only only(cache_, allowed);
            before("kvc_attention");
            const int status =
                kvc_attention(&used, &batch, query.data(), query_dtype, query_stride, out.data(),
                              out_dtype, out_stride, with_lse ? lse.data() : nullptr);
            if (refuse)
                must_refuse(status);
            else if (spoiled)
                after(status);
            else
                must(status);
        }
        if (!tame_) return;
        compare_attention(d, start, length, tables, query, query_dtype, query_stride, out,
                          out_dtype, out_stride, with_lse ? &lse : nullptr);
    }

    void compare_attention(const Directory &d, const std::vector<int32_t> &start,
                           const std::vector<int32_t> &length,
                           const std::vector<std::vector<int32_t>> &tables,
                           const std::vector<uint8_t> &query, int query_dtype, int64_t query_stride,
                           const std::vector<uint8_t> &out, int out_dtype, int64_t out_stride,
                           const std::vector<float> *lse) {
        const kvc_layer &layer = cache_.layer;
        const int64_t rows = start.back(), out_row = int64_t{layer.num_heads} * layer.v_size;
        const int bytes = dtype_size(out_dtype);
        // Nothing but the rows is written.
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t first = r < start[0] ? 0 : out_row;
            const int64_t last = r + 1 < rows ? out_stride : out_row;
            for (int64_t i = (r * out_stride + first) * bytes; i < (r * out_stride + last) * bytes;
                 ++i)
                if (out[static_cast<size_t>(i)] != 0xff) die("kvc_attention wrote beside its rows");
        }
        std::vector<double> weight;
        std::vector<float> results;
        double loosest = 0;
        for (int64_t s = 0; s + 1 < static_cast<int64_t>(start.size()); ++s) {
            const int64_t first = start[static_cast<size_t>(s)];
            const int64_t count = start[static_cast<size_t>(s) + 1] - first;
            if (count == 0) continue;
            const int head = static_cast<int>(random_.in(0, layer.num_kv_heads - 1));
            const int group = layer.num_heads / layer.num_kv_heads;
            const int32_t tail = length[static_cast<size_t>(s)];
            const Held x = held(d, s, tables[static_cast<size_t>(s)], tail, head);
            double largest = 0;
            for (const float v : x.value) largest = std::max(largest, double{std::fabs(v)});
            const double tolerance =
                x.tolerance +
                (by_matrices(layer.dtype, count) ? matrix_tolerance(x.codec, query_dtype) : 0) +
                (out_dtype == KVC_F32    ? 0
                 : out_dtype == KVC_BF16 ? 8e-3
                                         : 1e-3);
            loosest = std::max(loosest, tolerance);
            for (int i = 0; i < 3; ++i) {
                const int64_t r = random_.in(0, count - 1);
                const int64_t h = head * group + random_.in(0, group - 1);
                const int64_t q = (first + r) * query_stride + h * layer.k_size;
                const double top =
                    weigh(x, query.data(), q, query_dtype, tail - count + r + 1, weight);
                const double total = weight.back();
                const int64_t n = static_cast<int64_t>(weight.size()) - 1;
                // The error of a logit grows with the logits.
                const double wide = tolerance * (1 + (n == 0 ? 0 : std::fabs(top)) / 4);
                for (int64_t c = 0; c < layer.v_size; ++c) {
                    double sum = 0;
                    for (int64_t t = 0; t < n; ++t)
                        sum += weight[static_cast<size_t>(t)] *
                               double{x.value[static_cast<size_t>(t * layer.v_size + c)]};
                    const double wanted = total > 0 ? sum / total : 0;
                    const float got = load(
                        out.data(), (first + r) * out_stride + h * layer.v_size + c, out_dtype);
                    results.push_back(got);
                    if (!(std::fabs(got - wanted) <= wide * largest + 1e-6))
                        die("attention is off by %g of %g at channel %lld: %g, not %g",
                            std::fabs(got - wanted), largest, static_cast<long long>(c),
                            double{got}, wanted);
                }
                if (lse != nullptr) {
                    const double got =
                        (*lse)[static_cast<size_t>((first + r) * layer.num_heads + h)];
                    const double wanted = total > 0 ? top + std::log(total) : -INFINITY;
                    if (!(got == wanted || std::fabs(got - wanted) <= wide * 4))
                        die("log of the denominator is %g, not %g", got, wanted);
                }
                ++checked;
            }
        }
        record(results.data(), static_cast<int64_t>(results.size()), 2 * loosest);
    }

    // --------------------------------------------------------------------------------
    // requests

    struct Asked {
        Directory d;
        std::vector<int32_t> table;
        kvc_source request{};
        bool spoiled = false;
        std::set<int64_t> allowed;
    };
    // Whatever `asked` points into must stay where it is.
    void make_request(Asked &asked) {
        asked.d = make_directory(1, random_.chance(90) ? 3 : 10);
        asked.request.tail_length =
            make_tail(random_.chance(80) ? 3 * cache_.layer.block_size : 900, asked.table);
        asked.request.tail_position = static_cast<int32_t>(random_.in(100000, 200000));
        if (hostile(25)) {
            asked.spoiled = true;
            switch (random_.in(0, 3)) {
                case 0:
                    asked.request.tail_length = random_.of({-1, INT32_MIN});
                    break;
                case 1:
                    if (!asked.table.empty())
                        asked.table[static_cast<size_t>(
                            random_.in(0, static_cast<int64_t>(asked.table.size()) - 1))] =
                            random_.of({-1, static_cast<int32_t>(cache_.layer.num_blocks),
                                        INT32_MAX, INT32_MIN});
                    break;
                default:
                    spoil(asked.d);
            }
        }
        if (hostile(5)) asked.request.tail_position = random_.of({INT32_MAX, INT32_MIN});
        asked.request.directory = asked.d.view();
        asked.request.tail_table = asked.table.data();
        allow(asked.allowed, asked.d);
        allow(asked.allowed, asked.table);
    }
    bool has_raw(const Directory &d) const {
        for (size_t i = 0; i < d.page.size(); ++i)
            if (d.codec[i] == KVC_RAW) return true;
        return false;
    }
    // Positions of a head's slots.
    std::vector<int32_t> positions_of(const Asked &asked, int head) const {
        std::vector<int32_t> all;
        const Directory &d = asked.d;
        if (!d.begin.empty())
            for (int32_t e = d.begin[static_cast<size_t>(head)];
                 e < d.end[static_cast<size_t>(head)]; ++e) {
                const Content &x =
                    cache_.content[static_cast<size_t>(d.page[static_cast<size_t>(e)])];
                all.insert(all.end(), x.positions.begin(),
                           x.positions.begin() + d.count[static_cast<size_t>(e)]);
            }
        for (int32_t i = 0; i < asked.request.tail_length; ++i)
            all.push_back(asked.request.tail_position + i);
        return all;
    }

    void read() {
        const kvc_layer &layer = cache_.layer;
        Asked asked;
        make_request(asked);
        int32_t head = static_cast<int32_t>(random_.in(0, layer.num_kv_heads - 1));
        const int64_t held =
            asked.spoiled ? 40 : asked.d.tokens(0, head) + asked.request.tail_length;
        int64_t first = random_.in(0, held), n = random_.in(0, held - first);
        std::vector<float> key(static_cast<size_t>(n * layer.k_size));
        std::vector<float> value(static_cast<size_t>(n * layer.v_size));
        std::vector<int32_t> positions(static_cast<size_t>(n));
        kvc_layer used = layer;
        bool refuse = false, spoiled = asked.spoiled;
        if (hostile(20)) {
            switch (random_.in(0, 3)) {
                case 0:
                    used = bad_layer();
                    refuse = true;
                    break;
                case 1:
                    head = random_.of({-1, layer.num_kv_heads, INT32_MAX, INT32_MIN});
                    refuse = true;
                    break;
                case 2:
                    first = random_.of({int64_t{-1}, kAbove, kBelow, held + 1});
                    refuse = !spoiled || first < 0 || first > INT32_MAX;
                    spoiled = true;
                    break;
                default:
                    // More than there are, unless a spoilt directory now says otherwise.
                    n = random_.of({int64_t{-1}, kAbove, kBelow});
                    refuse = true;
            }
        }
        const bool want_positions = random_.chance(50) && !has_raw(asked.d);
        const bool want_k = random_.chance(80), want_v = random_.chance(80);
        {
            const Only only(cache_, asked.allowed);
            before("kvc_read");
            const int status = kvc_read(
                &used, &asked.request, head, first, n, want_k ? key.data() : nullptr,
                want_v ? value.data() : nullptr, want_positions ? positions.data() : nullptr);
            if (refuse)
                must_refuse(status);
            else if (spoiled)
                after(status);
            else
                must(status);
        }
        if (!tame_) return;
        if (want_k) record(key.data(), static_cast<int64_t>(key.size()), 0.3);
        if (want_v) record(value.data(), static_cast<int64_t>(value.size()), 0.3);
        if (!want_positions) return;
        const std::vector<int32_t> wanted = positions_of(asked, head);
        if (!std::equal(positions.begin(), positions.end(), wanted.begin() + first))
            die("positions differ");
        ++checked;
    }

    void window_scores() {
        const kvc_layer &layer = cache_.layer;
        Asked asked;
        make_request(asked);
        if (asked.request.tail_length == 0) return;
        const size_t heads = static_cast<size_t>(layer.num_kv_heads);
        std::vector<int64_t> candidates(heads);
        for (size_t h = 0; h < heads; ++h) {
            const int64_t most =
                asked.spoiled ? 8
                              : asked.d.tokens(0, static_cast<int>(h)) + asked.request.tail_length;
            candidates[h] = random_.chance(50) ? most : random_.in(0, most);
        }
        if (random_.chance(40))  // equally many of each
            candidates.assign(heads, *std::min_element(candidates.begin(), candidates.end()));
        kvc_scoring scoring{};
        const int64_t tail = asked.spoiled ? 4 : asked.request.tail_length;
        scoring.window = static_cast<int32_t>(
            random_.in(1, std::min<int64_t>(tail, random_.chance(80) ? 8 : 40)));
        scoring.pool = random_.of({1, 1, 3, 7, 21, 1001});
        scoring.pool_max = random_.chance(50);
        scoring.reduce = static_cast<int32_t>(random_.in(0, 3));
        scoring.factor = random_.chance(80) ? 1.0f / static_cast<float>(scoring.window) : 1.0f;
        const int64_t width = *std::max_element(candidates.begin(), candidates.end());
        int32_t dtype = static_cast<int32_t>(random_.in(KVC_F32, KVC_F16));
        const int64_t window = scoring.window, row_stride = layer.k_size + random_.in(0, 5);
        const int64_t head_stride = window * row_stride + random_.in(0, 5);
        const std::vector<uint8_t> query = rows_of(
            dtype, 1,
            (layer.num_heads - 1) * head_stride + (window - 1) * row_stride + layer.k_size, 1);
        std::vector<float> out(static_cast<size_t>(
            (scoring.reduce == 0 ? layer.num_heads : layer.num_kv_heads) * width));
        kvc_layer used = layer;
        bool refuse = false;
        if (hostile(25)) {
            refuse = true;
            switch (random_.in(0, 5)) {
                case 0:
                    used = bad_layer();
                    break;
                case 1:
                    scoring.window = random_.of({0, -1, INT32_MIN, INT32_MAX});
                    break;
                case 2:
                    scoring.pool = random_.of({0, -1, 2, INT32_MIN, INT32_MAX});
                    refuse = scoring.pool != INT32_MAX;  // odd: as good as any large one
                    break;
                case 3:
                    scoring.reduce = random_.of({-1, 4, INT32_MIN, INT32_MAX});
                    break;
                case 4:
                    dtype = random_.of({-1, 3, INT32_MIN, INT32_MAX});
                    break;
                default:
                    candidates[static_cast<size_t>(random_.in(0, layer.num_kv_heads - 1))] =
                        random_.of({int64_t{-1}, kBelow, kAbove, int64_t{1} << 40});
            }
        }
        {
            const Only only(cache_, asked.allowed);
            before("kvc_window_scores");
            const int status =
                kvc_window_scores(&used, &asked.request, query.data(), dtype, head_stride,
                                  row_stride, &scoring, candidates.data(), out.data());
            if (refuse)
                must_refuse(status);
            else if (asked.spoiled)
                after(status);
            else
                must(status);
        }
        if (!tame_) return;
        const int64_t rows = width == 0 ? 0 : static_cast<int64_t>(out.size()) / width;
        std::vector<float> inside;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < width; ++i) {
                const float got = out[static_cast<size_t>(r * width + i)];
                if (i < candidates[static_cast<size_t>(r / (rows / layer.num_kv_heads))])
                    inside.push_back(got);
                else if (got != -INFINITY)
                    die("slot %lld is no candidate, and scores %g", static_cast<long long>(i),
                        double{got});
            }
        const bool tiles = by_matrices(cache_.layer.dtype, 2);
        record(inside.data(), static_cast<int64_t>(inside.size()), tiles ? 0.2 : 0.05);
        if (scoring.pool != 1 || scoring.reduce != 0 || width == 0) return;
        const int h = static_cast<int>(random_.in(0, layer.num_heads - 1));
        const Held x = held(asked.d, 0, asked.table, asked.request.tail_length,
                            h / (layer.num_heads / layer.num_kv_heads));
        std::vector<double> weight, sums(static_cast<size_t>(x.compressed + x.tail), 0.0);
        for (int64_t i = 0; i < window; ++i) {
            weigh(x, query.data(), h * head_stride + i * row_stride, dtype, x.tail - window + 1 + i,
                  weight);
            for (size_t t = 0; t + 1 < weight.size() && weight.back() > 0; ++t)
                sums[t] += weight[t] / weight.back() * double{scoring.factor};
        }
        const double whole = double{scoring.factor} * static_cast<double>(window);
        const int kv = h / (layer.num_heads / layer.num_kv_heads);
        for (int64_t i = 0; i < candidates[static_cast<size_t>(kv)]; ++i) {
            const double got = out[static_cast<size_t>(h * width + i)];
            if (!(std::fabs(got - sums[static_cast<size_t>(i)]) <= (tiles ? 3e-2 : 1e-3) * whole))
                die("the score of slot %lld is %g, not %g", static_cast<long long>(i), got,
                    sums[static_cast<size_t>(i)]);
        }
        ++checked;
    }

    // Draws slots of each head, in any order, and where each head's start.
    void draw_slots(const Asked &asked, std::vector<int64_t> &slots, std::vector<int64_t> &start) {
        start = {0};
        for (int h = 0; h < cache_.layer.num_kv_heads; ++h) {
            const int64_t held =
                asked.spoiled ? 20 : asked.d.tokens(0, h) + asked.request.tail_length;
            const int keep = static_cast<int>(random_.of({0, 10, 50, 90, 100}));
            const size_t first = slots.size();
            for (int64_t i = 0; i < held; ++i)
                if (random_.chance(keep)) slots.push_back(i);
            if (random_.chance(20)) std::reverse(slots.begin() + first, slots.end());
            start.push_back(static_cast<int64_t>(slots.size()));
        }
    }

    void gather() {
        const kvc_layer &layer = cache_.layer;
        Asked asked;
        make_request(asked);
        std::vector<int64_t> slots, start;
        draw_slots(asked, slots, start);
        int64_t most = 0;
        for (int h = 0; h < layer.num_kv_heads; ++h)
            most =
                std::max(most, start[static_cast<size_t>(h) + 1] - start[static_cast<size_t>(h)]);
        const int64_t rows = most + random_.in(0, 3);
        int64_t said = rows;
        std::vector<float> key(static_cast<size_t>(layer.num_kv_heads * rows * layer.k_size), 7.0f);
        std::vector<float> value(static_cast<size_t>(layer.num_kv_heads * rows * layer.v_size),
                                 7.0f);
        std::vector<int32_t> positions(static_cast<size_t>(layer.num_kv_heads * rows), 7);
        kvc_layer used = layer;
        bool refuse = false, spoiled = asked.spoiled;
        if (hostile(30)) {
            switch (random_.in(0, 2)) {
                case 0:
                    used = bad_layer();
                    refuse = true;
                    break;
                case 1:
                    if (slots.empty()) break;
                    slots[static_cast<size_t>(
                        random_.in(0, static_cast<int64_t>(slots.size()) - 1))] =
                        random_.of({int64_t{-1}, kAbove, kBelow, int64_t{1} << 40});
                    refuse = true;
                    break;
                default:
                    said = random_.of({most - 1, int64_t{-1}, kBelow});
                    refuse = true;
            }
        }
        const bool want_positions = random_.chance(50) && !has_raw(asked.d);
        const bool want_k = random_.chance(80), want_v = random_.chance(80);
        {
            const Only only(cache_, asked.allowed);
            before("kvc_gather");
            const int status =
                kvc_gather(&used, &asked.request, slots.data(), start.data(), said,
                           want_k ? key.data() : nullptr, want_v ? value.data() : nullptr,
                           want_positions ? positions.data() : nullptr);
            if (refuse)
                must_refuse(status);
            else if (spoiled)
                after(status);
            else
                must(status);
        }
        if (!tame_) return;
        for (int h = 0; h < layer.num_kv_heads; ++h) {
            const int64_t first = start[static_cast<size_t>(h)];
            const int64_t count = start[static_cast<size_t>(h) + 1] - first;
            const Held x = held(asked.d, 0, asked.table, asked.request.tail_length, h);
            const std::vector<int32_t> places = positions_of(asked, h);
            for (int64_t i = 0; i < rows; ++i) {
                const size_t slot =
                    i < count ? static_cast<size_t>(slots[static_cast<size_t>(first + i)]) : 0;
                const auto same = [&](const std::vector<float> &got, const std::vector<float> &all,
                                      int64_t size) {
                    for (int64_t c = 0; c < size; ++c) {
                        const size_t at = static_cast<size_t>((h * rows + i) * size + c);
                        const float wanted =
                            i < count
                                ? all[slot * static_cast<size_t>(size) + static_cast<size_t>(c)]
                                : 0.0f;
                        if (got[at] != wanted) die("kvc_gather gave another number");
                    }
                };
                if (want_k) same(key, x.key, layer.k_size);
                if (want_v) same(value, x.value, layer.v_size);
                if (want_positions &&
                    positions[static_cast<size_t>(h * rows + i)] != (i < count ? places[slot] : 0))
                    die("kvc_gather gave another position");
            }
        }
        ++checked;
    }

    void fill() {
        const kvc_layer &layer = cache_.layer;
        const int heads = layer.num_kv_heads;
        Directory target;
        target.stride = heads;
        target.begin.resize(static_cast<size_t>(heads));
        target.end = target.begin;
        std::vector<int64_t> counts(static_cast<size_t>(heads), 0);
        std::set<int64_t> taken;
        bool wants_positions = false;
        for (int h = 0; h < heads; ++h) {
            target.begin[static_cast<size_t>(h)] = static_cast<int32_t>(target.page.size());
            for (int64_t n = random_.in(0, 3); n > 0; --n) {
                const int64_t page = compressed_page();
                if (!taken.insert(page).second) continue;
                const int codec = cache_.codec(random_);
                const int64_t count = random_.in(0, cache_.capacity[codec]);
                target.page.push_back(static_cast<int32_t>(page));
                target.codec.push_back(static_cast<uint8_t>(codec));
                target.count.push_back(static_cast<uint16_t>(count));
                wants_positions |= has_positions(codec) && count > 0;
                counts[static_cast<size_t>(h)] += count;
            }
            target.end[static_cast<size_t>(h)] = static_cast<int32_t>(target.page.size());
        }
        int64_t rows = *std::max_element(counts.begin(), counts.end()) + random_.in(0, 2);
        std::vector<float> key, value;
        floats(key, heads * rows, layer.k_size);
        floats(value, heads * rows, layer.v_size);
        // In order, close enough together for pages and tables of every codec.
        std::vector<int32_t> positions(static_cast<size_t>(heads * rows));
        const int32_t gap = static_cast<int32_t>(random_.of({1, 1, 3, 30}));
        for (int h = 0; h < heads; ++h)
            for (int64_t i = 0, at = random_.in(0, 1000); i < rows; ++i, at += random_.in(1, gap))
                positions[static_cast<size_t>(h * rows + i)] =
                    static_cast<int32_t>(std::min<int64_t>(at, INT32_MAX));
        bool valid = true, refuse = false;
        for (const int32_t position : positions) valid &= position < Angles::kPositions;
        const std::vector<int32_t> given = positions;
        kvc_layer used = layer;
        kvc_directory view = target.view();
        bool null_positions = !wants_positions && random_.chance(30);
        if (hostile(50)) {
            valid = false;
            const size_t h = static_cast<size_t>(random_.in(0, heads - 1));
            switch (random_.in(0, 6)) {
                case 0:
                    used = bad_layer();
                    refuse = true;
                    break;
                case 1:
                    view.begin = nullptr;
                    refuse = true;
                    break;
                case 2:
                    counts[h] = random_.of({counts[h] + 1, counts[h] - 1, kAbove, kBelow});
                    refuse = true;
                    break;
                case 3:
                    rows = random_.of({int64_t{-1}, kBelow});
                    refuse = true;
                    break;
                case 4:
                    null_positions = true;
                    refuse = wants_positions;
                    break;
                case 5:
                    if (positions.empty()) break;
                    positions[static_cast<size_t>(
                        random_.in(0, static_cast<int64_t>(positions.size()) - 1))] =
                        random_.of({-1, 0, INT32_MAX, INT32_MIN});
                    break;
                default:
                    spoil(target);
                    view = target.view();
            }
        }
        {
            std::set<int64_t> allowed;
            allow(allowed, target);
            const Only only(cache_, allowed);
            before("kvc_fill");
            const int status = kvc_fill(&used, rows, counts.data(), key.data(), value.data(),
                                        null_positions ? nullptr : positions.data(), &view);
            if (refuse)
                must_refuse(status);
            else if (valid)
                must(status);
            else
                after(status);
        }
        if (!tame_) return;
        for (size_t e = 0; e < target.page.size(); ++e) {
            Content &content = cache_.content[static_cast<size_t>(target.page[e])];
            content.codec = target.codec[e];
            content.count = valid ? target.count[e] : 0;
            content.positions.assign(static_cast<size_t>(content.count), 0);
        }
        if (!valid) return;
        for (int h = 0; h < heads; ++h) {
            int64_t at = h * rows;
            for (int32_t i = target.begin[static_cast<size_t>(h)];
                 i < target.end[static_cast<size_t>(h)]; ++i) {
                const size_t e = static_cast<size_t>(i);
                const int codec = target.codec[e];
                const int64_t page = target.page[e], count = target.count[e];
                Content &content = cache_.content[static_cast<size_t>(page)];
                content.head = h;
                content.positions = as_kept(
                    codec, std::vector<int32_t>(given.begin() + at, given.begin() + at + count));
                const std::vector<float> want_k(key.begin() + at * layer.k_size,
                                                key.begin() + (at + count) * layer.k_size);
                const std::vector<float> want_v(value.begin() + at * layer.v_size,
                                                value.begin() + (at + count) * layer.v_size);
                decode_page(page, codec, h, count, &want_k, &want_v);
                at += count;
            }
        }
    }

    void compact() {
        const kvc_layer &layer = cache_.layer;
        Asked asked;
        make_request(asked);
        const int heads = layer.num_kv_heads;
        Directory target;
        target.stride = heads;
        target.begin.resize(static_cast<size_t>(heads));
        target.end = target.begin;
        std::vector<int64_t> slots, start{0};
        std::set<int64_t> taken;
        bool wants_positions = false, valid = true;
        for (int h = 0; h < heads; ++h) {
            const int64_t held =
                asked.spoiled ? 20 : asked.d.tokens(0, h) + asked.request.tail_length;
            const int keep = static_cast<int>(random_.of({0, 10, 50, 90, 100}));
            std::vector<int64_t> own;
            for (int64_t i = 0; i < held; ++i)
                if (random_.chance(keep)) own.push_back(i);
            if (random_.chance(10)) std::reverse(own.begin(), own.end());
            target.begin[static_cast<size_t>(h)] = static_cast<int32_t>(target.page.size());
            int64_t placed = 0;
            while (placed < static_cast<int64_t>(own.size()) || random_.chance(5)) {
                // Nobody is promised anything about a page that two heads write.
                int64_t page = -1;
                for (int i = 0; i < 20 && page < 0; ++i) {
                    const int64_t drawn = compressed_page();
                    if (taken.insert(drawn).second) page = drawn;
                }
                if (page < 0) break;
                const int codec = cache_.codec(random_);
                const int64_t left = static_cast<int64_t>(own.size()) - placed;
                const int64_t count =
                    std::min(left, random_.chance(60) ? cache_.capacity[codec]
                                                      : random_.in(0, cache_.capacity[codec]));
                target.page.push_back(static_cast<int32_t>(page));
                target.codec.push_back(static_cast<uint8_t>(codec));
                target.count.push_back(static_cast<uint16_t>(count));
                wants_positions |= has_positions(codec) && count > 0;
                placed += count;
            }
            own.resize(static_cast<size_t>(placed));
            target.end[static_cast<size_t>(h)] = static_cast<int32_t>(target.page.size());
            slots.insert(slots.end(), own.begin(), own.end());
            start.push_back(static_cast<int64_t>(slots.size()));
        }
        if (asked.spoiled) valid = false;
        // Raw sources have no positions to hand on; those drawn may also span too much.
        bool refuse = false;
        if (wants_positions) {
            const Order order =
                tame_ && !has_raw(asked.d) ? order_of(asked, slots, start, target) : kTies;
            valid &= order == kAscends;
            refuse = order == kGoesBack;
        }
        std::vector<std::vector<float>> keys, values;
        std::vector<std::vector<int32_t>> places;
        if (tame_)
            for (int h = 0; h < heads; ++h) {
                places.push_back(positions_of(asked, h));
                const Held x = held(asked.d, 0, asked.table, asked.request.tail_length, h);
                keys.push_back(x.key);
                values.push_back(x.value);
            }
        kvc_layer used = layer;
        kvc_directory view = target.view();
        if (hostile(30)) {
            valid = refuse = false;
            switch (random_.in(0, 4)) {
                case 0:
                    used = bad_layer();
                    refuse = true;
                    break;
                case 1:
                    view.begin = nullptr;
                    refuse = true;
                    break;
                case 2:
                    if (slots.empty()) break;
                    slots[static_cast<size_t>(
                        random_.in(0, static_cast<int64_t>(slots.size()) - 1))] =
                        random_.of({int64_t{-1}, kAbove, kBelow, int64_t{0}, int64_t{1000}});
                    break;
                case 3:
                    start[static_cast<size_t>(random_.in(0, heads))] =
                        random_.in(0, static_cast<int64_t>(slots.size()));
                    break;
                default:
                    spoil(target);
                    view = target.view();
            }
        }
        {
            std::set<int64_t> allowed = asked.allowed;
            allow(allowed, target);
            const Only only(cache_, allowed);
            before("kvc_compact");
            const int status =
                kvc_compact(&used, &asked.request, slots.data(), start.data(), &view);
            if (refuse)
                must_refuse(status);
            else if (valid)
                must(status);
            else
                after(status);
        }
        if (!tame_) return;
        for (size_t e = 0; e < target.page.size(); ++e) {
            Content &content = cache_.content[static_cast<size_t>(target.page[e])];
            content.codec = target.codec[e];
            content.count = valid ? target.count[e] : 0;
            content.positions.assign(static_cast<size_t>(content.count), 0);
        }
        if (!valid) return;
        for (int h = 0; h < heads; ++h)
            compare_compacted(target, slots, start, h, keys, values, places);
    }
    // How the positions go that target pages are given: all ascend, over spans that pages can hold;
    // or within a page some go back, which must be refused; or else they tie or reach too far.
    enum Order { kAscends, kGoesBack, kTies };
    Order order_of(const Asked &asked, const std::vector<int64_t> &slots,
                   const std::vector<int64_t> &start, const Directory &target) const {
        Order found = kAscends;
        for (int h = 0; h < cache_.layer.num_kv_heads; ++h) {
            const std::vector<int32_t> all = positions_of(asked, h);
            size_t at = static_cast<size_t>(start[static_cast<size_t>(h)]);
            const size_t first = at;
            for (int32_t e = target.begin[static_cast<size_t>(h)];
                 e < target.end[static_cast<size_t>(h)]; ++e) {
                const size_t count = target.count[static_cast<size_t>(e)];
                const int codec = target.codec[static_cast<size_t>(e)];
                for (size_t i = at; i < at + count; ++i) {
                    const int64_t here = all[static_cast<size_t>(slots[i])];
                    const int64_t before = i != first ? all[static_cast<size_t>(slots[i - 1])] : -1;
                    // Those that tie move the ones after them on, in the pages that follow too.
                    if (here == before) found = kTies;
                    if (!has_positions(codec)) continue;
                    if (i != at && here < before) return kGoesBack;
                    if (here - all[static_cast<size_t>(slots[at])] >= 65536 * 15) found = kTies;
                    if (fitted(codec) && here >= Angles::kPositions) found = kTies;
                }
                at += count;
            }
        }
        return found;
    }
    void compare_compacted(const Directory &target, const std::vector<int64_t> &slots,
                           const std::vector<int64_t> &start, int h,
                           const std::vector<std::vector<float>> &keys,
                           const std::vector<std::vector<float>> &values,
                           const std::vector<std::vector<int32_t>> &places) {
        const kvc_layer &layer = cache_.layer;
        size_t at = static_cast<size_t>(start[static_cast<size_t>(h)]);
        for (int32_t e = target.begin[static_cast<size_t>(h)];
             e < target.end[static_cast<size_t>(h)]; ++e) {
            const int64_t page = target.page[static_cast<size_t>(e)];
            const int codec = target.codec[static_cast<size_t>(e)];
            const int32_t count = target.count[static_cast<size_t>(e)];
            std::vector<float> k(static_cast<size_t>(count * layer.k_size)), want_k(k.size());
            std::vector<float> v(static_cast<size_t>(count * layer.v_size)), want_v(v.size());
            std::vector<int32_t> positions(static_cast<size_t>(count)), wanted(positions.size());
            before("kvc_decode after kvc_compact");
            must(kvc_decode(&layer, codec, h, page, count, k.data(), v.data(),
                            has_positions(codec) ? positions.data() : nullptr));
            const bool known = has_positions(codec);
            const std::vector<int32_t> &all = places[static_cast<size_t>(h)];
            for (int32_t i = 0; i < count; ++i) {
                const int64_t slot = slots[at + static_cast<size_t>(i)];
                std::copy_n(keys[static_cast<size_t>(h)].begin() + slot * layer.k_size,
                            layer.k_size, want_k.begin() + i * layer.k_size);
                std::copy_n(values[static_cast<size_t>(h)].begin() + slot * layer.v_size,
                            layer.v_size, want_v.begin() + i * layer.v_size);
                wanted[static_cast<size_t>(i)] = all[static_cast<size_t>(slot)];
            }
            // Tokens of many pages in one: channels may vary more than within a page.
            const double tolerance = 2 * content_tolerance(codec, layer.dtype);
            compare_content(k, want_k, tolerance);
            compare_content(v, want_v, tolerance);
            if (known) wanted = as_kept(codec, wanted);
            if (known && positions != wanted) die("positions differ after compaction");
            at += static_cast<size_t>(count);
            Content &content = cache_.content[static_cast<size_t>(page)];
            content.head = h;
            content.positions = wanted;
        }
    }

    // --------------------------------------------------------------------------------
    // selection

    void top_mask() {
        const int64_t rows = random_.in(0, 4), n = random_.of({0, 1, 7, 100, 3000});
        std::vector<float> scores(static_cast<size_t>(rows * n));
        const int kind = static_cast<int>(random_.in(0, 3));
        for (float &x : scores)
            x = kind == 0   ? random_.normal()
                : kind == 1 ? static_cast<float>(random_.in(-2, 2))
                : kind == 2 ? from_bits(static_cast<uint32_t>(random_.next()))
                            : random_.of({NAN, INFINITY, -INFINITY, 0.0f, -0.0f});
        std::vector<uint8_t> mask(scores.size(), 77);
        const bool refuse = random_.chance(20);
        std::vector<int64_t> keep(static_cast<size_t>(rows));
        for (int64_t &own : keep) own = random_.in(0, n);
        if (refuse && rows > 0)
            keep[static_cast<size_t>(random_.in(0, rows - 1))] =
                random_.of({int64_t{-1}, n + 1, kAbove, kBelow});
        before("kvc_top_mask");
        const int status = kvc_top_mask(rows, n, scores.data(), keep.data(), mask.data());
        if (refuse && rows > 0) return must_refuse(status);
        must(status);
        const auto value = [&](int64_t i) {
            const float x = scores[static_cast<size_t>(i)];
            return std::isnan(x) ? -INFINITY : x;
        };
        for (int64_t r = 0; r < rows; ++r) {
            std::vector<int64_t> order(static_cast<size_t>(n));
            for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = r * n + i;
            std::stable_sort(order.begin(), order.end(),
                             [&](int64_t a, int64_t b) { return value(a) > value(b); });
            for (int64_t i = 0; i < n; ++i)
                if (mask[static_cast<size_t>(order[static_cast<size_t>(i)])] !=
                    (i < keep[static_cast<size_t>(r)]))
                    die("kvc_top_mask chose other slots");
        }
        ++checked;
    }

    void represent() {
        const int64_t bit_heads = random_.in(0, 5), units = random_.in(0, 200);
        const int64_t unit = random_.of({1, 1, 4, 16}), heads = random_.in(0, 4);
        std::vector<uint8_t> bits(static_cast<size_t>(bit_heads * units * unit));
        std::vector<uint8_t> anchor(static_cast<size_t>(bit_heads * unit));
        for (uint8_t &x : bits)
            x = static_cast<uint8_t>(random_.chance(50) ? random_.in(0, 255) : 0);
        for (uint8_t &x : anchor) x = random_.chance(50);
        const int64_t important = random_.in(0, units), others = units - important;
        std::vector<uint8_t> mask(static_cast<size_t>(heads * units), 0);
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < important;) {
                uint8_t &x = mask[static_cast<size_t>(h * units + random_.in(0, units - 1))];
                if (x == 0) x = 1, ++i;
            }
        const bool refuse = heads > 0 && random_.chance(20);
        const int64_t count =
            refuse ? random_.of({int64_t{-1}, others + 1, kAbove, kBelow}) : random_.in(0, others);
        before("kvc_represent");
        const int status =
            kvc_represent(bit_heads, units, unit, bits.data(),
                          random_.chance(50) ? anchor.data() : nullptr, heads, mask.data(), count);
        if (refuse) {
            must_refuse(status);
        } else {
            must(status);
            for (int64_t h = 0; h < heads; ++h)
                if (std::count(mask.begin() + h * units, mask.begin() + (h + 1) * units, 1) !=
                    important + count)
                    die("kvc_represent marked another number of units");
            ++checked;
        }
        before("kvc_represent");
        const int64_t bad = random_.of({int64_t{-1}, kBelow});
        switch (random_.in(0, 2)) {
            case 0:
                return must_refuse(
                    kvc_represent(bad, units, unit, bits.data(), nullptr, heads, mask.data(), 0));
            case 1:
                return must_refuse(kvc_represent(bit_heads, bad, unit, bits.data(), nullptr, heads,
                                                 mask.data(), 0));
            default:
                return must_refuse(kvc_represent(bit_heads, units, bad, bits.data(), nullptr, heads,
                                                 mask.data(), 0));
        }
    }

    // Random keys [heads, slots, size], some of which are alike, heads apart by a gap.
    struct Keys : kvc_keys {
        std::vector<float> memory;
        const float *at(int64_t head, int64_t slot) const {
            return data + head * stride + slot * size;
        }
        double cosine(int64_t head, int64_t i, int64_t j) const {
            double product = 0, own = 0, other = 0;
            for (int c = 0; c < size; ++c) {
                const double x = at(head, i)[c], y = at(head, j)[c];
                product += x * y, own += x * x, other += y * y;
            }
            return product / std::max(1e-12, std::sqrt(own)) / std::max(1e-12, std::sqrt(other));
        }
    };
    Keys random_keys() {
        Keys keys;
        keys.heads = static_cast<int32_t>(random_.in(0, 3));
        keys.slots = random_.of({0, 1, 15, 16, 17, 129, 300, 700});
        keys.size = static_cast<int32_t>(random_.of({8, 16, 24, 64, 256}));
        const int64_t each = keys.slots * keys.size;
        keys.stride = each + random_.of({0, 0, 5});
        keys.memory.resize(
            static_cast<size_t>(keys.heads > 0 ? (keys.heads - 1) * keys.stride + each : 0));
        for (float &x : keys.memory) x = random_.normal();
        keys.data = keys.memory.data();
        for (int64_t h = 0; h < keys.heads; ++h)
            for (int64_t i = 1; i < keys.slots; ++i)
                if (random_.chance(30)) {
                    float *own = keys.memory.data() + h * keys.stride + i * keys.size;
                    const float *from = keys.at(h, random_.in(0, i - 1));
                    for (int c = 0; c < keys.size; ++c)
                        own[c] = random_.chance(90) ? 2 * from[c] : 0.0f;
                }
        return keys;
    }
    // Gives keys that must be refused.
    void spoil(Keys &keys) {
        switch (random_.in(0, 3)) {
            case 0:
                keys.size = static_cast<int32_t>(random_.of({-8, 0, 7, 264}));
                break;
            case 1:
                keys.slots = random_.of({int64_t{-1}, kAbove, kBelow});
                break;
            case 2:
                keys.heads = -1;
                break;
            default:
                keys.stride = keys.slots * keys.size - 1;
        }
    }
    std::vector<uint8_t> random_marks(int64_t n) {
        std::vector<uint8_t> marks(static_cast<size_t>(n));
        const int64_t percent = random_.of({0, 5, 50, 100});
        for (uint8_t &x : marks) x = random_.chance(static_cast<int>(percent)) ? 1 : 0;
        return marks;
    }

    void nearest_kept() {
        Keys keys = random_keys();
        const int64_t n = keys.slots, all = keys.heads * n;
        std::vector<uint8_t> kept = random_marks(all), gone = random_marks(all);
        for (size_t i = 0; i < kept.size(); ++i) gone[i] = gone[i] != 0 && kept[i] == 0;
        std::vector<int64_t> target(static_cast<size_t>(all), 77);
        std::vector<float> cosine(static_cast<size_t>(all), 77);
        before("kvc_nearest_kept");
        if (random_.chance(20)) {
            spoil(keys);
            return must_refuse(
                kvc_nearest_kept(&keys, gone.data(), kept.data(), target.data(), cosine.data()));
        }
        must(kvc_nearest_kept(&keys, gone.data(), kept.data(), target.data(), cosine.data()));
        for (int64_t h = 0; h < keys.heads; ++h)
            for (int64_t i = 0; i < n; ++i) {
                const size_t at = static_cast<size_t>(h * n + i);
                double best = -2;
                for (int64_t j = 0; j < n && gone[at] != 0; ++j)
                    if (kept[static_cast<size_t>(h * n + j)] != 0)
                        best = std::max(best, keys.cosine(h, i, j));
                if (gone[at] == 0) best = 1;
                if (std::abs(cosine[at] - best) > 1e-5) die("kvc_nearest_kept: another cosine");
                const int64_t to = target[at];
                if (best == -2 || gone[at] == 0) {
                    if (to != i) die("kvc_nearest_kept moved a slot");
                    continue;
                }
                if (to < 0 || to >= n || kept[static_cast<size_t>(h * n + to)] == 0 ||
                    keys.cosine(h, i, to) < best - 1e-5)
                    die("kvc_nearest_kept: another slot");
            }
        ++checked;
    }

    void redundancy() {
        Keys keys = random_keys();
        const int64_t n = keys.slots;
        std::vector<int64_t> counts(static_cast<size_t>(keys.heads));
        for (int64_t &own : counts) own = random_.chance(50) ? n : random_.in(0, n);
        std::vector<float> out(static_cast<size_t>(keys.heads * n), 77);
        float threshold = random_.of({0.0f, 0.3f, 0.5f, 0.9f});
        before("kvc_redundancy");
        if (random_.chance(30) && keys.heads > 0) {
            const int64_t how = random_.in(0, 2);
            if (how == 0) spoil(keys);
            if (how == 1) threshold = random_.of({-0.1f, NAN});
            if (how == 2) counts[0] = random_.of({int64_t{-1}, n + 1, kAbove});
            return must_refuse(kvc_redundancy(&keys, counts.data(), threshold, out.data()));
        }
        must(kvc_redundancy(&keys, counts.data(), threshold, out.data()));
        for (int64_t h = 0; h < keys.heads; ++h) {
            const int64_t own = counts[static_cast<size_t>(h)];
            std::vector<double> want(static_cast<size_t>(n), 0.0);
            bool sure = true;  // that rounding chooses as float64 does
            for (int64_t i = 0; i < own; ++i) {
                int64_t latest = -1;
                for (int64_t j = 0; j < own; ++j) {
                    if (j == i) continue;
                    const double x = keys.cosine(h, i, j);
                    want[static_cast<size_t>(j)] += x;
                    sure &= std::abs(x - static_cast<double>(threshold)) > 1e-5;
                    if (x > static_cast<double>(threshold)) latest = j;
                }
                if (latest >= 0) want[static_cast<size_t>(latest)] -= keys.cosine(h, i, latest);
            }
            for (int64_t i = 0; i < n; ++i) {
                const double mean = i < own ? want[static_cast<size_t>(i)] / own : 0;
                if (sure && std::abs(out[static_cast<size_t>(h * n + i)] - mean) > 1e-5)
                    die("kvc_redundancy: another mean");
            }
        }
        ++checked;
    }

    void merge() {
        Keys keys = random_keys();
        const int64_t n = keys.slots, all = keys.heads * n;
        std::vector<int64_t> target(static_cast<size_t>(all));
        std::vector<float> weight(static_cast<size_t>(all));
        for (int64_t &x : target) x = random_.in(0, n - 1);
        for (float &x : weight) x = random_.chance(30) ? 0.0f : random_.normal();
        std::vector<float> out(static_cast<size_t>(all * keys.size), 77);
        before("kvc_merge");
        if (random_.chance(30) && all > 0) {
            if (random_.chance(50))
                spoil(keys);
            else
                target[static_cast<size_t>(random_.in(0, all - 1))] =
                    random_.of({int64_t{-1}, n, kAbove, kBelow});
            return must_refuse(kvc_merge(&keys, target.data(), weight.data(), out.data()));
        }
        must(kvc_merge(&keys, target.data(), weight.data(), out.data()));
        std::vector<double> want(out.size(), 0.0);
        for (int64_t i = 0; i < all; ++i)
            for (int c = 0; c < keys.size; ++c)
                want[static_cast<size_t>((i / n * n + target[static_cast<size_t>(i)]) * keys.size +
                                         c)] +=
                    double{weight[static_cast<size_t>(i)]} * double{keys.at(i / n, i % n)[c]};
        for (size_t i = 0; i < out.size(); ++i)
            if (std::abs(out[i] - want[i]) > 1e-4 * (1 + std::abs(want[i])))
                die("kvc_merge: another sum");
        ++checked;
    }

    void spread() {
        const int32_t heads = static_cast<int32_t>(random_.in(0, 3));
        const int64_t n = random_.of({0, 1, 17, 200});
        int32_t size = static_cast<int32_t>(random_.of({8, 24, 64}));
        int64_t width = random_.of({1, 2, 7, 32, 1 << 20});
        const std::vector<uint8_t> kept = random_marks(heads * n);
        std::vector<float> part(static_cast<size_t>(heads * n));
        for (float &x : part) x = random_.chance(50) ? 0.0f : random_.normal();
        std::vector<float> values(static_cast<size_t>(heads * n * size));
        for (float &x : values) x = random_.normal();
        std::vector<double> want(values.begin(), values.end());
        before("kvc_spread");
        if (random_.chance(20)) {
            if (random_.chance(50))
                width = random_.of({int64_t{0}, int64_t{-1}, kBelow});
            else
                size = static_cast<int32_t>(random_.of({-8, 0, 7, 264}));
            return must_refuse(
                kvc_spread(heads, n, size, kept.data(), part.data(), width, values.data()));
        }
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < n; ++i) {
                if (kept[static_cast<size_t>(h * n + i)] != 0) continue;
                int64_t left = width;
                for (int64_t j = i + 1; j < n && left > 0; ++j) {
                    if (kept[static_cast<size_t>(h * n + j)] == 0) continue;
                    --left;
                    for (int c = 0; c < size; ++c)
                        want[static_cast<size_t>((h * n + j) * size + c)] +=
                            double{part[static_cast<size_t>(h * n + i)]} *
                            double{values[static_cast<size_t>((h * n + i) * size + c)]};
                }
            }
        must(kvc_spread(heads, n, size, kept.data(), part.data(), width, values.data()));
        for (size_t i = 0; i < values.size(); ++i)
            if (std::abs(values[i] - want[i]) > 1e-4 * (1 + std::abs(want[i])))
                die("kvc_spread: another sum");
        ++checked;
    }

    void mask_slots() {
        const int64_t rows = random_.in(0, 4), n = random_.in(0, 300);
        std::vector<uint8_t> mask(static_cast<size_t>(rows * n), 0);
        std::vector<int64_t> count(static_cast<size_t>(rows));
        int64_t width = 0;
        for (int64_t r = 0; r < rows; ++r) {
            int64_t &own = count[static_cast<size_t>(r)];
            own = r > 0 && random_.chance(50) ? count[0] : random_.in(0, n);
            width = std::max(width, own);
            for (int64_t i = 0; i < own;) {
                uint8_t &x = mask[static_cast<size_t>(r * n + random_.in(0, n - 1))];
                if (x == 0) x = static_cast<uint8_t>(random_.in(1, 255)), ++i;
            }
        }
        const bool refuse = rows > 0 && random_.chance(30);
        std::vector<int64_t> said = count;
        if (refuse) {
            int64_t &own = said[static_cast<size_t>(random_.in(0, rows - 1))];
            own = random_.of({own + 1, own - 1, kAbove, kBelow});
        }
        // A refused call writes nothing.
        std::vector<int64_t> slots(static_cast<size_t>(rows * width), -7);
        before("kvc_mask_slots");
        const int status = kvc_mask_slots(rows, n, mask.data(), said.data(), slots.data());
        if (refuse) {
            if (std::count(slots.begin(), slots.end(), -7) != rows * width)
                die("kvc_mask_slots wrote before it refused");
            return must_refuse(status);
        }
        must(status);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t *at = slots.data() + r * width;
            for (int64_t i = 0; i < n; ++i)
                if (mask[static_cast<size_t>(r * n + i)] != 0 && *at++ != i)
                    die("kvc_mask_slots gave other slots");
            while (at < slots.data() + (r + 1) * width)
                if (*at++ != -1) die("kvc_mask_slots wrote beyond a row's own");
        }
        ++checked;
    }

    // Tables that must be refused.
    void bad_tables() {
        kvc_layer layer = cache_.layer;
        before("kvc_check_layer");
        if (random_.chance(30)) {
            layer = bad_layer();
            return must_refuse(kvc_check_layer(&layer));
        }
        const int at = static_cast<int>(random_.in(KVC_TC4, KVC_TC8));
        if (layer.tables == nullptr || layer.tables[at] == nullptr) return;
        std::vector<const kvc_table *> tables = cache_.tables.pointers;
        kvc_table table = *tables[static_cast<size_t>(at)];
        std::vector<kvc_head_table> heads(table.heads, table.heads + layer.num_kv_heads);
        kvc_head_table &head = heads[static_cast<size_t>(random_.in(0, layer.num_kv_heads - 1))];
        std::vector<kvc_piece> piece(head.piece, head.piece + head.pieces);
        tables[static_cast<size_t>(at)] = &table;
        layer.tables = tables.data();
        table.heads = heads.data();
        switch (random_.in(0, 12)) {
            case 0:
                head.v_bits = random_.of({0, 1, 5, 8, -2, INT32_MAX, INT32_MIN});
                break;
            case 1:
                head.v_step = random_.of({0.0f, -1.0f, NAN});
                break;
            case 2:
                table.positions = random_.of({0, -1, INT32_MIN});
                break;
            case 3:
                table.heads = nullptr;
                break;
            case 4:
                table.local = 1;
                table.fine = nullptr;
                break;
            case 5:
                head.capacity = random_.of({-16, head.capacity + 1, 65536, INT32_MAX, INT32_MIN});
                break;
            case 6:
                head.exceptions = random_.of({-1, head.capacity + 1, 129, INT32_MAX, INT32_MIN});
                break;
            case 7:
                head.words = random_.of({-1, 65, INT32_MAX, INT32_MIN});
                break;
            case 8:
                head.pieces = random_.of({-1, 193, INT32_MAX, INT32_MIN});
                break;
            case 9:
                head.components = random_.of({-4, 2, layer.k_size + 4, INT32_MAX, INT32_MIN});
                break;
            case 10:
                head.stride = random_.of({-16, 8, 272, INT32_MAX, INT32_MIN});
                break;
            case 11:
                head.capacity += 16 * random_.of({int32_t{100}, int32_t{1}}) + 65520;
                break;
            default:
                if (piece.empty()) return;
                kvc_piece &own = piece[static_cast<size_t>(random_.in(0, head.pieces - 1))];
                head.piece = piece.data();
                switch (random_.in(0, 4)) {
                    case 0:
                        own.bits = random_.of<uint8_t>({0, 5, 8, 255});
                        break;
                    case 1:
                        own.quad = static_cast<uint8_t>(head.components / 4 + random_.in(0, 190));
                        break;
                    case 2:
                        own.word = static_cast<uint8_t>(head.words + random_.in(0, 190));
                        break;
                    case 3:
                        own.first = static_cast<uint8_t>(random_.in(9 - own.bits, 255));
                        break;
                    default:
                        own.weight = static_cast<uint8_t>(random_.in(8, 255));
                }
        }
        must_refuse(kvc_check_layer(&layer));
    }

    void capacity() {
        const auto number = [&](int64_t good) {
            return static_cast<int32_t>(
                random_.chance(70) ? good
                                   : random_.of({int64_t{0}, int64_t{-1}, int64_t{12}, int64_t{264},
                                                 int64_t{INT32_MAX}, int64_t{INT32_MIN}}));
        };
        const int64_t bytes = random_.chance(70) ? random_.in(-100, 1 << 22)
                                                 : random_.of({int64_t{0}, kAbove, kBelow});
        // One after the other: compilers evaluate arguments in different orders.
        const int32_t codec = number(random_.in(0, KVC_CODECS));
        const int32_t k_size = number(8 * random_.in(1, 32));
        const int32_t v_size = number(8 * random_.in(1, 32));
        const int32_t dtype = number(random_.in(0, 2));
        before("kvc_capacity");
        const int64_t n = kvc_capacity(codec, bytes, k_size, v_size, dtype);
        if (n < -1 || n > 65520 || (n > 0 && n % 16 != 0))
            die("a capacity of %lld", static_cast<long long>(n));
    }

    Random random_;
    bool tame_ = false;
    Cache cache_;
    int64_t tail_blocks_ = 0, last_block_ = 0;
    std::vector<std::vector<float>> &records_;
    size_t next_record_ = 0;
};

int64_t Case::calls = 0;
int64_t Case::refused = 0;
int64_t Case::checked = 0;

// ------------------------------------------------------------------------------------
// the run

using Records = std::vector<std::vector<float>>;

void write_records(std::FILE *file, const Records &records) {
    const int64_t n = static_cast<int64_t>(records.size());
    bool good = std::fwrite(&n, 8, 1, file) == 1;
    for (const std::vector<float> &x : records) {
        const int64_t size = static_cast<int64_t>(x.size());
        good = good && std::fwrite(&size, 8, 1, file) == 1 &&
               (x.empty() || std::fwrite(x.data(), 4, x.size(), file) == x.size());
    }
    if (!good) die("cannot write results");
}
Records read_records(std::FILE *file) {
    int64_t n = 0, size = 0;
    bool good = std::fread(&n, 8, 1, file) == 1;
    Records records(good ? static_cast<size_t>(n) : 0);
    for (std::vector<float> &x : records) {
        good = good && std::fread(&size, 8, 1, file) == 1;
        x.resize(good ? static_cast<size_t>(size) : 0);
        good = good && (x.empty() || std::fread(x.data(), 4, x.size(), file) == x.size());
    }
    if (!good) die("the results to compare with end here");
    return records;
}

void on_signal(int number) {
    print_case();
    signal(number, SIG_DFL);
    raise(number);
}

}  // namespace

int main(int argc, char **argv) {
    double seconds = 20;
    int64_t cases = 0, first = 0;
    std::string only;
    std::FILE *kept = nullptr, *against = nullptr;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string name = argv[i];
        if (name == "--seed") g_seed = std::strtoull(argv[i + 1], nullptr, 10);
        if (name == "--seconds") seconds = std::atof(argv[i + 1]);
        if (name == "--cases") cases = std::atoll(argv[i + 1]);
        if (name == "--first") first = std::atoll(argv[i + 1]);
        if (name == "--isa") only = argv[i + 1];
        if (name == "--write") kept = std::fopen(argv[i + 1], "wb");
        if (name == "--against") against = std::fopen(argv[i + 1], "rb");
    }
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    __sanitizer_set_death_callback(print_case);
#else
    for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) signal(number, on_signal);
#endif
    signal(SIGABRT, on_signal);
    std::vector<std::string> isas;
    std::string names, skipped;
    for (const char *name : {"baseline", "avx2", "avx512_emulated", "avx512bf16_emulated",
                             "amx_emulated", "avx512", "avx512bf16", "amx", "neon"}) {
        if (kvc_use_isa(name) != 0)
            skipped += std::string(" ") + name;
        else if (only.empty() || only == name)
            isas.push_back(name), names += std::string(" ") + name;
    }
    if (isas.empty()) die("no kernels to run");
    std::printf("fuzz: seed %llu, kernels:%s; this CPU or build has no:%s\n",
                static_cast<unsigned long long>(g_seed), names.c_str(), skipped.c_str());
    std::fflush(stdout);
    const auto begin = std::chrono::steady_clock::now();
    int64_t done = 0;
    for (g_case = first;; ++g_case, ++done) {
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
        if (cases > 0 ? done == cases : spent.count() > seconds) break;
        Records records;
        if (against != nullptr) records = read_records(against);
        for (size_t i = 0; i < isas.size(); ++i) {
            g_isa = isas[i].c_str();
            if (kvc_use_isa(g_isa) != 0 || std::string(kvc_isa()) != g_isa)
                die("kvc_use_isa: %s", kvc_error());
            Case one(g_seed, g_case, records);
            one.recording_ = i == 0 && against == nullptr;
            one.run();
        }
        if (kept != nullptr) write_records(kept, records);
    }
    if (kept != nullptr && std::fclose(kept) != 0) die("cannot write results");
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    std::printf(
        "fuzz: %lld cases on%s in %.0f s: %lld calls, %lld refused with "
        "a sentence, %lld "
        "results compared\n",
        static_cast<long long>(done), names.c_str(), spent.count(),
        static_cast<long long>(Case::calls), static_cast<long long>(Case::refused),
        static_cast<long long>(Case::checked));
    return 0;
}
