/* The masked mix: what its calls take.
 *
 * A tensor is (outer, features, inner). A threshold is one a feature; a scale one a feature or a single one; a mask one
 * a feature, as bytes that are 0 or 1, or, with mask_of_entries, one an entry, as bits: entry i is bit i % 8 of byte
 * i / 8. Pointers to what is not there, or not wanted, are NULL.
 */
#ifndef STOMPP_MIX_H
#define STOMPP_MIX_H

#include "kernels.h"

enum { ABOVE = 1, INSIDE = 2, PASSING = 4 };           /* flags of an entry */
enum { UNFROZEN = 1, EVERY = 2, BOTH = 3, FROZEN = 4 }; /* which part of the gradient goes on */

typedef struct {
    const float *u, *real, *threshold, *scale, *grad;
    const uint8_t *mask;
    uint8_t *code;
    int8_t *levels;
    float *y, *to_u, *to_real, *to_scale, *to_threshold;
    int64_t outer, features, inner;
    float low, high, offset, width;
    int scale_step, mask_of_entries, flags, windowed, rule;
} Mixing;

#endif
