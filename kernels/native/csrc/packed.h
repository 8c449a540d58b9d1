/* Packed weights: layouts made once at load for multiplication on this processor, and the kernels that read them.
 *
 * A packed weight is one block of bytes: this header, tables, and the data in the order in which a kernel reads it. It is
 * private to the process that made it (never saved), and the canonical values and metadata can be had back from it.
 *
 * Every layout cuts the m rows into panels of 16 (a vector holds one or two elements of each of 16 rows), so a product
 * needs no horizontal sums and x is a broadcast:
 *
 *   bitmask  a vector is 16 rows x 2 columns (2-byte elements) or x 1 column (4-byte); one mask a vector, and the kept
 *            elements of the vectors behind each other. A tile kernel expands them in registers.
 *   pairs    2:4 only, bf16. A vector is the 2 kept elements of a group of 4 columns for 16 rows, 4 panels side by side;
 *            4-bit indices choose which 2 of the 4 x each row multiplies. Nothing is expanded: half the products.
 *   slots    bf16, for high sparsity. Each of the 16 rows walks its own kept elements, 4 a step, with a byte that
 *            says where x lies in a window of 128 columns that moves by 64. As many products as kept elements.
 */
#ifndef SPARSE_RT_PACKED_H
#define SPARSE_RT_PACKED_H

#include <stdint.h>

#include "activation.h"
#include "numbers.h"

enum { SRT_BITMASK, SRT_PAIRS, SRT_SLOTS };
/* How x is laid out for a tile kernel, for a block of T tokens; one unit is what a kernel reads for one step. */
enum {
    SRT_X_PAIRS,  /* [ceil(n / 2)][T] of 2 bf16 */
    SRT_X_FLOAT,  /* [n][T] float */
    SRT_X_QUADS,  /* [ceil(n / 4)][T] of 4 bf16 */
    SRT_X_PLANES, /* [ceil(n / 64) + 1][T] of 64 low bytes and 64 high bytes of bf16 */
};

enum { SRT_PANEL = 16, SRT_PAIR_PANELS = 4, SRT_PAIR_BLOCK = 8, SRT_WINDOW_STEP = 64 };
enum { SRT_SLOT_STEP_BYTES = 192, SRT_SLOT_PADDING = 128 }; /* padding: the bit of an index that marks an empty slot */
/* Expanded vectors: how many at a time (16 KB), bytes of one, and bytes asked for while one is multiplied. */
enum { SRT_MAX_TOKENS = 24, SRT_EXPANDED = 256, SRT_VECTOR = 64, SRT_AHEAD = 16 };

/* Tables and data are positions in bytes behind the start of the header. */
typedef struct {
    char magic[8];
    int32_t layout, dtype;
    int64_t m, n, nnz, bytes;
    int64_t units;   /* panels, or groups of SRT_PAIR_PANELS panels */
    int64_t stride;  /* steps of a panel along n, padded: vectors (bitmask), groups (pairs), windows (slots) */
    int64_t offsets; /* int64 [units + 1]: first element (bitmask), first step (slots) of a unit */
    int64_t masks;   /* bitmask: uint32 or uint16 [units][stride]; slots: uint8 [units][stride] steps of a window */
    int64_t data;
    int64_t nibbles; /* 1: the canonical metadata is 2:4 nibbles, 0: a bitmask */
    int64_t reserved[2];
} srt_packed;

static inline int srt_element_size(int dtype) { return (int)srt_number_bytes(dtype); }
static inline int64_t srt_round_up(int64_t a, int64_t b) { return srt_divide_up(a, b) * b; }
static inline int srt_unit_rows(const srt_packed *w) { return w->layout == SRT_PAIRS ? 64 : SRT_PANEL; }
static inline const int64_t *srt_offsets(const srt_packed *w) { return (const void *)((const char *)w + w->offsets); }
static inline const char *srt_masks(const srt_packed *w) { return (const char *)w + w->masks; }
static inline const char *srt_data(const srt_packed *w) { return (const char *)w + w->data; }

/* out [tokens][rows of a unit] = the product of one unit with a block of x. `tokens` is 1 .. max_tokens. */
typedef void srt_tile(const srt_packed *w, int64_t unit, const char *x, int tokens, float *out);

/* For more tokens than one tile takes, a part of a unit is expanded once and multiplied with block after block. An
 * expanded vector meets 4 bytes of every token of x: it is 16 rows x 1 column of float, or x 2 columns of bf16.
 *
 * The expander makes the vectors of `count` masks, from mask `first` on, of the kept elements at `values`; it returns
 * what follows those. */
typedef const char *srt_expander(const srt_packed *w, int64_t unit, int64_t first, int64_t count, const char *values,
                                 char *vectors);
/* sums [tokens][chains][SRT_PANEL] += the product of `count` vectors with their part of a block of x, vector v in chain
 * v % chains. Meanwhile SRT_AHEAD bytes a vector are asked for at `ahead`. */
typedef void srt_dense_tile(const char *vectors, int64_t count, const char *x, int tokens, const char *ahead,
                            float *sums);

typedef struct {
    srt_expander *expand;
    srt_dense_tile *tile;
    int max_tokens; /* of a block */
    int above;      /* so many tokens it is faster: tiles expand beside the products, so twice is still cheap */
    int vectors;    /* that a mask makes */
    int chains;     /* 1 or 2, the same as in the tiles: the number of tokens changes no bit of a sum */
} srt_dense;

/* How a layout is multiplied with: all NULL where an instruction set has no kernel for it. */
typedef struct {
    srt_tile *tile;
    int x, max_tokens;
    const srt_dense *dense; /* NULL: any number of tokens is multiplied block after block */
} srt_kernel;

/* x [tokens, n] with row stride ld (elements of dtype) -> one block of a layout. */
typedef void srt_x_packer(int kind, int dtype, const char *x, int64_t ld, int64_t n, int tokens, char *out);

/* The kernels of one instruction set. */
typedef struct {
    const char *name;
    int (*supported)(void);
    srt_kernel kernels[3][3]; /* [layout][dtype] */
    /* y[rows] in dtype = tile + bias (NULL: none). */
    void (*store)(const float *tile, const void *bias, void *y, int64_t rows, int dtype);
    srt_x_packer *x_pack;
    srt_activation *activate;
    srt_scaled_sum *add_scaled;
} srt_tiles;

extern const srt_tiles srt_tiles_scalar;
#if defined(__x86_64__)
extern const srt_tiles srt_tiles_avx2, srt_tiles_avx512, srt_tiles_avx512_bf16;
#endif

/* srt_tiles.store in portable C. */
void srt_scalar_store(const float *tile, const void *bias, void *y, int64_t rows, int dtype);

/* Bytes that one token takes in a layout of x. */
int64_t srt_x_token_bytes(int kind, int64_t n);
/* srt_tiles.x_pack in portable C. */
srt_x_packer srt_x_pack;

#endif
