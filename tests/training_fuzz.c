/* The masked mix and the packing of latents on random shapes against the plainest code, for sanitizers: buffers are
 * exactly as large as they have to be. Arguments: seed, rounds. Prints the number of comparisons; exits with 1 at the
 * first difference. */
#include "mix.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *stompp_choose(const char *limit);
void stompp_pack(const float *, int64_t, int64_t, int, uint8_t *, int);
void stompp_mix(const Mixing *, int);
void stompp_mix_backward(const Mixing *, int);
void stompp_mix_weight_backward(const Mixing *, int);
void stompp_levels(const Mixing *, int);
void stompp_through_window(const Mixing *, int);

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

static uint8_t *masks(int64_t count) {
    uint8_t *values = malloc((size_t)count);
    for (int64_t i = 0; i < count; i++)
        values[i] = (uint8_t)below(2);
    return values;
}

static uint8_t *bits_of(const uint8_t *mask, int64_t count) {
    uint8_t *bits = calloc((size_t)(count + 7) / 8, 1);
    for (int64_t i = 0; i < count; i++)
        bits[i / 8] |= (uint8_t)(mask[i] << i % 8);
    return bits;
}

static void same(const char *what, double found, double expected) {
    compared++;
    if (found != expected) {
        printf("%s: %g, not %g\n", what, found, expected);
        exit(1);
    }
}

static void packing(void) {
    int64_t rows = 1 + below(400), count = 1 + below(below(4) ? 90 : 20000 / rows), bytes = (count + 7) / 8;
    int transposed = (int)below(2);
    float *w = numbers(rows * count);
    uint8_t *bits = malloc((size_t)(rows * bytes));
    stompp_pack(w, rows, count, transposed, bits, 1 + (int)below(3));
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < 8 * bytes; i++) {
            int one = i < count && w[transposed ? i * rows + row : row * count + i] >= 0.0f;
            same("bit", (bits[row * bytes + i / 8] >> (i % 8)) & 1, one);
        }
    free(w), free(bits);
}

static void mixing(void) {
    Mixing job = {.outer = 1 + below(6), .features = 1 + below(40), .inner = below(2) ? 1 : 1 + below(60)};
    if (below(4) == 0)
        job.inner = 1, job.features = 1 + below(3000);
    int64_t count = job.outer * job.features * job.inner;
    int threads = 1 + (int)below(3), absorbed = (int)below(2), weight = (int)below(2);
    job.mask_of_entries = weight, job.scale_step = weight && below(2);
    job.flags = weight ? INSIDE : ABOVE | INSIDE | PASSING, job.windowed = !weight;
    job.low = -0.75f, job.high = 1.25f, job.offset = weight ? 0.0f : (float)below(2), job.width = 1.5f;
    float *u = numbers(count), *real = numbers(count), *b = numbers(job.features), *grad = numbers(count);
    float *scale = numbers(job.scale_step ? job.features : 1);
    uint8_t *mask = masks(weight ? count : job.features), *bits = bits_of(mask, weight ? count : job.features);
    float *made[6];
    for (int i = 0; i < 6; i++)
        made[i] = malloc((size_t)count * 4);
    uint8_t *code = malloc((size_t)count), *window = malloc((size_t)count);
    int8_t *levels = malloc((size_t)count);
    job.u = u, job.real = absorbed ? real : NULL, job.threshold = weight ? NULL : b, job.scale = scale;
    job.mask = weight ? bits : mask;
    job.y = made[0], job.code = weight ? NULL : code;
    stompp_mix(&job, threads);
    Mixing back = job;
    back.grad = grad, back.rule = BOTH, back.to_u = made[1], back.to_scale = made[2];
    if (weight) {
        stompp_mix_weight_backward(&back, threads);
    } else {
        back.u = back.threshold = back.scale = NULL;
        back.to_real = made[3], back.to_threshold = made[4];
        stompp_mix_backward(&back, threads);
        job.code = window, job.levels = levels, job.mask = NULL;
        stompp_levels(&job, threads);
        back = (Mixing){.outer = 1, .features = 1, .inner = count, .grad = made[5], .to_u = made[5], .code = window};
        memcpy(made[5], grad, (size_t)count * 4);
        stompp_through_window(&back, threads);
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t feature = i / job.inner % job.features;
        float under = weight ? 0.0f : b[feature], m = mask[weight ? i : feature], g = grad[i];
        float sign = u[i] - under >= 0.0f ? 1.0f : -1.0f, a = scale[job.scale_step ? feature : 0];
        float soft = absorbed ? real[i] : u[i];
        int inside = weight ? u[i] > job.low && u[i] < job.high : soft > job.low && soft < job.high;
        int passing = weight || fabsf(u[i] - under) < fabsf(a) * job.width;
        soft = soft < job.low ? job.low : soft > job.high ? job.high : soft;
        same("y", made[0][i], m > 0.0f ? (sign + job.offset) * a : soft);
        same("dL/du", made[1][i], m > 0.0f ? (passing ? g : 0.0f) : inside ? g : 0.0f);
        same("terms of the scale", made[2][i], weight ? m * sign * g : (sign + job.offset) * g);
        if (!weight) {
            same("dL/df", made[3][i], m > 0.0f || !inside ? 0.0f : g);
            same("terms of the threshold", made[4][i], passing ? g : 0.0f);
            same("flags", code[i], (sign > 0.0f ? ABOVE : 0) | (inside ? INSIDE : 0) | (passing ? PASSING : 0));
            same("level", levels[i], sign + job.offset);
            same("window", window[i], passing);
            same("through the window", made[5][i], passing ? g : 0.0f);
        }
    }
    free(u), free(real), free(b), free(grad), free(scale), free(mask), free(bits), free(code);
    free(window), free(levels);
    for (int i = 0; i < 6; i++)
        free(made[i]);
}

int main(int count, char **words) {
    const char *limits[] = {"portable", "avx2", "avx512", "neon"};
    srand(count > 1 ? (unsigned)atoi(words[1]) : 0);
    for (int round = count > 2 ? atoi(words[2]) : 100; round > 0; round--) {
        stompp_choose(limits[below(4)]);
        packing();
        mixing();
    }
    printf("%lld entries equal, at best with %s\n", (long long)compared, stompp_choose(""));
    return 0;
}
