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

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define INLINE __device__ __forceinline__
#define SHARED __shared__
#define ALL 0xffffffff

#define float_of __uint_as_float
#define bits_of __float_as_uint
#define nearest __float2uint_rn
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
