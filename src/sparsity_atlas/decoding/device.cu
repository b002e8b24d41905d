// What the kernels in CUDA C++ take from the device; the tests have another file of the same names for a CPU.

typedef unsigned int u32;
typedef unsigned short u16;

#if TYPE == 2
typedef float Number;
#define VECTOR 4
#else
typedef u16 Number;
#define VECTOR 8
#endif

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)

__device__ __forceinline__ float widened(Number one) {
#if TYPE == 0
    return __uint_as_float((u32)one << 16);
#elif TYPE == 1
    float made;
    asm("cvt.f32.f16 %0, %1;" : "=f"(made) : "h"(one));
    return made;
#else
    return one;
#endif
}

__device__ __forceinline__ Number rounded(float one) {
#if TYPE == 2
    return one;
#else
    u16 made;
#if TYPE == 0
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(made) : "f"(one));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(made) : "f"(one));
#endif
    return made;
#endif
}

// 16 bytes that nobody reads again soon.
__device__ __forceinline__ uint4 read(const Number* place) {
    uint4 made;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(made.x), "=r"(made.y), "=r"(made.z), "=r"(made.w)
                 : "l"(place));
    return made;
}

// The same, so many slices of 16 bytes behind a place.
__device__ __forceinline__ uint4 read_at(const Number* place, u32 slices) {
    uint4 made;
    asm volatile(
        "{.reg .u64 at;\nmad.wide.u32 at, %5, 16, %4;\n"
        "ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [at];}"
        : "=r"(made.x), "=r"(made.y), "=r"(made.z), "=r"(made.w)
        : "l"(place), "r"(slices));
    return made;
}

// Opens once so many bytes have come in from the blocks of a cluster, whose stores tell it: no fence, and no second
// barrier of the cluster.
typedef struct { unsigned long long of[2]; } Gate;

__device__ __forceinline__ u32 shared_at(const void* place) { return (u32)__cvta_generic_to_shared(place); }

__device__ __forceinline__ void gate_waits_for(Gate* gate, u32 bytes) {
#if SPLIT > 1
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_at(gate)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_at(gate)), "r"(bytes)
                     : "memory");
    }
    __syncthreads();
#endif
}

__device__ __forceinline__ void gate_opens(Gate* gate) {
#if SPLIT > 1
    asm volatile(
        "{.reg .pred open;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 open, [%0], 0;\n@!open bra again;}" ::"r"(
            shared_at(gate))
        : "memory");
#else
    __syncthreads();
#endif
}

// Into another block's memory, at the place of one's own.
__device__ __forceinline__ void to_cluster(float* own, Gate* gate, u32 rank, float value) {
#if SPLIT == 1
    *own = value;
#else
    u32 there, gate_there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_at(own)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(gate_there) : "r"(shared_at(gate)), "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
                 "r"(__float_as_uint(value)), "r"(gate_there)
                 : "memory");
#endif
}

// All blocks of a cluster, which one says that it has come, and waits for the others at the next. What they say is
// only that they are there, with their gates.
__device__ __forceinline__ void cluster_arrives() {
#if SPLIT > 1
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_has_come() {
#if SPLIT > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The next launch may take its place before this one has ended; this one waits for what the last one wrote.
__device__ __forceinline__ void last_launch_ends() {
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}

// Shared memory of the block.
__device__ __forceinline__ unsigned char* block_room() {
    extern __shared__ __align__(16) unsigned char room[];
    return room;
}
