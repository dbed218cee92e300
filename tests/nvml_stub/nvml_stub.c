/* A stand-in for libnvidia-ml.so.1: the calls that the probe makes, answered from a text file.
 *
 * The file is named by NVML_STUB_SCENARIO; one statement a line, # starts a comment:
 *
 *   init CODE                nvmlInit returns this error
 *   driver TEXT              e.g. 550.54.15
 *   cuda NUMBER              e.g. 12040 for 12.4
 *   fail FUNCTION CODE       before any gpu: a call about the system fails
 *   gpu COUNT NAME           starts COUNT equal GPUs; what follows describes them
 *   memory TOTAL RESERVED USED                          MiB
 *   power WATTS
 *   pcie GENERATION WIDTH MAX_GENERATION MAX_WIDTH
 *   mig 0|1
 *   switch LINKS             active NVLinks to a switch
 *   peer INDEX LINKS         active NVLinks to the GPU of this index
 *   fail FUNCTION CODE       after a gpu: a call about these GPUs fails
 *
 * What a scenario does not say is NVML_ERROR_NOT_SUPPORTED. Structures and codes are those of
 * NVML's public interface.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, UNKNOWN = 999 };
enum { MAX_GPUS = 32, MAX_LINKS = 36, MAX_FAILS = 16, TO_SWITCH = -1, NO_LINK = -2 };

typedef struct {
    char function[64];
    int code;
} Fail;

typedef struct {
    char name[96], uuid[96];
    unsigned long long total, reserved, used;
    int power_w, pcie[4], mig;
    int links[MAX_LINKS]; /* index of the far GPU, TO_SWITCH or NO_LINK */
    Fail fails[MAX_FAILS];
} Gpu;

typedef struct {
    char bus_id_legacy[16];
    unsigned int domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} Pci;

typedef struct {
    unsigned long long total, free, used;
} MemoryV1;

typedef struct {
    unsigned int version;
    unsigned long long total, reserved, free, used;
} MemoryV2;

static Gpu gpus[MAX_GPUS];
static Fail system_fails[MAX_FAILS];
static int count, init_code, cuda, running;
static char driver[80];

static void add_fail(Fail *fails, const char *function, int code) {
    for (int i = 0; i < MAX_FAILS; i++)
        if (!fails[i].function[0]) {
            snprintf(fails[i].function, sizeof fails[i].function, "%s", function);
            fails[i].code = code;
            return;
        }
}

static int failure(const Fail *fails, const char *function) {
    for (int i = 0; i < MAX_FAILS; i++)
        if (!strcmp(fails[i].function, function)) return fails[i].code;
    return SUCCESS;
}

static void new_gpu(const char *name) {
    Gpu *gpu = &gpus[count];
    memset(gpu, 0, sizeof *gpu);
    snprintf(gpu->name, sizeof gpu->name, "%s", name);
    snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-%08x-0000-4000-8000-00000000000%x", 0xa0 + count * 16,
             count % 16);
    gpu->power_w = gpu->mig = -1;
    for (int i = 0; i < 4; i++) gpu->pcie[i] = -1;
    for (int i = 0; i < MAX_LINKS; i++) gpu->links[i] = NO_LINK;
    count++;
}

static void add_links(Gpu *gpu, int to, int links) {
    for (int i = 0; i < MAX_LINKS && links > 0; i++)
        if (gpu->links[i] == NO_LINK) {
            gpu->links[i] = to;
            links--;
        }
}

/* 0 where the line is not understood. `first` is the first GPU that the line describes. */
static int statement(const char *line, int *first) {
    char text[96];
    int a, b, c, d;
    if (sscanf(line, "init %d", &init_code) == 1) return 1;
    if (sscanf(line, "driver %79s", driver) == 1) return 1;
    if (sscanf(line, "cuda %d", &cuda) == 1) return 1;
    if (sscanf(line, "gpu %d %95[^\n]", &a, text) == 2) {
        *first = count;
        while (a-- > 0 && count < MAX_GPUS) new_gpu(text);
        return 1;
    }
    if (sscanf(line, "fail %95s %d", text, &a) == 2 && !count) {
        add_fail(system_fails, text, a);
        return 1;
    }
    int known = 0;
    for (int i = *first; i < count; i++) {
        Gpu *gpu = &gpus[i];
        known = 1;
        if (sscanf(line, "memory %d %d %d", &a, &b, &c) == 3) {
            gpu->total = (unsigned long long)a << 20;
            gpu->reserved = (unsigned long long)b << 20;
            gpu->used = (unsigned long long)c << 20;
        } else if (sscanf(line, "power %d", &a) == 1) {
            gpu->power_w = a;
        } else if (sscanf(line, "pcie %d %d %d %d", &a, &b, &c, &d) == 4) {
            gpu->pcie[0] = a, gpu->pcie[1] = b, gpu->pcie[2] = c, gpu->pcie[3] = d;
        } else if (sscanf(line, "mig %d", &a) == 1) {
            gpu->mig = a;
        } else if (sscanf(line, "switch %d", &a) == 1) {
            add_links(gpu, TO_SWITCH, a);
        } else if (sscanf(line, "peer %d %d", &a, &b) == 2) {
            add_links(gpu, a, b);
        } else if (sscanf(line, "fail %95s %d", text, &a) == 2) {
            add_fail(gpu->fails, text, a);
        } else {
            return 0;
        }
    }
    return known;
}

static int load(void) {
    const char *path = getenv("NVML_STUB_SCENARIO");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256];
    int first = 0;
    count = init_code = cuda = 0;
    driver[0] = 0;
    memset(system_fails, 0, sizeof system_fails);
    if (!file) {
        fprintf(stderr, "nvml_stub: NVML_STUB_SCENARIO names no readable file\n");
        return UNKNOWN;
    }
    while (fgets(line, sizeof line, file)) {
        if (line[0] == '#' || line[strspn(line, " \t\n")] == 0) continue;
        if (!statement(line, &first)) {
            fprintf(stderr, "nvml_stub: %s: cannot read: %s", path, line);
            fclose(file);
            return UNKNOWN;
        }
    }
    fclose(file);
    return init_code;
}

int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    int code = load();
    running = code == SUCCESS;
    return code;
}

int nvmlShutdown(void) {
    if (!running) return UNINITIALIZED;
    running = 0;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    return code == NOT_SUPPORTED ? "Not Supported" : "Error of the stub";
}

#define SYSTEM()                                      \
    do {                                              \
        if (!running) return UNINITIALIZED;           \
        int code_ = failure(system_fails, __func__);  \
        if (code_) return code_;                      \
    } while (0)

/* The handle of a GPU is its address. */
#define DEVICE()                                      \
    do {                                              \
        if (!running) return UNINITIALIZED;           \
        if (!gpu) return INVALID_ARGUMENT;            \
        int code_ = failure(gpu->fails, __func__);    \
        if (code_) return code_;                      \
    } while (0)

#define COPY(from)                                    \
    do {                                              \
        if (strlen(from) >= length) return 7;         \
        strcpy(text, from);                           \
        return SUCCESS;                               \
    } while (0)

#define NUMBER(value, known)                          \
    do {                                              \
        if (!(known)) return NOT_SUPPORTED;           \
        *out = (unsigned int)(value);                 \
        return SUCCESS;                               \
    } while (0)

int nvmlSystemGetDriverVersion(char *text, unsigned int length) {
    SYSTEM();
    COPY(driver);
}

int nvmlSystemGetCudaDriverVersion_v2(int *out) {
    SYSTEM();
    NUMBER(cuda, cuda);
}

int nvmlDeviceGetCount_v2(unsigned int *out) {
    SYSTEM();
    NUMBER(count, 1);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Gpu **out) {
    SYSTEM();
    if (index >= (unsigned int)count) return INVALID_ARGUMENT;
    Gpu *gpu = &gpus[index];
    DEVICE();
    *out = gpu;
    return SUCCESS;
}

int nvmlDeviceGetName(Gpu *gpu, char *text, unsigned int length) {
    DEVICE();
    COPY(gpu->name);
}

int nvmlDeviceGetUUID(Gpu *gpu, char *text, unsigned int length) {
    DEVICE();
    COPY(gpu->uuid);
}

int nvmlDeviceGetMemoryInfo(Gpu *gpu, MemoryV1 *memory) {
    DEVICE();
    memory->total = gpu->total;
    memory->used = gpu->reserved + gpu->used;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Gpu *gpu, MemoryV2 *memory) {
    DEVICE();
    if (memory->version != (sizeof *memory | 2u << 24)) return 25;
    memory->total = gpu->total;
    memory->reserved = gpu->reserved;
    memory->used = gpu->used;
    memory->free = gpu->total - gpu->reserved - gpu->used;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(Gpu *gpu, unsigned int *out) {
    DEVICE();
    NUMBER(gpu->power_w * 1000, gpu->power_w >= 0);
}

int nvmlDeviceGetCurrPcieLinkGeneration(Gpu *gpu, unsigned int *out) {
    DEVICE();
    NUMBER(gpu->pcie[0], gpu->pcie[0] > 0);
}

int nvmlDeviceGetCurrPcieLinkWidth(Gpu *gpu, unsigned int *out) {
    DEVICE();
    NUMBER(gpu->pcie[1], gpu->pcie[1] > 0);
}

int nvmlDeviceGetMaxPcieLinkGeneration(Gpu *gpu, unsigned int *out) {
    DEVICE();
    NUMBER(gpu->pcie[2], gpu->pcie[2] > 0);
}

int nvmlDeviceGetMaxPcieLinkWidth(Gpu *gpu, unsigned int *out) {
    DEVICE();
    NUMBER(gpu->pcie[3], gpu->pcie[3] > 0);
}

int nvmlDeviceGetMigMode(Gpu *gpu, unsigned int *out, unsigned int *pending) {
    DEVICE();
    *pending = gpu->mig > 0;
    NUMBER(gpu->mig, gpu->mig >= 0);
}

/* GPUs sit at bus 16, 17, …; the switches at bus 200 are on nobody's list. */
static void address(Pci *pci, int gpu_index) {
    memset(pci, 0, sizeof *pci);
    pci->bus = gpu_index == TO_SWITCH ? 200u : 16u + (unsigned int)gpu_index;
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "0000:%02X:00.0", pci->bus);
}

int nvmlDeviceGetPciInfo_v3(Gpu *gpu, Pci *pci) {
    DEVICE();
    address(pci, (int)(gpu - gpus));
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(Gpu *gpu, unsigned int link, unsigned int *out) {
    DEVICE();
    int any = gpu->links[0] != NO_LINK;
    if (any && link >= MAX_LINKS) return INVALID_ARGUMENT;
    NUMBER(gpu->links[link] != NO_LINK, any);
}

int nvmlDeviceGetNvLinkRemoteDeviceType(Gpu *gpu, unsigned int link, unsigned int *out) {
    DEVICE();
    if (link >= MAX_LINKS || gpu->links[link] == NO_LINK) return INVALID_ARGUMENT;
    NUMBER(gpu->links[link] == TO_SWITCH ? 2 : 0, 1);
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Gpu *gpu, unsigned int link, Pci *pci) {
    DEVICE();
    if (link >= MAX_LINKS || gpu->links[link] == NO_LINK) return INVALID_ARGUMENT;
    address(pci, gpu->links[link]);
    return SUCCESS;
}
