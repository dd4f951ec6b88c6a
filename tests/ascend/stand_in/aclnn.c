/* The attention operators of CANN's libopapi that rainfusion lowers to, and the copy that torch_npu makes of a tensor
 * on the device: plain loops on host memory.
 *
 * What they accept is what CANN's documentation of aclnnBlockSparseAttention, aclnnRainFusionAttention and
 * aclnnFlashAttentionScore accepts; every refusal names its reason on stderr. What documentation leaves open is taken
 * the hard way: skipped blocks are not read, nor keys beyond a sample's length; rows beyond it, and rows without a
 * block, are not written; masked tokens are read (their weight is 0, and 0 times NaN is NaN), and a row that is masked
 * out altogether gives the mean of all values.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 161002, NO_TOKEN_LIMIT = 2147483647 };
enum { FLOAT32 = 0, FLOAT16 = 1, INT8 = 2, INT32 = 3, UINT8 = 4, INT64 = 9, FLOAT64 = 11, BOOL = 12, BFLOAT16 = 27 };

#define REFUSE(...) return fprintf(stderr, "stand-in refuses: " __VA_ARGS__), fputc('\n', stderr), INVALID
#define REFUSE_IF(condition, ...) do { if (condition) REFUSE(__VA_ARGS__); } while (0)

/* -- what torch_npu hands over ------------------------------------------------------------------------------------ */

typedef struct {
    int64_t size[8], stride[8];
    uint64_t axes;
    int dtype;
    char *data;
} Tensor;

typedef struct {
    int64_t *value;
    uint64_t length;
} IntArray;

static int64_t bytes_of(int dtype)
{
    switch (dtype) {
    case INT64: case FLOAT64: return 8;
    case FLOAT32: case INT32: return 4;
    case FLOAT16: case BFLOAT16: return 2;
    default: return 1;
    }
}

Tensor *aclCreateTensor(const int64_t *size, uint64_t axes, int dtype, const int64_t *stride, int64_t offset, int format,
                        const int64_t *storage, uint64_t storage_axes, void *data)
{
    (void)format, (void)storage, (void)storage_axes;
    Tensor *made = calloc(1, sizeof *made);
    memcpy(made->size, size, axes * sizeof *size);
    memcpy(made->stride, stride, axes * sizeof *stride);
    made->axes = axes;
    made->dtype = dtype;
    made->data = (char *)data + offset * bytes_of(dtype);
    return made;
}

IntArray *aclCreateIntArray(const int64_t *value, uint64_t length)
{
    IntArray *made = malloc(sizeof *made);
    made->value = malloc((length + 1) * sizeof *value);
    made->length = length;
    memcpy(made->value, value, length * sizeof *value);
    return made;
}

int aclDestroyTensor(Tensor *tensor) { free(tensor); return OK; }

int aclDestroyIntArray(IntArray *array)
{
    if (array) free(array->value);
    free(array);
    return OK;
}

/* torch_npu looks these up with the others; no operator here takes them. */
void *aclCreateScalar(void *value, int dtype) { (void)value, (void)dtype; return NULL; }
void *aclCreateFloatArray(const float *value, uint64_t length) { (void)value, (void)length; return NULL; }
void *aclCreateBoolArray(const char *value, uint64_t length) { (void)value, (void)length; return NULL; }
void *aclCreateTensorList(Tensor *const *value, uint64_t length) { (void)value, (void)length; return NULL; }
int aclDestroyScalar(void *scalar) { (void)scalar; return OK; }
int aclDestroyFloatArray(void *array) { (void)array; return OK; }
int aclDestroyBoolArray(void *array) { (void)array; return OK; }
int aclDestroyTensorList(void *list) { (void)list; return OK; }

static int is_contiguous(const Tensor *x)
{
    int64_t expected = 1;
    for (int64_t axis = (int64_t)x->axes - 1; axis >= 0; axis--) {
        if (x->size[axis] > 1 && x->stride[axis] != expected) return 0;
        expected *= x->size[axis];
    }
    return 1;
}

static int has_shape(const Tensor *x, int64_t b, int64_t n, int64_t s, int64_t d)
{
    return x->axes == 4 && x->size[0] == b && x->size[1] == n && x->size[2] == s && x->size[3] == d;
}

/* -- numbers ---------------------------------------------------------------------------------------------------------- */

static float load(const Tensor *x, int64_t at)
{
    if (x->dtype == FLOAT32) return ((float *)x->data)[at];
    if (x->dtype == FLOAT16) return (float)((_Float16 *)x->data)[at];
    uint32_t bits = (uint32_t)((uint16_t *)x->data)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void store(const Tensor *x, int64_t at, float value)
{
    if (x->dtype == FLOAT32) {
        ((float *)x->data)[at] = value;
    } else if (x->dtype == FLOAT16) {
        ((_Float16 *)x->data)[at] = (_Float16)value;
    } else {
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        ((uint16_t *)x->data)[at] = value != value ? 0x7fc0 : (uint16_t)rounded;
    }
}

static float *loaded(const Tensor *x, int64_t start, int64_t count, int64_t step, int64_t dim)
{
    float *values = malloc(count * dim * sizeof *values);
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d++) values[i * dim + d] = load(x, start + i * step + d);
    return values;
}

/* -- aclnnInplaceCopy ------------------------------------------------------------------------------------------------- */

typedef struct {
    Tensor to, from;
} Copy;

int aclnnInplaceCopyGetWorkspaceSize(Tensor *to, Tensor *from, uint64_t *workspace, Copy **executor)
{
    REFUSE_IF(to->dtype != from->dtype || to->axes != from->axes, "a copy that converts");
    for (uint64_t axis = 0; axis < to->axes; axis++) REFUSE_IF(to->size[axis] != from->size[axis], "a copy that expands");
    *executor = malloc(sizeof **executor);
    **executor = (Copy){*to, *from};
    *workspace = 0;
    return OK;
}

static void copy_axis(const Copy *copy, uint64_t axis, char *to, const char *from, int64_t bytes)
{
    if (axis == copy->to.axes) {
        memcpy(to, from, bytes);
        return;
    }
    for (int64_t i = 0; i < copy->to.size[axis]; i++)
        copy_axis(copy, axis + 1, to + i * copy->to.stride[axis] * bytes, from + i * copy->from.stride[axis] * bytes,
                  bytes);
}

int aclnnInplaceCopy(void *workspace, uint64_t size, Copy *executor, void *stream)
{
    (void)workspace, (void)size, (void)stream;
    copy_axis(executor, 0, executor->to.data, executor->from.data, bytes_of(executor->to.dtype));
    free(executor);
    return OK;
}

/* -- attention ---------------------------------------------------------------------------------------------------------- */

/* How far apart samples, heads and tokens are in memory, in numbers. */
typedef struct {
    int64_t batch, head, token;
} Steps;

/* A call between its two phases. Tensors and lengths are copied: torch_npu destroys its own. */
typedef struct {
    Tensor q, k, v, out, block_mask, token_mask, bias, lse, maximum, total, select, select_count;
    Steps q_steps, kv_steps;
    int64_t batch, heads, kv_heads, rows, keys, dim, block_rows, block_keys;
    int64_t *row_lengths, *key_lengths; /* of every sample; NULL for all */
    double scale;
    int writes_lse;
} Call;

enum { READ, MASKED, NOT_READ };

/* softmax(scale (q k + bias)) v for one row; state[j] says what becomes of key j. */
static void attend_row(const Call *call, const float *q, const float *keys, const float *values, const char *state,
                       const float *bias, float *score, float *out, float *maximum, float *total)
{
    int64_t dim = call->dim;
    *maximum = -INFINITY, *total = 0;
    memset(out, 0, dim * sizeof *out);
    for (int64_t j = 0; j < call->keys; j++) {
        if (state[j] == NOT_READ) continue;
        float product = 0;
        for (int64_t d = 0; d < dim; d++) product += q[d] * keys[j * dim + d];
        score[j] = state[j] == MASKED ? -FLT_MAX : (product + (bias ? bias[j] : 0)) * (float)call->scale;
        if (score[j] > *maximum || score[j] != score[j]) *maximum = score[j];
    }
    for (int64_t j = 0; j < call->keys; j++) {
        if (state[j] == NOT_READ) continue;
        float weight = expf(score[j] - *maximum);
        *total += weight;
        for (int64_t d = 0; d < dim; d++) out[d] += weight * values[j * dim + d];
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= *total;
}

static void key_states(const Call *call, int64_t head, int64_t row, char *state)
{
    const Tensor *blocks = &call->block_mask, *tokens = &call->token_mask;
    int64_t masked_head = tokens->size[1] == 1 ? head / call->heads : head; /* of all samples' heads, as head is */
    int64_t length = call->key_lengths ? call->key_lengths[head / call->heads] : call->keys;
    for (int64_t j = 0; j < call->keys; j++) {
        state[j] = j < length ? READ : NOT_READ;
        if (blocks->data) {
            int64_t block = (head * blocks->size[2] + row / call->block_rows) * blocks->size[3] + j / call->block_keys;
            if (!blocks->data[block]) state[j] = NOT_READ;
        }
        if (tokens->data && tokens->data[(masked_head * call->rows + row) * call->keys + j]) state[j] = MASKED;
    }
}

static void attend(const Call *call)
{
    int64_t keys = call->keys, dim = call->dim, group = call->heads / call->kv_heads;
    char *state = malloc(keys);
    float *score = malloc(keys * sizeof *score), *out = malloc(dim * sizeof *out);
    for (int64_t head = 0; head < call->batch * call->heads; head++) {
        int64_t sample = head / call->heads, number = head % call->heads;
        int64_t kv_start = sample * call->kv_steps.batch + number / group * call->kv_steps.head;
        float *k = loaded(&call->k, kv_start, keys, call->kv_steps.token, dim);
        float *v = loaded(&call->v, kv_start, keys, call->kv_steps.token, dim);
        float *bias = call->bias.data ? loaded(&call->bias, head * keys, keys, 1, 1) : NULL;
        int64_t rows = call->row_lengths ? call->row_lengths[sample] : call->rows;
        for (int64_t row = 0; row < rows; row++) {
            int64_t at = head * call->rows + row;
            int64_t start = sample * call->q_steps.batch + number * call->q_steps.head + row * call->q_steps.token;
            float *q = loaded(&call->q, start, 1, dim, dim), maximum, total;
            key_states(call, head, row, state);
            attend_row(call, q, k, v, state, bias, score, out, &maximum, &total);
            if (!total) { /* no block of this row is computed */
                free(q);
                continue;
            }
            for (int64_t d = 0; d < dim; d++) store(&call->out, start + d, out[d]);
            if (call->writes_lse) store(&call->lse, at, maximum + logf(total));
            for (int64_t copy = 0; call->maximum.data && copy < 8; copy++) {
                store(&call->maximum, at * 8 + copy, maximum);
                store(&call->total, at * 8 + copy, total);
            }
            free(q);
        }
        free(k), free(v), free(bias);
    }
    free(state), free(score), free(out);
}

static int begin(Call **made, Tensor *q, Tensor *k, Tensor *v, Tensor *out, const char *layout, double scale)
{
    REFUSE_IF(strncmp(layout, "BNSD", 5) || q->axes != 4, "layout %s (only BNSD is here)", layout);
    int64_t b = q->size[0], s = k->size[2], d = q->size[3];
    REFUSE_IF(!has_shape(k, b, k->size[1], s, d) || !has_shape(v, b, k->size[1], s, d), "shapes of key or value");
    REFUSE_IF(!has_shape(out, b, q->size[1], q->size[2], d), "shape of the output");
    REFUSE_IF(q->size[1] % k->size[1], "%ld heads over %ld", (long)q->size[1], (long)k->size[1]);
    REFUSE_IF(k->dtype != q->dtype || v->dtype != q->dtype || out->dtype != q->dtype, "mixed dtypes");
    REFUSE_IF(!is_contiguous(q) || !is_contiguous(k) || !is_contiguous(v), "query, key or value is not contiguous");
    Call *call = *made = calloc(1, sizeof *call);
    call->q = *q, call->k = *k, call->v = *v, call->out = *out;
    call->batch = b, call->heads = q->size[1], call->kv_heads = k->size[1];
    call->rows = q->size[2], call->keys = s, call->dim = d, call->scale = scale;
    call->q_steps = (Steps){call->heads * call->rows * d, call->rows * d, d};
    call->kv_steps = (Steps){call->kv_heads * s * d, s * d, d};
    return OK;
}

static int finish(Call *call)
{
    attend(call);
    free(call->row_lengths), free(call->key_lengths), free(call);
    return OK;
}

/* -- aclnnBlockSparseAttention -------------------------------------------------------------------------------------------- */

#ifndef WITHOUT_BLOCK_SPARSE_ATTENTION

static int is_950(void)
{
    const char *soc = getenv("STAND_IN_SOC");
    return soc && strstr(soc, "950");
}

static int lengths_fit(const IntArray *lengths, int64_t batch, int64_t length)
{
    if (lengths->length != (uint64_t)batch) return 0;
    for (int64_t b = 0; b < batch; b++)
        if (lengths->value[b] < 1 || lengths->value[b] > length) return 0;
    return 1;
}

static int64_t *copied(const IntArray *lengths)
{
    if (!lengths) return NULL;
    return memcpy(malloc(lengths->length * sizeof(int64_t)), lengths->value, lengths->length * sizeof(int64_t));
}

int aclnnBlockSparseAttentionGetWorkspaceSize(
    Tensor *q, Tensor *k, Tensor *v, Tensor *mask, Tensor *token_mask, IntArray *block, IntArray *q_lengths,
    IntArray *kv_lengths, Tensor *block_table, char *q_layout, char *kv_layout, int64_t kv_heads, int64_t mask_type,
    double scale, int64_t precise, int64_t page, int64_t before, int64_t after, int64_t lse_flag, Tensor *out,
    Tensor *lse, uint64_t *workspace, Call **executor)
{
    REFUSE_IF(token_mask || block_table || mask_type || page, "a reserved argument");
    REFUSE_IF(before != NO_TOKEN_LIMIT || after != NO_TOKEN_LIMIT, "a token window");
    REFUSE_IF(strcmp(q_layout, kv_layout), "layouts that differ");
    REFUSE_IF(q->dtype != FLOAT16 && q->dtype != BFLOAT16, "dtype %d", q->dtype);
    REFUSE_IF(is_950() ? precise != 4 : precise != 0 && precise != 1, "inner_precise %ld", (long)precise);
    REFUSE_IF(precise == 1 && q->dtype != FLOAT16, "inner_precise 1 without float16");
    REFUSE_IF(lse_flag != 0 && lse_flag != 1, "softmax_lse_flag %ld", (long)lse_flag);
    REFUSE_IF(block->length < 2 || block->value[0] < 1, "block shape");
    REFUSE_IF(block->value[1] < 1 || block->value[1] % 128, "key blocks of %ld", (long)block->value[1]);
    int status = begin(executor, q, k, v, out, q_layout, scale);
    if (status) return status;
    Call *call = *executor;
    int64_t rows = (call->rows + block->value[0] - 1) / block->value[0];
    int64_t columns = (call->keys + block->value[1] - 1) / block->value[1];
    REFUSE_IF(call->dim != 64 && call->dim != 128, "head dim %ld", (long)call->dim);
    REFUSE_IF(kv_heads != call->kv_heads, "%ld key heads", (long)kv_heads);
    REFUSE_IF(!mask || mask->dtype != INT8, "a mask that is not int8");
    REFUSE_IF(!has_shape(mask, call->batch, call->heads, rows, columns) || !is_contiguous(mask), "shape of the mask");
    REFUSE_IF(!q_lengths != !kv_lengths, "one list of lengths without the other");
    REFUSE_IF(q_lengths && !lengths_fit(q_lengths, call->batch, call->rows), "query lengths");
    REFUSE_IF(kv_lengths && !lengths_fit(kv_lengths, call->batch, call->keys), "key lengths");
    call->block_mask = *mask, call->block_rows = block->value[0], call->block_keys = block->value[1];
    call->row_lengths = copied(q_lengths), call->key_lengths = copied(kv_lengths);
    call->writes_lse = (int)lse_flag;
    if (lse_flag) call->lse = *lse;
    *workspace = 0;
    return OK;
}

int aclnnBlockSparseAttention(void *workspace, uint64_t size, Call *executor, void *stream)
{
    (void)workspace, (void)size, (void)stream;
    return finish(executor);
}

#endif

/* -- aclnnRainFusionAttention ---------------------------------------------------------------------------------------------- */

#ifndef WITHOUT_RAIN_FUSION_ATTENTION

/* All samples of one length, which is all that is here. */
static int samples_of(const IntArray *lengths, int64_t tokens)
{
    if (!lengths || !lengths->length || tokens % (int64_t)lengths->length) return 0;
    for (uint64_t b = 0; b < lengths->length; b++)
        if (lengths->value[b] != tokens / (int64_t)lengths->length) return 0;
    return (int)lengths->length;
}

int aclnnRainFusionAttentionGetWorkspaceSize(
    Tensor *q, Tensor *k, Tensor *v, Tensor *select, Tensor *select_count, IntArray *block, Tensor *token_mask,
    IntArray *q_lengths, IntArray *kv_lengths, Tensor *block_table, char *q_layout, char *kv_layout, int64_t kv_heads,
    int64_t mask_type, double scale, int64_t precise, int64_t page, Tensor *out, Tensor *lse, uint64_t *workspace,
    Call **executor)
{
    (void)lse; /* not supported: never written */
    const char *soc = getenv("STAND_IN_SOC");
    REFUSE_IF(soc && strstr(soc, "950"), "chip %s", soc);
    REFUSE_IF(token_mask || block_table || mask_type || page, "a reserved argument");
    REFUSE_IF(strcmp(q_layout, "TND") || strcmp(kv_layout, "TND"), "layouts %s and %s (only TND is here)", q_layout,
              kv_layout);
    REFUSE_IF(q->axes != 3 || k->axes != 3 || v->axes != 3, "axes");
    REFUSE_IF(q->dtype != FLOAT16 && q->dtype != BFLOAT16, "dtype %d", q->dtype);
    REFUSE_IF(k->dtype != q->dtype || v->dtype != q->dtype || out->dtype != q->dtype, "mixed dtypes");
    REFUSE_IF(precise != 0 && (precise != 1 || q->dtype != FLOAT16), "inner_precise %ld", (long)precise);
    REFUSE_IF(block->length < 2 || block->value[0] < 1 || block->value[1] < 1, "block shape");
    int64_t heads = q->size[1], group = heads / k->size[1];
    REFUSE_IF(kv_heads != k->size[1] || heads % kv_heads || group >= 128 || 128 % group, "%ld heads over %ld",
              (long)heads, (long)kv_heads);
    int batch = samples_of(q_lengths, q->size[0]);
    REFUSE_IF(!batch || samples_of(kv_lengths, k->size[0]) != batch, "lengths");
    Call call = {.q = *q, .k = *k, .v = *v, .out = *out, .select = *select, .select_count = *select_count};
    call.batch = batch, call.heads = heads, call.kv_heads = kv_heads, call.dim = q->size[2], call.scale = scale;
    call.rows = q->size[0] / batch, call.keys = k->size[0] / batch;
    call.block_rows = block->value[0], call.block_keys = block->value[1];
    call.q_steps = (Steps){call.rows * heads * call.dim, call.dim, heads * call.dim};
    call.kv_steps = (Steps){call.keys * kv_heads * call.dim, call.dim, kv_heads * call.dim};
    int64_t rows = (call.rows + call.block_rows - 1) / call.block_rows;
    int64_t columns = (call.keys + call.block_keys - 1) / call.block_keys;
    REFUSE_IF(select->dtype != INT64 || select_count->dtype != INT64, "lists that are not int64");
    REFUSE_IF(select->axes != 3 || select->size[0] != batch * rows || select->size[1] != heads ||
              select->size[2] != columns || !is_contiguous(select), "shape of the lists");
    REFUSE_IF(select_count->axes != 2 || select_count->size[0] != batch * rows || select_count->size[1] != heads ||
              !is_contiguous(select_count), "shape of the counts");
    REFUSE_IF(!is_contiguous(q) || !is_contiguous(k) || !is_contiguous(v), "query, key or value is not contiguous");
    *executor = malloc(sizeof call);
    **executor = call;
    *workspace = 0;
    return OK;
}

/* The blocks of the lists as a mask: numbers ascend, and -1 follows the last. */
static int listed(const Call *call, char *mask)
{
    int64_t columns = call->select.size[2], rows = call->select.size[0] / call->batch;
    const int64_t *numbers = (int64_t *)call->select.data, *counts = (int64_t *)call->select_count.data;
    for (int64_t row = 0; row < call->select.size[0]; row++) {
        for (int64_t head = 0; head < call->heads; head++) {
            const int64_t *list = numbers + (row * call->heads + head) * columns;
            char *kept = mask + ((row / rows * call->heads + head) * rows + row % rows) * columns;
            for (int64_t i = 0; i < columns; i++) {
                int is_listed = i < counts[row * call->heads + head];
                REFUSE_IF(is_listed ? list[i] < 0 || list[i] >= columns || (i && list[i] <= list[i - 1]) : list[i] != -1,
                          "a list with %ld at %ld", (long)list[i], (long)i);
                if (is_listed) kept[list[i]] = 1;
            }
        }
    }
    return OK;
}

int aclnnRainFusionAttention(void *workspace, uint64_t size, Call *executor, void *stream)
{
    (void)workspace, (void)size, (void)stream;
    int64_t columns = executor->select.size[2], rows = executor->select.size[0] / executor->batch;
    char *mask = calloc(executor->batch * executor->heads * rows, columns);
    int status = listed(executor, mask);
    executor->block_mask = (Tensor){{executor->batch, executor->heads, rows, columns}, {0}, 4, INT8, mask};
    if (status == OK) finish(executor);
    free(mask);
    return status;
}

#endif

/* -- aclnnFlashAttentionScore; torch_npu calls its fourth version on 950 --------------------------------------------------- */

static int flash_attention(Tensor *q, Tensor *k, Tensor *v, Tensor *bias, Tensor *mask, double scale, double keep,
                           int64_t heads, const char *layout, int64_t sparse_mode, Tensor *maximum, Tensor *total,
                           Tensor *out, uint64_t *workspace, Call **executor)
{
    REFUSE_IF(keep != 1, "dropout");
    REFUSE_IF(q->dtype != FLOAT32 && q->dtype != FLOAT16 && q->dtype != BFLOAT16, "dtype %d", q->dtype);
    REFUSE_IF(sparse_mode != (mask ? 1 : 0), "sparse_mode %ld", (long)sparse_mode);
    int status = begin(executor, q, k, v, out, layout, scale);
    if (status) return status;
    Call *call = *executor;
    REFUSE_IF(heads != call->heads, "%ld heads", (long)heads);
    REFUSE_IF(call->dim > 768, "head dim %ld", (long)call->dim);
    if (mask) {
        REFUSE_IF(mask->dtype != BOOL && mask->dtype != UINT8, "a mask that is neither bool nor uint8");
        int64_t heads_of_mask = mask->size[1] == 1 ? 1 : call->heads;
        REFUSE_IF(!has_shape(mask, call->batch, heads_of_mask, call->rows, call->keys) || !is_contiguous(mask),
                  "shape of the mask (only BNSS and B1SS are here)");
        call->token_mask = *mask;
    }
    if (bias) {
        REFUSE_IF(bias->dtype != q->dtype, "a bias of another dtype");
        REFUSE_IF(!has_shape(bias, call->batch, call->heads, 1, call->keys) || !is_contiguous(bias),
                  "shape of the bias (only BN1S is here)");
        call->bias = *bias;
    }
    call->maximum = *maximum, call->total = *total;
    *workspace = 0;
    return OK;
}

int aclnnFlashAttentionScoreGetWorkspaceSize(
    Tensor *q, Tensor *k, Tensor *v, Tensor *bias, Tensor *dropout, Tensor *padding, Tensor *mask, IntArray *prefix,
    double scale, double keep, int64_t before, int64_t after, int64_t heads, char *layout, int64_t precise,
    int64_t sparse_mode, Tensor *maximum, Tensor *total, Tensor *reserved, Tensor *out, uint64_t *workspace,
    Call **executor)
{
    (void)before, (void)after, (void)precise, (void)reserved;
    REFUSE_IF(dropout || padding || (prefix && prefix->length), "dropout, padding or a prefix");
    return flash_attention(q, k, v, bias, mask, scale, keep, heads, layout, sparse_mode, maximum, total, out, workspace,
                           executor);
}

int aclnnFlashAttentionScoreV4GetWorkspaceSize(
    Tensor *q, Tensor *k, Tensor *v, Tensor *bias, Tensor *dropout, Tensor *padding, Tensor *mask, Tensor *q_rope,
    Tensor *k_rope, Tensor *q_scale, Tensor *k_scale, Tensor *v_scale, Tensor *sink, IntArray *prefix,
    IntArray *q_lengths, IntArray *kv_lengths, IntArray *q_start, IntArray *kv_start, double scale, double keep,
    int64_t before, int64_t after, int64_t heads, char *layout, int64_t precise, int64_t sparse_mode, int64_t out_dtype,
    int64_t bias_type, char *softmax_layout, int64_t seed, int64_t offset, Tensor *maximum, Tensor *total,
    Tensor *reserved, Tensor *out, uint64_t *workspace, Call **executor)
{
    (void)q_start, (void)kv_start, (void)before, (void)after, (void)precise, (void)out_dtype, (void)softmax_layout;
    (void)seed, (void)offset, (void)reserved;
    REFUSE_IF(dropout || padding || (prefix && prefix->length), "dropout, padding or a prefix");
    REFUSE_IF(q_rope || k_rope || q_scale || k_scale || v_scale || sink, "rotation, quantisation or a sink");
    REFUSE_IF((q_lengths && q_lengths->length) || (kv_lengths && kv_lengths->length), "lists of lengths");
    REFUSE_IF(bias_type != 1, "bias of type %ld", (long)bias_type);
    return flash_attention(q, k, v, bias, mask, scale, keep, heads, layout, sparse_mode, maximum, total, out, workspace,
                           executor);
}

int aclnnFlashAttentionScore(void *workspace, uint64_t size, Call *executor, void *stream)
{
    (void)workspace, (void)size, (void)stream;
    return finish(executor);
}

int aclnnFlashAttentionScoreV4(void *workspace, uint64_t size, Call *executor, void *stream)
{
    return aclnnFlashAttentionScore(workspace, size, executor, stream);
}
