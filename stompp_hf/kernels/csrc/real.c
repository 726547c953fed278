/* Real inputs and binary weights: weights as floats for another product, and sums by look-up for a few rows. */
#include "kernels.h"

#include <string.h>

/* -1 and 1 for the first `count` bits of each of `rows` rows. */
EXPORT void stompp_unpack(const uint8_t *bits, int64_t rows, int64_t count, float *signs) {
    static const float of_nibble[16][4] = {
        {-1, -1, -1, -1}, {1, -1, -1, -1}, {-1, 1, -1, -1}, {1, 1, -1, -1}, {-1, -1, 1, -1}, {1, -1, 1, -1},
        {-1, 1, 1, -1},   {1, 1, 1, -1},   {-1, -1, -1, 1}, {1, -1, -1, 1}, {-1, 1, -1, 1},  {1, 1, -1, 1},
        {-1, -1, 1, 1},   {1, -1, 1, 1},   {-1, 1, 1, 1},   {1, 1, 1, 1}};
    int64_t bytes = (count + 7) / 8, whole = count / 8;
    for (int64_t row = 0; row < rows; row++, bits += bytes, signs += count) {
        for (int64_t i = 0; i < whole; i++) {
            memcpy(signs + 8 * i, of_nibble[bits[i] & 15], 16);
            memcpy(signs + 8 * i + 4, of_nibble[bits[i] >> 4], 16);
        }
        for (int64_t i = 8 * whole; i < count; i++)
            signs[i] = (bits[i >> 3] >> (i & 7)) & 1 ? 1.0f : -1.0f;
    }
}

typedef struct {
    const Backend *backend;
    const uint8_t *bits;
    const float *scale, *shift;
    int64_t scale_step, shift_step, M, K, N, words;
    float *y, *tables;
    uint32_t *panels;
} Real;

#define TABLE_ROWS 32 /* rows whose tables are held at a time */

/* The 16 sums of every 4 numbers; those behind the last are 0. */
static void make_tables(const float *x, int64_t K, int64_t words, float *tables) {
    for (int64_t i = 0; i < 8 * words; i++, tables += 16) {
        float own[4];
        for (int64_t j = 0; j < 4; j++)
            own[j] = 4 * i + j < K ? x[4 * i + j] : 0.0f;
        for (int entry = 0; entry < 16; entry++)
            tables[entry] = ((entry & 1 ? own[0] : -own[0]) + (entry & 2 ? own[1] : -own[1])) +
                            ((entry & 4 ? own[2] : -own[2]) + (entry & 8 ? own[3] : -own[3]));
    }
}

static void look_up(void *context, int64_t index, int slot) {
    const Real *self = context;
    int64_t first = index * LANES, lanes = smaller(LANES, self->N - first), bytes = (self->K + 7) / 8;
    uint32_t *panel = self->panels + slot * self->words * LANES;
    float z[LANES];
    self->backend->make_panel(self->bits + first * bytes, bytes, lanes, self->words, panel);
    for (int64_t m = 0; m < self->M; m++) {
        float *y = self->y + m * self->N + first;
        self->backend->real_product(self->tables + m * self->words * 128, panel, (lanes + 31) / 32 * 2, self->words, z);
        for (int64_t lane = 0; lane < lanes; lane++) {
            y[lane] = z[lane] * self->scale[(first + lane) * self->scale_step];
            if (self->shift)
                y[lane] += self->shift[(first + lane) * self->shift_step];
        }
    }
}

/* Whether stompp_real_linear can be called. */
EXPORT int stompp_has_real(void) { return stompp_backend()->real_product != 0; }

/* y = scale * (x . sign(w)) + shift, as stompp_linear, in float32; sums are not in torch's order. */
EXPORT int stompp_real_linear(const float *x, const uint8_t *bits, const float *scale, int64_t scale_step,
                              const float *shift, int64_t shift_step, float *y, int64_t M, int64_t K, int64_t N,
                              int threads) {
    Real self = {stompp_backend(), bits, scale, shift, scale_step, shift_step, 0, K, N, words_of(K), 0, 0, 0};
    threads = stompp_threads_for(8.0 * (double)M * (double)K * (double)N, threads);
    int64_t tables = smaller(M, TABLE_ROWS) * self.words * 128;
    self.tables = stompp_allocate((tables + threads * self.words * LANES) * 4);
    if (!self.tables)
        return NO_MEMORY;
    self.panels = (uint32_t *)(self.tables + tables);
    for (int64_t first = 0; first < M; first += TABLE_ROWS) {
        self.M = smaller(TABLE_ROWS, M - first);
        self.y = y + first * N;
        for (int64_t m = 0; m < self.M; m++)
            make_tables(x + (first + m) * K, K, self.words, self.tables + m * self.words * 128);
        stompp_run(look_up, &self, (N + LANES - 1) / LANES, threads);
    }
    stompp_release(self.tables);
    return DONE;
}
