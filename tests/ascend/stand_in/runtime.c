/* One NPU in host memory: as much of CANN's runtime (libascendcl) as torch_npu calls on the way to an operator.
 *
 * STAND_IN_SOC      the chip it is named after (default Ascend910B3, an A2)
 * STAND_IN_DEVICES  how many there are (default 1)
 *
 * Every other function is generated (build.py): it names itself on stderr and ends the process.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, OUT_OF_MEMORY = 207001 };

void stand_in_refuses(const char *name)
{
    fprintf(stderr, "stand-in: %s is not here\n", name);
    abort();
}

/* -- the device ----------------------------------------------------------------------------------------------- */

static int current_device = 0;
static char context[64];

int aclInit(const char *config) { (void)config; return OK; }
int aclFinalize(void) { return OK; }
const char *aclGetRecentErrMsg(void) { return ""; }

const char *aclrtGetSocName(void)
{
    const char *name = getenv("STAND_IN_SOC");
    return name ? name : "Ascend910B3";
}

int aclrtGetDeviceCount(uint32_t *count)
{
    const char *devices = getenv("STAND_IN_DEVICES");
    *count = devices ? (uint32_t)atoi(devices) : 1;
    return OK;
}

int aclrtSetDevice(int device) { current_device = device; return OK; }
int aclrtGetDevice(int *device) { *device = current_device; return OK; }
int aclrtGetCurrentContext(void **current) { *current = context; return OK; }
int aclrtSetCurrentContext(void *current) { (void)current; return OK; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *value)
{
    (void)device, (void)what;
    *value = 0;
    return OK;
}

/* -- memory --------------------------------------------------------------------------------------------------- */

static int allocate(void **memory, size_t size)
{
    *memory = aligned_alloc(512, (size + 511) / 512 * 512);
    return *memory ? OK : OUT_OF_MEMORY;
}

int aclrtMalloc(void **memory, size_t size, int policy) { (void)policy; return allocate(memory, size); }
int aclrtMallocAlign32(void **memory, size_t size, int policy) { (void)policy; return allocate(memory, size); }
int aclrtMallocHost(void **memory, size_t size) { return allocate(memory, size); }
int aclrtFree(void *memory) { free(memory); return OK; }
int aclrtFreeHost(void *memory) { free(memory); return OK; }

int aclrtGetMemInfo(int kind, size_t *available, size_t *total)
{
    (void)kind;
    *available = *total = (size_t)4 << 30;
    return OK;
}

/* How often data was copied, by CANN's numbers: 1 from host to device, 2 back, 3 within the device. */
static long copies[5];
long stand_in_copies(int kind) { return copies[kind]; }

int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind)
{
    (void)room;
    copies[kind]++;
    memcpy(to, from, size);
    return OK;
}

int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream)
{
    (void)stream;
    return aclrtMemcpy(to, room, from, size, kind);
}

int aclrtMemset(void *to, size_t room, int value, size_t size)
{
    (void)room;
    memset(to, value, size);
    return OK;
}

int aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *stream)
{
    (void)stream;
    return aclrtMemset(to, room, value, size);
}

/* -- streams and events: every operator is finished when its launch returns -------------------------------------- */

static int make(void **handle) { *handle = calloc(1, 64); return *handle ? OK : OUT_OF_MEMORY; }

int aclrtCreateStream(void **stream) { return make(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag)
{
    (void)priority, (void)flag;
    return make(stream);
}
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { (void)flag; return make(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { (void)flag; return make(event); }
int aclrtQueryEventStatus(void *event, int *status) { (void)event; *status = 1; return OK; }

#define NOTHING_TO_DO(name) int name(void) { return OK; }
NOTHING_TO_DO(aclrtDestroyStream)
NOTHING_TO_DO(aclrtDestroyStreamForce)
NOTHING_TO_DO(aclrtSynchronizeStream)
NOTHING_TO_DO(aclrtSynchronizeStreamWithTimeout)
NOTHING_TO_DO(aclrtSynchronizeDevice)
NOTHING_TO_DO(aclrtSynchronizeDeviceWithTimeout)
NOTHING_TO_DO(aclrtStreamWaitEvent)
NOTHING_TO_DO(aclrtRecordEvent)
NOTHING_TO_DO(aclrtResetEvent)
NOTHING_TO_DO(aclrtDestroyEvent)
NOTHING_TO_DO(aclrtSynchronizeEvent)

/* -- options and profiling ---------------------------------------------------------------------------------------- */

int aclrtGetSysParamOpt(int option, int64_t *value) { (void)option; *value = 0; return OK; }
int aclrtCtxGetSysParamOpt(int option, int64_t *value) { (void)option; *value = 0; return OK; }
NOTHING_TO_DO(aclrtSetSysParamOpt)
NOTHING_TO_DO(aclrtCtxSetSysParamOpt)
NOTHING_TO_DO(aclrtSetDeviceSatMode)
NOTHING_TO_DO(aclrtSetOpExecuteTimeOut)
NOTHING_TO_DO(aclSetCompileopt)
NOTHING_TO_DO(aclrtResetDevice)
NOTHING_TO_DO(MsprofRegisterCallback)
NOTHING_TO_DO(aclAppLog)
