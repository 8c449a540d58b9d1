/* packed_linear as a kernel of PyTorch's dispatcher, without Python between the model and the product.
 *
 * In a model every layer finds the caches full of the weight before it. benchmarks/call_cost.py measures a call there;
 * through Python it took several times as long (benchmarks/NOTES.md), a hundred times for a token of a 1B model.
 *
 * What is used of torch are the C functions of its stable interface (torch/csrc/inductor/aoti_torch/c/shim.h and
 * torch/csrc/stable/c/shim.h, where the convention of a kernel is written down), found by name at run time: neither its
 * headers nor a C++ compiler are needed. Two C++ functions have no C counterpart in every release that we support: the one
 * that raises an exception and the one that says how many threads there are.
 */
#include <stdbool.h>
#include <stdio.h>

#include "buffer.h"
#include "packed.h"
#include "product.h"

typedef void *tensor; /* AtenTensorHandle */
typedef uint64_t value; /* StableIValue: an integer, a tensor, or for an optional NULL or the address of a value */
typedef void kernel(value *stack, uint64_t inputs, uint64_t outputs);

enum { MAX_DIMS = 64 };

/* The functions of torch, in the order of NAMES in torch_op.py. */
static struct {
    int (*get_data_ptr)(tensor, void **);
    int (*get_dim)(tensor, int64_t *);
    int (*get_sizes)(tensor, int64_t **);
    int (*get_strides)(tensor, int64_t **);
    int (*get_numel)(tensor, int64_t *);
    int (*get_dtype)(tensor, int32_t *);
    int (*empty_strided)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, tensor *);
    int (*new_tensor_handle)(tensor, tensor *);
    int (*delete_tensor)(tensor);
    int (*call_dispatcher)(const char *name, const char *overload, value *stack);
    int32_t (*contiguous_format)(void);
    int32_t (*device_cpu)(void);
    int32_t (*bfloat16)(void);
    int32_t (*float16)(void);
    int32_t (*float32)(void);
    int32_t (*uint8)(void);
    int (*library_init_impl)(const char *space, const char *key, const char *file, uint32_t line, void **);
    int (*library_impl)(void *library, const char *name, kernel *);
    int (*library_delete)(void *library);
    int (*get_num_threads)(void);
    void (*raise)(const char *function, const char *file, uint32_t line, const char *message);
    void (*delete_value)(value *);
} torch;

/* ---- operands ------------------------------------------------------------------------------------------------- */

typedef struct {
    tensor x, packed, bias; /* bias: NULL for none */
    int64_t m, n;
    int64_t dim, tokens, ld; /* of x: elements between tokens */
    int64_t *sizes;
    const srt_packed *weight;
    int64_t bytes;
    char error[400];
} call;

static const char *dtype_name(int32_t dtype)
{
    return dtype == torch.bfloat16()  ? "torch.bfloat16"
           : dtype == torch.float16() ? "torch.float16"
           : dtype == torch.float32() ? "torch.float32"
                                      : "of another dtype";
}

static void shape_text(char *out, size_t room, const int64_t *sizes, int64_t dim)
{
    size_t used = (size_t)snprintf(out, room, "(");
    for (int64_t i = 0; i < dim && used < room; i++)
        used += (size_t)snprintf(out + used, room - used, "%s%lld", i ? ", " : "", (long long)sizes[i]);
    if (used < room)
        snprintf(out + used, room - used, dim == 1 ? ",)" : ")");
}

/* *t = an operator of torch that takes *t, `argument`, and gives one tensor. */
static bool replace(call *c, tensor *t, const char *operator, value argument)
{
    value stack[2] = {(value)*t, argument};
    *t = NULL; /* what is called takes it */
    if (torch.call_dispatcher(operator, "", stack) != 0) {
        snprintf(c->error, sizeof c->error, "packed_linear: %s failed on an operand", operator);
        return false;
    }
    *t = (tensor)stack[0];
    return true;
}

static bool make_contiguous(call *c, tensor *t)
{
    return replace(c, t, "aten::contiguous", (value)torch.contiguous_format());
}

static bool refuse_shape(call *c, const int64_t *bias_sizes, int64_t bias_dim)
{
    char x[120], bias[120];
    shape_text(x, sizeof x, c->sizes, c->dim);
    shape_text(bias, sizeof bias, bias_sizes, bias_dim);
    snprintf(c->error, sizeof c->error,
             "packed_linear: a (%lld, %lld) weight takes x [..., %lld] and a bias [%lld], got x %s%s%s", (long long)c->m,
             (long long)c->n, (long long)c->n, (long long)c->m, x, bias_sizes ? " and a bias " : "",
             bias_sizes ? bias : "");
    return false;
}

/* Whether packed is a packed (m, n) weight that this process multiplies with. */
static bool take_weight(call *c)
{
    int64_t dim, *strides;
    int32_t dtype;
    torch.get_data_ptr(c->packed, (void **)&c->weight);
    if ((uintptr_t)c->weight % 8) { /* a view: the tables are read as 8-byte numbers */
        if (!replace(c, &c->packed, "aten::clone", 0))
            return false;
        torch.get_data_ptr(c->packed, (void **)&c->weight);
    }
    torch.get_dim(c->packed, &dim);
    torch.get_strides(c->packed, &strides);
    torch.get_numel(c->packed, &c->bytes);
    torch.get_dtype(c->packed, &dtype);
    if (dim == 1 && dtype == torch.uint8() && strides[0] == 1 &&
        srt_packed_kind(c->weight, c->bytes, c->m, c->n) >= 0)
        return true;
    snprintf(c->error, sizeof c->error,
             "packed_linear: this is not a packed (%lld, %lld) weight, or it was made for an instruction set that is "
             "switched off now",
             (long long)c->m, (long long)c->n);
    return false;
}

static bool take_bias(call *c, const void **bias)
{
    int64_t dim, *sizes, *strides;
    int32_t dtype, expected;
    *bias = NULL;
    if (!c->bias)
        return true;
    torch.get_dim(c->bias, &dim);
    torch.get_sizes(c->bias, &sizes);
    if (dim != 1 || sizes[0] != c->m)
        return refuse_shape(c, sizes, dim);
    torch.get_dtype(c->bias, &dtype);
    torch.get_dtype(c->x, &expected);
    if (dtype != expected) {
        tensor x;
        torch.new_tensor_handle(c->x, &x);
        if (!replace(c, &c->bias, "aten::type_as", (value)x))
            return false;
    }
    torch.get_strides(c->bias, &strides);
    if (c->m > 1 && strides[0] != 1 && !make_contiguous(c, &c->bias))
        return false;
    torch.get_data_ptr(c->bias, (void **)bias);
    return true;
}

/* Whether the tokens of x lie at equal distances and their elements side by side; sets tokens and ld. */
static bool has_rows(call *c)
{
    int64_t *strides, last = c->dim - 1;
    torch.get_strides(c->x, &strides);
    c->tokens = 1;
    for (int64_t i = 0; i < last; i++)
        c->tokens *= c->sizes[i];
    if (c->tokens == 0 || c->n == 0)
        return true;
    c->ld = c->n;
    int64_t expected = -1; /* distance that makes one sequence of the dimensions seen so far; -1: none seen */
    for (int64_t i = last - 1; i >= 0; i--) {
        if (c->sizes[i] == 1)
            continue;
        if (expected < 0)
            c->ld = strides[i];
        else if (strides[i] != expected)
            return false;
        expected = strides[i] * c->sizes[i];
    }
    return strides[last] == 1 || c->n == 1;
}

static bool take_x(call *c, const void **x)
{
    int32_t dtype;
    const int32_t dtypes[] = {torch.bfloat16(), torch.float16(), torch.float32()};
    torch.get_dim(c->x, &c->dim);
    torch.get_sizes(c->x, &c->sizes);
    if (c->dim < 1 || c->dim > MAX_DIMS || c->sizes[c->dim - 1] != c->n)
        return refuse_shape(c, NULL, 0);
    torch.get_dtype(c->x, &dtype);
    if (dtype != dtypes[c->weight->dtype]) {
        snprintf(c->error, sizeof c->error, "packed_linear: x is %s, the packed values are %s; they must be equal",
                 dtype_name(dtype), dtype_name(dtypes[c->weight->dtype]));
        return false;
    }
    if (!has_rows(c)) {
        if (!make_contiguous(c, &c->x))
            return false;
        torch.get_sizes(c->x, &c->sizes);
        has_rows(c);
    }
    torch.get_data_ptr(c->x, (void **)x);
    return true;
}

/* ---- the kernel ----------------------------------------------------------------------------------------------- */

static tensor multiply(call *c)
{
    const void *x, *bias;
    tensor y = NULL;
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS], step = 1;
    int32_t dtype;
    if (!take_weight(c) || !take_x(c, &x) || !take_bias(c, &bias))
        return NULL;
    for (int64_t i = c->dim - 1; i >= 0; i--) {
        sizes[i] = i == c->dim - 1 ? c->m : c->sizes[i];
        strides[i] = step;
        step *= sizes[i] > 1 ? sizes[i] : 1;
    }
    char *work = srt_thread_buffer(srt_packed_workspace(c->weight, c->tokens));
    torch.get_dtype(c->x, &dtype);
    if (!work && c->tokens * c->n > 0) {
        snprintf(c->error, sizeof c->error, "packed_linear: there is no memory for %lld tokens", (long long)c->tokens);
        return NULL;
    }
    if (torch.empty_strided(c->dim, sizes, strides, dtype, torch.device_cpu(), -1, &y) != 0) {
        snprintf(c->error, sizeof c->error, "packed_linear: there is no memory for the result");
        return NULL;
    }
    void *to;
    torch.get_data_ptr(y, &to);
    srt_packed_linear(c->weight, c->bytes, c->m, c->n, x, c->ld, c->tokens, bias, to, c->m, work,
                      torch.get_num_threads());
    return y;
}

/* packed_linear(Tensor x, Tensor packed, Tensor? bias, int m, int n) -> Tensor */
static void packed_linear(value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    value *bias = (value *)stack[2];
    call c = {.x = (tensor)stack[0], .packed = (tensor)stack[1], .bias = bias ? (tensor)*bias : NULL,
              .m = (int64_t)stack[3], .n = (int64_t)stack[4]};
    tensor y = multiply(&c);
    if (c.x)
        torch.delete_tensor(c.x);
    if (c.packed)
        torch.delete_tensor(c.packed);
    if (c.bias)
        torch.delete_tensor(c.bias);
    if (bias)
        torch.delete_value(bias);
    if (!y) /* a C++ exception, RuntimeError in Python: this file is compiled with -fexceptions so that it passes */
        torch.raise("packed_linear", __FILE__, __LINE__, c.error);
    stack[0] = (value)y;
}

/* ---- registration --------------------------------------------------------------------------------------------- */

static void *registered;

/* Puts the kernel under both operators; `functions` are as many addresses as the table above has. 0, or -1. */
EXPORT int srt_torch_register(void *const *functions)
{
    if (registered)
        return -1;
    for (size_t i = 0; i < sizeof torch / sizeof(void *); i++)
        ((void **)&torch)[i] = functions[i];
    if (torch.library_init_impl("sparse_rt", "CPU", __FILE__, __LINE__, &registered) != 0)
        return -1;
    return torch.library_impl(registered, "packed_linear", packed_linear) ||
                   torch.library_impl(registered, "packed_linear_forward", packed_linear)
               ? -1
               : 0;
}

/* Takes it away again. */
EXPORT void srt_torch_unregister(void)
{
    if (registered)
        torch.library_delete(registered);
    registered = NULL;
}
