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
#define forget(one)
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

#if TYPE != 2
static float of_half(u32 bits) {
    const u32 exponent = bits >> 10 & 31, rest = bits & 0x3ff;
    if (exponent == 31) return rest ? NAN : INFINITY;
    return exponent ? ldexpf(1024 + rest, (int)exponent - 25) : ldexpf(rest, -24);
}
static float half_low(u32 both) { return of_half(both & 0x7fff); }
static float half_high(u32 both) { return of_half(both >> 16 & 0x7fff); }

// Of a number of the type, a small whole one.
static u32 small(int one) {
    if (TYPE == 0 || one == 0) return bits_of((float)one) >> 16;
    const int power = 31 - __builtin_clz(one);
    return (u32)(power + 15) << 10 | ((u32)one << 10 >> power & 0x3ff);
}
static float wide(u32 bits) { return TYPE == 0 ? float_of(bits << 16) : of_half(bits); }
static u32 halves(u32 low, u32 high) { return low | high << 16; }
#define LOW(one) ((one) & 0xffff)
#define HIGH(one) ((one) >> 16)

static u32 larger(u32 one, u32 other) {
    return halves(LOW(one) > LOW(other) ? LOW(one) : LOW(other), HIGH(one) > HIGH(other) ? HIGH(one) : HIGH(other));
}
static u32 is_below(u32 one, u32 least) {
    return halves(small(LOW(one) < LOW(least)), small(HIGH(one) < HIGH(least)));
}
static u32 is_not_below(u32 one, u32 least) {
    return halves(small(LOW(one) >= LOW(least)), small(HIGH(one) >= HIGH(least)));
}
static u32 is_same(u32 one, u32 other) {
    return halves(small(LOW(one) == LOW(other)), small(HIGH(one) == HIGH(other)));
}
static u32 reaches(u32 one, u32 least) {
    return (LOW(one) >= LOW(least) ? 0xffff : 0) | (HIGH(one) >= HIGH(least) ? 0xffff0000 : 0);
}
static u32 plus(u32 one, u32 other) {
    return halves(small((int)(wide(LOW(one)) + wide(LOW(other)))), small((int)(wide(HIGH(one)) + wide(HIGH(other)))));
}
static u32 counted(u32 both) { return (u32)wide(LOW(both)) + (u32)wide(HIGH(both)); }
static float product(u32 one, u32 other) { return wide(LOW(one)) * wide(LOW(other)) + wide(HIGH(one)) * wide(HIGH(other)); }
static void add_products(float* sums, u32 a0, u32 a1, u32 b0, u32 b1, u32 p, u32 q) {
    sums[0] += product(a0, p) + product(a1, q);
    sums[2] += product(b0, p) + product(b1, q);
}
static float part_of(const float* sums, int which) { return sums[2 * which]; }
#endif

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
