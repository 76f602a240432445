// Rotation of V: signs, then orthonormal Hadamard transforms over blocks of channels, so that no
// channel is much larger than the others.
#pragma once

#include "kernels/panel.h"

namespace kvc::KVC_NAMESPACE {

// Signs of the rotation of V, channel by channel.
struct Signs {
    float of[kMaxHead] = {};
    constexpr Signs() {
        for (int c = 0; c < kMaxHead; ++c) of[c] = rotation_sign(c);
    }
};
alignas(64) inline constexpr Signs kSigns{};

// Orthonormal Hadamard transforms over blocks of rotation_block(size); `x` may be written up to the
// next multiple of 16.
inline void hadamard(float *x, int size) {
    const int block = rotation_block(size), within = least(block, W);
    const vf factor = vset(1 / __builtin_sqrtf(static_cast<float>(block)));
    for (int c = 0; c < size; c += W) vstore(x + c, vmul(vhadamard(vload(x + c), within), factor));
    for (int half = W; half < block; half *= 2)
        for (int first = 0; first < size; first += 2 * half)
            for (int c = first; c < first + half; c += W) {
                const vf a = vload(x + c), b = vload(x + c + half);
                vstore(x + c, vadd(a, b));
                vstore(x + c + half, vsub(a, b));
            }
}
inline void rotate_back(float *x, int size) {
    hadamard(x, size);
    for (int c = 0; c < size; ++c) x[c] *= kSigns.of[c];
}
inline void rotate(float *x, int size) {
    for (int c = 0; c < size; ++c) x[c] *= kSigns.of[c];
    hadamard(x, size);
}

// The transforms of rows [size][16 tokens], not normalised.
inline void hadamard_strip(int size, float *rows) {
    const int block = rotation_block(size);
    for (int half = 1; half < block; half *= 2)
        for (int first = 0; first < size; first += 2 * half)
            for (int at = first * kStrip; at < (first + half) * kStrip; at += W) {
                const vf a = vload(rows + at), b = vload(rows + at + half * kStrip);
                vstore(rows + at, vadd(a, b));
                vstore(rows + at + half * kStrip, vsub(a, b));
            }
}

// Signs and the transforms' norm.
inline void scale_strip(int size, float *rows) {
    const float unit = 1 / __builtin_sqrtf(static_cast<float>(rotation_block(size)));
    for (int c = 0; c < size; ++c)
        for (int l = 0; l < kStrip; l += W) {
            float *at = rows + c * kStrip + l;
            vstore(at, vmul(vload(at), vset(kSigns.of[c] * unit)));
        }
}

// V of 16 tokens, rotated, as [channel][token].
inline void rotate_strip(const float *const *value, int v_size, float *turned) {
    const uint32_t *row[kStrip];
    for (int t = 0; t < kStrip; ++t) row[t] = reinterpret_cast<const uint32_t *>(value[t]);
    transpose(row, v_size, reinterpret_cast<uint32_t *>(turned));
    scale_strip(v_size, turned);
    hadamard_strip(v_size, turned);
}
// The other way.
inline void rotate_strip_back(int size, float *rows) {
    hadamard_strip(size, rows);
    scale_strip(size, rows);
}

}  // namespace kvc::KVC_NAMESPACE
