/* A mixture of experts on packed weights:
 *
 *     h = up_e x        y = sum_k w_k down_e (function(h_gate) * h_up)        e = ids[token, k], w = weights
 *
 * The assignments of tokens to experts are sorted by expert; one of them is a slot. All experts of a batch of slots are
 * multiplied as one list, first with `up`, then with `down`: a token with 8 experts of 128 makes the threads meet twice
 * instead of 16 times. The activation is applied where the second product brings its x into the layout of its kernels.
 *
 * h and the rows that `down` makes are rounded to the dtype of x, as in a model that runs one module after the other; the
 * sum over experts is float32, in ascending order of the experts, rounded once.
 */
#include <string.h>

#include "buffer.h"
#include "parallel.h"
#include "product.h"
#include "rows.h"

/* Memory: slots of a batch, sums of a group of tokens. A batch of 64 MB has 660 slots of bf16 where hidden is 4096 and
 * the intermediate size 14336. */
enum { SLOT_BYTES = 64 << 20, SUM_BYTES = 32 << 20, MAX_TOKENS = 4096, SUM_COLUMNS = 256, ALIGNMENT = 64 };

/* Results besides 0; the Python side makes sentences of them. */
enum { BAD_ID = -1, BAD_UP = -2, BAD_DOWN = -3, BAD_DTYPE = -4, NO_MEMORY = -5 };

/* The weights of all experts: expert e lies in bytes spans[2 e] to spans[2 e + 1] and is (m, n). */
typedef struct {
    const char *start;
    int64_t bytes;
    const int64_t *spans;
    int64_t m, n;
} stack;

typedef struct {
    stack up, down;
    int64_t experts, k, hidden, intermediate, ldx;
    int dtype, size, function, gated, id_bytes, threads;
    /* of a group of tokens */
    const char *x, *ids;
    const float *weights;
    char *y;
    int64_t tokens;
    /* in the buffer */
    int64_t *starts;    /* [experts + 2]: slots starts[e] to starts[e + 1] are those of expert e */
    int32_t *slot_token; /* [slots] */
    float *slot_weight; /* [slots] */
    float *sums;        /* [tokens, sum_ld] */
    int64_t sum_ld, x_bytes, limit; /* limit: slots of a batch */
    struct segment *segments;
    srt_product *products;
    char *prepared, *h, *out; /* [limit] of x_bytes, of the rows of up, of hidden */
    int64_t batch, batch_slots; /* first slot and number of slots of the batch */
} job;

/* The slots of one expert in a batch. */
typedef struct segment {
    const job *job;
    int64_t expert, first, slots;
    char *h, *out;
} segment;

/* ---- assignments ---------------------------------------------------------------------------------------------- */

static int64_t id_at(const job *j, int64_t assignment)
{
    int32_t narrow;
    int64_t wide;
    if (j->id_bytes == 4)
        return memcpy(&narrow, j->ids + 4 * assignment, 4), narrow;
    return memcpy(&wide, j->ids + 8 * assignment, 8), wide;
}

/* Sorts the assignments of the group by expert; in one expert they keep their order. 0, or BAD_ID and the id. */
static int sort_assignments(job *j, int64_t *culprit)
{
    memset(j->starts, 0, sizeof *j->starts * (size_t)(j->experts + 2));
    for (int64_t a = 0; a < j->tokens * j->k; a++) {
        int64_t id = id_at(j, a);
        if (id < -1 || id >= j->experts)
            return *culprit = id, BAD_ID;
        if (id >= 0)
            j->starts[id + 2]++;
    }
    for (int64_t e = 1; e < j->experts + 1; e++)
        j->starts[e + 1] += j->starts[e];
    for (int64_t a = 0; a < j->tokens * j->k; a++) {
        int64_t id = id_at(j, a);
        if (id < 0)
            continue;
        int64_t slot = j->starts[id + 1]++; /* the start of expert id moves to its end, which is the start of the next */
        j->slot_token[slot] = (int32_t)(a / j->k);
        j->slot_weight[slot] = j->weights[a];
    }
    return 0;
}

/* The weight of an expert, or NULL where the span or what it holds is wrong. */
static const srt_packed *weight_of(const stack *s, int64_t expert)
{
    int64_t start = s->spans[2 * expert], stop = s->spans[2 * expert + 1];
    if (start < 0 || stop < start || stop > s->bytes || (uintptr_t)(s->start + start) % 8)
        return NULL;
    return srt_packed_kind(s->start + start, stop - start, s->m, s->n) < 0 ? NULL : (const void *)(s->start + start);
}

static int check_weights(const job *j, int64_t *culprit)
{
    for (int64_t e = 0; e < j->experts; e++) {
        if (j->starts[e] == j->starts[e + 1])
            continue;
        *culprit = e;
        const srt_packed *up = weight_of(&j->up, e), *down = weight_of(&j->down, e);
        if (!up || !down)
            return up ? BAD_DOWN : BAD_UP;
        if (up->dtype != j->dtype || down->dtype != j->dtype)
            return BAD_DTYPE;
    }
    return 0;
}

/* ---- a batch of slots ----------------------------------------------------------------------------------------- */

/* x of a slot. It lies where the result of `down` will lie: by then it has been multiplied. */
static void gather(void *context, int64_t start, int64_t stop)
{
    const segment *s = context;
    int64_t bytes = s->job->hidden * s->job->size, step = s->job->ldx * s->job->size;
    for (int64_t t = start; t < stop; t++)
        memcpy(s->out + t * bytes, s->job->x + s->job->slot_token[s->first + t] * step, (size_t)bytes);
}

static void activate(void *context, int64_t start, int64_t stop)
{
    const segment *s = context;
    const job *j = s->job;
    for (int64_t t = start; t < stop; t++) {
        char *h = s->h + t * j->up.m * j->size;
        srt_chosen_tiles()->activate(j->function, j->dtype, h, j->gated ? h + j->intermediate * j->size : NULL,
                                     j->intermediate);
    }
}

/* The slots from `first` on that make the next batch: as many whole experts as fit, or a part of one that does not. */
static int64_t batch_end(const job *j, int64_t first)
{
    int64_t last = first;
    for (int64_t e = 0; e < j->experts; e++)
        if (j->starts[e + 1] > first && j->starts[e + 1] - first <= j->limit)
            last = j->starts[e + 1];
    return last > first ? last : first + j->limit;
}

static int64_t cut_segments(job *j)
{
    int64_t count = 0, stop = j->batch + j->batch_slots;
    for (int64_t e = 0; e < j->experts; e++) {
        int64_t first = j->starts[e] > j->batch ? j->starts[e] : j->batch, last = srt_min(j->starts[e + 1], stop);
        if (first >= last)
            continue;
        int64_t at = first - j->batch;
        j->segments[count++] = (segment){.job = j, .expert = e, .first = first, .slots = last - first,
                                         .h = j->h + at * j->up.m * j->size,
                                         .out = j->out + at * j->hidden * j->size};
    }
    return count;
}

static srt_product product_of(const job *j, const stack *weights, const segment *s)
{
    return (srt_product){.w = weight_of(weights, s->expert), .tokens = s->slots, .context = (void *)s,
                         .prepared = j->prepared + (s->first - j->batch) * j->x_bytes};
}

static void multiply_batch(job *j)
{
    int64_t count = cut_segments(j);
    for (int64_t i = 0; i < count; i++) {
        srt_product up = product_of(j, &j->up, j->segments + i);
        up.fill = gather, up.x = j->segments[i].out, up.ldx = j->hidden;
        up.y = j->segments[i].h, up.ldy = j->up.m;
        j->products[i] = up;
    }
    srt_multiply(j->products, count, j->threads);
    for (int64_t i = 0; i < count; i++) {
        srt_product down = product_of(j, &j->down, j->segments + i);
        down.fill = activate, down.x = j->segments[i].h, down.ldx = j->up.m;
        down.y = j->segments[i].out, down.ldy = j->hidden;
        j->products[i] = down;
    }
    srt_multiply(j->products, count, j->threads);
}

/* ---- the sum over experts ------------------------------------------------------------------------------------- */

/* Some columns of all slots of the batch, in their order. */
static void add_columns(void *context, int64_t chunk)
{
    const job *j = context;
    int64_t column = chunk * SUM_COLUMNS, count = srt_min(j->hidden - column, SUM_COLUMNS);
    for (int64_t s = 0; s < j->batch_slots; s++)
        srt_chosen_tiles()->add_scaled(j->sums + j->slot_token[j->batch + s] * j->sum_ld + column,
                                       j->slot_weight[j->batch + s],
                                       j->out + (s * j->hidden + column) * j->size, count, j->dtype);
}

static void round_token(void *context, int64_t token)
{
    const job *j = context;
    srt_chosen_tiles()->store(j->sums + token * j->sum_ld, NULL, j->y + token * j->hidden * j->size, j->hidden,
                              j->dtype);
}

static int threads_for_sums(const job *j, int64_t rows)
{
    return rows * j->hidden < SRT_SERIAL_BELOW ? 1 : j->threads;
}

static int run_group(job *j, int64_t *culprit)
{
    int result = sort_assignments(j, culprit);
    if (result == 0)
        result = check_weights(j, culprit);
    if (result != 0)
        return result;
    memset(j->sums, 0, sizeof(float) * (size_t)(j->tokens * j->sum_ld));
    int64_t slots = j->starts[j->experts];
    for (j->batch = 0; j->batch < slots; j->batch += j->batch_slots) {
        j->batch_slots = batch_end(j, j->batch) - j->batch;
        multiply_batch(j);
        srt_parallel(threads_for_sums(j, j->batch_slots), srt_divide_up(j->hidden, SUM_COLUMNS), add_columns, j);
    }
    srt_parallel(threads_for_sums(j, j->tokens), j->tokens, round_token, j);
    return 0;
}

/* ---- memory --------------------------------------------------------------------------------------------------- */

/* `count` elements behind *at, which moves; with a start of NULL this counts bytes. */
static void *take(char *start, int64_t *at, int64_t count, size_t size)
{
    char *here = start ? start + *at : NULL;
    *at += srt_round_up(count * (int64_t)size, ALIGNMENT);
    return here;
}

static int64_t lay_out(job *j, char *start, int64_t tokens)
{
    int64_t at = 0, slots = tokens * j->k, most = srt_min(j->experts, j->limit);
    j->starts = take(start, &at, j->experts + 2, sizeof *j->starts);
    j->slot_token = take(start, &at, slots, sizeof *j->slot_token);
    j->slot_weight = take(start, &at, slots, sizeof *j->slot_weight);
    j->segments = take(start, &at, most, sizeof *j->segments);
    j->products = take(start, &at, most, sizeof *j->products);
    j->sums = take(start, &at, tokens * j->sum_ld, sizeof *j->sums);
    j->prepared = take(start, &at, j->limit, (size_t)j->x_bytes);
    j->h = take(start, &at, j->limit, (size_t)(j->up.m * j->size));
    j->out = take(start, &at, j->limit, (size_t)(j->hidden * j->size));
    return at;
}

/* Chooses how many slots a batch has and takes the memory for groups of `tokens` tokens. */
static int reserve(job *j, int64_t tokens, int64_t *culprit)
{
    int64_t of_up = srt_x_bytes(j->dtype, j->hidden), of_down = srt_x_bytes(j->dtype, j->intermediate);
    j->x_bytes = of_up > of_down ? of_up : of_down;
    int64_t slot_bytes = j->x_bytes + (j->up.m + j->hidden) * j->size, fit = SLOT_BYTES / slot_bytes;
    j->limit = srt_min(tokens * j->k, fit > 1 ? fit : 1);
    *culprit = lay_out(j, NULL, tokens);
    char *start = srt_thread_buffer(*culprit);
    if (!start)
        return NO_MEMORY;
    lay_out(j, start, tokens);
    return 0;
}

/* ---- the C ABI ------------------------------------------------------------------------------------------------ */

/* y [tokens, hidden], as above. x has ldx elements between tokens; weights [tokens, k]; ids [tokens, k] of id_bytes 4 or
 * 8, -1 for an expert that adds nothing; spans [experts, 2]. Returns 0, or a negative number with the id, the expert or
 * the bytes that it is about in *culprit; y is undefined then. */
EXPORT int srt_packed_experts(const void *x, int64_t ldx, int64_t tokens, int64_t hidden, int dtype,
                              const float *weights, const void *ids, int id_bytes, int64_t k, const void *up,
                              int64_t up_bytes, const int64_t *up_spans, const void *down, int64_t down_bytes,
                              const int64_t *down_spans, int64_t experts, int64_t intermediate, int function, int gated,
                              void *y, int64_t *culprit, int threads)
{
    job j = {.experts = experts, .k = k, .hidden = hidden, .intermediate = intermediate, .ldx = ldx, .dtype = dtype,
             .size = srt_element_size(dtype), .function = function, .gated = gated, .id_bytes = id_bytes,
             .threads = threads, .sum_ld = srt_round_up(hidden, SRT_PANEL)}; /* whole vectors are read from the sums */
    j.up = (stack){up, up_bytes, up_spans, gated ? 2 * intermediate : intermediate, hidden};
    j.down = (stack){down, down_bytes, down_spans, hidden, intermediate};
    int64_t fit = srt_min(MAX_TOKENS, SUM_BYTES / (j.sum_ld * (int64_t)sizeof(float)));
    int64_t groups = srt_divide_up(tokens, fit > 1 ? fit : 1);
    int result = tokens > 0 ? reserve(&j, srt_divide_up(tokens, groups), culprit) : 0;
    for (int64_t group = 0; group < groups && result == 0; group++) {
        int64_t start = tokens * group / groups;
        j.tokens = tokens * (group + 1) / groups - start;
        j.x = (const char *)x + start * ldx * j.size;
        j.y = (char *)y + start * hidden * j.size;
        j.weights = weights + start * k;
        j.ids = (const char *)ids + start * k * id_bytes;
        result = run_group(&j, culprit);
    }
    return result;
}
