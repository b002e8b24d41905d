// Threads of a GPU on a CPU, COUNT of them, which take turns; one that waits for others lets them go on.
#include <stdbool.h>
#include <stdlib.h>
#include <ucontext.h>

#define STACK 65536

static struct { ucontext_t context; bool ended; } all[COUNT];
static ucontext_t outside;
static int now;  // who has its turn

// Where threads meet: how many have come, and how often all had.
typedef struct { int come, times; } Meeting;

static void others(void) {
    const int mine = now;
    swapcontext(&all[mine].context, &outside);
}

static void meet(Meeting* where, int all_of_them) {
    const int before = where->times;
    if (++where->come == all_of_them) {
        where->come = 0;
        ++where->times;
    }
    while (where->times == before) others();
}

static void (*work)(void);

static void thread(void) {
    work();
    all[now].ended = true;
    others();
}

// All threads, from their beginning to their end: `places` says to one whose turn it is where it is.
static void take_turns(void (*works)(void), void (*places)(void)) {
    work = works;
    char* stacks = malloc((size_t)COUNT * STACK);
    for (int i = 0; i < COUNT; ++i) {
        getcontext(&all[i].context);
        all[i].context.uc_stack.ss_sp = stacks + (size_t)i * STACK;
        all[i].context.uc_stack.ss_size = STACK;
        makecontext(&all[i].context, thread, 0);
        all[i].ended = false;
    }
    for (int left = COUNT; left > 0;) {
        left = 0;
        for (now = 0; now < COUNT; ++now) {
            if (all[now].ended) continue;
            ++left;
            places();
            swapcontext(&outside, &all[now].context);
        }
    }
    free(stacks);
}
