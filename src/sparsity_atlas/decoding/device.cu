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

__device__ __forceinline__ float of_cluster(const float* own, u32 rank) {
#if SPLIT == 1
    return *own;
#else
    u32 here = (u32)__cvta_generic_to_shared(own), there;
    float made;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(made) : "r"(there) : "memory");
    return made;
#endif
}

__device__ __forceinline__ void cluster_meets() {
#if SPLIT > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
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
