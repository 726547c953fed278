/* Random shapes through every backend against the plainest sums, for sanitizers: buffers are exactly as large as they
 * have to be. Arguments: seed, rounds. Prints the number of comparisons; exits with 1 at the first difference. */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *stompp_choose(const char *limit);
int stompp_linear(const void *, int, const float *, const uint8_t *, const float *, int64_t, const float *, int64_t,
                  void *, int, int64_t, int64_t, int64_t, int);
int stompp_conv(const void *, int, const float *, const uint32_t *, const float *, int64_t, const float *, int64_t,
                void *, int, const Shape *, int);
int stompp_small_groups(const void *, int, const float *, const uint8_t *, const float *, int64_t, const float *,
                        int64_t, void *, int, const Shape *, int);
int stompp_has_real(void);
int stompp_real_linear(const float *, const uint8_t *, const float *, int64_t, const float *, int64_t, float *, int64_t,
                       int64_t, int64_t, int);
int stompp_lane_linear(const float *, const uint8_t *, const float *, int64_t, const float *, int64_t, float *, int64_t,
                       int64_t, int64_t, int);
void stompp_unpack(const uint8_t *, int64_t, int64_t, float *);
int64_t stompp_attention_panels(const Attention *);
int64_t stompp_attention_blocks(const Attention *);
int64_t stompp_attention_rows(const Attention *, int64_t);
int stompp_attention_pack(const Attention *, int);
int stompp_attention_scores(const Attention *, int64_t, int64_t, float *, int);
int stompp_attention_values(const Attention *, int64_t, int64_t, float *, int);
void stompp_tap_words(const uint8_t *, int64_t, int64_t, int64_t, uint32_t *);

static int64_t compared;

static int64_t below(int64_t n) { return rand() % n; }

static float *numbers(int64_t count) {
    float *values = malloc((size_t)count * 4);
    for (int64_t i = 0; i < count; i++) {
        float value = (float)(rand() % 2001 - 1000) / 500.0f;
        values[i] = below(8) ? value : below(2) ? 0.0f : -0.0f;
    }
    return values;
}

static uint8_t *random_bits(int64_t rows, int64_t count) {
    int64_t bytes = (count + 7) / 8;
    uint8_t *bits = malloc((size_t)(rows * bytes));
    for (int64_t i = 0; i < rows * bytes; i++) {
        int64_t last = i % bytes == bytes - 1 && count % 8;
        bits[i] = (uint8_t)(rand() & (last ? (1 << (count % 8)) - 1 : 255));
    }
    return bits;
}

static int sign_at(const uint8_t *bits, int64_t bit) { return (bits[bit >> 3] >> (bit & 7)) & 1 ? 1 : -1; }
static int sign_of(float x, float b) { return x - b >= 0.0f ? 1 : -1; }

static void same(const char *what, const float *found, const float *expected, int64_t count) {
    compared += count;
    for (int64_t i = 0; i < count; i++)
        if (found[i] != expected[i]) {
            printf("%s: entry %lld is %g, not %g\n", what, (long long)i, found[i], expected[i]);
            exit(1);
        }
}

/* Two thresholds a feature: some never, some always, some zeros of both signs. */
static float *two_cuts(int64_t count) {
    float *cuts = numbers(2 * count);
    for (int64_t i = 0; i < count; i++) {
        float high = cuts[i], low = cuts[count + i];
        cuts[i] = below(6) ? high == 0.0f ? -0.0f : high : INFINITY;
        cuts[count + i] = below(3) ? low == 0.0f ? 0.0f : low : -INFINITY;
    }
    return cuts;
}

static void cut_linear(const char *limit) {
    int64_t M = 1 + below(60), N = 1 + below(70), K = 1 + below(below(2) ? 70 : 2000);
    float *x = numbers(M * K), *cuts = two_cuts(K), *y = malloc((size_t)(M * N) * 4);
    float *expected = malloc((size_t)(M * N) * 4);
    uint8_t *bits = random_bits(N, K);
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            int64_t z = 0;
            for (int64_t k = 0; k < K; k++) {
                float u = x[m * K + k];
                z += (u >= cuts[k] || u <= cuts[K + k] ? 1 : -1) * sign_at(bits + n * ((K + 7) / 8), k);
            }
            expected[m * N + n] = (float)z;
        }
    if (stompp_linear(x, TWO_CUTS, cuts, bits, NULL, 0, NULL, 0, y, FLOAT32, M, K, N, 1 + (int)below(3)))
        exit(2);
    same(limit, y, expected, M * N);
    free(x), free(cuts), free(y), free(expected), free(bits);
}

static void linear(const char *limit) {
    int opposite = !below(3); /* every bit differs: counters are as full as they get */
    int64_t M = 1 + below(below(2) ? 2 : 20), N = 1 + below(150), K = 1 + below(opposite ? 8000 : below(8) ? 700 : 20000);
    int scaled = (int)below(2), threads = 1 + (int)below(3);
    float *x = numbers(M * K), *b = below(3) ? numbers(K) : NULL, *s = numbers(N), *t = numbers(N);
    float *y = malloc((size_t)(M * N) * 4), *expected = malloc((size_t)(M * N) * 4);
    uint8_t *bits = random_bits(N, K);
    int64_t bytes = (K + 7) / 8;
    if (opposite) {
        for (int64_t i = 0; i < M * K; i++)
            x[i] = -3.0f;
        for (int64_t i = 0; i < N * bytes; i++)
            bits[i] = (uint8_t)(i % bytes == bytes - 1 && K % 8 ? (1 << (K % 8)) - 1 : 255);
    }
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            int64_t z = 0;
            for (int64_t k = 0; k < K; k++)
                z += sign_of(x[m * K + k], b ? b[k] : 0.0f) * sign_at(bits + n * bytes, k);
            float scaled_z = (float)z * s[n];
            expected[m * N + n] = scaled ? scaled_z + t[n] : (float)z;
        }
    if (stompp_linear(x, FLOAT32, b, bits, scaled ? s : NULL, 1, scaled ? t : NULL, 1, y, FLOAT32, M, K, N, threads))
        exit(2);
    same(limit, y, expected, M * N);
    free(x), free(b), free(s), free(t), free(y), free(expected), free(bits);
}

static int is_nan(uint16_t half, int dtype) { return (half & 0x7fff) > (dtype == FLOAT16 ? 0x7c00 : 0x7f80); }

/* Half precision in and out, any of its values, against the portable functions; scales of any size, infinite and NaN. */
static void halves(const char *limit) {
    int64_t M = 1 + below(4), N = 1 + below(150), K = 1 + below(200);
    int dtype = below(2) ? FLOAT16 : BFLOAT16;
    uint16_t *x = malloc((size_t)(M * K) * 2), *y = malloc((size_t)(M * N) * 2), *expected = malloc((size_t)(M * N) * 2);
    float *b = numbers(K), *s = malloc((size_t)N * 4), *t = numbers(N);
    uint8_t *bits = random_bits(N, K);
    for (int64_t i = 0; i < M * K; i++)
        x[i] = (uint16_t)(rand() >> 8);
    for (int64_t i = 0; i < N; i++) {
        uint32_t word = (uint32_t)(rand() >> 8) << 16 | (uint32_t)(rand() >> 8 & 0xffff);
        memcpy(&s[i], &word, 4);
    }
    stompp_choose("portable");
    if (stompp_linear(x, dtype, b, bits, s, 1, t, 1, expected, dtype, M, K, N, 1))
        exit(2);
    const char *name = stompp_choose(limit);
    if (stompp_linear(x, dtype, b, bits, s, 1, t, 1, y, dtype, M, K, N, 1))
        exit(2);
    compared += M * N;
    for (int64_t i = 0; i < M * N; i++)
        if (y[i] != expected[i] && !(is_nan(y[i], dtype) && is_nan(expected[i], dtype))) {
            printf("%s, half precision: entry %lld is %x, not %x\n", name, (long long)i, y[i], expected[i]);
            exit(1);
        }
    free(x), free(y), free(expected), free(b), free(s), free(t), free(bits);
}

/* Whole numbers, so that sums are exact in any order. */
static void real_linear(void) {
    int64_t M = 1 + below(70), N = 1 + below(150), K = 1 + below(300), bytes = (K + 7) / 8;
    float *x = numbers(M * K), *s = numbers(N), *t = numbers(1), *signs = malloc((size_t)(N * K) * 4);
    float *y = malloc((size_t)(M * N) * 4), *expected = malloc((size_t)(M * N) * 4);
    uint8_t *bits = random_bits(N, K);
    for (int64_t i = 0; i < M * K; i++)
        x[i] = rintf(x[i] * 500.0f);
    stompp_unpack(bits, N, K, signs);
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            float z = 0.0f;
            for (int64_t k = 0; k < K; k++) {
                z += x[m * K + k] * signs[n * K + k];
                if (signs[n * K + k] != (float)sign_at(bits + n * bytes, k))
                    exit(3);
            }
            z *= s[n];
            expected[m * N + n] = z + t[0];
        }
    if (stompp_has_real()) {
        if (stompp_real_linear(x, bits, s, 1, t, 0, y, M, K, N, 1 + (int)below(3)))
            exit(2);
        same("real inputs", y, expected, M * N);
    }
    if (stompp_lane_linear(x, bits, s, 1, t, 0, y, M, K, N, 1 + (int)below(3)))
        exit(2);
    same("real inputs in lanes", y, expected, M * N);
    free(x), free(s), free(t), free(signs), free(y), free(expected), free(bits);
}

static int64_t sum_at(const Shape *shape, const float *x, const float *b, const uint8_t *row, const int64_t image,
                      int64_t group, int64_t channels, const int64_t at[3]) {
    int64_t z = 0, bit = 0;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t u = 0; u < shape->kernel[0]; u++)
            for (int64_t v = 0; v < shape->kernel[1]; v++)
                for (int64_t w = 0; w < shape->kernel[2]; w++, bit++) {
                    int64_t tap[3] = {u, v, w}, place = image * shape->channels + group * channels + c, outside = 0;
                    for (int d = 0; d < 3; d++) {
                        int64_t i = at[d] * shape->stride[d] - shape->before[d] + tap[d] * shape->dilation[d];
                        outside |= i < 0 || i >= shape->in[d];
                        place = place * shape->in[d] + i;
                    }
                    z += (outside ? shape->pad : sign_of(x[place], b[group * channels + c])) * sign_at(row, bit);
                }
    return z;
}

static void convolution(const char *limit) {
    Shape shape = {.batch = 1 + below(2), .groups = 1 + below(3), .pad = below(3) - 1};
    int64_t channels = 1 + below(below(2) ? 6 : 70), outputs = 1 + below(below(2) ? 4 : 60);
    if (below(4) == 0)
        channels = outputs = 32; /* groups with words of their own */
    if (below(4) == 0)
        outputs += below(120); /* more rows than are held at a time */
    shape.channels = channels * shape.groups;
    shape.outputs = outputs * shape.groups;
    for (int d = 0; d < 3; d++) {
        int flat = d == 0 && below(3);
        shape.kernel[d] = flat ? 1 : 1 + below(3);
        shape.stride[d] = 1 + below(3);
        shape.dilation[d] = 1 + below(2);
        shape.before[d] = flat ? 0 : below(3);
        int64_t reach = (shape.kernel[d] - 1) * shape.dilation[d] + 1, behind = flat ? 0 : below(3);
        shape.in[d] = flat ? 1 : 1 + below(d == 2 ? 40 : 6);
        if (shape.in[d] + shape.before[d] + behind < reach)
            shape.in[d] = reach;
        shape.out[d] = (shape.in[d] + shape.before[d] + behind - reach) / shape.stride[d] + 1;
    }
    int64_t taps = volume(shape.kernel), pixels = volume(shape.out), fan_in = channels * taps;
    int64_t results = shape.batch * shape.outputs * pixels;
    float *x = numbers(shape.batch * shape.channels * volume(shape.in)), *b = numbers(shape.channels);
    float *s = numbers(1), *t = numbers(shape.outputs);
    float *y = malloc((size_t)results * 4), *expected = malloc((size_t)results * 4);
    uint8_t *bits = random_bits(shape.outputs, fan_in);
    int64_t words = channels < 32 ? words_of(channels * taps) : taps * (words_of(channels) + (taps > 1));
    uint32_t *weights = malloc((size_t)(shape.outputs * words) * 4);
    stompp_tap_words(bits, shape.outputs, channels, taps, weights);
    for (int64_t i = 0; i < results; i++) {
        int64_t pixel = i % pixels, n = i / pixels % shape.outputs, image = i / pixels / shape.outputs;
        int64_t at[3] = {pixel / shape.out[2] / shape.out[1], pixel / shape.out[2] % shape.out[1],
                         pixel % shape.out[2]};
        const uint8_t *row = bits + n * ((fan_in + 7) / 8);
        float scaled = (float)sum_at(&shape, x, b, row, image, n / outputs, channels, at) * s[0];
        expected[i] = scaled + t[n];
    }
    int threads = 1 + (int)below(3);
    if (stompp_conv(x, FLOAT32, b, weights, s, 0, t, 1, y, FLOAT32, &shape, threads))
        exit(2);
    same(limit, y, expected, results);
    memset(y, 0, (size_t)results * 4);
    if (stompp_small_groups(x, FLOAT32, b, bits, s, 0, t, 1, y, FLOAT32, &shape, threads))
        exit(2);
    same("small groups", y, expected, results);
    free(x), free(b), free(s), free(t), free(y), free(expected), free(bits), free(weights);
}

/* ---- attention ---- */

/* Strides of (samples, groups, heads, queries, last), as it lies or with queries before heads; some repeat one row. */
static void strides_of(const int64_t sizes[4], int64_t last, int turned, int repeats, int64_t strides[4]) {
    int64_t rows = turned ? sizes[1] * sizes[2] : 1;
    strides[3] = last * rows;
    strides[2] = turned ? last : sizes[3] * last;
    strides[1] = sizes[2] * strides[2];
    strides[0] = sizes[1] * sizes[2] * sizes[3] * last;
    for (int d = 0; repeats && d < 4; d++)
        if (below(2))
            strides[d] = 0;
}

static int64_t at(const int64_t strides[4], int64_t sample, int64_t group, int64_t head, int64_t row) {
    return sample * strides[0] + group * strides[1] + head * strides[2] + row * strides[3];
}

/* Scores and outputs of every row against the plainest sums, a few blocks at a time. */
static void attention(const char *limit) {
    Attention own = {.samples = 1 + below(2), .groups = 1 + below(3), .heads = 1 + below(3),
                     .queries = 1 + below(below(2) ? 3 : 60), .keys = 1 + below(below(2) ? 40 : 400),
                     .size = 1 + below(140), .value_size = 1 + below(140), .scaling = 0.37f, .least = 0.1f};
    int64_t heads = own.groups * own.heads, rows = own.heads * own.queries, all = own.samples * own.groups * rows;
    int64_t queries[4] = {own.samples, own.groups, own.heads, own.queries};
    int64_t keys[4] = {own.samples, own.groups, 1, own.keys}, found[4];
    float *q = numbers(all * own.size), *k = numbers(own.samples * own.groups * own.keys * own.size);
    float *v = numbers(own.samples * own.groups * own.keys * own.value_size), *b = numbers(heads * own.size);
    float *c = numbers(own.groups * own.size), *d = numbers(own.groups * own.value_size), *t = numbers(heads);
    float *s = numbers(heads), *u = numbers(heads), *added[2] = {numbers(all * own.keys), numbers(all * own.keys)};
    float *p = numbers(all * own.keys), *y = malloc((size_t)(all * own.value_size) * 4);
    float *scores = malloc((size_t)(all * own.keys) * 4), *expected = malloc((size_t)(all * own.keys) * 4);
    float *outputs = malloc((size_t)(all * own.value_size) * 4);
    uint8_t *excluded = malloc((size_t)(all * own.keys));
    for (int64_t i = 0; i < all * own.keys; i++)
        excluded[i] = !below(4);
    own.query = q, own.key = k, own.value = v, own.score_scale = s, own.value_scale = u, own.probability_threshold = t;
    own.query_threshold = below(2) ? b : NULL, own.key_threshold = below(2) ? c : NULL;
    own.value_threshold = below(2) ? d : NULL, own.excluded = below(2) ? excluded : NULL, own.y = y;
    for (int i = 0; i < 2; i++) {
        own.added[i] = below(2) ? added[i] : NULL;
        strides_of(queries, own.keys, 0, 1, own.added_strides[i]);
    }
    strides_of(queries, own.keys, 0, 1, own.excluded_strides);
    strides_of(queries, own.size, (int)below(2), 0, own.query_strides);
    strides_of(keys, own.size, (int)below(2), 0, found);
    own.key_strides[0] = found[0], own.key_strides[1] = found[1], own.key_strides[2] = found[3];
    strides_of(keys, own.value_size, (int)below(2), 0, found);
    own.value_strides[0] = found[0], own.value_strides[1] = found[1], own.value_strides[2] = found[3];
    for (int64_t row = 0; row < all; row++) {
        int64_t sample = row / rows / own.groups, group = row / rows % own.groups, head = row % rows / own.queries;
        int64_t query = row % own.queries, number = group * own.heads + head;
        const float *value = v + sample * own.value_strides[0] + group * own.value_strides[1];
        const uint8_t *hidden = own.excluded ? excluded + at(own.excluded_strides, sample, group, head, query) : NULL;
        float threshold = t[number] < own.least ? own.least : t[number];
        for (int64_t key = 0; key < own.keys; key++) {
            const float *left = q + at(own.query_strides, sample, group, head, query);
            const float *right = k + sample * own.key_strides[0] + group * own.key_strides[1] + key * own.key_strides[2];
            int64_t z = 0;
            for (int64_t i = 0; i < own.size; i++)
                z += sign_of(left[i], own.query_threshold ? b[number * own.size + i] : 0.0f) *
                     sign_of(right[i], own.key_threshold ? c[group * own.size + i] : 0.0f);
            float score = (float)z * s[number];
            score *= own.scaling;
            for (int i = 0; i < 2; i++)
                if (own.added[i])
                    score += added[i][at(own.added_strides[i], sample, group, head, query) + key];
            expected[row * own.keys + key] = hidden && hidden[key] ? -3.402823466e38f : score;
        }
        for (int64_t i = 0; i < own.value_size; i++) {
            int64_t z = 0;
            for (int64_t key = 0; key < own.keys; key++)
                if (p[row * own.keys + key] >= threshold && !(hidden && hidden[key]))
                    z += 2 * sign_of(value[key * own.value_strides[2] + i],
                                     own.value_threshold ? d[group * own.value_size + i] : 0.0f);
            outputs[((sample * own.queries + query) * heads + number) * own.value_size + i] = (float)z * u[number];
        }
    }
    own.panels = malloc((size_t)stompp_attention_panels(&own));
    int threads = 1 + (int)below(3);
    int64_t blocks = stompp_attention_blocks(&own);
    int status = stompp_attention_pack(&own, threads);
    for (int64_t first = 0, count; !status && first < blocks; first += count) {
        count = 1 + below(blocks - first);
        int64_t row = stompp_attention_rows(&own, first);
        status = stompp_attention_scores(&own, first, count, scores + row * own.keys, threads) ||
                 stompp_attention_values(&own, first, count, p + row * own.keys, threads);
    }
    if (status || stompp_attention_rows(&own, blocks) != all)
        exit(2);
    same(limit, scores, expected, all * own.keys);
    same(limit, y, outputs, all * own.value_size);
    free(q), free(k), free(v), free(b), free(c), free(d), free(t), free(s), free(u), free(added[0]), free(added[1]);
    free(p), free(y), free(scores), free(expected), free(outputs), free(excluded), free(own.panels);
}

int main(int count, char **words) {
    static const char *limits[] = {"portable", "avx2", "avx512", "neon"};
    int rounds = count > 2 ? atoi(words[2]) : 20;
    srand(count > 1 ? (unsigned)atoi(words[1]) : 0);
    for (int round = 0; round < rounds; round++)
        for (int i = 0; i < 4; i++) {
            const char *name = stompp_choose(limits[i]);
            linear(name);
            cut_linear(name);
            halves(limits[i]);
            real_linear();
            convolution(name);
            attention(name);
        }
    printf("%lld entries equal, at best with %s\n", (long long)compared, stompp_choose(""));
    return 0;
}
