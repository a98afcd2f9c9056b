/*
 * The descriptor for an outer loop: readable whenever a turn is due, and quiet otherwise.
 *
 * Why it exists: an outer poll() on a DEFER_TASKRUN ring is not woken, so io_uring offers an eventfd with a protocol of its own.
 * Promise: every test drives the monitor only when the descriptor says so, as a host does.
 */
#define _GNU_SOURCE
#include <pthread.h>

#include "support.h"

static bool is_due(ul_fdmon *mon, int timeout_ms) {
    struct pollfd outer = {.fd = ul_fdmon_fileno(mon), .events = POLLIN};
    return poll(&outer, 1, timeout_ms) == 1;
}

/* What a host does: polls, and takes one turn that does not block. 0 when nothing was due. */
static int hosted_turn(ul_fdmon *mon, ul_event *out, int out_max, int timeout_ms) {
    return is_due(mon, timeout_ms) ? ul_fdmon_turn(mon, 0, out, out_max) : 0;
}

static uint32_t hosted_events_of(ul_fdmon *mon, int fd) {
    ul_event out[16];
    for (int turns = 0; turns < 10 && is_due(mon, 2000); turns++) {
        int n = ul_fdmon_turn(mon, 0, out, 16);
        for (int i = 0; i < n; i++)
            if (out[i].fd == fd)
                return out[i].events;
    }
    return 0;
}

static void settle(ul_fdmon *mon) {
    ul_event out[16];
    int turns = 0;
    while (is_due(mon, 0) && turns++ < 5)
        CHECK(ul_fdmon_turn(mon, 0, out, 16) == 0);
    CHECK(turns <= 3);
    CHECK(!is_due(mon, 10));
}

static void poll_has_no_descriptor_for_a_host(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    CHECK(ul_fdmon_fileno(mon) == -EOPNOTSUPP);
    close_monitor(mon);
}

static void the_descriptor_stays_the_same_and_is_quiet_when_idle(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    int fd = ul_fdmon_fileno(mon);
    CHECK(fd >= 0 && ul_fdmon_fileno(mon) == fd);
    CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    settle(mon);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    settle(mon);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE) == 0);
    CHECK(hosted_events_of(mon, pair.ours) == UL_WRITE);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    settle(mon);
    CHECK(ul_fdmon_fileno(mon) == fd);
    close_monitor(mon);
    close_pair(pair);
}

static void received_data_wakes_the_host_and_so_does_more_than_there_are_buffers_for(enum ul_kind kind) {
    enum { BYTES = 600000, PIECE = 20000 };
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[16];
    CHECK(ul_fdmon_fileno(mon) >= 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_RECV) == 0);
    settle(mon);
    static const char bytes[PIECE];
    for (int fed = 0, got = 0; got < BYTES;) {
        for (ssize_t n = 1; n > 0 && fed < BYTES; fed += n > 0 ? (int)n : 0)
            n = write(pair.peer, bytes, PIECE);
        if (!CHECK(is_due(mon, 2000)))
            break;
        int n = ul_fdmon_turn(mon, 0, out, 16);
        for (int i = 0; i < n; i++)
            if (CHECK(out[i].events == UL_DATA && out[i].result > 0))
                got += out[i].result;
    }
    settle(mon);
    close_monitor(mon);
    close_pair(pair);
}

static void an_event_before_and_after_the_descriptor_was_asked_for_wakes_the_host(enum ul_kind kind) {
    for (int ready_first = 0; ready_first <= 1; ready_first++) {
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        ul_event out[4];
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        if (ready_first)
            put(pair.peer);
        CHECK(ul_fdmon_fileno(mon) >= 0);
        if (!ready_first) {
            settle(mon);
            put(pair.peer);
        }
        CHECK(hosted_events_of(mon, pair.ours) == UL_READ);
        close_monitor(mon);
        close_pair(pair);
    }
}

static void a_host_is_woken_for_every_byte(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    for (int i = 0; i < 50; i++)
        put(pair.peer);
    for (int i = 0; i < 50; i++) {
        CHECK(hosted_events_of(mon, pair.ours) == UL_READ);
        take(pair.ours);
    }
    settle(mon);
    for (int i = 0; i < 50; i++) {
        put(pair.peer);
        CHECK(hosted_events_of(mon, pair.ours) == UL_READ);
        take(pair.ours);
    }
    settle(mon);
    close_monitor(mon);
    close_pair(pair);
}

static void what_had_no_room_keeps_the_descriptor_readable(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pairs[5];
    int reports[1024] = {0};
    ul_event out[1];
    for (int i = 0; i < 5; i++) {
        pairs[i] = open_pair();
        put(pairs[i].peer);
        CHECK(ul_fdmon_fileno(mon) >= 0 && ul_fdmon_update(mon, pairs[i].ours, UL_READ) == 0);
    }
    for (int turns = 0; turns < 20 && is_due(mon, 100); turns++) {
        if (ul_fdmon_turn(mon, 0, out, 1) == 1) {
            reports[out[0].fd]++;
            empty(out[0].fd);
        }
    }
    for (int i = 0; i < 5; i++) /* once; twice when it was collected again before it was read */
        CHECK(reports[pairs[i].ours] >= 1 && reports[pairs[i].ours] <= 2);
    CHECK(!is_due(mon, 10));
    close_monitor(mon);
    for (int i = 0; i < 5; i++)
        close_pair(pairs[i]);
}

static void events_met_while_a_watch_was_removed_wake_the_host(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair removed = open_pair(), kept = open_pair();
    CHECK(ul_fdmon_update(mon, removed.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, kept.ours, UL_READ) == 0);
    CHECK(ul_fdmon_fileno(mon) >= 0);
    settle(mon);
    put(kept.peer);
    CHECK(ul_fdmon_update(mon, removed.ours, 0) == 0);
    CHECK(hosted_events_of(mon, kept.ours) == UL_READ);
    close_monitor(mon);
    close_pair(removed);
    close_pair(kept);
}

static void *watch_it(void *argument) {
    ul_fdmon *mon = ((void **)argument)[0];
    CHECK(ul_fdmon_update(mon, *(int *)((void **)argument)[1], UL_READ) == 0);
    return NULL;
}

static void *take_turns(void *mon) {
    ul_event out[4];
    for (int i = 0; i < 3; i++)
        CHECK(hosted_turn(mon, out, 4, 5) >= 0);
    return NULL;
}

static void in_thread(void *(*run)(void *), void *argument) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run, argument) == 0);
    pthread_join(thread, NULL);
}

static void changes_by_and_moves_to_other_threads_keep_the_host_awake(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    void *argument[] = {mon, &pair.ours};
    int fd = ul_fdmon_fileno(mon);
    settle(mon);
    in_thread(watch_it, argument);
    settle(mon);
    put(pair.peer);
    CHECK(hosted_events_of(mon, pair.ours) == UL_READ);
    in_thread(take_turns, mon); /* the monitor moves there, and the thread ends */
    CHECK(ul_fdmon_fileno(mon) == fd);
    CHECK(hosted_events_of(mon, pair.ours) == UL_READ);
    take(pair.ours);
    settle(mon);
    put(pair.peer);
    CHECK(hosted_events_of(mon, pair.ours) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void a_ring_handed_on_does_not_signal_its_former_host(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_setup_info info;
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    int former = dup_cloexec(ul_fdmon_fileno(mon));
    settle(mon);
    ul_ring *spare = close_and_keep_ring(mon);
    CHECK(spare != NULL);
    empty(former);
    CHECK(ul_fdmon_new(kind, spare, &mon, &info) == 0);
    put(pair.peer);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    struct pollfd outer = {.fd = former, .events = POLLIN};
    CHECK(poll(&outer, 1, 5) == 0);
    CHECK(ul_fdmon_fileno(mon) >= 0);
    CHECK(hosted_events_of(mon, pair.ours) == UL_READ);
    CHECK(poll(&outer, 1, 0) == 0);
    close_monitor(mon);
    close(former);
    close_pair(pair);
}

TESTS(TEST(received_data_wakes_the_host_and_so_does_more_than_there_are_buffers_for, ON_IO_URING),
      TEST(poll_has_no_descriptor_for_a_host, ON_POLL),
      TEST(the_descriptor_stays_the_same_and_is_quiet_when_idle, ON_IO_URING | ON_EPOLL),
      TEST(an_event_before_and_after_the_descriptor_was_asked_for_wakes_the_host, ON_IO_URING | ON_EPOLL),
      TEST(a_host_is_woken_for_every_byte, ON_IO_URING | ON_EPOLL),
      TEST(what_had_no_room_keeps_the_descriptor_readable, ON_IO_URING | ON_EPOLL),
      TEST(events_met_while_a_watch_was_removed_wake_the_host, ON_IO_URING | ON_EPOLL),
      TEST(changes_by_and_moves_to_other_threads_keep_the_host_awake, ON_IO_URING | ON_EPOLL),
      TEST(a_ring_handed_on_does_not_signal_its_former_host, ON_IO_URING))
