/* Batch-channel normalization for the CPU: activations of float32, bfloat16 or float16, in NCHW
   or channels_last. Weight standardization in float32.

   setup.py builds it as plain C; native_backend.py calls it. The formulas, the names of the
   tables and the checks of arguments are in batch_channel_norm.py. Tables and parameters are
   float32.

   Sums over pixels are of blocks, around a value of the block and in single precision, and from
   block to block in double precision. Work is divided in a way that does not depend on the
   number of threads, so results do not either. Built without contraction to fused
   multiply-adds, the backward pass finds out from x what ReLU let through exactly as the
   forward pass computed it.
*/

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Loops over an activation are compiled for two instruction sets, of which the dynamic linker takes
   what the processor has. With AVX2 bfloat16 takes half the time; AVX-512 gained nothing more. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__)
#define LOOP static __attribute__((target_clones("default", "avx2")))
#else
#define LOOP static
#endif
#define INLINE static inline __attribute__((always_inline))

#define BLOCK 2048 /* values summed in single precision, in NCHW */
#define LANES 16   /* sums side by side; of one GCC makes 8, which it adds up one after the other */
#define ROWS 256   /* pixels of a block in channels_last */
#define WIDTH 256  /* channels of a block there, and those whose images are summed at a time */
#define AHEAD 2048 /* values between what is fetched from memory and what is computed with */
#define CHUNK 256  /* values that are fetched at a time */
#define VALUES_OF_THREAD 32768 /* for which one more thread is worth being woken */

enum { F32, BF16, F16 };            /* dtype */
enum { OF_BATCH, FIXED, UPDATED };  /* statistics: what to normalize by */
enum { NONE, RELU };                /* activation */

/* The arguments of all functions; `_call` of native_backend.py packs them. */
typedef struct {
    const void *x, *residual, *grad;
    void *y, *grad_x, *grad_residual;
    float *tables, *scratch, *parameters;
    const float *weight, *bias, *group_weight, *group_bias;
    float *running_mean, *running_var, *seen_elements;
    double rate, eps, count;
    int64_t images, channels, groups, pixels;
    int32_t dtype, channels_last, activation, statistics, threads;
} Pass;

/* What tables.py lays out: mu and rstd, then a row for each image. */
typedef struct {
    float *m, *v, *d, *scale, *shift, *r;
} Row;

static float *mu_of(const Pass *pass) {
    return pass->tables;
}

static float *rstd_of(const Pass *pass) {
    return pass->tables + pass->channels;
}

static Row row_of(const Pass *pass, int64_t image) {
    int64_t channels = pass->channels;
    float *m = pass->tables + 2 * channels + image * (5 * channels + pass->groups);
    Row row = {
        m, m + channels, m + 2 * channels, m + 3 * channels, m + 4 * channels, m + 5 * channels
    };
    return row;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t blocks(int64_t count, int64_t size) {
    return (count + size - 1) / size;
}

/* Planes that are worth a call: of 7x7, one at a time, each takes 16 ns instead of 13. Large
   ones are single, for threads to share them. */
static int64_t planes_of_call(const Pass *pass) {
    return 1 + 512 / pass->pixels;
}

static int threads_for(const Pass *pass) {
    int64_t useful = 1 + pass->images * pass->channels * pass->pixels / VALUES_OF_THREAD;
    return useful < pass->threads ? (int)useful : pass->threads;
}

/* ------------------------------------------------------------------------- values of an activation

   `dtype` is a constant wherever these are called in a loop, for each of which one is compiled. */

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* By integers, which compilers make instructions for many values of, unlike conversions. */

/* `a` where the condition holds, else `b`: without a branch, for which loops stay single values. */
INLINE uint32_t chosen(int condition, uint32_t a, uint32_t b) {
    uint32_t mask = -(uint32_t)condition;
    return (a & mask) | (b & ~mask);
}

INLINE float from_f16(uint16_t half) {
    uint32_t magnitude = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t number = bits_of(float_of(magnitude << 13) * 0x1p112f); /* subnormal ones, too */
    return float_of(sign | chosen(magnitude < 0x7c00, number, 0x7f800000 | magnitude << 13));
}

INLINE uint16_t to_f16(float value) {
    uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    /* Of numbers below 2^-14 the last bit is that of 0.5 + the number in float32. */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t half = chosen(magnitude < 0x38800000, subnormal, normal);
    half = chosen(magnitude >= 0x477ff000, 0x7c00, half); /* rounds to infinity */
    half = chosen(magnitude > 0x7f800000, 0x7e00, half);
    return half | (bits >> 16 & 0x8000);
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest;
}

INLINE float get(const void *x, int64_t i, const int dtype) {
    if (dtype == F32)
        return ((const float *)x)[i];
    uint16_t bits = ((const uint16_t *)x)[i];
    return dtype == BF16 ? float_of((uint32_t)bits << 16) : from_f16(bits);
}

INLINE void put(void *y, int64_t i, float value, const int dtype) {
    if (dtype == F32)
        ((float *)y)[i] = value;
    else
        ((uint16_t *)y)[i] = dtype == BF16 ? to_bf16(value) : to_f16(value);
}

/* Has the processor fetch memory that will be read or written soon. By itself it begins anew with
   each page of 4 KiB, and waits: without this, a forward pass of 1x128x200x336 takes 1.4 times as
   long, a backward pass 1.2. There may be nothing at that address. */
INLINE void fetch(const void *x, int64_t from, int64_t count, const int dtype) {
    int64_t size = dtype == F32 ? 4 : 2;
    for (int64_t byte = from * size; byte < (from + count) * size; byte += 64)
        __builtin_prefetch((const void *)((uintptr_t)x + byte));
}

/* `CALL(dtype)` with the dtype as a constant. */
#define WITH_DTYPE(dtype, CALL) \
    switch (dtype) {            \
    case F32:                   \
        CALL(F32);              \
        break;                  \
    case BF16:                  \
        CALL(BF16);             \
        break;                  \
    default:                    \
        CALL(F16);              \
    }

INLINE float normalized(float x, float m, float scale, float shift) {
    return (x - m) * scale + shift;
}

/* What is not a number stays. */
INLINE float activated(float value, const int activation) {
    return activation == RELU && value <= 0 ? 0 : value;
}

/* What the activation lets through of a gradient, which is read in any case: loops that read it
   only then take twice the time. `value` may be that before or after the activation. */
INLINE float let_through(float grad, float value, const int activation) {
    return activation == RELU && value <= 0 ? 0 : grad;
}

/* The loops over values that lie in a row. `step` is 0 where they belong to one channel, and 1
   where each belongs to the next. What is `ahead` values further on is fetched. */

INLINE void apply_to(
    const void *restrict x, const void *restrict residual, void *restrict y, int64_t from,
    int64_t count, int64_t ahead, const float *restrict m, const float *restrict scale,
    const float *restrict shift, const int step, const int dtype, const int activation
) {
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t end = smaller(start + CHUNK, count), next = from + start + ahead;
        fetch(x, next, end - start, dtype);
        fetch(y, next, end - start, dtype);
        if (residual)
            fetch(residual, next, end - start, dtype);
#pragma omp simd
        for (int64_t i = start; i < end; i++) {
            int64_t c = i * step;
            float value = normalized(get(x, from + i, dtype), m[c], scale[c], shift[c]);
            if (residual)
                value += get(residual, from + i, dtype);
            put(y, from + i, activated(value, activation), dtype);
        }
    }
}

/* `grad_x` may be `grad`. */
INLINE void apply_backward_to(
    const void *grad, const void *x, void *grad_x, int64_t from, int64_t count, int64_t ahead,
    const float *m, const float *scale, const float *shift, const float *q, const float *c,
    const int step, const int dtype, const int activation
) {
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t end = smaller(start + CHUNK, count), next = from + start + ahead;
        fetch(x, next, end - start, dtype);
        fetch(grad, next, end - start, dtype);
        fetch(grad_x, next, end - start, dtype);
#pragma omp simd
        for (int64_t i = start; i < end; i++) {
            int64_t j = i * step;
            float value = get(x, from + i, dtype);
            float g = let_through(
                get(grad, from + i, dtype), normalized(value, m[j], scale[j], shift[j]), activation
            );
            put(grad_x, from + i, (value - m[j]) * q[j] + c[j] + g * scale[j], dtype);
        }
    }
}

/* ------------------------------------------------------------------------------- rows of values */

/* `rows` rows of `count` values, `stride` values from one to the next: with `step` 0 those of one
   channel each, with `step` 1 those of as many channels. */

/* How far ahead of the values of a row others are fetched: of those in as many rows. */
static int64_t ahead_of_row(int64_t stride, int64_t count, int step) {
    return step ? blocks(AHEAD, count) * stride : AHEAD;
}

LOOP void apply(
    const Pass *pass, int64_t from, int64_t rows, int64_t stride, int64_t count, const float *m,
    const float *scale, const float *shift, int step
) {
    const void *x = pass->x, *residual = pass->residual;
    void *y = pass->y;
    int64_t ahead = ahead_of_row(stride, count, step);
#define APPLY_AS(dtype, step, activation)                                                       \
    for (int64_t row = 0; row < rows; row++) {                                                  \
        int64_t at = from + row * stride, c = step ? 0 : row;                                   \
        apply_to(                                                                               \
            x, residual, y, at, count, ahead, m + c, scale + c, shift + c, step, dtype,         \
            activation);                                                                        \
    }
#define APPLY(dtype)                      \
    if (step && pass->activation)         \
        APPLY_AS(dtype, 1, RELU)          \
    else if (step)                        \
        APPLY_AS(dtype, 1, NONE)          \
    else if (pass->activation)            \
        APPLY_AS(dtype, 0, RELU)          \
    else                                  \
        APPLY_AS(dtype, 0, NONE)
    WITH_DTYPE(pass->dtype, APPLY)
}

LOOP void apply_backward(
    const Pass *pass, int64_t from, int64_t rows, int64_t stride, int64_t count, const float *m,
    const float *scale, const float *shift, const float *q, const float *c, int step
) {
    /* What the activation kept back is gone from the gradient of the residual. */
    const void *grad = pass->grad_residual ? pass->grad_residual : pass->grad, *x = pass->x;
    void *grad_x = pass->grad_x;
    int activation = pass->grad_residual ? NONE : pass->activation;
    int64_t ahead = ahead_of_row(stride, count, step);
#define APPLY_BACKWARD_AS(dtype, step, activation)                                      \
    for (int64_t row = 0; row < rows; row++) {                                          \
        int64_t at = from + row * stride, i = step ? 0 : row;                           \
        apply_backward_to(                                                              \
            grad, x, grad_x, at, count, ahead, m + i, scale + i, shift + i, q + i,      \
            c + i, step, dtype, activation);                                            \
    }
#define APPLY_BACKWARD(dtype)             \
    if (step && activation)               \
        APPLY_BACKWARD_AS(dtype, 1, RELU) \
    else if (step)                        \
        APPLY_BACKWARD_AS(dtype, 1, NONE) \
    else if (activation)                  \
        APPLY_BACKWARD_AS(dtype, 0, RELU) \
    else                                  \
        APPLY_BACKWARD_AS(dtype, 0, NONE)
    WITH_DTYPE(pass->dtype, APPLY_BACKWARD)
}

/* -------------------------------------------------------------------------------------- moments */

/* Number of values, their mean, and the sum of squares around it. */
typedef struct {
    double count, mean, squares;
} Moments;

/* Of two sets (Chan, Golub and LeVeque). */
static Moments together(Moments a, Moments b) {
    double count = a.count + b.count, step = b.mean - a.mean;
    Moments all = {
        count, a.mean + step * (b.count / count),
        a.squares + b.squares + step * step * (a.count * b.count / count)
    };
    return all;
}

/* From the sums of deviations from some value, and of their squares. */
static Moments from_sums(double count, double center, double sum, double squares) {
    double step = sum / count;
    Moments moments = {count, center + step, squares - step * step * count};
    return moments;
}

/* Whether the value was far from the mean: the difference of squares has lost a digit, or they
   overflow. */
static int is_poor(Moments moments, double center) {
    double step = moments.mean - center;
    return step * step * moments.count > 8 * moments.squares || moments.squares > FLT_MAX;
}

/* In pairs: one after the other, each addition would wait for the last one. */
INLINE double total(const float lanes[LANES]) {
    float half[LANES / 2], quarter[LANES / 4];
#pragma omp simd
    for (int64_t i = 0; i < LANES / 2; i++)
        half[i] = lanes[i] + lanes[i + LANES / 2];
#pragma omp simd
    for (int64_t i = 0; i < LANES / 4; i++)
        quarter[i] = half[i] + half[i + LANES / 4];
    return ((double)quarter[0] + quarter[2]) + ((double)quarter[1] + quarter[3]);
}

INLINE Moments moments_around(
    const void *x, int64_t from, int64_t size, float center, const int dtype
) {
    float sum[LANES] = {0}, squares[LANES] = {0}, rest = 0, rest_squares = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        fetch(x, from + i + AHEAD, LANES, dtype);
#pragma omp simd
        for (int64_t lane = 0; lane < LANES; lane++) {
            float t = get(x, from + i + lane, dtype) - center;
            sum[lane] += t;
            squares[lane] += t * t;
        }
    }
    for (; i < size; i++) {
        float t = get(x, from + i, dtype) - center;
        rest += t;
        rest_squares += t * t;
    }
    return from_sums(size, center, total(sum) + rest, total(squares) + rest_squares);
}

/* Into the tables. What the mean loses in single precision counts far from zero, and is kept in the
   place of the shift until that is found. */
static void store_moments(Row row, int64_t c, Moments moments) {
    row.m[c] = moments.mean;
    row.v[c] = moments.squares / moments.count;
    row.shift[c] = moments.mean - row.m[c];
}

INLINE Moments moments_of_plane(const void *x, int64_t from, int64_t pixels, const int dtype) {
    Moments all = {0, 0, 0};
    for (int64_t start = 0; start < pixels; start += BLOCK) {
        int64_t at = from + start, size = smaller(BLOCK, pixels - start);
        float center = get(x, at, dtype);
        Moments block = moments_around(x, at, size, center, dtype);
        if (is_poor(block, center))
            block = moments_around(x, at, size, block.mean, dtype);
        all = start ? together(all, block) : block;
    }
    return all;
}

LOOP void find_moments_of_planes(const Pass *pass, int64_t n, int64_t first, int64_t count) {
    Row row = row_of(pass, n);
    int64_t from = n * pass->channels * pass->pixels;
#define FIND_MOMENTS(dtype)                                                                      \
    for (int64_t c = first; c < first + count; c++)                                              \
        store_moments(                                                                           \
            row, c, moments_of_plane(pass->x, from + c * pass->pixels, pass->pixels, dtype));
    WITH_DTYPE(pass->dtype, FIND_MOMENTS)
}

LOOP void add_rows(
    const void *x, int64_t from, int64_t rows, int64_t stride, int64_t count,
    const float *restrict center, float *restrict sum, float *restrict squares, int kind
) {
    int64_t ahead = ahead_of_row(stride, count, 1);
#define ADD_ROWS(dtype)                                     \
    for (int64_t row = 0; row < rows; row++) {              \
        int64_t at = from + row * stride;                   \
        fetch(x, at + ahead, count, dtype);                 \
        for (int64_t i = 0; i < count; i++) {               \
            float t = get(x, at + i, dtype) - center[i];    \
            sum[i] += t;                                    \
            squares[i] += t * t;                            \
        }                                                   \
    }
    WITH_DTYPE(kind, ADD_ROWS)
}

/* A part of an activation in channels_last. */
typedef struct {
    int64_t image, index; /* of its pixels among the blocks of the image */
    int64_t first, count; /* channels */
    int64_t from, rows;   /* its first value, and pixels */
} Part;

static int64_t parts_of(const Pass *pass) {
    return pass->images * blocks(pass->pixels, ROWS) * blocks(pass->channels, WIDTH);
}

static Part part_of(const Pass *pass, int64_t i) {
    int64_t columns = blocks(pass->channels, WIDTH), rows = blocks(pass->pixels, ROWS);
    Part part;
    part.first = i % columns * WIDTH;
    part.index = i / columns % rows;
    part.image = i / columns / rows;
    part.count = smaller(WIDTH, pass->channels - part.first);
    part.rows = smaller(ROWS, pass->pixels - part.index * ROWS);
    int64_t pixel = part.image * pass->pixels + part.index * ROWS;
    part.from = pixel * pass->channels + part.first;
    return part;
}

/* Where a part has its two tables in the scratch memory, (N, parts, 2, C). */
static double *table_of_part(const Pass *pass, double *scratch, const Part *part) {
    int64_t row = part->image * blocks(pass->pixels, ROWS) + part->index;
    return scratch + row * 2 * pass->channels + part->first;
}

static void find_moments_of_part(const Pass *pass, double *scratch, int64_t i) {
    Part part = part_of(pass, i);
    double *table = table_of_part(pass, scratch, &part);
    float center[WIDTH];
    for (int64_t c = 0; c < part.count; c++)
        center[c] = get(pass->x, part.from + c, pass->dtype);
    for (int again = 0; again < 2; again++) {
        float sum[WIDTH] = {0}, squares[WIDTH] = {0};
        add_rows(
            pass->x, part.from, part.rows, pass->channels, part.count, center, sum, squares,
            pass->dtype
        );
        int poor = 0;
        for (int64_t c = 0; c < part.count; c++) {
            Moments moments = from_sums(part.rows, center[c], sum[c], squares[c]);
            poor |= is_poor(moments, center[c]);
            center[c] = moments.mean;
            table[c] = moments.mean;
            table[pass->channels + c] = moments.squares;
        }
        if (!poor)
            break;
    }
}

/* The moments of an image, from those of its parts. */
static void combine_moments(const Pass *pass, const double *scratch, int64_t image) {
    int64_t channels = pass->channels, parts = blocks(pass->pixels, ROWS);
    Row row = row_of(pass, image);
    for (int64_t c = 0; c < channels; c++) {
        Moments all = {0, 0, 0};
        for (int64_t i = 0; i < parts; i++) {
            const double *table = scratch + (image * parts + i) * 2 * channels + c;
            Moments part = {smaller(ROWS, pass->pixels - i * ROWS), table[0], table[channels]};
            all = i ? together(all, part) : part;
        }
        store_moments(row, c, all);
    }
}

/* Those of each image and channel, by all threads of a team. */
static void find_moments(const Pass *pass, double *scratch) {
    if (pass->channels_last) {
#pragma omp for
        for (int64_t i = 0; i < parts_of(pass); i++)
            find_moments_of_part(pass, scratch, i);
#pragma omp for
        for (int64_t n = 0; n < pass->images; n++)
            combine_moments(pass, scratch, n);
    } else {
        int64_t planes = planes_of_call(pass);
#pragma omp for collapse(2)
        for (int64_t n = 0; n < pass->images; n++)
            for (int64_t c = 0; c < pass->channels; c += planes)
                find_moments_of_planes(pass, n, c, smaller(planes, pass->channels - c));
    }
}

/* Scratch memory for the tables of parts; without any, a null pointer and success. */
static int new_scratch(const Pass *pass, double **scratch) {
    *scratch = 0;
    if (!pass->channels_last)
        return 1;
    *scratch = malloc(
        pass->images * blocks(pass->pixels, ROWS) * 2 * pass->channels * sizeof **scratch
    );
    return *scratch != 0;
}

/* ------------------------------------------------------------------------------------ estimates */

static float moved(float from, float to, float rate) {
    /* As torch.lerp. */
    return rate < 0.5f ? from + rate * (to - from) : to - (to - from) * (1 - rate);
}

/* Moves the estimates of some channels towards the moments in the tables. Leaves the new ones in mu
   and, in the place of rstd, their variance. */
static void find_estimates(const Pass *pass, int64_t from, int64_t count) {
    double share = 1.0 / pass->images;
    const float *running_mean = pass->running_mean, *running_var = pass->running_var;
    for (int64_t first = from; first < from + count; first += WIDTH) {
        int64_t some = smaller(WIDTH, from + count - first);
        double means[WIDTH] = {0}, vars[WIDTH] = {0};
        for (int64_t n = 0; n < pass->images; n++) {
            Row row = row_of(pass, n);
            for (int64_t i = 0; i < some; i++) {
                double offset = (double)row.m[first + i] - running_mean[first + i];
                means[i] += row.m[first + i];
                vars[i] += row.v[first + i] + offset * offset;
            }
        }
        for (int64_t i = 0; i < some; i++) {
            int64_t c = first + i;
            mu_of(pass)[c] = moved(running_mean[c], means[i] * share, pass->rate);
            rstd_of(pass)[c] = moved(running_var[c], vars[i] * share, pass->rate);
        }
    }
}

/* Keeps the new estimates and returns 1, or returns to the old ones and 0 if any is not finite. */
static int keep_estimates(const Pass *pass) {
    int64_t channels = pass->channels;
    float *mu = mu_of(pass), *s2 = rstd_of(pass);
    float zero = 0; /* what is not finite is not a number when multiplied by zero */
#pragma omp simd reduction(+ : zero)
    for (int64_t c = 0; c < channels; c++)
        zero += 0 * mu[c] + 0 * s2[c];
    if (zero == 0) {
        memcpy(pass->running_mean, mu, channels * sizeof *mu);
        memcpy(pass->running_var, s2, channels * sizeof *s2);
        return 1;
    }
    memcpy(mu, pass->running_mean, channels * sizeof *mu);
    memcpy(s2, pass->running_var, channels * sizeof *s2);
    return 0;
}

/* From the variances that lie there. */
static void find_rstd(const Pass *pass, int64_t first, int64_t count) {
    float *rstd = rstd_of(pass);
    for (int64_t c = first; c < first + count; c++)
        rstd[c] = 1 / sqrtf(rstd[c] + (float)pass->eps);
}

/* --------------------------------------------------------------------------------- forward pass */

/* The tables of a group in an image, of which the moments are there. */
static void find_tables(const Pass *pass, int64_t n, int64_t g) {
    int64_t size = pass->channels / pass->groups, first = g * size, end = first + size;
    const float *mu = mu_of(pass), *rstd = rstd_of(pass), *weight = pass->weight;
    Row row = row_of(pass, n);
    double mean = 0, var = 0;
    for (int64_t c = first; c < end; c++) {
        row.d[c] = weight[c] * rstd[c] * (row.m[c] - mu[c] + row.shift[c]) + pass->bias[c];
        mean += row.d[c];
    }
    mean /= size;
    for (int64_t c = first; c < end; c++) {
        double a = weight[c] * rstd[c], d = row.d[c] - mean;
        row.d[c] = d;
        var += a * a * row.v[c] + d * d;
    }
    float r = 1 / sqrt(var / size + pass->eps), k = pass->group_weight[g] * r;
    row.r[g] = r;
    for (int64_t c = first; c < end; c++) {
        float lost = weight[c] * rstd[c] * row.shift[c];
        row.scale[c] = k * (weight[c] * rstd[c]);
        row.shift[c] = k * (row.d[c] - lost) + pass->group_bias[g];
    }
}

static void apply_to_planes(const Pass *pass, int64_t n, int64_t first, int64_t count) {
    Row row = row_of(pass, n);
    int64_t pixels = pass->pixels, from = (n * pass->channels + first) * pixels;
    apply(
        pass, from, count, pixels, pixels, row.m + first, row.scale + first, row.shift + first, 0
    );
}

static void apply_to_part(const Pass *pass, int64_t i) {
    Part part = part_of(pass, i);
    Row row = row_of(pass, part.image);
    apply(
        pass, part.from, part.rows, pass->channels, part.count, row.m + part.first,
        row.scale + part.first, row.shift + part.first, 1
    );
}

/* All of a group in an image, by one thread. */
static void normalize_group(const Pass *pass, int64_t n, int64_t g) {
    int64_t size = pass->channels / pass->groups;
    find_tables(pass, n, g);
    if (!pass->channels_last)
        apply_to_planes(pass, n, g * size, size);
}

/* The results of functions: memory is missing; done; done, but no estimate has moved, since one
   would not have been finite. */
enum { NO_MEMORY = -1, DONE, SKIPPED };

/* The moments, in the tables. */
int wsbcn_moments(const Pass *pass) {
    double *scratch;
    if (!new_scratch(pass, &scratch))
        return NO_MEMORY;
#pragma omp parallel num_threads(threads_for(pass))
    find_moments(pass, scratch);
    free(scratch);
    return DONE;
}

/* The output, and all tables. By the statistics of the batch: those are there, in mu and in the
   place of rstd, as are the moments. Otherwise by the estimates, as they are or updated. */
int wsbcn_forward(const Pass *pass) {
    int64_t channels = pass->channels, groups = pass->groups, size = channels / groups;
    int update = pass->statistics == UPDATED, skipped = 0;
    /* In NCHW a group is normalized while it is in the cache: if the estimates are given, or follow
       from that group, as they do with a single image. If one of any group is not finite then, all
       are normalized again. */
    int threads = threads_for(pass);
    int at_once = update && pass->images == 1 && !pass->channels_last && groups >= threads;
    int by_group = pass->statistics == FIXED && !pass->channels_last;
    double *scratch;
    if (!new_scratch(pass, &scratch))
        return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        if (at_once) {
#pragma omp for
            for (int64_t g = 0; g < groups; g++) {
                find_moments_of_planes(pass, 0, g * size, size);
                find_estimates(pass, g * size, size);
                find_rstd(pass, g * size, size);
                normalize_group(pass, 0, g);
            }
        } else if (pass->statistics != OF_BATCH && !by_group) {
            find_moments(pass, scratch);
        }
#pragma omp single
        {
            if (update) {
                find_estimates(pass, 0, channels);
                skipped = !keep_estimates(pass);
                if (!skipped && pass->seen_elements)
                    *pass->seen_elements += pass->images * pass->pixels;
            } else if (pass->statistics == FIXED) {
                memcpy(mu_of(pass), pass->running_mean, channels * sizeof(float));
                memcpy(rstd_of(pass), pass->running_var, channels * sizeof(float));
            }
            find_rstd(pass, 0, channels);
        }
        if (!at_once || skipped) {
#pragma omp for
            for (int64_t i = 0; i < pass->images * groups; i++) {
                if (by_group || at_once)
                    find_moments_of_planes(pass, i / groups, i % groups * size, size);
                normalize_group(pass, i / groups, i % groups);
            }
        }
        if (pass->channels_last) {
#pragma omp for
            for (int64_t i = 0; i < parts_of(pass); i++)
                apply_to_part(pass, i);
        }
    }
    free(scratch);
    return skipped ? SKIPPED : DONE;
}

/* The output once more, from the tables and without a residual. */
int wsbcn_again(const Pass *pass) {
    int64_t planes = planes_of_call(pass);
#pragma omp parallel num_threads(threads_for(pass))
    {
        if (pass->channels_last) {
#pragma omp for
            for (int64_t i = 0; i < parts_of(pass); i++)
                apply_to_part(pass, i);
        } else {
#pragma omp for collapse(2)
            for (int64_t n = 0; n < pass->images; n++)
                for (int64_t c = 0; c < pass->channels; c += planes)
                    apply_to_planes(pass, n, c, smaller(planes, pass->channels - c));
        }
    }
    return DONE;
}

/* -------------------------------------------------------------------------------- backward pass */

/* What the two passes of a gradient share, which Python gives memory for: for each image and
   channel the sums of dz and of dz (x - mu), and what the gradient of x takes from x and from
   nothing; for each image and group what the affine of the groups gets. */
typedef struct {
    float *dz, *dz_x, *q, *c, *u1, *u2;
} Sums;

static Sums sums_of(const Pass *pass) {
    int64_t rows = pass->images * pass->channels, groups = pass->images * pass->groups;
    float *first = pass->scratch;
    Sums sums = {
        first, first + rows, first + 2 * rows, first + 3 * rows, first + 4 * rows,
        first + 4 * rows + groups
    };
    return sums;
}

/* Adds a value of the gradient, without what the activation kept back, and that times x around m.
   With a residual y tells what was kept back, and the gradient of the residual is written. */
INLINE void add_gradient(
    const Pass *pass, int64_t i, float m, float scale, float shift, float *sum1, float *sum2,
    const int dtype, const int reads_y, const int activation
) {
    float x = get(pass->x, i, dtype), g = get(pass->grad, i, dtype);
    float value = reads_y ? get(pass->y, i, dtype) : normalized(x, m, scale, shift);
    g = let_through(g, value, activation);
    if (reads_y)
        put(pass->grad_residual, i, g, dtype);
    *sum1 += g;
    *sum2 += g * (x - m);
}

INLINE void fetch_gradient(
    const Pass *pass, int64_t from, int64_t count, const int dtype, const int reads_y,
    const int activation
) {
    fetch(pass->x, from, count, dtype);
    fetch(pass->grad, from, count, dtype);
    if (reads_y) {
        fetch(pass->y, from, count, dtype);
        fetch(pass->grad_residual, from, count, dtype);
    }
}

/* `CALL(dtype, reads_y, activation)` with constants. */
#define WITH_GRADIENT(dtype, CALL) \
    if (pass->grad_residual)       \
        CALL(dtype, 1, RELU)       \
    else if (pass->activation)     \
        CALL(dtype, 0, RELU)       \
    else                           \
        CALL(dtype, 0, NONE)

/* The sums of both over each of some planes. */
LOOP void sum_planes(
    const Pass *pass, int64_t from, int64_t planes, const float *m, const float *scale,
    const float *shift, float *s1, float *s2
) {
    for (int64_t plane = 0; plane < planes; plane++) {
        float mean = m[plane], gain = scale[plane], offset = shift[plane];
        double total1 = 0, total2 = 0;
        for (int64_t start = 0; start < pass->pixels; start += BLOCK) {
            int64_t i = from + plane * pass->pixels + start;
            int64_t end = i + smaller(BLOCK, pass->pixels - start);
            float sum1[LANES] = {0}, sum2[LANES] = {0}, rest1 = 0, rest2 = 0;
#define SUM_BLOCK(...)                                                                           \
    {                                                                                            \
        for (; i + LANES <= end; i += LANES) {                                                   \
            fetch_gradient(pass, i + AHEAD, LANES, __VA_ARGS__);                                 \
            _Pragma("omp simd")                                                                  \
            for (int64_t j = 0; j < LANES; j++)                                                  \
                add_gradient(pass, i + j, mean, gain, offset, sum1 + j, sum2 + j, __VA_ARGS__);  \
        }                                                                                        \
        for (; i < end; i++)                                                                     \
            add_gradient(pass, i, mean, gain, offset, &rest1, &rest2, __VA_ARGS__);              \
    }
#define SUM_PLANE(dtype) WITH_GRADIENT(dtype, SUM_BLOCK)
            WITH_DTYPE(pass->dtype, SUM_PLANE)
            total1 += total(sum1) + rest1;
            total2 += total(sum2) + rest2;
        }
        s1[plane] = total1;
        s2[plane] = total2;
    }
}

/* The same over rows of channels. */
LOOP void sum_rows(
    const Pass *pass, int64_t from, int64_t rows, int64_t count, const float *restrict m,
    const float *restrict scale, const float *restrict shift, float *restrict sum1,
    float *restrict sum2
) {
    int64_t ahead = ahead_of_row(pass->channels, count, 1);
#define SUM_ROW(...)                                                                             \
    for (int64_t row = 0; row < rows; row++) {                                                   \
        int64_t at = from + row * pass->channels;                                                \
        fetch_gradient(pass, at + ahead, count, __VA_ARGS__);                                    \
        _Pragma("omp simd")                                                                      \
        for (int64_t i = 0; i < count; i++)                                                      \
            add_gradient(                                                                        \
                pass, at + i, m[i], scale[i], shift[i], sum1 + i, sum2 + i, __VA_ARGS__);        \
    }
#define SUM_ROWS(dtype) WITH_GRADIENT(dtype, SUM_ROW)
    WITH_DTYPE(pass->dtype, SUM_ROWS)
}

static void sum_part(const Pass *pass, double *scratch, int64_t i) {
    Part part = part_of(pass, i);
    Row row = row_of(pass, part.image);
    float sum1[WIDTH] = {0}, sum2[WIDTH] = {0};
    sum_rows(
        pass, part.from, part.rows, part.count, row.m + part.first, row.scale + part.first,
        row.shift + part.first, sum1, sum2
    );
    double *table = table_of_part(pass, scratch, &part);
    for (int64_t c = 0; c < part.count; c++) {
        table[c] = sum1[c];
        table[pass->channels + c] = sum2[c];
    }
}

static void combine_sums(const Pass *pass, const double *scratch, int64_t image) {
    int64_t channels = pass->channels, parts = blocks(pass->pixels, ROWS);
    Sums sums = sums_of(pass);
    for (int64_t c = 0; c < channels; c++) {
        double s1 = 0, s2 = 0;
        for (int64_t i = 0; i < parts; i++) {
            const double *table = scratch + (image * parts + i) * 2 * channels + c;
            s1 += table[0];
            s2 += table[channels];
        }
        sums.dz[image * channels + c] = s1;
        sums.dz_x[image * channels + c] = s2;
    }
}

/* What follows from the sums of a group in an image, which are in the place of dz and dz_x. */
static void find_gradients(const Pass *pass, int64_t n, int64_t g) {
    int64_t size = pass->channels / pass->groups, first = g * size, end = first + size;
    int64_t pixels = pass->pixels, values = size * pixels, at = n * pass->channels;
    const float *mu = mu_of(pass), *rstd = rstd_of(pass), *weight = pass->weight;
    Row row = row_of(pass, n);
    Sums sums = sums_of(pass);
    float *s1 = sums.dz + at, *s2 = sums.dz_x + at;
    double r = row.r[g], k = pass->group_weight[g] * r, u1 = 0, u2 = 0;
    for (int64_t c = first; c < end; c++) {
        u1 += s1[c];
        u2 += weight[c] * rstd[c] * s2[c] + row.d[c] * s1[c];
    }
    u2 *= r;
    sums.u1[n * pass->groups + g] = u1;
    sums.u2[n * pass->groups + g] = u2;
    double f = -u2 * r / values;
    for (int64_t c = first; c < end; c++) {
        double fa = f * (weight[c] * rstd[c]), fd = f * row.d[c] - u1 / values;
        double dz = k * (s1[c] + fd * pixels);
        double dz_t = k * (s2[c] + fa * row.v[c] * pixels);
        s1[c] = dz;
        s2[c] = dz_t + (row.m[c] - mu[c]) * dz;
        sums.q[at + c] = fa * row.scale[c];
        sums.c[at + c] = fd * row.scale[c];
    }
}

static void apply_backward_to_planes(const Pass *pass, int64_t n, int64_t first, int64_t count) {
    Row row = row_of(pass, n);
    Sums sums = sums_of(pass);
    int64_t i = n * pass->channels + first, pixels = pass->pixels;
    apply_backward(
        pass, i * pixels, count, pixels, pixels, row.m + first, row.scale + first,
        row.shift + first, sums.q + i, sums.c + i, 0
    );
}

static void apply_backward_to_part(const Pass *pass, int64_t i) {
    Part part = part_of(pass, i);
    Row row = row_of(pass, part.image);
    Sums sums = sums_of(pass);
    int64_t at = part.image * pass->channels + part.first;
    apply_backward(
        pass, part.from, part.rows, pass->channels, part.count, row.m + part.first,
        row.scale + part.first, row.shift + part.first, sums.q + at, sums.c + at, 1
    );
}

static void sum_images(const float *table, int64_t images, int64_t size, float *result) {
    for (int64_t first = 0; first < size; first += WIDTH) {
        int64_t count = smaller(WIDTH, size - first);
        double sums[WIDTH] = {0};
        for (int64_t n = 0; n < images; n++)
            for (int64_t i = 0; i < count; i++)
                sums[i] += table[n * size + first + i];
        for (int64_t i = 0; i < count; i++)
            result[first + i] = sums[i];
    }
}

/* The gradients of the parameters (weight, bias, group_weight, group_bias, one after the
   other), and those of x and the residual. The gradient of x is left to the next function if it
   takes the statistics of the batch into account. */
int wsbcn_backward(const Pass *pass) {
    int64_t images = pass->images, channels = pass->channels, groups = pass->groups;
    int64_t size = channels / groups;
    int with_x = pass->statistics != OF_BATCH;
    double *scratch;
    if (!new_scratch(pass, &scratch))
        return NO_MEMORY;
    Sums sums = sums_of(pass);
#pragma omp parallel num_threads(threads_for(pass))
    {
        if (pass->channels_last) {
#pragma omp for
            for (int64_t i = 0; i < parts_of(pass); i++)
                sum_part(pass, scratch, i);
#pragma omp for
            for (int64_t n = 0; n < images; n++) {
                combine_sums(pass, scratch, n);
                for (int64_t g = 0; g < groups; g++)
                    find_gradients(pass, n, g);
            }
#pragma omp for
            for (int64_t i = 0; i < (with_x ? parts_of(pass) : 0); i++)
                apply_backward_to_part(pass, i);
        } else {
#pragma omp for
            for (int64_t i = 0; i < images * groups; i++) {
                int64_t n = i / groups, first = i % groups * size, at = n * channels + first;
                Row row = row_of(pass, n);
                sum_planes(
                    pass, at * pass->pixels, size, row.m + first, row.scale + first,
                    row.shift + first, sums.dz + at, sums.dz_x + at
                );
                find_gradients(pass, n, i % groups);
                if (with_x)
                    apply_backward_to_planes(pass, n, first, size);
            }
        }
    }
    free(scratch);
    float *parameters = pass->parameters;
    sum_images(sums.dz_x, images, channels, parameters);
    sum_images(sums.dz, images, channels, parameters + channels);
    sum_images(sums.u2, images, groups, parameters + 2 * channels);
    sum_images(sums.u1, images, groups, parameters + 2 * channels + groups);
    for (int64_t c = 0; c < channels; c++)
        parameters[c] *= rstd_of(pass)[c];
    return DONE;
}

/* The gradient of x with that through the statistics of the batch. In: what wsbcn_backward
   left, and in `parameters` the gradients of weight and bias, and in `count` the number of
   values behind the statistics, of all ranks. */
int wsbcn_backward_through_batch(const Pass *pass) {
    int64_t channels = pass->channels, planes = planes_of_call(pass);
    Sums sums = sums_of(pass);
#pragma omp parallel num_threads(threads_for(pass))
    {
#pragma omp for
        for (int64_t n = 0; n < pass->images; n++) {
            Row row = row_of(pass, n);
            float *q = sums.q + n * channels, *offset = sums.c + n * channels;
            for (int64_t c = 0; c < channels; c++) {
                double rstd = rstd_of(pass)[c], a = pass->weight[c] * rstd / pass->count;
                double from_weight = a * rstd * pass->parameters[c];
                q[c] -= from_weight;
                offset[c] -= a * pass->parameters[channels + c]
                             + (row.m[c] - mu_of(pass)[c]) * from_weight;
            }
        }
        if (pass->channels_last) {
#pragma omp for
            for (int64_t i = 0; i < parts_of(pass); i++)
                apply_backward_to_part(pass, i);
        } else {
#pragma omp for collapse(2)
            for (int64_t n = 0; n < pass->images; n++)
                for (int64_t c = 0; c < channels; c += planes)
                    apply_backward_to_planes(pass, n, c, smaller(planes, channels - c));
        }
    }
    return DONE;
}

/* -------------------------------------------------------------------------- weight standardization

   Filters are the planes of one image. Of its tables, m, v, scale and shift are used. */

/* The standardized filters y of the weight x, and the tables. */
int wsbcn_standardize(const Pass *pass) {
    Row row = row_of(pass, 0);
#pragma omp parallel for num_threads(threads_for(pass))
    for (int64_t i = 0; i < pass->channels; i++) {
        find_moments_of_planes(pass, 0, i, 1);
        row.scale[i] = 1 / sqrt(row.v[i] + pass->eps);
        row.shift[i] *= -row.scale[i];
        apply_to_planes(pass, 0, i, 1);
    }
    return DONE;
}

/* The gradient of the weight, which may be in the place of that of the filters. */
int wsbcn_standardize_backward(const Pass *pass) {
    int64_t size = pass->pixels;
    Row row = row_of(pass, 0);
#pragma omp parallel for num_threads(threads_for(pass))
    for (int64_t i = 0; i < pass->channels; i++) {
        const float *m = row.m + i, *scale = row.scale + i, *shift = row.shift + i;
        double rstd = *scale;
        float sum, sum_x;
        sum_planes(pass, i * size, 1, m, scale, shift, &sum, &sum_x);
        double mean = sum / size, mean_y = (rstd * sum_x + *shift * sum) / size;
        float q = -rstd * rstd * mean_y, c = -rstd * (mean + *shift * mean_y);
        apply_backward(pass, i * size, 1, size, size, m, scale, shift, &q, &c, 0);
    }
    return DONE;
}

/* For native_backend.py to see whether it has the same idea of the arguments. */
int wsbcn_size_of_pass(void) {
    return sizeof(Pass);
}
