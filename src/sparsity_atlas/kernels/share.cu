// A share of a row's mass, as `definition.Threshold` has it. A block takes a row and keeps it in registers: numbers of
// 16 bits without weights two in each (PACKED), and works with their patterns; else scores in float32.
//
// The threshold is sought with sums that need not be exact, then proved: what reaches it is enough, and what exceeds
// it is not, by more than all roundings together. Where that is not so, integer masses decide, as in the definition.

#define PACKED (TYPE != 2 && !WEIGHTED)
#define WARPS (THREADS / 32)
#define COUNT (VECTORS * VECTOR)  // entries of a thread
#define ONE (0.999f * (1 << 30))  // what sums are made of when they are integers: the whole row's is one
#define LIMBS 6
#define MOST 9  // sums that are made at once
// Of RAGGED rows, which follow each other without a gap, the first and the last vector are partly others'.
#define PARTIAL(place) (RAGGED && ((place) == 0 || (place) == vectors - 1))
#define FIRST(place) ((place) == 0 ? ahead : 0)
#define LAST(place) ((place) == vectors - 1 ? rest_of_last : VECTOR)
#define READ(place) (PARTIAL(place) ? within_row(from[place], FIRST(place), LAST(place)) : from[place])

#if PACKED
#define EMPTY (TYPE == 0 ? 16 : 13)  // bits that a number leaves empty in float32
#define INFINITE (TYPE == 0 ? 0x7f80u : 0x7c00u)
#define OCTAVE (TYPE == 0 ? 128 : 1024)
#define WIDE (TYPE == 0 ? 32 : 256)  // patterns to both sides of a guess, and of what follows from two sums
#define NARROW (TYPE == 0 ? 4 : 16)
#define UNIT (TYPE == 0 ? 0x3f803f80u : 0x3c003c00u)
#define ROOM 32
#define PASSES 10
#if TYPE == 0
#define SCORE(i) float_of((i) % 2 ? held[(i) / 2] & 0xffff0000u : held[(i) / 2] << 16)
#else
#define SCORE(i) ((i) % 2 ? half_high(held[(i) / 2]) : half_low(held[(i) / 2]))
#endif
#else
#define EMPTY 0
#define INFINITE 0x7f800000u
#define RUNGS 8
#define STEP 8  // of the entries that the ladder looks at
#define LOOKS (THREADS < 512 ? 2 : 1)
#define ROOM 256
#define PASSES 5
#ifndef MARGIN
#define MARGIN 40  // entries to both sides of where the threshold is looked for
#endif
#ifndef NEAR
#define NEAR (3 * MARGIN)
#endif
#define SCORE(i) held[i]
#endif
#if PACKED
// Of a sum by the matrix units, to each of two 8 entries a thread in a step: 18 numbers are cut off at 2^-23.
#define ERROR ((COUNT / 8 + 2) * 18 / 8388608.0f)
#else
#define ERROR ((COUNT / 2 + 8) / 16777216.0f)  // one rounding after the other
#endif

INLINE int between(int one, int low, int high) { return one < low ? low : one > high ? high : one; }
INLINE float within(float one, float most) { return fminf(fmaxf(one, -most), most); }
// Of a sum: its logarithm, about.
INLINE int logarithm(u32 sum) { return (int)bits_of((float)(sum < 16 ? 16 : sum)); }

// Sums over the block of what each thread has.
INLINE void add_up(u32* mine, int count, u32* slots) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < count; ++j) mine[j] = warp_sum(mine[j]);
    if (WARPS == 1) return;
    if (lane == 0)
#pragma unroll
        for (int j = 0; j < count; ++j) slots[j * WARPS + warp] = mine[j];
    block_meets();
#pragma unroll
    for (int j = 0; j < count; ++j) mine[j] = warp_sum(lane < WARPS ? slots[j * WARPS + lane] : 0);
}

// Of a number below 2^62, in limbs.
INLINE u64 warp_sum_long(u64 one) {
    const u64 low = warp_sum((u32)one & 0x1fffff), middle = warp_sum((u32)(one >> 21) & 0x1fffff);
    return low + (middle << 21) + ((u64)warp_sum((u32)(one >> 42)) << 42);
}

INLINE void add_up_long(u64* mine, u64* slots) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int j = 0; j < 2; ++j) mine[j] = warp_sum_long(mine[j]);
    if (lane == 0)
        for (int j = 0; j < 2; ++j) slots[j * WARPS + warp] = mine[j];
    block_meets();
    for (int j = 0; j < 2; ++j) mine[j] = warp_sum_long(lane < WARPS ? slots[j * WARPS + lane] : 0);
}

// floor(score / unit * 2^MASS_BITS) of `definition.masses`, of no denormal; `turned` is 56 - MASS_BITS + the peak's
// exponent.
INLINE u64 mass_of(u32 bits, u32 turned) {
    return shifted((u64)((bits & 0x7fffff) | 0x800000) << 32, turned - (bits >> 23));
}

// ceil(amount * total), a long multiplication with the digits of `definition.limbs`.
INLINE u64 share_of(u64 total, const double* limbs) {
    const u64 low_bits = 0x7fffffff, upper = total >> 31, lower = total & low_bits;
    u64 carry = 0, rest = 0, next = 0;
    for (int place = LIMBS - 1; place >= 0; --place) {
        const u64 limb = (u64)limbs[place], column = limb * lower + next * upper + carry;
        rest |= column & low_bits;
        carry = column >> 31;
        next = limb;
    }
    return next * upper + carry + (rest != 0);
}

// Of a score between two, count it by its pattern, or write it down.
INLINE void take_note(u32* room, u32* listed, u32 bits, u32 low, u32 high) {
#if PACKED
    one_more_of(room, (bits - low) >> EMPTY, (high - low) >> EMPTY);
#else
    if (bits - low < high - low) {
        const u32 place = next_place(listed);
        if (place < ROOM) room[place] = bits;
    }
#endif
}

#if PACKED
INLINE float value_of(int pattern) { return TYPE == 0 ? float_of((u32)pattern << 16) : half_low((u32)pattern); }

INLINE int pattern_of(float value) {
    if (TYPE == 0) return (int)(bits_of(value) >> 16);
    return value < 6.1035156e-5f ? (int)(value * 16777216.0f) : (int)(bits_of(value) >> 13) - (112 << 10);
}
#endif

// The entries [first, last) of a vector, zeros beside them.
INLINE uint4 within_row(uint4 q, int first, int last) {
    u32 part[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const u32 own = VECTOR == 4 ? 0xffffffffu : i % 2 ? 0xffff0000u : 0xffffu;
        if (i < first || i >= last) part[i * 4 / VECTOR] &= ~own;
    }
    return make_uint4(part[0], part[1], part[2], part[3]);
}

// A vector of a row; of one that others have a part in, the entries [first, last).
INLINE void write(uint4* to, int place, uint4 q, bool partial, int first, int last) {
    if (!partial) {
        to[place] = q;
        return;
    }
    const u32 part[4] = {q.x, q.y, q.z, q.w};
    Bits* entries = (Bits*)(to + place);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
        if (i >= first && i < last) entries[i] = (Bits)(VECTOR == 4 ? part[i] : part[i / 2] >> 16 * (i % 2));
}

ENTRY mask_rows(const Bits* values, const Bits* onto, Bits* out, int* zeros, unsigned char* finite,
                const float* weights, const double* numbers, int width, int values_stride, int onto_stride) {
    SHARED u32 slots[2][MOST * WARPS], ends[WARPS];
    SHARED u64 long_slots[2][2 * WARPS];
    SHARED u32 room[ROOM];  // counts by pattern (PACKED), or scores near the threshold
    SHARED u32 listed, answer, unsure_one;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t row = blockIdx.x;
    const int ahead = RAGGED ? (int)(row * width % VECTOR) : 0;  // others' entries in the first vector
    const int vectors = (ahead + width + VECTOR - 1) / VECTOR, rest_of_last = ahead + width - (vectors - 1) * VECTOR;
    const uint4* from = (const uint4*)(values + row * values_stride - ahead);

    // The row, and its largest entry.
    u32 most = 0;
#if PACKED
    u32 held[COUNT / 2];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int place = threadIdx.x + v * THREADS;
        uint4 q = make_uint4(0, 0, 0, 0);
        if (place < vectors) q = READ(place);
        held[4 * v] = q.x & 0x7fff7fff, held[4 * v + 1] = q.y & 0x7fff7fff;
        held[4 * v + 2] = q.z & 0x7fff7fff, held[4 * v + 3] = q.w & 0x7fff7fff;
    }
    float products[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) {
        const u32 p = held[2 * i], q = held[2 * i + 1];
        most = larger(larger(most, p), q);
        add_products(products[i % 2], UNIT, UNIT, 0, 0, p, q);
    }
    most = most >> 16 > (most & 0xffff) ? most >> 16 : most & 0xffff;
    float total = part_of(products[0], 0) + part_of(products[1], 0);
#else
    float held[COUNT];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int place = threadIdx.x + v * THREADS;
        uint4 q = make_uint4(0, 0, 0, 0);
        if (place < vectors) q = READ(place);
        const u32 part[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#if TYPE == 2
            held[4 * v + i] = float_of(part[i] & 0x7fffffff);
#elif TYPE == 0
            held[8 * v + 2 * i] = float_of((part[i] & 0x7fff) << 16);
            held[8 * v + 2 * i + 1] = float_of(part[i] & 0x7fff0000);
#else
            held[8 * v + 2 * i] = half_low(part[i] & 0x7fff7fff);
            held[8 * v + 2 * i + 1] = half_high(part[i] & 0x7fff7fff);
#endif
        }
#if WEIGHTED && RAGGED
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const int entry = place * VECTOR + i - ahead;
            held[VECTOR * v + i] *= entry >= 0 && entry < width ? weights[entry] : 0;
        }
#elif WEIGHTED
        if (place < vectors)
#pragma unroll
            for (int i = 0; i < VECTOR / 4; ++i) {
                const float4 w = ((const float4*)weights)[place * (VECTOR / 4) + i];
                held[VECTOR * v + 4 * i] *= w.x, held[VECTOR * v + 4 * i + 1] *= w.y;
                held[VECTOR * v + 4 * i + 2] *= w.z, held[VECTOR * v + 4 * i + 3] *= w.w;
            }
#endif
    }
    float part[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const u32 bits = bits_of(held[i]) & 0x7fffffff;
        most = most > bits ? most : bits;
        part[i % 4] += held[i];
    }
    float total = (part[0] + part[1]) + (part[2] + part[3]);
#endif
    most = warp_max(most);
    total = warp_total(total);
    for (int i = threadIdx.x; i < ROOM; i += THREADS) room[i] = 0;
    if (threadIdx.x == 0) listed = answer = unsure_one = 0;
    if (lane == 0) slots[0][warp] = most, slots[0][WARPS + warp] = bits_of(total);
    block_meets();
    most = warp_max(lane < WARPS ? slots[0][lane] : 0);
    total = warp_total(lane < WARPS ? float_of(slots[0][WARPS + lane]) : 0.0f);

    const bool whole = most < INFINITE;
    u32 least = 0;  // of what is held; 0 keeps all
    u32 few[MOST];
    bool proved = false;
    if (whole && most > 0) {
#if PACKED
        u32 peak = bits_of(value_of((int)most));
#else
        u32 peak = most;
#endif
        // So that no number that counts is denormal, and no sum overflows: times 2^100 or 2^-60.
        if (peak < 0x20000000 || peak >= 0x70000000) {
            const float by = float_of(peak < 0x20000000 ? 0x71800000 : 0x21800000);
            total = 0;
#if PACKED && TYPE == 0
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) {
                const float low = float_of(held[i] << 16) * by, high = float_of(held[i] & 0xffff0000u) * by;
                held[i] = bits_of(low) >> 16 | (bits_of(high) & 0xffff0000u);
                total += low + high;
            }
#elif !PACKED
#pragma unroll
            for (int i = 0; i < COUNT; ++i) held[i] *= by, total += held[i];
#endif
            peak = bits_of(float_of(peak) * by);
            total = warp_total(total);
            block_meets();
            if (lane == 0) slots[0][warp] = bits_of(total);
            block_meets();
            total = warp_total(lane < WARPS ? float_of(slots[0][lane]) : 0.0f);
        }
        const float rest_share = (float)(1 - numbers[0]);
        const float scale = ONE / total, guess = total / width * (float)numbers[1];
        const float rest_wanted = rest_share * ONE;
        const int wanted = logarithm((u32)rest_wanted);
        int turn = 1, center, margin;

#if PACKED
        const int top = pattern_of(float_of(peak));
        // Sought between two patterns: below `under` lies less than the rest that is wanted, below `over` not.
        int under = 1, over = top + 1;
        float under_left = rest_wanted, over_left = rest_wanted - ONE;
        int one = between(pattern_of(guess), 1, top) - WIDE, other = one + 2 * WIDE;
        for (int pass = 0; pass < PASSES; ++pass) {
            one = between(one, 1, top), other = between(other, one + 1, top + 1);
            const u32 first = (u32)one | (u32)one << 16, second = (u32)other | (u32)other << 16;
            float sums[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
            for (int i = 0; i < COUNT / 4; ++i) {
                const u32 p = held[2 * i], q = held[2 * i + 1];
                add_products(sums[i % 2], is_below(p, first), is_below(q, first), is_below(p, second),
                             is_below(q, second), p, q);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) few[j] = nearest((part_of(sums[0], j) + part_of(sums[1], j)) * scale);
            add_up(few, 2, slots[turn]);
            turn ^= 1;
            const float one_left = rest_wanted - (float)few[0], other_left = rest_wanted - (float)few[1];
            if (other - one == 1) {
                // Of both sums, and of the whole row's, of which the rest is a share.
                const float unsure = (ERROR + 1 / 1048576.0f) * ((float)few[1] + rest_wanted) + 5 * WARPS + 16;
                if (one_left > unsure && other_left < -unsure) {
                    least = (u32)one;
                    proved = true;
                    break;
                }
                if (fabsf(one_left) <= unsure || fabsf(other_left) <= unsure) break;
            }
            if (one_left > 0 && one >= under) under = one, under_left = one_left;
            if (other_left > 0 && other >= under) under = other, under_left = other_left;
            if (other_left <= 0 && other <= over) over = other, over_left = other_left;
            if (one_left <= 0 && one <= over) over = one, over_left = one_left;
            if (over - under <= 2 * NARROW + 1) {
                one = under + (int)((float)(over - under) * under_left / (under_left - over_left));
                one = between(one, under, over - 1), other = one + 1;
            } else {
                // What lies below a threshold is about a power of it, and patterns are about logarithms: the next
                // threshold lies on the line through two.
                const int rest = logarithm(few[0]), apart = logarithm(few[1]) - rest;
                const float most_run = 20.0f * OCTAVE / 8388608.0f;
                const float run = apart > 0 ? fminf((float)(other - one) / (float)apart, most_run) : most_run / 40;
                const int found = one + (int)floorf(within((float)(wanted - rest) * run, 8 * OCTAVE));
                one = between(found, under, over - 1) - NARROW + 1, other = one + 2 * NARROW;
            }
        }
        center = (int)bits_of(value_of(between(one, 1, top))), margin = ROOM / 2 << EMPTY;
#else
        const int top = (int)peak;
        // A ladder of thresholds first, for some of the entries.
        const int bottom = between((int)bits_of(guess), 1 << 26, top) - (RUNGS - 1) * (1 << 21);
        float rungs[RUNGS + 1];
#pragma unroll
        for (int j = 0; j <= RUNGS; ++j) rungs[j] = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) {
            rungs[RUNGS] += SCORE(i);
#pragma unroll
            for (int j = 0; j < RUNGS; ++j)
                rungs[j] = plus_below(rungs[j], SCORE(i), float_of((u32)(bottom + (j << 22))));
        }
#pragma unroll
        for (int j = 0; j <= RUNGS; ++j) few[j] = nearest(rungs[j] * scale);
        add_up(few, RUNGS + 1, slots[turn]);
        turn ^= 1;
        const int sampled = logarithm((u32)(rest_share * (float)few[RUNGS]));
        int last = bottom, last_rest = logarithm(few[0]), above_rest = logarithm(few[1]);
#pragma unroll
        for (int j = 1; j < RUNGS - 1; ++j) {
            const int next = logarithm(few[j + 1]);
            if (above_rest <= sampled) last = bottom + (j << 22), last_rest = above_rest, above_rest = next;
        }
        float run = above_rest > last_rest ? (float)(1 << 22) / (float)(above_rest - last_rest) : 0.5f;
        run = fminf(run, 20.0f);
        center = last + (int)within((float)(sampled - last_rest) * run, 1 << 29), margin = 0;
        for (int pass = 0; pass < PASSES; ++pass) {
            const int now = between(center, 1, top);
            float sums[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i % 4] = plus_below(sums[i % 4], SCORE(i), float_of((u32)now));
            few[0] = nearest(((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale);
            add_up(few, 1, slots[turn]);
            turn ^= 1;
            const int rest = logarithm(few[0]);
            if (pass > 0 && rest != last_rest) {
                const float found = (float)(now - last) / (float)(rest - last_rest);
                if (found > 0 && found < 20) run = found;
            }
            last = now, last_rest = rest;
            center = now + (int)within((float)(wanted - rest) * run, 1 << 29);
            const float mass = float_of((u32)now) * scale;
            margin = 1 + (int)fminf(MARGIN * mass * run * 8388608.0f / (rest_wanted + 1), 1 << 29);
            if (fabsf((float)few[0] - rest_wanted) <= NEAR * mass) break;
        }
        // What stands near it, entry for entry; of narrow rows once more where it did not stand there: their sums tell
        // less of where it is.
        for (int look = 0; look < LOOKS && !proved; ++look) {
            const u32 low = (u32)between(center - margin, 1, top), high = low + 2 * margin;
            float sums[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const float score = SCORE(i);
                sums[i % 2] = plus_below(sums[i % 2], score, float_of(high));
                sums[2 + i % 2] = plus_not_below(sums[2 + i % 2], score, float_of(high));
                take_note(room, &listed, bits_of(score), low, high);
            }
            few[0] = nearest((sums[0] + sums[1]) * scale), few[1] = nearest((sums[2] + sums[3]) * scale);
            add_up(few, 2, slots[turn]);
            turn ^= 1;
            if (WARPS == 1) block_meets();
            // Enough is reached where (1 - amount) of it is amount of the rest, or more; each entry that is taken in
            // adds its own mass to the difference.
            const float rest = (float)numbers[0] * (float)few[0], enough = rest_share * (float)few[1], more = enough - rest;
            const float unsure = ERROR * (rest + enough) + THREADS / 2 + 32;
            const u32 count = listed;
            if (count <= ROOM && more < -unsure) {
                u32 mine = 0;
                for (u32 i = threadIdx.x; i < count; i += THREADS) {
                    float mass = 0;
                    for (u32 j = 0; j < count; ++j)
                        mass = plus_not_below(mass, float_of(room[j]), float_of(room[i]));
                    mass *= scale;
                    const float doubt = unsure + mass * (float)count / 16777216.0f;
                    if (mass + more > doubt) mine = room[i] > mine ? room[i] : mine;
                    else if (mass + more >= -doubt) raise_to(&unsure_one, 1);
                }
                if (mine) raise_to(&answer, mine);
                block_meets();
                proved = answer > 0 && unsure_one == 0;
                least = proved ? answer : 0;
                if (!proved && unsure_one != 0) break;
            }
            if (look + 1 < LOOKS && !proved) {
                const int rest = logarithm(few[0]);
                center = (int)high + (int)within((float)(wanted - rest) * run, 1 << 29);
                if (count > ROOM) break;
                block_meets();
                if (threadIdx.x == 0) listed = answer = unsure_one = 0;
                block_meets();
            }
        }
#endif

        // By integers: all is reached at `low`, and less than is asked for at `high`.
        const u32 turned = 56 - MASS_BITS + (peak >> 23);
        u32 low = 0, high = ((peak >> EMPTY) + 1) << EMPTY;
        for (int tries = 0; !proved; ++tries) {
            block_meets();
            for (int i = threadIdx.x; i < ROOM; i += THREADS) room[i] = 0;
            if (threadIdx.x == 0) listed = answer = 0;
            block_meets();
            u32 begin, end;
            if (tries < 4) {
                const int first = between(center, (int)low, (int)high) - margin;
                begin = first < (int)low ? low : (u32)first >> EMPTY << EMPTY;
                end = begin + 2 * (u32)margin > high ? high : begin + 2 * (u32)margin;
            } else {
                end = ((low >> EMPTY) + (high >> EMPTY) + 1) / 2 << EMPTY;
                begin = end - low > 2 * (u32)margin ? end - 2 * (u32)margin : low;
            }
            u64 sums[2] = {0, 0};
#if PACKED
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) forget(held[i]);
#endif
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const u32 bits = bits_of(SCORE(i));
                const u64 mass = mass_of(bits, turned);
                sums[0] += mass;
                if (bits >= end) sums[1] += mass;
                take_note(room, &listed, bits, begin, end);
            }
            add_up_long(sums, long_slots[turn]);
            turn ^= 1;
            u64 target = share_of(sums[0], numbers + 4);
            target = target < 1 ? 1 : target > sums[0] ? sums[0] : target;
            if (sums[1] >= target) {
                low = end;
                center = (int)end + margin;
            } else {
                high = end;
#if PACKED
                // Of each pattern, and of those above it.
                const int count = (int)((end - begin) >> EMPTY);
                u64 mass = lane < count ? (u64)room[lane] * mass_of(begin + ((u32)lane << EMPTY), turned) : 0;
                for (int step = 1; step < ROOM; step *= 2) {
                    const u64 upper = of_lane_above((u32)(mass >> 32), step), lower = of_lane_above((u32)mass, step);
                    mass += lane + step < 32 ? upper << 32 | lower : 0;
                }
                const u32 votes = warp_votes(lane < count && sums[1] + mass >= target);
                if (votes) {
                    least = begin + ((31 - (u32)__clz(votes)) << EMPTY);
                    break;
                }
                high = begin;
#else
                const u32 count = listed;
                if (count <= ROOM) {
                    u32 mine = 0;
                    for (u32 i = threadIdx.x; i < count; i += THREADS) {
                        u64 mass = sums[1];
                        for (u32 j = 0; j < count; ++j)
                            if (room[j] >= room[i]) mass += mass_of(room[j], turned);
                        if (mass >= target && room[i] > mine) mine = room[i];
                    }
                    if (mine) raise_to(&answer, mine);
                    block_meets();
                    least = answer;
                    if (least) break;
                    high = begin;
                }
#endif
                center = (int)high - margin;
            }
            if (high - low <= 1u << EMPTY) {
                least = low;
                break;
            }
        }
#if PACKED
        if (!proved) least = (u32)pattern_of(float_of(least));
#endif
    }

    const uint4* source = SAME ? from : (const uint4*)(onto + row * onto_stride - ahead);
    uint4* to = (uint4*)(out + row * width - ahead);
    u32 alive = 0;
    if (least == 0) {
        for (int place = threadIdx.x; place < vectors; place += THREADS) {
            write(to, place, source[place], PARTIAL(place), FIRST(place), LAST(place));
            const uint4 q = READ(place);
            const u32 part[4] = {q.x, q.y, q.z, q.w};
            for (int i = 0; i < 4; ++i)
                if (TYPE == 2) alive += (part[i] & 0x7fffffff) != 0;
                else alive += ((part[i] & 0x7fff) != 0) + ((part[i] & 0x7fff0000) != 0);
        }
    } else {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int place = threadIdx.x + v * THREADS;
            if (place >= vectors) continue;
            uint4 q = source[place];
            u32 part[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#if PACKED
                part[i] = reaches(held[4 * v + i], least | least << 16);
                alive += (part[i] & 1) + (part[i] >> 31);
#elif TYPE == 2
                part[i] = held[4 * v + i] >= float_of(least) ? 0xffffffffu : 0;
                alive += part[i] & 1;
#else
                const bool even = held[8 * v + 2 * i] >= float_of(least);
                const bool odd = held[8 * v + 2 * i + 1] >= float_of(least);
                part[i] = (even ? 0xffffu : 0) | (odd ? 0xffff0000u : 0);
                alive += (u32)even + (u32)odd;
#endif
            }
            q.x &= part[0], q.y &= part[1], q.z &= part[2], q.w &= part[3];
            write(to, place, q, PARTIAL(place), FIRST(place), LAST(place));
        }
    }
    // What is kept is no zero, where something is dropped.
    add_up(&alive, 1, ends);
    if (threadIdx.x == 0) {
        zeros[row] = width - (int)alive;
        finite[row] = whole;
    }
}
