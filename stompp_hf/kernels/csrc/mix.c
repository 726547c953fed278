/* The masked mix of binary and real entries and its backward pass, each in one pass over memory.
 *
 * Rows are cut into pieces; what is the same along a row is repeated for a piece.
 */
#include "mix.h"

#include <math.h>
#include <string.h>

#define PIECE 1024 /* entries of a tensor that are worked on at a time */
#define PRODUCTS_AN_ENTRY 64 /* what an entry takes as long as, for the number of threads */

/* Entries [first, first + count) of a tensor, and what belongs to each of them. */
typedef struct {
    int64_t first, count;
    const float *u, *threshold, *scale, *mask;
} Piece;

#define TARGET
#define NAME(name) name##_portable
#include "mix.inc"
#undef TARGET
#undef NAME

#ifdef STOMPP_X86
#define TARGET __attribute__((target("avx2")))
#define NAME(name) name##_avx2
#include "mix.inc"
#undef TARGET
#undef NAME
#endif

typedef void (*Pass)(const Piece *, const Mixing *);
typedef struct {
    const Mixing *mixing;
    Pass pass;
    int64_t rows, length, pieces; /* rows of entries, and pieces of a row */
} Passing;

static void fill(float value, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++)
        to[i] = value;
}

static float without_plus_zero(float b) { return -(0.0f - b); }

/* Bits [first, first + count) as numbers, 0 or 1, in a buffer of PIECE + 7; where they begin there. */
static const float *bits_as_numbers(const uint8_t *bits, int64_t first, int64_t count, float *buffer) {
    int64_t before = first % 8, all = before + count;
    stompp_backend()->unpack_row(bits + first / 8, all, buffer);
    for (int64_t i = 0; i < all; i++)
        buffer[i] = 0.5f * buffer[i] + 0.5f;
    return buffer + before;
}

static void one_piece(void *context, int64_t index, int slot) {
    const Passing *job = context;
    const Mixing *self = job->mixing;
    float threshold[PIECE], scale[PIECE], mask[PIECE + 7];
    int64_t row = index / job->pieces, start = index % job->pieces * PIECE;
    int64_t count = smaller(PIECE, job->length - start), across = self->inner == 1;
    int64_t feature = across ? start : row % self->features;
    Piece at = {row * job->length + start, count, NULL, threshold, scale, mask};
    (void)slot;
    at.u = self->u ? self->u + at.first : NULL;
    if (!self->threshold)
        fill(-0.0f, count, threshold);
    else if (across)
        for (int64_t i = 0; i < count; i++)
            threshold[i] = without_plus_zero(self->threshold[feature + i]);
    else
        fill(without_plus_zero(self->threshold[feature]), count, threshold);
    if (self->scale && across && self->scale_step)
        at.scale = self->scale + feature;
    else if (self->scale)
        fill(self->scale[feature * self->scale_step], count, scale);
    if (self->mask && self->mask_of_entries)
        at.mask = bits_as_numbers(self->mask, at.first, count, mask);
    else if (self->mask && across)
        for (int64_t i = 0; i < count; i++)
            mask[i] = (float)self->mask[feature + i];
    else if (self->mask)
        fill((float)self->mask[feature], count, mask);
    job->pass(&at, self);
}

static void run(const Mixing *self, Pass portable, Pass avx2, int threads) {
    int across = self->inner == 1;
    Passing job = {self, portable, across ? self->outer : self->outer * self->features,
                   across ? self->features : self->inner, 0};
    if (stompp_backend() != &stompp_portable)
        job.pass = avx2;
    job.pieces = (job.length + PIECE - 1) / PIECE;
    threads = stompp_threads_for((double)PRODUCTS_AN_ENTRY * (double)(job.rows * job.length), threads);
    stompp_run(one_piece, &job, job.rows * job.pieces, threads);
}

#ifdef STOMPP_X86
#define PASSES(name) name##_portable, name##_avx2
#else
#define PASSES(name) name##_portable, name##_portable
#endif

/* y = mask * (sign(u - threshold) + offset) * scale + (1 - mask) * clip(real or u); code of the flags, or NULL. */
EXPORT void stompp_mix(const Mixing *mixing, int threads) { run(mixing, PASSES(forward), threads); }

/* to_u, to_real, and the terms of the sums that are the scale's and the threshold's gradients; NULL for none. */
EXPORT void stompp_mix_backward(const Mixing *mixing, int threads) { run(mixing, PASSES(backward), threads); }

/* The same for a weight: to_u, and the terms of the scale's. */
EXPORT void stompp_mix_weight_backward(const Mixing *mixing, int threads) {
    run(mixing, PASSES(weight_backward), threads);
}

/* levels = sign(u - threshold) + offset; code = |u - threshold| < width * |scale|, 0 or 1. Either may be NULL. */
EXPORT void stompp_levels(const Mixing *mixing, int threads) { run(mixing, PASSES(levels), threads); }

/* to_u = grad * code, which is 0 or 1; to_u may be grad. */
EXPORT void stompp_through_window(const Mixing *mixing, int threads) { run(mixing, PASSES(through_window), threads); }
