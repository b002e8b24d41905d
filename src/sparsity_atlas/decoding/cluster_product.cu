// Products of one token that leave out rows of a transposed weight: y = W (x ⊙ m), and u ⊙ σ(g) of two maps.
//
// A cluster of SPLIT blocks makes COLUMNS entries of y. Each block lists those of its rows that x keeps in its
// shared memory, in their own order; its threads read 16 bytes of UNROLL listed rows at once, PER_ROW threads
// side by side, and add up in float32. Sums meet in shared memory, within a block and then within the cluster,
// in an order that is always the same: no counter, no fence, nothing to be cleared, nothing in global memory.
//
// Fixed when this is compiled (see cluster_products.py): TYPE 0 bfloat16, 1 float16, 2 float32; THREADS,
// PER_ROW, SPLIT, UNROLL, BLOCKS (of a processor, at least); CHUNKS of 32 rows that a block has at most;
// KEEP 0 all, 1 what is not zero, 2 what reaches a constant, BY_CHANNEL each its own; MAPS, ACTIVATION 1 silu,
// 2 relu; BIAS.

#define COLUMNS (PER_ROW * VECTOR)
#define GROUPS (THREADS / PER_ROW)
#define WARPS (THREADS / 32)
#define ROUNDS ((CHUNKS + WARPS - 1) / WARPS)
#define OWN ((COLUMNS + SPLIT - 1) / SPLIT)

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

__device__ __forceinline__ bool kept(float one, const float* cuts, int k) {
#if KEEP == 0
    return true;
#elif KEEP == 1
    return one != 0.0f;  // NaN is kept
#else
    return !(fabsf(one) < cuts[BY_CHANNEL ? k : 0]);
#endif
}

ENTRY by_inputs(
    // Not restrict: the last launch may be writing x, or the constants, while this one takes its place.
    const Number* x, const Number* weight, const Number* second, const Number* bias, Number* out,
    const float* cuts, int K, int N) {
    float* sums = (float*)block_room();
    int* counts = (int*)(sums + MAPS * COLUMNS);
    uint2* list = (uint2*)(counts + (CHUNKS + 3) / 4 * 4);
    float* parts = (float*)list;  // once that was read

    last_launch_ends();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int rank = blockIdx.x, tile = blockIdx.y;

    // Chunks of 32 rows go round the blocks of a cluster, and those of a block round its warps.
    float values[ROUNDS];
    u32 masks[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int chunk = warp + i * WARPS, k = (chunk * SPLIT + rank) * 32 + lane;
        values[i] = chunk < CHUNKS && k < K ? widened(x[k]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int chunk = warp + i * WARPS, k = (chunk * SPLIT + rank) * 32 + lane;
        masks[i] = __ballot_sync(~0u, chunk < CHUNKS && k < K && kept(values[i], cuts, k));
        if (lane == 0 && chunk < CHUNKS) counts[chunk] = __popc(masks[i]);
    }
    __syncthreads();
    int total = 0, begins[ROUNDS];
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
            if (chunk / 32 == block) begins[i] = total + before;
        }
        total += __shfl_sync(~0u, upto, 31);
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int k = ((warp + i * WARPS) * SPLIT + rank) * 32 + lane;
        if (masks[i] >> lane & 1)
            list[begins[i] + __popc(masks[i] & ((1u << lane) - 1))] = make_uint2(k, __float_as_uint(values[i]));
    }
    __syncthreads();

    const int place = thread % PER_ROW, group = thread / PER_ROW;
    const int n0 = tile * COLUMNS + place * VECTOR;
    const bool there = n0 < N;
    float made[MAPS][VECTOR] = {};
    for (int first = group; first < total; first += GROUPS * UNROLL) {
        uint4 rows[MAPS][UNROLL];
        float factors[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int which = first + i * GROUPS;
            const bool on = which < total && there;
            const uint2 entry = on ? list[which] : make_uint2(0, 0);
            factors[i] = __uint_as_float(entry.y);
            const long long from = (long long)entry.x * N + n0;
            rows[0][i] = on ? read(weight + from) : make_uint4(0, 0, 0, 0);
#if MAPS == 2
            rows[MAPS - 1][i] = on ? read(second + from) : make_uint4(0, 0, 0, 0);
#endif
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i)
#pragma unroll
            for (int map = 0; map < MAPS; ++map) add(made[map], rows[map][i], factors[i]);
    }

    __syncthreads();
#pragma unroll
    for (int map = 0; map < MAPS; ++map)
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4)
            *(float4*)(parts + (map * GROUPS + group) * COLUMNS + place * VECTOR + i) =
                make_float4(made[map][i], made[map][i + 1], made[map][i + 2], made[map][i + 3]);
    __syncthreads();
    for (int i = thread; i < MAPS * COLUMNS; i += THREADS) {
        const int map = i / COLUMNS, column = i % COLUMNS;
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < GROUPS; ++from) sum += parts[(map * GROUPS + from) * COLUMNS + column];
        sums[i] = sum;
    }
    if (SPLIT == 1) __syncthreads();
    cluster_meets();
    for (int i = thread; i < OWN; i += THREADS) {
        const int column = rank * OWN + i, n = tile * COLUMNS + column;
        if (column < COLUMNS && n < N) {
            float all[MAPS] = {};
#pragma unroll
            for (int map = 0; map < MAPS; ++map)
#pragma unroll
                for (int from = 0; from < SPLIT; ++from) all[map] += of_cluster(sums + map * COLUMNS + column, from);
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
    // A block's sums stay until all have read them.
    cluster_meets();
}
