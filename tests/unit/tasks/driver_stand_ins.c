/* Stand-ins for libcuda.so.1 and libnvidia-ml.so.1: one whole GPU and one that is divided into two MIG slices.
 *
 * They answer as the driver's libraries do, by the same functions and numbers (cuda.h, nvml.h), so that what asks them is
 * the code that asks a driver. CUDA shows what CUDA_VISIBLE_DEVICES names; every cuInit leaves a line in the file STARTS.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *UUIDS[] = {"GPU-00000000-0000-0000-0000-000000000001", "MIG-00000000-0000-0000-0000-00000000000a",
                              "MIG-00000000-0000-0000-0000-00000000000b"};
static int shown[3], count;

/* ---- CUDA ---- */
int cuInit(unsigned flags) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES"), *starts = getenv("STARTS");
    FILE *file = starts ? fopen(starts, "a") : 0;
    if (file) { fprintf(file, "%s\n", visible ? visible : "all"); fclose(file); }
    if (getenv("BROKEN")) return 999;
    count = 0;
    for (int i = 0; i < 3; i++)
        if (visible ? strstr(visible, UUIDS[i]) != 0 : i < 1) shown[count++] = i;
    return count ? flags : 100;
}
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *n) { *n = count; return 0; }
int cuDeviceGet(int *device, int index) { *device = shown[index]; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, device ? "NVIDIA H200 MIG 1g.18gb" : "NVIDIA H200");
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = device ? 16ul << 30 : 140ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int number, int device) {
    switch (number) {
    case 75: *value = 9; break;
    case 76: *value = 0; break;
    case 16: *value = device ? 16 : 132; break;
    case 32: *value = 0; break;
    default: *value = number * 1000 + device;
    }
    return 0;
}
static int uuid(char *bytes, int last, int first) {
    memset(bytes, 0, 16);
    bytes[0] = first;
    bytes[15] = last;
    return 0;
}
int cuDeviceGetUuid(char *bytes, int device) { return device ? uuid(bytes, 2, 0) : uuid(bytes, 1, 0); }
int cuDeviceGetUuid_v2(char *bytes, int device) { return uuid(bytes, device ? 9 + device : 1, 0); }

/* ---- NVML: handle 1 is the whole GPU, 2 the divided one, 3 and 4 its slices ---- */
typedef void *handle;
#define NUMBER(device) ((int)(long)(device))
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int status) { return "not here"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.159.04"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle *device) {
    *device = (handle)(long)(index + 1);
    return index == 2 ? 15 : 0; /* the third has fallen off the bus */
}
int nvmlDeviceGetCudaComputeCapability(handle device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetName(handle device, char *text, unsigned size) {
    snprintf(text, size, NUMBER(device) > 2 ? "NVIDIA H200 MIG 1g.18gb" : "NVIDIA H200");
    return 0;
}
int nvmlDeviceGetUUID(handle device, char *text, unsigned size) {
    static const char *uuids[] = {"", "GPU-00000000-0000-0000-0000-000000000001",
                                  "GPU-00000000-0000-0000-0000-000000000002", "MIG-00000000-0000-0000-0000-00000000000a",
                                  "MIG-00000000-0000-0000-0000-00000000000b"};
    snprintf(text, size, "%s", uuids[NUMBER(device)]);
    return 0;
}
int nvmlDeviceGetMemoryInfo(handle device, unsigned long long *info) { info[0] = 141ull << 30; return 0; }
int nvmlDeviceGetMemoryBusWidth(handle device, unsigned *bits) { *bits = 6016; return NUMBER(device) > 2 ? 3 : 0; }
int nvmlDeviceGetEccMode(handle device, int *current, int *pending) {
    *current = *pending = 1;
    return NUMBER(device) > 2 ? 3 : 0;
}
int nvmlDeviceGetMigMode(handle device, unsigned *current, unsigned *pending) {
    *current = *pending = NUMBER(device) == 2;
    return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(handle device, unsigned *n) { *n = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(handle device, unsigned index, handle *slice) {
    *slice = (handle)(long)(index / 2 + 3); /* slices at 0 and 2 of 7 */
    return index == 0 || index == 2 ? 0 : 6;
}
int nvmlDeviceGetHandleByUUID(const char *text, handle *device) {
    for (long i = 1; i < 5; i++) {
        char own[64];
        nvmlDeviceGetUUID((handle)i, own, sizeof own);
        if (!strcmp(own, text)) { *device = (handle)i; return 0; }
    }
    return 6;
}
int nvmlDeviceGetUtilizationRates(handle device, unsigned *rates) {
    rates[0] = getenv("BUSY") && strstr(getenv("BUSY"), "rates") ? 80 : 0;
    rates[1] = 0;
    return NUMBER(device) > 2 ? 3 : 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(handle device, unsigned *n, void *infos) {
    int busy = getenv("BUSY") && strstr(getenv("BUSY"), "processes") && NUMBER(device) == 3;
    unsigned room = *n;
    *n = busy;
    if (busy && room < 1) return 7; /* NVML_ERROR_INSUFFICIENT_SIZE */
    if (busy) memset(infos, 0, 24);
    return 0;
}
