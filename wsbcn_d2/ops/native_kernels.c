/* Batch-channel normalization of float32 activations in NCHW, and weight standardization of float32
   filters that are contiguous, for the CPU.

   Compiled by native_library.py and called by native_backend.py, which checks what it is given. The
   formulas and the names of the tables are those of batch_channel_norm.py.

   Sums over pixels are of blocks that stay in the first-level cache, around a value of the block and
   in single precision, and from block to block in double precision. Work is divided by images and channels or
   groups, never within them, so that results do not depend on the number of threads. Compiled
   without contraction to fused multiply-adds, the backward pass finds out from x what ReLU let
   through exactly as the forward pass computed it.
*/

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 2048
/* Channels whose images are summed at a time. */
#define CHANNELS 64
/* Values for which one more thread is worth being woken. */
#define VALUES_OF_THREAD 32768

typedef struct {
    int64_t images, channels, groups, pixels;
    int threads;
} Shape;

/* What tables.py lays out: mu and rstd, then a row for each image. */
typedef struct {
    float *mu, *rstd, *rows;
    int64_t row;
} Tables;

typedef struct {
    float *m, *v, *d, *scale, *shift, *r;
} Row;

static Tables tables_of(float *tables, Shape shape) {
    int64_t channels = shape.channels;
    Tables result = {tables, tables + channels, tables + 2 * channels, 5 * channels + shape.groups};
    return result;
}

static Row row_of(Tables tables, Shape shape, int64_t image) {
    float *m = tables.rows + image * tables.row;
    int64_t channels = shape.channels;
    Row row = {
        m, m + channels, m + 2 * channels, m + 3 * channels, m + 4 * channels, m + 5 * channels
    };
    return row;
}

static int threads_for(Shape shape) {
    int64_t useful = 1 + shape.images * shape.channels * shape.pixels / VALUES_OF_THREAD;
    return useful < shape.threads ? (int)useful : shape.threads;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Mean of a block, and sum of squares around it. */
typedef struct {
    double mean, squares;
} Moments;

/* In one pass, from the deviations from some value. */
static Moments moments_around(const float *block, int64_t size, float center) {
    /* Two sums of each kind, as an addition waits for the last one to the same sum. */
    int64_t half = size / 2;
    const float *other = block + half;
    float sum = 0, squares = 0, other_sum = 0, other_squares = 0;
#pragma omp simd reduction(+ : sum, squares, other_sum, other_squares)
    for (int64_t i = 0; i < half; i++) {
        float t = block[i] - center, u = other[i] - center;
        sum += t;
        squares += t * t;
        other_sum += u;
        other_squares += u * u;
    }
    if (size % 2) {
        float t = block[size - 1] - center;
        sum += t;
        squares += t * t;
    }
    double step = ((double)sum + other_sum) / size;
    Moments moments = {center + step, (double)squares + other_squares - step * step * size};
    return moments;
}

static Moments moments_of_block(const float *block, int64_t size) {
    Moments moments = moments_around(block, size, block[0]);
    double step = moments.mean - block[0];
    /* Where the center is far from the mean, the difference of squares has lost a digit, or they
       overflow. */
    if (step * step * size > 8 * moments.squares || moments.squares > FLT_MAX)
        return moments_around(block, size, moments.mean);
    return moments;
}

/* Mean and biased variance, of the blocks and then of all of them (Chan, Golub and LeVeque). */
static void find_moments(const float *x, int64_t count, float *mean, float *var) {
    Moments all = moments_of_block(x, smaller(BLOCK, count));
    for (int64_t start = BLOCK; start < count; start += BLOCK) {
        int64_t size = smaller(BLOCK, count - start);
        Moments block = moments_of_block(x + start, size);
        double step = block.mean - all.mean, share = (double)size / (start + size);
        all.mean += step * share;
        all.squares += block.squares + step * step * share * start;
    }
    *mean = all.mean;
    *var = all.squares / count;
}

/* Those of each image and channel, by all threads of a team. */
static void find_all_moments(const float *x, float *mean, float *var, int64_t row, Shape shape) {
#pragma omp for collapse(2)
    for (int64_t n = 0; n < shape.images; n++)
        for (int64_t c = 0; c < shape.channels; c++) {
            int64_t from = (n * shape.channels + c) * shape.pixels, to = n * row + c;
            find_moments(x + from, shape.pixels, mean + to, var + to);
        }
}

/* The same, into tables with so many values between two images. */
void wsbcn_moments(
    const float *x, float *mean, float *var, int64_t row, int64_t images, int64_t channels,
    int64_t pixels, int threads
) {
    Shape shape = {images, channels, channels, pixels, threads};
#pragma omp parallel num_threads(threads_for(shape))
    find_all_moments(x, mean, var, row, shape);
}

static float moved(float from, float to, float rate) {
    /* As torch.lerp. */
    return rate < 0.5f ? from + rate * (to - from) : to - (to - from) * (1 - rate);
}

/* Moves the estimates of some channels towards the moments in the tables. Leaves the new ones in mu
   and, in the place of rstd, their variance. */
static void find_estimates(
    Tables tables, const float *running_mean, const float *running_var, float rate, int64_t from,
    int64_t count, Shape shape
) {
    double share = 1.0 / shape.images;
    for (int64_t first = from; first < from + count; first += CHANNELS) {
        int64_t some = smaller(CHANNELS, from + count - first);
        double means[CHANNELS] = {0}, vars[CHANNELS] = {0};
        for (int64_t n = 0; n < shape.images; n++) {
            Row row = row_of(tables, shape, n);
            for (int64_t i = 0; i < some; i++) {
                double offset = (double)row.m[first + i] - running_mean[first + i];
                means[i] += row.m[first + i];
                vars[i] += row.v[first + i] + offset * offset;
            }
        }
        for (int64_t i = 0; i < some; i++) {
            int64_t c = first + i;
            tables.mu[c] = moved(running_mean[c], means[i] * share, rate);
            tables.rstd[c] = moved(running_var[c], vars[i] * share, rate);
        }
    }
}

/* Keeps the new estimates and returns 1, or returns to the old ones and 0 if any is not finite. */
static int keep_estimates(Tables tables, float *running_mean, float *running_var, Shape shape) {
    int64_t channels = shape.channels;
    float *mu = tables.mu, *s2 = tables.rstd;
    float zero = 0; /* what is not finite is not a number when multiplied by zero */
#pragma omp simd reduction(+ : zero)
    for (int64_t c = 0; c < channels; c++)
        zero += 0 * mu[c] + 0 * s2[c];
    if (zero == 0) {
        memcpy(running_mean, mu, channels * sizeof *mu);
        memcpy(running_var, s2, channels * sizeof *s2);
        return 1;
    }
    memcpy(mu, running_mean, channels * sizeof *mu);
    memcpy(s2, running_var, channels * sizeof *s2);
    return 0;
}

/* From the variances that lie there. */
static void find_rstd(Tables tables, double eps, int64_t first, int64_t count) {
    for (int64_t c = first; c < first + count; c++)
        tables.rstd[c] = 1 / sqrtf(tables.rstd[c] + (float)eps);
}

static float normalized(float x, float m, float scale, float shift) {
    return (x - m) * scale + shift;
}

static void apply(
    const float *restrict x, const float *restrict residual, float *restrict y, int64_t count,
    float m, float scale, float shift, int relu
) {
    /* What is not a number stays. */
    if (residual && relu) {
        for (int64_t i = 0; i < count; i++) {
            float value = normalized(x[i], m, scale, shift) + residual[i];
            y[i] = value <= 0 ? 0 : value;
        }
    } else if (residual) {
        for (int64_t i = 0; i < count; i++)
            y[i] = normalized(x[i], m, scale, shift) + residual[i];
    } else if (relu) {
        for (int64_t i = 0; i < count; i++) {
            float value = normalized(x[i], m, scale, shift);
            y[i] = value <= 0 ? 0 : value;
        }
    } else {
        for (int64_t i = 0; i < count; i++)
            y[i] = normalized(x[i], m, scale, shift);
    }
}

static void find_moments_of_group(
    const float *x, Tables tables, int64_t n, int64_t g, Shape shape
) {
    int64_t channels = shape.channels, pixels = shape.pixels, size = channels / shape.groups;
    Row row = row_of(tables, shape, n);
    for (int64_t c = g * size; c < (g + 1) * size; c++)
        find_moments(x + (n * channels + c) * pixels, pixels, row.m + c, row.v + c);
}

/* The tables of a group in an image, of which the moments are there, and its output. */
static void normalize_group(
    const float *x, const float *residual, float *y, Tables tables, const float *weight,
    const float *bias, const float *group_weight, const float *group_bias, double eps, int relu,
    int64_t n, int64_t g, Shape shape
) {
    int64_t channels = shape.channels, pixels = shape.pixels, size = channels / shape.groups;
    int64_t first = g * size, end = first + size;
    Row row = row_of(tables, shape, n);
    double mean = 0, var = 0;
    for (int64_t c = first; c < end; c++) {
        row.d[c] = weight[c] * tables.rstd[c] * (row.m[c] - tables.mu[c]) + bias[c];
        mean += row.d[c];
    }
    mean /= size;
    for (int64_t c = first; c < end; c++) {
        double a = weight[c] * tables.rstd[c], d = row.d[c] - mean;
        row.d[c] = d;
        var += a * a * row.v[c] + d * d;
    }
    float r = 1 / sqrt(var / size + eps), k = group_weight[g] * r;
    row.r[g] = r;
    for (int64_t c = first; c < end; c++) {
        row.scale[c] = k * (weight[c] * tables.rstd[c]);
        row.shift[c] = k * row.d[c] + group_bias[g];
        int64_t at = (n * channels + c) * pixels;
        apply(
            x + at, residual ? residual + at : 0, y + at, pixels, row.m[c], row.scale[c],
            row.shift[c], relu
        );
    }
}

/* What to normalize by. */
enum { OF_BATCH, FIXED, UPDATED };

/* The output, and all tables. By the statistics of the batch: those are there, in mu and in the
   place of rstd, as are the moments. Otherwise by the estimates, as they are or updated. Returns 0
   if that would have made one not finite. */
int wsbcn_forward(
    const float *x, const float *residual, float *y, float *all_tables, const float *weight,
    const float *bias, const float *group_weight, const float *group_bias, float *running_mean,
    float *running_var, float *seen_elements, double rate, double eps, int statistics, int relu,
    int64_t images, int64_t channels, int64_t groups, int64_t pixels, int threads
) {
    Shape shape = {images, channels, groups, pixels, threads};
    Tables tables = tables_of(all_tables, shape);
    /* With a single image the estimates of a group follow from that group, which is normalized while
       it is in the cache. If one of any group is not finite, all are normalized again. */
    int at_once = statistics == UPDATED && images == 1 && groups >= threads;
    int64_t size = channels / groups;
    int updated = 1;
#pragma omp parallel num_threads(threads_for(shape))
    {
        if (at_once) {
#pragma omp for
            for (int64_t g = 0; g < groups; g++) {
                find_moments_of_group(x, tables, 0, g, shape);
                find_estimates(tables, running_mean, running_var, rate, g * size, size, shape);
                find_rstd(tables, eps, g * size, size);
                normalize_group(
                    x, residual, y, tables, weight, bias, group_weight, group_bias, eps, relu, 0, g,
                    shape
                );
            }
        } else if (statistics == UPDATED) {
            Row row = row_of(tables, shape, 0);
            find_all_moments(x, row.m, row.v, tables.row, shape);
        }
#pragma omp single
        {
            if (statistics == UPDATED) {
                find_estimates(tables, running_mean, running_var, rate, 0, channels, shape);
                updated = keep_estimates(tables, running_mean, running_var, shape);
                if (updated && seen_elements)
                    *seen_elements += images * pixels;
            } else if (statistics == FIXED) {
                memcpy(tables.mu, running_mean, channels * sizeof *running_mean);
                memcpy(tables.rstd, running_var, channels * sizeof *running_var);
            }
            find_rstd(tables, eps, 0, channels);
        }
        if (!at_once || !updated) {
#pragma omp for
            for (int64_t i = 0; i < images * groups; i++) {
                if (statistics == FIXED)
                    find_moments_of_group(x, tables, i / groups, i % groups, shape);
                normalize_group(
                    x, residual, y, tables, weight, bias, group_weight, group_bias, eps, relu,
                    i / groups, i % groups, shape
                );
            }
        }
    }
    return updated;
}

/* The output once more, without a residual. */
void wsbcn_again(
    const float *x, float *y, float *all_tables, int relu, int64_t images, int64_t channels,
    int64_t groups, int64_t pixels, int threads
) {
    Shape shape = {images, channels, groups, pixels, threads};
    Tables tables = tables_of(all_tables, shape);
#pragma omp parallel for num_threads(threads_for(shape))
    for (int64_t i = 0; i < images * channels; i++) {
        Row row = row_of(tables, shape, i / channels);
        int64_t c = i % channels, at = i * pixels;
        apply(x + at, 0, y + at, pixels, row.m[c], row.scale[c], row.shift[c], relu);
    }
}

/* What ReLU lets through of a gradient, which is read in any case: loops that read it only then take
   twice the time. */
static float let_through(float grad, float value) {
    return value <= 0 ? 0 : grad;
}

/* Sums of the gradient, and of the gradient times x around its mean. What ReLU kept back does not
   count; with a residual, whose gradient is written, y tells what that was. */
static void find_sums(
    const float *restrict grad, const float *restrict x, const float *restrict y,
    float *restrict grad_residual, int64_t count, float m, float scale, float shift, int relu,
    float *restrict s1, float *restrict s2
) {
    double total1 = 0, total2 = 0;
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t end = smaller(start + BLOCK, count);
        float sum1 = 0, sum2 = 0;
        if (grad_residual) {
#pragma omp simd reduction(+ : sum1, sum2)
            for (int64_t i = start; i < end; i++) {
                float g = let_through(grad[i], y[i]);
                grad_residual[i] = g;
                sum1 += g;
                sum2 += g * (x[i] - m);
            }
        } else if (relu) {
#pragma omp simd reduction(+ : sum1, sum2)
            for (int64_t i = start; i < end; i++) {
                float g = let_through(grad[i], normalized(x[i], m, scale, shift));
                sum1 += g;
                sum2 += g * (x[i] - m);
            }
        } else {
#pragma omp simd reduction(+ : sum1, sum2)
            for (int64_t i = start; i < end; i++) {
                sum1 += grad[i];
                sum2 += grad[i] * (x[i] - m);
            }
        }
        total1 += sum1;
        total2 += sum2;
    }
    *s1 = total1;
    *s2 = total2;
}

static void apply_backward(
    const float *restrict grad, const float *restrict x, float *restrict grad_x, int64_t count,
    float m, float scale, float shift, float q, float c, int relu
) {
    if (relu) {
        for (int64_t i = 0; i < count; i++) {
            float g = let_through(grad[i], normalized(x[i], m, scale, shift));
            grad_x[i] = (x[i] - m) * q + c + g * scale;
        }
    } else {
        for (int64_t i = 0; i < count; i++)
            grad_x[i] = (x[i] - m) * q + c + grad[i] * scale;
    }
}

/* What the two passes of a gradient share: for each image and channel the sums of dz and of
   dz (x - mu), and what the gradient of x takes from x and from nothing; for each image and group
   what the affine of the groups gets. */
typedef struct {
    float *dz, *dz_x, *q, *c, *u1, *u2;
} Scratch;

static Scratch scratch_of(float *scratch, Shape shape) {
    int64_t rows = shape.images * shape.channels, groups = shape.images * shape.groups;
    float *u1 = scratch + 4 * rows;
    Scratch result = {
        scratch, scratch + rows, scratch + 2 * rows, scratch + 3 * rows, u1, u1 + groups
    };
    return result;
}

static void sum_images(const float *table, int64_t images, int64_t size, float *result) {
    for (int64_t i = 0; i < size; i++)
        result[i] = table[i];
    for (int64_t n = 1; n < images; n++)
        for (int64_t i = 0; i < size; i++)
            result[i] += table[n * size + i];
}

/* The gradients of the parameters (weight, bias, group_weight, group_bias, one after the other),
   and that of x. grad_x is null if that takes the statistics of the batch into account. */
void wsbcn_backward(
    const float *grad, const float *x, const float *y, float *grad_x, float *grad_residual,
    float *all_tables, float *all_scratch, const float *weight, const float *group_weight,
    float *parameters, int relu, int64_t images, int64_t channels, int64_t groups, int64_t pixels,
    int threads
) {
    Shape shape = {images, channels, groups, pixels, threads};
    Tables tables = tables_of(all_tables, shape);
    Scratch scratch = scratch_of(all_scratch, shape);
    int64_t size = channels / groups, values = size * pixels;
#pragma omp parallel for num_threads(threads_for(shape))
    for (int64_t i = 0; i < images * groups; i++) {
        int64_t n = i / groups, g = i % groups, first = g * size, end = first + size;
        Row row = row_of(tables, shape, n);
        float *s1 = scratch.dz + n * channels, *s2 = scratch.dz_x + n * channels;
        float *q = scratch.q + n * channels, *h = scratch.c + n * channels;
        double r = row.r[g], k = group_weight[g] * r, u1 = 0, u2 = 0;
        for (int64_t c = first; c < end; c++) {
            int64_t at = (n * channels + c) * pixels;
            find_sums(
                grad + at, x + at, y ? y + at : 0, grad_residual ? grad_residual + at : 0, pixels,
                row.m[c], row.scale[c], row.shift[c], relu, s1 + c, s2 + c
            );
            u1 += s1[c];
            u2 += weight[c] * tables.rstd[c] * s2[c] + row.d[c] * s1[c];
        }
        u2 *= r;
        scratch.u1[i] = u1;
        scratch.u2[i] = u2;
        double f = -u2 * r / values;
        for (int64_t c = first; c < end; c++) {
            double fa = f * (weight[c] * tables.rstd[c]), fd = f * row.d[c] - u1 / values;
            double dz = k * (s1[c] + fd * pixels);
            double dz_t = k * (s2[c] + fa * row.v[c] * pixels);
            s1[c] = dz;
            s2[c] = dz_t + (row.m[c] - tables.mu[c]) * dz;
            q[c] = fa * row.scale[c];
            h[c] = fd * row.scale[c];
            int64_t at = (n * channels + c) * pixels;
            if (grad_x)
                apply_backward(
                    (grad_residual ? grad_residual : grad) + at, x + at, grad_x + at, pixels,
                    row.m[c], row.scale[c], row.shift[c], q[c], h[c], relu && !grad_residual
                );
        }
    }
    sum_images(scratch.dz_x, images, channels, parameters);
    sum_images(scratch.dz, images, channels, parameters + channels);
    sum_images(scratch.u2, images, groups, parameters + 2 * channels);
    sum_images(scratch.u1, images, groups, parameters + 2 * channels + groups);
    for (int64_t c = 0; c < channels; c++)
        parameters[c] *= tables.rstd[c];
}

/* The gradient of x through the statistics of the batch, too. In: what wsbcn_backward left, and the
   gradients of weight and bias and the number of values behind the statistics, of all ranks. */
void wsbcn_backward_through_batch(
    const float *grad, const float *x, float *grad_x, float *all_tables, float *all_scratch,
    const float *weight, const float *grad_weight, const float *grad_bias, double count, int relu,
    int64_t images, int64_t channels, int64_t groups, int64_t pixels, int threads
) {
    Shape shape = {images, channels, groups, pixels, threads};
    Tables tables = tables_of(all_tables, shape);
    Scratch scratch = scratch_of(all_scratch, shape);
#pragma omp parallel for num_threads(threads_for(shape))
    for (int64_t i = 0; i < images * channels; i++) {
        Row row = row_of(tables, shape, i / channels);
        int64_t c = i % channels, at = i * pixels;
        double a = weight[c] * tables.rstd[c] / count;
        double from_weight = a * tables.rstd[c] * grad_weight[c];
        double offset = row.m[c] - tables.mu[c];
        apply_backward(
            grad + at, x + at, grad_x + at, pixels, row.m[c], row.scale[c], row.shift[c],
            scratch.q[i] - from_weight, scratch.c[i] - a * grad_bias[c] - offset * from_weight, relu
        );
    }
}

/* Filters with mean 0 and variance 1, and the mean and 1 / sqrt(variance + eps) that they had. */
void wsbcn_standardize(
    const float *weight, float *standardized, float *mean, float *rstd, double eps, int64_t filters,
    int64_t size, int threads
) {
    Shape shape = {1, filters, filters, size, threads};
#pragma omp parallel for num_threads(threads_for(shape))
    for (int64_t i = 0; i < filters; i++) {
        find_moments(weight + i * size, size, mean + i, rstd + i);
        rstd[i] = 1 / sqrtf(rstd[i] + (float)eps);
        apply(weight + i * size, 0, standardized + i * size, size, mean[i], rstd[i], 0, 0);
    }
}

/* The gradient of the filters, from that of the standardized ones. */
void wsbcn_standardize_backward(
    const float *grad, const float *weight, float *grad_weight, const float *mean,
    const float *rstd, int64_t filters, int64_t size, int threads
) {
    Shape shape = {1, filters, filters, size, threads};
#pragma omp parallel for num_threads(threads_for(shape))
    for (int64_t i = 0; i < filters; i++) {
        int64_t at = i * size;
        double r = rstd[i];
        float s1, s2;
        find_sums(grad + at, weight + at, 0, 0, size, mean[i], 0, 0, 0, &s1, &s2);
        apply_backward(
            grad + at, weight + at, grad_weight + at, size, mean[i], r, 0, -r * r * r * s2 / size,
            -r * s1 / size, 0
        );
    }
}
