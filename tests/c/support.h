/*
 * What several C tests need: monitors, pairs of sockets, turns until something happens.
 *
 * Why it exists: ul_fdmon_turn() may return 0 before its time ("ask again"), and a test that forgets it would be right by luck.
 * Promise: each wait here is bounded, and none reports an event that the monitor did not.
 */
#ifndef SUPPORT_H
#define SUPPORT_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

#include "check.h"

#define MS 1000000LL
#define SOON (2000 * MS) /* an event that must come: generous, since nobody waits for it when all is well */

static inline int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline ul_fdmon *open_monitor(enum ul_kind kind) {
    ul_fdmon *mon = NULL;
    ul_setup_info info;
    if (!CHECK(ul_fdmon_new(kind, NULL, &mon, &info) == 0))
        fprintf(stderr, "%s: errno %d\n", info.refused_step, info.refused_errno);
    return mon;
}

static inline void close_monitor(ul_fdmon *mon) {
    ul_ring *spare;
    CHECK(ul_fdmon_close(mon, &spare) == 0);
    ul_fdmon_free(mon);
    ul_ring_free(spare);
}

static inline ul_ring *close_and_keep_ring(ul_fdmon *mon) {
    ul_ring *spare;
    CHECK(ul_fdmon_close(mon, &spare) == 0);
    ul_fdmon_free(mon);
    return spare;
}

static inline ul_statistics statistics_of(ul_fdmon *mon) {
    ul_statistics statistics;
    ul_fdmon_statistics(mon, &statistics);
    return statistics;
}

static inline ul_setup_info info_of(ul_fdmon *mon) {
    ul_setup_info info;
    ul_fdmon_setup_info(mon, &info);
    return info;
}

static inline bool monitor_is(ul_fdmon *mon, const char *name) { return strcmp(info_of(mon).name, name) == 0; }

struct pair {
    int ours, peer;
};

static inline struct pair open_pair(void) {
    int fds[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    return (struct pair){fds[0], fds[1]};
}

static inline void close_pair(struct pair pair) {
    close(pair.ours);
    close(pair.peer);
}

static inline void put(int fd) { CHECK(write(fd, "x", 1) == 1); }

static inline void take(int fd) {
    char byte;
    CHECK(read(fd, &byte, 1) == 1);
}

static inline void fill(int fd) {
    char bytes[4096] = {0};
    while (write(fd, bytes, sizeof bytes) > 0)
        ;
}

static inline void empty(int fd) {
    char bytes[4096];
    while (read(fd, bytes, sizeof bytes) > 0)
        ;
}

/* The first turn that reports something; a downgrade alone is something. 0: nothing until the time was up. */
static inline int next_events(ul_fdmon *mon, ul_event *out, int out_max, int64_t timeout_ns) {
    int64_t deadline = now_ns() + timeout_ns;
    int n;
    do {
        int64_t left = deadline - now_ns();
        n = ul_fdmon_turn(mon, left > 0 ? left : 0, out, out_max);
    } while (n == 0 && now_ns() < deadline);
    return n;
}

/* What is reported of fd within the time; other descriptors' events are taken and dropped. */
static inline uint32_t events_of(ul_fdmon *mon, int fd, int64_t timeout_ns) {
    ul_event out[64];
    int64_t deadline = now_ns() + timeout_ns;
    do {
        int n = next_events(mon, out, 64, deadline - now_ns());
        if (!CHECK(n >= 0))
            return 0;
        n &= ~UL_DOWNGRADED;
        for (int i = 0; i < n; i++)
            if (out[i].fd == fd)
                return out[i].events;
    } while (now_ns() < deadline);
    return 0;
}

/* Whether nothing is reported for this long, and without spinning. */
static inline bool is_quiet(ul_fdmon *mon, int64_t time_ns) {
    ul_event out[64];
    uint64_t before = statistics_of(mon).turns;
    bool quiet = next_events(mon, out, 64, time_ns) == 0;
    return quiet && statistics_of(mon).turns - before < 20;
}

struct long_wait {
    ul_fdmon *mon;
    int64_t timeout_ns;
    bool takes_its_time;
};

static inline void *wait_long(void *argument) {
    struct long_wait *wait = argument;
    ul_event out[1];
    int64_t start = now_ns();
    int n = ul_fdmon_turn(wait->mon, wait->timeout_ns, out, 1);
    int64_t took = now_ns() - start;
    wait->takes_its_time = n == 0 && took >= wait->timeout_ns && took < wait->timeout_ns + SOON;
    return NULL;
}

/* Whether a wait in which nothing happens takes all its time. In a thread of its own, because the kernel interrupts the waits of
 * a thread whose rings were closed, some milliseconds after each. */
static inline bool waits_at_least(ul_fdmon *mon, int64_t timeout_ns) {
    struct long_wait wait = {mon, timeout_ns, false};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, wait_long, &wait) == 0);
    pthread_join(thread, NULL);
    return wait.takes_its_time;
}

/* Returns once the other thread is in the kernel. */
static inline void until_somebody_waits(ul_fdmon *mon) {
    bool waiting = false;
    for (int64_t deadline = now_ns() + SOON; !waiting && now_ns() < deadline;) {
        pthread_mutex_lock(&mon->lock);
        waiting = mon->waiting;
        pthread_mutex_unlock(&mon->lock);
    }
    CHECK(waiting);
}

/* Whether the peer of a closed socket reads the end of file. */
static inline bool sees_end_of_file(int fd, int timeout_ms) {
    struct pollfd pollfd = {.fd = fd, .events = POLLIN};
    char byte;
    return poll(&pollfd, 1, timeout_ms) == 1 && read(fd, &byte, 1) == 0;
}

/* A descriptor of its own for the same ready or quiet file: each is a watch of its own. */
static inline int dup_cloexec(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, 3); }

#endif
