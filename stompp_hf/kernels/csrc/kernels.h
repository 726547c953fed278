/* 1-bit products on a CPU: what the files share.
 *
 * Signs are bits, 1 for +1; 32 of them are a word, the first in its lowest bit. Bits behind the last are 0 in both
 * operands, so that they never differ: with d the number of bits that differ, the product of K signs is K - 2 d.
 *
 * Every product has `rows` of words, whose words are broadcast, and a `panel`, whose words lie side by side in LANES
 * lanes: panel[word][lane]. In a linear layer rows are inputs and lanes are output channels; in a convolution rows
 * are output channels and lanes are pixels. So results lie in lanes as they lie in memory.
 */
#ifndef STOMPP_KERNELS_H
#define STOMPP_KERNELS_H

#include <stdint.h>

#define STOMPP_VERSION 10 /* to be raised with every change of a function that Python calls */
#define LANES 64
#define VECTOR 16  /* lanes come in multiples of it */
#define ROW_BLOCK 48 /* rows of results that are held at a time: 12 KiB */

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Numbers of an input or an output. Those of TWO_CUTS are FLOAT32 with two thresholds a feature, see cut_row. */
enum { FLOAT32, BFLOAT16, FLOAT16, TWO_CUTS };
enum { DONE = 0, NO_MEMORY = 1 };

static inline int64_t words_of(int64_t bits) { return (bits + 31) / 32; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t size_of(int dtype) { return dtype == BFLOAT16 || dtype == FLOAT16 ? 2 : 4; }

/* What differs between CPUs. */
typedef struct {
    const char *name;
    /* Words of sign(x - b) of `count` numbers side by side; b may be NULL. */
    void (*sign_row)(const void *x, int dtype, const float *b, int64_t count, uint32_t *words);
    /* Words of the sign of the larger one of x - high and low - x: +1 from `high` on and up to `low`. */
    void (*cut_row)(const float *x, const float *high, const float *low, int64_t count, uint32_t *words);
    /* One word for each of `count` pixels, bit i from channel i of `channels` <= 32, which lie `stride` numbers apart. */
    void (*sign_plane)(const void *x, int dtype, int64_t stride, const float *b, int64_t channels, int64_t count,
                       uint32_t *words);
    /* panel[word][lane] of `lanes` <= LANES rows of `bytes` bytes each; lanes behind them are 0. */
    void (*make_panel)(const uint8_t *bits, int64_t bytes, int64_t lanes, int64_t words, uint32_t *panel);
    /* z[row][lane] = K - 2 (bits that differ), for `vectors` * VECTOR lanes. `spare`: words * LANES words. */
    void (*product)(const uint32_t *rows, int64_t row_stride, int64_t count, const uint32_t *panel,
                    int64_t panel_stride, int64_t vectors, int64_t words, int32_t K, int32_t *z, uint32_t *spare);
    /* The same for one row and the bits themselves, without a panel, which few rows are not worth; NULL where it is. */
    void (*one_row)(const uint32_t *row, const uint8_t *bits, int64_t bytes, int64_t lanes, int32_t K, int32_t *z);
    /* y = scale * z + shift along one row of lanes, rounded twice as torch does; steps of 0 repeat one value. */
    void (*finish)(const int32_t *z, const float *scale, int64_t scale_step, const float *shift, int64_t shift_step,
                   int64_t count, void *y, int dtype);
    /* sign(x - b) of `count` numbers as -1 and 1, for one b. */
    void (*sign_bytes)(const void *x, int dtype, float b, int64_t count, int8_t *signs);
    /* sums[i] += sign * row[i * stride]. */
    void (*add_row)(const int8_t *row, int64_t stride, int sign, int64_t count, int16_t *sums);
    /* Sums of real numbers: z[lane] = x . sign(w), for one row x whose sums of every `real_bits` numbers, one after
     * another through a word, are `tables`. NULL where there is nothing better than plain sums of products. */
    void (*real_product)(const float *tables, const uint32_t *panel, int64_t vectors, int64_t words, float *z);
    int real_bits;
    /* z[row] = x . sign(w) for rows of bits, K numbers each, in an order of sums of its own: x[0] in the first of 16
     * lanes; then 16 numbers at a time, each in its lane; lanes folded by halves; and what is left, fewer than 16, once
     * more so, the sum before in the first lane. */
    void (*lane_rows)(const float *x, int64_t K, const uint8_t *bits, int64_t rows, float *z);
    /* -1 and 1 for the first `count` bits of a row. */
    void (*unpack_row)(const uint8_t *bits, int64_t count, float *signs);
    /* One word for each of `count` columns, bit i the sign of row i of `rows` <= 32, `stride` numbers apart, less the
     * column's b, which may be NULL. */
    void (*sign_columns)(const float *x, int64_t stride, const float *b, int64_t rows, int64_t count, uint32_t *words);
    /* Words of the numbers that are at least `least`, without those whose byte of `excluded` is 1, which may be NULL. */
    void (*select_row)(const float *x, float least, const uint8_t *excluded, int64_t count, uint32_t *words);
    /* y = z * scale * scaling + added[0] + added[1], or the lowest number where excluded; each of the last may be
     * NULL. Rounded after each operation. */
    void (*score_row)(const int32_t *z, float scale, float scaling, const float *const added[2],
                      const uint8_t *excluded, int64_t count, float *y);
} Backend;

extern const Backend stompp_portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define STOMPP_X86 1
extern const Backend stompp_avx2, stompp_avx512;
#elif defined(__aarch64__) && defined(__GNUC__)
#define STOMPP_ARM64 1
extern const Backend stompp_neon;
#endif

const Backend *stompp_backend(void);

/* Sizes of a convolution with up to three dimensions; those that it has not are 1 (padding 0). */
typedef struct {
    int64_t batch, channels, outputs, groups;
    int64_t in[3], out[3], kernel[3], stride[3], before[3], dilation[3]; /* before: padding in front of the input */
    int64_t pad; /* what stands around the input: -1, 0 or 1 */
} Shape;

/* Attention of `samples`, each with `groups` of one key head and `heads` query heads; thresholds have a row a head, scales
 * and probability_threshold a number. query (samples, groups, heads, queries, size), key (samples, groups, keys, size),
 * value (samples, groups, keys, value_size), y (samples, queries, groups * heads, value_size) contiguous. added and
 * excluded (bytes of 0 and 1): (samples, groups, heads, queries, keys). Strides are those of all dimensions but the
 * last, whose is 1; 0 repeats. NULL may be: the first three thresholds, added, excluded. panels: as many bytes as
 * stompp_attention_panels says. */
typedef struct {
    const float *query, *key, *value, *query_threshold, *key_threshold, *value_threshold, *probability_threshold;
    const float *score_scale, *value_scale, *added[2];
    const uint8_t *excluded;
    float *y;
    uint32_t *panels;
    int64_t samples, groups, heads, queries, keys, size, value_size;
    int64_t query_strides[4], key_strides[3], value_strides[3], added_strides[2][4], excluded_strides[4];
    float scaling, least; /* a probability below `least` is none */
} Attention;

static inline int64_t volume(const int64_t size[3]) { return size[0] * size[1] * size[2]; }

/* Calls task(context, index, slot) for every index below `count`; no two at a time share a slot below `threads`. */
typedef void (*Task)(void *context, int64_t index, int slot);
void stompp_run(Task task, void *context, int64_t count, int threads);
int stompp_threads_for(double products, int threads);

/* Memory that vectors may be read from and written to, also a vector behind its end; NULL where there is none. */
void *stompp_allocate(int64_t bytes);
void stompp_release(void *memory);

#endif
