/* AVX2: a look-up by nibbles. For 4 bits of a row, a table holds how many of them differ from each of the 16 values
 * that 4 bits of a lane can have; one shuffle looks up 32 lanes. */
#include "kernels.h"

#ifdef STOMPP_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define OWN_HALVES
#define BYTES 32
#define ROWS_AT_ONCE 4

TARGET static void halves_to_floats(const uint16_t *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < count; i++)
        to[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[i])));
}

TARGET static void floats_to_halves(const float *from, int64_t count, uint16_t *to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < count; i++)
        to[i] = (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(from[i]), _MM_FROUND_TO_NEAREST_INT));
}

TARGET static inline uint32_t signs_of_32(const float *x, const float *b) {
    const __m256 minus_zero = _mm256_set1_ps(-0.0f);
    uint32_t negative = 0;
    for (int i = 0; i < 4; i++) {
        __m256 under = minus_zero;
        if (b) /* -(0 - b) */
            under = _mm256_xor_ps(minus_zero, _mm256_sub_ps(_mm256_setzero_ps(), _mm256_loadu_ps(b + 8 * i)));
        negative |= (uint32_t)_mm256_movemask_ps(_mm256_sub_ps(_mm256_loadu_ps(x + 8 * i), under)) << (8 * i);
    }
    return ~negative;
}

TARGET static inline uint32_t cuts_of_32(const float *x, const float *high, const float *low) {
    uint32_t negative = 0;
    for (int i = 0; i < 32; i += 8) {
        __m256 numbers = _mm256_loadu_ps(x + i), above = _mm256_sub_ps(numbers, _mm256_loadu_ps(high + i));
        __m256 both = _mm256_and_ps(above, _mm256_sub_ps(_mm256_loadu_ps(low + i), numbers));
        negative |= (uint32_t)_mm256_movemask_ps(both) << i;
    }
    return ~negative;
}

TARGET static inline uint32_t at_least_32(const float *x, float least) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i += 8)
        bits |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(least), _CMP_GE_OQ))
                << i;
    return bits;
}

#include "common.inc"
#include "attention.inc"

/* 8 rows of 8 words become 8 words of 8 lanes. */
TARGET static inline void transpose(__m256i v[8]) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            v[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++)
        v[i] = t[i];
}

TARGET static void make_panel(const uint8_t *bits, int64_t bytes, int64_t lanes, int64_t words, uint32_t *panel) {
    int64_t whole = bytes / 32 * 8; /* words that can be read 8 at a time */
    for (int64_t word = 0; word < whole; word += 8)
        for (int64_t lane = 0; lane < LANES; lane += 8) {
            __m256i v[8];
            for (int i = 0; i < 8; i++)
                v[i] = lane + i < lanes ? _mm256_loadu_si256((const __m256i *)(bits + (lane + i) * bytes + 4 * word))
                                        : _mm256_setzero_si256();
            transpose(v);
            for (int i = 0; i < 8; i++)
                _mm256_store_si256((__m256i *)(panel + (word + i) * LANES + lane), v[i]);
        }
    panel_rest(bits, bytes, lanes, whole, words, panel);
}

/* Each word of 32 lanes becomes 4 vectors, vector i with byte i of every lane. */
TARGET static void split_bytes(const uint32_t *panel, int64_t panel_stride, int64_t words, int64_t vectors,
                               __m256i *split) {
    const __m256i by_place = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t word = 0; word < words; word++, panel += panel_stride)
        for (int64_t half = 0; half < 2; half++, split += 4) {
            __m256i v[4];
            for (int i = 0; i < 4; i++) {
                int there = (32 * half + 8 * i) / VECTOR < vectors;
                __m256i lanes = there ? _mm256_loadu_si256((const __m256i *)(panel + 32 * half + 8 * i))
                                      : _mm256_setzero_si256();
                v[i] = _mm256_shuffle_epi8(lanes, by_place);
            }
            __m256i t0 = _mm256_unpacklo_epi32(v[0], v[1]), t1 = _mm256_unpackhi_epi32(v[0], v[1]);
            __m256i t2 = _mm256_unpacklo_epi32(v[2], v[3]), t3 = _mm256_unpackhi_epi32(v[2], v[3]);
            split[0] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(t0, t2), order);
            split[1] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(t0, t2), order);
            split[2] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(t1, t3), order);
            split[3] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(t1, t3), order);
        }
}

#define DIFFERENT(a) {OF(a, 0), OF(a, 1), OF(a, 2), OF(a, 3), OF(a, 4), OF(a, 5), OF(a, 6), OF(a, 7), OF(a, 8),        \
                      OF(a, 9), OF(a, 10), OF(a, 11), OF(a, 12), OF(a, 13), OF(a, 14), OF(a, 15)}
#define OF(a, w) (((a) ^ (w)) & 1) + ((((a) ^ (w)) >> 1) & 1) + ((((a) ^ (w)) >> 2) & 1) + (((a) ^ (w)) >> 3)
static const uint8_t different[16][16] __attribute__((aligned(64))) = {
    DIFFERENT(0), DIFFERENT(1), DIFFERENT(2),  DIFFERENT(3),  DIFFERENT(4),  DIFFERENT(5),  DIFFERENT(6),  DIFFERENT(7),
    DIFFERENT(8), DIFFERENT(9), DIFFERENT(10), DIFFERENT(11), DIFFERENT(12), DIFFERENT(13), DIFFERENT(14), DIFFERENT(15)};

#define WORDS_A_BYTE 7   /* a counter of 8 bits holds the differences of 7 words, at most 224 */
#define WORDS_A_TILE 112 /* words that a tile takes at a time: what is made of its rows stays in the first cache */
#define STAYS(v) __asm__("" : "+x"(v)) /* or gcc adds in another order, and counters leave their registers */

/* Where the tables of the nibbles of some words begin: 16 times the nibble, from the lowest on, 8 bytes a word. */
TARGET static inline void table_places(const uint32_t *words, int64_t count, uint8_t *places) {
    const __m128i high = _mm_set1_epi8((char)0xf0);
    int64_t word = 0;
    for (; word + 4 <= count; word += 4) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(words + word));
        __m128i even = _mm_and_si128(_mm_slli_epi16(bytes, 4), high), odd = _mm_and_si128(bytes, high);
        _mm_store_si128((__m128i *)(places + 8 * word), _mm_unpacklo_epi8(even, odd));
        _mm_store_si128((__m128i *)(places + 8 * word + 16), _mm_unpackhi_epi8(even, odd));
    }
    for (; word < count; word++)
        for (int nibble = 0; nibble < 8; nibble++)
            places[8 * word + nibble] = (uint8_t)((words[word] >> (4 * nibble) & 15) << 4);
}

#define TILE(R)                                                                                                        \
    TARGET static void tile_##R(const uint32_t *rows, int64_t row_stride, const __m256i *split, int64_t words,         \
                                int32_t K, int is_first, int32_t *z) {                                                 \
        const __m256i low = _mm256_set1_epi8(15);                                                                      \
        uint16_t differ[R][LANES] __attribute__((aligned(64)));                                                        \
        uint8_t places[R][8 * WORDS_A_TILE] __attribute__((aligned(64)));                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            table_places(rows + r * row_stride, words, places[r]);                                                     \
        for (int64_t first = 0; first < words; first += WORDS_A_BYTE) {                                                \
            int64_t here = smaller(WORDS_A_BYTE, words - first);                                                       \
            __m256i count[R][2];                                                                                       \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) count[r][0] = count[r][1] = _mm256_setzero_si256();    \
            const __m256i *bytes = split + 8 * first;                                                                  \
            const uint8_t *at = places[0] + 8 * first;                                                                 \
            for (int64_t word = 0; word < here; word++, bytes += 8, at += 8)                                           \
                _Pragma("GCC unroll 4") for (int byte = 0; byte < 4; byte++)                                           \
                    _Pragma("GCC unroll 2") for (int nibble = 0; nibble < 2; nibble++) {                               \
                        __m256i a = _mm256_load_si256(bytes + byte), b = _mm256_load_si256(bytes + 4 + byte);          \
                        a = _mm256_and_si256(nibble ? _mm256_srli_epi16(a, 4) : a, low);                               \
                        b = _mm256_and_si256(nibble ? _mm256_srli_epi16(b, 4) : b, low);                               \
                        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) {                                          \
                            const uint8_t *own = different[0] + at[8 * WORDS_A_TILE * r + 2 * byte + nibble];          \
                            __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)own));         \
                            count[r][0] = _mm256_add_epi8(count[r][0], _mm256_shuffle_epi8(table, a));                 \
                            count[r][1] = _mm256_add_epi8(count[r][1], _mm256_shuffle_epi8(table, b));                 \
                            STAYS(count[r][0]);                                                                        \
                            STAYS(count[r][1]);                                                                        \
                        }                                                                                              \
                    }                                                                                                  \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) for (int half = 0; half < 2; half++) {                 \
                __m256i *sum = (__m256i *)(differ[r] + 32 * half), own = count[r][half];                               \
                __m256i lower = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(own));                                     \
                __m256i upper = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(own, 1));                                \
                sum[0] = first ? _mm256_add_epi16(sum[0], lower) : lower;                                              \
                sum[1] = first ? _mm256_add_epi16(sum[1], upper) : upper;                                              \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int lane = 0; lane < LANES; lane++) {                                                                 \
                int32_t before = is_first ? K : z[r * LANES + lane];                                                   \
                z[r * LANES + lane] = before - 2 * (int32_t)differ[r][lane];                                           \
            }                                                                                                          \
    }
TILE(1) TILE(2) TILE(3) TILE(4)

#define ROWS_A_TILE 4 /* more are no faster */
typedef void (*Tile)(const uint32_t *, int64_t, const __m256i *, int64_t, int32_t, int, int32_t *);
static const Tile tiles[ROWS_A_TILE] = {tile_1, tile_2, tile_3, tile_4};

TARGET static void product(const uint32_t *rows, int64_t row_stride, int64_t count, const uint32_t *panel,
                           int64_t panel_stride, int64_t vectors, int64_t words, int32_t K, int32_t *z,
                           uint32_t *spare) {
    __m256i *split = (__m256i *)spare;
    split_bytes(panel, panel_stride, words, vectors, split);
    for (int64_t row = 0; row < count; row += ROWS_A_TILE)
        for (int64_t word = 0; word < words; word += WORDS_A_TILE)
            tiles[smaller(ROWS_A_TILE, count - row) - 1](rows + row * row_stride + word, row_stride, split + 8 * word,
                                                         smaller(WORDS_A_TILE, words - word), K, word == 0,
                                                         z + row * LANES);
}

#define VECTORS_A_BYTE 31 /* a counter of 8 bits holds the differences of as many vectors, 8 of each */

__attribute__((target("avx2,popcnt"))) static inline int64_t differ_behind(const uint8_t *row, const uint8_t *bits, int64_t bytes) {
    int64_t differ = 0;
    for (int64_t word = 0; 4 * word < bytes; word++)
        differ += __builtin_popcount(word_at(row, bytes, word) ^ word_at(bits, bytes, word));
    return differ;
}

/* Bits as they lie, 4 lanes at a time. */
__attribute__((target("avx2,popcnt"))) static void one_row(const uint32_t *words, const uint8_t *bits, int64_t bytes,
                                                           int64_t lanes, int32_t K, int32_t *z) {
    const __m256i ones = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)different[0]));
    const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const uint8_t *row = (const uint8_t *)words;
    for (int64_t lane = 0; lane < lanes; lane += 4) {
        const uint8_t *own[4];
        __m256i differ[4];
        int64_t at = 0, whole = bytes / 32 * 32;
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
            own[i] = bits + smaller(lane + i, lanes - 1) * bytes;
            differ[i] = zero;
        }
        while (at < whole) {
            __m256i count[4] = {zero, zero, zero, zero};
            for (int64_t last = smaller(whole, at + 32 * VECTORS_A_BYTE); at < last; at += 32) {
                __m256i x = _mm256_loadu_si256((const __m256i *)(row + at));
                _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
                    __m256i a = _mm256_xor_si256(x, _mm256_loadu_si256((const __m256i *)(own[i] + at)));
                    __m256i b = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
                    a = _mm256_shuffle_epi8(ones, _mm256_and_si256(a, low));
                    count[i] = _mm256_add_epi8(count[i], _mm256_add_epi8(a, _mm256_shuffle_epi8(ones, b)));
                    STAYS(count[i]);
                }
            }
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
                differ[i] = _mm256_add_epi64(differ[i], _mm256_sad_epu8(count[i], zero));
        }
        __m256i a = _mm256_add_epi64(_mm256_unpacklo_epi64(differ[0], differ[1]),
                                     _mm256_unpackhi_epi64(differ[0], differ[1]));
        __m256i b = _mm256_add_epi64(_mm256_unpacklo_epi64(differ[2], differ[3]),
                                     _mm256_unpackhi_epi64(differ[2], differ[3]));
        a = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
        __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        if (whole < bytes)
            sums = _mm_add_epi32(sums, _mm_setr_epi32((int)differ_behind(row + whole, own[0] + whole, bytes - whole),
                                                      (int)differ_behind(row + whole, own[1] + whole, bytes - whole),
                                                      (int)differ_behind(row + whole, own[2] + whole, bytes - whole),
                                                      (int)differ_behind(row + whole, own[3] + whole, bytes - whole)));
        _mm_storeu_si128((__m128i *)(z + lane), _mm_sub_epi32(_mm_set1_epi32(K), _mm_slli_epi32(sums, 1)));
    }
}

/* Every 3 bits of a lane look up their sum, the last 2 of a word theirs. */
TARGET static void real_product(const float *tables, const uint32_t *panel, int64_t vectors, int64_t words, float *z) {
    for (int64_t first = 0; first < vectors * VECTOR; first += 32) {
        const float *table = tables;
        __m256 sums[4];
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_setzero_ps();
        for (int64_t word = 0; word < words; word++) {
            __m256i lanes[4];
            for (int i = 0; i < 4; i++)
                lanes[i] = _mm256_loadu_si256((const __m256i *)(panel + word * LANES + first + 8 * i));
            _Pragma("GCC unroll 11") for (int at = 0; at < 32; at += 3, table += 8) {
                __m256 own = _mm256_loadu_ps(table);
                _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
                    sums[i] = _mm256_add_ps(sums[i], _mm256_permutevar8x32_ps(own, lanes[i]));
                    lanes[i] = _mm256_srli_epi32(lanes[i], 3);
                }
            }
        }
        for (int i = 0; i < 4; i++)
            _mm256_storeu_ps(z + first + 8 * i, sums[i]);
    }
}

const Backend stompp_avx2 = {"avx2", sign_row, cut_row, sign_plane, make_panel, product, one_row, finish, sign_bytes, add_row, real_product, 3,
                             lane_rows, unpack_row, sign_columns, select_row, score_row};
#endif
