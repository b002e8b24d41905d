// What the device does with two numbers of 16 bits that lie in one register; the tests have another file of the same
// names for a CPU.

#if TYPE == 0
#define PAIR "bf16"
#else
#define PAIR "f16"
#endif
#define PAIRED __device__ __forceinline__

// So that what is made of a number is made anew, and takes no register meanwhile.
#define forget(one) asm volatile("" : "+r"(one))

#if TYPE != 2
PAIRED u32 larger(u32 one, u32 other) {
    u32 made;
    asm("max.u16x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(other));
    return made;
}

PAIRED float half_low(u32 both) {
    float made;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(made) : "r"(both));
    return made;
}

PAIRED float half_high(u32 both) {
    float made;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(made) : "r"(both));
    return made;
}

// All bits of the halves that are not below `least`.
PAIRED u32 reaches(u32 one, u32 least) {
    u32 made;
    asm("set.ge.u32." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(least));
    return made;
}

// The number 1 in the halves of which it is so, else 0.
PAIRED u32 is_below(u32 one, u32 least) {
    u32 made;
    asm("set.lt." PAIR "x2." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(least));
    return made;
}

PAIRED u32 is_not_below(u32 one, u32 least) {
    u32 made;
    asm("set.ge." PAIR "x2." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(least));
    return made;
}

PAIRED u32 is_same(u32 one, u32 other) {
    u32 made;
    asm("set.eq." PAIR "x2." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(other));
    return made;
}

// Counts, as numbers of the type.
PAIRED u32 plus(u32 one, u32 other) {
    u32 made;
    asm("add.rn." PAIR "x2 %0, %1, %2;" : "=r"(made) : "r"(one), "r"(other));
    return made;
}

PAIRED u32 counted(u32 both) {
#if TYPE == 0
    return (u32)__uint_as_float(both << 16) + (u32)__uint_as_float(both & 0xffff0000u);
#else
    return (u32)half_low(both) + (u32)half_high(both);
#endif
}

// Adds a0 · p + a1 · q to one sum and b0 · p + b1 · q to another. The matrix units multiply a matrix [16, 16] and one
// [16, 8]: on the diagonals of the upper and of the lower half of what they make stand products of what one thread
// brings with what it brings. They sum over the warp, so that `part_of` is a thread's part of a sum.
PAIRED void add_products(float* sums, u32 a0, u32 a1, u32 b0, u32 b1, u32 p, u32 q) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." PAIR "." PAIR
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(b0), "r"(a1), "r"(b1), "r"(p), "r"(q));
}

// Of these so many threads of a warp have one, each in a place of its own.
#define PARTS_OF_WARP 8
PAIRED bool has_part() { return threadIdx.x % 4 == threadIdx.x % 32 / 8; }
PAIRED int place_of_part() { return threadIdx.x % 32 / 4; }

PAIRED float part_of(const float* sums, int which) {
    const int lane = threadIdx.x % 32, line = lane / 4;
    const float one = line % 2 ? sums[2 * which + 1] : sums[2 * which];
    return lane % 4 == line / 2 ? one : 0.0f;
}
#endif
