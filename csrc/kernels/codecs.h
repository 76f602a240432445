// The list of codecs: what this instruction set does with the strips of each.
//
// A new codec takes a number (kvcrush.h), a format (layout.h), a header beside the others with
//
//   struct Name : Expanded<Name> {
//       static void expand(const Layer &, const Strip &, float *keys, float *values);
//       static void encode(const Layer &, int codec, int head, uint8_t *page, int count,
//                          const float *key, const float *value);
//   };
//
// and, where it has products of its own, scores, values and the Query that they share (strips.h);
// then a line in KVC_EACH_KIND, and its name in Prepared.
#pragma once

#include "codecs/fitted.h"
#include "codecs/gear.h"
#include "codecs/int4.h"
#include "codecs/int8.h"
#include "codecs/raw.h"
#include "codecs/tada.h"

namespace kvc::KVC_NAMESPACE {

template <class... C>
struct PreparedBy : C::Query... {
    template <class Arena>
    void take(Arena &arena, const Layer &layer) {
        (C::Query::take(arena, layer), ...);
    }
    void begin() {
        (C::Query::begin(), ...);
    }
};
// Everything that reads strips, once.
struct Prepared : PreparedBy<Raw, Int8, Int4, Fitted, Tada, Gear, Exceptions> {};

template <class C>
constexpr CodecTraits traits(int kind) {
    return {
        kind,
        kind != kExceptions && kFormats[kind].rotated,
        C::plain,
        [](const Pass &pass, Prepared &prepared, const float *q, float *s) {
            C::scores(pass, static_cast<typename C::Query &>(prepared), q, s);
        },
        [](const Pass &pass, Prepared &prepared, float *p, const float *decay, float *sums) {
            C::values(pass, static_cast<typename C::Query &>(prepared), p, decay, sums);
        },
        C::expand,
        C::encode,
    };
}

#define KVC_EACH_KIND(use)                                                                 \
    use(Raw, KVC_RAW) use(Raw, KVC_EXACT) use(Int8, KVC_INT8) use(Int4, KVC_INT4)          \
        use(Fitted, KVC_TC4) use(Fitted, KVC_TC6) use(Fitted, KVC_TC8) use(Tada, KVC_TADA) \
            use(Gear, KVC_GEAR) use(Exceptions, kExceptions)

#define KVC_KIND(codec, kind) traits<codec>(kind),
constexpr CodecTraits kTraits[] = {KVC_EACH_KIND(KVC_KIND)};
#undef KVC_KIND
constexpr bool traits_are_in_order() {
    for (int kind = 0; kind < kKinds; ++kind)
        if (kTraits[kind].kind != kind) return false;
    return sizeof kTraits == kKinds * sizeof(CodecTraits);
}
static_assert(traits_are_in_order());

}  // namespace kvc::KVC_NAMESPACE
