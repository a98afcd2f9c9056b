/* link: -Wl,--wrap=syscall,--wrap=epoll_ctl */
/*
 * UL_ONCE: a watch that ends with its first report.
 *
 * Why it exists: sock_recv() and its like wait for a descriptor once, and pay for every call around that. Promise: one report
 * and never a second, on whatever monitor the loop is by then; afterwards the kernel holds the file no more; the next wait costs
 * one call.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/wait.h>

#include "fake_kernel.h"

int __real_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event);
int __wrap_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event);

static int epoll_ctl_calls;

int __wrap_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event) {
    epoll_ctl_calls++;
    return __real_epoll_ctl(epoll_fd, op, fd, event);
}

static int watch_once(ul_fdmon *mon, int fd, uint32_t events) { return ul_fdmon_update(mon, fd, events | UL_ONCE); }

static void a_watch_ends_with_its_first_report(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    put(pair.peer);
    for (int i = 0; i < 3; i++) { /* what was not read is reported again, when it is asked for */
        CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
        CHECK(statistics_of(mon).watches == 1);
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
        CHECK(statistics_of(mon).watches == 0);
        CHECK(is_quiet(mon, 2 * MS));
    }
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close_monitor(mon);
    close_pair(pair);
}

static void one_report_ends_both_directions(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(watch_once(mon, pair.ours, UL_READ | UL_WRITE) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
    put(pair.peer);
    CHECK(is_quiet(mon, 2 * MS));
    CHECK(watch_once(mon, pair.ours, UL_READ | UL_WRITE) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == (UL_READ | UL_WRITE));
    close_monitor(mon);
    close_pair(pair);
}

static void a_hundred_waits_on_epoll_cost_one_call_each(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    epoll_ctl_calls = 0;
    for (int i = 0; i < 100; i++) {
        CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
        put(pair.peer);
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
        take(pair.ours);
    }
    CHECK(epoll_ctl_calls == 100);
    close_monitor(mon);
    close_pair(pair);
}

static void a_hundred_waits_on_io_uring_cost_one_entry_each(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    uint64_t sqes = statistics_of(mon).sqes;
    for (int i = 0; i < 100; i++) {
        CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
        put(pair.peer);
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
        take(pair.ours);
    }
    CHECK(statistics_of(mon).sqes - sqes == 100);
    close_monitor(mon);
    close_pair(pair);
}

static void a_watch_becomes_a_lasting_one_and_back(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    put(pair.peer);
    CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0); /* reported before */
    for (int i = 0; i < 3; i++)
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(is_quiet(mon, 2 * MS));
    take(pair.ours);
    CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0); /* armed, and not reported yet */
    put(pair.peer);
    for (int i = 0; i < 3; i++)
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void what_was_collected_is_dropped_when_the_watch_is_removed_or_changed(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair removed = open_pair(), changed = open_pair();
    ul_event out[4];
    put(removed.peer);
    put(changed.peer);
    CHECK(watch_once(mon, removed.ours, UL_READ) == 0);
    CHECK(watch_once(mon, changed.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 10 * MS, out, 0) == 0);
    CHECK(mon->ready_live == 2);
    CHECK(ul_fdmon_update(mon, removed.ours, 0) == 0);
    CHECK(watch_once(mon, changed.ours, UL_WRITE) == 0);
    CHECK(next_events(mon, out, 4, SOON) == 1);
    CHECK(out[0].fd == changed.ours && out[0].events == UL_WRITE);
    CHECK(is_quiet(mon, 2 * MS) && statistics_of(mon).watches == 0);
    close_monitor(mon);
    close_pair(removed);
    close_pair(changed);
}

static void what_has_no_room_is_reported_later_and_only_once(enum ul_kind kind) {
    enum { MANY = 200 };
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    int fds[MANY], reports[4 * MANY] = {0};
    ul_event out[7];
    put(pair.peer);
    for (int i = 0; i < MANY; i++)
        CHECK(watch_once(mon, fds[i] = dup_cloexec(pair.ours), UL_READ) == 0);
    for (int n; (n = next_events(mon, out, 7, 20 * MS)) > 0;)
        for (int i = 0; i < n; i++)
            reports[out[i].fd]++;
    for (int i = 0; i < MANY; i++) {
        CHECK(reports[fds[i]] == 1);
        close(fds[i]);
    }
    CHECK(statistics_of(mon).watches == 0);
    close_monitor(mon);
    close_pair(pair);
}

/* ---- the file afterwards ---- */

static void the_peer_sees_end_of_file_when_the_reported_descriptor_is_closed(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    put(pair.peer);
    CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    take(pair.ours);
    close(pair.ours); /* without a call: there is no watch */
    CHECK(sees_end_of_file(pair.peer, 0));
    close_monitor(mon);
    close(pair.peer);
}

static void the_peer_sees_end_of_file_when_the_watch_was_removed_before_its_report(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 0));
    close_monitor(mon);
    close(pair.peer);
}

/* io_uring waits for it with a multishot poll, which does not end by itself. */
static void a_last_report_on_a_half_closed_peer_leaves_no_poll_behind(enum ul_kind kind) {
    for (int others = 0; others < 2; others++) {
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair(), other = open_pair();
        ul_event out[4];
        fill(pair.ours);
        CHECK(shutdown(pair.peer, SHUT_WR) == 0);
        CHECK(watch_once(mon, pair.ours, UL_WRITE) == 0);
        CHECK(ul_fdmon_update(mon, other.ours, UL_READ) == 0);
        CHECK(is_quiet(mon, 5 * MS));
        empty(pair.peer);
        if (others) /* a removal reaps, and collects the last report on its way */
            CHECK(ul_fdmon_update(mon, other.ours, 0) == 0);
        CHECK(next_events(mon, out, 4, SOON) == 1 && out[0].fd == pair.ours && out[0].events == UL_WRITE);
        close(pair.ours);
        CHECK(sees_end_of_file(pair.peer, 0));
        CHECK(is_quiet(mon, 2 * MS) && statistics_of(mon).downgrades == 0);
        CHECK(kind != UL_IO_URING || mon->requests_dying == 0);
        close_monitor(mon);
        close(pair.peer);
        close_pair(other);
    }
}

static void a_bad_descriptor_is_reported_once_and_then_not_watched(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
    close_pair(pair);
    uint32_t events = events_of(mon, pair.ours, 5 * MS);
    CHECK(events == (kind == UL_EPOLL ? 0 : UL_READ)); /* epoll forgets it */
    CHECK(kind == UL_EPOLL || statistics_of(mon).watches == 0);
    struct pair new = open_pair();
    CHECK(new.ours == pair.ours);
    put(new.peer);
    CHECK(is_quiet(mon, 2 * MS));
    CHECK(watch_once(mon, new.ours, UL_READ) == 0);
    CHECK(events_of(mon, new.ours, SOON) == UL_READ);
    CHECK(statistics_of(mon).watches == 0);
    close_monitor(mon);
    close_pair(new);
}

/* ---- numbers that are used again ---- */

static void a_number_used_again_after_its_only_report_is_the_new_file(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    for (int i = 0; i < 50; i++) {
        struct pair old = open_pair();
        put(old.peer);
        CHECK(watch_once(mon, old.ours, UL_READ) == 0);
        CHECK(events_of(mon, old.ours, SOON) == UL_READ);
        int twin = i % 2 ? dup_cloexec(old.ours) : -1; /* keeps the old file, and epoll's entry of it, alive */
        close(old.ours);
        struct pair new = open_pair();
        CHECK(new.ours == old.ours);
        put(new.peer);
        CHECK(ul_fdmon_turn(mon, 0, (ul_event[4]){{0}}, 4) == 0);
        CHECK(watch_once(mon, new.ours, UL_READ) == 0);
        CHECK(events_of(mon, new.ours, SOON) == UL_READ);
        take(new.ours);
        CHECK(watch_once(mon, new.ours, UL_READ) == 0);
        CHECK(ul_fdmon_turn(mon, 0, (ul_event[4]){{0}}, 4) == 0); /* though the old one is readable */
        CHECK(ul_fdmon_update(mon, new.ours, 0) == 0);
        close_pair(new);
        close(old.peer);
        if (twin >= 0)
            close(twin);
    }
    close_monitor(mon);
}

static void a_number_that_becomes_another_file_and_again_the_old_one(enum ul_kind kind) {
    for (uint32_t once = 0; once <= UL_ONCE; once += UL_ONCE) {
        ul_fdmon *mon = open_monitor(kind);
        struct pair old = open_pair();
        int twin = dup_cloexec(old.ours), number = dup_cloexec(old.ours);
        put(old.peer);
        CHECK(watch_once(mon, number, UL_READ) == 0);
        CHECK(events_of(mon, number, SOON) == UL_READ);
        struct pair other = open_pair();
        CHECK(dup3(other.ours, number, O_CLOEXEC) == number);
        CHECK(ul_fdmon_update(mon, number, UL_READ | once) == 0);
        CHECK(is_quiet(mon, 1 * MS));
        CHECK(ul_fdmon_update(mon, number, 0) ==
              0); /* epoll has nothing of this file any more, and still the old one's entry */
        CHECK(dup3(twin, number, O_CLOEXEC) == number);
        CHECK(ul_fdmon_update(mon, number, UL_READ | once) == 0);
        CHECK(events_of(mon, number, SOON) == UL_READ);
        CHECK(is_quiet(mon, 2 * MS) == (once != 0));
        CHECK(ul_fdmon_update(mon, number, 0) == 0);
        close_monitor(mon);
        close(number);
        close(twin);
        close_pair(old);
        close_pair(other);
    }
}

static void two_numbers_of_one_file_are_two_watches(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    int twin = dup_cloexec(pair.ours), reports[2] = {0};
    ul_event out[4];
    put(pair.peer);
    for (int round = 1; round <= 3; round++) {
        CHECK(watch_once(mon, pair.ours, UL_READ) == 0);
        CHECK(watch_once(mon, twin, UL_READ) == 0);
        for (int n; (n = next_events(mon, out, 4, 5 * MS)) > 0;)
            for (int i = 0; i < n; i++)
                reports[out[i].fd == twin]++;
        CHECK(reports[0] == round && reports[1] == round);
    }
    CHECK(watch_once(mon, twin, UL_READ) == 0); /* its neighbour's end is not its own */
    close(pair.ours);
    CHECK(events_of(mon, twin, SOON) == UL_READ);
    CHECK(watch_once(mon, twin, UL_READ) == 0);
    take(twin);
    ul_fdmon_turn(mon, 0, out, 4);
    CHECK(ul_fdmon_update(mon, twin, 0) == 0);
    close(twin);
    CHECK(sees_end_of_file(pair.peer, 0));
    close_monitor(mon);
    close(pair.peer);
}

/* ---- in each state when the monitor changes its kernel object ---- */

struct states {
    struct pair pending, armed, fired, collected, reported;
};

static struct states open_states(ul_fdmon *mon) {
    struct states s = {open_pair(), open_pair(), open_pair(), open_pair(), open_pair()};
    ul_event out[8];
    put(s.reported.peer);
    CHECK(watch_once(mon, s.reported.ours, UL_READ) == 0);
    CHECK(events_of(mon, s.reported.ours, SOON) == UL_READ);
    put(s.collected.peer);
    CHECK(watch_once(mon, s.collected.ours, UL_READ) == 0);
    CHECK(watch_once(mon, s.armed.ours, UL_READ) == 0);
    CHECK(watch_once(mon, s.fired.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 0) == 0 && mon->ready_live == 1);
    put(s.fired.peer);
    CHECK(watch_once(mon, s.pending.ours, UL_READ) == 0);
    return s;
}

static void check_that_each_is_reported_once(ul_fdmon *mon, struct states *s) {
    enum { REPORTS = 256 };
    int reports[REPORTS] = {0};
    ul_event out[8];
    put(s->armed.peer);
    put(s->pending.peer);
    for (int turns = 0; turns < 30; turns++) {
        int n = ul_fdmon_turn(mon, 1 * MS, out, 8);
        CHECK(n >= 0);
        n &= ~UL_DOWNGRADED;
        for (int i = 0; i < n; i++) {
            CHECK(out[i].events == UL_READ);
            reports[out[i].fd]++;
        }
    }
    CHECK(reports[s->pending.ours] == 1 && reports[s->armed.ours] == 1 && reports[s->fired.ours] == 1);
    CHECK(reports[s->collected.ours] == 1 && reports[s->reported.ours] == 0);
    CHECK(statistics_of(mon).watches == 0);
    for (int i = 0; i < 2; i++) {
        CHECK(watch_once(mon, s->reported.ours, UL_READ) == 0);
        CHECK(watch_once(mon, s->fired.ours, UL_READ) == 0);
        CHECK(events_of(mon, s->reported.ours, SOON) == UL_READ);
        CHECK(watch_once(mon, s->reported.ours, 0) == -EINVAL);
        while (next_events(mon, out, 8, 2 * MS) > 0)
            ;
        CHECK(statistics_of(mon).watches == 0);
    }
}

static void close_states(struct states *s) {
    close_pair(s->pending);
    close_pair(s->armed);
    close_pair(s->fired);
    close_pair(s->collected);
    close_pair(s->reported);
}

static long enter_is_denied(const struct enter_call *call) {
    (void)call;
    return -EPERM;
}

static long epoll_is_denied(void) { return -EFAULT; }

static void a_downgrade_neither_loses_nor_repeats_a_report(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct states states = open_states(mon);
    on_enter = enter_is_denied;
    on_epoll_pwait2 = kind == UL_EPOLL ? epoll_is_denied : NULL;
    check_that_each_is_reported_once(mon, &states);
    CHECK(statistics_of(mon).downgrades == 1 && monitor_is(mon, kind == UL_EPOLL ? "poll" : "epoll"));
    close_monitor(mon);
    close_states(&states);
    believe_the_kernel();
}

static void a_fork_neither_loses_nor_repeats_a_report(enum ul_kind kind) {
    for (int in_child = 0; in_child < 2; in_child++) {
        ul_fdmon *mon = open_monitor(kind);
        struct states states = open_states(mon);
        pid_t child = fork();
        if (child == 0) {
            ul_fdmon_after_fork_in_child(mon);
            if (in_child)
                check_that_each_is_reported_once(mon, &states);
            close_monitor(mon);
            _exit(checks_failed ? 1 : 0);
        }
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
        if (!in_child)
            check_that_each_is_reported_once(mon, &states);
        close_monitor(mon);
        close_states(&states);
    }
}

struct mover {
    ul_fdmon *mon;
    struct states *states;
};

static void *check_in_thread(void *argument) {
    struct mover *mover = argument;
    check_that_each_is_reported_once(mover->mon, mover->states);
    return NULL;
}

static void a_move_to_another_thread_neither_loses_nor_repeats_a_report(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct states states = open_states(mon);
    struct mover mover = {mon, &states};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, check_in_thread, &mover) == 0);
    pthread_join(thread, NULL);
    CHECK(statistics_of(mon).downgrades == 0);
    close_monitor(mon);
    close_states(&states);
}

TESTS(TEST(a_watch_ends_with_its_first_report, ON_ALL), TEST(one_report_ends_both_directions, ON_ALL),
      TEST(a_hundred_waits_on_epoll_cost_one_call_each, ON_EPOLL),
      TEST(a_hundred_waits_on_io_uring_cost_one_entry_each, ON_IO_URING), TEST(a_watch_becomes_a_lasting_one_and_back, ON_ALL),
      TEST(what_was_collected_is_dropped_when_the_watch_is_removed_or_changed, ON_ALL),
      TEST(what_has_no_room_is_reported_later_and_only_once, ON_ALL),
      TEST(the_peer_sees_end_of_file_when_the_reported_descriptor_is_closed, ON_ALL),
      TEST(the_peer_sees_end_of_file_when_the_watch_was_removed_before_its_report, ON_ALL),
      TEST(a_last_report_on_a_half_closed_peer_leaves_no_poll_behind, ON_ALL),
      TEST(a_bad_descriptor_is_reported_once_and_then_not_watched, ON_ALL),
      TEST(a_number_used_again_after_its_only_report_is_the_new_file, ON_ALL),
      TEST(a_number_that_becomes_another_file_and_again_the_old_one, ON_ALL),
      TEST(two_numbers_of_one_file_are_two_watches, ON_ALL),
      TEST(a_downgrade_neither_loses_nor_repeats_a_report, ON_IO_URING | ON_EPOLL),
      TEST(a_fork_neither_loses_nor_repeats_a_report, ON_ALL),
      TEST(a_move_to_another_thread_neither_loses_nor_repeats_a_report, ON_ALL))
