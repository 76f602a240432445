// Scalars, 16-bit floats among them, for the instruction set that this translation unit is compiled
// for, in a namespace of its own: nothing here may be shared between units, or the linker would mix
// them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef KVC_NAMESPACE
#error "compile with -DKVC_NAMESPACE=name"
#endif

#define KVC_INLINE inline __attribute__((always_inline))
// Loops that need all registers are functions of their own.
#define KVC_APART __attribute__((noinline))

namespace kvc::KVC_NAMESPACE {

template <class T>
KVC_INLINE T least(T a, T b) {
    return b < a ? b : a;
}
template <class T>
KVC_INLINE T most(T a, T b) {
    return a < b ? b : a;
}

// Scalars. 16-bit floats travel as uint16_t.

KVC_INLINE float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
KVC_INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
KVC_INLINE float bf16_to_float(uint16_t x) {
    return bits_to_float(uint32_t{x} << 16);
}
// To nearest even; NaN stays NaN.
KVC_INLINE uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
KVC_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    // A multiplication rebuilds the exponent, subnormals included.
    const uint32_t magnitude = uint32_t{h} << 13 & 0x0fffe000u;
    const uint32_t sign = uint32_t{h & 0x8000u} << 16;
    if ((h & 0x7c00u) == 0x7c00u) return bits_to_float(sign | 0x7f800000u | magnitude);
    const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);  // 2^112
    return bits_to_float(sign | float_to_bits(scaled));
#endif
}
KVC_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#else
    const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: let the adder round
        const float shifted = bits_to_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
    }
    magnitude += 0xc8000fffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | magnitude >> 13);
#endif
}

}  // namespace kvc::KVC_NAMESPACE
