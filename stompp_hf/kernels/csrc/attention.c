/* The two products inside attention, whose operands are real and made binary here: q k^T, and p v with p in {0, 2}.
 *
 * A group is one key head of one sample, with the panels of its keys and values. Its rows are the queries of all heads
 * that share it, one head after another. Blocks of rows, counted over all groups, are the pieces of work: a caller asks
 * for some of them, makes probabilities of their scores, and so never holds all scores at once.
 */
#include "kernels.h"

#include <string.h>

#define KEYS_A_PIECE 256   /* whose panels are one piece of work */
#define PRODUCTS_A_SIGN 32 /* that take as long as making it */

typedef struct {
    const Attention *own;
    const Backend *backend;
    int64_t rows, blocks; /* of a group */
    int64_t first;        /* block */
    float *numbers;       /* scores or probabilities, from the first row of this block on */
    uint32_t *scratch;
    int64_t share; /* of a thread */
} Job;

static int64_t panels_of(int64_t lanes) { return (lanes + LANES - 1) / LANES; }

/* Words of the panels of one group: its keys', and then its values', each with the number of +1 in every lane. */
static int64_t key_words(const Attention *own) { return panels_of(own->keys) * words_of(own->size) * LANES; }
static int64_t value_words(const Attention *own) {
    return panels_of(own->value_size) * (words_of(own->keys) + 1) * LANES;
}
static uint32_t *panels_at(const Attention *own, int64_t group) {
    return own->panels + group * (key_words(own) + value_words(own));
}

static const float *rows_at(const Attention *own, const float *x, const int64_t strides[3], int64_t group) {
    return x + group / own->groups * strides[0] + group % own->groups * strides[1];
}

/* ---- panels ---- */

static void pack_keys(const Job *self, int64_t group, int64_t first, int64_t end, uint32_t *words) {
    const Attention *own = self->own;
    const float *b = own->key_threshold ? own->key_threshold + group % own->groups * own->size : 0;
    const float *keys = rows_at(own, own->key, own->key_strides, group);
    int64_t count = words_of(own->size);
    uint32_t *panel = panels_at(own, group) + first * count;
    for (; first < end; first += LANES, panel += count * LANES) {
        int64_t lanes = smaller(LANES, end - first);
        for (int64_t lane = 0; lane < lanes; lane++) {
            self->backend->sign_row(keys + (first + lane) * own->key_strides[2], FLOAT32, b, own->size, words);
            for (int64_t word = 0; word < count; word++)
                panel[word * LANES + lane] = words[word];
        }
        for (int64_t word = 0; word < count; word++)
            memset(panel + word * LANES + lanes, 0, (size_t)(LANES - lanes) * 4);
    }
}

static void pack_values(const Job *self, int64_t group, int64_t first, int64_t end) {
    const Attention *own = self->own;
    const float *b = own->value_threshold ? own->value_threshold + group % own->groups * own->value_size : 0;
    const float *values = rows_at(own, own->value, own->value_strides, group);
    for (int64_t lane = 0; lane < own->value_size; lane += LANES) {
        uint32_t *panel = panels_at(own, group) + key_words(own) + lane * (words_of(own->keys) + 1);
        int64_t lanes = smaller(LANES, own->value_size - lane);
        for (int64_t key = first; key < end; key += 32) {
            uint32_t *words = panel + key / 32 * LANES;
            self->backend->sign_columns(values + key * own->value_strides[2] + lane, own->value_strides[2],
                                        b ? b + lane : 0, smaller(32, end - key), lanes, words);
            memset(words + lanes, 0, (size_t)(LANES - lanes) * 4);
        }
    }
}

static int64_t pieces_of(const Attention *own) { return (own->keys + KEYS_A_PIECE - 1) / KEYS_A_PIECE; }

static void pack(void *context, int64_t index, int slot) {
    const Job *self = context;
    const Attention *own = self->own;
    int64_t group = index / pieces_of(own), first = index % pieces_of(own) * KEYS_A_PIECE;
    int64_t end = smaller(first + KEYS_A_PIECE, own->keys);
    pack_keys(self, group, first, end, self->scratch + slot * self->share);
    pack_values(self, group, first, end);
}

/* A row without a bit differs from a lane in all of the lane's +1. */
static void count_values(void *context, int64_t index, int slot) {
    const Job *self = context;
    const Attention *own = self->own;
    int64_t words = words_of(own->keys), panels = panels_of(own->value_size);
    uint32_t *row = self->scratch + slot * self->share, *spare = row + ROW_BLOCK * words;
    uint32_t *panel = panels_at(own, index / panels) + key_words(own) + index % panels * (words + 1) * LANES;
    memset(row, 0, (size_t)words * 4);
    self->backend->product(row, words, 1, panel, LANES, LANES / VECTOR, words, 0, (int32_t *)(panel + words * LANES),
                           spare);
}

/* ---- blocks of rows ---- */

typedef struct {
    int64_t group, first, rows; /* of the group */
    float *numbers;
} Block;

static Block block_at(const Job *self, int64_t index) {
    int64_t block = self->first + index, first = self->first % self->blocks * ROW_BLOCK;
    Block found = {.group = block / self->blocks, .first = block % self->blocks * ROW_BLOCK};
    int64_t rows = (found.group - self->first / self->blocks) * self->rows + found.first - first;
    found.rows = smaller(ROW_BLOCK, self->rows - found.first);
    found.numbers = self->numbers + rows * self->own->keys;
    return found;
}

/* Which head a row belongs to, and where a tensor with these strides has it. */
static int64_t head_of(const Attention *own, Block block, int64_t row) {
    return block.group % own->groups * own->heads + (block.first + row) / own->queries;
}

static int64_t place(const Attention *own, const int64_t strides[4], Block block, int64_t row) {
    int64_t at = block.first + row;
    return block.group / own->groups * strides[0] + block.group % own->groups * strides[1] +
           at / own->queries * strides[2] + at % own->queries * strides[3];
}

static void score_block(void *context, int64_t index, int slot) {
    const Job *self = context;
    const Attention *own = self->own;
    Block block = block_at(self, index);
    int64_t words = words_of(own->size);
    uint32_t *signs = self->scratch + slot * self->share, *spare = signs + ROW_BLOCK * words;
    int32_t z[ROW_BLOCK * LANES] __attribute__((aligned(64)));
    for (int64_t row = 0; row < block.rows; row++) {
        const float *b = own->query_threshold ? own->query_threshold + head_of(own, block, row) * own->size : 0;
        self->backend->sign_row(own->query + place(own, own->query_strides, block, row), FLOAT32, b, own->size,
                                signs + row * words);
    }
    for (int64_t key = 0; key < own->keys; key += LANES) {
        int64_t lanes = smaller(LANES, own->keys - key);
        self->backend->product(signs, words, block.rows, panels_at(own, block.group) + key * words, LANES,
                               (lanes + VECTOR - 1) / VECTOR, words, (int32_t)own->size, z, spare);
        for (int64_t row = 0; row < block.rows; row++) {
            const float *added[2] = {0, 0};
            for (int i = 0; i < 2; i++)
                if (own->added[i])
                    added[i] = own->added[i] + place(own, own->added_strides[i], block, row) + key;
            const uint8_t *excluded =
                own->excluded ? own->excluded + place(own, own->excluded_strides, block, row) + key : 0;
            self->backend->score_row(z + row * LANES, own->score_scale[head_of(own, block, row)], own->scaling, added,
                                     excluded, lanes, block.numbers + row * own->keys + key);
        }
    }
}

/* A row selects n keys, and a lane has v values of +1, m of them at these keys: d = n + v - 2 m bits differ. The sum
 * over these keys is 2 m - n = v - d; z is -2 d, and -2 v was counted for the lane. */
static void value_block(void *context, int64_t index, int slot) {
    const Job *self = context;
    const Attention *own = self->own;
    Block block = block_at(self, index);
    int64_t words = words_of(own->keys);
    uint32_t *bits = self->scratch + slot * self->share, *spare = bits + ROW_BLOCK * words;
    int32_t z[ROW_BLOCK * LANES] __attribute__((aligned(64)));
    for (int64_t row = 0; row < block.rows; row++) {
        const uint8_t *excluded = own->excluded ? own->excluded + place(own, own->excluded_strides, block, row) : 0;
        float b = own->probability_threshold[head_of(own, block, row)];
        self->backend->select_row(block.numbers + row * own->keys, b < own->least ? own->least : b, excluded, own->keys,
                                  bits + row * words);
    }
    for (int64_t lane = 0; lane < own->value_size; lane += LANES) {
        const uint32_t *panel = panels_at(own, block.group) + key_words(own) + lane * (words + 1);
        const int32_t *ones = (const int32_t *)(panel + words * LANES);
        int64_t lanes = smaller(LANES, own->value_size - lane);
        self->backend->product(bits, words, block.rows, panel, LANES, (lanes + VECTOR - 1) / VECTOR, words, 0, z, spare);
        for (int64_t row = 0; row < block.rows; row++) {
            int64_t head = head_of(own, block, row), query = (block.first + row) % own->queries;
            int64_t sample = block.group / own->groups, heads = own->groups * own->heads;
            int32_t *sums = z + row * LANES;
            for (int64_t i = 0; i < lanes; i++)
                sums[i] -= ones[i];
            self->backend->finish(sums, own->value_scale + head, 0, 0, 0, lanes,
                                  own->y + ((sample * own->queries + query) * heads + head) * own->value_size + lane,
                                  FLOAT32);
        }
    }
}

/* ---- calls ---- */

/* Runs `count` tasks on as many threads as `work`, in products, is worth; each has room for a block of rows. */
static int run(Job *self, Task task, int64_t count, double work, int threads) {
    const Attention *own = self->own;
    int64_t words = words_of(own->keys > own->size ? own->keys : own->size);
    threads = stompp_threads_for(work, threads);
    self->share = (ROW_BLOCK + LANES) * words;
    self->scratch = stompp_allocate(threads * self->share * 4);
    if (!self->scratch)
        return NO_MEMORY;
    stompp_run(task, self, count, threads);
    stompp_release(self->scratch);
    return DONE;
}

static Job job(const Attention *own, int64_t first, float *numbers) {
    int64_t rows = own->heads * own->queries;
    return (Job){own, stompp_backend(), rows, (rows + ROW_BLOCK - 1) / ROW_BLOCK, first, numbers, 0, 0};
}

/* Bytes of the panels that are made for this. */
EXPORT int64_t stompp_attention_panels(const Attention *own) {
    return own->samples * own->groups * (key_words(own) + value_words(own)) * 4;
}

/* How many blocks of rows there are. */
EXPORT int64_t stompp_attention_blocks(const Attention *own) {
    return own->samples * own->groups * job(own, 0, 0).blocks;
}

/* How many rows come before a block. */
EXPORT int64_t stompp_attention_rows(const Attention *own, int64_t block) {
    Job self = job(own, 0, 0);
    return block / self.blocks * self.rows + block % self.blocks * ROW_BLOCK;
}

/* Makes the panels. */
EXPORT int stompp_attention_pack(const Attention *own, int threads) {
    Job self = job(own, 0, 0);
    int64_t groups = own->samples * own->groups;
    double signs = (double)groups * (double)own->keys * (double)(own->size + own->value_size);
    int status = run(&self, pack, groups * pieces_of(own), signs * PRODUCTS_A_SIGN, threads);
    double bits = (double)groups * (double)own->keys * (double)own->value_size;
    return status ? status : run(&self, count_values, groups * panels_of(own->value_size), bits, threads);
}

static double work_of(const Job *self, int64_t count, int64_t size) {
    return (double)count * ROW_BLOCK * (double)self->own->keys * (double)(size + PRODUCTS_A_SIGN);
}

/* Scores of `count` blocks from `first` on, row after row without a gap:
 * y = (sign(q - b) . sign(k - c)) * scale * scaling + added, and the lowest number where excluded. */
EXPORT int stompp_attention_scores(const Attention *own, int64_t first, int64_t count, float *scores, int threads) {
    Job self = job(own, first, scores);
    return run(&self, score_block, count, work_of(&self, count, own->size), threads);
}

/* What the probabilities of these blocks, laid out so, take of the values, into their rows of y:
 * y = (2 [p >= b] . sign(v - c)) * scale, without p < least and what is excluded. */
EXPORT int stompp_attention_values(const Attention *own, int64_t first, int64_t count, float *probabilities,
                                   int threads) {
    Job self = job(own, first, probabilities);
    return run(&self, value_block, count, work_of(&self, count, own->value_size), threads);
}
