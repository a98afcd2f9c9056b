/* link: -Wl,--wrap=syscall */
/*
 * Adaptive polling: looking for events before sleeping.
 *
 * Why it exists: a loop that looks too little sleeps for nothing, one that looks too much burns a processor, and one that holds
 * the lock meanwhile stops every other thread. Promise: whether a turn slept is counted, not timed.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>

#include "fake_kernel.h"

#define US 1000LL

enum { ROUNDS = 1000 };

static void the_time_to_look_follows_the_rule(enum ul_kind kind) {
    (void)kind;
    static const struct {
        int64_t poll_ns, block_ns, max_ns, grow, shrink, adjusted_ns;
    } rows[] = {
        {0, 1, 32768, 0, 0, 4000}, /* it begins */
        {4000, 5000, 32768, 0, 0, 8000},
        {8000, 9000, 32768, 0, 0, 16000},
        {16000, 20000, 32768, 0, 0, 32000},
        {32000, 32500, 32768, 0, 0, 32768}, /* up to the limit */
        {32768, 32768, 32768, 0, 0, 32768},
        {4000, 4000, 32768, 0, 0, 4000}, /* long enough */
        {8000, 1, 32768, 0, 0, 8000},
        {8000, 32768, 32768, 0, 0, 16000}, /* the limit itself is worth it */
        {8000, 32769, 32768, 0, 0, 0},     /* for nothing */
        {8000, 32769, 32768, 0, 2, 4000},
        {8000, INT64_MAX, 32768, 0, 3, 2666},
        {1, 32769, 32768, 0, 2, 0},
        {8000, 32769, 32768, 0, 1, 8000},
        {0, 32769, 32768, 0, 2, 0},
        {4000, 5000, 32768, 3, 0, 12000},
        {4000, 5000, 32768, 1, 0, 4000},
        {0, 5000, 32768, 10, 0, 4000}, /* the first step is not multiplied */
        {0, 100, 3000, 0, 0, 3000},
        {4000, 5000, INT64_MAX, INT64_MAX, 0, INT64_MAX}, /* nor does it overflow */
        {5000000000000000000, 6000000000000000000, INT64_MAX, 2, 0, INT64_MAX},
        {0, 1, 0, 0, 0, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (!CHECK(ul_adjusted_poll_ns(rows[i].poll_ns, rows[i].block_ns, rows[i].max_ns, rows[i].grow, rows[i].shrink) ==
                   rows[i].adjusted_ns))
            fprintf(stderr, "row %zu\n", i);
}

/* ---- what it is for ---- */

static int sleeping_enters;
static int64_t slept_at_most_ns;

static long count_sleeping(const struct enter_call *call) {
    if (call->min_complete > 0) {
        const struct ul_getevents_arg *arg = (const struct ul_getevents_arg *)call->arg;
        const struct ul_timespec *ts = arg ? (const struct ul_timespec *)(uintptr_t)arg->ts : NULL;
        sleeping_enters++;
        slept_at_most_ns = ts ? ts->tv_sec * 1000000000 + ts->tv_nsec : -1;
    }
    return real_enter(call);
}

/* Answers each byte some microseconds after it, until the end of the stream. */
static void *answer_soon(void *argument) {
    int fd = *(int *)argument;
    char byte;
    for (ssize_t n; (n = read(fd, &byte, 1)) != 0;) {
        if (n < 0)
            continue;
        for (int64_t start = now_ns(); now_ns() < start + 10 * US;)
            ;
        put(fd);
    }
    return NULL;
}

static uint64_t play(ul_fdmon *mon, struct pair pair) {
    ul_event out[4];
    uint64_t before = statistics_of(mon).polled;
    sleeping_enters = 0;
    for (int i = 0; i < ROUNDS && !checks_failed; i++) {
        put(pair.ours);
        CHECK(next_events(mon, out, 4, SOON) == 1);
        take(pair.ours);
    }
    return statistics_of(mon).polled - before;
}

static void an_answer_that_comes_soon_is_awaited_without_sleeping(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    pthread_t peer;
    int without = ROUNDS;
    if (sysconf(_SC_NPROCESSORS_ONLN) > 1) {
        CHECK(pthread_create(&peer, NULL, answer_soon, &pair.peer) == 0);
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        on_enter = count_sleeping;
        CHECK(play(mon, pair) == 0);
        without = sleeping_enters;
        ul_fdmon_set_polling(mon, 1000 * MS, 0, 0); /* on a busy machine the peer may not run for a while */
        uint64_t polled = play(mon, pair);
        CHECK(polled >= ROUNDS / 2);
        CHECK(kind != UL_IO_URING || (sleeping_enters <= ROUNDS - (int)polled && sleeping_enters < without));
        believe_the_kernel();
        shutdown(pair.ours, SHUT_WR);
        pthread_join(peer, NULL);
    }
    close_monitor(mon);
    close_pair(pair);
}

/* ---- how it learns ---- */

static void it_is_off_until_it_is_asked_for_and_each_call_begins_anew(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    put(pair.peer);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(statistics_of(mon).poll_ns == 0 && statistics_of(mon).polled == 0);
    ul_fdmon_set_polling(mon, 10000 * MS, 0, 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(statistics_of(mon).poll_ns == 4000 && statistics_of(mon).polled == 0); /* it slept, and will not */
    ul_fdmon_set_polling(mon, 10000 * MS, 0, 0);
    CHECK(statistics_of(mon).poll_ns == 0);
    mon->poll_ns = 5000 * MS;
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(statistics_of(mon).poll_ns == 5000 * MS && statistics_of(mon).polled == 1);
    ul_fdmon_set_polling(mon, 0, 0, 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(statistics_of(mon).poll_ns == 0 && statistics_of(mon).polled == 1);
    close_monitor(mon);
    close_pair(pair);
}

static void a_turn_that_must_not_wait_does_not_look(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    ul_fdmon_set_polling(mon, 100000 * MS, 0, 0);
    mon->poll_ns = 100000 * MS;
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    put(pair.peer);
    CHECK(ul_fdmon_turn(mon, 0, out, 0) == 0 && mon->ready_live == 1);
    CHECK(ul_fdmon_turn(mon, -1, out, 4) == 1);
    CHECK(statistics_of(mon).polled <= 1);
    close_monitor(mon);
    close_pair(pair);
}

static void looking_ends_with_the_timeout(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    ul_fdmon_set_polling(mon, 100000 * MS, 0, 0);
    mon->poll_ns = 100000 * MS;
    int64_t start = now_ns();
    CHECK(ul_fdmon_turn(mon, 5 * MS, out, 4) == 0);
    CHECK(now_ns() >= start + 5 * MS && now_ns() < start + SOON);
    CHECK(statistics_of(mon).poll_ns == 100000 * MS && statistics_of(mon).polled == 0);
    mon->poll_ns = 2 * MS; /* and the rest of it is slept, by the next turn: signal handlers run between the two */
    mon->poll_max_ns = 3 * MS;
    on_enter = count_sleeping;
    sleeping_enters = 0;
    start = now_ns();
    CHECK(ul_fdmon_turn(mon, 20 * MS, out, 4) == 0 && sleeping_enters == 0);
    CHECK(now_ns() >= start + 2 * MS);
    CHECK(waits_at_least(mon, 18 * MS));
    CHECK(kind != UL_IO_URING || (sleeping_enters > 0 && slept_at_most_ns > 0 && slept_at_most_ns <= 18 * MS));
    believe_the_kernel();
    CHECK(statistics_of(mon).poll_ns == 0);
    close_monitor(mon);
    close_pair(pair);
}

static int64_t cpu_ns(void) {
    struct timespec used;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return (int64_t)used.tv_sec * 1000000000 + used.tv_nsec;
}

static void who_waits_long_does_not_look_and_an_idle_second_costs_nothing(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    ul_fdmon_set_polling(mon, 1 * MS, 0, 2);
    mon->poll_ns = 1 * MS;
    for (int64_t left = 1 * MS; left > 0; left /= 2) {
        CHECK(is_quiet(mon, 3 * MS));
        CHECK(statistics_of(mon).poll_ns <= (uint64_t)left / 2);
    }
    ul_fdmon_set_polling(mon, 1 * MS, 0, 0);
    mon->poll_ns = 1 * MS;
    int64_t before = cpu_ns();
    CHECK(is_quiet(mon, 1000 * MS));
    CHECK(cpu_ns() - before < 50 * MS);
    CHECK(statistics_of(mon).poll_ns == 0);
    close_monitor(mon);
    close_pair(pair);
}

struct interrupter {
    pthread_t whom;
    bool done;
};

static void *interrupt(void *argument) {
    struct interrupter *interrupter = argument;
    while (!__atomic_load_n(&interrupter->done, __ATOMIC_RELAXED)) {
        nanosleep(&(struct timespec){0, 2 * MS}, NULL);
        pthread_kill(interrupter->whom, SIGUSR1);
    }
    return NULL;
}

static void do_nothing(int signal) { (void)signal; }

static void an_interrupted_wait_teaches_nothing(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    struct interrupter interrupter = {.whom = pthread_self()};
    pthread_t thread;
    ul_event out[4];
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = do_nothing}, NULL);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    ul_fdmon_set_polling(mon, 1000000 * MS, 0, 0);
    CHECK(pthread_create(&thread, NULL, interrupt, &interrupter) == 0);
    int64_t start = now_ns();
    for (int i = 0; i < 5; i++)
        CHECK(ul_fdmon_turn(mon, 2 * SOON, out, 4) == 0);
    CHECK(now_ns() - start < 2 * SOON && statistics_of(mon).poll_ns == 0);
    __atomic_store_n(&interrupter.done, true, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    close_monitor(mon);
    close_pair(pair);
}

/* ---- beside other threads ---- */

struct looker {
    pthread_t thread;
    ul_fdmon *mon;
    int fd;
    uint32_t seen;
};

static void *look_for_fd(void *argument) {
    struct looker *looker = argument;
    looker->seen = events_of(looker->mon, looker->fd, 5 * SOON);
    return NULL;
}

static void start_to_look(struct looker *looker) {
    ul_fdmon_set_polling(looker->mon, 100 * SOON, 0, 0);
    looker->mon->poll_ns = 100 * SOON;
    CHECK(pthread_create(&looker->thread, NULL, look_for_fd, looker) == 0);
    until_somebody_waits(looker->mon);
}

static void who_looks_counts_as_waiting(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair(), removed = open_pair();
    struct looker looker = {.mon = mon, .fd = pair.ours};
    ul_ring *spare;
    ul_event out[1];
    CHECK(ul_fdmon_update(mon, removed.ours, UL_READ) == 0);
    start_to_look(&looker);
    CHECK(ul_fdmon_close(mon, &spare) == -EBUSY);
    CHECK(ul_fdmon_turn(mon, 0, out, 1) == -EBUSY);
    CHECK(ul_fdmon_prepare(mon, -1) == -EBUSY);
    CHECK(ul_fdmon_update(mon, removed.ours, 0) == 0);
    close(removed.ours);
    CHECK(sees_end_of_file(removed.peer, 2000));                    /* though nobody was woken */
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_ONCE) == 0); /* epoll reports it to the look, and then no more */
    put(pair.peer);
    int64_t start = now_ns();
    pthread_join(looker.thread, NULL);
    CHECK(looker.seen == UL_READ && statistics_of(mon).polled == 1 && now_ns() - start < SOON);
    close_monitor(mon);
    close(removed.peer);
    close_pair(pair);
}

static void others_get_through_while_one_looks(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair(), other = open_pair();
    struct looker looker = {.mon = mon, .fd = pair.ours};
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    start_to_look(&looker);
    for (int i = 0; i < 500; i++) {
        CHECK(ul_fdmon_update(mon, other.ours, i % 3 == 0 ? UL_READ : i % 3 == 1 ? UL_READ | UL_RECV : 0) == 0);
        if (i % 10 == 0)
            put(other.peer);
    }
    CHECK(looker.seen == 0 && statistics_of(mon).watches == 2);
    put(pair.peer);
    pthread_join(looker.thread, NULL);
    CHECK(looker.seen == UL_READ);
    close_monitor(mon);
    close_pair(pair);
    close_pair(other);
}

static long refuse(const struct enter_call *call) {
    (void)call;
    return -EPERM;
}

static void a_monitor_lost_while_it_looks_is_reported_at_once(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    ul_fdmon_set_polling(mon, 100 * SOON, 0, 0);
    mon->poll_ns = 100 * SOON;
    on_enter = refuse;
    CHECK(ul_fdmon_turn(mon, -1, out, 4) == UL_DOWNGRADED);
    believe_the_kernel();
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ && statistics_of(mon).polled == 1);
    close_monitor(mon);
    close_pair(pair);
}

TESTS(TEST(the_time_to_look_follows_the_rule, ON_POLL), TEST(an_answer_that_comes_soon_is_awaited_without_sleeping, ON_ALL),
      TEST(it_is_off_until_it_is_asked_for_and_each_call_begins_anew, ON_ALL),
      TEST(a_turn_that_must_not_wait_does_not_look, ON_ALL), TEST(looking_ends_with_the_timeout, ON_ALL),
      TEST(who_waits_long_does_not_look_and_an_idle_second_costs_nothing, ON_ALL),
      TEST(an_interrupted_wait_teaches_nothing, ON_ALL), TEST(who_looks_counts_as_waiting, ON_ALL),
      TEST(others_get_through_while_one_looks, ON_ALL), TEST(a_monitor_lost_while_it_looks_is_reported_at_once, ON_IO_URING))
