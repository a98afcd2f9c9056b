/*
 * client.c: the load generator of the benchmarks, one thread on one core.
 *
 * Why C: it must cost less per request than any server under test, or the numbers would be its own.
 * The promise it keeps: every byte that comes back is compared with what was sent. A message is a slice
 * of one random buffer, its offset differs per connection and per message, so bytes that are stale, cut,
 * repeated or somebody else's never compare equal. One message is in flight per connection.
 *
 * Phases: every connection exchanges one message and waits for the others, so that connecting is not
 * measured; warm-up; the window, over which everything is measured; at last, what is under way comes home.
 * Prints one JSON line. Exit: 0 fine, 1 mismatch, 2 usage, 3 connection errors, 77 skipped (no libssl).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    PATTERN_OFFSETS = 65521, /* prime: offsets of successive messages visit all of them */
    SIZE_MAX_BYTES = 4 << 20,
    HTTP_BYTES = 16384,
    EVENTS = 256,
    ANSWER_LIMIT_S = 10,
    UDP_RESEND_NS = 200 * 1000 * 1000,
    PORTS_PER_ADDRESS = 16384, /* churn changes its source address before the ephemeral ports run out */
};
enum { WOULD_BLOCK = -1, BROKEN = -2 };
enum mode { TCP, TLS, UDP, HTTP, CHURN, MODES };

static const char *const mode_names[MODES] = {"tcp", "tls", "udp", "http", "churn"};

struct connection {
    int fd;
    void *ssl;
    unsigned index;
    unsigned long messages; /* finished ones */
    unsigned long in_window;
    const char *message, *resent; /* resent: the message that was last sent twice, UDP only */
    size_t sent, received;
    int64_t started_ns, sent_ns;
    char *response; /* HTTP only */
};

static struct {
    enum mode mode;
    int port;
    size_t size_bytes;
    unsigned connections;
    int64_t think_ns;
    double warmup_s, window_s;
    pid_t server;
    const char *body;
} options = {.mode = MODES, .size_bytes = 1024, .connections = 1, .warmup_s = 0.1, .window_s = 0.3, .body = ""};

static struct {
    unsigned long requests, total, mismatches, errors, resends, duplicates, opened;
    unsigned home; /* connections that have no message under way, before and after the load */
    unsigned lost; /* connections that are closed */
    char reason[160];
} tally;

static const char http_request[] = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
static struct connection *connections;
static char *pattern, *buffer;
static size_t request_bytes; /* what is sent per message; the reply has size_bytes, HTTP excepted */
static int epoll_fd;
static bool loading, measuring, stop;

/* ---- time and latency ---- */

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;

    if (clock_gettime(clock, &t))
        return 0;
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

/* CPU time of all threads of the server, ended ones included. The kernel brings a running thread's
 * figure up to date at its tick, so a window carries an unbiased error of at most one tick (1-4 ms). */
static int64_t server_cpu_ns(void) {
    clockid_t clock;

    if (!options.server || clock_getcpuclockid(options.server, &clock))
        return 0;
    return clock_ns(clock);
}

/* Time the server's main thread was ready to run and had no core: somebody else was on it. */
static int64_t server_wait_ns(void) {
    char path[64];
    long long wait = 0;
    FILE *file;

    snprintf(path, sizeof path, "/proc/%d/schedstat", (int)options.server);
    file = fopen(path, "r");
    if (!file)
        return 0;
    if (fscanf(file, "%*d %lld", &wait) != 1)
        wait = 0;
    fclose(file);
    return wait;
}

/* Log-linear: 64 buckets per power of two, so a percentile is right within 1.6 %. */
enum { SUB_BITS = 6, SUB = 1 << SUB_BITS, OCTAVES = 40 };
static unsigned long histogram[OCTAVES * SUB];

static void record_latency(int64_t ns) {
    uint64_t v = ns < SUB ? SUB : (uint64_t)ns;
    int octave = 63 - __builtin_clzll(v) - SUB_BITS;

    if (octave >= OCTAVES)
        octave = OCTAVES - 1, v = UINT64_MAX >> (63 - octave - SUB_BITS);
    histogram[octave * SUB + (int)(v >> octave) - SUB]++;
}

static double percentile_us(double share) {
    unsigned long rank = (unsigned long)(share * (double)tally.requests), seen = 0;

    for (int i = 0; i < OCTAVES * SUB; i++) {
        seen += histogram[i];
        if (seen > rank)
            return (double)((uint64_t)(SUB + i % SUB) << (i / SUB)) / 1e3;
    }
    return 0;
}

/* ---- TLS: libssl is loaded at run time and declared by hand, so no OpenSSL headers are needed ---- */

static struct {
    void *(*client_method)(void);
    void *(*context_new)(void *);
    long (*context_ctrl)(void *, int, long, void *);
    void *(*new)(void *);
    int (*set_fd)(void *, int);
    void (*set_connect_state)(void *);
    int (*write)(void *, const void *, int);
    int (*read)(void *, void *, int);
    int (*get_error)(const void *, int);
    void *context;
} tls;

static void tls_skip(const char *why) {
    printf("{\"skip\": \"%s\"}\n", why);
    exit(77);
}

static void *tls_symbol(void *library, const char *name) {
    void *symbol = dlsym(library, name);

    if (!symbol)
        tls_skip("libssl lacks a function the client needs");
    return symbol;
}

static void tls_load(void) {
    enum { CTRL_MODE = 33, CTRL_READ_AHEAD = 41, PARTIAL_WRITE = 1, MOVING_BUFFER = 2 };
    void *library = dlopen("libssl.so.3", RTLD_NOW);

    if (!library)
        library = dlopen("libssl.so.1.1", RTLD_NOW);
    if (!library)
        tls_skip("libssl.so.3 not found");
    /* POSIX promises that a dlsym() result may be stored through a void ** like this. */
    *(void **)&tls.client_method = tls_symbol(library, "TLS_client_method");
    *(void **)&tls.context_new = tls_symbol(library, "SSL_CTX_new");
    *(void **)&tls.context_ctrl = tls_symbol(library, "SSL_CTX_ctrl");
    *(void **)&tls.new = tls_symbol(library, "SSL_new");
    *(void **)&tls.set_fd = tls_symbol(library, "SSL_set_fd");
    *(void **)&tls.set_connect_state = tls_symbol(library, "SSL_set_connect_state");
    *(void **)&tls.write = tls_symbol(library, "SSL_write");
    *(void **)&tls.read = tls_symbol(library, "SSL_read");
    *(void **)&tls.get_error = tls_symbol(library, "SSL_get_error");
    tls.context = tls.context_new(tls.client_method());
    if (!tls.context)
        tls_skip("SSL_CTX_new failed");
    tls.context_ctrl(tls.context, CTRL_MODE, PARTIAL_WRITE | MOVING_BUFFER, NULL);
    tls.context_ctrl(tls.context, CTRL_READ_AHEAD, 1, NULL);
}

static ssize_t tls_result(struct connection *c, int n) {
    enum { WANT_READ = 2, WANT_WRITE = 3 };
    int error;

    if (n > 0)
        return n;
    error = tls.get_error(c->ssl, n);
    return error == WANT_READ || error == WANT_WRITE ? WOULD_BLOCK : BROKEN;
}

/* ---- one socket ---- */

static ssize_t socket_result(ssize_t n) {
    if (n >= 0)
        return n;
    return errno == EAGAIN || errno == EINTR ? WOULD_BLOCK : BROKEN;
}

static ssize_t send_some(struct connection *c, const char *data, size_t n) {
    if (c->ssl)
        return tls_result(c, tls.write(c->ssl, data, (int)n));
    return socket_result(send(c->fd, data, n, MSG_NOSIGNAL));
}

static ssize_t receive_some(struct connection *c, char *data, size_t n) {
    if (c->ssl)
        return tls_result(c, tls.read(c->ssl, data, (int)n));
    return socket_result(recv(c->fd, data, n, 0));
}

static void drop(struct connection *c, const char *why) {
    tally.errors++;
    tally.lost++;
    if (!tally.reason[0])
        snprintf(tally.reason, sizeof tally.reason, "connection %u, message %lu: %s", c->index, c->messages, why);
    close(c->fd);
    c->fd = -1;
    if (!c->messages)
        stop = true;
}

static void mismatch(struct connection *c, const char *what) {
    tally.mismatches++;
    snprintf(tally.reason, sizeof tally.reason, "connection %u, message %lu, byte %zu of %zu: %s", c->index, c->messages,
             c->received, options.size_bytes, what);
    stop = true;
}

/* TIME_WAIT holds the ports of closed connections; a new source address brings a new set of ports. */
static void bind_source(struct connection *c) {
    unsigned long nth = tally.opened++ / PORTS_PER_ADDRESS;
    struct sockaddr_in source = {.sin_family = AF_INET};

    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + (uint32_t)(nth % 250));
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &(int){1}, sizeof(int));
    if (bind(c->fd, (struct sockaddr *)&source, sizeof source))
        perror("bind");
}

static bool open_connection(struct connection *c) {
    int type = options.mode == UDP ? SOCK_DGRAM : SOCK_STREAM;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};

    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        return false;
    if (type == SOCK_STREAM)
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    if (options.mode == CHURN)
        bind_source(c);
    if (options.mode == TLS) {
        c->ssl = tls.new(tls.context);
        tls.set_fd(c->ssl, c->fd);
        tls.set_connect_state(c->ssl);
    }
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS)
        return false;
    return !epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
}

/* ---- messages ---- */

static void begin_message(struct connection *c, int64_t now) {
    unsigned long nth = c->messages * 7919 + c->index * 104729UL;

    c->message = options.mode == HTTP ? http_request : pattern + nth % PATTERN_OFFSETS;
    c->sent = c->received = 0;
    c->started_ns = c->sent_ns = now;
}

/* The pause before the next request. It spins: a sleep would end tens of microseconds late, by another time at every turn. */
static int64_t think(int64_t now) {
    int64_t end = now + options.think_ns;

    while (now < end)
        now = now_ns();
    return now;
}

static void finish_message(struct connection *c) {
    int64_t now = now_ns();

    tally.total++;
    c->messages++;
    if (measuring) {
        tally.requests++;
        c->in_window++;
        record_latency(now - c->started_ns);
    }
    if (!loading) {
        c->message = NULL;
        tally.home++;
        return;
    }
    begin_message(c, think(now));
    if (options.mode == CHURN) {
        close(c->fd);
        if (!open_connection(c))
            drop(c, strerror(errno));
    }
}

static void send_message(struct connection *c) {
    while (c->sent < request_bytes) {
        ssize_t n = send_some(c, c->message + c->sent, request_bytes - c->sent);

        if (n == BROKEN)
            drop(c, strerror(errno));
        if (n < 0)
            return;
        c->sent += (size_t)n;
    }
}

/* Asks for one byte more than is due: a surplus byte shows at once, and a short read means that the
 * socket is drained, which saves the recv() that would only say EAGAIN. */
static void receive_stream(struct connection *c) {
    for (;;) {
        size_t due = options.size_bytes - c->received;
        ssize_t n = receive_some(c, buffer, due + 1);

        if (n == WOULD_BLOCK)
            return;
        if (n <= 0)
            return drop(c, n ? strerror(errno) : "unexpected end of file");
        if ((size_t)n > due)
            return mismatch(c, "surplus bytes");
        if (memcmp(buffer, c->message + c->received, (size_t)n))
            return mismatch(c, "wrong bytes");
        c->received += (size_t)n;
        if ((size_t)n == due)
            return finish_message(c);
        if (!c->ssl)
            return;
    }
}

/* A datagram sent twice may be answered twice; only such a second answer is forgiven. */
static void receive_datagram(struct connection *c) {
    ssize_t n = receive_some(c, buffer, options.size_bytes + 1);

    if (n == WOULD_BLOCK)
        return;
    if (n < 0)
        return drop(c, strerror(errno));
    if ((size_t)n == options.size_bytes && !memcmp(buffer, c->message, (size_t)n))
        return finish_message(c);
    if ((size_t)n != options.size_bytes || !c->resent || memcmp(buffer, c->resent, (size_t)n))
        return mismatch(c, "wrong datagram");
    tally.duplicates++;
    receive_datagram(c);
}

static const char *header_value(const char *head, const char *name) {
    for (const char *line = head; (line = strstr(line, "\r\n"));) {
        line += 2;
        if (!strncasecmp(line, name, strlen(name)))
            return line + strlen(name);
    }
    return NULL;
}

static void check_response(struct connection *c) {
    char *end;
    const char *length;
    size_t head, body;

    c->response[c->received] = 0;
    end = strstr(c->response, "\r\n\r\n");
    if (!end)
        return;
    head = (size_t)(end - c->response) + 4;
    length = header_value(c->response, "content-length:");
    body = length ? strtoul(length, NULL, 10) : 0;
    if (strncmp(c->response, "HTTP/1.1 200", 12) || body != strlen(options.body))
        return mismatch(c, "wrong status or length");
    if (c->received < head + body)
        return;
    if (c->received > head + body || memcmp(c->response + head, options.body, body))
        return mismatch(c, "wrong body");
    finish_message(c);
}

static void receive_http(struct connection *c) {
    ssize_t n = receive_some(c, c->response + c->received, HTTP_BYTES - 1 - c->received);

    if (n == WOULD_BLOCK)
        return;
    if (n <= 0)
        return drop(c, n ? strerror(errno) : "unexpected end of file");
    c->received += (size_t)n;
    check_response(c);
}

static void pump(struct connection *c) {
    unsigned long before = c->messages;

    if (c->fd < 0 || !c->message)
        return;
    send_message(c);
    if (c->fd < 0)
        return;
    if (options.mode == UDP)
        receive_datagram(c);
    else if (options.mode == HTTP)
        receive_http(c);
    else
        receive_stream(c);
    if (c->messages != before && c->fd >= 0 && c->message && !stop)
        send_message(c);
}

static void resend_lost(int64_t now) {
    for (unsigned i = 0; i < options.connections; i++) {
        struct connection *c = &connections[i];

        if (c->fd < 0 || !c->message || now - c->sent_ns < UDP_RESEND_NS)
            continue;
        tally.resends++;
        c->resent = c->message;
        c->sent = 0;
        c->sent_ns = now;
        send_message(c);
    }
}

/* ---- the run ---- */

static void turn(int64_t deadline) {
    struct epoll_event events[EVENTS];
    int64_t left_ms = (deadline - now_ns()) / 1000000 + 1;
    int n = epoll_wait(epoll_fd, events, EVENTS, left_ms < 50 ? (int)left_ms : 50);

    for (int i = 0; i < n && !stop; i++)
        pump(events[i].data.ptr);
    if (options.mode == UDP && n < EVENTS)
        resend_lost(now_ns());
}

static void run_until(int64_t deadline) {
    while (!stop && now_ns() < deadline)
        turn(deadline);
}

/* Waits until no message is under way any more. */
static void come_home(void) {
    int64_t deadline = now_ns() + (int64_t)ANSWER_LIMIT_S * 1000000000;
    unsigned missing;

    loading = false;
    while (!stop && tally.home + tally.lost < options.connections && now_ns() < deadline)
        turn(deadline);
    missing = options.connections - tally.home - tally.lost;
    if (stop || !missing)
        return;
    tally.errors += missing;
    snprintf(tally.reason, sizeof tally.reason, "%u connections had no answer in %d s", missing, ANSWER_LIMIT_S);
    stop = true;
}

static void open_all(void) {
    for (unsigned i = 0; i < options.connections && !stop; i++) {
        struct connection *c = &connections[i];

        c->index = i;
        c->response = options.mode == HTTP ? malloc(HTTP_BYTES) : NULL;
        begin_message(c, now_ns());
        if (!open_connection(c))
            drop(c, strerror(errno));
        else if (options.mode == UDP)
            send_message(c);
    }
    come_home();
}

static void start_load(void) {
    loading = true;
    tally.home = 0;
    for (unsigned i = 0; i < options.connections && !stop; i++) {
        begin_message(&connections[i], now_ns());
        send_message(&connections[i]);
    }
}

static unsigned starved(void) {
    unsigned n = 0;

    for (unsigned i = 0; i < options.connections; i++)
        n += !connections[i].in_window;
    return n;
}

static void measure(void) {
    int64_t server, waited, self, start, length;

    start_load();
    run_until(now_ns() + (int64_t)(options.warmup_s * 1e9));
    waited = server_wait_ns();
    server = server_cpu_ns();
    self = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    start = now_ns();
    measuring = true;
    run_until(start + (int64_t)(options.window_s * 1e9));
    length = now_ns() - start;
    self = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - self;
    server = server_cpu_ns() - server;
    waited = server_wait_ns() - waited;
    measuring = false;
    come_home();
    printf(
        "{\"requests\": %lu, \"total\": %lu, \"started_s\": %.6f, \"seconds\": %.6f, \"client_cpu_s\": %.6f, \"server_cpu_s\": "
        "%.6f, "
        "\"server_wait_s\": %.6f, \"p50_us\": %.1f, \"p90_us\": %.1f, \"p99_us\": %.1f, \"mismatches\": %lu, \"errors\": %lu, "
        "\"resends\": %lu, \"duplicates\": %lu, \"starved\": %u, \"reason\": \"%s\"}\n",
        tally.requests, tally.total, (double)start / 1e9, (double)length / 1e9, (double)self / 1e9, (double)server / 1e9,
        (double)waited / 1e9, percentile_us(0.5), percentile_us(0.9), percentile_us(0.99), tally.mismatches, tally.errors,
        tally.resends, tally.duplicates, starved(), tally.reason);
}

static void usage(const char *why) {
    fprintf(stderr,
            "%s\nusage: client -m tcp|tls|udp|http|churn -p PORT [-s SIZE_BYTES] [-c CONNECTIONS] [-k THINK_US] "
            "[-w WARMUP_S] [-t WINDOW_S] [-P SERVER_PID] [-b HTTP_BODY]\n",
            why);
    exit(2);
}

static void parse(int argc, char **argv) {
    for (int opt; (opt = getopt(argc, argv, "m:p:s:c:k:w:t:P:b:")) != -1;) {
        switch (opt) {
        case 'm':
            for (options.mode = 0; options.mode < MODES && strcmp(optarg, mode_names[options.mode]);)
                options.mode++;
            break;
        case 'p':
            options.port = atoi(optarg);
            break;
        case 's':
            options.size_bytes = strtoul(optarg, NULL, 10);
            break;
        case 'c':
            options.connections = (unsigned)atoi(optarg);
            break;
        case 'k':
            options.think_ns = atol(optarg) * 1000;
            break;
        case 'w':
            options.warmup_s = atof(optarg);
            break;
        case 't':
            options.window_s = atof(optarg);
            break;
        case 'P':
            options.server = atoi(optarg);
            break;
        case 'b':
            options.body = optarg;
            break;
        default:
            usage("unknown option");
        }
    }
    if (options.mode == MODES || options.port <= 0 || !options.connections || !options.size_bytes ||
        options.size_bytes > SIZE_MAX_BYTES)
        usage("mode, port, size or connections missing or wrong");
    if (options.think_ns && options.connections > 1)
        usage("a thinking client has one connection: the others would wait for it as well");
}

static void prepare(void) {
    size_t n = PATTERN_OFFSETS + options.size_bytes + 64;
    uint64_t x = 88172645463325252u;

    request_bytes = options.mode == HTTP ? strlen(http_request) : options.size_bytes;
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    connections = calloc(options.connections, sizeof *connections);
    pattern = malloc(n);
    buffer = aligned_alloc(4096, (options.size_bytes + 8192) & ~(size_t)4095);
    if (epoll_fd < 0 || !connections || !pattern || !buffer)
        usage(strerror(errno));
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        pattern[i] = (char)(x >> 32);
    }
}

int main(int argc, char **argv) {
    parse(argc, argv);
    alarm((unsigned)(2 * ANSWER_LIMIT_S + options.warmup_s + options.window_s) + 5);
    prepare();
    if (options.mode == TLS)
        tls_load();
    open_all();
    measure();
    return tally.mismatches ? 1 : tally.errors ? 3 : 0;
}
