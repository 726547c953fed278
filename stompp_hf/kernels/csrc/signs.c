/* Signs of latent weights as bits, and of inputs as bytes: what a frozen layer in training needs of them. */
#include "kernels.h"

#include <string.h>

#define WORDS 256 /* words that are held at a time */

typedef struct {
    const Backend *backend;
    const float *w;
    uint8_t *bits;
    int64_t rows, count;
} Packing;

static void pack_row(void *context, int64_t row, int slot) {
    const Packing *self = context;
    uint32_t words[WORDS];
    int64_t bytes = (self->count + 7) / 8;
    (void)slot;
    for (int64_t first = 0; first < self->count; first += 32 * WORDS) {
        int64_t here = smaller(32 * WORDS, self->count - first);
        self->backend->sign_row(self->w + row * self->count + first, FLOAT32, NULL, here, words);
        memcpy(self->bits + row * bytes + first / 8, words, (size_t)((here + 7) / 8));
    }
}

/* Columns: `index` counts pieces of WORDS of them. */
static void pack_columns(void *context, int64_t index, int slot) {
    const Packing *self = context;
    uint32_t words[WORDS];
    int64_t bytes = (self->count + 7) / 8, first = index * WORDS, here = smaller(WORDS, self->rows - first);
    (void)slot;
    for (int64_t k = 0; k < self->count; k += 32) {
        int64_t deep = smaller(32, self->count - k);
        self->backend->sign_plane(self->w + k * self->rows + first, FLOAT32, self->rows, NULL, deep, here, words);
        for (int64_t i = 0; i < here; i++)
            memcpy(self->bits + (first + i) * bytes + k / 8, &words[i], (size_t)((deep + 7) / 8));
    }
}

/* Bits of sign(w), `rows` rows of (count + 7) / 8 bytes, from w (rows, count), or from (count, rows) if transposed. */
EXPORT void stompp_pack(const float *w, int64_t rows, int64_t count, int transposed, uint8_t *bits, int threads) {
    Packing self = {stompp_backend(), w, bits, rows, count};
    threads = stompp_threads_for(32.0 * (double)rows * (double)count, threads);
    stompp_run(transposed ? pack_columns : pack_row, &self, transposed ? (rows + WORDS - 1) / WORDS : rows, threads);
}
