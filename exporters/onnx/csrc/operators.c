/* The operators of domain sparse_rt as custom operators of ONNX Runtime; functions.py describes them.
 *
 * A registered operator hides the model's function of the same name, with every type that is not registered too. So
 * each operator exists for every activation type, and the values may have any type until they are looked at. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "export.h"
#include "linear.h"
#include "ort_api.h"

enum { MAX_INPUTS = 5, MAX_DIMS = 8, SRT_TEXT = SRT_MESSAGE + 128 };
/* accuracy_level of BitmaskLinearQ means what it means in ONNX Runtime's MatMulNBits; every other one is float. */
enum { INT8_ACTIVATIONS = 4 };

typedef struct {
    OrtCustomOp base; /* first: ONNX Runtime hands its address back */
    const char *name, *metadata;
    int x_type, kind, quantized;
    size_t inputs;
} operator;

typedef struct {
    const OrtApi *api;
    const operator *op;
    int64_t in_features, group_size, accuracy_level;
    int constant;         /* values and metadata are initializers: they are checked once */
    atomic_int checked;   /* at the first call: the file is not read while the model is loaded */
} kernel;

typedef struct {
    const void *data;
    int64_t dims[MAX_DIMS], count;
    size_t rank;
    int type;
} tensor;

static atomic_llong calls;

/* How often one of the kernels ran in this process. */
EXPORT int64_t sparse_rt_ort_calls(void) { return atomic_load(&calls); }

/* The instruction set that they use, and the choice of another: 0, or -1 where the processor has none of that name. */
EXPORT const char *sparse_rt_ort_isa(void) { return srt_chosen_linear()->rows->name; }
EXPORT int sparse_rt_ort_use_isa(const char *name) { return srt_use_linear(name); }

/* ---- errors and tensors --------------------------------------------------------------------------------------- */

static OrtStatus *refuse(const kernel *k, const char *message)
{
    char text[SRT_TEXT];
    snprintf(text, sizeof text, "sparse_rt.%s: %s", k->op->name, message);
    return k->api->CreateStatus(ORT_INVALID_ARGUMENT, text);
}

static int number_of(int type)
{
    return type == ORT_FLOAT ? SRT_FP32 : type == ORT_FLOAT16 ? SRT_FP16 : type == ORT_BFLOAT16 ? SRT_BF16 : -1;
}

static OrtStatus *describe(const kernel *k, const OrtValue *value, tensor *out)
{
    OrtTensorTypeAndShapeInfo *info = NULL;
    OrtStatus *status = k->api->GetTensorTypeAndShape(value, &info);
    if (status)
        return status;
    status = k->api->GetTensorElementType(info, &out->type);
    if (!status)
        status = k->api->GetDimensionsCount(info, &out->rank);
    if (!status && out->rank > MAX_DIMS)
        status = refuse(k, "an input has more than 8 dimensions");
    if (!status)
        status = k->api->GetDimensions(info, out->dims, out->rank);
    k->api->ReleaseTensorTypeAndShapeInfo(info);
    out->count = 1;
    for (size_t i = 0; i < out->rank && !status; i++)
        out->count *= out->dims[i];
    return status;
}

static OrtStatus *get_input(const kernel *k, OrtKernelContext *context, size_t index, tensor *out)
{
    const OrtValue *value = NULL;
    void *data = NULL;
    OrtStatus *status = k->api->KernelContext_GetInput(context, index, &value);
    if (!status && value == NULL)
        status = refuse(k, "an input is missing");
    if (!status)
        status = describe(k, value, out);
    if (!status)
        status = k->api->GetTensorMutableData((OrtValue *)value, &data); /* of an input it is only read */
    out->data = data;
    return status;
}

/* ---- the weight ----------------------------------------------------------------------------------------------- */

/* Metadata of a compressed weight that fits x; `out` gets its rows. */
static OrtStatus *rows_of_metadata(const kernel *k, const tensor in[MAX_INPUTS], int64_t *out)
{
    const tensor *meta = in + 2, *offsets = in + 3;
    char text[SRT_MESSAGE];
    int64_t width = (k->in_features + 7) / 8;
    if (meta->rank != 2 || meta->dims[1] != width) {
        snprintf(text, sizeof text, "%s must be [rows, %lld] for %lld columns, it has %zu dimensions, the last of %lld",
                 k->op->metadata, (long long)width, (long long)k->in_features, meta->rank,
                 (long long)(meta->rank ? meta->dims[meta->rank - 1] : 0));
        return refuse(k, text);
    }
    *out = meta->dims[0];
    if (k->op->kind == SRT_KEEP_BITMASK && offsets->count != *out + 1) {
        snprintf(text, sizeof text, "row_offsets has %lld entries, %s of %lld rows needs %lld",
                 (long long)offsets->count, k->op->metadata, (long long)*out, (long long)*out + 1);
        return refuse(k, text);
    }
    if (k->op->kind == SRT_KEEP_PAIRS && k->in_features % 4)
        return refuse(k, "in_features of a 2:4 weight must be a multiple of 4");
    return NULL;
}

/* The rows of a dense weight that fits x. */
static OrtStatus *rows_of_dense(const kernel *k, const tensor *weight, int64_t *out)
{
    char text[SRT_MESSAGE];
    if (weight->rank == 2 && weight->dims[1] == k->in_features)
        return *out = weight->dims[0], NULL;
    snprintf(text, sizeof text, "weight must be [rows, %lld], it has %zu dimensions, the last of %lld",
             (long long)k->in_features, weight->rank, (long long)(weight->rank ? weight->dims[weight->rank - 1] : 0));
    return refuse(k, text);
}

static OrtStatus *scales_of(const kernel *k, const tensor *scales, srt_weight *w)
{
    char text[SRT_MESSAGE];
    w->group = k->group_size ? k->group_size : w->n;
    w->scales = scales->data, w->rounds_x = k->accuracy_level == INT8_ACTIVATIONS;
    if (k->group_size != 0 && k->group_size != 64 && k->group_size != 128 && k->group_size != 256) {
        snprintf(text, sizeof text, "group_size is %lld; allowed are 0 (a scale for each row), 64, 128 and 256",
                 (long long)k->group_size);
        return refuse(k, text);
    }
    int64_t groups = srt_divide_up(w->n, w->group);
    if (scales->rank == 2 && scales->dims[0] == w->m && scales->dims[1] == groups)
        return NULL;
    snprintf(text, sizeof text, "scales must be [%lld, %lld], it has %zu dimensions and %lld entries", (long long)w->m,
             (long long)groups, scales->rank, (long long)scales->count);
    return refuse(k, text);
}

/* Shapes that fit together; then `w` may be checked by srt_check_weight. */
static OrtStatus *weight_of(const kernel *k, const tensor in[MAX_INPUTS], srt_weight *w)
{
    const tensor *x = in, *values = in + 1;
    char text[SRT_MESSAGE];
    int64_t n = k->in_features, m = 0;
    if (n < 1 || x->rank < 1 || x->dims[x->rank - 1] != n) {
        snprintf(text, sizeof text, "x ends in %lld columns, in_features is %lld",
                 (long long)(x->rank ? x->dims[x->rank - 1] : 0), (long long)n);
        return refuse(k, text);
    }
    OrtStatus *status = k->op->kind == SRT_KEEP_ALL ? rows_of_dense(k, values, &m) : rows_of_metadata(k, in, &m);
    if (status)
        return status;
    int dtype = k->op->quantized ? SRT_INT8 : number_of(values->type);
    if (dtype < 0)
        return refuse(k, "values must be float, float16 or bfloat16");
    *w = (srt_weight){.values = values->data, .m = m, .n = n, .kind = k->op->kind, .dtype = dtype};
    w->values_end = w->values + values->count * srt_value_bytes(dtype);
    w->meta = k->op->kind == SRT_KEEP_ALL ? NULL : in[2].data;
    w->offsets = k->op->kind == SRT_KEEP_BITMASK ? in[3].data : NULL;
    return k->op->quantized ? scales_of(k, in + 4, w) : NULL;
}

static OrtStatus *check_once(kernel *k, const srt_weight *w, int64_t values)
{
    char text[SRT_MESSAGE];
    if (k->constant && atomic_load(&k->checked))
        return NULL;
    if (srt_check_weight(w, values, text) != 0)
        return refuse(k, text);
    atomic_store(&k->checked, 1);
    return NULL;
}

/* ---- a call --------------------------------------------------------------------------------------------------- */

typedef struct {
    const kernel *kernel;
    OrtKernelContext *context;
    OrtStatus *status;
} call;

static int spread(void *threads, void (*run)(void *data, size_t index), size_t count, void *data)
{
    call *c = threads;
    c->status = c->kernel->api->KernelContext_ParallelFor(c->context, run, count, 0, data);
    return c->status ? -1 : 0;
}

static OrtStatus *compute(void *instance, OrtKernelContext *context)
{
    kernel *k = instance;
    tensor in[MAX_INPUTS] = {0};
    srt_weight w;
    OrtStatus *status = NULL;
    for (size_t i = 0; i < k->op->inputs && !status; i++)
        status = get_input(k, context, i, in + i);
    if (!status)
        status = weight_of(k, in, &w);
    if (!status)
        status = check_once(k, &w, in[1].count);
    if (status)
        return status;
    OrtValue *output = NULL;
    void *y = NULL;
    int64_t tokens = in->count / w.n;
    in->dims[in->rank - 1] = w.m;
    status = k->api->KernelContext_GetOutput(context, 0, in->dims, in->rank, &output);
    if (!status)
        status = k->api->GetTensorMutableData(output, &y);
    if (status)
        return status;
    atomic_fetch_add(&calls, 1);
    call c = {.kernel = k, .context = context};
    if (srt_multiply_rows(&w, in->data, tokens, y, number_of(in->type), spread, &c) != 0)
        return c.status ? c.status : k->api->CreateStatus(ORT_FAIL, "sparse_rt: no memory for the activations");
    return NULL;
}

static void compute_v1(void *instance, OrtKernelContext *context)
{
    kernel *k = instance;
    OrtStatus *status = compute(instance, context);
    if (status)
        k->api->ReleaseStatus(status); /* never called: every runtime that we register with knows KernelComputeV2 */
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out)
{
    kernel *k = calloc(1, sizeof *k);
    if (k == NULL)
        return api->CreateStatus(ORT_FAIL, "sparse_rt: no memory for a kernel");
    k->api = api, k->op = (const operator *)op, k->constant = 1;
    OrtStatus *status = api->KernelInfoGetAttribute_int64(info, "in_features", &k->in_features);
    if (!status && k->op->quantized)
        status = api->KernelInfoGetAttribute_int64(info, "group_size", &k->group_size);
    if (!status && k->op->quantized)
        status = api->KernelInfoGetAttribute_int64(info, "accuracy_level", &k->accuracy_level);
    for (size_t i = 1; i < k->op->inputs && !status; i++) {
        const OrtValue *value = NULL;
        int constant = 0;
        status = api->KernelInfoGetConstantInput_tensor(info, i, &constant, &value);
        k->constant &= constant;
    }
    if (status)
        free(k);
    else
        *out = k;
    return status;
}

static void *create_v1(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info)
{
    void *k = NULL;
    OrtStatus *status = create(op, api, info, &k);
    if (status)
        api->ReleaseStatus(status);
    return k;
}

/* ---- the table of operators ----------------------------------------------------------------------------------- */

static const char *name_of(const OrtCustomOp *op) { return ((const operator *)op)->name; }
static const char *on_cpu(const OrtCustomOp *op) { return (void)op, NULL; }
static int input_type(const OrtCustomOp *op, size_t index)
{
    const operator *of = (const operator *)op;
    const int values = of->quantized ? ORT_INT8 : ORT_UNDEFINED;
    const int types[MAX_INPUTS] = {of->x_type, values, ORT_UINT8, ORT_INT32, ORT_FLOAT};
    return types[index];
}
static size_t input_count(const OrtCustomOp *op) { return ((const operator *)op)->inputs; }
static int output_type(const OrtCustomOp *op, size_t index) { return (void)index, ((const operator *)op)->x_type; }
static size_t output_count(const OrtCustomOp *op) { return (void)op, 1; }
static int of_index_zero(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }
static int any_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

#define OPERATOR(NAME, METADATA, KIND, INPUTS, TYPE)                                                                   \
    {                                                                                                                  \
        .base = {.version = ORT_API_VERSION, .CreateKernel = create_v1, .GetName = name_of,                            \
                 .GetExecutionProviderType = on_cpu, .GetInputType = input_type, .GetInputTypeCount = input_count,     \
                 .GetOutputType = output_type, .GetOutputTypeCount = output_count, .KernelCompute = compute_v1,        \
                 .KernelDestroy = free, .GetInputCharacteristic = of_index_zero,                                       \
                 .GetOutputCharacteristic = of_index_zero, .GetInputMemoryType = of_index_zero,                        \
                 .GetVariadicInputMinArity = one, .GetVariadicInputHomogeneity = one,                                  \
                 .GetVariadicOutputMinArity = one, .GetVariadicOutputHomogeneity = one, .CreateKernelV2 = create,      \
                 .KernelComputeV2 = compute, .GetStartVersion = one, .GetEndVersion = any_version},                    \
        .name = NAME, .metadata = METADATA, .x_type = TYPE, .kind = KIND, .quantized = INPUTS == MAX_INPUTS,           \
        .inputs = INPUTS,                                                                                              \
    }

#define OF_EVERY_TYPE(NAME, METADATA, KIND, INPUTS)                                                                    \
    OPERATOR(NAME, METADATA, KIND, INPUTS, ORT_FLOAT), OPERATOR(NAME, METADATA, KIND, INPUTS, ORT_FLOAT16),            \
        OPERATOR(NAME, METADATA, KIND, INPUTS, ORT_BFLOAT16)

static const operator operators[] = {
    OF_EVERY_TYPE("BitmaskLinear", "mask", SRT_KEEP_BITMASK, 4),
    OF_EVERY_TYPE("Sparse24Linear", "meta", SRT_KEEP_PAIRS, 3),
    OF_EVERY_TYPE("BitmaskLinearQ", "mask", SRT_KEEP_BITMASK, MAX_INPUTS),
    OF_EVERY_TYPE("DenseLinear", NULL, SRT_KEEP_ALL, 2),
};

/* What SessionOptions.register_custom_ops_library calls. With a runtime before 1.17 nothing is registered and the
 * functions of the model do the work. */
EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)
{
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    OrtCustomOpDomain *domain = NULL;
    if (api == NULL)
        return NULL;
    OrtStatus *status = api->CreateCustomOpDomain("sparse_rt", &domain);
    for (size_t i = 0; i < sizeof operators / sizeof *operators && !status; i++)
        status = api->CustomOpDomain_Add(domain, &operators[i].base);
    return status ? status : api->AddCustomOpDomain(options, domain);
}
