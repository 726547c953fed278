/* NEON, which every ARM64 has: xor, count the ones of every byte, add, 128 bits at a time. A look-up by nibbles as with
 * AVX2 would take more instructions a bit here. */
#include "kernels.h"

#ifdef STOMPP_ARM64
#include <arm_neon.h>
#include <string.h>

#define TARGET
#define OWN_HALVES

static void halves_to_floats(const uint16_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += 4) {
        uint16_t four[4] = {0};
        float floats[4];
        memcpy(four, from + i, (size_t)smaller(4, count - i) * 2);
        vst1q_f32(floats, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(four))));
        memcpy(to + i, floats, (size_t)smaller(4, count - i) * 4);
    }
}

static void floats_to_halves(const float *from, int64_t count, uint16_t *to) {
    for (int64_t i = 0; i < count; i += 4) {
        float four[4] = {0};
        uint16_t halves[4];
        memcpy(four, from + i, (size_t)smaller(4, count - i) * 4);
        vst1_u16(halves, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(four))));
        memcpy(to + i, halves, (size_t)smaller(4, count - i) * 2);
    }
}

/* The inverted sign of lane j of vector i becomes bit 4 i + j. */
static inline uint32_t signs_in_order(const uint32x4_t vectors[8]) {
    static const int32_t places[4] = {0, 1, 2, 3};
    uint32x4_t negative = vdupq_n_u32(0);
    for (int i = 7; i >= 0; i--)
        negative = vsliq_n_u32(vshrq_n_u32(vectors[i], 31), negative, 4);
    return ~vaddvq_u32(vshlq_u32(negative, vld1q_s32(places)));
}

static inline uint32_t cuts_of_32(const float *x, const float *high, const float *low) {
    uint32x4_t both[8];
    for (int i = 0; i < 8; i++) {
        float32x4_t numbers = vld1q_f32(x + 4 * i), above = vsubq_f32(numbers, vld1q_f32(high + 4 * i));
        both[i] = vandq_u32(vreinterpretq_u32_f32(above),
                            vreinterpretq_u32_f32(vsubq_f32(vld1q_f32(low + 4 * i), numbers)));
    }
    return signs_in_order(both);
}

static inline uint32_t signs_of_32(const float *x, const float *b) {
    float32x4_t under = vdupq_n_f32(-0.0f);
    uint32x4_t differences[8];
    for (int i = 0; i < 8; i++) {
        if (b) /* -(0 - b) */
            under = vnegq_f32(vsubq_f32(vdupq_n_f32(0.0f), vld1q_f32(b + 4 * i)));
        differences[i] = vreinterpretq_u32_f32(vsubq_f32(vld1q_f32(x + 4 * i), under));
    }
    return signs_in_order(differences);
}

static inline uint32_t at_least_32(const float *x, float least) {
    uint32x4_t found[8];
    for (int i = 0; i < 8; i++)
        found[i] = vcgeq_f32(vld1q_f32(x + 4 * i), vdupq_n_f32(least));
    return ~signs_in_order(found); /* all bits of what is found are set, and so its sign */
}

#include "common.inc"
#include "attention.inc"

/* 4 rows of 4 words become 4 words of 4 lanes. */
static inline void transpose(uint32x4_t v[4]) {
    uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(v[0], v[1])), b = vreinterpretq_u64_u32(vtrn2q_u32(v[0], v[1]));
    uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(v[2], v[3])), d = vreinterpretq_u64_u32(vtrn2q_u32(v[2], v[3]));
    v[0] = vreinterpretq_u32_u64(vzip1q_u64(a, c));
    v[1] = vreinterpretq_u32_u64(vzip1q_u64(b, d));
    v[2] = vreinterpretq_u32_u64(vzip2q_u64(a, c));
    v[3] = vreinterpretq_u32_u64(vzip2q_u64(b, d));
}

static void make_panel(const uint8_t *bits, int64_t bytes, int64_t lanes, int64_t words, uint32_t *panel) {
    int64_t whole = bytes / 16 * 4; /* words that can be read 4 at a time */
    for (int64_t word = 0; word < whole; word += 4)
        for (int64_t lane = 0; lane < LANES; lane += 4) {
            uint32x4_t v[4];
            for (int i = 0; i < 4; i++)
                v[i] = lane + i < lanes ? vreinterpretq_u32_u8(vld1q_u8(bits + (lane + i) * bytes + 4 * word))
                                        : vdupq_n_u32(0);
            transpose(v);
            for (int i = 0; i < 4; i++)
                vst1q_u32(panel + (word + i) * LANES + lane, v[i]);
        }
    panel_rest(bits, bytes, lanes, whole, words, panel);
}

#define WORDS_A_BYTE 31 /* a counter of 8 bits holds the differences of 31 bytes, at most 248 */

/* sums[lane] += the counters of its 4 bytes. */
static inline uint32x4_t widened(uint32x4_t sums, uint8x16_t counters) {
    return vpadalq_u16(sums, vpaddlq_u8(counters));
}

/* R rows by 16 lanes: 4 R counters stay in registers. */
#define TILE(R)                                                                                                        \
    static void tile_##R(const uint32_t *rows, int64_t row_stride, const uint32_t *panel, int64_t panel_stride,        \
                         int64_t words, int32_t K, int32_t *z) {                                                       \
        uint32x4_t sums[R][4];                                                                                         \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int v = 0; v < 4; v++)                                                                                \
                sums[r][v] = vdupq_n_u32(0);                                                                           \
        for (int64_t first = 0; first < words; first += WORDS_A_BYTE) {                                                \
            int64_t last = smaller(first + WORDS_A_BYTE, words);                                                       \
            uint8x16_t differ[R][4];                                                                                   \
            _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)                                                        \
                _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) differ[r][v] = vdupq_n_u8(0);                      \
            for (int64_t word = first; word < last; word++, panel += panel_stride) {                                   \
                uint32x4_t beside[4];                                                                                  \
                _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) beside[v] = vld1q_u32(panel + 4 * v);              \
                _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                  \
                    uint32x4_t own = vld1q_dup_u32(rows + r * row_stride + word);                                      \
                    _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) differ[r][v] = vaddq_u8(                       \
                        differ[r][v], vcntq_u8(vreinterpretq_u8_u32(veorq_u32(own, beside[v]))));                      \
                }                                                                                                      \
            }                                                                                                          \
            for (int r = 0; r < R; r++)                                                                                \
                for (int v = 0; v < 4; v++)                                                                            \
                    sums[r][v] = widened(sums[r][v], differ[r][v]);                                                    \
        }                                                                                                              \
        int32x4_t all = vdupq_n_s32(K);                                                                                \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int v = 0; v < 4; v++)                                                                                \
                vst1q_s32(z + r * LANES + 4 * v, vmlsq_n_s32(all, vreinterpretq_s32_u32(sums[r][v]), 2));              \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5)

typedef void (*Tile)(const uint32_t *, int64_t, const uint32_t *, int64_t, int64_t, int32_t, int32_t *);
static const Tile tiles[5] = {tile_1, tile_2, tile_3, tile_4, tile_5};

static void product(const uint32_t *rows, int64_t row_stride, int64_t count, const uint32_t *panel,
                    int64_t panel_stride, int64_t vectors, int64_t words, int32_t K, int32_t *z, uint32_t *spare) {
    (void)spare;
    for (int64_t first = 0; first < vectors * VECTOR; first += VECTOR)
        for (int64_t row = 0; row < count; row += 5)
            tiles[smaller(5, count - row) - 1](rows + row * row_stride, row_stride, panel + first, panel_stride, words,
                                               K, z + row * LANES + first);
}

#define PIECES_A_BYTE 31 /* the same for pieces of 16 bytes */

/* 4 rows of weights at a time; bytes behind the last piece of 16 are read from copies that end in zeros. */
static void one_row(const uint32_t *row, const uint8_t *bits, int64_t bytes, int64_t lanes, int32_t K, int32_t *z) {
    const uint8_t *x = (const uint8_t *)row;
    int64_t pieces = bytes / 16, rest = bytes % 16;
    for (int64_t lane = 0; lane < lanes; lane += 4) {
        const uint8_t *weights[4];
        uint32x4_t sums[4];
        for (int i = 0; i < 4; i++) {
            uint8_t a[16] = {0}, b[16] = {0};
            weights[i] = bits + smaller(lane + i, lanes - 1) * bytes;
            memcpy(a, x + 16 * pieces, (size_t)rest);
            memcpy(b, weights[i] + 16 * pieces, (size_t)rest);
            sums[i] = widened(vdupq_n_u32(0), vcntq_u8(veorq_u8(vld1q_u8(a), vld1q_u8(b))));
        }
        for (int64_t first = 0; first < pieces; first += PIECES_A_BYTE) {
            uint8x16_t differ[4] = {vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
            for (int64_t at = 16 * first, end = 16 * smaller(first + PIECES_A_BYTE, pieces); at < end; at += 16) {
                uint8x16_t own = vld1q_u8(x + at);
                for (int i = 0; i < 4; i++)
                    differ[i] = vaddq_u8(differ[i], vcntq_u8(veorq_u8(own, vld1q_u8(weights[i] + at))));
            }
            for (int i = 0; i < 4; i++)
                sums[i] = widened(sums[i], differ[i]);
        }
        uint32x4_t all = vpaddq_u32(vpaddq_u32(sums[0], sums[1]), vpaddq_u32(sums[2], sums[3]));
        vst1q_s32(z + lane, vmlsq_n_s32(vdupq_n_s32(K), vreinterpretq_s32_u32(all), 2));
    }
}

/* Real inputs by look-up: none, or it would have to be measured against torch's own products first. */
const Backend stompp_neon = {.name = "neon", .sign_row = sign_row, .cut_row = cut_row, .sign_plane = sign_plane, .make_panel = make_panel,
                             .product = product, .one_row = one_row, .finish = finish, .sign_bytes = sign_bytes,
                             .add_row = add_row, .lane_rows = lane_rows, .unpack_row = unpack_row,
                             .sign_columns = sign_columns, .select_row = select_row, .score_row = score_row};
#endif
