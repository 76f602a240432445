// Products by AMX tiles of 16 rows of 64 bytes. A thread's configuration is its own, and there is
// none outside a ProductRegion, as everyone who uses tiles leaves it (vLLM's kernels and oneDNN
// among them).
#pragma once

#include "simd/simd.h"

namespace kvc::KVC_NAMESPACE {

constexpr int kTileRows = 16;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

#if !defined(KVC_EMULATED)

inline void _tile_loadconfig(const void *config) {
    asm volatile("ldtilecfg %0" ::"m"(*static_cast<const TileConfig *>(config)));
}
inline void _tile_release() {
    asm volatile("tilerelease" ::: "memory");
}
// The compiler's own names want literal numbers of tiles.
template <int tile>
KVC_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
KVC_INLINE void tile_load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
KVC_INLINE void tile_store(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int a, int b>
KVC_INLINE void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

#endif

class ProductRegion {
   public:
    ProductRegion() {
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~ProductRegion() {
        _tile_release();
    }
    ProductRegion(const ProductRegion &) = delete;
    ProductRegion &operator=(const ProductRegion &) = delete;
};

// Tiles 0 to 3 are the sums of 32 rows and 16 or 32 columns, 4 and 5 the rows, 6 and 7 the columns.
// `a` has rows of a_stride bytes; b0 and b1 are panels, one after the other.
template <bool both>
KVC_INLINE void add_products(const void *a, int64_t a_stride, const void *b0, const void *b1,
                             int64_t steps) {
    const uint8_t *rows = static_cast<const uint8_t *>(a);
    const uint8_t *first = static_cast<const uint8_t *>(b0);
    const uint8_t *second = static_cast<const uint8_t *>(b1);
    for (int i = 0; i < steps; ++i, rows += 64, first += 1024, second += both ? 1024 : 0) {
        tile_load<4>(rows, a_stride);
        tile_load<6>(first, 64);
        tile_dot_bf16<0, 4, 6>();
        tile_load<5>(rows + kTileRows * a_stride, a_stride);
        tile_dot_bf16<2, 5, 6>();
        if constexpr (both) {
            tile_load<7>(second, 64);
            tile_dot_bf16<1, 4, 7>();
            tile_dot_bf16<3, 5, 7>();
        }
    }
}
template <bool both>
KVC_INLINE void store_sums(float *to, int64_t stride) {
    float *low = to + kTileRows * stride;
    tile_store<0>(to, stride * 4);
    tile_store<2>(low, stride * 4);
    if constexpr (both) {
        tile_store<1>(to + 16, stride * 4);
        tile_store<3>(low + 16, stride * 4);
    }
}

template <bool both, bool add>
KVC_INLINE void product(const void *a, int64_t a_stride, const void *b0, const void *b1,
                        int64_t depth, float *to, int64_t stride) {
    if constexpr (add) {
        tile_load<0>(to, stride * 4);
        tile_load<2>(to + kTileRows * stride, stride * 4);
        if constexpr (both) {
            tile_load<1>(to + 16, stride * 4);
            tile_load<3>(to + kTileRows * stride + 16, stride * 4);
        }
    } else {
        tile_zero<0>();
        tile_zero<2>();
        if constexpr (both) {
            tile_zero<1>();
            tile_zero<3>();
        }
    }
    add_products<both>(a, a_stride, b0, b1, depth);
    store_sums<both>(to, stride);
}

}  // namespace kvc::KVC_NAMESPACE
