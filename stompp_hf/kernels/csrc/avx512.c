/* AVX-512 with VPOPCNTDQ: xor, count, add, 512 bits at a time. */
#include "kernels.h"

#ifdef STOMPP_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,f16c,avx2,fma")))
#define OWN_HALVES
#define BYTES 64
#define ROWS_AT_ONCE 8
#define OWN_FOLD

TARGET static void halves_to_floats(const uint16_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 here = (__mmask16)_cvtu32_mask16(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
        __m256i halves = _mm256_maskz_loadu_epi16(here, from + i);
        _mm512_mask_storeu_ps(to + i, here, _mm512_cvtph_ps(halves));
    }
}

TARGET static void floats_to_halves(const float *from, int64_t count, uint16_t *to) {
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 here = (__mmask16)_cvtu32_mask16(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
        __m256i halves = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(here, from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(to + i, here, halves);
    }
}

TARGET static inline uint32_t signs_of_16(const float *x, const float *b) {
    const __m512 minus_zero = _mm512_set1_ps(-0.0f);
    __m512 under = minus_zero;
    if (b) /* -(0 - b) */
        under = _mm512_xor_ps(minus_zero, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(b)));
    __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(x), under);
    return 0xffffu ^ _cvtmask16_u32(_mm512_movepi32_mask(_mm512_castps_si512(difference)));
}

TARGET static inline uint32_t signs_of_32(const float *x, const float *b) {
    return signs_of_16(x, b) | signs_of_16(x + 16, b ? b + 16 : 0) << 16;
}

TARGET static inline uint32_t cuts_of_16(const float *x, const float *high, const float *low) {
    __m512 numbers = _mm512_loadu_ps(x), above = _mm512_sub_ps(numbers, _mm512_loadu_ps(high));
    __m512 both = _mm512_and_ps(above, _mm512_sub_ps(_mm512_loadu_ps(low), numbers));
    return 0xffffu ^ _cvtmask16_u32(_mm512_movepi32_mask(_mm512_castps_si512(both)));
}

TARGET static inline uint32_t cuts_of_32(const float *x, const float *high, const float *low) {
    return cuts_of_16(x, high, low) | cuts_of_16(x + 16, high + 16, low + 16) << 16;
}

TARGET static inline uint32_t at_least_32(const float *x, float least) {
    __m512 all = _mm512_set1_ps(least);
    return _cvtmask16_u32(_mm512_cmp_ps_mask(_mm512_loadu_ps(x), all, _CMP_GE_OQ)) |
           _cvtmask16_u32(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16), all, _CMP_GE_OQ)) << 16;
}

#include "common.inc"
#include "attention.inc"

/* 16 rows of 16 words become 16 words of 16 lanes. */
TARGET static inline void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

TARGET static void make_panel(const uint8_t *bits, int64_t bytes, int64_t lanes, int64_t words, uint32_t *panel) {
    for (int64_t word = 0; word < words; word += 16) {
        int64_t left = bytes - 4 * word;
        __mmask64 here = left >= 64 ? ~0ull : (1ull << left) - 1;
        for (int64_t lane = 0; lane < LANES; lane += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; i++)
                v[i] = lane + i < lanes ? _mm512_maskz_loadu_epi8(here, bits + (lane + i) * bytes + 4 * word)
                                        : _mm512_setzero_si512();
            transpose(v);
            for (int i = 0; i < 16 && word + i < words; i++)
                _mm512_store_si512(panel + (word + i) * LANES + lane, v[i]);
        }
    }
}

/* R rows by V vectors: R * V counters stay in registers. */
#define TILE(R, V)                                                                                                     \
    TARGET static void tile_##R##_##V(const uint32_t *rows, int64_t row_stride, const uint32_t *panel,                 \
                                      int64_t panel_stride, int64_t words, int32_t K, int32_t *z) {                    \
        __m512i differ[R][V];                                                                                          \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)                                                            \
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) differ[r][v] = _mm512_setzero_si512();                 \
        for (int64_t word = 0; word < words; word++, panel += panel_stride) {                                          \
            __m512i beside[V];                                                                                         \
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) beside[v] = _mm512_loadu_si512(panel + VECTOR * v);    \
            _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                      \
                __m512i own = _mm512_set1_epi32((int32_t)rows[r * row_stride + word]);                                 \
                _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) differ[r][v] = _mm512_add_epi32(                   \
                    differ[r][v], _mm512_popcnt_epi32(_mm512_xor_si512(own, beside[v])));                              \
            }                                                                                                          \
        }                                                                                                              \
        __m512i all = _mm512_set1_epi32(K);                                                                            \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)                                                            \
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) _mm512_storeu_si512(                                   \
                z + r * LANES + VECTOR * v, _mm512_sub_epi32(all, _mm512_slli_epi32(differ[r][v], 1)));                \
    }
#define TILES(R) TILE(R, 1) TILE(R, 2) TILE(R, 3) TILE(R, 4)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)

typedef void (*Tile)(const uint32_t *, int64_t, const uint32_t *, int64_t, int64_t, int32_t, int32_t *);
#define ROW(R) {tile_##R##_1, tile_##R##_2, tile_##R##_3, tile_##R##_4}
static const Tile tiles[6][4] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};

static void product(const uint32_t *rows, int64_t row_stride, int64_t count, const uint32_t *panel,
                    int64_t panel_stride, int64_t vectors, int64_t words, int32_t K, int32_t *z, uint32_t *spare) {
    (void)spare;
    for (int64_t row = 0; row < count; row += 6) {
        Tile tile = tiles[smaller(6, count - row) - 1][vectors - 1];
        tile(rows + row * row_stride, row_stride, panel, panel_stride, words, K, z + row * LANES);
    }
}

/* Lane i of the result: the sum of v[i]. */
TARGET static inline __m512i sums_of_16(const __m512i v[16]) {
    __m512i t[8], u[4];
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)
        t[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
        u[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]),
                                _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
    _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++)
        t[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(u[2 * i], u[2 * i + 1], 0x88),
                                _mm512_shuffle_i32x4(u[2 * i], u[2 * i + 1], 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(t[0], t[1], 0x88), _mm512_shuffle_i32x4(t[0], t[1], 0xdd));
}

#define STAYS(v) __asm__("" : "+v"(v)) /* or gcc keeps the counters in memory */

/* How many bits of 16 rows of weights differ; `lanes` of them are there, and the last stands for those behind it. */
TARGET static inline __m512i differences(const uint8_t *row, const uint8_t *bits, int64_t bytes, int64_t lanes) {
    __m512i v[16];
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) v[i] = _mm512_setzero_si512();
    for (int64_t at = 0; at < bytes; at += 64) {
        __mmask64 here = bytes - at >= 64 ? ~0ull : (1ull << (bytes - at)) - 1;
        __m512i x = _mm512_maskz_loadu_epi8(here, row + at);
        _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) {
            __m512i own = _mm512_maskz_loadu_epi8(here, bits + smaller(i, lanes - 1) * bytes + at);
            v[i] = _mm512_add_epi32(v[i], _mm512_popcnt_epi32(_mm512_xor_si512(x, own)));
            STAYS(v[i]);
        }
    }
    return sums_of_16(v);
}

TARGET static void one_row(const uint32_t *row, const uint8_t *bits, int64_t bytes, int64_t lanes, int32_t K,
                           int32_t *z) {
    for (int64_t lane = 0; lane < lanes; lane += 16, bits += 16 * bytes) {
        int64_t left = lanes - lane;
        __m512i differ = left >= 16 ? differences((const uint8_t *)row, bits, bytes, 16)
                                    : differences((const uint8_t *)row, bits, bytes, left);
        _mm512_storeu_si512(z + lane, _mm512_sub_epi32(_mm512_set1_epi32(K), _mm512_slli_epi32(differ, 1)));
    }
}

/* Each nibble of a lane looks up its sum. */
TARGET static void real_product(const float *tables, const uint32_t *panel, int64_t vectors, int64_t words, float *z) {
    for (int64_t v = 0; v < vectors; v += 2) { /* panels have an even number of vectors */
        const float *table = tables;
        __m512 sums[2][2] = {{_mm512_setzero_ps(), _mm512_setzero_ps()}, {_mm512_setzero_ps(), _mm512_setzero_ps()}};
        for (int64_t word = 0; word < words; word++) {
            __m512i a = _mm512_load_si512(panel + word * LANES + VECTOR * v);
            __m512i b = _mm512_load_si512(panel + word * LANES + VECTOR * (v + 1));
            _Pragma("GCC unroll 8") for (int nibble = 0; nibble < 8; nibble++, table += 16) {
                __m512 values = _mm512_loadu_ps(table);
                sums[0][nibble & 1] = _mm512_add_ps(sums[0][nibble & 1], _mm512_permutexvar_ps(a, values));
                sums[1][nibble & 1] = _mm512_add_ps(sums[1][nibble & 1], _mm512_permutexvar_ps(b, values));
                a = _mm512_srli_epi32(a, 4);
                b = _mm512_srli_epi32(b, 4);
            }
        }
        _mm512_storeu_ps(z + VECTOR * v, _mm512_add_ps(sums[0][0], sums[0][1]));
        _mm512_storeu_ps(z + VECTOR * (v + 1), _mm512_add_ps(sums[1][0], sums[1][1]));
    }
}

/* 8 rows at a time: at each step, two vectors become one with the upper half of their lanes added to the lower. */
TARGET static void fold(const Lanes *sums, float *z) {
    __m512 v[8];
    for (int i = 0; i < 8; i++)
        v[i] = (__m512)sums[i].part[0];
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    __m512 pairs = _mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0x44), _mm512_shuffle_ps(v[0], v[1], 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(pairs, pairs, 0x88), _mm512_shuffle_ps(pairs, pairs, 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
    _mm256_storeu_ps(z, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all)));
}

const Backend stompp_avx512 = {"avx512", sign_row, cut_row, sign_plane, make_panel, product, one_row, finish, sign_bytes, add_row, real_product, 4,
                               lane_rows, unpack_row, sign_columns, select_row, score_row};
#endif
