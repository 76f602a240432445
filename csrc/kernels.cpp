// All kernels of one instruction set. Compiled once for each, with its flags and its namespace.
#include "internal.h"
#include "kernels/attention.h"
#include "kernels/pages.h"
#include "kernels/scores.h"
#include "kernels/similar.h"

#define KVC_TEXT_(x) #x
#define KVC_TEXT(x) KVC_TEXT_(x)

namespace kvc {

extern const Kernels KVC_TABLE;
const Kernels KVC_TABLE = {
    KVC_TEXT(KVC_NAMESPACE),       KVC_NAMESPACE::attention_scratch,
    KVC_NAMESPACE::items_rows,     KVC_NAMESPACE::partial_floats,
    KVC_NAMESPACE::attention,      KVC_NAMESPACE::store,
    KVC_NAMESPACE::encode,         KVC_NAMESPACE::decode,
    KVC_NAMESPACE::window_scratch, KVC_NAMESPACE::window_weights,
    KVC_NAMESPACE::strip_bytes,    KVC_NAMESPACE::alike_scratch,
    KVC_NAMESPACE::pack_strip,     KVC_NAMESPACE::nearest_columns,
    KVC_NAMESPACE::latest_columns, KVC_NAMESPACE::add_units,
    KVC_NAMESPACE::total_cosines,
};

}  // namespace kvc
