/* link: -Wl,--wrap=syscall,--wrap=epoll_create1,--wrap=epoll_ctl */
/*
 * The kernel changes its mind: a monitor is lost at run time, answers come late, short or wrong.
 *
 * Why it exists: a seccomp filter may be installed while traffic runs. Promise: whatever state a watch is in when its monitor
 * goes, it is reported by the next one; passing states do not cost the ring, and lasting ones do not spin.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/wait.h>

#include "fake_kernel.h"

int __real_epoll_create1(int flags);
int __wrap_epoll_create1(int flags);
int __real_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event);
int __wrap_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event);

static int epoll_create1_errno, epoll_add_errno;

int __wrap_epoll_create1(int flags) {
    if (!epoll_create1_errno)
        return __real_epoll_create1(flags);
    errno = epoll_create1_errno;
    return -1;
}

int __wrap_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event) {
    if (!epoll_add_errno || op != EPOLL_CTL_ADD)
        return __real_epoll_ctl(epoll_fd, op, fd, event);
    errno = epoll_add_errno;
    return -1;
}

static long answer; /* of enter_answers and epoll_answers ... */
static int answers; /* ... this many times, then the kernel's */

static long enter_answers(const struct enter_call *call) { return answers-- > 0 ? answer : real_enter(call); }
static long epoll_answers(void) { return answer; }
static long register_answers(void) { return answer; }
static long setup_answers(unsigned entries, struct ul_params *params) {
    (void)entries;
    (void)params;
    return answer;
}

enum { FOR_EVER = 1000000000 };

static void from_now_on(int err, int times) {
    on_enter = enter_answers;
    answer = -err;
    answers = times;
}

/* ---- a watch in each state a watch can be in ---- */

struct states {
    struct pair pending, changed, armed, fired, collected, removed;
    int parked; /* bad when it was parked; open again afterwards, so that nothing else gets the number */
};

static struct states open_states(ul_fdmon *mon) {
    struct states s = {open_pair(), open_pair(), open_pair(), open_pair(), open_pair(), open_pair(), -1};
    ul_event out[8];
    struct pair bad = open_pair();
    s.parked = bad.ours;
    CHECK(ul_fdmon_update(mon, s.parked, UL_READ) == 0);
    close(bad.ours);
    close(bad.peer);
    CHECK(next_events(mon, out, 8, SOON) == 1 && out[0].fd == s.parked);
    CHECK(eventfd(1, EFD_CLOEXEC) == s.parked);
    CHECK(ul_fdmon_update(mon, s.changed.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, s.armed.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, s.fired.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, s.removed.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, s.collected.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 8) == 0);
    put(s.collected.peer);
    put(s.removed.peer);
    CHECK(ul_fdmon_turn(mon, 0, out, 0) == 0); /* collected, and no room to hand over */
    CHECK(ul_fdmon_update(mon, s.removed.ours, 0) == 0);
    put(s.fired.peer); /* fired, and not collected */
    CHECK(ul_fdmon_update(mon, s.changed.ours, UL_WRITE) == 0);
    CHECK(ul_fdmon_update(mon, s.pending.ours, UL_READ) == 0);
    return s;
}

static void close_states(struct states *s) {
    close_pair(s->pending);
    close_pair(s->changed);
    close_pair(s->armed);
    close_pair(s->fired);
    close_pair(s->collected);
    close_pair(s->removed);
    close(s->parked);
}

/* After the loss: the turn reports it once, and every live watch is reported when it is ready, the others never. */
static void check_that_nothing_was_lost(ul_fdmon *mon, struct states *s) {
    enum { REPORTS = 256 };
    int reports[REPORTS] = {0}, announced = 0;
    ul_event out[8];
    put(s->armed.peer);
    put(s->pending.peer);
    for (int turns = 0; turns < 30; turns++) {
        int n = ul_fdmon_turn(mon, 1 * MS, out, 8);
        CHECK(n >= 0);
        announced += (n & UL_DOWNGRADED) != 0;
        n &= ~UL_DOWNGRADED;
        for (int i = 0; i < n; i++) {
            CHECK(out[i].fd < REPORTS && out[i].events == (out[i].fd == s->changed.ours ? UL_WRITE : UL_READ));
            reports[out[i].fd]++;
        }
    }
    CHECK(announced == 1);
    CHECK(reports[s->pending.ours] > 1 && reports[s->changed.ours] > 1 && reports[s->armed.ours] > 1);
    CHECK(reports[s->fired.ours] > 1 && reports[s->collected.ours] > 1);
    CHECK(reports[s->removed.ours] == 0 && reports[s->parked] == 0);
    CHECK(statistics_of(mon).watches == 6);
    empty(s->armed.ours);
    empty(s->pending.ours);
    empty(s->fired.ours);
    empty(s->collected.ours);
    CHECK(ul_fdmon_update(mon, s->changed.ours, UL_READ) == 0);
    ul_fdmon_turn(mon, 0, out, 8);
    CHECK(is_quiet(mon, 2 * MS));
    CHECK(ul_fdmon_update(mon, s->removed.ours, UL_READ) == 0);
    CHECK(events_of(mon, s->removed.ours, SOON) == UL_READ);
}

/* Two errors say "that number is not your ring": it is not closed, since it may be somebody else's file. Here it is ours. */
static void close_disowned(int fd, int err) {
    if (err == EBADF || err == EOPNOTSUPP)
        close(fd);
}

static void io_uring_taken_away_leaves_every_watch_on_epoll(enum ul_kind kind) {
    static const int errnos[] = {EPERM, ENOSYS, EBADF, EFAULT, EBADFD, EOPNOTSUPP, EBADR, EINVAL, ENXIO, EACCES};
    for (size_t i = 0; i < sizeof errnos / sizeof errnos[0]; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct states states = open_states(mon);
        int ring_fd = mon->ring->fd;
        from_now_on(errnos[i], FOR_EVER);
        check_that_nothing_was_lost(mon, &states);
        ul_setup_info info = info_of(mon);
        CHECK(strcmp(info.name, "epoll") == 0);
        CHECK(info.refused_step && strcmp(info.refused_step, "io_uring_enter") == 0 && info.refused_errno == errnos[i]);
        CHECK(statistics_of(mon).downgrades == 1 && enter_calls < 10000);
        int enters = enter_calls;
        CHECK(ul_fdmon_turn(mon, 1, (ul_event[8]){{0}}, 8) >= 0);
        CHECK(enter_calls == enters);
        close_monitor(mon);
        close_states(&states);
        close_disowned(ring_fd, errnos[i]);
    }
    believe_the_kernel();
}

static void io_uring_taken_away_without_a_free_descriptor_leaves_every_watch_on_poll(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct states states = open_states(mon);
    from_now_on(EPERM, FOR_EVER);
    epoll_create1_errno = EMFILE;
    check_that_nothing_was_lost(mon, &states);
    epoll_create1_errno = 0;
    CHECK(monitor_is(mon, "poll"));
    CHECK(strcmp(info_of(mon).refused_step, "io_uring_enter") == 0 && info_of(mon).refused_errno == EPERM);
    close_monitor(mon);
    close_states(&states);
    believe_the_kernel();
}

static void epoll_taken_away_too_leaves_every_watch_on_poll(enum ul_kind kind) {
    static const int errnos[] = {EFAULT, EBADF};
    for (size_t i = 0; i < 2; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct states states = open_states(mon);
        from_now_on(EPERM, FOR_EVER);
        check_that_nothing_was_lost(mon, &states);
        CHECK(ul_fdmon_update(mon, states.removed.ours, 0) == 0);
        put(states.collected.peer);
        put(states.fired.peer);
        CHECK(ul_fdmon_update(mon, states.changed.ours, UL_WRITE) == 0);
        int epoll_fd = mon->epoll_fd;
        on_epoll_pwait2 = epoll_answers;
        answer = -errnos[i];
        check_that_nothing_was_lost(mon, &states);
        CHECK(monitor_is(mon, "poll") && statistics_of(mon).downgrades == 2);
        CHECK(strcmp(info_of(mon).refused_step, "epoll_wait") == 0 && info_of(mon).refused_errno == errnos[i]);
        close_monitor(mon);
        close_states(&states);
        close_disowned(epoll_fd, errnos[i]);
    }
    believe_the_kernel();
}

static void both_lost_in_one_turn_are_announced_once(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct states states = open_states(mon);
    from_now_on(EFAULT, FOR_EVER);
    on_epoll_pwait2 = epoll_answers;
    check_that_nothing_was_lost(mon, &states);
    CHECK(monitor_is(mon, "poll") && statistics_of(mon).downgrades == 2);
    close_monitor(mon);
    close_states(&states);
    believe_the_kernel();
}

static void epoll_that_cannot_take_a_good_watch_is_passed_over_for_poll(enum ul_kind kind) {
    static const int errnos[] = {ENOSPC, ENOMEM};
    for (size_t i = 0; i < 2; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct states states = open_states(mon);
        from_now_on(EPERM, FOR_EVER);
        epoll_add_errno = errnos[i];
        check_that_nothing_was_lost(mon, &states);
        epoll_add_errno = 0;
        close_monitor(mon);
        close_states(&states);
    }
    believe_the_kernel();
}

static void a_parked_watch_can_be_changed_after_the_downgrade(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[8];
    int number = pair.ours;
    CHECK(ul_fdmon_update(mon, number, UL_READ) == 0);
    close_pair(pair);
    CHECK(next_events(mon, out, 8, SOON) == 1);
    from_now_on(EPERM, FOR_EVER);
    struct pair trigger = open_pair(); /* takes the same number */
    CHECK(trigger.ours == number);
    put(trigger.peer);
    CHECK((ul_fdmon_turn(mon, 1 * MS, out, 8) & UL_DOWNGRADED) && monitor_is(mon, "epoll"));
    CHECK(ul_fdmon_update(mon, number, UL_READ | UL_WRITE) == 0);
    CHECK(events_of(mon, number, SOON) == (UL_READ | UL_WRITE));
    close_monitor(mon);
    close_pair(trigger);
    believe_the_kernel();
}

static void a_removal_during_the_loss_still_frees_the_file_and_keeps_the_rest(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct states states = open_states(mon);
    struct pair pair = open_pair();
    ul_event out[8];
    ul_fdmon_turn(mon, 0, out, 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    ul_fdmon_turn(mon, 0, out, 0);
    from_now_on(EPERM, FOR_EVER);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 1000));
    check_that_nothing_was_lost(mon, &states);
    CHECK(monitor_is(mon, "epoll"));
    CHECK(info_of(mon).refused_errno == EPERM);
    close_monitor(mon);
    close(pair.peer);
    close_states(&states);
    believe_the_kernel();
}

static void closing_when_enter_is_denied_frees_every_file(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[8];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 8) == 0);
    from_now_on(EPERM, FOR_EVER);
    CHECK(close_and_keep_ring(mon) == NULL);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 1000));
    close(pair.peer);
    believe_the_kernel();
}

static void a_host_is_woken_by_the_loss(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[8];
    struct pollfd outer = {.fd = ul_fdmon_fileno(mon), .events = POLLIN};
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    ul_fdmon_turn(mon, 0, out, 8);
    ul_fdmon_turn(mon, 0, out, 8);
    CHECK(poll(&outer, 1, 0) == 0);
    from_now_on(EPERM, FOR_EVER);
    put(pair.peer);
    CHECK(poll(&outer, 1, 1000) == 1);
    int n = ul_fdmon_turn(mon, 0, out, 8);
    CHECK(n == (1 | UL_DOWNGRADED));
    CHECK(poll(&outer, 1, 0) == 1); /* the old descriptor says once more: ask for the new one */
    outer.fd = ul_fdmon_fileno(mon);
    CHECK(outer.fd == mon->epoll_fd && poll(&outer, 1, 1000) == 1);
    close_monitor(mon);
    close_pair(pair);
    believe_the_kernel();
}

static void an_eventfd_that_is_denied_costs_the_ring_not_the_watches(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct states states = open_states(mon);
    CHECK(ul_fdmon_fileno(mon) >= 0);
    on_register = register_answers;
    answer = -EPERM;
    check_that_nothing_was_lost(mon, &states);
    CHECK(monitor_is(mon, "epoll"));
    CHECK(strcmp(info_of(mon).refused_step, "io_uring_enter") != 0);
    close_monitor(mon);
    close_states(&states);
    believe_the_kernel();
}

/* ---- a new ring is needed and refused ---- */

static void a_child_that_is_denied_a_ring_of_its_own_goes_on_with_epoll(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[8];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 8) == 0);
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        on_setup = setup_answers;
        answer = -EPERM;
        put(pair.peer);
        CHECK(ul_fdmon_turn(mon, 100 * MS, out, 8) == (1 | UL_DOWNGRADED));
        CHECK(monitor_is(mon, "epoll") && info_of(mon).refused_errno == EPERM);
        CHECK(strcmp(info_of(mon).refused_step, "io_uring_setup") == 0);
        take(pair.ours);
        close_monitor(mon);
        _exit(checks_failed ? 1 : 0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void *turn_without_a_ring(void *mon) {
    ul_event out[8];
    CHECK(ul_fdmon_turn(mon, 100 * MS, out, 8) == (1 | UL_DOWNGRADED));
    return NULL;
}

static void a_monitor_that_moves_to_a_thread_and_is_denied_a_ring_goes_on_with_epoll(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[8];
    pthread_t thread;
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 8) == 0);
    on_setup = setup_answers;
    answer = -ENOSYS;
    put(pair.peer);
    CHECK(pthread_create(&thread, NULL, turn_without_a_ring, mon) == 0);
    pthread_join(thread, NULL);
    CHECK(monitor_is(mon, "epoll") && info_of(mon).refused_errno == ENOSYS);
    CHECK(strcmp(info_of(mon).refused_step, "io_uring_setup") == 0);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
    believe_the_kernel();
}

static void a_child_without_epoll_goes_on_with_poll(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[8];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        epoll_create1_errno = EMFILE;
        put(pair.peer);
        CHECK(ul_fdmon_turn(mon, 100 * MS, out, 8) == (1 | UL_DOWNGRADED));
        CHECK(monitor_is(mon, "poll"));
        take(pair.ours);
        close_monitor(mon);
        _exit(checks_failed ? 1 : 0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    close_monitor(mon);
    close_pair(pair);
}

/* ---- passing states ---- */

static void a_busy_kernel_is_asked_again_but_not_for_ever(enum ul_kind kind) {
    static const int passing[] = {EAGAIN, EBUSY};
    for (int i = 0; i < 2; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct states states = open_states(mon);
        ul_event out[8];
        for (int round = 0; round < 3; round++) { /* ten times each; a success in between starts the count anew */
            CHECK(ul_fdmon_update(mon, states.pending.ours, UL_READ | (round % 2 ? UL_WRITE : 0)) == 0);
            from_now_on(passing[i], 10);
            for (int turns = 0; answers > 0 && turns < 20; turns++)
                CHECK(ul_fdmon_turn(mon, 0, out, 0) == 0);
            CHECK(ul_fdmon_turn(mon, 0, out, 0) == 0);
            CHECK(monitor_is(mon, "io_uring"));
        }
        CHECK(ul_fdmon_update(mon, states.pending.ours, UL_READ) == 0);
        from_now_on(passing[i], FOR_EVER);
        enter_calls = 0;
        check_that_nothing_was_lost(mon, &states); /* "announced once", and soon */
        CHECK(monitor_is(mon, "epoll") && info_of(mon).refused_errno == passing[i] && enter_calls < 50);
        close_monitor(mon);
        close_states(&states);
    }
    believe_the_kernel();
}

static void an_interrupted_or_timed_out_enter_is_no_loss_however_often(enum ul_kind kind) {
    static const int harmless[] = {EINTR, ETIME};
    for (int i = 0; i < 2; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        ul_event out[8];
        put(pair.peer);
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        from_now_on(harmless[i], 100);
        for (int turns = 0; turns < 100; turns++)
            CHECK(ul_fdmon_turn(mon, -1, out, 8) == 0);
        CHECK(ul_fdmon_turn(mon, -1, out, 8) == 1);
        CHECK(monitor_is(mon, "io_uring"));
        close_monitor(mon);
        close_pair(pair);
    }
    believe_the_kernel();
}

static void a_removal_goes_through_although_the_kernel_is_busy_or_interrupted(enum ul_kind kind) {
    static const int passing[] = {EAGAIN, EBUSY, EINTR};
    for (int i = 0; i < 3; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        ul_event out[8];
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        CHECK(ul_fdmon_turn(mon, 0, out, 8) == 0);
        from_now_on(passing[i], 10);
        CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
        close(pair.ours);
        CHECK(sees_end_of_file(pair.peer, 0));
        CHECK(mon->ring && mon->requests_in_flight == 0 && monitor_is(mon, "io_uring"));
        close_monitor(mon);
        close(pair.peer);
    }
    believe_the_kernel();
}

static int chunk; /* an enter that takes so many entries at most */

static long enter_takes_few(const struct enter_call *call) {
    struct enter_call altered = *call;
    if (altered.to_submit > chunk) {
        altered.to_submit = chunk;
        altered.min_complete = 0; /* the kernel does not wait after a short submission */
    }
    return real_enter(&altered);
}

static void entries_that_an_enter_does_not_take_are_submitted_by_the_next(enum ul_kind kind) {
    static const int chunks[] = {1, 7, 100};
    for (int i = 0; i < 3; i++) {
        enum { MANY = 600 };
        static ul_event out[2 * MANY];
        static int fds[MANY], reports[4 * MANY];
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        memset(reports, 0, sizeof reports);
        chunk = chunks[i];
        on_enter = enter_takes_few;
        for (int k = 0; k < MANY; k++)
            CHECK(ul_fdmon_update(mon, fds[k] = dup_cloexec(pair.ours), UL_READ) == 0);
        put(pair.peer);
        int distinct = 0;
        for (int turns = 0; turns < 2 * MANY && distinct < MANY; turns++) {
            int n = ul_fdmon_turn(mon, 1 * MS, out, 2 * MANY);
            CHECK(n >= 0 && !(n & UL_DOWNGRADED));
            for (int k = 0; k < n; k++)
                distinct += reports[out[k].fd]++ == 0;
        }
        CHECK(distinct == MANY && monitor_is(mon, "io_uring"));
        for (int k = 0; k < MANY; k++) {
            CHECK(ul_fdmon_update(mon, fds[k], 0) == 0);
            close(fds[k]);
        }
        CHECK(mon->requests_in_flight == 0);
        close(pair.ours);
        close_monitor(mon);
        close(pair.peer);
    }
    believe_the_kernel();
}

static long enter_takes_nothing(const struct enter_call *call) {
    (void)call;
    return 0;
}

static void an_enter_that_never_takes_anything_does_not_hang_a_removal_or_a_close(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair(), other = open_pair();
    ul_event out[8];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_update(mon, other.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 8) == 0);
    on_enter = enter_takes_nothing;
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 1000));
    on_enter = NULL;
    put(other.peer);
    CHECK(events_of(mon, other.ours, SOON) == UL_READ);
    on_enter = enter_takes_nothing;
    close_monitor(mon);
    close(pair.peer);
    close_pair(other);
    believe_the_kernel();
}

/* ---- completions that tests forge: the kernel's, with another result or another name ---- */

static ul_fdmon *forged;
static int32_t forged_res;
static uint64_t forged_name_bits;
static int forgeries;

static long enter_and_forge(const struct enter_call *call) {
    ul_ring *ring = forged->ring;
    long ret = real_enter(call);
    if (forgeries == 0)
        return ret;
    uint32_t tail = __atomic_load_n(ring->cq_ktail, __ATOMIC_ACQUIRE);
    for (uint32_t head = *ring->cq_head; forgeries > 0 && head != tail; head++, forgeries--) {
        struct ul_cqe *cqe = &ring->cqes[head & ring->cq_mask];
        cqe->user_data ^= forged_name_bits;
        if (forged_res)
            cqe->res = forged_res;
    }
    return ret;
}

static void forge(ul_fdmon *mon, int32_t res, uint64_t name_bits, int times) {
    forged = mon;
    forged_res = res;
    forged_name_bits = name_bits;
    forgeries = times;
    on_enter = enter_and_forge;
}

static void a_poll_that_failed_for_a_passing_reason_is_armed_again(enum ul_kind kind) {
    static const int passing[] = {ECANCELED, ENOMEM, EAGAIN, EINTR};
    for (int i = 0; i < 4; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        put(pair.peer);
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        forge(mon, -passing[i], 0, 3);
        ul_event out[8];
        for (int k = 0; k < 5; k++)
            next_events(mon, out, 8, 1 * MS);
        CHECK(forgeries == 0);
        CHECK(events_of(mon, pair.ours, 50 * MS) == UL_READ);
        close_monitor(mon);
        close_pair(pair);
    }
    believe_the_kernel();
}

static void a_poll_of_a_bad_descriptor_is_reported_once_and_parked_until_it_is_changed(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    put(pair.peer);
    for (int i = 0; i < 2; i++) {
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE) == 0);
        forge(mon, -EBADF, 0, 1);
        CHECK(events_of(mon, pair.ours, SOON) == (UL_READ | UL_WRITE));
        CHECK(is_quiet(mon, 3 * MS));
        CHECK(!ul_fdmon_need_wait(mon));
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    }
    close_monitor(mon);
    close_pair(pair);
    believe_the_kernel();
}

static void a_completion_for_a_dead_request_is_dropped(enum ul_kind kind) {
    static const uint64_t other_names[] = {1ULL << 32, 1ULL << 63, 0xffffff00, 1ULL << 31};
    for (size_t i = 0; i < sizeof other_names / sizeof other_names[0]; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        ul_event out[8];
        put(pair.peer);
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        forge(mon, 0, other_names[i], 1);
        CHECK(ul_fdmon_turn(mon, SOON, out, 8) == 0);
        CHECK(forgeries == 0);
        CHECK(is_quiet(mon, 2 * MS));
        CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0); /* its own completion never comes: the ring is given up, not the loop */
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
        close_monitor(mon);
        close_pair(pair);
    }
    believe_the_kernel();
}

/* ---- a completion queue that runs over ---- */

static long setup_tiny(unsigned entries, struct ul_params *params) {
    (void)entries;
    params->cq_entries = 8;
    return real_setup(8, params);
}

static void a_completion_queue_that_runs_over_loses_nothing_and_is_counted(enum ul_kind kind) {
    enum { FIRED = 8, READY = 8 };
    believe_the_kernel();
    on_setup = setup_tiny;
    ul_fdmon *mon = open_monitor(kind);
    CHECK(info_of(mon).cq_entries == 8);
    struct pair fired = open_pair(), ready = open_pair();
    int fds[FIRED + READY], reports[256] = {0};
    ul_event out[64];
    for (int i = 0; i < FIRED; i++)
        CHECK(ul_fdmon_update(mon, fds[i] = dup_cloexec(fired.ours), UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 64) == 0);
    put(fired.peer);
    put(ready.peer);
    for (int i = FIRED; i < FIRED + READY; i++)
        CHECK(ul_fdmon_update(mon, fds[i] = dup_cloexec(ready.ours), UL_READ) == 0);
    for (int turns = 0; turns < 5; turns++) { /* eight complete at once, eight by deferred work, room for eight */
        int n = ul_fdmon_turn(mon, 100 * MS, out, 64);
        CHECK(n > 0 && !(n & UL_DOWNGRADED));
        for (int i = 0; i < n; i++)
            reports[out[i].fd]++;
    }
    for (int i = 0; i < FIRED + READY; i++) {
        CHECK(reports[fds[i]] >= 4);
        CHECK(ul_fdmon_update(mon, fds[i], 0) == 0);
        close(fds[i]);
    }
    CHECK(statistics_of(mon).overflows > 0);
    CHECK(mon->requests_in_flight == 0);
    close_monitor(mon);
    close_pair(fired);
    close_pair(ready);
    believe_the_kernel();
}

static long enter_and_claim_overflow(const struct enter_call *call) {
    long ret = real_enter(call);
    __atomic_or_fetch(forged->ring->sq_flags, UL_SQ_CQ_OVERFLOW, __ATOMIC_RELAXED);
    return ret;
}

static void an_overflow_flag_that_never_clears_does_not_hang_the_turn(enum ul_kind kind) {
    believe_the_kernel();
    struct pair pair = open_pair();
    ul_event out[8];
    put(pair.peer);
    pid_t child = fork(); /* a hang must not take the other tests along */
    if (child == 0) {
        ul_fdmon *mon = open_monitor(kind);
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        forged = mon;
        on_enter = enter_and_claim_overflow;
        alarm(2);
        CHECK((ul_fdmon_turn(mon, 10 * MS, out, 8) & ~UL_DOWNGRADED) >= 0);
        _exit(checks_failed ? 1 : 0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    close_pair(pair);
}

/* ---- old kernels and old seccomp profiles under epoll ---- */

static void epoll_without_nanoseconds_waits_in_milliseconds_and_never_too_short(enum ul_kind kind) {
    static const int errnos[] = {ENOSYS, EPERM};
    for (int i = 0; i < 2; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_pair();
        ul_event out[8];
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        on_epoll_pwait2 = epoll_answers;
        answer = -errnos[i];
        CHECK(waits_at_least(mon, 1) && waits_at_least(mon, 1 * MS + 1) && waits_at_least(mon, 999999));
        CHECK(epoll_pwait2_calls == 1 && statistics_of(mon).downgrades == 0 && monitor_is(mon, "epoll"));
        put(pair.peer);
        CHECK(ul_fdmon_turn(mon, -1, out, 8) == 1);
        CHECK(ul_fdmon_turn(mon, INT64_MAX, out, 8) == 1);
        CHECK(ul_fdmon_turn(mon, 0, out, 8) == 1);
        close_monitor(mon);
        close_pair(pair);
    }
    believe_the_kernel();
}

TESTS(TEST(io_uring_taken_away_leaves_every_watch_on_epoll, ON_IO_URING),
      TEST(io_uring_taken_away_without_a_free_descriptor_leaves_every_watch_on_poll, ON_IO_URING),
      TEST(epoll_taken_away_too_leaves_every_watch_on_poll, ON_IO_URING),
      TEST(both_lost_in_one_turn_are_announced_once, ON_IO_URING),
      TEST(epoll_that_cannot_take_a_good_watch_is_passed_over_for_poll, ON_IO_URING),
      TEST(a_parked_watch_can_be_changed_after_the_downgrade, ON_IO_URING),
      TEST(a_removal_during_the_loss_still_frees_the_file_and_keeps_the_rest, ON_IO_URING),
      TEST(closing_when_enter_is_denied_frees_every_file, ON_IO_URING), TEST(a_host_is_woken_by_the_loss, ON_IO_URING),
      TEST(an_eventfd_that_is_denied_costs_the_ring_not_the_watches, ON_IO_URING),
      TEST(a_child_that_is_denied_a_ring_of_its_own_goes_on_with_epoll, ON_IO_URING),
      TEST(a_monitor_that_moves_to_a_thread_and_is_denied_a_ring_goes_on_with_epoll, ON_IO_URING),
      TEST(a_child_without_epoll_goes_on_with_poll, ON_EPOLL), TEST(a_busy_kernel_is_asked_again_but_not_for_ever, ON_IO_URING),
      TEST(an_interrupted_or_timed_out_enter_is_no_loss_however_often, ON_IO_URING),
      TEST(a_removal_goes_through_although_the_kernel_is_busy_or_interrupted, ON_IO_URING),
      TEST(entries_that_an_enter_does_not_take_are_submitted_by_the_next, ON_IO_URING),
      TEST(an_enter_that_never_takes_anything_does_not_hang_a_removal_or_a_close, ON_IO_URING),
      TEST(a_poll_that_failed_for_a_passing_reason_is_armed_again, ON_IO_URING),
      TEST(a_poll_of_a_bad_descriptor_is_reported_once_and_parked_until_it_is_changed, ON_IO_URING),
      TEST(a_completion_for_a_dead_request_is_dropped, ON_IO_URING),
      TEST(a_completion_queue_that_runs_over_loses_nothing_and_is_counted, ON_IO_URING),
      TEST(an_overflow_flag_that_never_clears_does_not_hang_the_turn, ON_IO_URING),
      TEST(epoll_without_nanoseconds_waits_in_milliseconds_and_never_too_short, ON_EPOLL))
