// Products of one token that leave out rows of weights as they lie: u ⊙ σ(g) of two maps, of one of which
// only those rows are read whose entries of the other are kept.
//
// Blocks go round the rows, ROWS at a time. Each thread has its entries of x in registers, asks for the next rows
// before it adds up the last ones, and its sums meet those of its block in an order that is always the same.
//
// Fixed when this is compiled (see row_products.py): TYPE 0 bfloat16, 1 float16, 2 float32; THREADS, ROWS,
// BLOCKS (of a processor, at least); SLICES of 16 bytes of a row for each thread; DECIDES 0 nothing is left out,
// 1 g decides, 2 u; BY_CHANNEL: by a constant of each row; ACTIVATION 1 silu, 2 relu.

#define WARPS (THREADS / 32)
#define MAPS (DECIDES ? 1 : 2)

__device__ __forceinline__ float dot(const uint4 row, const float* x, float sum) {
    const u32 words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if TYPE == 2
        sum = fmaf(__uint_as_float(words[i]), x[i], sum);
#else
        sum = fmaf(widened((u16)(words[i] & 0xffff)), x[2 * i], sum);
        sum = fmaf(widened((u16)(words[i] >> 16)), x[2 * i + 1], sum);
#endif
    }
    return sum;
}

__device__ __forceinline__ float activated(float g) {
    return widened(rounded(ACTIVATION == 1 ? g / (1.0f + expf(-g)) : (g < 0.0f ? 0.0f : g)));
}

__device__ __forceinline__ uint4 read_slice(const Number* weight, int n, int slice, int N, int K, bool wanted) {
    const int k = (slice * THREADS + (int)threadIdx.x) * VECTOR;
    return wanted && n < N && k < K ? read(weight + (long long)n * K + k) : make_uint4(0, 0, 0, 0);
}

// Sums of all threads, for all of them.
__device__ __forceinline__ void all_of_block(float* room, float* sums, int count) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], step);
        if (threadIdx.x % 32 == 0) room[i * WARPS + threadIdx.x / 32] = sums[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) {
        sums[i] = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) sums[i] += room[i * WARPS + warp];
    }
}

ENTRY by_outputs(const Number* x, const Number* weight, const Number* second, const Number* bias, Number* out,
                 const float* cuts, int K, int N) {
    // Two of each, so that a warp which is ahead overwrites nothing.
    float* room = (float*)block_room();
    const int thread = threadIdx.x, step = gridDim.y * ROWS;
    int first = blockIdx.y * ROWS, turn = 0;
    uint4 next[MAPS][ROWS][SLICES];
    // Weights never change: they may be asked for before the last launch has ended.
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
            next[0][row][slice] = read_slice(weight, first + row, slice, N, K, true);
#if !DECIDES
            next[MAPS - 1][row][slice] = read_slice(second, first + row, slice, N, K, true);
#endif
        }
    last_launch_ends();
    float own[SLICES * VECTOR];
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const int k = (slice * THREADS + thread) * VECTOR + i;
            own[slice * VECTOR + i] = k < K ? widened(x[k]) : 0.0f;
        }
    for (; first < N; first += step) {
        float sums[MAPS * ROWS];
#pragma unroll
        for (int map = 0; map < MAPS; ++map)
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                float sum = 0.0f;
#pragma unroll
                for (int slice = 0; slice < SLICES; ++slice)
                    sum = dot(next[map][row][slice], own + slice * VECTOR, sum);
                sums[map * ROWS + row] = sum;
            }
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice) {
                next[0][row][slice] = read_slice(weight, first + step + row, slice, N, K, true);
#if !DECIDES
                next[MAPS - 1][row][slice] = read_slice(second, first + step + row, slice, N, K, true);
#endif
            }
        all_of_block(room + turn * MAPS * ROWS * WARPS, sums, MAPS * ROWS);
#if DECIDES
        float values[ROWS], others[ROWS];
        uint4 rows[ROWS][SLICES];
        bool keep[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const int n = first + row;
            values[row] = widened(rounded(sums[row]));
            if (DECIDES == 1) values[row] = activated(values[row]);
            keep[row] = n < N && !(fabsf(values[row]) < cuts[BY_CHANNEL ? n : 0]);
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice)
                rows[row][slice] = read_slice(second, n, slice, N, K, keep[row]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            others[row] = 0.0f;
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice)
                others[row] = dot(rows[row][slice], own + slice * VECTOR, others[row]);
        }
        all_of_block(room + (2 + turn) * ROWS * WARPS, others, ROWS);
#endif
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const int n = first + row;
            if (thread == row && n < N) {
#if DECIDES
                const float other = widened(rounded(others[row]));
                out[n] = rounded(keep[row] ? values[row] * (DECIDES == 1 ? other : activated(other)) : 0.0f);
#else
                out[n] = rounded(widened(rounded(sums[row])) * activated(widened(rounded(sums[ROWS + row]))));
#endif
            }
        }
        turn = 1 - turn;
    }
}
