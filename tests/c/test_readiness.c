/*
 * Readiness: what a turn reports, and when it reports nothing.
 *
 * Why it exists: an application must not be able to tell the three monitors apart. Promise: every test here runs on all three
 * unless it names a reason.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

#include "support.h"

/* ---- levels ---- */

static void a_reader_is_reported_until_it_has_read_everything(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 2 * MS));
    for (int i = 0; i < 3; i++)
        put(pair.peer);
    for (int i = 0; i < 3; i++) {
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
        take(pair.ours);
    }
    CHECK(is_quiet(mon, 5 * MS));
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void a_writer_is_reported_while_there_is_room(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
    CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
    fill(pair.ours);
    CHECK(is_quiet(mon, 5 * MS));
    empty(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
    close_monitor(mon);
    close_pair(pair);
}

static void both_directions_come_as_one_event(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    put(pair.peer);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE) == 0);
    ul_event out[4];
    CHECK(next_events(mon, out, 4, SOON) == 1);
    CHECK(out[0].fd == pair.ours && out[0].events == (UL_READ | UL_WRITE));
    close_monitor(mon);
    close_pair(pair);
}

static void a_hang_up_wakes_a_reader_and_a_writer_alike(enum ul_kind kind) {
    for (uint32_t events = 1; events <= 3; events++) {
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        fill(pair.ours);
        CHECK(ul_fdmon_update(mon, pair.ours, events) == 0);
        CHECK(is_quiet(mon, 1 * MS));
        close(pair.peer);
        CHECK(events_of(mon, pair.ours, SOON) == events);
        close_monitor(mon);
        close(pair.ours);
    }
}

static void a_pipe_without_its_other_end_is_reported(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    int fds[2];
    CHECK(pipe2(fds, O_CLOEXEC | O_NONBLOCK) == 0);
    fill(fds[1]);
    CHECK(ul_fdmon_update(mon, fds[1], UL_WRITE) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    close(fds[0]);
    CHECK(events_of(mon, fds[1], SOON) == UL_WRITE);
    CHECK(ul_fdmon_update(mon, fds[1], 0) == 0);
    close(fds[1]);

    CHECK(pipe2(fds, O_CLOEXEC | O_NONBLOCK) == 0);
    CHECK(ul_fdmon_update(mon, fds[0], UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    close(fds[1]);
    CHECK(events_of(mon, fds[0], SOON) == UL_READ);
    close_monitor(mon);
    close(fds[0]);
}

static void nothing_is_reported_that_nobody_asked_for(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    put(pair.peer);
    fill(pair.ours);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == 0);
    CHECK(is_quiet(mon, 10 * MS));
    close_monitor(mon);
    close_pair(pair);
}

/* A peer that says "no more requests" and reads slowly: POLLRDHUP, which io_uring polls for unasked, is set all the time. */
static void a_half_closed_peer_does_not_make_a_writer_spin(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    fill(pair.ours);
    CHECK(shutdown(pair.peer, SHUT_WR) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == 0);
    CHECK(is_quiet(mon, 20 * MS));
    for (int i = 0; i < 3; i++) {
        empty(pair.peer);
        CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
        CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
        fill(pair.ours);
        CHECK(is_quiet(mon, 5 * MS));
    }
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == 0);
    CHECK(is_quiet(mon, 5 * MS));
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close(pair.ours);
    empty(pair.peer);
    CHECK(sees_end_of_file(pair.peer, 100));
    close_monitor(mon);
    close(pair.peer);
}

static void a_half_closed_peer_that_goes_away_wakes_the_writer(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    fill(pair.ours);
    CHECK(shutdown(pair.peer, SHUT_WR) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == 0);
    CHECK(is_quiet(mon, 2 * MS));
    close(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
    close_monitor(mon);
    close(pair.ours);
}

/* ---- changes ---- */

static void a_change_of_events_replaces_the_old_ones(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    take(pair.ours);
    CHECK(is_quiet(mon, 5 * MS));
    CHECK(statistics_of(mon).watches == 1);
    close_monitor(mon);
    close_pair(pair);
}

static void a_watch_removed_after_it_was_collected_is_not_reported(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair a = open_pair(), b = open_pair();
    put(a.peer);
    put(b.peer);
    CHECK(ul_fdmon_update(mon, a.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, b.ours, UL_READ) == 0);
    ul_event out[4];
    CHECK(next_events(mon, out, 1, SOON) == 1);
    int other = out[0].fd == a.ours ? b.ours : a.ours;
    CHECK(ul_fdmon_update(mon, other, 0) == 0);
    CHECK(ul_fdmon_dispatch(mon, out + 1, 3) == 0);
    for (int i = 0; i < 3; i++) {
        int n = next_events(mon, out + 1, 3, SOON);
        CHECK(n == 1 && out[1].fd == out[0].fd);
    }
    close_monitor(mon);
    close_pair(a);
    close_pair(b);
}

static void a_watch_changed_after_it_was_collected_reports_its_new_events_only(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pairs[2] = {open_pair(), open_pair()};
    ul_event out[4];
    for (int i = 0; i < 2; i++) {
        put(pairs[i].peer);
        CHECK(ul_fdmon_update(mon, pairs[i].ours, UL_READ) == 0);
    }
    CHECK(next_events(mon, out, 1, SOON) == 1);
    int other = out[0].fd == pairs[0].ours ? pairs[1].ours : pairs[0].ours;
    CHECK(ul_fdmon_update(mon, other, UL_WRITE) == 0);
    CHECK(ul_fdmon_dispatch(mon, out, 4) == 0);
    CHECK(events_of(mon, other, SOON) == UL_WRITE);
    close_monitor(mon);
    close_pair(pairs[0]);
    close_pair(pairs[1]);
}

static void a_number_used_again_belongs_to_the_new_file_only(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    ul_event out[4];
    for (int i = 0; i < 300; i++) {
        struct pair old = open_pair();
        CHECK(ul_fdmon_update(mon, old.ours, UL_READ) == 0);
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        put(old.peer); /* the poll has fired, and nobody has collected it */
        CHECK(ul_fdmon_update(mon, old.ours, 0) == 0);
        close_pair(old);
        struct pair new = open_pair();
        CHECK(new.ours == old.ours);
        CHECK(ul_fdmon_update(mon, new.ours, UL_READ) == 0);
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        put(new.peer);
        CHECK(events_of(mon, new.ours, SOON) == UL_READ);
        CHECK(ul_fdmon_update(mon, new.ours, 0) == 0);
        close_pair(new);
    }
    close_monitor(mon);
}

static void two_monitors_watch_the_same_descriptor_independently(enum ul_kind kind) {
    ul_fdmon *one = open_monitor(kind), *two = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(one, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(two, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(one, 1 * MS) && is_quiet(two, 1 * MS));
    put(pair.peer);
    CHECK(events_of(one, pair.ours, SOON) == UL_READ);
    CHECK(events_of(two, pair.ours, SOON) == UL_READ);
    CHECK(ul_fdmon_update(one, pair.ours, 0) == 0);
    close_monitor(one);
    CHECK(events_of(two, pair.ours, SOON) == UL_READ);
    close_monitor(two);
    close_pair(pair);
}

/* ---- many ---- */

enum { MANY = 1000 };

static void a_thousand_ready_watches_are_all_reported_each_once_a_turn(enum ul_kind kind) {
    static ul_event out[2 * MANY];
    ul_fdmon *mon = open_monitor(kind);
    int ready = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK), fds[MANY];
    for (int i = 0; i < MANY; i++) {
        fds[i] = dup_cloexec(ready);
        CHECK(ul_fdmon_update(mon, fds[i], UL_READ) == 0);
    }
    for (int round = 0; round < 3; round++) {
        bool seen[4 * MANY] = {false};
        int n = next_events(mon, out, 2 * MANY, SOON);
        CHECK(n == MANY);
        for (int i = 0; i < n; i++) {
            CHECK(out[i].fd < 4 * MANY && !seen[out[i].fd] && out[i].events == UL_READ);
            seen[out[i].fd] = true;
        }
    }
    ul_statistics statistics = statistics_of(mon);
    CHECK(statistics.watches == MANY && statistics.turns >= 3);
    if (kind == UL_IO_URING)
        CHECK(statistics.sqes >= 3 * MANY && statistics.cqes >= 3 * MANY && statistics.enters < 40);
    for (int i = 0; i < MANY; i++) {
        CHECK(ul_fdmon_update(mon, fds[i], 0) == 0);
        close(fds[i]);
    }
    CHECK(statistics_of(mon).watches == 0);
    CHECK(is_quiet(mon, 1 * MS));
    close_monitor(mon);
    close(ready);
}

static void more_armed_watches_than_the_completion_queue_holds_fire_at_once_and_none_is_lost(enum ul_kind kind) {
    enum { TOO_MANY = 5000 };
    static ul_event out[2 * TOO_MANY];
    static int reports[2 * TOO_MANY];
    struct rlimit old, raised;
    getrlimit(RLIMIT_NOFILE, &old);
    raised = (struct rlimit){.rlim_cur = TOO_MANY + 100, .rlim_max = old.rlim_max};
    if (old.rlim_cur < raised.rlim_cur && setrlimit(RLIMIT_NOFILE, &raised) < 0) {
        printf("RLIMIT_NOFILE is %lu: too low for %d descriptors\n", (unsigned long)old.rlim_max, TOO_MANY);
        return;
    }
    ul_fdmon *mon = open_monitor(kind);
    int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), fds[TOO_MANY], distinct = 0;
    for (int i = 0; i < TOO_MANY; i++) {
        fds[i] = dup_cloexec(event);
        CHECK(ul_fdmon_update(mon, fds[i], UL_READ) == 0);
    }
    memset(reports, 0, sizeof reports);
    CHECK(ul_fdmon_turn(mon, 0, out, 2 * TOO_MANY) == 0);
    CHECK(write(event, &(uint64_t){1}, 8) == 8);
    for (int64_t deadline = now_ns() + 5 * SOON; distinct < TOO_MANY && now_ns() < deadline;) {
        int n = next_events(mon, out, 2 * TOO_MANY, SOON);
        for (int i = 0; i < n; i++)
            distinct += reports[out[i].fd]++ == 0;
    }
    CHECK(distinct == TOO_MANY);
    for (int i = 0; i < TOO_MANY; i++)
        close(fds[i]);
    close_monitor(mon);
    close(event);
    setrlimit(RLIMIT_NOFILE, &old);
}

static void what_has_no_room_is_handed_over_later(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    int ready = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK), fds[10], reports[1024] = {0}, total = 0;
    for (int i = 0; i < 10; i++)
        CHECK(ul_fdmon_update(mon, fds[i] = dup_cloexec(ready), UL_READ) == 0);
    ul_event out[4];
    CHECK(ul_fdmon_turn(mon, 0, out, 0) == 0);
    int n = next_events(mon, out, 3, SOON);
    CHECK(n == 3);
    uint64_t enters = statistics_of(mon).enters;
    for (; n > 0; n = ul_fdmon_dispatch(mon, out, 4))
        for (int i = 0; i < n; i++, total++)
            reports[out[i].fd]++;
    CHECK(total == 10);
    CHECK(statistics_of(mon).enters == enters);
    for (int i = 0; i < 10; i++)
        CHECK(reports[fds[i]] == 1);
    CHECK(ul_fdmon_dispatch(mon, out, 4) == 0);

    memset(reports, 0, sizeof reports); /* without dispatch: turns alone serve everybody in turn */
    for (int i = 0; i < 10; i++) {
        n = next_events(mon, out, 3, SOON);
        CHECK(n == 3);
        for (int k = 0; k < n; k++)
            reports[out[k].fd]++;
    }
    for (int i = 0; i < 10; i++) {
        CHECK(reports[fds[i]] >= 2);
        close(fds[i]);
    }
    close_monitor(mon);
    close(ready);
}

static void a_descriptor_in_the_thousands_works_like_a_small_one(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    int big = fcntl(pair.ours, F_DUPFD_CLOEXEC, (int)(limit.rlim_cur > 4096 ? 4096 : limit.rlim_cur) - 1);
    CHECK(big >= 255);
    CHECK(ul_fdmon_update(mon, big, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    put(pair.peer);
    CHECK(events_of(mon, big, SOON) == UL_READ);
    CHECK(ul_fdmon_update(mon, big, 0) == 0);
    close(big);
    close_monitor(mon);
    close_pair(pair);
}

/* ---- refusals ---- */

static void what_epoll_refuses_is_refused_with_its_errno(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    char path[] = "/tmp/uringloop-test-XXXXXX";
    int file = mkostemp(path, O_CLOEXEC), directory = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), event = eventfd(0, EFD_CLOEXEC);
    unlink(path);
    CHECK(ul_fdmon_update(mon, file, UL_READ) == -EPERM);
    CHECK(ul_fdmon_update(mon, directory, UL_READ) == -EPERM);
    CHECK(ul_fdmon_update(mon, null, UL_READ) == -EPERM);
    CHECK(ul_fdmon_update(mon, event, UL_READ) == 0);
    close(file);
    close(directory);
    close(null);
    CHECK(ul_fdmon_update(mon, file, UL_READ) == -EBADF);
    CHECK(ul_fdmon_update(mon, -1, UL_READ) == -EBADF);
    CHECK(ul_fdmon_update(mon, -2147483647 - 1, UL_READ) == -EBADF);
    static const uint32_t nonsense[] = {UL_ONCE, UL_RECV,          UL_RECV | UL_WRITE, UL_READ | UL_RECV | UL_ONCE,
                                        UL_DATA, UL_SENT | UL_READ};
    for (size_t i = 0; i < sizeof nonsense / sizeof nonsense[0]; i++)
        CHECK(ul_fdmon_update(mon, event, nonsense[i]) == -EINVAL);
    CHECK(ul_fdmon_update(mon, event, 0x101) == -EINVAL);
    CHECK(statistics_of(mon).watches == 1);
    CHECK(is_quiet(mon, 1 * MS));
    close_monitor(mon);
    close(event);
}

static void a_failed_change_leaves_the_watch_as_it_was(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair(), other = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, other.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(ul_fdmon_update(mon, pair.ours, 8) == -EINVAL);
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close(other.ours);
    CHECK(ul_fdmon_update(mon, other.ours, UL_WRITE) == -EBADF);
    CHECK(statistics_of(mon).watches == 2);
    CHECK(mon->watches[other.ours].events == UL_READ);
    close_monitor(mon);
    close(other.peer);
    close_pair(pair);
}

static void removing_never_fails(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    close(pair.ours);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    CHECK(statistics_of(mon).watches == 0);
    CHECK(sees_end_of_file(pair.peer, 100));
    close_monitor(mon);
    close(pair.peer);
}

static void a_number_that_was_never_open_costs_no_memory(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    CHECK(ul_fdmon_update(mon, 1000000, UL_READ) == -EBADF);
    CHECK(mon->watches_cap < 1000000);
    CHECK(ul_fdmon_update(mon, 1000000, 0) == 0);
    CHECK(mon->watches_cap < 1000000);
    close_monitor(mon);
}

static void a_closed_monitor_answers_and_does_nothing(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    ul_ring *spare;
    put(pair.peer);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 0) == 0); /* collected, and not handed over */
    CHECK(ul_fdmon_close(mon, &spare) == 0);
    ul_ring_free(spare);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_WRITE) == -EBADF);
    CHECK(ul_fdmon_turn(mon, -1, out, 4) == -EBADF);
    CHECK(ul_fdmon_dispatch(mon, out, 4) <= 0);
    CHECK(ul_fdmon_fileno(mon) == -EBADF);
    CHECK(!ul_fdmon_need_wait(mon));
    CHECK(statistics_of(mon).turns == 1 && statistics_of(mon).watches == 0);
    CHECK(info_of(mon).name != NULL);
    CHECK(ul_fdmon_close(mon, &spare) == 0 && spare == NULL);
    ul_fdmon_after_fork_in_child(mon);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == -EBADF);
    ul_fdmon_free(mon);
    ul_fdmon_free(NULL);
    ul_ring_free(NULL);
    ul_ring_free(NULL);
    close_pair(pair);
}

static void a_closed_descriptor_is_reported_at_most_once_and_does_not_spin(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair armed = open_pair(), pending = open_pair();
    ul_event out[8];
    CHECK(ul_fdmon_update(mon, armed.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(ul_fdmon_update(mon, pending.ours, UL_READ) == 0);
    close_pair(armed);
    close_pair(pending);
    int reports[2] = {0, 0};
    for (int n; (n = next_events(mon, out, 8, 10 * MS)) > 0;) {
        for (int i = 0; i < n; i++)
            reports[out[i].fd == armed.ours]++;
        if (!CHECK(reports[0] + reports[1] < 4))
            break;
    }
    /* epoll forgets a closed descriptor; poll and a new POLL_ADD answer. An armed POLL_ADD reports the hang-up first. */
    CHECK(reports[0] == (kind != UL_EPOLL));
    CHECK(kind == UL_EPOLL ? reports[1] == 0 : reports[1] >= 1);
    CHECK(is_quiet(mon, 5 * MS));
    CHECK(statistics_of(mon).watches == 2);

    struct pair fresh = open_pair(), another = open_pair();
    CHECK(fresh.ours == armed.ours);
    CHECK(ul_fdmon_update(mon, fresh.ours, 0) == 0);
    CHECK(ul_fdmon_update(mon, fresh.ours, UL_READ) == 0);
    put(fresh.peer);
    CHECK(events_of(mon, fresh.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(fresh);
    close_pair(another);
}

/* ---- time ---- */

static void a_wait_is_never_shorter_than_its_timeout(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[1];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 1) == 0);
    static const int64_t timeouts_ns[] = {1, 999, 50000, 200000, 1000001, 3 * MS};
    for (size_t i = 0; i < sizeof timeouts_ns / sizeof timeouts_ns[0]; i++)
        CHECK(waits_at_least(mon, timeouts_ns[i]));
    close_monitor(mon);
    close_pair(pair);
}

static void a_zero_timeout_does_not_wait(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[1];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    int64_t start = now_ns();
    for (int i = 0; i < 1000; i++)
        CHECK(ul_fdmon_turn(mon, 0, out, 1) == 0);
    CHECK(now_ns() - start < 500 * MS);
    CHECK(statistics_of(mon).enters < 10);
    close_monitor(mon);
    close_pair(pair);
}

/* Waits with the given timeout for a timer that fires after 10 ms. */
static void wait_beyond_a_timer(enum ul_kind kind, int64_t timeout_ns) {
    ul_fdmon *mon = open_monitor(kind);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct itimerspec in_10_ms = {.it_value = {0, 10 * MS}};
    ul_event out[1];
    CHECK(ul_fdmon_update(mon, timer, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 1) == 0);
    CHECK(timerfd_settime(timer, 0, &in_10_ms, NULL) == 0);
    int n = 0, turns = 0; /* a ring that another monitor closed may interrupt a wait of this thread once */
    while (n == 0 && turns++ < 5)
        n = ul_fdmon_turn(mon, timeout_ns, out, 1);
    CHECK(n == 1 && out[0].fd == timer && out[0].events == UL_READ);
    close_monitor(mon);
    close(timer);
}

static void a_negative_timeout_waits_without_limit(enum ul_kind kind) {
    wait_beyond_a_timer(kind, -1);
    wait_beyond_a_timer(kind, INT64_MIN);
}

static void the_longest_timeout_is_long(enum ul_kind kind) {
    wait_beyond_a_timer(kind, (int64_t)1 << 62);
    wait_beyond_a_timer(kind, INT64_MAX);
}

static volatile sig_atomic_t signals;
static void count_signal(int number) {
    (void)number;
    signals++;
}

/* On io_uring the -EINTR of a wait that also submitted hides behind the number of entries: the turn must end all the same. */
static void a_signal_ends_every_wait(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[1];
    for (int flags = 0; flags <= SA_RESTART; flags += SA_RESTART) {
        struct sigaction action = {.sa_handler = count_signal, .sa_flags = flags}, before;
        sigaction(SIGVTALRM, &action, &before);
        sigaction(SIGUSR1, &action, NULL);
        for (int submits = 0; submits <= 1; submits++) {
            signals = 0;
            CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
            if (!submits)
                CHECK(ul_fdmon_turn(mon, 0, out, 1) == 0);
            timer_t timer;
            struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
            struct itimerspec every_5_ms = {.it_value = {0, 5 * MS}, .it_interval = {0, 5 * MS}};
            CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
            CHECK(timer_settime(timer, 0, &every_5_ms, NULL) == 0);
            for (int turns = 0; !signals && turns < 5; turns++)
                CHECK(ul_fdmon_turn(mon, 20 * SOON, out, 1) == 0);
            CHECK(signals > 0 && signals < 100);
            timer_delete(timer);
            CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
        }
    }
    signal(SIGUSR1, SIG_IGN);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

/* ---- what can be known without the kernel ---- */

static void need_wait_tells_whether_a_turn_has_anything_to_do(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair a = open_pair(), b = open_pair();
    ul_event out[4];
    CHECK(!ul_fdmon_need_wait(mon));
    CHECK(ul_fdmon_update(mon, a.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, b.ours, UL_READ) == 0);
    CHECK(ul_fdmon_need_wait(mon));
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    CHECK(ul_fdmon_need_wait(mon) == (kind != UL_IO_URING)); /* only the kernel knows, on the other two */
    put(a.peer);
    put(b.peer);
    CHECK(ul_fdmon_need_wait(mon));
    CHECK(next_events(mon, out, 1, SOON) == 1);
    CHECK(ul_fdmon_need_wait(mon));
    CHECK(ul_fdmon_update(mon, a.ours, 0) == 0);
    CHECK(ul_fdmon_update(mon, b.ours, 0) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    CHECK(!ul_fdmon_need_wait(mon));
    close_monitor(mon);
    close_pair(a);
    close_pair(b);
}

/* Strict seccomp allows read, write and exit: the kernel itself proves that nothing else was called. */
static void need_wait_and_dispatch_make_no_system_call(enum ul_kind kind) {
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        ul_event out[4];
        bool right = ul_fdmon_update(mon, pair.ours, UL_READ) == 0 && ul_fdmon_turn(mon, 0, out, 4) == 0;
        put(pair.peer);
        if (prctl(PR_SET_SECCOMP, 1) == 0) {
            for (int i = 0; i < 100; i++)
                right = right && ul_fdmon_need_wait(mon) && ul_fdmon_dispatch(mon, out, 4) == 0;
            syscall(SYS_exit, right ? 0 : 1);
        }
        _exit(2);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void statistics_count_what_happened(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pairs[50];
    ul_event out[64];
    ul_statistics before = statistics_of(mon);
    CHECK(before.turns == 0 && before.watches == 0 && before.downgrades == 0 && before.overflows == 0);
    for (int i = 0; i < 50; i++) {
        pairs[i] = open_pair();
        CHECK(ul_fdmon_update(mon, pairs[i].ours, UL_READ) == 0);
    }
    put(pairs[7].peer);
    CHECK(next_events(mon, out, 64, SOON) == 1);
    ul_statistics after = statistics_of(mon);
    CHECK(after.turns == 1 && after.watches == 50);
    bool ring = kind == UL_IO_URING;
    CHECK(after.enters - before.enters == (ring ? 1 : 0)); /* fifty registrations and one wait: one enter */
    CHECK(after.sqes - before.sqes == (ring ? 50 : 0));
    CHECK(after.cqes - before.cqes == (ring ? 1 : 0));
    take(pairs[7].ours);
    CHECK(ul_fdmon_update(mon, pairs[7].ours, 0) == 0); /* just fired, so the kernel does not have it */
    CHECK(statistics_of(mon).enters == after.enters);
    CHECK(statistics_of(mon).watches == 49);
    CHECK(ul_fdmon_update(mon, pairs[8].ours, 0) == 0); /* armed */
    CHECK(statistics_of(mon).enters - after.enters == (ring ? 1 : 0));
    close_monitor(mon);
    for (int i = 0; i < 50; i++)
        close_pair(pairs[i]);
}

static void set_up_information_describes_the_monitor(enum ul_kind kind) {
    static const char *const names[] = {NULL, "io_uring", "epoll", "poll"};
    ul_fdmon *mon;
    ul_setup_info info;
    CHECK(ul_fdmon_new(kind, NULL, &mon, &info) == 0);
    CHECK(strcmp(info.name, names[kind]) == 0);
    CHECK(info.refused_step == NULL && info.refused_errno == 0);
    if (kind == UL_IO_URING)
        CHECK(info.sq_entries == 256 && info.cq_entries == 4096 && info.ring_setup_flags && info.ring_features);
    else
        CHECK(info.sq_entries == 0 && info.cq_entries == 0 && !info.ring_setup_flags && !info.ring_features);
    close_monitor(mon);
}

TESTS(TEST(a_reader_is_reported_until_it_has_read_everything, ON_ALL), TEST(a_writer_is_reported_while_there_is_room, ON_ALL),
      TEST(both_directions_come_as_one_event, ON_ALL), TEST(a_hang_up_wakes_a_reader_and_a_writer_alike, ON_ALL),
      TEST(a_pipe_without_its_other_end_is_reported, ON_ALL), TEST(nothing_is_reported_that_nobody_asked_for, ON_ALL),
      TEST(a_half_closed_peer_does_not_make_a_writer_spin, ON_ALL),
      TEST(a_half_closed_peer_that_goes_away_wakes_the_writer, ON_ALL), TEST(a_change_of_events_replaces_the_old_ones, ON_ALL),
      TEST(a_watch_removed_after_it_was_collected_is_not_reported, ON_ALL),
      TEST(a_watch_changed_after_it_was_collected_reports_its_new_events_only, ON_ALL),
      TEST(a_number_used_again_belongs_to_the_new_file_only, ON_ALL),
      TEST(two_monitors_watch_the_same_descriptor_independently, ON_ALL),
      TEST(a_thousand_ready_watches_are_all_reported_each_once_a_turn, ON_ALL),
      TEST(more_armed_watches_than_the_completion_queue_holds_fire_at_once_and_none_is_lost, ON_ALL),
      TEST(what_has_no_room_is_handed_over_later, ON_ALL), TEST(a_descriptor_in_the_thousands_works_like_a_small_one, ON_ALL),
      TEST(what_epoll_refuses_is_refused_with_its_errno, ON_ALL), TEST(a_failed_change_leaves_the_watch_as_it_was, ON_ALL),
      TEST(removing_never_fails, ON_ALL), TEST(a_number_that_was_never_open_costs_no_memory, ON_ALL),
      TEST(a_closed_monitor_answers_and_does_nothing, ON_ALL),
      TEST(a_closed_descriptor_is_reported_at_most_once_and_does_not_spin, ON_ALL),
      TEST(a_wait_is_never_shorter_than_its_timeout, ON_ALL), TEST(a_zero_timeout_does_not_wait, ON_ALL),
      TEST(a_negative_timeout_waits_without_limit, ON_ALL), TEST(the_longest_timeout_is_long, ON_ALL),
      TEST(a_signal_ends_every_wait, ON_ALL), TEST(need_wait_tells_whether_a_turn_has_anything_to_do, ON_ALL),
      TEST(need_wait_and_dispatch_make_no_system_call, ON_ALL), TEST(statistics_count_what_happened, ON_ALL),
      TEST(set_up_information_describes_the_monitor, ON_ALL))
