/* The two products inside attention, of operands that are both made binary here: q k^T, and p v with p in {0, 2}.
 *
 * Rows are queries, one head after another for all heads that share a key head: they share its panels.
 */
#include "kernels.h"

#include <string.h>

#define WORDS_A_PIECE 8 /* of keys whose values are one piece of work */
#define PRODUCTS_A_SIGN 32 /* that take as long as making it */

typedef struct {
    const Backend *backend;
    AttentionProduct product;
    int64_t words, panels, rows, blocks; /* of one key head: words of a row, panels, rows, and blocks of rows */
    int64_t pieces;                      /* that its panels are made in */
    uint32_t *made, *scratch;            /* all panels; what a slot works with */
    int64_t share;                       /* of a slot, in words */
} Job;

/* Where a row begins, of row `row` of key head `head`, both counted over all. */
static int64_t place(const Job *self, const int64_t strides[4], int64_t head, int64_t row) {
    const AttentionProduct *own = &self->product;
    return head / own->heads * strides[0] + head % own->heads * strides[1] + row / own->queries * strides[2] +
           row % own->queries * strides[3];
}

/* Its head, without the batch. */
static int64_t head_of(const Job *self, int64_t head, int64_t row) {
    return head % self->product.heads * self->product.groups + row / self->product.queries;
}

static uint32_t *panel_of(const Job *self, int64_t head, int64_t panel) {
    return self->made + (head * self->panels + panel) * self->words * LANES;
}

static const uint8_t *excluded_in(const Job *self, int64_t head, int64_t row) {
    const AttentionProduct *own = &self->product;
    return own->excluded ? own->excluded + place(self, own->excluded_strides, head, row) : 0;
}

/* ---- q k^T: lanes are keys ---- */

static void key_panel(void *context, int64_t index, int slot) {
    const Job *self = context;
    const AttentionProduct *own = &self->product;
    int64_t head = index / self->panels, first = index % self->panels * LANES;
    uint32_t *panel = panel_of(self, head, index % self->panels), *words = self->scratch + slot * self->share;
    const float *threshold = own->right_threshold ? own->right_threshold + head % own->heads * own->size : 0;
    if (own->keys - first < LANES)
        memset(panel, 0, (size_t)(self->words * LANES) * 4);
    for (int64_t lane = 0, lanes = smaller(LANES, own->keys - first); lane < lanes; lane++) {
        const float *key = own->right + head / own->heads * own->right_strides[0] +
                           head % own->heads * own->right_strides[1] + (first + lane) * own->right_strides[3];
        self->backend->sign_row(key, FLOAT32, threshold, own->size, words);
        for (int64_t word = 0; word < self->words; word++)
            panel[word * LANES + lane] = words[word];
    }
}

static void score_block(void *context, int64_t index, int slot) {
    const Job *self = context;
    const AttentionProduct *own = &self->product;
    const Backend *backend = self->backend;
    int64_t head = index / self->blocks, from = index % self->blocks * ROW_BLOCK;
    int64_t rows = smaller(ROW_BLOCK, self->rows - from);
    uint32_t *signs = self->scratch + slot * self->share, *spare = signs + ROW_BLOCK * self->words;
    int32_t z[ROW_BLOCK * LANES] __attribute__((aligned(64)));
    for (int64_t r = 0; r < rows; r++) {
        const float *b = own->left_threshold;
        backend->sign_row(own->left + place(self, own->left_strides, head, from + r), FLOAT32,
                          b ? b + head_of(self, head, from + r) * own->size : 0, own->size, signs + r * self->words);
    }
    for (int64_t panel = 0; panel < self->panels; panel++) {
        int64_t first = panel * LANES, lanes = smaller(LANES, own->keys - first);
        backend->product(signs, self->words, rows, panel_of(self, head, panel), LANES, (lanes + VECTOR - 1) / VECTOR,
                         self->words, (int32_t)own->size, z, spare);
        for (int64_t r = 0; r < rows; r++) {
            const float *added[2] = {0, 0};
            const uint8_t *excluded = excluded_in(self, head, from + r);
            for (int i = 0; i < 2; i++)
                if (own->added[i])
                    added[i] = own->added[i] + place(self, own->added_strides[i], head, from + r) + first;
            backend->score_row(z + r * LANES, own->scale[head_of(self, head, from + r)], own->scaling, added,
                               excluded ? excluded + first : 0, lanes,
                               own->y + place(self, own->y_strides, head, from + r) + first);
        }
    }
}

/* ---- p v: lanes are features of values, and bits are keys ---- */

static void value_panels(void *context, int64_t index, int slot) {
    const Job *self = context;
    const AttentionProduct *own = &self->product;
    int64_t head = index / self->pieces, from = index % self->pieces * WORDS_A_PIECE;
    const float *value = own->right + head / own->heads * own->right_strides[0] +
                         head % own->heads * own->right_strides[1];
    const float *threshold = own->right_threshold ? own->right_threshold + head % own->heads * own->size : 0;
    (void)slot;
    for (int64_t panel = 0; panel < self->panels; panel++)
        for (int64_t word = from; word < smaller(from + WORDS_A_PIECE, self->words); word++) {
            int64_t first = panel * LANES, lanes = smaller(LANES, own->size - first);
            uint32_t *to = panel_of(self, head, panel) + word * LANES;
            self->backend->sign_columns(value + 32 * word * own->right_strides[3] + first, own->right_strides[3],
                                        threshold ? threshold + first : 0, smaller(32, own->keys - 32 * word), lanes,
                                        to);
            memset(to + lanes, 0, (size_t)(LANES - lanes) * 4);
        }
}

/* A row selects n keys, and a lane has v values of +1, m of them at these keys: d = n + v - 2 m bits differ, and the sum
 * over these keys is 2 m - n = v - d. A row that selects none, the last one here, differs in v bits. */
static void value_block(void *context, int64_t index, int slot) {
    const Job *self = context;
    const AttentionProduct *own = &self->product;
    const Backend *backend = self->backend;
    int64_t head = index / self->blocks, from = index % self->blocks * (ROW_BLOCK - 1);
    int64_t rows = smaller(ROW_BLOCK - 1, self->rows - from);
    uint32_t *bits = self->scratch + slot * self->share, *spare = bits + ROW_BLOCK * self->words;
    int32_t z[ROW_BLOCK * LANES] __attribute__((aligned(64)));
    const int32_t *nothing = z + rows * LANES;
    for (int64_t r = 0; r < rows; r++) {
        float least = own->left_threshold[head_of(self, head, from + r)];
        backend->select_row(own->left + place(self, own->left_strides, head, from + r),
                            least < own->least ? own->least : least, excluded_in(self, head, from + r), own->keys,
                            bits + r * self->words);
    }
    memset(bits + rows * self->words, 0, (size_t)self->words * 4);
    for (int64_t panel = 0; panel < self->panels; panel++) {
        int64_t first = panel * LANES, lanes = smaller(LANES, own->size - first);
        backend->product(bits, self->words, rows + 1, panel_of(self, head, panel), LANES,
                         (lanes + VECTOR - 1) / VECTOR, self->words, 0, z, spare);
        for (int64_t r = 0; r < rows; r++) {
            float scale = own->scale[head_of(self, head, from + r)];
            float *y = own->y + place(self, own->y_strides, head, from + r) + first;
            for (int64_t lane = 0; lane < lanes; lane++)
                z[r * LANES + lane] -= nothing[lane];
            backend->finish(z + r * LANES, &scale, 0, 0, 0, lanes, y, FLOAT32);
        }
    }
}

/* ---- both ---- */

static int run(Job *self, int64_t inner, int64_t lanes, int64_t rows_a_block, Task panel, Task block, int threads) {
    const AttentionProduct *own = &self->product;
    int64_t heads = own->batch * own->heads;
    self->backend = stompp_backend();
    self->words = words_of(inner);
    self->panels = (lanes + LANES - 1) / LANES;
    self->rows = own->groups * own->queries;
    self->blocks = (self->rows + rows_a_block - 1) / rows_a_block;
    self->share = (ROW_BLOCK + LANES) * self->words;
    double signs = (double)heads * (double)own->keys * (double)(own->size + self->rows);
    double products = (double)heads * (double)own->keys * (double)own->size * (double)self->rows;
    threads = stompp_threads_for(products + PRODUCTS_A_SIGN * signs, threads);
    int64_t size = heads * self->panels * self->words * LANES;
    self->made = stompp_allocate((size + threads * self->share) * 4);
    if (!self->made)
        return NO_MEMORY;
    self->scratch = self->made + size;
    stompp_run(panel, self, heads * self->pieces, threads);
    stompp_run(block, self, heads * self->blocks, threads);
    stompp_release(self->made);
    return DONE;
}

/* y = scale * (sign(q - b) . sign(k - c)) * scaling, + what is added, lowest where excluded; see AttentionProduct. */
EXPORT int stompp_attention_scores(const AttentionProduct *product, int threads) {
    Job self = {.product = *product, .pieces = (product->keys + LANES - 1) / LANES};
    return run(&self, product->size, product->keys, ROW_BLOCK, key_panel, score_block, threads);
}

/* y = scale * (2 [p >= b] . sign(v - c)), without p < least and what is excluded. */
EXPORT int stompp_attention_values(const AttentionProduct *product, int threads) {
    Job self = {.product = *product, .pieces = (words_of(product->keys) + WORDS_A_PIECE - 1) / WORDS_A_PIECE};
    return run(&self, product->keys, product->size, ROW_BLOCK - 1, value_panels, value_block, threads);
}
