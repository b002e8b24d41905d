// What the kernels in CUDA C++ take from a device, for a CPU: `device.cu` has the same names. The threads of a
// cluster take turns.
#define COUNT (THREADS * SPLIT)
#include "emulated_turns.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint32_t u32;
typedef uint16_t u16;
typedef struct { u32 x, y; } uint2;
typedef struct { u32 x, y, z, w; } uint4;
typedef struct { float x, y, z, w; } float4;

#if TYPE == 2
typedef float Number;
#define VECTOR 4
#else
typedef u16 Number;
#define VECTOR 8
#endif
#define ENTRY static void
#define __device__ static inline
#define __forceinline__
#define __noinline__
#define make_uint2(...) ((uint2){__VA_ARGS__})
#define make_uint4(...) ((uint4){__VA_ARGS__})
#define make_float4(...) ((float4){__VA_ARGS__})
#define __popc __builtin_popcount
#define __clz __builtin_clz
#define __ffs __builtin_ffs
#define __fdividef(one, other) ((one) / (other))

typedef struct { int x, y; } Index;
static Index threadIdx, blockIdx, gridDim;
static unsigned char rooms[SPLIT][ROOM] __attribute__((aligned(16)));

// Where whole warps, blocks or clusters meet, and what each thread brought.
static Meeting warps[COUNT / 32], blocks[SPLIT], cluster;
static u32 brought[COUNT];

static u32 exchanged(u32 mine, int from, u32 otherwise) {
    const int first = now / 32 * 32;
    brought[now] = mine;
    meet(&warps[now / 32], 32);
    const u32 found = from < 0 ? otherwise : brought[first + from];
    meet(&warps[now / 32], 32);
    return found;
}

static u32 __ballot_sync(u32 who, bool yes) {
    u32 made = 0;
    brought[now] = yes;
    meet(&warps[now / 32], 32);
    for (int lane = 0; lane < 32; ++lane) made |= brought[now / 32 * 32 + lane] << lane;
    meet(&warps[now / 32], 32);
    return made;
}

static int __shfl_sync(u32 who, int mine, int from) { return (int)exchanged((u32)mine, from, 0); }

static int __shfl_up_sync(u32 who, int mine, int step) {
    return (int)exchanged((u32)mine, now % 32 - step, (u32)mine);
}

static float __uint_as_float(u32 bits) {
    float made;
    memcpy(&made, &bits, 4);
    return made;
}

static u32 __float_as_uint(float one) {
    u32 bits;
    memcpy(&bits, &one, 4);
    return bits;
}

static u32 __reduce_add_sync(u32 who, u32 mine) {
    u32 made = 0;
    brought[now] = mine;
    meet(&warps[now / 32], 32);
    for (int lane = 0; lane < 32; ++lane) made += brought[now / 32 * 32 + lane];
    meet(&warps[now / 32], 32);
    return made;
}

static u32 __reduce_max_sync(u32 who, u32 mine) {
    u32 made = 0;
    brought[now] = mine;
    meet(&warps[now / 32], 32);
    for (int lane = 0; lane < 32; ++lane) {
        const u32 one = brought[now / 32 * 32 + lane];
        made = one > made ? one : made;
    }
    meet(&warps[now / 32], 32);
    return made;
}

static float rsqrtf(float one) { return 1.0f / sqrtf(one); }

static float __shfl_xor_sync(u32 who, float mine, int with) {
    return __uint_as_float(exchanged(__float_as_uint(mine), now % 32 ^ with, 0));
}

static void __syncthreads(void) { meet(&blocks[now / THREADS], THREADS); }
// A thread that only says that it has come goes on until it waits for the others.
static int waited[COUNT];
static void cluster_arrives(void) {
    waited[now] = cluster.times;
    if (++cluster.come == COUNT) {
        cluster.come = 0;
        ++cluster.times;
    }
}
static void cluster_has_come(void) {
    while (cluster.times == waited[now]) others();
}
// Opens when all have come once more.
typedef struct { u32 bytes[4]; } Gate;
static void gate_waits_for(Gate* gate, u32 bytes) {}
static void gate_opens(Gate* gate) {
    cluster_arrives();
    cluster_has_come();
}
static void last_launch_ends(void) {}
static unsigned char* block_room(void) { return rooms[now / THREADS]; }

static void to_cluster(float* own, Gate* gate, u32 rank, float value) {
    memcpy(rooms[rank] + ((const unsigned char*)own - rooms[now / THREADS]), &value, 4);
}

#if TYPE == 2
static float widened(float one) { return one; }
static float rounded(float one) { return one; }
#else
static float widened(u16 one) {
    if (TYPE == 0) return __uint_as_float((u32)one << 16);
    _Float16 half;
    memcpy(&half, &one, 2);
    return half;
}
static u16 rounded(float one) {
    if (TYPE == 1) {
        const _Float16 half = one;
        u16 bits;
        memcpy(&bits, &half, 2);
        return bits;
    }
    const u32 bits = __float_as_uint(one);
    return one != one ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#endif

static uint4 read(const Number* place) {
    uint4 found;
    memcpy(&found, place, 16);
    return found;
}

static uint4 read_at(const Number* place, u32 slices) { return read(place + (size_t)slices * VECTOR); }

#if KEEP == 3
#define float_of __uint_as_float
#define bits_of __float_as_uint
#include "emulated_pairs.h"
#include SEARCH
#endif
#include SOURCE

static void** given;
static const int* numbers;

static void tile(void) { KERNEL(ARGUMENTS); }

static void place(void) { threadIdx.x = now % THREADS, blockIdx.x = now / THREADS; }

// The whole grid, a cluster after another.
void launch(void** tensors, const int* others_given, int tiles) {
    given = tensors, numbers = others_given, gridDim.y = tiles;
    for (blockIdx.y = 0; blockIdx.y < tiles; ++blockIdx.y) {
        memset(rooms, 0xff, sizeof rooms);  // NaN, where nothing was written
        take_turns(tile, place);
    }
}
