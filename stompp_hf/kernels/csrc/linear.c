/* y = scale * (sign(x - b) . sign(w)) + shift of a linear layer. */
#include "kernels.h"

#include <string.h>

#define SIGN_ROWS 8 /* rows whose signs are one piece of work */
#define FEW_ROWS 2  /* a panel is not worth its making for them */

typedef struct {
    const Backend *backend;
    const char *x;
    int x_dtype, y_dtype;
    const float *threshold, *scale, *shift;
    int64_t scale_step, shift_step;
    const uint8_t *bits;
    char *y;
    int64_t M, K, N, words, row_blocks, rows_a_block;
    int by_rows; /* one after another, and no panels */
    uint32_t *signs, *panels;
} Linear;

static void signs(void *context, int64_t index, int slot) {
    const Linear *self = context;
    (void)slot;
    for (int64_t m = index * SIGN_ROWS, last = smaller(m + SIGN_ROWS, self->M); m < last; m++) {
        const char *row = self->x + m * self->K * size_of(self->x_dtype);
        uint32_t *words = self->signs + m * self->words;
        if (self->x_dtype == TWO_CUTS)
            self->backend->cut_row((const float *)row, self->threshold, self->threshold + self->K, self->K, words);
        else
            self->backend->sign_row(row, self->x_dtype, self->threshold, self->K, words);
    }
}

/* Asks for the lines of y that a block of sums will be written to: while sums are made, there is time to wait. */
static void fetch_output(const Linear *self, int64_t m, int64_t rows, int64_t first, int64_t lanes) {
    int64_t size = size_of(self->y_dtype);
    for (int64_t row = 0; row < rows; row++) {
        const char *to = self->y + ((m + row) * self->N + first) * size;
        for (int64_t at = 0; at < lanes * size; at += 64)
            __builtin_prefetch(to + at, 1, 2);
    }
}

static void products(void *context, int64_t index, int slot) {
    const Linear *self = context;
    const Backend *backend = self->backend;
    int64_t first = index / self->row_blocks * LANES, lanes = smaller(LANES, self->N - first);
    int64_t from = index % self->row_blocks * self->rows_a_block, to = smaller(from + self->rows_a_block, self->M);
    int64_t bytes = (self->K + 7) / 8, words = self->words;
    uint32_t *panel = self->panels + slot * 2 * words * LANES, *spare = panel + words * LANES;
    int32_t z[ROW_BLOCK * LANES] __attribute__((aligned(64)));
    int by_rows = self->by_rows;
    if (!by_rows)
        backend->make_panel(self->bits + first * bytes, bytes, lanes, words, panel);
    for (int64_t m = from; m < to; m += ROW_BLOCK) {
        int64_t rows = smaller(ROW_BLOCK, to - m);
        if (!by_rows)
            fetch_output(self, m, rows, first, lanes);
        if (!by_rows)
            backend->product(self->signs + m * words, words, rows, panel, LANES, (lanes + VECTOR - 1) / VECTOR, words,
                             (int32_t)self->K, z, spare);
        for (int64_t row = 0; by_rows && row < rows; row++)
            backend->one_row(self->signs + (m + row) * words, self->bits + first * bytes, bytes, lanes,
                             (int32_t)self->K, z + row * LANES);
        for (int64_t row = 0; row < rows; row++)
            backend->finish(z + row * LANES, self->scale ? self->scale + first * self->scale_step : 0,
                            self->scale_step, self->shift ? self->shift + first * self->shift_step : 0,
                            self->shift_step, lanes,
                            self->y + ((m + row) * self->N + first) * size_of(self->y_dtype), self->y_dtype);
    }
}

/* x (M, K), y (M, N), contiguous; bits: N rows of (K + 7) / 8 bytes; threshold (K,) or NULL, and (2, K) with TWO_CUTS;
 * scale and shift NULL, or with steps of 1 (N,) or 0 (1,). */
EXPORT int stompp_linear(const void *x, int x_dtype, const float *threshold, const uint8_t *bits, const float *scale,
                         int64_t scale_step, const float *shift, int64_t shift_step, void *y, int y_dtype, int64_t M,
                         int64_t K, int64_t N, int threads) {
    Linear self = {stompp_backend(), x, x_dtype, y_dtype, threshold, scale, shift, scale_step, shift_step, bits, y,
                   M, K, N, words_of(K), 1, M, 0, 0, 0};
    int64_t panels = (N + LANES - 1) / LANES;
    threads = stompp_threads_for((double)M * (double)K * (double)N, threads);
    if (panels < 2 * threads && M > ROW_BLOCK) {
        self.row_blocks = smaller((2 * threads + panels - 1) / panels, (M + ROW_BLOCK - 1) / ROW_BLOCK);
        self.rows_a_block = (M + self.row_blocks - 1) / self.row_blocks;
        self.row_blocks = (M + self.rows_a_block - 1) / self.rows_a_block;
    }
    self.by_rows = M <= FEW_ROWS && self.backend->one_row;
    int64_t signs_size = (M * self.words + 15) / 16 * 16;
    int64_t panels_size = self.by_rows ? 0 : threads * 2 * self.words * LANES;
    self.signs = stompp_allocate((signs_size + panels_size) * 4);
    if (!self.signs)
        return NO_MEMORY;
    self.panels = self.signs + signs_size;
    stompp_run(signs, &self, (M + SIGN_ROWS - 1) / SIGN_ROWS, threads);
    stompp_run(products, &self, panels * self.row_blocks, threads);
    stompp_release(self.signs);
    return DONE;
}

/* The inner loop alone, on operands that stay in the first cache: how many products of signs `rounds` of it are. */
EXPORT int64_t stompp_inner_loop(int64_t rounds) {
    int64_t words = 32, size = (ROW_BLOCK + 2 * LANES) * words;
    uint32_t *rows = stompp_allocate((size + ROW_BLOCK * LANES) * 4);
    if (!rows)
        return 0;
    memset(rows, 0x5a, (size_t)size * 4);
    uint32_t *panel = rows + ROW_BLOCK * words, *spare = panel + words * LANES;
    int32_t *z = (int32_t *)(rows + size);
    for (int64_t round = 0; round < rounds; round++)
        stompp_backend()->product(rows, words, ROW_BLOCK, panel, LANES, LANES / VECTOR, words, (int32_t)(32 * words), z,
                                  spare);
    stompp_release(rows);
    return rounds * ROW_BLOCK * LANES * 32 * words;
}
