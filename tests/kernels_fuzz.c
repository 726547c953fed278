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
        }
    printf("%lld entries equal, at best with %s\n", (long long)compared, stompp_choose(""));
    return 0;
}
