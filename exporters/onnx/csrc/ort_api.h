/* The part of ONNX Runtime's C interface that a custom operator on the CPU needs, at API version 17.
 *
 * Both structures only ever grow at their end and are chosen by a version number, so what is declared here holds for
 * every ONNX Runtime from 1.17 on; the wheel ships no headers. Members are named as in onnxruntime_c_api.h (MIT), their
 * places are checked at the end.
 */
#ifndef SPARSE_RT_ORT_API_H
#define SPARSE_RT_ORT_API_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_API_VERSION = 17 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
/* ONNXTensorElementDataType */
enum {
    ORT_UNDEFINED = 0,
    ORT_FLOAT = 1,
    ORT_UINT8 = 2,
    ORT_INT8 = 3,
    ORT_INT32 = 6,
    ORT_FLOAT16 = 10,
    ORT_BFLOAT16 = 16
};

typedef struct OrtStatus OrtStatus;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtCustomOp OrtCustomOp;
typedef void (*ort_slot)(void);

typedef struct {
    OrtStatus *(*CreateStatus)(int code, const char *message);
    ort_slot from_1[25];
    OrtStatus *(*CreateCustomOpDomain)(const char *domain, OrtCustomOpDomain **out);
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
    ort_slot from_29[22];
    OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **out);
    ort_slot from_52[8];
    OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *info, int *out);
    OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *info, size_t *out);
    OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *info, int64_t *dims, size_t count);
    ort_slot from_63[2];
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtTensorTypeAndShapeInfo **out);
    ort_slot from_66[20];
    OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name, int64_t *out);
    ort_slot from_87[3];
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index, const OrtValue **out);
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *dims, size_t count,
                                          OrtValue **out);
    ort_slot from_92[1];
    void (*ReleaseStatus)(OrtStatus *status);
    ort_slot from_94[5];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *info);
    ort_slot from_100[149];
    OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info, size_t index, int *is_constant,
                                                    const OrtValue **out);
    ort_slot from_250[24];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*run)(void *data, size_t index),
                                            size_t total, size_t batches, void *data);
} OrtApi;

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version); /* NULL where the runtime is older */
    const char *(*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
    const char *(*GetName)(const OrtCustomOp *op);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *op); /* NULL: the CPU */
    int (*GetInputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp *op);
    int (*GetOutputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
    void (*KernelCompute)(void *kernel, OrtKernelContext *context);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index); /* 0: required */
    int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *op, OrtShapeInferContext *context);
    int (*GetStartVersion)(const OrtCustomOp *op);
    int (*GetEndVersion)(const OrtCustomOp *op);
    size_t (*GetMayInplace)(int **input, int **output);
    void (*ReleaseMayInplace)(int *input, int *output);
    size_t (*GetAliasMap)(int **input, int **output);
    void (*ReleaseAliasMap)(int *input, int *output);
};

#define ORT_PLACE(MEMBER, SLOT) _Static_assert(offsetof(OrtApi, MEMBER) == (SLOT) * sizeof(ort_slot), "the table moved")
ORT_PLACE(CreateCustomOpDomain, 26);
ORT_PLACE(GetTensorMutableData, 51);
ORT_PLACE(GetTensorElementType, 60);
ORT_PLACE(GetTensorTypeAndShape, 65);
ORT_PLACE(KernelInfoGetAttribute_int64, 86);
ORT_PLACE(KernelContext_GetInput, 90);
ORT_PLACE(ReleaseStatus, 93);
ORT_PLACE(ReleaseTensorTypeAndShapeInfo, 99);
ORT_PLACE(KernelInfoGetConstantInput_tensor, 249);
ORT_PLACE(KernelContext_ParallelFor, 274);
_Static_assert(sizeof(OrtCustomOp) == 26 * sizeof(ort_slot), "the structure of custom operators moved");

#endif
