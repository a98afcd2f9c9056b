/*
 * Fork: parent and child both go on.
 *
 * Why it exists: a forked child inherits descriptors, and with them the parent's ring and epoll instance. Promise: after
 * ul_fdmon_after_fork_in_child() the two know nothing of each other; a child that never calls it does no harm either.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "support.h"

/* Runs in the child; its checks become the exit code. */
static int child_result(void) { return checks_failed ? 1 : 0; }

static void reap(pid_t child) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void parent_and_child_both_go_on_with_the_same_watches(enum ul_kind kind) {
    static const char *const names[] = {NULL, "io_uring", "epoll", "poll"};
    ul_fdmon *mon = open_monitor(kind);
    struct pair shared = open_pair(), other = open_pair();
    ul_event out[8];
    CHECK(ul_fdmon_update(mon, shared.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 8) == 0);             /* armed */
    CHECK(ul_fdmon_update(mon, other.ours, UL_READ) == 0); /* pending */
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        CHECK(ul_fdmon_need_wait(mon));
        CHECK(is_quiet(mon, 1 * MS));
        CHECK(monitor_is(mon, names[kind]));
        put(shared.peer);
        CHECK(events_of(mon, shared.ours, SOON) == UL_READ);
        put(other.peer);
        CHECK(events_of(mon, other.ours, SOON) == UL_READ);
        take(other.ours);
        CHECK(ul_fdmon_update(mon, shared.ours, 0) == 0); /* must not take the parent's watch away */
        struct pair own = open_pair();
        CHECK(ul_fdmon_update(mon, own.ours, UL_READ) == 0);
        put(own.peer);
        CHECK(events_of(mon, own.ours, SOON) == UL_READ);
        CHECK(statistics_of(mon).watches == 2 && statistics_of(mon).downgrades == 0);
        close_monitor(mon);
        _exit(child_result());
    }
    reap(child);
    CHECK(events_of(mon, shared.ours, SOON) == UL_READ); /* the byte that the child wrote and did not read */
    take(shared.ours);
    put(other.peer);
    CHECK(events_of(mon, other.ours, SOON) == UL_READ);
    CHECK(statistics_of(mon).watches == 2);
    close_monitor(mon);
    close_pair(shared);
    close_pair(other);
}

static void a_child_of_a_child_goes_on_too(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    put(pair.peer);
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        pid_t grandchild = fork();
        if (grandchild == 0) {
            ul_fdmon_after_fork_in_child(mon);
            CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
            close_monitor(mon);
            _exit(child_result());
        }
        reap(grandchild);
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
        close_monitor(mon);
        _exit(child_result());
    }
    reap(child);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void a_child_that_only_closes_its_monitor_does_the_parent_no_harm(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        CHECK(close_and_keep_ring(mon) == NULL);
        _exit(child_result());
    }
    reap(child);
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void a_child_that_never_touches_the_monitor_does_the_parent_no_harm(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    for (int i = 0; i < 3; i++) {
        pid_t child = fork();
        if (child == 0)
            _exit(0);
        reap(child);
    }
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void the_child_has_no_mapping_of_the_parents_ring(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    CHECK(msync(mon->ring->rings_map, 4096, MS_ASYNC) == 0);
    pid_t child = fork();
    if (child == 0) {
        CHECK(msync(mon->ring->rings_map, 4096, MS_ASYNC) < 0 && errno == ENOMEM);
        CHECK(msync(mon->ring->sqes_map, 4096, MS_ASYNC) < 0 && errno == ENOMEM);
        int ring_fd = mon->ring->fd;
        ul_fdmon_after_fork_in_child(mon);
        CHECK(mon->ring == NULL);
        CHECK(fcntl(ring_fd, F_GETFD) < 0 && errno == EBADF);
        _exit(child_result());
    }
    reap(child);
    close_monitor(mon);
}

static void a_living_child_does_not_delay_the_end_of_file(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair(), until = open_pair(), ready = open_pair();
    char byte;
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        close_pair(pair);
        close(until.peer);
        put(ready.peer);
        struct pollfd wait = {.fd = until.ours, .events = POLLIN};
        CHECK(poll(&wait, 1, 10000) == 1);
        _exit(child_result());
    }
    struct pollfd wait = {.fd = ready.ours, .events = POLLIN};
    CHECK(poll(&wait, 1, 10000) == 1 && read(ready.ours, &byte, 1) == 1);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 100));
    close_monitor(mon);
    put(until.peer);
    reap(child);
    close(pair.peer);
    close_pair(until);
    close_pair(ready);
}

static void *wait_until_ready(void *mon) {
    ul_event out[4];
    CHECK(next_events(mon, out, 4, 5 * SOON) == 1);
    return NULL;
}

static void a_fork_while_another_thread_waits_gives_a_child_that_works(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    pthread_t waiter;
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(pthread_create(&waiter, NULL, wait_until_ready, mon) == 0);
    until_somebody_waits(mon);
    pid_t child = fork();
    if (child == 0) {
        struct pair own = open_pair();
        ul_fdmon_after_fork_in_child(mon);
        CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
        CHECK(ul_fdmon_update(mon, own.ours, UL_READ) == 0);
        put(own.peer);
        CHECK(events_of(mon, own.ours, SOON) == UL_READ);
        close_monitor(mon);
        _exit(child_result());
    }
    reap(child);
    put(pair.peer);
    pthread_join(waiter, NULL);
    close_monitor(mon);
    close_pair(pair);
}

static void a_hosted_child_gets_a_descriptor_of_its_own(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    int fd = ul_fdmon_fileno(mon);
    CHECK(fd >= 0 && ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        struct pollfd outer = {.fd = ul_fdmon_fileno(mon), .events = POLLIN};
        CHECK(outer.fd >= 0);
        ul_fdmon_turn(mon, 0, out, 4);
        ul_fdmon_turn(mon, 0, out, 4);
        CHECK(poll(&outer, 1, 5) == 0);
        put(pair.peer);
        CHECK(poll(&outer, 1, 1000) == 1);
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
        take(pair.ours);
        close_monitor(mon);
        _exit(child_result());
    }
    reap(child);
    CHECK(ul_fdmon_fileno(mon) == fd);
    while (ul_fdmon_turn(mon, 0, out, 4) > 0)
        ;
    struct pollfd outer = {.fd = fd, .events = POLLIN};
    CHECK(poll(&outer, 1, 0) == 0);
    put(pair.peer);
    CHECK(poll(&outer, 1, 1000) == 1);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void a_spare_ring_is_dropped_in_the_child_and_used_in_the_parent(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_setup_info info;
    ul_ring *spare = close_and_keep_ring(mon);
    CHECK(spare != NULL);
    pid_t child = fork();
    if (child == 0) {
        ul_ring_free(spare);
        CHECK(ul_fdmon_new(kind, NULL, &mon, &info) == 0);
        close_monitor(mon);
        _exit(child_result());
    }
    reap(child);
    CHECK(ul_fdmon_new(kind, spare, &mon, &info) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

TESTS(TEST(parent_and_child_both_go_on_with_the_same_watches, ON_ALL), TEST(a_child_of_a_child_goes_on_too, ON_ALL),
      TEST(a_child_that_only_closes_its_monitor_does_the_parent_no_harm, ON_ALL),
      TEST(a_child_that_never_touches_the_monitor_does_the_parent_no_harm, ON_ALL),
      TEST(the_child_has_no_mapping_of_the_parents_ring, ON_IO_URING),
      TEST(a_living_child_does_not_delay_the_end_of_file, ON_ALL),
      TEST(a_fork_while_another_thread_waits_gives_a_child_that_works, ON_ALL),
      TEST(a_hosted_child_gets_a_descriptor_of_its_own, ON_IO_URING | ON_EPOLL),
      TEST(a_spare_ring_is_dropped_in_the_child_and_used_in_the_parent, ON_IO_URING))
