/*
 * Adaptive polling: a turn looks for events before it sleeps. The contract stands in fdmon.h.
 *
 * Why it exists: going to sleep and being woken cost some microseconds, more than a peer on the same machine or a fast disk
 * needs for its answer; QEMU's AioContext looks for that long before it sleeps. Promise: where answers take longer than the
 * limit, nobody looks; and while one thread looks, others get at the monitor as they do beside a wait.
 *
 * Some facts that decided this file:
 *
 * - Looking is a wait without a timeout. On io_uring the first submits what is queued, the others read the tail of the completion
 *   queue and the flag for deferred work; the kernel is entered when there is some.
 * - The lock is free for most of the time, since a mutex is not fair: a thread that wants it must meet it free.
 * - How soon an event comes is not known of a wait that slept: until it runs again, 20 to 50 us pass on an idle processor. QEMU
 *   counts them; then an answer of 20 us never starts the looking that would have it at once.
 * - What ended without an event tells how long there was none, not how soon one comes: a short interrupted wait teaches nothing.
 */
#define _GNU_SOURCE
#include "fdmon.h"

enum {
    FIRST_POLL_NS = 4000,
    WAKE_UP_NS = 50000,
    PAUSES = 8, /* 0.1 to 0.4 us; a look takes 0.05 */
};

static void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

int64_t ul_adjusted_poll_ns(int64_t poll_ns, int64_t block_ns, int64_t poll_max_ns, int64_t poll_grow, int64_t poll_shrink) {
    if (block_ns <= poll_ns)
        return poll_ns;
    if (block_ns > poll_max_ns)
        return poll_shrink > 0 ? poll_ns / poll_shrink : 0;
    if (poll_ns >= poll_max_ns)
        return poll_ns;
    int64_t factor = poll_grow > 0 ? poll_grow : 2;
    if (poll_ns > poll_max_ns / factor)
        return poll_max_ns;
    poll_ns = poll_ns > 0 ? poll_ns * factor : FIRST_POLL_NS;
    return poll_ns < poll_max_ns ? poll_ns : poll_max_ns;
}

void ul_fdmon_set_polling(ul_fdmon *mon, int64_t poll_max_ns, int64_t poll_grow, int64_t poll_shrink) {
    pthread_mutex_lock(&mon->lock);
    mon->poll_ns = mon->looked_since_ns = 0;
    mon->poll_max_ns = poll_max_ns;
    mon->poll_grow = poll_grow;
    mon->poll_shrink = poll_shrink;
    pthread_mutex_unlock(&mon->lock);
}

/* There is something to report, so the turn must not sleep. */
static bool has_found(const ul_fdmon *mon) { return mon->ready_live > 0 || mon->downgrade_unreported; }

static void let_others_in(ul_fdmon *mon) {
    mon->waiting = true;
    pthread_mutex_unlock(&mon->lock);
    for (int i = 0; i < PAUSES; i++)
        pause_cpu();
    pthread_mutex_lock(&mon->lock);
    mon->waiting = false;
}

static int look(ul_fdmon *mon, int64_t end_ns) {
    int err = ul_fdmon_wait(mon, 0);
    while (err == 0 && !has_found(mon) && ul_now_ns() < end_ns) {
        let_others_in(mon);
        err = ul_fdmon_wait(mon, 0);
    }
    mon->polled += mon->ready_live > 0;
    return err;
}

/* Whoever looks in vain lets signal handlers run before he sleeps: what came while he looked interrupts no sleep. */
static int look_or_return(ul_fdmon *mon, int64_t timeout_ns) {
    mon->looked_since_ns = ul_now_ns();
    bool limited = timeout_ns >= 0 && timeout_ns < mon->poll_ns;
    return look(mon, mon->looked_since_ns + (limited ? timeout_ns : mon->poll_ns));
}

/* The event came after the look and before the wake-up. At the limit there is nothing to be learnt: it came later than that. */
static int64_t without_wake_up(const ul_fdmon *mon, int64_t block_ns) {
    return block_ns - WAKE_UP_NS > mon->poll_ns ? block_ns - WAKE_UP_NS : mon->poll_ns + 1;
}

int ul_polling_wait(ul_fdmon *mon, int64_t timeout_ns) {
    int err = 0;
    bool sleeps = mon->poll_ns == 0 || mon->looked_since_ns;
    int64_t start_ns = mon->looked_since_ns ? mon->looked_since_ns : ul_now_ns();
    if (sleeps)
        err = ul_fdmon_wait(mon, timeout_ns);
    else
        err = look_or_return(mon, timeout_ns);
    if (sleeps || err < 0 || has_found(mon) || (timeout_ns >= 0 && timeout_ns < mon->poll_ns))
        mon->looked_since_ns = 0;
    int64_t block_ns = ul_now_ns() - start_ns;
    if (sleeps && mon->poll_ns < mon->poll_max_ns)
        block_ns = without_wake_up(mon, block_ns);
    if (mon->ready_live > 0 || (sleeps && block_ns > mon->poll_max_ns))
        mon->poll_ns = ul_adjusted_poll_ns(mon->poll_ns, block_ns, mon->poll_max_ns, mon->poll_grow, mon->poll_shrink);
    return err;
}
