/*
 * Removing a watch: afterwards the kernel holds the file no more.
 *
 * Why it exists: a poll that io_uring still has keeps the open file alive. A peer would wait for its end of file, a listening
 * socket would go on accepting, and nobody would know why. Promise: each test looks from the peer's side.
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <pthread.h>
#include <sys/un.h>

#include "support.h"

static ul_fdmon *armed_monitor(enum ul_kind kind, int fd, uint32_t events) {
    ul_event out[4];
    ul_fdmon *mon = open_monitor(kind);
    CHECK(ul_fdmon_update(mon, fd, events) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    return mon;
}

static void the_peer_sees_end_of_file_after_removal_and_close(enum ul_kind kind) {
    struct pair pair = open_pair();
    ul_fdmon *mon = armed_monitor(kind, pair.ours, UL_READ);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 0));
    close_monitor(mon);
    close(pair.peer);
}

static void the_peer_sees_end_of_file_after_a_change_then_removal_and_close(enum ul_kind kind) {
    struct pair pair = open_pair();
    fill(pair.ours);
    ul_fdmon *mon = armed_monitor(kind, pair.ours, UL_READ);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE) == 0); /* not submitted yet */
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close(pair.ours);
    empty(pair.peer);
    CHECK(sees_end_of_file(pair.peer, 0));
    CHECK(is_quiet(mon, 1 * MS));
    close_monitor(mon);
    close(pair.peer);
}

static void a_listening_socket_refuses_after_removal_and_close(enum ul_kind kind) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(listener, (struct sockaddr *)&address, size) == 0 && listen(listener, 8) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &size) == 0);
    ul_fdmon *mon = armed_monitor(kind, listener, UL_READ);
    int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connect(client, (struct sockaddr *)&address, size) == 0);
    CHECK(events_of(mon, listener, SOON) == UL_READ);
    CHECK(events_of(mon, listener, SOON) == UL_READ);
    int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(ul_fdmon_update(mon, listener, 0) == 0);
    close(listener);
    int late = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connect(late, (struct sockaddr *)&address, size) < 0 && errno == ECONNREFUSED);
    close_monitor(mon);
    close(accepted);
    close(client);
    close(late);
}

static void a_watch_the_kernel_never_had_is_removed_without_entering_it(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    uint64_t enters = statistics_of(mon).enters;
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    CHECK(statistics_of(mon).enters == enters);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 0));
    close_monitor(mon);
    close(pair.peer);
}

static void removal_of_one_watch_loses_no_event_of_another(enum ul_kind kind) {
    struct pair removed = open_pair(), kept = open_pair();
    ul_fdmon *mon = armed_monitor(kind, removed.ours, UL_READ);
    ul_event out[4];
    CHECK(ul_fdmon_update(mon, kept.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    put(removed.peer);
    put(kept.peer);
    CHECK(ul_fdmon_update(mon, removed.ours, 0) == 0); /* the reaping collects the other's event on the way */
    CHECK(ul_fdmon_need_wait(mon));
    CHECK(next_events(mon, out, 4, SOON) == 1 && out[0].fd == kept.ours);
    take(kept.ours);
    CHECK(is_quiet(mon, 1 * MS));
    close_monitor(mon);
    close_pair(removed);
    close_pair(kept);
}

static void a_thousand_armed_watches_are_removed_one_by_one(enum ul_kind kind) {
    enum { MANY = 1000 };
    ul_fdmon *mon = open_monitor(kind);
    ul_event out[4];
    struct pair pair = open_pair();
    int fds[MANY];
    for (int i = 0; i < MANY; i++)
        CHECK(ul_fdmon_update(mon, fds[i] = dup_cloexec(pair.ours), UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    for (int i = 0; i < MANY; i++) {
        CHECK(ul_fdmon_update(mon, fds[i], 0) == 0);
        close(fds[i]);
    }
    CHECK(mon->requests_in_flight == 0);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 0));
    close_monitor(mon);
    close(pair.peer);
}

static void closing_the_monitor_lets_go_of_every_file(enum ul_kind kind) {
    struct pair pairs[300];
    ul_event out[4];
    ul_fdmon *mon = open_monitor(kind);
    for (int i = 0; i < 300; i++) {
        pairs[i] = open_pair();
        CHECK(ul_fdmon_update(mon, pairs[i].ours, UL_READ) == 0);
        if (i == 299)
            break; /* the last one stays pending */
        if (i % 100 == 99)
            CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    }
    put(pairs[3].peer); /* fired, not collected */
    ul_ring *spare = close_and_keep_ring(mon);
    CHECK((spare != NULL) == (kind == UL_IO_URING));
    for (int i = 0; i < 300; i++) {
        close(pairs[i].ours);
        struct pollfd hung_up = {.fd = pairs[i].peer};
        CHECK(poll(&hung_up, 1, 0) == 1 && (hung_up.revents & POLLHUP));
        close(pairs[i].peer);
    }
    ul_ring_free(spare);
}

static void *close_it(void *mon) {
    CHECK(close_and_keep_ring(mon) == NULL); /* a ring is no use to a thread that does not own it */
    return NULL;
}

static void closing_the_monitor_from_another_thread_lets_go_of_every_file(enum ul_kind kind) {
    struct pair pair = open_pair();
    ul_fdmon *mon = armed_monitor(kind, pair.ours, UL_READ);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, close_it, mon) == 0);
    pthread_join(thread, NULL);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 1000));
    close(pair.peer);
}

static void *remove_it(void *argument) {
    ul_fdmon *mon = ((void **)argument)[0];
    CHECK(ul_fdmon_update(mon, *(int *)((void **)argument)[1], 0) == 0);
    return NULL;
}

static void removal_from_another_thread_lets_go_of_the_file_and_keeps_the_other_watches(enum ul_kind kind) {
    struct pair removed = open_pair(), kept = open_pair();
    ul_event out[4];
    ul_fdmon *mon = armed_monitor(kind, removed.ours, UL_READ);
    CHECK(ul_fdmon_update(mon, kept.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    pthread_t thread;
    void *argument[] = {mon, &removed.ours};
    CHECK(pthread_create(&thread, NULL, remove_it, argument) == 0);
    pthread_join(thread, NULL);
    close(removed.ours);
    CHECK(sees_end_of_file(removed.peer, 1000));
    put(kept.peer);
    CHECK(events_of(mon, kept.ours, SOON) == UL_READ);
    CHECK(statistics_of(mon).watches == 1 && statistics_of(mon).downgrades == 0);
    close_monitor(mon);
    close(removed.peer);
    close_pair(kept);
}

TESTS(TEST(the_peer_sees_end_of_file_after_removal_and_close, ON_ALL),
      TEST(the_peer_sees_end_of_file_after_a_change_then_removal_and_close, ON_ALL),
      TEST(a_listening_socket_refuses_after_removal_and_close, ON_ALL),
      TEST(a_watch_the_kernel_never_had_is_removed_without_entering_it, ON_ALL),
      TEST(removal_of_one_watch_loses_no_event_of_another, ON_ALL),
      TEST(a_thousand_armed_watches_are_removed_one_by_one, ON_ALL), TEST(closing_the_monitor_lets_go_of_every_file, ON_ALL),
      TEST(closing_the_monitor_from_another_thread_lets_go_of_every_file, ON_ALL),
      TEST(removal_from_another_thread_lets_go_of_the_file_and_keeps_the_other_watches, ON_ALL))
