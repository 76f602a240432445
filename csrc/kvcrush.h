/* The C interface of the CPU kernels: paged attention over pages of several precisions, and what
 * fills those pages. No torch, no Python: loaded with dlopen.
 *
 * A cache is one storage of equal pages. Block b of layer l holds the page of KV head h at page
 * index b * block_pages + first_page + h, where first_page = l * num_kv_heads in a block-outermost
 * cache. A request reads, in every (layer, KV head), the pages that a directory names (its
 * compressed region, in any order, each with a codec and a count) and then its tail: raw blocks in
 * token order. See layout.h for what a page looks like inside.
 *
 * Every function returns 0, or -1 after leaving one sentence in kvc_error(). Lengths, counts, page
 * indices and codecs are checked, so that wrong ones never reach outside the cache; pointers and
 * strides are trusted. Strides count elements.
 */
#ifndef KVCRUSH_H
#define KVCRUSH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVC_VERSION 8

enum { KVC_F32 = 0, KVC_BF16 = 1, KVC_F16 = 2 };

/* How a page is filled. Raw pages hold block_size tokens and no positions; exact pages are raw
 * pages with positions. Numbers are stored in directories: only ever add. */
enum {
    KVC_RAW = 0,
    KVC_EXACT = 1,
    KVC_INT8 = 2,
    KVC_INT4 = 3,
    KVC_TC4 = 4,
    KVC_TC6 = 5,
    KVC_TC8 = 6,
    KVC_TADA = 7,
    KVC_GEAR = 8
};
#define KVC_CODECS 9

/* Four components of a key that share a field of bits in every token's codes. */
typedef struct {
    uint8_t quad;   /* components 4 * quad ... 4 * quad + 3, one in each byte of the word */
    uint8_t weight; /* the field counts 2^weight times */
    uint8_t word;   /* of the token's codes */
    uint8_t first;  /* lowest bit, in each byte */
    uint8_t bits;   /* 1 to 4 */
} kvc_piece;

/* How keys and values of one KV head become codes, and where a page keeps them. */
typedef struct {
    int32_t capacity;   /* tokens of a page, a multiple of 16 */
    int32_t exceptions; /* of them, kept as int8 */
    int32_t words;      /* 32-bit words of a token's key codes */
    int32_t pieces;
    int32_t components; /* that have bits: a multiple of 4; the others are 0 */
    int32_t stride;     /* floats of a row of `inverse`: components up to a multiple of 16 */
    const kvc_piece *piece;
    const float *mean;    /* [k_size] */
    const float *forward; /* [k_size, k_size]: component = forward . (key - mean) */
    const float *inverse; /* [k_size, stride]: key = mean + inverse . component */
    const float *cost;    /* [k_size]: what an error of 1 in a component costs */
    /* For products with queries, by field: four for each piece, up to a multiple of 16. */
    int32_t fields;
    int32_t v_bits; /* 2 to 4 */
    /* [k_size / 2, fields]: `inverse` of the field's component, times its weight, in steps.
     * Channels c and c + k_size / 2 are the halves of a word, signed and at most 4095. */
    const int32_t *weight;
    const float *step;   /* [fields] of `weight` */
    const float *middle; /* [fields up to a multiple of 32]: of the field's codes */
    float v_step;        /* between the levels of a value of unit variance */
    int32_t reserved;
} kvc_head_table;

/* One fitted codec in one layer. A component of b bits has the codes 0 ... 2^b - 1, which stand
 * for code - (2^b - 1) / 2. */
typedef struct {
    int32_t local;     /* keys are coded as seen from the position of their strip's first token */
    int32_t positions; /* below which tokens must stand */
    const kvc_head_table *heads;
    /* Rotary embedding: cosines, then sines, of each pair (c, c + k_size / 2), at 256 * i and at
     * i < 256; rows of k_size floats. Null unless `local`. */
    const float *coarse;
    const float *fine;
} kvc_table;

/* One layer of a cache. */
typedef struct {
    uint8_t *pool; /* 64-byte aligned */
    int64_t num_blocks;
    int64_t page_bytes;  /* block_size * (k_size + v_size) * size of dtype */
    int32_t block_pages; /* pages of a block: layers * num_kv_heads */
    int32_t first_page;  /* of this layer within a block */
    int32_t block_size;  /* tokens; a multiple of 16 */
    int32_t num_kv_heads;
    int32_t num_heads;
    int32_t k_size; /* head sizes: multiples of 8, at most 256 */
    int32_t v_size;
    int32_t dtype; /* of raw pages */
    float scale;   /* of q.k */
    int32_t reserved;
    const kvc_table *const *tables; /* by codec, KVC_CODECS of them; null for those without */
} kvc_layer;

/* Which pages a (sequence, KV head) owns: entries [begin, end) of page, count and codec, where
 * begin and end are read at sequence * stride + head. begin may be null: nothing is compressed. */
typedef struct {
    const int32_t *begin;
    const int32_t *end;
    int64_t stride;
    int64_t size; /* entries in the arrays below */
    const int32_t *page;
    const uint16_t *count; /* tokens in the page */
    const uint8_t *codec;
    const int64_t *bias; /* per entry: where in log_bias its tokens start, or -1; may be null */
    const float *log_bias;
    int64_t log_bias_size;
} kvc_directory;

/* Sequences of one step. */
typedef struct {
    int32_t num_seqs;
    const int32_t *query_start; /* [num_seqs + 1]: rows of query and out */
    const int32_t *tail_length; /* [num_seqs]: tokens in the tail, this step's included */
    const int32_t *tail_table;  /* [num_seqs, tail_stride]: block ids */
    int64_t tail_stride;
    kvc_directory directory;
} kvc_batch;

int kvc_version(void);
/* How this library lays out the structures above, for whoever mirrors them: a line for each,
 * "name size: field offset size, field offset size, ...". */
const char *kvc_structs(void);
const char *kvc_error(void);
/* "baseline", "avx2", "avx512", "avx512bf16", "amx" or "neon": the best that this CPU runs, or what
 * KVCRUSH_ISA names. */
const char *kvc_isa(void);
/* Makes later calls use the named kernels; for tests. */
int kvc_use_isa(const char *name);
/* Threads that a large call would use: those of the OpenMP runtime in this process, else 1. */
int kvc_threads(void);

/* The most bytes of working memory that all threads' calls have held at once since the last call of
 * this function, which begins anew with what is kept from call to call. */
int64_t kvc_scratch_peak(void);

/* Tokens that a page holds; 0 if the codec cannot fill such pages; -1 if it does not exist or its
 * tables decide. */
int64_t kvc_capacity(int32_t codec, int64_t page_bytes, int32_t k_size, int32_t v_size,
                     int32_t dtype);

/* Attention of every query row over its sequence: all of the compressed region, and the tail up to
 * the row's own token (row i of q sees tail_length - q + i + 1 tokens).
 * query: [rows, num_heads, k_size]; out: [rows, num_heads, v_size]; lse, may be null: natural
 * logarithm of the softmax denominator, float [rows, num_heads]. */
int kvc_attention(const kvc_layer *layer, const kvc_batch *batch, const void *query,
                  int32_t query_dtype, int64_t query_stride, void *out, int32_t out_dtype,
                  int64_t out_stride, float *lse);

/* Writes key [rows, num_kv_heads, k_size] and value [rows, num_kv_heads, v_size], in the layer's
 * dtype, into raw slots: slots[i] = block * block_size + place, or -1 to skip the row. */
int kvc_store(const kvc_layer *layer, int64_t rows, const void *key, int64_t key_stride,
              const void *value, int64_t value_stride, const int64_t *slots);

/* Checks everything that `layer` says, tables included: once, when they are made. Calls check only
 * what changes between them. */
int kvc_check_layer(const kvc_layer *layer);

/* Fills one page of a KV head from float K [count, k_size], V [count, v_size] and ascending
 * positions (may be null for raw). */
int kvc_encode(const kvc_layer *layer, int32_t codec, int32_t head, int64_t page, int32_t count,
               const float *key, const float *value, const int32_t *positions);
/* Reads one page back; each output may be null. Raw pages have no positions. */
int kvc_decode(const kvc_layer *layer, int32_t codec, int32_t head, int64_t page, int32_t count,
               float *key, float *value, int32_t *positions);

/* One request's tokens: its entry 0 of a directory, then its tail. Slots are numbered per head:
 * the directory's tokens in order, then the tail's. */
typedef struct {
    kvc_directory directory;
    const int32_t *tail_table;
    int32_t tail_length;
    int32_t tail_position; /* position of the tail's first token */
} kvc_source;

/* Compaction of one layer: head h's slots slots[slot_start[h]] ... slots[slot_start[h + 1] - 1] are
 * decoded and encoded into the pages of `target`, each taking as many as its count says. Those of a
 * page that keeps positions must be in the order of their positions as kvc_read gives them, else
 * all is refused and nothing written. Only where the layer has fitted codecs may positions tie,
 * since what their pages keep is rounded down: of a head's slots, page after page, those that tie
 * are moved to the next free position. A source page whose tokens fill a page of the same codec is
 * copied. Targets may be sources. */
int kvc_compact(const kvc_layer *layer, const kvc_source *source, const int64_t *slots,
                const int64_t *slot_start, const kvc_directory *target);

/* Reads chosen slots of every KV head: head h's slots[slot_start[h]] ... slots[slot_start[h + 1] -
 * 1], in any order, become the first rows of key [num_kv_heads, rows, k_size], value [num_kv_heads,
 * rows, v_size] and positions [num_kv_heads, rows], whose other rows become 0; each output may be
 * null. */
int kvc_gather(const kvc_layer *layer, const kvc_source *source, const int64_t *slots,
               const int64_t *slot_start, int64_t rows, float *key, float *value,
               int32_t *positions);

/* The other half of a compaction: head h's first counts[h] rows of key, value and positions, shaped
 * as kvc_gather gives them, are encoded into the pages of `target`, each taking as many as its
 * count says. Positions as in kvc_compact; may be null if no target keeps them. All is checked
 * before anything is written. */
int kvc_fill(const kvc_layer *layer, int64_t rows, const int64_t *counts, const float *key,
             const float *value, const int32_t *positions, const kvc_directory *target);

/* Reads a request's slots in order as float K [n, k_size] and V [n, v_size] and positions of one
 * head, n tokens from slot `first`; each output may be null. */
int kvc_read(const kvc_layer *layer, const kvc_source *source, int32_t head, int64_t first,
             int64_t n, float *key, float *value, int32_t *positions);

/* How scores come from the attention of a window of queries. */
typedef struct {
    int32_t window;
    int32_t pool;     /* width of the centred pooling window along the slots, odd; 1: none */
    int32_t pool_max; /* maximum instead of mean; at the edges the window is cut */
    /* Over the query heads of a KV head: 0 none, 1 mean, 2 maximum, 3 maximum for each query,
     * before the sum over the window. */
    int32_t reduce;
    float factor; /* of the sum over the window: 1 / window for its mean */
} kvc_scoring;

/* Scores of slots [0, candidates[h]) of each KV head h: softmax attention of the newest `window`
 * queries over all its slots (row i belongs to the tail's token tail_length - window + i and sees
 * nothing later; log biases count), summed over the window, then pooled over the candidates and
 * reduced as asked. query: [num_heads, window, k_size], strides of head and row; out: float, for
 * each query head, or each KV head if reduced, a row of the most candidates that any head has,
 * which is -infinity past the head's own. A head must hold as many slots as it has candidates. */
int kvc_window_scores(const kvc_layer *layer, const kvc_source *source, const void *query,
                      int32_t query_dtype, int64_t head_stride, int64_t row_stride,
                      const kvc_scoring *scoring, const int64_t *candidates, float *out);

/* Marks the keep[i] best of row i of scores [rows, n], the lower slot first among equals; NaN is
 * the worst. mask: [rows, n] of 0 and 1. */
int kvc_top_mask(int64_t rows, int64_t n, const float *scores, const int64_t *keep, uint8_t *mask);

/* KVCrush's representatives. Units of `unit` tokens are described by the bits of their tokens,
 * head after head: bits [bit_heads, units * unit]. Each of the `heads` rows of mask [heads, units]
 * marks important units, equally many in each; of the others, ordered by their Hamming distance
 * to the anchor [bit_heads * unit] (null: the majority of these others, 0 at a tie), then by
 * index, evenly spaced ones are marked too: those at floor(i * others / count). */
int kvc_represent(int64_t bit_heads, int64_t units, int64_t unit, const uint8_t *bits,
                  const uint8_t *anchor, int64_t heads, uint8_t *mask, int64_t count);

/* Keys of `heads` heads, floats [heads, slots, size]; heads begin `stride` floats apart. Sizes are
 * those of a layer's heads. */
typedef struct {
    const float *data;
    int64_t stride;
    int32_t heads;
    int32_t size;
    int64_t slots;
} kvc_keys;

/* For each slot that `gone` [heads, slots] marks, the one that `kept` marks whose key has the
 * greatest cosine with its own, of equal ones the first: target and cosine [heads, slots]. Other
 * slots get themselves and 1; the cosine is -2, and the target the slot itself, where a head keeps
 * nothing or no cosine is a number. */
int kvc_nearest_kept(const kvc_keys *keys, const uint8_t *gone, const uint8_t *kept,
                     int64_t *target, float *cosine);

/* out [heads, slots]: for the first counts[h] keys of head h the mean over all of them of the
 * cosine with it, in which a key's cosine with itself, and with the latest other one that it has a
 * cosine above `threshold` with, are 0; 0 for the slots past them. threshold >= 0. */
int kvc_redundancy(const kvc_keys *keys, const int64_t *counts, float threshold, float *out);

/* out [heads, slots, size]: the sum of weight[h, i] times x [h, i] over the slots i whose
 * target [heads, slots] a slot is; 0 where it is nobody's. A weight of 0 leaves its slot out. */
int kvc_merge(const kvc_keys *x, const int64_t *target, const float *weight, float *out);

/* Adds part[h, i] times the value of each slot i that `kept` [heads, slots] does not mark to the
 * values of the next `width` slots that it marks. values [heads, slots, size]. */
int kvc_spread(int32_t heads, int64_t slots, int32_t size, const uint8_t *kept, const float *part,
               int64_t width, float *values);

/* Indices of the ones of each row i of mask [rows, n], of which there must be count[i]: rows of the
 * largest count, -1 past their own. */
int kvc_mask_slots(int64_t rows, int64_t n, const uint8_t *mask, const int64_t *count,
                   int64_t *slots);

#ifdef __cplusplus
}
#endif
#endif
