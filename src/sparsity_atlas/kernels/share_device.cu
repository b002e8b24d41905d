// What `share.cu` takes from the device; the tests have another file of the same names for a CPU.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#if TYPE == 2
typedef u32 Bits;
#define VECTOR 4
#else
typedef u16 Bits;
#define VECTOR 8
#endif
#if TYPE == 0
#define PAIR "bf16"
#else
#define PAIR "f16"
#endif

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define INLINE __device__ __forceinline__
#define SHARED __shared__
#define ALL 0xffffffff

#define float_of __uint_as_float
#define bits_of __float_as_uint
#define nearest __float2uint_rn
// So that what is made of a number is made anew, and takes no register meanwhile.
#define forget(one) asm volatile("" : "+r"(one))

INLINE u32 warp_sum(u32 one) { return __reduce_add_sync(ALL, one); }
INLINE u32 warp_max(u32 one) { return __reduce_max_sync(ALL, one); }
INLINE u32 warp_votes(bool one) { return __ballot_sync(ALL, one); }
INLINE u32 of_lane_above(u32 one, int step) { return __shfl_down_sync(ALL, one, step); }

INLINE float warp_total(float one) {
#pragma unroll
    for (int step = 16; step; step /= 2) one += __shfl_xor_sync(ALL, one, step);
    return one;
}

INLINE void block_meets() {
    if (THREADS > 32) __syncthreads();
    else __syncwarp();
}

INLINE u32 next_place(u32* count) { return atomicAdd(count, 1u); }
INLINE void raise_to(u32* place, u32 one) { atomicMax(place, one); }

// all[which] += 1, if there is one.
INLINE void one_more_of(u32* all, u32 which, u32 count) {
    asm volatile("{.reg .pred p; setp.lt.u32 p, %1, %2; @p red.shared.add.u32 [%0], 1;}" ::"r"(
                     (u32)__cvta_generic_to_shared(all) + 4 * which),
                 "r"(which), "r"(count)
                 : "memory");
}

// Shifted right; by 64 and more nothing is left.
INLINE u64 shifted(u64 one, u32 by) {
    u64 made;
    asm("shr.u64 %0, %1, %2;" : "=l"(made) : "l"(one), "r"(by));
    return made;
}

// sum + one, if it is below `least`, or if it is not.
INLINE float plus_below(float sum, float one, float least) {
    float is;
    asm("set.lt.f32.f32 %0, %1, %2;" : "=f"(is) : "f"(one), "f"(least));
    return fmaf(is, one, sum);
}

INLINE float plus_not_below(float sum, float one, float least) {
    float is;
    asm("set.ge.f32.f32 %0, %1, %2;" : "=f"(is) : "f"(one), "f"(least));
    return fmaf(is, one, sum);
}

#if TYPE != 2
// Of two numbers of 16 bits in one of 32.

INLINE u32 larger(u32 one, u32 other) {
    u32 made;
    asm("max.u16x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(other));
    return made;
}

INLINE float half_low(u32 both) {
    float made;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(made) : "r"(both));
    return made;
}

INLINE float half_high(u32 both) {
    float made;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(made) : "r"(both));
    return made;
}

// All bits of the halves that are not below `least`.
INLINE u32 reaches(u32 one, u32 least) {
    u32 made;
    asm("set.ge.u32." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(least));
    return made;
}

// The number 1 in the halves of which it is so, else 0.
INLINE u32 is_below(u32 one, u32 least) {
    u32 made;
    asm("set.lt." PAIR "x2." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(least));
    return made;
}

INLINE u32 is_not_below(u32 one, u32 least) {
    u32 made;
    asm("set.ge." PAIR "x2." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(least));
    return made;
}

INLINE u32 is_same(u32 one, u32 other) {
    u32 made;
    asm("set.eq." PAIR "x2." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(other));
    return made;
}

// Counts, as numbers of the type.
INLINE u32 plus(u32 one, u32 other) {
    u32 made;
    asm("add.rn." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(other));
    return made;
}

INLINE u32 counted(u32 both) {
#if TYPE == 0
    return (u32)float_of(both << 16) + (u32)float_of(both & 0xffff0000u);
#else
    return (u32)half_low(both) + (u32)half_high(both);
#endif
}

// Adds a0 · p + a1 · q to one sum and b0 · p + b1 · q to another. The matrix units multiply a matrix [16, 16] and one
// [16, 8]: on the diagonals of the upper and of the lower half of what they make stand products of what one thread
// brings with what it brings. They sum over the warp, so that `part_of` is a thread's part of a sum.
INLINE void add_products(float* sums, u32 a0, u32 a1, u32 b0, u32 b1, u32 p, u32 q) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." PAIR "." PAIR
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(b0), "r"(a1), "r"(b1), "r"(p), "r"(q));
}

INLINE float part_of(const float* sums, int which) {
    const int lane = threadIdx.x % 32, line = lane / 4;
    const float one = line % 2 ? sums[2 * which + 1] : sums[2 * which];
    return lane % 4 == line / 2 ? one : 0.0f;
}
#endif
