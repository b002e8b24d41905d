// What `kernels/share.cu` takes from a device, for a CPU: `share_device.cu` has the same names. The threads of a block
// take turns.
#define COUNT THREADS
#include "emulated_turns.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint64_t u64;
typedef struct { u32 x, y, z, w; } uint4;
typedef struct { float x, y, z, w; } float4;

#if TYPE == 2
typedef u32 Bits;
#define VECTOR 4
#else
typedef u16 Bits;
#define VECTOR 8
#endif
#define ENTRY static void
#define INLINE static inline
#define SHARED static
#define make_uint4(...) ((uint4){__VA_ARGS__})
#define nearest(one) ((u32)rintf(one))
#define __clz __builtin_clz

typedef struct { int x; } Index;
static Index threadIdx, blockIdx;

// Where warps or the block meet, and what each thread brought.
static Meeting warps[THREADS / 32], block;
static u32 brought[THREADS];

static void block_meets(void) { meet(&block, THREADS); }

// What the threads of a warp bring, for all of them.
typedef struct { u32 of[32]; } Warp;
static Warp exchanged(u32 mine) {
    Warp found;
    brought[now] = mine;
    meet(&warps[now / 32], 32);
    memcpy(found.of, brought + now / 32 * 32, sizeof found.of);
    meet(&warps[now / 32], 32);
    return found;
}

static u32 warp_sum(u32 one) {
    const Warp found = exchanged(one);
    u32 made = 0;
    for (int i = 0; i < 32; ++i) made += found.of[i];
    return made;
}

static u32 warp_max(u32 one) {
    const Warp found = exchanged(one);
    u32 made = 0;
    for (int i = 0; i < 32; ++i) made = found.of[i] > made ? found.of[i] : made;
    return made;
}

static u32 warp_votes(bool one) {
    const Warp found = exchanged(one);
    u32 made = 0;
    for (int i = 0; i < 32; ++i) made |= found.of[i] << i;
    return made;
}

static u32 of_lane_above(u32 one, int step) {
    const Warp found = exchanged(one);
    return now % 32 + step < 32 ? found.of[now % 32 + step] : one;
}

static float float_of(u32 bits) {
    float made;
    memcpy(&made, &bits, 4);
    return made;
}

static u32 bits_of(float one) {
    u32 made;
    memcpy(&made, &one, 4);
    return made;
}

static float warp_total(float one) {
    const Warp found = exchanged(bits_of(one));
    float made = 0;
    for (int i = 0; i < 32; ++i) made += float_of(found.of[i]);
    return made;
}

static u32 next_place(u32* count) { return (*count)++; }
static void raise_to(u32* place, u32 one) { *place = one > *place ? one : *place; }
static void one_more_of(u32* all_of_them, u32 which, u32 count) {
    if (which < count) ++all_of_them[which];
}
static u64 shifted(u64 one, u32 by) { return by > 63 ? 0 : one >> by; }
static float plus_below(float sum, float one, float least) { return one < least ? sum + one : sum; }
static float plus_not_below(float sum, float one, float least) { return one >= least ? sum + one : sum; }

#include "emulated_pairs.h"

#include SOURCE

static const void** given;
static const int* numbers;

static void row(void) {
    mask_rows(given[0], given[1], (void*)given[2], (void*)given[3], (void*)given[4], given[5], given[6], numbers[0],
              numbers[1], numbers[2]);
}

static void place(void) { threadIdx.x = now; }

// A block after another.
void launch(const void** tensors, const int* integers, int rows) {
    given = tensors, numbers = integers;
    for (blockIdx.x = 0; blockIdx.x < rows; ++blockIdx.x) take_turns(row, place);
}
