/* How threads share a call: barriers, shares of panels, and how many threads take part.
 *
 * Another process that is busy on a core delays the thread that needs it, and every thread that waits for that one. So waiting
 * threads sleep, which frees a core for a late one; in long products threads steal each other's panels; and where threads do
 * not get their cores, calls use one thread fewer for a while. Results do not depend on which thread computes them.
 */
#include <sched.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MOST_TAKERS 64  /* with more threads, panels are not stolen */
#define SPINS 4000      /* about 50 microseconds; on an idle machine waits take one or two */
#define WINDOW 0.1      /* seconds of recent calls that are averaged */
#define EVIDENCE 0.02   /* least seconds of calls before a thread is left out */
#define LEAST_SHARE 0.7 /* of a call's time on a core, per thread: usually 0.9 or more, 0.5 to 0.6 beside a process on two */
#define SHORTEST_PAUSE 0.02
#define LONGEST_PAUSE 1.0

/* Where the share of thread `index` of `of` begins in `count` things; it ends where the next thread's begins. */
INLINE int share(int count, int index, int of) { return (int)((int64_t)count * index / of); }
INLINE int64_t share_of_many(int64_t count, int index, int of) { return count / of * index + count % of * index / of; }

typedef struct {
    _Alignas(64) atomic_ullong state; /* the phase in the high half, how much of the share is taken in the low half */
} Taken;

typedef struct {
    atomic_uint arrived, phase, sleepers;
    Taken taken[MOST_TAKERS];
} Team;

static double seconds_of(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void sleep_in(Team *team, unsigned phase) {
    while (atomic_load(&team->phase) == phase) {
#if defined(__linux__)
        atomic_fetch_add(&team->sleepers, 1);
        syscall(SYS_futex, &team->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0); /* at once if the phase is over */
        atomic_fetch_sub(&team->sleepers, 1);
#else
        sched_yield();
#endif
    }
}

/* Waits until all threads are here, which begins the next phase. */
INLINE void barrier(Team *team, int threads) {
    if (threads == 1) return;
    unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == (unsigned)threads - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store(&team->phase, phase + 1);
#if defined(__linux__)
        if (atomic_load(&team->sleepers)) syscall(SYS_futex, &team->phase, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (atomic_load_explicit(&team->phase, memory_order_acquire) != phase) return;
        relax();
    }
    sleep_in(team, phase);
}

/* Takes up to `few` of a thread's share of `count` things. Returns the first; -1 if none is left. */
INLINE int steal(Taken *taken, unsigned phase, int few, int count) {
    unsigned long long state = atomic_load_explicit(&taken->state, memory_order_relaxed);
    for (;;) {
        int next = state >> 32 == phase ? (int)(uint32_t)state : 0;
        if (next >= count) return -1;
        unsigned long long after = (unsigned long long)phase << 32 | (unsigned)(next + few);
        if (atomic_compare_exchange_weak_explicit(&taken->state, &state, after, memory_order_relaxed, memory_order_relaxed)) return next;
    }
}

typedef struct {
    double wall, cores; /* seconds of the clock, and of all threads' CPU time */
} Moment;

static Moment moment(void) { return (Moment){seconds_of(CLOCK_MONOTONIC), seconds_of(CLOCK_PROCESS_CPUTIME_ID)}; }

static _Thread_local struct {
    Moment spent;        /* in the last calls */
    int left_out;        /* threads left out of calls */
    double until, pause; /* when one is tried again, and how long after it was left out */
} crowd;

/* How many of `threads` a call uses. */
static int threads_now(int threads) {
    if (threads == 1) return 1;
    if (crowd.left_out && seconds_of(CLOCK_MONOTONIC) >= crowd.until) crowd.left_out--, crowd.spent = (Moment){0, 0};
    return crowd.left_out < threads ? threads - crowd.left_out : 1;
}

/* After a call: leaves a thread out if threads were kept from their cores. A pause is twice as long as the last one, if that
 * was just before. */
static void adapt_threads(int threads, Moment started) {
    Moment now = moment();
    double took = now.wall - started.wall, kept = took < WINDOW ? 1 - took / WINDOW : 0, twice = 2 * crowd.pause;
    crowd.spent.wall = kept * crowd.spent.wall + took;
    crowd.spent.cores = kept * crowd.spent.cores + now.cores - started.cores;
    if (crowd.spent.wall < EVIDENCE || crowd.spent.cores >= LEAST_SHARE * threads * crowd.spent.wall) return;
    crowd.pause = now.wall > crowd.until + LONGEST_PAUSE ? SHORTEST_PAUSE : twice < LONGEST_PAUSE ? twice : LONGEST_PAUSE;
    crowd.until = now.wall + crowd.pause, crowd.spent = (Moment){0, 0};
    crowd.left_out++;
}
