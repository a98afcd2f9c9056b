/*
 * Streams whose every byte is known: what a peer wrote must arrive, once and in order, as data or by way of recv().
 *
 * Why it exists: "no byte lost or doubled" can only be seen when each byte says where it belongs. Promise: a wrong byte is
 * counted, and data is looked at only while it is valid.
 */
#ifndef STREAM_H
#define STREAM_H

#include <netinet/in.h>
#include <netinet/tcp.h>

#include "fdmon_io_uring.h"
#include "support.h"

enum { FDS_MAX = 4096, CHUNK_MAX = 65536 };

/* What has come in on a descriptor, and what was reported of it. */
struct intake {
    uint64_t bytes;
    int wrong, data_events, read_events, write_events, ends, sents;
    int32_t end, sent;
    bool leave_it; /* do not recv() when it is readable */
};

static struct intake intakes[FDS_MAX];
static uint64_t fed[FDS_MAX]; /* bytes written to a descriptor */

static inline unsigned char byte_of(uint64_t position) { return (unsigned char)(position * 7 + (position >> 8) * 13 + 1); }

static inline struct pair open_stream(void) {
    struct pair pair = open_pair();
    intakes[pair.ours] = intakes[pair.peer] = (struct intake){0};
    fed[pair.ours] = fed[pair.peer] = 0;
    return pair;
}

static inline struct pair open_tcp_stream(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(listener, (struct sockaddr *)&address, size) == 0 && listen(listener, 8) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &size) == 0);
    struct pair pair = {.peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    CHECK(connect(pair.peer, (struct sockaddr *)&address, size) == 0);
    pair.ours = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    CHECK(fcntl(pair.peer, F_SETFL, O_NONBLOCK) == 0);
    close(listener);
    intakes[pair.ours] = intakes[pair.peer] = (struct intake){0};
    fed[pair.ours] = fed[pair.peer] = 0;
    return pair;
}

/* As if the kernel refused to receive from now on, or did so again. */
static inline void let_it_receive(ul_fdmon *mon, bool does) {
    pthread_mutex_lock(&mon->lock);
    mon->no_receive = !does;
    for (size_t fd = 0; mon->ops->streams && fd < mon->watches_cap; fd++)
        if (mon->watches[fd].events & UL_RECV)
            ul_want_armed(mon, (int)fd);
    pthread_mutex_unlock(&mon->lock);
}

/* Writes the next bytes of fd's stream; returns how many went. */
static inline size_t feed(int fd, size_t size) {
    static unsigned char bytes[CHUNK_MAX];
    size_t done = 0;
    while (done < size) {
        size_t n = size - done < CHUNK_MAX ? size - done : CHUNK_MAX;
        for (size_t i = 0; i < n; i++)
            bytes[i] = byte_of(fed[fd] + i);
        ssize_t went = send(fd, bytes, n, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (went <= 0)
            break;
        fed[fd] += (uint64_t)went;
        done += (size_t)went;
    }
    return done;
}

static inline void take_in(int fd, const unsigned char *bytes, size_t size) {
    struct intake *intake = &intakes[fd];
    for (size_t i = 0; i < size; i++)
        intake->wrong += bytes[i] != byte_of(intake->bytes + i);
    intake->bytes += size;
}

/* What the caller of a monitor reads himself, at most size bytes; false at the end of the stream. */
static inline bool read_in(int fd, size_t size) {
    static unsigned char bytes[CHUNK_MAX];
    while (size > 0) {
        ssize_t n = recv(fd, bytes, size < CHUNK_MAX ? size : CHUNK_MAX, MSG_DONTWAIT);
        if (n <= 0)
            return n < 0 && errno == EAGAIN;
        take_in(fd, bytes, (size_t)n);
        size -= (size_t)n;
    }
    return true;
}

static inline void take_event(ul_fdmon *mon, const ul_event *event) {
    struct intake *intake = &intakes[event->fd];
    if (event->events == UL_DATA && event->result > 0) {
        intake->data_events++;
        take_in(event->fd, event->data, (size_t)event->result);
    } else if (event->events == UL_DATA) {
        intake->ends++;
        intake->end = event->result;
        CHECK(!event->data);
    } else if (event->events == UL_SENT) {
        intake->sents++;
        intake->sent = event->result;
    } else {
        CHECK(event->events && !(event->events & ~(uint32_t)(UL_READ | UL_WRITE)));
        intake->read_events += (event->events & UL_READ) != 0;
        intake->write_events += (event->events & UL_WRITE) != 0;
        if (event->events & UL_READ && !intake->leave_it && !read_in(event->fd, SIZE_MAX)) {
            intake->ends++;
            ul_fdmon_update(mon, event->fd, 0);
        }
    }
}

/* One turn; the number of events it reported. */
static inline int gather(ul_fdmon *mon, int64_t timeout_ns, int out_max) {
    ul_event out[64];
    int n = ul_fdmon_turn(mon, timeout_ns, out, out_max < 64 ? out_max : 64);
    if (!CHECK(n >= 0))
        return 0;
    n &= ~UL_DOWNGRADED;
    for (int i = 0; i < n; i++)
        take_event(mon, &out[i]);
    return n;
}

static inline int gather_dispatched(ul_fdmon *mon) {
    ul_event out[64];
    int n = ul_fdmon_dispatch(mon, out, 64);
    for (int i = 0; i < n; i++)
        take_event(mon, &out[i]);
    return n;
}

/* Turns until the condition holds. */
#define GATHER_UNTIL(mon, condition)                                                                                           \
    do {                                                                                                                       \
        int64_t until_ = now_ns() + SOON;                                                                                      \
        while (!(condition) && now_ns() < until_)                                                                              \
            gather(mon, 1 * MS, 64);                                                                                           \
        CHECK(condition);                                                                                                      \
    } while (0)

/* All that was fed to the peer has come in, and nothing else comes. */
static inline void check_complete(ul_fdmon *mon, struct pair pair) {
    GATHER_UNTIL(mon, intakes[pair.ours].bytes >= fed[pair.peer]);
    CHECK(intakes[pair.ours].bytes == fed[pair.peer] && intakes[pair.ours].wrong == 0);
}

#endif
