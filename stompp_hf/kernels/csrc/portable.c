/* Any CPU: plain C, which compilers turn into the vectors that every x86-64 and ARM64 has. */
#define TARGET
/* Each lane has a bit of its own to look at: not every CPU shifts each by a number of its own. */
#define FLIP(word, part) ((Words)((((Words){0} + (word)) & (Words){2, 4, 8, 16} << NUMBERS * (part)) == 0) & SIGN)
#include "kernels.h"

static inline uint32_t signs_of_32(const float *x, const float *b);
static inline uint32_t cuts_of_32(const float *x, const float *high, const float *low);
static inline uint32_t at_least_32(const float *x, float least);
#include "common.inc"
#include "attention.inc"

static inline uint32_t signs_of_32(const float *x, const float *b) { return signs_of(x, b, 32); }

static inline uint32_t cuts_of_32(const float *x, const float *high, const float *low) {
    return cuts_of(x, high, low, 32);
}

static inline uint32_t at_least_32(const float *x, float least) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++)
        bits |= (uint32_t)(x[i] >= least) << i;
    return bits;
}

static void make_panel(const uint8_t *bits, int64_t bytes, int64_t lanes, int64_t words, uint32_t *panel) {
    panel_rest(bits, bytes, lanes, 0, words, panel);
}

static inline uint32_t ones(uint32_t word) {
    word -= (word >> 1) & 0x55555555u;
    word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
    word = (word + (word >> 4)) & 0x0f0f0f0fu;
    return word + (word >> 8) + (word >> 16) + (word >> 24); /* the count is in the low byte */
}

static void product(const uint32_t *rows, int64_t row_stride, int64_t count, const uint32_t *panel,
                    int64_t panel_stride, int64_t vectors, int64_t words, int32_t K, int32_t *z, uint32_t *spare) {
    (void)spare;
    for (int64_t row = 0; row < count; row++)
        for (int64_t first = 0; first < vectors * VECTOR; first += VECTOR) {
            uint32_t differ[VECTOR] = {0};
            for (int64_t word = 0; word < words; word++) {
                const uint32_t *beside = panel + word * panel_stride + first, own = rows[row * row_stride + word];
                for (int lane = 0; lane < VECTOR; lane++)
                    differ[lane] += ones(own ^ beside[lane]) & 0xff;
            }
            for (int lane = 0; lane < VECTOR; lane++)
                z[row * LANES + first + lane] = K - 2 * (int32_t)differ[lane];
        }
}

const Backend stompp_portable = {"portable", sign_row, cut_row, sign_plane, make_panel, product, 0, finish, sign_bytes, add_row, 0, 0, lane_rows, unpack_row,
                                  sign_columns, select_row, score_row};
