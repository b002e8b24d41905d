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
#define APART (OCTAVE / 5)  // thresholds of the first sums
#define STRAIGHT (2 * APART)  // so near to each other, what lies below is about a straight line
#define TRIES 24
// Of a sum by the matrix units: in each of HELD / 4 steps 18 numbers are cut off at 2^-23; some sums more.
#define ROUNDED ((HELD / 4 + 2) * 18 / 8388608.0f)
// Of the whole: what the definition's integers cut off.
#define FLOORED (1.0f / (1 << 28))
#define WARPS_OF_ROW (THREADS / 32)
#define SAMPLED (THREADS < 64 ? 32 : 64)  // slices
#define PARTS_OF_ROW (WARPS_OF_ROW * PARTS_OF_WARP)
#define ROOM_OF_SUM (PARTS_OF_ROW + 4)  // so that those of four sums lie in other banks

typedef unsigned long long u64;
// Of the share, as `definition.limbs` has them.
typedef struct { int of[LIMBS]; } Digits;
// Where the row is read anew.
typedef struct { const Number *x, *more, *scale; float unit; int K; } Row;
__device__ __forceinline__ uint4 sizes_of(Row row, int slice);
// What the search has of the shared memory: some slices of the row, parts of sums, and what the first warp says:
// the next thresholds, between which the right one is, and whether it is found, or integers have to decide.
typedef struct {
    uint4 some[SAMPLED], least;
    float sums[SUMS * ROOM_OF_SUM];
    u64 whole[2 * WARPS_OF_ROW];
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
    return (int)fminf(fmaxf(apart * (run / (1 << EMPTY)), -8.0f * OCTAVE), 8.0f * OCTAVE);
}

__device__ __forceinline__ float of_lanes(float one) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) one += __shfl_xor_sync(~0u, one, step);
    return one;
}

// By some slices of the row: a line through what lies below two thresholds, `guess` times the mean.
__device__ __forceinline__ int guessed(const uint4* some, float rest_share, float guess, float run) {
    float scores[SAMPLED / 4], sum = 0.0f;
#pragma unroll
    for (int from = 0; from < SAMPLED; from += 32) {
        const uint4 slice = some[from + threadIdx.x % 32];
        const u32 pairs[4] = {slice.x, slice.y, slice.z, slice.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float one = value_of((int)(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff));
            scores[from / 4 + i] = one;
            sum += one;
        }
    }
    const float total = of_lanes(sum), at = total * (guess / (8 * SAMPLED));
    const float first = at * 0.8f, second = at * 1.2f;
    float below = 0.0f, more = 0.0f;
#pragma unroll
    for (int i = 0; i < SAMPLED / 4; ++i) {
        below += scores[i] < first ? scores[i] : 0.0f;
        more += scores[i] < second ? scores[i] : 0.0f;
    }
    below = of_lanes(below), more = of_lanes(more);
    const float rise = (float)((int)__float_as_uint(more) - (int)__float_as_uint(below));
    const float apart = (float)((int)__float_as_uint(second) - (int)__float_as_uint(first));
    const bool usable = below > 0.0f && rise * 20.0f > apart;
    const int center = pattern_of(first) + step_to(rest_share * total, below, usable ? __fdividef(apart, rise) : run);
    return between(center, 1, INFINITE - 1);
}

// Sums over the block, of each lane that of its number modulo SUMS: by one warp.
__device__ __forceinline__ float of_parts(const float* sums) {
    const int lane = threadIdx.x % 32;
    const float* own = sums + lane % SUMS * ROOM_OF_SUM + lane / SUMS * (PARTS_OF_ROW / 8);
    float sum = 0.0f;
    if (PARTS_OF_ROW / 8 % 4 == 0) {
#pragma unroll
        for (int i = 0; i < PARTS_OF_ROW / 8; i += 4) {
            const float4 four = *(const float4*)(own + i);
            sum += (four.x + four.y) + (four.z + four.w);
        }
    } else {
        for (int i = 0; i < PARTS_OF_ROW / 8; ++i) sum += own[i];
    }
#pragma unroll
    for (int step = SUMS; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// Sums over the block of two whole numbers below 2^62 that each thread has.
__device__ __forceinline__ void wholes_of_block(u64* two, u64* slots) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const u64 low = __reduce_add_sync(~0u, (u32)two[j] & 0x1fffff);
        const u64 middle = __reduce_add_sync(~0u, (u32)(two[j] >> 21) & 0x1fffff);
        const u64 high = __reduce_add_sync(~0u, (u32)(two[j] >> 42));
        if (threadIdx.x % 32 == 0) slots[j * WARPS_OF_ROW + threadIdx.x / 32] = low + (middle << 21) + (high << 42);
        two[j] = 0;
    }
    __syncthreads();
    for (int from = 0; from < WARPS_OF_ROW; ++from)
        two[0] += slots[from], two[1] += slots[WARPS_OF_ROW + from];
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

// floor(score / unit * 2^MASS_BITS) of `definition.masses`; `turned` is 56 - MASS_BITS + the peak's exponent.
__device__ __forceinline__ u64 mass_of(u32 pattern, float by, u32 turned) {
    const u32 bits = __float_as_uint(value_of((int)pattern) * by), shift = turned - (bits >> 23);
    const u64 mass = (u64)((bits & 0x7fffff) | 0x800000) << 32;
    return pattern > 0 && shift < 64 ? mass >> shift : 0;
}

// By integers: all is reached at `low`, and less than is asked for at `high`, or the row's largest is below it.
// It comes to that so rarely that registers for it would be missing to all else.
__device__ __forceinline__ int least_by_integers(Row row, int low, int high, Digits digits, u64* slots) {
    u32 most = 0;
#pragma unroll 1
    for (int v = 0; v < VECTORS; ++v) {
        const uint4 slice = sizes_of(row, v);
        most = larger(most, larger(larger(slice.x, slice.y), larger(slice.z, slice.w)));
    }
    most = __reduce_max_sync(~0u, most >> 16 > (most & 0xffff) ? most >> 16 : most & 0xffff);
    __syncthreads();
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = most;
    __syncthreads();
#pragma unroll 1
    for (int from = 0; from < WARPS_OF_ROW; ++from) most = (u32)slots[from] > most ? (u32)slots[from] : most;
    if (most == 0 || most >= INFINITE) return 0;
    // So that no number that counts is denormal.
    const float by = value_of((int)most) < 1.0842022e-19f ? 18446744073709551616.0f : 1.0f;
    const u32 turned = 56 - MASS_BITS + (__float_as_uint(value_of((int)most) * by) >> 23);
    high = high > (int)most + 1 ? (int)most + 1 : high;
#pragma unroll 1
    while (high - low > 1) {
        const u32 middle = (u32)(low + high) / 2;
        u64 two[2] = {0, 0};  // of all, and of what reaches the middle
#pragma unroll 1
        for (int v = 0; v < VECTORS; ++v) {
            const uint4 slice = sizes_of(row, v);
            const u32 pairs[4] = {slice.x, slice.y, slice.z, slice.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const u32 pattern = i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff;
                const u64 mass = mass_of(pattern, by, turned);
                two[0] += mass;
                two[1] += pattern >= middle ? mass : 0;
            }
        }
        wholes_of_block(two, slots);
        u64 target = share_of(two[0], digits);
        target = target < 1 ? 1 : target > two[0] ? two[0] : target;
        if (two[1] >= target) low = (int)middle;
        else high = (int)middle;
    }
    return low;
}

// One of SUMS thresholds between `low` and `high`.
__device__ __forceinline__ int tried(int which, int first, int apart, int low, int high) {
    return between(first + which * apart, low + 1, high - 1);
}

// The pattern of the least entry that is kept; 0 where all are.
__device__ __forceinline__ int least_kept(const u32* held, Row row, float rest_share, float guess, float run, Digits digits,
                                          Search* search) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    if (thread % (THREADS / SAMPLED) == 0 && thread / (THREADS / SAMPLED) < SAMPLED)
        search->some[thread / (THREADS / SAMPLED)] = make_uint4(held[0], held[1], held[2], held[3]);
    __syncthreads();
    // Less lies below `low` than is wanted, surely, and below `high` more. All this is the first warp's.
    int low = 0, high = INFINITE, first = 0, apart = APART;
    float total = 0.0f, wanted = 0.0f, low_rest = 0.0f, high_rest = 0.0f;
    if (warp == 0) {
        first = guessed(search->some, rest_share, guess, run) - 2 * APART;
        const u32 one = (u32)tried(lane % SUMS, first, apart, low, high);
        if (lane < SUMS) ((u32*)&search->least)[lane] = one | one << 16;
    }
    __syncthreads();
#pragma unroll 1
    for (int turn = 0;; ++turn) {
        const uint4 least = search->least;
        float sums[2][2][4] = {};
#pragma unroll
        for (int i = 0; i < HELD / 2; ++i) {
            const u32 p = held[2 * i], q = held[2 * i + 1];
            // The first of the first sums is that of all.
            const u32 p_first = turn ? is_below(p, least.x) : UNIT, q_first = turn ? is_below(q, least.x) : UNIT;
            add_products(sums[i % 2][0], p_first, q_first, is_below(p, least.y), is_below(q, least.y), p, q);
            add_products(sums[i % 2][1], is_below(p, least.z), is_below(q, least.z), is_below(p, least.w),
                         is_below(q, least.w), p, q);
        }
        if (has_part()) {
            float* own = search->sums + warp * PARTS_OF_WARP + place_of_part();
#pragma unroll
            for (int j = 0; j < SUMS; ++j)
                own[j * ROOM_OF_SUM] = part_of(sums[0][j / 2], j % 2) + part_of(sums[1][j / 2], j % 2);
        }
        __syncthreads();
        if (warp == 0) {
            const float below = of_parts(search->sums);
            if (turn == 0) total = of_lane(below, 0), wanted = rest_share * total;
            const bool counts = lane < SUMS && (lane > 0 || turn > 0);
            const float unsure = ROUNDED * (wanted + below) + FLOORED * total;
            const u32 enough = __ballot_sync(~0u, counts && wanted - below > unsure);
            const u32 short_of = __ballot_sync(~0u, counts && below - wanted > unsure);
            // Of these the last and the first.
            const int last = 30 - __clz(enough << 1 | 1), next = __ffs(short_of) - 1;
            const float last_rest = of_lane(below, last & 31), next_rest = of_lane(below, next & 31);
            const int last_one = tried(last, first, apart, low, high), next_one = tried(next, first, apart, low, high);
            if (last >= 0) low = last_one, low_rest = last_rest;
            if (next >= 0) high = next_one, high_rest = next_rest;
            int state = GOES_ON;
            // Sums may overflow, or leave out what is denormal; of what is no number they are none.
            if (!(total > 1.0842022e-19f && total < 1e38f)) low = 0, high = INFINITE, state = OPEN;
            else if (high - low == 1) state = FOUND;
            else if ((enough | short_of) != (turn ? 15 : 14) || turn == TRIES) state = OPEN;
            apart = APART;
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
            const u32 one = (u32)tried(lane % SUMS, first, apart, low, high);
            if (lane < SUMS) ((u32*)&search->least)[lane] = one | one << 16;
            if (lane == 0) search->low = low, search->high = high, search->state = state;
        }
        __syncthreads();
        if (search->state != GOES_ON) break;
    }
    if (search->state == FOUND) return search->low;
    return least_by_integers(row, search->low, search->high, digits, search->whole);
}
#endif
