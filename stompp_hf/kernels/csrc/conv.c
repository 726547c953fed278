/* y = scale * conv(sign(x - b), sign(w)) + shift through packed im2col, for any stride, padding, dilation and groups.
 *
 * Input signs become planes of words, 32 channels a word: planes[batch][group][word][pixel]. A panel is LANES output
 * pixels: the channels of one tap after another, each from the start of a word, or, where all would fit into less than a
 * word, right behind the last: words that hold little would cost memory and time. Padding with zeros is none of two signs: it is taken for -1, and what that
 * puts in is taken out again, sum of sign(w) over the taps that lie in the padding. Those taps are the same for many
 * pixels: a border class is a set of them.
 */
#include "kernels.h"

#include <string.h>

#define PIXELS 4096 /* of a plane, one piece of work */

typedef struct {
    int64_t lane, count, at[3]; /* neighbouring output pixels of one line, from `at` */
} Run;

typedef struct {
    const Backend *backend;
    Shape shape;
    const char *x;
    int x_dtype, y_dtype;
    const float *threshold, *scale, *shift;
    int64_t scale_step, shift_step;
    const uint32_t *weights; /* outputs rows of words */
    const int32_t *tap_sums; /* [tap][output]: sum of sign(w); or NULL */
    char *y;
    int64_t group_channels, group_outputs, group_words, tap_bits, taps, words, pixels, results, pieces;
    int64_t panels, row_blocks, rows_a_block;
    int direct; /* the planes are the panels */
    uint32_t *planes, *scratch;
    int32_t *border; /* [class][output], or NULL */
    int32_t *class_of[3];
    int64_t classes[3];
} Conv;

static void plane(void *context, int64_t index, int slot) {
    const Conv *self = context;
    (void)slot;
    int64_t piece = index % self->pieces, word = index / self->pieces % self->group_words;
    int64_t group = index / self->pieces / self->group_words; /* of all images */
    int64_t first = group * self->group_channels + 32 * word, pixel = piece * PIXELS;
    int64_t channels = smaller(32, self->group_channels - 32 * word);
    self->backend->sign_plane(self->x + (first * self->pixels + pixel) * size_of(self->x_dtype), self->x_dtype,
                              self->pixels, self->threshold ? self->threshold + first % self->shape.channels : 0,
                              channels, smaller(PIXELS, self->pixels - pixel),
                              self->planes + (group * self->group_words + word) * self->pixels + pixel);
}

static int split_runs(const Conv *self, int64_t first, int64_t lanes, Run *runs) {
    const int64_t *out = self->shape.out;
    int count = 0;
    for (int64_t lane = 0; lane < lanes; count++) {
        int64_t pixel = first + lane, column = pixel % out[2];
        runs[count] = (Run){lane, smaller(lanes - lane, out[2] - column),
                            {pixel / out[2] / out[1], pixel / out[2] % out[1], column}};
        lane += runs[count].count;
    }
    return count;
}

static int64_t up(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

/* The words of one tap for one run of pixels. */
static void copy_run(const Conv *self, const uint32_t *planes, const Run *run, const int64_t tap[3], uint32_t *to) {
    const Shape *shape = &self->shape;
    int64_t at[3], stride = shape->stride[2], width = shape->in[2], from = 0, last = run->count;
    for (int d = 0; d < 3; d++)
        at[d] = run->at[d] * shape->stride[d] - shape->before[d] + tap[d] * shape->dilation[d];
    if (at[0] < 0 || at[0] >= shape->in[0] || at[1] < 0 || at[1] >= shape->in[1]) {
        last = 0;
    } else {
        from = smaller(up(-at[2], stride), last);
        last = smaller(up(width - at[2], stride), last);
    }
    int64_t line = (at[0] * shape->in[1] + at[1]) * width + at[2];
    for (int64_t word = 0; word < self->group_words; word++, to += LANES, line += self->pixels) {
        int64_t channels = self->group_channels - 32 * word;
        uint32_t pad = shape->pad != 1 ? 0 : channels < 32 ? (1u << channels) - 1 : 0xffffffffu;
        for (int64_t i = 0; i < from; i++)
            to[i] = pad;
        if (stride == 1 && last > from)
            memcpy(to + from, planes + line + from, (size_t)(last - from) * 4);
        else
            for (int64_t i = from; i < last; i++)
                to[i] = planes[line + i * stride];
        for (int64_t i = from > last ? from : last; i < run->count; i++)
            to[i] = pad;
    }
}

/* A narrow tap's words, `bits` bits of each, behind the first `at` bits of every lane. */
static void append(const uint32_t *words, int64_t bits, int64_t at, uint32_t *panel) {
    uint32_t *to = panel + at / 32 * LANES;
    int shift = (int)(at % 32);
    for (int lane = 0; lane < LANES; lane++)
        to[lane] |= words[lane] << shift;
    if (shift + bits > 32)
        for (int lane = 0; lane < LANES; lane++)
            to[LANES + lane] |= words[lane] >> (32 - shift);
}

static void fill_panel(const Conv *self, const uint32_t *planes, const Run *runs, int count, uint32_t *panel) {
    const int64_t *kernel = self->shape.kernel;
    uint32_t narrow[LANES] = {0};
    int is_narrow = self->tap_bits < 32;
    if (is_narrow)
        memset(panel, 0, (size_t)(self->words * LANES) * 4);
    for (int64_t index = 0; index < self->taps; index++) {
        int64_t tap[3] = {index / kernel[2] / kernel[1], index / kernel[2] % kernel[1], index % kernel[2]};
        uint32_t *to = is_narrow ? narrow : panel + index * self->group_words * LANES;
        for (int i = 0; i < count; i++)
            copy_run(self, planes, &runs[i], tap, to + runs[i].lane);
        if (is_narrow)
            append(narrow, self->tap_bits, index * self->tap_bits, panel);
    }
}

static void take_padding_out(const Conv *self, const Run *runs, int count, int64_t output, int64_t rows, int32_t *z) {
    for (int r = 0; r < count; r++) {
        const Run *run = &runs[r];
        int64_t line = self->class_of[0][run->at[0]] * self->classes[1] + self->class_of[1][run->at[1]];
        for (int64_t i = 0; i < run->count; i++) {
            int64_t class = line * self->classes[2] + self->class_of[2][run->at[2] + i];
            if (class == 0)
                continue;
            const int32_t *sums = self->border + class * self->shape.outputs + output;
            for (int64_t row = 0; row < rows; row++)
                z[row * LANES + run->lane + i] += sums[row];
        }
    }
}

static void products(void *context, int64_t index, int slot) {
    const Conv *self = context;
    const Backend *backend = self->backend;
    int64_t block = index % self->row_blocks, place = index / self->row_blocks;
    int64_t first = place % self->panels * LANES, group = place / self->panels, words = self->words;
    int64_t lanes = smaller(LANES, self->results - first), panel_stride = LANES;
    const uint32_t *planes = self->planes + group * self->group_words * self->pixels, *panel;
    uint32_t *own = self->scratch + slot * 2 * words * LANES, *spare = own + words * LANES;
    int32_t z[ROW_BLOCK * LANES] __attribute__((aligned(64)));
    Run runs[LANES];
    int count = 0;
    if (self->direct) {
        panel = planes + first;
        panel_stride = self->pixels;
    } else {
        count = split_runs(self, first, lanes, runs);
        fill_panel(self, planes, runs, count, own);
        panel = own;
    }
    int64_t image = group / self->shape.groups, of_group = group % self->shape.groups * self->group_outputs;
    int64_t from = block * self->rows_a_block, to = smaller(from + self->rows_a_block, self->group_outputs);
    for (int64_t n = of_group + from; n < of_group + to; n += ROW_BLOCK) {
        int64_t rows = smaller(ROW_BLOCK, of_group + to - n);
        backend->product(self->weights + n * words, words, rows, panel, panel_stride, (lanes + VECTOR - 1) / VECTOR,
                         words, (int32_t)(self->taps * self->group_channels), z, spare);
        if (self->border)
            take_padding_out(self, runs, count, n, rows, z);
        for (int64_t row = 0; row < rows; row++)
            backend->finish(z + row * LANES, self->scale ? self->scale + (n + row) * self->scale_step : 0, 0,
                            self->shift ? self->shift + (n + row) * self->shift_step : 0, 0, lanes,
                            self->y + ((image * self->shape.outputs + n + row) * self->results + first) *
                                          size_of(self->y_dtype),
                            self->y_dtype);
    }
}

/* Taps [valid[0], valid[1]) of dimension d lie inside the input for output coordinate o. */
static void valid_taps(const Shape *shape, int d, int64_t o, int64_t valid[2]) {
    int64_t at = o * shape->stride[d] - shape->before[d];
    valid[0] = smaller(up(-at, shape->dilation[d]), shape->kernel[d]);
    valid[1] = smaller(up(shape->in[d] - at, shape->dilation[d]), shape->kernel[d]);
    if (valid[1] < valid[0])
        valid[1] = valid[0];
}

/* Numbers the sets of valid taps of one dimension, 0 for all of them. */
static int64_t number_classes(const Shape *shape, int d, int32_t *class_of, int64_t (*sets)[2]) {
    int64_t count = 1;
    sets[0][0] = 0;
    sets[0][1] = shape->kernel[d];
    for (int64_t o = 0; o < shape->out[d]; o++) {
        int64_t valid[2], class = 0;
        valid_taps(shape, d, o, valid);
        while (class < count && (sets[class][0] != valid[0] || sets[class][1] != valid[1]))
            class++;
        if (class == count) {
            memcpy(sets[count], valid, sizeof(valid));
            count++;
        }
        class_of[o] = (int32_t)class;
    }
    return count;
}

/* Sums of sign(w) of one tap, for every output, of the weights themselves. */
static void sum_tap(const Conv *self, int64_t tap, int32_t *sums) {
    int64_t at = tap * self->tap_bits, count = smaller(32, self->tap_bits);
    int shift = (int)(at % 32), over = shift + count > 32;
    uint32_t mask = 0xffffffffu >> (32 - count);
    for (int64_t n = 0; n < self->shape.outputs; n++) {
        const uint32_t *own = self->weights + n * self->words + at / 32;
        uint32_t bits = (own[0] >> shift | (over ? own[1] << (32 - shift) : 0)) & mask;
        int32_t ones = __builtin_popcount(bits);
        for (int64_t word = 1; word < self->tap_bits / 32; word++)
            ones += __builtin_popcount(own[word]);
        sums[n] = 2 * ones - (int32_t)self->group_channels;
    }
}

static int make_border(Conv *self) {
    const Shape *shape = &self->shape;
    int64_t all = shape->out[0] + shape->out[1] + shape->out[2];
    int32_t *classes = stompp_allocate(all * 4 + (all + 3) * 16);
    if (!classes)
        return NO_MEMORY;
    int64_t (*sets[3])[2], total = 1;
    sets[0] = (int64_t(*)[2])(classes + (all + 1) / 2 * 2);
    for (int d = 0; d < 3; d++) {
        self->class_of[d] = d ? self->class_of[d - 1] + shape->out[d - 1] : classes;
        sets[d] = d ? sets[d - 1] + shape->out[d - 1] + 1 : sets[d];
        self->classes[d] = number_classes(shape, d, self->class_of[d], sets[d]);
        total *= self->classes[d];
    }
    self->border = stompp_allocate((total + 1) * shape->outputs * 4);
    if (!self->border)
        return NO_MEMORY;
    memset(self->border, 0, (size_t)(total * shape->outputs) * 4);
    for (int64_t tap = 0; tap < self->taps; tap++) {
        int64_t at[3] = {tap / shape->kernel[2] / shape->kernel[1], tap / shape->kernel[2] % shape->kernel[1],
                         tap % shape->kernel[2]};
        int32_t *own = self->border + total * shape->outputs;
        const int32_t *of_tap = self->tap_sums ? self->tap_sums + tap * shape->outputs : own;
        if (!self->tap_sums)
            sum_tap(self, tap, own);
        for (int64_t class = 1; class < total; class++) {
            int64_t of[3] = {class / self->classes[2] / self->classes[1], class / self->classes[2] % self->classes[1],
                             class % self->classes[2]};
            int32_t *sums = self->border + class * shape->outputs;
            int inside = 1;
            for (int d = 0; d < 3; d++)
                inside = inside && at[d] >= sets[d][of[d]][0] && at[d] < sets[d][of[d]][1];
            for (int64_t n = 0; n < shape->outputs && !inside; n++)
                sums[n] += of_tap[n];
        }
    }
    return DONE;
}

/* Where the output reaches over the input's edge. */
static int reaches_out(const Shape *shape) {
    for (int d = 0; d < 3; d++) {
        int64_t last = (shape->out[d] - 1) * shape->stride[d] + (shape->kernel[d] - 1) * shape->dilation[d];
        if (shape->before[d] > 0 || last - shape->before[d] >= shape->in[d])
            return 1;
    }
    return 0;
}

static int64_t bits_of_tap(int64_t channels) { return channels < 32 ? channels : 32 * words_of(channels); }
static int keeps_sums(int64_t channels, int64_t taps) { return channels >= 32 && taps > 1; }

/* Words of a weight whose bits are [output][channel of the group][tap]: for each output, taps of bits_of_tap bits, and
 * zeros to the end of a word. Behind them, where keeps_sums, the sum of sign(w) of each tap, [tap][output]. */
EXPORT void stompp_tap_words(const uint8_t *bits, int64_t outputs, int64_t channels, int64_t taps, uint32_t *weights) {
    int64_t tap_bits = bits_of_tap(channels), words = words_of(taps * tap_bits), bytes = (channels * taps + 7) / 8;
    int32_t *sums = keeps_sums(channels, taps) ? (int32_t *)(weights + outputs * words) : NULL;
    memset(weights, 0, (size_t)(outputs * words) * 4);
    for (int64_t n = 0; n < outputs && taps == 1; n++)
        memcpy(weights + n * words, bits + n * bytes, (size_t)bytes);
    if (taps == 1)
        return;
    for (int64_t n = 0; n < outputs; n++, bits += bytes, weights += words)
        for (int64_t tap = 0; tap < taps; tap++) {
            int32_t sum = 0;
            for (int64_t c = 0, i = tap, to = tap * tap_bits; c < channels; c++, i += taps, to++) {
                uint32_t bit = (bits[i >> 3] >> (i & 7)) & 1;
                weights[to >> 5] |= bit << (to & 31);
                sum += 2 * (int32_t)bit - 1;
            }
            if (sums)
                sums[tap * outputs + n] = sum;
        }
}

/* x (batch, channels, *in), y (batch, outputs, *out), contiguous; weights of stompp_tap_words; the rest as in
 * stompp_linear. */
EXPORT int stompp_conv(const void *x, int x_dtype, const float *threshold, const uint32_t *weights, const float *scale,
                       int64_t scale_step, const float *shift, int64_t shift_step, void *y, int y_dtype,
                       const Shape *shape, int threads) {
    Conv self = {.backend = stompp_backend(), .shape = *shape, .x = x, .x_dtype = x_dtype, .y_dtype = y_dtype,
                 .threshold = threshold, .scale = scale, .shift = shift, .scale_step = scale_step,
                 .shift_step = shift_step, .weights = weights, .y = y};
    int64_t images = shape->batch * shape->groups; /* groups of all images */
    self.group_channels = shape->channels / shape->groups;
    self.group_outputs = shape->outputs / shape->groups;
    self.group_words = words_of(self.group_channels);
    self.taps = volume(shape->kernel);
    self.tap_bits = bits_of_tap(self.group_channels);
    self.words = words_of(self.taps * self.tap_bits);
    self.tap_sums = keeps_sums(self.group_channels, self.taps) ? (const int32_t *)(weights + shape->outputs * self.words)
                                                              : NULL;
    self.pixels = volume(shape->in);
    self.results = volume(shape->out);
    self.pieces = (self.pixels + PIXELS - 1) / PIXELS;
    self.panels = (self.results + LANES - 1) / LANES;
    self.direct = self.taps == 1 && volume(shape->stride) == 1 && self.results == self.pixels && !reaches_out(shape);
    threads = stompp_threads_for((double)images * (double)self.results * (double)self.group_outputs *
                                     (double)self.taps * (double)self.group_channels, threads);
    self.row_blocks = 1;
    self.rows_a_block = self.group_outputs;
    if (images * self.panels < 2 * threads && self.group_outputs > ROW_BLOCK) {
        self.row_blocks = smaller(2 * threads, (self.group_outputs + ROW_BLOCK - 1) / ROW_BLOCK);
        self.rows_a_block = (self.group_outputs + self.row_blocks - 1) / self.row_blocks;
        self.row_blocks = (self.group_outputs + self.rows_a_block - 1) / self.rows_a_block;
    }
    int status = NO_MEMORY;
    int64_t planes = (images * self.group_words * self.pixels + LANES + 15) / 16 * 16;
    self.planes = stompp_allocate((planes + threads * 2 * self.words * LANES) * 4);
    if (self.planes && (shape->pad != 0 || !reaches_out(shape) || make_border(&self) == DONE)) {
        self.scratch = self.planes + planes;
        stompp_run(plane, &self, images * self.group_words * self.pieces, threads);
        stompp_run(products, &self, images * self.panels * self.row_blocks, threads);
        status = DONE;
    }
    stompp_release(self.planes);
    stompp_release(self.border);
    stompp_release(self.class_of[0]);
    return status;
}
