// What `kernels/pairs.cu` has, for a CPU.
#define forget(one)
#if TYPE != 2
static float of_half(u32 bits) {
    const u32 exponent = bits >> 10 & 31, rest = bits & 0x3ff;
    if (exponent == 31) return rest ? NAN : INFINITY;
    return exponent ? ldexpf(1024 + rest, (int)exponent - 25) : ldexpf(rest, -24);
}
static float half_low(u32 both) { return of_half(both & 0x7fff); }
static float half_high(u32 both) { return of_half(both >> 16 & 0x7fff); }

// Of a number of the type, a small whole one.
static u32 small(int one) {
    if (TYPE == 0 || one == 0) return bits_of((float)one) >> 16;
    const int power = 31 - __builtin_clz(one);
    return (u32)(power + 15) << 10 | ((u32)one << 10 >> power & 0x3ff);
}
static float wide(u32 bits) { return TYPE == 0 ? float_of(bits << 16) : of_half(bits); }
static u32 halves(u32 low, u32 high) { return low | high << 16; }
#define LOW(one) ((one) & 0xffff)
#define HIGH(one) ((one) >> 16)

static u32 larger(u32 one, u32 other) {
    return halves(LOW(one) > LOW(other) ? LOW(one) : LOW(other), HIGH(one) > HIGH(other) ? HIGH(one) : HIGH(other));
}
static u32 is_below(u32 one, u32 least) {
    return halves(small(LOW(one) < LOW(least)), small(HIGH(one) < HIGH(least)));
}
static u32 is_not_below(u32 one, u32 least) {
    return halves(small(LOW(one) >= LOW(least)), small(HIGH(one) >= HIGH(least)));
}
static u32 is_same(u32 one, u32 other) {
    return halves(small(LOW(one) == LOW(other)), small(HIGH(one) == HIGH(other)));
}
static u32 reaches(u32 one, u32 least) {
    return (LOW(one) >= LOW(least) ? 0xffff : 0) | (HIGH(one) >= HIGH(least) ? 0xffff0000 : 0);
}
static u32 plus(u32 one, u32 other) {
    return halves(small((int)(wide(LOW(one)) + wide(LOW(other)))), small((int)(wide(HIGH(one)) + wide(HIGH(other)))));
}
static u32 counted(u32 both) { return (u32)wide(LOW(both)) + (u32)wide(HIGH(both)); }
static float product(u32 one, u32 other) { return wide(LOW(one)) * wide(LOW(other)) + wide(HIGH(one)) * wide(HIGH(other)); }
static void add_products(float* sums, u32 a0, u32 a1, u32 b0, u32 b1, u32 p, u32 q) {
    sums[0] += product(a0, p) + product(a1, q);
    sums[2] += product(b0, p) + product(b1, q);
}
#define PARTS_OF_WARP 32
static bool has_part(void) { return true; }
static int place_of_part(void) { return threadIdx.x % 32; }
static float part_of(const float* sums, int which) { return sums[2 * which]; }
#endif
