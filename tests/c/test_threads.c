/*
 * Several threads at one monitor.
 *
 * Why it exists: a loop is made in one thread, run in another and asked for its statistics by a third. Promise: none of these
 * calls corrupts anything or loses a watch. This file is also meant for -fsanitize=thread.
 */
#define _GNU_SOURCE
#include <pthread.h>

#include "support.h"

struct caller {
    pthread_t thread;
    ul_fdmon *mon;
    int fd, other_fd;
    uint32_t events;
    int result;
    uint32_t seen;
};

static void start(struct caller *caller, void *(*run)(void *)) {
    CHECK(pthread_create(&caller->thread, NULL, run, caller) == 0);
}

static void *wait_for_fd(void *argument) {
    struct caller *caller = argument;
    caller->seen = events_of(caller->mon, caller->fd, 5 * SOON);
    return NULL;
}

static void *update_fd(void *argument) {
    struct caller *caller = argument;
    caller->result = ul_fdmon_update(caller->mon, caller->fd, caller->events);
    return NULL;
}

static void run_in_thread(struct caller *caller, void *(*run)(void *)) {
    start(caller, run);
    pthread_join(caller->thread, NULL);
}

static void *remove_when_somebody_waits(void *argument) {
    struct caller *caller = argument;
    until_somebody_waits(caller->mon);
    CHECK(ul_fdmon_update(caller->mon, caller->fd, 0) == 0);
    put(caller->other_fd);
    return NULL;
}

static void a_watch_added_while_the_owner_waits_is_there_in_its_next_turn(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair wake = open_pair(), added = open_pair();
    CHECK(ul_fdmon_update(mon, wake.ours, UL_READ) == 0);
    struct caller owner = {.mon = mon, .fd = wake.ours};
    start(&owner, wait_for_fd);
    until_somebody_waits(mon);
    put(added.peer);
    CHECK(ul_fdmon_update(mon, added.ours, UL_READ) == 0);
    put(wake.peer);
    pthread_join(owner.thread, NULL);
    CHECK(owner.seen == UL_READ);
    take(wake.ours);
    CHECK(events_of(mon, added.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(wake);
    close_pair(added);
}

static void a_watch_removed_while_the_owner_waits_is_not_reported(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair wake = open_pair(), removed = open_pair();
    ul_event out[4];
    CHECK(ul_fdmon_update(mon, wake.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, removed.ours, UL_READ) == 0);
    struct caller owner = {.mon = mon, .fd = wake.ours};
    start(&owner, wait_for_fd);
    until_somebody_waits(mon);
    CHECK(ul_fdmon_update(mon, removed.ours, 0) == 0);
    CHECK(statistics_of(mon).watches == 1);
    put(removed.peer);
    put(wake.peer);
    pthread_join(owner.thread, NULL);
    CHECK(owner.seen == UL_READ);
    CHECK(next_events(mon, out, 4, SOON) == 1 && out[0].fd == wake.ours);
    take(wake.ours);
    CHECK(is_quiet(mon, 2 * MS));
    CHECK(ul_fdmon_update(mon, removed.ours, UL_READ) == 0);
    CHECK(events_of(mon, removed.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(wake);
    close_pair(removed);
}

/* The other thread could not cancel, so the owner's next removal has to, lest it waits for a completion that never comes. */
static void a_removal_by_the_owner_after_one_by_another_thread_is_quick_and_keeps_the_ring(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair wake = open_pair(), theirs = open_pair(), ours = open_pair();
    ul_event out[4];
    CHECK(ul_fdmon_update(mon, theirs.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, ours.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    CHECK(ul_fdmon_update(mon, wake.ours, UL_READ) == 0);
    struct caller remover = {.mon = mon, .fd = theirs.ours, .other_fd = wake.peer};
    start(&remover, remove_when_somebody_waits);
    CHECK(events_of(mon, wake.ours, SOON) == UL_READ);
    pthread_join(remover.thread, NULL);
    ul_ring *ring = mon->ring;
    uint64_t enters = statistics_of(mon).enters;
    CHECK(ul_fdmon_update(mon, ours.ours, 0) == 0);
    CHECK(mon->ring == ring && statistics_of(mon).enters - enters < 10);
    close(ours.ours);
    close(theirs.ours);
    CHECK(sees_end_of_file(ours.peer, 0));
    ul_fdmon_turn(mon, 0, out, 4);
    CHECK(sees_end_of_file(theirs.peer, 0));
    close_monitor(mon);
    close(ours.peer);
    close(theirs.peer);
    close_pair(wake);
}

static void a_number_removed_and_watched_again_while_the_owner_waits_is_the_new_file(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair wake = open_pair(), old = open_pair();
    ul_event out[4];
    CHECK(ul_fdmon_update(mon, wake.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, old.ours, UL_READ) == 0);
    struct caller owner = {.mon = mon, .fd = wake.ours};
    start(&owner, wait_for_fd);
    until_somebody_waits(mon);
    CHECK(ul_fdmon_update(mon, old.ours, 0) == 0);
    struct pair new = open_pair();
    CHECK(dup3(new.ours, old.ours, O_CLOEXEC) == old.ours); /* the number is another file now */
    CHECK(ul_fdmon_update(mon, old.ours, UL_READ) == 0);
    put(wake.peer);
    pthread_join(owner.thread, NULL);
    take(wake.ours);
    while (next_events(mon, out, 4, 2 * MS) > 0) /* the old file's end may be reported once more; it must not stay */
        CHECK(out[0].fd == old.ours);
    put(new.peer);
    CHECK(events_of(mon, old.ours, SOON) == UL_READ);
    close_monitor(mon);
    close(new.ours);
    close(new.peer);
    close_pair(old);
    close_pair(wake);
}

static void a_monitor_moves_from_thread_to_thread_with_all_its_watches(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pairs[3] = {open_pair(), open_pair(), open_pair()};
    for (int i = 0; i < 3; i++)
        CHECK(ul_fdmon_update(mon, pairs[i].ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS)); /* armed in this thread */
    for (int round = 0; round < 6; round++) {
        put(pairs[round % 3].peer);
        struct caller runner = {.mon = mon, .fd = pairs[round % 3].ours};
        run_in_thread(&runner, wait_for_fd); /* and its thread ends with the polls armed */
        CHECK(runner.seen == UL_READ);
        take(pairs[round % 3].ours);
    }
    put(pairs[1].peer);
    CHECK(events_of(mon, pairs[1].ours, SOON) == UL_READ);
    CHECK(statistics_of(mon).downgrades == 0);
    close_monitor(mon);
    for (int i = 0; i < 3; i++)
        close_pair(pairs[i]);
}

static void an_owner_that_ended_leaves_its_watches_to_whoever_removes_or_closes(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair a = open_pair(), b = open_pair();
    CHECK(ul_fdmon_update(mon, a.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, b.ours, UL_READ) == 0);
    put(a.peer);
    struct caller runner = {.mon = mon, .fd = a.ours};
    run_in_thread(&runner, wait_for_fd);
    CHECK(runner.seen == UL_READ);
    CHECK(ul_fdmon_update(mon, a.ours, 0) == 0);
    CHECK(ul_fdmon_update(mon, b.ours, 0) == 0);
    close(b.ours);
    CHECK(sees_end_of_file(b.peer, 1000));
    close_monitor(mon);
    close(b.peer);
    close_pair(a);
}

/* A new thread may get the pthread_t of one that ended; then only the kernel knows that it is another (-EEXIST). */
static void *turn_as_if_owner(void *argument) {
    struct caller *caller = argument;
    caller->mon->ring_owner = pthread_self();
    return wait_for_fd(argument);
}

static void *remove_as_if_owner(void *argument) {
    struct caller *caller = argument;
    caller->mon->ring_owner = pthread_self();
    return update_fd(argument);
}

static void *close_as_if_owner(void *argument) {
    struct caller *caller = argument;
    ul_ring *spare;
    caller->mon->ring_owner = pthread_self();
    caller->result = ul_fdmon_close(caller->mon, &spare);
    CHECK(spare == NULL);
    return NULL;
}

static void a_thread_that_looks_like_the_owner_is_found_out_by_the_kernel(enum ul_kind kind) {
    struct pair a = open_pair(), b = open_pair();
    ul_event out[4];
    for (int hosted = 0; hosted <= 1; hosted++) {
        ul_fdmon *mon = open_monitor(kind);
        CHECK(ul_fdmon_update(mon, a.ours, UL_READ) == 0);
        CHECK(ul_fdmon_update(mon, b.ours, UL_READ) == 0);
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        if (hosted)
            CHECK(ul_fdmon_fileno(mon) >= 0);
        put(a.peer);
        struct caller turner = {.mon = mon, .fd = a.ours};
        run_in_thread(&turner, turn_as_if_owner);
        CHECK(turner.seen == UL_READ);
        take(a.ours);
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0); /* this thread owns it again */

        struct caller remover = {.mon = mon, .fd = a.ours, .events = 0, .result = 1};
        run_in_thread(&remover, remove_as_if_owner);
        CHECK(remover.result == 0);
        put(b.peer);
        CHECK(events_of(mon, b.ours, SOON) == UL_READ);
        take(b.ours);
        CHECK(is_quiet(mon, 1 * MS));
        CHECK(statistics_of(mon).downgrades == 0 && statistics_of(mon).watches == 1);

        struct caller closer = {.mon = mon, .result = 1};
        run_in_thread(&closer, close_as_if_owner);
        CHECK(closer.result == 0);
        ul_fdmon_free(mon);
    }
    close(b.ours);
    CHECK(sees_end_of_file(b.peer, 1000));
    close(b.peer);
    close_pair(a);
}

static void a_second_thread_that_wants_to_wait_or_close_is_told_busy(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    ul_ring *spare;
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    struct caller owner = {.mon = mon, .fd = pair.ours};
    start(&owner, wait_for_fd);
    until_somebody_waits(mon);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == -EBUSY);
    CHECK(ul_fdmon_turn(mon, -1, out, 4) == -EBUSY);
    CHECK(ul_fdmon_close(mon, &spare) == -EBUSY && spare == NULL);
    CHECK(ul_fdmon_dispatch(mon, out, 4) == 0);
    CHECK(info_of(mon).name != NULL);
    put(pair.peer);
    pthread_join(owner.thread, NULL);
    CHECK(owner.seen == UL_READ);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) >= 0);
    close_monitor(mon);
    close_pair(pair);
}

/* ---- everything at once ---- */

static bool storm_is_over;

static void *change_watches(void *argument) {
    struct caller *caller = argument;
    for (uint32_t i = 0; !__atomic_load_n(&storm_is_over, __ATOMIC_RELAXED); i++) {
        CHECK(ul_fdmon_update(caller->mon, caller->fd, i % 4) == 0);
        CHECK(ul_fdmon_update(caller->mon, caller->other_fd, (i / 4) % 4) == 0);
        if (i % 64 == 0) {
            int fresh = dup_cloexec(caller->fd); /* a table that grows under the waiting thread */
            CHECK(ul_fdmon_update(caller->mon, fresh, UL_READ) == 0);
            CHECK(ul_fdmon_update(caller->mon, fresh, 0) == 0);
            close(fresh);
        }
        ul_fdmon_need_wait(caller->mon);
        statistics_of(caller->mon);
        info_of(caller->mon);
    }
    return NULL;
}

static void changes_from_two_threads_during_many_waits_lose_nothing(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair steady = open_pair(), pairs[4] = {open_pair(), open_pair(), open_pair(), open_pair()};
    struct caller callers[2] = {{.mon = mon, .fd = pairs[0].ours, .other_fd = pairs[1].ours},
                                {.mon = mon, .fd = pairs[2].ours, .other_fd = pairs[3].ours}};
    ul_event out[8];
    CHECK(ul_fdmon_update(mon, steady.ours, UL_READ) == 0);
    put(steady.peer);
    put(pairs[1].peer);
    storm_is_over = false;
    for (int i = 0; i < 2; i++)
        start(&callers[i], change_watches);
    int64_t last_report = now_ns(), longest_gap = 0;
    for (int64_t end = now_ns() + 200 * MS; now_ns() < end;) {
        int n = ul_fdmon_turn(mon, 1 * MS, out, 8);
        CHECK(n >= 0);
        for (int i = 0; i < n; i++) {
            if (out[i].fd == steady.ours) {
                int64_t now = now_ns();
                longest_gap = now - last_report > longest_gap ? now - last_report : longest_gap;
                last_report = now;
            }
        }
    }
    __atomic_store_n(&storm_is_over, true, __ATOMIC_RELAXED);
    for (int i = 0; i < 2; i++)
        pthread_join(callers[i].thread, NULL);
    CHECK(longest_gap < SOON);
    CHECK(events_of(mon, steady.ours, SOON) == UL_READ);
    for (int i = 0; i < 4; i++)
        CHECK(ul_fdmon_update(mon, pairs[i].ours, 0) == 0);
    take(steady.ours);
    ul_fdmon_turn(mon, 0, out, 8);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(statistics_of(mon).watches == 1 && statistics_of(mon).downgrades == 0);
    close_monitor(mon);
    close_pair(steady);
    for (int i = 0; i < 4; i++)
        close_pair(pairs[i]);
}

TESTS(TEST(a_watch_added_while_the_owner_waits_is_there_in_its_next_turn, ON_ALL),
      TEST(a_watch_removed_while_the_owner_waits_is_not_reported, ON_ALL),
      TEST(a_removal_by_the_owner_after_one_by_another_thread_is_quick_and_keeps_the_ring, ON_ALL),
      TEST(a_number_removed_and_watched_again_while_the_owner_waits_is_the_new_file, ON_ALL),
      TEST(a_monitor_moves_from_thread_to_thread_with_all_its_watches, ON_ALL),
      TEST(an_owner_that_ended_leaves_its_watches_to_whoever_removes_or_closes, ON_ALL),
      TEST(a_thread_that_looks_like_the_owner_is_found_out_by_the_kernel, ON_IO_URING),
      TEST(a_second_thread_that_wants_to_wait_or_close_is_told_busy, ON_ALL),
      TEST(changes_from_two_threads_during_many_waits_lose_nothing, ON_ALL))
