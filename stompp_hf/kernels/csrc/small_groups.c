/* The convolution of groups with few channels (depthwise: one): sums of rows of signs, a byte each.
 *
 * There a word would hold little, and a panel would serve few outputs. Padding with zeros needs no care: it adds 0.
 */
#include "kernels.h"

#include <string.h>

typedef struct {
    const Backend *backend;
    Shape shape;
    const char *x;
    int x_dtype, y_dtype;
    const float *threshold, *scale, *shift;
    int64_t scale_step, shift_step;
    const uint8_t *bits;
    char *y;
    int64_t group_channels, group_outputs, taps, line, padded[3], share;
    int8_t *scratch;
} SmallGroups;

/* The signs of one group with its padding around them. */
static void surround(const SmallGroups *self, const char *x, int64_t channel, int8_t *signs) {
    const Shape *shape = &self->shape;
    const int64_t *padded = self->padded, *in = shape->in, *before = shape->before;
    int64_t from = before[2], count = smaller(in[2], padded[2] - from);
    memset(signs, (int)shape->pad, (size_t)(self->group_channels * volume(padded)));
    for (int64_t c = 0; c < self->group_channels; c++, signs += volume(padded))
        for (int64_t i = 0; i < in[0] && before[0] + i < padded[0]; i++)
            for (int64_t j = 0; j < in[1] && before[1] + j < padded[1] && count > 0; j++)
                self->backend->sign_bytes(x + ((c * in[0] + i) * in[1] + j) * in[2] * size_of(self->x_dtype),
                                          self->x_dtype, self->threshold ? self->threshold[channel + c] : 0.0f, count,
                                          signs + ((before[0] + i) * padded[1] + before[1] + j) * padded[2] + from);
}

static void sum_line(const SmallGroups *self, const int8_t *signs, const uint8_t *bits, int64_t i, int64_t j,
                     int16_t *sums) {
    const Shape *shape = &self->shape;
    const int64_t *kernel = shape->kernel, *dilation = shape->dilation, *padded = self->padded;
    int64_t bit = 0;
    memset(sums, 0, (size_t)shape->out[2] * sizeof(*sums));
    for (int64_t c = 0; c < self->group_channels; c++)
        for (int64_t u = 0; u < kernel[0]; u++)
            for (int64_t v = 0; v < kernel[1]; v++) {
                int64_t plane = c * padded[0] + i * shape->stride[0] + u * dilation[0];
                const int8_t *row = signs + (plane * padded[1] + j * shape->stride[1] + v * dilation[1]) * padded[2];
                for (int64_t w = 0; w < kernel[2]; w++, bit++)
                    self->backend->add_row(row + w * dilation[2], shape->stride[2],
                                           (bits[bit >> 3] >> (bit & 7)) & 1 ? 1 : -1, shape->out[2], sums);
            }
}

static void one_group(void *context, int64_t index, int slot) {
    const SmallGroups *self = context;
    const Shape *shape = &self->shape;
    int64_t group = index % shape->groups, image = index / shape->groups, results = volume(shape->out);
    int64_t fan_in = self->group_channels * self->taps, bytes = (fan_in + 7) / 8;
    int8_t *signs = self->scratch + slot * self->share;
    int16_t *sums = (int16_t *)(signs + (self->group_channels * volume(self->padded) + 63) / 64 * 64);
    int32_t z[LANES];
    surround(self, self->x + index * self->group_channels * volume(shape->in) * size_of(self->x_dtype),
             group * self->group_channels, signs);
    for (int64_t n = group * self->group_outputs, last = n + self->group_outputs; n < last; n++)
        for (int64_t line = 0; line < shape->out[0] * shape->out[1]; line++) {
            sum_line(self, signs, self->bits + n * bytes, line / shape->out[1], line % shape->out[1], sums);
            for (int64_t first = 0; first < shape->out[2]; first += LANES) {
                int64_t count = smaller(LANES, shape->out[2] - first);
                for (int64_t i = 0; i < count; i++)
                    z[i] = sums[first + i];
                self->backend->finish(z, self->scale ? self->scale + n * self->scale_step : 0, 0,
                                      self->shift ? self->shift + n * self->shift_step : 0, 0, count,
                                      self->y + ((image * shape->outputs + n) * results + line * shape->out[2] +
                                                 first) * size_of(self->y_dtype),
                                      self->y_dtype);
            }
        }
}

/* As stompp_conv, for groups whose outputs are sums of at most 32767 signs; bits as they are stored. */
EXPORT int stompp_small_groups(const void *x, int x_dtype, const float *threshold, const uint8_t *bits,
                               const float *scale, int64_t scale_step, const float *shift, int64_t shift_step, void *y,
                               int y_dtype, const Shape *shape, int threads) {
    SmallGroups self = {.backend = stompp_backend(), .shape = *shape, .x = x, .x_dtype = x_dtype, .y_dtype = y_dtype,
                        .threshold = threshold, .scale = scale, .shift = shift, .scale_step = scale_step,
                        .shift_step = shift_step, .bits = bits, .y = y};
    self.group_channels = shape->channels / shape->groups;
    self.group_outputs = shape->outputs / shape->groups;
    self.taps = volume(shape->kernel);
    for (int d = 0; d < 3; d++)
        self.padded[d] = (shape->out[d] - 1) * shape->stride[d] + (shape->kernel[d] - 1) * shape->dilation[d] + 1;
    self.share = (self.group_channels * volume(self.padded) + 63) / 64 * 64 + (shape->out[2] * 2 + 63) / 64 * 64;
    int64_t images = shape->batch * shape->groups;
    double sums = (double)images * (double)volume(shape->out) * (double)self.group_outputs * (double)self.taps;
    threads = stompp_threads_for(8.0 * sums * (double)self.group_channels, threads);
    self.scratch = stompp_allocate(threads * self.share);
    if (!self.scratch)
        return NO_MEMORY;
    stompp_run(one_group, &self, images, threads);
    stompp_release(self.scratch);
    return DONE;
}
