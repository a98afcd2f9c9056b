/* link: -Wl,--wrap=syscall */
/*
 * A foreign main loop carries ours: it polls descriptors, and asks to be woken at a time.
 *
 * Why it exists: a host that sleeps through a change, or that is woken for nothing, is a frozen or a hot user interface. Promise:
 * every test polls what the monitor listed, as a host does, and between a change and the wake-up nothing calls the monitor.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "fake_kernel.h"

enum { HOST_FDS_MAX = 2100, MANY = 1000 };

struct host {
    ul_fdmon *mon;
    struct pollfd polled[HOST_FDS_MAX];
    int count;
    uint64_t version;
};

static struct host host;

/* The list anew; whether it has changed. */
static bool ask(void) {
    static ul_host_fd fds[HOST_FDS_MAX];
    uint64_t before = host.version;
    host.count = ul_fdmon_host_fds(host.mon, fds, HOST_FDS_MAX, &host.version);
    CHECK(host.count > 0 && host.count <= HOST_FDS_MAX);
    for (int i = 0; i < host.count; i++)
        host.polled[i] = (struct pollfd){.fd = fds[i].fd, .events = (short)fds[i].poll_events};
    return host.version != before;
}

static ul_fdmon *open_hosted(enum ul_kind kind) {
    host = (struct host){.mon = open_monitor(kind)};
    CHECK(ask());
    return host.mon;
}

/* What was listed, polled without a word to the monitor. */
static bool is_woken(int64_t timeout_ns) {
    struct timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    return ppoll(host.polled, (nfds_t)host.count, timeout_ns > 0 ? &ts : &(struct timespec){0}, NULL) > 0;
}

/* What the host does before it sleeps; 1: it will not. */
static int prepare(int64_t wake_ns) {
    ask();
    int ret = ul_fdmon_prepare(host.mon, wake_ns);
    CHECK(ret >= 0);
    return ret;
}

/* As a host that follows the monitor's advice; until nothing is due any more. */
static void settle(void) {
    ul_event out[16];
    int turns = 0;
    while (prepare(-1) == 1 && turns++ < 5)
        CHECK(ul_fdmon_turn(host.mon, 0, out, 16) == 0);
    CHECK(turns <= 3 && !is_woken(2 * MS));
}

static uint32_t hosted_events_of(int fd) {
    ul_event out[16];
    for (int turns = 0; turns < 10 && is_woken(SOON); turns++) {
        int n = ul_fdmon_turn(host.mon, 0, out, 16) & ~UL_DOWNGRADED;
        for (int i = 0; i < n; i++)
            if (out[i].fd == fd)
                return out[i].events;
        ask();
    }
    return 0;
}

/* Woken at this time, at most a few times before it, without being prepared again. */
static void check_woken_at(int64_t wake_ns) {
    ul_event out[4];
    int early = 0;
    CHECK(is_woken(wake_ns - now_ns() + SOON));
    while (now_ns() < wake_ns && early++ < 5) {
        CHECK(ul_fdmon_turn(host.mon, 0, out, 4) == 0);
        CHECK(is_woken(wake_ns - now_ns() + SOON));
    }
    CHECK(now_ns() >= wake_ns && now_ns() < wake_ns + SOON);
    CHECK(ul_fdmon_turn(host.mon, 0, out, 4) == 0);
}

static void in_thread(void *(*run)(void *), void *argument) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run, argument) == 0);
    pthread_join(thread, NULL);
}

/* ---- descriptors ---- */

static void a_host_is_told_what_to_poll_and_when_that_changes(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    ul_host_fd fds[4] = {{-1, 0}, {-1, 0}, {-1, 0}, {-1, 0}};
    const int own = kind == UL_POLL ? 2 : 1; /* on poll a descriptor for "at once" and one for a time */
    uint64_t version;
    CHECK(host.count == own && host.polled[0].events == POLLIN && fcntl(host.polled[0].fd, F_GETFD) & FD_CLOEXEC);
    CHECK(!ask());
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE) == 0);
    int count = kind == UL_POLL ? own + 1 : own;
    CHECK(ul_fdmon_host_fds(mon, NULL, 0, &version) == count && (version != host.version) == (kind == UL_POLL));
    CHECK(ul_fdmon_host_fds(mon, fds, 4, &version) == count && fds[count].fd == -1);
    if (kind == UL_POLL)
        CHECK(fds[0].fd == pair.ours && fds[0].poll_events == (POLLIN | POLLOUT) && fds[1].poll_events == POLLIN);
    close_monitor(mon);
    close_pair(pair);
}

static void a_change_that_the_host_of_poll_has_not_seen_wakes_it_until_it_asks(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    settle();
    for (int change = 0; change < 4; change++) {
        if (change == 3) { /* the only report takes the watch away */
            put(pair.peer);
            CHECK(is_woken(SOON) && ul_fdmon_turn(mon, 0, out, 4) == 1);
            take(pair.ours);
        } else {
            CHECK(ul_fdmon_update(mon, pair.ours, change == 0 ? UL_WRITE : change == 1 ? 0 : UL_READ | UL_ONCE) == 0);
        }
        CHECK(is_woken(SOON));
        CHECK(ul_fdmon_prepare(mon, -1) == 1);
        CHECK(ul_fdmon_turn(mon, 0, out, 0) == 0 && is_woken(SOON));
        CHECK(ask());
        CHECK(ul_fdmon_prepare(mon, -1) == (change == 0) && is_woken(0) == (change == 0)); /* writable, and collected */
        ul_fdmon_turn(mon, 0, out, 4);
    }
    settle();
    close_monitor(mon);
    close_pair(pair);
}

/* ---- changes ---- */

static void a_watch_that_was_prepared_wakes_the_host_without_another_call(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(prepare(-1) == 0);
    CHECK(!is_woken(2 * MS));
    for (int i = 0; i < 20; i++) {
        put(pair.peer);
        CHECK(is_woken(SOON));
        CHECK(hosted_events_of(pair.ours) == UL_READ);
        CHECK(is_woken(SOON)); /* it was not read */
        take(pair.ours);
        settle();
    }
    close_monitor(mon);
    close_pair(pair);
}

static void a_watch_of_what_is_ready_is_due_at_once_or_wakes_the_host(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    put(pair.peer);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    prepare(-1);
    CHECK(hosted_events_of(pair.ours) == UL_READ);
    close_monitor(mon);
    close_pair(pair);
}

static void nothing_stays_in_the_queue_of_a_host_that_sleeps(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    static ul_event out[MANY];
    int file = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), fds[MANY], reported = 0;
    for (int i = 0; i < MANY; i++) {
        fds[i] = dup_cloexec(file);
        CHECK(ul_fdmon_update(mon, fds[i], UL_READ | (i % 2 ? UL_ONCE : 0)) == 0);
    }
    CHECK(prepare(now_ns() + 3600 * 1000 * MS) == 0);
    CHECK(kind != UL_IO_URING || (ul_ring_unsubmitted(mon->ring) == 0 && mon->pending.count == 0));
    CHECK(!is_woken(2 * MS));
    CHECK(eventfd_write(file, 1) == 0);
    for (int turns = 0; reported < MANY && turns < 10 * MANY && is_woken(SOON); turns++) {
        int n = ul_fdmon_turn(mon, 0, out, turns % 2 ? MANY : 7);
        for (int i = 0; i < n; i++, reported++)
            CHECK(ul_fdmon_update(mon, out[i].fd, 0) == 0);
        if (kind == UL_POLL)
            ask();
    }
    CHECK(reported == MANY);
    settle();
    close_monitor(mon);
    for (int i = 0; i < MANY; i++)
        close(fds[i]);
    close(file);
}

static void a_send_that_was_prepared_leaves_and_its_end_wakes_the_host(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    struct iovec piece = {"x", 1};
    for (int i = 0; i < 20; i++) {
        CHECK(ul_fdmon_send(mon, pair.ours, &piece, 1) == 0);
        prepare(-1);
        take(pair.peer);
        CHECK(hosted_events_of(pair.ours) == UL_SENT);
        settle();
    }
    close_monitor(mon);
    close_pair(pair);
}

static void a_host_that_sleeps_leaves_the_kernel_every_buffer(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_RECV) == 0);
    prepare(-1);
    put(pair.peer);
    CHECK(is_woken(SOON) && ul_fdmon_turn(mon, 0, out, 4) == 1 && out[0].events == UL_DATA);
    uint16_t given = mon->ring->buffer_ring_tail;
    CHECK(prepare(-1) == 0);
    CHECK(mon->ring->buffer_ring_tail == given + 1);
    put(pair.peer);
    CHECK(hosted_events_of(pair.ours) == UL_DATA);
    close_monitor(mon);
    close_pair(pair);
}

/* With UL_ONCE, since the kernel tells of them no more. */
static void what_had_no_room_keeps_the_host_awake(enum ul_kind kind) {
    enum { PAIRS = 50 };
    ul_fdmon *mon = open_hosted(kind);
    struct pair pairs[PAIRS];
    ul_event out[1];
    int reported = 0;
    for (int i = 0; i < PAIRS; i++) {
        pairs[i] = open_pair();
        put(pairs[i].peer);
        CHECK(ul_fdmon_update(mon, pairs[i].ours, UL_READ | UL_ONCE) == 0);
    }
    prepare(-1);
    for (int turns = 0; turns < 3 * PAIRS && reported < PAIRS && is_woken(SOON); turns++) {
        reported += ul_fdmon_turn(mon, 0, out, 1);
        if (turns % 3 == 0)
            prepare(-1);
        else if (kind == UL_POLL)
            ask();
    }
    CHECK(reported == PAIRS);
    settle();
    close_monitor(mon);
    for (int i = 0; i < PAIRS; i++)
        close_pair(pairs[i]);
}

static void a_host_is_woken_on_demand_and_nobody_else_is(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    ul_event out[4];
    int before = open_descriptors();
    ul_fdmon_wake_host(mon);
    CHECK(open_descriptors() == before);
    host = (struct host){.mon = mon};
    ask();
    settle();
    for (int i = 0; i < 3; i++) {
        CHECK(prepare(i == 2 ? now_ns() + 3600 * 1000 * MS : -1) == 0);
        ul_fdmon_wake_host(mon);
        ul_fdmon_wake_host(mon);
        CHECK(is_woken(SOON));
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        CHECK(!is_woken(2 * MS));
        ul_fdmon_wake_host(mon);
        CHECK(is_woken(SOON)); /* or it looks after itself what is due */
        CHECK(prepare(-1) == 0);
        CHECK(!is_woken(2 * MS));
    }
    ul_ring *spare;
    CHECK(ul_fdmon_close(mon, &spare) == 0);
    ul_fdmon_wake_host(mon);
    CHECK(ul_fdmon_prepare(mon, -1) == -EBADF && ul_fdmon_host_fds(mon, NULL, 0, &host.version) == -EBADF);
    ul_fdmon_free(mon);
    ul_ring_free(spare);
}

static void *wake_who_waits(void *mon) {
    until_somebody_waits(mon);
    ul_fdmon_wake_host(mon);
    return NULL;
}

/* The turn has seen the timer, and epoll tells of that no more. */
static void a_wake_up_that_ended_a_wait_does_not_hide_the_next_one(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    ul_event out[4];
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, wake_who_waits, mon) == 0);
    CHECK(ul_fdmon_turn(mon, 5 * SOON, out, 4) == 0);
    pthread_join(thread, NULL);
    CHECK(!is_woken(0));
    ul_fdmon_wake_host(mon);
    CHECK(is_woken(SOON));
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    settle();
    close_monitor(mon);
}

/* ---- times ---- */

static void a_host_is_woken_at_its_time_and_not_before(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    ul_event out[4];
    for (int i = 0; i < 5; i++) {
        int64_t wake_ns = now_ns() + (1 + i * 5) * MS;
        if (CHECK(prepare(wake_ns) == 0 || now_ns() >= wake_ns))
            CHECK(is_woken(SOON) && now_ns() >= wake_ns && now_ns() < wake_ns + SOON);
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        settle();
    }
    close_monitor(mon);
}

static void a_time_that_is_past_is_due_now(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    ul_event out[4];
    for (int i = 0; i < 3; i++) {
        CHECK(prepare(i == 0 ? 0 : i == 1 ? 1 : now_ns()) == 1);
        CHECK(is_woken(SOON));
        CHECK(prepare(0) == 1 && is_woken(SOON));
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        settle();
    }
    close_monitor(mon);
}

static void an_earlier_time_takes_the_place_of_a_later_one(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    int64_t hour = 3600 * 1000 * MS, wake_ns = now_ns() + 30 * MS;
    CHECK(prepare(now_ns() + hour) == 0);
    CHECK(prepare(now_ns() + hour / 2) == 0);
    CHECK(prepare(wake_ns) == 0);
    check_woken_at(wake_ns);
    CHECK(!is_woken(2 * MS)); /* once */
    settle();
    close_monitor(mon);
}

static void a_later_time_costs_at_most_the_wake_up_of_the_earlier_one(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    int64_t first_ns = now_ns() + 10 * MS, wake_ns = first_ns + 30 * MS;
    ul_event out[4];
    CHECK(prepare(first_ns) == 0);
    uint64_t sqes = statistics_of(mon).sqes;
    CHECK(prepare(wake_ns) == 0);
    CHECK(statistics_of(mon).sqes == sqes);
    int wakes = 0;
    for (; now_ns() < wake_ns && is_woken(SOON); wakes++) {
        CHECK(now_ns() >= first_ns);
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        if (now_ns() < wake_ns)
            prepare(wake_ns);
    }
    CHECK(wakes == 1 || wakes == 2);
    settle();
    CHECK(prepare(now_ns() + 5 * MS) == 0);
    CHECK(prepare(-1) == 0); /* nor does a time that is taken back */
    wakes = 0;
    for (int64_t end = now_ns() + 20 * MS; now_ns() < end && is_woken(end - now_ns()); wakes++) {
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
        prepare(-1);
    }
    CHECK(wakes <= 1);
    close_monitor(mon);
}

/* The first one fires while it is changed, before, or not at all. */
static void a_time_is_never_lost_to_one_that_fires_meanwhile(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    ul_event out[4];
    for (int i = 0; i < 2000 && !checks_failed; i++) {
        int64_t start = now_ns(), wake_ns = start + 300000;
        ul_fdmon_prepare(mon, start + 2000 + i % 50 * 1000);
        ul_fdmon_prepare(mon, wake_ns);
        for (int turns = 0; now_ns() < wake_ns && CHECK(is_woken(SOON) && turns < 5); turns++) {
            CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
            if (now_ns() < wake_ns)
                ul_fdmon_prepare(mon, wake_ns);
        }
        for (int64_t soon_ns = now_ns() + 100000; i % 50 == 0 && now_ns() < soon_ns;)
            ul_fdmon_prepare(mon, soon_ns + 1000 - i);
        ul_fdmon_prepare(mon, now_ns() + 3600 * 1000 * MS);
        ul_fdmon_prepare(mon, now_ns() + 1000);
        CHECK(is_woken(SOON));
        CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    }
    settle();
    close_monitor(mon);
}

static void a_host_with_nothing_to_do_is_not_woken_in_a_second(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(prepare(now_ns() + 3600 * 1000 * MS) == 0);
    CHECK(!is_woken(1000 * MS));
    CHECK(prepare(-1) == 0);
    close_monitor(mon);
    close_pair(pair);
}

/* ---- threads, forks, endings ---- */

/* The kernel ends what a ring had that was dropped some milliseconds later, and signals its eventfd a last time. */
static void settle_after_a_move(void) {
    ul_event out[4];
    int wakes = 0;
    for (prepare(-1); is_woken(30 * MS) && wakes++ < 5; prepare(-1))
        CHECK(ul_fdmon_turn(host.mon, 0, out, 4) == 0);
    CHECK(wakes < 5);
}

static void *take_a_turn(void *mon) {
    ul_event out[4];
    CHECK(ul_fdmon_turn(mon, 0, out, 4) == 0);
    return NULL;
}

static void *prepare_here(void *wake_ns) {
    CHECK(ul_fdmon_prepare(host.mon, *(int64_t *)wake_ns) >= 0);
    return NULL;
}

static void a_time_and_a_watch_outlive_the_threads_that_the_monitor_moves_to(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    int64_t wake_ns = now_ns() + 300 * MS; /* after the last words of the ring that is dropped */
    CHECK(prepare(wake_ns) == 0);
    if (kind == UL_IO_URING) /* so that the turn has to do with the kernel */
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    in_thread(take_a_turn, mon);
    check_woken_at(wake_ns);
    settle_after_a_move();
    wake_ns = now_ns() + 300 * MS;
    in_thread(prepare_here, &wake_ns); /* from a wrong thread: it is the host now, and ends */
    check_woken_at(wake_ns);
    settle_after_a_move();
    put(pair.peer);
    CHECK(hosted_events_of(pair.ours) == UL_READ);
    CHECK(statistics_of(mon).downgrades == 0);
    close_monitor(mon);
    close_pair(pair);
}

static void *wait_for_an_event(void *mon) {
    ul_event out[4];
    CHECK(next_events(mon, out, 4, 5 * SOON) == 1);
    return NULL;
}

static void nothing_is_prepared_while_another_thread_waits(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    struct pair pair = open_pair();
    pthread_t waiter;
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(pthread_create(&waiter, NULL, wait_for_an_event, mon) == 0);
    for (int64_t end = now_ns() + SOON; ul_fdmon_prepare(mon, -1) != -EBUSY && now_ns() < end;)
        ;
    CHECK(ul_fdmon_prepare(mon, -1) == -EBUSY);
    put(pair.peer);
    pthread_join(waiter, NULL);
    take(pair.ours);
    settle_after_a_move();
    close_monitor(mon);
    close_pair(pair);
}

static void a_child_has_a_time_of_its_own(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    int status, parents = host.polled[host.count - 1].fd;
    int64_t start = now_ns(), wake_ns = start + 60 * MS;
    CHECK(prepare(wake_ns) == 0);
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        CHECK(fcntl(parents, F_GETFD) < 0);
        int before = open_descriptors();
        ul_fdmon_wake_host(mon); /* nobody has asked yet */
        CHECK(open_descriptors() == before);
        CHECK(ask());
        CHECK(prepare(start + 30 * MS) >= 0);
        CHECK(is_woken(SOON) && now_ns() >= start + 30 * MS);
        settle();
        prepare(start + 3600 * 1000 * MS);
        close_monitor(mon);
        _exit(checks_failed != 0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(!ask());
    check_woken_at(wake_ns);
    settle();
    close_monitor(mon);
}

static void a_monitor_closed_with_a_time_ahead_leaves_a_ring_without_it(enum ul_kind kind) {
    for (int way = 0; way < 3; way++) {
        ul_fdmon *mon = open_hosted(kind);
        ul_setup_info info;
        struct pair pair = open_pair();
        prepare(now_ns() + (way ? 3600 * 1000 : 2) * MS);
        if (way == 2)
            prepare(now_ns() + 2 * MS);
        ul_ring *spare = close_and_keep_ring(mon);
        CHECK(spare != NULL && !ul_ring_has_work(spare) && ul_ring_unsubmitted(spare) == 0);
        CHECK(ul_fdmon_new(kind, spare, &mon, &info) == 0);
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        CHECK(is_quiet(mon, 10 * MS));
        CHECK(statistics_of(mon).cqes == 0);
        put(pair.peer);
        CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
        close_monitor(mon);
        close_pair(pair);
    }
}

/* ---- losses ---- */

static void a_timer_that_the_application_has_closed_is_made_anew_and_its_number_left_alone(enum ul_kind kind) {
    for (int reused = 0; reused <= 1; reused++) {
        ul_fdmon *mon = open_hosted(kind);
        struct pair pair = open_pair();
        int number = mon->timerfd;
        put(pair.peer);
        CHECK(prepare(now_ns() + 3600 * 1000 * MS) == 0);
        if (reused)
            CHECK(dup3(pair.ours, number, O_CLOEXEC) == number);
        else
            close(number);
        if (kind == UL_POLL)
            CHECK(is_woken(0) && prepare(now_ns() + 3600 * 1000 * MS) == 1);
        int64_t wake_ns = now_ns() + 10 * MS;
        CHECK(prepare(wake_ns) == 0);
        check_woken_at(wake_ns);
        settle();
        CHECK(mon->timerfd != number || !reused);
        prepare(now_ns() + 3600 * 1000 * MS);
        int second = mon->timerfd;
        if (reused)
            CHECK(dup3(pair.ours, second, O_CLOEXEC) == second);
        close_monitor(mon);
        CHECK((fcntl(second, F_GETFD) >= 0) == reused);
        if (reused) {
            take(number); /* nobody has read it */
            close(number);
            close(second);
        }
        close_pair(pair);
    }
}

/* A forked child's, say: the entry of the epoll set outlives the number, and nobody can take it out. */
static void a_closed_timer_of_which_there_is_a_copy_does_not_keep_the_host_awake(enum ul_kind kind) {
    ul_fdmon *mon = open_hosted(kind);
    int64_t wake_ns = now_ns() + 10 * MS;
    CHECK(prepare(wake_ns) == 0);
    int copy = dup_cloexec(mon->timerfd);
    close(mon->timerfd);
    check_woken_at(wake_ns);
    settle();
    close_monitor(mon);
    close(copy);
}

static void without_a_descriptor_for_the_host_the_call_says_so(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct rlimit before, none;
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    none = (struct rlimit){0, before.rlim_max};
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    CHECK(ul_fdmon_host_fds(mon, NULL, 0, &host.version) == -EMFILE);
    CHECK(ul_fdmon_prepare(mon, now_ns() + 10 * MS) == -EMFILE);
    ul_fdmon_wake_host(mon);
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    host = (struct host){.mon = mon};
    int64_t wake_ns = now_ns() + 10 * MS;
    CHECK(prepare(wake_ns) == 0);
    check_woken_at(wake_ns);
    close_monitor(mon);
}

static long refuse(const struct enter_call *call) {
    (void)call;
    return -EPERM;
}

static long refuse_epoll(void) { return -EFAULT; }

/* The kernel refuses a timeout without a time. */
static long spoil_timeouts(const struct enter_call *call) {
    for (uint32_t i = *host.mon->ring->sq_head; i != host.mon->ring->sq_tail; i++) {
        struct ul_sqe *sqe = &host.mon->ring->sqes[i & host.mon->ring->sq_mask];
        sqe->len = sqe->opcode == UL_OP_TIMEOUT ? 0 : sqe->len;
    }
    return real_enter(call);
}

/* The host learns of it by the descriptor it has or by what it calls, and polls others from then on. */
static void a_host_and_its_time_survive_a_downgrade(enum ul_kind kind) {
    static long (*const moods[])(const struct enter_call *call) = {refuse, refuse, spoil_timeouts};
    for (int way = 0; way < (kind == UL_IO_URING ? 3 : 1); way++) {
        ul_fdmon *mon = open_hosted(kind);
        struct pair pair = open_pair(), other = open_pair();
        ul_event out[4];
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        int64_t wake_ns = now_ns() + 50 * MS;
        if (way < 2)
            CHECK(prepare(wake_ns) == 0);
        on_enter = moods[way];
        on_epoll_pwait2 = kind == UL_EPOLL ? refuse_epoll : NULL;
        if (way > 0)
            CHECK(ul_fdmon_update(mon, other.ours, UL_READ) == 0 && prepare(wake_ns) == 1 && is_woken(SOON));
        CHECK(ul_fdmon_turn(mon, way == 0, out, 4) == UL_DOWNGRADED);
        CHECK(way == 1 || is_woken(SOON)); /* the old one, for once; or it has woken the host to this turn */
        believe_the_kernel();
        CHECK(ul_fdmon_update(mon, other.ours, UL_READ) == 0);
        CHECK(ask());
        CHECK(prepare(wake_ns) == 0 && !is_woken(0));
        check_woken_at(wake_ns);
        put(other.peer);
        prepare(-1);
        CHECK(hosted_events_of(other.ours) == UL_READ);
        take(other.ours);
        settle();
        close_monitor(mon);
        close_pair(pair);
        close_pair(other);
    }
}

TESTS(TEST(a_host_is_told_what_to_poll_and_when_that_changes, ON_ALL),
      TEST(a_change_that_the_host_of_poll_has_not_seen_wakes_it_until_it_asks, ON_POLL),
      TEST(a_watch_that_was_prepared_wakes_the_host_without_another_call, ON_ALL),
      TEST(a_watch_of_what_is_ready_is_due_at_once_or_wakes_the_host, ON_ALL),
      TEST(nothing_stays_in_the_queue_of_a_host_that_sleeps, ON_ALL),
      TEST(a_send_that_was_prepared_leaves_and_its_end_wakes_the_host, ON_IO_URING),
      TEST(a_host_that_sleeps_leaves_the_kernel_every_buffer, ON_IO_URING), TEST(what_had_no_room_keeps_the_host_awake, ON_ALL),
      TEST(a_host_is_woken_on_demand_and_nobody_else_is, ON_ALL),
      TEST(a_wake_up_that_ended_a_wait_does_not_hide_the_next_one, ON_EPOLL),
      TEST(a_host_is_woken_at_its_time_and_not_before, ON_ALL), TEST(a_time_that_is_past_is_due_now, ON_ALL),
      TEST(an_earlier_time_takes_the_place_of_a_later_one, ON_ALL),
      TEST(a_later_time_costs_at_most_the_wake_up_of_the_earlier_one, ON_ALL),
      TEST(a_time_is_never_lost_to_one_that_fires_meanwhile, ON_ALL),
      TEST(a_host_with_nothing_to_do_is_not_woken_in_a_second, ON_ALL),
      TEST(a_time_and_a_watch_outlive_the_threads_that_the_monitor_moves_to, ON_ALL),
      TEST(nothing_is_prepared_while_another_thread_waits, ON_ALL), TEST(a_child_has_a_time_of_its_own, ON_ALL),
      TEST(a_monitor_closed_with_a_time_ahead_leaves_a_ring_without_it, ON_IO_URING),
      TEST(a_timer_that_the_application_has_closed_is_made_anew_and_its_number_left_alone, ON_EPOLL | ON_POLL),
      TEST(a_closed_timer_of_which_there_is_a_copy_does_not_keep_the_host_awake, ON_EPOLL),
      TEST(without_a_descriptor_for_the_host_the_call_says_so, ON_ALL),
      TEST(a_host_and_its_time_survive_a_downgrade, ON_IO_URING | ON_EPOLL))
