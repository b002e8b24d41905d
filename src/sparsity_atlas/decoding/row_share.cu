// The least entry that a share of a row's mass keeps, as `definition.Threshold` has it. Each block holds the whole row,
// of numbers of 16 bits: two in a register, without their signs.
//
// A few entries say about where it lies. Sums of all that lies below some thresholds say it surely, unless one of them is
// so near to what is wanted that roundings may decide: then integer masses do, as in the definition. One warp decides
// which thresholds are next: what every warp does takes the time of all of them.
//
// Fixed when this is compiled: VECTORS slices of 16 bytes that a thread has of the row; MASS_BITS of the largest mass.

#if KEEP == 3
#define HELD (4 * VECTORS)  // registers
#define SUMS 4              // at once
#define LIMBS 6
#define EMPTY (TYPE == 0 ? 16 : 13)  // bits that a number leaves empty in float32
#define INFINITE (TYPE == 0 ? 0x7f80 : 0x7c00)
#define OCTAVE (TYPE == 0 ? 128 : 1024)
#define UNIT (TYPE == 0 ? 0x3f803f80u : 0x3c003c00u)
#define APART (OCTAVE / 8)  // thresholds of the first sums
#define GUESSES 2
#define STRAIGHT (3 * APART)  // so near to each other, what lies below is about a straight line
#define TRIES 24
// Of a sum by the matrix units: in each of HELD / 2 steps 18 numbers are cut off at 2^-23; some sums more.
#define ROUNDED ((HELD / 2 + 2) * 18 / 8388608.0f)
// Of the whole: what the definition's integers cut off.
#define FLOORED (1.0f / (1 << 28))
#define WARPS_OF_ROW (THREADS / 32)

typedef unsigned long long u64;
// Of the share, as `definition.limbs` has them.
typedef struct { int of[LIMBS]; } Digits;
// What the search has of the shared memory: some slices of the row, sums of warps, and what the first warp says:
// the next thresholds, between which the right one is, and whether it is found, or integers have to decide.
typedef struct {
    uint4 some[32], least;
    u64 whole[WARPS_OF_ROW];
    float sums[SUMS * WARPS_OF_ROW];
    int low, high, state;
} Search;
enum { GOES_ON, FOUND, OPEN };

__device__ __forceinline__ float value_of(int pattern) {
    return TYPE == 0 ? __uint_as_float((u32)pattern << 16) : half_low((u32)pattern);
}

__device__ __forceinline__ int pattern_of(float value) {
    if (TYPE == 0) return (int)(__float_as_uint(value) >> 16);
    return value < 6.1035156e-5f ? (int)(value * 16777216.0f) : (int)(__float_as_uint(value) >> 13) - (112 << 10);
}

__device__ __forceinline__ int between(int one, int low, int high) { return one < low ? low : one > high ? high : one; }

__device__ __forceinline__ float of_lane(float one, int lane) {
    return __uint_as_float((u32)__shfl_sync(~0u, (int)__float_as_uint(one), lane));
}

// How far to go from a threshold for what lies below it to become what is wanted: patterns are about logarithms.
__device__ __forceinline__ int step_to(float wanted, float below, float run) {
    const float apart = (float)((int)__float_as_uint(wanted) - (int)__float_as_uint(below));
    return (int)fminf(fmaxf(apart * run / (float)(1 << EMPTY), -8.0f * OCTAVE), 8.0f * OCTAVE);
}

// By some entries of the row, those of a lane in a slice.
__device__ __forceinline__ int guessed(uint4 some, float rest_share, float guess, float run) {
    const u32 pairs[4] = {some.x, some.y, some.z, some.w};
    u32 most = larger(larger(pairs[0], pairs[1]), larger(pairs[2], pairs[3]));
    most = __reduce_max_sync(~0u, most >> 16 > (most & 0xffff) ? most >> 16 : most & 0xffff);
    if (most == 0 || most >= INFINITE) return 1;
    // Whole numbers, which many may be added up of.
    const float scale = __fdividef(4194304.0f, value_of((int)most));
    u32 parts[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 pattern = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff;
        parts[i] = (u32)(value_of((int)pattern) * scale);
        sum += parts[i];
    }
    const float total = (float)__reduce_add_sync(~0u, sum), wanted = rest_share * total;
    u32 at = (u32)fminf(total * (guess / 256.0f), 4194304.0f);
#pragma unroll
    for (int turn = 0; turn < GUESSES; ++turn) {
        u32 below = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) below += parts[i] < at ? parts[i] : 0;
        const float rest = (float)__reduce_add_sync(~0u, below) + 1.0f;
        const float apart = (float)((int)__float_as_uint(wanted + 1.0f) - (int)__float_as_uint(rest)) * run;
        const int bits = (int)__float_as_uint((float)at) + (int)fminf(fmaxf(apart, -3e7f), 3e7f);
        at = (u32)fminf(__uint_as_float((u32)between(bits, 0x3f800000, 0x4a800000)), 4194304.0f);
    }
    return between(pattern_of(__fdividef((float)at, scale)), 1, INFINITE - 1);
}

// Of what a thread has of each sum, over the warp: of each lane that of its number modulo SUMS.
__device__ __forceinline__ float of_warp(const float* mine) {
    const bool odd = threadIdx.x & 1, late = threadIdx.x & 2;
    const float first = (odd ? mine[1] : mine[0]) + __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
    const float second = (odd ? mine[3] : mine[2]) + __shfl_xor_sync(~0u, odd ? mine[2] : mine[3], 1);
    float sum = (late ? second : first) + __shfl_xor_sync(~0u, late ? first : second, 2);
#pragma unroll
    for (int step = SUMS; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// Of what warps have, likewise.
__device__ __forceinline__ float of_warps(const float* sums) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
#pragma unroll
    for (int from = 0; from < WARPS_OF_ROW; from += 32 / SUMS)
        if (from + lane / SUMS < WARPS_OF_ROW) sum += sums[(from + lane / SUMS) * SUMS + lane % SUMS];
#pragma unroll
    for (int step = SUMS; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// Of whole numbers below 2^62.
__device__ __forceinline__ u64 whole_of_block(u64 one, u64* slots) {
    u64 made = 0;
    const u64 low = __reduce_add_sync(~0u, (u32)one & 0x1fffff);
    const u64 middle = __reduce_add_sync(~0u, (u32)(one >> 21) & 0x1fffff);
    const u64 high = __reduce_add_sync(~0u, (u32)(one >> 42));
    __syncthreads();
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = low + (middle << 21) + (high << 42);
    __syncthreads();
    for (int from = 0; from < WARPS_OF_ROW; ++from) made += slots[from];
    return made;
}

// ceil(amount * total), a long multiplication with the digits of the share.
__device__ __forceinline__ u64 share_of(u64 total, Digits digits) {
    const u64 low_bits = 0x7fffffff, upper = total >> 31, lower = total & low_bits;
    u64 carry = 0, rest = 0, next = 0;
#pragma unroll
    for (int place = LIMBS - 1; place >= 0; --place) {
        const u64 limb = (u64)digits.of[place], column = limb * lower + next * upper + carry;
        rest |= column & low_bits;
        carry = column >> 31;
        next = limb;
    }
    return next * upper + carry + (rest != 0);
}

// floor(score / unit * 2^MASS_BITS) of `definition.masses` of what reaches a pattern: of a thread.
__device__ __forceinline__ u64 masses_from(const u32* held, int least, float by, u32 turned) {
    u64 made = 0;
#pragma unroll 1
    for (int i = 0; i < 2 * HELD; ++i) {
        u32 both = 0;
#pragma unroll
        for (int j = 0; j < HELD; ++j) both = j == i / 2 ? held[j] : both;
        const int pattern = (int)(i % 2 ? both >> 16 : both & 0xffff);
        const u32 bits = __float_as_uint(value_of(pattern) * by), shift = turned - (bits >> 23);
        const u64 mass = (u64)((bits & 0x7fffff) | 0x800000) << 32;
        if (pattern >= least && pattern > 0 && shift < 64) made += mass >> shift;
    }
    return made;
}

// By integers: all is reached at `low`, and less than is asked for at `high`, or the row's largest is below it.
__device__ __noinline__ int least_by_integers(const u32* given, int low, int high, Digits digits, u64* slots) {
    u32 held[HELD], most = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = given[i], most = larger(most, held[i]);
    most = __reduce_max_sync(~0u, most >> 16 > (most & 0xffff) ? most >> 16 : most & 0xffff);
    __syncthreads();
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = most;
    __syncthreads();
    for (int from = 0; from < WARPS_OF_ROW; ++from) most = (u32)slots[from] > most ? (u32)slots[from] : most;
    if (most == 0 || most >= INFINITE) return 0;
    // So that no number that counts is denormal.
    const float by = value_of((int)most) < 1.0842022e-19f ? 18446744073709551616.0f : 1.0f;
    const u32 turned = 56 - MASS_BITS + (__float_as_uint(value_of((int)most) * by) >> 23);
    const u64 total = whole_of_block(masses_from(held, 0, by, turned), slots);
    u64 target = share_of(total, digits);
    target = target < 1 ? 1 : target > total ? total : target;
    high = high > (int)most + 1 ? (int)most + 1 : high;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (whole_of_block(masses_from(held, middle, by, turned), slots) >= target) low = middle;
        else high = middle;
    }
    return low;
}

// Ask for sums below some thresholds: by the first warp.
__device__ __forceinline__ int asked(Search* search, int first, int apart, int low, int high) {
    const int lane = threadIdx.x % 32, one = between(first + lane % SUMS * apart, low + 1, high - 1);
    if (lane < SUMS) ((u32*)&search->least)[lane] = (u32)one | (u32)one << 16;
    return one;
}

// The pattern of the least entry that is kept; 0 where all are.
__device__ __forceinline__ int least_kept(const u32* held, float rest_share, float guess, float run, Digits digits,
                                          Search* search) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    if (thread % WARPS_OF_ROW == 0)
        search->some[thread / WARPS_OF_ROW] = make_uint4(held[0], held[1], held[2], held[3]);
    __syncthreads();
    // Less lies below `low` than is wanted, surely, and below `high` more. The first warp's alone.
    int low = 0, high = INFINITE, tried = 0;
    float total = 0.0f, wanted = 0.0f, low_rest = 0.0f, high_rest = 0.0f;
    if (warp == 0)
        tried = asked(search, guessed(search->some[lane], rest_share, guess, run) - 2 * APART, APART, low, high);
    __syncthreads();
#pragma unroll 1
    for (int turn = 0;; ++turn) {
        const uint4 least = search->least;
        float sums[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}}, mine[SUMS];
#pragma unroll
        for (int i = 0; i < HELD / 2; ++i) {
            const u32 p = held[2 * i], q = held[2 * i + 1];
            // The first of the first sums is that of all.
            const u32 p_first = turn ? is_below(p, least.x) : UNIT, q_first = turn ? is_below(q, least.x) : UNIT;
            add_products(sums[0], p_first, q_first, is_below(p, least.y), is_below(q, least.y), p, q);
            add_products(sums[1], is_below(p, least.z), is_below(q, least.z), is_below(p, least.w), is_below(q, least.w),
                         p, q);
        }
#pragma unroll
        for (int j = 0; j < SUMS; ++j) mine[j] = part_of(sums[j / 2], j % 2);
        const float part = of_warp(mine);
        if (lane < SUMS) search->sums[warp * SUMS + lane] = part;
        __syncthreads();
        if (warp == 0) {
            const float below = of_warps(search->sums);
            if (turn == 0) total = of_lane(below, 0), wanted = rest_share * total;
            const bool counts = lane < SUMS && (lane > 0 || turn > 0);
            const float unsure = ROUNDED * (wanted + below) + FLOORED * total;
            const u32 enough = __ballot_sync(~0u, counts && wanted - below > unsure);
            const u32 short_of = __ballot_sync(~0u, counts && below - wanted > unsure);
            if (enough) {
                const int which = 31 - __clz(enough);
                low = __shfl_sync(~0u, tried, which), low_rest = of_lane(below, which);
            }
            if (short_of) {
                const int which = __ffs(short_of) - 1;
                high = __shfl_sync(~0u, tried, which), high_rest = of_lane(below, which);
            }
            int state = GOES_ON, first, apart = APART;
            // Sums may overflow, or leave out what is denormal; of what is no number they are none.
            if (!(total > 1.0842022e-19f && total < 1e38f)) low = 0, high = INFINITE, state = OPEN;
            else if (high - low == 1) state = FOUND;
            else if ((enough | short_of) != (turn ? 15 : 14) || turn == TRIES) state = OPEN;
            if (turn > 3) {
                apart = (high - low + SUMS) / (SUMS + 1);
                first = low + apart;
            } else if (low > 0 && high < INFINITE) {
                const float place = __fdividef(wanted - low_rest, high_rest - low_rest);
                apart = high - low <= STRAIGHT ? 1 : (high - low) / 8;
                first = low + (int)(place * (float)(high - low)) - apart;
            } else {
                first = (low > 0 ? low : high) + step_to(wanted, low > 0 ? low_rest : high_rest, run) - apart;
            }
            tried = asked(search, first, apart, low, high);
            if (lane == 0) search->low = low, search->high = high, search->state = state;
        }
        __syncthreads();
        if (search->state != GOES_ON) break;
    }
    if (search->state == FOUND) return search->low;
    u32 copied[HELD];  // so that `held` stays in registers
#pragma unroll
    for (int i = 0; i < HELD; ++i) copied[i] = held[i];
    return least_by_integers(copied, search->low, search->high, digits, search->whole);
}
#endif
