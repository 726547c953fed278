/* Real inputs and binary weights: weights as floats for another product, sums by look-up for a few rows, and sums in
 * the order of another product. */
#include "kernels.h"

#include <string.h>

/* -1 and 1 for the first `count` bits of each of `rows` rows. */
EXPORT void stompp_unpack(const uint8_t *bits, int64_t rows, int64_t count, float *signs) {
    const Backend *backend = stompp_backend();
    int64_t bytes = (count + 7) / 8;
    for (int64_t row = 0; row < rows; row++, bits += bytes, signs += count)
        backend->unpack_row(bits, count, signs);
}

typedef struct {
    const Backend *backend;
    const uint8_t *bits;
    const float *scale, *shift;
    int64_t scale_step, shift_step, M, K, N, words;
    float *y, *tables;
    uint32_t *panels;
    const float *x;
} Real;

#define TABLE_ROWS 32 /* rows whose tables are held at a time */

/* The sums of every few numbers of a word with all their signs, 2^bits of them; numbers behind the last are 0. */
static void make_tables(const float *x, int64_t K, int64_t words, int bits, float *tables) {
    static const float signs[4][16] = {{-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
                                       {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
                                       {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
                                       {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1}};
    for (int64_t word = 0; word < words; word++)
        for (int64_t at = 0; at < 32; at += bits, tables += 1 << bits) {
            float own[4] = {0, 0, 0, 0};
            for (int64_t j = 0; j < smaller(bits, 32 - at); j++)
                own[j] = 32 * word + at + j < K ? x[32 * word + at + j] : 0.0f;
            for (int first = 0; first < 1 << bits; first += 8)
                for (int entry = first; entry < first + 8; entry++)
                    tables[entry] = (own[0] * signs[0][entry] + own[1] * signs[1][entry]) +
                                    (own[2] * signs[2][entry] + own[3] * signs[3][entry]);
        }
}

/* Numbers in the tables of a word. */
static int64_t table_size(int bits) { return ((32 + bits - 1) / bits) << bits; }

static void finish(const Real *self, const float *z, int64_t first, int64_t lanes, float *y) {
    for (int64_t lane = 0; lane < lanes; lane++) {
        y[lane] = z[lane] * self->scale[(first + lane) * self->scale_step];
        if (self->shift)
            y[lane] += self->shift[(first + lane) * self->shift_step];
    }
}

static void look_up(void *context, int64_t index, int slot) {
    const Real *self = context;
    int64_t first = index * LANES, lanes = smaller(LANES, self->N - first), bytes = (self->K + 7) / 8;
    int64_t tables = self->words * table_size(self->backend->real_bits);
    uint32_t *panel = self->panels + slot * self->words * LANES;
    float z[LANES];
    self->backend->make_panel(self->bits + first * bytes, bytes, lanes, self->words, panel);
    for (int64_t m = 0; m < self->M; m++) {
        float *y = self->y + m * self->N + first;
        self->backend->real_product(self->tables + m * tables, panel, (lanes + 31) / 32 * 2, self->words, z);
        finish(self, z, first, lanes, y);
    }
}

/* Whether stompp_real_linear can be called. */
EXPORT int stompp_has_real(void) { return stompp_backend()->real_product != 0; }

/* y = scale * (x . sign(w)) + shift, as stompp_linear, in float32; sums are not in torch's order. */
EXPORT int stompp_real_linear(const float *x, const uint8_t *bits, const float *scale, int64_t scale_step,
                              const float *shift, int64_t shift_step, float *y, int64_t M, int64_t K, int64_t N,
                              int threads) {
    Real self = {stompp_backend(), bits, scale, shift, scale_step, shift_step, 0, K, N, words_of(K), 0, 0, 0, x};
    threads = stompp_threads_for(8.0 * (double)M * (double)K * (double)N, threads);
    int at_once = self.backend->real_bits;
    int64_t of_row = self.words * table_size(at_once), tables = (smaller(M, TABLE_ROWS) * of_row + 15) / 16 * 16;
    self.tables = stompp_allocate((tables + threads * self.words * LANES) * 4);
    if (!self.tables)
        return NO_MEMORY;
    self.panels = (uint32_t *)(self.tables + tables);
    for (int64_t first = 0; first < M; first += TABLE_ROWS) {
        self.M = smaller(TABLE_ROWS, M - first);
        self.y = y + first * N;
        for (int64_t m = 0; m < self.M; m++)
            make_tables(x + (first + m) * K, K, self.words, at_once, self.tables + m * of_row);
        stompp_run(look_up, &self, (N + LANES - 1) / LANES, threads);
    }
    stompp_release(self.tables);
    return DONE;
}

static void sum_in_lanes(void *context, int64_t index, int slot) {
    const Real *self = context;
    int64_t first = index * LANES, lanes = smaller(LANES, self->N - first);
    float z[LANES];
    (void)slot;
    for (int64_t m = 0; m < self->M; m++) {
        self->backend->lane_rows(self->x + m * self->K, self->K, self->bits + first * ((self->K + 7) / 8), lanes, z);
        finish(self, z, first, lanes, self->y + m * self->N + first);
    }
}

/* The same with sums in the order of `lane_rows`, which is MKL's for a matrix and a vector. */
EXPORT int stompp_lane_linear(const float *x, const uint8_t *bits, const float *scale, int64_t scale_step,
                              const float *shift, int64_t shift_step, float *y, int64_t M, int64_t K, int64_t N,
                              int threads) {
    Real self = {.backend = stompp_backend(), .bits = bits, .scale = scale, .shift = shift, .scale_step = scale_step,
                 .shift_step = shift_step, .M = M, .K = K, .N = N, .x = x, .y = y};
    stompp_run(sum_in_lanes, &self, (N + LANES - 1) / LANES,
               stompp_threads_for(8.0 * (double)M * (double)K * (double)N, threads));
    return DONE;
}
