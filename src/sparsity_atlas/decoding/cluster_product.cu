// Products of one token that leave out rows of a transposed weight: y = W (x ⊙ m), and u ⊙ σ(g) of two maps.
//
// A cluster of SPLIT blocks makes COLUMNS entries of y. Each block lists those of its rows that x keeps in its
// shared memory, in their own order; its threads read 16 bytes of UNROLL listed rows at once, PER_ROW threads
// side by side, and add up in float32. Sums meet within a warp, in shared memory, and in that of the block of
// the cluster that owns them, in an order that is always the same: no counter, no fence, nothing to be cleared,
// nothing in global memory.
//
// With NORM what is read is the root-mean-square norm of x + more, times `scale`. Each block makes it for itself;
// the blocks of the first tile leave the sum in `total`.
//
// Fixed when this is compiled (see cluster_products.py): TYPE 0 bfloat16, 1 float16, 2 float32; THREADS,
// PER_ROW, SPLIT, UNROLL, BLOCKS (of a processor, at least); CHUNKS of 32 rows that a block has at most;
// KEEP 0 all, 1 what is not zero, 2 what reaches a constant, BY_CHANNEL each its own, 3 what holds a share of the mass,
// for which each block finds the threshold itself (row_share.cu); MAPS, ACTIVATION 1 silu,
// 2 relu; BIAS; NORM 0 none, else of how many slices of 16 bytes a thread adds up the squares, with MORE and EPS,
// the bits of what is added to their mean.

#define COLUMNS (PER_ROW * VECTOR)
#define GROUPS (THREADS / PER_ROW)
#define WARPS (THREADS / 32)
#define ROUNDS ((CHUNKS + WARPS - 1) / WARPS)
#define OWN ((COLUMNS + SPLIT - 1) / SPLIT)
#define NONE 0xffffffffu
// What a warp has added up by itself, where its threads go on to several rows.
#define PARTS (PER_ROW < 32 ? WARPS : GROUPS)

__device__ __forceinline__ void add(float* sums, uint4 row, float value) {
    u32 words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if TYPE == 2
        sums[i] = fmaf(__uint_as_float(words[i]), value, sums[i]);
#else
        sums[2 * i] = fmaf(widened((u16)(words[i] & 0xffff)), value, sums[2 * i]);
        sums[2 * i + 1] = fmaf(widened((u16)(words[i] >> 16)), value, sums[2 * i + 1]);
#endif
    }
}

__device__ __forceinline__ bool kept(float one, float cut) {
#if KEEP == 0
    return true;
#elif KEEP == 1
    return one != 0.0f;  // NaN is kept
#else
    return !(fabsf(one) < cut);
#endif
}

#if KEEP == 3
#define SHARE_OF_MASS \
    , int rest_share, int guess, int run, int digit0, int digit1, int digit2, int digit3, int digit4, int digit5
#else
#define SHARE_OF_MASS
#endif

#if NORM
// An entry of x + more, rounded where torch rounds.
__device__ __forceinline__ Number summed(Number x, Number more) {
    return MORE ? rounded(widened(x) + widened(more)) : x;
}

__device__ __forceinline__ float squared(uint4 slice) {
    const u32 words[4] = {slice.x, slice.y, slice.z, slice.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if TYPE == 2
        sum = fmaf(__uint_as_float(words[i]), __uint_as_float(words[i]), sum);
#else
        const float low = widened((u16)(words[i] & 0xffff)), high = widened((u16)(words[i] >> 16));
        sum = fmaf(high, high, fmaf(low, low, sum));
#endif
    }
    return sum;
}

// An entry of the norm.
__device__ __forceinline__ Number normed(float summed, float unit, float scale) {
    return rounded(widened(rounded(summed * unit)) * scale);
}
#endif

#if TYPE == 2
#define OF_TWO(made, one, other) __float_as_uint(made(__uint_as_float(one), __uint_as_float(other)))
#else
#define OF_TWO(made, one, other) \
    ((u32)made((u16)((one) & 0xffff), (u16)((other) & 0xffff)) | (u32)made((u16)((one) >> 16), (u16)((other) >> 16)) << 16)
#endif

__device__ __forceinline__ uint4 read_slice(const Number* row, int k, int K) {
    return k < K ? *(const uint4*)(row + k) : make_uint4(0, 0, 0, 0);
}

// A slice of 16 bytes of the row, or of x + more.
__device__ __forceinline__ uint4 slice_of(const Number* x, const Number* more, int k, int K) {
    const uint4 one = read_slice(x, k, K);
#if NORM && MORE
    const uint4 other = read_slice(more, k, K);
    return make_uint4(OF_TWO(summed, one.x, other.x), OF_TWO(summed, one.y, other.y), OF_TWO(summed, one.z, other.z),
                      OF_TWO(summed, one.w, other.w));
#else
    return one;
#endif
}

#if KEEP == 3
// What the search looks at of a slice: without signs, and of x + more its norm.
__device__ __forceinline__ uint4 sizes(uint4 slice, uint4 scale, float unit) {
#if NORM
#define UNITED(one, by) normed(widened(one), unit, widened(by))
    slice.x = OF_TWO(UNITED, slice.x, scale.x), slice.y = OF_TWO(UNITED, slice.y, scale.y);
    slice.z = OF_TWO(UNITED, slice.z, scale.z), slice.w = OF_TWO(UNITED, slice.w, scale.w);
#endif
    return make_uint4(slice.x & 0x7fff7fff, slice.y & 0x7fff7fff, slice.z & 0x7fff7fff, slice.w & 0x7fff7fff);
}

__device__ __forceinline__ uint4 sizes_of(Row row, int slice) {
    const int k = (slice * THREADS + (int)threadIdx.x) * VECTOR;
    return sizes(slice_of(row.x, row.more, k, row.K), read_slice(row.scale, k, row.K), row.unit);
}
#endif

ENTRY by_inputs(
    // Not restrict: the last launch may be writing x, or the constants, while this one takes its place.
    const Number* x, const Number* weight, const Number* second, const Number* bias, Number* out,
    const float* cuts, const Number* more, const Number* scale, Number* total, int K, int N SHARE_OF_MASS) {
    Gate* gate = (Gate*)block_room();
    float* parts_of_squares = (float*)(gate + 1);
    float* inbox = parts_of_squares + 32;  // of each block of the cluster
    int* counts = (int*)(inbox + (MAPS * SPLIT * OWN + 3) / 4 * 4);
    uint2* list = (uint2*)(counts + (CHUNKS + 3) / 4 * 4);
    float* parts = (float*)list;  // once that was read

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int rank = blockIdx.x, tile = blockIdx.y;
    const int owned = COLUMNS - rank * OWN < OWN ? COLUMNS - rank * OWN : OWN;
    gate_waits_for(gate, owned > 0 ? SPLIT * MAPS * owned * 4 : 0);
    cluster_arrives();
    last_launch_ends();

    // Chunks of 32 rows go round the blocks of a cluster, and those of a block round its warps.
    float values[ROUNDS], constants[ROUNDS];
    u32 masks[ROUNDS];
#if KEEP == 3
    uint4 whole[VECTORS];  // the row
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) whole[i] = slice_of(x, more, (i * THREADS + thread) * VECTOR, K);
#endif
    const float constant = KEEP == 2 && !BY_CHANNEL ? *cuts : 0.0f;
#if NORM
    float scales[ROUNDS], squares = 0.0f;
#if KEEP == 3
    uint4 scaling[VECTORS];
#endif
#endif
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int chunk = warp + i * WARPS, k = (chunk * SPLIT + rank) * 32 + lane;
        const bool inside = chunk < CHUNKS && k < K;
        constants[i] = KEEP == 2 && BY_CHANNEL && inside ? cuts[k] : constant;
#if NORM
        const Number made = inside ? summed(x[k], more[k]) : (Number)0;
        scales[i] = inside ? widened(scale[k]) : 0.0f;
        values[i] = widened(made);
        if (inside && tile == 0) total[k] = made;
#else
        values[i] = inside ? widened(x[k]) : 0.0f;
#endif
    }
#if NORM
#pragma unroll
    for (int i = 0; i < NORM; ++i) {
#if KEEP == 3
        squares += squared(whole[i]);
        scaling[i] = read_slice(scale, (i * THREADS + thread) * VECTOR, K);
#else
        squares += squared(slice_of(x, more, (i * THREADS + thread) * VECTOR, K));
#endif
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    if (lane == 0) parts_of_squares[warp] = squares;
    __syncthreads();
    squares = 0.0f;
#pragma unroll
    for (int from = 0; from < WARPS; ++from) squares += parts_of_squares[from];
    const float unit = rsqrtf(squares / K + __uint_as_float(EPS));
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) values[i] = widened(normed(values[i], unit, scales[i]));
#endif
#if KEEP == 3
    u32 held[4 * VECTORS];
#if NORM
#define SCALING scaling[i]
#else
#define SCALING whole[i]
    const float unit = 0.0f;
#endif
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const uint4 slice = sizes(whole[i], SCALING, unit);
        held[4 * i] = slice.x, held[4 * i + 1] = slice.y, held[4 * i + 2] = slice.z, held[4 * i + 3] = slice.w;
    }
    const Row row = {x, more, scale, unit, K};
    const Digits digits = {digit0, digit1, digit2, digit3, digit4, digit5};
    const int least = least_kept(held, row, __uint_as_float(rest_share), __uint_as_float(guess), __uint_as_float(run), digits,
                                 (Search*)list);
    // Zeros need not be met, whatever is kept.
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) constants[i] = value_of(least > 1 ? least : 1);
#endif
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int chunk = warp + i * WARPS, k = (chunk * SPLIT + rank) * 32 + lane;
        masks[i] = __ballot_sync(~0u, chunk < CHUNKS && k < K && kept(values[i], constants[i]));
        if (lane == 0 && chunk < CHUNKS) counts[chunk] = __popc(masks[i]);
    }
    __syncthreads();
    int listed = 0, begins[ROUNDS];
#pragma unroll
    for (int block = 0; block < (CHUNKS + 31) / 32; ++block) {
        const int own = block * 32 + lane < CHUNKS ? counts[block * 32 + lane] : 0;
        int upto = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(~0u, upto, step);
            if (lane >= step) upto += before;
        }
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            const int chunk = warp + i * WARPS, before = __shfl_sync(~0u, upto - own, chunk % 32);
            if (chunk / 32 == block) begins[i] = listed + before;
        }
        listed += __shfl_sync(~0u, upto, 31);
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int k = ((warp + i * WARPS) * SPLIT + rank) * 32 + lane;
        if (masks[i] >> lane & 1)
            list[begins[i] + __popc(masks[i] & ((1u << lane) - 1))] =
                make_uint2((u32)k * (N / VECTOR), __float_as_uint(values[i]));
    }
    // What is asked for beyond the end.
    for (int i = thread; i < 2 * GROUPS * UNROLL; i += THREADS) list[listed + i] = make_uint2(NONE, 0);
    __syncthreads();

    const int place = thread % PER_ROW, group = thread / PER_ROW;
    const int n0 = tile * COLUMNS + place * VECTOR;
    if (n0 >= N) listed = 0;
    float made[MAPS][VECTOR] = {};
    // Where slices of rows begin, in slices, and what they are multiplied by; of the next rows while those before
    // are on their way.
    uint2 next[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) next[i] = list[group + i * GROUPS];
    for (int first = group; first < listed; first += GROUPS * UNROLL) {
        uint4 rows[MAPS][UNROLL];
        float factors[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const bool on = next[i].x != NONE;
            factors[i] = __uint_as_float(next[i].y);
            rows[0][i] = on ? read_at(weight + n0, next[i].x) : make_uint4(0, 0, 0, 0);
#if MAPS == 2
            rows[MAPS - 1][i] = on ? read_at(second + n0, next[i].x) : make_uint4(0, 0, 0, 0);
#endif
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) next[i] = list[first + (UNROLL + i) * GROUPS];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i)
#pragma unroll
            for (int map = 0; map < MAPS; ++map) add(made[map], rows[map][i], factors[i]);
    }

    // Threads of a warp that have the same columns of other rows.
#pragma unroll
    for (int step = PER_ROW; step < 32; step *= 2)
#pragma unroll
        for (int map = 0; map < MAPS; ++map)
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) made[map][i] += __shfl_xor_sync(~0u, made[map][i], step);
    __syncthreads();
    const int part = PER_ROW < 32 ? warp : group;
    if (PER_ROW >= 32 || lane < PER_ROW) {
#pragma unroll
        for (int map = 0; map < MAPS; ++map)
#pragma unroll
            for (int i = 0; i < VECTOR; i += 4)
                *(float4*)(parts + (map * PARTS + part) * COLUMNS + place * VECTOR + i) =
                    make_float4(made[map][i], made[map][i + 1], made[map][i + 2], made[map][i + 3]);
    }
    __syncthreads();
    cluster_has_come();
    for (int i = thread; i < MAPS * COLUMNS; i += THREADS) {
        const int map = i / COLUMNS, column = i % COLUMNS;
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < PARTS; ++from) sum += parts[(map * PARTS + from) * COLUMNS + column];
        to_cluster(inbox + (rank * MAPS + map) * OWN + column % OWN, gate, column / OWN, sum);
    }
    gate_opens(gate);
    for (int i = thread; i < OWN; i += THREADS) {
        const int column = rank * OWN + i, n = tile * COLUMNS + column;
        if (column < COLUMNS && n < N) {
            float all[MAPS] = {};
#pragma unroll
            for (int map = 0; map < MAPS; ++map)
#pragma unroll
                for (int from = 0; from < SPLIT; ++from) all[map] += inbox[(from * MAPS + map) * OWN + i];
#if BIAS
            all[0] += widened(bias[n]);
#endif
#if MAPS == 2
            // Rounded where torch rounds.
            const float u = widened(rounded(all[0])), g = widened(rounded(all[MAPS - 1]));
            const float gate = ACTIVATION == 1 ? g / (1.0f + expf(-g)) : (g < 0.0f ? 0.0f : g);
            all[0] = u * widened(rounded(gate));
#endif
            out[n] = rounded(all[0]);
        }
    }
}
